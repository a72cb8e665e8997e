import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import click

from harness.errors import HarnessError
from harness.launcher import Machines
from harness.life import own_environment
from harness.logs import quieten
from harness.recipe import Recipe, load
from harness.recipe.schema import Distill
from harness.run import write_text_atomically

STAGES = (
    ("base", "quickstart/base", "embedded:base-eval", "full fine-tuning: six tools from nothing"),
    ("adapt", "quickstart/adapt", "embedded:adapt-eval", "LoRA: six tools that the base model has never seen"),
)
METRICS = {
    "exact_match": "call exactly right",
    "valid_json": "valid JSON",
    "valid_schema": "valid against the tool's schema",
    "right_abstention": "right to call nothing",
}
MAX_NEW_TOKENS = 48


@click.command("quickstart")
@click.option("--output-dir", default="runs/quickstart", show_default=True, type=click.Path(path_type=Path), help="Where all is written.")
def command(output_dir: Path):
    """Train a tiny tool-calling model here, adapt it to new tools, distill it into one of a third its size, and score each of them on
    held-out questions."""
    # Before torch starts its threads; harness.cli.run says why.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    begun = time.monotonic()
    stages, base = [], None
    for name, recipe, questions, what in STAGES:
        click.secho(f"\n{name}: {what}", bold=True)
        stages.append(run_stage(name, recipe, questions, output_dir, base))
        base = output_dir / name / "final"
    click.secho("\ndistill: the adapted model teaches one of a third its size; beside it the same one without a teacher", bold=True)
    sizes = distill(output_dir, STAGES[-1][2])
    click.secho("\nprefer: the taught student learns from pairs of what it should have said and what it said", bold=True)
    preferred = prefer(output_dir, STAGES[-1][2], sizes["taught"])
    seconds = time.monotonic() - begun
    results = {"stages": stages, "distill": sizes, "prefer": preferred, "seconds": round(seconds, 1)}
    write_text_atomically(output_dir / "results.json", json.dumps(results, indent=2) + "\n")
    from harness.tracking import plot_losses

    picture = plot_losses([output_dir / name for name, *_ in STAGES], output_dir / "losses.png")
    show(stages, sizes, preferred, seconds, output_dir, picture, report(output_dir))


def run_stage(name: str, recipe: str, questions: str, output_dir: Path, base: Path | None) -> dict:
    """Score, train, score again."""
    overrides = [f"output_dir={output_dir / name}"] + ([f"model.name_or_path={base}"] if base else [])
    loaded = load(recipe, overrides)
    # Before: the weights that training starts from. The first stage draws them with the run's seed, as the run itself will.
    before = score(base or drawn_weights(loaded, output_dir), questions)
    train(name, loaded)
    after = score(output_dir / name / "final", questions)
    return {"name": name, "before": before, "after": after}


def train(name: str, recipe: Recipe) -> None:
    """As `harness run` does."""
    from harness.cli.run import run_recipe

    succeed(name, run_recipe(recipe, Machines(1), fresh=True))


def succeed(name: str, code: int) -> None:
    if code:
        raise HarnessError(f"quickstart: the stage {name} failed with exit code {code}; its error stands above")


def distill(output_dir: Path, questions: str) -> dict:
    """{"teacher", "taught", "alone"}: parameters and scores of the adapted model, of a student that it taught, and of the same student that
    saw the gold tokens alone."""
    adapted, recipe = output_dir / STAGES[-1][0], "quickstart/distill"
    cache = output_dir / "teacher-cache"
    overrides = [f"output_dir={output_dir / 'distill'}", f"teacher.name_or_path={adapted / 'merged'}", f"teacher.cache={cache}"]
    # An earlier quickstart's, of another teacher of the same name, which would be refused.
    shutil.rmtree(cache, ignore_errors=True)
    by_hand("distill", "export", str(adapted), "--merge", "--force")
    by_hand("distill", "capture", recipe, *overrides)
    taught = load(recipe, overrides)
    alone = taught.model_copy(update={"task": "sft", "teacher": None, "distill": Distill(), "output_dir": str(output_dir / "alone")})
    train("distill", taught)
    train("distill", alone)
    models = {"teacher": adapted / "merged", "taught": Path(taught.output_dir) / "final", "alone": Path(alone.output_dir) / "final"}
    return {name: {"parameters": parameters(folder)} | score(folder, questions) for name, folder in models.items()}


def report(output_dir: Path) -> Path:
    """The story of all its runs as one page, as `harness report` writes it."""
    from harness.cli.report import FILE, write_report
    from harness.cluster.status import find_runs
    from harness.report.story import load_stories

    return write_report(load_stories(find_runs(str(output_dir), output_dir)), output_dir / FILE)


def by_hand(stage: str, *arguments: str) -> None:
    """A command in a process of its own, as a person runs it: one that shares out units of work takes signals and ranks for itself."""
    succeed(stage, subprocess.run([sys.executable, "-m", "harness", *arguments], env=own_environment()).returncode)


def prefer(output_dir: Path, questions: str, before: dict) -> dict:
    """{"pairs", "accuracy", "before", "after"}: pairs mined from the taught student's failures on questions that no other file has, the
    share of held-out ones whose chosen answer is the more probable one, and its scores on the questions, before and after DPO on them."""
    student = output_dir / "distill"
    shutil.rmtree(student / "pairs", ignore_errors=True)
    drawn = ["generate.samples_per_prompt=2", "generate.temperature=0.7"]
    by_hand("prefer", "pairs", str(student), "--data", "embedded:adapt-mining", "--exclude", questions, *drawn)
    pairs = student / "pairs" / "pairs.jsonl"
    run = output_dir / "prefer"
    train("prefer", load("quickstart/prefer", [f"output_dir={run}", f"model.name_or_path={student / 'final'}", f"data.train={pairs}"]))
    from harness.tracking import read_metrics

    accuracies = [line["eval/logps/accuracies"] for line in read_metrics(run) if "eval/logps/accuracies" in line]
    return {
        "pairs": len(pairs.read_text(encoding="utf-8").splitlines()),
        "accuracy": {"before": accuracies[0], "after": accuracies[-1]},
        "before": before,
        "after": score(run / "final", questions),
    }


def parameters(folder: Path) -> int:
    """That a model's files hold."""
    import math

    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "pt") as weights:
        return sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118 - no mapping


def drawn_weights(recipe, output_dir: Path) -> Path:
    from harness.model import draw_weights, load_tokenizer

    quieten()
    folder = output_dir / "untrained"
    # An earlier quickstart's, of another version of the world perhaps.
    shutil.rmtree(folder, ignore_errors=True)
    draw_weights(recipe, folder)
    load_tokenizer(recipe).save_pretrained(folder)
    return folder


def score(folder: Path, questions: str) -> dict:
    """The metrics of a model or adapter on held-out questions, by greedy decoding and the one scorer."""
    quieten()
    from harness.evaluate.calls import evaluate_calls
    from harness.model.export import load_for_inference

    model, tokenizer = load_for_inference(folder)
    metrics, answers = evaluate_calls(model, tokenizer, questions, max_new_tokens=MAX_NEW_TOKENS, batch_size=128)
    shown = answers[0]
    click.echo(f"  Q: {shown.question}\n  A: {shown.said or '(nothing)'}")
    return {key: metrics[key] for key in METRICS} | {"questions": metrics["count"]}


def show(stages: list[dict], sizes: dict, preferred: dict, seconds: float, output_dir: Path, picture: Path, page: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="held-out questions, before → after")
    table.add_column("measured")
    for stage in stages:
        table.add_column(f"{stage['name']} ({stage['before']['questions']} questions)", justify="right")
    for key, label in METRICS.items():
        table.add_row(label, *(f"{stage['before'][key]:.1%} → {stage['after'][key]:.1%}" for stage in stages))
    console = Console()
    console.print()
    console.print(table)
    table = Table(title="the adapter's questions, with a third of the parameters")
    table.add_column("measured")
    for label, name in (("teacher", "teacher"), ("student, taught", "taught"), ("student, without it", "alone")):
        table.add_column(f"{label} ({sizes[name]['parameters']:,})", justify="right")
    for key, label in METRICS.items():
        table.add_row(label, *(f"{scores[key]:.1%}" for scores in sizes.values()))
    console.print(table)
    table = Table(title=f"the taught student, before → after DPO on {preferred['pairs']} pairs of its own failures")
    table.add_column("measured")
    table.add_column("before → after", justify="right")
    accuracy = preferred["accuracy"]
    table.add_row("prefers the right answer (held-out pairs)", f"{accuracy['before']:.1%} → {accuracy['after']:.1%}")
    for key, label in METRICS.items():
        table.add_row(label, f"{preferred['before'][key]:.1%} → {preferred['after'][key]:.1%}")
    console.print(table)
    click.echo(
        f"""in {seconds:.0f} s. Before training the model calls nothing, so it is right wherever nothing should be called.
The adapter is for its own six tools: it was never shown the first six again, and calls them no more.
Both students begin at the same weights and see the same rows in the same order.

written to {output_dir}/
  results.json          the numbers above
  {page.name}           the whole story, as one page
  {picture.name}            training and held-out loss of both stages
  base/final            the fine-tuned model, adapt/final the adapter, adapt/merged the teacher, distill/final its student,
                        alone/final the student without it; recipe, logs and metrics.jsonl beside each
  teacher-cache         what the teacher says of each token
  distill/pairs         what the student got wrong, beside what was right; prefer/final the student that has learnt from it

talk to it:
  harness chat {output_dir}/base --tools embedded:base-eval    "tell me the weather in Oslo"; you answer its calls

next, with a real model and your own tool calls (data/tools.jsonl, in the layout `messages` + `tools` or xLAM):
  harness preview sft/llama3-8b-tools-qlora data.train=data/tools.jsonl    what will be trained, token by token
  harness run sft/llama3-8b-tools-qlora data.train=data/tools.jsonl --smoke    two steps on the longest rows: does it fit?
  harness run sft/llama3-8b-tools-qlora data.train=data/tools.jsonl"""
    )
