"""The rig itself: a life in it is a life, its kills kill, and nothing is left behind."""

import json
import signal
import time

import psutil
import pytest
from conftest import harness, metrics
from jobs import LORA, ROWS, write_job
from rig import Refused, RigError, die_at_call, die_in_phase, record_samples, record_steps, shared_rig


@pytest.fixture(scope="module")
def rig():
    return shared_rig()


@pytest.fixture(scope="module")
def lora_job(tmp_path_factory):
    return write_job(tmp_path_factory.mktemp("lora"), LORA)


@pytest.fixture(scope="module")
def full_job(tmp_path_factory):
    return write_job(tmp_path_factory.mktemp("full"))


def gone(pids) -> bool:
    _, alive = psutil.wait_procs([psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)], timeout=5)
    return not alive


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["ddp", "zero2"])
def test_a_life_has_the_losses_and_the_weights_of_harness_run_to_the_last_bit(backend, rig, lora_job, full_job, tmp_path):
    job = lora_job if backend == "ddp" else full_job
    life = rig.run(job, f"output_dir={tmp_path / 'rig'}", backend=backend)
    assert life.wait() == [0, 0], life.output(0)
    done = harness("run", job, f"output_dir={tmp_path / 'real'}", "--backend", backend, "--processes", 2, OMP_NUM_THREADS="1")
    assert done.code == 0, done.output
    losses = metrics(tmp_path / "rig", "train/loss")
    assert len(losses) == 5 and losses == metrics(tmp_path / "real", "train/loss")
    name = "adapter_model.safetensors" if backend == "ddp" else "model.safetensors"
    assert (tmp_path / "rig" / "final" / name).read_bytes() == (tmp_path / "real" / "final" / name).read_bytes()
    said = [json.loads((tmp_path / run / "run.json").read_text()) for run in ("rig", "real")]
    assert [(run["backend"], run["backend_ruled_by"], run["world_size"]) for run in said] == [(backend, "recipe", 2)] * 2


def test_two_lives_are_the_same_at_every_step_and_each_row_is_trained_on_once(rig, lora_job, tmp_path):
    first, second = (
        rig.run(lora_job, f"output_dir={tmp_path / name}", inject=record_samples() + record_steps()) for name in ("first", "second")
    )
    assert first.wait() == second.wait() == [0, 0], first.output(0)
    for rank in (0, 1):
        assert [record["step"] for record in first.records("steps", rank)] == [1, 2, 3, 4, 5]
        assert first.records("steps", rank) == second.records("steps", rank)
        assert first.records("samples", rank) == second.records("samples", rank)
    seen = [sample for rank in (0, 1) for record in first.records("samples", rank) for sample in record["samples"]]
    assert len(seen) == len(set(seen)) == ROWS
    # What is recorded would differ if the runs did.
    other = rig.run(lora_job, f"output_dir={tmp_path / 'other'}", "train.seed=7", inject=record_samples() + record_steps())
    for mine, others in zip(first.records("steps", 0), other.records("steps", 0), strict=True):
        assert all(mine[key] != others[key] for key in ("weights", "optimizer", "random"))
    assert first.records("samples", 0) != other.records("samples", 0)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_dies_where_it_is_told_to_and_the_other_is_ended_at_once(rank, rig, lora_job, tmp_path):
    life = rig.run(lora_job, f"output_dir={tmp_path / 'run'}", inject=die_in_phase(rank, "training", before=False) + record_steps())
    assert life.wait() == [-signal.SIGKILL, -signal.SIGKILL]
    assert json.loads((life.attempt / "alive" / f"rank-{rank}.json").read_text())["phase"] == "training"
    assert life.records("steps", 0) == []


def test_a_rank_dies_at_the_call_that_was_named_though_it_was_imported_by_name(rig, lora_job, tmp_path):
    # harness.tasks.job has imported this function by its name; the second write there is of the recipe's data marker.
    fault = die_at_call(0, "harness.run:write_text_atomically", matching="prepared-0.json", before=False)
    life = rig.run(lora_job, f"output_dir={tmp_path / 'run'}", inject=fault)
    assert life.wait()[0] == -signal.SIGKILL
    assert (life.attempt / "prepared-0.json").is_file()
    assert json.loads((life.attempt / "alive" / "rank-0.json").read_text())["phase"] == "loading data"


def test_a_rank_that_stands_still_is_ended_in_time_with_the_stacks_of_those_that_wait(rig, lora_job, tmp_path):
    life = rig.start(lora_job, f"output_dir={tmp_path / 'run'}", "train.max_steps=100000", timeout_s=5)
    life.wait_for_phase(1, "training")
    life.kill(1, signal.SIGSTOP)
    with pytest.raises(RigError, match="took too long"):
        life.wait()
    assert "Fatal Python error: Aborted" in life.output(0) and "harness/tasks/job.py" in life.output(0)
    assert gone(life.pids)


def test_nothing_outlives_a_test_that_has_lost_interest(rig, lora_job, tmp_path):
    life = rig.start(lora_job, f"output_dir={tmp_path / 'run'}", "train.max_steps=100000", "train.dataloader_num_workers=1")
    life.wait_for_phase(0, "training")
    time.sleep(0.5)
    family = [child.pid for pid in life.pids for child in psutil.Process(pid).children(recursive=True)] + life.pids
    assert len(family) >= 4  # two ranks and a data worker each
    life.close()
    assert gone(family)


def test_what_harness_run_refuses_is_refused(rig, lora_job, tmp_path):
    with pytest.raises(Refused, match="RecipeError: .*learning_rat"):
        rig.start(lora_job, f"output_dir={tmp_path / 'run'}", "train.learning_rat=1")
    with pytest.raises(Refused, match="LaunchError: .*use 1 or 2 ranks"):
        rig.start(lora_job, f"output_dir={tmp_path / 'run'}", world=3)
