"""A batch's targets are those of its trained tokens, wherever a row, a pack, padding or a data worker has put them."""

import pickle

import numpy as np
import pytest
import torch
from datasets import Dataset
from dense import capture

from harness.data.packing import pack
from harness.data.store import SAMPLE_FEATURES
from harness.errors import TeacherError
from harness.teacher.targets import BatchTargets, TargetsCollator, keys_in

VOCABULARY = 50


def rows_of(lengths, seed=0) -> Dataset:
    """Random rows, each with another part of it trained."""
    generator, rows = torch.Generator().manual_seed(seed), []
    for index, length in enumerate(lengths):
        ids = torch.randint(0, VOCABULARY, (length,), generator=generator)
        labels = torch.where(torch.rand(length, generator=generator) < (index + 1) / len(lengths), ids, -100)
        labels[0], labels[-1] = -100, ids[-1]
        row = {"input_ids": ids.tolist(), "labels": labels.tolist(), "length": length}
        rows.append({**row, "sample": str(index), "location": f"rows:{index}"})
    return Dataset.from_list(rows, features=SAMPLE_FEATURES)


def logits_of(ids) -> torch.Tensor:
    """A teacher that looks at the last two tokens: another distribution behind each of them, in any sample."""
    ids = torch.as_tensor(np.asarray(ids)).long()
    table = torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(1)) * 3
    return table[ids] + torch.cat([torch.zeros(1, VOCABULARY), table[ids[:-1]]]).roll(7, -1)


@pytest.fixture
def rows():
    return rows_of([9, 4, 30, 17, 6, 25])


@pytest.fixture
def cache(tmp_path, rows):
    return capture(tmp_path / "cache", [(row["input_ids"], row["labels"]) for row in rows], logits_of, VOCABULARY)


def collate(rows, *, flattens: bool, left: bool = False) -> dict:
    """As TRL's collator does it, with padding on the right, or on the left as well, or none in a flattened batch."""
    if flattens:
        ids, labels = (torch.tensor([[token for row in rows for token in row[name]]]) for name in ("input_ids", "labels"))
        return {"input_ids": ids, "labels": labels}
    longest = max(len(row["input_ids"]) for row in rows)
    padded = {"input_ids": [], "labels": []}
    for row in rows:
        for name, filler in (("input_ids", 0), ("labels", -100)):
            missing = [filler] * (longest - len(row[name]))
            padded[name].append([*missing, *row[name]] if left else [*row[name], *missing])
    return {name: torch.tensor(lists) for name, lists in padded.items()}


def check_targets(batch: dict, samples: list[dict]) -> None:
    """The n-th target is the distribution of the n-th trained token: computed again for each sample by itself, and looked up by place."""
    sparse, expected = batch["targets"].sparse, []
    gold = batch["labels"][:, 1:][batch["labels"][:, 1:] != -100]
    for sample in samples:
        labels = torch.tensor(sample["labels"][1:])
        expected.append(logits_of(sample["input_ids"])[:-1][labels != -100].log_softmax(-1))
    expected = torch.cat(expected)
    assert len(sparse.ids) == len(gold) == len(expected)
    kept = torch.arange(sparse.ids.shape[1]) < sparse.counts[:, None]
    assert torch.equal(sparse.ids[:, 0].long(), expected.argmax(-1))
    looked_up = expected.gather(1, sparse.ids.long())
    assert (looked_up - sparse.log_probs)[kept].abs().max() < 2e-3
    tail = (1 - torch.where(kept, looked_up.exp(), 0).sum(-1)).clamp(min=0)
    assert (sparse.log_tail.exp() - tail).abs().max() < 1e-3


@pytest.mark.parametrize("left", [False, True])
def test_padded_rows_have_the_targets_of_their_trained_tokens_row_by_row(cache, rows, left):
    chosen = [rows[index] for index in (2, 0, 5)]
    batch = TargetsCollator(lambda rows: collate(rows, flattens=False, left=left), cache)(chosen)
    check_targets(batch, chosen)


def test_a_pack_has_the_targets_of_its_samples_in_their_order(cache, rows):
    packs = pack(rows, capacity=40, seed=3)
    assert max(map(len, packs["seq_lengths"])) > 1
    by_digest = {row["sample"]: row for row in rows}
    batch = TargetsCollator(lambda rows: collate(rows, flattens=True), cache)(list(packs))
    check_targets(batch, [by_digest[sample] for row in packs for sample in row["samples"]])


def test_rows_that_only_fill_a_batch_have_no_targets(cache, rows):
    filler = {**rows[1], "labels": [-100] * rows[1]["length"]}
    together = TargetsCollator(lambda rows: collate(rows, flattens=False), cache)
    check_targets(together([filler, rows[3]]), [rows[3]])
    alone = together([filler])["targets"].sparse
    # The loss wants a width, even of no rows.
    assert alone.ids.shape == (0, 1) and alone.log_tail.shape == (0,)


def test_data_workers_give_the_same_batches(cache, rows):
    together = TargetsCollator(lambda rows: collate(rows, flattens=False), cache)
    loaders = [torch.utils.data.DataLoader(rows, 2, collate_fn=together, num_workers=workers) for workers in (0, 2)]
    for here, there in zip(*([batch["targets"].sparse for batch in loader] for loader in loaders), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(here, there, strict=True))
    assert pickle.loads(pickle.dumps(together._teacher)).read(next(keys_in(rows[0]))).ids.shape[1] > 0


def test_a_row_that_was_never_captured_is_an_error_in_the_batch_that_has_it(cache, rows):
    stranger = rows_of([12], seed=9)[0]
    with pytest.raises(TeacherError, match="1 of 2 samples have no targets"):
        TargetsCollator(lambda rows: collate(rows, flattens=False), cache)([rows[0], stranger])


def test_a_batch_in_which_other_tokens_are_trained_than_in_its_rows_is_refused(cache, rows):
    def forgets_the_last_token(rows):
        batch = collate(rows, flattens=False)
        batch["labels"][:, -1] = -100
        return batch

    with pytest.raises(TeacherError, match=r"has 2 positions for a batch of 1 trained tokens; .* `harness capture RECIPE`"):
        TargetsCollator(forgets_the_last_token, cache)([rows[0]])


def test_targets_travel_whole_through_what_casts_tensors(cache, rows):
    from accelerate.utils import send_to_device

    batch = TargetsCollator(lambda rows: collate(rows, flattens=False), cache)([rows[0]])
    sent = send_to_device(batch, torch.device("cpu"), non_blocking=True)["targets"]
    assert isinstance(sent, BatchTargets) and sent.sparse.log_probs.dtype == torch.float32
    # FSDP2 and DeepSpeed go through arguments as trees and cast every floating-point leaf: here there is none to be seen.
    leaves, _ = torch.utils._pytree.tree_flatten({"targets": sent})
    assert leaves == [sent]
