import json
import random

import pytest
from jsonschema import Draft202012Validator

from harness.errors import DataError
from harness.tools import ToolCall, check_call, check_tool, normalise_tool, normalise_tools, parse_type
from harness.tools.checks import _closed, _is_plain_schema, schema_errors

# The types that xLAM-60k's first hundred rows hold (research/tool-calling.md, section 2), API-Bank's, and what is near them.
TYPES = [
    ("str", {"type": "string"}, False),
    ("str, optional", {"type": "string"}, True),
    ("int, optional, default 5", {"type": "integer"}, True),
    ("str (optional)", {"type": "string"}, True),
    ("int, required", {"type": "integer"}, False),
    ("float", {"type": "number"}, False),
    ("bool, optional", {"type": "boolean"}, True),
    ("List[int]", {"type": "array", "items": {"type": "integer"}}, False),
    ("typing.List[float]", {"type": "array", "items": {"type": "number"}}, False),
    ("list(str)", {"type": "array", "items": {"type": "string"}}, False),
    ("List[Union[int, float]]", {"type": "array", "items": {"type": "number"}}, False),
    (
        "Tuple[float, str]",
        {"type": "array", "prefixItems": [{"type": "number"}, {"type": "string"}], "minItems": 2, "maxItems": 2},
        False,
    ),
    ("Tuple[int, ...]", {"type": "array", "items": {"type": "integer"}}, False),
    ("set", {"type": "array", "uniqueItems": True}, False),
    ("Dict", {"type": "object"}, False),
    ("Dict[str, int]", {"type": "object", "additionalProperties": {"type": "integer"}}, False),
    ("Optional[str]", {"type": "string"}, True),
    ("List[Optional[int]]", {"type": "array", "items": {"anyOf": [{"type": "integer"}, {"type": "null"}]}}, False),
    ("str | None", {"anyOf": [{"type": "string"}, {"type": "null"}]}, False),
    ("Union[str, List[str]]", {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}, False),
    ("int or float", {"type": "number"}, False),
    ("Any", {}, False),
    ('Literal["c", "f"]', {"enum": ["c", "f"]}, False),
    ("Callable[[float], float]", {"type": "string"}, False),
]


@pytest.mark.parametrize(("text", "schema", "optional"), TYPES)
def test_a_python_type_becomes_json_schema(text, schema, optional):
    assert parse_type(text) == (schema, optional)


@pytest.mark.parametrize("text", ["strng", "List[", "", "1 + 2", "Foo[int]", "List[strng]"])
def test_an_unknown_type_is_refused_by_name(text):
    with pytest.raises(DataError, match="is not known"):
        parse_type(text)


FLAT = {
    "name": "forecast",
    "description": "Weather to come",
    "parameters": {
        "city": {"type": "str", "description": "Where"},
        "days": {"type": "int", "default": 3},
        "unit": {"type": "str, optional", "description": "c or f"},
        "hours": {"type": "List[int]"},
    },
}
SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "description": "Where"},
        "days": {"type": "integer", "default": 3},
        "unit": {"type": "string", "description": "c or f"},
        "hours": {"type": "array", "items": {"type": "integer"}},
    },
    "required": ["city", "hours"],
}


def tool(parameters, name="forecast"):
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def test_a_flat_xlam_map_becomes_an_object_schema_that_keeps_defaults():
    assert normalise_tool(FLAT) == {
        "type": "function",
        "function": {"name": "forecast", "description": "Weather to come", "parameters": SCHEMA},
    }


def test_every_way_to_write_a_tool_gives_the_same_tool():
    bare = {"name": "forecast", "parameters": SCHEMA}
    expected = tool(SCHEMA)
    spellings = [
        bare,
        {"type": "function", "function": bare},
        {"type": "function", **bare, "strict": False},
        json.dumps(bare),
        {**bare, "parameters": json.dumps(SCHEMA), "return": {"x": {"type": "str"}}},
    ]
    assert [normalise_tool(spelling) for spelling in spellings] == [expected] * len(spellings)
    assert normalise_tools(json.dumps(spellings[:2])) == [expected] * 2
    assert normalise_tools(None) == normalise_tools([]) == []


def test_a_tools_own_list_of_required_arguments_beats_what_its_defaults_suggest():
    sealtools = {"name": "f", "parameters": {"a": {"type": "str"}, "b": {"type": "str", "required": True}}, "required": ["b"]}
    assert normalise_tool(sealtools)["function"]["parameters"]["required"] == ["b"]


def test_a_parameter_that_is_called_type_does_not_make_the_map_a_schema():
    parameters = normalise_tool({"name": "f", "parameters": {"type": {"type": "str"}}})["function"]["parameters"]
    assert parameters == {"type": "object", "properties": {"type": {"type": "string"}}, "required": ["type"]}


def test_python_names_inside_a_json_schema_are_replaced_at_every_depth():
    bfcl = {"type": "dict", "properties": {"a": {"type": "array", "items": {"type": "float"}}, "b": {"type": ["str", "null"]}}}
    assert normalise_tool({"name": "f", "parameters": bfcl})["function"]["parameters"] == {
        "type": "object",
        "properties": {"a": {"type": "array", "items": {"type": "number"}}, "b": {"type": ["string", "null"]}},
    }


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"parameters": {}}, "has no name"),
        (3, "must be an object"),
        ("{", "not JSON"),
        ({"name": "f", "parameters": [1]}, 'tool "f": parameters is a list'),
        ({"name": "f", "parameters": {"a": {"type": "strng"}}}, 'tool "f": type "strng" is not known'),
        ({"type": "web_search"}, 'type "web_search"'),
    ],
)
def test_a_tool_that_cannot_be_read_says_why(raw, message):
    with pytest.raises(DataError, match=message):
        normalise_tool(raw)


def problems(arguments, schema=SCHEMA, name="forecast"):
    return [(p.kind, p.where) for p in check_call(ToolCall(name, arguments), [tool(schema)])]


def test_a_good_call_has_no_problem():
    assert problems({"city": "Paris", "hours": [1, 2], "days": 2.0}) == []


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"hours": []}, [("missing_argument", "forecast.city")]),
        ({}, [("missing_argument", "forecast.city"), ("missing_argument", "forecast.hours")]),
        ({"city": "x", "hours": [], "dayz": 1}, [("extra_argument", "forecast.dayz")]),
        ({"city": "x", "hours": [1, "2"]}, [("wrong_type", "forecast.hours[1]")]),
        ({"city": "x", "hours": [], "days": "3"}, [("wrong_type", "forecast.days")]),
        ({"city": "x", "hours": [], "days": True}, [("wrong_type", "forecast.days")]),
    ],
)
def test_each_way_to_break_a_schema_has_its_own_kind_and_place(arguments, expected):
    assert problems(arguments) == expected


def test_an_unknown_tool_and_an_extra_argument_suggest_what_was_meant():
    assert 'did you mean "forecast"?' in str(check_call(ToolCall("forcast", {}), [tool(SCHEMA)])[0])
    assert 'did you mean "days"?' in str(check_call(ToolCall("forecast", {"city": "x", "hours": [], "dayz": 1}), [tool(SCHEMA)])[0])
    assert "no tools are offered" in str(check_call(ToolCall("forecast", {}), [])[0])


def test_objects_are_closed_at_every_depth_unless_the_schema_opens_them():
    inner = {"type": "object", "properties": {"a": {"type": "integer"}}}
    assert problems({"o": {"b": 1}}, {"type": "object", "properties": {"o": inner}}) == [("extra_argument", "forecast.o.b")]
    assert problems({"o": {"b": 1}}, {"type": "object", "properties": {"o": {**inner, "additionalProperties": True}}}) == []
    assert problems({"o": {"b": 1}}, {"type": "object", "properties": {"o": {"type": "object"}}}) == []
    assert problems({"b": 1}, {"type": "object"}) == [("extra_argument", "forecast.b")]
    assert [p.kind for p in check_call(ToolCall("f", {"b": 1}), [{"type": "function", "function": {"name": "f"}}])] == ["extra_argument"]


def test_properties_that_allOf_and_ref_declare_are_not_extra():
    schema = {
        "type": "object",
        "properties": {"a": {"type": "integer"}},
        "allOf": [{"properties": {"b": {"type": "integer"}}}, {"$ref": "#/$defs/c"}],
        "$defs": {"c": {"type": "object", "properties": {"c": {"type": "integer"}}, "additionalProperties": True}},
    }
    assert problems({"a": 1, "b": 2, "c": 3}, schema) == []


def test_enum_and_union_are_told_apart_as_value_and_type():
    schema = {
        "type": "object",
        "properties": {"unit": {"enum": ["c", "f"]}, "at": {"anyOf": [{"type": "string"}, {"type": "integer"}]}},
    }
    assert problems({"unit": "k", "at": 1}, schema) == [("wrong_value", "forecast.unit")]
    assert problems({"unit": "c", "at": []}, schema) == [("wrong_type", "forecast.at")]


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "objekt"},
        {"type": "object", "properties": {"a": {"$ref": "https://example.org/x.json"}}},
        {"properties": {"a": {"pattern": "("}}},
    ],
)
def test_a_tool_whose_schema_is_broken_is_the_tools_fault_and_never_reaches_for_the_network(schema):
    assert problems({"a": "x"}, schema) == [("unusable_schema", "forecast")]


WIDE = {**SCHEMA, "properties": {**SCHEMA["properties"], "at": {**SCHEMA, "enum": [1, "x"]}, "more": {"type": "array", "items": SCHEMA}}}


def mutated(generator, schema):
    """A copy in which one value, at any depth, is another one."""
    copy = json.loads(json.dumps(schema))
    places, boxes = [], [copy]
    while boxes:
        box = boxes.pop()
        keys = list(box) if isinstance(box, dict) else range(len(box))
        places += [(box, key) for key in keys]
        boxes += [box[key] for key in keys if isinstance(box[key], (dict, list))]
    box, key = generator.choice(places)
    box[key] = generator.choice(
        [None, True, False, 5, -1, "number", "numbre", [], ["a", "a"], ["a", 1], {}, {"type": 5}, {"type": "array"}]
    )
    if isinstance(box, dict):
        new = ["type", "properties", "required", "items", "enum", "default", "description", "minimum", "$ref", "unevaluatedProperties"]
        box[generator.choice(new)] = generator.choice([{}, "string", 1, ["a"]])
    return copy


def test_a_schema_that_is_seen_to_be_one_is_one_by_the_schema_of_schemas():
    generator, plain = random.Random(0), 0
    for _ in range(800):
        schema = mutated(generator, WIDE)
        if _is_plain_schema(schema):
            plain += 1
            Draft202012Validator.check_schema(schema)
    assert plain > 50
    assert _is_plain_schema(_closed(WIDE))


# ---- schemas that are put together of parts

TEXT = {"type": "string"}
BASE = {"$defs": {"base": {"type": "object", "properties": {"y": TEXT}}}}


@pytest.mark.parametrize(
    "schema",
    [
        {"properties": {"x": TEXT}, "allOf": [{"$ref": "#/$defs/base"}], **BASE},
        {"properties": {"x": TEXT}, "$ref": "#/$defs/base", **BASE},
        {"allOf": [{"$ref": "#/$defs/base"}, {"properties": {"x": TEXT}}], **BASE},
        {"properties": {"x": TEXT}, "anyOf": [{"properties": {"y": TEXT}, "required": ["y"]}, {"properties": {"z": TEXT}}]},
        {"properties": {"x": TEXT}, "allOf": [{"anyOf": [{"$ref": "#/$defs/base"}, {"required": ["x"]}]}], **BASE},
        {"allOf": [{"properties": {"x": TEXT, "y": TEXT}}]},
        {"anyOf": [{"properties": {"x": TEXT, "y": TEXT}}, {"properties": {"z": TEXT}}]},
    ],
)
def test_what_any_part_of_a_schema_declares_is_a_parameter_and_nothing_else_is(schema):
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", **schema}}}]
    assert check_call(ToolCall("f", {"x": "1", "y": "2"}), tools) == []
    assert check_call(ToolCall("f", {"x": "1", "y": "2", "q": "3"}), tools)


def test_an_extra_argument_is_named_alone_where_others_are_declared_elsewhere_than_under_properties():
    def extra(schema: dict, arguments: dict) -> list[str]:
        tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", **schema}}}]
        return [problem.where for problem in check_call(ToolCall("f", arguments), tools)]

    assert extra({"properties": {"x": TEXT}, "allOf": [{"$ref": "#/$defs/base"}], **BASE}, {"x": "1", "y": "2", "q'(": 1}) == ["f.q'("]
    patterned = {"properties": {"x": TEXT}, "patternProperties": {"^x-": TEXT}, "additionalProperties": False}
    assert extra(patterned, {"x-a": "1", "z": 2, "b": 3}) == ["f.z", "f.b"]
    assert extra({"properties": {"x": TEXT}, "additionalProperties": False}, {"x": "1", "z": 2}) == ["f.z"]


def test_openapis_nullable_lets_null_in_and_nothing_else():
    schema = {"type": "object", "properties": {"a": {"type": "string", "nullable": True, "enum": ["b"]}, "c": {"type": "string"}}}
    tools = [{"type": "function", "function": {"name": "f", "parameters": schema}}]
    assert check_call(ToolCall("f", {"a": None}), tools) == [] == check_call(ToolCall("f", {"a": "b"}), tools)
    assert [problem.kind for problem in check_call(ToolCall("f", {"a": "d", "c": None}), tools)] == ["wrong_value", "wrong_type"]


def test_a_reference_that_leads_nowhere_is_the_tools_fault_also_where_no_call_meets_it():
    def tool(schema: dict) -> dict:
        return {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {"a": schema}}}}

    assert "/$defs/b" in str(check_tool(tool({"$ref": "#/$defs/b"})))
    assert "http://x/y" in str(check_tool(tool({"type": "array", "items": {"$ref": "http://x/y"}})))
    assert check_tool(tool({"enum": [{"$ref": "#/$defs/b"}]})) is None
    assert check_tool(tool({"$ref": "#"})) is None


def test_what_is_seen_at_once_to_fit_fits_by_jsonschema_and_nothing_else_changes(monkeypatch):
    rng = random.Random(3)
    values = [None, True, 0, 5.0, 2.5, "x", [], [1], ["x", 1], {}, {"a": 1}, {"a": "x", "b": [2]}, {"c": {"a": 1}}]
    kinds = ["string", "integer", "number", "boolean", "array", "object", "null"]

    def schema(depth):
        made = {"type": rng.choice(kinds)} if rng.random() < 0.8 else {}
        if depth and rng.random() < 0.5:
            made["properties"] = {name: schema(depth - 1) for name in rng.sample("abc", rng.randint(0, 3))}
            made["required"] = rng.sample("abc", rng.randint(0, 2))
        if depth and rng.random() < 0.4:
            made["items"] = schema(depth - 1)
        if rng.random() < 0.2:
            made["enum"] = rng.sample(values, 2)
        return made

    fitted = 0
    for _ in range(3000):
        parameters = {"type": "object", "properties": {name: schema(2) for name in "ab"}}
        arguments = {name: rng.choice(values) for name in rng.sample("abc", rng.randint(0, 3))}
        said = [error.message for error in schema_errors(arguments, parameters)]
        with monkeypatch.context() as patch:
            patch.setattr("harness.tools.checks._surely_fits", lambda *_: False)
            assert said == [error.message for error in schema_errors(arguments, parameters)], (arguments, parameters)
        fitted += not said
    assert 300 < fitted < 2900


def test_what_is_remembered_of_a_tool_is_of_that_tool_alone():
    """A tool that is gone leaves its identity to another."""
    for n in range(300):
        kind = "object" if n % 2 else "string"
        problem = check_tool({"type": "function", "function": {"name": f"f{n}", "parameters": {"type": kind}}})
        assert (problem is None) == (kind == "object") and (problem is None or problem.where == f"f{n}")
