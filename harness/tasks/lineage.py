"""Where a model comes from: in every checkpoint's manifest, in run.json, in the export's harness.json and with W&B's artifact.

    "lineage": [
      {"task": "sft", "base": …, "base_revision": …, "base_digest": …, "data": …, "recipe_digest": …, "git_commit": …, "step": 300},
      {"task": "dpo", …, "adapter": "/…/sft/final", "adapter_mode": "continue", "adapter_digest": …, "step": 120}
    ]

From the oldest run to this one. A run's parent is the export that it begins from, as its adapter or else as its base, and that export's own
list is what this one goes on. A folder without harness.json was not made by harness: a base of that kind stands in the entry of the run
that took it, and an adapter has an entry with the base that it names. A distilled student's entry has its teacher's digest.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness import distributed
from harness.embedded import resolve
from harness.model.export import MANIFEST

if TYPE_CHECKING:
    from harness.model.adapters import Earlier
    from harness.recipe.schema import Model

ENTRY = ("task", "base", "base_revision", "base_digest", "data", "recipe_digest", "step")


def build_lineage(task: str, model: "Model", facts: dict[str, Any], earlier: "Earlier | None") -> list[dict]:
    """The parent's list and an entry for this run, which has no step yet; the same on every rank. facts: of this life's manifests."""
    return distributed.on_main(lambda: [*parents(model, earlier), _entry(task, facts)])


def lineage_at(lineage: list[dict], step: int) -> list[dict]:
    """The list as it is true of the weights at this step."""
    return [*lineage[:-1], {**lineage[-1], "step": step}]


def parents(model: "Model", earlier: "Earlier | None") -> list[dict]:
    if earlier:
        return _of_export(earlier.manifest) if earlier.manifest else [{"base": earlier.base}]
    manifest = Path(resolve(model.name_or_path or model.init)).expanduser() / MANIFEST
    return _of_export(json.loads(manifest.read_text())) if manifest.is_file() else []


def _of_export(manifest: dict) -> list[dict]:
    """An export from before there were such lists has one entry."""
    return manifest.get("lineage") or [{key: manifest[key] for key in ENTRY if key in manifest}]


def _entry(task: str, facts: dict[str, Any]) -> dict:
    base, adapter = facts["base"], facts["adapter"]
    entry = {"task": task, "base": base["name"], "base_revision": base["revision"], "base_digest": base["digest"]}
    if adapter:
        entry |= {"adapter": adapter["folder"], "adapter_mode": adapter["mode"], "adapter_digest": adapter["digest"]}
    if facts["teacher"]:
        entry["teacher"] = facts["teacher"]
    return entry | {"data": facts["data"]["digest"], "recipe_digest": facts["recipe_digest"], "git_commit": facts["git_commit"]}
