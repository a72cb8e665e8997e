"""A run that is told to go: by Slurm, by a person, and at the worst moments."""

import json

import pytest

from harness.run import StopRequest
from slurm.jobs import JobRun, SketchedRun, whole

pytestmark = pytest.mark.slow


def hold(phase: str, seconds: float) -> str:
    """Rank 0 takes so much longer when it first enters a phase that starts so."""
    return f"""
if RANK == 0:
    def around_enter(enter):
        met = []

        def entering(report, name, *arguments):
            enter(report, name, *arguments)
            if name.startswith({phase!r}) and not met:
                met.append(name)
                time.sleep({seconds})

        return entering

    wrap("harness.run:RankReport.enter", around_enter)
"""


MOMENTS = ["loading model", "saving", "evaluating", "training", "saving"]


def test_five_requeues_in_a_row_leave_the_run_as_if_nothing_had_been(slurm_cluster, tmp_path):
    overrides = ["train.max_steps=40", "train.logging_steps=1", "tracking.mode=offline"]
    run = JobRun(slurm_cluster, tmp_path, *overrides, inject=hold(MOMENTS[0], 4))
    run.submit()
    w_and_b = set()
    for life, moment in enumerate(MOMENTS, start=1):
        run.wait_for_phase(moment, life)
        run.tell("USR1")
        # Those of the life that waits in the queue now.
        run.hurt(hold(MOMENTS[life], 3) if life < len(MOMENTS) else "")
        run.wait_for(lambda life=life: len(run.stops()) == life, f"life {life} to stop")
        w_and_b |= {(run.path / "wandb.json").read_text()} if (run.path / "wandb.json").is_file() else set()
    run.wait_for_life(6)
    run.pace(0)
    assert run.wait() == "COMPLETED", run.said()
    assert slurm_cluster.show(run.job)["Restarts"] == "5" and run.begins() == [None, *(step or None for step, _ in run.stops())]
    assert run.stops()[0][0] == 0, "while the model loads nothing has been trained"
    run.check_same(whole(tmp_path, *overrides[:2]))
    assert w_and_b == {(run.path / "wandb.json").read_text()}
    run_ids = {file.name.rpartition("-")[2].removesuffix(".wandb") for file in run.path.glob("wandb/*/run-*.wandb")}
    assert run_ids == {json.loads(w_and_b.pop())["id"]}
    run.check_nothing_left()


def test_a_requeue_a_cancellation_and_a_persons_stop_are_saved_and_go_on_as_they_should(slurm_cluster, tmp_path):
    rig = slurm_cluster
    run = JobRun(rig, tmp_path, "train.max_steps=60")
    run.submit()
    run.wait_for_step(7)
    rig.run("scontrol", "requeue", run.job)
    run.wait_for_life(2)
    assert rig.show(run.job)["Restarts"] == "1"
    run.wait_for_step(run.begins()[1] + 5, 2)
    rig.run("scancel", run.job)
    assert run.wait() == "CANCELLED" and rig.show(run.job)["Restarts"] == "1"
    run.check_nothing_left()
    run.submit()
    run.wait_for_life(3)
    run.wait_for_step(run.begins()[2] + 5, 3)
    said = run.harness("cancel", run.path, "--save").output
    assert "asked to save at its next step and to leave" in said
    assert run.wait() == "FAILED" and rig.show(run.job)["ExitCode"] == "75:0" and rig.show(run.job)["Restarts"] == "0"
    assert "stopped: stopped at step" in run.said() and "cancel: asked by" in run.said()
    run.pace(0)
    run.submit()
    assert run.wait() == "COMPLETED", run.said()
    run.check_lives(True, True, True)
    run.check_same(whole(tmp_path, "train.max_steps=60"))


def test_a_signal_before_the_first_life_is_not_lost(slurm_cluster, tmp_path):
    run = JobRun(slurm_cluster, tmp_path, nodes=1, pace_s=0, preflight=True)
    run.submit()
    run.wait_for_said("--preflight")
    run.tell("USR1")
    run.wait_for_said("preparing the data")
    run.tell("USR1")
    assert run.wait() == "COMPLETED", run.said()
    assert [event["why"] for event in run.events("requeued")] == ["SIGUSR1 to the job"] * 2
    assert run.run.attempts() == [1]


def test_ranks_that_ignore_a_stop_are_killed_in_time_for_the_requeue(slurm_cluster, tmp_path):
    run = SketchedRun(slurm_cluster, tmp_path, "commits+ignores", "done", signal_lead_s=14)
    run.submit()
    run.wait_for_phase("training")
    run.tell("USR1")
    assert run.wait() == "COMPLETED", run.said()
    assert "the deadline of a stop (slurm: SIGUSR1 to the job) has come, and they had not saved" in run.said()
    assert run.ends() == ["requeue", "done"] and slurm_cluster.show(run.job)["Restarts"] == "1"
    run.check_nothing_left()


def test_a_persons_stop_is_not_requeued_though_slurm_takes_the_job_as_well(slurm_cluster, tmp_path):
    run = SketchedRun(slurm_cluster, tmp_path, "goes")
    run.submit()
    run.wait_for_phase("training")
    StopRequest("cancel: asked by me").write(run.run.stop)
    run.tell("USR1")
    assert run.wait() == "FAILED" and slurm_cluster.show(run.job)["Restarts"] == "0"
    assert "stopped: stopped at step 10: cancel: asked by me" in run.said()
