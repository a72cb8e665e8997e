"""What a model wrote, as an assistant turn that a student can be trained on; or why it is none.

The turn is structured: calls as objects, so that the student's own template writes them, and what was said before them. Reasoning is left
out, as the scorer leaves it out. An answer is invalid when it was cut off, is empty, holds a call that cannot be read or that breaks its
tool, or says what no assistant turn can hold: words after a call, and control tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from dataclasses import dataclass

from harness.tools.calls import ToolCall, parse_calls, spoken
from harness.tools.checks import check_call

FAULTS = ("cut_off", "empty", "unparsable", "unknown_tool", "schema")


@dataclass(frozen=True)
class Fault:
    kind: str
    """One of FAULTS."""
    reason: str


def read_answer(text: str, tools: list[dict], *, ended: bool, control_tokens: Collection[str] = ()) -> dict | Fault:
    """The assistant's message {"role", "content"?, "tool_calls"?} that `text` is, or the first thing that is wrong with it.

    text: decoded with its special tokens, without the one that ended it. ended: the model stopped by itself. control_tokens: the
    tokenizer's special tokens, which in words would end or open a turn.
    """
    if not ended:
        return Fault("cut_off", "did not stop within max_new_tokens")
    message = read_turn(text)
    if isinstance(message, Fault):
        return message
    for call in message.get("tool_calls", ()):
        if problems := check_call(ToolCall(call["function"]["name"], call["function"]["arguments"]), tools):
            kind = "unknown_tool" if problems[0].kind == "unknown_tool" else "schema"
            return Fault(kind, "; ".join(map(str, problems)))
    if found := re.search("|".join(map(re.escape, control_tokens)) or "(?!)", json.dumps(message, ensure_ascii=False)):
        return Fault("unparsable", f"the control token {found.group()} in what it says")
    return message


def read_turn(text: str) -> dict | Fault:
    """The assistant's message that `text` is, whatever it calls; or why it is none, `unparsable` or `empty`."""
    parsed = parse_calls(text)
    if parsed.malformed:
        return Fault("unparsable", f"a call that cannot be read: {parsed.malformed[0][:200]}")
    if not parsed.calls and not parsed.text:
        return Fault("empty", "says nothing and calls nothing")
    if parsed.calls and not spoken(text).startswith(parsed.text):
        return Fault("unparsable", f"words after a call, which a turn cannot hold: {parsed.text[-200:]}")
    calls = [{"type": "function", "function": {"name": call.name, "arguments": call.arguments}} for call in parsed.calls]
    if half := re.search("[\ud800-\udfff]", json.dumps(calls, ensure_ascii=False)):
        # Written as an escape; no file in UTF-8 and no tokenizer takes it.
        return Fault("unparsable", f"half a character (\\u{ord(half.group()):x}) in a call")
    said = {"content": parsed.text, "tool_calls": calls}
    return {"role": "assistant"} | {key: value for key, value in said.items() if value}
