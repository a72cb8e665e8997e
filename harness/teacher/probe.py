"""Before the first step: does what teaches belong to these rows, this tokenizer and this student?

    find_cache                from a cache: without any model, before one is loaded
    check_two_ways            with the model: hidden states and head, as the losses use them, give what the model itself says
    check_same_distribution   with a resident teacher: in the student's place, through the whole path, it is found to be like itself

Each raises an error that says what does not fit, where training would only be worse than it could be, and nobody would know why.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from harness.embedded import resolve
from harness.errors import ModelError, TeacherError
from harness.losses import DivergenceLoss, Head, SparseTargets, sparse_divergence
from harness.teacher.fidelity import FIDELITY_FILE
from harness.teacher.format import Targets, sample_key
from harness.teacher.reader import TeacherCache, open_cache
from harness.teacher.resident import weights_digest
from harness.teacher.samples import cache_folder, keys_of, plan_units, settings_of, teacher_name
from harness.teacher.targets import UNTRAINED, keys_in, samples_of
from harness.teacher.vocabulary import true_vocabulary, vocabulary_digest

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from harness.data.store import Prepared
    from harness.recipe import Recipe

GOLD_SAMPLES = 64
CODEC_NATS = 5e-3
"""By so much may two logarithms differ that were one: a head is made to sum to 1 again when it is read, the gold entry is not."""
SAME_NATS, SAME_TOKENS = 1e-3, 0.99
"""A GPU may add in another order the second time, and turn a tie round."""
ROUNDING_NATS = {torch.float32: 1e-3}
"""Of a token, between tiles and whole logits; HALVES_NATS where these are in halves."""
HALVES_NATS = 0.1


# ---- from a cache


def find_cache(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, prepared: Prepared, say: Callable[[str], None]) -> Path:
    """The folder of the recipe's cache, which has the targets of all rows, and they fit. Raises TeacherError otherwise. prepared: as it is
    trained on, packed or not. say: told what the teacher thinks of the rows, and when nobody has compared the cache with it."""
    splits = {"train": prepared.train} | ({"eval": prepared.eval} if prepared.eval is not None else {})
    found = {name: keys_of(rows) for name, rows in splits.items()}
    keys, lengths = (sum((part[column] for part in found.values()), []) for column in (0, 1))
    cache = open_cache(cache_folder(recipe, tokenizer, plan_units(keys, lengths, recipe.teacher.unit_tokens).plan))
    check_header(cache, recipe, tokenizer)
    for name, rows in splits.items():
        check_rows(cache, name, rows, found[name][0])
    say(check_gold(cache, prepared.train))
    if not (cache.folder / FIDELITY_FILE).is_file():
        say(
            f"warning: {cache.folder}: has no {FIDELITY_FILE}: its capture has not come to its end, where the cache is compared with the "
            "teacher, or the two differed there; `harness capture RECIPE` says which"
        )
    return cache.folder


def check_header(cache: TeacherCache, recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises TeacherError when the cache is of another teacher than the recipe's, keeps more or less, or is of other token ids."""
    header, asked, source = cache.header, settings_of(recipe), Path(resolve(recipe.teacher.name_or_path))
    if header.teacher.name != teacher_name(recipe):
        raise TeacherError(
            f"{cache.folder}: is of {header.teacher.name}; teacher.name_or_path = {recipe.teacher.name_or_path}; make them the same"
        )
    # It need not be here; where it is, it may have been trained anew.
    if not recipe.teacher.server and source.is_dir() and weights_digest(source) != header.teacher.digest:
        raise TeacherError(
            f"{cache.folder}: {recipe.teacher.name_or_path} has other weights than when it was captured; put them back, or let "
            "teacher.cache be another folder and capture anew"
        )
    for key, found in asdict(header.settings).items():
        if found != getattr(asked, key):
            raise TeacherError(
                f"{cache.folder}: was captured with {key} = {found}; the recipe asks for {getattr(asked, key)}; put it back, or let "
                "teacher.cache be another folder and capture anew"
            )
    for what, found, expected in (
        ("vocabulary", header.vocabulary, true_vocabulary(tokenizer)),
        ("tokenizer", header.tokenizer, vocabulary_digest(tokenizer)),
    ):
        if found != expected:
            raise TeacherError(
                f"{cache.folder}: {what} = {found}; the student's is {expected}: its token ids mean other tokens; give the student the "
                f"tokenizer of {header.teacher.name}, or capture a teacher that has the student's"
            )


def check_rows(cache: TeacherCache, name: str, rows: Dataset, keys: list[bytes]) -> None:
    """Raises TeacherError when rows have no targets: how many, and where the first stands. name: of the split. keys: of its rows."""
    try:
        cache.check_has(keys)
    except TeacherError as error:
        first = next(row for row in rows if not all(_has(cache, key) for key in keys_in(row)))
        where = first.get("location", f"in a pack that begins with the tokens {first['input_ids'][:8]}")
        raise TeacherError(f"data.{name}: {error}; the first of them: {where}") from None


def _has(cache: TeacherCache, key: bytes) -> bool:
    try:
        cache.check_has([key])
    except TeacherError:
        return False
    return True


def check_gold(cache: TeacherCache, rows: Dataset) -> str:
    """What the teacher thinks of the gold tokens, on some samples spread over the rows: a line for people, who see at once a teacher that
    does not know such data. Raises TeacherError when targets are not of these trained tokens."""
    nll, entropy, positions = 0.0, 0.0, 0
    for ids, labels in _spread(rows):
        gold = ids[1:][labels[1:] != UNTRAINED]
        key = sample_key(ids, labels)
        targets = cache.read(key)
        where = f"{cache.folder}: sample {key.hex()}"
        if len(targets) != len(gold):
            raise TeacherError(f"{where}: has {len(targets)} positions for {len(gold)} trained tokens; {_AGAIN}")
        least, most = _bounds(targets, gold)
        wrong = ~((targets.gold >= least) & (targets.gold <= most))
        if wrong.any():
            at = int(wrong.argmax())
            raise TeacherError(
                f"{where}: trained token {at} (id {gold[at]}) is said to have the log-probability {targets.gold[at]:.4f}, where its "
                f"distribution has {least[at]:.4f} to {most[at]:.4f}; the targets are not of these tokens: {_AGAIN}"
            )
        nll, entropy, positions = nll - targets.gold.sum(), entropy + targets.entropy.sum(), positions + len(gold)
    per_token = (nll / positions, entropy / positions, np.log(cache.header.vocabulary))
    line = "teacher: {:.3f} nats on {:,} gold tokens (its own uncertainty {:.3f}, a blind guess {:.3f})".format(
        per_token[0], positions, *per_token[1:]
    )
    return line if per_token[0] < per_token[2] else f"{line}\nwarning: this teacher knows no more of these rows than a blind guess"


def _bounds(targets: Targets, gold: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[P] each: what the gold tokens' log-probabilities can be by the rest of the targets. One in the head has its entry there; any other
    is no more probable than the head's last, nor than all of the tail."""
    at_gold = (targets.ids == gold[:, None]) & (np.arange(targets.ids.shape[1]) < targets.counts[:, None])
    in_head, entry = at_gold.any(1), np.where(at_gold, targets.logprobs, 0).sum(1)
    last = np.take_along_axis(targets.logprobs, targets.counts[:, None].astype(np.int64) - 1, 1)[:, 0]
    most = np.where(in_head, entry, np.minimum(last, targets.log_tail))
    return np.where(in_head, entry - CODEC_NATS, -np.inf), most + CODEC_NATS


_AGAIN = "remove the cache and run `harness capture RECIPE`"


def _spread(rows: Dataset) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    indices = np.unique(np.linspace(0, len(rows) - 1, min(GOLD_SAMPLES, len(rows))).astype(int))
    for row in rows.select(indices).with_format("numpy"):
        yield next(samples_of(row))


# ---- with a model


def check_two_ways(model, vocabulary: int, device: torch.device) -> None:
    """Let a model that takes lessons (harness.tasks.lessons) score a few tokens through its hidden states and head, and through its own
    logits. Every rank must call it. Raises ModelError when the two differ by more than rounding: then a factor, a cap or a bias between
    hidden states and logits is not known here, and another model would be trained than the one that will speak."""
    ids = torch.randint(0, vocabulary, (1, 17), generator=torch.Generator().manual_seed(0)).to(device)
    was_training = model.training
    model.eval()
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1, :vocabulary]
        through_head = model(input_ids=ids, labels=ids, lesson=lambda *given: _cross_entropy(*given, vocabulary))
    model.train(was_training)
    plain = torch.nn.functional.cross_entropy(logits.float(), ids[0, 1:])
    difference = abs(float(plain) - float(through_head) / 16)
    if not difference <= ROUNDING_NATS.get(logits.dtype, HALVES_NATS):
        raise ModelError(
            f"model: its hidden states and head give a token {difference:.3g} nats more or less than its own logits; between the two lies "
            "something of this architecture that is not known here, so it cannot be a student yet"
        )


def _cross_entropy(hidden: torch.Tensor, head: Head, gold: torch.Tensor, vocabulary: int) -> torch.Tensor:
    zero = torch.zeros(len(gold), device=gold.device)
    certain = SparseTargets(gold[:, None], zero[:, None], torch.ones_like(gold), zero - torch.inf)
    return sparse_divergence(hidden, head, certain, gold, vocabulary=vocabulary).cross_entropy


def check_same_distribution(losses: DivergenceLoss, tokens: int) -> None:
    """losses: sums over `tokens` trained tokens, of the teacher in the student's place. Raises TeacherError unless the two agree."""
    kl, agreement = float(losses.kl), float(losses.agreement)
    if not (abs(kl) <= SAME_NATS * tokens and agreement >= SAME_TOKENS * tokens):
        raise TeacherError(
            f"teacher: in the student's place it differs from itself by {kl / max(tokens, 1):.3g} nats a token, and agrees on "
            f"{agreement:g} of {tokens} tokens; must be 0 and all. It does not give the same twice (dropout, a router with noise), or its "
            "weights are not numbers; a teacher must be certain of itself"
        )
