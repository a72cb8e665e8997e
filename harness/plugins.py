"""Python of the user's own that a recipe names as `module:attribute`: installed, or in the directory in which the command is run.

`check_plugin` looks without running anything of it, so that a typo costs a second on a login node; `load_plugin` imports.
"""

import ast
import importlib
import importlib.util
import os
import sys
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

from harness.errors import RecipeError


def check_plugin(key: str, name: str) -> None:
    """Raises RecipeError unless such a module is found, and something of that name stands in it. key: of the recipe."""
    module, attribute = _parts(key, name)
    spec = _find(module)
    if spec is None:
        where = f"neither installed nor in {os.getcwd()}"
        raise RecipeError(f"{key} = {name}; there is no module {module}: {where}; write module:attribute, as rewards:score for rewards.py")
    names = _names_in(spec)
    # A module that makes its names while it is imported (a star, an extension) tells them only then.
    if names is not None and attribute not in names:
        raise RecipeError(f"{key} = {name}; {spec.origin} has no {attribute}; it has {', '.join(sorted(names)) or 'nothing'}")


def load_plugin(key: str, name: str) -> Any:
    """The attribute. Raises RecipeError when there is none, or its module cannot be imported."""
    check_plugin(key, name)
    module, attribute = _parts(key, name)
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return getattr(importlib.import_module(module), attribute)
    except Exception as error:
        raise RecipeError(f"{key} = {name}; cannot be imported: {type(error).__name__}: {error}") from error


def _parts(key: str, name: str) -> tuple[str, str]:
    module, colon, attribute = name.partition(":")
    if not colon or not attribute.isidentifier() or not all(part.isidentifier() for part in module.split(".")):
        raise RecipeError(f"{key} = {name}; must be module:attribute, as rewards:score for the function score in rewards.py")
    return module, attribute


def _find(module: str) -> ModuleSpec | None:
    """Without importing the packages that it lies in, as importlib.util.find_spec would."""
    top, *_ = parts = module.split(".")
    spec = PathFinder.find_spec(top, [os.getcwd()])
    if spec is None or spec.origin is None:
        # Whatever finds installed packages, those that are editable among them; a mere folder of that name here comes after it.
        spec = importlib.util.find_spec(top) or spec
    for at in range(1, len(parts)):
        if spec is None:
            return None
        spec = PathFinder.find_spec(".".join(parts[: at + 1]), spec.submodule_search_locations or [])
    return spec


def _names_in(spec: ModuleSpec) -> set[str] | None:
    """What a source file defines, imports or assigns at its top; None where that cannot be read."""
    if not spec.origin or not spec.origin.endswith(".py"):
        return None
    try:
        body = ast.parse(Path(spec.origin).read_text(encoding="utf-8")).body
    except (SyntaxError, ValueError, OSError):
        return None
    names: set[str] = set()
    for statement in body:
        if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(statement.name)
        elif isinstance(statement, (ast.Import, ast.ImportFrom)):
            if any(alias.name == "*" for alias in statement.names):
                return None
            names |= {alias.asname or alias.name.partition(".")[0] for alias in statement.names}
        elif isinstance(statement, (ast.Assign, ast.AnnAssign)):
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            names |= {node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name)}
        elif isinstance(statement, (ast.If, ast.Try, ast.With)) or hasattr(statement, "body"):
            return None
    return names
