"""One canonical row becomes one sample: rendered, fitted into max_length and masked, or counted in the report with the reason why not.

prepare.py calls `build_sample` (or its like in prepare_pairs.py, for preference rows) for every row and writes what it returns.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from harness.data.report import SplitReport
from harness.data.templates import Rendered, Renderer
from harness.errors import DataError

if TYPE_CHECKING:
    from harness.data.rows import SourceRow

TOO_LONG = "longer than max_length"
UNTRAINED = "no trained token"
REFUSED = "refused by the chat template"


class TooLongError(DataError):
    """A row is over max_length and the recipe says that this must not be."""


@dataclass(frozen=True)
class Rules:
    max_length: int
    too_long: str
    on_error: str
    kind: str = "samples"


def fit(renderer: Renderer, row: dict, location: str, max_length: int, too_long: str) -> tuple[Rendered | None, int]:
    """The row in at most `max_length` tokens, and how many messages it lost for that; (None, 0) if it has to go.

    Turns are cut off the end and the rest is rendered again, as a template may write the last turn differently. What is left ends with
    an assistant turn, and has one that is trained.
    """
    rendered = renderer.render(row, location)
    if len(rendered.ids) <= max_length:
        return rendered, 0
    if too_long == "fail":
        raise TooLongError(
            f"{location}: {len(rendered.ids)} tokens; data.max_length is {max_length}; "
            "raise it, or set data.too_long to drop_turns or drop_row"
        )
    if too_long == "drop_row" or "messages" not in row:
        return None, 0
    ends = [i + 1 for i, message in enumerate(row["messages"]) if message["role"] == "assistant"]
    known = len(rendered.turn_ends) == len(ends)  # how long the row is up to each turn; a good first guess, not a proof
    for kept in range(len(ends), 0, -1):
        if ends[kept - 1] <= row.get("train_from", 0):
            break
        if ends[kept - 1] == len(row["messages"]) or (known and rendered.turn_ends[kept - 1] > max_length):
            continue
        shorter = renderer.render({**row, "messages": row["messages"][: ends[kept - 1]]}, location)
        if len(shorter.ids) <= max_length:
            return shorter, len(row["messages"]) - ends[kept - 1]
    return None, 0


def build_sample(source: SourceRow, renderer: Renderer, rules: Rules, report: SplitReport) -> dict | None:
    report.rows_in += 1
    try:
        rendered, lost = fit(renderer, source.row, source.location, rules.max_length, rules.too_long)
    except TooLongError:
        raise
    except DataError as error:
        if rules.on_error == "fail":
            raise
        report.drop(REFUSED, str(error))
        return None
    if rendered is None:
        report.drop(TOO_LONG, source.location)
        return None
    labels = labels_of(rendered)
    trained_tokens = len(labels) - labels.count(-100)
    if not trained_tokens:
        report.drop(UNTRAINED, source.location)
        return None
    if control := renderer.control_token_in(source.row):
        report.control_tokens.add(1, [f"{source.location}: {control}"])
    report.rows += 1
    report.tokens += len(labels)
    report.trained_tokens += trained_tokens
    report.shortened_rows += lost > 0
    report.dropped_messages += lost
    return {
        "input_ids": rendered.ids,
        "labels": labels,
        "length": len(labels),
        "sample": source_digest(source),
        "location": source.location,
    }


def labels_of(rendered: Rendered) -> list[int]:
    """The ids, -100 where nothing is trained."""
    labels = [token if trained else -100 for token, trained in zip(rendered.ids, rendered.mask, strict=True)]
    labels[:1] = [-100]  # nothing comes before the first token that could predict it
    return labels


def row_digest(row: dict) -> str:
    """Identity of a canonical row, 32 hex digits. The order of keys counts: templates write arguments in the order they have."""
    return digest_of(row)


def source_digest(source: SourceRow) -> str:
    """`row_digest` of its row, which need not be parsed for it."""
    return hashlib.sha256(b"[" + source.text + b"]").hexdigest()[:32]


def digest_of(*parts: object) -> str:
    text = json.dumps(parts, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]
