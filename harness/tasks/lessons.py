"""A lesson is what a micro-batch is to learn: a function of a model's hidden states at the trained tokens, its head and the gold tokens.

The model's own forward calls it, where TRL's fused head is called for sft: inside of whatever wraps the model, so that DDP and DeepSpeed
reduce its gradients, and with the head gathered where ZeRO-3 has cut it up. No logits of all tokens are made.
"""

import functools
import types
from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor
from trl.kernels import ChunkedLogProbFunction
from trl.trainer.utils import maybe_gather_lm_head_ctx

from harness.errors import ModelError
from harness.losses import Head
from harness.model.head import head_of
from harness.teacher.targets import UNTRAINED

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Lesson = Callable[[Tensor, Head, Tensor], object]
"""(hidden states [N, H], head, gold tokens [N]) -> a loss, or whatever else is wanted of them. No library sees into it: what looks like a
tensor is cast to the type of the weights by DeepSpeed's and FSDP's forwards."""
VOCABULARY_TILE = 32_768


def check_router_has_no_loss(trainer, learns: str) -> None:
    """Raises ModelError for a mixture of experts whose router is trained by a loss beside the task's, which no lesson has. learns: what."""
    if trainer.aux_loss_enabled:
        raise ModelError(
            f"model: a mixture of experts, whose router is trained by a loss of its own that learning {learns} leaves out; set "
            "router_aux_loss_coef: 0 in the model's config.json if it shall do without"
        )


def add_lessons(model: "PreTrainedModel") -> None:
    """Let `model(..., labels=labels, lesson=lesson)` return lesson(hidden states at the trained tokens, head, gold); no logits are made."""
    plain = model.forward

    # PEFT and `generate` look at the signature.
    @functools.wraps(type(model).forward)
    def forward(self, *args, lesson: Lesson | None = None, labels: Tensor | None = None, **kwargs):
        if lesson is None:
            return plain(*args, **kwargs, **({} if labels is None else {"labels": labels}))
        hidden = self.base_model(*args, **{**kwargs, "use_cache": False}).last_hidden_state[:, :-1]
        gold = labels[:, 1:]
        trained = gold != UNTRAINED
        head = head_of(self)
        with maybe_gather_lm_head_ctx(head.weight, head.bias):
            # Under FSDP2 a tensor of the head may be a shard that knows how to become whole.
            whole = [tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor for tensor in head[:2]]
            return lesson(hidden[trained], Head(*whole, *head[2:]), gold[trained])

    model.forward = types.MethodType(forward, model)


def gold_log_probs(hidden: Tensor, head: Head, gold: Tensor) -> Tensor:
    """A lesson: [N], float32, the log-probability of each gold token, by TRL's kernel: it has a tile of logits at a time, also backward."""
    log_probs, *_ = ChunkedLogProbFunction.apply(
        hidden, head.weight, head.bias, gold, 1.0, VOCABULARY_TILE, head.softcap, head.logit_scale, ()
    )
    return log_probs
