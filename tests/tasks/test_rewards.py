"""What answers are paid: each reward by hand, functions of the user's own, and what is refused before a GPU is taken."""

import json
import sys
from pathlib import Path

import pytest

from harness.data import prepare_recipe
from harness.data.questions import question_and_gold
from harness.errors import DataError, ModelError, RecipeError
from harness.model import load_tokenizer
from harness.plugins import check_plugin, load_plugin
from harness.recipe import load
from harness.recipe.schema import RewardPart
from harness.tasks.rewards import Answer, build_rewards, check_rows, notes_on_calls, pay_for_calls, pay_for_length
from harness.tools import ToolCall

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}, "required": ["city"]},
    },
}
TRAIN = {"type": "function", "function": {"name": "find_train", "parameters": {"type": "object", "properties": {"to": {"type": "string"}}}}}
TOOLS = [WEATHER, TRAIN]
PARIS = [ToolCall("get_weather", {"city": "Paris"})]
PART = RewardPart(type="tool_calls")


def call(name: str, **arguments) -> str:
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


def answer(*said, row=None, own_tokens=3, ids=(7, 8, 9)) -> Answer:
    messages = [message if isinstance(message, dict) else {"role": "assistant", "content": message} for message in said]
    return Answer([{"role": "user", "content": "q"}], messages, [1, 2], list(ids), own_tokens, row or {})


@pytest.fixture
def rewards(tmp_path, monkeypatch):
    """rewards("[{type: …}]", ...) -> those that a recipe builds, in a directory of its own."""
    monkeypatch.chdir(tmp_path)
    # A module of another test.
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    (tmp_path / "recipe.yaml").write_text(
        "task: rlhf\nmodel: {name_or_path: some/model}\ndata: {train: rows.jsonl}\nrlhf: {max_completion_length: 40}\n"
    )

    def build(parts, model=None):
        return build_rewards(load("recipe.yaml", [f"rlhf.rewards={parts}"]), model)

    return build


# ---- tool calls


@pytest.mark.parametrize(
    ("said", "gold", "paid"),
    [
        (call("get_weather", city="Paris"), PARIS, 1.0),
        (f"Let me look. {call('get_weather', city='Paris')}", PARIS, 1.0),
        (call("get_weather", city="Rome"), PARIS, 0.3),
        (call("get_weather", city="Paris", days=2), PARIS, 0.3),
        (call("find_train", to="Paris"), PARIS, 0.1),
        (call("get_weather", city="Paris") + call("get_weather", city="Rome"), PARIS, 0.1),
        (call("get_weather", city=3), PARIS, 0.0),
        (call("get_wether", city="Paris"), PARIS, 0.0),
        ("It is warm in Paris.", PARIS, 0.0),
        ('<tool_call>{"name": "get_weather", "arguments": {"city": </tool_call>', PARIS, -0.5),
        (call("get_weather", city="Paris") + '<tool_call>{"name": "get', PARIS, -0.5),
        ("", PARIS, -0.5),
        ("  \n", PARIS, -0.5),
        ("None of the tools can do that.", [], 1.0),
        (call("get_weather", city="Paris"), [], 0.0),
        ("", [], -0.5),
        ('<tool_call>{"name"', [], -0.5),
    ],
)
def test_an_answer_is_paid_by_what_the_scorer_finds_in_it(said, gold, paid):
    assert pay_for_calls(PART, said, gold, TOOLS) == paid


def test_the_recipe_says_how_much(rewards):
    (own,) = rewards("[{type: tool_calls, exact: 5, abstention: 4, right_tool: 3, valid_schema: 2, malformed: -1}]")
    row = {"tools": TOOLS, "tool_calls": [{"name": "get_weather", "arguments": {"city": "Paris"}}]}
    said = [call("get_weather", city="Paris"), call("get_weather", city="Rome"), call("find_train"), "", "words"]
    assert own.pay([answer(each, row=row) for each in said]) == [5, 3, 2, -1, 0]
    assert own.pay([answer("words", row={**row, "tool_calls": []}), answer("words", row={"tools": TOOLS})]) == [4, None]


def test_of_several_turns_the_calls_count_together_and_what_tools_return_does_not():
    turns = [
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "get_weather", "arguments": {"city": "Paris"}}}]},
        {"role": "tool", "name": "get_weather", "content": call("find_train", to="Rome")},
        {"role": "assistant", "content": "It is 20 degrees."},
    ]
    row = {"tools": TOOLS, "tool_calls": [{"name": "get_weather", "arguments": {"city": "Paris"}}], "answer": "It is 20 degrees."}
    several = answer(*turns, row=row)
    assert pay_for_calls(PART, several.text, several.gold, several.tools) == 1.0
    assert several.last_words == "It is 20 degrees."
    assert notes_on_calls(several) == {"tools/exact_match": 1, "tools/valid_schema": 1, "tools/malformed": 0, "tools/silent": 0}


def test_a_call_counts_though_a_later_turn_begins_with_reasoning():
    calls = [{"function": {"name": "get_weather", "arguments": {"city": "Paris"}}}]
    called = {"role": "assistant", "content": "Let me look.", "tool_calls": calls}
    result = {"role": "tool", "name": "get_weather", "content": "20"}
    row = {"tools": TOOLS, "tool_calls": [{"name": "get_weather", "arguments": {"city": "Paris"}}]}
    several = answer(called, result, "<think>\nIt is 20.\n</think>\n\nIt is 20 degrees.", row=row)
    assert pay_for_calls(PART, several.text, several.gold, several.tools) == 1.0
    assert pay_for_calls(PART, several.text, [], several.tools) == 0.0


def test_silence_is_seen_in_the_logs():
    row = {"tools": TOOLS, "tool_calls": []}
    assert notes_on_calls(answer("", row=row)) == {"tools/right_abstention": 0, "tools/malformed": 0, "tools/silent": 1}
    assert notes_on_calls(answer("no", row=row)) == {"tools/right_abstention": 1, "tools/malformed": 0, "tools/silent": 0}
    assert notes_on_calls(answer("no", row={})) == {}


# ---- the others


def test_what_is_too_long_loses_in_a_straight_line():
    assert [pay_for_length(tokens, 10, 20) for tokens in (0, 10, 15, 20, 99)] == [0, 0, -0.5, -1, -1]


def test_length_counts_what_the_policy_wrote_itself_up_to_the_longest_answer(rewards):
    (length,) = rewards("[{type: length, target_tokens: 20}]")
    assert length.pay([answer("x", own_tokens=30, ids=range(99))]) == [-0.5]


@pytest.mark.parametrize(
    ("said", "paid"),
    [
        ('{"a": 1}', 1),
        (' {"a": 1}\n', 1),
        ('<think>\nA number.\n</think>\n\n{"a": 1}', 1),
        ('<think>{"a": 1}</think>', 0),
        ('{"a": "1"}', 0),
        ('{"a": 1} and words', 0),
        ("{", 0),
        ('{"a": NaN}', 0),
        ("", 0),
        ("[" * 5000, 0),
    ],
)
def test_a_document_is_paid_when_its_schema_allows_it(rewards, tmp_path, said, paid):
    schema = {"type": "object", "properties": {"a": {"type": "number"}}, "required": ["a"]}
    (tmp_path / "schema.json").write_text(json.dumps(schema))
    (of_all,), (of_row,) = rewards("[{type: json_schema, json_schema: schema.json}]"), rewards("[{type: json_schema}]")
    assert of_all.pay([answer(said)]) == [paid]
    assert of_row.pay([answer(said, row={"json_schema": schema}), answer(said)]) == [paid, None]


def test_a_reward_model_reads_prompt_and_answer_as_tokens(rewards):
    class Model:
        digest = "d"

        def __init__(self, name):
            assert name == "some/reward"

        def score(self, sequences):
            return [float(sum(ids)) for ids in sequences]

    (model,) = rewards("[{type: reward_model, model: some/reward, weight: 2}]", Model)
    assert (model.name, model.weight, model.digest) == ("reward_model", 2, "d")
    assert model.pay([answer("x"), answer("y", ids=[10])]) == [27, 13]


# ---- functions


def write_function(body: str, name="mine.py"):
    Path(name).write_text(f"def score(prompts, completions, completion_ids, answer, **columns):\n    {body}\n")


def test_a_function_is_called_as_trl_calls_one(rewards, tmp_path):
    write_function(
        "return [len(c[0]['content']) + len(i) + len(p) + len(a) for p, c, i, a in zip(prompts, completions, completion_ids, answer)]"
    )
    (own,) = rewards("[{type: function, function: 'mine:score'}]")
    assert own.name == "score"
    assert own.pay([answer("four", row={"answer": "ab"}), answer("", row={"answer": ""})]) == [4 + 3 + 1 + 2, 4]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("return [1.0]", "returned 1 values for 2 answers"),
        ("return 1.0", "returned float for 2 answers"),
        ("return [1.0, float('nan')]", "returned nan for the answer 'b'"),
        ("return [1.0, float('inf')]", "returned inf for the answer 'b'"),
        ("return [1.0, 'good']", "returned 'good' for the answer 'b'"),
        ("raise KeyError('x')", "failed: KeyError: 'x'"),
    ],
)
def test_what_a_function_does_wrong_is_named(rewards, body, words, monkeypatch):
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    write_function(body)
    (own,) = rewards("[{type: function, function: 'mine:score'}]")
    with pytest.raises(ModelError, match="mine:score") as error:
        own.pay([answer("a", row={"answer": ""}), answer("b", row={"answer": ""})])
    assert words in str(error.value)


def test_none_leaves_an_answer_unscored(rewards, monkeypatch):
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    write_function("return [None, 2]")
    (own,) = rewards("[{type: function, function: 'mine:score'}]")
    assert own.pay([answer("a", row={"answer": ""}), answer("b", row={"answer": ""})]) == [None, 2.0]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("mine", "must be module:attribute"),
        ("mine:", "must be module:attribute"),
        ("nowhere_at_all:score", "there is no module nowhere_at_all"),
        ("json.nowhere:score", "there is no module json.nowhere"),
        ("mine:scores", "has no scores; it has score"),
    ],
)
def test_a_name_that_leads_nowhere_is_found_without_running_anything(tmp_path, monkeypatch, name, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    (tmp_path / "mine.py").write_text("def score(): ...\nassert False, 'it was run'\n")
    with pytest.raises(RecipeError) as error:
        check_plugin("rlhf.tools", name)
    assert words in str(error.value) and str(error.value).startswith(f"rlhf.tools = {name}")
    check_plugin("rlhf.tools", "mine:score")
    with pytest.raises(RecipeError, match="AssertionError: it was run"):
        load_plugin("rlhf.tools", "mine:score")


def test_two_rewards_of_a_type_have_two_names_in_the_logs(rewards):
    built = rewards("[{type: length, target_tokens: 20}, {type: length, target_tokens: 10, weight: 0.5}, {type: tool_calls}]")
    assert [(reward.name, reward.weight) for reward in built] == [("length", 1), ("length_2", 0.5), ("tool_calls", 1)]


# ---- rows


def test_the_question_is_all_before_the_last_answer_or_before_the_first_where_tools_run():
    user = {"role": "user", "content": "weather?"}
    calls = [{"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Paris"}}}]
    row = {
        "messages": [
            user,
            {"role": "assistant", "tool_calls": calls},
            {"role": "tool", "content": "20"},
            {"role": "assistant", "content": "It is 20."},
        ],
        "tools": TOOLS,
    }
    one_turn, several = question_and_gold(row, acts=False), question_and_gold(row, acts=True)
    assert one_turn == {"messages": row["messages"][:3], "tools": TOOLS, "answer": "It is 20.", "tool_calls": []}
    assert several == {"messages": [user], "tools": TOOLS, "answer": "It is 20.", "tool_calls": [calls[0]["function"]]}
    assert question_and_gold({"messages": [user]}, acts=True, offered=[TRAIN]) == {"messages": [user], "tools": [TRAIN]}


def test_half_a_character_in_an_answer_is_an_error_of_its_row(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [[{"role": "user", "content": "hi"}, {"role": "assistant", "content": said}] for said in ("a\ud83d", "a")]
    Path("rows.jsonl").write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in rows))

    def prepared(on_error):
        overrides = ["data.train=rows.jsonl", "data.eval=[]", "train.eval_steps=null", f"data.on_error={on_error}", "data.cache_dir=cache"]
        recipe = load("tiny/rlhf-rloo", overrides)
        return prepare_recipe(recipe, load_tokenizer(recipe), packing=False, say=lambda text: None)

    with pytest.raises(DataError, match="rows.jsonl:1: .* half of a surrogate pair"):
        prepared("fail")
    assert prepared("skip").train["location"][:] == ["rows.jsonl:2"]


def test_rows_that_a_reward_cannot_judge_are_refused_before_a_model_is_loaded():
    check_rows([PART], [{"tool_calls": []}])
    with pytest.raises(DataError, match="none of 1 rows has one; give rows that end with the assistant"):
        check_rows([PART], [{"messages": []}])
    of_rows = RewardPart(type="json_schema")
    with pytest.raises(DataError, match="none of 1 rows has a json_schema"):
        check_rows([of_rows], [{"messages": []}])
    with pytest.raises(DataError, match="is no JSON Schema: 'nothing' is not"):
        check_rows([of_rows], [{"json_schema": {"type": "nothing"}}])
    with pytest.raises(DataError, match="is no JSON Schema: 'nothing' is not"):
        check_rows([of_rows], [{"json_schema": {"type": "object"}}], [{"messages": []}, {"json_schema": {"type": "nothing"}}])


def test_an_installed_module_is_found_also_where_a_mere_folder_has_its_name(tmp_path, monkeypatch):
    """An editable installation is found by a finder of its own, not on the path."""
    (tmp_path / "harness" / "quickstart").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [entry for entry in sys.path if not (Path(entry or ".") / "harness").is_dir()])
    check_plugin("rlhf.tools", "harness.quickstart.tools:TOOLS")
