"""Scores of chosen and rejected answers: the loss that sets them apart, and how well they do. Pure functions over B pairs.

A score difference d is read as the log odds that the chosen answer is the better one: p = sigmoid(d) (Bradley and Terry, 1952).
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

BINS = 10
MOMENTS = ("pairs", "right", "margin", "chosen", "chosen_squared", "rejected", "rejected_squared")
"""What pair_moments sums, in its order."""


def bradley_terry(chosen: Tensor, rejected: Tensor, margin: Tensor | float = 0.0) -> Tensor:
    """-log sigmoid(chosen - rejected - margin) for each pair, [B], in nats. margin: by how much more the chosen one shall score, [B]
    (Llama 2, arXiv 2307.09288, eq. 2)."""
    return -logsigmoid(chosen - rejected - margin)


def off_centre(chosen: Tensor, rejected: Tensor) -> Tensor:
    """(chosen + rejected)^2 for each pair, [B]: the loss knows differences alone, and this keeps scores around 0 (arXiv 2312.09244)."""
    return (chosen + rejected) ** 2


def pair_moments(chosen: Tensor, rejected: Tensor) -> Tensor:
    """MOMENTS of these pairs, float64 [7]: sums, so those of all batches and ranks may be added. A tie is half right: a model that gives
    every answer one score is right as often as a coin."""
    chosen, rejected = chosen.double(), rejected.double()
    difference = chosen - rejected
    right = (difference > 0).double() + (difference == 0).double() / 2
    count = torch.ones_like(chosen)
    return torch.stack([value.sum() for value in (count, right, difference, chosen, chosen**2, rejected, rejected**2)])


def describe_moments(moments: list[float]) -> dict[str, float]:
    """accuracy, margin (mean chosen - rejected), mean and standard deviation (of all, not of a sample) of either's scores."""
    pairs, right, margin, chosen, chosen_squared, rejected, rejected_squared = moments
    found = {"accuracy": right / pairs, "margin": margin / pairs}
    for name, total, squared in (("chosen", chosen, chosen_squared), ("rejected", rejected, rejected_squared)):
        mean = total / pairs
        found |= {f"{name}_reward": mean, f"{name}_reward_std": max(squared / pairs - mean**2, 0.0) ** 0.5}
    return found


def calibration_sums(chosen: Tensor, rejected: Tensor) -> Tensor:
    """float64 [1 + 3 * BINS]: the summed log loss -log p, then for each of BINS equal bins of confidence from 0.5 to 1 how many pairs
    fall into it, how many of them are right, and their summed confidence. Sums, to be added over batches and ranks.

    The confidence of a pair is max(p, 1 - p) = sigmoid(|d|): with which the model says which answer is better, before it hears which."""
    difference = (chosen - rejected).double()
    confidence = difference.abs().sigmoid()
    right = (difference > 0).double() + (difference == 0).double() / 2
    place = ((confidence - 0.5) * 2 * BINS).long().clamp(max=BINS - 1)
    bins = [
        torch.zeros(BINS, dtype=torch.float64, device=chosen.device).index_add(0, place, value)
        for value in (torch.ones_like(right), right, confidence)
    ]
    return torch.cat([-logsigmoid(difference).sum()[None], *bins])


def describe_calibration(sums: list[float]) -> dict[str, float]:
    """log_loss: the mean of -log p. calibration_error: the expected calibration error, sum over bins of (share of pairs) *
    |share that is right - mean confidence| (arXiv 1706.04599); 0 where of all that is said with 80 % four of five are right."""
    log_loss, bins = sums[0], sums[1:]
    counts, right, confidence = bins[:BINS], bins[BINS : 2 * BINS], bins[2 * BINS :]
    pairs = sum(counts)
    error = sum(abs(hits - sure) for hits, sure in zip(right, confidence, strict=True)) / pairs
    return {"log_loss": log_loss / pairs, "calibration_error": error}
