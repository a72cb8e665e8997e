"""What checkpoints cost: `harness run` beside TRL's own script with `--save_strategy steps`, on one machine, in one run.

    python benchmarks/checkpoint.py [--device cpu|cuda]        writes benchmarks/results/checkpoint-<cpu|gpu>.{json,md}

Saves      seconds that a save takes from the training: our commit (stage, write, hash, flush, manifest, rename, retire the oldest) and
           transformers' `_save_checkpoint` (write, delete the oldest). Ours is on the disk when it returns; theirs lies in memory, so it is
           timed a second time with an fsync of each of its files, and a third time without what deleting takes, which is the disk's
           affair. Full fine-tuning, LoRA, and two ranks of ddp.
Bandwidth  our commit beside a plain write and fsync of the same bytes, file by file, by the same process right after it.
Starts     from the command to the end of the first step, fresh and resumed, of the same run, with our parts by the words in which our ranks
           say what they do.
Steps      of a model so small that what we add to a step (the vote, the guard, the sign of life) is not hidden by it; nothing is saved.

Both sides are the commands that users type. They take turns step by step, A B B A, as in benchmarks/sft.py; a turn is a save and a step.
benchmarks/checkpoint_probe/sitecustomize.py holds the clock, the same for both. Before each save the disk is idle. W&B is off.
"""

import argparse
import json
import os
import random
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sft import (
    HERE,
    SEED,
    Runner,
    Side,
    Size,
    describe,
    describe_machine,
    gib,
    met,
    save_model,
    save_result,
    save_tokenizer,
    say,
    spread,
    start,
    take_turns,
)

from harness.run import git_commit, library_versions

ROW_TOKENS = 32
SAVES_SKIP = 2
"""The first save allocates, and none but the third has an older checkpoint to delete."""
STEPS_SKIP = 5
START_TIMEOUT_S = 600
BANDWIDTH_AIM = 0.8


@dataclass(frozen=True)
class Plan:
    """How large everything is on a kind of machine."""

    model: Size
    small: Size
    """For the cost of a step."""
    full_saves: int
    lora_saves: int
    ddp_saves: int
    """0: this machine has no two devices."""
    starts: int
    steps: int


def size_of(vocabulary: int, hidden: int, layers: int, heads: int) -> Size:
    return Size(vocabulary, hidden, layers, heads, rows=256, batch=1, equal_steps=0, max_length=2 * ROW_TOKENS)


SMALL = size_of(512, 64, 2, 2)
PLANS = {
    "cpu": Plan(size_of(2048, 768, 12, 12), SMALL, full_saves=7, lora_saves=10, ddp_saves=5, starts=3, steps=150),
    "gpu": Plan(size_of(32000, 1536, 12, 12), SMALL, full_saves=7, lora_saves=10, ddp_saves=0, starts=3, steps=150),
}
TRIAL = Plan(SMALL, SMALL, full_saves=3, lora_saves=3, ddp_saves=3, starts=1, steps=STEPS_SKIP + 5)

SAVE_PARTS = {
    "saving: staging": "staging",
    "saving: weights": "writing weights",
    "saving: FSDP's model": "writing weights",
    "saving: optimiser": "writing the optimiser",
    "saving: FSDP's optimiser": "writing the optimiser",
    "saving: trainer state": "writing the rest",
    "saving: loss scale": "writing the rest",
    "saving: random numbers": "writing the rest",
    "saving: rank state": "writing the rest",
    "saving: hashing": "hashing and flushing",
    "saving: manifest": "manifest",
    "saving: rename": "rename",
    "saving: flushing the run folder": "rename",
    "saving: retention": "retiring the oldest",
    "save begins": "around it",
    "training": "around it",
}
"""What a rank says it does while it saves -> a line of the table."""
AFTER_THE_COMMIT = ("retiring the oldest", "around it")

START_PARTS = {
    "command": "`harness run`, until the rank's Python runs",
    "python": "imports",
    "starting": "imports",
    "importing libraries": "imports",
    "joining the other ranks": "joining, opening the run folder",
    "opening the run folder": "joining, opening the run folder",
    "verifying": "verifying every byte",
    "loading data": "loading data",
    "loading model": "loading model",
    "building trainer": "building trainer",
    "training": "first step",
    "resuming: loading weights": "resuming: weights",
    "resuming: loading the optimiser": "resuming: optimiser",
    "resuming: comparing": "resuming: comparing",
}


# ---- the sides ---------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """What both sides of a comparison train."""

    folder: Path
    inputs: Path
    size: Size
    kind: str
    steps: int
    saves: bool
    lora: bool = False
    ranks: int = 1


def make_rows(size: Size) -> list[dict]:
    """Conversations of two turns and ROW_TOKENS tokens each, a mark and an end per turn among them."""
    rng = random.Random(SEED)
    half = ROW_TOKENS // 2 - 2

    def words() -> str:
        return " ".join(f"w{rng.randrange(size.vocabulary - 8)}" for _ in range(half))

    return [{"messages": [{"role": role, "content": words()} for role in ("user", "assistant")]} for _ in range(size.rows)]


def make_inputs(size: Size, folder: Path) -> int:
    """Model, tokenizer and rows; returns the model's parameters."""
    (folder / "rows").mkdir(parents=True)
    (folder / "rows" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_rows(size)))
    save_tokenizer(size, folder / "base")
    return save_model(size, folder / "base")


def same_settings(job: Job) -> dict:
    """Whatever takes time, said on both sides under names that both know. No log line but the first."""
    same = {"max_steps": job.steps, "learning_rate": 1e-4, "lr_scheduler_type": "constant", "logging_steps": 10**6, "seed": SEED}
    same |= {"optim": "adamw_torch_fused", "max_grad_norm": 1.0, "gradient_checkpointing": False}
    same |= {"per_device_train_batch_size": job.size.batch}
    return same | ({"bf16": True, "tf32": True} if job.kind == "gpu" else {"bf16": False})


def harness_side(job: Job, run: str = "harness") -> Side:
    recipe = {
        "model": {"name_or_path": str(job.inputs / "base"), "attn_implementation": "sdpa"},
        "data": {
            "train": str(job.inputs / "rows" / "train.jsonl"),
            "max_length": job.size.max_length,
            "packing": False,
            "cache_dir": str(job.folder / "cache-harness"),
        },
        "train": same_settings(job),
        "backend": "ddp" if job.ranks > 1 else "single",
        "checkpoint": {"every_steps": 1} if job.saves else {"auto": False},
        "tracking": {"mode": "disabled"},
        "output_dir": str(job.folder / run),
    }
    if job.lora:
        recipe["model"]["lora"] = {"r": 16, "alpha": 32}
    file = job.folder / f"{run}.yaml"
    file.write_text(json.dumps(recipe, indent=2))  # JSON is YAML
    return Side("harness", [sys.executable, "-m", "harness", "run", str(file), "--processes", str(job.ranks)])


def trl_side(job: Job, run: str = "trl", resume: Path | None = None) -> Side:
    """TRL's script; `save_total_limit` is what we keep by default."""
    given = same_settings(job) | {
        "model_name_or_path": job.inputs / "base",
        "dataset_name": job.inputs / "rows",
        "attn_implementation": "sdpa",
        "max_length": job.size.max_length,
        "assistant_only_loss": True,
        "report_to": "none",
        "output_dir": job.folder / run,
    }
    given |= {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2} if job.saves else {"save_strategy": "no"}
    given |= {"use_cpu": True} if job.kind == "cpu" else {}
    given |= {"use_peft": True, "lora_r": 16, "lora_alpha": 32, "lora_target_modules": "all-linear"} if job.lora else {}
    given |= {"resume_from_checkpoint": resume} if resume else {}
    # Ours says so; transformers' own is to look for unused parameters at every step.
    given |= {"ddp_find_unused_parameters": False} if job.ranks > 1 else {}
    words = [word for key, value in given.items() for word in (f"--{key}", str(value))]
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(job.ranks)] if job.ranks > 1 else []
    return Side("TRL", [sys.executable, *several, "-m", "trl.scripts.sft", *words])


def environment(job: Job, name: str, events: Path, leave_after: int, socket_path: Path | None = None) -> dict[str, str]:
    paths = [str(HERE / "checkpoint_probe"), str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "BENCH_EVENTS": str(events),
        "BENCH_LEAVE_AFTER": str(leave_after),
        "BENCH_SOCKET": str(socket_path or ""),
        "BENCH_PLAIN": str(job.folder / "plain") if name == "harness" else "",
        "OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // job.ranks)),
        # `harness run` sets it on a CPU (benchmarks/sft.py says what happens without it).
        "OMP_WAIT_POLICY": "PASSIVE",
        "HF_DATASETS_CACHE": str(job.folder / "cache-trl"),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


# ---- measuring ---------------------------------------------------------------------------------------------------------------------------


def race(job: Job) -> tuple[Side, Side]:
    """Start both sides, and let them take turns until they have done their steps; their clocks' files lie in the job's folder."""
    job.folder.mkdir(parents=True)
    sides = harness_side(job), trl_side(job)
    # A path for a socket may have 107 bytes, and the work folder may be deep.
    with tempfile.TemporaryDirectory(prefix="bench-") as short, socket.socket(socket.AF_UNIX) as listener:
        address = Path(short) / "turns"
        listener.bind(str(address))
        listener.listen()
        running: list[Runner] = []
        try:
            for side in sides:
                around = environment(job, side.name, job.folder / f"{side.name}.json", job.steps, address)
                running.append(start(side, job.folder, listener, around))
            take_turns(running)
            for runner in running:
                runner.finish()
        finally:
            for runner in running:
                runner.stop()
    ours, theirs = ([step.tokens for step in side.steps] for side in sides)
    if ours != theirs:
        raise SystemExit(f"{job.folder.name}: the sides had batches of different sizes: {ours} and {theirs}")
    return sides


def measure_saves(job: Job) -> dict:
    race(job)
    ours, theirs = (read_saves(job.folder / f"{name}.json") for name in ("harness", "TRL"))
    newest = f"checkpoint-{job.steps - 1}"
    result = compare_saves(ours, theirs)
    result |= {f"{side}_checkpoint": describe_checkpoint(job.folder / side / newest) for side in ("harness", "trl")}
    seconds, plain, flushed, rate = (describe(result[key], 2) for key in ("harness_s", "ratio", "ratio_flushed", "bandwidth_ratio"))
    say(f"saves, {job.folder.name}: {seconds} s, {plain} of transformers', {flushed} with its fsync; {rate} of a plain write's bandwidth")
    return result


def read_saves(file: Path) -> list[dict]:
    """{"save_s", "parts": {phase's part: seconds}, "flush_s", …} of every save, from a clock's file."""
    content = json.loads(file.read_text())
    saves, marks = [], []
    for moment, what in content["events"]:
        if what == "save begins":
            marks = [(moment, what)]
        elif what == "save ends":
            saves.append({"save_s": moment - marks[0][0], "parts": seconds_of([*marks, (moment, what)], SAVE_PARTS)})
        else:
            marks.append((moment, what))
    return [{**save, **measured} for save, measured in zip(saves, content["saves"], strict=True)]


def seconds_of(marks: Sequence[tuple[float, str]], parts: dict[str, str]) -> dict[str, float]:
    """Seconds from each mark to the next, added up by their parts. Raises KeyError for a word that has no part."""
    seconds = dict.fromkeys(parts.values(), 0.0)
    for (since, what), (until, _) in zip(marks, marks[1:], strict=False):
        seconds[parts["verifying" if what.startswith("verifying ") else what]] += until - since
    return seconds


def compare_saves(ours: Sequence[dict], theirs: Sequence[dict]) -> dict:
    """Save by save, without the first: ours / theirs, ours / (theirs and the flush that it leaves out), a plain write / our commit."""
    pairs = list(zip(ours, theirs, strict=True))[SAVES_SKIP:]
    ours, theirs = [a for a, _ in pairs], [b for _, b in pairs]
    commits = [save["save_s"] - sum(save["parts"][part] for part in AFTER_THE_COMMIT) for save in ours]
    plain = [save["plain_write_s"] + save["plain_flush_s"] for save in ours]
    return {
        "saves": len(pairs),
        "harness_s": spread([save["save_s"] for save in ours]),
        "harness_flush_s": spread([save["flush_s"] for save in ours]),
        "trl_s": spread([save["save_s"] for save in theirs]),
        "trl_retire_s": spread([save["parts"]["retiring the oldest"] for save in theirs]),
        "trl_flush_s": spread([save["flush_s"] for save in theirs]),
        "ratio": spread([a["save_s"] / b["save_s"] for a, b in pairs]),
        "ratio_flushed": spread([a["save_s"] / (b["save_s"] + b["flush_s"]) for a, b in pairs]),
        "ratio_flushed_no_retiring": spread([_kept_s(a) / (_kept_s(b) + b["flush_s"]) for a, b in pairs]),
        "parts": {part: spread([save["parts"][part] for save in ours]) for part in dict.fromkeys(SAVE_PARTS.values())},
        "commit_s": spread(commits),
        "plain_s": spread(plain),
        "plain_write_s": spread([save["plain_write_s"] for save in ours]),
        "plain_flush_s": spread([save["plain_flush_s"] for save in ours]),
        "bandwidth_ratio": spread([a / b for a, b in zip(plain, commits, strict=True)]),
    }


def _kept_s(save: dict) -> float:
    return save["save_s"] - save["parts"]["retiring the oldest"]


def describe_checkpoint(folder: Path) -> dict:
    """Its files, and how many of its weights are an adapter's and how many are not."""
    from safetensors import safe_open

    files = {str(path.relative_to(folder)): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()}
    adapter, others = 0, 0
    for path in folder.rglob("*.safetensors"):
        with safe_open(path, "pt") as tensors:
            names = list(tensors.keys())
        adapter += sum(".lora_" in name for name in names)
        others += sum(".lora_" not in name for name in names)
    return {"bytes": sum(files.values()), "files": files, "adapter_tensors": adapter, "other_tensors": others}


def measure_starts(job: Job, count: int) -> dict:
    """Fresh and resumed starts of the run that `measure_saves` has left in the job's folder, in turn. Each ends after its first step."""
    checkpoint = job.folder / "trl" / f"checkpoint-{job.steps - 1}"
    seconds: dict[str, list[float]] = {name: [] for name in ("harness_fresh", "harness_resumed", "trl_fresh", "trl_resumed")}
    cpu: dict[str, list[float]] = {name: [] for name in seconds}
    parts: dict[str, list[dict]] = {"fresh": [], "resumed": []}
    for number in range(count):
        sides = {
            "harness_fresh": harness_side(job, f"fresh-harness-{number}"),
            "trl_fresh": trl_side(job, f"fresh-trl-{number}"),
            "trl_resumed": trl_side(job, resume=checkpoint),
            "harness_resumed": harness_side(job),
        }
        for name, side in sides.items() if number % 2 == 0 else reversed(sides.items()):
            marks, cpu_s = time_start(job, side)
            seconds[name].append(marks[-1][0] - marks[0][0])
            cpu[name].append(cpu_s)
            if side.name == "harness":
                parts[name.removeprefix("harness_")].append(seconds_of(marks, START_PARTS))
        for name in ("harness", "trl"):
            shutil.rmtree(job.folder / f"fresh-{name}-{number}", ignore_errors=True)
        say(f"starts {number + 1}: " + ", ".join(f"{name} {values[-1]:.1f} s" for name, values in seconds.items()))

    def pairs(one: str, other: str) -> list[tuple[float, float]]:
        return list(zip(seconds[one], seconds[other], strict=True))

    return {
        "starts": count,
        **{f"{name}_s": spread(values) for name, values in seconds.items()},
        **{f"{name}_cpu_s": spread(values) for name, values in cpu.items()},
        "ratio_fresh": spread([a / b for a, b in pairs("harness_fresh", "trl_fresh")]),
        "ratio_resumed": spread([a / b for a, b in pairs("harness_resumed", "trl_resumed")]),
        "harness_resume_cost_s": spread([a - b for a, b in pairs("harness_resumed", "harness_fresh")]),
        "trl_resume_cost_s": spread([a - b for a, b in pairs("trl_resumed", "trl_fresh")]),
        "parts": {how: {part: spread([run[part] for run in runs]) for part in runs[0]} for how, runs in parts.items()},
    }


def time_start(job: Job, side: Side) -> tuple[list[tuple[float, str]], float]:
    """(what the side's rank 0 did and when, from the command to the end of its first step; CPU seconds of all its processes)."""
    events, log = job.folder / "start.json", job.folder / "start.log"
    events.unlink(missing_ok=True)
    # What the last one left to write would be written during this one.
    os.sync()
    with log.open("w") as stream:
        began, cpu = time.monotonic(), _childrens_cpu_s()
        done = subprocess.run(
            side.argv, env=environment(job, side.name, events, 1), stdout=stream, stderr=subprocess.STDOUT, timeout=START_TIMEOUT_S
        )
    if done.returncode or not events.is_file():
        raise SystemExit(f"{side.name}: exit code {done.returncode}\n$ {' '.join(side.argv)}\n{log.read_text(errors='replace')[-4000:]}")
    marks = [(began, "command"), *((moment, what) for moment, what in json.loads(events.read_text())["events"])]
    return marks[: [what for _, what in marks].index("first step done") + 1], _childrens_cpu_s() - cpu


def _childrens_cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def measure_steps(job: Job) -> dict:
    ours, theirs = (side.steps[STEPS_SKIP:] for side in race(job))
    pairs = list(zip(ours, theirs, strict=True))
    result = {
        "steps": len(pairs),
        "harness_step_s": spread([a.seconds for a, _ in pairs]),
        "trl_step_s": spread([b.seconds for _, b in pairs]),
        "ratio": spread([a.seconds / b.seconds for a, b in pairs]),
        "added_s": spread([a.seconds - b.seconds for a, b in pairs]),
        "added_cpu_s": spread([a.cpu_seconds - b.cpu_seconds for a, b in pairs]),
    }
    added, usual = (describe(milliseconds(result[key]), 2) for key in ("added_s", "trl_step_s"))
    say(f"steps, ranks {job.ranks}: {added} ms more than TRL's {usual} ms")
    return result


def milliseconds(values: dict[str, float]) -> dict[str, float]:
    return {name: 1e3 * value for name, value in values.items()}


def run(kind: str, plan: Plan, work: Path) -> dict:
    """Everything; returns what is written to the results."""
    began, machine = time.perf_counter(), describe_machine(kind)
    parameters = make_inputs(plan.model, work / "inputs")
    small_parameters = make_inputs(plan.small, work / "small-inputs")
    # Reads the libraries from the disk once, so that whoever starts first does not do it for the others.
    subprocess.run([sys.executable, "-c", "import trl.trainer.sft_trainer, deepspeed, peft, wandb"], check=True, capture_output=True)

    def saving(name: str, saves: int, **more) -> Job:
        return Job(work / name, work / "inputs", plan.model, kind, steps=saves + 1, saves=True, **more)

    full = saving("full", plan.full_saves)
    saves = {"full": measure_saves(full), "lora": measure_saves(saving("lora", plan.lora_saves, lora=True))}
    starts = measure_starts(full, plan.starts)
    shutil.rmtree(full.folder)
    if plan.ddp_saves:
        saves["ddp"] = measure_saves(saving("ddp", plan.ddp_saves, ranks=2))
    ranks = (1, 2) if plan.ddp_saves else (1,)
    small = {n: Job(work / f"steps-{n}", work / "small-inputs", plan.small, kind, plan.steps, saves=False, ranks=n) for n in ranks}
    return {
        "kind": kind,
        "date": time.strftime("%Y-%m-%d %H:%M %Z"),
        "git_commit": git_commit(),
        "versions": library_versions(),
        "parameters": parameters,
        "small_parameters": small_parameters,
        "saves": saves,
        "starts": starts,
        "steps": {str(n): measure_steps(job) for n, job in small.items()},
        "machine": machine | {"load_after": os.getloadavg()[0]},
        "seconds": time.perf_counter() - began,
    }


# ---- the report --------------------------------------------------------------------------------------------------------------------------

NAMES = {"full": "full", "lora": "LoRA", "ddp": "full, ddp on 2 ranks"}


def render(result: dict) -> str:
    """The result as markdown; its first lines say when and where it was measured."""
    parts = (render_setting, render_saves, render_bandwidth, render_starts, render_steps)
    return "\n".join(line for part in parts for line in part(result)) + "\n"


def render_setting(result: dict) -> list[str]:
    machine = result["machine"]
    return [
        f"# Checkpoints: `harness run` beside `python -m trl.scripts.sft --save_strategy steps` on a {result['kind'].upper()}",
        "",
        f"{result['date']}, commit {result['git_commit'] or 'unknown'}, {result['seconds']:.0f} s.",
        f"{machine['device']}, {machine['cpus']} cores, {gib(machine['memory_bytes'])} GiB; "
        f"load {machine['load_before']:.1f} at the start, {machine['load_after']:.1f} at the end.",
        ", ".join(f"{name} {version}" for name, version in result["versions"].items()) + f"; Python {machine['python']}.",
        "",
        f"A Llama of {result['parameters'] / 1e6:.1f} M parameters with random weights, AdamW; LoRA with r = 16 on all linear layers. "
        "Values are median (min to max); ratios are taken pair by pair.",
        "",
    ]


def render_saves(result: dict) -> list[str]:
    saves = result["saves"]
    rows = {
        "saves of each": [str(save["saves"]) for save in saves.values()],
        "ours, seconds": [describe(save["harness_s"]) for save in saves.values()],
        "transformers', seconds": [describe(save["trl_s"]) for save in saves.values()],
        "fsync of transformers' files, seconds": [describe(save["trl_flush_s"]) for save in saves.values()],
        "of ours, deleting the oldest": [describe(save["parts"]["retiring the oldest"]) for save in saves.values()],
        "of transformers', deleting the oldest": [describe(save["trl_retire_s"]) for save in saves.values()],
        "ours / transformers'": [describe(save["ratio"], 2) for save in saves.values()],
        "**ours / transformers' with fsync**": [f"**{describe(save['ratio_flushed'], 2)}**" for save in saves.values()],
        "ours / transformers' with fsync, both without deleting": [
            describe(save["ratio_flushed_no_retiring"], 2) for save in saves.values()
        ],
        "ours, MiB": [mib(save["harness_checkpoint"]["bytes"]) for save in saves.values()],
        "transformers', MiB": [mib(save["trl_checkpoint"]["bytes"]) for save in saves.values()],
        "tensors in ours that are no adapter's": [str(save["harness_checkpoint"]["other_tensors"]) for save in saves.values()],
    }
    return ["## A save, from the training's view", "", *table(["", *(NAMES[name] for name in saves)], rows), ""]


def render_bandwidth(result: dict) -> list[str]:
    saves = result["saves"]
    parts = {part: [describe(save["parts"][part]) for save in saves.values()] for part in saves["full"]["parts"]}
    rows = parts | {
        "commit: all of it but the last two": [describe(save["commit_s"]) for save in saves.values()],
        "plain write and fsync of the same bytes": [describe(save["plain_s"]) for save in saves.values()],
        "the write of it": [describe(save["plain_write_s"]) for save in saves.values()],
        "the fsync of it": [describe(save["plain_flush_s"]) for save in saves.values()],
        "**commit's bandwidth / plain write's**": [f"**{describe(save['bandwidth_ratio'], 2)}**" for save in saves.values()],
    }
    reached = saves["full"]["bandwidth_ratio"]["median"] >= BANDWIDTH_AIM
    aim = f"Aim: {BANDWIDTH_AIM} of a plain write's bandwidth, hashing included (full, one rank). {met(reached)}"
    return ["## Where a save's seconds go", "", *table(["seconds", *(NAMES[name] for name in saves)], rows), "", aim, ""]


def render_starts(result: dict) -> list[str]:
    starts = result["starts"]
    rows = {
        f"harness, {starts['starts']} starts each": [describe(starts[f"harness_{how}_s"], 2) for how in ("fresh", "resumed")],
        "TRL": [describe(starts[f"trl_{how}_s"], 2) for how in ("fresh", "resumed")],
        "harness / TRL": [describe(starts[f"ratio_{how}"], 2) for how in ("fresh", "resumed")],
        "harness, CPU seconds of all processes": [describe(starts[f"harness_{how}_cpu_s"], 2) for how in ("fresh", "resumed")],
        "TRL, CPU seconds of all processes": [describe(starts[f"trl_{how}_cpu_s"], 2) for how in ("fresh", "resumed")],
    }
    parts = {part: [describe(starts["parts"][how][part], 2) for how in ("fresh", "resumed")] for part in starts["parts"]["fresh"]}
    costs = [describe(starts[f"{side}_resume_cost_s"], 2) for side in ("harness", "trl")]
    return [
        "## From the command to the end of the first step, full, one rank",
        "",
        *table(["seconds", "fresh", "resumed"], rows | parts),
        "",
        f"Resuming adds {costs[0]} s to a start of ours, {costs[1]} s to one of TRL's.",
        "",
    ]


def render_steps(result: dict) -> list[str]:
    steps = result["steps"]
    rows = {
        "harness, ms": [describe(milliseconds(step["harness_step_s"]), 2) for step in steps.values()],
        "TRL, ms": [describe(milliseconds(step["trl_step_s"]), 2) for step in steps.values()],
        "harness / TRL": [describe(step["ratio"]) for step in steps.values()],
        "added to a step, ms": [describe(milliseconds(step["added_s"]), 2) for step in steps.values()],
        "added to a step, CPU ms of rank 0": [describe(milliseconds(step["added_cpu_s"]), 2) for step in steps.values()],
    }
    heads = [f"{ranks} rank{'s' if ranks != '1' else ''}, {step['steps']} steps" for ranks, step in steps.items()]
    thousands = result["small_parameters"] / 1e3
    about = f"A Llama of {thousands:.0f} thousand parameters: the worst case, since what is added to a step does not grow with the model."
    return ["## A step on which nothing is saved", "", about, "", *table(["", *heads], rows)]


def table(head: Sequence[str], rows: dict[str, Iterable[str]]) -> list[str]:
    return [f"| {' | '.join(head)} |", "|---" * len(head) + "|", *(f"| {' | '.join((name, *cells))} |" for name, cells in rows.items())]


def mib(count: float) -> str:
    return f"{count / 2**20:.1f}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks/checkpoint.py", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), help="left out: cuda where there is a GPU")
    parser.add_argument("--results", type=Path, help="folder for checkpoint-<cpu|gpu>.{json,md}; left out: benchmarks/results")
    parser.add_argument("--work", type=Path, help="models, runs and logs, kept, on the disk to be measured; left out: a temporary folder")
    parser.add_argument("--trial", action="store_true", help="a tiny model and few repetitions, no measurement; with --results")
    options = parser.parse_args(argv)
    if options.trial and options.results is None:
        parser.error("--trial measures nothing: give it --results FOLDER, so that it replaces no measurement")
    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: this machine has no GPU that torch can use; leave it out to measure on the CPU")
    kind = "gpu" if options.device != "cpu" and torch.cuda.is_available() else "cpu"
    # One at most: with several in sight and no launcher TRL's script refuses to start.
    os.environ["CUDA_VISIBLE_DEVICES"] = "" if kind == "cpu" else os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    work = options.work.resolve() if options.work else Path(tempfile.mkdtemp(prefix="bench-checkpoint-"))
    try:
        result = run(kind, TRIAL if options.trial else PLANS[kind], work)
    finally:
        if not options.work:
            shutil.rmtree(work, ignore_errors=True)
    results = options.results or HERE / "results"
    target = results / f"checkpoint-{kind}"
    save_result(result, render(result), target)


if __name__ == "__main__":
    main()
