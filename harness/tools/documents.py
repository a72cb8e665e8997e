"""Answers that must be JSON documents of a given schema (Draft 2020-12, taken as it stands)."""

import json
from functools import lru_cache
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError
from referencing import Registry
from referencing.exceptions import Unresolvable

from harness.errors import DataError
from harness.tools.checks import UNUSABLE, check_references


def check_schema(schema: Any, where: str) -> None:
    """Raises DataError unless it is a JSON Schema, all of whose references lead to a place in it."""
    try:
        Draft202012Validator.check_schema(schema)
        check_references(schema)
    except SchemaError as error:
        raise DataError(f"{where}: is no JSON Schema: {error.message[:200]} (at {error.json_path})") from None
    except Unresolvable as error:
        raise DataError(f"{where}: is no JSON Schema that can be checked against: {error}") from None
    except RecursionError:
        raise DataError(f"{where}: is no JSON Schema that can be checked against: nested too deeply") from None


def check_value(value: object, schema: dict) -> list[str]:
    """What is wrong with a JSON value, one sentence each; empty if nothing is. Raises DataError for a schema that is none."""
    try:
        errors = sorted(_validator(json.dumps(schema)).iter_errors(value), key=lambda error: error.json_path)
    except UNUSABLE as error:
        reason = error.message if isinstance(error, SchemaError) else str(error)
        raise DataError(f"no JSON Schema that can be checked against ({reason[:200]})") from None
    return [f"{error.json_path}: {error.message[:200]}" for error in errors]


def follows_schema(text: str, schema: dict) -> bool:
    """Whether the whole text, but for white space around it, is one JSON document that the schema allows. NaN and Infinity are no JSON.
    Raises DataError for a schema that is none."""
    try:
        document = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return False
    return not check_value(document, schema)


@lru_cache(maxsize=256)
def _validator(schema: str) -> Draft202012Validator:
    schema = json.loads(schema)
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema, registry=Registry())  # an empty registry: a $ref never reaches for the network


def _refuse(constant: str):
    raise ValueError(constant)
