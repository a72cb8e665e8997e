import os
from pathlib import Path

import click

from harness.cli.arguments import RECIPE_CONTEXT, load_recipe, recipe_argument
from harness.cluster.schema import load_cluster
from harness.cluster.submission import CLUSTER, JOB, Submission, read_job, render, submit
from harness.errors import RecipeError
from harness.run import RunDir

OF_CLUSTER = "cluster."


@click.command("submit", context_settings=RECIPE_CONTEXT)
@click.option("--cluster", help="A cluster file, or the name of a shipped one.  [default: as the run was submitted before]")
@click.option("--nodes", type=click.IntRange(1), help="Nodes of the job.  [default: 1, or as before]")
@click.option("--time", help="Time limit of one job, as Slurm writes it: 8:00:00, 1-12:00:00.  [default: the cluster file's]")
@click.option("--after", multiple=True, metavar="JOB", help="Begin when this job has succeeded; may be given again.")
@click.option("--dry-run", is_flag=True, help="Print the script, and do nothing.")
@click.option("--fresh", is_flag=True, help="Begin again: delete the run folder first, if there is one.")
@click.option("--allow-change", "allowed", multiple=True, metavar="KEY", help="Continue although this differs from the checkpoint's.")
@recipe_argument
def command(
    recipe: str,
    overrides: tuple[str, ...],
    cluster: str | None,
    nodes: int | None,
    time: str | None,
    after: tuple[str, ...],
    dry_run: bool,
    fresh: bool,
    allowed: tuple[str, ...],
):
    """Send RECIPE to Slurm: a job that trains it to its end, through time limits, preemption and lost nodes.

    RECIPE may also be a run folder that was submitted before: it goes on, on the same cluster. Settings are written key=value, those of the
    cluster file cluster.key=value.
    """
    of_cluster = [setting.removeprefix("--").removeprefix(OF_CLUSTER) for setting in overrides if _is_of_cluster(setting)]
    overrides = tuple(setting for setting in overrides if not _is_of_cluster(setting))
    before = None
    if (Path(recipe) / JOB).is_file():
        run = RunDir(Path(recipe).resolve())
        before, recipe = read_job(run), str(run.recipe)
        cluster = str(Path(cluster).resolve()) if cluster and Path(cluster).exists() else cluster or str(run.path / CLUSTER)
        # Where the recipe's relative paths begin.
        os.chdir(before["directory"])
    if cluster is None:
        raise RecipeError(f"--cluster is not given, and {recipe} was not submitted before; name a cluster file, or a shipped one")
    asked = Submission(
        recipe=load_recipe(recipe, overrides),
        cluster=load_cluster(cluster, [*of_cluster, *([f"time={time}"] if time else [])]),
        nodes=nodes or (before["nodes"] if before else 1),
        after=after,
        allowed=allowed,
        fresh=fresh,
        source=recipe,
    )
    if dry_run:
        click.echo(render(asked), nl=False)
        return
    job_id = submit(asked)
    run, ranks = asked.run.path, asked.machines.world_size
    click.echo(f"job {job_id}: {run}, {ranks} rank{'s' if ranks > 1 else ''} on {asked.nodes} node{'s' if asked.nodes > 1 else ''}")
    click.echo(f"  watch   harness status {run}\n  read    harness logs {run} -f\n  end     harness cancel {run} --save")


def _is_of_cluster(setting: str) -> bool:
    return setting.removeprefix("--").startswith(OF_CLUSTER)
