"""The unit Fisher matrices of a layer in a table, in one line, and in a notebook."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from biasshift.display import median_and_range, page as html_page, unit_table
from biasshift.fisher.sample_size import SAMPLES_PER_INPUT

if TYPE_CHECKING:
    import pandas as pd

INVERSE = ("s", "k", "k0", "coupling")
FLAGS = ("dead", "singular", "bias_inert", "imprecise", "reliable")
COLUMNS = ("mean_delta2", *INVERSE, "effective_samples", *FLAGS)
# Operations of the solve that a notebook may wait for unasked; larger layers show what is summed.
UNASKED = 2e9


def table(fisher: Any) -> "pd.DataFrame":
    """Returns one row per unit of a layer; `UnitFisher.table` explains the columns."""
    return unit_table({name: getattr(fisher, name) for name in COLUMNS})


def line(fisher: Any) -> str:
    """Returns the layer in one line; nothing is solved for it.

    From sums alone it is known how many units may be reliable at most, and which are dead. Where
    `UnitFisher.reliable` or the table has been read, the line says what is so.
    """
    units, inputs = fisher.sums.first.shape
    name = f"'{fisher.name}', " if fisher.name else ""
    return (
        f"UnitFisher({name}{units} units × {inputs} inputs, {fisher.sums.examples} examples, "
        f"labels={fisher.labels!r}, damping={fisher.damping}, bias={fisher.bias}, "
        f"dtype={fisher.dtype}, storage={fisher.storage!r}, {_trust(fisher)})"
    )


def page(fisher: Any) -> str:
    """Returns the layer as HTML: medians and ranges over its units."""
    names, notes = ["mean_delta2", "effective_samples"], []
    units, inputs = fisher.sums.first.shape
    if fisher.storage != "implicit" and units * inputs**3 / 3 <= UNASKED:
        try:
            _ = fisher.coupling, fisher.reliable
            names[1:1] = INVERSE if fisher.bias else ("coupling",)
        except ValueError as error:  # no inverse without damping
            notes.append(str(error))
    dead, inert = int(fisher.dead.sum()), int(fisher.bias_inert.sum())
    counts = f"{dead} of {units} units are dead, {inert} have a bias without influence."
    rows = {name: _row(getattr(fisher, name)) for name in names}
    return html_page(line(fisher), rows, counts, *notes)


def _row(values: Tensor) -> dict[str, str]:
    cells = [f"{x:.4g}" for x in median_and_range(values)] or ["–"] * 3
    return dict(zip(("median", "least", "most"), cells, strict=True))


def _trust(fisher: Any) -> str:
    """Effective samples, and how many units are dead, singular, and reliable, as far as known."""
    sums, solved = fisher.sums, {"singular", "imprecise"} <= vars(fisher).keys()
    units, inputs = sums.first.shape
    live, samples = ~sums.dead, sums.effective_samples
    enough = samples >= SAMPLES_PER_INPUT * inputs
    reliable = fisher.reliable if solved else enough & live & ~sums.bias_inert
    singular = fisher.singular if solved else torch.zeros_like(live)
    # NaN where every unit is dead; the device is waited for once
    middle = samples.where(live, torch.nan).nanmedian().double()
    counts = torch.stack([x.sum().double() for x in (~live, singular, reliable)])
    numbers = torch.cat([middle[None], counts]).tolist()
    dead, several, good = (int(x) for x in numbers[1:])
    parts = [f"effective samples {numbers[0]:.0f}"] if dead < units else []
    parts += [f"dead {dead}"] if dead else []
    parts += [f"singular {several}"] if several else []
    bound = "" if solved or not good else "at most "
    return ", ".join([*parts, f"reliable {bound}{good} of {units}"])
