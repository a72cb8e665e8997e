"""Held-out loss: nats per trained token of rows of one's own, in any layout that is trained. The model reads, and writes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from harness.data.formats import to_canonical
from harness.data.sources import content_digest, read_raw
from harness.errors import DataError
from harness.evaluate.items import Item
from harness.evaluate.suites import Loaded

NEEDS = "loss"
NOTE = None


def load(paths: Sequence[Path], *, underscore_names: bool = False) -> Loaded:
    found: dict[str, Item] = {}
    repeated = 0
    for path in paths:
        for where, raw in read_raw(path):
            try:
                row = to_canonical(raw)
            except DataError as error:
                raise DataError(f"{where}: {error}") from None
            id = content_digest(row)
            repeated += id in found
            found.setdefault(id, Item(id, "held_out", row.get("messages", []), row.get("tools", []), {"row": row}))
    return Loaded(list(found.values()), list(paths), {"the same row again": repeated} if repeated else {})
