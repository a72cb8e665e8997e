import json
import os
import sys
from pathlib import Path

import click

from harness.checkpoint.door import Signals
from harness.cli.arguments import Number
from harness.cli.run import visible_gpus
from harness.cli.tables import print_table
from harness.cli.workers import supervise
from harness.distributed import local_rank, rank, world_size
from harness.embedded import resolve
from harness.errors import RecipeError
from harness.launcher import Machines
from harness.logs import quieten
from harness.resources import shipped

FAILING_IN_TABLE, FAILING_CHARACTERS = 200, 4000
"""Rows that W&B gets, and characters of one cell; items.jsonl has them all."""


@click.command("evaluate")
@click.argument("target")
@click.option(
    "--suite", "suites", multiple=True, required=True, help="NAME=PATH[,PATH…]: bfcl, apibench, when2call, structured, calls, loss."
)
@click.option("--output", type=click.Path(path_type=Path), required=True, help="The folder of the results.")
@click.option("--max-items", type=click.IntRange(1), help="At most so many of each category, chosen by their content.  [default: all]")
@click.option("--max-new-tokens", type=click.IntRange(1), default=512, show_default=True, help="That an answer may have.")
@click.option("--batch-size", type=click.IntRange(1), default=16, show_default=True, help="Items at a time, which are one unit of work.")
@click.option("--temperature", type=Number(0), default=0.0, show_default=True, help="0 is greedy.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of what is drawn above temperature 0.")
@click.option("--underscore-names", is_flag=True, help='Show a function "a.b" as "a_b", which OpenAI\'s rules for names demand.')
@click.option("--processes", type=click.IntRange(1), help="On this machine, each with a whole model.  [default: one per GPU]")
@click.option("--shards", type=click.IntRange(1), default=1, help="So many workers share the work, on any machines.  [default: 1]")
@click.option("--shard", type=click.IntRange(0), default=0, help="Which of them this is, from 0.  [default: 0]")
@click.option("--model", help="What the server at a URL calls the model, where it serves several.")
@click.option("--api-key-variable", help="The environment variable with the server's key.")
@click.option(
    "--timeout-s", type=Number(min=0, min_open=True), default=120.0, show_default=True, help="Of one question to a server."
)
@click.option("--concurrency", type=click.IntRange(1), default=16, show_default=True, help="Questions that a server has at once.")
@click.option("--against", type=click.Path(path_type=Path), help="The output of another evaluation, to compare with on the same items.")
@click.option("--wandb", "project", help="A W&B project that gets the numbers and a table of the rows that fail.")
@click.option("--json", "as_json", is_flag=True, help="The summary, as a JSON object.")
def command(target, suites, output, processes, shards, shard, against, project, as_json, **options):
    """Ask TARGET, a run, a model's folder, a hub id or the URL of an OpenAI-compatible server, what the suites ask, and judge its answers.

    The work is in units: whoever is killed loses the one that was being done, and the same command goes on, with any number of workers.
    Ctrl-C (or SIGTERM, SIGUSR1) ends the running unit and leaves with 75.
    """
    wanted = [parse_suite(text) for text in suites]
    if shard >= shards:
        raise RecipeError(f"--shard {shard}; with --shards {shards} it goes from 0 to {shards - 1}")
    served = target.startswith(("http://", "https://"))
    if served and processes not in (None, 1):
        raise RecipeError(f"--processes {processes}; a server is asked by one process, so many questions at a time as --concurrency says")
    if not served and (options["model"] or options["api_key_variable"]):
        raise RecipeError("--model and --api-key-variable are for a URL, and the target is none")
    machines = Machines(1 if served else processes or max(1, visible_gpus()))
    output = output.expanduser().resolve()
    if against:
        from harness.evaluate.report import load_results

        # Now, and not when everything has been asked.
        load_results(against.expanduser().resolve())
    told = _Told(output, against, project, as_json)
    if "RANK" in os.environ or machines.processes == 1:
        index = shard * world_size() + rank()
        evaluate_here(target, wanted, output, index, shards * world_size(), quiet=as_json, **options)
        if index == 0 and "HARNESS_SUPERVISED" not in os.environ:
            told.tell()
        return
    # Those tell nothing; this one does when they are done.
    argv = [sys.executable, str(shipped("launch", "evaluate.py")), *_as_options(target, suites, output, shards, shard, as_json, options)]
    code = supervise(argv, machines, {"HARNESS_SUPERVISED": "1"}, together=False)
    if code:
        sys.exit(code)
    told.tell()


def parse_suite(text: str) -> tuple[str, list[Path]]:
    name, named, paths = text.partition("=")
    files = [Path(resolve(path)).expanduser() for path in paths.split(",") if path]
    if not named or not files:
        raise RecipeError(f"--suite {text}; must be NAME=PATH, or NAME=PATH,PATH for several files")
    return name, files


def _as_options(target, suites, output, shards, shard, as_json, options) -> list[str]:
    given = [target, *(part for suite in suites for part in ("--suite", suite)), "--output", str(output)]
    for name, value in {**options, "shards": shards, "shard": shard, "json": as_json}.items():
        option = f"--{name.replace('_', '-')}"
        if value is True:
            given.append(option)
        elif value is not None and value is not False:
            given += [option, str(value)]
    return given


# ---- this process


def evaluate_here(target: str, wanted: list, output: Path, index: int, count: int, *, quiet: bool, **options) -> None:
    """As one worker, in this process."""
    signals = Signals()
    signals.install()
    quieten()
    import torch

    from harness.tasks.answering import Connection, Settings
    from harness.tasks.evaluate import evaluate
    from harness.units import Worker

    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank())
    elif count > 1:
        # With other threads a CPU adds in another order, and the answers shall not depend on how many workers share them.
        torch.set_num_threads(1)
    connection = Connection(**{name: options.pop(name) for name in Connection.__dataclass_fields__})
    label = f"[{index}/{count}] " if count > 1 else ""

    def say(text: str) -> None:
        # A summary as JSON has stdout to itself.
        click.echo("".join(f"{label}{line}\n" for line in text.splitlines()), nl=False, err=quiet)

    evaluate(
        target,
        wanted,
        Settings(**options),
        output,
        Worker(index, count),
        connection=connection,
        stop=lambda: signals.got and signals.got.name,
        say=say,
    )


class _Told:
    """What a person is told at the end, by one process."""

    def __init__(self, output: Path, against: Path | None, project: str | None, as_json: bool):
        self.output, self.against, self.project, self.as_json = output, against, project, as_json

    def tell(self) -> None:
        from harness.evaluate.report import comparison_table, load_results, notes_of, table_of
        from harness.tasks.evaluate import save_comparison

        results = load_results(self.output)
        comparison = save_comparison(self.output, self.against.expanduser().resolve()) if self.against else None
        if self.project:
            self._log(results)
        if self.as_json:
            click.echo(json.dumps(results.summary | ({"comparison": comparison} if comparison else {}), indent=2, ensure_ascii=False))
            return
        click.echo()
        print_table(*table_of(results.summary))
        for note in notes_of(results.summary):
            click.echo(f"\n{note}")
        if comparison:
            click.echo(f"\nagainst {comparison['against']}, on the same items:\n")
            print_table(*comparison_table(comparison))
            for name, (this, other) in comparison["other_settings"].items():
                click.echo(f"\n{name} differs: {this} here, {other} there")
            if alone := comparison["only_in_this"] + comparison["only_in_against"]:
                click.echo(f"\n{alone} items were asked of one of them only, and are not compared")
        click.echo(f"\ncomplete: {self.output}")

    def _log(self, results) -> None:
        from harness.evaluate.report import logged_values
        from harness.tracking.wandb_run import log_evaluation

        columns = ("suite", "category", "id", "failure", "detail", "said")
        failing = [row for row in results.rows if row["failure"]][:FAILING_IN_TABLE]
        rows = [[str(row[name])[:FAILING_CHARACTERS] for name in columns] for row in failing]
        config = {name: results.summary[name] for name in ("target", "settings", "harness", "git_commit", "versions")}
        log_evaluation(self.output, self.project, config, logged_values(results.summary), columns, rows)
