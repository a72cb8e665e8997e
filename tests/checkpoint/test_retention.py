"""What goes, what stays, and that a kill or a failing disk in between leaves only whole checkpoints."""

import os
import shutil

import pytest

from harness.checkpoint import retention
from harness.checkpoint.ledger import Ledger, read_ledger
from harness.checkpoint.retention import clean, plan_retention, retire
from harness.checkpoint.selection import checkpoints
from harness.run import RunDir

FILES = ("manifest.json", "model.safetensors", "global_step/shard.pt")


def make(folder):
    for file in FILES:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text("x")


@pytest.fixture
def run(tmp_path):
    for step in (2, 4, 6, 8):
        make(tmp_path / f"checkpoint-{step}")
    return RunDir(tmp_path)


@pytest.fixture
def ledger(run):
    return Ledger(run.ledger, 1)


def steps(run):
    return [step for step, _ in checkpoints(run.path)]


def events(run):
    return [(event["event"], event["step"]) for event in read_ledger(run.ledger)]


@pytest.mark.parametrize(
    ("keep", "keep_every", "best_step", "goes"),
    [
        (2, None, None, [10, 20, 30]),
        (1, None, None, [10, 20, 30, 40]),
        (0, None, None, [10, 20, 30, 40]),
        (9, None, None, []),
        (2, None, 10, [20, 30]),
        (2, None, 50, [10, 20, 30]),
        (2, None, 99, [10, 20, 30]),
        (1, 20, None, [10, 30]),
        (1, 30, 10, [20, 40]),
    ],
)
def test_the_newest_the_best_and_the_multiples_stay(keep, keep_every, best_step, goes):
    assert plan_retention([50, 10, 30, 20, 40], keep=keep, keep_every=keep_every, best_step=best_step) == goes


def test_one_always_stays():
    assert plan_retention([7], keep=0, keep_every=None, best_step=None) == []
    assert plan_retention([], keep=2, keep_every=5, best_step=3) == []


def test_what_is_retired_is_gone_and_the_ledger_says_so(run, ledger):
    assert retire(run, ledger, [2, 6]) == []
    assert steps(run) == [8, 4] and list(run.retired.iterdir()) == []
    assert events(run) == [("retired", 2), ("retired", 6)]


def test_a_checkpoint_loses_its_name_on_the_disk_before_it_loses_a_file(run, ledger, monkeypatch):
    order, fsync, rmtree = [], os.fsync, shutil.rmtree
    monkeypatch.setattr(os, "fsync", lambda descriptor: (order.append(os.readlink(f"/proc/self/fd/{descriptor}")), fsync(descriptor)))
    monkeypatch.setattr(shutil, "rmtree", lambda path: (order.append(f"delete {path}"), rmtree(path)))
    retire(run, ledger, [2])
    deleted = order.index(f"delete {run.retired / 'checkpoint-2-1'}")
    assert set(order[:deleted]) == {str(run.retired), str(run.path)}


class Killed(BaseException):
    pass


@pytest.mark.parametrize("at", range(5))
def test_a_kill_at_any_deletion_leaves_whole_checkpoints_and_the_next_life_clears_up(run, ledger, monkeypatch, at):
    done = []

    def die(name):
        call = getattr(os, name)

        def wrapped(*arguments, **options):
            if len(done) == at:
                raise Killed
            done.append(name)
            return call(*arguments, **options)

        return wrapped

    with monkeypatch.context() as patch:
        for name in ("unlink", "rmdir"):
            patch.setattr(os, name, die(name))
        with pytest.raises(Killed):
            retire(run, ledger, [2, 4])
    assert steps(run) == [8, 6, 4]
    for step in steps(run):
        assert all((run.path / f"checkpoint-{step}" / file).is_file() for file in FILES)
    assert len(list(run.retired.iterdir())) == 1
    assert clean(run) == [] and list(run.retired.iterdir()) == []


def test_a_step_that_was_half_deleted_is_committed_and_retired_again(run, ledger):
    make(run.retired / "checkpoint-2-1")
    assert retire(run, ledger, [2]) == []
    assert [entry.name for entry in run.retired.iterdir()] == ["checkpoint-2-1"]


def test_a_failing_disk_ends_no_training_and_the_others_still_go(run, ledger, monkeypatch):
    rename = os.rename

    def refuse(old, new):
        if old.name == "checkpoint-4":
            raise OSError(30, "Read-only file system", str(old))
        rename(old, new)

    monkeypatch.setattr(os, "rename", refuse)
    assert retire(run, ledger, [2, 4, 6]) == [4]
    assert steps(run) == [8, 4]
    assert events(run) == [("retired", 2), ("retire_failed", 4), ("retired", 6)]
    assert "Read-only file system" in read_ledger(run.ledger)[1]["error"]


def test_what_cannot_be_deleted_has_lost_its_name_all_the_same(run, ledger, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", refuse)
        assert retire(run, ledger, [2]) == [2]
        assert steps(run) == [8, 6, 4]
        assert events(run) == [("retire_failed", 2)]
        [error] = clean(run)
        assert "checkpoint-2-1: cannot be deleted: " in error and "Permission denied" in error
    assert clean(run) == []
    assert list(run.retired.iterdir()) == []


def test_cleaning_takes_torn_saves_and_leaves_checkpoints_and_quarantine(run):
    make(run.staging / "6-1-abc/checkpoint-6")
    make(run.staging / "7-1-def/checkpoint-7")
    make(run.retired / "checkpoint-2-1")
    make(run.quarantine / "checkpoint-3-1")
    assert clean(run) == []
    assert not any(run.staging.iterdir()) and not any(run.retired.iterdir())
    assert steps(run) == [8, 6, 4, 2] and (run.quarantine / "checkpoint-3-1/manifest.json").is_file()
    assert clean(RunDir(run.path / "nowhere")) == []


def test_a_file_that_vanishes_while_it_is_deleted_is_no_error(run, monkeypatch):
    make(run.retired / "checkpoint-2-1")
    unlink, lost = os.unlink, []

    def vanish(path, **options):
        unlink(path, **options)
        if not lost:
            lost.append(path)
            raise FileNotFoundError(2, "No such file or directory", path)

    monkeypatch.setattr(os, "unlink", vanish)
    retention.delete(run.retired / "checkpoint-2-1")
    assert lost and not any(run.retired.iterdir())
