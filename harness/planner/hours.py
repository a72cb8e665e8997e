"""Operations of a run, and how long it takes, from a throughput that was measured or stated. Nothing is said about time without one."""

import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from harness.errors import RecipeError
from harness.planner.flops import FlopCount, flops_of
from harness.planner.setting import Setting
from harness.planner.states import count_parameters, trained_adapter


@dataclass(frozen=True)
class Work:
    tokens_per_step: float
    """Of all ranks, at most."""
    flops_per_token: float
    """Forward and backward, in sequences of max_length; recomputation is not counted."""
    steps: int | None
    tokens: float | None
    """Of the whole run, where known."""
    basis: str
    """Where the number of tokens is from."""

    @property
    def flops(self) -> float | None:
        return None if self.tokens is None else self.tokens * self.flops_per_token


@dataclass(frozen=True)
class Hours:
    hours: float
    gpu_hours: float
    tokens_per_s: float
    """Of all GPUs together."""
    basis: str


def count_operations(setting: Setting) -> FlopCount:
    shape, recipe = setting.shape, setting.recipe
    counts = count_parameters(shape, recipe)
    head = shape.embedding if shape.has_head else shape.hidden
    return flops_of(
        head,
        shape.visited,
        attention_layers=shape.layers,
        heads=shape.heads,
        head_dim=shape.head_dim,
        trainable_fraction=0.0 if trained_adapter(recipe) else 1.0,
        adapter_params=counts.adapter,
    )


def plan_work(setting: Setting, tokens_per_epoch: float | None) -> Work:
    recipe, length = setting.recipe, setting.recipe.data.max_length
    train = recipe.train
    rows = setting.accumulation * train.per_device_train_batch_size * setting.world
    per_step = setting.tokens.expected / train.per_device_train_batch_size * rows
    per_token = count_operations(setting).total(1, 1, (length + 1) / 2)
    if tokens_per_epoch:
        epochs = train.num_train_epochs or 1
        tokens, basis = tokens_per_epoch * epochs, f"--tokens, {epochs:g} epochs"
        if train.max_steps:
            tokens, basis = train.max_steps * per_step, f"max_steps = {train.max_steps}, full batches"
    elif train.max_steps:
        tokens, basis = train.max_steps * per_step, f"max_steps = {train.max_steps}, full batches"
    else:
        return Work(per_step, per_token, None, None, "how many tokens the data has is not known here; say so with --tokens")
    return Work(per_step, per_token, train.max_steps or max(1, round(tokens / per_step)), tokens, basis)


def plan_hours(work: Work, world: int, tokens_per_s: float | None, run: Path | None) -> Hours | None:
    """tokens_per_s: of all GPUs, as stated. run: a run folder whose own speed is taken. None where nothing says how fast, or how much."""
    if work.tokens is None or (tokens_per_s is None and run is None):
        return None
    speed, basis = (tokens_per_s, "stated") if run is None else (measured_speed(run), f"measured in {run}")
    hours = work.tokens / speed / 3600
    return Hours(hours, hours * world, speed, basis)


def read_points(file: Path) -> list[dict]:
    """The lines of a metrics.jsonl, without those that a life left torn that was killed while it wrote. Raises OSError."""
    points = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        with suppress(ValueError):
            points.append(json.loads(line))
    return [point for point in points if isinstance(point, dict)]


def measured_speed(run: Path) -> float:
    """The median of a run's speed/tokens_per_s; its first line, in which kernels are compiled, is left out. Raises RecipeError."""
    file = run / "metrics.jsonl"
    try:
        points = read_points(file)
    except OSError as error:
        raise RecipeError(f"measured = {run}: {file} cannot be read ({error}); train that run first, or state tokens_per_s") from None
    speeds = [point["speed/tokens_per_s"] for point in points if "speed/tokens_per_s" in point]
    if not speeds:
        raise RecipeError(f"measured = {run}: {file} holds no speed/tokens_per_s; give a run that has trained a few steps")
    return median(speeds[1:] or speeds)
