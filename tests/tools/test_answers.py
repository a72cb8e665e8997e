"""What a model wrote becomes a turn that says the same, or is refused by the kind of its fault."""

import json

import pytest

from harness.tools import Fault, normalise_tools, parse_calls, read_answer

TOOLS = normalise_tools(
    [
        {"name": "light", "parameters": {"room": {"type": "str"}, "on": {"type": "bool"}}},
        {"name": "joke", "parameters": {}},
    ]
)
GOOD = '<tool_call>{"name": "light", "arguments": {"room": "hall", "on": false}}</tool_call>'
CALL = {"type": "function", "function": {"name": "light", "arguments": {"room": "hall", "on": False}}}
JOKE = {"type": "function", "function": {"name": "joke", "arguments": {}}}


@pytest.mark.parametrize(
    "text, message",
    [
        (GOOD, {"tool_calls": [CALL]}),
        (f"I will.\n{GOOD}", {"content": "I will.", "tool_calls": [CALL]}),
        (f'{GOOD}\n<tool_call>{{"name": "joke", "arguments": {{}}}}</tool_call>', {"tool_calls": [CALL, JOKE]}),
        ('<|python_tag|>{"name": "joke", "parameters": {}}', {"tool_calls": [JOKE]}),
        ('[TOOL_CALLS][{"name": "joke", "arguments": {}}]', {"tool_calls": [JOKE]}),
        ("[joke()]", {"tool_calls": [JOKE]}),
        # A word that an argument holds too.
        (f"hall {GOOD}", {"content": "hall", "tool_calls": [CALL]}),
        (f"<think>hall</think>hall {GOOD}", {"content": "hall", "tool_calls": [CALL]}),
        ("It is dark.", {"content": "It is dark."}),
        ("  It is dark.\n", {"content": "It is dark."}),
        (f"<think>I will. {GOOD}</think>It is dark.", {"content": "It is dark."}),
        (f"<think>In the hall, then.</think>{GOOD}", {"tool_calls": [CALL]}),
        ("5 < 6 and {} is empty", {"content": "5 < 6 and {} is empty"}),
    ],
)
def test_a_valid_answer_becomes_a_structured_turn(text, message):
    assert read_answer(text, TOOLS, ended=True, control_tokens=["<|end|>"]) == {"role": "assistant", **message}


@pytest.mark.parametrize(
    "text, kind, words",
    [
        ("", "empty", "says nothing"),
        (" \n", "empty", "says nothing"),
        ("<think>and thought no end", "empty", "says nothing"),
        ('<tool_call>{"name": "light", "arguments": {"room": "ha', "unparsable", 'cannot be read: {"name"'),
        ('Sure: {"name": "light", "arguments": {"room": "hall", "on": false}}', "unparsable", "cannot be read"),
        (f"{GOOD} Done.", "unparsable", "words after a call, which a turn cannot hold: Done."),
        (f"<think>Done.</think>{GOOD} Done.", "unparsable", "words after a call"),
        (f"First. {GOOD} Then. {GOOD}", "unparsable", "words after a call"),
        ('{"name": "joke", "arguments": {}} Done.', "unparsable", "words after a call"),
        ("All is said.<|end|>And more", "unparsable", "the control token <|end|>"),
        (GOOD.replace("hall", "hall<|end|>"), "unparsable", "the control token <|end|>"),
        (GOOD.replace("hall", "\\ud83d"), "unparsable", "half a character (\\ud83d) in a call"),
        (GOOD.replace("light", "\\udfff"), "unparsable", "half a character (\\udfff) in a call"),
        (GOOD.replace("light", "lights"), "unknown_tool", 'did you mean "light"?'),
        (GOOD.replace(', "on": false', ""), "schema", "light.on: is required and missing"),
        (GOOD.replace("false", '"no"'), "schema", "must be boolean"),
        (f'{GOOD}<tool_call>{{"name": "joke", "arguments": {{"of": "x"}}}}</tool_call>', "schema", "joke.of: is not a parameter"),
    ],
)
def test_an_answer_that_is_no_valid_turn_is_refused_by_its_kind_and_reason(text, kind, words):
    fault = read_answer(text, TOOLS, ended=True, control_tokens=["<|end|>"])
    assert isinstance(fault, Fault)
    assert fault.kind == kind
    assert words in fault.reason


@pytest.mark.parametrize("text", [GOOD, "It is dark.", ""])
def test_an_answer_that_was_cut_off_is_none_however_it_looks(text):
    assert read_answer(text, TOOLS, ended=False).kind == "cut_off"


def test_a_call_where_no_tools_are_offered_is_one_of_an_unknown_tool():
    assert read_answer(GOOD, [], ended=True) == Fault("unknown_tool", 'light: "light" is called, but no tools are offered')


def test_a_turn_that_is_written_in_any_notation_again_makes_the_same_calls():
    message = read_answer(GOOD + GOOD.replace("hall", "b\\u00fcro"), TOOLS, ended=True)
    written = "".join(f"<tool_call>{json.dumps(call['function'])}</tool_call>" for call in message["tool_calls"])
    assert parse_calls(written).calls == parse_calls(GOOD + GOOD.replace("hall", "b\u00fcro")).calls
