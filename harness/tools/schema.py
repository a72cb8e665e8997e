"""Tool schemas: every dialect that tool data is written in becomes one. (checks.py checks calls against it.)

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
from collections.abc import Iterable
from functools import lru_cache

from harness.errors import DataError

JSON_TYPES = {"string", "integer", "number", "boolean", "array", "object", "null"}
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
        raise DataError(f"tools is {named_type(raw)}; must be a list of tools")
    return [normalise_tool(tool) for tool in raw]


def normalise_tool(raw: object) -> dict:
    """One tool as a Tool. Equal tools come back as the same object, since a million rows share a few tools: do not write to it."""
    if isinstance(raw, str):
        raw = decode_json(raw, "a tool")
    if not isinstance(raw, dict):
        raise DataError(f"a tool is {named_type(raw)}; must be an object with a name and parameters")
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
            raise DataError(f'tool "{name}": parameters is {named_type(parameters)}; must be an object')
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
    if isinstance(schema.get("type"), str) and schema["type"] not in JSON_TYPES:
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


def named_type(value: object) -> str:
    names = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)
