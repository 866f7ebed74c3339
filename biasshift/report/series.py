"""Which runs are drawn as one line: those that differ in nothing but the seed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from biasshift.looks import LOOKS, ON_DARK, OTHER_LOOKS
from biasshift.report.text import number, plain, told_apart

if TYPE_CHECKING:
    import pandas as pd

MOST_SERIES = 12  # more lines cannot be told apart in one chart
_ABOUT_THE_RUN = {"run", "state", "last_step", "started", "updated", "seed", "activation"}
_PALEST = 0.65  # how far the last of several settings of one activation is mixed with the ground


@dataclass(frozen=True)
class Series:
    label: str
    setting: str  # what tells it from the other series of its activation
    runs: tuple[str, ...]
    color: str
    on_dark: str


def all_series(states: pd.DataFrame) -> list[Series]:
    """Groups the rows of `run_states` by activation and by every option in which runs of one activation differ, but for the seed.

    The hue is that of the activation, a further setting of the same activation is paler. Largest groups come first where
    there are more than `MOST_SERIES`, and the order is that of the runs otherwise.
    """
    if "activation" not in states:
        states = states.assign(activation="")
    states = states.assign(activation=states["activation"].astype(object).where(states["activation"].notna(), "").astype(str))
    keys = ["activation", *_varying(states)]
    groups = [(names, list(group["run"].astype(str))) for names, group in states.groupby(keys, sort=False, observed=True, dropna=False)]
    if len(groups) > MOST_SERIES:
        groups.sort(key=lambda item: -len(item[1]))
    families: dict[str, list[int]] = {}
    for position, (names, _) in enumerate(groups):
        families.setdefault(names[0], []).append(position)
    order = sorted(families, key=lambda name: list(LOOKS).index(name) if name in LOOKS else len(LOOKS))
    settings = [", ".join(f"{key} = {_option(value)}" for key, value in zip(keys[1:], names[1:], strict=True)) for names, _ in groups]
    colors = [_colors(order, names[0], families[names[0]].index(position), families) for position, (names, _) in enumerate(groups)]
    labels = told_apart([_label(names[0], setting, len(runs)) for (names, runs), setting in zip(groups, settings, strict=True)])
    return [
        Series(label, setting, tuple(runs), *color)
        for label, setting, (_, runs), color in zip(labels, settings, groups, colors, strict=True)
    ]


def _varying(states: pd.DataFrame) -> list[str]:
    names = [name for name in states if name not in _ABOUT_THE_RUN]
    groups = states.groupby("activation", observed=True)
    return [name for name in names if groups[name].nunique(dropna=False).max() > 1]


def _option(value: Any) -> str:
    return "–" if value != value or value is None else number(value) if isinstance(value, float) else plain(value, 40)


def _label(activation: str, setting: str, runs: int) -> str:
    name = LOOKS[activation].label if activation in LOOKS else plain(activation, 40)
    return f"{', '.join(filter(None, [name, plain(setting, 80)])) or 'all runs'} (n = {runs})"


def _colors(order: list[str], activation: str, position: int, families: dict[str, list[int]]) -> tuple[str, str]:
    if activation in LOOKS:
        color = LOOKS[activation].color
    else:
        color = OTHER_LOOKS[[name for name in order if name not in LOOKS].index(activation) % len(OTHER_LOOKS)][0]
    share = _PALEST * position / max(1, len(families[activation]) - 1)
    return _mixed(color, 255, share), _mixed(ON_DARK[color], 30, share)


def _mixed(color: str, ground: int, share: float) -> str:
    parts = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(part + share * (ground - part)):02x}" for part in parts)
