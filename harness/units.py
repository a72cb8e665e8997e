"""Work in units, each a file that is there and whole or not there: who does which, and how a file gets its name.

A unit counts once it has its name. Whoever is killed loses the unit that was being done; any number of workers, on any machines, may do the
rest, and the same command goes on. Two who do the same unit do no harm, because they write the same bytes.
"""

import contextlib
import os
import random
import secrets
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TextIO


@dataclass(frozen=True)
class Worker:
    """Which part of the units is this process's, or this group's of ranks."""

    index: int = 0
    count: int = 1

    def order(self, units: int) -> list[int]:
        """All units: its own first, and then those of others in an order of its own, in which workers that help seldom meet."""
        own = range(self.index, units, self.count)
        rest = sorted(set(range(units)) - set(own))
        random.Random(self.index).shuffle(rest)
        return [*own, *rest]


def missing_units(folder: Path, name: str, units: int) -> set[int]:
    """Numbers of the units that have no file. name: of a unit's file, with a place for its number."""
    there = set(os.listdir(folder)) if folder.is_dir() else set()
    return {unit for unit in range(units) if name.format(unit) not in there}


# ---- commits


def temporary_name(path: Path) -> Path:
    """Where to write what shall become `path`."""
    # On a shared disk two machines, or two containers of one, may have the same process id.
    return path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.{secrets.token_hex(4)}.tmp")


def flush(stream: IO) -> None:
    """Wait until what was written is on the disk."""
    stream.flush()
    os.fsync(stream.fileno())


def publish(temporary: Path, path: Path) -> None:
    """Give a flushed file its name, and wait until the name is on the disk. Leftovers of killed writers of the same file go."""
    try:
        os.rename(temporary, path)
    except FileNotFoundError:
        # Another writer of the same was faster, and took this file for a leftover.
        if not path.exists():
            raise
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    for leftover in path.parent.glob(f".{path.name}.*.tmp"):
        leftover.unlink(missing_ok=True)


@contextlib.contextmanager
def committing(path: Path) -> Iterator[TextIO]:
    """A text file that gets its name when the block ends well, and of which nothing stays when it does not. Writers on several machines may
    write the same file at the same time."""
    temporary = temporary_name(path)
    try:
        with open(temporary, "w", encoding="utf-8") as stream:
            yield stream
            flush(stream)
        publish(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
