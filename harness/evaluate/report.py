"""What became of an evaluation: the rows and numbers that it leaves, their tables, and two of them on the same items.

    summary.json   {"target", "settings", "versions", "suites": {suite: {"note", "files", "left_out", "categories": {category: …}}}}
                   of a category: n, correct, rate, interval (Wilson, 95 %), by_class, measures, cut_off, tokens; of the loss suite n,
                   tokens, loss and perplexity instead
    items.jsonl    a row for each item: suite, key, and a Result's fields, with detail; of the loss suite correct is null, and there is loss

Numbers are per category. There is no overall: a mean over part of a suite looks like the suite's own and is another.
"""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from harness.errors import EvaluationError
from harness.evaluate.items import Result
from harness.evaluate.statistics import holm, mcnemar_exact, wilson_interval

SUMMARY, ITEMS = "summary.json", "items.jsonl"
RIGHT = "right"
SHOWN_FAILURES = 3


def summarise_category(rows: Sequence[dict]) -> dict:
    """Of the rows of items.jsonl that are of one category; docs/evaluate.md says what the keys mean."""
    counted = {
        "n": len(rows),
        "asked_in_vain": sum(row["failure"] in ("too_long", "refused") for row in rows),
        "cut_off": sum(not row["ended"] for row in rows),
        "prompt_tokens": sum(row["prompt_tokens"] for row in rows),
        "answer_tokens": sum(row["answer_tokens"] for row in rows),
    }
    if rows[0]["correct"] is None:
        read = [row for row in rows if row["loss"] is not None]
        tokens = sum(row["answer_tokens"] for row in read)
        loss = sum(row["loss"] for row in read) / tokens if tokens else None
        return counted | {"read": len(read), "loss": loss, "perplexity": None if loss is None or loss > 700 else math.exp(loss)}
    correct = sum(row["correct"] for row in rows)
    classes = Counter(row["failure"] or RIGHT for row in rows)
    return {
        "n": counted.pop("n"),
        "correct": correct,
        "rate": correct / len(rows),
        "interval": wilson_interval(correct, len(rows)),
        "by_class": dict(classes.most_common()),
        "measures": _measures(rows),
        **counted,
    }


def _measures(rows: Sequence[dict]) -> dict[str, dict]:
    found = defaultdict(list)
    for row in rows:
        for name, counted in row["measures"].items():
            found[name].append(counted)
    summary = {}
    for name, pairs in sorted(found.items()):
        hits, of = sum(hit for hit, _ in pairs), sum(many for _, many in pairs)
        # Those of one item do not fall independently of each other, as an interval would have it.
        interval = wilson_interval(hits, of) if all(many == 1 for _, many in pairs) else None
        summary[name] = {"count": hits, "of": of, "rate": hits / of if of else None, "interval": interval}
    return summary


def by_category(rows: Iterable[dict]) -> dict[str, list[dict]]:
    found = defaultdict(list)
    for row in rows:
        found[row["category"]].append(row)
    return dict(found)


# ---- read again


@dataclass(frozen=True)
class Results:
    """What an evaluation has left in its folder."""

    folder: Path
    summary: dict
    rows: list[dict]

    def results(self, suite: str) -> list[Result]:
        """Those of a suite that says right or wrong."""
        names = Result.__dataclass_fields__
        rows = (row for row in self.rows if row["suite"] == suite and row["correct"] is not None)
        return [Result(**{name: row[name] for name in names}) for row in rows]


def load_results(folder: Path) -> Results:
    """Raises EvaluationError for a folder in which no evaluation has come to its end, and for files that are not whole."""
    if not (folder / SUMMARY).is_file() or not (folder / ITEMS).is_file():
        raise EvaluationError(f"{folder}: holds no {SUMMARY} and {ITEMS}; give the --output of an evaluation that has come to its end")
    try:
        with open(folder / ITEMS, encoding="utf-8") as stream:
            return Results(folder, json.loads((folder / SUMMARY).read_text(encoding="utf-8")), [json.loads(line) for line in stream])
    except ValueError as error:
        raise EvaluationError(f"{folder}: its {SUMMARY} or {ITEMS} is not whole ({error}); give its evaluation's command again") from None


# ---- two on the same items


def compare(these: Results, others: Results) -> dict:
    """Category by category, over the items that both were asked: who got what right, McNemar's exact p, and Holm's over all of them.

    Raises EvaluationError where an item of the same name asks something else, and where they share none.
    """
    theirs = {(row["suite"], row["id"]): row for row in others.rows}
    pairs, alone = defaultdict(list), 0
    for row in these.rows:
        other = theirs.pop((row["suite"], row["id"]), None)
        if other is None:
            alone += 1
        elif other["key"] != row["key"]:
            raise EvaluationError(
                f'{others.folder}: was asked another question as {row["suite"]} "{row["id"]}" than {these.folder}; only answers to '
                "the same questions can be compared; ask both from the same files"
            )
        else:
            pairs[row["suite"], row["category"]].append((row, other))
    if not pairs:
        raise EvaluationError(f"{others.folder}: shares no item with {these.folder}; ask both with the same --suite and --max-items")
    categories = [_compare_category(suite, category, rows) for (suite, category), rows in pairs.items()]
    tested = [found for found in categories if "p" in found]
    for found, adjusted in zip(tested, holm([found["p"] for found in tested]), strict=True):
        found["p_holm"] = adjusted
    return {
        "this": str(these.folder),
        "against": str(others.folder),
        "categories": categories,
        "only_in_this": alone,
        "only_in_against": len(theirs),
        "other_settings": _other_settings(these.summary, others.summary),
    }


def _compare_category(suite: str, category: str, rows: Sequence[tuple[dict, dict]]) -> dict:
    named = {"suite": suite, "category": category, "n": len(rows)}
    if rows[0][0]["correct"] is None:
        read = [(this, other) for this, other in rows if this["loss"] is not None and other["loss"] is not None]
        losses = [sum(pair[side]["loss"] for pair in read) / max(1, sum(pair[side]["answer_tokens"] for pair in read)) for side in (0, 1)]
        return named | {"loss": losses[0], "loss_against": losses[1], "lower_in": sum(a["loss"] < b["loss"] for a, b in read)}
    counts = Counter((this["correct"], other["correct"]) for this, other in rows)
    only_this, only_other = counts[True, False], counts[False, True]
    return named | {
        "rate": (counts[True, True] + only_this) / len(rows),
        "rate_against": (counts[True, True] + only_other) / len(rows),
        "both": counts[True, True],
        "only_this": only_this,
        "only_against": only_other,
        "neither": counts[False, False],
        "p": mcnemar_exact(only_this, only_other),
    }


def _other_settings(these: dict, others: dict) -> dict[str, list]:
    """Name -> [this, against] of what decides an answer or a verdict beside the model."""
    names = these["settings"].keys() | others["settings"].keys()
    pairs = {name: [these["settings"].get(name), others["settings"].get(name)] for name in sorted(names)}
    for suite in sorted(these["suites"].keys() & others["suites"].keys()):
        files = [sorted(summary["suites"][suite]["files"].values()) for summary in (these, others)]
        pairs[f"files of {suite}"] = files
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def logged_values(summary: dict) -> dict[str, float]:
    """suite/category/name -> number, as W&B gets them."""
    values = {}
    for suite, found in summary["suites"].items():
        for category, numbers in found["categories"].items():
            told = {name: numbers.get(name) for name in ("rate", "loss")}
            told |= {name: one["rate"] for name, one in numbers.get("measures", {}).items()}
            values |= {f"{suite}/{category}/{name}": value for name, value in told.items() if value is not None}
    return values


# ---- tables, as (heading, rows, columns to the right)

Table = tuple[tuple[str, ...], list[tuple[str, ...]], tuple[str, ...]]


def table_of(summary: dict) -> Table:
    rows = []
    for suite, found in summary["suites"].items():
        for category, numbers in found["categories"].items():
            rows.append((suite, category, *_cells(numbers)))
    return ("suite", "category", "right", "95 % interval", "rows", "beside", "failures"), rows, ("right", "rows")


def _cells(numbers: dict) -> tuple[str, ...]:
    if "loss" in numbers:
        loss = "none was read" if numbers["loss"] is None else f"loss {numbers['loss']:.4f} nats per token"
        return "-", "-", f"{numbers['read']} of {numbers['n']}", loss, ""
    low, high = numbers["interval"]
    measures = ", ".join(f"{name} {one['rate']:.1%}" for name, one in numbers["measures"].items() if one["rate"] is not None)
    failures = [f"{count} {name}" for name, count in numbers["by_class"].items() if name != RIGHT]
    more = f", {len(failures) - SHOWN_FAILURES} more" if len(failures) > SHOWN_FAILURES else ""
    interval = f"{low:.1%} to {high:.1%}"
    return (
        f"{numbers['rate']:.1%}",
        interval,
        f"{numbers['correct']} of {numbers['n']}",
        measures,
        ", ".join(failures[:SHOWN_FAILURES]) + more,
    )


def notes_of(summary: dict) -> list[str]:
    notes = []
    for suite, found in summary["suites"].items():
        if found["note"]:
            notes.append(f"{suite}: {found['note']}")
        notes += [f"{suite}: {count} rows are left out: {reason}" for reason, count in found["left_out"].items()]
        vain = sum(numbers["asked_in_vain"] for numbers in found["categories"].values())
        if vain:
            notes.append(f"{suite}: {vain} items were asked in vain (too_long, refused) and count as not right; {ITEMS} says why of each")
        cut_off = sum(numbers["cut_off"] for numbers in found["categories"].values())
        if cut_off:
            notes.append(f"{suite}: {cut_off} answers were cut off at {summary['settings']['max_new_tokens']} tokens (--max-new-tokens)")
    return notes


def comparison_table(found: dict) -> Table:
    rows = []
    for one in found["categories"]:
        if "p" in one:
            rates, alone = (f"{one['rate']:.1%}", f"{one['rate_against']:.1%}"), (str(one["only_this"]), str(one["only_against"]))
            rows.append((one["suite"], one["category"], *rates, str(one["n"]), *alone, f"{one['p']:.3g}", f"{one['p_holm']:.3g}"))
        else:
            losses = (f"{one['loss']:.4f}", f"{one['loss_against']:.4f}")
            rows.append((one["suite"], one["category"], *losses, str(one["n"]), str(one["lower_in"]), "-", "-", "-"))
    heading = ("suite", "category", "this", "against", "rows", "only this", "only against", "p", "p (Holm)")
    return heading, rows, heading[2:]
