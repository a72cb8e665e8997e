"""Whether the ranks of this machine live: their hearts are listened to, and what stands still is named, shown and ended.

Each rank writes its phase and step into its attempt's folder (harness.run.RankReport). `harness run` looks there every second. A rank whose
heart has been silent for longer than its phase may take (recipe.watchdog) makes the life a hang: the rank that holds up the others is
named, every rank's Python stacks go to logs/attempt-K/hang.txt, and all processes of the life are killed, so that the last commit is used
within minutes and not after a collective's timeout.

The promise: a rank that comes on is never taken for one that stands still. Silence is counted by this process's own clock while it runs
itself, so that neither clocks that differ nor a machine that slept are taken for a hang; and while one rank is in a long phase, such as a
save, the others may wait for it as long.
"""

import contextlib
import ctypes
import faulthandler
import os
import signal
import statistics
import sys
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

from harness.recipe.schema import Watchdog as Limits
from harness.run import LAUNCH_VARIABLE, rank_reports

LOOK_EVERY_S = 1.0
LONGEST_LOOK_S = 10.0
"""More than this between two looks is time in which this process stood still itself, and is not counted."""
SLOWEST_STEP = 20
"""A step may take so many times the median step..."""
STEP_FLOOR_S = 300.0
"""...and at least this long."""
OTHERS_S = 10.0
"""So much longer waits a machine that cannot tell who it is, so that one that can speaks first."""
STACKS_S = 2.0
"""What a rank gets to write its stacks."""
STACKS_BYTES = 200_000
KILL_S = 30.0
"""Within this a killed process is gone, unless the kernel holds it (a dead network disk, a driver)."""
BEATING = ("training", "evaluating")
SAVING = ("saving", "verifying", "exporting", "leaving", "stopped", "finished")
"""First words of the phases that watchdog.save_s is for; the last three are a rank's way out."""
# Found here and not between fork and exec, where nothing may be looked up.
_PRCTL = ctypes.CDLL(None).prctl if sys.platform == "linux" else None
_PR_SET_PDEATHSIG = 1
STATES = {
    None: "its process is gone",
    "Z": "its process has ended and nobody has taken note",
    "X": "its process is gone",
    "T": "its process is stopped (SIGSTOP)",
    "t": "its process is held by a debugger",
    "D": "its process is held in the kernel (a disk, a network or a driver that does not answer)",
}
"""By the letter in /proc/PID/stat; the first found here names the culprit."""


# ---- listening


@dataclass
class Heart:
    """What is known of one rank."""

    rank: int
    report: dict = field(default_factory=dict)
    """The last that it wrote; empty before its first."""
    silent_s: float = 0.0
    steps_s: deque[float] = field(default_factory=lambda: deque(maxlen=64))
    """What its last steps took."""
    step_began: float = 0.0

    phase = property(lambda self: self.report.get("phase", "starting"))
    step = property(lambda self: self.report.get("step"))
    pid = property(lambda self: self.report.get("pid"))
    kind = property(lambda self: self.phase.partition(":")[0].partition(" ")[0])
    beats = property(lambda self: self.kind in BEATING)

    def hear(self, report: dict) -> None:
        if report == self.report:
            return
        before, now = self.step, report["step"]
        if before is not None and now > before:
            self.steps_s.append((report["time"] - self.step_began) / (now - before))
        if now != before:
            self.step_began = report["time"]
        self.report, self.silent_s = report, 0.0

    def limit_s(self, limits: Limits) -> float:
        if self.kind in SAVING:
            return limits.save_s
        if not self.beats:
            return limits.start_s
        if self.step == self.report["first_step"]:
            return limits.first_step_s
        return limits.step_s or max(STEP_FLOOR_S, SLOWEST_STEP * statistics.median(self.steps_s or [0.0]))

    @property
    def name(self) -> str:
        return f"rank {self.rank}" + (f" on {self.report['host']} (pid {self.pid})" if self.report else "")

    @property
    def doing(self) -> str:
        return self.phase + ("" if self.step is None else f", step {self.step}")


@dataclass(frozen=True)
class Hang:
    culprit: Heart
    why: str
    limit_s: float
    hearts: list[Heart]
    is_certain: bool
    """Whether more than its silence speaks against the culprit."""

    @property
    def text(self) -> str:
        silent = f"no sign of life from {self.culprit.name} for {self.culprit.silent_s:.0f} s while {self.culprit.doing}"
        return f"{silent} (limit {self.limit_s:.0f} s): {self.why}"


class Watchdog:
    """For the ranks that one `harness run` has started on its machine: `ranks` are their numbers, `launch` is the word by which it knows
    its processes. `now` is a clock that never jumps, here and below."""

    def __init__(self, limits: Limits, launch: str, ranks: range, *, now: float, proc: Path = Path("/proc")):
        self._limits, self._launch, self._ranks, self._proc, self._looked = limits, launch, ranks, proc, now
        self._hearts = {rank: Heart(rank) for rank in ranks}

    def look(self, attempt: Path | None, now: float) -> Hang | None:
        """Listen to the ranks; `attempt` is None as long as another machine has not opened it."""
        passed, self._looked = min(now - self._looked, LONGEST_LOOK_S), now
        for heart in self._hearts.values():
            heart.silent_s += passed
        for report in rank_reports(attempt, "alive", self._ranks) if attempt else ():
            self._hearts[report["rank"]].hear(report)
        staying = [heart for heart in self._hearts.values() if not self._has_left(heart)]
        limit_s = max((heart.limit_s(self._limits) for heart in staying), default=0.0)
        if all(heart.silent_s <= limit_s for heart in staying):
            return None
        # Those of other machines are asked only now: a thousand ranks that all read of all would burden a shared disk.
        others = self._other_hearts(attempt) if attempt else []
        limit_s = max(limit_s, *(heart.limit_s(self._limits) for heart in others if not heart.beats), 0.0)
        if all(heart.silent_s <= limit_s for heart in staying):
            return None
        hang = self._blame(sorted([*staying, *others], key=lambda heart: heart.rank), limit_s)
        if others and not hang.is_certain and all(heart.silent_s <= limit_s + OTHERS_S for heart in staying):
            return None
        return hang

    def _other_hearts(self, attempt: Path) -> list[Heart]:
        """Those of other machines that have not left, silent for as long as their clocks say."""
        reports = [report for report in rank_reports(attempt, "alive") if report["rank"] not in self._ranks]
        newest = max((report["time"] for report in reports), default=0.0)
        hearts = [Heart(report["rank"], report, newest - report["time"]) for report in reports]
        return [heart for heart in hearts if not self._has_left(heart)]

    def _has_left(self, heart: Heart) -> bool:
        """It has said its last word, and its process is gone as it should (or is not for this machine to see)."""
        last_word = heart.phase in ("finished", "stopped") or "ended_by" in heart.report
        return last_word and not self._lives(heart)

    def _lives(self, heart: Heart) -> bool:
        return heart.rank in self._ranks and heart.pid in processes_of(self._launch, self._proc)

    def _blame(self, hearts: list[Heart], limit_s: float) -> Hang:
        """The one that the others wait for: whoever cannot run, else whoever has not come to the step of the others, else whoever fell
        silent first."""
        states = {heart.rank: process_state(heart.pid, self._proc) for heart in hearts if heart.rank in self._ranks and heart.report}
        for letter, why in STATES.items():
            for heart in hearts:
                if states.get(heart.rank, "R") == letter:
                    return Hang(heart, why, limit_s, hearts, is_certain=True)
        steps = {heart.rank: -1 if heart.step is None else heart.step for heart in hearts}
        last = min(hearts, key=lambda heart: (steps[heart.rank], bool(heart.report), -heart.silent_s))
        ahead = max(steps.values())
        if not last.report:
            return Hang(last, "it never said that it has begun", limit_s, hearts, is_certain=True)
        runs = "its process runs, but does not come on"
        if steps[last.rank] < ahead:
            return Hang(last, f"{runs}; the others are at step {ahead}", limit_s, hearts, is_certain=True)
        elsewhere = any(heart.rank not in self._ranks for heart in hearts)
        more = "; the cause may be on another machine" if elsewhere else "; it fell silent first" if len(hearts) > 1 else ""
        return Hang(last, runs + more, limit_s, hearts, is_certain=False)

    def write_stacks(self, hang: Hang, attempt: Path) -> Path:
        """Write hang.txt in the attempt's folder: what was found, each rank's state, and the stacks of this machine's ranks. Returns it."""
        mine = [heart for heart in hang.hearts if self._lives(heart)]
        logs = {heart.rank: attempt / f"rank-{heart.rank}.log" for heart in mine}
        lengths = {rank: log.stat().st_size if log.is_file() else 0 for rank, log in logs.items()}
        for heart in mine:
            # Unheard, the signal would end the process; a stopped one gets it when it is continued, which it never is.
            if _hears(heart.pid, signal.SIGQUIT, self._proc):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(heart.pid, signal.SIGQUIT)
        time.sleep(STACKS_S)
        lines = [f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')} hang: {hang.text}", ""]
        lines += [self._describe(heart) for heart in hang.hearts]
        for heart in mine:
            stacks = _text_from(logs[heart.rank], lengths[heart.rank]) or "(none: it could not write them)\n"
            lines += ["", f"---- stacks of {heart.name}", stacks.rstrip()]
        path = attempt / "hang.txt"
        # Added to, because other machines write into it too.
        with open(path, "a", encoding="utf-8") as file:
            file.write("\n".join(lines) + "\n\n")
        return path

    def _describe(self, heart: Heart) -> str:
        text = f"{heart.name}: {heart.doing}; silent for {heart.silent_s:.0f} s"
        if heart.rank in self._ranks and heart.report:
            state, waits_in = process_state(heart.pid, self._proc), _kernel_function(heart.pid, self._proc)
            text += f"; process state {state or 'gone'}" + (f", in the kernel's {waits_in}" if waits_in else "")
        return text


# ---- processes


def process_state(pid: int, proc: Path = Path("/proc")) -> str | None:
    """The letter of its state, None when there is no such process."""
    try:
        # A command's name may hold blanks and brackets; the last bracket ends it.
        return (proc / str(pid) / "stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return None


def processes_of(launch: str, proc: Path = Path("/proc")) -> set[int]:
    """Every living process of a launch, in whatever session and under whatever parent: its word is in their environment."""
    entry, found = f"{LAUNCH_VARIABLE}={launch}".encode(), set()
    for folder in proc.glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if entry in (folder / "environ").read_bytes().split(b"\0"):
                found.add(int(folder.name))
    return found


def end_processes(launch: str) -> set[int]:
    """Kill every process of a launch, stopped ones too. Returns those that are still there after half a minute."""
    deadline = time.monotonic() + KILL_S
    while left := processes_of(launch):
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if time.monotonic() > deadline:
            return left
        time.sleep(0.05)
    return left


def follow_parent(number: signal.Signals) -> None:
    """From here on this process gets the signal when the one that started it ends, however that ends (Linux): nothing runs on unwatched."""
    if _PRCTL:
        _PRCTL(_PR_SET_PDEATHSIG, int(number))


_STACKS: list = []


def register_stack_dump(log: Path) -> None:
    """On SIGQUIT this process writes the Python stacks of all its threads to `log`, also when it is stuck in C or waits for a lock."""
    file = open(log, "a")  # noqa: SIM115 - the handler needs it as long as the process lives
    faulthandler.register(signal.SIGQUIT, file=file, all_threads=True, chain=False)
    _STACKS.append(file)


def _hears(pid: int, number: signal.Signals, proc: Path) -> bool:
    """Whether the process has a handler for the signal."""
    with contextlib.suppress(OSError):
        for line in (proc / str(pid) / "status").read_text().splitlines():
            if line.startswith("SigCgt:"):
                return bool(int(line.split()[1], 16) >> (number - 1) & 1)
    return False


def _kernel_function(pid: int, proc: Path) -> str:
    """Where in the kernel the process waits; empty where that is secret."""
    try:
        return (proc / str(pid) / "wchan").read_text().strip("0\n")
    except OSError:
        return ""


def _text_from(path: Path, start: int) -> str:
    try:
        with open(path, "rb") as file:
            file.seek(start)
            return file.read(STACKS_BYTES).decode(errors="replace")
    except OSError:
        return ""
