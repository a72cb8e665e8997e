"""A query, tools and the calls that answer it: xLAM and what is written like it (NeMo Gym, Hammer's files, API-Bank), Hammer's own
instruction rows, and Seal-Tools as published."""

from __future__ import annotations

import random
import re

from harness.data.conversation import calls_of, conversation, kind_of, messages_of, object_of, role_of, with_assistant
from harness.data.layouts.base import Layout, LeftOut, Reading, key_set
from harness.errors import DataError
from harness.tools import parse_calls
from harness.tools.schema import decode_json


def read_xlam(row: dict, reading: Reading) -> dict:
    """xLAM: {query, tools, answers}, the last two also as JSON text; and NeMo Gym's form of the same rows.

    The answers become the last assistant message. Where the query is a list of turns (API-Bank), only that message is trained, because such
    sets repeat a dialogue once per step and would train early turns many times over.
    """
    if "query" in row:
        query, tools, answers = row["query"], row["tools"], row["answers"]
        messages = [{"role": "user", "content": query}] if isinstance(query, str) else _turns(query)
    else:
        request = object_of(row["responses_create_params"], "responses_create_params")
        query, tools, answers = request.get("input"), request.get("tools"), row["expected_answers"]
        if isinstance(query, list):
            query = [{k: v for k, v in turn.items() if (k, v) != ("type", "message")} if isinstance(turn, dict) else turn for turn in query]
        messages = [{"role": "user", "content": query}] if isinstance(query, str) else messages_of(query, "input")
    answers = decode_json(answers, "answers")
    if not isinstance(answers, list):
        raise DataError(f"answers is {kind_of(answers)}; must be a list of calls")
    if not answers and not reading.asks:
        # The right reply is words that the row does not hold. An empty turn would teach silence, and a sentence of ours would be invented.
        raise DataError("answers is empty: no call is right, but the row has no reply to train; write it as messages with the reply")
    calls = [{"type": "function", "function": _seal_tools_names(answer)} for answer in answers]
    if not calls:
        return conversation(messages, tools, reading)
    earlier = any(message["role"] == "assistant" for message in messages)
    messages = with_assistant(messages, {"tool_calls": calls_of(calls, "answers")})
    return conversation(messages, tools, reading, train_from=len(messages) - 1 if earlier and len(messages) > 1 else None)


def _seal_tools_names(answer: object) -> object:
    """Seal-Tools writes {"tool", "parameters"} where xLAM writes {"name", "arguments"}."""
    if isinstance(answer, dict) and "name" not in answer and "tool" in answer:
        return {"name": answer["tool"], "arguments": answer.get("parameters", answer.get("arguments"))}
    return answer


def _turns(raw: object) -> list[dict]:
    """API-Bank's turns: `agent` speaks to the user, `assistant` writes calls as fenced JSON. Both are our assistant, so an agent's words
    and the calls that follow become one message. The cue "Generate API Request:" at the very end is the benchmark's own: dropped."""
    if not isinstance(raw, list) or not raw:
        raise DataError(f"query is {kind_of(raw)}; must be text or a list of turns")
    messages: list[dict] = []
    for i, turn in enumerate(raw):
        where = f"query[{i}]"
        turn = object_of(turn, where)
        content = turn.get("content")
        if not isinstance(content, str):
            raise DataError(f"{where}: content is {kind_of(content)}; must be text")
        if i == len(raw) - 1:
            content = content.removesuffix("Generate API Request:").rstrip()
        role = turn.get("role")
        if role == "agent":
            messages = with_assistant(messages, {"content": content})
        elif role == "assistant":
            parsed = parse_calls(content)
            if parsed.malformed:
                raise DataError(f"{where}: the assistant's call cannot be read: {parsed.malformed[0][:80]}")
            calls = [{"type": "function", "function": {"name": c.name, "arguments": c.arguments}} for c in parsed.calls]
            said = {"content": parsed.text, "tool_calls": calls}
            messages = with_assistant(messages, {key: value for key, value in said.items() if value})
        else:
            messages.append({"role": role_of(role, where), "content": content})
    return messages


# ---- Hammer

_SECTION = re.compile(r"\[BEGIN OF ([A-Z ]+)\]\s*(.*?)\s*\[END OF \1\]", re.DOTALL)


def read_hammer(row: dict, reading: Reading) -> dict:
    """Hammer's training rows: one text of sections (task, tools, format, query) and the calls as fenced JSON. `[]` says that no tool fits;
    the row has no words for that, as in xLAM."""
    sections = dict(_SECTION.findall(row["instruction"]))
    if not {"AVAILABLE TOOLS", "QUERY"} <= sections.keys():
        raise DataError(f"instruction has the sections {', '.join(sections) or 'none'}; must have AVAILABLE TOOLS and QUERY")
    reading.lose("the task and format sections of the instruction, which tell a model how to write calls")
    answers = re.sub(r"\A\s*```\w*\s*|\s*```\s*\Z", "", row["output"])
    return read_xlam({"query": sections["QUERY"], "tools": sections["AVAILABLE TOOLS"], "answers": answers}, reading)


def _is_hammer(row: dict) -> bool:
    return isinstance(row["instruction"], str) and isinstance(row["output"], str) and "[BEGIN OF AVAILABLE TOOLS]" in row["instruction"]


# ---- Seal-Tools

_EARLIER_RESULT = re.compile(r"API_call_\d+")


class Shelf(list):
    """The tools of Seal-Tools, as its tool.jsonl has them, by name; one for all rows of a file."""

    def __init__(self, tools: list[dict]):
        super().__init__(tools)
        self.by_name = {tool["api_name"]: tool for tool in tools}


def read_sealtools(row: dict, reading: Reading) -> dict:
    """{query, calling: [{api, parameters, responses}]}; `tools` is the Shelf of tool.jsonl, which beside.py puts there.

    A row offers the tools that it calls and others, drawn by its query: where nothing else is offered there is nothing to choose.
    """
    query, calling, shelf = row["query"], decode_json(row["calling"], "calling"), row.get("tools")
    if not isinstance(calling, list) or not calling or not all(isinstance(call, dict) for call in calling):
        raise DataError(f"calling is {kind_of(calling)}; must be a list of calls")
    if not isinstance(shelf, Shelf):
        raise DataError("its tools are not known: tool.jsonl of Seal-Tools must stand beside the file")
    if _EARLIER_RESULT.search(str([call.get("parameters") for call in calling])):
        raise LeftOut("one of its calls takes the result of another (API_call_N), which is not in the row")
    reading.lose("`responses` of a call (names for results that the row does not hold)")
    called = [shelf.by_name[name] for name in dict.fromkeys(call.get("api") for call in calling) if name in shelf.by_name]
    wanted = 4 if reading.settings.distractors is None else reading.settings.distractors
    drawn = random.Random(reading.draw("others", query)).sample(shelf, min(wanted + len(called), len(shelf)))
    others = [tool for tool in drawn if tool not in called][:wanted]
    offered = sorted([*called, *others], key=lambda tool: reading.draw(f"place of {tool['api_name']}", query))
    tools = [
        {"name": t["api_name"], "description": t.get("api_description", ""), "parameters": t["parameters"], "required": t.get("required")}
        for t in offered
    ]
    answers = [{"name": call.get("api"), "arguments": call.get("parameters")} for call in calling]
    return read_xlam({"query": query, "tools": tools, "answers": answers}, reading)


XLAM = Layout((key_set("query tools answers"), key_set("responses_create_params expected_answers")), "query, tools, answers", read_xlam)
HAMMER = Layout(
    (key_set("instruction output"),), "instruction with [BEGIN OF AVAILABLE TOOLS], output", read_hammer, key_set("input"), fits=_is_hammer
)
SEALTOOLS = Layout((key_set("query calling"),), "query, calling (Seal-Tools; tool.jsonl beside it)", read_sealtools, key_set("tools"))
