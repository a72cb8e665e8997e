"""A call checked against its tool, and a tool against JSON Schema (Draft 2020-12); tools are those of schema.py.

What is seen at once to fit is let through; where anything could be wrong, jsonschema says what.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, wraps

from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError, ValidationError
from referencing import Registry
from referencing.exceptions import Unresolvable
from referencing.jsonschema import DRAFT202012

from harness.tools.calls import ToolCall
from harness.tools.schema import JSON_TYPES, did_you_mean, named_type


@dataclass(frozen=True)
class Problem:
    """One way in which a call breaks its tool. `kind`: unknown_tool, missing_argument, extra_argument, wrong_type, wrong_value or
    unusable_schema (the tool's own fault)."""

    kind: str
    where: str
    message: str

    def __str__(self) -> str:
        return f"{self.where}: {self.message}"


def once_for_each(function: Callable) -> Callable:
    """Remembers what a function says of a tool, or of a part of one, by its identity: equal tools are one object (`normalise_tool`), which
    nobody writes to, and which is kept here so that its identity stays its own."""
    known: dict[tuple, tuple] = {}

    @wraps(function)
    def remembering(tool: object, *more: object) -> object:
        key = (id(tool), *more)
        if key not in known:
            if len(known) >= 65536:
                known.clear()
            known[key] = (tool, function(tool, *more))
        return known[key][1]

    return remembering


def check_call(call: ToolCall, tools: list[dict]) -> list[Problem]:
    """What is wrong with `call` against `tools` (Tools): empty if nothing is.

    Objects are closed: an argument that the schema does not list is a problem unless the schema says `additionalProperties`.
    A tool without parameters takes no arguments. 5.0 is an integer and True is not, as JSON Schema has it.
    """
    offered = {tool["function"]["name"]: tool["function"] for tool in tools}
    if call.name not in offered:
        what = "is not among the tools" if offered else "is called, but no tools are offered"
        return [Problem("unknown_tool", call.name, f'"{call.name}" {what}{did_you_mean(call.name, offered)}')]
    try:
        errors = schema_errors(call.arguments, offered[call.name].get("parameters", {}))
        return [problem for error in errors for problem in _problems(call.name, error)]
    except UNUSABLE as error:
        return [_unusable(call.name, error)]


@once_for_each
def check_tool(tool: dict) -> Problem | None:
    """What makes a Tool's parameters no JSON Schema that calls can be checked against; None if nothing does."""
    name, parameters = tool["function"]["name"], tool["function"].get("parameters", {})
    try:
        if parameters.get("type", "object") != "object":
            return Problem("unusable_schema", name, f"its parameters have type {json.dumps(parameters['type'])}; must be object")
        schema_errors({}, parameters)
        check_references(parameters)
    except UNUSABLE as error:
        return _unusable(name, error)
    return None


def schema_errors(arguments: dict, parameters: dict) -> list[ValidationError]:
    """jsonschema's errors of arguments against a Tool's parameters (closed, see `check_call`), in the order of their places. Raises one of
    UNUSABLE where the schema is at fault."""
    validator, is_plain = _validator_of(parameters)
    if is_plain and _surely_fits(arguments, validator.schema):
        return []
    return sorted(validator.iter_errors(arguments), key=lambda error: [str(part) for part in error.absolute_path])


UNUSABLE = (SchemaError, Unresolvable, re.error, OverflowError, RecursionError)


_DATA = ("const", "enum", "default", "examples")
"""Keys whose values are no schemas, whatever they look like."""


def check_references(schema: object) -> None:
    """Raises Unresolvable for a $ref that leads to no place in the schema; a value meets it only where it has what stands there."""
    resolver = Registry().with_resource("", DRAFT202012.create_resource(schema)).resolver()
    for reference in _references(schema):
        resolver.lookup(reference)


def _references(schema: object) -> Iterator[str]:
    """Of a part with an `$id` of its own none: they are relative to that."""
    if isinstance(schema, list):
        for part in schema:
            yield from _references(part)
    elif isinstance(schema, dict) and "$id" not in schema:
        if isinstance(schema.get("$ref"), str):
            yield schema["$ref"]
        for key, part in schema.items():
            yield from _references(part) if key not in _DATA else ()


def _unusable(name: str, error: Exception) -> Problem:
    reason = error.message if isinstance(error, SchemaError) else str(error)
    return Problem("unusable_schema", name, f"the tool's parameters cannot be checked against ({reason})")


@once_for_each
def _validator_of(parameters: dict) -> tuple[Draft202012Validator, bool]:
    return _validator(json.dumps(parameters))


@lru_cache(maxsize=65536)
def _validator(parameters: str) -> tuple[Draft202012Validator, bool]:
    """And whether its schema is a plain one."""
    schema = json.loads(parameters)
    schema = _closed({"properties": {}, **schema} if set(schema) <= {"type", "description", "title", "required"} else schema)
    is_plain = _is_plain_schema(schema)
    if not is_plain:
        Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema, registry=Registry()), is_plain  # an empty registry: a $ref never reaches for the network


def _surely_fits(value: object, schema: dict) -> bool:
    """Whether a value is seen at once to fit a plain schema, as nearly every argument is; where it is not, jsonschema says."""
    if "enum" in schema:
        return False
    kind = schema.get("type")
    if kind == "object" or "properties" in schema or "required" in schema:
        properties = schema.get("properties", {})
        return (
            kind in ("object", None)
            and type(value) is dict
            and all(name in value for name in schema.get("required", ()))
            and all(name in properties and _surely_fits(item, properties[name]) for name, item in value.items())
        )
    if kind == "array" or "items" in schema:
        return kind in ("array", None) and type(value) is list and all(_surely_fits(item, schema.get("items", {})) for item in value)
    return kind is None or type(value) in _SURELY[kind]


_SURELY = {"string": (str,), "integer": (int,), "number": (int, float), "boolean": (bool,), "null": (type(None),)}


def _is_plain_schema(schema: object) -> bool:
    """Whether a schema is seen at once to be one, as nearly every tool's is: the schema of schemas takes most of the time of a check."""
    return isinstance(schema, dict) and all(key in _PLAIN and _PLAIN[key](value) for key, value in schema.items())


_PLAIN = {
    "type": lambda value: isinstance(value, str) and value in JSON_TYPES,
    "properties": lambda value: isinstance(value, dict) and all(map(_is_plain_schema, value.values())),
    "required": lambda value: isinstance(value, list) and all(isinstance(name, str) for name in value) and len(set(value)) == len(value),
    "items": _is_plain_schema,
    "unevaluatedProperties": lambda value: value is False,
    "enum": lambda value: isinstance(value, list),
    "description": lambda value: isinstance(value, str),
    "default": lambda value: True,
}


def _closed(schema: object, opened: frozenset[str] | None = None, *, is_part: bool = False) -> object:
    """A copy in which objects with declared properties take no others, and OpenAPI's `nullable: true` lets null in.

    `unevaluatedProperties` sees through $ref and its kind, so what is put together of several parts is closed as a whole, and its parts
    stay open: each of them knows some of the properties. opened: `$ref`s that stand among such parts; their definitions stay open too.
    """
    if opened is None:
        opened = frozenset(_references_of_parts(schema))
    if not isinstance(schema, dict):
        return schema
    closed = {key: value for key, value in schema.items() if key != "examples"}  # an annotation, in data often not the list it must be
    parts_are_open = is_part or _is_composed(schema)
    for key in ("items", "additionalProperties"):
        if key in closed:
            closed[key] = _closed(closed[key], opened)
    if isinstance(closed.get("prefixItems"), list):
        closed["prefixItems"] = [_closed(part, opened) for part in closed["prefixItems"]]
    for key in ("anyOf", "oneOf", "allOf"):
        if isinstance(closed.get(key), list):
            closed[key] = [_closed(part, opened, is_part=parts_are_open) for part in closed[key]]
    for key in ("properties", "$defs", "definitions"):
        if isinstance(closed.get(key), dict):
            is_open = {name: key != "properties" and f"#/{key}/{name}" in opened for name in closed[key]}
            closed[key] = {name: _closed(part, opened, is_part=is_open[name]) for name, part in closed[key].items()}
    says_itself = {"additionalProperties", "unevaluatedProperties", "patternProperties"} & closed.keys()
    if not is_part and not says_itself and ("properties" in closed or _is_composed(schema) and _declares(schema)):
        closed["unevaluatedProperties"] = False
    if closed.get("nullable") is True and isinstance(closed.get("type"), str):
        closed["type"] = [closed["type"], "null"]
        if isinstance(closed.get("enum"), list) and None not in closed["enum"]:
            closed["enum"] = [*closed["enum"], None]
    return closed


def _parts_of(schema: dict) -> list:
    return [part for key in ("allOf", "anyOf", "oneOf") if isinstance(schema.get(key), list) for part in schema[key]]


def _is_composed(schema: dict) -> bool:
    """Of more than one place that may declare properties; the alternatives of one anyOf are one place."""
    every = schema.get("allOf")
    return ("properties" in schema) + ("$ref" in schema) + ("anyOf" in schema) + ("oneOf" in schema) + len(
        every if isinstance(every, list) else ()
    ) > 1


def _declares(part: object) -> bool:
    return isinstance(part, dict) and ("properties" in part or "$ref" in part or any(map(_declares, _parts_of(part))))


def _references_of_parts(schema: object, *, is_part: bool = False) -> Iterator[str]:
    if isinstance(schema, list):
        for item in schema:
            yield from _references_of_parts(item)
    if not isinstance(schema, dict):
        return
    is_part = is_part or _is_composed(schema)
    if is_part and isinstance(schema.get("$ref"), str):
        yield schema["$ref"]
    for key, value in schema.items():
        if key in ("allOf", "anyOf", "oneOf") and isinstance(value, list):
            for part in value:
                yield from _references_of_parts(part, is_part=is_part)
        else:
            yield from _references_of_parts(value)


def extra_names(error: ValidationError) -> list[str]:
    """The names that an error of additionalProperties or unevaluatedProperties is about, in the order of the instance. jsonschema tells
    them in the message only; its schema alone does not say what $ref, allOf and patternProperties declare."""
    said = re.sub(r" (do|does) not match any of the regexes: .*\Z", "", error.message, flags=re.DOTALL)
    said = re.sub(r"\A[^(]*\((.*) (was|were) unexpected\)\Z", r"\1", said, flags=re.DOTALL)
    names = set(ast.literal_eval(f"[{said}]"))
    return [name for name in error.instance if name in names]


def _problems(tool: str, error: ValidationError) -> list[Problem]:
    where = tool + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error.absolute_path)
    known = error.schema.get("properties", {}) if isinstance(error.schema, dict) else {}
    if error.validator == "required":
        # jsonschema reports each missing name as its own error and keeps the name in the message only.
        name = ast.literal_eval(error.message.removesuffix(" is a required property"))
        return [Problem("missing_argument", f"{where}.{name}", "is required and missing")]
    if error.validator in ("additionalProperties", "unevaluatedProperties"):
        return [
            Problem("extra_argument", f"{where}.{name}", f"is not a parameter{did_you_mean(name, known)}") for name in extra_names(error)
        ]
    only_types = error.validator in ("anyOf", "oneOf") and error.context and all(part.validator == "type" for part in error.context)
    kind = "wrong_type" if error.validator == "type" or only_types else "wrong_value"
    if error.validator == "type":
        wanted = error.validator_value if isinstance(error.validator_value, str) else " or ".join(error.validator_value)
        return [Problem(kind, where, f"is {json.dumps(error.instance)[:80]} ({named_type(error.instance)}); must be {wanted}")]
    return [Problem(kind, where, error.message[:200])]
