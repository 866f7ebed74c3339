"""Many values → as many as a page can hold, and as short."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

_FENCE = 3  # quartile distances beyond the quartiles: Tukey's outer fences


def even(values: Sequence[Any], most: int) -> list[Any]:
    """At most so many of them, evenly, with the last and (from two on) the first."""
    if len(values) <= most:
        return list(values)
    gaps = max(1, most - 1)
    return [values[-1]] if most == 1 else [values[round(i * (len(values) - 1) / gaps)] for i in range(most)]


def rounded(value: Any, digits: int) -> float | int | None:
    if value is None or value != value:
        return None
    short = float(f"{value:.{digits}g}")
    return int(short) if short.is_integer() and abs(short) < 1e15 else short


def by_depth(names: Sequence[str]) -> list[str]:
    """The names of layers as they lie in the network: words in the order in which they first occur, numbers by size.

    Those of weight layers and of activations are recorded one behind the other, each in their own order.

    >>> by_depth(["features.0", "features.10", "classifier.1", "features.1", "classifier.0"])
    ['features.0', 'features.1', 'features.10', 'classifier.0', 'classifier.1']
    """
    parts = {name: re.split(r"([0-9]{1,9})", name) for name in names}  # words and numbers by turns
    order: dict[str, int] = {}
    for words in parts.values():
        for word in words[::2]:
            order.setdefault(word, len(order))
    return sorted(names, key=lambda name: [int(part) if turn % 2 else order[part] for turn, part in enumerate(parts[name])])


def ends(percentiles: pd.DataFrame, drawn: Sequence[int], within: Sequence[str]) -> pd.DataFrame:
    """Where an axis begins and ends that one long tail may not stretch: the outermost of the `drawn` percentiles inside of any fence.

    Args:
        percentiles: a row per distribution, a column per percentile, 25 and 75 among them.
        drawn: which of them are in the chart; the other half of each pair is 100 minus it.
        within: levels of the index; rows that are equal in these share an axis.

    Returns:
        Columns ``low`` and ``high``, for each row.
    """
    spread = percentiles[75] - percentiles[25]
    for low in sorted((level for level in drawn if level < 25), reverse=True):
        spread = spread.where(spread > 0, percentiles[100 - low] - percentiles[low])  # of half of the units dead, the quartiles are equal
    least = (percentiles[25] - _FENCE * spread).groupby(level=within).transform("min")
    most = (percentiles[75] + _FENCE * spread).groupby(level=within).transform("max")
    shown = percentiles[list(drawn)]
    shown = shown.where(shown.ge(least, axis=0) & shown.le(most, axis=0))
    found = shown.min(axis=1).to_frame("low").assign(high=shown.max(axis=1)).groupby(level=within)
    return found["low"].transform("min").to_frame("low").assign(high=found["high"].transform("max"))
