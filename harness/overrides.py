"""Overrides of a recipe on a command line, for the `harness` command and for the rank program alike."""

from harness.errors import RecipeError


def dashed_overrides(arguments: list[str]) -> list[str]:
    """`key.path=value`, `--key.path=value` and `--key.path value`, all as `key.path=value`. Raises RecipeError for anything else."""
    overrides, rest = [], list(arguments)
    while rest:
        argument = rest.pop(0)
        key, equals, value = argument.removeprefix("--").partition("=")
        if argument.startswith("--") and not equals:
            if not rest or rest[0].startswith("--"):
                raise RecipeError(f"--{key}: has no value; write --{key} VALUE or {key}=VALUE (options come with their own --help)")
            value = rest.pop(0)
        elif not equals or argument.startswith("-") and not argument.startswith("--"):
            raise RecipeError(f"{argument!r}: neither an option nor an override; overrides are written key.path=value")
        overrides.append(f"{key}={value}")
    return overrides
