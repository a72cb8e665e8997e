"""Which checkpoint a run continues from: the newest one that is whole. What is not goes to RUN/.quarantine, and the ledger says why.

    RUN/.quarantine/checkpoint-N-K      the K-th folder of step N that was not whole; nothing in it is changed or deleted

Commits were made when the ledger has one, or when a folder checkpoint-N is or was there. From then on a run never begins again in silence:
with none left that is whole, selection stops with an error. That holds too where a person has deleted them all (`harness checkpoints prune`
never does): `--fresh` is the only way to begin again.

A folder that cannot be read now counts as not whole: the run goes on unattended, and the folder can be moved back.
"""

import contextlib
import itertools
import os
import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from harness.checkpoint.ledger import Ledger, read_ledger
from harness.checkpoint.manifest import MANIFEST, check_files, flush, read_manifest
from harness.errors import CheckpointError
from harness.run import RunDir

NAME = re.compile(r"checkpoint-(0|[1-9]\d*)")

Verify = Literal["digests", "sizes"]


@dataclass(frozen=True)
class Selected:
    step: int
    path: Path
    manifest: dict


def checkpoints(run_path: Path) -> list[tuple[int, Path]]:
    """(step, folder) of what is named checkpoint-N, highest step first. Links and other names (checkpoint-best) are somebody's own."""
    found = [(NAME.fullmatch(entry.name), entry) for entry in run_path.glob("checkpoint-*") if entry.is_dir() and not entry.is_symlink()]
    return sorted(((int(match[1]), entry) for match, entry in found if match), reverse=True)


def check_checkpoint(step: int, path: Path, verify: Verify, run: str | None = None) -> dict:
    """The manifest of a checkpoint that is whole, and of this run where its name is given. Raises CheckpointError that says what is not as
    it was committed."""
    manifest = read_manifest(path)
    if run is not None and manifest.get("run", run) != run:
        raise CheckpointError(f"{path}: is of another run ({manifest['run']}), and was copied here; continue that run in its own folder")
    if manifest["step"] != step:
        raise CheckpointError(f"{path / MANIFEST}: is of step {manifest['step']}; a folder of step {step} was copied over or renamed")
    check_files(path, manifest, digests=verify == "digests")
    return manifest


def run_name(run: RunDir) -> str | None:
    """The name that the ledger gives this run, by which its checkpoints are told from those of another that were copied here."""
    return next((event["run"] for event in read_ledger(run.ledger) if event["event"] == "run_began"), None)


def name_run(run: RunDir, ledger: Ledger) -> str:
    """Give the run a name when it begins. A run whose ledger was lost has the name that stands in its newest checkpoint."""
    name = run_name(run)
    if name is None:
        for _, path in checkpoints(run.path):
            with contextlib.suppress(CheckpointError):
                name = read_manifest(path).get("run")
                break
        name = name or secrets.token_hex(8)
        ledger.append("run_began", run=name)
    return name


def select_checkpoint(run: RunDir, ledger: Ledger, *, verify: Verify, on_progress: Callable[[str], None] | None = None) -> Selected | None:
    """The newest checkpoint that is whole, after those above it were put in quarantine. None when no commit was ever made.

    on_progress is told which folder is read next: every byte of a large one takes minutes.
    Raises CheckpointError when commits were made and none is whole, or when what is not whole cannot be moved away.
    """
    for step, path in checkpoints(run.path):
        if on_progress:
            on_progress(f"verifying {path.name}")
        try:
            return Selected(step, path, check_checkpoint(step, path, verify, run_name(run)))
        except CheckpointError as error:
            _quarantine(run, ledger, step, path, str(error))
    committed = [event["step"] for event in read_ledger(run.ledger) if event["event"] == "committed"]
    if committed or quarantined(run):
        raise CheckpointError(_none_is_whole(run, committed))
    return None


def quarantined(run: RunDir) -> list[tuple[Path, str]]:
    """(folder, why it was not whole) of what lies in quarantine."""
    reasons = {event["moved_to"]: event["reason"] for event in read_ledger(run.ledger) if event["event"] == "quarantined"}
    folders = sorted(run.quarantine.glob("*"))
    return [(folder, reasons.get(str(folder.relative_to(run.path)), "the ledger does not say why")) for folder in folders]


def move_aside(path: Path, into: Path) -> Path:
    """Rename a checkpoint's folder to the first name that is free in `into`, and wait until that is on the disk. Returns its new path."""
    into.mkdir(exist_ok=True)
    target = next(target for number in itertools.count(1) if not os.path.lexists(target := into / f"{path.name}-{number}"))
    os.rename(path, target)
    # Both folders: after a power cut it stands in one of them, and whole.
    flush(into)
    flush(path.parent)
    return target


def _quarantine(run: RunDir, ledger: Ledger, step: int, path: Path, reason: str) -> None:
    try:
        target = move_aside(path, run.quarantine)
    except OSError as error:
        raise CheckpointError(
            f"{reason}\n{path}: is not whole, and cannot be moved to {run.quarantine}: {error.strerror}; "
            "make the run folder writable, or move the checkpoint away"
        ) from error
    ledger.append("quarantined", step=step, reason=reason, moved_to=str(target.relative_to(run.path)))


def _none_is_whole(run: RunDir, committed: list[int]) -> str:
    lines = [f"{run.path}: checkpoints were committed, and none that is whole is left to continue from"]
    if committed:
        lines.append(f"  committed: steps {', '.join(map(str, sorted(set(committed))))}")
    lines += [f"  kept in {folder}: {reason}" for folder, reason in quarantined(run)] or ["  all were deleted or moved away"]
    lines.append("put one back, whole and under its name checkpoint-N, or begin again with --fresh, which deletes this run")
    return "\n".join(lines)
