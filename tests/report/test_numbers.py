"""What the report says of a run, against what was planted and counted by hand."""

import json
import math
import random

import pytest
from planted_run import RECIPE, Planted, interrupted

from harness.planner import Place, plan_recipe
from harness.planner.render import to_json
from harness.recipe import load
from harness.report.curves import thin
from harness.report.headline import headline
from harness.report.lives import PARTS
from harness.report.story import as_object, differing_settings, load_stories, short_names
from harness.report.words import duration, number, percent
from harness.run import RunDir


def story_of(*planted: Planted):
    stories = load_stories([RunDir(run.path) for run in planted])
    return stories[0] if len(stories) == 1 else stories


# ---- time


def test_each_second_of_a_run_stands_in_one_part_and_goodput_is_what_a_hand_counts(tmp_path):
    spent = story_of(interrupted(tmp_path / "run")).account
    by_hand = {
        "kept": 4 * 2 + 4 * 2,  # steps 1 to 4 of life 1, 5 to 8 of life 2
        "lost": 4 * 2,  # steps 5 to 8 of life 1
        "passed over": 0,
        "evaluation": 3,  # from the line of step 6 to the evaluation's, which says 2.5 of itself
        "saving": 1 + 1.5,
        "starting": (32 - 20) + (71 - 70),
        "other": 86 - 70 - 1 - 8 - 3 - 1.5,
        "queue": 10,
        "between": (20 - 10) + (70 - 49),
    }
    assert list(by_hand) == list(PARTS) and sum(by_hand.values()) == 86
    assert spent.parts == pytest.approx(by_hand)
    assert spent.wall_s == 86 and spent.goodput == pytest.approx(16 / 86) and spent.estimated_steps == 0


def test_steps_between_the_last_line_and_a_stop_are_kept_at_the_pace_of_the_line_before(tmp_path):
    run = Planted(tmp_path / "run").ended(1, "stopped", "slurm: preempted: the nodes go to another job", 5)
    run.event(0, "run_began", 1, run="x").event(5, "life_began", 1, world_size=1, backend="single", resumed_from=None)
    run.line(14, 4, train_loss=1.0, speed_step_s=2.0)
    run.event(16.5, "committed", 1, step=5, reason="stop", bytes=1, save_s=0.25).event(17, "stopped", 1, step=5, reason="preempted")
    story = story_of(run)
    assert story.account.parts["kept"] == pytest.approx(4 * 2 + 2) and story.account.estimated_steps == 1
    assert story.account.parts["lost"] == 0 and story.account.parts["starting"] == pytest.approx(6)
    assert story.lives[0].ended == "preempted" and sum(story.account.parts.values()) == pytest.approx(17)


def test_a_run_that_died_for_good_has_lost_what_came_after_its_last_checkpoint(tmp_path):
    run = Planted(tmp_path / "run").ended(1, None)
    run.event(0, "run_began", 1, run="x").event(1, "life_began", 1, world_size=1, backend="single", resumed_from=None)
    for step in range(1, 8):
        run.line(1 + step, step, train_loss=1.0, speed_step_s=1.0)
    run.event(4.5, "committed", 1, step=3, reason="interval", bytes=1, save_s=0.0)
    story = story_of(run)
    assert story.status.state == "lost" and story.last_step == 7 and story.lost_steps == 4
    # They are lost, but the last that there is of them, so they are drawn.
    assert len(story.curve("train/loss").points) == 7 and not story.curve("train/loss").lost
    assert story.account.parts["kept"] == pytest.approx(3) and story.account.parts["lost"] == pytest.approx(4)


def test_a_step_that_the_guard_passed_over_is_no_kept_work(tmp_path):
    run = Planted(tmp_path / "run").ended(1, "done", step=4)
    run.event(0, "run_began", 1, run="x").event(1, "life_began", 1, world_size=1, backend="single", resumed_from=None)
    run.line(5, 4, train_loss=1.0, speed_step_s=1.0)
    run.event(3, "skipped_step", 1, step=2, why="the loss is nan", rows="a:1").event(5, "finished", 1, step=4, reason="")
    story = story_of(run)
    assert (story.account.parts["kept"], story.account.parts["passed over"]) == pytest.approx((3, 1))
    assert any("1 step passed over" in note and "the loss is nan" in note for note in story.notes)


def test_the_sentence_at_the_top_names_lives_losses_and_what_it_was_judged_by(tmp_path):
    said = headline(story_of(interrupted(tmp_path / "run")))
    assert said == "Finished after 2 lives (1 death): eval loss 2.500 in 8 steps; goodput 19 % of 1 min 26 s, 4 steps made again or lost."


# ---- curves


def test_the_best_value_is_the_one_that_the_recipe_calls_better(tmp_path):
    judged = "metric_for_best_model: eval/calibration_error, greater_is_better: false, "
    recipe = RECIPE.format(steps=8, rate=1e-3, folder=tmp_path / "run").replace("train: {", f"train: {{{judged}")
    run = Planted(tmp_path / "run", recipe=recipe)
    for step, error in enumerate((0.5, 0.1, 0.3), start=1):
        run.line(step, step, **{"eval/calibration_error": error})
    assert "(best 0.1000 at step 2)" in headline(story_of(run))


def test_a_curve_is_what_the_run_was_made_with_and_what_was_lost_is_apart(tmp_path):
    curve = story_of(interrupted(tmp_path / "run")).curve("train/loss")
    assert curve.points == [(2, 4.0), (4, 3.0), (6, 2.0), (8, 1.0)]
    assert curve.lost == [[(4, 3.0), (6, 2.9), (8, 2.8)]]


def test_what_is_not_a_number_is_marked_and_spoils_nothing(tmp_path):
    run = Planted(tmp_path / "run")
    run.line(1, 1, train_loss=1.0).line(2, 2, train_loss=None, non_finite="train/loss=nan train/grad_norm=inf").line(3, 3, train_loss=3.0)
    run.raw('{"step": 4, "time": 1790000004.0, "train/loss": NaN, "train/grad_norm": -Infinity}\n')
    run.raw('{"step": 5, "time": 1790000005.0, "train/loss": 1' + "0" * 400 + "}\n")
    story = story_of(run)
    curve = story.curve("train/loss")
    assert curve.points == [(1, 1.0), (3, 3.0)] and [step for step, _ in curve.not_finite] == [2, 4, 5]
    assert story.curve("train/grad_norm").points == []
    assert any("train/loss was not a number in 3 lines (step 2, 4, 5)" in note for note in story.notes)
    json.dumps(as_object(story), allow_nan=False)


def test_a_torn_end_and_lines_of_something_else_are_counted_and_left_out(tmp_path):
    run = Planted(tmp_path / "run").line(1, 1, train_loss=1.0)
    run.raw('{"step": 2, "ti\n[1, 2]\n{"step": "three", "time": 1}\n{"step": 3}\n\n').line(4, 4, train_loss=2.0)
    run.raw('{"step": 5, "time": 1790000005.0, "train/loss"')
    story = story_of(run)
    assert story.curve("train/loss").points == [(1, 1.0), (4, 2.0)] and story.columns.torn == 4
    assert any("4 lines of metrics.jsonl are torn" in note for note in story.notes)


def test_thinning_keeps_ends_and_every_extreme():
    draw = random.Random(3)
    values = [draw.gauss(0, 1) for _ in range(50_000)]
    values[31_415] = 1e6
    values[2_718] = -1e6
    kept = thin(range(50_000), values, 100)
    assert len(kept) <= 400 and kept[0] == (0, values[0]) and kept[-1] == (49_999, values[-1])
    assert (31_415, 1e6) in kept and (2_718, -1e6) in kept and kept == sorted(kept)
    # Of each part of the axis, what a second count finds.
    for part in range(100):
        inside = [values[step] for step in range(50_000) if int(step / (49_999 / 100)) == part]
        drawn = [value for step, value in kept if int(step / (49_999 / 100)) == part]
        assert (min(drawn), max(drawn)) == (min(inside), max(inside))


def test_a_mean_through_many_points_is_that_of_all_points_and_not_of_those_that_are_drawn(tmp_path):
    run, draw = Planted(tmp_path / "run"), random.Random(5)
    losses = [draw.random() for _ in range(4000)]
    for step, loss in enumerate(losses, start=1):
        run.line(step, step, train_loss=loss)
    curve = story_of(run).curve("train/loss", 50)
    assert len(curve.points) <= 200 and len(curve.smoothed) <= 52
    for step, mean in curve.smoothed:
        near = min(100, step - 1, 4000 - step)
        window = losses[step - 1 - near : step + near]
        assert mean == pytest.approx(math.fsum(window) / len(window))


# ---- memory


def test_memory_is_set_beside_the_parts_of_the_plan_that_it_measures(tmp_path):
    run = interrupted(tmp_path / "run")
    run.line(90, 9, **{"memory/peak_gib": 0.25, "memory/peak_reserved_gib": 0.3})
    memory = story_of(run).memory
    planned = to_json(plan_recipe(load(run.path / "recipe.yaml"), Place()), [])["gpu_bytes"]
    parts = planned["moments"][planned["deciding"]]
    whole = sum(part["expected"] for part in parts.values()) / 2**30
    context, slack = parts["CUDA context"]["expected"] / 2**30, parts["allocator slack"]["expected"] / 2**30
    assert (memory.measured, memory.reserved, memory.is_compared) == (0.25, 0.3, True)
    assert memory.whole[1] == pytest.approx(whole) and memory.with_slack[1] == pytest.approx(whole - context)
    assert memory.tensors[1] == pytest.approx(whole - context - slack)
    assert f"peak 0.300 of {number(whole - context, 3)} GiB forecast" in headline(story_of(run))


def test_a_cpus_memory_is_not_compared_with_a_gpus_plan(tmp_path):
    run = interrupted(tmp_path / "run")
    run.line(90, 9, **{"memory/peak_gib": 0.25})
    story = story_of(run)
    assert not story.memory.is_compared and story.memory.whole and "0.250 GiB resident" in headline(story)


def test_a_plan_that_cannot_be_made_says_why(tmp_path):
    recipe = 'task: sft\nmodel: {name_or_path: "nowhere/at-all"}\ndata: {train: "embedded:base-train"}\ntrain: {max_steps: 5}\n'
    run = Planted(tmp_path / "run", recipe=recipe).line(1, 1, train_loss=1.0)
    assert "nowhere/at-all" in story_of(run).memory.missing


# ---- several


def test_the_settings_that_differ_are_found_and_no_others(tmp_path):
    first, second = Planted(tmp_path / "a", rate=1e-3), Planted(tmp_path / "b", rate=2e-3)
    assert differing_settings(story_of(first, second)) == {"train.learning_rate": [1e-3, 2e-3]}


def test_runs_of_the_same_name_are_told_apart(tmp_path):
    paths = [tmp_path / "x" / "run", tmp_path / "y" / "run", tmp_path / "y" / "other"]
    assert short_names(paths) == ["x/run", "y/run", "other"]


def test_a_run_is_read_once_and_they_stand_in_the_order_in_which_they_began(tmp_path):
    late = interrupted(tmp_path / "a")
    early = Planted(tmp_path / "b")
    early.event(-50, "run_began", 1, run="y").line(-40, 1, train_loss=1.0)
    stories = load_stories([RunDir(late.path), RunDir(early.path), RunDir(late.path)])
    assert [story.name for story in stories] == ["b", "a"]


# ---- words


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0, "0 s"), (0.057, "0.057 s"), (41.2, "41 s"), (60, "1 min"), (724, "12 min 4 s"), (3599.7, "1 h"), (90_000, "1 d 1 h")],
)
def test_durations_are_said_in_two_units(seconds, said):
    assert duration(seconds) == said


def test_a_share_is_never_rounded_up_to_all_or_down_to_nothing():
    assert [percent(share) for share in (0, 0.004, 0.914, 0.9999, 1)] == ["0 %", "0.4 %", "91 %", "99.9 %", "100 %"]


@pytest.mark.parametrize(("value", "said"), [(0.87321, "0.8732"), (18204.2, "18,204"), (2e-4, "2.00e-4"), (320.0, "320"), (1e9, "1.00e9")])
def test_numbers_have_the_digits_that_count(value, said):
    assert number(value) == said
