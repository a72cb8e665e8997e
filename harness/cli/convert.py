import re
from pathlib import Path

import click

from harness.cli.arguments import Number, tidy_on_sigterm
from harness.errors import RecipeError

TARGETS = ("messages", "openai", "xlam")
"""As in harness/data/convert.py, which `harness --help` need not load."""


@click.command("convert")
@click.argument("file")
@click.option("--from", "layout", default="auto", help="The layout of FILE's rows.  [default: told by each row's keys]")
@click.option("--to", "target", type=click.Choice(TARGETS), default="messages", show_default=True, help="What to write.")
@click.option("--output", type=click.Path(path_type=Path), help="[default: FILE's name with .TO.jsonl, here]")
@click.option("--force", is_flag=True, help="Replace the output.")
@click.option("--on-error", type=click.Choice(["fail", "skip"]), default="fail", show_default=True, help="A row that cannot be converted.")
@click.option("--questions", is_flag=True, help="Rows that ask and have no answer are written too, for harness generate.")
@click.option("--without-gold", type=Number(0, 1), default=0.0, help="Share of retrieval rows without their gold passages.")
@click.option("--distractors", type=click.IntRange(0), help="Other passages, or other tools, in a row.  [default: all passages; 4 tools]")
@click.option("--seed", type=click.IntRange(0), default=42, show_default=True, help="Of the draws that the two before this make.")
@tidy_on_sigterm()
def command(file, layout, target, output, force, on_error, questions, without_gold, distractors, seed):
    """Write the rows of FILE (a file, a folder, a glob or a hub id) as JSON Lines of one layout, and say what was lost."""
    from harness.data.convert import convert, render_conversion
    from harness.data.formats import LAYOUTS, Settings

    if layout != "auto" and layout not in LAYOUTS:
        raise RecipeError(f"--from {layout}: no such layout; must be one of {', '.join(LAYOUTS)}")
    output = output or Path(f"{re.sub(r'[.](jsonl?|parquet)([.]gz)?$', '', Path(file).name)}.{target}.jsonl")
    settings = Settings(without_gold, distractors, seed)
    done = convert(file, target, output, layout=layout, settings=settings, on_error=on_error, questions=questions, force=force)
    click.echo(render_conversion(done, output))
