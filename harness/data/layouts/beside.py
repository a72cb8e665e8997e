"""What a publisher keeps in a file beside the rows and the rows need: BFCL's gold calls, Seal-Tools' tools."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from harness.data.layouts.benchmarks import BFCL
from harness.data.layouts.xlam import SEALTOOLS, Shelf
from harness.errors import DataError


def with_files_beside(file: Path, rows: Iterator[tuple[str, object]]) -> Iterator[tuple[str, object]]:
    """(location, row) as they come, with `ground_truth` or `tools` where their layout keeps them elsewhere. Other rows, and errors in
    the place of a row, pass as they are."""
    gold: dict | None = None
    shelf: Shelf | None = None
    for location, row in rows:
        if not isinstance(row, dict):
            pass
        elif BFCL.is_shown_by(row) and "ground_truth" not in row:
            gold = _gold(file) if gold is None else gold
            if row["id"] in gold:
                row = {**row, "ground_truth": gold[row["id"]]}
        elif SEALTOOLS.is_shown_by(row) and "tools" not in row:
            shelf = _shelf(file) if shelf is None else shelf
            row = {**row, "tools": shelf}
        yield location, row


def _gold(file: Path) -> dict:
    return _gold_in(*_as_it_is(file.parent / "possible_answer" / file.name))


def _shelf(file: Path) -> Shelf | None:
    return _shelf_in(*_as_it_is(file.parent / "tool.jsonl"))


def _as_it_is(file: Path) -> tuple[Path, int, int]:
    """For the caches below: a file that has changed since is read again."""
    found = file.stat() if file.is_file() else None
    return (file, found.st_mtime_ns, found.st_size) if found else (file, 0, 0)


@lru_cache(maxsize=4)
def _gold_in(file: Path, *_: int) -> dict:
    return {row["id"]: row["ground_truth"] for row in _lines(file, ("id", "ground_truth"))}


@lru_cache(maxsize=4)
def _shelf_in(file: Path, *_: int) -> Shelf | None:
    return Shelf(_lines(file, ("api_name", "parameters"))) or None


def _lines(file: Path, keys: tuple[str, ...]) -> list[dict]:
    """The rows of a JSON Lines file, none where there is no file. Raises DataError for a line that is not what it should be."""
    if not file.is_file():
        return []
    rows = []
    for number, line in enumerate(file.read_text(encoding="utf-8-sig").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{file}:{number}: not JSON ({error})") from None
        if not isinstance(row, dict) or not set(keys) <= row.keys():
            raise DataError(f"{file}:{number}: must be an object with {' and '.join(keys)}")
        rows.append(row)
    return rows
