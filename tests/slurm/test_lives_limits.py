"""When a run gives up, how it goes back to the queue, and who else may touch its folder. But for the first tests ranks are sketched."""

import json
import time
from pathlib import Path

import pytest

from slurm.jobs import JobRun, SketchedRun, at_step

pytestmark = pytest.mark.slow


def test_a_rank_that_raises_stops_the_run_at_once_with_its_own_error_last(slurm_cluster, tmp_path):
    run = JobRun(slurm_cluster, tmp_path, inject=at_step(2, '{}["labels"]', rank=1), pace_s=0)
    run.submit()
    assert run.wait() == "FAILED" and slurm_cluster.show(run.job)["ExitCode"] == "1:0" and slurm_cluster.show(run.job)["Restarts"] == "0"
    assert run.run.attempts() == [1] and [event["then"] for event in run.events("life_ended")] == ["stop"]
    *_, error, logs, stopped, place = run.said().strip().splitlines()
    assert error == "KeyError: 'labels'" and logs.startswith("(logs:") and stopped.startswith("stopped: rank 1 on ")
    assert stopped.endswith("failed while training: KeyError: 'labels'") and "harness submit" in place


def test_a_bad_row_that_only_the_job_sees_stops_it_before_any_rank(slurm_cluster, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "fine"}\n{"text": 7}\n')
    run = JobRun(slurm_cluster, tmp_path, f"data.train=[{{path: {rows}, format: text}}]", nodes=1)
    run.submit()
    assert run.wait() == "FAILED" and slurm_cluster.show(run.job)["ExitCode"] == "2:0"
    assert run.run.attempts() == [] and f"{rows}:2" in run.said()
    assert "stopped: `harness prepare` failed; the reason stands above" in run.said()


def test_an_error_of_the_data_found_by_a_rank_keeps_its_exit_code(slurm_cluster, tmp_path):
    run = SketchedRun(slurm_cluster, tmp_path, "bad-data")
    run.submit()
    assert run.wait() == "FAILED" and slurm_cluster.show(run.job)["ExitCode"] == "2:0" and run.ends() == ["stop"]
    assert "rows.jsonl:7: is no row" in run.said().strip().splitlines()[-2]


def test_a_crash_loop_stops_at_three_lives_and_says_why(slurm_cluster, tmp_path):
    run = SketchedRun(slurm_cluster, tmp_path, "dies")
    run.submit()
    # After two on the same nodes the third is tried on whichever the queue gives.
    assert run.wait() == "FAILED" and slurm_cluster.show(run.job)["Restarts"] == "1"
    assert run.ends() == ["again", "requeue", "stop"]
    assert (
        "stopped: 3 lives in a row ended without a newer checkpoint or unit; the last: ended without an error of its own: rank 1"
        in run.said()
    )
    assert "no checkpoint was made yet; when the cause is gone: harness submit" in run.said()
    # Submitted again it has three more.
    run.submit()
    run.wait()
    assert run.ends() == ["again", "requeue", "stop"] * 2


def test_a_run_that_gets_on_is_requeued_when_its_lives_in_the_job_are_used_up_and_no_more_than_it_may(slurm_cluster, tmp_path):
    restarts = {"in_allocation": 1, "max_restarts": 1}
    run = SketchedRun(slurm_cluster, tmp_path, "commits+dies", restarts=restarts)
    run.submit()
    assert run.wait() == "FAILED" and slurm_cluster.show(run.job)["Restarts"] == "1"
    assert run.ends() == ["again", "requeue", "again", "stop"]
    assert "it was begun again 1 times in this job; the job was requeued 1 times, and restarts.max_restarts is 1" in run.said()


def test_without_restarts_in_the_allocation_the_first_death_is_requeued(slurm_cluster, tmp_path):
    run = SketchedRun(slurm_cluster, tmp_path, "commits+dies", "done", restarts={"in_allocation": 0})
    run.submit()
    assert run.wait() == "COMPLETED" and run.ends() == ["requeue", "done"]


def forbid_scontrol(folder: Path) -> list[str]:
    """The setup of a site whose compute nodes may not change jobs."""
    (folder / "forbids").mkdir()
    (folder / "forbids" / "scontrol").write_text("#!/bin/sh\necho 'slurm_requeue error: Access/permission denied' >&2\nexit 1\n")
    (folder / "forbids" / "scontrol").chmod(0o755)
    return [f"export PATH={folder}/forbids:$PATH"]


def test_a_successor_takes_the_run_over_and_whoever_waited_for_the_first_waits_for_it(slurm_cluster, tmp_path):
    rig = slurm_cluster
    run = SketchedRun(rig, tmp_path, "goes", "done", restarts={"by": "successor"})
    run.submit()
    first = run.job
    waiting = rig.submit("true", f"--dependency=afterok:{first}")
    run.wait_for_phase("training")
    run.tell("USR1")
    rig.wait_for(lambda: run.job != first, "a successor")
    rig.wait_for_state(first, "FAILED")
    assert rig.show(first)["Restarts"] == "0" and rig.show(waiting)["Dependency"].startswith(f"afterok:{run.job}(")
    assert run.wait() == "COMPLETED", run.said()
    rig.wait_for_state(waiting, "COMPLETED")
    jobs = json.loads((run.path / "job.json").read_text())["jobs"]
    assert [(job["id"], job["why"]) for job in jobs] == [(first, "submitted"), (run.job, "SIGUSR1 to the job")]
    assert f"job {run.job} takes the run over" in run.said()


def test_where_scontrol_is_forbidden_a_successor_takes_over_and_that_nobody_can_wait_for_it_is_said(slurm_cluster, tmp_path):
    run = SketchedRun(slurm_cluster, tmp_path, "goes", "done", setup=forbid_scontrol(tmp_path))
    run.submit()
    first = run.job
    slurm_cluster.submit("true", f"--dependency=afterok:{first}", "--kill-on-invalid-dep=yes")
    run.wait_for_phase("training")
    run.tell("USR1")
    slurm_cluster.wait_for(lambda: run.job != first, "a successor")
    assert run.wait() == "COMPLETED", run.said()
    assert "warning: scontrol: slurm_requeue error: Access/permission denied" in run.said()
    assert f"jobs that wait for {first} cannot be made to wait for {run.job}" in run.said()


def test_where_only_scontrol_may_be_used_and_it_is_refused_the_run_stops_and_says_what_to_change(slurm_cluster, tmp_path):
    run = SketchedRun(slurm_cluster, tmp_path, "goes", setup=forbid_scontrol(tmp_path), restarts={"by": "scontrol"})
    run.submit()
    run.wait_for_phase("training")
    run.tell("USR1")
    assert run.wait() == "FAILED" and slurm_cluster.show(run.job)["ExitCode"] == "75:0"
    assert "Access/permission denied" in run.said() and "restarts.by: successor needs no scontrol" in run.said()


def test_one_at_a_time_may_work_in_a_run_folder(slurm_cluster, tmp_path):
    rig = slurm_cluster
    run = SketchedRun(rig, tmp_path, "commits+goes", "done")
    run.submit()
    first = run.job
    run.wait_for_phase("training")
    lives = f"job {first} of this run lives (RUNNING)"
    assert lives in run.submit(code=2)
    done = run.harness("run", run.path / "recipe.yaml", "--processes", "2")
    assert done.code == 2 and lives in done.output
    rig.run("scancel", first)
    assert run.wait() == "CANCELLED"
    # As if Slurm had forgotten it.
    content = json.loads((run.path / "job.json").read_text())
    content["jobs"][-1]["id"] = "1"
    (run.path / "job.json").write_text(json.dumps(content))
    run.submit()
    assert run.job not in (first, "1") and run.wait() == "COMPLETED", run.said()


def test_a_job_whose_run_goes_on_elsewhere_leaves_within_seconds_and_touches_nothing(slurm_cluster, tmp_path):
    run = SketchedRun(slurm_cluster, tmp_path, "goes")
    run.submit()
    run.wait_for_phase("training")
    (run.path / "logs" / "owner").write_text("1.0\n")
    begun, events = time.monotonic(), run.events()
    assert run.wait() == "FAILED" and time.monotonic() - begun < 20
    assert f"{run.path}: the run goes on elsewhere (job 1.0), so this job ({run.job}.0) leaves it alone" in run.said()
    assert run.events() == events
    run.check_nothing_left()
