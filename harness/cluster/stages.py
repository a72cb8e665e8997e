"""The stages of a pipeline with everything resolved: recipes, models, caches, what is done already, and in which order they may go.

    plan_stages(pipeline) -> [StagePlan]
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from harness.cluster.array import build_elements
from harness.cluster.pipeline import Pipeline, Stage
from harness.cluster.submission import is_finished
from harness.errors import LaunchError, RecipeError
from harness.model.adapters import digest_adapter
from harness.model.export import MANIFEST
from harness.recipe import Recipe, load
from harness.recipe.load import render_value
from harness.run import RunDir
from harness.share import Share, check_share


@dataclass(frozen=True)
class StagePlan:
    """A stage with everything resolved."""

    name: str
    stage: Stage
    recipes: tuple[Recipe, ...]
    """One, or one for each element of its array."""
    model: Path | None
    """The folder that its model is from."""
    merged: frozenset[int] = frozenset()
    """The elements whose adapter is merged into its base, because other stages go on from them."""
    adapter: Path | None = None
    """The folder that its adapter is from."""

    @property
    def runs(self) -> tuple[RunDir, ...]:
        return tuple(map(RunDir.of, self.recipes))

    @property
    def recipes_here(self) -> tuple[Recipe, ...]:
        """On one machine, where one run does all that is shared out."""
        return self.recipes[:1] if self.stage.shares else self.recipes

    @property
    def share_here(self) -> Share | None:
        return Share(self.stage.do) if self.stage.shares else None

    @property
    def awaited(self) -> tuple[str, ...]:
        return tuple(str(folder) for folder in (self.model, self.adapter) if folder)

    def is_done(self, index: int) -> bool:
        return is_finished(self.runs[index], self.recipes[index], index in self.merged)

    @property
    def all_done(self) -> bool:
        """Where work is shared out, whoever ends last has found it all done."""
        done = map(self.is_done, range(len(self.recipes)))
        return any(done) if self.stage.shares else all(done)


def plan_stages(pipeline: Pipeline) -> list[StagePlan]:
    """In the order in which they can begin. Raises RecipeError that lists what is wrong with each stage's recipe."""
    plans: dict[str, StagePlan] = {}
    problems = []
    for name in pipeline.order:
        stage = pipeline.stages[name]
        if not all(part.stage in plans for part in stage.made_elsewhere.values()):
            # Its recipe is wrong, which is said already.
            continue
        model = model_folder(plans[stage.model.stage], stage.model.element or 0) if stage.model else None
        try:
            adapter = adapter_folder(plans[stage.adapter.stage], stage.adapter.element or 0) if stage.adapter else None
            recipes = tuple(_load_recipes(pipeline, name, stage, model, adapter))
            plans[name] = StagePlan(name, stage, recipes, model, adapter=adapter)
        except RecipeError as error:
            problems += [f"stages.{name}: {line}" for line in str(error).splitlines()]
    problems = problems or [problem for plan in plans.values() for problem in _cache_rules(plan, plans)]
    if problems:
        raise RecipeError("\n".join(problems))
    return [_with_merges(plan, plans.values()) for plan in plans.values()]


def model_folder(source: StagePlan, element: int) -> Path:
    """Where the model of a stage lies when it is done."""
    run = source.runs[element]
    return run.merged if source.recipes[element].model.trains_adapter else run.final


def adapter_folder(source: StagePlan, element: int) -> Path:
    """Where the adapter of a stage lies when it is done. Raises RecipeError for a stage that trains none."""
    if not source.recipes[element].model.trains_adapter:
        raise RecipeError(f"adapter.from = {source.name}; that stage trains all weights; write model: {{from: {source.name}}}")
    return source.runs[element].final


def _load_recipes(pipeline: Pipeline, name: str, stage: Stage, model: Path | None, adapter: Path | None) -> list[Recipe]:
    overrides = [f"{key}={render_value(value)}" for key, value in stage.set.items()]
    folder = pipeline.folder / name
    if model:
        replaced = [f"model.{key}=null" for key in ("init", "revision", "tokenizer")]
        overrides = [f"model.name_or_path={render_value(str(model))}", *replaced, *overrides]
    if adapter:
        overrides = [f"model.adapter={render_value(str(adapter))}", *overrides]
    if stage.array:
        return build_elements(stage.recipe, overrides, stage.axes, folder=folder, group=f"{pipeline.folder.name}-{name}")
    folders = [folder / element for element in stage.elements] or [folder]
    recipes = [load(stage.recipe, [*overrides, f"output_dir={render_value(str(each))}"]) for each in folders]
    for share in stage.shares[:1]:
        check_share(recipes[0], share, processes=1)
    return recipes


OF_NO_CONTENT = {"teacher": {"attn_implementation", "trust_remote_code", "device_map"}, "data": {"packing", "num_proc"}}
"""What a capture and a student may say differently, section by section: it does not decide where a cache lies."""


def _cache_rules(plan: StagePlan, plans: dict[str, StagePlan]) -> Iterator[str]:
    """A student finds the cache of a stage that it needs in the folder that both name, or by what decides its content."""
    for source in (plans[need] for need in plan.stage.needs if plans[need].stage.do == "capture"):
        asked = source.recipes[0]
        for recipe in plan.recipes:
            reads = recipe.task == "distill" and recipe.teacher.source == "cache"
            if not reads or recipe.teacher.cache and recipe.teacher.cache == asked.teacher.cache:
                continue
            for key, mine, captured in _differences(recipe, asked):
                yield (
                    f"stages.{plan.name}: {key} = {render_value(mine)}; {source.name}, which it needs, captures with "
                    f"{render_value(captured)}, so its cache would not be found; set both alike, or give both one teacher.cache"
                )


def _differences(recipe: Recipe, asked: Recipe) -> Iterator[tuple[str, Any, Any]]:
    for section, free in OF_NO_CONTENT.items():
        mine, captured = (getattr(one, section).model_dump(mode="json") for one in (recipe, asked))
        yield from ((f"{section}.{key}", mine[key], captured[key]) for key in mine if key not in free and mine[key] != captured[key])


def _with_merges(plan: StagePlan, plans: Iterable[StagePlan]) -> StagePlan:
    merged = frozenset(index for index, run in enumerate(plan.runs) if any(other.model == run.merged for other in plans))
    return replace(plan, merged=merged)


def done_stages(plans: list[StagePlan]) -> set[str]:
    """The names of those of which nothing is left to do. A cache may go when all are done that it was made for."""
    done = {plan.name for plan in plans if plan.all_done}
    for plan in plans:
        needed_by = {other.name for other in plans if plan.name in other.stage.all_needs}
        if plan.stage.shares and needed_by and needed_by <= done:
            done.add(plan.name)
    return done


def check_order(plans: list[StagePlan], done: set[str], live: set[str]) -> None:
    """Raises LaunchError for a stage that cannot be left as it is: one that is done or lives, though what it needs will be made anew, and
    one that was made from another model than the one that is there now."""
    # Units are the same whenever they are made; what was made from them stays what it is.
    shared_out = {plan.name for plan in plans if plan.stage.shares}
    for plan in plans:
        folder = plan.runs[0].path.parent if plan.stage.elements else plan.runs[0].path
        for need in plan.stage.all_needs:
            if plan.name in done and need not in done | shared_out:
                raise LaunchError(
                    f"stage {plan.name}: is complete, but {need}, which it needs, is not (any more); delete {folder} to have it made again"
                )
            if plan.name in live and need not in done | live:
                raise LaunchError(
                    f"stage {plan.name}: a job of it lives, but {need}, which it needs, must begin first; `harness cancel {folder}` ends it"
                )
        if plan.name not in done:
            continue
        for what, place, is_same in (("model", plan.model, is_made_from), ("adapter", plan.adapter, is_gone_on_from)):
            if place and not all(is_same(run, place) for run in plan.runs):
                raise LaunchError(
                    f"stage {plan.name}: was made from another {what} than the one that lies in {place} now; delete {folder} to have it "
                    "made again"
                )


def is_made_from(run: RunDir, model: Path) -> bool:
    """Whether the weights in `model` are those that the run's export was trained from, by the digests that both have recorded."""
    exported = json.loads((run.final / MANIFEST).read_text())
    files = json.loads((model / MANIFEST).read_text())["files"]
    weights = "".join(f"{name} {digest}\n" for name, digest in sorted(files.items()) if name.endswith(".safetensors"))
    # As harness.model.export.digest_base has it.
    return exported["base_digest"] == hashlib.sha256(weights.encode()).hexdigest()


def is_gone_on_from(run: RunDir, adapter: Path) -> bool:
    """Whether the adapter in the folder is the one that the run's export began from."""
    exported = json.loads((run.final / MANIFEST).read_text())
    return exported["lineage"][-1].get("adapter_digest") == digest_adapter(adapter)
