"""A process's own job, as seen from inside it: whether Slurm means to take it, by when, and what is asked of Slurm for it.

A signal may be lost, and a preemption without a user signal is told to the tasks alone, so Slurm is asked as well (`look`). Whatever it is,
time limit, preemption, cancellation, a signal of unknown cause, becomes one thing: `taken`, and the run's STOP file with a reason and a
deadline. The first answer counts; after it only a cancellation or a requeue by somebody else is news.
"""

import contextlib
import functools
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness.cluster import slurm
from harness.cluster.array import element_id
from harness.cluster.decision import FROM_SLURM, Taken
from harness.errors import ClusterError
from harness.life import say
from harness.run import StopRequest

LEAVE_BEFORE_S = 5.0
"""So long before its deadline a job is to leave, because it must be requeued before Slurm ends it."""
KILL_WAIT_S = 30.0
"""Slurm's default, where scontrol may not be asked."""
ENDING = slurm.ENDED | {"COMPLETING", "PENDING"}
"""What Slurm says of a job whose processes it ends. (SIGNALING, SUSPENDED and others say nothing of that.)"""
USERS_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2)
PATIENCE_S = 300.0
SLURMS_SLACK_S = 90.0
"""Slurm may send the signal before a time limit up to a minute early, and looks at its jobs every half."""


class OwnJob:
    """`environment` is the batch script's, `lead_s` the time between its --signal and its end, `stop` the run's STOP file."""

    def __init__(self, environment: dict[str, str], lead_s: float, stop: Path):
        self.id = element_id(environment)
        self.restart = int(environment.get("SLURM_RESTART_COUNT", 0))
        self.hosts = slurm.hostnames(environment["SLURM_JOB_NODELIST"])
        self.taken: Taken | None = None
        self.deadline: float | None = None
        """When Slurm ends what is still there, in unix seconds."""
        self.looked = float("-inf")
        """When Slurm was asked last."""
        self._partition = environment.get("SLURM_JOB_PARTITION", "")
        self._lead_s, self._stop = lead_s, stop

    @property
    def must_leave(self) -> bool:
        return self.deadline is not None and time.time() > self.deadline - LEAVE_BEFORE_S

    def look(self, number: signal.Signals | None = None) -> None:
        """Ask Slurm whether it takes this job; `number` is a signal that says so."""
        self.looked = time.monotonic()
        job, now = None, time.time()
        try:
            job = slurm.find_job(self.id, patience_s=slurm.SHORT_S)
        except ClusterError as error:
            say(f"warning: {error}")
        if self.taken:
            self._look_again(job, now)
            return
        left_s = job.ends - now if job and job.ends else float("inf")
        at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(now + left_s)) if left_s < float("inf") else ""
        if job and job.restarts > self.restart:
            self._take(_REQUEUED, now + self.grace_s())
        elif job and job.state in ENDING and is_preempted(job):
            self._take(Taken("preempted, without any grace"), now + self.grace_s())
        elif job and job.state in ENDING:
            self._take(_ended(job), now + self.grace_s())
        elif job and is_preempted(job):
            self._take(Taken(f"preempted: the nodes go to another job at {at}"), now + left_s)
        elif left_s < self._lead_s or number in USERS_SIGNALS and left_s < self._lead_s + SLURMS_SLACK_S:
            self._take(Taken(f"time limit: the job ends at {at}"), now + left_s)
        elif number:
            self._take(Taken(f"{number.name} to the job"), now + (self._lead_s if number in USERS_SIGNALS else self.grace_s()))

    def _look_again(self, job: slurm.SlurmJob | None, now: float) -> None:
        """Somebody may cancel or requeue it while it saves; at its deadline Slurm ends it anyhow."""
        if job and job.restarts > self.restart:
            self.taken = _REQUEUED
        elif job and job.state in ENDING and now < self.deadline - 1 and not is_preempted(job):
            self.taken = _ended(job)

    def _take(self, taken: Taken, deadline: float) -> None:
        self.taken, self.deadline = taken, deadline
        say(f"{taken.why}; the run is asked to save and leave")
        try:
            StopRequest(FROM_SLURM + taken.why, deadline).write(self._stop)
        except OSError as error:
            say(f"warning: {self._stop}: cannot be written ({error.strerror}); the last checkpoint stands")

    @functools.cache  # noqa: B019 - one job lives as long as its process
    def grace_s(self) -> float:
        """From a signal to its processes until Slurm kills them, if nothing better is known."""
        with contextlib.suppress(ClusterError):
            return max(slurm.grace_s(self._partition) or 0, slurm.kill_wait_s())
        return KILL_WAIT_S

    # ---- what is asked of Slurm

    def patiently(self, ask: Callable[[], Any]) -> Any:
        """Slurm's controller may be away for minutes, and is asked until it answers, or until this job must go."""
        until = time.monotonic() + PATIENCE_S
        while True:
            try:
                return ask()
            except slurm.NoAnswer as error:
                if self.must_leave or time.monotonic() > until:
                    raise
                say(f"warning: {error}; asked again")
                time.sleep(2)

    def comment(self, text: str) -> None:
        """For `squeue -o %k`. A courtesy: where it is forbidden nobody is told again."""
        with contextlib.suppress(ClusterError):
            slurm.comment_job(self.id, text)

    def requeue(self) -> None:
        """Raises ClusterError where that may not be done from here, unless Slurm has obeyed and could not say so."""
        try:
            self.patiently(lambda: slurm.requeue_job(self.id))
        except ClusterError:
            with contextlib.suppress(ClusterError):
                job = slurm.find_job(self.id)
                if job and job.restarts > self.restart:
                    return
            raise

    def send_successor(self, script: Path, exclude: list[str]) -> str:
        """Send the script again, to begin when this job has ended, on other nodes than `exclude`. Returns the successor's id."""
        flags = [f"--dependency=afterany:{self.id}", *([f"--exclude={','.join(exclude)}"] if exclude else [])]
        return self.patiently(lambda: slurm.submit_script(script, *flags))


_REQUEUED = Taken("the job was requeued", is_requeued=True)


def _ended(job: slurm.SlurmJob) -> Taken:
    return Taken(f"Slurm ends this job (its state is {job.state})", cancelled=True)


def is_preempted(job: slurm.SlurmJob) -> bool:
    """In its present life, that is."""
    return job.preempted is not None and job.preempted >= (job.started or 0)
