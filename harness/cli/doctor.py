import dataclasses
import json
import shutil
import sys
import time

import click

from harness.cli.arguments import RECIPE_CONTEXT, load_recipe
from harness.cli.tables import is_coloured
from harness.errors import RecipeError

COLOURS = {
    "ok": {"fg": "green"},
    "warn": {"fg": "yellow"},
    "fail": {"fg": "red", "bold": True},
    "area": {"bold": True},
    "remedy": {"dim": True},
}


@click.command("doctor", context_settings=RECIPE_CONTEXT)
@click.option("--json", "as_json", is_flag=True, help="All checks, as a JSON object.")
@click.argument("recipe", required=False)
@click.argument("overrides", nargs=-1, type=click.UNPROCESSED)
def command(recipe: str | None, overrides: tuple[str, ...], as_json: bool):
    """Try this machine: libraries, disks, network, Slurm, GPUs, kernels, 4-bit weights; say what is wrong, and what to do about it. With
    RECIPE: whether it could run here, its models and data among it. Ends with 0, or 1 when a check failed; a warning is no failure."""
    from harness.cluster.pipeline import find_pipeline
    from harness.cluster.slurm import check_commands
    from harness.doctor.examine import AREAS, Task, examine, plan_checks

    if recipe and find_pipeline(recipe):
        raise RecipeError(f"{recipe}: is a pipeline, whose stages may run on different machines; name the recipe of one of them")
    begun, one = time.monotonic(), load_recipe(recipe, overrides) if recipe else None
    tasks = plan_checks(one) if one else [*plan_checks(None), Task("cluster", "Slurm", check_commands)]
    if one:
        tasks.append(Task("recipe", "paths", lambda: check_paths(one)))
    tasks.sort(key=lambda task: AREAS.index(task.area))
    checks = []
    for area, found in examine(tasks, one):
        checks += found
        if found and not as_json:
            show(area, found)
    seconds, failed = time.monotonic() - begun, sum(check.level == "fail" for check in checks)
    if as_json:
        fields = [dataclasses.asdict(check) for check in checks]
        click.echo(json.dumps({"sound": not failed, "seconds": round(seconds, 2), "checks": fields}, indent=2))
    else:
        colour = COLOURS["fail" if failed else "ok"] if is_coloured() else {}
        click.echo(click.style(summarise(checks, one is not None, seconds), **colour))
    sys.exit(1 if failed else 0)


def check_paths(recipe):
    """What of it should lie on this machine."""
    from harness.cluster.submission import check_inputs
    from harness.doctor.check import Check
    from harness.errors import HarnessError

    try:
        check_inputs(recipe)
    except HarnessError as error:
        what, _, remedy = str(error).rpartition("; ")
        return [Check("recipe", "paths", "fail", what, remedy)]
    return [Check("recipe", "paths", "ok", "every file and folder that it names is there")]


def show(area: str, checks: list) -> None:
    from harness.doctor.check import render_area

    is_terminal = sys.stdout.isatty()
    width = shutil.get_terminal_size().columns if is_terminal else None
    style = (lambda text, kind: click.style(text, **COLOURS[kind])) if is_coloured() else (lambda text, kind: text)
    click.echo(render_area(area, checks, width=width, style=style) + "\n")


def summarise(checks: list, of_recipe: bool, seconds: float) -> str:
    failed, warned = (sum(check.level == level for check in checks) for level in ("fail", "warn"))
    sound = "ready for this recipe" if of_recipe else "sound"
    verdict = f"not {sound}: {failed} of {len(checks)} checks failed" if failed else f"{sound}: {len(checks)} checks"
    warnings = f", {warned} warning{'s' if warned > 1 else ''}" if warned else ""
    return f"{verdict}{warnings} ({seconds:.1f} s)"
