"""What the other tests of Slurm stand on: the rig starts, does what a cluster does, and leaves nothing behind."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import slurm.rig
from slurm.rig import FREEZER, Rig, RigError, processes_with, why_not

TELLING_TASK = """\
trap 'echo task $SLURM_PROCID' USR1
setsid bash -c 'trap "echo worker $SLURM_PROCID" USR1; echo ready; while :; do sleep 0.1; done' &
while :; do sleep 0.1; done
"""
"""A task with a worker in a session of its own; each says so when it gets USR1."""


def start_telling_job(rig: Rig) -> str:
    """Two of these tasks, and a batch script that says when it gets the signal."""
    (rig.folder / "task.sh").write_text(TELLING_TASK)
    script = f'trap "echo batch" USR1\nsrun bash {rig.folder}/task.sh & srun=$!\nwhile kill -0 $srun; do wait $srun; done'
    job = rig.submit(script, "-N2")
    rig.wait_for(lambda: rig.log(job).count("ready") == 2, "both tasks to start")
    return job


def told_within(rig: Rig, job: str, expected: set[str]) -> set[str]:
    """Who has told of a signal by one second after all those expected have."""

    def told() -> set[str]:
        return {line for line in rig.log(job).splitlines() if line.split()[0] in ("task", "worker", "batch")}

    rig.wait_for(lambda: told() >= expected, f"{expected}")
    time.sleep(1)
    return told()


def test_a_job_runs_on_two_nodes_with_their_gpus(each_tracking):
    rig = each_tracking
    job = rig.submit("srun bash -c 'echo $SLURMD_NODENAME has $CUDA_VISIBLE_DEVICES'", "-N2", "--gres=gpu:h100:2")
    rig.wait_for_state(job, "COMPLETED")
    assert sorted(rig.log(job).splitlines()) == [f"{host} has 0,1" for host in rig.hosts(job)]
    assert f"proctrack/{rig.tracking}" in rig.run("scontrol", "show", "config")


def test_a_steps_signal_reaches_the_tasks_alone_under_cgroup(slurm_cluster):
    job, tasks = start_telling_job(slurm_cluster), {"task 0", "task 1"}
    slurm_cluster.run("scancel", "--signal=USR1", job)
    assert told_within(slurm_cluster, job, tasks) == tasks


def test_a_steps_signal_reaches_every_process_of_the_step_under_linuxproc(slurm_cluster_linuxproc):
    job, everyone = start_telling_job(slurm_cluster_linuxproc), {"task 0", "task 1", "worker 0", "worker 1"}
    slurm_cluster_linuxproc.run("scancel", "--signal=USR1", job)
    assert told_within(slurm_cluster_linuxproc, job, everyone) == everyone


def test_a_signal_to_the_batch_script_reaches_no_step(each_tracking):
    job = start_telling_job(each_tracking)
    each_tracking.run("scancel", "--batch", "--signal=USR1", job)
    assert told_within(each_tracking, job, {"batch"}) == {"batch"}


def test_a_requeued_job_runs_again_and_its_log_is_continued(slurm_cluster):
    job = slurm_cluster.submit("echo life $SLURM_RESTART_COUNT\nsleep 600")
    slurm_cluster.wait_for(lambda: "life" in slurm_cluster.log(job))
    slurm_cluster.run("scontrol", "requeue", job)
    slurm_cluster.wait_for(lambda: slurm_cluster.log(job).count("life") == 2)
    assert slurm_cluster.log(job).split("life")[-1].strip() == "1"
    assert slurm_cluster.show(job)["Restarts"] == "1"


@pytest.mark.parametrize("user_signal", [True, False])
def test_a_preempted_job_is_told_at_once_only_where_slurm_is_set_so(slurm_cluster, user_signal):
    rig = slurm_cluster
    rig.set_user_signal(user_signal)
    job = rig.submit("trap 'echo told' USR1\nwhile :; do sleep 0.1; done", "--exclusive", "-N3", "--signal=B:USR1@60")
    rig.wait_for_state(job, "RUNNING")
    rig.submit("sleep 600", "--exclusive", "-N1", "--partition=high")
    rig.wait_for(lambda: rig.show(job)["PreemptTime"] != "None", "the preemption")
    time.sleep(3)
    assert ("told" in rig.log(job)) is user_signal


@pytest.mark.slow
def test_a_time_limit_can_come_within_the_minute(slurm_cluster):
    job = slurm_cluster.submit("sleep 600", "--time=10")
    slurm_cluster.wait_for_state(job, "RUNNING")
    slurm_cluster.end_in(job, 5)
    slurm_cluster.wait_for_state(job, "TIMEOUT", timeout_s=50)


@pytest.mark.slow
def test_the_tasks_of_a_node_whose_slurmd_is_killed_run_on_while_its_job_is_requeued(slurm_cluster):
    rig = slurm_cluster
    job = rig.submit("echo life\nsrun sleep 600", "-N2", "--exclusive")
    tasks = rig.wait_for(lambda: len(pids := rig.processes_of(job)) == 5 and pids, "two tasks, two srun and the batch script")
    lost = rig.hosts(job)[1]
    rig.kill_node(lost)
    rig.wait_for(lambda: "DOWN" in rig.run("scontrol", "show", "node", "-o", lost), f"{lost} to be down")
    on_lost_node = set(tasks) & set(processes_with(f"SLURM_CONF={rig.folder}/slurm.conf", f"SLURMD_NODENAME={lost}"))
    assert len(on_lost_node) == 1
    rig.wait_for(lambda: rig.log(job).count("life\n") == 2, "the second life")
    assert lost not in rig.hosts(job)
    rig.revive_node(lost)
    rig.wait_for(lambda: not on_lost_node & set(rig.processes_of(job)), "the first life's task to be ended by its node")


def test_a_node_without_power_has_no_tasks_and_can_be_revived(slurm_cluster):
    rig = slurm_cluster
    job = rig.submit("srun sleep 600", "-N2", "--exclusive")
    rig.wait_for(lambda: len(rig.processes_of(job)) == 5, "all processes")
    lost = rig.hosts(job)[1]
    rig.kill_node(lost, with_jobs=True)
    assert processes_with(f"SLURM_CONF={rig.folder}/slurm.conf", f"SLURMD_NODENAME={lost}") == []
    assert len(rig.processes_of(job)) == 4
    rig.revive_node(lost)


def test_what_does_not_come_about_is_an_error_with_slurms_own_words(slurm_cluster):
    job = slurm_cluster.submit("true")
    with pytest.raises(RigError, match=rf"waited 1 s in vain for job {job} to be FAILED(?s:.*)slurmctld.log(?s:.*)JobId={job}"):
        slurm_cluster.wait_for_state(job, "FAILED", timeout_s=1)
    with pytest.raises(RigError, match="scontrol show job nonsense ended with 1"):
        slurm_cluster.run("scontrol", "show", "job", "nonsense")


def test_a_process_that_a_job_orphans_does_not_stay_as_a_zombie(slurm_cluster):
    job = slurm_cluster.submit("setsid sleep 1 & echo $!\nsleep 0.5")
    slurm_cluster.wait_for_state(job, "COMPLETED")
    orphan = Path("/proc") / slurm_cluster.log(job).strip()
    slurm_cluster.wait_for(lambda: not orphan.exists(), f"the end of {orphan}", timeout_s=5)


STUBBORN = (
    "srun bash -c 'trap : TERM HUP INT; setsid bash -c \"trap : TERM HUP INT; echo ready; while :; do sleep 1; done\" & wait; sleep 600'"
)


def traces_of(folder: Path, job: str) -> list[str]:
    """What is left of a rig: its processes, its folder, and the cgroup of its job."""
    processes = [f"process {pid}" for pid in processes_with(f"SLURM_CONF={folder}/slurm.conf")]
    return processes + [str(path) for path in (folder, *FREEZER.glob(f"slurm_*/uid_*/job_{job}")) if path.exists()]


@pytest.mark.parametrize("tracking", ["cgroup", "linuxproc"])
def test_nothing_is_left_of_a_rig(tracking):
    if why_not(tracking):
        pytest.skip(why_not(tracking))
    with Rig(tracking, nodes=1) as rig:
        job = rig.submit(STUBBORN)
        rig.wait_for(lambda: "ready" in rig.log(job))
        assert len(traces_of(rig.folder, job)) > 5
        # As when Slurm is killed while it kills a step.
        for step in FREEZER.glob(f"slurm_*/uid_*/job_{job}/step_0"):
            (step / "freezer.state").write_text("FROZEN")
    assert traces_of(rig.folder, job) == []


def test_nothing_runs_on_after_the_process_that_owned_a_rig_was_killed():
    if why_not("linuxproc"):
        pytest.skip(why_not("linuxproc"))
    program = (
        "import time\nfrom slurm.rig import Rig\nrig = Rig('linuxproc', nodes=1).up()\n"
        f"job = rig.submit({STUBBORN!r})\nrig.wait_for(lambda: 'ready' in rig.log(job))\nprint(rig.folder, flush=True)\ntime.sleep(600)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(slurm.rig.__file__).parents[1])}
    owner = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, env=environment, text=True)
    folder = Path(owner.stdout.readline().strip())
    entry = f"SLURM_CONF={folder}/slurm.conf"
    assert len(processes_with(entry)) > 5
    owner.kill()
    owner.wait()
    deadline = time.monotonic() + 10
    while left := [*processes_with(entry), *([folder] if folder.exists() else [])]:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)
    owner.stdout.close()


def test_a_machine_on_which_no_rig_can_work_says_why(monkeypatch, tmp_path):
    monkeypatch.setattr(slurm.rig, "FREEZER", tmp_path)
    assert "needs a cgroup v1 freezer" in why_not("cgroup")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert "needs root" in why_not("linuxproc")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "slurmctld, slurmd, munged, sbatch" in why_not("linuxproc") and "apt-get install slurm-wlm munge" in why_not("linuxproc")
