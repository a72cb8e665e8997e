"""The tiny job that the tests of launching share: three steps of LoRA on embedded questions, on one rank or two."""

import os
import subprocess
import sys
import time
from pathlib import Path

from conftest import REPOSITORY

from harness.run import rank_reports

TRAIN = str(REPOSITORY / "launch" / "train.py")
RECIPE = """
model: {name_or_path: "embedded:tiny-llama", lora: {r: 8, alpha: 16}}
data: {train: [{path: "embedded:base-train", max_rows: 120}], eval: [{path: "embedded:base-eval", max_rows: 9}], max_length: 256}
train: {max_steps: 3, per_device_train_batch_size: 4, global_batch_size: 8, learning_rate: 1.0e-2, logging_steps: 1, eval_steps: 3}
backend: ddp
tracking: {mode: disabled}
"""


def write_recipe(folder: Path, name: str = "job.yaml") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(RECIPE)
    return path


def start(*argv, **environment) -> subprocess.Popen:
    return subprocess.Popen(
        [str(part) for part in argv], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, **environment}
    )


def start_harness(*arguments, **environment) -> subprocess.Popen:
    return start(sys.executable, "-m", "harness", *arguments, **environment)


def wait_for_phase(run: Path, rank: int, phase: str, *, step: int | None = None, timeout_s: float = 120) -> None:
    """Until a rank of the run's first attempt says that it is in this phase, and at this step or a later one."""
    deadline = time.monotonic() + timeout_s
    while True:
        for alive in rank_reports(run / "logs" / "attempt-1", "alive", [rank]):
            if alive["phase"] == phase and (step is None or (alive["step"] or 0) >= step):
                return
        assert time.monotonic() < deadline, f"rank {rank} never came to {phase!r}"
        time.sleep(0.1)
