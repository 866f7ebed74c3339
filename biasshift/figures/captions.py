"""What a figure says about the runs that it shows, and whether the paper's numbers are of such."""

from collections.abc import Sequence

import pandas as pd

from biasshift import plots
from biasshift.experiments import cifar11, cifar18

MADE = {
    "smoke": "Smoke run: a tiny version, which shows only that it works.",
    "quick": "Quick version, which decides nothing.",
}
# Whose numbers of steps these are. Of its 18-layer networks, the paper leaves some open.
STEPS = {"cifar11": ("the paper's ", cifar11.STEPS), "cifar18": ("", cifar18.STEPS)}
EMBEDDED = "digits"  # whose images a smoke run has, too
# The images that the paper's errors are of.
TESTED = {"test_images": (10_000, "test images"), "valid_images": (5_000, "validation images")}
WITHIN = 0.01  # of the paper's length


def described(table: pd.DataFrame) -> str:
    """Returns which runs a figure shows: "digits: 60 epochs, 6 seeds, cpu (x86_64)".

    Before the colon stand experiment, data set, and what is unusual about the networks; behind it
    length, images, seeds and devices. What the table does not have is left out, and so is what is
    as in the paper.

    Args:
        table: rows of runs, with any of the columns `RUN_COLUMNS`.
    """
    seeds = table["seed"].nunique() if "seed" in table else 0
    subject = [_listed(table, "experiment"), _data(table), _shape(table), _unusual(table)]
    facts = [
        _length(table),
        _tested(table),
        f"{seeds} seed{'s' if seeds > 1 else ''}" if seeds else "",
        _listed(table, "device"),
    ]
    halves = [", ".join(filter(None, parts)) for parts in (subject, facts)]
    made = [MADE[name] for name in MADE if "made" in table and (table["made"] == name).any()]
    return " ".join([*made, ": ".join(filter(None, halves))])


def over_seeds(table: pd.DataFrame, text: str = "Mean ± SD over seeds") -> str:
    """Returns how several seeds are shown, or that there is only one run each.

    Args:
        text: what to say of several seeds. If it begins with a small letter, so does the other.
    """
    if "seed" not in table or table["seed"].nunique() != 1:
        return text
    alone = "One run each, no spread"
    return alone if text[0].isupper() else alone.lower()


def finish(
    figure: plots.Figure,
    axes: Sequence[plots.Axes],
    letters: Sequence[str],
    heading: str,
    named: Sequence[plots.Axes] | None = None,
    columns: int = 6,
) -> plots.Figure:
    """Returns a figure with a letter and title over each panel, one legend below and a heading.

    Args:
        axes: the panels.
        letters: their titles, which stand behind the letters: "(a) …".
        heading: what stands over all panels.
        named: the panels whose lines are in the legend; default: all.
        columns: of the legend, at most.
    """
    plots.lettered(axes, letters)
    plots.one_legend(figure, axes if named is None else named, columns)
    plots.headed(figure, heading)
    return figure


def synthetic(table: pd.DataFrame) -> bool:
    """Returns whether some of the runs were trained on random data of a data set's shape.

    Smoke runs are, except for those on the images that come with scikit-learn.
    """
    other = table.get("experiment") != EMBEDDED  # True where no experiment is recorded
    return "made" in table and bool(((table["made"] == "smoke") & other).any())


def comparable(table: pd.DataFrame, dataset: str, steps: int | None = None) -> bool:
    """Returns whether the paper's numbers are of such runs.

    They are if the data set is the paper's, and so is the size of the networks, without batch
    normalization. The length must be the paper's within 1 %.

    Args:
        dataset: the name of the paper's data set, as runs record it.
        steps: the length of the paper's runs; None if any length will do.
    """
    if len(table) == 0 or synthetic(table) or "dataset" not in table:
        return False
    last = table.groupby("run", observed=True)["step"].max() if steps else None
    return not (
        (table["dataset"] != dataset).any()
        or ("batch_norm" in table and table["batch_norm"].eq(True).any())
        or ("width" in table and (table["width"] != 1).any())
        or ("schedule" in table and table["schedule"].eq("late").any())
        or (last is not None and ((last / steps - 1).abs() > WITHIN).any())
    )


def _data(table: pd.DataFrame) -> str:
    if synthetic(table):
        return "synthetic data"
    swept = "experiment" in table and len(table) > 0 and (table["experiment"] == "sweep").all()
    return "MNIST at half resolution" if swept else _listed(table, "dataset")


def _shape(table: pd.DataFrame) -> str:
    """ "8 × 128": layers and units of fully connected networks."""
    if not {"depth", "width"} <= set(table):
        return ""
    shapes = table[["depth", "width"]].dropna().drop_duplicates()
    return ", ".join(f"{depth:g} × {width:g}" for depth, width in shapes.itertuples(index=False))


def _unusual(table: pd.DataFrame) -> str:
    """What the reader would not expect of all of these networks."""
    fully_connected = "width" not in table or "depth" in table
    scales = [] if fully_connected else sorted(table["width"].dropna().unique())
    normed = "batch_norm" in table and len(table) > 0 and table["batch_norm"].eq(True).all()
    undropped = "dropout" in table and len(table) > 0 and table["dropout"].eq(0).all()
    updates = sorted(map(str, table["update"].dropna().unique())) if "update" in table else []
    parts = [
        f"units × {' and '.join(f'{scale:g}' for scale in scales)}" * (scales not in ([], [1])),
        "with batch norm" if normed else "",
        "without dropout" if undropped else "",
        f"{updates[0]} update" if len(updates) == 1 and updates != ["plain"] else "",
    ]
    return ", ".join(filter(None, parts))


def _length(table: pd.DataFrame) -> str:
    """What the runs were meant to be, and how far they got if that is less."""
    by_steps = "steps" in table and table["steps"].notna().any()
    planned, got, unit = (
        ("steps", "last_step", "step") if by_steps else ("epochs", "reached", "epoch")
    )
    if planned not in table or not table[planned].notna().any():
        return ""
    whole = f"{_range(table[planned])} {unit}{'s' if table[planned].max() != 1 else ''}"
    if got in table and (table[got] < table[planned] - 1e-6).any():
        whole = f"{_range(table[got])} of {whole} (some ended early)"
    whose, usual = STEPS.get(_listed(table, "experiment") if by_steps else "", ("", 0))
    share = table[planned].max() / usual if usual else 1
    if abs(share - 1) <= WITHIN:
        return whole
    if "schedule" in table and table["schedule"].eq("late").any():
        early = f"early learning (the paper's are {usual:,})"
        return f"{whole} of {early}, rate falls at 0.7 and 0.9 of them"
    # The schedule of the learning rate is shortened with the run, which is not the beginning of
    # the paper's.
    change = "shortened" if share < 1 else "stretched"
    return f"{whole} (schedule {change} from {whose}{usual:,} updates)"


def _tested(table: pd.DataFrame) -> str:
    """The number of images that errors are of, where it is not the paper's."""
    return ", ".join(
        f"{_range(table[name])} {images}"
        for name, (usual, images) in TESTED.items()
        if name in table and (table[name].dropna() != usual).any()
    )


def _listed(table: pd.DataFrame, name: str) -> str:
    return ", ".join(sorted(map(str, table[name].dropna().unique()))) if name in table else ""


def _range(values: pd.Series) -> str:
    known = values.dropna()
    return "–".join(
        f"{number:,.3g}" if number < 1000 else f"{number:,.0f}"
        for number in sorted({known.min(), known.max()})
    )
