"""A model card from what a run has recorded: nothing in it is from memory, and what is not known is said to be unknown.

    ---                    front matter as the hub reads it: license, base_model, base_model_relation, library_name, datasets, …
    # NAME                 what it is, and how it is loaded
    ## Data                every source, with its licence
    ## Figures             of the training's own evaluation, and of `harness evaluate`, each with the command that gives it
    ## Lineage             base, earlier runs, adapters and teacher
    ## Recipe              what was not a default

Promise. No absolute path, no address of a server and no name of a W&B project stands in it.
"""

import json
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from harness.embedded import PREFIX
from harness.errors import EvaluationError
from harness.recipe import Recipe
from harness.recipe.load import render_yaml
from harness.recipe.schema import Source

UNKNOWN = "unknown"
DATA_SUFFIXES = (".jsonl", ".json", ".parquet", ".jsonl.gz", ".json.gz")
_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_ABSOLUTE = re.compile(r"(?<![\w.:/…~-])(?:~|/(?!/))(?:[^\s/'\",:;|]*/)+([^\s/'\",:;|]*)")
_ADDRESS = re.compile(r"\bhttps?://[^\s'\",]+")


@dataclass(frozen=True)
class Handed:
    """What is handed over."""

    name: str
    manifest: dict
    """Of its export."""
    recipe: Recipe
    license: str | None
    base: str | None
    """By the name under which others find it; None where it has none."""
    base_license: str | None
    kind: str
    """adapter, finetune or quantized, as the hub's base_model_relation."""
    figures: dict[str, float]
    """Of the training's own evaluation at the exported step."""
    evaluations: Sequence[dict]
    """summary.json of each."""


def render_card(handed: Handed) -> str:
    from huggingface_hub import ModelCard

    text = "\n\n".join(
        part.strip()
        for part in (
            f"---\n{front_matter(handed)}\n---",
            f"# {handed.name}\n\n{_what(handed)}",
            f"## Use\n\n{_use(handed)}",
            f"## Data\n\n{_data(handed.recipe)}",
            f"## Figures\n\n{_figures(handed)}",
            f"## Lineage\n\n{_lineage(handed)}",
            f"## Recipe\n\nWhat is not a default of harness:\n\n```yaml\n{_recipe(handed.recipe)}```",
        )
    )
    text += "\n"
    # Read as the hub reads it: what it would not understand is an error here, and not after the upload.
    assert ModelCard(text).data.to_dict()["license"], text
    return text


def front_matter(handed: Handed) -> str:
    from huggingface_hub import ModelCardData

    reward = handed.manifest["task"] == "reward"
    datasets = sorted({source.path for source in handed.recipe.data.train if is_repo_id(source.path)})
    return ModelCardData(
        license=handed.license or UNKNOWN,
        # Only what the hub can lead to.
        **({"base_model": handed.base, "base_model_relation": handed.kind} if handed.base and is_repo_id(handed.base) else {}),
        library_name={"adapter": "peft", "quantized": "gguf"}.get(handed.kind, "transformers"),
        pipeline_tag="text-classification" if reward else "text-generation",
        datasets=datasets or None,
        tags=["harness", "trl", handed.manifest["task"], *(["lora"] if handed.kind == "adapter" else [])],
    ).to_yaml()


def is_repo_id(name: str) -> bool:
    """Whether a name can only be an id on the hub: no file of data, nothing embedded, no folder that is here."""
    return bool(_REPO_ID.fullmatch(name)) and not name.endswith(DATA_SUFFIXES) and not Path(name).exists()


def redact(text: str) -> str:
    """Without absolute paths, of which the last part stays, and without addresses."""
    return _ABSOLUTE.sub(lambda path: f"…/{path.group(1)}" if path.group(1) else "…", _ADDRESS.sub("(an address)", text))


def redact_all(value):
    """Every text in a JSON value, redacted."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, list):
        return [redact_all(item) for item in value]
    return {key: redact_all(item) for key, item in value.items()} if isinstance(value, dict) else value


# ---- sections


def _what(handed: Handed) -> str:
    manifest = handed.manifest
    kind = {"adapter": "A LoRA adapter for", "finetune": "Fine-tuned from", "quantized": f"In GGUF ({manifest['dtype']}), made from"}
    base = handed.base if handed.base and is_repo_id(handed.base) else redact(handed.base or manifest["base"])
    said = [f"{kind[handed.kind]} `{base}` by `task: {manifest['task']}`, exported at step {manifest['step']}."]
    own = f"`{handed.license}`" if handed.license else "unknown (whoever hands it over has not said)"
    said.append(f"Licence of this model: {own}. Licence of its base: {_licence(handed.base_license)}.")
    if merge := manifest.get("differences", {}).get("adapter"):
        said.append(
            f"The adapter is merged into its base in bfloat16: over rows of the run the result differs from base + adapter by at most "
            f"{merge['max_abs']:.3g} in a logit, and by {merge['kl']:.2g} nats of KL divergence per token."
        )
    return "\n\n".join(said)


def _use(handed: Handed) -> str:
    if handed.kind == "quantized":
        return "With llama.cpp, or what stands on it: the chat template is in the file."
    loader = "SequenceClassification" if handed.manifest["task"] == "reward" else "CausalLM"
    library, auto = ("peft", "AutoPeftModelFor") if handed.kind == "adapter" else ("transformers", "AutoModelFor")
    labels = ", num_labels=1" if handed.kind == "adapter" and loader != "CausalLM" else ""
    return "\n".join(
        (
            "```python",
            f"from {library} import {auto}{loader}",
            "from transformers import AutoTokenizer",
            "",
            f'model = {auto}{loader}.from_pretrained("{handed.name}"{labels})',
            f'tokenizer = AutoTokenizer.from_pretrained("{handed.name}")',
            "```",
        )
    )


def _data(recipe: Recipe) -> str:
    lines = ["| source | used for | licence |", "|---|---|---|"]
    for part, sources in (("training", recipe.data.train), ("held out", recipe.data.eval)):
        lines += [f"| `{_name_of(source)}` | {part} | {_licence_of(source)} |" for source in sources]
    return "\n".join(lines)


def _name_of(source: Source) -> str:
    """A hub data set by its id, a file by its last name: where it lies is nobody's business."""
    return source.path if source.path.startswith(PREFIX) or is_repo_id(source.path) else Path(source.path).name


def _licence_of(source: Source) -> str:
    own = "`apache-2.0`, generated by harness" if source.path.startswith(PREFIX) else UNKNOWN
    return _licence(source.license) if source.license else own


def _licence(name: str | None) -> str:
    return f"`{name}`" if name else UNKNOWN


def _figures(handed: Handed) -> str:
    parts = []
    if handed.figures:
        rows = "\n".join(f"| `{name}` | {value:.6g} |" for name, value in handed.figures.items())
        parts.append(
            f"On the run's own held-out rows at step {handed.manifest['step']}, by `harness run` with the recipe below:\n\n"
            f"| metric | value |\n|---|---|\n{rows}"
        )
    parts += [_evaluation(summary) for summary in handed.evaluations]
    return "\n\n".join(parts) or "None were measured."


def _evaluation(summary: dict) -> str:
    from harness.evaluate.report import notes_of, table_of

    settings = summary["settings"]
    suites = [f"--suite {name}={','.join(_given_to(name, found['files']))}" for name, found in summary["suites"].items()]
    options = [
        f"--{name.replace('_', '-')} {settings[name]}" for name in ("max_new_tokens", "temperature", "seed", "max_items") if settings[name]
    ]
    options += ["--underscore-names"] if settings.get("underscore_names") else []
    heading, rows, _ = table_of(summary)
    table = "\n".join(f"| {' | '.join(row)} |" for row in (heading, ["---"] * len(heading), *rows))
    command = " ".join(["harness evaluate MODEL", *map(redact, suites), *options, "--output FOLDER"])
    notes = "".join(f"\n\n{redact(note)}" for note in notes_of(summary))
    return f"By `{command}` (harness {summary['harness']}, transformers {summary['versions']['transformers']}):\n\n{table}{notes}"


def _given_to(suite: str, files: Sequence[str]) -> list[str]:
    """What a suite was given, without where it lies: of APIBench its folder, of BFCL the questions, beside which the answers are found."""
    paths = [Path(file) for file in files]
    if suite == "apibench":
        return list(dict.fromkeys(path.parent.name for path in paths if path.parent.name not in ("questions", "api")))
    return [path.name for path in paths if path.parent.name != "possible_answer"]


def _lineage(handed: Handed) -> str:
    lines = []
    for entry in handed.manifest.get("lineage", []):
        told = [f"`task: {entry['task']}`" if "task" in entry else "an adapter that was not made by harness"]
        told.append(f"from `{redact(entry['base'])}`" + (f" ({entry['base_revision']})" if entry.get("base_revision") else ""))
        if entry.get("adapter"):
            told.append(f"`{entry['adapter_mode']}` of the adapter `{redact(entry['adapter'])}`")
        if entry.get("teacher"):
            told.append(f"teacher `{redact(json.dumps(entry['teacher']))}`")
        told += [f"{name} `{entry[name]}`" for name in ("data", "recipe_digest", "git_commit") if entry.get(name)]
        told += [f"step {entry['step']}"] if entry.get("step") is not None else []
        lines.append(f"{len(lines) + 1}. {', '.join(told)}")
    return "\n".join(lines) or "Not recorded."


def _recipe(recipe: Recipe) -> str:
    settings = recipe.model_dump(mode="json", exclude_defaults=True, exclude={"output_dir", "tracking"})
    if "server" in (settings.get("teacher") or {}):
        settings["teacher"]["server"] = {"url": "(an address)"}
    return render_yaml(redact_all(settings))


# ---- what goes in


def read_figures(metrics: Path, step: int) -> dict[str, float]:
    """The run's own evaluation at this step: its last one there, without what it cost."""
    from harness.tracking.metrics import read_metrics

    found: dict[str, float] = {}
    for point in read_metrics(metrics.parent) if metrics.is_file() else ():
        if point.get("step") == step:
            found |= {key: value for key, value in point.items() if key.startswith("eval/") and isinstance(value, (int, float))}
    return {key: value for key, value in found.items() if not key.endswith(("_s", "num_tokens"))}


def check_evaluation(summary: dict, folder: Path, weights: str) -> None:
    """Raises EvaluationError unless these numbers are of these very weights."""
    asked = summary["target"].get("weights")
    if asked != weights:
        whose = redact(shlex.quote(str(summary["target"].get("run") or summary["target"].get("model") or summary["target"].get("url"))))
        raise EvaluationError(f"--evaluation {folder}: is of {whose}, whose weights are not those that are handed over; evaluate these")
