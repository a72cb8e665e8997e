"""A reward model beside the policy: whole on every rank, asked and never trained (harness.model.reward)."""

from typing import TYPE_CHECKING

from harness.embedded import resolve
from harness.errors import ModelError, TeacherError
from harness.model import reward
from harness.teacher.vocabulary import check_same_vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_reward_model(name: str, tokenizer: "PreTrainedTokenizerBase") -> reward.RewardModel:
    """A run's folder, an export, any other classifier of one score, or a hub id. tokenizer: the policy's, whose ids it will be given.

    Raises ModelError where it is no reward model, or reads other tokens than the policy writes.
    """
    judge = reward.load_reward_model(resolve(name))
    try:
        check_same_vocabulary(tokenizer, judge.tokenizer, name)
    except TeacherError as error:
        said = str(error).partition(": ")[2]
        raise ModelError(f"rlhf.rewards: reward_model {name} reads other tokens than the policy writes: {said}") from None
    return judge
