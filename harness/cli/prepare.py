import click

from harness.cli.arguments import RECIPE_CONTEXT, check_trains, load_recipe, recipe_argument
from harness.logs import quieten


@click.command("prepare", context_settings=RECIPE_CONTEXT)
@recipe_argument
def command(recipe: str, overrides: tuple[str, ...]):
    """Tokenise RECIPE's data once, on a CPU, into a cache that every rank maps into memory."""
    resolved = load_recipe(recipe, overrides)
    check_trains(resolved)
    quieten()
    from harness.data import prepare_recipe
    from harness.data.report import render_report
    from harness.model import load_tokenizer
    from harness.tasks.templates import training_template

    prepared = prepare_recipe(
        resolved, load_tokenizer(resolved), packing=resolved.data.packing is True, training_template=training_template
    )
    click.echo(render_report(prepared.report))
    click.echo(f"prepared in {prepared.folder}")
