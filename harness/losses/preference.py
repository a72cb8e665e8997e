"""Losses of preference: over pairs of a better and a worse answer (DPO and its kin), and over answers that are good or bad (KTO).

Pure functions of log-probabilities of whole answers, in nats, one entry for each pair or answer; nothing is reduced here, so that who
calls may divide by the pairs of a whole step on all ranks. A log-ratio is the policy's log-probability less the reference's.

Sources, as in TRL 1.16 (tests/test_preference_losses.py holds both against each other): sigmoid arXiv 2305.18290, ipo 2310.12036 (by the
mean over tokens, as its authors confirmed to TRL), hinge 2305.10425, robust 2403.00409, exo_pair 2402.00856, nca_pair 2402.05369,
bco_pair 2404.04656, sppo_hard 2405.00675, apo_zero and apo_down 2408.06266, discopop 2406.08414, kto 2402.01306.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

DISCOPOP_TAU = 0.05


@dataclass(frozen=True)
class Pairs:
    """What a policy and a reference make of B pairs: log-probabilities [B] of whole answers, and how many tokens [B] each has."""

    chosen: Tensor
    rejected: Tensor
    reference_chosen: Tensor
    reference_rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor

    @property
    def chosen_ratio(self) -> Tensor:
        return self.chosen - self.reference_chosen

    @property
    def rejected_ratio(self) -> Tensor:
        return self.rejected - self.reference_rejected

    @property
    def delta(self) -> Tensor:
        return self.chosen_ratio - self.rejected_ratio

    @property
    def delta_per_token(self) -> Tensor:
        """Between the means over tokens; an answer of no token (a row that only fills up) counts as one."""
        return self.chosen_ratio / self.chosen_tokens.clamp(min=1) - self.rejected_ratio / self.rejected_tokens.clamp(min=1)


def pair_loss(
    pairs: Pairs, loss_types: Sequence[str], weights: Sequence[float] | None = None, *, beta: float, label_smoothing: float = 0.0
) -> Tensor:
    """[B], the weighted sum of the named losses of each pair. Raises KeyError for a name that is not in PAIR_LOSSES."""
    weights = weights or [1.0] * len(loss_types)
    return sum(weight * PAIR_LOSSES[name](pairs, beta, label_smoothing) for name, weight in zip(loss_types, weights, strict=True))


def _sigmoid(pairs: Pairs, beta: float, _) -> Tensor:
    return -logsigmoid(beta * pairs.delta)


def _sigmoid_norm(pairs: Pairs, beta: float, _) -> Tensor:
    return -logsigmoid(beta * pairs.delta_per_token)


def _ipo(pairs: Pairs, beta: float, _) -> Tensor:
    return (pairs.delta_per_token - 1 / (2 * beta)) ** 2


def _hinge(pairs: Pairs, beta: float, _) -> Tensor:
    return torch.relu(1 - beta * pairs.delta)


def _robust(pairs: Pairs, beta: float, smoothing: float) -> Tensor:
    right, flipped = -logsigmoid(beta * pairs.delta), -logsigmoid(-beta * pairs.delta)
    return ((1 - smoothing) * right - smoothing * flipped) / (1 - 2 * smoothing)


def _exo_pair(pairs: Pairs, beta: float, smoothing: float) -> Tensor:
    """KL of the policy's preference, as a coin, from one that is right with probability 1 - smoothing."""
    right, wrong = logsigmoid(beta * pairs.delta), logsigmoid(-beta * pairs.delta)
    wanted = torch.log(right.new_tensor([1 - smoothing, smoothing]))
    return right.exp() * (right - wanted[0]) + wrong.exp() * (wrong - wanted[1])


def _nca_pair(pairs: Pairs, beta: float, _) -> Tensor:
    chosen, rejected = beta * pairs.chosen_ratio, beta * pairs.rejected_ratio
    return -logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected)


def _bco_pair(pairs: Pairs, beta: float, _) -> Tensor:
    return -logsigmoid(beta * pairs.chosen_ratio) - logsigmoid(-beta * pairs.rejected_ratio)


def _sppo_hard(pairs: Pairs, beta: float, _) -> Tensor:
    return (pairs.chosen_ratio - 0.5 / beta) ** 2 + (pairs.rejected_ratio + 0.5 / beta) ** 2


def _apo_zero(pairs: Pairs, beta: float, _) -> Tensor:
    return 1 - torch.sigmoid(beta * pairs.chosen_ratio) + torch.sigmoid(beta * pairs.rejected_ratio)


def _apo_down(pairs: Pairs, beta: float, _) -> Tensor:
    return torch.sigmoid(beta * pairs.chosen_ratio) + 1 - torch.sigmoid(beta * pairs.delta)


def _discopop(pairs: Pairs, beta: float, _) -> Tensor:
    logits = beta * pairs.delta
    exponential = torch.sigmoid(logits / DISCOPOP_TAU)
    return -logsigmoid(logits) * (1 - exponential) + torch.exp(-logits) * exponential


def _sft(pairs: Pairs, _, __) -> Tensor:
    """Cross-entropy of the chosen answer per token of it. TRL takes the mean over the tokens of a micro-batch, which is another one on
    other ranks; of one pair the two are the same."""
    return -pairs.chosen / pairs.chosen_tokens.clamp(min=1)


PAIR_LOSSES: dict[str, Callable[[Pairs, float, float], Tensor]] = {
    "sigmoid": _sigmoid,
    "sigmoid_norm": _sigmoid_norm,
    "ipo": _ipo,
    "hinge": _hinge,
    "robust": _robust,
    "exo_pair": _exo_pair,
    "nca_pair": _nca_pair,
    "bco_pair": _bco_pair,
    "sppo_hard": _sppo_hard,
    "apo_zero": _apo_zero,
    "apo_down": _apo_down,
    "discopop": _discopop,
    "sft": _sft,
}


def answer_loss(
    ratio: Tensor, good: Tensor, divergence: Tensor | None, *, beta: float, desirable_weight: float, undesirable_weight: float
) -> Tensor:
    """[N], KTO of answers by themselves. ratio [N]: their log-ratios. good [N], bool. divergence: of the policy from the reference over the
    step (a number, without gradient, not below 0); None: APO-zero for answers without partners, which needs none."""
    if divergence is None:
        losses = torch.where(good, 1 - torch.sigmoid(beta * ratio), torch.sigmoid(beta * ratio))
    else:
        away = torch.where(good, ratio - divergence, divergence - ratio)
        losses = 1 - torch.sigmoid(beta * away)
    return losses * torch.where(good, losses.new_tensor(desirable_weight), losses.new_tensor(undesirable_weight))


def divergence_of_tokens(log_probs: Tensor, reference: Tensor) -> Tensor:
    """[N], exp(d) - 1 - d of d = reference - log_probs at each token: of tokens that the policy draws, its mean is KL(policy || reference)
    (Schulman's k3, never below 0). Over the tokens of a data set it tells by how much the two differ there, and is logged as `kl`."""
    d = (reference - log_probs).clamp(max=20.0)
    return torch.expm1(d) - d
