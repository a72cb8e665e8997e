"""Slurm's commands: what they print is read whole, what they refuse is an error that says what to do. Against a real Slurm:
tests/slurm/test_watching.py."""

import re

import pytest
from fake_slurm import FakeSlurm, as_lines, job_row

from harness.cluster import slurm
from harness.cluster.slurm import SlurmJob, find_job, hostnames, is_alive, list_jobs, list_nodes, parse_gpus
from harness.errors import ClusterError


@pytest.fixture
def fake_slurm(tmp_path, monkeypatch):
    return FakeSlurm(tmp_path / "bin", monkeypatch)


# ---- jobs


def test_a_running_job_is_read_with_all_that_slurm_says_of_it(fake_slurm):
    row = job_row("2000", name="a name=x y", comment="step 3, loss=1.2 JobState=BAD | x", preempted="1795379655", restarts="1")
    fake_slurm.says("squeue", as_lines(row))
    assert find_job("2000") == SlurmJob(
        id="2000",
        name="a name=x y",
        user="root",
        partition="low",
        state="RUNNING",
        reason="",
        hosts=("q1", "q2"),
        nodes=2,
        submitted=1795379653.0,
        started=1795379653.0,
        ends=1795380253.0,
        preempted=1795379655.0,
        restarts=1,
        comment="step 3, loss=1.2 JobState=BAD | x",
        dependency="",
    )


def test_what_a_waiting_job_does_not_have_is_nothing_and_not_a_word_of_slurms(fake_slurm):
    row = job_row("5", "PENDING", "Dependency", started="N/A", ends="N/A", dependency="afterany:1(unfulfilled)")
    fake_slurm.says("squeue", as_lines(row))
    job = find_job("5")
    assert (job.hosts, job.started, job.ends, job.preempted, job.comment) == ((), None, None, None, "")
    assert (job.reason, job.dependency) == ("Dependency", "afterany:1(unfulfilled)")


def test_jobs_are_listed_by_one_call_whatever_line_breaks_their_names_hold(fake_slurm):
    fake_slurm.says("squeue", as_lines(job_row("2_1", name="n\nm"), job_row("2_3", "PENDING", "JobArrayTaskLimit"), job_row("7")))
    jobs = list_jobs(["2", "7", "99"])
    assert list(jobs) == ["2_1", "2_3", "7"] and jobs["2_1"].name == "n\nm" and jobs["2_3"].state == "PENDING"
    [asked] = fake_slurm.asked("squeue")
    assert asked[asked.index("--jobs") + 1] == "2,7,99" and {"--array", "--states=all"} <= set(asked)


def test_without_ids_the_jobs_of_this_user_are_asked_for_and_with_none_nothing_is(fake_slurm):
    assert list_jobs([]) == {} and fake_slurm.asked("squeue") == []
    assert list_jobs() == {}
    [asked] = fake_slurm.asked("squeue")
    assert "--user" in asked and "--jobs" not in asked


def test_a_job_that_slurm_has_forgotten_is_none(fake_slurm):
    fake_slurm.refuses("squeue", "slurm_load_jobs error: Invalid job id specified")
    assert find_job("77777") is None and list_jobs(["77777"]) == {}
    with pytest.raises(ClusterError):
        list_jobs()


@pytest.mark.parametrize(
    "state", ["PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT"]
)
def test_a_job_that_may_go_on_is_alive(fake_slurm, state):
    fake_slurm.says("squeue", as_lines(job_row("1", state)))
    assert is_alive(find_job("1"))


@pytest.mark.parametrize(
    "state",
    ["COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "BOOT_FAIL", "DEADLINE", "OUT_OF_MEMORY", "REVOKED"],
)
def test_a_job_that_has_ended_is_not(fake_slurm, state):
    fake_slurm.says("squeue", as_lines(job_row("1", state)))
    assert not is_alive(find_job("1"))
    assert not is_alive(None)


def test_a_job_that_cannot_be_told_apart_from_its_own_fields_is_named(fake_slurm):
    fake_slurm.says("squeue", as_lines(job_row("2013", comment="a\x1fd")))
    with pytest.raises(ClusterError, match="job 2013: its name or comment holds control characters.*scontrol update JobId=2013"):
        find_job("2013")


def test_variables_that_would_change_what_is_read_or_sent_are_kept_from_the_commands(fake_slurm, monkeypatch):
    for name in ("SQUEUE_FORMAT", "SQUEUE_STATES", "SINFO_FORMAT", "SBATCH_PARTITION", "SBATCH_EXPORT"):
        monkeypatch.setenv(name, "x")
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm.conf")
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    fake_slurm.says("sbatch", "7\n")
    slurm.submit_script("job.sbatch")
    environment = fake_slurm.environment("sbatch")
    assert not [name for name in environment if name.startswith(("SQUEUE", "SINFO", "SBATCH"))]
    assert (environment["SLURM_CONF"], environment["LC_ALL"], environment["SLURM_TIME_FORMAT"]) == ("/etc/slurm.conf", "C", "%s")


@pytest.mark.parametrize("said", ["2000\n", "2000;cluster1\n", "Welcome to Example! You have 12 hours left.\n2000\n"])
def test_a_script_is_sent_and_its_id_found_in_whatever_a_site_says_besides(fake_slurm, capfd, said):
    fake_slurm.says("sbatch", said, stderr="sbatch: your quota is at 95 %\n")
    assert slurm.submit_script("run dir/job.sbatch", "--dependency=afterok:7") == "2000"
    assert fake_slurm.asked("sbatch") == [["--parsable", "--dependency=afterok:7", "run dir/job.sbatch"]]
    assert "your quota is at 95 %" in capfd.readouterr().err


def test_an_sbatch_that_names_no_job_is_an_error(fake_slurm):
    fake_slurm.says("sbatch", "Submitted\n")
    with pytest.raises(ClusterError, match="sbatch: said 'Submitted' and no job id; look into squeue"):
        slurm.submit_script("job.sbatch")


def test_a_job_is_cancelled_requeued_commented_and_made_to_wait(fake_slurm):
    slurm.cancel_job("7", "8_1")
    slurm.requeue_job("7")
    slurm.comment_job("7", "step 3/9\nloss\x1f1.5 'x' a=b")
    slurm.depend_on("9", "afterany:7")
    assert fake_slurm.asked("scancel") == [["7", "8_1"]]
    assert fake_slurm.asked("scontrol") == [
        ["requeue", "7"],
        ["update", "JobId=7", "Comment=step 3/9 loss 1.5 'x' a=b"],
        ["update", "JobId=9", "Dependency=afterany:7"],
    ]


# ---- nodes

RECORDED_NODES = as_lines(
    ("q1", "high", "mixed", "2/2/0/4", "4000", "1000", "gpu:h100:2(S:0-1)", "gpu:h100:1(IDX:0)", "none"),
    ("q1", "low", "mixed", "2/2/0/4", "4000", "1000", "gpu:h100:2(S:0-1)", "gpu:h100:1(IDX:0)", "none"),
    ("q2", "low", "drained*", "0/0/4/4", "4000", "0", "gpu:h100:2", "gpu:h100:0(IDX:N/A)", "bad fan: GPU 1 | x=y"),
    ("c1", "cpu", "idle~", "0/8/0/8", "64000", "0", "(null)", "gpu:0", "none"),
    ("c2", "cpu", "idle*", "0/8/0/8", "64000", "0", "(null)", "gpu:0", "none"),
)


def test_nodes_are_read_once_each_with_their_partitions_and_what_is_free(fake_slurm):
    fake_slurm.says("sinfo", RECORDED_NODES)
    q1, q2, c1, c2 = list_nodes()
    assert (q1.name, q1.partitions, q1.state, q1.is_usable, q1.reason) == ("q1", ("high", "low"), "mixed", True, "")
    assert (q1.cpus, q1.cpus_free, q1.memory_mib, q1.memory_free_mib, q1.gpus, q1.gpus_free) == (4, 2, 4000, 3000, {"h100": 2}, {"h100": 1})
    assert (q2.state, q2.is_usable, q2.reason) == ("drained", False, "bad fan: GPU 1 | x=y")
    assert (c1.state, c1.is_usable, c1.gpus) == ("idle", True, {}), "a sleeping node is woken for a job"
    assert not c2.is_usable, "a node that does not answer takes no job"


@pytest.mark.parametrize(
    ("gres", "gpus"),
    [
        ("gpu:h100:8(S:0-1)", {"h100": 8}),
        ("gpu:2", {"gpu": 2}),
        ("gpu:(null):1(IDX:0)", {"gpu": 1}),
        ("gpu:a100:4(S:0,2-3),gpu:h100:2(S:1),shard:h100:32", {"a100": 4, "h100": 2}),
        ("gpu:tesla_v100-sxm2-16gb:8", {"tesla_v100-sxm2-16gb": 8}),
        ("gpu:a100:1(IDX:0),gpu:a100:1(IDX:3)", {"a100": 2}),
        ("mps:gpu:2", {}),
        ("(null)", {}),
        ("", {}),
    ],
)
def test_gpus_are_counted_by_type(gres, gpus):
    assert parse_gpus(gres) == gpus


@pytest.mark.parametrize(
    ("nodelist", "hosts"),
    [
        ("", ()),
        ("q1", ("q1",)),
        ("q[1-3,5],a", ("q1", "q2", "q3", "q5", "a")),
        ("node[008-010,100]", ("node008", "node009", "node010", "node100")),
        ("r[08-09]n[1-2]", ("r08n1", "r08n2", "r09n1", "r09n2")),
        ("gpu-a-1,gpu-b-[2-3]", ("gpu-a-1", "gpu-b-2", "gpu-b-3")),
    ],
)
def test_node_lists_are_expanded(nodelist, hosts):
    assert hostnames(nodelist) == hosts


@pytest.mark.parametrize("nodelist", ["q[1-", "q]", "q[x]", "q[1-]"])
def test_what_is_no_node_list_is_refused(nodelist):
    with pytest.raises(ClusterError, match=r"node list '.*': cannot be read; write it as r\[1-3,5\]"):
        hostnames(nodelist)


def test_a_name_that_resolves_is_its_own_address_and_slurm_knows_the_others(fake_slurm):
    assert slurm.node_address("localhost") == "localhost" and fake_slurm.asked("sinfo") == []
    fake_slurm.says("sinfo", "127.0.0.1\n127.0.0.1\n")
    assert slurm.node_address("q1.invalid") == "127.0.0.1"
    fake_slurm.says("sinfo")
    with pytest.raises(ClusterError, match="node q9.invalid: its name does not resolve, and Slurm knows no such node"):
        slurm.node_address("q9.invalid")


def test_the_default_partition_is_the_one_with_a_star(fake_slurm):
    fake_slurm.says("sinfo", "high\nlow*\n")
    assert slurm.default_partition() == "low"
    fake_slurm.says("sinfo", "high\nlow\n")
    assert slurm.default_partition() is None


def test_grace_and_the_wait_before_a_kill_come_from_slurms_settings(fake_slurm):
    fake_slurm.says("scontrol", "PartitionName=low Default=YES QoS=N/A DefaultTime=NONE ExclusiveUser=NO GraceTime=20 Hidden=NO\n")
    assert slurm.grace_s("low") == 20
    fake_slurm.says("scontrol", "PartitionName=low Default=YES\n")
    assert slurm.grace_s("low") is None
    fake_slurm.says("scontrol", "KillOnBadExit           = 0\nKillWait                = 10 sec\nMinJobAge               = 600 sec\n")
    assert slurm.kill_wait_s() == 10
    fake_slurm.says("scontrol", "KillOnBadExit           = 0\n")
    with pytest.raises(ClusterError, match="scontrol show config: names no KillWait"):
        slurm.kill_wait_s()


# ---- refusals

REFUSALS = [
    (
        "squeue",
        "slurm_load_jobs error: Unable to contact slurm controller (connect failure)",
        "`scontrol ping` says whether it is up",
    ),
    ("squeue", "slurm_load_jobs error: Socket timed out on send/recv operation", "`scontrol ping` says whether it is up"),
    ("squeue", "squeue: fatal: Unable to process configuration file", "set SLURM_CONF"),
    ("sbatch", "sbatch: error: Batch job submission failed: Invalid partition name specified", "`harness nodes` lists the partitions"),
    (
        "sbatch",
        "sbatch: error: Batch job submission failed: Invalid account or account/partition combination specified",
        "set `account:` in the cluster file",
    ),
    ("sbatch", "sbatch: error: Batch job submission failed: Invalid qos specification", "set `qos:` in the cluster file"),
    ("sbatch", "sbatch: error: Batch job submission failed: Requested reservation is invalid", "scontrol show reservation"),
    ("sbatch", "sbatch: error: Batch job submission failed: Invalid feature specification", "`harness nodes` shows what the nodes have"),
    ("sbatch", "sbatch: error: Batch job submission failed: Requested node configuration is not available", "shows what the nodes have"),
    ("sbatch", "sbatch: error: Memory specification can not be satisfied", "shows what the nodes have; ask for no more of one"),
    ("sbatch", "sbatch: error: Invalid generic resource (gres) specification", "shows what the nodes have"),
    ("sbatch", "sbatch: error: Batch job submission failed: Invalid node name specified", "mend `exclude:`"),
    ("scontrol", "Invalid job id specified for job 9999", "`harness status RUN` says what became of its run"),
    ("scontrol", "Job has already finished for job 1", "it has ended; `harness status RUN`"),
    ("scontrol", "Job dependency problem for job 2000", "write it as KIND:JOB, such as afterok:1234"),
    ("scontrol", "Access/permission denied for job 2000", "belongs to somebody else, or users may not do this here"),
    ("scontrol", "", "left with 1 and said nothing; the command was: scontrol 'a b'"),
    ("sbatch", "sbatch: error: Lua says 'no'", "sbatch: Lua says 'no'; the command was: sbatch 'a b'"),
]


@pytest.mark.parametrize(("command", "said", "remedy"), REFUSALS, ids=[said or "nothing" for _, said, _ in REFUSALS])
def test_a_refusal_names_the_command_what_it_said_and_what_to_do(fake_slurm, command, said, remedy):
    fake_slurm.refuses(command, said)
    with pytest.raises(ClusterError) as refused:
        slurm._run(command, "a b")
    text = str(refused.value)
    assert text.startswith(f"{command}: ") and said.removeprefix(f"{command}: error: ") in text and remedy in text
    assert f"{command}: error" not in text and refused.value.exit_code == 1


def test_every_remedy_is_for_something_that_slurm_was_heard_to_say():
    met = {next((pattern for pattern, _ in slurm.REMEDIES if re.search(pattern, said)), None) for _, said, _ in REFUSALS}
    assert met == {None, *(pattern for pattern, _ in slurm.REMEDIES)}


def test_without_slurm_the_machine_that_has_it_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ClusterError, match="sbatch is not on PATH; run this where Slurm's commands are, such as the login node"):
        slurm.submit_script("job.sbatch")


def test_a_command_that_never_answers_is_given_up(fake_slurm, monkeypatch):
    monkeypatch.setattr(slurm, "COMMAND_S", 0.2)
    fake_slurm.says("sbatch", last="exec /bin/sleep 30")
    with pytest.raises(ClusterError, match="sbatch: no answer within 0 s, and it may have been obeyed nonetheless: look into squeue"):
        slurm.submit_script("job.sbatch")


def test_a_command_that_cannot_be_started_is_named(fake_slurm):
    (fake_slurm.folder / "squeue").chmod(0o644)
    with pytest.raises(ClusterError, match="squeue: cannot be started: Permission denied; see to the command that PATH finds"):
        list_jobs()
