"""The commit: a checkpoint is written elsewhere, proven, and given its name by one rename.

    1  rank 0 checks that there is room and makes RUN/.staging/N-K-TOKEN/checkpoint-N; the other ranks wait until they see it
    2  every rank writes its part there
    3  vote
    4  every rank hashes and flushes the files that it wrote; rank 0 gathers size and digest of each
    5  rank 0 writes manifest.json and flushes it, renames the folder to RUN/checkpoint-N, and flushes RUN     <- the commit
    6  vote; rank 0 writes the ledger and renames away what need not stay; it is deleted while the training goes on

A rank that is killed before the rename leaves a folder in .staging that nobody reads; after it, a whole checkpoint. An error on any rank
(a full disk) is voted on by all, the folder in .staging goes, the ledger says why, and the training goes on with its last checkpoint.
"""

import os
import re
import secrets
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from harness import distributed
from harness.checkpoint.ledger import Ledger
from harness.checkpoint.manifest import FORMAT, digest_files, flush, write_manifest
from harness.checkpoint.retention import delete, plan_retention, retire
from harness.checkpoint.selection import checkpoints, move_aside
from harness.errors import CheckpointError
from harness.recipe.schema import Checkpoint
from harness.run import RunDir

VISIBLE_WITHIN_S = 60.0
"""On a shared disk a new folder shows on another machine after the attributes' cache there has run out."""
SPARE = 1.1
"""So many times the size of the last checkpoint must be free before another is begun."""
OWNER = re.compile(r"(?:rank_|rng_state_|__)(\d+)(?=[_.])")
"""The rank in a file's name: rng_state_R.pth, harness_rank_R.json, DeepSpeed's *zero_pp_rank_R_*, DCP's __R_0.distcp."""


@dataclass
class Committer:
    """Makes a run's checkpoints; every rank has one and calls it at the same step."""

    run: RunDir
    section: Checkpoint
    ledger: Ledger
    attempt: int
    enter: Callable[[str], None]
    """Says what this rank does from now on (RankReport.enter)."""
    expected_bytes: int
    """Of the first checkpoint; later ones are taken to be as large as the last."""
    last_step: int | None = None
    _deletions: list[Future] = field(default_factory=list)
    """Freeing a gigabyte can take longer than writing it."""

    def commit(self, step: int, reason: str, write: Callable[[Path], list], describe: Callable[[], dict], best_step: int | None) -> bool:
        """Make checkpoint-`step`. Whether it stands, the same on every rank; after False the run is as it was before.

        write(folder): writes this rank's part and returns the errors it met; a rank that raised would leave others waiting in a collective.
        describe(): what the manifest says beside its files; asked on rank 0, after the writing.
        """
        started = time.monotonic()
        staging, error = self._stage(step)
        if not self._agreed([error] if error else [], step, staging):
            return False
        if not self._agreed(write(staging), step, staging):
            return False
        self.enter("saving: hashing")
        entries, errors = self._digest_own_files(staging)
        gathered = distributed.gather_objects((entries, errors))
        if distributed.is_main():
            listed = [entry for entries, _ in gathered for entry in entries]
            if not any(errors for _, errors in gathered):
                errors = self._publish(step, reason, staging, listed, describe, started)
        if not self._agreed(errors, step, staging):
            return False
        self.last_step = step
        if distributed.is_main():
            size = sum(entry["bytes"] for entry in listed)
            self.expected_bytes = size
            self.ledger.append("committed", step=step, reason=reason, bytes=size, save_s=round(time.monotonic() - started, 3))
            self._retain(best_step)
        return True

    def _stage(self, step: int) -> tuple[Path | None, str | None]:
        """(the folder to write in, the same on every rank; what is wrong on this one)."""
        self.enter("saving: staging")
        folder, error = None, None
        if distributed.is_main():
            folder = self.run.staging / f"{step}-{self.attempt}-{secrets.token_hex(4)}" / f"checkpoint-{step}"
            try:
                self._await_deletions()
                folder.mkdir(parents=True)
                check_space(self.run.path, self.expected_bytes)
            except (OSError, CheckpointError) as problem:
                error = str(problem)
        folder, failed = distributed.gather_objects((folder, error))[0]
        if not failed and not _appears(folder):
            error = f"{folder}: rank 0 made it and this rank does not see it; the run folder must lie on a disk that all machines share"
        return folder, error

    def _digest_own_files(self, staging: Path) -> tuple[list[dict], list[str]]:
        """What this rank wrote, by the rank in its name: its bytes lie in this machine's memory, and only from here can they be flushed."""
        paths = [str(path.relative_to(staging)) for path in sorted(staging.rglob("*")) if path.is_file()]
        own = [path for path in paths if owner(path, distributed.world_size()) == distributed.rank()]
        try:
            return digest_files(staging, own, durable=True), []
        except Exception as error:  # whatever it is, the other ranks wait to hear of it
            return [], [str(error)]

    def _publish(self, step: int, reason: str, staging: Path, listed: list[dict], describe: Callable, started: float) -> list[str]:
        target = self.run.path / staging.name
        try:
            there = {str(path.relative_to(staging)) for path in staging.rglob("*") if path.is_file()}
            if there != {entry["path"] for entry in listed}:
                lost = ", ".join(sorted(there ^ {entry["path"] for entry in listed})[:3])
                return [f"{staging}: the ranks do not see the same files ({lost})"]
            self.enter("saving: manifest")
            about = {
                "format": FORMAT,
                "step": step,
                "reason": reason,
                "attempt": self.attempt,
                "previous_step": self.last_step,
                **describe(),
            }
            about |= {"time": time.time(), "save_s": round(time.monotonic() - started, 3)}
            write_manifest(staging, {**about, "files": sorted(listed, key=lambda entry: entry["path"])})
            self.enter("saving: rename")
            if target.exists():
                # Not of this life, and not what it began from: somebody has put it there.
                moved = move_aside(target, self.run.quarantine).relative_to(self.run.path)
                self.ledger.append("quarantined", step=step, reason="stood in the way of a commit", moved_to=str(moved))
            os.rename(staging, target)
            self.enter("saving: flushing the run folder")
            flush(self.run.path)
            shutil.rmtree(staging.parent, ignore_errors=True)
        except Exception as error:  # whatever it is, the other ranks wait to hear of it
            return [str(error)]
        return []

    def _retain(self, best_step: int | None) -> None:
        self.enter("saving: retention")
        steps = [step for step, _ in checkpoints(self.run.path)]
        going = plan_retention(steps, keep=self.section.keep, keep_every=self.section.keep_every, best_step=best_step)
        retire(self.run, self.ledger, going, remove=self._delete_meanwhile)

    def _delete_meanwhile(self, folder: Path) -> None:
        pool = ThreadPoolExecutor(1)
        self._deletions.append(pool.submit(delete, folder))
        pool.shutdown(wait=False)

    def finish(self, best_step: int | None) -> None:
        """On rank 0, when no checkpoint is to follow: what need not stay goes, also where a life was killed between a commit and that."""
        self._retain(best_step)
        self._await_deletions()

    def _await_deletions(self) -> None:
        """Before another checkpoint is begun, because its room is what they free; at the end, because nobody would delete the rest."""
        for deletion in self._deletions:
            if error := deletion.exception():
                self.ledger.append("retire_failed", error=str(error))
        self._deletions.clear()

    def _agreed(self, errors: list, step: int, staging: Path | None) -> bool:
        """True when no rank met an error. Otherwise what was written goes, and the ledger and the screen say why."""
        told = [_describe(error, staging) for error in errors]
        everywhere = [(rank, text) for rank, texts in enumerate(distributed.gather_objects(told)) for text in texts]
        if everywhere and distributed.is_main():
            self.enter("saving: giving up")
            shutil.rmtree(staging.parent, ignore_errors=True)
            rank, text = everywhere[0]
            self.ledger.append("save_failed", step=step, rank=rank, error=text)
            kept = f"checkpoint-{self.last_step} stands" if self.last_step is not None else "there is none yet"
            print(f"warning: no checkpoint at step {step}: rank {rank}: {text}; {kept}", flush=True)
        return not everywhere


def _describe(error: Exception | str, staging: Path | None) -> str:
    text = str(error) or type(error).__name__
    if isinstance(error, RuntimeError):
        # torch says of a full disk that a position in a file is not the expected one, and not of which file.
        text += f" (while writing {staging}; is the disk full?)"
    return text


def owner(path: str, world_size: int) -> int:
    """The rank that wrote a file; 0 where the name tells none."""
    found = OWNER.search(Path(path).name)
    rank = int(found[1]) if found else 0
    return rank if rank < world_size else 0


def check_space(folder: Path, expected_bytes: int) -> None:
    """Raises CheckpointError unless a checkpoint of that size fits."""
    free, needed = shutil.disk_usage(folder).free, int(SPARE * expected_bytes)
    if free < needed:
        raise CheckpointError(
            f"{folder}: {free / 2**20:,.1f} MiB are free and a checkpoint takes about {needed / 2**20:,.1f} MiB; free some, or lower "
            "checkpoint.keep and keep_every"
        )


def _appears(folder: Path) -> bool:
    deadline = time.monotonic() + VISIBLE_WITHIN_S
    while not folder.is_dir():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True
