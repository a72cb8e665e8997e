"""The stop door: files and signals, seen once, for a reason, and gone when they are honoured."""

import os
import signal

import pytest

from harness.checkpoint.door import LOOK_EVERY_S, SIGNALS, Door, Signals
from harness.run import RunDir, StopRequest


@pytest.fixture
def run(tmp_path):
    (tmp_path / "logs" / "attempt-1").mkdir(parents=True)
    return RunDir(tmp_path)


@pytest.fixture
def signals():
    before = {number: signal.getsignal(number) for number in SIGNALS}
    noted = Signals()
    noted.install()
    yield noted
    for number, handler in before.items():
        signal.signal(number, handler)


def look_again(door: Door) -> tuple[bool, bool]:
    door._looked -= LOOK_EVERY_S
    return door.look()


def test_a_stop_file_is_seen_with_its_reason_and_does_not_stop_the_next_life(run):
    door = Door(Signals(), run)
    assert door.look() == (False, False)
    run.stop.write_text("the node goes\n down at noon\n")
    assert look_again(door) == (True, False)
    assert door.reason == "the node goes down at noon"
    door.stopped(run.attempt(1))
    assert not run.stop.exists() and (run.attempt(1) / "STOP").read_text().startswith("the node")
    assert Door(Signals(), run).look() == (False, False)


def test_the_deadline_of_a_stop_file_is_no_part_of_the_reason_and_the_first_request_stands(run):
    StopRequest("preempted", deadline=1700000000.4).write(run.stop)
    StopRequest("time limit", deadline=1800000000).write(run.stop)
    assert StopRequest.read(run.stop) == StopRequest("preempted", 1700000000)
    door = Door(Signals(), run)
    assert door.look() == (True, False) and door.reason == "preempted"
    run.stop.write_text("deadline: tomorrow\n")  # a person's words
    assert StopRequest.read(run.stop) == StopRequest("deadline: tomorrow")


def test_an_empty_save_file_is_enough_and_each_is_honoured_once(run):
    door = Door(Signals(), run)
    for _ in range(2):
        run.save.touch()
        assert look_again(door) == (False, True)
        door.saved()
        assert not run.save.exists() and look_again(door) == (False, False)


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_signal_stops_from_any_rank_and_the_first_is_the_reason(signals, number):
    door = Door(signals, None)  # not rank 0, which alone looks for files
    os.kill(os.getpid(), number)
    os.kill(os.getpid(), signal.SIGUSR2)
    assert door.look() == (True, False) and door.reason == number.name


def test_a_file_that_cannot_be_read_still_stops(run):
    run.stop.mkdir()
    door = Door(Signals(), run)
    assert door.look() == (True, False) and door.reason == "STOP file (Is a directory)"


def test_the_disk_is_asked_no_more_often_than_twice_a_second(run, monkeypatch):
    door = Door(Signals(), run)
    door.look()
    monkeypatch.setattr("harness.checkpoint.door._reason", lambda file: pytest.fail("looked at the disk again at once"))
    assert door.look() == (False, False)
