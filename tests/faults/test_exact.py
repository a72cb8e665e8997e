"""A run that was killed and continued is, bit for bit, the run that was not: on every rank after every step the weights, the optimiser, the
random numbers and the learning rate; every sample; every logged number; and what is exported.

Each run is 14 steps over epochs of 10, with dropout, a log line every 3 steps and an evaluation every 4, so that checkpoints fall between
log lines, into an epoch and on its end. Its first life is killed within its second save (so that the next begins inside an epoch), its
second two steps after a save that ends an epoch.
"""

import pytest
from conftest import metrics
from lives import Run, check_same
from rig import die_at_call, die_in_phase

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


def check_equal(tmp_path, *overrides, backend, inject="", begins=(None, 5, 10)):
    """begins: the checkpoint that each life of the cut run continues from. Returns the folder of the run that was not cut."""
    whole, cut = (Run(tmp_path / name, *overrides, backend=backend, inject=inject) for name in ("whole", "cut"))
    whole.live()
    cut.live(die_in_phase(0, "saving: manifest", 2), code=-9)
    # The 12th step of the run is the 7th of this life; one rank makes two micro-batches of each.
    step_12 = 7 if cut.world == 2 else 14
    cut.live(die_at_call(cut.world - 1, "harness.tasks.trainer:HarnessTrainer.training_step", step_12), code=-9)
    cut.live()
    assert [event["resumed_from"] for event in cut.events("life_began")] == [*begins]
    check_same(cut, whole, repeats=True)
    return whole.path


@pytest.mark.parametrize(("variant", "backend"), GRID)
def test_a_continued_run_is_bit_for_bit_the_one_that_was_not_interrupted(tmp_path, variant, backend):
    run = check_equal(tmp_path, *VARIANTS[variant], backend=backend)
    assert len(metrics(run, "eval/loss")) == 4 and len(metrics(run, "train/loss")) == 5


@pytest.mark.slow
@pytest.mark.parametrize("overrides", OTHERS.values(), ids=OTHERS.keys())
def test_so_it_is_with(tmp_path, overrides):
    check_equal(tmp_path, *overrides, backend="single")


@pytest.mark.slow
def test_so_it_is_with_batches_of_like_length_over_two_ranks(tmp_path):
    check_equal(tmp_path, backend="ddp", inject=BY_LENGTH)


@pytest.mark.slow
def test_so_it_is_with_a_best_model_and_the_patience_that_is_left(tmp_path):
    by_metric = ["train.metric_for_best_model=eval/loss", "train.early_stopping_patience=3", "train.eval_steps=2"]
    # Each evaluation is better than the one before: the second save is that of step 4.
    check_equal(tmp_path, *by_metric, backend="single", begins=(None, 2, 8))
