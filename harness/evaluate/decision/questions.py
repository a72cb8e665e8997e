"""Rows become items, each with the behaviour that it shows; and gold is judged before any model is.

An item's gold is {"calls": [{"name", "arguments"}], "turn": the assistant's message, "named": whether the row names its behaviour}.
Without a call it is right to call nothing and to say something; what is said is not compared.

Promises: a question that occurs twice with the same gold is one item; nothing that is asked stands among the tuning rows.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from harness.data.formats import detect_format, to_canonical
from harness.data.reading import read_raw
from harness.data.rows import SourceRow, content_digest
from harness.data.sources import LoadedRows, mix
from harness.errors import DataError
from harness.evaluate.items import Item
from harness.recipe.schema import Source
from harness.tools import ToolCall, check_call, match_calls

CALLS_NOTHING, PARALLEL = "calls nothing", "parallel calls"


def load_items(sources: Sequence[Source], seed: int, key: str) -> tuple[list[Item], int]:
    """(items in the order of the files, how many rows asked again what another had asked, with the same gold). `key`: of the recipe, for
    messages. Raises DataError where a row is no conversation that ends with the assistant."""
    rows = mix(sources, [_load(source, key) for source in sources], seed=seed).train if sources else []
    short = len({_short(row.location) for row in rows}) == len(rows)
    items, seen = [], {}
    for row in rows:
        digest = content_digest({**row.row, "behaviour": None})
        if digest not in seen:
            seen[digest] = items.append(_item(row, _short(row.location) if short else row.location))
    return items, len(rows) - len(items)


def _load(source: Source, key: str) -> LoadedRows:
    loaded = LoadedRows()
    for where, raw in read_raw(source.path, source.name, source.split):
        try:
            behaviour = raw.get("behaviour")
            if not (behaviour is None or isinstance(behaviour, str) and behaviour.strip()):
                raise DataError(f"behaviour is {json.dumps(behaviour)[:60]}; must be text that is not empty, or left out")
            row = to_canonical(raw, detect_format(raw) if source.format == "auto" else source.format)
            if "messages" not in row:
                raise DataError(f"{key} has a row of {' and '.join(row)}; must be a conversation that ends with the assistant")
        except DataError as error:
            raise DataError(f"{where}: {error}") from None
        loaded.rows.append(SourceRow(where, row | ({"behaviour": behaviour.strip()} if behaviour else {})))
    if not loaded.rows:
        raise DataError(f"{source.path}: holds no row; {key} cannot be empty")
    return loaded


def _short(location: str) -> str:
    return Path(location).name


def _item(row: SourceRow, id: str) -> Item:
    *asked, turn = row.row["messages"]
    calls = [{"name": call["function"]["name"], "arguments": call["function"]["arguments"]} for call in turn.get("tool_calls", ())]
    named = row.row.get("behaviour")
    behaviour = named or (PARALLEL if len(calls) > 1 else calls[0]["name"] if calls else CALLS_NOTHING)
    return Item(id, behaviour, asked, row.row.get("tools", []), {"calls": calls, "turn": turn, "named": named is not None})


def pool_rare(items: Sequence[Item], least: int) -> list[Item]:
    """The items, in their order; of behaviours that are tools' names for want of a better one, those with fewer than `least` items are one
    together: public sets have a tool for every row, and nothing could be shown of any."""
    counts = Counter(item.category for item in items)
    rare = {
        item.category
        for item in items
        if not item.gold["named"] and item.category not in (PARALLEL, CALLS_NOTHING) and counts[item.category] < least
    }
    if len(rare) < 2:
        return list(items)
    pool = f"{len(rare)} tools with few items"
    return [replace(item, category=pool) if item.category in rare and not item.gold["named"] else item for item in items]


def gold_calls(item: Item) -> list[ToolCall]:
    return [ToolCall(call["name"], call["arguments"]) for call in item.gold["calls"]]


def asked_words(item: Item) -> str:
    """The user's last words."""
    return next((message["content"] for message in reversed(item.messages) if message["role"] == "user"), "")


def question_digest(item: Item) -> str:
    return content_digest({"messages": item.messages, "tools": item.tools})


def check_apart(items: Sequence[Item], tuning: Sequence[Item]) -> None:
    """Raises DataError where a tuning row asks what an item asks: an example would be the answer."""
    asked = {question_digest(item): item.id for item in items}
    shared = [(item.id, asked[question_digest(item)]) for item in tuning if question_digest(item) in asked]
    if shared:
        raise DataError(
            f"tuning: {len(shared)} of {len(tuning)} rows ask what an item asks (such as {shared[0][0]} and {shared[0][1]}), so that "
            "examples would hold the answers; take them out of one of the two"
        )


def find_faults(items: Sequence[Item]) -> dict[str, str]:
    """Item id -> what is wrong with its gold: it breaks its own tool's schema, or the same question has another gold elsewhere."""
    faults: dict[str, str] = {}
    first: dict[str, Item] = {}
    for item in items:
        problems = [problem for call in gold_calls(item) for problem in check_call(call, item.tools)]
        if problems:
            faults[item.id] = f"gold breaks its tool's schema: {problems[0]}"
        other = first.setdefault(question_digest(item), item)
        if other is not item and not match_calls(gold_calls(item), gold_calls(other)).exact:
            for one, against in ((item, other), (other, item)):
                faults.setdefault(one.id, f"gold contradicts {against.id}, which asks the same")
    return faults
