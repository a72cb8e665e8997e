"""Losses and measures over pairs of scores, against float64 by hand."""

import math

import numpy
import pytest
import torch

from harness.losses.reward import (
    bradley_terry,
    calibration_sums,
    describe_calibration,
    describe_moments,
    off_centre,
    pair_moments,
)

CHOSEN = [2.0, -0.5, 0.25, 1.0, 3.0, 0.0]
REJECTED = [1.0, 0.5, 0.25, -2.0, 2.9, -4.0]


def scores(dtype=torch.float64):
    return torch.tensor(CHOSEN, dtype=dtype), torch.tensor(REJECTED, dtype=dtype)


def test_the_loss_is_the_log_odds_of_the_difference_less_the_margin():
    margins = [0.0, 1.0, 0.5, 0.0, 2.0, -1.0]
    by_hand = [math.log(1 + math.exp(-(c - r - m))) for c, r, m in zip(CHOSEN, REJECTED, margins, strict=True)]
    assert bradley_terry(*scores(), torch.tensor(margins, dtype=torch.float64)).tolist() == pytest.approx(by_hand, rel=1e-12)
    assert bradley_terry(*scores(torch.float32)).tolist() == pytest.approx(
        [math.log(1 + math.exp(-(c - r))) for c, r in zip(CHOSEN, REJECTED, strict=True)], rel=1e-6
    )


def test_the_loss_neither_overflows_nor_vanishes_far_out():
    far = torch.tensor([200.0, -200.0])
    assert bradley_terry(far, -far).tolist() == [0.0, 400.0]


def test_its_gradient_is_minus_the_probability_of_the_wrong_answer():
    chosen, rejected = (value.requires_grad_() for value in scores())
    bradley_terry(chosen, rejected).sum().backward()
    wrong = [1 / (1 + math.exp(c - r)) for c, r in zip(CHOSEN, REJECTED, strict=True)]
    assert chosen.grad.tolist() == pytest.approx([-p for p in wrong], rel=1e-12)
    assert rejected.grad.tolist() == pytest.approx(wrong, rel=1e-12)


def test_centring_is_the_squared_sum_of_a_pair():
    assert off_centre(*scores()).tolist() == pytest.approx([(c + r) ** 2 for c, r in zip(CHOSEN, REJECTED, strict=True)])


def test_moments_of_parts_add_up_to_those_of_the_whole_and_a_tie_is_half_right():
    chosen, rejected = scores()
    parts = pair_moments(chosen[:2], rejected[:2]) + pair_moments(chosen[2:], rejected[2:])
    found = describe_moments(parts.tolist())
    assert found["accuracy"] == (1 + 0 + 0.5 + 1 + 1 + 1) / 6
    assert found["margin"] == pytest.approx(numpy.mean(CHOSEN) - numpy.mean(REJECTED))
    for name, values in (("chosen", CHOSEN), ("rejected", REJECTED)):
        assert found[f"{name}_reward"] == pytest.approx(numpy.mean(values))
        assert found[f"{name}_reward_std"] == pytest.approx(numpy.std(values))


def test_calibration_is_that_of_the_ten_bins_by_hand():
    """Differences 1, -1, 0, 3, 0.1 and 4 have confidences 0.731, 0.731, 0.5, 0.953, 0.525 and 0.982."""
    sigmoid = [1 / (1 + math.exp(-abs(c - r))) for c, r in zip(CHOSEN, REJECTED, strict=True)]
    # Bins 4 (0.70 to 0.75), 0 (0.50 to 0.55) and 9 (0.95 to 1).
    by_hand = abs(1 - sigmoid[0] - sigmoid[1]) + abs(1.5 - sigmoid[2] - sigmoid[4]) + abs(2 - sigmoid[3] - sigmoid[5])
    chosen, rejected = scores()
    parts = calibration_sums(chosen[:4], rejected[:4]) + calibration_sums(chosen[4:], rejected[4:])
    found = describe_calibration(parts.tolist())
    assert found["calibration_error"] == pytest.approx(by_hand / 6, rel=1e-12)
    assert found["log_loss"] == pytest.approx(sum(math.log(1 + math.exp(r - c)) for c, r in zip(CHOSEN, REJECTED, strict=True)) / 6)


def test_a_model_that_is_right_as_often_as_it_says_is_calibrated_and_a_sure_one_that_guesses_is_not():
    draws = torch.Generator().manual_seed(0)
    size = torch.rand(200_000, generator=draws, dtype=torch.float64) * 6 - 3
    right = torch.rand(200_000, generator=draws, dtype=torch.float64) < size.sigmoid()
    difference = torch.where(right, size, -size)
    zero = torch.zeros_like(size)
    assert describe_calibration(calibration_sums(difference, zero).tolist())["calibration_error"] < 0.005
    guesses = torch.where(torch.rand(200_000, generator=draws) < 0.5, 50.0, -50.0).double()
    assert describe_calibration(calibration_sums(guesses, zero).tolist())["calibration_error"] == pytest.approx(0.5, abs=0.005)


def test_a_certain_pair_falls_into_the_last_bin():
    sums = calibration_sums(torch.tensor([1000.0]), torch.tensor([0.0])).tolist()
    assert sums[10] == 1 and describe_calibration(sums) == {"log_loss": 0.0, "calibration_error": 0.0}
