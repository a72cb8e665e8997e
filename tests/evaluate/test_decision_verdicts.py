"""Verdicts on planted behaviours, each with the one remedy that its table leaves."""

import random

import pytest
from planted import GARBLED, KINDS, NEEDLESS, RIGHT, SILENT, WRONG_TOOL, WRONG_VALUE, ids_of, plant, without

from harness.evaluate.decision.verdicts import (
    DPO,
    FIX,
    KEEP,
    MISSES,
    OPEN,
    REACHES,
    RETRIEVE,
    SFT,
    UNKNOWN,
    Limits,
    Measured,
    decide,
    items_needed,
    least_items,
    state_of,
)
from harness.evaluate.statistics import wilson_interval

PROMPTS = ("zero-shot", "instruction", "polite", "few-shot")
DEFAULTS = Limits()
ONLY_TRAINING = {"otherwise": GARBLED, "sft": RIGHT, "sft+retrieval": RIGHT}


def verdict_on(table: dict, limits: Limits = DEFAULTS, leave_out: tuple = (), faults: dict | None = None):
    arms = without(plant(planted=table), *leave_out)
    (verdict,), _, _ = decide({"planted": ids_of("planted", table.get("items", 32))}, faults or {}, arms, limits)
    return verdict


# ---- one remedy each


def test_four_planted_behaviours_get_their_four_verdicts_in_one_report():
    arms = plant(
        prompted={"otherwise": 2, "instruction": 31, "sft": RIGHT},
        trained=ONLY_TRAINING,
        looked_up={"otherwise": 3, "retrieval": 32, "sft": 4, "sft+retrieval": 32},
        broken={"otherwise": WRONG_VALUE},
    )
    behaviours = {name: ids_of(name) for name in ("prompted", "trained", "looked_up", "broken")}
    faults = dict.fromkeys(ids_of("broken"), "gold breaks its tool's schema: start.minutes: is 5 (a number); must be string")
    verdicts, _, _ = decide(behaviours, faults, arms, Limits())
    assert [(v.behaviour, v.verdict, v.arm) for v in verdicts] == [
        ("prompted", KEEP, "instruction"),
        ("trained", SFT, "sft"),
        ("looked_up", RETRIEVE, "retrieval"),
        ("broken", FIX, None),
    ]
    assert "must be string" in " ".join(verdicts[3].reasons)


def test_what_the_base_does_anyway_needs_no_remedy():
    verdict = verdict_on({"otherwise": RIGHT})
    assert (verdict.verdict, verdict.arm) == (KEEP, "zero-shot")


def test_of_several_prompts_that_do_it_the_cheapest_is_named():
    verdict = verdict_on({"otherwise": 2, "instruction": 32, "polite": 31, "few-shot": 32})
    assert (verdict.verdict, verdict.arm) == (KEEP, "polite")


def test_a_prompt_is_preferred_to_documents_and_documents_to_training():
    assert verdict_on({"otherwise": 32, "zero-shot": 2}).verdict == KEEP
    assert verdict_on({"otherwise": 2, "retrieval": 32, "sft": 32}).verdict == RETRIEVE


def test_a_model_that_reaches_it_after_preference_training_says_dpo():
    arms = [Measured(a.name, a.kind, a.outcomes, a.tokens, "dpo" if a.name == "sft" else a.method) for a in plant(planted=ONLY_TRAINING)]
    (verdict,), _, _ = decide({"planted": ids_of("planted")}, {}, arms, Limits())
    assert (verdict.verdict, verdict.arm) == (DPO, "sft")


def test_a_fact_that_training_alone_does_not_bring_may_need_both_and_a_small_model_may_be_the_one_that_has_learnt_it():
    # The documents alone do not do it, and the trained model only with them.
    both = verdict_on({"otherwise": GARBLED, "sft+retrieval": RIGHT})
    assert (both.verdict, both.arm) == (SFT, "sft+retrieval")
    small = verdict_on({"otherwise": GARBLED, "distilled": 31})
    assert (small.verdict, small.arm) == (SFT, "distilled")


# ---- training, when no trained model has shown it


UNTRAINED = ("sft", "sft+retrieval", "distilled")


@pytest.mark.parametrize(
    ("failing", "expected"),
    [
        (GARBLED, SFT),  # the form is not known
        (WRONG_VALUE, SFT),
        (SILENT, SFT),  # it never forms a call here: it cannot
        (NEEDLESS, DPO),
        (WRONG_TOOL, DPO),
        ([SILENT] * 20 + [WRONG_TOOL] * 12, DPO),  # it can, and often does not
        ([GARBLED] * 20 + [WRONG_TOOL] * 12, SFT),
    ],
)
def test_the_way_in_which_items_fail_chooses_between_showing_and_preferring(failing, expected):
    verdict = verdict_on({"otherwise": failing}, leave_out=UNTRAINED)
    assert verdict.verdict == expected and verdict.arm is None
    assert "no fine-tuned model was among the arms" in " ".join(verdict.reasons)


def test_a_right_answer_that_some_prompt_brings_out_is_within_reach_and_asks_for_dpo():
    # Each prompt has other eight items right: three of four prompts fail on every item.
    table = {name: [RIGHT if at // 8 == place else WRONG_VALUE for at in range(32)] for place, name in enumerate(PROMPTS)}
    verdict = verdict_on(table | {"retrieval": 0}, Limits(fails_in=3), UNTRAINED)
    assert verdict.verdict == DPO and len(verdict.consistent) == 32


def test_items_that_fail_under_other_prompts_each_time_ask_for_a_better_prompt_and_no_training():
    table = {name: [RIGHT if (at + place) % 2 else WRONG_VALUE for at in range(32)] for place, name in enumerate(PROMPTS)}
    verdict = verdict_on(table | {"retrieval": 0, "sft": 32}, Limits(fails_in=4))
    assert all(row.state == MISSES for row in verdict.rows if row.arm in PROMPTS)
    assert (verdict.verdict, verdict.arm) == (KEEP, None)
    assert "each prompt fails on others" in verdict.reasons[0]


def test_choices_that_remain_after_sft_ask_for_dpo_and_other_failures_for_more_of_it():
    left = [RIGHT] * 16 + [NEEDLESS] * 16
    verdict = verdict_on({"otherwise": GARBLED, "sft": left, "sft+retrieval": left})
    assert verdict.verdict == DPO and "16 of its 16 failures are choices" in " ".join(verdict.reasons)
    verdict = verdict_on({"otherwise": GARBLED, "sft": 16, "sft+retrieval": 16})
    assert verdict.verdict == SFT and "needs more rows" in " ".join(verdict.reasons)
    # Choices are half of what remains, and no more.
    half = [RIGHT] * 16 + [NEEDLESS] * 8 + [WRONG_VALUE] * 8
    assert verdict_on({"otherwise": GARBLED, "sft": half, "sft+retrieval": half}).verdict == SFT
    verdict = verdict_on({"otherwise": GARBLED})
    assert verdict.verdict == SFT and "read its rows before training again" in " ".join(verdict.reasons)


def test_a_training_that_made_it_worse_is_not_said_to_be_better():
    few = [RIGHT] * 10 + [GARBLED] * 22
    verdict = verdict_on({"otherwise": few, "sft": GARBLED, "sft+retrieval": GARBLED, "distilled": GARBLED})
    said = " ".join(verdict.reasons)
    assert verdict.verdict == SFT and "this training did not teach it" in said and "though it is better" not in said
    assert verdict.row("sft").p_holm < 0.05


# ---- never on noise


def test_so_few_items_that_all_right_would_not_show_it_are_not_enough():
    verdict = verdict_on({"otherwise": GARBLED, "sft": RIGHT, "items": 15})
    assert (verdict.verdict, verdict.needs) == (UNKNOWN, 16)
    assert verdict_on({"otherwise": GARBLED, "sft": RIGHT, "sft+retrieval": RIGHT, "items": 16}).verdict == SFT


def test_a_prompt_that_may_still_reach_the_target_holds_back_the_training():
    verdict = verdict_on({"otherwise": 2, "polite": 24, "sft": 32})
    assert verdict.verdict == UNKNOWN and "polite may reach" in verdict.reasons[0]
    low, high = wilson_interval(round(0.75 * verdict.needs), verdict.needs)
    assert high < 0.8 and verdict.needs > 32


def test_a_gain_that_chance_could_have_made_is_no_remedy():
    # 9 of 16 misses 80 %, 16 of 16 reaches it, and 7 to 0 is p = 1/64 by itself; among six arms it is not.
    table = {"otherwise": 9, "instruction": 16, "items": 16}
    verdict = verdict_on(table)
    assert verdict.row("zero-shot").state == MISSES and verdict.row("instruction").state == REACHES
    assert verdict.row("instruction").p == 1 / 64 and verdict.row("instruction").p_holm > 0.05
    assert verdict.verdict == UNKNOWN and "by chance" in verdict.reasons[0] and verdict.needs > 16
    assert verdict_on(table, leave_out=("polite", "few-shot", "retrieval", *UNTRAINED)).verdict == KEEP


def test_a_trained_model_that_reaches_it_by_what_may_be_chance_is_not_said_to_have_learnt_nothing():
    verdict = verdict_on({"otherwise": 9, "sft": 16, "items": 16}, leave_out=("retrieval",))
    assert verdict.row("sft").state == REACHES and verdict.row("sft").p_holm > 0.05
    assert (verdict.verdict, verdict.arm) == (UNKNOWN, None) and verdict.needs > 16
    assert "sft 100% (81% to 100%) may be better than zero-shot by chance" in verdict.reasons[0]
    assert "7 of 16 items fail in all 4 prompts" in verdict.reasons[-1] and "does not reach it" not in " ".join(verdict.reasons)


def test_models_that_are_coins_get_no_verdict_that_asks_for_work():
    """All arms are the same coin: under the correction almost no world of six behaviours may show a remedy."""
    rng, asked = random.Random(1), 0
    for _ in range(40):
        names = [f"b{number}" for number in range(6)]
        arms = plant(**{name: {"zero-shot": 0} for name in names})
        arms = [
            Measured(a.name, a.kind, {id: RIGHT if rng.random() < 0.5 else WRONG_VALUE for id in a.outcomes}, a.tokens, a.method)
            for a in arms
        ]
        verdicts, _, regressions = decide({name: ids_of(name) for name in names}, {}, arms, Limits())
        asked += any(v.arm not in (None, "zero-shot") for v in verdicts) or bool(regressions)
    assert asked <= 5  # 5 % of 40 is 2; 6 or more has a probability below 2 % at that rate


# ---- data


def test_some_faulty_gold_is_left_out_and_much_of_it_is_the_verdict():
    ids = ids_of("planted")
    some, much = (
        dict.fromkeys(ids[:6], "gold breaks its tool's schema: x"),
        dict.fromkeys(ids[:7], "gold contradicts b, which asks the same"),
    )
    left = verdict_on(ONLY_TRAINING, faults=some)
    assert left.verdict == SFT and left.rows[0].n == 26 and list(left.faulty) == ids[:6]
    assert verdict_on(ONLY_TRAINING, faults=much).verdict == FIX


@pytest.mark.parametrize(("items", "faulty", "target"), [(20, 4, 0.8), (50, 5, 0.9), (40, 18, 0.55)])
def test_just_as_much_faulty_gold_as_the_target_leaves_is_left_out(items, faulty, target):
    ids = ids_of("planted", items)
    table = {name: [RIGHT] * items for name in KINDS} | {"items": items}
    few, more = (dict.fromkeys(ids[:count], "gold breaks its tool's schema: x") for count in (faulty, faulty + 1))
    assert verdict_on(table, Limits(target=target), faults=few).verdict != FIX
    assert verdict_on(table, Limits(target=target), faults=more).verdict == FIX


# ---- guards


def test_what_a_trained_model_forgot_is_reported_and_what_fell_by_chance_is_not():
    arms = plant(new=ONLY_TRAINING, old={"otherwise": RIGHT, "sft": 10}, kept={"otherwise": RIGHT, "sft": 30, "sft+retrieval": 32})
    _, guarded, regressions = decide({"new": ids_of("new")}, {}, arms, Limits(), {"old": ids_of("old"), "kept": ids_of("kept")})
    assert [(one.behaviour, one.arm, one.guarded, one.lost) for one in regressions] == [("old", "sft", True, 22)]
    assert (regressions[0].before, regressions[0].after) == (1.0, 10 / 32)
    assert [rows[0].n for rows in guarded] == [32, 32]


def test_a_prompt_that_breaks_another_behaviour_is_a_regression_too():
    arms = plant(calls={"otherwise": 2, "instruction": 32}, abstains={"otherwise": RIGHT, "instruction": NEEDLESS})
    verdicts, _, regressions = decide({name: ids_of(name) for name in ("calls", "abstains")}, {}, arms, Limits())
    assert [v.verdict for v in verdicts] == [KEEP, KEEP] and verdicts[0].arm == "instruction"
    assert [(one.behaviour, one.arm) for one in regressions] == [("abstains", "instruction")]


# ---- numbers, by a second derivation


def test_the_number_of_items_that_is_asked_for_is_the_least_that_shows_it():
    for target in (0.5, 0.8, 0.9, 0.95, 0.99999):
        limits = Limits(target=target)
        n = least_items(limits)
        assert wilson_interval(n, n)[0] >= target > wilson_interval(n - 1, n - 1)[0]
    assert state_of(wilson_interval(28, 32), 0.8) == OPEN
    needed = items_needed(28 / 32, Limits())
    assert state_of(wilson_interval(round(28 / 32 * needed), needed), 0.8) == REACHES
    assert items_needed(0.8, Limits()) is None
