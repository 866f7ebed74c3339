"""Learning curves: when a run comes down to a loss, and where it stands after a time."""

from collections.abc import Iterable
from math import nan

import numpy as np
import pandas as pd

# Nats, descending, the same for all runs.
LEVELS = tuple(digit * 10.0**power for power in range(1, -9, -1) for digit in (5, 2, 1))
TINY = 1e-300  # a loss of exactly 0 has no logarithm


def curves_of(table: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Returns ``step``, ``train_loss`` and ``seconds`` of each run's scores, in their order.

    Of several scores at one step the last one counts. Seconds are NaN where they are not recorded.

    Args:
        table: rows of runs, with a column ``run``.
    """
    scored = table.loc[table["train_loss"].notna().to_numpy()]
    rows = pd.DataFrame(
        {
            "run": scored["run"].astype(str),
            **scored[["step", "train_loss"]].astype(float),
            "seconds": scored["seconds"].astype(float) if "seconds" in scored else np.nan,
        }
    )
    rows = rows.sort_values("step", kind="stable").drop_duplicates(["run", "step"], keep="last")
    split = {str(name): run for name, run in rows.set_index("run").groupby(level="run")}
    nothing = rows.iloc[:0].set_index("run")
    return {str(name): split.get(str(name), nothing) for name in table["run"].unique()}


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
        curve: one of those that `curves_of` returns.
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
