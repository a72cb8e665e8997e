"""How many floating-point operations training a token takes, and how many a card can do in a second: the arithmetic, without torch.

Utilisation here is MFU (PaLM, arXiv:2204.02311, appendix B): operations that the mathematics needs, over what the card could do at its peak
in bf16. Work that an implementation adds (recomputation under gradient checkpointing, padding, dequantising 4-bit weights) is not counted;
that would be HFU. `harness.tracking.flops` counts the weights of a built model; the planner takes them from its config.
"""

from dataclasses import dataclass

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


def flops_of(
    head: float, body: float, *, attention_layers: int, heads: int, head_dim: int, trainable_fraction: float = 1.0, adapter_params: int = 0
) -> FlopCount:
    """head, body: weights that a token is multiplied with, in the output head and elsewhere (of experts those that it visits).

    A weight matrix of m x n costs one token 2mn operations forward (a multiplication and an addition per weight), and backward
    2mn for the gradient of its input, which everything below needs, and 2mn for its own gradient, which only a trained weight needs.
    So with N weights: full training 2N + 2N + 2N = 6N; frozen under LoRA or QLoRA 2N + 2N = 4N; an adapter of A weights 6A on top.
    `trainable_fraction` is the share of base weights that train: 1 full, 0 LoRA.

    Attention has no weights, so freezing saves nothing in it. Each (query, key) pair costs, per head of width d, 2d for q·k and 2d for the
    sum over v; backward, each of the two has two gradients. Over the L layers and their h heads that is 4·L·h·d forward and, with backward,
    three times that: 12·L·h·d per pair. (PaLM's and TRL's number lets every token attend to all T, so 12·L·h·d·T per token: twice what a
    causal model needs.)
    """
    per_weight = 4 + 2 * trainable_fraction
    return FlopCount(
        per_token=per_weight * body + 6 * adapter_params,
        per_trained_token=per_weight * head,
        per_pair=12 * attention_layers * heads * head_dim,
    )
