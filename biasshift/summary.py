"""Runs → one number per run and quantity, and the table for reading: mean ± SD over seeds for every activation function."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

REFERENCE_DAMPING = 1e-2  # of the examinations at equal loss, the one whose numbers are shown
NAMES = {"elu": "ELU", "relu": "ReLU", "lrelu": "LReLU", "srelu": "SReLU"}
EXAM_KEYS = ("run", "activation", "seed", "exam_probe", "exam_damping")
REMEDY = "give runs of `biasshift demo` or `biasshift train`"
NEEDED = ("run", "activation", "seed", "epochs", "epoch", "inputs", "mean", "own", "train_loss")
# What runs that are compared must share, where they record it.
SHARED = (
    "experiment", "epochs", "batch_size", "lr", "momentum", "depth", "width", "init",
    "probe_size", "exam_size", "means_every", "equal_loss", "units_measured",
)  # fmt: skip

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
    A run that was stopped before its last epoch has no numbers at its end: NaN.

    Raises:
        ValueError: when the table lacks the columns of a run, or holds runs that cannot be compared: of two settings, or two
            of one activation and seed.
    """
    import pandas as pd

    _refuse_mixture(table)
    rows = [
        {"run": name, "activation": run["activation"].iloc[0], "seed": run["seed"].iloc[0], **_at_the_end(run)}
        for name, run in table.groupby("run", observed=True, sort=False)
    ]
    numbers = pd.DataFrame(rows)
    exams = examinations(table)
    exams = exams[exams["exam_damping"] == REFERENCE_DAMPING].drop(columns=["activation", "seed", "exam_probe", "exam_damping"])
    return numbers.join(exams.groupby("run", observed=True).mean(), on="run")


def _refuse_mixture(table: "pd.DataFrame") -> None:
    if missing := [name for name in NEEDED if name not in table]:
        raise ValueError(f"These runs have no column '{missing[0]}': {REMEDY}.")
    runs = table.drop_duplicates("run")
    for name in SHARED:
        values = sorted(runs[name].dropna().unique()) if name in table else []
        if len(values) > 1:
            raise ValueError(f"These runs differ in '{name}' ({', '.join(map(str, values))}): give runs of one setting.")
    if len(twice := runs[runs.duplicated(["activation", "seed"])]):
        activation, seed = twice.iloc[0][["activation", "seed"]]
        raise ValueError(f"There are two runs of '{activation}' with seed {seed}: give one of them.")


def _at_the_end(run: "pd.DataFrame") -> dict[str, float]:
    if not run["epoch"].max() >= run["epochs"].iloc[0]:
        return dict.fromkeys(("unit_mean", "unit_mean_abs", "inherited", "train_loss"), float("nan"))
    means = _last(run[(run["unit"] >= 0) & run["mean"].notna()])["mean"].astype(float)
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
    import pandas as pd

    columns = [name for name in QUANTITIES if name.startswith("exam_")]
    if "exam_damping" not in table:
        return pd.DataFrame(columns=[*EXAM_KEYS, *columns]).astype(dict.fromkeys(["exam_damping", *columns], "float64"))
    rows = table[table["exam_damping"].notna()]
    rows = rows.assign(exam_step=rows["step"].astype(float), exam_excluded=1 - rows["exam_enough"])
    return rows.groupby(list(EXAM_KEYS), observed=True, sort=False)[columns].mean().reset_index()


def fed_layers(run: "pd.DataFrame") -> list[str]:
    """Weight layers behind the first: those that are fed by an activation, not by the data.

    Raises:
        ValueError: when the runs do not say which layers they have.
    """
    if "inputs" not in run:
        raise ValueError(f"These runs have no column 'inputs': {REMEDY}.")
    return list(run[run["inputs"].notna()]["layer"].astype(str).drop_duplicates())[1:]


def inherited_share(rows: "pd.DataFrame") -> float:
    """``Σ|incoming| / Σ(|own| + |incoming| + |second order|)`` over the given rows."""
    own, incoming, second = (float(rows[name].abs().sum()) for name in ("own", "incoming", "second_order"))
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
