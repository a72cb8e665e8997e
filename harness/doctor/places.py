"""Folders: whether they can be written, what is free, and how fast they write."""

import os
import shutil
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from harness.doctor.check import Check
from harness.sizes import gib

AREA = "places"
WRITE_BYTES, CHUNK_BYTES, WRITE_S = 64 * 2**20, 4 * 2**20, 0.3
"""So much is written and flushed, or as much as goes within the time."""
SLOW_BYTES_PER_S = 50 * 2**20
"""At this a checkpoint of 15 GB takes five minutes."""
SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True)
class Place:
    name: str
    path: Path
    wanted_bytes: int
    """With less free it is a warning."""
    remedy: str


def check_place(place: Place) -> list[Check]:
    """A folder that is not there yet is judged by the nearest one above it, in which it will be made."""
    folder = next(each for each in (place.path.resolve(), *place.path.resolve().parents) if each.exists())
    shown = str(place.path) if folder == place.path.resolve() else f"{place.path} (to be made in {folder})"

    def found(level, what: str, remedy: str = place.remedy) -> list[Check]:
        return [Check(AREA, place.name, level, f"{shown}: {what}", remedy)]

    try:
        rate, free = write_rate(folder), shutil.disk_usage(folder).free
    except OSError as error:
        return found("fail", f"cannot be written: {error.strerror}")
    what = f"{gib(free)} free, writes {rate / 2**20:,.0f} MiB/s"
    if free < place.wanted_bytes:
        return found("warn", f"only {what}")
    if rate < SLOW_BYTES_PER_S:
        return found("warn", f"{what}, which is slow", place.remedy)
    return found("ok", what)


def write_rate(folder: Path) -> float:
    """Bytes per second of one file that is written and flushed; folders of one disk share a measurement, or they would slow one another.
    Raises OSError."""
    with tempfile.TemporaryFile(dir=folder):
        disk = folder.stat().st_dev
    with _RATES_LOCK:
        lock = _RATES.setdefault(disk, (threading.Lock(), []))
    with lock[0]:
        if not lock[1]:
            lock[1].append(_measure_rate(folder))
        return lock[1][0]


_RATES: dict[int, tuple[threading.Lock, list[float]]] = {}
_RATES_LOCK = threading.Lock()


def _measure_rate(folder: Path) -> float:
    chunk, written = os.urandom(CHUNK_BYTES), 0
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        begun = time.monotonic()
        while written < WRITE_BYTES and time.monotonic() - begun < WRITE_S:
            written += file.write(chunk)
            os.fdatasync(file.fileno())
        return written / (time.monotonic() - begun)


def check_shared_memory(folder: Path = SHARED_MEMORY, wanted_bytes: int = 2**30) -> list[Check]:
    """NCCL, data workers and DeepSpeed's gathers on a CPU talk through it; containers begin with 64 MiB, and then say "bus error"."""
    try:
        free = shutil.disk_usage(folder).free
    except OSError as error:
        return [Check(AREA, "shm", "warn", f"{folder}: {error.strerror}", "ranks and data workers need it")]
    remedy = "ranks of one machine talk through it; a container gets more by --shm-size=16g or --ipc=host"
    return [Check(AREA, "shm", "ok" if free >= wanted_bytes else "warn", f"{folder} (shared memory): {gib(free)} free", remedy)]


def temp_place() -> Place:
    return Place("temp folder", Path(tempfile.gettempdir()), 2**30, "another disk: TMPDIR=FOLDER")
