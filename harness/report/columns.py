"""metrics.jsonl as columns of numbers: a run of millions of lines fits into memory, and a file that grows is read on from where it ended.

A line counts once its newline is there. A torn one (a life was killed while it wrote), and one that is no line of a run, is counted and
left out. A value that is not finite is no number of its column; it is kept by name (`not_finite`).
"""

import json
import math
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


class Columns:
    """steps, times: of every line. values: key -> (numbers of its lines, its values)."""

    def __init__(self, path: Path):
        self.path = path
        self._clear()

    def _clear(self) -> None:
        self.steps, self.times = array("q"), array("d")
        self.values: dict[str, tuple[array, array]] = {}
        self.not_finite: list[tuple[int, str, str]] = []
        """(number of the line, key, how it was written)."""
        self.torn = 0
        self._read_bytes = 0

    def __len__(self) -> int:
        return len(self.steps)

    def read_on(self) -> bool:
        """Take in what was written since the last time; whether that is anything. A file that has shrunk is another run's, begun anew."""
        try:
            with open(self.path, "rb") as file:
                if file.seek(0, 2) < self._read_bytes:
                    self._clear()
                file.seek(self._read_bytes)
                before = self._read_bytes
                for line in self._whole_lines(file):
                    self._add(line)
        except FileNotFoundError:
            had = self._read_bytes > 0
            self._clear()
            return had
        return self._read_bytes > before

    def _whole_lines(self, file: BinaryIO) -> Iterator[bytes]:
        for line in file:
            if not line.endswith(b"\n"):
                return
            self._read_bytes += len(line)
            yield line

    def _add(self, written: bytes) -> None:
        try:
            line = json.loads(written)
            step, moment = line["step"], float(line["time"])
            if not (isinstance(step, int) and abs(step) < 2**62 and math.isfinite(moment)):
                raise ValueError
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
            self.torn += bool(written.strip())
            return
        row = len(self.steps)
        self.steps.append(step)
        self.times.append(moment)
        for key, value in line.items():
            if "/" in key and isinstance(value, int | float) and not isinstance(value, bool):
                self._add_value(row, key, value)
        named = line.get("non_finite")
        for word in named.split() if isinstance(named, str) else ():
            key, _, value = word.rpartition("=")
            self.not_finite.append((row, key, value))

    def _add_value(self, row: int, key: str, value: float) -> None:
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            self.not_finite.append((row, key, str(number)))
            return
        if key not in self.values:
            self.values[key] = array("q"), array("d")
        rows, values = self.values[key]
        rows.append(row)
        values.append(number)

    def of(self, key: str) -> Iterator[tuple[int, float]]:
        """(number of the line, value), in the order of the file."""
        return zip(*self.values.get(key, ((), ())), strict=True)
