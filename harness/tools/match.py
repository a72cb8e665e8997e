"""The one scorer of tool calls: evaluation reports it, reinforcement learning is paid by it.

Exact means: the same calls, each with the same name and equal arguments, none more and none fewer, and no malformed attempt beside them.
Values are equal as JSON values: 1 and 1.0 are one number, true is not 1, "1" is not 1, text is equal letter by letter, lists in order,
objects by key. An argument that gold leaves out is wrong even if it repeats the tool's default. Where gold takes several values, or none,
it holds a OneOf instead of a value, at any depth. What needs no call is right when nothing was attempted and something was said: silence
would otherwise be the cheapest way to be paid.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from harness.tools.calls import ParsedCalls, ToolCall, parse_calls
from harness.tools.checks import check_call

# From the gravest; an answer with several failures is counted under the first of them.
FAILURES = (
    "malformed",
    "no_call",
    "unneeded_call",
    "no_answer",
    "wrong_count",
    "wrong_tool",
    "missing_argument",
    "extra_argument",
    "wrong_type",
    "wrong_value",
)


@dataclass(frozen=True)
class OneOf:
    """Stands in gold's arguments where one of several values is right, and perhaps leaving out. Without values it has to be left out."""

    values: tuple
    omittable: bool = False


@dataclass(frozen=True)
class Match:
    """`matched` gold calls have a predicted call of their own; `failure` is None exactly when the match is exact, and `reason` says why."""

    exact: bool
    matched: int
    failure: str | None
    reason: str = ""


@dataclass(frozen=True)
class Score:
    """One answer. `valid_json` and `valid_schema` are None where gold has no call, `abstained_correctly` is None where it has one."""

    exact: bool
    valid_json: bool | None
    valid_schema: bool | None
    abstained_correctly: bool | None
    failure: str | None


def json_equal(a: object, b: object) -> bool:
    """Equality of JSON values: numbers by value, everything else by type and content."""
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, (int, float)) and isinstance(b, (int, float)):
        return a == b
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(json_equal(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(json_equal, a, b))
    return a == b


def fits(value: object, wanted: object) -> bool:
    """Whether `value` is the one that gold wants, or one of them."""
    if isinstance(wanted, OneOf):
        return any(fits(value, one) for one in wanted.values)
    if isinstance(value, dict) and isinstance(wanted, dict):
        return not _missing(value, wanted) and not _extra(value, wanted) and all(fits(value[key], wanted[key]) for key in value)
    if isinstance(value, list) and isinstance(wanted, list):
        return len(value) == len(wanted) and all(map(fits, value, wanted))
    return json_equal(value, wanted)


def _missing(value: dict, wanted: dict) -> list[str]:
    return [key for key, one in wanted.items() if key not in value and not (isinstance(one, OneOf) and one.omittable)]


def _extra(value: dict, wanted: dict) -> list[str]:
    return [key for key in value if key not in wanted or wanted[key] == OneOf((), omittable=True)]


def same_call(predicted: ToolCall, gold: ToolCall) -> bool:
    return predicted.name == gold.name and fits(predicted.arguments, gold.arguments)


def match_calls(
    predicted: Sequence[ToolCall],
    gold: Sequence[ToolCall],
    order: str = "any",
    accepts: Callable[[ToolCall, ToolCall], bool] = same_call,
) -> Match:
    """Matches calls one to one. `order` is "any" (parallel calls) or "strict" (the k-th with the k-th).

    `accepts(predicted, gold)` may be looser than equality, as with gold that lists alternatives. Then taking the first fit can starve a
    later call (BFCL's parallel_178 passes in one order and fails in the other), so the matching is a maximum one.
    """
    if order not in ("any", "strict"):
        raise ValueError(f'order = "{order}"; must be "any" or "strict"')
    if order == "strict":
        partner = {i: i for i in range(min(len(predicted), len(gold))) if accepts(predicted[i], gold[i])}
    else:
        partner = _maximum_matching([[j for j, p in enumerate(predicted) if accepts(p, g)] for g in gold])
    exact = len(partner) == len(gold) == len(predicted)
    return Match(exact, len(partner), *((None, "") if exact else _failure(predicted, gold, partner, order)))


def _maximum_matching(candidates: list[list[int]]) -> dict[int, int]:
    """gold index -> predicted index, as many as possible (Kuhn's augmenting paths)."""
    owner: dict[int, int] = {}

    def place(g: int, tried: set[int]) -> bool:
        for p in candidates[g]:
            if p not in tried:
                tried.add(p)
                if p not in owner or place(owner[p], tried):
                    owner[p] = g
                    return True
        return False

    for g in range(len(candidates)):
        place(g, set())
    return {g: p for p, g in owner.items()}


def _failure(predicted: Sequence[ToolCall], gold: Sequence[ToolCall], partner: dict[int, int], order: str) -> tuple[str, str]:
    """(the gravest of FAILURES, what is wrong) of calls that do not match exactly."""
    if not predicted:
        return "no_call", f"calls nothing; {_names(gold)} would be right"
    if not gold:
        return "unneeded_call", f"calls {_names(predicted)}; no call is needed"
    if len(predicted) != len(gold):
        return "wrong_count", f"makes {len(predicted)} calls ({_names(predicted)}); must be {len(gold)} ({_names(gold)})"
    taken = set(partner.values())
    left = [p for j, p in enumerate(predicted) if j not in taken]
    failures = []
    for i, wanted in enumerate(gold):
        if i in partner:
            continue
        # The nearest of what is left: same name first, then most arguments right. In strict order it can only be the one in its place.
        nearest = left[0] if order == "strict" else max(left, key=lambda p: (p.name == wanted.name, _arguments_right(p, wanted)))
        left.remove(nearest)
        failures.append(_call_failure(nearest, wanted))
    return min(failures, key=lambda failure: FAILURES.index(failure[0]))


def _names(calls: Sequence[ToolCall]) -> str:
    return ", ".join(call.name for call in calls)


def _arguments_right(predicted: ToolCall, gold: ToolCall) -> int:
    return sum(key in predicted.arguments and fits(predicted.arguments[key], value) for key, value in gold.arguments.items())


def _call_failure(predicted: ToolCall, gold: ToolCall) -> tuple[str, str]:
    if predicted.name != gold.name:
        return "wrong_tool", f"calls {predicted.name}; {gold.name} would be right"
    if missing := _missing(predicted.arguments, gold.arguments):
        return "missing_argument", f"{gold.name}.{missing[0]} is missing; must be {_shown(gold.arguments[missing[0]])}"
    if extra := _extra(predicted.arguments, gold.arguments):
        return "extra_argument", f"{gold.name}.{extra[0]} is {_shown(predicted.arguments[extra[0]])}; must be left out"
    wrong = [(key, value, gold.arguments[key]) for key, value in predicted.arguments.items() if not fits(value, gold.arguments[key])]
    if not wrong:  # a caller's own `accepts` was not content
        return "wrong_value", f"{gold.name} is called with other arguments"
    of_type = [one for one in wrong if not _types_fit(one[1], one[2])]
    key, value, wanted = (of_type or wrong)[0]
    return "wrong_type" if of_type else "wrong_value", f"{gold.name}.{key} is {_shown(value)}; must be {_shown(wanted)}"


def _types_fit(value: object, wanted: object) -> bool:
    """Whether the types are right, also inside: elements as those of gold's list, whatever their number; keys that gold has too."""
    if isinstance(wanted, OneOf):
        return not wanted.values or any(_types_fit(value, one) for one in wanted.values)
    if isinstance(value, list) and isinstance(wanted, list):
        return not wanted or all(any(_types_fit(item, one) for one in wanted) for item in value)
    if isinstance(value, dict) and isinstance(wanted, dict):
        return all(_types_fit(value[key], wanted[key]) for key in value if key in wanted)
    return _json_type(value) == _json_type(wanted)


def _json_type(value: object) -> type:
    return float if type(value) is int else type(value)


def _shown(value: object) -> str:
    if isinstance(value, OneOf):
        return " or ".join([*map(_shown, value.values), *(["left out"] if value.omittable else [])])
    text = json.dumps(value, ensure_ascii=False, default=lambda one: list(one.values))
    return text if len(text) <= 100 else f"{text[:99]}…"


def score(text: str, gold_calls: Sequence[ToolCall], tools: list[dict], order: str = "any") -> Score:
    """Scores what a model wrote against the calls it should have made (none: it should have answered in words). Any `text` gets a score."""
    parsed = parse_calls(text)
    trouble = judge_strictly(parsed, gold_calls, tools, order=order, spoke=bool(parsed.text))
    failure = trouble and trouble[0]
    if not gold_calls:
        return Score(failure is None, None, None, failure is None, failure)
    valid_json = bool(parsed.calls) and not parsed.malformed
    valid_schema = valid_json and not any(check_call(call, tools) for call in parsed.calls)
    return Score(failure is None, valid_json, valid_schema, None, failure)


def judge_strictly(
    said: ParsedCalls, gold: Sequence[ToolCall], tools: list[dict], *, order: str = "any", spoke: bool = True
) -> tuple[str, str] | None:
    """(one of FAILURES, what is wrong) of an answer, or None.

    A call that is one of gold's has to be taken by its tool's JSON Schema, too, unless gold itself is not, which is the data's fault.
    spoke: the answer says something besides calls, without which no call is no abstention.
    """
    if said.malformed:
        return "malformed", f"a call that cannot be read: {said.malformed[0][:200]}"
    if not gold and not said.calls:
        return None if spoke else ("no_answer", "says nothing; without a call it must be words")
    match = match_calls(said.calls, gold, order)
    if match.failure not in (None, "wrong_value"):
        return match.failure, match.reason
    # What remains may be of a wrong type, or be one of gold's values that the schema does not take.
    problems = [problem for call in said.calls for problem in check_call(call, tools)]
    if match.failure:
        wrong_type = next((problem for problem in problems if problem.kind == "wrong_type"), None)
        return ("wrong_type", str(wrong_type)) if wrong_type else (match.failure, match.reason)
    return (problems[0].kind, str(problems[0])) if problems and not breaks_schema(gold, tools) else None


def render_gold(gold: Sequence[ToolCall]) -> list[ToolCall]:
    """One right answer: what may be left out is left out, and else the first value is taken, at every depth."""
    return [ToolCall(call.name, _render_value(call.arguments)) for call in gold]


def _render_value(value: object) -> object:
    if isinstance(value, OneOf):
        return _render_value(value.values[0]) if value.values else None
    if isinstance(value, dict):
        return {key: _render_value(one) for key, one in value.items() if not (isinstance(one, OneOf) and one.omittable)}
    if isinstance(value, list):
        return [_render_value(item) for item in value]
    return value


def breaks_schema(gold: Sequence[ToolCall], tools: list[dict]) -> bool:
    """Whether gold, as it is rendered, is refused by its own tools."""
    return any(check_call(call, tools) for call in render_gold(gold))


def summarise(scores: Sequence[Score]) -> dict:
    """Rates over answers, with their denominators; a rate over nothing is None.

    exact_match, valid_json, valid_schema: over the answers that need a call. right_abstention: over those that need none. correct: over
    all. The first two kinds are kept apart because a model that never calls abstains perfectly, and would otherwise look part right.
    """
    calls = [s for s in scores if s.abstained_correctly is None]
    abstentions = [s for s in scores if s.abstained_correctly is not None]
    failures = Counter(s.failure for s in scores if s.failure)
    return {
        "exact_match": _rate([s.exact for s in calls]),
        "valid_json": _rate([s.valid_json for s in calls]),
        "valid_schema": _rate([s.valid_schema for s in calls]),
        "right_abstention": _rate([s.abstained_correctly for s in abstentions]),
        "correct": _rate([s.exact for s in scores]),
        "count": len(scores),
        "call_count": len(calls),
        "abstention_count": len(abstentions),
        "failures": {name: failures[name] for name in FAILURES if failures[name]},
    }


def _rate(hits: Sequence[bool | None]) -> float | None:
    return sum(map(bool, hits)) / len(hits) if hits else None
