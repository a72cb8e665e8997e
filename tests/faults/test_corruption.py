"""Whatever is wrong with a checkpoint is found before a run continues from it: every file of real ones, damaged in every way."""

import os
import shutil
import time
from pathlib import Path

import pytest
from deaths import LAST, differences, interrupted_run, whole_run
from rig import die_at_call

from harness.checkpoint.ledger import Ledger, read_ledger
from harness.checkpoint.manifest import MANIFEST, check_files, digest_files, read_manifest, write_manifest
from harness.checkpoint.selection import select_checkpoint
from harness.errors import CheckpointError
from harness.run import RunDir

BACKENDS = ["ddp", "zero2"]


# ---- the damages


def flip(file: Path) -> None:
    """One bit, in the middle."""
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def cut(file: Path) -> None:
    """The last byte is gone."""
    os.truncate(file, file.stat().st_size - 1)


def zero(file: Path) -> None:
    """A disk that has lost a file's blocks, but not its size."""
    file.write_bytes(bytes(file.stat().st_size))


DAMAGES = [flip, cut, zero, Path.unlink]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_damage_to_each_file_is_found_and_the_checkpoint_before_is_taken(backend, tmp_path):
    source, tried = whole_run(backend), 0
    files = sorted(contents(source.path / f"checkpoint-{LAST}"))
    # A checkpoint's every part: who adds a file to one adds it to this test.
    assert {MANIFEST, "scheduler.pt", "trainer_state.json", "rng_state_0.pth", "rng_state_1.pth", "harness_rank_1.json"} < set(files)
    for damage in DAMAGES:
        for name in files:
            run = RunDir(tmp_path / f"{damage.__name__}-{tried}")
            for step in (LAST, LAST - 1):
                shutil.copytree(source.path / f"checkpoint-{step}", run.path / f"checkpoint-{step}")
            shutil.copy(source.path / "ledger.jsonl", run.ledger)
            folder = run.path / f"checkpoint-{LAST}"
            damage(folder / name)
            damaged = contents(folder)
            selected = select_checkpoint(run, Ledger(run.ledger, 2), verify="digests")
            tried += 1
            assert selected.step == LAST - 1, f"{damage.__name__} {name} was not found"
            event = read_ledger(run.ledger)[-1]
            assert (event["event"], event["step"], event["moved_to"]) == ("quarantined", LAST, f".quarantine/checkpoint-{LAST}-1")
            assert name in event["reason"]
            assert contents(run.quarantine / f"checkpoint-{LAST}-1") == damaged
            shutil.rmtree(run.path)
    assert tried == len(DAMAGES) * len(files) > 50


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_run_goes_on_from_the_checkpoint_before_the_altered_one_and_ends_the_same(backend, tmp_path):
    run = interrupted_run(backend).copy(tmp_path / "run")
    altered = {"ddp": "optimizer.pt", "zero2": SHARD}[backend]
    flip(run.path / "checkpoint-2" / altered)
    life = run.finish()
    assert run.resumed_from() == 1
    assert "continues from checkpoint-1" in life.output(0)
    assert altered in run.events("quarantined")[0]["reason"]
    assert differences(run, whole_run(backend)) == []


def test_a_run_whose_checkpoints_are_all_altered_refuses_to_begin_again_and_keeps_them(tmp_path):
    run = interrupted_run("ddp").copy(tmp_path / "run")
    for step in (1, 2):
        flip(run.path / f"checkpoint-{step}" / "adapter_model.safetensors")
    damaged = [contents(run.path / f"checkpoint-{step}") for step in (1, 2)]
    # However often it is started.
    for _ in range(2):
        life = run.live()
        assert life.wait() == [1, 1]
        said = life.output(0)
        assert "CheckpointError" in said and "none that is whole is left" in said and "--fresh" in said
        assert [contents(run.path / ".quarantine" / f"checkpoint-{step}-1") for step in (1, 2)] == damaged
    assert not life.records("steps", 0)


def test_the_clock_on_a_checkpoint_decides_neither_what_is_taken_nor_what_stays(tmp_path):
    run = interrupted_run("ddp").copy(tmp_path / "run")
    for step, moment in ((1, time.time() + 3600), (2, 0)):
        for entry in (run.path / f"checkpoint-{step}", *(run.path / f"checkpoint-{step}").rglob("*")):
            os.utime(entry, (moment, moment))
    run.finish()
    assert run.resumed_from() == 2
    assert [event["step"] for event in run.events("retired")] == [1, 2, 3]
    assert differences(run, whole_run("ddp")) == []


# ---- what a checkpoint could be besides altered

SAVE_WITH_DCP = """
import harness.rank

def save(argv):
    import torch
    import torch.distributed.checkpoint

    torch.distributed.init_process_group("gloo")
    torch.distributed.checkpoint.save({{f"rank {{RANK}}": torch.full((1000,), {step})}}, checkpoint_id={folder!r})
    torch.distributed.destroy_process_group()

harness.rank.main = save
"""


def test_a_save_over_an_old_one_that_lost_a_rank_loads_as_a_mixture_without_an_error_and_is_found(tmp_path):
    """torch.distributed.checkpoint, which harness does not write with: why the digests of all ranks' files stand in one manifest."""
    import torch
    from torch.distributed import checkpoint

    run, folder = interrupted_run("ddp").copy(tmp_path / "run"), tmp_path / "saved"
    assert run.live(SAVE_WITH_DCP.format(step=1.0, folder=str(folder))).wait() == [0, 0]
    files = sorted(contents(folder))
    assert files == [".metadata", "__0_0.distcp", "__1_0.distcp"]
    write_manifest(folder, {"step": 1, "files": digest_files(folder, files, durable=False)})
    check_files(folder, read_manifest(folder), digests=True)

    dies = die_at_call(1, "torch.distributed.checkpoint.filesystem:_FileSystemWriter.write_data")
    assert run.live(SAVE_WITH_DCP.format(step=2.0, folder=str(folder)) + dies, grace_s=20).wait()[1] == -9
    loaded = {f"rank {rank}": torch.zeros(1000) for rank in (0, 1)}
    checkpoint.load(loaded, checkpoint_id=str(folder))
    assert [set(tensor.tolist()) for tensor in loaded.values()] == [{2.0}, {1.0}]

    check_files(folder, read_manifest(folder), digests=False)
    with pytest.raises(CheckpointError, match="__0_0.distcp: is altered"):
        check_files(folder, read_manifest(folder), digests=True)


class Planted:
    """What a pickle can do to whoever loads it."""

    def __init__(self, mark: Path):
        self._mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self._mark),)


def plant(folder: Path, name: str, mark: Path) -> None:
    """Put it in the place of a file, and into the manifest, which is proof against accidents alone."""
    import torch

    torch.save({"state": Planted(mark)}, folder / name)
    manifest = read_manifest(folder)
    write_manifest(folder, {**manifest, "files": digest_files(folder, [entry["path"] for entry in manifest["files"]], durable=False)})


SHARD = "global_step2/zero_pp_rank_1_mp_rank_00_optim_states.pt"
PLACES = [("ddp", "optimizer.pt"), ("ddp", "scheduler.pt"), ("ddp", "rng_state_1.pth"), ("zero2", SHARD), ("zero2", "rng_state_1.pth")]


@pytest.mark.parametrize(("backend", "name"), PLACES)
def test_a_pickle_that_somebody_planted_does_not_run_even_with_a_digest_of_its_own(backend, name, tmp_path):
    import torch

    run, mark = interrupted_run(backend).copy(tmp_path / "run"), tmp_path / "ran"
    plant(run.path / "checkpoint-2", name, mark)
    life = run.live(grace_s=5)
    assert set(life.codes.values()) == {1}
    assert not mark.exists() and not life.records("steps", 0) and not life.records("steps", 1)
    said = life.output(0) + life.output(1)
    assert "posix.mkdir" in said
    assert Path(name).name in said
    # It would have run.
    torch.load(run.path / "checkpoint-2" / name, weights_only=False)
    assert mark.exists()
