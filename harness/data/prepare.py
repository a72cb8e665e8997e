"""Canonical rows become a tokenised, masked and packed dataset: once, on a CPU, in a folder that is named by its content.

    prepare(rows, tokenizer, ...)   tokenise what is not there yet -> Prepared
    load_prepared(folder)           what every rank does: map it into memory, tokenise nothing

The name of the folder (its format is store.py's) is a digest of everything that could change a token or its place: the rows in their
order, the tokenizer, the template, max_length, too_long, train_on and on_error; packs are made from the samples' folder, and add
capacity and seed. Where a row came from is no part of it: the same rows in another file are a hit.

Promises. No row is changed in silence: the report counts what was dropped, why and where first. A row over max_length loses whole
trailing turns, so that it ends with an assistant turn, or goes; a call is never cut. A row without a trained token never gets through.
What holds for pairs and labelled answers besides stands in prepare_pairs.py.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from datasets import Dataset, concatenate_datasets
from transformers import PreTrainedTokenizerBase

from harness.data.packing import fill_rate, plan_packs, write_packs
from harness.data.prepare_pairs import build_labelled, build_pair, check_labels
from harness.data.report import SPLITS, Dropped, PrepareReport, SplitReport
from harness.data.samples import Rules, build_sample, digest_of, fit, row_digest
from harness.data.store import FEATURES, Prepared, building, is_complete, load_prepared, save_manifest
from harness.data.templates import Renderer, TrainingTemplate, check_tokenizer
from harness.errors import DataError, HarnessError

if TYPE_CHECKING:
    from harness.data.sources import SourceRow

__all__ = ["Prepared", "fit", "load_prepared", "prepare", "row_digest"]

TOKENISATION = 1  # raise it when the same row would give other tokens or labels than before
PAIRING = 1  # the same of pairs and labelled answers
ROWS_PER_BATCH = 500
ROWS_PER_PROCESS = 2000  # below that, starting another process costs more than it saves
MOST_PROCESSES = 8  # unless more are asked for
BUILDERS = {"samples": build_sample, "pairs": build_pair, "labelled": build_labelled}


@dataclass(frozen=True)
class Shard:
    """What one process tokenises."""

    split: str
    path: Path
    rows: Sequence[SourceRow]


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
    rows = {name: digest_of([row_digest(source.row) for source in rows]) for name, rows in splits.items()}
    settings = [rules.max_length, rules.too_long, rules.on_error, renderer.train_on]
    if rules.kind != "samples":
        settings += [rules.kind, PAIRING]
    return digest_of(TOKENISATION, rows, tokenizer_digest(renderer.tokenizer), renderer.training_template, settings)


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Everything of a tokenizer that decides which ids a row gets: tokenizer.json, special tokens, chat template."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    for state in ("padding", "truncation"):  # left behind by whoever called it last
        backend.pop(state, None)
    return digest_of(backend, tokenizer.special_tokens_map, tokenizer.chat_template)


# ---- tokenising -------------------------------------------------------------------------------------------------------------------


def _tokenise(folder: Path, splits: dict[str, Sequence[SourceRow]], renderer: Renderer, rules: Rules, num_proc: int | None) -> None:
    total = sum(map(len, splits.values()))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    processes = num_proc or min(cores, MOST_PROCESSES, 1 + total // ROWS_PER_PROCESS)
    with building(folder) as scratch:
        shards = [shard for split, rows in splits.items() for shard in _cut(split, rows, processes, scratch)]
        reports = _run_here(shards, renderer, rules) if processes == 1 else _run_processes(shards, renderer, rules, processes)
        report = PrepareReport(SplitReport(), SplitReport() if "eval" in splits else None, renderer.mask_source())
        for shard, part in zip(shards, reports, strict=True):
            getattr(report, shard.split).merge(part)
        files = {split: [shard.path for shard in shards if shard.split == split] for split in splits}
        for split in splits:
            _check_rows_left(split, getattr(report, split))
            if rules.kind == "labelled":
                check_labels(split, getattr(report, split))
            getattr(report, split).length_percentiles = percentiles(_lengths([Dataset.from_file(str(path)) for path in files[split]]))
        save_manifest(scratch, report, files)


def _cut(split: str, rows: Sequence[SourceRow], processes: int, scratch: Path) -> list[Shard]:
    """Equal runs of rows, in order; one shard at least, so that every split has a file."""
    size = max(1, -(-len(rows) // processes))
    firsts = range(0, max(1, len(rows)), size)
    return [Shard(split, scratch / f"{split}-{n:05d}.arrow", rows[first : first + size]) for n, first in enumerate(firsts)]


def _run_here(shards: list[Shard], renderer: Renderer, rules: Rules) -> list[SplitReport]:
    with _progress(sum(len(shard.rows) for shard in shards)) as advance:
        return [_tokenise_shard(shard, renderer, rules, advance) for shard in shards]


def _run_processes(shards: list[Shard], renderer: Renderer, rules: Rules, processes: int) -> list[SplitReport]:
    """Every shard in a process of its own that writes its own file, at most `processes` at a time; the first error stops all.

    No queue of work: a child whose parent was killed finishes its file and is gone. Forked where that is possible, so that rows and
    tokenizer are not copied; the children never touch torch.
    """
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    waiting, running, reports = list(enumerate(shards)), {}, {}
    with _progress(sum(len(shard.rows) for shard in shards)) as advance:
        try:
            while waiting or running:
                while waiting and len(running) < processes:
                    number, shard = waiting.pop(0)
                    receiver, sender = context.Pipe(duplex=False)
                    process = context.Process(target=_child, args=(sender, shard, renderer, rules), daemon=True)
                    process.start()
                    sender.close()
                    running[receiver] = (number, process)
                for receiver in wait(list(running)):
                    number, process = running[receiver]
                    done = _receive(receiver, process, shards[number], advance)
                    if done is not None:
                        reports[number] = done
                        process.join()
                        del running[receiver]
        finally:
            for _, process in running.values():
                process.terminate()
                process.join()
    return [reports[number] for number in range(len(shards))]


def _receive(receiver: Connection, process: multiprocessing.Process, shard: Shard, advance: Callable[[int], None]) -> SplitReport | None:
    """One message of a child: rows done, its report (returned), or what went wrong (raised)."""
    try:
        message = receiver.recv()
    except EOFError:
        process.join()
        raise HarnessError(
            f"{shard.path.name}: the process that tokenised it ended with code {process.exitcode}"
            + (" (killed; most often for memory: lower data.num_proc)" if process.exitcode == -9 else "")
        ) from None
    if isinstance(message, Exception):
        raise message
    if isinstance(message, int):
        return advance(message)
    return message


def _child(sender: Connection, shard: Shard, renderer: Renderer, rules: Rules) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        sender.send(_tokenise_shard(shard, renderer, rules, sender.send))
    except HarnessError as error:
        sender.send(error)
    except Exception:  # a bug: the parent shows where it happened
        sender.send(RuntimeError(traceback.format_exc()))


def _tokenise_shard(shard: Shard, renderer: Renderer, rules: Rules, advance: Callable[[int], None]) -> SplitReport:
    report, schema, build = SplitReport(), FEATURES[rules.kind].arrow_schema, BUILDERS[rules.kind]
    with pa.OSFile(str(shard.path), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        for first in range(0, len(shard.rows), ROWS_PER_BATCH):
            batch = shard.rows[first : first + ROWS_PER_BATCH]
            samples = [sample for source in batch if (sample := build(source, renderer, rules, report))]
            writer.write_batch(pa.RecordBatch.from_pylist(samples, schema=schema))
            advance(len(batch))
    return report


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
            lengths = _lengths([dataset])
            packs = plan_packs(lengths, capacity, seed)
            files[split] = [scratch / f"{split}-00000.arrow"]
            write_packs(dataset, packs, files[split][0])
            rate = fill_rate(lengths, packs, capacity)
            report = replace(report, **{split: replace(getattr(report, split), packs=len(packs), fill_rate=rate)})
        save_manifest(scratch, report, files)


def _lengths(datasets: list[Dataset]) -> list[int]:
    return concatenate_datasets(datasets).with_format("numpy")["length"][:].tolist()


def percentiles(lengths: list[int]) -> dict[str, int]:
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
