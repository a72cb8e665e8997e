"""Every layout but those of test_formats.py: what a row of it becomes, what is lost by that, and what is refused."""

import json

import pytest
from conftest import SHARED, needs_shared

from harness.data.formats import LeftOut, Reading, Settings, broken_calls, detect_format, to_canonical, trained_calls
from harness.data.reading import read_raw
from harness.data.sources import load_rows
from harness.errors import DataError
from harness.recipe.schema import Source
from harness.tools import ToolCall

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}, "required": ["city"]}
BARE = {"name": "get_weather", "description": "d", "parameters": SCHEMA}
TOOL = {"type": "function", "function": BARE}
USER = {"role": "user", "content": "Weather in Paris?"}
SAYS = {"role": "assistant", "content": "It is 18 C."}
RESULT = {"role": "tool", "content": '{"t": 18}'}
FRAME = "the part of the system prompt that tells a model how to write calls"


def calling(*cities, **beside):
    calls = [{"type": "function", "function": {"name": "get_weather", "arguments": {"city": city}}} for city in cities]
    return {"role": "assistant", "tool_calls": calls, **beside}


def read(row, layout="auto", **settings):
    """(canonical row, what was lost)."""
    reading = Reading(Settings(**settings), lost=[])
    return to_canonical(row, layout, reading=reading), sorted(set(reading.lost))


# ---- ShareGPT and what is written in its turns


def turns(*said, **more):
    return {"conversations": [{"from": who, "value": text} for who, text in said], **more}


CALL_TEXT = '{"name": "get_weather", "arguments": {"city": "Paris"}}'
CALL_ROME = CALL_TEXT.replace("Paris", "Rome")


def test_sharegpt_turns_become_messages_and_a_call_joins_the_words_before_it():
    raw = turns(
        ("system", "Be brief."),
        ("human", USER["content"]),
        ("gpt", "Let me see."),
        ("function_call", CALL_TEXT),
        ("observation", RESULT["content"]),
        ("gpt", SAYS["content"]),
        tools=json.dumps([BARE]),
        id=7,
    )
    row, lost = read(raw)
    assert detect_format(raw) == "sharegpt"
    system = {"role": "system", "content": "Be brief."}
    assert row == {"messages": [system, USER, calling("Paris", content="Let me see."), RESULT, SAYS], "tools": [TOOL]}
    assert lost == ["`id` of the row"]


def test_parallel_calls_of_sharegpt_are_one_turn_with_as_many_results():
    calls = json.dumps([json.loads(CALL_TEXT), {"name": "get_weather", "arguments": {"city": "Rome"}}])
    row, _ = read(turns(("human", "?"), ("function_call", calls), ("observation", "1"), ("observation", "2"), ("gpt", "x"), tools=[BARE]))
    assert row["messages"][1] == calling("Paris", "Rome")
    assert [message["content"] for message in row["messages"][2:4]] == ["1", "2"]


HERMES = turns(
    ("system", f"Be kind. You are a function calling AI model. <tools>{json.dumps([TOOL])}</tools> For each call return <tool_call>…"),
    ("human", USER["content"]),
    (
        "gpt",
        f"<think>I'll ask.</think>\n<tool_call>\n{CALL_TEXT}\n</tool_call>\n<tool_call>\n{CALL_ROME}\n</tool_call>",
    ),
    ("tool", "<tool_response>\n1\n</tool_response>\n<tool_response>\n2\n</tool_response>"),
    ("gpt", SAYS["content"]),
)


def test_hermes_calls_thoughts_results_and_tools_come_out_of_the_words():
    row, lost = read(HERMES)
    assert detect_format(HERMES) == "hermes"
    results = [{"role": "tool", "content": "1"}, {"role": "tool", "content": "2"}]
    system = {"role": "system", "content": "Be kind."}
    assert row == {
        "messages": [system, USER, calling("Paris", "Rome", reasoning_content="I'll ask."), *results, SAYS],
        "tools": [TOOL],
    }
    assert lost == [FRAME]


def test_hermes_first_sets_write_calls_as_python_dicts():
    python = "<tool_call>\n{'arguments': {'city': \"L'Aquila\"}, 'name': 'get_weather'}\n</tool_call>"
    assert read(turns(("human", "?"), ("gpt", python), tools=[BARE]))[0]["messages"][1] == calling("L'Aquila")


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ('<tool_call>{"name": "get_weather", "arguments": {"city": "Pa', r"conversations\[1\]: a call that cannot be read"),
        ("get_weather</tool_call>", "a call in a notation that is not read here"),
        ("<function=get_weather>{}</function>", "a call in a notation that is not read here"),
        ("<think>hm</think>", "the assistant says nothing"),
        ("", "the assistant says nothing"),
        ('<tool_call>{"name": "get_wether", "arguments": {}}</tool_call>', 'did you mean "get_weather"'),
    ],
)
def test_a_turn_that_tries_to_call_and_cannot_be_read_is_refused(said, message):
    with pytest.raises(DataError, match=message):
        read(turns(("human", "?"), ("gpt", said), tools=[BARE]))


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (turns(("human", "?"), ("gtp", "x")), r'conversations\[1\]: from is "gtp"; did you mean "gpt"'),
        (turns(("human", "?"), ("gpt", None)), "value is missing"),
        ({"conversations": [{"from": "human", "value": "?", "loss": False}]}, 'has a key "loss"'),
        ({"conversations": "x"}, "not JSON"),
        (turns(("human", "?")), "the last message is the user's"),
        (turns(("human", "?"), ("observation", "x"), ("gpt", "y")), "a tool result without a call"),
    ],
)
def test_what_is_wrong_in_a_turn_is_named(raw, message):
    with pytest.raises(DataError, match=message):
        read(raw)


TOOLACE_SYSTEM = (
    "You are an expert in composing functions. You are given a question. Here is a list of functions in JSON format that you can invoke:\n"
    + json.dumps(
        [{**BARE, "required": None}, {"name": "User Feed (V2)", "parameters": {"type": "dict", "properties": {"q": {"type": "str"}}}}]
    )
    + "\nShould you decide to return the function call(s), put it in the format of [func1(a=1)]"
)


def test_toolace_calls_are_read_by_the_tools_names_which_may_hold_blanks_and_brackets():
    raw = turns(
        ("user", "?"),
        ("assistant", "[get_weather(city=\"a), (b\", days=-2), User Feed (V2)(q='it\\'s [1]')]"),
        ("tool", '[{"name": "get_weather", "results": 1}, {"name": "User Feed (V2)", "results": {"n": 2}}]'),
        ("assistant", "[done] it is."),
        system=TOOLACE_SYSTEM,
    )
    row, lost = read(raw)
    assert detect_format(raw) == "toolace"
    assert trained_calls(row) == [ToolCall("get_weather", {"city": "a), (b", "days": -2}), ToolCall("User Feed (V2)", {"q": "it's [1]"})]
    assert [json.loads(message["content"])["name"] for message in row["messages"][2:4]] == ["get_weather", "User Feed (V2)"]
    assert row["messages"][0] == {"role": "user", "content": "?"} and row["messages"][-1]["content"] == "[done] it is."
    assert lost == [FRAME] and not broken_calls(row)


def test_toolace_takes_json_constants_and_refuses_a_call_of_no_tool():
    said = lambda text: read(turns(("user", "?"), ("assistant", text), system=TOOLACE_SYSTEM))[0]  # noqa: E731
    assert trained_calls(said("[get_weather(city=null, days=[true, {'a': false}])]")) == [
        ToolCall("get_weather", {"city": None, "days": [True, {"a": False}]})
    ]
    with pytest.raises(DataError, match="a call of no tool of the row"):
        said("[get_wether(city='Paris')]")
    with pytest.raises(DataError, match="arguments that cannot be read"):
        said("[get_weather('Paris')]")


# ---- Glaive

GLAIVE_SYSTEM = f"SYSTEM: You are a helpful assistant with access to the following functions. Use them if required -\n{json.dumps(BARE)}\n"


def test_glaive_text_becomes_messages_with_its_quoted_arguments():
    chat = (
        'USER: Weather in L\'Aquila?\n\n\nASSISTANT: <functioncall> {"name": "get_weather", "arguments": \'{"city": "L\'Aquila"}\'} '
        '<|endoftext|>\n\n\nFUNCTION RESPONSE: {"t": 18}\n\n\nASSISTANT: It is 18 C. <|endoftext|>'
    )
    row, lost = read({"system": GLAIVE_SYSTEM, "chat": chat})
    system = {"role": "system", "content": "You are a helpful assistant."}
    assert row == {
        "messages": [system, {"role": "user", "content": "Weather in L'Aquila?"}, calling("L'Aquila"), RESULT, SAYS],
        "tools": [TOOL],
    }
    assert lost == [FRAME]


def test_glaive_without_functions_is_a_plain_conversation():
    row, lost = read({"system": "SYSTEM: You are kind.", "chat": "USER: hi ASSISTANT: hello <|endoftext|>"})
    assert [message["content"] for message in row["messages"]] == ["You are kind.", "hi", "hello"] and "tools" not in row and not lost


@pytest.mark.parametrize(
    ("chat", "message"),
    [
        ("hello", 'chat starts with "hello"'),
        ('USER: a ASSISTANT: <functioncall> {"name": "get_weather", "arguments": \'{\'} <|endoftext|>', "call that cannot be read"),
        ("USER: a ASSISTANT: <|endoftext|>", "turn 1 of chat: the assistant says nothing"),
    ],
)
def test_glaive_text_that_cannot_be_read_is_refused(chat, message):
    with pytest.raises(DataError, match=message):
        read({"system": GLAIVE_SYSTEM, "chat": chat})


# ---- messages: LLaMA-Factory's parts, OpenAI's weights, our train_from


def test_parts_that_think_and_call_become_reasoning_and_calls():
    parts = [{"type": "reasoning", "value": "Ask."}, {"type": "text", "value": "So:"}, {"type": "tool_call", "value": CALL_TEXT}]
    row, _ = read({"messages": [USER, {"role": "assistant", "content": parts}], "tools": [BARE]})
    assert row["messages"][1] == calling("Paris", content="So:", reasoning_content="Ask.")


def test_weights_and_train_from_say_which_turns_are_trained():
    two = [USER, SAYS, USER, SAYS]
    weighted = [USER, {**SAYS, "weight": 0}, USER, {**SAYS, "weight": 1}]
    assert read({"messages": weighted})[0] == read({"messages": two, "train_from": 3})[0] == {"messages": two, "train_from": 3}
    for wrong in ([USER, {**SAYS, "weight": 1}, USER, {**SAYS, "weight": 0}], [USER, {**SAYS, "weight": 0.5}]):
        with pytest.raises(DataError, match='has a key "weight"'):
            read({"messages": wrong})
    with pytest.raises(DataError, match="train_from is 4"):
        read({"messages": two, "train_from": 4})


def test_openais_older_name_for_tools_is_not_passed_over():
    assert read({"messages": [USER, SAYS], "functions": [BARE]})[0]["tools"] == [TOOL]


# ---- labels


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [USER], "completion": [SAYS]},
        {"messages": [USER, SAYS]},
        {"conversations": [USER, SAYS]},
        {"prompt": "a", "completion": "b"},
    ],
)
def test_only_what_is_labelled_good_is_trained(row):
    assert detect_format({**row, "label": True}) == "kto"
    good = to_canonical({**row, "label": True})
    assert good == to_canonical(row) or "conversations" in row
    with pytest.raises(LeftOut, match="labelled false"):
        to_canonical({**row, "label": False})
    with pytest.raises(DataError, match="not of the layout kto"):
        to_canonical({**row, "label": "positive"}, "kto")


def test_a_label_that_is_no_boolean_is_about_something_else():
    assert detect_format({"messages": [USER, SAYS], "label": "positive"}) == "messages"


def test_bad_rows_are_listed_and_stop_nothing(tmp_path):
    path = tmp_path / "kto.jsonl"
    path.write_text("".join(json.dumps({"messages": [USER, SAYS], "label": label}) + "\n" for label in (False, True, False)))
    loaded = load_rows(Source(path=str(path), format="kto"))
    assert len(loaded.rows) == 1 and [row.reason[:17] for row in loaded.skipped] == ["is labelled false"] * 2
    path.write_text(json.dumps({"messages": [USER, SAYS], "label": False}) + "\n")
    with pytest.raises(DataError, match="no row is left of 1"):
        load_rows(Source(path=str(path), format="kto"))
    with pytest.raises(DataError, match="label is false: a bad answer.*`format: kto`"):
        load_rows(Source(path=str(path)))  # nobody said that it is fine-tuning with half of a preference set


# ---- benchmarks

BFCL = {
    "id": "x_0",
    "question": [[USER]],
    "function": [
        {
            "name": "f",
            "parameters": {"type": "dict", "properties": {"a": {"type": "float"}, "o": {"type": "dict"}, "u": {}}, "required": ["a"]},
        }
    ],
}


def test_bfcl_gold_is_taken_from_the_file_beside_and_its_first_values_are_trained(tmp_path):
    gold = [{"f": {"a": ["", 5, 6], "o": [{"w": [1, 2], "n": ["", "x"]}], "u": ["units", ""]}}]
    (tmp_path / "possible_answer").mkdir()
    (tmp_path / "q.json").write_text(json.dumps(BFCL) + "\n")
    (tmp_path / "possible_answer" / "q.json").write_text(json.dumps({"id": "x_0", "ground_truth": gold}) + "\n")
    ((_, raw),) = read_raw(tmp_path / "q.json")
    row, lost = read(raw)
    assert trained_calls(row) == [ToolCall("f", {"a": 5, "o": {"w": 1}})]
    assert lost == ["an argument that may be left out", "other values of an argument that would be right too"]


def test_bfcl_rows_without_gold_are_questions_only():
    with pytest.raises(DataError, match="no gold calls"):
        to_canonical(BFCL)
    assert to_canonical(BFCL, asks=True)["messages"] == [USER]
    with pytest.raises(DataError, match="multi-turn"):
        to_canonical({**BFCL, "question": [[USER], [USER]], "ground_truth": []})


def test_when2call_trains_the_answer_that_is_right():
    answers = {"direct": "d", "tool_call": CALL_TEXT, "request_for_info": "Which city?", "cannot_answer": "no"}
    raw = {"question": "Weather?", "tools": [json.dumps(BARE)], "answers": answers, "correct_answer": "request_for_info"}
    row, lost = read(raw)
    assert row["messages"][1] == {"role": "assistant", "content": "Which city?"} and row["tools"] == [TOOL]
    assert lost == ["answers that are wrong (they make preference pairs)"]
    assert read({**raw, "correct_answer": "tool_call"})[0]["messages"][1] == calling("Paris")
    with pytest.raises(DataError, match="correct_answer is 'maybe'"):
        read({**raw, "correct_answer": "maybe"})


# ---- Seal-Tools, Hammer


def seal_file(folder, *calling):
    tools = [{"api_name": f"t{n}", "api_description": "d", "parameters": {"q": {"type": "str"}}, "required": ["q"]} for n in range(9)]
    (folder / "tool.jsonl").write_text("".join(json.dumps(tool) + "\n" for tool in tools))
    (folder / "dev.jsonl").write_text(json.dumps({"id": 1, "query": "do it", "calling": list(calling)}) + "\n")
    return next(iter(read_raw(folder / "dev.jsonl")))[1]


def test_seal_tools_rows_offer_their_tools_among_others(tmp_path):
    raw = seal_file(tmp_path, {"api": "t3", "parameters": {"q": "x"}, "responses": ["API_call_0"]})
    row, lost = read(raw)
    names = [tool["function"]["name"] for tool in row["tools"]]
    assert len(set(names)) == 5 and "t3" in names and trained_calls(row) == [ToolCall("t3", {"q": "x"})]
    assert read(raw)[0] == row and {len(read(raw, distractors=n)[0]["tools"]) - n for n in (0, 2, 8)} == {1}
    assert {tuple(tool["function"]["name"] for tool in read(raw, seed=seed)[0]["tools"]) for seed in range(5)} != {tuple(names)}
    assert any("responses" in what for what in lost)


def test_a_seal_tools_row_whose_argument_is_an_earlier_result_is_left_out(tmp_path):
    with pytest.raises(LeftOut, match="API_call_N"):
        to_canonical(seal_file(tmp_path, {"api": "t3", "parameters": {"q": "API_call_0"}}))
    with pytest.raises(DataError, match="tool.jsonl of Seal-Tools must stand beside"):
        to_canonical({"id": 1, "query": "do it", "calling": [{"api": "t3", "parameters": {}}]})


def test_hammers_instruction_is_taken_apart():
    sections = {"TASK INSTRUCTION": "x", "AVAILABLE TOOLS": json.dumps([BARE]), "QUERY": USER["content"]}
    text = "\n".join(f"[BEGIN OF {name}]\n{words}\n[END OF {name}]" for name, words in sections.items())
    raw = {"instruction": text, "input": "", "output": f"```\n[{CALL_TEXT}]\n```"}
    assert read(raw)[0] == {"messages": [USER, calling("Paris")], "tools": [TOOL]}
    with pytest.raises(DataError, match="no call is right"):
        read({**raw, "output": "```\n[]\n```"})


# ---- rollouts, APIs, questions


def rollout(reward):
    output = [
        {"type": "reasoning", "summary": [{"text": " Ask.\n"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "\n\n"}]},
        {"type": "function_call", "call_id": "c1", "name": "get_weather", "arguments": '{"city": "Paris"}'},
        {"type": "function_call", "call_id": "c2", "name": "get_weather", "arguments": '{"city": "Rome"}'},
        {"type": "function_call_output", "call_id": "c1", "output": "1"},
        {"type": "function_call_output", "call_id": "c2", "output": "2"},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "It is 18 C."}]},
    ]
    request = {"input": [USER], "tools": [{"type": "function", **BARE, "strict": False}]}
    return {"responses_create_params": request, "response": {"output": output}, "reward": reward}


def test_a_rollout_of_full_reward_is_trained_and_others_are_left_out():
    row, _ = read(rollout(1.0))
    made = calling("Paris", "Rome", reasoning_content="Ask.")
    made["tool_calls"] = [{"id": identity, **call} for identity, call in zip(("c1", "c2"), made["tool_calls"], strict=True)]
    results = [{"role": "tool", "content": text, "tool_call_id": identity} for text, identity in (("1", "c1"), ("2", "c2"))]
    assert row == {"messages": [USER, made, *results, SAYS], "tools": [TOOL], "train_from": 1}
    with pytest.raises(LeftOut, match="reward 0.5"):
        read(rollout(0.5))


def test_an_api_of_a_database_is_a_text():
    api = {"domain": "Vision", "framework": "PyTorch", "api_name": "é", "api_call": "load('x')", "performance": {"a": 1}}
    row, lost = read(api)
    assert json.loads(row["text"]) == api and not lost


@pytest.mark.parametrize(
    "raw",
    [
        {"prompt": "Write.", "instruction_id_list": []},
        {"question_id": 1, "text": "Write."},
        {"responses_create_params": {"input": "Write."}},
    ],
)
def test_a_question_without_answer_is_no_training_row(raw):
    with pytest.raises(DataError, match="the row asks and holds no answer"):
        to_canonical(raw)
    assert to_canonical(raw, asks=True)["messages"] == [{"role": "user", "content": "Write."}]


# ---- retrieval


def retrieval_row(n, **more):
    distractors = [f"other {n} {i}" for i in range(4)]
    return {"question": f"Who {n}?", "gold": {"title": "T", "text": f"It was {n}."}, "distractors": distractors, "answer": f"{n}.", **more}


def test_passages_stand_before_the_question_in_an_order_of_their_own():
    row, lost = read(retrieval_row(1))
    asked, answered = row["messages"]
    assert answered == {"role": "assistant", "content": "1."} and asked["content"].endswith("\n\nWho 1?")
    assert all(text in asked["content"] for text in ("T\nIt was 1.", "other 1 0", "other 1 3", "[5]")) and not lost
    first = {read(retrieval_row(n))[0]["messages"][0]["content"].index("It was") < 12 for n in range(20)}
    assert first == {True, False}  # the gold passage is not always at one place
    passages = [{"text": "It was 1.", "title": "T", "gold": True}, *({"text": f"other 1 {i}", "gold": False} for i in range(4))]
    assert read({"question": "Who 1?", "passages": passages, "answer": "1."})[0] == row


def test_a_share_of_the_rows_has_no_gold_passage():
    rows = [read(retrieval_row(n, answer_without_gold="I do not know."), without_gold=0.3, distractors=2)[0] for n in range(400)]
    without = [row for row in rows if "It was" not in row["messages"][0]["content"]]
    assert 0.22 < len(without) / 400 < 0.38  # 4 standard deviations of 400 draws
    assert all((row["messages"][1]["content"] == "I do not know.") == (row in without) for row in rows)
    assert {row["messages"][0]["content"].count("other") for row in rows} == {2}
    assert read(retrieval_row(1), without_gold=1.0)[0]["messages"][1]["content"] == "1."  # RAFT: the answer stays
    with pytest.raises(DataError, match="drawn to lose its gold passage"):
        read({**retrieval_row(1), "distractors": []}, without_gold=1.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gold": []}, "no passage is gold"),
        ({"gold": [""]}, r"gold\[0\] is empty"),
        ({"answer": " "}, "answer is text"),
        ({"distractors": "x"}, "a list"),
    ],
)
def test_a_retrieval_row_without_its_parts_is_refused(change, message):
    with pytest.raises(DataError, match=message):
        read({**retrieval_row(1), **change})


# ---- real files


@needs_shared
@pytest.mark.parametrize(
    ("path", "layout", "read", "kept", "calls"),
    [
        ("glaive/glaive_toolcall_en_demo.json", "sharegpt", 300, 300, 211),
        ("glaive/reason_tool_use_demo_50.jsonl", "messages", 50, 50, 68),
        ("formats/glaive_sample.jsonl", "glaive", 3, 3, 3),
        ("formats/hermes_v1_sample.jsonl", "hermes", 2, 2, 3),
        ("formats/hermes_reasoning_sample.jsonl", "hermes", 1, 1, 1),
        ("formats/toolace_sample.jsonl", "toolace", 3, 3, 2),
        ("sealtools/dev.jsonl", "sealtools", 700, 672, 1718),
        ("bfcl/BFCL_v4_parallel_multiple.json", "bfcl", 200, 200, 607),
        ("when2call/when2call_test_llm_judge.jsonl", "when2call", 300, 300, 100),
        ("toolpref/ask_first_v1.0.jsonl", "kto", 100, 50, 0),
        ("toolpref/strategic_tool_selection_v1.5.jsonl", "kto", 534, 123, 0),
        ("xlam/masking_sft_data_example.json", "hammer", 10, 8, 14),
        ("xlam/example_rollouts.jsonl", "rollouts", 5, 3, 4),
        ("structured_outputs/example_rollouts.jsonl", "rollouts", 5, 1, 0),
        ("apibench/api/torchhub_api.jsonl", "apibench_api", 94, 94, 0),
    ],
)
def test_real_files_are_told_apart_and_no_row_vanishes(path, layout, read, kept, calls):
    """211 and 100 calls are research/tool-calling.md's numbers; 94 APIs and the rows of each file are PROVENANCE.md's."""
    loaded = load_rows(Source(path=str(SHARED / path), format="kto" if layout == "kto" else "auto"), on_error="skip")
    assert [loaded.counts[key] for key in ("read", f"layout/{layout}", "trained_calls")] == [read, kept, calls]
    assert len(loaded.rows) + len(loaded.skipped) == read
