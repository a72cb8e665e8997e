"""The lives of a run: from where to where each one went, how it ended, what of it was kept, and where the time of all of them went.

A step is kept when the run as it stands was made with it. A life that begins again at checkpoint-R makes the steps after R again, so those
that an earlier life had made after R are lost. Of a run that is over and was not done, what came after its last commit is lost as well; of
one that runs, or waits to go on, it is not (yet).

The time of a run, from its submission or else its first life to its end or to now, has these parts, each second in one:

    kept         steps that were kept: steps of a line times its speed/step_s, which leaves evaluation and saving out
    lost         steps that were made and lost, counted in the same way
    passed over  steps that the guard left out (a loss that was not a number)
    evaluation   from the training line of a step to the evaluation's line, or what that says it took
    saving       as each commit says
    starting     from the first sign of a life to its first step: imports, model, data, checkpoint
    other        the rest of the lives: exporting, leaving, waiting to be noticed as dead
    queue        from being sent or requeued to the job's begin
    between      no life and no queue: pre-flight, preparing data, nobody there

Steps that no line tells of, because a life ended between two lines, are counted at the pace of the line before (`estimated_steps`).
"""

import contextlib
import json
import math
from array import array
from bisect import bisect_left, bisect_right
from dataclasses import dataclass, field
from statistics import median

from harness.report.columns import Columns
from harness.run import RunDir, rank_reports, read_outcome

PARTS = ("kept", "lost", "passed over", "evaluation", "saving", "starting", "other", "queue", "between")
OF_LIFE = (
    "run_began life_began committed retired save_failed retire_failed skipped_step rolled_back stopped finished replay_differs hang".split()
)
"""Events that a life writes itself; a job writes the others under the number of the last one."""
GOES_ON = ("running", "ending", "requeued", "pending", "held", "unknown")
"""States of a run in which nothing is lost yet."""


@dataclass
class Life:
    """One life. Times are Unix times, steps those that were completed."""

    number: int
    start: float
    """Its first sign."""
    end: float
    """Its last one."""
    resumed_from: int = 0
    last_step: int = 0
    trains: bool = False
    """It came as far as training."""
    world_size: int | None = None
    host: str = ""
    ended: str = ""
    """finished, preempted, time limit, stopped, rolled back, hung, killed, failed, running or unknown."""
    why: str = ""
    kept_until: float = math.inf
    """Steps up to this one were kept."""
    stands_until: float = math.inf
    """Steps up to this one were not made again by a later life: they are the last that there is of them, kept or not."""
    first_row: int = 0
    end_row: int = 0
    """Its lines of metrics.jsonl."""
    first_step_at: float | None = None
    """When it began to train."""
    lost_at: float | None = None
    """When it began on what was lost."""
    parts: dict[str, float] = field(default_factory=dict)
    estimated_steps: int = 0

    @property
    def lost_steps(self) -> int:
        return max(0, self.last_step - int(max(self.resumed_from, min(self.kept_until, self.last_step))))


@dataclass(frozen=True)
class Account:
    """Where a run's time went."""

    begin: float
    end: float
    parts: dict[str, float]
    """Seconds by PARTS."""
    waits: list[tuple[float, float]]
    """In the queue."""
    estimated_steps: int

    @property
    def wall_s(self) -> float:
        return self.end - self.begin

    @property
    def goodput(self) -> float | None:
        """Share of the wall time that went into steps that were kept."""
        return min(1.0, self.parts["kept"] / self.wall_s) if self.wall_s > 0 else None


# ---- which lives there were


def read_lives(run: RunDir, events: list[dict], columns: Columns, *, state: str, now: float) -> list[Life]:
    """In their order. state: of the run, as harness.cluster.status names it."""
    numbers = sorted({*run.attempts(), *(event["attempt"] for event in events if _is_of_life(event))})
    lives = [_read_life(run, number, events) for number in numbers]
    lives = [life for life in lives if life is not None]
    if not lives and len(columns):
        lives = _from_lines(columns)
    else:
        _share_lines(lives, columns)
    for life in lives:
        _take_in_lines(life, columns)
    for life, following in zip(lives, lives[1:], strict=False):
        life.end = min(life.end, max(life.start, following.start)) if following.start > life.start else life.end
    if lives:
        _judge(run, lives, events, state, now)
    return lives


def _is_of_life(event: dict) -> bool:
    return isinstance(event.get("attempt"), int) and event["event"] in OF_LIFE


def _read_life(run: RunDir, number: int, events: list[dict]) -> Life | None:
    """None for a folder in which nothing has ever begun."""
    own = [event for event in events if _is_of_life(event) and event["attempt"] == number]
    folder = run.attempt(number)
    alive = next(iter(rank_reports(folder, "alive", [0])), {}) if folder.is_dir() else {}
    signs = [event["time"] for event in own] + ([alive["time"]] if alive.get("time") else [])
    signs += [report["began"] for report in _node_reports(folder)]
    if not signs:
        return None
    began = next((event for event in own if event["event"] == "life_began"), None)
    with contextlib.suppress(OSError):
        # A file for each rank is made there when it starts, and then written over in place; a copy of the run has other times.
        made = (folder / "alive").stat().st_mtime
        if min(signs) - 3600 < made <= min(signs):
            signs.append(made)
    life = Life(number, min(signs), max(signs), host=alive.get("host") or "")
    if began:
        life.trains, life.world_size = True, began.get("world_size")
        life.resumed_from = life.last_step = began.get("resumed_from") or 0
    reached = [event["step"] for event in own if event["event"] in ("committed", "stopped", "finished") and event.get("step") is not None]
    # A rank says which step it works on.
    working_on = [alive["step"] - 1] if began and isinstance(alive.get("step"), int) and not reached_end(own) else []
    life.last_step = max([life.last_step, *reached, *working_on])
    return life


def reached_end(own: list[dict]) -> bool:
    return any(event["event"] in ("stopped", "finished") for event in own)


def _node_reports(folder) -> list[dict]:
    found = []
    for file in folder.glob("node-*.json"):
        with contextlib.suppress(OSError, ValueError):
            report = json.loads(file.read_text())
            if isinstance(report.get("began"), int | float):
                found.append(report)
    return found


def _share_lines(lives: list[Life], columns: Columns) -> None:
    """Each line to the last life that had shown a sign when it was written; the file is in the order of the lives."""
    row = 0
    for life, following in zip(lives, [*lives, None][1:], strict=True):
        life.first_row = row
        while row < len(columns) and (following is None or columns.times[row] < following.start):
            row += 1
        life.end_row = row


def _from_lines(columns: Columns) -> list[Life]:
    """Where nothing else is there: a new life wherever the step goes back."""
    lives, first = [], 0
    for row in range(1, len(columns) + 1):
        if row == len(columns) or columns.steps[row] < columns.steps[row - 1]:
            start = columns.steps[first] - 1 if lives else 0
            lives.append(Life(len(lives) + 1, columns.times[first], columns.times[row - 1], resumed_from=max(0, start), trains=True))
            lives[-1].first_row, lives[-1].end_row = first, row
            first = row
    return lives


def _take_in_lines(life: Life, columns: Columns) -> None:
    if life.end_row > life.first_row:
        life.trains = True
        life.last_step = max(life.last_step, max(columns.steps[life.first_row : life.end_row]))
        life.start = min(life.start, columns.times[life.first_row])
        life.end = max(life.end, columns.times[life.end_row - 1])


def _judge(run: RunDir, lives: list[Life], events: list[dict], state: str, now: float) -> None:
    for life in lives:
        life.ended, life.why = _how_it_ended(run, life, events)
    last = lives[-1]
    if state in ("running", "ending") and last.ended in ("killed", "unknown"):
        last.ended, last.why, last.end = "running", "", max(now, last.end)
    bound = math.inf
    # Where no ledger is left, nobody knows of a checkpoint.
    if state not in GOES_ON and last.ended != "finished" and events:
        bound = _last_commit(lives, events)
    made_again = math.inf
    for life in reversed(lives):
        life.kept_until, life.stands_until = min(bound, made_again), made_again
        if life.trains:
            made_again = min(made_again, life.resumed_from)


def _last_commit(lives: list[Life], events: list[dict]) -> int:
    """The step from which the run would go on."""
    for life in reversed(lives):
        if life.trains:
            own = [event["step"] for event in events if event["event"] == "committed" and event.get("attempt") == life.number]
            return max(own, default=life.resumed_from)
    return 0


def _how_it_ended(run: RunDir, life: Life, events: list[dict]) -> tuple[str, str]:
    """(in a word, why), from the life's own outcome, what its job made of it, and the errors of its ranks."""
    attempt = run.attempt(life.number)
    outcome = None
    with contextlib.suppress(ValueError, OSError):
        outcome = read_outcome(attempt)
    decided = next((event for event in events if event["event"] == "life_ended" and event.get("life") == attempt.name), {})
    why = str(decided.get("why") or (outcome or {}).get("reason") or "")
    name = (outcome or {}).get("outcome")
    if name == "done":
        return "finished", ""
    if name == "stopped":
        said = f"{why} {outcome.get('reason', '')}"
        word = "preempted" if "preempt" in said else "time limit" if "time limit" in said else "stopped"
        return word, why.removeprefix("slurm: ").removeprefix(f"{word}: ")
    if name:
        return {"rolled_back": "rolled back", "hang": "hung"}.get(name, name), why
    errors = rank_reports(attempt, "errors") if attempt.is_dir() else []
    # A rank that lost another one fails too; the job has found out which was first.
    if errors and "killed" not in why:
        first = errors[0]
        return "failed", why or f"rank {first.get('rank')}: {first.get('type')}: {str(first.get('message', '')).strip()[:300]}"
    return ("killed", why) if why or attempt.is_dir() else ("unknown", "nothing says how")


# ---- where the time went


def account(lives: list[Life], events: list[dict], columns: Columns, *, state: str, now: float) -> Account | None:
    """None while nothing has begun."""
    sent = [event["time"] for event in events if event["event"] == "submitted"]
    if not lives and not sent:
        return None
    pace = median(columns.values["speed/step_s"][1]) if "speed/step_s" in columns.values else None
    lines = _Lines.of(columns)
    for life in lives:
        _count_life(life, events, columns, lines, pace)
    begin = min(sent[:1] + [life.start for life in lives])
    waits = _waits(events, now if state in ("pending", "requeued", "held") else None)
    ends = [life.end for life in lives] + [end for _, end in waits]
    end = max(ends, default=begin)
    parts = dict.fromkeys(PARTS, 0.0)
    for life in lives:
        for part, seconds in life.parts.items():
            parts[part] += seconds
    at = begin
    for start, stop in [*((life.start, life.end) for life in lives), (end, end)]:
        if start > at:
            queued = sum(max(0.0, min(start, until) - max(at, since)) for since, until in waits)
            parts["queue"] += queued
            parts["between"] += max(0.0, start - at - queued)
        at = max(at, stop)
    return Account(begin, end, parts, waits, sum(life.estimated_steps for life in lives))


@dataclass(frozen=True)
class _Lines:
    """The lines about training: their numbers, and each one's seconds of a step, nan where it has none."""

    rows: array
    step_s: array

    @classmethod
    def of(cls, columns: Columns) -> "_Lines":
        paces = dict(columns.of("speed/step_s"))
        others = [row for row, key, _ in columns.not_finite if key == "train/loss"]
        rows = sorted({*columns.values.get("train/loss", ((), ()))[0], *others, *paces})
        return cls(array("q", rows), array("d", (paces.get(row, math.nan) for row in rows)))

    def between(self, life: Life) -> range:
        return range(bisect_left(self.rows, life.first_row), bisect_left(self.rows, life.end_row))


def _waits(events: list[dict], now: float | None) -> list[tuple[float, float]]:
    """From being sent to the begin of the job. `now`: the last wait still goes on."""
    waits, since = [], None
    for event in events:
        if event["event"] in ("submitted", "requeued"):
            since = event["time"]
        elif event["event"] == "job_began" and since is not None:
            waits.append((since, max(since, event["time"])))
            since = None
    if since is not None and now is not None:
        waits.append((since, max(since, now)))
    return waits


def _count_life(life: Life, events: list[dict], columns: Columns, lines: _Lines, pace: float | None) -> None:
    parts = dict.fromkeys(("kept", "lost", "passed over", "evaluation", "saving", "starting", "other"), 0.0)
    own = [event for event in events if _is_of_life(event) and event["attempt"] == life.number]
    skipped = sorted(event["step"] for event in own if event["event"] == "skipped_step" and isinstance(event.get("step"), int))
    saves = [(event["time"], float(event.get("save_s") or 0.0)) for event in own if event["event"] == "committed"]
    evaluations = _evaluations(life, columns, lines)
    parts["saving"] = sum(seconds for _, seconds in saves)
    parts["evaluation"] = sum(seconds for _, seconds in evaluations)

    def count(since: int, until: int, step_s: float) -> None:
        """Steps since+1 to until."""
        kept = max(0, int(min(life.kept_until, until)) - since)
        passed = bisect_right(skipped, since + kept) - bisect_left(skipped, since + 1)
        parts["passed over"] += passed * step_s
        parts["kept"] += (kept - passed) * step_s
        parts["lost"] += (until - since - kept) * step_s

    step, untold = life.resumed_from, 0
    for at in lines.between(life):
        row, step_s = lines.rows[at], lines.step_s[at]
        reached = columns.steps[row]
        if reached <= step:
            continue
        if math.isnan(step_s):
            untold += reached - step
        else:
            count(step, reached, step_s)
            pace = step_s
        if life.first_step_at is None and not math.isnan(step_s):
            before = columns.times[row]
            beside = sum(seconds for at, seconds in (*saves, *evaluations) if at <= before)
            life.first_step_at = max(life.start, before - (reached - step) * step_s - beside)
        if life.lost_at is None and reached > life.kept_until:
            lost = reached - max(step, life.kept_until)
            life.lost_at = columns.times[row] - (0.0 if math.isnan(step_s) else lost * step_s)
        step = reached
    span = max(0.0, life.end - life.start)
    known = parts["saving"] + parts["evaluation"]
    tail = max(0, life.last_step - step) + untold
    if life.first_step_at is not None:
        parts["starting"] = min(span, life.first_step_at - life.start)
    else:
        # Not one line: what it made, it made at its end.
        parts["starting"] = max(0.0, span - known - tail * (pace or 0.0))
        life.first_step_at = life.start + parts["starting"] if tail else None
    left = span - sum(parts.values())
    if tail and pace and left > 0:
        count(life.last_step - tail, life.last_step, min(pace, left / tail))
        life.estimated_steps = tail
    parts["other"] = max(0.0, span - sum(parts.values()))
    life.parts = parts


def _evaluations(life: Life, columns: Columns, lines: _Lines) -> list[tuple[float, float]]:
    """(end, seconds) of each: from the training line of the same step, or as its own line says."""
    found = []
    rows, seconds = columns.values.get("eval/runtime_s", ((), ()))
    for at in range(bisect_left(rows, life.first_row), bisect_left(rows, life.end_row)):
        row, took, before = rows[at], seconds[at], rows[at] - 1
        place = bisect_left(lines.rows, before)
        logged = before >= life.first_row and place < len(lines.rows) and lines.rows[place] == before
        if logged and columns.steps[before] == columns.steps[row]:
            took = max(took, columns.times[row] - columns.times[before])
        found.append((columns.times[row], took))
    return found
