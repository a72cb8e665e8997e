"""When a run is saved."""

import math

import pytest

from harness.checkpoint.cadence import FIRST_AFTER_S, SHORTEST_S, Cadence, best_interval_s, interruption_interval_s
from harness.recipe.schema import Checkpoint


def lost_per_second(interval_s: float, save_s: float, interruption_s: float) -> float:
    """Share of time that goes to saves and to work done again, when interruptions are a Poisson process: Daly's model without restart time,
    worked out from the expected time that a segment of work and save takes when it begins anew after every interruption."""
    segment = interval_s + save_s
    return interruption_s * math.expm1(segment / interruption_s) / interval_s


@pytest.mark.parametrize(("save_s", "interruption_s"), [(0.5, 3600), (20, 3600), (120, 86400), (600, 7200)])
def test_the_interval_is_the_one_that_loses_the_least_time(save_s, interruption_s):
    chosen = best_interval_s(save_s, interruption_s)
    searched = min((10 ** (1 + index / 2000) for index in range(10000)), key=lambda tau: lost_per_second(tau, save_s, interruption_s))
    assert chosen == pytest.approx(searched, rel=0.01)


def test_a_save_that_takes_as_long_as_a_machine_lives_is_made_once_in_its_life():
    assert best_interval_s(5000, 1000) == 1000


def test_more_ranks_are_interrupted_more_often():
    assert interruption_interval_s(1) == pytest.approx(24 * 3600, rel=0.001)
    assert interruption_interval_s(16384) == pytest.approx(3600 / (1 / 24 + 16384 / 50_000), rel=1e-9)


def test_steps_are_counted_from_the_beginning_of_the_run():
    cadence = Cadence(Checkpoint(every_steps=3), 1, now=0)
    assert [step for step in range(1, 10) if cadence.is_due(step, now=1e9)] == [3, 6, 9]


def test_minutes_are_counted_from_the_last_save():
    cadence = Cadence(Checkpoint(every_minutes=2), 1, now=100)
    assert not cadence.is_due(1, 219.9) and cadence.is_due(2, 220)
    assert not cadence.saved(5, now=230)
    assert not cadence.is_due(3, 349) and cadence.is_due(4, 350)


def test_auto_measures_its_first_save_and_says_what_it_made_of_it():
    cadence = Cadence(Checkpoint(), 8, now=0)
    assert "first checkpoint after 5 minutes" in cadence.describe()
    assert not cadence.is_due(1, FIRST_AFTER_S - 1) and cadence.is_due(1, FIRST_AFTER_S)
    assert cadence.saved(40, now=FIRST_AFTER_S)
    expected = best_interval_s(40, interruption_interval_s(8))
    assert cadence.interval_s == expected
    assert cadence.describe() == (
        f"a checkpoint every {expected / 60:.1f} minutes: a save takes 40.00 s, and one interruption in 24 h is assumed (Young and Daly)"
    )
    assert not cadence.saved(0.0001, now=400)
    assert cadence.interval_s == SHORTEST_S


def test_without_auto_and_interval_nothing_is_ever_due():
    cadence = Cadence(Checkpoint(auto=False), 1, now=0)
    assert not cadence.is_on and not cadence.is_due(1, 1e9) and cadence.describe() == "no checkpoints, but when it is told to stop"
