"""Whether the checkpoints that a run will keep fit on its disk, before the first is made.

Once one was made the next is as large (the ledger knows its size). Before that the size is estimated from the headers of the model's
safetensors files: WEIGHT_BYTES for each weight that is trained, at most.
"""

import math
import os
import re
from pathlib import Path

from harness.checkpoint.ledger import read_ledger
from harness.cluster.findings import Finding
from harness.errors import HarnessError
from harness.hub.cache import find_snapshot
from harness.planner.architecture import tensor_shapes
from harness.recipe import Recipe
from harness.run import RunDir
from harness.sizes import gib

WEIGHT_BYTES = 16
"""A trained weight, its two moments and a master copy, all in 32 bit."""
FILES, FILES_PER_RANK = 40, 8
"""Of a checkpoint, at most: besides the ranks', and for each of them."""


def check_space(host: str, run: Path, recipe: Recipe, world_size: int) -> list[Finding]:
    """A failure when the planned checkpoints do not fit; where their size is an estimate, only when not even one does."""
    remedy = "free some, lower checkpoint.keep, or choose another output_dir"
    try:
        size, basis = checkpoint_bytes(run, recipe)
    except HarnessError as error:
        return [Finding(host, "fail", str(error))]
    disk = os.statvfs(run)
    free, free_files = disk.f_bavail * disk.f_frsize, disk.f_favail
    planned = planned_checkpoints(run, recipe)
    files = planned * (FILES + FILES_PER_RANK * world_size)
    findings = []
    if size is not None and free < planned * size:
        level = "fail" if basis == MEASURED or free < size else "warn"
        what = f"{run}: {gib(free)} are free, and {planned} more checkpoints of {gib(size)} ({basis}) take {gib(planned * size)}"
        findings.append(Finding(host, level, what, remedy))
    # A disk that makes its inodes as it needs them says that it has none at all.
    if disk.f_files and free_files < files:
        findings.append(Finding(host, "fail", f"{run}: {free_files} more files can be made, and checkpoints take up to {files}", remedy))
    return findings


def planned_checkpoints(run: Path, recipe: Recipe) -> int:
    """How many more may lie on the disk at once than do now: one is whole before an old one goes."""
    kept = recipe.checkpoint.keep + (recipe.train.metric_for_best_model is not None)
    there = sum(re.fullmatch(r"checkpoint-\d+", entry.name) is not None for entry in run.iterdir())
    return max(kept - there, 0) + 1


MEASURED, ESTIMATED = "as large as the last", "an estimate, at most"


def checkpoint_bytes(run: Path, recipe: Recipe) -> tuple[int | None, str]:
    """(bytes of a checkpoint, where that is known from). None when nothing tells. Raises CheckpointError for a ledger that is not one."""
    committed = [event["bytes"] for event in read_ledger(RunDir(run).ledger) if event["event"] == "committed"]
    if committed:
        return committed[-1], MEASURED
    folder = model_folder(run, recipe)
    shapes = list(tensor_shapes(folder)) if folder else []
    if not shapes:
        return None, ""
    if recipe.model.trains_adapter and not recipe.model.lora:
        earlier = Path(recipe.model.adapter).expanduser()
        shapes = list(tensor_shapes(earlier)) or list(tensor_shapes(earlier / "final")) or shapes
    trained, lora = sum(math.prod(shape) for _, shape in shapes), recipe.model.lora
    if lora:
        # No adapter is larger than one on every matrix.
        trained = sum(lora.r * sum(shape) for _, shape in shapes if len(shape) == 2)
        trained += sum(math.prod(shape) for name, shape in shapes if any(module in name for module in lora.modules_to_save))
    return WEIGHT_BYTES * trained, ESTIMATED


def model_folder(run: Path, recipe: Recipe) -> Path | None:
    """Where the model's files lie on this machine, if they do: a hub's model in its cache."""
    if recipe.model.init:
        return RunDir(run).init
    path = Path(recipe.model.name_or_path).expanduser()
    if path.is_dir():
        return path
    return find_snapshot(recipe.model.name_or_path, recipe.model.revision)
