"""What a plan is made of: ranges of bytes, and all that decides how much memory a run takes."""

from __future__ import annotations

from dataclasses import dataclass, field

from harness.errors import RecipeError
from harness.planner.architecture import Architecture
from harness.planner.gpus import GIB
from harness.recipe import Recipe
from harness.recipe.backend import Backend
from harness.recipe.precision import autocasts_bf16, choose_dtype

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

SHORT_ROWS = 1 / 8
"""Of max_length, for the low estimate of batches that are not packed: rows may be that short."""


@dataclass(frozen=True)
class Range:
    """Bytes."""

    low: float
    expected: float
    high: float

    @classmethod
    def exact(cls, size: float) -> Range:
        return cls(size, size, size)

    def __add__(self, other: Range) -> Range:
        return Range(self.low + other.low, self.expected + other.expected, self.high + other.high)

    def at_least(self, other: Range) -> Range:
        return Range(max(self.low, other.low), max(self.expected, other.expected), max(self.high, other.high))

    def times(self, low: float, expected: float, high: float) -> Range:
        return Range(self.low * low, self.expected * expected, self.high * high)


NOTHING = Range.exact(0)
RUNTIME = Range(0.3 * GIB, 0.6 * GIB, 1.2 * GIB)
"""The CUDA context, cuBLAS's workspaces and NCCL's buffers; assumed, not measured here."""
SLACK = (0.0, 0.02, 0.08)
"""Of all else: what torch's allocator rounds up and cannot use in between; assumed, not measured here."""


@dataclass(frozen=True)
class Setting:
    """All that decides how much memory a run takes."""

    recipe: Recipe
    backend: Backend
    shape: Architecture
    gpus_per_node: int = 1
    nodes: int = 1
    bf16_hardware: bool = True
    teacher: Architecture | None = None
    """Of a resident teacher."""
    gpu_bytes: int | None = None
    runtime: Range = field(default=RUNTIME)
    """Nothing where tensors alone are counted."""
    slack: tuple[float, float, float] = SLACK

    @property
    def world(self) -> int:
        return self.gpus_per_node * self.nodes

    @property
    def dtype(self) -> str:
        return choose_dtype(self.recipe, self.backend, bf16_hardware=self.bf16_hardware)

    @property
    def halves(self) -> bool:
        """Trained in bfloat16 or float16, by autocast or by an engine."""
        return self.recipe.train.fp16 or autocasts_bf16(self.recipe, self.bf16_hardware)

    @property
    def engine_casts(self) -> bool:
        """DeepSpeed casts every weight that is not in 4 bits; FSDP2 casts what it gathers."""
        return self.backend.kind in ("deepspeed", "fsdp") and self.halves

    @property
    def is_packed(self) -> bool:
        """Batches are filled up to max_length (harness.tasks.job.settle, on a GPU that has a kernel for it)."""
        recipe = self.recipe
        if recipe.data.packing != "auto":
            return recipe.data.packing
        return self.flattens and recipe.task not in ("dpo", "kto", "reward", "rlhf")

    @property
    def flattens(self) -> bool:
        """Samples lie one after another, without padding and a mask of it."""
        has_kernel = self.bf16_hardware and self.halves and self.recipe.model.attn_implementation not in ("sdpa", "eager")
        return has_kernel and not self.writes

    @property
    def writes(self) -> bool:
        """Its model writes what it learns from."""
        return self.recipe.distill.on_policy is not None or self.recipe.task == "rlhf"

    @property
    def accumulation(self) -> int:
        """Micro-batches per step. Raises RecipeError where the global batch cannot be made."""
        train = self.recipe.train
        if train.global_batch_size is None:
            return train.gradient_accumulation_steps or 1
        at_once = train.per_device_train_batch_size * self.world
        if train.global_batch_size % at_once:
            raise RecipeError(
                f"train.global_batch_size = {train.global_batch_size}; {self.world} ranks with per_device_train_batch_size = "
                f"{train.per_device_train_batch_size} take {at_once} rows at once, which does not divide it"
            )
        return train.global_batch_size // at_once

    @property
    def tokens(self) -> Range:
        """Of a micro-batch."""
        rows = self.recipe.train.per_device_train_batch_size * (2 if self.recipe.task in ("dpo", "reward") else 1)
        most = rows * self.recipe.data.max_length
        return Range(most * (0.9 if self.is_packed else SHORT_ROWS), most, most)
