"""Arrays: one recipe with several values of some of its settings, sent as one job of Slurm's with an element for each combination.

    ARRAY/array.json      {"runs": [names of the elements' folders], "at_once", "jobs": [{"id", "submitted", "why"}]}
    ARRAY/array.sbatch    the script, as it was sent
    ARRAY/logs/           slurm-JOB_ELEMENT.log: what each element's job has said
    ARRAY/00-NAME/ ...    the elements: run folders like any other, with a job.sbatch of their own for when they are sent again alone

The promise: every element is a whole run, and what is wrong with one of them is found before anything is made for any. Sent again, an array
sends those that are not done; an element keeps its index for life.
"""

import itertools
import json
import os
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from harness.cluster import slurm
from harness.cluster.render import render_array
from harness.cluster.submission import (
    Submission,
    check_are_free,
    check_can_begin,
    dependency_flags,
    is_finished,
    note_job,
    save_submission,
)
from harness.errors import LaunchError, RecipeError
from harness.recipe import Recipe, load, render_recipe
from harness.run import RunDir, write_text_atomically

SCRIPT, ARRAY = "array.sbatch", "array.json"
NAME_LENGTH = 60


# ---- which runs


@dataclass(frozen=True)
class Axis:
    """A setting of the recipe and the values that it takes in turn, as text: as they would stand after the = of an override."""

    key: str
    values: tuple[str, ...]


def parse_axis(text: str) -> Axis:
    """`train.learning_rate=1e-3,1e-2`. What stands after the = is the inside of a YAML list: a value that holds a comma stands in quotes or
    is a list in brackets. Raises RecipeError for what cannot be read so."""
    key, equals, inside = text.partition("=")
    if not equals or not key or not inside.strip():
        raise RecipeError(f"--array {text}: write key.path=value,value, for example train.learning_rate=1e-4,1e-3")
    try:
        found = yaml.compose(f"[{inside}]", yaml.SafeLoader)
        # A bracket or a # in the text can end the list early, and YAML overlooks a comma after the last value.
        is_whole = found.end_mark.index == len(inside) + 2 and not inside.rstrip().endswith(",")
    except yaml.YAMLError:
        is_whole = False
    if not is_whole:
        raise RecipeError(
            f"--array {text}: its values cannot be told apart; part them by single commas, and put one that holds , or [ in quotes"
        )
    return Axis(key, tuple(inside[node.start_mark.index - 1 : node.end_mark.index - 1].strip() for node in found.value))


def build_elements(
    source: str, overrides: Iterable[str], axes: Iterable[Axis], *, folder: Path | None = None, group: str = ""
) -> list[Recipe]:
    """A recipe for each combination, the last axis fastest, each with a folder of its own below `folder` (left out: the recipe's
    output_dir) and in W&B's group `group` (left out: the folder's name), unless the recipe has one.

    Raises RecipeError for what is wrong with the axes, or with any of the recipes.
    """
    overrides, axes = list(overrides), list(axes)
    check_axes(overrides, axes)
    points = [
        [f"{axis.key}={value}" for axis, value in zip(axes, values, strict=True)]
        for values in itertools.product(*(axis.values for axis in axes))
    ]
    recipes = [load(source, [*overrides, *point]) for point in points]
    folder = folder or RunDir.of(recipes[0]).path
    first_like: dict[str, int] = {}
    for index, recipe in enumerate(recipes):
        first = first_like.setdefault(render_recipe(recipe), index)
        if first != index:
            raise RecipeError(f"array: {' '.join(points[first])} and {' '.join(points[index])} are the same run; leave one of them out")
    names = element_names(axes)
    return [_placed(recipe, folder / name, group or folder.name) for recipe, name in zip(recipes, names, strict=True)]


def check_axes(overrides: list[str], axes: list[Axis]) -> None:
    given = {override.partition("=")[0] for override in overrides}
    seen: set[str] = set()
    for axis in axes:
        if axis.key == "output_dir":
            raise RecipeError("array output_dir: each element has a folder of its own below output_dir; leave it out")
        if axis.key in seen:
            raise RecipeError(f"array {axis.key}: stands twice; write all of its values in one")
        if axis.key in given:
            raise RecipeError(f"array {axis.key}: {axis.key} is also set to one value; remove that, or the array")
        seen.add(axis.key)


def element_names(axes: list[Axis]) -> list[str]:
    """`00-learning_rate=1e-3_seed=1`: the index makes it unique, the rest is for people."""
    leaves = [axis.key.split(".")[-1] for axis in axes]
    labels = [leaf if leaves.count(leaf) == 1 else axis.key for leaf, axis in zip(leaves, axes, strict=True)]
    points = list(itertools.product(*(axis.values for axis in axes)))
    width = max(2, len(str(len(points) - 1)))
    names = []
    for index, values in enumerate(points):
        safe = [re.sub(r"[^\w.+-]+", "-", value).strip("-") for value in values]
        words = "_".join(f"{label}={value}" for label, value in zip(labels, safe, strict=True))
        names.append(f"{index:0{width}}-{words[:NAME_LENGTH]}")
    return names


def _placed(recipe: Recipe, folder: Path, group: str) -> Recipe:
    tracking = recipe.tracking.model_copy(update={"group": recipe.tracking.group or group})
    return recipe.model_copy(update={"output_dir": str(folder), "tracking": tracking})


# ---- sending them


@dataclass(frozen=True)
class Array:
    """Runs that are sent as one job. All ask for the same of the cluster."""

    elements: tuple[Submission, ...]
    at_once: int | None = None
    """So many run at a time; None: as many as there is room for."""

    @property
    def folder(self) -> Path:
        return self.elements[0].run.path.parent

    @property
    def runs(self) -> tuple[RunDir, ...]:
        return tuple(element.run for element in self.elements)

    def unfinished(self) -> list[int]:
        """The indices of the elements that have something left to do."""
        return [index for index, one in enumerate(self.elements) if one.fresh or not is_finished(one.run, one.recipe, one.merge)]


def render(array: Array) -> str:
    """The script, after everything was checked that can be without a folder."""
    check_array(array)
    return render_script(array)


def submit(array: Array) -> str:
    """Check every element, make the folders of those that are not done, send them. Returns the job's id."""
    check_array(array)
    save_array(array)
    return send_array(array)


def check_array(array: Array) -> None:
    """Raises a HarnessError that says what is wrong with the array, or with the first element with which something is."""
    check_are_free(array.runs)
    if not array.unfinished():
        raise LaunchError(f"{array.folder}: all {len(array.elements)} runs of this array are complete; --fresh begins them again")
    check_can_begin_array(array)


def check_can_begin_array(array: Array) -> None:
    """What does not depend on whether the array is done or lives."""
    check_place(array)
    for index in array.unfinished():
        check_can_begin(array.elements[index])


def check_place(array: Array) -> None:
    """Raises LaunchError for a folder that holds something else, another array included: its runs would stand beside these."""
    folder, names = array.folder, [run.path.name for run in array.runs]
    if (folder / ARRAY).is_file():
        if read_array(folder)["runs"] != names:
            raise LaunchError(
                f"{folder}: holds an array of other values ({', '.join(read_array(folder)['runs'][:3])}, ...); choose another output_dir"
            )
    elif folder.is_dir() and any(entry.name not in names for entry in folder.iterdir()):
        raise LaunchError(f"{folder}: holds what is not an array's; choose an output_dir that is new or this array's alone")


def save_array(array: Array) -> None:
    """Make the folders of the elements that are to be sent, and the array's own."""
    for index in array.unfinished():
        save_submission(array.elements[index])
    (array.folder / "logs").mkdir(exist_ok=True)
    write_text_atomically(array.folder / SCRIPT, render_script(array))
    before = read_array(array.folder)["jobs"] if (array.folder / ARRAY).is_file() else []
    _write_array(array, before)


def send_array(array: Array) -> str:
    """Send what `save_array` has made. Returns the job's id."""
    sent = array.unfinished()
    flags = [f"--chdir={os.getcwd()}", *dependency_flags(array.elements[0].after)]
    if len(sent) < len(array.elements):
        flags.append(f"--array={','.join(map(str, sent))}" + (f"%{array.at_once}" if array.at_once else ""))
    job_id = slurm.submit_script(array.folder / SCRIPT, *flags)
    _write_array(array, [*read_array(array.folder)["jobs"], {"id": job_id, "submitted": time.time(), "why": "submitted"}])
    for index in sent:
        note_job(array.elements[index].run, f"{job_id}_{index}", "submitted")
    return job_id


def render_script(array: Array) -> str:
    job = array.elements[0].batch_job()
    return render_array(replace(job, name=array.folder.name, run=array.folder), tuple(run.path for run in array.runs), array.at_once)


def load_array(folder: Path) -> tuple[list[RunDir], int | None]:
    """The runs of an array that was sent before, and how many of them there are at a time."""
    content = read_array(folder)
    return [RunDir(folder / name) for name in content["runs"]], content["at_once"]


def read_array(folder: Path) -> dict:
    return json.loads((folder / ARRAY).read_text())


def _write_array(array: Array, jobs: list[dict]) -> None:
    content = {"runs": [run.path.name for run in array.runs], "at_once": array.at_once, "jobs": jobs}
    write_text_atomically(array.folder / ARRAY, json.dumps(content, indent=2) + "\n")


def element_id(environment: dict[str, str]) -> str:
    """The id of the job whose environment this is; of an array's element `123_4`, because its plain id may be that of the whole array."""
    if "SLURM_ARRAY_JOB_ID" in environment:
        return f"{environment['SLURM_ARRAY_JOB_ID']}_{environment['SLURM_ARRAY_TASK_ID']}"
    return environment["SLURM_JOB_ID"]
