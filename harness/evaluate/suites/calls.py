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
from harness.evaluate.suites import Loaded, Verdict, load_own
from harness.tools import ToolCall, check_call, judge_strictly, parse_calls

NEEDS = "answers"
NOTE = None


def load(paths: Sequence[Path], *, underscore_names: bool = False) -> Loaded:
    return load_own(paths, _item)


def _item(raw: dict) -> Item:
    named = raw.get("category")
    row = to_canonical({key: value for key, value in raw.items() if key != "category"})
    if "messages" not in row:
        raise DataError(f"a row of {' and '.join(row)}; must be a conversation that ends with the assistant")
    *asked, answer = row["messages"]
    gold = [ToolCall(call["function"]["name"], call["function"]["arguments"]) for call in answer.get("tool_calls", ())]
    category = named if isinstance(named, str) else "calls" if gold else "no_calls"
    return Item(content_digest(row), category, asked, row.get("tools", []), {"calls": gold})


def judge(item: Item, text: str) -> Verdict:
    said, gold = parse_calls(text), item.gold["calls"]
    failure, detail = judge_strictly(said, gold, item.tools, spoke=bool(said.text)) or (None, "")
    if not gold:
        return Verdict(failure, detail)
    valid = bool(said.calls) and not said.malformed and not any(check_call(call, item.tools) for call in said.calls)
    return Verdict(failure, detail, {"valid_schema": (int(valid), 1)})
