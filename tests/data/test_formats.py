import copy
import json

import pytest

from harness.data.formats import broken_calls, detect_format, to_canonical, trained_calls
from harness.errors import DataError
from harness.tools import ToolCall

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}, "required": ["city"]},
    },
}
CALL = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Paris"}}}
USER = {"role": "user", "content": "Weather in Paris?"}
ASKS = {"role": "assistant", "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": "18 C"}
SAYS = {"role": "assistant", "content": "It is 18 C."}
WHOLE = {"messages": [USER, ASKS, RESULT, SAYS], "tools": [WEATHER]}


def messages_row(*messages, tools=(WEATHER,)):
    return {"messages": list(messages), "tools": list(tools)}


def nulls_in(value):
    if isinstance(value, dict):
        return sum(map(nulls_in, value.values()))
    return sum(map(nulls_in, value)) if isinstance(value, list) else value is None


# ---- messages


def test_a_canonical_row_comes_back_as_it_is():
    assert to_canonical(copy.deepcopy(WHOLE)) == WHOLE


def test_openai_spelling_gives_the_canonical_row_with_argument_objects_and_no_nulls():
    call = {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'}}
    raw = {
        "messages": [
            {"role": "developer", "content": "Be brief.", "name": None},
            {"role": "user", "content": [{"type": "text", "text": "Weather in "}, {"type": "text", "text": "Paris?"}]},
            {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None, "annotations": []},
            {"role": "tool", "content": "18 C", "tool_call_id": "c1"},
            {"role": "assistant", "content": "It is 18 C.", "tool_calls": None, "reasoning_content": "Easy."},
        ],
        "tools": json.dumps([WEATHER]),
        "id": "row 7",
    }
    row = to_canonical(raw)
    assert row == {
        "messages": [
            {"role": "system", "content": "Be brief."},
            USER,
            {"role": "assistant", "tool_calls": [{**CALL, "id": "c1"}]},
            {**RESULT, "tool_call_id": "c1"},
            {**SAYS, "reasoning_content": "Easy."},
        ],
        "tools": [WEATHER],
    }
    assert nulls_in(row) == 0


def test_messages_and_calls_may_be_json_text():
    raw = {"messages": [json.dumps(m) for m in WHOLE["messages"]], "tools": [json.dumps(WEATHER)]}
    assert to_canonical(raw) == to_canonical({"messages": json.dumps(WHOLE["messages"]), "tools": json.dumps([WEATHER])}) == WHOLE


def test_a_null_that_the_row_writes_as_an_argument_stays():
    row = to_canonical(messages_row(USER, asks(arguments={"city": "Paris", "days": None})))
    assert trained_calls(row) == [ToolCall("get_weather", {"city": "Paris", "days": None})]


def test_no_tools_and_an_empty_list_of_tools_are_the_same():
    assert to_canonical(messages_row(USER, SAYS, tools=())) == to_canonical({"messages": [USER, SAYS]}) == {"messages": [USER, SAYS]}


def test_conversion_does_not_write_to_the_raw_row():
    for raw in (WHOLE, XLAM):
        before = copy.deepcopy(raw)
        to_canonical(raw)
        assert raw == before


def asks(name="get_weather", **changes):
    return {"role": "assistant", "tool_calls": [{"function": {"name": name, "arguments": {"city": "Paris"}, **changes}}]}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (messages_row(USER, asks("get_wether")), r'\[1\]: tool call "get_wether" is not among the row.s tools; did you mean "get_weather"'),
        (messages_row(USER, asks(), tools=()), "offers no tools"),
        (messages_row(USER), "last message is the user's"),
        (messages_row(), "there are no messages"),
        (messages_row(USER, RESULT, SAYS), r"messages\[1\]: a tool result without a call"),
        (messages_row(USER, asks(), RESULT, RESULT, SAYS), r"messages\[3\]: a tool result without a call"),
        (messages_row({"role": "human", "content": "x"}, SAYS), r'messages\[0\]: role is "human".*did you mean "user"'),
        (messages_row({"role": "usr", "content": "x"}, SAYS), 'did you mean "user"'),
        (messages_row({"content": "x"}, SAYS), "role is missing"),
        (messages_row({"role": "user"}, SAYS), "user message has no content"),
        (messages_row({"role": "user", "content": {"a": 1}}, SAYS), "content is an object"),
        (messages_row({"role": "user", "content": [{"type": "image_url"}]}, SAYS), "content has the part"),
        (messages_row(USER, {"role": "assistant", "content": ""}), "the assistant says nothing"),
        (messages_row(USER, {**SAYS, "weight": 0}), r'messages\[1\] has a key "weight"'),
        (messages_row(USER, {**SAYS, "toolcalls": [CALL]}), 'did you mean "tool_calls"'),
        (messages_row({**USER, "tool_calls": [CALL]}, SAYS), "tool_calls stands on a user message"),
        (messages_row(USER, asks(arguments=None)), 'arguments of "get_weather" are null'),
        (messages_row(USER, asks(arguments="city=Paris")), 'arguments of "get_weather" are "city=Paris"'),
        (messages_row(USER, asks(arguments=["Paris"])), "must be an object"),
        (messages_row(USER, asks(name="")), "call 0 has no name"),
        (messages_row(USER, {"role": "assistant", "tool_calls": "x"}), "not JSON"),
        ({"messages": 3}, "messages is a number"),
        ({"messages": ["{"]}, r"messages\[0\] is text that is not JSON"),
        ({**WHOLE, "tools": "[{]"}, "tools is text that is not JSON"),
        ({**WHOLE, "tools": [{"name": "f", "parameters": {"a": {"type": "strng"}}}]}, 'tool "f": type "strng"'),
    ],
)
def test_what_is_wrong_in_a_row_is_named(row, message):
    with pytest.raises(DataError, match=message):
        to_canonical(row)


def test_results_are_matched_by_id_where_there_are_ids():
    two = {"role": "assistant", "tool_calls": [{**CALL, "id": "a"}, {**CALL, "id": "b"}]}
    results = [{**RESULT, "tool_call_id": "b"}, {**RESULT, "tool_call_id": "a"}]
    assert to_canonical(messages_row(USER, two, *results, SAYS))["messages"][2]["tool_call_id"] == "b"
    with pytest.raises(DataError, match='tool_call_id "c" answers no open call; must be one of a, b'):
        to_canonical(messages_row(USER, two, {**RESULT, "tool_call_id": "c"}, SAYS))


def test_a_call_that_breaks_its_schema_passes_and_is_listed():
    row = to_canonical(messages_row(USER, asks(arguments={"city": "Paris", "days": "3"}), RESULT, asks(arguments={})))
    assert [problem.kind for problem in broken_calls(row)] == ["wrong_type", "missing_argument"]
    assert trained_calls(row) == [ToolCall("get_weather", {"city": "Paris", "days": "3"}), ToolCall("get_weather", {})]


# ---- prompt and completion, text


def test_text_pairs_stay_text():
    assert to_canonical({"prompt": "2+2=", "completion": "4", "id": 1}) == {"prompt": "2+2=", "completion": "4"}
    assert to_canonical({"text": "Once", "meta": None}) == {"text": "Once"}


def test_message_pairs_become_one_conversation_trained_from_the_completion():
    row = to_canonical({"prompt": [USER, ASKS, RESULT], "completion": [SAYS], "tools": json.dumps([WEATHER])})
    assert row == {**WHOLE, "train_from": 3}
    assert trained_calls(row) == []


def test_an_unoffered_tool_in_a_prompt_is_context_and_no_error():
    row = to_canonical({"prompt": [USER, asks("search"), RESULT], "completion": [SAYS], "tools": [WEATHER]})
    assert row["train_from"] == 3
    with pytest.raises(DataError, match='tool call "search"'):
        to_canonical({"prompt": [USER], "completion": [asks("search")], "tools": [WEATHER]})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "completion": ""}, "completion is empty"),
        ({"prompt": "a", "completion": [SAYS]}, "prompt is text and completion is a list"),
        ({"prompt": "a", "completion": "b", "tools": [WEATHER]}, "tools stand beside a text prompt"),
        ({"prompt": [USER], "completion": []}, "last message is the user's"),
        ({"text": ""}, "text is empty"),
        ({"text": None}, "text is missing"),
    ],
)
def test_an_empty_or_mixed_pair_is_refused(row, message):
    with pytest.raises(DataError, match=message):
        to_canonical(row)


# ---- xLAM

XLAM = {
    "id": 3,
    "query": "Weather in Paris?",
    "tools": [
        {
            "name": "get_weather",
            "description": "d",
            "parameters": {"city": {"type": "str"}, "days": {"type": "int, optional", "default": 1}},
        }
    ],
    "answers": [{"name": "get_weather", "arguments": {"city": "Paris"}}],
}
XLAM_SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer", "default": 1}},
    "required": ["city"],
}
XLAM_ROW = {
    "messages": [USER, ASKS],
    "tools": [{"type": "function", "function": {"name": "get_weather", "description": "d", "parameters": XLAM_SCHEMA}}],
}


def test_xlam_is_read_from_objects_and_from_json_text():
    as_published = {**XLAM, "tools": json.dumps(XLAM["tools"]), "answers": json.dumps(XLAM["answers"])}
    assert to_canonical(XLAM) == to_canonical(as_published) == XLAM_ROW


def test_seal_tools_names_for_an_answer_are_read():
    assert to_canonical({**XLAM, "answers": [{"tool": "get_weather", "parameters": {"city": "Paris"}}]}) == XLAM_ROW


def test_nemo_gym_rows_are_read():
    raw = {
        "id": 0,
        "responses_create_params": {
            "input": [{"role": "system", "content": "Help.", "type": "message"}, USER],
            "tools": [{"type": "function", "name": "get_weather", "description": "d", "parameters": XLAM_SCHEMA, "strict": False}],
        },
        "expected_answers": XLAM["answers"],
    }
    assert to_canonical(raw) == {**XLAM_ROW, "messages": [{"role": "system", "content": "Help."}, USER, ASKS]}


def test_turns_become_messages_of_which_only_the_answer_is_trained():
    raw = {
        **XLAM,
        "query": [
            {"role": "user", "content": "Hello"},
            {"role": "agent", "content": "Let me see."},
            {"role": "assistant", "content": '```[{"name": "search", "arguments": {"q": "weather"}}]```'},
            {"role": "tool", "content": "get_weather"},
            {"role": "agent", "content": "Which city?"},
            {"role": "user", "content": "Paris"},
            {"role": "agent", "content": "One moment.\nGenerate API Request:"},
        ],
    }
    row = to_canonical(raw)
    assert row["messages"] == [
        {"role": "user", "content": "Hello"},
        {
            "role": "assistant",
            "content": "Let me see.",
            "tool_calls": [{"type": "function", "function": {"name": "search", "arguments": {"q": "weather"}}}],
        },
        {"role": "tool", "content": "get_weather"},
        {"role": "assistant", "content": "Which city?"},
        {"role": "user", "content": "Paris"},
        {"role": "assistant", "content": "One moment.", "tool_calls": [CALL]},
    ]
    assert row["train_from"] == 5
    assert trained_calls(row) == [ToolCall("get_weather", {"city": "Paris"})]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answers": []}, "answers is empty: no call is right, but the row has no reply"),
        ({"answers": "[]"}, "answers is empty"),
        ({"answers": "[{"}, "answers is text that is not JSON"),
        ({"answers": {"name": "f"}}, "answers is an object"),
        ({"answers": [{"name": "get_time", "arguments": {}}]}, 'tool call "get_time" is not among'),
        ({"answers": [{"name": "get_weather"}]}, 'arguments of "get_weather" are null'),
        ({"query": []}, "query is a list"),
        ({"query": [{"role": "agnt", "content": "x"}]}, r'query\[0\]: role is "agnt"'),
        ({"query": [{"role": "assistant", "content": '[{"name": "f", "arg'}]}, "call cannot be read"),
    ],
)
def test_an_xlam_row_that_cannot_be_trained_says_why(change, message):
    with pytest.raises(DataError, match=message):
        to_canonical({**XLAM, **change})


# ---- APIBench

API_CALL = "AutoModel.from_pretrained('x/y')"


@pytest.mark.parametrize(
    ("code", "question"),
    [
        ("###Instruction: Compare two articles.\n###Output: <<<domain>>>: NLP\n<<<api_call>>>: f('z')", "Compare two articles."),
        ("### Instruction: Sum up.\n### Input: A text.\n### Output: {'a': 1}", "Sum up.\nA text."),
        ("###Instruction: No answer was written.", "No answer was written."),
        ("{'Instruction': Say, which API fits?, 'Output': {'domain': 'x', 'api_call': \"f('z')\"}}", "Say, which API fits?"),
        ("{'Instruction': \"I'm here. Suggest one.\", 'Output': {'domain': 'cut o", "I'm here. Suggest one."),
    ],
)
def test_apibench_asks_the_instruction_and_answers_the_call(code, question):
    row = to_canonical({"code": code, "api_call": API_CALL, "provider": "p", "api_data": {}})
    assert row == {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": API_CALL}]}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"code": "import torch", "api_call": API_CALL}, 'code starts with "import torch"'),
        ({"code": "###Instruction: \n###Output: x", "api_call": API_CALL}, "instruction in code is empty"),
        ({"code": "###Instruction: x", "api_call": " "}, "must be both text"),
    ],
)
def test_an_apibench_row_without_question_or_call_is_refused(row, message):
    with pytest.raises(DataError, match=message):
        to_canonical(row)


# ---- which layout


@pytest.mark.parametrize(
    ("keys", "layout"),
    [
        (["messages", "prompt", "prompt_id"], "messages"),
        (["prompt", "completion", "tools"], "prompt_completion"),
        (["text", "source"], "text"),
        (["query", "tools", "answers"], "xlam"),
        (["responses_create_params", "expected_answers"], "xlam"),
        (["code", "api_call"], "apibench"),
    ],
)
def test_the_keys_tell_the_layout(keys, layout):
    assert detect_format(dict.fromkeys(keys)) == layout


def test_a_layout_that_is_not_known_lists_what_was_seen_and_what_is_read():
    with pytest.raises(DataError, match=r"keys are turns, system; .*messages \(\+ tools\).*query, tools, answers.*code, api_call"):
        detect_format({"turns": [], "system": ""})
    with pytest.raises(DataError, match="preference pair"):
        detect_format({"prompt": "", "chosen": "", "rejected": ""})
    with pytest.raises(DataError, match="keys are none"):
        detect_format({})


def test_two_layouts_at_once_have_to_be_decided_by_the_recipe():
    both = {"messages": [USER, SAYS], "text": "rendered"}
    with pytest.raises(DataError, match="fit messages and text; say which"):
        to_canonical(both)
    assert to_canonical(both, "text") == {"text": "rendered"}
    assert to_canonical(both, "messages") == {"messages": [USER, SAYS]}
    with pytest.raises(DataError, match="xlam rows have query, tools, answers"):
        to_canonical(both, "xlam")
