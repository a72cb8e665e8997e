"""What distillation costs: from a cache, beside a resident teacher, and by TRL, on the same models and rows, in one run.

    python benchmarks/distill.py [--device cpu|cuda]        writes benchmarks/results/distill-<cpu|gpu>.{json,md}

Whole steps   distill_steps.py: tokens per second and peak memory of six sides that take turns
The loss      distill_loss.py: seconds beside its bare matrix products, in turn, and the memory that it takes, in fresh processes
The cache     distill_cache.py: capture beside the teacher's bare forward, in turn; reading; bytes per token of three formats

Nothing is fetched: models, tokenizer and rows are generated from a seed. The aims are those of a GPU with an 8B teacher, a 1B student and a
context of 4k; a CPU's results say how they come out there, and which of them hold. Each part runs in a process of its own.
"""

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import distill_steps  # noqa: E402
from distill_report import CAPTURE_AIM, render  # noqa: E402
from distill_steps import CACHED, SIZES, Size, llama  # noqa: E402
from distill_stories import TEACHER as STORIES  # noqa: E402
from sft import describe_machine, save_result, say  # noqa: E402

from harness.run import git_commit, library_versions  # noqa: E402

LOSSES = {
    # (tokens, V, H of the student, H of the teacher, rounds), and whether the head trains.
    "cpu": [((256, 32_768, 512, 1024, 3), False), ((256, 32_768, 512, 1024, 3), True), ((128, 131_072, 512, 1024, 2), False)],
    "gpu": [((8192, 128_256, 2048, 4096, 10), False), ((8192, 128_256, 2048, 4096, 10), True)],
}
BYTES_BATCHES = 4
TRIAL_SIZE = Size(llama(32, 64, 2, 2, 2), llama(64, 128, 2, 2, 2), 2000, 64, 4, 4, 256, at_once=True)
TRIAL_LOSSES = [((40, 3000, 32, 48, 2), False), ((40, 3000, 32, 48, 2), True)]


def alone(function, *arguments):
    """The function's result from a fresh process, which has the libraries loaded and has allocated nothing."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("forkserver")) as pool:
        return pool.submit(function, *arguments).result()


def measure_losses(cases: list, device: str) -> list[dict]:
    import distill_loss

    found = []
    for numbers, trains_head in cases:
        shape = distill_loss.Shape(*numbers)
        times = alone(distill_loss.measure_times, shape, device, trains_head)
        for way, measured in times["ways"].items():
            measured["bytes"] = alone(distill_loss.measure_memory, shape, device, trains_head, way)
        found.append({"shape": asdict(shape), "trains_head": trains_head, **times})
        cached = times["ways"][CACHED]
        say(f"the loss, V = {shape.vocabulary:,}: cached {cached['over_bare_in_cpu_s']['median']:.2f} times its products by CPU seconds")
    return found


def run(kind: str, size: Size, losses: list, batches: int, work: Path) -> dict:
    """All parts; returns what is written to the results."""
    import distill_cache

    begun, device, machine = time.perf_counter(), "cuda" if kind == "gpu" else "cpu", describe_machine(kind)
    parameters = alone(distill_steps.save_inputs, size, work, device)
    file = work / "capture.yaml"
    file.write_text(json.dumps(distill_steps.recipe_of(work, size, kind)))  # JSON is YAML
    captured = alone(distill_cache.measure_capture, file, device)
    say(f"capture: {captured['over_bare']['median']:.2f} of the bare forward's tokens per second (aim: {CAPTURE_AIM})")
    steps = distill_steps.measure_steps(work, size, kind)
    for side in steps["sides"]:
        times = side["cached_is_faster"]["median"]
        say(f"whole steps: {side['side']}: {side['tokens_per_s']:,.0f} tokens/s; cached is {times:.2f} times as fast")
    return {
        "kind": kind,
        "date": time.strftime("%Y-%m-%d %H:%M %Z"),
        "git_commit": git_commit(),
        "size": asdict(size),
        "parameters": parameters,
        "steps": steps,
        "capture": captured,
        "reading": alone(distill_cache.measure_reading, file),
        "losses": measure_losses(losses, device),
        "bytes": alone(distill_cache.measure_bytes, batches, STORIES if STORIES.is_dir() else None),
        "machine": machine | {"load_after": os.getloadavg()[0]},
        "versions": library_versions(),
        "seconds": time.perf_counter() - begun,
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks/distill.py", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), help="left out: cuda where there is a GPU")
    parser.add_argument("--results", type=Path, help="folder for distill-<cpu|gpu>.{json,md}; left out: benchmarks/results")
    parser.add_argument("--trial", action="store_true", help="tiny models and few steps, no measurement; with --results")
    options = parser.parse_args(argv)
    if options.trial and options.results is None:
        parser.error("--trial measures nothing: give --results FOLDER, so that it replaces no measurement")
    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: this machine has no GPU that torch can use; leave it out to measure on the CPU")
    kind = "gpu" if options.device != "cpu" and torch.cuda.is_available() else "cpu"
    os.environ["CUDA_VISIBLE_DEVICES"] = "" if kind == "cpu" else os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
    multiprocessing.get_context("forkserver").set_forkserver_preload(["distill_cache", "trl.experimental.gkd"])
    size, losses, batches = (TRIAL_SIZE, TRIAL_LOSSES, 1) if options.trial else (SIZES[kind], LOSSES[kind], BYTES_BATCHES)
    with tempfile.TemporaryDirectory(prefix="bench-distill-") as work:
        result = run(kind, size, losses, batches, Path(work))
    target = (options.results or HERE / "results") / f"distill-{kind}"
    save_result(result, render(result), target)


if __name__ == "__main__":
    main()
