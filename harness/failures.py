"""What to say when ranks have failed: the first failing rank's own error, its host, rank and phase; not the launcher's ChildFailedError.
And whether it is worth another try."""

import re
import signal
from dataclasses import dataclass
from pathlib import Path

from harness.errors import Stopped
from harness.run import rank_reports

# What a rank says when another one is gone, or never came: true, but never the reason.
_ECHO = re.compile(
    r"(?i)connection (was )?(likely )?(closed|reset|refused)|socket ?(has )?time(out|d out)|timed out (after|waiting)|wait timeout"
    r"|failed to (recv|connect)|broken pipe|connectFullMesh failed|remote process exited|watchdog|Dist(Network|Store)Error"
)


# What another try may not meet again: a card, a link, a disk or a node, and not the recipe, the data or the code.
_MACHINE = re.compile(
    r"(?i)nccl(System|Remote|Internal)Error|NCCL error|uncorrectable ECC|unspecified launch failure|illegal memory access"
    r"|CUDA error: (unknown error|the launch timed out)|CUDA-capable device(s are|\(s\) is/are) busy|No CUDA GPUs are available"
    r"|CUDA driver initialization failed|fell off the bus|DataLoader worker .* killed by signal"
    r"|Stale file handle|Transport endpoint is not connected|Input/output error|Address already in use|EADDRINUSE"
)


@dataclass(frozen=True)
class Failure:
    exit_code: int
    text: str
    may_pass: bool = True
    """Whether the same command may do better: a rank was killed, or a machine failed. An error in recipe, data or code stays."""

    @property
    def summary(self) -> str:
        """Who failed and with what, for places that take one line."""
        lines = [line.strip() for line in self.text.splitlines() if line.strip() and not line.startswith("(logs:")]
        return " ".join(dict.fromkeys((lines[0], lines[-1])))


def explain_failure(attempt: Path | None, launcher_code: int, oom_kills: int = 0) -> Failure:
    """Read an attempt's reports. `launcher_code` is what the started process returned, negative for a signal; `oom_kills` is how many
    processes the kernel has killed for memory meanwhile."""
    errors = rank_reports(attempt, "errors") if attempt else []
    alive = rank_reports(attempt, "alive") if attempt else []
    failed = {report["rank"] for report in errors}
    # These wrote nothing any more: killed, or crashed below Python. A rank that the launcher has ended says so.
    silent = [
        report
        for report in alive
        if report["rank"] not in failed and report["phase"] not in ("finished", "stopped") and "ended_by" not in report
    ]
    own = [report for report in errors if not _is_echo(report)]
    logs = f"(logs: {attempt})"
    if own or (errors and not silent):
        error = (own or errors)[0]
        what = error["traceback"].rstrip() or f"{error['type']}: {error['message']}"
        text = f"{_who(error)} failed while {error['phase']}:\n{what}\n{logs}"
        may_pass = not own or (error["traceback"] != "" and bool(_MACHINE.search(f"{error['type']}: {error['message']}")))
        return Failure(error["exit_code"], text, may_pass)
    if silent:
        ranks = "; ".join(f"{_who(report)} (pid {report['pid']}) while {report['phase']}" for report in silent)
        return Failure(1, f"ended without an error of its own: {ranks}\n{_end_text(launcher_code, oom_kills)}\n{logs}")
    stopped = [report for report in alive if report["phase"] == "stopped"]
    if stopped:
        return Failure(Stopped.exit_code, f"the ranks stopped on purpose: {stopped[0]['stopped']}; the same command continues\n{logs}")
    ended = [report for report in alive if "ended_by" in report]
    if ended:
        return Failure(1, f"the ranks were ended by {ended[0]['ended_by']} from outside while {ended[0]['phase']}\n{logs}")
    return Failure(1, f"the ranks could not be started: the launcher left with {launcher_code}; its message stands above")


def _who(report: dict) -> str:
    return f"rank {report['rank']} on {report['host']}"


def _is_echo(report: dict) -> bool:
    return report["traceback"] != "" and bool(_ECHO.search(f"{report['type']}: {report['message']}"))


def _end_text(launcher_code: int, oom_kills: int) -> str:
    if oom_kills:
        limit = _memory_limit()
        return (
            f"killed by the host's memory limit{f' of {limit}' if limit else ''} (kills meanwhile: {oom_kills}): every rank holds the "
            "whole model in host memory while it loads; use fewer ranks per machine, a smaller model, or ask for more memory"
        )
    if launcher_code < 0:
        return f"the launcher was ended by {signal.Signals(-launcher_code).name}"
    return "it was killed from outside, or crashed below Python (SIGKILL, SIGSEGV); the last lines of its log say where it was"


def count_oom_kills() -> int:
    """How many processes the kernel has ever killed for memory in this process's cgroup (a container's, a Slurm step's); 0 where that
    cannot be read."""
    for path in _cgroup_files("memory.events", "memory.oom_control"):
        counts = dict(line.split()[:2] for line in path.read_text().splitlines() if len(line.split()) >= 2)
        return int(counts.get("oom_kill", 0))
    return 0


def _cgroup_files(v2: str, v1: str) -> list[Path]:
    """Those that there are of the files of this process's own cgroup, and of the one at the root of what it sees."""
    try:
        lines = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    except OSError:
        lines = []
    own = [Path(f"/sys/fs/cgroup{path}") / v2 for _, controllers, path in lines if controllers == ""]
    own += [Path(f"/sys/fs/cgroup/memory{path}") / v1 for _, controllers, path in lines if "memory" in controllers.split(",")]
    return [path for path in (*own, Path("/sys/fs/cgroup") / v2, Path("/sys/fs/cgroup/memory") / v1) if path.is_file()]


def _memory_limit() -> str:
    for path in _cgroup_files("memory.max", "memory.limit_in_bytes"):
        if path.read_text().strip().isdigit():
            return f"{int(path.read_text()) / 2**30:.1f} GiB"
    return ""
