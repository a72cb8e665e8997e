"""The stop door on real ranks: whoever asks for a stop, whenever it is asked, every rank saves at the same step and leaves with 75, and the
run that is continued is bit for bit the one that nobody stopped."""

import functools
import json
import signal
import subprocess
import sys
import time

import psutil
import pytest
from conftest import harness, metrics
from lives import RECIPE, Run, at_call, at_step, check_same, said

EVAL_BATCH = "harness.tasks.trainer:HarnessTrainer.prediction_step"
LOAD_MODEL = "harness.tasks.job:load_model"
BEST = "train.metric_for_best_model=eval/loss"
EPOCHS = ("train.max_steps=null", "train.num_train_epochs=1.4", "train.eval_steps=null")
LOOKS_ALWAYS = "import harness.checkpoint.door; harness.checkpoint.door.LOOK_EVERY_S = 0\n"

COUNT_BATCHES = (
    at_call(EVAL_BATCH, 1, "keep('batches', {})")
    + at_call(EVAL_BATCH, 2, "keep('batches', {})")
    + at_call(EVAL_BATCH, 3, "keep('batches', {})")
)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """whole_run(*overrides, backend=…): the run that nobody stopped."""

    @functools.cache
    def live(*overrides, backend="ddp"):
        run = Run(tmp_path_factory.mktemp("whole"), *overrides, backend=backend)
        run.live()
        return run

    return live


@pytest.fixture
def cut_run(tmp_path):
    def make(*overrides, backend="ddp"):
        return Run(tmp_path, *overrides, backend=backend, inject=LOOKS_ALWAYS)

    return make


def make_file(run: Run, name: str = "STOP", text: str = "the node\n goes down") -> str:
    return f"Path({str(run.path / name)!r}).write_text({text!r})"


def gone(pids: list[int]) -> bool:
    _, alive = psutil.wait_procs([psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)], timeout=5)
    return not alive


def send(name: str) -> str:
    return f"os.kill(os.getpid(), signal.{name})"


def check_stopped(run: Run, life, step: int, reason: str, *, checkpoint: int | None) -> None:
    """The last life was ended by a stop after that step, and says so everywhere."""
    attempt = int(life.attempt.name.removeprefix("attempt-"))
    assert run.outcome(attempt) == {"outcome": "stopped", "step": step, "checkpoint": checkpoint, "reason": reason}
    last = run.events()[-1]
    assert (last["event"], last["step"], last["reason"], last["attempt"]) == ("stopped", step, reason, attempt)
    assert said(life).startswith(f"stopped at step {step} ({reason}); ")
    assert not (run.path / "STOP").exists() and not (run.path / "final").exists()
    made = [[record["step"] for record in life.records("steps", rank)] for rank in range(run.world)]
    assert all(steps == made[0] for steps in made) and made[0][-1:] in ([step], [])


def check_continues(run: Run, whole: Run, resumed_from: int | None) -> None:
    """The next life ends well, and then the run is the one that nobody stopped."""
    run.live()
    assert run.events("life_began")[-1]["resumed_from"] == resumed_from and run.events()[-1]["event"] == "finished"
    check_same(run, whole)


# ---- while training


@pytest.mark.parametrize(
    ("backend", "overrides"),
    [
        ("ddp", ()),
        pytest.param("zero2", ("model.lora=null",), marks=pytest.mark.slow),
        pytest.param("zero3", (), marks=pytest.mark.slow),
        pytest.param("single", ("train.gradient_accumulation_steps=2", "train.global_batch_size=null"), marks=pytest.mark.slow),
    ],
)
def test_a_stop_file_saves_and_stops_and_stops_no_other_life(backend, overrides, cut_run, whole_run):
    run = cut_run(*overrides, backend=backend)
    life = run.live(at_step(7, make_file(run)), code=75)
    check_stopped(run, life, 7, "the node goes down", checkpoint=7)
    assert (life.attempt / "STOP").read_text() == "the node\n goes down"
    assert run.committed() == [(5, "interval"), (7, "stop")] and run.manifest(7)["reason"] == "stop"
    assert not run.manifest(7)["evaluation_owed"]
    check_continues(run, whole_run(*overrides, backend=backend), 7)


@pytest.mark.parametrize(
    "name", ["SIGTERM", pytest.param("SIGUSR1", marks=pytest.mark.slow), pytest.param("SIGUSR2", marks=pytest.mark.slow)]
)
def test_a_signal_to_one_rank_alone_stops_all_at_the_same_step(name, cut_run, whole_run):
    run = cut_run()
    life = run.live(at_step(6, send(name), rank=1), code=75)
    check_stopped(run, life, 6, name, checkpoint=6)
    check_continues(run, whole_run(), 6)


@pytest.mark.slow
def test_a_sigterm_to_every_process_finds_data_workers_alive_for_the_save_and_leaves_none(cut_run, whole_run):
    run = cut_run("train.dataloader_num_workers=2")
    # As a scheduler does: to the rank's whole group, in which its workers are, and from none of them; then the time that they take to die.
    note = "keep('workers', {'pids': [child.pid for child in __import__('psutil').Process().children()]})"
    to_all = f"{note}; subprocess.run(['kill', '-TERM', '--', f'-{{os.getpid()}}']); time.sleep(0.5)"
    life = run.live(at_step(6, to_all, 0) + at_step(6, to_all, 1), code=75)
    check_stopped(run, life, 6, "SIGTERM", checkpoint=6)
    workers = [pid for rank in (0, 1) for record in life.records("workers", rank) for pid in record["pids"]]
    assert len(workers) >= 4 and gone(workers)
    check_continues(run, whole_run(), 6)


def test_save_makes_a_checkpoint_and_the_training_goes_on(cut_run, whole_run):
    run = cut_run()
    life = run.live(at_step(6, make_file(run, "SAVE", "")))
    assert run.committed() == [(5, "interval"), (6, "asked"), (10, "interval"), (14, "end")]
    assert not (run.path / "SAVE").exists() and "checkpoint-6 (asked)" in life.output(0)
    check_same(run, whole_run())


# ---- before there is anything to save


def test_a_stop_before_the_first_step_saves_nothing_and_loses_nothing(cut_run, whole_run):
    run = cut_run()
    life = run.live(at_call(LOAD_MODEL, 1, make_file(run)), code=75)
    check_stopped(run, life, 0, "the node goes down", checkpoint=None)
    assert life.records("steps", 0) == [] and run.committed() == [] and not list(run.path.glob("checkpoint-*"))
    check_continues(run, whole_run(), None)


@pytest.mark.slow
def test_so_it_is_before_the_first_step_of_a_later_life(cut_run, whole_run):
    run = cut_run()
    run.live(at_step(7, make_file(run)), code=75)
    life = run.live(at_call(LOAD_MODEL, 1, make_file(run)), code=75)
    check_stopped(run, life, 7, "the node goes down", checkpoint=7)
    assert life.records("steps", 0) == [] and run.committed() == [(5, "interval"), (7, "stop")]
    check_continues(run, whole_run(), 7)


def test_a_sigterm_while_loading_ends_the_rank_at_once(cut_run):
    run = cut_run()
    fault = "".join(at_call(LOAD_MODEL, 1, f"{send('SIGTERM')}; time.sleep(60)", rank) for rank in (0, 1))
    life = run.live(fault, code=128 + signal.SIGTERM)
    assert life.seconds < 30 and run.committed() == [] and said(life) is None


@pytest.mark.slow
def test_a_sigterm_when_another_rank_has_failed_ends_the_rank_at_once(cut_run):
    run = cut_run()
    waits = "[time.sleep(0.02) for _ in iter(lambda: (trainer.lives.report.attempt / 'errors' / 'rank-1.json').exists(), True)]"
    fault = at_step(6, "raise RuntimeError('a bad card')", rank=1) + at_step(6, f"{waits}; {send('SIGTERM')}; time.sleep(60)")
    life = run.start(fault)
    assert life.wait() == [128 + signal.SIGTERM, 1] and life.seconds < 30
    assert run.committed() == [(5, "interval")]


# ---- around an evaluation


@pytest.mark.parametrize("best", [pytest.param(False, marks=pytest.mark.slow), True], ids=["", "best model"])
def test_a_stop_during_an_evaluation_leaves_it_to_the_next_life(best, cut_run, whole_run):
    overrides = [BEST] if best else []
    run = cut_run(*overrides)
    life = run.live(at_call(EVAL_BATCH, 2, make_file(run)) + COUNT_BATCHES, code=75)
    check_stopped(run, life, 4, "the node goes down", checkpoint=4)
    assert len(life.records("batches", 0)) == 2  # of three
    assert run.manifest(4)["evaluation_owed"] and run.manifest(4)["reason"] == "stop"
    assert metrics(run.path, "eval/loss") == {}
    check_continues(run, whole_run(*overrides), 4)


@pytest.mark.slow
@pytest.mark.parametrize("best", [False, True], ids=["", "best model"])
def test_a_stop_at_a_step_whose_evaluation_is_due_leaves_it_to_the_next_life(best, cut_run, whole_run):
    overrides = [BEST] if best else []
    run = cut_run(*overrides)
    life = run.live(at_step(8, make_file(run)), code=75)
    check_stopped(run, life, 8, "the node goes down", checkpoint=8)
    assert run.manifest(8)["evaluation_owed"] and list(metrics(run.path, "eval/loss")) == [4]
    check_continues(run, whole_run(*overrides), 8)


@pytest.mark.slow
def test_an_evaluation_that_is_owed_is_owed_until_it_has_been_made(cut_run, whole_run):
    run = cut_run(BEST)
    run.live(at_step(8, make_file(run)), code=75)
    life = run.live(at_call(EVAL_BATCH, 2, make_file(run)), code=75)
    check_stopped(run, life, 8, "the node goes down", checkpoint=8)
    check_continues(run, whole_run(BEST), 8)


@pytest.mark.slow
def test_so_it_is_with_the_evaluation_at_the_end_of_an_epoch(cut_run, whole_run):
    run = cut_run(*EPOCHS, BEST)
    life = run.live(at_step(10, make_file(run)), code=75)
    check_stopped(run, life, 10, "the node goes down", checkpoint=10)
    assert run.manifest(10)["evaluation_owed"] and run.manifest(10)["data"]["cursor"] == 40
    check_continues(run, whole_run(*EPOCHS, BEST), 10)


@pytest.mark.slow
def test_so_it_is_with_an_evaluation_before_the_first_step(cut_run, whole_run):
    run = cut_run("train.eval_on_start=true")
    life = run.live(at_call(EVAL_BATCH, 2, make_file(run)), code=75)
    check_stopped(run, life, 0, "the node goes down", checkpoint=None)
    check_continues(run, whole_run("train.eval_on_start=true"), None)


@pytest.mark.parametrize(
    "overrides",
    [[BEST], pytest.param([BEST, *EPOCHS], marks=pytest.mark.slow), pytest.param([BEST, "train.max_steps=10"], marks=pytest.mark.slow)],
    ids=["steps", "epochs", "a whole epoch"],
)
def test_a_stop_at_the_last_step_leaves_its_evaluation_and_the_export_to_the_next_life(overrides, cut_run, whole_run):
    run, last = cut_run(*overrides), 10 if "10" in overrides[-1] else 14
    life = run.live(at_step(last, make_file(run)), code=75)
    check_stopped(run, life, last, "the node goes down", checkpoint=last)
    life = run.live()
    assert life.records("steps", 0) == []
    check_same(run, whole_run(*overrides))


def test_a_stop_at_the_last_step_of_a_run_without_evaluation_is_too_late(cut_run):
    run = cut_run("train.eval_steps=null", "train.eval_strategy=no")
    run.live(at_step(14, make_file(run)))
    assert run.outcome(1)["outcome"] == "done" and run.exported() and run.committed()[-1] == (14, "stop")


# ---- a save that fails


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_stop_whose_save_fails_leaves_the_checkpoint_before_it(rank, cut_run, whole_run):
    run = cut_run()
    full = at_call("harness.checkpoint.state:save_rank_state", 2, "raise OSError(28, 'No space left on device')", rank)
    life = run.live(at_step(7, make_file(run)) + full, code=75)
    check_stopped(run, life, 7, "the node goes down", checkpoint=5)
    failed = run.events("save_failed")[0]
    assert (failed["step"], failed["rank"]) == (7, rank) and "No space left" in failed["error"]
    assert "checkpoint-5 is whole" in said(life) and not list((run.path / ".staging").iterdir())
    run.live()
    assert run.events("life_began")[-1]["resumed_from"] == 5
    check_same(run, whole_run(), repeats=True)


def test_a_first_save_that_fails_is_not_called_whole(cut_run):
    run = cut_run()
    full = at_call("harness.checkpoint.state:save_rank_state", 1, "raise OSError(28, 'No space left on device')")
    life = run.live(at_step(3, make_file(run)) + full, code=75)
    check_stopped(run, life, 3, "the node goes down", checkpoint=None)
    assert "nothing was saved" in said(life)


# ---- the whole command


@pytest.mark.slow
def test_ctrl_c_saves_and_the_same_command_continues_to_the_end_and_then_says_so(tmp_path):
    recipe, run = tmp_path / "job.yaml", tmp_path / "run"
    recipe.write_text(RECIPE)
    settings = [f"output_dir={run}", "train.max_steps=400", "train.eval_steps=400", "checkpoint.every_steps=1000"]
    arguments = ["run", str(recipe), *settings, "--backend", "ddp", "--processes", "2"]
    command = subprocess.Popen([sys.executable, "-m", "harness", *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        alive, deadline = run / "logs" / "attempt-1" / "alive" / "rank-0.json", time.monotonic() + 120
        while not (alive.is_file() and (json.loads(alive.read_text())["step"] or 0) > 5):
            assert time.monotonic() < deadline and command.poll() is None
            time.sleep(0.05)
        command.send_signal(signal.SIGINT)
        output, _ = command.communicate(timeout=120)
    finally:
        command.kill()
    assert command.returncode == 75, output
    assert "press Ctrl-C again to leave at once without saving" in output and "(SIGINT to harness run" in output
    (checkpoint,) = run.glob("checkpoint-*")
    last = output.rstrip().splitlines()[-1]
    assert last.startswith("stopped at step ") and last.endswith(f"the newest checkpoint is {checkpoint.name}; the same command continues")
    done = harness(*arguments)
    assert done.code == 0 and f"continues from {checkpoint.name}" in done.output and (run / "final").is_dir(), done.output
    # Each logged once: the second life began where the first one ended.
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    logged = [line["step"] for line in lines if "train/loss" in line]
    assert logged == [1, *range(3, 400, 3)] and len(metrics(run, "eval/loss")) == 1
    again = harness(*arguments)
    assert again.code == 0 and "this run is complete" in again.output and not (run / "logs" / "attempt-3").exists()
