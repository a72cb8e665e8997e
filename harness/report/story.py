"""Everything that is known of a run, read from its folder and, where it has a job, asked of Slurm; and the same as JSON."""

import json
import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from harness.checkpoint.ledger import read_ledger
from harness.cluster.status import RunStatus, read_statuses
from harness.errors import CheckpointError, HarnessError, first_line
from harness.recipe import Recipe, load
from harness.recipe.load import difference_from_defaults, read_yaml
from harness.report.columns import Columns
from harness.report.curves import Curve, build_curve
from harness.report.lives import Account, Life, account, read_lives
from harness.report.memory import Memory, forecast
from harness.report.words import counted, listed
from harness.run import RunDir
from harness.tracking.wandb_run import redact

FORMAT = 1
MEASURES = ("eval/loss", "eval/reward", "train/loss", "train/reward")
"""What a run is judged by where its recipe names nothing: the first that it has logged."""
WHERE = ("output_dir",)
"""Settings that say nothing of what is trained."""


@dataclass
class Story:
    run: RunDir
    name: str
    """Told from those of the other runs on the page."""
    status: RunStatus
    columns: Columns
    events: list[dict]
    manifest: dict
    recipe: Recipe | None
    """None where this version cannot read it; then `settings` is what stands in the file."""
    settings: dict[str, Any]
    lives: list[Life]
    account: Account | None
    read_at: float
    notes: list[str] = field(default_factory=list)
    """What a reader has to know before a number is believed."""

    def curve(self, key: str, parts: int = 300) -> Curve | None:
        return build_curve(self.columns, self.lives, key, parts)

    @cached_property
    def task(self) -> str:
        return str(self.settings.get("task") or "unknown task")

    @cached_property
    def measure(self) -> Curve | None:
        """What the run is judged by: the recipe's `metric_for_best_model`, else the first of MEASURES that was logged."""
        asked = self.setting("train.metric_for_best_model")
        curves = (self.curve(key, 1) for key in dict.fromkeys([*([asked] if isinstance(asked, str) else []), *MEASURES]))
        return next((curve for curve in curves if curve and curve.points), None)

    @cached_property
    def memory(self) -> Memory:
        peaks = [max(self.columns.values[key][1], default=None) if key in self.columns.values else None for key in PEAKS]
        return forecast(self.run, self.recipe, self.manifest, *peaks)

    @property
    def last_step(self) -> int:
        """To which it came."""
        return max((int(min(life.stands_until, life.last_step)) for life in self.lives if life.trains), default=0)

    @property
    def lost_steps(self) -> int:
        return sum(life.lost_steps for life in self.lives)

    def setting(self, key: str) -> Any:
        value: Any = self.settings
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return value

    @cached_property
    def differences(self) -> dict[str, Any]:
        """Dotted key -> value, of what is not a default; of a recipe that cannot be read, of all that stands there."""
        if self.recipe is None:
            return {key: value for key, value in flatten(self.settings).items() if key not in WHERE}
        found = {key: redact(value, key.rpartition(".")[2]) for key, value in difference_from_defaults(self.recipe).items()}
        # A section that is no default by being there: with what it says, and not only with what differs from its own defaults.
        return {key: self._said_of(key) if isinstance(value, dict) else value for key, value in found.items() if key not in WHERE}

    def _said_of(self, section: str) -> dict[str, Any]:
        return {key: value for key, value in (self.setting(section) or {}).items() if value not in (None, False, [], {})}


PEAKS = ("memory/peak_gib", "memory/peak_reserved_gib")


class Reader:
    """Reads the same runs again and again; of metrics.jsonl only what is new. Slurm is asked every `ask_every_s` at most."""

    def __init__(self, runs: Sequence[RunDir], ask_every_s: float = 20.0):
        self.runs = list({run.path: run for run in runs}.values())
        self._columns = {run.path: Columns(run.metrics) for run in self.runs}
        self._statuses: list[RunStatus] = []
        self._asked, self._ask_every_s = -math.inf, ask_every_s

    def read(self) -> list[Story]:
        """By the time at which they began, those that have not behind them."""
        if time.monotonic() - self._asked > self._ask_every_s:
            self._statuses, self._asked = read_statuses(self.runs), time.monotonic()
        names = short_names([run.path for run in self.runs])
        stories = [
            read_story(run, name, status, self._columns[run.path])
            for run, name, status in zip(self.runs, names, self._statuses, strict=True)
        ]
        return sorted(stories, key=lambda story: (story.account.begin if story.account else math.inf, str(story.run.path)))

    def signature(self) -> tuple:
        """Another one when there may be something new to read."""
        found = []
        for run in self.runs:
            for path in (run.metrics, run.ledger, run.recipe, run.manifest):
                try:
                    stat = path.stat()
                    found.append((stat.st_mtime_ns, stat.st_size))
                except OSError:
                    found.append(None)
            found.append(len(run.attempts()))
        return tuple(found)


def load_stories(runs: Sequence[RunDir]) -> list[Story]:
    return Reader(runs).read()


def read_story(run: RunDir, name: str, status: RunStatus, columns: Columns) -> Story:
    notes, now = [], time.time()
    columns.read_on()
    try:
        events = [event for event in read_ledger(run.ledger) if isinstance(event["time"], int | float)]
    except CheckpointError as error:
        events = []
        notes.append(f"the ledger cannot be read, so lives, saves and losses are not all known: {first_line(error)}")
    recipe, settings = _read_recipe(run, notes)
    manifest = _read_json(run.manifest)
    lives = read_lives(run, events, columns, state=status.state, now=now)
    if status.state == "running" and lives and lives[-1].ended == "finished":
        # A process with several trainings, such as the quickstart's, holds the folders of those that are done.
        status = replace(status, state="done", phase="")
    spent = account(lives, events, columns, state=status.state, now=now)
    notes += _notes(events, columns, manifest)
    return Story(run, name, status, columns, events, manifest, recipe, settings, lives, spent, now, notes)


def _read_recipe(run: RunDir, notes: list[str]) -> tuple[Recipe | None, dict]:
    try:
        settings = redact(read_yaml(run.recipe))
    except HarnessError as error:
        notes.append(f"recipe.yaml cannot be read: {first_line(error)}")
        return None, {}
    try:
        return load(run.recipe), settings
    except HarnessError as error:
        notes.append(f"this version of harness cannot load the recipe, so it is shown as it stands: {first_line(error)}")
        return None, settings


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _notes(events: list[dict], columns: Columns, manifest: dict) -> list[str]:
    notes, counts = [], Counter(event["event"] for event in events)
    if manifest.get("smoke"):
        notes.append("this is a smoke test: two steps on the longest rows")
    by_key: dict[str, list[int]] = {}
    for row, key, _ in columns.not_finite:
        by_key.setdefault(key, []).append(columns.steps[row])
    for key, steps in by_key.items():
        where = ", ".join(f"{step:,}" for step in dict.fromkeys(steps[:5])) + (" …" if len(steps) > 5 else "")
        notes.append(f"{key} was not a number in {counted(len(steps), 'line')} (step {where})")
    said = {
        "skipped_step": "step passed over, because its loss or gradient was no number or a spike",
        "save_failed": "save failed",
        "quarantined": "checkpoint was not whole, and put aside",
        "replay_differs": "value came out otherwise when a later life made its step again",
    }
    plural = {
        "skipped_step": "steps passed over, because their loss or gradient was no number or a spike",
        "save_failed": "saves failed",
        "quarantined": "checkpoints were not whole, and put aside",
        "replay_differs": "values came out otherwise when a later life made their step again",
    }
    for event, words in said.items():
        if counts[event]:
            last = next(one for one in reversed(events) if one["event"] == event)
            why = last.get("why") or last.get("error") or last.get("reason") or last.get("key") or ""
            notes.append(counted(counts[event], words, plural[event]) + (f" (the last: {str(why)[:200]})" if why else ""))
    if columns.torn:
        notes.append(f"{counted(columns.torn, 'line')} of metrics.jsonl {'is' if columns.torn == 1 else 'are'} torn and left out")
    return notes


def short_names(paths: Sequence[Path]) -> list[str]:
    """The last part of each path, with as many before it as tell it from the others."""
    names = []
    for path in paths:
        for length in range(1, len(path.parts) + 1):
            name = "/".join(path.parts[-length:])
            if sum(other.parts[-length:] == path.parts[-length:] for other in paths) == 1:
                break
        names.append(name)
    return names


def flatten(settings: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(settings, dict) or not settings:
        return {prefix.removesuffix("."): settings} if prefix else {}
    return {key: value for name, part in settings.items() for key, value in flatten(part, f"{prefix}{name}.").items()}


def differing_settings(stories: Sequence[Story]) -> dict[str, list[Any]]:
    """Dotted key -> its value in each run, None where it has none. Of those that are no default in one of them, and not the same in all."""
    flat = [flatten(story.settings) | story.differences for story in stories]
    keys = dict.fromkeys(key for story in stories for key in story.differences if key not in WHERE)
    rows = {key: [one.get(key) for one in flat] for key in keys}
    return {key: values for key, values in rows.items() if any(value != values[0] for value in values)}


def as_object(story: Story) -> dict:
    """For programs. Seconds, bytes and shares as named; docs/report.md says what the keys mean."""
    memory, spent, measure = story.memory, story.account, story.measure
    return {
        "run": str(story.run.path),
        "name": story.name,
        "task": story.task,
        "state": story.status.state,
        "reason": story.status.reason,
        "step": story.last_step,
        "steps": story.status.steps,
        "lost_steps": story.lost_steps,
        "lives": [_life_object(life) for life in story.lives],
        "time": spent
        and {
            "begin": spent.begin,
            "end": spent.end,
            "wall_s": spent.wall_s,
            "goodput": spent.goodput,
            "parts_s": {part: round(seconds, 3) for part, seconds in spent.parts.items()},
            "estimated_steps": spent.estimated_steps,
        },
        "measure": measure and {"key": measure.key, "first": measure.first, "last": measure.last, "low": measure.low, "high": measure.high},
        "metrics": {key: _curve_object(curve) for key in sorted(story.columns.values) if (curve := story.curve(key, 1)) and curve.points},
        "memory_gib": asdict(memory),
        "recipe": story.differences,
        "lineage": story.manifest.get("lineage") or [],
        "notes": story.notes,
    }


def _life_object(life: Life) -> dict:
    kept = None if math.isinf(life.kept_until) else life.kept_until
    parts = {part: round(seconds, 3) for part, seconds in life.parts.items()}
    names = ("number", "start", "end", "resumed_from", "last_step", "trains", "world_size", "host", "ended", "why", "lost_steps")
    return {name: getattr(life, name) for name in names} | {"kept_until": kept, "parts_s": parts}


def _curve_object(curve: Curve) -> dict:
    names = ("first", "last", "median", "count")
    return {name: getattr(curve, name) for name in names} | {"low": curve.low[1], "high": curve.high[1]}


def title_of(stories: Sequence[Story]) -> str:
    if len(stories) == 1:
        return stories[0].name
    folders = {story.run.path.parent for story in stories}
    return (
        folders.pop().name if len(folders) == 1 else listed([story.name for story in stories][:3]) if len(stories) <= 3 else "Several runs"
    )
