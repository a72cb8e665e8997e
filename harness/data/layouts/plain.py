"""Rows that are what they say: messages (OpenAI's too), prompt and completion, text; and questions that nobody has answered."""

from __future__ import annotations

from harness.data.conversation import conversation, kind_of, messages_of
from harness.data.layouts.base import Layout, LeftOut, Reading, key_set
from harness.errors import DataError
from harness.tools.schema import decode_json


def read_messages_row(row: dict, reading: Reading) -> dict:
    """`train_from` is harness's own (`harness convert` writes it); OpenAI says the same by `weight: 0` on earlier assistant messages."""
    raw, weighted_from = _without_weights(decode_json(row["messages"], "messages"))
    start = row.get("train_from", weighted_from)
    if start is not None and (type(start) is not int or not 0 <= start < len(raw)):
        raise DataError(f"train_from is {start!r}; must be the place of a message, from 0")
    tools = row["tools"] if row.get("tools") is not None else row.get("functions")
    return conversation(messages_of(raw, "messages"), tools, reading, train_from=start or None)


def _without_weights(raw: object) -> tuple[object, int | None]:
    """Messages without `weight`, and from which on they are trained. Raises DataError where weights say anything else."""
    if not isinstance(raw, list) or not any(isinstance(message, dict) and message.get("weight") is not None for message in raw):
        return raw, None
    weights = [
        (i, message.get("weight")) for i, message in enumerate(raw) if isinstance(message, dict) and message.get("role") == "assistant"
    ]
    trained = [i for i, weight in weights if weight != 0]
    start = trained[0] if trained else len(raw)
    for i, weight in weights:
        if weight not in ((0,) if i < start else (None, 1)) or isinstance(weight, bool):
            raise DataError(
                f'messages[{i}] has a key "weight" of {weight!r}; must be 0 on the first assistant messages and 1 or absent on the rest, '
                "of which there must be one"
            )
    if start == len(raw):
        raise DataError(f'messages[{weights[-1][0]}] has a key "weight" of 0, as all have; one must be trained')
    bare = [{key: value for key, value in m.items() if key != "weight"} if isinstance(m, dict) else m for m in raw]
    return bare, start


def read_prompt_completion(row: dict, reading: Reading) -> dict:
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
    return conversation(messages, row.get("tools"), reading, train_from=len(prompt))


def read_text(row: dict, reading: Reading) -> dict:
    if not isinstance(row["text"], str) or not row["text"]:
        raise DataError(f"text is {kind_of(row['text'])}; must be text that is not empty")
    return {"text": row["text"]}


def read_labelled(row: dict, reading: Reading) -> dict:
    """KTO's rows, {prompt, completion | messages | conversations, label}: the good ones, for fine-tuning. What is bad is left out."""
    from harness.data.layouts.sharegpt import read_sharegpt

    if not isinstance(row["label"], bool):
        raise DataError(f"label is {kind_of(row['label'])}; must be true (good) or false (bad)")
    readers = {"messages": read_messages_row, "conversations": read_sharegpt, "completion": read_prompt_completion}
    canonical = next(read for key, read in readers.items() if key in row)(row, reading)
    if not row["label"]:
        raise LeftOut("is labelled false, and fine-tuning would imitate it")
    return canonical


def read_question(row: dict, reading: Reading) -> dict:
    """IFEval's prompts, APIBench's questions, NeMo Gym's tasks."""
    if not reading.asks:
        raise DataError("the row asks and holds no answer, so that there is nothing to train; `harness generate` has a teacher answer it")
    if "responses_create_params" in row:
        from harness.data.layouts.responses import read_request

        return read_request(row, reading)
    words = row["prompt"] if "prompt" in row else row["text"]
    if not isinstance(words, str) or not words.strip():
        raise DataError(f"the question is {kind_of(words)}; must be text")
    return conversation([{"role": "user", "content": words}], None, reading)


def _is_labelled(row: dict) -> bool:
    return isinstance(row["label"], bool)


MESSAGES = Layout((key_set("messages"),), "messages (+ tools)", read_messages_row, key_set("tools functions train_from"))
PROMPT_COMPLETION = Layout((key_set("prompt completion"),), "prompt, completion (+ tools)", read_prompt_completion, key_set("tools"))
TEXT = Layout((key_set("text"),), "text", read_text)
KTO = Layout(
    (key_set("prompt completion label"), key_set("messages label"), key_set("conversations label")),
    "label beside messages, conversations or prompt and completion",
    read_labelled,
    key_set("tools system"),
    fits=_is_labelled,
    instead_of=("messages", "prompt_completion", "sharegpt", "hermes", "toolace"),
)
QUESTIONS = Layout(
    (key_set("prompt instruction_id_list"), key_set("question_id text"), key_set("responses_create_params")),
    "a question without an answer (prompt, instruction_id_list; question_id, text; responses_create_params)",
    read_question,
    fits=lambda row: not row.keys() & {"expected_answers", "response", "completion", "messages"},
    instead_of=("text",),
)
