"""Small edits of a gold answer that make it wrong, each in one way: negatives for questions that a model gets right.

    wrong_tool         another offered tool with the same arguments
    missing_argument   a required argument is gone
    extra_argument     an argument that the tool does not have; another tool's, where one has any
    wrong_type         a number as text, a text as a list, and so on
    unneeded_call      a call where words were right: a tool that cannot help, or a guess where the gold asks what is missing

Each edit is one candidate; whoever uses it proves with the scorer that it fails with its class. A tool's first fitting place is edited, so
that the same gold gives the same edits.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from harness.tools import ToolCall

INVENTED = "options"
"""The name of an extra argument, where no offered tool has another one."""


@dataclass(frozen=True)
class Edit:
    failure: str
    calls: list[ToolCall]


def edits_of(question: dict, gold: Sequence[ToolCall]) -> Iterator[Edit]:
    """Every edit that the gold of this question allows, at most one of each class."""
    offered = {tool["function"]["name"]: tool["function"].get("parameters", {}) for tool in question.get("tools", [])}
    if not gold:
        asked = next((message["content"] for message in reversed(question["messages"]) if message["role"] == "user"), "")
        yield from (Edit("unneeded_call", [ToolCall(name, _guess(offered[name], asked))]) for name in sorted(offered)[:1])
        return
    for failure, edit in (
        ("wrong_tool", _renamed),
        ("missing_argument", _without_required),
        ("extra_argument", _with_foreign),
        ("wrong_type", _of_another_type),
    ):
        for at, call in enumerate(gold):
            if changed := edit(call, offered, {other.name for other in gold}):
                yield Edit(failure, [*gold[:at], changed, *gold[at + 1 :]])
                break


def _renamed(call: ToolCall, offered: dict, called: set[str]) -> ToolCall | None:
    others = sorted(offered.keys() - called, key=lambda name: (-len(_parameters(offered[name]).keys() & call.arguments.keys()), name))
    return ToolCall(others[0], call.arguments) if others else None


def _without_required(call: ToolCall, offered: dict, called: set[str]) -> ToolCall | None:
    required = [name for name in call.arguments if name in offered.get(call.name, {}).get("required", ())]
    return ToolCall(call.name, {name: value for name, value in call.arguments.items() if name != required[-1]}) if required else None


def _with_foreign(call: ToolCall, offered: dict, called: set[str]) -> ToolCall | None:
    own = _parameters(offered.get(call.name, {})).keys() | call.arguments.keys()
    foreign = {name: spec for tool in sorted(offered) for name, spec in _parameters(offered[tool]).items() if name not in own}
    name = min(foreign, default=INVENTED)
    return None if name in own else ToolCall(call.name, {**call.arguments, name: _value(foreign.get(name, {}), "default")})


def _of_another_type(call: ToolCall, offered: dict, called: set[str]) -> ToolCall | None:
    # A number as text is what data and models do most often, so it goes first.
    for kind in ((bool, int, float), (list, dict), (str,)):
        for name, value in call.arguments.items():
            if isinstance(value, kind):
                changed = [value] if isinstance(value, str) else json.dumps(value)
                return ToolCall(call.name, {**call.arguments, name: changed})
    return None


def _parameters(schema: dict) -> dict:
    found = schema.get("properties", {})
    return found if isinstance(found, dict) else {}


def _guess(schema: dict, asked: str) -> dict:
    """The required arguments of a tool, filled by its schema, and text by what was asked."""
    return {name: _value(_parameters(schema).get(name, {}), asked) for name in schema.get("required", ())}


def _value(schema: object, text: str) -> object:
    schema = schema if isinstance(schema, dict) else {}
    for given in (schema.get("enum"), schema.get("examples"), [schema["default"]] if "default" in schema else None):
        if isinstance(given, list) and given:
            return given[0]
    plain = {"integer": 1, "number": 1.0, "boolean": True, "array": [], "object": {}, "null": None}
    return plain.get(str(schema.get("type")), text)
