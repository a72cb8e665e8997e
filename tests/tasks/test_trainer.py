"""The seams of our trainers in one process: the held-out loss, rows that fill batches, and what is checked when."""

import json

import pytest
import torch
from datasets import Dataset

from harness.checkpoint.cadence import Cadence
from harness.checkpoint.door import Door, Signals
from harness.data.order import EpochOrder
from harness.data.store import SAMPLE_FEATURES
from harness.embedded import resolve
from harness.guard import Guard
from harness.recipe import load
from harness.recipe.backend import load_backend
from harness.recipe.schema import Checkpoint
from harness.run import RankReport
from harness.tasks import sft
from harness.tasks.arguments import eval_strategy, training_arguments
from harness.tasks.lives import Lives
from harness.tasks.trainer import pad_for_ranks
from harness.tracking.throughput import Throughput

VOCABULARY = 200


def rows_of(lengths, seed=0) -> Dataset:
    """Random rows of these lengths in which a random part is trained; uneven on purpose."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for index, length in enumerate(lengths):
        ids = torch.randint(4, VOCABULARY, (length,), generator=generator)
        trained = torch.rand(length, generator=generator) < (index + 1) / len(lengths)
        trained[-1] = True
        labels = torch.where(trained, ids, -100)
        rows.append(
            {"input_ids": ids.tolist(), "labels": labels.tolist(), "length": length, "sample": str(index), "location": f"rows:{index}"}
        )
    return Dataset.from_list(rows, features=SAMPLE_FEATURES)


def plain_loss(model, rows) -> float:
    """The mean negative log-likelihood over every trained token of every row, one row at a time, from plain logits in float64."""
    total, tokens = 0.0, 0
    for row in rows:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"][1:])
        with torch.no_grad():
            logs = model(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
        chosen = labels != -100
        total -= logs[chosen, labels[chosen]].sum().item()
        tokens += int(chosen.sum())
    return total / tokens


@pytest.fixture
def recipe_file(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(
        """
model: {name_or_path: "embedded:tiny-llama"}
data: {train: rows.jsonl, eval: held-out.jsonl}
train: {per_device_train_batch_size: 4, max_steps: 1, logging_steps: 1, eval_steps: 1, learning_rate: 1e-3}
"""
    )
    return str(file)


@pytest.fixture
def build(recipe_file, tmp_path):
    """build(train rows, held-out rows, *overrides) -> (trainer, model)"""

    def build(train, held_out, *overrides, flattens=False):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        recipe, folder = load(recipe_file, overrides), resolve("embedded:tiny-llama")
        arguments = training_arguments(recipe, load_backend("single"), tmp_path / "run", 1, has_gpu=False, bf16_hardware=False)
        args = sft.build_arguments(recipe, arguments, flattens=flattens)
        model = AutoModelForCausalLM.from_pretrained(folder)
        trainer = sft.build_trainer(args, model, AutoTokenizer.from_pretrained(folder), train, held_out, [])
        trainer.configure(throughput=Throughput(), isolates=flattens)
        rows_of_a_step = args.per_device_train_batch_size * args.gradient_accumulation_steps
        trainer.live(
            Lives(
                committer=None,
                cadence=Cadence(Checkpoint(auto=False), 1, now=0),
                door=Door(Signals(), None),
                guard=Guard(recipe.guard, fp16=False),
                order=EpochOrder(len(train), rows_of_a_step, args.seed),
                report=RankReport(0),
                facts={},
                tracking=None,
            )
        )
        return trainer, model

    return build


# ---- the held-out loss


def test_the_held_out_loss_is_the_mean_over_tokens_whatever_the_batches(build):
    rows = rows_of([5, 40, 9, 33, 12, 3, 60, 21, 8, 17, 4])
    # As two ranks of batch 4 would need it: of four batches the last is filler alone.
    padded = pad_for_ranks(rows, 16)
    assert len(padded) == 16
    trainer, model = build(rows, padded)
    measured = trainer.evaluate()
    assert measured["eval_loss"] == pytest.approx(plain_loss(model, rows), rel=1e-5)
    # A mean of batch means would be another number: the masks are uneven.
    batches = [plain_loss(model, rows.select(range(start, min(start + 4, 11)))) for start in (0, 4, 8)]
    assert abs(sum(batches) / 3 - measured["eval_loss"]) > 1e-3


def test_rows_that_fill_up_count_nothing_and_are_the_shortest():
    rows = rows_of([9, 4, 30])
    padded = pad_for_ranks(rows, 8)
    assert padded.features == rows.features
    assert padded["length"] == [9, 4, 30, *[4] * 5]
    assert all(set(labels) == {-100} for labels in padded["labels"][3:])
    assert padded.select(range(3)).to_list() == rows.to_list()
    assert pad_for_ranks(padded, 8) is padded


def test_a_flattened_batch_trains_on_the_loss_of_its_rows_alone(build):
    rows = rows_of([5, 40, 9, 33])
    trainer, model = build(rows, rows, flattens=True)
    before = plain_loss(model, rows)
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    # The trainer rounds what it logs to float32 sums; the first token of a sample has no label in either.
    assert losses[0] == pytest.approx(before, rel=1e-4)


def test_gradients_are_checked_once_after_the_last_micro_batch_of_the_first_step(build, monkeypatch):
    # FSDP2 shows no `.grad` before that one.
    trainer, _ = build(
        rows_of([5, 40, 9, 33] * 6),
        None,
        "train.eval_steps=null",
        "data.eval=[]",
        "train.gradient_accumulation_steps=3",
        "train.max_steps=2",
    )
    seen = []
    monkeypatch.setattr(trainer._throughput, "count", lambda inputs: seen.append("micro-batch"))
    monkeypatch.setattr("harness.tasks.trainer.check_gradients", lambda model, **_: seen.append("check"))
    trainer.train()
    assert seen == ["micro-batch"] * 3 + ["check"] + ["micro-batch"] * 3


# ---- which evaluation


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], "steps"),
        (["train.eval_steps=null"], "epoch"),
        (["train.eval_steps=null", "data.eval=[]"], "no"),
        (["train.eval_steps=null", "train.eval_strategy=no"], "no"),
    ],
)
def test_held_out_rows_are_evaluated_every_epoch_unless_the_recipe_says_otherwise(recipe_file, tmp_path, overrides, expected):
    recipe = load(recipe_file, overrides)
    assert eval_strategy(recipe) == expected
    arguments = training_arguments(recipe, load_backend("single"), tmp_path, 1, has_gpu=False, bf16_hardware=False)
    assert arguments["eval_strategy"] == expected


def test_what_is_saved_holds_no_pickle(build, tmp_path):
    trainer, _ = build(rows_of([5, 9, 7, 8]), None, "train.eval_steps=null", "data.eval=[]")
    trainer.save_model(str(tmp_path / "saved"))
    names = {path.name for path in (tmp_path / "saved").iterdir()}
    assert "model.safetensors" in names and not [name for name in names if name.endswith((".bin", ".pt", ".pkl"))]
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["model_type"] == "llama"


def test_rows_of_like_length_are_grouped_only_where_random_batches_are_mostly_padding():
    from harness.tasks.job import WORTH_GROUPING
    from harness.tasks.trainer import padding_share

    assert padding_share([100] * 64, 8) == 0
    # By hand: one batch of 10 and 30 is padded to 60 tokens, of which 40 are real.
    assert padding_share([10, 30], 2) == pytest.approx(1 / 3)
    alike, mixed = [95 + i % 20 for i in range(640)], [30 + 2000 * (i % 10 == 0) for i in range(640)]
    assert padding_share(alike, 64) < WORTH_GROUPING < padding_share(mixed, 64)
