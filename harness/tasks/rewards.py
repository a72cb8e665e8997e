"""What an answer is paid for: functions from what was said to a number, each one of the recipe's `rlhf.rewards`.

    build_rewards(recipe, tokenizer, ...) -> [Reward]        in the recipe's order, each with its name in the logs and its weight
    Reward.pay(answers) -> [float | None]                    one number per answer; None: this reward has nothing to say about it

An `Answer` is what the policy wrote to one prompt, with what the prompt's row says about a right one. No torch, but in a reward model.
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from harness.errors import DataError, ModelError, RecipeError
from harness.plugins import load_plugin
from harness.recipe import Recipe
from harness.recipe.schema import RewardPart
from harness.tools import ToolCall, parse_calls, score, spoken
from harness.tools.documents import check_schema, follows_schema

Messages = list[dict]


@dataclass(frozen=True)
class Answer:
    prompt: Messages
    said: Messages
    """The policy's messages, and between them what tools returned."""
    prompt_ids: list[int]
    ids: list[int]
    """Of all of `said`."""
    own_tokens: int
    """That the policy wrote; without what tools returned."""
    row: dict
    """As harness.data.questions keeps it: tools, answer, tool_calls, json_schema."""
    environment: object = None
    """In which its calls were executed; None where there is none."""

    @property
    def tools(self) -> list[dict]:
        return self.row.get("tools", [])

    @property
    def gold(self) -> list[ToolCall] | None:
        """None where the row has no answer."""
        calls = self.row.get("tool_calls")
        return None if calls is None else [ToolCall(call["name"], call["arguments"]) for call in calls]

    @property
    def last_words(self) -> str:
        """Of the policy's last message."""
        return next((message.get("content", "") for message in reversed(self.said) if message["role"] == "assistant"), "")

    @property
    def text(self) -> str:
        """All that the policy said, with its calls, as the scorer reads it."""
        turns = [message for message in self.said if message["role"] == "assistant"]
        if len(turns) > 1:
            # Each may reason before it speaks; the scorer looks for that at the head of a text, and would take all before it away.
            turns = [{**message, "content": spoken(message.get("content", ""))} for message in turns]
        return "\n".join(filter(None, map(_text_of, turns)))


def _text_of(message: dict) -> str:
    calls = [
        json.dumps({"name": call["function"]["name"], "arguments": call["function"]["arguments"]}) for call in message.get("tool_calls", ())
    ]
    return "\n".join(filter(None, (message.get("content", ""), *(f"<tool_call>{call}</tool_call>" for call in calls))))


@dataclass(frozen=True)
class Reward:
    name: str
    weight: float
    pay: Callable[[Sequence[Answer]], list[float | None]]
    notes: Callable[[Answer], dict[str, float]] = field(default=lambda answer: {})
    """Of each answer what is logged besides, by metric; means over the answers that have one."""
    digest: str | None = None
    """Of the weights of a reward model, which must be the same when a run is continued."""


class RewardModel(Protocol):
    digest: str | None

    def score(self, sequences: list[list[int]]) -> list[float]:
        """Of each conversation, prompt and answer as token ids, its score."""


# ---- one answer


def pay_for_calls(part: RewardPart, text: str, gold: Sequence[ToolCall], tools: list[dict]) -> float:
    """By the one scorer; the recipe says how much. Silence is paid as a call that cannot be read: were it worth more, a policy that cannot
    write calls yet would learn to say nothing."""
    verdict, parsed = score(text, gold, tools), parse_calls(text)
    if verdict.exact:
        return part.exact if gold else part.abstention
    if parsed.malformed or not (parsed.calls or parsed.text):
        return part.malformed
    if gold and verdict.valid_schema:
        same_tools = Counter(call.name for call in parsed.calls) == Counter(call.name for call in gold)
        return part.right_tool if same_tools else part.valid_schema
    return 0.0


def pay_for_length(tokens: int, target: int, limit: int) -> float:
    """0 up to the target, -1 from the limit on, and a straight line between them."""
    return -min(max((tokens - target) / (limit - target), 0.0), 1.0)


def notes_on_calls(answer: Answer) -> dict[str, float]:
    """What becomes the rates of all samples, named as those of an evaluation."""
    if answer.gold is None:
        return {}
    verdict, parsed = score(answer.text, answer.gold, answer.tools), parse_calls(answer.text)
    said = {"tools/malformed": float(bool(parsed.malformed)), "tools/silent": float(not (parsed.attempted or parsed.text))}
    if verdict.abstained_correctly is not None:
        return said | {"tools/right_abstention": float(verdict.abstained_correctly)}
    return said | {"tools/exact_match": float(verdict.exact), "tools/valid_schema": float(verdict.valid_schema)}


# ---- from the recipe


def build_rewards(recipe: Recipe, load_reward_model: Callable[[str], RewardModel]) -> list[Reward]:
    """load_reward_model: from a folder. Raises RecipeError or DataError for what a part names and is not there."""
    rewards = []
    for place, part in enumerate(recipe.rlhf.rewards):
        key = f"rlhf.rewards.{place}"
        model = load_reward_model(part.model) if part.model else None
        pay = _BUILDERS[part.type](part, key, recipe, model)
        others = [other.type for other in recipe.rlhf.rewards[:place]].count(part.type)
        name = part.function.rpartition(":")[2] if part.function else part.type
        name += f"_{others + 1}" if others and not part.function else ""
        if name in [reward.name for reward in rewards]:
            name += f"_{place}"
        notes = notes_on_calls if part.type == "tool_calls" and not others else lambda answer: {}
        rewards.append(Reward(name, part.weight, pay, notes, model and model.digest))
    return rewards


def _calls(part: RewardPart, key: str, recipe: Recipe, model: RewardModel | None):
    def pay(answers):
        return [None if answer.gold is None else pay_for_calls(part, answer.text, answer.gold, answer.tools) for answer in answers]

    return pay


def _schema(part: RewardPart, key: str, recipe: Recipe, model: RewardModel | None):
    of_all = None
    if part.json_schema:
        try:
            of_all = json.loads(Path(part.json_schema).expanduser().read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise RecipeError(f"{key}.json_schema = {part.json_schema}; cannot be read as JSON: {error}") from None
        check_schema(of_all, part.json_schema)

    def pay(answers):
        schemas = [of_all if of_all is not None else answer.row.get("json_schema") for answer in answers]
        return [
            None if schema is None else float(follows_schema(spoken(answer.last_words), schema))
            for answer, schema in zip(answers, schemas, strict=True)
        ]

    return pay


def _length(part: RewardPart, key: str, recipe: Recipe, model: RewardModel | None):
    limit = part.limit_tokens or recipe.rlhf.max_completion_length
    return lambda answers: [pay_for_length(answer.own_tokens, part.target_tokens, limit) for answer in answers]


def _model(part: RewardPart, key: str, recipe: Recipe, model: RewardModel | None):
    return lambda answers: model.score([answer.prompt_ids + answer.ids for answer in answers])


def _function(part: RewardPart, key: str, recipe: Recipe, model: RewardModel | None):
    function = load_plugin(f"{key}.function", part.function)
    if not callable(function):
        raise RecipeError(f"{key}.function = {part.function}; is {type(function).__name__} and cannot be called")

    def pay(answers):
        columns = {name: [answer.row.get(name) for answer in answers] for name in ("answer", "tool_calls", "tools", "json_schema")}
        if any(answer.environment is not None for answer in answers):
            columns["environments"] = [answer.environment for answer in answers]
        return call_function(part.function, function, answers, columns)

    return pay


_BUILDERS = {"tool_calls": _calls, "json_schema": _schema, "length": _length, "reward_model": _model, "function": _function}


def call_function(name: str, function: Callable, answers: Sequence[Answer], columns: dict[str, list]) -> list[float | None]:
    """A function of the user's own, called as TRL calls one. Raises ModelError for what it raises, and for what is no reward."""
    try:
        paid = function(
            prompts=[answer.prompt for answer in answers],
            completions=[answer.said for answer in answers],
            completion_ids=[answer.ids for answer in answers],
            **columns,
        )
    except Exception as error:
        raise ModelError(f"the reward {name} failed: {type(error).__name__}: {error}; it was given {len(answers)} answers") from error
    if not isinstance(paid, (list, tuple)) or len(paid) != len(answers):
        found = f"{len(paid)} values" if isinstance(paid, (list, tuple)) else type(paid).__name__
        raise ModelError(f"the reward {name} returned {found} for {len(answers)} answers; it must return a list with one number for each")
    return [_number(name, value, answer) for value, answer in zip(paid, answers, strict=True)]


def _number(name: str, value: Any, answer: Answer) -> float | None:
    if value is None:
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ModelError(f"the reward {name} returned {value!r} for the answer {answer.text[:80]!r}; must be a finite number, or None")
    return number


def check_rows(rewards: Sequence[RewardPart], rows: Sequence[dict], held_out: Sequence[dict] = ()) -> None:
    """Before a model is loaded: raises DataError where a reward would never say anything about the rows that are trained, or the schema of
    any row is none."""
    for place, part in enumerate(rewards):
        if part.type == "tool_calls" and not any("tool_calls" in row for row in rows):
            raise DataError(
                f"rlhf.rewards.{place}: tool_calls compares with a row's own answer, and none of {len(rows)} rows has one; give rows that "
                "end with the assistant"
            )
        if part.type == "json_schema" and not part.json_schema:
            schemas = [row["json_schema"] for row in rows if "json_schema" in row]
            if not schemas:
                raise DataError(
                    f"rlhf.rewards.{place}: none of {len(rows)} rows has a json_schema; give the rows one, or this reward a file"
                )
            schemas += [row["json_schema"] for row in held_out if "json_schema" in row]
            for schema in {json.dumps(schema): schema for schema in schemas}.values():
                check_schema(schema, f"rlhf.rewards.{place}: the json_schema of a row")
