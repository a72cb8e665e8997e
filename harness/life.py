"""One life of a run on one machine: its ranks are started, watched over and, when they stand still or are told to go, ended.

`harness run` has one life after the other here; under Slurm the shim on each node has one (harness.cluster.node). When ranks are to be
ended before they end by themselves is for the caller to say: `live` asks it at every look.
"""

import contextlib
import functools
import os
import shlex
import signal
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from harness.checkpoint.ledger import Ledger, read_ledger
from harness.errors import HarnessError
from harness.failures import count_oom_kills
from harness.launcher import Machines, plan_launch
from harness.recipe import Recipe, render_recipe
from harness.resources import code_root
from harness.run import ATTEMPT_VARIABLE, LAUNCH_VARIABLE, RunDir, rank_reports, read_outcome, write_outcome
from harness.share import read_share, render_units, units_done, units_of
from harness.watchdog import LOOK_EVERY_S, Hang, Watchdog, end_processes, follow_parent

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
FRUITLESS_LIVES = 3
"""So many lives in a row may end without a newer checkpoint, or unit."""
IGNORED_BY_LAUNCHERS = (signal.SIGUSR1, signal.SIGUSR2)
"""Under Slurm's proctrack/linuxproc a signal for the job reaches all its processes, and torch elastic dies of these. Ranks hear them."""


@dataclass(frozen=True)
class Life:
    """How one start of this machine's ranks ended."""

    attempt: Path | None
    """None on another machine than the first when its ranks never met the first's."""
    code: int
    """The launcher's; negative for a signal."""
    oom_kills: int
    ended_for: Any
    """Why the caller had the ranks ended at once; None when it had not."""
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


def live(
    recipe: Recipe,
    run: RunDir,
    machines: Machines,
    arguments: list[str],
    end_for: Callable[[float], Any],
    *,
    attempt: Path | None = None,
    holding: Iterable[int] = (),
) -> Life:
    """Start this machine's ranks and watch over them until they have ended, or until `end_for(now)` gives a reason to end them.

    attempt: the folder that a supervisor of all machines has opened. Left out: the first machine opens it, the others find it.
    holding: descriptors of locks that are to be held as long as the launcher lives.
    """
    launch = uuid.uuid4().hex
    inherited, recipe_file = [*holding], contextlib.nullcontext(run.recipe)
    if attempt is None:
        recipe_file = rank_recipe(recipe, run, machines)
        if machines.index == 0:
            attempt = run.open_attempt()
            inherited.append(run.lock)
    ranks = range(machines.index * machines.processes, (machines.index + 1) * machines.processes)
    ended_for = hang = None
    share = read_share(run)
    with recipe_file as file:
        argv = share.argv(file, machines.processes) if share else plan_launch(recipe, machines, ["--recipe", str(file), *arguments])
        click.echo(f"$ {shlex.join(argv)}")
        kills = count_oom_kills()
        environment = rank_environment(machines, attempt, launch) | (machines.environment if share else {})
        # torch elastic kills ranks that are still there so long after it was told to end: a save must fit.
        environment.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(int(recipe.watchdog.save_s)))
        process = start_launcher(argv, environment, inherited)
        watchdog = Watchdog(recipe.watchdog, launch, ranks, now=time.monotonic())
        while not (ended_for or hang) and (code := ended_within(process, LOOK_EVERY_S)) is None:
            now = time.monotonic()
            ended_for = end_for(now)
            attempt = attempt or attempt_of(run, launch, ranks)
            hang = watchdog.look(attempt, now)
    if hang:
        record_hang(hang, watchdog, run, attempt, first_machine=machines.index == 0)
    # A launcher that is killed, here or from outside, leaves its ranks behind; a rank that is killed its data workers, whose copies of its
    # connections keep the other ranks waiting for it.
    unended = end_processes(launch) if code != 0 else set()
    if code is None:
        code = -signal.SIGKILL if unended else process.wait()
    return Life(attempt or attempt_of(run, launch, ranks), code, count_oom_kills() - kills, ended_for, hang, unended)


def start_launcher(argv: list[str], environment: dict[str, str], inherited: list[int]) -> subprocess.Popen:
    """In a session of its own, so that Ctrl-C reaches ranks through this command alone. It holds the run folder as well, and is told to end
    when this command is killed: ranks are never watched by nobody, and no other command runs beside them."""

    def prepare() -> None:
        for number in IGNORED_BY_LAUNCHERS:
            signal.signal(number, signal.SIG_IGN)
        follow_parent(signal.SIGTERM)

    try:
        return subprocess.Popen(argv, env=environment, start_new_session=True, pass_fds=inherited, preexec_fn=prepare)
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


def last_commit(run: RunDir) -> int | None:
    return max((event["step"] for event in read_ledger(run.ledger) if event["event"] == "committed"), default=None)


def progress(run: RunDir) -> int:
    """What grows with a life that brings the run on: the step of its last commit, or the units that its lives have done."""
    return sum(units_done(run, run.attempts()).values()) if read_share(run) else last_commit(run) or 0


def place(run: RunDir) -> str:
    """Where a run stands, for people."""
    if read_share(run):
        return render_units(units_of(run))
    checkpoint = last_commit(run)
    return "no checkpoint was made yet" if checkpoint is None else f"the newest checkpoint is checkpoint-{checkpoint}"


def stopped_where(outcome: dict) -> str:
    """What the outcome of a life says of the place where it was told to leave."""
    return "stopped between two units" if outcome["step"] is None else f"stopped at step {outcome['step']}"


def record_hang(hang: Hang, watchdog: Watchdog, run: RunDir, attempt: Path | None, *, first_machine: bool) -> None:
    """Say on the screen, in hang.txt, the ledger and outcome.json what stands still. A full disk keeps nobody from ending it."""
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


def rank_environment(machines: Machines, attempt: Path | None, launch: str) -> dict[str, str]:
    environment = own_environment()
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


def own_environment() -> dict[str, str]:
    """This process's, in which another finds this very harness, installed or not."""
    paths = [path for path in (code_root(), os.environ.get("PYTHONPATH")) if path]
    return os.environ | ({"PYTHONPATH": os.pathsep.join(paths)} if paths else {})


def has_nvidia_gpu() -> bool:
    """Without asking torch, whose import takes seconds."""
    return any(Path("/proc/driver/nvidia/gpus").glob("*"))
