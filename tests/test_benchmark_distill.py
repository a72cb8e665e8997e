"""benchmarks/distill*.py: their pure parts, and (slow) all of them at a tiny size, and the real teacher on a few steps."""

import importlib
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import STORIES, needs_shared

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
RESULTS = BENCHMARKS / "results"


@pytest.fixture(scope="module")
def load():
    """load(name) -> a module of benchmarks/, which import each other as scripts beside each other do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        before = set(sys.modules)
        yield importlib.import_module
        for name in set(sys.modules) - before:
            if getattr(sys.modules[name], "__file__", None) and Path(sys.modules[name].__file__).parent == BENCHMARKS:
                del sys.modules[name]


@pytest.fixture(scope="module")
def steps(load):
    return load("distill_steps")


# ---- whole steps


def test_every_row_is_exactly_as_long_as_the_context_and_seven_eighths_of_it_are_trained(steps, tmp_path):
    from transformers import AutoTokenizer

    size = replace(steps.SIZES["cpu"], vocabulary=300)
    rows = steps.make_rows(size)
    steps.save_tokenizer(size, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    made = [
        tokenizer.apply_chat_template(row["messages"], return_dict=True, return_assistant_tokens_mask=True, tokenize=True) for row in rows
    ]
    assert len(rows) == size.batch * size.steps and rows == steps.make_rows(size)
    assert {len(row["input_ids"]) for row in made} == {size.context}
    assert {sum(row["assistant_masks"]) for row in made} == {size.context * 7 // 8}


@pytest.mark.parametrize("kind", ["cpu", "gpu"])
def test_all_sides_are_given_the_same_values_and_ours_are_recipes(steps, tmp_path, kind):
    from harness.recipe import load as load_recipe

    size = steps.SIZES[kind]
    sides = steps.make_sides(tmp_path / "race", tmp_path, size, kind)
    ours, theirs = [side for side in sides if side.name.startswith("harness")], [side for side in sides if side.name.startswith("TRL")]
    assert (len(ours), len(theirs), sides[0].name) == (3, 3, steps.CACHED)
    recipes = [load_recipe(side.argv[-1], ()) for side in ours]
    assert {recipe.distill.weight for recipe in recipes} == {1.0} and {recipe.tracking.mode for recipe in recipes} == {"disabled"}
    assert [recipe.teacher.source for recipe in recipes] == ["cache", "resident", "resident"]
    train = json.loads(Path(ours[0].argv[-1]).read_text())["train"]
    for side in theirs:
        settings = json.loads(Path(side.argv[-1]).read_text())
        assert train.items() <= settings["arguments"].items() and settings["arguments"]["max_length"] == size.context
        assert settings["student"] == recipes[0].model.name_or_path and settings["teacher"] == recipes[0].teacher.name_or_path
        # A word of its own for each divergence, the same on both sides.
        assert {"forward_kl": 0.0, "jsd": 0.5}["jsd" if side.name.endswith(steps.JSD) else "forward_kl"] == settings["arguments"]["beta"]


def a_side(steps, name, seconds, losses):
    reports = zip(seconds, [None, *losses], strict=True)
    return steps.Side(name, [], steps=[steps.Step(value, 2 * value, 0, loss) for value, loss in reports])


def test_cached_steps_are_compared_with_the_others_of_the_same_moment_without_the_first_ones(steps):
    size = replace(steps.SIZES["cpu"], batch=2, context=100)
    cached = a_side(steps, steps.CACHED, [9.0, 9.0, 1.0, 2.0, 4.0], [1.0] * 4)
    other = a_side(steps, "other", [1.0, 1.0, 3.0, 4.0, 20.0], [1.0] * 4)
    found = steps.compare(other, cached, size)
    assert found["cached_is_faster"] == {"min": 2.0, "median": 3.0, "max": 5.0}
    assert found["tokens_per_s"] == 200 / 4.0


def losses(steps, **changed):
    same = {steps.CACHED: [0.99, 0.98], f"harness, resident, {steps.KL}": [1.0, 1.0], f"TRL GKD, {steps.KL}": [1.0, 1.0]}
    return same | {f"harness, resident, {steps.JSD}": [0.2, 0.2], f"TRL chunked, {steps.JSD}": [0.2, 0.2]} | changed


def test_sides_whose_losses_differ_give_no_result(steps):
    assert steps.check_losses(losses(steps), 1e-4) == 0
    assert math.isclose(steps.check_losses(losses(steps, **{f"TRL chunked, {steps.JSD}": [0.2, 0.201]}), 1e-2), 5e-3)
    for name in (f"TRL chunked, {steps.JSD}", f"TRL GKD, {steps.KL}"):
        with pytest.raises(SystemExit, match="not the same training"):
            steps.check_losses(losses(steps, **{name: [0.2, 0.9]}), 1e-4)
    with pytest.raises(SystemExit, match="not the same training"):
        steps.check_losses(losses(steps, **{f"TRL GKD, {steps.KL}": [1.0, math.nan]}), 1e-4)


@pytest.mark.parametrize("cached", [[0.5, 0.98], [0.99, 1.2], [math.nan, 0.9]])
def test_a_cached_loss_that_is_not_a_little_below_the_dense_one_gives_no_result(steps, cached):
    with pytest.raises(SystemExit, match="must be a little less"):
        steps.check_losses(losses(steps, **{steps.CACHED: cached}), 1e-4)


# ---- the loss


@pytest.mark.parametrize("trains_head", [False, True])
def test_the_ways_agree_in_loss_and_gradient_and_one_that_does_not_gives_no_result(load, monkeypatch, trains_head):
    loss = load("distill_loss")
    inputs = loss.draw(loss.Shape(30, 500, 16, 24, 1), "cpu", trains_head=trains_head)
    found = loss.check_same(inputs, "cpu")
    assert found["largest_difference"] < 1e-5 and 0.95 < found["cached_over_dense"] < 1
    wrong = {name: (lambda given, way=way: 2 * way(given)) if "chunked, forward" in name else way for name, way in loss.WAYS.items()}
    monkeypatch.setattr(loss, "WAYS", wrong)
    with pytest.raises(SystemExit, match="not the same mathematics"):
        loss.check_same(inputs, "cpu")


def test_bare_products_are_those_of_a_loss_and_no_others(load):
    """Counted in multiplications by torch: 2 N V H each, of the student's logits and gradients, and of the teacher's logits."""
    from torch.utils.flop_counter import FlopCounterMode

    loss = load("distill_loss")
    tokens, vocabulary, student, teacher = 30, 500, 16, 24
    one = 2 * tokens * vocabulary
    for trains_head in (False, True):
        inputs = loss.draw(loss.Shape(tokens, vocabulary, student, teacher, 1), "cpu", trains_head=trains_head)
        products = {"of the student": one * student * (2 + trains_head)}
        products["of student and teacher"] = products["of the student"] + one * teacher
        for name, expected in products.items():
            for way in (loss.BARE[name], loss.WAYS["harness, cached" if name == "of the student" else "TRL GKD, forward KL"]):
                with FlopCounterMode(display=False) as counter:
                    way(inputs)
                assert counter.get_total_flops() == expected


# ---- bytes


def test_distillkits_bytes_are_those_that_the_research_found(load):
    cache = load("distill_cache")
    # Section 2.1: 65,536, 128k and 151,936 tokens.
    found = {bits: [cache.distillkit_bytes(*kind, bits) for kind in cache.DISTILLKIT.values()] for bits in (16, 17, 18)}
    assert found == {16: [312, 114], 17: [328, 121], 18: [344, 127]}


@pytest.mark.slow
def test_drawn_distributions_are_what_they_are_called_and_ours_and_megatrons_bytes_are_those_of_the_research(load):
    cache = load("distill_cache")
    sft, unsure = (cache.sizes(cache.synthetic(name, 1)) for name in (cache.SFT_LIKE, cache.UNSURE))
    assert 0.45 < sft["entropy_nats"] < 0.75 and sft["mass_of_64"] > 0.999
    assert 2.6 < unsure["entropy_nats"] < 3.4 and 0.86 < unsure["mass_of_64"] < 0.94
    # Section 2.1 has 37 to 40 for Megatron, of another draw.
    assert sft["harness"]["ghost"] < 60 and 33 < sft["Megatron"]["top-64"] < 42
    # 64 entries of 2 bytes and 17 bits, and 7 bytes, is the most; header, index and footer are some 600 bytes.
    assert 150 < unsure["harness"]["ghost"] < 64 * (2 + 17 / 8) + 7 + 600 / 128
    assert sft["harness"]["8 draws"] - sft["harness"]["ghost"] == pytest.approx(8 * 17 / 8, abs=0.5)


def test_a_drawn_distribution_is_written_as_it_is(load, tmp_path):
    cache = load("distill_cache")
    logs = torch.randn(20, 400).mul(3).log_softmax(-1)
    written = cache.Written(tmp_path / "cache", 400, cache.KEPT)
    written.add(logs)
    found = written.close()
    targets = found.read_many(list(found.keys()))
    for row in range(20):
        count = int(targets.counts[row])
        ids = torch.from_numpy(targets.ids[row, :count]).long()
        assert torch.equal(ids, logs[row].topk(count).indices)
        assert torch.allclose(torch.from_numpy(targets.logprobs[row, :count]), logs[row, ids], atol=2e-3)


# ---- the report


def test_the_committed_results_are_what_their_numbers_say(load):
    for name, module in (("distill-cpu", "distill_report"), ("distill-stories", "distill_stories")):
        result = json.loads((RESULTS / f"{name}.json").read_text())
        assert load(module).render(result) == (RESULTS / f"{name}.md").read_text()


def test_the_report_does_not_hide_a_missed_aim_nor_a_busy_machine(load):
    report, result = load("distill_report"), json.loads((RESULTS / "distill-cpu.json").read_text())
    for side in result["steps"]["sides"]:
        side["cached_is_faster"]["median"] = 2.9
    for case in result["losses"]:
        case["ways"][report.CACHED] |= {
            "over_bare_in_cpu_s": {"min": 1, "median": 1.26, "max": 2},
            "bytes": case["ways"][report.GKD]["bytes"],
        }
    result["capture"]["over_bare_in_cpu_s"]["median"] = 0.89
    result["reading"]["cold"]["tokens_per_s"]["median"] = 1.0
    result["bytes"][0]["harness"]["ghost"] = 60.1
    result["machine"]["load_before"] = 9.0
    text = report.render(result)
    assert "Met." not in text and text.count("Not met.") == 4 + 2 * len(result["losses"]) and "Others used the machine" in text
    result["machine"]["load_before"] = 0.1
    assert "Others used" not in report.render(result)
    heads = [number for number, line in enumerate(text.splitlines()) if line.startswith("|---")]
    assert len(heads) == 4 + len(result["losses"])
    for head in heads:
        lines = text.splitlines()
        row = head - 1
        while row < len(lines) and lines[row].startswith("|"):
            assert lines[row].count("|") == lines[head].count("|"), lines[row]
            row += 1


def test_an_arm_is_judged_by_its_best_rate_and_the_widest_gap_is_told(load):
    stories = load("distill_stories")

    def run(arm, rate, lowest, **curves):
        return {"arm": arm, "learning_rate": rate, "lowest": lowest, "held_out": [lowest], "loss": [1.0], "kl": [1.0]} | curves

    runs = [run(stories.CACHED, 1, 2.0), run(stories.RESIDENT, 1, 2.5, kl=[0.8]), run(stories.PLAIN, 1, 2.2)]
    runs += [run(stories.CACHED, 2, 3.0), run(stories.RESIDENT, 2, 3.0), run(stories.PLAIN, 2, 2.1)]
    found = stories.compare(runs)
    assert {arm: best["lowest"] for arm, best in found["best"].items()} == {stories.CACHED: 2.0, stories.RESIDENT: 2.5, stories.PLAIN: 2.1}
    assert found["gaps"] == {"loss": 0.0, "kl": pytest.approx(0.25), "held_out": pytest.approx(0.2)}


@pytest.mark.parametrize("name", ["distill", "distill_stories"])
def test_a_trial_never_replaces_a_measurement(load, name, capsys):
    with pytest.raises(SystemExit):
        load(name).main(["--trial"])
    assert "--trial measures nothing" in capsys.readouterr().err


def test_a_gpu_is_refused_where_there_is_none(load):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(SystemExit, match="no GPU"):
        load("distill").main(["--device", "cuda"])


# ---- all of it


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_trial_measures_every_part_and_writes_both_results(load, tmp_path, monkeypatch):
    for name in ("CUDA_VISIBLE_DEVICES", "OMP_WAIT_POLICY", "HF_HUB_OFFLINE", "TRL_EXPERIMENTAL_SILENCE"):
        monkeypatch.setenv(name, "")  # main sets them; restored after the test
    load("distill").main(["--device", "cpu", "--trial", "--results", str(tmp_path)])
    result = json.loads((tmp_path / "distill-cpu.json").read_text())
    assert (tmp_path / "distill-cpu.md").read_text() == load("distill_report").render(result)
    assert len(result["steps"]["sides"]) == 6 and result["steps"]["largest_loss_difference"] < 1e-5
    gkd, cached = (result["losses"][0]["ways"][name]["bytes"] for name in (load("distill_report").GKD, "harness, cached"))
    assert cached >= 0 and gkd > 0
    assert result["capture"]["units"] == 4 and result["capture"]["trained_share"] == 7 / 8


@needs_shared
@pytest.mark.slow
@pytest.mark.exhaustive
def test_with_its_teacher_a_student_learns_more_in_as_many_steps_and_from_a_cache_the_same(load, tmp_path):
    stories = load("distill_stories")
    assert STORIES.samefile(stories.TEACHER)
    stories.main(["--trial", "--results", str(tmp_path)])
    result = json.loads((tmp_path / "distill-stories.json").read_text())
    best = {arm: found["lowest"] for arm, found in result["best"].items()}
    assert 3.5 < result["parameters"]["teacher"] / result["parameters"]["student"] < 4.5
    assert max(best[stories.CACHED], best[stories.RESIDENT]) < best[stories.PLAIN] - 0.05
    assert result["gaps"]["loss"] < 0.02 and result["gaps"]["held_out"] < 0.01
    assert result["stories"]["teacher_nll"] < min(best.values())
