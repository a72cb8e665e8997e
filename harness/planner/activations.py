"""What a decoder layer keeps for its backward pass, in bytes per token, from its shapes; and what is computed beside it.

Derived from the modules of transformers 5 under eager autograd, operation by operation, and held to the byte against
`torch.autograd.graph.saved_tensors_hooks` on tiny models (tests/planner/test_activations.py). Flash-like attention (varlen, flash, sdpa
without a mask, flex) keeps no T x T matrix: queries, keys, values, its output and one float per head.

    norm over a width w           4w: its input in float32 (a copy, or the float32 stream itself), 4: the reciprocal root;
                                  trained: what its weight multiplied, w in the stream's type
    linear, trained               its input: once for those that share it; under autocast of a float32 stream each casts its own copy
    linear, frozen                nothing
    LoRA on a linear              the input of A: PEFT casts to the adapter's type and autocast back, a copy for each module unless all
                                  types are one; the r inputs of B; with dropout a mask, and the dropped input
    MLP                           gate, its activation, up: 3 times its width
"""

from dataclasses import dataclass

from harness.planner.architecture import Architecture, Matrix
from harness.recipe.schema import Lora

NORM_BACKWARD_WIDTHS = 20
"""Bytes per token and unit of `hidden` that the last norm's backward holds at once, while all layers' activations still stand: its gradient
and four products in float32, and the two halves. Counted on tiny models: 18 to 20."""


@dataclass(frozen=True)
class Types:
    """Bytes of an element, by what it is part of."""

    base: int
    """Weights that are loaded and not in 4 bits."""
    stream: int
    """Hidden states between the layers."""
    linear: int
    """What linear layers return. bitsandbytes' return the type that they are given."""
    compute: int
    """What is multiplied."""
    adapter: int
    autocast: bool
    """Products are in `compute` by autocast, which copies what is of another type."""


@dataclass(frozen=True)
class Kept:
    """Of one layer."""

    per_token: float
    """Bytes that stay until the backward, for each token."""
    copies: float
    """Bytes of weights that autocast has copied, which the backward holds too; whatever the number of tokens."""
    transient: float
    """Bytes per token that the backward computes beside them."""


def layer_activations(
    shape: Architecture, types: Types, lora: Lora | None, *, mask_bytes: int = 1, masked: bool = False, eager_length: int = 0
) -> Kept:
    """lora: None where all weights are trained. mask_bytes: of an element of a dropout mask (1 on CUDA; on a CPU its input's).
    masked: sdpa is given a mask, so that keys and values are repeated for each query head. eager_length: T of eager attention."""
    trained, attention_width = lora is None, shape.queries + 2 * shape.keys
    # Gemma multiplies by its weight before it leaves float32.
    normalised = 4 if shape.model_type.startswith("gemma") else types.stream
    norms = shape.block_norms * (4 * shape.hidden + 4 + trained * normalised * shape.hidden)
    if shape.qk_norms:
        heads = shape.heads + shape.kv_heads
        norms += 4 * (shape.queries + shape.keys) + 4 * heads + trained * types.linear * (shape.queries + shape.keys)
    if masked or eager_length:
        attention_width = 3 * shape.queries
    attention = types.compute * (attention_width + shape.queries) + 4 * shape.heads
    if _is_fused(shape):
        # Values are a view into what the fused matrix returned, which stays whole.
        attention += types.compute * (shape.queries + shape.keys)
    attention += eager_length * shape.heads * (4 + types.compute)
    adapted = [matrix for matrix in shape.matrices if lora is not None and is_adapted(matrix, lora)]
    inputs = _trained_inputs(shape, types) if trained else _adapter_inputs(shape, types, lora, adapted, mask_bytes)
    inner = 3 * types.linear * shape.intermediate
    if shape.experts:
        # Each visited expert has its own copy of the token, and its answer before they are added up.
        inner = shape.experts_per_token * (inner + types.compute * (2 * shape.hidden + shape.intermediate))
        inner += 3 * types.linear * sum(matrix.columns for matrix in shape.matrices if matrix.name == "down_proj")
    copies = 0
    if types.autocast and trained and types.base != types.compute:
        copies = types.compute * shape.layer_matrices
    elif types.autocast and adapted and types.adapter != types.compute:
        copies = types.compute * sum(adapter_weights(matrix, lora) for matrix in adapted)
    return Kept(norms + attention + inputs + inner, copies, _transient(shape, types, trained))


def _groups(shape: Architecture) -> dict[str, list[Matrix]]:
    """Linear layers by the tensor that they read; experts are counted apart."""
    groups: dict[str, list[Matrix]] = {"attention": [], "attended": [], "mlp": [], "inner": []}
    for matrix in shape.matrices:
        if matrix.copies > 1:
            continue
        if matrix.name == "o_proj":
            groups["attended"].append(matrix)
        elif matrix.name in ("down_proj", "fc2"):
            groups["inner"].append(matrix)
        else:
            groups["attention" if matrix.name in ("q_proj", "k_proj", "v_proj", "qkv_proj") else "mlp"].append(matrix)
    return groups


def _arrives_in(group: str, types: Types) -> int:
    return {"attended": types.compute, "inner": types.linear}.get(group, types.stream)


def _is_kept_already(group: str, shape: Architecture) -> bool:
    """What attention returned is kept by attention itself; Phi's queries come from a concatenation, in an order that makes its a copy."""
    return group == "attended" and not _is_fused(shape)


def _is_fused(shape: Architecture) -> bool:
    return any(matrix.name == "qkv_proj" for matrix in shape.matrices)


def _trained_inputs(shape: Architecture, types: Types) -> float:
    total = 0
    for group, matrices in _groups(shape).items():
        if types.autocast and _arrives_in(group, types) != types.compute:
            total += types.compute * sum(matrix.columns for matrix in matrices)
        elif matrices and not _is_kept_already(group, shape):
            total += _arrives_in(group, types) * matrices[0].columns
    return total


def _adapter_inputs(shape: Architecture, types: Types, lora: Lora, adapted: list[Matrix], mask_bytes: int) -> float:
    total, drops = 0, lora.dropout > 0
    for group, members in _groups(shape).items():
        matrices = [matrix for matrix in members if matrix in adapted]
        width, arrives = sum(matrix.columns for matrix in matrices), _arrives_in(group, types)
        if types.autocast and types.adapter != types.compute:
            total += types.compute * width
        elif types.adapter != arrives or drops:
            total += types.adapter * width
        elif matrices and not _is_kept_already(group, shape):
            total += arrives * matrices[0].columns
        total += drops * mask_bytes * width
    return total + len(adapted) * lora.r * (types.compute if types.autocast else types.adapter)


def _transient(shape: Architecture, types: Types, trained: bool) -> float:
    """Counted on tiny models, not derived: the gradients that stand at once in the MLP's backward, beside what the layer has kept."""
    inner = shape.intermediate * (shape.experts_per_token or 1)
    casts = types.autocast and types.adapter != types.compute
    return types.compute * (inner * (1 if trained else 4 if casts else 1.5) + shape.hidden)


def tail_bytes(shape: Architecture, types: Types, *, trained: bool) -> float:
    """Per token, after the last layer: the last norm, its result, and the rows of it that the head multiplies."""
    return (4 + types.stream * trained + types.stream + types.compute) * shape.hidden


# ---- adapters


def is_adapted(matrix: Matrix, lora: Lora) -> bool:
    """As PEFT chooses: `all-linear` is every nn.Linear but the head; a name is the last part of a module's."""
    if lora.target_modules == "all-linear":
        return matrix.is_linear
    return any(matrix.name == target.split(".")[-1] for target in lora.target_modules)


def adapter_weights(matrix: Matrix, lora: Lora) -> int:
    """A is [r, columns], B [rows, r]; DoRA has a magnitude for each row."""
    return lora.r * (matrix.columns + matrix.rows) * matrix.copies + lora.use_dora * matrix.rows
