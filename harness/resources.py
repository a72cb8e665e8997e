"""Where things lie that belong to no run: the files that ship with harness (configs/, slurm/, launch/, constraints.txt), and the cache.

In a checkout the shipped files stand at the top level; in a wheel the same folders lie in `harness/shipped/`. Only this file knows.
"""

import os
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
CACHE_VARIABLE = "HARNESS_CACHE"


def shipped(*parts: str) -> Path:
    """The path of a shipped file or folder, e.g. `shipped("configs", "backends")`; it need not exist."""
    installed = _PACKAGE / "shipped"
    root = installed if installed.is_dir() else _PACKAGE.parent
    return root.joinpath(*parts)


def code_root() -> str:
    """The folder in which another Python must search to find this very harness; empty for an installed copy, which it finds by itself, and
    whose folder would put other libraries before its own."""
    return "" if (_PACKAGE / "shipped").is_dir() else str(_PACKAGE.parent)


def shipped_names(folder: str) -> list[str]:
    """The names by which the YAML files below `configs/<folder>` can be asked for, sorted."""
    root = shipped("configs", folder)
    return sorted(path.relative_to(root).with_suffix("").as_posix() for path in root.rglob("*.yaml"))


def find_config(name: str, folder: str = "", base_dir: Path | None = None) -> Path | None:
    """The file that `name` means: a path as it is, then beside `base_dir`, then a shipped name below `configs/<folder>`.

    A shipped recipe has two spellings, `sft/x` and the path that it has in a checkout, `configs/sft/x.yaml`.
    """
    below = name.removeprefix("configs/").removeprefix(f"{folder}/") if folder else name.removeprefix("configs/")
    path = Path(name).expanduser()
    if path.is_file():
        return path
    if base_dir is not None and (base_dir / path).is_file():
        return base_dir / path
    for candidate in (shipped("configs", folder, f"{below}.yaml"), shipped("configs", folder, below)):
        if candidate.is_file():
            return candidate
    return None


def cache_root(asked: str | None = None) -> Path:
    """Where everything that can be made again lies: what the recipe says, else $HARNESS_CACHE, else ~/.cache/harness."""
    return Path(asked or os.environ.get(CACHE_VARIABLE) or "~/.cache/harness").expanduser()
