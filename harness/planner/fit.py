"""What would make a recipe fit: single changes, each planned anew, and a search for the fastest setting at the same global batch.

How fast a setting would be is arithmetic with the stated assumptions below, good for an order and not for a time: no throughput is measured
here, and none is printed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations, product

from harness.errors import HarnessError
from harness.planner.architecture import Architecture
from harness.planner.flops import PEAK_FLOPS
from harness.planner.host import plan_host
from harness.planner.hours import count_operations
from harness.planner.memory import GpuMemory, plan_memory
from harness.planner.plan import Place, build_setting
from harness.planner.setting import BYTES, Setting
from harness.planner.states import count_parameters
from harness.recipe import Recipe
from harness.recipe.load import apply_override, validate
from harness.recipe.rules import check_rules

PEAK_SHARE, HALF_SPEED_TOKENS = 0.5, 512
"""Of the card's peak, for long micro-batches; and those of so many tokens reach half of that."""
WITHIN_NODE, BETWEEN_NODES, TO_HOST, OWN_MEMORY = 200e9, 25e9, 20e9, 2e12
"""Bytes a second of one GPU."""
OFFLOAD = ("backend=zero3-offload", "train.optim=adamw_torch")


@dataclass(frozen=True)
class Change:
    """What a person would write, and what it costs."""

    overrides: tuple[str, ...]
    what: str
    is_other_run: bool = False
    """What is learnt, or from what, is no longer the same."""
    nodes: int | None = None


@dataclass(frozen=True)
class Fitting:
    change: Change
    memory: GpuMemory
    slower: float
    """Of the step, over the recipe as it is; by arithmetic."""


def changed(recipe: Recipe, overrides: tuple[str, ...]) -> Recipe | None:
    """The recipe with these overrides; None where a rule forbids them."""
    settings = recipe.model_dump(mode="json")
    for override in overrides:
        apply_override(settings, override)
    try:
        other = validate(Recipe, settings, "")
    except HarnessError:
        return None
    return None if check_rules(other) else other


# ---- the cheapest changes


def plan_changes(setting: Setting, place: Place, count: int = 3) -> list[Fitting]:
    """The cheapest changes with which it is expected to fit: first those of the same run, by what they cost in time; of two together only
    where there are too few that do it alone."""
    if place.gpu is None or setting.recipe.task == "generate":
        return []
    shapes = _shapes(setting)
    singles = list(_single_changes(setting))
    found = [fitting for change in singles if (fitting := _try(setting, place, change, shapes))]
    if len(found) < count:
        alone = {fitting.change.overrides for fitting in found}
        pairs = (
            Change(a.overrides + b.overrides, f"{a.what}; {b.what}", a.is_other_run or b.is_other_run, a.nodes or b.nodes)
            for a, b in combinations([change for change in singles if change.overrides not in alone], 2)
            if not _keys(a) & _keys(b)
        )
        found += [fitting for change in pairs if (fitting := _try(setting, place, change, shapes))]
    return sorted(found, key=lambda fitting: (fitting.change.is_other_run, fitting.slower))[:count]


def _keys(change: Change) -> set[str]:
    return {override.partition("=")[0] for override in change.overrides} | ({"nodes"} if change.nodes else set())


def _shapes(setting: Setting) -> dict[str, Architecture]:
    recipe = setting.recipe
    shapes = {recipe.model.init or recipe.model.name_or_path: setting.shape}
    if setting.teacher is not None:
        shapes[recipe.teacher.name_or_path] = setting.teacher
    return shapes


def _try(setting: Setting, place: Place, change: Change, shapes: dict[str, Architecture]) -> Fitting | None:
    recipe = changed(setting.recipe, change.overrides)
    if recipe is None:
        return None
    nodes = change.nodes or place.nodes
    try:
        other = build_setting(recipe, Place(place.gpus_per_node, nodes, place.gpu), shapes)
        memory = plan_memory(other)
        slower = step_s(other, place) / step_s(setting, place)
    except HarnessError:
        # Another number of ranks may not make the global batch.
        return None
    if place.host_bytes and _host_bytes(other) > max(place.host_bytes, _host_bytes(setting)):
        return None
    return Fitting(change, memory, slower) if memory.peak.expected <= place.gpu.bytes else None


def _host_bytes(setting: Setting) -> float:
    return sum(size.expected for size in plan_host(setting).values())


def _single_changes(setting: Setting) -> Iterator[Change]:
    recipe, train, world = setting.recipe, setting.recipe.train, setting.world
    rows = train.per_device_train_batch_size
    if not train.gradient_checkpointing:
        yield Change(("train.gradient_checkpointing=true",), "recompute activations in the backward pass")
    for fewer in sorted({rows // 2, 1}, reverse=True):
        if 0 < fewer < rows and rows % fewer == 0:
            yield Change(same_global_batch(setting, fewer), f"{fewer} rows at once, the same global batch")
    if world > 1:
        for backend in ("zero2", "zero3", "fsdp2"):
            if backend != setting.backend.name:
                yield Change((f"backend={backend}",), f"shard by {backend}")
    if not setting.backend.offloads and not recipe.model.trains_adapter:
        yield Change(OFFLOAD, "keep states and weights in host memory", is_other_run=not train.optim.startswith("adamw_torch"))
    if setting.backend.shards_parameters:
        overrides = () if train.global_batch_size else same_global_batch(setting, rows)
        yield Change(overrides, f"{2 * setting.nodes} nodes in place of {setting.nodes}", nodes=2 * setting.nodes)
    if train.optim.startswith("adamw_torch"):
        yield Change(("train.optim=adamw_8bit",), "the optimiser's moments in 8 bits", is_other_run=True)
    if recipe.model.trains_adapter and not recipe.model.quantization:
        yield Change(("model.quantization={load_in_4bit: true}",), "the frozen base in 4 bits (QLoRA)", is_other_run=True)
    if recipe.task in ("dpo", "kto") and getattr(recipe, recipe.task).reference == "resident":
        yield Change((f"{recipe.task}.reference=cached",), "the reference's log-probabilities computed once, before")
    if recipe.teacher and recipe.teacher.source == "resident" and not recipe.teacher.quantization:
        yield Change(("teacher.quantization={load_in_4bit: true}",), "the teacher in 4 bits", is_other_run=True)
    if not recipe.model.trains_adapter and not recipe.model.init:
        yield Change(("model.lora={r: 16, alpha: 32}",), "train an adapter in place of all weights", is_other_run=True)
    half = recipe.data.max_length // 2
    if half >= 256:
        yield Change((f"data.max_length={half}",), f"rows of at most {half} tokens", is_other_run=True)


def same_global_batch(setting: Setting, rows: int) -> tuple[str, ...]:
    """Overrides for `rows` at once on each rank."""
    train = setting.recipe.train
    whole = train.global_batch_size or train.per_device_train_batch_size * setting.world * setting.accumulation
    overrides = (f"train.per_device_train_batch_size={rows}", f"train.global_batch_size={whole}")
    return overrides if train.gradient_accumulation_steps is None else (*overrides, "train.gradient_accumulation_steps=null")


# ---- the search


def search(setting: Setting, place: Place) -> Fitting | None:
    """The fastest by arithmetic of all backends, micro-batches, with and without checkpointing and (for an adapter) 4 bits, that fits even
    at its highest; where none does, that is expected to. None where nothing fits."""
    shapes, recipe = _shapes(setting), setting.recipe
    train, found = recipe.train, []
    whole = train.global_batch_size or train.per_device_train_batch_size * setting.world * setting.accumulation
    each = whole // setting.world if whole % setting.world == 0 else 0
    if setting.world == 1:
        backends = [(), ("backend=single",)] if setting.backend.name != "single" else [()]
    else:
        backends = [(f"backend={name}",) for name in ("ddp", "zero1", "zero2", "zero3", "fsdp2")]
    if not recipe.model.trains_adapter:
        backends.append(OFFLOAD)
    quantized = bool(recipe.model.quantization)
    types = [("model.quantization={load_in_4bit: true}",), ("model.quantization=null",)] if recipe.model.trains_adapter else [()]
    for backend, rows, checkpoints, kind in product(backends, _divisors(each), ("false", "true"), types):
        is_quantized = kind == types[0] if recipe.model.trains_adapter else quantized
        kind_of_run = kind if recipe.model.trains_adapter and is_quantized != quantized else ()
        overrides = (*backend, *same_global_batch(setting, rows), f"train.gradient_checkpointing={checkpoints}", *kind_of_run)
        is_other_run = bool(kind_of_run) or backend == OFFLOAD and not train.optim.startswith("adamw_torch")
        fitting = _try(setting, place, Change(overrides, "", is_other_run), shapes)
        if fitting:
            found.append(fitting)
    sure = [fitting for fitting in found if fitting.memory.peak.high <= place.gpu.bytes]
    return min(sure or found, key=lambda fitting: (fitting.slower, fitting.memory.peak.expected), default=None)


def _divisors(each: int, most: int = 64) -> list[int]:
    return [rows for rows in range(1, min(each, most) + 1) if each % rows == 0 and rows & (rows - 1) == 0]


def step_s(setting: Setting, place: Place) -> float:
    """Seconds of an optimiser step, for an order only."""
    recipe, backend, counts = setting.recipe, setting.backend, count_parameters(setting.shape, setting.recipe)
    tokens, length = setting.tokens.expected, recipe.data.max_length
    flops = count_operations(setting).total(tokens, tokens, tokens * (length + 1) / 2)
    if recipe.train.gradient_checkpointing:
        # One more forward: a third of 6N, half of 4N.
        flops *= 3 / 2 if recipe.model.trains_adapter else 4 / 3
    peak = PEAK_FLOPS.get(place.gpu.flops_name if place.gpu else None, 312e12)
    micro = flops / (peak * PEAK_SHARE * tokens / (tokens + HALF_SPEED_TOKENS))
    if recipe.model.quantization:
        passes = 3 if recipe.train.gradient_checkpointing else 2
        micro += passes * counts.in_4bit * 2.5 / OWN_MEMORY
    wire = WITHIN_NODE if setting.nodes == 1 else BETWEEN_NODES * setting.gpus_per_node
    width = BYTES[setting.dtype] if not setting.halves else 2
    others = 1 - 1 / setting.world
    weights = (counts.whole * width + counts.in_4bit / 2) * others / wire
    gradients = counts.trained * width * others / wire
    once = 0.0
    if backend.shards_parameters:
        micro += (3 if recipe.train.gradient_checkpointing else 2) * weights + gradients
    elif backend.zero_stage == 2:
        micro += gradients
        once += gradients
    else:
        once += 2 * gradients
    if backend.offloads:
        once += counts.trained * 16 / setting.world / TO_HOST
        micro += 2 * counts.whole * width / setting.world / TO_HOST if backend.offloads_parameters else 0
    return micro * setting.accumulation + once
