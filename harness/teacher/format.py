"""The format of a teacher cache: what is kept of a teacher's distributions, and the bytes that it becomes.

    <cache>/
        cache.json          what all units must agree with: teacher, tokenizer, vocabulary, settings, plan (CacheHeader)
        unit-00012.tc       a unit: the targets of some samples, in no order that matters

    a unit:  magic, version, length of the header | header: JSON | a block for each sample | index, sorted by key | footer
    a block: counts u8 [P] | log tail, entropy, gold as codes u16 [P, 3] | head: codes u16 [E], ids in bits [E] | draws: ids in bits [P, m]

P are the positions of a sample: its trained tokens in their order. What is kept for a trained token is the distribution of that very token,
given all before it, at temperature 1. E is the sum of the counts. Numbers are little-endian; docs/teacher-cache.md has every offset.

Two promises. The key of a sample is a digest of its token ids and of which of them are trained, and of nothing else: neither the order of
the data nor packing, ranks or student can make it miss its targets or meet others. And one byte that is not as it was written is found.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from harness.errors import TeacherError

VERSION = 1
CACHE_FILE = "cache.json"
UNIT_FILE = "unit-{:05d}.tc"

MAGIC = b"TEACHER\n"
START = struct.Struct("<8sII")
"""Magic, version, bytes of the header that follows."""
RECORD = struct.Struct("<16sQIIQ")
"""Of the index: key, offset of the block in the file, its bytes, its positions, its xxh3_64."""
FOOTER = struct.Struct("<QQQQ")
"""Offset of the index, samples, xxh3_64 of all before the first block, xxh3_64 of the index. Behind it: its own xxh3_64, and the magic."""
FOOTER_BYTES = FOOTER.size + 8 + len(MAGIC)

KEY_BYTES = 16
MOST_IDS = 2**24
MOST_ENTRIES = 255
"""A count is one byte."""

RANGE_NATS = 64.0
STEPS = 65534
INFINITE = 65535
CODES = np.append(-RANGE_NATS * (np.arange(STEPS + 1) / STEPS) ** 2, -np.inf).astype(np.float32)
"""The logarithm that a code of 16 bits stands for. The square puts the steps where probabilities are large: the error at -x is at most
1.3e-4 sqrt(x). fp16's is up to 2.4e-4 x, and at equal bytes its gradient is 3 to 4 times further from the true one."""


# ---- what a cache is of


@dataclass(frozen=True)
class Teacher:
    name: str
    revision: str | None
    digest: str
    """Of what computes: the weights; of a served teacher all that can be known, the name under which its server has it."""
    dtype: str | None
    """None: a server computes, and does not say."""
    quantization: str | None
    kind: str = "resident"
    """`resident`: a capture loaded it. `served`: a server was asked."""


@dataclass(frozen=True)
class Settings:
    """How much of a distribution is kept: the most probable entries, at least `floor` and at most `cap`, until they hold the mass `p`."""

    p: float
    floor: int
    cap: int
    draws: int
    """From what is left, each of weight tail / draws."""
    seed: int
    """Of the draws."""


@dataclass(frozen=True)
class Plan:
    """What a capture has to do: `samples`, spread over `units`."""

    units: int
    samples: int
    digest: str
    """Of the samples' keys and of which unit each is in: a unit of another plan must not pass for one of this."""


@dataclass(frozen=True)
class CacheHeader:
    """What every unit of a cache repeats. Raises TeacherError for what the format cannot hold."""

    teacher: Teacher
    tokenizer: str
    """vocabulary_digest."""
    vocabulary: int
    """Ids that the tokenizer has; a model may have more rows, for padding, and these are not the teacher's distribution."""
    settings: Settings
    plan: Plan

    def __post_init__(self):
        settings = self.settings
        for name, value, least, most in (
            ("vocabulary", self.vocabulary, 1, MOST_IDS),
            ("settings.cap", settings.cap, 1, MOST_ENTRIES),
            ("settings.floor", settings.floor, 1, settings.cap),
            ("settings.draws", settings.draws, 0, MOST_ENTRIES),
            ("settings.p", settings.p, 0, 1),
            ("plan.units", self.plan.units, 0, 99_999),
        ):
            if not least <= value <= most:
                raise TeacherError(f"teacher cache: {name} = {value:,}; must be {least:,} to {most:,}")

    @property
    def id_bits(self) -> int:
        return max(1, (self.vocabulary - 1).bit_length())

    @classmethod
    def from_json(cls, facts: dict) -> CacheHeader:
        parts = {"teacher": Teacher, "settings": Settings, "plan": Plan}
        return cls(**facts | {name: part(**facts[name]) for name, part in parts.items()})


def render_header(header: CacheHeader, unit: int | None = None) -> str:
    """The text of cache.json, or with `unit` that of a unit's header."""
    first = {"version": VERSION} if unit is None else {"unit": unit}
    return json.dumps(first | asdict(header), indent=1, ensure_ascii=False) + "\n"


def load_header(folder: Path) -> CacheHeader:
    """What a cache is of. Raises TeacherError if the folder is none, or its cache.json is not as it was written."""
    file = Path(folder) / CACHE_FILE
    try:
        text = file.read_text(encoding="utf-8")
        facts = json.loads(text)
        version = facts.pop("version", None)
    except FileNotFoundError:
        raise TeacherError(
            f"{folder}: no {CACHE_FILE}; no cache of these rows, teacher and settings is here; `harness capture RECIPE` makes one"
        ) from None
    except OSError as error:
        raise TeacherError(f"{file}: cannot be read: {error.strerror}") from error
    except (ValueError, AttributeError, TypeError) as error:
        raise TeacherError(f"{file}: is altered: not the JSON that it was ({error})") from error
    if version != VERSION:
        raise TeacherError(
            f"{file}: version {version} of the teacher cache; this harness reads version {VERSION}; another release wrote it"
        )
    try:
        header = CacheHeader.from_json(facts)
    except (KeyError, TypeError) as error:
        raise TeacherError(f"{file}: is altered: {error}") from error
    if render_header(header) != text:
        raise TeacherError(f"{file}: is altered: it is not written as harness writes it")
    return header


def check_same(where: Path | str, found: dict, expected: dict) -> None:
    """Raises TeacherError that names the first fact in which a header differs."""
    for name in expected.keys() | found.keys():
        here, there = found.get(name), expected.get(name)
        if isinstance(here, dict) and isinstance(there, dict):
            check_same(f"{where}: {name}", here, there)
        elif here != there:
            raise TeacherError(
                f"{where}: {name} is {here!r}, and the cache is of {there!r}; it belongs to another cache: use another folder"
                + (" (a plan follows from the rows and teacher.unit_tokens)" if str(where).endswith(": plan") else "")
            )


# ---- what is kept of a sample


def sample_key(input_ids: Sequence[int] | np.ndarray, labels: Sequence[int] | np.ndarray) -> bytes:
    """The key of a sample as `harness prepare` keeps it (or its part of a pack), without padding; labels are -100 where nothing is trained.

    The first 16 bytes of the SHA-256 of the ids, 4 bytes each, and then of one byte for each token: 1 where it is trained, else 0. Not
    row_digest, which knows nothing of the tokenizer, the template or where a long row was cut.
    """
    ids, trained = np.asarray(input_ids, "<i4"), np.asarray(labels) != -100
    return hashlib.sha256(ids.tobytes() + trained.tobytes()).digest()[:KEY_BYTES]


@dataclass(frozen=True)
class Targets:
    """A teacher's distributions for P trained tokens. Logarithms are natural, and at temperature 1."""

    counts: np.ndarray
    """uint8 [P]: how many entries the head has."""
    ids: np.ndarray
    """int32 [P, K], most probable first; 0 beyond the count."""
    logprobs: np.ndarray
    """float32 [P, K]; -inf beyond the count."""
    log_tail: np.ndarray
    """float32 [P]: of the mass that is not in the head; -inf if there is none."""
    entropy: np.ndarray
    """float32 [P], in nats; inf where it is not known, and of a served teacher a lower bound (served.py)."""
    gold: np.ndarray
    """float32 [P]: log-probability of the trained token itself."""
    draws: np.ndarray
    """int32 [P, m]: drawn from what is not in the head, with replacement; meaningless where there is no tail."""

    def __len__(self) -> int:
        return len(self.counts)


# ---- bytes


def encode_block(targets: Targets, id_bits: int) -> bytes:
    """The bytes of a sample; what is outside of the counts does not change them."""
    kept = np.arange(targets.ids.shape[1]) < targets.counts[:, None]
    draws = np.where(np.isneginf(targets.log_tail)[:, None], 0, targets.draws)
    scalars = np.stack([targets.log_tail, -targets.entropy, targets.gold], axis=1)
    return b"".join(
        (
            targets.counts.astype("u1").tobytes(),
            _encode_logs(scalars),
            _encode_logs(targets.logprobs[kept]),
            pack_ids(targets.ids[kept], id_bits),
            pack_ids(draws.ravel(), id_bits),
        )
    )


def decode_blocks(blocks: Sequence[memoryview], positions: Sequence[int], id_bits: int, draws: int) -> Targets:
    """The targets of several samples, one after another. K is the largest count among them.

    Each distribution, tail included, is made to sum to 1 again, which rounding has moved by up to 1e-4.
    """
    counts = np.frombuffer(b"".join(block[:p] for block, p in zip(blocks, positions, strict=True)), "u1")
    before = np.append(0, np.cumsum(counts, dtype=np.int64))
    ends = np.append(0, np.cumsum(positions, dtype=np.int64))
    entries = np.diff(before[ends]).tolist()
    scalars, values, head, tail = [], [], [], []
    for block, p, count in zip(blocks, positions, entries, strict=True):
        head_at = 7 * p + 2 * count
        tail_at = head_at + packed_bytes(count, id_bits)
        scalars.append(block[p : 7 * p])
        values.append(block[7 * p : head_at])
        head.append(block[head_at:tail_at])
        tail.append(block[tail_at:])
    log_tail, minus_entropy, gold = _decode_logs(scalars).reshape(-1, 3).T
    logs = _decode_logs(values)
    if len(counts):
        log_sum = np.log(np.add.reduceat(np.exp(logs), before[:-1]) + np.exp(log_tail))
        logs -= np.repeat(log_sum, counts)
        log_tail = log_tail - log_sum
    kept = np.arange(counts.max(initial=0), dtype="u1") < counts[:, None]
    ids, logprobs = np.zeros(kept.shape, np.int32), np.full(kept.shape, -np.inf, np.float32)
    ids[kept], logprobs[kept] = unpack_ids(head, entries, id_bits), logs
    drawn = unpack_ids(tail, [p * draws for p in positions], id_bits).reshape(len(counts), draws)
    return Targets(counts, ids, logprobs, np.ascontiguousarray(log_tail), -minus_entropy, np.ascontiguousarray(gold), drawn)


def _encode_logs(logs: np.ndarray) -> bytes:
    small = np.sqrt(np.clip(-logs.astype(np.float64), 0, RANGE_NATS) / RANGE_NATS)
    return np.where(np.isinf(logs), INFINITE, np.rint(small * STEPS)).astype("<u2").tobytes()


def _decode_logs(columns: list[memoryview]) -> np.ndarray:
    return CODES.take(np.frombuffer(b"".join(columns), "<u2"))


def packed_bytes(ids: int, id_bits: int) -> int:
    return -(-ids // 8) * id_bits


def pack_ids(ids: np.ndarray, id_bits: int) -> bytes:
    """Groups of 8 ids, each a little-endian number of id_bits bytes with its first id in the lowest bits; the last is filled with 0."""
    filled = np.zeros(-(-len(ids) // 8) * 8, "<u4")
    filled[: len(ids)] = ids
    bits = np.unpackbits(filled.view("u1"), bitorder="little").reshape(-1, 32)[:, :id_bits]
    return np.packbits(bits, bitorder="little").tobytes()


def unpack_ids(columns: list[memoryview], lengths: Sequence[int], id_bits: int) -> np.ndarray:
    """The ids of several columns of pack_ids that have `lengths` ids, as one int32 [sum of lengths]."""
    # One group more than there is: an id is read as 4 bytes, which may end behind its group.
    data = b"".join([*columns, bytes(id_bits + 4)])
    groups = (len(data) - 4) // id_bits - 1
    ids = np.empty((groups, 8), np.int32)
    for place in range(8):
        byte, shift = divmod(place * id_bits, 8)
        lane = np.ndarray(groups, "<u4", data, byte, (id_bits,))
        ids[:, place] = (lane >> shift) & ((1 << id_bits) - 1)
    flat, starts = ids.ravel(), np.append(0, np.cumsum([-(-length // 8) * 8 for length in lengths]))
    return np.concatenate([flat[:0], *(flat[start : start + length] for start, length in zip(starts.tolist(), lengths, strict=False))])
