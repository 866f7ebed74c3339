"""Learning curves: when a run gets down to a loss, and where it stands after a time."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

LEVELS = tuple(
    digit * 10.0**power for power in range(1, -9, -1) for digit in (5, 2, 1)
)  # nats, the same for all runs


def curve_of(run: "pd.DataFrame") -> "pd.DataFrame":
    """``step``, ``train_loss`` and ``seconds`` of a run's scores, in the order of steps; seconds
    NaN where they are not recorded.
    """
    rows = run[run["train_loss"].notna()].sort_values("step").drop_duplicates("step", keep="last")
    seconds = rows["seconds"].astype(float) if "seconds" in rows else np.nan
    return rows[["step", "train_loss"]].astype(float).assign(seconds=seconds)


def common_levels(curves: Iterable["pd.DataFrame"], count: int) -> list[float]:
    """The lowest of the 1-2-5 series of losses that all runs come down to from above, lowest last."""
    losses = [curve["train_loss"].to_numpy() for curve in curves]
    if not losses or not all(map(len, losses)):
        return []
    start, end = min(loss[0] for loss in losses), max(loss.min() for loss in losses)
    return [level for level in LEVELS if end <= level < start][-count:]


def reached(curve: "pd.DataFrame", level: float, axis: str = "step") -> float:
    """The step, or second, at which a run first gets to a loss; between two scores the logarithm of
    the loss is a straight line.
    """
    loss, at = curve["train_loss"].to_numpy(), curve[axis].to_numpy()
    there = np.flatnonzero(loss <= level)
    if not len(there):
        return float("nan")
    i = there[0]
    if i == 0:
        return float(at[0])
    above, below = np.log(loss[i - 1] / level), np.log(level / max(loss[i], 1e-300))
    return float(at[i - 1] + (at[i] - at[i - 1]) * above / (above + below))


def loss_after(curve: "pd.DataFrame", seconds: float) -> float:
    """The loss after so many seconds of training; NaN where they are not recorded, or later than
    the run's end.
    """
    at, loss = curve["seconds"].to_numpy(), curve["train_loss"].to_numpy()
    if not len(at) or not seconds <= at.max():
        return float("nan")
    return float(np.exp(np.interp(seconds, at, np.log(np.maximum(loss, 1e-300)))))
