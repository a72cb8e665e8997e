"""What is drawn of one metric: its values, those of steps that a later life made again, and a mean through them.

A step counts as it went the last time. Curves are thinned for the page: of each of so many equal parts of the
axis the first, the lowest, the highest and the last point stay, so that no peak is lost. Means are taken before that, over all points.
"""

import math
from array import array
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field

from harness.report.columns import Columns
from harness.report.lives import Life
from harness.tracking.metrics import smooth

SMOOTHED_FROM = 60
"""Fewer points are drawn as they are."""
Points = list[tuple[int, float]]


@dataclass(frozen=True)
class Curve:
    """One key of one run: (step, value), by rising step."""

    key: str
    points: Points
    """Thinned."""
    smoothed: Points = field(default_factory=list)
    """Thinned; empty where the points are few."""
    lost: list[Points] = field(default_factory=list)
    """For each life whose last steps were made again, these, from the point before them on."""
    not_finite: Points = field(default_factory=list)
    """Steps at which it was not a number; the value is the one before, or nan."""
    count: int = 0
    """Of kept points, before they were thinned."""
    first: float = math.nan
    last: float = math.nan
    low: tuple[int, float] = (0, math.nan)
    high: tuple[int, float] = (0, math.nan)
    median: float = math.nan


def build_curve(columns: Columns, lives: Sequence[Life], key: str, parts: int) -> Curve | None:
    """None where the key has neither a value nor one that is not a number. parts: into how many the axis is cut for thinning."""
    kept, lost = _split(columns, lives, key)
    steps, values = array("q"), array("d")
    for step, value in sorted(kept.items()) if not _rises(kept) else kept.items():
        steps.append(step)
        values.append(value)
    bad = [(columns.steps[row], named) for row, named, _ in columns.not_finite if named == key]
    if not steps and not bad:
        return None
    if not steps:
        return Curve(key, [], not_finite=[(step, math.nan) for step, _ in bad])
    ordered = sorted(values)
    low, high = values.index(ordered[0]), values.index(ordered[-1])
    return Curve(
        key,
        points=thin(steps, values, parts),
        smoothed=_smoothed(steps, values, parts) if len(values) > SMOOTHED_FROM else [],
        lost=[thin(*_columns_of(points), max(8, parts // 4)) for points in lost],
        not_finite=[(step, values[max(0, bisect_right(steps, step) - 1)]) for step, _ in bad][:200],
        count=len(values),
        first=values[0],
        last=values[-1],
        low=(steps[low], values[low]),
        high=(steps[high], values[high]),
        median=ordered[len(ordered) // 2],
    )


def _split(columns: Columns, lives: Sequence[Life], key: str) -> tuple[dict[int, float], list[Points]]:
    kept: dict[int, float] = {}
    lost: list[Points] = []
    life_at, losing, before = 0, [], None
    for row, value in columns.of(key):
        while life_at < len(lives) and row >= lives[life_at].end_row:
            life_at, losing, before = life_at + 1, [], None
        until = lives[life_at].stands_until if life_at < len(lives) else math.inf
        step = columns.steps[row]
        if step <= until:
            kept[step] = value
            before = step, value
            continue
        if not losing:
            losing = [before] if before else []
            lost.append(losing)
        losing.append((step, value))
    return kept, [points for points in lost if len(points) > 1]


def _rises(kept: dict[int, float]) -> bool:
    before = -math.inf
    for step in kept:
        if step < before:
            return False
        before = step
    return True


def _smoothed(steps: array, values: array, parts: int) -> Points:
    places = [*range(0, len(values) - 1, max(1, len(values) // parts)), len(values) - 1]
    return list(zip((steps[place] for place in places), smooth(values, places), strict=True))


def _columns_of(points: Points) -> tuple[list[int], list[float]]:
    return [step for step, _ in points], [value for _, value in points]


def thin(steps: Sequence[int], values: Sequence[float], parts: int) -> Points:
    """At most 4 points for each part of the axis, in their order: the first, the lowest, the highest, the last."""
    if len(steps) <= 4 * parts:
        return list(zip(steps, values, strict=True))
    first, width = steps[0], max(1e-9, (steps[-1] - steps[0]) / parts)
    kept, at = [], 0
    while at < len(steps):
        part = int((steps[at] - first) / width)
        end = at
        while end < len(steps) and int((steps[end] - first) / width) == part:
            end += 1
        inside = range(at, end)
        chosen = {at, end - 1, min(inside, key=values.__getitem__), max(inside, key=values.__getitem__)}
        kept += [(steps[index], values[index]) for index in sorted(chosen)]
        at = end
    return kept
