"""A run folder: everything that a run leaves behind, self-contained, each path with one home.

runs/<name>/
  recipe.yaml            the resolved recipe
  run.json               what the run is: recipe digest, backend and who chose it, world, versions, git commit, argv
  logs/attempt-K/        rank-R.log of every rank, errors/rank-R.json of those that failed, alive/rank-R.json: host, pid, phase
  metrics.jsonl          every logged point, the same keys and steps as W&B
  wandb.json, wandb/     the W&B id of this run, and its offline files
  init/                  the weights that were drawn, for `model.init`
  checkpoint-N/          the trainer's checkpoints
  final/                 the export: plain Hugging Face or PEFT layout, reopened and verified; harness.json holds its digests
  merged/                `harness export --merge`
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from harness import __version__
from harness.errors import HarnessError, LaunchError
from harness.recipe import Recipe, recipe_digest, render_recipe

LIBRARIES = ("torch", "transformers", "trl", "accelerate", "deepspeed", "peft", "bitsandbytes", "datasets", "wandb")
ATTEMPT_VARIABLE = "HARNESS_ATTEMPT"
"""The attempt that a parent has opened already; its ranks join it instead of opening another."""


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

    @classmethod
    def of(cls, recipe: Recipe) -> "RunDir":
        return cls(Path(recipe.output_dir).expanduser().resolve())

    @classmethod
    def create(cls, recipe: Recipe, *, fresh: bool = False) -> "RunDir":
        """Make the folder and write the resolved recipe. Raises LaunchError when a run lies there already; `fresh` deletes that first."""
        run = cls.of(recipe)
        if run.recipe.is_file() and not fresh:
            raise LaunchError(
                f"{run.path}: already holds a run; choose another folder (output_dir=...) or begin again with --fresh, which deletes it"
            )
        if fresh and run.path.is_dir():
            if any(run.path.iterdir()) and not run.recipe.is_file():
                raise LaunchError(
                    f"{run.path}: --fresh deletes only run folders, and this one holds no recipe.yaml; choose another output_dir"
                )
            shutil.rmtree(run.path)
        run.path.mkdir(parents=True, exist_ok=True)
        write_text_atomically(run.recipe, render_recipe(recipe))
        return run

    def attempts(self) -> list[int]:
        folders = self.path.glob("logs/attempt-*")
        return sorted(int(folder.name.removeprefix("attempt-")) for folder in folders if folder.name.removeprefix("attempt-").isdigit())

    def open_attempt(self) -> int:
        """Make the folder of the next attempt and return its number, from 1."""
        number = (self.attempts() or [0])[-1] + 1
        for folder in ("errors", "alive"):
            (self.attempt(number) / folder).mkdir(parents=True, exist_ok=True)
        return number

    def attempt(self, number: int) -> Path:
        return self.path / "logs" / f"attempt-{number}"

    def write_manifest(self, recipe: Recipe, **facts) -> None:
        content = {
            "harness": __version__,
            "recipe_digest": recipe_digest(recipe),
            "versions": library_versions(),
            "python": sys.version.split()[0],
            "git_commit": git_commit(),
            "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            **facts,
        }
        write_text_atomically(self.manifest, json.dumps(content, indent=2) + "\n")

    def read_manifest(self) -> dict:
        if not self.manifest.is_file():
            raise LaunchError(f"{self.path}: holds no run.json, so no run of harness began here; give a run folder such as runs/quickstart")
        return json.loads(self.manifest.read_text())


def write_text_atomically(path: Path, text: str) -> None:
    """Replace a file in one step: a reader sees the old text or the new one, also after a power cut."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with open(temporary, "w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, path)


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
    """The commit of the code that runs, with `+changes` when the work tree differs; None outside a checkout."""
    here = Path(__file__).resolve().parent

    def git(*args: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(here), *args], capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    if commit and git("status", "--porcelain", "--untracked-files=no"):
        commit += "+changes"
    return commit


# ---- what a rank is doing, and what it says when it fails


class RankReport:
    """Kept by each rank in its attempt's folder: `alive/` says host, pid and phase while it runs, `errors/` its own error when it fails.

    So that the person who started the run reads the first failing rank's error, and not the launcher's.
    """

    def __init__(self, run: RunDir, attempt: int, rank: int):
        self.rank, self.host, self.phase = rank, socket.gethostname(), "starting"
        self._alive = run.attempt(attempt) / "alive" / f"rank-{rank}.json"
        self._error = run.attempt(attempt) / "errors" / f"rank-{rank}.json"
        for path in (self._alive, self._error):
            path.parent.mkdir(parents=True, exist_ok=True)
        self.enter("starting")

    def enter(self, phase: str) -> None:
        self.phase = phase
        self._write(self._alive, {})

    def failed(self, error: BaseException) -> None:
        named = isinstance(error, HarnessError)
        self._write(
            self._error,
            {
                "type": type(error).__name__,
                "message": str(error),
                "exit_code": error.exit_code if named else 1,
                "traceback": "" if named else "".join(traceback.format_exception(error)),
            },
        )

    def _write(self, path: Path, more: dict) -> None:
        content = {"rank": self.rank, "host": self.host, "pid": os.getpid(), "phase": self.phase, "time": time.time(), **more}
        write_text_atomically(path, json.dumps(content))


def first_error(run: RunDir, attempt: int) -> dict | None:
    """The report of the rank that failed first in this attempt, or None when no rank could write one."""
    reports = [json.loads(path.read_text()) for path in (run.attempt(attempt) / "errors").glob("rank-*.json")]
    return min(reports, key=lambda report: report["time"], default=None)


def unfinished_ranks(run: RunDir, attempt: int) -> list[dict]:
    """The ranks that neither finished nor wrote an error, the one that went silent first at the front."""
    failed = {path.name for path in (run.attempt(attempt) / "errors").glob("rank-*.json")}
    alive = [json.loads(path.read_text()) for path in (run.attempt(attempt) / "alive").glob("rank-*.json") if path.name not in failed]
    return sorted((report for report in alive if report["phase"] != "finished"), key=lambda report: report["time"])
