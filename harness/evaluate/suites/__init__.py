"""Suites: what a model is asked, and what makes an answer right. One file each.

A suite is a module with

    NEEDS   "answers": the model writes;  "choices": it chooses among written answers, by their probability;  "loss": it reads
    NOTE    what has to stand beside its numbers, if anything
    load(paths, underscore_names=False)   Loaded; raises DataError with file and line
    judge(item, text)                     Verdict on what the model wrote, or on the name of the answer that it chose
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from types import ModuleType

from harness.data.formats import LeftOut
from harness.data.reading import read_raw
from harness.errors import DataError, RecipeError
from harness.evaluate.items import Item
from harness.tools import did_you_mean

SUITES = {
    "bfcl": "the leaderboard's single-turn Python categories: DIR, or BFCL_v4_*.json",
    "apibench": "APIBench: DIR with questions/, api/ and the eval files",
    "when2call": "When2Call, by log-likelihood: its .jsonl",
    "structured": "structured outputs against a JSON Schema: .jsonl",
    "calls": "conversations of your own, whose last turn is the right answer: .jsonl",
    "loss": "the loss of your own held-out rows, of any layout that is trained: .jsonl",
}


@dataclass(frozen=True)
class Verdict:
    """`failure` is one word, None when the answer is right; `detail` says what is wrong. `measures`: name -> (how many, of how many), which
    the suite counts beside it."""

    failure: str | None
    detail: str = ""
    measures: dict[str, tuple[int, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Loaded:
    items: list[Item]
    files: list[Path]
    """That decide what is asked and what is right."""
    left_out: dict[str, int] = field(default_factory=dict)
    """Reason -> rows that cannot be asked or judged."""


def load_own(paths: Sequence[Path], item_of: Callable[[dict], Item | str]) -> Loaded:
    """The rows of files of one's own, each once. item_of: the item of a row, or why it is left out.

    Raises DataError for a row that is none, two rows of one id, and files without a row that is left."""
    found: dict[str, tuple[str, Item]] = {}
    left_out: Counter = Counter()
    for path in paths:
        for where, raw in read_raw(path):
            try:
                item = item_of(raw)
            except LeftOut as reason:
                item = str(reason)
            except DataError as error:
                raise DataError(f"{where}: {error}") from None
            if isinstance(item, str):
                left_out[item] += 1
            elif item.id not in found:
                found[item.id] = where, item
            elif found[item.id][1] == replace(item, category=found[item.id][1].category):
                left_out["the same row again"] += 1
            else:
                raise DataError(f'{where}: the id "{item.id}" stands in {found[item.id][0]} already, with another row; must be one row\'s')
    if not found:
        raise DataError(f"{', '.join(map(str, paths))}: no row is left; {dict(left_out) or 'the files are empty'}")
    return Loaded([item for _, item in found.values()], list(paths), dict(left_out))


def with_underscores(tools: Sequence[dict]) -> list[dict]:
    """The tools, "a.b" as "a_b" (--underscore-names)."""
    return [{**tool, "function": {**tool["function"], "name": tool["function"]["name"].replace(".", "_")}} for tool in tools]


def find_suite(name: str) -> ModuleType:
    """Raises RecipeError for a name that is none."""
    if name not in SUITES:
        raise RecipeError(f"--suite {name}: no such suite{did_you_mean(name, SUITES)}; there are {', '.join(SUITES)}")
    return import_module(f"harness.evaluate.suites.{name}")
