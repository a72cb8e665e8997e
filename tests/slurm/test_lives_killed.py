"""kill -9 of whatever a run consists of: a new life in the same job, from the last commit, and nothing of the old one runs on."""

import json
import os
import signal

import pytest

from slurm.jobs import JobRun, measure_restart, whole

pytestmark = pytest.mark.slow
WORKERS = "train.dataloader_num_workers=2"


def test_a_killed_rank_launcher_or_shim_is_replaced_in_the_same_job(each_tracking, tmp_path):
    overrides = ["train.max_steps=40", "train.logging_steps=1", WORKERS]
    run = JobRun(each_tracking, tmp_path, *overrides)
    run.submit()
    for life, (what, node) in enumerate([("rank", 1), ("launcher", 0), ("shim", 1)], start=1):
        run.wait_for_step(8 * life, life)
        os.kill(run.pid(what, node), signal.SIGKILL)
        run.wait_for_life(life + 1)
        assert not run.left_running(life)
    run.pace(0)
    assert run.wait() == "COMPLETED", run.said()
    assert each_tracking.show(run.job)["Restarts"] == "0" and len(run.events("job_began")) == 1
    # The launcher of a shim that is gone is told to end; whether its ranks can save before srun ends the step is a race.
    run.check_lives(False, False, None)
    run.check_same(whole(tmp_path, *overrides), repeats=True)
    run.check_nothing_left()
    *parts, total = measure_restart(run.path, life=1).values()
    assert len(parts) == 7 and min(parts) > 0 and sum(parts) == pytest.approx(total) and total < 120


def test_a_killed_allocation_takes_its_ranks_along_and_the_run_can_be_submitted_again(each_tracking, tmp_path):
    overrides = ["train.max_steps=30", WORKERS]
    run = JobRun(each_tracking, tmp_path, *overrides)
    run.submit()
    run.wait_for_step(8)
    first = run.job
    os.kill(run.pid("allocation"), signal.SIGKILL)
    assert run.wait() == "FAILED"
    run.check_nothing_left()
    run.pace(0)
    run.submit()
    assert run.job != first and [job["why"] for job in json.loads((run.path / "job.json").read_text())["jobs"]] == ["submitted"] * 2
    assert run.wait() == "COMPLETED", run.said()
    # Slurm ends the job's steps by SIGTERM, after which there is a while to save.
    run.check_lives(None)
    run.check_same(whole(tmp_path, *overrides), repeats=True)
