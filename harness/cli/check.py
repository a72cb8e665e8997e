import click

from harness.cli.arguments import RECIPE_CONTEXT, load_recipe, recipe_argument
from harness.launcher import check_named
from harness.recipe import render_recipe
from harness.recipe.load import difference_from_defaults, render_value


@click.command("check", context_settings=RECIPE_CONTEXT)
@recipe_argument
def command(recipe: str, overrides: tuple[str, ...]):
    """Print RECIPE as it will run and how it differs from the defaults, or leave with 2 and everything that is wrong with it."""
    resolved = load_recipe(recipe, overrides)
    check_named(resolved)
    click.echo(render_recipe(resolved), nl=False)
    click.echo("\n# Differs from the defaults in:")
    for key, value in difference_from_defaults(resolved).items():
        click.echo(f"#   {key}: {render_value(value)}")
