import re
from pathlib import Path

import click

from harness.cli.tables import print_table
from harness.errors import RecipeError
from harness.logs import quieten
from harness.run import RunDir


@click.command("push")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--to", "target", required=True, help="ORG/NAME on the hub, or a folder: ./FOLDER, /FOLDER or file:///FOLDER.")
@click.option("--export", default="final", show_default=True, help="Which export of the run: final, merged, or gguf-TYPE.")
@click.option("--license", help="Under which this model is handed over, as the hub names licences.  [default: unknown]")
@click.option("--base", help="The base's id on the hub, where the run knows it as a folder.")
@click.option("--evaluation", "evaluations", multiple=True, type=click.Path(path_type=Path), help="The --output of an evaluation of it.")
@click.option("--private", is_flag=True, help="A new repository on the hub is private.")
@click.option("--dry-run", is_flag=True, help="Print the card, the files and where they would go; write nothing.")
@click.option("--force", is_flag=True, help="Replace the export that is there: the folder, or on the hub the weights of another model.")
def command(run, target, export, license, base, evaluations, private, dry_run, force):
    """Hand RUN's export over: verify it, write its model card from what the run has recorded, and send both to a hub or into a folder.

    What leaves is what the export's manifest lists, with harness.json and README.md: no optimizer state, no secret, no path of this
    machine.
    """
    folder = RunDir(run.expanduser().resolve())
    folder.read_manifest()
    if not re.fullmatch(r"final|merged|gguf-\w+", export):
        raise RecipeError(f"--export {export}; must be final, merged or gguf-TYPE")
    if export != "final" and not (folder.path / export).is_dir():
        option = "--merge" if export == "merged" else f"--gguf {export.removeprefix('gguf-')}"
        raise RecipeError(f"--export {export}; {folder.path} has none; make it: harness export {run} {option}")
    if license is not None and not re.fullmatch(r"[a-z0-9]+([.+-][a-z0-9]+)*", license):
        raise RecipeError(f"--license {license}; must be written as the hub does: apache-2.0, mit, llama3.1, cc-by-4.0, …, or other")
    place = parse_place(target)
    if place and private:
        raise RecipeError("--private is for the hub, and the target is a folder")
    quieten()
    from harness.tasks.push import check_place, plan_push, push_to_folder, push_to_hub

    if place:
        check_place(place, force=force)
    name = place.name if place else target
    plan = plan_push(folder, export, name, base=base, license=license, evaluations=evaluations, local=place is not None)
    where = str(place) if place else f"the hub's {target}"
    if dry_run:
        click.echo(plan.card)
    print_table(("file", "bytes"), [(file.name, f"{file.size_bytes:,}") for file in plan.files], right=("bytes",))
    if dry_run:
        click.echo(f"\nnothing is written; without --dry-run these {len(plan.files)} files go to {where}")
        return
    if place:
        push_to_folder(plan, place, force=force)
    else:
        where = push_to_hub(plan, target, private=private, force=force)
    click.echo(f"\n{plan.source}, reopened and verified, is handed over: {where}")


def parse_place(target: str) -> Path | None:
    """The folder that is meant; None for an id on the hub."""
    if target.startswith("file://"):
        return Path(target.removeprefix("file://")).resolve()
    if target.startswith(("/", "./", "../", "~")):
        return Path(target).expanduser().resolve()
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", target):
        raise RecipeError(f"--to {target}; must be ORG/NAME on the hub, or a folder that begins with ./, / or file://")
    return None
