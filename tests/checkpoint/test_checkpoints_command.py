"""`harness checkpoints` as a person meets it: it tells the truth about a run folder, and never deletes what a run would continue from."""

import json
import os
import shutil
import time

import pytest
from click.testing import CliRunner
from conftest import harness

from harness.checkpoint.ledger import Ledger, read_ledger
from harness.checkpoint.manifest import digest_files, write_manifest
from harness.checkpoint.selection import check_checkpoint, checkpoints, select_checkpoint
from harness.cli.checkpoints import command, format_age, format_bytes
from harness.errors import CheckpointError, HarnessError, LaunchError
from harness.run import RunDir

RECIPE = "model: {name_or_path: some/model}\ndata: {train: rows.jsonl}\n"


def commit(run, step, *, reason="interval", best=None, age_s=0.0):
    files = {"model.safetensors": bytes([step % 256]) * 2000, "trainer_state.json": json.dumps({"best_global_step": best}).encode()}
    folder = run.path / f"checkpoint-{step}"
    folder.mkdir()
    for path, data in files.items():
        (folder / path).write_bytes(data)
    about = {"step": step, "reason": reason, "world_size": 2, "time": time.time() - age_s}
    write_manifest(folder, {**about, "files": digest_files(folder, files, durable=False)})
    Ledger(run.ledger, 1).append("committed", step=step, reason=reason)


@pytest.fixture
def run(tmp_path):
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    run.manifest.write_text("{}")
    run.recipe.write_text(RECIPE + "checkpoint: {keep: 2, keep_every: 30}\n")
    return run


@pytest.fixture
def four(run):
    for step, age_s in ((10, 7200), (20, 600), (30, 300), (40, 5)):
        commit(run, step, best=20, age_s=age_s)
    return run


def ask(verb, run, *arguments):
    """The output and the exit code. Errors with a name are raised, for `harness` itself to render."""
    done = CliRunner().invoke(command, [verb, str(run.path), *arguments])
    if isinstance(done.exception, HarnessError):
        raise done.exception
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.output, done.exit_code


def flip(run, step, file="model.safetensors"):
    with open(run.path / f"checkpoint-{step}" / file, "r+b") as stream:
        stream.seek(7)
        stream.write(b"!")


def steps(run):
    return [step for step, _ in checkpoints(run.path)]


def everything(folder):
    return {str(path): path.lstat().st_mtime_ns for path in folder.rglob("*")}


def test_list_shows_each_checkpoint_and_what_a_resume_would_take(four):
    os.truncate(four.path / "checkpoint-40/model.safetensors", 5)
    (four.path / "checkpoint-50").mkdir()
    before = everything(four.path)
    output, code = ask("list", four)
    table = [line.split() for line in output.splitlines()]
    assert code == 0 and table[0] == ["step", "age", "size", "reason", "ranks", "whole", "by", "sizes"]
    assert [line[0] for line in table[1:6]] == ["50", "40", "30", "20", "10"]
    assert "NO: has no manifest.json" in output.splitlines()[1]
    assert "NO: model.safetensors: has 5 bytes; 2,000 were committed" in output.splitlines()[2]
    size = sum(path.stat().st_size for path in (four.path / "checkpoint-30").iterdir())
    assert table[3] == ["30", "5", "min", *format_bytes(size).split(), "interval", "2", "yes"]
    assert table[4][5:] == ["interval,", "best", "2", "yes"]
    assert table[5][1:3] == ["2", "h"]
    assert "a resume would take checkpoint-30, and put checkpoint-50, checkpoint-40 in quarantine first" in output
    assert everything(four.path) == before


def test_list_says_when_it_has_not_read_the_bytes_and_reads_them_when_asked(four):
    flip(four, 40)
    output, _ = ask("list", four)
    assert "take checkpoint-40, the newest (its bytes were not read; --digests reads them)" in output
    output, code = ask("list", four, "--digests")
    assert code == 0 and "NO: model.safetensors: is altered" in output
    assert output.endswith("a resume would take checkpoint-30, and put checkpoint-40 in quarantine first\n")


def test_what_list_foretells_is_what_a_resume_does_and_quarantine_is_shown_then(four):
    flip(four, 40)
    foretold = ask("list", four, "--digests")[0].splitlines()[-1]
    selected = select_checkpoint(four, Ledger(four.ledger, 2), verify="digests")
    assert foretold.startswith(f"a resume would take checkpoint-{selected.step}, and put checkpoint-40 in")
    output, _ = ask("list", four)
    assert "in quarantine: checkpoint-40-1, " in output and "checkpoint-40/model.safetensors: is altered" in output


def test_a_run_without_checkpoints_says_why(run):
    assert ask("list", run) == (f"{run.path}: holds no checkpoint, because none was committed yet. A resume would begin at step 0\n", 0)
    Ledger(run.ledger, 1).append("save_failed", step=8, error="[Errno 28] No space left on device")
    assert "yet; the last save failed, at step 8: [Errno 28] No space left on device. A resume" in ask("list", run)[0]
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        ask("verify", run)
    Ledger(run.ledger, 1).append("committed", step=9)
    assert "none of its checkpoints is left (committed were steps 9); a resume would stop with an error" in ask("list", run)[0]
    commit(run, 12)
    flip(run, 12)
    assert "none of its checkpoints is whole (committed were steps 9, 12); a resume would stop" in ask("list", run, "--digests")[0]


def test_a_checkpoint_that_a_training_retires_while_it_is_read_is_not_called_broken(four, monkeypatch):
    def check(step, path, verify, run):
        if step == 10 and path.exists():
            shutil.rmtree(path)
        return check_checkpoint(step, path, verify, run)

    monkeypatch.setattr("harness.cli.checkpoints.check_checkpoint", check)
    output, code = ask("verify", four)
    assert code == 0 and "checkpoint-10: was retired meanwhile" in output
    commit(four, 10)
    output, _ = ask("list", four)
    assert "NO" not in output and [line.split()[0] for line in output.splitlines()[1:4]] == ["40", "30", "20"]


@pytest.mark.parametrize("verb", ["list", "verify", "prune"])
def test_a_folder_that_is_no_run_is_named(tmp_path, verb):
    with pytest.raises(LaunchError, match=f"{tmp_path}: holds no run.json, so no run of harness began here"):
        ask(verb, RunDir(tmp_path))


def test_verify_reads_every_byte_and_fails_when_one_is_wrong(four):
    output, code = ask("verify", four)
    assert code == 0 and output.count(": whole, ") == 4
    flip(four, 20, "trainer_state.json")
    before = everything(four.path)
    output, code = ask("verify", four)
    assert code == 1 and "checkpoint-20: NOT WHOLE: trainer_state.json: is altered" in output
    assert output.count(": whole, ") == 3 and "1 of 4 not whole" in output
    assert ask("verify", four, "--step", "30")[1] == 0
    assert ask("verify", four, "--step", "20")[1] == 1
    with pytest.raises(CheckpointError, match="holds no checkpoint of step 5; it holds those of 40, 30, 20, 10"):
        ask("verify", four, "--step", "5")
    assert everything(four.path) == before


def test_prune_keeps_what_the_recipe_keeps_and_says_what_it_freed(four):
    commit(four, 50, best=20)
    expected = sum(path.stat().st_size for path in (four.path / "checkpoint-10").iterdir())
    foretold, _ = ask("prune", four, "--dry-run")
    assert steps(four) == [50, 40, 30, 20, 10] and f"would free {format_bytes(expected)}; nothing was deleted" in foretold
    output, code = ask("prune", four)
    assert code == 0 and f"freed {format_bytes(expected)}\n" in output
    assert steps(four) == [50, 40, 30, 20]  # the newest two, a multiple of 30, the best
    assert "checkpoint-20      " in output and "stays, the best" in output
    assert [event["step"] for event in read_ledger(four.ledger) if event["event"] == "retired"] == [10]


def test_prune_never_deletes_the_last_that_is_whole_by_every_byte(four):
    four.recipe.write_text(RECIPE)
    flip(four, 40)
    os.truncate(four.path / "checkpoint-30/model.safetensors", 5)
    output, _ = ask("prune", four, "--keep", "1")
    assert steps(four) == [40, 30, 20] and output.count("is not whole; a resume puts it in quarantine") == 2
    assert select_checkpoint(four, Ledger(four.ledger, 2), verify="digests").step == 20


def test_prune_deletes_nothing_when_nothing_is_whole(four):
    for step in steps(four):
        flip(four, step)
    before = everything(four.path)
    with pytest.raises(CheckpointError, match="no checkpoint is whole, so nothing is deleted"):
        ask("prune", four, "--keep", "1", "--quarantine")
    assert everything(four.path).keys() - before.keys() <= {str(four.path / ".lock")}


def test_prune_clears_what_killed_saves_left_and_quarantine_only_when_asked(four):
    for folder in (four.staging / "50-1-abc", four.retired / "checkpoint-1-1", four.quarantine / "checkpoint-2-1"):
        folder.mkdir(parents=True)
        (folder / "shard").write_bytes(bytes(100_000))
    output, _ = ask("prune", four, "--keep", "9")
    assert "freed 195 KiB" in output and not any(four.staging.iterdir()) and not any(four.retired.iterdir())
    assert (four.quarantine / "checkpoint-2-1/shard").is_file() and steps(four) == [40, 30, 20, 10]
    output, _ = ask("prune", four, "--keep", "9", "--quarantine")
    assert "freed 97.7 KiB" in output and not four.quarantine.exists()


def test_prune_of_a_run_without_checkpoints_says_so_and_clears_up(run):
    (run.staging / "4-1-abc").mkdir(parents=True)
    output, code = ask("prune", run)
    assert code == 0 and "holds no checkpoint" in output and not any(run.staging.iterdir())


def test_prune_names_what_could_not_be_deleted(four, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", refuse)
        with pytest.raises(CheckpointError, match=r"\.retired/checkpoint-10-1: cannot be deleted: .*Permission denied"):
            ask("prune", four)
        patch.setattr(os, "rename", lambda old, new: refuse(old))
        with pytest.raises(CheckpointError, match="checkpoint-20: could not be moved away; .*ledger.jsonl says why"):
            four.recipe.write_text(RECIPE)
            flip(four, 20, "trainer_state.json")
            commit(four, 60, best=60)
            ask("prune", four, "--keep", "1")


def test_prune_is_refused_while_another_process_runs_in_the_folder(four):
    """The one test in a process of its own: also the exit codes, and that the verb is among the others."""
    import fcntl

    with open(four.path / ".lock", "a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        done = harness("checkpoints", "prune", four.path, "--keep", "1")
        assert done.code == 2 and "LaunchError" in done.output and "another process is running in it" in done.output
        assert "Traceback" not in done.output
        assert harness("checkpoints", "prune", four.path, "--dry-run").code == 0
    assert steps(four) == [40, 30, 20, 10]
    flip(four, 40)
    assert harness("checkpoints", "verify", four.path).code == 1


def test_a_folder_that_cannot_be_locked_is_a_message(four):
    (four.path / ".lock").mkdir()
    with pytest.raises(LaunchError, match="cannot be written: Is a directory; nothing was deleted"):
        ask("prune", four)


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 KiB"), (1023 * 1024, "1.0 MiB"), (412 * 2**20, "412 MiB"), (2**40, "1024 GiB")],
)
def test_sizes_read_well(count, text):
    assert format_bytes(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(-3, "0 s"), (59, "59 s"), (119, "119 s"), (120, "2 min"), (7199, "120 min"), (7200, "2 h"), (259200, "3 d")]
)
def test_ages_read_well(seconds, text):
    assert format_age(seconds) == text
