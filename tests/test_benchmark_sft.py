"""benchmarks/sft.py: its pure parts, and (slow) a race of a few steps on this machine."""

import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).resolve().parents[1] / "benchmarks" / "sft.py"


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("benchmark_sft", BENCHMARK)
    module = importlib.util.module_from_spec(spec)
    sys.modules["benchmark_sft"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def steps(bench, seconds, tokens=100, loss=2.0):
    return [bench.Step(value, 2 * value, tokens, loss) for value in seconds]


def a_result(bench):
    spread = {"min": 1.0, "median": 1.25, "max": 2.0}
    ratio = {"min": 0.9, "median": 1.015, "max": 1.1}
    side = {"side": "harness", "tokens_per_s": 3000.4, "harness_over_this": 1.0, "steps": 40, "peak_bytes": 2**30}
    side["harness_over_this_in_cpu_s"] = 1.0
    return {
        "kind": "cpu",
        "date": "2026-01-02 03:04 UTC",
        "git_commit": "0123abc",
        "machine": {"device": "A processor", "cpus": 2, "memory_bytes": 24 * 2**30, "python": "3.11", "load_before": 0, "load_after": 1},
        "versions": {"torch": "2.13", "trl": "1.16"},
        "size": vars(bench.SIZES["cpu"]),
        "parameters": 1_300_000,
        "row_tokens": [30, 180, 2000],
        "equal": compared(spread, ratio),
        "defaults": {"sides": [side, side | {"side": "TRL", "tokens_per_s": 1500.2, "harness_over_this": 2.0}]},
        "first_step": {"harness_s": spread, "trl_s": spread, "starts": 3},
    }


def compared(spread, ratio):
    facts = {"steps": 40, "ratio_of_sums": 1.01, "race_medians": [1.01, 1.02], "loss_gap": 0.0}
    peaks = {"harness_peak_bytes": 2**30, "trl_peak_bytes": 2**31}
    cpu = {"harness_cpu_s": spread, "trl_cpu_s": spread, "cpu_ratio": ratio}
    return {"harness_step_s": spread, "trl_step_s": spread, "ratio": ratio, **cpu, **facts, **peaks}


def test_rows_have_the_lengths_that_are_announced_and_are_the_same_in_every_run(bench):
    size = bench.SIZES["cpu"]
    rows = bench.make_rows(size)
    assert rows == bench.make_rows(size)
    # Each of the two turns is a mark, its words and an end.
    counted = [sum(len(message["content"].split()) + 2 for message in row["messages"]) for row in rows]
    assert counted == bench.row_lengths(size.rows)
    assert min(counted) >= 30 and max(counted) <= 2000 < size.max_length


def test_row_lengths_are_mixed_enough_that_a_random_batch_is_half_padding(bench):
    lengths, batch = bench.row_lengths(320), 8
    padded = sum(batch * max(lengths[i : i + batch]) for i in range(0, len(lengths), batch))
    assert sum(lengths) / padded < 0.5


@pytest.mark.parametrize("kind", ["cpu", "gpu"], ids=["on a cpu", "on a gpu"])
def test_equal_settings_give_both_sides_the_same_values(bench, tmp_path, kind):
    harness, trl = bench.equal_sides(tmp_path, bench.SIZES[kind], kind)
    train = json.loads((tmp_path / "harness" / "recipe.yaml").read_text())["train"]
    options = dict(zip(trl.argv[3::2], trl.argv[4::2], strict=True))
    for key, value in train.items():
        assert options[f"--{key}"] == str(value), key
    assert train["bf16"] is (kind == "gpu")


@pytest.mark.parametrize("kind", ["cpu", "gpu"], ids=["on a cpu", "on a gpu"])
def test_recipes_of_the_benchmark_are_recipes(bench, tmp_path, kind):
    from harness.recipe import load

    bench.equal_sides(tmp_path / "equal", bench.SIZES[kind], kind)
    bench.default_sides(tmp_path / "defaults", bench.SIZES[kind], kind)
    for name in ("equal", "defaults"):
        recipe = load(str(tmp_path / name / "harness" / "recipe.yaml"), ())
        assert recipe.tracking.mode == "disabled"
        assert recipe.train.per_device_train_batch_size == bench.SIZES[kind].batch


def test_options_of_the_benchmark_are_options_of_trls_script(bench, tmp_path):
    from trl.scripts.sft import make_parser

    known = {option for action in make_parser()._actions for option in action.option_strings}
    for kind, size in bench.SIZES.items():
        sides = bench.equal_sides(tmp_path / kind / "equal", size, kind) + bench.default_sides(tmp_path / kind / "defaults", size, kind)
        for side in sides:
            if side.name != "harness":
                assert set(side.argv[3::2]) <= known


def test_steps_are_compared_pair_by_pair_without_the_first_ones(bench):
    ours, theirs = steps(bench, [9, 9, 9, 1.0, 2.0, 6.0]), steps(bench, [1, 1, 1, 1.0, 4.0, 4.0])
    result = bench.compare_pairs(ours, theirs)
    assert result["steps"] == 3
    assert result["ratio"] == {"min": 0.5, "median": 1.0, "max": 1.5}
    assert result["ratio_of_sums"] == 1.0


def test_sides_with_different_numbers_of_steps_are_not_compared_pair_by_pair(bench):
    with pytest.raises(ValueError):
        bench.compare_pairs(steps(bench, [1] * 5), steps(bench, [1] * 6))


def test_tokens_per_second_leave_the_first_step_out_of_both_tokens_and_time(bench):
    steps = [bench.Step(100.0, 100.0, 5, None), bench.Step(1.0, 2.0, 30, None), bench.Step(3.0, 8.0, 50, None)]
    assert bench.tokens_per_s(steps) == 20.0
    assert bench.tokens_per_cpu_s(steps) == 8.0


def test_a_difference_between_losses_is_found_and_missing_losses_are_no_agreement(bench):
    same = steps(bench, [1, 1], loss=2.0)
    assert bench.loss_gap(same, same) == 0.0
    assert math.isclose(bench.loss_gap(steps(bench, [1, 1], loss=2.1), same), 0.05)
    with pytest.raises(SystemExit, match="no losses"):
        bench.loss_gap(steps(bench, [1], loss=None), steps(bench, [1], loss=None))


def test_batches_of_different_sizes_are_no_equal_settings(bench):
    with pytest.raises(SystemExit, match=r"at steps \[1, 2\]"):
        bench.loss_gap(steps(bench, [1, 1], tokens=100), steps(bench, [1, 1], tokens=101))


def test_the_table_says_machine_versions_commit_date_and_whether_the_aims_are_met(bench):
    text = bench.render(a_result(bench))
    for part in ("A processor, 2 cores, 24.00 GiB", "torch 2.13, trl 1.16", "commit 0123abc", "2026-01-02 03:04 UTC", "1.3 M parameters"):
        assert part in text
    assert "**1.015 (0.900 to 1.100)**" in text and "| TRL | 1,500 | 2.00 | 1.00 | 40 | 1.00 |" in text
    assert text.count("Met.") == 2 and "Not met" not in text


def test_the_table_does_not_hide_a_missed_aim(bench):
    result = a_result(bench)
    result["equal"]["ratio"]["median"] = 1.021
    result["defaults"]["sides"][1]["harness_over_this"] = 1.49
    assert bench.render(result).count("Not met.") == 2


def test_every_row_of_a_table_has_as_many_cells_as_its_head(bench):
    lines = bench.render(a_result(bench)).splitlines()
    heads = [i for i, line in enumerate(lines) if line.startswith("|---")]
    assert len(heads) == 3
    for head in heads:
        row = head - 1
        while row < len(lines) and lines[row].startswith("|"):
            assert lines[row].count("|") == lines[head].count("|"), lines[row]
            row += 1


def test_a_gpu_is_refused_where_there_is_none(bench):
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(SystemExit, match="no GPU"):
        bench.main(["--device", "cuda"])


@pytest.mark.parametrize("arguments", [["--steps", "8"], ["--steps", "3", "--results", "/tmp/nowhere"]])
def test_a_trial_never_replaces_a_measurement(bench, arguments, capsys):
    with pytest.raises(SystemExit):
        bench.main(arguments)
    assert "--steps is a trial" in capsys.readouterr().err


def test_a_side_that_fails_is_shown_with_its_command_and_the_end_of_its_log(bench, tmp_path):
    side = bench.Side("TRL", [sys.executable, "-c", "raise SystemExit('no such model')"])
    with pytest.raises(SystemExit, match="TRL: ended with exit code 1 before training began(.|\n)*no such model"):
        bench.race([side], tmp_path, "own")


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_race_of_a_few_steps_writes_both_results(bench, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # main sets it; restored after the test
    bench.main(["--device", "cpu", "--steps", "5", "--results", str(tmp_path / "results"), "--work", str(tmp_path / "work")])
    result = json.loads((tmp_path / "results" / "sft-cpu.json").read_text())
    assert result["equal"]["loss_gap"] < 1e-4
    assert len({side["tokens"] for side in result["defaults"]["sides"]}) == 1, "every side trains the same tokens"
    assert (tmp_path / "results" / "sft-cpu.md").read_text() == bench.render(result)
