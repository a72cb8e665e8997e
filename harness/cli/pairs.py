import os
import sys
from pathlib import Path

import click

from harness.checkpoint.door import Signals
from harness.cli.arguments import RECIPE_CONTEXT, read_overrides
from harness.cli.run import visible_gpus
from harness.cli.tables import print_table
from harness.cli.workers import supervise
from harness.distributed import local_rank, rank, world_size
from harness.errors import RecipeError
from harness.launcher import Machines
from harness.logs import quieten
from harness.run import RunDir
from harness.tools import FAILURES, did_you_mean


@click.command("pairs", context_settings=RECIPE_CONTEXT)
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--data", multiple=True, required=True, metavar="FILE", help="Questions with gold answers to mine; may be given again.")
@click.option("--exclude", multiple=True, metavar="FILE", help="Questions that you evaluate on, beside the run's own held-out rows.")
@click.option("--classes", metavar="A,B", help=f"Only these failures.  [default: all: {', '.join(FAILURES)}]")
@click.option("--max-per-class", type=click.IntRange(1), help="At most so many pairs of each failure, drawn by lot.")
@click.option("--edits", is_flag=True, help="Where the model is right, make a negative of the gold by one small edit.")
@click.option("--output-dir", type=click.Path(path_type=Path), help="Where all is written.  [default: RUN/pairs]")
@click.option("--processes", type=click.IntRange(1), help="On this machine, each with a whole model.  [default: one per GPU]")
@click.argument("overrides", nargs=-1, type=click.UNPROCESSED)
def command(
    run: Path,
    data: tuple[str, ...],
    exclude: tuple[str, ...],
    classes: str | None,
    max_per_class: int | None,
    edits: bool,
    output_dir: Path | None,
    processes: int | None,
    overrides: tuple[str, ...],
):
    """Have RUN's exported model answer the questions of --data, and make preference pairs of its failures: rejected is what it wrote,
    chosen the gold. How it answers is set by keys of `generate`, as generate.samples_per_prompt=4 generate.temperature=0.8.

    The work is in units, as of `harness generate`: the same command goes on. Ctrl-C (or SIGTERM, SIGUSR1) leaves with 75.
    """
    settings = read_overrides(overrides)
    asked_classes = read_classes(classes)
    folder = RunDir(run.expanduser().resolve())
    folder.read_manifest()
    target = (output_dir or folder.path / "pairs").expanduser().resolve()
    if target == folder.path or RunDir(target).manifest.is_file():
        raise RecipeError(f"--output-dir {target}: is a run's own folder; give one of its own, such as {target / 'pairs'}")
    quieten()
    from harness.tasks.pairs import Wanted, check_has_pairs, plan_pairs, save_pairs

    if "RANK" in os.environ:
        ask_here(target)
        return
    wanted = Wanted(data, exclude, asked_classes, max_per_class, edits)
    plan = plan_pairs(folder, target, wanted, settings, click.echo)
    spread = plan.recipe.generate.device_map
    processes = processes or (1 if spread else max(1, visible_gpus()))
    if spread and processes > 1:
        raise RecipeError(f"generate.device_map = {spread}; one process takes all GPUs of its machine; use --processes 1")
    if processes > 1:
        argv = [sys.executable, "-m", "harness", "pairs", str(folder.path), "--data", data[0], "--output-dir", str(target)]
        if code := supervise(argv, Machines(processes), {}, together=False):
            sys.exit(code)
    report = save_pairs(plan, ask_here(target), wanted)
    show(report, target)
    check_has_pairs(report, target)


def read_classes(classes: str | None) -> tuple[str, ...]:
    """Raises RecipeError for a failure that is none."""
    if classes is None:
        return FAILURES
    for name in (names := classes.split(",")):
        if name not in FAILURES:
            raise RecipeError(f'--classes: "{name}" is no failure{did_you_mean(name, FAILURES)}; there are {", ".join(FAILURES)}')
    return tuple(names)


def ask_here(folder: Path) -> dict:
    """As one worker, in this process."""
    signals = Signals()
    signals.install()
    import torch

    from harness.tasks.pairs import ask
    from harness.units import Worker

    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank())
    worker = Worker(rank(), world_size())
    label = f"[{worker.index}/{worker.count}] " if worker.count > 1 else ""

    def tell(text: str) -> None:
        click.echo("".join(f"{label}{line}\n" for line in text.splitlines()), nl=False)

    return ask(folder, worker, stop=lambda: signals.got and signals.got.name, say=tell)


def show(report: dict, folder: Path) -> None:
    from harness.evaluate.mining import REASONS, warnings_about
    from harness.tasks.pairs import PAIRS

    heading = ("class", "pairs", "edited", "chosen tokens", "mean gap", "chosen longer", "chosen shorter")
    rows = [
        (
            name,
            f"{found['pairs']:,}",
            f"{found['edited']:,}",
            f"{found['chosen_tokens']:.1f}",
            f"{found['gap_tokens']:+.1f}",
            f"{found['chosen_is_longer']:,}",
            f"{found['chosen_is_shorter']:,}",
        )
        for name, found in (*report["classes"].items(), ("all", report["all"]))
        if found
    ]
    click.echo(f"{report['questions']:,} questions, {report['answers']:,} answers, {report['right']:,} of them right")
    if report["questions_trained_on"]:
        click.echo(f"{report['questions_trained_on']:,} of the questions are rows that the run was trained on")
    if rows:
        print_table(heading, rows, right=heading[1:])
    for reason, count in report["left_out"].items():
        click.echo(f"left out: {count:,} {REASONS[reason]}")
    for warning in warnings_about(report):
        click.echo(warning)
    click.echo(f"{report['pairs']:,} pairs: {folder / PAIRS}")
