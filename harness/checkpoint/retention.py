"""Which checkpoints stay, and how the others go.

    RUN/.retired/checkpoint-N-K     a checkpoint that is being deleted

A folder is renamed away first and deleted then, so that one named checkpoint-N is never half deleted; what a kill leaves behind of it goes
when the next life begins (`clean`). Nothing here ends a training: what could not be deleted is in the ledger, and said.
"""

import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from harness.checkpoint.ledger import Ledger
from harness.checkpoint.selection import move_aside
from harness.run import RunDir


def plan_retention(steps: Iterable[int], *, keep: int, keep_every: int | None, best_step: int | None) -> list[int]:
    """The steps that go, in rising order. The newest `keep` stay (one at least), the best, and every multiple of `keep_every`."""
    ordered = sorted(set(steps))
    newest = ordered[-max(1, keep) :]
    return [step for step in ordered if step not in newest and step != best_step and not (keep_every and step % keep_every == 0)]


def delete(path: Path) -> None:
    """Delete a folder with everything in it. What somebody else deletes meanwhile is gone, too, and no error."""
    while os.path.lexists(path):
        try:
            shutil.rmtree(path)
        except FileNotFoundError:
            continue


def retire(run: RunDir, ledger: Ledger, steps: Iterable[int], remove: Callable[[Path], object] = delete) -> list[int]:
    """Rename the checkpoints of these steps away, and have each one's folder in .retired removed. Returns those that could not go; the
    ledger says why."""
    failed = []
    for step in steps:
        try:
            remove(move_aside(run.path / f"checkpoint-{step}", run.retired))
        except OSError as error:
            failed.append(step)
            ledger.append("retire_failed", step=step, error=str(error))
        else:
            ledger.append("retired", step=step)
    return failed


def clean(run: RunDir) -> list[str]:
    """Delete what a killed life left in .staging and .retired. Returns an error for each that could not be deleted.

    Only for the process that holds the run folder: a checkpoint that is being written lies in .staging.
    """
    errors = []
    for folder in (run.staging, run.retired):
        for entry in sorted(folder.glob("*")):
            try:
                delete(entry)
            except OSError as error:
                errors.append(f"{entry}: cannot be deleted: {error}")
    return errors
