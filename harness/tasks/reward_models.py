"""A reward model beside the policy: a sequence classifier with one label, whole on every rank, that is asked and never trained."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from harness.embedded import resolve
from harness.errors import ModelError, TeacherError
from harness.teacher.resident import weights_digest
from harness.teacher.vocabulary import check_same_vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from harness.recipe import Recipe

SEQUENCES_AT_ONCE = 16


@dataclass
class ScoringModel:
    model: "PreTrainedModel"
    pad: int
    digest: str
    """Of its weights; of a model of the hub its name."""
    sequences_at_once: int = SEQUENCES_AT_ONCE

    @torch.no_grad()
    def score(self, sequences: Sequence[list[int]]) -> list[float]:
        """Of each conversation, as token ids, the score of its last token; in their order, those of like length together."""
        scores: list[float] = [0.0] * len(sequences)
        order = sorted(range(len(sequences)), key=lambda index: len(sequences[index]))
        for start in range(0, len(order), self.sequences_at_once):
            chosen = order[start : start + self.sequences_at_once]
            longest = max(len(sequences[index]) for index in chosen)
            ids = torch.tensor([[*sequences[index], *[self.pad] * (longest - len(sequences[index]))] for index in chosen])
            lengths = torch.tensor([len(sequences[index]) for index in chosen])
            mask = (torch.arange(longest) < lengths.unsqueeze(1)).long()
            found = self._scores(ids.to(self.model.device), mask.to(self.model.device), lengths.to(self.model.device))
            for index, value in zip(chosen, found.float().tolist(), strict=True):
                scores[index] = value
        return scores

    def _scores(self, ids: torch.Tensor, mask: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """transformers' classifiers look for the last token that is no padding by its id, which the end of a turn may have too: here the
        place is known."""
        hidden = self.model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        last = hidden[torch.arange(len(ids), device=ids.device), lengths - 1]
        return self.model.score(last)[:, 0]


def load_reward_model(name: str, *, recipe: "Recipe", tokenizer: "PreTrainedTokenizerBase", settled) -> ScoringModel:
    """A folder, a run's folder or a hub id. Raises ModelError where it is no classifier with one label, or reads other tokens than the
    policy writes."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    source, where = resolve(name), f"rlhf.rewards: reward_model {name}"
    source = str(Path(source, "final")) if Path(source, "final").is_dir() else source
    try:
        theirs = AutoTokenizer.from_pretrained(source)
        model, loaded = AutoModelForSequenceClassification.from_pretrained(
            source, dtype=getattr(torch, settled.dtype), output_loading_info=True
        )
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{where}: cannot be loaded: {str(error).splitlines()[0]}; give the folder that `task: reward` has exported"
        ) from error
    if model.config.num_labels != 1 or loaded["missing_keys"] or not hasattr(model, "score"):
        missing = f"lacks {sorted(loaded['missing_keys'])[0]}" if loaded["missing_keys"] else f"has {model.config.num_labels} labels"
        raise ModelError(f"{where}: {missing}; it must be a classifier whose head `score` has one label, as `task: reward` exports it")
    try:
        check_same_vocabulary(tokenizer, theirs, name)
    except TeacherError as error:
        raise ModelError(f"{where} reads other tokens than the policy writes: {str(error).partition(': ')[2]}") from None
    digest = weights_digest(Path(source)) if Path(source).is_dir() else name
    device = torch.device("cuda", torch.cuda.current_device()) if settled.has_gpu else torch.device("cpu")
    return ScoringModel(model.eval().requires_grad_(False).to(device), tokenizer.pad_token_id, digest)
