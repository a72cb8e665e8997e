"""Answers that came from anywhere, scored: rows of predictions against a suite's questions, by the leaderboard's rules or strictly.

A row of predictions is {"id", "calls": [{"name", "arguments"}]} or {"id", "text"}; other keys are let be. What is wrong with the file (no
JSON, no id or an unknown one, an id twice, neither or both of calls and text) is an error with its line. What is wrong with the model is
counted: text, or an item of calls, that cannot be read as a call is `malformed`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from harness.errors import DataError
from harness.evaluate.statistics import wilson_interval
from harness.evaluate.suite import CATEGORIES, Question, category_of, read_lines
from harness.tools import ParsedCalls, ToolCall, breaks_schema, judge_strictly, normalise_tools, parse_calls, read_call, read_gold
from harness.tools.bfcl import check_answer, decode_text

MODES = ("bfcl", "strict")

CLASS_OF_FAILURE = {
    None: "right",
    "malformed": "malformed",
    "no_call": "missing_call",
    "unneeded_call": "needless_call",
    "no_answer": "no_answer",
    "wrong_tool": "wrong_tool",
    "missing_argument": "missing",
    "extra_argument": "extra",
    "wrong_type": "type",
    "wrong_value": "value",
}
"""The one place where the scorer's FAILURES get the names of a report. `wrong_count` is a missing call when there are too few, else a
needless one; no failure is `right_abstention` where no call is wanted."""
CLASSES = ("right", "right_abstention", *[name for name in CLASS_OF_FAILURE.values() if name != "right"])


@dataclass(frozen=True)
class Prediction:
    """`text`, or `calls` as the row has them."""

    id: str
    where: str
    text: str | None
    calls: list | None


@dataclass(frozen=True)
class Judged:
    """`right` is the mode's verdict. `kind` is one of CLASSES, and `malformed` also where the leaderboard takes that for an abstention."""

    id: str
    category: str
    right: bool
    kind: str
    failure: str | None
    reason: str
    gold_breaks_schema: bool = False


def load_predictions(path: Path) -> list[Prediction]:
    """Raises DataError with file and line for a row that says nothing, or not which question it answers."""
    found: dict[str, Prediction] = {}
    for where, row in read_lines(path):
        if not isinstance(row, dict):
            raise DataError(f'{where}: must be an object {{"id", "calls"}} or {{"id", "text"}}')
        id, text, calls = row.get("id"), row.get("text"), row.get("calls")
        if not isinstance(id, str) or not id:
            raise DataError(f'{where}: has no "id"; must be the id of the question that it answers')
        if id in found:
            raise DataError(f'{where}: the id "{id}" stands in {found[id].where} already; must be one answer for a question')
        if ("text" in row) == ("calls" in row):
            raise DataError(f'{where}: "{id}" has {"both" if "text" in row else "neither"} of "calls" and "text"; must have one of them')
        if "text" in row and not isinstance(text, str):
            raise DataError(f'{where}: text of "{id}" is no text; must be what the model wrote ("" if nothing)')
        if "calls" in row and not isinstance(calls, list):
            raise DataError(f'{where}: calls of "{id}" is no list; must be [{{"name", "arguments"}}] ([] if nothing is called)')
        found[id] = Prediction(id, where, text, calls)
    if not found:
        raise DataError(f"{path}: has no row; nothing can be scored")
    return list(found.values())


def score_predictions(predictions: Iterable[Prediction], questions: dict[str, Question], mode: str) -> list[Judged]:
    """A verdict on each, in their order. Raises DataError for an id without a question, and for a category that is not scored."""
    if mode not in MODES:
        raise ValueError(f'mode = "{mode}"; must be one of {", ".join(MODES)}')
    judge = _judge_as_leaderboard if mode == "bfcl" else _judge_strictly
    judged = []
    for prediction in predictions:
        question = _question_of(prediction, questions, mode)
        try:
            judged.append(judge(prediction, question))
        except DataError as error:
            raise DataError(f'the question "{question.id}": {error}') from None
    return judged


def _question_of(prediction: Prediction, questions: dict[str, Question], mode: str) -> Question:
    try:
        category = category_of(prediction.id)
        if prediction.id not in questions:
            raise DataError(f'"{prediction.id}" is in no file of questions; --questions must name the one with it')
        if questions[prediction.id].gold is None:
            raise DataError(f'"{prediction.id}" has no answer; give its file with --answers (in BFCL\'s data it is in possible_answer/)')
        if mode == "strict" and category == "live_relevance":
            raise DataError("live_relevance has no gold: anything that is called is right; it can only be scored with --mode bfcl")
    except DataError as error:
        raise DataError(f"{prediction.where}: {error}") from None
    return questions[prediction.id]


def _read(prediction: Prediction) -> ParsedCalls:
    """As harness.tools reads calls, from text or from the row."""
    if prediction.text is not None:
        return parse_calls(prediction.text)
    read = [(item, read_call(item)) for item in prediction.calls]
    return ParsedCalls([call for _, call in read if call], [str(item) for item, call in read if not call], "")


def _judge_as_leaderboard(prediction: Prediction, question: Question) -> Judged:
    if prediction.text is not None:
        calls = decode_text(prediction.text)
    else:
        read = _read(prediction)
        calls = None if read.malformed else read.calls
    attempted = calls is None and _read(prediction).attempted
    if "irrelevance" in question.category:
        # Nothing that decodes is an abstention: so has the leaderboard it, and a broken call counts as one (gorilla#1362).
        trouble = ("unneeded_call", _calls(calls)) if calls else None
    elif question.category == "live_relevance":
        trouble = None if calls else ("no_call", "calls nothing that can be decoded")
    elif calls is None:
        trouble = ("no_call", "calls nothing")
    else:
        trouble = check_answer(calls, question.gold, question.functions, question.category)
    if attempted:
        reason = "tries to call, in a form that the leaderboard does not decode"
        return Judged(question.id, question.category, trouble is None, "malformed", "malformed", reason)
    return _judged(question, trouble, calls or [])


def _judge_strictly(prediction: Prediction, question: Question) -> Judged:
    said, tools = _read(prediction), normalise_tools(question.functions)
    gold = read_gold(question.gold, question.functions)
    # What was said besides calls is not known of a row that has only these.
    trouble = judge_strictly(said, gold, tools, spoke=prediction.text is None or bool(said.text))
    return _judged(question, trouble, said.calls, breaks_schema(gold, tools))


def _calls(calls: Sequence[ToolCall]) -> str:
    return f"calls {', '.join(call.name for call in calls)}; no call is needed"


def _judged(question: Question, trouble: tuple[str, str] | None, calls: Sequence[ToolCall], gold_breaks_schema: bool = False) -> Judged:
    failure, reason = trouble or (None, "")
    if failure == "wrong_count":
        kind = "missing_call" if len(calls) < len(question.gold) else "needless_call"
    elif failure is None and "irrelevance" in question.category:
        kind = "right_abstention"
    else:
        kind = CLASS_OF_FAILURE[failure]
    return Judged(question.id, question.category, failure is None, kind, failure, reason, gold_breaks_schema)


def report_scores(judged: Sequence[Judged], questions: dict[str, Question], *, suite: str, mode: str) -> dict:
    """The JSON of `harness score`; docs/score.md says what its keys mean.

    `accuracy` and `n` are of the rows that were given; a leaderboard's overall, which weighs whole categories, is not made up from parts.
    """
    asked = Counter(question.category for question in questions.values())
    by_category = {}
    for category in CATEGORIES:
        rows = [row for row in judged if row.category == category]
        if rows:
            unanswered = asked[category] - len(rows)
            by_category[category] = {**_rates(rows), "unanswered": unanswered, "by_class": _by_class(rows)}
    abstaining = [row for row in judged if "irrelevance" in row.category]
    return {
        "suite": suite,
        "mode": mode,
        **_rates(judged),
        "by_class": _by_class(judged),
        "by_category": by_category,
        "abstention": {
            "n": len(abstaining),
            "right": sum(row.kind == "right_abstention" for row in abstaining),
            "malformed_taken_for_right": [row.id for row in abstaining if row.right and row.kind == "malformed"],
        },
        "gold_breaks_schema": [row.id for row in judged if row.gold_breaks_schema],
        "failing": [
            {"id": row.id, "category": row.category, "class": row.kind, "failure": row.failure, "reason": row.reason}
            for row in judged
            if not row.right
        ],
    }


def _rates(rows: Sequence[Judged]) -> dict:
    correct = sum(row.right for row in rows)
    return {"n": len(rows), "correct": correct, "accuracy": correct / len(rows), "interval": wilson_interval(correct, len(rows))}


def _by_class(rows: Sequence[Judged]) -> dict[str, int]:
    counted = Counter(row.kind for row in rows)
    return {name: counted[name] for name in CLASSES}
