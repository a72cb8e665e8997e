"""What rates over few answers can claim, alone and against each other. Pure: no torch, no scipy."""

from collections.abc import Sequence
from math import sqrt
from statistics import NormalDist


def wilson_interval(successes: int, trials: int, confidence: float = 0.95) -> tuple[float, float] | None:
    """Bounds of the true rate (Wilson 1927, no continuity correction), within [0, 1] and never of width 0; None without a trial.

    Raises ValueError unless 0 <= successes <= trials and 0 < confidence < 1.
    """
    if not 0 <= successes <= trials or not 0 < confidence < 1:
        raise ValueError(f"{successes} of {trials} at a confidence of {confidence}")
    if trials == 0:
        return None
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    rate, shrink = successes / trials, 1 + z * z / trials
    centre = (rate + z * z / (2 * trials)) / shrink
    half = z / shrink * sqrt(rate * (1 - rate) / trials + z * z / (4 * trials * trials))
    # At the ends the bound is exactly 0 or 1, which rounding misses.
    return (0.0 if successes == 0 else centre - half), (1.0 if successes == trials else centre + half)


def mcnemar_exact(only_first: int, only_second: int) -> float:
    """Two-sided p of McNemar's exact test: of the items that one of two models alone gets right, so many are the first's and the second's.

    Where both were equally good each of these items would be either's with probability 1/2 (McNemar 1947; the binomial itself, not its
    approximation). 1.0 where the two differ nowhere.
    """
    if only_first < 0 or only_second < 0:
        raise ValueError(f"{only_first} and {only_second} items")
    differing, fewer = only_first + only_second, min(only_first, only_second)
    # In whole numbers, since floats have no 2**1100; and each from the one before, since 20,000 items would take a minute otherwise.
    ways = total = 1
    for k in range(1, fewer + 1):
        ways = ways * (differing - k + 1) // k
        total += ways
    return min(1.0, 2 * total / 2**differing)


def holm(p_values: Sequence[float]) -> list[float]:
    """Each p adjusted for the others that were looked at (Holm 1979), in the given order: below 0.05 holds for all of them together."""
    adjusted, worst = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda index: p_values[index])):
        worst = max(worst, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = worst
    return adjusted
