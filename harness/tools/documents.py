"""Answers that must be JSON documents of a given schema."""

import json
from functools import lru_cache
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError

from harness.errors import DataError


def check_schema(schema: Any, where: str) -> None:
    """Raises DataError unless it is a JSON Schema (Draft 2020-12)."""
    try:
        Draft202012Validator.check_schema(schema)
    except SchemaError as error:
        raise DataError(f"{where}: is no JSON Schema: {error.message} (at {error.json_path})") from None


def follows_schema(text: str, schema: dict) -> bool:
    """Whether the whole text, but for white space around it, is one JSON document that the schema allows. NaN and Infinity are no JSON."""
    try:
        document = json.loads(text, parse_constant=_refuse)
        return _validator(json.dumps(schema)).is_valid(document)
    except (ValueError, RecursionError):
        return False


@lru_cache(maxsize=256)
def _validator(schema: str) -> Draft202012Validator:
    return Draft202012Validator(json.loads(schema))


def _refuse(constant: str):
    raise ValueError(constant)
