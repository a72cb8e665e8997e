import math
import time
from fractions import Fraction
from statistics import NormalDist

import pytest

from harness.evaluate.statistics import holm, mcnemar_exact, wilson_interval


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],  # Newcombe 1998, table I, method 3
)
def test_intervals_are_those_that_were_published(successes, trials, low, high):
    assert wilson_interval(successes, trials) == pytest.approx((low, high), abs=5e-5)


def root(function, low, high):
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if (function(middle) > 0) == (function(low) > 0) else (low, middle)
    return low


@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.99])
def test_the_bounds_are_the_rates_that_a_score_test_just_does_not_reject(confidence):
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    for trials in (1, 7, 400):
        for successes in {0, 1, trials // 2, trials - 1, trials}:
            seen = successes / trials

            def rejects(rate, seen=seen, trials=trials):
                return (seen - rate) ** 2 - z * z * rate * (1 - rate) / trials

            low, high = wilson_interval(successes, trials, confidence)
            assert low == pytest.approx(root(rejects, 1e-15, seen) if successes else 0, abs=1e-9)
            assert high == pytest.approx(root(rejects, seen, 1 - 1e-15) if successes < trials else 1, abs=1e-9)
            assert 0 <= low <= seen <= high <= 1
            assert low < high


def test_nothing_tried_has_no_interval_and_nonsense_is_refused():
    assert wilson_interval(0, 0) is None
    for wrong in [(2, 1), (-1, 1), (0, -1), (1, 1, 1.0), (1, 1, 0.0)]:
        with pytest.raises(ValueError):
            wilson_interval(*wrong)


@pytest.mark.parametrize(("first", "second"), [(0, 0), (1, 0), (0, 5), (3, 11), (7, 7), (40, 60), (700, 812)])
def test_mcnemar_is_the_chance_of_all_outcomes_as_far_from_the_middle(first, second):
    differing = first + second
    extreme = [k for k in range(differing + 1) if abs(2 * k - differing) >= abs(first - second)]
    assert mcnemar_exact(first, second) == float(Fraction(sum(math.comb(differing, k) for k in extreme), 2**differing))
    assert mcnemar_exact(second, first) == mcnemar_exact(first, second)


def test_mcnemar_by_hand():
    # Of 10 items that differ 2 are the first's: (1 + 10 + 45) / 1024, and as many on the other side.
    assert mcnemar_exact(2, 8) == 112 / 1024
    with pytest.raises(ValueError, match="-1"):
        mcnemar_exact(-1, 3)


def test_mcnemar_of_many_items_takes_no_minute():
    begun = time.monotonic()
    # With so many, the normal distribution says the same to four digits (with the correction for continuity).
    assert mcnemar_exact(9_900, 10_100) == pytest.approx(2 * NormalDist().cdf(-(200 - 1) / math.sqrt(20_000)), rel=1e-4)
    assert time.monotonic() - begun < 10


def test_holm_multiplies_the_smallest_by_how_many_there_are_and_never_falls():
    # 0.01, 0.02, 0.03, 0.5 times 4, 3, 2, 1.
    assert holm([0.03, 0.5, 0.01, 0.02]) == pytest.approx([0.06, 0.5, 0.04, 0.06])
    assert holm([0.02, 0.011]) == pytest.approx([0.022, 0.022])
    assert holm([]) == []
