"""The ledger keeps what it has confirmed, whatever happens to the process or to the disk."""

import errno
import json
import math
import os

import pytest

from harness.checkpoint.ledger import Ledger, read_ledger
from harness.errors import CheckpointError


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ledger.jsonl"


def steps(path):
    return [event["step"] for event in read_ledger(path)]


def test_events_are_read_as_they_were_written_over_several_lives(path):
    assert read_ledger(path) == []
    assert Ledger(path, 1).append("committed", step=10, reason="interval", bytes=412, save_s=1.5)
    assert Ledger(path, 2).append("life_began", world_size=2, backend="ddp", resumed_from=10)
    assert Ledger(path, None).append("retired", step=10)
    first, second, third = read_ledger(path)
    assert {key: first[key] for key in first if key != "time"} == {
        "attempt": 1,
        "event": "committed",
        "step": 10,
        "reason": "interval",
        "bytes": 412,
        "save_s": 1.5,
    }
    assert (second["attempt"], second["backend"], third["attempt"]) == (2, "ddp", None)
    assert first["time"] <= second["time"] <= third["time"]


def test_what_is_not_finite_stays_readable_for_every_json_reader(path):
    Ledger(path, 1).append("skipped_step", step=3, value=math.nan, window=[1.0, -math.inf])
    [event] = [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]
    assert math.isnan(float(event["value"])) and float(event["window"][1]) == -math.inf


def test_a_line_that_was_torn_at_any_byte_is_left_out_and_the_next_one_does_not_glue_to_it(path):
    ledger = Ledger(path, 1)
    ledger.append("committed", step=1)
    kept = path.stat().st_size
    ledger.append("committed", step=2, reason="ü")
    line = path.read_bytes()[kept:]
    for end in range(len(line)):
        os.truncate(path, kept)
        with open(path, "ab") as file:
            file.write(line[:end])
        assert steps(path) == [1], end
        Ledger(path, 2).append("committed", step=3)
        assert steps(path) == [1, 3], end


@pytest.mark.parametrize("length", [4095, 4096, 4097, 20_000])
def test_a_torn_line_may_be_long(path, length):
    Ledger(path, 1).append("committed", step=1)
    with open(path, "ab") as file:
        file.write(b"x" * length)
    Ledger(path, 2).append("committed", step=2)
    assert steps(path) == [1, 2]


def test_a_first_line_that_was_torn_leaves_an_empty_ledger(path):
    path.write_bytes(b'{"time": 17600')
    assert read_ledger(path) == []
    Ledger(path, 1).append("committed", step=1)
    assert steps(path) == [1]


@pytest.mark.parametrize(
    "line", ["", "{", "[]", "3", '{"event": "committed"}', '"event time"', "\0\0\0", '{"time": 1.0, "evEnt": "committed"}']
)
def test_a_line_in_the_middle_that_is_no_event_is_an_error_and_not_left_out(path, line):
    Ledger(path, 1).append("committed", step=1)
    with open(path, "a") as file:
        file.write(line + "\n")
    Ledger(path, 1).append("committed", step=2)
    with pytest.raises(CheckpointError, match="ledger.jsonl:2: is not an event of a run.*mend the line, or take it out"):
        read_ledger(path)


def test_a_ledger_that_cannot_be_read_is_named(path):
    path.mkdir()
    with pytest.raises(CheckpointError, match="ledger.jsonl: cannot be read: Is a directory"):
        read_ledger(path)


def test_every_event_is_flushed_and_the_folder_when_the_ledger_is_made(path, monkeypatch):
    flushed, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (flushed.append(os.readlink(f"/proc/self/fd/{descriptor}")), fsync(descriptor)))
    ledger = Ledger(path, 1)
    ledger.append("committed", step=1)
    ledger.append("committed", step=2)
    assert flushed == [str(path), str(path.parent), str(path)]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_does_not_take_an_event_ends_nothing_and_gets_it_later(path, monkeypatch, caplog, number):
    ledger = Ledger(path, 1)
    assert ledger.append("committed", step=1)

    def fail(descriptor):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        assert not ledger.append("save_failed", step=2, error="No space left on device")
        assert not ledger.append("save_failed", step=3, error="No space left on device")
        assert steps(path) == [1]
    assert os.strerror(number) in caplog.text and "kept until it can" in caplog.text
    assert ledger.append("committed", step=4)
    assert ledger.append("committed", step=5)
    assert steps(path) == [1, 2, 3, 4, 5]


def test_a_really_full_disk_loses_no_event(path):
    """/dev/full takes no byte."""
    path.symlink_to("/dev/full")
    ledger = Ledger(path, 1)
    assert not ledger.append("save_failed", step=1)
    path.unlink()
    assert ledger.append("committed", step=2)
    assert steps(path) == [1, 2]
