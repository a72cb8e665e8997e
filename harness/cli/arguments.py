"""What the verbs that take a recipe share: `RECIPE [key=value ...] [--key.path value ...]`."""

import click

from harness.overrides import dashed_overrides
from harness.recipe import Recipe, load

RECIPE_CONTEXT = {"ignore_unknown_options": True, "allow_extra_args": True}


def recipe_argument(function):
    function = click.argument("overrides", nargs=-1, type=click.UNPROCESSED)(function)
    return click.argument("recipe")(function)


def load_recipe(recipe: str, overrides: tuple[str, ...]) -> Recipe:
    """The recipe with the overrides of the command line. Raises RecipeError."""
    return load(recipe, dashed_overrides(list(overrides)))
