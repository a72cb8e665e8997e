"""What to say when ranks have failed: the first failing rank's own error, its host, rank and phase; not the launcher's ChildFailedError."""

import signal
from dataclasses import dataclass
from pathlib import Path

from harness.run import RunDir, first_error, unfinished_ranks


@dataclass(frozen=True)
class Failure:
    exit_code: int
    text: str


def explain_failure(run: RunDir, attempt: int, launcher_code: int) -> Failure:
    """Read the attempt's reports. `launcher_code` is what the started process returned, negative for a signal."""
    error = first_error(run, attempt)
    if error:
        where = f"rank {error['rank']} on {error['host']} failed while {error['phase']}"
        what = error["traceback"].rstrip() or f"{error['type']}: {error['message']}"
        return Failure(error["exit_code"], f"{where}:\n{what}\n(logs: {run.attempt(attempt)})")
    silent = unfinished_ranks(run, attempt)
    if not silent:
        return Failure(1, f"the ranks could not be started: the launcher left with {launcher_code}; its message stands above")
    # The rank that died wrote nothing any more; the others were ended by the launcher.
    ranks = ", ".join(f"rank {report['rank']} on {report['host']} (pid {report['pid']}, while {report['phase']})" for report in silent)
    return Failure(1, f"a rank ended without an error of its own: {ranks}\n{_signal_text(launcher_code)}\n(logs: {run.attempt(attempt)})")


def _signal_text(launcher_code: int) -> str:
    killed = _kernel_kills()
    if launcher_code in (-signal.SIGKILL, 128 + signal.SIGKILL, 1) and killed:
        limit = _memory_limit()
        return (
            f"killed by the host's memory limit ({killed} kills counted in this cgroup{f', limit {limit}' if limit else ''}): every rank holds the "
            "whole model in host memory while it loads; use fewer ranks per machine, a smaller model, or ask for more memory"
        )
    if launcher_code < 0:
        return f"the launcher was ended by {signal.Signals(-launcher_code).name}"
    return "it was killed from outside, or crashed below Python (SIGKILL, SIGSEGV); the last lines of its log say where it was"


def _kernel_kills() -> int:
    """How many processes the kernel has killed for memory in this cgroup; 0 where that cannot be read."""
    for path in (Path("/sys/fs/cgroup/memory.events"), Path("/sys/fs/cgroup/memory/memory.oom_control")):
        if path.is_file():
            counts = dict(line.split()[:2] for line in path.read_text().splitlines() if len(line.split()) >= 2)
            return int(counts.get("oom_kill", 0))
    return 0


def _memory_limit() -> str:
    for path in (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")):
        if path.is_file() and path.read_text().strip().isdigit():
            return f"{int(path.read_text()) / 2**30:.1f} GiB"
    return ""
