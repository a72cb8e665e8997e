"""What Slurm's ways cost a run: `harness submit tiny/sft-lora` on two of three nodes of a real Slurm on this machine (tests/slurm/rig.py).

    python benchmarks/slurm.py        writes benchmarks/results/slurm-cpu.{json,md}; as root, about 25 minutes

Preemptions   from the moment at which a job of a higher partition asks for the nodes to the commit, and on to the end of the first step
              that the run makes when it has nodes again.
Deaths        from the SIGKILL of a random rank to the end of the next step, in the same job.
Goodput       ten minutes in which something happens to the run about every minute, in an order and at distances that the seed fixes (what
              is to happen to a run that does not train waits until it does): the steps that counted, times the seconds that a step
              takes undisturbed, over all seconds; and what each kind of fault took away.

Nothing is put into the run. Its times are those that its files hold anyway (ledger.jsonl, alive/, node-I.json, STOP), those of its
processes' starts, and those at which this program, looking every 20 ms, found a new line in the job's log. They are all of one clock. A
phase of rank 0 that is shorter than a look may be counted to its neighbour.
"""

import argparse
import json
import math
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
from checkpoint import START_PARTS, seconds_of, table
from sft import HERE, SEED, describe, describe_machine, gib, met, save_result, say, spread

# Before this file's own folder, in which `slurm` is this file.
sys.path.insert(0, str(HERE.parent / "tests"))

from slurm.rig import CRED_EXPIRE_S, Rig, why_not  # noqa: E402

from harness.checkpoint.ledger import read_ledger  # noqa: E402
from harness.cluster.node import node_reports  # noqa: E402
from harness.cluster.submission import read_job  # noqa: E402
from harness.run import RunDir, git_commit, library_versions, rank_reports  # noqa: E402

LOOK_EVERY_S = 0.02
BUSY_S = 5.0
"""So long others are watched, before each part, to say how much of the machine they take."""
ALONE_CORES = 0.3
"""Nobody takes more than that: this program had the machine for itself."""
WITHIN_S = 240.0
"""Nothing that is waited for takes longer, unless something is wrong."""
DEATH_AIM_S = 120.0
PROCESSES_OF_A_LIFE = ("shim", "launcher", "python")
OVERRIDES = [
    "backend=ddp",
    "train.max_steps=1000000",
    "train.eval_strategy=no",
    "train.eval_steps=null",
    # Fifty times what a step takes here, and less than would hide everything else.
    "watchdog.step_s=10",
    "watchdog.first_step_s=60",
]
CLUSTER = {
    "partition": "low",
    "time": "60",
    "signal_lead_s": 60,
    # Without it nobody is preempted for nodes that have cores left.
    "sbatch": {"exclusive": True},
    "environment": ["HARNESS_CACHE", "HF_HUB_OFFLINE", "OMP_NUM_THREADS", "OMP_WAIT_POLICY"],
}
SAVE_EVERY_S = 6.0
FAULTS = ("rank killed", "launcher killed", "preempted", "requeued", "rank stopped")


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    preemptions: int
    deaths: int
    undisturbed_s: float
    goodput_s: float
    gap_s: tuple[float, float]
    """Shortest and longest time from one fault to the next."""


FULL = Plan(preemptions=8, deaths=20, undisturbed_s=60, goodput_s=600, gap_s=(40, 70))
TRIAL = Plan(preemptions=1, deaths=1, undisturbed_s=5, goodput_s=45, gap_s=(10, 15))

LIFE_PARTS = {
    "shim": "the shim: Python, recipe",
    "launcher": "accelerate's launcher: imports, meeting the other node's",
    **{word: part for word, part in START_PARTS.items() if word != "command"},
    "python": "imports: torch",
    "starting": "imports: torch",
    "importing libraries": "imports: transformers, TRL, PEFT",
}
"""What rank 0, and before it what starts it, is at -> a line of the tables."""
PREEMPTION_PARTS = {
    "asked": "Slurm's decision, its signal, and the job's look at itself: until STOP stands",
    "STOP": "STOP, until the ranks have voted",
    "save begins": "the save",
}
REQUEUE_PARTS = {
    "committed": "ranks, launchers, shims and srun end",
    "life ended": "`scontrol requeue`, and Slurm until the job begins again",
    "job": "the job's process: Python, the run's lock",
    "job_began": "pre-flight, its srun included",
    "preparing": "preparing the data (in the cache already), its srun included",
    "attempt": "srun",
    **LIFE_PARTS,
}
DEATH_PARTS = {
    "killed": "until a node has seen it and says so",
    "node report": "the other node's ranks, and srun, end",
    "life ended": "a look at the job, srun",
    **LIFE_PARTS,
}


# ---- a run, and what its files say


class Watch(threading.Thread):
    """Looks at a run's files, and keeps what rank 0 of each life says it is at, and the lines of the job's log."""

    def __init__(self, run: RunDir):
        super().__init__(daemon=True)
        self.phases: dict[int, list[tuple[float, str]]] = defaultdict(list)
        self.steps: dict[int, list[tuple[float, int]]] = defaultdict(list)
        """When each step of a life was begun."""
        self.lines: list[tuple[float, str]] = []
        self._run, self._over, self._unread = run, threading.Event(), b""

    def run(self) -> None:
        with open(next(self._run.path.glob("logs/slurm-*.log")), "rb") as log:
            while not self._over.wait(LOOK_EVERY_S):
                self.look_at_log(log.read())
                if attempt := self._run.last_attempt():
                    for report in rank_reports(attempt, "alive", [0]):
                        self.look_at_rank(int(attempt.name.removeprefix("attempt-")), report)

    def look_at_log(self, text: bytes) -> None:
        *lines, self._unread = (self._unread + text).split(b"\n")
        self.lines += [(time.time(), line.decode(errors="replace")) for line in lines]

    def look_at_rank(self, life: int, report: dict) -> None:
        for key, kept in (("phase", self.phases[life]), ("step", self.steps[life])):
            if report[key] is not None and (not kept or kept[-1][1] != report[key]):
                kept.append((report["time"], report[key]))

    def stop(self) -> None:
        self._over.set()
        self.join()


class WatchedRun:
    """A run on two nodes, from `harness submit` until the block is left."""

    def __init__(self, rig: Rig, folder: Path, *overrides: str, **cluster):
        folder.mkdir(parents=True)
        self.rig, self.run = rig, RunDir(folder / "run")
        (folder / "cluster.yaml").write_text(json.dumps(CLUSTER | cluster))  # JSON is YAML
        submit = [sys.executable, "-m", "harness", "submit", "tiny/sft-lora", "--cluster", str(folder / "cluster.yaml"), "--nodes", "2"]
        rig.run(*submit, f"output_dir={self.run.path}", *OVERRIDES, *overrides, cwd=HERE.parent)
        self.wait_for(lambda: list(self.run.path.glob("logs/slurm-*.log")), "the job's log")
        self.watch = Watch(self.run)
        self.watch.start()

    def __enter__(self) -> "WatchedRun":
        return self

    def __exit__(self, *_) -> None:
        self.watch.stop()
        self.rig.reset()

    @property
    def life(self) -> int:
        return (self.run.attempts() or [0])[-1]

    @property
    def job(self) -> str:
        return read_job(self.run)["jobs"][-1]["id"]

    def events(self, name: str, **facts) -> list[dict]:
        return [event for event in read_ledger(self.run.ledger) if (event | facts | {"event": name}) == event]

    def wait_for(self, look: Callable[[], object], what: str):
        """The first true value of `look`. Raises SystemExit, with the end of the job's log, when none comes."""
        deadline = time.monotonic() + WITHIN_S
        while not (found := look()):
            if time.monotonic() > deadline:
                logs = "".join(file.read_text(errors="replace") for file in self.run.path.glob("logs/slurm-*.log"))
                raise SystemExit(f"{self.run.path}: waited {WITHIN_S:.0f} s in vain for {what}; its job says:\n{logs[-4000:]}")
            time.sleep(LOOK_EVERY_S)
        return found

    def first_step_done(self, life: int) -> float | None:
        """When the life's second step was begun."""
        steps = self.watch.steps[life]
        return steps[1][0] if len(steps) > 1 else None

    def wait_until_it_trains(self) -> int:
        """Returns the number of the life that does."""
        self.wait_for(lambda: self.first_step_done(self.life) and not self.events("life_ended", attempt=self.life), "a step")
        return self.life

    def pid(self, rank: int = 0) -> int:
        return rank_reports(self.run.last_attempt(), "alive", [rank])[0]["pid"]

    def line(self, beginning: str, after: float) -> float:
        """When the job said so."""
        return next(moment for moment, line in self.watch.lines if moment > after and line.startswith(beginning))

    def marks_of_life(self, life: int) -> list[tuple[float, str]]:
        """From its first process, on the node of rank 0, to the end of its first step. Asked while it lives."""
        rank = psutil.Process(self.pid())
        processes = zip((rank.parent().ppid(), rank.ppid(), rank.pid), PROCESSES_OF_A_LIFE, strict=True)
        done = self.first_step_done(life)
        # A save at the first step is part of it.
        phases = [(moment, phase) for moment, phase in self.watch.phases[life] if moment < done and not phase.startswith("saving")]
        return [*((began(pid), what) for pid, what in processes), *phases, (done, "first step done")]


def began(pid: int) -> float:
    """When a process was started, in unix seconds; to 10 ms, where psutil's answer is off by up to a second."""
    ticks = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + ticks / os.sysconf("SC_CLK_TCK")


# ---- what is done to it


def ask_for_its_nodes(run: WatchedRun) -> None:
    # Shorter than what Slurm lets a requeued job wait anyway.
    run.rig.submit("sleep 1", "--exclusive", "--nodes=2", "--partition=high")


def do(fault: str, run: WatchedRun, told: random.Random) -> None:
    rank = told.randrange(2)
    if fault == "rank killed":
        os.kill(run.pid(rank), signal.SIGKILL)
    elif fault == "launcher killed":
        os.kill(psutil.Process(run.pid(rank)).ppid(), signal.SIGKILL)
    elif fault == "rank stopped":
        os.kill(run.pid(rank), signal.SIGSTOP)
    elif fault == "preempted":
        ask_for_its_nodes(run)
    else:
        run.rig.run("scontrol", "requeue", run.job)


def next_faults(plan: Plan, told: random.Random) -> Iterator[tuple[float, str]]:
    """(seconds since the one before, kind), without end: all kinds in a new order, again and again."""
    while True:
        for kind in told.sample(FAULTS, len(FAULTS)):
            yield told.uniform(*plan.gap_s), kind


# ---- measuring


def preempt(run: WatchedRun) -> dict:
    """{"saved_s", "restart_s", "parts"}: to the commit, from there to the end of the next step, and where both went."""
    life = run.wait_until_it_trains()
    asked = time.time()
    ask_for_its_nodes(run)
    run.wait_for(lambda: run.first_step_done(life + 1), "a step after a preemption")
    (commit,) = run.events("committed", attempt=life, reason="stop")
    ended, job_began = run.events("life_ended", attempt=life)[0]["time"], run.events("job_began")[-1]["time"]
    (allocation,) = (pid for pid in run.rig.processes_of(run.job) if "allocation" in psutil.Process(pid).cmdline())
    before = [
        (asked, "asked"),
        ((run.run.attempt(life) / "STOP").stat().st_mtime, "STOP"),
        (commit["time"] - commit["save_s"], "save begins"),
        (commit["time"], "committed"),
    ]
    after = [
        before[-1],
        (ended, "life ended"),
        (began(allocation), "job"),
        (job_began, "job_began"),
        (run.line("preparing the data", job_began), "preparing"),
        (run.line(f"attempt-{life + 1} begins", job_began), "attempt"),
        *run.marks_of_life(life + 1),
    ]
    result = {"saved_s": duration(before), "restart_s": duration(after)}
    return result | {"parts": seconds_of(before, PREEMPTION_PARTS) | seconds_of(after, REQUEUE_PARTS)}


def kill(run: WatchedRun, rank: int) -> dict:
    """{"restart_s", "parts"}: from the death of a rank to the end of the next step."""
    life = run.life
    died = time.time()
    os.kill(run.pid(rank), signal.SIGKILL)
    run.wait_for(lambda: run.first_step_done(life + 1), "a step after a death")
    marks = [
        (died, "killed"),
        (node_reports(run.run.attempt(life))[0]["time"], "node report"),
        (run.events("life_ended", attempt=life)[0]["time"], "life ended"),
        *run.marks_of_life(life + 1),
    ]
    return {"rank": rank, "restart_s": duration(marks), "parts": seconds_of(marks, DEATH_PARTS)}


def duration(marks: Sequence[tuple[float, str]]) -> float:
    return marks[-1][0] - marks[0][0]


def measure_lives(rig: Rig, work: Path, plan: Plan, told: random.Random) -> tuple[list[dict], list[dict]]:
    """All preemptions, then all deaths, of one run."""
    preemptions, deaths = [], []
    with WatchedRun(rig, work / "lives", "checkpoint.every_steps=10", restarts={"in_allocation": plan.deaths}) as run:
        for number in range(plan.preemptions):
            run.wait_until_it_trains()
            time.sleep(told.uniform(1, 3))
            preemptions.append(preempt(run))
            saved_s, restart_s = preemptions[-1]["saved_s"], preemptions[-1]["restart_s"]
            say(f"preemption {number + 1}: saved after {saved_s:.1f} s, trains {restart_s:.1f} s later")
        for number in range(plan.deaths):
            life = run.wait_until_it_trains()
            # Three lives in a row without a commit would end the run.
            run.wait_for(lambda life=life: run.events("committed", attempt=life), "a commit")
            time.sleep(told.uniform(0, 2))
            deaths.append(kill(run, told.randrange(2)))
            say(f"death {number + 1}, of rank {deaths[-1]['rank']}: trains after {deaths[-1]['restart_s']:.1f} s")
    return preemptions, deaths


def measure_undisturbed(rig: Rig, work: Path, plan: Plan) -> dict:
    with saving_by_time(rig, work / "undisturbed") as run:
        run.wait_until_it_trains()
        time.sleep(plan.undisturbed_s)
        steps = list(run.watch.steps[1])
    each = [(after - before) / (b - a) for (before, a), (after, b) in zip(steps, steps[1:], strict=False)]
    count, seconds = steps[-1][1] - steps[0][1], steps[-1][0] - steps[0][0]
    step = spread(each)
    say(f"undisturbed: {count} steps in {seconds:.0f} s, {describe(step)} s each")
    return {"steps": count, "seconds": seconds, "step_s": step, "goodput": count * step["median"] / seconds}


def measure_goodput(rig: Rig, work: Path, plan: Plan, told: random.Random, step_s: float) -> dict:
    faults = []
    with saving_by_time(rig, work / "goodput") as run:
        run.wait_until_it_trains()
        begun, first = run.watch.steps[1][0]
        last = begun
        for gap_s, kind in next_faults(plan, told):
            # The last one leaves the run the time to get over it.
            if last + gap_s > begun + plan.goodput_s - plan.gap_s[0]:
                break
            time.sleep(max(0.0, last + gap_s - time.time()))
            life, last = run.wait_until_it_trains(), time.time()
            if last > begun + plan.goodput_s:
                break
            faults.append({"kind": kind, "s": last - begun, "step": run.watch.steps[life][-1][1], "life": life})
            do(kind, run, told)
            say(f"{last - begun:.0f} s: {kind}")
        time.sleep(max(0.0, begun + plan.goodput_s - time.time()))
        end, last_life = time.time(), run.life
        commits = [(event["time"] - begun, event["step"]) for event in run.events("committed")]
        lives = {life: [(moment - begun, step) for moment, step in steps] for life, steps in run.watch.steps.items()}
        trains = lives.get(last_life) and not run.events("life_ended", attempt=last_life)
    # What a life has made since its last commit counts as long as it lives; the step that was begun last does not.
    reached = lives[last_life][-1][1] - 1 if trains else commits[-1][1]
    for fault in faults:
        fault["lost_s"] = lost_s(fault, lives, step_s)
    counted, seconds = reached - first + 1, end - begun
    result = {"steps": counted, "seconds": seconds, "goodput": counted * step_s / seconds, "faults": faults, "commits": len(commits)}
    say(f"goodput: {counted} steps in {seconds:.0f} s, {result['goodput']:.2f}")
    return result | {"plain": plain_goodput(faults, commits, first, seconds, step_s)}


def saving_by_time(rig: Rig, folder: Path) -> WatchedRun:
    return WatchedRun(rig, folder, f"checkpoint.every_minutes={SAVE_EVERY_S / 60}")


def lost_s(fault: dict, lives: dict[int, list[tuple[float, int]]], step_s: float) -> float | None:
    """Seconds by which a fault has set the run back: until a later life had come as far as the one that was hit, less what the steps that
    this one made after the fault take undisturbed. None when that did not come about in time."""
    furthest = lives[fault["life"]][-1][1]
    later = (begun for life in sorted(lives) if life > fault["life"] for begun in lives[life])
    return next((moment - fault["s"] - (step - fault["step"]) * step_s for moment, step in later if step >= furthest), None)


def plain_goodput(faults: list[dict], commits: list[tuple[float, int]], first: int, seconds: float, step_s: float) -> dict:
    """What a plain batch script (srun, accelerate launch, transformers' resume_from_checkpoint, a checkpoint as often as ours) would have
    kept of these faults: computed, from what its parts do.

    torchrun, and accelerate with it, starts dead ranks again `max_restarts` times, 0 unless it is said, and leaves with 1. At a preemption
    the launcher is sent SIGTERM, ends its ranks and leaves with 1. Slurm requeues neither job, because it ended by itself (tried on this
    rig: FAILED, Restarts=0, both; also with --signal, whose USR1 ends launcher or batch script at once). Ranks that wait for one that
    stands still do so for `ddp_timeout`, 30 minutes. So the first fault but a requeue is its end. A requeue is taken to cost nothing.
    """
    ending = next((fault for fault in faults if fault["kind"] != "requeued"), {"kind": "nothing", "s": seconds})
    kept = max((step for moment, step in commits if moment < ending["s"]), default=first - 1) - first + 1
    return {"ended_by": ending["kind"], "ended_s": ending["s"], "steps": kept, "goodput": kept * step_s / seconds}


def run(plan: Plan, work: Path) -> dict:
    """Everything; returns what is written to the results."""
    began_at, machine = time.perf_counter(), describe_machine("cpu")
    os.environ |= {"HARNESS_CACHE": str(work / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    told, busy = random.Random(SEED), {}

    def others_take(part: str) -> None:
        busy[part] = psutil.cpu_percent(BUSY_S) / 100 * psutil.cpu_count()

    with Rig() as rig:
        version = rig.run("sinfo", "--version").strip()
        others_take("lives")
        preemptions, deaths = measure_lives(rig, work, plan, told)
        others_take("undisturbed")
        undisturbed = measure_undisturbed(rig, work, plan)
        others_take("goodput")
        goodput = measure_goodput(rig, work, plan, told, undisturbed["step_s"]["median"])
        others_take("the end")
    return {
        "date": time.strftime("%Y-%m-%d %H:%M %Z"),
        "git_commit": git_commit(),
        "machine": machine | {"load_after": os.getloadavg()[0], "cores_taken_by_others_before": busy},
        "versions": {"Slurm": version.removeprefix("slurm-wlm "), **library_versions()},
        "seed": SEED,
        "save_every_s": SAVE_EVERY_S,
        "cred_expire_s": CRED_EXPIRE_S,
        "summary": summarise(preemptions, deaths),
        "preemptions": preemptions,
        "deaths": deaths,
        "undisturbed": undisturbed,
        "goodput": goodput,
        "seconds": time.perf_counter() - began_at,
    }


def summarise(preemptions: list[dict], deaths: list[dict]) -> dict[str, float]:
    """What the README quotes."""
    saved, restarts = [each["saved_s"] for each in preemptions], [death["restart_s"] for death in deaths]
    return {"saved_p50_s": percentile(saved, 0.5), "restart_p50_s": percentile(restarts, 0.5), "restart_p95_s": percentile(restarts, 0.95)}


# ---- the report --------------------------------------------------------------------------------------------------------------------------


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that is not exceeded by this share of all."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def render(result: dict) -> str:
    """The result as markdown; its first lines say when and where it was measured."""
    parts = (render_setting, render_preemptions, render_deaths, render_goodput)
    return "\n".join(line for part in parts for line in part(result)) + "\n"


def render_setting(result: dict) -> list[str]:
    machine = result["machine"]
    others = machine["cores_taken_by_others_before"]
    busy = ", ".join(f"{cores:.1f} before {part}" for part, cores in others.items())
    alone = max(others.values()) < ALONE_CORES
    warning = "Others used the machine: whatever computes took longer than it would alone, and the least values are the nearest to that."
    return [
        "# What Slurm's ways cost a run: `harness submit tiny/sft-lora backend=ddp --nodes 2`",
        "",
        f"{result['date']}, commit {result['git_commit'] or 'unknown'}, {result['seconds']:.0f} s, seed {result['seed']}.",
        f"{machine['device']}, {machine['cpus']} cores, {gib(machine['memory_bytes'])} GiB. Cores that others took: {busy}.",
        ", ".join(f"{name} {version}" for name, version in result["versions"].items()) + f"; Python {machine['python']}.",
        "",
        "All nodes are this machine: two ranks, and everything that starts them, share its cores. Seconds are median (min to max).",
        *([] if alone else ["", warning]),
        "",
    ]


def render_preemptions(result: dict) -> list[str]:
    preemptions = result["preemptions"]
    return [
        f"## {len(preemptions)} preemptions",
        "",
        *table(["", "seconds"], rows_of(preemptions, PREEMPTION_PARTS) | total(preemptions, "saved_s", "asked -> saved")),
        "",
        *table(["", "seconds"], rows_of(preemptions, REQUEUE_PARTS) | total(preemptions, "restart_s", "saved -> end of the next step")),
        "",
        f"Of Slurm's part {result['cred_expire_s'] + 1} s are `cred_expire` + 1, which every requeued job waits. The rig sets it so short; "
        "where a site has not set it, it is 121 s.",
        "",
    ]


def render_deaths(result: dict) -> list[str]:
    deaths = result["deaths"]
    seconds = [death["restart_s"] for death in deaths]
    half, most = percentile(seconds, 0.5), percentile(seconds, 0.95)
    return [
        f"## {len(deaths)} times SIGKILL of a rank",
        "",
        *table(["", "seconds"], rows_of(deaths, DEATH_PARTS) | total(deaths, "restart_s", "killed -> end of the next step")),
        "",
        f"**p50 {half:.1f} s, p95 {most:.1f} s.** Aim: p95 of at most {DEATH_AIM_S:.0f} s. {met(most <= DEATH_AIM_S)}",
        "",
    ]


def rows_of(measured: list[dict], parts: dict[str, str]) -> dict[str, list[str]]:
    return {part: [describe(spread([each["parts"][part] for each in measured]), 2)] for part in dict.fromkeys(parts.values())}


def total(measured: list[dict], key: str, name: str) -> dict[str, list[str]]:
    return {f"**{name}**": [f"**{describe(spread([each[key] for each in measured]), 2)}**"]}


def render_goodput(result: dict) -> list[str]:
    goodput, whole = result["goodput"], result["undisturbed"]
    plain, faults = goodput["plain"], goodput["faults"]
    rows = {
        "undisturbed": [f"{whole['seconds']:.0f}", f"{whole['steps']}", "0", f"{whole['goodput']:.2f}"],
        "with faults": [f"{goodput['seconds']:.0f}", f"{goodput['steps']}", f"{len(faults)}", f"**{goodput['goodput']:.2f}**"],
        "a plain batch script, computed": [f"{goodput['seconds']:.0f}", f"{plain['steps']}", "", f"{plain['goodput']:.2f}"],
    }
    costs = {}
    for kind in FAULTS:
        times, known = (
            [fault["kind"] for fault in faults].count(kind),
            [fault["lost_s"] for fault in overcome(faults) if fault["kind"] == kind],
        )
        if times:
            costs[kind] = [f"{times}", f"{len(known)}", describe(spread(known), 1) if known else ""]
    return [
        f"## Goodput, a checkpoint every {result['save_every_s']:.0f} s",
        "",
        *table(["", "seconds", "steps that counted", "faults", "goodput"], rows),
        "",
        f"A step takes {describe(whole['step_s'])} s undisturbed; goodput is steps that counted, times that, over all seconds.",
        "The plain script (srun, accelerate launch, transformers' own resume, a checkpoint as often) is ended by the first fault but a "
        f"requeue, here after {plain['ended_s']:.0f} s ({plain['ended_by']}), until a person sends it again; benchmarks/slurm.py says why.",
        "",
        *table(["what happened", "times", "overcome before the next", "seconds by which these set the run back"], costs),
        "",
        "A fault a minute is there to be counted: a real job that meets one of these a day loses the same seconds out of 86,400.",
    ]


def overcome(faults: list[dict]) -> list[dict]:
    """Those whose cost is theirs alone: the run was where it had been before the next one came."""
    nexts = [*(fault["s"] for fault in faults[1:]), math.inf]
    return [fault for fault, end in zip(faults, nexts, strict=True) if fault["lost_s"] is not None and fault["s"] + fault["lost_s"] <= end]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks/slurm.py", description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, help="folder for slurm-cpu.{json,md}; left out: benchmarks/results")
    parser.add_argument("--work", type=Path, help="keep runs and logs here; left out: a temporary folder")
    parser.add_argument("--trial", action="store_true", help="one of each, no measurement; with --results")
    options = parser.parse_args(argv)
    if options.trial and options.results is None:
        parser.error("--trial measures nothing: give it --results FOLDER, so that it replaces no measurement")
    if reason := why_not("cgroup"):
        raise SystemExit(f"benchmarks/slurm.py: {reason}")
    work = options.work.resolve() if options.work else Path(tempfile.mkdtemp(prefix="bench-slurm-"))
    try:
        result = run(TRIAL if options.trial else FULL, work)
    finally:
        if not options.work:
            shutil.rmtree(work, ignore_errors=True)
    results = options.results or HERE / "results"
    target = results / "slurm-cpu"
    save_result(result, render(result), target)


if __name__ == "__main__":
    main()
