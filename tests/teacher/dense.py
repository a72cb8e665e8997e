"""A teacher cache from plain logits, a sample at a time in float64: nothing of ours but the writer."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from harness.teacher.format import CacheHeader, Plan, Settings, Targets, Teacher, sample_key
from harness.teacher.reader import TeacherCache, open_cache
from harness.teacher.writer import UnitWriter, save_header

SETTINGS = Settings(p=0.99, floor=8, cap=64, draws=0, seed=0)


def whole(vocabulary: int) -> Settings:
    """Everything is kept."""
    return Settings(p=1.0, floor=vocabulary, cap=vocabulary, draws=0, seed=0)


def capture(folder: Path, samples, logits_of, vocabulary: int, settings: Settings = SETTINGS, **facts) -> TeacherCache:
    """samples: (token ids, labels) each. logits_of: token ids -> logits [T, V] of a teacher. facts: what the header shall say of it."""
    samples = [(np.asarray(ids), np.asarray(labels)) for ids, labels in samples]
    keys = sorted({sample_key(*sample) for sample in samples})
    header = CacheHeader(
        **{
            "teacher": Teacher("a teacher", None, "0" * 32, "float32", None),
            "tokenizer": "0" * 32,
            "vocabulary": vocabulary,
            "settings": settings,
            "plan": Plan(1, len(keys), "0" * 32),
            **facts,
        }
    )
    save_header(folder, header)
    with UnitWriter(folder, header, 0) as unit:
        for ids, labels in samples:
            unit.add(sample_key(ids, labels), targets_of(logits_of(ids), ids, labels, vocabulary, settings))
        unit.commit()
    return open_cache(folder)


def targets_of(logits: torch.Tensor, ids: np.ndarray, labels: np.ndarray, vocabulary: int, settings: Settings) -> Targets:
    trained = np.flatnonzero(labels[1:] != -100)
    logs = logits[trained, :vocabulary].double().log_softmax(-1)
    gold = logs.gather(1, torch.tensor(labels[1:][trained]).long()[:, None])[:, 0]
    entropy = -(logs.exp() * logs).sum(-1)
    values, order = logs.sort(dim=-1, descending=True)
    mass = values.exp().cumsum(-1)
    counts = (1 + (mass < settings.p).sum(-1)).clamp(settings.floor, settings.cap).clamp(max=vocabulary)
    kept = torch.arange(vocabulary) < counts[:, None]
    tail = torch.where(kept, 0.0, values.exp())
    drawn = torch.zeros(len(trained), 0, dtype=torch.long)
    if settings.draws:
        torch.manual_seed(settings.seed)
        drawn = order.gather(1, torch.multinomial(tail + 1e-300, settings.draws, replacement=True))
    width = min(settings.cap, vocabulary)
    return Targets(
        counts=counts.numpy().astype(np.uint8),
        ids=order[:, :width].numpy().astype(np.int32),
        logprobs=values[:, :width].float().numpy(),
        log_tail=tail.sum(-1).log().float().numpy(),
        entropy=entropy.float().numpy(),
        gold=gold.float().numpy(),
        draws=drawn.numpy().astype(np.int32),
    )


def shifted(targets: Targets) -> Targets:
    """What a capture that is off by one would have written: each position has the distribution of the next."""
    moved = {name: np.roll(getattr(targets, name), -1, axis=0) for name in ("counts", "ids", "logprobs", "log_tail", "entropy", "draws")}
    return replace(targets, **moved)
