import sys

import click

from harness.cli.arguments import RECIPE_CONTEXT, check_trains, load_recipe, recipe_argument
from harness.logs import quieten


@click.command("preview", context_settings=RECIPE_CONTEXT)
@click.option("--rows", default=3, show_default=True, type=click.IntRange(1), help="How many rows to show.")
@recipe_argument
def command(recipe: str, overrides: tuple[str, ...], rows: int):
    """Show a few rows of RECIPE as the model will see them, with the trained tokens coloured, and the counts."""
    resolved = load_recipe(recipe, overrides)
    check_trains(resolved)
    quieten()
    from harness.data import prepare_recipe
    from harness.data.preview import render_preview
    from harness.data.report import render_report
    from harness.model import load_tokenizer
    from harness.tasks.templates import training_template

    tokenizer = load_tokenizer(resolved)
    prepared = prepare_recipe(resolved, tokenizer, packing=False, training_template=training_template)
    click.echo(render_preview(tokenizer, prepared.train, rows=rows, color=sys.stdout.isatty()))
    click.echo(render_report(prepared.report))
