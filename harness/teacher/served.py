"""A teacher behind an OpenAI-compatible server, which scores the tokens that it is given: token ids go out, for text would be cut anew.

Two ways to ask POST /completions for that, K being `teacher.cap`:

    prompt_logprobs   vLLM's own: {"prompt": [ids], "prompt_logprobs": K, "max_tokens": 1}. For each position but the first
                      {id: {"logprob": ...}} of the K most probable tokens, and of the given one beside them.
    echo              {"prompt": [ids], "echo": true, "logprobs": K, "max_tokens": 0, "return_tokens_as_token_ids": true}. The same in
                      `top_logprobs` and `token_logprobs`. Tokens must be named "token_id:123": several ids may be the same text.

What is kept of a distribution follows from what is told: the head as everywhere (head.py). The tail's mass is that of the tokens that were
told and not kept, and what is missing to 1 beyond them, which is never more than the least probable of them times the tokens that were not
told. The entropy is a lower bound: all that was not told counts as one entry.

Promises. Nothing is taken on trust that an answer can show: each distribution is of the token that was asked about, has as many entries as
were asked for and can sum to 1, or an error says what the server does instead. What no answer can show is whose weights these are; that
is said. A server adds in the order of its own batches, so that asked twice it may differ in the last bits: of two workers that do one unit
the last one's stays, and either is right.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from harness import model as models
from harness.errors import ModelError, TeacherError
from harness.recipe import Recipe
from harness.teacher.client import Client, Refused
from harness.teacher.format import Settings, Targets
from harness.teacher.head import count_kept
from harness.teacher.resident import HALVES_NATS, teacher_recipe
from harness.teacher.samples import Sample, Samples, settings_of
from harness.teacher.vocabulary import check_same_vocabulary, true_vocabulary
from harness.teacher.writer import MASS_TOLERANCE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WAYS = ("prompt_logprobs", "echo")
PROBE_TOKENS = 16
ROUNDS = 32
"""Of as many questions as are open at once."""
CUT_OFF = -9999.0
"""What vLLM writes for a probability of 0, which JSON has no logarithm for."""
ROUNDING_MASS = 2.0**-24
"""Of a sum near 1 in float32."""
RAW = "raw log-probabilities, normalised over all tokens, are needed (vLLM: --logprobs-mode raw_logprobs)"
MORE = "start vLLM with --max-logprobs {0} (its default is 20), or set teacher.cap to what the server allows"


class Unscored(TeacherError):
    """The server does not score given tokens when it is asked in this way."""


@dataclass(frozen=True)
class ServedTeacher:
    """Made by connect. Small and without a connection of its own: data workers and ranks each have a copy."""

    client: Client
    model: str
    """What the server calls it."""
    way: str
    settings: Settings
    vocabulary: int
    concurrency: int

    rounding_nats = HALVES_NATS
    dtype = None
    """Not known."""

    @property
    def digest(self) -> str:
        return self.model

    @property
    def where(self) -> str:
        return f"{self.client.url} ({self.model})"

    @property
    def width(self) -> int:
        """K."""
        return min(self.settings.cap, self.vocabulary)

    def batches(self, samples: Samples, unit: int) -> list[list[Sample]]:
        """Of a unit, so many at once that the server, which makes batches of its own, seldom waits for the last of them."""
        every, size = list(itertools.chain(*samples.batches(unit))), ROUNDS * self.concurrency
        return [every[first : first + size] for first in range(0, len(every), size)]

    def targets_of(self, samples: Sequence[Sample]) -> list[Targets]:
        """Of each sample. Raises TeacherError when the server does not answer, or its answer cannot be a teacher's."""
        with ThreadPoolExecutor(self.concurrency) as pool:
            return list(pool.map(self.ask, samples))

    def read_samples(self, samples: Sequence[Sample]) -> Targets:
        """The targets of samples, one after another in their order, as a cache reads them; a sample that repeats is asked about once."""
        distinct = {sample.key: sample for sample in samples}
        found = dict(zip(distinct, self.targets_of([*distinct.values()]), strict=True))
        parts = [self._to_targets([], []), *(found[sample.key] for sample in samples)]
        return Targets(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in vars(parts[0])})

    def ask(self, sample: Sample, *, patience: int | None = None) -> Targets:
        """The targets of one sample. patience: as the client's."""
        ids = sample.input_ids.tolist()
        answer = self.client.ask("completions", self._question(ids), patience=patience)
        try:
            tables = self._tables(answer, sample)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise TeacherError(f"{self.where}: answers {self.way} in a form that is not known here ({error!r})") from error
        gold = [ids[place] for place in sample.trained_at.tolist()]
        for place, table, token in zip(sample.trained_at.tolist(), tables, gold, strict=True):
            if problem := self._find_problem(table, token):
                raise TeacherError(f"{self.where}: token {place} of {len(ids)}: {problem}")
        return self._to_targets(tables, gold)

    def _question(self, ids: list[int]) -> dict:
        # No other temperature than 1, though vLLM's scores are the raw ones whatever it is.
        question = {"model": self.model, "prompt": ids, "temperature": 1.0}
        if self.way == "prompt_logprobs":
            return question | {"prompt_logprobs": self.width, "max_tokens": 1}
        return question | {"echo": True, "logprobs": self.width, "max_tokens": 0, "return_tokens_as_token_ids": True}

    def _tables(self, answer: dict, sample: Sample) -> list[dict[int, float] | None]:
        """{id: log-probability} for each trained token; None where there is nothing."""
        choice = answer["choices"][0]
        if self.way == "prompt_logprobs":
            told = choice.get("prompt_logprobs")
            if told is None:
                raise Unscored(f"{self.where}: answers without prompt_logprobs")
        else:
            scores = choice.get("logprobs")
            if not scores or not scores.get("top_logprobs"):
                raise Unscored(f"{self.where}: answers echo without logprobs")
            of_given = zip(scores["tokens"], scores["token_logprobs"], scores["top_logprobs"], strict=True)
            told = [table and table | {token: score} for token, score, table in of_given]
        if len(told) != len(sample.input_ids):
            raise Unscored(f"{self.where}: tells the scores of {len(told)} tokens, and was given {len(sample.input_ids)}")
        tables = (told[place] for place in sample.trained_at.tolist())
        if self.way == "prompt_logprobs":
            return [table and {int(token): float(entry["logprob"]) for token, entry in table.items()} for table in tables]
        return [table and {self._id(token): float(log) for token, log in table.items()} for table in tables]

    def _id(self, token: str) -> int:
        head, _, number = token.partition("token_id:")
        if head or not number.isdigit():
            raise TeacherError(
                f'{self.where}: names tokens by their text ("{token[:20]}"), which several ids may share; it must honour '
                "return_tokens_as_token_ids (vLLM does)"
            )
        return int(number)

    def _find_problem(self, table: dict[int, float] | None, gold: int) -> str | None:
        if table is None:
            return "is not scored; a cache of prefixes keeps no scores: start the server without one (vLLM: --no-enable-prefix-caching)"
        if gold not in table:
            return f"its own score (of id {gold}) is not among those told; the server scores something else than the given tokens"
        if len(table) < self.width:
            return f"{len(table)} entries are told, and {self.width} were asked for; {MORE.format(self.width)}"
        if not all(CUT_OFF < log < math.inf for log in table.values()):
            return f"some probabilities are 0 or no numbers, as after the server's own top_k, top_p or bias; {RAW}"
        mass = math.fsum(math.exp(min(log, 1.0)) for log in table.values())
        if mass > 1 + MASS_TOLERANCE:
            return f"its probabilities sum to {mass:.4g}; {RAW}"
        foreign = math.fsum(math.exp(log) for token, log in table.items() if not 0 <= token < self.vocabulary)
        if foreign > MASS_TOLERANCE:
            return f"{foreign:.2%} of the mass is on ids from {self.vocabulary:,} on, which are no tokens of the student; serve its teacher"
        return None

    def _to_targets(self, tables: list[dict[int, float]], gold: list[int]) -> Targets:
        """Of checked tables, and the given tokens."""
        settings, width, vocabulary = self.settings, self.width, self.vocabulary
        ids, logs = np.zeros((len(tables), width), np.int32), np.full((len(tables), width), -np.inf)
        told = np.empty(len(tables), np.int64)
        for row, table in enumerate(tables):
            # The most probable first, and among equals the lowest id. The given token may be one more; rows that pad a head are no tokens.
            best = sorted(table.items(), key=lambda entry: (-entry[1], entry[0]))[:width]
            best = [entry for entry in best if 0 <= entry[0] < vocabulary]
            told[row] = len(best)
            ids[row, : len(best)], logs[row, : len(best)] = [token for token, _ in best], [log for _, log in best]
        if (told < min(settings.floor, vocabulary)).any():
            raise TeacherError(
                f"{self.where}: of {width} entries only {told.min()} are tokens of the student, the rest is padding of the head; "
                f"lower teacher.floor to {told.min()}, or raise teacher.cap"
            )
        p = np.exp(logs)
        counts = np.minimum(count_kept(torch.from_numpy(p), settings).numpy(), told)
        is_kept = np.arange(width) < counts[:, None]
        last = np.take_along_axis(p, np.maximum(told - 1, 0)[:, None], 1)[:, 0]
        most = (vocabulary - told) * last
        reach = p.sum(1) + most
        if (reach < 1 - 2 * MASS_TOLERANCE).any():
            raise TeacherError(
                f"{self.where}: its probabilities sum to {reach.min():.4g} at most, whatever those have that it does not tell; {RAW}"
            )
        # Where nothing is told besides the head, a sum that rounding has brought to 1 still leaves something out.
        least = np.where(counts < told, 0, np.minimum(ROUNDING_MASS, most))
        untold = np.clip(1 - p.sum(1), least, most)
        with np.errstate(divide="ignore"):
            log_tail, log_untold = np.log(np.where(is_kept, 0, p).sum(1) + untold), np.log(untold)
        entropy = -(p * np.where(p > 0, logs, 0)).sum(1) - untold * np.where(untold > 0, log_untold, 0)
        return Targets(
            counts.astype("u1"),
            np.where(is_kept, ids, 0),
            np.where(is_kept, logs, -np.inf).astype(np.float32),
            log_tail.astype(np.float32),
            entropy.astype(np.float32),
            np.array([table[token] for table, token in zip(tables, gold, strict=True)], np.float32),
            np.zeros((len(tables), 0), np.int32),
        )


# ---- before the first question


def connect(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, longest: int, say: Callable[[str], None]) -> ServedTeacher:
    """The recipe's served teacher, after its server has shown that it scores what it is given, as much of it as `longest` tokens.

    tokenizer: the student's. Raises TeacherError for a server that does not fit, ModelError when the teacher's tokenizer cannot be loaded.
    """
    name, server = recipe.teacher.name_or_path, recipe.teacher.server
    try:
        check_same_vocabulary(tokenizer, models.load_tokenizer(teacher_recipe(recipe)), name)
    except ModelError as error:
        raise ModelError(f"teacher ({name}; its tokenizer is read from there, though a server has its weights): {error}") from error
    client = Client(server.url.rstrip("/"), server.api_key_variable, server.timeout_s)
    model, room = find_model(client, server.model or name)
    asked = ServedTeacher(client, model, "", settings_of(recipe), true_vocabulary(tokenizer), server.concurrency)
    teacher = find_way(asked, WAYS if server.scores == "auto" else (server.scores,))
    # vLLM generates one token, which it then throws away.
    needed = longest + (teacher.way == "prompt_logprobs")
    if room is not None and room < needed:
        raise TeacherError(
            f"{teacher.where}: has room for {room:,} tokens, and the longest row needs {needed:,}; start it with more (vLLM: "
            f"--max-model-len {needed}), or lower data.max_length"
        )
    say(
        f"teacher: {teacher.where} scores given tokens ({teacher.way}, {teacher.width} entries each); that its weights are those of {name} "
        "is what it says, and cannot be seen from here"
    )
    return teacher


def find_model(client: Client, name: str) -> tuple[str, int | None]:
    """(id, tokens that it has room for, if the server says) of the model that the server calls `name`."""
    found = client.ask("models", patience=2).get("data")
    served = {entry["id"]: entry for entry in found if isinstance(entry, dict) and "id" in entry} if isinstance(found, list) else {}
    if name not in served:
        names = ", ".join(sorted(served)[:10]) or "nothing"
        raise TeacherError(f"{client.url}: serves {names}, and not {name}; set teacher.server.model to one of them, or serve that one")
    room = served[name].get("max_model_len")
    return name, room if isinstance(room, int) else None


def find_way(teacher: ServedTeacher, ways: Sequence[str]) -> ServedTeacher:
    """`teacher` with the first of `ways` in which its server scores a few tokens. Raises TeacherError that says why none does."""
    ids = np.random.default_rng(0).integers(0, teacher.vocabulary, PROBE_TOKENS)
    probe, reasons = Sample.of(ids, ids), []
    for way in ways:
        asked = replace(teacher, way=way)
        try:
            asked.ask(probe, patience=2)
            return asked
        except Unscored as unscored:
            reasons.append(str(unscored))
        except Refused as refused:
            if refused.status in (401, 403):
                raise
            _check_allows_one(asked, probe, refused)
            reasons.append(str(refused))
    raise TeacherError(
        f"{teacher.where}: does not score the tokens that it is given, which is how a teacher judges an answer: "
        + "; ".join(reasons)
        + ". A server that returns only the probabilities of what it generates cannot teach: serve the model with vLLM, or let "
        "the harness load it (remove teacher.server)"
    )


def _check_allows_one(teacher: ServedTeacher, probe: Sample, refused: Refused) -> None:
    """Raises TeacherError when the server would tell one entry where it refused to tell all."""
    one = replace(teacher, settings=replace(teacher.settings, floor=1, cap=1))
    try:
        one.ask(probe, patience=2)
    except (Unscored, Refused):
        return
    raise TeacherError(f"{refused}: {teacher.width} entries a token are more than it allows; {MORE.format(teacher.width)}") from refused
