"""Whole runs on one CPU process: best model, early stopping, checkpoints, smoke, packing, divergence, export and merge."""

import json
import re
import shutil

import pytest
import torch
from conftest import harness, metrics

from harness.cli import main
from harness.data.store import load_prepared
from harness.embedded import resolve

RECIPE = """
model: {{name_or_path: "{base}", lora: {{r: 8, alpha: 16}}}}
data: {{train: [{{path: "embedded:base-train", max_rows: 40}}], eval: [{{path: "embedded:base-eval", max_rows: 9}}], max_length: 256}}
train: {{max_steps: 3, per_device_train_batch_size: 4, learning_rate: 1.0e-2, logging_steps: 1}}
tracking: {{mode: disabled}}
"""


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    """train(name, *overrides) -> (run folder, finished command); the base is a copy that nothing else uses."""
    folder = tmp_path_factory.mktemp('it\'s "quoted" & spaced')
    shutil.copytree(resolve("embedded:tiny-llama"), folder / "base")
    recipe = folder / "my recipe.yaml"
    recipe.write_text(RECIPE.format(base=str(folder / "base").replace('"', '\\"')))

    def train(name, *overrides, **environment):
        done = harness("run", recipe, f"output_dir={folder / name}", *overrides, **environment)
        return folder / name, done

    return train


def prepared_of(run):
    return load_prepared(json.loads((run / "logs" / "attempt-1" / "prepared-0.json").read_text())["folder"])


def plain_loss(model, rows, samples=None) -> float:
    """Mean negative log-likelihood per trained token, a sample at a time, in float64. samples: keep only these."""
    total, tokens = 0.0, 0
    for row in rows:
        labels = torch.tensor(row["labels"][1:])
        with torch.no_grad():
            logs = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1].double().log_softmax(-1)
        chosen = labels != -100
        total -= logs[chosen, labels[chosen]].sum().item()
        tokens += int(chosen.sum())
    return total / tokens


def command(*arguments) -> int:
    """The `harness` command in this process."""
    with pytest.raises(SystemExit) as left:
        main([str(argument) for argument in arguments])
    return left.value.code


# ---- best model, early stopping, checkpoints


OVERSHOT = (
    *("train.max_steps=400", "train.learning_rate=0.2", "train.lr_scheduler_type=constant", "train.eval_steps=4"),
    *("train.metric_for_best_model=eval/loss", "train.early_stopping_patience=2", "train.logging_steps=4"),
)


@pytest.fixture(scope="module")
def overshot(train):
    """A run whose rate is so high that its held-out loss rises again; stopped early, with its best model exported."""
    run, done = train("overshot", *OVERSHOT)
    assert done.code == 0, done.output
    return run


def test_the_best_model_is_exported_and_not_the_last(overshot):
    from peft import AutoPeftModelForCausalLM

    losses = metrics(overshot, "eval/loss")
    best = min(losses, key=losses.get)
    manifest = json.loads((overshot / "final" / "harness.json").read_text())
    assert (manifest["step"], manifest["best_metric"]) == (best, pytest.approx(losses[best]))
    assert losses[max(losses)] > losses[best] + 1e-3
    model = AutoPeftModelForCausalLM.from_pretrained(overshot / "final", dtype=torch.float32).eval()
    assert plain_loss(model, prepared_of(overshot).eval) == pytest.approx(losses[best], abs=1e-4)


def test_training_stops_after_as_many_evaluations_without_a_better_one_as_asked(overshot):
    losses = metrics(overshot, "eval/loss")
    steps = sorted(losses)
    assert steps[-1] < 400 and steps[-1] == min(losses, key=losses.get) + 2 * 4


def test_checkpoints_are_as_many_as_asked_and_hold_the_adapter_alone(overshot):
    checkpoints = sorted(overshot.glob("checkpoint-*"))
    assert 1 <= len(checkpoints) <= 2
    for checkpoint in checkpoints:
        names = {path.name for path in checkpoint.iterdir()}
        assert "adapter_model.safetensors" in names and "model.safetensors" not in names and "training_args.bin" not in names
        assert (checkpoint / "adapter_model.safetensors").stat().st_size < 200_000


def test_a_run_folder_is_what_its_docstring_says(overshot):
    import harness.run

    documented = set(re.findall(r"^  (\S+?)/?(?:,| {2,})", harness.run.__doc__, flags=re.MULTILINE))
    found = {re.sub(r"-\d+$", "-N", path.name) for path in overshot.iterdir()}
    assert found == {
        "recipe.yaml",
        "run.json",
        "logs",
        "metrics.jsonl",
        "checkpoint-N",
        "final",
        "ledger.jsonl",
        ".staging",
        ".retired",
        ".lock",
    }
    assert {"logs/attempt-K" if name == "logs" else name for name in found} <= documented


def test_a_complete_run_is_not_begun_again_and_is_left_alone(train, overshot):
    before = {path: path.stat().st_mtime_ns for path in overshot.rglob("*")}
    _, done = train("overshot", *OVERSHOT)
    assert done.code == 0 and "this run is complete" in done.output and "--fresh" in done.output
    assert {path: path.stat().st_mtime_ns for path in overshot.rglob("*")} == before


# ---- smoke, on packs


@pytest.mark.slow
def test_a_smoke_test_runs_two_steps_on_the_longest_rows_in_a_folder_of_its_own(train, overshot):
    before = {path: path.stat().st_mtime_ns for path in overshot.rglob("*")}
    _, done = train("overshot", "--smoke", "data.packing=true")
    assert done.code == 0, done.output
    run = overshot.with_name("overshot-smoke")
    longest = max(sum(lengths) for lengths in prepared_of(run).train["seq_lengths"])
    said = re.search(
        r"smoke: 2 steps on the (\d+) longest rows \(longest (\d+) tokens\); resident memory .*: peak ([\d.]+) GiB", done.output
    )
    assert said and int(said[2]) == longest and 0.1 < float(said[3]) < 32
    assert done.output.rstrip().splitlines()[-1].startswith("smoke:")
    assert sorted(metrics(run, "train/loss")) == [1, 2] and not (run / "final").exists()
    assert {path: path.stat().st_mtime_ns for path in overshot.rglob("*")} == before


# ---- packing


@pytest.mark.slow
def test_a_packed_run_on_a_cpu_has_the_loss_of_its_samples_alone(train):
    """One step over all rows: the logged loss is the base's (an adapter begins at zero) mean over the tokens of every sample, unpacked."""
    from transformers import AutoModelForCausalLM

    run, done = train("packed", "data.packing=true", "train.per_device_train_batch_size=64", "train.max_steps=2")
    assert done.code == 0, done.output
    assert "packed" in done.output
    packs = prepared_of(run).train
    assert len(packs) <= 64 and max(map(len, packs["seq_lengths"])) > 1
    samples = []
    for pack in packs:
        ends = torch.tensor(pack["seq_lengths"]).cumsum(0).tolist()
        for start, end in zip([0, *ends], ends, strict=False):
            samples.append({"input_ids": pack["input_ids"][start:end], "labels": pack["labels"][start:end]})
    assert len(samples) == 40
    base = AutoModelForCausalLM.from_pretrained(resolve("embedded:tiny-llama"), dtype=torch.float32).eval()
    assert metrics(run, "train/loss")[1] == pytest.approx(plain_loss(base, samples), abs=1e-4)


# ---- divergence


def test_a_loss_that_is_not_a_number_is_seen_and_never_exported(train):
    run, done = train(
        "diverged", "train.learning_rate=1e30", "train.max_grad_norm=0", "train.max_steps=4", "train.lr_scheduler_type=constant"
    )
    assert done.code == 1 and "its loss is nan, as in each step from 2 on" in done.output and "Traceback" not in done.output
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert any("train/loss=nan" in line.get("non_finite", "") for line in lines)
    assert not (run / "final").exists()


# ---- export


@pytest.fixture
def exported(overshot, tmp_path):
    """A copy of the run that a test may spoil."""
    return shutil.copytree(overshot, tmp_path / "run")


def test_an_export_is_verified_and_a_flipped_byte_is_named(exported, capsys):
    assert command("export", exported) == 0
    assert "all as they were exported" in capsys.readouterr().out
    file = exported / "final" / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert command("export", exported) == 1
    assert "adapter_model.safetensors: is not what was exported" in capsys.readouterr().err


def test_a_merge_prints_what_it_changed_and_is_whole_or_absent(exported, capsys):
    from transformers import AutoModelForCausalLM

    assert command("export", exported, "--merge") == 0
    output = capsys.readouterr().out
    difference = float(re.search(r"against base \+ adapter: .* KL (\S+) nats", output)[1])
    assert 0 <= difference < 0.05 and "4-bit" not in output
    AutoModelForCausalLM.from_pretrained(exported / "merged")
    manifest = json.loads((exported / "merged" / "harness.json").read_text())
    assert manifest["differences"]["adapter"]["kl"] == pytest.approx(difference, rel=1e-2) and manifest["adapter"] is False
    assert command("export", exported, "--merge") == 1
    assert "--force" in capsys.readouterr().err
    assert not (exported / "merged.incomplete").exists()


def test_a_merge_onto_another_base_is_refused_by_its_digest(exported, overshot, capsys):
    weights = overshot.parent / "base" / "model.safetensors"
    kept = weights.read_bytes()
    weights.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    try:
        assert command("export", exported, "--merge") == 1
    finally:
        weights.write_bytes(kept)
    assert "is not the base that the adapter was trained on" in capsys.readouterr().err
    assert not (exported / "merged").exists()


def test_a_whole_model_has_nothing_to_merge(exported, capsys):
    manifest = json.loads((exported / "final" / "harness.json").read_text())
    (exported / "final" / "harness.json").write_text(json.dumps({**manifest, "adapter": False}))
    assert command("export", exported, "--merge") == 1
    assert "nothing to merge" in capsys.readouterr().err


def test_a_merged_qlora_adapter_is_also_measured_against_the_4bit_model_that_was_trained(train, capsys):
    run, done = train("qlora", "model.quantization.load_in_4bit=true")
    assert done.code == 0, done.output
    assert command("export", run, "--merge") == 0
    output = capsys.readouterr().out
    kl = {name: float(value) for name, value in re.findall(r"against (.*?): .* KL (\S+) nats", output)}
    # Merging changes next to nothing; the rounding of the base to 4 bits, which the merged model lacks, is far more.
    assert kl["base + adapter"] < kl["the 4-bit model that was trained"] < 1


KILLED_BEFORE_RENAME = """
import os, signal
if "HARNESS_ATTEMPT" in os.environ:
    import harness.run
    harness.run.replace_folder = lambda staging, target: os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_run_killed_while_it_exports_leaves_no_final_folder_at_all(train, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(KILLED_BEFORE_RENAME)
    run, done = train("killed", PYTHONPATH=str(tmp_path))
    assert done.code == 1 and "rank 0" in done.output and "while exporting" in done.output
    assert not (run / "final").exists() and (run / "final.incomplete").is_dir()


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["zero2", "zero3"])
def test_the_best_model_comes_back_from_a_sharded_checkpoint(train, backend):
    from safetensors.torch import load_file

    run, done = train(
        f"best-{backend}",
        *("train.max_steps=40", "train.learning_rate=0.3", "train.lr_scheduler_type=constant", "train.eval_steps=4"),
        *("train.metric_for_best_model=eval/loss", "train.early_stopping_patience=3", "--backend", backend, "--processes", 2),
    )
    assert done.code == 0, done.output
    losses = metrics(run, "eval/loss")
    best = min(losses, key=losses.get)
    exported, kept = (load_file(run / name / "adapter_model.safetensors") for name in ("final", f"checkpoint-{best}"))
    assert exported.keys() == kept.keys() and all(torch.equal(exported[name], kept[name]) for name in kept)
