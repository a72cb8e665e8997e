import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

import click

from harness.cluster.status import find_runs, job_log, jobs_of, read_statuses
from harness.cluster.submission import last_job
from harness.errors import LaunchError
from harness.run import RunDir

LOOK_EVERY_S = 0.5
ASK_SLURM_EVERY_S = 15.0
"""A hundred people may follow their runs."""
BLOCK_BYTES = 64 * 1024


@click.command("logs")
@click.argument("run")
@click.option("--rank", type=click.IntRange(0), help="Of this rank.  [default: 0]")
@click.option("--attempt", type=click.IntRange(1), help="Of this life of the run.  [default: the last]")
@click.option("--job", is_flag=True, help="What the Slurm job has said: pre-flight, lives, decisions.")
@click.option("-n", "--lines", type=click.IntRange(0), default=200, help="So many of the last lines.  [default: 200]")
@click.option("-f", "--follow", is_flag=True, help="Go on, from one life to the next, until the run has ended.")
@click.option("--root", type=click.Path(path_type=Path), default="runs", help="Where a job's id is looked for.  [default: runs]")
def command(run: str, rank: int | None, attempt: int | None, job: bool, lines: int, follow: bool, root: Path):
    """Print the log of RUN, a run folder or the id of its Slurm job: the last life's rank 0, unless asked otherwise."""
    folder = one_run(run, root)
    if job and (rank is not None or attempt is not None):
        raise LaunchError("--job and --rank or --attempt: a job has one log for all its ranks and lives; give one or the other")

    def find() -> Path | None:
        return find_job_log(folder) if job else find_rank_log(folder, rank or 0, attempt)

    file = find()
    if file is None and not (follow and read_statuses([folder])[0].is_there):
        raise LaunchError(explain_absence(folder, rank or 0, attempt, job))
    try:
        if follow:
            follow_log(folder, find, lines)
        else:
            show(last_lines(file, lines)[0])
    except FileNotFoundError as error:
        raise LaunchError(f"{error.filename}: was removed while it was read") from None


def one_run(asked: str, root: Path) -> RunDir:
    runs = find_runs(asked, root)
    if len(runs) > 1:
        names = ", ".join(run.path.name for run in runs[:3]) + (", …" if len(runs) > 3 else "")
        raise LaunchError(f"{asked}: holds {len(runs)} runs ({names}); name one of them")
    return runs[0]


# ---- which file


def find_rank_log(run: RunDir, rank: int, attempt: int | None) -> Path | None:
    numbers = run.attempts()[-1:] if attempt is None else [attempt]
    files = [run.attempt(number) / f"rank-{rank}.log" for number in numbers]
    return next((file for file in files if file.is_file()), None)


def find_job_log(run: RunDir) -> Path | None:
    job = last_job(run)
    return job_log(run, job) if job else None


def explain_absence(run: RunDir, rank: int, attempt: int | None, job: bool) -> str:
    """Why there is no such log, and which there are."""
    status, attempts = read_statuses([run])[0], run.attempts()
    waits = "; -f waits for one" if status.is_there else ""
    if job and status.job is None:
        return f"{run.path}: was never sent to Slurm, so no job has a log; leave --job out"
    if job:
        earlier = [str(file) for number in jobs_of(run)[:-1] if (file := job_log(run, number))]
        there = f"; of earlier jobs there are {', '.join(earlier)}" if earlier else ""
        return f"{run.path}: job {status.job} has written no log ({status.text}){there}{waits}"
    if not attempts:
        said = f"; --job shows what job {status.job} has said" if find_job_log(run) else ""
        return f"{run.path}: no life of it has begun, so no rank has a log ({status.text}){said}{waits}"
    if attempt is not None and attempt not in attempts:
        return f"{run.path}: has no attempt {attempt}; there are {_spans(attempts)}"
    number = attempt or attempts[-1]
    names = [file.name for file in run.attempt(number).glob("rank-*.log")]
    ranks = sorted(int(match[1]) for name in names if (match := re.fullmatch(r"rank-(\d+)\.log", name)))
    if not ranks:
        return f"{run.path}: no rank of attempt {number} has written a log ({status.text}){waits}"
    return f"{run.path}: attempt {number} has no log of rank {rank}; there are those of ranks {_spans(ranks)}"


def _spans(numbers: list[int]) -> str:
    """1, 2, 3, 5 as `1-3, 5`."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)


# ---- printing


def follow_log(run: RunDir, find: Callable[[], Path | None], lines: int) -> None:
    """Print what `find` finds and what is added to it, and go over to what it finds later, until the run has ended and all is printed."""
    file, position, asked, told = None, 0, float("-inf"), ""
    while True:
        # Asked before the log is read: what was written before the end is printed, too.
        if time.monotonic() - asked >= (ASK_SLURM_EVERY_S if last_job(run) else LOOK_EVERY_S):
            status, asked = read_statuses([run])[0], time.monotonic()
        newest = find() or file
        if file:
            position = show_from(file, position)
        if newest and file is None:
            said, position = last_lines(newest, lines)
            show(said)
        elif newest != file:
            say(f"==> {newest}")
            position = show_from(newest, 0)
        file = newest
        if not status.is_there and status.state != "unknown":
            say(f"==> {status.text}")
            return
        if file is None and status.text != told:
            told = status.text
            say(f"==> no log yet; {told}")
        time.sleep(LOOK_EVERY_S)


def last_lines(file: Path, count: int) -> tuple[bytes, int]:
    """The last lines of a file, read from its end backwards, and the position where they end."""
    with open(file, "rb") as stream:
        end = begin = stream.seek(0, os.SEEK_END)
        text = b""
        # One newline more than lines: that before the first.
        while begin > 0 and text.count(b"\n") <= count:
            size = min(BLOCK_BYTES, begin)
            begin = stream.seek(begin - size)
            text = stream.read(size) + text
    lines = text.removesuffix(b"\n").split(b"\n")[-count:] if count and text else []
    return b"\n".join(lines) + (b"\n" if lines and text.endswith(b"\n") else b""), end


def show_from(file: Path, position: int) -> int:
    """Print what a file has from there on; returns its end."""
    with open(file, "rb") as stream:
        stream.seek(position)
        while block := stream.read(BLOCK_BYTES):
            show(block)
        return stream.tell()


def show(said: bytes) -> None:
    sys.stdout.buffer.write(said)
    sys.stdout.buffer.flush()


def say(text: str) -> None:
    """Beside the log, so that a pipe gets the log alone."""
    click.echo(text, err=True)
