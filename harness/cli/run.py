import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import click

from harness.checkpoint.resume import check_continuation
from harness.cli.arguments import RECIPE_CONTEXT, load_recipe, read_overrides, recipe_argument
from harness.cluster.pipeline import enter_directory, find_pipeline, load_pipeline, save_pipeline
from harness.cluster.slurm import NoAnswer
from harness.cluster.stages import check_order, done_stages, plan_stages
from harness.cluster.submission import JOB, check_are_free, check_inputs, check_work, is_finished
from harness.errors import RecipeError, Stopped
from harness.failures import explain_failure
from harness.launcher import Machines
from harness.life import FRUITLESS_LIVES, Life, has_nvidia_gpu, live, noted_signals, own_environment, place, progress, say, stopped_where
from harness.logs import quieten
from harness.recipe import Recipe
from harness.recipe.backend import load_backend
from harness.run import RunDir, StopRequest, smoke_recipe
from harness.share import Share, check_no_share, processes_of, save_share

ONE_CAUSE_S = 1.0
"""A terminal that closes, and a wrapper that hands Ctrl-C on, signal twice for one cause."""


@click.command("run", context_settings=RECIPE_CONTEXT)
@click.option(
    "--backend", help="Shard by this backend instead of the recipe's: single, ddp, zero1, zero2, zero3, zero3-offload, fsdp2, or a file."
)
@click.option(
    "--processes", type=click.IntRange(1), help="Ranks on this machine.  [default: 1, or one per GPU with a backend of several ranks]"
)
@click.option("--smoke", is_flag=True, help="Two steps on the longest rows, report the memory, and stop.")
@click.option("--resume", is_flag=True, help="Refuse to begin: there must be a checkpoint to continue from, which is done without it too.")
@click.option("--fresh", is_flag=True, help="Begin again: delete the run folder first, if there is one.")
@click.option(
    "--allow-change",
    "allowed",
    multiple=True,
    metavar="KEY",
    help="Continue although this differs: train.learning_rate, data, global_batch.",
)
@recipe_argument
def command(
    recipe: str,
    overrides: tuple[str, ...],
    backend: str | None,
    processes: int | None,
    smoke: bool,
    resume: bool,
    fresh: bool,
    allowed: tuple[str, ...],
):
    """Train RECIPE on this machine, or continue the run that lies in its folder. Of a pipeline: its stages, one after the other.

    On several machines: with NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT set (launch/multi-node.sh).
    Ctrl-C (or SIGTERM, SIGUSR1) saves and leaves with 75; the same command then continues.
    """
    if allowed and (fresh or smoke):
        raise RecipeError(
            f"--allow-change {allowed[0]} and --{'fresh' if fresh else 'smoke'}: nothing is continued, so nothing could differ"
        )
    if resume and (fresh or smoke):
        raise RecipeError(
            f"--resume and --{'fresh' if fresh else 'smoke'}: the one continues a run, the other begins one; give one of them"
        )
    if pipeline := find_pipeline(recipe):
        for option, value in (("backend", backend), ("smoke", smoke), ("resume", resume), ("allow-change", allowed)):
            if value:
                raise RecipeError(f"--{option}: {recipe} is a pipeline; give it for one of its stages' recipes, or set STAGE.key=value")
        sys.exit(run_pipeline(pipeline, read_overrides(overrides), processes, fresh=fresh))
    more = [f"backend={backend}"] if backend else []
    resolved = load_recipe(recipe, (*overrides, *more))
    if smoke:
        resolved, fresh = smoke_recipe(resolved), True
    processes = processes or default_processes(resolved)
    machines = Machines.from_environment(processes, dict(os.environ))
    exit_code = run_recipe(resolved, machines, smoke=smoke, resume=resume, fresh=fresh, allowed=allowed)
    if exit_code:
        sys.exit(exit_code)


def run_pipeline(file: Path, settings: list[str], processes: int | None, *, fresh: bool) -> int:
    """Run the stages that are not done, an array's runs one after the other, until one ends otherwise. Returns the exit code."""
    if int(os.environ.get("NNODES") or 1) > 1:
        raise RecipeError(f"{file}: with NNODES set; a pipeline runs on one machine, or on a cluster by `harness submit`")
    enter_directory(file)
    pipeline = load_pipeline(file, settings)
    plans = plan_stages(pipeline)
    done = set() if fresh else done_stages(plans)
    jobs = [(plan, index, recipe) for plan in plans for index, recipe in enumerate(plan.recipes_here)]
    # What is wrong with the last stage is no reason to have trained the first.
    for plan, index, recipe in jobs:
        check_work(recipe, plan.share_here, machines_of(recipe, plan.share_here, processes), has_gpu=has_nvidia_gpu())
        check_inputs(recipe, plan.awaited)
        if not (fresh or plan.share_here):
            check_continuation(plan.runs[index], recipe, load_backend(recipe.backend), ())
    if not fresh:
        check_order(plans, done, live=set())
    save_pipeline(pipeline)
    for at, (plan, index, recipe) in enumerate(jobs):
        run = plan.runs[index]
        name = f"{plan.name}/{run.path.name}" if plan.stage.array else plan.name
        if plan.name in done or not fresh and plan.is_done(index):
            click.echo(f"{name}: complete")
            continue
        click.secho(f"\n{name}", bold=True)
        code: int | None = None
        try:
            code = run_recipe(recipe, machines_of(recipe, plan.share_here, processes), fresh=fresh, share=plan.share_here)
            if code == 0 and index in plan.merged:
                code = merge(run)
        finally:
            # Also when an error with a name ends it, which says what was wrong.
            if code != 0:
                left = ", ".join(dict.fromkeys(plan.name for plan, _, _ in jobs[at + 1 :]))
                say(f"{name} did not come to its end" + (f"; not run: {left}" if left else "") + "; the same command goes on from here")
        if code:
            return code
    return 0


def machines_of(recipe: Recipe, share: Share | None, processes: int | None) -> Machines:
    ranks = default_processes(recipe)
    return Machines(processes or (processes_of(recipe, ranks) if share else ranks))


def merge(run: RunDir) -> int:
    """In a process of its own: this one stays small."""
    return subprocess.run(
        [sys.executable, "-m", "harness", "export", str(run.path), "--merge", "--force"], env=own_environment()
    ).returncode


def default_processes(recipe: Recipe) -> int:
    """One per visible GPU where the backend takes several ranks, else one."""
    if load_backend(recipe.backend).kind == "single":
        return 1
    return max(1, visible_gpus())


def visible_gpus() -> int:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([device for device in visible.split(",") if device.strip()])
    return len(list(Path("/proc/driver/nvidia/gpus").glob("*")))


def run_recipe(
    recipe: Recipe,
    machines: Machines,
    *,
    smoke: bool = False,
    resume: bool = False,
    fresh: bool = False,
    allowed: tuple[str, ...] = (),
    share: Share | None = None,
) -> int:
    """Prepare the data, make or take the run folder, and have ranks live in it until the run is done. Returns the exit code, after saying
    why it is not 0. share: of work that is done in place of a training."""
    run = RunDir.of(recipe)
    # Whatever can be wrong is found before a folder is made or a GPU taken.
    check_work(recipe, share, machines, has_gpu=has_nvidia_gpu())
    check_no_job_lives(run)
    if share is None:
        check_no_share(run)
    if not fresh:
        if is_finished(run, recipe, merge=False):
            click.echo(f"this run is complete: {place(run) if share else run.final}; begin again with --fresh")
            return 0
        if share is None:
            check_continuation(run, recipe, load_backend(recipe.backend), allowed, must_exist=resume)
    # A teacher is asked about samples, however a student packs them.
    prepare(recipe, packing=recipe.data.packing is True and share is None)
    if machines.index == 0:
        run = RunDir.create(recipe, fresh=fresh)
        if share:
            save_share(run, share)
    click.echo(f"run folder: {run.path}")
    arguments = [*(["--smoke"] if smoke else []), *(part for key in allowed for part in ("--allow-change", key))]
    return supervise(recipe, run, machines, arguments, most_lives=1 if smoke else FRUITLESS_LIVES)


def prepare(recipe: Recipe, *, packing: bool) -> None:
    """Tokenise before any rank starts, so that no GPU waits for it, and say what became of the rows."""
    quieten()
    from harness.data import prepare_recipe
    from harness.data.report import render_report
    from harness.model import load_tokenizer
    from harness.tasks.templates import training_template

    prepared = prepare_recipe(recipe, load_tokenizer(recipe), packing=packing, training_template=training_template)
    click.echo(render_report(prepared.report))
    click.echo(f"prepared in {prepared.folder}")


def check_no_job_lives(run: RunDir) -> None:
    """Raises LaunchError while Slurm has a job of this run, also one that still waits."""
    if (run.path / JOB).is_file() and shutil.which("squeue"):
        try:
            check_are_free([run])
        except NoAnswer as error:
            click.echo(f"warning: whether a job of this run lives is not known: {error}", err=True)


# ---- lives


class Terminal:
    """The first of the `signals` that come asks the run to save and leave, the second ends it at once."""

    def __init__(self, run: RunDir, signals: list[signal.Signals]):
        self._run, self._signals = run, signals
        self._asked_at: float | None = None

    def __call__(self, now: float) -> signal.Signals | None:
        while self._signals:
            number = self._signals.pop(0)
            if self._asked_at is None and ask_to_stop(self._run, number):
                self._asked_at = now
            elif self._asked_at is None or now - self._asked_at > ONE_CAUSE_S:
                return number
        return None


def ask_to_stop(run: RunDir, number: signal.Signals) -> bool:
    """Make the STOP file, which the ranks look for. False when that cannot be done."""
    try:
        StopRequest(f"{number.name} to harness run at {time.strftime('%Y-%m-%dT%H:%M:%S%z')}").write(run.stop)
    except OSError as error:
        say(f"{run.stop}: cannot be written ({error.strerror}), so the ranks are ended without saving")
        return False
    say("stopping: the run saves at the next step and leaves; press Ctrl-C again to leave at once without saving")
    return True


def supervise(recipe: Recipe, run: RunDir, machines: Machines, arguments: list[str], *, most_lives: int) -> int:
    """One life after the other: what a hang or a rollback has ended continues by itself, as long as that brings the run on."""
    fruitless: list[str] = []
    with noted_signals() as signals:
        while True:
            before = progress(run)
            life = live(recipe, run, machines, arguments, Terminal(run, signals))
            if life.ended_for:
                say(f"stopped by {life.ended_for.name} without saving; logs: {life.attempt or run.path}")
                return 128 + life.ended_for
            if life.outcome == "stopped":
                say(f"{stopped_where(life.facts)} ({life.facts['reason']}); {place(run)}; the same command continues")
                return Stopped.exit_code
            if (life.outcome == "done" and life.hang) or (life.outcome in ("done", None) and life.code == 0):
                return 0
            if life.outcome not in _ENDED_BY:
                failure = explain_failure(life.attempt, life.code, life.oom_kills)
                say(f"\n{failure.text}")
                if failure.exit_code == 1 and progress(run):
                    say(f"{place(run)}; the same command continues")
                return failure.exit_code
            why_not = why_no_life_follows(life, run, machines)
            if why_not:
                say(f"{life.facts['reason']}\n{why_not}; {place(run)}")
                return Stopped.exit_code
            fruitless = [*fruitless, f"  {life.attempt.name}: {life.facts['reason']}"] if progress(run) == before else []
            if len(fruitless) >= most_lives:
                lines = "\n".join(fruitless)
                say(f"\ngiven up: ended without a newer checkpoint or unit, {len(fruitless)} times in a row ({place(run)}):\n{lines}")
                return 1
            if life.outcome == "rolled_back":
                # A hang was told of when it was found.
                say(life.facts["reason"])
            say(f"{life.attempt.name} ended by a {_ENDED_BY[life.outcome]}; a new life begins: {place(run)}")


_ENDED_BY = {"hang": "hang", "rolled_back": "rollback"}


def why_no_life_follows(life: Life, run: RunDir, machines: Machines) -> str | None:
    """After a hang or a rollback: what keeps this command from going on by itself."""
    if life.unended:
        pids = ", ".join(map(str, sorted(life.unended)))
        return f"processes {pids} cannot be killed, because the kernel holds them; start the command again when they are gone"
    if machines.count > 1:
        return (
            "on several machines all must begin a life together, so none does by itself: start the command again on each, to continue "
            "(under Slurm: requeue the job)"
        )
    if run.stop.exists():
        return "stopped, which was asked for meanwhile; the same command continues"
    return None
