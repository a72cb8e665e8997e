"""Tool schemas: every dialect that tool data is written in becomes one, and calls are checked against it.

The one form (a *Tool*) is OpenAI's: {"type": "function", "function": {"name", "description"?, "parameters"?}}, parameters in JSON Schema
(Draft 2020-12). Read besides: the bare inner object, the Responses API's flat object, JSON text of either, and xLAM's flat parameter map
with Python types: {"city": {"type": "str, optional", "description": "…", "default": "Paris"}}. Other keys of a tool (`return`, `strict`, …)
are dropped: servers do not show them to the model, so training must not.
"""

from __future__ import annotations

import ast
import difflib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache, wraps

from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError, ValidationError
from referencing import Registry
from referencing.exceptions import Unresolvable
from referencing.jsonschema import DRAFT202012

from harness.errors import DataError
from harness.tools.calls import ToolCall

_JSON_TYPES = {"string", "integer", "number", "boolean", "array", "object", "null"}
_SCALARS = {
    "string": "str string text char date datetime time timedelta bytes path uuid regex enum file url",
    "integer": "int integer long",
    "number": "float number double decimal",
    "boolean": "bool boolean",
    "null": "none nonetype null",
    "object": "dict object mapping map hashmap json",
    "array": "list array arraylist sequence iterable ndarray",
}
_TYPE_OF_NAME = {name: json_type for json_type, names in _SCALARS.items() for name in names.split()}
# ", optional" and what may follow it ("int, optional, default 5"), but not the Optional[…] inside "Tuple[int, Optional[str]]".
_SUFFIX = re.compile(r"\s*[,(]\s*(optional|required)\b(?!\s*\[).*$", re.IGNORECASE | re.DOTALL)


@dataclass(frozen=True)
class Problem:
    """One way in which a call breaks its tool. `kind`: unknown_tool, missing_argument, extra_argument, wrong_type, wrong_value or
    unusable_schema (the tool's own fault)."""

    kind: str
    where: str
    message: str

    def __str__(self) -> str:
        return f"{self.where}: {self.message}"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`; did you mean "get_weather"?`, or nothing where nothing is near."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f'; did you mean "{near[0]}"?' if near else ""


# ---- reading


def normalise_tools(raw: object) -> list[dict]:
    """A row's `tools` (a list, or its JSON text) as Tools. None and [] give []. Raises DataError naming the tool that cannot be read."""
    raw = decode_json(raw, "tools")
    if raw is None:
        return []
    if not isinstance(raw, list):
        raise DataError(f"tools is {_named(raw)}; must be a list of tools")
    return [normalise_tool(tool) for tool in raw]


def normalise_tool(raw: object) -> dict:
    """One tool as a Tool. Equal tools come back as the same object, since a million rows share a few tools: do not write to it."""
    if isinstance(raw, str):
        raw = decode_json(raw, "a tool")
    if not isinstance(raw, dict):
        raise DataError(f"a tool is {_named(raw)}; must be an object with a name and parameters")
    return _normalise_tool(json.dumps(raw))


@lru_cache(maxsize=65536)
def _normalise_tool(text: str) -> dict:
    raw = json.loads(text)
    if raw.get("type", "function") not in ("function", "object"):
        raise DataError(f'a tool has type "{raw["type"]}"; only "function" is a tool that a row can offer')
    function = raw["function"] if isinstance(raw.get("function"), dict) else raw
    name = function.get("name")
    if not isinstance(name, str) or not name:
        raise DataError(f"a tool has no name; its keys are {', '.join(function) or 'none'}; must be {{name, description, parameters}}")
    tool = {"name": name}
    if isinstance(function.get("description"), str):
        tool["description"] = function["description"]
    parameters = decode_json(function.get("parameters"), f'tool "{name}": parameters')
    if parameters is not None:
        if not isinstance(parameters, dict):
            raise DataError(f'tool "{name}": parameters is {_named(parameters)}; must be an object')
        try:
            tool["parameters"] = _normalise_parameters(parameters, function.get("required"))
        except DataError as error:
            raise DataError(f'tool "{name}": {error}') from None
    return {"type": "function", "function": tool}


def _normalise_parameters(parameters: dict, required: object) -> dict:
    if not all(map(_is_flat_spec, parameters.values())):
        return _normalise_schema(parameters)[0]
    properties, needed = {}, []
    for name, spec in parameters.items():
        properties[name], optional = _normalise_schema(spec)
        if not optional:
            needed.append(name)
    if isinstance(required, list):  # the tool says it itself (Seal-Tools): believe it
        needed = [name for name in required if name in properties]
    return {"type": "object", "properties": properties, "required": needed}


def _is_flat_spec(spec: object) -> bool:
    """Whether a value in a parameter map is one parameter; in a JSON Schema at least one value (`"type": "object"`, …) is not."""
    return isinstance(spec, dict) and any(isinstance(spec.get(key), str) for key in ("type", "description"))


def _normalise_schema(spec: dict) -> tuple[dict, bool]:
    """A schema with every Python type name replaced, and whether its parameter may be left out.

    May be left out: "optional" in the type, Optional[…], `required: false`, or a default. The last because in xLAM most defaults stand on a
    plain "str" and gold calls leave those arguments out; calling them required would fail correct calls. The default itself is kept.
    """
    schema = {key: value for key, value in spec.items() if value is not None and not (key == "required" and isinstance(value, bool))}
    optional = "default" in spec or spec.get("required") is False
    if isinstance(schema.get("type"), str) and schema["type"] not in _JSON_TYPES:
        parsed, may_be_absent = parse_type(schema.pop("type"))
        schema = {**parsed, **schema}
        optional = optional or may_be_absent
    elif isinstance(schema.get("type"), list):
        schema["type"] = [_TYPE_OF_NAME.get(str(name).lower(), name) for name in schema["type"]]
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            schema[key] = _normalise_schema(schema[key])[0]
    for key in ("anyOf", "oneOf", "allOf", "prefixItems"):
        if isinstance(schema.get(key), list):
            schema[key] = [_normalise_schema(part)[0] if isinstance(part, dict) else part for part in schema[key]]
    properties = schema.get("properties")
    if isinstance(properties, dict):
        flagged = [name for name, part in properties.items() if isinstance(part, dict) and part.get("required") is True]
        if flagged:  # `required: true` on the property itself, as Draft 3 had it
            schema["required"] = list(dict.fromkeys([*schema.get("required", []), *flagged]))
        schema["properties"] = {n: _normalise_schema(part)[0] if isinstance(part, dict) else part for n, part in properties.items()}
    return schema, optional


def parse_type(text: str) -> tuple[dict, bool]:
    """A Python type as JSON Schema, and whether it says that the parameter is optional.

    "List[int], optional" -> ({"type": "array", "items": {"type": "integer"}}, True). Raises DataError for a type that is not known.
    """
    bare = _SUFFIX.sub("", text).strip()
    suffix = text.strip()[len(bare) :].lower()
    try:
        node = ast.parse(re.sub(r"\s+or\s+", " | ", bare), mode="eval").body
        optional = isinstance(node, ast.Subscript) and _base_name(node.value) == "optional"
        # At the top, Optional[X] says that the argument may be left out; inside another type it says that null may stand there.
        schema = _schema_of(node.slice if optional else node)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise DataError(f'type "{text}" is not known; must be one of JSON Schema or of Python ("str, optional", "List[int]")') from None
    return schema, optional or "optional" in suffix


def _base_name(node: ast.expr) -> str:
    """`List`, `typing.List` -> "list"."""
    if isinstance(node, ast.Attribute):
        return node.attr.lower()
    if isinstance(node, ast.Name):
        return node.id.lower()
    raise ValueError(ast.dump(node))


def _schema_of(node: ast.expr) -> dict:
    if isinstance(node, ast.Constant) and node.value is None:
        return {"type": "null"}
    if isinstance(node, ast.Constant) and isinstance(node.value, str):  # a forward reference
        return _schema_of(ast.parse(node.value, mode="eval").body)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return _any_of([_schema_of(node.left), _schema_of(node.right)])
    if isinstance(node, ast.Subscript):
        return _generic(_base_name(node.value), node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice])
    if isinstance(node, ast.Call):  # API-Bank writes list(str)
        return _generic(_base_name(node.func), node.args)
    name = _base_name(node)
    if name in ("any", "anytype"):
        return {}
    if name in ("list", "tuple", "set", "frozenset", "dict", "callable"):
        return _generic(name, [])
    if name not in _TYPE_OF_NAME:
        raise ValueError(name)
    return {"type": _TYPE_OF_NAME[name]}


def _generic(base: str, arguments: list[ast.expr]) -> dict:
    if base == "callable":  # a function travels through JSON as its source text; xLAM's gold calls write "lambda x: x**2"
        return {"type": "string"}
    if base == "literal":
        return {"enum": [ast.literal_eval(argument) for argument in arguments]}
    if base in ("dict", "mapping", "defaultdict", "ordereddict"):
        values = _schema_of(arguments[1]) if len(arguments) == 2 else {}
        return {"type": "object", **({"additionalProperties": values} if values else {})}
    if base == "tuple" and arguments and not (isinstance(arguments[-1], ast.Constant) and arguments[-1].value is ...):
        parts = [_schema_of(argument) for argument in arguments]
        return {"type": "array", "prefixItems": parts, "minItems": len(parts), "maxItems": len(parts)}
    if base == "optional":
        return _any_of([_schema_of(arguments[0]), {"type": "null"}])
    if base == "union":
        return _any_of([_schema_of(argument) for argument in arguments])
    if base in ("list", "array", "sequence", "iterable", "tuple", "set", "frozenset"):
        items = _schema_of(arguments[0]) if arguments else {}
        unique = {"uniqueItems": True} if base in ("set", "frozenset") else {}
        return {"type": "array", **({"items": items} if items else {}), **unique}
    raise ValueError(base)


def _any_of(parts: list[dict]) -> dict:
    flat = [inner for part in parts for inner in (part["anyOf"] if set(part) == {"anyOf"} else [part])]
    distinct = [part for i, part in enumerate(flat) if part not in flat[:i]]
    if {"type": "number"} in distinct:  # every integer is a number
        distinct = [part for part in distinct if part != {"type": "integer"}]
    if {} in distinct:
        return {}
    return distinct[0] if len(distinct) == 1 else {"anyOf": distinct}


def decode_json(value: object, what: str) -> object:
    """JSON text where an object or a list is meant (xLAM's columns, Parquet written with datasets' Json); anything else as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value, object_pairs_hook=distinct_keys)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{what} is text that is not JSON ({error})") from None


def distinct_keys(pairs: list[tuple[str, object]]) -> dict:
    """For json's object_pairs_hook. Raises ValueError for a key that stands twice: Python would take the last and say nothing."""
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f'the key "{twice}" stands twice in one object')
    return found


def _named(value: object) -> str:
    names = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)


# ---- checking


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
    "type": lambda value: isinstance(value, str) and value in _JSON_TYPES,
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
        return [Problem(kind, where, f"is {json.dumps(error.instance)[:80]} ({_named(error.instance)}); must be {wanted}")]
    return [Problem(kind, where, error.message[:200])]
