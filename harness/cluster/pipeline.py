"""Pipelines: stages that need one another, each a recipe, with the model that one makes the beginning of another, or its teacher's cache.

    stages:
      base:  {recipe: tiny/sft-full, set: {train.max_steps: 10}}
      adapt: {recipe: tiny/sft-lora, model: {from: base}}
      sweep: {recipe: tiny/sft-lora, model: {from: base}, array: {train.learning_rate: [1e-3, 1e-2]}, at_once: 2}
      last:  {recipe: tiny/sft-lora, model: {from: adapt}, needs: [sweep], nodes: 2, time: "1:00:00"}
      ask:   {do: capture, recipe: tiny/distill-offline, shards: 8, at_once: 4}
      learn: {recipe: tiny/distill-offline, needs: [ask]}
      prefer: {recipe: tiny/dpo-lora, model: {from: base}, adapter: {from: adapt}, set: {model.lora: null}}

    load_pipeline(find_pipeline("pipelines/tiny"), ["adapt.train.max_steps=3"]) -> Pipeline; stages.py makes runs of it

The file is as strict as a recipe, and the same on one machine (`harness run`) and on a cluster (`harness submit`, harness.cluster.chain).

    PIPELINE/pipeline.yaml   the resolved file
    PIPELINE/pipeline.json   {"directory": where its relative paths begin}
    PIPELINE/STAGE/          the run folder of the stage, or the folder of its array or its shards

The promise: what is wrong with any stage is found before the first one begins, and a stage that is done was made from the model that lies
there now. Units that others have done need not be done again: a stage that captures is done when the cache is whole.
"""

import difflib
import graphlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from harness.cluster.array import Axis, element_names
from harness.cluster.schema import TimeLimit
from harness.errors import LaunchError, RecipeError
from harness.recipe.load import read_value, read_yaml, render_value, render_yaml, validate
from harness.recipe.schema import NonNegativeInt, PositiveInt, Section
from harness.resources import find_config
from harness.run import write_text_atomically
from harness.share import Share

PIPELINE, FACTS = "pipeline.yaml", "pipeline.json"


class ModelOf(Section):
    """The model that another stage makes, with its tokenizer, in place of the recipe's `name_or_path`, `init`, `revision` and `tokenizer`.
    An adapter is merged into its base for it."""

    stage: str = Field(alias="from")
    element: NonNegativeInt | None = None
    """Which run of an array, from 0."""


class Stage(Section):
    recipe: str
    """A file, or the name of a shipped recipe."""
    do: Literal["train", "capture"] = "train"
    """`capture`: have the recipe's teacher asked about its data, once for all stages that learn from it (`harness capture`)."""
    shards: PositiveInt | None = None
    """So many jobs share a capture out among them, each with all processes of its nodes. Left out: one. `harness run` has one in any case.
    """
    set: dict[str, Any] = {}
    """Overrides of the recipe: {train.max_steps: 10}."""
    model: ModelOf | None = None
    adapter: ModelOf | None = None
    """The adapter that another stage trains, as the recipe's `model.adapter`: gone on from, and not merged. The base is the recipe's, or
    the stage's `model`, and has to be the one that the adapter was trained on."""
    needs: tuple[str, ...] = ()
    """Stages that must have succeeded before this one begins; those that its model and its adapter are from are among them without being
    named."""
    array: dict[str, Annotated[tuple[Any, ...], Field(min_length=1)]] = {}
    """Settings and the values that each takes: a run for every combination."""
    at_once: PositiveInt | None = None
    """So many runs of the array, or shards, at a time. `harness run` has one run after the other."""
    cluster: str | None = None
    """A cluster file for this stage, where it is not that of `harness submit --cluster`."""
    nodes: PositiveInt = 1
    """Nodes of each of its jobs. `harness run` has the machine that it runs on."""
    time: TimeLimit | None = None
    """Time limit of each of its jobs, in Slurm's syntax; the cluster file's when left out."""

    @property
    def all_needs(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys([*(part.stage for part in self.made_elsewhere.values()), *self.needs]))

    @property
    def made_elsewhere(self) -> dict[str, ModelOf]:
        """Key -> what stands there, of what it begins from."""
        return {key: part for key, part in (("model", self.model), ("adapter", self.adapter)) if part}

    @property
    def axes(self) -> list[Axis]:
        return [Axis(key, tuple(render_value(value) for value in values)) for key, values in self.array.items()]

    @property
    def shares(self) -> tuple[Share, ...]:
        """None of a stage that trains."""
        count = self.shards or 1
        return tuple(Share(self.do, count, index) for index in range(count)) if self.do != "train" else ()

    @property
    def elements(self) -> list[str]:
        """The folders of its runs in that of the stage; empty when that is the one run's."""
        return [f"shard-{share.shard:03}" for share in self.shares] or (element_names(self.axes) if self.array else [])


class Pipeline(Section):
    stages: Annotated[dict[str, Stage], Field(min_length=1)]
    output_dir: str
    """The folder of the pipeline, with one for each stage in it. Left out: runs/<name of the file>."""

    @property
    def folder(self) -> Path:
        return Path(self.output_dir).expanduser().resolve()

    @property
    def order(self) -> list[str]:
        """The stages, each after all that it needs, and otherwise as the file has them."""
        order: list[str] = []
        while len(order) < len(self.stages):
            order.append(next(name for name in self.stages if name not in order and {*self.stages[name].all_needs} <= {*order}))
        return order


# ---- reading


def find_pipeline(name_or_path: str) -> Path | None:
    """The pipeline file that is meant: a YAML file with `stages` at its top, or the one of a pipeline's folder. None for anything else."""
    inside = Path(name_or_path).expanduser() / PIPELINE
    if inside.is_file():
        return inside.resolve()
    file = find_config(name_or_path)
    return file.resolve() if file and "stages" in read_yaml(file) else None


def load_pipeline(file: Path, overrides: Iterable[str] = ()) -> Pipeline:
    """Read, override, validate. Overrides are `STAGE.key.path=value`, for the recipe of that stage, and `output_dir=FOLDER`.

    Raises RecipeError (exit code 2) that names file, dotted key, value, rule and remedy for everything that is wrong.
    """
    settings = read_yaml(file)
    settings.setdefault("output_dir", f"runs/{file.stem}")
    validate(Pipeline, settings, str(file), ELSEWHERE)
    for override in overrides:
        _apply_override(settings, override)
    pipeline = validate(Pipeline, settings, str(file), ELSEWHERE)
    problems = [f"{file}: {problem}" for problem in check_rules(pipeline)]
    if problems:
        raise RecipeError("\n".join(problems))
    return pipeline


def _apply_override(settings: dict, override: str) -> None:
    name, _, text = override.partition("=")
    stage, _, key = name.partition(".")
    value = read_value(text, override)
    if name == "output_dir":
        settings["output_dir"] = value
    elif key and stage in settings["stages"]:
        settings["stages"][stage].setdefault("set", {})[key] = value
    else:
        known = ", ".join(settings["stages"])
        raise RecipeError(f"override {override!r}: write STAGE.key.path=value, STAGE being one of {known}, or output_dir=FOLDER")


def render_pipeline(pipeline: Pipeline) -> str:
    """The pipeline as YAML; loading it again gives the same pipeline."""
    return render_yaml(pipeline.model_dump(mode="json", by_alias=True, exclude_defaults=True) | {"output_dir": str(pipeline.folder)})


def save_pipeline(pipeline: Pipeline) -> None:
    """Make the pipeline's folder, and what a person reads there. Raises LaunchError for the folder of a run."""
    if (pipeline.folder / "recipe.yaml").exists():
        raise LaunchError(f"{pipeline.folder}: is a run's folder; choose another output_dir for the pipeline")
    pipeline.folder.mkdir(parents=True, exist_ok=True)
    write_text_atomically(pipeline.folder / PIPELINE, render_pipeline(pipeline))
    write_text_atomically(pipeline.folder / FACTS, json.dumps({"directory": os.getcwd()}) + "\n")


def enter_directory(file: Path) -> None:
    """For the file of a pipeline's own folder, go to where its relative paths begin."""
    if (file.parent / FACTS).is_file():
        os.chdir(json.loads((file.parent / FACTS).read_text())["directory"])


# ---- what no single field can say; each rule yields `dotted.key = value; reason or remedy`


def check_rules(pipeline: Pipeline) -> list[str]:
    problems = [problem for name, stage in pipeline.stages.items() for problem in _stage_rules(pipeline, name, stage)]
    return problems or list(_cycle_rules(pipeline))


def _stage_rules(pipeline: Pipeline, name: str, stage: Stage) -> Iterator[str]:
    where = f"stages.{name}"
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name) or name in ("cluster", "output_dir"):
        yield f"{where}: {name!r} cannot be the name of a folder and stand before overrides; use letters, digits, _ and -"
    for need in stage.all_needs:
        if need == name:
            yield f"{where} needs itself; remove that, or name the stage that was meant"
        elif need not in pipeline.stages:
            close = difflib.get_close_matches(need, pipeline.stages, n=1)
            known = f"did you mean {close[0]}?" if close else f"there are {', '.join(pipeline.stages)}"
            yield f"{where} needs {need}, which is no stage; {known}"
    for key, part in stage.made_elsewhere.items():
        if part.stage in pipeline.stages:
            yield from _model_rules(f"{where}.{key}", part, pipeline.stages[part.stage])
        if (set_too := {"model": "model.name_or_path", "adapter": "model.adapter"}[key]) in stage.set:
            yield f"{where}.set.{set_too}: the {key} is from {part.stage}; remove one of the two"
    if stage.model and stage.adapter and stage.model.stage == stage.adapter.stage:
        yield (
            f"{where}.adapter.from = {stage.adapter.stage}; the model from there is its adapter merged into its base, on which it would "
            "stand a second time; remove one of the two"
        )
    if stage.at_once and not stage.array and stage.do == "train":
        yield f"{where}.at_once = {stage.at_once}; the stage has no array; remove it"
    yield from _share_rules(where, stage)
    for key, value in stage.set.items():
        if key == "output_dir":
            yield f"{where}.set.output_dir: a stage lies in {pipeline.output_dir}/{name}, where others find it; remove it"
        elif "." not in key and isinstance(value, dict):
            yield f"{where}.set.{key}: would replace the whole section; write {key}.{next(iter(value), 'KEY')} and so on"


def _share_rules(where: str, stage: Stage) -> Iterator[str]:
    if stage.do == "train" and stage.shards:
        yield f"{where}.shards = {stage.shards}; a training is not shared out so; remove it, or say what the stage is to do: `do: capture`"
    for key in stage.made_elsewhere if stage.do != "train" else ():
        yield f"{where}.{key}: it makes no model, and asks the teacher that its recipe names; remove it, and set teacher.name_or_path"
    if stage.do != "train" and stage.array:
        yield f"{where}.array: its units are shared out by `shards`; what differs between two caches makes two stages; remove it"


def _model_rules(where: str, model: ModelOf, source: Stage) -> Iterator[str]:
    if source.do != "train":
        yield f"{where}.from = {model.stage}; that stage makes no model (`do: {source.do}`); write `needs: [{model.stage}]`"
        return
    runs = 1
    for axis in source.axes:
        runs *= len(axis.values)
    if source.array and model.element is None:
        yield f"{where}.from = {model.stage}; that array makes {runs} models; say which: {{from: {model.stage}, element: 0}}"
    elif source.array and model.element >= runs:
        yield f"{where}.element = {model.element}; {model.stage} has the elements 0 to {runs - 1}"
    elif not source.array and model.element is not None:
        yield f"{where}.element = {model.element}; {model.stage} is no array; remove it"


def _cycle_rules(pipeline: Pipeline) -> Iterator[str]:
    try:
        graphlib.TopologicalSorter({name: stage.all_needs for name, stage in pipeline.stages.items()}).prepare()
    except graphlib.CycleError as error:
        # From what is needed to what needs it.
        circle = " needs ".join(reversed(error.args[1]))
        yield f"stages: {circle}, so none of them could begin; remove one of these needs"


ELSEWHERE = {
    "depends_on": "needs",
    "dependencies": "needs",
    "after": "needs",
    "requires": "needs",
    "config": "recipe",
    "overrides": "set",
    "settings": "set",
    "train": "set: {train.KEY: ...}",
    "data": "set: {data.KEY: ...}",
    "sweep": "array",
    "grid": "array",
    "matrix": "array",
    "max_parallel": "at_once",
    "concurrency": "at_once",
    "steps": "stages",
    "jobs": "stages",
}
"""Other people's names."""
