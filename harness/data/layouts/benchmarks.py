"""Benchmarks as rows: BFCL's questions with their gold calls, and When2Call's questions with the answer that is right.

For practice sets, audits and held-out losses. A score comes from the benchmark's own rules, which accept more than one answer.
"""

from __future__ import annotations

from harness.data.conversation import calls_of, conversation, kind_of, messages_of
from harness.data.layouts.base import Layout, Reading, key_set
from harness.errors import DataError
from harness.tools.schema import decode_json


def read_bfcl(row: dict, reading: Reading) -> dict:
    """{id, question: [[message]], function: [tool]} and `ground_truth`, which beside.py takes from possible_answer/.

    Gold lists the values that are right for each argument: the first is taken, and an argument that may be left out ("" among its values)
    is left out unless the tool requires it.
    """
    turns = row["question"]
    if not isinstance(turns, list) or len(turns) != 1:
        raise DataError(
            f"question is {kind_of(turns)} of several turns; BFCL's multi-turn rows are run against its own APIs, not answered by calls"
        )
    messages, gold = messages_of(turns[0], "question[0]"), row.get("ground_truth")
    tools = row["function"] if isinstance(row["function"], list) else [row["function"]]
    if gold is None:
        if not reading.asks:
            raise DataError(
                "no gold calls: the row has no ground_truth and possible_answer/ beside the file has none for its id (of irrelevance rows "
                "the right reply is words that nobody wrote)"
            )
        return conversation(messages, tools, reading)
    if not isinstance(gold, list) or not all(isinstance(call, dict) and len(call) == 1 for call in gold):
        raise DataError(f"ground_truth is {kind_of(gold)}; must be a list of {{name: {{argument: [values]}}}}")
    required = {tool.get("name"): (tool.get("parameters") or {}).get("required") or [] for tool in tools if isinstance(tool, dict)}
    calls = []
    for call in gold:
        ((name, values),) = call.items()
        calls.append({"name": name, "arguments": _first_values(values, required.get(name, []), reading)})
    return conversation([*messages, {"role": "assistant", "tool_calls": calls_of(calls, "ground_truth")}], tools, reading)


def _first_values(accepted: dict, required: list, reading: Reading) -> dict:
    """{argument: [values that are right]} -> {argument: the first of them}."""
    arguments = {}
    for name, values in accepted.items():
        if not isinstance(values, list):
            raise DataError(f"ground_truth: {name} is {kind_of(values)}; must be the list of its right values")
        real = [value for value in values if value != ""]
        if len(real) > 1:
            reading.lose("other values of an argument that would be right too")
        if len(real) < len(values) and name not in required:
            if real:
                reading.lose("an argument that may be left out")
            continue
        if not real:
            if name in required:
                raise DataError(f"ground_truth: {name} is required and has no right value")
            continue
        arguments[name] = _plain(real[0], reading)
    return arguments


def _plain(value: object, reading: Reading) -> object:
    """An object's fields have lists of right values too, also inside a list."""
    if isinstance(value, dict):
        return _first_values(value, [], reading) if all(isinstance(part, list) for part in value.values()) else value
    return [_plain(part, reading) if isinstance(part, dict) else part for part in value] if isinstance(value, list) else value


def read_when2call(row: dict, reading: Reading) -> dict:
    """{question, tools, answers: {direct, tool_call, request_for_info, cannot_answer}, correct_answer}: the answer that is right."""
    answers, right = row["answers"], row["correct_answer"]
    if not isinstance(answers, dict) or not isinstance(right, str) or not isinstance(answers.get(right), str):
        raise DataError(
            f"correct_answer is {right!r}; must be one of answers ({', '.join(answers) if isinstance(answers, dict) else 'none'})"
        )
    if not isinstance(row["question"], str):
        raise DataError(f"question is {kind_of(row['question'])}; must be text")
    if len(answers) > 1:
        reading.lose("answers that are wrong (they make preference pairs)")
    said = {"content": answers[right]}
    if right == "tool_call":
        called = decode_json(answers[right], "answers.tool_call")
        said = {"tool_calls": calls_of(called if isinstance(called, list) else [called], "answers.tool_call")}
    return conversation([{"role": "user", "content": row["question"]}, {"role": "assistant", **said}], row["tools"], reading)


BFCL = Layout(
    (key_set("id question function"),), "id, question, function (BFCL; possible_answer/ beside it)", read_bfcl, key_set("ground_truth")
)
WHEN2CALL = Layout(
    (key_set("question tools answers correct_answer"),), "question, tools, answers, correct_answer (When2Call)", read_when2call
)
