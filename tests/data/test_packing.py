"""Packs: full, apart from each other, and every sample in one of them."""

import random

import pytest
from datasets import Dataset

from harness.data.packing import fill_rate, pack, plan_packs
from harness.data.store import SAMPLE_FEATURES
from harness.errors import DataError


def mixed_lengths(n, capacity, seed=0):
    rng = random.Random(seed)
    return [min(capacity, max(1, int(rng.lognormvariate(5, 1)))) for _ in range(n)]


def samples(lengths):
    """Samples whose tokens say where they are from: 1000 * sample + position."""
    rows = []
    for i, n in enumerate(lengths):
        tokens = [1000 * i + t for t in range(n)]
        rows.append({"input_ids": tokens, "labels": tokens, "length": n, "sample": f"s{i}", "location": f"f:{i}"})
    return Dataset.from_list(rows, features=SAMPLE_FEATURES)


@pytest.mark.parametrize("capacity", [7, 512, 2048])
def test_every_sample_is_in_one_pack_and_none_is_over_capacity(capacity):
    lengths = mixed_lengths(3000, capacity)
    packs = plan_packs(lengths, capacity)
    assert sorted(sample for samples in packs for sample in samples) == list(range(3000))
    assert all(sum(lengths[sample] for sample in samples) <= capacity for samples in packs)


def test_packs_are_as_full_as_trls():
    from trl import pack_dataset

    lengths = mixed_lengths(2000, 1024)
    packs = plan_packs(lengths, 1024)
    theirs = pack_dataset(Dataset.from_dict({"input_ids": [[0] * n for n in lengths]}), 1024, "bfd", {"batch_size": None})
    assert len(packs) == len(theirs)
    assert fill_rate(lengths, packs, 1024) == pytest.approx(sum(lengths) / (1024 * len(theirs)))
    assert fill_rate(lengths, packs, 1024) > 0.95


def test_packs_are_the_same_for_the_same_seed_and_mixed_for_another():
    lengths = mixed_lengths(500, 512)
    assert plan_packs(lengths, 512, seed=1) == plan_packs(lengths, 512, seed=1) != plan_packs(lengths, 512, seed=2)
    longest = [max(lengths[s] for s in samples) for samples in plan_packs(lengths, 512)]
    half = len(longest) // 2
    assert abs(sum(longest[:half]) / half - sum(longest[half:]) / (len(longest) - half)) < 60  # not sorted by length


def test_a_hundred_thousand_samples_are_planned_in_seconds():
    lengths = mixed_lengths(100_000, 8192)
    assert fill_rate(lengths, plan_packs(lengths, 8192), 8192) > 0.95  # the timeout of a quadratic plan is the suite's


def test_a_sample_that_cannot_fit_is_named():
    with pytest.raises(DataError, match="sample 1 has 9 tokens; a pack takes 1 to 8"):
        plan_packs([8, 9], 8)


def test_a_pack_keeps_its_samples_whole_and_says_where_each_begins():
    lengths = mixed_lengths(700, 64)  # more packs than are written at a time
    packed = pack(samples(lengths), 64)
    assert packed.column_names == ["input_ids", "labels", "seq_lengths", "samples"]
    seen = {}
    for row in packed:
        assert sum(row["seq_lengths"]) == len(row["input_ids"]) == len(row["labels"]) <= 64
        start = 0
        for length, sample in zip(row["seq_lengths"], row["samples"], strict=True):
            seen[int(sample[1:])] = row["input_ids"][start : start + length]
            assert (
                row["labels"][start] == -100 and row["labels"][start + 1 : start + length] == row["input_ids"][start + 1 : start + length]
            )
            start += length
    assert seen == {i: [1000 * i + t for t in range(n)] for i, n in enumerate(lengths)}


def test_trls_collator_keeps_the_samples_of_a_pack_apart():
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    packed = pack(samples([3, 5, 4, 8]), 8)
    rows = [{k: row[k] for k in ("input_ids", "labels", "seq_lengths")} for row in packed]
    batch = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)(rows)
    lengths = [length for row in rows for length in row["seq_lengths"]]
    assert batch["position_ids"][0].tolist() == [t for length in lengths for t in range(length)]
    assert batch["cu_seq_lens_q"].tolist() == [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    assert batch["input_ids"][0].tolist() == [token for row in rows for token in row["input_ids"]]
    # what the loss compares: a label is only ever predicted from a token of its own sample
    assert batch["labels"][0].tolist() == [label for row in rows for label in row["labels"]]
    for position, label in enumerate(batch["labels"][0].tolist()):
        if label != -100:
            assert batch["input_ids"][0][position - 1] // 1000 == label // 1000


def test_packed_samples_have_the_loss_that_they_have_alone():
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    model = LlamaForCausalLM(config).double().eval()
    rng = random.Random(0)
    rows = []
    for i, n in enumerate(mixed_lengths(12, 40)):
        tokens = [rng.randrange(97) for _ in range(n)]
        labels = [-100] + [token if rng.random() < 0.5 else -100 for token in tokens[1:]]
        rows.append({"input_ids": tokens, "labels": labels, "length": n, "sample": f"s{i}", "location": f"f:{i}"})

    def loss(input_ids, labels, **more):
        # use_cache=True would switch off what keeps samples apart in a batch without an attention mask; trainers pass False.
        with torch.no_grad():
            logits = model(input_ids=input_ids, use_cache=False, **more).logits
        return torch.nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:], reduction="sum").item()

    alone = sum(
        loss(torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])) for row in rows if any(x != -100 for x in row["labels"])
    )
    collate = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    packed = pack(Dataset.from_list(rows, features=SAMPLE_FEATURES), 64)
    together = sum(loss(**collate([{k: row[k] for k in ("input_ids", "labels", "seq_lengths")}])) for row in packed)
    assert packed.num_rows < 12 and together == pytest.approx(alone, rel=1e-9)
