"""From a teacher's hidden states to what is kept of its distributions, some tokens at a time: no tensor of tokens x vocabulary exists.

For each token, on the device that holds the head: the log-sum-exp in float32, the most probable entries, the mass and the entropy, the gold
token's log-probability, and draws from what is not kept.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import xxhash
from torch import Tensor

from harness.losses import Head
from harness.losses.chunks import TILE_BYTES, Model
from harness.teacher.format import Settings, Targets

GOLDEN = np.uint64(0x9E3779B97F4A7C15)


class Kept(NamedTuple):
    """Tensors on the device, as format.Targets has them; K is the same for all tokens."""

    counts: Tensor  # [N]
    ids: Tensor  # [N, K]
    logprobs: Tensor  # [N, K]
    log_tail: Tensor  # [N]
    entropy: Tensor  # [N]
    gold: Tensor  # [N]
    draws: Tensor  # [N, m]

    def to_targets(self) -> Targets:
        arrays = [tensor.cpu().numpy() for tensor in self]
        types = ("u1", np.int32, np.float32, np.float32, np.float32, np.float32, np.int32)
        return Targets(*(array.astype(kind, copy=False) for array, kind in zip(arrays, types, strict=True)))


def part_of(targets: Targets, rows: slice) -> Targets:
    return Targets(**{name: column[rows] for name, column in vars(targets).items()})


@torch.no_grad()
def keep(
    hidden: Tensor,
    head: Head,
    gold: Tensor,
    uniforms: Tensor,
    settings: Settings,
    vocabulary: int,
    tile_bytes: int = TILE_BYTES,
) -> Kept:
    """hidden [N, H], from which each gold [N] token was to be predicted; uniforms [N, m] in (0, 1), float64, choose the draws.

    vocabulary: rows of the head that are tokens; the rest is cut off before anything is summed.
    """
    model = Model(hidden, head, None, vocabulary)
    # Logits and their exponentials; with draws also a running sum in float64.
    bytes_per_logit = model.sum_dtype.itemsize * 2 + (8 if settings.draws else 0)
    chunk = max(1, tile_bytes // (bytes_per_logit * model.vocabulary))
    tile = torch.empty(min(chunk, len(hidden)), model.vocabulary, dtype=model.sum_dtype, device=hidden.device)
    parts = []
    for first in range(0, max(len(hidden), 1), chunk):
        rows = slice(first, min(first + chunk, len(hidden)))
        logits = model.project(model.states(rows), tile[: rows.stop - rows.start])
        parts.append(_keep_chunk(logits, gold[rows], uniforms[rows], settings))
    return Kept(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


def _keep_chunk(logits: Tensor, gold: Tensor, uniforms: Tensor, settings: Settings) -> Kept:
    """Of logits [n, V], which are overwritten."""
    top, ids = _sort(*logits.topk(min(settings.cap, logits.shape[1]), dim=-1))
    highest = top[:, :1]
    z_gold = logits.gather(1, gold[:, None]) - highest
    masses = logits.sub_(highest).exp()
    total = masses.sum(-1, keepdim=True)
    log_total = total.log()
    entropy = log_total[:, 0] - logits.mul_(masses).sum(-1) / total[:, 0]
    logprobs = top - highest - log_total
    counts = count_kept(logprobs.exp(), settings)

    # What is not kept is summed by itself: as 1 minus the rest it would be mostly rounding. Unused slots name the first entry once more.
    is_kept = torch.arange(ids.shape[1], device=ids.device) < counts[:, None]
    masses.scatter_(1, torch.where(is_kept, ids, ids[:, :1]), 0)
    tail = masses.sum(-1, keepdim=True)
    return Kept(
        counts,
        ids.masked_fill(~is_kept, 0),
        logprobs.masked_fill(~is_kept, -torch.inf),
        (tail.log() - log_total)[:, 0],
        entropy,
        (z_gold - log_total)[:, 0],
        _draw(masses, uniforms) if settings.draws else ids[:, :0],
    )


def _sort(values: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The most probable first, and among equals the lowest id: topk promises no order among them, and the bytes shall be the same again."""
    by_id = ids.argsort(dim=-1)
    values, ids = values.gather(1, by_id), ids.gather(1, by_id)
    by_value = values.argsort(dim=-1, descending=True, stable=True)
    return values.gather(1, by_value), ids.gather(1, by_value)


def count_kept(p: Tensor, settings: Settings) -> Tensor:
    """How many of the sorted p [n, K] are kept: the fewest that hold the mass `settings.p`, between floor and cap."""
    most = p.shape[1]
    if settings.p >= 1:
        return torch.full_like(p[:, 0], most, dtype=torch.long)
    needed = (p.cumsum(-1) < settings.p).sum(-1) + 1
    return needed.clamp(min(settings.floor, most), most)


def _draw(masses: Tensor, uniforms: Tensor) -> Tensor:
    """Ids [n, m] in proportion to masses [n, V], by inverting their sums; meaningless where all are 0."""
    sums = masses.cumsum(-1, dtype=torch.float64)
    drawn = torch.searchsorted(sums, uniforms * sums[:, -1:], right=True)
    return drawn.clamp_(max=masses.shape[1] - 1)


@torch.no_grad()
def all_logits(hidden: Tensor, head: Head, vocabulary: int) -> Tensor:
    """[N, vocabulary] of hidden [N, H], as `keep` sees them; for a few tokens."""
    model = Model(hidden, head, None, vocabulary)
    out = torch.empty(len(hidden), vocabulary, dtype=model.sum_dtype, device=hidden.device)
    return model.project(model.states(slice(0, len(hidden))), out)


def uniforms_of(seed: int, key: bytes, positions: int, draws: int) -> np.ndarray:
    """float64 [positions, draws] in (0, 1): each depends on seed, key, position and number alone, so that any worker draws the same.

    SplitMix64 (Steele, Lea and Flood 2014) as a counter, begun at a digest of the key.
    """
    z = np.uint64(xxhash.xxh3_64_intdigest(key, seed)) + np.arange(1, positions * draws + 1, dtype=np.uint64) * GOLDEN
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    # 52 bits and a half: never 0, never 1.
    return (((z >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52).reshape(positions, draws)
