"""The report as one JSON object, from which the page and the Markdown are drawn: what they say stands in it, and nowhere else.

    {"title", "created", "harness", "rules", "arms", "models", "ways", "behaviours", "guards", "regressions", "notes"}

docs/decide.md says what the keys mean.
"""

from __future__ import annotations

import dataclasses
import json
import time

from harness import __version__
from harness.errors import EvaluationError
from harness.evaluate.decision.questions import asked_words
from harness.evaluate.decision.run import Asked, measured
from harness.evaluate.decision.schema import Decision
from harness.evaluate.decision.verdicts import PROMPTS, Limits, Regression, Row, Verdict, decide, shown_p
from harness.evaluate.items import Item

EXAMPLES = 3
"""Items of each behaviour that are shown with what was said to them."""
SHOWN_CHARACTERS = 400
CUT_OFF_SHARE = 0.1
"""So many cut answers are no longer the model's rambling alone."""


def build_report(decision: Decision, asked: Asked, title: str) -> dict:
    limits = Limits(**decision.rules.model_dump())
    behaviours, guards = _by_behaviour(asked.items), _by_behaviour(asked.guards)
    items = [*asked.items, *asked.guards]
    methods = {name: training.task for name, training in asked.trainings.items()}
    arms = [measured(answers, items, methods.get(answers.arm.model)) for answers in asked.answers]
    prompts = [arm.name for arm in arms if arm.kind in PROMPTS]
    if (limits.fails_in or 0) > len(prompts):
        gone = ", ".join(f"{name} ({why})" for name, why in asked.left_out.items())
        raise EvaluationError(
            f"rules.fails_in = {limits.fails_in}, but only {len(prompts)} prompts could be asked, because these are left out: {gone}; "
            f"set rules.fails_in to at most {len(prompts)}"
        )
    verdicts, guarded, regressions = decide(behaviours, asked.faults, arms, limits, guards)
    return {
        "title": title,
        "created": time.strftime("%Y-%m-%d %H:%M"),
        "harness": __version__,
        "recipe": decision.model_dump(mode="json"),
        "rules": {**decision.rules.model_dump(), "fails_in": verdicts[0].fails_in, "prompts": verdicts[0].prompts},
        "items": len(asked.items),
        "arms": _arms(decision, asked, verdicts),
        "models": _models(asked),
        "planned": asked.planned,
        "ways": asked.ways,
        "behaviours": [_behaviour(verdict, asked, regressions) for verdict in verdicts],
        "guards": [{"behaviour": name, "evidence": _rows(rows)} for name, rows in zip(guards, guarded, strict=True)],
        "regressions": [dataclasses.asdict(one) for one in regressions],
        "left_out": asked.left_out,
        "notes": _notes(decision, asked),
    }


def _notes(decision: Decision, asked: Asked) -> list[str]:
    """What a reader has to know before a verdict is believed."""
    notes = []
    for answers in asked.answers:
        cut, count = answers.facts["cut_off"], len(answers.results)
        if cut > CUT_OFF_SHARE * count:
            notes.append(
                f"{answers.arm.name}: {cut} of {count} answers were cut off at generate.max_new_tokens = "
                f"{decision.generate.max_new_tokens}, and a cut answer is wrong; raise it before a verdict on them is believed"
            )
    if asked.repeated:
        notes.append(f"{asked.repeated} rows of the items ask again what another asks, with the same gold; each question counts once")
    return notes


def _by_behaviour(items: list[Item]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for item in items:
        found.setdefault(item.category, []).append(item.id)
    return found


def _arms(decision: Decision, asked: Asked, verdicts: list[Verdict]) -> list[dict]:
    texts = {"instruction": decision.instruction, **decision.prompts}
    found = []
    for answers in asked.answers:
        results, rows = list(answers.results.values()), [verdict.row(answers.arm.name) for verdict in verdicts]
        found.append(
            {
                "name": answers.arm.name,
                "kind": answers.arm.kind,
                "model": answers.arm.model,
                "what": answers.arm.what,
                "system": texts.get(answers.arm.name),
                "prompt_tokens": sum(result.prompt_tokens for result in results) / len(results),
                "answer_tokens": sum(result.answer_tokens for result in results) / len(results),
                "cut_off": answers.facts["cut_off"],
                "asked": len(results),
                # Of the items whose gold is sound, over all behaviours.
                "right": sum(row.right for row in rows),
                "judged": sum(row.n for row in rows),
            }
        )
    return found


def _models(asked: Asked) -> list[dict]:
    found = []
    for name, path in asked.models.items():
        facts = next(answers.facts for answers in asked.answers if answers.arm.model == name)
        training = asked.trainings.get(name)
        found.append(
            {
                "name": name,
                "path": str(path),
                **{key: facts[key] for key in ("parameters", "adapter_parameters", "bytes")},
                "training": dataclasses.asdict(training) if training else None,
            }
        )
    return found


def _behaviour(verdict: Verdict, asked: Asked, regressions: list[Regression]) -> dict:
    return {
        "name": verdict.behaviour,
        "verdict": verdict.verdict,
        "arm": verdict.arm,
        "reasons": verdict.reasons,
        "needs_items": verdict.needs,
        "items": verdict.items,
        "faulty": verdict.faulty,
        "consistent": {
            "items": len(verdict.consistent),
            "fails_in": verdict.fails_in,
            "prompts": len(verdict.prompts),
            "interval": verdict.consistent_interval,
        },
        "evidence": _rows(verdict.rows),
        "harms": [dataclasses.asdict(one) for one in regressions if one.arm == verdict.arm],
        "examples": _examples(verdict, asked),
    }


def _rows(rows: list[Row]) -> list[dict]:
    return [{**dataclasses.asdict(row), "rate": row.rate} for row in rows]


def _examples(verdict: Verdict, asked: Asked) -> list[dict]:
    """Faulty items where those are the matter, else items that fail consistently, else such as the base has wrong, else any."""
    by_id = {item.id: item for item in asked.items if item.category == verdict.behaviour}
    plain = asked.answers[0].results
    wrong = [id for id in by_id if not plain[id].correct]
    order = [*(verdict.faulty if verdict.verdict.startswith("fix") else ()), *verdict.consistent, *wrong, *by_id]
    shown_arms = dict.fromkeys(["zero-shot", *([verdict.arm] if verdict.arm else _best(verdict))])
    by_arm = {answers.arm.name: answers.results for answers in asked.answers}
    return [
        {
            "id": id,
            "asked": _cut(asked_words(by_id[id])),
            "gold": _cut(_gold(by_id[id])),
            "fault": verdict.faulty.get(id),
            "said": [
                {"arm": arm, "text": _cut(by_arm[arm][id].said), "correct": by_arm[arm][id].correct, "failure": by_arm[arm][id].failure}
                for arm in shown_arms
            ],
        }
        for id in list(dict.fromkeys(order))[:EXAMPLES]
    ]


def _best(verdict: Verdict) -> list[str]:
    return [max(verdict.rows, key=lambda row: row.rate or 0.0).arm]


def _gold(item: Item) -> str:
    calls = [f"{call['name']}({json.dumps(call['arguments'], ensure_ascii=False)})" for call in item.gold["calls"]]
    return "; ".join(calls) or f"no call: {item.gold['turn'].get('content', '')}"


def _cut(text: str) -> str:
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[: SHOWN_CHARACTERS - 1]}…"


# ---- Markdown


def render_markdown(report: dict) -> str:
    """The report for a pull request or a terminal."""
    target = f"{report['rules']['target']:.0%}"
    lines = [
        f"# {report['title']}",
        "",
        f"{report['items']} items, {len(report['arms'])} arms, target {target}, intervals at {report['rules']['confidence']:.0%}; "
        f"harness {report['harness']}, {report['created']}.",
        "",
        *(line for note in report["notes"] for line in (f"**{note}.**", "")),
        "| behaviour | items | verdict | by | why |",
        "|---|---:|---|---|---|",
    ]
    for one in report["behaviours"]:
        lines.append(_line(one["name"], one["items"], f"**{one['verdict']}**", one["arm"] or "–", one["reasons"][0]))
    lines += ["", "## What got worse", ""]
    if report["regressions"]:
        lines += ["| behaviour | arm | zero-shot | now | won, lost | p (Holm) |", "|---|---|---:|---:|---:|---:|"]
        for one in report["regressions"]:
            counts = f"{one['gained']}, {one['lost']}"
            lines.append(_line(one["behaviour"], one["arm"], f"{one['before']:.0%}", f"{one['after']:.0%}", counts, shown_p(one["p_holm"])))
    else:
        lines.append("Nothing, significantly. That does not show that nothing did: see the intervals.")
    lines += ["", "## What the arms cost", "", "| arm | model | prompt tokens | answer tokens | cut off | items right |"]
    lines.append("|---|---|---:|---:|---:|---:|")
    for arm in report["arms"]:
        tokens = f"{arm['prompt_tokens']:.0f}", f"{arm['answer_tokens']:.0f}"
        counts = f"{arm['cut_off']} of {arm['asked']}", f"{arm['right']} of {arm['judged']}"
        lines.append(_line(arm["name"], arm["model"], *tokens, *counts))
    lines += [_line(name, "left out", reason, "", "", "") for name, reason in report["left_out"].items()]
    lines += ["", "| model | parameters | bytes | training |", "|---|---:|---:|---|"]
    for model in report["models"]:
        lines.append(_line(model["name"], f"{model['parameters']:,}", f"{model['bytes']:,}", said_of_training(model)))
    if report["planned"]:
        lines += ["", said_of_plan(report["planned"])]
    for one in report["behaviours"]:
        lines += ["", f"## {one['name']}: {one['verdict']}", "", *(f"- {reason}" for reason in one["reasons"])]
        if one["faulty"] and not one["verdict"].startswith("fix"):
            lines.append(f"- {len(one['faulty'])} of {one['items']} items are left out, their gold is faulty")
        lines += ["", "| arm | right | 95 % | won, lost | p (Holm) | fails by |".replace("95 %", f"{report['rules']['confidence']:.0%}")]
        lines.append("|---|---:|---:|---:|---:|---|")
        lines += [_line(*evidence_cells(row)) for row in one["evidence"]]
    return "\n".join(lines) + "\n"


def _line(*cells: object) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def evidence_cells(row: dict) -> tuple[str, ...]:
    """(arm, right, interval, won and lost, p, failures) of one evidence row."""
    if not row["n"]:
        return row["arm"], "–", "–", "–", "–", "no item with sound gold"
    low, high = row["interval"]
    compared = f"{row['gained']}, {row['lost']}" if row["p"] is not None else "–"
    p = shown_p(row["p_holm"]) if row["p"] is not None else "–"
    failures = ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in row["failures"].items())
    return row["arm"], f"{row['right']} of {row['n']}", f"{low:.0%} to {high:.0%}", compared, p, failures


def said_of_training(model: dict) -> str:
    training = model["training"]
    if training is None:
        return "not trained here"
    task = training["task"] or "task not known"
    if training["other_base"]:
        task = f"{task}, from another base ({training['other_base']}), so that it differs from zero-shot by more than its training"
    if training["hours"] is None:
        return f"{task}; {training['basis']}"
    return f"{task}, {_duration(training['hours'])} ({training['basis']})"


def said_of_plan(planned: dict) -> str:
    gpus = f", {_duration(planned['gpu_hours'])} of one GPU" if planned["gpu_hours"] != planned["hours"] else ""
    return f"A training by {planned['recipe']} would take {_duration(planned['hours'])}{gpus}: {planned['basis']}."


def _duration(hours: float) -> str:
    return f"{hours:.1f} h" if hours >= 1 else f"{hours * 60:.1f} min"
