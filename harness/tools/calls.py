"""Tool calls as text: what a model wrote, read back into objects.

Five notations are read, the ones that servers and chat templates in use speak:

    <tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>      Hermes, Qwen; several blocks are parallel calls
    <|python_tag|>{"name": "f", "parameters": {"a": 1}}              Llama 3
    [TOOL_CALLS][{"name": "f", "arguments": {"a": 1}}]               Mistral
    {"name": "f", "arguments": {"a": 1}}   or a list of them         bare JSON, also inside one code fence; BFCL's has "function" for "name"
    [f(a=1), g(b="x")]   the brackets may be missing                 pythonic: literals and keyword arguments only

An attempt that cannot be read is *malformed*, which is not the same as no attempt: counting broken calls as abstention is how a model that
cannot write a call gets full marks for not calling one (gorilla#1362). `parse_calls` never raises, whatever the text.
"""

from __future__ import annotations

import ast
import json
import math
import re
import warnings
from dataclasses import dataclass

_MAX_DEPTH = 64  # deeper nesting is no tool call, and would exhaust the stack of everything that walks it afterwards

_HERMES = re.compile(r"<tool_call>(.*?)(?:</tool_call>|(?=<tool_call>)|\Z)", re.DOTALL)
_FENCE = re.compile(r"```[a-z_]*\s*(.*?)\s*```", re.DOTALL)
_PYTHONIC = re.compile(r"\[?\s*[A-Za-z_][\w.]*\s*\(")
# These stand after the last word where special tokens were decoded, as Llama's and Mistral's markers require.
_SPECIAL_TOKEN = re.compile(r"<\|(?!python_tag)[\w ]*\|>|</s>|<eos>|<pad>|<end_of_turn>")
_SEPARATOR = re.compile(r"[\s,;]*")
# JSON that starts like a call but does not parse.
_BROKEN_JSON = re.compile(r'\[?\s*\{\s*"(?:name|arguments|parameters|function|type"\s*:\s*"function)"')
# Signs of an attempt in what no notation could read: a call inside prose, a stray tag, a notation that is not read here.
_ATTEMPT = re.compile(
    r'\{\s*"(?:name|function)"\s*:\s*"[^"]*"\s*,\s*"(?:arguments|parameters)"\s*:|</?tool_call>|<\|python_tag\|>|\[TOOL_CALLS\]'
    r"|<function=|<TOOLCALL>|functools\[|<function_?call>",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class ToolCall:
    name: str
    arguments: dict


@dataclass(frozen=True)
class ParsedCalls:
    """`calls` in the order of the text, `malformed` the pieces that tried to be calls, `text` what was said besides (no reasoning)."""

    calls: list[ToolCall]
    malformed: list[str]
    text: str

    @property
    def attempted(self) -> bool:
        return bool(self.calls or self.malformed)


def parse_calls(text: str, *, pythonic: bool = True) -> ParsedCalls:
    """Reads every call that `text` makes. Never raises. Reasoning (`<think>…</think>`) is left out: a call only pondered is no call.

    pythonic: False leaves the last notation to a reader with rules of its own (harness.tools.bfcl).
    """
    said = spoken(text)
    if "<tool_call>" in said:
        return _parsed(_HERMES.findall(said), _HERMES.sub("", said))
    for marker in ("<|python_tag|>", "[TOOL_CALLS]"):
        if marker in said:
            before, *blocks = said.split(marker)
            return _parsed(blocks, before)
    return _parse_unmarked(said, pythonic)


def spoken(text: str) -> str:
    """`text` without reasoning, and without the special tokens that end it."""
    return _without_special_tokens(_without_reasoning(text)).strip()


def read_call(value: object) -> ToolCall | None:
    """A decoded JSON value as a call, or None. Takes `arguments` or `parameters`, an object or its JSON text, OpenAI's wrapper, and the
    name under `function`."""
    if isinstance(value, dict) and isinstance(value.get("function"), dict):
        value = value["function"]
    if not isinstance(value, dict):
        return None
    name = value.get("name", value.get("function"))
    if not isinstance(name, str) or not name:
        return None
    arguments = value.get("arguments", value.get("parameters"))
    if isinstance(arguments, str):
        decoded, rest = _json_values(arguments)
        arguments = decoded[0] if len(decoded) == 1 and not rest else None
    if not isinstance(arguments, dict) or not _is_plain_json(arguments):
        return None
    return ToolCall(name, arguments)


def _without_reasoning(text: str) -> str:
    thought, closed, answer = text.partition("</think>")
    if thought.lstrip().startswith("<think>"):
        return answer
    # The opening tag may stand in the prompt. A text that opens with a call holds "</think>" inside an argument instead.
    return answer if closed and not thought.lstrip().startswith(("{", "[", "<tool_call>", "<|python_tag|>")) else text


def _without_special_tokens(text: str) -> str:
    end = len(text)
    while True:
        while end and text[end - 1].isspace():
            end -= 1
        start = text.rfind("<", 0, end)
        if start < 0 or not _SPECIAL_TOKEN.fullmatch(text, start, end):
            return text[:end]
        end = start


def _parsed(blocks: list[str], besides: str) -> ParsedCalls:
    """Marked blocks, each of which has to be calls and nothing else."""
    calls, malformed = [], []
    for block in map(str.strip, blocks):
        values, rest = _json_values(block)
        read = [read_call(item) for item in _flat(values)]
        calls += [call for call in read if call]
        if rest or not read or None in read:
            malformed.append(block)
    besides = besides.strip()
    return ParsedCalls(calls, malformed + _attempts(besides), besides)


def _attempts(text: str) -> list[str]:
    return [found.group() for found in _ATTEMPT.finditer(text)]


def _parse_unmarked(said: str, pythonic: bool) -> ParsedCalls:
    fenced = _FENCE.fullmatch(said)
    body = fenced.group(1) if fenced else said
    if body.startswith(("{", "[")):
        values, rest = _json_values(body)
        items = _flat(values)
        if any(map(_looks_like_call, items)):
            read = [read_call(item) for item in items]
            malformed = [body] if None in read else []
            if rest.startswith(("{", "[")):  # a good call, then one that was cut off
                malformed, rest = [*malformed, rest], ""
            return ParsedCalls([call for call in read if call], malformed + _attempts(rest), rest)
        if not values and _BROKEN_JSON.match(body):
            return ParsedCalls([], [body], "")
    if pythonic and _PYTHONIC.match(body):
        parsed = _parse_pythonic(body)
        if parsed:
            return parsed
    return ParsedCalls([], _attempts(said), said)


def _looks_like_call(value: object) -> bool:
    if not isinstance(value, dict):
        return False
    has_arguments = "arguments" in value or "parameters" in value
    return (has_arguments and ("name" in value or "function" in value)) or set(value) == {"name"} or isinstance(value.get("function"), dict)


def _parse_pythonic(body: str) -> ParsedCalls | None:
    """None where the text is no call expression but merely begins like one."""
    broken = ParsedCalls([], [body], "")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the model's text is not our source code
            tree = ast.parse(body, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return broken if body.startswith("[") else None
    nodes = tree.elts if isinstance(tree, (ast.List, ast.Tuple)) else [tree]
    if not any(isinstance(node, ast.Call) for node in nodes):
        return None
    calls = [_pythonic_call(node) for node in nodes]
    return broken if None in calls else ParsedCalls(calls, [], "")


def _pythonic_call(node: ast.expr) -> ToolCall | None:
    if not isinstance(node, ast.Call) or node.args or any(keyword.arg is None for keyword in node.keywords):
        return None
    if len({keyword.arg for keyword in node.keywords}) < len(node.keywords):  # Python itself would not call it
        return None
    try:
        name = ast.unparse(node.func)
        # Through JSON, so that tuples become lists and what JSON cannot hold (bytes, sets, complex, keys that are no strings) is refused.
        arguments = {keyword.arg: ast.literal_eval(keyword.value) for keyword in node.keywords}
        if not _is_plain_json(arguments):
            return None
        arguments = json.loads(json.dumps(arguments, allow_nan=False))
    except (ValueError, TypeError, RecursionError, MemoryError):
        return None
    return ToolCall(name, arguments) if re.fullmatch(r"[\w.]+", name) else None


def _json_values(text: str) -> tuple[list, str]:
    """The JSON values at the start of `text` (separated by blanks, commas or semicolons), and what follows them."""
    values, position = [], 0
    while True:
        position = _SEPARATOR.match(text, position).end()
        if not text.startswith(("{", "["), position):
            return values, text[position:].strip()
        try:
            value, position = _DECODER.raw_decode(text, position)
        except (ValueError, RecursionError):
            return values, text[position:].strip()
        values.append(value)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)


def _flat(values: list) -> list:
    return [item for value in values for item in (value if isinstance(value, list) else [value])]


def _is_plain_json(value: object) -> bool:
    """Whether `value` is JSON with finite numbers, string keys and at most `_MAX_DEPTH` levels. Walks without recursion."""
    stack = [(value, 1)]
    while stack:
        item, depth = stack.pop()
        if depth > _MAX_DEPTH or (isinstance(item, float) and not math.isfinite(item)):
            return False
        if isinstance(item, dict):
            if not all(isinstance(key, str) for key in item):
                return False
            stack += [(child, depth + 1) for child in item.values()]
        elif isinstance(item, (list, tuple)):
            stack += [(child, depth + 1) for child in item]
        elif item is not None and not isinstance(item, (str, int, float)):
            return False
    return True
