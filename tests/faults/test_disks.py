"""A disk that is full, read-only or fails ends no training: the save is given up on every rank, the ledger says why, the last checkpoint
stands, the next save works when the disk does, and the weights at the end are those of a run whose disk never failed.

Errors are raised in the calls that would meet them, and met for real where no privilege is needed for it: a limit on a file's size fails
a write in its middle, as a full disk does. Where this process may mount, disks that are really full and read-only as well.
"""

import functools
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from deaths import LAST, differences, interrupted_run, whole_run
from rig import Refused

STEPS = list(range(1, LAST + 1))
BAD = 3
"""The step at which the disk fails."""


# ---- faults


def fail(rank: int, target: str, error: str, matching: str = "", skip: int = 0, times: int = 1) -> str:
    """Calls of "module:name" raise an OSError in this rank: of those in whose arguments' repr, or in the path (a $ at its end) of whose
    descriptor, the text stands, `times` after the first `skip`."""
    return f"""
if RANK == {rank}:
    import errno
    def around(function, seen=[0]):
        def called(*args, **kwargs):
            file = os.readlink(f"/proc/self/fd/{{args[0]}}") if args and type(args[0]) is int else ""
            if {matching!r} in repr((args, kwargs)) + file + "$":
                seen[0] += 1
                if {skip} < seen[0] <= {skip + times}:
                    raise OSError(errno.{error}, os.strerror(errno.{error}), file or str(args[0]))
            return function(*args, **kwargs)
        return called
    wrap({target!r}, around)
"""


def within_save(rank: int, begin: str, end: str) -> str:
    """In this rank the save of step BAD happens between these two pieces of Python; `begin` comes behind the look at the free space."""
    return f"""
if RANK == {rank}:
    def around(write):
        def called(trainer, model, trial, folder):
            if trainer.state.global_step == {BAD}:
                {begin}
            return write(trainer, model, trial, folder)
        return called
    wrap("harness.tasks.saving:SavingTrainer._write", around)
    def around(commit):
        def called(committer, step, *args):
            kept = commit(committer, step, *args)
            if step == {BAD}:
                {end}
            return kept
        return called
    wrap("harness.checkpoint.commit:Committer.commit", around)
"""


def limit_files(rank: int, size: int) -> str:
    """No file grows over `size` bytes while step BAD is saved."""
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({}, resource.RLIM_INFINITY))"
    return within_save(rank, limit.format(size), limit.format("resource.RLIM_INFINITY"))


ADAPTER, SHARD = "peft.peft_model:safe_save_file", f"global_step{BAD}/zero_pp_rank_1_"
TEXT = "harness.run:write_text_atomically"
FAILURES = {
    # name: (backend, rank, fault, what is said of it)
    "no room for the weights": ("ddp", 0, fail(0, ADAPTER, "ENOSPC", "checkpoint-3"), "No space left"),
    "no room for the optimiser": ("ddp", 0, fail(0, "torch:save", "ENOSPC", "checkpoint-3/optimizer.pt"), "No space left"),
    "no room for rank 1's random numbers": ("ddp", 1, fail(1, "torch:save", "EDQUOT", "checkpoint-3/rng_state_1"), "quota exceeded"),
    "no room for rank 1's state": ("ddp", 1, fail(1, TEXT, "ENOSPC", "checkpoint-3/harness_rank_1"), "No space left"),
    "a flush fails": ("ddp", 0, fail(0, "os:fsync", "EIO", "checkpoint-3/adapter_model.safetensors"), "Input/output error"),
    "a flush fails on rank 1": ("ddp", 1, fail(1, "os:fsync", "ENOSPC", "checkpoint-3/rng_state_1.pth"), "No space left"),
    "no room for the manifest": ("ddp", 0, fail(0, TEXT, "ENOSPC", "checkpoint-3/manifest.json"), "No space left"),
    "the rename fails": ("ddp", 0, fail(0, "os:rename", "EIO", "checkpoint-3"), "Input/output error"),
    "no folder can be made": ("ddp", 0, fail(0, "pathlib:Path.mkdir", "EROFS", ".staging/3"), "Read-only file system"),
    "a write ends in the middle": ("ddp", 0, limit_files(0, 20_000), "File too large"),
    "a write ends in the middle on rank 1": ("ddp", 1, limit_files(1, 4_000), f"checkpoint-{BAD}; "),
    "no room for rank 1's shard": ("zero2", 1, fail(1, "torch:save", "ENOSPC", SHARD), "No space left"),
    "a write of rank 1's shard ends in the middle": ("zero2", 1, limit_files(1, 100_000), f"checkpoint-{BAD}; "),
    "no room for rank 0's shard": ("zero2", 0, fail(0, "torch:save", "ENOSPC", SHARD.replace("rank_1", "rank_0")), "No space left"),
}
QUICK = ("no room for the weights", "a write ends in the middle on rank 1", "no room for rank 1's shard")


@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in FAILURES])
def test_a_save_that_fails_is_given_up_and_the_training_goes_on(name, tmp_path):
    backend, rank, fault, why = FAILURES[name]
    check_one_save_failed(whole_run(backend).beside(tmp_path / "run"), backend, rank, fault, why)


def check_one_save_failed(run, backend, rank, fault, why) -> None:
    life = run.live(fault)
    assert life.wait() == [0, 0], life.output(0) + life.output(1)
    assert [event["step"] for event in run.events("committed")] == [step for step in STEPS if step != BAD]
    [failed] = run.events("save_failed")
    assert (failed["step"], failed["rank"]) == (BAD, rank)
    assert why in failed["error"]
    warning = f"warning: no checkpoint at step {BAD}: rank {rank}: {failed['error']}; checkpoint-{BAD - 1} stands"
    assert warning in life.output(0)
    assert differences(run, whole_run(backend)) == []


def test_a_life_that_dies_after_a_failed_save_is_continued_from_the_last_good_one(tmp_path):
    run = whole_run("ddp").beside(tmp_path / "run")
    run.live(FAILURES["no room for the weights"][2] + "kill_in_phase('saving: staging', 4, True)\n")
    run.finish()
    assert run.resumed_from() == 2
    assert differences(run, whole_run("ddp")) == []


def test_a_save_is_not_begun_where_there_is_no_room_for_it(tmp_path):
    """As large as the last one, and a tenth."""
    run = whole_run("ddp").beside(tmp_path / "run")
    fault = """
if RANK == 0:
    import shutil, types
    looks = [0]
    def disk_usage(path):
        looks[0] += 1
        return types.SimpleNamespace(free=int(1.05 * committed(path)) if looks[0] == 3 else 10**12)
    def committed(path):
        return json.loads((Path(path) / "ledger.jsonl").read_text().splitlines()[-1])["bytes"]
    shutil.disk_usage = disk_usage
"""
    check_one_save_failed(run, "ddp", 0, fault, "MiB are free and a checkpoint takes about")


def test_a_commit_whose_name_may_not_be_on_the_disk_does_not_count_and_does_not_stand_in_the_way(tmp_path):
    """The rename is made, and the flush of the run folder fails: the fourth, after those for the new ledger and two commits."""
    run = whole_run("ddp").beside(tmp_path / "run")
    check_one_save_failed(run, "ddp", 0, fail(0, "os:fsync", "EIO", "/run$", skip=3), "Input/output error")


def test_a_checkpoint_that_cannot_be_deleted_stays_until_it_can(tmp_path):
    run = whole_run("ddp").beside(tmp_path / "run")
    life = run.live(fail(0, "os:rename", "EIO", ".retired"))
    assert life.wait() == [0, 0], life.output(0)
    assert [(event["event"], event["step"]) for event in run.events() if event["event"].startswith("retire")] == [
        ("retire_failed", 1),
        ("retired", 1),
        ("retired", 2),
        ("retired", 3),
    ]
    assert differences(run, whole_run("ddp")) == []


def test_a_ledger_that_cannot_be_written_for_a_while_tells_everything_afterwards(tmp_path):
    run = whole_run("ddp").beside(tmp_path / "run")
    # The line of the third commit, and the one on what is retired then.
    life = run.live(fail(0, "os:fsync", "ENOSPC", "ledger.jsonl", skip=3, times=2))
    assert life.wait() == [0, 0], life.output(0)
    assert [event["step"] for event in run.events("committed")] == STEPS
    times = [event["time"] for event in run.events()]
    assert times == sorted(times)
    assert differences(run, whole_run("ddp")) == []


def test_a_disk_on_which_no_save_works_costs_the_checkpoints_and_nothing_else(tmp_path):
    run = whole_run("ddp").beside(tmp_path / "run")
    check_none_is_saved(run, run.live(fail(0, "pathlib:Path.mkdir", "EROFS", ".staging/", times=99)))


def check_none_is_saved(run, life) -> None:
    assert life.wait() == [0, 0], life.output(0)
    assert [event["step"] for event in run.events("save_failed")] == STEPS
    assert all("Read-only file system" in event["error"] for event in run.events("save_failed"))
    assert run.events("committed") == [] and "there is none yet" in life.output(0)
    assert run.exported() == whole_run("ddp").exported() and run.logged() == whole_run("ddp").logged()
    assert [record["step"] for record in life.records("steps", 1)] == STEPS


# ---- real disks, where a process may mount them


@functools.cache
def may_mount() -> bool:
    with tempfile.TemporaryDirectory() as folder:
        try:
            with mounted(Path(folder), "size=1m"):
                return True
        except (OSError, subprocess.CalledProcessError):
            return False


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[None]:
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], check=True, capture_output=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True, capture_output=True)


if may_mount():

    @pytest.mark.parametrize("backend", ["ddp", pytest.param("zero2", marks=pytest.mark.slow)])
    def test_a_disk_that_fills_up_while_a_checkpoint_is_written(backend, tmp_path):
        disk, ballast = tmp_path / "disk", tmp_path / "disk" / "ballast"
        disk.mkdir()
        with mounted(disk, "size=40m"):
            fill = f"subprocess.run(['dd', 'if=/dev/zero', 'of={ballast}', 'bs=4k'], capture_output=True)"
            run = whole_run(backend).beside(disk / "run")
            check_one_save_failed(
                run,
                backend,
                0,
                within_save(0, fill, f"os.unlink({str(ballast)!r})"),
                "No space left",
            )

    def test_a_folder_that_is_read_only(tmp_path):
        run = whole_run("ddp").beside(tmp_path / "run")
        staging = run.path / ".staging"
        staging.mkdir(parents=True)
        with mounted(staging, "ro"):
            check_none_is_saved(run, run.live())

    def test_a_run_folder_that_is_read_only_is_refused_before_any_rank_starts(tmp_path):
        run = interrupted_run("ddp").copy(tmp_path / "run")
        subprocess.run(["mount", "--bind", run.path, run.path], check=True)
        try:
            subprocess.run(["mount", "-o", "remount,ro,bind", run.path], check=True)
            with pytest.raises(Refused, match="LaunchError: .*Read-only file system"):
                run.start()
        finally:
            subprocess.run(["umount", "--lazy", run.path], check=True)
