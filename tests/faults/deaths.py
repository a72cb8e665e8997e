"""Runs that die, held bit for bit against one that does not.

`Run` is a run of jobs.py and what its lives have recorded; `differences` says in what it is not the reference. A step that was lost and
made again counts both times: it must have been the same. `whole_run` and `interrupted_run` are made once for all tests, which copy them.
"""

import functools
import json
import re
import shutil
from pathlib import Path

from jobs import LORA, write_job
from rig import Life, Rig, die_in_phase, record_samples, record_steps, shared_rig

from harness.checkpoint.ledger import read_ledger
from harness.checkpoint.selection import check_checkpoint, checkpoints
from harness.run import RunDir

JOBS = {"ddp": LORA, "zero2": ""}
"""What is trained under each backend: an adapter, all weights."""
LAST = 5
EACH_STEP = ("checkpoint.every_steps=1", "checkpoint.keep=2")
MEASURED = re.compile(r"(speed|memory|run)/|time$|replays$|.*runtime_s$|.*_per_s$")
"""Logged values that no two lives have alike."""


class Run:
    """One run, life by life."""

    def __init__(self, rig: Rig, recipe: Path, path: Path, *overrides: str, backend: str = "ddp"):
        self.rig, self.recipe, self.path, self.backend = rig, recipe, path, backend
        self.overrides = (*EACH_STEP, *overrides)
        self.lives: list[Life] = []

    @classmethod
    def of_job(cls, rig: Rig, folder: Path, *overrides: str, backend: str = "ddp") -> "Run":
        """The first run of a new job, in `folder`."""
        return cls(rig, write_job(folder, JOBS[backend]), folder / "run", *overrides, backend=backend)

    def beside(self, path: Path, *overrides: str) -> "Run":
        """Another run of the same job."""
        run = Run(self.rig, self.recipe, path, backend=self.backend)
        run.overrides = (*self.overrides, *overrides)
        return run

    def copy(self, path: Path) -> "Run":
        """The same run in another folder, to be continued from there."""
        run = self.beside(path)
        shutil.copytree(self.path, path)
        run.lives = list(self.lives)
        return run

    def start(self, inject: str = "", **options) -> Life:
        recording = record_steps() + record_samples()
        life = self.rig.start(
            self.recipe, f"output_dir={self.path}", *self.overrides, backend=self.backend, inject=recording + inject, **options
        )
        self.lives.append(life)
        return life

    def live(self, inject: str = "", **options) -> Life:
        life = self.start(inject, **options)
        life.wait()
        return life

    def finish(self) -> Life:
        """A life that must come to its end."""
        life = self.live()
        assert set(life.codes.values()) == {0}, life.output(0) + life.output(1)
        return life

    def events(self, name: str | None = None) -> list[dict]:
        return [event for event in read_ledger(self.path / "ledger.jsonl") if name in (None, event["event"])]

    def resumed_from(self) -> int | None:
        """What the last life that began to train had continued from."""
        return self.events("life_began")[-1]["resumed_from"]

    def logged(self) -> dict[tuple[int, str], float]:
        """(step, key) -> value as metrics.jsonl has it last."""
        found = {}
        for line in (self.path / "metrics.jsonl").read_text().splitlines():
            line = json.loads(line)
            found |= {(line["step"], key): value for key, value in line.items() if not MEASURED.match(key)}
        return found

    def exported(self) -> dict[str, bytes]:
        return {file.name: file.read_bytes() for file in (self.path / "final").glob("*.safetensors")}


@functools.cache
def whole_run(backend: str) -> Run:
    """A run that nobody killed. It holds checkpoint-5 and checkpoint-4."""
    folder = shared_rig().folder / f"whole-{backend}"
    folder.mkdir()
    run = Run.of_job(shared_rig(), folder, backend=backend)
    run.finish()
    return run


@functools.cache
def interrupted_run(backend: str) -> Run:
    """A run that was killed when its third checkpoint was written and had no name yet. It holds checkpoint-2 and checkpoint-1, and what
    was to be checkpoint-3 in .staging."""
    run = whole_run(backend).beside(shared_rig().folder / f"interrupted-{backend}" / "run")
    run.live(die_in_phase(0, "saving: rename", 3))
    return run


def differences(run: Run, reference: Run) -> list[str]:
    """In what a run that has come to its end is not the one that was never interrupted; nothing when it is the same to the last bit."""
    found = []
    for rank in range(run.lives[-1].world):
        expected = {kind: by_step(reference.lives[0], kind, rank) for kind in ("steps", "samples")}
        for number, life in enumerate(run.lives, start=1):
            for kind in expected:
                for step, records in by_step(life, kind, rank).items():
                    # What a life was killed in the middle of stands there in part.
                    if records != expected[kind].get(step, [])[: len(records)]:
                        keys = [key for key in records[0] if records[0][key] != expected[kind].get(step, [{}])[0].get(key)]
                        found.append(f"life {number}, rank {rank}, step {step}: other {kind} ({', '.join(keys)})")
        made = set().union(*(by_step(life, "steps", rank) for life in run.lives))
        if made != set(expected["steps"]):
            found.append(f"rank {rank} made the steps {sorted(made)}")
    mine, others = run.logged(), reference.logged()
    found += [
        f"logged at {place}: {mine.get(place)}, not {others.get(place)}"
        for place in sorted(mine.keys() | others.keys())
        if mine.get(place) != others.get(place)
    ]
    if not run.exported() or run.exported() != reference.exported():
        found.append("final/ holds other weights")
    return found + leftovers(run)


def by_step(life: Life, kind: str, rank: int) -> dict[int, list[dict]]:
    steps: dict[int, list[dict]] = {}
    for record in life.records(kind, rank):
        steps.setdefault(record["step"], []).append(record)
    return steps


def leftovers(run: Run) -> list[str]:
    """What a run that has come to its end should not have left; and of what it should, what is not whole."""
    folder = RunDir(run.path)
    found = [f"left behind: {entry}" for place in (folder.staging, folder.retired) for entry in place.glob("*")]
    found += [f"left behind: {entry}" for entry in run.path.glob("final.*")]
    kept = checkpoints(run.path)
    if [step for step, _ in kept] != [LAST, LAST - 1]:
        found.append(f"kept the checkpoints {kept}")
    for step, path in kept:
        check_checkpoint(step, path, "digests")
    return found


# ---- builders of `inject`, beside those of rig.py


def die_within_write(rank: int, target: str, limit: str, occurrence: int = 1, matching: str = "") -> str:
    """The kernel ends this rank in the n-th such call, when a file is about to grow over `limit`: an expression in Python, which sees the
    call's `args` and `size(path)`. What came before that byte is on the disk."""
    return f"""
if RANK == {rank}:
    def around(function, seen=[0]):
        def called(*args, **kwargs):
            import resource
            size = lambda path: Path(path).stat().st_size
            seen[0] += {matching!r} in repr((args, kwargs))
            if seen[0] == {occurrence}:
                seen[0] += 1
                # Python ignores the signal, and would go on with an error.
                signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
                resource.setrlimit(resource.RLIMIT_FSIZE, ({limit},) * 2)
            return function(*args, **kwargs)
        return called
    wrap({target!r}, around)
"""


def die_within_deletion(rank: int, matching: str, after: int) -> str:
    """This rank is killed in the first rmtree of such a path, when it has deleted so many files."""
    return f"""
if RANK == {rank}:
    def around(rmtree):
        def called(*args, **kwargs):
            if {matching!r} in repr(args):
                kill_at_call("os:unlink", {after + 1}, True, "")
            return rmtree(*args, **kwargs)
        return called
    wrap("shutil:rmtree", around)
"""


def rank_1_dies_instead() -> str:
    """Before or behind a fault of rank 0: where rank 0 would be killed, rank 1 is, and rank 0 goes on from there until it notices. For
    places that only rank 0 comes to; the life wants a grace, as a launcher gives it."""
    return """
import threading, __main__
if RANK == 1:
    (FOLDER / "rank-1.pid").write_text(str(os.getpid()))
    def follow():
        while not (FOLDER / "rank-0.is-there").exists():
            time.sleep(0.001)
        die()
    threading.Thread(target=follow, daemon=True).start()
else:
    def let_rank_1_die():
        pid = int((FOLDER / "rank-1.pid").read_text())
        (FOLDER / "rank-0.is-there").touch()
        while Path(f"/proc/{pid}").exists():
            time.sleep(0.001)
    __main__.die = let_rank_1_die
"""
