"""Held-out loss: nats per trained token of rows of one's own, in any layout that is trained. The model reads, and writes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from harness.data.formats import to_canonical
from harness.data.rows import content_digest
from harness.evaluate.items import Item
from harness.evaluate.suites import Loaded, load_own

NEEDS = "loss"
NOTE = None


def load(paths: Sequence[Path], *, underscore_names: bool = False) -> Loaded:
    return load_own(paths, _item)


def _item(raw: dict) -> Item:
    row = to_canonical(raw)
    return Item(content_digest(row), "held_out", row.get("messages", []), row.get("tools", []), {"row": row})
