"""Where what a recipe names of the hub lies on this machine, and whether all of it is there. Asks no network."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

from harness.hub.needs import Need

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "tekken.json", "vocab.json", "vocab.txt")


def hub_cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).expanduser().resolve()


def datasets_cache() -> Path:
    """Where `datasets` keeps what it has made of the files."""
    from huggingface_hub import constants

    return Path(os.environ.get("HF_DATASETS_CACHE") or Path(constants.HF_HOME) / "datasets").expanduser().resolve()


def is_offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def is_offline_by(environment: Mapping[str, str]) -> bool:
    """Whether a process with these variables asks the hub for nothing, as huggingface_hub reads them."""
    asked = environment.get("HF_HUB_OFFLINE") or environment.get("TRANSFORMERS_OFFLINE") or ""
    return asked.upper() in ("1", "ON", "YES", "TRUE")


def endpoint() -> str:
    from huggingface_hub import constants

    return constants.ENDPOINT


def repository_folder(need: Need) -> Path:
    return hub_cache() / f"{need.repo_type}s--{need.id.replace('/', '--')}"


def find_commit(need: Need) -> str | None:
    """The commit that a run would load: what the cache has for the branch or tag, or the commit itself."""
    folder, revision = repository_folder(need), need.revision or "main"
    ref = folder / "refs" / revision
    if ref.is_file():
        return ref.read_text().strip()
    return revision if (folder / "snapshots" / revision).is_dir() else None


def find_snapshot(name: str, revision: str | None) -> Path | None:
    """The folder of a hub's model on this machine, whole or not."""
    need = Need("model", name, revision, "model.name_or_path")
    commit = find_commit(need)
    return repository_folder(need) / "snapshots" / commit if commit else None


def find_missing(need: Need) -> str | None:
    """What of it is not in the cache; None when it can be loaded without a network."""
    if need.kind == "dataset":
        return None if _is_dataset_made(need) else "is not in the cache"
    commit = find_commit(need)
    if commit is None:
        return "is not in the cache"
    folder = repository_folder(need) / "snapshots" / commit
    wanted = [] if need.kind == "tokenizer" else ["config.json", *_weights_of(folder)]
    missing = [name for name in wanted if not (folder / name).is_file()]
    if need.with_tokenizer and not any((folder / name).is_file() for name in TOKENIZERS):
        missing.append(TOKENIZERS[0])
    return f"is in the cache without {', '.join(missing[:3])}{' and others' if len(missing) > 3 else ''}" if missing else None


def _weights_of(folder: Path) -> list[str]:
    if not (folder / INDEX).is_file():
        return [WEIGHTS]
    return sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))


def _is_dataset_made(need: Need) -> bool:
    """Whether `datasets` has made its tables of it; it spells names in its own way."""
    root, wanted = datasets_cache(), need.id.replace("/", "").replace("_", "").lower()
    made = [folder for folder in (root.iterdir() if root.is_dir() else ()) if folder.name.replace("_", "").lower() == wanted]
    # A kill leaves what was half made in HASH.incomplete.
    tables = (table for folder in made for table in folder.glob(f"{need.name or '*'}/*/*/*.arrow"))
    return any(table.parent.suffix != ".incomplete" for table in tables)
