"""Canonical rows become a tokenised, masked and packed dataset: once, on a CPU, in a folder that is named by its content.

    prepare(rows, tokenizer, ...)   tokenise what is not there yet -> Prepared
    load_prepared(folder)           what every rank does: map it into memory, tokenise nothing

The name of the folder (its format is store.py's) is a digest of everything that could change a token or its place: the rows in their
order, the tokenizer, the template, max_length, too_long, train_on and on_error; packs are made from the samples' folder, and add
capacity and seed. Where a row came from is no part of it: the same rows in another file are a hit.

Promises. No row is changed in silence: the report counts what was dropped, why and where first. A row over max_length loses whole
trailing turns, so that it ends with an assistant turn, or goes; a call is never cut. A row without a trained token never gets through.
"""

from __future__ import annotations

import hashlib
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
from harness.data.report import SPLITS, Dropped, PrepareReport, SplitReport
from harness.data.store import SAMPLE_FEATURES, Prepared, building, is_complete, load_prepared, save_manifest
from harness.data.templates import Rendered, Renderer, TrainingTemplate, check_tokenizer
from harness.errors import DataError, HarnessError

if TYPE_CHECKING:
    from harness.data.sources import SourceRow

__all__ = ["Prepared", "fit", "load_prepared", "prepare", "row_digest"]

TOKENISATION = 1  # raise it when the same row would give other tokens or labels than before
ROWS_PER_BATCH = 500
ROWS_PER_PROCESS = 2000  # below that, starting another process costs more than it saves
MOST_PROCESSES = 8  # unless more are asked for

TOO_LONG = "longer than max_length"
UNTRAINED = "no trained token"
REFUSED = "refused by the chat template"


class TooLongError(DataError):
    """A row is over max_length and the recipe says that this must not be."""


@dataclass(frozen=True)
class Shard:
    """What one process tokenises."""

    split: str
    path: Path
    rows: Sequence[SourceRow]


@dataclass(frozen=True)
class Rules:
    max_length: int
    too_long: str
    on_error: str


def prepare(
    train: Sequence[SourceRow],
    tokenizer: PreTrainedTokenizerBase,
    *,
    cache_dir: str | Path,
    max_length: int,
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
    max_length: tokens of the longest row, and of a pack. packing: rows of up to max_length tokens, several samples in each.
    num_proc: processes that tokenise; by default as many as there are cores and work for them, at most 8.
    skipped: rows that the sources left out; only passed on into the report.
    """
    check_tokenizer(tokenizer, conversations=False)
    renderer = Renderer(tokenizer, training_template, train_on)
    rules = Rules(max_length, too_long, on_error)
    splits = {"train": train} | ({"eval": eval} if eval else {})
    folder = Path(cache_dir) / _digest(splits, renderer, rules)
    if not is_complete(folder):
        if train_on == "assistant" and any("messages" in source.row for source in train):
            # Says where turns end with another token than the one at which generation stops.
            check_tokenizer(tokenizer, training_template=training_template)
        _tokenise(folder, splits, renderer, rules, num_proc)
    if packing:
        samples, folder = folder, folder.with_name(_hash(folder.name, "packs", max_length, seed))
        if not is_complete(folder):
            _pack(folder, load_prepared(samples), max_length, seed)
    return load_prepared(folder).with_skipped(skipped or Dropped())


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


# ---- names ------------------------------------------------------------------------------------------------------------------------


def row_digest(row: dict) -> str:
    """Identity of a canonical row, 32 hex digits. The order of keys counts: templates write arguments in the order they have."""
    return _hash(row)


def _hash(*parts: object) -> str:
    text = json.dumps(parts, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def _digest(splits: dict[str, Sequence[SourceRow]], renderer: Renderer, rules: Rules) -> str:
    rows = {name: _hash([row_digest(source.row) for source in rows]) for name, rows in splits.items()}
    settings = [rules.max_length, rules.too_long, rules.on_error, renderer.train_on]
    return _hash(TOKENISATION, rows, tokenizer_digest(renderer.tokenizer), renderer.training_template, settings)


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Everything of a tokenizer that decides which ids a row gets: tokenizer.json, special tokens, chat template."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    for state in ("padding", "truncation"):  # left behind by whoever called it last
        backend.pop(state, None)
    return _hash(backend, tokenizer.special_tokens_map, tokenizer.chat_template)


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
            getattr(report, split).length_percentiles = _percentiles(_lengths([Dataset.from_file(str(path)) for path in files[split]]))
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
    report, schema = SplitReport(), SAMPLE_FEATURES.arrow_schema
    with pa.OSFile(str(shard.path), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        for first in range(0, len(shard.rows), ROWS_PER_BATCH):
            batch = shard.rows[first : first + ROWS_PER_BATCH]
            samples = [sample for source in batch if (sample := _sample(source, renderer, rules, report))]
            writer.write_batch(pa.RecordBatch.from_pylist(samples, schema=schema))
            advance(len(batch))
    return report


def _sample(source: SourceRow, renderer: Renderer, rules: Rules, report: SplitReport) -> dict | None:
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
    labels = [token if trained else -100 for token, trained in zip(rendered.ids, rendered.mask, strict=True)]
    labels[:1] = [-100]  # nothing comes before the first token that could predict it
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
        "sample": row_digest(source.row),
        "location": source.location,
    }


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


def _percentiles(lengths: list[int]) -> dict[str, int]:
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
