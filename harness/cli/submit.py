import os
import shlex
from dataclasses import dataclass
from pathlib import Path

import click

from harness.cli.arguments import RECIPE_CONTEXT, read_overrides, recipe_argument
from harness.cluster import array as arrays
from harness.cluster import chain, submission
from harness.cluster.array import ARRAY, Array, build_elements, load_array, parse_axis
from harness.cluster.pipeline import enter_directory, find_pipeline, load_pipeline
from harness.cluster.schema import Cluster, load_cluster
from harness.cluster.submission import CLUSTER, JOB, Submission, read_job
from harness.errors import RecipeError
from harness.recipe import Recipe, load
from harness.run import RunDir
from harness.share import read_share

OF_CLUSTER = "cluster."


@click.command("submit", context_settings=RECIPE_CONTEXT)
@click.option("--cluster", help="A cluster file, or the name of a shipped one.  [default: as the run was submitted before]")
@click.option("--nodes", type=click.IntRange(1), help="Nodes of the job.  [default: 1, or as before]")
@click.option("--time", help="Time limit of one job, as Slurm writes it: 8:00:00, 1-12:00:00.  [default: the cluster file's]")
@click.option("--after", multiple=True, metavar="JOB", help="Begin when this job has succeeded; may be given again.")
@click.option(
    "--array", "axes", multiple=True, metavar="KEY=V,V", help="A run for each of these values; given again, for each combination."
)
@click.option("--at-once", type=click.IntRange(1), help="So many runs of the array at a time.  [default: as there is room for]")
@click.option("--despite-plan", is_flag=True, help="Send it although its plan says that it cannot fit the cluster's GPUs.")
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
    axes: tuple[str, ...],
    at_once: int | None,
    despite_plan: bool,
    dry_run: bool,
    fresh: bool,
    allowed: tuple[str, ...],
):
    """Send RECIPE to Slurm: a job that trains it to its end, through time limits, preemption and lost nodes.

    RECIPE may also be a pipeline, whose stages are sent together, or the folder of a run, an array or a pipeline that was submitted before:
    that goes on, on the same cluster. Settings are written key=value, those of a pipeline's stage STAGE.key=value, and those of the cluster
    file cluster.key=value.
    """
    asked = Asked(
        settings=read_overrides(tuple(setting for setting in overrides if not _is_of_cluster(setting))),
        cluster=str(Path(cluster).resolve()) if cluster and Path(cluster).exists() else cluster,
        of_cluster=[setting.removeprefix("--").removeprefix(OF_CLUSTER) for setting in overrides if _is_of_cluster(setting)],
        nodes=nodes,
        time=time,
        after=after,
        fresh=fresh,
        allowed=allowed,
        despite_plan=despite_plan,
        dry_run=dry_run,
    )
    folder, pipeline = Path(recipe).expanduser().resolve(), find_pipeline(recipe)
    if pipeline:
        for option, value in (("nodes", nodes), ("time", time), ("array", axes), ("at-once", at_once), ("allow-change", allowed)):
            if value:
                raise RecipeError(f"--{option}: {recipe} is a pipeline, and its stages say this each for itself; write it there")
        submit_pipeline(pipeline, asked)
    elif axes or (folder / ARRAY).is_file():
        submit_array(recipe, asked, axes, at_once)
    elif at_once:
        raise RecipeError(f"--at-once {at_once}: there is one run alone; say what differs between several with --array KEY=VALUE,VALUE")
    else:
        submit_run(recipe, asked)


def _is_of_cluster(setting: str) -> bool:
    return setting.removeprefix("--").startswith(OF_CLUSTER)


@dataclass(frozen=True)
class Asked:
    """What the command line says of whatever is sent."""

    settings: list[str]
    cluster: str | None
    of_cluster: list[str]
    nodes: int | None
    time: str | None
    after: tuple[str, ...]
    fresh: bool
    allowed: tuple[str, ...]
    despite_plan: bool
    dry_run: bool

    def load_cluster(self, before: Path | None, named: str | None = None, time: str | None = None) -> Cluster:
        """The file that a stage names, else the command line's, else what lies in the folder that was submitted before."""
        known = str(before / CLUSTER) if before and (before / CLUSTER).is_file() else None
        name, limit = named or self.cluster or known, time or self.time
        if name is None:
            raise RecipeError("--cluster is not given, and this was not submitted before; name a cluster file, or a shipped one")
        return load_cluster(name, [*self.of_cluster, *([f"time={limit}"] if limit else [])])

    def submission(self, recipe: Recipe, source: str, before: RunDir | None = None) -> Submission:
        """One run, for the first time or again."""
        facts = read_job(before) if before else {}
        return Submission(
            recipe=recipe,
            share=read_share(before) if before else None,
            cluster=self.load_cluster(before and before.path),
            nodes=self.nodes or facts.get("nodes", 1),
            merge=facts.get("merge", False),
            after=self.after,
            allowed=self.allowed,
            fresh=self.fresh,
            despite_plan=self.despite_plan,
            source=source,
        )

    def again(self, run: RunDir) -> Submission:
        """A run that was submitted before, from where its recipe's relative paths begin."""
        os.chdir(read_job(run)["directory"])
        return self.submission(load(run.recipe, self.settings), str(run.recipe), run)


def submit_run(recipe: str, asked: Asked) -> None:
    run = RunDir(Path(recipe).expanduser().resolve())
    one = asked.again(run) if (run.path / JOB).is_file() else asked.submission(load(recipe, asked.settings), recipe)
    if asked.dry_run:
        click.echo(submission.render(one), nl=False)
        return
    job_id = submission.submit(one)
    click.echo(f"job {job_id}: {one.run.path}, {_ranks(one)}")
    _tell(one.run.path)


def submit_array(recipe: str, asked: Asked, axes: tuple[str, ...], at_once: int | None) -> None:
    folder = Path(recipe).expanduser().resolve()
    if (folder / ARRAY).is_file():
        if axes:
            raise RecipeError(
                f"--array: {recipe} is an array already; leave --array out to go on with it, or give its recipe and another output_dir"
            )
        runs, before = load_array(folder)
        array = Array(tuple(map(asked.again, runs)), at_once or before)
    else:
        recipes = build_elements(recipe, asked.settings, map(parse_axis, axes))
        array = Array(tuple(asked.submission(one, recipe) for one in recipes), at_once)
    if asked.dry_run:
        click.echo(arrays.render(array), nl=False)
        return
    sent = len(array.unfinished())
    job_id = arrays.submit(array)
    of = "" if sent == len(array.elements) else f" of {len(array.elements)}"
    click.echo(f"job {job_id}: {array.folder}, {sent}{of} runs of {_ranks(array.elements[0])}")
    _tell(array.folder, array.elements[0].run.path)


def submit_pipeline(file: Path, asked: Asked) -> None:
    enter_directory(file)
    pipeline = load_pipeline(file, asked.settings)
    links = chain.plan_chain(
        pipeline,
        lambda stage: asked.load_cluster(pipeline.folder, stage.cluster, stage.time),
        fresh=asked.fresh,
        despite_plan=asked.despite_plan,
    )
    if asked.dry_run:
        click.echo(chain.render(links), nl=False)
        return
    given = asked.load_cluster(None) if asked.cluster else None
    sent = chain.submit(pipeline, links, asked.after, given)
    for link in links:
        name = link.plan.name
        if link.is_done:
            click.echo(f"{name}: complete")
        elif link.live:
            click.echo(f"{name}: job {', '.join(link.live)} lives and is kept")
        else:
            needs = link.plan.stage.all_needs
            click.echo(f"{name}: job {sent[name]}" + (f", after {', '.join(needs)}" if needs else ""))
    _tell(pipeline.folder, pipeline.folder / pipeline.order[0])


def _ranks(one: Submission) -> str:
    ranks = one.machines.world_size
    return f"{ranks} rank{'s' if ranks > 1 else ''} on {one.nodes} node{'s' if one.nodes > 1 else ''}"


def _tell(folder: Path, one: Path | None = None) -> None:
    """The commands for a folder of runs; logs are read of `one` of them, which is the folder itself when left out."""
    name, read = shlex.quote(str(folder)), shlex.quote(str(one or folder))
    click.echo(f"  watch   harness status {name}\n  read    harness logs {read} -f\n  end     harness cancel {name} --save")
