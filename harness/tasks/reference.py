"""What a policy is compared with: the model that the run begins from. In one of three ways.

    without its adapter    the policy itself with the adapter off, or with the one that it began as: no second model, one more forward pass
    cached                 log-probabilities that were computed once, before the policy is loaded, and lie on the disk: no second model, no
                           pass. A row costs four bytes for each trained token
    resident               a second model beside the policy: whole on every rank, or ZeRO-3's shares

A cache is a folder below $HARNESS_CACHE/references, named by all that decides a value: the weights, the type in which they compute, the
prepared rows. It is there whole or not at all:

    <digest>/reference.arrow    a row for each row of the data, in its order: lists of float32, one for each trained token of each answer
    <digest>.<rows>.parts/      what ranks have done of it so far, in batches of so many rows: a pass that is killed goes on, on any number
                                of ranks

Promise: what is read is what the model says of these tokens, whoever computed it: batches are a function of the rows and of their size, and
parts of them are dealt out to whichever ranks there are. All machines must see the folder; a run in which one does not is refused.
"""

import contextlib
import gc
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute
import torch
from accelerate.utils import patch_environment
from datasets import Dataset, concatenate_datasets
from torch import Tensor

from harness import distributed
from harness.data.prepare import tokenizer_digest
from harness.data.store import building
from harness.embedded import resolve
from harness.errors import DataError
from harness.model.adapters import reference_of
from harness.recipe import Recipe
from harness.resources import cache_root
from harness.tasks.answer_batches import Answer, model_inputs, sum_by_answer, trained_owners
from harness.tasks.job import Stage, say
from harness.tasks.lessons import gold_log_probs
from harness.teacher.resident import ResidentTeacher, load_frozen, weights_digest
from harness.teacher.targets import UNTRAINED

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FORMAT = 1
BATCHES_PER_PART = 32
ROWS_AT_ONCE = 1000
FILE = "reference.arrow"
SHARED = "let data.cache_dir (or HARNESS_CACHE) be a folder that all machines share, or ask for another kind of reference"


@dataclass(frozen=True)
class Reference:
    """How the policy's reference is asked in training."""

    name: str
    model: ResidentTeacher | None = None
    """A second model, where there is one."""
    instead_of: "Callable[[PreTrainedModel], contextlib.AbstractContextManager] | None" = None
    """Inside of it the policy's forward is the reference's."""
    copied: bool = False
    """It is an adapter that the policy carries for it, a copy of its own as it begins."""
    tables: dict[str, Dataset] = field(default_factory=dict)
    """split -> what was computed before, row by row."""
    digest: str | None = None

    def log_probs(self, inputs: dict) -> Tensor:
        """[N], of each trained token of a batch of answers, by the resident model."""
        return ask(self.model, inputs)

    def add_to(self, train: Dataset, held_out: Dataset | None) -> tuple[Dataset, Dataset | None]:
        """The rows with what was computed of them before."""
        return tuple(
            concatenate_datasets([rows, self.tables[split]], axis=1) if split in self.tables else rows
            for split, rows in (("train", train), ("eval", held_out))
        )


def ask(model: ResidentTeacher, inputs: dict) -> Tensor:
    """[N], the log-probability of each trained token of a batch of answers."""
    gold = inputs["labels"][:, 1:]
    trained = gold != UNTRAINED
    given = {key: value for key, value in model_inputs(inputs).items() if key not in ("input_ids", "labels")}
    return model.ask(
        inputs["input_ids"], lambda hidden, head: gold_log_probs(hidden[:, :-1][trained.to(hidden.device)], head, gold[trained]), **given
    )


# ---- from the recipe


def reference_recipe(stage: Stage) -> Recipe:
    """The recipe with what the policy begins from as its model, as the policy is loaded."""
    recipe, settled = stage.recipe, stage.settled
    bare = {"lora": None, "adapter": None, "adapter_mode": "continue", "init": None}
    update = bare | {"name_or_path": stage.source, "dtype": settled.dtype, "attn_implementation": settled.attention}
    model = recipe.model.model_copy(update=update)
    return recipe.model_copy(update={"model": model})


def choose_reference(
    stage: Stage, asked: str, columns: dict[str, str | None], answers_of: Callable[[dict], list[Answer]], lay_out
) -> Reference:
    """The recipe's reference, on every rank, before the policy is loaded; says what it costs.

    columns: name of a cached column -> of the labels that it goes with (None: they are in no column), in the order of answers_of(row).
    lay_out: (model) -> collator of answers. Raises ModelError when it cannot be loaded, DataError when a cache cannot be written.
    """
    recipe = stage.recipe
    if recipe.model.trains_adapter and asked == "auto":
        begins = recipe.model.adapter and recipe.model.adapter_mode
        how = {
            "continue": "the adapter as it is now, a frozen copy beside the one that is trained",
            "stack": "the earlier adapter alone, without the one above it",
        }.get(begins, "the policy with its adapter off")
        _say(f"reference: {how}; no second model, one more forward pass in every step")
        return Reference(f"{recipe.task}.reference = auto", instead_of=reference_of, copied=begins == "continue")
    if asked == "resident":
        model = load_reference(stage)
        shared = "a share of it" if stage.job.backend.zero_stage == 3 else "a whole one"
        _say(f"reference: resident, {shared} on every rank ({_held(model)}), one more forward pass in every step")
        return Reference(f"{recipe.task}.reference = resident", model=model, digest=model.digest)
    return cached_reference(stage, columns, answers_of, lay_out)


def autocast_of(stage: Stage) -> torch.dtype | None:
    """The policy's: with other products than its own a reference would differ from it before the first step."""
    settled = stage.settled
    return getattr(torch, settled.computes) if settled.computes != settled.dtype else None


def load_reference(stage: Stage) -> ResidentTeacher:
    backend = stage.job.backend
    # Under FSDP transformers reads weights on one rank alone, and leaves the others to whoever shards the model; this one stays whole.
    with patch_environment(FSDP_CPU_RAM_EFFICIENT_LOADING="false"):
        return load_frozen(reference_recipe(stage), None, backend if backend.zero_stage == 3 else None, autocast_of(stage))


def _held(model: ResidentTeacher) -> str:
    held = sum(
        part.numel() * part.element_size()
        for parameter in model.model.parameters()
        for part in [getattr(parameter, "ds_tensor", parameter)]
    )
    return f"{held / 2**30:.2f} GiB"


# ---- the cache


def cached_reference(stage: Stage, columns: dict[str, str | None], answers_of: Callable[[dict], list[Answer]], lay_out) -> Reference:
    """What lies in the cache, computed first where it is not there."""
    stage.job.report.enter("computing the reference")
    splits = {name: rows for name, rows in (("train", stage.train_rows), ("eval", stage.eval_rows)) if rows is not None}
    root = cache_root(stage.recipe.data.cache_dir) / "references"
    weights = distributed.on_main(lambda: _weights(stage))
    folders = {name: root / _digest(stage, weights, name, rows, columns) for name, rows in splits.items()}
    wanted = distributed.on_main(lambda: [name for name, folder in folders.items() if not (folder / FILE).is_file()])
    if wanted:
        model = load_reference(stage)
        for name in wanted:
            rows = splits[name]
            say_what = f"reference: computes log-probabilities of {len(rows):,} rows once ({_held(model)} a rank, freed afterwards)"
            _say(f"{say_what} into {folders[name]}")
            began = time.monotonic()
            _compute(stage, model, rows, folders[name], columns, answers_of, lay_out(model.model))
            _say(f"reference: {len(rows):,} rows in {time.monotonic() - began:.1f} s")
        _let_go(model)
    else:
        _say(f"reference: read from {', '.join(map(str, folders.values()))}; no second model, no pass in training")
    _check_all_see(folders.values())
    tables = {name: Dataset.from_file(str(folder / FILE)) for name, folder in folders.items()}
    return Reference(f"the cached reference {folders['train']}", tables=tables, digest=weights)


def _weights(stage: Stage) -> str:
    """Which they are: by their blocks, or of a model of the hub by its commit, for its files may not be here before it is loaded."""
    source = Path(resolve(stage.source))
    if source.is_dir():
        return weights_digest(source)
    from transformers.utils import cached_file

    return f"{stage.source}@{Path(cached_file(stage.source, 'config.json', revision=stage.recipe.model.revision)).parent.name}"


def _digest(stage: Stage, weights: str, split: str, rows: Dataset, columns: dict[str, str]) -> str:
    asked = reference_recipe(stage).model
    quantized = asked.quantization and asked.quantization.model_dump()
    parts = [
        FORMAT,
        weights,
        asked.dtype,
        str(autocast_of(stage)),
        quantized,
        stage.prepared.digest,
        tokenizer_digest(stage.tokenizer),
        sorted(columns),
        split,
    ]
    # A smoke test has some of the rows.
    text = repr([*parts, len(rows), hashlib.sha256("".join(rows["sample"]).encode()).hexdigest()])
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _compute(stage: Stage, model: ResidentTeacher, rows: Dataset, folder: Path, columns: dict[str, str], answers_of, collate) -> None:
    """Every rank does parts of the batches; rank 0 puts them together."""
    size = stage.recipe.train.per_device_eval_batch_size or stage.recipe.train.per_device_train_batch_size
    lengths = list(rows["length"])
    order = sorted(range(len(rows)), key=lambda row: (-lengths[row], row))
    batches = [order[at : at + size] for at in range(0, len(order), size)]
    parts = [batches[at : at + BATCHES_PER_PART] for at in range(0, len(batches), BATCHES_PER_PART)]
    scratch = folder.with_name(f"{folder.name}.{size}.parts")
    missing = distributed.on_main(lambda: _missing(scratch, len(parts)))
    rank, world = distributed.rank(), distributed.world_size()
    for first in range(0, len(missing), world):
        mine = missing[first + rank] if first + rank < len(missing) else None
        # Under ZeRO-3 all ranks pass through the model as often: who has no part of its own does the first one's once more.
        most = max(len(parts[part]) for part in missing[first : first + world])
        done = [
            _batch(stage, model, rows, batch, answers_of, collate)
            for batch in _as_many(parts[missing[first] if mine is None else mine], most)
        ]
        if mine is not None:
            _write_part(scratch, mine, parts[mine], done[: len(parts[mine])])
        distributed.barrier()
    distributed.on_main(lambda: _assemble(scratch, folder, rows, columns, len(parts)))


def _as_many(batches: list[list[int]], count: int) -> list[list[int]]:
    return (batches * -(-count // len(batches)))[:count]


def _batch(stage: Stage, model: ResidentTeacher, rows: Dataset, batch: list[int], answers_of, collate) -> tuple[np.ndarray, np.ndarray]:
    """(tokens of each answer, log-probabilities one after the other) of some rows."""
    stage.job.report.beat()
    answers = [answer for row in rows.select(batch).to_list() for answer in answers_of(row)]
    inputs = {key: value.to(model.device) if isinstance(value, Tensor) else value for key, value in collate(answers).items()}
    owners = trained_owners(inputs)
    counts = sum_by_answer(torch.ones_like(owners), owners, len(answers))
    return counts.cpu().numpy().astype(np.int64), ask(model, inputs).float().cpu().numpy()


def _missing(scratch: Path, parts: int) -> list[int]:
    try:
        scratch.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{scratch}: the reference's cache cannot be made there: {error.strerror}; set HARNESS_CACHE") from error
    # By the folder's list: of a name that was asked for and not there, a network disk goes on for a while to say that it is not.
    there = set(os.listdir(scratch))
    return [part for part in range(parts) if f"{part:06d}.npz" not in there]


def _write_part(scratch: Path, part: int, batches: list[list[int]], done: list[tuple[np.ndarray, np.ndarray]]) -> None:
    counts, values = zip(*done, strict=True)
    # Another run that does the same work may have finished and removed it.
    scratch.mkdir(parents=True, exist_ok=True)
    path = scratch / f"{part:06d}.npz"
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    with open(temporary, "wb") as stream:
        np.savez(
            stream,
            rows=np.concatenate([np.array(batch) for batch in batches]),
            counts=np.concatenate(counts),
            values=np.concatenate(values),
        )
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)


def _assemble(scratch: Path, folder: Path, rows: Dataset, columns: dict[str, str], parts: int) -> None:
    """One file in the order of the rows, which replaces the parts; unless another run that does the same work was faster."""
    if (folder / FILE).is_file():
        shutil.rmtree(scratch, ignore_errors=True)
        return
    answers = len(columns)
    counts, found = np.zeros((len(rows), answers), np.int64), [None] * len(rows)
    try:
        for part in range(parts):
            with np.load(scratch / f"{part:06d}.npz") as stored:
                of_part = stored["counts"].reshape(-1, answers)
                pieces = np.split(stored["values"], of_part.cumsum()[:-1])
                for at, row in enumerate(stored["rows"]):
                    counts[row], found[row] = of_part[at], pieces[at * answers : (at + 1) * answers]
    except FileNotFoundError as error:
        if (folder / FILE).is_file():
            return
        raise DataError(f"{error.filename}: a rank has written it, and it is not here; {SHARED}") from error
    arrays = []
    for number, labels in enumerate(columns.values()):
        if labels and (trained_counts(rows, labels) != counts[:, number]).any():
            raise DataError(f"{scratch}: has another number of tokens than the rows; remove it and begin again")
        offsets = np.concatenate([[0], counts[:, number].cumsum()]).astype(np.int32)
        arrays.append(pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate([pieces[number] for pieces in found]))))
    table = pa.table(dict(zip(columns, arrays, strict=True)))
    with building(folder) as building_in, pa.OSFile(str(building_in / FILE), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    shutil.rmtree(scratch, ignore_errors=True)


def _check_all_see(folders: Iterable[Path]) -> None:
    if distributed.agree(not all((folder / FILE).is_file() for folder in folders)):
        raise DataError(f"{next(iter(folders)).parent}: the reference's cache is not to be seen on every machine; {SHARED}")


def trained_counts(rows: Dataset, column: str) -> np.ndarray:
    """[rows], how many of a column's labels are trained, without reading one into Python."""
    counts, arrow = [], rows.with_format("arrow")
    for start in range(0, len(rows), ROWS_AT_ONCE):
        labels = arrow[start : min(start + ROWS_AT_ONCE, len(rows))][column].combine_chunks()
        before = np.concatenate([[0], (labels.flatten().to_numpy() != UNTRAINED).cumsum()])
        lengths = pa.compute.list_value_length(labels).to_numpy().astype(np.int64)
        ends = lengths.cumsum()
        counts.append(before[ends] - before[ends - lengths])
    return np.concatenate(counts)


def _let_go(model: ResidentTeacher) -> None:
    """Its memory is the policy's now."""
    engine = model._asked
    if hasattr(engine, "destroy"):
        engine.destroy()
    for parameter in model.model.parameters():
        for part in (parameter, getattr(parameter, "ds_tensor", None)):
            if part is not None:
                part.data = torch.empty(0, dtype=part.dtype)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _say(text: str) -> None:
    if distributed.is_main():
        say(text)
