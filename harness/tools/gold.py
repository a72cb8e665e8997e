"""Gold that leaves a choice: read from the leaderboard's answers, written out as one right answer, and judged strictly.

Strict is what a program that is called would say: a call is right when it is one of gold's (harness.tools.match: typed equality at every
depth, letters and order of lists included; parallel calls in any order, by a largest matching) and its tool's JSON Schema takes it, down to
the last element. Where gold itself breaks the schema, which is the data's fault, gold alone decides.
"""

from __future__ import annotations

from collections.abc import Sequence

from harness.tools.calls import ParsedCalls, ToolCall
from harness.tools.match import OneOf, match_calls
from harness.tools.schema import check_call


def read_gold(gold: list[dict], functions: list[dict]) -> list[ToolCall]:
    """The leaderboard's [{name: {parameter: [acceptable values]}}] as calls with a OneOf for every argument.

    "" among the values says that the argument may be left out, unless the function requires it; only where it has to be given and nothing
    else is acceptable is "" a value. An object among the values lists those of its keys in the same way; one inside it is plain.
    """
    schemas = {function["name"]: function.get("parameters", {}) for function in functions}
    return [
        ToolCall(name, {key: _read_values(values, *_inside(schemas.get(name), key)) for key, values in arguments.items()})
        for call in gold
        for name, arguments in call.items()
    ]


def _inside(schema: object, key: str) -> tuple[object, bool]:
    """(the schema of a key, whether it is required)."""
    schema = schema if isinstance(schema, dict) else {}
    return (schema.get("properties") or {}).get(key), key in (schema.get("required") or ())


def _read_values(values: list, schema: object, required: bool) -> OneOf:
    omittable = "" in values and not required
    said = [value for value in values if value != ""] or ([] if omittable else [value for value in values if value == ""])
    return OneOf(tuple(_read_value(value, schema) for value in said), omittable)


def _read_value(value: object, schema: object) -> object:
    if isinstance(value, list):
        items = schema.get("items") if isinstance(schema, dict) else None
        return [_read_value(item, items) for item in value]
    if isinstance(value, dict):
        return {key: _read_values(inner if isinstance(inner, list) else [inner], *_inside(schema, key)) for key, inner in value.items()}
    return value


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


def judge_strictly(
    said: ParsedCalls, gold: Sequence[ToolCall], tools: list[dict], *, order: str = "any", spoke: bool = True
) -> tuple[str, str] | None:
    """(one of FAILURES, what is wrong) of an answer, or None.

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
    problem = next((problem for call in said.calls for problem in check_call(call, tools)), None)
    if match.failure:
        return ("wrong_type", str(problem)) if problem and problem.kind == "wrong_type" else (match.failure, match.reason)
    return (problem.kind, str(problem)) if problem and not breaks_schema(gold, tools) else None
