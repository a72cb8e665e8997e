"""What is read of a real Slurm, and what the verbs that watch and end runs do there."""

import re
import time

import pytest
from click.testing import CliRunner

from harness.checkpoint.ledger import Ledger
from harness.cli import cancel, logs, nodes, status
from harness.cluster import slurm
from harness.cluster.slurm import find_job, is_alive, list_jobs
from harness.cluster.status import read_statuses
from harness.cluster.submission import write_job
from harness.errors import ClusterError
from harness.run import RankReport, RunDir

SLEEP = "sleep 300"


def ask(verb, *arguments):
    done = CliRunner().invoke(verb.command, [str(argument) for argument in arguments], catch_exceptions=False)
    return done.output


def field(rig, job, name):
    """A time as `scontrol show job` has it, in unix seconds."""
    return time.mktime(time.strptime(rig.show(job)[name], "%Y-%m-%dT%H:%M:%S"))


# ---- jobs


def test_a_running_job_is_read_as_scontrol_shows_it(slurm_cluster):
    rig = slurm_cluster
    name, comment = "a name=x | y", "step 3, loss=1.2 JobState=BAD"
    job_id = rig.submit(SLEEP, "-N2", f"--job-name={name}", f"--comment={comment}", "--time=10")
    job = rig.wait_for(lambda: (job := find_job(job_id)).state == "RUNNING" and job, "the job to run")
    assert (job.id, job.name, job.comment, job.user, job.partition) == (job_id, name, comment, "root", "low")
    assert (job.state, job.reason, job.nodes, list(job.hosts), job.restarts) == ("RUNNING", "", 2, rig.hosts(job_id), 0)
    assert (job.submitted, job.started, job.ends) == (field(rig, job_id, "SubmitTime"), field(rig, job_id, "StartTime"), job.started + 600)
    assert job.preempted is None and is_alive(job) and list_jobs()[job_id] == job


def test_names_and_comments_may_hold_whatever_slurm_takes(slurm_cluster):
    rig = slurm_cluster
    job_id = rig.submit(SLEEP, "--hold", "--job-name=n\nm 'x' \"y\" ü")
    assert find_job(job_id).name == "n\nm 'x' \"y\" ü"
    slurm.comment_job(job_id, "step 3/9\nloss=1.5 'x' \"y\" ü")
    assert find_job(job_id).comment == "step 3/9 loss=1.5 'x' \"y\" ü"


def test_the_elements_of_an_array_are_jobs_of_their_own_also_while_they_wait(slurm_cluster):
    rig = slurm_cluster
    array = rig.submit(SLEEP, "--array=0-3%2", "-n2")
    rig.wait_for(lambda: [job.state for job in list_jobs([array]).values()].count("RUNNING") == 2, "two elements to run")
    jobs = list_jobs([array])
    assert {job_id: job.state for job_id, job in jobs.items()} == {
        f"{array}_0": "RUNNING",
        f"{array}_1": "RUNNING",
        f"{array}_2": "PENDING",
        f"{array}_3": "PENDING",
    }
    assert jobs[f"{array}_3"].reason == "JobArrayTaskLimit" and find_job(f"{array}_3") == jobs[f"{array}_3"]
    own_id = re.search(r"JobId=(\d+)", rig.run("scontrol", "show", "job", "-o", f"{array}_1"))[1]
    assert find_job(own_id).id == f"{array}_1", "what SLURM_JOB_ID is inside of an element"
    slurm.cancel_job(f"{array}_1", f"{array}_3")
    rig.wait_for(lambda: list_jobs([array])[f"{array}_1"].state == "CANCELLED", "the cancelled element to end")
    assert is_alive(find_job(f"{array}_0")) and find_job(f"{array}_3") is None, "Slurm forgets an element that never began at once"


@pytest.mark.slow
def test_a_job_waits_is_released_requeued_held_and_ended(slurm_cluster):
    rig = slurm_cluster
    job_id = rig.submit(SLEEP, "--hold", "--requeue")
    held = find_job(job_id)
    assert (held.state, held.reason, held.hosts, held.started, held.ends) == ("PENDING", "JobHeldUser", (), None, None)
    rig.run("scontrol", "release", job_id)
    rig.wait_for_state(job_id, "RUNNING")
    slurm.requeue_job(job_id)
    rig.wait_for_state(job_id, "PENDING")
    again = find_job(job_id)
    assert (again.restarts, again.reason) == (1, "BeginTime") and again.started >= held.submitted
    for arguments, state in ((["requeuehold"], "PENDING"), (["requeuehold", "state=specialexit"], "SPECIAL_EXIT")):
        if find_job(job_id).reason == "job requeued in held state":
            rig.run("scontrol", "release", job_id)
        rig.wait_for_state(job_id, "RUNNING")
        rig.run("scontrol", *arguments, job_id)
        rig.wait_for(lambda state=state: find_job(job_id).state == state, f"the job to be {state}")
        assert find_job(job_id).reason == "job requeued in held state" and is_alive(find_job(job_id))
    slurm.cancel_job(job_id)
    rig.wait_for(lambda: find_job(job_id).state == "CANCELLED", "the job to end")
    assert not is_alive(find_job(job_id))
    with pytest.raises(ClusterError, match="scontrol: .*already finished.*; it has ended; `harness status RUN`"):
        slurm.comment_job(job_id, "late")


def test_a_preempted_job_says_when_it_was_and_when_its_grace_ends(slurm_cluster):
    rig = slurm_cluster
    low = rig.submit("trap '' TERM\nwhile :; do sleep 1; done", "-N3", "--exclusive", "--time=10")
    rig.wait_for_state(low, "RUNNING")
    assert find_job(low).preempted is None
    rig.submit(SLEEP, "-N3", "--exclusive", "-p", "high", "--time=1")
    job = rig.wait_for(lambda: (job := find_job(low)).preempted and job, "the preemption")
    assert abs(job.preempted - time.time()) < 10 and is_alive(job)
    assert job.state in ("RUNNING", "SIGNALING")  # the latter while slurmctld sends its SIGTERM
    assert job.ends - job.preempted == slurm.grace_s("low")


def test_a_dependency_is_read_and_changed(slurm_cluster):
    rig = slurm_cluster
    first, second = rig.submit(SLEEP, "--hold"), rig.submit(SLEEP, "--hold")
    waiting = rig.submit(SLEEP, f"--dependency=afterok:{first}")
    assert find_job(waiting).dependency == f"afterok:{first}(unfulfilled)"
    slurm.depend_on(waiting, f"afterok:{second}")
    assert find_job(waiting).dependency == f"afterok:{second}(unfulfilled)"


def test_jobs_that_slurm_does_not_know_are_left_out(slurm_cluster):
    assert find_job("99999999") is None and list_jobs(["99999999", "99999998"]) == {}
    known = slurm_cluster.submit(SLEEP, "--hold")
    assert list(list_jobs([known, "99999999"])) == [known]


def test_a_script_is_sent_as_it_is_whatever_the_environment_says(slurm_cluster, monkeypatch, tmp_path):
    monkeypatch.setenv("SBATCH_PARTITION", "nope")
    monkeypatch.setenv("SQUEUE_FORMAT", "%i")
    script = tmp_path / "job.sbatch"
    script.write_text(f"#!/bin/bash\n#SBATCH --hold\n#SBATCH --output=/dev/null\n{SLEEP}\n")
    job_id = slurm.submit_script(script, "--partition=high", "--exclude=r[1-2]")
    assert (find_job(job_id).partition, find_job(job_id).state) == ("high", "PENDING")
    with pytest.raises(ClusterError, match="Invalid partition name specified; `harness nodes` lists the partitions"):
        slurm.submit_script(script, "--partition=nope")


def test_a_controller_that_is_down_is_said_within_seconds(slurm_cluster, monkeypatch, tmp_path):
    """Its port is one where nobody listens."""
    configuration = (slurm_cluster.folder / "slurm.conf").read_text()
    (tmp_path / "slurm.conf").write_text(
        re.sub(r"SlurmctldPort=\d+", "SlurmctldPort=1\nSlurmctldTimeout=1\nMessageTimeout=2", configuration)
    )
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "slurm.conf"))
    began = time.monotonic()
    with pytest.raises(ClusterError, match="squeue: .*Unable to contact slurm controller.*`scontrol ping` says whether it is up"):
        list_jobs()
    assert time.monotonic() - began < 30


# ---- nodes


@pytest.mark.parametrize("nodelist", ["r1", "r[1-3,5],a", "r[08-11]n[1-2]", "node[001-003,010]", "gpu-a-[1-2],b", "a[1-2]b[3-4],c"])
def test_node_lists_are_expanded_as_slurm_does(slurm_cluster, nodelist):
    assert list(slurm.hostnames(nodelist)) == slurm_cluster.run("scontrol", "show", "hostnames", nodelist).split()


def test_nodes_are_what_the_rig_has_and_what_a_job_takes_is_not_free(slurm_cluster):
    rig = slurm_cluster
    job = rig.submit(SLEEP, "-w", "r1", "-n1", "--gres=gpu:h100:1")
    rig.wait_for_state(job, "RUNNING")
    rig.run("scontrol", "update", "NodeName=r3", "State=DRAIN", "Reason=bad fan: GPU 1 | x=y")
    r1, r2, r3 = rig.wait_for(lambda: (found := slurm.list_nodes())[0].state == "mixed" and found, "r1 to be mixed")
    assert (r1.name, set(r1.partitions), r1.cpus, r1.cpus_free, r1.memory_mib) == ("r1", {"low", "high"}, 4, 3, 4000)
    assert (r1.gpus, r1.gpus_free, r2.gpus_free) == ({"h100": 2}, {"h100": 1}, {"h100": 2})
    assert (r2.state, r2.is_usable, r3.state, r3.is_usable, r3.reason) == ("idle", True, "drained", False, "bad fan: GPU 1 | x=y")
    table = ask(nodes).splitlines()
    assert [line.split() for line in table[1:]] == [
        ["high", "2", "h100", "3", "1", "1", "0", "1", "3", "7"],
        ["low", "2", "h100", "3", "1", "1", "0", "1", "3", "7"],
        "drained: r3 (bad fan: GPU 1 | x=y)".split(),
    ]


def test_what_is_known_of_the_rigs_settings(slurm_cluster):
    assert (slurm.default_partition(), slurm.grace_s("low"), slurm.kill_wait_s()) == ("low", 20, 10)
    assert slurm.node_address("r1") == "127.0.0.1"
    with pytest.raises(ClusterError, match="Partition nope not found"):
        slurm.grace_s("nope")


# ---- runs


@pytest.fixture
def run(tmp_path):
    run = RunDir(tmp_path / "runs" / "first")
    run.path.mkdir(parents=True)
    run.recipe.write_text("train: {max_steps: 200}\n")
    return run


def send(rig, run, *flags, script=SLEEP):
    """As `harness submit` leaves it behind, with a script that trains nothing."""
    (run.path / "logs").mkdir(exist_ok=True)
    Ledger(run.ledger, None).append("submitted", last_attempt=0)
    job = rig.submit(script, *flags, f"--output={run.path}/logs/slurm-%j.log")
    write_job(run, {"jobs": [{"id": job, "submitted": time.time(), "why": "submitted"}]})
    return job


def begin_life(run, job):
    """As the allocation and rank 0 would."""
    Ledger(run.ledger, None).append("job_began", job=job, restart=0, hosts=["r1"])
    report = RankReport(0, run.open_attempt())
    report.log.write_text("step 1/200\n")
    report.enter("training")
    report.beat(1)
    return report


def test_a_run_is_seen_from_the_queue_to_its_end(slurm_cluster, run):
    rig = slurm_cluster
    job = send(rig, run, "--hold", script=f"echo pre-flight; {SLEEP}")

    def state():
        return read_statuses([run])[0].text

    assert state() == "held: JobHeldUser"
    rig.run("scontrol", "release", job)
    rig.wait_for(lambda: state() == "running: starting", "the job to start")
    rig.wait_for(lambda: any(run.path.glob("logs/slurm-*.log")), "its log")
    rig.wait_for(lambda: ask(logs, run.path, "--job") == "pre-flight\n", "its first words")
    begin_life(run, job)
    assert state() == "running: training"
    block = ask(status, run.path)
    assert "step    1 of 200 (0 %)" in block and f"job     {job}" in block and re.search(r"nodes   r[1-3]\n", block)
    slurm.requeue_job(job)
    rig.wait_for(lambda: state() == "requeued: BeginTime", "the job to wait again")
    assert "is cancelled; it was requeued: BeginTime; nothing had to be saved" in ask(cancel, run.path, "--save")
    rig.wait_for(lambda: state() == f"cancelled: job {job} was cancelled", "the job to end")
    assert ask(cancel, run.path).endswith(f"nothing to cancel; it is cancelled: job {job} was cancelled\n")


def test_a_job_that_asks_for_more_than_there_is_says_so_while_it_waits(slurm_cluster, run):
    send(slurm_cluster, run, "-N9")
    slurm_cluster.wait_for(lambda: read_statuses([run])[0].text == "pending: PartitionNodeLimit", "Slurm's reason")


def test_a_run_that_trains_is_asked_to_save_and_its_job_is_left_to_it(slurm_cluster, run):
    rig = slurm_cluster
    job = send(rig, run)
    rig.wait_for_state(job, "RUNNING")
    begin_life(run, job)
    assert "asked to save at its next step and to leave" in ask(cancel, run.path, "--save")
    assert run.stop.is_file() and rig.state(job) == "RUNNING"


def test_an_array_is_cancelled_whole(slurm_cluster, tmp_path):
    rig = slurm_cluster
    array = rig.submit(SLEEP, "--array=0-2%1")
    for index in range(3):
        run = RunDir(tmp_path / "runs" / "grid" / f"0{index}-x")
        run.path.mkdir(parents=True)
        run.recipe.write_text("")
        Ledger(run.ledger, None).append("submitted", last_attempt=0)
        write_job(run, {"jobs": [{"id": f"{array}_{index}", "submitted": time.time(), "why": "submitted"}]})
    rig.wait_for(lambda: find_job(f"{array}_0").state == "RUNNING", "the first element to run")
    assert ask(cancel, array, "--root", tmp_path / "runs").count(" is cancelled; it was ") == 3
    runs = [RunDir(path) for path in sorted((tmp_path / "runs" / "grid").iterdir())]
    rig.wait_for(lambda: {found.state for found in read_statuses(runs)} == {"cancelled"}, "all elements to end")
    assert read_statuses(runs)[2].reason == f"Slurm no longer knows job {array}_2, which never began"


@pytest.mark.slow
def test_a_job_that_slurm_ended_without_a_word_of_the_run_is_lost(slurm_cluster, run):
    rig = slurm_cluster
    job = send(rig, run, "--no-requeue", "-w", "r2")
    rig.wait_for_state(job, "RUNNING")
    begin_life(run, job)
    rig.kill_node("r2", with_jobs=True)
    rig.wait_for(lambda: read_statuses([run])[0].text.startswith(f"lost: job {job} ended: NODE_FAIL"), "the loss of the node", timeout_s=90)
