"""Steps that are not sound, in real trainings: a rank whose forward brings NaN, or a loss far above the others. What is left out leaves no
trace, what is gone back over is not met again, and what happened is told.

The job is that of lives.py: 14 steps of 4 rows over epochs of 10. The fault is as if in the data: in every life at the same steps.
"""

import itertools
import json
import math

import pytest
from conftest import harness, metrics
from lives import RECIPE, Run, at_step, said

HEARD = """
poisoned = {"now": False}
def around(training_step):
    def stepping(trainer, model, inputs, *args, **kwargs):
        step = trainer.state.global_step + 1
        poisoned["now"] = step in STEPS and RANK == BAD_RANK
        try:
            loss = training_step(trainer, model, inputs, *args, **kwargs)
        finally:
            poisoned["now"] = False
        keep("losses", {"step": step, "loss": loss.item()})
        return loss
    return stepping
wrap("harness.tasks.trainer:HarnessTrainer.training_step", around)
"""
NAN = """
def around(forward):
    def forwarding(*args, **kwargs):
        outputs = forward(*args, **kwargs)
        if poisoned["now"]:
            outputs.last_hidden_state = outputs.last_hidden_state * float("nan")
        return outputs
    return forwarding
wrap("transformers.models.llama.modeling_llama:LlamaModel.forward", around)
"""
SPIKE = """
def around(compute_loss):
    def computing(*args, **kwargs):
        loss = compute_loss(*args, **kwargs)
        return loss * 50 if poisoned["now"] else loss
    return computing
wrap("trl:SFTTrainer.compute_loss", around)
"""


def fault(kind: str, *steps: int, rank: int = 1) -> str:
    """At these steps this rank's forward (NAN) or loss (SPIKE) is bad, and every rank records each micro-batch's loss."""
    return f"STEPS, BAD_RANK = {steps}, {rank}\n{HEARD}{kind}"


NO_DROPOUT = "model.lora.dropout=0"
"""A step that is skipped has drawn its random numbers and one that is passed over has not; without them the two must be the same."""


@pytest.fixture
def run_of(tmp_path):
    numbers = itertools.count()

    def make(*overrides, backend="ddp", inject=""):
        model = NO_DROPOUT if backend == "ddp" else "model.lora=null"
        return Run(tmp_path / f"{next(numbers)}", model, *overrides, backend=backend, inject=inject)

    return make


def rate(step: int) -> float:
    """The learning rate after a step: seven steps up, then a cosine to the end."""
    return 0.01 * (step / 7 if step < 7 else (1 + math.cos(math.pi * (step - 7) / 7)) / 2)


def rows_of(run: Run, *steps: int) -> set[str]:
    """The places of these steps' rows, as recorded by the ranks that trained on them."""
    from harness.data.store import load_prepared

    prepared = json.loads(next(run.path.glob("logs/attempt-1/prepared-0.json")).read_text())["folder"]
    places = {row["sample"]: row["location"] for row in load_prepared(prepared).train}
    seen = [run.samples[rank][step] for step in steps for rank in range(run.world)]
    return {places[name] for micro in seen for batch in micro for name in batch}


def named_in(message: str) -> set[str]:
    return set(message.split("Rows of these steps: ")[1].split(". Look")[0].split(", "))


def loss_of(life, run: Run, step: int) -> float:
    losses = [record["loss"] for rank in range(run.world) for record in life.records("losses", rank) if record["step"] == step]
    return sum(losses) / run.world


# ---- a step that is skipped


@pytest.mark.parametrize("backend", ["ddp", "zero2", pytest.param("zero3", marks=pytest.mark.slow)])
def test_a_step_that_is_not_a_number_on_one_rank_is_left_out_on_all_and_leaves_no_trace(backend, run_of):
    run = run_of(backend=backend, inject=fault(NAN, 8))
    life = run.live()
    for rank in (0, 1):
        steps = run.steps[rank]
        assert steps[8]["weights"] == steps[7]["weights"] and steps[8]["optimizer"] == steps[7]["optimizer"]
        assert steps[9]["weights"] != steps[8]["weights"] and steps[7]["weights"] != steps[6]["weights"]
        # The schedule goes on, as in a run without the fault.
        assert [float.fromhex(steps[step]["lr"][0]) for step in sorted(steps)] == pytest.approx([rate(step) for step in range(1, 15)])
    (skipped,) = run.events("skipped_step")
    assert skipped["step"] == 8 and skipped["why"] == "its loss is nan"
    assert set(skipped["rows"].split(", ")) == rows_of(run, 8) and len(rows_of(run, 8)) == 4
    assert f"step 8 is passed over: its loss is nan; rows: {skipped['rows']}" in life.output(0)
    logged = run.points()
    # The line of steps 7 to 9 is about 7 and 9.
    assert logged[9, "train/loss"] == pytest.approx((loss_of(life, run, 7) + loss_of(life, run, 9)) / 2, rel=1e-6)
    assert all(math.isfinite(value) for (_, key), value in logged.items() if "train/" in key or "eval/" in key)
    assert math.isnan(loss_of(life, run, 8)) and metrics(run.path, "run/skipped_step") == {8: 1}
    assert run.committed()[-1] == (14, "end")


@pytest.mark.parametrize(
    "bad", [[7], pytest.param([7, 8], marks=pytest.mark.slow), [4, 5, 6]], ids=["the first of a line", "the first two", "all of a line"]
)
def test_the_loss_that_is_logged_is_the_mean_of_the_steps_that_were_made(bad, run_of):
    run = run_of(inject=fault(NAN, *bad))
    life = run.live()
    logged, entropy = (metrics(run.path, key) for key in ("train/loss", "train/entropy"))
    assert sorted(logged) == [1, 3, 6, 9, 12]
    for before, last in itertools.pairwise([0, *sorted(logged)]):
        made = [step for step in range(before + 1, last + 1) if step not in bad]
        losses = [loss_of(life, run, step) for step in made]
        assert logged[last] == (pytest.approx(sum(losses) / len(made), rel=1e-6) if made else None)
        assert math.isfinite(entropy[last]) if made else last not in entropy


@pytest.mark.slow
def test_a_line_whose_bad_step_came_before_a_stop_is_the_same_after_it(run_of):
    whole, cut = run_of(inject=fault(NAN, 7)), run_of(inject=fault(NAN, 7))
    whole.live()
    cut.live(at_step(8, "os.kill(os.getpid(), signal.SIGUSR1)"), code=75)
    cut.live()
    assert metrics(cut.path, "train/loss") == metrics(whole.path, "train/loss")
    assert metrics(cut.path, "train/entropy") == metrics(whole.path, "train/entropy") and cut.steps == whole.steps


# ---- back to the last checkpoint


@pytest.mark.parametrize("backend", ["ddp", *(pytest.param(name, marks=pytest.mark.slow) for name in ("zero2", "zero3"))])
def test_a_row_of_bad_steps_takes_the_run_back_and_their_data_is_not_met_again(backend, run_of):
    run = run_of("guard.max_skips=1", backend=backend, inject=fault(NAN, 7, 8))
    first = run.live(code=75)
    (back,) = run.events("rolled_back")
    assert (back["step"], back["to_step"], back["passes_over"], back["why"]) == (8, 5, [6, 8], "its loss is nan")
    assert set(back["rows"].split(", ")) == rows_of(run, 7, 8) and len(rows_of(run, 7, 8)) == 8
    outcome = run.outcome(1)
    assert (outcome["outcome"], outcome["checkpoint"]) == ("rolled_back", 5)
    assert "back to checkpoint-5, and the data of steps 6 to 8 is passed over" in outcome["reason"]
    assert said(first) == outcome["reason"] and metrics(run.path, "run/rolled_back") == {8: 1}

    second = run.live()
    for rank in (0, 1):
        trained = [record["step"] for record in second.records("samples", rank)]
        assert sorted(set(trained)) == [9, 10, 11, 12, 13, 14]
        assert [record["step"] for record in second.records("steps", rank)] == list(range(6, 15))
    assert [event["event"] for event in run.events("rolled_back", "skipped_step", "replay_differs")] == ["skipped_step", "rolled_back"]
    assert run.events()[-1]["event"] == "finished" and run.exported()

    # A second way to the same weights: the three steps, skipped one by one.
    skipped = run_of("guard.max_skips=3", backend=backend, inject=fault(NAN, 6, 7, 8))
    skipped.live()
    for mine, other in zip(run.steps, skipped.steps, strict=True):
        for step in range(5, 15):
            assert [mine[step][key] for key in ("weights", "optimizer", "lr")] == [
                other[step][key] for key in ("weights", "optimizer", "lr")
            ]
    assert run.exported() == skipped.exported()


@pytest.mark.parametrize("backend", ["ddp", pytest.param("zero2", marks=pytest.mark.slow)])
def test_without_a_checkpoint_it_goes_back_to_the_beginning(backend, run_of):
    run = run_of("guard.max_skips=1", backend=backend, inject=fault(NAN, 2, 3))
    run.live(code=75)
    (back,) = run.events("rolled_back")
    assert (back["to_step"], back["passes_over"]) == (0, [1, 3]) and run.outcome(1)["checkpoint"] is None
    life = run.live()
    assert min(record["step"] for record in life.records("samples", 0)) == 4
    assert run.events("life_began")[-1]["resumed_from"] is None and run.exported()


@pytest.mark.slow
def test_without_skips_the_first_bad_step_takes_the_run_back(run_of):
    run = run_of("guard.max_skips=0", inject=fault(NAN, 7))
    run.live(code=75)
    run.live()
    assert [event["passes_over"] for event in run.events("rolled_back")] == [[6, 7]] and not run.events("skipped_step")


def test_after_the_last_rollback_the_run_fails_and_names_the_rows_and_the_remedy(run_of):
    run = run_of("guard.max_skips=1", inject=fault(NAN, 7, 8, 11, 12))
    run.live(code=75)
    life = run.live(code=1)
    error = json.loads((life.attempt / "errors" / "rank-0.json").read_text())
    assert error["type"] == "ModelError" and error["message"].startswith("step 12: its loss is nan, as in each step from 11 on")
    assert named_in(error["message"]) == rows_of(run, 11, 12)
    assert "lower train.learning_rate" in error["message"] and "guard.max_rollbacks" in error["message"]
    assert len(run.events("rolled_back")) == 1 and not run.exported()
    # None of the bad steps is in what was saved.
    assert run.committed()[-1][0] == 10 and not (life.attempt / "outcome.json").exists()


@pytest.mark.slow
def test_without_rollbacks_it_fails_at_once_and_a_row_may_go_over_the_end_of_an_epoch(run_of):
    run = run_of("guard.max_skips=1", "guard.max_rollbacks=0", inject=fault(NAN, 10, 11))
    life = run.live(code=1)
    message = json.loads((life.attempt / "errors" / "rank-1.json").read_text())["message"]
    assert named_in(message) == rows_of(run, 10, 11) and len(rows_of(run, 10, 11)) == 8
    assert not run.events("rolled_back")


# ---- a spike


def test_a_spike_is_skipped_once_enough_good_losses_are_known_in_whatever_life(run_of):
    run = run_of("guard.spike_factor=5", "train.max_steps=20", inject=fault(SPIKE, 10, 18))
    run.live(at_step(14, "os.kill(os.getpid(), signal.SIGUSR1)"), code=75)
    life = run.live()
    (skipped,) = run.events("skipped_step")
    assert skipped["step"] == 18 and "more than 5 times" in skipped["why"] and "the median of the last 17" in skipped["why"]
    assert run.steps[0][18]["weights"] == run.steps[0][17]["weights"]
    assert loss_of(life, run, 18) > 5 * loss_of(life, run, 17)


@pytest.mark.slow
def test_without_a_factor_a_spike_is_a_step_like_any_other(run_of):
    run = run_of("train.max_steps=20", inject=fault(SPIKE, 18))
    run.live()
    assert not run.events("skipped_step") and run.steps[0][18]["weights"] != run.steps[0][17]["weights"]


# ---- the whole command

POISONED = """
import importlib.abc, os, sys

class Poison(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "harness.tasks.sft":
            sys.meta_path.remove(self)
            from harness.tasks.trainer import HarnessTrainer

            def compute_loss(self, *args, **kwargs):
                loss = super(HarnessTrainer, self).compute_loss(*args, **kwargs)
                bad = self.model.training and self.state.global_step + 1 in (7, 8) and os.environ["RANK"] == "1"
                return loss * float("nan") if bad else loss

            HarnessTrainer.compute_loss = compute_loss

sys.meta_path.insert(0, Poison())
"""


@pytest.mark.slow
def test_harness_run_begins_the_next_life_by_itself_and_ends_well(tmp_path):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(POISONED)
    recipe, run = tmp_path / "job.yaml", tmp_path / "run"
    recipe.write_text(RECIPE)
    settings = [f"output_dir={run}", "guard.max_skips=1", "--backend", "ddp", "--processes", 2]
    done = harness("run", recipe, *settings, OMP_NUM_THREADS="1", PYTHONPATH=str(tmp_path / "site"))
    assert done.code == 0, done.output
    assert "step 8: its loss is nan; back to checkpoint-5, and the data of steps 6 to 8 is passed over" in done.output
    assert "attempt-1 ended by a rollback; a new life begins: the newest checkpoint is checkpoint-5" in done.output
    events = [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]
    assert [event["passes_over"] for event in events if event["event"] == "rolled_back"] == [[6, 8]]
    assert (run / "final").is_dir() and sorted(path.name for path in (run / "logs").glob("attempt-*")) == ["attempt-1", "attempt-2"]
