"""Which runs form one line of a chart: those that differ only in the seed.

Where there are more groups than a chart can hold, this file also chooses which are drawn.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pandas as pd

from biasshift.activation_names import display_name
from biasshift.analysis.grid import best_rate
from biasshift.plots.theme import ON_DARK, looks
from biasshift.report.html import distinct, number, plain
from biasshift.report.words import in_words

MAX_GROUPS = 12  # of more lines in one chart, the colors look alike
# Columns of `run_states` that make no setting; "examined" says what was measured, not trained.
_NO_OPTIONS = {"run", "state", "last_step", "started", "updated", "seed", "activation", "examined"}
# What is not added to a network is not part of its label.
_WITHOUT: dict[str, Any] = {"constant": 0, "batch_norm": False}
_PALEST = 0.65  # how far the last of several groups of one activation is mixed with the background


@dataclass(frozen=True)
class RunGroup:
    """Runs that differ only in the seed: one line of every chart.

    Args:
        label: The name of the activation, its setting and the number of runs; unique on the page.
        setting: The options that differ from other groups of the same activation.
        runs: Names of the runs.
        color: The color of the line on a light page, "#rrggbb".
        on_dark: Its color on a dark page.
        shown: Whether the charts show it.
    """

    label: str
    setting: str
    runs: tuple[str, ...]
    color: str
    on_dark: str
    shown: bool = True


def run_groups(states: pd.DataFrame, losses: pd.Series | None = None) -> list[RunGroup]:
    """Groups runs by activation and by every option in which runs of one activation differ.

    The hue is that of the activation; a further setting of the same activation is paler. Up to
    `MAX_GROUPS` groups are all shown, in the order of the runs. Of more, only those at their best
    learning rate are shown; shown and large groups come first.

    Args:
        states: The table of `biasshift.runs.reader.run_states`, one row per run.
        losses: The training loss that each run ended with, NaN for a run that failed. None keeps
            every learning rate.
    """
    if "activation" not in states:
        states = states.assign(activation="")
    activation = states["activation"].astype(object)
    states = states.assign(activation=activation.where(activation.notna(), "").astype(str))
    options = _options_that_vary(states)
    by = states.groupby(["activation", *options], sort=False, observed=True, dropna=False)
    keyed = [(key, tuple(rows["run"].astype(str))) for key, rows in by]
    shown = [True] * len(keyed)
    if len(keyed) > MAX_GROUPS:
        best = _at_best_rates(states, options, losses)
        keyed.sort(key=lambda group: (group[0] not in best, -len(group[1])))
        shown = [key in best and place < MAX_GROUPS for place, (key, _) in enumerate(keyed)]
    settings = [_setting(dict(zip(options, key[1:], strict=True))) for key, _ in keyed]
    labels = distinct(
        [
            _label(key[0], setting, len(runs))
            for (key, runs), setting in zip(keyed, settings, strict=True)
        ]
    )
    hues = _hues(key[0] for key, _ in keyed)
    drawn = Counter(key[0] for (key, _), visible in zip(keyed, shown, strict=True) if visible)
    groups, before = [], Counter()
    for (key, runs), setting, label, visible in zip(keyed, settings, labels, shown, strict=True):
        name, hue = key[0], hues[key[0]]
        share = _PALEST * min(1.0, before[name] / max(1, drawn[name] - 1))
        before[name] += 1
        color, on_dark = _mixed(hue, 255, share), _mixed(ON_DARK[hue], 30, share)
        groups.append(RunGroup(label, setting, runs, color, on_dark, visible))
    return groups


def _options_that_vary(states: pd.DataFrame) -> list[str]:
    groups = states.groupby("activation", observed=True)
    return [
        name
        for name in states
        if name not in _NO_OPTIONS and groups[name].nunique(dropna=False).max() > 1
    ]


def _at_best_rates(
    states: pd.DataFrame, options: list[str], losses: pd.Series | None
) -> set[tuple[Any, ...]]:
    """The groups at the learning rate that `biasshift.analysis.grid.RULE` chooses of those tried
    for the network; all groups where no rate was.
    """
    keys = ["activation", *options]
    rates = losses is not None and "lr" in options and pd.api.types.is_numeric_dtype(states["lr"])
    network = [name for name in keys if name != "lr"] if rates else keys
    grouped = {"sort": False, "observed": True, "dropna": False}
    best: set[tuple[Any, ...]] = set()
    for _, rows in states.assign(train_loss=losses).groupby(network, **grouped):
        if rates and rows["lr"].notna().all():
            rows = rows.loc[rows["lr"] == best_rate(rows)]
        best |= {key for key, _ in rows.groupby(keys, **grouped)}
    return best


# -- labels ----------------------------------------------------------------------------------------


def _setting(options: dict[str, Any]) -> str:
    return ", ".join(
        f"{plain(in_words(name), 40)} = {_value(value)}"
        for name, value in options.items()
        if _WITHOUT.get(name) != value
    )


def _value(value: Any) -> str:
    if value is None or value != value:
        return "–"
    return number(value) if isinstance(value, float) else plain(value, 40)


def _label(activation: str, setting: str, runs: int) -> str:
    name = display_name(activation) if activation else ""
    return f"{', '.join(filter(None, [name, plain(setting, 80)])) or 'all runs'} (n = {runs})"


# -- colors ----------------------------------------------------------------------------------------


def _hues(activations: Iterable[str]) -> dict[str, str]:
    return {name: look.color for name, look in looks(activations).items()}


def _mixed(color: str, background: int, share: float) -> str:
    """A color with a share of gray: the level of its red, green and blue."""
    parts = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(part + share * (background - part)):02x}" for part in parts)
