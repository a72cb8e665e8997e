"""A run may be killed at any instant, on any rank: the next life begins from the newest checkpoint that was committed, leaves nothing of
the dead one behind, and the end is bit for bit that of a run which nobody killed.

The job makes five steps and commits each. POINTS are places in the third save and in what follows on it, in a resume, and in the export.
Where both ranks come to a place, each dies there once. To most places in a commit only rank 0 comes: then rank 1 dies while rank 0 is
there, and rank 0 goes on until it notices, as it does in the seconds that a launcher takes to end it.
"""

import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from deaths import LAST, Run, die_within_deletion, die_within_write, differences, interrupted_run, rank_1_dies_instead, whole_run
from fuzz import fuzz
from rig import die_at_call, die_in_phase

NOTICES_WITHIN_S = 20
"""How long a rank may go on alone. It ends by itself, in milliseconds, when it waits for the one that is gone."""

VOTE, GATHER = "harness.distributed:vote", "harness.distributed:gather_objects"
LEDGER = "harness.checkpoint.ledger:Ledger._write"
STEP = "harness.tasks.trainer:HarnessTrainer.training_step"
SAVE_OF_3 = 10
"""Calls of gather_objects in the two saves before; the third's are for: the folder, its errors, the writers' errors, the digests, the
commit's errors."""


@dataclass(frozen=True)
class Point:
    name: str
    fault: Callable[[int], str]
    """What kills a rank there."""
    newest: int
    """The checkpoint that the next life must begin from."""
    begins: str = "anew"
    """What the life that dies is: the first of its run (`anew`), one that goes on after a kill within the third save (`interrupted`), or
    one that finds its newest checkpoint altered (`altered`)."""
    only_main: Callable[[int], str] | None = None
    """Only rank 0 comes here; for rank 1: what stops rank 0 at the place, and ..."""
    newest_beside: int | None = None
    """... the checkpoint that the next life begins from when rank 0 has gone on from there alone."""
    ranks: tuple[int, ...] = (0, 1)


def each(name: str, fault: Callable[[int], str], newest: int, begins: str = "anew") -> Point:
    return Point(name, fault, newest, begins)


def main(
    name: str, fault: Callable[[int], str], newest: int, beside: int, begins: str = "anew", at: Callable[[int], str] | None = None
) -> Point:
    return Point(name, fault, newest, begins, at or fault, beside)


def phase(name: str, occurrence: int, *, before: bool = True) -> Callable[[int], str]:
    return lambda rank: die_in_phase(rank, name, occurrence, before=before)


def call(target: str, occurrence: int = 1, matching: str = "", *, before: bool = True) -> Callable[[int], str]:
    return lambda rank: die_at_call(rank, target, occurrence, before=before, matching=matching)


def half(target: str, committed: str, matching: str, occurrence: int = 1) -> Callable[[int], str]:
    """Half of a file is written; `committed` is its namesake in the checkpoint before."""
    return lambda rank: die_within_write(
        rank, target, f"size({{run!r}} + '/{committed.format(R=rank)}') // 2", occurrence, matching.format(R=rank)
    )


def half_a_line(occurrence: int, matching: str) -> Callable[[int], str]:
    return lambda rank: die_within_write(rank, LEDGER, "size(args[0].path) + len(args[1]) // 2", occurrence, matching)


SAVE = [
    each("the third step's gradients", call(STEP, 3), 2),
    each("before the vote of the third step", call(VOTE, 4), 2),
    each("after the vote of the third step", call(VOTE, 4, before=False), 2),
    each("staging", phase("saving: staging", 3), 2),
    main("the folder is made", call("harness.checkpoint.commit:check_space", 3), 2, 2),
    each("the folder is known", call(GATHER, SAVE_OF_3 + 1, before=False), 2),
    each("trainer state", phase("saving: trainer state", 3), 2),
    each("weights", phase("saving: weights", 3), 2),
    main(
        "half of the weights",
        half("peft.peft_model:safe_save_file", "checkpoint-2/adapter_model.safetensors", "checkpoint-3"),
        2,
        2,
        at=call("peft.peft_model:safe_save_file", 1, "checkpoint-3"),
    ),
    each("optimiser", phase("saving: optimiser", 3), 2),
    main(
        "half of the optimiser",
        half("torch:save", "checkpoint-2/optimizer.pt", "checkpoint-3/optimizer.pt"),
        2,
        2,
        at=call("torch:save", 1, "checkpoint-3/optimizer.pt"),
    ),
    each("random numbers", phase("saving: random numbers", 3), 2),
    each("half of the random numbers", half("torch:save", "checkpoint-2/rng_state_{R}.pth", "checkpoint-3/rng_state_{R}.pth"), 2),
    each("rank state", phase("saving: rank state", 3), 2),
    each("before the vote on what was written", call(GATHER, SAVE_OF_3 + 3), 2),
    each("hashing", phase("saving: hashing", 3), 2),
    each("between hash and manifest", call("harness.checkpoint.manifest:digest_files", 3, before=False), 2),
    main("manifest", phase("saving: manifest", 3), 2, 3),
    main(
        "half of the manifest",
        half("harness.run:write_text_atomically", "checkpoint-2/manifest.json", "checkpoint-3/manifest.json"),
        2,
        3,
        at=call("harness.run:write_text_atomically", 1, "checkpoint-3/manifest.json"),
    ),
    main("before the manifest has its name", call("os:replace", 1, "checkpoint-3/.manifest.json"), 2, 3),
    main("after the manifest has its name", call("os:replace", 1, "checkpoint-3/.manifest.json", before=False), 2, 3),
    main("rename", phase("saving: rename", 3), 2, 3),
    main("before the rename", call("os:rename", 3, ".staging"), 2, 3),
    main("after the rename", call("os:rename", 3, ".staging", before=False), 3, 3),
    main("flushing the run folder", phase("saving: flushing the run folder", 3), 3, 3),
    main("before the empty folder in .staging goes", call("shutil:rmtree", 3, ".staging"), 3, 3),
    main("before the vote on the commit", call(GATHER, SAVE_OF_3 + 5), 3, 3),
    each("after the vote on the commit", call(GATHER, SAVE_OF_3 + 5, before=False), 3),
    main("before the ledger tells of the commit", call(LEDGER, 3, '"committed"'), 3, 3),
    main("half of the line that tells of the commit", half_a_line(3, '"committed"'), 3, 3, at=call(LEDGER, 3, '"committed"')),
    main("after the ledger tells of the commit", call(LEDGER, 3, '"committed"', before=False), 3, 3),
    main("retention", phase("saving: retention", 3), 3, 3),
    main("before the oldest is retired", call("os:rename", 1, ".retired"), 3, 3),
    main("after the oldest is retired", call("os:rename", 1, ".retired", before=False), 3, 3),
    main("within the deletion", lambda rank: die_within_deletion(rank, ".retired", 4), 3, 3),
    main("after the deletion", call("shutil:rmtree", 1, ".retired", before=False), 3, 3),
]
RESUME = [
    each("joining", phase("joining the other ranks", 1), 2, "interrupted"),
    each("opening the run folder", phase("opening the run folder", 1, before=False), 2, "interrupted"),
    main("within the deletion of what the dead life left", lambda rank: die_within_deletion(rank, ".staging", 2), 2, 2, "interrupted"),
    main("verifying", phase("verifying checkpoint-2", 1, before=False), 2, 2, "interrupted"),
    main("within the verification", call("harness.checkpoint.manifest:_digest_file", 3), 2, 2, "interrupted"),
    main("before the quarantine", call("os:rename", 1, ".quarantine"), 1, 1, "altered"),
    main("after the quarantine, before the ledger tells of it", call("os:rename", 1, ".quarantine", before=False), 1, 1, "altered"),
    each("loading model", phase("loading model", 1), 2, "interrupted"),
    main("half of the line that tells of the life", half_a_line(1, "life_began"), 2, 2, "interrupted", at=call(LEDGER, 1, "life_began")),
    each("loading weights", phase("resuming: loading weights", 1), 2, "interrupted"),
    each("loading the optimiser", phase("resuming: loading the optimiser", 1), 2, "interrupted"),
    each("restoring random numbers", call("transformers:Trainer._load_rng_state", 1, before=False), 2, "interrupted"),
    each("comparing", phase("resuming: comparing", 1), 2, "interrupted"),
    each("the first step after a resume", call(STEP, 1), 2, "interrupted"),
]
END = [
    main("before the last retention", phase("saving: retention", LAST), LAST, LAST),
    Point("before the run is done", call("harness.run:write_outcome"), LAST, ranks=(0,)),
    each("exporting", phase("exporting", 1), LAST),
    main("before the export has its name", call("os:rename", 1, "final.incomplete"), LAST, LAST),
    main("after the export has its name", call("os:rename", 1, "final.incomplete", before=False), LAST, LAST),
    # Where rank 1 dies there, rank 0 completes the run.
    Point("half of the line that tells of the end", half_a_line(1, '"finished"'), LAST, ranks=(0,)),
]
POINTS = {"ddp": [*SAVE, *RESUME, *END]}
SHARED = {"optimiser", "hashing", "before the rename", "after the rename", "within the deletion", "within the verification"}
POINTS["zero2"] = [
    *(point for point in POINTS["ddp"] if point.name in SHARED),
    each(
        "half of its shard",
        half("torch:save", "checkpoint-2/global_step2/zero_pp_rank_{R}_mp_rank_00_optim_states.pt", "/zero_pp_rank_{R}", 3),
        2,
    ),
    each("loading DeepSpeed's shards", phase("resuming: loading DeepSpeed's shards", 1), 2, "interrupted"),
]
QUICK = {"half of the optimiser", "before the rename", "after the rename"}
CASES = [
    pytest.param(
        backend,
        point,
        rank,
        id=f"{backend}-{point.name}-rank {rank}",
        marks=[] if backend == "ddp" and point.name in QUICK else pytest.mark.slow,
    )
    for backend, points in POINTS.items()
    for point in points
    for rank in point.ranks
]


def die(run: Run, point: Point, rank: int) -> None:
    """One life, in which this rank is killed at the point."""
    instead = rank == 1 and point.only_main is not None
    fault = point.only_main(0) + rank_1_dies_instead() if instead else point.fault(rank)
    life = run.live(fault.replace("{run!r}", repr(str(run.path))), grace_s=NOTICES_WITHIN_S if instead else 0)
    assert life.codes[rank] in (-signal.SIGKILL, -signal.SIGXFSZ), (life.codes, life.output(0), life.output(1))
    # A rank that goes on alone finds that the other is gone, and says so by itself.
    # At the end it may have been through.
    others = {1} if instead else {-signal.SIGKILL, 0} if point in END else {-signal.SIGKILL}
    assert life.codes[1 - rank] in others, (life.codes, life.output(0))


def begin(backend: str, point: Point, path: Path) -> Run:
    """What the life that is to die continues."""
    if point.begins == "anew":
        return whole_run(backend).beside(path)
    run = interrupted_run(backend).copy(path)
    if point.begins == "altered":
        (path / "checkpoint-2" / "trainer_state.json").write_text("{}")
    return run


@pytest.mark.parametrize(("backend", "point", "rank"), CASES)
def test_a_rank_may_be_killed(backend, point, rank, tmp_path):
    run = begin(backend, point, tmp_path / "run")
    die(run, point, rank)
    run.finish()
    expected = point.newest_beside if rank == 1 and point.only_main else point.newest
    assert run.resumed_from() == expected
    assert differences(run, whole_run(backend)) == []


@pytest.mark.slow
@pytest.mark.parametrize("backend", POINTS)
def test_resumes_may_be_killed_one_after_another(backend, tmp_path):
    run = interrupted_run(backend).copy(tmp_path / "run")
    points = {point.name: point for point in POINTS[backend]}
    for name, rank in (("within the verification", 0), ("loading DeepSpeed's shards" if backend == "zero2" else "loading weights", 1)):
        die(run, points[name], rank)
    run.finish()
    assert run.resumed_from() == 2
    assert differences(run, whole_run(backend)) == []


@pytest.mark.slow
def test_a_rank_may_be_killed_at_any_time(tmp_path):
    """`make faults` plays many more rounds than this."""
    result = fuzz(rounds=6, seed=1, work=tmp_path)
    assert result["failures"] == [] and result["deaths"] > 3
