"""Runs → one number per run and quantity, and the table for reading: mean ± SD over seeds for every activation function."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

SAMPLES_PER_INPUT = 10  # units with fewer effective samples per incoming activation carry no claim (finite-sample bias)
NAMES = {"elu": "ELU", "relu": "ReLU", "lrelu": "LReLU", "srelu": "SReLU"}

# column of `per_run` → its name in the table for reading
QUANTITIES = {
    "unit_mean": "mean unit activation",
    "inflation": "coupling 1/(1−h)",
    "k": "k",
    "gap": "gradient gap (degrees)",
    "inherited": "inherited share of bias shift",
    "effective_samples": "effective samples",
    "excluded": "excluded units (share)",
    "train_loss": "training loss",
}


def per_run(table: "pd.DataFrame") -> "pd.DataFrame":
    """One row per run, with its activation and seed, and every quantity at equal steps (the run's last measurement).

    Unit quantities are medians over the units of a layer with enough effective samples, then means over the layers that are
    fed by an activation; the gap is the mean angle between gradient and unit natural gradient over these layers; the inherited share
    adds up all measured steps of all these layers; ``unit_mean`` is the median over all units of all activation modules.

    Raises:
        ValueError: when the table lacks the columns of a run.
    """
    import pandas as pd

    missing = {"run", "activation", "seed", "inputs"} - set(table)
    if missing:
        raise ValueError(f"These runs have no column {sorted(missing)}: read runs of `biasshift demo` or `biasshift train`.")
    rows = [
        {"run": name, "activation": run["activation"].iloc[0], "seed": run["seed"].iloc[0], **_quantities(run)}
        for name, run in table.groupby("run", observed=True, sort=False)
    ]
    return pd.DataFrame(rows)


def _quantities(run: "pd.DataFrame") -> dict[str, float]:
    means = _last(run[(run["unit"] >= 0) & run["mean"].notna()])
    hidden = fed_layers(run)
    fishers = _last(run[(run["unit"] >= 0) & run["layer"].isin(hidden) & run["effective_samples"].notna()])
    gaps = _last(run[run["layer"].isin(hidden) & run["cos_gradient"].notna()])
    losses = _last(run[run["train_loss"].notna()])
    return {
        "unit_mean": means["mean"].median(),
        **_fisher_quantities(fishers, hidden),
        "gap": degrees(gaps["cos_gradient"]).mean(),
        "inherited": inherited_share(run[run["layer"].isin(hidden)]),
        "train_loss": losses["train_loss"].mean(),
        "valid_error": losses["valid_error"].mean(),
    }


def _fisher_quantities(units: "pd.DataFrame", inputs: dict[str, float]) -> dict[str, float]:
    enough = units["effective_samples"] >= SAMPLES_PER_INPUT * units["layer"].astype(str).map(inputs)
    kept = units[enough].assign(
        inflation=lambda rows: 1 / (1 - rows["coupling"]), shrinks=lambda rows: (rows["norm_corrected_mean"] < rows["norm_mean_p"]) * 1.0
    )
    layers = kept.groupby("layer", observed=True)
    medians = layers[["inflation", "k"]].median().mean()
    return {
        "inflation": medians["inflation"],
        "k": medians["k"],
        "shrinks": layers["shrinks"].mean().mean(),
        "effective_samples": units["effective_samples"].median(),
        "excluded": 1 - enough.mean(),
    }


def fed_layers(run: "pd.DataFrame") -> dict[str, float]:
    """Weight layers behind the first, which is fed by the data, and how many inputs a unit of theirs has."""
    sizes = run[run["inputs"].notna()].drop_duplicates("layer")
    return dict(zip(sizes["layer"].astype(str)[1:], sizes["inputs"][1:], strict=True))


def inherited_share(rows: "pd.DataFrame") -> float:
    """``Σ|incoming| / Σ(|own| + |incoming| + |second order|)`` over the given rows."""
    own, incoming, second = (rows[name].abs().sum() for name in ("own", "incoming", "second_order"))
    total = own + incoming + second
    return incoming / total if total > 0 else float("nan")


def degrees(cosine: "pd.Series") -> "pd.Series":
    """The angle of a cosine, in degrees."""
    import numpy as np

    return np.degrees(np.arccos(cosine.clip(-1, 1)))


def _last(rows: "pd.DataFrame") -> "pd.DataFrame":
    return rows[rows["step"] == rows["step"].max()]


def reading_table(runs: "pd.DataFrame") -> "pd.DataFrame":
    """``per_run`` → one row per activation function, quantities as text, mean ± SD over seeds."""
    import pandas as pd

    rows = {}
    for activation, group in runs.groupby("activation", observed=True, sort=False):
        rows[NAMES.get(str(activation), str(activation))] = {title: _mean_and_sd(group[column]) for column, title in QUANTITIES.items()} | {
            "seeds": str(len(group))
        }
    return pd.DataFrame(rows).T


def _mean_and_sd(values: "pd.Series") -> str:
    values = values.dropna()
    if not len(values):
        return "too few samples"
    digits = 0 if values.abs().mean() >= 100 else 1 if values.abs().mean() >= 10 else 3
    sd = f" ± {values.std():.{digits}f}" if len(values) > 1 else ""
    return f"{values.mean():.{digits}f}{sd}"
