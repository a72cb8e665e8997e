"""The shim on one node, without Slurm: what it makes of signals, of deadlines, of another node's failure and of a run that has moved on."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from harness.cluster import node
from harness.cluster.node import KILL_BEFORE_S, LAUNCHER_LEAVES_WITHIN_S, PEER_FAILED_S, Step, Watch, node_reports, write_owner
from harness.errors import ClusterError
from harness.launcher import Machines
from harness.run import RunDir, StopRequest, write_outcome, write_text_atomically


@pytest.fixture
def run(tmp_path):
    run = RunDir(tmp_path)
    (tmp_path / "logs" / "attempt-1").mkdir(parents=True)
    write_owner(run, "7.0")
    return run


def watch_of(run, *signals, grace_s=30.0, index=0):
    return Watch(run, Step(Machines(1, 2, index, "a", 1), run.attempt(1), "7.0", grace_s, 10 * grace_s), list(signals))


def report_failure(run, index):
    content = {"index": index, "failed": True, "code": 1, "oom_kills": 0, "time": 0}
    write_text_atomically(run.attempt(1) / f"node-{index}.json", json.dumps(content))


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM])
def test_a_signal_becomes_the_stop_file_with_a_deadline_and_nothing_is_ended(run, number):
    assert watch_of(run, number, number, grace_s=100)(time.monotonic()) is None
    request = StopRequest.read(run.stop)
    assert request.reason == f"slurm: {number.name} on {os.uname().nodename}"
    # After SIGTERM Slurm kills; what a user sends is a request.
    assert request.deadline == pytest.approx(time.time() + (100 if number == signal.SIGTERM else 1000), abs=2)


def test_ranks_are_ended_shortly_before_the_deadline_and_not_sooner(run):
    StopRequest("slurm: time limit", time.time() + KILL_BEFORE_S + 60).write(run.stop)
    watch = watch_of(run)
    assert watch(time.monotonic()) is None
    run.stop.unlink()
    StopRequest("slurm: time limit", time.time() + KILL_BEFORE_S - 1).write(run.stop)
    assert "deadline of a stop (slurm: time limit) has come" in watch(time.monotonic())


def test_a_persons_stop_has_no_deadline(run):
    run.stop.touch()
    assert watch_of(run)(time.monotonic()) is None


def test_when_another_node_has_failed_a_signal_is_srun_ending_the_step(run):
    report_failure(run, 1)
    watch, now = watch_of(run, signal.SIGTERM), time.monotonic()
    assert watch(now) is None and not run.stop.exists()
    assert watch(now + PEER_FAILED_S - 1) is None
    assert watch(now + PEER_FAILED_S + 1) == "the ranks of another node have failed"


def test_its_own_report_is_no_other_nodes(run):
    report_failure(run, 0)
    assert watch_of(run, signal.SIGTERM)(time.monotonic()) is None and run.stop.exists()


def test_a_run_that_goes_on_elsewhere_is_left_within_seconds(run):
    watch, now = watch_of(run), time.monotonic()
    assert watch(now + 6) is None
    write_owner(run, "7.1")
    assert watch(now + 7) is None  # a shared disk is not asked every second
    assert watch(now + 12) == "the run goes on elsewhere (job 7.1)"


def test_a_launcher_that_waits_for_a_dead_one_does_not_wait_for_long(run):
    rank = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    (run.attempt(1) / "alive").mkdir()
    (run.attempt(1) / "alive" / "rank-0.json").write_text(json.dumps({"rank": 0, "pid": rank.pid, "time": 0}))
    watch, now = watch_of(run), time.monotonic()
    write_outcome(run.attempt(1), "stopped", step=5, checkpoint=5, reason="slurm: time limit")
    # It may still have to send what W&B has gathered.
    assert watch(now) is None and watch(now + 100) is None
    rank.kill()
    rank.wait()
    assert watch(now) is None and watch(now + LAUNCHER_LEAVES_WITHIN_S - 1) is None
    assert watch(now + LAUNCHER_LEAVES_WITHIN_S + 1) == "its ranks have left, and their launcher has not"


def test_ranks_that_are_gone_before_the_run_has_said_how_it_ended_are_their_launchers_matter(run):
    (run.attempt(1) / "alive").mkdir()
    (run.attempt(1) / "alive" / "rank-0.json").write_text(json.dumps({"rank": 0, "pid": 2**22 + 1, "time": 0}))
    watch, now = watch_of(run), time.monotonic()
    assert watch(now) is None and watch(now + 100) is None


def test_a_full_disk_keeps_the_shim_from_nothing_else(run, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(StopRequest, "write", refuse)
    assert watch_of(run, signal.SIGTERM)(time.monotonic()) is None
    assert "No space left on device" in capsys.readouterr().err


STEP = {
    node.ADDRESS: "r1",
    node.PORT: "20001",
    node.OWNER: "7.0",
    node.PROCESSES: "4",
    node.GRACE: "30",
    node.LEAD: "300",
    "SLURM_NODEID": "1",
    "SLURM_NNODES": "2",
}


def test_a_shim_that_comes_too_late_starts_nothing(run, monkeypatch, capsys):
    for name, value in (STEP | {node.ATTEMPT: str(run.attempt(1))}).items():
        monkeypatch.setenv(name, value)
    write_owner(run, "7.1")
    assert node.live_on_node(run) == 1
    assert "the run goes on elsewhere (job 7.1), so nothing is started here" in capsys.readouterr().err
    assert node.are_nodes_free(run)


def test_outside_a_step_the_shim_says_who_starts_it():
    with pytest.raises(ClusterError, match="HARNESS_NODE_ADDRESS is not set; a job of `harness submit`"):
        Step.from_environment({})


def test_reports_come_in_the_order_in_which_nodes_ended(run):
    for index, at in ((0, 5.0), (1, 3.0)):
        write_text_atomically(run.attempt(1) / f"node-{index}.json", json.dumps({"index": index, "time": at}))
    assert [report["index"] for report in node_reports(run.attempt(1))] == [1, 0]


def test_a_step_knows_its_place_from_slurm_and_the_allocation(tmp_path):
    environment = STEP | {node.ATTEMPT: str(tmp_path)}
    step = Step.from_environment(environment)
    assert step.machines == Machines(4, 2, 1, "r1", 20001) and step.machines.world_size == 8
    assert Step.from_environment(environment | {"SLURM_NODEID": "0", "SLURM_NNODES": "1"}).machines == Machines(4, 1, 0, "r1", 20001)


def test_the_hidden_verbs_say_what_they_are_for_and_stand_in_no_list():
    shown = subprocess.run([sys.executable, "-m", "harness", "--help"], capture_output=True, text=True).stdout
    assert "allocation" not in shown and " node " not in shown and "submit" in shown
