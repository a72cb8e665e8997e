"""Runs of several lives, and what must be the same of two runs: see `Run` and `check_same`."""

import json
from pathlib import Path

from rig import Life, record_samples, record_steps, shared_rig

RECIPE = """
model: {name_or_path: "embedded:tiny-llama", lora: {r: 8, alpha: 16, dropout: 0.1}}
data: {train: [{path: "embedded:base-train", max_rows: 40}], eval: [{path: "embedded:base-eval", max_rows: 9}], max_length: 256}
train: {max_steps: 14, per_device_train_batch_size: 2, global_batch_size: 4, learning_rate: 1.0e-2, warmup_steps: 7, logging_steps: 3,
        eval_steps: 4}
checkpoint: {every_steps: 5}
tracking: {mode: disabled}
"""
"""14 steps over epochs of 10: log lines, evaluations, checkpoints and epochs end at different steps. An evaluation is three batches."""
NOT_COMPARED = ("speed/", "memory/", "run/", "time", "train/epoch", "replays")
"""Times, and what stands in every line."""


class Run:
    """One run, and of all its lives together what each rank recorded: steps[rank][step] and samples[rank][step]."""

    def __init__(self, folder: Path, *overrides: str, backend: str = "ddp", inject: str = ""):
        folder.mkdir(parents=True, exist_ok=True)
        self.path, self.overrides, self.backend, self.inject = folder / "run", overrides, backend, inject
        self.world = 1 if backend == "single" else 2
        self._recipe = folder / "job.yaml"
        self._recipe.write_text(RECIPE)
        self.steps, self.samples = ([{} for _ in range(self.world)] for _ in range(2))

    def start(self, fault: str = "", **options) -> Life:
        recording = record_steps() + record_samples() + self.inject
        return shared_rig().start(
            self._recipe,
            f"output_dir={self.path}",
            *self.overrides,
            world=self.world,
            backend=self.backend,
            inject=recording + fault,
            **options,
        )

    def live(self, fault: str = "", *, code: int = 0, **options) -> Life:
        """One life, whose ranks must all end with this code."""
        life = self.start(fault, **options)
        assert life.wait() == [code] * self.world, life.output(0) + life.output(self.world - 1)
        for rank in range(self.world):
            # A step that is made again takes the place of the one that was lost.
            self.steps[rank] |= {record["step"]: record for record in life.records("steps", rank)}
            again = {}
            for record in life.records("samples", rank):
                again.setdefault(record["step"], []).append(record["samples"])
            self.samples[rank] |= again
        return life

    def events(self, *names: str) -> list[dict]:
        lines = (self.path / "ledger.jsonl").read_text().splitlines() if (self.path / "ledger.jsonl").exists() else []
        return [event for event in map(json.loads, lines) if not names or event["event"] in names]

    def committed(self) -> list[tuple[int, str]]:
        return [(event["step"], event["reason"]) for event in self.events("committed")]

    def manifest(self, step: int) -> dict:
        return json.loads((self.path / f"checkpoint-{step}" / "manifest.json").read_text())

    def outcome(self, attempt: int) -> dict:
        return json.loads((self.path / "logs" / f"attempt-{attempt}" / "outcome.json").read_text())

    def points(self, *, repeats: bool = False) -> dict[tuple[int, str], float]:
        """(step, key) -> value of metrics.jsonl, but for NOT_COMPARED. Without `repeats` no point may stand there twice."""
        found = {}
        for line in (self.path / "metrics.jsonl").read_text().splitlines():
            line = json.loads(line)
            step = line.pop("step")
            new = {
                (step, key): value for key, value in line.items() if not key.startswith(NOT_COMPARED) and not key.endswith(("_s", "_per_s"))
            }
            assert repeats or not new.keys() & found.keys(), f"logged twice: {new.keys() & found.keys()}"
            found |= new
        return found

    def exported(self) -> dict[str, bytes]:
        return {file.name: file.read_bytes() for file in (self.path / "final").glob("*.safetensors")}


def check_same(cut: Run, whole: Run, *, repeats: bool = False) -> None:
    """On every rank after every step weights, optimiser, random numbers and learning rate; every sample; every logged number, each logged
    once (`repeats`: at last); and what is exported."""
    assert cut.steps == whole.steps
    assert cut.samples == whole.samples
    points, expected = cut.points(repeats=repeats), whole.points()
    differ = {point: (points.get(point), expected.get(point)) for point in points | expected if points.get(point) != expected.get(point)}
    assert not differ, f"(step, key): (it is, it should be): {differ}"
    assert cut.exported() == whole.exported() != {}


def said(life: Life) -> str | None:
    """What rank 0 has left for the screen, where it ended on purpose; `harness run` is who says it."""
    return json.loads((life.attempt / "alive" / "rank-0.json").read_text()).get("stopped")


# ---- builders of `inject`


def at_step(step: int, act: str, rank: int = 0) -> str:
    """This rank executes one line of Python before the step's first micro-batch; it sees `trainer`."""
    return _around("harness.tasks.trainer:HarnessTrainer.training_step", f"trainer.state.global_step + 1 == {step}", act, rank)


def at_call(target: str, occurrence: int, act: str, rank: int = 0) -> str:
    """This rank executes one line of Python before the n-th call of a function; it sees its arguments as `args`."""
    return _around(target, f"calls == {occurrence}", act, rank)


def _around(target: str, when: str, act: str, rank: int) -> str:
    return f"""
if RANK == {rank}:
    def around(function):
        calls, done = 0, False

        def called(*args, **kwargs):
            nonlocal calls, done
            trainer, calls = args[0], calls + 1
            if not done and {when}:
                done = True
                {act}
            return function(*args, **kwargs)

        return called

    wrap({target!r}, around)
"""
