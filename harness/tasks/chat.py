"""A conversation that a person holds with a run, a model or a server: turns asked for, calls judged, tools run, and the whole as a row.

    chat.ask(text)                 one question
    chat.answer(hear) -> Turn      what the model says to it: words, calls with what is wrong with each, or why it is no turn
    chat.give(turn, results)       the results of its calls, which the next answer takes into account
    chat.row()                     {"messages", "tools"}, which can be trained; or why it cannot
    chat.take_back()               the last question and all that followed

Promise. `messages` holds whole turns alone: what was stopped, refused or empty is taken back with its question, so that neither the next
answer nor a saved row builds on a torn one.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from harness.errors import DataError, EvaluationError
from harness.evaluate.items import Item
from harness.tasks.answering import Connection, Local, Served, Settings, is_served
from harness.tools import Fault, Problem, ToolCall, check_call, read_turn
from harness.tools.offered import Offered

PATIENCE = 1
"""So often a server that does not answer is asked again: a person waits for it."""


@dataclass(frozen=True)
class Turn:
    said: str
    """As it was written."""
    calls: list[ToolCall] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    problems: list[list[Problem]] = field(default_factory=list)
    """Of each call, what is wrong with it; empty where nothing is."""
    fault: Fault | None = None
    """Why it is no turn that a model could be trained on: cut off, or a call that cannot be read."""
    tokens: int = 0
    seconds: float = 0.0


class NotAnswered(Exception):
    """The question was taken back: the model, its template or the server does not take it, or nothing was said to it."""


class Chat:
    def __init__(self, who: Local | Served, settings: Settings, offered: Offered, system: str | None = None, *, shorten: bool = False):
        """shorten: an answer has at most what the model's positions leave (answering.Local.speak)."""
        self.shorten = shorten
        self.who, self.settings, self.offered, self.system = who, settings, offered, system
        self.faults: dict[int, str] = {}
        """Place of a message -> why it must not be trained."""
        self._asked = 0
        self.reset()
        if offered.tools:
            who.check_can("answers", [self._item([{"role": "user", "content": "?"}])])

    def reset(self) -> None:
        self.messages = [{"role": "system", "content": self.system}] if self.system else []
        self.faults.clear()

    @property
    def has_begun(self) -> bool:
        return any(message["role"] == "user" for message in self.messages)

    def ask(self, text: str) -> None:
        self.messages.append({"role": "user", "content": text})

    def answer(self, hear: Callable[[str], None]) -> Turn:
        """hear: told what is said, in pieces as it is written. Raises NotAnswered; whatever it raises, the question is taken back."""
        begun = time.monotonic()
        try:
            said = self.who.speak(self._item(self.messages), self.settings.seed + self._asked, hear, shorten=self.shorten)
        except BaseException:
            self.take_back()
            raise
        self._asked += 1
        if said.failure:
            self.take_back()
            raise NotAnswered(f"{said.failure}: {said.detail}")
        found = read_turn(said.said)
        if isinstance(found, Fault) and found.kind == "empty":
            self.take_back()
            raise NotAnswered("empty: the model says nothing and calls nothing")
        spent = {"tokens": said.answer_tokens, "seconds": time.monotonic() - begun}
        fault = found if isinstance(found, Fault) else None
        if fault is None and not said.ended:
            fault = Fault("cut_off", f"did not stop within {self.settings.max_new_tokens} tokens (--max-new-tokens)")
        if fault:
            self.faults[len(self.messages)] = f"{fault.kind}: {fault.reason}"
            self.messages.append({"role": "assistant", "content": said.said})
            return Turn(said.said, fault=fault, **spent)
        place, named = len(self.messages), found.get("tool_calls", [])
        calls = [ToolCall(call["function"]["name"], call["function"]["arguments"]) for call in named]
        ids = [f"call{place:03}{n:02}" for n in range(len(calls))]
        problems = [check_call(call, self.offered.tools) for call in calls]
        if wrong := next(filter(None, problems), None):
            self.faults[place] = f"{wrong[0].kind}: {wrong[0]}"
        if named:
            found = {**found, "tool_calls": [{"id": id, **call} for id, call in zip(ids, named, strict=True)]}
        self.messages.append(found)
        return Turn(said.said, calls, ids, problems, **spent)

    def give(self, turn: Turn, results: list[str]) -> None:
        for call, id, result in zip(turn.calls, turn.ids, results, strict=True):
            self.messages.append({"role": "tool", "tool_call_id": id, "name": call.name, "content": result})

    @property
    def waits(self) -> bool:
        """Whether the last message is a call whose result nobody has given: after it no question can follow."""
        return bool(self.messages and self.messages[-1].get("tool_calls"))

    def take_back(self) -> str | None:
        """Forget the last question and all that followed. Returns it; None where there is none."""
        places = [at for at, message in enumerate(self.messages) if message["role"] == "user"]
        if not places:
            return None
        question = self.messages[places[-1]]["content"]
        del self.messages[places[-1] :]
        self.faults = {at: why for at, why in self.faults.items() if at < places[-1]}
        return question

    def row(self) -> dict:
        """Raises DataError where it is no row to train on, with the reason."""
        from harness.data.findings import check_row
        from harness.data.formats import to_canonical

        row = {"messages": self.messages} | ({"tools": self.offered.tools} if self.offered.tools else {})
        if not self.has_begun:
            raise DataError("nothing has been said yet")
        if self.faults:
            at, why = next(iter(self.faults.items()))
            raise DataError(f"message {at} is not what a model should learn ({why}); take it back, or begin a new conversation")
        findings = check_row(to_canonical(row, "messages"))
        if findings:
            raise DataError(f"{findings[0].kind}: {findings[0].where} {findings[0].message}")
        return row

    def _item(self, messages: list[dict]) -> Item:
        return Item("chat", "chat", list(messages), self.offered.tools, {})


def open_target(target: str, settings: Settings, connection: Connection) -> Local | Served:
    if is_served(target):
        return Served(target, settings, connection, PATIENCE)
    who = Local(target, settings)
    who.load()
    return who


def save_row(chat: Chat, path: Path) -> None:
    """Append the conversation to a file of rows. Raises DataError where it is none that can be trained, EvaluationError for the file."""
    try:
        line = json.dumps(chat.row(), ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError as error:
        raise DataError(f"{error.object[error.start]!r} is half of a surrogate pair, no character; take it back") from None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab") as stream:
            stream.write(line)
    except OSError as error:
        raise EvaluationError(f"{path}: cannot be written: {error.strerror}") from None
