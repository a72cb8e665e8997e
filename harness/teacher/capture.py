"""Capture: the teacher is asked once about every sample of a data set, and what it says of the trained tokens is written down.

The data is cut into units (samples.py). A worker does its own, those whose number is its own modulo the number of workers, and then
whatever is not there yet, so that workers may come, go and be killed. A unit is whole or absent (writer.py), and who made it shows in no
byte: doing one twice is harmless, and a kill costs the one that was being done. Nobody talks to anybody; the folder says what is left.

Under ZeRO-3 a group of ranks is one worker that does as many units at once as it has ranks: each rank its own, in step with the others.
A served teacher (served.py) is asked for the same units; there a worker is a process that waits.

When all units are there, what the cache lost is measured against the teacher and written beside it (fidelity.py).
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from harness import distributed
from harness.data.store import Prepared
from harness.embedded import resolve
from harness.errors import Stopped, TeacherError
from harness.recipe import Recipe
from harness.recipe.backend import Backend
from harness.teacher import format as cache_format
from harness.teacher.fidelity import FIDELITY_FILE, measure_fidelity, measure_served_fidelity, render_fidelity, save_fidelity
from harness.teacher.forecast import MIB, Done, Forecast, most_bytes, render_progress
from harness.teacher.format import CACHE_FILE, UNIT_FILE, CacheHeader, Settings, Targets, check_same, load_header
from harness.teacher.head import keep, part_of, uniforms_of
from harness.teacher.reader import open_cache
from harness.teacher.resident import ResidentTeacher, load_teacher, weights_digest
from harness.teacher.samples import Sample, Samples, cache_folder, settings_of, teacher_name
from harness.teacher.served import ServedTeacher, connect
from harness.teacher.vocabulary import true_vocabulary, vocabulary_digest
from harness.teacher.writer import UnitWriter, save_header
from harness.units import Worker, missing_units


def capture(
    recipe: Recipe,
    tokenizer,
    prepared: Prepared,
    worker: Worker,
    *,
    sharded_by: Backend | None,
    stop: Callable[[], str | None],
    say: Callable[[str], None],
    begun: Callable[[Path, int], None] = lambda folder, units: None,
    beat: Callable[[int], None] = lambda done: None,
) -> Path:
    """Do units until all are there; returns the cache's folder. Every rank of a group calls it.

    prepared: the recipe's data, unpacked. sharded_by: the ZeRO-3 backend of this group; None: this process has the whole teacher.
    stop: asked between two units; a reason ends the capture. begun: told where how many units are to lie. beat: called at every batch,
    with the number of units that this process has done since. Raises Stopped when it was told to stop, TeacherError for what does not
    fit, ModelError.
    """
    samples = Samples(prepared, recipe.teacher.unit_tokens)
    folder = cache_folder(recipe, tokenizer, samples.units.plan)
    say(describe(samples, settings_of(recipe), true_vocabulary(tokenizer), folder))
    begun(folder, samples.units.plan.units)
    if (folder / CACHE_FILE).is_file():
        check_cache(folder, recipe, tokenizer, samples)
    # Rank 0 looks for all: two that look at a shared disk may not see the same.
    if distributed.broadcast_object((folder / FIDELITY_FILE).is_file() and not missing_units(folder, UNIT_FILE, samples.units.plan.units)):
        say(f"complete: {folder}")
        return folder
    longest, is_served = int(samples.units.lengths.max()), recipe.teacher.server is not None
    if is_served:
        teacher = connect(recipe, tokenizer, longest, say)
    else:
        teacher = load_teacher(recipe, tokenizer, longest, sharded_by=sharded_by)
    header = header_of(recipe, tokenizer, samples, teacher.digest, teacher.dtype)
    save_header(folder, header)
    _Capture(recipe, samples, teacher if is_served else _Resident(teacher, header), header, folder, say, beat).run(worker, stop)
    fidelity = (measure_served_fidelity if is_served else measure_fidelity)(teacher, samples, open_cache(folder))
    if distributed.is_main():
        save_fidelity(folder, fidelity)
    say(render_fidelity(fidelity))
    say(f"complete: {folder}")
    return folder


def describe(samples: Samples, settings: Settings, vocabulary: int, folder: Path) -> str:
    """What is about to be done."""
    units, positions = samples.units, samples.positions
    most = most_bytes(units.plan.samples, positions, settings, max(1, (vocabulary - 1).bit_length()))
    return (
        f"capture: {units.plan.samples:,} distinct samples, {units.tokens:,} tokens, {positions:,} of them trained, in "
        f"{units.plan.units:,} units; at most {most / MIB:,.1f} MiB in {folder}"
    )


def check_cache(folder: Path, recipe: Recipe, tokenizer, samples: Samples) -> None:
    """Raises TeacherError unless the cache that is there is this recipe's, with whole units: before a teacher is loaded, or hours are
    spent on the units that are missing."""
    there, asked = load_header(folder), recipe.teacher
    source = Path(resolve(asked.name_or_path))
    # A folder may have been trained anew; on the hub the revision says what it is. A server is compared when it is asked.
    digest = weights_digest(source) if source.is_dir() and not asked.server else there.teacher.digest
    dtype = there.teacher.dtype if asked.dtype == "auto" else asked.dtype
    check_same(folder, asdict(header_of(recipe, tokenizer, samples, digest, dtype)), asdict(there))
    open_cache(folder)


def header_of(recipe: Recipe, tokenizer, samples: Samples, digest: str, dtype: str | None) -> CacheHeader:
    """digest, dtype: as in format.Teacher."""
    quantization = recipe.teacher.quantization
    weights = quantization and " ".join(f"{key}={value}" for key, value in quantization if value is not None)
    kind = "served" if recipe.teacher.server else "resident"
    return CacheHeader(
        teacher=cache_format.Teacher(teacher_name(recipe), recipe.teacher.revision, digest, dtype, weights, kind),
        tokenizer=vocabulary_digest(tokenizer),
        vocabulary=true_vocabulary(tokenizer),
        settings=settings_of(recipe),
        plan=samples.units.plan,
    )


# ---- units


@dataclass(frozen=True)
class _Capture:
    recipe: Recipe
    samples: Samples
    teacher: _Resident | ServedTeacher
    header: CacheHeader
    folder: Path
    say: Callable[[str], None]
    beat: Callable[[int], None]

    def run(self, worker: Worker, stop: Callable[[], str | None]) -> None:
        """Round after round, a unit for each rank. Raises Stopped when it was told to stop before all units are there."""
        units, ranks, rank = self.header.plan.units, distributed.world_size(), distributed.rank()
        order, begun, found = worker.order(units), time.monotonic(), len(missing_units(self.folder, UNIT_FILE, units))
        is_first = True
        while True:
            missing, asked = distributed.broadcast_object(missing_units(self.folder, UNIT_FILE, units)), distributed.gather_objects(stop())
            if not missing:
                return
            if reason := next(filter(None, asked), None):
                there = units - len(missing)
                raise Stopped(
                    f"stopped ({reason}): {there} of {units} units are there; the same command goes on, with any number of workers"
                )
            units_of_ranks = [unit for unit in order if unit in missing][:ranks]
            mine = units_of_ranks[rank] if rank < len(units_of_ranks) else None
            done = Done.together(distributed.gather_objects(self._do(mine)))
            self.beat(int(mine is not None))
            left = len(missing_units(self.folder, UNIT_FILE, units))
            if is_first:
                self._look_ahead(done, left / units)
                is_first = False
            self.say(render_progress(units_of_ranks, done, units, left, (time.monotonic() - begun) / max(1, found - left)))

    def _look_ahead(self, first: Done, share_left: float) -> None:
        """Raises TeacherError when the disk will be full before the end."""
        train, forecast = self.recipe.train, Forecast.of(first, self.samples.units.tokens)
        self.say(forecast.render(first, None if train.max_steps else train.num_train_epochs or 1.0))
        needed, free = int(forecast.disk_bytes * share_left), shutil.disk_usage(self.folder).free
        if needed > free:
            raise TeacherError(
                f"{self.folder}: what is left needs about {needed / MIB:,.1f} MiB, and {free / MIB:,.1f} MiB are free; free some, give "
                "teacher.cache another folder, or lower teacher.cap"
            )

    def _do(self, unit: int | None) -> Done:
        """Ask about a unit and commit it; without one, keep the other ranks company."""
        begun, asking_s = time.monotonic(), 0.0
        batches = [] if unit is None else self.teacher.batches(self.samples, unit)
        rounds = max(distributed.gather_objects(len(batches)))
        batches += [[]] * (rounds - len(batches))
        if unit is None:
            for batch in batches:
                self.beat(0)
                self.teacher.targets_of(batch)
            return Done()
        with UnitWriter(self.folder, self.header, unit) as writer:
            for batch in batches:
                self.beat(0)
                asked = time.monotonic()
                targets = self.teacher.targets_of(batch)
                asking_s += time.monotonic() - asked
                for sample, of_sample in zip(batch, targets, strict=True):
                    writer.add(sample.key, of_sample)
            size = writer.commit().stat().st_size
        every = [sample for batch in batches for sample in batch]
        tokens, positions = sum(len(sample.input_ids) for sample in every), sum(len(sample.trained_at) for sample in every)
        return Done(tokens, positions, size, asking_s, time.monotonic() - begun)


@dataclass(frozen=True)
class _Resident:
    """A teacher in memory, or this rank's share of one."""

    teacher: ResidentTeacher
    header: CacheHeader

    def batches(self, samples: Samples, unit: int) -> list[list[Sample]]:
        return samples.batches(unit)

    def targets_of(self, batch: list[Sample]) -> list[Targets]:
        """The targets of each sample. Every rank asks at the same time, also one without samples."""
        settings = self.header.settings
        ids = np.zeros((max(len(batch), 1), max((len(sample.input_ids) for sample in batch), default=8)), np.int64)
        for row, sample in enumerate(batch):
            ids[row, : len(sample.input_ids)] = sample.input_ids
        # A token is predicted where the one before it stands.
        places = [row * ids.shape[1] + sample.trained_at - 1 for row, sample in enumerate(batch)]
        gold = [sample.input_ids[sample.trained_at] for sample in batch]
        drawn = [uniforms_of(settings.seed, sample.key, len(sample.trained_at), settings.draws) for sample in batch]
        places, gold, drawn = (
            torch.from_numpy(np.concatenate([empty, *parts]))
            for empty, parts in ((np.empty(0, np.int64), places), (np.empty(0, np.int64), gold), (np.empty((0, settings.draws)), drawn))
        )

        def question(hidden, head):
            at = places.to(hidden.device)
            chosen = hidden.flatten(0, 1).index_select(0, at)
            return keep(chosen, head, gold.to(at.device), drawn.to(at.device), settings, self.header.vocabulary)

        kept = self.teacher.ask(torch.from_numpy(ids), question).to_targets()
        ends = np.cumsum([len(sample.trained_at) for sample in batch])
        return [part_of(kept, slice(end - len(sample.trained_at), end)) for sample, end in zip(batch, ends.tolist(), strict=True)]
