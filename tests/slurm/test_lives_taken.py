"""What Slurm takes away is saved first and goes on later, no step lost: a time limit, a preemption with and without a user signal."""

import pytest

from slurm.jobs import JobRun, whole

pytestmark = pytest.mark.slow
OVERRIDES = ["train.max_steps=120", "train.dataloader_num_workers=2"]


def test_a_time_limit_and_preemptions_lose_no_step(each_tracking, tmp_path):
    rig = each_tracking
    # Slurm looks at time limits every half minute.
    run = JobRun(rig, tmp_path, *OVERRIDES, pace_s=0.6)
    run.submit()
    run.wait_for_step(8)
    rig.end_in(run.job, 55)
    run.wait_for_life(2)
    # The job keeps its shorter limit when it is requeued, and on busy cores would meet it once more.
    rig.end_in(run.job, 3600)
    for life, user_signal in ((2, True), (3, False)):
        run.wait_for_life(life)
        run.wait_for_step(run.begins()[-1] + 2, life)
        rig.set_user_signal(user_signal)
        urgent = rig.submit("sleep 2", "--exclusive", "-N2", "--partition=high")
        rig.wait_for_state(urgent, "COMPLETED")
        assert not run.left_running(life)
    run.wait_for_life(4)
    run.pace(0)
    assert run.wait() == "COMPLETED", run.said()
    limit, preempted, preempted_silently = (reason for _, reason in run.stops())
    assert limit.startswith("slurm: time limit") and preempted.startswith("slurm: preempted") and "SIGTERM" in preempted_silently
    assert rig.show(run.job)["Restarts"] == "3" and [event["then"] for event in run.events("life_ended")] == ["requeue"] * 3 + ["done"]
    run.check_lives(True, True, True)
    run.check_same(whole(tmp_path, *OVERRIDES))
    run.check_nothing_left()
