"""A student that writes, over ranks and lives: the same gradients on any backend, with completions of another length on every rank, and a
run that was killed writes after its resume, bit for bit, what it would have written."""

import json
import shutil

import pytest
from lives import Run, check_same
from rig import die_at_call, die_in_phase, shared_rig
from safetensors.torch import load_file
from test_distill_lives import wholly_sharded  # noqa: F401

from harness.embedded import resolve

WRITES = ["distill.weight=1", "distill.on_policy.max_new_tokens=16"]
RECIPE = """
task: distill
model: {{name_or_path: "{base}"}}
teacher: {{name_or_path: "embedded:tiny-llama", source: resident}}
distill: {{divergence: jsd, temperature: 2.0, weight: 1.0, on_policy: {{max_new_tokens: 16, top_k: 1}}}}
data: {{train: [{{path: "embedded:base-train", max_rows: 40}}], max_length: 256}}
train: {{max_steps: 1, global_batch_size: 16, per_device_train_batch_size: 4, logging_steps: 1,
        optim: sgd, learning_rate: 1.0, lr_scheduler_type: constant, max_grad_norm: 0}}
checkpoint: {{auto: false}}
tracking: {{mode: disabled}}
output_dir: {run}
"""
COMPARED = ("train/loss", "distill/on_policy_kl", "distill/on_policy_overlap", "distill/completion_length", "distill/ended")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A student that is not the teacher, says another token each time, and ends its turn at one in sixteen."""
    import torch
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("base") / "student"
    shutil.copytree(resolve("embedded:tiny-llama"), folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(1)
    with torch.no_grad():
        for weights in model.parameters():
            weights += 2 * weights.std() * torch.randn_like(weights)
    model.generation_config.eos_token_id = list(range(0, model.config.vocab_size, 16))
    model.save_pretrained(folder)
    return folder


def step(folder, base, world, backend):
    """(what one step of plain gradient descent at rate 1 has taken off the weights: their gradient, what was logged). The most probable
    token each time, so that every number of ranks writes the same."""
    file, run = folder / "job.yaml", folder / "run"
    file.write_text(RECIPE.format(base=base, run=run))
    life = shared_rig().run(file, world=world, backend=backend)
    assert list(life.codes.values()) == [0] * world, life.output(0)
    before, after = load_file(base / "model.safetensors"), load_file(run / "final" / "model.safetensors")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {name: before[name] - after[name] for name in before}, {key: value for line in lines for key, value in line.items()}


@pytest.fixture(scope="module")
def alone(tmp_path_factory, base):
    return step(tmp_path_factory.mktemp("single"), base, 1, "single")


@pytest.mark.parametrize("backend", ["ddp", pytest.param("zero2", marks=pytest.mark.slow), pytest.param("zero3", marks=pytest.mark.slow)])
def test_gradients_of_what_two_ranks_write_are_those_of_one_process(tmp_path, base, wholly_sharded, alone, backend):  # noqa: F811
    gradients, logged = step(tmp_path, base, 2, wholly_sharded if backend == "zero3" else backend)
    expected, expected_logged = alone
    assert 2 < expected_logged["distill/completion_length"] < 15 and 0.1 < expected_logged["distill/ended"] < 1
    assert {key: logged[key] for key in COMPARED} == pytest.approx({key: expected_logged[key] for key in COMPARED}, rel=1e-5, abs=1e-6)
    for name, gradient in gradients.items():
        scale = expected[name].abs().max()
        assert scale > 0 and (gradient - expected[name]).abs().max() <= 1e-4 * scale + 1e-7, name


VARIANTS = {
    "an adapter, half of the data": ("ddp", ["distill.weight=0.5", "distill.on_policy.fraction=0.5"]),
    "all weights, its own words alone": ("zero3", ["model.lora=null", "model.name_or_path=null", "model.init=embedded:tiny-llama"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_a_killed_and_continued_run_writes_and_learns_bit_for_bit_as_the_one_that_was_not(tmp_path, name):
    backend, overrides = VARIANTS[name]
    taught = ["task=distill", "teacher.name_or_path=embedded:tiny-llama", "teacher.source=resident", *WRITES]
    whole, cut = (Run(tmp_path / folder, *taught, *overrides, backend=backend) for folder in ("whole", "cut"))
    whole.live()
    cut.live(die_in_phase(0, "saving: manifest", 2), code=-9)
    cut.live(die_at_call(1, "harness.tasks.on_policy:OnPolicyTrainer._let_write", 3), code=-9)
    cut.live()
    assert [event["resumed_from"] for event in cut.events("life_began")] == [None, 5, 5]
    written = [sample for samples in whole.samples[0].values() for row in samples for sample in row if sample.startswith("written")]
    assert len(written) > 10 and len(set(written)) > 0.9 * len(written)
    check_same(cut, whole, repeats=True)
