"""Does a reward model learn what it is asked? Two sets, judged on prompts that were not trained on, beside rules that read nothing.

    python benchmarks/reward.py                        writes benchmarks/results/reward-cpu.{json,md}
    python benchmarks/reward.py --base runs/quickstart/base/final    with a base that `harness run quickstart/base` has made before

world       embedded:pairs-*: right calls and minimally wrong ones, in which neither length nor the presence of a call tells which is which.
            LoRA on the base of the quickstart, which has learnt to call these tools.
toolpref    real turns of tool use, labelled good or bad and paired by prompt. A quarter of the users' last messages is held out. All
            weights of a small Llama, drawn at random.

The last weights of each seed are judged: none is chosen by what is reported. The rules: the longer (shorter) answer wins; the answer
without a call wins, else the longer one.
"""

import argparse
import hashlib
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from sft import describe_machine, save_result  # noqa: E402

from harness.run import git_commit, library_versions  # noqa: E402

TOOLPREF = HERE.parent.parent / "shared" / "data" / "toolpref"
ANSWERS = ("content", "tool_calls")
CALL, END = "<|call|>", "<|end|>"
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}<|assistant|>{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}<|call|>{{ c.function.name }} {{ c.function.arguments | tojson }}{% endfor %}<|end|>"
    "{% endgeneration %}"
    "{% else %}<|{{ m.role }}|>{{ m.content }}{% endif %}{% endfor %}"
)


RULE = "the answer without a call, else the longer"
TOO_EASY = (
    "A rule that reads nothing separates these pairs as well: they show that the loop works on real data, and not that anything was "
    "understood."
)
SETS = WORLD, PREFERENCES = "world", "toolpref"


@dataclass(frozen=True)
class Size:
    world_steps: int
    world_seeds: tuple[int, ...]
    toolpref_steps: int
    toolpref_seeds: tuple[int, ...]
    vocabulary: int = 4096
    hidden: int = 128
    layers: int = 3
    batch: int = 16
    longest: int = 1024


FULL = Size(world_steps=200, world_seeds=(0, 1), toolpref_steps=60, toolpref_seeds=(0, 1))
TRIAL = Size(world_steps=2, world_seeds=(0,), toolpref_steps=2, toolpref_seeds=(0,), vocabulary=512, hidden=32, layers=1)


# ---- what is trained on


def is_held_out(row: dict) -> bool:
    """By the user's last message, whose text alone decides."""
    question = [message["content"] for message in row["conversations"] if message["role"] == "user"][-1]
    return hashlib.sha256(question.encode()).digest()[0] < 64


def write_rows(folder: Path) -> list[str]:
    """Both files; returns the texts of the one that is trained on."""
    rows = [json.loads(line) for file in sorted(TOOLPREF.glob("*.jsonl")) for line in file.read_text(encoding="utf-8").splitlines()]
    # A few end with nobody's answer, or an empty one; harness refuses them.
    rows = [row for row in rows if row["conversations"][-1]["role"] == "assistant" and any(map(row["conversations"][-1].get, ANSWERS))]
    for name, held_out in (("train", False), ("held-out", True)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows if is_held_out(row) == held_out))
    return [json.dumps(row["conversations"]) for row in rows if not is_held_out(row)]


def save_model(folder: Path, texts: list[str], size: Size) -> int:
    """A config to draw weights from and a tokenizer that was made of the training texts; returns the parameters but for the score's."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    special = [END, "<|pad|>", CALL, "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>"]
    words = Tokenizer(models.BPE())
    words.pre_tokenizer, words.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    words.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=size.vocabulary, special_tokens=special, initial_alphabet=alphabet))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token=END, pad_token="<|pad|>", chat_template=TEMPLATE)
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=size.hidden, intermediate_size=3 * size.hidden, num_hidden_layers=size.layers,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=size.longest, tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    config.save_pretrained(folder)
    return AutoModelForCausalLM.from_config(config).num_parameters()


def recipe_of(what: str, seed: int, size: Size, folder: Path, base: Path) -> dict:
    steps = size.world_steps if what == WORLD else size.toolpref_steps
    if what == WORLD:
        model, rows = {"name_or_path": str(base), "lora": {"r": 16, "alpha": 32}}, ["embedded:pairs-train", "embedded:pairs-eval"]
    else:
        model, rows = {"init": str(folder / "model")}, [str(folder / "train.jsonl"), str(folder / "held-out.jsonl")]
    train, held_out = ([{"path": path}] for path in rows)
    return {
        "task": "reward",
        "model": model,
        "data": {"train": train, "eval": held_out, "cache_dir": str(folder / "data"), "max_length": size.longest},
        "reward": {"center_rewards_coefficient": 0.01},
        "train": {
            "max_steps": steps,
            "per_device_train_batch_size": size.batch,
            "learning_rate": 3e-3 if what == WORLD else 1e-3,
            "warmup_ratio": 0.1,
            "logging_steps": max(steps // 10, 1),
            "eval_steps": max(steps // 4, 1),
            "seed": seed,
        },
        "checkpoint": {"auto": False},
        "tracking": {"mode": "disabled"},
        "output_dir": str(folder / f"{what}-{seed}"),
    }


# ---- runs


def harness_run(*arguments: str) -> None:
    done = subprocess.run([sys.executable, "-m", "harness", "run", *arguments], capture_output=True, text=True, env=environment())
    if done.returncode:
        raise SystemExit(f"harness run {' '.join(arguments)}: {done.returncode}\n{done.stdout[-3000:]}{done.stderr[-2000:]}")


def train_base(folder: Path, *, trial: bool) -> Path:
    steps = ("train.max_steps=2", "train.warmup_steps=0", "train.eval_steps=2") if trial else ()
    harness_run("quickstart/base", f"output_dir={folder / 'base'}", "tracking.mode=disabled", *steps)
    return folder / "base" / "final"


def run_seed(what: str, seed: int, size: Size, folder: Path, base: Path) -> dict:
    """Train; return what was logged of held-out pairs, and of each pair the scores, the lengths in tokens and whether an answer calls."""
    from harness.data.store import load_prepared
    from harness.model.reward import load_reward_model

    recipe = recipe_of(what, seed, size, folder, base)
    file = Path(f"{recipe['output_dir']}.yaml")
    file.write_text(json.dumps(recipe, indent=2))  # JSON is YAML
    harness_run(str(file))
    run = Path(recipe["output_dir"])
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    prepared = load_prepared(json.loads(next(run.glob("logs/attempt-1/prepared-*.json")).read_text())["folder"])
    judge, rows = load_reward_model(run), prepared.eval
    mark = "<tool_call>" if what == WORLD else CALL

    def calls(labels: list[int]) -> bool:
        return mark in judge.tokenizer.decode([label for label in labels if label != -100])

    sides = {
        side: {
            "scores": judge.score(rows[f"{side}_input_ids"]),
            "lengths": [sum(label != -100 for label in labels) for labels in rows[f"{side}_labels"]],
            "calls": [calls(labels) for labels in rows[f"{side}_labels"]],
        }
        for side in ("chosen", "rejected")
    }
    logged = [{key: line[key] for key in line if key.startswith("eval/") or key == "step"} for line in lines if "eval/accuracy" in line]
    trained = [{key: line[key] for key in ("step", "train/loss", "train/accuracy")} for line in lines if "train/accuracy" in line]
    return {"set": what, "seed": seed, "trained_pairs": len(prepared.train), "held_out": logged, "train": trained, **sides}


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(HERE.parent), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}


# ---- what is reported


def wilson(right: float, count: int, z: float = 1.959964) -> tuple[float, float]:
    """The 95 % interval of a rate (Wilson 1927)."""
    if not count:
        return 0.0, 1.0
    rate, scale = right / count, 1 + z * z / count
    middle, half = rate + z * z / (2 * count), z * math.sqrt(rate * (1 - rate) / count + z * z / (4 * count * count))
    return (middle - half) / scale, (middle + half) / scale


def rate_of(chosen: list, rejected: list, where: list[bool] | None = None) -> dict:
    """How often the chosen one has more; a tie is half."""
    pairs = [(a, b) for a, b, counts in zip(chosen, rejected, where or [True] * len(chosen), strict=True) if counts]
    right = sum((a > b) + (a == b) / 2 for a, b in pairs)
    return {"pairs": len(pairs), "accuracy": right / max(len(pairs), 1), "interval": wilson(right, len(pairs))}


def judge_pairs(run: dict) -> dict:
    """The model and the rules that read nothing, on the same held-out pairs."""
    chosen, rejected = run["chosen"], run["rejected"]
    by_rule = [[(not calls, length) for calls, length in zip(side["calls"], side["lengths"], strict=True)] for side in (chosen, rejected)]
    both_call = [a == b for a, b in zip(chosen["calls"], rejected["calls"], strict=True)]
    shorter_is_right = [a < b for a, b in zip(chosen["lengths"], rejected["lengths"], strict=True)]
    scores = chosen["scores"], rejected["scores"]
    return {
        "reward model": rate_of(*scores),
        "the longer answer": rate_of(chosen["lengths"], rejected["lengths"]),
        "the shorter answer": rate_of(rejected["lengths"], chosen["lengths"]),
        RULE: rate_of(*by_rule),
        "reward model, where both or none calls": rate_of(*scores, both_call),
        "the longer answer, where both or none calls": rate_of(chosen["lengths"], rejected["lengths"], both_call),
        "reward model, where the shorter is right": rate_of(*scores, shorter_is_right),
    }


def measure(size: Size, folder: Path, base: Path | None, *, trial: bool) -> dict:
    begun, machine = time.perf_counter(), describe_machine("cpu")
    parameters = save_model(folder / "model", write_rows(folder), size)
    base = base or train_base(folder, trial=trial)
    seeds = {WORLD: size.world_seeds, PREFERENCES: size.toolpref_seeds}
    runs = [run_seed(what, seed, size, folder, base) for what in SETS for seed in seeds[what]]
    return {
        "date": time.strftime("%Y-%m-%d %H:%M %Z"),
        "git_commit": git_commit(),
        "machine": machine | {"load_after": os.getloadavg()[0]},
        "versions": library_versions(),
        "size": asdict(size),
        "parameters": parameters,
        "runs": [
            {key: run[key] for key in ("set", "seed", "trained_pairs", "held_out", "train")} | {"judged": judge_pairs(run)} for run in runs
        ],
        "seconds": time.perf_counter() - begun,
    }


def render(result: dict) -> str:
    machine, size = result["machine"], result["size"]
    about = {
        WORLD: f"LoRA on the quickstart's base, which has learnt to call these tools; {size['world_steps']} steps",
        PREFERENCES: f"{result['parameters']:,} parameters from random weights; {size['toolpref_steps']} steps",
    }
    lines = [
        "# Reward models on held-out prompts, beside rules that read nothing",
        "",
        f"{result['date']}, commit {result['git_commit'] or 'unknown'}. {machine['device']}, {machine['cpus']} cores, load "
        f"{machine['load_before']:.1f} at the start.",
        ", ".join(f"{name} {version}" for name, version in result["versions"].items()) + f"; Python {machine['python']}.",
        "",
        "Accuracy with its 95 % interval (Wilson); the last weights of each seed.",
    ]
    for what in SETS:
        lines += ["", *_table(what, about[what], [run for run in result["runs"] if run["set"] == what], size["batch"])]
    return "\n".join(lines) + "\n"


def _table(what: str, about: str, runs: list[dict], batch: int) -> list[str]:
    def cell(found: dict) -> str:
        low, high = found["interval"]
        return f"{found['accuracy']:.3f} ({low:.3f} to {high:.3f})" if found["pairs"] else "no such pair"

    first = runs[0]["judged"]
    rows = [f"| {name} | {first[name]['pairs']} | {' | '.join(cell(run['judged'][name]) for run in runs)} |" for name in first]
    for key in ("eval/log_loss", "eval/calibration_error"):
        measured = " | ".join(f"{run['held_out'][-1][key]:.3f}" for run in runs)
        rows.append(f"| {key.removeprefix('eval/')} | {first['reward model']['pairs']} | {measured} |")
    seeds = " | ".join(f"seed {run['seed']}" for run in runs)
    return [
        f"## {what}",
        "",
        f"{about} of {batch} of {runs[0]['trained_pairs']} pairs.",
        "",
        f"| on held-out pairs | pairs | {seeds} |",
        f"|---|---|{'---|' * len(runs)}",
        *rows,
        *(["", TOO_EASY] if what == PREFERENCES and first[RULE]["accuracy"] > 0.95 else []),
    ]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks/reward.py", description=__doc__.splitlines()[0])
    parser.add_argument("--trial", action="store_true", help="two steps of a smaller model: no measurement; with --results")
    parser.add_argument("--results", type=Path, help="folder for reward-cpu.{json,md}; left out: benchmarks/results")
    parser.add_argument("--base", type=Path, help="what `harness run quickstart/base` exported; left out: it is trained first")
    options = parser.parse_args(argv)
    if options.trial and options.results is None:
        parser.error("--trial measures nothing: give --results FOLDER, so that it replaces no measurement")
    if not TOOLPREF.is_dir():
        raise SystemExit(f"{TOOLPREF}: the pairs are not there; they are real data, which is not part of the repository")
    with tempfile.TemporaryDirectory(prefix="bench-reward-") as work:
        result = measure(TRIAL if options.trial else FULL, Path(work), options.base, trial=options.trial)
    target = (options.results or HERE / "results") / "reward-cpu"
    save_result(result, render(result), target)


if __name__ == "__main__":
    main()
