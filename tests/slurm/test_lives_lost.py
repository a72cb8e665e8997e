"""Nodes and ranks that are lost without a word: the run goes on elsewhere, and what may still run of the old life ends by itself."""

import os
import signal

import pytest

from slurm.jobs import JobRun, SketchedRun, whole

pytestmark = pytest.mark.slow


def test_a_lost_batch_node_is_left_for_another_and_the_run_goes_on_from_its_last_commit(slurm_cluster, tmp_path):
    rig = slurm_cluster
    run = JobRun(rig, tmp_path, "train.max_steps=100", pace_s=0.6)
    run.submit()
    run.wait_for_step(7)
    name = rig.hosts(run.job)[0]
    rig.kill_node(name)
    run.wait_for(lambda: len(run.events("job_began")) == 2, "the job to begin again")
    assert name not in run.events("job_began")[1]["hosts"]
    run.wait_for(lambda: len(run.begins()) > 1, "the next life")
    run.pace(0)
    assert run.wait() == "COMPLETED", run.said()
    run.check_same(whole(tmp_path, "train.max_steps=100"), repeats=True)
    rig.revive_node(name)
    run.check_nothing_left()


@pytest.mark.parametrize(("nodes", "lost"), [(2, 1), (1, 0)], ids=["one of two nodes", "the only node"])
def test_ranks_that_run_on_where_only_slurmd_was_lost_are_ended_before_the_next_life(slurm_cluster, tmp_path, nodes, lost):
    rig = slurm_cluster
    run = SketchedRun(rig, tmp_path, "commits+ignores", "done", nodes=nodes)
    run.submit()
    run.wait_for_phase("training")
    name = rig.hosts(run.job)[lost]
    rig.kill_node(name)
    run.wait_for(lambda: len(run.events("job_began")) == 2, "the job to begin again")
    assert name not in run.events("job_began")[1]["hosts"]
    # The folder is free only when nobody of the old life is left who could write.
    assert nodes == 2 or not run.left_running(1)
    assert run.wait() == "COMPLETED", run.said()
    rig.wait_for(lambda: not run.left_running(1), "the first life to end", 15)
    rig.revive_node(name)


def test_a_rank_that_is_stopped_is_named_and_a_new_life_begins_in_the_job(slurm_cluster, tmp_path):
    run = JobRun(slurm_cluster, tmp_path, "train.max_steps=30", "watchdog.step_s=4")
    run.submit()
    run.wait_for_step(12)
    pid = run.pid("rank", node=1)
    os.kill(pid, signal.SIGSTOP)
    run.wait_for_life(2)
    assert not run.left_running(1)
    ended = run.events("life_ended")[0]
    assert (ended["outcome"], ended["then"]) == ("hang", "again")
    assert ended["why"].startswith("hang: no sign of life from rank 1 on ") and f"(pid {pid})" in ended["why"]
    assert "its process is stopped (SIGSTOP)" in ended["why"] and ended["why"] in run.said()
    assert (run.path / "logs" / "attempt-1" / "hang.txt").is_file()
    run.pace(0)
    assert run.wait() == "COMPLETED", run.said()
    assert len(run.events("job_began")) == 1
    run.check_lives(False)
    run.check_same(whole(tmp_path, "train.max_steps=30"), repeats=True)
