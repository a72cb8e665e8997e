"""What is asked of a model, and what became of it: the one form that every suite's questions and every evaluation's results have."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Item:
    """One question of a suite. Two items with the same id are the same question."""

    id: str
    category: str
    messages: list[dict]
    """The conversation up to the turn that is asked for, as chat templates take it."""
    tools: list[dict]
    """As chat templates take them: {"type": "function", "function": {…}}. Empty where none are offered."""
    gold: dict
    """What the suite needs to judge the answer, in a form of its own."""


@dataclass(frozen=True)
class Result:
    """One item answered and judged: a row of items.jsonl."""

    id: str
    category: str
    correct: bool
    failure: str | None
    """One word for what is wrong; None exactly where nothing is."""
    said: str
    """The text that the model wrote."""
    prompt_tokens: int
    answer_tokens: int
