"""Pairs are one right and one wrong answer to the same question, and nothing but the answer says which is which."""

import json

import pytest

from harness.quickstart.pairs import write_pairs
from harness.quickstart.world import is_held_out
from harness.tools import check_call, match_calls, normalise_tools, read_call


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("pairs"), seed=3, train=1500, held_out=120)


def calls(answer):
    return [read_call(call) for message in answer for call in message.get("tool_calls", [])]


def test_the_same_seed_gives_the_same_bytes_and_another_seed_other_pairs(files, tmp_path):
    again, other = (write_pairs(tmp_path / str(seed), seed=seed, train=1500, held_out=120) for seed in (3, 4))
    for name in ("pairs_train", "pairs_eval"):
        assert getattr(files, name).read_bytes() == getattr(again, name).read_bytes() != getattr(other, name).read_bytes()


def test_the_chosen_answer_is_valid_and_the_rejected_one_is_another(files):
    for row in read(files.pairs_train) + read(files.pairs_eval):
        right, wrong = calls(row["chosen"]), calls(row["rejected"])
        tools = normalise_tools(row["tools"])
        assert not [problem for call in right for problem in check_call(call, tools)]
        assert not match_calls(wrong, right).exact


def test_no_held_out_question_is_trained_on_and_none_occurs_twice(files):
    train, held_out = ([row["prompt"][0]["content"] for row in read(path)] for path in (files.pairs_train, files.pairs_eval))
    assert (len(set(train)), len(set(held_out))) == (1500, 120)
    assert not any(map(is_held_out, train)) and all(map(is_held_out, held_out))


def test_answers_with_labels_are_one_side_of_each_pair_as_many_good_as_bad(files):
    pairs, answers = read(files.pairs_train), read(files.answers_train)
    assert len(pairs) == len(answers) and sum(row["label"] for row in answers) == len(answers) / 2
    for pair, answer in zip(pairs, answers, strict=True):
        assert answer["prompt"] == pair["prompt"]
        assert answer["completion"] == pair["chosen" if answer["label"] else "rejected"]


def test_neither_length_nor_the_absence_of_a_call_gives_the_right_answer_away(files):
    rows = read(files.pairs_train)
    longer = [len(json.dumps(row["chosen"])) - len(json.dumps(row["rejected"])) for row in rows]
    assert 0.46 < sum((gap > 0) + (gap == 0) / 2 for gap in longer) / len(rows) < 0.54
    silent = [[not calls(row[side]) for row in rows].count(True) / len(rows) for side in ("chosen", "rejected")]
    assert abs(silent[0] - silent[1]) < 0.04
