import contextlib
import functools
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click

from harness.cli.arguments import RECIPE_CONTEXT, load_recipe, recipe_argument
from harness.errors import HarnessError, RecipeError, Stopped
from harness.failures import count_oom_kills, explain_failure
from harness.launcher import Machines, check_device, plan_launch
from harness.logs import quieten
from harness.recipe import Recipe, load, recipe_digest, render_recipe
from harness.recipe.backend import load_backend
from harness.run import (
    ATTEMPT_VARIABLE,
    LAUNCH_VARIABLE,
    RunDir,
    rank_reports,
    read_outcome,
    smoke_recipe,
    write_outcome,
    write_text_atomically,
)
from harness.watchdog import LOOK_EVERY_S, Hang, Watchdog, end_processes, follow_parent

FRUITLESS_LIVES = 3
"""So many lives in a row may end in a hang or a rollback without a newer checkpoint."""
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
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
    """Train RECIPE on this machine, or continue the run that lies in its folder.

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
    more = [f"backend={backend}"] if backend else []
    resolved = load_recipe(recipe, (*overrides, *more))
    if smoke:
        resolved, fresh = smoke_recipe(resolved), True
    processes = processes or default_processes(resolved)
    machines = Machines.from_environment(processes, dict(os.environ))
    exit_code = run_recipe(resolved, machines, smoke=smoke, resume=resume, fresh=fresh, allowed=allowed)
    if exit_code:
        sys.exit(exit_code)


def default_processes(recipe: Recipe) -> int:
    """One per visible GPU where the backend takes several ranks, else one."""
    if load_backend(recipe.backend).kind == "single":
        return 1
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return max(1, len([device for device in visible.split(",") if device.strip()]))
    return max(1, len(list(Path("/proc/driver/nvidia/gpus").glob("*"))))


def run_recipe(
    recipe: Recipe, machines: Machines, *, smoke: bool = False, resume: bool = False, fresh: bool = False, allowed: tuple[str, ...] = ()
) -> int:
    """Prepare the data, make or take the run folder, and have ranks live in it until the run is done. Returns the exit code, after saying
    why it is not 0."""
    run = RunDir.of(recipe)
    # Whatever can be wrong is found before a folder is made or a GPU taken.
    plan_launch(recipe, machines, [])
    check_device(recipe, load_backend(recipe.backend), has_gpu=has_nvidia_gpu())
    if not fresh:
        if is_complete(run, recipe):
            click.echo(f"this run is complete: {run.final}; begin again with --fresh")
            return 0
        from harness.checkpoint.resume import check_continuation

        check_continuation(run, recipe, load_backend(recipe.backend), allowed, must_exist=resume)
    prepare(recipe)
    if machines.index == 0:
        run = RunDir.create(recipe, fresh=fresh)
    click.echo(f"run folder: {run.path}")
    arguments = [*(["--smoke"] if smoke else []), *(part for key in allowed for part in ("--allow-change", key))]
    return supervise(recipe, run, machines, arguments, most_lives=1 if smoke else FRUITLESS_LIVES)


def is_complete(run: RunDir, recipe: Recipe) -> bool:
    """Whether this very recipe has been trained to its end and exported."""
    ends = (read_outcome(run.attempt(number)) for number in reversed(run.attempts()))
    outcome = next(filter(None, ends), None)
    done = outcome is not None and outcome["outcome"] == "done" and run.final.is_dir()
    return done and recipe_digest(load(run.recipe)) == recipe_digest(recipe)


# ---- lives


@dataclass(frozen=True)
class Life:
    """How one start of this machine's ranks ended."""

    attempt: Path | None
    """None on another machine than the first when its ranks never met the first's."""
    code: int
    """The launcher's; negative for a signal."""
    oom_kills: int
    left_on: signal.Signals | None
    """The signal on which the ranks were ended at once."""
    hang: Hang | None
    unended: set[int]
    """Processes that could not be killed."""

    @property
    def outcome(self) -> str | None:
        """`done`, `stopped`, `rolled_back`, `hang`; None when ranks failed or were killed."""
        return self.facts.get("outcome")

    @functools.cached_property
    def facts(self) -> dict:
        hang = {"outcome": "hang", "reason": f"hang: {self.hang.text}"} if self.hang else {}
        return read_outcome(self.attempt) or hang


def supervise(recipe: Recipe, run: RunDir, machines: Machines, arguments: list[str], *, most_lives: int) -> int:
    """One life after the other: what a hang or a rollback has ended continues by itself, as long as that brings the run on."""
    fruitless: list[str] = []
    with noted_signals() as signals:
        while True:
            committed = last_commit(run)
            life = live(recipe, run, machines, arguments, signals)
            if life.left_on:
                say(f"stopped by {life.left_on.name} without saving; logs: {life.attempt or run.path}")
                return 128 + life.left_on
            if life.outcome == "stopped":
                place = _place(life.facts["checkpoint"])
                say(f"stopped at step {life.facts['step']} ({life.facts['reason']}); {place}; the same command continues")
                return Stopped.exit_code
            if (life.outcome == "done" and life.hang) or (life.outcome in ("done", None) and life.code == 0):
                return 0
            if life.outcome not in _ENDED_BY:
                failure = explain_failure(life.attempt, life.code, life.oom_kills)
                say(f"\n{failure.text}")
                if failure.exit_code == 1 and last_commit(run):
                    say(f"{_place(last_commit(run))}; the same command continues")
                return failure.exit_code
            newest = last_commit(run)
            why_not = why_no_life_follows(life, run, machines)
            if why_not:
                say(f"{life.facts['reason']}\n{why_not}; {_place(newest)}")
                return Stopped.exit_code
            fruitless = [*fruitless, f"  {life.attempt.name}: {life.facts['reason']}"] if newest == committed else []
            if len(fruitless) >= most_lives:
                lines = "\n".join(fruitless)
                say(f"\ngiven up: ended without a newer checkpoint, {len(fruitless)} times in a row ({_place(newest)}):\n{lines}")
                return 1
            if life.outcome == "rolled_back":
                # A hang was told of when it was found.
                say(life.facts["reason"])
            say(f"{life.attempt.name} ended by a {_ENDED_BY[life.outcome]}; a new life begins: {_place(newest)}")


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


def _place(checkpoint: int | None) -> str:
    return "no checkpoint was made yet" if checkpoint is None else f"the newest checkpoint is checkpoint-{checkpoint}"


def last_commit(run: RunDir) -> int | None:
    from harness.checkpoint.ledger import read_ledger

    return max((event["step"] for event in read_ledger(run.ledger) if event["event"] == "committed"), default=None)


def live(recipe: Recipe, run: RunDir, machines: Machines, arguments: list[str], signals: list[signal.Signals]) -> Life:
    """Start this machine's ranks, watch over them, and hand on the `signals` that this command gets, until they have ended."""
    attempt, launch = run.open_attempt() if machines.index == 0 else None, uuid.uuid4().hex
    ranks = range(machines.index * machines.processes, (machines.index + 1) * machines.processes)
    asked_at = left_on = hang = None
    with rank_recipe(recipe, run, machines) as file:
        argv = plan_launch(recipe, machines, ["--recipe", str(file), *arguments])
        click.echo(f"$ {shlex.join(argv)}")
        kills = count_oom_kills()
        environment = rank_environment(machines, attempt, launch)
        # torch elastic kills ranks that are still there so long after it was told to end: a save must fit.
        environment.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(int(recipe.watchdog.save_s)))
        process = start_launcher(argv, environment, [run.lock] if machines.index == 0 else [])
        watchdog = Watchdog(recipe.watchdog, launch, ranks, now=time.monotonic())
        while not (left_on or hang) and (code := ended_within(process, LOOK_EVERY_S)) is None:
            now = time.monotonic()
            while signals:
                number = signals.pop(0)
                if asked_at is None and ask_to_stop(run, number):
                    asked_at = now
                elif asked_at is None or now - asked_at > ONE_CAUSE_S:
                    left_on = number
            attempt = attempt or attempt_of(run, launch, ranks)
            hang = watchdog.look(attempt, now)
    if hang:
        record_hang(hang, watchdog, run, attempt, first_machine=machines.index == 0)
    # A launcher that is killed, here or from outside, leaves its ranks behind.
    unended = end_processes(launch) if code is None or code < 0 else set()
    if code is None:
        code = -signal.SIGKILL if unended else process.wait()
    return Life(attempt or attempt_of(run, launch, ranks), code, count_oom_kills() - kills, left_on, hang, unended)


def start_launcher(argv: list[str], environment: dict[str, str], inherited: list[int]) -> subprocess.Popen:
    """In a session of its own, so that Ctrl-C reaches ranks through this command alone. It holds the run folder as well, and is told to end
    when this command is killed: ranks are never watched by nobody, and no other command runs beside them."""
    try:
        return subprocess.Popen(
            argv, env=environment, start_new_session=True, pass_fds=inherited, preexec_fn=lambda: follow_parent(signal.SIGTERM)
        )
    except OSError as error:
        raise HarnessError(f"{argv[0]} cannot be started: {error}") from error


def ended_within(process: subprocess.Popen, seconds: float) -> int | None:
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None


def attempt_of(run: RunDir, launch: str, ranks: range) -> Path | None:
    """The attempt that another machine has opened, once this machine's ranks know it."""
    attempt = run.last_attempt()
    known = attempt is not None and any(report["launch"] == launch for report in rank_reports(attempt, "alive", ranks))
    return attempt if known else None


@contextlib.contextmanager
def noted_signals() -> Iterator[list[signal.Signals]]:
    """The signals that mean stop and have come since, oldest first. A handler that did more could meet this process in mid-print."""
    noted: list[signal.Signals] = []
    previous = {number: signal.signal(number, lambda got, _: noted.append(signal.Signals(got))) for number in STOP_SIGNALS}
    try:
        yield noted
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def ask_to_stop(run: RunDir, number: signal.Signals) -> bool:
    """Make the STOP file, which the ranks look for. False when that cannot be done."""
    try:
        if not run.stop.exists():
            write_text_atomically(run.stop, f"{number.name} to harness run at {time.strftime('%Y-%m-%dT%H:%M:%S%z')}\n")
    except OSError as error:
        say(f"{run.stop}: cannot be written ({error.strerror}), so the ranks are ended without saving")
        return False
    say("stopping: the run saves at the next step and leaves; press Ctrl-C again to leave at once without saving")
    return True


def record_hang(hang: Hang, watchdog: Watchdog, run: RunDir, attempt: Path | None, *, first_machine: bool) -> None:
    """Say on the screen, in hang.txt, the ledger and outcome.json what stands still. A full disk keeps nobody from ending it."""
    from harness.checkpoint.ledger import Ledger

    say(f"\nhang: {hang.text}")
    if attempt is None:
        return
    with contextlib.suppress(OSError):
        say(f"the stacks of this machine's ranks: {watchdog.write_stacks(hang, attempt)}; all its ranks are ended now")
        if read_outcome(attempt) is None:
            culprit = hang.culprit
            if first_machine:
                # The ledger has one writer; on another machine rank 0 may be writing.
                Ledger(run.ledger, int(attempt.name.removeprefix("attempt-"))).append(
                    "hang", rank=culprit.rank, host=culprit.report.get("host"), phase=culprit.phase, step=culprit.step, why=hang.why
                )
            write_outcome(attempt, "hang", step=culprit.step, checkpoint=last_commit(run), reason=f"hang: {hang.text}")


def say(text: str) -> None:
    # A terminal that has closed (SIGHUP) takes no more, which must not end the run before it has saved.
    with contextlib.suppress(OSError):
        click.echo(text, err=True)


# ---- what ranks are started with


@contextlib.contextmanager
def rank_recipe(recipe: Recipe, run: RunDir, machines: Machines) -> Iterator[Path]:
    """The file that the ranks of this machine read: the run folder's own. Other machines than the first may look before that is made, and
    read a copy of what this command resolved; the ranks check that all have the same."""
    if machines.index == 0:
        yield run.recipe
        return
    with tempfile.TemporaryDirectory(prefix="harness-") as folder:
        file = Path(folder) / "recipe.yaml"
        file.write_text(render_recipe(recipe), encoding="utf-8")
        yield file


def prepare(recipe: Recipe) -> None:
    """Tokenise before any rank starts, so that no GPU waits for it, and say what became of the rows."""
    quieten()
    from harness.data import prepare_recipe
    from harness.data.report import render_report
    from harness.model import load_tokenizer
    from harness.tasks.templates import training_template

    prepared = prepare_recipe(recipe, load_tokenizer(recipe), packing=recipe.data.packing is True, training_template=training_template)
    click.echo(render_report(prepared.report))
    click.echo(f"prepared in {prepared.folder}")


def rank_environment(machines: Machines, attempt: Path | None, launch: str) -> dict[str, str]:
    environment = dict(os.environ)
    package_parent = str(Path(__file__).resolve().parents[2])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [package_parent, environment.get("PYTHONPATH")]))
    environment[ATTEMPT_VARIABLE] = str(attempt or "")
    environment[LAUNCH_VARIABLE] = launch
    # Accelerate would give each rank one thread; on a CPU the ranks share the cores.
    # The cores that this process may use: in a container or a Slurm job they are fewer than the machine has.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    environment.setdefault("OMP_NUM_THREADS", str(max(1, cores // machines.processes)))
    if not has_nvidia_gpu():
        # OpenMP threads that spin while they wait slow one another down thirtyfold as soon as anything else uses the cores (measured);
        # asleep they cost a quarter at the tiniest sizes and nothing at others.
        environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    return environment


def has_nvidia_gpu() -> bool:
    """Without asking torch, whose import takes seconds."""
    return any(Path("/proc/driver/nvidia/gpus").glob("*"))
