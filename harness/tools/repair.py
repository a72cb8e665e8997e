"""Gold calls whose values say the right thing in the wrong type, made right: "21" -> 21 where the schema says integer.

A value is changed only where there is one way to read it: text that is the number (007 is none), the boolean, the list or the object that
the schema asks for, a plain number for a text, another case of an enum's word, a null where the argument may be left out. Nothing is
rounded, cut, wrapped or made up.
"""

from __future__ import annotations

import ast
import copy
import json
import math
import re
from dataclasses import dataclass

from jsonschema.exceptions import ValidationError

from harness.tools.calls import ToolCall
from harness.tools.checks import UNUSABLE, Problem, check_call, extra_names, schema_errors

REPAIRABLE = ("wrong_type", "wrong_value", "null_argument", "extra_argument")
_ROUNDS = 8  # a list that was text may hold texts in its turn
_NONE = object()


@dataclass(frozen=True)
class Repair:
    kind: str
    where: str
    """As Problem.where: f.days[0]."""
    before: object
    after: object
    """None and `removed` where the argument was taken out."""
    removed: bool = False

    def __str__(self) -> str:
        after = "left out" if self.removed else json.dumps(self.after, ensure_ascii=False)
        return f"{self.where}: {json.dumps(self.before, ensure_ascii=False)} -> {after}"


def repair_call(call: ToolCall, tools: list[dict], kinds: set[str]) -> tuple[ToolCall, list[Repair]]:
    """The call with what can be repaired of these kinds of Problem (REPAIRABLE), and what was done. `call` is not written to."""
    parameters = next((tool["function"].get("parameters", {}) for tool in tools if tool["function"]["name"] == call.name), None)
    arguments, done = copy.deepcopy(call.arguments), []
    for _ in range(_ROUNDS if parameters is not None else 0):
        try:
            errors = schema_errors(arguments, parameters)
        except UNUSABLE:
            break
        repairs = [repair for error in errors for repair in _repair(call.name, arguments, error, parameters, kinds)]
        done += repairs
        if not repairs:
            break
    return ToolCall(call.name, arguments), done


def problems_of(call: ToolCall, tools: list[dict]) -> list[Problem]:
    """check_call's, with the nulls that a schema does not allow as a kind of their own: tables write them for arguments left out."""
    return [
        Problem("null_argument", problem.where, problem.message)
        if problem.kind == "wrong_type" and problem.message.startswith("is null ")
        else problem
        for problem in check_call(call, tools)
    ]


def _repair(tool: str, arguments: dict, error: ValidationError, parameters: dict, kinds: set[str]) -> list[Repair]:
    """Writes to `arguments`."""
    path = list(error.absolute_path)
    where = tool + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    if error.validator in ("additionalProperties", "unevaluatedProperties"):
        if "extra_argument" not in kinds:
            return []
        holder = _at(arguments, path)
        extra = [name for name in extra_names(error) if name in holder]
        return [Repair("extra_argument", f"{where}.{name}", holder.pop(name), None, removed=True) for name in extra]
    if not path:
        return []
    holder, last = _at(arguments, path[:-1]), path[-1]
    if error.instance is None:
        if "null_argument" not in kinds or not _may_be_absent(arguments, path, parameters):
            return []
        del holder[last]
        return [Repair("null_argument", where, None, None, removed=True)]
    kind = "wrong_value" if error.validator == "enum" else "wrong_type"
    value = _read_as(error.instance, error) if kind in kinds else _NONE
    if value is _NONE:
        return []
    holder[last] = value
    return [Repair(kind, where, error.instance, value)]


def _at(value: object, path: list) -> object:
    for part in path:
        value = value[part]
    return value


def _may_be_absent(arguments: dict, path: list, parameters: dict) -> bool:
    without = copy.deepcopy(arguments)
    holder = _at(without, path[:-1])
    if not isinstance(holder, dict):
        return False
    del holder[path[-1]]
    missing = [error for error in schema_errors(without, parameters) if error.validator == "required"]
    return not any(list(error.absolute_path) == path[:-1] and error.message.startswith(repr(path[-1])) for error in missing)


def _read_as(value: object, error: ValidationError) -> object:
    """The value as the schema wants it, _NONE where there is not exactly one way."""
    if error.validator == "enum":
        same = [option for option in error.validator_value if str(option).casefold() == str(value).casefold()]
        return same[0] if len(same) == 1 else _NONE
    wanted = _wanted_types(error)
    readings = [reading for kind in wanted if (reading := _as_type(value, kind)) is not _NONE]
    distinct = {json.dumps(reading, sort_keys=True): reading for reading in readings}
    return next(iter(distinct.values())) if len(distinct) == 1 else _NONE


def _wanted_types(error: ValidationError) -> list[str]:
    if error.validator == "type":
        return [error.validator_value] if isinstance(error.validator_value, str) else list(error.validator_value)
    if error.validator in ("anyOf", "oneOf") and error.context and all(part.validator == "type" for part in error.context):
        return [kind for part in error.context for kind in _wanted_types(part)]
    return []


def _as_type(value: object, kind: str) -> object:
    if kind == "string":
        return json.dumps(value) if type(value) in (int, float) else _NONE
    if not isinstance(value, str):
        return _NONE
    text = value.strip()
    if kind == "integer":
        return int(text) if re.fullmatch(r"-?(0|[1-9]\d{0,17})", text) else _NONE
    if kind == "number":
        if not re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", text):
            return _NONE
        number = float(text)
        return (int(text) if re.fullmatch(r"-?(0|[1-9]\d{0,17})", text) else number) if math.isfinite(number) else _NONE
    if kind == "boolean":
        return {"true": True, "false": False}.get(text.casefold(), _NONE)
    if kind in ("array", "object"):
        return _structure(text, list if kind == "array" else dict)
    return _NONE


def _structure(text: str, kind: type) -> object:
    """A list or an object that was written as JSON or as Python."""
    for decode in (json.loads, ast.literal_eval):
        try:
            value = json.loads(json.dumps(decode(text), allow_nan=False))
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            continue
        return value if isinstance(value, kind) else _NONE
    return _NONE
