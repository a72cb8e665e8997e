"""DPO by `harness run` beside TRL's own script, `python -m trl.scripts.dpo`: same weights, pairs, batches and order, in one run.

    python benchmarks/dpo.py [--device cpu|cuda]        writes benchmarks/results/dpo-<cpu|gpu>.{json,md}

Two kinds of pairs: `tools`, long prompts (schemas) and short answers (calls), and `chat`, short prompts and long answers. Two variants: an
adapter (both sides switch it off for the reference), and all weights (ours with a cached reference; TRL's with the reference beside the
policy, its default, and with precompute_ref_log_probs). All sides take turns, one optimiser step each (sft.py: race). Precision, optimiser,
batch and order are equal, nothing is checkpointed, and the losses must agree at every step, or there is no result.

Tokens per second are of the pairs, prompt and answer of both sides, as TRL reads them; a prompt that we read once counts twice.
"""

import argparse
import json
import os
import random
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from sft import SIZES as SFT_SIZES  # noqa: E402
from sft import Side, Size, describe_machine, race, save_model, save_result, save_tokenizer, say, spread  # noqa: E402

from harness.run import git_commit, library_versions  # noqa: E402

SEED = 7
SKIP = 2
"""Steps at the start that do not count: allocators and caches fill."""
TOLERANCE = {"cpu": {"adapter": 1e-2, "full": 2e-3}, "gpu": {"adapter": 3e-2, "full": 3e-2}}
"""Relative. AdamW's first steps divide by nearly nothing, which makes much of rounding; and the two draw an adapter's A from other places
of the random numbers."""
AIMS = {"adapter": 1.2, "full": 1.3}
LENGTHS = {"tools": ((6.0, 0.5, 100, 1600), (3.6, 0.5, 8, 160)), "chat": ((4.0, 0.6, 16, 300), (5.3, 0.6, 30, 800))}
"""Of prompts and of answers: log-normal (mu, sigma), clipped to (least, most) tokens."""


@dataclass(frozen=True)
class Plan:
    model: Size
    batch: int
    """Pairs."""
    steps: int
    lora_r: int = 16


PLANS = {
    "cpu": Plan(replace(SFT_SIZES["cpu"], vocabulary=8192, hidden=192), batch=4, steps=12),
    "gpu": Plan(replace(SFT_SIZES["gpu"], vocabulary=128_256, hidden=2048, heads=16), batch=4, steps=40),
}
TRIAL = Plan(replace(SFT_SIZES["cpu"], vocabulary=300, hidden=32, layers=2, heads=2), batch=2, steps=4)


# ---- what all sides are given


def make_pairs(plan: Plan, kind: str) -> list[dict]:
    rng = random.Random(f"{SEED} {kind}")

    def words(count: int) -> str:
        return " ".join(f"w{rng.randrange(plan.model.vocabulary - 8)}" for _ in range(count))

    def length(mu: float, sigma: float, least: int, most: int) -> int:
        return min(most, max(least, round(rng.lognormvariate(mu, sigma))))

    of_prompt, of_answer = LENGTHS[kind]
    return [
        {
            "prompt": [{"role": "user", "content": words(length(*of_prompt))}],
            "chosen": [{"role": "assistant", "content": words(length(*of_answer))}],
            "rejected": [{"role": "assistant", "content": words(length(*of_answer))}],
        }
        for _ in range(plan.batch * plan.steps)
    ]


def training(plan: Plan, device: str) -> dict:
    """Said on both sides."""
    return {
        "max_steps": plan.steps,
        "learning_rate": 1e-4,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "seed": SEED,
        "per_device_train_batch_size": plan.batch,
        "optim": "adamw_torch_fused",
        "max_grad_norm": 1.0,
        "gradient_checkpointing": False,
        "bf16": device == "gpu",
    }


def harness_side(name: str, folder: Path, plan: Plan, device: str, kind: str, *, lora: bool) -> Side:
    folder.mkdir(parents=True)
    # SDPA on a GPU too, as TRL's script has it.
    model = {"name_or_path": str(folder.parents[1] / "base"), "attn_implementation": "sdpa", "dtype": "float32"}
    recipe = {
        "task": "dpo",
        "model": model | ({"lora": {"r": plan.lora_r, "alpha": 2 * plan.lora_r}} if lora else {}),
        "data": {
            "train": str(folder.parents[1] / kind / "train.jsonl"),
            "max_length": plan.model.max_length,
            "cache_dir": str(folder / "cache"),
        },
        "dpo": {"reference": "auto"},
        "train": training(plan, device),
        "checkpoint": {"auto": False},
        "tracking": {"mode": "disabled"},
        "output_dir": str(folder / "run"),
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe, indent=2))  # JSON is YAML
    return Side(name, [sys.executable, "-m", "harness", "run", str(folder / "recipe.yaml")])


def trl_side(name: str, folder: Path, plan: Plan, device: str, kind: str, *, lora: bool, **options) -> Side:
    folder.mkdir(parents=True)
    given = training(plan, device) | {
        "model_name_or_path": folder.parents[1] / "base",
        "dataset_name": folder.parents[1] / kind,
        "max_length": plan.model.max_length,
        "attn_implementation": "sdpa",
        "dtype": "float32",
        "report_to": "none",
        "save_strategy": "no",
        "output_dir": folder / "run",
    }
    given |= {"use_cpu": True} if device == "cpu" else {}
    if lora:
        given |= {
            "use_peft": True,
            "lora_r": plan.lora_r,
            "lora_alpha": 2 * plan.lora_r,
            "lora_target_modules": "all-linear",
            "lora_dropout": 0.0,
        }
    words = [word for key, value in (given | options).items() for word in (f"--{key}", str(value))]
    return Side(name, [sys.executable, "-m", "trl.scripts.dpo", *words])


def make_sides(folder: Path, plan: Plan, device: str, kind: str, variant: str) -> list[Side]:
    """Ours first."""
    given, lora = (plan, device, kind), variant == "adapter"
    sides = [
        harness_side("harness", folder / "harness", *given, lora=lora),
        trl_side("TRL", folder / "trl", *given, lora=lora),
    ]
    if not lora:
        sides.append(
            trl_side("TRL, precompute_ref_log_probs", folder / "trl-precomputed", *given, lora=False, precompute_ref_log_probs=True)
        )
    return sides


# ---- measured


def measure(work: Path, plan: Plan, device: str, kind: str, variant: str) -> dict:
    folder = work / f"{kind}-{variant}"
    sides = make_sides(folder, plan, device, kind, variant)
    race(sides, folder, "file")
    ours, *others = sides
    losses = {side.name: [step.loss for step in side.steps[1:]] for side in sides}
    gap = max(abs(a - b) / abs(a) for other in others for a, b in zip(losses[ours.name], losses[other.name], strict=True))
    if not gap <= TOLERANCE[device][variant]:
        raise SystemExit(
            f"{kind}, {variant}: losses differ by {gap:.1e}, over {TOLERANCE[device][variant]:.0e}: not the same training\n{losses}"
        )
    # What TRL counts; ours reads a prompt once.
    tokens = [step.tokens for step in others[0].steps[SKIP:]]
    found = {"kind": kind, "variant": variant, "largest_loss_difference": gap, "losses": losses, "sides": []}
    for side in sides:
        steps, own = side.steps[SKIP:], ours.steps[SKIP:]
        found["sides"].append(
            {
                "side": side.name,
                "tokens_per_s": sum(tokens) / sum(step.seconds for step in steps),
                "step_s": spread([step.seconds for step in steps]),
                "cpu_s": spread([step.cpu_seconds for step in steps]),
                "harness_is_faster": spread([a.seconds / b.seconds for a, b in zip(steps, own, strict=True)]),
                "harness_is_faster_in_cpu_s": spread([a.cpu_seconds / b.cpu_seconds for a, b in zip(steps, own, strict=True)]),
                "peak_bytes": side.peak_bytes,
                "harness_peak_over_this": ours.peak_bytes / side.peak_bytes,
                "first_step_s": side.first_step_s,
                "tokens_read": sum(step.tokens for step in steps),
            }
        )
        last, times = found["sides"][-1], found["sides"][-1]["harness_is_faster"]["median"]
        say(f"{kind}, {variant}: {side.name}: {last['tokens_per_s']:,.0f} tokens/s; harness is {times:.2f} times as fast")
    return found


def run(device: str, plan: Plan, work: Path) -> dict:
    began, machine = time.perf_counter(), describe_machine(device)
    save_tokenizer(plan.model, work / "base")
    parameters = save_model(plan.model, work / "base")
    shares = {}
    for kind in LENGTHS:
        pairs = make_pairs(plan, kind)
        (work / kind).mkdir()
        (work / kind / "train.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
        prompt = sum(len(pair["prompt"][0]["content"].split()) for pair in pairs)
        answers = sum(len(pair[side][0]["content"].split()) for pair in pairs for side in ("chosen", "rejected"))
        shares[kind] = 2 * prompt / (2 * prompt + answers)
    measured = [measure(work, plan, device, kind, variant) for variant in AIMS for kind in LENGTHS]
    return {
        "kind": device,
        "date": time.strftime("%Y-%m-%d %H:%M %Z"),
        "git_commit": git_commit(),
        "plan": asdict(plan),
        "parameters": parameters,
        "prompt_share": shares,
        "comparisons": measured,
        "machine": machine | {"load_after": os.getloadavg()[0]},
        "versions": library_versions(),
        "seconds": time.perf_counter() - began,
    }


def render(result: dict) -> str:
    machine, plan = result["machine"], result["plan"]
    lines = [
        f"# DPO: harness beside TRL's script ({result['kind'].upper()})",
        "",
        f"{machine['device']}, {machine['cpus']} cores, load {machine['load_before']:.1f} before and {machine['load_after']:.1f} after; "
        f"{result['date']}, commit {result['git_commit'][:12]}; " + ", ".join(f"{k} {v}" for k, v in result["versions"].items()) + ".",
        f"A Llama of {result['parameters'] / 1e6:.1f} M parameters (V {plan['model']['vocabulary']:,}), {plan['batch']} pairs a step, "
        f"{plan['steps']} steps of which the first {SKIP} do not count. `tools`: {result['prompt_share']['tools']:.0%} of the tokens are "
        f"prompt; `chat`: {result['prompt_share']['chat']:.0%}.",
        "",
        "| pairs | trained | side | tokens/s | harness is faster: median (range) | by CPU seconds | peak memory, MiB | harness ÷ this |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for found in result["comparisons"]:
        for side in found["sides"]:
            faster, cpu = side["harness_is_faster"], side["harness_is_faster_in_cpu_s"]
            lines.append(
                f"| {found['kind']} | {found['variant']} | {side['side']} | {side['tokens_per_s']:,.0f} | {faster['median']:.2f} "
                f"({faster['min']:.2f} to {faster['max']:.2f}) | {cpu['median']:.2f} | {side['peak_bytes'] / 2**20:,.0f} "
                f"| {side['harness_peak_over_this']:.2f} |"
            )
    lines += ["", "Losses of all sides of a comparison agree at every step; the largest relative difference:"]
    lines += [f"{found['kind']}, {found['variant']}: {found['largest_loss_difference']:.1e}." for found in result["comparisons"]]
    lines += ["", *(verdict(result, variant, aim) for variant, aim in AIMS.items())]
    return "\n".join(lines) + "\n"


def verdict(result: dict, variant: str, aim: float) -> str:
    """Beside TRL's default of that variant."""
    medians = {
        found["kind"]: found["sides"][1]["harness_is_faster"]["median"] for found in result["comparisons"] if found["variant"] == variant
    }
    met = "met" if min(medians.values()) >= aim else "met on some" if max(medians.values()) >= aim else "not met"
    return f"Aim, {variant}: at least {aim} times TRL's tokens per second: {met} ({', '.join(f'{k} {v:.2f}' for k, v in medians.items())})."


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks/dpo.py", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), help="left out: cuda where there is a GPU")
    parser.add_argument("--results", type=Path, help="folder for dpo-<cpu|gpu>.{json,md}; left out: benchmarks/results")
    parser.add_argument("--trial", action="store_true", help="a tiny model and few steps, no measurement; with --results")
    options = parser.parse_args(argv)
    if options.trial and options.results is None:
        parser.error("--trial measures nothing: give --results FOLDER, so that it replaces no measurement")
    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: this machine has no GPU that torch can use; leave it out to measure on the CPU")
    device = "gpu" if options.device != "cpu" and torch.cuda.is_available() else "cpu"
    os.environ["CUDA_VISIBLE_DEVICES"] = "" if device == "cpu" else os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    with tempfile.TemporaryDirectory(prefix="bench-dpo-") as work:
        result = run(device, TRIAL if options.trial else PLANS[device], Path(work))
    target = (options.results or HERE / "results") / f"dpo-{device}"
    save_result(result, render(result), target)


if __name__ == "__main__":
    main()
