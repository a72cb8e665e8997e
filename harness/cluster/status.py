"""How runs stand: what their folders say, and what Slurm says of their jobs, put together.

    pending    its job waits, and no life of the run has begun in it          held       it waits for somebody to release it
    requeued   its job waits to go on                                         ending     Slurm is ending the job
    running    its job, or a `harness run`, is there                          stopped    it saved and left (75), and can be continued
    done       trained to its end and exported                                cancelled  its job was taken away by somebody
    failed     it ended with an error                                         lost       its end was written by nobody
    new        no life has begun                                              unknown    Slurm cannot be asked, or its ledger not be read

An end is told from the run's own files first, because Slurm forgets jobs within minutes and no slurmdbd is asked. Slurm is asked once,
however many runs there are, and not at all when none of them was submitted. Nothing here writes.
"""

import contextlib
import fcntl
import json
import math
import os
import re
import shlex
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import yaml

from harness.checkpoint.ledger import read_ledger
from harness.checkpoint.selection import checkpoints
from harness.cluster.slurm import SlurmJob, is_alive, list_jobs
from harness.cluster.submission import JOB, last_job, read_job, since_submitted
from harness.errors import CheckpointError, ClusterError, LaunchError, Stopped
from harness.failures import explain_failure
from harness.run import LOCK, RunDir, rank_reports, read_outcome
from harness.share import read_share, units_of
from harness.tracking.metrics import FILE_NAME

ENDED = ("done", "stopped", "failed", "cancelled", "lost")
HOLDS = ("REQUEUE_HOLD", "SPECIAL_EXIT", "SUSPENDED", "STOPPED")
TAIL_BYTES = 256 * 1024
"""So much of the end of metrics.jsonl is read: a few hundred lines."""
RATE_INTERVALS = 20
"""The time of a step is the mean over so many of the newest intervals between two logged steps: evaluations and saves count."""


@dataclass(frozen=True)
class RunStatus:
    """One run at one moment. Times are Unix times."""

    run: Path
    state: str
    """One of those above."""
    reason: str = ""
    phase: str = ""
    """What rank 0 does, while the run is running."""
    step: int | None = None
    """Of a run that does units: how many are there, by whomever."""
    steps: int | None = None
    """Where training ends; None as long as nobody knows."""
    counted: str = "step"
    """What they count: `step` or `units`."""
    loss: float | None = None
    step_s: float | None = None
    """What a step takes of late."""
    lives: int = 0
    requeues: int = 0
    """How often the run has come back from the queue."""
    commit: int | None = None
    """The step of the last commit."""
    committed: float | None = None
    hosts: tuple[str, ...] = ()
    job: str | None = None
    starts: float | None = None
    """When Slurm expects to start the job, if it can say."""
    log: Path | None = None
    """The file to read."""
    next: str = ""
    """The command to type next."""

    @property
    def is_there(self) -> bool:
        """Something of it runs, or waits to."""
        return self.state not in (*ENDED, "new", "unknown")

    @property
    def text(self) -> str:
        """State and what is known of it, in one line."""
        return self.state + (f": {self.reason or self.phase}" if self.reason or self.phase else "")

    @property
    def go_on(self) -> str:
        """The command that has the run go on after it has ended."""
        if self.job or (self.run / JOB).is_file():
            return f"harness submit {shlex.quote(str(self.run))}"
        # PIPELINE/STAGE/shard-000
        what = self.run.parents[1] if self.counted == "units" else self.run / "recipe.yaml"
        return f"harness run {shlex.quote(str(what))}"

    @property
    def left_s(self) -> float | None:
        """What is left of the training, without any time in the queue."""
        if not self.is_there or None in (self.step_s, self.step, self.steps):
            return None
        return self.step_s * max(0, self.steps - self.step)

    @property
    def fraction(self) -> float | None:
        return min(1.0, self.step / self.steps) if self.steps and self.step is not None else None


def read_statuses(runs: Iterable[RunDir]) -> list[RunStatus]:
    """How they stand, in their order. Slurm is asked for all of them at once; where it cannot be, that is the reason of the runs it has."""
    runs = list(runs)
    ids = {run.path: last_job(run) for run in runs}
    jobs, unasked = {}, ""
    try:
        jobs = list_jobs(filter(None, ids.values()))
    except ClusterError as error:
        unasked = str(error)
    return [read_status(run, ids[run.path], jobs.get(ids[run.path]), unasked) for run in runs]


def read_status(run: RunDir, job_id: str | None, job: SlurmJob | None, unasked: str = "") -> RunStatus:
    """From the run's files and its job as Slurm sees it, None when Slurm does not know it. `unasked`: why Slurm could not be asked."""
    try:
        events = read_ledger(run.ledger)
    except CheckpointError as error:
        return RunStatus(run.path, "unknown", str(error), job=job_id)
    life = life_of(run, job_id, events)
    status = _judge(run, job_id, job, life, events, unasked)
    status = replace(status, lives=len(run.attempts()), requeues=_requeues(events), job=job_id, **_progress(run, life, events, status))
    if job and job.state == "PENDING":
        status = replace(status, starts=job.started)
    status = replace(status, hosts=_hosts(job, life), log=status.log or _log(run, job_id, life))
    return replace(status, next=_next(status))


# ---- state


def _judge(run: RunDir, job_id: str | None, job: SlurmJob | None, life: Path | None, events: list[dict], unasked: str) -> RunStatus:
    """State and reason, and for a failure the log of the rank that failed."""
    outcome = read_outcome(life)
    if is_alive(job):
        return _judge_living(run, job, life, events)
    if job_id is None and is_held(run):
        return RunStatus(run.path, "running", phase=_phase(life) or "starting")
    if (outcome or {}).get("outcome") == "done" or was_done_by_hand(run):
        return RunStatus(run.path, "done")
    if unasked:
        return RunStatus(run.path, "unknown", unasked)
    last = next((event for event in reversed(since_submitted(events)) if event["event"] in ("gave_up", "job_began")), {})
    if last.get("event") == "gave_up" and not (job and job.state == "CANCELLED"):
        # The job's own words; Slurm's are gone within minutes.
        stopped = last["exit_code"] == Stopped.exit_code
        blamed = _failed(run, life).log if life and not stopped and rank_reports(life, "errors") else None
        return RunStatus(run.path, "stopped" if stopped else "failed", last["why"], log=blamed)
    if job and job.state == "CANCELLED":
        return RunStatus(run.path, "cancelled", f"job {job.id} was cancelled")
    if outcome and outcome["outcome"] == "stopped":
        return RunStatus(run.path, "stopped", outcome["reason"])
    if life and not outcome and (job_id is None or rank_reports(life, "errors")):
        return _failed(run, life)
    verdict = next((event for event in reversed(events) if life and event["event"] == "life_ended" and event["life"] == life.name), None)
    if verdict and verdict["then"] == "stop":
        return RunStatus(run.path, "failed", verdict["why"])
    if outcome:
        return RunStatus(run.path, "failed", outcome["reason"])
    if job_id is None:
        return RunStatus(run.path, "new", "no life has begun")
    if job is None and _job_began(events) is None:
        # Cancelled while it waited, or because what it waited for failed; of an array's element Slurm forgets that at once.
        return RunStatus(run.path, "cancelled", f"Slurm no longer knows job {job_id}, which never began")
    if job is None:
        return RunStatus(run.path, "lost", f"Slurm no longer knows job {job_id}, and nothing says how it ended")
    ended = f"job {job.id} ended: {job.state}" + (f", {job.reason}" if job.reason else "")
    if life:
        return RunStatus(run.path, "lost", f"{ended}; the run could not say how")
    return RunStatus(run.path, "failed", f"{ended}, before a life of the run began")


def _judge_living(run: RunDir, job: SlurmJob, life: Path | None, events: list[dict]) -> RunStatus:
    if job.state in HOLDS or "held" in job.reason.lower():
        return RunStatus(run.path, "held", job.reason or job.state)
    if job.state == "COMPLETING":
        return RunStatus(run.path, "ending", job.reason, _phase(life))
    if job.state not in ("PENDING", "REQUEUED"):
        return RunStatus(run.path, "running", phase=_phase(life, since=job.started or 0.0) or "starting")
    if life is None and not job.restarts:
        return RunStatus(run.path, "pending", job.reason)
    whys = [event["why"] for event in events if event["event"] == "requeued"]
    return RunStatus(run.path, "requeued", "; ".join(filter(None, [*whys[-1:], job.reason])))


def _failed(run: RunDir, life: Path) -> RunStatus:
    """A life that is over, and that nobody could write an end of."""
    failure = explain_failure(life, 0)
    if failure.exit_code == Stopped.exit_code:
        return RunStatus(run.path, "stopped", failure.summary)
    blamed = re.search(r"\brank (\d+) on ", failure.text)
    if blamed is None:
        return RunStatus(run.path, "lost", "its processes are gone, and nothing says how they ended")
    return RunStatus(run.path, "failed", failure.summary, log=life / f"rank-{blamed[1]}.log")


def was_done_by_hand(run: RunDir) -> bool:
    """Whether the last life, though of no job, went to the end: a `harness run` where the job never came to it."""
    last = read_outcome(run.last_attempt())
    return last is not None and last["outcome"] == "done" and (run.final.is_dir() or read_share(run) is not None)


def is_held(run: RunDir) -> bool:
    """Whether a process has the run's lock: a `harness run`, or a job of it."""
    with contextlib.suppress(OSError), open(run.path / LOCK) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def life_of(run: RunDir, job_id: str | None, events: list[dict]) -> Path | None:
    """The folder of the last life, if that belongs to the run's present job; None while that has begun none."""
    last = run.attempts()[-1:]
    if job_id is not None and last:
        begun = _job_began(events)
        if begun is None or last[0] <= (begun["attempt"] or 0):
            return None
    return run.attempt(last[0]) if last else None


def _job_began(events: list[dict]) -> dict | None:
    """The last begin of the run's job since it was submitted."""
    return next((event for event in reversed(since_submitted(events)) if event["event"] == "job_began"), None)


def _requeues(events: list[dict]) -> int:
    return max(0, sum(event["event"] == "job_began" for event in since_submitted(events)) - 1)


def _phase(life: Path | None, since: float = 0.0) -> str:
    """What rank 0 does; empty when it has said nothing since."""
    reports = rank_reports(life, "alive", [0]) if life else []
    return reports[0]["phase"] if reports and reports[0]["time"] >= since else ""


def _hosts(job: SlurmJob | None, life: Path | None) -> tuple[str, ...]:
    if job and job.hosts:
        return job.hosts
    reports = sorted(rank_reports(life, "alive"), key=lambda report: report["rank"]) if life else []
    return tuple(dict.fromkeys(report["host"] for report in reports))


def _log(run: RunDir, job_id: str | None, life: Path | None) -> Path | None:
    """Rank 0's, or before there is one what the job itself has said."""
    rank_0 = life / "rank-0.log" if life else None
    return rank_0 if rank_0 and rank_0.is_file() else job_log(run, job_id) if job_id else None


def job_log(run: RunDir, job_id: str) -> Path | None:
    """What a job of the run has written; an array's lie in its own folder. None while it has written nothing."""
    places = [folder / "logs" / f"slurm-{job_id}.log" for folder in (run.path, run.path.parent)]
    return next((path for path in places if path.is_file()), None)


def _next(status: RunStatus) -> str:
    folder = shlex.quote(str(status.run))
    match status.state:
        case "done":
            return f"harness export {folder}" if status.counted == "step" else ""
        case "pending" | "requeued":
            return f"harness cancel {folder}"
        case "held":
            return f"scontrol release {status.job}"
        case "running" | "ending":
            return f"harness logs {folder} -f"
        case "failed" if status.log:
            rank = re.fullmatch(r"rank-(\d+)\.log", status.log.name)
            return f"harness logs {folder} " + (f"--rank {rank[1]}" if rank else "--job")
        case "unknown":
            return f"harness logs {folder}"
    return status.go_on


# ---- progress


def _progress(run: RunDir, life: Path | None, events: list[dict], status: RunStatus) -> dict:
    if read_share(run):
        units = units_of(run)
        return {"counted": "units"} | ({"step": units.there, "steps": units.count} if units else {})
    lines = _recent_metrics(run)
    losses = [line["train/loss"] for line in lines if line.get("train/loss") is not None]
    commit = next((event for event in reversed(events) if event["event"] == "committed"), {})
    return {
        "step": _step(run, life, commit.get("step"), status),
        "steps": _total_steps(run, lines),
        "loss": losses[-1] if losses else None,
        "step_s": _step_s(lines, [event["time"] for event in events if event["event"] == "life_began"]),
        "commit": commit.get("step"),
        "committed": commit.get("time"),
    }


def _step(run: RunDir, life: Path | None, commit: int | None, status: RunStatus) -> int | None:
    """The step that the run works on, or came to; while it waits, the one from which it goes on."""
    if status.state not in ("running", "ending", *ENDED):
        return commit
    outcome, life = read_outcome(life), life or run.last_attempt()
    if outcome and outcome["step"] is not None:
        return outcome["step"]
    # Another version's report may have none.
    steps = [report["step"] for report in rank_reports(life, "alive") if report.get("step") is not None] if life else []
    return max(steps, default=commit)


def _recent_metrics(run: RunDir) -> list[dict]:
    """The last whole lines of metrics.jsonl, oldest first."""
    try:
        with open(run.path / FILE_NAME, "rb") as file:
            start = max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES)
            file.seek(start)
            written = file.read().split(b"\n")
    except FileNotFoundError:
        return []
    lines = []
    # The first may be cut, and a life that was killed may have torn any, so that what is left of it may be read as something else.
    for written_line in written[1 if start else 0 :]:
        with contextlib.suppress(ValueError):
            line = json.loads(written_line)
            if isinstance(line, dict) and isinstance(line.get("step"), int) and isinstance(line.get("time"), int | float):
                lines.append(line)
    return lines


def _total_steps(run: RunDir, lines: list[dict]) -> int | None:
    """What the recipe says, else what the newest checkpoint knows, else what the share of the epochs that is done comes to."""
    recipe = None
    with contextlib.suppress(OSError, ValueError, yaml.YAMLError, KeyError, TypeError):
        recipe = yaml.safe_load(run.recipe.read_text())["train"]
    recipe = recipe if isinstance(recipe, dict) else {}
    if recipe.get("max_steps"):
        return recipe["max_steps"]
    for _, folder in checkpoints(run.path)[:1]:
        with contextlib.suppress(OSError, ValueError, KeyError):
            return json.loads((folder / "trainer_state.json").read_bytes())["max_steps"]
    logged = [line for line in lines if line.get("train/epoch")]
    if logged and recipe.get("num_train_epochs"):
        return math.ceil(recipe["num_train_epochs"] * logged[-1]["step"] / logged[-1]["train/epoch"] - 1e-6)
    return None


def _step_s(lines: list[dict], lives_began: list[float]) -> float | None:
    """Seconds of a step of late. What lies between two lives is not the training's."""
    logged = [line for line in lines if "train/loss" in line]
    intervals = [
        (after["time"] - before["time"], after["step"] - before["step"])
        for before, after in pairwise(logged)
        if after["step"] > before["step"] and not any(before["time"] <= began <= after["time"] for began in lives_began)
    ][-RATE_INTERVALS:]
    return sum(seconds for seconds, _ in intervals) / sum(steps for _, steps in intervals) if intervals else None


def progress_line(run: RunDir) -> str:
    """`step 120/2000 loss 1.234` or `units 12/40`, for the comment that squeue shows; empty before the first step."""
    if read_share(run):
        units = units_of(run)
        return f"units {units.there}/{units.count}" if units else ""
    life, lines = run.last_attempt(), _recent_metrics(run)
    reports = rank_reports(life, "alive", [0]) if life else []
    if not reports or reports[0]["step"] is None:
        return ""
    total, losses = _total_steps(run, lines), [line["train/loss"] for line in lines if line.get("train/loss") is not None]
    return f"step {reports[0]['step']}" + (f"/{total}" if total else "") + (f" loss {losses[-1]:.4g}" if losses else "")


# ---- which runs


def find_runs(asked: str, root: Path) -> list[RunDir]:
    """The runs that `asked` means: a run folder; a folder of runs, such as an array's or a pipeline's; a job's id; or `all` below `root`.
    By name. Raises LaunchError where there is none."""
    if not asked.strip():
        # An unset variable of a shell must not mean everything below this folder.
        raise LaunchError("an empty name: no run; give a run folder, a folder of runs, the id of a job, or `all`")
    path = root if asked == "all" else Path(asked).expanduser()
    if path.is_dir():
        runs, missing = list(_runs_below(path)), "holds no run; give a run folder such as runs/first, or a folder in which there are some"
    elif re.fullmatch(r"\d+(_\d+)?", asked):
        runs = [run for run in _runs_below(root) if any(asked in (job, job.partition("_")[0]) for job in jobs_of(run))]
        missing = f"no run below {root} was sent as that job; give its folder, or where to look with --root"
    else:
        runs, missing = [], "is no folder; give a run folder, a folder of runs, the id of a job, or `all`"
    if not runs:
        raise LaunchError(f"{path}: {missing}")
    return [RunDir(run.path.resolve()) for run in runs]


def _runs_below(path: Path, levels: int = 4) -> Iterator[RunDir]:
    """A run folder is one with a recipe.yaml, and holds no others. `levels`: runs/PIPELINE/ARRAY/ELEMENT; links may lead in a circle."""
    if (path / "recipe.yaml").is_file():
        yield RunDir(path)
    elif levels:
        with contextlib.suppress(OSError):
            for folder in sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith(".")):
                yield from _runs_below(folder, levels - 1)


def jobs_of(run: RunDir) -> list[str]:
    """The ids of all jobs that the run has had, `123_4` in an array, oldest first; none for a run that was never sent."""
    return [job["id"] for job in read_job(run)["jobs"]] if (run.path / JOB).is_file() else []


def format_left(seconds: float | None) -> str:
    """`3 d 4 h`, `4 h 12 min`, `12 min`, `40 s`; empty for None."""
    if seconds is None:
        return ""
    minutes = round(seconds / 60)
    if minutes >= 48 * 60:
        return f"{minutes // 1440} d {minutes % 1440 // 60} h"
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min" if seconds >= 90 else f"{seconds:.0f} s"
