"""Glaive's function calling set as published: {"system", "chat"}, both one text.

    system   SYSTEM: You are … with access to the following functions. Use them if required -  {tool} {tool} …
    chat     USER: …  ASSISTANT: <functioncall> {"name": "f", "arguments": '{…}'} <|endoftext|>  FUNCTION RESPONSE: …  ASSISTANT: …

The set as LLaMA-Factory passes it on, in turns, is read as sharegpt.
"""

from __future__ import annotations

import re

from harness.data.conversation import conversation, kind_of, with_assistant
from harness.data.layouts.base import Layout, Reading, key_set
from harness.data.layouts.notations import read_tool_list, split_words
from harness.data.layouts.sharegpt import FRAME
from harness.errors import DataError

_TURN = re.compile(r"(?:^|(?<=\s)|(?<=<\|endoftext\|>))(USER|ASSISTANT|FUNCTION RESPONSE):\s*")
_TOOLS_FOLLOW = re.compile(r"\s*with access to the following functions\.\s*Use them if required\s*-?\s*", re.IGNORECASE)


def read_glaive(row: dict, reading: Reading) -> dict:
    system, chat = row["system"], row["chat"]
    if not isinstance(system, str) or not isinstance(chat, str):
        raise DataError(f"system is {kind_of(system)} and chat is {kind_of(chat)}; must be both text")
    system, tools = system.strip().removeprefix("SYSTEM:").strip(), []
    found = _TOOLS_FOLLOW.search(system)
    if found:
        tools = read_tool_list(system[found.end() :])
        system = f"{system[: found.start()]}."
        reading.lose(FRAME)
    elif "{" in system:
        raise DataError("the system prompt holds a { and no list of functions as Glaive writes it; its tools cannot be told")
    messages = [{"role": "system", "content": system}] if system else []
    pieces = _TURN.split(chat)
    if pieces[0].strip():
        raise DataError(f'chat starts with "{pieces[0].strip()[:40]}"; must start with USER:, ASSISTANT: or FUNCTION RESPONSE:')
    for i, (speaker, words) in enumerate(zip(pieces[1::2], pieces[2::2], strict=True)):
        words = words.strip().removesuffix("<|endoftext|>").strip()
        where = f"turn {i} of chat"
        if speaker == "ASSISTANT":
            said = split_words(words, where)
            if not said:
                raise DataError(f"{where}: the assistant says nothing")
            messages = with_assistant(messages, said)
        elif not words:
            raise DataError(f"{where}: {speaker} says nothing")
        else:
            messages.append({"role": "user" if speaker == "USER" else "tool", "content": words})
    return conversation(messages, tools, reading)


GLAIVE = Layout((key_set("system chat"),), "system, chat (Glaive's text)", read_glaive)
