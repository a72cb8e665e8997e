"""Canonical pairs and labelled answers (pairs.py) become samples of two sides, or of one with its label.

    pairs      chosen_input_ids, chosen_labels, rejected_input_ids, rejected_labels, margin (null where the row has none)
    labelled   input_ids, labels, label (true: good), prompt_length (tokens that are the same whatever is answered to this prompt)
    both       length (of pairs: of the longer side), sample (row_digest), location

Each side is rendered as supervised training renders the same conversation (samples.py), so masks, ends of turns and refusals are the same:
labels are -100 wherever the policy did not speak. No side depends on how the other's prompt was tokenised.

Promises. A pair has a trained token on either side, and its sides differ in what is trained; a pair that differs only in tool results is
refused. A pair over max_length keeps the same number of assistant turns on both sides. A label is about a whole answer, so a labelled
answer over max_length goes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from harness.data.pairs import side
from harness.data.report import SplitReport
from harness.data.rows import SourceRow
from harness.data.samples import REFUSED, TOO_LONG, UNTRAINED, Rules, TooLongError, build_sample, labels_of, source_digest
from harness.data.templates import Rendered, Renderer
from harness.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterator

ALIKE = "the two answers are trained alike"
ALIKE_ONCE_CUT = "the two answers are trained alike once they are cut to max_length"
SIDES = ("chosen", "rejected")

Pair = tuple[Rendered, Rendered]


class AlikeError(DataError):
    """Nothing of what is trained tells the two answers of a pair apart."""


def build_pair(source: SourceRow, renderer: Renderer, rules: Rules, report: SplitReport) -> dict | None:
    report.rows_in += 1
    row, location = source.row, source.location
    try:
        fitted, lost = fit_pair(renderer, row, location, rules, report)
    except TooLongError:
        raise
    except DataError as error:
        if rules.on_error == "fail":
            raise
        report.drop(ALIKE if isinstance(error, AlikeError) else REFUSED, str(error))
        return None
    if fitted is None:
        return None
    (chosen, rejected), (chosen_labels, rejected_labels) = fitted, map(labels_of, fitted)
    if control := next(filter(None, (renderer.control_token_in(side(row, name)) for name in SIDES)), None):
        report.control_tokens.add(1, [f"{location}: {control}"])
    trained = [len(labels) - labels.count(-100) for labels in (chosen_labels, rejected_labels)]
    report.rows += 1
    report.tokens += len(chosen.ids) + len(rejected.ids)
    report.trained_tokens += sum(trained)
    report.chosen_tokens += trained[0]
    report.rejected_tokens += trained[1]
    report.shared_prompts += _prompt(chosen.ids, chosen_labels) == _prompt(rejected.ids, rejected_labels)
    report.margins += "margin" in row
    report.shortened_rows += lost > 0
    report.dropped_messages += lost
    return {
        "chosen_input_ids": chosen.ids,
        "chosen_labels": chosen_labels,
        "rejected_input_ids": rejected.ids,
        "rejected_labels": rejected_labels,
        "margin": row.get("margin"),
        "length": max(len(chosen.ids), len(rejected.ids)),
        "sample": source_digest(source),
        "location": location,
    }


def fit_pair(renderer: Renderer, row: dict, location: str, rules: Rules, report: SplitReport) -> tuple[Pair | None, int]:
    """Both sides in at most `max_length` tokens, and how many messages they lost for that; (None, 0), with the reason in the report, if the
    pair has to go. Raises AlikeError where nothing that is trained tells them apart, TooLongError as the recipe wants."""
    pair = _render(renderer, row, location)
    _check_differ(pair, location)
    if empty := next((name for name, rendered in zip(SIDES, pair, strict=True) if not _trained(rendered)), None):
        report.drop(UNTRAINED, f"{location}: {empty}")
        return None, 0
    if _fits(pair, rules):
        return pair, 0
    if rules.too_long == "fail":
        lengths = " and ".join(f"{name} {len(rendered.ids)}" for name, rendered in zip(SIDES, pair, strict=True))
        raise TooLongError(
            f"{location}: {lengths} tokens; data.max_length is {rules.max_length}; raise it, or set data.too_long to drop_turns or drop_row"
        )
    reason = TOO_LONG
    for shorter in _shortened(row) if rules.too_long == "drop_turns" else ():
        pair = _render(renderer, shorter, location)
        if not _fits(pair, rules):
            continue
        if all(map(_trained, pair)) and _trained(pair[0]) != _trained(pair[1]):
            return pair, sum(len(row[name]) - len(shorter[name]) for name in SIDES)
        reason = ALIKE_ONCE_CUT  # and what is shorter still is alike as well
        break
    report.drop(reason, location)
    return None, 0


def build_labelled(source: SourceRow, renderer: Renderer, rules: Rules, report: SplitReport) -> dict | None:
    row = source.row
    whole = Rules(rules.max_length, "drop_row" if rules.too_long == "drop_turns" else rules.too_long, rules.on_error, rules.kind)
    sample = build_sample(SourceRow(source.location, side(row, "completion")), renderer, whole, report)
    if sample is None:
        return None
    report.good_rows += row["label"]
    report.bad_rows += not row["label"]
    prompt_length = _prompt_length(row, sample, renderer, source.location)
    return {**sample, "label": row["label"], "prompt_length": prompt_length, "sample": source_digest(source)}


def _prompt_length(row: dict, sample: dict, renderer: Renderer, location: str) -> int:
    """Not where the labels begin: some templates mark white space after the head of a turn as the assistant's, and others before a call
    only, so that prompt and answer of two rows would not fit together."""
    ids = sample["input_ids"]
    if isinstance(row["prompt"], str):
        return len(_prompt(ids, sample["labels"]))
    asked = renderer.render_prompt({**row, "messages": row["prompt"]}, location)
    return next((i for i, (token, other) in enumerate(zip(asked, ids, strict=False)) if token != other), min(len(asked), len(ids)))


def check_labels(split: str, counts: SplitReport) -> None:
    """Raises DataError where all answers of a split have one label."""
    if not counts.good_rows or not counts.bad_rows:
        have, lack = ("good", "bad") if counts.good_rows else ("bad", "good")
        raise DataError(
            f"data.{split}: all {counts.rows} answers are {have}; task kto learns from good and bad answers alike; add {lack} ones"
            + (", or hold out more" if split == "eval" else "")
        )


# ---- the two sides


def _render(renderer: Renderer, row: dict, location: str) -> Pair:
    chosen, rejected = (renderer.render(side(row, name), location) for name in SIDES)
    return chosen, rejected


def _check_differ(pair: Pair, location: str) -> None:
    chosen, rejected = pair
    if chosen.ids == rejected.ids:
        raise AlikeError(
            f"{location}: the two answers are the same; there is nothing to prefer; remove the row, or set data.on_error: skip"
        )
    if _trained(chosen) == _trained(rejected):
        raise AlikeError(
            f"{location}: the two answers differ only in what the policy does not say (tool results, or other people's words), and that is "
            "not trained; make the assistant's words differ, remove the row, or set data.on_error: skip"
        )


def _trained(rendered: Rendered) -> list[int]:
    return [label for label in labels_of(rendered) if label != -100]


def _fits(pair: Pair, rules: Rules) -> bool:
    return all(len(rendered.ids) <= rules.max_length for rendered in pair)


def _prompt(ids: list[int], labels: list[int]) -> list[int]:
    """The tokens before the first that is trained."""
    return ids[: next((i for i, label in enumerate(labels) if label != -100), len(ids))]


def _shortened(row: dict) -> Iterator[dict]:
    """The pair with as many of the first assistant turns on one side as on the other, the longest first."""
    if isinstance(row["prompt"], str):
        return
    ends = [[i + 1 for i, message in enumerate(row[name]) if message["role"] == "assistant"] for name in SIDES]
    for turns in range(min(map(len, ends)), 0, -1):
        yield {**row, **{name: row[name][: own[turns - 1]] for name, own in zip(SIDES, ends, strict=True)}}
