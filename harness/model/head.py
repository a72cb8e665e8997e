"""From a model's last hidden states to its logits, without the model's own forward: what a loss over tiles of logits needs of it."""

from typing import TYPE_CHECKING

from harness.errors import ModelError
from harness.losses import Head

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def head_of(model: "PreTrainedModel") -> Head:
    """The head as it stands: under ZeRO-3 and FSDP2 its tensors are a shard, until somebody gathers them.

    Raises ModelError for a model without a linear head. That no other factor lies between hidden states and logits is proven before the
    first step, by comparing the two ways to a loss (harness.tasks.lessons).
    """
    layer, config = model.get_output_embeddings(), model.config.get_text_config()
    if layer is None or not hasattr(layer, "weight"):
        raise ModelError(
            f"model: {type(model).__name__} has no linear head over its vocabulary; distillation needs a causal language model"
        )
    return Head(layer.weight, getattr(layer, "bias", None), _logit_scale(config), getattr(config, "final_logit_softcapping", None))


def _logit_scale(config) -> float:
    """By the names that transformers' architectures have for it (Cohere, Muse, Falcon-H1; Granite divides, HyperCLOVA multiplies)."""
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(config, name, None) is not None:
            return getattr(config, name)
    scaling = getattr(config, "logits_scaling", None)
    if scaling is None:
        return 1.0
    return scaling if config.model_type == "hyperclovax" else 1 / scaling
