import os
import sys
from pathlib import Path

import click

from harness.cli.arguments import RECIPE_CONTEXT, load_recipe, read_overrides, recipe_argument
from harness.errors import LaunchError


@click.command("fetch", context_settings=RECIPE_CONTEXT)
@click.option("--dry-run", is_flag=True, help="Say what would come and how large it is, and fetch nothing.")
@click.option("--verify", is_flag=True, help="Read what was fetched and compare every digest; asks no network.")
@recipe_argument
def command(recipe: str, overrides: tuple[str, ...], dry_run: bool, verify: bool):
    """Bring what RECIPE takes from the Hugging Face hub (models, tokenizers, data sets) to the shared cache, and check every byte of it, so
    that nodes need no network. RECIPE may be a pipeline: then that of all its stages. Cut off, the same command goes on; under
    HF_HUB_OFFLINE=1 it is --verify."""
    from harness.hub.cache import is_offline
    from harness.hub.needs import find_kernels, find_needs

    recipes, made = read_recipes(recipe, overrides)
    needs = find_needs(recipes, made)
    for name in find_kernels(recipes):
        click.echo(
            f"not fetched: attn_implementation {name}: its build belongs to the GPU; `kernels download` on a node with one, or use auto"
        )
    if not needs:
        click.echo(f"{recipe}: takes nothing from the hub; {tell_places(recipe, recipes)}")
    elif dry_run:
        show_plan(plan_all(needs))
    elif verify or is_offline():
        verify_all(needs, offline=not verify)
    else:
        fetch_all(needs)


def read_recipes(recipe: str, overrides: tuple[str, ...]) -> tuple[list, list[Path]]:
    """(the recipes of a file or of all stages of a pipeline, the folders that its stages make for one another)."""
    from harness.cluster.pipeline import enter_directory, find_pipeline, load_pipeline
    from harness.cluster.stages import plan_stages
    from harness.run import RunDir

    file = find_pipeline(recipe)
    if file is None:
        one = load_recipe(recipe, overrides)
        return [one], [RunDir.of(one).path]
    enter_directory(file)
    pipeline = load_pipeline(file, read_overrides(overrides))
    return [one for plan in plan_stages(pipeline) for one in plan.recipes], [pipeline.folder]


def tell_places(recipe: str, recipes: list) -> str:
    """Where that is which does not come from the hub: a path that leads nowhere shall not pass for one that is fetched."""
    from harness.cluster.pipeline import find_pipeline
    from harness.cluster.submission import check_inputs

    if find_pipeline(recipe):
        return "what it names is embedded, made by its own stages, or a path of this machine"
    try:
        for one in recipes:
            check_inputs(one)
    except LaunchError as error:
        return f"but {error}"
    return "all that it names lies here, or is embedded"


def plan_all(needs: list) -> list:
    from harness.hub.fetch import plan_fetch

    return [plan_fetch(need) for need in needs]


def show_plan(fetches: list) -> None:
    from harness.hub.cache import endpoint, hub_cache
    from harness.hub.fetch import bytes_to_come
    from harness.sizes import gib

    click.echo(f"from {endpoint()} to {hub_cache()}")
    names = [f"{each.need.kind:<9}  {each.need.shown}" + (f" ({each.need.name})" if each.need.name else "") for each in fetches]
    width = max(map(len, names))
    for name, each in zip(names, fetches, strict=True):
        to_come = (
            "all here" if not each.missing else f"{gib(each.missing_bytes)} to come" if each.missing_bytes < each.size_bytes else "to come"
        )
        line = f"  {name:<{width}}  {each.commit[:8]}  {len(each.files):>3} files  {gib(each.size_bytes):>10}  {to_come}"
        click.echo(line)
        if each.skipped_bytes >= 2**20:
            click.echo(f"  {'':<{width}}  {gib(each.skipped_bytes)} of other formats and files are left out")
    click.echo(f"{gib(bytes_to_come(fetches))} to come")


def fetch_all(needs: list) -> None:
    from harness.hub.fetch import check_room, download, record_fetch
    from harness.hub.record import record_file

    fetches = plan_all(needs)
    show_plan(fetches)
    check_room(fetches)
    for each in fetches:
        with progress_bar(each.need.id, each.missing_bytes) as advance:
            download(each, advance)
        record_fetch(each)
        click.echo(f"{each.need.shown}: {len(each.files)} files, each with the hub's digest")
    click.echo(f"digests are written to {record_file(needs[0]).parent}")
    click.echo(
        "nodes without a network: HF_HUB_OFFLINE=1, and HF_HOME as here (`environment: [HF_HOME, HF_HUB_OFFLINE]` in the cluster file)"
    )


def verify_all(needs: list, *, offline: bool) -> None:
    from harness.hub.record import record_file, verify_record
    from harness.sizes import gib

    if offline:
        click.echo("HF_HUB_OFFLINE is set: nothing is fetched, what is here is compared with the digests that were recorded")
    for need in needs:
        files, size = verify_record(need)
        click.echo(f"{need.shown}: {files} files, {gib(size)}, all as they were fetched ({record_file(need)})")


def progress_bar(name: str, total_bytes: int):
    """A context that gives the function to be told of bytes; nothing is shown where there is no terminal."""
    import contextlib

    if not sys.stderr.isatty() or not total_bytes or os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS"):
        return contextlib.nullcontext(lambda count: None)
    return _bar(name, total_bytes)


def _bar(name: str, total_bytes: int):
    import contextlib
    import threading

    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    @contextlib.contextmanager
    def shown():
        columns = (TextColumn("{task.description}"), BarColumn(None), DownloadColumn(True), TransferSpeedColumn(), TimeRemainingColumn())
        lock = threading.Lock()
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task(name, total=total_bytes)

            def advance(count: int) -> None:
                with lock:
                    progress.advance(task, count)

            yield advance

    return shown()
