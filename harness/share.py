"""A run that trains nothing, and does a share of units of work: `harness capture` as a stage of a pipeline, and as jobs of Slurm's.

    RUN/share.json    {"verb": "capture", "shards": 8, "shard": 3}: what the lives of the run do. A run without it trains
    RUN/run.json      has "units": {"folder", "count"} beside what it has of any run: where the units lie, as unit-*, once they are done

Its lives are like those of a training (harness.life): processes with a heart, a log and an error, a STOP file, an outcome. In place of
checkpoints there are units, which all shares put into one folder.

The promise: such a run is done when all units are there, whoever did them, and gets on when it has done one itself.
"""

import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from harness.errors import LaunchError, RecipeError
from harness.recipe import Recipe
from harness.recipe.backend import Backend, load_backend
from harness.run import RunDir, has_ended_well, rank_reports, write_text_atomically

FILE = "share.json"


@dataclass(frozen=True)
class Share:
    verb: str
    """Of `harness`."""
    shards: int = 1
    """So many runs share the units out among them."""
    shard: int = 0
    """Which of them this is, from 0."""

    def argv(self, recipe: Path, processes: int, python: str = sys.executable) -> list[str]:
        """What starts it on a machine, with so many processes there."""
        shares = ["--shards", str(self.shards), "--shard", str(self.shard), "--processes", str(processes)]
        return [python, "-m", "harness", self.verb, str(recipe), *shares]


def save_share(run: RunDir, share: Share) -> None:
    write_text_atomically(run.path / FILE, json.dumps(asdict(share)) + "\n")


def read_share(run: RunDir) -> Share | None:
    """None for a run that trains."""
    try:
        return Share(**json.loads((run.path / FILE).read_text()))
    except FileNotFoundError:
        return None


# ---- what can be wrong


def check_share(recipe: Recipe, share: Share, processes: int) -> None:
    """Raises RecipeError for a recipe that leaves the verb nothing to do, or so many processes no way to."""
    if share.shard >= share.shards:
        raise RecipeError(f"--shard {share.shard}; with --shards {share.shards} it goes from 0 to {share.shards - 1}")
    CHECKS[share.verb](recipe, load_backend(recipe.backend), processes)


def check_capture(recipe: Recipe, backend: Backend, processes: int) -> None:
    if recipe.task != "distill":
        raise RecipeError(f"task = {recipe.task}; it has no teacher to capture; set task: distill and teacher.name_or_path")
    if recipe.teacher.source != "cache":
        raise RecipeError(f"teacher.source = {recipe.teacher.source}; it is asked beside the student and never captured; set source: cache")
    if recipe.teacher.device_map and processes > 1:
        raise RecipeError(
            f"teacher.device_map = {recipe.teacher.device_map}; one process takes all GPUs of its machine, and {processes} were asked "
            "for; use --processes 1, or leave it out and use --backend zero3"
        )
    if backend.kind == "fsdp" and processes > 1 and not recipe.teacher.server:
        raise RecipeError(
            f"backend = {recipe.backend}; a teacher is shared out by zero3 alone; give --backend zero3, or --backend ddp for a whole "
            "teacher in each process"
        )


CHECKS: dict[str, Callable[[Recipe, Backend, int], None]] = {"capture": check_capture}
"""Of each verb whose work is shared out."""


def processes_of(recipe: Recipe, ranks: int) -> int:
    """Processes on a machine where a training would have so many ranks."""
    return 1 if recipe.teacher and (recipe.teacher.device_map or recipe.teacher.server) else ranks


def check_no_share(run: RunDir) -> None:
    """Raises LaunchError for a folder in which nothing is ever trained."""
    if share := read_share(run):
        raise LaunchError(
            f"{run.path}: does a share of `harness {share.verb}` and trains nothing; go on with the pipeline that it belongs to, or choose "
            "another output_dir"
        )


# ---- how far it is


@dataclass(frozen=True)
class Units:
    folder: Path
    there: int
    count: int

    @property
    def are_all_there(self) -> bool:
        return self.there >= self.count


def units_of(run: RunDir) -> Units | None:
    """None as long as the run has not found out how many there are to be."""
    units = json.loads(run.manifest.read_text()).get("units") if run.manifest.is_file() else None
    return units and Units(Path(units["folder"]), sum(1 for _ in Path(units["folder"]).glob("unit-*")), units["count"])


def render_units(units: Units | None) -> str:
    return f"{units.there} of {units.count} units are there" if units else "how many units there are to be is not known yet"


def is_share_done(run: RunDir, recipe: Recipe) -> bool:
    """Whether a life of this very recipe has ended well, and all units still lie where it has left them."""
    units = units_of(run)
    return units is not None and units.are_all_there and has_ended_well(run, recipe)


def units_done(run: RunDir, attempts: Iterable[int]) -> dict[int, int]:
    """How many units the processes of each life have done themselves, as their hearts have said it last."""
    reports = {number: rank_reports(run.attempt(number), "alive") for number in attempts}
    return {number: sum(report["step"] or 0 for report in of_life) for number, of_life in reports.items()}
