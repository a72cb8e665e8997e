"""What goes into a decision: its recipe, its rows with their behaviours and faults, its documents, and how each arm asks."""

import json

import pytest
from conftest import XLAM, needs_shared

from harness.errors import DataError, RecipeError
from harness.evaluate.decision.arms import plan_arms, plan_ways
from harness.evaluate.decision.questions import check_apart, find_faults, load_items, pool_rare
from harness.evaluate.decision.retrieve import Index, load_documents, words_of
from harness.evaluate.decision.schema import Decision, load_decision
from harness.recipe.load import render_yaml
from harness.recipe.schema import Source

WEATHER = {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}


def row(question: str, *calls: dict, tools=(WEATHER,), system: str | None = None, **keys) -> dict:
    said = [{"type": "function", "function": {"name": "weather", "arguments": arguments}} for arguments in calls]
    answer = {"role": "assistant", **({"tool_calls": said} if said else {"content": "I cannot."})}
    before = [{"role": "system", "content": system}] if system else []
    return {"messages": [*before, {"role": "user", "content": question}, answer], "tools": list(tools), **keys}


def write(path, *rows):
    path.write_text("".join(json.dumps(one) + "\n" for one in rows), encoding="utf-8")
    return str(path)


def items_of(tmp_path, *rows):
    return load_items([Source(path=write(tmp_path / "rows.jsonl", *rows))], 0, "items")


# ---- the recipe


def decision(tmp_path, **settings) -> Decision:
    write(tmp_path / "items.jsonl", row("q", {"city": "Oslo"}))
    given = {"items": str(tmp_path / "items.jsonl"), "model": "embedded:tiny-llama", **settings}
    (tmp_path / "mine.yaml").write_text(render_yaml({key: value for key, value in given.items() if value is not None}))
    return load_decision(tmp_path / "mine.yaml")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"modle": "x"}, "modle: unknown key in the top level; did you mean `model`"),
        ({"model": None}, "model: is required"),
        ({"few_shot": {"n_shot": 3}, "tuning": "t.jsonl"}, "`n_shot` is `few_shot.k` here"),
        ({"rules": {"target": 1.0}}, "rules.target = 1.0; must be < 1"),
        ({"rules": {"target": "80 %"}}, "rules.target"),
        ({"plan": {"recipe": "tiny/sft-lora"}}, "plan: has neither of tokens_per_s and measured"),
        ({"items": []}, "items = \\[\\]; must name at least one file"),
        ({"few_shot": {"k": 2}}, "few_shot is set, and there is nothing to choose examples from; set tuning"),
        ({"prompts": {"few-shot": "x"}}, 'prompts: the name "few-shot" is another arm\'s already'),
        ({"prompts": {"a": "x"}, "tuned": {"a": "runs/a"}}, 'tuned: the name "a" is another arm\'s already'),
        # As a model's name it would stand in the base's place, and be asked as zero-shot.
        ({"tuned": {"base": "runs/a"}}, 'tuned: the name "base" is another arm\'s already'),
        ({"tuned": {"a/b": "runs/a"}}, 'tuned: the name "a/b" is not one for a file'),
        ({"rules": {"fails_in": 3}}, r"rules.fails_in = 3; must be at most 2, the number of prompts \(zero-shot, instruction\)"),
        ({"items": [{"path": "x.jsonl", "weight": 2.0}]}, "items.0.weight = 2.0; a row is asked once"),
    ],
)
def test_what_is_wrong_in_a_decision_is_said_with_its_key_and_the_remedy(tmp_path, wrong, said):
    with pytest.raises(RecipeError, match=said):
        decision(tmp_path, **wrong)


def test_a_decision_that_is_not_there_is_answered_with_those_that_are():
    with pytest.raises(RecipeError, match="decide/tiny"):
        load_decision("decide/tinny")


def test_the_shipped_decision_loads_and_overrides_reach_it():
    assert load_decision("decide/tiny", ["rules.target=0.9"]).rules.target == 0.9


# ---- rows


def test_a_behaviour_is_what_the_row_says_or_else_what_its_gold_does(tmp_path):
    items, repeated = items_of(
        tmp_path,
        row("a", {"city": "Oslo"}),
        row("b", {"city": "Oslo"}, {"city": "Rome"}),
        row("c"),
        row("d", {"city": "Oslo"}, behaviour="the north"),
        row("a", {"city": "Oslo"}),
    )
    assert [item.category for item in items] == ["weather", "parallel calls", "calls nothing", "the north"]
    assert repeated == 1 and items[0].id == "rows.jsonl:1"
    assert [call["arguments"]["city"] for call in items[1].gold["calls"]] == ["Oslo", "Rome"]


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (row("a", behaviour=3), "rows.jsonl:1: behaviour is 3; must be text"),
        ({"text": "words"}, "rows.jsonl:1: items has a row of text; must be a conversation"),
        (row("a", {"city": "x"}, tools=()), "rows.jsonl:1: .*weather"),
    ],
)
def test_a_row_that_cannot_be_asked_is_named(tmp_path, bad, said):
    with pytest.raises(DataError, match=said):
        items_of(tmp_path, bad)


def test_gold_that_breaks_its_schema_or_contradicts_itself_is_found_and_nothing_else(tmp_path):
    items, _ = items_of(
        tmp_path,
        row("sound", {"city": "Oslo"}),
        row("typed", {"city": 3}),
        row("twice", {"city": "Oslo"}),
        row("twice", {"city": "Rome"}),
        row("order", {"city": "Oslo"}, {"city": "Rome"}),
        row("order", {"city": "Rome"}, {"city": "Oslo"}),  # the same calls: no contradiction
        row("twice", {"city": "Rome"}, tools=[WEATHER, {**WEATHER, "name": "other"}]),  # other tools: another question
    )
    faults = find_faults(items)
    assert {id: reason.partition(":")[0] for id, reason in faults.items()} == {
        "rows.jsonl:2": "gold breaks its tool's schema",
        "rows.jsonl:3": "gold contradicts rows.jsonl",
        "rows.jsonl:4": "gold contradicts rows.jsonl",
    }
    assert "weather.city: is 3 (a number); must be string" in faults["rows.jsonl:2"]


def test_tools_with_few_items_are_pooled_unless_their_rows_name_a_behaviour(tmp_path):
    def of(tool, question, **keys):
        made = row(question, {"city": "Oslo"}, tools=[{**WEATHER, "name": tool}], **keys)
        made["messages"][-1]["tool_calls"][0]["function"]["name"] = tool
        return made

    rows = [of("a", "1"), of("a", "2"), of("b", "3"), of("c", "4"), row("5"), of("d", "6", behaviour="d")]
    items, _ = items_of(tmp_path, *rows)
    assert [item.category for item in pool_rare(items, 2)] == ["a", "a", *["2 tools with few items"] * 2, "calls nothing", "d"]
    assert [item.category for item in pool_rare(items[:3], 2)] == ["a", "a", "b"]  # one alone is not renamed


@needs_shared
def test_of_a_real_set_every_call_that_breaks_its_schema_is_found_and_its_294_tools_are_one_behaviour():
    items, _ = load_items([Source(path=str(XLAM))], 0, "items")
    # As an audit of the set with jsonschema alone has counted them.
    assert (len(items), len(find_faults(items))) == (294, 55)
    assert {item.category for item in pool_rare(items, 16)} == {"294 tools with few items"}


def test_an_example_that_would_be_an_answer_is_refused(tmp_path):
    items, _ = items_of(tmp_path, row("a", {"city": "Oslo"}), row("b", {"city": "Oslo"}))
    tuning = write(tmp_path / "tuning.jsonl", row("b", {"city": "Rome"}), row("c", {"city": "Rome"}))
    others, _ = load_items([Source(path=tuning)], 0, "tuning")
    check_apart(items[:1], others)
    with pytest.raises(DataError, match=r"1 of 2 rows ask what an item asks \(such as tuning.jsonl:1 and rows.jsonl:2\)"):
        check_apart(items, others)


# ---- documents


def test_bm25_ranks_as_its_formula_does_by_hand():
    index = Index(["the cat sat", "the dog sat on the dog", "a bird"])
    # "dog" is in one of three documents, twice in one of 6 words where the mean is 11 / 3.
    idf, length = 0.9808292530117262, 1 - 0.75 + 0.75 * 6 / (11 / 3)
    assert index._score({"dog"}, 1) == pytest.approx(idf * 2 * 2.5 / (2 + 1.5 * length))
    assert index.nearest("dog cat", 3) == [1, 0] and index.nearest("dog", 1, but=1) == []
    assert index.nearest("fish", 3) == []
    assert words_of("get_weather(city2)") == ["get", "weather", "city", "2"]


def test_documents_are_passages_or_tools_and_anything_else_is_named(tmp_path):
    file = write(tmp_path / "d.jsonl", {"text": "Ann lives in Rome", "title": "Ann"}, WEATHER | {"description": "Of a city"})
    passage, tool = load_documents(file)
    assert passage == "Ann: Ann lives in Rome" and tool.startswith('weather: Of a city {"type": "object"')
    with pytest.raises(DataError, match='d.jsonl:1: is neither a passage {"text": …} nor a tool'):
        load_documents(write(tmp_path / "d.jsonl", {"words": "x"}))


# ---- arms


def test_each_arm_changes_what_it_says_it_changes_and_nothing_else(tmp_path):
    documents = write(tmp_path / "d.jsonl", {"text": "Oslo is north"}, {"text": "Rome is south"})
    tuning = write(tmp_path / "t.jsonl", row("is it warm in Rome", {"city": "Rome"}), row("cold in Oslo", {"city": "Oslo"}), row("joke"))
    made = decision(
        tmp_path,
        prompts={"short": "Be short."},
        tuned={"sft": "runs/a"},
        distilled="runs/b",
        retrieval={"documents": documents, "heading": "See:"},
        tuning=tuning,
        few_shot={"k": 1},
    )
    (item,), _ = items_of(tmp_path, row("weather in Rome", {"city": "Rome"}, system="You are kind."))
    arms = {arm.name: arm for arm in plan_arms(made)}
    assert list(arms) == ["zero-shot", "instruction", "short", "retrieval", "sft", "sft+retrieval", "distilled"]
    asked = {name: arm.ask(item) for name, arm in arms.items()}
    user = {"role": "user", "content": "weather in Rome"}
    kind = [{"role": "system", "content": "You are kind."}, user]
    assert asked["zero-shot"] == asked["sft"] == asked["distilled"] == kind
    assert asked["short"] == [{"role": "system", "content": "Be short.\n\nYou are kind."}, user]
    assert asked["retrieval"] == asked["sft+retrieval"] == [{"role": "system", "content": "You are kind.\n\nSee:\nRome is south"}, user]
    assert arms["sft"].model == "sft" and arms["distilled"].model == "distilled" and arms["retrieval"].model == "base"

    examples, _ = load_items(made.tuning, 0, "tuning")
    nearest, *draws = plan_ways(made, examples)
    system, question, answer, last = nearest.ask(item)
    assert (system["content"], question["content"], last) == ("You are kind.", "is it warm in Rome", user)
    assert answer["tool_calls"][0]["function"]["arguments"] == {"city": "Rome"}
    assert [arm.examples.way for arm in draws] == ["draw 1", "draw 2"]


def test_an_example_never_calls_a_tool_that_the_item_lacks_and_never_is_the_item(tmp_path):
    other = {**WEATHER, "name": "other"}
    made = decision(tmp_path, tuning=write(tmp_path / "t.jsonl", row("near one", {"city": "Rome"}), row("near two")), few_shot={"k": 2})
    examples, _ = load_items(made.tuning, 0, "tuning")
    (item,), _ = items_of(tmp_path, row("near", tools=[other]))
    for arm in plan_ways(made, examples):
        assert [message["content"] for message in arm.ask(item)] == ["near two", "I cannot.", "near"]
        assert "near two" not in [message["content"] for message in arm.ask(examples[1])[:-1] if message["role"] == "user"]
