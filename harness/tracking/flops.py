"""How many floating-point operations training a token takes, and how many a card can do in a second.

Utilisation here is MFU (PaLM, arXiv:2204.02311, appendix B): operations that the mathematics needs, over what the card could do at its peak
in bf16. Work that an implementation adds (recomputation under gradient checkpointing, padding, dequantising 4-bit weights) is not counted;
that would be HFU.
"""

import copy
from dataclasses import dataclass, replace

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

# Peak dense tensor-core rate in bf16 with fp32 accumulation, without sparsity (NVIDIA's headlines double it with 2:4 sparsity), in FLOP/s.
# A key matches where its words stand in torch.cuda.get_device_name(), whose words are parted by spaces and hyphens
# ("NVIDIA A100-SXM4-80GB"); the first match counts, so "H100 PCIe" stands before "H100".
PEAK_FLOPS = {
    "GB200": 2.5e15,  # NVIDIA GB200 NVL72 datasheet: 5 PFLOP/s sparse per GPU
    "B200": 2.25e15,  # NVIDIA HGX B200 datasheet: 36 PFLOP/s sparse for 8
    "GH200": 989.4e12,  # NVIDIA GH200 datasheet: 1,979 sparse
    "H200 NVL": 835.5e12,  # NVIDIA H200 datasheet: 1,671 sparse
    "H200": 989.4e12,  # NVIDIA H200 datasheet: 1,979 sparse
    "H100 PCIe": 756.4e12,  # NVIDIA H100 datasheet: 1,513 sparse
    "H100 NVL": 835.5e12,  # NVIDIA H100 datasheet: 1,671 sparse
    "H100": 989.4e12,  # NVIDIA H100 datasheet, SXM: 1,979 sparse
    "A100": 312e12,  # NVIDIA A100 datasheet
    "A40": 149.7e12,  # NVIDIA A40 datasheet
    "A30": 165e12,  # NVIDIA A30 datasheet
    "A10G": 70e12,  # AWS's variant of the A10: dense fp16/bf16 of its NVIDIA product brief
    "A10": 125e12,  # NVIDIA A10 datasheet
    "RTX A6000": 154.8e12,  # NVIDIA GA102 whitepaper: 309.7 sparse
    "RTX 6000 Ada": 364.2e12,  # NVIDIA RTX 6000 Ada datasheet: 1,457 FP8 sparse, a quarter of that
    "L40S": 362.05e12,  # NVIDIA L40S datasheet
    "L40": 181.05e12,  # NVIDIA L40 datasheet
    "L4": 121e12,  # NVIDIA L4 datasheet: 242 sparse
    "RTX 4090": 165.2e12,  # NVIDIA Ada whitepaper, table 2, with fp32 accumulation
    "RTX 3090": 71e12,  # NVIDIA GA102 whitepaper, with fp32 accumulation
    "V100 PCIE": 112e12,  # NVIDIA V100 datasheet; fp16, the card has no bf16
    "V100": 125e12,  # the same, with NVLink
    "T4": 65e12,  # NVIDIA T4 datasheet; fp16, the card has no bf16
    "MI300X": 1307.4e12,  # AMD Instinct MI300X datasheet
}


# Not the card of that name: a slice of it, its mobile version, its cut-down version.
_NOT_THAT_CARD = {"MIG", "Laptop", "D"}


def peak_flops(device_name: str) -> float | None:
    """Peak FLOP/s of a card by the name that torch gives it; None for a card that is not in the table, and for a MIG slice of any card."""
    words = device_name.replace("-", " ").split()
    if _NOT_THAT_CARD & set(words):
        return None
    return next((peak for name, peak in PEAK_FLOPS.items() if f" {name} " in f" {' '.join(words)} "), None)


@dataclass(frozen=True)
class FlopCount:
    """Operations of forward and backward together.

    per_token: every token that is not padding, for the layers' weights
    per_trained_token: in addition, every token that has a label, for the output head (the others need no logits; TRL's loss makes none)
    per_pair: every (query, key) pair of the causal attention; a sequence of T tokens has T(T+1)/2
    """

    per_token: float
    per_trained_token: float
    per_pair: float

    def total(self, tokens: float, trained_tokens: float, pairs: float) -> float:
        return self.per_token * tokens + self.per_trained_token * trained_tokens + self.per_pair * pairs


def count_flops(config, *, trainable_fraction: float = 1.0, adapter_params: int = 0) -> FlopCount:
    """Operations per token of a causal language model, from its transformers config.

    A weight matrix of m x n costs one token 2mn operations forward (a multiplication and an addition per weight), and backward
    2mn for the gradient of its input, which everything below needs, and 2mn for its own gradient, which only a trained weight needs.
    So with N weights: full training 2N + 2N + 2N = 6N; frozen under LoRA or QLoRA 2N + 2N = 4N; an adapter of A weights 6A on top.
    `trainable_fraction` is the share of base weights that train: 1 full, 0 LoRA.

    Attention has no weights, so freezing saves nothing in it. Each (query, key) pair costs, per head of width d, 2d for q·k and 2d for the
    sum over v; backward, each of the two has two gradients. Over the L layers and their h heads that is 4·L·h·d forward and, with backward,
    three times that: 12·L·h·d per pair. (PaLM's and TRL's number lets every token attend to all T, so 12·L·h·d·T per token: twice what a
    causal model needs.)

    N counts every matrix of the modules that transformers builds for this config: not the embeddings, which are looked up, but the output
    head, tied or not; of a mixture's experts the share that a token visits. Norms, activations, softmax and rotary positions (under 1 %)
    are left out. Two things are overcounted: layers with a sliding window, as if they attended to everything; and, under LoRA without
    gradient checkpointing, the input gradient of the first layer's frozen projections, which nothing needs (a fraction of 1/L).
    """
    head, body = _matrix_params(config)
    text = config.get_text_config()
    per_weight = 4 + 2 * trainable_fraction
    return FlopCount(
        per_token=per_weight * body + 6 * adapter_params,
        per_trained_token=per_weight * head,
        per_pair=12 * _attention_layers(text) * text.num_attention_heads * _head_dim(text),
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
