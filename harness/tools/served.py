"""Calls as chat templates write them, in the notations that servers' parsers read: what training on a rendered row teaches a model to say.

Beside those of calls.py:

    <function=f><parameter=a>\\n1\\n</parameter></function>                     Qwen3-Coder, Qwen3.5 and later, Nemotron 3
    <tool_call>f\\n<arg_key>a</arg_key>\\n<arg_value>1</arg_value></tool_call>    GLM-4.5
    <atem:invoke name="f"><atem:parameter name="a">1</atem:parameter>         Muse
    to=functions.f<|channel|>commentary json<|message|>{"a": 1}<|call|>       gpt-oss (harmony)
    <｜tool▁sep｜>f\\n```json\\n{"a": 1}\\n```                                  DeepSeek V3
    <|tool_call_start|>[f(a=1)]<|tool_call_end|>                              LFM2
    <|tool_call>call:f{a:1,b:<|"|>x<|"|>}<tool_call|>                         Gemma 4

In the first three a value is bare text, whose type only the tool's schema says: it comes out as `Bare`.
"""

from __future__ import annotations

import ast
import json
import re
import warnings

from harness.tools.calls import ToolCall, parse_calls
from harness.tools.match import json_equal


class BrokenNotation(ValueError):
    """A notation that is read here, written so that it cannot be read."""


class Bare(str):
    """A value that was written without its type."""


_XML = (
    (
        re.compile(r"<function=([^>\n]+)>(.*?)</function>", re.DOTALL),
        re.compile(r"<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>", re.DOTALL),
    ),
    (
        re.compile(r'<atem:invoke name="([^"\n]+)">(.*?)</atem:invoke>', re.DOTALL),
        re.compile(r'<atem:parameter name="([^"\n]+)">(.*?)</atem:parameter>', re.DOTALL),
    ),
    (
        re.compile(r"<tool_call>\s*([^\s<{\[][^\n<]*?)\s*(?:\n|(?=<arg_key>))(.*?)</tool_call>", re.DOTALL),
        re.compile(r"<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>", re.DOTALL),
    ),
)
_JSON = (
    re.compile(r"to=functions\.([^\s<]+)[^{]*?<\|message\|>(.*?)<\|call\|>", re.DOTALL),
    re.compile(r"<｜tool▁sep｜>(.+?)\n```json\n(.*?)\n```", re.DOTALL),
)
_LFM = re.compile(r"<\|tool_call_start\|>(.*?)<\|tool_call_end\|>", re.DOTALL)
_GEMMA = re.compile(r"<\|tool_call>call:(.+?)(\{.*?\})<tool_call\|>", re.DOTALL)
_GEMMA_QUOTE = '<|"|>'


def parse_served(text: str) -> list[ToolCall] | None:
    """The calls of a rendered turn, in their order; None where it holds no notation that is read here. Raises BrokenNotation."""
    for outer, inner in _XML:
        found = outer.findall(text)
        if found:
            return [ToolCall(name, {key: Bare(value) for key, value in inner.findall(body)}) for name, body in found]
    try:
        for pattern in _JSON:
            found = pattern.findall(text)
            if found:
                return [ToolCall(name.strip(), json.loads(arguments)) for name, arguments in found]
        if found := _LFM.findall(text):
            return [call for block in found for call in _pythonic(block)]
        if found := _GEMMA.findall(text):
            return [ToolCall(name, _Gemma(body).value()) for name, body in found]
    except (ValueError, SyntaxError, TypeError, IndexError, RecursionError, MemoryError) as error:
        raise BrokenNotation(f"{_short(found[0] if isinstance(found[0], str) else found[0][-1])} ({type(error).__name__})") from None
    parsed = parse_calls(text)
    return None if parsed.malformed or not parsed.calls else parsed.calls


def reads_as(found: object, meant: object) -> bool:
    """Whether a value that was read back is the value that was meant."""
    if not isinstance(found, Bare):
        return json_equal(found, meant)
    if isinstance(meant, str):
        return str(found) == meant
    try:
        return json_equal(json.loads(found), meant)
    except (ValueError, RecursionError):
        return isinstance(meant, bool) and found.casefold() == str(meant).casefold()


def difference(found: list[ToolCall], meant: list[ToolCall]) -> str | None:
    """What is other in the calls that were read back, in words; None if nothing is."""
    if len(found) != len(meant):
        return f"{len(meant)} calls are {len(found)}"
    for n, (read, call) in enumerate(zip(found, meant, strict=True)):
        if read.name != call.name:
            return f'call {n} is "{call.name}" and reads back as "{read.name}"'
        for key in [*call.arguments, *(key for key in read.arguments if key not in call.arguments)]:
            if key not in read.arguments or key not in call.arguments:
                return f"{call.name}.{key} is {'lost' if key not in read.arguments else 'added'}"
            if not reads_as(read.arguments[key], call.arguments[key]):
                return f"{call.name}.{key} is {_short(call.arguments[key])} and reads back as {_short(read.arguments[key])}"
    return None


def _short(value: object) -> str:
    text = str(value) if isinstance(value, Bare) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}…"


# ---- Python's notation, with JSON's constants

_CONSTANTS = {"true": True, "false": False, "null": None}


class _JsonNames(ast.NodeTransformer):
    def visit_Name(self, node: ast.Name) -> ast.expr:
        return ast.Constant(_CONSTANTS[node.id]) if node.id in _CONSTANTS else node


def keyword_arguments(text: str) -> dict:
    """`(a=1, b="x", c=true)` as an object. Raises ValueError, SyntaxError, TypeError, RecursionError or MemoryError."""
    return _arguments(_parse(f"f{text}"))


def _pythonic(block: str) -> list[ToolCall]:
    tree = _parse(block)
    return [ToolCall(ast.unparse(node.func), _arguments(node)) for node in (tree.elts if isinstance(tree, ast.List) else [tree])]


def _parse(text: str) -> ast.expr:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # somebody's data is not our source code
        return ast.parse(text, mode="eval").body


def _arguments(call: ast.expr) -> dict:
    if not isinstance(call, ast.Call) or call.args or any(keyword.arg is None for keyword in call.keywords):
        raise ValueError("no call with keyword arguments")
    arguments = {keyword.arg: ast.literal_eval(_JsonNames().visit(keyword.value)) for keyword in call.keywords}
    return json.loads(json.dumps(arguments, allow_nan=False))


# ---- Gemma's: objects with bare keys, strings between <|"|>


class _Gemma:
    def __init__(self, text: str):
        self.text, self.at = text, 0

    def value(self) -> object:
        text = self.text
        if text.startswith(_GEMMA_QUOTE, self.at):
            start = self.at + len(_GEMMA_QUOTE)
            end = text.index(_GEMMA_QUOTE, start)
            self.at = end + len(_GEMMA_QUOTE)
            return text[start:end]
        if text[self.at] in "{[":
            closing = "}" if text[self.at] == "{" else "]"
            return self._members(closing) if closing == "}" else self._items(closing)
        bare = re.compile(r"[^,}\]]*").match(text, self.at)
        self.at = bare.end()
        return json.loads(bare.group())

    def _items(self, closing: str) -> list:
        items = []
        self.at += 1
        while self.text[self.at] != closing:
            items.append(self.value())
            self._comma(closing)
        self.at += 1
        return items

    def _members(self, closing: str) -> dict:
        members = {}
        self.at += 1
        while self.text[self.at] != closing:
            if self.text.startswith(_GEMMA_QUOTE, self.at):
                key = self.value()
            else:
                end = self.text.index(":", self.at)
                key, self.at = self.text[self.at : end], end
            self.at += 1
            members[key] = self.value()
            self._comma(closing)
        self.at += 1
        return members

    def _comma(self, closing: str) -> None:
        if self.text[self.at] == ",":
            self.at += 1
        elif self.text[self.at] != closing:
            raise ValueError(f"neither , nor {closing} at {self.at}")
