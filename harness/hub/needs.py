"""What a recipe takes from the hub. A name is the hub's when it could be an id and leads to nothing on this machine."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from harness.data.reading import is_hub_id
from harness.embedded import PREFIX
from harness.recipe import Recipe

KERNELS = "kernels-community/"
ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")


@dataclass(frozen=True)
class Need:
    kind: Literal["model", "tokenizer", "dataset"]
    id: str
    revision: str | None
    key: str
    """Where the recipe names it."""
    name: str | None = None
    """Configuration of a data set."""
    split: str = "train"
    with_tokenizer: bool = True
    """Of a model: whether its tokenizer is read too."""
    spared: bool = False
    """A run can do without: a teacher, whose answers may lie in a cache already."""

    @property
    def repo_type(self) -> str:
        return "dataset" if self.kind == "dataset" else "model"

    @property
    def shown(self) -> str:
        return f"{self.id}@{self.revision}" if self.revision else self.id


def find_needs(recipes: Iterable[Recipe], awaited: Iterable[Path] = ()) -> list[Need]:
    """Of all the recipes, each once. awaited: folders that one of them makes for another."""
    made = {path.resolve() for path in awaited}
    found: dict[tuple, Need] = {}
    for recipe in recipes:
        for need in _needs_of(recipe):
            place = Path(need.id).expanduser().resolve()
            if any(place == folder or place.is_relative_to(folder) for folder in made):
                continue
            found.setdefault((need.kind, need.id, need.revision, need.name, need.split), need)
    # A model brings its tokenizer along.
    models = {(need.id, need.revision) for need in found.values() if need.kind == "model"}
    return [need for need in found.values() if need.kind != "tokenizer" or (need.id, need.revision) not in models]


def _needs_of(recipe: Recipe) -> Iterator[Need]:
    model, teacher = recipe.model, recipe.teacher
    if is_of_hub(model.name_or_path):
        yield Need("model", model.name_or_path, model.revision, "model.name_or_path", with_tokenizer=not model.tokenizer)
    if is_of_hub(model.tokenizer):
        yield Need("tokenizer", model.tokenizer, None, "model.tokenizer")
    if teacher and is_of_hub(teacher.name_or_path):
        kind = "tokenizer" if teacher.server else "model"
        yield Need(kind, teacher.name_or_path, teacher.revision, "teacher.name_or_path", spared=teacher.source == "cache")
    for at, part in enumerate(recipe.rlhf.rewards):
        if is_of_hub(part.model):
            yield Need("model", part.model, None, f"rlhf.rewards.{at}.model")
    for key in ("train", "eval"):
        for at, source in enumerate(getattr(recipe.data, key)):
            if is_hub_id(source.path):
                yield Need("dataset", source.path, None, f"data.{key}.{at}.path", source.name, source.split)


def is_of_hub(name: str | None) -> bool:
    """Whether a model of this name is looked for on the hub; `runs/first` beside a folder `runs` is a run that is to come."""
    if not name or name.startswith((PREFIX, ".", "~", "/")) or not ID.fullmatch(name):
        return False
    return not Path(name).exists() and not ("/" in name and Path(name).parent.is_dir())


def find_kernels(recipes: Iterable[Recipe]) -> list[str]:
    """Attention kernels of the hub, of which the build belongs to a GPU: they are not fetched here."""
    asked = {section.attn_implementation for recipe in recipes for section in (recipe.model, recipe.teacher) if section}
    return sorted(name for name in asked if name.startswith(KERNELS))
