import itertools
import json
import random

import pytest

from harness.tools import FAILURES, ToolCall, json_equal, match_calls, normalise_tool, score, summarise
from harness.tools.match import same_call

PARIS = ToolCall("weather", {"city": "Paris", "days": 3})
ROME = ToolCall("weather", {"city": "Rome", "days": 3})
TIME = ToolCall("time", {"zone": "UTC"})
TOOLS = [
    normalise_tool({"name": "weather", "parameters": {"city": {"type": "str"}, "days": {"type": "int", "default": 1}}}),
    normalise_tool({"name": "time", "parameters": {"zone": {"type": "str"}}}),
]


def call(**arguments):
    return ToolCall("weather", arguments)


@pytest.mark.parametrize(
    ("a", "b", "equal"),
    [
        (1, 1.0, True),
        (True, 1, False),
        (False, 0, False),
        (True, True, True),
        ("1", 1, False),
        (None, False, False),
        (None, None, True),
        ("a", "A", False),
        ([1, 2], [1.0, 2.0], True),
        ([1, 2], [2, 1], False),
        ([1], [1, 1], False),
        ([True], [1], False),
        ({"a": 1, "b": [2]}, {"b": [2.0], "a": 1}, True),
        ({"a": 1}, {"a": 1, "b": None}, False),
        (2**53 + 1, float(2**53), False),
        ([], {}, False),
    ],
)
def test_values_are_equal_as_json_values(a, b, equal):
    assert json_equal(a, b) is json_equal(b, a) is equal


def test_parallel_calls_match_in_any_order_and_strict_ones_in_theirs():
    assert match_calls([ROME, TIME, PARIS], [PARIS, ROME, TIME]).exact
    assert not match_calls([ROME, PARIS], [PARIS, ROME], order="strict").exact
    assert match_calls([PARIS, ROME], [PARIS, ROME], order="strict").exact
    assert match_calls([], []).exact


def test_the_same_call_twice_needs_to_be_made_twice():
    assert match_calls([PARIS, PARIS], [PARIS, PARIS]).exact
    once = match_calls([PARIS, ROME], [PARIS, PARIS])
    assert (once.exact, once.matched) == (False, 1)


def test_gold_with_alternatives_gets_the_largest_matching_whatever_the_order():
    # The second gold call takes only Paris; the first would take either, and takes Paris if it is greedy.
    def accepts(predicted, gold):
        return predicted.arguments["city"] in gold.arguments["city"]

    either, paris = call(city=["Paris", "Rome"]), call(city=["Paris"])
    for predicted, gold in itertools.product(itertools.permutations([PARIS, ROME]), itertools.permutations([either, paris])):
        assert match_calls(predicted, gold, accepts=accepts).exact


def test_the_number_of_matched_calls_equals_the_best_of_all_assignments():
    generator = random.Random(0)
    for _ in range(300):
        n = generator.randrange(1, 6)
        fits = {(p, g) for p in range(n) for g in range(n) if generator.random() < 0.4}
        predicted = [ToolCall("p", {"i": i}) for i in range(n)]
        gold = [ToolCall("g", {"i": i}) for i in range(n)]
        best = max(sum((p, g) in fits for g, p in enumerate(order)) for order in itertools.permutations(range(n)))
        found = match_calls(predicted, gold, accepts=lambda p, g, fits=fits: (p.arguments["i"], g.arguments["i"]) in fits)
        assert found.matched == best


@pytest.mark.parametrize(
    ("predicted", "gold", "failure"),
    [
        ([PARIS], [PARIS], None),
        ([], [PARIS], "no_call"),
        ([PARIS], [], "unneeded_call"),
        ([PARIS, PARIS], [PARIS], "wrong_count"),
        ([TIME], [PARIS], "wrong_tool"),
        ([call(city="Paris")], [PARIS], "missing_argument"),
        ([call(city="Paris", days=3, unit="c")], [PARIS], "extra_argument"),
        ([call(city="Paris", days="3")], [PARIS], "wrong_type"),
        ([call(city="Paris", days=True)], [PARIS], "wrong_type"),
        ([call(city="Paris", days=3.5)], [PARIS], "wrong_value"),
        ([call(city="Lyon", days=3)], [PARIS], "wrong_value"),
        # The right call is set aside first, and each wrong one is compared with its nearest.
        ([TIME, call(city="Rome", days=4)], [ROME, TIME], "wrong_value"),
        ([call(city="Rome"), call(city="Paris", days="3")], [PARIS, ROME], "missing_argument"),
    ],
)
def test_a_failure_has_a_class(predicted, gold, failure):
    found = match_calls(predicted, gold)
    assert (found.failure, found.exact) == (failure, failure is None)


def text_of(*calls):
    return "".join(f"<tool_call>{json.dumps({'name': c.name, 'arguments': c.arguments})}</tool_call>" for c in calls)


def test_a_right_call_scores_in_everything():
    right = score(text_of(PARIS), [PARIS], TOOLS)
    assert (right.exact, right.valid_json, right.valid_schema, right.abstained_correctly, right.failure) == (True, True, True, None, None)


@pytest.mark.parametrize(
    ("text", "valid_json", "valid_schema", "failure"),
    [
        ("I do not know.", False, False, "no_call"),
        ("", False, False, "no_call"),
        (text_of(PARIS)[:-20], False, False, "malformed"),
        (text_of(PARIS) + "<tool_call>", False, False, "malformed"),  # a right call does not excuse a broken one
        (text_of(call(city="Paris", days="3")), True, False, "wrong_type"),
        (text_of(call(city="Lyon", days=3)), True, True, "wrong_value"),
        (text_of(ToolCall("wether", {"city": "Paris"})), True, False, "wrong_tool"),
    ],
)
def test_a_wrong_call_says_how_far_it_got(text, valid_json, valid_schema, failure):
    wrong = score(text, [PARIS], TOOLS)
    assert (wrong.exact, wrong.valid_json, wrong.valid_schema, wrong.failure) == (False, valid_json, valid_schema, failure)


@pytest.mark.parametrize(
    ("text", "failure"),
    [
        ("None of my tools can do that.", None),
        (text_of(PARIS), "unneeded_call"),
        (text_of(PARIS)[:-20], "malformed"),  # gorilla#1362: BFCL credits this as an abstention
        ("", "no_answer"),
        ("<think>Hm.</think>", "no_answer"),
    ],
)
def test_abstaining_means_answering_without_an_attempt(text, failure):
    found = score(text, [], TOOLS)
    assert (found.exact, found.abstained_correctly, found.failure) == (failure is None, failure is None, failure)
    assert found.valid_json is found.valid_schema is None


def test_rates_have_their_own_denominators():
    scores = [
        score(text_of(PARIS), [PARIS], TOOLS),
        score(text_of(TIME), [PARIS], TOOLS),
        score("Hello", [PARIS], TOOLS),
        score(text_of(call(city=1)), [PARIS], TOOLS),
        score("Sorry", [], TOOLS),
        score(text_of(TIME), [], TOOLS),
    ]
    assert summarise(scores) == {
        "exact_match": 1 / 4,
        "valid_json": 3 / 4,
        "valid_schema": 2 / 4,
        "right_abstention": 1 / 2,
        "correct": 2 / 6,
        "count": 6,
        "call_count": 4,
        "abstention_count": 2,
        "failures": {"no_call": 1, "unneeded_call": 1, "wrong_tool": 1, "missing_argument": 1},
    }


def test_a_rate_over_nothing_is_none_and_not_zero():
    assert summarise([])["exact_match"] is None
    assert summarise([score("Hello", [PARIS], TOOLS)])["right_abstention"] is None


def test_every_failure_that_occurs_is_in_the_list_of_failures():
    generator = random.Random(0)
    pieces = [text_of(PARIS), text_of(TIME), "Hello ", "<tool_call>", text_of(call(city="Paris")), text_of(call(city="Paris", days="3"))]
    for _ in range(500):
        text = "".join(generator.choices(pieces, k=generator.randrange(4)))
        gold = generator.choices([PARIS, ROME, TIME], k=generator.randrange(3))
        found = score(text, gold, TOOLS)
        assert found.exact is (found.failure is None)
        assert found.failure is None or found.failure in FAILURES
        assert not found.exact or not gold or (found.valid_json and found.valid_schema)


def test_same_call_needs_the_same_name():
    assert not same_call(ToolCall("a", {}), ToolCall("b", {}))
