"""Predictions that came from anywhere: what is scored, what is an error of the file, and what `harness score` prints."""

import json
import re

import pytest
from click.testing import CliRunner
from conftest import SHARED, harness, needs_shared

from harness.cli import group
from harness.errors import DataError
from harness.evaluate.scoring import CLASS_OF_FAILURE, CLASSES, MODES, load_predictions, report_scores, score_predictions
from harness.evaluate.suite import CATEGORIES, REFUSED, category_of, load_questions
from harness.tools import FAILURES

WEATHER = {
    "name": "weather.now",
    "description": "…",
    "parameters": {"type": "dict", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}, "required": ["city"]},
}
QUESTIONS = [
    *({"id": f"simple_python_{n}", "question": [[]], "function": [WEATHER]} for n in range(3)),
    {"id": "parallel_0", "question": [[]], "function": [WEATHER]},
    *({"id": f"irrelevance_{n}", "question": [[]], "function": [WEATHER]} for n in range(4)),
    {"id": "live_relevance_0-0-0", "question": [[]], "function": [WEATHER]},
]
PARIS, ROME = {"weather.now": {"city": ["Paris"], "days": ["", 1]}}, {"weather.now": {"city": ["Rome"]}}
ANSWERS = [*({"id": f"simple_python_{n}", "ground_truth": [PARIS]} for n in range(3)), {"id": "parallel_0", "ground_truth": [PARIS, ROME]}]


def call(name="weather.now", **arguments):
    return {"name": name, "arguments": arguments}


def write(path, rows):
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return path


@pytest.fixture
def files(tmp_path):
    return write(tmp_path / "questions.json", QUESTIONS), write(tmp_path / "answers.json", ANSWERS)


@pytest.fixture
def report(files, tmp_path):
    def scored(mode, *rows, **options):
        questions = load_questions([files[0]], [files[1]], **options)
        judged = score_predictions(load_predictions(write(tmp_path / "predictions.jsonl", rows)), questions, mode)
        return report_scores(judged, questions, suite="bfcl", mode=mode)

    return scored


def kind_of(report, mode, row):
    found = report(mode, row)
    (kind,) = [name for name, count in found["by_class"].items() if count]
    return kind, found["correct"] == 1


BROKEN = '<tool_call>{"name": "weather.now", "arguments": {"city": "Par'

# what was predicted, and (class, right) by the leaderboard's rules and strictly
ROWS = [
    ({"id": "simple_python_0", "calls": [call(city="Paris")]}, ("right", True), ("right", True)),
    ({"id": "simple_python_0", "calls": [{"name": "weather.now", "arguments": '{"city": "Paris"}'}]}, ("right", True), ("right", True)),
    ({"id": "simple_python_0", "calls": [{"type": "function", "function": call(city="Paris")}]}, ("right", True), ("right", True)),
    ({"id": "simple_python_0", "text": "[weather.now(city='Paris')]"}, ("right", True), ("right", True)),
    ({"id": "simple_python_0", "text": f"<tool_call>{json.dumps(call(city='Paris'))}</tool_call>"}, ("right", True), ("right", True)),
    ({"id": "simple_python_0", "calls": [call(city="paris.")]}, ("right", True), ("value", False)),
    ({"id": "simple_python_0", "text": "weather.now('Rome', city='Paris')"}, ("right", True), ("malformed", False)),
    ({"id": "simple_python_0", "text": "```python\n[weather.now(city='Paris')]\n```"}, ("malformed", False), ("right", True)),
    ({"id": "simple_python_0", "calls": [call(city="Rome")]}, ("value", False), ("value", False)),
    ({"id": "simple_python_0", "calls": [call(city=5)]}, ("type", False), ("type", False)),
    ({"id": "simple_python_0", "calls": [call(city="Paris", days="1")]}, ("type", False), ("type", False)),
    ({"id": "simple_python_0", "calls": [call(city="Paris", days=1.0)]}, ("type", False), ("right", True)),
    ({"id": "simple_python_0", "calls": [call(days=1)]}, ("missing", False), ("missing", False)),
    ({"id": "simple_python_0", "calls": [call(city="Paris", hour=1)]}, ("extra", False), ("extra", False)),
    ({"id": "simple_python_0", "calls": [call("weather_now", city="Paris")]}, ("wrong_tool", False), ("wrong_tool", False)),
    ({"id": "simple_python_0", "calls": []}, ("missing_call", False), ("missing_call", False)),
    ({"id": "simple_python_0", "text": "I cannot."}, ("missing_call", False), ("missing_call", False)),
    ({"id": "simple_python_0", "text": ""}, ("missing_call", False), ("missing_call", False)),
    ({"id": "simple_python_0", "calls": [call(city="Paris")] * 2}, ("needless_call", False), ("needless_call", False)),
    ({"id": "simple_python_0", "text": BROKEN}, ("malformed", False), ("malformed", False)),
    ({"id": "simple_python_0", "calls": [{"name": "weather.now", "arguments": "{"}]}, ("malformed", False), ("malformed", False)),
    ({"id": "simple_python_0", "calls": ["weather.now"]}, ("malformed", False), ("malformed", False)),
    ({"id": "parallel_0", "calls": [call(city="Rome"), call(city="Paris")]}, ("right", True), ("right", True)),
    ({"id": "parallel_0", "calls": [call(city="Rome")]}, ("missing_call", False), ("missing_call", False)),
    ({"id": "parallel_0", "calls": [call(city="Rome")] * 3}, ("needless_call", False), ("needless_call", False)),
    ({"id": "irrelevance_0", "text": "None of my tools can."}, ("right_abstention", True), ("right_abstention", True)),
    ({"id": "irrelevance_0", "calls": []}, ("right_abstention", True), ("right_abstention", True)),
    ({"id": "irrelevance_0", "text": ""}, ("right_abstention", True), ("no_answer", False)),
    ({"id": "irrelevance_0", "calls": [call(city="Paris")]}, ("needless_call", False), ("needless_call", False)),
    ({"id": "irrelevance_0", "text": "weather.now(city='Paris')"}, ("needless_call", False), ("needless_call", False)),
    # gorilla#1362: credited by the leaderboard, and never called an abstention here
    ({"id": "irrelevance_0", "text": BROKEN}, ("malformed", True), ("malformed", False)),
    ({"id": "irrelevance_0", "calls": [{"name": "weather.now", "arguments": "{"}]}, ("malformed", True), ("malformed", False)),
]


@pytest.mark.parametrize(("row", "by_leaderboard", "strictly"), ROWS)
def test_an_answer_has_a_class_in_both_modes(report, row, by_leaderboard, strictly):
    assert kind_of(report, "bfcl", row) == by_leaderboard
    assert kind_of(report, "strict", row) == strictly


def test_every_class_of_the_report_occurs_and_every_failure_has_one():
    seen = {kind for _, *verdicts in ROWS for kind, _ in verdicts}
    assert seen == set(CLASSES)
    assert set(CLASS_OF_FAILURE) - {None} | {"wrong_count"} == set(FAILURES)


def test_relevance_needs_any_call_and_has_no_strict_verdict(report):
    row = {"id": "live_relevance_0-0-0", "calls": [call("anything")]}
    assert kind_of(report, "bfcl", row) == ("right", True)
    assert kind_of(report, "bfcl", {**row, "calls": []}) == ("missing_call", False)
    with pytest.raises(DataError, match="live_relevance has no gold.*--mode bfcl"):
        report("strict", row)


def test_the_report_counts_by_category_and_says_what_it_was_not_given(report):
    rows = [
        {"id": "irrelevance_0", "text": BROKEN},
        {"id": "irrelevance_1", "text": "No."},
        {"id": "simple_python_0", "calls": [call(city="Paris")]},
        {"id": "simple_python_1", "calls": [call(city="Rome")]},
    ]
    found = report("bfcl", *rows)
    assert (found["n"], found["correct"], found["accuracy"]) == (4, 3, 0.75)
    assert sum(found["by_class"].values()) == 4
    assert list(found["by_category"]) == ["simple_python", "irrelevance"]
    simple = found["by_category"]["simple_python"]
    assert (simple["n"], simple["accuracy"], simple["unanswered"]) == (2, 0.5, 1)
    assert simple["interval"][0] < 0.5 < simple["interval"][1]
    assert found["abstention"] == {"n": 2, "right": 1, "malformed_taken_for_right": ["irrelevance_0"]}
    assert found["failing"] == [
        {
            "id": "simple_python_1",
            "category": "simple_python",
            "class": "value",
            "failure": "wrong_value",
            "reason": "weather.now.city is 'Rome'; must be 'Paris'",
        }
    ]
    strict = report("strict", *rows)
    assert (strict["accuracy"], strict["abstention"]["right"], strict["abstention"]["malformed_taken_for_right"]) == (0.5, 1, [])
    assert [row["id"] for row in strict["failing"]] == ["irrelevance_0", "simple_python_1"]


def test_names_that_a_server_wanted_without_dots_are_known_when_it_is_said(report):
    row = {"id": "simple_python_0", "calls": [call("weather_now", city="Paris")]}
    for mode in MODES:
        assert report(mode, row)["correct"] == 0
        assert report(mode, row, underscore_names=True)["correct"] == 1


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["{"], "predictions.jsonl:1: is not JSON"),
        (["[]"], "predictions.jsonl:1: must be an object"),
        ([{"text": "x"}], 'predictions.jsonl:1: has no "id"'),
        ([{"id": 3, "text": "x"}], 'predictions.jsonl:1: has no "id"'),
        (
            [{"id": "simple_python_0", "text": "x"}, "", {"id": "simple_python_0", "calls": []}],
            "jsonl:3: the id .* stands in .*jsonl:1 already",
        ),
        ([{"id": "simple_python_0"}], 'has neither of "calls" and "text"'),
        ([{"id": "simple_python_0", "text": "x", "calls": []}], 'has both of "calls" and "text"'),
        ([{"id": "simple_python_0", "text": None}], "is no text"),
        ([{"id": "simple_python_0", "calls": {}}], "is no list"),
        ([{"id": "simple_python_9", "text": "x"}], 'jsonl:1: "simple_python_9" is in no file of questions; --questions must name'),
        ([{"id": "simple_pyton_0", "text": "x"}], 'names no category of BFCL; did you mean "simple_python"'),
        ([{"id": "q7", "text": "x"}], "names no category of BFCL; must be one of simple_python"),
        (
            [{"id": "multi_turn_base_0", "text": "x"}],
            'jsonl:1: the category "multi_turn_base" is not scored here: it is judged by the state',
        ),
        ([], "has no row; nothing can be scored"),
    ],
)
def test_a_row_that_is_wrong_by_the_file_and_not_by_the_model_is_an_error(report, rows, message):
    with pytest.raises(DataError, match=message):
        report("strict", *rows)


@pytest.mark.parametrize(
    "category", ["simple_java", "simple_javascript", "multi_turn_miss_func", "memory_kv", "web_search_base", "exec_simple", "sql"]
)
def test_what_cannot_be_scored_is_refused_with_its_reason(category):
    with pytest.raises(DataError, match=f'the category "{category}" is not scored here: '):
        category_of(f"{category}_12")


def test_every_category_is_scored_or_refused():
    assert all(category_of(f"{category}_106-63-0") == category for category in CATEGORIES)
    assert not set(CATEGORIES) & set(REFUSED)


@pytest.mark.parametrize(
    ("questions", "answers", "message"),
    [
        ([QUESTIONS[0], QUESTIONS[0]], ANSWERS, 'questions.json:2: the id "simple_python_0" has occurred before'),
        (ANSWERS, ANSWERS, 'questions.json:1: "simple_python_0" has no list of functions'),
        ([{"id": "simple_python_0", "function": [{"name": "f"}]}], ANSWERS, 'the function "f" has no parameters'),
        ([{"id": "simple_python_0", "function": [{"name": "f", "parameters": {"properties": {"a": None}}}]}], ANSWERS, "has no parameters"),
        ([{"id": "simple_java_0", "function": [WEATHER]}], ANSWERS, "questions.json:1: the category .* Java source"),
        (QUESTIONS, QUESTIONS, 'answers.json:1: "simple_python_0" has no answers as the leaderboard writes them'),
        (QUESTIONS, [{"id": "simple_python_0", "ground_truth": [{"f": {"city": "Paris"}}]}], "has no answers as"),
        (QUESTIONS, [{"id": "simple_python_0", "ground_truth": []}], "has no answers as"),
        (QUESTIONS, ANSWERS[:1] * 2, "answers.json:2: the id .* stands in .*answers.json:1 already"),
        (QUESTIONS, [{"id": "simple_python_0", "ground_truth": [PARIS, ROME]}], "answers.json:1: has 2 calls; simple_python must have one"),
        (
            QUESTIONS,
            [{"id": "parallel_0", "ground_truth": [{"weather": {}}]}],
            'calls "weather", which its question does not offer; did you',
        ),
        (["nonsense"], ANSWERS, "questions.json:1: is not JSON"),
        ([["id"]], ANSWERS, "questions.json:1: is no row of questions"),
    ],
)
def test_questions_and_answers_that_do_not_fit_are_an_error_with_its_line(tmp_path, questions, answers, message):
    with pytest.raises(DataError, match=message):
        load_questions([write(tmp_path / "questions.json", questions)], [write(tmp_path / "answers.json", answers)])


def test_a_question_without_an_answer_is_an_error_only_where_it_was_answered(files, tmp_path):
    questions = load_questions([files[0]], [write(tmp_path / "few.json", ANSWERS[:1])])
    rows = write(tmp_path / "p.jsonl", [{"id": "simple_python_0", "calls": []}])
    assert len(score_predictions(load_predictions(rows), questions, "bfcl")) == 1
    rows = write(tmp_path / "p.jsonl", [{"id": "simple_python_1", "calls": []}])
    with pytest.raises(DataError, match='p.jsonl:1: "simple_python_1" has no answer; give its file with --answers'):
        score_predictions(load_predictions(rows), questions, "bfcl")


def test_a_folder_gives_the_categories_that_are_scored(tmp_path):
    with pytest.raises(DataError, match="has no questions of BFCL; must have BFCL_v4_simple_python.json"):
        load_questions([tmp_path], [])
    with pytest.raises(DataError, match="there is no such file of questions"):
        load_questions([tmp_path / "nowhere"], [])
    write(tmp_path / "BFCL_v4_irrelevance.json", QUESTIONS[4:8])
    write(tmp_path / "BFCL_v4_simple_java.json", [{"id": "simple_java_0"}])
    write(tmp_path / "notes.json", ["no row"])
    assert len(load_questions([tmp_path], [])) == 4


def test_the_command_prints_tables_for_people_and_everything_as_json(files, tmp_path):
    rows = [{"id": "simple_python_0", "calls": [call(city="Rome")]}, {"id": "irrelevance_0", "text": BROKEN}]
    predictions = write(tmp_path / "predictions.jsonl", rows)
    arguments = ["score", str(predictions), "--suite", "bfcl", "--questions", str(files[0]), "--answers", str(files[1]), "--mode", "bfcl"]
    shown = CliRunner().invoke(group, arguments)
    assert shown.exit_code == 0
    for line in (
        r"simple_python\s+0.0%\s+0.0% to 79.3%\s+0 of 1\s+2",
        r"irrelevance\s+100.0%\s+20.7% to 100.0%\s+1 of 1\s+3",
        r"value\s+1",
        r"1 of the 1 rows where nothing is to be called are right by the leaderboard's rules",
        r"simple_python_0\s+value\s+weather.now.city is 'Rome'; must be 'Paris'",
    ):
        assert re.search(line, shown.output), line
    assert "overall" not in shown.output
    found = json.loads(CliRunner().invoke(group, [*arguments, "--json"]).output)
    assert {"accuracy", "n", "by_class", "by_category", "failing"} <= set(found)
    assert (found["accuracy"], found["n"]) == (0.5, 2)


def test_half_of_a_character_in_an_answer_is_told_by_its_escape_and_ends_nothing(files, tmp_path):
    questions, answers = files
    row = {"id": "simple_python_0", "calls": [call(city="Paris \ud83d")]}
    predictions = write(tmp_path / "p.jsonl", [row, {"id": "irrelevance_0", "text": "\ud83d"}])
    command = ["score", predictions, "--suite", "bfcl", "--questions", questions, "--answers", answers, "--mode", "strict"]
    done, as_json = harness(*command), harness(*command, "--json")
    assert done.code == as_json.code == 0, done.output + as_json.output
    assert "\\ud83d" in done.output
    assert json.loads(as_json.output)["failing"][0]["id"] == "simple_python_0"


def test_the_command_ends_with_2_and_the_line_that_is_wrong(files, tmp_path):
    predictions = write(tmp_path / "predictions.jsonl", ["{"])
    done = harness("score", predictions, "--suite", "bfcl", "--questions", files[0], "--mode", "strict")
    assert done.code == 2
    assert f"DataError: {predictions}:1: is not JSON" in done.output


@needs_shared
@pytest.mark.parametrize("mode", MODES)
def test_all_gold_of_the_leaderboard_scores_1000_of_1000(mode, tmp_path):
    from harness.tools import read_gold, render_gold

    bfcl = SHARED / "bfcl"
    questions = load_questions([bfcl], [bfcl / "possible_answer"])
    rows = [
        {
            "id": one.id,
            "calls": [{"name": gold.name, "arguments": gold.arguments} for gold in render_gold(read_gold(one.gold, one.functions))],
        }
        for one in questions.values()
        if one.gold
    ]
    predictions = load_predictions(write(tmp_path / "gold.jsonl", rows))
    found = report_scores(score_predictions(predictions, questions, mode), questions, suite="bfcl", mode=mode)
    assert (found["n"], found["correct"], found["failing"]) == (1000, 1000, [])
