"""Figures as files: runs → the panels of `biasshift.plots` → PNG and PDF."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from biasshift import plots
from biasshift.summary import fed_layers

if TYPE_CHECKING:
    import pandas as pd

    from biasshift.plots import Figure


def figure1(table: "pd.DataFrame | None" = None) -> "Figure":
    """The four activation functions (the paper's Figure 1). Needs no runs."""
    figure, (ax,) = plots.panels(1)
    plots.activation_functions(ax)
    return figure


def figure2(table: "pd.DataFrame") -> "Figure":
    """Mean unit activations, and training and validation loss, against the epoch (the paper's Figure 2)."""
    figure, (means, losses) = plots.panels(2)
    plots.unit_means(means, table, line="-")
    plots.learning_curves(losses, table, log=True)
    means.legend().remove()  # the same colors and markers as beside it
    means.set_title("(a) mean ± SD over seeds", loc="left")
    losses.set_title("(b) mean ± SD of the logarithm", loc="left")
    figure.suptitle(described(table))
    return figure


def gap(table: "pd.DataFrame") -> "Figure":
    """The gradient gap of every layer that is fed by an activation, against its mean incoming activation."""
    figure, (ax,) = plots.panels(1)
    plots.gap_against_mean(ax, table, layers=fed_layers(table))
    figure.suptitle(described(table))
    ax.set_title("a dot per layer, run and measurement; large: medians", loc="left")
    return figure


FIGURES: dict[str, Callable[..., "Figure"]] = {"1": figure1, "2": figure2, "gap": gap}


def described(table: "pd.DataFrame") -> str:
    """Which runs a figure shows, as far as they say it: "digits: 60 epochs, 6 seeds"."""
    known = ("experiment", "epochs", "seed")
    experiments, epochs, seeds = (sorted(table[name].dropna().unique()) if name in table else [] for name in known)
    length = [f"{'–'.join(f'{number:g}' for number in sorted({epochs[0], epochs[-1]}))} epochs"] if epochs else []
    count = [f"{len(seeds)} seed{'s' if len(seeds) > 1 else ''}"] if seeds else []
    return ": ".join(filter(None, [", ".join(map(str, experiments)), ", ".join(length + count)]))


def draw(name: str, table: "pd.DataFrame | None", folder: Path) -> list[Path]:
    """Draws a figure and writes it as PNG and PDF; returns the paths.

    Raises:
        ValueError: for a figure that does not exist, or runs that lack what it shows.
    """
    if name not in FIGURES:
        raise ValueError(f"There is no figure '{name}': choose one of {', '.join(FIGURES)}.")
    if table is None and name != "1":
        raise ValueError(f"Figure '{name}' shows runs, and there are none.")
    paths = [folder / f"figure_{name}.{kind}" for kind in ("png", "pdf")]
    with plots.style():
        figure = FIGURES[name](table)
        folder.mkdir(parents=True, exist_ok=True)
        for path in paths:
            figure.savefig(path)
    return paths
