import contextlib
import os
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import click

from harness.cli.arguments import RECIPE_CONTEXT, load_recipe, recipe_argument
from harness.errors import HarnessError
from harness.failures import count_oom_kills, explain_failure
from harness.launcher import Machines, check_device, plan_launch
from harness.logs import quieten
from harness.recipe import Recipe, render_recipe
from harness.recipe.backend import load_backend
from harness.run import ATTEMPT_VARIABLE, RunDir, smoke_recipe


@click.command("run", context_settings=RECIPE_CONTEXT)
@click.option(
    "--backend", help="Shard by this backend instead of the recipe's: single, ddp, zero1, zero2, zero3, zero3-offload, fsdp2, or a file."
)
@click.option(
    "--processes", type=click.IntRange(1), help="Ranks on this machine.  [default: 1, or one per GPU with a backend of several ranks]"
)
@click.option("--smoke", is_flag=True, help="Two steps on the longest rows, report the memory, and stop.")
@click.option("--fresh", is_flag=True, help="Delete the run folder first, if there is one.")
@recipe_argument
def command(recipe: str, overrides: tuple[str, ...], backend: str | None, processes: int | None, smoke: bool, fresh: bool):
    """Train RECIPE on this machine; on several with NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT set (launch/multi-node.sh)."""
    more = [f"backend={backend}"] if backend else []
    resolved = load_recipe(recipe, (*overrides, *more))
    if smoke:
        resolved, fresh = smoke_recipe(resolved), True
    processes = processes or default_processes(resolved)
    machines = Machines.from_environment(processes, dict(os.environ))
    exit_code = run_recipe(resolved, machines, smoke=smoke, fresh=fresh)
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


def run_recipe(recipe: Recipe, machines: Machines, *, smoke: bool = False, fresh: bool = False) -> int:
    """Prepare the data, make the run folder, start the ranks, wait. Returns the exit code, after saying why it is not 0."""
    run, attempt = RunDir.of(recipe), None
    # Whatever can be wrong is found before a folder is made or a GPU taken.
    plan_launch(recipe, machines, [])
    check_device(recipe, load_backend(recipe.backend), has_gpu=has_nvidia_gpu())
    prepare(recipe)
    if machines.index == 0:
        run = RunDir.create(recipe, fresh=fresh)
        attempt = run.open_attempt()
    with rank_recipe(recipe, run, machines) as file:
        argv = plan_launch(recipe, machines, ["--recipe", str(file), *(["--smoke"] if smoke else [])])
        environment = rank_environment(machines, attempt)
        click.echo(f"run folder: {run.path}")
        click.echo(f"$ {shlex.join(argv)}")
        kills = count_oom_kills()
        code, stopped_by = watch(argv, environment)
    if stopped_by:
        click.echo(f"stopped by {stopped_by.name}; logs: {attempt or run.path}", err=True)
        return 128 + stopped_by
    if code == 0:
        return 0
    failure = explain_failure(attempt or run.last_attempt(), code, count_oom_kills() - kills)
    click.echo(f"\n{failure.text}", err=True)
    return failure.exit_code


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


def rank_environment(machines: Machines, attempt: Path | None) -> dict[str, str]:
    environment = dict(os.environ)
    package_parent = str(Path(__file__).resolve().parents[2])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [package_parent, environment.get("PYTHONPATH")]))
    environment[ATTEMPT_VARIABLE] = str(attempt or "")
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


def watch(argv: list[str], environment: dict[str, str]) -> tuple[int, signal.Signals | None]:
    """Run argv on this terminal. Returns its exit code, negative for a signal, and the signal that this command got and handed on.

    argv gets a session of its own, so that Ctrl-C reaches it once, through this command, however the signal came.
    """
    got: list[signal.Signals] = []
    process: subprocess.Popen | None = None

    def hand_on(number: int, _frame) -> None:
        got.append(signal.Signals(number))
        # As SIGTERM, on which ranks leave at once wherever they are. Only the first: a second would break the launcher's own tidying.
        if process is not None and len(got) == 1:
            process.send_signal(signal.SIGTERM)

    previous = {number: signal.signal(number, hand_on) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        process = subprocess.Popen(argv, env=environment, start_new_session=True)
        if got:
            process.send_signal(signal.SIGTERM)
        return process.wait(), got[0] if got else None
    except OSError as error:
        raise HarnessError(f"{argv[0]} cannot be started: {error}") from error
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
