"""Answers that must be JSON documents: the schema is refused before anything is paid, and the answer is held against all of it."""

import pytest

from harness.errors import DataError
from harness.tools.documents import check_schema, check_value, follows_schema

SCHEMA = {"type": "object", "properties": {"n": {"$ref": "#/$defs/n"}}, "required": ["n"], "$defs": {"n": {"type": "integer"}}}


@pytest.mark.parametrize(
    "text, follows",
    [
        ('{"n": 1}', True),
        (' {"n": 3.0}\n', True),
        ('{"n": true}', False),
        ('{"n": NaN}', False),
        ("{}", False),
        ('{"n": 1} {"n": 1}', False),
        ("[" * 100_000, False),
        ("", False),
    ],
)
def test_an_answer_follows_its_schema_or_does_not(text, follows):
    assert follows_schema(text, SCHEMA) is follows


@pytest.mark.parametrize(
    "schema, said",
    [
        ({"type": "dict"}, "at $.type"),
        ({"type": "string", "pattern": "("}, "regex"),
        ({"properties": {"a": {"$ref": "#/$defs/a"}}}, "/$defs/a"),
        ({"items": {"$ref": "http://127.0.0.1:1/x"}}, "http://127.0.0.1:1/x"),
    ],
)
def test_a_schema_that_answers_cannot_be_held_against_is_refused_before_there_is_one(schema, said):
    with pytest.raises(DataError, match=r"rewards\.0: is no JSON Schema") as error:
        check_schema(schema, "rewards.0")
    assert said in str(error.value)


def test_a_reference_that_leads_nowhere_ends_with_an_error_that_has_a_name():
    with pytest.raises(DataError, match="no JSON Schema that can be checked against"):
        check_value({"a": 1}, {"properties": {"a": {"$ref": "#/$defs/a"}}})
    check_schema(SCHEMA, "x")
    assert check_value({"n": "1"}, SCHEMA) == ["$.n: '1' is not of type 'integer'"]
