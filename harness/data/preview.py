"""What training will see: a few rows decoded, with the trained tokens marked."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import groupby

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from harness.data.report import PrepareReport, render_report

TRAINED, UNTRAINED, HEADING, RESET = "\x1b[1;32m", "\x1b[2m", "\x1b[1m", "\x1b[0m"


def render_preview(
    tokenizer: PreTrainedTokenizerBase, dataset: Dataset, rows: int = 3, color: bool = True, report: PrepareReport | None = None
) -> str:
    """The first `rows` samples of a prepared dataset (packed or not) as text, then the counts.

    Trained tokens are green and the rest is dim; without color the trained ones stand in ⟦ ⟧. Special tokens are written out, line
    ends show as ↵, other control characters as escapes, so that nothing in the data can act on the terminal.
    """
    parts = []
    for number, (title, input_ids, labels) in enumerate(_samples(dataset), 1):
        if number > rows:
            break
        trained = len(labels) - labels.count(-100)
        heading = f"── row {number}: {title}, {len(input_ids)} tokens, {trained} trained"
        parts.append(f"{HEADING}{heading}{RESET}" if color else heading)
        parts.append(_render_sample(tokenizer, input_ids, labels, color) + "\n")
    if report is not None:
        parts.append(render_report(report))
    return "\n".join(parts)


def _samples(dataset: Dataset) -> Iterator[tuple[str, list[int], list[int]]]:
    """(title, input_ids, labels) of every sample; the samples of a pack one by one."""
    for number, row in enumerate(dataset):
        if "seq_lengths" not in row:
            yield row["location"], row["input_ids"], row["labels"]
            continue
        start = 0
        for n, (length, sample) in enumerate(zip(row["seq_lengths"], row["samples"], strict=True), 1):
            title = f"pack {number + 1}, sample {n} of {len(row['seq_lengths'])} ({sample[:8]})"
            yield title, row["input_ids"][start : start + length], row["labels"][start : start + length]
            start += length


def _render_sample(tokenizer: PreTrainedTokenizerBase, input_ids: list[int], labels: list[int], color: bool) -> str:
    pieces, end = [], 0
    before = ""
    for trained, group in groupby(labels, key=lambda label: label != -100):
        end += len(list(group))
        # The difference of two decoded prefixes: some decoders strip the space that a piece on its own begins with.
        text = tokenizer.decode(input_ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        piece, before = _visible(text[len(before) :]), text
        if color:
            pieces.append(f"{TRAINED if trained else UNTRAINED}{piece}{RESET}")
        else:
            pieces.append(f"⟦{piece}⟧" if trained else piece)
    return "".join(pieces)


def _visible(text: str) -> str:
    text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda match: repr(match.group())[1:-1], text)
    return text.replace("\n", "↵\n")
