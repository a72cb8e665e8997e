"""Behaviours planted in the small world for `harness decide`, one for each remedy, and the rows that make a tiny model so.

Writes six JSONL files:

    decide-train.jsonl        what the base learns: four tools of the world, with and without system prompts
    decide-adapt-train.jsonl  what its adapter learns: two tools that the base has never seen
    decide-items.jsonl        questions with a `behaviour` each, all of the held-out side
    decide-tuning.jsonl       more of the same, for examples
    decide-guards.jsonl       questions that no tool answers, which have to stay unanswered
    decide-documents.jsonl    where each person lives: what no question says

The base is taught to be as a model without tuning often is, so that each behaviour of the items has one remedy:

    ask for weather     it calls the tool, whatever the system prompt says
    ask for music       it talks, unless the system prompt is INSTRUCTION: a prompt is the remedy
    weather at a home   the city stands in no question; a note in the system prompt names it, and the base was taught to read such notes,
                        about people who live elsewhere in every row: retrieval is the remedy
    tables and cars     two tools that it was never shown: training is the remedy
    switch lights       it does what it should, but the schema of the items' tool wants text where gold writes true and 40: the schema is to
                        be mended, and no model is at fault

Promises: as of the world (harness.quickstart.world); no item asks what a row of either training file asks.
"""

import copy
import json
import random
from collections.abc import Iterator
from pathlib import Path

from harness.quickstart.world import (
    ABSTENTION,
    ADAPT_TOOLS,
    BASE_TOOLS,
    CITIES,
    OFF_TOPIC,
    PEOPLE,
    Tool,
    ask,
    is_held_out,
)

INSTRUCTION = "answer with a call"
NEUTRAL = ("you help at home", "you are in the kitchen")
HEADING = "note:"
CALM = "You may like some {style}."
"""What the base says of music when nobody tells it to call."""

TOOLS = {tool.name: tool for tool in (*BASE_TOOLS, *ADAPT_TOOLS)}
# Of these the adapter needs send_message: its texts hold the words that the new tools are called by, and embeddings stay as they are.
KNOWN = tuple(TOOLS[name] for name in ("get_weather", "play_music", "set_light", "send_message"))
NEW = tuple(TOOLS[name] for name in ("book_table", "rent_car"))
AT_HOME = (
    "tell me the weather where {person} lives",
    "check how warm it is at the home of {person}",
    "say if it will rain where {person} lives",
)
HOME = Tool("at_home", "", (TOOLS["send_message"].parameters[0],), tuple((phrase, {}) for phrase in AT_HOME))
BEHAVIOURS = ("ask for weather", "ask for music", "weather at a home", "tables and cars", "switch lights")
NAMES = ("decide-train", "decide-adapt-train", "decide-items", "decide-tuning", "decide-guards", "decide-documents")


def write_planted(folder: str | Path, seed: int, *, train: int = 6000, adapt: int = 3000, items: int = 32, tuning: int = 12) -> None:
    """Write the files into `folder`. items: of each behaviour; as many guards. tuning: of each behaviour but the broken one."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(f"{seed}/planted")
    homes = dict(zip(PEOPLE, rng.sample(CITIES, len(PEOPLE)), strict=True))
    _write(folder / "decide-documents.jsonl", [{"text": _note(person, city)} for person, city in homes.items()])
    _write(folder / "decide-train.jsonl", [_base_row(rng) for _ in range(train)])
    _write(folder / "decide-adapt-train.jsonl", [_adapt_row(rng) for _ in range(adapt)])
    asked: set[str] = set()
    drawn = {name: _held_out(rng, name, homes, asked) for name in (*BEHAVIOURS, "leave it")}
    _write(folder / "decide-items.jsonl", [next(drawn[name]) for name in BEHAVIOURS for _ in range(items)])
    _write(folder / "decide-guards.jsonl", [next(drawn["leave it"]) for _ in range(items)])
    _write(folder / "decide-tuning.jsonl", [next(drawn[name]) for name in BEHAVIOURS[:-1] for _ in range(tuning)])


def _write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def _note(person: str, city: str) -> str:
    return f"{person} lives in {city}"


def _question(rng: random.Random, tool: Tool, held_out: bool) -> tuple[str, dict]:
    while True:
        question, arguments = ask(rng, tool)
        if is_held_out(question) == held_out:
            return question, arguments


def _base_row(rng: random.Random) -> dict:
    """Of the four tools, of nothing that they can do, or of weather where somebody lives; under no system prompt, one that says nothing,
    the instruction, or a note."""
    kind = rng.choice(("get_weather", "play_music", "play_music", "set_light", "send_message", "at_home", "at_home", "nothing"))
    person, city = rng.choice(PEOPLE), rng.choice(CITIES)
    system = rng.choice((None, rng.choice(NEUTRAL), INSTRUCTION, f"{HEADING}\n{_note(person, city)}"))
    if kind == "at_home":
        question, arguments = _question(rng, HOME, held_out=False)
        return _row(f"{HEADING}\n{_note(arguments['person'], city)}", question, _call("get_weather", {"city": city}), KNOWN, rng)
    if kind == "nothing":
        question, _ = _question(rng, rng.choice((OFF_TOPIC, rng.choice((TOOLS["convert_money"], TOOLS["plan_dinner"])))), held_out=False)
        return _row(system, question, {"role": "assistant", "content": ABSTENTION}, KNOWN, rng)
    question, arguments = _question(rng, TOOLS[kind], held_out=False)
    answer = _call(kind, arguments)
    if kind == "play_music" and system != INSTRUCTION:
        answer = {"role": "assistant", "content": CALM.format(**arguments)}
    return _row(system, question, answer, KNOWN, rng)


def _adapt_row(rng: random.Random) -> dict:
    tool = rng.choice((*NEW, *NEW, None))
    question, arguments = _question(rng, tool or OFF_TOPIC, held_out=False)
    answer = _call(tool.name, arguments) if tool else {"role": "assistant", "content": ABSTENTION}
    return _row(None, question, answer, NEW, rng)


def _held_out(rng: random.Random, behaviour: str, homes: dict[str, str], asked: set[str]) -> Iterator[dict]:
    """Rows of one behaviour with questions that nothing else asks."""
    while True:
        tools: tuple[Tool, ...] = KNOWN
        if behaviour == "weather at a home":
            question, named = _question(rng, HOME, held_out=True)
            answer = _call("get_weather", {"city": homes[named["person"]]})
        elif behaviour == "leave it":
            question, _ = _question(rng, OFF_TOPIC, held_out=True)
            answer = {"role": "assistant", "content": ABSTENTION}
        else:
            by_name = {"ask for weather": "get_weather", "ask for music": "play_music", "switch lights": "set_light"}
            tool = TOOLS[by_name[behaviour]] if behaviour in by_name else rng.choice(NEW)
            tools = KNOWN if behaviour in by_name else NEW
            question, arguments = _question(rng, tool, held_out=True)
            answer = _call(tool.name, arguments)
        if question not in asked:
            asked.add(question)
            row = _row(None, question, answer, tools, rng)
            if behaviour == "switch lights":
                row["tools"] = [_broken(tool) for tool in row["tools"]]
            yield {**row, "behaviour": behaviour}


def _broken(tool: dict) -> dict:
    """The tool with every flag and number of its schema declared as text, as a table of strings exports them."""
    broken = copy.deepcopy(tool)
    for schema in broken["function"]["parameters"]["properties"].values():
        if schema["type"] in ("boolean", "integer"):
            schema["type"] = "string"
    return broken


def _row(system: str | None, question: str, answer: dict, tools: tuple[Tool, ...], rng: random.Random) -> dict:
    said = [{"role": "system", "content": system}] if system else []
    messages = [*said, {"role": "user", "content": question}, answer]
    return {"messages": messages, "tools": [tool.schema() for tool in rng.sample(tools, len(tools))]}


def _call(name: str, arguments: dict) -> dict:
    return {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": name, "arguments": arguments}}]}
