"""What `train.torch_compile` brings and costs: the same recipe with and without it, in turn, on this machine.

    python benchmarks/torch_compile.py        writes benchmarks/results/compile-<cpu|gpu>.{json,md}

The quickstart's base stage, 120 steps. Seconds per step are those of metrics.jsonl, as medians over the log lines after the first 40 steps,
in which the compiler works; what compiling costs is the difference of the two runs' whole times, without what their later steps differ by.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from sft import describe_machine

RESULTS = Path(__file__).parent / "results"
ROUNDS, STEPS, WARM_UP = 3, 120, 40


def train(folder: Path, compiled: bool) -> dict:
    """One run: its whole seconds, its warm seconds per step, and its last loss."""
    run = folder / f"run-{time.monotonic_ns()}"
    settings = {"output_dir": run, "train.max_steps": STEPS, "train.logging_steps": 10, "train.torch_compile": str(compiled).lower()}
    settings |= {"train.eval_strategy": "no", "train.eval_steps": "null", "tracking.mode": "disabled"}
    begun = time.monotonic()
    argv = [sys.executable, "-m", "harness", "run", "quickstart/base", *(f"{key}={value}" for key, value in settings.items())]
    subprocess.run(argv, check=True, stdout=subprocess.DEVNULL)
    seconds = time.monotonic() - begun
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    logged = [line for line in lines if "speed/step_s" in line]
    steps = [line["speed/step_s"] for line in logged if line["step"] > WARM_UP]
    return {"seconds": seconds, "step_s": statistics.median(steps), "loss": logged[-1]["train/loss"]}


def main() -> None:
    kind = "gpu" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory() as folder:
        train(Path(folder), False)  # warms the caches of data and files
        rounds = [{name: train(Path(folder), name == "compiled") for name in ("plain", "compiled")} for _ in range(ROUNDS)]
    ratios = [pair["compiled"]["step_s"] / pair["plain"]["step_s"] for pair in rounds]
    costs = [
        pair["compiled"]["seconds"] - pair["plain"]["seconds"] - (STEPS - WARM_UP) * (pair["compiled"]["step_s"] - pair["plain"]["step_s"])
        for pair in rounds
    ]
    result = {
        **describe_machine(kind),
        "rounds": rounds,
        "step_ratio": {"min": min(ratios), "median": statistics.median(ratios), "max": max(ratios)},
        "compile_s": {"min": min(costs), "median": statistics.median(costs), "max": max(costs)},
        "loss_gap": max(abs(pair["compiled"]["loss"] - pair["plain"]["loss"]) for pair in rounds),
    }
    (RESULTS / f"compile-{kind}.json").write_text(json.dumps(result, indent=2) + "\n")
    table = f"""# `train.torch_compile` on a {kind.upper()}

The quickstart's base stage (115 thousand parameters), {ROUNDS} rounds of {STEPS} steps with and without it, in turn. Median (min to max).

| | compiled / plain |
|---|---|
| seconds per step, after the first {WARM_UP} | {result["step_ratio"]["median"]:.2f} ({min(ratios):.2f} to {max(ratios):.2f}) |
| seconds that compiling took | {result["compile_s"]["median"]:.0f} ({min(costs):.0f} to {max(costs):.0f}) |
| largest difference of the last loss | {result["loss_gap"]:.1e} |
"""
    (RESULTS / f"compile-{kind}.md").write_text(table)
    print(table)


if __name__ == "__main__":
    main()
