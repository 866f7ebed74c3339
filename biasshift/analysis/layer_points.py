"""What was measured of the layers along a run: one point per layer and step, of units that carry a
number.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch

from biasshift.analysis.per_run import (
    ENOUGH_UNITS,
    EXAM_KEYS,
    enough_samples,
    fed_layers,
    layer_inputs,
)
from biasshift.theory import hotelling

if TYPE_CHECKING:
    import pandas as pd

FEWEST = 3  # points, to rank them
COLUMNS = ("step", "layer", "incoming", "coupling", "corrected", "gap", "smaller")
POINT = (*EXAM_KEYS, "layer")  # what tells the points of an examination apart
EXAMINED = {  # what an examination found → the name of what was measured along the run
    "exam_inflation": "coupling", "exam_gap_degrees": "gap", "exam_mean_in_abs": "incoming", "exam_smaller_share": "smaller",
    "exam_loss": "loss",
}  # fmt: skip
NEEDED = (
    "coupling",
    "effective_samples",
    "norm_mean_p",
    "norm_corrected_mean",
    "mean_in_abs",
    "cos_gradient",
)


def points_of(run: "pd.DataFrame") -> "pd.DataFrame":
    """One row per measured step and layer that is fed by an activation.

    ``incoming``: the mean of |E_p(a)| over inputs; ``coupling``: the median of h over units;
    ``corrected``: that of h corrected for few samples; ``gap``: degrees between gradient and unit
    natural gradient of the whole layer, NaN unless all of its units have enough effective samples;
    ``smaller``: the share of units with |μ − k m| < |μ|. Layers most of whose units have too few
    have no row.
    """
    import pandas as pd

    if any(name not in run for name in NEEDED):
        return pd.DataFrame(columns=list(COLUMNS))
    inputs = layer_inputs(run)
    behind = run[run["layer"].isin(fed_layers(run))].astype({"layer": str})
    units = behind[(behind["unit"] >= 0) & behind["coupling"].notna()]
    enough = enough_samples(units, inputs)
    smaller = (units["norm_corrected_mean"] < units["norm_mean_p"]).where(
        units["norm_corrected_mean"].notna()
    )
    units = units.assign(
        enough=enough, corrected=_corrected(units, inputs), smaller=smaller.astype(float)
    )
    layers = units.groupby(["step", "layer"])["enough"].mean()
    kept = units[units["enough"]].groupby(["step", "layer"])
    found = pd.DataFrame(
        {
            "coupling": kept["coupling"].median(),
            "corrected": kept["corrected"].median(),
            "smaller": kept["smaller"].mean(),
        }
    )
    whole = behind[(behind["unit"] < 0) & behind["cos_gradient"].notna()].set_index(
        ["step", "layer"]
    )
    found = found.join(whole[["mean_in_abs", "cos_gradient"]]).assign(enough=layers)
    found = found[found["enough"] >= ENOUGH_UNITS]
    gap = np.degrees(np.arccos(found["cos_gradient"].astype(float).clip(-1, 1))).where(
        found["enough"] == 1
    )
    return found.assign(incoming=found["mean_in_abs"], gap=gap).reset_index()[list(COLUMNS)]


def _corrected(units: "pd.DataFrame", inputs: "pd.Series") -> "pd.Series":
    """h of every unit without the bias that few samples give it."""
    import pandas as pd

    found = pd.Series(np.nan, index=units.index)
    for layer, rows in units.groupby("layer"):
        h, samples = (
            torch.tensor(rows[name].to_numpy(float)) for name in ("coupling", "effective_samples")
        )
        unbiased = hotelling(h / (1 - h), samples, int(inputs[layer]))
        found.loc[rows.index] = (unbiased / (1 + unbiased)).numpy()
    return found


def exam_points(table: "pd.DataFrame") -> "pd.DataFrame":
    """One row per run, layer, probe and damping of the examinations, at equal loss: ``coupling``,
    ``gap``, ``incoming``, ``smaller``, ``loss``.

    NaN where most units of a layer have too few effective samples; what was not examined is NaN,
    too.
    """
    import pandas as pd

    if any(name not in table for name in (*POINT, "exam_enough")):
        return pd.DataFrame(columns=[*POINT, *EXAMINED.values()]).astype(
            dict.fromkeys(EXAMINED.values(), float)
        )
    rows = table[table["exam_damping"].notna()]
    rows = rows.reindex(columns=[*POINT, "exam_enough", *EXAMINED]).rename(columns=EXAMINED)
    found = list(EXAMINED.values())
    rows[found] = rows[found].where(rows["exam_enough"] >= ENOUGH_UNITS)
    return rows.drop(columns="exam_enough").astype({"run": str, "activation": str, "layer": str})


def between(
    points: "pd.DataFrame", column: str, at: list[str], transform: Callable = lambda x: x
) -> "pd.Series":
    """ELU minus ReLU at the points that agree in ``at`` and that both have a number for; the mean
    over them, seed by seed.
    """
    import pandas as pd

    pairs = points[points["activation"].isin(["elu", "relu"])] if len(points) else points
    if not len(pairs):
        return pd.Series(dtype=float)
    table = transform(
        pairs.astype({column: float}).pivot_table(
            index=["seed", *at], columns="activation", values=column, observed=True
        )
    )
    return (
        (table["elu"] - table["relu"]).dropna().groupby("seed").mean()
        if {"elu", "relu"} <= set(table)
        else pd.Series(dtype=float)
    )


def residuals(points: "pd.DataFrame", columns: tuple[str, ...], among: list[str]) -> "pd.DataFrame":
    """The points with what is left of the columns when the mean over all seeds of the same group is
    taken off.
    """
    pairs = points.loc[np.isfinite(points[list(columns)].to_numpy(float)).all(1)]
    groups = pairs.groupby(among, observed=True)
    return pairs.assign(
        **{
            name: pairs[name].astype(float) - groups[name].transform("mean").astype(float)
            for name in columns
        }
    )


def rank_correlations(
    points: "pd.DataFrame", cause: str, effect: str, within: list[str]
) -> "pd.Series":
    """Spearman's correlation within every group of a seed's points that agree in ``within``,
    averaged over groups: one per seed.
    """
    import pandas as pd

    if not len(points):
        return pd.Series(dtype=float)
    pairs = points[[cause, effect]].to_numpy(float)
    points, pairs = points.loc[there := np.isfinite(pairs).all(1)], pairs[there]
    groups = points.groupby(["seed", *within], observed=True).ngroup().to_numpy()
    seeds, found = points["seed"].to_numpy(), {}
    for group in np.unique(groups):
        here = groups == group
        found.setdefault(seeds[here][0], []).append(correlation_of_ranks(*pairs[here].T))
    return pd.Series(
        {
            seed: np.mean(rhos)
            for seed, some in found.items()
            if (rhos := [rho for rho in some if rho == rho])
        },
        dtype=float,
    )


def correlation_of_ranks(x: "np.ndarray", y: "np.ndarray") -> float:
    """Spearman's, NaN where fewer than three points or one value can be ranked."""
    from scipy.stats import rankdata

    if len(x) < FEWEST or x.min() == x.max() or y.min() == y.max():
        return float("nan")
    return float(np.corrcoef(rankdata(x), rankdata(y))[0, 1])
