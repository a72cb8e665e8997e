"""Who is found to stand still, after how long, and who is named: with hearts that are written, a clock and a /proc of the test's own."""

import os
import signal
import subprocess
import sys
import time

import pytest

from harness.recipe.schema import Watchdog as Limits
from harness.run import LAUNCH_VARIABLE, RankReport
from harness.watchdog import LONGEST_LOOK_S, Watchdog, end_processes, process_state, processes_of

LAUNCH = "this-launch"
LIMITS = Limits(start_s=100, first_step_s=60, save_s=80)


class Machine:
    """Ranks 0 and 1 of one machine, whose processes are those that the test says; rank 2 and above are another machine's."""

    def __init__(self, tmp_path, limits=LIMITS):
        self.attempt, self.proc, self.now = tmp_path / "attempt-1", tmp_path / "proc", 1000.0
        self.attempt.mkdir()
        self.ranks = {}
        self.watchdog = Watchdog(limits, LAUNCH, range(2), now=self.now, proc=self.proc)

    def begin(self, *ranks, phase="training"):
        for rank in ranks:
            self.ranks[rank] = RankReport(rank, self.attempt)
            self.enter(phase, rank)

    def enter(self, phase, *ranks):
        for rank in ranks:
            self._write(rank, lambda report: report.enter(phase))

    def beat(self, step, *ranks):
        for rank in ranks:
            self._write(rank, lambda report: report.beat(step))

    def _write(self, rank, act):
        """With a pid and a time of the test's own."""
        patch = pytest.MonkeyPatch()
        with patch.context() as during:
            during.setattr(os, "getpid", lambda: 100 + rank)
            during.setattr(time, "time", lambda: self.now)
            act(self.ranks[rank])
        if not (self.proc / str(100 + rank)).exists():
            self.process(rank)

    def process(self, rank, state="S", launch=LAUNCH):
        folder = self.proc / str(100 + rank)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "stat").write_text(f"{100 + rank} (python (a) b) {state} 1 2 3")
        (folder / "environ").write_text(f"A=b\0{LAUNCH_VARIABLE}={launch}\0" if state != "Z" else "")

    def gone(self, rank):
        for file in (self.proc / str(100 + rank)).iterdir():
            file.unlink()
        (self.proc / str(100 + rank)).rmdir()

    def after(self, seconds, look_every=5.0):
        """The first hang that is found within so many seconds."""
        end, hang = self.now + seconds, self.watchdog.look(self.attempt, self.now)
        while not hang and self.now < end:
            self.now = min(self.now + look_every, end)
            hang = self.watchdog.look(self.attempt, self.now)
        return hang


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


def steps(machine, seconds_each, count=5, first=1):
    for step in range(first, first + count):
        machine.beat(step, 0, 1)
        assert machine.after(seconds_each) is None


@pytest.mark.parametrize(
    ("phase", "limit_s"),
    [
        ("joining the other ranks", 100),
        ("loading model", 100),
        ("resuming: loading weights", 100),
        ("training", 60),  # the first step
        ("evaluating", 60),  # before the first step (eval_on_start)
        ("saving: staging", 80),
        ("verifying checkpoint-20", 80),
        ("exporting", 80),
        ("leaving", 80),
    ],
)
def test_each_phase_has_its_own_limit(machine, phase, limit_s):
    machine.begin(0, 1, phase=phase)
    assert machine.after(limit_s) is None
    hang = machine.after(5)
    assert hang and hang.limit_s == limit_s and f"while {phase}" in hang.text


def test_after_the_first_step_the_limit_is_twenty_median_steps_but_never_below_five_minutes(tmp_path):
    for name, seconds_each, limit_s in (("fast", 2, 300), ("slow", 40, 800)):
        (tmp_path / name).mkdir()
        machine = Machine(tmp_path / name)
        machine.begin(0, 1)
        steps(machine, seconds_each)
        # The last step has been silent for as long as a step takes.
        assert machine.after(limit_s - seconds_each) is None
        assert machine.after(5).limit_s == limit_s


def test_a_limit_of_the_recipes_own_holds_from_the_second_step_on(tmp_path):
    machine = Machine(tmp_path, LIMITS.model_copy(update={"step_s": 7.0}))
    machine.begin(0, 1)
    machine.beat(1, 0, 1)
    assert machine.after(60) is None  # the first step compiles
    machine.beat(2, 0, 1)
    assert machine.after(7, look_every=1) is None
    assert machine.after(1).limit_s == 7


def test_the_first_step_of_a_life_that_continues_is_a_first_step_whatever_its_number(machine):
    machine.begin(0, 1)
    machine.beat(901, 0, 1)
    assert machine.after(60) is None
    assert machine.after(5).limit_s == 60


def test_a_hang_right_after_the_first_step_is_held_to_the_limit_of_a_step_though_nobody_looked_in_between(tmp_path):
    machine = Machine(tmp_path, LIMITS.model_copy(update={"step_s": 7.0}))
    machine.begin(0, 1)
    assert machine.after(1) is None
    for step in range(901, 918):
        machine.beat(step, 0, 1)
    assert machine.after(7, look_every=1) is None
    assert machine.after(1).limit_s == 7


def test_batches_of_one_step_keep_a_rank_alive(machine):
    machine.begin(0, 1, phase="evaluating")
    for _ in range(20):
        assert machine.after(50) is None
        machine.beat(None, 0, 1)


def test_time_in_which_the_watchdog_itself_stood_still_is_not_counted(machine):
    machine.begin(0, 1)
    steps(machine, 2)
    machine.now += 8 * 3600  # the laptop slept; the ranks have not beaten since
    assert machine.watchdog.look(machine.attempt, machine.now) is None
    assert machine.after(300 - 2 * LONGEST_LOOK_S) is None
    assert machine.after(60) is not None


def test_while_one_rank_saves_the_others_may_wait_as_long(machine):
    machine.begin(0, 1)
    machine.enter("saving: hashing", 0)
    assert machine.after(80) is None  # rank 1 has waited for longer than a first step may take
    assert machine.after(5).limit_s == 80


# ---- who is named


@pytest.mark.parametrize(
    ("state", "says"),
    [("T", "is stopped (SIGSTOP)"), ("t", "debugger"), ("D", "held in the kernel"), ("Z", "has ended"), ("gone", "is gone")],
)
def test_a_process_that_cannot_run_is_the_culprit_whatever_the_hearts_say(machine, state, says):
    machine.begin(0, 1)
    machine.beat(5, 0)
    machine.beat(6, 1)
    machine.gone(1) if state == "gone" else machine.process(1, state)
    hang = machine.after(70)
    assert hang.culprit.rank == 1 and says in hang.why
    assert f"rank 1 on {machine.ranks[1].host} (pid 101)" in hang.text and "while training, step 6" in hang.text


def test_a_stopped_process_comes_before_one_that_waits_for_its_disk(machine):
    machine.begin(0, 1)
    machine.process(0, "D")
    machine.process(1, "T")
    assert machine.after(70).culprit.rank == 1


def test_of_ranks_that_all_run_the_one_that_is_steps_behind_is_named_else_the_one_that_fell_silent_first(machine):
    machine.begin(0, 1)
    machine.beat(7, 0)
    machine.now += 5
    machine.beat(6, 1)
    hang = machine.after(70)
    assert hang.culprit.rank == 1 and "the others are at step 7" in hang.why
    machine.beat(7, 1)
    hang = machine.after(2000)
    assert hang.culprit.rank == 0 and "fell silent first" in hang.why


def test_a_rank_that_never_began_is_named(machine):
    machine.begin(0, phase="joining the other ranks")
    assert machine.after(100) is None
    hang = machine.after(10)
    assert hang.culprit.rank == 1 and hang.text.startswith("no sign of life from rank 1 for ") and "never said" in hang.why


def test_the_rank_of_another_machine_that_all_wait_for_is_named(machine):
    machine.begin(0, 1, 2, 3)
    machine.beat(9, 0, 1, 3)
    machine.beat(8, 2)
    hang = machine.after(70)
    assert hang.culprit.rank == 2 and "the others are at step 9" in hang.why


def test_a_machine_that_cannot_tell_who_it_is_lets_another_speak_first(machine):
    machine.begin(0, 1, 2, 3)
    machine.beat(9, 0, 1, 2, 3)  # another machine may see that its rank 2 is stopped
    assert machine.after(70) is None
    assert "the cause may be on another machine" in machine.after(5).why
    machine.process(1, "T")
    machine.beat(9, 0, 1)
    assert machine.after(65).culprit.rank == 1  # of its own ranks it knows at once


def test_a_machine_waits_for_the_save_of_another_one(machine):
    machine.begin(0, 1, 2)
    machine.beat(9, 0, 1, 2)
    machine.enter("saving: hashing", 2)
    assert machine.after(80) is None
    assert machine.after(20).limit_s == 80
    machine.enter("finished", 2)  # it has left: nobody waits for it
    machine.beat(10, 0, 1)
    steps(machine, 2, first=11)
    assert machine.after(310).limit_s == 300


# ---- the way out


def test_a_rank_that_has_left_is_not_missed_and_one_that_does_not_leave_is(machine):
    machine.begin(0, 1, phase="finished")
    machine.gone(0)
    assert machine.after(80) is None
    hang = machine.after(5)
    assert hang.culprit.rank == 1 and "while finished" in hang.text
    machine.gone(1)
    assert machine.after(1000) is None


def test_a_stranger_that_has_got_the_pid_of_a_rank_is_not_taken_for_it(machine):
    machine.begin(0, 1, phase="finished")
    machine.gone(0)
    machine.process(1, launch="somebody else's")
    assert machine.after(1000) is None


# ---- real processes

RANK = """
import os, sys, time
from pathlib import Path
from harness.run import RankReport
from harness.watchdog import register_stack_dump
rank, attempt = int(sys.argv[1]), Path(sys.argv[2])
def where_it_waits():
    time.sleep(600)
if rank != 2:
    register_stack_dump(attempt / f"rank-{rank}.log")
RankReport(rank, attempt).enter("training")
where_it_waits()
"""


def test_the_stacks_of_all_ranks_are_shown_and_every_process_of_the_launch_ends(tmp_path):
    attempt = tmp_path / "attempt-1"
    attempt.mkdir()
    launch = f"test-{os.getpid()}"
    environment = {**os.environ, LAUNCH_VARIABLE: launch}
    ranks = [
        subprocess.Popen([sys.executable, "-c", RANK, str(rank), str(attempt)], env=environment, start_new_session=True)
        for rank in range(3)
    ]
    stranger = subprocess.Popen(["sleep", "60"])
    # What a rank has started and left behind: of no session and no parent of the launch's.
    subprocess.run(["sh", "-c", "setsid sleep 600 &"], env=environment, check=True)
    try:
        deadline = time.monotonic() + 60
        while len(list(attempt.glob("alive/rank-?.json"))) < 3:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.kill(ranks[1].pid, signal.SIGSTOP)
        while process_state(ranks[1].pid) != "T":
            time.sleep(0.02)
        watchdog = Watchdog(Limits(first_step_s=3), launch, range(3), now=0)
        assert watchdog.look(attempt, 0.0) is None
        hang = watchdog.look(attempt, 5.0)
        assert hang.culprit.rank == 1 and hang.culprit.pid == ranks[1].pid
        text = watchdog.write_stacks(hang, attempt).read_text()
        assert hang.text in text and "process state T" in text
        stacks = text.split("---- stacks of ")
        assert "where_it_waits" in stacks[1] and stacks[1].startswith("rank 0")
        assert "could not write them" in stacks[2]  # stopped
        assert "could not write them" in stacks[3] and ranks[2].poll() is None  # not ready for the signal, and not ended by it
        assert len(processes_of(launch)) == 4
        assert end_processes(launch) == set() and processes_of(launch) == set()
        assert [rank.wait(5) for rank in ranks] == [-signal.SIGKILL] * 3
        assert process_state(stranger.pid) == "S"
    finally:
        end_processes(launch)
        stranger.kill()
        stranger.wait()
