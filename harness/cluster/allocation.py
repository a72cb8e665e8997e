"""What the batch script of a run becomes: it has the ranks live on the job's nodes, one life after the other, and decides what follows.

    claim the run -> pre-flight on every node -> prepare the data -> lives, each a step of the shim on every node (harness.cluster.node)

It runs on the job's first node and is the process that `#SBATCH --signal=B:USR1@lead` reaches; it also looks at its own job every half
minute (harness.cluster.own_job). What has ended is judged by the run's own files (harness.cluster.decision); a job that ought to go on
requeues itself, because Slurm requeues nobody who left in time. Where `scontrol requeue` is forbidden, and where a node is to be left out
(which a job cannot change in its own life), a successor takes the run over.

    logs/owner            whose run this is, JOB.RESTART: written before the folder's lock is taken, so that a life that Slurm has
                          written off, and that may still run on a lost node, ends by itself
    logs/preflight-JOB.R/ what each node found (harness.cluster.preflight)
    ledger.jsonl          job_began, life_ended, requeued, gave_up: this process writes between lives, rank 0 within them
"""

import contextlib
import errno
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import zlib
from pathlib import Path

from harness.checkpoint.ledger import Ledger, read_ledger
from harness.cluster import node, preflight, slurm
from harness.cluster.decision import (
    FROM_SLURM,
    Decision,
    Taken,
    committing_lives,
    decide,
    fruitless_lives,
    is_asked_to_leave,
    is_slurms,
)
from harness.cluster.dependency import hand_on_waiting
from harness.cluster.own_job import OwnJob
from harness.cluster.render import node_command, srun_command
from harness.cluster.schema import load_cluster
from harness.cluster.secrets import read_secrets
from harness.cluster.status import progress_line
from harness.cluster.submission import is_finished, is_merged, note_job, read_job, since_submitted
from harness.errors import ClusterError, LaunchError, Stopped
from harness.failures import explain_failure
from harness.life import FRUITLESS_LIVES, ended_within, noted_signals, place, say
from harness.recipe import load
from harness.resources import cache_root, code_root
from harness.run import RunDir, StopRequest, read_outcome
from harness.share import read_share, units_done

LOOK_AT_JOB_EVERY_S = 30.0
COMMENT_EVERY_S = 60.0
LOCK_WITHIN_S = 150.0
"""An NFS server takes the lock of a machine that is gone away after a lease of about 90 seconds."""
ENDS_WITHIN_S = 2.0
"""srun has a step killed at once when it is told to end (measured: within a second)."""
PAUSES_S = (5.0, 15.0, 45.0, 90.0, 180.0)
"""Between attempts at a step that Slurm does not start: its controller may fail over."""
PASSING = {errno.ESTALE, errno.EIO, errno.ETIMEDOUT, errno.ENOTCONN, errno.EHOSTDOWN, errno.EAGAIN}
"""What a shared disk that fails for a moment says. A full disk, or one that may not be written, stays so."""
FIRST_PORT, PORTS = 20000, 12000
"""Below Linux's range for outgoing connections."""


class Allocation:
    """One job, from its begin to its end. `environment` is the batch script's."""

    def __init__(self, run: RunDir, environment: dict[str, str]):
        if "SLURM_JOB_ID" not in environment:
            raise ClusterError("harness allocation: SLURM_JOB_ID is not set; a job of `harness submit` starts this, a person does not")
        self.run, self.recipe, self.cluster = run, load(run.recipe), load_cluster(str(run.path / "cluster.yaml"))
        self.submitted, self.share = read_job(run), read_share(run)
        self.job = OwnJob(environment, self.cluster.signal_lead_s, run.stop)
        self.owner = f"{self.job.id}.{self.job.restart}"
        self.lives = 0
        self._ledger = Ledger(run.ledger, None)
        self._signals: list[signal.Signals] = []
        self._commented = self._looked_at_owner = float("-inf")
        self._comment = ""

    def main(self) -> int:
        """Returns the exit code of the job."""
        with noted_signals() as self._signals:
            if self.cluster.secrets:
                os.environ.update(read_secrets(self.cluster.secrets))
            try:
                decision = self.work()
            except OSError as error:
                what = f"{error.filename or self.run.path}: {error.strerror or error}"
                # The ledger, which counts jobs, may be on that disk.
                if error.errno not in PASSING or self.job.restart >= self.cluster.restarts.max_restarts:
                    raise ClusterError(f"{what}; when it is mended: {self.to_go_on}") from error
                decision = Decision("requeue", what)
            return self.carry_out(decision)

    def work(self) -> Decision:
        """What this job does for the run, and what follows."""
        if not self.claim():
            return self.leave()
        self.ledger().append("job_began", job=self.job.id, restart=self.job.restart, hosts=list(self.job.hosts))
        decision = self.may_begin()
        if decision is None and not is_finished(self.run, self.recipe, merge=False):
            decision = self.preflight() or self.prepare_data() or self.live()
        if decision is None or decision.action == "done":
            decision = self.merge() or Decision("done", f"the run is complete: {place(self.run) if self.share else self.run.final}")
        return decision

    # ---- before the first life

    def claim(self) -> bool:
        """Make the run this job's, and hold its folder. False when Slurm takes the job meanwhile."""
        node.write_owner(self.run, self.owner)
        if not self.wait_until_free():
            return False
        self.withdraw_stop()
        return True

    def wait_until_free(self) -> bool:
        """Until this job holds the folder, and no process of an earlier life can write any more: srun returns when a node has failed,
        though ranks may run on there. False when Slurm takes the job meanwhile. Raises ClusterError when somebody keeps the run for
        longer than a dead machine could."""
        deadline = time.monotonic() + LOCK_WITHIN_S
        while (held_by := self.try_to_hold()) is not None:
            self.watch()
            if self.job.taken:
                return False
            if time.monotonic() > deadline:
                raise ClusterError(f"{held_by}; when that has ended: {self.to_go_on}")
            time.sleep(0.2)
        return True

    def try_to_hold(self) -> str | None:
        """Who keeps the run from this job; None when nobody does."""
        try:
            self.run.hold()
        except LaunchError as error:
            return str(error)
        if not node.are_nodes_free(self.run):
            return f"{self.run.path}: processes of an earlier life still run on some node, and hold logs/nodes.lock"
        return None

    def may_begin(self) -> Decision | None:
        """Asked here as well as after each life, because a job that Slurm requeued for a lost node could decide nothing."""
        self.watch()
        if self.job.taken:
            return self.leave()
        request = StopRequest.read(self.run.stop)
        if request:
            # A person's, made while the job waited.
            self.run.stop.unlink()
            return Decision("stop", request.reason, Stopped.exit_code)
        fruitless, jobs, _ = self.history()
        if fruitless >= FRUITLESS_LIVES:
            return Decision("stop", f"{fruitless} lives in a row ended without a newer checkpoint or unit", 1)
        if jobs - 1 > self.cluster.restarts.max_restarts:
            return Decision(
                "stop", f"the job was requeued {jobs - 1} times, and restarts.max_restarts is {self.cluster.restarts.max_restarts}", 1
            )
        return None

    def preflight(self) -> Decision | None:
        if not self.cluster.preflight:
            return None
        folder = self.run.path / "logs" / f"preflight-{self.owner}"
        folder.mkdir(parents=True, exist_ok=True)
        most_s = preflight.START_S + preflight.DEADLINE_S
        if (
            not self.step(len(self.job.hosts), ["node", str(self.run.path), "--preflight"], folder, "begun-*", most_s=most_s)
            or self.job.taken
        ):
            return self.leave()
        findings = preflight.judge(folder, self.job.hosts, self.cluster)
        say(preflight.render_findings(findings))
        failed = [finding for finding in findings if finding.level == "fail"]
        why = "; ".join(f"{finding.host}: {finding.what}" for finding in failed)
        bad = {finding.host for finding in failed if finding.blames_node}
        if not failed:
            return None
        if not bad or any(not finding.blames_node for finding in failed):
            return Decision("stop", f"the pre-flight failed: {why}", 1)
        return self.replace_nodes(bad, why)

    def replace_nodes(self, bad: set[str], why: str) -> Decision:
        excluded = self.excluded()
        budget = self.cluster.restarts.exclude_nodes
        if len(excluded | bad) > budget:
            return Decision("stop", f"bad nodes: {why}; restarts.exclude_nodes is {budget}, and {len(excluded)} were left out before", 1)
        return Decision("requeue", why, exclude=tuple(sorted(excluded | bad)))

    def excluded(self) -> set[str]:
        """Nodes that the run leaves out since it was submitted."""
        return {host for event in self.history()[2] if event["event"] == "requeued" for host in event["exclude"]}

    def prepare_data(self) -> Decision | None:
        """On one node, in a process of its own: this one stays small. It takes seconds when the rows lie in the cache already."""
        say("preparing the data")
        # A teacher is asked about samples, however a student packs them.
        unpacked = ["data.packing=false"] if self.share else []
        return self.have_done("prepare", str(self.run.recipe), *unpacked)

    def have_done(self, *arguments: str) -> Decision | None:
        """Have one node do `harness ARGUMENTS`. None when that has succeeded."""
        folder = self.run.path / "logs" / f"{arguments[0]}-{self.owner}"
        folder.mkdir(exist_ok=True)
        result = folder / f"{arguments[0]}.json"
        result.unlink(missing_ok=True)
        if not self.step(1, ["node", str(self.run.path), "--", *arguments], folder, result.name) or self.job.taken:
            return self.leave()
        code = json.loads(result.read_text())["code"]
        if code < 0:
            return Decision("requeue", f"`harness {arguments[0]}` was ended by {signal.Signals(-code).name}")
        return None if code == 0 else Decision("stop", f"`harness {arguments[0]}` failed; the reason stands above", code)

    # ---- lives

    def live(self) -> Decision:
        while (decision := self.live_once()).action == "again":
            say(f"{decision.why}\na new life begins in this job: {place(self.run)}")
        return decision

    def live_once(self) -> Decision:
        if not self.wait_until_free():
            return self.leave()
        attempt = self.run.open_attempt()
        self.lives += 1
        say(f"{attempt.name} begins on {', '.join(self.job.hosts)}")
        if not self.step(len(self.job.hosts), ["node", str(self.run.path)], attempt, "*/rank-*.json", "node-*.json"):
            return self.leave()
        outcome, failure, reports = read_outcome(attempt), None, node.node_reports(attempt)
        if outcome is None:
            code = next((report["code"] for report in reports if report["code"]), 0)
            failure = explain_failure(attempt, code, sum(report["oom_kills"] for report in reports))
        self.job.look()
        asked = self.asked_by_a_person(attempt)
        if asked and outcome and outcome["outcome"] == "stopped":
            outcome |= {"reason": asked}
        if outcome and outcome["outcome"] == "stopped" and is_asked_to_leave(outcome["reason"]):
            self.job.taken = self.job.taken or Taken(outcome["reason"])
        if not self.job.taken:
            self.withdraw_stop()
        fruitless, jobs, _ = self.history()
        decision = decide(outcome, failure, self.job.taken, self.cluster.restarts, lives_here=self.lives, jobs=jobs, fruitless=fruitless)
        stuck = [report["host"] for report in reports if report["unended"]]
        if decision.action == "again" and stuck:
            decision = Decision("requeue", f"{decision.why}; there are processes on {', '.join(stuck)} that cannot be killed")
        self.ledger().append(
            "life_ended", life=attempt.name, outcome=outcome and outcome["outcome"], then=decision.action, why=decision.why
        )
        if failure and decision.action == "stop":
            say(f"\n{failure.text}")
        return decision

    def asked_by_a_person(self, attempt: Path) -> str | None:
        """Why a person wants the run to stop, though Slurm may have asked first: rank 0 reads the file once, and puts it into its life's
        folder when it has been obeyed."""
        requests = [StopRequest.read(file) for file in (attempt / "STOP", self.run.stop)]
        return next((request.reason for request in requests if request and not is_slurms(request.reason)), None)

    def merge(self) -> Decision | None:
        """The last act of a run whose model others go on from."""
        if not self.submitted["merge"] or is_merged(self.run):
            return None
        say("merging the adapter into its base")
        return self.have_done("export", str(self.run.path), "--merge", "--force")

    def leave(self) -> Decision:
        """While no rank is there Slurm takes the job, or starts nothing in it."""
        taken = self.job.taken
        if taken is None:
            return Decision("stop", "Slurm does not start what the job asks for; its words stand above", Stopped.exit_code)
        return Decision("stop", taken.why, Stopped.exit_code) if taken.cancelled else Decision("requeue", taken.why)

    def history(self) -> tuple[int, int, list[dict]]:
        """(lives in a row that brought the run no further, jobs that have begun, the ledger), all since a person submitted the run."""
        events = read_ledger(self.run.ledger)
        recent = since_submitted(events)
        lives = [number for number in self.run.attempts() if number > recent[0].get("last_attempt", 0)] if recent else self.run.attempts()
        fruitful = {life for life, done in units_done(self.run, lives).items() if done} if self.share else committing_lives(events)
        return fruitless_lives(lives, fruitful), sum(event["event"] == "job_began" for event in recent), recent

    # ---- a step, and what may come to the job meanwhile

    def step(self, nodes: int, arguments: list[str], folder: Path, *traces: str, most_s: float = float("inf")) -> bool:
        """Have srun start `harness ARGUMENTS` once on so many nodes, and watch over the job until that has ended. Its code says nothing; it
        has begun when it leaves one of `traces` in `folder`. Where nothing has, Slurm could not start it, and is asked again while it may
        be away for a moment. False when that was in vain, or the job is taken before."""
        for pause_s in PAUSES_S:
            self.step_once(nodes, arguments, folder, most_s)
            if any(any(folder.glob(trace)) for trace in traces):
                return True
            if self.job.taken:
                return False
            say(f"Slurm has started nothing on any node; once more in {pause_s:.0f} s")
            self.wait(pause_s)
        return False

    def wait(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until and not self.job.taken:
            self.watch()
            time.sleep(0.2)

    def step_once(self, nodes: int, arguments: list[str], folder: Path, most_s: float) -> None:
        port = free_port(f"{self.owner}.{folder.name}")
        environment = os.environ | {
            node.ADDRESS: self.job.patiently(lambda: slurm.node_address(self.job.hosts[0])),
            node.PORT: str(port),
            node.ATTEMPT: str(folder),
            node.OWNER: self.owner,
            node.PROCESSES: str(self.submitted["processes_per_node"]),
            node.GRACE: str(self.job.grace_s()),
            node.LEAD: str(self.cluster.signal_lead_s),
            "PYTHONUNBUFFERED": "1",
        }
        argv = srun_command(
            self.cluster,
            nodes,
            node_command(self.cluster, code_root(), sys.executable, arguments, self.run.path),
            environment=["PYTHONPATH", *self.cluster.environment],
            folders=[code_root(), self.run.path, cache_root(self.recipe.data.cache_dir)],
            workdir=Path.cwd(),
        )
        say(f"$ {shlex.join(argv)}")
        begun = time.monotonic()
        process = subprocess.Popen(argv, env=environment)
        try:
            while ended_within(process, 1.0) is None:
                self.watch()
                if self.job.must_leave or time.monotonic() - begun > most_s:
                    break
        finally:
            end_step(process)
        self.check_owner()

    def watch(self) -> None:
        while self._signals:
            number = self._signals.pop(0)
            self.job.look(number)
        if time.monotonic() - self.job.looked > LOOK_AT_JOB_EVERY_S:
            self.job.look()
        if time.monotonic() - self._looked_at_owner > node.LOOK_AT_OWNER_EVERY_S:
            self.check_owner()
        if time.monotonic() - self._commented > COMMENT_EVERY_S:
            self.comment()

    def check_owner(self) -> None:
        """Raises ClusterError when another job has the run: Slurm has written this one off, though it still runs here."""
        self._looked_at_owner = time.monotonic()
        owner = node.read_owner(self.run)
        if owner != self.owner:
            raise ClusterError(f"{self.run.path}: the run goes on elsewhere (job {owner}), so this job ({self.owner}) leaves it alone")

    def withdraw_stop(self) -> None:
        """Take away a STOP that an earlier life's shims or job have made for themselves. A person's is honoured."""
        request = StopRequest.read(self.run.stop)
        if request and request.reason.startswith(FROM_SLURM):
            self.run.stop.unlink()

    def comment(self, text: str | None = None) -> None:
        """Step and loss, or how the job ends."""
        self._commented = time.monotonic()
        text = text or progress_line(self.run)
        if text and text != self._comment:
            self._comment = text
            self.job.comment(text)

    # ---- the end of the job

    def carry_out(self, decision: Decision) -> int:
        if decision.action == "requeue":
            return self.requeue(decision)
        self.comment(f"{decision.action}: {decision.why}")
        if decision.action == "stop":
            self.ledger().append("gave_up", job=self.job.id, why=decision.why, exit_code=decision.exit_code)
            say(f"stopped: {decision.why}\n{place(self.run)}; when the cause is gone: {self.to_go_on}")
        else:
            say(decision.why)
        return decision.exit_code

    def requeue(self, decision: Decision) -> int:
        """By scontrol; by a successor where that is forbidden, or when a node is to be left out. Then to leave at once lets Slurm have the
        nodes, and count the time until the job may begin again, KillWait sooner."""
        by = self.cluster.restarts.by
        self.ledger().append("requeued", job=self.job.id, why=decision.why, exclude=list(decision.exclude))
        say(f"requeued: {decision.why}; {place(self.run)}")
        if self.job.taken and self.job.taken.is_requeued:
            return Stopped.exit_code
        if by != "successor" and not decision.exclude:
            try:
                self.job.requeue()
                return Stopped.exit_code
            except ClusterError as error:
                if by == "scontrol":
                    say(f"stopped: {error}\nrestarts.by: successor needs no scontrol; to go on: {self.to_go_on}")
                    return Stopped.exit_code
                say(f"warning: {error}")
        return self.succeed(decision)

    def succeed(self, decision: Decision) -> int:
        """Have another job take the run over, and those wait for it that wait for this one."""
        exclude = [*self.cluster.exclude, *sorted(self.excluded() | set(decision.exclude))]
        try:
            successor = self.job.send_successor(self.run.path / "job.sbatch", exclude)
        except ClusterError as error:
            say(f"stopped: no successor could be sent: {error}\nto go on, from where sbatch works: {self.to_go_on}")
            return Stopped.exit_code
        note_job(self.run, successor, decision.why)
        hand_on_waiting(self.job.id, successor)
        say(f"job {successor} takes the run over" + (f", without {', '.join(decision.exclude)}" if decision.exclude else ""))
        return Stopped.exit_code

    @property
    def to_go_on(self) -> str:
        return f"harness submit {shlex.quote(str(self.run.path))}"

    def ledger(self) -> Ledger:
        """One for the whole job: it keeps what a full disk does not take."""
        self._ledger.attempt = (self.run.attempts() or [None])[-1]
        return self._ledger


def free_port(seed: str) -> int:
    """A port of this host that nothing listens on; which one is tried first follows from the job and the life, so that jobs that share a
    node do not meet on one."""
    first = zlib.crc32(seed.encode())
    for offset in range(PORTS):
        port = FIRST_PORT + (first + offset) % PORTS
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return port
    raise ClusterError(f"{socket.gethostname()}: no port from {FIRST_PORT} to {FIRST_PORT + PORTS} is free for the ranks to meet")


def end_step(srun: subprocess.Popen) -> None:
    """Nothing where the step has ended."""
    srun.terminate()
    if ended_within(srun, ENDS_WITHIN_S) is None:
        srun.kill()
        srun.wait()
