"""A job's own process without Slurm: what it makes of what Slurm says of its job, of the pre-flight and of what an earlier life has left.
How it fares in a real job is in tests/slurm/test_lives_*.py."""

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from harness.checkpoint.ledger import Ledger
from harness.cluster import allocation, node, preflight, slurm
from harness.cluster.allocation import Allocation, free_port
from harness.cluster.findings import Finding
from harness.cluster.schema import load_cluster, render_cluster
from harness.errors import ClusterError
from harness.life import place, progress
from harness.recipe import load
from harness.run import RankReport, RunDir, StopRequest, write_outcome
from harness.share import Share, save_share

JOB = slurm.SlurmJob("7", "run", "me", "low", "RUNNING", "", ("r1", "r2"), 2, None, None, None, None, 0, "", "")
ENVIRONMENT = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "r[1-2]", "SLURM_JOB_PARTITION": "low"}
LEAD_S = 300


@pytest.fixture
def begin(tmp_path, monkeypatch):
    """begin(settings of the cluster file, job=what Slurm says of the job) -> an Allocation that has claimed its run."""

    def begin(*settings: str, job=JOB):
        (tmp_path / "plain.yaml").write_text("{}")
        run = RunDir.create(load("tiny/sft-lora", [f"output_dir={tmp_path / 'run'}"]))
        (run.path / "cluster.yaml").write_text(render_cluster(load_cluster(str(tmp_path / "plain.yaml"), list(settings))))
        (run.path / "job.json").write_text(json.dumps({"processes_per_node": 1, "allowed_changes": [], "merge": False, "jobs": []}))
        begun = Allocation(run, ENVIRONMENT)
        begun.claim()
        monkeypatch.setattr(slurm, "find_job", lambda *_, **__: job)
        monkeypatch.setattr(slurm, "node_address", lambda host: host)
        monkeypatch.setattr(slurm, "grace_s", lambda _: 40)
        monkeypatch.setattr(slurm, "kill_wait_s", lambda: 30)
        return begun

    return begin


def job(**fields):
    return slurm.SlurmJob(**{**vars(JOB), **fields})


def test_outside_a_job_it_says_who_starts_it(tmp_path):
    with pytest.raises(ClusterError, match="SLURM_JOB_ID is not set; a job of `harness submit` starts this"):
        Allocation(RunDir(tmp_path), {})


@pytest.mark.parametrize(
    ("fields", "number", "why", "within_s", "flags"),
    [
        ({"ends": 10_000}, None, None, None, ()),
        ({"ends": 10_000, "state": "SIGNALING"}, None, None, None, ()),
        ({"ends": 10_000, "state": "SUSPENDED"}, None, None, None, ()),
        ({"ends": 10_000}, signal.SIGUSR1, "SIGUSR1 to the job", LEAD_S, ()),
        ({"ends": 10_000}, signal.SIGTERM, "SIGTERM to the job", 40, ()),
        ({"ends": LEAD_S - 1}, None, "time limit: the job ends at", LEAD_S - 1, ()),
        # Slurm warns up to a minute early.
        ({"ends": LEAD_S + 60}, signal.SIGUSR1, "time limit: the job ends at", LEAD_S + 60, ()),
        ({"ends": LEAD_S + 60}, None, None, None, ()),
        ({"ends": 20, "preempted": -1}, None, "preempted: the nodes go to another job at", 20, ()),
        ({"ends": 20, "preempted": -1}, signal.SIGUSR1, "preempted: the nodes go to another job at", 20, ()),
        # PreemptMode=CANCEL without a grace.
        ({"ends": 0, "state": "COMPLETING", "preempted": -1, "started": -9}, signal.SIGTERM, "preempted, without any grace", 40, ()),
        # It was preempted in an earlier life.
        ({"ends": 0, "state": "COMPLETING", "preempted": -9, "started": -1}, None, "Slurm ends this job", 40, ("cancelled",)),
        ({"ends": 0, "state": "COMPLETING"}, signal.SIGTERM, "Slurm ends this job (its state is COMPLETING)", 40, ("cancelled",)),
        ({"ends": 0, "state": "CANCELLED"}, None, "Slurm ends this job (its state is CANCELLED)", 40, ("cancelled",)),
        # As Slurm 22.05 says it: the new time limit already counts.
        ({"ends": 1800, "state": "COMPLETING", "restarts": 1}, signal.SIGTERM, "the job was requeued", 40, ("is_requeued",)),
        # It runs elsewhere by now, and only this node's slurmd was lost.
        ({"ends": 1800, "state": "RUNNING", "restarts": 1}, None, "the job was requeued", 40, ("is_requeued",)),
    ],
)
def test_what_slurm_says_of_the_job_becomes_a_reason_and_a_deadline(begin, fields, number, why, within_s, flags):
    now = time.time()
    times = {key: now + value for key, value in fields.items() if key in ("ends", "preempted", "started")}
    begun = begin(job=job(**fields | times))
    begun.job.look(number)
    if why is None:
        assert begun.job.taken is None and not begun.run.stop.exists()
        return
    assert begun.job.taken.why.startswith(why)
    assert [flag for flag in ("cancelled", "is_requeued") if getattr(begun.job.taken, flag)] == [*flags]
    request = StopRequest.read(begun.run.stop)
    assert request.reason == f"slurm: {begun.job.taken.why}" and request.deadline == pytest.approx(now + within_s, abs=3)
    assert begun.job.deadline == pytest.approx(now + within_s, abs=3)


def test_the_first_answer_counts_but_a_cancellation_and_a_requeue_by_others_are_seen_while_the_run_saves(begin, monkeypatch):
    taken_at = time.time()
    preempted = {"ends": taken_at + 20, "preempted": taken_at, "started": taken_at - 60}

    def later(**fields):
        begun = begin(job=job(**preempted))
        begun.job.look()
        monkeypatch.setattr(slurm, "find_job", lambda *_, **__: job(**preempted | fields))
        begun.job.look(signal.SIGTERM)
        begun.run.stop.unlink()
        return begun.job.taken

    assert later(ends=taken_at + 90).why.startswith("preempted")
    assert later(state="COMPLETING", preempted=None).cancelled
    # The end of the grace is no cancellation.
    assert not later(state="COMPLETING").cancelled
    assert later(state="COMPLETING", preempted=None, restarts=1).is_requeued


def test_a_signal_is_obeyed_though_slurm_does_not_answer_and_the_disk_is_full(begin, monkeypatch, capsys):
    begun = begin()

    def refuse(*_, **__):
        raise ClusterError("squeue: Connection refused; Slurm's controller does not answer")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(slurm, "find_job", refuse)
    monkeypatch.setattr(StopRequest, "write", full)
    begun.job.look(signal.SIGUSR1)
    said = capsys.readouterr().err
    assert begun.job.taken.why == "SIGUSR1 to the job" and "warning: squeue: Connection refused" in said
    assert "STOP: cannot be written (No space left on device); the last checkpoint stands" in said


def test_an_earlier_jobs_stop_is_withdrawn_and_a_persons_is_kept(begin):
    begun = begin()
    StopRequest("slurm: time limit", time.time()).write(begun.run.stop)
    begun.claim()
    assert not begun.run.stop.exists()
    StopRequest("cancel: asked by me").write(begun.run.stop)
    begun.claim()
    assert begun.run.stop.exists()


def test_a_folder_that_another_process_holds_is_waited_for_and_then_refused(begin, monkeypatch, tmp_path):
    begun = begin()
    holds = "import fcntl, sys, time; file = open(sys.argv[1], 'a'); fcntl.flock(file, fcntl.LOCK_EX); print(flush=True); time.sleep(600)"
    monkeypatch.setattr("harness.run._HELD", {})
    monkeypatch.setattr(allocation, "LOCK_WITHIN_S", 1.5)
    other = RunDir(tmp_path / "other")
    other.path.mkdir()
    begun.run = other
    holder = subprocess.Popen([sys.executable, "-c", holds, str(other.path / ".lock")], stdout=subprocess.PIPE)
    holder.stdout.readline()
    with pytest.raises(ClusterError, match="another process is running in it"):
        begun.claim()
    # So that whoever holds it, if it is this run's earlier life, has been told.
    assert node.read_owner(other) == "7.0"
    holder.kill()
    begun.claim()
    holder.wait()
    holder.stdout.close()


def test_no_life_begins_while_a_process_of_an_earlier_one_is_left_on_any_node(begin, monkeypatch):
    begun = begin()
    monkeypatch.setattr(allocation, "LOCK_WITHIN_S", 0.5)
    with node.open_lock(begun.run) as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        with pytest.raises(ClusterError, match="processes of an earlier life still run on some node, and hold logs/nodes.lock"):
            begun.live_once()
        assert begun.run.attempts() == []
    assert begun.wait_until_free()


def test_a_job_whose_run_has_another_owner_stops_before_it_writes_anything(begin):
    begun = begin()
    node.write_owner(begun.run, "7.1")
    with pytest.raises(ClusterError, match=r"the run goes on elsewhere \(job 7.1\), so this job \(7.0\) leaves it alone"):
        begun.watch()


def test_a_life_that_did_a_unit_itself_has_brought_a_share_on(begin):
    begun = begin()
    save_share(begun.run, Share("capture", 8, 3))
    again = Allocation(begun.run, ENVIRONMENT)
    for units in (0, 2, 0, 0):
        report = RankReport(1, begun.run.open_attempt())
        report.enter("capturing")
        report.beat(units)
    assert again.history()[0] == 2
    # What the others do is no progress of this one.
    begun.run.write_manifest(begun.recipe, units={"folder": str(begun.run.path), "count": 9})
    (begun.run.path / "unit-00000.tc").touch()
    assert again.history()[0] == 2 and progress(begun.run) == 2 and place(begun.run) == "1 of 9 units are there"
    begun.run.open_attempt()
    assert again.may_begin().why == "3 lives in a row ended without a newer checkpoint or unit"


BAD = Finding("r2", "fail", "1 of 2 GPUs is visible", blames_node=True)
DISK = Finding("r1", "fail", "no space for a checkpoint")


@pytest.mark.parametrize(
    ("findings", "before", "action", "exclude", "why"),
    [
        ([Finding("r1", "ok", "all is well")], [], None, (), ""),
        ([BAD], [], "requeue", ("r2",), "r2: 1 of 2 GPUs is visible"),
        ([BAD], [["r1"]], "requeue", ("r1", "r2"), "r2: 1 of 2 GPUs is visible"),
        ([BAD], [["r1"], ["r1", "r3"]], "stop", (), "restarts.exclude_nodes is 2, and 2 were left out before"),
        # A successor would not find what is wrong everywhere mended.
        ([BAD, DISK], [], "stop", (), "the pre-flight failed: r2: 1 of 2 GPUs is visible; r1: no space for a checkpoint"),
    ],
)
def test_a_bad_node_is_left_out_within_a_budget(begin, monkeypatch, findings, before, action, exclude, why):
    begun = begin()
    for hosts in before:
        begun.ledger().append("requeued", job="7", why="", exclude=hosts)
    monkeypatch.setattr(begun, "step", lambda *_, **__: True)
    monkeypatch.setattr(preflight, "judge", lambda *_: findings)
    decision = begun.preflight()
    assert (decision and decision.action, decision.exclude if decision else ()) == (action, exclude)
    assert decision is None or why in decision.why


def test_a_successor_leaves_out_the_clusters_nodes_and_the_bad_ones(begin, monkeypatch):
    begun, sent = begin("exclude=[r9]"), []
    monkeypatch.setattr(slurm, "submit_script", lambda script, *flags: sent.append(flags) or "8")
    monkeypatch.setattr(slurm, "list_jobs", lambda *_: {})
    assert begun.carry_out(allocation.Decision("requeue", "r2: bad", exclude=("r2",))) == 75
    assert sent == [("--dependency=afterany:7", "--exclude=r9,r2")]
    assert json.loads((begun.run.path / "job.json").read_text())["jobs"][-1]["id"] == "8"


def test_a_successor_that_cannot_be_sent_leaves_the_run_to_a_person(begin, monkeypatch, capsys):
    begun = begin("restarts.by=successor")

    def refuse(*_):
        raise ClusterError("sbatch: you may not submit here")

    monkeypatch.setattr(slurm, "submit_script", refuse)
    assert begun.carry_out(allocation.Decision("requeue", "time limit")) == 75
    assert "stopped: no successor could be sent: sbatch: you may not submit here" in capsys.readouterr().err


def test_processes_that_cannot_be_killed_are_left_to_slurm(begin, monkeypatch):
    begun = begin()

    def hang(nodes, arguments, attempt, *traces):
        write_outcome(attempt, "hang", step=5, checkpoint=None, reason="hang: rank 1")
        report = {"index": 1, "host": "r2", "code": -9, "oom_kills": 0, "unended": 1, "time": 0}
        (attempt / "node-1.json").write_text(json.dumps(report))
        return True

    monkeypatch.setattr(begun, "step", hang)
    decision = begun.live_once()
    assert decision.action == "requeue" and "there are processes on r2 that cannot be killed" in decision.why


def test_a_step_in_a_container_sees_the_code_the_run_and_the_variables(begin, monkeypatch):
    argv = []

    class Srun(subprocess.Popen):
        def __init__(self, command, env):
            argv[:] = command
            super().__init__(["true"], env=env)

    monkeypatch.setattr(allocation.subprocess, "Popen", Srun)
    begun = begin("container={kind: pyxis, image: /images/torch.sqsh}", "environment=[WANDB_MODE]")
    assert begun.step(2, ["node", str(begun.run.path)], begun.run.path, "job.json")
    said, code = " ".join(argv), str(allocation.Path(allocation.__file__).parents[2])
    cache = allocation.cache_root()
    assert f"--container-mounts={code}:{code},{begun.run.path}:{begun.run.path},{cache}:{cache}" in said
    assert "--container-env=PYTHONPATH,WANDB_MODE" in said and f"--container-workdir={os.getcwd()}" in said
    begun = begin("container={kind: apptainer, image: /images/torch.sif}")
    begun.step(2, ["node", str(begun.run.path)], begun.run.path, "job.json")
    assert f"apptainer exec --bind={code}:{code}" in " ".join(argv)


def test_a_port_follows_from_the_job_and_the_life_and_is_free():
    port = free_port("7.0.attempt-1")
    assert free_port("7.0.attempt-1") == port != free_port("7.0.attempt-2")
    with socket.socket() as taken:
        taken.bind(("", port))
        assert free_port("7.0.attempt-1") != port


# ---- what Slurm cannot do for a while, and what others ask meanwhile


def test_a_step_that_slurm_does_not_start_is_asked_for_again_and_is_no_life(begin, monkeypatch, capsys):
    begun, tried = begin(), []

    def comes_late(nodes, arguments, folder, most_s):
        tried.append(folder)
        if len(tried) == 3:
            (folder / "node-0.json").touch()

    monkeypatch.setattr(allocation, "PAUSES_S", (0.0, 0.0, 0.0))
    monkeypatch.setattr(begun, "step_once", comes_late)
    assert begun.step(2, ["node"], begun.run.path, "node-*.json") and len(tried) == 3
    assert capsys.readouterr().err.count("Slurm has started nothing on any node; once more") == 2
    (begun.run.path / "node-0.json").unlink()
    assert not begun.step(2, ["node"], begun.run.path, "node-*.json") and len(tried) == 6
    decision = begun.leave()
    assert (decision.action, decision.exit_code) == ("stop", 75) and "Slurm does not start what the job asks for" in decision.why


def test_a_controller_that_is_away_is_asked_until_it_answers_or_the_job_must_go(begin, monkeypatch):
    begun, asked = begin(), []
    monkeypatch.setattr(allocation.time, "sleep", lambda _: None)

    def answers_late():
        asked.append(1)
        if len(asked) < 3:
            raise slurm.NoAnswer("scontrol: Unable to contact slurm controller")
        return "yes"

    assert begun.job.patiently(answers_late) == "yes" and len(asked) == 3
    begun.job.deadline = time.time()
    asked.clear()
    with pytest.raises(slurm.NoAnswer):
        begun.job.patiently(answers_late)


def test_a_requeue_that_slurm_obeyed_without_saying_so_has_no_successor(begin, monkeypatch):
    begun, sent = begin(job=job(state="PENDING", restarts=1)), []

    def silent(_):
        raise ClusterError("scontrol: Job is pending execution")

    monkeypatch.setattr(slurm, "requeue_job", silent)
    monkeypatch.setattr(slurm, "submit_script", lambda *_: sent.append(1))
    assert begun.carry_out(allocation.Decision("requeue", "time limit")) == 75 and not sent


def test_a_person_who_asks_while_slurms_stop_is_obeyed_has_the_last_word(begin, monkeypatch):
    begun = begin(job=job(ends=time.time() + 20, preempted=time.time()))
    begun.job.look()

    def saves(nodes, arguments, attempt, *traces):
        # Rank 0 had read Slurm's reason before the person's was written over it.
        StopRequest("cancel: asked by me").write(attempt / "STOP")
        write_outcome(attempt, "stopped", step=5, checkpoint=5, reason=begun.job.taken.why)
        return True

    monkeypatch.setattr(begun, "step", saves)
    decision = begun.live_once()
    assert decision.action == "stop" and decision.why == "stopped at step 5: cancel: asked by me"


def test_a_persons_stop_that_waited_with_the_job_is_obeyed_once(begin):
    begun = begin()
    StopRequest("cancel: asked by me").write(begun.run.stop)
    decision = begun.may_begin()
    assert (decision.action, decision.why) == ("stop", "cancel: asked by me") and not begun.run.stop.exists()
    assert begun.may_begin() is None


@pytest.mark.parametrize(("code", "action"), [(0, None), (2, "stop"), (1, "stop"), (-9, "requeue")])
def test_what_one_node_does_for_all_is_judged_by_what_it_wrote(begin, monkeypatch, code, action):
    begun = begin()

    def does(nodes, arguments, folder, trace):
        (folder / trace).write_text(json.dumps({"code": code}))
        return True

    monkeypatch.setattr(begun, "step", does)
    decision = begun.prepare_data()
    assert (decision and decision.action) == action and (action != "stop" or decision.exit_code == code)


def failing(number):
    def fails():
        raise OSError(number, os.strerror(number), "metrics.jsonl")

    return fails


def test_a_shared_disk_that_fails_for_a_moment_is_no_end_and_one_that_is_full_is(begin, monkeypatch):
    begun, requeued = begin(), []
    monkeypatch.setattr(slurm, "requeue_job", requeued.append)
    monkeypatch.setattr(begun, "work", failing(errno.ESTALE))
    assert begun.main() == 75 and requeued == ["7"]
    assert begun.history()[2][-1]["why"] == "metrics.jsonl: Stale file handle"
    monkeypatch.setattr(begun, "work", failing(errno.ENOSPC))
    with pytest.raises(ClusterError, match="metrics.jsonl: No space left on device; when it is mended: harness submit"):
        begun.main()
    # The ledger, which counts jobs, may be on that disk: Slurm's own count bounds it as well.
    monkeypatch.setattr(begun, "work", failing(errno.ESTALE))
    begun.job.restart = begun.cluster.restarts.max_restarts
    with pytest.raises(ClusterError, match="Stale file handle"):
        begun.main()
    assert requeued == ["7"]


def test_what_a_full_disk_did_not_take_of_the_ledger_is_written_when_it_can_be(begin, monkeypatch):
    begun = begin()
    write, full = Ledger._write, [True]

    def refuse_once(ledger, data):
        if full.pop() if full else False:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(ledger, data)

    monkeypatch.setattr(Ledger, "_write", refuse_once)
    begun.ledger().append("job_began", job="7", restart=0, hosts=[])
    begun.ledger().append("requeued", job="7", why="", exclude=[])
    assert [event["event"] for event in begun.history()[2]] == ["job_began", "requeued"]
