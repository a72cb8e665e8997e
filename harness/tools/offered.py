"""The tools of a conversation that a person holds, as they are named on a command line: schemas alone, or functions that really run.

    tools.json                 a list of tools, in any dialect that schema.py reads
    rows.jsonl                 the distinct tools of the rows of a data file
    my_tools.py                the public functions that it defines
    package.tools:TOOLS        a list of functions, or one, installed or in the current directory (harness.plugins)

A function's schema is what transformers' get_json_schema reads from its types and its docstring, as TRL has it. Schemas and functions
together are schemas as a model was trained on, each answered by the function of its name.
"""

from __future__ import annotations

import asyncio
import importlib.util
import inspect
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from harness.errors import DataError, RecipeError
from harness.plugins import load_plugin
from harness.tools.calls import ToolCall
from harness.tools.checks import check_tool
from harness.tools.schema import did_you_mean, normalise_tools

MOST = 128
"""Tools of a data file; more are no set that one conversation offers."""


@dataclass(frozen=True)
class Offered:
    tools: list[dict] = field(default_factory=list)
    """As chat templates take them."""
    functions: dict[str, Callable] = field(default_factory=dict)
    """By the name of their tool. A person answers for the others."""

    def run(self, call: ToolCall) -> str:
        """What the function returns, as text. What it raises becomes a result too, as in TRL: the model is to see it."""
        try:
            found = self.functions[call.name](**call.arguments)
            found = asyncio.run(found) if inspect.iscoroutine(found) else found
            return found if isinstance(found, str) else json.dumps(found, ensure_ascii=False, default=str)
        except Exception as error:
            return error_result(f"{type(error).__name__}: {error}")


def error_result(reason: str) -> str:
    return json.dumps({"error": reason}, ensure_ascii=False)


def load_all_offered(names: Sequence[str]) -> Offered:
    """Raises RecipeError where a function belongs to none of the schemas that are named beside it."""
    loaded = [load_offered(name) for name in names]
    schemas = [tool for one in loaded if not one.functions for tool in one.tools]
    functions = {name: function for one in loaded for name, function in one.functions.items()}
    tools = schemas or [tool for one in loaded for tool in one.tools]
    known = {tool["function"]["name"] for tool in tools}
    if alone := next((name for name in functions if name not in known), None):
        raise RecipeError(f"--tools: the function {alone} answers for none of the schemas{did_you_mean(alone, known)}")
    return Offered(_checked(tools, " ".join(names)), functions) if names else Offered()


def load_offered(name: str) -> Offered:
    """Raises RecipeError where there are no such tools, DataError for a tool that cannot be read or checked against."""
    path = Path(name).expanduser()
    if path.suffix in (".json", ".jsonl"):
        if not path.is_file():
            raise RecipeError(f"--tools {name}: there is no such file; give a .json list of tools, a .py file or module:functions")
        return Offered(_checked(_schemas_in(path), name))
    functions = _functions_in(path) if path.suffix == ".py" else load_plugin("--tools", name)
    functions = [functions] if callable(functions) else functions
    if not isinstance(functions, Sequence) or not functions or not all(map(callable, functions)):
        raise RecipeError(f"--tools {name}; must be a list of Python functions, or one")
    return offer(functions, name)


def offer(functions: Sequence[Callable], name: str) -> Offered:
    """Functions as tools, from their types and docstrings. name: what a person calls them."""
    from transformers.utils import get_json_schema

    tools = []
    for function in functions:
        try:
            tools.append(get_json_schema(function))
        except Exception as error:
            # Of several kinds, among them plain ones: for a type that JSON does not have, a parameter without its line.
            called = getattr(function, "__name__", function)
            raise RecipeError(
                f"--tools {name}: no schema can be read from {called}: {error}; give it types, and a docstring with Args:"
            ) from None
    tools = _checked(normalise_tools(tools), name)
    return Offered(tools, {tool["function"]["name"]: function for tool, function in zip(tools, functions, strict=True)})


def _schemas_in(path: Path) -> list[dict]:
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            read = json.loads(text)
            return normalise_tools(read.get("tools", [read]) if isinstance(read, dict) else read)
        # Not splitlines, which parts at U+2028 and others that JSON leaves as they are.
        rows = [json.loads(line) for line in text.split("\n") if line.strip()]
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as JSON ({error})") from None
    found: dict[str, dict] = {}
    for at, row in enumerate(rows, 1):
        try:
            offered = normalise_tools(row.get("tools")) if isinstance(row, dict) else ()
        except DataError as error:
            raise DataError(f"{path}: row {at}: {error}") from None
        for tool in offered:
            found.setdefault(json.dumps(tool, sort_keys=True), tool)
    if not 0 < len(found) <= MOST:
        raise DataError(f"{path}: its rows offer {len(found)} tools; must be 1 to {MOST}, or give a .json list of those that are meant")
    return list(found.values())


def _functions_in(path: Path) -> list[Callable]:
    if not path.is_file():
        raise RecipeError(f"--tools {path}: there is no such file")
    # Under a name that is nobody's: a file may be called as a module that others import, email.py or random.py.
    spec = importlib.util.spec_from_file_location(f"{__name__}.{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise RecipeError(f"--tools {path}; cannot be imported: {type(error).__name__}: {error}") from error
    return [value for key, value in vars(module).items() if inspect.isfunction(value) and value.__module__ == spec.name and key[:1] != "_"]


def _checked(tools: list[dict], name: str) -> list[dict]:
    names = [tool["function"]["name"] for tool in tools]
    if not tools:
        raise DataError(f"--tools {name}: holds no tool")
    if twice := next((one for one in names if names.count(one) > 1), None):
        raise DataError(f'--tools {name}: two tools are called "{twice}"; calls of it could not be told apart')
    for problem in filter(None, map(check_tool, tools)):
        raise DataError(f"--tools {name}: {problem}")
    return tools
