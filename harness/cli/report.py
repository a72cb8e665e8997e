import json
import os
from pathlib import Path

import click

from harness.cluster.status import find_runs
from harness.errors import LaunchError
from harness.report.headline import headline
from harness.report.page import render_page
from harness.report.story import FORMAT, Story, as_object, load_stories
from harness.run import RunDir, write_text_atomically

FILE = "report.html"


@click.command("report")
@click.argument("runs", nargs=-1, required=True, metavar="RUN...")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="The page.  [default: report.html in the run, or beside several]")
@click.option("--live", is_flag=True, help="Serve the page on localhost while the runs grow, and write nothing.")
@click.option("--port", type=click.IntRange(1, 65535), help="Of --live.  [default: a free one]")
@click.option("--json", "as_json", is_flag=True, help="Print what the page is drawn from, and write nothing.")
def command(runs: tuple[str, ...], output: Path | None, live: bool, port: int | None, as_json: bool):
    """Write the story of RUN as one HTML page: curves, lives, goodput, memory against the plan, recipe and lineage.

    RUN is a run folder, or a folder of runs (a pipeline, an array, the quickstart's); several are drawn over each other.
    """
    _check_options(output, live, port, as_json)
    found = find_all(runs)
    if live:
        from harness.report.live import serve

        serve(found, port)
    elif as_json:
        click.echo(json.dumps({"format": FORMAT, "runs": [as_object(story) for story in load_stories(found)]}, indent=2))
    else:
        stories = load_stories(found)
        file = write_report(stories, output or _default_file(runs, found))
        for story in stories:
            click.echo(f"{story.name}: {headline(story)}" if len(stories) > 1 else headline(story))
        click.echo(f"the report: {file}")


def _check_options(output: Path | None, live: bool, port: int | None, as_json: bool) -> None:
    if live and (output or as_json):
        raise click.UsageError(f"--live writes nothing; leave {'--output' if output else '--json'} out")
    if as_json and output:
        raise click.UsageError("--json prints, and writes no page; leave --output out")
    if port and not live:
        raise click.UsageError("--port is of --live; add it, or leave --port out")
    if output and output.is_dir():
        raise click.UsageError(f"--output {output}: is a folder; give a file, such as {output / FILE}")


def find_all(asked: tuple[str, ...]) -> list[RunDir]:
    """Each once. Raises LaunchError for what holds no run."""
    found = [run for one in asked for run in find_runs(one, Path("runs"))]
    return list({run.path: run for run in found}.values())


def _default_file(asked: tuple[str, ...], runs: list[RunDir]) -> Path:
    if len(runs) == 1:
        return runs[0].path / FILE
    folder = Path(asked[0]).expanduser()
    if len(asked) == 1 and folder.is_dir():
        return folder.resolve() / FILE
    return Path(os.path.commonpath([run.path.parent for run in runs])) / FILE


def write_report(stories: list[Story], file: Path) -> Path:
    """Raises LaunchError where the page cannot be written."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomically(file, render_page(stories))
    except OSError as error:
        raise LaunchError(f"{file}: cannot be written: {error.strerror}; say where with --output FILE") from error
    return file
