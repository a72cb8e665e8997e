"""A reward model's run that is killed and continued comes out as the one that was not; and two ranks do what one process does."""

import json

import pytest
from lives import Run, check_same
from rig import die_at_call, die_in_phase

PAIRS = ["task=reward", "data.train.0.path=embedded:pairs-train", "data.eval.0.path=embedded:pairs-eval"]
WHOLE = ["model.lora=null", "model.name_or_path=null", "model.init=embedded:tiny-llama"]
VARIANTS = {
    "an adapter": ("ddp", []),
    "all weights": ("zero3", WHOLE),
    "a 4-bit base": ("zero3", ["model.quantization.load_in_4bit=true"]),
    "all weights, centred, the best kept": (
        "zero2",
        [*WHOLE, "reward.center_rewards_coefficient=0.01", "train.metric_for_best_model=eval/accuracy"],
    ),
}
QUICK = {"an adapter"}


@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in VARIANTS])
def test_a_killed_and_continued_run_is_bit_for_bit_the_one_that_was_not(tmp_path, name):
    backend, overrides = VARIANTS[name]
    whole, cut = (Run(tmp_path / folder, *PAIRS, *overrides, backend=backend) for folder in ("whole", "cut"))
    whole.live()
    cut.live(die_in_phase(0, "saving: manifest", 2), code=-9)
    cut.live(die_at_call(1, "harness.tasks.trainer:HarnessTrainer.training_step", 4), code=-9)
    cut.live()
    assert cut.events("life_began")[-1]["resumed_from"] >= 5
    check_same(cut, whole, repeats=True)
    keys = {key for _, key in whole.points()}
    assert keys >= {"train/accuracy", "train/margin", "eval/accuracy", "eval/log_loss", "eval/calibration_error", "eval/chosen_reward_std"}
    assert json.loads((whole.path / "final" / "harness.json").read_text())["task"] == "reward"


COMPARED = (
    "train/loss",
    "train/accuracy",
    "train/margin",
    "train/rejected_reward_std",
    "eval/loss",
    "eval/accuracy",
    "eval/calibration_error",
)


@pytest.mark.parametrize("backend", ["ddp", pytest.param("zero3", marks=pytest.mark.slow)])
def test_two_ranks_with_uneven_filling_log_what_one_process_does(tmp_path, backend):
    """Five pairs are a global batch of four and one of which three quarters are filling; nine held-out pairs fill three batches of four."""
    few = [
        "data.train.0.max_rows=5",
        "train.max_steps=2",
        "train.logging_steps=1",
        "train.eval_steps=2",
        "train.warmup_steps=0",
        "model.lora.dropout=0",
    ]
    two, one = (Run(tmp_path / name, *PAIRS, *few, backend=name) for name in (backend, "single"))
    one.live()
    two.live()
    points, expected = two.points(), one.points()
    assert {at: value for at, value in points.items() if at[1] in COMPARED} == pytest.approx(
        {at: value for at, value in expected.items() if at[1] in COMPARED}, rel=1e-4, abs=1e-5
    )
    assert {(step, key) for step, key in points if key in COMPARED} >= {(1, "train/accuracy"), (2, "train/accuracy"), (2, "eval/accuracy")}
