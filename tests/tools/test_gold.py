"""Gold that leaves a choice, and what strict judging says of an answer."""

import json

import pytest
from conftest import SHARED, needs_shared

from harness.evaluate.suite import load_questions
from harness.tools import (
    OneOf,
    ParsedCalls,
    ToolCall,
    breaks_schema,
    fits,
    judge_strictly,
    match_calls,
    normalise_tools,
    read_gold,
    render_gold,
    score,
)

FUNCTIONS = [
    {
        "name": "trip",
        "parameters": {
            "type": "dict",
            "properties": {
                "to": {"type": "string"},
                "days": {"type": "integer"},
                "class": {"type": "string", "enum": ["first", "second"]},
                "stops": {"type": "array", "items": {"type": "string"}},
                "seats": {
                    "type": "array",
                    "items": {"type": "dict", "properties": {"row": {"type": "integer"}, "side": {"type": "string"}}, "required": ["row"]},
                },
                "note": {"type": "string"},
            },
            "required": ["to", "note"],
        },
    }
]
TOOLS = normalise_tools(FUNCTIONS)
ANSWERS = [
    {
        "trip": {
            "to": ["Rome", "Roma"],
            "days": ["", 3],
            "class": ["", "second"],
            "stops": [["Turin"], ["Turin", "Pisa"]],
            "seats": ["", [{"row": [4], "side": ["", "left"]}]],
            "note": [""],
        }
    }
]
GOLD = read_gold(ANSWERS, FUNCTIONS)
RIGHT = {"to": "Roma", "days": 3, "stops": ["Turin", "Pisa"], "seats": [{"row": 4}], "note": ""}


def judged(*arguments, gold=GOLD):
    trouble = judge_strictly(ParsedCalls([ToolCall("trip", one) for one in arguments], [], ""), gold, TOOLS)
    return trouble and trouble[0]


def test_gold_is_rendered_without_what_may_be_left_out_and_else_by_its_first_value():
    assert render_gold(GOLD) == [ToolCall("trip", {"to": "Rome", "stops": ["Turin"], "note": ""})]
    needed = read_gold([{"trip": {"days": ["", 3]}}], [{"name": "trip", "parameters": {"required": ["days"]}}])
    assert render_gold(needed) == [ToolCall("trip", {"days": 3})]
    inside = read_gold([{"trip": {"seats": [[{"row": [4, 5], "side": ["", "left"]}]]}}], FUNCTIONS)
    assert render_gold(inside) == [ToolCall("trip", {"seats": [{"row": 4}]})]


@pytest.mark.parametrize(
    ("change", "failure"),
    [
        ({}, None),
        ({"to": "Rome"}, None),
        ({"days": 3.0}, None),  # one number, and an integer to JSON Schema
        ({"class": "second"}, None),
        ({"seats": [{"row": 4, "side": "left"}]}, None),
        ({"to": "rome"}, "wrong_value"),
        ({"to": "Rome "}, "wrong_value"),
        ({"days": "3"}, "wrong_type"),
        ({"days": True}, "wrong_type"),
        ({"days": 3.5}, "wrong_type"),  # no integer, says the schema
        ({"days": None}, "wrong_type"),
        ({"stops": ["Pisa", "Turin"]}, "wrong_value"),
        ({"stops": ["Turin", 5]}, "wrong_type"),
        ({"stops": "Turin"}, "wrong_type"),
        ({"seats": [{"row": "4"}]}, "wrong_type"),
        ({"seats": [{"row": 5}]}, "wrong_value"),
        ({"seats": [{"row": 4, "side": "right"}]}, "wrong_value"),
        ({"seats": [{"side": "left"}]}, "wrong_value"),
        ({"seats": [{"row": 4, "window": True}]}, "wrong_value"),
        ({"class": "first"}, "wrong_value"),
        ({"speed": 1}, "extra_argument"),
    ],
)
def test_a_call_is_right_when_it_is_one_of_golds_down_to_the_last_element(change, failure):
    assert judged({**RIGHT, **change}) == failure


def test_what_may_not_be_left_out_is_missing():
    for key in ("to", "stops", "note"):
        assert judged({name: value for name, value in RIGHT.items() if name != key}) == "missing_argument"


def test_an_argument_for_which_gold_has_no_value_has_to_be_left_out():
    gold = read_gold([{"trip": {"to": ["Rome"], "days": [""]}}], FUNCTIONS)
    assert match_calls([ToolCall("trip", {"to": "Rome"})], gold).exact
    found = match_calls([ToolCall("trip", {"to": "Rome", "days": 3})], gold)
    assert (found.failure, found.reason) == ("extra_argument", "trip.days is 3; must be left out")


def test_one_of_golds_values_that_the_schema_does_not_take_is_wrong_unless_gold_has_no_other():
    def gold(*days):
        return read_gold([{"trip": {"to": ["Rome"], "note": ["x"], "days": list(days)}}], FUNCTIONS)

    call = {"to": "Rome", "note": "x", "days": "3"}
    assert judged(call, gold=gold(3, "3")) == "wrong_type"
    assert judged({**call, "days": 3}, gold=gold(3, "3")) is None
    assert breaks_schema(gold("3"), TOOLS)
    assert judged(call, gold=gold("3")) is None


def test_parallel_calls_are_right_in_any_order_whatever_their_alternatives():
    gold = read_gold([{"trip": {"to": ["Rome", "Oslo"], "note": ["x"]}}, {"trip": {"to": ["Rome"], "note": ["x"]}}], FUNCTIONS)
    rome, oslo = ({"to": city, "note": "x"} for city in ("Rome", "Oslo"))
    assert judged(rome, oslo, gold=gold) is judged(oslo, rome, gold=gold) is None
    assert judged(oslo, oslo, gold=gold) == "wrong_value"
    assert judged(rome, gold=gold) == "wrong_count"


@pytest.mark.parametrize(
    ("said", "spoke", "failure"),
    [
        (ParsedCalls([], [], ""), True, None),
        (ParsedCalls([], [], ""), False, "no_answer"),
        (ParsedCalls([], ['{"name": '], ""), True, "malformed"),
        (ParsedCalls([ToolCall("trip", RIGHT)], [], ""), True, "unneeded_call"),
    ],
)
def test_where_nothing_is_to_be_called_a_broken_call_is_no_abstention(said, spoke, failure):
    trouble = judge_strictly(said, [], TOOLS, spoke=spoke)
    assert (trouble and trouble[0]) == failure


def test_the_scorer_of_rewards_takes_gold_with_alternatives():
    right = score(json.dumps({"name": "trip", "arguments": RIGHT}), GOLD, TOOLS)
    assert (right.exact, right.valid_schema, right.failure) == (True, True, None)
    assert score(json.dumps({"name": "trip", "arguments": {**RIGHT, "to": "Oslo"}}), GOLD, TOOLS).failure == "wrong_value"


def test_a_reason_says_what_was_found_and_what_would_be_right():
    def reason(**change):
        return match_calls([ToolCall("trip", {**RIGHT, **change})], GOLD).reason

    assert reason(to="Oslo") == 'trip.to is "Oslo"; must be "Rome" or "Roma"'
    assert reason(days="3") == 'trip.days is "3"; must be 3 or left out'
    assert reason(speed=1) == "trip.speed is 1; must be left out"
    assert match_calls([ToolCall("trip", {})], GOLD).reason == 'trip.to is missing; must be "Rome" or "Roma"'
    assert match_calls([], GOLD).reason == "calls nothing; trip would be right"
    assert match_calls([ToolCall("tripp", {})], GOLD).reason == "calls tripp; trip would be right"


def test_a_choice_at_any_depth_is_a_choice():
    wanted = {"a": [OneOf((1, 2)), {"b": OneOf(("x",), omittable=True)}]}
    assert fits({"a": [2, {}]}, wanted)
    assert fits({"a": [1.0, {"b": "x"}]}, wanted)
    assert not fits({"a": [3, {}]}, wanted)
    assert not fits({"a": [1, {"b": "y"}]}, wanted)
    assert not fits({"a": [1, {"b": "x", "c": 1}]}, wanted)


@needs_shared
def test_all_gold_of_the_leaderboards_categories_is_right_strictly():
    bfcl = SHARED / "bfcl"
    broken = []
    for question in load_questions([bfcl], [bfcl / "possible_answer"]).values():
        gold, tools = read_gold(question.gold, question.functions), normalise_tools(question.functions)
        if gold:
            assert judge_strictly(ParsedCalls(render_gold(gold), [], ""), gold, tools) is None, question.id
            broken += [question.id] if breaks_schema(gold, tools) else []
    assert broken == ["parallel_multiple_21", "parallel_multiple_94"]  # text for arrays, fruit for integers
