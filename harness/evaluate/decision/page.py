"""The report as one HTML page that needs nothing beside itself: no script, no font, no picture from elsewhere.

Drawn from the report's JSON alone. Read from the top it answers, in this order: what to do about each behaviour, how every arm did, what
got worse, what the arms cost, and for each behaviour why, with its evidence and some of its items; at the end how it was judged.
"""

from __future__ import annotations

from html import escape
from pathlib import Path

from harness.evaluate.decision.plots import fall_plot, interval_plot, token_bar
from harness.evaluate.decision.report import evidence_cells, said_of_plan, said_of_training
from harness.evaluate.decision.verdicts import DPO, FIX, KEEP, RETRIEVE, SFT, UNKNOWN, in_prompts, shown_p
from harness.page import render_document

STYLE = Path(__file__).with_name("page.css")
CLASS_OF_VERDICT = {KEEP: "keep", RETRIEVE: "retrieve", SFT: "sft", DPO: "dpo", FIX: "fix", UNKNOWN: "unknown"}


def render_page(report: dict) -> str:
    body = "\n".join(
        [
            _head(report),
            _cards(report),
            _matrix(report),
            _worse(report),
            _costs(report),
            "<h2>Each behaviour</h2>",
            *(_behaviour(one, report) for one in report["behaviours"]),
            _method(report),
        ]
    )
    return render_document(f"{report['title']}: prompt, retrieve or fine-tune", body, style=STYLE.read_text(encoding="utf-8"))


def _head(report: dict) -> str:
    rules = report["rules"]
    facts = (
        f"{report['items']} items, behaviours: {len(report['behaviours'])}, arms on the same items: {len(report['arms'])}. Target "
        f"{rules['target']:.0%}, intervals and tests at {rules['confidence']:.0%}. harness {report['harness']}, {report['created']}."
    )
    notes = "".join(f'\n<p class="warning">{escape(note)}.</p>' for note in report["notes"])
    return f"<h1>{escape(report['title'])}: prompt, retrieve or fine-tune</h1>\n<p class='soft'>{escape(facts)}</p>{notes}"


# ---- what to do


def _cards(report: dict) -> str:
    cards = []
    for at, one in enumerate(report["behaviours"]):
        rows = [one["evidence"][0]]
        if one["arm"] not in (None, rows[0]["arm"]):
            rows.append(_row_of(one, one["arm"]))
        pairs = "".join(
            f"<span>{escape(row['arm'])}</span>{_interval(row, report, chosen=row['arm'] == one['arm'])}<b>{_rate(row)}</b>" for row in rows
        )
        plots = f'<div class="pair">{pairs}</div>' if rows[0]["n"] else ""
        harm = f'<p class="why harm">{_harm(one)}</p>' if one["harms"] else ""
        cards.append(
            f'<li class="card {CLASS_OF_VERDICT[one["verdict"]]}"><a href="#behaviour-{at}"><h3>{escape(one["name"])}</h3>'
            f'<span class="verdict">{_verdict(one)}</span></a>{plots}'
            f'<p class="why">{escape(one["reasons"][0])}</p>{harm}</li>'
        )
    return f'<ul class="cards">{"".join(cards)}</ul>'


def _verdict(one: dict) -> str:
    """With the arm that does it, where that says more than the verdict."""
    return escape(one["verdict"] + (f": {one['arm']}" if one["arm"] not in (None, "zero-shot", "retrieval") else ""))


def _row_of(behaviour: dict, arm: str) -> dict:
    return next(row for row in behaviour["evidence"] if row["arm"] == arm)


def _interval(row: dict, report: dict, chosen: bool = False) -> str:
    return interval_plot(row["rate"], row["interval"], report["rules"]["target"], state=row["state"], chosen=chosen)


def _rate(row: dict) -> str:
    return "–" if row["rate"] is None else f"{row['rate']:.0%}"


def _harm(behaviour: dict) -> str:
    falls = ", ".join(f"{one['behaviour']} from {one['before']:.0%} to {one['after']:.0%}" for one in behaviour["harms"])
    return escape(f"but with {behaviour['arm']} others get worse: {falls}")


# ---- every arm


def _matrix(report: dict) -> str:
    arms = [row["arm"] for row in report["behaviours"][0]["evidence"]]
    head = "".join(f'<th class="arm">{escape(arm)}</th>' for arm in arms)
    lines = []
    for one in report["behaviours"]:
        lines.append(_matrix_row(one["name"], one["evidence"], one["arm"]))
    for guard in report["guards"]:
        lines.append(_matrix_row(f"{guard['behaviour']} (guard)", guard["evidence"], None))
    legend = "".join(
        f'<span class="{state}"><i></i>{said}</span>'
        for state, said in (("reaches", "reaches the target"), ("open", "open: the interval lies on both sides"), ("misses", "misses it"))
    )
    return (
        "<h2>How every arm did</h2>\n<p>Share of the items that are right. Colour says whether the whole interval lies on one side of the "
        f'target; bold is the arm of the verdict.</p>\n<div class="sheet scroll"><table class="matrix"><tr><th>behaviour</th>{head}</tr>'
        f'{"".join(lines)}</table></div>\n<p class="legend">{legend}</p>'
    )


def _matrix_row(name: str, rows: list[dict], chosen: str | None) -> str:
    cells = [] if rows[0]["n"] else [f'<td class="soft" colspan="{len(rows)}">its gold is faulty: no arm can be judged by it</td>']
    for row in rows if rows[0]["n"] else ():
        said = f"<b>{_rate(row)}</b>" if row["arm"] == chosen else _rate(row)
        much = 34 if row["state"] != "open" else 22
        cells.append(f'<td class="rate {row["state"]}"><span style="--much: {much}%">{said}</span></td>')
    return f"<tr><td>{escape(name)}</td>{''.join(cells)}</tr>"


# ---- what got worse


def _worse(report: dict) -> str:
    guards = ", guarded ones included" if report["guards"] else ""
    against = "every arm against zero-shot on the same items, corrected with all other comparisons"
    intro = f"<h2>What got worse</h2>\n<p>On all behaviours{guards}: {against}.</p>"
    if not report["regressions"]:
        return f"{intro}\n<p>Nothing, significantly. That does not show that nothing did: the intervals say what could still hide.</p>"
    rows = []
    for one in report["regressions"]:
        kind = " (guard)" if one["guarded"] else ""
        rows.append(
            f"<tr><td>{escape(one['behaviour'])}{kind}</td><td>{escape(one['arm'])}</td>"
            f'<td class="wide">{fall_plot(one["before"], one["after"])}</td>'
            f'<td class="number">{one["before"]:.0%} → {one["after"]:.0%}</td>'
            f'<td class="number">{one["lost"]} lost, {one["gained"]} won</td><td class="number">{shown_p(one["p_holm"])}</td></tr>'
        )
    return (
        f'{intro}\n<div class="sheet scroll"><table><tr><th>behaviour</th><th>with</th><th></th><th class="number">rate</th>'
        f'<th class="number">items</th><th class="number">p</th></tr>{"".join(rows)}</table></div>'
    )


# ---- costs


def _costs(report: dict) -> str:
    longest = max(arm["prompt_tokens"] + arm["answer_tokens"] for arm in report["arms"])
    rows = []
    for arm in report["arms"]:
        total = arm["prompt_tokens"] + arm["answer_tokens"]
        cut = f"{arm['cut_off']} of {arm['asked']}" if arm["cut_off"] else "–"
        right = f"{arm['right'] / arm['judged']:.0%}" if arm["judged"] else "–"
        rows.append(
            f'<tr><td class="arm">{escape(arm["name"])}</td>'
            f'<td class="wide">{token_bar(arm["prompt_tokens"], arm["answer_tokens"], longest)}</td>'
            f'<td class="number">{total:,.0f}</td><td class="number">{arm["answer_tokens"]:,.0f}</td><td class="number">{cut}</td>'
            f'<td class="number">{right}</td></tr>'
        )
    left_out = "".join(f'<p class="note"><b>{escape(name)}</b> is left out: {escape(why)}</p>' for name, why in report["left_out"].items())
    planned = f'\n<p class="note">{escape(said_of_plan(report["planned"]))}</p>' if report["planned"] else ""
    models = []
    for model in report["models"]:
        numbers = f"{model['parameters']:,}", _adapter(model), _bytes(model["bytes"])
        cells = "".join(f'<td class="number">{number}</td>' for number in numbers)
        models.append(f'<tr><td>{escape(model["name"])}</td>{cells}<td class="training">{escape(said_of_training(model))}</td></tr>')
    return (
        "<h2>What it costs</h2>\n<p>Tokens of one answer, prompt and all, as the mean over all items and guards; blue is the prompt.</p>\n"
        '<div class="sheet scroll"><table><tr><th>arm</th><th></th><th class="number">tokens</th><th class="number">of them answer</th>'
        f'<th class="number">cut off</th><th class="number">items right</th></tr>{"".join(rows)}</table></div>\n{left_out}'
        '<div class="sheet scroll"><table><tr><th>model</th><th class="number">parameters</th><th class="number">of them adapter</th>'
        '<th class="number">size</th>'
        f"<th class='training'>training</th></tr>{''.join(models)}</table></div>{planned}"
    )


def _adapter(model: dict) -> str:
    return f"{model['adapter_parameters']:,}" if model["adapter_parameters"] else "–"


def _bytes(count: float) -> str:
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "bytes" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError


# ---- one behaviour


def _behaviour(one: dict, report: dict) -> str:
    at = report["behaviours"].index(one)
    consistent = one["consistent"]
    reasons = [escape(reason) for reason in one["reasons"]]
    if one["faulty"] and one["verdict"] != FIX:
        reasons.append(f"{len(one['faulty'])} of {one['items']} items are left out: their gold is faulty")
    fails = f"items fail {in_prompts(consistent['fails_in'], consistent['prompts'])}"
    if one["evidence"][0]["n"] and not any(fails in reason for reason in reasons):
        reasons.append(f"{consistent['items']} of {one['evidence'][0]['n']} {fails}")
    listed = "".join(f"<li>{reason}</li>" for reason in reasons)
    harm = f'<li class="harm">{_harm(one)}</li>' if one["harms"] else ""
    return (
        f'<section class="behaviour {CLASS_OF_VERDICT[one["verdict"]]}" id="behaviour-{at}"><header><h3>{escape(one["name"])}</h3>'
        f'<span class="verdict">{_verdict(one)}</span></header><ul>{listed}{harm}</ul>'
        f"{_evidence(one, report)}{_faults(one)}{_examples(one)}</section>"
    )


def _evidence(one: dict, report: dict) -> str:
    if not one["evidence"][0]["n"]:
        return ""
    rows = []
    for row in one["evidence"]:
        arm, right, _, compared, p, failures = evidence_cells(row)
        chosen = row["arm"] == one["arm"]
        rows.append(
            f'<tr{" class=chosen" if chosen else ""}><td class="arm">{escape(arm)}</td>'
            f'<td class="wide">{_interval(row, report, chosen)}</td>'
            f'<td class="number">{_rate(row)}</td><td class="number">{right}</td><td class="number">{compared}</td>'
            f'<td class="number">{p}</td><td class="fails">{escape(failures)}</td></tr>'
        )
    return (
        '<div class="scroll"><table><tr><th>arm</th><th></th><th class="number">rate</th><th class="number">right</th>'
        f'<th class="number">won, lost</th><th class="number">p</th><th>fails by</th></tr>{"".join(rows)}</table></div>'
    )


def _faults(one: dict) -> str:
    if not one["faulty"]:
        return ""
    listed = "".join(f"<li><code>{escape(id)}</code> {escape(reason)}</li>" for id, reason in list(one["faulty"].items())[:20])
    more = f"<li>and {len(one['faulty']) - 20} more, all in report.json</li>" if len(one["faulty"]) > 20 else ""
    return f"<details><summary>{len(one['faulty'])} items with faulty gold</summary><ul>{listed}{more}</ul></details>"


def _examples(one: dict) -> str:
    shown = []
    for example in one["examples"]:
        said = "".join(
            f"<dt>{escape(answer['arm'])}</dt><dd><span class='words'>{escape(answer['text'] or '(nothing)')}</span> {_mark(answer)}</dd>"
            for answer in example["said"]
        )
        fault = f"<dt>fault</dt><dd>{escape(example['fault'])}</dd>" if example["fault"] else ""
        shown.append(
            f'<div class="example"><dl><dt>asked</dt><dd>{escape(example["asked"])} <span class="note">{escape(example["id"])}</span></dd>'
            f"<dt>gold</dt><dd class='words'>{escape(example['gold'])}</dd>{fault}{said}</dl></div>"
        )
    return f"<details open><summary>{len(shown)} of its items</summary>{''.join(shown)}</details>"


def _mark(answer: dict) -> str:
    if answer["correct"]:
        return '<span class="is-right">✓ right</span>'
    return f'<span class="is-wrong">✗ {escape(answer["failure"].replace("_", " "))}</span>'


# ---- how it was judged


def _method(report: dict) -> str:
    rules = report["rules"]
    target, prompts = f"{rules['target']:.0%}", ", ".join(rules["prompts"])
    ways = ", ".join(f"{way} {rate:.0%}" for way, rate in report["ways"].items())
    steps = [
        f"<b>{FIX}</b>: more than {1 - rules['target']:.0%} of the items have gold that breaks its own schema or contradicts itself.",
        f"<b>{KEEP}</b>: the base reaches {target} as it is asked, or with the cheapest prompt or examples that do.",
        f"<b>{RETRIEVE}</b>: no prompt reaches it, and the documents do.",
        f"<b>{SFT}</b> or <b>{DPO}</b>: every prompt and retrieval miss it, and the same items fail "
        f"{in_prompts(rules['fails_in'], len(rules['prompts']))} ({escape(prompts)}). By the trained model that reaches it; else DPO "
        "where most failures are a wrong choice between answers of a right form, SFT where the form or the tool is not known.",
        f"<b>{UNKNOWN}</b>: whenever an interval that decides lies on both sides of {target}, or a gain that decides may be chance.",
    ]
    arms = "".join(f"<dt>{escape(arm['name'])}</dt><dd>{escape(arm['what'])}{_system(arm)}</dd>" for arm in report["arms"])
    return (
        "<h2>How it is judged</h2>\n<p>Greedy answers to the same items; an answer is right when it makes exactly gold's calls, or none "
        "and says something. Rates with Wilson intervals; arms against zero-shot by McNemar's exact test on the same items, corrected "
        f"after Holm over all of them. For each behaviour, in this order:</p>\n<ol>{''.join(f'<li>{step}</li>' for step in steps)}</ol>\n"
        + (f"<p>Few-shot examples were chosen on the tuning rows: {escape(ways)}.</p>\n" if ways else "")
        + f'<div class="example"><dl>{arms}</dl></div>'
    )


def _system(arm: dict) -> str:
    return f': <span class="words">{escape(arm["system"])}</span>' if arm["system"] else ""
