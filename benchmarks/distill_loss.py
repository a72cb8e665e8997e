"""The losses alone, for distill.py: from hidden states and heads to the loss and its gradients, beside the matrix products in it.

Every way is given the same hidden states, heads and teacher. Where the mathematics are the same the losses and gradients must be: forward
KL and Jensen-Shannon, each by three pieces of code, two of them TRL's. The teacher is drawn so that few tokens hold most of its mass, as of
a trained one; the student is not, and far from it.
"""

import ctypes
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from harness.losses import Head, SparseTargets, dense_divergence, sparse_divergence
from harness.teacher.format import Settings
from harness.teacher.head import keep

KEPT = Settings(p=0.99, floor=8, cap=64, draws=0, seed=0)
TEACHER_SPREAD = 8.0
"""Standard deviation of the teacher's logits: 1 to 2 nats of entropy at V = 128k."""
AGREEMENT = {"cpu": 1e-4, "cuda": 2e-2}
"""Relative distance of losses, and of gradients, that should be equal; on a GPU the products are in bfloat16."""


@dataclass(frozen=True)
class Shape:
    tokens: int
    vocabulary: int
    student_hidden: int
    teacher_hidden: int
    rounds: int


@dataclass(frozen=True)
class Inputs:
    hidden: Tensor
    weight: Tensor
    taught: Tensor
    teacher_weight: Tensor
    gold: Tensor
    targets: SparseTargets


def draw(shape: Shape, device: str, *, trains_head: bool) -> Inputs:
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    normal = partial(torch.randn, device=device, dtype=dtype)
    hidden, taught = normal(shape.tokens, shape.student_hidden), normal(shape.tokens, shape.teacher_hidden)
    weight = normal(shape.vocabulary, shape.student_hidden) * shape.student_hidden**-0.5
    teacher_weight = normal(shape.vocabulary, shape.teacher_hidden) * (TEACHER_SPREAD * shape.teacher_hidden**-0.5)
    gold = torch.randint(shape.vocabulary, (shape.tokens,), device=device)
    none = torch.empty(shape.tokens, 0, device=device, dtype=torch.float64)
    kept = keep(taught, Head(teacher_weight), gold, none, KEPT, shape.vocabulary, tile_bytes=1 << 26)
    targets = SparseTargets(kept.ids, kept.logprobs, kept.counts, kept.log_tail)
    return Inputs(hidden.requires_grad_(), weight.requires_grad_(trains_head), taught, teacher_weight, gold, targets)


# ---- the ways: each leaves gradients behind, and returns the sum of the loss over the tokens


def ours_cached(inputs: Inputs) -> Tensor:
    loss = sparse_divergence(inputs.hidden, Head(inputs.weight), inputs.targets, inputs.gold).loss
    loss.backward()
    return loss


def ours_resident(inputs: Inputs, beta: float) -> Tensor:
    heads = Head(inputs.weight), Head(inputs.teacher_weight)
    loss = dense_divergence(inputs.hidden, heads[0], inputs.taught, heads[1], inputs.gold, beta=beta).loss
    loss.backward()
    return loss


def trl_chunked(inputs: Inputs, beta: float) -> Tensor:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    divergence, _ = ChunkedDivergenceFunction.apply(inputs.hidden, inputs.weight, None, inputs.taught, inputs.teacher_weight, None, beta)
    loss = divergence.sum()
    loss.backward()
    return loss


def trl_gkd(inputs: Inputs, beta: float) -> Tensor:
    """Its loss as its trainer calls it. Logits in halves come to it as float32, from Accelerate."""
    from trl.experimental.gkd import GKDTrainer

    with torch.no_grad():
        taught = (inputs.taught @ inputs.teacher_weight.t()).float()
    logits = (inputs.hidden @ inputs.weight.t()).float()
    loss = GKDTrainer.generalized_jsd_loss(logits[None], taught[None], inputs.gold[None], beta=beta, num_items_in_batch=1)
    loss.backward()
    return loss


def bare_products(inputs: Inputs, *, with_teacher: bool) -> None:
    """What no loss can do without: the logits, and from a gradient of their shape those of hidden states and head. Into memory that is
    there already, in the type of the hidden states, each in one piece."""
    hidden, weight = inputs.hidden.detach(), inputs.weight.detach()
    tile, by_hidden, by_weight = _memory_of_products(hidden, weight)
    torch.mm(hidden, weight.t(), out=tile)
    if with_teacher:
        torch.mm(inputs.taught, inputs.teacher_weight.t(), out=tile)
    torch.mm(tile, weight, out=by_hidden)
    if inputs.weight.requires_grad:
        torch.mm(tile.t(), hidden, out=by_weight)


_products: dict = {}


def _memory_of_products(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    key = hidden.shape, weight.shape
    if key not in _products:
        _products.clear()
        _products[key] = hidden.new_zeros(len(hidden), len(weight)), torch.zeros_like(hidden), torch.zeros_like(weight)
    return _products[key]


WAYS: dict[str, Callable[[Inputs], Tensor | None]] = {
    "harness, cached": ours_cached,
    "harness, resident, forward KL": partial(ours_resident, beta=0.0),
    "harness, resident, Jensen-Shannon": partial(ours_resident, beta=0.5),
    "TRL chunked, forward KL": partial(trl_chunked, beta=0.0),
    "TRL chunked, Jensen-Shannon": partial(trl_chunked, beta=0.5),
    "TRL GKD, forward KL": partial(trl_gkd, beta=0.0),
    "TRL GKD, Jensen-Shannon": partial(trl_gkd, beta=0.5),
}
BARE = {"of the student": partial(bare_products, with_teacher=False), "of student and teacher": partial(bare_products, with_teacher=True)}
SAME = [[name for name in WAYS if name.endswith(kind)] for kind in ("forward KL", "Jensen-Shannon")]


def bare_of(way: str) -> str:
    return "of the student" if way == "harness, cached" else "of student and teacher"


# ---- time


def measure_times(shape: Shape, device: str, trains_head: bool) -> dict:
    """Seconds of each way and of its products, round after round in turn, and how far the ways agree. Raises SystemExit if they do not."""
    inputs = draw(shape, device, trains_head=trains_head)
    agreement = check_same(inputs, device)
    runs, taken = WAYS | BARE, {name: [] for name in (*WAYS, *BARE)}
    for run in BARE.values():
        run(inputs)
    for number in range(shape.rounds):
        for name in runs if number % 2 == 0 else reversed(runs):
            taken[name].append(timed(runs[name], inputs, device))
    ways = {}
    for name in WAYS:
        pairs = list(zip(taken[name], taken[bare_of(name)], strict=True))
        ways[name] = {"seconds": spread([ours for (ours, _), _ in pairs])}
        for place, key in enumerate(("over_bare", "over_bare_in_cpu_s")):
            ways[name][key] = spread([ours[place] / bare[place] for ours, bare in pairs])
    return {"ways": ways, "bare": {name: spread([seconds for seconds, _ in taken[name]]) for name in BARE}, **agreement}


def timed(run: Callable[[Inputs], object], inputs: Inputs, device: str) -> tuple[float, float]:
    """Seconds, and CPU seconds of all threads: on a CPU that is busy with other work they are the steadier figure."""
    inputs.hidden.grad = inputs.weight.grad = None
    synchronise(device)
    begun, cpu_begun = time.perf_counter(), time.process_time()
    run(inputs)
    synchronise(device)
    return time.perf_counter() - begun, time.process_time() - cpu_begun


def check_same(inputs: Inputs, device: str) -> dict:
    """How far the ways are from each other in loss and gradient; and how much of the divergence the cache knows."""
    found = {}
    for name, run in WAYS.items():
        inputs.hidden.grad = inputs.weight.grad = None
        loss = run(inputs).item()
        found[name] = loss, [grad.float().clone() for grad in (inputs.hidden.grad, inputs.weight.grad) if grad is not None]
    gaps = []
    for first, *others in SAME:
        for other in others:
            gaps.append(abs(found[first][0] - found[other][0]) / found[first][0])
            for ours, theirs in zip(found[first][1], found[other][1], strict=True):
                gaps.append(float((ours - theirs).norm() / theirs.norm()))
    known = found["harness, cached"][0] / found["harness, resident, forward KL"][0]
    if not all(gap <= AGREEMENT[device] for gap in gaps) or not 0.9 < known < 1 + AGREEMENT[device]:
        raise SystemExit(
            f"the losses differ by {max(gaps):.1e}, and the cached one is {known:.3f} of the dense one: not the same mathematics"
        )
    return {"largest_difference": max(gaps), "cached_over_dense": known, "entries": float(inputs.targets.counts.float().mean())}


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def spread(values: list[float]) -> dict[str, float]:
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


# ---- memory


def measure_memory(shape: Shape, device: str, trains_head: bool, way: str) -> int:
    """Bytes by which the peak of a fresh process rises in one call: tiles, logits, gradients. Not the inputs, which all ways have."""
    inputs = draw(shape, device, trains_head=trains_head)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        WAYS[way](inputs)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    # What drawing has freed goes back to the system, or the loss would find room there.
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak begins anew, at what is resident now
    before = resident_bytes("VmRSS")
    WAYS[way](inputs)
    return resident_bytes("VmHWM") - before


def resident_bytes(field: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(field)) * 1024
