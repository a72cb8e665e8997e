"""Distillation over ranks and lives: the same gradients on any backend, with another number of trained tokens on every rank, and a run that
was killed is, bit for bit, the one that was not."""

import json

import pytest
from conftest import harness
from lives import Run, check_same
from rig import die_at_call, die_in_phase, shared_rig
from safetensors.torch import load_file

RESIDENT = ["teacher.source=resident", "distill.divergence=jsd", "distill.temperature=2"]
RECIPE = """
task: distill
model: {{init: "embedded:tiny-llama"}}
teacher: {{name_or_path: "embedded:tiny-llama"}}
data: {{train: [{{path: "embedded:base-train", max_rows: 40}}], eval: [{{path: "embedded:base-eval", max_rows: 9}}], max_length: 256}}
train: {{max_steps: 1, global_batch_size: 16, per_device_train_batch_size: 4, logging_steps: 1, eval_steps: 1,
        optim: sgd, learning_rate: 1.0, lr_scheduler_type: constant, max_grad_norm: 0}}
checkpoint: {{auto: false}}
tracking: {{mode: disabled}}
output_dir: {run}
"""
WHOLLY_SHARDED = {
    "zero_optimization": {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    **dict.fromkeys(["train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"], "auto"),
}
"""By default ZeRO-3 leaves tensors of a tiny model whole on every rank."""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """recipe(name) -> the path of a recipe whose run folder has that name; their teacher is captured."""
    folder = tmp_path_factory.mktemp("distill")

    def write(name: str):
        file = folder / f"{name}.yaml"
        file.write_text(RECIPE.format(run=folder / name))
        return file

    done = harness("capture", write("captured"))
    assert done.code == 0, done.output
    return write


@pytest.fixture(scope="module")
def wholly_sharded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("backend")
    (folder / "ds.json").write_text(json.dumps(WHOLLY_SHARDED))
    file = folder / "zero3-whole.yaml"
    file.write_text(
        f"""
compute_environment: LOCAL_MACHINE
distributed_type: DEEPSPEED
deepspeed_config: {{deepspeed_config_file: {folder / "ds.json"}, zero3_init_flag: true, deepspeed_multinode_launcher: standard}}
"""
    )
    return str(file)


def step(file, *overrides, world=2, backend="ddp"):
    """(what one step of plain gradient descent at rate 1 has taken off the weights: their gradient, {key: value} of metrics.jsonl)"""
    run = file.with_suffix("")
    life = shared_rig().run(file, *overrides, world=world, backend=backend)
    assert list(life.codes.values()) == [0] * world, life.output(0)
    before, after = load_file(run / "init" / "model.safetensors"), load_file(run / "final" / "model.safetensors")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {name: before[name] - after[name] for name in before}, {key: value for line in lines for key, value in line.items()}


SOURCES = {"cache": [], "resident": RESIDENT}
COMPARED = ("train/loss", "distill/kl", "distill/cross_entropy", "distill/top1_agreement", "distill/overlap", "eval/loss", "eval/kl")


@pytest.fixture(scope="module")
def alone(recipe):
    return {name: step(recipe(f"{name}-single"), *SOURCES[name], world=1, backend="single") for name in SOURCES}


@pytest.mark.parametrize("backend", ["ddp", "zero2", "zero3"])
@pytest.mark.parametrize("source", SOURCES)
def test_gradients_over_two_ranks_are_those_of_one_process(recipe, wholly_sharded, alone, source, backend):
    """Each rank has another number of trained tokens, in each of its two micro-batches."""
    gradients, logged = step(recipe(f"{source}-{backend}"), *SOURCES[source], backend=wholly_sharded if backend == "zero3" else backend)
    expected, expected_logged = alone[source]
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        scale = expected[name].abs().max()
        assert scale > 0 and (gradient - expected[name]).abs().max() <= 1e-4 * scale + 1e-7, name
    assert {key: logged[key] for key in COMPARED} == pytest.approx({key: expected_logged[key] for key in COMPARED}, rel=1e-5, abs=1e-6)


# ---- lives

TAUGHT = ["task=distill", "teacher.name_or_path=embedded:tiny-llama", "distill.weight=0.5"]
VARIANTS = {
    "cache, an adapter": ("ddp", []),
    "cache, all weights": ("zero2", ["model.lora=null", "model.name_or_path=null", "model.init=embedded:tiny-llama"]),
    "cache, packed, read by workers": (
        "single",
        ["data.packing=true", "train.global_batch_size=2", "train.per_device_train_batch_size=1", "train.dataloader_num_workers=2"],
    ),
    "resident": ("zero3", ["model.lora=null", "model.name_or_path=null", "model.init=embedded:tiny-llama", *RESIDENT]),
    "resident, a 4-bit base": ("single", ["model.quantization.load_in_4bit=true", *RESIDENT]),
}
QUICK = {"cache, an adapter"}
BEGINS = [None, 5, 10]


@pytest.fixture(scope="module")
def captured(tmp_path_factory):
    """The targets of the rows that all lives here are of."""
    from lives import RECIPE as LIVES

    file = tmp_path_factory.mktemp("captured") / "job.yaml"
    file.write_text(LIVES)
    done = harness("capture", file, *TAUGHT)
    assert done.code == 0, done.output


@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in VARIANTS])
def test_a_killed_and_continued_run_is_bit_for_bit_the_one_that_was_not(tmp_path, captured, name):
    backend, overrides = VARIANTS[name]
    whole, cut = (Run(tmp_path / folder, *TAUGHT, *overrides, backend=backend) for folder in ("whole", "cut"))
    whole.live()
    cut.live(die_in_phase(0, "saving: manifest", 2), code=-9)
    # The 12th step of the run is the 7th of this life; one rank makes two micro-batches of each.
    step_12 = 7 if cut.world == 2 else 14
    cut.live(die_at_call(cut.world - 1, "harness.tasks.trainer:HarnessTrainer.training_step", step_12), code=-9)
    cut.live()
    assert [event["resumed_from"] for event in cut.events("life_began")] == BEGINS
    check_same(cut, whole, repeats=True)
    assert {key for _, key in whole.points()} >= {"distill/kl", "distill/top1_agreement", "eval/kl", "eval/top1_agreement"}
