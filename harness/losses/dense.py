"""Forward KL, reverse KL and generalised Jensen-Shannon from a teacher that is resident."""

from dataclasses import dataclass

import torch
from torch import Tensor

from harness.losses.chunks import TILE_BYTES, DivergenceLoss, Head, Model, reduce


def dense_divergence(
    student_hidden: Tensor,
    student_head: Head,
    teacher_hidden: Tensor,
    teacher_head: Head,
    gold: Tensor,
    *,
    beta: float = 0.0,
    cross_entropy_weight: float = 0.0,
    divergence_weight: float = 1.0,
    temperature: float = 1.0,
    row_weights: Tensor | None = None,
    vocabulary: int | None = None,
    tile_bytes: int = TILE_BYTES,
) -> DivergenceLoss:
    """Divergence from a resident teacher, whose logits exist for a chunk of tokens at a time; it gets no gradient.

    beta 0: KL(teacher || student). 1: KL(student || teacher). Between: beta KL(teacher || m) + (1 - beta) KL(student || m) of the mixture
    m = beta teacher + (1 - beta) student, as in TRL (generalised Jensen-Shannon, arXiv 2306.13649). At a temperature T both logits are
    divided by T and the divergence is multiplied by T^2, in the value as in the gradient; the cross-entropy is at T = 1.

    Shapes as in `sparse_divergence`; the models may differ in H. Heads of different height need `vocabulary`: raises ValueError.
    """
    if not 0 <= beta <= 1 or temperature <= 0:
        raise ValueError(f"beta = {beta}, temperature = {temperature}; beta must be from 0 to 1 and temperature > 0")
    if vocabulary is None and len(student_head.weight) != len(teacher_head.weight):
        raise ValueError(
            f"the student's head has {len(student_head.weight)} rows, the teacher's {len(teacher_head.weight)}; "
            "name the vocabulary that their tokenizers share"
        )
    student = Model(student_hidden, student_head, row_weights, vocabulary)
    teacher = Model(teacher_hidden, teacher_head, row_weights, vocabulary)
    gold = gold.masked_fill(student.is_masked, 0).long()
    objective = _Dense(teacher, gold, beta, temperature, cross_entropy_weight, divergence_weight)
    return reduce(student, objective, 6 + 2 * (0 < beta < 1) + (temperature != 1), tile_bytes)


@dataclass(frozen=True)
class _Dense:
    teacher: Model
    gold: Tensor  # [N], 0 where masked
    beta: float
    temperature: float
    cross_entropy_weight: float
    divergence_weight: float

    def __call__(self, logits: Tensor, rows: slice, row_weights: Tensor, gradient: Tensor | None) -> DivergenceLoss:
        gold, t = self.gold[rows, None], self.temperature
        states = self.teacher.states(rows)
        target = states.new_empty((len(states), self.teacher.vocabulary), dtype=self.teacher.sum_dtype)
        self.teacher.project(states, target)

        agreement = logits.argmax(-1) == target.argmax(-1)
        log_q, q = _log_softmax_(logits)
        log_p, p = _log_softmax_(target)
        cross_entropy = -log_q.gather(1, gold)[:, 0]
        overlap = torch.minimum(p, q).sum(-1)
        kl, q_at_1 = (p * (log_p - log_q)).sum(-1), q
        if t != 1:
            log_q, q = _log_softmax_(log_q.div_(t))
            log_p, p = _log_softmax_(log_p.div_(t))
        divergence, by_logits = _diverge(log_p, p, log_q, q, self.beta)
        divergence = divergence * t**2
        if gradient is not None:
            by_logits.mul_(self.divergence_weight * t)  # T^2 of the divergence over T of the logits
            if self.cross_entropy_weight:
                by_logits.add_(q_at_1, alpha=self.cross_entropy_weight)
                by_logits.scatter_add_(1, gold, torch.full_like(by_logits[:, :1], -self.cross_entropy_weight))
            torch.mul(by_logits, row_weights[:, None], out=gradient)
        loss = self.cross_entropy_weight * cross_entropy + self.divergence_weight * divergence
        return DivergenceLoss(loss, divergence, cross_entropy, kl, agreement, overlap)


def _log_softmax_(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities in the logits' memory, and the probabilities."""
    logits.sub_(logits.amax(-1, keepdim=True))
    probs = logits.exp()
    total = probs.sum(-1, keepdim=True)
    return logits.sub_(total.log()), probs.div_(total)


def _diverge(log_p: Tensor, p: Tensor, log_q: Tensor, q: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Divergence [n] of the student q from the teacher p, both [n, V], and its gradient with respect to the student's logits [n, V]."""
    if beta == 0:
        return (p * (log_p - log_q)).sum(-1), q - p
    # Where both underflow nothing is added, whatever the logarithm.
    m = log_p if beta == 1 else (beta * p + (1 - beta) * q).clamp_(min=torch.finfo(p.dtype).tiny).log_()
    gap = log_q - m
    of_student = (q * gap).sum(-1)
    if beta == 1:
        return of_student, gap.sub_(of_student[:, None]).mul_(q)
    of_teacher = (p * (log_p - m)).sum(-1)
    return beta * of_teacher + (1 - beta) * of_student, gap.sub_(of_student[:, None]).mul_(q).mul_(1 - beta)
