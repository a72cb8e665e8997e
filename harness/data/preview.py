"""What training will see: a few rows decoded, with the trained tokens marked."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import groupby, islice, takewhile

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from harness.data.report import PrepareReport, render_report

TRAINED, UNTRAINED, HEADING, RESET = "\x1b[1;32m", "\x1b[2m", "\x1b[1m", "\x1b[0m"


def render_preview(
    tokenizer: PreTrainedTokenizerBase, dataset: Dataset, rows: int = 3, color: bool = True, report: PrepareReport | None = None
) -> str:
    """The first `rows` samples of a prepared dataset (packed or not) as text, then the counts. Of pairs the prompt, then both answers.

    Trained tokens are green and the rest is dim; without color the trained ones stand in ⟦ ⟧. Special tokens are written out, line
    ends show as ↵, other control characters as escapes, so that nothing in the data can act on the terminal.
    """
    parts = []

    def show(heading: str, input_ids: list[int], labels: list[int], start: int = 0) -> None:
        parts.append(f"{HEADING}{heading}{RESET}" if color else heading)
        parts.append(_render_sample(tokenizer, input_ids, labels, color, start) + "\n")

    if "chosen_labels" in dataset.column_names:
        for number, row in enumerate(dataset.select(range(min(rows, len(dataset)))), 1):
            sides = [(row[f"{side}_input_ids"], row[f"{side}_labels"]) for side in ("chosen", "rejected")]
            shared = _shared_prompt(*sides)
            show(f"── row {number}: {row['location']}, {shared} tokens before the answers", *(part[:shared] for part in sides[0]))
            for side, (input_ids, labels) in zip(("chosen", "rejected"), sides, strict=True):
                show(f"── row {number}, {side}: {_tokens(input_ids[shared:], labels)}", input_ids, labels, shared)
    else:
        for number, (title, input_ids, labels) in enumerate(islice(_samples(dataset), rows), 1):
            show(f"── row {number}: {title}, {_tokens(input_ids, labels)}", input_ids, labels)
    if report is not None:
        parts.append(render_report(report))
    return "\n".join(parts)


def _tokens(input_ids: list[int], labels: list[int]) -> str:
    return f"{len(input_ids)} tokens, {len(labels) - labels.count(-100)} trained"


def _shared_prompt(*sides: tuple[list[int], list[int]]) -> int:
    """Tokens with which both sides begin, up to the first that is trained on either."""
    alike = zip(*(zip(input_ids, labels, strict=True) for input_ids, labels in sides), strict=False)
    return len(list(takewhile(lambda tokens: tokens[0] == tokens[1] and tokens[0][1] == -100, alike)))


def _samples(dataset: Dataset) -> Iterator[tuple[str, list[int], list[int]]]:
    """(title, input_ids, labels) of every sample; the samples of a pack one by one."""
    for number, row in enumerate(dataset):
        if "seq_lengths" not in row:
            kind = {True: ", good", False: ", bad"}[row["label"]] if "label" in row else ""
            yield row["location"] + kind, row["input_ids"], row["labels"]
            continue
        start = 0
        for n, (length, sample) in enumerate(zip(row["seq_lengths"], row["samples"], strict=True), 1):
            title = f"pack {number + 1}, sample {n} of {len(row['seq_lengths'])} ({sample[:8]})"
            yield title, row["input_ids"][start : start + length], row["labels"][start : start + length]
            start += length


def _render_sample(tokenizer: PreTrainedTokenizerBase, input_ids: list[int], labels: list[int], color: bool, start: int) -> str:
    """The sample from token `start` on."""
    pieces, end = [], start
    before = tokenizer.decode(input_ids[:start], skip_special_tokens=False, clean_up_tokenization_spaces=False)
    for trained, group in groupby(labels[start:], key=lambda label: label != -100):
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
