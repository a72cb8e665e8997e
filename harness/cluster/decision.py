"""What follows when a life of a run has ended under Slurm: pure, from what the run's files say, and never from srun's exit code.

    done      the run is complete
    again     begin a life in the same allocation, without the queue
    requeue   give the nodes back and wait for others
    stop      leave it to a person

A death, a hang, a rollback and a lost node are tried again, in the allocation first, and on other nodes when that brought nothing; what
Slurm takes away is requeued; an error of the recipe, the data or the code stops at once, and so does a run that gets nowhere: so many lives
in a row without a newer commit (where units are done: without a unit), whoever ended them (a time limit that is shorter than the loading
would go on for ever), or too many jobs.
"""

import signal
from collections.abc import Container, Iterable
from dataclasses import dataclass
from typing import Literal

from harness.cluster.schema import Restarts
from harness.errors import Stopped
from harness.failures import Failure
from harness.life import FRUITLESS_LIVES, stopped_where

FRUITLESS_HERE = 2
"""So many lives in a row of one job may get nowhere; what keeps them may be the node, which a next job's pre-flight sees."""
FROM_SLURM = "slurm: "
"""With this begins the reason of a STOP file that no person has written."""


@dataclass(frozen=True)
class Taken:
    """Slurm takes the nodes away: time limit, preemption, somebody's SIGUSR1."""

    why: str
    cancelled: bool = False
    """The job is not to go on."""
    is_requeued: bool = False
    """Slurm has put the job into the queue again by itself."""


@dataclass(frozen=True)
class Decision:
    action: Literal["done", "again", "requeue", "stop"]
    why: str
    exit_code: int = 0
    exclude: tuple[str, ...] = ()
    """Nodes that the next job must not get."""


def decide(
    outcome: dict | None, failure: Failure | None, taken: Taken | None, restarts: Restarts, *, lives_here: int, jobs: int, fruitless: int
) -> Decision:
    """outcome: the life's outcome.json, None when nobody could write it; then `failure` says what is known. taken: what Slurm has said of
    the job. lives_here: lives of this allocation; jobs: of the run, this one included; fruitless: see `fruitless_lives`."""
    name = outcome["outcome"] if outcome else None
    if name == "done":
        return Decision("done", "the run is complete")
    if taken and taken.cancelled:
        return Decision("stop", taken.why, Stopped.exit_code)
    if name == "stopped" and not is_slurms(outcome["reason"]):
        return Decision("stop", f"{stopped_where(outcome)}: {outcome['reason']}", Stopped.exit_code)
    if failure and not failure.may_pass:
        return Decision("stop", failure.summary, failure.exit_code)
    if fruitless >= FRUITLESS_LIVES:
        why = f"{fruitless} lives in a row ended without a newer checkpoint or unit; the last: {_end(outcome, failure)}"
        return Decision("stop", why, 1)
    stuck = min(fruitless, lives_here) >= FRUITLESS_HERE
    if not taken and not stuck and lives_here <= restarts.in_allocation:
        return Decision("again", _end(outcome, failure))
    tried = (
        f"{FRUITLESS_HERE} lives in a row got nowhere on these nodes" if stuck else f"it was begun again {lives_here - 1} times in this job"
    )
    why = taken.why if taken else f"{_end(outcome, failure)}; {tried}"
    if jobs > restarts.max_restarts:
        text = f"{why}; the job was requeued {jobs - 1} times, and restarts.max_restarts is {restarts.max_restarts}"
        return Decision("stop", text, Stopped.exit_code if taken else 1)
    return Decision("requeue", why)


def is_slurms(reason: str) -> bool:
    """Whether a life stopped not for a person's STOP but for Slurm's, or for a signal that came to a rank itself (proctrack/linuxproc).

    Where Slurm takes nothing away, that was the SIGTERM by which srun ends a step, and its life is to be begun again.
    """
    return reason.startswith(FROM_SLURM) or reason in signal.Signals.__members__


def is_asked_to_leave(reason: str) -> bool:
    """Whether it is such a signal as somebody sends who wants the nodes."""
    return is_slurms(reason) and ("SIGUSR1" in reason or "SIGUSR2" in reason)


def _end(outcome: dict | None, failure: Failure | None) -> str:
    return outcome["reason"] if outcome else failure.summary


def committing_lives(events: Iterable[dict]) -> set[int]:
    """The numbers of those lives that have committed a newer step than any before, by the ledger's events."""
    newest, fruitful = 0, set()
    for event in events:
        if event["event"] == "committed" and event["step"] > newest:
            newest = event["step"]
            fruitful.add(event["attempt"])
    return fruitful


def fruitless_lives(attempts: Iterable[int], fruitful: Container[int]) -> int:
    """How many of the run's last lives have not brought it on. attempts: the numbers of all lives that have ended."""
    count = 0
    for number in sorted(attempts, reverse=True):
        if number in fruitful:
            break
        count += 1
    return count
