"""What was measured of the layers along a run: one point per layer and step, of units that carry a
number.
"""

from collections import defaultdict
from collections.abc import Callable
from math import nan

import numpy as np
import pandas as pd
import torch
from scipy.stats import rankdata

from biasshift.analysis.quantities import (
    ENOUGH_UNITS,
    EXAM_KEYS,
    enough_samples,
    fed_layers,
    gap_degrees,
    layer_inputs,
)
from biasshift.theory import hotelling

FEWEST = 3  # points, to rank them
COLUMNS = ("step", "layer", "incoming", "coupling", "corrected", "gap", "smaller")
POINT = (*EXAM_KEYS, "layer")  # what identifies a point of an examination
EXAMINED = {  # column of an examination → the name of what was measured along the run
    "exam_inflation": "coupling",
    "exam_gap_degrees": "gap",
    "exam_mean_in_abs": "incoming",
    "exam_smaller_share": "smaller",
    "exam_loss": "loss",
}
NEEDED = {
    "coupling", "effective_samples", "norm_mean_p", "norm_corrected_mean", "mean_in_abs",
    "cos_gradient",
}  # fmt: skip


def points_of(run: pd.DataFrame) -> pd.DataFrame:
    """Returns one row per measured step and layer that is fed by an activation.

    * ``incoming``: the mean of |E_p(a)| over inputs.
    * ``coupling``: the median of h over units; ``corrected``: that of h corrected for few samples.
    * ``gap``: degrees between gradient and unit natural gradient of the whole layer, NaN unless all
      of its units have enough effective samples.
    * ``smaller``: the share of units with |μ − k m| < |μ|.

    A layer most of whose units have too few effective samples has no row.
    """
    if not set(run) >= NEEDED:
        return pd.DataFrame(columns=list(COLUMNS))
    inputs, point = layer_inputs(run), ["step", "layer"]
    behind = run[run["layer"].isin(fed_layers(run))].astype({"layer": str})
    units = behind[(behind["unit"] >= 0) & behind["coupling"].notna()]
    smaller = units["norm_corrected_mean"] < units["norm_mean_p"]
    units = units.assign(
        enough=enough_samples(units, inputs),
        corrected=_corrected(units, inputs),
        smaller=smaller.where(units["norm_corrected_mean"].notna()).astype(float),
    )
    sufficient = units[units["enough"]].groupby(point)
    whole = behind[(behind["unit"] < 0) & behind["cos_gradient"].notna()].set_index(point)
    points = sufficient[["coupling", "corrected"]].median()
    points = points.assign(smaller=sufficient["smaller"].mean())
    points = points.join(whole[["mean_in_abs", "cos_gradient"]])
    points = points.assign(enough=units.groupby(point)["enough"].mean())
    points = points[points["enough"] >= ENOUGH_UNITS]
    gap = gap_degrees(points["cos_gradient"].astype(float)).where(points["enough"] == 1)
    return points.assign(incoming=points["mean_in_abs"], gap=gap).reset_index()[list(COLUMNS)]


def _corrected(units: pd.DataFrame, inputs: pd.Series) -> pd.Series:
    """h of every unit without the bias that few samples give it."""
    corrected = pd.Series(np.nan, index=units.index)
    for layer, rows in units.groupby("layer"):
        h, samples = (
            torch.tensor(rows[name].to_numpy(float)) for name in ("coupling", "effective_samples")
        )
        unbiased = hotelling(h / (1 - h), samples, int(inputs[layer]))
        corrected.loc[rows.index] = (unbiased / (1 + unbiased)).numpy()
    return corrected


def exam_points(table: pd.DataFrame) -> pd.DataFrame:
    """Returns one row per run, layer, probe and damping of the examinations at equal loss.

    Columns ``coupling`` (here 1/(1−h)), ``gap``, ``incoming``, ``smaller`` and ``loss``. They are
    NaN where most units of a layer have too few effective samples, and where something was not
    examined.
    """
    columns = list(EXAMINED.values())
    if not set(table) >= {*POINT, "exam_enough"}:
        return pd.DataFrame(columns=[*POINT, *columns]).astype(dict.fromkeys(columns, float))
    rows = table[table["exam_damping"].notna()]
    rows = rows.reindex(columns=[*POINT, "exam_enough", *EXAMINED]).rename(columns=EXAMINED)
    rows[columns] = rows[columns].where(rows["exam_enough"] >= ENOUGH_UNITS)
    return rows.drop(columns="exam_enough").astype({"run": str, "activation": str, "layer": str})


def elu_minus_relu(
    points: pd.DataFrame, column: str, at: list[str], transform: Callable = lambda x: x
) -> pd.Series:
    """Returns ELU minus ReLU, seed by seed.

    It is the mean over the points that both have a number for. A seed without such a point is left
    out.

    Args:
        points: as `points_of` or `exam_points` return them, with ``activation`` and ``seed``.
        column: what is compared.
        at: the columns in which two points must agree to be compared.
        transform: applied to the numbers before the subtraction.
    """
    pairs = points[points["activation"].isin(["elu", "relu"])] if len(points) else points
    if not len(pairs):
        return pd.Series(dtype=float)
    table = transform(
        pairs.astype({column: float}).pivot_table(
            index=["seed", *at], columns="activation", values=column, observed=True
        )
    )
    if not {"elu", "relu"} <= set(table):
        return pd.Series(dtype=float)
    return (table["elu"] - table["relu"]).dropna().groupby("seed").mean()


def residuals(points: pd.DataFrame, columns: tuple[str, ...], among: list[str]) -> pd.DataFrame:
    """Returns the points with the mean over their group subtracted from each column.

    Points without a finite number in one of the columns are left out.

    Args:
        columns: those that the mean is subtracted from.
        among: the columns in which the points of a group agree; the mean is over all seeds.
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
    points: pd.DataFrame, cause: str, effect: str, within: list[str]
) -> pd.Series:
    """Returns one rank correlation of two columns per seed.

    It is Spearman's correlation within every group of a seed's points that agree in ``within``,
    averaged over groups. A seed none of whose groups can be ranked is left out.
    """
    if not len(points):
        return pd.Series(dtype=float)
    pairs = points[[cause, effect]].to_numpy(float)
    finite = np.isfinite(pairs).all(1)
    points, pairs = points.loc[finite], pairs[finite]
    groups = points.groupby(["seed", *within], observed=True).ngroup().to_numpy()
    seeds, by_seed = points["seed"].to_numpy(), defaultdict(list)
    for group in np.unique(groups):
        here = groups == group
        rho = correlation_of_ranks(*pairs[here].T)
        if rho == rho:
            by_seed[seeds[here][0]].append(rho)
    return pd.Series({seed: np.mean(rhos) for seed, rhos in by_seed.items()}, dtype=float)


def correlation_of_ranks(x: np.ndarray, y: np.ndarray) -> float:
    """Returns Spearman's correlation; NaN for fewer than three points, or where one is constant.

    >>> correlation_of_ranks(np.array([1.0, 2.0, 9.0]), np.array([3.0, 5.0, 4.0]))
    0.5
    """
    if len(x) < FEWEST or x.min() == x.max() or y.min() == y.max():
        return nan
    return float(np.corrcoef(rankdata(x), rankdata(y))[0, 1])
