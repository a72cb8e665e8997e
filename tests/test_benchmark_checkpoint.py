"""benchmarks/checkpoint.py: its pure parts, its probe in one small process, and (slow) all of it on a tiny model."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def bench():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))  # it imports sft, as a script beside it does
        spec = importlib.util.spec_from_file_location("benchmark_checkpoint", BENCHMARKS / "checkpoint.py")
        module = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, "benchmark_checkpoint", module)  # dataclasses look their module up
        spec.loader.exec_module(module)
        yield module


@pytest.fixture
def job(bench, tmp_path):
    def of(**more):
        given = {"folder": tmp_path, "inputs": tmp_path / "inputs", "size": bench.SMALL, "kind": "cpu", "steps": 4, "saves": True}
        return bench.Job(**given | more)

    return of


def options_of(side):
    words = side.argv[side.argv.index("trl.scripts.sft") + 1 :]
    return dict(zip(words[::2], words[1::2], strict=True))


VARIANTS = [{}, {"lora": True}, {"ranks": 2}, {"saves": False}, {"kind": "gpu"}]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_both_sides_are_given_the_same_settings(bench, job, tmp_path, variant):
    from harness.recipe import load

    bench.harness_side(job(**variant))
    options = options_of(bench.trl_side(job(**variant)))
    recipe = load(str(tmp_path / "harness.yaml"), ())
    for key, value in json.loads((tmp_path / "harness.yaml").read_text())["train"].items():
        assert options[f"--{key}"] == str(value), key
    assert recipe.tracking.mode == "disabled" and options["--report_to"] == "none"
    assert (recipe.checkpoint.every_steps == 1) is (options["--save_strategy"] == "steps") is variant.get("saves", True)
    assert options.get("--save_total_limit", "2") == str(recipe.checkpoint.keep)
    lora = recipe.model.lora
    assert ("--use_peft" in options) is (lora is not None) is variant.get("lora", False)
    if lora:
        assert [options[f"--lora_{key}"] for key in ("r", "alpha", "target_modules")] == [
            str(lora.r),
            f"{lora.alpha:.0f}",
            lora.target_modules,
        ]


def test_options_of_the_benchmark_are_options_of_trls_script(bench, job, tmp_path):
    from trl.scripts.sft import make_parser

    known = {option for action in make_parser()._actions for option in action.option_strings}
    for variant in VARIANTS:
        assert set(options_of(bench.trl_side(job(**variant), resume=tmp_path / "checkpoint-3"))) <= known


def test_rows_are_of_one_length_and_the_same_in_every_run(bench):
    rows = bench.make_rows(bench.SMALL)
    assert rows == bench.make_rows(bench.SMALL) and len(rows) == bench.SMALL.rows
    # Each of the two turns is a mark, its words and an end.
    assert {sum(len(turn["content"].split()) + 2 for turn in row["messages"]) for row in rows} == {bench.ROW_TOKENS}


def test_every_second_of_a_save_is_in_one_part(bench, tmp_path):
    words = [
        "save begins",
        "saving: staging",
        "saving: trainer state",
        "saving: weights",
        "saving: hashing",
        "saving: retention",
        "training",
    ]
    # Each lasts as many seconds as its place in the list says; what comes before a save counts in none.
    moments = [0, 1, 3, 6, 10, 15, 21, 28]
    first = [[10 + moment, word] for moment, word in zip(moments, [*words, "save ends"], strict=True)]
    second = [[50.0, "save begins"], [50.25, "saving: hashing"], [50.5, "save ends"]]
    events = [[0.0, "python"], [1.0, "training"], *first, [49.0, "training"], *second]
    clock = tmp_path / "clock.json"
    clock.write_text(json.dumps({"events": events, "saves": [{"step": 1, "flush_s": 0.5}, {"step": 2, "flush_s": 0.25}]}))
    one, two = bench.read_saves(clock)
    assert one["save_s"] == 28 and sum(one["parts"].values()) == 28 and (one["step"], one["flush_s"]) == (1, 0.5)
    expected = {
        "around it": 8,
        "staging": 2,
        "writing the rest": 3,
        "writing weights": 4,
        "hashing and flushing": 5,
        "retiring the oldest": 6,
    }
    assert {part: seconds for part, seconds in one["parts"].items() if seconds} == expected
    assert (two["save_s"], two["parts"]["hashing and flushing"], two["step"]) == (0.5, 0.25, 2)


def test_a_phase_that_nobody_knows_is_no_part_of_anything(bench):
    with pytest.raises(KeyError, match="saving: polishing"):
        bench.seconds_of([(0.0, "saving: polishing"), (1.0, "save ends")], bench.SAVE_PARTS)


def test_phases_of_the_harness_are_known_to_the_benchmark(bench):
    """Both tables name words that stand in the harness's own code, and all of those that begin with `saving:` or `resuming:`."""
    import re

    code = "".join(path.read_text() for path in (BENCHMARKS.parent / "harness").rglob("*.py"))
    said = set(re.findall(r'(?:enter|_remembering)\("((?:saving|resuming): [^"]+)"', code))
    elsewhere = {"saving: giving up", "resuming: loading DeepSpeed's shards"}
    known = {word for word in (*bench.SAVE_PARTS, *bench.START_PARTS) if word.startswith(("saving:", "resuming:"))}
    assert said - elsewhere == known


def test_ratios_are_taken_save_by_save_without_the_first_ones(bench):
    parts = dict.fromkeys(bench.SAVE_PARTS.values(), 0.0) | {"retiring the oldest": 1.0}

    def save(save_s, flush_s=0.0, plain=(1.0, 1.0)):
        return {"save_s": save_s, "flush_s": flush_s, "parts": parts, "plain_write_s": plain[0], "plain_flush_s": plain[1]}

    ours = [save(90), save(90), save(3.0, plain=(0.5, 0.5)), save(5.0, plain=(1.0, 3.0))]
    theirs = [save(1), save(1), save(2.0, flush_s=1.0), save(1.0, flush_s=4.0)]
    result = bench.compare_saves(ours, theirs)
    assert result["saves"] == 2
    assert result["ratio"] == {"min": 1.5, "median": 3.25, "max": 5.0}
    assert result["ratio_flushed"] == {"min": 1.0, "median": 1.0, "max": 1.0}
    # Each deleted for one second: 2 / (1 + 1) and 4 / (0 + 4).
    assert result["ratio_flushed_no_retiring"] == {"min": 1.0, "median": 1.0, "max": 1.0}
    # Plain seconds over those of our commit, which ends before the oldest is retired: 1 / 2 and 4 / 4.
    assert result["bandwidth_ratio"] == {"min": 0.5, "median": 0.75, "max": 1.0}


def test_a_frozen_weight_in_a_checkpoint_is_counted(bench, tmp_path):
    import torch
    from safetensors.torch import save_file

    save_file(
        {"layers.0.q.lora_A.weight": torch.zeros(2), "layers.0.q.lora_B.weight": torch.zeros(2)}, tmp_path / "adapter_model.safetensors"
    )
    (tmp_path / "optimizer.pt").write_bytes(b"12345")
    found = bench.describe_checkpoint(tmp_path)
    assert (found["adapter_tensors"], found["other_tensors"]) == (2, 0)
    assert found["bytes"] == sum(path.stat().st_size for path in tmp_path.iterdir()) and found["files"]["optimizer.pt"] == 5
    save_file({"layers.0.q.base_layer.weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    assert bench.describe_checkpoint(tmp_path)["other_tensors"] == 1


def test_the_probe_times_a_save_flushes_it_and_writes_it_plainly(tmp_path):
    """With a trainer of ten lines in place of transformers'."""
    (tmp_path / "transformers").mkdir()
    (tmp_path / "transformers" / "__init__.py").write_text("class TrainerCallback:\n    pass\n")
    (tmp_path / "transformers" / "trainer.py").write_text(
        "import pathlib, types\n"
        "def rotate_checkpoints(output_dir, save_total_limit=None):\n"
        "    pass\n"
        "class Trainer:\n"
        "    def __init__(self, folder):\n"
        "        self.args, self.state = types.SimpleNamespace(output_dir=folder), types.SimpleNamespace(global_step=1)\n"
        "        self.callbacks = []\n"
        "    def add_callback(self, callback):\n"
        "        self.callbacks.append(callback)\n"
        "    def _save_checkpoint(self, model, trial):\n"
        "        folder = pathlib.Path(self.args.output_dir, 'checkpoint-1', 'inner')\n"
        "        folder.mkdir(parents=True)\n"
        "        folder.joinpath('weights').write_bytes(b'x' * 9_000_000)\n"
        "        rotate_checkpoints(output_dir=folder, save_total_limit=None)\n"
        "        rotate_checkpoints(output_dir=folder, save_total_limit=2)\n"
    )
    (tmp_path / "torch.py").write_text("class cuda:\n    is_available = staticmethod(lambda: False)\n")
    program = (
        "import sys, types\n"
        "distributed = types.ModuleType('torch.distributed'); distributed.is_available = lambda: False\n"
        "import torch; torch.distributed = distributed; sys.modules['torch.distributed'] = distributed\n"
        "from transformers.trainer import Trainer\n"
        f"trainer = Trainer({str(tmp_path)!r})\n"
        "trainer.callbacks[0].on_step_end(None, None, None)\n"
        "trainer._save_checkpoint(None, None)\n"
        "trainer.callbacks[0].on_step_end(None, None, None)\n"
        "raise SystemExit('it should have left')\n"
    )
    clock = tmp_path / "clock.json"
    paths = f"{BENCHMARKS / 'checkpoint_probe'}:{tmp_path}"
    around = {"PYTHONPATH": paths, "BENCH_EVENTS": str(clock), "BENCH_PLAIN": str(tmp_path / "plain"), "BENCH_LEAVE_AFTER": "2", "PATH": ""}
    done = subprocess.run([sys.executable, "-S", "-c", "import sitecustomize\n" + program], env=around, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    content = json.loads(clock.read_text())
    assert [what for _, what in content["events"]] == ["python", "first step done", "save begins", "saving: retention", "save ends"]
    assert [moment for moment, _ in content["events"]] == sorted(moment for moment, _ in content["events"])
    (save,) = content["saves"]
    assert save["files"] == {"inner/weights": 9_000_000}
    assert save["flush_s"] > 0 and save["plain_write_s"] > 0 and save["plain_flush_s"] > 0
    assert not (tmp_path / "plain").exists()


@pytest.mark.parametrize("arguments", [["--trial"], ["--trial", "--device", "cpu"]])
def test_a_trial_never_replaces_a_measurement(bench, arguments, capsys):
    with pytest.raises(SystemExit):
        bench.main(arguments)
    assert "--trial measures nothing" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_trial_measures_everything_and_writes_both_results(bench, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # main sets it; restored after the test
    bench.main(["--device", "cpu", "--trial", "--results", str(tmp_path / "results"), "--work", str(tmp_path / "work")])
    result = json.loads((tmp_path / "results" / "checkpoint-cpu.json").read_text())
    text = (tmp_path / "results" / "checkpoint-cpu.md").read_text()
    assert text == bench.render(result)
    for name, save in result["saves"].items():
        ours, theirs = save["harness_checkpoint"], save["trl_checkpoint"]
        # Ours has a manifest and a state of each rank besides, and none of transformers' pickled settings.
        assert 0.8 < ours["bytes"] / theirs["bytes"] < 1.2, name
        assert ours["files"].keys() - theirs["files"].keys() >= {"manifest.json", "harness_rank_0.json"}
        assert (ours["other_tensors"] == 0) is (name == "lora") and (ours["adapter_tensors"] > 0) is (name == "lora")
    parts = result["starts"]["parts"]
    assert parts["fresh"]["resuming: optimiser"]["median"] == 0 < parts["resumed"]["resuming: optimiser"]["median"]
    for how in ("fresh", "resumed"):
        whole = result["starts"][f"harness_{how}_s"]["median"]
        assert sum(part["median"] for part in parts[how].values()) == pytest.approx(whole)
    assert set(result["steps"]) == {"1", "2"}
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) > 40 and "nan" not in text
