"""Work in several processes: the results of one, in their order, with the first error, and nothing left behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from harness.data import spans
from harness.data.spans import in_order
from harness.errors import DataError, HarnessError


def square(n):
    time.sleep(0.02 * (n % 3 == 0))  # the first of three is the last to be done
    return n * n


OTHERS = set()
"""Processes that tests before this one have left, W&B's for one."""


@pytest.fixture(autouse=True)
def others():
    OTHERS.clear()
    OTHERS.update(psutil.Process().children())


def children():
    return [child for child in psutil.Process().children() if child not in OTHERS]


@pytest.mark.parametrize("processes", [1, 2, 3, None])
def test_results_come_in_the_order_of_the_jobs_whatever_the_number_of_processes(processes, monkeypatch):
    monkeypatch.setattr(spans, "usable_cores", lambda: 2)
    assert list(in_order(square, iter(range(40)), processes)) == [n * n for n in range(40)]
    assert not children()


def test_a_parent_that_handles_sigterm_itself_as_a_run_does_is_not_kept_waiting_by_processes_that_inherit_it():
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        assert list(in_order(square, range(6), 2)) == [n * n for n in range(6)]
        with pytest.raises(DataError):
            list(in_order(refuse, range(6), 2))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not children()


def refuse(n):
    raise DataError(f"row {n} is bad")


def test_few_jobs_start_no_process(monkeypatch):
    monkeypatch.setattr(spans, "usable_cores", lambda: 2)
    here = list(in_order(lambda _: os.getpid(), range(spans.BEFORE_PROCESSES), None))
    assert set(here) == {os.getpid()}
    assert os.getpid() not in set(list(in_order(lambda _: os.getpid(), range(20), None))[spans.BEFORE_PROCESSES :])


def test_large_jobs_and_results_do_not_wait_for_each_other():
    big = b"x" * 3_000_000
    assert all(result == big for result in in_order(lambda job: job, [big] * 12, 2))


def test_no_more_is_read_ahead_than_the_processes_are_busy_with():
    read = []

    def jobs():
        for n in range(1000):
            read.append(n)
            yield n

    for done, _ in enumerate(in_order(square, jobs(), 2), 1):
        assert len(read) <= done + 2 * spans.AHEAD
        if done == 50:
            break


def test_the_first_error_in_the_order_of_the_jobs_is_the_one_that_is_raised():
    def work(n):
        if n in (3, 4):
            time.sleep(0.2 * (n == 3))
            raise DataError(f"row {n} is bad")
        return n

    results = in_order(work, range(20), 2)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(DataError, match="row 3 is bad"):
        next(results)
    assert not children()


def test_what_was_read_before_the_reading_failed_comes_first():
    def jobs():
        yield from range(5)
        raise DataError("the file is torn")

    results = in_order(square, jobs(), 2)
    assert [next(results) for _ in range(5)] == [0, 1, 4, 9, 16]
    with pytest.raises(DataError, match="torn"):
        next(results)


def test_a_bug_shows_where_it_happened():
    with pytest.raises(RuntimeError, match="(?s)test_spans.py.*ZeroDivisionError"):
        list(in_order(lambda n: 1 // n, [0], 2))


@pytest.mark.parametrize("moment", ["at work", "idle"])
def test_a_process_that_is_killed_is_an_error_that_says_what_it_worked_on(moment):
    def work(n):
        if moment == "at work" and n == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return os.getpid()

    def jobs():
        yield from range(5)
        if moment == "idle":
            for child in children():
                child.kill()
                while child.status() != psutil.STATUS_ZOMBIE:  # dead, and not yet looked after by the one who started it
                    time.sleep(0.01)
        yield from range(5, 20)

    with pytest.raises(HarnessError, match=r"\d+: the process in which it was tokenised ended with code -9 \(killed.*data.num_proc"):
        list(in_order(work, jobs(), 2, "tokenised"))
    assert not children()


def test_processes_whose_parent_was_killed_end_by_themselves():
    code = "import os, time; from harness.data.spans import in_order\n"
    code += "def work(n):\n    print(os.getpid(), flush=True)\n    return n\n"
    code += "jobs = (n if n < 2 else time.sleep(60) for n in range(3))\nlist(in_order(work, jobs, 2))"
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])
    pids = [int(parent.stdout.readline()) for _ in range(2)]
    parent.kill()
    parent.wait()
    parent.stdout.close()
    _, alive = psutil.wait_procs([psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)], timeout=30)
    assert not alive
