"""A chat template and data, tried on each other before a run: render, mask, read back, compare.

    check_template(renderer, rows)    every row -> Preflight: what is refused, what is only worth knowing
    probe_template(renderer)          what the template does with tools, calls, results, reasoning …: trait -> what it does

Refused is what would be trained otherwise than the row says it: tools that are not shown, calls, words or results that are dropped, calls
that read back as others, a turn that nothing ends. Worth knowing is what a server does otherwise than the training text: a prompt that is
not a prefix of it, and reasoning that the template writes for the last turn only. Nothing here trains, and nothing is changed.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from harness.data.readback import calls_of, lost_calls, reads_back
from harness.data.report import Dropped
from harness.data.rows import SourceRow
from harness.data.templates import Renderer
from harness.errors import DataError, ModelError

PREFIX_ROWS = 200
"""So many conversations are also rendered up to each turn; it takes as many renderings as there are turns."""


@dataclass
class Preflight:
    conversations: int = 0
    texts: int = 0
    """Rows that no template is used for."""
    calls: int = 0
    """Trained ones, in rows that were not refused."""
    read_back: int = 0
    """Of these, that were read back from the text as they were meant."""
    refused: Dropped = field(default_factory=Dropped)
    """`location: reason` each."""
    reasons: dict[str, int] = field(default_factory=dict)
    notes: dict[str, Dropped] = field(default_factory=dict)
    traits: dict[str, str] = field(default_factory=dict)

    def note(self, what: str, location: str) -> None:
        self.notes.setdefault(what, Dropped()).add(1, [location])


def check_template(renderer: Renderer, rows: Iterable[SourceRow]) -> Preflight:
    """Tries every row. Raises nothing for a row or for the template: what is refused stands in the result."""
    report = Preflight(traits=probe_template(renderer) if renderer.tokenizer.chat_template else {})
    for source in rows:
        if "messages" not in source.row:
            report.texts += 1
            continue
        report.conversations += 1
        try:
            renderer.render(source.row, source.location)
            _check_row(renderer, source, report)
        except (DataError, ModelError) as error:
            reason = str(error).removeprefix(f"{source.location}: ")
            report.refused.add(1, [f"{source.location}: {reason}"])
            kind = re.sub(r"\d+|'[^']*'|\"[^\"]*\"|\([^)]*\)", "…", reason)[:120]
            report.reasons[kind] = report.reasons.get(kind, 0) + 1
    return report


def _check_row(renderer: Renderer, source: SourceRow, report: Preflight) -> None:
    row, location = source.row, source.location
    if renderer.train_on == "all":
        return
    text, turns = renderer.turns_of(row, location)
    said = {i: "".join(text[a:b] for a, b in turn) for i, turn in turns.items()}
    for i, message in enumerate(row["messages"]):
        where = said.get(i, text)
        if _last_line(message.get("content", "")) not in where:
            raise DataError(f"the chat template of {renderer.name} drops what message {i} ({message['role']}) says")
    start = row.get("train_from", 0)
    for i, message in enumerate(row["messages"]):
        if i not in turns or i < start:
            continue
        thought = _last_line(message.get("reasoning_content", ""))
        if thought and thought not in said[i]:
            report.note("the reasoning of an earlier turn is not written, so that the turn is trained without it", location)
        calls = calls_of(message)
        report.calls += len(calls)
        if calls and reads_back(said[i]):
            report.read_back += len(calls)
        elif calls:
            report.note("calls are in a notation that is not read here: only their names were compared", location)
    if report.conversations <= PREFIX_ROWS and not _is_prefix(renderer, row, text, turns, start, location):
        report.note("what a server sends before a turn is no prefix of the text that was trained", location)


def _is_prefix(renderer: Renderer, row: dict, text: str, turns: dict, start: int, location: str) -> bool:
    tools = row.get("tools") or None
    messages = [message if "content" in message else {**message, "content": ""} for message in row["messages"]]
    for i in turns:
        if i >= start:
            try:
                asked = renderer.write(messages[:i], tools, location, prompt=True)
            except DataError:  # a template that wants more than a prompt has
                return False
            if not text.startswith(asked):
                return False
    return True


def _last_line(text: str) -> str:
    """Templates strip what stands around words, and take <think> out of them."""
    lines = re.sub(r"<think>.*?</think>", "", text, flags=re.DOTALL).strip().splitlines()
    return lines[-1].strip() if lines else ""


# ---- traits

_TOOL = {
    "type": "function",
    "function": {
        "name": "probe_weather",
        "description": "d",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}, "required": ["city"]},
    },
}
_ASKS = {"role": "user", "content": "zqasks"}


def _call(city: str) -> dict:
    return {"id": "call00001", "type": "function", "function": {"name": "probe_weather", "arguments": {"city": city, "days": 3}}}


def _calls(*cities: str, content: str = "") -> dict:
    return {"role": "assistant", "content": content, "tool_calls": [_call(city) for city in cities]}


def probe_template(renderer: Renderer) -> dict[str, str]:
    """trait -> "yes", or what the template does instead, in a few words; each is tried on a made-up conversation."""

    def write(*messages: dict, tools: list | None = None, prompt: bool = False) -> str:
        return renderer.write(list(messages), tools, "probe", prompt=prompt)

    tried = {
        "shows tools": lambda: "yes" if "probe_weather" in write(_ASKS, tools=[_TOOL]) else "no, drops them",
        "writes a call": lambda: _written(write, _calls("Paris")),
        "writes parallel calls": lambda: _written(write, _calls("Paris", "Rome")),
        "writes words beside a call": lambda: (
            "yes" if "zqwords" in write(_ASKS, _calls("Paris", content="zqwords"), tools=[_TOOL]) else "no, drops them"
        ),
        "takes arguments that are text": lambda: _text_arguments(write),
        "shows a result": lambda: (
            "yes" if "zqresult" in write(_ASKS, _calls("Paris"), {**_RESULT, "content": "zqresult"}, tools=[_TOOL]) else "no, drops it"
        ),
        "takes an empty list of tools": lambda: "as none" if write(_ASKS, tools=[]) == write(_ASKS) else "writes the frame of a list",
        "shows a system prompt": lambda: "yes" if "zqsystem" in write({"role": "system", "content": "zqsystem"}, _ASKS) else "no, drops it",
        "adds a system prompt of its own": lambda: "yes" if "system" in write(_ASKS).partition("zqasks")[0].casefold() else "no",
        "writes reasoning": lambda: _reasoning(write),
        "a prompt is a prefix": lambda: _prompt_is_prefix(write),
        "keeps earlier turns as they were": lambda: "yes" if _two_turns(write).startswith(write(_ASKS, _SAID).rstrip()) else "no",
        "ends a turn with": lambda: _ends(renderer),
    }
    traits = {}
    for trait, attempt in tried.items():
        try:
            traits[trait] = attempt()
        except DataError as error:
            traits[trait] = f"refuses: {str(error).partition('refuses this row: ')[2][:80]}"
        except ModelError as error:
            traits[trait] = f"cannot be told: {error}"[:120]
    return traits


_RESULT = {"role": "tool", "name": "probe_weather", "tool_call_id": "call00001"}


def _written(write, message: dict) -> str:
    text = write(_ASKS, message, tools=[_TOOL])
    before = (write(_ASKS, tools=[_TOOL], prompt=True), write(_ASKS, tools=[_TOOL]))
    said = next((text[len(prompt) :] for prompt in before if text.startswith(prompt)), text.rpartition("zqasks")[2])
    if "probe_weather" not in said:
        return "no, drops it"
    names, lost = said.count("probe_weather"), lost_calls(message, said)
    if names < len(message["tool_calls"]):
        return f"no, writes {names} of {len(message['tool_calls'])}"
    if lost:
        return f"no: {lost}"
    return "yes" if reads_back(said) else "yes, in a notation that is not read here"


def _text_arguments(write) -> str:
    """OpenAI writes arguments as JSON text; harness hands templates objects, servers may not."""
    as_text = copy.deepcopy(_calls("Paris"))
    function = as_text["tool_calls"][0]["function"]
    function["arguments"] = json.dumps(function["arguments"])
    objects = write(_ASKS, _calls("Paris"), tools=[_TOOL])
    if "probe_weather" not in objects.rpartition("zqasks")[2]:
        return "drops calls"
    texts = write(_ASKS, as_text, tools=[_TOOL])
    if texts == objects:
        return "yes"
    return "no, encodes them twice" if '\\"city\\"' in texts else "no, writes them otherwise"


def _reasoning(write) -> str:
    thinks = {"role": "assistant", "content": "zqanswer", "reasoning_content": "zqthinks"}
    last = "zqthinks" in write(_ASKS, thinks)
    earlier = "zqthinks" in write(_ASKS, thinks, _ASKS, {"role": "assistant", "content": "zqlater"})
    return "yes" if last and earlier else "of the last turn only" if last else "no, drops it"


_SAID = {"role": "assistant", "content": "zqanswer"}


def _two_turns(write) -> str:
    return write(_ASKS, _SAID, _ASKS, _SAID)


def _prompt_is_prefix(write) -> str:
    prompts = (write(*before, prompt=True) for before in ((_ASKS,), (_ASKS, _SAID, _ASKS)))
    return "yes" if all(map(_two_turns(write).startswith, prompts)) else "no"


def control_pattern(renderer: Renderer) -> re.Pattern:
    """The tokenizer's own control tokens, and what it has added that looks like one (Qwen's <tool_call> is no special token)."""
    added = [token for token in renderer.tokenizer.get_added_vocab() if re.fullmatch(r"<[^\s<>]+>|\[[A-Z_/]+\]", token)]
    tokens = sorted({*added, *renderer.special_tokens()}, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, tokens)) or "(?!)")


def _ends(renderer: Renderer) -> str:
    tokenizer = renderer.tokenizer
    ends = tokenizer.convert_ids_to_tokens(sorted(renderer.end_of_turn_ids()))
    if not ends:
        return "nothing: a model would never learn to stop"
    stops = "" if tokenizer.eos_token in ends else f"; eos_token is {tokenizer.eos_token}, at which generation stops"
    return " or ".join(ends) + stops


# ---- for people


def render_preflight(report: Preflight, name: str) -> str:
    lines = [f"chat template of {name}:"]
    lines += [f"  {trait + ':':<34}{value}" for trait, value in report.traits.items()]
    lines.append(f"{report.conversations:,} conversations rendered, masked and read back; {report.refused.rows:,} refused")
    if report.texts:
        lines.append(f"{report.texts:,} rows of text need no template")
    if report.calls:
        lines.append(f"{report.read_back:,} of {report.calls:,} trained calls read back as they were meant")
    for reason, count in sorted(report.reasons.items(), key=lambda item: -item[1]):
        lines.append(f"FAIL   {count:,} × {reason}")
    lines += [f"         {place}" for place in report.refused.locations]
    lines += [f"NOTE   {what}: {rows.rows:,} rows, the first {rows.locations[0]}" for what, rows in report.notes.items()]
    return "\n".join(lines)


def preflight_json(report: Preflight) -> dict:
    return {
        "traits": report.traits,
        "conversations": report.conversations,
        "calls": report.calls,
        "read_back": report.read_back,
        "refused": report.refused.rows,
        "first": report.refused.locations,
        "notes": {what: rows.rows for what, rows in report.notes.items()},
    }
