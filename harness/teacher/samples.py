"""The samples that a teacher is asked about: every distinct one of a prepared data set, held-out rows too, in units of work.

Units are cut in the order of the keys, which is as good as random: each is a fair sample of the data, so that the first one tells what all
will take. Which samples are in a unit, and which of them share a batch, follows from the data and `teacher.unit_tokens` alone and not from
who does the unit: the teacher's rounding, and so every byte, is the same however many workers there are.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from harness.recipe import Recipe
from harness.resources import cache_root
from harness.teacher.format import KEY_BYTES, VERSION, Plan, Settings, sample_key
from harness.teacher.vocabulary import vocabulary_digest

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from harness.data.store import Prepared

BATCH_TOKENS = 16_384
"""Of a batch of the teacher's, padding included: enough for the products to fill a GPU."""
ROWS_AT_ONCE = 1000


@dataclass(frozen=True)
class Sample:
    key: bytes
    input_ids: np.ndarray
    """int [T]."""
    trained_at: np.ndarray
    """Places of the trained tokens, from 1; int [P]."""

    @classmethod
    def of(cls, input_ids: np.ndarray, labels: np.ndarray) -> Sample:
        return cls(sample_key(input_ids, labels), input_ids, np.flatnonzero(labels[1:] != -100) + 1)


@dataclass(frozen=True)
class Units:
    """What is to be captured."""

    plan: Plan
    keys: np.ndarray
    """S16 [samples], in the order of units."""
    rows: np.ndarray
    """Of each sample one row that holds it."""
    lengths: np.ndarray
    """Tokens of each sample."""
    ends: np.ndarray
    """int [units]: where each unit ends."""

    @property
    def tokens(self) -> int:
        return int(self.lengths.sum())

    def unit(self, number: int) -> slice:
        return slice(int(self.ends[number - 1]) if number else 0, int(self.ends[number]))


def keys_of(dataset: Dataset) -> tuple[list[bytes], list[int], list[int]]:
    """(keys, tokens, trained tokens) of all samples of a prepared split; of a pack, of each sample in it."""
    keys, lengths, trained = [], [], []
    arrow = dataset.with_format("arrow")
    for first in range(0, len(dataset), ROWS_AT_ONCE):
        batch = arrow[first : min(first + ROWS_AT_ONCE, len(dataset))].combine_chunks()
        ids, labels = (batch[name].combine_chunks() for name in ("input_ids", "labels"))
        if "seq_lengths" in batch.column_names:
            sizes = batch["seq_lengths"].combine_chunks().flatten().to_numpy()
        else:
            sizes = np.diff(ids.offsets.to_numpy())
        ids, labels, ends = ids.flatten().to_numpy(), labels.flatten().to_numpy(), np.append(0, np.cumsum(sizes)).tolist()
        keys += [sample_key(ids[start:end], labels[start:end]) for start, end in zip(ends[:-1], ends[1:], strict=True)]
        lengths += sizes.tolist()
        trained += [int((labels[start:end] != -100).sum()) for start, end in zip(ends[:-1], ends[1:], strict=True)]
    return keys, lengths, trained


def plan_units(keys: Sequence[bytes], lengths: Sequence[int], unit_tokens: int) -> Units:
    """Share samples out, each key once, into units of about `unit_tokens` tokens."""
    distinct, rows = np.unique(np.array([*keys], f"S{KEY_BYTES}"), return_index=True)
    sizes = np.asarray(lengths, np.int64)[rows]
    number = (np.cumsum(sizes) - sizes) // unit_tokens
    # A sample longer than a unit leaves numbers out.
    number = np.unique(number, return_inverse=True)[1]
    ends = np.cumsum(np.bincount(number)) if len(number) else np.empty(0, np.int64)
    digest = hashlib.sha256(distinct.tobytes() + ends.astype("<i8").tobytes()).hexdigest()[:32]
    return Units(Plan(len(ends), len(distinct), digest), distinct, rows, sizes, ends)


def settings_of(recipe: Recipe) -> Settings:
    teacher = recipe.teacher
    # What is drawn does not follow the recipe's seed: another order of the rows is no reason to ask again.
    return Settings(teacher.top_p, teacher.floor, teacher.cap, teacher.draws, 0)


def cache_folder(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, plan: Plan) -> Path:
    """Where the cache of a recipe lies: what it says, else a folder of its own for whatever decides the content, which `harness capture`
    and training find alike. The teacher counts by its name, because a student's machine need not have it; that its weights are still those
    of the cache is checked by the capture."""
    teacher = recipe.teacher
    if teacher.cache:
        return Path(teacher.cache).expanduser()
    quantization = teacher.quantization and teacher.quantization.model_dump(mode="json")
    facts = [teacher_name(recipe), teacher.revision, teacher.dtype, quantization, vocabulary_digest(tokenizer), asdict(settings_of(recipe))]
    facts += ["served"] if teacher.server else []
    text = json.dumps([VERSION, facts, asdict(plan)], sort_keys=True)
    return cache_root(recipe.data.cache_dir) / "teachers" / hashlib.sha256(text.encode()).hexdigest()[:32]


def teacher_name(recipe: Recipe) -> str:
    """As the recipe says it; a folder by its whole path, so that it means the same wherever a command is run."""
    name = recipe.teacher.name_or_path
    return str(Path(name).expanduser().resolve()) if Path(name).expanduser().exists() else name


class Samples:
    """The samples of a prepared data set (unpacked: `packing=False`), by unit."""

    def __init__(self, prepared: Prepared, unit_tokens: int):
        from datasets import concatenate_datasets

        splits = [split for split in (prepared.train, prepared.eval) if split is not None]
        self._rows = concatenate_datasets([split.select_columns(["input_ids", "labels"]) for split in splits])
        keys, lengths, trained = keys_of(self._rows)
        self.units = plan_units(keys, lengths, unit_tokens)
        self.positions = sum(trained[row] for row in self.units.rows.tolist())
        """Trained tokens."""

    def batches(self, unit: int) -> list[list[Sample]]:
        """The samples of a unit, the longest first, those of like length together."""
        places = self.units.unit(unit)
        keys, lengths = self.units.keys[places], self.units.lengths[places]
        order = np.lexsort((keys, -lengths))
        rows = self._rows.with_format("numpy")[self.units.rows[places][order].tolist()]
        batches: list[list[Sample]] = []
        room = 0
        for place, ids, labels in zip(order.tolist(), rows["input_ids"], rows["labels"], strict=True):
            if room == 0:
                batches.append([])
                room = max(1, BATCH_TOKENS // len(ids))
            batches[-1].append(Sample(self.key(places.start + place), ids, np.flatnonzero(labels != -100)))
            room -= 1
        return batches

    def key(self, place: int) -> bytes:
        # As an array: from a single one numpy takes the zeros off its end.
        return self.units.keys[place : place + 1].tobytes()
