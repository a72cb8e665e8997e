"""Writing a teacher cache: cache.json once, and then units, each by one process.

    1  .unit-00012.tc.HOST.PID.TOKEN.tmp   header, and blocks as they come
    2  index and footer; wait until they are on the disk
    3  rename to unit-00012.tc, and wait until the name is on the disk                                    <- the commit

Promises. A unit counts once it has its name, and then it is whole: a process that is killed at any instant leaves a file that nobody reads,
and the next writer of that unit removes it. The same targets give the same bytes, so that two who write one unit do no harm.
"""

from __future__ import annotations

import contextlib
import errno
from dataclasses import asdict
from pathlib import Path

import numpy as np
import xxhash

from harness.errors import TeacherError
from harness.teacher.format import (
    CACHE_FILE,
    FOOTER,
    KEY_BYTES,
    MAGIC,
    RECORD,
    START,
    UNIT_FILE,
    VERSION,
    CacheHeader,
    Targets,
    check_same,
    encode_block,
    load_header,
    render_header,
)
from harness.units import flush, publish, temporary_name

MASS_TOLERANCE = 1e-3
"""By so much may head and tail of a distribution miss 1: rounding is far below it, and logits or another temperature far above."""


def save_header(folder: str | Path, header: CacheHeader) -> None:
    """Make `folder` a cache of that, or find that it is one. Raises TeacherError when it is one of something else."""
    folder = Path(folder)
    file = folder / CACHE_FILE
    with _naming(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if not file.exists():
            temporary = temporary_name(file)
            with open(temporary, "w", encoding="utf-8") as stream:
                stream.write(render_header(header))
                flush(stream)
            publish(temporary, file)
    # Also after writing: another process may have been there in between.
    check_same(folder, asdict(header), asdict(load_header(folder)))


class UnitWriter:
    """One unit of a cache. Used as a context; what is not committed at its end is gone."""

    def __init__(self, folder: str | Path, header: CacheHeader, unit: int):
        if not 0 <= unit < header.plan.units:
            raise TeacherError(f"{folder}: there is no unit {unit}; the plan has units 0 to {header.plan.units - 1}")
        self.path, self.header = Path(folder) / UNIT_FILE.format(unit), header
        text = render_header(header, unit).encode()
        start = START.pack(MAGIC, VERSION, len(text)) + text
        self._temporary, self._start_check = temporary_name(self.path), xxhash.xxh3_64_intdigest(start)
        self._index: dict[bytes, bytes] = {}
        self._offset = len(start)
        with _naming(self.path):
            self._stream = open(self._temporary, "wb")  # noqa: SIM115
            self._stream.write(start)

    def __enter__(self) -> UnitWriter:
        return self

    def __exit__(self, *exception) -> None:
        # A full disk is told of by the write that failed, not by what close still has to write.
        with contextlib.suppress(OSError):
            self._stream.close()
        self._temporary.unlink(missing_ok=True)

    def add(self, key: bytes, targets: Targets) -> None:
        """The targets of a sample. A sample that is there already stays as it is: it has the same tokens, and so the same targets.

        Raises TeacherError for targets that cannot be a teacher's; a fault in them would teach every student.
        """
        if len(key) != KEY_BYTES:
            raise TeacherError(f"{self.path}: a key of {len(key)} bytes; sample_key makes {KEY_BYTES}")
        if key in self._index:
            return
        if problem := _find_problem(targets, self.header):
            raise TeacherError(f"{self.path}: sample {key.hex()}: {problem}")
        block = encode_block(targets, self.header.id_bits)
        with _naming(self.path):
            self._stream.write(block)
        self._index[key] = RECORD.pack(key, self._offset, len(block), len(targets), xxhash.xxh3_64_intdigest(block))
        self._offset += len(block)

    def commit(self) -> Path:
        """Give the unit its name, and wait until it is on the disk. Leftovers of killed writers of this unit go."""
        index = b"".join(self._index[key] for key in sorted(self._index))
        footer = FOOTER.pack(self._offset, len(self._index), self._start_check, xxhash.xxh3_64_intdigest(index))
        with _naming(self.path):
            self._stream.write(index + footer + xxhash.xxh3_64_intdigest(footer).to_bytes(8, "little") + MAGIC)
            flush(self._stream)
            self._stream.close()
            publish(self._temporary, self.path)
        return self.path


def _find_problem(targets: Targets, header: CacheHeader) -> str | None:
    """What is wrong with targets, in the order in which a later check relies on an earlier one."""
    positions, width, settings = len(targets), targets.ids.shape[-1], header.settings
    shapes = {
        "counts": (positions,),
        "ids": (positions, width),
        "logprobs": (positions, width),
        "log_tail": (positions,),
        "entropy": (positions,),
        "gold": (positions,),
        "draws": (positions, settings.draws),
    }
    for name, shape in shapes.items():
        if getattr(targets, name).shape != shape:
            return f"{name} has the shape {getattr(targets, name).shape}; must be {shape}"
    counts, kept = targets.counts, np.arange(width) < targets.counts[:, None]
    least, most = min(settings.floor, header.vocabulary), min(settings.cap, width)
    if problem := _first(~((counts >= least) & (counts <= most)), f"a count is not {least} to {most}"):
        return problem
    logprobs = np.where(kept, targets.logprobs, -np.inf)
    # Ids beyond the count become numbers that no id is, each another one, so that they are neither out of range nor twice there.
    ids = np.where(kept, targets.ids, -1 - np.arange(width))
    tail = np.exp(targets.log_tail)
    in_head = (targets.draws[:, :, None] == ids[:, None, :]).any(2) & (tail > 0)[:, None]
    bad_ids = kept & ((ids < 0) | (ids >= header.vocabulary))
    bad_draws = (targets.draws < 0) | (targets.draws >= header.vocabulary)
    twice = np.diff(np.sort(ids, axis=1), axis=1) == 0
    with np.errstate(invalid="ignore"):
        rising = logprobs[:, 1:] > logprobs[:, :-1]
        mass = np.exp(logprobs).sum(1) + tail
        return (
            _first(bad_ids, f"an id is not 0 to {header.vocabulary - 1:,}")
            or _first(bad_draws & (tail > 0)[:, None], f"a draw is not 0 to {header.vocabulary - 1:,}")
            or _first(twice, "the head has an id twice")
            or _first(in_head, "a draw is in the head")
            or _first(rising, "the head is not sorted, most probable first")
            or _first(
                ~(np.abs(mass - 1) <= MASS_TOLERANCE), "head and tail do not sum to 1; they must be log-probabilities at temperature 1"
            )
            or _first(~(targets.gold <= MASS_TOLERANCE), "the gold token's log-probability is not a log-probability")
            or _first(~(targets.entropy >= -MASS_TOLERANCE), "the entropy is not 0 or more")
        )


def _first(wrong: np.ndarray, what: str) -> str | None:
    at = np.argwhere(wrong)
    return f"position {at[0][0]}: {what}" if len(at) else None


ADVICE = dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "; free some: what is committed stays, and the same command goes on") | dict.fromkeys(
    (errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR), "; give teacher.cache a folder that can be written"
)


@contextlib.contextmanager
def _naming(path: Path):
    try:
        yield
    except OSError as error:
        raise TeacherError(f"{path}: cannot be written: {error.strerror}{ADVICE.get(error.errno, '')}") from error
