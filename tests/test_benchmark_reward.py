"""benchmarks/reward.py: its pure parts, and what it has written."""

import importlib
import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def reward():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        before = set(sys.modules)
        yield importlib.import_module("reward")
        for name in set(sys.modules) - before:
            if getattr(sys.modules[name], "__file__", None) and Path(sys.modules[name].__file__).parent == BENCHMARKS:
                del sys.modules[name]


def test_the_interval_is_wilsons(reward):
    # Newcombe 1998, table I: 81 of 263, and 0 of 20.
    assert reward.wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert reward.wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)


def test_a_rule_that_cannot_decide_is_half_right_and_rates_are_of_the_pairs_they_name(reward):
    assert reward.rate_of([2, 1, 0], [1, 1, 5])["accuracy"] == 0.5
    assert reward.rate_of([2, 1, 0], [1, 1, 5], [True, False, False])["accuracy"] == 1.0
    sides = {
        "chosen": {"scores": [1.0, 0.0, 3.0], "lengths": [5, 9, 2], "calls": [False, True, True]},
        "rejected": {"scores": [0.0, 1.0, 2.0], "lengths": [9, 5, 4], "calls": [True, True, True]},
    }
    found = {name: (of["pairs"], of["accuracy"]) for name, of in reward.judge_pairs(sides).items()}
    assert found["reward model"] == (3, pytest.approx(2 / 3)) and found["the longer answer"] == (3, pytest.approx(1 / 3))
    assert found[reward.RULE] == (3, pytest.approx(2 / 3))
    assert found["reward model, where the shorter is right"] == (2, 1.0)
    assert found["reward model, where both or none calls"] == (2, 0.5)


def test_a_question_is_on_one_side_whatever_stands_around_it(reward):
    def row(question, context):
        return {"conversations": [{"role": "system", "content": context}, {"role": "user", "content": question}, {"role": "assistant"}]}

    sides = {question: {reward.is_held_out(row(question, context)) for context in "abc"} for question in map(str, range(40))}
    assert all(len(side) == 1 for side in sides.values()) and {True, False} == set().union(*sides.values())


def test_the_committed_results_are_what_their_numbers_say_and_beat_a_coin_and_every_rule_where_rules_do_not_suffice(reward):
    result = json.loads((BENCHMARKS / "results" / "reward-cpu.json").read_text())
    assert reward.render(result) == (BENCHMARKS / "results" / "reward-cpu.md").read_text()
    for run in result["runs"]:
        judged = run["judged"]
        assert judged["reward model"]["interval"][0] > 0.5
        if run["set"] == reward.WORLD:
            rules = [of["interval"][1] for name, of in judged.items() if not name.startswith("reward model")]
            assert judged["reward model"]["interval"][0] > max(rules)
