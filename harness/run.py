"""A run folder: everything that a run leaves behind, self-contained, each path with one home.

runs/<name>/
  recipe.yaml            the resolved recipe; loading it again gives the same recipe
  run.json               what the run is: recipe digest, backend and who chose it, world, versions, git commit, argv, lineage
  logs/attempt-K/        one life of the run: rank-R.log of every rank; alive/rank-R.json: its host, pid, phase and step, written over with
                         every step; errors/rank-R.json if it failed; prepared-R.json: the prepared data that the machine of rank R (the
                         first on it) loads; outcome.json: how the life ended; hang.txt: every rank's stack, if one stood still
  logs/latest            a link to the newest of them
  metrics.jsonl          every logged point, the same keys and steps as W&B
  wandb.json, wandb/     the W&B id of this run, and its offline files
  init/                  the weights that were drawn, for `model.init`, or merged, for `model.adapter_mode: merge`
  checkpoint-N/          what a run continues from: complete on every rank, with a manifest of digests, or not there (harness.checkpoint)
  ledger.jsonl           what happened to the run: each life, commit, retirement, failed save, quarantine, skipped step and rollback
  STOP, SAVE             made by a person or a scheduler: save and leave; save and go on
  .staging/              checkpoints that are being written
  .retired/              checkpoints that are being deleted
  .quarantine/           checkpoints that were not whole
  final/                 the export: plain Hugging Face or PEFT layout, reopened and verified; harness.json holds its digests
  merged/, gguf-TYPE/    `harness export --merge`, `--gguf TYPE`
  pairs/                 `harness pairs`
  report.html            `harness report`
  .lock                  held by the process that runs in the folder
  share.json             of a run that trains nothing, and does a share of units of work (harness.share)
  job.sbatch, job.json, cluster.yaml, code.diff, logs/slurm-N.log, logs/owner, logs/nodes.lock
                         of a run that was submitted to Slurm (harness.cluster)

The prepared data alone lies elsewhere, in the cache, from where it can be made again.
"""

import contextlib
import difflib
import fcntl
import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from harness import __version__
from harness.errors import HarnessError, LaunchError
from harness.recipe import Recipe, load, recipe_digest, render_recipe

LOCK = ".lock"
OURS = re.compile(
    r"recipe\.yaml|run\.json|logs|(metrics|ledger)\.jsonl|wandb|wandb\.json|checkpoint-\d+|(final|merged|init|gguf-\w+)(\.incomplete|\.old)?"
    r"|report\.html|pairs|STOP|SAVE|\.lock|\.staging|\.retired|\.quarantine|\..+\.\d+|share\.json|job\.sbatch|job\.json|cluster\.yaml|code\.diff"
)
"""The names of what a run leaves in its folder, `.NAME.PID` and `.NAME.PID.N` being files that were about to be renamed."""
_HELD: dict = {}
_LOADED = time.time()
LIBRARIES = ("torch", "transformers", "trl", "accelerate", "deepspeed", "peft", "bitsandbytes", "datasets", "wandb")
RUNS_SHOWN = 4
"""In a message."""
ATTEMPT_VARIABLE = "HARNESS_ATTEMPT"
"""Set by a `harness run` parent for its ranks: the folder of the attempt that it has opened; empty on other machines than the first."""
LAUNCH_VARIABLE = "HARNESS_LAUNCH"
"""Set by a `harness run` parent for its ranks and all that they start: a word by which it knows its own processes."""
ALIVE_WIDTH = 512
"""Bytes of an alive/ file, so that it is written over in place."""


@dataclass(frozen=True)
class RunDir:
    """Paths of one run. `RunDir(path)` only names them; `create` and `open_attempt` make folders."""

    path: Path

    recipe = property(lambda self: self.path / "recipe.yaml")
    manifest = property(lambda self: self.path / "run.json")
    metrics = property(lambda self: self.path / "metrics.jsonl")
    init = property(lambda self: self.path / "init")
    final = property(lambda self: self.path / "final")
    merged = property(lambda self: self.path / "merged")
    ledger = property(lambda self: self.path / "ledger.jsonl")
    stop = property(lambda self: self.path / "STOP")
    save = property(lambda self: self.path / "SAVE")
    staging = property(lambda self: self.path / ".staging")
    retired = property(lambda self: self.path / ".retired")
    quarantine = property(lambda self: self.path / ".quarantine")

    @classmethod
    def of(cls, recipe: Recipe) -> "RunDir":
        return cls(Path(recipe.output_dir).expanduser().resolve())

    @classmethod
    def create(cls, recipe: Recipe, *, fresh: bool = False) -> "RunDir":
        """Make the folder or take the run that lies there (`fresh` deletes that first), write the resolved recipe, and hold the folder
        until this process has ended, and whatever inherited `lock` from it.

        Raises LaunchError when another process runs in the folder, or when it is no place for a run. Whether a run that lies there can be
        continued with this recipe is for the caller to check, before.
        """
        run = cls.of(recipe)
        try:
            run._check_place()
            run.path.mkdir(parents=True, exist_ok=True)
            run.hold()
        except OSError as error:
            raise LaunchError(f"{run.path}: no run folder can be made there: {error.strerror}; choose another output_dir") from error
        try:
            if fresh:
                for entry in run.path.iterdir():
                    if entry.name != LOCK:
                        shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
            write_text_atomically(run.recipe, render_recipe(recipe))
        except OSError as error:
            raise LaunchError(f"{run.path}: cannot be written: {error.strerror}; free some space, or make it writable") from error
        return run

    def _check_place(self) -> None:
        """Raises LaunchError for a folder that is not a run's alone: whatever lies in a run folder goes with `--fresh`."""
        if self.path.exists() and not self.path.is_dir():
            raise LaunchError(f"{self.path}: is a file, not a folder; choose another output_dir")
        if self.path in (Path.home(), Path.cwd(), *Path.cwd().parents):
            raise LaunchError(f"{self.path}: is no place for a run folder; choose one of its own below it, such as output_dir=runs/first")
        foreign = sorted(entry.name for entry in self.path.glob("*") if not OURS.fullmatch(entry.name))
        if foreign:
            raise LaunchError(
                f"{self.path}: holds what is not a run's ({', '.join(foreign[:3])}{', …' if len(foreign) > 3 else ''}); "
                "choose a folder that is new or a run's alone"
            )

    def hold(self) -> None:
        """Lock the folder for the life of this process and of those that inherit the lock. Raises LaunchError when another holds it."""
        if self.path in _HELD:
            return
        lock = open(self.path / LOCK, "a")  # noqa: SIM115 - open, and so held, until the process ends
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LaunchError(f"{self.path}: another process is running in it; wait for it, or choose another output_dir") from None
        _HELD[self.path] = lock

    @property
    def lock(self) -> int:
        """The descriptor of the lock that `create` took. The folder is held as long as any process has it open."""
        return _HELD[self.path].fileno()

    def attempts(self) -> list[int]:
        folders = self.path.glob("logs/attempt-*")
        return sorted(int(folder.name.removeprefix("attempt-")) for folder in folders if folder.name.removeprefix("attempt-").isdigit())

    def open_attempt(self) -> Path:
        """Make the folder of the next attempt, logs/attempt-K with K from 1, and return it.

        A STOP or SAVE from before this process was meant for a life that has ended; it is taken away, and that is said.
        """
        for request in (self.stop, self.save):
            if request.is_file() and request.stat().st_mtime < _LOADED:
                request.unlink()
                print(f"{request}: left from an earlier start; removed", flush=True)
        attempt = self.attempt((self.attempts() or [0])[-1] + 1)
        attempt.mkdir(parents=True)
        _lead_to(attempt, attempt.with_name("latest"))
        return attempt

    def gguf(self, dtype: str) -> Path:
        return self.path / f"gguf-{dtype}"

    def attempt(self, number: int) -> Path:
        return self.path / "logs" / f"attempt-{number}"

    def last_attempt(self) -> Path | None:
        return self.attempt(self.attempts()[-1]) if self.attempts() else None

    def write_manifest(self, recipe: Recipe, **facts) -> None:
        content = {
            "harness": __version__,
            "recipe_digest": recipe_digest(recipe),
            "versions": library_versions(),
            "python": sys.version.split()[0],
            "git_commit": git_commit(),
            "argv": sys.argv,
            "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            **facts,
        }
        write_text_atomically(self.manifest, json.dumps(content, indent=2) + "\n")

    def add_to_manifest(self, **facts) -> None:
        write_text_atomically(self.manifest, json.dumps(self.read_manifest() | facts, indent=2) + "\n")

    def read_manifest(self) -> dict:
        if not self.manifest.is_file():
            raise LaunchError(f"{self.path}: holds no run.json, so no run of harness began here; {advise_run(self.path)}")
        return json.loads(self.manifest.read_text())


def _lead_to(attempt: Path, link: Path) -> None:
    """Have the link lead to the attempt; at no time does it lead nowhere. A courtesy, which ends no life: some disks know no links."""
    beside = link.with_name(f".{link.name}")
    with contextlib.suppress(OSError):
        if link.is_dir() and not link.is_symlink():
            # The run was copied by something that follows links.
            shutil.rmtree(link)
        beside.unlink(missing_ok=True)
        beside.symlink_to(attempt.name)
        os.replace(beside, link)


def smoke_recipe(recipe: Recipe) -> Recipe:
    """The recipe in a run folder of its own: a smoke test must not stand in the way of the run that it is for."""
    return recipe.model_copy(update={"output_dir": f"{recipe.output_dir}-smoke"})


def write_text_atomically(path: Path, text: str) -> None:
    """Replace a file in one step: a reader sees the old text or the new one, also after a power cut. Of several writers one is last."""
    # On a shared disk two machines, or two containers, may have the same process id.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.randbelow(10**9)}")
    try:
        with open(temporary, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def runs_below(folder: Path) -> list[Path]:
    """The runs in a folder of runs, or of folders of runs."""
    return sorted(manifest.parent for depth in ("*", "*/*") for manifest in folder.glob(f"{depth}/run.json"))


def advise_run(path: Path) -> str:
    """Which run was most likely meant by a path that is none: the one around it, those in it, the one that is called almost so."""
    around = next((folder for folder in path.parents if (folder / "run.json").is_file()), None)
    if around is not None:
        return f"it lies in the run {around}; give that"
    if inside := runs_below(path):
        shown = ", ".join(str(run) for run in inside[:RUNS_SHOWN])
        return f"give one of the runs in it ({shown}{', …' if len(inside) > RUNS_SHOWN else ''})"
    beside = {run.name: run for run in runs_below(path.parent)}
    close = difflib.get_close_matches(path.name, beside, n=1)
    return f"did you mean {beside[close[0]]}? Give a run" if close else "give a run's folder, such as runs/quickstart/base"


def replace_folder(staging: Path, target: Path) -> None:
    """Rename, with what stood there before put out of the way first: at no time is `target` half old and half new."""
    old = target.with_name(target.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if target.is_dir():
        os.rename(target, old)
    os.rename(staging, target)
    shutil.rmtree(old, ignore_errors=True)


def library_versions() -> dict[str, str]:
    return {name: metadata.version(name) for name in LIBRARIES}


def git_commit() -> str | None:
    """The commit of the code that runs, with `+changes` when the work tree differs; None for an installed copy."""
    here = Path(__file__).resolve()

    def git(*args: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(here.parent), *args], capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # A copy in the .venv of some other project's checkout is not tracked there, and that project's commit would say nothing.
    commit = git("rev-parse", "HEAD") if git("ls-files", "--error-unmatch", here.name) else None
    if commit and git("status", "--porcelain", "--untracked-files=no"):
        commit += "+changes"
    return commit


# ---- a STOP file


@dataclass(frozen=True)
class StopRequest:
    """What stands in a STOP file: a reason, and on a line of its own `deadline: UNIX_SECONDS`, after which nobody waits for the save."""

    reason: str
    deadline: float | None = None

    @classmethod
    def read(cls, file: Path) -> "StopRequest | None":
        """None when there is no file. A person may write anything into it, or nothing."""
        try:
            lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
        except FileNotFoundError:
            return None
        except OSError as error:
            return cls(f"{file.name} file ({error.strerror})")
        dated = [line for line in lines if re.fullmatch(r"deadline: \d+(\.\d+)?", line)]
        reason = " ".join(" ".join(line for line in lines if line not in dated).split())
        return cls(reason or f"{file.name} file", float(dated[0].split()[1]) if dated else None)

    def write(self, file: Path) -> None:
        """Unless there is one: the first reason counts, and its deadline."""
        if not file.exists():
            deadline = "" if self.deadline is None else f"deadline: {self.deadline:.0f}\n"
            write_text_atomically(file, f"{self.reason}\n{deadline}")


# ---- what a rank is doing, and what it says when it fails


class RankReport:
    """Kept by each rank in its attempt's folder: `alive/` is its heart, with host, pid, phase and step while it runs; `errors/` is its own
    error when it fails.

    So that the person who started the run reads the first failing rank's error, and not the launcher's, and so that a rank that stands
    still is seen (harness.watchdog). Before the attempt is known (a rank that no parent on this machine has opened one for) nothing is
    written.
    """

    def __init__(self, rank: int, attempt: Path | None = None):
        self.rank, self.host, self.phase, self.attempt = rank, socket.gethostname(), "starting", attempt
        self.step: int | None = None
        self.first_step: int | None = None
        self._leaves: dict[str, str] = {}
        self._alive: int | None = None
        self._width = ALIVE_WIDTH
        # A rank that is ended writes so from a thread of its own, and no beat may come after that.
        self._writing = threading.Lock()
        self.enter("starting")

    @property
    def log(self) -> Path:
        return self.attempt / f"rank-{self.rank}.log"

    def enter(self, phase: str, attempt: Path | None = None) -> None:
        """Say what this rank does from now on, and with `attempt` in which attempt."""
        self.phase, self.attempt = phase, attempt or self.attempt
        self._write_alive()

    def beat(self, step: int | None = None) -> None:
        """This rank lives, and works on this step. Takes microseconds, so it can be called at every batch."""
        self.step = self.step if step is None else step
        self.first_step = self.step if self.first_step is None else self.first_step
        self._write_alive()

    def stopped(self, reason: str) -> None:
        """This rank leaves on purpose, and the run can be continued."""
        self.phase, self._leaves = "stopped", {"stopped": reason}
        self._write_alive()

    def ended_by(self, signal_name: str) -> None:
        """This rank leaves because it was told to, not because of anything of its own."""
        self._leaves = {"ended_by": signal_name}
        self._write_alive()

    def failed(self, error: BaseException) -> bool:
        """Keep the error, and its whole traceback in the rank's log. False when there is no attempt to keep it in."""
        if self.attempt is None:
            return False
        named = isinstance(error, HarnessError)
        whole = "".join(traceback.format_exception(error))
        content = self._content() | {
            "type": type(error).__name__,
            "message": str(error),
            "exit_code": error.exit_code if named else 1,
            "traceback": "" if named else whole,
        }
        folder = self.attempt / "errors"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_text_atomically(folder / f"rank-{self.rank}.json", json.dumps(content))
            with open(self.log, "a", encoding="utf-8") as log:
                log.write(whole)
        except OSError:
            # A full or vanished disk; then the rank says on the terminal what it could not write.
            return False
        return True

    def _content(self) -> dict:
        return {
            "rank": self.rank,
            "host": self.host,
            "pid": os.getpid(),
            "launch": os.environ.get(LAUNCH_VARIABLE, ""),
            "phase": self.phase,
            "step": self.step,
            "first_step": self.first_step,
            "time": time.time(),
        }

    def _write_alive(self) -> None:
        """Into the same bytes each time and not flushed: a heart beats on a full disk too, costs next to nothing, and is worth nothing
        after a crash of the machine. A disk that is gone silences it, which the watchdog sees."""
        if self.attempt is None:
            return
        with self._writing, contextlib.suppress(OSError):
            text = json.dumps(self._content() | self._leaves)
            self._width = max(self._width, len(text))
            padded = f"{text.ljust(self._width)}\n".encode()
            if self._alive is not None:
                os.pwrite(self._alive, padded, 0)
                return
            path = self.attempt / "alive" / f"rank-{self.rank}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".{path.name}.{os.getpid()}")
            alive = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            os.pwrite(alive, padded, 0)
            os.replace(temporary, path)
            self._alive = alive


def rank_reports(attempt: Path, kind: str, ranks: Iterable[int] | None = None) -> list[dict]:
    """What the ranks of an attempt (all, or these) have written of one kind (`alive` or `errors`), in the order of time."""
    folder = attempt / kind
    paths = folder.glob("rank-*.json") if ranks is None else (folder / f"rank-{rank}.json" for rank in ranks)
    return sorted(filter(None, map(_read_report, paths)), key=lambda report: report["time"])


def _read_report(path: Path) -> dict | None:
    """None for a file that is not there, or that a crash of the machine has torn."""
    for _ in range(3):
        # More than once, because it may be read in the middle of a beat, which takes microseconds.
        with contextlib.suppress(FileNotFoundError, ValueError):
            return json.loads(path.read_text())
    return None


# ---- how a life ended


def write_outcome(attempt: Path, outcome: str, *, step: int | None, checkpoint: int | None, reason: str) -> None:
    """Say how an attempt ended: `done`, `stopped`, `rolled_back` or `hang`. Whoever says it first is right: nothing is written over."""
    path, content = attempt / "outcome.json", {"outcome": outcome, "step": step, "checkpoint": checkpoint, "reason": reason}
    if not path.exists():
        write_text_atomically(path, json.dumps(content) + "\n")


def read_outcome(attempt: Path | None) -> dict | None:
    """How an attempt ended, None when nobody could say it: its ranks failed or were killed."""
    path = attempt / "outcome.json" if attempt else None
    return json.loads(path.read_text()) if path and path.is_file() else None


def is_complete(run: RunDir, recipe: Recipe) -> bool:
    """Whether this very recipe has been trained to its end and exported."""
    return run.final.is_dir() and has_ended_well(run, recipe)


def has_ended_well(run: RunDir, recipe: Recipe) -> bool:
    """Whether the last end that is known of the run is `done`, with this very recipe."""
    ends = (read_outcome(run.attempt(number)) for number in reversed(run.attempts()))
    outcome = next(filter(None, ends), None)
    return outcome is not None and outcome["outcome"] == "done" and recipe_digest(load(run.recipe)) == recipe_digest(recipe)
