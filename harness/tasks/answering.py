"""Who is asked in an evaluation: a model in this process, or one behind an OpenAI-compatible server.

Both answer a batch of items and say of each what they said. A model in this process also chooses among written answers and reads rows,
which takes log-probabilities of given text; no chat API has these, so that a server is refused there, with the reason.

    too_long    the conversation leaves no room for an answer, or does not fit at all
    refused     the chat template, or the server, does not take this conversation

An item that was asked in vain counts as not right, with one of these as its failure.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from harness.data.convert import as_openai
from harness.errors import DataError, EvaluationError, ModelError, RecipeError, TeacherError, first_line
from harness.evaluate.items import Item
from harness.model.export import MANIFEST
from harness.run import RunDir, advise_run, runs_below
from harness.teacher.client import WORDS, Client, Refused

IN_VAIN = (400, 413, 422)
"""A server's words for: not this conversation. Others it would say of any."""
FIRST_PATIENCE = 2
"""How often a server that has not answered yet is asked again: for some three seconds."""
LOGITS_TOKENS = 512
"""Whose log-probabilities are taken at a time; with 150,000 tokens each these are 300 MB."""


@dataclass(frozen=True)
class Settings:
    """How the answers come about: all of it decides them."""

    max_new_tokens: int = 512
    temperature: float = 0.0
    seed: int = 0
    batch_size: int = 16
    max_items: int | None = None
    """Of each category."""
    underscore_names: bool = False


@dataclass(frozen=True)
class Connection:
    """To a server; of no influence on what it says."""

    model: str | None = None
    api_key_variable: str | None = None
    timeout_s: float = 120.0
    concurrency: int = 16


@dataclass(frozen=True)
class Said:
    said: str = ""
    """As it was written, or the name of the answer that was chosen."""
    prompt_tokens: int = 0
    answer_tokens: int = 0
    """Of the loss: those that were read."""
    ended: bool = True
    failure: str | None = None
    """Why it was asked in vain."""
    detail: str = ""
    loss: float | None = None
    """Nats of all tokens that were read together."""
    scores: dict[str, float] = field(default_factory=dict)
    """Log-probability per character of each written answer."""


def is_served(target: str) -> bool:
    return target.startswith(("http://", "https://"))


# ---- a model in this process


def find_model(target: str) -> tuple[str, dict]:
    """(what transformers can load, who it is) of a run folder, a model's folder, or a hub id.

    Of a run the export counts, which is its best model where the recipe says what that is; it must be as it was exported.
    """
    from harness.embedded import resolve
    from harness.model.export import verify_export
    from harness.teacher.resident import weights_digest

    path = Path(resolve(target)).expanduser()
    if RunDir(path.resolve()).manifest.is_file():
        run = RunDir(path.resolve())
        if not run.final.is_dir():
            raise ModelError(f"{path}: this run has no final/ yet, which comes at its end; let it end, or give the folder of a model")
        exported = verify_export(run.final)
        return str(run.final), {"run": str(run.path), "step": exported["step"], "weights": weights_digest(run.final)} | _base_of(run.final)
    if path.is_dir():
        if not any((path / name).is_file() for name in ("config.json", "adapter_config.json")):
            raise RecipeError(
                f"{target}: holds no run.json, config.json or adapter_config.json; give a run, a model's folder, a hub id or a URL"
            )
        return str(path.resolve()), {"model": str(path.resolve()), "weights": weights_digest(path)} | _base_of(path)
    if re.fullmatch(r"[\w.-]+:\d+(/.*)?", target):
        raise RecipeError(f"{target}: is no folder and no hub id; a server is named by its URL: http://{target.partition('/')[0]}/v1")
    if path.is_absolute() or target.startswith(".") or target.count("/") > 1 or ("/" in target and runs_below(path.parent)):
        # Beside runs lies no organisation's model, and a name that is misspelt shall not be looked for on the hub.
        raise RecipeError(
            f"{target}: there is no such folder; {advise_run(path)}, a model's folder, a hub id or a URL that begins with http"
        )
    return target, {"model": target, "commit": _commit_of(target)}


def _base_of(folder: Path) -> dict:
    from harness.teacher.resident import weights_digest

    config = folder / "adapter_config.json"
    if not config.is_file():
        return {}
    base = json.loads(config.read_text())["base_model_name_or_path"]
    return {"base": base} | ({"base_weights": weights_digest(Path(base))} if Path(base).is_dir() else {})


def _commit_of(name: str) -> str | None:
    from huggingface_hub.errors import LocalEntryNotFoundError
    from transformers.utils.hub import cached_file, extract_commit_hash

    gone = False
    for file in ("config.json", "adapter_config.json"):
        try:
            return extract_commit_hash(cached_file(name, file, local_files_only=gone), None)
        except (OSError, ValueError) as error:
            # A hub that is not there is waited for once, half a minute, and not for every file.
            gone = isinstance(error.__cause__, LocalEntryNotFoundError)
    raise ModelError(f"{name}: no such model on the hub, or it cannot be reached; give a run, a model's folder, a hub id or a URL")


class Local:
    """A model that transformers loads, whole, on this process's GPU or CPU. Its tokenizer is read at once, its weights when it is asked."""

    def __init__(self, target: str, settings: Settings):
        from transformers import AutoTokenizer

        from harness.data.prepare import tokenizer_digest
        from harness.data.templates import Renderer, check_tokenizer
        from harness.tasks.templates import training_template

        self.source, self.identity = find_model(target)
        manifest = Path(self.source) / MANIFEST
        if manifest.is_file() and json.loads(manifest.read_text())["task"] == "reward":
            raise ModelError(f"{target}: is a reward model, which gives scores and says nothing; give the model that it judges")
        self._settings, self._model = settings, None
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(self.source)
        except (OSError, ValueError) as error:
            raise ModelError(f"{target}: no tokenizer there: {first_line(error)}") from None
        if self.tokenizer.chat_template is None:
            raise ModelError(
                f"{target}: its tokenizer has no chat template, so nobody can be asked; put a chat_template.jinja into its folder"
            )
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        check_tokenizer(self.tokenizer)
        self.identity |= {"tokenizer": tokenizer_digest(self.tokenizer)}
        self._renderer = Renderer(self.tokenizer, training_template)

    def check_can(self, needs: str, items: Sequence[Item]) -> None:
        """Raises ModelError where the model would not be shown what it is asked about."""
        for item in items if needs == "answers" else ():
            try:
                shown = not item.tools or self._prompt_of(item) != self._renderer.render_prompt({"messages": item.messages}, item.id)
            except DataError:
                # This one will be refused; another tells.
                continue
            if not shown:
                raise ModelError(
                    f"{self.source}: its chat template does not show tools to the model, and the items offer some; it would answer in the "
                    "dark"
                )
            if item.tools:
                return

    def answer(self, needs: str, items: Sequence[Item], seed: int) -> list[Said]:
        self.load()
        if needs == "answers":
            return self._write(items, seed)
        read, said = self._read if needs == "loss" else self._choose, []
        for item in items:
            try:
                said.append(read(item))
            except DataError as error:
                said.append(Said(failure="refused", detail=str(error)))
        return said

    def speak(self, item: Item, seed: int, hear: Callable[[str], None], *, shorten: bool = False) -> Said:
        """The answer to one item; `hear` is told its pieces as they are written. shorten: where the model's positions end before
        max_new_tokens, the answer has what they leave."""
        self.load()
        stops = self._model.generation_config.eos_token_id
        streamer = _streamer(self.tokenizer, set(stops if isinstance(stops, list) else [stops]), hear)
        return self._write([item], seed, streamer, shorten)[0]

    def _prompt_of(self, item: Item) -> list[int]:
        return self._renderer.render_prompt({"messages": item.messages, "tools": item.tools}, item.id)

    def load(self) -> None:
        """The weights, once; whoever asks before them waits for them."""
        if self._model is not None:
            return
        from harness import model as models
        from harness.model.export import load_for_inference

        try:
            model, _ = load_for_inference(Path(self.source))
        except (OSError, ValueError) as error:
            raise ModelError(f"{self.source}: cannot be loaded: {first_line(error)}") from None
        models.check_vocabulary(model, self.tokenizer)
        models.settle_generation(model, self.tokenizer, self._renderer.end_of_turn_ids())
        self._model = model

    @property
    def _positions(self) -> float:
        return getattr(self._model.config.get_text_config(), "max_position_embeddings", None) or math.inf

    # ---- to write

    def _write(self, items: Sequence[Item], seed: int, streamer=None, shorten: bool = False) -> list[Said]:
        import torch

        from harness.evaluate.generate import generate

        most, said, asked = self._settings.max_new_tokens, {}, {}
        for at, item in enumerate(items):
            try:
                ids = self._prompt_of(item)
            except DataError as error:
                said[at] = Said(failure="refused", detail=str(error))
                continue
            if shorten:
                most = max(1, min(most, self._positions - len(ids)))
            if len(ids) + most > self._positions:
                reason = f"asks in {len(ids)} tokens; of {self._positions} positions {most} are the answer's"
                said[at] = Said(prompt_tokens=len(ids), failure="too_long", detail=reason)
            else:
                asked[at] = ids
        torch.manual_seed(seed)
        continuations = generate(
            self._model,
            self.tokenizer,
            list(asked.values()),
            max_new_tokens=most,
            batch_size=self._settings.batch_size,
            temperature=self._settings.temperature,
            streamer=streamer,
        )
        for (at, ids), continuation in zip(asked.items(), continuations, strict=True):
            # With special tokens: Llama and Mistral mark calls by them.
            text = self.tokenizer.decode(continuation.ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
            said[at] = Said(text, len(ids), len(continuation.ids), continuation.ended)
        return [said[at] for at in range(len(items))]

    # ---- to choose and to read

    def _choose(self, item: Item) -> Said:
        scores, read = {}, 0
        for name, message in item.gold["choices"].items():
            rendered = self._renderer.render({"messages": [*item.messages, message], "tools": item.tools}, f"{item.id} ({name})")
            trained = [at for at, trained in enumerate(rendered.mask) if trained]
            # Without the token that ends the turn: it is not part of what was written.
            answer, ids = trained[:-1], rendered.ids[: trained[-1]]
            if len(ids) > self._positions:
                return Said(
                    prompt_tokens=len(ids), failure="too_long", detail=f"{len(ids)} tokens; the model has {self._positions} positions"
                )
            characters = len(self.tokenizer.decode([ids[at] for at in answer]))
            scores[name] = self._log_probability(ids, answer) / max(1, characters)
            read += len(answer)
        return Said(max(scores, key=scores.get), answer[0], read, scores=scores)

    def _read(self, item: Item) -> Said:
        rendered = self._renderer.render(item.gold["row"], item.id)
        trained = [at for at, trained in enumerate(rendered.mask) if trained and at]
        if len(rendered.ids) > self._positions:
            reason = f"{len(rendered.ids)} tokens; the model has {self._positions} positions"
            return Said(prompt_tokens=len(rendered.ids), failure="too_long", detail=reason)
        return Said("", len(rendered.ids) - len(trained), len(trained), loss=-self._log_probability(rendered.ids, trained))

    def _log_probability(self, ids: list[int], at: list[int]) -> float:
        """Sum over the tokens at these places, each given all before it. One row at a time, so that no padding changes a bit."""
        import torch

        with torch.no_grad():
            logits = self._model(input_ids=torch.tensor([ids], device=self._model.device)).logits[0]
            total = 0.0
            for start in range(0, len(at), LOGITS_TOKENS):
                places = torch.tensor(at[start : start + LOGITS_TOKENS], device=logits.device)
                wanted = torch.tensor([ids[place] for place in places.tolist()], device=logits.device)
                logs = logits[places - 1].float().log_softmax(-1).gather(1, wanted[:, None])
                total += logs.double().sum().item()
        return total


def _streamer(tokenizer, stops: set[int], hear: Callable[[str], None]):
    """transformers' own, which tells whole words, with the special tokens that mark calls and without the one that ends the turn."""
    from transformers import TextStreamer

    class Pieces(TextStreamer):
        def put(self, value):
            if self.next_tokens_are_prompt or int(value) not in stops:
                super().put(value)

        def on_finalized_text(self, text, stream_end=False):
            hear(text)

    return Pieces(tokenizer, skip_prompt=True, skip_special_tokens=False, clean_up_tokenization_spaces=False)


# ---- a server


def option_of(setting: str) -> str:
    return "URL" if setting == "url" else f"--{setting.replace('_', '-')}"


def check_api_can(url: str, needs: str) -> None:
    """Raises EvaluationError for what no server tells; asks none."""
    if needs != "answers":
        raise EvaluationError(
            f"{url}: this suite needs log-probabilities of given text under the model's chat template, which no chat API tells; give the "
            "model itself"
        )


class Served:
    """A model behind POST /chat/completions. Its calls come back structured or as text, and both are read: a structured one is written down
    as Hermes writes it."""

    def __init__(self, url: str, settings: Settings, connection: Connection, patience: int | None = None):
        """patience: how often a server that does not answer is asked again (teacher.client)."""
        self._patience = patience
        self._client = Client(url.rstrip("/"), connection.api_key_variable, connection.timeout_s, option_of)
        self._settings, self._connection = settings, connection
        served = self._served_models()
        self.model = connection.model or self._only_one(served)
        self.identity = {"url": url.rstrip("/"), "model": self.model}

    def _served_models(self) -> object:
        """What the server lists. Asked first, and soon given up: whoever mistyped a port shall not wait for a minute and a half, which is
        for a server that goes away in the middle of the work."""
        try:
            return _asked(self._client, "models", None, FIRST_PATIENCE).get("data")
        except Refused:
            if self._connection.model is None:
                raise
            # A gateway without a list still answers for a model whose name is known.
            return None

    def _only_one(self, listed: object) -> str:
        names = [one.get("id") for one in listed if isinstance(one, dict)] if isinstance(listed, list) else []
        if len(names) != 1:
            raise EvaluationError(f"{self._client.url}: serves {', '.join(map(str, names)) or 'no model'}; say which with --model")
        return names[0]

    def check_can(self, needs: str, items: Sequence[Item]) -> None:
        check_api_can(self._client.url, needs)

    def speak(self, item: Item, seed: int, hear: Callable[[str], None], *, shorten: bool = False) -> Said:
        """The answer to one item, which `hear` is told as a whole."""
        said = self._ask(item, seed)
        hear(said.said)
        return said

    def answer(self, needs: str, items: Sequence[Item], seed: int) -> list[Said]:
        with ThreadPoolExecutor(self._connection.concurrency) as pool:
            return list(pool.map(lambda pair: self._ask(pair[1], seed + pair[0]), enumerate(items)))

    def _ask(self, item: Item, seed: int) -> Said:
        drawn = {"seed": seed} if self._settings.temperature else {}
        body = {
            "model": self.model,
            "messages": as_openai({"messages": item.messages}, lambda lost: None)["messages"],
            "max_tokens": self._settings.max_new_tokens,
            "temperature": self._settings.temperature,
            **({"tools": item.tools} if item.tools else {}),
            **drawn,
        }
        try:
            found = _asked(self._client, "chat/completions", body, self._patience)
        except Refused as refused:
            if refused.status not in IN_VAIN:
                raise EvaluationError(str(refused)) from None
            return Said(failure="refused", detail=str(refused))
        try:
            choice, usage = found["choices"][0], found.get("usage") or {}
            text, ended = _text_of(choice["message"]), choice.get("finish_reason") != "length"
            return Said(text, int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0), ended)
        except (KeyError, IndexError, TypeError, AttributeError, ValueError):
            # Gateways say what is wrong with a status of 200.
            where, said = f"{self._client.url}/chat/completions", json.dumps(found, ensure_ascii=False)[:WORDS]
            raise EvaluationError(
                f"{where}: answers without choices[0].message ({said}); give the url of an OpenAI-compatible API"
            ) from None


def _asked(client: Client, path: str, body: dict | None = None, patience: int | None = None) -> dict:
    try:
        return client.ask(path, body, patience=patience)
    except Refused:
        raise
    except TeacherError as error:
        raise EvaluationError(str(error)) from None


def _text_of(message: dict) -> str:
    parts = [message.get("content") or ""]
    for call in message.get("tool_calls") or ():
        # Some leave out what is empty.
        name, arguments = call["function"]["name"], call["function"].get("arguments") or {}
        # As it came where it is text, so that what is no JSON stays malformed.
        written = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        parts.append(f'<tool_call>\n{{"name": {json.dumps(name)}, "arguments": {written}}}\n</tool_call>')
    return "\n".join(part for part in parts if part)
