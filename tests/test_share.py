"""Runs that do a share of units: what is in their folders, and what their processes tell whoever watches over them.

As stages: tests/cluster/test_pipeline.py. On a real Slurm: tests/slurm/test_capture_stage.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from harness.errors import RecipeError
from harness.launcher import Machines
from harness.life import place, progress
from harness.recipe import load
from harness.run import ATTEMPT_VARIABLE, RunDir, StopRequest, rank_reports, read_outcome, write_outcome
from harness.share import Share, check_share, is_share_done, read_share, save_share, units_of

PROCESS = """
import os, signal, sys
from pathlib import Path

from harness.errors import Stopped, TeacherError
from harness.recipe import load
from harness.run import RunDir
from harness.watched import Watched

recipe = load("tiny/distill-offline", [f"output_dir={sys.argv[1]}"])
run = RunDir.of(recipe)
with Watched(recipe) as watched:
    watched.enter("capturing")
    print(f"rank {os.environ['RANK']} asks")
    exec(sys.argv[2])
"""


@pytest.fixture
def run(tmp_path) -> RunDir:
    made = RunDir.create(load("tiny/distill-offline", [f"output_dir={tmp_path / 'run'}"]))
    save_share(made, Share("capture", 8, 3))
    return made


def process(run: RunDir, source: str, attempt: Path | None = None, rank: int = 0) -> subprocess.CompletedProcess:
    """A process of a share, that does this."""
    environment = os.environ | {ATTEMPT_VARIABLE: str(attempt or ""), "RANK": str(rank)}
    argv = [sys.executable, "-c", PROCESS, str(run.path), source]
    return subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=120)


def test_a_process_tells_its_log_its_units_and_where_they_lie(run):
    life = run.open_attempt()
    units = run.path.parent / "units"
    done = process(run, f"watched.begun(Path({str(units)!r}), 5); [watched.beat(n) for n in (0, 1, 0, 1)]", life)
    assert done.returncode == 0, done.stderr
    [report] = rank_reports(life, "alive")
    assert (report["step"], report["phase"]) == (2, "finished") and progress(run) == 2
    assert (life / "rank-0.log").read_text() == done.stdout == "rank 0 asks\n"
    assert read_outcome(life) == {"outcome": "done", "step": None, "checkpoint": None, "reason": ""}
    assert units_of(run).folder == units and place(run) == "0 of 5 units are there"
    # Beside it: silent on the terminal, and its units count too.
    assert process(run, "watched.beat(3)", life, rank=1).stdout == "" and progress(run) == 5


def test_the_first_that_is_told_to_leave_says_why_and_the_others_still_hear_it(run):
    life = run.open_attempt()
    StopRequest("slurm: time limit", 4e9).write(run.stop)
    leave = "assert watched.stop() == 'slurm: time limit'; raise Stopped('stopped')"
    assert "Stopped: stopped" in process(run, leave, life).stderr
    assert not run.stop.exists() and (life / "STOP").is_file()
    process(run, leave, life, rank=1)
    assert "Stopped: stopped" in (life / "rank-1.log").read_text()
    assert read_outcome(life)["outcome"] == "stopped" and read_outcome(life)["reason"] == "slurm: time limit"
    assert [report["phase"] for report in rank_reports(life, "alive")] == ["stopped"] * 2
    # The next life is not stopped by it.
    assert process(run, "assert watched.stop() is None", run.open_attempt()).returncode == 0


def test_one_that_leaves_for_what_another_has_heard_gives_no_reason_of_its_own(run):
    life = run.open_attempt()
    process(run, "raise Stopped('stopped (SIGTERM)')", life, rank=1)
    assert read_outcome(life) is None
    process(run, "os.kill(os.getpid(), signal.SIGTERM); raise Stopped('stopped (SIGTERM)')", life)
    assert read_outcome(life)["reason"] == "SIGTERM"


def test_an_error_is_kept_for_whoever_explains_the_end(run):
    life = run.open_attempt()
    process(run, "raise TeacherError('no teacher')", life, rank=2)
    [error] = rank_reports(life, "errors")
    assert (error["rank"], error["message"], error["phase"], error["traceback"]) == (2, "no teacher", "capturing", "")
    assert read_outcome(life) is None


def test_of_those_that_share_a_teacher_the_first_alone_says_that_it_is_done(run):
    life = run.open_attempt()
    process(run, "pass", life, rank=1)
    assert read_outcome(life) is None
    # One that was started beside others and is on its own.
    process(run, "os.environ['RANK'] = '0'", life, rank=1)
    assert read_outcome(life)["outcome"] == "done"


def test_a_persons_own_command_hears_signals_and_writes_nothing(run):
    before = sorted(run.path.rglob("*"))
    source = "watched.begun(Path('x'), 3); watched.beat(1); os.kill(os.getpid(), signal.SIGUSR1); assert watched.stop() == 'SIGUSR1'"
    StopRequest("for another").write(run.stop)
    assert process(run, source).returncode == 0
    assert sorted(run.path.rglob("*")) == sorted([*before, run.stop])


def test_a_share_is_done_when_its_end_was_good_and_all_units_still_lie_there(run, tmp_path):
    recipe = load(run.recipe)
    assert units_of(run) is None and place(run) == "how many units there are to be is not known yet" and not is_share_done(run, recipe)
    run.write_manifest(recipe, units={"folder": str(tmp_path), "count": 2})
    for name in ("unit-00000.tc", "unit-00001.tc", ".unit-00002.tc.host.1.tmp", "cache.json"):
        (tmp_path / name).touch()
    assert units_of(run).are_all_there and not is_share_done(run, recipe)
    write_outcome(run.open_attempt(), "done", step=None, checkpoint=None, reason="")
    assert is_share_done(run, recipe)
    assert not is_share_done(run, load(run.recipe, ["teacher.cap=9"]))
    (tmp_path / "unit-00001.tc").unlink()
    assert not is_share_done(run, recipe)


def test_what_starts_a_share_is_the_command_that_a_person_would_give(run):
    argv = read_share(run).argv(run.recipe, 4, python="python")
    assert argv == f"python -m harness capture {run.recipe} --shards 8 --shard 3 --processes 4".split()
    assert json.loads((run.path / "share.json").read_text()) == {"verb": "capture", "shards": 8, "shard": 3}


def test_a_shard_that_there_is_not_is_refused(run):
    with pytest.raises(RecipeError, match="--shard 8; with --shards 8 it goes from 0 to 7"):
        check_share(load(run.recipe), Share("capture", 8, 8), 1)


@pytest.mark.parametrize("machines", [Machines(4), Machines(2, 3, 1, "r1", 2345)])
def test_machines_are_what_their_environment_says(machines):
    stale = {"NNODES": "9", "NODE_RANK": "8", "MASTER_ADDR": "gone", "MASTER_PORT": "1"}
    assert Machines.from_environment(machines.processes, stale | machines.environment) == machines
