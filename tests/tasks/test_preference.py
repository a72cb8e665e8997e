"""What surrounds the losses of preference: which model is compared, and what its reference's cache survives."""

import shutil
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM

from harness.errors import DataError, ModelError
from harness.tasks import reference
from harness.tasks.answer_batches import Answer, Apart, model_inputs
from harness.tasks.kto import AnswerCollator
from harness.tasks.lessons import add_lessons
from harness.tasks.preference import PreferenceTrainer, switch_dropout_off
from harness.tasks.reference import Reference

SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
IDS = torch.arange(3, 15)[None]
BATCH = {"input_ids": IDS, "labels": IDS, "answers": 1, "owner": torch.zeros_like(IDS)}


def small(**more) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, **SMALL, **more))


def test_a_reference_pass_leaves_checkpointing_as_it_was_and_no_hook_behind():
    """transformers' own switch adds a hook to the embedding in every micro-batch, so that a long run grows slower."""
    model = small().train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    add_lessons(model)
    flags = [module.gradient_checkpointing for module in model.modules() if hasattr(module, "gradient_checkpointing")]
    hooks = len(model.get_input_embeddings()._forward_hooks)
    within = []

    def instead_of(_):
        within.extend(module.gradient_checkpointing for module in model.modules() if hasattr(module, "gradient_checkpointing"))
        return nullcontext()

    itself = SimpleNamespace(
        model=model,
        args=SimpleNamespace(gradient_checkpointing_kwargs={"use_reentrant": False}),
        accelerator=SimpleNamespace(unwrap_model=lambda model: model),
        policy_log_probs=lambda model, inputs: PreferenceTrainer.policy_log_probs(None, model, inputs),
        _reference=Reference("", instead_of=instead_of),
    )
    for _ in range(3):
        assert not PreferenceTrainer.reference_log_probs(itself, model, BATCH).requires_grad
    assert any(flags) and not any(within)
    assert [module.gradient_checkpointing for module in model.modules() if hasattr(module, "gradient_checkpointing")] == flags
    assert len(model.get_input_embeddings()._forward_hooks) == hooks


def test_nor_does_a_student_that_writes():
    from accelerate import Accelerator
    from transformers import GenerationConfig

    from harness.tasks.on_policy import Plain

    model = small().train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    hooks = len(model.get_input_embeddings()._forward_hooks)
    args = SimpleNamespace(gradient_checkpointing_kwargs={"use_reentrant": False}, device=torch.device("cpu"))
    trainer = SimpleNamespace(model=model, model_wrapped=model, accelerator=Accelerator(cpu=True), args=args)
    config = GenerationConfig(max_new_tokens=3, pad_token_id=0, eos_token_id=[2])
    for _ in range(2):
        [[said, _]] = Plain(trainer, config).write([[[5, 6], [7]]])
    assert 0 < len(said) <= 3 and model.is_gradient_checkpointing
    assert len(model.get_input_embeddings()._forward_hooks) == hooks


def test_dropout_that_is_a_number_of_a_layer_is_off_too():
    model = small(attention_dropout=0.5).train()
    model.lora_dropout = torch.nn.Dropout(0.5)

    def differs() -> bool:
        with torch.no_grad():
            return not torch.equal(model(input_ids=IDS).logits, model(input_ids=IDS).logits)

    assert differs()
    switch_dropout_off(model)
    assert model.training and not differs() and model.lora_dropout.p == 0


def test_a_mixture_of_experts_is_refused_as_its_router_would_go_untrained():
    with pytest.raises(ModelError, match="router_aux_loss_coef: 0"):
        PreferenceTrainer.compare(SimpleNamespace(aux_loss_enabled=True), Reference(""), 0.1)


def test_a_model_is_given_nothing_of_a_batch_that_is_not_its_own():
    """Many take whatever they get, and hand it to their attention; others raise."""

    def pad(rows: list[dict]) -> dict:
        return {key: torch.tensor([row[key] for row in rows]) for key in rows[0]}

    rows = [{"input_ids": [1, 2, 3], "labels": [-100, 2, 3], "label": label} for label in (True, False)]
    partners = SimpleNamespace(of=lambda row: Answer([1, 4, 5], [-100, 4, 5]))
    batch = AnswerCollator(Apart(pad), partners)(rows)
    assert "others" in batch and "good" in batch
    assert model_inputs({**batch, "divergence": 0.5, "reference": torch.zeros(4)}).keys() == {"input_ids", "labels"}


def test_a_smoke_test_takes_the_pairs_that_are_longest_together():
    """Not those with the longest side: both are in memory at once."""
    from harness.recipe import load
    from harness.tasks.smoke import smoke_test

    lengths = [(9, 1), (6, 6), (2, 8), (7, 4), (1, 1)]
    sides = {f"{side}_input_ids": [[1] * pair[at] for pair in lengths] for at, side in enumerate(("chosen", "rejected"))}
    rows = Dataset.from_dict({**sides, "length": [max(pair) for pair in lengths]}).select([4, 3, 2, 1, 0])
    _, longest, _ = smoke_test(load("tiny/dpo-full", ["train.per_device_train_batch_size=1", "train.global_batch_size=1"]), rows, 1)
    assert [len(row["chosen_input_ids"]) for row in longest] == [6, 7]


# ---- the cache of a reference


LABELS = [[-100] * (1 + row % 2) + [7] * (1 + row % 3) for row in range(22)]
ROWS = Dataset.from_dict({"labels": LABELS, "length": [len(labels) for labels in LABELS]})
COLUMNS = {"reference": "labels"}


@pytest.fixture
def compute(tmp_path, monkeypatch):
    """compute(rows of a batch, parts after which it is killed) of a model that says a row's number of each of its tokens."""
    monkeypatch.setattr(reference, "BATCHES_PER_PART", 2)

    def say_number(stage, model, rows, batch, answers_of, collate):
        counts = np.array([sum(label != -100 for label in LABELS[row][1:]) for row in batch])
        return counts, np.repeat(np.array(batch, np.float32), counts)

    monkeypatch.setattr(reference, "_batch", say_number)

    def compute(size: int, dies_after: int | None = None) -> Path:
        train = SimpleNamespace(per_device_eval_batch_size=size, per_device_train_batch_size=1)
        stage, written = SimpleNamespace(recipe=SimpleNamespace(train=train)), []
        write_part = reference._write_part

        def mortal(*arguments):
            if len(written) == dies_after:
                raise KeyboardInterrupt
            written.append(arguments)
            write_part(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(reference, "_write_part", mortal)
            reference._compute(stage, None, ROWS, tmp_path / "it", COLUMNS, None, None)
        return tmp_path / "it"

    return compute


@pytest.mark.parametrize(("before", "after"), [(2, 2), (2, 5), (5, 2)])
def test_a_pass_that_was_killed_goes_on_with_batches_of_another_size(compute, tmp_path, before, after):
    """As after an out of memory: parts of other batches are other rows."""
    with pytest.raises(KeyboardInterrupt):
        compute(before, dies_after=2)
    found = Dataset.from_file(str(compute(after) / reference.FILE))
    assert found["reference"][:] == [[float(row)] * len([label for label in labels if label != -100]) for row, labels in enumerate(LABELS)]


@pytest.mark.parametrize("when", ["before it puts them together", "while it does"])
def test_of_a_pass_that_another_run_has_finished_meanwhile_that_one_is_taken(compute, tmp_path, monkeypatch, when):
    """It takes the parts away."""
    whole = (compute(2) / reference.FILE).read_bytes()
    hidden, assemble = tmp_path / "hidden", reference._assemble
    (tmp_path / "it").rename(hidden)

    def late(scratch, folder, *more):
        def gone(file):
            hidden.rename(folder)
            shutil.rmtree(scratch)
            raise FileNotFoundError(2, "No such file", str(file))

        if when == "while it does":
            monkeypatch.setattr(reference.np, "load", gone)
        else:
            hidden.rename(folder)
        assemble(scratch, folder, *more)
        assert not scratch.exists()

    monkeypatch.setattr(reference, "_assemble", late)
    assert (compute(2) / reference.FILE).read_bytes() == whole


def test_parts_on_a_disk_that_this_machine_does_not_see_are_named(tmp_path):
    with pytest.raises(DataError, match=r"000000.npz: a rank has written it, and it is not here; let data.cache_dir"):
        reference._assemble(tmp_path / "nowhere", tmp_path / "it", ROWS, COLUMNS, 1)


def test_a_model_of_the_hub_is_the_same_before_its_weights_are_here(tmp_path, monkeypatch):
    """They come when it is loaded: the digest of the files in the local copy would be another one at the next start."""
    import transformers.utils

    snapshot = tmp_path / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    monkeypatch.setattr(transformers.utils, "cached_file", lambda name, file, revision: str(snapshot / file))
    stage = SimpleNamespace(source="org/model", recipe=SimpleNamespace(model=SimpleNamespace(revision=None)))
    before = reference._weights(stage)
    (snapshot / "model.safetensors").write_bytes(b"weights")
    assert reference._weights(stage) == before == "org/model@0123abcd"


def test_of_a_reference_that_is_let_go_neither_weights_nor_shares_of_them_stay():
    model = torch.nn.Linear(3, 3)
    model.weight.ds_tensor = torch.ones(9)
    reference._let_go(SimpleNamespace(model=model, _asked=model))
    assert [part.numel() for part in (model.weight, model.bias, model.weight.ds_tensor)] == [0, 0, 0]
