"""The order of an epoch: every row once, whatever ranks there are, and the same in every life."""

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard

from harness.data.order import EpochOrder


def dealt(order: EpochOrder, epoch: int, ranks: int, micro_batch: int) -> list[set[int]]:
    """The rows of each optimiser step as Accelerate deals them out to so many ranks."""
    order.epoch = epoch
    batches = torch.utils.data.BatchSampler(order, micro_batch, drop_last=False)
    shards = [list(BatchSamplerShard(batches, ranks, rank)) for rank in range(ranks)]
    accumulation = order.global_batch // (micro_batch * ranks)
    steps = len(shards[0]) // accumulation
    return [
        {row for shard in shards for batch in shard[step * accumulation : (step + 1) * accumulation] for row in batch}
        for step in range(steps)
    ]


@pytest.mark.parametrize("lengths", [None, [7 * index % 50 for index in range(37)]], ids=["random", "by length"])
def test_a_step_takes_the_same_rows_on_any_number_of_ranks_and_an_epoch_takes_each_once(lengths):
    order = EpochOrder(37, 8, seed=3, lengths=lengths)
    reference = dealt(order, 1, ranks=1, micro_batch=8)
    for ranks, micro_batch in ((1, 1), (2, 2), (2, 4), (4, 2), (8, 1)):
        assert dealt(order, 1, ranks, micro_batch) == reference
    seen = [row for step in reference for row in step]
    assert sorted(seen) == [*range(38)]  # 37 is no row: it fills the last batch, and stands there three times
    assert order.of_epoch(1).count(37) == order.missing == 3


def test_epochs_differ_and_depend_on_seed_and_number_alone():
    order = EpochOrder(20, 4, seed=5)
    assert order.of_epoch(0) != order.of_epoch(1)
    assert order.of_epoch(6) == EpochOrder(20, 4, seed=5).of_epoch(6)
    order.epoch = 6
    assert list(order) == list(order) == order.of_epoch(6)  # iterating leaves no trace


def test_the_order_is_the_one_that_accelerate_gives_a_trainer_with_this_seed():
    from accelerate.data_loader import SeedableRandomSampler

    sampler = SeedableRandomSampler(range(24), data_seed=42)
    sampler.set_epoch(2)
    assert EpochOrder(24, 8, seed=42).of_epoch(2) == list(sampler)


def test_the_rows_of_a_step_can_be_named():
    order = EpochOrder(10, 4, seed=0)
    whole = order.of_epoch(2)
    assert [order.of_step(2, step) for step in range(3)] == [whole[:4], whole[4:8], whole[8:10]]


def test_batches_of_like_length_are_alike():
    lengths = torch.randint(1, 500, (400,), generator=torch.Generator().manual_seed(0)).tolist()
    order = EpochOrder(400, 8, seed=7, lengths=lengths)
    steps = [order.of_step(0, step) for step in range(50)]
    assert sum(max(lengths[row] for row in step) - min(lengths[row] for row in step) for step in steps) / 50 < 50  # of 500
