"""Rows that say the same as others: near duplicates within the data, and questions of an evaluation suite in it.

Near duplicates are found by MinHash (Broder 1997) over runs of 3 words, 128 hashes in 32 bands of 4: of pairs that share 80 % of their runs
every one is met (1 in 10^7 is missed), and the share, an estimate, is true to about 7 points (two standard deviations). 512 bytes a row.

A suite's question is in a row when any text of the row repeats it by the rule of overlap.py, which says why it is that rule.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator

from harness.data.formats import to_canonical
from harness.data.overlap import Overlap, normalise
from harness.data.sources import read_each
from harness.errors import DataError

NEAR = 0.8
_SHINGLE, _HASHES, _BANDS = 3, 128, 32


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


# ---- near duplicates


class NearDuplicates:
    def __init__(self):
        import numpy as np

        random = np.random.default_rng(20240607)
        self._factors = random.integers(1, 2**31, _HASHES, dtype=np.uint64) | np.uint64(1)
        self._terms = random.integers(0, 2**31, _HASHES, dtype=np.uint64)
        self._signatures, self._rows = [], []

    def add(self, number: int, location: str, row: dict) -> None:
        """Rows of fewer than 3 words are like too many others."""
        import numpy as np

        parts = [word for text in said_in(row) for word in normalise(text)]
        if len(parts) < _SHINGLE:
            return
        hashes = {
            zlib.crc32(" ".join(run).encode("utf-8", "surrogatepass")) for run in zip(*(parts[n:] for n in range(_SHINGLE)), strict=False)
        }
        values = np.fromiter(hashes, np.uint64, len(hashes))
        signature = np.full(_HASHES, 2**32 - 1, np.uint32)
        for some in np.array_split(values, 1 + len(values) // 4096):  # a 200 KB result must not cost 30 MB here
            mixed = ((some[:, None] * self._factors + self._terms) % np.uint64(2305843009213693951)) >> np.uint64(29)
            np.minimum(signature, mixed.min(axis=0).astype(np.uint32), out=signature)
        self._signatures.append(signature)
        self._rows.append((number, location))

    def found(self) -> Iterator[tuple[int, str, tuple[str, float]]]:
        """(number, location, (location of the earlier row, share)), in the order of the rows."""
        import numpy as np

        if len(self._rows) < 2:
            return
        signatures, twins = np.stack(self._signatures), {}
        for band in np.split(signatures, _BANDS, axis=1):
            keys = np.ascontiguousarray(band).view([("", band.dtype)] * band.shape[1]).ravel()
            order = np.argsort(keys, kind="stable")
            starts = np.flatnonzero(np.r_[True, keys[order][1:] != keys[order][:-1]])
            for group in np.split(order, starts[1:]):
                for other in group[1:]:  # against the first of its bucket: a set of a thousand alike costs a thousand, not a million
                    share = float(np.mean(signatures[group[0]] == signatures[other]))
                    if share >= NEAR and share > twins.get(int(other), (0, 0.0))[1]:
                        twins[int(other)] = (int(group[0]), share)
        for other in sorted(twins):
            first, share = twins[other]
            yield *self._rows[other], (self._rows[first][1], share)


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
