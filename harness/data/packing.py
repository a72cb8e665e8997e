"""Packing: several samples in one row of at most `capacity` tokens, so that no step is spent on padding.

A pack is laid out as TRL's padding-free collator expects it: `seq_lengths` names the length of each sample, from which it builds
position ids that begin again at 0, and with them attention stays inside a sample. The label of every sample's first token is -100:
nothing before it may predict it. Samples are never cut and never dropped; the same lengths, capacity and seed give the same packs.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, List, Value

from harness.errors import DataError

PACKED_FEATURES = Features(
    {
        "input_ids": List(Value("int32")),
        "labels": List(Value("int32")),
        "seq_lengths": List(Value("int32")),  # tokens of each sample in the pack
        "samples": List(Value("string")),  # row_digest of each sample in the pack
    }
)
PACKS_PER_BATCH = 256  # what stands in memory at once while packs are written


def plan_packs(lengths: Sequence[int] | np.ndarray, capacity: int, seed: int = 42) -> list[list[int]]:
    """Which samples share a row: every index of `lengths` once, no pack over `capacity` tokens. Raises DataError if one cannot fit.

    Best fit decreasing: the longest sample first, each into the fullest pack that still has room. A seeded shuffle before the
    (stable) sort decides between samples of equal length, so that neighbours in a file do not become neighbours in a pack, and a
    second one afterwards mixes packs of few long samples with packs of many short ones. O(n log n) for n samples.
    """
    lengths = lengths.tolist() if isinstance(lengths, np.ndarray) else lengths
    order = list(range(len(lengths)))
    rng = random.Random(seed)
    rng.shuffle(order)
    order.sort(key=lambda i: -lengths[i])
    packs: list[list[int]] = []
    open_by_space: dict[int, list[int]] = {}
    spaces = 0  # bit s is set while some pack has room for exactly s tokens: the tightest fit is the lowest bit at or above a length
    for sample in order:
        length = lengths[sample]
        if not 0 < length <= capacity:
            raise DataError(f"sample {sample} has {length} tokens; a pack takes 1 to {capacity} (data.max_length)")
        fitting = spaces >> length
        if fitting:
            space = length + (fitting & -fitting).bit_length() - 1
            pack = open_by_space[space].pop()
            if not open_by_space[space]:
                spaces ^= 1 << space
        else:
            space, pack = capacity, len(packs)
            packs.append([])
        packs[pack].append(sample)
        left = space - length
        if left:
            open_by_space.setdefault(left, []).append(pack)
            spaces |= 1 << left
    rng.shuffle(packs)
    return packs


def fill_rate(lengths: Sequence[int] | np.ndarray, packs: Sequence[Sequence[int]], capacity: int) -> float:
    """Share of the packs' tokens that are not empty, 0 to 1."""
    return int(np.sum(lengths)) / (len(packs) * capacity) if packs else 0.0


def pack(dataset: Dataset, capacity: int, seed: int = 42) -> Dataset:
    """Packs of `dataset` (columns input_ids, labels, length, sample) in memory; `write_packs` is for those that are too many."""
    packs = plan_packs(dataset.with_format("numpy")["length"][:].tolist(), capacity, seed)
    batches = list(pack_batches(dataset, packs))
    return Dataset(pa.Table.from_batches(batches, schema=PACKED_FEATURES.arrow_schema))


def write_packs(dataset: Dataset, packs: Sequence[Sequence[int]], path: Path) -> None:
    """Write packs as an Arrow stream, a few at a time."""
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, PACKED_FEATURES.arrow_schema) as writer:
        for batch in pack_batches(dataset, packs):
            writer.write_batch(batch)


def pack_batches(dataset: Dataset, packs: Sequence[Sequence[int]]) -> Iterator[pa.RecordBatch]:
    arrow = dataset.with_format("arrow")
    for first in range(0, len(packs), PACKS_PER_BATCH):
        group = packs[first : first + PACKS_PER_BATCH]
        rows = arrow[[sample for samples in group for sample in samples]].combine_chunks()
        lengths = rows["length"].to_numpy().astype(np.int32)
        input_ids = rows["input_ids"].combine_chunks().flatten().to_numpy()
        labels = rows["labels"].combine_chunks().flatten().to_numpy().copy()
        starts = np.concatenate([[0], np.cumsum(lengths)])
        labels[starts[:-1]] = -100
        sample_offsets = np.cumsum([0, *map(len, group)], dtype=np.int32)
        token_offsets = pa.array(starts[sample_offsets].astype(np.int32))
        columns = [
            pa.ListArray.from_arrays(token_offsets, pa.array(input_ids)),
            pa.ListArray.from_arrays(token_offsets, pa.array(labels)),
            pa.ListArray.from_arrays(pa.array(sample_offsets), pa.array(lengths)),
            pa.ListArray.from_arrays(pa.array(sample_offsets), rows["sample"].combine_chunks()),
        ]
        yield pa.RecordBatch.from_arrays(columns, schema=PACKED_FEATURES.arrow_schema)
