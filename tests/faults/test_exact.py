"""A run that was killed and continued is, bit for bit, the run that was not: on every rank after every step the weights, the optimiser, the
random numbers and the learning rate; every sample; every logged number; and what is exported.

Each run is 14 steps over epochs of 10, with dropout, a log line every 3 steps and an evaluation every 4, so that checkpoints fall between
log lines, into an epoch and on its end. Its first life is killed within its second save (so that the next begins inside an epoch), its
second two steps after a save that ends an epoch.
"""

import json
import re

import pytest
from conftest import metrics
from rig import die_at_call, die_in_phase, record_samples, record_steps, shared_rig

RECIPE = """
model: {name_or_path: "embedded:tiny-llama", lora: {r: 8, alpha: 16, dropout: 0.1}}
data: {train: [{path: "embedded:base-train", max_rows: 40}], eval: [{path: "embedded:base-eval", max_rows: 9}], max_length: 256}
train: {max_steps: 14, per_device_train_batch_size: 2, global_batch_size: 4, learning_rate: 1.0e-2, warmup_steps: 7, logging_steps: 3,
        eval_steps: 4}
checkpoint: {every_steps: 5}
tracking: {mode: disabled}
"""
VARIANTS = {"full": ["model.lora=null"], "lora": [], "qlora": ["model.quantization.load_in_4bit=true"]}
QUICK = [("lora", "ddp"), ("full", "zero2")]
BACKENDS = ["single", "ddp", "zero2", "zero3"]
GRID = [
    pytest.param(variant, backend, marks=[] if (variant, backend) in QUICK else pytest.mark.slow)
    for variant in VARIANTS
    for backend in BACKENDS
]
OTHERS = {
    "packed": ["data.packing=true", "train.global_batch_size=2", "train.per_device_train_batch_size=1", "train.max_steps=14"],
    "data workers": ["train.dataloader_num_workers=2"],
    "epochs": ["train.max_steps=null", "train.num_train_epochs=1.4", "train.eval_steps=null", "data.train.0.max_rows=38"],
    "another schedule, 8-bit moments": [
        "train.lr_scheduler_type=warmup_stable_decay",
        "train.lr_scheduler_kwargs.num_decay_steps=4",
        "train.optim=adamw_8bit",
    ],
}
BY_LENGTH = "import harness.tasks.job; harness.tasks.job.WORTH_GROUPING = -1\n"
TIMES = re.compile(r"speed/|memory/|run/|time$|replays$|.*_(per_s|runtime_s)$|.*/runtime_s$")


@pytest.fixture(scope="module")
def rig():
    return shared_rig()


@pytest.fixture
def lives(rig, tmp_path):
    """lives(name, deaths, *overrides) -> (run folder, per rank {step: record}, per rank [samples]); `deaths`: what kills each life but the
    last, which must end well."""
    recipe = tmp_path / "job.yaml"
    recipe.write_text(RECIPE)

    def live(name, deaths, *overrides, world, backend, inject=""):
        run, steps, samples = tmp_path / name, [{} for _ in range(world)], [{} for _ in range(world)]
        for death in [*deaths, ""]:
            recording = record_steps() + record_samples() + inject
            life = rig.run(recipe, f"output_dir={run}", *overrides, world=world, backend=backend, inject=recording + death)
            expected = dict.fromkeys(range(world), -9 if death else 0)
            assert life.codes == expected, life.output(0)
            for rank in range(world):
                # A step that is made again takes the place of the one that was lost.
                assert life.records("steps", rank=rank)
                steps[rank] |= {record["step"]: record for record in life.records("steps", rank=rank)}
                again = {}
                for record in life.records("samples", rank=rank):
                    again.setdefault(record["step"], []).append(record["samples"])
                samples[rank] |= again
        return run, steps, samples

    return live


def logged(run) -> dict[tuple[int, str], float]:
    """(step, key) -> value as metrics.jsonl has it last; times and memory left out."""
    found = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        line = json.loads(line)
        found |= {(line["step"], key): value for key, value in line.items() if not TIMES.match(key)}
    return found


def check_equal(lives, *overrides, world, backend, inject="", begins=(None, 5, 10)):
    """begins: the checkpoint that each life of the cut run continues from."""
    options = {"world": world, "backend": backend, "inject": inject}
    whole, steps, samples = lives("whole", [], *overrides, **options)
    deaths = [
        die_in_phase(0, "saving: manifest", 2),
        die_at_call(world - 1, "harness.tasks.trainer:HarnessTrainer.training_step", 7 if world == 2 else 14),
    ]
    cut, cut_steps, cut_samples = lives("cut", deaths, *overrides, **options)
    events = [json.loads(line) for line in (cut / "ledger.jsonl").read_text().splitlines()]
    assert [event["resumed_from"] for event in events if event["event"] == "life_began"] == [*begins]
    assert cut_steps == steps
    assert cut_samples == samples
    assert logged(cut) == logged(whole)
    for file in (whole / "final").glob("*.safetensors"):
        assert (cut / "final" / file.name).read_bytes() == file.read_bytes()
    return whole


@pytest.mark.parametrize(("variant", "backend"), GRID)
def test_a_continued_run_is_bit_for_bit_the_one_that_was_not_interrupted(lives, variant, backend):
    world = 1 if backend == "single" else 2
    run = check_equal(lives, *VARIANTS[variant], world=world, backend=backend)
    assert len(metrics(run, "eval/loss")) == 4 and len(metrics(run, "train/loss")) == 5


@pytest.mark.slow
@pytest.mark.parametrize("overrides", OTHERS.values(), ids=OTHERS.keys())
def test_so_it_is_with(lives, overrides):
    check_equal(lives, *overrides, world=1, backend="single")


@pytest.mark.slow
def test_so_it_is_with_batches_of_like_length_over_two_ranks(lives):
    check_equal(lives, world=2, backend="ddp", inject=BY_LENGTH)


@pytest.mark.slow
def test_so_it_is_with_a_best_model_and_the_patience_that_is_left(lives):
    by_metric = ["train.metric_for_best_model=eval/loss", "train.early_stopping_patience=3", "train.eval_steps=2"]
    # Each evaluation is better than the one before: the second save is that of step 4.
    check_equal(lives, *by_metric, world=1, backend="single", begins=(None, 2, 8))
