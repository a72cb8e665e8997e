"""The weights that a token is multiplied with, counted from the modules of a model; what that costs is harness.planner.flops' to say."""

import copy
from dataclasses import replace

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

from harness.planner.flops import FlopCount, flops_of


def count_flops(config, *, trainable_fraction: float = 1.0, adapter_params: int = 0) -> FlopCount:
    """Operations per token of a causal language model, from its transformers config; the arithmetic is `flops_of`'s.

    N counts every matrix of the modules that transformers builds for this config: not the embeddings, which are looked up, but the output
    head, tied or not; of a mixture's experts the share that a token visits. Norms, activations, softmax and rotary positions (under 1 %)
    are left out. Two things are overcounted: layers with a sliding window, as if they attended to everything; and, under LoRA without
    gradient checkpointing, the input gradient of the first layer's frozen projections, which nothing needs (a fraction of 1/L).
    """
    head, body = _matrix_params(config)
    text = config.get_text_config()
    return flops_of(
        head,
        body,
        attention_layers=_attention_layers(text),
        heads=text.num_attention_heads,
        head_dim=_head_dim(text),
        trainable_fraction=trainable_fraction,
        adapter_params=adapter_params,
    )


def flops_per_token(config, seq_len: int, *, trainable_fraction: float = 1.0, adapter_params: int = 0) -> float:
    """Operations per token, forward and backward, in sequences of `seq_len` tokens that are all trained. See `count_flops`."""
    count = count_flops(config, trainable_fraction=trainable_fraction, adapter_params=adapter_params)
    return count.total(1, 1, (seq_len + 1) / 2)


def count_model_flops(model) -> FlopCount:
    """`count_flops` for a built model: what trains and what is adapter is read from it (also sharded by ZeRO-3 or FSDP, or in 4 bits)."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    output = model.get_output_embeddings()
    if output is not None:
        embeddings.discard(id(output.weight))  # tied: the same tensor is looked up and multiplied with
    adapter = trained = 0
    for name, parameter in model.named_parameters():
        shape = getattr(parameter, "ds_shape", parameter.shape)  # under ZeRO-3 a parameter's own shape is empty
        if not parameter.requires_grad or len(shape) < 2 or id(parameter) in embeddings:
            continue
        if "lora_" in name:
            adapter += shape.numel()
        else:
            trained += shape.numel()
    # A classifier has a score in the place of the head.
    absent = 0 if output is not None else _matrix_params(model.config)[0]
    total = _all_matrix_params(model.config) - absent
    count = count_flops(model.config, trainable_fraction=min(1.0, trained / total), adapter_params=adapter)
    return replace(count, per_trained_token=0.0) if absent else count


def _meta_model(config):
    """The model's modules, shapes without memory; 0.1 s for 8B. By its class itself, because `from_config` would shard it under ZeRO-3."""
    text = copy.deepcopy(config.get_text_config())
    text._attn_implementation = "eager"  # has the same weights as any other, and is always installed
    with torch.device("meta"):
        return MODEL_FOR_CAUSAL_LM_MAPPING[type(text)](text)


def _matrix_params(config) -> tuple[float, float]:
    """Weights that one token is multiplied with: (output head, everything else)."""
    text = config.get_text_config()
    model = _meta_model(config)
    output = model.get_output_embeddings()
    head = output.weight.numel() if output is not None else 0
    experts = getattr(text, "num_local_experts", None) or getattr(text, "num_experts", None)
    visited = text.num_experts_per_tok / experts if experts else 1.0
    body = 0.0
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding) or module is output:
            continue
        for parameter in module.parameters(recurse=False):
            if parameter.dim() == 3 and experts:  # [experts, in, out]
                body += parameter.numel() * visited
            elif parameter.dim() == 2:
                body += parameter.numel()
    return head, body


def _all_matrix_params(config) -> int:
    """Weights in matrices of any kind, all experts, each tensor once, without embeddings that are only looked up."""
    model = _meta_model(config)
    output = model.get_output_embeddings()
    tied = {id(output.weight)} if output is not None else set()
    looked_up = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)} - tied
    return sum(p.numel() for p in model.parameters() if p.dim() >= 2 and id(p) not in looked_up)


def _attention_layers(text) -> int:
    """Layers with softmax attention; hybrid models name the others in `layer_types`."""
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers
    return sum(kind in ("full_attention", "sliding_attention", "chunked_attention") for kind in kinds)


def _head_dim(text) -> int:
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
