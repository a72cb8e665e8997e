"""A reward model beside the policy: whole on every rank, asked and never trained (harness.model.reward).

It reads its score at the last token. The rows that it was trained on end as its chat template ends them, many with a line break after the
token that ends the turn, and a policy stops at that token: so what it wrote is ended as a row, and read where the training has read.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from harness.data.templates import Renderer
from harness.embedded import resolve
from harness.errors import ModelError, TeacherError
from harness.model import reward
from harness.tasks.templates import training_template
from harness.teacher.vocabulary import check_same_vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Judge:
    """Of what a policy wrote."""

    model: reward.RewardModel

    @property
    def digest(self) -> str | None:
        return self.model.digest

    def score(self, sequences: Sequence[list[int]]) -> list[float]:
        """One score for each prompt with its answer. One that was cut off is read where it ends."""
        ends, rest = self._endings
        return self.model.score([[*ids, *rest] if ids[-1:] and ids[-1] in ends else ids for ids in sequences])

    @cached_property
    def _endings(self) -> tuple[set[int], list[int]]:
        """Tokens that end a turn, and what its rows have after the last one."""
        if self.model.tokenizer.chat_template is None:
            return set(), []
        renderer = Renderer(self.model.tokenizer, training_template)
        return renderer.end_of_turn_ids(), renderer.after_last_turn_ids()


def load_reward_model(name: str, tokenizer: "PreTrainedTokenizerBase") -> Judge:
    """A run's folder, an export, any other classifier of one score, or a hub id. tokenizer: the policy's, whose ids it will be given.

    Raises ModelError where it is no reward model, or reads other tokens than the policy writes.
    """
    judge = reward.load_reward_model(resolve(name))
    try:
        check_same_vocabulary(tokenizer, judge.tokenizer, name)
    except TeacherError as error:
        said = str(error).partition(": ")[2]
        raise ModelError(f"rlhf.rewards: reward_model {name} reads other tokens than the policy writes: {said}") from None
    return Judge(judge)
