"""Curves, the time line and bars as inline SVG: places across are shares of the width, heights are pixels, so that text keeps its size on a
phone and on paper. Colours are the style sheet's."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from harness.page import svg
from harness.report.curves import Curve, Points
from harness.report.lives import Account, Life
from harness.report.words import counted, duration, moment, number

WIDE = 1000
"""Units across the inner picture of paths, which is stretched to the width."""
LABEL_PX = 13
MOST_RAW = 4
"""With more curves in a picture only the means are drawn of those that have one."""
SPANS = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 21600, 43200, 86400, 172800, 604800)


# ---- axes


@dataclass(frozen=True)
class Scale:
    low: float
    high: float
    is_log: bool = False

    def share(self, value: float) -> float:
        """0 at the low end, 1 at the high one, and no further out than a little."""
        low, high, value = (self._place(one) for one in (self.low, self.high, value))
        return min(1.02, max(-0.02, (value - low) / (high - low))) if high > low else 0.5

    def _place(self, value: float) -> float:
        return math.log10(max(value, self.low * 1e-3, 1e-300)) if self.is_log else value

    def ticks(self, most: int = 5) -> list[float]:
        if self.is_log:
            return _log_ticks(self.low, self.high, most)
        return _ticks(self.low, self.high, most)


def _ticks(low: float, high: float, most: int) -> list[float]:
    span = high - low
    if not span > 0 or not math.isfinite(span):
        return [low]
    size = 10 ** math.floor(math.log10(span / most))
    step = next(size * factor for factor in (1, 2, 5, 10, 20) if span / (size * factor) <= most)
    first = math.ceil(low / step - 1e-9)
    return [round(index * step, 12 - math.floor(math.log10(step))) for index in range(first, math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float, most: int) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors, stride in (((1, 2, 5), 1), ((1, 3), 1), *(((1,), stride) for stride in range(1, 400))):
        ticks = [factor * 10.0**power for power in decades if power % stride == 0 for factor in factors]
        ticks = [tick for tick in ticks if low <= tick * 1.0001 and tick * 0.9999 <= high]
        if len(ticks) <= most + 2:
            return ticks
    return []


def scale_of(values: Sequence[float], *, may_be_log: bool, from_zero: bool) -> Scale:
    low, high = min(values), max(values)
    if may_be_log and low > 0 and high > 100 * low:
        return Scale(low / 1.15, high * 1.15, True)
    if from_zero and low >= 0:
        return Scale(0.0, high * 1.06 if high > 0 else 1.0)
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 0.5
    return Scale(low - margin, high + margin)


# ---- curves


@dataclass(frozen=True)
class Drawn:
    """A curve in a picture: `colour` 1 to 8 of the style sheet."""

    id: str
    label: str
    curve: Curve
    colour: int
    is_dashed: bool = False
    is_dotted: bool = False
    """Few and exact points, each of which is shown: an evaluation."""
    smooths: bool = False


@dataclass(frozen=True)
class Mark:
    """A step at which a life began again."""

    step: int
    label: str
    said: str


def axis_of(drawn: Sequence[Drawn], *, may_be_log: bool, from_zero: bool) -> Scale:
    return scale_of([value for one in drawn for value in _extent(one)] or [0.0, 1.0], may_be_log=may_be_log, from_zero=from_zero)


def line_chart(
    drawn: Sequence[Drawn],
    steps: tuple[int, int],
    height: int,
    *,
    said: str,
    scale: Scale,
    write: Callable[[float], str],
    marks: Sequence[Mark] = (),
    names: bool = True,
) -> str:
    """names: at the right end of each curve stands its label."""
    across = Scale(steps[0], max(steps[1], steps[0] + 1))
    bottom = height - 18

    def down(value: float) -> float:
        return round(6 + (bottom - 6) * (1 - scale.share(value)), 1)

    parts = []
    for tick in scale.ticks(max(3, bottom // 42)):
        parts.append(f'<line class="grid" x1="0%" x2="100%" y1="{down(tick)}" y2="{down(tick)}"/>')
        parts.append(f'<text class="tick y" x="0" dx="-7" y="{down(tick) + 4}">{escape(write(tick))}</text>')
    parts.append(f'<line class="axis" x1="0%" x2="100%" y1="{bottom}" y2="{bottom}"/>')
    parts += _step_ticks(across, bottom)
    parts += [_mark(mark, across, bottom) for mark in marks]
    paths, dots = [], []
    for one in drawn:
        for lost in one.curve.lost:
            paths.append(f'<path class="lost c{one.colour}" d="{_path(lost, across, down)}"/>')
        dashed = "curve dashed" if one.is_dashed else "curve"
        if one.curve.smoothed and one.smooths:
            if len(drawn) <= MOST_RAW:
                paths.append(f'<path class="raw c{one.colour}" d="{_path(one.curve.points, across, down)}"/>')
            paths.append(f'<path class="{dashed} c{one.colour}" d="{_path(one.curve.smoothed, across, down)}"/>')
        else:
            style = f"{dashed} thin" if one.is_dotted else dashed
            paths.append(f'<path class="{style} c{one.colour}" d="{_path(one.curve.points, across, down)}"/>')
        if one.is_dotted and len(one.curve.points) <= 60 or len(one.curve.points) == 1:
            dots += [
                f'<circle class="dot c{one.colour}" cx="{across.share(step):.2%}" cy="{down(value)}" r="2.8"/>'
                for step, value in one.curve.points
            ]
        for step, value in one.curve.not_finite[:60]:
            place = f'x="{across.share(step):.2%}" y="{down(value) if math.isfinite(value) else 12}"'
            dots.append(f'<text class="nan" {place} dy="-3">×<title>not a number at step {step:,}</title></text>')
    inner = (
        f'<svg x="0" y="0" width="100%" height="{height}" viewBox="0 0 {WIDE} {height}" preserveAspectRatio="none" class="paths">'
        f"{''.join(paths)}</svg>"
    )
    labels = _end_labels(drawn, down, bottom) if names else []
    rule = f'<line class="rule" x1="0" x2="0" y1="2" y2="{bottom}"/><text class="at" x="0" y="{bottom + 14}"></text>'
    return svg(height, said, [*parts, inner, *dots, *labels, rule])


def _extent(one: Drawn) -> list[float]:
    """What the axis has to hold. What was lost does not stretch it beyond three times, so that a spike that was left behind does not."""
    kept = [value for _, value in one.curve.points]
    if not kept:
        return []
    low, high = min(kept), max(kept)
    room = 2 * (high - low)
    lost = [value for points in one.curve.lost for _, value in points if low - room <= value <= high + room]
    return [low, high, *([min(lost), max(lost)] if lost else [])]


def _step_ticks(across: Scale, bottom: int) -> list[str]:
    ticks = [tick for tick in across.ticks(6) if tick == int(tick)]
    return [f'<text class="tick x" x="{across.share(tick):.2%}" y="{bottom + 14}">{tick:,.0f}</text>' for tick in ticks]


def _mark(mark: Mark, across: Scale, bottom: int) -> str:
    place = f"{across.share(mark.step):.2%}"
    label = f'<text class="life" x="{place}" dx="3" y="11">{escape(mark.label)}</text>' if mark.label else ""
    return f'<g><line class="mark" x1="{place}" x2="{place}" y1="2" y2="{bottom}"/>{label}<title>{escape(mark.said)}</title></g>'


def _path(points: Points, across: Scale, down: Callable[[float], float]) -> str:
    written = [f"{across.share(step) * WIDE:.1f} {down(value):g}" for step, value in points]
    return f"M{written[0]}L{' '.join(written[1:])}" if len(written) > 1 else f"M{written[0]}h.1" if written else ""


def _end_labels(drawn: Sequence[Drawn], down: Callable[[float], float], bottom: int) -> list[str]:
    """One under the other where curves end close by."""
    named = [one for one in drawn if one.label and one.curve.points]
    ends = sorted(((down((one.curve.smoothed or one.curve.points)[-1][1]), one) for one in named), key=lambda end: end[0])
    places: list[float] = []
    for place, _ in ends:
        places.append(max(place, places[-1] + LABEL_PX) if places else place)
    limit = float(bottom)
    for at in reversed(range(len(places))):
        places[at] = min(places[at], limit)
        limit = places[at] - LABEL_PX
    return [
        f'<text class="end c{one.colour}" x="100%" dx="8" y="{place + 4:.1f}">{escape(one.label)}</text>'
        for place, (_, one) in zip(places, ends, strict=True)
    ]


# ---- the time line


def time_line(
    lives: Sequence[Life], spent: Account, events: Sequence[dict], evaluations: Sequence[float], until: float | None = None
) -> str:
    """What the run did when. until: the end of the axis in seconds from its begin, where several runs share one."""
    across = Scale(0.0, max(until or 0.0, spent.wall_s, 1e-3))
    top, bottom = 16, 34

    def place(unix_s: float) -> str:
        return f"{across.share(unix_s - spent.begin):.3%}"

    def bar(name: str, since: float, to: float, what: str) -> str:
        if to <= since:
            return ""
        width = across.share(to - spent.begin) - across.share(since - spent.begin)
        told = f"{what}: {duration(to - since)}, from {moment(since)}"
        return (
            f'<rect class="{name}" x="{place(since)}" width="{max(width, 0.0008):.3%}" y="{top}" height="{bottom - top}">'
            f"<title>{escape(told)}</title></rect>"
        )

    parts = [bar("queue", since, to, "in the queue") for since, to in spent.waits]
    for life in lives:
        trains = life.first_step_at if life.first_step_at is not None else life.end
        lost = min(life.end, life.lost_at) if life.lost_at is not None else life.end
        if life.lost_steps and life.lost_at is None:
            lost = trains
        parts.append(bar("start", life.start, trains, f"life {life.number} starts"))
        parts.append(bar("train", trains, lost, f"life {life.number} trains"))
        parts.append(bar("gone", max(lost, trains), life.end, f"life {life.number}, {counted(life.lost_steps, 'step')} lost"))
    commits = [event for event in events if event["event"] == "committed"]
    for event in commits[:: max(1, len(commits) // 150)]:
        told = f"checkpoint-{event.get('step')} ({event.get('reason', '')}), {moment(event['time'])}"
        x = place(event["time"])
        parts.append(f'<g><line class="commit" x1="{x}" x2="{x}" y1="{bottom + 1}" y2="{bottom + 7}"/><title>{escape(told)}</title></g>')
    for at in evaluations[:: max(1, len(evaluations) // 150)]:
        parts.append(f'<line class="evaluated" x1="{place(at)}" x2="{place(at)}" y1="{top - 7}" y2="{top - 1}"/>')
    for life in lives:
        told = f"life {life.number} {life.ended}" + (f": {life.why}" if life.why else "")
        sign = {"finished": "✓", "running": "…", "killed": "✕", "failed": "✕", "hung": "✕"}.get(life.ended, "■")
        parts.append(
            f'<text class="ended {escape(life.ended.replace(" ", "-"))}" x="{place(life.end)}" y="{bottom - 5}" dx="9">{sign}'
            f"<title>{escape(told)}</title></text>"
        )
    axis = bottom + 10
    parts.append(f'<line class="axis" x1="0%" x2="100%" y1="{axis}" y2="{axis}"/>')
    parts += _time_ticks(across, axis)
    return svg(axis + 20, f"{counted(len(lives), 'life', 'lives')} in {duration(spent.wall_s)}", parts)


def _time_ticks(across: Scale, bottom: int) -> list[str]:
    step = next((span for span in SPANS if across.high / span <= 7), 604800 * math.ceil(across.high / 604800 / 7))
    ticks = [step * index for index in range(int(across.high / step) + 1)]
    return [f'<text class="tick x" x="{across.share(tick):.2%}" y="{bottom + 14}">{duration(tick)}</text>' for tick in ticks]


# ---- bars


def stack(parts: Sequence[tuple[str, float, str]], said: str) -> str:
    """(class, share, what) beside each other."""
    drawn, at = [], 0.0
    for name, share, what in parts:
        if share > 0:
            drawn.append(f'<rect class="{name}" x="{at:.3%}" width="{share:.3%}" y="0" height="22"><title>{escape(what)}</title></rect>')
            at += share
    return svg(22, said, drawn)


def range_bar(low: float, expected: float, high: float, measured: float, top: float, *, holds: float | None = None) -> str:
    """A forecast's range, what it expects, and what was measured; `top` is the end of the axis, `holds` what there is room for."""
    middle, width = 11, top or 1.0

    def place(value: float) -> str:
        return f"{min(1.0, value / width):.2%}"

    parts = [
        f'<line class="axis" x1="0%" x2="100%" y1="{middle}" y2="{middle}"/>',
        f'<rect class="range" x="{place(low)}" width="{max(0.002, (high - low) / width):.2%}" y="{middle - 5}" height="10" rx="2"/>',
        f'<line class="expected" x1="{place(expected)}" x2="{place(expected)}" y1="{middle - 8}" y2="{middle + 8}"/>',
    ]
    if holds is not None:
        parts.append(f'<line class="holds" x1="{place(holds)}" x2="{place(holds)}" y1="1" y2="21"/>')
    parts.append(f'<circle class="measured" cx="{place(measured)}" cy="{middle}" r="5"/>')
    return svg(22, f"measured {number(measured, 3)} GiB, forecast {number(expected, 3)} ({number(low, 3)} to {number(high, 3)})", parts)
