"""The tools of the quickstart's world, as functions that really run: pure, and the same answer to the same question everywhere.

What they tell (the weather of a city, an amount in another currency) is drawn by a digest of the arguments, in words that the world's
tokenizer has. `TOOLS` is what a recipe names (`rlhf.tools: harness.quickstart.tools:TOOLS`); `write_look_ups` writes rows whose answer
nobody knows without the tool's result:

    look-up-train.jsonl   look-up-eval.jsonl     user -> call -> the tool's result -> the assistant says it

and `says_the_result` is a reward for such rows. Nothing here imports torch.
"""

import hashlib
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from harness.quickstart import world
from harness.quickstart.world import BASE_TOOLS, CITIES, CURRENCIES, LARGE_NUMBERS, PEOPLE, ROOMS, SMALL_NUMBERS, STYLES

DONE = "done"


def _drawn(values: tuple, *key: object) -> str:
    digest = hashlib.sha256(json.dumps(key).encode()).digest()
    return str(values[int.from_bytes(digest[:4], "big") % len(values)])


def _known(name: str, value: object, values: tuple) -> None:
    if value not in values:
        raise ValueError(f"no {name} {value}")


def get_weather(city: str, days: int = 0) -> str:
    """Weather of a city, now or for some days

    Args:
        city: The city
        days: For so many days
    """
    _known("city", city, CITIES)
    return _drawn(LARGE_NUMBERS, "weather", city, days)


def convert_money(amount: float, source: str, target: str) -> str:
    """Convert an amount from one currency to another

    Args:
        amount: So much
        source: The currency that it is in
        target: The currency that it is to be in
    """
    _known("currency", source, CURRENCIES)
    _known("currency", target, CURRENCIES)
    return _drawn(LARGE_NUMBERS, "money", float(amount), source, target)


def set_light(room: str, on: bool, level: int = 0) -> str:
    """Switch the light of a room, optionally to a level in percent

    Args:
        room: The room
        on: Whether it is to be on
        level: In percent
    """
    _known("room", room, ROOMS)
    return DONE


def send_message(person: str, text: str, urgent: bool = False) -> str:
    """Send a text to a person

    Args:
        person: To whom
        text: What
        urgent: Whether it is urgent
    """
    _known("person", person, PEOPLE)
    return DONE


def plan_dinner(people: list[str], day: str, dish: str = "") -> str:
    """Plan a dinner with people on a day, optionally with a dish

    Args:
        people: With whom
        day: When
        dish: What
    """
    for person in people:
        _known("person", person, PEOPLE)
    return _drawn(SMALL_NUMBERS, "dinner", people, day, dish)


def play_music(style: str, language: str = "", minutes: int = 0) -> str:
    """Play music of a style, optionally sung in a language or for some minutes

    Args:
        style: The style
        language: In which it is sung
        minutes: So long
    """
    _known("style", style, STYLES)
    return DONE


TOOLS: list[Callable] = [get_weather, convert_money, set_light, send_message, plan_dinner, play_music]


class World:
    """The same tools as an environment, which remembers what it was asked: `rlhf.environment: harness.quickstart.tools:World`."""

    def reset(self, **row) -> None:
        self._answer, self._told = row.get("answer"), []

    def get_weather(self, city: str, days: int = 0) -> str:
        """Weather of a city, now or for some days

        Args:
            city: The city
            days: For so many days
        """
        return self._tell(get_weather(city, days))

    def convert_money(self, amount: float, source: str, target: str) -> str:
        """Convert an amount from one currency to another

        Args:
            amount: So much
            source: The currency that it is in
            target: The currency that it is to be in
        """
        return self._tell(convert_money(amount, source, target))

    def _tell(self, result: str) -> str:
        self._told.append(result)
        return result

    def get_reward(self) -> float:
        """1 where one tool was asked, once, and told what the right answer says."""
        return float(len(self._told) == 1 and self._answer is not None and self._told[0] in self._answer.split())


# ---- rows


@dataclass(frozen=True)
class LookUp:
    """A tool that tells what the user asks for, and how the assistant says it: with `{result}` and the call's arguments."""

    name: str
    run: Callable[..., str]
    sentence: str


LOOK_UPS = (LookUp("get_weather", get_weather, "it is {result} in {city}"), LookUp("convert_money", convert_money, "{result} {target}"))
OFFERED = tuple(tool for tool in BASE_TOOLS if tool.name in {each.name for each in LOOK_UPS})


def write_look_ups(folder: str | Path, seed: int, train: int = 2000, held_out: int = 256) -> None:
    """Write the two files into `folder`. A question is held out by its text, as in the rest of the world."""
    for name, size, is_eval in (("train", train, False), ("eval", held_out, True)):
        rows = islice(_rows(random.Random(f"{seed}/look-up-{name}"), is_eval), size)
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (Path(folder) / f"look-up-{name}.jsonl").write_text(text, encoding="utf-8")


def _rows(rng: random.Random, held_out: bool) -> Iterator[dict]:
    seen: set[str] = set()
    while True:
        look_up = rng.choice(LOOK_UPS)
        tool = next(each for each in OFFERED if each.name == look_up.name)
        question, arguments = world.ask(rng, tool)
        if question in seen or world.is_held_out(question) != held_out:
            continue
        seen.add(question)
        result = look_up.run(**arguments)
        call = {"type": "function", "function": {"name": tool.name, "arguments": arguments}}
        messages = [
            {"role": "user", "content": question},
            {"role": "assistant", "tool_calls": [call]},
            {"role": "tool", "name": tool.name, "content": result},
            {"role": "assistant", "content": look_up.sentence.format(result=result, **arguments)},
        ]
        yield {"messages": messages, "tools": [each.schema() for each in rng.sample(OFFERED, len(OFFERED))]}


# ---- a reward


def says_the_result(prompts, completions, completion_ids, answer: list[str | None], **columns) -> list[float | None]:
    """1 for an answer whose last words are the row's own, 0 for another; None where the row has none. As TRL calls a reward."""
    return [None if gold is None else float(_last_words(said) == gold) for said, gold in zip(completions, answer, strict=True)]


def _last_words(messages: list[dict]) -> str:
    last = messages[-1]
    return "" if last["role"] != "assistant" or last.get("tool_calls") else last.get("content", "").strip()
