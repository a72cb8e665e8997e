"""Stages: a run that begins from what another has exported. What it exports is one adapter that plain PEFT loads, a kill changes nothing,
and each export says where it comes from."""

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
from lives import Run, check_same
from rig import Refused, die_in_phase
from safetensors.torch import load_file

from harness.embedded import resolve
from harness.model.export import digest_base

SHORT = ("train.max_steps=6", "train.eval_strategy=no", "train.eval_steps=null", "train.warmup_steps=1", "checkpoint.every_steps=2")
NEW = "model.lora={r: 4, alpha: 12, target_modules: [q_proj, v_proj, down_proj]}"
IDS = torch.arange(5, 45).reshape(2, 20)


@pytest.fixture(scope="module")
def first(tmp_path_factory) -> Run:
    """The first stage, which every other begins from."""
    run = Run(tmp_path_factory.mktemp("first"), *SHORT, backend="single")
    run.live()
    return run


def open_base(folder=None):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder or resolve("embedded:tiny-llama"), dtype=torch.float32)


def plain(adapter: Path) -> torch.Tensor:
    """Logits of what is exported, as PEFT alone loads it."""
    with torch.no_grad():
        return peft.AutoPeftModelForCausalLM.from_pretrained(str(adapter), dtype=torch.float32).eval()(IDS).logits


def with_both(beneath: Path, above: Path) -> torch.Tensor:
    """Logits of the base with both, each as it was trained."""
    model = peft.PeftModel.from_pretrained(open_base(), str(beneath))
    model.load_adapter(str(above), "above")
    model.base_model.set_adapter(["default", "above"])
    with torch.no_grad():
        return model.eval()(IDS).logits


def exported(run: Run) -> dict:
    return json.loads((run.path / "final" / "harness.json").read_text())


def stage(folder: Path, parent: Run, mode: str, *overrides: str, backend: str = "single") -> Run:
    begins = (f"model.adapter={parent.path}", f"model.adapter_mode={mode}")
    return Run(folder, *SHORT, *begins, *overrides, backend=backend)


@pytest.mark.parametrize("backend", ["ddp", pytest.param("zero2", marks=pytest.mark.slow), pytest.param("zero3", marks=pytest.mark.slow)])
def test_a_stacked_run_that_is_killed_goes_on_as_if_it_had_not_been_and_exports_both_as_one(first, tmp_path, backend):
    whole = stage(tmp_path / "whole", first, "stack", NEW, backend=backend)
    whole.live()
    cut = stage(tmp_path / "cut", first, "stack", NEW, backend=backend)
    cut.live(die_in_phase(1, "saving: hashing", occurrence=2), code=-9)
    assert 0 < len(cut.committed()) < len(whole.committed())
    life = cut.live()
    assert "ultiple active adapters" not in life.output(0)
    check_same(cut, whole, repeats=True)
    # The last checkpoint holds the new adapter alone, and the export both.
    last = whole.path / "checkpoint-6"
    assert not [entry for entry in last.iterdir() if entry.is_dir() and (entry / "adapter_config.json").is_file()]
    torch.testing.assert_close(plain(whole.path / "final"), with_both(first.path / "final", last), rtol=1e-5, atol=1e-4)
    ranks = {name: tensor.shape[0] for name, tensor in load_file(whole.path / "final" / "adapter_model.safetensors").items()}
    assert {rank for name, rank in ranks.items() if "lora_A" in name} == {8, 12}
    assert (plain(whole.path / "final") - plain(first.path / "final")).abs().max() > 1e-2


def test_three_stages_have_three_entries_and_each_manifest_says_so(first, tmp_path):
    second = stage(tmp_path / "second", first, "stack", NEW)
    second.live()
    third = stage(tmp_path / "third", second, "continue", "model.lora=null")
    third.live()
    lineage = exported(third)["lineage"]
    assert [entry["step"] for entry in lineage] == [6, 6, 6]
    assert [entry.get("adapter_mode") for entry in lineage] == [None, "stack", "continue"]
    assert lineage[:2] == exported(second)["lineage"] and lineage[:1] == exported(first)["lineage"]
    assert {entry["base_digest"] for entry in lineage} == {digest_base(resolve("embedded:tiny-llama"))}
    assert lineage[2]["adapter"] == str(second.path / "final") and lineage[2]["recipe_digest"] == exported(third)["recipe_digest"]
    assert third.manifest(4)["lineage"] == [*lineage[:2], lineage[2] | {"step": 4}]
    assert json.loads((third.path / "run.json").read_text())["lineage"] == lineage
    # One adapter, of the sum of the ranks, that was trained on from where the second ended.
    before, after = (load_file(run.path / "final" / "adapter_model.safetensors") for run in (second, third))
    assert {name: tensor.shape for name, tensor in before.items()} == {name: tensor.shape for name, tensor in after.items()}
    assert not any(torch.equal(before[name], after[name]) for name in before)
    plain(third.path / "final")


@pytest.mark.parametrize(
    "mode, lora, backend",
    [
        ("continue", "model.lora=null", "ddp"),
        pytest.param("stack", NEW, "zero2", marks=pytest.mark.slow),
        pytest.param("continue", "model.lora=null", "zero3", marks=pytest.mark.slow),
    ],
)
def test_preferences_over_an_adapter_are_learnt_against_it_whatever_dies(first, tmp_path, mode, lora, backend):
    """Before its first step the trainer itself refuses a reference that is not the policy as it begins."""
    pairs = ("task=dpo", 'data={train: [{path: "embedded:pairs-train", max_rows: 24}], max_length: 256}', lora)
    whole = stage(tmp_path / "whole", first, mode, *pairs, backend=backend)
    life = whole.live()
    assert {"continue": "a frozen copy", "stack": "the earlier adapter alone"}[mode] in life.output(0)
    drift = [abs(value) for (_, key), value in whole.points().items() if key == "train/logps/chosen_drift"]
    assert drift[0] < 1e-3 < drift[-1]
    cut = stage(tmp_path / "cut", first, mode, *pairs, backend=backend)
    cut.live(die_in_phase(1, "saving: hashing", occurrence=2), code=-9)
    cut.live()
    check_same(cut, whole, repeats=True)
    assert not [entry for entry in (whole.path / "checkpoint-6").iterdir() if (entry / "adapter_config.json").is_file()]
    assert [(entry["task"], entry.get("adapter_mode")) for entry in exported(whole)["lineage"]] == [("sft", None), ("dpo", mode)]
    assert (plain(whole.path / "final") - plain(first.path / "final")).abs().max() > 1e-2


def test_a_merged_base_is_written_once_and_the_new_adapter_names_it(first, tmp_path):
    run = stage(tmp_path / "merged", first, "merge", NEW, backend="ddp")
    run.live(die_in_phase(0, "saving: hashing", occurrence=2), code=-9)
    written = (run.path / "init" / "model.safetensors").stat().st_mtime_ns
    life = run.live()
    assert (run.path / "init" / "model.safetensors").stat().st_mtime_ns == written
    assert "its logits differ from base + adapter by at most" in (run.path / "logs/attempt-1/rank-0.log").read_text() + life.output(0)
    with torch.no_grad():
        torch.testing.assert_close(open_base(run.path / "init")(IDS).logits, plain(first.path / "final"), rtol=1e-4, atol=1e-4)
    settings = json.loads((run.path / "final" / "adapter_config.json").read_text())
    manifest = exported(run)
    assert settings["base_model_name_or_path"] == manifest["base"] == str(run.path / "init")
    assert manifest["base_digest"] == digest_base(str(run.path / "init"))
    assert [entry.get("adapter_mode") for entry in manifest["lineage"]] == [None, "merge"]
    plain(run.path / "final")


def test_a_merged_base_may_be_trained_in_full_and_its_export_begins_another_run(first, tmp_path):
    run = stage(tmp_path / "full", first, "merge", "model.lora=null", "train.learning_rate=1e-4")
    run.live()
    assert not exported(run)["adapter"] and len(exported(run)["lineage"]) == 2
    child = Run(tmp_path / "child", *SHORT, f"model.name_or_path={run.path / 'final'}", backend="single")
    child.live()
    assert exported(child)["lineage"][:2] == exported(run)["lineage"] and len(exported(child)["lineage"]) == 3


def test_a_run_whose_adapter_has_changed_since_is_not_continued(first, tmp_path):
    parent = Run(tmp_path / "parent", *SHORT, backend="single")
    shutil.copytree(first.path, parent.path)
    run = stage(tmp_path / "child", parent, "continue", "model.lora=null")
    run.live(die_in_phase(0, "saving: hashing", occurrence=2), code=-9)
    other = Run(tmp_path / "other", *SHORT, "train.seed=7", backend="single")
    other.live()
    shutil.rmtree(parent.path / "final")
    shutil.copytree(other.path / "final", parent.path / "final")
    life = run.start()
    assert life.wait() == [2]
    assert "adapter: the one in" in life.output(0) and "is not that which the checkpoint's run began from" in life.output(0)
    run.live(allowed=("adapter",))


def test_another_base_is_refused_before_anything_is_loaded(first, tmp_path):
    run = stage(tmp_path / "other", first, "continue", "model.lora=null", "model.name_or_path=embedded:tiny-student")
    life = run.start()
    assert life.wait() == [1]
    assert "was trained on embedded:tiny-llama, and the weights of model.name_or_path = embedded:tiny-student are not" in life.output(0)


def test_an_adapter_given_as_the_base_is_refused(first, tmp_path):
    life = Run(tmp_path / "base", *SHORT, f"model.name_or_path={first.path / 'final'}", backend="single").start()
    assert life.wait() == [1]
    assert "holds an adapter; give it as model.adapter" in life.output(0)


def test_a_recipe_that_says_the_rank_twice_is_refused(first, tmp_path):
    with pytest.raises(Refused, match="the adapter that is continued has a rank and targets of its own"):
        stage(tmp_path / "twice", first, "continue").start()
