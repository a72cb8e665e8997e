"""A teacher cache gives back what was put in, to any reader, or says what is wrong with which file and sample.

The second opinion is the reader of docs/teacher-cache.md, which shares no code with ours. Kills are real: a forked writer ends by SIGKILL.
"""

import errno
import json
import math
import multiprocessing
import os
import pickle
import re
import resource
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from functools import cache as once
from pathlib import Path

import numpy as np
import pytest
from conftest import REPOSITORY, STORIES, XLAM, needs_shared

from harness.errors import TeacherError
from harness.teacher import reader as readers
from harness.teacher.format import (
    CacheHeader,
    Plan,
    Settings,
    Targets,
    Teacher,
    encode_block,
    load_header,
    pack_ids,
    sample_key,
    unpack_ids,
)
from harness.teacher.reader import open_cache
from harness.teacher.writer import UnitWriter, save_header

FORK = multiprocessing.get_context("fork")
PAGE = REPOSITORY / "docs" / "teacher-cache.md"


# ---- what the tests are made of


def header_of(vocabulary: int = 1000, *, p: float = 0.99, floor: int = 1, cap: int = 64, draws: int = 0, units: int = 3) -> CacheHeader:
    teacher = Teacher("org/teacher-70b", "abc123", "d1" * 16, "bfloat16", None)
    return CacheHeader(teacher, "70" * 16, vocabulary, Settings(p, floor, cap, draws, 42), Plan(units, 7, "aa" * 16))


def targets_of(logits: np.ndarray, ids: np.ndarray, gold: np.ndarray, settings: Settings, rng: np.random.Generator) -> Targets:
    """As the specification reads, in fp64: of logits [P, V], most probable first, whose columns are called `ids`."""
    logprobs = logits - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1, keepdims=True)) - logits.max(1, keepdims=True)
    mass = np.cumsum(np.exp(logprobs), axis=1)
    width = min(settings.cap, logits.shape[1])
    counts = np.clip((mass < settings.p).sum(1) + 1, min(settings.floor, width), width)
    draws, tails = np.zeros((len(logits), settings.draws), np.int32), np.full(len(logits), -np.inf)
    for position, count in enumerate(counts):
        rest = np.exp(logprobs[position, count:])
        if len(rest):
            tails[position] = np.log(rest.sum())
            draws[position] = ids[count + rng.choice(len(rest), settings.draws, p=rest / rest.sum())]
    return Targets(
        counts=counts.astype(np.uint8),
        ids=np.tile(ids[:width], (len(logits), 1)).astype(np.int32),
        logprobs=logprobs[:, :width].astype(np.float32),
        log_tail=tails.astype(np.float32),
        entropy=-(np.exp(logprobs) * logprobs).sum(1).astype(np.float32),
        gold=logprobs[np.arange(len(logits)), gold].astype(np.float32),
        draws=draws,
    )


def random_targets(seed: int, positions: int, header: CacheHeader) -> Targets:
    """Distributions from flat to nearly certain, over up to 300 ids that lie anywhere in the vocabulary, its first and last among them."""
    rng = np.random.default_rng(seed)
    size = min(header.vocabulary, 300)
    ids = np.append([0, header.vocabulary - 1], 1 + rng.choice(max(header.vocabulary - 2, 1), size - 2, replace=False))
    logits = -np.sort(rng.exponential(rng.choice([0.05, 1, 3, 20], (positions, 1)), (positions, size)), axis=1)
    return targets_of(logits, ids, rng.integers(0, size, positions), header.settings, rng)


def key_of(number: int) -> bytes:
    return sample_key([number], [number])


def write_unit(folder: Path, header: CacheHeader, unit: int, samples: dict[bytes, Targets]) -> Path:
    save_header(folder, header)
    with UnitWriter(folder, header, unit) as writer:
        for key, targets in samples.items():
            writer.add(key, targets)
        return writer.commit()


@once
def page_reader():
    """read_unit of docs/teacher-cache.md."""
    [block] = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    names = {}
    exec(block, names)
    return names["read_unit"]


def assert_same(found: Targets, written: Targets) -> None:
    """The promise of the page: ids to the bit, logarithms to 1.3e-4 sqrt(x) and what normalising moves."""
    assert np.array_equal(found.counts, written.counts)
    has_tail = np.isfinite(written.log_tail)
    assert np.array_equal(found.draws[has_tail], written.draws[has_tail])
    for position, count in enumerate(written.counts):
        assert np.array_equal(found.ids[position, :count], written.ids[position, :count])
        assert np.isneginf(found.logprobs[position, count:]).all() and not found.ids[position, count:].any()
        assert_near(found.logprobs[position, :count], written.logprobs[position, :count], moved=1.5e-4)
    assert_near(found.log_tail, written.log_tail, moved=1.5e-4)
    assert_near(found.gold, written.gold, moved=0)
    assert_near(found.entropy, written.entropy, moved=0)
    if len(found):
        assert np.abs(np.exp(found.logprobs.astype(np.float64)).sum(1) + np.exp(found.log_tail) - 1).max() < 2e-6


def assert_near(found: np.ndarray, written: np.ndarray, moved: float) -> None:
    infinite = np.isinf(written)
    assert np.array_equal(found[infinite], written[infinite])
    known, x = found[~infinite].astype(np.float64), np.clip(written[~infinite].astype(np.float64), -64, 64)
    assert (np.abs(known - x) <= 1.3e-4 * np.sqrt(np.abs(x)) + 4e-9 + moved + 1e-6 * np.abs(x)).all()


def flip(file: Path, position: int) -> None:
    with open(file, "r+b") as stream:
        stream.seek(position)
        [byte] = stream.read(1)
        stream.seek(position)
        stream.write(bytes([byte ^ 0x10]))


# ---- there and back


@pytest.mark.parametrize("draws", [0, 5])
@pytest.mark.parametrize("vocabulary", [2, 9, 255, 256, 257, 32_000, 131_072, 151_936, 2**24])
def test_what_is_read_is_what_was_written_for_any_vocabulary(tmp_path, vocabulary, draws):
    header = header_of(vocabulary, draws=draws)
    samples = {key_of(n): random_targets(n, positions, header) for n, positions in enumerate([1, 0, 7, 8, 64, 301])}
    path = write_unit(tmp_path, header, 0, samples)
    cache = open_cache(tmp_path)
    assert (len(cache), cache.positions, cache.units, cache.bytes) == (6, 381, (0,), path.stat().st_size)
    assert set(cache.keys()) == set(samples)
    for key, targets in samples.items():
        assert_same(cache.read(key), targets)


@pytest.mark.parametrize("seed", range(20))
def test_the_page_reads_what_harness_reads(tmp_path, seed):
    rng = np.random.default_rng(seed)
    vocabulary, cap = int(2 ** rng.uniform(1, 24)), int(rng.integers(1, 256))
    header = header_of(vocabulary, p=rng.uniform(0.1, 1), floor=int(rng.integers(1, cap + 1)), cap=cap, draws=int(rng.integers(0, 4)))
    samples = {key_of(n): random_targets(1000 * seed + n, int(rng.integers(0, 40)), header) for n in range(5)}
    path = write_unit(tmp_path, header, 0, samples)
    found, facts = page_reader()(path)
    assert facts["vocabulary"] == vocabulary and facts["teacher"]["name"] == "org/teacher-70b" and facts["unit"] == 0
    cache = open_cache(tmp_path)
    # In the order of the index, which another reader may search.
    assert list(found) == sorted(samples)
    for key, there in found.items():
        here = cache.read(key)
        assert here.draws.tolist() == there["draws"]
        for position, count in enumerate(here.counts):
            assert here.ids[position, :count].tolist() == there["ids"][position]
            np.testing.assert_allclose(here.logprobs[position, :count], there["logprobs"][position], rtol=1e-6, atol=2e-6)
        np.testing.assert_allclose(here.log_tail, there["log_tail"], rtol=1e-6, atol=2e-6)
        np.testing.assert_allclose(here.entropy, there["entropy"], rtol=1e-6)
        np.testing.assert_allclose(here.gold, there["gold"], rtol=1e-6)


def test_every_count_up_to_255_comes_back(tmp_path):
    header = header_of(300, p=1.0, cap=255)
    whole = random_targets(0, 255, header)
    counts = np.arange(1, 256, dtype=np.uint8)
    rest = [max(1 - np.exp(row[:n].astype(float)).sum(), 1e-20) for row, n in zip(whole.logprobs, counts, strict=True)]
    targets = replace(whole, counts=counts, log_tail=np.log(rest).astype(np.float32))
    write_unit(tmp_path, header, 0, {key_of(0): targets})
    assert_same(open_cache(tmp_path).read(key_of(0)), targets)


def test_a_teacher_that_is_certain_has_no_tail_and_one_that_is_nearly_so_has_a_small_one(tmp_path):
    header = header_of(100, cap=4, draws=2)
    logs = np.array([[0.0, -np.inf, -np.inf], [-1e-9, -20.7, -200.0], [-1e-6, -60.0, -63.9]], np.float32)
    tails = np.array([-np.inf, -200.0, math.log(1e-6)], np.float32)
    draws = np.array([[-7, 99], [50, 50], [3, 99]], np.int32)
    ids = np.tile(np.array([7, 0, 2], np.int32), (3, 1))
    targets = Targets(np.full(3, 3, np.uint8), ids, logs, tails, np.array([0, 1e-7, np.inf], np.float32), tails, draws)
    write_unit(tmp_path, header, 0, {key_of(0): targets})
    found = open_cache(tmp_path).read(key_of(0))
    assert_same(found, targets)
    assert found.draws.tolist() == [[0, 0], [50, 50], [3, 99]]
    assert found.log_tail[1] == -64 and np.isposinf(found.entropy[2])


@pytest.mark.parametrize("bits", range(1, 25))
def test_ids_of_every_width_are_unpacked_as_the_page_says(bits):
    rng, lengths = np.random.default_rng(bits), [0, 1, 7, 8, 9, 16, 100, 0]
    columns = [rng.integers(0, 2**bits, length) for length in lengths]
    packed = [pack_ids(ids, bits) for ids in columns]
    assert np.array_equal(unpack_ids(list(map(memoryview, packed)), lengths, bits), np.concatenate(columns))
    for ids, data in zip(columns, packed, strict=True):
        groups = [data[at : at + bits] for at in range(0, len(data), bits)]
        assert [int.from_bytes(groups[i // 8], "little") >> (i % 8) * bits & 2**bits - 1 for i in range(len(ids))] == ids.tolist()
        assert len(groups) == math.ceil(len(ids) / 8)


def test_a_batch_is_its_samples_one_after_another(tmp_path):
    header = header_of(5000, draws=3, units=2)
    samples = [random_targets(n, positions, header) for n, positions in enumerate([3, 0, 40, 1, 9])]
    write_unit(tmp_path, header, 0, {key_of(n): samples[n] for n in (0, 1, 2)})
    write_unit(tmp_path, header, 1, {key_of(n): samples[n] for n in (3, 4)})
    cache, order = open_cache(tmp_path), [4, 2, 0, 1, 2, 3]
    batch, single = cache.read_many([key_of(n) for n in order]), [cache.read(key_of(n)) for n in order]
    start = 0
    for part in single:
        for field in fields(Targets):
            there, here = getattr(batch, field.name)[start : start + len(part)], getattr(part, field.name)
            width = part.ids.shape[1] if field.name in ("ids", "logprobs") else None
            assert np.array_equal(there[:, :width] if width is not None else there, here), field.name
        start += len(part)
    assert start == len(batch) == 93
    assert batch.ids.shape == batch.logprobs.shape == (93, batch.counts.max())
    assert len(cache.read_many([])) == 0


def test_what_lies_beyond_the_count_changes_no_byte(tmp_path):
    header = header_of()
    targets = random_targets(0, 20, header)
    beyond = np.arange(targets.ids.shape[1]) >= targets.counts[:, None]
    assert beyond.any()
    garbage = replace(targets, ids=np.where(beyond, -9, targets.ids), logprobs=np.where(beyond, np.float32(np.nan), targets.logprobs))
    one, other = (write_unit(tmp_path / name, header, 0, {key_of(0): kept}) for name, kept in (("a", targets), ("b", garbage)))
    assert one.read_bytes() == other.read_bytes()


# ---- keys


def test_a_key_is_the_content_and_nothing_else():
    ids, labels = [5, 6, 7], [-100, 6, -100]
    key = sample_key(ids, labels)
    # By hand: ids of 4 bytes, then the mask; `printf ... | sha256sum` says the same.
    assert key.hex() == "81b55f0fc9d5eb41c5d8d472c1ab2b2d"
    assert key == sample_key(np.array(ids, np.int64), np.array(labels, np.int16))
    others = [([5, 6, 8], labels), (ids, [-100, 6, 7]), ([5, 6], [-100, 6]), ([5, 6, 7, 0], [-100, 6, -100, -100])]
    assert len({key, *(sample_key(*other) for other in others)}) == 5


def test_keys_that_differ_in_their_last_byte_or_end_with_zeros_are_told_apart(tmp_path):
    header = header_of()
    keys = [bytes(16), bytes(15) + b"\1", b"\1" + bytes(15), b"\xff" * 16, b"\xff" * 15 + b"\0", b"\x7f" * 16, b"\x80" * 16]
    samples = {key: random_targets(n, n + 1, header) for n, key in enumerate(keys)}
    write_unit(tmp_path, header, 0, samples)
    cache = open_cache(tmp_path)
    assert set(cache.keys()) == set(keys)
    for key, targets in samples.items():
        assert_same(cache.read(key), targets)
    with pytest.raises(TeacherError, match="1 of 1 samples have no targets"):
        cache.read(b"\xff" * 14 + b"\0\0")


def test_a_sample_that_comes_twice_is_kept_once_in_a_unit_and_found_in_any(tmp_path):
    header = header_of()
    first, second, other = (random_targets(n, 4, header) for n in range(3))
    save_header(tmp_path, header)
    for unit, again in ((0, first), (1, second)):
        with UnitWriter(tmp_path, header, unit) as writer:
            writer.add(key_of(0), again)
            size = writer.commit().stat().st_size
        with UnitWriter(tmp_path, header, unit) as writer:
            writer.add(key_of(0), again)
            writer.add(key_of(0), other)
            assert writer.commit().stat().st_size == size
    cache = open_cache(tmp_path)
    assert len(cache) == 1
    assert_same(cache.read(key_of(0)), first)


def test_missing_samples_are_counted_and_the_command_that_makes_them_is_named(tmp_path):
    header = header_of(units=4)
    save_header(tmp_path, header)
    with pytest.raises(TeacherError, match="2 of 2 samples have no targets .units: 0 of 4"):
        open_cache(tmp_path).check_has([key_of(0), key_of(1)])
    write_unit(tmp_path, header, 2, {key_of(n): random_targets(n, 2, header) for n in range(5)})
    cache = open_cache(tmp_path)
    cache.check_has([key_of(n) for n in range(5)])
    assert cache.has([key_of(n) for n in (4, 90, 0)]).tolist() == [True, False, True]
    with pytest.raises(TeacherError, match=r"3 of 6 samples have no targets \(units: 1 of 4\); `harness capture RECIPE`"):
        cache.read_many([key_of(n) for n in (0, 1, 90, 2, 91, 92)])
    with pytest.raises(TeacherError, match="a key is not 16 bytes"):
        cache.read(key_of(0) + b"x")


# ---- units are whole or absent


def test_the_same_targets_give_the_same_bytes_whoever_writes_them(tmp_path):
    header = header_of(draws=2)
    samples = {key_of(n): random_targets(n, 9, header) for n in range(6)}
    one, other = (write_unit(tmp_path / name, header, 1, samples) for name in "ab")
    assert one.read_bytes() == other.read_bytes()
    assert (one.parent / "cache.json").read_bytes() == (other.parent / "cache.json").read_bytes()


def _kill_at(instant: str) -> None:
    """Arrange that this process ends by SIGKILL right there."""

    def die(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    flush, rename = os.fsync, os.rename
    if instant == "before the flush":
        os.fsync = die
    if instant == "after the flush":
        os.fsync = lambda descriptor: (flush(descriptor), die())
    if instant == "before the rename":
        os.rename = die
    if instant == "after the rename":
        os.rename = lambda old, new: (rename(old, new), die())


def _write_and_die(folder: Path, header: CacheHeader, samples: dict, instant: str) -> None:
    _kill_at(instant)
    with UnitWriter(folder, header, 0) as writer:
        for n, (key, targets) in enumerate(samples.items()):
            if (instant, n) in (("at the start", 0), ("in the middle", 3)):
                writer._stream.flush()
                os.kill(os.getpid(), signal.SIGKILL)
            writer.add(key, targets)
        writer.commit()


INSTANTS = ["at the start", "in the middle", "before the flush", "after the flush", "before the rename", "after the rename"]


@pytest.mark.parametrize("instant", INSTANTS)
def test_a_writer_that_is_killed_leaves_no_half_unit_and_the_next_one_writes_the_same_bytes(tmp_path, instant):
    header = header_of()
    samples = {key_of(n): random_targets(n, 30, header) for n in range(6)}
    whole = write_unit(tmp_path / "whole", header, 0, samples).read_bytes()
    folder = tmp_path / "killed"
    save_header(folder, header)
    process = FORK.Process(target=_write_and_die, args=(folder, header, samples, instant))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    cache = open_cache(folder)
    assert cache.units == ((0,) if instant == "after the rename" else ())
    assert len([*folder.iterdir()]) == 2
    path = write_unit(folder, header, 0, samples)
    assert path.read_bytes() == whole
    assert sorted(file.name for file in folder.iterdir()) == ["cache.json", "unit-00000.tc"]


def _write_together(barrier, folder: Path, header: CacheHeader, samples: dict) -> None:
    barrier.wait()
    save_header(folder, header)
    with UnitWriter(folder, header, 0) as writer:
        for key, targets in samples.items():
            writer.add(key, targets)
        barrier.wait()
        writer.commit()


def test_two_processes_may_write_one_unit_at_once(tmp_path):
    header = header_of()
    samples = {key_of(n): random_targets(n, 30, header) for n in range(20)}
    whole = write_unit(tmp_path / "whole", header, 0, samples).read_bytes()
    for attempt in range(5):
        folder, barrier = tmp_path / str(attempt), FORK.Barrier(2)
        both = [FORK.Process(target=_write_together, args=(barrier, folder, header, samples)) for _ in range(2)]
        for process in both:
            process.start()
        for process in both:
            process.join()
        assert [process.exitcode for process in both] == [0, 0]
        assert sorted(file.name for file in folder.iterdir()) == ["cache.json", "unit-00000.tc"]
        assert (folder / "unit-00000.tc").read_bytes() == whole


def test_the_slower_of_two_writers_finds_its_file_gone_and_touches_nothing_of_the_unit(tmp_path):
    header, targets = header_of(), random_targets(0, 5, header_of())
    save_header(tmp_path, header)
    with UnitWriter(tmp_path, header, 0) as slow, UnitWriter(tmp_path, header, 0) as fast:
        # They would write the same; that they do not shows whose bytes these are.
        slow.add(key_of(1), targets)
        fast.add(key_of(0), targets)
        written = fast.commit().read_bytes()
        assert slow.commit().read_bytes() == written
    assert [*open_cache(tmp_path).keys()] == [key_of(0)]


def test_a_writer_that_fails_leaves_nothing(tmp_path):
    save_header(tmp_path, header_of())
    with pytest.raises(ZeroDivisionError), UnitWriter(tmp_path, header_of(), 0) as writer:
        writer.add(key_of(0), random_targets(0, 5, header_of()))
        raise ZeroDivisionError
    assert [file.name for file in tmp_path.iterdir()] == ["cache.json"]


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (errno.ENOSPC, "No space left on device; free some"),
        (errno.EROFS, "Read-only file system; give teacher.cache a folder that can be written"),
        (errno.EIO, "Input/output error$"),
    ],
)
def test_a_disk_that_takes_no_more_is_named(tmp_path, monkeypatch, number, said):
    save_header(tmp_path, header_of())

    def fail(descriptor):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(TeacherError, match=f"unit-00002.tc: cannot be written: {said}"):
        write_unit(tmp_path, header_of(), 2, {key_of(0): random_targets(0, 5, header_of())})
    assert [file.name for file in tmp_path.iterdir()] == ["cache.json"]


# ---- what does not belong together


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"teacher": Teacher("org/teacher-70b", "abc123", "other", "bfloat16", None)},
            "teacher: digest is 'other', and the cache is of 'd1",
        ),
        (
            {"teacher": Teacher("org/teacher-70b", "abc123", "d1" * 16, "bfloat16", "nf4")},
            "quantization is 'nf4', and the cache is of None",
        ),
        ({"tokenizer": "other"}, "tokenizer is 'other', and the cache is of '70"),
        ({"vocabulary": 1001}, "vocabulary is 1001, and the cache is of 1000"),
        ({"settings": Settings(0.95, 1, 64, 0, 42)}, "settings: p is 0.95, and the cache is of 0.99"),
        ({"plan": Plan(3, 7, "other")}, "plan: digest is 'other'"),
    ],
)
def test_a_unit_of_another_cache_is_refused_with_what_differs(tmp_path, change, said):
    mine, other = header_of(), replace(header_of(), **change)
    save_header(tmp_path / "mine", mine)
    stranger = write_unit(tmp_path / "other", other, 1, {key_of(0): random_targets(0, 3, mine)})
    stranger.rename(tmp_path / "mine" / stranger.name)
    with pytest.raises(TeacherError, match=f"unit-00001.tc.*{re.escape(said)}"):
        open_cache(tmp_path / "mine")
    with pytest.raises(TeacherError, match="use another folder"):
        save_header(tmp_path / "mine", other)
    assert load_header(tmp_path / "mine") == mine


def test_a_unit_under_another_number_is_refused(tmp_path):
    write_unit(tmp_path, header_of(), 1, {}).rename(tmp_path / "unit-00002.tc")
    with pytest.raises(TeacherError, match="unit-00002.tc: is unit 1; call it unit-00001.tc"):
        open_cache(tmp_path)
    with pytest.raises(TeacherError, match="there is no unit 3; the plan has units 0 to 2"):
        UnitWriter(tmp_path, header_of(), 3)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"vocabulary": 2**24 + 1}, "vocabulary = 16,777,217; must be 1 to 16,777,216"),
        ({"cap": 256}, "settings.cap = 256; must be 1 to 255"),
        ({"cap": 8, "floor": 9}, "settings.floor = 9; must be 1 to 8"),
        ({"draws": 256}, "settings.draws = 256"),
        ({"p": 1.5}, "settings.p = 1.5"),
        ({"units": 100_000}, "plan.units = 100,000"),
    ],
)
def test_what_the_format_cannot_hold_is_refused(arguments, said):
    with pytest.raises(TeacherError, match=re.escape(said)):
        header_of(**arguments)


def _with(**columns):
    return lambda targets: replace(targets, **{name: change(getattr(targets, name)) for name, change in columns.items()})


def _put(value, *place):
    def change(column):
        column = column.copy()
        column[place] = value
        return column

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_with(gold=lambda gold: gold[:-1]), r"gold has the shape \(5,\); must be \(6,\)"),
        (_with(draws=lambda draws: draws[:, :1]), r"draws has the shape \(6, 1\); must be \(6, 2\)"),
        (_with(counts=_put(1, 3)), "position 3: a count is not 2 to 16"),
        (_with(counts=_put(17, 3)), "position 3: a count is not 2 to 16"),
        (_with(ids=_put(1000, 2, 1)), "position 2: an id is not 0 to 999"),
        (_with(ids=_put(-1, 2, 1)), "position 2: an id is not 0 to 999"),
        (_with(ids=lambda ids: np.where(np.arange(16) == 1, ids[:, :1], ids)), "position 0: the head has an id twice"),
        (_with(draws=_put(1000, 4, 1)), "position 4: a draw is not 0 to 999"),
        (lambda targets: replace(targets, draws=_put(targets.ids[4, 0], 4, 1)(targets.draws)), "position 4: a draw is in the head"),
        (_with(logprobs=lambda logs: logs[:, ::-1]), "position 0: the head is not sorted"),
        (_with(logprobs=_put(np.nan, 5, 0)), "position 5: head and tail do not sum to 1"),
        (
            _with(logprobs=lambda logs: logs / 2),
            "position 0: head and tail do not sum to 1; they must be log-probabilities at temperature 1",
        ),
        (_with(log_tail=_put(np.nan, 5)), "position 5: head and tail do not sum to 1"),
        (_with(gold=_put(np.nan, 1)), "position 1: the gold token's log-probability"),
        (_with(gold=_put(0.5, 1)), "position 1: the gold token's log-probability"),
        (_with(entropy=_put(-1, 0)), "position 0: the entropy is not 0 or more"),
    ],
)
def test_targets_that_no_teacher_can_have_are_refused_with_the_sample_and_the_position(tmp_path, change, said):
    header = header_of(p=0.9, floor=2, cap=16, draws=2)
    rng = np.random.default_rng(0)
    targets = targets_of(-np.sort(rng.exponential(2, (6, 50))), np.arange(100, 150), np.zeros(6, int), header.settings, rng)
    save_header(tmp_path, header)
    with UnitWriter(tmp_path, header, 0) as writer:
        writer.add(key_of(0), targets)
        with pytest.raises(TeacherError, match=f"unit-00000.tc: sample {key_of(1).hex()}: {said}"):
            writer.add(key_of(1), change(targets))
        with pytest.raises(TeacherError, match="a key of 3 bytes"):
            writer.add(b"abc", targets)
        writer.commit()
    assert [*open_cache(tmp_path).keys()] == [key_of(0)]


# ---- damage


def test_every_byte_of_a_unit_that_changes_is_found_and_a_block_names_its_sample(tmp_path):
    header = header_of(draws=2)
    samples = {key_of(n): random_targets(n, positions, header) for n, positions in enumerate([3, 1, 0])}
    path = write_unit(tmp_path, header, 0, samples)
    whole, blocks = path.read_bytes(), {}
    at = int.from_bytes(whole[-48:-40], "little")
    for place in range(at, len(whole) - 48, 40):
        start = int.from_bytes(whole[place + 16 : place + 24], "little")
        size = int.from_bytes(whole[place + 24 : place + 28], "little")
        blocks |= dict.fromkeys(range(start, start + size), whole[place : place + 16])
    assert 100 < len(blocks) == at - 16 - int.from_bytes(whole[12:16], "little")
    for position in range(len(whole)):
        flip(path, position)
        with pytest.raises(TeacherError, match=r"unit-00000\.tc") as raised:
            cache = open_cache(tmp_path)
            assert position in blocks
            undamaged = [key for key in samples if key != blocks[position]]
            cache.read_many(undamaged)
            cache.read_many(list(samples))
        assert position not in blocks or f"sample {blocks[position].hex()} is altered" in str(raised.value)
        flip(path, position)
    assert len(open_cache(tmp_path).read_many(list(samples))) == 4


def test_a_unit_that_is_cut_off_anywhere_or_longer_than_it_was_is_found(tmp_path):
    path = write_unit(tmp_path, header_of(), 0, {key_of(0): random_targets(0, 3, header_of())})
    whole = path.read_bytes()
    for size in (len(whole) + 1, *reversed(range(len(whole)))):
        os.truncate(path, size)
        with pytest.raises(TeacherError, match=r"unit-00000\.tc: (has no footer: it is cut off|is no unit|is empty)"):
            open_cache(tmp_path)


def test_a_file_of_something_else_and_a_unit_from_the_future_are_named(tmp_path):
    path = write_unit(tmp_path, header_of(), 0, {})
    whole = path.read_bytes()
    path.write_bytes(b"PK\3\4" * 100)
    with pytest.raises(TeacherError, match="unit-00000.tc: is no unit of a teacher cache"):
        open_cache(tmp_path)
    path.write_bytes(whole[:8] + b"\2" + whole[9:])
    with pytest.raises(TeacherError, match="unit-00000.tc: version 2 of the teacher cache; this harness reads version 1"):
        open_cache(tmp_path)


def test_a_unit_that_shrinks_or_goes_while_the_cache_is_open_is_named(tmp_path):
    path = write_unit(tmp_path, header_of(), 0, {key_of(0): random_targets(0, 3, header_of())})
    whole = path.read_bytes()
    cache = open_cache(tmp_path)
    path.write_bytes(whole[:-1])
    with pytest.raises(TeacherError, match=r"unit-00000.tc: has [\d,]+ bytes, and had"):
        cache.read(key_of(0))
    path.unlink()
    with pytest.raises(TeacherError, match="unit-00000.tc: cannot be read: No such file"):
        cache.read(key_of(0))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (
            lambda text: None,
            "no cache.json; no cache of these rows, teacher and settings is here; `harness capture RECIPE` makes one",
        ),
        (lambda text: text[:50], "cache.json: is altered: not the JSON"),
        (lambda text: "[1]", "cache.json: is altered: not the JSON"),
        (lambda text: text.replace('"p": 0.99,', ""), "cache.json: is altered: .*'p'"),
        (lambda text: text.replace('"cap"', '"cup"'), "cache.json: is altered: .*'cup'"),
        (
            lambda text: text.replace('"version": 1', '"version": 9'),
            "cache.json: version 9 of the teacher cache; this harness reads version 1",
        ),
        (lambda text: text.replace(" ", "  ", 1), "cache.json: is altered: it is not written as harness writes it"),
        (lambda text: text.replace("abc123", "abc124"), "unit-00000.tc: teacher: revision is 'abc123', and the cache is of 'abc124'"),
    ],
)
def test_a_damaged_cache_json_is_found(tmp_path, damage, said):
    write_unit(tmp_path, header_of(), 0, {})
    file = tmp_path / "cache.json"
    text = damage(file.read_text())
    file.unlink() if text is None else file.write_text(text)
    with pytest.raises(TeacherError, match=said):
        open_cache(tmp_path)


# ---- many readers


@pytest.fixture
def many_units(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "MOST_MAPPED", 3)
    header = header_of(units=40)
    samples = {key_of(n): random_targets(n, n % 7, header) for n in range(120)}
    keys = list(samples)
    for unit in range(40):
        write_unit(tmp_path, header, unit, {key: samples[key] for key in keys[unit::40]})
    return open_cache(tmp_path), samples


def _read_all(cache, samples, seed: int) -> None:
    keys = list(samples)
    for n in np.random.default_rng(seed).permutation(len(keys)):
        assert_same(cache.read(keys[n]), samples[keys[n]])


def test_threads_share_a_cache(many_units):
    with ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(_read_all, *many_units, seed) for seed in range(8)]:
            done.result()


def test_forked_workers_share_a_cache_that_was_read_before_the_fork(many_units):
    _read_all(*many_units, 0)
    workers = [FORK.Process(target=_read_all, args=(*many_units, seed)) for seed in range(4)]
    for worker in workers:
        worker.start()
    _read_all(*many_units, 5)
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 4


def test_a_cache_goes_to_a_spawned_worker_by_its_folder(many_units):
    cache, samples = many_units
    data = pickle.dumps(cache)
    assert len(data) < 500
    _read_all(pickle.loads(data), samples, 0)


def test_no_more_than_a_few_units_are_open_at_once(many_units):
    before = len(os.listdir("/proc/self/fd"))
    _read_all(*many_units, 0)
    assert len(os.listdir("/proc/self/fd")) <= before + 3


def test_a_cache_may_have_more_units_than_a_process_may_open_files(many_units):
    cache, samples = many_units
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(number) for number in os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 10, before[1]))
    # The numbers that are free below the highest are no way round the limit.
    taken = [os.open("/dev/null", os.O_RDONLY)]
    while taken[-1] < highest:
        taken.append(os.open("/dev/null", os.O_RDONLY))
    try:
        assert len(open_cache(cache.folder).read_many(list(samples))) == cache.positions
    finally:
        for number in taken:
            os.close(number)
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_the_cache_needs_no_torch():
    program = "import sys, harness.teacher.reader, harness.teacher.writer; print({'torch', 'transformers', 'pyarrow'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "set()\n"


# ---- how large, and how exact


def zipf_targets(rng: np.random.Generator, positions: int, vocabulary: int, settings: Settings) -> tuple[Targets, float]:
    """p_rank ~ rank^-s with noise, where most tokens are nearly certain, as in tool calls; and the mean entropy in nats."""
    steep = rng.choice([5.0, 2.5], (positions, 1), p=[0.6, 0.4])
    logits = -steep * np.log(np.arange(1, vocabulary + 1)) + rng.standard_normal((positions, vocabulary))
    logits = -np.sort(-logits, axis=1)
    targets = targets_of(logits, rng.permutation(vocabulary), np.zeros(positions, int), settings, rng)
    return targets, float(targets.entropy.mean())


def test_tool_calling_data_takes_at_most_60_bytes_a_token(tmp_path):
    header = header_of(131_072, floor=8, cap=64)
    targets, entropy = zipf_targets(np.random.default_rng(0), 250, header.vocabulary, header.settings)
    write_unit(tmp_path, header, 0, {key_of(0): targets})
    cache = open_cache(tmp_path)
    print(f"{entropy:.2f} nats, {targets.counts.mean():.1f} ids, {cache.bytes / cache.positions:.1f} bytes a token")
    # Not easier than what shared/research/distillation.md 2.3 calls SFT-like: 0.55 nats.
    assert entropy > 0.55
    assert cache.bytes / cache.positions <= 60
    assert len(encode_block(targets, header.id_bits)) / len(targets) == pytest.approx(7 + targets.counts.mean() * (2 + 17 / 8), rel=1e-3)


def test_a_teacher_that_meets_itself_in_the_cache_has_no_divergence(tmp_path):
    header, rng = header_of(4000, floor=8, cap=64), np.random.default_rng(1)
    targets, _ = zipf_targets(rng, 400, 4000, header.settings)
    write_unit(tmp_path, header, 0, {key_of(0): targets})
    found = open_cache(tmp_path).read(key_of(0))
    kept = np.arange(found.ids.shape[1]) < found.counts[:, None]
    truth = np.append(np.where(kept, targets.logprobs[:, : kept.shape[1]], 0), targets.log_tail[:, None], 1).astype(np.float64)
    stored = np.append(np.where(kept, found.logprobs, -np.inf), found.log_tail[:, None], 1).astype(np.float64)
    mass = np.exp(stored)
    divergence = np.where(mass > 0, mass * (np.where(mass > 0, stored, 0) - truth), 0).sum(1)
    assert divergence.min() > -1e-6 and divergence.mean() < 2e-8
    as_fp16 = np.exp(truth.astype(np.float16).astype(np.float64))
    present = np.append(kept, np.full((400, 1), True), 1)

    def gradient_error(q):
        return np.sqrt(np.square(np.where(present, q - np.exp(truth), 0)).sum(1).mean())

    assert gradient_error(mass) < gradient_error(as_fp16) / 2


@needs_shared
def test_a_real_teacher_on_real_text_comes_back_from_the_disk(tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(STORIES), AutoModelForCausalLM.from_pretrained(STORIES, dtype=torch.float32)
    header = header_of(len(tokenizer), floor=8, cap=64)
    samples, golds = {}, {}
    for row in json.loads(XLAM.read_text())[:24]:
        ids = tokenizer("Once upon a time, a girl said: " + row["query"])["input_ids"][:512]
        labels = [-100, *ids[1:]]
        with torch.no_grad():
            logprobs = model(torch.tensor([ids])).logits[0, :-1, : header.vocabulary].double().log_softmax(-1)
        values, order = logprobs.sort(dim=-1, descending=True)
        key, gold = sample_key(ids, labels), logprobs[torch.arange(len(ids) - 1), ids[1:]].numpy()
        counts = ((values.exp().cumsum(-1) < 0.99).sum(-1) + 1).clamp(8, 64).numpy()
        tails = [float(row[n:].logsumexp(-1)) for row, n in zip(values, counts, strict=True)]
        samples[key] = Targets(
            counts.astype(np.uint8),
            order[:, :64].int().numpy(),
            values[:, :64].float().numpy(),
            np.array(tails, np.float32),
            -(logprobs.exp() * logprobs).sum(-1).float().numpy(),
            gold.astype(np.float32),
            np.zeros((len(ids) - 1, 0), np.int32),
        )
        golds[key] = gold
    write_unit(tmp_path, header, 0, samples)
    cache = open_cache(tmp_path)
    for key, targets in samples.items():
        found = cache.read(key)
        assert_same(found, targets)
        assert abs(found.gold.mean() - golds[key].mean()) < 1e-4
    counts = np.concatenate([targets.counts for targets in samples.values()])
    print(f"{cache.positions} tokens, {counts.mean():.1f} ids, {cache.bytes / cache.positions:.1f} bytes a token")
    # A head is at least 8 ids of 9 bits with 2 bytes each, and 7 bytes beside it; at most 64 of them.
    assert 7 + 8 * 3.125 < cache.bytes / cache.positions < 7 + 64 * 3.125
