"""Structured outputs: JSON that a schema takes, said as text or handed over in a tool call.

Two layouts of rows:

    {"messages", "schema", "expected"?, "category"?, "id"?}    of one's own. expected: the right value, whose fields have to be equal then
    {"responses_create_params", "schema_str", "schema_type", "response_mode"?, "tool_name"?, "tool_payload_key"?, …}   NeMo Gym's

An answer is right when it is nothing but JSON (no words and no code fence around it), the schema takes it, and every field is expected's.
As in NeMo Gym, all listed properties are required and no others are taken; of rows of one's own the schema counts as it stands. A field
is a value that is no object and no list, by its path: `fields` says how many of the expected ones were right. Of NeMo Gym's rows only
those of JSON are asked; YAML, TOML, CSV and XML are left out and counted.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from harness.data.conversation import messages_of
from harness.data.rows import content_digest
from harness.errors import DataError
from harness.evaluate.items import Item
from harness.evaluate.suites import Loaded, Verdict, load_own, with_underscores
from harness.tools import check_value, json_equal, normalise_tools, parse_calls
from harness.tools.calls import spoken
from harness.tools.documents import check_schema
from harness.tools.schema import decode_json

NEEDS = "answers"
NOTE = None
NAMED_SCHEMAS = ("properties", "$defs", "definitions")
"""Keywords that hold schemas by names of their own."""


def load(paths: Sequence[Path], *, underscore_names: bool = False) -> Loaded:
    return load_own(paths, lambda raw: _item(raw, underscore_names))


def _item(raw: dict, underscore_names: bool) -> Item | str:
    item = _of_nemo_gym(raw) if "responses_create_params" in raw else _of_own(raw)
    if isinstance(item, Item):
        check_schema(item.gold["schema"], "schema")
        if underscore_names and item.gold["tool"]:
            return replace(item, tools=with_underscores(item.tools), gold={**item.gold, "tool": item.gold["tool"].replace(".", "_")})
    return item


def _of_own(raw: dict) -> Item:
    if not isinstance(raw.get("schema"), dict) or "messages" not in raw:
        raise DataError(f'has the keys {", ".join(raw) or "none"}; must be {{"messages", "schema", "expected"?}} or a row of NeMo Gym')
    messages = messages_of(raw["messages"], "messages")
    gold = {"schema": raw["schema"], "tool": None, "key": None} | ({"expected": raw["expected"]} if "expected" in raw else {})
    return Item(str(raw.get("id") or content_digest(raw)), str(raw.get("category") or "json"), messages, [], gold)


def _of_nemo_gym(raw: dict) -> Item | str:
    """The item, or why it is left out."""
    if raw.get("schema_type") != "json":
        return f"answers in {raw.get('schema_type')}, which is not judged here"
    mode, asked = raw.get("response_mode") or "text", raw["responses_create_params"]
    if mode not in ("text", "tool_call"):
        return f"response_mode {mode}"
    schema = decode_json(raw.get("schema_str"), "schema_str")
    if not isinstance(schema, dict):
        raise DataError("schema_str is no object; must be a JSON Schema as text")
    gold = {"schema": _strict(schema), "tool": None, "key": None}
    if mode == "tool_call":
        if not raw.get("tool_name"):
            raise DataError("response_mode is tool_call, and there is no tool_name")
        gold |= {"tool": raw["tool_name"], "key": raw.get("tool_payload_key")}
    if not isinstance(asked, dict) or not isinstance(asked.get("input"), list) or not all(isinstance(one, dict) for one in asked["input"]):
        raise DataError("responses_create_params has no list of messages as its input")
    messages = [{key: message[key] for key in ("role", "content") if key in message} for message in asked["input"]]
    return Item(content_digest(raw), mode, messages_of(messages, "input"), normalise_tools(asked.get("tools")), gold)


def _strict(schema: object) -> object:
    if isinstance(schema, list):
        return [_strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    # A property may be called as a keyword is: "properties" of an estate agent.
    named = {key: value for key, value in schema.items() if key in NAMED_SCHEMAS and isinstance(value, dict)}
    strict = {key: _strict(value) for key, value in schema.items()}
    strict |= {key: {name: _strict(part) for name, part in value.items()} for key, value in named.items()}
    if isinstance(strict.get("properties"), dict):
        strict |= {"required": list(strict["properties"]), "additionalProperties": False}
    return strict


# ---- an answer


def judge(item: Item, text: str) -> Verdict:
    value, failure, detail = _value_of(item, text)
    problems = [] if failure else check_value(value, item.gold["schema"])
    if problems:
        failure, detail = "schema", problems[0]
    measures = {"valid": (int(failure is None), 1)}
    if "expected" in item.gold:
        expected = dict(_fields(item.gold["expected"]))
        said = {} if failure in ("empty", "not_json", "fenced", "no_call", "wrong_tool", "wrong_count") else dict(_fields(value))
        wrong = [path for path, one in expected.items() if path not in said or not json_equal(said[path], one)]
        measures["fields"] = (len(expected) - len(wrong), len(expected))
        extra = sorted(said.keys() - expected.keys())
        if failure is None and (wrong or extra):
            path = (wrong or extra)[0]
            must = json.dumps(expected[path], ensure_ascii=False)[:100] if wrong else "left out"
            failure, detail = "field", f"{path} is {json.dumps(said.get(path), ensure_ascii=False)[:100]}; must be {must}"
    return Verdict(failure, detail, measures)


def _value_of(item: Item, text: str) -> tuple[object, str | None, str]:
    """(the value that the answer gives, failure, detail)."""
    if item.gold["tool"]:
        return _payload_of(item, text)
    said = spoken(text)
    if not said:
        return None, "empty", "says nothing"
    try:
        return json.loads(said, parse_constant=_refuse_constant), None, ""
    except (ValueError, RecursionError) as error:
        if said.startswith("```") and said.endswith("```"):
            return None, "fenced", "stands in a code fence; must be nothing but JSON"
        return None, "not_json", f"is not JSON ({error})"


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _payload_of(item: Item, text: str) -> tuple[object, str | None, str]:
    said, tool, key = parse_calls(text), item.gold["tool"], item.gold["key"]
    if said.malformed:
        return None, "malformed", f"a call that cannot be read: {said.malformed[0][:200]}"
    if not said.calls:
        return None, "no_call", f"calls nothing; {tool} would be right"
    if len(said.calls) > 1:
        return None, "wrong_count", f"makes {len(said.calls)} calls; must be one"
    call = said.calls[0]
    if call.name != tool:
        return None, "wrong_tool", f"calls {call.name}; {tool} would be right"
    if key is None:
        return call.arguments, None, ""
    if set(call.arguments) != {key}:
        return None, "schema", f"{tool} is given {', '.join(call.arguments) or 'nothing'}; must be {key} alone"
    return call.arguments[key], None, ""


def _fields(value: object, path: str = "$") -> Iterator[tuple[str, object]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _fields(inner, f"{path}.{key}")
    elif isinstance(value, list) and value:
        for index, inner in enumerate(value):
            yield from _fields(inner, f"{path}[{index}]")
    else:
        yield path, value
