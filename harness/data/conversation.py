"""Messages of a canonical conversation (formats.py says what that is): read strictly, put together, checked.

Everything here raises DataError saying what is wrong in the row; the caller knows where the row stands.
"""

from __future__ import annotations

import json
from collections.abc import Callable

from harness.data.layouts.base import Reading
from harness.errors import DataError
from harness.tools import did_you_mean, normalise_tools, read_call
from harness.tools.schema import decode_json, distinct_keys

ROLES = ("system", "user", "assistant", "tool")
_ALIASES = {"developer": "system"}  # OpenAI's newer name for the same message
_HINTS = {"human": "user", "gpt": "assistant", "model": "assistant", "function": "tool", "observation": "tool", "ipython": "tool"}
_MESSAGE_KEYS = ("role", "content", "reasoning_content", "tool_calls", "tool_call_id", "name")
_ONLY_ON = {"reasoning_content": "assistant", "tool_calls": "assistant", "tool_call_id": "tool"}


class UnknownTool(DataError):
    """A call that is trained names no tool of its row."""


class Unpaired(DataError):
    """A tool's result answers no call."""


# ---- reading


def messages_of(raw: object, where: str) -> list[dict]:
    raw = decode_json(raw, where)
    if not isinstance(raw, list):
        raise DataError(f"{where} is {kind_of(raw)}; must be a list of messages")
    return [message_of(message, f"{where}[{i}]") for i, message in enumerate(raw)]


def message_of(raw: object, where: str) -> dict:
    # OpenAI's logs carry `"refusal": null`, `"annotations": []` and the like: nothing said, nothing lost.
    raw = {key: value for key, value in object_of(raw, where).items() if value is not None and value != []}
    for key in raw:
        if key not in _MESSAGE_KEYS:
            # Not ignored: `weight: 0` or `function_call` would change what is trained.
            raise DataError(f'{where} has a key "{key}"{did_you_mean(key, _MESSAGE_KEYS)}; must be {", ".join(_MESSAGE_KEYS)}')
    role = role_of(raw.get("role"), where)
    for key, owner in _ONLY_ON.items():
        if key in raw and role != owner:
            raise DataError(f"{where}: {key} stands on a {role} message; only {owner} messages have it")
    message = {"role": role}
    if role == "assistant" and isinstance(raw.get("content"), list):
        raw = _split_parts(raw, where)
    if "content" in raw:
        message["content"] = _content(raw["content"], where)
    for key in ("reasoning_content", "tool_call_id", "name"):
        if key in raw:
            if not isinstance(raw[key], str):
                raise DataError(f"{where}: {key} is {kind_of(raw[key])}; must be text")
            message[key] = raw[key]
    if "tool_calls" in raw:
        message["tool_calls"] = calls_of(raw["tool_calls"], where)
    if role == "assistant" and not message.get("content") and "tool_calls" not in message:
        raise DataError(f"{where}: the assistant says nothing; must have content or tool_calls")
    if role != "assistant" and "content" not in message:
        raise DataError(f"{where}: the {role} message has no content")
    return message


def role_of(role: object, where: str) -> str:
    role = _ALIASES.get(role, role) if isinstance(role, str) else role
    if role in ROLES:
        return role
    if not isinstance(role, str):
        raise DataError(f"{where}: role is {kind_of(role)}; must be {', '.join(ROLES)}")
    hint = f'; did you mean "{_HINTS[role]}"?' if role in _HINTS else did_you_mean(role, ROLES)
    raise DataError(f'{where}: role is "{role}"; must be {", ".join(ROLES)}{hint}')


def _split_parts(raw: dict, where: str) -> dict:
    """LLaMA-Factory writes what the assistant thinks and calls as parts of its content: {"type": "reasoning"|"tool_call", "value": …}."""
    said = {
        kind: [part.get("value") for part in raw["content"] if isinstance(part, dict) and part.get("type") == kind]
        for kind in ("reasoning", "tool_call")
    }
    if not any(said.values()):
        return raw
    parts = [part for part in raw["content"] if not (isinstance(part, dict) and part.get("type") in said)]
    split = {key: value for key, value in raw.items() if key != "content"} | ({"content": parts} if parts else {})
    if said["reasoning"]:
        if not all(isinstance(thought, str) for thought in said["reasoning"]) or "reasoning_content" in raw:
            raise DataError(f"{where}: the reasoning is not text, or stands in two places")
        split["reasoning_content"] = "\n".join(said["reasoning"])
    if said["tool_call"]:
        if "tool_calls" in raw:
            raise DataError(f"{where}: calls stand in content and in tool_calls; must be in one of them")
        calls = [decode_json(value, f"{where}: tool_call") for value in said["tool_call"]]
        split["tool_calls"] = [call for value in calls for call in (value if isinstance(value, list) else [value])]
    return split


def _content(content: object, where: str) -> str:
    """Text, or a list of text parts (joined: a text model's template would print the list)."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise DataError(f"{where}: content is {kind_of(content)}; must be text (an object goes in as its JSON text)")
    return "".join(_text_of(part, where) for part in content)


def _text_of(part: object, where: str) -> str:
    if isinstance(part, dict) and part.get("type") in ("text", "input_text", "output_text"):
        text = part.get("text", part.get("value"))
        if isinstance(text, str):
            return text
    raise DataError(f'{where}: content has the part {json.dumps(part)[:60]}; must be text or parts {{"type": "text", "text": …}}')


def calls_of(raw: object, where: str) -> list[dict]:
    raw = decode_json(raw, f"{where}: tool_calls")
    if not isinstance(raw, list):
        raise DataError(f"{where}: tool_calls is {kind_of(raw)}; must be a list")
    return [_read_call(call, f"{where}: call {i}") for i, call in enumerate(raw)]


def _read_call(raw: object, where: str) -> dict:
    raw = object_of(raw, where)
    function = object_of(raw["function"], where) if "function" in raw else raw
    name = function.get("name")
    if not isinstance(name, str) or not name:
        raise DataError(f"{where} has no name; must be {{name, arguments}}")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        _refuse_twin_keys(arguments, f'{where}: arguments of "{name}"')
    call = read_call({"name": name, "arguments": arguments})
    if call is None:
        shown = json.dumps(arguments, default=str)[:60]
        raise DataError(f'{where}: arguments of "{name}" are {shown}; must be an object, or its JSON text ({{}} where there are none)')
    identity = {"id": raw["id"]} if isinstance(raw.get("id"), str) else {}
    return {**identity, "type": "function", "function": {"name": name, "arguments": call.arguments}}


def _refuse_twin_keys(text: str, what: str) -> None:
    """Only these: what is no JSON at all is said by whoever reads it."""
    try:
        json.loads(text, object_pairs_hook=distinct_keys)
    except json.JSONDecodeError:
        pass
    except (ValueError, RecursionError) as error:
        raise DataError(f"{what}: {error}") from None


# ---- conversations


def conversation(messages: list[dict], tools: object, reading: Reading, train_from: int | None = None) -> dict:
    row = {"messages": messages}
    _lose_tool_keys(tools, reading)
    tools = normalise_tools(tools)
    if tools:  # [] would make some templates print the frame of a tool list around nothing
        row["tools"] = tools
    if train_from is not None:
        row["train_from"] = train_from
    return row


def _lose_tool_keys(tools: object, reading: Reading) -> None:
    """Says what normalise_tools leaves out; servers do not show it to a model either."""
    tools = decode_json(tools, "tools") if reading.counts_losses else None
    for tool in tools if isinstance(tools, list) else []:
        tool = decode_json(tool, "a tool")
        function = tool.get("function") if isinstance(tool, dict) else None
        function = function if isinstance(function, dict) else tool
        if not isinstance(function, dict):
            continue
        parameters = function.get("parameters")
        is_flat = isinstance(parameters, dict) and "properties" not in parameters
        kept = {"type", "function", "name", "description", "parameters"} | ({"required"} if is_flat else set())
        for key in (tool.keys() | function.keys()) - kept:
            if function.get(key) or tool.get(key):
                reading.lose(f"`{key}` of a tool")


def with_assistant(messages: list[dict], said: dict) -> list[dict]:
    """Appends what the assistant said, to its open turn where there is one: templates know no two assistant turns in a row."""
    last = messages[-1] if messages else {}
    if last.get("role") != "assistant" or "tool_calls" in last:
        return [*messages, {"role": "assistant", **said}] if any(said.values()) else messages
    content = "\n".join(part for part in (last.get("content"), said.get("content")) if part)
    merged = {**last, **said, **({"content": content} if content else {})}
    return [*messages[:-1], merged]


def check_conversation(row: dict, *, asks: bool) -> None:
    messages, start = row["messages"], row.get("train_from", 0)
    if not messages:
        raise DataError("there are no messages")
    if asks:
        messages = messages[:-1] if messages[-1]["role"] == "assistant" else messages
        if not any(message["role"] in ("user", "tool") for message in messages):
            raise DataError("nobody asks anything; there must be a message of the user or a tool to answer")
    elif messages[-1]["role"] != "assistant":
        raise DataError(f"the last message is the {messages[-1]['role']}'s; must be the assistant's, whose words are trained")
    check_results(messages)
    check_offered(messages[start:], row.get("tools", []), lambda i: f"messages[{i + start}]")


def check_results(messages: list[dict], place: Callable[[int], str] = "messages[{}]".format) -> None:
    """Raises Unpaired unless every tool result answers a call. place: what a person calls message i."""
    open_calls: list[dict] = []
    for i, message in enumerate(messages):
        open_calls = _answered(open_calls, message, place(i)) if message["role"] == "tool" else list(message.get("tool_calls", []))


def check_offered(messages: list[dict], tools: list[dict], place: Callable[[int], str] = "messages[{}]".format) -> None:
    """Raises UnknownTool unless every call names one of the tools. place: as in `check_results`."""
    offered = [tool["function"]["name"] for tool in tools]
    for i, message in enumerate(messages):
        for call in message.get("tool_calls", []):
            name = call["function"]["name"]
            if name not in offered:
                what = f"is not among the row's tools{did_you_mean(name, offered)}" if offered else "is made, but the row offers no tools"
                raise UnknownTool(f'{place(i)}: tool call "{name}" {what}')


def _answered(open_calls: list[dict], result: dict, where: str) -> list[dict]:
    """The calls still without a result after this one; by id where both sides have one, else in order."""
    if not open_calls:
        raise Unpaired(f"{where}: a tool result without a call; must follow an assistant message with as many tool_calls")
    identity = result.get("tool_call_id")
    ids = [call.get("id") for call in open_calls]
    if identity is None or None in ids:
        return open_calls[1:]
    if identity not in ids:
        raise Unpaired(f'{where}: tool_call_id "{identity}" answers no open call; must be one of {", ".join(ids)}')
    return [call for call in open_calls if call["id"] != identity]


# ---- values


def object_of(value: object, what: str) -> dict:
    value = decode_json(value, what)
    if not isinstance(value, dict):
        raise DataError(f"{what} is {kind_of(value)}; must be an object")
    return value


def kind_of(value: object) -> str:
    names = {type(None): "missing", bool: "a boolean", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return "empty" if value == "" else names.get(type(value), type(value).__name__)
