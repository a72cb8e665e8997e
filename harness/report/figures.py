"""The page's pictures: curves, time and memory, each a section of HTML."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from html import escape

from harness.report.lives import PARTS
from harness.report.memory import Memory
from harness.report.panels import Line, Panel, choose_panels, is_evaluation
from harness.report.plots import Drawn, Mark, axis_of, line_chart, range_bar, stack, time_line
from harness.report.story import Story
from harness.report.words import counted, duration, moment, number, percent

MOST_POINTS = 36_000
"""On the whole page, so that it stays below two megabytes."""
COLOURS = 8
MEANINGS = {
    "kept": "steps that were kept",
    "lost": "steps that were lost",
    "passed over": "steps passed over",
    "evaluation": "evaluation",
    "saving": "saving",
    "starting": "starting",
    "other": "exporting and leaving",
    "queue": "in the queue",
    "between": "between lives",
}


def colour_of(story: Story, stories: Sequence[Story]) -> int:
    return stories.index(story) % COLOURS + 1


def swatch(story: Story, stories: Sequence[Story]) -> str:
    return f'<i class="swatch c{colour_of(story, stories)}"></i>'


def groups_of(stories: Sequence[Story]) -> list[list[Story]]:
    """By task: losses of different tasks are different quantities."""
    groups: dict[str, list[Story]] = {}
    for story in stories:
        if len(story.columns):
            groups.setdefault(story.task, []).append(story)
    return list(groups.values())


# ---- curves


def curves_section(group: Sequence[Story], stories: Sequence[Story], number_of_group: int) -> str:
    panels = choose_panels({key for story in group for key in keys_of(story)})
    panels = panels if len(group) == 1 else [_one_line(panel, line) for panel in panels for line in panel.lines]
    curves_in_all = sum(len(panel.lines) for panel in panels) * max(1, len(stories))
    parts = max(12, min(300, MOST_POINTS // (4 * max(1, curves_in_all))))
    steps = _steps(group)
    figures, data = [], {}
    for at, panel in enumerate(panels):
        drawn = _drawn(panel, group, stories, parts, f"{number_of_group}-{at}")
        if not drawn:
            continue
        figures.append(_figure(panel, drawn, group, steps, at))
        data |= {one.id: _data(one, panel) for one in drawn}
    title = "Curves" if len(groups_of(stories)) == 1 else f"Curves: {group[0].task}"
    given = json.dumps({"steps": list(steps), "curves": data}, separators=(",", ":")).replace("<", "\\u003c")
    return (
        f'<h2>{escape(title)}</h2>{_legend(group, stories)}<div class="panels" data-group="{number_of_group}">{"".join(figures)}</div>'
        f'<script type="application/json" class="points" data-group="{number_of_group}">{given}</script>'
    )


def keys_of(story: Story) -> set[str]:
    return {*story.columns.values, *(key for _, key, _ in story.columns.not_finite)}


def _one_line(panel: Panel, line: Line) -> Panel:
    """Of several runs each metric has a picture of its own, with a line for each run."""
    told = line.label if line.label != "training" else ""
    title = panel.title if not told or told in panel.title else f"{panel.title}, {told}"
    return replace(panel, title=title, lines=(line,))


def _steps(group: Sequence[Story]) -> tuple[int, int]:
    """The common axis: to the last step, or as far as a run that is not over is to go."""
    ends = [max(story.columns.steps, default=0) for story in group]
    return 0, max([1, *ends])


def _drawn(panel: Panel, group: Sequence[Story], stories: Sequence[Story], parts: int, place: str) -> list[Drawn]:
    found = []
    for story in group:
        for at, line in enumerate(panel.lines):
            curve = story.curve(line.key, parts)
            if curve is None:
                continue
            one = len(group) == 1
            colour = at % COLOURS + 1 if one else colour_of(story, stories)
            label = line.label if one else story.name
            is_evaluated = is_evaluation(line.key)
            smooths = panel.smooths and not is_evaluated
            dashed = not one and stories.index(story) >= COLOURS
            found.append(Drawn(f"{place}-{len(found)}", label, curve, colour, dashed, is_evaluated, smooths))
    return found


def _figure(panel: Panel, drawn: Sequence[Drawn], group: Sequence[Story], steps: tuple[int, int], at: int) -> str:
    marks = []
    if len(group) == 1:
        for life in group[0].lives[1:]:
            if life.trains:
                before = group[0].lives[group[0].lives.index(life) - 1]
                told = f"life {life.number} goes on from step {life.resumed_from:,}; the one before was {before.ended}"
                marks.append(Mark(life.resumed_from, f"{life.number}" if panel.tall else "", told))
    scale = axis_of(drawn, may_be_log=panel.log, from_zero=panel.from_zero)
    said = f"{panel.title} over steps {steps[0]:,} to {steps[1]:,}"
    chart = line_chart(
        drawn,
        steps,
        236 if panel.tall else 132,
        said=said,
        scale=scale,
        write=lambda value: tick_text(value, panel.form),
        marks=marks if len(marks) <= 40 else (),
        names=len(drawn) > 1 and len(drawn) <= COLOURS,
    )
    shown = drawn if len(drawn) <= COLOURS else []
    readings = "".join(
        f'<span class="key c{one.colour}">{escape(one.label)} <b data-curve="{one.id}">{_last(one, panel)}</b></span>' for one in shown
    )
    unit = f' <span class="unit">{escape(panel.unit)}</span>' if panel.unit else ""
    log = ' <span class="unit">log</span>' if scale.is_log else ""
    kind = "panel tall" if panel.tall else "panel"
    return (
        f'<figure class="{kind}"><figcaption><span class="title">{escape(panel.title)}{unit}{log}</span>{readings}</figcaption>'
        f'<div class="frame{" named" if 1 < len(drawn) <= COLOURS else ""}">{chart}</div></figure>'
    )


def _last(one: Drawn, panel: Panel) -> str:
    return _written(one.curve.last, panel.form) if one.curve.points else "not a number"


def _written(value: float, form: str, digits: int = 4) -> str:
    if form == "percent":
        return f"{value * 100:.3g} %"
    return number(value, digits)


def tick_text(value: float, form: str) -> str:
    return f"{value * 100:g} %" if form == "percent" else number(value, 3) if abs(value) >= 1e4 else f"{value:g}".replace("e-0", "e-")


def _data(one: Drawn, panel: Panel) -> dict:
    """For the read-out: what is drawn, with as many digits as it shows."""
    points = one.curve.points
    return {"f": panel.form, "s": [step for step, _ in points], "v": [float(f"{value:.5g}") for _, value in points]}


def _legend(group: Sequence[Story], stories: Sequence[Story]) -> str:
    marks = []
    losing = [story for story in group if any(life.lost_steps for life in story.lives)]
    if len(group) > 1:
        marks += [f"<span>{swatch(story, stories)}{escape(story.name)}</span>" for story in group[:40]]
    if any(len(story.columns.values.get("train/loss", ((), ()))[0]) > 60 for story in group):
        marks.append('<span><i class="line"></i>mean over a twentieth of the run</span>')
        marks.append('<span><i class="line pale"></i>as logged</span>')
    if losing:
        marks.append('<span><i class="line halo"></i>lost, and made again</span>')
    if len(group) == 1 and sum(life.trains for life in group[0].lives) > 1:
        marks.append('<span><i class="line upright"></i>a life goes on from here</span>')
    return f'<p class="legend">{"".join(marks)}</p>' if marks else ""


# ---- time


def time_section(stories: Sequence[Story]) -> str:
    told = [story for story in stories if story.account]
    if not told:
        return ""
    longest = max(story.account.wall_s for story in told)
    rows = []
    for story in told:
        spent = story.account
        evaluations = [story.columns.times[row] for row in story.columns.values.get("eval/runtime_s", ((), ()))[0]]
        drawn = time_line(story.lives, spent, story.events, evaluations, longest if len(told) > 1 else None)
        name = f"<h3>{swatch(story, stories)}{escape(story.name)}</h3>" if len(stories) > 1 else ""
        wall = spent.wall_s or 1.0
        shares = [
            (_class_of(part), spent.parts[part] / wall, f"{MEANINGS[part]}: {duration(spent.parts[part])}")
            for part in PARTS
            if spent.parts[part] > 0
        ]
        listed = "".join(
            f'<span class="{_class_of(part)}"><i></i>{MEANINGS[part]} <b>{percent(spent.parts[part] / wall)}</b> '
            f"{duration(spent.parts[part])}</span>"
            for part in PARTS
            if spent.parts[part] > 0.0005 * wall
        )
        said = "where the time went: " + ", ".join(what for _, _, what in shares)
        rows.append(
            f'<div class="of-time">{name}<div class="timeline">{drawn}</div>'
            f'<div class="stack">{stack(shares, said)}</div><p class="legend">{listed}</p></div>'
        )
    estimated = sum(story.account.estimated_steps for story in told)
    pace = f" {counted(estimated, 'step')}, of which no line tells, counted at the pace of the line before." if estimated else ""
    key = (
        '<p class="note">Above: when. ✓ finished, ■ stopped, preempted or out of time, ✕ died; ticks above are evaluations, below '
        f"checkpoints. Below: where {'it' if len(told) == 1 else 'the time of each'} went.{pace}</p>"
    )
    tables = "".join(_lives(story, stories) for story in told)
    return f'<h2>Time</h2>{key}<div class="sheet times">{"".join(rows)}</div>{tables}'


def _class_of(part: str) -> str:
    return f"part-{part.replace(' ', '-')}"


def _lives(story: Story, stories: Sequence[Story]) -> str:
    if len(story.lives) < 2 and not (story.lives and story.lives[0].why):
        return ""
    rows = []
    for life in story.lives:
        lost = f"{life.lost_steps:,}" if life.lost_steps else "–"
        steps = f"{life.resumed_from:,} → {life.last_step:,}" if life.trains else "–"
        on = f"{counted(life.world_size, 'rank')}" if life.world_size else ""
        ended = f"is-{escape(life.ended.replace(' ', '-'))}"
        why = f' <span class="soft">{escape(life.why[:600])}</span>' if life.why else ""
        rows.append(
            f'<tr><td class="number">{life.number}</td><td class="when">{moment(life.start)}</td>'
            f'<td class="number">{duration(life.end - life.start)}</td>'
            f'<td class="number steps">{steps}</td><td class="number lost">{lost}</td>'
            f'<td class="on">{escape(on)}</td><td class="how"><b class="{ended}">{escape(life.ended)}</b>{why}</td></tr>'
        )
    title = f"<h3>The lives of {escape(story.name)}</h3>" if len(stories) > 1 else ""
    return (
        f'{title}<div class="sheet scroll"><table class="lives"><tr><th class="number">life</th><th>began</th>'
        f'<th class="number">lasted</th><th class="number">steps</th><th class="number">lost</th><th>on</th>'
        f"<th>end</th></tr>{''.join(rows)}</table></div>"
    )


# ---- memory


def memory_section(stories: Sequence[Story]) -> str:
    rows = [_memory_of(story, stories) for story in stories if story.memory.measured is not None or story.memory.tensors]
    if not rows:
        return ""
    return f'<h2>Memory against the plan</h2><div class="sheet memory">{"".join(rows)}</div>'


def _memory_of(story: Story, stories: Sequence[Story]) -> str:
    memory = story.memory
    name = f"<h3>{swatch(story, stories)}{escape(story.name)}</h3>" if len(stories) > 1 else ""
    lines = []
    if memory.is_compared:
        top = 1.08 * max(memory.whole[2], memory.reserved, memory.card or 0.0)
        of_tensors = "tensors", memory.measured, memory.tensors
        of_allocator = "held by the allocator", memory.reserved, memory.with_slack
        for label, measured, plan in (of_tensors, of_allocator):
            low, expected, high = plan
            told = f"{number(measured, 3)} GiB, {_against(measured, plan)}; forecast {_range(plan)}"
            lines.append(
                f'<span>{label}</span>{range_bar(low, expected, high, measured, top, holds=memory.card)}<span class="told">{told}</span>'
            )
        note = "Of the fullest rank. Grey is the forecast's range, the tick what it expects, the point what was measured"
        note += f"; the last line is what {escape(memory.card_name)} holds ({number(memory.card, 3)} GiB)" if memory.card else ""
        note += f". With a CUDA context (assumed) the forecast of the whole card is {number(memory.whole[1], 3)} GiB"
        note += f". Most of it: {memory.most_of_it}."
        return f'{name}<div class="rows">{"".join(lines)}</div><p class="note">{note}</p>'
    return f'{name}<p class="told">{escape(_said_of_memory(memory))}</p>'


def _against(measured: float, plan: tuple[float, float, float]) -> str:
    low, expected, high = plan
    where = "below" if measured < low else "above" if measured > high else "within"
    said = f"{where} the forecast's range"
    return f"{percent(measured / expected)} of what was expected, {said}" if expected else said


def _range(plan: tuple[float, float, float]) -> str:
    low, expected, high = plan
    return f"{number(expected, 3)} ({number(low, 3)} to {number(high, 3)})"


def _said_of_memory(memory: Memory) -> str:
    plan = ""
    if memory.whole:
        plan = f"The forecast for a GPU, in GiB, is {_range(memory.whole)}, most of it {memory.most_of_it}"
    if memory.measured is None:
        return f"{plan}; nothing was measured yet."
    if memory.reserved is None:
        said = f"The fullest process had {number(memory.measured, 3)} GiB resident at its peak, on a CPU."
        apart = "and is not compared with that: a process also holds Python and its libraries"
        return f"{said} {plan}, {apart}." if plan else f"{said} No forecast: {memory.missing}."
    return f"The fullest rank had {number(memory.measured, 3)} GiB in tensors at its peak. No forecast: {memory.missing}."
