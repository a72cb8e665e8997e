"""What is said when ranks have failed, from their reports alone."""

import signal

import pytest

from harness.errors import DataError
from harness.failures import explain_failure
from harness.run import RankReport


@pytest.fixture
def ranks(tmp_path):
    reports = [RankReport(rank, tmp_path) for rank in range(3)]
    for report in reports:
        report.enter("training")
    return reports


def fail(report, error):
    try:
        raise error
    except type(error) as caught:
        report.failed(caught)


def test_of_several_errors_the_first_in_time_is_told(ranks, tmp_path):
    fail(ranks[2], DataError("rows.jsonl:7: not a row"))
    fail(ranks[0], ValueError("later"))
    failure = explain_failure(tmp_path, 1)
    assert failure.exit_code == 2
    assert failure.text.startswith(f"rank 2 on {ranks[2].host} failed while training:\nDataError: rows.jsonl:7: not a row\n")
    assert str(tmp_path) in failure.text


@pytest.mark.parametrize(
    "echo",
    [
        "[enforce fail] Connection closed by peer [127.0.0.1]:2134",
        "Connection reset by peer",
        "Watchdog caught collective timeout",
        "Failed to recv, got 0 bytes. Connection was likely closed. Did the remote server shutdown or crash?",
        "The client socket has timed out after 60000ms while trying to connect to (10.0.0.1, 20001).",
        "Timed out after 61 seconds waiting for clients. 1/2 clients joined.",
        "[../third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 1800000ms for recv operation to complete",
        "wait timeout after 300000ms, keys: /default_pg/0//cpu//0/rank_1",
    ],
)
def test_a_rank_that_only_lost_its_peer_is_not_told_as_the_cause(ranks, tmp_path, echo):
    fail(ranks[0], RuntimeError(echo))
    fail(ranks[1], ZeroDivisionError("the cause"))
    failure = explain_failure(tmp_path, 1)
    assert failure.exit_code == 1 and failure.text.startswith("rank 1") and "ZeroDivisionError: the cause" in failure.text


def test_a_rank_that_went_silent_is_told_before_the_peers_that_lost_it_and_those_that_were_ended(ranks, tmp_path):
    fail(ranks[0], RuntimeError("Connection closed by peer"))
    ranks[2].ended_by("SIGTERM")
    failure = explain_failure(tmp_path, 1)
    assert f"ended without an error of its own: rank 1 on {ranks[1].host} (pid " in failure.text
    assert "rank 0" not in failure.text and "rank 2" not in failure.text


def test_a_lost_peer_on_another_machine_is_told_when_nothing_better_is_known(ranks, tmp_path):
    fail(ranks[0], RuntimeError("Connection closed by peer"))
    for report in ranks[1:]:
        report.enter("finished")
    assert explain_failure(tmp_path, 1).text.startswith("rank 0")


def test_a_kill_by_the_kernel_is_translated(ranks, tmp_path):
    assert "memory limit" in explain_failure(tmp_path, 1, oom_kills=1).text
    assert "memory limit" not in explain_failure(tmp_path, 1, oom_kills=0).text
    assert "SIGSEGV" in explain_failure(tmp_path, -signal.SIGSEGV).text


def test_ranks_that_all_were_ended_from_outside_say_by_what(ranks, tmp_path):
    for report in ranks:
        report.ended_by("SIGTERM")
    assert "ended by SIGTERM" in explain_failure(tmp_path, 143).text


def test_ranks_that_never_started_are_the_launchers_failure(tmp_path):
    for attempt in (None, tmp_path):
        failure = explain_failure(attempt, 7)
        assert failure.exit_code == 1 and "could not be started" in failure.text and "left with 7" in failure.text


def test_a_rank_that_is_killed_while_it_saves_is_named_with_what_it_wrote(ranks, tmp_path):
    fail(ranks[0], RuntimeError("Connection closed by peer"))
    for report in (ranks[0], ranks[2]):
        report.ended_by("SIGTERM")
    ranks[1].enter("saving: the optimiser of checkpoint-20")
    failure = explain_failure(tmp_path, 1)
    assert failure.exit_code == 1 and "while saving: the optimiser of checkpoint-20" in failure.text and "rank 1" in failure.text


def test_ranks_that_stopped_on_purpose_are_no_failure_even_if_they_could_not_say_so_in_the_run_folder(ranks, tmp_path):
    for report in ranks:
        report.stopped("SIGUSR1")
    failure = explain_failure(tmp_path, 1)
    assert failure.exit_code == 75 and "stopped on purpose: SIGUSR1" in failure.text


def test_another_try_is_worth_it_after_a_death_or_a_machines_failure_and_not_after_an_error_of_the_run(tmp_path):
    def failure(number, *reports):
        attempt = tmp_path / str(number)
        ranks = [RankReport(rank, attempt) for rank in range(2)]
        for rank in ranks:
            rank.enter("training")
        for rank, error in reports:
            fail(ranks[rank], error) if error else ranks[rank].enter("finished")
        return explain_failure(attempt, 1)

    assert failure(1).may_pass  # both were killed
    assert failure(2, (0, RuntimeError("Connection closed by peer"))).may_pass
    assert failure(3, (0, RuntimeError("Connection closed by peer")), (1, None)).may_pass
    assert failure(4, (0, RuntimeError("CUDA error: uncorrectable ECC error encountered"))).may_pass
    assert failure(5, (0, OSError(116, "Stale file handle"))).may_pass
    machines = ["No CUDA GPUs are available", "DataLoader worker (pid 7) is killed by signal: Bus error. "]
    machines += ["CUDA error: an illegal memory access was encountered"]
    for number, message in enumerate(machines, start=11):
        assert failure(number, (0, RuntimeError(message)), (1, RuntimeError("Connection closed by peer"))).may_pass
    for number, error in enumerate((DataError("Input/output error"), ZeroDivisionError("division by zero"), KeyError("labels")), start=6):
        assert not failure(number, (1, error), (0, RuntimeError("Connection closed by peer"))).may_pass
    assert failure(9, (0, RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"))).summary.endswith("Tried to allocate 2.00 GiB")
    assert not failure(10, (0, RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"))).may_pass
