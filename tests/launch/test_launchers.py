"""Every way to start ranks runs the same job, says which backend ruled, and refuses what would run another one."""

import json
import re
import socket
import sys

import pytest
from conftest import REPOSITORY, harness, metrics, run_command
from tiny_job import TRAIN, start, write_recipe

BIN = sys.executable.rsplit("/", 1)[0]
ZERO2 = str(REPOSITORY / "configs" / "backends" / "zero2.yaml")
# One rank or two sum in another order.
TOLERANCE = 1e-4


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return write_recipe(tmp_path_factory.mktemp("recipe"))


@pytest.fixture(scope="module")
def reference(recipe, tmp_path_factory):
    """(losses, held-out loss, weights) of `harness run` on two ranks under ZeRO-2."""
    run = tmp_path_factory.mktemp("reference") / "run"
    done = harness("run", recipe, f"output_dir={run}", "--backend", "zero2", "--processes", 2)
    assert done.code == 0, done.output
    assert "accelerate.commands.launch" in done.output and "--num_processes 2" in done.output  # the argv is printed
    assert ruled(run) == ("zero2", "recipe", 2)
    return metrics(run, "train/loss"), metrics(run, "eval/loss")


def ruled(run):
    manifest = json.loads((run / "run.json").read_text())
    return manifest["backend"], manifest["backend_ruled_by"], manifest["world_size"]


def losses(run):
    return metrics(run, "train/loss"), metrics(run, "eval/loss")


def check_same(run, reference):
    for ours, theirs in zip(losses(run), reference, strict=True):
        assert len(ours) > 0 and ours == pytest.approx(theirs, abs=TOLERANCE)
    assert (run / "final" / "adapter_model.safetensors").stat().st_size > 10_000


# launcher -> (argv up to the script, overrides, what rules)
LAUNCHERS = {
    # The recipe says ddp; the launcher's own backend beats it.
    "accelerate": (
        [f"{BIN}/accelerate", "launch", "--config_file", ZERO2, "--num_processes", "2", "--main_process_port", "0"],
        [],
        ("zero2", "launcher", 2),
    ),
    "torchrun": (
        [f"{BIN}/torchrun", "--nproc_per_node", "2", "--master_port", "PORT"],
        ["backend=zero2"],
        ("zero2", "recipe", 2),
    ),
    # On a CPU it starts one rank.
    "deepspeed": ([f"{BIN}/deepspeed", "--master_port", "PORT"], ["--backend", "zero2"], ("zero2", "recipe", 1)),
    "python": ([sys.executable], ["--backend=single"], ("single", "recipe", 1)),
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_every_launcher_runs_the_same_job(launcher, recipe, reference, tmp_path):
    argv, overrides, expected = LAUNCHERS[launcher]
    argv = [free_port() if part == "PORT" else part for part in argv]
    done = run_command(*argv, TRAIN, "--recipe", str(recipe), f"output_dir={tmp_path / 'run'}", *overrides)
    assert done.code == 0, done.output
    assert ruled(tmp_path / "run") == expected
    check_same(tmp_path / "run", reference)


# ---- several machines without Slurm


def test_two_machines_share_one_run_folder_and_have_the_losses_of_two_ranks_on_one(recipe, reference, tmp_path):
    run, script, port = tmp_path / "run", REPOSITORY / "launch" / "multi-node.sh", free_port()
    arguments = [script, recipe, f"output_dir={run}", "--processes", "1"]
    shared = {"NNODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "PYTHON": sys.executable, "PYTHONPATH": str(REPOSITORY)}
    # The second machine is there first: it must not look for a run folder that the first one has yet to make.
    machines = [start(*arguments, NODE_RANK=index, **shared) for index in ("1", "0")]
    outputs = [machine.communicate(timeout=200)[0] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], "\n".join(outputs)
    assert ruled(run) == ("ddp", "recipe", 2)
    check_same(run, reference)
    assert {folder.name for folder in (run / "logs").iterdir()} == {"attempt-1", "latest"}
    attempt = run / "logs" / "attempt-1"
    assert {path.name for path in attempt.iterdir()} == {
        "alive",
        "outcome.json",
        "prepared-0.json",
        "prepared-1.json",
        "rank-0.log",
        "rank-1.log",
    }
    assert "loss" in outputs[1] and "loss" not in outputs[0]  # rank 0's machine alone shows progress


@pytest.mark.parametrize("missing", ["NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_a_machine_that_is_not_fully_described_is_refused(missing, recipe, tmp_path):
    described = {"NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", missing: ""}
    done = run_command(str(REPOSITORY / "launch" / "multi-node.sh"), str(recipe), f"output_dir={tmp_path / 'run'}", **described)
    assert done.code == 1 and missing in done.output and not (tmp_path / "run").exists()


# ---- traps of the launchers


def train_alone(recipe, tmp_path, *overrides, **environment):
    """The rank program without a launcher, in a launcher's environment."""
    return run_command(sys.executable, TRAIN, "--recipe", str(recipe), f"output_dir={tmp_path / 'run'}", *overrides, **environment)


def test_accelerate_launch_with_cpu_would_make_one_process_out_of_two_and_is_refused(recipe, tmp_path):
    launched = [f"{BIN}/accelerate", "launch", "--cpu", "--num_processes", "2", TRAIN, "--recipe", str(recipe)]
    done = run_command(*launched, f"output_dir={tmp_path / 'run'}")
    assert done.code != 0 and "LaunchError: ACCELERATE_USE_CPU" in done.output and not (tmp_path / "run").exists()


def test_fsdp2_on_a_cpu_is_refused_with_the_reason(recipe, tmp_path):
    # What `accelerate launch --use_fsdp --fsdp_version 2` puts into a rank's environment; then the same backend from the recipe.
    launched = {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    for environment, overrides in ((launched, []), ({}, ["backend=fsdp2"])):
        done = train_alone(recipe, tmp_path, *overrides, **environment)
        assert done.code == 2 and "drops FSDP on a CPU" in done.output and "zero3" in done.output
        assert "Traceback" not in done.output and not (tmp_path / "run").exists()


# The rules behind them, without a process: environment, overrides, what the refusal says.
SWITCHES = {
    "one process of several": ({"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1"}, [], "has started one"),
    "precision of the launcher's": ({"ACCELERATE_MIXED_PRECISION": "bf16", "WORLD_SIZE": "2"}, [], "mixed_precision = bf16"),
    "FSDP1": ({"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, [], "deprecated"),
    "ranks that cannot make the batch": ({"WORLD_SIZE": "3"}, [], re.escape("use 1 or 2 ranks")),
    "several ranks of a single backend": ({"WORLD_SIZE": "2"}, ["backend=single"], "is one process"),
    "use_cpu under torchrun": ({"WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "1"}, [], "CUDA_VISIBLE_DEVICES="),
}


@pytest.mark.parametrize("case", SWITCHES)
def test_a_launcher_that_would_change_the_job_in_silence_is_refused(case, recipe):
    from harness.errors import LaunchError
    from harness.launcher import rule_backend
    from harness.recipe import load

    environment, overrides, says = SWITCHES[case]
    with pytest.raises(LaunchError, match=says):
        rule_backend(load(recipe, overrides), dict(environment), has_gpu=False)


def test_a_launchers_precision_that_the_recipe_asks_for_too_is_no_contradiction(recipe):
    from harness.launcher import rule_backend
    from harness.recipe import load

    environment = {"ACCELERATE_MIXED_PRECISION": "bf16", "WORLD_SIZE": "2"}
    assert rule_backend(load(recipe, ["train.bf16=true"]), environment, has_gpu=False).backend.kind == "ddp"


def test_a_launchers_backend_is_held_to_the_rules_that_the_recipes_own_is_held_to(recipe):
    from harness.errors import RecipeError
    from harness.launcher import rule_backend
    from harness.recipe import load

    zero3 = {
        "ACCELERATE_MIXED_PRECISION": "no",
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
        "WORLD_SIZE": "2",
    }
    with pytest.raises(RecipeError, match="does not gather weights when it saves"):
        rule_backend(load(recipe), zero3, has_gpu=False)


def test_a_process_group_smaller_than_the_launchers_world_is_refused(monkeypatch):
    import accelerate

    from harness import distributed
    from harness.errors import LaunchError

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(accelerate, "PartialState", lambda **_: type("OneProcess", (), {"num_processes": 1}))
    with pytest.raises(LaunchError, match="started 2 ranks .* but the process group has 1"):
        distributed.start(60, decisions_s=60)


def test_machines_started_with_different_recipes_stop_instead_of_training_a_mixture(recipe, monkeypatch):
    from harness import distributed
    from harness.errors import LaunchError
    from harness.recipe import load
    from harness.tasks.job import check_one_recipe

    mine, rank_zeros = load(recipe, ["output_dir=there", "train.seed=1"]), load(recipe, ["output_dir=there"])
    check_one_recipe(mine, smoke=False)
    said = []
    monkeypatch.setattr(distributed, "broadcast_object", lambda value: said.append(value) or value)
    check_one_recipe(rank_zeros, smoke=False)
    monkeypatch.setattr(distributed, "broadcast_object", lambda _: said[0])
    with pytest.raises(LaunchError, match=r"different settings \(recipe\)"):
        check_one_recipe(mine, smoke=False)


# ---- on a GPU


@pytest.mark.gpu
def test_fsdp2_on_one_gpu_trains_and_its_export_loads(recipe, tmp_path):
    from peft import AutoPeftModelForCausalLM

    run = tmp_path / "run"
    done = harness("run", recipe, f"output_dir={run}", "--backend", "fsdp2", "--processes", 1)
    assert done.code == 0, done.output
    assert ruled(run) == ("fsdp2", "recipe", 1)
    trained = metrics(run, "train/loss")
    assert trained[3] < trained[1]
    AutoPeftModelForCausalLM.from_pretrained(run / "final")
