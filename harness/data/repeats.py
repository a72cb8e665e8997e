"""Rows that say the same as others: near duplicates within the data, and questions of an evaluation suite in it.

Near duplicates are found by MinHash (Broder 1997) over runs of 3 words, 128 hashes in 32 bands of 4: of pairs that share 80 % of their runs
every one is met (1 in 10^7 is missed), and the share, an estimate, is true to about 7 points (two standard deviations). The hashes,
512 bytes a row, lie in a nameless file in $TMPDIR; memory holds 20 bytes a row, and 50 more while they are compared, a band at a time.

A suite's question is in a row when any text of the row repeats it by the rule of overlap.py, which says why it is that rule.
"""

from __future__ import annotations

import os
import tempfile
import zlib
from array import array
from collections.abc import Iterable, Iterator
from functools import cache
from typing import TYPE_CHECKING

from harness.data.formats import to_canonical
from harness.data.overlap import Overlap, normalise
from harness.data.reading import read_each
from harness.data.rows import room_for_rows
from harness.errors import DataError

if TYPE_CHECKING:
    import numpy as np

NEAR = 0.8
_SHINGLE, _HASHES, _BANDS = 3, 128, 32
_BYTES, _BAND_BYTES = 4 * _HASHES, 4 * _HASHES // _BANDS
_AT_ONCE = 8192  # rows whose hashes stand in memory


def said_in(row: dict) -> Iterator[str]:
    """The texts of a row: messages without system prompts, which many rows share, and what is called; no tools."""
    for message in row.get("messages", ()):
        if message["role"] != "system" and message.get("content"):
            yield message["content"]
        for call in message.get("tool_calls", ()):
            yield f"{call['function']['name']} {call['function']['arguments']}"
    for key in ("prompt", "completion", "text"):
        if isinstance(row.get(key), str):
            yield row[key]


def first_alike(keys: np.ndarray) -> np.ndarray:
    """Of each key the place of the first that is the same."""
    import numpy as np

    order = np.argsort(keys, kind="stable")
    of_order = keys[order]
    starts = np.flatnonzero(np.r_[np.ones(min(1, len(keys)), bool), of_order[1:] != of_order[:-1]])
    first = np.empty(len(keys), np.int64)
    first[order] = np.repeat(order[starts], np.diff(np.r_[starts, len(keys)]))
    return first


# ---- near duplicates


@cache
def _mixers() -> tuple[np.ndarray, np.ndarray]:
    import numpy as np

    random = np.random.default_rng(20240607)
    factors = random.integers(1, 2**31, _HASHES, dtype=np.uint64) | np.uint64(1)
    return factors, random.integers(0, 2**31, _HASHES, dtype=np.uint64)


def signature_of(row: dict) -> bytes | None:
    """The hashes of a row; None where it has fewer than 3 words, which are like too many others."""
    import numpy as np

    parts = [word for text in said_in(row) for word in normalise(text)]
    if len(parts) < _SHINGLE:
        return None
    runs = zip(*(parts[n:] for n in range(_SHINGLE)), strict=False)
    hashes = {zlib.crc32(" ".join(run).encode("utf-8", "surrogatepass")) for run in runs}
    values, (factors, terms) = np.fromiter(hashes, np.uint64, len(hashes)), _mixers()
    signature = np.full(_HASHES, 2**32 - 1, np.uint32)
    for start in range(0, len(values), 4096):  # a 200 KB result must not cost 30 MB here
        mixed = ((values[start : start + 4096, None] * factors + terms) % np.uint64(2305843009213693951)) >> np.uint64(29)
        np.minimum(signature, mixed.min(axis=0).astype(np.uint32), out=signature)
    return signature.tobytes()


class NearDuplicates:
    def __init__(self):
        self._numbers = array("q")
        self._file = tempfile.TemporaryFile(prefix="harness-signatures-")  # noqa: SIM115, it lives as long as this

    def add(self, number: int, signature: bytes) -> None:
        self._numbers.append(number)
        with room_for_rows():
            self._file.write(signature)

    def found(self, besides: np.ndarray | None = None) -> Iterator[tuple[int, int, float]]:
        """(number, number of the earlier row, share), in the order of the rows. besides: numbers of rows that are left out."""
        import numpy as np

        with room_for_rows():
            self._file.flush()
        numbers = np.frombuffer(self._numbers, np.int64) if self._numbers else np.zeros(0, np.int64)
        own = np.flatnonzero(~np.isin(numbers, [] if besides is None else besides))
        twins, shares = np.full(len(numbers), -1, np.int64), np.zeros(len(numbers), np.int16)
        for band in range(_BANDS):
            # Against the first of its bucket: a set of a thousand alike costs a thousand, not a million.
            first = own[first_alike(self._keys(band)[own])]
            wanted = (first != own) & (twins[own] != first)
            pairs = np.stack([first[wanted], own[wanted]])
            for start in range(0, pairs.shape[1], _AT_ONCE):
                firsts, others = pairs[:, start : start + _AT_ONCE]
                # Mapped anew each time, or what was looked at once would stay.
                signatures = np.memmap(self._file, np.uint32, "r", shape=(len(numbers), _HASHES))
                alike = (signatures[firsts] == signatures[others]).sum(axis=1, dtype=np.int16)
                better = (alike >= NEAR * _HASHES) & (alike > shares[others])
                twins[others[better]], shares[others[better]] = firsts[better], alike[better]
        for other in np.flatnonzero(twins >= 0):
            yield int(numbers[other]), int(numbers[twins[other]]), int(shares[other]) / _HASHES

    def _keys(self, band: int) -> np.ndarray:
        import numpy as np

        keys, rows = np.empty(len(self._numbers), f"S{_BAND_BYTES}"), _AT_ONCE
        for start in range(0, len(keys), rows):
            block = np.frombuffer(os.pread(self._file.fileno(), rows * _BYTES, start * _BYTES), f"S{_BAND_BYTES}")
            keys[start : start + rows] = block.reshape(-1, _BANDS)[:, band]
        return keys


# ---- evaluation suites


class Suites:
    """Questions that must not be trained. `unread`: rows of the suites that hold none that could be looked for."""

    def __init__(self, files: Iterable):
        """files: paths, or what has path, name and split as a recipe's source has them. Raises DataError for a path that holds no question:
        it would keep nothing out."""
        self._overlap, self._asked = Overlap(), 0
        self.unread: list[str] = []
        for file in files:
            before = len(self)
            for location, raw in read_each(file) if isinstance(file, str) else read_each(file.path, file.name, file.split):
                try:
                    if isinstance(raw, DataError):
                        raise raw
                    self.add(location, to_canonical(raw, asks=_asks(raw)))
                except DataError as error:
                    self.unread.append(f"{location}: {error}")
            if isinstance(file, str) and len(self) == before:
                why = f"; the first row that could not be read is {self.unread[0]}" if self.unread else ""
                raise DataError(f"--against {file}: holds no question that could be looked for{why}")

    def __len__(self) -> int:
        return self._asked

    def add(self, location: str, row: dict) -> None:
        asked = _question_of(row)
        if asked.strip():
            self._asked += 1
            self._overlap.add(asked, f"the question at {location}")

    def find(self, row: dict) -> str | None:
        """How a text of the row repeats a question, in words; None where none does."""
        return next((found for text in (_question_of(row), *said_in(row)) if text and (found := self._overlap.find(text))), None)


def _asks(raw: dict) -> bool:
    return "text" not in raw or "question_id" in raw


def _question_of(row: dict) -> str:
    """What the user says; of a text or a prompt all."""
    if "messages" in row:
        return "\n".join(message["content"] for message in row["messages"] if message["role"] == "user")
    return row.get("prompt") or row.get("text", "")
