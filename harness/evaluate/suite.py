"""The single-turn Python questions of the Berkeley Function-Calling Leaderboard (BFCL v4), read from its own files.

A questions file has a row {"id", "question", "function": [...]} on every line, an answers file {"id", "ground_truth": [...]}; both are JSON
Lines, whatever they are called. The category is the id without its number: parallel_multiple_12 is in parallel_multiple. What cannot be
scored here is refused by its category, with the reason.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from harness.errors import DataError
from harness.tools import did_you_mean

SUITES = ("bfcl",)
CATEGORIES = (
    "simple_python",
    "multiple",
    "parallel",
    "parallel_multiple",
    "irrelevance",
    "live_simple",
    "live_multiple",
    "live_parallel",
    "live_parallel_multiple",
    "live_irrelevance",
    "live_relevance",
)
WITHOUT_ANSWERS = ("irrelevance", "live_irrelevance", "live_relevance")
"""Nothing should be called; in the last, something should, whatever it is."""
REFUSED = {
    "simple_java": "its calls are Java source, which needs a parser of Java",
    "simple_javascript": "its calls are JavaScript source, which needs a parser of JavaScript",
    "multi_turn": "it is judged by the state of simulated systems after every turn, and not by the calls",
    "memory": "it is judged by the last words of a conversation with a memory, and not by the calls",
    "web_search": "it is judged by the last words of a search in the web, and not by the calls",
    "format_sensitivity": "it asks the questions of other categories again in 26 formats; score each as its own category",
    "exec": "the leaderboard has retired it: its calls have to be executed",
    "rest": "the leaderboard has retired it: its calls have to be executed",
    "sql": "the leaderboard has retired it",
    "chatable": "the leaderboard has retired it, and there are no answers",
}


@dataclass(frozen=True)
class Question:
    id: str
    category: str
    functions: list[dict]
    """As the file has them, in the leaderboard's own dialect of JSON Schema."""
    gold: list[dict] | None
    """A call each: {name: {parameter: [acceptable values]}}. Empty in WITHOUT_ANSWERS, None where no answer was given."""
    turns: object = None
    """What is asked, as the file has it: a list of turns of messages. Who only scores answers needs none."""


def category_of(id: str) -> str:
    """Raises DataError for a category that is not scored here."""
    category = id.rpartition("_")[0] or id
    if category in CATEGORIES:
        return category
    for name, reason in REFUSED.items():
        if category == name or category.startswith(f"{name}_"):
            raise DataError(f'the category "{category}" is not scored here: {reason}')
    raise DataError(
        f'"{id}" names no category of BFCL{did_you_mean(category, CATEGORIES)}; must be one of {", ".join(CATEGORIES)}, and a number'
    )


def load_questions(questions: Iterable[Path], answers: Iterable[Path], *, underscore_names: bool = False) -> dict[str, Question]:
    """The questions by their ids. A path may be a folder: then its BFCL_v*_CATEGORY.json of CATEGORIES are read.

    underscore_names: functions were shown to the model with "_" for "." in their names, as servers with OpenAI's rules for names need it.
    Raises DataError with file and line for a row that cannot be used, an id that occurs twice, and an answer with other functions.
    """
    gold: dict[str, tuple[str, list[dict]]] = {}
    for where, row in _rows(answers, "answers"):
        if row["id"] in gold:
            raise DataError(f'{where}: the id "{row["id"]}" stands in {gold[row["id"]][0]} already; must be one answer for a question')
        gold[row["id"]] = where, _read_ground_truth(where, row)
    found: dict[str, Question] = {}
    for where, row in _rows(questions, "questions"):
        id = row["id"]
        try:
            category = category_of(id)
        except DataError as error:
            raise DataError(f"{where}: {error}") from None
        if id in found:
            raise DataError(f'{where}: the id "{id}" has occurred before; every question needs its own')
        functions = _read_functions(where, row)
        of_gold, wanted = (where, []) if category in WITHOUT_ANSWERS else gold.get(id, (where, None))
        if wanted:
            _check_fits(of_gold, wanted, functions, category)
        found[id] = Question(id, category, functions, wanted, row.get("question"))
    return {id: _with_underscores(question) for id, question in found.items()} if underscore_names else found


def _with_underscores(question: Question) -> Question:
    functions = [{**function, "name": function["name"].replace(".", "_")} for function in question.functions]
    gold = question.gold and [{name.replace(".", "_"): arguments for name, arguments in call.items()} for call in question.gold]
    return replace(question, functions=functions, gold=gold)


def question_files(paths: Iterable[Path], what: str) -> Iterator[Path]:
    """Each file behind the paths. Raises DataError where there is none."""
    for path in paths:
        if path.is_dir():
            inside = [file for file in sorted(path.iterdir()) if _names_category(file)]
            if not inside:
                raise DataError(f"{path}: has no {what} of BFCL; must have BFCL_v4_simple_python.json or another of these categories")
            yield from inside
        elif path.is_file():
            yield path
        else:
            raise DataError(f"{path}: there is no such file of {what}")


def _names_category(file: Path) -> bool:
    named = re.fullmatch(r"BFCL_v\d+_(\w+)\.jsonl?", file.name)
    return named is not None and named.group(1) in CATEGORIES


def _rows(paths: Iterable[Path], what: str) -> Iterator[tuple[str, dict]]:
    for file in question_files(paths, what):
        for where, row in read_lines(file):
            if not isinstance(row, dict) or not isinstance(row.get("id"), str):
                raise DataError(f'{where}: is no row of {what}; must be an object with an "id"')
            yield where, row


def read_lines(file: Path) -> Iterator[tuple[str, object]]:
    """("file:line", value) of every line that is not blank. Raises DataError for one that is not JSON."""
    try:
        lines = file.read_bytes().split(b"\n")
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror})") from None
    for number, line in enumerate(lines, 1):
        if line.strip():
            where = f"{file}:{number}"
            try:
                yield where, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{where}: is not JSON ({error}); must be one object on a line") from None


def _read_functions(where: str, row: dict) -> list[dict]:
    functions = row.get("function")
    if not isinstance(functions, list) or not all(isinstance(one, dict) and isinstance(one.get("name"), str) for one in functions):
        raise DataError(f'{where}: "{row["id"]}" has no list of functions under "function"; is this a file of questions?')
    for function in functions:
        parameters = function.get("parameters")
        properties = parameters.get("properties", {}) if isinstance(parameters, dict) else None
        if not isinstance(properties, dict) or not all(isinstance(schema, dict) for schema in properties.values()):
            raise DataError(
                f'{where}: the function "{function["name"]}" has no parameters; must be {{"type": "dict", "properties": {{name: {{…}}}}}}'
            )
    return functions


def _read_ground_truth(where: str, row: dict) -> list[dict]:
    gold = row.get("ground_truth")
    calls = gold if isinstance(gold, list) and gold else [None]
    for call in calls:
        arguments = next(iter(call.values())) if isinstance(call, dict) and len(call) == 1 else None
        if not isinstance(arguments, dict) or not all(isinstance(values, list) for values in arguments.values()):
            raise DataError(
                f'{where}: "{row["id"]}" has no answers as the leaderboard writes them; must be "ground_truth": '
                "[{name: {parameter: [acceptable values]}}]"
            )
    return calls


def _check_fits(where: str, gold: list[dict], functions: list[dict], category: str) -> None:
    offered = [function["name"] for function in functions]
    for call in gold:
        name = next(iter(call))
        if name not in offered:
            raise DataError(f'{where}: calls "{name}", which its question does not offer{did_you_mean(name, offered)}')
    if "parallel" not in category and len(gold) != 1:
        raise DataError(f"{where}: has {len(gold)} calls; {category} must have one")
