"""Rows as people have them become canonical rows, which everything after this file reads.

A canonical row is a JSON-serialisable dict in one of three shapes. What a row does not have is absent, never null, and nothing is invented.

    {"messages": [Message…], "tools": [Tool…]?, "train_from": int?}   assistant turns are trained, from message `train_from` (absent: 0) on
    {"prompt": str, "completion": str}                                the completion is trained
    {"text": str}                                                     everything is trained

    Message  {"role": "system"|"user"|"assistant"|"tool", "content": str?, "reasoning_content": str?, "tool_calls": [Call…]?,
              "tool_call_id": str?, "name": str?}
    Call     {"id": str?, "type": "function", "function": {"name": str, "arguments": OBJECT}}
    Tool     see harness/tools/schema.py

Layouts read: see `LAYOUTS`. Every conversation that leaves here to be trained ends with the assistant, and every call that is trained
names a tool that its row offers: the opposite teaches a model to make tools up. A call that breaks its tool's *schema* passes (12-19 % of
the gold calls of public sets do); `broken_calls` lists them, so that they are counted.
"""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections.abc import Callable

from harness.errors import DataError
from harness.tools import Problem, ToolCall, check_call, did_you_mean, normalise_tools, parse_calls, read_call
from harness.tools.schema import decode_json

ROLES = ("system", "user", "assistant", "tool")
_ALIASES = {"developer": "system"}  # OpenAI's newer name for the same message
_HINTS = {"human": "user", "gpt": "assistant", "model": "assistant", "function": "tool", "observation": "tool", "ipython": "tool"}
_MESSAGE_KEYS = ("role", "content", "reasoning_content", "tool_calls", "tool_call_id", "name")
_ONLY_ON = {"reasoning_content": "assistant", "tool_calls": "assistant", "tool_call_id": "tool"}


# ---- which layout


def detect_format(row: dict) -> str:
    """The layout of a row, by its keys. Raises DataError where none or several fit."""
    found = [name for name, (keys, _, _) in LAYOUTS.items() if any(key_set <= row.keys() for key_set in keys)]
    if len(found) == 1:
        if row.get("label") is False:
            raise DataError(
                "label is false: a bad answer, which supervised training would teach; use task kto, or take such rows out (if it means "
                "something else, name the source's `format`)"
            )
        return found[0]
    accepted = "; ".join(f"{name}: {shown}" for name, (_, shown, _) in LAYOUTS.items())
    seen = f"the row's keys are {', '.join(map(str, row)) or 'none'}"
    if found:
        raise DataError(f"{seen}, which fit {' and '.join(found)}; say which with the source's `format`")
    if {"chosen", "rejected"} <= row.keys():
        seen += " (a preference pair, which supervised training does not read; tasks dpo, reward and kto do)"
    raise DataError(f"{seen}; must be one of the layouts {accepted}")


def to_canonical(row: dict, layout: str = "auto", *, asks: bool = False) -> dict:
    """Converts one raw row. Raises DataError saying what is wrong in it (the caller knows where it stands).

    asks: the row is a question, which may end with the user or a tool and must be a conversation.
    """
    if layout == "auto":
        layout = detect_format(row)
    keys, shown, convert = LAYOUTS[layout]
    if not any(key_set <= row.keys() for key_set in keys):
        raise DataError(f"the row's keys are {', '.join(map(str, row)) or 'none'}; {layout} rows have {shown}")
    canonical = convert(row)
    if "messages" in canonical:
        _check_conversation(canonical, asks=asks)
    elif asks:
        raise DataError(f"a row of {' and '.join(canonical)} has no turn that could be answered; must be messages")
    return canonical


# ---- the layouts


def _from_messages(row: dict) -> dict:
    return _conversation(messages_of(row["messages"], "messages"), row.get("tools"))


def _from_prompt_completion(row: dict) -> dict:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        if row.get("tools"):
            raise DataError("tools stand beside a text prompt, which no template can put them into; must be lists of messages")
        if not completion:
            raise DataError("completion is empty; there is nothing to train")
        return {"prompt": prompt, "completion": completion}
    if not isinstance(prompt, list) or not isinstance(completion, list):
        raise DataError(f"prompt is {kind_of(prompt)} and completion is {kind_of(completion)}; must be both text or both lists of messages")
    messages = messages_of(prompt, "prompt") + messages_of(completion, "completion")
    return _conversation(messages, row.get("tools"), train_from=len(prompt))


def _from_text(row: dict) -> dict:
    if not isinstance(row["text"], str) or not row["text"]:
        raise DataError(f"text is {kind_of(row['text'])}; must be text that is not empty")
    return {"text": row["text"]}


def _from_xlam(row: dict) -> dict:
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
    if not answers:
        # The right reply is words that the row does not hold. An empty turn would teach silence, and a sentence of ours would be invented.
        raise DataError("answers is empty: no call is right, but the row has no reply to train; write it as messages with the reply")
    calls = [{"type": "function", "function": _seal_tools_names(answer)} for answer in answers]
    earlier = any(message["role"] == "assistant" for message in messages)
    messages = _with_assistant(messages, {"tool_calls": calls_of(calls, "answers")})
    return _conversation(messages, tools, train_from=len(messages) - 1 if earlier and len(messages) > 1 else None)


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
            messages = _with_assistant(messages, {"content": content})
        elif role == "assistant":
            parsed = parse_calls(content)
            if parsed.malformed:
                raise DataError(f"{where}: the assistant's call cannot be read: {parsed.malformed[0][:80]}")
            calls = [{"type": "function", "function": {"name": c.name, "arguments": c.arguments}} for c in parsed.calls]
            said = {"content": parsed.text, "tool_calls": calls}
            messages = _with_assistant(messages, {key: value for key, value in said.items() if value})
        else:
            messages.append({"role": _role(role, where), "content": content})
    return messages


def _with_assistant(messages: list[dict], said: dict) -> list[dict]:
    """Appends what the assistant said, to its open turn where there is one: templates know no two assistant turns in a row."""
    last = messages[-1] if messages else {}
    if last.get("role") != "assistant" or "tool_calls" in last:
        return [*messages, {"role": "assistant", **said}] if any(said.values()) else messages
    content = "\n".join(part for part in (last.get("content"), said.get("content")) if part)
    merged = {**last, **said, **({"content": content} if content else {})}
    return [*messages[:-1], merged]


_INSTRUCTION = re.compile(r"\s*#{2,}\s*Instruction\s*:(.*?)(?:#{2,}\s*Output\s*:.*)?\Z", re.DOTALL)
_INPUT = re.compile(r"\s*#{2,}\s*Input\s*:\s*")
_DICT_LIKE = re.compile(r"\s*\{\s*'Instruction'\s*:(.*?),\s*'Output'\s*:", re.DOTALL)


def _from_apibench(row: dict) -> dict:
    """APIBench: the user's question from `code`, the answer from `api_call`.

    The free text in `code` also holds an answer, but it is missing, cut off or another call than `api_call` in 5-98 % of a file's rows, and
    `api_call` is what APIBench's own metric looks up in its database. So that field, letter by letter, is the target.
    """
    code, api_call = row["code"], row["api_call"]
    if not isinstance(code, str) or not isinstance(api_call, str) or not api_call.strip():
        raise DataError(f"code is {kind_of(code)} and api_call is {kind_of(api_call)}; must be both text, the call not empty")
    found = _INSTRUCTION.match(code) or _DICT_LIKE.match(code)
    if not found:
        raise DataError(f'code starts with "{code[:40]}"; must start with "###Instruction:" or "{{\'Instruction\':"')
    question = _INPUT.sub("\n", found.group(1)).strip()
    if len(question) > 1 and question[0] == question[-1] and question[0] in "\"'":
        question = question[1:-1].strip()
    if not question:
        raise DataError("the instruction in code is empty; must be a question")
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": api_call}]}


# name -> (the key sets that show it, what to tell a person, the converter)
LAYOUTS: dict[str, tuple[tuple[set[str], ...], str, Callable[[dict], dict]]] = {
    "messages": (({"messages"},), "messages (+ tools)", _from_messages),
    "prompt_completion": (({"prompt", "completion"},), "prompt, completion (+ tools)", _from_prompt_completion),
    "text": (({"text"},), "text", _from_text),
    "xlam": (({"query", "tools", "answers"}, {"responses_create_params", "expected_answers"}), "query, tools, answers", _from_xlam),
    "apibench": (({"code", "api_call"},), "code, api_call", _from_apibench),
}


# ---- messages


def messages_of(raw: object, where: str) -> list[dict]:
    raw = decode_json(raw, where)
    if not isinstance(raw, list):
        raise DataError(f"{where} is {kind_of(raw)}; must be a list of messages")
    return [_message(message, f"{where}[{i}]") for i, message in enumerate(raw)]


def _message(raw: object, where: str) -> dict:
    # OpenAI's logs carry `"refusal": null`, `"annotations": []` and the like: nothing said, nothing lost.
    raw = {key: value for key, value in object_of(raw, where).items() if value is not None and value != []}
    for key in raw:
        if key not in _MESSAGE_KEYS:
            # Not ignored: `weight: 0` or `function_call` would change what is trained.
            raise DataError(f'{where} has a key "{key}"{did_you_mean(key, _MESSAGE_KEYS)}; must be {", ".join(_MESSAGE_KEYS)}')
    role = _role(raw.get("role"), where)
    for key, owner in _ONLY_ON.items():
        if key in raw and role != owner:
            raise DataError(f"{where}: {key} stands on a {role} message; only {owner} messages have it")
    message = {"role": role}
    if "content" in raw:
        message["content"] = _content(raw["content"], where)
    for key in ("reasoning_content", "tool_call_id", "name"):
        if key in raw:
            if not isinstance(raw[key], str):
                raise DataError(f"{where}: {key} is {kind_of(raw[key])}; must be text")
            message[key] = raw[key]
    if "tool_calls" in raw:
        message["tool_calls"] = calls_of(raw["tool_calls"], where)
    if role == "assistant" and not message.get("content") and "tool_calls" not in message:
        raise DataError(f"{where}: the assistant says nothing; must have content or tool_calls")
    if role != "assistant" and "content" not in message:
        raise DataError(f"{where}: the {role} message has no content")
    return message


def _role(role: object, where: str) -> str:
    role = _ALIASES.get(role, role) if isinstance(role, str) else role
    if role in ROLES:
        return role
    if not isinstance(role, str):
        raise DataError(f"{where}: role is {kind_of(role)}; must be {', '.join(ROLES)}")
    hint = f'; did you mean "{_HINTS[role]}"?' if role in _HINTS else did_you_mean(role, ROLES)
    raise DataError(f'{where}: role is "{role}"; must be {", ".join(ROLES)}{hint}')


def _content(content: object, where: str) -> str:
    """Text, or a list of text parts (joined: a text model's template would print the list)."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise DataError(f"{where}: content is {kind_of(content)}; must be text (an object goes in as its JSON text)")
    for part in content:
        is_text = isinstance(part, dict) and part.get("type") in ("text", "input_text", "output_text") and isinstance(part.get("text"), str)
        if not is_text:
            raise DataError(f'{where}: content has the part {json.dumps(part)[:60]}; must be text or parts {{"type": "text", "text": …}}')
    return "".join(part["text"] for part in content)


def calls_of(raw: object, where: str) -> list[dict]:
    raw = decode_json(raw, f"{where}: tool_calls")
    if not isinstance(raw, list):
        raise DataError(f"{where}: tool_calls is {kind_of(raw)}; must be a list")
    return [_call(call, f"{where}: call {i}") for i, call in enumerate(raw)]


def _call(raw: object, where: str) -> dict:
    raw = object_of(raw, where)
    function = object_of(raw["function"], where) if "function" in raw else raw
    name = function.get("name")
    if not isinstance(name, str) or not name:
        raise DataError(f"{where} has no name; must be {{name, arguments}}")
    arguments = function.get("arguments")
    call = read_call({"name": name, "arguments": arguments})
    if call is None:
        shown = json.dumps(arguments, default=str)[:60]
        raise DataError(f'{where}: arguments of "{name}" are {shown}; must be an object, or its JSON text ({{}} where there are none)')
    identity = {"id": raw["id"]} if isinstance(raw.get("id"), str) else {}
    return {**identity, "type": "function", "function": {"name": name, "arguments": call.arguments}}


# ---- conversations


def _conversation(messages: list[dict], tools: object, train_from: int | None = None) -> dict:
    row = {"messages": messages}
    tools = normalise_tools(tools)
    if tools:  # [] would make some templates print the frame of a tool list around nothing
        row["tools"] = tools
    if train_from is not None:
        row["train_from"] = train_from
    return row


def _check_conversation(row: dict, *, asks: bool) -> None:
    messages, start = row["messages"], row.get("train_from", 0)
    if not messages:
        raise DataError("there are no messages")
    if asks:
        messages = messages[:-1] if messages[-1]["role"] == "assistant" else messages
        if not any(message["role"] in ("user", "tool") for message in messages):
            raise DataError("nobody asks anything; there must be a message of the user or a tool to answer")
    elif messages[-1]["role"] != "assistant":
        raise DataError(f"the last message is the {messages[-1]['role']}'s; must be the assistant's, whose words are trained")
    check_results(messages)
    check_offered(messages[start:], row.get("tools", []), lambda i: f"messages[{i + start}]")


def check_results(messages: list[dict], place: Callable[[int], str] = "messages[{}]".format) -> None:
    """Raises DataError unless every tool result answers a call. place: what a person calls message i."""
    open_calls: list[dict] = []
    for i, message in enumerate(messages):
        open_calls = _answered(open_calls, message, place(i)) if message["role"] == "tool" else list(message.get("tool_calls", []))


def check_offered(messages: list[dict], tools: list[dict], place: Callable[[int], str] = "messages[{}]".format) -> None:
    """Raises DataError unless every call names one of the tools. place: as in `check_results`."""
    offered = [tool["function"]["name"] for tool in tools]
    for i, message in enumerate(messages):
        for call in message.get("tool_calls", []):
            name = call["function"]["name"]
            if name not in offered:
                what = f"is not among the row's tools{did_you_mean(name, offered)}" if offered else "is made, but the row offers no tools"
                raise DataError(f'{place(i)}: tool call "{name}" {what}')


def _answered(open_calls: list[dict], result: dict, where: str) -> list[dict]:
    """The calls still without a result after this one; by id where both sides have one, else in order."""
    if not open_calls:
        raise DataError(f"{where}: a tool result without a call; must follow an assistant message with as many tool_calls")
    identity = result.get("tool_call_id")
    ids = [call.get("id") for call in open_calls]
    if identity is None or None in ids:
        return open_calls[1:]
    if identity not in ids:
        raise DataError(f'{where}: tool_call_id "{identity}" answers no open call; must be one of {", ".join(ids)}')
    return [call for call in open_calls if call["id"] != identity]


def trained_calls(row: dict) -> list[ToolCall]:
    """The calls of a canonical row that are trained."""
    trained = row.get("messages", [])[row.get("train_from", 0) :]
    return [ToolCall(c["function"]["name"], c["function"]["arguments"]) for m in trained for c in m.get("tool_calls", [])]


def broken_calls(row: dict) -> list[Problem]:
    """The first problem of each trained call that breaks its tool's schema."""
    return [problems[0] for call in trained_calls(row) if (problems := check_call(call, row.get("tools", [])))]


def is_python(code: str) -> bool:
    """Whether a text parses as Python; APIBench's calls are counted by it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an odd escape in somebody's data is not our warning
            ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


# ---- values


def object_of(value: object, what: str) -> dict:
    value = decode_json(value, what)
    if not isinstance(value, dict):
        raise DataError(f"{what} is {kind_of(value)}; must be an object")
    return value


def kind_of(value: object) -> str:
    names = {type(None): "missing", bool: "a boolean", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return "empty" if value == "" else names.get(type(value), type(value).__name__)
