"""The page of one run, or of several beside each other. Read from the top: how it went, in a sentence; the curves; where the time went;
memory against the plan; the recipe and where the model comes from; and last what exactly is counted."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from html import escape
from pathlib import Path

from harness import __version__
from harness.page import render_document
from harness.recipe.load import render_value, render_yaml
from harness.report.figures import curves_section, groups_of, keys_of, memory_section, swatch, time_section
from harness.report.headline import headline
from harness.report.panels import choose_panels
from harness.report.story import Story, differing_settings, title_of
from harness.report.words import counted, duration, moment, number, percent

HERE = Path(__file__).parent
MOST_COLUMNS = 8
"""Of a table with a column for each run; beyond them runs are rows."""


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
    for number_of_group, group in enumerate(groups_of(stories)):
        sections.append(curves_section(group, stories, number_of_group))
    sections += [
        time_section(stories),
        memory_section(stories),
        *(_recipe(story, stories) for story in stories),
        _rest(stories),
        _method(stories),
    ]
    return "\n".join(filter(None, sections))


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
        written = "".join(f'<td class="{kind}">{escape(text)}</td>' if kind else f"<td>{escape(text)}</td>" for text, kind in cells)
        rows.append(f'<tr><td class="run">{swatch(story, stories)}{escape(story.name)}</td>{written}</tr>')
    heads = ("run", "task", "state", "step", "lives", "first → last", "of", "goodput", "time", "tokens/s", "peak GiB")
    numbers = {"step", "lives", "first → last", "goodput", "time", "tokens/s", "peak GiB"}
    head = "".join(f"<th{' class=number' if name in numbers else ''}>{name}</th>" for name in heads)
    return f'<div class="sheet scroll"><table><tr>{head}</tr>{"".join(rows)}</table></div>'


def _settings(stories: Sequence[Story]) -> str:
    differing = differing_settings(stories)
    if not differing:
        return "<p>Their recipes are the same, but for where they are written.</p>"
    values = {key: [_value(value) for value in row] for key, row in differing.items()}
    if len(stories) <= MOST_COLUMNS:
        head = "".join(f"<th>{escape(story.name)}</th>" for story in stories)
        rows = [f"<tr><td><code>{escape(key)}</code></td>{_cells(row)}</tr>" for key, row in values.items()]
        table = f"<tr><th>setting</th>{head}</tr>{''.join(rows)}"
    else:
        head = "".join(f"<th><code>{escape(key)}</code></th>" for key in values)
        rows = [f"<tr><td>{escape(story.name)}</td>{_cells([row[at] for row in values.values()])}</tr>" for at, story in enumerate(stories)]
        table = f"<tr><th>run</th>{head}</tr>{''.join(rows)}"
    return f'<h2>What differs in their recipes</h2><div class="sheet scroll"><table class="settings">{table}</table></div>'


def _cells(values: Sequence[str]) -> str:
    return "".join(f"<td><code>{escape(value)}</code></td>" for value in values)


def _value(value: object) -> str:
    text = "–" if value is None else render_value(value)
    return text if len(text) <= 300 else f"{text[:299]}…"


# ---- recipe


def _recipe(story: Story, stories: Sequence[Story]) -> str:
    at = stories.index(story)
    rows = "".join(f"<tr><td><code>{escape(key)}</code></td>{_cells([_value(value)])}</tr>" for key, value in story.differences.items())
    whole = render_yaml(story.settings) if story.settings else ""
    what = "What is not a default" if story.recipe else "As it stands in the file"
    versions = story.manifest.get("versions")
    facts = [f"{name} {version}" for name, version in versions.items()] if isinstance(versions, dict) else []
    facts += [f"{name} {story.manifest[key]}" for key, name in (("python", "Python"), ("git_commit", "commit")) if story.manifest.get(key)]
    body = (
        f'<div class="sheet scroll"><table class="settings"><tr><th>{what}</th><th></th></tr>{rows}</table></div>'
        f"{_lineage(story)}"
        + (f'<p class="note">{escape(", ".join(facts))}</p>' if facts else "")
        + (f'<details id="recipe-{at}"><summary>the whole recipe</summary><pre>{escape(whole)}</pre></details>' if whole else "")
    )
    if len(stories) == 1:
        return f"<h2>Recipe and lineage</h2>{body}"
    title = "<h2>Recipes and lineage</h2>" if at == 0 else ""
    return f'{title}<details id="of-{at}"><summary>{escape(story.name)}</summary>{body}</details>'


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
        for key, value in entry.items():
            if value is not None and key not in ("task", "base"):
                text = value if isinstance(value, str) else json.dumps(value)
                short = text[:12] if key.endswith(("digest", "commit")) or key == "data" else text
                told.append(f'{escape(key.replace("_", " "))} <code title="{escape(text)}">{escape(short)}</code>')
        lines.append(f"<li>{', '.join(told)}</li>")
    return f'<h3>Lineage</h3><ol class="lineage">{"".join(lines)}</ol>'


# ---- the rest


def _rest(stories: Sequence[Story]) -> str:
    drawn = {line.key for story in stories for panel in choose_panels(keys_of(story)) for line in panel.lines}
    keys = sorted({key for story in stories for key in story.columns.values if key not in drawn})
    if not keys:
        return ""
    rows = []
    for key in keys:
        curves = [story.curve(key, 1) for story in stories]
        told = [f"{number(curve.first)} → {number(curve.last)}" if curve and curve.points else "–" for curve in curves[:MOST_COLUMNS]]
        cells = "".join(f'<td class="number">{one}</td>' for one in told)
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
        "Slurm, or from the first sign of its first life, to its end or to now; the queue and pauses are in it. The time of a step is what "
        "the trainer measured (<code>speed/step_s</code>, evaluation and saving excluded).",
        "<b>Kept</b> are the steps that the run as it stands was made with. A life that goes on from checkpoint-R makes the steps after R "
        "again: those that were made before are lost. Of a run that is over and not done, what came after its last checkpoint is lost too. "
        "Of one that runs nothing is lost yet.",
        "<b>Curves</b> show each step as it went the last time. They are thinned so that the first, lowest, highest and last point of each "
        "part of the axis stay; means are taken before. × marks what was not a number.",
    ]
    return f'<section class="method"><h2>What is counted</h2><ul>{"".join(f"<li>{line}</li>" for line in lines)}</ul></section>'
