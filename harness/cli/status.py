import dataclasses
import json
import time
from pathlib import Path

import click

from harness.cli.checkpoints import format_age
from harness.cli.tables import print_table
from harness.cluster.drawing import draw_pipeline
from harness.cluster.pipeline import PIPELINE
from harness.cluster.status import RunStatus, find_runs, format_left, read_statuses


@click.command("status")
@click.argument("run", default="all")
@click.option("--root", type=click.Path(path_type=Path), default="runs", help="Where `all` and a job's id are looked for.  [default: runs]")
@click.option("--json", "as_json", is_flag=True, help="Everything that is known, as a JSON list with one object for each run.")
def command(run: str, root: Path, as_json: bool):
    """Say how RUN stands: its state and why, its step, what is left, its restarts, its last commit, and what to type next.

    RUN is a run folder, a folder of runs (an array, a pipeline), the id of a Slurm job, or `all`. Works without Slurm, too.
    """
    folder = Path(run).expanduser()
    if (folder / PIPELINE).is_file() and not as_json:
        click.echo(draw_pipeline(folder))
        return
    statuses = read_statuses(find_runs(run, root))
    if as_json:
        click.echo(json.dumps([as_object(status) for status in statuses], indent=2))
    elif len(statuses) == 1:
        click.echo(render_block(statuses[0]))
    else:
        top = Path(run).expanduser().resolve() if run != "all" and Path(run).is_dir() else root.resolve()
        heading = ("run", "state", "step", "done", "loss", "left", "lives", "commit", "why")
        print_table(heading, [row_of(status, top) for status in statuses], right=("step", "done", "loss", "lives"))


def as_object(status: RunStatus) -> dict:
    derived = {"run": str(status.run), "log": status.log and str(status.log), "fraction": status.fraction, "left_s": status.left_s}
    return dataclasses.asdict(status) | derived


def row_of(status: RunStatus, top: Path) -> tuple[str, ...]:
    name = status.run.relative_to(top) if status.run.is_relative_to(top) else status.run
    return (
        str(name),
        status.state,
        _of_steps(status, "/"),
        _percent(status),
        "" if status.loss is None else f"{status.loss:.4g}",
        format_left(status.left_s),
        str(status.lives),
        "" if status.commit is None else f"{status.commit}, {_ago(status)}",
        status.reason or status.phase,
    )


def render_block(status: RunStatus) -> str:
    """One run, a line for each thing that is known."""
    facts = {
        "state": status.text,
        status.counted: _of_steps(status, " of ") and f"{_of_steps(status, ' of ')} ({_percent(status) or 'nobody knows yet of how many'})",
        "loss": "" if status.loss is None else f"{status.loss:.4g}",
        "left": status.left_s is not None and f"{format_left(status.left_s)} of training, {status.step_s:.3g} s a step",
        "starts": status.starts and f"{time.strftime('%Y-%m-%d %H:%M', time.localtime(status.starts))}, as Slurm expects now",
        "lives": f"{status.lives}" + (f" ({status.requeues} requeue{'s' * (status.requeues > 1)})" if status.requeues else ""),
        "commit": "" if status.counted == "units" else _commit(status),
        "nodes": ", ".join(status.hosts),
        "job": status.job,
        "log": status.log and str(status.log),
        "next": status.next,
    }
    lines = [f"  {name:<8}{value}" for name, value in facts.items() if value]
    return "\n".join([str(status.run), *lines])


def _commit(status: RunStatus) -> str:
    return "none yet" if status.commit is None else f"checkpoint-{status.commit}, {_ago(status)} ago"


def _of_steps(status: RunStatus, of: str) -> str:
    if status.step is None:
        return ""
    return f"{status.step}" + (f"{of}{status.steps}" if status.steps else "")


def _percent(status: RunStatus) -> str:
    return "" if status.fraction is None else f"{status.fraction:.0%}".replace("%", " %")


def _ago(status: RunStatus) -> str:
    return format_age(time.time() - status.committed)
