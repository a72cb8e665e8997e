"""A real teacher, a student a quarter of its size: does the teacher help at equal steps, and does the cache teach what the teacher does?

    python benchmarks/distill_stories.py        writes benchmarks/results/distill-stories.{json,md}

The teacher is stories260K; the rows are stories that it writes, and so are the held-out ones, from another seed. Three arms, each
the commands that a user types: from a cache (harness capture, then harness run), beside the resident teacher, and `task: sft` on the same
rows. Seed, order, batch, steps and schedule are the same. The learning rates are the same too, and each arm is judged by its own best
one, at its lowest point: neither the rate that suits the teacher nor passes after which it has learnt the rows by heart are a handicap
for the plain student. What is measured is the cross-entropy of held-out stories, which
plain training minimises and distillation only in part.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from sft import describe_machine, save_result  # noqa: E402

from harness.run import git_commit, library_versions  # noqa: E402

TEACHER = HERE.parent.parent / "shared" / "data" / "tinymodels" / "stories260K-hf"
ARMS = CACHED, RESIDENT, PLAIN = "from a cache", "resident teacher", "no teacher"


@dataclass(frozen=True)
class Size:
    """Few stories and many passes: that is when there is something to learn from a teacher that the rows do not say. (With 192 stories and
    120 steps nobody has learnt the rows yet: all arms were near 4 nats, and further apart by their rates than by their teachers.)"""

    stories: int
    held_out: int
    steps: int
    learning_rates: tuple[float, ...]
    batch: int = 8
    longest: int = 320


FULL = Size(stories=64, held_out=64, steps=300, learning_rates=(3e-3, 1e-2, 3e-2))
TRIAL = Size(stories=48, held_out=24, steps=48, learning_rates=(1e-2,), longest=160)


# ---- what all arms are given


def write_stories(folder: Path, size: Size) -> dict[str, float]:
    """Two files of stories by the teacher, and how sure it is of them: its cross-entropy is what no student gets below."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    teacher, tokenizer = AutoModelForCausalLM.from_pretrained(TEACHER, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(TEACHER)
    nll, tokens = 0.0, 0
    for seed, (name, count) in enumerate((("train", size.stories), ("held-out", size.held_out))):
        torch.manual_seed(seed)
        # It ends a story by beginning the next one.
        begin, ends = torch.full((count, 1), tokenizer.bos_token_id), [tokenizer.bos_token_id, tokenizer.eos_token_id]
        written = teacher.generate(begin, do_sample=True, top_k=0, max_new_tokens=size.longest, eos_token_id=ends, pad_token_id=0)
        texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in written]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        with torch.no_grad():
            logs = teacher(input_ids=written).logits[:, :-1].log_softmax(-1).gather(2, written[:, 1:, None])[..., 0]
        is_story = written[:, 1:] > tokenizer.eos_token_id
        nll, tokens = -float(logs[is_story].sum()), int(is_story.sum())
    return {"held_out_tokens": tokens, "teacher_nll": nll / tokens}


def save_student(folder: Path) -> dict[str, int]:
    """A config of a quarter of the teacher's parameters, with its tokenizer; returns the parameters of both."""
    from transformers import AutoConfig, AutoModelForCausalLM

    shutil.copytree(TEACHER, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = AutoConfig.from_pretrained(TEACHER)
    teacher = AutoModelForCausalLM.from_config(config).num_parameters()
    config.hidden_size, config.intermediate_size, config.num_hidden_layers = 32, 96, 4
    config.num_attention_heads, config.num_key_value_heads = 4, 2
    config.save_pretrained(folder)
    return {"teacher": teacher, "student": AutoModelForCausalLM.from_config(config).num_parameters()}


def recipe_of(arm: str, learning_rate: float, size: Size, folder: Path) -> dict:
    train = {"max_steps": size.steps, "per_device_train_batch_size": size.batch, "learning_rate": learning_rate}
    train |= {"warmup_steps": size.steps // 12, "logging_steps": 1, "eval_steps": size.steps // 6}
    data = {"train": str(folder / "train.jsonl"), "eval": str(folder / "held-out.jsonl"), "cache_dir": str(folder / "data")}
    recipe = {
        "task": "sft" if arm == PLAIN else "distill",
        "model": {"init": str(folder / "student")},
        "data": data | {"max_length": 512},
        "train": train,
        "checkpoint": {"auto": False},
        "tracking": {"mode": "disabled"},
        "output_dir": str(folder / f"{arm.replace(' ', '-')}-{learning_rate:g}"),
    }
    if arm != PLAIN:
        recipe["teacher"] = {"name_or_path": str(TEACHER), "source": "cache" if arm == CACHED else "resident"}
    return recipe


# ---- runs


def harness(verb: str, recipe: dict) -> None:
    file = Path(f"{recipe['output_dir']}.yaml")
    file.write_text(json.dumps(recipe, indent=2))  # JSON is YAML
    done = subprocess.run([sys.executable, "-m", "harness", verb, str(file)], capture_output=True, text=True, env=environment())
    if done.returncode:
        raise SystemExit(f"harness {verb} {file}: exit code {done.returncode}\n{done.stdout[-3000:]}{done.stderr[-2000:]}")


def run_arm(arm: str, learning_rate: float, size: Size, folder: Path) -> dict:
    """Train, and return the curves: of training the whole loss and the KL, of held-out stories the cross-entropy."""
    recipe = recipe_of(arm, learning_rate, size, folder)
    harness("run", recipe)
    lines = [json.loads(line) for line in (Path(recipe["output_dir"]) / "metrics.jsonl").read_text().splitlines()]
    held_out = "eval/loss" if arm == PLAIN else "eval/cross_entropy"
    curves = {name: [line[name] for line in lines if name in line] for name in ("train/loss", "distill/kl", held_out)}
    result = {"arm": arm, "learning_rate": learning_rate, "loss": curves["train/loss"], "kl": curves["distill/kl"]}
    return result | {"held_out": curves[held_out], "lowest": min(curves[held_out])}


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(HERE.parent), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_WAIT_POLICY": "PASSIVE"}


def measure(size: Size, folder: Path) -> dict:
    begun, machine = time.perf_counter(), describe_machine("cpu")
    parameters, stories = save_student(folder / "student"), write_stories(folder, size)
    harness("capture", recipe_of(CACHED, size.learning_rates[0], size, folder))
    # All three arms at once: nothing is timed.
    with ThreadPoolExecutor(len(ARMS)) as pool:
        made = [pool.submit(run_arm, arm, rate, size, folder) for rate in size.learning_rates for arm in ARMS]
        runs = [run.result() for run in made]
    return {
        "date": time.strftime("%Y-%m-%d %H:%M %Z"),
        "git_commit": git_commit(),
        "machine": machine | {"load_after": os.getloadavg()[0]},
        "versions": library_versions(),
        "size": asdict(size),
        "parameters": parameters,
        "stories": stories,
        "runs": runs,
        **compare(runs),
        "seconds": time.perf_counter() - begun,
    }


def compare(runs: list[dict]) -> dict:
    """best: each arm's lowest cross-entropy. gaps: how far the cached curves lie from the resident ones, as a share of the latter."""
    best = {arm: min((run for run in runs if run["arm"] == arm), key=lambda run: run["lowest"]) for arm in ARMS}
    pairs = [[next(run for run in runs if (run["arm"], run["learning_rate"]) == (arm, rate)) for arm in (CACHED, RESIDENT)]
             for rate in sorted({run["learning_rate"] for run in runs})]  # fmt: skip
    gaps = {
        key: max(abs(a - b) / b for cached, resident in pairs for a, b in zip(cached[key], resident[key], strict=True))
        for key in ("loss", "kl", "held_out")
    }
    return {"best": {arm: {"learning_rate": run["learning_rate"], "lowest": run["lowest"]} for arm, run in best.items()}, "gaps": gaps}


# ---- the report


def render(result: dict) -> str:
    size, best, gaps, parameters, machine = (result[key] for key in ("size", "best", "gaps", "parameters", "machine"))
    rows = [
        f"| {run['arm']} | {run['learning_rate']:g} | {' | '.join(f'{value:.3f}' for value in run['held_out'])} |" for run in result["runs"]
    ]
    steps = [f"step {size['steps'] // 6 * number}" for number in range(1, len(result["runs"][0]["held_out"]) + 1)]
    gain = best[PLAIN]["lowest"] - max(best[CACHED]["lowest"], best[RESIDENT]["lowest"])
    return "\n".join(
        [
            "# stories260K teaches a student a quarter of its size",
            "",
            f"{result['date']}, commit {result['git_commit'] or 'unknown'}. {machine['device']}, {machine['cpus']} cores, load "
            f"{machine['load_before']:.1f} at the start.",
            ", ".join(f"{name} {version}" for name, version in result["versions"].items()) + f"; Python {machine['python']}.",
            "",
            f"Teacher {parameters['teacher']:,} parameters, student {parameters['student']:,}; {size['stories']} stories by the teacher, "
            f"{size['held_out']} held-out ones ({result['stories']['held_out_tokens']:,} tokens); {size['steps']} steps of {size['batch']} "
            "rows, distill.weight 0.5. Cross-entropy of held-out stories in nats per token; the teacher's own, without the ends, is "
            f"{result['stories']['teacher_nll']:.3f}.",
            "",
            f"| | learning rate | {' | '.join(steps)} |",
            f"|---|---|{'---|' * len(steps)}",
            *rows,
            "",
            f"At the lowest point of each arm's best rate the teacher brings {gain:.3f} nats per token: "
            + "; ".join(f"{arm} {found['lowest']:.3f} ({found['learning_rate']:g})" for arm, found in best.items())
            + ".",
            "",
            f"Cached and resident curves differ by at most {gaps['loss']:.1e} of the loss, {gaps['kl']:.1e} of the KL and "
            f"{gaps['held_out']:.1e} of the held-out cross-entropy, at any step and rate: of each distribution the cache has the "
            "entries that hold 0.99 of its mass, and one for the rest.",
        ]
    ) + "\n"  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks/distill_stories.py", description=__doc__.splitlines()[0])
    parser.add_argument("--trial", action="store_true", help="one rate and few steps: no measurement; with --results")
    parser.add_argument("--results", type=Path, help="folder for distill-stories.{json,md}; left out: benchmarks/results")
    options = parser.parse_args(argv)
    if options.trial and options.results is None:
        parser.error("--trial measures nothing: give --results FOLDER, so that it replaces no measurement")
    if not TEACHER.is_dir():
        raise SystemExit(f"{TEACHER}: the teacher is not there; it is real data, which is not part of the repository")
    with tempfile.TemporaryDirectory(prefix="bench-stories-") as work:
        result = measure(TRIAL if options.trial else FULL, Path(work))
    target = (options.results or HERE / "results") / "distill-stories"
    save_result(result, render(result), target)


if __name__ == "__main__":
    main()
