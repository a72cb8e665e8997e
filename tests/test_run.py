"""The run folder: made once, deleted only on request and only if it is one, and enough on its own."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from harness.errors import LaunchError
from harness.recipe import load, render_recipe
from harness.run import (
    LAUNCH_VARIABLE,
    RankReport,
    RunDir,
    rank_reports,
    read_outcome,
    replace_folder,
    smoke_recipe,
    write_outcome,
    write_text_atomically,
)
from harness.watchdog import process_state

RECIPE = """
model: {name_or_path: some/model}
data: {train: rows.jsonl}
"""
ODD_NAME = 'a run\'s "blanks" & quotes'


@pytest.fixture
def recipe(tmp_path):
    file = tmp_path / 'it\'s a "recipe".yaml'
    file.write_text(RECIPE)
    return load(str(file), [f"output_dir={tmp_path / 'runs' / ODD_NAME}", "train.learning_rate=1e-4"])


def test_the_recipe_in_a_run_folder_is_the_recipe(recipe):
    run = RunDir.create(recipe)
    assert load(run.recipe) == recipe


def test_a_run_is_taken_up_again_whole_and_fresh_alone_deletes_it(recipe):
    run = RunDir.create(recipe)
    run.metrics.touch()
    (run.path / "checkpoint-3").mkdir()
    changed = recipe.model_copy(update={"train": recipe.train.model_copy(update={"logging_steps": 7})})
    assert RunDir.create(changed).path == run.path
    assert run.metrics.is_file() and (run.path / "checkpoint-3").is_dir() and load(run.recipe) == changed
    RunDir.create(recipe, fresh=True)
    assert sorted(path.name for path in run.path.iterdir()) == [".lock", "recipe.yaml"]


def test_a_request_from_an_earlier_start_is_taken_away_and_said_and_a_new_one_stays(recipe, capsys):
    run = RunDir.create(recipe)
    run.save.touch()
    run.stop.touch()
    os.utime(run.stop, (1, 1))
    run.open_attempt()
    assert not run.stop.exists() and run.save.exists()
    assert f"{run.stop}: left from an earlier start; removed" in capsys.readouterr().out


def test_a_folder_is_held_until_everybody_who_inherited_its_lock_has_ended(recipe):
    program = (
        "import subprocess, sys\nfrom harness.recipe import load\nfrom harness.run import RunDir\n"
        "run = RunDir.create(load(sys.argv[1]))\n"
        "print(subprocess.Popen(['sleep', '60'], pass_fds=[run.lock], stdout=-3, stderr=-3).pid)"
    )
    run = RunDir.of(recipe)
    run.path.mkdir(parents=True)
    run.recipe.write_text(render_recipe(recipe))
    done = subprocess.run([sys.executable, "-c", program, str(run.recipe)], capture_output=True, text=True, check=True)
    orphan = int(done.stdout)
    with pytest.raises(LaunchError, match="another process is running in it"):
        RunDir.create(recipe)
    os.kill(orphan, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while process_state(orphan) not in (None, "Z"):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert RunDir.create(recipe).path == run.path


def test_two_processes_never_run_in_one_folder(recipe):
    import fcntl

    run = RunDir.of(recipe)
    run.path.mkdir(parents=True)
    with open(run.path / ".lock", "a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(LaunchError, match="another process is running in it"):
            RunDir.create(recipe, fresh=True)
    assert RunDir.create(recipe).recipe.is_file()


@pytest.mark.parametrize("place", ["/", "home", "."])
def test_a_folder_that_holds_more_than_runs_is_no_place_for_one(recipe, place, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    place = str(Path.home()) if place == "home" else place
    with pytest.raises(LaunchError, match="is no place for a run folder"):
        RunDir.create(recipe.model_copy(update={"output_dir": place}), fresh=True)


def test_a_folder_that_cannot_be_made_is_a_message_and_no_traceback(recipe, tmp_path):
    (tmp_path / "file").touch()
    places = ((tmp_path / "file", "is a file"), (tmp_path / "file" / "below", "no run folder can be made"), ("/proc/x", "no run folder"))
    for place, match in places:
        with pytest.raises(LaunchError, match=match):
            RunDir.create(recipe.model_copy(update={"output_dir": str(place)}))


def test_fresh_never_deletes_a_folder_that_is_not_a_run(recipe):
    run = RunDir.of(recipe)
    run.path.mkdir(parents=True)
    (run.path / "thesis.tex").write_text("years of work")
    with pytest.raises(LaunchError, match="holds what is not a run.s .thesis.tex."):
        RunDir.create(recipe, fresh=True)
    assert (run.path / "thesis.tex").read_text() == "years of work"


def test_a_folder_that_is_empty_is_taken(recipe):
    RunDir.of(recipe).path.mkdir(parents=True)
    assert RunDir.create(recipe, fresh=True).recipe.is_file()


def test_attempts_count_from_one_in_numbers_and_not_in_letters(recipe):
    run = RunDir.create(recipe)
    assert run.last_attempt() is None
    folders = [run.open_attempt() for _ in range(11)]
    assert [folder.name for folder in folders] == [f"attempt-{number}" for number in range(1, 12)]
    assert run.last_attempt() == folders[-1]


def test_a_folder_without_a_manifest_is_not_taken_for_a_run(recipe):
    with pytest.raises(LaunchError, match="no run of harness began here"):
        RunDir.create(recipe).read_manifest()


def test_a_smoke_test_has_a_folder_of_its_own(recipe):
    assert RunDir.of(smoke_recipe(recipe)).path.name == f"{ODD_NAME}-smoke"


def test_a_folder_is_replaced_whole(tmp_path):
    for name in ("final", "staging"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    replace_folder(tmp_path / "staging", tmp_path / "final")
    assert [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*"))] == ["final", "final/staging"]


def test_a_rank_reports_only_once_it_knows_its_attempt(tmp_path):
    report = RankReport(3)
    assert report.failed(ValueError("early")) is False
    report.enter("training", tmp_path)
    (alive,) = rank_reports(tmp_path, "alive")
    assert (alive["rank"], alive["phase"]) == (3, "training") and rank_reports(tmp_path, "errors") == []


def test_a_beat_says_the_step_in_the_same_bytes_and_costs_microseconds(tmp_path, monkeypatch):
    monkeypatch.setenv(LAUNCH_VARIABLE, "this one")
    report = RankReport(1, tmp_path)
    path = tmp_path / "alive" / "rank-1.json"
    place, width = path.stat().st_ino, path.stat().st_size
    report.enter("training")
    begun = time.perf_counter()
    for step in range(1000):
        report.beat(step)
    assert time.perf_counter() - begun < 0.5
    report.beat()  # a batch of the same step
    (alive,) = rank_reports(tmp_path, "alive")
    assert (alive["step"], alive["phase"], alive["launch"], alive["host"]) == (999, "training", "this one", report.host)
    assert (path.stat().st_ino, path.stat().st_size) == (place, width)  # no new block is asked of a disk that may be full
    report.enter("saving: " + "a name longer than any" * 50)
    report.enter("training")
    assert rank_reports(tmp_path, "alive")[0]["phase"] == "training"


def test_no_beat_comes_after_a_ranks_last_word(tmp_path):
    report = RankReport(0, tmp_path)
    report.ended_by("SIGTERM")  # from a thread, while the main thread goes on for a moment
    report.beat(7)
    assert rank_reports(tmp_path, "alive")[0]["ended_by"] == "SIGTERM"
    report.stopped("asked")
    report.beat(8)
    (alive,) = rank_reports(tmp_path, "alive")
    assert (alive["phase"], alive["stopped"]) == ("stopped", "asked")


def test_a_report_that_a_crash_of_the_machine_has_torn_is_passed_over(tmp_path):
    RankReport(0, tmp_path)
    RankReport(1, tmp_path)
    (tmp_path / "alive" / "rank-0.json").write_text("")
    assert [report["rank"] for report in rank_reports(tmp_path, "alive")] == [1]


def test_writers_with_the_same_process_id_do_not_take_each_others_file_away(tmp_path):
    # Threads, in place of the first processes of two containers.
    with ThreadPoolExecutor(4) as writers:
        done = [writers.submit(write_text_atomically, tmp_path / "run.json", f"{number}" * 1000) for number in range(10) for _ in range(20)]
        assert [each.result() for each in done] == [None] * 200
    [written] = tmp_path.iterdir()
    assert len(written.read_text()) == 1000 and len(set(written.read_text())) == 1


def test_the_first_word_on_how_a_life_ended_stands(tmp_path):
    assert read_outcome(None) is None and read_outcome(tmp_path) is None
    write_outcome(tmp_path, "stopped", step=7, checkpoint=7, reason="asked")
    write_outcome(tmp_path, "hang", step=None, checkpoint=None, reason="slow to leave")
    assert read_outcome(tmp_path) == {"outcome": "stopped", "step": 7, "checkpoint": 7, "reason": "asked"}


def test_an_error_with_a_name_is_reported_without_a_traceback_and_logged_with_one(tmp_path):
    report = RankReport(0, tmp_path)
    for error, traceback in ((LaunchError("two"), ""), (ValueError("three"), "Traceback")):
        try:
            raise error
        except (LaunchError, ValueError) as caught:
            assert report.failed(caught)
        written = json.loads((tmp_path / "errors" / "rank-0.json").read_text())
        assert written["message"] == str(error) and written["traceback"].startswith(traceback)
        assert bool(written["traceback"]) == bool(traceback)
    assert report.log.read_text().count("Traceback") == 2


def test_an_installed_copy_never_names_the_commit_of_the_checkout_around_it(tmp_path):
    import shutil

    from harness.run import git_commit

    def git(*args):
        subprocess.run(["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b", *args], check=True, capture_output=True)

    git("init")
    git("commit", "--allow-empty", "-m", "somebody's own project")
    package = Path(git_commit.__code__.co_filename).parent
    shutil.copytree(package, tmp_path / "site" / "harness", ignore=shutil.ignore_patterns("__pycache__"))
    code = "import harness.run; print(harness.run.__file__, harness.run.git_commit())"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path / "site", capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(tmp_path / "site" / "harness" / "run.py"), "None"]


def test_a_copy_of_a_run_that_followed_the_link_to_the_newest_attempt_can_go_on(tmp_path):
    RunDir(tmp_path / "run").open_attempt()
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    copy = RunDir(tmp_path / "copy")
    assert not (copy.path / "logs" / "latest").is_symlink()
    second = copy.open_attempt()
    assert (copy.path / "logs" / "latest").resolve() == second.resolve() == copy.attempt(2).resolve()


def test_a_folder_that_is_no_run_is_answered_with_the_run_that_was_meant(tmp_path):
    for name in ("quickstart/base", "quickstart/adapt", "first"):
        (tmp_path / name / "final").mkdir(parents=True)
        (tmp_path / name / "run.json").write_text("{}")
    for asked, said in (
        ("quickstart", f"give one of the runs in it ({tmp_path}/quickstart/adapt, {tmp_path}/quickstart/base)"),
        ("first/final", f"it lies in the run {tmp_path}/first; give that"),
        ("frist", f"did you mean {tmp_path}/first?"),
        ("nothing/like/it", "give a run's folder, such as runs/quickstart/base"),
    ):
        with pytest.raises(LaunchError) as refused:
            RunDir(tmp_path / asked).read_manifest()
        assert said in str(refused.value)
