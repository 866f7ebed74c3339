"""What a figure says about the runs that it shows, and whether they are such as the paper's numbers
are of.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from biasshift.experiments import cifar11, cifar18

if TYPE_CHECKING:
    import pandas as pd

MADE = {
    "smoke": "Smoke run: a tiny version, which shows only that it works.",
    "quick": "Quick version, which decides nothing.",
}
STEPS = {
    "cifar11": ("the paper's ", cifar11.STEPS),
    "cifar18": ("", cifar18.STEPS),
}  # of the latter, the paper leaves some open
EMBEDDED = "digits"  # whose images a smoke run has, too
TESTED = {
    "test_images": (10_000, "test images"),
    "valid_images": (5_000, "validation images"),
}  # of the paper's errors
WITHIN = 0.01  # of the paper's length


def described(table: pd.DataFrame) -> str:
    """Which runs a figure shows, as far as they say it: "digits: 60 epochs, 6 seeds, cpu (x86_64)"."""
    kinds = [_listed(table, "experiment"), _data(table), _shape(table), _unusual(table)]
    seeds = table["seed"].nunique() if "seed" in table else 0
    facts = [
        _length(table),
        _tested(table),
        f"{seeds} seed{'s' if seeds > 1 else ''}" if seeds else "",
        _listed(table, "device"),
    ]
    what, rest = ", ".join(filter(None, kinds)), ", ".join(filter(None, facts))
    made = [MADE[name] for name in MADE if "made" in table and (table["made"] == name).any()]
    return " ".join([*made, ": ".join(filter(None, [what, rest]))])


def over_seeds(table: pd.DataFrame, text: str = "Mean ± SD over seeds") -> str:
    """How several seeds are shown; of one there is nothing to say but that."""
    alone = "One run each, no spread"
    several = "seed" not in table or table["seed"].nunique() != 1
    return text if several else alone if text[0].isupper() else alone.lower()


def synthetic(table: pd.DataFrame) -> bool:
    """Whether some of the runs were trained on something of a data set's shape."""
    smoke = table["made"] == "smoke" if "made" in table else None
    return smoke is not None and bool(
        (smoke & (table["experiment"] != EMBEDDED) if "experiment" in table else smoke).any()
    )


def like_the_papers(table: pd.DataFrame, dataset: str, steps: int | None = None) -> bool:
    """Whether runs are what the paper's numbers are of: its data, networks of its size without
    batch norm, and its length.
    """
    other_data = (
        synthetic(table) or "dataset" not in table or bool((table["dataset"] != dataset).any())
    )
    normed = "batch_norm" in table and bool((table["batch_norm"] == True).any())  # noqa: E712
    other_size = "width" in table and bool((table["width"] != 1).any())
    last = table.groupby("run", observed=True)["step"].max() if steps else None
    other_length = last is not None and bool(((last / steps - 1).abs() > WITHIN).any())
    return len(table) > 0 and not (other_data or normed or other_size or other_length)


def _data(table: pd.DataFrame) -> str:
    if synthetic(table):
        return "synthetic data"
    swept = (
        "experiment" in table and len(table) > 0 and bool((table["experiment"] == "sweep").all())
    )
    return "MNIST at half resolution" if swept else _listed(table, "dataset")


def _tested(table: pd.DataFrame) -> str:
    """Of how many images errors are, where the paper's are of others."""
    found = [
        f"{_range(table[name])} {images}"
        for name, (usual, images) in TESTED.items()
        if name in table and bool((table[name].dropna() != usual).any())
    ]
    return ", ".join(found)


def _listed(table: pd.DataFrame, name: str) -> str:
    return ", ".join(sorted(map(str, table[name].dropna().unique()))) if name in table else ""


def _shape(table: pd.DataFrame) -> str:
    """ "8 × 128": layers and units of fully connected networks."""
    if not {"depth", "width"} <= set(table):
        return ""
    shapes = table[["depth", "width"]].dropna().drop_duplicates()
    return ", ".join(f"{depth:g} × {width:g}" for depth, width in shapes.itertuples(index=False))


def _unusual(table: pd.DataFrame) -> str:
    """What the reader would not expect of all of these networks."""
    scales = (
        sorted(table["width"].dropna().unique())
        if "width" in table and "depth" not in table
        else []
    )
    scaled = (
        f"units × {' and '.join(f'{scale:g}' for scale in scales)}"
        if scales and scales != [1]
        else ""
    )
    normed = "batch_norm" in table and bool((table["batch_norm"] == True).all()) and len(table) > 0  # noqa: E712
    updates = sorted(map(str, table["update"].dropna().unique())) if "update" in table else []
    other = f"{updates[0]} update" if len(updates) == 1 and updates != ["plain"] else ""
    return ", ".join(filter(None, [scaled, "with batch norm" if normed else "", other]))


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
    # The schedule of the learning rate is shortened with the run: it is no beginning of the
    # paper's.
    share = table[planned].max() / usual if usual else 1
    made = "shortened" if share < 1 else "stretched"
    return (
        f"{whole} (schedule {made} from {whose}{usual:,} updates)"
        if abs(share - 1) > WITHIN
        else whole
    )


def _range(values: pd.Series) -> str:
    known = values.dropna()
    return "–".join(
        f"{number:,.3g}" if number < 1000 else f"{number:,.0f}"
        for number in sorted({known.min(), known.max()})
    )
