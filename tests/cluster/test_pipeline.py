"""Pipelines: what the file means, what is refused, which stages are sent and what they wait for, and the same on one machine.

On a real Slurm: tests/slurm/test_arrays_and_pipelines.py."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import harness
from sent import CountingSlurm, answer, ask, finish, finish_merge

from harness.checkpoint.ledger import Ledger
from harness.cli import run as run_verb
from harness.cli import status, submit
from harness.cluster.drawing import draw_pipeline
from harness.cluster.pipeline import Pipeline, find_pipeline, load_pipeline, render_pipeline, save_pipeline
from harness.cluster.stages import is_gone_on_from, is_made_from, plan_stages
from harness.cluster.status import read_status
from harness.cluster.submission import read_job
from harness.errors import ClusterError, DataError, LaunchError, RecipeError
from harness.model.adapters import digest_adapter
from harness.model.export import digest_base, digest_file
from harness.recipe import load
from harness.recipe.load import leaf_keys
from harness.recipe.schema import Section
from harness.resources import shipped_names
from harness.run import RunDir, write_outcome, write_text_atomically
from harness.share import Share, read_share

CHAIN = {
    "base": {"recipe": "tiny/sft-full"},
    "adapt": {"recipe": "tiny/sft-lora", "model": {"from": "base"}, "set": {"train.max_steps": 7}},
    "rates": {"recipe": "tiny/sft-lora", "model": {"from": "base"}, "array": {"train.learning_rate": [1e-3, 1e-2]}, "at_once": 1},
    "last": {"recipe": "tiny/sft-lora", "model": {"from": "adapt"}, "needs": ["rates"]},
}
ASK = {"do": "capture", "recipe": "tiny/distill-offline", "shards": 3, "at_once": 2}
LEARN = {"recipe": "tiny/distill-offline", "needs": ["ask"]}


@pytest.fixture
def chain(tmp_path, monkeypatch):
    """Writes a pipeline file, and is where it is used."""
    monkeypatch.chdir(tmp_path)

    def written(stages=None, **more) -> Path:
        file = tmp_path / "chain.yaml"
        file.write_text(yaml.safe_dump({"stages": CHAIN if stages is None else stages, **more}, sort_keys=False))
        return file

    return written


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    return CountingSlurm(tmp_path / "bin", monkeypatch)


def plans_of(file: Path, *overrides: str):
    return {plan.name: plan for plan in plan_stages(load_pipeline(file, overrides))}


def stage(tmp_path: Path, name: str) -> Path:
    return tmp_path / "runs" / "chain" / name


# ---- the file


def test_every_shipped_pipeline_loads_with_all_its_recipes():
    assert shipped_names("pipelines")
    for name in shipped_names("pipelines"):
        plan_stages(load_pipeline(find_pipeline(f"pipelines/{name}")))


def test_a_stage_has_its_recipe_its_settings_its_folder_and_the_model_that_another_makes(chain, tmp_path):
    plans = plans_of(chain())
    base, adapt, rates, last = (plans[name].recipes for name in CHAIN)
    folder = tmp_path / "runs" / "chain"
    assert adapt[0].model.name_or_path == f"{folder}/base/final" and adapt[0].train.max_steps == 7
    assert [recipe.train.learning_rate for recipe in rates] == [1e-3, 1e-2]
    assert {recipe.tracking.group for recipe in rates} == {"chain-rates"}
    # An adapter alone is no model that another could be put on.
    assert last[0].model.name_or_path == f"{folder}/adapt/merged"
    assert {name for name, plan in plans.items() if plan.merged} == {"adapt"}
    assert base[0].output_dir == f"{folder}/base" and rates[1].output_dir == f"{folder}/rates/01-learning_rate=0.01"


def test_the_model_of_another_stage_takes_the_place_of_all_that_says_which_model(chain, tmp_path):
    own = {"recipe": "tiny/sft-full", "model": {"from": "base"}}
    model = plans_of(chain({"base": CHAIN["base"], "more": own}))["more"].recipes[0].model
    assert (model.name_or_path, model.init) == (f"{tmp_path}/runs/chain/base/final", None)
    own |= {"recipe": "sft/qwen2.5-7b-tools-lora", "set": {"model.tokenizer": "another"}}
    assert plans_of(chain({"base": CHAIN["base"], "more": own}))["more"].recipes[0].model.tokenizer == "another"


PREFER = {"recipe": "tiny/dpo-lora", "model": {"from": "base"}, "adapter": {"from": "adapt"}, "set": {"model.lora": None}}


def test_the_adapter_of_another_stage_is_gone_on_from_and_not_merged(chain, tmp_path):
    plans = plans_of(chain(CHAIN | {"prefer": PREFER}))
    folder, model = tmp_path / "runs" / "chain", plans["prefer"].recipes[0].model
    assert (model.name_or_path, model.adapter, model.lora) == (f"{folder}/base/final", f"{folder}/adapt/final", None)
    assert plans["prefer"].stage.all_needs == ("base", "adapt")
    assert plans["prefer"].awaited == (f"{folder}/base/final", f"{folder}/adapt/final")
    only = plans_of(chain({name: part for name, part in (CHAIN | {"prefer": PREFER}).items() if name != "last"}))
    assert not only["adapt"].merged
    one = PREFER | {"adapter": {"from": "rates", "element": 1}}
    assert plans_of(chain(CHAIN | {"prefer": one}))["prefer"].recipes[0].model.adapter == f"{folder}/rates/01-learning_rate=0.01/final"


def test_the_adapter_that_a_stage_began_from_is_known_again(tmp_path):
    adapter, run = tmp_path / "final", RunDir(tmp_path / "run")
    for place in (adapter, run.final):
        place.mkdir(parents=True)
    (adapter / "adapter_model.safetensors").write_text("weights")
    (adapter / "adapter_config.json").write_text(json.dumps({"r": 2, "base_model_name_or_path": "here"}))
    (run.final / "harness.json").write_text(json.dumps({"lineage": [{}, {"adapter_digest": digest_adapter(adapter)}]}))
    assert is_gone_on_from(run, adapter)
    (adapter / "adapter_config.json").write_text(json.dumps({"r": 2, "base_model_name_or_path": "there"}))
    assert is_gone_on_from(run, adapter)
    (adapter / "adapter_model.safetensors").write_text("others")
    assert not is_gone_on_from(run, adapter)


def test_one_run_of_an_array_can_be_gone_on_from(chain, tmp_path):
    best = {"recipe": "tiny/sft-lora", "model": {"from": "rates", "element": 1}}
    plans = plans_of(chain(CHAIN | {"best": best}))
    assert plans["best"].recipes[0].model.name_or_path == f"{tmp_path}/runs/chain/rates/01-learning_rate=0.01/merged"
    assert plans["rates"].merged == {1}


def test_overrides_go_to_the_recipe_of_a_stage(chain, tmp_path):
    file = chain()
    plans = plans_of(file, "adapt.train.max_steps=3", "last.model.lora.target_modules=[q_proj,v_proj]", "output_dir=there")
    assert plans["adapt"].recipes[0].train.max_steps == 3
    assert plans["last"].recipes[0].model.lora.target_modules == ("q_proj", "v_proj")
    assert plans["base"].runs[0].path == tmp_path / "there" / "base"


def test_stages_may_stand_in_any_order_and_begin_after_all_that_they_need(chain):
    assert load_pipeline(chain({name: CHAIN[name] for name in reversed(CHAIN)})).order == ["base", "rates", "adapt", "last"]


def test_the_resolved_file_means_the_same(chain, tmp_path):
    pipeline = load_pipeline(chain(), ["adapt.train.max_steps=3"])
    save_pipeline(pipeline)
    again = load_pipeline(pipeline.folder / "pipeline.yaml")
    assert again == pipeline.model_copy(update={"output_dir": str(pipeline.folder)})
    assert find_pipeline(str(pipeline.folder)) == pipeline.folder / "pipeline.yaml"
    assert render_pipeline(again) == (pipeline.folder / "pipeline.yaml").read_text()


def test_a_recipe_is_no_pipeline():
    assert find_pipeline("tiny/sft-lora") is None and find_pipeline("no/such/file") is None


def test_every_key_of_the_file_is_explained():
    sections = [Pipeline, *(kind for kind in Section.__subclasses__() if kind.__module__ == Pipeline.__module__)]
    assert leaf_keys(Pipeline)["from"] == "stages.model.from"
    unexplained = {"stages", "recipe", "model", "stage"}
    for section in sections:
        for name, field in section.model_fields.items():
            assert field.description or name in unexplained or section.__doc__, name


def changed(name: str, **changes) -> dict:
    return CHAIN | {name: CHAIN[name] | changes}


@pytest.mark.parametrize(
    ("stages", "why"),
    [
        ({}, "stages = {}; must be"),
        ({"a b": CHAIN["base"]}, "stages.a b: 'a b' cannot be the name of a folder"),
        ({"cluster": CHAIN["base"]}, "'cluster' cannot be the name"),
        ({"base": {}}, "stages.base.recipe: is required"),
        (changed("adapt", need=["base"]), "stages.adapt.need: unknown key in stages.adapt; did you mean `needs`"),
        (changed("adapt", depends_on=["base"]), "`depends_on` is `needs` here"),
        (changed("adapt", model={"form": "base"}), "stages.adapt.model.form: unknown key in stages.adapt.model; did you mean `from`"),
        (changed("adapt", recipe="tiny/sft-lorra"), "stages.adapt: tiny/sft-lorra: no such recipe"),
        (changed("adapt", set={"train.max_steps": -1}), r"stages.adapt: .*sft-lora.yaml: train.max_steps = -1; must be"),
        (changed("adapt", set={"train": {"max_steps": 1}}), "would replace the whole section; write train.max_steps"),
        (changed("adapt", set={"output_dir": "x"}), "stages.adapt.set.output_dir: a stage lies in runs/chain/adapt"),
        (changed("adapt", set={"model.name_or_path": "x"}), "the model is from base; remove one of the two"),
        (changed("adapt", needs=["adapt"]), "stages.adapt needs itself"),
        (changed("adapt", needs=["bsae"]), "stages.adapt needs bsae, which is no stage; did you mean base"),
        (changed("adapt", model={"from": "nothing"}), "needs nothing, which is no stage; there are base, adapt, rates, last"),
        (changed("base", needs=["last"]), "stages: base needs last needs adapt needs base, so none of them could begin"),
        (changed("last", model={"from": "rates"}), "that array makes 2 models; say which: {from: rates, element: 0}"),
        (changed("last", model={"from": "rates", "element": 2}), "element = 2; rates has the elements 0 to 1"),
        (changed("last", model={"from": "adapt", "element": 0}), "element = 0; adapt is no array"),
        (
            CHAIN | {"prefer": PREFER | {"adapter": {"from": "base"}, "model": None}},
            "stages.prefer: adapter.from = base; that stage trains all",
        ),
        (
            CHAIN | {"prefer": PREFER | {"model": {"from": "adapt"}}},
            "stages.prefer.adapter.from = adapt; the model from there is its adapter",
        ),
        (CHAIN | {"prefer": PREFER | {"adapter": {"from": "rates"}}}, "stages.prefer.adapter.from = rates; that array makes 2 models"),
        (
            CHAIN | {"prefer": PREFER | {"set": {"model.adapter": "x"}}},
            "set.model.adapter: the adapter is from adapt; remove one of the two",
        ),
        (CHAIN | {"ask": ASK | {"adapter": {"from": "adapt"}}}, "stages.ask.adapter: it makes no model, and asks the teacher"),
        (changed("adapt", at_once=2), "stages.adapt.at_once = 2; the stage has no array"),
        (changed("rates", array={"train.seed": []}), "stages.rates.array.train.seed = \\[\\]; must be a list of at least 1"),
        (changed("rates", set={"train.learning_rate": 1}), "array train.learning_rate: train.learning_rate is also set to one value"),
        (changed("rates", array={"model.name_or_path": ["a", "b"]}), "array model.name_or_path: .* also set"),
        (changed("adapt", nodes=0), "stages.adapt.nodes = 0; must be > 0"),
        (changed("adapt", do="captrue"), 'stages.adapt.do = "captrue"; must be train or capture'),
        (changed("adapt", shards=2), "stages.adapt.shards = 2; a training is not shared out so; remove it, or .* `do: capture`"),
        (CHAIN | {"ask": ASK | {"model": {"from": "base"}}}, "stages.ask.model: it makes no model, and asks the teacher"),
        (CHAIN | {"ask": ASK | {"array": {"teacher.cap": [1, 2]}}}, "stages.ask.array: its units are shared out by `shards`"),
        (
            CHAIN | {"ask": ASK, "own": {"recipe": "tiny/sft-lora", "model": {"from": "ask"}}},
            "that stage makes no model .*; write `needs: ",
        ),
        (CHAIN | {"ask": ASK | {"recipe": "tiny/sft-lora"}}, "stages.ask: task = sft; it has no teacher to capture"),
        (CHAIN | {"ask": ASK | {"recipe": "tiny/distill-resident"}}, "stages.ask: teacher.source = resident; it is asked beside"),
        (
            {"ask": ASK, "learn": LEARN | {"set": {"data.max_length": 128}}},
            "stages.learn: data.max_length = 128; ask, which it needs, captures with 256, so its cache would not be found; set both alike",
        ),
        (
            {"ask": ASK, "learn": LEARN | {"set": {"teacher.cap": 9}}},
            "stages.learn: teacher.cap = 9; ask, which it needs, captures with 64",
        ),
    ],
)
def test_what_is_wrong_with_a_pipeline_is_said_with_its_place_and_a_remedy(chain, stages, why):
    with pytest.raises(RecipeError, match=why):
        plans_of(chain(stages))


def test_everything_that_is_wrong_with_the_recipes_is_said_at_once(chain):
    stages = changed("adapt", set={"train.max_steps": -1}) | {"base": {"recipe": "gone"}}
    with pytest.raises(RecipeError) as error:
        plans_of(chain(stages))
    # adapt and rates go on from base, which nobody knows.
    assert [line.split(":")[0] for line in str(error.value).splitlines()] == ["stages.base"]
    with pytest.raises(RecipeError) as error:
        plans_of(chain(stages | {"base": CHAIN["base"], "other": {"recipe": "gone"}}))
    assert [line.split(":")[0] for line in str(error.value).splitlines()] == ["stages.adapt", "stages.other"]


@pytest.mark.parametrize("override", ["adopt.train.max_steps=3", "train.max_steps=3", "adapt=3"])
def test_an_override_names_its_stage(chain, override):
    with pytest.raises(RecipeError, match="write STAGE.key.path=value, STAGE being one of base, adapt, rates, last"):
        load_pipeline(chain(), [override])


def test_one_stage_twice_is_refused(tmp_path):
    (tmp_path / "twice.yaml").write_text("stages:\n  a: {recipe: tiny/sft-full}\n  a: {recipe: tiny/sft-lora}\n")
    with pytest.raises(RecipeError, match="`a` already stands in line 2"):
        find_pipeline(str(tmp_path / "twice.yaml"))


# ---- sent to Slurm


def test_stages_are_sent_in_order_each_after_what_it_needs(chain, slurm, tmp_path):
    said = ask(submit, chain(), "--cluster", "cpu", "--after", 7)
    folder = tmp_path / "runs" / "chain"
    kill = "--kill-on-invalid-dep=yes"
    assert slurm.sent == [
        f"--dependency=afterok:7 {kill} {folder}/base/job.sbatch",
        f"--dependency=afterok:100 {kill} {folder}/adapt/job.sbatch",
        f"--dependency=afterok:100 {kill} {folder}/rates/array.sbatch",
        f"--dependency=afterok:101:102 {kill} {folder}/last/job.sbatch",
    ]
    assert [read_job(RunDir(folder / name))["merge"] for name in ("base", "adapt", "last")] == [False, True, False]
    assert "adapt: job 101, after base\n" in said and f"harness status {folder}" in said
    assert read_job(RunDir(folder / "rates" / "01-learning_rate=0.01"))["jobs"][-1]["id"] == "102_1"


def test_a_stage_has_a_cluster_nodes_and_a_time_of_its_own(chain, slurm, tmp_path):
    (tmp_path / "other.yaml").write_text("{partition: other, time: '60', signal_lead_s: 60}")
    own = {"cluster": "other.yaml", "nodes": 2, "time": "2:00:00", "set": {"backend": "ddp"}}
    ask(submit, chain(changed("adapt", **own)), "--cluster", "cpu", "cluster.account=me")
    script = stage(tmp_path, "adapt").joinpath("job.sbatch").read_text()
    assert all(f"#SBATCH --{flag}\n" in script for flag in ("partition=other", "nodes=2", "time=2:00:00", "account=me"))
    assert "--partition" not in stage(tmp_path, "last").joinpath("job.sbatch").read_text()
    with pytest.raises(RecipeError, match="signal_lead_s = 120; the whole job is 60 s"):
        ask(submit, chain(changed("adapt", time=1)), "--cluster", "cpu", "output_dir=runs/short")


def test_without_a_cluster_a_pipeline_is_refused_unless_each_stage_names_one(chain, slurm):
    with pytest.raises(RecipeError, match="--cluster is not given"):
        ask(submit, chain())
    ask(submit, chain({"only": CHAIN["base"] | {"cluster": "cpu"}}))


def test_a_dry_run_prints_the_scripts_of_all_stages_and_makes_nothing(chain, slurm, tmp_path):
    printed = ask(submit, chain(), "--cluster", "cpu", "--dry-run")
    assert printed.count("#!/bin/bash\n") == 4 and slurm.sent == [] and not (tmp_path / "runs").exists()


def test_sent_again_a_pipeline_leaves_out_what_is_done_and_keeps_what_lives(chain, slurm, tmp_path, monkeypatch):
    ask(submit, chain(), "--cluster", "cpu")
    finish(stage(tmp_path, "base"), weights="b")
    slurm.lives("102_0", "102_1")
    # By its folder, from elsewhere, on the cluster that it was sent to.
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    said = ask(submit, "../runs/chain")
    assert [line.split(" ")[-1] for line in slurm.sent[4:]] == [f"{stage(tmp_path, name)}/job.sbatch" for name in ("adapt", "last")]
    assert "--dependency" not in slurm.sent[4] and "--dependency=afterok:104:102_0:102_1 " in slurm.sent[5]
    assert f"--chdir={tmp_path}" in slurm.asked("sbatch")[4]
    assert "base: complete\n" in said and "rates: job 102_0, 102_1 lives and is kept\n" in said


def test_a_stage_that_was_trained_and_not_merged_is_not_done(chain, slurm, tmp_path):
    ask(submit, chain(), "--cluster", "cpu")
    for name, base in (("base", None), ("adapt", digest_of("b"))):
        finish(stage(tmp_path, name), weights="b", base=base)
    assert not plans_of(chain())["adapt"].all_done
    finish_merge(stage(tmp_path, "adapt"), "m")
    assert plans_of(chain())["adapt"].all_done
    # What lies there was merged from another adapter.
    manifest = stage(tmp_path, "adapt") / "merged" / "harness.json"
    manifest.write_text(manifest.read_text().replace('"step": 2', '"step": 1'))
    assert not plans_of(chain())["adapt"].all_done


def digest_of(weights: str) -> str:
    import hashlib

    return hashlib.sha256(f"model.safetensors {weights}\n".encode()).hexdigest()


def test_the_digest_of_a_base_is_told_from_what_its_export_says_of_itself(tmp_path):
    model = tmp_path / "final"
    model.mkdir()
    for name in ("model-00002.safetensors", "model-00001.safetensors", "config.json"):
        (model / name).write_text(name)
    files = {file.name: digest_file(file) for file in model.iterdir()}
    (model / "harness.json").write_text(json.dumps({"files": files}))
    run = RunDir(tmp_path / "run")
    for digest, same in ((digest_base(str(model)), True), ("another", False)):
        run.final.mkdir(parents=True, exist_ok=True)
        (run.final / "harness.json").write_text(json.dumps({"base_digest": digest}))
        assert is_made_from(run, model) is same


def test_a_stage_that_was_made_from_what_is_no_more_is_refused(chain, slurm, tmp_path):
    ask(submit, chain(), "--cluster", "cpu")
    finish(stage(tmp_path, "adapt"), base=digest_of("b"))
    finish_merge(stage(tmp_path, "adapt"), "m")
    with pytest.raises(LaunchError, match="stage adapt: is complete, but base, which it needs, is not"):
        ask(submit, chain(), "--cluster", "cpu")
    finish(stage(tmp_path, "base"), weights="another")
    with pytest.raises(LaunchError, match="stage adapt: was made from another model than the one that lies in .*base/final now"):
        ask(submit, chain(), "--cluster", "cpu")
    assert len(slurm.sent) == 4
    ask(submit, chain(), "--cluster", "cpu", "--fresh")
    assert len(slurm.sent) == 8


def test_a_stage_that_lives_otherwise_than_it_is_asked_for_is_refused(chain, slurm, tmp_path):
    ask(submit, chain(), "--cluster", "cpu")
    slurm.lives("100")
    with pytest.raises(LaunchError, match="stage base: job 100 of it lives with another recipe than this"):
        ask(submit, chain(), "--cluster", "cpu", "base.train.seed=7")
    with pytest.raises(LaunchError, match="job 100 of this run lives"):
        ask(submit, chain(), "--cluster", "cpu", "--fresh")
    slurm.lives("101")
    with pytest.raises(LaunchError, match="stage adapt: a job of it lives, but base, which it needs, must begin first"):
        ask(submit, chain(), "--cluster", "cpu")
    finish(stage(tmp_path, "base"))
    slurm.lives("102_0")
    with pytest.raises(LaunchError, match="job 102_0 of it lives, and 01-learning_rate=0.01 has failed"):
        ask(submit, chain(), "--cluster", "cpu")
    assert len(slurm.sent) == 4


def test_a_stage_that_lives_does_not_learn_that_it_is_to_be_merged(chain, slurm, tmp_path):
    alone = {name: CHAIN[name] for name in ("base", "adapt")}
    ask(submit, chain(alone), "--cluster", "cpu")
    finish(stage(tmp_path, "base"), weights="b")
    slurm.lives("101")
    with pytest.raises(LaunchError, match="job 101 of it lives and will not merge its adapter"):
        ask(submit, chain(), "--cluster", "cpu")
    slurm.lives()
    finish(stage(tmp_path, "adapt"), base=digest_of("b"))
    # It is sent again, for the merge alone.
    assert "adapt: job 102" in ask(submit, chain(), "--cluster", "cpu")


def test_a_stage_can_be_sent_again_alone_and_is_what_it_was(chain, slurm, tmp_path):
    ask(submit, chain(), "--cluster", "cpu")
    finish(stage(tmp_path, "base"))
    assert "job 104" in ask(submit, stage(tmp_path, "adapt"))
    facts = read_job(RunDir(stage(tmp_path, "adapt")))
    assert facts["merge"] and [job["id"] for job in facts["jobs"]] == ["101", "104"]


def test_when_one_stage_is_refused_those_before_it_are_cancelled(chain, tmp_path, monkeypatch):
    slurm = CountingSlurm(tmp_path / "bin", monkeypatch, refused=102)
    with pytest.raises(ClusterError, match="partition"):
        ask(submit, chain(), "--cluster", "cpu")
    assert [call[-1] for call in slurm.asked("scancel")] == ["100", "101"]


def test_a_stage_whose_data_is_not_there_keeps_all_from_being_sent(chain, slurm, tmp_path):
    with pytest.raises(LaunchError, match="data.train.0.path = ./gone.jsonl"):
        ask(submit, chain(), "--cluster", "cpu", "last.data.train.0.path=./gone.jsonl")
    assert slurm.sent == [] and not (tmp_path / "runs").exists()


def test_what_stages_say_themselves_is_no_option_of_the_command(chain, slurm):
    for option in (("--nodes", 2), ("--time", "60"), ("--array", "a=1"), ("--at-once", 1), ("--allow-change", "data")):
        with pytest.raises(RecipeError, match=f"{option[0]}: .*chain.yaml is a pipeline, and its stages say this"):
            ask(submit, chain(), "--cluster", "cpu", *option)


def test_a_pipeline_does_not_lie_in_the_folder_of_a_run(chain, slurm, tmp_path):
    (tmp_path / "runs" / "chain").mkdir(parents=True)
    (tmp_path / "runs" / "chain" / "recipe.yaml").touch()
    with pytest.raises(LaunchError, match="is a run's folder; choose another output_dir"):
        ask(submit, chain(), "--cluster", "cpu")


# ---- work that is shared out


def test_a_capture_is_an_array_of_shards_of_one_recipe_and_what_learns_from_it_waits_for_all(chain, slurm, tmp_path):
    ask(submit, chain({"ask": ASK | {"nodes": 2, "time": "2:00:00"}, "learn": LEARN}), "--cluster", "cpu")
    folder, kill = tmp_path / "runs" / "chain", "--kill-on-invalid-dep=yes"
    assert slurm.sent == [f"{folder}/ask/array.sbatch", f"--dependency=afterok:100 {kill} {folder}/learn/job.sbatch"]
    script = (folder / "ask" / "array.sbatch").read_text()
    assert "#SBATCH --array=0-2%2\n" in script and "#SBATCH --nodes=2\n" in script and "#SBATCH --time=2:00:00\n" in script
    for shard in range(3):
        run = RunDir(folder / "ask" / f"shard-00{shard}")
        assert read_share(run) == Share("capture", 3, shard) and read_job(run)["jobs"][-1]["id"] == f"100_{shard}"
        assert f"{run.path}\n" in script
    assert read_share(RunDir(folder / "learn")) is None


def test_a_teacher_that_is_spread_over_a_machine_is_one_process_of_it_and_not_spread_over_several(chain, slurm, tmp_path):
    (tmp_path / "gpus.yaml").write_text("{gpus_per_node: 4}")
    stages = {"ask": ASK | {"set": {"teacher.device_map": "auto"}}, "shared": ASK | {"set": {"backend": "zero3"}, "nodes": 2}}
    ask(submit, chain(stages), "--cluster", "gpus.yaml")
    ranks = {name: read_job(RunDir(stage(tmp_path, name) / "shard-000"))["processes_per_node"] for name in stages}
    assert ranks == {"ask": 1, "shared": 4}
    with pytest.raises(RecipeError, match="device_map = auto; one process takes all GPUs of its machine, and 2 were asked for"):
        ask(submit, chain({"ask": stages["ask"] | {"nodes": 2}}), "--cluster", "gpus.yaml", "output_dir=runs/wide")


def capture_units(folder: Path, there: int, count: int = 4, shard: int = 0) -> None:
    """Write what a life of a shard leaves that has found so many units done."""
    run, units = RunDir(folder / f"shard-00{shard}"), folder.parents[2] / "units"
    units.mkdir(exist_ok=True)
    for unit in range(there):
        (units / f"unit-0000{unit}.tc").touch()
    Ledger(run.ledger, None).append("job_began", job="of this run", restart=0, hosts=[])
    life = run.open_attempt()
    run.write_manifest(load(run.recipe), units={"folder": str(units), "count": count})
    if there == count:
        write_outcome(life, "done", step=None, checkpoint=None, reason="")


def test_a_capture_is_done_when_all_units_are_there_whoever_did_them(chain, slurm, tmp_path):
    file = chain({"ask": ASK, "learn": LEARN})
    ask(submit, file, "--cluster", "cpu")
    capture_units(stage(tmp_path, "ask"), there=3)
    assert " units 3/4 job 100 " in " ".join(drawn_line(tmp_path, "ask")) and not plans_of(file)["ask"].all_done
    capture_units(stage(tmp_path, "ask"), there=4, shard=2)
    assert drawn_line(tmp_path, "ask") == ["ask", "done", "units", "4/4", "job", "100"]
    assert "ask: complete\nlearn: job 102" in ask(submit, file, "--cluster", "cpu")
    # The cache has lost a part of it: those go again that do not find themselves done.
    (tmp_path / "units" / "unit-00001.tc").unlink()
    ask(submit, file, "--cluster", "cpu")
    assert slurm.sent[-2].endswith("ask/array.sbatch") and "--dependency=afterok:103 " in slurm.sent[-1]


def drawn_line(tmp_path: Path, name: str) -> list[str]:
    return next(line.split() for line in draw_pipeline(tmp_path / "runs" / "chain").splitlines() if line.split()[0] == name)


def test_a_cache_may_go_when_all_that_learn_from_it_are_done(chain, slurm, tmp_path):
    file = chain({"ask": ASK, "learn": LEARN})
    ask(submit, file, "--cluster", "cpu")
    finish(stage(tmp_path, "learn"))
    assert ask(submit, file, "--cluster", "cpu").count(": complete\n") == 2
    # Another student needs it again.
    assert "ask: job 102" in ask(submit, chain({"ask": ASK, "learn": LEARN, "more": LEARN}), "--cluster", "cpu")


def test_a_cache_that_the_nodes_may_not_share_is_warned_of(chain, slurm, tmp_path, monkeypatch):
    (tmp_path / "shared").mkdir()
    (tmp_path / "shares.yaml").write_text(json.dumps({"shared": [str(tmp_path / "shared")]}))
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "mine"))
    file = chain({"ask": ASK})
    warned = f"warning: the cache goes to {tmp_path}/mine, which is in none of the cluster file's `shared` folders"
    assert ask(submit, file, "--cluster", "shares.yaml", "--dry-run").count(warned) == 1
    assert "warning:" not in ask(submit, file, "--cluster", "shares.yaml", "--dry-run", f"ask.teacher.cache={tmp_path}/shared/llama")
    assert "warning:" not in ask(submit, file, "--cluster", "cpu", "--dry-run")


def test_a_student_may_say_otherwise_what_does_not_decide_where_the_cache_lies(chain):
    free = {"data.packing": False, "teacher.attn_implementation": "eager", "backend": "zero2", "train.seed": 7}
    assert plans_of(chain({"ask": ASK, "learn": LEARN | {"set": free}}))
    named = {"ask": ASK | {"set": {"teacher.cache": "llama"}}, "learn": LEARN | {"set": {"teacher.cache": "llama", "data.max_length": 128}}}
    assert plans_of(chain(named))


def test_a_shard_can_be_sent_again_alone_and_is_what_it_was(chain, slurm, tmp_path):
    ask(submit, chain({"ask": ASK}), "--cluster", "cpu")
    shard = RunDir(stage(tmp_path, "ask") / "shard-001")
    assert "job 101" in ask(submit, shard.path) and read_share(shard) == Share("capture", 3, 1)
    with pytest.raises(LaunchError, match="does a share of `harness capture` and trains nothing; go on with the pipeline"):
        ask(run_verb, shard.recipe)


# ---- drawn


def test_status_draws_each_stage_with_its_job_and_what_it_needs(chain, slurm, tmp_path):
    ask(submit, chain(), "--cluster", "cpu")
    finish(stage(tmp_path, "base"))
    finish(stage(tmp_path, "rates") / "00-learning_rate=0.001")
    lines = [line.split() for line in ask(status, "runs/chain").splitlines()]
    assert lines[0] == [str(tmp_path / "runs" / "chain")]
    assert lines[1][:2] == ["base", "done"] and lines[1][-2:] == ["job", "100"]
    assert lines[2][0] == "adapt" and lines[2][lines[2].index("<-") :][:2] == ["<-", "base"]
    assert "1 done," in " ".join(lines[3]) and "102" in lines[3]
    assert " ".join(lines[4]).endswith("nothing says how it ended") or "<- adapt, rates" in " ".join(lines[4])
    assert len(json.loads(ask(status, "runs/chain", "--json"))) == 5


def test_what_has_not_been_sent_is_drawn_too(chain, tmp_path):
    save_pipeline(load_pipeline(chain()))
    assert [line.split()[:3] for line in draw_pipeline(tmp_path / "runs" / "chain").splitlines()[1:]] == [
        ["base", "new", "no"],
        ["adapt", "new", "<-"],
        ["rates", "2", "new"],
        ["last", "new", "<-"],
    ]


# ---- on one machine


@pytest.fixture
def trained(monkeypatch):
    """The runs that `harness run` would have trained, by name; `codes` are how they end."""
    names, codes = [], {}

    def run_recipe(recipe, machines, *, fresh, share):
        folder = RunDir.of(recipe).path
        names.append(folder.name)
        code = codes.get(folder.name, 0)
        if isinstance(code, Exception):
            raise code
        if code == 0:
            from harness.recipe import render_recipe

            folder.mkdir(parents=True, exist_ok=True)
            write_text_atomically(folder / "recipe.yaml", render_recipe(recipe))
            base = Path(recipe.model.name_or_path or "")
            made = json.loads((base / "harness.json").read_text())["files"]["model.safetensors"] if recipe.model.name_or_path else None
            finish(folder, weights=f"of {folder.name}", base=made and digest_of(made))
        return code

    def merge(run):
        names.append(f"{run.path.name} merged")
        finish_merge(run.path, "merged")
        return codes.get(names[-1], 0)

    monkeypatch.setattr(run_verb, "run_recipe", run_recipe)
    monkeypatch.setattr(run_verb, "merge", merge)
    names_and_codes = type("Trained", (), {"names": names, "codes": codes})
    return names_and_codes


ALL = ["base", "adapt", "adapt merged", "00-learning_rate=0.001", "01-learning_rate=0.01", "last"]


def test_on_one_machine_the_stages_run_one_after_the_other_and_only_once(chain, trained):
    assert answer(run_verb, chain()).exit_code == 0 and trained.names == ALL
    again = answer(run_verb, chain())
    assert again.exit_code == 0 and trained.names == ALL and again.output.count(": complete\n") == 5
    assert answer(run_verb, chain(), "--fresh").exit_code == 0 and trained.names == ALL * 2


@pytest.mark.parametrize(
    ("what", "code", "ran", "left"),
    [("adapt", 1, 2, "rates, last"), ("adapt", 75, 2, "rates, last"), ("adapt merged", 1, 3, "rates, last"), ("last", 2, 6, "")],
)
def test_the_first_stage_that_does_not_end_well_stops_the_others_with_its_code(chain, trained, what, code, ran, left):
    trained.codes[what] = code
    done = answer(run_verb, chain())
    assert done.exit_code == code and trained.names == ALL[:ran]
    name = what.split()[0]
    assert f"{name} did not come to its end" + (f"; not run: {left}" if left else "") + "; the same command goes on" in done.output
    del trained.codes[what]
    assert answer(run_verb, chain()).exit_code == 0 and {*trained.names} == {*ALL}


def test_on_one_machine_one_run_does_all_that_would_be_shared_out(chain, monkeypatch, tmp_path):
    begun = []

    def run_recipe(recipe, machines, *, fresh, share):
        begun.append((RunDir.of(recipe).path.relative_to(tmp_path / "runs" / "chain").as_posix(), share, machines.processes))
        return 0

    monkeypatch.setattr(run_verb, "run_recipe", run_recipe)
    spread = ASK | {"set": {"teacher.device_map": "auto", "backend": "zero3"}}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    answer(run_verb, chain({"ask": ASK | {"set": {"backend": "ddp"}}, "spread": spread, "learn": LEARN}))
    whole = Share("capture", 1, 0)
    assert begun == [("ask/shard-000", whole, 2), ("spread/shard-000", whole, 1), ("learn", None, 1)]


def test_an_error_with_a_name_stops_them_too(chain, trained):
    trained.codes["00-learning_rate=0.001"] = DataError("rows.jsonl:3: no row")
    with pytest.raises(DataError):
        answer(run_verb, chain())
    assert trained.names == ALL[:4]


def test_on_one_machine_too_everything_is_checked_before_the_first_stage(chain, trained, monkeypatch):
    for overrides, error in (
        (["last.data.train.0.path=./gone.jsonl"], "gone.jsonl"),
        (["last.backend=no-such"], "no-such"),
        (["last.train.global_batch_size=7"], "global_batch_size = 7"),
        (["--resume"], "--resume: .*chain.yaml is a pipeline"),
        (["--backend", "ddp"], "--backend"),
        (["--smoke"], "--smoke"),
        (["--allow-change", "data"], "--allow-change"),
    ):
        with pytest.raises((LaunchError, RecipeError), match=error):
            answer(run_verb, chain(), *overrides)
    monkeypatch.setenv("NNODES", "2")
    with pytest.raises(RecipeError, match="a pipeline runs on one machine, or on a cluster by `harness submit`"):
        answer(run_verb, chain())
    assert trained.names == []


@pytest.mark.slow
def test_a_real_chain_passes_weights_and_tokenizer_on(chain, tmp_path):
    """base -> an adapter on it -> an adapter on that one's merged model."""
    short = {"train.max_steps": 2, "train.warmup_steps": 1}
    stages = {name: CHAIN[name] | {"set": short} for name in ("base", "adapt")}
    stages["last"] = {"recipe": "tiny/sft-lora", "model": {"from": "adapt"}, "set": short}
    done = harness("run", chain(stages), "--processes", 1, cwd=tmp_path, OMP_NUM_THREADS="1")
    assert done.code == 0, done.output
    made = {name: json.loads((stage(tmp_path, name) / "final" / "harness.json").read_text()) for name in stages}
    assert made["adapt"]["base_digest"] == digest_base(str(stage(tmp_path, "base") / "final"))
    assert made["last"]["base_digest"] == digest_base(str(stage(tmp_path, "adapt") / "merged"))
    tokenizers = {(stage(tmp_path, name) / "final" / "tokenizer.json").read_bytes() for name in stages}
    templates = {(stage(tmp_path, name) / "final" / "chat_template.jinja").read_bytes() for name in stages}
    assert len(tokenizers) == len(templates) == 1
    assert harness("run", "chain.yaml", cwd=tmp_path).output == "base: complete\nadapt: complete\nlast: complete\n"


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_real_capture_that_is_stopped_goes_on_and_the_student_learns_from_it(tmp_path):
    settings = [f"{stage}.teacher.{of}" for stage in ("capture", "student") for of in ("unit_tokens=1000", f"cache={tmp_path / 'cache'}")]
    argv = [sys.executable, "-m", "harness", "run", "pipelines/tiny-distill", "student.train.max_steps=3", *settings]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    first = subprocess.Popen(argv, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    said = []
    for line in first.stdout:
        said.append(line)
        if line.startswith("unit 0"):
            first.send_signal(signal.SIGTERM)
            break
    said = "".join(said) + first.communicate(timeout=240)[0]
    assert first.returncode == 75 and "stopped between two units (SIGTERM to harness run" in said, said
    assert re.search(
        r"; [1-9]\d? of 45 units are there; the same command continues\ncapture did not come to its end; not run: student", said
    )
    run = RunDir(tmp_path / "runs" / "tiny-distill" / "capture" / "shard-000")
    assert not run.stop.exists() and read_status(run, None, None).go_on == f"harness run {tmp_path}/runs/tiny-distill"
    again = harness(*argv[3:], cwd=tmp_path, OMP_NUM_THREADS="1")
    assert again.code == 0 and "45 of 45 units, all are there" in again.output, again.output
    assert (tmp_path / "runs" / "tiny-distill" / "student" / "final").is_dir()
    assert "  units   45 of 45 (100 %)\n" in (block := ask(status, run.path)) and "commit" not in block and "next" not in block
    assert harness(*argv[3:], cwd=tmp_path).output == "capture: complete\nstudent: complete\n"
