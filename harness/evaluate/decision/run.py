"""Runs the arms: one model in memory at a time, greedily, in batches; and keeps every answer.

OUTPUT/arms/NAME.jsonl    a first line {"digest", "arm", "parameters", …}, then a Result for each item. A run that finds the file of an arm
                          whose questions, model and settings have the same digest takes it as it is; a file that a kill cut short is not
                          there, because it is renamed into its place when it is whole. Answers are judged when they are read: a scorer
                          that has changed needs no new answers.

The ways of choosing few-shot examples are arms over the tuning rows, in arms/tuning-WAY.jsonl.
"""

from __future__ import annotations

import gc
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from harness.errors import DataError, EvaluationError, first_line
from harness.evaluate.decision.arms import BASE, DISTILLED, Arm, plan_arms, plan_ways
from harness.evaluate.decision.costs import Training, find_model, plan_training, read_training
from harness.evaluate.decision.questions import check_apart, find_faults, gold_calls, load_items, pool_rare
from harness.evaluate.decision.schema import Decision, FewShot, Generate
from harness.evaluate.decision.verdicts import Limits, Measured, Outcome, least_items
from harness.evaluate.items import Item, Result
from harness.run import write_text_atomically
from harness.tools import check_call, parse_calls, score

FORMAT = 2
"""Of how answers come about; those of the first did not stop where the tokenizer's turns end."""
Say = Callable[[str], None]


@dataclass
class Answers:
    """What one arm said to every item, judged. `facts`: of the model and the run, from the first line of the arm's file."""

    arm: Arm
    results: dict[str, Result]
    facts: dict
    reused: bool


@dataclass
class Asked:
    """Everything that a decision has gathered."""

    items: list[Item]
    guards: list[Item]
    faults: dict[str, str]
    answers: list[Answers]
    left_out: dict[str, str]
    """Arm -> why it could not be asked."""
    models: dict[str, Path]
    trainings: dict[str, Training]
    planned: dict | None = None
    """Of the training that would come: costs.plan_training."""
    ways: dict[str, float] = field(default_factory=dict)
    """Way of choosing few-shot examples -> rate on the tuning rows."""
    repeated: int = 0
    """Rows of the items that asked again what another had asked."""


def run_arms(decision: Decision, say: Say) -> Asked:
    """Ask every arm all items and guards. Raises DataError for the rows, EvaluationError where a model cannot be asked at all."""
    # What can be refused is, before a model is loaded.
    planned = plan_training(decision.plan) if decision.plan else None
    items, repeated = load_items(decision.items, decision.seed, "items")
    guards, _ = load_items(decision.guards, decision.seed, "guards")
    guards = [replace(item, id=f"guards/{item.id}") for item in guards]
    least = least_items(Limits(**decision.rules.model_dump()))
    items, guards = pool_rare(items, least), pool_rare(guards, least)
    tuning, _ = load_items(decision.tuning, decision.seed, "tuning")
    tuning = [replace(item, id=f"tuning/{item.id}") for item in tuning]
    check_apart([*items, *guards], tuning)
    arms = plan_arms(decision)
    models = {BASE: find_model(decision.model, "model")}
    models |= {name: find_model(path, f"tuned.{name}") for name, path in decision.tuned.items()}
    if decision.distilled:
        models[DISTILLED] = find_model(decision.distilled, "distilled")
    # A distilled model has a base of its own, which is smaller.
    bases = {name: None if name == DISTILLED else models[BASE] for name in models}
    trainings = {name: read_training(path, bases[name]) for name, path in models.items() if name != BASE}
    asked = Asked(items, guards, find_faults([*items, *guards]), [], {}, models, trainings, planned, repeated=repeated)
    output = Path(decision.output_dir)
    for name, path in models.items():
        model = _Model(path, decision.generate)
        if name == BASE and tuning:
            arms.insert(_place_of_few_shot(arms), _choose_examples(decision, tuning, model, output, asked, say))
        for arm in [arm for arm in arms if arm.model == name]:
            _ask_arm(arm, [*items, *guards], model, output, asked, say)
        model.release()
    order = [arm.name for arm in arms]
    asked.answers.sort(key=lambda answers: order.index(answers.arm.name))
    return asked


def _place_of_few_shot(arms: Sequence[Arm]) -> int:
    return max(at for at, arm in enumerate(arms) if arm.kind in ("zero-shot", "prompt")) + 1


def _choose_examples(decision: Decision, tuning: list[Item], model: _Model, output: Path, asked: Asked, say: Say) -> Arm:
    """The few-shot arm in the way that does best on the tuning rows; the first of equals."""
    wanted = tuning[: (decision.few_shot or FewShot()).tuning_rows]
    ways = plan_ways(decision, tuning)
    for arm in ways:
        way = arm.examples.way
        try:
            answers = _answers(arm, wanted, model, output / "arms" / f"tuning-{way.replace(' ', '-')}.jsonl")
        except _CannotAskError:
            # The arm itself will say so, of the items.
            continue
        asked.ways[way] = sum(result.correct for result in answers.results.values()) / len(wanted)
        say(f"few-shot, {way}: {asked.ways[way]:.1%} of {len(wanted)} tuning rows{_again(answers)}")
    return max(ways, key=lambda arm: asked.ways.get(arm.examples.way, -1.0))


def _ask_arm(arm: Arm, items: list[Item], model: _Model, output: Path, asked: Asked, say: Say) -> None:
    begun = time.monotonic()
    try:
        answers = _answers(arm, items, model, output / "arms" / f"{arm.name}.jsonl")
    except _CannotAskError as error:
        if arm.kind in ("zero-shot", "tuned", "distilled"):
            raise EvaluationError(f"{arm.name}: {error}") from None
        asked.left_out[arm.name] = str(error)
        say(f"{arm.name}: left out: {error}")
        return
    asked.answers.append(answers)
    right = sum(result.correct for result in answers.results.values())
    took = _again(answers) or f" in {time.monotonic() - begun:.0f} s"
    say(f"{arm.name}: {right} of {len(items)} right{took}")


def _again(answers: Answers) -> str:
    return " (answered earlier)" if answers.reused else ""


# ---- one arm


class _CannotAskError(Exception):
    """The model's chat template or its context does not take what this arm asks."""


def _answers(arm: Arm, items: list[Item], model: _Model, file: Path) -> Answers:
    asked = [{"messages": arm.ask(item), **({"tools": item.tools} if item.tools else {})} for item in items]
    digest = _digest(asked, model)
    rows = _read(file, digest, len(items))
    if rows is None:
        facts, said = _generate(arm, items, asked, model)
        facts = {"digest": digest, "arm": arm.name, "model": str(model.path), **facts}
        results = {item.id: _judge(item, one) for item, one in zip(items, said, strict=True)}
        file.parent.mkdir(parents=True, exist_ok=True)
        lines = [facts, *map(asdict, results.values())]
        write_text_atomically(file, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        return Answers(arm, results, facts, reused=False)
    facts, *said = rows
    # In the order in which they were asked: an id is a place in a file, which may have another name now.
    return Answers(arm, {item.id: _judge(item, one) for item, one in zip(items, said, strict=True)}, facts, reused=True)


def _digest(asked: list[dict], model: _Model) -> str:
    settings = {"format": FORMAT, "max_new_tokens": model.settings.max_new_tokens, "dtype": model.settings.dtype, "model": model.identity}
    text = json.dumps({**settings, "asked": asked}, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def _read(file: Path, digest: str, count: int) -> list[dict] | None:
    """The first line and the `count` rows of an arm that was asked the very same; None where it was not."""
    try:
        # Not splitlines, which parts at U+2028 and others that JSON leaves as they are.
        with open(file, encoding="utf-8") as stream:
            rows = [json.loads(line) for line in stream]
    except (OSError, ValueError):
        return None
    return rows if len(rows) == 1 + count and rows[0].get("digest") == digest else None


def _generate(arm: Arm, items: list[Item], asked: list[dict], model: _Model) -> tuple[dict, list[dict]]:
    from harness.data.templates import Renderer
    from harness.evaluate.generate import generate

    loaded, tokenizer = model.load()
    renderer = Renderer(tokenizer)
    try:
        prompts = [renderer.render_prompt(row, item.id) for item, row in zip(items, asked, strict=True)]
    except DataError as error:
        raise _CannotAskError(str(error)) from None
    context = getattr(loaded.config, "max_position_embeddings", None)
    longest = max(map(len, prompts))
    if context and longest + model.settings.max_new_tokens > context:
        raise _CannotAskError(
            f"its longest prompt has {longest:,} tokens, which with generate.max_new_tokens = {model.settings.max_new_tokens:,} is more "
            f"than the {context:,} of the model; ask for fewer of either"
        )
    begun = time.monotonic()
    said = generate(loaded, tokenizer, prompts, max_new_tokens=model.settings.max_new_tokens, batch_size=model.settings.batch_size)
    facts = {**model.facts(), "generate_s": round(time.monotonic() - begun, 2), "cut_off": sum(not one.ended for one in said)}
    rows = [
        {
            # With special tokens: Llama and Mistral mark calls by them.
            "said": tokenizer.decode(one.ids, skip_special_tokens=False, clean_up_tokenization_spaces=False),
            "prompt_tokens": len(prompt),
            # With the one that stopped it.
            "answer_tokens": len(one.ids) + one.ended,
        }
        for prompt, one in zip(prompts, said, strict=True)
    ]
    return facts, rows


def _judge(item: Item, row: dict) -> Result:
    failure = score(row["said"], gold_calls(item), item.tools).failure
    return Result(item.id, item.category, failure is None, failure, row["said"], row["prompt_tokens"], row["answer_tokens"])


def measured(answers: Answers, items: Sequence[Item], method: str | None) -> Measured:
    """What harness.evaluate.decision.verdicts takes of an arm."""
    by_id = {item.id: item for item in items}
    outcomes = {id: _outcome(result, by_id[id]) for id, result in answers.results.items()}
    return Measured(answers.arm.name, answers.arm.kind, outcomes, mean_tokens(answers), method)


def mean_tokens(answers: Answers) -> float:
    return sum(result.prompt_tokens + result.answer_tokens for result in answers.results.values()) / len(answers.results)


def _outcome(result: Result, item: Item) -> Outcome:
    parsed = parse_calls(result.said)
    broken = parsed.malformed or any(check_call(call, item.tools) for call in parsed.calls)
    formed = not broken and bool(parsed.calls or parsed.text)
    return Outcome(result.correct, result.failure, formed, bool(parsed.calls))


# ---- one model


class _Model:
    """Loaded when the first arm needs it, and never where all its arms were asked before."""

    def __init__(self, path: Path, settings: Generate):
        self.path, self.settings, self._loaded = path, settings, None
        self.identity = identity_of(path)

    def load(self):
        if self._loaded is None:
            from harness.data.templates import end_of_turn_ids
            from harness.logs import quieten
            from harness.model import settle_generation
            from harness.model.export import load_for_inference

            quieten()
            try:
                model, tokenizer = load_for_inference(self.path, self.settings.dtype)
            except (OSError, ValueError) as error:
                raise EvaluationError(f"{self.path}: no model could be loaded from there: {first_line(error)}") from error
            if tokenizer.chat_template is None:
                raise EvaluationError(
                    f"{self.path}: its tokenizer has no chat template, so it cannot be asked anything; use an instruct model"
                )
            if tokenizer.pad_token_id is None:
                # Masked wherever it stands.
                tokenizer.pad_token = tokenizer.eos_token
            settle_generation(model, tokenizer, end_of_turn_ids(tokenizer))
            self._loaded = model, tokenizer
        return self._loaded

    def facts(self) -> dict:
        model = self._loaded[0]
        weights = {id(weight): (name, weight) for name, weight in model.named_parameters()}.values()
        return {
            "parameters": sum(weight.numel() for _, weight in weights),
            "adapter_parameters": sum(weight.numel() for name, weight in weights if "lora_" in name),
            "bytes": sum(weight.numel() * weight.element_size() for _, weight in weights),
        }

    def release(self) -> None:
        if self._loaded is not None:
            self._loaded = None
            gc.collect()
            import torch

            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def identity_of(path: Path) -> str:
    """What decides a model's answers: the digests of its files, of an adapter its base's too; a hub id is its own."""
    if not path.is_dir():
        return str(path)
    from harness.model.export import MANIFEST, digest_base, digest_file

    names = (
        "adapter_config.json",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    )
    parts = {name: digest_file(path / name) for name in names if (path / name).is_file()}
    if (path / MANIFEST).is_file():
        parts["files"] = json.loads((path / MANIFEST).read_text(encoding="utf-8")).get("files")
    else:
        parts["weights"] = digest_base(str(path))
    if (path / "adapter_config.json").is_file():
        base = json.loads((path / "adapter_config.json").read_text(encoding="utf-8")).get("base_model_name_or_path")
        parts["base"] = identity_of(Path(base)) if base else None
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
