import json
import sys
from collections import Counter
from pathlib import Path

import click

from harness.cli.arguments import load_recipe, tidy_on_sigterm
from harness.errors import RecipeError
from harness.logs import quieten
from harness.recipe import Recipe
from harness.resources import find_config
from harness.run import RunDir

DATA_SUFFIXES = (".jsonl", ".json", ".parquet", ".gz")


@click.command("validate")
@click.argument("data", nargs=-1, required=True)
@click.option(
    "--on", "on", multiple=True, metavar="CLASS=ACTION", help="fail, drop, repair or keep rows of a class of findings. Repeatable."
)
@click.option("--against", multiple=True, metavar="FILE", help="An evaluation suite whose questions must not be trained. Repeatable.")
@click.option(
    "--output", type=click.Path(path_type=Path), help="Write what is left, as messages, and every change to OUTPUT.changes.jsonl."
)
@click.option("--force", is_flag=True, help="Replace the output.")
@click.option("--json", "as_json", is_flag=True, help="Print the counts as JSON.")
@tidy_on_sigterm()
def command(data: tuple[str, ...], on: tuple[str, ...], against: tuple[str, ...], output: Path | None, force: bool, as_json: bool):
    """Audit DATA (files, folders, globs or hub ids; or one recipe and key=value) row by row, before it is trained.

    Leaves with 1 when a class of findings occurs whose action is fail. A recipe's rows are also rendered with its own tokenizer, masked,
    read back and compared.
    """
    recipe = None if _is_data(data[0]) else load_recipe(data[0], data[1:])
    if recipe is not None and output is not None:
        raise RecipeError("--output writes the rows of files; name them in place of the recipe")
    sys.exit(_validate_recipe(recipe, on, against, as_json) if recipe else _validate_files(data, on, against, output, force, as_json))


def _is_data(name: str) -> bool:
    """A hub id looks like the name of a shipped recipe; it is one only where there is such a recipe."""
    if name.endswith((".yaml", ".yml")):
        return False
    return name.endswith(DATA_SUFFIXES) or find_config(name) is None


def _validate_files(data, on, against, output: Path | None, force: bool, as_json: bool) -> int:
    from harness.data.audit import File, audit, plan_actions, write_audited
    from harness.data.repeats import Suites

    for path in map(Path, data):
        if RunDir(path).manifest.is_file():
            raise RecipeError(f"{path}: is the folder of a run; for the rows that it trains: harness validate {RunDir(path).recipe}")
    actions = plan_actions(on)
    suites = Suites(against) if against else None
    report = audit([File(path) for path in data], actions, suites=suites)
    written = None
    if output is not None and not report.failed:
        written = write_audited(report, output, force=force)
    _tell(report, suites, written, output, as_json)
    return 1 if report.failed else 0


def _tell(report, suites, written: Counter | None, output: Path | None, as_json: bool) -> None:
    from harness.data.audit_report import audit_json, render_audit

    if as_json:
        unread = {"unread_of_suites": len(suites.unread)} if suites is not None else {}
        click.echo(json.dumps(audit_json(report, written) | unread, ensure_ascii=False, indent=2))
        return
    click.echo(render_audit(report))
    if suites is not None and suites.unread:
        click.echo(f"\n{len(suites.unread):,} rows of the suites hold no question that could be looked for; the first: {suites.unread[0]}")
    if written is not None:
        mended, dropped = written["repaired"], written["dropped"]
        click.echo(f"\n{written['written']:,} rows written to {output}, {mended:,} of them repaired; {dropped:,} dropped")
        click.echo(f"every change is a line of {output}.changes.jsonl")
    elif output is not None:
        click.echo(f"\n{output} is not written: {', '.join(report.failed)}")


# ---- a recipe


def _validate_recipe(recipe: Recipe, on, against, as_json: bool) -> int:
    """Its training rows, held against its data.eval as against a suite; its data.eval; and both with the tokenizer."""
    if recipe.task not in ("sft", "distill", "generate"):
        raise RecipeError(
            f"task = {recipe.task}; the rows of its data are no conversations to imitate; validate audits those of sft, distill, generate"
        )
    quieten()
    from harness.data.audit import audit, plan_actions
    from harness.data.audit_report import audit_json, render_audit
    from harness.data.preflight import check_template, control_pattern, preflight_json, render_preflight
    from harness.data.repeats import Suites
    from harness.data.sources import load_rows
    from harness.data.templates import Renderer
    from harness.model import load_tokenizer
    from harness.tasks.templates import training_template

    actions, asks = plan_actions(on), recipe.task == "generate"
    renderer = Renderer(load_tokenizer(recipe), training_template, recipe.data.train_on)
    pattern = control_pattern(renderer)
    suites = Suites([*against, *recipe.data.eval])
    audits = {"data.train": audit(recipe.data.train, actions, suites=suites, pattern=pattern, asks=asks)}
    if recipe.data.eval:
        audits["data.eval"] = audit(recipe.data.eval, actions, pattern=pattern)
    template = None
    if not asks:
        sources = [*recipe.data.train, *recipe.data.eval]
        template = check_template(renderer, (row for source in sources for row in load_rows(source, "skip").rows))
    if as_json:
        told = {part: audit_json(report) for part, report in audits.items()}
        click.echo(json.dumps(told | ({"template": preflight_json(template)} if template else {}), ensure_ascii=False, indent=2))
    else:
        click.echo("\n\n".join(f"{part}: {render_audit(report)}" for part, report in audits.items()))
        if any(report.found for report in audits.values()):
            click.echo("\na recipe is only audited; `harness validate FILE … --on CLASS=ACTION --output FILE` writes what is left")
        if template:
            click.echo(f"\n{render_preflight(template, renderer.name)}")
    return 1 if any(report.failed for report in audits.values()) or (template and template.refused.rows) else 0
