"""Sending a run to Slurm: everything that can be wrong is found first, then the run folder is made, then the script is sent.

    job.sbatch     the script, as it was sent (harness.cluster.render)
    cluster.yaml   the resolved cluster file
    code.diff      what the checkout's files had that its commit had not
    job.json       {"cluster", "nodes", "processes_per_node", "time", "directory", "allowed_changes", "code": {"commit", "diff"},
                    "jobs": [{"id", "submitted", "why"}]}: the last of the jobs is the run's; the others are those that it took over from

The promise: one job at a time works in a run folder. A second submit while one lives is refused, and so is one beside a `harness run`.
"""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import harness
from harness.checkpoint.ledger import Ledger
from harness.checkpoint.resume import check_continuation
from harness.cluster import slurm
from harness.cluster.render import BatchJob, render_train
from harness.cluster.schema import Cluster, render_cluster
from harness.cluster.secrets import check_secrets
from harness.errors import ClusterError, LaunchError
from harness.launcher import Machines, check_device, plan_launch
from harness.recipe import Recipe
from harness.recipe.backend import load_backend
from harness.run import RunDir, git_commit, is_complete, write_text_atomically

SCRIPT, CLUSTER, JOB, DIFF = "job.sbatch", "cluster.yaml", "job.json", "code.diff"


@dataclass(frozen=True)
class Submission:
    """One run and where it is to run."""

    recipe: Recipe
    cluster: Cluster
    nodes: int = 1
    time: str | None = None
    """Left out: the cluster file's."""
    after: tuple[str, ...] = ()
    """Jobs that must have succeeded before."""
    allowed: tuple[str, ...] = ()
    """Keys in which the recipe may differ from the checkpoint's."""
    fresh: bool = False
    source: str = ""
    """What the person called the recipe, for the script's heading."""

    @property
    def run(self) -> RunDir:
        return RunDir.of(self.recipe)

    @property
    def machines(self) -> Machines:
        return Machines(self.cluster.ranks_per_node, self.nodes)

    def batch_job(self) -> BatchJob:
        return BatchJob(
            name=self.run.path.name,
            run=self.run.path,
            cluster=self.cluster,
            nodes=self.nodes,
            time=self.time or self.cluster.time,
            python=self.cluster.python or sys.executable,
            package_root=str(Path(harness.__file__).resolve().parents[1]),
            recipe=self.source,
            exported=tuple(name for name in self.cluster.environment if name in os.environ),
        )


def render(submission: Submission) -> str:
    """The script, after everything was checked that can be without a folder: a pure function of what was asked."""
    check_submission(submission)
    return render_train(submission.batch_job())


def check_submission(submission: Submission) -> None:
    """Raises a HarnessError that says what of recipe, cluster, files and run folder do not fit together."""
    recipe, cluster, run = submission.recipe, submission.cluster, submission.run
    backend = load_backend(recipe.backend)
    plan_launch(recipe, submission.machines, [])
    check_device(recipe, backend, has_gpu=cluster.gpus_per_node > 0)
    if cluster.secrets:
        check_secrets(cluster.secrets)
    for folder in cluster.shared:
        if not Path(folder).expanduser().is_dir():
            raise ClusterError(f"cluster {cluster.name}: shared: {folder} is no folder here; it must be seen from the login node too")
    check_inputs(recipe)
    check_is_free(run)
    if not submission.fresh:
        if is_complete(run, recipe):
            raise LaunchError(f"{run.path}: this run is complete ({run.final}); give another output_dir, or --fresh to begin it again")
        check_continuation(run, recipe, backend, submission.allowed, must_exist=False)


def check_inputs(recipe: Recipe) -> None:
    """A path with a folder in it that leads nowhere is found here and not after hours in the queue. What else it may be, a hub's name or a
    glob, is for the job to find."""
    named = [
        ("model.name_or_path", recipe.model.name_or_path),
        ("model.init", recipe.model.init),
        ("model.tokenizer", recipe.model.tokenizer),
    ]
    named += [(f"data.{key}.{at}.path", source.path) for key in ("train", "eval") for at, source in enumerate(getattr(recipe.data, key))]
    for key, name in named:
        is_path = name is not None and (name.startswith(("/", "./", "../", "~")) or name.endswith((".jsonl", ".json", ".parquet", ".gz")))
        if is_path and not any(sign in name for sign in "*?[") and not Path(name).expanduser().exists():
            raise LaunchError(f"{key} = {name}: there is no such file or folder (looked for from {Path.cwd()}); mend the path")


def check_is_free(run: RunDir) -> None:
    """Raises LaunchError while a job of this run lives in Slurm."""
    if not (run.path / JOB).is_file():
        return
    jobs = read_job(run)["jobs"]
    job = slurm.find_job(jobs[-1]["id"]) if jobs else None
    if slurm.is_alive(job):
        raise LaunchError(
            f"{run.path}: job {job.id} of this run lives ({job.state}); watch it with `harness status {run.path}`, "
            f"or end it with `harness cancel {run.path} --save`, or choose another output_dir"
        )


def submit(submission: Submission) -> str:
    """Check, make the run folder, send the script. Returns the job's id."""
    script = render(submission)
    run = RunDir.create(submission.recipe, fresh=submission.fresh)
    diff = code_changes()
    content = {
        "cluster": submission.cluster.name,
        "nodes": submission.nodes,
        "processes_per_node": submission.cluster.ranks_per_node,
        "time": submission.time or submission.cluster.time,
        "directory": os.getcwd(),
        "allowed_changes": list(submission.allowed),
        "code": {"commit": git_commit(), "diff": DIFF if diff else None},
        "jobs": read_job(run)["jobs"] if (run.path / JOB).is_file() else [],
    }
    (run.path / "logs").mkdir(exist_ok=True)
    write_text_atomically(run.path / SCRIPT, script)
    write_text_atomically(run.path / CLUSTER, render_cluster(submission.cluster))
    if diff:
        write_text_atomically(run.path / DIFF, diff)
    # Before the job can begin, which reads it.
    write_job(run, content)
    Ledger(run.ledger, None).append("submitted", last_attempt=(run.attempts() or [0])[-1])
    dependency = [f"--dependency=afterok:{':'.join(submission.after)}", "--kill-on-invalid-dep=yes"] if submission.after else []
    job_id = slurm.submit_script(run.path / SCRIPT, f"--chdir={content['directory']}", *dependency)
    write_job(run, content | {"jobs": [*content["jobs"], {"id": job_id, "submitted": time.time(), "why": "submitted"}]})
    return job_id


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
