"""Paired effects → interval, exact test, correction, verdict.

Every claim predicts the sign of its effect before it sees a run, so that tests are one-sided in
that direction. The interval is a two-sided 95 % t interval (a bootstrap over so few seeds covers
less): a verdict needs both, and so errs in either direction in at most 2.5 % of normal worlds
without effect. *Not supported* says that the contrary holds, by the same two tests turned around;
what shows neither is *undecided*.

**Pairs without a number.** A run that never came down to a loss, or diverged, is missing for a
reason that may be the effect. The exact tests count each such pair as the strongest evidence
against what they test, so that a verdict holds whatever it would have been.

**Correction.** A family is one statement with its variants: against several activations, at several
losses, or within several groups. Holm's correction is within families, and decides. Different
statements are different questions, each reported by itself with its number, and are not corrected
for each other: of N families without any effect about N/40 would be called supported.
``p_holm_all`` is corrected over all rows, for readers who take the table as one question. With n
seeds no exact test of paired signs gets below 2⁻ⁿ: six seeds (1/64) can decide families of up to
three, over which m/2ⁿ < .05; `seeds_needed` says more.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

FEWEST_SEEDS = (
    6  # below, nothing is decided: a two-sided exact test of paired signs cannot reach .05
)
CONFIDENCE = 0.95
LEVEL = 1 - CONFIDENCE
ALL_SIGNS = 2**16  # up to so many assignments of signs are gone through where there are ties
NAN = float("nan")


@dataclass(frozen=True)
class Found:
    """An effect, its 95 % interval, the number of paired seeds, and exact p values of the predicted
    sign and of the contrary.

    ``left_out`` pairs have no number; the p values count them as evidence against.
    """

    effect: float = NAN
    low: float = NAN
    high: float = NAN
    n: int = 0
    p: float = NAN
    p_contrary: float = NAN
    left_out: int = 0


def paired(effects: "pd.Series", predicted: int = -1) -> Found:
    """Mean, t interval and exact one-sided Wilcoxon signed-rank tests of paired differences;
    ``predicted`` is their sign, ±1.

    Pairs that are not finite are left out of mean and interval, and count against both tests.
    """
    import numpy as np
    from scipy import stats

    every = effects.to_numpy(float)
    x = every[np.isfinite(every)]
    n, left_out = len(x), len(every) - len(x)
    mean = float(x.mean()) if n else NAN
    if n < 2:
        return Found(mean, n=n, left_out=left_out)
    half = float(stats.t.ppf(0.5 + CONFIDENCE / 2, n - 1) * x.std(ddof=1) / n**0.5)
    return Found(mean, mean - half, mean + half, n, *signed_rank(x, predicted, left_out), left_out)


def signed_rank(values: "np.ndarray", predicted: int, left_out: int = 0) -> tuple[float, float]:
    """Exact p of the predicted sign, and of the contrary, also with ties and zeros: then every
    assignment of signs is gone through.

    Each test counts what was ``left_out`` as larger than all values, and of the other sign.
    """
    import numpy as np
    from scipy import stats

    x = predicted * values
    if not x.any():
        return 1.0, 1.0
    against = np.abs(x).max() * (2.0 + np.arange(left_out))

    def p(side: str, x: "np.ndarray") -> float:
        tied = len(set(np.abs(x))) < len(x) or not x.all()
        method: Any = (
            stats.PermutationMethod(n_resamples=ALL_SIGNS, rng=np.random.default_rng(0))
            if tied
            else "exact"
        )
        found: Any = stats.wilcoxon(x, zero_method="zsplit", alternative=side, method=method)
        return float(found.pvalue)

    return p("greater", np.concatenate([x, -against])), p("less", np.concatenate([x, against]))


def share(part: "pd.Series", whole: "pd.Series") -> Found:
    """``Σ part / Σ whole`` in per cent, with Fieller's 95 % interval; the tests are of ``part >
    0``.

    Fieller's interval is the t interval of a ratio of two paired means. It is unbounded, here NaN,
    where the whole is not clearly different from 0: then there is nothing to have a share of.
    """
    import numpy as np
    from scipy import stats

    both = np.stack([part.to_numpy(float), whole.to_numpy(float)])
    seeds, both = both.shape[1], both[:, np.isfinite(both).all(0)]
    n = both.shape[1]
    left_out = seeds - n
    if n < 2 or both[1].mean() <= 0:
        return Found(n=n, left_out=left_out)
    (x, y), t2 = both.mean(1), float(stats.t.ppf(0.5 + CONFIDENCE / 2, n - 1) ** 2)
    (xx, xy), (_, yy) = np.cov(both) / n
    a, b, c = y**2 - t2 * yy, x * y - t2 * xy, x**2 - t2 * xx
    low, high = NAN, NAN
    if a > 0:  # (x − ρ y)² ≤ t² var(x − ρ y) for ρ between two roots
        half = max(b**2 - a * c, 0.0) ** 0.5
        low, high = (b - half) / a, (b + half) / a
    return Found(
        100 * x / y, 100 * low, 100 * high, n, *signed_rank(both[0], 1, left_out), left_out
    )


def holm(p: Sequence[float]) -> list[float]:
    """Holm's adjusted p values; NaN, a test that could not be made, stays and does not count."""
    made = sorted((i for i in range(len(p)) if p[i] == p[i]), key=lambda i: p[i])
    adjusted, worst = [NAN] * len(p), 0.0
    for rank, i in enumerate(made):
        worst = max(worst, min(1.0, (len(made) - rank) * p[i]))
        adjusted[i] = worst
    return adjusted


def verdict(
    low: float, high: float, n: int, p: float, p_contrary: float, predicted: int = -1
) -> str:
    """*supported* or *not supported* where interval and corrected exact test agree on the sign,
    else *undecided*.
    """
    if n < FEWEST_SEEDS:
        return "undecided"
    below, above = high < 0, low > 0
    as_predicted, contrary = (below, above) if predicted < 0 else (above, below)
    if as_predicted and p < LEVEL:
        return "supported"
    return "not supported" if contrary and p_contrary < LEVEL else "undecided"


def seeds_needed(variants: int) -> int:
    """The fewest paired seeds at which the smallest exact p survives Holm's correction over so many
    variants.
    """
    n = FEWEST_SEEDS
    while variants / 2**n >= LEVEL:
        n += 1
    return n
