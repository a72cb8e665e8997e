"""A run continues from its newest checkpoint that is whole: everything else is named, kept aside, and never continued from."""

import errno
import os
import shutil

import pytest

from harness.checkpoint.ledger import Ledger, read_ledger
from harness.checkpoint.manifest import MANIFEST, digest_files, write_manifest
from harness.checkpoint.selection import checkpoints, quarantined, select_checkpoint
from harness.errors import CheckpointError
from harness.run import RunDir

FILES = {
    "adapter_model.safetensors": b"weights" * 30,
    "optimizer.pt": b"moments" * 60,
    "trainer_state.json": b'{"global_step": 0}',
    "global_step/zero_pp_rank_0_mp_rank_00_optim_states.pt": b"shard" * 20,
    "README.md": b"",
}


def commit(run, ledger, step):
    folder = run.path / f"checkpoint-{step}"
    for path, data in FILES.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    write_manifest(folder, {"step": step, "files": digest_files(folder, FILES, durable=False)})
    ledger.append("committed", step=step, reason="interval")
    return folder


@pytest.fixture
def run(tmp_path):
    return RunDir(tmp_path)


@pytest.fixture
def ledger(run):
    return Ledger(run.ledger, 2)


@pytest.fixture
def three(run, ledger):
    """Checkpoints of steps 2, 9 and 10: ten is above nine by number and below it by letter."""
    return {step: commit(run, ledger, step) for step in (9, 10, 2)}


def select(run, ledger, verify="digests", **options):
    return select_checkpoint(run, ledger, verify=verify, **options)


def flip(file):
    data = file.read_bytes()
    file.write_bytes(bytes([data[0] ^ 1]) + data[1:])


def zero(file):
    file.write_bytes(bytes(file.stat().st_size))


def cut(file):
    os.truncate(file, file.stat().st_size // 2)


def test_the_newest_is_the_one_of_the_highest_step_whatever_the_clock_says(run, ledger, three):
    os.utime(three[2])
    os.utime(three[10], (0, 0))
    assert [step for step, _ in checkpoints(run.path)] == [10, 9, 2]
    selected = select(run, ledger)
    assert (selected.step, selected.path, selected.manifest["step"]) == (10, three[10], 10)
    assert not run.quarantine.exists()


# An empty file can only go.
DAMAGES = [(damage, file) for damage in (flip, cut, zero, os.unlink) for file in [*FILES, MANIFEST] if FILES.get(file) != b""]
DAMAGES.append((os.unlink, "README.md"))


@pytest.mark.parametrize(("damage", "file"), DAMAGES)
def test_whatever_is_done_to_any_file_is_found_and_the_checkpoint_before_taken(run, ledger, three, damage, file):
    damage(three[10] / file)
    assert select(run, ledger).step == 9
    [event] = [event for event in read_ledger(run.ledger) if event["event"] == "quarantined"]
    assert event["step"] == 10 and event["moved_to"] == ".quarantine/checkpoint-10-1"
    assert file in event["reason"] or file == MANIFEST
    assert [step for step, _ in checkpoints(run.path)] == [9, 2]
    assert quarantined(run) == [(run.quarantine / "checkpoint-10-1", event["reason"])]


def test_sizes_alone_are_blind_to_a_flipped_bit_and_to_nothing_else(run, ledger, three):
    flip(three[10] / "optimizer.pt")
    assert select(run, ledger, "sizes").step == 10
    cut(three[10] / "optimizer.pt")
    assert select(run, ledger, "sizes").step == 9


def test_a_folder_that_was_never_committed_is_not_continued_from(run, ledger, three):
    """Any other tool's checkpoint, or an empty folder, which transformers takes for the newest and then crashes on."""
    (run.path / "checkpoint-11").mkdir()
    shutil.copytree(three[10], run.path / "checkpoint-12", ignore=shutil.ignore_patterns(MANIFEST))
    shutil.copytree(three[10], run.path / "checkpoint-13")
    assert select(run, ledger).step == 10
    reasons = {event["step"]: event["reason"] for event in read_ledger(run.ledger) if event["event"] == "quarantined"}
    assert "has no manifest.json" in reasons[11] and "has no manifest.json" in reasons[12]
    assert "is of step 10; a folder of step 13 was copied over or renamed" in reasons[13]


def test_links_files_and_odd_names_are_left_alone(run, ledger, three):
    (run.path / "checkpoint-99").symlink_to(three[2])
    (run.path / "checkpoint-98").write_text("")
    for name in ("checkpoint-best", "checkpoint-", "checkpoint-011", "checkpoint-11.old", "checkpoint--1", "xcheckpoint-50"):
        (run.path / name).mkdir()
    before = sorted(run.path.iterdir())
    assert select(run, ledger).step == 10
    assert sorted(run.path.iterdir()) == before


def test_quarantine_never_overwrites_what_lies_there(run, ledger):
    for number in (1, 2, 3):
        commit(run, ledger, 4)
        commit(run, ledger, 8)
        (run.path / "checkpoint-8/optimizer.pt").write_text(f"broken {number}")
        assert select(run, ledger).step == 4
    assert [(run.quarantine / f"checkpoint-8-{number}/optimizer.pt").read_text() for number in (1, 2, 3)] == [
        "broken 1",
        "broken 2",
        "broken 3",
    ]


def test_a_run_that_never_committed_begins_at_zero(run, ledger):
    ledger.append("life_began", world_size=1)
    ledger.append("save_failed", step=4, error="No space left on device")
    assert select(run, ledger) is None


def test_when_none_is_whole_the_run_stops_and_names_each_and_the_way_out_every_time(run, ledger, three):
    flip(three[10] / "optimizer.pt")
    cut(three[9] / "trainer_state.json")
    (three[2] / MANIFEST).unlink()
    reasons = {10: "optimizer.pt: is altered", 9: "trainer_state.json: has 9 bytes; 18 were committed", 2: "has no manifest.json"}
    for _ in range(2):
        with pytest.raises(CheckpointError) as caught:
            select(run, ledger)
        text = str(caught.value)
        assert "committed: steps 2, 9, 10" in text and "--fresh" in text
        for step, why in reasons.items():
            assert any(f"checkpoint-{step}-1: " in line and why in line for line in text.splitlines()), text


def test_checkpoints_that_were_all_deleted_are_missed(run, ledger, three):
    for folder in three.values():
        shutil.rmtree(folder)
    with pytest.raises(CheckpointError, match="committed: steps 2, 9, 10\n  all were deleted or moved away"):
        select(run, ledger)


def test_a_torn_folder_counts_as_a_commit_also_without_a_ledger(run, ledger):
    (run.path / "checkpoint-4").mkdir()
    for _ in range(2):
        with pytest.raises(CheckpointError, match="checkpoint-4-1: .*has no manifest.json"):
            select(run, ledger)
    run.ledger.unlink()
    with pytest.raises(CheckpointError, match="checkpoint-4-1: the ledger does not say why"):
        select(run, ledger)


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_what_cannot_be_moved_away_stops_the_run_with_both_reasons(run, ledger, three, monkeypatch, number):
    cut(three[10] / "optimizer.pt")

    def refuse(old, new):
        raise OSError(number, os.strerror(number), old)

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(
        CheckpointError, match=f"(?s)has 210 bytes; 420 were.*cannot be moved to .*{os.strerror(number)}; make the run folder"
    ):
        select(run, ledger)
    assert [step for step, _ in checkpoints(run.path)] == [10, 9, 2]


def test_a_checkpoint_that_may_not_be_read_is_kept_aside_and_the_one_before_taken(run, ledger, three, monkeypatch):
    really_open = open

    def refuse(path, *arguments, **options):
        if str(path).endswith("checkpoint-10/optimizer.pt"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return really_open(path, *arguments, **options)

    # Root, as whom tests may run, can read what chmod forbids.
    monkeypatch.setattr("builtins.open", refuse)
    assert select(run, ledger).step == 9
    monkeypatch.undo()
    assert "optimizer.pt: cannot be read: Permission denied" in quarantined(run)[0][1]
    assert (run.quarantine / "checkpoint-10-1/optimizer.pt").read_bytes() == FILES["optimizer.pt"]


def test_a_sign_of_life_comes_before_each_folder_is_read(run, ledger, three):
    flip(three[10] / "optimizer.pt")
    said = []
    select(run, ledger, on_progress=lambda text: said.append((text, len(checkpoints(run.path)))))
    assert said == [("verifying checkpoint-10", 3), ("verifying checkpoint-9", 2)]


def test_a_move_to_quarantine_is_on_the_disk_before_the_ledger_tells_of_it(run, ledger, three, monkeypatch):
    flip(three[10] / "optimizer.pt")
    flushed, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (flushed.append(os.readlink(f"/proc/self/fd/{descriptor}")), fsync(descriptor)))
    select(run, ledger)
    assert flushed == [str(run.quarantine), str(run.path), str(run.ledger)]
