"""The leaderboard's rules: its corners by hand, all its gold, and its recorded verdicts on thousands of changed calls."""

import json
import time

import make_bfcl_verdicts as recorded
import pytest
from conftest import SHARED, needs_shared

from harness.errors import DataError
from harness.evaluate.suite import Question, load_questions
from harness.tools import ToolCall, match_calls, read_gold, render_gold
from harness.tools.bfcl import check_answer, decode_text

BFCL = SHARED / "bfcl"


def question(properties, gold, required=(), category="simple_python", more=()):
    function = {"name": "f", "parameters": {"type": "dict", "properties": properties, "required": list(required)}}
    return Question(f"{category}_0", category, [function], [{"f": gold}, *more])


def verdict(asked, *arguments, name="f"):
    trouble = check_answer([ToolCall(name, one) for one in arguments], asked.gold, asked.functions, asked.category)
    return trouble and trouble[0]


INTEGER, FLOAT, STRING, BOOLEAN, ANY = ({"type": name} for name in ("integer", "float", "string", "boolean", "any"))
INTEGERS, FLOATS, STRINGS, ARRAYS, OBJECTS = (
    {"type": "array", "items": {"type": name}} for name in ("integer", "float", "string", "array", "dict")
)
OBJECT, TUPLE = {"type": "dict", "properties": {}}, {"type": "tuple", "items": {"type": "float"}}

# parameter, gold's values, the value, whether the leaderboard takes it
VALUES = [
    # An integer is a float at the top, and nothing else is anything else.
    (FLOAT, [5.0], 5, True),
    (INTEGER, [5], 5.0, False),
    (INTEGER, [5], "5", False),
    (INTEGER, [1], True, False),
    (BOOLEAN, [True], 1, False),
    (FLOATS, [[1.0, 2.0]], [1, 2], False),
    (FLOATS, [[1, 2]], [1, 2], True),
    (FLOATS, [[1, 2]], [1.0, 2.0], True),
    (FLOAT, [5.0], True, False),
    (FLOAT, [5.0], None, False),
    (FLOAT, [5.0, None], None, False),
    # "any" is text, or what gold is.
    (ANY, ["x"], "X", True),
    (ANY, [5], 5, True),
    (ANY, [5], "5", False),
    # Text loses case, blanks and , . / - _ * ^, and nothing else.
    (STRING, ["35"], "3.5", True),
    (STRING, ["5"], "-5", True),
    (STRING, ["abcdefgh"], "a b,c.d/e-f_g*^h", True),
    (STRING, ["New York, NY"], "newyorkny", True),
    (STRING, ["it's"], 'IT"S', True),
    (STRING, ["f(x)"], "fx", False),
    (STRING, ["a:b"], "ab", False),
    (STRING, ["a\nb"], "ab", False),
    (STRING, ["x", ""], "", True),
    (STRING, ["x", ""], " ,", True),
    (STRING, ["x"], ["x"], False),
    # Lists in order; [] where leaving out is right.
    (STRINGS, [["a", "b"]], ["A.", "b"], True),
    (STRINGS, [["a", "b"]], ["b", "a"], False),
    (STRINGS, [["a"], ""], [], True),
    (STRINGS, [["a"]], [], False),
    (INTEGERS, [[1, 2]], [1, "2"], False),
    (INTEGERS, [[1, 2]], (1, 2), False),
    # Types are looked at one level deep.
    (ARRAYS, [[[1, 1]]], [[1.0, True]], True),
    (ARRAYS, [[["New York"]]], [["new york"]], False),
    # A tuple may be a list, and the other way round only where the parameter is a tuple.
    (TUPLE, [[1.0, 2.0]], (1.0, 2.0), True),
    (TUPLE, [[1.0, 2.0]], [1.0, 2.0], True),
    # Objects: values as text, but not those of an object inside.
    (OBJECT, [{"k": ["X y"]}], {"k": "xy"}, True),
    (OBJECT, [{"k": ["x"], "l": [1, ""]}], {"k": "x"}, True),
    (OBJECT, [{"k": ["x"], "l": [1]}], {"k": "x"}, False),
    (OBJECT, [{"k": ["x"]}], {"k": "x", "l": 1}, False),
    (OBJECT, [{"k": [{"l": "X y"}]}], {"k": {"l": "x y"}}, False),
    (OBJECT, [{"k": [{"l": "X y"}]}], {"k": {"l": "X y"}}, True),
    (OBJECT, [{"k": [1]}], {"k": True}, True),
    (OBJECT, ["", {"k": [1]}], {}, False),
    (OBJECT, ["", {"k": [1, ""]}], {}, True),
    (OBJECTS, [[{"k": ["x"]}, {"k": ["y"]}]], [{"k": "X"}, {"k": "Y"}], True),
    (OBJECTS, [[{"k": ["x"]}, {"k": ["y"]}]], [{"k": "y"}, {"k": "x"}], False),
    (OBJECTS, [[{"k": ["x"]}]], [], False),
    (OBJECTS, [[{"k": ["x"]}], ""], [], True),
    # Where gold's type is another than the parameter's, both are taken, and text is compared by letters.
    (INTEGER, ["days"], "days", True),
    (INTEGER, ["days"], "Days", False),
    (INTEGER, ["days"], 3, False),
    (STRINGS, ["data['x']"], "data['x']", True),
    # Nothing is acceptable, or nothing but leaving out.
    (STRING, [], "x", False),
    (STRING, [""], "", True),
    (STRING, [""], "x", False),
    # enum, ranges and the like are not looked at.
    ({"type": "string", "enum": ["a"]}, ["b"], "b", True),
]

# text, the calls that the leaderboard reads, or None
DECODED = [
    ("[f(a=1), g.h(b='x')]", [("f", {"a": 1}), ("g.h", {"b": "x"})]),
    ("f(a=1)", [("f", {"a": 1})]),
    ("f(a=1), g()", [("f", {"a": 1}), ("g", {})]),
    ("```\n[f(a=1)]\n```", [("f", {"a": 1})]),
    ("```python\n[f(a=1)]\n```", None),
    ("Sure: [f(a=1)]", None),
    ("\t[f(a=1)]", None),
    ("f(1, 2, c=3)", [("f", {"c": 3})]),
    ("f(*a, b=1)", [("f", {"b": 1})]),
    ("f(**a)", [("f", {None: "a"})]),
    ("f(a=1, a=2)", [("f", {"a": 2})]),
    ("f(a=-5)", [("f", {"a": -5})]),
    ("f(a=+5)", [("f", {"a": -5})]),
    ("f(a=not True)", [("f", {"a": -1})]),
    ("f(a=~5)", [("f", {"a": -5})]),
    ("f(a=-(5))", [("f", {"a": -5})]),
    ("f(a=-(2 + 3))", None),
    ("f(a=- -5)", None),
    ("f(a=-x)", None),
    ("f(a=2 ** 3 * 2)", [("f", {"a": 16})]),
    ("f(a=1 / 2)", [("f", {"a": 0.5})]),
    ("f(a=1 / 0)", None),
    ("f(a='x' + \"y\")", [("f", {"a": "xy"})]),
    ("f(a=[0] * 3)", [("f", {"a": [0, 0, 0]})]),
    ("f(a=x + 1)", None),
    ("f(a=x)", [("f", {"a": "x"})]),
    ("f(a=true)", [("f", {"a": "true"})]),
    ("f(a=x.y)", None),
    ("f(a=g(1))", [("f", {"a": "g(1)"})]),
    ("f(a=g(b=h(c=1)))", [("f", {"a": {"g": {"b": {"h": {"c": 1}}}}})]),
    ("f(a=x['k'])", [("f", {"a": "x['k']"})]),
    ("f(a=x[1:2, 0])", [("f", {"a": "x[(1:2, 0)]"})]),
    ("f(a=(1, 2), b=[(3,)])", [("f", {"a": (1, 2), "b": [(3,)]})]),
    ("f(a={'k': None, 1: ...})", [("f", {"a": {"k": None, 1: "..."}})]),
    ("f(a={**x})", None),
    ("f(a={1, 2})", None),
    ("f(a=lambda: 1)", None),
    ("f(a=f'x')", None),
    ("f(a=1 if x else 2)", None),
    ("f(a=1 < 2)", None),
    ("a().f(b=1)", [("f", {"b": 1})]),
    ("(lambda: 1)(b=1)", [("", {"b": 1})]),
    ("[[f(a=1)]]", None),
    ("[f(a=1)][0]", None),
    ("[f(a=1)], [g()]", None),
    ("[f(a=1), 5]", None),
    ("[f(a='it", None),
    ("\x00", None),
    ("", []),
    ("[]", []),
    ("Sorry", None),
    ("I cannot help with that.", None),
]


@pytest.mark.parametrize(("parameter", "answers", "value", "right"), VALUES)
def test_a_value_is_judged_as_the_leaderboard_judges_it(parameter, answers, value, right):
    assert (verdict(question({"a": parameter}, {"a": answers}), {"a": value}) is None) is right


@pytest.mark.parametrize(("text", "decoded"), DECODED)
def test_text_is_decoded_as_the_leaderboard_decodes_python(text, decoded):
    calls = decode_text(text)
    assert repr(calls and [(call.name, call.arguments) for call in calls]) == repr(decoded)


def test_a_value_that_json_cannot_tell_from_another_is_told_by_its_type():
    assert verdict(question({"a": INTEGER}, {"a": [1]}), {"a": 1}) is None
    assert verdict(question({"a": INTEGER}, {"a": [1]}), {"a": 1.0}) == "wrong_type"
    assert verdict(question({"a": FLOAT}, {"a": [1.0]}), {"a": 10**400}) == "wrong_value"


@pytest.mark.parametrize(
    ("arguments", "failure"),
    [
        ({"a": 1, "b": 2}, None),
        ({"a": 1}, None),
        ({"b": 2}, "missing_argument"),
        ({"a": 1, "c": 3}, "extra_argument"),  # in the schema, but gold does not list it
        ({"a": 1, "d": 3}, "extra_argument"),
        ({"a": "1"}, "wrong_type"),
        ({"a": 2}, "wrong_value"),
    ],
)
def test_a_failure_has_its_class(arguments, failure):
    asked = question({name: INTEGER for name in "abc"}, {"a": [1], "b": [2, ""]}, required=["a"])
    assert verdict(asked, arguments) == failure
    assert verdict(asked, arguments, name="g") == "wrong_tool"
    assert verdict(asked, arguments, arguments) == "wrong_count"
    assert verdict(asked) == "no_call"


def test_a_required_argument_may_not_be_left_out_whatever_gold_says():
    assert verdict(question({"a": INTEGER}, {"a": [1, ""]}, required=["a"]), {}) == "missing_argument"
    assert verdict(question({"a": INTEGER}, {"a": [1, ""]}), {}) is None
    assert verdict(question({"a": INTEGER}, {"a": [1]}), {}) == "missing_argument"


def test_parallel_calls_are_assigned_greedily_where_we_find_the_largest_matching():
    asked = question({"a": STRING}, {"a": ["x", "y"]}, category="parallel", more=[{"f": {"a": ["x"]}}])
    assert verdict(asked, {"a": "y"}, {"a": "x"}) is None
    assert verdict(asked, {"a": "x"}, {"a": "y"}) == "wrong_value"  # the first of gold takes x, and nothing is left for the second
    gold = read_gold(asked.gold, asked.functions)
    for order in ("xy", "yx"):
        assert match_calls([ToolCall("f", {"a": value}) for value in order], gold).exact


def test_the_nearest_call_says_why_parallel_calls_fail():
    asked = question({"a": STRING, "b": STRING}, {"a": ["x"]}, category="parallel", more=[{"f": {"a": ["y"]}}])
    assert verdict(asked, {"a": "x"}, {"a": "z"}) == "wrong_value"
    assert verdict(asked, {"a": "x"}, {"a": "y", "b": "b"}) == "extra_argument"


@pytest.mark.parametrize(
    "text",
    [
        '[{"function": "f", "parameters": {"a": [1]}}]',
        'Sure:\n[{"function": "f", "parameters": {"a": [1]}}]',
        '```json\n[{"name": "f", "arguments": {"a": [1]}}]\n```',
        '{"name": "f", "parameters": {"a": [1]}}',
        '<tool_call>\n{"name": "f", "arguments": {"a": [1]}}\n</tool_call>',
        '<|python_tag|>{"name": "f", "parameters": {"a": [1]}}<|eom_id|>',
        '[TOOL_CALLS][{"name": "f", "arguments": {"a": [1]}}]</s>',
        "<think>f(a=[2]) or f(a=[1])</think>\n[f(a=[1])]<|im_end|>",
    ],
)
def test_json_is_read_beside_python(text):
    assert decode_text(text) == [ToolCall("f", {"a": [1]})]


@pytest.mark.parametrize(
    "text",
    [
        '<tool_call>{"name": "f", "arguments": {"a": 1}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {}}</tool_call><tool_call>',
        '[{"name": "f"}]',
        '[{"function": "f", "parameters": {"a": [{"b": 1}], "c": 2}}]',  # its regular expression ends with the first }]
    ],
)
def test_json_that_the_leaderboard_cannot_read_is_no_call(text):
    assert decode_text(text) is None


def test_what_a_model_wrote_is_never_run(tmp_path):
    mark = tmp_path / "ran"
    assert decode_text(f"f(a=open({str(mark)!r}, 'w').write('x') + 1)") is None
    assert not mark.exists()


@pytest.mark.parametrize(
    "text",
    ["9**9**9**9", "1 << 10**12", "'a' * 10**12", "[0] * 10**9 * 9", "'%999999999d' % 1", "10.0**400", "2**-(10**9)", "1 + " * 9999 + "1"],
)
def test_arithmetic_has_bounds(text):
    started = time.monotonic()
    decode_text(f"f(a={text})")
    assert time.monotonic() - started < 2


def test_questions_that_do_not_fit_their_gold_are_an_error_that_says_so():
    with pytest.raises(DataError, match='f.a has the type "object"; the leaderboard knows string'):
        verdict(question({"a": {"type": "object"}}, {"a": [{}]}), {"a": {}})
    with pytest.raises(DataError, match=r'f.a\[\] has the type "None"'):
        verdict(question({"a": {"type": "array"}}, {"a": [[]]}), {"a": []})
    with pytest.raises(DataError, match='gold calls "g", which is not among the functions'):
        check_answer([ToolCall("g", {})], [{"g": {}}], question({}, {}).functions, "multiple")


@pytest.fixture(scope="module")
def questions():
    return load_questions([BFCL], [BFCL / "possible_answer"])


@needs_shared
def test_all_gold_of_the_four_categories_is_right_within_a_second(questions):
    with_gold = [question for question in questions.values() if question.gold]
    rendered = [render_gold(read_gold(question.gold, question.functions)) for question in with_gold]
    started = time.process_time()
    wrong = [
        (asked.id, trouble)
        for asked, calls in zip(with_gold, rendered, strict=True)
        if (trouble := check_answer(calls, asked.gold, asked.functions, asked.category))
    ]
    taken_s = time.process_time() - started
    assert (len(with_gold), wrong) == (1000, [])
    assert taken_s < 1


@needs_shared
def test_thousands_of_changed_calls_are_judged_as_the_leaderboards_own_code_judged_them(questions):
    golden = json.loads(recorded.GOLDEN.read_text())
    changed = list(recorded.changes(questions, golden["seed"]))
    assert (len(changed), recorded.digest(changed)) == (golden["count"], golden["sha256"]), (
        "made by another make_bfcl_verdicts.py: make it again"
    )
    right, calls = (recorded.unpack(golden[key], golden["count"]) for key in ("right", "calls"))
    different = []
    for change, theirs in zip(changed, zip(right, calls, strict=True), strict=True):
        ours, decoded = recorded.our_verdict(change)
        if (ours, bool(decoded)) != theirs:
            different.append(f"{change}: {ours}, {theirs[0]} by the leaderboard")
    assert different == []
    # Neither all right nor all wrong, or agreement would say nothing.
    assert golden["count"] >= 2000
    assert 0.2 < sum(right) / golden["count"] < 0.8
