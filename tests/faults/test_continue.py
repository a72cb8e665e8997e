"""A run that goes on with other settings than it was begun with: what is taken up, what is recorded, and what is refused."""

import json
import shutil

import pytest
from lives import Run
from rig import die_in_phase

SHORT = ("train.max_steps=6", "train.warmup_steps=0", "checkpoint.every_steps=2")
BEST = (*SHORT, "train.metric_for_best_model=eval/loss", "train.eval_steps=2", "checkpoint.keep=1")


def test_a_run_that_has_ended_is_trained_further_when_its_steps_may_change_and_every_later_manifest_says_so(tmp_path):
    run = Run(tmp_path, *SHORT, backend="single")
    run.live()
    run.overrides = (*SHORT, "train.max_steps=9")
    life = run.live(allowed=["train.max_steps"])
    assert [record["step"] for record in life.records("steps", 0)] == [7, 8, 9]
    assert run.manifest(9)["allowed_changes"] == ["train.max_steps"]
    run.overrides = (*SHORT, "train.max_steps=10")
    run.live(allowed=["train.max_steps", "data"])
    assert run.manifest(10)["allowed_changes"] == ["data", "train.max_steps"]


def test_more_patience_trains_on_after_early_stopping_and_the_same_patience_does_not(tmp_path):
    overshot = (
        *("train.max_steps=40", "train.learning_rate=0.3", "train.lr_scheduler_type=constant", "train.warmup_steps=0"),
        *("train.eval_steps=1", "train.metric_for_best_model=eval/loss"),
    )
    run = Run(tmp_path, *overshot, "train.early_stopping_patience=1", backend="single")
    run.live()
    stopped_at = run.committed()[-1][0]
    assert stopped_at < 20 and run.committed()[-1][1] == "end"
    (run.path / "final").rename(tmp_path / "exported")
    assert run.live().records("steps", 0) == []  # nothing is left to train: it exports
    assert run.exported().keys() == {"adapter_model.safetensors"}
    run.overrides = (*overshot, "train.early_stopping_patience=4")
    life = run.live(allowed=["train.early_stopping_patience"])
    assert len(life.records("steps", 0)) >= 3
    # What was allowed once is the run's own from then on: its second end is an end again, and its best model still the best.
    best = json.loads((run.path / "final" / "harness.json").read_text())["step"]
    (run.path / "final").rename(tmp_path / "exported-again")
    assert run.live().records("steps", 0) == []
    assert json.loads((run.path / "final" / "harness.json").read_text())["step"] == best


# An evaluation is worse the later it is.
WORSE = """
def around(evaluate):
    def worse(trainer, *args, **kwargs):
        return evaluate(trainer, *args, **kwargs) | {"eval_loss": 99.0 + trainer.state.global_step}
    return worse
wrap("transformers:Trainer.evaluate", around)
"""
# The third and the fourth step are bad.
BAD = """
calls = 0
def around(local_verdict):
    def verdict(guard, gradient):
        global calls
        calls += 1
        found = local_verdict(guard, gradient)
        return (True, float("nan")) if calls in (3, 4) else found
    return verdict
wrap("harness.guard:Guard.local_verdict", around)
"""


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["ddp", "zero2", "zero3"])
def test_the_best_model_of_other_ranks_is_exported(backend, tmp_path):
    """Two ranks make the best model, one trains on from a later checkpoint to a worse one, and exports what the two made."""
    run = Run(tmp_path, *BEST, backend=backend)
    run.start(die_in_phase(0, "saving: staging", 3)).wait()
    best = max(step for step, _ in run.committed())
    weights = (run.path / f"checkpoint-{best}" / "adapter_model.safetensors").read_bytes()
    run.world = 1
    run.live(WORSE)
    assert json.loads((run.path / "final" / "harness.json").read_text())["step"] == best
    assert run.exported() == {"adapter_model.safetensors": weights}


def test_no_checkpoint_is_made_of_a_step_that_was_left_out(tmp_path):
    """So that a rollback finds one from before the bad steps, however few are kept."""
    run = Run(tmp_path, *SHORT, "checkpoint.every_steps=1", "checkpoint.keep=6", backend="single", inject=BAD)
    run.live()
    assert [event["step"] for event in run.events("skipped_step")] == [3, 4]
    assert [step for step, _ in run.committed()] == [1, 2, 5, 6]


SHOW_DECAY = """
def around(training_step):
    def shown(trainer, *args, **kwargs):
        keep("decay", {"decay": trainer.optimizer.param_groups[0]["weight_decay"]})
        return training_step(trainer, *args, **kwargs)
    return shown
wrap("harness.tasks.trainer:HarnessTrainer.training_step", around)
"""


@pytest.mark.parametrize("backend", ["single", pytest.param("zero2", marks=pytest.mark.slow)])
def test_a_changed_rate_and_decay_rule_from_the_next_step_on(backend, tmp_path):
    constant = (*SHORT, "train.lr_scheduler_type=constant")
    run = Run(tmp_path, *constant, backend=backend)
    run.live()
    run.overrides = (*constant, "train.max_steps=8", "train.learning_rate=1e-4", "train.weight_decay=0.25")
    life = run.live(SHOW_DECAY, allowed=["train.max_steps", "train.learning_rate", "train.weight_decay"])
    assert [{float.fromhex(rate) for rate in record["lr"]} for record in life.records("steps", 0)] == [{1e-4}] * 2
    assert {record["decay"] for record in life.records("decay", 0)} == {0.25}


def test_a_checkpoint_of_another_run_is_not_taken_for_ones_own(tmp_path):
    other = Run(tmp_path / "other", *SHORT, "train.seed=7", "train.max_steps=8", backend="single")
    other.live()
    run = Run(tmp_path / "own", *SHORT, backend="single")
    run.start(die_in_phase(0, "saving: staging", 3)).wait()
    shutil.copytree(other.path / "checkpoint-8", run.path / "checkpoint-8")
    run.live()
    assert [event["resumed_from"] for event in run.events("life_began")] == [None, 4]
    assert "is of another run" in run.events("quarantined")[0]["reason"]


def test_a_run_whose_first_steps_were_all_left_out_goes_on_although_its_optimiser_is_empty(tmp_path):
    run = Run(tmp_path, *SHORT, "guard.max_skips=1", backend="single", inject=BAD.replace("(3, 4)", "(1, 2)"))
    assert run.start().wait() == [75]
    run.inject = ""
    run.start(die_in_phase(0, "saving: staging", 2)).wait()
    assert run.committed() == [(2, "interval")] and not run.manifest(2)["has_moments"]
    run.live()
    assert run.committed()[-1] == (6, "end")
