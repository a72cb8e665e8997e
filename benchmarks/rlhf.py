"""RLOO with the tool-call scorer on a tiny model: what it makes of a model that was fine-tuned to get a third of its calls right.

    python benchmarks/rlhf.py                                        # results/rlhf-cpu.json and .md; about 5 minutes on 2 free cores
    python benchmarks/rlhf.py --steps 5 --results /tmp/trial         # a trial

Both phases are the commands that users type, `harness run sft.yaml` and `harness run rlhf.yaml`, over questions for two tools of the tiny
world (harness.quickstart.tools), one call each. The held-out questions occur in no training file. Exact match is of greedy answers, by the
one scorer, before and after on the same questions, with Wilson's interval and the number of questions that were won and lost; the sign
test is of these.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY), str(Path(__file__).resolve().parent)]

from sft import describe_machine, say  # noqa: E402

from harness.evaluate.statistics import wilson_interval  # noqa: E402
from harness.run import git_commit, library_versions  # noqa: E402

SFT_STEPS, RL_STEPS, ANSWERS, EACH = 100, 120, 256, 16
QUESTIONS = 512

SFT = """
task: sft
model: {init: "embedded:tiny-llama"}
data: {train: train.jsonl, max_length: 96}
train: {max_steps: 100, per_device_train_batch_size: 32, learning_rate: 6.0e-3, lr_scheduler_type: constant_with_warmup, warmup_steps: 20}
tracking: {mode: disabled}
output_dir: sft
"""
RLHF = """
task: rlhf
model: {name_or_path: ./sft/final}
data: {train: train.jsonl, max_length: 96}
rlhf: {algorithm: rloo, rewards: [{type: tool_calls}], num_generations: 16, max_completion_length: 36, beta: 0.0}
train: {per_device_train_batch_size: 256, learning_rate: 6.0e-4, lr_scheduler_type: constant_with_warmup, warmup_steps: 5, logging_steps: 5}
tracking: {mode: disabled}
output_dir: rlhf
"""


def write_rows(folder: Path) -> None:
    """The questions of the look-ups with the call that answers them, and nothing after it."""
    from harness.quickstart.tools import write_look_ups

    write_look_ups(folder, seed=0, train=2000, held_out=QUESTIONS)
    for split in ("train", "eval"):
        rows = [json.loads(line) for line in (folder / f"look-up-{split}.jsonl").read_text().splitlines()]
        text = "".join(json.dumps(row | {"messages": row["messages"][:2]}) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(text)


def run(folder: Path, name: str, recipe: str, *overrides: str) -> float:
    """Seconds that `harness run` takes."""
    (folder / f"{name}.yaml").write_text(recipe)
    begun = time.perf_counter()
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_WAIT_POLICY": "PASSIVE"}
    argv = [sys.executable, "-m", "harness", "run", f"{name}.yaml", *overrides]
    done = subprocess.run(argv, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise SystemExit(f"{name}: ended with {done.returncode}:\n{done.stdout[-3000:]}")
    return time.perf_counter() - begun


def right_answers(model: Path, questions: Path) -> tuple[list[bool], dict]:
    """Of each question whether the greedy answer is exactly right, and the scorer's summary."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from harness.evaluate.calls import evaluate_calls

    tokenizer = AutoTokenizer.from_pretrained(model)
    summary, answers = evaluate_calls(AutoModelForCausalLM.from_pretrained(model), tokenizer, questions, max_new_tokens=36, batch_size=128)
    return [answer.score.exact for answer in answers], summary


def sign_test(won: int, lost: int) -> float:
    """Two-sided probability of a difference at least as large if winning and losing were as probable."""
    count, fewer = won + lost, min(won, lost)
    return min(1.0, 2 * sum(math.comb(count, at) for at in range(fewer + 1)) / 2**count)


def measure(folder: Path, steps: int) -> dict:
    write_rows(folder)
    machine = describe_machine("cpu")
    say("fine-tuning")
    seconds = {"sft": run(folder, "sft", SFT)}
    before, summary_before = right_answers(folder / "sft" / "final", folder / "eval.jsonl")
    say(f"exactly right before: {sum(before) / len(before):.1%}; RLOO, {steps} steps")
    seconds["rlhf"] = run(folder, "rlhf", RLHF, f"train.max_steps={steps}")
    after, summary_after = right_answers(folder / "rlhf" / "final", folder / "eval.jsonl")
    won, lost = (sum(a and not b for a, b in zip(*pair, strict=True)) for pair in ((after, before), (before, after)))
    lines = [json.loads(line) for line in (folder / "rlhf" / "metrics.jsonl").read_text().splitlines()]
    kept = (
        "step",
        "train/reward",
        "train/entropy",
        "train/frac_reward_zero_std",
        "tools/exact_match",
        "speed/step_s",
        "speed/generation_s",
    )
    return {
        "date": time.strftime("%Y-%m-%d"),
        "git_commit": git_commit(),
        "machine": machine | {"load_after": os.getloadavg()[0]},
        "versions": library_versions(),
        "steps": {"sft": SFT_STEPS, "rlhf": steps, "answers_per_step": ANSWERS, "answers_per_prompt": EACH},
        "seconds": seconds,
        "questions": len(before),
        "before": _rate(before) | {"valid_schema": summary_before["valid_schema"]},
        "after": _rate(after) | {"valid_schema": summary_after["valid_schema"]},
        "won": won,
        "lost": lost,
        "sign_test_p": sign_test(won, lost),
        "curve": [{key: line[key] for key in kept} for line in lines if "train/reward" in line],
    }


def _rate(right: list[bool]) -> dict:
    return {"right": sum(right), "exact_match": sum(right) / len(right), "interval": wilson_interval(sum(right), len(right))}


def render(result: dict) -> str:
    machine, before, after, steps = (result[key] for key in ("machine", "before", "after", "steps"))
    rows = [
        f"| {name} | {each['exact_match']:.1%} | {each['interval'][0]:.1%} to {each['interval'][1]:.1%} | {each['valid_schema']:.1%} |"
        for name, each in (("fine-tuned", before), ("after RLOO", after))
    ]
    points = [point for at, point in enumerate(result["curve"]) if at % 4 == 0 or at == len(result["curve"]) - 1]
    return "\n".join(
        [
            "# RLOO with the tool-call scorer on a tiny model",
            "",
            f"{result['date']}, commit {result['git_commit'] or 'unknown'}. {machine['device']}, {machine['cpus']} cores; load "
            f"{machine['load_before']:.1f} at the start, {machine['load_after']:.1f} at the end.",
            ", ".join(f"{name} {version}" for name, version in result["versions"].items()) + f"; Python {machine['python']}.",
            "",
            f"A Llama of 115 thousand parameters, {steps['sft']} steps of fine-tuning on two tools, then {steps['rlhf']} steps of RLOO "
            f"with {steps['answers_per_step']} answers to {steps['answers_per_step'] // steps['answers_per_prompt']} prompts each. "
            f"{result['questions']} held-out questions, greedy answers.",
            "",
            "| | calls exactly right | 95 % interval (Wilson) | calls that fit their schema |",
            "|---|---|---|---|",
            *rows,
            "",
            f"Of the questions {result['won']} were won and {result['lost']} lost (sign test: p = {result['sign_test_p']:.1e}). "
            f"`harness run` took {result['seconds']['sft']:.0f} s for the first phase, {result['seconds']['rlhf']:.0f} s for the second.",
            "",
            "| step | reward | samples exactly right | prompts whose answers are all paid alike | entropy, nats per token |",
            "|---|---|---|---|---|",
            *(
                f"| {point['step']} | {point['train/reward']:.3f} | {point['tools/exact_match']:.1%} | "
                f"{point['train/frac_reward_zero_std']:.0%} | {point['train/entropy']:.3f} |"
                for point in points
            ),
            "",
        ]
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=RL_STEPS)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="rlhf-") as work:
        result = measure(Path(work), options.steps)
    options.results.mkdir(parents=True, exist_ok=True)
    (options.results / "rlhf-cpu.json").write_text(json.dumps(result, indent=1) + "\n")
    (options.results / "rlhf-cpu.md").write_text(render(result))
    say(render(result))


if __name__ == "__main__":
    main()
