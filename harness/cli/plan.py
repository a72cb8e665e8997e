import json
import sys
from pathlib import Path

import click

from harness.cli.arguments import RECIPE_CONTEXT, Number, load_recipe, recipe_argument
from harness.cluster.schema import load_cluster
from harness.errors import RecipeError
from harness.launcher import check_world
from harness.planner import Place, parse_gpu, plan_recipe
from harness.planner.fit import plan_changes, search
from harness.planner.gpus import GIB
from harness.planner.render import render_fit, render_plan, to_json
from harness.recipe.backend import load_backend

EXIT_DOES_NOT_FIT = 1


@click.command("plan", context_settings=RECIPE_CONTEXT)
@click.option("--cluster", help="A cluster file, or the name of a shipped one: its GPUs per node, and their memory.")
@click.option("--gpu", help="A card (h100, a100-80g, ...) or its memory (24GiB).  [default: the cluster file's]")
@click.option("--processes", type=click.IntRange(1), help="GPUs of each node.  [default: the cluster file's, else 1]")
@click.option("--nodes", type=click.IntRange(1), default=1, show_default=True, help="Nodes.")
@click.option("--tokens", type=Number(1), help="Tokens of one epoch of the data.")
@click.option("--trained-share", type=Number(0, 1), default=1.0, show_default=True, help="Share of them that is trained.")
@click.option("--tokens-per-s", type=Number(0, min_open=True), help="A throughput of all GPUs, stated, for hours.")
@click.option("--measured", type=click.Path(path_type=Path), help="A run folder whose measured throughput is taken, for hours.")
@click.option("--fit", "fits", is_flag=True, help="Search backend, batch, checkpointing and 4 bits for the fastest that fits.")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@recipe_argument
def command(
    recipe: str,
    overrides: tuple[str, ...],
    cluster: str | None,
    gpu: str | None,
    processes: int | None,
    nodes: int,
    tokens: float | None,
    trained_share: float,
    tokens_per_s: float | None,
    measured: Path | None,
    fits: bool,
    as_json: bool,
):
    """Say what RECIPE will take of GPUs, hosts, disks and time, before it is run. Leaves with 1 where it is expected not to fit."""
    resolved = load_recipe(recipe, overrides)
    if tokens_per_s and measured:
        raise RecipeError("--measured: --tokens-per-s is given as well; keep one")
    place = find_place(cluster, gpu, processes, nodes)
    if fits and place.gpu is None:
        raise RecipeError("--fit: into what? say it with --gpu, or --cluster with gpu_memory_gib in its file")
    if resolved.task == "generate":
        if fits:
            raise RecipeError("--fit: task = generate trains nothing, and has no batch to search; lower generate.batch_rows instead")
    else:
        check_world(resolved, load_backend(resolved.backend), place.world)
    plan = plan_recipe(
        resolved,
        place,
        tokens_per_epoch=tokens,
        trained_share=trained_share,
        tokens_per_s=tokens_per_s,
        measured=measured,
    )
    changes = [] if plan.fits else plan_changes(plan.setting, place)
    found = search(plan.setting, place) if fits else None
    if as_json:
        click.echo(json.dumps(to_json(plan, changes, found), indent=2))
    else:
        click.echo(render_plan(plan, changes), nl=False)
        if fits:
            click.echo("\n" + render_fit(found))
    sys.exit(0 if plan.fits or found is not None else EXIT_DOES_NOT_FIT)


def find_place(cluster: str | None, gpu: str | None, processes: int | None, nodes: int) -> Place:
    """What the command line says, over what the cluster file says."""
    if cluster is None:
        return Place(processes or 1, nodes, parse_gpu(gpu) if gpu else None)
    site = load_cluster(cluster)
    return Place(
        processes or site.ranks_per_node,
        nodes,
        parse_gpu(gpu) if gpu else site.gpu,
        site.memory_gib * GIB if site.memory_gib else None,
    )
