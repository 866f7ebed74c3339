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
    plots.unit_means(means, table)
    plots.learning_curves(losses, table, log=True)
    means.legend().remove()  # the same lines as beside it
    means.set_title("(a) mean unit activation", loc="left")
    losses.set_title("(b) cross-entropy", loc="left")
    figure.suptitle(f"{described(table)}, mean ± SD")
    return figure


def gap(table: "pd.DataFrame") -> "Figure":
    """The gradient gap of every layer that is fed by an activation, against its mean incoming activation."""
    figure, (ax,) = plots.panels(1)
    plots.gap_against_mean(ax, table, layers=fed_layers(table))
    figure.suptitle(f"{described(table)}\na dot per layer, run and measurement; large: medians")
    return figure


FIGURES: dict[str, Callable[..., "Figure"]] = {"1": figure1, "2": figure2, "gap": gap}


def described(table: "pd.DataFrame") -> str:
    """Which runs a figure shows: data, length, seeds."""
    experiments, seeds, epochs = (sorted(set(table[name])) for name in ("experiment", "seed", "epochs"))
    length = f"{epochs[0]:g}" if len(epochs) == 1 else f"{epochs[0]:g}–{epochs[-1]:g}"
    return f"{', '.join(map(str, experiments))}: {length} epochs, {len(seeds)} seed{'s' if len(seeds) > 1 else ''}"


def draw(name: str, table: "pd.DataFrame | None", folder: Path) -> list[Path]:
    """Draws a figure and writes it as PNG and PDF; returns the paths.

    Raises:
        ValueError: for a figure that does not exist, or runs that lack what it shows.
    """
    if name not in FIGURES:
        raise ValueError(f"There is no figure '{name}': choose one of {', '.join(FIGURES)}.")
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"figure_{name}.{kind}" for kind in ("png", "pdf")]
    with plots.style():
        figure = FIGURES[name](table)
        for path in paths:
            figure.savefig(path)
    return paths
