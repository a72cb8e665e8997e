"""Sending a run to Slurm: everything that can be wrong is found first, then the run folder is made, then the script is sent.

    job.sbatch     the script, as it was sent (harness.cluster.render)
    cluster.yaml   the resolved cluster file
    code.diff      what the checkout's files had that its commit had not
    job.json       {"cluster", "nodes", "processes_per_node", "time", "directory", "allowed_changes", "merge", "code": {"commit", "diff"},
                    "jobs": [{"id", "submitted", "why"}]}: the last of the jobs is the run's; the others are those that it took over from

The promise: one job at a time works in a run folder. A second submit while one lives is refused, and so is one beside a `harness run`.
"""

import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import harness
from harness.checkpoint.ledger import Ledger
from harness.checkpoint.resume import check_continuation
from harness.cluster import slurm
from harness.cluster.render import BatchJob, render_train
from harness.cluster.schema import Cluster, render_cluster
from harness.cluster.secrets import check_secrets
from harness.errors import ClusterError, LaunchError, ModelError
from harness.hub.cache import find_missing, hub_cache, is_offline_by
from harness.hub.needs import find_needs
from harness.launcher import Machines, check_device, plan_launch
from harness.model.export import MANIFEST
from harness.planner import Place, plan_recipe
from harness.planner.fit import plan_changes
from harness.planner.gpus import GIB
from harness.planner.render import gib, render_overrides
from harness.recipe import Recipe
from harness.recipe.backend import load_backend
from harness.resources import cache_root, code_root
from harness.run import RunDir, git_commit, is_complete, write_text_atomically
from harness.share import Share, check_share, is_share_done, processes_of, read_share, save_share

SCRIPT, CLUSTER, JOB, DIFF = "job.sbatch", "cluster.yaml", "job.json", "code.diff"


@dataclass(frozen=True)
class Submission:
    """One run and where it is to run."""

    recipe: Recipe
    cluster: Cluster
    share: Share | None = None
    """Of which work it does a share; None: it trains."""
    nodes: int = 1
    after: tuple[str, ...] = ()
    """Jobs that must have succeeded before."""
    awaited: tuple[str, ...] = ()
    """Folders that are not there yet, because those jobs make them."""
    merge: bool = False
    """When the run is done, merge its adapter into its base (RUN/merged)."""
    allowed: tuple[str, ...] = ()
    """Keys in which the recipe may differ from the checkpoint's."""
    fresh: bool = False
    despite_plan: bool = False
    """Send it although its plan says that it cannot fit."""
    source: str = ""
    """What the person called the recipe, for the script's heading."""

    @property
    def run(self) -> RunDir:
        return RunDir.of(self.recipe)

    @property
    def machines(self) -> Machines:
        ranks = self.cluster.ranks_per_node
        return Machines(processes_of(self.recipe, ranks) if self.share else ranks, self.nodes)

    def batch_job(self) -> BatchJob:
        return BatchJob(
            name=self.run.path.name,
            run=self.run.path,
            cluster=self.cluster,
            nodes=self.nodes,
            time=self.cluster.time,
            python=self.cluster.python or sys.executable,
            package_root=code_root(),
            recipe=self.source,
            exported=tuple(name for name in self.cluster.environment if name in os.environ),
        )


def render(submission: Submission) -> str:
    """The script, after everything was checked that can be without a folder: a pure function of what was asked."""
    check_submission(submission)
    return render_train(submission.batch_job())


def submit(submission: Submission) -> str:
    """Check, make the run folder, send the script. Returns the job's id."""
    check_submission(submission)
    save_submission(submission)
    return send_submission(submission)


# ---- what can be wrong


def check_submission(submission: Submission) -> None:
    """Raises a HarnessError that says what of recipe, cluster, files and run folder do not fit together."""
    run, recipe = submission.run, submission.recipe
    check_are_free([run])
    if not submission.fresh and is_finished(run, recipe, submission.merge):
        raise LaunchError(f"{run.path}: this run is complete ({run.final}); give another output_dir, or --fresh to begin it again")
    check_can_begin(submission)


def check_are_free(runs: Iterable[RunDir]) -> None:
    """Raises LaunchError while a job of one of these runs lives in Slurm."""
    for run, job in live_jobs(runs):
        name = shlex.quote(str(run.path))
        raise LaunchError(
            f"{run.path}: job {job.id} of this run lives ({job.state}); watch it with `harness status {name}`, "
            f"or end it with `harness cancel {name} --save`, or choose another output_dir"
        )


def live_jobs(runs: Iterable[RunDir]) -> list[tuple[RunDir, slurm.SlurmJob]]:
    """Those of the runs that have a job in Slurm now, and the job. One call of squeue."""
    ids = {job_id: run for run in runs if (job_id := last_job(run))}
    return [(ids[job_id], job) for job_id, job in slurm.list_jobs(ids).items() if job_id in ids and slurm.is_alive(job)]


def is_finished(run: RunDir, recipe: Recipe, merge: bool) -> bool:
    """Whether this very recipe has been trained to its end, and merged where that was asked; of a share, whether all units are there."""
    if read_share(run):
        return is_share_done(run, recipe)
    return is_complete(run, recipe) and (not merge or is_merged(run))


def is_merged(run: RunDir) -> bool:
    """Whether RUN/merged was made from the adapter that lies in RUN/final now."""
    made = [json.loads(file.read_text()) for folder in (run.final, run.merged) if (file := folder / MANIFEST).is_file()]
    return len(made) == 2 and all(made[0][key] == made[1][key] for key in ("base_digest", "data", "recipe_digest", "step"))


def check_can_begin(submission: Submission) -> None:
    """What does not depend on whether the run is done or lives."""
    recipe, cluster = submission.recipe, submission.cluster
    check_work(recipe, submission.share, submission.machines, has_gpu=cluster.gpus_per_node > 0)
    if not submission.despite_plan:
        check_can_fit(submission)
    if cluster.secrets:
        check_secrets(cluster.secrets)
    for folder in cluster.shared:
        if not Path(folder).expanduser().is_dir():
            raise ClusterError(f"cluster {cluster.name}: shared: {folder} is no folder here; it must be seen from the login node too")
    check_inputs(recipe, submission.awaited)
    check_fetched(submission)
    if not (submission.fresh or submission.share):
        check_continuation(submission.run, recipe, load_backend(recipe.backend), submission.allowed, must_exist=False)


def check_work(recipe: Recipe, share: Share | None, machines: Machines, *, has_gpu: bool) -> None:
    """Raises RecipeError or LaunchError when these machines cannot do what the run is for."""
    if share:
        check_share(recipe, share, machines.world_size)
        return
    plan_launch(recipe, machines, [])
    check_device(recipe, load_backend(recipe.backend), has_gpu=has_gpu)


def check_can_fit(submission: Submission) -> None:
    """Raises LaunchError for a training whose lowest plan is more than a GPU of the cluster holds. Where the cluster file says nothing of
    its GPUs, or the model is not known before it is there, nothing is said."""
    recipe, cluster = submission.recipe, submission.cluster
    if submission.share or cluster.gpu is None:
        return
    place = Place(cluster.ranks_per_node, submission.nodes, cluster.gpu, cluster.memory_gib * GIB if cluster.memory_gib else None)
    try:
        plan = plan_recipe(recipe, place)
    except ModelError:
        return
    if plan.verdict != "cannot fit":
        return
    changes = plan_changes(plan.setting, place)
    remedy = f"; it fits with {' or with '.join(map(render_overrides, changes))}" if changes else ""
    raise LaunchError(
        f"cluster {cluster.name}: GPUs of {gib(cluster.gpu.bytes)} GiB cannot hold this run: it takes {gib(plan.memory.peak.low)} GiB of "
        f"each at least ({gib(plan.memory.peak.expected)} expected; most of it: {plan.memory.dominant}){remedy}. `harness plan` shows "
        "all of it; --despite-plan sends it anyway"
    )


def unshared_cache(recipe: Recipe, cluster: Cluster) -> Path | None:
    """Where a teacher's cache will lie, when the cluster file says what nodes share and that is not it."""
    place = Path(recipe.teacher.cache or cache_root(recipe.data.cache_dir)).expanduser().resolve()
    folders = [Path(folder).expanduser().resolve() for folder in cluster.shared]
    return place if folders and not any(place.is_relative_to(folder) for folder in folders) else None


def check_inputs(recipe: Recipe, awaited: tuple[str, ...] = ()) -> None:
    """A path with a folder in it that leads nowhere is found here and not after hours in the queue. What else it may be, a hub's name or a
    glob, is for the job to find; what is `awaited` is made meanwhile."""
    named = [
        ("model.name_or_path", recipe.model.name_or_path),
        ("model.init", recipe.model.init),
        ("model.tokenizer", recipe.model.tokenizer),
        ("model.adapter", recipe.model.adapter),
    ]
    named += [(f"data.{key}.{at}.path", source.path) for key in ("train", "eval") for at, source in enumerate(getattr(recipe.data, key))]
    for key, name in named:
        is_path = name is not None and (name.startswith(("/", "./", "../", "~")) or name.endswith((".jsonl", ".json", ".parquet", ".gz")))
        is_there = name in awaited or is_path and Path(name).expanduser().exists()
        if is_path and not is_there and not any(sign in name for sign in "*?["):
            raise LaunchError(f"{key} = {name}: there is no such file or folder (looked for from {Path.cwd()}); mend the path")


def check_fetched(submission: Submission) -> None:
    """Raises LaunchError when the job is told not to ask the hub, and what it needs from there is not in the cache."""
    cluster, taken = submission.cluster, {name: os.environ.get(name, "") for name in submission.cluster.environment}
    offline = is_offline_by(taken) or any(OFFLINE_BY_SETUP.search(line) for line in cluster.setup)
    if not offline:
        return
    for need in find_needs([submission.recipe], map(Path, submission.awaited)):
        missing = find_missing(need)
        if missing and (submission.share or not need.spared):
            name = shlex.quote(submission.source or str(submission.run.recipe))
            raise LaunchError(
                f"{need.key} = {need.shown}: {missing} ({hub_cache()}), and the job is offline (HF_HUB_OFFLINE); `harness fetch {name}` "
                "brings it, where there is a network"
            )


OFFLINE_BY_SETUP = re.compile(r"\b(HF_HUB|TRANSFORMERS)_OFFLINE=[\"']?(1|on|yes|true)\b", re.IGNORECASE)


# ---- what is written and sent


def save_submission(submission: Submission) -> None:
    """Make the run folder, with everything that its job reads."""
    run = RunDir.create(submission.recipe, fresh=submission.fresh)
    if submission.share:
        save_share(run, submission.share)
    diff = code_changes()
    content = {
        "cluster": submission.cluster.name,
        "nodes": submission.nodes,
        "processes_per_node": submission.machines.processes,
        "time": submission.cluster.time,
        "directory": os.getcwd(),
        "allowed_changes": list(submission.allowed),
        "merge": submission.merge,
        "code": {"commit": git_commit(), "diff": DIFF if diff else None},
        "jobs": read_job(run)["jobs"] if (run.path / JOB).is_file() else [],
    }
    (run.path / "logs").mkdir(exist_ok=True)
    write_text_atomically(run.path / SCRIPT, render_train(submission.batch_job()))
    write_text_atomically(run.path / CLUSTER, render_cluster(submission.cluster))
    if diff:
        write_text_atomically(run.path / DIFF, diff)
    write_job(run, content)
    Ledger(run.ledger, None).append("submitted", last_attempt=(run.attempts() or [0])[-1])


def send_submission(submission: Submission) -> str:
    """Send what `save_submission` has made. Returns the job's id."""
    run = submission.run
    job_id = slurm.submit_script(run.path / SCRIPT, f"--chdir={os.getcwd()}", *dependency_flags(submission.after))
    note_job(run, job_id, "submitted")
    return job_id


def dependency_flags(after: Iterable[str]) -> list[str]:
    """sbatch's, for a job that begins when these have succeeded, and is cancelled when one of them fails."""
    return [f"--dependency=afterok:{':'.join(after)}", "--kill-on-invalid-dep=yes"] if after else []


def note_job(run: RunDir, job_id: str, why: str) -> None:
    """From now on this is the run's job. Read anew, because the one before may be writing too."""
    content = read_job(run)
    write_job(run, content | {"jobs": [*content["jobs"], {"id": job_id, "submitted": time.time(), "why": why}]})


def since_submitted(events: list[dict]) -> list[dict]:
    """What the ledger tells since a person sent the run last, that event first; everything where nobody has."""
    return events[max((number for number, event in enumerate(events) if event["event"] == "submitted"), default=0) :]


def last_job(run: RunDir) -> str | None:
    """The id of the run's present job; None for a run that was never sent."""
    jobs = read_job(run)["jobs"] if (run.path / JOB).is_file() else []
    return jobs[-1]["id"] if jobs else None


def read_job(run: RunDir) -> dict:
    """Raises LaunchError for a folder whose run was never submitted."""
    try:
        return json.loads((run.path / JOB).read_text())
    except FileNotFoundError:
        raise LaunchError(f"{run.path}: was never submitted to Slurm (it holds no {JOB})") from None


def write_job(run: RunDir, content: dict) -> None:
    write_text_atomically(run.path / JOB, json.dumps(content, indent=2) + "\n")


def code_changes() -> str:
    """What the checkout that harness runs from has and its commit has not; empty for an installed copy."""
    here = Path(harness.__file__).resolve().parent
    if git_commit() is None:
        return ""
    done = subprocess.run(["git", "-C", str(here.parent), "diff", "HEAD"], capture_output=True, text=True, errors="replace", timeout=60)
    return done.stdout
