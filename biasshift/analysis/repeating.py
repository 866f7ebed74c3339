"""What is read off Fisher matrices must repeat: on two disjoint probes, at three dampings, and where losses are equal, at equal ones."""

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from biasshift.analysis.grid import NAMES

if TYPE_CHECKING:
    import pandas as pd

PROBES, DAMPINGS = 2, 3
EQUAL = 1.1  # losses that differ by less than this factor are called equal
REPEATED = "The sign is the same on two disjoint probes and at dampings {}."
SIGN_CHANGES = "The sign changes with the damping or the probe."
NOT_REPEATED = "Not repeated on two probes at three dampings, without which nothing is decided."


class Repetition(NamedTuple):
    """Whether an effect keeps its sign where it is repeated, in words and as a fact."""

    said: str
    sure: bool


def repeated(points: "pd.DataFrame", effects: Callable[["pd.DataFrame"], "pd.Series"], expected: float) -> Repetition:
    """Repeats an effect at equal loss, probe by probe and damping by damping.

    Args:
        points: those of the examinations.
        effects: points → one number per seed.
        expected: the effect that is repeated; its sign counts.
    """
    groups = dict(list(points.groupby(["exam_probe", "exam_damping"])))
    dampings = sorted({damping for _, damping in groups})
    if len({probe for probe, _ in groups}) < PROBES or len(dampings) < DAMPINGS:
        return Repetition(NOT_REPEATED, False)
    means = [float(effects(group).mean()) for group in groups.values()]
    if not np.isfinite(means).all():
        return Repetition(NOT_REPEATED, False)
    if not all(mean * expected > 0 for mean in means):
        return Repetition(SIGN_CHANGES, False)
    return Repetition(REPEATED.format(_listed(dampings)), True)


def at_equal_losses(points: "pd.DataFrame", first: str, second: str) -> Repetition:
    """Whether two activation functions were examined at losses that are equal: each is looked at now and then, and not at the same time."""
    losses = points.groupby("activation")["loss"].agg(lambda loss: float(np.exp(np.log(loss.astype(float)).mean())))
    one, other = (float(losses.get(name, np.nan)) for name in (first, second))
    if not abs(np.log(one / other)) > np.log(EQUAL):  # nor where it is not recorded
        return Repetition("At equal training loss.", True)
    said = f"{NAMES[first]} was examined at a loss of {one:.3g}, {NAMES[second]} at {other:.3g}, which is not equal: nothing is decided."
    return Repetition(said, False)


def _listed(numbers: list[float]) -> str:
    *some, last = (f"{number:g}" for number in numbers)
    return f"{', '.join(some)} and {last}"
