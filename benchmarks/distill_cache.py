"""The cache, for distill.py: how fast a capture is beside the teacher's bare forward, how fast a cache is read, and how large it is."""

import gc
import json
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from distill_loss import KEPT, spread, synchronise
from torch import Tensor

from harness.data import prepare_recipe
from harness.losses import Head
from harness.model import load_tokenizer
from harness.recipe import load
from harness.teacher.capture import Worker, capture
from harness.teacher.format import CacheHeader, Plan, Settings, Teacher, sample_key
from harness.teacher.head import keep, uniforms_of
from harness.teacher.reader import TeacherCache, open_cache
from harness.teacher.resident import load_teacher
from harness.teacher.samples import Sample, Samples
from harness.teacher.targets import TargetsCollator
from harness.teacher.writer import UnitWriter, save_header

# ---- capture


def measure_capture(recipe_file: Path, device: str) -> dict:
    """Capture the recipe's data, and after each unit let the same teacher run bare over it: forward and logits, nothing kept."""
    recipe, tokenizer, prepared = open_recipe(recipe_file)
    samples = Samples(prepared, recipe.teacher.unit_tokens)
    teacher = load_teacher(recipe, tokenizer, int(samples.units.lengths.max()))

    def bare(batch: list[Sample]) -> None:
        teacher.logits(torch.from_numpy(np.stack([sample.input_ids for sample in batch])))
        synchronise(device)

    units = InTurn(samples, bare)
    capture(recipe, tokenizer, prepared, Worker(), sharded_by=None, stop=units, say=lambda text: None)
    # Rows of one length, so that there are no others and no padding.
    tokens = [int(samples.units.lengths[samples.units.unit(number)].sum()) for number in range(len(units.captured_s))]
    cache = open_cache(recipe.teacher.cache)
    return {
        "units": len(tokens),
        "capture_tokens_per_s": spread([count / s for count, s in zip(tokens, units.captured_s, strict=True)]),
        "bare_tokens_per_s": spread([count / s for count, s in zip(tokens, units.bare_s, strict=True)]),
        "over_bare": spread([bare / ours for bare, ours in zip(units.bare_s, units.captured_s, strict=True)]),
        "over_bare_in_cpu_s": spread([bare / ours for bare, ours in zip(units.bare_cpu_s, units.captured_cpu_s, strict=True)]),
        "trained_share": cache.positions / sum(tokens),
        "bytes_per_trained_token": cache.bytes / cache.positions,
        "fidelity": json.loads((cache.folder / "fidelity.json").read_text()),
    }


class InTurn:
    """A capture asks it between two units whether to stop: so long as the bare forward of the unit that is done takes, it does not say."""

    def __init__(self, samples: Samples, bare):
        self._samples, self._bare = samples, bare
        self.captured_s, self.captured_cpu_s, self.bare_s, self.bare_cpu_s = [], [], [], []
        self._begun: tuple[float, float] | None = None

    def __call__(self) -> None:
        number = len(self.captured_s)
        if self._begun:
            note(self.captured_s, self.captured_cpu_s, self._begun)
        batches = self._samples.batches(number)
        begun = clocks()
        for batch in batches:
            self._bare(batch)
        if self._begun:
            note(self.bare_s, self.bare_cpu_s, begun)
        self._begun = clocks()


def clocks() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def note(seconds: list[float], cpu_seconds: list[float], begun: tuple[float, float]) -> None:
    for values, since, now in zip((seconds, cpu_seconds), begun, clocks(), strict=True):
        values.append(now - since)


def open_recipe(file: Path) -> tuple:
    recipe = load(str(file), ())
    tokenizer = load_tokenizer(recipe)
    return recipe, tokenizer, prepare_recipe(recipe, tokenizer, packing=False, say=lambda text: None)


# ---- read


def measure_reading(recipe_file: Path, rounds: int = 7) -> dict:
    """Tokens per second at which a cache's targets reach a batch: keys of rows, look-up, checksums, decoding. One process, one thread.

    warm: from the page cache. cold: after the kernel was told to forget the files; `faults` are pages that came from the disk.
    """
    recipe, _, prepared = open_recipe(recipe_file)
    rows, batch = list(prepared.train), recipe.train.per_device_train_batch_size
    tokens = sum(len(row["input_ids"]) for row in rows)
    found = {kind: {"tokens_per_s": [], "faults": []} for kind in ("warm", "cold")}
    for _ in range(rounds):
        for kind, values in found.items():
            if kind == "cold":
                forget_pages(Path(recipe.teacher.cache))
            faults, begun = resource.getrusage(resource.RUSAGE_SELF).ru_majflt, time.perf_counter()
            collate = TargetsCollator(labels_of, open_cache(recipe.teacher.cache))
            for first in range(0, len(rows), batch):
                collate(rows[first : first + batch])
            values["tokens_per_s"].append(tokens / (time.perf_counter() - begun))
            values["faults"].append(resource.getrusage(resource.RUSAGE_SELF).ru_majflt - faults)
            del collate
            gc.collect()
    return {
        kind: {"tokens_per_s": spread(values["tokens_per_s"]), "faults": statistics.median(values["faults"])}
        for kind, values in found.items()
    }


def labels_of(rows: list[dict]) -> dict:
    """All that a collator of targets asks of the one that it is put around."""
    return {"labels": torch.tensor([row["labels"] for row in rows])}


def forget_pages(folder: Path) -> None:
    for file in folder.iterdir():
        with open(file, "rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


# ---- bytes


@dataclass(frozen=True)
class Distributions:
    """A teacher's, in batches of log-probabilities [n, V]."""

    name: str
    vocabulary: int
    batches: Iterator[Tensor]


VOCABULARY = 2**17
ROWS = 128
SFT_LIKE, UNSURE = "like tool calls", "like pretraining"
SYNTHETIC = {SFT_LIKE: ([5.0, 2.5], [0.6, 0.4]), UNSURE: ([1.53], [1.0])}
"""p of a rank ~ rank^-s with noise: the slopes s, and how many tokens have each. So shared/research/distillation.md 2.3 draws them:
0.55 nats and 64 entries that hold .999 of the mass, and 3.0 nats and .885."""
DISTILLKIT = {"README's default": (128, 56), "budget": (50, 14)}
"""Entries, and bytes beside their ids, which are bit-packed for each token: what its codec writes (2.1, run there)."""


def measure_bytes(batches: int, stories: Path | None) -> list[dict]:
    """Bytes per token of the same distributions in our format, in Megatron's and in DistillKit's. stories: a real model, if it is there."""
    kinds = [synthetic(name, batches) for name in SYNTHETIC]
    if stories:
        kinds.append(of_a_model(stories, batches))
    return [sizes(kind) for kind in kinds]


def synthetic(name: str, batches: int) -> Distributions:
    slopes, shares = SYNTHETIC[name]

    def draw() -> Iterator[Tensor]:
        torch.manual_seed(0)
        by_rank = torch.arange(1, VOCABULARY + 1).log()
        for _ in range(batches):
            steep = torch.tensor(slopes)[torch.multinomial(torch.tensor(shares), ROWS, replacement=True)]
            logs = (torch.randn(ROWS, VOCABULARY) - steep[:, None] * by_rank).log_softmax(-1)
            # Ids in another order for each token: multiplied by an odd number, modulo a power of two.
            odd = 2 * torch.randint(VOCABULARY // 2, (ROWS, 1)) + 1
            yield logs.gather(1, (torch.arange(VOCABULARY) * odd + torch.randint(VOCABULARY, (ROWS, 1))) % VOCABULARY)

    return Distributions(name, VOCABULARY, draw())


def of_a_model(folder: Path, batches: int) -> Distributions:
    """stories260K on stories that it writes itself: trained, and real; but it has no more than 512 tokens."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def ask() -> Iterator[Tensor]:
        torch.manual_seed(0)
        for _ in range(batches):
            ids = model.generate(torch.ones(1, 1, dtype=torch.long), do_sample=True, top_k=0, max_new_tokens=ROWS, min_new_tokens=ROWS)
            with torch.no_grad():
                yield model(input_ids=ids).logits[0, :-1].log_softmax(-1)

    return Distributions("stories260K on its stories", model.config.vocab_size, ask())


def sizes(kind: Distributions) -> dict:
    settings = {"ghost": KEPT, "8 draws": Settings(**vars(KEPT) | {"draws": 8})}
    megatron = {"top-64": MegatronFormat(64, kind.vocabulary), "top-128": MegatronFormat(128, kind.vocabulary)}
    entropy, mass = [], []
    with tempfile.TemporaryDirectory() as work:
        caches = {name: Written(Path(work) / name, kind.vocabulary, setting) for name, setting in settings.items()}
        for logs in kind.batches:
            p = logs.exp()
            entropy.append(-(p * logs).sum(-1))
            mass.append(p.topk(64).values.sum(-1))
            for written in (*caches.values(), *megatron.values()):
                written.add(logs)
        ours = {name: cache.bytes / cache.positions for name, cache in ((name, written.close()) for name, written in caches.items())}
    id_bits = (kind.vocabulary - 1).bit_length()
    return {
        "distribution": kind.name,
        "vocabulary": kind.vocabulary,
        "tokens": sum(map(len, entropy)),
        "entropy_nats": float(torch.cat(entropy).mean()),
        "mass_of_64": float(torch.cat(mass).mean()),
        "harness": ours,
        "Megatron": {name: written.bytes_per_token() for name, written in megatron.items()},
        "DistillKit": {name: distillkit_bytes(entries, rest, id_bits) for name, (entries, rest) in DISTILLKIT.items()},
    }


def distillkit_bytes(entries: int, rest: int, id_bits: int) -> int:
    return -(-entries * id_bits // 8) + rest


class Written:
    """A cache of these distributions, by the code of a capture: each batch is a sample."""

    def __init__(self, folder: Path, vocabulary: int, settings: Settings):
        teacher = Teacher("drawn", None, "0" * 32, "float32", None)
        self._header = CacheHeader(teacher, "0" * 32, vocabulary, settings, Plan(1, 1, "0" * 32))
        save_header(folder, self._header)
        self._folder, self._samples = folder, []

    def add(self, logs: Tensor) -> None:
        key = sample_key([len(self._samples)], [0])
        settings, gold = self._header.settings, torch.multinomial(logs.exp(), 1)[:, 0]
        drawn = torch.from_numpy(uniforms_of(settings.seed, key, len(logs), settings.draws))
        # A head whose logits of a unit vector are these.
        kept = keep(torch.eye(len(logs)), Head(logs.t()), gold, drawn, settings, self._header.vocabulary)
        self._samples.append((key, kept.to_targets()))

    def close(self) -> TeacherCache:
        with UnitWriter(self._folder, self._header, 0) as unit:
            for key, targets in self._samples:
                unit.add(key, targets)
            unit.commit()
        return open_cache(self._folder)


class MegatronFormat:
    """What Megatron-LM's saver keeps with top-p 0.99 (2.1: logits_saver.py): values as fp16, ids as 16 bits and one byte for the 17th, up
    to the widest nucleus of the micro-batch, what is beyond a token's own blanked; zstd, level 3. All batches are one micro-batch."""

    BLANK = -1e3

    def __init__(self, entries: int, vocabulary: int):
        self._entries, self._columns = min(entries, vocabulary), []
        self.tokens = 0

    def add(self, logs: Tensor) -> None:
        values, ids = logs.topk(self._entries)
        counts = (values.exp().cumsum(-1) < KEPT.p).sum(-1, keepdim=True) + 1
        beyond = torch.arange(self._entries) >= counts
        self._columns.append((values.masked_fill(beyond, self.BLANK), ids.masked_fill(beyond, 0), int(counts.max())))
        self.tokens += len(logs)

    def bytes_per_token(self) -> float:
        import pyarrow

        values, ids, widths = zip(*self._columns, strict=True)
        width = min(max(widths), self._entries)
        values, ids = (torch.cat(columns)[:, :width].numpy() for columns in (values, ids))
        raw = values.astype(np.float16).tobytes() + (ids & 0xFFFF).astype(np.uint16).tobytes() + (ids >> 16).astype(bool).tobytes()
        return len(pyarrow.Codec("zstd", compression_level=3).compress(raw)) / self.tokens
