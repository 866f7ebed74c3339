"""Which runs are drawn as one line: those that differ in nothing but the seed. Where these are
many, which lines are drawn.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from biasshift.analysis.grid import best_rate
from biasshift.plots.theme import LOOKS, ON_DARK, OTHER_LOOKS
from biasshift.report.html import number, plain, told_apart

if TYPE_CHECKING:
    import pandas as pd

MOST_SERIES = 12  # more lines cannot be told apart in one chart
_ABOUT_THE_RUN = {
    "run",
    "state",
    "last_step",
    "started",
    "updated",
    "seed",
    "activation",
    "examined",
}  # which says what was measured
_NOTHING: dict[str, Any] = {
    "constant": 0,
    "batch_norm": False,
}  # what is not added to a network is not said
_PALEST = 0.65  # how far the last of several settings of one activation is mixed with the ground


@dataclass(frozen=True)
class Series:
    label: str
    setting: str  # what tells it from the other series of its activation
    runs: tuple[str, ...]
    color: str
    on_dark: str
    shown: bool = True  # in the charts


def all_series(states: pd.DataFrame, losses: pd.Series | None = None) -> list[Series]:
    """Groups the rows of `run_states` by activation and by every option in which runs of one
    activation differ, but for the seed.

    The hue is that of the activation; a further setting of the same activation is paler. The order
    is that of the runs. Where there are more than `MOST_SERIES`, those at other than their best
    learning rate are not shown, and the shown and largest come first.

    Args:
        losses: the training loss that each row of `states` ended with, NaN for a run that failed;
            None shows every rate.
    """
    if "activation" not in states:
        states = states.assign(activation="")
    states = states.assign(
        activation=states["activation"]
        .astype(object)
        .where(states["activation"].notna(), "")
        .astype(str)
    )
    options = _varying(states)
    by = states.groupby(["activation", *options], sort=False, observed=True, dropna=False)
    groups = [(names, tuple(group["run"].astype(str))) for names, group in by]
    shown = [True] * len(groups)
    if len(groups) > MOST_SERIES:
        best = _at_best_rates(states, options, losses)
        groups.sort(key=lambda group: (group[0] not in best, -len(group[1])))
        shown = [names in best and place < MOST_SERIES for place, (names, _) in enumerate(groups)]
    settings = [_setting(dict(zip(options, names[1:], strict=True))) for names, _ in groups]
    labels = told_apart(
        [
            _label(names[0], setting, len(runs))
            for (names, runs), setting in zip(groups, settings, strict=True)
        ]
    )
    drawn = [names[0] for (names, _), one in zip(groups, shown, strict=True) if one]
    sizes, hues = Counter(drawn), _hues(names[0] for names, _ in groups)
    found, seen = [], Counter()
    for (names, runs), setting, label, one in zip(groups, settings, labels, shown, strict=True):
        share = _PALEST * min(1.0, seen[names[0]] / max(1, sizes[names[0]] - 1))
        seen[names[0]] += 1
        hue = hues[names[0]]
        found.append(
            Series(
                label, setting, runs, _mixed(hue, 255, share), _mixed(ON_DARK[hue], 30, share), one
            )
        )
    return found


def _at_best_rates(
    states: pd.DataFrame, options: list[str], losses: pd.Series | None
) -> set[tuple[Any, ...]]:
    """The groups at the learning rate that `biasshift.analysis.grid.RULE` chooses of those tried
    for the network; all, where none was.
    """
    import pandas as pd

    keys = ["activation", *options]
    rates = losses is not None and "lr" in options and pd.api.types.is_numeric_dtype(states["lr"])
    others = [name for name in keys if name != "lr"] if rates else keys
    found: set[tuple[Any, ...]] = set()
    for _, group in states.assign(train_loss=losses).groupby(
        others, sort=False, observed=True, dropna=False
    ):
        if rates and group["lr"].notna().all():
            group = group.loc[group["lr"] == best_rate(group)]
        found |= {
            names for names, _ in group.groupby(keys, sort=False, observed=True, dropna=False)
        }
    return found


def _varying(states: pd.DataFrame) -> list[str]:
    names = [name for name in states if name not in _ABOUT_THE_RUN]
    groups = states.groupby("activation", observed=True)
    return [name for name in names if groups[name].nunique(dropna=False).max() > 1]


def _setting(options: dict[str, Any]) -> str:
    return ", ".join(
        f"{plain(key, 40)} = {_option(value)}"
        for key, value in options.items()
        if _NOTHING.get(key) != value
    )


def _option(value: Any) -> str:
    return (
        "–"
        if value != value or value is None
        else number(value)
        if isinstance(value, float)
        else plain(value, 40)
    )


def _label(activation: str, setting: str, runs: int) -> str:
    name = LOOKS[activation].label if activation in LOOKS else plain(activation, 40)
    return f"{', '.join(filter(None, [name, plain(setting, 80)])) or 'all runs'} (n = {runs})"


def _hues(activations: Iterable[str]) -> dict[str, str]:
    others = [name for name in dict.fromkeys(activations) if name not in LOOKS]
    hues = {
        name: OTHER_LOOKS[position % len(OTHER_LOOKS)][0] for position, name in enumerate(others)
    }
    return {name: look.color for name, look in LOOKS.items()} | hues


def _mixed(color: str, ground: int, share: float) -> str:
    parts = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(part + share * (ground - part)):02x}" for part in parts)
