"""When2Call: to call, to ask back, to say that it cannot be done, or to answer directly.

Each row has a question, tools (or none), four written answers and the name of the right one. The model chooses: the answer with the
highest log-probability per character, as its own chat template writes it after the question (lm-eval's acc_norm, which the paper reports
as Acc-Norm). No judge is asked and nothing is drawn. `tool_hallucination` is the paper's: of the rows without tools, those where the call
is chosen.

Derived from BFCL: who trains on it must not report BFCL.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from harness.errors import DataError
from harness.evaluate.items import Item
from harness.evaluate.suite import read_lines
from harness.evaluate.suites import Loaded, Verdict, with_underscores
from harness.tools import normalise_tools, read_call
from harness.tools.schema import decode_json

NEEDS = "choices"
NOTE = "chosen among written answers by log-probability per character; derived from BFCL"
CHOICES = ("direct", "tool_call", "request_for_info", "cannot_answer")


def load(paths: Sequence[Path], *, underscore_names: bool = False) -> Loaded:
    return Loaded([_item(where, row, underscore_names) for path in paths for where, row in read_lines(path)], list(paths))


def _item(where: str, row: object, underscore_names: bool) -> Item:
    wanted = {"uuid", "question", "correct_answer", "answers", "tools"}
    if not isinstance(row, dict) or not wanted <= row.keys():
        raise DataError(f"{where}: is no row of When2Call; must have {', '.join(sorted(wanted))}")
    answers = row["answers"]
    if not isinstance(answers, dict) or not set(CHOICES) <= answers.keys() or row["correct_answer"] not in CHOICES:
        raise DataError(f"{where}: must have an answer for each of {', '.join(CHOICES)}, and one of them as correct_answer")
    words = [row["question"], *(answers[choice] for choice in CHOICES if choice != "tool_call")]
    if not all(isinstance(text, str) and text.strip() for text in words):
        # The log-probability of nothing is 0, and so above that of any words.
        raise DataError(f"{where}: the question and each of the answers must be text that is not empty")
    try:
        tools = normalise_tools(row["tools"])
    except DataError as error:
        raise DataError(f"{where}: {error}") from None
    call = read_call(decode_json(answers["tool_call"], f"{where}: answers.tool_call"))
    if call is None:
        raise DataError(f'{where}: answers.tool_call is no call; must be {{"name", "arguments"}} as JSON')
    name = call.name
    if underscore_names:
        name = name.replace(".", "_")
        tools = with_underscores(tools)
    said = {"type": "function", "function": {"name": name, "arguments": call.arguments}}
    messages = {choice: {"role": "assistant", "content": answers[choice]} for choice in CHOICES}
    messages["tool_call"] = {"role": "assistant", "tool_calls": [said]}
    asked = [{"role": "user", "content": row["question"]}]
    return Item(str(row["uuid"]), row["correct_answer"], asked, tools, {"choices": messages, "right": row["correct_answer"]})


def judge(item: Item, text: str) -> Verdict:
    """text: the name of the answer that was chosen."""
    measures = {} if item.tools else {"tool_hallucination": (int(text == "tool_call"), 1)}
    wrong = text != item.gold["right"]
    return Verdict(f"chose_{text}" if wrong else None, f"chose {text}; must be {item.gold['right']}" if wrong else "", measures)
