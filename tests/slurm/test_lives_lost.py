"""Nodes and ranks that are lost without a word: the run goes on elsewhere, and what may still run of the old life ends by itself."""

import os
import signal

import pytest

from slurm.jobs import PATIENCE_S, JobRun, whole

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("lost", [0, 1], ids=["the batch node", "the other node"])
def test_a_lost_node_is_left_for_another_and_its_ranks_end_by_themselves(slurm_cluster, tmp_path, lost):
    rig = slurm_cluster
    run = JobRun(rig, tmp_path, "train.max_steps=100", pace_s=0.6)
    run.submit()
    run.wait_for_step(7)
    name = rig.hosts(run.job)[lost]
    rig.kill_node(name)
    rig.wait_for(lambda: len(run.events("job_began")) == 2, "the job to begin again", PATIENCE_S)
    assert name not in run.events("job_began")[1]["hosts"]
    run.wait_for_life(run.run.attempts()[-1] + 1)
    assert not any(run.left_running(life) for life in run.run.attempts()[:-1])
    run.pace(0)
    assert run.wait() == "COMPLETED", run.said()
    run.check_same(whole(tmp_path, "train.max_steps=100"), repeats=True)
    rig.revive_node(name)


def test_a_job_of_one_node_that_has_only_lost_its_slurmd_is_not_continued_by_two(slurm_cluster, tmp_path):
    rig = slurm_cluster
    run = JobRun(rig, tmp_path, "train.max_steps=400", "backend=single", "train.global_batch_size=2", nodes=1)
    run.submit()
    run.wait_for_step(12)
    (name,) = rig.hosts(run.job)
    rig.kill_node(name)
    run.wait_for_life(2)
    assert name not in run.events("job_began")[1]["hosts"] and not run.left_running(1)
    run.pace(0)
    assert run.wait() == "COMPLETED", run.said()
    # One life at a time wrote, and the second went on from the last commit of the first.
    attempts = [event["attempt"] for event in run.events("committed")]
    assert attempts == sorted(attempts)
    run.check_lives(None)
    rig.revive_node(name)


def test_a_rank_that_is_stopped_is_named_and_a_new_life_begins_in_the_job(slurm_cluster, tmp_path):
    run = JobRun(slurm_cluster, tmp_path, "train.max_steps=30", "watchdog.step_s=4")
    run.submit()
    run.wait_for_step(12)
    pid = run.pid("rank", node=1)
    os.kill(pid, signal.SIGSTOP)
    run.wait_for_life(2)
    assert not run.left_running(1)
    (hang,) = run.events("hang")
    assert (hang["rank"], hang["attempt"]) == (1, 1)
    assert f"(pid {pid})" in run.said() and "its process is stopped (SIGSTOP)" in run.said()
    assert (run.path / "logs" / "attempt-1" / "hang.txt").is_file()
    run.pace(0)
    assert run.wait() == "COMPLETED", run.said()
    assert len(run.events("job_began")) == 1
    run.check_lives(False)
    run.check_same(whole(tmp_path, "train.max_steps=30"), repeats=True)
