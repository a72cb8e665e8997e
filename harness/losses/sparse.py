"""Forward KL from a teacher that was written down: a head of K entries per token, and what is left of the mass as one entry or by draws."""

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from harness.losses.chunks import TILE_BYTES, DivergenceLoss, Head, Model, reduce


class SparseTargets(NamedTuple):
    """A teacher's distributions at T = 1, as a cache keeps them. Slots from a token's count on, and all of a token of weight 0, may hold
    anything. The K + 1 masses are scaled to a sum of 1, so that what a codec rounded off cannot make a divergence negative."""

    ids: Tensor  # [N, K] integers, the most probable first, none twice
    log_probs: Tensor  # [N, K]
    counts: Tensor  # [N] slots in use
    log_tail: Tensor  # [N] log of the mass outside them; -inf where nothing is left
    entropy: Tensor | None = None  # [N] nats, of the whole distribution; for tail="draws"
    draws: Tensor | None = None  # [N, m] ids drawn from the tail in proportion to their mass, with replacement; for tail="draws"


def sparse_divergence(
    hidden: Tensor,
    head: Head,
    targets: SparseTargets,
    gold: Tensor,
    *,
    tail: Literal["ghost", "draws"] = "ghost",
    cross_entropy_weight: float = 0.0,
    divergence_weight: float = 1.0,
    row_weights: Tensor | None = None,
    vocabulary: int | None = None,
    tile_bytes: int = TILE_BYTES,
) -> DivergenceLoss:
    """Forward KL(teacher || student) from a cache, at temperature 1: the shape of the tail at another one is not in a cache.

    hidden [N, H]; gold [N] token ids; row_weights [N] floats of order 1, 0 for a token that does not count; vocabulary: the entries of
    the head that are tokens (the rest is padding and takes no part), left out: all.

    `ghost`: all that is outside the K entries is one entry on both sides: sum_K p (log p - log q) + P (log P - log Q). A lower bound of
    the KL that is tight where P is small; it teaches the tail's mass, not its shape.
    `draws`: the tail's part of the cross-entropy is -(P / m) sum_draws log q, whose gradient is the dense one in expectation, for draws
    have the tail's distribution whatever the student is. Since the teacher's entropy is stored, no constant is missing: the value is the
    dense KL in expectation too. It is noisy, and a sum over few tokens may be negative.
    """
    if tail not in ("ghost", "draws"):
        raise ValueError(f'tail = "{tail}"; must be "ghost" or "draws"')
    if targets.ids.shape[1] == 0 or targets.ids.shape != targets.log_probs.shape:
        raise ValueError(f"ids {tuple(targets.ids.shape)}, log_probs {tuple(targets.log_probs.shape)}; must be [N, K] both, K > 0")
    if tail == "draws" and (targets.entropy is None or targets.draws is None):
        raise ValueError('tail="draws" of targets without draws and entropy; capture with draws, or use tail="ghost"')
    student = Model(hidden, head, row_weights, vocabulary)
    objective = _Sparse.build(targets, gold, student, tail, cross_entropy_weight, divergence_weight)
    return reduce(student, objective, 1, tile_bytes)


@dataclass(frozen=True)
class _Sparse:
    """What a cache holds, cleaned: an unused slot has id 0 and log-probability -inf, a masked token nothing but its tail."""

    ids: Tensor  # [N, K]
    log_probs: Tensor  # [N, K]
    is_used: Tensor  # [N, K]
    log_tail: Tensor  # [N]
    singles: Tensor  # [N, 1 + m]: the gold token, then the draws
    single_masses: Tensor  # [N, 1 + m]: what the gradient takes from each of them
    entropy: Tensor | None  # [N] for draws; None for a ghost
    cross_entropy_weight: float
    divergence_weight: float

    @classmethod
    def build(cls, targets: SparseTargets, gold: Tensor, student: Model, tail: str, by_gold: float, by_teacher: float) -> "_Sparse":
        is_masked, dtype = student.is_masked, student.sum_dtype
        counts = targets.counts.masked_fill(is_masked, 0)
        is_used = torch.arange(targets.ids.shape[1], device=counts.device) < counts[:, None]
        log_probs = targets.log_probs.to(dtype).masked_fill(~is_used, -torch.inf)
        log_tail = targets.log_tail.to(dtype).masked_fill(is_masked, 0)
        log_total = torch.logaddexp(log_probs.logsumexp(-1), log_tail)
        log_probs, log_tail = log_probs - log_total[:, None], log_tail - log_total

        singles, entropy = gold[:, None].masked_fill(is_masked[:, None], 0), None
        single_masses = torch.full_like(log_probs[:, :1], by_gold)
        if tail == "draws":
            entropy = targets.entropy.to(dtype).masked_fill(is_masked, 0)
            draws = targets.draws.masked_fill((is_masked | (log_tail == -torch.inf))[:, None], 0)
            share = by_teacher * log_tail.exp() / draws.shape[1]
            singles = torch.cat([singles, draws], 1)
            single_masses = torch.cat([single_masses, share[:, None].expand(draws.shape)], 1)
        ids = targets.ids.masked_fill(~is_used, 0).long()
        return cls(ids, log_probs, is_used, log_tail, singles.long(), single_masses, entropy, by_gold, by_teacher)

    def at(self, rows: slice) -> "_Sparse":
        tensors = {name: value[rows] for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **tensors)

    def __call__(self, logits: Tensor, rows: slice, row_weights: Tensor, gradient: Tensor | None) -> DivergenceLoss:
        chunk = self.at(rows)
        p, p_tail = chunk.log_probs.exp(), chunk.log_tail.exp()
        z = logits.gather(1, chunk.ids).masked_fill_(~chunk.is_used, -torch.inf)
        z_singles = logits.gather(1, chunk.singles)

        # The head leaves the tile and the tail is summed by itself: as 1 minus the head's mass it would be mostly rounding. `amin`, for
        # unused slots name token 0, which may be in the head as well.
        logits.scatter_reduce_(1, chunk.ids, torch.where(chunk.is_used, -torch.inf, torch.inf).to(logits.dtype), "amin")
        top = logits.amax(-1).clamp_(min=torch.finfo(logits.dtype).min)
        tail = logits.sub_(top[:, None]).exp_()
        tail_sum = tail.sum(-1).clamp_(min=1)  # its largest entry adds 1: less means that nothing is outside the head
        log_sum_tail = top + tail_sum.log()
        log_sum = torch.logaddexp(z.logsumexp(-1), log_sum_tail)
        log_q = z - log_sum[:, None]
        q = log_q.exp()

        cross_entropy = log_sum - z_singles[:, 0]
        if self.entropy is None:
            of_head = torch.where(p > 0, p * (chunk.log_probs - log_q), 0).sum(-1)
            divergence = of_head + torch.where(p_tail > 0, p_tail * (chunk.log_tail - (log_sum_tail - log_sum)), 0)
        else:
            of_head = torch.where(p > 0, p * -log_q, 0).sum(-1)
            divergence = of_head + p_tail * (log_sum[:, None] - z_singles[:, 1:]).mean(-1) - chunk.entropy

        if gradient is not None:
            both = self.cross_entropy_weight + self.divergence_weight
            by_tail = both * (top - log_sum).exp()
            if self.entropy is None:
                by_tail = by_tail - self.divergence_weight * p_tail / tail_sum
            by_singles = by_tail[:, None] * (z_singles - top[:, None]).exp()
            chunk._write_gradient(gradient, tail, by_tail, both * q - self.divergence_weight * p, by_singles, row_weights)
        return DivergenceLoss(
            loss=self.cross_entropy_weight * cross_entropy + self.divergence_weight * divergence,
            divergence=divergence,
            cross_entropy=cross_entropy,
            kl=divergence,
            agreement=z[:, 0] >= torch.maximum(z.amax(-1), top),
            overlap=torch.minimum(p, q).sum(-1),
        )

    def _write_gradient(
        self, gradient: Tensor, tail: Tensor, by_tail: Tensor, by_head: Tensor, by_singles: Tensor, row_weights: Tensor
    ) -> None:
        """gradient = tail * by_tail, but by_head [n, K] in the head and by_singles [n, 1 + m] at singles, less the masses of singles.

        Whatever has a target is computed whole in float32 and rounded once: where a probability is near its target, both rounded for
        themselves would leave nothing but rounding.
        """
        in_head = (self.singles[:, :, None] == self.ids[:, None, :]) & self.is_used[:, None, :]
        same = self.singles[:, :, None] == self.singles[:, None, :]
        by_head = by_head - (in_head * self.single_masses[:, :, None]).sum(1)
        by_singles = by_singles - (same * self.single_masses[:, None, :]).sum(-1)
        by_singles = torch.where(in_head.any(-1), (in_head * by_head[:, None, :]).sum(-1), by_singles)

        torch.mul(tail, (by_tail * row_weights)[:, None], out=gradient)
        # Onto zeros; an unused slot, whose probabilities are 0, adds 0.
        gradient.scatter_add_(1, self.ids, by_head.mul(row_weights[:, None]).to(gradient.dtype))
        # The same value wherever an entry is named twice.
        gradient.scatter_(1, self.singles, by_singles.mul(row_weights[:, None]).to(gradient.dtype))
