"""Calls, thoughts and tools that sets write into the words of a turn, taken out again.

A turn that tries to call and cannot be read is refused: trained as words it would teach a broken call.
"""

from __future__ import annotations

import ast
import json
import re
import warnings

from harness.errors import DataError
from harness.tools import parse_calls, read_call
from harness.tools.schema import decode_json
from harness.tools.served import keyword_arguments

_THOUGHT = re.compile(r"\s*<think>(.*?)</think>\s*", re.DOTALL)
_HERMES_CALL = re.compile(r"\s*<tool_call>\s*(.*?)\s*(?:</tool_call>|\Z)\s*", re.DOTALL)
_HERMES_RESULT = re.compile(r"<tool_response>\s*(.*?)\s*</tool_response>", re.DOTALL)
_GLAIVE_CALL = re.compile(r"\s*<functioncall>\s*(.*)\Z", re.DOTALL)
_OTHER_CALL = re.compile(r"</tool_call>|<\|python_tag\|>|\[TOOL_CALLS\]|<function=|<TOOLCALL>|functools\[")
_QUOTED_ARGUMENTS = re.compile(r"""(.*"arguments"\s*:\s*)'(.*)'(\s*\}\s*)\Z""", re.DOTALL)


def split_words(text: str, where: str) -> dict:
    """What an assistant's text says, thinks (<think>) and calls (<tool_call>, <functioncall>), as the keys of a message."""
    message, thought = {}, _THOUGHT.match(text)
    if thought:
        text = text[thought.end() :]
        if thought.group(1).strip():
            message["reasoning_content"] = thought.group(1).strip()
    calls = []
    if "<tool_call>" in text:
        calls = [_read_block(block, where) for block in _HERMES_CALL.findall(text)]
        text = _HERMES_CALL.sub("\n", text).strip()
    elif found := _GLAIVE_CALL.search(text):
        calls = [read_glaive_call(found.group(1), where)]
        text = text[: found.start()].strip()
    elif found := _OTHER_CALL.search(text):
        raise DataError(f"{where}: a call in a notation that is not read here: {text[found.start() :][:80]}")
    if calls:
        message["tool_calls"] = calls
    if text:
        message["content"] = text
    return message


def _read_block(block: str, where: str) -> dict:
    """JSON, or the Python dict that Hermes' first sets hold."""
    try:
        value = json.loads(block)
    except (ValueError, RecursionError):
        value = _literal(block)
    call = read_call(value)
    if call is None:
        raise DataError(f"{where}: a call that cannot be read: {block[:80]}")
    return {"type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _literal(text: str) -> object:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an odd escape in somebody's data
            return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return None


def read_glaive_call(text: str, where: str) -> dict:
    """{"name": "f", "arguments": '{"a": "it's"}'}: JSON but for the arguments, which stand in single quotes that nothing escapes."""
    quoted = _QUOTED_ARGUMENTS.match(text.strip())
    if quoted:
        head, arguments, tail = quoted.groups()
        text = head + json.dumps(arguments.replace("\\'", "'")) + tail
    return _read_block(text.strip(), where)


def split_results(text: str) -> list[str]:
    """The results of one tool turn: what <tool_response> tags hold, or the text as it is."""
    found = _HERMES_RESULT.findall(text)
    return found if found and not _HERMES_RESULT.sub("", text).strip() else [text]


# ---- ToolACE: [Name of a tool(a="x", b=[1]), …], where a name may hold blanks and brackets


def split_bracketed(text: str, names: list[str], where: str) -> dict:
    """Calls in ToolACE's notation as the keys of a message; text that does not begin like them is words."""
    stripped = text.strip()
    if not (stripped.startswith("[") and stripped.endswith("]") and "(" in stripped):
        return split_words(text, where)
    calls, rest = [], stripped[1:-1].strip()
    while rest:
        name = max((name for name in names if rest.startswith(f"{name}(")), key=len, default=None)
        if name is None:
            if not calls and not parse_calls(stripped).attempted:
                return {"content": text}  # words in brackets
            raise DataError(f'{where}: a call of no tool of the row: "{rest[:60]}"')
        end = _closing(rest, len(name))
        arguments = _keyword_arguments(rest[len(name) : end + 1], where)
        calls.append({"type": "function", "function": {"name": name, "arguments": arguments}})
        rest = rest[end + 1 :].lstrip().removeprefix(",").lstrip()
    return {"tool_calls": calls}


def _closing(text: str, start: int) -> int:
    """The place of the bracket that closes the one at `start`; quotes hide brackets. The last character where nothing does."""
    depth, quote, i = 0, "", start
    while i < len(text):
        char = text[i]
        if quote:
            if char == "\\":
                i += 1
            elif char == quote:
                quote = ""
        elif char in "\"'":
            quote = char
        elif char in "([{":
            depth += 1
        elif char in ")]}":
            depth -= 1
            if not depth:
                return i
        i += 1
    return len(text) - 1


def _keyword_arguments(text: str, where: str) -> dict:
    try:
        return keyword_arguments(text)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        raise DataError(f"{where}: arguments that cannot be read: {text[:80]}") from None


# ---- tools in a system prompt

_HERMES_TOOLS = re.compile(r"<tools>\s*(.*?)\s*</tools>", re.DOTALL)
_FRAMES = ("You are a function calling AI model", "You are provided with function signatures", "Here are the available tools")


def split_hermes_system(text: str) -> tuple[str, list | None]:
    """The words of a system prompt before it speaks of tools, and the tools that it lists. The rest says how to write Hermes' calls, which
    is the business of the chat template."""
    found = next((block for block in _HERMES_TOOLS.finditer(text) if block.group(1).strip()), None)
    if not found:
        return text, None
    starts = [at for at in (text.find(frame) for frame in _FRAMES) if at >= 0]
    return text[: min([*starts, found.start()])].strip(), read_tool_list(found.group(1))


def read_tool_list(text: str) -> list:
    """JSON objects one after the other, or a list of them. Raises DataError."""
    text, tools, decoder = text.strip(), [], json.JSONDecoder()
    if text.startswith("["):
        tools = decode_json(text, "the list of tools in the system prompt")
        return tools
    while text:
        try:
            tool, end = decoder.raw_decode(text)
        except (ValueError, RecursionError) as error:
            raise DataError(f"the list of tools in the system prompt is not JSON ({error})") from None
        tools.append(tool)
        text = text[end:].lstrip(" \r\n\t,")
    return tools
