"""What follows on the end of a life: each kind of end, each limit, and which of them counts first."""

import pytest

from harness.cluster.decision import Taken, committing_lives, decide, fruitless_lives, is_asked_to_leave, is_slurms
from harness.cluster.schema import Restarts
from harness.failures import Failure

KILLED = Failure(1, "rank 1 on r2 ended without an error of its own\n(logs: x)")
BUG = Failure(1, "rank 0 on r1 failed while training:\nKeyError: 'labels'\n(logs: x)", may_pass=False)
BAD_RECIPE = Failure(2, "rank 0 on r1 failed while starting:\nDataError: rows.jsonl:7: not a row", may_pass=False)
LIMIT, CANCELLED = Taken("time limit: the job ends at noon"), Taken("cancelled", cancelled=True)
RESTARTS = Restarts(in_allocation=2, max_restarts=5)


def ended(outcome, step=7, reason="why"):
    return {"outcome": outcome, "step": step, "checkpoint": 5, "reason": reason}


@pytest.mark.parametrize(
    ("outcome", "failure", "taken", "counts", "action", "code", "why"),
    [
        (ended("done"), None, None, {}, "done", 0, "complete"),
        # That it was also to be taken away, or got nowhere before, is no matter once it is done.
        (ended("done"), None, LIMIT, {"fruitless": 9, "jobs": 99}, "done", 0, "complete"),
        (ended("stopped", reason="slurm: why"), None, LIMIT, {}, "requeue", 0, "time limit"),
        (ended("stopped", reason="slurm: why"), None, LIMIT, {"lives_here": 99}, "requeue", 0, "time limit"),
        (ended("stopped", reason="cancel: asked by me"), None, None, {}, "stop", 75, "step 7: cancel: asked by me"),
        (ended("stopped", step=None, reason="cancel: asked by me"), None, None, {}, "stop", 75, "stopped between two units: cancel"),
        # A person's word counts, whatever Slurm does meanwhile.
        (ended("stopped", reason="cancel: asked by me"), None, LIMIT, {}, "stop", 75, "cancel: asked by me"),
        # What reaches ranks themselves under proctrack/linuxproc.
        (ended("stopped", reason="SIGTERM"), None, LIMIT, {}, "requeue", 0, "time limit"),
        # srun ended the step, and Slurm knows of nothing.
        (ended("stopped", reason="SIGTERM"), None, None, {}, "again", 0, "SIGTERM"),
        (ended("stopped", reason="slurm: SIGTERM on r1"), None, None, {"lives_here": 3}, "requeue", 0, "SIGTERM on r1"),
        (ended("stopped", reason="slurm: why"), None, CANCELLED, {}, "stop", 75, "cancelled"),
        (None, KILLED, CANCELLED, {}, "stop", 75, "cancelled"),
        (None, KILLED, LIMIT, {}, "requeue", 0, "time limit"),
        (None, KILLED, None, {}, "again", 0, "ended without an error of its own"),
        (ended("hang"), None, None, {"lives_here": 2}, "again", 0, "why"),
        (ended("rolled_back"), None, None, {}, "again", 0, "why"),
        (None, KILLED, None, {"lives_here": 3}, "requeue", 0, "begun again 2 times in this job"),
        (None, BUG, None, {}, "stop", 1, "KeyError: 'labels'"),
        (None, BUG, LIMIT, {}, "stop", 1, "KeyError: 'labels'"),
        (None, BAD_RECIPE, None, {}, "stop", 2, "rows.jsonl:7"),
        (None, KILLED, None, {"fruitless": 3}, "stop", 1, "3 lives in a row ended without a newer checkpoint"),
        (ended("stopped", step=0, reason="slurm: why"), None, LIMIT, {"fruitless": 3}, "stop", 1, "3 lives in a row"),
        (None, KILLED, None, {"fruitless": 2}, "again", 0, ""),
        # What keeps it may be this node.
        (None, KILLED, None, {"fruitless": 2, "lives_here": 2}, "requeue", 0, "2 lives in a row got nowhere on these nodes"),
        (ended("stopped", reason="slurm: why"), None, LIMIT, {"jobs": 5}, "requeue", 0, "time limit"),
        (ended("stopped", reason="slurm: why"), None, LIMIT, {"jobs": 6}, "stop", 75, "requeued 5 times, and restarts.max_restarts is 5"),
        (None, KILLED, None, {"jobs": 6, "lives_here": 3}, "stop", 1, "max_restarts is 5"),
    ],
)
def test_the_end_of_a_life_has_its_consequence(outcome, failure, taken, counts, action, code, why):
    counts = {"lives_here": 1, "jobs": 1, "fruitless": 0} | counts
    decision = decide(outcome, failure, taken, RESTARTS, **counts)
    assert (decision.action, decision.exit_code) == (action, code) and why in decision.why


def test_whose_signal_it_was_is_read_from_the_reason():
    assert is_asked_to_leave("SIGUSR1") and is_asked_to_leave("slurm: SIGUSR2 on r1")
    assert not is_asked_to_leave("slurm: SIGTERM on r1") and not is_asked_to_leave("cancel: no SIGUSR1 came")
    assert not is_slurms("cancel: asked by me") and is_slurms("slurm: time limit")


def test_without_restarts_in_the_allocation_the_first_death_is_requeued():
    assert decide(None, KILLED, None, Restarts(in_allocation=0), lives_here=1, jobs=1, fruitless=0).action == "requeue"


def test_lives_in_a_row_without_a_newer_commit_are_counted_from_the_ledger():
    def committed(life, step):
        return {"event": "committed", "attempt": life, "step": step}

    assert fruitless_lives([], set()) == 0
    assert fruitless_lives([1, 2, 3], set()) == 3
    assert fruitless_lives([1, 2, 3], committing_lives([committed(1, 5)])) == 2
    assert fruitless_lives([1, 2, 3], committing_lives([committed(1, 5), committed(3, 6)])) == 0
    # After a rollback the same steps are committed again: that brings nobody on.
    assert fruitless_lives([1, 2, 3], committing_lives([committed(1, 5), committed(1, 9), committed(2, 7), committed(3, 9)])) == 2
    # A time limit that is shorter than the loading would go on for ever.
    assert fruitless_lives([1, 2, 3], committing_lives([committed(1, 5), {"event": "stopped", "attempt": 2, "step": 5}])) == 2
