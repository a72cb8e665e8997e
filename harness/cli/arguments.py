"""What the verbs that take a recipe share: `RECIPE [key=value ...] [--key.path value ...]`."""

import contextlib
import math
import signal
import sys
from collections.abc import Iterator

import click

from harness.errors import RecipeError
from harness.overrides import dashed_overrides
from harness.recipe import Recipe, load
from harness.recipe.load import leaf_keys
from harness.recipe.names import advise_key

RECIPE_CONTEXT = {"ignore_unknown_options": True, "allow_extra_args": True}


class Number(click.FloatRange):
    """FloatRange lets nan through any range, and inf through one that is open."""

    def convert(self, value, param, ctx):
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is no number that can be counted with.", param, ctx)
        return number


@contextlib.contextmanager
def tidy_on_sigterm() -> Iterator[None]:
    """Within it SIGTERM ends the command as an error does, so that what is half written goes away with it."""
    previous = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def recipe_argument(function):
    function = click.argument("overrides", nargs=-1, type=click.UNPROCESSED)(function)
    return click.argument("recipe")(function)


def load_recipe(recipe: str, overrides: tuple[str, ...]) -> Recipe:
    """The recipe with the overrides of the command line. Raises RecipeError, also for an option that the verb does not have."""
    return load(recipe, read_overrides(overrides))


def check_trains(recipe: Recipe) -> None:
    """Raises RecipeError for a recipe whose data are not rows to be trained."""
    if recipe.task == "generate":
        raise RecipeError("task = generate; its rows are prompts, which are tokenised as they are asked; use `harness generate RECIPE`")


def read_overrides(overrides: tuple[str, ...]) -> list[str]:
    """Those of the command line, all as `key.path=value`. Raises RecipeError, also for an option that the verb does not have."""
    _check_options(overrides)
    return dashed_overrides(list(overrides))


def _check_options(overrides: tuple[str, ...]) -> None:
    """`--procesess 2` is a misspelt option and no override: a recipe's section has a dot behind it."""
    context = click.get_current_context()
    options = [name.removeprefix("--") for parameter in context.command.params for name in parameter.opts if name.startswith("--")]
    for argument in overrides:
        name = argument.removeprefix("--").partition("=")[0]
        if argument.startswith("--") and "." not in name and name not in Recipe.model_fields:
            known = [*options, "help"]
            advice = advise_key(name, known, leaf_keys(Recipe))
            if advice in [f"did you mean `{option}`?" for option in known]:
                advice = advice.replace("`", "`--", 1)
            verb = context.info_name
            raise RecipeError(f"--{name}: no such option of harness {verb}; {advice} (a recipe's keys are written key.path=value)")
