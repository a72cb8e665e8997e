"""Two answers to each of the same questions, compared; and several comparisons at once. Pure and exact: no torch, no scipy."""

from collections.abc import Sequence
from fractions import Fraction
from math import comb


def mcnemar_exact(b: int, c: int) -> float:
    """Two-sided p of McNemar's exact test: of the b + c questions of which one side alone is right, b are the one side's and c the other's.

    Where neither side is better each of them falls to either side like a coin (McNemar 1947; the binomial, not its chi-squared
    approximation, which is wrong for few). 1.0 where no question tells the sides apart. Raises ValueError for a negative count.
    """
    if b < 0 or c < 0:
        raise ValueError(f"b = {b}, c = {c}; counts are not negative")
    tosses = b + c
    tail = sum(comb(tosses, k) for k in range(min(b, c) + 1))
    return float(min(Fraction(1), Fraction(2 * tail, 2**tosses)))


def holm(p_values: Sequence[float]) -> list[float]:
    """The same p-values in the same order, adjusted for their number (Holm 1979): below alpha there, and the chance that any of them is
    there for nothing is below alpha. Raises ValueError for what is no probability."""
    if any(not 0 <= p <= 1 for p in p_values):
        raise ValueError(f"p-values must lie in [0, 1]; got {[p for p in p_values if not 0 <= p <= 1]}")
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda at: p_values[at])):
        highest = max(highest, min(1.0, p_values[index] * (len(p_values) - rank)))
        adjusted[index] = highest
    return adjusted
