"""Learning curves: when a run comes down to a loss, and where it stands after a time."""

from collections.abc import Iterable
from math import nan

import numpy as np
import pandas as pd

# Nats, descending, the same for all runs.
LEVELS = tuple(digit * 10.0**power for power in range(1, -9, -1) for digit in (5, 2, 1))
TINY = 1e-300  # a loss of exactly 0 has no logarithm


def curve_of(run: pd.DataFrame) -> pd.DataFrame:
    """Returns ``step``, ``train_loss`` and ``seconds`` of a run's scores, in the order of steps.

    Of several scores at one step the last one counts. Seconds are NaN where they are not recorded.
    """
    rows = run[run["train_loss"].notna()].sort_values("step").drop_duplicates("step", keep="last")
    seconds = rows["seconds"].astype(float) if "seconds" in rows else np.nan
    return rows[["step", "train_loss"]].astype(float).assign(seconds=seconds)


def common_levels(curves: Iterable[pd.DataFrame], count: int) -> list[float]:
    """Returns the lowest losses of the 1-2-5 series that all runs come down to from above.

    At most ``count`` of them, the lowest last; none where a run has no scores.
    """
    losses = [curve["train_loss"].to_numpy() for curve in curves]
    if not losses or not all(map(len, losses)):
        return []
    start, end = min(loss[0] for loss in losses), max(loss.min() for loss in losses)
    return [level for level in LEVELS if end <= level < start][-count:]


def reached(curve: pd.DataFrame, level: float, axis: str = "step") -> float:
    """Returns the step, or second, at which a run first gets to a loss; NaN where it never does.

    Between two scores the logarithm of the loss is a straight line.

    Args:
        curve: as `curve_of` returns it.
        level: the loss, in nats.
        axis: "step" or "seconds".
    """
    loss, at = curve["train_loss"].to_numpy(), curve[axis].to_numpy()
    below = np.flatnonzero(loss <= level)
    if not len(below):
        return nan
    i = below[0]
    if i == 0:
        return float(at[0])
    before, after = np.log(loss[i - 1] / level), np.log(level / max(loss[i], TINY))
    return float(at[i - 1] + (at[i] - at[i - 1]) * before / (before + after))


def loss_after(curve: pd.DataFrame, seconds: float) -> float:
    """Returns the loss after so many seconds of training.

    Between two scores the logarithm of the loss is a straight line. NaN where seconds are not
    recorded, or ``seconds`` is later than the end of the run.
    """
    at, loss = curve["seconds"].to_numpy(), curve["train_loss"].to_numpy()
    if not len(at) or not seconds <= at.max():
        return nan
    return float(np.exp(np.interp(seconds, at, np.log(np.maximum(loss, TINY)))))
