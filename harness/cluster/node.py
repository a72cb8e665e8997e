"""The shim: what srun starts on every node, once. It starts this node's ranks and is the only process of the node that Slurm speaks to.

It forwards nothing. SIGUSR1, SIGUSR2 and SIGTERM, which under proctrack/cgroup come to it alone and under linuxproc to every process of the
step, become the run's STOP file, with a deadline; the ranks agree on a step, save and leave. What outlives the deadline is killed, so that
the job has time left to requeue itself. It listens to the ranks' hearts and ends a life that stands still, and one that has been replaced:
after the loss of a node Slurm begins the job elsewhere, though this node may only have lost its slurmd.

    logs/attempt-K/node-I.json   {"index", "host", "began", "code", "oom_kills", "ended_for", "unended", "failed", "time"}: when the
                                 ranks of node I were started and how they ended
    logs/nodes.lock              held by every shim and every launcher: a life begins when it is free on all nodes

The allocation (harness.cluster.allocation) says by the environment which attempt this is and where rank 0 is met.
"""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from harness.cluster import preflight
from harness.cluster.decision import FROM_SLURM
from harness.cluster.schema import load_cluster
from harness.cluster.submission import read_job
from harness.errors import ClusterError
from harness.launcher import Machines
from harness.life import Life, live, noted_signals, say
from harness.recipe import load
from harness.run import RunDir, StopRequest, rank_reports, read_outcome, write_text_atomically
from harness.watchdog import process_state

ADDRESS, PORT, ATTEMPT, OWNER = "HARNESS_NODE_ADDRESS", "HARNESS_NODE_PORT", "HARNESS_NODE_ATTEMPT", "HARNESS_NODE_OWNER"
"""Set by the allocation for its step."""
PROCESSES, GRACE, LEAD = "HARNESS_NODE_PROCESSES", "HARNESS_NODE_GRACE_S", "HARNESS_NODE_LEAD_S"
"""Ranks of each node; the seconds between SIGTERM to the step and its end; and those between a user's signal and the kill."""
VARIABLES = (ADDRESS, PORT, ATTEMPT, OWNER, PROCESSES, GRACE, LEAD)
KILL_BEFORE_S = 10.0
"""So long before the deadline ranks that are still there are ended."""
LOOK_AT_OWNER_EVERY_S = 5.0
PEER_FAILED_S = 5.0
"""When the ranks of another node have failed, these get so long to say what they know."""
PEERS_END_WITHIN_S = 10.0
"""srun kills the other shims as soon as one has failed: so long that one waits for their reports, which may hold the cause."""
LAUNCHER_LEAVES_WITHIN_S = 10.0
"""torch elastic waits for the launchers of the other nodes, up to five minutes, also for one that is dead."""


@dataclass(frozen=True)
class Step:
    """What a node knows of the step that it belongs to."""

    machines: Machines
    attempt: Path
    owner: str
    grace_s: float
    lead_s: float

    @classmethod
    def from_environment(cls, environment: dict[str, str]) -> "Step":
        """Raises ClusterError outside a step of an allocation."""
        missing = [name for name in (*VARIABLES, "SLURM_NODEID", "SLURM_NNODES") if name not in environment]
        if missing:
            raise ClusterError(
                f"harness node: {missing[0]} is not set; a job of `harness submit` starts this on its nodes, a person does not"
            )
        machines = Machines(
            processes=int(environment[PROCESSES]),
            count=int(environment["SLURM_NNODES"]),
            index=int(environment["SLURM_NODEID"]),
            address=environment[ADDRESS],
            port=int(environment[PORT]),
        )
        return cls(machines, Path(environment[ATTEMPT]), environment[OWNER], float(environment[GRACE]), float(environment[LEAD]))


def live_on_node(run: RunDir) -> int:
    """This node's part of one life. Returns 0 when its ranks have ended as they should, so that srun lets the others finish, else 1."""
    step = Step.from_environment(dict(os.environ))
    # Children of the shim are no shims.
    for name in VARIABLES:
        os.environ.pop(name)
    with noted_signals() as signals, open_lock(run) as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        if read_owner(run) != step.owner:
            say(f"the run goes on elsewhere (job {read_owner(run)}), so nothing is started here")
            return 1
        arguments = [part for key in read_job(run)["allowed_changes"] for part in ("--allow-change", key)]
        began = time.time()
        watch, holding = Watch(run, step, signals), [lock.fileno()]
        life = live(load(run.recipe), run, step.machines, arguments, watch, attempt=step.attempt, holding=holding)
        if life.ended_for:
            say(f"{os.uname().nodename}: its processes were ended: {life.ended_for}")
        failed = life.hang is not None or (life.code != 0 and read_outcome(step.attempt) is None)
        write_node_report(step, life, began=began, failed=failed)
        deadline = time.monotonic() + PEERS_END_WITHIN_S
        while failed and len(node_reports(step.attempt)) < step.machines.count and time.monotonic() < deadline:
            time.sleep(0.2)
    return int(failed)


def run_on_node(arguments: list[str]) -> int:
    """`harness ARGUMENTS` in a process of its own, and its exit code in the step's folder: srun's says nothing of a node that was lost."""
    step = Step.from_environment(dict(os.environ))
    code = subprocess.call([sys.executable, "-m", "harness", *arguments])
    write_text_atomically(step.attempt / f"{arguments[0]}.json", json.dumps({"code": code}) + "\n")
    return 0


def check_this_node(run: RunDir) -> int:
    """This node's part of the pre-flight."""
    step, cluster = Step.from_environment(dict(os.environ)), load_cluster(str(run.path / "cluster.yaml"))
    machines = step.machines
    return preflight.check_node(
        run.path,
        cluster,
        folder=step.attempt,
        index=machines.index,
        count=machines.count,
        address=machines.address,
        port=machines.port,
        processes=machines.processes,
    )


class Watch:
    """Turns `signals` into the STOP file, and says when what runs here must be ended: at its deadline, when another node has failed, when
    this life is not the run's any more, and when only the launcher is left of it."""

    def __init__(self, run: RunDir, step: Step, signals: list[signal.Signals]):
        self._run, self._step, self._signals = run, step, signals
        self._looked = time.monotonic()
        self._peer_failed_at: float | None = None
        self._left_at: float | None = None

    def __call__(self, now: float) -> str | None:
        if self._peer_failed_at is None and self._peers_failed():
            self._peer_failed_at = now
        while self._signals:
            number = self._signals.pop(0)
            # srun ends the step, by SIGTERM, when a node has failed: nothing can be saved then.
            if self._peer_failed_at is None:
                self._ask_to_stop(number)
        if self._peer_failed_at is not None and now - self._peer_failed_at > PEER_FAILED_S:
            return "the ranks of another node have failed"
        if self._left_at is None and self._ranks_have_left():
            self._left_at = now
        if self._left_at is not None and now - self._left_at > LAUNCHER_LEAVES_WITHIN_S:
            return "its ranks have left, and their launcher has not"
        request = StopRequest.read(self._run.stop)
        if request and request.deadline and time.time() > request.deadline - KILL_BEFORE_S:
            return f"the deadline of a stop ({request.reason}) has come, and they had not saved"
        if now - self._looked >= LOOK_AT_OWNER_EVERY_S:
            self._looked = now
            owner = read_owner(self._run)
            if owner != self._step.owner:
                return f"the run goes on elsewhere (job {owner})"
        return None

    def _ask_to_stop(self, number: signal.Signals) -> None:
        host = os.uname().nodename
        deadline = time.time() + (self._step.grace_s if number == signal.SIGTERM else self._step.lead_s)
        try:
            StopRequest(f"{FROM_SLURM}{number.name} on {host}", deadline).write(self._run.stop)
            say(f"{number.name}: the run is asked to save and leave")
        except OSError as error:
            say(f"{self._run.stop}: cannot be written ({error.strerror}); the last checkpoint stands")

    def _ranks_have_left(self) -> bool:
        if read_outcome(self._step.attempt) is None:
            return False
        machines = self._step.machines
        first = machines.index * machines.processes
        reports = rank_reports(self._step.attempt, "alive", range(first, first + machines.processes))
        return all(process_state(report["pid"]) in (None, "Z", "X") for report in reports)

    def _peers_failed(self) -> bool:
        return any(report["index"] != self._step.machines.index and report["failed"] for report in node_reports(self._step.attempt))


# ---- what is written


def open_lock(run: RunDir) -> TextIO:
    return open(run.path / "logs" / "nodes.lock", "a+")


def are_nodes_free(run: RunDir) -> bool:
    """Whether no shim and no launcher of any life is left, on any node."""
    with open_lock(run) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def write_node_report(step: Step, life: Life, *, began: float, failed: bool) -> None:
    content = {
        "index": step.machines.index,
        "host": os.environ.get("SLURMD_NODENAME") or os.uname().nodename,
        "began": began,
        "code": life.code,
        "oom_kills": life.oom_kills,
        "ended_for": life.ended_for,
        "unended": len(life.unended),
        "failed": failed,
        "time": time.time(),
    }
    write_text_atomically(step.attempt / f"node-{step.machines.index}.json", json.dumps(content) + "\n")


def node_reports(attempt: Path) -> list[dict]:
    """Of the nodes whose ranks have ended, in the order of time."""
    return sorted((json.loads(path.read_text()) for path in attempt.glob("node-*.json")), key=lambda report: report["time"])


def write_owner(run: RunDir, owner: str) -> None:
    """From now on the run is this job's; whoever had it ends by itself within seconds."""
    (run.path / "logs").mkdir(parents=True, exist_ok=True)
    write_text_atomically(run.path / "logs" / "owner", owner + "\n")


def read_owner(run: RunDir) -> str:
    return (run.path / "logs" / "owner").read_text().strip()
