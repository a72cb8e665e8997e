"""Runs that live as jobs of the rig's Slurm: sent by `harness submit`, with real ranks, held up or hurt where a test asks for it.

    run = JobRun(rig, tmp_path, "train.max_steps=24", inject=at_step(9, "die()"))
    run.submit()
    run.wait_for_step(12)
    os.kill(run.pid("launcher", node=1), signal.SIGKILL)
    assert run.wait() == "COMPLETED"
    run.check_same(whole(tmp_path, "train.max_steps=24"))

The recipe, what is recorded of each step and what is compared are those of tests/faults (lives.py, rig.py); so are the builders of
`inject`, which every rank executes before it trains. A step
takes `pace_s` longer than it needs, so that a test can meet it; `pace(0)` lets the rest go by.

`SketchedRun` is the same with ranks of a few lines, which live within a second: for what the job's own processes decide. `measure_restart`
says where the time between a death and the next step has gone, from the files that every run leaves.
"""

import contextlib
import json
import os
import sys
from pathlib import Path

import psutil

FAULTS = Path(__file__).resolve().parents[1] / "faults"
sys.path.append(str(FAULTS))

import lives  # noqa: E402
from conftest import harness  # noqa: E402
from lives import at_step  # noqa: E402, F401 - for the tests here
from rig import record_samples, record_steps  # noqa: E402

from harness.checkpoint.ledger import read_ledger  # noqa: E402
from harness.cluster.node import node_reports  # noqa: E402
from harness.cluster.submission import read_job  # noqa: E402
from harness.run import RunDir, rank_reports  # noqa: E402
from slurm.rig import Rig, processes_with  # noqa: E402

ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
VARIABLES = ["HARNESS_CACHE", "WANDB_MODE", "HF_HUB_OFFLINE", "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "PYTHONPATH", "HARNESS_TEST"]
INSIDE = """
import os, sys

if "RANK" in os.environ and any(part.endswith("launch/train.py") for part in sys.orig_argv):
    sys.path.append({faults!r})
    import rig

    def around(train_recipe):
        def training(recipe, report, *arguments, **options):
            from pathlib import Path

            rig.RANK, rig.FOLDER = report.rank, Path({folder!r}) / "records" / report.attempt.name
            rig.FOLDER.mkdir(parents=True, exist_ok=True)
            inject = (rig.FOLDER.parent / "inject.py").read_text()
            exec(compile(inject, "<inject>", "exec"), {{**vars(rig), "__name__": "inject"}})
            return train_recipe(recipe, report, *arguments, **options)

        return training

    rig.wrap("harness.tasks.job:train_recipe", around)

elif os.path.exists({sketch!r}) and sys.orig_argv[-2:-1] in (["node"], ["allocation"]):
    import harness.cluster.allocation
    import harness.life

    harness.life.plan_launch = lambda recipe, machines, arguments: [sys.executable, {sketch!r}, str(machines.index)]
    harness.cluster.allocation.Allocation.prepare_data = lambda allocation: None
"""
"""sitecustomize.py of every Python in the job. Ranks take note of it, and where ranks are sketched the shim and the job's own process."""
PATIENCE_S = 240
"""On two cores that others use as well a life has taken a minute to begin."""
HELD = """
def around(training_step):
    def stepping(*arguments, **options):
        time.sleep(float((FOLDER.parent / "pace").read_text() or 0))
        return training_step(*arguments, **options)

    return stepping

wrap("harness.tasks.trainer:HarnessTrainer.training_step", around)
"""


class JobRun(lives.Run):
    """One run and its jobs. `cluster` changes keys of the cluster file."""

    def __init__(self, rig: Rig, folder: Path, *overrides: str, nodes: int = 2, pace_s: float = 0.15, inject: str = "", **cluster):
        super().__init__(folder, *overrides)
        self.rig, self.nodes, self.run = rig, nodes, RunDir(self.path)
        self._folder, self._cluster = folder, folder / "cluster.yaml"
        settings = {
            "partition": "low",
            "time": "30",
            "signal_lead_s": 60,
            "preflight": False,
            "sbatch": {"exclusive": True},
            "environment": VARIABLES,
        }
        self._cluster.write_text(json.dumps(settings | cluster))
        (folder / "inside").mkdir()
        inside = INSIDE.format(faults=str(FAULTS), folder=str(folder), sketch=str(folder / "sketch.py"))
        (folder / "inside" / "sitecustomize.py").write_text(inside)
        (folder / "records").mkdir()
        self.hurt(inject)
        self.pace(pace_s)

    def hurt(self, source: str) -> None:
        """What the ranks of the next lives execute before they train."""
        (self._folder / "records" / "inject.py").write_text(record_steps() + record_samples() + HELD + source)

    def pace(self, seconds: float) -> None:
        (self._folder / "records" / "pace").write_text(f"{seconds}")

    # ---- the job

    def submit(self, *arguments: str, code: int = 0) -> str:
        """`harness submit`, of the recipe or, once that was sent, of the run folder; returns what it said."""
        what = [self._recipe, "--cluster", self._cluster, "--nodes", self.nodes, f"output_dir={self.path}", "backend=ddp", *self.overrides]
        done = self.harness("submit", *(what if not self.run.recipe.is_file() else [self.path]), *arguments)
        assert done.code == code, done.output
        return done.output

    def harness(self, *arguments):
        inside = os.pathsep.join([str(self._folder / "inside"), os.environ.get("PYTHONPATH", "")])
        one_thread = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        return harness(*arguments, cwd=self._folder, PYTHONPATH=inside, HARNESS_TEST="1", **one_thread)

    def tell(self, name: str) -> None:
        """A signal to the job's own process, as Slurm sends its warnings."""
        self.rig.run("scancel", "--batch", f"--signal={name}", self.job)

    @property
    def job(self) -> str:
        return read_job(self.run)["jobs"][-1]["id"]

    def wait(self) -> str:
        """Until the job has ended for good, however often it is requeued before; returns its state."""
        return self.rig.wait_for_state(self.job, *ENDED, timeout_s=PATIENCE_S)

    def wait_for(self, predicate, what: str):
        """As the rig's, but it does not wait for what cannot come any more."""

        def value():
            found = predicate()
            assert found or self.rig.state(self.job) not in ENDED, f"the job ended before {what}:\n{self.said()}"
            return found

        return self.rig.wait_for(value, what, PATIENCE_S)

    def wait_for_step(self, step: int, life: int = 1) -> None:
        """Until rank 0 of this life is at that step."""
        self.wait_for(lambda: self._at(life, "step", -1) >= step, f"step {step} of life {life}")

    def wait_for_phase(self, phase: str, life: int = 1) -> None:
        self.wait_for(lambda: self._at(life, "phase", "").startswith(phase), f"life {life} to be {phase}")

    def wait_for_life(self, life: int) -> None:
        """Until that life trains."""
        self.wait_for(lambda: self._at(life, "phase", "").startswith("training"), f"life {life} to train")

    def wait_for_said(
        self,
        text: str,
    ) -> None:
        self.wait_for(lambda: text in self.said(), repr(text))

    def _at(self, life: int, key: str, default):
        reports = rank_reports(self.run.attempt(life), "alive", [0])
        return (reports[0][key] if reports else None) or default

    def said(self) -> str:
        """The logs of all its jobs."""
        return "".join(file.read_text(errors="replace") for file in sorted(self.path.glob("logs/slurm-*.log")))

    # ---- its processes

    def pid(self, what: str, node: int = 0) -> int:
        """The `rank`, `launcher` or `shim` on a node of the last life, or the `allocation`."""
        rank = psutil.Process(rank_reports(self.run.last_attempt(), "alive", [node])[0]["pid"])
        launcher = rank.parent()
        shim = launcher.parent()
        if what == "allocation":
            allocations = [pid for pid in self.rig.processes_of(self.job) if "allocation" in psutil.Process(pid).cmdline()]
            (pid,) = allocations
            return pid
        return {"rank": rank, "launcher": launcher, "shim": shim}[what].pid

    def left_running(self, attempt: int) -> list[int]:
        """Processes of a life that has ended."""
        return processes_with(f"HARNESS_ATTEMPT={self.run.attempt(attempt)}")

    def check_nothing_left(self) -> None:
        """Of any life, within the seconds that a kernel takes to end a process."""
        with contextlib.suppress(AssertionError):
            self.rig.wait_for(lambda: not self.rig.processes_of(self.job), "all processes to end", 5)
        left = [psutil.Process(pid).cmdline() for pid in self.rig.processes_of(self.job)]
        assert not left and not any(map(self.left_running, self.run.attempts())), left

    # ---- what came of it

    def check_same(self, other: lives.Run, *, repeats: bool = False) -> None:
        """Bit for bit, after every step; see tests/faults/lives.py."""
        for attempt in self.run.attempts():
            folder = self._folder / "records" / f"attempt-{attempt}"
            for rank in range(self.world):
                again: dict = {}
                for record in _records(folder / f"samples-{rank}.jsonl"):
                    again.setdefault(record["step"], []).append(record["samples"])
                # A step that is made again takes the place of the one that was lost.
                self.samples[rank] |= again
                self.steps[rank] |= {record["step"]: record for record in _records(folder / f"steps-{rank}.jsonl")}
        made = max(self.steps[0])
        for rank in range(self.world):
            # Of a step that was begun and lost there are samples alone.
            self.samples[rank] = {step: rows for step, rows in self.samples[rank].items() if step <= made}
        lives.check_same(self, other, repeats=repeats)

    def begins(self) -> list[int | None]:
        """The checkpoint that each life continued from."""
        return [event["resumed_from"] for event in self.events("life_began")]

    def stops(self) -> list[tuple[int, str]]:
        """(step, reason) of each life that saved and left."""
        return [(event["step"], event["reason"]) for event in self.events("stopped")]

    def check_lives(self, *told: bool | None) -> None:
        """Each life but the last was `told` to go, and then lost nothing, or was not, and lost the steps since its last commit. None: it
        may have been told in time."""
        events = self.events()
        begins = [number for number, event in enumerate(events) if event["event"] == "life_began"]
        assert len(begins) == len(told) + 1, events
        for end, was_told in zip(begins[1:], told, strict=True):
            life = [event for event in events[:end] if event["attempt"] == events[end]["attempt"] - 1]
            last = max((event["step"] for event in events[:end] if event["event"] == "committed"), default=None)
            stopped = [event["step"] for event in life if event["event"] == "stopped"]
            assert was_told is None or bool(stopped) == was_told, events
            assert events[end]["resumed_from"] == (stopped[0] if stopped else last) == last, events


# What a life does is the K-th word of LIVES, for a node `1:word`.
SKETCH = """
import os, signal, sys, time
from pathlib import Path
from harness.checkpoint.ledger import Ledger
from harness.errors import DataError
from harness.run import RankReport, RunDir, write_outcome
attempt, rank, lives = Path(os.environ["HARNESS_ATTEMPT"]), int(sys.argv[1]), {lives!r}
run, number = RunDir(attempt.parents[1]), int(attempt.name.removeprefix("attempt-"))
does = lives[min(number, len(lives)) - 1].split("+")
report = RankReport(rank, attempt)
report.enter("training")
report.beat(number)
ledger = Ledger(run.ledger, number)
if rank == 0:
    ledger.append("life_began", resumed_from=None)
if rank == 0 and "commits" in does:
    ledger.append("committed", step=10 * number)
if "dies" in does and rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
if "fails" in does and rank == 1:
    report.failed(KeyError("labels"))
    sys.exit(1)
if "bad-data" in does and rank == 1:
    report.failed(DataError("rows.jsonl:7: is no row"))
    sys.exit(2)
if "ignores" in does:
    for number in range(1, 32):
        if number not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(number, signal.SIG_IGN)
    while True:
        report.beat()
        time.sleep(0.2)
if "goes" in does:
    while not run.stop.exists() and not (attempt / "STOP").exists():
        report.beat()
        time.sleep(0.1)
    reason = (run.stop if run.stop.exists() else attempt / "STOP").read_text().splitlines()[0]
    time.sleep(0.5)
    if rank == 0:
        run.stop.rename(attempt / "STOP")
        ledger.append("committed", step=10 * number)
        ledger.append("stopped", step=10 * number, reason=reason)
        write_outcome(attempt, "stopped", step=10 * number, checkpoint=10 * number, reason=reason)
    report.stopped(reason)
    sys.exit(75)
if "done" in does:
    if rank == 0:
        write_outcome(attempt, "done", step=5, checkpoint=5, reason="")
    report.enter("finished")
else:
    # A rank that nothing ails lives on until it is ended, so the one that died is the first to fall silent.
    while True:
        report.beat()
        time.sleep(0.2)
"""


class SketchedRun(JobRun):
    """Its ranks only write what real ones would. What life K does is the K-th of `does`, the last of all later ones:

    `commits`; then rank 1 `dies` (by SIGKILL), `fails` (with a KeyError) or finds `bad-data`, while rank 0 lives on; or both do what
    they are asked to by STOP (`goes`), or ignore every signal and the file (`ignores`), or are `done`.
    """

    def __init__(self, rig: Rig, folder: Path, *does: str, **cluster):
        super().__init__(rig, folder, **cluster)
        (folder / "sketch.py").write_text(SKETCH.format(lives=does))

    def ends(self) -> list[str]:
        """What was decided at the end of each life."""
        return [event["then"] for event in self.events("life_ended")]


def whole(folder: Path, *overrides: str) -> lives.Run:
    """The same run on one machine, without Slurm and without an interruption."""
    run = lives.Run(folder / "whole", *overrides)
    run.live()
    return run


def _records(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().split("\n")[:-1]] if file.is_file() else []


def measure_restart(run: Path, life: int) -> dict[str, float]:
    """Seconds from the death of a rank in this life to the first step that the next one logs (with train.logging_steps=1 the first that
    it makes), and their parts; for a run of Slurm whose next life has ended.

    noticed       from the last sign of life of the first rank to fall silent until its node has reported
    step ended    the other nodes' reports, and srun's end
    srun          starting the shims, their imports included, until they start their launchers
    ranks         the launchers, and Python in the ranks, until the last rank says its first word
    imports       joining, the libraries, the tokeniser and the data, until the data are found
    loading       the checkpoint, the model and the trainer
    first step    until it is logged
    """
    folder, events = RunDir(run), read_ledger(RunDir(run).ledger)
    dead, next_life = folder.attempt(life), folder.attempt(life + 1)
    began = next(event["time"] for event in events if event["event"] == "life_began" and event["attempt"] == life + 1)
    points = map(json.loads, folder.metrics.read_text().splitlines())
    marks = {
        "noticed": min(report["time"] for report in node_reports(dead)),
        "step ended": next(event["time"] for event in events if event["event"] == "life_ended" and event["life"] == dead.name),
        "srun": max(report["began"] for report in node_reports(next_life)),
        # A file for each rank is made there, and then written over in place.
        "ranks": (next_life / "alive").stat().st_mtime,
        "imports": max(file.stat().st_mtime for file in next_life.glob("prepared-*.json")),
        "loading": began,
        "first step": next(point["time"] for point in points if point["time"] > began and "train/loss" in point),
    }
    died = min(report["time"] for report in rank_reports(dead, "alive"))
    spans = {name: end - start for (name, end), start in zip(marks.items(), [died, *marks.values()], strict=False)}
    return spans | {"total": marks["first step"] - died}
