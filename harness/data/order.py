"""The order in which an epoch is seen: a function of seed and epoch alone, so that it is the same on any number of ranks and in any life.

Accelerate cuts a sampler's indices into micro-batches and deals them out to the ranks in turn. Whatever the ranks and micro-batches are,
one optimiser step takes the next `global_batch` rows of this order. An epoch is made up to whole global batches with an index past the
end, for a row that counts nothing: Accelerate would fill it from the front of the epoch, with as many rows as the ranks happen to need.
"""

from collections.abc import Iterator

import torch


class EpochOrder(torch.utils.data.Sampler[int]):
    """Indices of `rows` rows for the epoch that `epoch` says, made up to whole global batches with the index `rows`.

    lengths: tokens of each row; given, each global batch is of rows of like length, else the order is random.
    """

    def __init__(self, rows: int, global_batch: int, seed: int, lengths: list[int] | None = None):
        self.rows, self.global_batch, self.seed, self.lengths, self.epoch = rows, global_batch, seed, lengths, 0

    @property
    def missing(self) -> int:
        """How many indices of a whole epoch stand for no row."""
        return -self.rows % self.global_batch

    @property
    def name(self) -> str:
        return "random" if self.lengths is None else "by_length"

    def __len__(self) -> int:
        return self.rows + self.missing

    def __iter__(self) -> Iterator[int]:
        yield from self.of_epoch(self.epoch)

    def of_epoch(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(self.seed + epoch)
        if self.lengths is None:
            order = torch.randperm(self.rows, generator=generator).tolist()
        else:
            from transformers.trainer_pt_utils import get_length_grouped_indices

            order = get_length_grouped_indices(self.lengths, self.global_batch, generator=generator)
        return order + [self.rows] * self.missing

    def of_step(self, epoch: int, step: int) -> list[int]:
        """The rows of an epoch's optimiser step, the first being 0; those that stand for no row left out."""
        start = step * self.global_batch
        return [index for index in self.of_epoch(epoch)[start : start + self.global_batch] if index < self.rows]
