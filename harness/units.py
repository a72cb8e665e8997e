"""Work in units, each a file that is there and whole or not there: who does which, and how a file gets its name.

A unit counts once it has its name. Whoever is killed loses the unit that was being done; any number of workers, on any machines, may do the
rest, and the same command goes on. Two who do the same unit do no harm, because they write the same bytes.
"""

import contextlib
import json
import os
import random
import secrets
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TextIO

from harness.errors import HarnessError, Stopped


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


def each_missing(worker: Worker, units: int, missing: Callable[[], set[int]], stop: Callable[[], str | None]) -> Iterator[int]:
    """The units that nobody has done by the time that it is their turn. Raises Stopped where `stop` gives a reason between two of them."""
    for unit in worker.order(units):
        left = missing()
        if left and (reason := stop()):
            raise Stopped(
                f"stopped ({reason}): {units - len(left)} of {units} units are there; the same command goes on, with any number of workers"
            )
        if unit in left:
            yield unit


def claim(header: Path, facts: dict, *, verb: str, whose: str, option: str, error: type[HarnessError]) -> None:
    """Make the header's folder one of these facts, or find that it is. whose: facts these are. option: what chooses the folder.

    Raises `error` when the folder is another's, because results of both would be mixed.
    """
    folder = header.parent
    folder.mkdir(parents=True, exist_ok=True)
    if not header.is_file():
        foreign = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
        # Another worker may have been here in between.
        if foreign and not header.is_file():
            raise error(f"{folder}: holds what is not of `harness {verb}` ({', '.join(foreign[:3])}); choose another {option}")
        with committing(header) as stream:
            stream.write(json.dumps(facts, indent=1) + "\n")
    there = json.loads(header.read_text())
    for name in {**facts, **there}:
        if facts.get(name) != there.get(name):
            # Not taken over even where nothing is done yet: whoever began it may be at its first unit.
            answered = any(entry != header and not entry.name.startswith(".") for entry in folder.rglob("*") if entry.is_file())
            remedy = f"choose another {option}"
            if not answered:
                remedy += f", or, as nothing is answered there yet: rm -r {folder}"
            raise error(
                f"{header}: {name} is {there.get(name)!r}, and of {whose} {facts.get(name)!r}; answers of both would be mixed; {remedy}"
            )


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
