"""Gorilla's APIBench: its questions with calls of a library as answers, and its databases of APIs."""

from __future__ import annotations

import ast
import json
import re
import warnings

from harness.data.conversation import kind_of
from harness.data.layouts.base import Layout, Reading, key_set
from harness.errors import DataError

_INSTRUCTION = re.compile(r"\s*#{2,}\s*Instruction\s*:(.*?)(?:#{2,}\s*Output\s*:.*)?\Z", re.DOTALL)
_INPUT = re.compile(r"\s*#{2,}\s*Input\s*:\s*")
_DICT_LIKE = re.compile(r"\s*\{\s*'Instruction'\s*:(.*?),\s*'Output'\s*:", re.DOTALL)


def read_apibench(row: dict, reading: Reading) -> dict:
    """APIBench: the user's question from `code`, the answer from `api_call`.

    The free text in `code` also holds an answer, but it is missing, cut off or another call than `api_call` in 5-98 % of a file's rows, and
    `api_call` is what APIBench's own metric looks up in its database. So that field, letter by letter, is the target.
    """
    code, api_call = row["code"], row["api_call"]
    if not isinstance(code, str) or not isinstance(api_call, str) or not api_call.strip():
        raise DataError(f"code is {kind_of(code)} and api_call is {kind_of(api_call)}; must be both text, the call not empty")
    found = _INSTRUCTION.match(code) or _DICT_LIKE.match(code)
    if not found:
        raise DataError(f'code starts with "{code[:40]}"; must start with "###Instruction:" or "{{\'Instruction\':"')
    question = _INPUT.sub("\n", found.group(1)).strip()
    if len(question) > 1 and question[0] == question[-1] and question[0] in "\"'":
        question = question[1:-1].strip()
    if not question:
        raise DataError("the instruction in code is empty; must be a question")
    reading.lose("what `code` says beside the question (another answer, an explanation, a script)")
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": api_call}]}


def read_api(row: dict, reading: Reading) -> dict:
    """An entry of a database is a document and asks nothing: it is trained as text, as the JSON that Gorilla puts into prompts."""
    if not isinstance(row["api_call"], str) or not row["api_call"].strip():
        raise DataError(f"api_call is {kind_of(row['api_call'])}; must be text")
    return {"text": json.dumps(row, ensure_ascii=False)}


def is_python(code: str) -> bool:
    """Whether a text parses as Python; APIBench's calls are counted by it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an odd escape in somebody's data is not our warning
            ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


APIBENCH = Layout((key_set("code api_call"),), "code, api_call", read_apibench)
APIBENCH_API = Layout(
    (key_set("domain framework api_name api_call"),),
    "domain, framework, api_name, api_call (a database of APIBench)",
    read_api,
    key_set("functionality api_arguments python_environment_requirements example_code performance description"),
)
