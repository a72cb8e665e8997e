"""ledger.jsonl: what happened to a run over all its lives, one JSON object for each event.

    {"time": 1760000000.0, "attempt": 2, "event": "committed", "step": 300, "reason": "interval", "bytes": 412, "save_s": 1.2}

`attempt` is the life (logs/attempt-K) that wrote the line, null for a command that is none. One process writes at a time: rank 0, or while
no ranks live the command that holds the run folder. A number that is not finite is a string ("NaN", "Infinity"), because JSON has none.

The promise: an event that `append` has confirmed is on the disk, and a line counts once its newline is there. A writer may be killed
within a line: readers leave such an end out, and the next event is written in its place.
"""

import json
import logging
import os
import time
from pathlib import Path
from typing import Any

from harness.checkpoint.manifest import flush
from harness.errors import CheckpointError

logger = logging.getLogger(__name__)


class Ledger:
    """Appends to a run's ledger. `attempt` is the number of the life that writes."""

    def __init__(self, path: Path, attempt: int | None):
        self.path, self.attempt = path, attempt
        self._waiting: list[str] = []

    def append(self, event: str, **facts: Any) -> bool:
        """Write one event and wait until it is on the disk. False when the disk does not take it, which must not end a training.

        It is then kept, and written before the next one: a full disk is the very thing that the ledger should tell of.
        """
        line = {"time": round(time.time(), 3), "attempt": self.attempt, "event": event, **facts}
        self._waiting.append(_render(line))
        try:
            self._write("".join(self._waiting).encode())
        except OSError as error:
            logger.warning("%s: cannot be written (%s); kept until it can: %s", self.path, error.strerror, line)
            return False
        self._waiting.clear()
        return True

    def _write(self, data: bytes) -> None:
        is_new = not self.path.exists()
        with open(self.path, "ab+", buffering=0) as file:
            start = _end_of_whole_lines(file)
            file.truncate(start)
            try:
                while data:
                    data = data[file.write(data) :]
                os.fsync(file.fileno())
            except OSError:
                # What was written of it is written again later.
                file.truncate(start)
                raise
        if is_new:
            flush(self.path.parent)


def _render(line: dict) -> str:
    return json.dumps(json.loads(json.dumps(line), parse_constant=str)) + "\n"


def _end_of_whole_lines(file) -> int:
    """The position behind the last newline, read from the end backwards: a ledger of months is long."""
    position = file.seek(0, os.SEEK_END)
    while position > 0:
        begin = max(0, position - 4096)
        file.seek(begin)
        block = file.read(position - begin)
        if b"\n" in block:
            return begin + block.rindex(b"\n") + 1
        position = begin
    return 0


def read_ledger(path: Path) -> list[dict]:
    """All events in the order in which they happened; none where there is no ledger yet.

    Raises CheckpointError for a line that is not an event: to leave out a rollback, or a commit, would make the run another one.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    events = []
    for number, line in enumerate(data.split(b"\n")[:-1], start=1):
        try:
            event = json.loads(line)
            event["event"], event["time"]
        except (ValueError, TypeError, KeyError):
            raise CheckpointError(
                f"{path}:{number}: is not an event of a run: {line[:60]!r}; the file was altered: mend the line, or take it out"
            ) from None
        events.append(event)
    return events
