"""What is wrong in one canonical row, and what can be repaired of it.

    check_row(row, ...)     findings, each of one of CLASSES
    repair_row(row, ...)    the row without what can be mended, and each change
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from harness.tools import REPAIRABLE, Repair, ToolCall, check_tool, problems_of, repair_call
from harness.tools.checks import once_for_each


@dataclass(frozen=True)
class Class:
    what: str
    action: str
    repair: str = ""
    """What a repair does; empty where there is none."""


CLASSES = {
    "unreadable": Class("is no row that harness trains", "fail"),
    "unknown_tool": Class("calls a tool that its row does not offer", "fail"),
    "unpaired_result": Class("has a tool's result that answers no call", "fail"),
    "unanswered_call": Class("goes on before a call has its result", "fail"),
    "twin_ids": Class("gives two calls of one turn the same id", "fail"),
    "bad_schema": Class("offers a tool whose parameters are no valid JSON Schema for an object", "fail"),
    "twin_tools": Class("offers two tools of one name", "fail", "leaves out the second where both are the same"),
    "wrong_type": Class("calls with a value of another type than the schema's", "fail", 'writes "21" as 21 where the schema says integer'),
    "wrong_value": Class("calls with a value outside the schema's enum, range or pattern", "fail", "takes an enum's own spelling"),
    "null_argument": Class("calls with a null that the schema does not allow", "fail", "leaves the argument out where it may be"),
    "missing_argument": Class("calls without a required argument", "fail"),
    "extra_argument": Class("calls with an argument that the schema does not have", "fail", "leaves the argument out"),
    "call_in_words": Class("has a call as words of the assistant", "fail"),
    "control_token": Class("has a control token in its words", "fail", "puts a blank behind the token's first character"),
    "contamination": Class("asks what an evaluation suite asks", "fail"),
    "duplicate": Class("says the same as an earlier row", "drop"),
    "near_duplicate": Class("says almost the same as an earlier row", "keep"),
    "left_out": Class("is not to be imitated, as its layout itself says", "drop"),
}
ACTIONS = ("fail", "drop", "repair", "keep")
OF_CALLS = ("wrong_type", "wrong_value", "null_argument", "missing_argument", "extra_argument")
NO_ROW = ("unreadable", "unknown_tool", "unpaired_result", "left_out")
"""Of these rows nothing canonical is left that could be kept."""

CONTROL_TOKENS = re.compile(
    r"<\|[A-Za-z_][\w ]{0,40}\|>|<｜[^｜\n]{1,40}｜>|<(?:start|end)_of_turn>|</?tool_(?:call|response)>|<</?SYS>>"
    r"|\[/?(?:INST|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS)\]"
)
"""Of the model families in use, where no tokenizer says it exactly. Not </s>, which is HTML too."""
_CALL_IN_WORDS = re.compile(r"<tool_call>|<functioncall>|<\|python_tag\|>|\[TOOL_CALLS\]|<function=|<TOOLCALL>|functools\[")


@dataclass(frozen=True)
class Finding:
    kind: str
    where: str
    message: str


# ---- checked


def check_row(row: dict, pattern: re.Pattern = CONTROL_TOKENS) -> list[Finding]:
    """What is wrong in a canonical row by itself. pattern: finds control tokens."""
    found = []
    tools, messages, start = row.get("tools", []), row.get("messages", []), row.get("train_from", 0)
    names = Counter(tool["function"]["name"] for tool in tools)
    found += [Finding("twin_tools", "tools", f'"{name}" is offered {count} times') for name, count in names.items() if count > 1]
    for tool in tools:
        if problem := check_tool(tool):
            found.append(Finding("bad_schema", "tools", str(problem)))
    waiting: list = []
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        if message["role"] == "tool":
            waiting = waiting[1:]
            continue
        if waiting:
            found.append(Finding("unanswered_call", where, f"{len(waiting)} calls before it have no result"))
        waiting = list(message.get("tool_calls", ()))
        ids = Counter(call["id"] for call in waiting if "id" in call)
        found += [Finding("twin_ids", where, f'id "{identity}" stands {count} times') for identity, count in ids.items() if count > 1]
        if i >= start:
            for n, call in enumerate(waiting):
                called = ToolCall(call["function"]["name"], call["function"]["arguments"])
                problems = [problem for problem in problems_of(called, tools) if problem.kind in CLASSES]
                found += [Finding(problem.kind, f"{where}.tool_calls[{n}]", str(problem)) for problem in problems]
            if message["role"] == "assistant" and (call := _CALL_IN_WORDS.search(message.get("content", ""))):
                found.append(Finding("call_in_words", where, f"{call.group()} stands in the words, and no template writes it as a call"))
    in_words = {finding.where for finding in found if finding.kind == "call_in_words"}
    tokens = [(where, text, pattern.search(text)) for where, text in _words({**row, "tools": ()})]
    tokens += [("tools", "", _control_token_in(tool, pattern)) for tool in tools]
    for where, text, token in tokens:
        if token and not (where in in_words and _CALL_IN_WORDS.search(text)):
            found.append(Finding("control_token", where, f"{token.group()} would be read as the template's own"))
    return found


@once_for_each
def _control_token_in(tool: dict, pattern: re.Pattern) -> re.Match | None:
    return pattern.search(_text_of(tool["function"]))


def _words(row: dict) -> Iterator[tuple[str, str]]:
    """(where, text) of everything that a template writes of a row."""
    for i, message in enumerate(row.get("messages", ())):
        for key in ("content", "reasoning_content"):
            if message.get(key):
                yield f"messages[{i}]" + ("" if key == "content" else f".{key}"), message[key]
        for n, call in enumerate(message.get("tool_calls", ())):
            yield f"messages[{i}].tool_calls[{n}]", _text_of(call["function"]["arguments"])
    for tool in row.get("tools", ()):
        yield "tools", _text_of(tool["function"])
    for key in ("prompt", "completion", "text"):
        if isinstance(row.get(key), str):
            yield key, row[key]


def _text_of(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


# ---- repaired


def repair_row(row: dict, kinds: set[str], pattern: re.Pattern) -> tuple[dict, list[tuple[str, str, object, object]]]:
    """The row with what can be repaired of these classes, and (class, where, before, after) of each change. `row` is not written to."""
    changes: list[tuple[str, str, object, object]] = []
    if "twin_tools" in kinds and "tools" in row:
        kept = [tool for i, tool in enumerate(row["tools"]) if tool not in row["tools"][:i]]
        changes += [("twin_tools", "tools", tool, None) for i, tool in enumerate(row["tools"]) if tool in row["tools"][:i]]
        row = {**row, "tools": kept}
    if kinds & set(REPAIRABLE) and "messages" in row:
        messages = []
        for i, message in enumerate(row["messages"]):
            if i >= row.get("train_from", 0) and "tool_calls" in message:
                calls = []
                for n, call in enumerate(message["tool_calls"]):
                    called, done = _repair_call(call, row.get("tools", []), kinds)
                    calls.append(called)
                    changes += [
                        (repair.kind, f"messages[{i}].tool_calls[{n}] {repair.where}", repair.before, repair.after) for repair in done
                    ]
                message = {**message, "tool_calls": calls}
            messages.append(message)
        row = {**row, "messages": messages}
    if "control_token" in kinds:
        before = list(_words(row))
        row = _without_tokens(row, pattern)
        changes += [
            ("control_token", where, token.group(), f"{token.group()[0]} {token.group()[1:]}")
            for where, text in before
            for token in pattern.finditer(text)
        ]
    return row, changes


def _repair_call(call: dict, tools: list[dict], kinds: set[str]) -> tuple[dict, list[Repair]]:
    """As it was, unless a repair leaves nothing of these kinds and breaks nothing else (a schema may contradict itself)."""
    before = ToolCall(call["function"]["name"], call["function"]["arguments"])
    after, done = repair_call(before, tools, kinds)
    known = {(problem.kind, problem.where) for problem in problems_of(before, tools) if problem.kind not in kinds}
    if not done or not known >= {(problem.kind, problem.where) for problem in problems_of(after, tools)}:
        return call, []
    return {**call, "function": {"name": after.name, "arguments": after.arguments}}, done


def _without_tokens(value: object, pattern: re.Pattern) -> object:
    if isinstance(value, str):
        return pattern.sub(lambda token: f"{token.group()[0]} {token.group()[1:]}", value)
    if isinstance(value, list):
        return [_without_tokens(item, pattern) for item in value]
    if isinstance(value, dict):
        return {
            key: item if key in ("role", "id", "tool_call_id", "name") else _without_tokens(item, pattern) for key, item in value.items()
        }
    return value
