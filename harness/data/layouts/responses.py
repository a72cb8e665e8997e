"""NeMo Gym's rollouts and tasks: requests and responses of OpenAI's Responses API."""

from __future__ import annotations

from harness.data.conversation import calls_of, conversation, kind_of, object_of, role_of, with_assistant
from harness.data.layouts.base import Layout, LeftOut, Reading, key_set
from harness.errors import DataError


def read_request(row: dict, reading: Reading) -> dict:
    request = object_of(row["responses_create_params"], "responses_create_params")
    return conversation(_items(request.get("input"), "input"), request.get("tools"), reading)


def read_rollout(row: dict, reading: Reading) -> dict:
    """What was asked and what the model did, calls, results and last words; trained is what it did. A rollout of less than full reward is
    left out: fine-tuning would imitate it."""
    if type(row["reward"]) not in (int, float):
        raise DataError(f"reward is {kind_of(row['reward'])}; must be a number")
    request, response = object_of(row["responses_create_params"], "responses_create_params"), object_of(row["response"], "response")
    asked = _items(request.get("input"), "input")
    messages = _items(response.get("output"), "response.output", asked)
    canonical = conversation(messages, request.get("tools"), reading, train_from=len(asked) or None)
    if row["reward"] < 1:
        raise LeftOut(f"is a rollout of reward {row['reward']:g}, and fine-tuning would imitate it")
    return canonical


def _items(raw: object, where: str, before: list[dict] | None = None) -> list[dict]:
    """Items of the Responses API as messages behind `before`: reasoning, words and calls that follow each other are one turn."""
    messages = list(before or ())
    if isinstance(raw, str):
        return [*messages, {"role": "user", "content": raw}]
    if not isinstance(raw, list):
        raise DataError(f"{where} is {kind_of(raw)}; must be text or a list of items")
    thought = ""
    for i, item in enumerate(raw):
        at = f"{where}[{i}]"
        item = object_of(item, at)
        kind = item.get("type") or "message"
        if kind == "reasoning":
            thought += "\n".join(part.get("text", "") for part in item.get("summary") or item.get("content") or ())
        elif kind == "function_call_output":
            messages.append({"role": "tool", "content": str(item.get("output", "")), "tool_call_id": str(item.get("call_id", ""))})
        elif kind == "function_call":
            called = calls_of([{"id": item.get("call_id"), "name": item.get("name"), "arguments": item.get("arguments")}], at)
            messages, thought = _call(messages, called, thought), ""
        elif kind == "message":
            role = role_of(item.get("role"), at)
            words = _words(item.get("content"), at)
            if role != "assistant":
                messages.append({"role": role, "content": words})
            elif words.strip():
                messages, thought = with_assistant(messages, _thought(thought) | {"content": words.strip()}), ""
        else:
            raise DataError(f'{at}: an item of type "{kind}"; must be message, reasoning, function_call or function_call_output')
    return messages


def _call(messages: list[dict], called: list[dict], thought: str) -> list[dict]:
    """Calls that follow each other are made at once."""
    last = messages[-1] if messages else {}
    if last.get("role") == "assistant" and "tool_calls" in last and not thought:
        return [*messages[:-1], {**last, "tool_calls": [*last["tool_calls"], *called]}]
    return with_assistant(messages, _thought(thought) | {"tool_calls": called})


def _thought(thought: str) -> dict:
    return {"reasoning_content": thought.strip()} if thought.strip() else {}


def _words(content: object, where: str) -> str:
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [content]
    if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in parts):
        raise DataError(f"{where}: content is {kind_of(content)}; must be text or parts with text")
    return "".join(part["text"] for part in parts)


ROLLOUTS = Layout(
    (key_set("responses_create_params response reward"),), "responses_create_params, response, reward (rollouts of NeMo Gym)", read_rollout
)
