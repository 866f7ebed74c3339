"""Runs → one number per run and quantity, and the table for reading: mean ± SD over seeds for every activation function."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

REFERENCE_DAMPING = 1e-2  # of the examinations at equal loss, the one whose numbers are shown
NAMES = {"elu": "ELU", "relu": "ReLU", "lrelu": "LReLU", "srelu": "SReLU"}
EXAM_KEYS = ("run", "activation", "seed", "exam_probe", "exam_damping")

# column of `per_run` → its name in the table for reading
QUANTITIES = {
    "unit_mean": "mean unit activation, median",
    "unit_mean_abs": "|mean unit activation|, mean",
    "inherited": "share of bias shift inherited",
    "train_loss": "training loss at the end",
    "exam_step": "steps to equal loss",
    "exam_inflation": "coupling 1/(1−h)",
    "exam_k": "k",
    "exam_gap_degrees": "gradient gap (degrees)",
    "exam_smaller_share": "units with |μ − k m| < |μ|",
    "exam_effective_samples": "effective samples",
    "exam_excluded": "excluded units (share)",
}
READING = """\
The first four rows: at equal steps, over all hidden units; shares over all measured steps, layers behind the first.
The others: at equal training loss, layers fed by an activation (medians over units, means over layers, damping 0.01).
Units with fewer than ten effective samples per incoming activation are excluded there: their numbers are biased."""


def per_run(table: "pd.DataFrame") -> "pd.DataFrame":
    """One row per run: its activation and seed, numbers at equal steps (its end), and ``exam_*``, its examination at equal loss.

    ``unit_mean`` is the median over all hidden units of their mean activation (the paper's statistic), ``unit_mean_abs`` the mean
    of its absolute value. ``exam_*`` are those of `biasshift.examining.layer_statistics`, at damping 0.01, averaged over two
    disjoint probes and over the layers that are fed by an activation; NaN for a run that never came down to the equal loss.

    Raises:
        ValueError: when the table lacks the columns of a run.
    """
    import pandas as pd

    missing = {"run", "activation", "seed", "inputs", "mean", "train_loss"} - set(table)
    if missing:
        raise ValueError(f"These runs have no column {sorted(missing)[0]!r}: give runs of `biasshift demo` or `biasshift train`.")
    rows = [
        {"run": name, "activation": run["activation"].iloc[0], "seed": run["seed"].iloc[0], **_at_the_end(run)}
        for name, run in table.groupby("run", observed=True, sort=False)
    ]
    numbers = pd.DataFrame(rows)
    exams = examinations(table)
    exams = exams[exams["exam_damping"] == REFERENCE_DAMPING].drop(columns=["activation", "seed", "exam_probe", "exam_damping"])
    return numbers.join(exams.groupby("run", observed=True).mean(), on="run")


def _at_the_end(run: "pd.DataFrame") -> dict[str, float]:
    means = _last(run[(run["unit"] >= 0) & run["mean"].notna()])["mean"]
    losses = _last(run[run["train_loss"].notna()])
    behind = run[run["layer"].isin(fed_layers(run))]
    return {
        "unit_mean": means.median(),
        "unit_mean_abs": means.abs().mean(),
        "inherited": inherited_share(behind),
        "train_loss": losses["train_loss"].mean(),
    }


def examinations(table: "pd.DataFrame") -> "pd.DataFrame":
    """One row per run, probe and damping: the statistics at equal loss, means over the layers that are fed by an activation."""
    import numpy as np

    if "exam_damping" not in table:
        return table.assign(**{name: np.nan for name in QUANTITIES if name.startswith("exam_")}, exam_probe=0, exam_damping=0.0).iloc[:0]
    rows = table[table["exam_damping"].notna()]
    rows = rows.assign(exam_step=rows["step"].astype(float), exam_excluded=1 - rows["exam_enough"])
    columns = [name for name in QUANTITIES if name.startswith("exam_")]
    return rows.groupby(list(EXAM_KEYS), observed=True, sort=False)[columns].mean().reset_index()


def fed_layers(run: "pd.DataFrame") -> list[str]:
    """Weight layers behind the first: those that are fed by an activation, not by the data."""
    return list(run[run["inputs"].notna()]["layer"].astype(str).drop_duplicates())[1:]


def inherited_share(rows: "pd.DataFrame") -> float:
    """``Σ|incoming| / Σ(|own| + |incoming| + |second order|)`` over the given rows."""
    own, incoming, second = (rows[name].abs().sum() for name in ("own", "incoming", "second_order"))
    total = own + incoming + second
    return incoming / total if total > 0 else float("nan")


def _last(rows: "pd.DataFrame") -> "pd.DataFrame":
    return rows[rows["step"] == rows["step"].max()]


def reading_table(numbers: "pd.DataFrame") -> "pd.DataFrame":
    """`per_run` → one row per quantity, one column per activation function, as text: mean ± SD over seeds."""
    import pandas as pd

    columns = {}
    for activation, group in numbers.groupby("activation", observed=True, sort=False):
        texts = {title: mean_and_sd(group[column]) for column, title in QUANTITIES.items()}
        columns[NAMES.get(str(activation), str(activation))] = {**texts, "seeds": str(len(group))}
    return pd.DataFrame(columns)


def mean_and_sd(values: "pd.Series") -> str:
    """ "0.31 ± 0.02"; a dash where no run has a value, and how many have one where some have none."""
    found = values.dropna()
    if not len(found):
        return "–"
    size = found.abs().mean()
    digits = 0 if size >= 100 else 1 if size >= 10 else 2 if size >= 1 else 3
    sd = f" ± {found.std():.{digits}f}" if len(found) > 1 else ""
    return f"{found.mean():.{digits}f}{sd}" + (f" (n = {len(found)})" if len(found) < len(values) else "")
