"""What a chat template made of a message, read back: the calls that a server would find where the model says what it was trained to say."""

from __future__ import annotations

from harness.tools import ToolCall
from harness.tools.served import BrokenNotation, difference, parse_served


def calls_of(message: dict) -> list[ToolCall]:
    return [ToolCall(call["function"]["name"], call["function"]["arguments"]) for call in message.get("tool_calls", ())]


def lost_calls(message: dict, said: str) -> str | None:
    """How the calls in `said`, the text of a message, differ from the message's own; None where they do not, and where the notation is none
    that is read (`reads_back` tells these apart)."""
    meant = calls_of(message)
    try:
        found = parse_served(said) if meant else None
    except BrokenNotation as error:
        return f"what is written cannot be read: {error}"
    return difference(found, meant) if found is not None else None


def reads_back(said: str) -> bool:
    """Whether `said` holds calls in a notation that is read."""
    try:
        return parse_served(said) is not None
    except BrokenNotation:
        return False
