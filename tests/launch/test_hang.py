"""One life after the other: what `harness run` does when its ranks stand still, go back, stop or are left alone.

Most ranks here are a few lines that write what real ones would; the last tests stop and orphan real ones.
"""

import contextlib
import os
import signal
import sys
import threading
import time

import psutil
import pytest
from click.testing import CliRunner
from tiny_job import start_harness, wait_for_phase, write_recipe

import harness.cli.run as verb
from harness.checkpoint.ledger import read_ledger
from harness.errors import HarnessError, LaunchError
from harness.launcher import Machines
from harness.recipe import load
from harness.run import RunDir, StopRequest, rank_reports, read_outcome
from harness.watchdog import process_state

# What a life does is the K-th word of the arguments that follow --recipe FILE.
RANKS = """
import os, signal, sys, time
from pathlib import Path
from harness.checkpoint.ledger import Ledger
from harness.run import RankReport, write_outcome
run, *lives = sys.argv[3:]
stop, attempt = Path(run) / "STOP", Path(os.environ["HARNESS_ATTEMPT"] or run + "/logs/attempt-1")
number = int(attempt.name.removeprefix("attempt-"))
does = lives[min(number, len(lives)) - 1].split("+")
report = RankReport(0, attempt)
report.enter("training")
report.beat(number)
if "commits" in does:
    Ledger(Path(run) / "ledger.jsonl", number).append("committed", step=10 * number)
if "rolls-back" in does:
    write_outcome(attempt, "rolled_back", step=5, checkpoint=None, reason=f"loss was NaN in life {number}")
    sys.exit(75 * (number % 2))  # the outcome counts, and not the code
if "fails" in does:
    raise SystemExit(3)
if "done" in does:
    write_outcome(attempt, "done", step=5, checkpoint=5, reason="")
    report.enter("finished")
if "hangs" in does:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(600)
if "stops" in does:
    while not stop.exists():
        time.sleep(0.02)
    Ledger(Path(run) / "ledger.jsonl", number).append("committed", step=7)
    write_outcome(attempt, "stopped", step=7, checkpoint=7, reason=stop.read_text().split()[0])
    report.stopped("asked")
    sys.exit(75)
"""


@pytest.fixture
def lives(tmp_path, monkeypatch, capfd):
    """lives("rolls-back", "done") -> (exit code, what was said, the run)."""
    recipe = load(write_recipe(tmp_path), [f"output_dir={tmp_path / 'run'}", "watchdog.first_step_s=2", "watchdog.save_s=2"])
    run = RunDir.create(recipe)
    monkeypatch.setenv("PYTHONPATH", str(verb.Path(verb.__file__).parents[2]))
    monkeypatch.setattr("harness.watchdog.STACKS_S", 0.0)

    def live(*what, machines=None, most_lives=3):
        monkeypatch.setattr("harness.life.plan_launch", lambda *_: [sys.executable, "-c", RANKS, "--recipe", "FILE", str(run.path), *what])
        code = verb.supervise(recipe, run, machines or Machines(1), [], most_lives=most_lives)
        captured = capfd.readouterr()
        return code, captured.out + captured.err, run

    return live


def send(number, *after_s):
    for seconds in after_s:
        threading.Timer(seconds, os.kill, (os.getpid(), number)).start()


def test_a_rollback_and_a_hang_are_followed_by_a_life_that_continues(lives):
    code, said, run = lives("commits+rolls-back", "hangs", "done")
    assert code == 0 and run.attempts() == [1, 2, 3]
    assert "attempt-1 ended by a rollback; a new life begins: the newest checkpoint is checkpoint-10" in said
    assert f"hang: no sign of life from rank 0 on {os.uname().nodename}" in said and "attempt-2 ended by a hang" in said
    (hang,) = [event for event in read_ledger(run.ledger) if event["event"] == "hang"]
    assert (hang["attempt"], hang["rank"], hang["phase"], hang["step"]) == (2, 0, "training", 2)
    outcome = read_outcome(run.attempt(2))
    assert outcome["outcome"] == "hang" and outcome["checkpoint"] == 10 and "while training, step 2" in outcome["reason"]
    assert "silent for" in (run.attempt(2) / "hang.txt").read_text()


def test_three_lives_in_a_row_without_a_newer_checkpoint_are_enough(lives):
    code, said, run = lives("rolls-back", "rolls-back+commits", "rolls-back")
    assert code == 1 and run.attempts() == [1, 2, 3, 4, 5]  # the third from the commit of the second
    assert "3 times in a row (the newest checkpoint is checkpoint-20)" in said.split("given up")[1]
    for number in (3, 4, 5):
        assert f"attempt-{number}: loss was NaN in life {number}" in said.split("given up")[1]


def test_a_failure_is_no_hang_and_is_not_tried_again(lives):
    code, said, run = lives("fails", "done")
    assert code == 1 and run.attempts() == [1] and "ended without an error of its own: rank 0" in said


def test_a_smoke_test_is_not_tried_again(lives):
    code, _, run = lives("rolls-back", "done", most_lives=1)
    assert code == 1 and run.attempts() == [1]


def test_on_several_machines_nobody_begins_a_life_alone(lives):
    code, said, run = lives("rolls-back", "done", machines=Machines(1, 2, 0, "a", 1))
    assert code == 75 and run.attempts() == [1] and "all must begin a life together" in said and "life 1" in said


def test_a_run_that_is_done_but_does_not_leave_is_done(lives):
    code, said, run = lives("done+hangs")
    assert code == 0 and "while finished" in said and read_outcome(run.attempt(1))["outcome"] == "done"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2])
def test_the_first_signal_asks_the_run_to_save_and_leave(lives, number):
    send(number, 0.5, 0.6)  # the second is of the same cause
    code, said, run = lives("stops")
    assert code == 75
    assert f"stopped at step 7 ({number.name}); the newest checkpoint is checkpoint-7; the same command continues" in said
    assert f"{number.name} to harness run at 2" in run.stop.read_text()


def test_the_second_signal_ends_ranks_that_do_not_leave(lives):
    send(signal.SIGTERM, 0.5, 3)
    begun = time.monotonic()
    code, said, run = lives("hangs")
    assert code == 143 and time.monotonic() - begun < 10
    assert "press Ctrl-C again" in said and "stopped by SIGTERM without saving" in said


def test_no_life_begins_after_a_hang_once_it_was_asked_to_stop(lives):
    send(signal.SIGINT, 0.5)
    code, said, run = lives("hangs", "done")
    assert code == 75 and run.attempts() == [1] and "which was asked for meanwhile" in said


def test_where_no_stop_file_can_be_made_the_ranks_are_ended(lives, monkeypatch):
    def refuse(path, _):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(StopRequest, "write", refuse)
    send(signal.SIGINT, 0.5)
    code, said, _ = lives("hangs")
    assert code == 130 and "No space left on device" in said


# ---- real ranks


@pytest.fixture(scope="module")
def stood_still(tmp_path_factory):
    """(exit code, what was said, run folder) of a run whose rank 1 was stopped while it trained, with a checkpoint behind it."""
    folder = tmp_path_factory.mktemp("hang")
    run = RunDir(folder / "run")
    settings = [f"output_dir={run.path}", "train.max_steps=200", "train.eval_steps=200", "checkpoint.every_steps=20", "watchdog.step_s=4"]
    command = start_harness("run", write_recipe(folder), *settings, "--processes", "2")
    try:
        wait_for_phase(run.path, 1, "training")
        deadline = time.monotonic() + 60
        while not any(event["event"] == "committed" for event in read_ledger(run.ledger)):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        (alive,) = rank_reports(run.attempt(1), "alive", [1])
        os.kill(alive["pid"], signal.SIGSTOP)
        output, _ = command.communicate(timeout=240)
    finally:
        command.kill()
    return command.returncode, output, run, alive


@pytest.mark.slow
def test_a_rank_that_is_stopped_is_found_named_and_ended_and_the_run_goes_on_to_its_end(stood_still):
    code, said, run, stopped = stood_still
    assert code == 0, said
    assert f"hang: no sign of life from rank 1 on {stopped['host']} (pid {stopped['pid']})" in said
    assert "its process is stopped (SIGSTOP)" in said and "attempt-1 ended by a hang; a new life begins" in said
    assert run.attempts() == [1, 2] and read_outcome(run.attempt(2))["outcome"] == "done" and run.final.is_dir()
    assert process_state(stopped["pid"]) in (None, "Z")
    events = [event["event"] for event in read_ledger(run.ledger)]
    assert events.index("committed") < events.index("hang") < events.index("finished")
    # The rank that waited shows where: in the exchange with the one that was stopped.
    text = (run.attempt(1) / "hang.txt").read_text()
    assert "process state T" in text
    waiting = text.split("---- stacks of rank 0")[1].split("---- stacks of rank 1")[0]
    assert "Thread 0x" in waiting and "in train" in waiting and "harness/" in waiting


@pytest.mark.slow
def test_a_run_that_is_complete_is_not_trained_again_and_another_recipe_is_refused(stood_still):
    _, _, run, _ = stood_still
    recipe = load(run.recipe)
    assert verb.run_recipe(recipe, Machines(2)) == 0 and run.attempts() == [1, 2]
    other = recipe.model_copy(update={"train": recipe.train.model_copy(update={"learning_rate": 0.5})})
    with pytest.raises(LaunchError, match="train.learning_rate = 0.5"):
        verb.run_recipe(other, Machines(2))
    assert load(run.recipe) == recipe


@pytest.mark.slow
def test_ranks_whose_command_is_killed_end_too_and_hold_the_folder_until_then(tmp_path):
    run = RunDir(tmp_path / "run")
    command = start_harness("run", write_recipe(tmp_path), f"output_dir={run.path}", "train.max_steps=100000", "--processes", "2")
    family = []
    try:
        wait_for_phase(run.path, 1, "training")
        family = psutil.Process(command.pid).children(recursive=True)
        pids = [report["pid"] for report in rank_reports(run.attempt(1), "alive")]
        assert set(pids) <= {process.pid for process in family}
        os.kill(pids[1], signal.SIGSTOP)  # so that the launcher, which ends the ranks now, has to wait
        command.kill()
        command.wait()
        time.sleep(0.5)
        with pytest.raises(LaunchError, match="another process is running in it"):
            RunDir.create(load(tmp_path / "job.yaml", [f"output_dir={run.path}"]))
        os.kill(pids[1], signal.SIGCONT)
        assert psutil.wait_procs(family, timeout=60)[1] == []
    finally:
        for process in (command, *family):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
    assert RunDir.create(load(tmp_path / "job.yaml", [f"output_dir={run.path}"])).path == run.path


def test_resume_refuses_to_begin_and_goes_with_nothing_that_begins(tmp_path):
    recipe = str(write_recipe(tmp_path))
    for options, says in (([], "holds no checkpoint"), (["--fresh"], "--resume and --fresh"), (["--smoke"], "--resume and --smoke")):
        done = CliRunner().invoke(verb.command, [recipe, f"output_dir={tmp_path / 'run'}", "--resume", *options])
        assert isinstance(done.exception, HarnessError) and done.exception.exit_code == 2 and says in str(done.exception)
    assert not (tmp_path / "run").exists()
