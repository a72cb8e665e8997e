"""Who may import whom (shared/design.md): layers, one owner for each dependency, and nothing heavy where a login node works.

The imports are read from the source, so that one inside a function counts as well; what is loaded at import time is seen by loading it.
"""

import ast
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "harness"

# From left to right: a module imports only from layers before its own. Names are those of files and folders in harness/.
LAYERS = [
    {"__init__", "errors"},
    {"resources", "overrides", "logs", "units", "plugins", "sizes", "page"},
    {"recipe"},
    {"run", "tools", "planner", "distributed", "losses"},
    {"launcher", "failures", "watchdog", "share", "attention", "operators", "guard", "quickstart"},
    {"embedded"},
    {"data", "model"},
    {"teacher", "checkpoint", "tracking", "evaluate", "hub"},
    {"tasks", "life", "watched", "doctor"},
    {"rank", "cluster"},
    {"report"},
    {"cli"},
    {"__main__"},
]

OWNERS = {
    "trl": {"tasks"},
    "peft": {"model"},
    "bitsandbytes": {"model"},
    "wandb": {"tracking"},
    "torch.distributed": {"distributed"},
    "jinja2": {"cluster"},
    "deepspeed": {"operators"},
    "jsonschema": {"tools"},
}
OWNER_EXCEPTIONS = {
    ("data/templates.py", "jinja2"): "the error that a broken chat template raises inside transformers",
    ("checkpoint/zero.py", "deepspeed"): "the few classes that its shards may name when they are opened as data",
    ("tasks/trainer.py", "deepspeed"): "whole gradients for the check after the first backward, where the trainer holds the engine",
    ("teacher/resident.py", "deepspeed"): "an engine that shards a teacher, and its head gathered inside the forward",
    ("rank.py", "torch.distributed"): "elastic's error file, which torchrun's summary reads; no collective",
}

LIGHT = {
    "__init__",
    "__main__",
    "errors",
    "resources",
    "overrides",
    "logs",
    "units",
    "plugins",
    "sizes",
    "recipe",
    "run",
    "tools",
    "planner",
    "launcher",
    "failures",
    "watchdog",
    "guard",
    "share",
    "watched",
} | {
    "embedded",
    "life",
    "checkpoint",
    "hub",
    "doctor",
    "cluster",
    "cli",
    "rank",
    "page",
    "report",
}
HEAVY = {"torch", "transformers", "datasets", "trl", "accelerate", "deepspeed", "peft", "bitsandbytes", "wandb", "pyarrow", "matplotlib"}


@dataclass(frozen=True)
class Import:
    file: str
    """Below harness/."""
    line: int
    module: str
    at_import_time: bool

    @property
    def unit(self) -> str:
        """The file or folder of harness/ that it stands in."""
        return self.file.split("/")[0].removesuffix(".py")

    def __str__(self) -> str:
        return f"harness/{self.file}:{self.line} imports {self.module}"


def _imports_in(file: Path) -> list[Import]:
    name, found = file.relative_to(PACKAGE).as_posix(), []

    def visit(node: ast.AST, at_import_time: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend(Import(name, node.lineno, alias.name, at_import_time) for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"harness/{name}:{node.lineno}: imports are written in full here"
            # `from harness import distributed`, `from torch import distributed`: what is imported may be a module itself.
            found.extend(Import(name, node.lineno, f"{node.module}.{alias.name}", at_import_time) for alias in node.names)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            return
        inside = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for child in ast.iter_child_nodes(node):
            visit(child, at_import_time and not inside)

    visit(ast.parse(file.read_text(encoding="utf-8")), True)
    return found


IMPORTS = [found for file in sorted(PACKAGE.rglob("*.py")) for found in _imports_in(file)]


def _layer(unit: str) -> int:
    places = [number for number, units in enumerate(LAYERS) if unit in units]
    assert places, f"harness/{unit} has no layer; give it one in {Path(__file__).name}"
    return places[0]


def _imported_unit(found: Import) -> str | None:
    parts = found.module.split(".")
    if parts[0] != "harness":
        return None
    is_module = len(parts) > 1 and ((PACKAGE / parts[1]).is_dir() or (PACKAGE / f"{parts[1]}.py").is_file())
    return parts[1] if is_module else "__init__"


def test_a_module_imports_only_from_layers_before_its_own():
    wrong = []
    for found in IMPORTS:
        unit = _imported_unit(found)
        if unit and unit != found.unit and _layer(unit) >= _layer(found.unit):
            wrong.append(str(found))
    assert wrong == []


def test_every_file_has_a_layer():
    units = {
        found.stem if found.is_file() else found.name
        for found in PACKAGE.iterdir()
        if found.suffix == ".py" or (found / "__init__.py").is_file()
    }
    assert units <= set().union(*LAYERS)


@pytest.mark.parametrize("dependency", OWNERS)
def test_a_dependency_has_one_owner(dependency):
    foreign = [
        str(found)
        for found in IMPORTS
        if f"{found.module}.".startswith(f"{dependency}.")
        and found.unit not in OWNERS[dependency]
        and (found.file, dependency) not in OWNER_EXCEPTIONS
    ]
    assert foreign == []


def test_every_exception_is_still_needed():
    for file, dependency in OWNER_EXCEPTIONS:
        assert any(found.file == file and f"{found.module}.".startswith(f"{dependency}.") for found in IMPORTS), (file, dependency)


def test_nobody_imports_the_launch_scripts():
    assert [str(found) for found in IMPORTS if found.module.split(".")[0] == "launch"] == []


def test_light_modules_name_nothing_heavy_at_import_time():
    assert [str(found) for found in IMPORTS if found.at_import_time and found.unit in LIGHT and found.module.split(".")[0] in HEAVY] == []


def _modules_of(units: set[str]) -> list[str]:
    files = [
        file for file in sorted(PACKAGE.rglob("*.py")) if file.relative_to(PACKAGE).parts[0].removesuffix(".py") in units - {"__main__"}
    ]
    return [".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__") for file in files]


def test_loading_every_light_module_and_every_verb_loads_nothing_heavy():
    modules = _modules_of(LIGHT)
    assert {"harness", "harness.recipe.load", "harness.launcher", "harness.cli.check", "harness.cli.run"} <= set(modules)
    program = (
        "import importlib, json, sys\n"
        "for name in json.loads(sys.argv[1]): importlib.import_module(name)\n"
        "print(json.dumps(sorted(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program, json.dumps(modules)], capture_output=True, text=True, check=True)
    assert set(json.loads(done.stdout)) & HEAVY == set()
