"""Conversations of one's own: the last turn is the right answer, everything before it the question; scored by the one scorer.

Rows of any layout that is trained and ends with the assistant. The category is the row's own key "category" where it has one, else `calls`
or `no_calls` by what the right answer is.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from harness.data.formats import to_canonical
from harness.data.rows import content_digest
from harness.errors import DataError
from harness.evaluate.items import Item
from harness.evaluate.suites import Loaded, Verdict, load_own, with_underscores
from harness.tools import ToolCall, check_call, judge_strictly, parse_calls

NEEDS = "answers"
NOTE = None


def load(paths: Sequence[Path], *, underscore_names: bool = False) -> Loaded:
    return load_own(paths, lambda raw: _item(raw, underscore_names))


def _item(raw: dict, underscore_names: bool) -> Item:
    named = raw.get("category")
    row = to_canonical({key: value for key, value in raw.items() if key != "category"})
    if "messages" not in row:
        raise DataError(f"a row of {' and '.join(row)}; must be a conversation that ends with the assistant")
    shown = {**row, "messages": [_underscored(message) for message in row["messages"]]} if underscore_names else row
    *asked, answer = shown["messages"]
    tools = with_underscores(row.get("tools", [])) if underscore_names else row.get("tools", [])
    gold = [ToolCall(call["function"]["name"], call["function"]["arguments"]) for call in answer.get("tool_calls", ())]
    category = named if isinstance(named, str) else "calls" if gold else "no_calls"
    return Item(content_digest(row), category, asked, tools, {"calls": gold})


def _underscored(message: dict) -> dict:
    changed = {"tool_calls": with_underscores(message["tool_calls"])} if "tool_calls" in message else {}
    if message["role"] == "tool" and "name" in message:
        changed["name"] = message["name"].replace(".", "_")
    return message | changed


def judge(item: Item, text: str) -> Verdict:
    said, gold = parse_calls(text), item.gold["calls"]
    failure, detail = judge_strictly(said, gold, item.tools, spoke=bool(said.text)) or (None, "")
    if not gold:
        return Verdict(failure, detail)
    valid = bool(said.calls) and not said.malformed and not any(check_call(call, item.tools) for call in said.calls)
    return Verdict(failure, detail, {"valid_schema": (int(valid), 1)})
