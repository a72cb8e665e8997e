"""Work on a stream of rows in several processes, in order and in bounded memory.

    in_order(work, jobs, processes)     work(job) of every job, in the order of the jobs

A job is a span of neighbouring rows, cut without regard to the number of processes, so that what is made of the rows does not depend on it.
Memory holds the jobs that are being worked on and the results that wait for an earlier one, at most AHEAD for each process.

Promises. The results are those of one process, whatever the number. The first error, in the order of the jobs, is raised, and the processes
are gone then. A process that is killed is an error that says what it was working on. One whose parent was killed ends by itself.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import TypeVar

from harness.errors import HarnessError

Job, Result = TypeVar("Job"), TypeVar("Result")

MOST_PROCESSES = 8  # unless more are asked for
BEFORE_PROCESSES = 4  # jobs that are done here first: starting processes costs more than so little work
AHEAD = 4


def usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_order(work: Callable[[Job], Result], jobs: Iterable[Job], processes: int | None, doing: str = "worked on") -> Iterator[Result]:
    """processes: left out, as many as there are cores, at most MOST_PROCESSES, once a few jobs are done here. doing: what is done to a job,
    for the error of a process that is killed; a job says what it is by `str`.

    Processes are forked, so that `work` and what hangs on it are not copied; where that cannot be, all is done here.
    """
    jobs = iter(jobs)
    if processes is None:
        processes = min(usable_cores(), MOST_PROCESSES)
        for _, job in zip(range(BEFORE_PROCESSES), jobs, strict=False):
            yield work(job)
    if processes == 1 or sys.platform != "linux":
        yield from map(work, jobs)
    else:
        with _Pool(work, processes, doing) as pool:
            yield from pool.results(jobs)


class _Pool:
    """A process is sent its next job when it has handed back the last one, so that neither side ever waits for the other to read."""

    def __init__(self, work: Callable, processes: int, doing: str):
        self._work, self._most, self._doing = work, processes, doing
        self._processes: dict[Connection, multiprocessing.Process] = {}
        self._busy: dict[Connection, tuple[int, object]] = {}

    def __enter__(self) -> _Pool:
        return self

    def __exit__(self, *_: object) -> None:
        for connection, process in self._processes.items():
            connection.close()
            process.kill()  # they hold nothing; a handler of SIGTERM that they have from their parent, as a run's, would not end them
        for process in self._processes.values():
            process.join()

    def results(self, jobs: Iterator) -> Iterator:
        numbered, done, following, ended = enumerate(jobs), {}, 0, None
        while True:
            while ended is None and len(self._busy) + len(done) < self._most * AHEAD and (idle := self._idle()):
                try:
                    number, job = next(numbered)
                except StopIteration:
                    ended = False
                except Exception as error:  # in the reading: what was read before comes first
                    ended = error
                else:
                    self._send(idle, number, job)
            if following in done:
                result = done.pop(following)
                following += 1
                if isinstance(result, Exception):
                    raise result
                yield result
            elif self._busy:
                for connection in wait(list(self._busy)):
                    number, result = self._receive(connection)
                    done[number] = result
            elif ended:
                raise ended
            else:
                return

    def _idle(self) -> Connection | None:
        if len(self._processes) < self._most:
            context = multiprocessing.get_context("fork")
            ours, theirs = context.Pipe()
            inherited = [ours, *self._processes]  # while a sibling holds our end, a process would not see that its parent is gone
            process = context.Process(target=_serve, args=(theirs, inherited, self._work), daemon=True)
            process.start()
            theirs.close()
            self._processes[ours] = process
            return ours
        return next((connection for connection in self._processes if connection not in self._busy), None)

    def _send(self, connection: Connection, number: int, job: object) -> None:
        self._busy[connection] = (number, job)
        with suppress(OSError):  # it was killed while it was idle; receiving says so
            connection.send(job)

    def _receive(self, connection: Connection) -> tuple[int, object]:
        number, job = self._busy.pop(connection)
        try:
            return number, connection.recv()
        except (EOFError, OSError):
            process = self._processes[connection]
            process.join()
            killed = " (killed; most often for memory: lower data.num_proc)" if process.exitcode == -9 else ""
            return number, HarnessError(f"{job}: the process in which it was {self._doing} ended with code {process.exitcode}{killed}")


def _serve(connection: Connection, inherited: list[Connection], work: Callable) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # their parent sees it, and ends them
    gc.freeze()  # or the first collection writes to every object of the parent, and so makes a copy of its memory
    for other in inherited:
        other.close()
    while True:
        try:
            job = connection.recv()
        except EOFError:
            return
        try:
            result = work(job)
        except HarnessError as error:
            result = error
        except Exception:  # a bug: the parent shows where it happened
            result = RuntimeError(traceback.format_exc())
        try:
            connection.send(result)
        except BrokenPipeError:
            return
