"""APIBench (Gorilla): which API of Torch Hub, TensorFlow Hub or Hugging Face serves a wish. Its published metric, over Python's own `ast`.

Files: a folder with questions/questions_HUB_0_shot.jsonl, api/HUB_api.jsonl (the database) and the HUB's eval file, whose row N has the
domain that question N asks for. The question is asked as it stands, with nothing around it: so do rows of the layout `apibench` train.

An answer is right when it makes a call that is in the database, of the domain that is asked for. It is in the database when an entry has
the same function and every key argument of the entry (repo_or_dir and model on Torch Hub, all of them elsewhere) stands in the call; the
first such entry counts. A call without an entry is a hallucination. As the published scripts do, what stands between "api_call" and
"api_provider" is looked at where the answer has these words, and else all of it. Otherwise than there, a call of another function is
never an entry's (theirs compares the last sub-tree they have seen), and an answer without any call is `no_call` on every hub.

Every API that its questions ask for is also among the training rows: it measures recall of a closed set, and not that of new APIs.
"""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from harness.errors import DataError
from harness.evaluate.items import Item
from harness.evaluate.suite import read_lines
from harness.evaluate.suites import Loaded, Verdict
from harness.tools.calls import spoken

NEEDS = "answers"
NOTE = "closed set: every API that is asked for is also among APIBench's training rows"
EVAL_FILES = {"torchhub": "torchhub_eval.json", "tensorflowhub": "tensorflow_eval.json", "huggingface": "huggingface_eval.json"}
CALL_CHARACTERS, TRIED_ENDS, TRIED_CALLS = 2000, 20, 100
"""Of one call, and of one answer: a text of brackets alone shall not take a night."""


@dataclass(frozen=True)
class Api:
    """An entry of the database."""

    function: str
    key_arguments: tuple[str, ...]
    domain: str


def load(paths: Sequence[Path], *, underscore_names: bool = False) -> Loaded:
    items, files = [], []
    for folder in paths:
        found = [hub for hub in EVAL_FILES if (folder / "questions" / f"questions_{hub}_0_shot.jsonl").is_file()]
        if not found:
            raise DataError(
                f"{folder}: holds no questions/questions_torchhub_0_shot.jsonl or another hub's; give the folder of APIBench's data"
            )
        for hub in found:
            questions, database = folder / "questions" / f"questions_{hub}_0_shot.jsonl", folder / "api" / f"{hub}_api.jsonl"
            apis = load_database(database, hub)
            wanted = [_domain_of(where, row) for where, row in read_lines(folder / EVAL_FILES[hub])]
            items += [_item(where, row, hub, apis, wanted) for where, row in read_lines(questions)]
            files += [questions, database, folder / EVAL_FILES[hub]]
    return Loaded(items, files)


def _item(where: str, row: object, hub: str, apis: list[Api], wanted: list[str]) -> Item:
    number, text = (row.get("question_id"), row.get("text")) if isinstance(row, dict) else (None, None)
    if not isinstance(text, str) or not isinstance(number, int) or not 1 <= number <= len(wanted):
        raise DataError(f'{where}: is no question; must have "text", and as "question_id" a row of {EVAL_FILES[hub]}, from 1')
    # The files have a line's end as two characters.
    asked = [{"role": "user", "content": text.replace("\\n", "\n").strip()}]
    return Item(f"{hub}_{number}", hub, asked, [], {"domain": wanted[number - 1], "apis": apis})


def _domain_of(where: str, row: object) -> str:
    try:
        return row["api_data"]["domain"]
    except (TypeError, KeyError):
        raise DataError(f"{where}: has no api_data.domain; is this a file of APIBench?") from None


def load_database(file: Path, hub: str) -> list[Api]:
    """The entries in their order, without those whose api_call cannot be read as Python."""
    apis = []
    for where, row in read_lines(file):
        if not isinstance(row, dict) or not isinstance(row.get("api_call"), str) or "domain" not in row:
            raise DataError(f"{where}: has no api_call and domain; is this a database of APIBench?")
        if call := next(calls_in(row["api_call"]), None):
            apis.append(Api(ast.unparse(call.func), _key_arguments(call, hub), row["domain"]))
    return apis


def _key_arguments(call: ast.Call, hub: str) -> tuple[str, ...]:
    named = [keyword for keyword in call.keywords if hub != "torchhub" or keyword.arg in ("repo_or_dir", "model")]
    values = [] if hub == "torchhub" and named else list(call.args)
    return tuple(_text_of(value) for value in [*values, *(keyword.value for keyword in named)])


def _text_of(value: ast.expr) -> str:
    return value.value if isinstance(value, ast.Constant) and isinstance(value.value, str) else ast.unparse(value)


# ---- an answer


def judge(item: Item, text: str) -> Verdict:
    calls = list(calls_in(api_call_of(spoken(text))))
    if not calls:
        return Verdict("no_call", "calls nothing", {"hallucination": (0, 1)})
    api = find_api(calls, item.gold["apis"])
    if api is None:
        shown = ast.unparse(calls[0])[:200]
        return Verdict("hallucination", f"{shown}: is not in the database of {item.category}", {"hallucination": (1, 1)})
    wrong = None if api.domain == item.gold["domain"] else "wrong_domain"
    detail = f"calls {api.function} for {api.domain}; must be for {item.gold['domain']}" if wrong else ""
    return Verdict(wrong, detail, {"hallucination": (0, 1)})


def api_call_of(text: str) -> str:
    """What the answer's own format marks as the call; all of it where it has no such format."""
    _, marked, after = text.partition("api_call")
    return after.split("api_provider")[0] if marked else text


def find_api(calls: Sequence[ast.Call], apis: Sequence[Api]) -> Api | None:
    """The first entry that one of the calls is."""
    made = [(ast.unparse(call.func), _values_in(call)) for call in calls]
    for api in apis:
        if not api.key_arguments:
            continue
        if any(function == api.function and all(argument in text for argument in api.key_arguments) for function, text in made):
            return api
    return None


def _values_in(call: ast.Call) -> str:
    return "\n".join([ast.unparse(call), *(_text_of(value) for value in [*call.args, *(keyword.value for keyword in call.keywords)])])


_OPENED, _CLOSED = re.compile(r"[A-Za-z_][\w.]*\("), re.compile(r"\)")
# load(repo_or_dir='a', 'b') is no Python, and stands in a tenth of Torch Hub's gold: the later text gets a name.
_LATE_POSITION = re.compile(r"""(,\s*)(?=['"])""")


def calls_in(text: str) -> Iterator[ast.Call]:
    """The calls in a text that need not be Python, one that stands in another's arguments after it."""
    for opened in islice(_OPENED.finditer(text), TRIED_CALLS):
        if call := _call_at(text, opened.start(), opened.end()):
            yield call


def _call_at(text: str, start: int, opened: int) -> ast.Call | None:
    """The call that begins here, up to the first bracket that makes it one."""
    ends = (found.end() for found in _CLOSED.finditer(text, opened, start + CALL_CHARACTERS))
    for end in islice(ends, TRIED_ENDS):
        for source in (text[start:end], _LATE_POSITION.sub(r"\1_=", text[start:end])):
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # the model's text is not our source code
                    parsed = ast.parse(source, mode="eval").body
            except (SyntaxError, ValueError, RecursionError, MemoryError):
                continue
            return parsed if isinstance(parsed, ast.Call) else None
    return None
