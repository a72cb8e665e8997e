"""Ranks that fail, are killed or are stopped: what the last lines say, what the exit code is, and that nothing is left running.

Faults are injected by a sitecustomize.py on the ranks' PYTHONPATH; harness knows nothing of them.
"""

import os
import signal
import time

import psutil
import pytest
from conftest import harness
from tiny_job import start_harness, wait_for_phase, write_recipe

from harness.run import RunDir, rank_reports

# Rank 1 alone finds its prepared data poisoned.
POISONED_DATA = """
import os
if os.environ.get("RANK") == "1":
    import harness.data.store as store
    from harness.errors import DataError
    def load_prepared(folder):
        raise DataError("rows.jsonl:7: poisoned; must be a row")
    store.load_prepared = load_prepared
"""
# Rank 1 is killed from outside while it trains.
KILLED = """
import os, json, signal, threading, time
if os.environ.get("RANK") == "1":
    def die():
        path = os.path.join(os.environ["HARNESS_ATTEMPT"], "alive", "rank-1.json")
        while not os.path.exists(path) or json.load(open(path))["phase"] != "training":
            time.sleep(0.05)
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)
    threading.Thread(target=die, daemon=True).start()
"""
# A trainable tensor that no forward pass uses: under ZeRO-2 its gradient reads as zeros.
UNUSED_TENSOR = """
import os
if "RANK" in os.environ:
    import torch, harness.model as model
    attach = model.attach_adapter
    def with_unused(*args):
        adapted = attach(*args)
        adapted.get_base_model().register_parameter("idle", torch.nn.Parameter(torch.zeros(3)))
        return adapted
    model.attach_adapter = with_unused
"""


@pytest.fixture
def fault(tmp_path):
    """fault(text) -> the PYTHONPATH under which every Python process runs it first."""

    def inject(text: str) -> str:
        folder = tmp_path / "hook"
        folder.mkdir()
        (folder / "sitecustomize.py").write_text(text)
        return str(folder)

    return inject


def last_words(output: str) -> str:
    """What stands below the launcher's own summary."""
    return output.rsplit("====\n", 1)[-1]


def test_the_last_thing_on_the_screen_is_the_first_failing_ranks_own_error(fault, tmp_path):
    run = tmp_path / "run"
    path = fault(POISONED_DATA)
    done = harness("run", write_recipe(tmp_path), f"output_dir={run}", "--backend", "zero2", "--processes", 2, PYTHONPATH=path)
    assert done.code == 2  # a DataError's, through accelerate and torch elastic, which would say 1
    words = last_words(done.output)
    assert f"rank 1 on {os.uname().nodename} failed while loading data:" in words
    assert "DataError: rows.jsonl:7: poisoned" in words
    assert "ChildFailedError" not in words and "Traceback" not in words
    assert "Traceback" in (run / "logs" / "attempt-1" / "rank-1.log").read_text()  # for whoever wants it


def test_a_killed_rank_is_named_with_its_phase_and_not_the_one_that_lost_its_peer(fault, tmp_path):
    run = tmp_path / "run"
    path = fault(KILLED)
    # No evaluation comes between the phase that is waited for and the kill.
    steps = ("train.max_steps=5000", "train.eval_steps=5000")
    done = harness("run", write_recipe(tmp_path), f"output_dir={run}", *steps, "--processes", 2, PYTHONPATH=path)
    assert done.code == 1
    words = last_words(done.output)
    assert f"ended without an error of its own: rank 1 on {os.uname().nodename}" in words and "while training" in words
    assert "rank 0" not in words and "killed from outside" in words


def test_a_trainable_tensor_without_a_gradient_stops_a_zero2_run_before_its_first_step(fault, tmp_path):
    path = fault(UNUSED_TENSOR)
    done = harness("run", write_recipe(tmp_path), f"output_dir={tmp_path / 'run'}", "--backend", "zero2", PYTHONPATH=path)
    assert done.code == 1
    words = last_words(done.output)
    assert "ModelError: after the first backward 1 tensors have no gradient" in words and "idle" in words
    assert not (tmp_path / "run" / "final").exists()


@pytest.mark.slow
def test_stopping_the_command_saves_stops_every_rank_and_the_same_command_continues(tmp_path):
    run = RunDir(tmp_path / "run")
    arguments = ["run", write_recipe(tmp_path), f"output_dir={run.path}", "--processes", "2"]
    command = start_harness(*arguments, "train.max_steps=200")
    try:
        wait_for_phase(run.path, 1, "training", step=5)
        family = psutil.Process(command.pid).children(recursive=True)
        assert len(family) >= 2
        command.send_signal(signal.SIGTERM)
        output, _ = command.communicate(timeout=120)
    finally:
        command.kill()
    assert command.returncode == 75, output
    last = output.rstrip().splitlines()[-1]
    (checkpoint,) = run.path.glob("checkpoint-*")
    assert last.startswith("stopped at step ") and "SIGTERM to harness run" in last and checkpoint.name in last
    assert psutil.wait_procs(family, timeout=5)[1] == []
    assert not run.final.exists() and not run.stop.exists()
    done = harness(*arguments, "train.max_steps=200", "--resume")
    assert done.code == 0, done.output
    assert f"continues from {checkpoint.name}" in done.output and run.final.is_dir()


@pytest.mark.slow
def test_a_second_signal_ends_even_a_rank_that_is_stopped_and_leaves_no_orphan(tmp_path):
    run = RunDir(tmp_path / "run")
    command = start_harness("run", write_recipe(tmp_path), f"output_dir={run.path}", "train.max_steps=100000", "--processes", "2")
    try:
        wait_for_phase(run.path, 1, "training")
        family = psutil.Process(command.pid).children(recursive=True)
        os.kill(rank_reports(run.attempt(1), "alive", [1])[0]["pid"], signal.SIGSTOP)
        command.send_signal(signal.SIGINT)
        time.sleep(3)
        assert command.poll() is None and run.stop.exists()
        command.send_signal(signal.SIGINT)
        output, _ = command.communicate(timeout=30)
    finally:
        command.kill()
    assert command.returncode == 130, output
    assert "stopped by SIGINT without saving" in output.rstrip().splitlines()[-1]
    assert psutil.wait_procs(family, timeout=5)[1] == []
