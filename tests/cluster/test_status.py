"""How runs stand, told from folders that the real writers made and from what a real squeue printed; and the verbs that say it or end it.

Against a real Slurm: tests/slurm/test_watching.py."""

import contextlib
import fcntl
import json
import os
import re
import threading
import time

import pytest
from click.testing import CliRunner
from fake_slurm import FakeSlurm, as_lines, job_row

from harness.checkpoint.ledger import Ledger
from harness.cli import cancel, logs, nodes, status
from harness.cli.tables import render_table
from harness.cluster.status import RunStatus, find_runs, format_left, progress_line, read_statuses
from harness.cluster.submission import write_job
from harness.errors import ClusterError, HarnessError, LaunchError
from harness.run import RankReport, RunDir, StopRequest, write_outcome, write_text_atomically
from harness.tracking.metrics import MetricsFile


@pytest.fixture
def fake_slurm(tmp_path, monkeypatch):
    return FakeSlurm(tmp_path / "bin", monkeypatch)


@pytest.fixture
def no_slurm(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))


class Story:
    """A run folder, written by those that write it in a real run, at times that the test chooses."""

    def __init__(self, path, *, train="max_steps: 200", job=None):
        self.run = RunDir(path)
        path.mkdir(parents=True)
        self.run.recipe.write_text(f"train: {{{train}}}\n")
        if job:
            self.submitted(job)

    def submitted(self, *jobs):
        Ledger(self.run.ledger, None).append("submitted", last_attempt=(self.run.attempts() or [0])[-1])
        write_job(self.run, {"jobs": [{"id": job, "submitted": time.time(), "why": "submitted"} for job in jobs]})

    def job_began(self, job="7"):
        Ledger(self.run.ledger, (self.run.attempts() or [None])[-1]).append("job_began", job=job, restart=0, hosts=["q1"])

    def life(self, *, step=None, phase="training", ranks=1):
        """A life of the run, and the reports of its ranks, rank 0 first."""
        attempt = self.run.open_attempt()
        number = self.run.attempts()[-1]
        Ledger(self.run.ledger, number).append("life_began", world_size=ranks, backend="ddp", resumed_from=None, allowed=[])
        reports = [RankReport(rank, attempt) for rank in range(ranks)]
        for report in reports:
            report.enter(phase)
            if step is not None:
                report.beat(step)
            report.log.write_text(f"attempt {number} rank {report.rank}\n")
        return reports

    def ended(self, outcome, step=None, reason=""):
        write_outcome(self.run.last_attempt(), outcome, step=step, checkpoint=None, reason=reason)

    def decided(self, then, why):
        number = self.run.attempts()[-1]
        Ledger(self.run.ledger, number).append("life_ended", life=f"attempt-{number}", outcome=None, then=then, why=why)

    def event(self, event, **facts):
        Ledger(self.run.ledger, (self.run.attempts() or [None])[-1]).append(event, **facts)

    def logged(self, *points, key="train/loss"):
        """(step, time, value): lines of metrics.jsonl."""
        for step, moment, value in points:
            file = MetricsFile(self.run.path, now=lambda moment=moment: moment)
            file.append(step, {key: value})
            file.close()

    @property
    def status(self) -> RunStatus:
        return read_statuses([self.run])[0]


@pytest.fixture
def story(tmp_path):
    return lambda name="first", **options: Story(tmp_path / "runs" / name, **options)


@contextlib.contextmanager
def held(run):
    with open(run.path / ".lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def ask(verb, *arguments):
    """Output (stdout and stderr as they came) and exit code. Errors with a name are raised, for `harness` itself to render."""
    done = CliRunner().invoke(verb.command, [str(argument) for argument in arguments])
    if isinstance(done.exception, HarnessError):
        raise done.exception
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.output


# ---- without Slurm


def test_a_run_that_has_not_begun_is_new_and_the_next_command_begins_it(story, no_slurm):
    first = story().status
    assert (first.state, first.lives, first.commit, first.next) == ("new", 0, None, f"harness run {first.run}/recipe.yaml")


def test_a_run_whose_folder_is_held_runs_and_says_what_it_does(story, no_slurm):
    run = story()
    with held(run.run):
        assert run.status.text == "running: starting"
        run.life(step=21, phase="evaluating", ranks=2)
        assert (run.status.text, run.status.step, run.status.lives) == ("running: evaluating", 21, 1)
        assert run.status.next == f"harness logs {run.run.path} -f" and run.status.hosts == (os.uname().nodename,)


def test_a_look_at_a_run_does_not_take_its_lock(story, no_slurm):
    run = story()
    run.life()
    assert run.status.state != "running"
    with held(run.run):
        assert run.status.state == "running"
    run.run.hold()


def test_a_run_that_was_trained_to_its_end_is_done(story, no_slurm):
    run = story()
    run.life(step=200)[0].enter("finished")
    run.ended("done", 200)
    assert (run.status.text, run.status.step, run.status.fraction, run.status.left_s) == ("done", 200, 1.0, None)
    assert run.status.next == f"harness export {run.run.path}"


def test_a_run_that_saved_and_left_says_why_and_how_to_go_on(story, no_slurm):
    run = story()
    run.life(step=41)[0].stopped("STOP file")
    run.ended("stopped", 40, "cancel: asked by ada")
    assert (run.status.text, run.status.step) == ("stopped: cancel: asked by ada", 40)
    assert run.status.next == f"harness run {run.run.path}/recipe.yaml"


def test_a_rank_that_left_before_it_could_write_the_end_counts_as_stopped(story, no_slurm):
    run = story()
    run.life()[0].stopped("nothing was trained yet")
    assert run.status.state == "stopped" and "nothing was trained yet" in run.status.reason


def test_a_failure_shows_the_error_and_the_log_of_the_rank_that_failed(story, no_slurm):
    run = story()
    _, rank_1 = run.life(step=3, ranks=2)
    rank_1.failed(ValueError("the loss has no gradient"))
    assert run.status.state == "failed" and run.status.reason.endswith("ValueError: the loss has no gradient")
    assert run.status.log == run.run.attempt(1) / "rank-1.log"
    assert run.status.next == f"harness logs {run.run.path} --rank 1"


def test_a_rank_that_was_killed_is_a_failure_too(story, no_slurm):
    run = story()
    run.life(step=3)
    assert run.status.state == "failed" and "killed from outside" in run.status.reason


def test_a_hang_that_nobody_went_on_from_is_a_failure(story, no_slurm):
    run = story()
    run.life(step=3)
    run.ended("hang", 3, "hang: no sign of life from rank 0")
    assert run.status.text == "failed: hang: no sign of life from rank 0"


def test_a_life_that_said_it_had_finished_and_nothing_more_is_lost(story, no_slurm):
    run = story()
    run.life(step=3)[0].enter("finished")
    assert run.status.text == "lost: its processes are gone, and nothing says how they ended"


def test_a_ledger_that_was_altered_is_said_and_keeps_nobody_from_seeing_the_other_runs(story, no_slurm):
    broken, whole = story("broken"), story("whole")
    broken.run.ledger.write_text("nonsense\n")
    assert [run.state for run in read_statuses([broken.run, whole.run])] == ["unknown", "new"]
    assert "ledger.jsonl:1: is not an event of a run" in broken.status.reason


# ---- under Slurm


def test_a_job_that_waits_says_why_and_when_slurm_expects_to_start_it(story, fake_slurm):
    run = story(job="7")
    fake_slurm.says("squeue", as_lines(job_row("7", "PENDING", "Resources", started="1795379737")))
    assert (run.status.text, run.status.starts, run.status.job) == ("pending: Resources", 1795379737.0, "7")
    assert run.status.next == f"harness cancel {run.run.path}"


def test_a_job_without_a_life_yet_is_starting_and_its_own_log_is_the_one_to_read(story, fake_slurm):
    run = story(job="7")
    run.job_began()
    (run.run.path / "logs").mkdir()
    log = run.run.path / "logs" / "slurm-7.log"
    log.write_text("pre-flight\n")
    fake_slurm.says("squeue", as_lines(job_row("7")))
    assert (run.status.text, run.status.hosts, run.status.log) == ("running: starting", ("q1", "q2"), log)


def test_a_running_job_has_the_phase_of_the_life_that_began_in_it(story, fake_slurm):
    run = story(job="7")
    run.job_began()
    run.life(step=21)
    fake_slurm.says("squeue", as_lines(job_row("7", started=str(int(time.time()) - 9))))
    assert (run.status.text, run.status.step) == ("running: training", 21)
    fake_slurm.says("squeue", as_lines(job_row("7", "COMPLETING", started=str(int(time.time()) - 9))))
    assert run.status.text == "ending: training"
    fake_slurm.says("squeue", as_lines(job_row("7", started=str(int(time.time()) + 9))))
    assert run.status.text == "running: starting", "that life was in the job's run before it was requeued"


def test_a_job_that_waits_again_is_requeued_with_the_runs_own_reason_and_slurms(story, fake_slurm):
    run = story(job="7")
    run.job_began()
    run.life(step=21)
    run.ended("stopped", 21, "slurm: preempted")
    run.event("requeued", job="7", why="preempted: the nodes go to another job", exclude=[])
    run.event("committed", step=20)
    fake_slurm.says("squeue", as_lines(job_row("7", "PENDING", "BeginTime", restarts="1")))
    assert run.status.text == "requeued: preempted: the nodes go to another job; BeginTime"
    assert run.status.step == 20, "it goes on from its last commit"


def test_a_job_that_slurm_put_back_before_any_life_is_requeued(story, fake_slurm):
    run = story(job="7")
    fake_slurm.says("squeue", as_lines(job_row("7", "PENDING", "BeginTime", restarts="1")))
    assert run.status.text == "requeued: BeginTime"


def test_a_successor_that_waits_is_the_runs_job(story, fake_slurm):
    run = story(job="7")
    run.job_began()
    run.life(step=21)
    write_job(run.run, {"jobs": [{"id": "7"}, {"id": "8"}]})
    fake_slurm.says("squeue", as_lines(job_row("8", "PENDING", "Dependency")))
    assert (run.status.text, run.status.job) == ("requeued: Dependency", "8")


@pytest.mark.parametrize(
    ("state", "reason"), [("REQUEUE_HOLD", "job requeued in held state"), ("SPECIAL_EXIT", "None"), ("PENDING", "JobHeldUser")]
)
def test_a_job_that_somebody_must_release_is_held(story, fake_slurm, state, reason):
    run = story(job="7")
    fake_slurm.says("squeue", as_lines(job_row("7", state, reason)))
    assert (run.status.state, run.status.next) == ("held", "scontrol release 7")


def test_a_job_that_was_cancelled_says_so_and_how_to_go_on(story, fake_slurm):
    run = story(job="7")
    fake_slurm.says("squeue", as_lines(job_row("7", "CANCELLED")))
    assert (run.status.text, run.status.next) == ("cancelled: job 7 was cancelled", f"harness submit {run.run.path}")


def test_a_job_that_slurm_has_forgotten_and_that_never_began_counts_as_cancelled(story, fake_slurm):
    run = story(job="7")
    assert run.status.text == "cancelled: Slurm no longer knows job 7, which never began"


def test_the_runs_own_end_counts_for_a_job_that_slurm_has_forgotten(story, fake_slurm):
    run = story(job="7")
    run.job_began()
    run.life(step=200)
    assert run.status.text == "lost: Slurm no longer knows job 7, and nothing says how it ended"
    run.decided("stop", "3 lives in a row ended without a newer checkpoint")
    assert run.status.text == "failed: 3 lives in a row ended without a newer checkpoint"
    run.ended("done", 200)
    assert run.status.state == "done"


def test_an_error_in_a_life_counts_before_what_became_of_the_job(story, fake_slurm):
    run = story(job="7")
    run.job_began()
    run.life(step=2)[0].failed(KeyError("labels"))
    run.decided("stop", "KeyError: 'labels'")
    fake_slurm.says("squeue", as_lines(job_row("7", "FAILED", "NonZeroExitCode")))
    assert run.status.state == "failed" and run.status.reason.endswith("KeyError: 'labels'")


def test_a_job_that_slurm_ended_before_the_run_could_say_anything_is_lost(story, fake_slurm):
    run = story(job="7")
    run.job_began()
    run.life(step=2)
    fake_slurm.says("squeue", as_lines(job_row("7", "TIMEOUT", "TimeLimit")))
    assert run.status.text == "lost: job 7 ended: TIMEOUT, TimeLimit; the run could not say how"


def test_a_job_that_failed_before_a_life_is_told_from_the_lives_before_it(story, fake_slurm):
    """The pre-flight of a later job fails: that the last life was preempted is not how the run ended."""
    run = story(job="7")
    run.job_began()
    run.life(step=21)
    run.ended("stopped", 21, "slurm: preempted")
    run.job_began()
    log = run.run.path / "logs" / "slurm-7.log"
    log.write_text("q2: GPU 1 is gone\n")
    fake_slurm.says("squeue", as_lines(job_row("7", "FAILED", "NonZeroExitCode")))
    assert run.status.text == "failed: job 7 ended: FAILED, NonZeroExitCode, before a life of the run began"
    assert run.status.next == f"harness logs {run.run.path} --job" and run.status.log == log


def test_a_run_that_was_sent_again_is_not_told_by_its_end_before(story, fake_slurm):
    run = story(job="7")
    run.job_began()
    run.life(step=21)
    run.ended("stopped", 21, "cancel: asked by ada")
    run.submitted("7", "8")
    fake_slurm.says("squeue", as_lines(job_row("8", "PENDING", "Priority")))
    assert run.status.text == "pending: Priority"


def test_a_run_folder_of_a_cluster_is_read_where_there_is_no_slurm(story, no_slurm):
    run = story(job="7")
    run.job_began()
    run.life(step=21)
    assert run.status.state == "unknown" and "squeue is not on PATH" in run.status.reason
    run.ended("done", 200)
    assert run.status.state == "done"


def test_slurm_is_asked_once_for_all_runs_and_not_at_all_for_none(story, fake_slurm):
    runs = [story(f"run-{number}", job=str(number)).run for number in range(5)]
    fake_slurm.says("squeue", as_lines(*(job_row(str(number), "PENDING", "Priority") for number in range(5))))
    assert [run.state for run in read_statuses(runs)] == ["pending"] * 5
    assert len(fake_slurm.asked("squeue")) == 1
    read_statuses([story("local").run])
    assert len(fake_slurm.asked("squeue")) == 1


def test_requeues_are_counted_since_the_run_was_submitted(story, fake_slurm):
    run = story(job="7")
    for _ in range(3):
        run.job_began()
        run.life()
    assert (run.status.requeues, run.status.lives) == (2, 3)
    run.submitted("7", "8")
    assert (run.status.requeues, run.status.lives) == (0, 3)


# ---- progress


def test_what_is_left_comes_from_the_recent_steps_and_counts_no_time_between_lives(story, no_slurm):
    run, now = story(), time.time()
    run.logged((10, now - 5000, 3.0), (20, now - 4900, 2.5))
    run.life(step=21)
    # Begun just now by the ledger: the hours from step 20 to step 30 are no training time.
    run.logged((30, now + 100, 2.0), (40, now + 140, 1.5))
    with held(run.run):
        run.life(step=50)
        # 10 steps in 100 s and 10 in 40 s.
        assert run.status.step_s == pytest.approx(7.0)
        assert (run.status.left_s, run.status.fraction, run.status.loss) == (pytest.approx(7.0 * 150), 0.25, 1.5)


def test_only_the_newest_steps_tell_the_pace(story, no_slurm):
    run = story()
    run.logged(*((step, 1000.0 * step, 1.0) for step in range(10)), *((10 + step, 100_000 + 2.0 * step, 1.0) for step in range(21)))
    assert run.status.step_s == pytest.approx(2.0)


def test_a_step_that_is_trained_again_does_not_make_the_pace_negative(story, no_slurm):
    run = story()
    run.logged((10, 100.0, 1.0), (20, 120.0, 1.0), (11, 500.0, 1.0), (12, 502.0, 1.0))
    assert run.status.step_s == pytest.approx((20 + 2) / (10 + 1))


def test_torn_lines_and_evaluations_are_passed_over(story, no_slurm):
    run = story()
    run.logged((10, 100.0, 1.25))
    run.logged((10, 101.0, 3.5), key="eval/loss")
    with open(run.run.metrics, "a") as file:
        file.write('{"step": 11, "train/lo')
    assert run.status.loss == 1.25


def test_only_the_end_of_a_long_record_is_read(story, no_slurm):
    run = story()
    run.run.metrics.write_text("x" * 300_000 + "\n")
    run.logged((10, 100.0, 1.25))
    assert run.status.loss == 1.25


@pytest.mark.parametrize("recipe", [b"train: 3\n", b"train:\n", b"[]\n", b"train: {max_steps: 3} # \xff\n", b"train: {"])
def test_a_recipe_that_was_spoilt_costs_the_status_its_steps_and_nothing_else(story, recipe):
    told = story("spoilt")
    told.run.recipe.write_bytes(recipe)
    assert told.status.steps is None


def test_how_many_steps_there_are_comes_from_the_recipe_a_checkpoint_or_the_epochs(story, no_slurm):
    assert story("a", train="max_steps: 200, num_train_epochs: 3").status.steps == 200
    by_epochs = story("b", train="max_steps: null, num_train_epochs: 3")
    assert by_epochs.status.steps is None and by_epochs.status.fraction is None
    # 25 steps an epoch.
    by_epochs.logged((10, 1.0, 0.4), key="train/epoch")
    assert by_epochs.status.steps == 75
    (by_epochs.run.path / "checkpoint-20").mkdir()
    (by_epochs.run.path / "checkpoint-20" / "trainer_state.json").write_text(json.dumps({"max_steps": 74}))
    assert by_epochs.status.steps == 74


def test_the_last_commit_and_its_time_are_told(story, no_slurm):
    run = story()
    run.event("committed", step=20)
    run.event("committed", step=40)
    assert run.status.commit == 40 and time.time() - run.status.committed < 60


def test_the_line_for_squeue_has_step_and_loss_and_is_empty_before_the_first_step(story, no_slurm):
    run = story()
    assert progress_line(run.run) == ""
    report = run.life()[0]
    assert progress_line(run.run) == ""
    report.beat(21)
    assert progress_line(run.run) == "step 21/200"
    run.logged((20, 100.0, 1.23456))
    assert progress_line(run.run) == "step 21/200 loss 1.235"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, ""), (40, "40 s"), (89, "89 s"), (90, "2 min"), (3599, "1 h 0 min"), (4320, "1 h 12 min"), (273600, "3 d 4 h")],
)
def test_times_read_well(seconds, text):
    assert format_left(seconds) == text


# ---- which runs


def test_runs_are_found_by_folder_by_job_and_all_at_once(story, no_slurm, tmp_path):
    root = tmp_path / "runs"
    alone, _, _ = story("alone", job="7"), story("grid/00-a", job="9_0"), story("grid/01-b", job="9_1")
    assert names(find_runs("all", root)) == ["alone", "00-a", "01-b"]
    assert names(find_runs(str(alone.run.path), root)) == ["alone"]
    assert names(find_runs(str(root / "grid"), root)) == ["00-a", "01-b"]
    assert names(find_runs("7", root)) == ["alone"]
    assert names(find_runs("9", root)) == ["00-a", "01-b"]
    assert names(find_runs("9_1", root)) == ["01-b"]
    alone.submitted("7", "12")
    assert names(find_runs("7", root)) == names(find_runs("12", root)) == ["alone"]


def names(runs):
    return [run.path.name for run in runs]


def test_links_that_lead_in_a_circle_are_left_after_a_few_levels(story, no_slurm, tmp_path):
    story("alone")
    (tmp_path / "runs" / "circle").symlink_to(tmp_path / "runs")
    assert set(names(find_runs("all", tmp_path / "runs"))) == {"alone"}


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("77", "77: no run below .*runs was sent as that job; give its folder, or where to look with --root"),
        ("nothing", "nothing: is no folder; give a run folder, a folder of runs, the id of a job, or `all`"),
        ("all", "runs: holds no run; give a run folder such as runs/first"),
    ],
)
def test_what_is_no_run_is_said(tmp_path, asked, message):
    (tmp_path / "runs").mkdir()
    with pytest.raises(LaunchError, match=message):
        find_runs(asked, tmp_path / "runs")


# ---- harness status


def test_one_run_is_a_block_with_all_that_is_known(story, fake_slurm):
    run, now = story(job="7"), int(time.time())
    run.job_began()
    run.life()
    run.job_began()
    run.life(step=50)
    run.event("committed", step=40)
    run.logged((40, now + 100.0, 2.0), (50, now + 130.0, 1.5))
    fake_slurm.says("squeue", as_lines(job_row("7", started=str(now - 9))))
    lines = ask(status, run.run.path).splitlines()
    assert lines[0] == str(run.run.path)
    facts = dict(line.split(maxsplit=1) for line in lines[1:])
    assert re.fullmatch(r"checkpoint-40, \d s ago", facts.pop("commit"))
    assert facts == {
        "state": "running: training",
        "step": "50 of 200 (25 %)",
        "loss": "1.5",
        # 3 s for each of the 150 steps that are left.
        "left": "8 min of training, 3 s a step",
        "lives": "2 (1 requeue)",
        "nodes": "q1, q2",
        "job": "7",
        "log": f"{run.run.path}/logs/attempt-2/rank-0.log",
        "next": f"harness logs {run.run.path} -f",
    }


def test_when_a_job_is_expected_to_start_is_a_time_that_people_read(story, fake_slurm):
    run = story(job="7")
    fake_slurm.says("squeue", as_lines(job_row("7", "PENDING", "Resources", started="1795379737")))
    # 20:35 in Greenwich.
    assert re.search(r"\n  starts  2026-11-2\d \d\d:\d5, as Slurm expects now\n", ask(status, run.run.path))


def test_several_runs_are_a_table_with_a_line_each(story, fake_slurm, tmp_path):
    _, done = story("waiting", job="7"), story("done")
    done.life(step=200)
    done.ended("done", 200)
    done.event("committed", step=200)
    fake_slurm.says("squeue", as_lines(job_row("7", "PENDING", "Resources")))
    heading, *lines = ask(status, "all", "--root", tmp_path / "runs").splitlines()
    assert heading.split() == ["run", "state", "step", "done", "loss", "left", "lives", "commit", "why"]
    assert re.fullmatch(r"done +done +200/200 +100 % +1 +200, \d s", lines[0])
    assert re.fullmatch(r"waiting +pending +0 +Resources", lines[1])


def test_everything_is_there_as_json(story, fake_slurm):
    run = story(job="7")
    run.job_began()
    run.life(step=50)
    fake_slurm.says("squeue", as_lines(job_row("7")))
    [found] = json.loads(ask(status, run.run.path, "--json"))
    expected = {"run": str(run.run.path), "state": "running", "step": 50, "steps": 200, "fraction": 0.25, "hosts": ["q1", "q2"], "job": "7"}
    assert {key: found[key] for key in expected} == expected
    assert set(found) == {*RunStatus.__dataclass_fields__, "fraction", "left_s"}


def test_a_table_fits_into_the_terminal_and_cuts_the_name_and_the_last_column():
    rows = [("a-run-with-a-name-that-somebody-thought-about-for-long", "failed", "KeyError: 'labels' is not among the columns of the data")]
    heading = ("run", "state", "why")
    assert render_table(("why",), [("two\nlines",)], (), None) == ["why", "two lines"]
    whole = render_table(heading, rows, (), None)
    assert whole[1] == "  ".join(rows[0]) and not whole[0].endswith(" ")
    for width in (100, 60, 40, 20):
        lines = render_table(heading, rows, (), width)
        assert max(map(len, lines)) <= width and "failed" in lines[1] and "…" in lines[1], (width, lines)


# ---- harness logs


def test_the_last_lines_of_the_last_lifes_rank_0_are_shown(story, no_slurm):
    run = story()
    run.life(ranks=2)
    reports = run.life(ranks=2)
    reports[0].log.write_text("".join(f"line {number}\n" for number in range(100_000)))
    assert ask(logs, run.run.path).splitlines() == [f"line {number}" for number in range(99_800, 100_000)]
    assert ask(logs, run.run.path, "-n", "2") == "line 99998\nline 99999\n"
    assert ask(logs, run.run.path, "-n", "0") == ""
    assert ask(logs, run.run.path, "--rank", 1) == "attempt 2 rank 1\n"
    assert ask(logs, run.run.path, "--attempt", 1) == "attempt 1 rank 0\n"


@pytest.mark.parametrize("text", ["", "one", "one\n", "one\ntwo", "\n\n", "one\r\ntwo\n", "ü\n" * 40_000])
def test_the_end_of_a_log_is_shown_as_it_is(story, no_slurm, text):
    run = story()
    run.life()[0].log.write_bytes(text.encode())
    shown = CliRunner().invoke(logs.command, [str(run.run.path), "-n", "100000"])
    assert shown.stdout_bytes == text.encode()


def test_what_a_job_has_said_is_shown_also_that_of_an_array(story, fake_slurm):
    run = story("grid/00-a", job="9_0")
    log = run.run.path.parent / "logs" / "slurm-9_0.log"
    log.parent.mkdir()
    log.write_text("pre-flight: q1 ok\n")
    assert ask(logs, run.run.path, "--job") == "pre-flight: q1 ok\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rank", "7"], "attempt 5 has no log of rank 7; there are those of ranks 0-2$"),
        (["--attempt", "9"], "has no attempt 9; there are 1-3, 5$"),
        (["--attempt", "9", "-f"], "has no attempt 9; there are 1-3, 5$"),
        (["--job"], "was never sent to Slurm, so no job has a log; leave --job out"),
        (["--job", "--rank", "0"], "--job and --rank or --attempt: .* give one or the other"),
    ],
)
def test_a_log_that_is_not_there_is_answered_with_those_that_are(story, no_slurm, arguments, message):
    run = story()
    for _ in range(4):
        run.life(ranks=3)
    run.run.attempt(4).rename(run.run.attempt(5))
    with pytest.raises(LaunchError, match=message):
        ask(logs, run.run.path, *arguments)


def test_a_run_without_a_log_yet_says_how_it_stands(story, fake_slurm):
    run = story(job="7")
    fake_slurm.says("squeue", as_lines(job_row("7", "PENDING", "Resources")))
    with pytest.raises(LaunchError, match=r"no life of it has begun, so no rank has a log \(pending: Resources\); -f waits for one$"):
        ask(logs, run.run.path)
    with pytest.raises(LaunchError, match=r"job 7 has written no log \(pending: Resources\); -f waits for one$"):
        ask(logs, run.run.path, "--job")
    (run.run.path / "logs").mkdir()
    (run.run.path / "logs" / "slurm-7.log").write_text("pre-flight\n")
    with pytest.raises(LaunchError, match="--job shows what job 7 has said"):
        ask(logs, run.run.path)
    run.submitted("7", "8")
    fake_slurm.says("squeue", as_lines(job_row("8", "CANCELLED")))
    with pytest.raises(LaunchError, match=r"job 8 has written no log \(cancelled: .*\); of earlier jobs there are .*slurm-7.log$"):
        ask(logs, run.run.path, "--job")
    run.life()[0].log.unlink()
    with pytest.raises(LaunchError, match="no rank of attempt 1 has written a log"):
        ask(logs, run.run.path)


def test_one_of_several_runs_must_be_named(story, no_slurm, tmp_path):
    for name in "abcd":
        story(name)
    with pytest.raises(LaunchError, match=r"runs: holds 4 runs \(a, b, c, …\); name one of them"):
        ask(logs, tmp_path / "runs")


def test_following_goes_from_life_to_life_and_ends_with_the_run(story, no_slurm, monkeypatch):
    monkeypatch.setattr(logs, "LOOK_EVERY_S", 0.02)
    run = story()
    told = []
    with held(run.run):
        following = threading.Thread(target=lambda: told.append(ask(logs, run.run.path, "-f")))
        following.start()
        time.sleep(0.1)
        first = run.life()[0]
        time.sleep(0.1)
        with open(first.log, "a") as log:
            log.write("step 1\n")
        second = run.life()[0]
        time.sleep(0.1)
        with open(second.log, "a") as log:
            log.write("step 2\n")
        run.ended("done", 2)
    following.join(10)
    assert told == [
        "==> no log yet; running: starting\n"
        "attempt 1 rank 0\n"
        "step 1\n"
        f"==> {run.run.attempt(2)}/rank-0.log\n"
        "attempt 2 rank 0\n"
        "step 2\n"
        "==> done\n"
    ]


# ---- harness cancel


def test_a_job_is_cancelled_wherever_it_stands_and_what_stands_is_said(story, fake_slurm):
    run = story(job="7")
    run.event("committed", step=40)
    fake_slurm.says("squeue", as_lines(job_row("7", "PENDING", "Resources")))
    assert ask(cancel, run.run.path) == (
        f"{run.run.path}: job 7 is cancelled; it was pending: Resources; the newest checkpoint is checkpoint-40; "
        f"to go on: harness submit {run.run.path}\n"
    )
    assert fake_slurm.asked("scancel") == [["7"]]


def test_an_array_is_cancelled_by_one_command_and_what_has_ended_is_left(story, fake_slurm, tmp_path):
    for number in range(3):
        story(f"grid/0{number}-x", job=f"9_{number}")
    rows = job_row("9_0"), job_row("9_1", "PENDING", "Priority"), job_row("9_2", "CANCELLED")
    fake_slurm.says("squeue", as_lines(*rows))
    lines = ask(cancel, tmp_path / "runs" / "grid").splitlines()
    assert fake_slurm.asked("scancel") == [["9_0", "9_1"]]
    assert "job 9_0 is cancelled" in lines[0] and "job 9_1 is cancelled" in lines[1]
    assert lines[2].endswith("02-x: nothing to cancel; it is cancelled: job 9_2 was cancelled")


def test_a_run_that_trains_is_asked_to_save_by_a_stop_file_that_says_who_asked(story, fake_slurm, monkeypatch):
    monkeypatch.setenv("LOGNAME", "ada")
    run = story(job="7")
    run.job_began()
    run.life(step=50)
    fake_slurm.says("squeue", as_lines(job_row("7", started=str(int(time.time()) - 9))))
    assert "asked to save at its next step and to leave; no checkpoint was made yet; to go on: harness submit" in ask(
        cancel, run.run.path, "--save"
    )
    assert fake_slurm.asked("scancel") == []
    request = StopRequest.read(run.run.stop)
    assert request.reason.startswith("cancel: asked by ada at 20") and request.deadline is None


def test_a_stop_of_slurms_is_written_over_but_its_deadline_stands(story, no_slurm):
    run = story()
    write_text_atomically(run.run.stop, "slurm: preempted\ndeadline: 1795379675\n")
    run.life(step=50)
    with held(run.run):
        ask(cancel, run.run.path, "--save")
    request = StopRequest.read(run.run.stop)
    assert request.reason.startswith("cancel: ") and request.deadline == 1795379675


@pytest.mark.parametrize("row", [job_row("7", "PENDING", "Resources"), job_row("7")], ids=["waits", "tries its nodes"])
def test_a_job_that_has_nothing_to_save_is_cancelled_at_once(story, fake_slurm, row):
    run = story(job="7")
    fake_slurm.says("squeue", as_lines(row))
    assert "nothing had to be saved; no checkpoint was made yet" in ask(cancel, run.run.path, "--save")
    assert fake_slurm.asked("scancel") == [["7"]] and not run.run.stop.exists()


def test_a_run_without_slurm_is_asked_to_save_and_not_ended_otherwise(story, no_slurm):
    run = story()
    run.life(step=50)
    with held(run.run):
        with pytest.raises(LaunchError, match=r"runs on .* without Slurm.* press Ctrl-C there, or .* harness cancel .*first --save"):
            ask(cancel, run.run.path)
        assert not run.run.stop.exists()
        assert "asked to save" in ask(cancel, run.run.path, "--save")
    assert run.run.stop.is_file()


def test_nothing_is_cancelled_when_one_of_several_runs_cannot_be(story, fake_slurm, tmp_path):
    story("a", job="7")
    local = story("b")
    fake_slurm.says("squeue", as_lines(job_row("7")))
    with held(local.run), pytest.raises(LaunchError):
        ask(cancel, tmp_path / "runs")
    fake_slurm.refuses("squeue", "slurm_load_jobs error: Unable to contact slurm controller (connect failure)")
    with pytest.raises(ClusterError, match="a: squeue: .*Unable to contact slurm controller.*; nothing was cancelled"):
        ask(cancel, tmp_path / "runs")
    assert fake_slurm.asked("scancel") == []


def test_a_run_that_has_ended_needs_no_cancelling(story, no_slurm):
    run = story()
    run.life(step=200)
    run.ended("done", 200)
    assert ask(cancel, run.run.path) == f"{run.run.path}: nothing to cancel; it is done\n"


# ---- harness nodes

NODES = as_lines(
    ("q1", "low", "mixed", "2/2/0/4", "4000", "0", "gpu:h100:2(S:0-1)", "gpu:h100:1(IDX:0)", "none"),
    ("q2", "low", "idle", "0/4/0/4", "4000", "0", "gpu:h100:2", "gpu:h100:0(IDX:N/A)", "none"),
    ("q3", "low", "allocated", "4/0/0/4", "4000", "0", "gpu:h100:2", "gpu:h100:0(IDX:N/A)", "none"),
    ("q4", "low", "down*", "0/0/4/4", "4000", "0", "gpu:h100:2", "gpu:h100:0(IDX:N/A)", "bad fan: GPU 1"),
    ("q5", "low", "down*", "0/0/4/4", "4000", "0", "gpu:h100:2", "gpu:h100:0(IDX:N/A)", "bad fan: GPU 1"),
    ("q6", "low", "mixed", "2/2/0/4", "4000", "0", "gpu:h100:2", "gpu:h100:2(IDX:0-1)", "none"),
    ("q2", "high", "idle", "0/4/0/4", "4000", "0", "gpu:h100:2", "gpu:h100:0(IDX:N/A)", "none"),
    ("c1", "cpu", "idle~", "0/8/0/8", "64000", "0", "(null)", "gpu:0", "none"),
)


def test_what_is_free_is_told_by_partition_and_gpu_type_and_why_nodes_are_down(fake_slurm):
    fake_slurm.says("sinfo", NODES)
    heading, *lines = ask(nodes).splitlines()
    assert heading.split("  ")[0] == "partition" and heading.endswith("nodes  idle  partly free  full  down  free GPUs  free CPUs")
    assert [line.split() for line in lines[:3]] == [
        ["cpu", "none", "1", "1", "0", "0", "0", "0", "8"],
        ["high", "2", "h100", "1", "1", "0", "0", "0", "2", "4"],
        # q1 has one GPU free; q6 has CPUs and no GPU, so it is full; of q3's GPUs nobody can use any without a CPU.
        ["low", "2", "h100", "6", "1", "1", "2", "2", "5", "8"],
    ]
    assert lines[3:] == ["down: q4, q5 (bad fan: GPU 1)"]
    assert ask(nodes, "high").splitlines()[1:] == [lines[1]]


def shape(tmp_path, **settings):
    file = tmp_path / "site.yaml"
    file.write_text(json.dumps(settings))
    return file


def test_how_many_nodes_could_take_a_job_of_a_clusters_shape(fake_slurm, tmp_path):
    fake_slurm.says("sinfo", NODES)
    asked = shape(tmp_path, partition="low", gpus_per_node=1, gpu_type="h100", cpus_per_node=2, memory_gib=3, constraint="nvlink")
    assert ask(nodes, "--cluster", asked).endswith(
        "site: 2 of 6 nodes of partition low could begin with 1 h100 GPUs, 2 CPUs, 3 GiB each now: q1, q2\n"
        "(not looked at: constraint, limits of account and QOS, jobs that are before it in the queue)\n"
    )


@pytest.mark.parametrize(
    ("settings", "fitting"),
    [
        ({"gpus_per_node": 2}, ["q2"]),
        ({"gpus_per_node": 1, "gpu_type": "a100"}, []),
        ({"cpus_per_node": 2}, ["q1", "q2", "q6"]),
        ({"cpus_per_node": 3}, ["q2"]),
        ({"memory_gib": 4}, []),
        ({"memory_gib": 0}, ["q1", "q2", "q6"]),
        ({"exclude": ["q[1-2]"]}, ["q6"]),
    ],
)
def test_a_node_fits_when_all_that_is_asked_for_is_free_on_it(fake_slurm, tmp_path, settings, fitting):
    fake_slurm.says("sinfo", NODES)
    asked = shape(tmp_path, partition="low", **settings)
    found = json.loads(ask(nodes, "--cluster", asked, "--json"))
    assert found["could_start_now"] == fitting and [node["name"] for node in found["nodes"]] == ["q1", "q2", "q3", "q4", "q5", "q6"]


def test_a_cluster_file_without_a_partition_means_slurms_default(fake_slurm, tmp_path, monkeypatch):
    monkeypatch.setattr(nodes, "default_partition", lambda: "cpu")
    fake_slurm.says("sinfo", NODES)
    assert "1 of 1 nodes of partition cpu could begin with 1 CPU each now: c1" in ask(nodes, "--cluster", shape(tmp_path))


def test_a_partition_that_is_not_there_is_answered_with_those_that_are(fake_slurm):
    fake_slurm.says("sinfo", NODES)
    with pytest.raises(ClusterError, match="partition nope: there is no such partition here; there are cpu, high, low"):
        ask(nodes, "nope")
