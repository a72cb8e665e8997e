"""A small world of tools, made from a seed, in which a tiny model can learn to call them within minutes on a CPU.

Writes four JSONL files of conversations (`messages` + `tools`, the layout of harness.data):

    base-train.jsonl    base-eval.jsonl     six tools that the model learns from nothing
    adapt-train.jsonl   adapt-eval.jsonl    six other tools, which the base model has never been shown

A row is one question and its answer: a call of one of the row's tools, or the sentence ABSTENTION where no listed tool helps.
What the other six tools could have answered is such a question too, so each stage also teaches when *not* to call.

Promises: the same seed and sizes give the same bytes; no question occurs twice in a file, and none of an eval file occurs in a train file
of any seed (a question belongs to one side by its digest); every call validates against its tool's schema. Nothing here imports torch.
"""

import hashlib
import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

ABSTENTION = "None of the tools can do that."


@dataclass(frozen=True)
class Parameter:
    """One parameter of a tool: its JSON schema, the values that questions mention, and whether a call must give it."""

    name: str
    schema: dict
    values: tuple
    required: bool = True


@dataclass(frozen=True)
class Tool:
    """One tool and the ways to ask for it.

    A phrase is a text with `{parameter}` slots, and the arguments that it implies without naming them ("switch on" is `on: true`).
    A call has exactly the arguments in the phrase, in the order of the schema.
    """

    name: str
    description: str
    parameters: tuple[Parameter, ...]
    phrases: tuple[tuple[str, dict], ...]

    def schema(self) -> dict:
        """The tool as chat templates and model APIs take it."""
        parameters = {
            "type": "object",
            "properties": {p.name: p.schema for p in self.parameters},
            "required": [p.name for p in self.parameters if p.required],
            "additionalProperties": False,
        }
        return {"type": "function", "function": {"name": self.name, "description": self.description, "parameters": parameters}}


@dataclass(frozen=True)
class Sizes:
    """Rows in each file."""

    base_train: int = 8000
    base_eval: int = 256
    adapt_train: int = 4000
    adapt_eval: int = 256


@dataclass(frozen=True)
class WorldFiles:
    base_train: Path
    base_eval: Path
    adapt_train: Path
    adapt_eval: Path


# -- The words -----------------------------------------------------------------------------------------------------------------------------
# Both worlds share them: an adapter works with frozen embeddings, so every word that the second stage says (its tools' names and parameters
# included) must have been said in the first; messages and translations pass on errands in those words.

CITIES = ("Paris", "London", "Rome", "Madrid", "Berlin", "Oslo", "Vienna", "Lisbon", "Athens", "Dublin")
CITIES += ("Cairo", "Tokyo", "Lima", "Boston", "Delhi", "Prague", "Geneva", "Milan", "Sydney", "Hanoi")
PEOPLE = ("Ann", "Bob", "Carl", "Dora", "Emma", "Finn", "Gina", "Hugo", "Ines", "Jack")
PEOPLE += ("Kate", "Leo", "Maria", "Nina", "Omar", "Paul", "Rosa", "Sam", "Tina", "Walt")
DISHES = ("soup", "rice", "pasta", "salad", "bread", "fish")
THINGS = ("keys", "tickets", "flowers", "books", "camera")
LANGUAGES = ("French", "German", "Greek", "Spanish")
VERBS = ("bring", "buy", "find", "return", "rent", "book", "order", "start", "end", "translate")
TOPICS = ("car", "dishes", "food", "guests", "label", "language", "outside", "price", "table", "timer", "train", "formal", "automatic")
ERRANDS = tuple(f"{verb} the {noun}" for verb in VERBS for noun in THINGS + TOPICS)
STYLES = ("jazz", "rock", "opera", "blues", "folk", "disco")
CURRENCIES = ("dollars", "euros", "pounds", "yen")
ROOMS = ("kitchen", "garage", "bedroom", "office", "hall")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
SMALL_NUMBERS = tuple(range(2, 13))
LARGE_NUMBERS = tuple(range(15, 100, 5))
AMOUNTS = LARGE_NUMBERS + tuple(n + 0.5 for n in SMALL_NUMBERS)

OPENERS = ("", "please ", "can you ", "hey, ", "now ")
CLOSERS = ("", ".", "!", ", thanks")


def _string(name: str, values: tuple, required: bool = True) -> Parameter:
    return Parameter(name, {"type": "string"}, values, required)


def _choice(name: str, values: tuple, required: bool = True) -> Parameter:
    return Parameter(name, {"type": "string", "enum": list(values)}, values, required)


def _integer(name: str, values: tuple, required: bool = True) -> Parameter:
    return Parameter(name, {"type": "integer"}, values, required)


def _number(name: str, required: bool = True) -> Parameter:
    return Parameter(name, {"type": "number"}, AMOUNTS, required)


def _flag(name: str, required: bool = True) -> Parameter:
    return Parameter(name, {"type": "boolean"}, (True, False), required)


def _several(name: str, values: tuple, required: bool = True) -> Parameter:
    return Parameter(name, {"type": "array", "items": {"type": "string"}}, values, required)


# -- The tools -----------------------------------------------------------------------------------------------------------------------------

BASE_TOOLS = (
    Tool(
        "get_weather",
        "Weather of a city, now or for some days",
        (_string("city", CITIES), _integer("days", SMALL_NUMBERS, required=False)),
        (
            ("tell me the weather in {city}", {}),
            ("check how warm it is in {city}", {}),
            ("look up the weather of {city} for the next {days} days", {}),
            ("say if it will rain in {city} over {days} days", {}),
            ("show {days} days of weather in {city}", {}),
        ),
    ),
    Tool(
        "convert_money",
        "Convert an amount from one currency to another",
        (_number("amount"), _choice("source", CURRENCIES), _choice("target", CURRENCIES)),
        (
            ("convert {amount} {source} to {target}", {}),
            ("change {amount} {source} into {target}", {}),
            ("work out how many {target} i get for {amount} {source}", {}),
            ("tell me what {amount} {source} are in {target}", {}),
        ),
    ),
    Tool(
        "set_light",
        "Switch the light of a room, optionally to a level in percent",
        (_choice("room", ROOMS), _flag("on"), _integer("level", LARGE_NUMBERS, required=False)),
        (
            ("switch on the light in the {room}", {"on": True}),
            ("switch off the light in the {room}", {"on": False}),
            ("turn the {room} light off", {"on": False}),
            ("make it dark in the {room}", {"on": False}),
            ("turn the {room} light on at level {level}", {"on": True}),
            ("set the {room} light to {level} percent", {"on": True}),
        ),
    ),
    Tool(
        "send_message",
        "Send a text to a person",
        (_string("person", PEOPLE), _string("text", ERRANDS), _flag("urgent", required=False)),
        (
            ("tell {person} to {text}", {}),
            ("ask {person} to {text}", {}),
            ("send {person} the message {text}", {}),
            ("write to {person} that it is urgent to {text}", {"urgent": True}),
            ("send {person} an urgent message to {text}", {"urgent": True}),
        ),
    ),
    Tool(
        "plan_dinner",
        "Plan a dinner with people on a day, optionally with a dish",
        (_several("people", PEOPLE), _choice("day", DAYS), _string("dish", DISHES, required=False)),
        (
            ("plan a dinner with {people} on {day}", {}),
            ("invite {people} to dinner on {day}", {}),
            ("invite {people} for {dish} on {day}", {}),
            ("cook {dish} for {people} on {day}", {}),
        ),
    ),
    Tool(
        "play_music",
        "Play music of a style, optionally sung in a language or for some minutes",
        (_choice("style", STYLES), _choice("language", LANGUAGES, required=False), _integer("minutes", LARGE_NUMBERS, required=False)),
        (
            ("play some {style}", {}),
            ("put on {style} music", {}),
            ("play {style} in {language}", {}),
            ("put on {language} {style} music", {}),
            ("play {minutes} minutes of {style} music", {}),
            ("play {language} {style} for {minutes} minutes", {}),
        ),
    ),
)

ADAPT_TOOLS = (
    Tool(
        "book_table",
        "Book a table for guests in a city, inside or outside",
        (_string("city", CITIES), _integer("guests", SMALL_NUMBERS), _flag("outside", required=False)),
        (
            ("book a table for {guests} guests in {city}", {}),
            ("get {guests} guests a table in {city}", {}),
            ("find a table outside in {city} for {guests} guests", {"outside": True}),
            ("book {city} for {guests} guests but not outside", {"outside": False}),
        ),
    ),
    Tool(
        "find_train",
        "Find a train between two cities, optionally on a day",
        (_string("start", CITIES), _string("end", CITIES), _choice("day", DAYS, required=False)),
        (
            ("find a train from {start} to {end}", {}),
            ("show trains that start in {start} and end in {end}", {}),
            ("get me a train from {start} to {end} on {day}", {}),
            ("look for a {day} train from {start} to {end}", {}),
        ),
    ),
    Tool(
        "order_food",
        "Order dishes, optionally below a price",
        (_several("dishes", DISHES), _number("price", required=False)),
        (
            ("order {dishes}", {}),
            ("get me the dishes {dishes}", {}),
            ("order {dishes} for a price under {price}", {}),
            ("buy the dishes {dishes} at a price of at most {price}", {}),
        ),
    ),
    Tool(
        "start_timer",
        "Start a timer, optionally with a label",
        (_number("minutes"), _string("label", DISHES, required=False)),
        (
            ("start a timer of {minutes} minutes", {}),
            ("count down {minutes} minutes", {}),
            ("start a {minutes} minutes timer with the label {label}", {}),
            ("time the {label} for {minutes} minutes", {}),
        ),
    ),
    Tool(
        "translate_text",
        "Translate a text into a language, optionally in formal words",
        (_string("text", ERRANDS), _choice("language", LANGUAGES), _flag("formal", required=False)),
        (
            ("translate {text} into {language}", {}),
            ("say {text} in the {language} language", {}),
            ("put {text} into formal {language}", {"formal": True}),
            ("translate {text} to {language} but not formal", {"formal": False}),
        ),
    ),
    Tool(
        "rent_car",
        "Rent a car in a city for some days",
        (_string("city", CITIES), _integer("days", SMALL_NUMBERS), _flag("automatic")),
        (
            ("rent an automatic car in {city} for {days} days", {"automatic": True}),
            ("get me a car in {city} for {days} days, automatic", {"automatic": True}),
            ("rent a manual car for {days} days in {city}", {"automatic": False}),
            ("find a car in {city} for {days} days, not automatic", {"automatic": False}),
        ),
    ),
)

# Questions for no tool of either world; its phrases name words that the tools know, so a word alone never gives the answer away.
OFF_TOPIC = Tool(
    "off_topic",
    "",
    (
        _string("city", CITIES),
        _string("person", PEOPLE),
        _string("dish", DISHES),
        _string("thing", THINGS),
        _choice("day", DAYS),
        _integer("count", SMALL_NUMBERS),
    ),
    (
        ("tell me who built {city}", {}),
        ("paint {count} {thing} for {person}", {}),
        ("tell {person} a joke on {day}", {}),
        ("teach {person} how to cook {dish}", {}),
        ("write a song about {dish} in {city}", {}),
        ("explain why {person} left {city}", {}),
        ("repair the {thing} before {day}", {}),
        ("guess the age of {person}", {}),
    ),
)


# -- Rows ----------------------------------------------------------------------------------------------------------------------------------


def write_world(folder: str | Path, seed: int, sizes: Sizes = Sizes()) -> WorldFiles:  # noqa: B008 (frozen)
    """Write the four files of the world into `folder` and return their paths.

    Raises ValueError if a size asks for more distinct questions than the world has (there are some tens of thousands).
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files = WorldFiles(*(folder / f"{name}.jsonl" for name in ("base-train", "base-eval", "adapt-train", "adapt-eval")))
    for path, tools, others, size, held_out in (
        (files.base_train, BASE_TOOLS, ADAPT_TOOLS, sizes.base_train, False),
        (files.base_eval, BASE_TOOLS, ADAPT_TOOLS, sizes.base_eval, True),
        (files.adapt_train, ADAPT_TOOLS, BASE_TOOLS, sizes.adapt_train, False),
        (files.adapt_eval, ADAPT_TOOLS, BASE_TOOLS, sizes.adapt_eval, True),
    ):
        rng = random.Random(f"{seed}/{path.stem}")
        rows = [json.dumps(row, ensure_ascii=False) + "\n" for row in islice(draw_rows(rng, tools, others, held_out), size)]
        if len(rows) < size:
            raise ValueError(f"{path.name}: {size} rows asked; the world has only {len(rows)} distinct questions for it at this seed")
        path.write_text("".join(rows), encoding="utf-8")
    return files


def draw_rows(rng: random.Random, tools: tuple[Tool, ...], others: tuple[Tool, ...], held_out: bool) -> Iterator[dict]:
    """Rows with distinct questions of one side of the split, until the world seems exhausted (a thousand draws without a new question)."""
    seen: set[str] = set()
    draws_without_news = 0
    while draws_without_news < 1000:
        draws_without_news += 1
        # One row in seven is for none of the tools; half of those are what the other world's tools answer.
        tool = rng.choice((*tools, None))
        question, arguments = ask(rng, tool or rng.choice((OFF_TOPIC, rng.choice(others))))
        if question in seen or is_held_out(question) != held_out:
            continue
        seen.add(question)
        draws_without_news = 0
        yield _row(question, tool and tool.name, arguments, rng.sample(tools, len(tools)))


def is_held_out(question: str) -> bool:
    """Whether a question belongs to the eval files (one in eight): decided by what it asks alone, so no file and no seed can mix the sides,
    and none is seen in training in other politeness."""
    return hashlib.sha256(bare(question).encode()).digest()[0] < 32


def bare(question: str) -> str:
    """What is asked, without what `ask` puts before and after it."""
    while (shorter := _without_one(question)) != question:
        question = shorter
    return question


def _without_one(question: str) -> str:
    for opener in filter(None, OPENERS):
        question = question.removeprefix(opener)
    for closer in filter(None, CLOSERS):
        question = question.removesuffix(closer)
    return question


def ask(rng: random.Random, tool: Tool) -> tuple[str, dict]:
    """One question for the tool and the arguments that it asks for."""
    phrase, implied = rng.choice(tool.phrases)
    named = set(re.findall(r"\{(\w+)\}", phrase))
    arguments: dict = {}
    for parameter in tool.parameters:
        if parameter.name in implied:
            arguments[parameter.name] = implied[parameter.name]
        elif parameter.name in named:
            # Two parameters with the same values (two cities, two currencies) never get the same one.
            values = [v for v in parameter.values if v not in arguments.values()]
            several = parameter.schema["type"] == "array"
            arguments[parameter.name] = rng.sample(values, rng.choice((1, 2))) if several else rng.choice(values)
    words = {name: _say(value) for name, value in arguments.items()}
    return rng.choice(OPENERS) + phrase.format(**words) + rng.choice(CLOSERS), arguments


def _say(value: object) -> str:
    """A value as a question mentions it."""
    return " and ".join(value) if isinstance(value, list) else str(value)


def _row(question: str, name: str | None, arguments: dict, tools: list[Tool]) -> dict:
    answer: dict = {"role": "assistant", "content": ABSTENTION}
    if name is not None:
        answer = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": name, "arguments": arguments}}]}
    return {"messages": [{"role": "user", "content": question}, answer], "tools": [tool.schema() for tool in tools]}
