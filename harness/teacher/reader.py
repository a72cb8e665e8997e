"""Reading a teacher cache: the targets of any samples, by their keys, in any order and on any number of ranks.

Opening checks header, index and footer of every unit. What stays in memory is 24 bytes a sample, which forked workers share: its key,
sorted, its unit and its place in the unit's index. The rest is read where it lies, and a block's checksum is proven with every read.
One cache serves threads and forked processes alike; pickled, it is opened anew.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import xxhash

from harness.errors import TeacherError
from harness.teacher.format import (
    FOOTER,
    FOOTER_BYTES,
    KEY_BYTES,
    MAGIC,
    RECORD,
    START,
    UNIT_FILE,
    VERSION,
    CacheHeader,
    Targets,
    check_same,
    decode_blocks,
    load_header,
)

if TYPE_CHECKING:
    from harness.teacher.samples import Sample

MOST_MAPPED = 256
"""Units that are mapped at once: each holds a file descriptor, of which a process often has no more than 1,024."""
AGAIN = "remove the file and run `harness capture RECIPE` again, which makes that unit anew"
RECORDS = np.dtype([("key", f"S{KEY_BYTES}"), ("offset", "<u8"), ("bytes", "<u4"), ("positions", "<u4"), ("check", "<u8")])


@dataclass(frozen=True)
class Unit:
    """A whole unit of a cache."""

    path: Path
    number: int
    bytes: int
    index_offset: int
    records: np.ndarray
    """The index: RECORDS [samples]."""


class TeacherCache:
    """Made by open_cache."""

    def __init__(self, folder: Path, header: CacheHeader, units: list[Unit]):
        self.folder, self.header = folder, header
        self.units = tuple(unit.number for unit in units)
        """Those that are there, of plan.units."""
        self.bytes = sum(unit.bytes for unit in units)
        """Of all units on the disk."""
        self.positions = sum(int(unit.records["positions"].sum(dtype=np.int64)) for unit in units)
        """Trained tokens that have targets."""
        sizes = [len(unit.records) for unit in units]
        keys = np.concatenate([np.empty(0, RECORDS["key"]), *(unit.records["key"] for unit in units)])
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        # A sample may stand in two units; the first serves as well as the second.
        is_first = np.append(True, keys[1:] != keys[:-1])[: len(keys)]
        self._keys, order = keys[is_first], order[is_first]
        self._units = np.repeat(np.arange(len(units), dtype=np.uint32), sizes)[order]
        self._places = np.concatenate([np.empty(0, np.uint32), *(np.arange(size, dtype=np.uint32) for size in sizes)])[order]
        self._files = [(unit.path, unit.bytes, unit.index_offset) for unit in units]
        self._mapped = lru_cache(MOST_MAPPED)(self._map)

    @property
    def where(self) -> str:
        return str(self.folder)

    @property
    def digest(self) -> str:
        """Of the teacher's weights."""
        return self.header.teacher.digest

    @property
    def vocabulary(self) -> int:
        return self.header.vocabulary

    def __reduce__(self):
        return open_cache, (self.folder,)

    def __len__(self) -> int:
        """Samples."""
        return len(self._keys)

    def keys(self) -> Iterator[bytes]:
        data = self._keys.tobytes()
        return (data[at : at + KEY_BYTES] for at in range(0, len(data), KEY_BYTES))

    def has(self, keys: Sequence[bytes]) -> np.ndarray:
        """bool [samples]: which of them have targets."""
        return self._find(keys)[1]

    def check_has(self, keys: Sequence[bytes]) -> None:
        """Raises TeacherError that counts the samples without targets."""
        self._places_of(keys)

    def read(self, key: bytes) -> Targets:
        """The targets of a sample (see read_many)."""
        return self.read_many([key])

    def read_many(self, keys: Sequence[bytes]) -> Targets:
        """The targets of samples, one sample after another in the order of `keys`, which may repeat: as a batch's trained tokens lie.

        Raises TeacherError that counts the samples that are not there, or names the one whose bytes are not as they were written.
        """
        places = self._places_of(keys)
        blocks, positions = [], []
        for key, unit, place in zip(keys, self._units[places].tolist(), self._places[places].tolist(), strict=True):
            path, _, index_offset = self._files[unit]
            mapped = self._mapped(unit)
            written, offset, size, count, check = RECORD.unpack_from(mapped, index_offset + place * RECORD.size)
            # A copy: a view would keep its unit's file open, and the samples of a batch may stand in any number of units.
            block = bytes(mapped[offset : offset + size])
            if written != key or xxhash.xxh3_64_intdigest(block) != check:
                raise TeacherError(f"{path}: sample {key.hex()} is altered: its bytes do not have the checksum they had; {AGAIN}")
            blocks.append(block)
            positions.append(count)
        return decode_blocks(blocks, positions, self.header.id_bits, self.header.settings.draws)

    def read_samples(self, samples: Sequence[Sample]) -> Targets:
        """The targets of samples, one after another (see read_many)."""
        return self.read_many([sample.key for sample in samples])

    def _find(self, keys: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """Where each key is or would be among those that are there, and whether it is."""
        if any(len(key) != KEY_BYTES for key in keys):
            raise TeacherError(f"{self.folder}: a key is not {KEY_BYTES} bytes; sample_key makes them")
        wanted = np.array([*keys], RECORDS["key"])
        places = np.searchsorted(self._keys, wanted)
        if not len(self):
            return places, np.zeros(len(wanted), bool)
        return places, self._keys.take(places, mode="clip") == wanted

    def _places_of(self, keys: Sequence[bytes]) -> np.ndarray:
        places, is_there = self._find(keys)
        if not is_there.all():
            raise TeacherError(
                f"{self.folder}: {(~is_there).sum():,} of {len(keys):,} samples have no targets (units: {len(self.units)} of "
                f"{self.header.plan.units}); `harness capture RECIPE` makes what is missing; other rows, tokenizer, template or max_length "
                "than at the capture give other samples, which want a cache of their own: no teacher.cache, or another one"
            )
        return places

    def _map(self, number: int) -> memoryview:
        path, size, _ = self._files[number]
        mapped = _map_file(path)
        if len(mapped) != size:
            raise TeacherError(f"{path}: has {len(mapped):,} bytes, and had {size:,} when the cache was opened; {AGAIN}")
        return mapped


def open_cache(folder: str | Path) -> TeacherCache:
    """A cache with the units that are there so far. Raises TeacherError for one that is torn, altered or of another cache."""
    folder = Path(folder)
    header = load_header(folder)
    return TeacherCache(folder, header, [open_unit(path, header) for path in sorted(folder.glob("unit-*.tc"))])


def open_unit(path: Path, header: CacheHeader) -> Unit:
    """What a unit holds, without its blocks. Raises TeacherError if it is no whole unit of that cache."""
    mapped = _map_file(path)
    if len(mapped) < START.size + FOOTER_BYTES or mapped[: len(MAGIC)] != MAGIC:
        raise TeacherError(f"{path}: is no unit of a teacher cache, which begins with {MAGIC!r}; {AGAIN}")
    _, version, header_bytes = START.unpack_from(mapped)
    if version != VERSION:
        raise TeacherError(
            f"{path}: version {version} of the teacher cache; this harness reads version {VERSION}; another release wrote it"
        )
    footer, proof = mapped[-FOOTER_BYTES : FOOTER.size - FOOTER_BYTES], mapped[FOOTER.size - FOOTER_BYTES : -len(MAGIC)]
    if mapped[-len(MAGIC) :] != MAGIC or xxhash.xxh3_64_intdigest(footer) != int.from_bytes(proof, "little"):
        raise TeacherError(f"{path}: has no footer: it is cut off or altered; {AGAIN}")
    index_offset, samples, start_check, index_check = FOOTER.unpack(footer)
    start, index = mapped[: START.size + header_bytes], mapped[index_offset:-FOOTER_BYTES]
    if xxhash.xxh3_64_intdigest(start) != start_check:
        raise TeacherError(f"{path}: its header is altered; {AGAIN}")
    if xxhash.xxh3_64_intdigest(index) != index_check or len(index) != samples * RECORD.size:
        raise TeacherError(f"{path}: its index is altered; {AGAIN}")
    facts = json.loads(bytes(start[START.size :]))
    number = facts.pop("unit")
    check_same(path, facts, asdict(header))
    if path.name != UNIT_FILE.format(number):
        raise TeacherError(f"{path}: is unit {number}; call it {UNIT_FILE.format(number)}")
    # A copy: a view would keep the file open, and a cache may have more units than a process may open files.
    return Unit(path, number, len(mapped), index_offset, np.frombuffer(bytes(index), RECORDS))


def _map_file(path: Path) -> memoryview:
    try:
        with open(path, "rb") as stream:
            return memoryview(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ))
    except ValueError:
        raise TeacherError(f"{path}: is empty; {AGAIN}") from None
    except OSError as error:
        raise TeacherError(f"{path}: cannot be read: {error.strerror}") from error
