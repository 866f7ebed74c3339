"""The unit Fisher matrices of a layer in a table, in one line, and in a notebook."""

import html
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

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
    import pandas as pd

    columns = {name: _numpy(getattr(fisher, name)) for name in COLUMNS}
    return pd.DataFrame({"unit": range(len(fisher.dead)), **columns})


def line(fisher: Any) -> str:
    """Returns the layer in one line, from its sums: nothing is solved."""
    units, inputs = fisher.sums.first.shape
    name = f"'{fisher.name}', " if fisher.name else ""
    return (
        f"UnitFisher({name}{units} units × {inputs} inputs, {fisher.sums.examples} examples, "
        f"labels={fisher.labels!r}, damping={fisher.damping}, bias={fisher.bias}, "
        f"dtype={fisher.dtype}, storage={fisher.storage!r}, {_reliable(fisher)})"
    )


def page(fisher: Any) -> str:
    """Returns the layer as HTML: medians and ranges over its units."""
    names, note = ["mean_delta2", "effective_samples"], ""
    units, inputs = fisher.sums.first.shape
    if fisher.storage != "implicit" and units * inputs**3 / 3 <= UNASKED:
        try:
            _ = fisher.coupling
            names[1:1] = INVERSE if fisher.bias else ("coupling",)
        except ValueError as error:  # no inverse without damping
            note = f"<p>{html.escape(str(error))}</p>"
    rows = "".join(_row(name, getattr(fisher, name)) for name in names)
    dead, inert = int(fisher.dead.sum()), int(fisher.bias_inert.sum())
    return (
        f"<div><p><code>{html.escape(line(fisher))}</code></p>"
        f"<p>{dead} of {units} units are dead, {inert} have a bias without influence.</p>{note}"
        "<table><thead><tr><th></th><th>median</th><th>least</th><th>most</th></tr></thead>"
        f"<tbody>{rows}</tbody></table></div>"
    )


def _row(name: str, values: Tensor) -> str:
    known = values[~values.isnan()].double()
    numbers = [known.median(), known.min(), known.max()] if len(known) else []
    cells = [f"{x.item():.4g}" for x in numbers] or ["–"] * 3
    return f"<tr><th>{name}</th>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def _reliable(fisher: Any) -> str:
    """How many units may be reliable, as far as their sums tell."""
    sums = fisher.sums
    units, inputs = sums.first.shape
    enough = sums.effective_samples >= SAMPLES_PER_INPUT * inputs
    count = int((enough & ~(sums.dead | sums.bias_inert)).sum())
    return f"reliable at most {count} of {units}" if count else f"reliable 0 of {units}"


def _numpy(x: Tensor):
    return (x.detach() if x.dtype == torch.bool else x.detach().double()).cpu().numpy()
