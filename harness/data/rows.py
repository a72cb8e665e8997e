"""Canonical rows with the places they come from, as many as there are, in little memory.

    SourceRow(location, row)    one row
    Rows                        rows that are appended and read by their number; they lie in a file, not in memory
    Picked                      some of the rows of other sequences, in any order, any number of times
    Places                      locations alone, by the number of their row

The file is a nameless one in $TMPDIR (or /tmp) that goes with the process, however it ends, as large as the rows are as JSON. Memory holds
8 bytes for each row of either kind. A row that is read is a new object each time: writing to it changes nothing.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import tempfile
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING

from harness.errors import DataError

if TYPE_CHECKING:
    import numpy as np


class SourceRow:
    """`row` is canonical: read it, do not write to it. Give it, or the JSON text that it is."""

    def __init__(self, location: str, row: dict | None = None, text: bytes | None = None):
        self.location = location
        if row is not None:
            self.row = row
        if text is not None:
            self.text = text

    @cached_property
    def row(self) -> dict:
        return json.loads(self.text.decode("utf-8", "surrogatepass"))

    @cached_property
    def text(self) -> bytes:
        return json_bytes(self.row)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SourceRow) and (self.location, self.row) == (other.location, other.row)

    def __repr__(self) -> str:
        return f"SourceRow({self.location!r}, {self.row!r})"

    def __reduce__(self) -> tuple:
        return SourceRow, (self.location, None, self.text)


class Rows(Sequence):
    def __init__(self, rows: Iterable[SourceRow] = ()):
        self._file = tempfile.TemporaryFile(prefix="harness-rows-")  # noqa: SIM115, it lives as long as the rows
        self._starts = array("Q", [0])
        for row in rows:
            self.append(row)

    def append(self, row: SourceRow) -> None:
        location = row.location.encode("utf-8", "surrogateescape")
        record = len(location).to_bytes(4, "little") + location + row.text
        with room_for_rows():
            self._file.write(record)
        self._starts.append(self._starts[-1] + len(record))

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, which: int | slice) -> SourceRow | list[SourceRow]:
        if isinstance(which, slice):
            return [self[i] for i in range(*which.indices(len(self)))]
        i = range(len(self))[which]
        with room_for_rows():
            self._file.flush()
        record = os.pread(self._file.fileno(), self._starts[i + 1] - self._starts[i], self._starts[i])
        end = 4 + int.from_bytes(record[:4], "little")
        return SourceRow(record[4:end].decode("utf-8", "surrogateescape"), text=record[end:])


class Picked(Sequence):
    """places: numbers of rows in the sequences laid end to end; left out: all."""

    def __init__(self, parts: Sequence[Sequence[SourceRow]], places: Sequence[int] | None = None):
        self._parts, self._ends = parts, list(accumulate(map(len, parts)))
        self._places = range(self._ends[-1] if parts else 0) if places is None else places

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, which: int | slice) -> SourceRow | list[SourceRow]:
        if isinstance(which, slice):
            return [self._at(int(place)) for place in self._places[which]]
        return self._at(int(self._places[which]))

    def __iter__(self) -> Iterator[SourceRow]:
        return (self._at(int(place)) for place in self._places)

    def _at(self, place: int) -> SourceRow:
        part = next(i for i, end in enumerate(self._ends) if place < end)
        return self._parts[part][place - (self._ends[part - 1] if part else 0)]


class Places:
    """Locations in the order of the rows. Neighbours, whose numbers follow each other, take no memory."""

    def __init__(self):
        self._count, self._following = 0, ("", 0)
        self._firsts: list[int] = []
        self._runs: list[tuple[str, int]] = []

    def append(self, location: str) -> None:
        head = location.rstrip("0123456789")
        place = (head, int(location[len(head) :]))
        if place != self._following:
            self._firsts.append(self._count)
            self._runs.append(place)
        self._count, self._following = self._count + 1, (head, place[1] + 1)

    def __getitem__(self, number: int) -> str:
        run = bisect_right(self._firsts, number) - 1
        head, first = self._runs[run]
        return f"{head}{first + number - self._firsts[run]}"


class room_for_rows:
    """A full disk is an error that says which."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DataError(
                f"{tempfile.gettempdir()}: {error.strerror} while rows were read, which lie there meanwhile; free some, or set TMPDIR to "
                "another folder"
            ) from error


# ---- what rows say


def content_digest(row: dict) -> str:
    """What a row says, in 32 hex digits. Not the order of its keys: rows that differ in that alone are duplicates, and must not leak."""
    return hashlib.sha256(json_bytes(row, sort_keys=True)).hexdigest()[:32]


def content_digests(rows: Iterable[SourceRow], part_of: Callable[[dict], dict] = lambda row: row) -> np.ndarray:
    """`content_digest` of (a part of) every row, 16 bytes each, as NumPy's S16."""
    import numpy as np

    digests = bytearray()
    for row in rows:
        digests += bytes.fromhex(content_digest(part_of(row.row)))
    return np.frombuffer(bytes(digests), "S16")


def data_fingerprint(rows: Iterable[SourceRow]) -> str:
    """The rows in their order, in 32 hex digits. The order of keys counts here: templates write it into the tokens."""
    total = hashlib.sha256()
    for row in rows:
        total.update(hashlib.sha256(row.text).digest())
    return total.hexdigest()[:32]


def json_bytes(row: dict, sort_keys: bool = False) -> bytes:
    return json.dumps(row, sort_keys=sort_keys, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")
