"""Preference pairs from a model's own failures: what it wrote and was wrong is rejected, the gold of the same question is chosen.

<output_dir>/                  of `harness pairs`; RUN/pairs when left out
  questions.jsonl              what is asked: rows of the mining files up to their last turn, without those that evaluation knows
  generate.yaml, answers/      the recipe that asks them, and what the model said, word for word (harness/tasks/generate.py)
  pairs.jsonl                  {"prompt": [Message…], "chosen": [Message], "rejected": [Message], "tools": [Tool…]?,
                               "class": "wrong_tool", "source": "rows.jsonl:12"}; messages and tools as in harness/data/formats.py
  pairs.report.json            how many of each class, how they differ in length, and what they were made from
  left-out.jsonl               {"source", "reason", "detail"}: every row, and every answer that failed, that became no pair

Promises. No question of a pair is an evaluation question, nor nearly one (harness/data/overlap.py). Each pair is proven in the form in
which it will be trained: both turns are written by the student's template, cut where generation would stop, read back and scored; the
chosen one is exact and keeps to its tools' schemas, the rejected one fails with the class that the pair names, and still says what the
model said; and `task: dpo` reads the row as it was written. A question has at most one pair of a class. The same questions and answers
give the same pairs, whatever the order of the rows.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from typing import TYPE_CHECKING, Protocol

from harness.data.overlap import Overlap
from harness.data.pairs import to_preferences
from harness.data.prompts import question_of
from harness.data.rows import SourceRow, content_digest
from harness.data.templates import Renderer, TrainingTemplate
from harness.errors import DataError
from harness.evaluate.edits import edits_of
from harness.tools import FAILURES, Fault, ToolCall, check_call, match_calls, parse_calls, read_turn, same_call, score, spoken

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LARGE_GAP = 0.25
"""Of the mean length of a class's chosen turns: a mean difference above it is a shortcut that a student will find before any other."""
LEAST_TOKENS = 32
"""That an answer may have, however short the gold is."""
REPLACED = "\ufffd"
"""What a tokenizer decodes bytes to that are no character."""
REASONS = {
    "no_conversation": "rows that are no conversation: they have no turn that could be scored",
    "asks_nothing": "rows whose last turn answers neither a user nor a tool",
    "evaluation": "rows that are evaluation questions, or nearly (shared runs of words)",
    "repeated_question": "rows that ask what another row asks, with the same gold",
    "several_golds": "rows that ask what another row asks, with another gold: what is wrong for one is right for the other",
    "template": "rows that the chat template refuses",
    "gold_not_right": "rows whose gold breaks its tool's schema, or is not read back from the template as it stands",
    "too_long": "rows whose gold does not fit into data.max_length",
    "not_asked": "questions that were not asked",
    "cut_off": "answers that were cut off at max_new_tokens: such a rejected turn would teach length alone",
    "control_token": "rows, and failing answers, with a control token in their words, which would end or open a turn",
    "not_text": "failing answers with bytes that are no character, which no text can hold",
    "round_trip": "failing answers that the template does not write as the model did, or that are not read back as the same failure",
    "no_row": "failing answers that no preference row can hold: silence, which is no turn",
    "repeated_failure": "failing answers of a class in which another answer to the same question failed",
    "other_class": "failing answers of a class that was not asked for",
    "over_the_limit": "pairs above --max-per-class",
}
"""Why something became no pair."""


class Answer(Protocol):
    """What the model said to a question; tasks.generate's Said is one."""

    said: str
    """Decoded with its special tokens, without the one that stopped it."""
    ended: bool


@dataclass(frozen=True)
class LeftOut:
    source: str
    reason: str
    """A key of REASONS."""
    detail: str


@dataclass(frozen=True)
class Case:
    """A question to which the right turn is known, and proven."""

    key: str
    """Of the question: content_digest of {"messages", "tools"?}."""
    source: str
    question: dict
    gold: list[ToolCall]
    chosen: dict
    chosen_tokens: int

    @property
    def tools(self) -> list[dict]:
        return self.question.get("tools", [])


@dataclass(frozen=True)
class Pair:
    case: Case
    failure: str
    rejected: dict
    rejected_tokens: int
    edited: bool = False
    """Made from the gold by a small edit, and not by the model."""

    @property
    def gap_tokens(self) -> int:
        return self.case.chosen_tokens - self.rejected_tokens

    def row(self) -> dict:
        case = self.case
        tools = {"tools": case.tools} if case.tools else {}
        sides = {"prompt": case.question["messages"], "chosen": [case.chosen], "rejected": [self.rejected]}
        return {**sides, **tools, "class": self.failure, "source": case.source}


@dataclass
class Mined:
    pairs: list[Pair] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    asked: int = 0
    """Questions."""
    answers: int = 0
    right: int = 0


# ---- turns, as the template writes them


@dataclass(frozen=True)
class Written:
    text: str
    """As a server would return it: with special tokens, without the one that ends the turn."""
    tokens: int
    """With the one that ends it."""


@dataclass
class Scribe:
    """Writes a turn by the student's own template, as the tokens that will be trained, and decodes those."""

    tokenizer: PreTrainedTokenizerBase
    training_template: TrainingTemplate = None

    @cached_property
    def renderer(self) -> Renderer:
        return Renderer(self.tokenizer, self.training_template)

    @cached_property
    def _stops(self) -> set[int]:
        return {self.tokenizer.eos_token_id, *self.renderer.end_of_turn_ids()}

    def write(self, question: dict, turn: dict, location: str) -> Written:
        """Raises DataError where the template refuses the turn, or does not show all of it."""
        row = {**question, "messages": [*question["messages"], turn], "train_from": len(question["messages"])}
        rendered = self.renderer.render(row, location)
        trained = [token for token, is_trained in zip(rendered.ids, rendered.mask, strict=True) if is_trained]
        end = next((at for at, token in enumerate(trained) if token in self._stops), len(trained))
        text = self.tokenizer.decode(trained[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return Written(text, min(end + 1, len(trained)))

    def length(self, question: dict, location: str) -> int:
        """Tokens of the question, as it is asked."""
        return len(self.renderer.render_prompt(question, location))


# ---- the questions


def asked_of(row: dict) -> dict | None:
    """{"messages", "tools"?} of what a canonical row asks, whether it has an answer, a pair or a label; None of a row that is mere text."""
    if "messages" in row:
        return question_of(row)
    if isinstance(row.get("prompt"), list):
        return {"messages": row["prompt"]} | ({"tools": row["tools"]} if "tools" in row else {})
    return None


def words_of(question: dict) -> str:
    """What the user says in it: by this, questions are compared."""
    return "\n".join(message["content"] for message in question["messages"] if message["role"] == "user")


def known_questions(rows: Iterable[SourceRow]) -> Overlap:
    """The questions of rows, to be kept out."""
    known = Overlap()
    for row in rows:
        question = asked_of(row.row)
        # A text has its question in the words before what is trained.
        words = words_of(question) if question else row.row.get("prompt", "")
        if words.strip():
            known.add(words, row.location)
    return known


def select_cases(rows: Sequence[SourceRow], known: Overlap, scribe: Scribe, max_length: int) -> tuple[list[Case], list[LeftOut]]:
    """The distinct questions of the rows whose gold is proven right, in the order of their keys; and what was left out.

    known: evaluation questions. max_length: of question and gold together, in tokens.
    """
    left_out: list[LeftOut] = []
    asking: list[tuple[str, SourceRow]] = []
    for row in rows:
        if fault := _fault_of(row, known):
            left_out.append(LeftOut(row.location, *fault))
        else:
            asking.append((content_digest(question_of(row.row)), row))
    cases = []
    for key, group in groupby(sorted(asking, key=lambda item: item[0]), key=lambda item: item[0]):
        same = [row for _, row in group]
        # By content, so that the order of the rows decides nothing.
        same.sort(key=lambda row: content_digest(row.row))
        if any(not _is_same_gold(row.row["messages"][-1], same[0].row["messages"][-1]) for row in same[1:]):
            left_out += [LeftOut(row.location, "several_golds", f"asked in {len(same)} rows") for row in same]
            continue
        left_out += [LeftOut(row.location, "repeated_question", f"as {same[0].location}") for row in same[1:]]
        case = _case_of(key, same[0], scribe, max_length)
        (left_out if isinstance(case, LeftOut) else cases).append(case)
    return cases, left_out


def _fault_of(row: SourceRow, known: Overlap) -> tuple[str, str] | None:
    """(reason, detail) why a row is not asked."""
    if "messages" not in row.row:
        return "no_conversation", f"has {', '.join(row.row)}"
    question = question_of(row.row)
    if not question["messages"] or question["messages"][-1]["role"] not in ("user", "tool"):
        return "asks_nothing", ""
    found = known.find(words_of(question))
    return ("evaluation", found) if found else None


def _is_same_gold(one: dict, other: dict) -> bool:
    """Whether what is right by one gold is right by the other: any words are, where no call is wanted."""
    return match_calls(_calls(one), _calls(other)).exact if one.get("tool_calls") else not other.get("tool_calls")


def _calls(turn: dict) -> list[ToolCall]:
    return [ToolCall(call["function"]["name"], call["function"]["arguments"]) for call in turn.get("tool_calls", ())]


def _case_of(key: str, row: SourceRow, scribe: Scribe, max_length: int) -> Case | LeftOut:
    question, turn = question_of(row.row), row.row["messages"][-1]
    # Reasoning is left out on both sides, as the scorer leaves it out: else having any would tell them apart.
    chosen = {name: turn[name] for name in ("role", "content", "tool_calls") if turn.get(name)}
    gold, tools = _calls(turn), question.get("tools", [])
    if problems := [problem for call in gold for problem in check_call(call, tools)]:
        return LeftOut(row.location, "gold_not_right", str(problems[0]))
    if control := scribe.renderer.control_token_in({"messages": [*question["messages"], chosen]}):
        return LeftOut(row.location, "control_token", control)
    try:
        written, asked_tokens = scribe.write(question, chosen, row.location), scribe.length(question, row.location)
    except DataError as error:
        return LeftOut(row.location, "template", str(error).removeprefix(f"{row.location}: "))
    verdict = score(written.text, gold, tools)
    if not verdict.exact or verdict.valid_schema is False:
        return LeftOut(row.location, "gold_not_right", f"read back as {verdict.failure}: {written.text[:200]}")
    if asked_tokens + written.tokens > max_length:
        return LeftOut(row.location, "too_long", f"{asked_tokens + written.tokens} tokens; data.max_length = {max_length}")
    return Case(key, row.location, question, gold, chosen, written.tokens)


# ---- the pairs


def mine(
    cases: Sequence[Case],
    said: Mapping[str, Sequence[Answer]],
    scribe: Scribe,
    *,
    seed: int,
    classes: Collection[str] = FAILURES,
    max_per_class: int | None = None,
    edits: bool = False,
) -> Mined:
    """Pairs of the answers that fail, in the order of the cases.

    said: by a case's key. classes: of which failures. edits: where every answer to a question is right, the gold with a small edit that
    makes it fail takes the place of a failing answer. seed: of what is drawn, which also depends on nothing but the questions.
    """
    mined = Mined()
    for case in cases:
        answers = said.get(case.key, ())
        if not answers:
            mined.left_out.append(LeftOut(case.source, "not_asked", ""))
            continue
        mined.asked += 1
        found: list[Pair] = []
        right = 0
        for answer in answers:
            outcome = _judge(case, answer, scribe)
            right += outcome is None
            if isinstance(outcome, LeftOut):
                mined.left_out.append(outcome)
            elif outcome:
                found.append(outcome)
        mined.answers += len(answers)
        mined.right += right
        if edits and right == len(answers):
            found = _edited(case, scribe, seed, classes)
        _keep(found, classes, mined)
    mined.pairs, over = choose(mined.pairs, max_per_class, seed)
    mined.left_out += [LeftOut(pair.case.source, "over_the_limit", pair.failure) for pair in over]
    return mined


def _judge(case: Case, answer: Answer, scribe: Scribe) -> Pair | LeftOut | None:
    """None for a right answer."""
    if not answer.ended:
        return LeftOut(case.source, "cut_off", answer.said[-80:])
    failure = score(answer.said, case.gold, case.tools).failure
    if failure is None:
        return None
    if REPLACED in answer.said:
        return LeftOut(case.source, "not_text", f"{failure}: {answer.said[:200]}")
    turn = read_turn(answer.said)
    is_verbatim = isinstance(turn, Fault)
    return _prove(case, {"role": "assistant", "content": spoken(answer.said)} if is_verbatim else turn, answer.said, failure, scribe)


def _prove(case: Case, turn: dict, said: str, failure: str, scribe: Scribe, *, edited: bool = False) -> Pair | LeftOut:
    """A pair, when the turn as the template writes it says what was said and fails with this class."""
    if control := scribe.renderer.control_token_in({"messages": [turn]}):
        return LeftOut(case.source, "control_token", f"{failure}: {control}")
    try:
        written = scribe.write(case.question, turn, case.source)
    except DataError as error:
        return LeftOut(case.source, "round_trip", f"{failure}: {str(error).removeprefix(f'{case.source}: ')}")
    again = score(written.text, case.gold, case.tools).failure
    if again != failure or not _says_the_same(written.text, said, is_structured=bool(turn.get("tool_calls"))):
        return LeftOut(case.source, "round_trip", f"{failure}: {said[:200]!r} is written as {written.text[:200]!r}, which is {again}")
    pair = Pair(case, failure, turn, written.tokens, edited)
    try:
        [read] = to_preferences(pair.row(), "preference", kind="pairs")
    except DataError as error:
        return LeftOut(case.source, "no_row", f"{failure}: {error}")
    if any(read.get(name) != pair.row().get(name) for name in ("prompt", "chosen", "rejected", "tools")):
        return LeftOut(case.source, "no_row", f"{failure}: is read as {json.dumps(read, ensure_ascii=False)[:200]}")
    return pair


def _says_the_same(written: str, said: str, *, is_structured: bool) -> bool:
    """Calls may be in another notation, the template's; everything else is equal letter by letter."""
    if not is_structured:
        return spoken(written) == spoken(said)
    one, other = parse_calls(written), parse_calls(said)
    return one.text == other.text and len(one.calls) == len(other.calls) and all(map(same_call, one.calls, other.calls))


def _edited(case: Case, scribe: Scribe, seed: int, classes: Collection[str]) -> list[Pair]:
    """At most one edit of the gold, drawn by lot among those that are proven."""
    drawn = sorted(edits_of(case.question, case.gold), key=lambda edit: _lot(seed, "edit", case.key, edit.failure))
    for edit in drawn:
        turn = {"role": "assistant", "tool_calls": [_as_call(call) for call in edit.calls]}
        said = "\n".join(f"<tool_call>{json.dumps(call['function'])}</tool_call>" for call in turn["tool_calls"])
        if edit.failure in classes:
            pair = _prove(case, turn, said, edit.failure, scribe, edited=True)
            if isinstance(pair, Pair):
                return [pair]
    return []


def _as_call(call: ToolCall) -> dict:
    return {"type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _keep(found: list[Pair], classes: Collection[str], mined: Mined) -> None:
    """One pair of each class; of several answers the one that is nearest to the chosen in length."""
    taken: set[str] = set()
    for pair in sorted(found, key=lambda pair: abs(pair.gap_tokens)):
        if pair.failure not in classes or pair.failure in taken:
            reason = "other_class" if pair.failure not in classes else "repeated_failure"
            mined.left_out.append(LeftOut(pair.case.source, reason, pair.failure))
            continue
        taken.add(pair.failure)
        mined.pairs.append(pair)


def choose(pairs: Sequence[Pair], max_per_class: int | None, seed: int) -> tuple[list[Pair], list[Pair]]:
    """(kept, left out): at most so many of each class, drawn by lot."""
    counts: Counter = Counter()
    kept: set[int] = set()
    # What the model did itself goes before what it might have done.
    for at in sorted(range(len(pairs)), key=lambda at: (pairs[at].edited, _lot(seed, "choose", pairs[at].case.key, pairs[at].failure))):
        counts[pairs[at].failure] += 1
        if max_per_class is None or counts[pairs[at].failure] <= max_per_class:
            kept.add(at)
    return [pair for at, pair in enumerate(pairs) if at in kept], [pair for at, pair in enumerate(pairs) if at not in kept]


def _lot(seed: int, *what: str) -> bytes:
    return hashlib.sha256(":".join((str(seed), *what)).encode()).digest()


# ---- what is said of them


def report_of(mined: Mined, left_out: Sequence[LeftOut], facts: dict) -> dict:
    """pairs.report.json. left_out: with the rows that were not asked. facts: what the pairs were made from."""
    reasons = Counter(entry.reason for entry in left_out)
    return {
        **facts,
        "questions": mined.asked,
        "answers": mined.answers,
        "right": mined.right,
        "pairs": len(mined.pairs),
        "edited": sum(pair.edited for pair in mined.pairs),
        "classes": {
            name: _class_report([pair for pair in mined.pairs if pair.failure == name])
            for name in FAILURES
            if any(pair.failure == name for pair in mined.pairs)
        },
        "all": _class_report(mined.pairs) if mined.pairs else None,
        "left_out": {reason: reasons[reason] for reason in REASONS if reasons[reason]},
    }


def _class_report(pairs: Sequence[Pair]) -> dict:
    chosen = sum(pair.case.chosen_tokens for pair in pairs) / len(pairs)
    gap = sum(pair.gap_tokens for pair in pairs) / len(pairs)
    return {
        "pairs": len(pairs),
        "edited": sum(pair.edited for pair in pairs),
        "chosen_tokens": round(chosen, 2),
        "gap_tokens": round(gap, 2),
        "chosen_is_longer": sum(pair.gap_tokens > 0 for pair in pairs),
        "chosen_is_shorter": sum(pair.gap_tokens < 0 for pair in pairs),
    }


def warnings_about(report: dict) -> list[str]:
    """Lines about classes whose sides differ in length, and the remedy."""
    lines = []
    for name, found in report["classes"].items():
        if abs(found["gap_tokens"]) > LARGE_GAP * found["chosen_tokens"]:
            longer = "longer" if found["gap_tokens"] > 0 else "shorter"
            lines.append(
                f"warning: {name}: chosen is {abs(found['gap_tokens']):.1f} tokens {longer} than rejected on average, of "
                f"{found['chosen_tokens']:.1f}; a student can tell the two apart by length alone"
            )
    if lines:
        lines.append(
            "  draw several answers to each question (generate.samples_per_prompt, generate.temperature), of which the one nearest in "
            "length is taken; balance classes that pull in opposite directions with --max-per-class; or leave a class out with --classes"
        )
    return lines
