"""Gold as the leaderboard writes it, read into calls that leave a choice (harness.tools.match has what is done with them)."""

from __future__ import annotations

from harness.tools.calls import ToolCall
from harness.tools.match import OneOf


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
