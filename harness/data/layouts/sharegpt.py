"""ShareGPT's turns, {"conversations": [{"from", "value"}]}, and the sets that write tools and calls into their words: Hermes, ToolACE.

Calls come out of the words (`function_call` turns, <tool_call>, ToolACE's brackets), thoughts out of <think>, results out of
<tool_response>. A system prompt that lists tools becomes `tools`; how it tells a model to write calls is dropped, since the chat template
says that.
"""

from __future__ import annotations

import json
import re

from harness.data.conversation import calls_of, conversation, kind_of, message_of, object_of, with_assistant
from harness.data.layouts.base import Layout, Reading, key_set
from harness.data.layouts.notations import split_bracketed, split_hermes_system, split_results, split_words
from harness.errors import DataError
from harness.tools import did_you_mean
from harness.tools.schema import decode_json

ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "function_call": "call",
    "tool_call": "call",
    "observation": "tool",
    "tool": "tool",
    "tool_response": "tool",
    "function_response": "tool",
}
_TOOLACE_LIST = re.compile(r"[^.\n]*list of functions in JSON format that you can invoke:?\s*", re.IGNORECASE)
_TOOLACE_FRAME = "You are an expert in composing functions"
FRAME = "the part of the system prompt that tells a model how to write calls"


def read_sharegpt(row: dict, reading: Reading) -> dict:
    return _read(row, reading, row.get("tools"))


def read_hermes(row: dict, reading: Reading) -> dict:
    """The tools of the system prompt; a column of them beside it (Hermes' reasoning set) says the same and is believed."""
    turns = _turns(row)
    for i, turn in enumerate(turns):
        if turn["role"] == "system":
            kept, tools = split_hermes_system(turn["value"])
            if tools is not None:
                reading.lose(FRAME)
                turns[i] = {**turn, "value": kept}
                return _read(row, reading, row.get("tools") or tools, turns)
    return _read(row, reading, row.get("tools"), turns)


def read_toolace(row: dict, reading: Reading) -> dict:
    system = row["system"]
    found = _TOOLACE_LIST.search(system)
    start = system.find("[", found.end())
    try:
        tools, end = json.JSONDecoder().raw_decode(system[start:]) if start >= 0 else (None, 0)
    except (ValueError, RecursionError) as error:
        raise DataError(f"the list of tools in the system prompt is not JSON ({error})") from None
    before = system[: found.start()]
    kept = before[: before.find(_TOOLACE_FRAME)] if _TOOLACE_FRAME in before else before
    reading.lose(FRAME)
    turns = [{"role": "system", "value": kept.strip()}, *_turns(row)]
    names = [tool["name"] for tool in tools or [] if isinstance(tool, dict) and isinstance(tool.get("name"), str)]
    return _read(row, reading, tools, turns, names)


def _read(row: dict, reading: Reading, tools: object, turns: list[dict] | None = None, bracketed: list[str] | None = None) -> dict:
    """bracketed: names of the tools, where the assistant calls them in ToolACE's notation."""
    turns = _turns(row) if turns is None else turns
    if bracketed is None and isinstance(row.get("system"), str) and row["system"].strip():
        turns = [{"role": "system", "value": row["system"]}, *turns]
    messages: list[dict] = []
    for i, turn in enumerate(turns):
        where, role, value = f"conversations[{i}]", turn["role"], turn["value"]
        if turn.get("message") is not None:  # {role, content, tool_calls}, as OpenAI writes them
            messages.append(turn["message"])
        elif role == "call":
            called = decode_json(value, where)
            called = called if isinstance(called, list) else [called]
            messages = with_assistant(messages, {"tool_calls": calls_of(called, where)})
        elif role == "assistant":
            said = split_bracketed(value, bracketed, where) if bracketed is not None else split_words(value, where)
            if not said.get("content") and "tool_calls" not in said:
                raise DataError(f"{where}: the assistant says nothing")
            messages = with_assistant(messages, said)
        elif role == "tool":
            called = messages[-1].get("tool_calls", []) if messages else []
            messages += [{"role": "tool", "content": text} for text in _results(value, called, where)]
        elif value.strip() or role == "user":
            messages.append({"role": role, "content": value})
    return conversation(messages, tools, reading)


def _turns(row: dict) -> list[dict]:
    raw = decode_json(row["conversations"], "conversations")
    if not isinstance(raw, list):
        raise DataError(f"conversations is {kind_of(raw)}; must be a list of turns")
    return [_turn(turn, f"conversations[{i}]") for i, turn in enumerate(raw)]


def _turn(raw: object, where: str) -> dict:
    raw = object_of(raw, where)
    if "from" not in raw and "role" in raw:
        message = message_of(raw, where)
        return {"role": message["role"], "value": message.get("content", ""), "message": message}
    name, value = raw.get("from"), raw.get("value")
    for key in raw:
        if key not in ("from", "value") and raw[key] is not None:
            raise DataError(f'{where} has a key "{key}"{did_you_mean(key, ("from", "value"))}; must be from, value')
    if not isinstance(name, str) or name not in ROLES:
        shown = f'"{name}"{did_you_mean(name, ROLES)}' if isinstance(name, str) else kind_of(name)
        raise DataError(f"{where}: from is {shown}; must be one of {', '.join(ROLES)}")
    if ROLES[name] == "tool" and isinstance(value, (dict, list)):
        value = json.dumps(value, ensure_ascii=False)
    if not isinstance(value, str):
        raise DataError(f"{where}: value is {kind_of(value)}; must be text")
    return {"role": ROLES[name], "value": value}


def _results(text: str, calls: list[dict], where: str) -> list[str]:
    """One text for each call that is answered. ToolACE answers several calls in one turn: [{"name": …, "results": …}, …]."""
    texts = split_results(text)
    if len(texts) > 1 or len(calls) < 2:
        return texts
    try:
        answers = json.loads(text)
    except (ValueError, RecursionError):
        return texts
    names = [answer.get("name") if isinstance(answer, dict) else None for answer in answers] if isinstance(answers, list) else []
    if names == [call["function"]["name"] for call in calls]:
        return [json.dumps(answer, ensure_ascii=False) for answer in answers]
    return texts


# ---- which of them


def _system_of(row: dict) -> str:
    """The first system prompt, "" without one; whatever the row is."""
    turns = row.get("conversations")
    first = turns[0] if isinstance(turns, list) and turns and isinstance(turns[0], dict) else {}
    value = first.get("value") if first.get("from") == "system" else None
    return value if isinstance(value, str) else ""


def _is_no_pair(row: dict) -> bool:
    return not {"chosen", "rejected"} <= row.keys()


SHAREGPT = Layout(
    (key_set("conversations"),), "conversations of from, value (+ tools, system)", read_sharegpt, key_set("tools system"), fits=_is_no_pair
)
HERMES = Layout(
    (key_set("conversations"),),
    "conversations whose system prompt lists <tools>",
    read_hermes,
    key_set("tools system"),
    fits=lambda row: _is_no_pair(row) and "<tools>" in _system_of(row),
    instead_of=("sharegpt",),
)
TOOLACE = Layout(
    (key_set("system conversations"),),
    "system (with a list of functions), conversations",
    read_toolace,
    fits=lambda row: isinstance(row["system"], str) and bool(_TOOLACE_LIST.search(row["system"])),
    instead_of=("sharegpt",),
)
