import getpass
import time
from pathlib import Path

import click

from harness.cluster.slurm import cancel_job
from harness.cluster.status import RunStatus, find_runs, read_statuses
from harness.errors import ClusterError, LaunchError
from harness.life import place
from harness.run import RunDir, StopRequest, write_text_atomically


@click.command("cancel")
@click.argument("run")
@click.option("--save", is_flag=True, help="Let it save first: it leaves at its next step, and loses nothing.")
@click.option("--root", type=click.Path(path_type=Path), default="runs", help="Where a job's id is looked for.  [default: runs]")
def command(run: str, save: bool, root: Path):
    """Take RUN out of Slurm, wherever it stands: a run folder, a folder of runs (an array, a pipeline), or the id of a Slurm job.

    With --save also a run that `harness run` trains on a machine. Neither deletes anything.
    """
    statuses = read_statuses(find_runs(run, root))
    for status in statuses:
        check_can_cancel(status, save)
    leaving = [status for status in statuses if save and can_save(status)]
    waiting = [status for status in statuses if status.is_there and status not in leaving]
    for status in leaving:
        ask_to_leave(RunDir(status.run))
    if waiting:
        cancel_job(*(status.job for status in waiting))
    for status in statuses:
        if status in leaving:
            done = "asked to end its unit and to leave" if status.counted == "units" else "asked to save at its next step and to leave"
        elif status in waiting:
            done = f"job {status.job} is cancelled; it was {status.text}" + ("; nothing had to be saved" if save else "")
        else:
            click.echo(f"{status.run}: nothing to cancel; it is {status.text}")
            continue
        click.echo(f"{status.run}: {done}; {place(RunDir(status.run))}; to go on: {status.go_on}")


def check_can_cancel(status: RunStatus, save: bool) -> None:
    """Raises a HarnessError, before anything is done, for a run that this cannot end."""
    if status.state == "unknown":
        raise ClusterError(f"{status.run}: {status.reason}; nothing was cancelled")
    if status.state == "running" and status.job is None and not save:
        where = ", ".join(status.hosts) or "this machine"
        raise LaunchError(
            f"{status.run}: runs on {where} without Slurm, where its own terminal ends it; press Ctrl-C there, or let it save and leave: "
            f"harness cancel {status.run} --save"
        )


def can_save(status: RunStatus) -> bool:
    """Ranks are there, or are being started. A job that waits, or tries its nodes, has nothing that could be lost."""
    return status.state == "running" and (status.job is None or status.phase != "starting")


def ask_to_leave(run: RunDir) -> None:
    """Write the STOP file, over any that is there: with this reason the run is not queued again."""
    reason = f"cancel: asked by {getpass.getuser()} at {time.strftime('%Y-%m-%d %H:%M:%S')}"
    before = StopRequest.read(run.stop)
    deadline = f"deadline: {before.deadline:.0f}\n" if before and before.deadline else ""
    write_text_atomically(run.stop, f"{reason}\n{deadline}")
