"""What a trained model is and what it took: the task that made it, and the hours, as its run folder says; and what the next would take, as
the planner says. Nothing is estimated here."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

from harness.embedded import resolve
from harness.errors import EvaluationError, RecipeError
from harness.evaluate.decision.schema import Planned
from harness.planner import Place, plan_recipe
from harness.planner.hours import read_points
from harness.recipe import load

PAUSE_FACTOR = 20
"""A gap in metrics.jsonl that is so many times the median gap is a pause (a kill, a queue), and no training."""


@dataclass(frozen=True)
class Training:
    """`hours` is None where nothing measured them, and `basis` says from where they are, or why there are none."""

    task: str | None
    hours: float | None
    basis: str
    other_base: str | None = None
    """What the model was trained from, where its export says so and that is not the decision's base."""


def plan_training(planned: Planned) -> dict:
    """{"recipe", "hours", "gpu_hours", "basis"} of the training that would come. Raises RecipeError where nothing can be said."""
    recipe = load(planned.recipe)
    speed = Path(planned.measured) if planned.measured else None
    place = Place(planned.processes, planned.nodes)
    plan = plan_recipe(recipe, place, tokens_per_epoch=planned.tokens, tokens_per_s=planned.tokens_per_s, measured=speed)
    if plan.hours is None:
        raise RecipeError(f"plan: {planned.recipe} does not say how many tokens it trains; set plan.tokens, or max_steps in the recipe")
    basis = f"{plan.work.tokens:,.0f} tokens ({plan.work.basis}) at {plan.hours.tokens_per_s:,.0f} a second ({plan.hours.basis})"
    return {"recipe": planned.recipe, "hours": plan.hours.hours, "gpu_hours": plan.hours.gpu_hours, "basis": basis}


def find_model(name: str, key: str) -> Path:
    """The folder to load, of a run its export; a hub id stays as it is. Raises EvaluationError for a run without an export."""
    path = Path(resolve(name)).expanduser()
    if (path / "final").is_dir():
        return path / "final"
    if (path / "run.json").is_file() or (path / "recipe.yaml").is_file():
        raise EvaluationError(f"{key} = {name}: the run there has no final/ yet; train it to its end (`harness run`), or name another")
    if not path.is_dir() and (name.startswith("runs/") or not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name)):
        raise EvaluationError(f"{key} = {name}: there is no such folder; must be a model's or a run's folder, or a hub id")
    return path


def read_training(model: Path, base: Path | None) -> Training:
    """Of the run that a model was exported by: the export says its task, and the folder above it has its metrics.

    base: the one that it should have been trained from, None for any.
    """
    from harness.model.export import digest_base

    file = model / "harness.json"
    manifest = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    trained_from, here = manifest.get("base_digest"), base and digest_base(str(base))
    other = manifest.get("base") if trained_from and here and trained_from != here else None
    return replace(_read_hours(model, manifest.get("task")), other_base=other)


def _read_hours(model: Path, task: str | None) -> Training:
    run = model.parent
    if not (run / "metrics.jsonl").is_file():
        return Training(task, None, f"{model} lies in no run folder, so what its training took is not known")
    try:
        lines = read_points(run / "metrics.jsonl")
    except OSError:
        return Training(task, None, f"{run / 'metrics.jsonl'} cannot be read, so what its training took is not known")
    times = sorted(line["time"] for line in lines if "time" in line)
    gaps = [later - earlier for earlier, later in zip(times, times[1:], strict=False)]
    if not gaps:
        return Training(task, None, f"{run / 'metrics.jsonl'} has fewer than two points in time")
    usual = median(gaps)
    trained = [gap for gap in gaps if gap <= PAUSE_FACTOR * usual]
    # Up to the first line there was as much as between any two.
    seconds = sum(trained) + usual
    return Training(task, seconds / 3600, f"measured: between the lines of {run / 'metrics.jsonl'}, pauses left out")
