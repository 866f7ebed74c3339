"""Paired effects → interval, exact test, correction, verdict.

Every claim predicts the sign of its effect before it sees a run, so that tests are one-sided in
that direction. The interval is a two-sided 95 % t interval (a bootstrap over so few seeds covers
less). A verdict needs both, and so errs in either direction in at most 2.5 % of normal worlds
without effect. *Not supported* means that the same two tests, turned around, show the contrary;
what shows neither is *undecided*.

**Pairs without a number.** A run that never came down to a loss, or diverged, is missing for a
reason that may be the effect. The exact tests count each such pair as the strongest evidence
against what they test, so that a verdict holds whatever it would have been.

**Correction.** A family is one statement with its variants: against several activations, at several
losses, or within several groups. Holm's correction is within families, and decides. Different
statements are different questions, each reported by itself with its number, and are not corrected
for each other: of N families without any effect about N/40 would be called supported.
``p_holm_all`` is corrected over all rows, for readers who take the table as one question. With n
seeds no exact test of paired signs gets below 2⁻ⁿ. Six seeds (1/64) can decide families of up to
three, over which m/2ⁿ < .05; `seeds_needed` gives the numbers for larger ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import nan

import numpy as np
import pandas as pd
from scipy import stats

# Below, nothing is decided: a two-sided exact test of paired signs cannot reach .05.
FEWEST_SEEDS = 6
CONFIDENCE = 0.95
LEVEL = 1 - CONFIDENCE
MOST_EXACT = 200  # values; tests of more take the normal approximation, which is as good then


@dataclass(frozen=True)
class Estimate:
    """An effect with its 95 % interval and the exact p values of its predicted and contrary signs.

    ``n`` counts the paired seeds. The ``left_out`` pairs have no number; the p values count them
    as evidence against. What could not be computed is NaN.
    """

    effect: float = nan
    low: float = nan
    high: float = nan
    n: int = 0
    p: float = nan
    p_contrary: float = nan
    left_out: int = 0


def paired(effects: pd.Series, predicted: int = -1) -> Estimate:
    """Returns the mean of paired differences with its t interval and exact Wilcoxon tests.

    Pairs that are not finite are left out of mean and interval, and count against both tests.

    Args:
        effects: one difference per seed.
        predicted: the sign that the claim predicts, ±1; both tests are one-sided.

    >>> estimate = paired(pd.Series([-0.11, -0.07, -0.13, -0.08, -0.1, -0.09]))
    >>> round(estimate.effect, 4), estimate.n, estimate.p
    (-0.0967, 6, 0.015625)
    """
    values = effects.to_numpy(float)
    x = values[np.isfinite(values)]
    n, left_out = len(x), len(values) - len(x)
    mean = float(x.mean()) if n else nan
    if n < 2:
        return Estimate(mean, n=n, left_out=left_out)
    half = float(stats.t.ppf(0.5 + CONFIDENCE / 2, n - 1) * x.std(ddof=1) / n**0.5)
    p, p_contrary = signed_rank(x, predicted, left_out)
    return Estimate(mean, mean - half, mean + half, n, p, p_contrary, left_out)


def signed_rank(values: np.ndarray, predicted: int, left_out: int = 0) -> tuple[float, float]:
    """Returns the p values of the predicted sign and of the contrary, by Wilcoxon's signed ranks.

    They are exact, with ties and zeros too, up to `MOST_EXACT` values, and of the normal
    approximation for more. Each test counts what was ``left_out`` as larger than all values, and of
    the other sign.
    """
    x = predicted * values
    if not x.any():
        return 1.0, 1.0
    against = np.abs(x).max() * (2.0 + np.arange(left_out))
    return _p_positive(np.concatenate([x, -against])), _p_positive(-np.concatenate([x, against]))


def _p_positive(x: np.ndarray) -> float:
    """The probability that the ranks of positive values add up to as much, by chance.

    Ties share their mean rank. Zeros have ranks, too, which are no evidence of either sign.
    """
    ranks = (2 * stats.rankdata(np.abs(x))).astype(int)[x != 0]  # twice: whole numbers with ties
    positive = int(ranks[x[x != 0] > 0].sum())
    if len(x) > MOST_EXACT:
        z = (positive - ranks.sum() / 2) / (np.square(ranks, dtype=float).sum() / 4) ** 0.5
        return float(stats.norm.sf(z))
    # The probabilities of all sums, over all assignments of signs, one value at a time.
    sums = np.zeros(ranks.sum() + 1)
    sums[0] = 1.0
    for rank in ranks:
        without = sums / 2
        sums = without.copy()
        sums[rank:] += without[: len(sums) - rank]
    return float(sums[positive:].sum())


def name_of_test(n: int) -> str:
    """Returns the name of the test that `signed_rank` makes of so many values."""
    return f"{'exact' if n <= MOST_EXACT else 'asymptotic'} Wilcoxon signed-rank"


def share(part: pd.Series, whole: pd.Series) -> Estimate:
    """Returns ``Σ part / Σ whole`` in per cent with Fieller's 95 % interval.

    Fieller's interval is the t interval of a ratio of two paired means. It is unbounded, here NaN,
    where the whole is not clearly different from 0: then there is nothing to have a share of. The
    tests are of ``part > 0``.

    Args:
        part, whole: one number per seed, in the same order.
    """
    pairs = np.stack([part.to_numpy(float), whole.to_numpy(float)])
    seeds, pairs = pairs.shape[1], pairs[:, np.isfinite(pairs).all(0)]
    n = pairs.shape[1]
    left_out = seeds - n
    if n < 2 or pairs[1].mean() <= 0:
        return Estimate(n=n, left_out=left_out)
    (x, y), t2 = pairs.mean(1), float(stats.t.ppf(0.5 + CONFIDENCE / 2, n - 1) ** 2)
    (xx, xy), (_, yy) = np.cov(pairs) / n
    a, b, c = y**2 - t2 * yy, x * y - t2 * xy, x**2 - t2 * xx
    low, high = nan, nan
    if a > 0:  # (x − ρ y)² ≤ t² var(x − ρ y) for ρ between two roots
        half = max(b**2 - a * c, 0.0) ** 0.5
        low, high = (b - half) / a, (b + half) / a
    p, p_contrary = signed_rank(pairs[0], 1, left_out)
    return Estimate(100 * x / y, 100 * low, 100 * high, n, p, p_contrary, left_out)


def holm(p: Sequence[float]) -> list[float]:
    """Returns Holm's adjusted p values, in the order given.

    NaN, a test that could not be made, stays NaN and does not count as a test.

    >>> holm([0.02, 0.03, float("nan")])
    [0.04, 0.04, nan]
    """
    tested = sorted((i for i in range(len(p)) if p[i] == p[i]), key=lambda i: p[i])
    adjusted, worst = [nan] * len(p), 0.0
    for rank, i in enumerate(tested):
        worst = max(worst, min(1.0, (len(tested) - rank) * p[i]))
        adjusted[i] = worst
    return adjusted


def verdict(
    low: float, high: float, n: int, p: float, p_contrary: float, predicted: int = -1
) -> str:
    """Returns "supported", "not supported" or "undecided".

    The first two need that interval and corrected exact test agree on the sign of the effect, and
    that there are at least six paired seeds. NaN decides nothing.

    >>> verdict(-2.0, -1.0, n=6, p=0.03, p_contrary=1.0)
    'supported'
    """
    if n < FEWEST_SEEDS:
        return "undecided"
    as_predicted, contrary = (high < 0, low > 0) if predicted < 0 else (low > 0, high < 0)
    if as_predicted and p < LEVEL:
        return "supported"
    return "not supported" if contrary and p_contrary < LEVEL else "undecided"


def seeds_needed(variants: int) -> int:
    """Returns the fewest paired seeds that can decide a family of so many variants.

    With n seeds the smallest exact p is 2⁻ⁿ, which must survive Holm's correction over the
    variants: ``variants / 2ⁿ < .05``.

    >>> seeds_needed(3), seeds_needed(4)
    (6, 7)
    """
    n = FEWEST_SEEDS
    while variants / 2**n >= LEVEL:
        n += 1
    return n
