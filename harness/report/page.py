"""The page of one run, or of several beside each other. Read from the top: how it went, in a sentence; the curves; where the time went; memory
against the plan; the recipe and where the model comes from; and last what exactly is counted."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from html import escape
from pathlib import Path

from harness import __version__
from harness.page import render_document
from harness.recipe.load import render_value, render_yaml
from harness.report.headline import headline
from harness.report.lives import PARTS
from harness.report.memory import Memory
from harness.report.panels import Panel, choose_panels, is_evaluation
from harness.report.plots import Drawn, Mark, line_chart, range_bar, stack, time_line
from harness.report.story import Story, differing_settings, title_of
from harness.report.words import counted, duration, moment, number, percent

HERE = Path(__file__).parent
MOST_POINTS = 36_000
"""On the whole page, so that it stays below two megabytes."""
MOST_COLUMNS = 8
"""Of a table with a column for each run; beyond them runs are rows."""
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


def render_page(stories: Sequence[Story], *, live: str = "") -> str:
    """live: how a page that is served says so, empty for one that is a file."""
    script = (HERE / "page.js").read_text(encoding="utf-8")
    style = (HERE / "page.css").read_text(encoding="utf-8")
    body = render_body(stories, live=live)
    return render_document(f"{title_of(stories)}: report", body, style=style, script=script, connects=bool(live))


def render_body(stories: Sequence[Story], *, live: str = "") -> str:
    """What stands in <main>; a live page puts it in the place of the one before."""
    sections = [_head(stories, live), _notes(stories)]
    if len(stories) > 1:
        sections += [_runs(stories), _settings(stories)]
    for number_of_group, group in enumerate(_groups(stories)):
        sections.append(_curves(group, stories, number_of_group))
    sections += [_time(stories), _memory(stories), *(_recipe(story, stories) for story in stories), _rest(stories), _method(stories)]
    return "\n".join(filter(None, sections))


def _groups(stories: Sequence[Story]) -> list[list[Story]]:
    """By task: losses of different tasks are different quantities."""
    groups: dict[str, list[Story]] = {}
    for story in stories:
        if len(story.columns):
            groups.setdefault(story.task, []).append(story)
    return list(groups.values())


def _colour(story: Story, stories: Sequence[Story]) -> int:
    return stories.index(story) % COLOURS + 1


# ---- how it went


def _head(stories: Sequence[Story], live: str) -> str:
    said = f'<p class="live"><i></i>{escape(live)}</p>' if live else ""
    if len(stories) == 1:
        story = stories[0]
        title, lead = f"<h1>{escape(story.name)}</h1>", f'<p class="lead">{escape(headline(story))}</p>'
        facts = [story.task, _base(story), _ranks(story), str(story.run.path)]
        reason = f'<p class="reason">{escape(story.status.reason)}</p>' if story.status.reason and story.status.state != "done" else ""
    else:
        title, lead = f"<h1>{escape(title_of(stories))}</h1>", f'<p class="lead">{escape(_lead_of_several(stories))}</p>'
        facts, reason = [], ""
    facts += [f"harness {__version__}", f"read {moment(max(story.read_at for story in stories))} {time.strftime('%Z')}"]
    return f'<header>{said}{title}{lead}{reason}<p class="soft facts">{" · ".join(map(escape, filter(None, facts)))}</p></header>'


def _lead_of_several(stories: Sequence[Story]) -> str:
    counts: dict[str, int] = {}
    for story in stories:
        counts[story.status.state] = counts.get(story.status.state, 0) + 1
    states = ", ".join(f"{count} {state}" for state, count in counts.items())
    wall = sum(story.account.wall_s for story in stories if story.account)
    kept = sum(story.account.parts["kept"] for story in stories if story.account)
    return f"{len(stories)} runs: {states}; goodput {percent(kept / wall)} of {duration(wall)} together." if wall else f"{states}."


def _base(story: Story) -> str:
    base = story.setting("model.name_or_path") or story.setting("model.init") or ""
    return f"from {base}" if base else ""


def _ranks(story: Story) -> str:
    world, backend = story.manifest.get("world_size"), story.manifest.get("backend")
    return f"{backend} on {counted(world, 'rank')}" if isinstance(world, int) and backend else ""


def _notes(stories: Sequence[Story]) -> str:
    named = len(stories) > 1
    notes = [(story.name, note) for story in stories for note in story.notes]
    return "".join(f'<p class="warning">{f"<b>{escape(name)}</b>: " if named else ""}{escape(note)}.</p>' for name, note in notes)


def _runs(stories: Sequence[Story]) -> str:
    rows = []
    for story in stories:
        spent, curve, memory = story.account, story.measure, story.memory
        measured = f"{number(curve.first)} → {number(curve.last)}" if curve else "–"
        speed = story.curve("speed/tokens_per_s", 1)
        cells = (
            (story.task, ""),
            (story.status.state, ""),
            (f"{story.last_step:,}" if story.last_step else "–", "number"),
            (str(len(story.lives)), "number"),
            (f"{measured}", "number"),
            (curve.key if curve else "", "soft"),
            (percent(spent.goodput) if spent and spent.goodput is not None else "–", "number"),
            (duration(spent.wall_s) if spent else "–", "number"),
            (number(speed.median, 3) if speed and speed.points else "–", "number"),
            (f"{number(memory.measured, 3)}" if memory.measured is not None else "–", "number"),
        )
        swatch = f'<i class="swatch c{_colour(story, stories)}"></i>'
        written = "".join(f'<td class="{kind}">{escape(text)}</td>' if kind else f"<td>{escape(text)}</td>" for text, kind in cells)
        rows.append(f'<tr><td class="run">{swatch}{escape(story.name)}</td>{written}</tr>')
    heads = ("run", "task", "state", "step", "lives", "first → last", "of", "goodput", "time", "tokens/s", "peak GiB")
    numbers = {"step", "lives", "first → last", "goodput", "time", "tokens/s", "peak GiB"}
    head = "".join(f'<th{" class=number" if name in numbers else ""}>{name}</th>' for name in heads)
    return f'<div class="sheet scroll"><table><tr>{head}</tr>{"".join(rows)}</table></div>'


def _settings(stories: Sequence[Story]) -> str:
    differing = differing_settings(stories)
    if not differing:
        return "<h2>Settings</h2><p>The same in all of them.</p>"
    values = {key: [_value(value) for value in row] for key, row in differing.items()}
    if len(stories) <= MOST_COLUMNS:
        head = "".join(f"<th>{escape(story.name)}</th>" for story in stories)
        rows = [f"<tr><td><code>{escape(key)}</code></td>{_cells(row)}</tr>" for key, row in values.items()]
        table = f"<tr><th>setting</th>{head}</tr>{''.join(rows)}"
    else:
        head = "".join(f"<th><code>{escape(key)}</code></th>" for key in values)
        rows = [
            f"<tr><td>{escape(story.name)}</td>{_cells([row[at] for row in values.values()])}</tr>" for at, story in enumerate(stories)
        ]
        table = f"<tr><th>run</th>{head}</tr>{''.join(rows)}"
    return f'<h2>What differs in their recipes</h2><div class="sheet scroll"><table class="settings">{table}</table></div>'


def _cells(values: Sequence[str]) -> str:
    return "".join(f"<td><code>{escape(value)}</code></td>" for value in values)


def _value(value: object) -> str:
    text = "–" if value is None else render_value(value)
    return text if len(text) <= 300 else f"{text[:299]}…"


# ---- curves


def _curves(group: Sequence[Story], stories: Sequence[Story], number_of_group: int) -> str:
    panels = choose_panels({key for story in group for key in _keys(story)})
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
    title = "Curves" if len(_groups(stories)) == 1 else f"Curves: {group[0].task}"
    given = json.dumps({"steps": list(steps), "curves": data}, separators=(",", ":")).replace("<", "\\u003c")
    return (
        f'<h2>{escape(title)}</h2>{_legend(group, stories)}<div class="panels" data-group="{number_of_group}">{"".join(figures)}</div>'
        f'<script type="application/json" class="points" data-group="{number_of_group}">{given}</script>'
    )


def _keys(story: Story) -> set[str]:
    return {*story.columns.values, *(key for _, key, _ in story.columns.not_finite)}


def _one_line(panel: Panel, line) -> Panel:
    """Of several runs each metric has a picture of its own, with a line for each run."""
    told = line.label if line.label != "training" else ""
    title = panel.title if not told or told in panel.title else f"{panel.title}: {told}"
    return Panel(title, (line,), panel.unit, panel.form, panel.smooths, panel.log, panel.from_zero, panel.tall)


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
            colour = at % COLOURS + 1 if one else _colour(story, stories)
            label = line.label if one else story.name
            is_evaluated = is_evaluation(line.key)
            smooths = panel.smooths and not is_evaluated
            found.append(Drawn(f"{place}-{len(found)}", label, curve, colour, is_evaluated, smooths))
    return found


def _figure(panel: Panel, drawn: Sequence[Drawn], group: Sequence[Story], steps: tuple[int, int], at: int) -> str:
    marks = []
    if len(group) == 1:
        for life in group[0].lives[1:]:
            if life.trains:
                before = group[0].lives[group[0].lives.index(life) - 1]
                told = f"life {life.number} goes on from step {life.resumed_from:,}; the one before was {before.ended}"
                marks.append(Mark(life.resumed_from, f"{life.number}" if panel.tall else "", told))
    said = f"{panel.title} over steps {steps[0]:,} to {steps[1]:,}"
    chart = line_chart(
        drawn,
        steps,
        236 if panel.tall else 132,
        said=said,
        write=lambda value: tick_text(value, panel.form),
        may_be_log=panel.log,
        from_zero=panel.from_zero,
        marks=marks if len(marks) <= 40 else (),
        names=len(drawn) > 1 and len(drawn) <= COLOURS,
    )
    shown = drawn if len(drawn) <= COLOURS else []
    readings = "".join(
        f'<span class="key c{one.colour}">{escape(one.label)} <b data-curve="{one.id}">{_last(one, panel)}</b></span>' for one in shown
    )
    unit = f' <span class="unit">{escape(panel.unit)}</span>' if panel.unit else ""
    log = ' <span class="unit">log</span>' if "data-log" in chart else ""
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
    curves = [story for story in group if any(life.lost_steps for life in story.lives)]
    if len(group) > 1:
        marks += [f'<span><i class="swatch c{_colour(story, stories)}"></i>{escape(story.name)}</span>' for story in group[:40]]
    if any(len(story.columns.values.get("train/loss", ((), ()))[0]) > 60 for story in group):
        marks.append('<span><i class="line strong"></i>mean over a twentieth of the run</span><span><i class="line pale"></i>as logged</span>')
    if curves:
        marks.append('<span><i class="line halo"></i>lost, and made again</span>')
    if len(group) == 1 and sum(life.trains for life in group[0].lives) > 1:
        marks.append('<span><i class="line upright"></i>a life goes on from here</span>')
    return f'<p class="legend">{"".join(marks)}</p>' if marks else ""


# ---- time


def _time(stories: Sequence[Story]) -> str:
    told = [story for story in stories if story.account]
    if not told:
        return ""
    longest = max(story.account.wall_s for story in told)
    rows = []
    for story in told:
        spent = story.account
        evaluations = [story.columns.times[row] for row in story.columns.values.get("eval/runtime_s", ((), ()))[0]]
        drawn = time_line(story.lives, spent, story.events, evaluations, longest if len(told) > 1 else None)
        name = f'<h3><i class="swatch c{_colour(story, stories)}"></i>{escape(story.name)}</h3>' if len(stories) > 1 else ""
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
        why = f' <span class="soft">{escape(life.why[:600])}</span>' if life.why else ""
        rows.append(
            f'<tr><td class="number">{life.number}</td><td class="when">{moment(life.start)}</td>'
            f'<td class="number">{duration(life.end - life.start)}</td><td class="number">{steps}</td><td class="number">{lost}</td>'
            f'<td class="on">{escape(on)}</td><td class="how"><b class="is-{life.ended.replace(" ", "-")}">{escape(life.ended)}</b>{why}</td></tr>'
        )
    title = f"<h3>The lives of {escape(story.name)}</h3>" if len(stories) > 1 else ""
    return (
        f'{title}<div class="sheet scroll"><table class="lives"><tr><th class="number">life</th><th>began</th><th class="number">lasted</th>'
        f'<th class="number">steps</th><th class="number">lost</th><th>on</th><th>end</th></tr>{"".join(rows)}</table></div>'
    )


# ---- memory


def _memory(stories: Sequence[Story]) -> str:
    rows = [_memory_of(story, stories) for story in stories if story.memory.measured is not None or story.memory.tensors]
    if not rows:
        return ""
    return f'<h2>Memory against the plan</h2><div class="sheet memory">{"".join(rows)}</div>'


def _memory_of(story: Story, stories: Sequence[Story]) -> str:
    memory = story.memory
    name = f'<h3><i class="swatch c{_colour(story, stories)}"></i>{escape(story.name)}</h3>' if len(stories) > 1 else ""
    lines = []
    if memory.is_compared:
        top = 1.08 * max(memory.whole[2], memory.reserved, memory.card or 0.0)
        for label, measured, plan in (("tensors", memory.measured, memory.tensors), ("held by the allocator", memory.reserved, memory.with_slack)):
            low, expected, high = plan
            told = f"{number(measured, 3)} GiB, {_against(measured, plan)}; forecast {number(expected, 3)} ({number(low, 3)} to {number(high, 3)})"
            lines.append(
                f'<span>{label}</span>{range_bar(low, expected, high, measured, top, holds=memory.card)}<span class="told">{told}</span>'
            )
        note = "Of the fullest rank. Grey is the forecast's range, the tick what it expects, the point what was measured"
        note += f"; the last line is what {escape(memory.card_name)} holds ({number(memory.card, 3)} GiB)" if memory.card else ""
        note += f". With a CUDA context (assumed) the forecast of the whole card is {number(memory.whole[1], 3)} GiB. Most of it: {memory.most_of_it}."
        return f'{name}<div class="rows">{"".join(lines)}</div><p class="note">{note}</p>'
    return f'{name}<p class="told">{escape(_said_of_memory(memory))}</p>'


def _against(measured: float, plan: tuple[float, float, float]) -> str:
    low, expected, high = plan
    where = "within the forecast's range" if low <= measured <= high else "below the forecast's range" if measured < low else "above the forecast's range"
    return f"{percent(measured / expected)} of what was expected, {where}" if expected else where


def _said_of_memory(memory: Memory) -> str:
    plan = ""
    if memory.whole:
        low, expected, high = memory.whole
        plan = f"The forecast for a GPU is {number(expected, 3)} GiB ({number(low, 3)} to {number(high, 3)}), most of it {memory.most_of_it}"
    if memory.measured is None:
        return f"{plan}; nothing was measured yet."
    if memory.reserved is None:
        said = f"The fullest process had {number(memory.measured, 3)} GiB resident at its peak, on a CPU."
        return f"{said} {plan}, and is not compared with that: a process also holds Python and its libraries." if plan else f"{said} No forecast: {memory.missing}."
    return f"The fullest rank had {number(memory.measured, 3)} GiB in tensors at its peak. No forecast: {memory.missing}."


# ---- recipe


def _recipe(story: Story, stories: Sequence[Story]) -> str:
    one = len(stories) == 1
    settings = {key: value for key, value in story.differences.items() if key not in ("output_dir",)}
    rows = "".join(f"<tr><td><code>{escape(key)}</code></td><td><code>{escape(_value(value))}</code></td></tr>" for key, value in settings.items())
    whole = render_yaml(story.settings) if story.settings else ""
    what = "What is not a default" if story.recipe else "As it stands in the file"
    versions = story.manifest.get("versions")
    facts = [f"{name} {version}" for name, version in versions.items()] if isinstance(versions, dict) else []
    facts += [f"{name} {story.manifest[key]}" for key, name in (("python", "Python"), ("git_commit", "commit")) if story.manifest.get(key)]
    body = (
        f'<div class="sheet scroll"><table class="settings"><tr><th>{what}</th><th></th></tr>{rows}</table></div>'
        f"{_lineage(story)}"
        + (f'<p class="note">{escape(", ".join(facts))}</p>' if facts else "")
        + (f"<details id='recipe-{escape(story.name)}'><summary>the whole recipe</summary><pre>{escape(whole)}</pre></details>" if whole else "")
    )
    if one:
        return f"<h2>Recipe and lineage</h2>{body}"
    return f"<details class='of-run' id='of-{escape(story.name)}'><summary>recipe and lineage of {escape(story.name)}</summary>{body}</details>"


def _lineage(story: Story) -> str:
    entries = story.manifest.get("lineage")
    if not isinstance(entries, list) or not entries:
        return ""
    lines = []
    for entry in entries:
        if not isinstance(entry, dict):
            continue
        told = [f"<b>{escape(str(entry['task']))}</b>" if entry.get("task") else "<b>an adapter not made by harness</b>"]
        told.append(f"from <code>{escape(str(entry.get('base')))}</code>")
        for key in ("base_revision", "base_digest", "adapter", "adapter_mode", "adapter_digest", "teacher", "data", "recipe_digest", "git_commit", "step"):
            if entry.get(key) is not None:
                text = entry[key] if isinstance(entry[key], str) else json.dumps(entry[key])
                short = text[:12] if key.endswith(("digest", "commit")) or key in ("data",) else text
                told.append(f'{key.replace("_", " ")} <code title="{escape(text)}">{escape(short)}</code>')
        lines.append(f"<li>{', '.join(told)}</li>")
    return f'<h3>Lineage</h3><ol class="lineage">{"".join(lines)}</ol>'


# ---- the rest


def _rest(stories: Sequence[Story]) -> str:
    drawn = {line.key for story in stories for panel in choose_panels(_keys(story)) for line in panel.lines}
    keys = sorted({key for story in stories for key in story.columns.values if key not in drawn})
    if not keys:
        return ""
    rows = []
    for key in keys:
        curves = [story.curve(key, 1) for story in stories]
        cells = "".join(
            f'<td class="number">{number(curve.first)} → {number(curve.last)}</td>' if curve and curve.points else '<td class="number">–</td>'
            for curve in curves[:MOST_COLUMNS]
        )
        rows.append(f"<tr><td><code>{escape(key)}</code></td>{cells}</tr>")
    head = "".join(f'<th class="number">{escape(story.name)}</th>' for story in stories[:MOST_COLUMNS])
    more = f'<p class="note">Of the first {MOST_COLUMNS} runs.</p>' if len(stories) > MOST_COLUMNS else ""
    return (
        f"<details id='rest'><summary>{counted(len(keys), 'more metric')}, first → last</summary><div class='sheet scroll'>"
        f"<table><tr><th>key</th>{head}</tr>{''.join(rows)}</table></div>{more}</details>"
    )


def _method(stories: Sequence[Story]) -> str:
    lines = [
        "<b>Goodput</b> is the share of wall time that went into steps that were kept. Wall time runs from the moment the run was sent to "
        "Slurm, or from the first sign of its first life, to its end or to now; the queue and pauses are in it. The time of a step is what the "
        "trainer measured (<code>speed/step_s</code>, evaluation and saving excluded).",
        "<b>Kept</b> are the steps that the run as it stands was made with. A life that goes on from checkpoint-R makes the steps after R again: "
        "those that were made before are lost. Of a run that is over and not done, what came after its last checkpoint is lost too.",
        "<b>Curves</b> show each step as it went the last time. They are thinned so that the first, lowest, highest and last point of each part "
        "of the axis stay; means are taken before. × marks what was not a number.",
    ]
    return f'<section class="method"><h2>What is counted</h2><ul>{"".join(f"<li>{line}</li>" for line in lines)}</ul></section>'
