"""Canonical rows become a tokenised, masked and packed dataset: once, on a CPU, in a folder that is named by its content.

    prepare(rows, tokenizer, ...)   tokenise what is not there yet -> Prepared
    load_prepared(folder)           what every rank does: map it into memory, tokenise nothing

The name of the folder (its format is store.py's) is a digest of everything that could change a token or its place: the rows in their
order, the tokenizer, the template, max_length, too_long, train_on and on_error; packs are made from the samples' folder, and add
capacity and seed. Where a row came from is no part of it: the same rows in another file are a hit.

Promises. No row is changed in silence: the report counts what was dropped, why and where first. A row over max_length loses whole
trailing turns, so that it ends with an assistant turn, or goes; a call is never cut. A row without a trained token never gets through.
What is written does not depend on the number of processes, and memory does not grow with the rows but by some 150 bytes of each, most of
them while packs are planned. What holds for pairs and labelled answers besides stands in prepare_pairs.py.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from harness.data.packing import fill_rate, plan_packs, write_packs
from harness.data.prepare_pairs import build_labelled, build_pair, check_labels
from harness.data.report import SPLITS, Dropped, PrepareReport, SplitReport
from harness.data.rows import SourceRow
from harness.data.samples import Rules, build_sample, digest_of, fit, row_digest, source_digest
from harness.data.spans import MOST_PROCESSES, in_order, usable_cores
from harness.data.store import FEATURES, ArrowStream, Prepared, building, is_complete, load_prepared, save_manifest
from harness.data.templates import Renderer, TrainingTemplate, check_tokenizer
from harness.errors import DataError

__all__ = ["Prepared", "fit", "load_prepared", "prepare", "row_digest"]

TOKENISATION = 1  # raise it when the same row would give other tokens or labels than before
PAIRING = 1  # the same of pairs and labelled answers
ROWS_PER_BATCH = 500
ROWS_PER_PROCESS = 2000  # below that, starting another process costs more than it saves
BUILDERS = {"samples": build_sample, "pairs": build_pair, "labelled": build_labelled}


@dataclass(frozen=True)
class Batch:
    """What one process tokenises at a time."""

    split: str
    rows: Sequence[SourceRow]

    def __str__(self) -> str:
        return f"{self.rows[0].location} and the {len(self.rows) - 1} rows after it" if self.rows else self.split


def prepare(
    train: Sequence[SourceRow],
    tokenizer: PreTrainedTokenizerBase,
    *,
    cache_dir: str | Path,
    max_length: int,
    kind: str = "samples",
    eval: Sequence[SourceRow] = (),
    too_long: str = "drop_turns",
    train_on: str = "assistant",
    on_error: str = "fail",
    packing: bool = False,
    seed: int = 42,
    num_proc: int | None = None,
    training_template: TrainingTemplate = None,
    skipped: Dropped | None = None,
) -> Prepared:
    """Tokenise, or find that it was done before. Raises DataError for a row (with its location), ModelError for the tokenizer.

    train, eval: canonical rows (shared with sources.py) in the order in which training shall meet them.
    kind: of these rows: "samples" of supervised training, "pairs", or "labelled" answers (pairs.py), which are not packed.
    max_length: tokens of the longest row, and of a pack. packing: rows of up to max_length tokens, several samples in each.
    num_proc: processes that tokenise; by default as many as there are cores and work for them, at most 8.
    skipped: rows that the sources left out; only passed on into the report.
    """
    check_tokenizer(tokenizer, conversations=False)
    renderer = Renderer(tokenizer, training_template, train_on)
    rules = Rules(max_length, too_long, on_error, kind)
    splits = {"train": train} | ({"eval": eval} if eval else {})
    folder = Path(cache_dir) / _digest(splits, renderer, rules)
    if not is_complete(folder):
        if train_on == "assistant" and any(isinstance(source.row.get("messages", source.row.get("prompt")), list) for source in train):
            # Says where turns end with another token than the one at which generation stops.
            check_tokenizer(tokenizer, training_template=training_template)
        _tokenise(folder, splits, renderer, rules, num_proc)
    if packing:
        assert kind == "samples", f"{kind} are not packed"
        samples, folder = folder, folder.with_name(digest_of(folder.name, "packs", max_length, seed))
        if not is_complete(folder):
            _pack(folder, load_prepared(samples), max_length, seed)
    return load_prepared(folder).with_skipped(skipped or Dropped())


# ---- names ------------------------------------------------------------------------------------------------------------------------


def _digest(splits: dict[str, Sequence[SourceRow]], renderer: Renderer, rules: Rules) -> str:
    rows = {name: digest_of_rows(source) for name, source in splits.items()}
    settings = [rules.max_length, rules.too_long, rules.on_error, renderer.train_on]
    if rules.kind != "samples":
        settings += [rules.kind, PAIRING]
    return digest_of(TOKENISATION, rows, tokenizer_digest(renderer.tokenizer), renderer.training_template, settings)


def digest_of_rows(rows: Iterable[SourceRow]) -> str:
    """`digest_of` the list of their digests, which is never made."""
    total = hashlib.sha256(b"[[")
    for number, source in enumerate(rows):
        total.update(f'{"," if number else ""}"{source_digest(source)}"'.encode())
    total.update(b"]]")
    return total.hexdigest()[:32]


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Everything of a tokenizer that decides which ids a row gets: tokenizer.json, special tokens, chat template."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    for state in ("padding", "truncation"):  # left behind by whoever called it last
        backend.pop(state, None)
    return digest_of(backend, tokenizer.special_tokens_map, tokenizer.chat_template)


# ---- tokenising -------------------------------------------------------------------------------------------------------------------


def _tokenise(folder: Path, splits: dict[str, Sequence[SourceRow]], renderer: Renderer, rules: Rules, num_proc: int | None) -> None:
    total = sum(map(len, splits.values()))
    processes = num_proc or min(usable_cores(), MOST_PROCESSES, 1 + total // ROWS_PER_PROCESS)
    with building(folder) as scratch, _progress(total) as advance:
        report = PrepareReport(SplitReport(), SplitReport() if "eval" in splits else None, renderer.mask_source())
        files = {split: [scratch / f"{split}-00000.arrow"] for split in splits}
        work = partial(tokenise_batch, renderer=renderer, rules=rules)
        done = in_order(work, _batches(splits), processes, "tokenised")
        for split, rows in splits.items():
            counts, batches = getattr(report, split), -(-len(rows) // ROWS_PER_BATCH)
            with ArrowStream(files[split][0], FEATURES[rules.kind].arrow_schema) as stream:
                for part, batch in islice(done, batches):
                    counts.merge(part)
                    stream.append(batch)
                    advance(part.rows_in)
            _check_rows_left(split, counts)
            if rules.kind == "labelled":
                check_labels(split, counts)
            counts.length_percentiles = percentiles(_lengths(Dataset.from_file(str(files[split][0]))))
        save_manifest(scratch, report, files)


def _batches(splits: dict[str, Sequence[SourceRow]]) -> Iterator[Batch]:
    for split, rows in splits.items():
        for first in range(0, len(rows), ROWS_PER_BATCH):
            yield Batch(split, rows[first : first + ROWS_PER_BATCH])


def tokenise_batch(batch: Batch, *, renderer: Renderer, rules: Rules) -> tuple[SplitReport, pa.Buffer]:
    """What became of the rows, and what is left as a message of an Arrow stream."""
    report, schema, build = SplitReport(), FEATURES[rules.kind].arrow_schema, BUILDERS[rules.kind]
    samples = [sample for source in batch.rows if (sample := build(source, renderer, rules, report))]
    return report, pa.RecordBatch.from_pylist(samples, schema=schema).serialize()


def _check_rows_left(split: str, report: SplitReport) -> None:
    if not report.rows:
        reasons = "; ".join(f"{reason}: {dropped.rows} (first: {dropped.locations[0]})" for reason, dropped in report.dropped.items())
        raise DataError(f"data.{split}: none of {report.rows_in} rows is left to train on ({reasons or 'there were none'})")


# ---- packing ----------------------------------------------------------------------------------------------------------------------


def _pack(folder: Path, samples: Prepared, capacity: int, seed: int) -> None:
    report, files = samples.report, {}
    with building(folder) as scratch:
        for split in SPLITS:
            dataset = getattr(samples, split)
            if dataset is None:
                continue
            lengths = _lengths(dataset)
            packs = plan_packs(lengths, capacity, seed)
            files[split] = [scratch / f"{split}-00000.arrow"]
            write_packs(dataset, packs, files[split][0])
            rate = fill_rate(lengths, packs, capacity)
            report = replace(report, **{split: replace(getattr(report, split), packs=len(packs), fill_rate=rate)})
        save_manifest(scratch, report, files)


def _lengths(dataset: Dataset) -> np.ndarray:
    return np.concatenate([np.zeros(0, np.int32), *(chunk.to_numpy() for chunk in dataset.data.column("length").chunks)])


def percentiles(lengths: Sequence[int] | np.ndarray) -> dict[str, int]:
    """Nearest rank: lengths that rows really have."""
    at = {"min": 0, "p50": 50, "p90": 90, "p99": 99, "max": 100}
    values = np.percentile(lengths, list(at.values()), method="inverted_cdf")
    return {name: int(value) for name, value in zip(at, values, strict=True)}


@contextmanager
def _progress(rows: int):
    """A function to call with the rows that were done; on a terminal it moves a bar."""
    if not sys.stderr.isatty():
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = [TextColumn("tokenising"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
    # Without auto_refresh there is no thread, and processes may be forked while the bar stands.
    with Progress(*columns, console=Console(stderr=True), auto_refresh=False) as progress:
        task = progress.add_task("tokenising", total=rows)

        def advance(done: int) -> None:
            progress.advance(task, done)
            progress.refresh()

        yield advance
