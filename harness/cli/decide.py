import json
from pathlib import Path

import click

from harness.cli.arguments import RECIPE_CONTEXT
from harness.cli.tables import print_table
from harness.evaluate.decision.schema import Decision, load_decision
from harness.overrides import dashed_overrides
from harness.run import write_text_atomically


@click.command("decide", context_settings=RECIPE_CONTEXT)
@click.argument("recipe")
@click.argument("overrides", nargs=-1, type=click.UNPROCESSED)
@click.option("--output", type=click.Path(path_type=Path), help="Where the report is written; else the recipe's output_dir.")
def command(recipe: str, overrides: tuple[str, ...], output: Path | None):
    """Ask the same items in every way that RECIPE names, and say for each behaviour: prompt, retrieve, fine-tune, or mend the data."""
    given = [*dashed_overrides(list(overrides)), *([f"output_dir={json.dumps(str(output))}"] if output else [])]
    write_report(load_decision(recipe, given), Path(recipe).stem)


def write_report(decision: Decision, title: str) -> dict:
    """Run the arms, write the report in its three forms, print what it decides."""
    from harness.evaluate.decision.page import render_page
    from harness.evaluate.decision.report import build_report, render_markdown
    from harness.evaluate.decision.run import run_arms

    folder = Path(decision.output_dir)
    # Before a model answers for hours.
    folder.mkdir(parents=True, exist_ok=True)
    report = build_report(decision, run_arms(decision, click.echo), title)
    write_text_atomically(folder / "report.json", json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    write_text_atomically(folder / "report.md", render_markdown(report))
    write_text_atomically(folder / "index.html", render_page(report))
    show(report, folder)
    return report


def show(report: dict, folder: Path) -> None:
    click.echo()
    rows = [(one["name"], str(one["items"]), one["verdict"], one["arm"] or "–", one["reasons"][0]) for one in report["behaviours"]]
    print_table(("behaviour", "items", "verdict", "by", "why"), rows, right=("items",))
    click.echo()
    if report["regressions"]:
        worse = [(one["behaviour"], one["arm"], f"{one['before']:.0%} → {one['after']:.0%}") for one in report["regressions"]]
        print_table(("got worse", "with", "rate"), worse)
    else:
        click.echo("nothing got significantly worse")
    for note in report["notes"]:
        click.secho(f"\n{note}", fg="yellow")
    click.echo(f"\nthe page: {folder / 'index.html'} (the same as report.md and report.json beside it; every answer in arms/)")
