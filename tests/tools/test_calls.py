import json
import random
import time

import pytest

from harness.tools import ToolCall, normalise_tool, parse_calls, score

F = ToolCall("f", {"a": 1})
G = ToolCall("g", {"b": "x"})
F_JSON = '{"name": "f", "arguments": {"a": 1}}'
G_JSON = '{"name": "g", "arguments": {"b": "x"}}'


@pytest.mark.parametrize(
    ("text", "calls", "besides"),
    [
        (f"<tool_call>\n{F_JSON}\n</tool_call>", [F], ""),
        (f"I look.\n<tool_call>{F_JSON}</tool_call>\n<tool_call>{G_JSON}</tool_call><|im_end|>", [F, G], "I look."),
        (f"<tool_call>{F_JSON}", [F], ""),  # the closing tag is often the stop token
        (f"<tool_call>[{F_JSON}, {G_JSON}]</tool_call>", [F, G], ""),
        (F_JSON, [F], ""),
        (f"[{F_JSON}, {G_JSON}]", [F, G], ""),
        (f"{F_JSON}\n{G_JSON}", [F, G], ""),
        (f"```json\n{F_JSON}\n```", [F], ""),
        (f"```[{F_JSON}]```", [F], ""),
        (f"{F_JSON} That was it.", [F], "That was it."),
        ('{"type": "function", "name": "f", "parameters": {"a": 1}}', [F], ""),
        ('{"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{\\"a\\": 1}"}}', [F], ""),
        ('{"name": "f", "arguments": "{\\"a\\": 1}"}', [F], ""),
        (f'<|python_tag|>{{"name": "f", "parameters": {{"a": 1}}}}; {G_JSON}<|eom_id|>', [F, G], ""),
        (f"[TOOL_CALLS][{F_JSON}, {G_JSON}]</s>", [F, G], ""),
        (f"[TOOL_CALLS] {F_JSON} [TOOL_CALLS] {G_JSON}", [F, G], ""),
        ('[f(a=1), g(b="x")]', [F, G], ""),
        ("f(a=1)", [F], ""),
        ('f(a=1), g(b="x")', [F, G], ""),
        ("[ns.f(a=-1.5, b=[1, (2, 3)], c={'d': None})]", [ToolCall("ns.f", {"a": -1.5, "b": [1, [2, 3]], "c": {"d": None}})], ""),
        (f"<think>Perhaps {G_JSON} or <tool_call>{G_JSON}</tool_call>?</think>\n<tool_call>{F_JSON}</tool_call>", [F], ""),
        (f"so I call f.</think>{F_JSON}", [F], ""),  # the opening tag stood in the prompt
        ('{"name": "f", "arguments": {"a": "</think>"}}', [ToolCall("f", {"a": "</think>"})], ""),
    ],
)
def test_calls_are_read_in_every_notation(text, calls, besides):
    parsed = parse_calls(text)
    assert (parsed.calls, parsed.malformed, parsed.text) == (calls, [], besides)


@pytest.mark.parametrize(
    "text",
    ["", "Lovely.", "[]", '{"celsius": 20}', '{"name": "Ada", "age": 36}', "[1, 2]", "{not json}", "[see (a) and (b)]", "Well (yes)."],
)
def test_an_answer_is_no_attempt(text):
    parsed = parse_calls(text)
    assert not parsed.attempted
    assert parsed.text == text


@pytest.mark.parametrize(
    "text",
    [
        '<tool_call>{"name": "f", "arguments": {"a": 1}</tool_call>',
        "<tool_call></tool_call>",
        "<tool_call>f</tool_call>",
        f"<tool_call>{F_JSON} and more</tool_call>",
        '<tool_call>{"name": "f"}</tool_call>',
        '<tool_call>{"name": "f", "arguments": [1]}</tool_call>',
        '<tool_call>{"name": "f", "arguments": "a=1"}</tool_call>',
        '<tool_call>{"name": 3, "arguments": {}}</tool_call>',
        f"{F_JSON}</tool_call>",
        '{"name": "f", "argum',
        '{"name": "f", "arguments": {"a": NaN}}',
        '{"name": "f", "arguments": {"a": 1e999}}',
        '{"name": "f", "arguments": {"a": ' + "[" * 200 + "]" * 200 + "}}",
        f"Sure, here it is: {F_JSON}",
        "<|python_tag|>",
        "<|python_tag|>print(1)",
        "[TOOL_CALLS]",
        "[TOOL_CALLS]f",
        "[f(1)]",
        "[f(a=1, a=1)]",
        "[f(a=b)]",
        "[f(a=true)]",
        "[f(**{'a': 1})]",
        "[f(a={1, 2})]",
        "[f(a=b'x')]",
        "[f(a=1), 2]",
        "[f(a=1)",
        "<function=f>{}</function>",
        "<TOOLCALL>[]</TOOLCALL>",
    ],
)
def test_a_broken_call_is_malformed_and_not_an_abstention(text):
    parsed = parse_calls(text)
    assert parsed.malformed


def test_a_good_call_beside_a_broken_one_gives_both():
    parsed = parse_calls(f'{F_JSON} {{"name": "g", "argu')
    assert (parsed.calls, len(parsed.malformed)) == ([F], 1)
    parsed = parse_calls(f"<tool_call>{F_JSON}</tool_call><tool_call>oops</tool_call>")
    assert (parsed.calls, parsed.malformed) == ([F], ["oops"])


def test_what_is_printed_in_a_notation_reads_back():
    generator = random.Random(0)

    def value(depth=0):
        kind = generator.randrange(8 if depth < 3 else 6)
        if kind == 6:
            return [value(depth + 1) for _ in range(generator.randrange(3))]
        if kind == 7:
            return {generator.choice('abc"é {'): value(depth + 1) for _ in range(generator.randrange(3))}
        return [None, True, generator.randrange(-99, 99), generator.random(), "a'\"\\\n</tool", ""][kind]

    for _ in range(200):
        calls = [ToolCall(generator.choice(["f", "ns.g", "h_2"]), {key: value() for key in "abc"[: generator.randrange(4)]}) for _ in "12"]
        objects = [{"name": call.name, "arguments": call.arguments} for call in calls]
        pythonic = ", ".join(f"{c.name}({', '.join(f'{k}={v!r}' for k, v in c.arguments.items())})" for c in calls)
        assert parse_calls("".join(f"<tool_call>{json.dumps(o)}</tool_call>" for o in objects)).calls == calls
        for text in (json.dumps(objects), "[TOOL_CALLS]" + json.dumps(objects), f"[{pythonic}]"):
            assert parse_calls(text).calls == calls


PIECES = [
    "<tool_call>", "</tool_call>", "<|python_tag|>", "[TOOL_CALLS]", "<think>", "</think>", "<|im_end|>", "```", "json", "{", "}", "[", "]",
    "(", ")", '"', "'", ":", ",", "=", '"name"', '"arguments"', "f", "a", "1", "-", "1e999", "NaN", "null", "\\", "\n", " ", "\x00",
    "\ud800", F_JSON, F_JSON[:-3], F_JSON.replace("1", "9" * 400), "**", "lambda", "9" * 5000,
    "[" * 300, "(" * 300, "{" * 300, '{"a":' * 2000,
]  # fmt: skip
TOOLS = [normalise_tool({"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "number", "multipleOf": 0.1}}}})]


def test_no_text_makes_the_parser_or_the_scorer_raise():
    generator = random.Random(1)
    for _ in range(3000):
        text = "".join(generator.choices(PIECES, k=generator.randrange(1, 15)))
        parsed = parse_calls(text)
        assert all(isinstance(call.name, str) and isinstance(call.arguments, dict) for call in parsed.calls)
        assert score(text, [F], TOOLS).failure == "malformed" or not parsed.malformed


@pytest.mark.parametrize("depth", [10, 60, 62, 63, 300, 900, 980, 5000])
def test_a_call_is_read_up_to_a_depth_and_beyond_it_is_malformed(depth):
    nested = "[" * depth + "]" * depth
    json_call, pythonic = f'{{"name": "f", "arguments": {{"a": {nested}}}}}', f"[f(a={nested})]"
    for text in (json_call, f"<tool_call>{json_call}</tool_call>", pythonic):
        parsed = parse_calls(text)
        assert (len(parsed.calls), len(parsed.malformed)) == ((1, 0) if depth <= 63 else (0, 1))


def test_long_hostile_text_is_read_in_no_time():
    started = time.monotonic()
    for piece in (" ", "{", "<tool_call>", F_JSON, "<|", '{"name":"', "f(", "</think>", "```", "<|im_end|>", "[f(a=", '{"name":"f", '):
        parse_calls(piece * (200_000 // len(piece)) + "x")
        parse_calls("x" + piece * (200_000 // len(piece)))
    assert time.monotonic() - started < 20  # what is quadratic takes minutes here
