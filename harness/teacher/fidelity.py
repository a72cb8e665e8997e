"""What a cache lost of its teacher: measured on a few samples by asking the teacher once more, and kept beside it as fidelity.json.

A teacher in memory answers by its own forward, whole logits, a sample at a time, and not by the way that the capture took: so this is also
the proof that the targets are of these tokens, at these positions, of this model. The student in it is made up: the teacher's logits with
noise of standard deviation 1, which is a student that is half on its way.

A server shows no whole distribution, so that what the head lost of it cannot be measured there, and the report says so: what remains is
that the server, asked once more, says of the gold tokens what is stored.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from harness.errors import TeacherError
from harness.run import write_text_atomically
from harness.teacher.format import Targets
from harness.teacher.head import part_of
from harness.teacher.reader import TeacherCache
from harness.teacher.resident import ResidentTeacher
from harness.teacher.samples import Sample, Samples
from harness.teacher.served import ServedTeacher

FIDELITY_FILE = "fidelity.json"
POSITIONS = 2048
"""So many trained tokens are enough for a mean, and few enough to ask for again."""
ROWS_AT_ONCE = 256


@dataclass(frozen=True)
class Fidelity:
    """Means over trained tokens, in nats where nothing else is said."""

    positions: int
    """That were asked for again."""
    bytes_per_token: float
    """Of the whole cache: all its bytes by all its trained tokens."""
    entries: float
    retained_mass: float
    """In the entries; the rest is the tail's."""
    kl: float | None
    """From the teacher to what is decoded, the tail one entry: what rounding lost."""
    kl_flat_tail: float | None
    """The same with the tail's mass spread evenly over all that is in it: what is lost besides when its shape is not known."""
    gradient_error: dict[str, float]
    """Of a student's logits, against the whole distribution: the square of its length by that of the gradient, by kind of tail."""
    gold_nll: float
    """The teacher's, of the gold tokens."""
    gold_error: float
    """Mean distance of the gold tokens' log-probabilities from what is stored."""
    entropy: float
    """Of a served teacher a lower bound."""
    not_measured: str | None = None
    """Which of these are missing, and why."""


def measure_fidelity(teacher: ResidentTeacher, samples: Samples, cache: TeacherCache) -> Fidelity:
    """Every rank of a sharded teacher calls it. Raises TeacherError when the cache does not hold what this teacher says."""
    parts = []
    for sample in _some(samples):
        # A token is predicted where the one before it stands.
        at = torch.from_numpy(sample.trained_at - 1)
        logits = teacher.logits(torch.from_numpy(sample.input_ids)[None])[0][at.to(teacher.device), : cache.header.vocabulary]
        gold, targets = sample.input_ids[sample.trained_at], cache.read(sample.key)
        for first in range(0, len(targets), ROWS_AT_ONCE):
            rows = slice(first, first + ROWS_AT_ONCE)
            parts.append(_compare(logits[rows].float(), torch.from_numpy(gold[rows]).long(), part_of(targets, rows)))
    measured = {name: float(torch.cat([part[name] for part in parts]).mean()) for name in parts[0]}
    squares = measured.pop("gradient")
    errors = {kind: measured.pop(kind) / squares for kind in ("ghost", "draws") if kind in measured}
    positions = sum(len(part["kl"]) for part in parts)
    return _check_gold(Fidelity(positions, cache.bytes / cache.positions, gradient_error=errors, **measured), teacher, cache)


def measure_served_fidelity(teacher: ServedTeacher, samples: Samples, cache: TeacherCache) -> Fidelity:
    """As measure_fidelity, as far as a server can be asked."""
    chosen = list(_some(samples))
    now, stored = teacher.read_samples(chosen), cache.read_samples(chosen)
    fidelity = Fidelity(
        positions=len(stored),
        bytes_per_token=cache.bytes / cache.positions,
        entries=float(stored.counts.mean()),
        retained_mass=float(np.exp(stored.logprobs).sum(1).mean()),
        kl=None,
        kl_flat_tail=None,
        gradient_error={},
        gold_nll=-float(now.gold.mean()),
        gold_error=float(np.abs(now.gold - stored.gold).mean()),
        entropy=float(now.entropy.mean()),
        not_measured="kl, kl_flat_tail and gradient_error need whole distributions, which a server does not show",
    )
    return _check_gold(fidelity, teacher, cache)


def _check_gold(fidelity: Fidelity, teacher: ResidentTeacher | ServedTeacher, cache: TeacherCache) -> Fidelity:
    if not fidelity.gold_error <= teacher.rounding_nats:
        raise TeacherError(
            f"{cache.folder}: the gold tokens' log-probabilities are {fidelity.gold_error:.3g} nats away from what the teacher says now, "
            f"more than rounding ({teacher.rounding_nats:g}); the cache is of another teacher or of other tokens: remove it and capture "
            "again"
        )
    return fidelity


def _some(samples: Samples) -> Iterator[Sample]:
    """Samples with POSITIONS trained tokens together, by the order of their keys, which is as good as random."""
    positions = 0
    for sample in sorted(itertools.chain(*samples.batches(0)), key=lambda sample: sample.key):
        if positions >= POSITIONS:
            return
        positions += len(sample.trained_at)
        yield sample


def _compare(logits: Tensor, gold: Tensor, targets: Targets) -> dict[str, Tensor]:
    """What the teacher says, logits [n, V], beside what is stored of it: a value for each of n tokens."""
    logs = logits.log_softmax(-1)
    p, device = logs.exp(), logits.device
    ids, stored, log_tail, gold_stored = (
        torch.from_numpy(array).to(device) for array in (targets.ids.astype(np.int64), targets.logprobs, targets.log_tail, targets.gold)
    )
    is_kept = stored > -torch.inf
    ids = torch.where(is_kept, ids, ids[:, :1])
    # On the host, so that every device draws the same.
    noise = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0)).to(device)
    q = (logits + noise).softmax(-1)
    gold_now = logs.gather(1, gold.to(device)[:, None])[:, 0]

    def by_entry(values: Tensor) -> Tensor:
        """[n, K] of [n, V], 0 where no entry is."""
        return values.gather(1, ids).masked_fill(~is_kept, 0)

    def outside(values: Tensor) -> Tensor:
        """[n, V] with zeros at the entries."""
        return values.scatter(1, ids, 0)

    tail, stored = outside(p).sum(-1), stored.masked_fill(~is_kept, 0)
    # No tail is stored where all of it is less than the least float; what is left of it in p is no loss.
    log_tail_stored = log_tail.clamp(min=-100)
    kl_head = (by_entry(p) * (by_entry(logs) - stored)).sum(-1)
    in_tail = torch.tensor(logits.shape[1], device=device) - is_kept.sum(-1)
    found = {
        "entries": is_kept.sum(-1).float(),
        "retained_mass": by_entry(p).sum(-1),
        "kl": kl_head + tail * (tail.clamp(min=1e-44).log() - log_tail_stored),
        "kl_flat_tail": kl_head + outside(p * logs).sum(-1) - tail * (log_tail_stored - in_tail.clamp(min=1).log()),
        "gold_nll": -gold_now,
        "gold_error": (gold_now - gold_stored).abs(),
        "entropy": -(p * logs).sum(-1),
        "gradient": (q - p).square().sum(-1),
    }
    shape = outside(q)
    guesses = {"ghost": log_tail.exp()[:, None] * shape / shape.sum(-1, keepdim=True).clamp(min=1e-44)}
    if targets.draws.shape[1]:
        share = (log_tail.exp() / targets.draws.shape[1])[:, None].expand(targets.draws.shape)
        guesses["draws"] = torch.zeros_like(p).scatter_add_(1, torch.from_numpy(targets.draws.astype(np.int64)).to(device), share)
    for kind, guess in guesses.items():
        # Of tokens that are named twice, the first entry and what stands for an unused one, both hold the same.
        decoded = guess.scatter(1, ids, torch.where(is_kept, stored.exp(), stored[:, :1].exp()))
        found[kind] = (decoded - p).square().sum(-1)
    return found


def save_fidelity(folder: Path, fidelity: Fidelity) -> None:
    write_text_atomically(folder / FIDELITY_FILE, json.dumps(asdict(fidelity), indent=1) + "\n")


def render_fidelity(fidelity: Fidelity) -> str:
    lost, least = f"not measured: {fidelity.not_measured}", " or more"
    if fidelity.not_measured is None:
        errors = ", ".join(f"{error:.2g} ({kind})" for kind, error in fidelity.gradient_error.items())
        kl = max(fidelity.kl, 0.0)
        lost = f"KL to what is decoded {kl:.2g} nats ({fidelity.kl_flat_tail:.2g} with a flat tail); gradient error {errors}"
        least = ""
    return (
        f"cache: {fidelity.bytes_per_token:.1f} bytes per trained token; {fidelity.entries:.1f} entries hold {fidelity.retained_mass:.4%} "
        f"of the mass; {lost}\n"
        f"teacher: {fidelity.gold_nll:.3f} nats on the gold tokens, entropy {fidelity.entropy:.3f}{least}; asked again, it is "
        f"{fidelity.gold_error:.1g} away from what is stored ({fidelity.positions:,} tokens)"
    )
