"""A whole plan: memory of a GPU, host, disk, operations and hours of a recipe on so many GPUs, and whether it fits."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from harness.planner.architecture import Architecture, as_reward_model, load_architecture
from harness.planner.gpus import Gpu
from harness.planner.host import plan_disk, plan_host
from harness.planner.hours import Hours, Work, plan_hours, plan_work
from harness.planner.memory import GpuMemory, plan_memory
from harness.planner.setting import Range, Setting
from harness.planner.states import reward_model_bytes, reward_models
from harness.recipe import Recipe
from harness.recipe.backend import load_backend


@dataclass(frozen=True)
class Place:
    """Where a recipe is to run."""

    gpus_per_node: int = 1
    nodes: int = 1
    gpu: Gpu | None = None
    host_bytes: int | None = None

    @property
    def world(self) -> int:
        return self.gpus_per_node * self.nodes


@dataclass(frozen=True)
class Plan:
    setting: Setting
    place: Place
    memory: GpuMemory
    host: dict[str, Range]
    disk: dict[str, Range]
    work: Work | None
    """Of a recipe that trains."""
    hours: Hours | None

    @property
    def verdict(self) -> str:
        """`fits`: even at its highest. `tight`: expected to fit. `does not fit`: expected not to. `cannot fit`: not even at its lowest."""
        if self.place.gpu is None:
            return "unknown"
        peak, holds = self.memory.peak, self.place.gpu.bytes
        if peak.low > holds:
            return "cannot fit"
        if peak.expected > holds:
            return "does not fit"
        return "fits" if peak.high <= holds else "tight"

    @property
    def not_counted(self) -> list[str]:
        """Reward models that are not there yet, so that nothing says how large they are."""
        return [name for name in reward_models(self.setting.recipe) if reward_model_bytes(name) is None]

    @property
    def fits(self) -> bool:
        return self.verdict not in ("cannot fit", "does not fit")


def plan_recipe(
    recipe: Recipe,
    place: Place,
    *,
    tokens_per_epoch: float | None = None,
    trained_share: float = 1.0,
    tokens_per_s: float | None = None,
    measured: Path | None = None,
) -> Plan:
    """Raises ModelError where the model's shapes are not to be found, RecipeError where the recipe does not fit the model or the ranks.

    trained_share: of the tokens, for a teacher's cache.
    """
    setting = build_setting(recipe, place)
    memory, host = plan_memory(setting), plan_host(setting)
    work = plan_work(setting, tokens_per_epoch) if recipe.task != "generate" else None
    tokens = tokens_per_epoch if work is not None else None
    disk = plan_disk(setting, tokens, tokens * trained_share if tokens else None)
    hours = plan_hours(work, setting.world, tokens_per_s, measured) if work is not None else None
    return Plan(setting, place, memory, host, disk, work, hours)


def build_setting(recipe: Recipe, place: Place, shapes: dict[str, Architecture] | None = None) -> Setting:
    """shapes: of models that were read before, by name."""
    shapes = {} if shapes is None else shapes

    def shape_of(name: str, revision: str | None) -> Architecture:
        if name not in shapes:
            shapes[name] = load_architecture(name, revision)
        return shapes[name]

    shape = shape_of(recipe.model.init or recipe.model.name_or_path, recipe.model.revision)
    if recipe.model.init:
        # Drawn anew from the config; weights that lie beside it are not read.
        shape = replace(shape, counted=None)
    if recipe.task == "reward":
        shape = as_reward_model(shape)
    teacher = recipe.teacher
    resident = teacher is not None and teacher.source == "resident"
    return Setting(
        recipe=recipe,
        backend=load_backend(recipe.backend),
        shape=shape,
        gpus_per_node=place.gpus_per_node,
        nodes=place.nodes,
        bf16_hardware=place.gpu.has_bf16 if place.gpu else True,
        teacher=shape_of(teacher.name_or_path, teacher.revision) if resident else None,
        gpu_bytes=place.gpu.bytes if place.gpu else None,
    )
