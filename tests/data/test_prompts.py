"""What is asked: each question once, without its answer, in an order that nothing but the questions decides."""

import json
import random

import pytest

from harness.data.prompts import load_prompts
from harness.data.rows import content_digest
from harness.embedded import resolve
from harness.errors import DataError
from harness.model import load_tokenizer
from harness.recipe import load
from harness.recipe.schema import Data

TOOLS = [{"name": "joke", "parameters": {}}]
USER, SAID = {"role": "user", "content": "tell me a joke"}, {"role": "assistant", "content": "knock knock"}
CALLED = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "joke", "arguments": {}}}]}
RESULT = {"role": "tool", "content": "ha"}


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(load("tiny/generate"))


@pytest.fixture
def ask(tmp_path, tokenizer):
    def ask(*rows, max_new_tokens=16, **data):
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return load_prompts(Data(train=str(file), **{"max_length": 256, **data}), tokenizer, max_new_tokens)

    return ask


@pytest.mark.parametrize(
    "messages, asked",
    [
        ([USER, SAID], [USER]),
        ([USER], [USER]),
        ([USER, CALLED, RESULT], [USER, CALLED, RESULT]),
        ([USER, CALLED, RESULT, SAID], [USER, CALLED, RESULT]),
        ([USER, SAID, USER, SAID], [USER, SAID, USER]),
    ],
)
def test_a_row_is_asked_up_to_its_last_assistant_turn(ask, tokenizer, messages, asked):
    (prompt,) = ask({"messages": messages, "tools": TOOLS}).prompts
    assert prompt.row["messages"] == asked
    expected = tokenizer.apply_chat_template(
        [{"content": "", **message} for message in asked], tools=prompt.row["tools"], add_generation_prompt=True, return_dict=True
    )
    assert prompt.ids == expected["input_ids"]


def test_rows_that_ask_the_same_are_one_prompt_whatever_their_answers_are(ask):
    tools = [{"type": "function", "function": {"name": "joke", "parameters": {}}}]
    found = ask(
        {"messages": [USER, SAID], "tools": TOOLS},
        {"messages": [USER, CALLED], "tools": tools},
        {"messages": [USER, SAID]},
        {"query": "tell me a joke", "tools": TOOLS, "answers": [{"name": "joke", "arguments": {}}]},
    )
    assert found.rows == 4
    assert sorted(prompt.location.rpartition(":")[2] for prompt in found.prompts) == ["1", "3"]


def test_a_broken_answer_is_no_reason_not_to_ask(ask):
    broken = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "jok", "arguments": {}}}]}
    assert len(ask({"messages": [USER, broken], "tools": TOOLS}).prompts) == 1


def test_the_order_is_that_of_the_keys_and_not_of_the_rows(ask):
    rows = [{"messages": [{"role": "user", "content": f"question {n}"}]} for n in range(30)]
    first = ask(*rows)
    random.Random(0).shuffle(rows)
    again = ask(*rows, *rows[:5])
    assert [prompt.key for prompt in first.prompts] == [prompt.key for prompt in again.prompts] == sorted(p.key for p in first.prompts)
    assert all(prompt.key == content_digest(prompt.row) for prompt in first.prompts)


def test_a_prompt_that_leaves_too_little_room_is_left_out_with_the_reason_or_fails(ask):
    rows = [{"messages": [{"role": "user", "content": "joke " * count}]} for count in (3, 60)]
    lengths = [len(prompt.ids) for prompt in ask(*rows, max_length=2048).prompts]
    exact = {"max_length": min(lengths) + 16}
    found = ask(*rows, **exact)
    assert [len(prompt.ids) for prompt in found.prompts] == [min(lengths)]
    (left_out,) = found.left_out
    assert left_out.location.endswith(":2")
    assert f"data.max_length leaves {min(lengths)} beside generate.max_new_tokens = 16" in left_out.reason
    with pytest.raises(DataError, match=r"rows.jsonl:2: asks in \d+ tokens; .* raise data.max_length, or set data.too_long: drop_row"):
        ask(*rows, too_long="fail", **exact)
    with pytest.raises(DataError, match="no prompt is left of 1 rows; the first: .*: asks in"):
        ask(rows[1], **exact)


@pytest.mark.parametrize(
    "row, words",
    [
        ({"text": "once"}, "a row of text has no turn that could be answered; must be messages"),
        ({"prompt": "a", "completion": "b"}, "a row of prompt and completion has no turn"),
        ({"messages": [SAID]}, "nobody asks anything"),
        ({"messages": [{"role": "system", "content": "x"}, SAID]}, "nobody asks anything"),
        ({"messages": [USER, RESULT, SAID]}, "a tool result without a call"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "half of a surrogate pair"),
    ],
)
def test_a_row_that_cannot_be_asked_fails_or_is_listed(ask, row, words):
    with pytest.raises(DataError, match=f"rows.jsonl:1: .*{words}"):
        ask(row, {"messages": [USER]})
    found = ask(row, {"messages": [USER]}, on_error="skip")
    assert len(found.prompts) == 1
    assert [words in skipped.reason and skipped.location.endswith(":1") for skipped in found.left_out] == [True]


def test_the_sources_own_limits_count(tokenizer):
    data = Data(train=({"path": resolve("embedded:base-train"), "max_rows": 20},), max_length=256)
    assert load_prompts(data, tokenizer, 16).rows == 20
