"""The world is reproducible, honest about what is held out, and every gold call is one that the tools accept."""

import json
import re
import subprocess
import sys

import jsonschema
import pytest

from harness.quickstart import world
from harness.quickstart.world import ABSTENTION, ADAPT_TOOLS, BASE_TOOLS, Sizes, is_held_out, write_world

SMALL = Sizes(base_train=600, base_eval=120, adapt_train=600, adapt_eval=120)


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def questions(path):
    return [row["messages"][0]["content"] for row in read(path)]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("world"), seed=3, sizes=SMALL)


def all_of(files):
    return files.base_train, files.base_eval, files.adapt_train, files.adapt_eval


def test_the_same_seed_gives_the_same_bytes_and_another_seed_other_rows(files, tmp_path):
    again, other = write_world(tmp_path / "again", seed=3, sizes=SMALL), write_world(tmp_path / "other", seed=4, sizes=SMALL)
    for first, second, third in zip(all_of(files), all_of(again), all_of(other), strict=True):
        assert first.read_bytes() == second.read_bytes() != third.read_bytes()


def test_no_eval_question_is_in_a_train_file_of_this_or_another_seed(files, tmp_path):
    other = write_world(tmp_path, seed=4, sizes=SMALL)
    train = {q for f in (files, other) for path in (f.base_train, f.adapt_train) for q in questions(path)}
    held_out = {q for path in (files.base_eval, files.adapt_eval) for q in questions(path)}
    assert not train & held_out
    assert not any(is_held_out(q) for q in train)


def test_a_held_out_question_is_not_trained_in_other_politeness_either(files):
    def words(question: str) -> str:  # a second derivation: what no opener and no closer of the world holds
        return re.sub(r"^(please |can you |hey, |now )+|(\.|!|, thanks)+$", "", question)

    for train in (files.base_train, files.adapt_train):
        asked = {words(question) for question in questions(train)}
        for held_out in (files.base_eval, files.adapt_eval):
            assert not [question for question in questions(held_out) if words(question) in asked]


def test_files_have_the_asked_sizes_and_no_question_twice(files):
    assert [len(questions(path)) for path in all_of(files)] == [600, 120, 600, 120]
    assert all(len(set(questions(path))) == len(questions(path)) for path in all_of(files))


def test_every_gold_call_validates_and_is_for_a_listed_tool(files):
    for path in all_of(files):
        for row in read(path):
            schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in row["tools"]}
            for call in row["messages"][1].get("tool_calls", []):
                jsonschema.Draft202012Validator.check_schema(schemas[call["function"]["name"]])
                jsonschema.Draft202012Validator(schemas[call["function"]["name"]]).validate(call["function"]["arguments"])


def test_every_argument_that_is_not_a_flag_is_said_in_the_question(files):
    for row in read(files.base_train) + read(files.adapt_train):
        for call in row["messages"][1].get("tool_calls", []):
            for value in call["function"]["arguments"].values():
                for word in value if isinstance(value, list) else [value]:
                    assert isinstance(word, bool) or str(word) in row["messages"][0]["content"]


def test_every_tool_is_asked_for_and_about_one_row_in_seven_is_for_none(files):
    for path, tools in ((files.base_train, BASE_TOOLS), (files.adapt_train, ADAPT_TOOLS)):
        answers = [row["messages"][1] for row in read(path)]
        called = [answer["tool_calls"][0]["function"]["name"] for answer in answers if "tool_calls" in answer]
        assert set(called) == {tool.name for tool in tools}
        abstentions = [answer for answer in answers if "tool_calls" not in answer]
        assert all(answer == {"role": "assistant", "content": ABSTENTION} for answer in abstentions)
        assert 0.07 < len(abstentions) / len(answers) < 0.22


def test_rows_list_their_own_worlds_six_tools_and_the_worlds_share_none(files):
    base, adapt = {t.name for t in BASE_TOOLS}, {t.name for t in ADAPT_TOOLS}
    assert len(base) == len(adapt) == 6 and not base & adapt
    for path, names in zip(all_of(files), (base, base, adapt, adapt), strict=True):
        assert all({tool["function"]["name"] for tool in row["tools"]} == names for row in read(path))


@pytest.mark.parametrize("tools", [BASE_TOOLS, ADAPT_TOOLS])
def test_each_world_has_every_kind_of_parameter(tools):
    parameters = [p for tool in tools for p in tool.parameters]
    assert {p.schema["type"] for p in parameters} == {"string", "integer", "number", "boolean", "array"}
    assert any("enum" in p.schema for p in parameters)
    assert {p.required for p in parameters} == {True, False}


def test_asking_for_more_questions_than_there_are_is_refused(tmp_path, monkeypatch):
    (music,) = (tool for tool in BASE_TOOLS if tool.name == "play_music")
    monkeypatch.setattr(world, "BASE_TOOLS", (music,))
    monkeypatch.setattr(world, "ADAPT_TOOLS", (music,))
    monkeypatch.setattr(world, "OFF_TOPIC", music)
    with pytest.raises(ValueError, match=r"base-eval\.jsonl: 9000 rows asked; the world has only \d+ distinct questions"):
        write_world(tmp_path, seed=0, sizes=Sizes(base_train=10, base_eval=9000, adapt_train=10, adapt_eval=10))


def test_the_world_is_made_without_torch():
    program = "import sys, harness.quickstart.world; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
