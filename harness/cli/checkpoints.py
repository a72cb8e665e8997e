import contextlib
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import click

from harness.checkpoint.ledger import Ledger, read_ledger
from harness.checkpoint.retention import clean, delete, plan_retention, retire
from harness.checkpoint.selection import Verify, check_checkpoint, checkpoints, quarantined, run_name
from harness.errors import CheckpointError, LaunchError
from harness.recipe import load
from harness.run import RunDir

LINE = "{:>6}  {:>6}  {:>9}  {:<14}  {:>5}  {}"


@click.group("checkpoints")
def command():
    """List, verify or prune the checkpoints of a run."""


@command.command("list", short_help="Show them, and which one a resume would take.")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--digests", is_flag=True, help="Read every byte. Without it a checkpoint counts as whole by the sizes of its files.")
def list_checkpoints(run: Path, digests: bool):
    """Show the checkpoints of RUN, newest first, and which one a resume would take. Nothing is moved or changed."""
    folder = open_run(run)
    rows = read_rows(folder, "digests" if digests else "sizes")
    if rows:
        best = next((best_step(row.path) for row in rows if row.manifest), None)
        click.echo(LINE.format("step", "age", "size", "reason", "ranks", f"whole by {'digests' if digests else 'sizes'}"))
        for row in rows:
            click.echo(row.render(best))
    for aside, reason in quarantined(folder):
        click.echo(f"in quarantine: {aside.name}, {format_bytes(folder_bytes(aside))}: {reason.replace(f'{folder.path}/', '')}")
    unread = any(row.manifest for row in rows) and not digests
    click.echo(explain_resume(folder, rows) + (" (its bytes were not read; --digests reads them)" if unread else ""))


@command.command("verify", short_help="Read every byte of them, and exit with 1 if one is not whole.")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--step", type=click.IntRange(0), help="Only the checkpoint of this step.")
def verify_checkpoints(run: Path, step: int | None):
    """Read every byte of the checkpoints of RUN, and exit with 1 if one is not whole. Nothing is moved or changed."""
    folder = open_run(run)
    found = checkpoints(folder.path)
    if not found:
        raise CheckpointError(explain_resume(folder, []))
    asked = [(number, path) for number, path in found if step in (None, number)]
    if not asked:
        there = ", ".join(str(number) for number, _ in found)
        raise CheckpointError(f"{folder.path}: holds no checkpoint of step {step}; it holds those of {there}")
    broken = 0
    for number, path in asked:
        began = time.monotonic()
        row = read_row(folder, number, path, "digests")
        if row is None:
            click.echo(f"{path.name}: was retired meanwhile")
        elif row.manifest:
            click.echo(f"{path.name}: whole, {format_bytes(row.bytes)} read in {time.monotonic() - began:.1f} s")
        else:
            broken += 1
            click.echo(f"{path.name}: NOT WHOLE: {row.wrong}")
    if broken:
        click.echo(f"{broken} of {len(asked)} not whole; a resume puts it in quarantine and takes the newest that is whole", err=True)
        sys.exit(1)


@command.command("prune", short_help="Delete old ones, and what killed saves left behind.")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--keep", type=click.IntRange(1), help="How many of the newest stay.  [default: the recipe's checkpoint.keep]")
@click.option("--quarantine", is_flag=True, help="Delete what lies in quarantine, too.")
@click.option("--dry-run", is_flag=True, help="Say what would go; delete nothing.")
def prune_checkpoints(run: Path, keep: int | None, quarantine: bool, dry_run: bool):
    """Delete old checkpoints of RUN, and what killed saves left behind.

    What stays: the newest, of which one at least is whole by every byte; the best; those that the recipe's checkpoint.keep_every keeps.
    """
    folder = open_run(run)
    if not dry_run:
        hold(folder)
    rows = read_rows(folder, "sizes")
    # What the run will continue from is read whole before anything else goes. What is newer is not whole, and none of the kept.
    newest = next((row for row in rows if row.manifest and is_proven(folder, row)), None)
    if rows and newest is None:
        raise CheckpointError(f"{folder.path}: no checkpoint is whole, so nothing is deleted; `harness checkpoints verify` says why")
    whole = [row for row in rows if row.manifest and row.step <= newest.step]
    best = best_step(newest.path) if newest else None
    recipe = load(folder.recipe).checkpoint
    going = plan_retention([row.step for row in whole], keep=keep or recipe.keep, keep_every=recipe.keep_every, best_step=best)
    for row in rows:
        fate = "goes" if row.step in going else "stays, the best" if row.step == best else "stays"
        if row not in whole:
            fate = "is not whole; a resume puts it in quarantine"
        click.echo(f"{row.path.name:<18}{format_bytes(row.bytes):>9}  {fate}")
    if not rows:
        click.echo(explain_resume(folder, rows))
    asides = [folder.staging, folder.retired, *([folder.quarantine] if quarantine else [])]
    held = {path: folder_bytes(path) for path in [*(row.path for row in rows if row.step in going), *asides]}
    for aside in asides:
        if held[aside]:
            click.echo(f"{aside.name:<18}{format_bytes(held[aside]):>9}  goes")
    if dry_run:
        click.echo(f"would free {format_bytes(sum(held.values()))}; nothing was deleted (--dry-run)")
        return
    errors = delete_all(folder, going, quarantine=quarantine)
    click.echo(f"freed {format_bytes(sum(held.values()) - sum(map(folder_bytes, held)))}")
    if errors:
        raise CheckpointError("\n".join(errors))


def hold(folder: RunDir) -> None:
    """Until this process ends no run begins in the folder: what a training writes, and what it reads, is not deleted."""
    try:
        folder.hold()
    except OSError as error:
        raise LaunchError(f"{folder.path}: cannot be written: {error.strerror}; nothing was deleted") from error


def delete_all(folder: RunDir, steps: list[int], *, quarantine: bool) -> list[str]:
    """Returns an error for each thing that could not be deleted."""
    failed = retire(folder, Ledger(folder.ledger, None), steps)
    stuck = [folder.path / f"checkpoint-{step}" for step in failed]
    errors = [f"{path}: could not be moved away; {folder.ledger} says why" for path in stuck if path.exists()]
    errors += clean(folder)
    if quarantine:
        try:
            delete(folder.quarantine)
        except OSError as error:
            errors.append(f"{folder.quarantine}: cannot be deleted: {error}")
    return errors


# ---- what lies there


@dataclass(frozen=True)
class Row:
    """One checkpoint as it lies there: with its manifest when it is whole, and else with what is wrong."""

    step: int
    path: Path
    bytes: int
    time: float
    manifest: dict | None
    wrong: str = ""

    def render(self, best: int | None) -> str:
        reason, ranks, whole = "-", "-", f"NO: {self.wrong}"
        if self.manifest:
            reason, ranks, whole = self.manifest["reason"], self.manifest["world_size"], "yes"
            if self.step == best and reason != "best":
                reason += ", best"
        return LINE.format(self.step, format_age(time.time() - self.time), format_bytes(self.bytes), reason, ranks, whole)


def open_run(path: Path) -> RunDir:
    """Raises LaunchError when no run of harness began there."""
    folder = RunDir(path.expanduser().resolve())
    folder.read_manifest()
    return folder


def read_rows(folder: RunDir, verify: Verify) -> list[Row]:
    rows = (read_row(folder, step, path, verify) for step, path in checkpoints(folder.path))
    return [row for row in rows if row]


def read_row(folder: RunDir, step: int, path: Path, verify: Verify) -> Row | None:
    """None when a training has retired the checkpoint while it was read."""
    try:
        manifest, wrong = check_checkpoint(step, path, verify, run_name(folder)), ""
    except CheckpointError as error:
        manifest, wrong = None, str(error).removeprefix(f"{path}/").removeprefix(f"{path}: ")
    try:
        return Row(step, path, folder_bytes(path), manifest["time"] if manifest else path.stat().st_mtime, manifest, wrong)
    except FileNotFoundError:
        return None


def is_proven(folder: RunDir, row: Row) -> bool:
    """Whether the checkpoint is whole by every byte."""
    read = read_row(folder, row.step, row.path, "digests")
    return read is not None and read.manifest is not None


def best_step(checkpoint: Path) -> int | None:
    """The step of the best model so far, as the trainer knew it at a checkpoint."""
    state = checkpoint / "trainer_state.json"
    with contextlib.suppress(OSError, ValueError):
        return json.loads(state.read_bytes()).get("best_global_step")
    return None


def explain_resume(folder: RunDir, rows: list[Row]) -> str:
    """What a resume would do, and why not with anything newer."""
    taken = next((row for row in rows if row.manifest), None)
    if taken:
        newer = ", ".join(row.path.name for row in rows if row.step > taken.step)
        return f"a resume would take {taken.path.name}" + (f", and put {newer} in quarantine first" if newer else ", the newest")
    events = read_ledger(folder.ledger)
    committed = sorted({event["step"] for event in events if event["event"] == "committed"})
    failed = [event for event in events if event["event"] == "save_failed"]
    if rows or committed or quarantined(folder):
        steps = f" (committed were steps {', '.join(map(str, committed))})" if committed else ""
        what = "none of its checkpoints is whole" if rows else "none of its checkpoints is left"
        return f"{folder.path}: {what}{steps}; a resume would stop with an error. Put one back from a copy, or begin again with --fresh"
    why = f"; the last save failed, at step {failed[-1]['step']}: {failed[-1]['error']}" if failed else ""
    return f"{folder.path}: holds no checkpoint, because none was committed yet{why}. A resume would begin at step 0"


def folder_bytes(path: Path) -> int:
    """Of all files below it, as far as they are still there."""
    total = 0
    with contextlib.suppress(FileNotFoundError):
        for file in path.rglob("*"):
            total += file.lstat().st_size if not file.is_dir() else 0
    return total


def format_bytes(count: float) -> str:
    units = ["B", "KiB", "MiB", "GiB"]
    while count >= 1000 and units[1:]:
        count, units = count / 1024, units[1:]
    return f"{count:.0f} {units[0]}" if count >= 100 or units[0] == "B" else f"{count:.1f} {units[0]}"


def format_age(seconds: float) -> str:
    for length, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(0, seconds):.0f} s"
