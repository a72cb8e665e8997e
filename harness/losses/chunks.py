"""From hidden states to the sum of a loss over their tokens, and to its gradients, in one pass.

The promise: no tensor of tokens x vocabulary exists. Chunks of tokens meet the whole vocabulary, a chunk's logits become their own
gradient in the forward, and what stays until the backward is the gradient of the hidden states and, where it trains, of the head.
Products are in the dtype of the hidden states (or of autocast) and are summed in float32; all else is float32, or float64 for float64.
Nothing here asks the device for a value, so no step waits for one.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

TILE_BYTES = 1 << 30
"""Of logits and what is made of them, at once. At V = 152k in bfloat16 this is 1,200 tokens from a cache: enough for the sum of the head's
gradient, which is read and written once per chunk, to hide behind the products. A frozen head is as fast with a quarter of it."""


class Head(NamedTuple):
    """From hidden states to logits: `c * tanh(y / c)` of `y = logit_scale * (hidden @ weight.T + bias)`; y itself without a softcap c."""

    weight: Tensor  # [V, H]
    bias: Tensor | None = None  # [V]
    logit_scale: float = 1.0
    softcap: float | None = None


class DivergenceLoss(NamedTuple):
    """Sums over the tokens, each times its weight. Only `loss` has a gradient."""

    loss: Tensor
    """cross_entropy_weight * cross_entropy + divergence_weight * divergence."""
    divergence: Tensor
    """As asked for, nats; times temperature^2."""
    cross_entropy: Tensor
    """Of the gold token at T = 1, nats."""
    kl: Tensor
    """KL(teacher || student) at T = 1, nats, as far as the teacher is known."""
    agreement: Tensor
    """Tokens whose most probable successor is the same for both."""
    overlap: Tensor
    """Mass that both give to the same entries, sum of min(p, q): over the vocabulary, or over a cache's K."""


class Model:
    """Hidden states [N, H] and the head over them: one model's logits, some tokens at a time.

    row_weights [N]: a token of weight 0 is masked, and its hidden state taken as 0: whatever it holds, it cannot leak through a product.
    """

    def __init__(self, hidden: Tensor, head: Head, row_weights: Tensor | None, vocabulary: int | None):
        height = len(head.weight)
        if vocabulary is not None and not 0 < vocabulary <= height:
            raise ValueError(f"vocabulary = {vocabulary} of a head with {height} rows; must be 1 to {height}")
        self.hidden, self.head = hidden, head
        self.vocabulary = vocabulary or height
        self.dtype = _product_dtype(hidden)
        self.sum_dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        # On other than CUDA this is a copy of a head in halves, made once and not for every chunk.
        self.weight = head.weight.detach()[: self.vocabulary].to(self.dtype)
        self.row_weights = (hidden.new_ones(len(hidden)) if row_weights is None else row_weights.detach()).to(self.sum_dtype)
        self.is_masked = self.row_weights == 0

    def states(self, rows: slice) -> Tensor:
        return self.hidden.detach()[rows].masked_fill(self.is_masked[rows, None], 0).to(self.dtype)

    def project(self, states: Tensor, out: Tensor) -> Tensor:
        """states [n, H] -> logits in `out` [n, V]."""
        _multiply(states, self.weight.t(), out)
        if self.head.bias is not None:
            out.add_(self.head.bias.detach()[: self.vocabulary])
        if self.head.logit_scale != 1:
            out.mul_(self.head.logit_scale)
        if self.head.softcap is not None:
            out.div_(self.head.softcap).tanh_().mul_(self.head.softcap)
        return out


Objective = Callable[[Tensor, slice, Tensor, Tensor | None], DivergenceLoss]
"""(logits [n, V], their rows of N, weights [n], gradient [n, V] or None) -> losses [n]. The logits may be overwritten. Writes the gradient
with respect to them, times the weights; it may be given the memory of the logits for it."""


def reduce(student: Model, objective: Objective, tiles: int, tile_bytes: int) -> DivergenceLoss:
    """The objective summed over all tokens, differentiable in the student's hidden states and head.

    tiles: tensors of the logits' shape and dtype that an objective holds at its peak, the logits among them.
    """
    has_halves = student.dtype != student.sum_dtype
    bytes_per_logit = student.sum_dtype.itemsize * (tiles + (student.head.softcap is not None)) + student.dtype.itemsize * has_halves
    chunk_tokens = max(1, tile_bytes // (bytes_per_logit * student.vocabulary))
    run = partial(_run_chunks, student, objective, chunk_tokens)
    inputs = student.hidden, student.head.weight, student.head.bias
    # Inside a Function grad mode is always off: whether there will be a backward can only be seen here.
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in inputs):
        loss, sums = _GradientInForward.apply(*inputs, run)
        return DivergenceLoss(loss, *sums)
    sums, _ = run((False, False, False))
    return DivergenceLoss(*sums)


class _GradientInForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, bias: Tensor | None, run) -> tuple[Tensor, Tensor]:
        sums, gradients = run(ctx.needs_input_grad[:3])
        ctx.save_for_backward(*gradients)
        # Not the tensors themselves: under ZeRO-3 the head is a shard again by the time of the backward.
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (hidden, weight, bias)]
        rest = sums[1:].clone()
        ctx.mark_non_differentiable(rest)
        return sums[0].clone(), rest

    @staticmethod
    @once_differentiable
    def backward(ctx, by_loss: Tensor, _):
        # Scaled and cast in one kernel, and not in place: a second backward must find what the first one found.
        return *(
            None if gradient is None else torch.mul(gradient, by_loss, out=torch.empty_like(gradient, dtype=dtype))
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ), None


@torch.no_grad()
def _run_chunks(
    student: Model, objective: Objective, chunk_tokens: int, wanted: tuple[bool, bool, bool]
) -> tuple[Tensor, list[Tensor | None]]:
    """The sums of all losses [6], and the gradients of the first with respect to hidden, weight and bias as far as they are wanted."""
    hidden, head, vocabulary = student.hidden, student.head, student.vocabulary
    zeros = partial(torch.zeros, dtype=student.sum_dtype, device=hidden.device)
    by_hidden, by_weight, by_bias = gradients = [
        zeros(tensor.shape) if want else None for tensor, want in zip((hidden, head.weight, head.bias), wanted, strict=True)
    ]
    sums = zeros(len(DivergenceLoss._fields))
    chunks = list(_chunks(len(hidden), chunk_tokens))
    widest = max((rows.stop - rows.start for rows in chunks), default=0)
    tile = torch.empty(widest, vocabulary, dtype=student.sum_dtype, device=hidden.device)
    half_tile = tile if student.dtype == tile.dtype else torch.empty_like(tile, dtype=student.dtype)
    for rows in chunks:
        states, row_weights = student.states(rows), student.row_weights[rows]
        logits = student.project(states, tile[: len(states)])
        gradient = half_tile[: len(states)] if any(wanted) else None
        slope = None
        if gradient is not None and head.softcap is not None:
            slope = (logits / head.softcap).square_().neg_().add_(1)
        losses = objective(logits, rows, row_weights, gradient)
        sums += (torch.stack([loss.to(sums.dtype) for loss in losses]) * row_weights).sum(-1)
        if gradient is None:
            continue
        if slope is not None:
            gradient.mul_(slope)
        if by_hidden is not None:
            _multiply(gradient, student.weight, by_hidden[rows])
        if by_weight is not None:
            _add_product(by_weight[:vocabulary], gradient.t(), states)
        if by_bias is not None:
            by_bias[:vocabulary] += gradient.sum(0, dtype=by_bias.dtype)
    if head.logit_scale != 1:
        for gradient in gradients:
            if gradient is not None:
                gradient.mul_(head.logit_scale)
    return sums, gradients


def _chunks(tokens: int, chunk_tokens: int) -> Iterator[slice]:
    """Slices of at most `chunk_tokens`, as equal as can be: a short one at the end would cost a whole pass over the head."""
    count = -(-tokens // chunk_tokens)
    for number in range(count):
        yield slice(tokens * number // count, tokens * (number + 1) // count)


def _product_dtype(hidden: Tensor) -> torch.dtype:
    """Only CUDA multiplies halves and keeps the sum in float32; elsewhere such products are in float32."""
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    return dtype if device == "cuda" or dtype == torch.float64 else torch.float32


def _multiply(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a @ b. Autocast leaves products alone that are told where to go."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, never rounded to the halves' dtype: chunk by chunk that would bias the sum."""
    if a.dtype == total.dtype:
        torch.addmm(total, a, b, out=total)
    else:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
