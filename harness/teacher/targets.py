"""A batch's targets: what a cache holds, or a server says, of exactly the trained tokens of the rows that a collator has put together.

Row n of them belongs to the n-th trained token of the batch, as `hidden[:, :-1][labels[:, 1:] != -100]` lists them: row by row, from left
to right. Where a token stands (its row, its pack, its padding) is not asked: a sample's key is made of its tokens alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from harness.errors import TeacherError
from harness.losses import SparseTargets
from harness.teacher.format import Targets, sample_key
from harness.teacher.reader import TeacherCache
from harness.teacher.samples import Sample

if TYPE_CHECKING:
    from harness.teacher.served import ServedTeacher

UNTRAINED = -100


@dataclass(frozen=True)
class BatchTargets:
    """Targets on their way to the loss. A type of its own and no mapping of tensors: DeepSpeed's inputs and FSDP's are cast to the type of
    the weights wherever a library can see into them, and log-probabilities in bfloat16 are off by a percent."""

    sparse: SparseTargets

    def to(self, device, **options) -> BatchTargets:
        """As Accelerate moves whatever has this method."""
        return self._map(lambda tensor: tensor.to(device, **options))

    def pin_memory(self) -> BatchTargets:
        """As torch's loader pins whatever has this method."""
        return self._map(torch.Tensor.pin_memory)

    def _map(self, change: Callable) -> BatchTargets:
        return BatchTargets(SparseTargets(*(tensor if tensor is None else change(tensor) for tensor in self.sparse)))


class TargetsCollator:
    """A collator that adds `targets` to the batches of another one. Runs in data workers: what a cache reads is mapped, and forks share it;
    a server is asked while the model still learns from the batch before."""

    def __init__(self, collate: Callable[[list[dict]], dict], teacher: TeacherCache | ServedTeacher):
        self._collate, self._teacher = collate, teacher

    def __call__(self, rows: list[dict]) -> dict:
        batch = self._collate(rows)
        targets = self._teacher.read_samples([Sample.of(*sample) for row in rows for sample in samples_of(row)])
        trained = int((batch["labels"][:, 1:] != UNTRAINED).sum())
        if len(targets) != trained:
            raise TeacherError(
                f"{self._teacher.where}: has {len(targets):,} positions for a batch of {trained:,} trained tokens; they are not of these "
                "rows as they are trained; if it is a cache, remove it and run `harness capture RECIPE`"
            )
        return {**batch, "targets": BatchTargets(as_tensors(targets))}


def as_tensors(targets: Targets) -> SparseTargets:
    """What the loss takes, without a copy where there is something. A batch of rows that only fill up has no token, and yet a width."""
    ids, log_probs = targets.ids, targets.logprobs
    if not len(targets):
        ids, log_probs = np.zeros((0, 1), np.int32), np.zeros((0, 1), np.float32)
    arrays = (ids, log_probs, targets.counts.astype(np.int32), targets.log_tail, targets.entropy, targets.draws)
    return SparseTargets(*map(torch.from_numpy, arrays))


def keys_in(row: dict) -> Iterator[bytes]:
    """The keys of a row's samples: of itself, or of the parts of a pack; those without a trained token have no targets."""
    for ids, labels in samples_of(row):
        yield sample_key(ids, labels)


def samples_of(row: dict) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(token ids, labels) of each sample in a row that has something to train."""
    ids, labels = np.asarray(row["input_ids"]), np.asarray(row["labels"])
    ends = np.cumsum(row["seq_lengths"]) if "seq_lengths" in row else [len(ids)]
    start = 0
    for end in ends:
        if (labels[start:end] != UNTRAINED).any():
            yield ids[start:end], labels[start:end]
        start = end
