"""`harness plan`, as a process and as a verb: what it says, how it ends, and that it is quick; the refusal of `harness submit`."""

import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from harness.cli import plan as verb
from harness.cluster.schema import load_cluster
from harness.cluster.submission import Submission, check_can_fit
from harness.errors import HarnessError, LaunchError, ModelError, RecipeError
from harness.planner.architecture import load_architecture
from harness.planner.gpus import GIB, parse_gpu
from harness.planner.headers import recipes, render_header
from harness.planner.host import plan_disk, plan_host
from harness.planner.plan import Place, build_setting, plan_recipe
from harness.recipe import load
from harness.recipe.load import apply_override
from harness.resources import shipped

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "cluster"))

from sent import CountingSlurm, ask  # noqa: E402

CPU_LIMIT_S = 0.6
HEAVY = ("torch", "transformers", "datasets", "trl", "accelerate", "deepspeed", "peft", "bitsandbytes", "wandb", "pyarrow", "numpy")
FULL, QLORA = "sft/llama3.1-8b-tools-full-zero3", "sft/llama3-8b-tools-qlora"


def plan(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(verb.command, list(arguments))
    if isinstance(done.exception, HarnessError):
        raise done.exception
    return done.exit_code, done.output


def test_it_never_imports_anything_heavy():
    arguments = ["plan", FULL, "--gpu", "24GiB", "--processes", "8", "--fit"]
    done = subprocess.run([sys.executable, "-X", "importtime", "-m", "harness", *arguments], capture_output=True, text=True)
    imported = set(re.findall(r"\|\s+([\w.]+)$", done.stderr, re.MULTILINE))
    assert "harness.planner.fit" in imported and done.returncode == 0
    assert imported & set(HEAVY) == set()


@pytest.mark.parametrize("arguments", [[QLORA, "--gpu", "24GiB"], [FULL, "--gpu", "24GiB", "--processes", "8"]])
def test_it_answers_within_its_limit(arguments):
    def cpu_seconds() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        argv = [sys.executable, "-m", "harness", "plan", *arguments]
        subprocess.run(argv, stdout=subprocess.DEVNULL, env={**os.environ, "PYTHONDONTWRITEBYTECODE": ""})
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(cpu_seconds() for _ in range(5)) < CPU_LIMIT_S


def test_it_prints_every_component_low_expected_and_high_and_the_dominant_one():
    code, said = plan(QLORA, "--gpu", "24GiB")
    assert code == 0
    for name in ("weights", "4-bit constants", "adapter", "optimiser", "activations kept", "activations of one layer", "CUDA context"):
        assert re.search(rf"^  {name} +[\d.]+ +[\d.]+ +[\d.]+$", said, re.MULTILINE), said
    assert "fits 24GiB (24.0 GiB), even at its highest; most of it: weights" in said
    assert "host memory of a node" in said and "one checkpoint" in said and "FLOP a token" in said
    assert "shapes known to harness, no config.json at hand" in said


def test_what_does_not_fit_leaves_with_1_and_three_changes_that_fit_when_they_are_planned():
    code, said = plan(FULL, "--gpu", "24GiB", "--processes", "8", "--json")
    answer = json.loads(said)
    assert (code, answer["verdict"], answer["fits"], len(answer["changes"])) == (1, "does not fit", False, 3)
    for change in answer["changes"]:
        recipe = load(FULL, change["overrides"])
        again = plan_recipe(recipe, Place(8, change["nodes"] or 1, parse_gpu("24GiB")))
        assert again.fits and round(again.memory.peak.expected) == change["peak"]["expected"]
        assert recipe.train.global_batch_size == 64


def test_no_change_is_said_twice():
    _, said = plan("sft/qwen2.5-7b-tools-lora", "--gpu", "17.5GiB", "--json")
    overrides = [tuple(change["overrides"]) for change in json.loads(said)["changes"]]
    assert len(overrides) == len(set(overrides)) == 3
    assert ("train.per_device_train_batch_size=1", "train.global_batch_size=16") in overrides


def test_twice_the_nodes_are_the_same_global_batch_also_where_the_recipe_says_the_accumulation():
    asked = ["train.global_batch_size=null", "train.gradient_accumulation_steps=4"]
    _, said = plan(FULL, "--gpu", "24GiB", "--processes", "8", "--json", *asked)
    (change,) = [change for change in json.loads(said)["changes"] if change["nodes"]]
    assert change["step_ratio_by_arithmetic"] == pytest.approx(0.5, abs=0.1)
    setting = build_setting(load(FULL, [*asked, *change["overrides"]]), Place(8, 2))
    assert setting.accumulation * setting.recipe.train.per_device_train_batch_size * setting.world == 4 * 2 * 8


def test_another_optimiser_is_another_run_also_where_it_comes_with_a_backend():
    _, said = plan(FULL, "--gpu", "16GiB", "--processes", "8", "--json", "train.optim=adamw_8bit")
    (change,) = [change for change in json.loads(said)["changes"] if "backend=zero3-offload" in change["overrides"]]
    assert change["is_other_run"]
    _, said = plan(FULL, "--gpu", "12GiB", "--processes", "8", "--fit", "train.optim=adamw_8bit")
    assert re.search(r"--fit: the fastest .* and is another run\):\n  backend=zero3-offload", said)


def test_what_does_not_go_into_the_hosts_memory_is_no_change_that_helps(tmp_path):
    def offers(memory_gib: int) -> bool:
        (tmp_path / "site.yaml").write_text(f"gpus_per_node: 8\ngpu_memory_gib: 24\nmemory_gib: {memory_gib}\n")
        _, said = plan(FULL, "--cluster", str(tmp_path / "site.yaml"), "--json")
        return any("backend=zero3-offload" in change["overrides"] for change in json.loads(said)["changes"])

    # 16 bytes of each of 8.03e9 weights, and a tenth, are 132 GiB; the ranks themselves 20.
    assert offers(155) and not offers(145)


def test_what_answers_is_planned_for_as_many_processes_as_share_the_work_and_has_nothing_to_search():
    arguments = ("distill/llama3.3-70b-answers", "--gpu", "a100-80g", "--json")
    alone, eight = (json.loads(plan(*arguments, "--processes", str(count))[1]) for count in (1, 8))
    assert alone["gpu_bytes"] == eight["gpu_bytes"] and eight["host_bytes"]["processes"]["low"] == 8 * GIB
    with pytest.raises(RecipeError, match="--fit: task = generate trains nothing"):
        plan(*arguments, "--fit")


def test_layers_that_are_spread_over_the_gpus_of_a_node_take_a_part_of_each():
    whole = 70_553_706_496 * 2
    wide = ("model.quantization=null", "generate.device_map=auto")
    code, said = plan("distill/llama3.3-70b-answers", "--gpu", "a100-80g", "--processes", "4", "--json", *wide)
    answer = json.loads(said)
    weights = answer["gpu_bytes"]["moments"]["writing"]["weights"]
    assert (code, weights["expected"]) == (0, whole / 4) and whole / 4 < weights["high"] < whole / 3
    # One process.
    assert answer["host_bytes"]["processes"]["low"] == GIB and answer["host_bytes"]["loading"]["expected"] == whole
    code, said = plan("distill/llama3.3-70b-answers", "--gpu", "a100-80g", "--json", *wide)
    assert code == 1 and json.loads(said)["verdict"] == "cannot fit"


def test_what_cannot_fit_at_all_is_said_so():
    code, said = plan(FULL, "--gpu", "8GiB", "--processes", "8", "model.name_or_path=meta-llama/Llama-3.3-70B-Instruct")
    assert code == 1 and "cannot fit 8GiB (8.00 GiB): its lowest is" in said


def test_a_search_finds_a_setting_at_the_same_global_batch_that_fits_and_is_no_slower_than_what_was_asked():
    code, said = plan(FULL, "--gpu", "h100", "--processes", "8", "--fit", "--json")
    found = json.loads(said)["fit"]
    assert code == 0 and found["step_ratio_by_arithmetic"] <= 1
    recipe = load(FULL, found["overrides"])
    assert recipe.train.global_batch_size == 64
    again = plan_recipe(recipe, Place(8, 1, parse_gpu("h100")))
    assert again.memory.peak.high <= parse_gpu("h100").bytes
    # It would fit without checkpointing, which costs a third.
    assert not recipe.train.gradient_checkpointing
    code, said = plan(FULL, "--gpu", "1GiB", "--processes", "8", "--fit")
    assert code == 1 and "nothing fits at this global batch" in said


def test_the_json_has_the_schema_of_its_page():
    page = (Path(__file__).parents[2] / "docs" / "plan.md").read_text()
    _, said = plan(QLORA, "--gpu", "24GiB", "--tokens", "1e7", "--tokens-per-s", "5000", "--json")
    answer = json.loads(said)
    for key in answer:
        assert f"`{key}`" in page, key
    assert answer["hours"]["hours"] == pytest.approx(3e7 / 5000 / 3600)
    peak = answer["gpu_bytes"]["peak"]
    assert peak["low"] < peak["expected"] < peak["high"] and answer["gpu_bytes"]["deciding"] in answer["gpu_bytes"]["moments"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--gpu", "h1000"], r"--gpu h1000: no such card; give a size \(24GiB\), or one of h100"),
        (["--fit"], "--fit: into what?"),
        (["--gpu", "h100", "--tokens-per-s", "5", "--measured", "x"], "keep one"),
        (["--processes", "2"], "backend = single is one process, but 2 were asked for"),
    ],
)
def test_a_wrong_command_says_what_would_be_right(arguments, said):
    with pytest.raises((RecipeError, LaunchError), match=said) as caught:
        plan(QLORA, *arguments)
    assert caught.value.exit_code == 2


def test_a_model_that_is_nowhere_is_refused_with_the_remedy(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    remedy = r"nobody/nothing: there is no config.json .* give a local folder, or download its config.json first"
    with pytest.raises(ModelError, match=remedy):
        plan(QLORA, "model.name_or_path=nobody/nothing")


def test_the_cluster_file_says_how_many_gpus_there_are_and_what_they_hold(tmp_path):
    (tmp_path / "site.yaml").write_text("gpus_per_node: 8\ngpu_type: h100\nmemory_gib: 100\n")
    code, said = plan(FULL, "--cluster", str(tmp_path / "site.yaml"), "--json")
    answer = json.loads(said)
    assert (code, answer["gpus_per_node"], answer["gpu"]["name"]) == (0, 8, "h100")
    _, said = plan(FULL, "--cluster", str(tmp_path / "site.yaml"))
    # Every rank reads the whole model: 8 times 15 GiB, on a node of 100.
    assert re.search(r"host memory: 1\d\d GiB expected on a node that has 100", said)
    cluster = load_cluster(str(tmp_path / "site.yaml"), ["gpu_memory_gib=40"])
    assert (cluster.gpu.bytes, cluster.gpu.flops_name) == (40 * GIB, "H100")
    assert load_cluster(str(tmp_path / "site.yaml"), ["gpu_type=null"]).gpu is None


def test_the_host_holds_the_model_once_for_each_rank_while_they_load():
    setting = build_setting(load(FULL), Place(8))
    assert plan_host(setting)["loading"].expected == 8 * 8_030_261_248 * 2
    # Masters, moments, gradients and weights of all ranks of the node are more than that.
    offload = plan_host(build_setting(load(FULL, ["backend=zero3-offload"]), Place(8)))["offload"]
    assert offload.low == pytest.approx(8_030_261_248 * (4 + 8 + 2 + 2))


def test_the_disk_holds_one_checkpoint_more_than_are_kept():
    setting = build_setting(load(FULL), Place(8))
    disk = plan_disk(setting, 1e6, 1e6)
    assert disk["one checkpoint"].expected == 8_030_261_248 * (2 + 12)
    assert disk["checkpoints, 3 at once"].expected == 3 * disk["one checkpoint"].expected
    assert disk["export"].expected == 8_030_261_248 * 2 and disk["prepared data"].low == 8e6
    cached = plan_disk(build_setting(load("distill/qwen3-32b-to-1.7b"), Place(8)), 1e6, 1e6)["teacher's cache"]
    assert 40e6 < cached.low < cached.expected < 70e6 < cached.high


# ---- headers of recipes


@pytest.mark.parametrize("name", recipes())
def test_the_plan_in_a_recipes_header_is_what_the_planner_says(name):
    lines = shipped("configs", f"{name}.yaml").read_text().splitlines()
    assert render_header(name) in lines, "run `python -m harness.planner.headers`, and read what has changed"


# ---- submit


def of_cluster(*settings: str) -> Submission:
    given: dict = {}
    for setting in settings:
        apply_override(given, setting)
    recipe, cluster = load(FULL), load_cluster("gpu", list(settings))
    return Submission(recipe, cluster)


def test_submit_refuses_what_cannot_fit_even_at_its_lowest_and_says_what_would():
    said = r"GPUs of 16.0 GiB cannot hold this run: it takes [\d.]+ GiB of each at least.*it fits with .*--despite-plan"
    with pytest.raises(LaunchError, match=said):
        check_can_fit(of_cluster("gpu_memory_gib=16"))


@pytest.mark.parametrize("settings", [["gpu_memory_gib=80"], ["gpu_memory_gib=24"], []])
def test_submit_says_nothing_where_it_may_fit_or_the_cluster_file_says_nothing_of_its_gpus(settings):
    check_can_fit(of_cluster(*settings))


def test_submit_is_overridden_by_an_option(tmp_path, monkeypatch):
    from harness.cli import submit

    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "tools.jsonl").touch()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "site.yaml").write_text("gpus_per_node: 8\ngpu_memory_gib: 16\n")
    fake = CountingSlurm(tmp_path / "bin", monkeypatch)
    with pytest.raises(LaunchError, match="cannot hold this run"):
        ask(submit, FULL, "--cluster", "site.yaml")
    assert fake.sent == [] and not (tmp_path / "runs").exists()
    said = ask(submit, FULL, "--cluster", "site.yaml", "--despite-plan")
    assert len(fake.sent) == 1 and said.startswith("job 100: ")


def test_a_model_that_is_made_by_the_job_before_is_not_planned(tmp_path):
    recipe = load(FULL, [f"model.name_or_path={tmp_path / 'later'}"])
    check_can_fit(Submission(recipe, load_cluster("gpu", ["gpu_memory_gib=1"])))
    with pytest.raises(ModelError):
        load_architecture(str(tmp_path / "later"))


@pytest.mark.parametrize("option", ["--tokens=nan", "--tokens=inf", "--tokens-per-s=inf", "--trained-share=nan"])
def test_what_cannot_be_counted_with_is_refused(option):
    code, said = plan("tiny/sft-lora", option)
    assert code == 2 and "is no number that can be counted with" in said
