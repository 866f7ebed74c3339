"""One style for all figures: sizes, fonts, panels, legends, and the look of every line."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

STYLE = {
    "figure.figsize": (5.0, 3.0),
    "figure.dpi": 150,
    "figure.constrained_layout.use": True,
    "savefig.dpi": 200,
    "pdf.fonttype": 42,  # text stays text in the PDF
    "font.size": 9,
    "axes.labelsize": 9,
    "axes.titlesize": 9,
    "figure.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "legend.handlelength": 2.6,  # long enough to tell dashes from dots
    "lines.linewidth": 1.6,
    "lines.markersize": 4,
}
FEW_STEPS, MANY_DECADES = 2000, 1e3
ORDER = ("elu", "srelu", "lrelu", "relu")  # of the paper, in every legend
LETTERS_PER_INCH = 13  # of a title
LINE_LETTERS = 7  # that the line in front of a legend's label takes the place of
MATH = re.compile(r"\\[,;]|[$_{}^]")  # what is no letter of a formula


# The paper's published numbers: hollow, in grey, so that nobody takes them for something that was
# measured here.
PAPER: Any = {
    "linestyle": "none",
    "marker": "o",
    "markerfacecolor": "white",
    "markeredgecolor": "0.45",
    "markersize": 5,
    "zorder": 4,
}


# -- one look per activation function ----------------------------------------------------------


class Look(NamedTuple):
    label: str
    color: str
    marker: str
    line: str


# Paul Tol's "high contrast" colors: told apart by color-blind readers, and in grey print by their
# lightness
# (0, 29, 48 and 72 of 100).
LOOKS = {
    "elu": Look("ELU", "#004488", "o", "-"),
    "lrelu": Look("LReLU", "#DDAA33", "^", "-."),
    "relu": Look("ReLU", "#BB5566", "s", "--"),
    "srelu": Look("SReLU", "#000000", "D", ":"),
}


# For groups that are no activations (learning rates, optimizers), in order of appearance.
OTHER_LOOKS = (
    ("#117733", "v", "-"),
    ("#AA4499", "P", "--"),
    ("#44AA99", "X", "-."),
    ("#999933", "*", ":"),
)


# On a dark ground: the light partners of the same hues in Tol's "medium contrast", and his light
# green, pink, cyan and olive.
ON_DARK = {
    "#004488": "#6699CC",
    "#DDAA33": "#EECC66",
    "#BB5566": "#EE99AA",
    "#000000": "#FFFFFF",
    "#117733": "#44BB99",
    "#AA4499": "#FFAABB",
    "#44AA99": "#99DDFF",
    "#999933": "#BBCC33",
}


def style() -> AbstractContextManager[None]:
    """Returns a context in which figures are made in the project's style: `with style(): fig, ax =
    plt.subplots()`.
    """
    import matplotlib

    return matplotlib.rc_context(dict[Any, Any](STYLE))


def panels(
    count: int,
    rows: int = 1,
    width: float = 3.6,
    height: float = 3.2,
    share_y: Literal["all", "row", "none"] = "none",
) -> tuple[Figure, list[Axes]]:
    """Returns a figure with `count` axes, row by row, known to no pyplot: nothing to close, no
    backend to choose.

    Args:
        width, height: of one of the axes, in inches; beside them there is room for a legend.
    """
    from matplotlib.figure import Figure

    columns = -(-count // rows)
    figure = Figure(figsize=(1.5 + width * columns, height * rows), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False, sharey=share_y).flat)


def headed(figure: Figure, title: str) -> None:
    """A title over all panels, in lines that are no longer than the figure is wide."""
    letters = int(LETTERS_PER_INCH * figure.get_figwidth())
    figure.suptitle(
        "\n".join(textwrap.fill(line, letters) for line in title.split("\n")), parse_math=False
    )


def lettered(axes: Iterable[Axes], titles: Iterable[str]) -> None:
    """Titles as papers have them: (a) …, (b) …"""
    for ax, letter, title in zip(axes, "abcdefghijkl", titles, strict=False):
        ax.set_title(f"({letter}) {title}", loc="left")


def one_legend(figure: Figure, axes: Iterable[Axes], columns: int = 6) -> None:
    """One legend below all panels, in place of theirs, no wider than the figure; a name that
    several panels have stands once.

    Activation functions come first, in the order of the paper.
    """
    handles, counts = {}, {}
    for ax in axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            name, _, count = str(label).partition(" (n = ")
            handles.setdefault(name, handle)
            counts.setdefault(name, []).extend(
                int(number) for number in count.rstrip(")").split("–") if number
            )
        no_legend(ax)
    order = {LOOKS[name].label: place for place, name in enumerate(ORDER)}
    names = sorted(handles, key=lambda name: order.get(name, len(order)))
    labels = [
        f"{name} (n = {between(found)})" if (found := counts[name]) else name for name in names
    ]
    while columns > 1 and _letters(labels, columns) > LETTERS_PER_INCH * figure.get_figwidth():
        columns -= 1
    figure.legend(
        [handles[name] for name in names], labels, loc="outside lower center", ncols=columns
    )


def _letters(labels: list[str], columns: int) -> int:
    """How wide a legend is, whose columns are filled from above, the first ones with one entry
    more.
    """
    rows, more = divmod(len(labels), columns)
    sizes = [rows + (column < more) for column in range(columns)]
    starts = [sum(sizes[:column]) for column in range(columns)]
    found = [
        labels[start : start + size] for start, size in zip(starts, sizes, strict=True) if size
    ]
    return sum(max(len(MATH.sub("", label)) for label in column) + LINE_LETTERS for column in found)


def escaped(name: object) -> str:
    """A name that comes from a run, as a label that shows it: none of its letters begins a formula."""
    return str(name).replace("$", r"\$")


def between(counts: Iterable[int]) -> str:
    """ "3", or "3–6"."""
    counts = list(counts)
    return str(min(counts)) if min(counts) == max(counts) else f"{min(counts)}–{max(counts)}"


def no_legend(ax: Axes) -> None:
    """For axes whose lines are named elsewhere."""
    if (own := ax.get_legend()) is not None:
        own.remove()


def legend(ax: Axes) -> None:
    """Beside the axes: between ribbons that fill them there is often no free corner."""
    ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), borderaxespad=0)


def in_thousands(ax: Axes) -> None:
    """Steps as the paper counts them, unless there are too few; call it when all lines are drawn."""
    ax.locator_params(axis="x", nbins=5)
    if ax.get_xlim()[1] > FEW_STEPS:
        ax.xaxis.set_major_formatter(lambda value, _: f"{value / 1000:g}")
    ax.set_xlabel("thousand updates" if ax.get_xlim()[1] > FEW_STEPS else "updates")


def on_log_scale(axis: Axis) -> None:
    """Ticks at 1, 2 and 5 in plain numbers; over many decades, at powers of ten."""
    from matplotlib.ticker import LogLocator, NullFormatter

    low, high = axis.get_data_interval()
    many = 0 < MANY_DECADES * low < high < float("inf")
    axis.set_major_locator(LogLocator(subs=(1,) if many else (1, 2, 5)))
    if not many:
        axis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_minor_formatter(NullFormatter())


def in_percent(axis: Axis) -> None:
    """Fractions as percentages; the label says so, not the ticks."""
    axis.set_major_formatter(lambda value, _: f"{100 * value:.10g}")


def looks(names: Iterable, group: str = "activation") -> dict[Any, Look]:
    """A look for each name: the activations' own, in the order of the paper, or the others in order
    of appearance.

    Names of a categorical column look the same in every part of its table.
    """
    there = list(names)
    names = list(getattr(names, "categories", there))
    found = {name: LOOKS[name] for name in ORDER if name in names} if group == "activation" else {}
    for name in names:
        if name not in found:
            color, marker, line = OTHER_LOOKS[
                (len(found) - len(found.keys() & LOOKS)) % len(OTHER_LOOKS)
            ]
            found[name] = Look(
                str(name) if group == "activation" else f"{group} = {name}", color, marker, line
            )
    return {name: look for name, look in found.items() if name in there}
