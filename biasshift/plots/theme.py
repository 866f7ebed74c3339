"""One style for all figures: sizes, fonts, panels, legends, axes, and the look of every line."""

import re
import textwrap
import zlib
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any, Literal, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from biasshift.activation_names import LABELS, NAMES, display_name, ordered

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
LETTERS_PER_INCH = 13  # of a title
LINE_LETTERS = 7  # the width, in letters, of the line in front of a legend's label
MATH = re.compile(r"\\[,;]|[$_{}^]")  # the characters of a formula that are not printed


# -- the look of every line --------------------------------------------------------------------


class Look(NamedTuple):
    """What tells a line from the others: its label, color, marker and line style.

    The marker and the line style are redundant with the color, so that figures can be read in grey
    print and by color-blind readers. `matplotlib` understands all four as they are.
    """

    label: str
    color: str
    marker: str
    line: str


ORDER = tuple(ordered(NAMES))  # in every legend: the paper's, then the others
# The paper's four have Paul Tol's "high contrast" colors: color-blind readers can tell them apart,
# and so can readers of a grey print, by their lightness (0, 29, 48 and 72 of 100). The colors of
# the others are far from them and from each other, for color-blind readers, too; in grey print
# their markers tell them from each other.
LOOKS = {
    "elu": Look(LABELS["elu"], "#004488", "o", "-"),
    "lrelu": Look(LABELS["lrelu"], "#DDAA33", "^", "-."),
    "relu": Look(LABELS["relu"], "#BB5566", "s", "--"),
    "srelu": Look(LABELS["srelu"], "#000000", "D", ":"),
    "prelu": Look(LABELS["prelu"], "#AA1100", ">", "-."),
    "selu": Look(LABELS["selu"], "#66AADD", "<", "-"),
    "gelu": Look(LABELS["gelu"], "#DD0099", "p", "--"),
    "silu": Look(LABELS["silu"], "#3344FF", "h", ":"),
    "mish": Look(LABELS["mish"], "#665555", "d", "-"),
    "softplus": Look(LABELS["softplus"], "#BBAA99", "8", "-."),
    "tanh": Look(LABELS["tanh"], "#EE5500", "H", "--"),
}
# For other activations, and for groups that are not activations (learning rates, optimizers).
OTHER_LOOKS = (
    ("#117733", "v", "-"),
    ("#AA4499", "P", "--"),
    ("#44AA99", "X", "-."),
    ("#999933", "*", ":"),
)
# On a dark ground: the light partners of the same hues in Tol's "medium contrast", and his light
# green, pink, cyan and olive; then lighter colors of the same hues.
ON_DARK = {
    "#004488": "#6699CC",
    "#DDAA33": "#EECC66",
    "#BB5566": "#EE99AA",
    "#000000": "#FFFFFF",
    "#117733": "#44BB99",
    "#AA4499": "#FFAABB",
    "#44AA99": "#99DDFF",
    "#999933": "#BBCC33",
    "#AA1100": "#FF8C80",
    "#66AADD": "#97C5E8",
    "#DD0099": "#FF80D8",
    "#3344FF": "#808AFF",
    "#665555": "#C5B9B9",
    "#BBAA99": "#DDD2C8",
    "#EE5500": "#FFAD80",
}
# The paper's published numbers: hollow and grey, so that nobody takes them for measured here.
PAPER: Any = {
    "linestyle": "none",
    "marker": "o",
    "markerfacecolor": "white",
    "markeredgecolor": "0.45",
    "markersize": 5,
    "zorder": 4,
}


def looks(names: Iterable, group: str = "activation") -> dict[Any, Look]:
    """Returns the look of each name: the activations in the order of the paper, then the others.

    Of a column that does not hold activations, names get `OTHER_LOOKS` in order of appearance;
    other activations than those of `LOOKS` get one by their names, and so the same in every figure,
    unless two would get the same one. When these run out, they come again with other line styles.
    Names of a categorical column look the same in every part of its table, because looks are given
    to all of its categories.

    Args:
        group: the column that the names come from; it is part of the labels of other columns.

    >>> [look.label for look in looks(["relu", "elu:0.5", "tanh", "elu"]).values()]
    ['ELU', 'ReLU', 'tanh', 'ELU (α = 0.5)']
    >>> looks([0.1], "lr")[0.1].label
    'lr = 0.1'
    """
    present = list(names)
    every = list(getattr(names, "categories", present))
    by_name = {name: LOOKS[name] for name in ORDER if name in every and group == "activation"}
    others = [name for name in dict.fromkeys(every) if name not in by_name]
    if group != "activation":
        places = {name: place for place, name in enumerate(others)}
        by_name = {name: _other_look(f"{group} = {name}", place) for name, place in places.items()}
    else:
        places = _places(others)
        by_name |= {name: _other_look(_own_label(name), places[name]) for name in others}
    return {name: look for name, look in by_name.items() if name in present}


def _places(names: list[Any]) -> dict[Any, int]:
    """A place in the cycle of other looks for every name, by a checksum, and no place twice."""
    places, size = {}, len(OTHER_LOOKS)
    for name in sorted(names, key=str):
        first, turn = zlib.crc32(str(name).encode(errors="replace")), len(places) // size
        taken = set(places.values())
        every = (turn * size + (first + step) % size for step in range(size))
        places[name] = next(place for place in every if place not in taken)
    return places


def _own_label(name: object) -> str:
    """A label that is not that of a known activation function."""
    text = display_name(name)
    return f"'{text}'" if text in LABELS.values() else text


def _other_look(name: str, place: int) -> Look:
    turn, place = divmod(place, len(OTHER_LOOKS))
    color, marker, _ = OTHER_LOOKS[place]
    return Look(name, color, marker, OTHER_LOOKS[(place + turn) % len(OTHER_LOOKS)][2])


# -- figures and their panels ------------------------------------------------------------------


def style() -> AbstractContextManager[None]:
    """Returns a context in which figures have the project's style: `STYLE`, and only there.

    The style counts when figures are made and when they are saved; afterwards, the settings of
    Matplotlib are what they were before.

    >>> with style():
    ...     figure, (ax,) = panels(1)
    >>> ax.xaxis.label.get_fontsize()
    9.0
    """
    return matplotlib.rc_context(dict[Any, Any](STYLE))


def panels(
    count: int,
    rows: int = 1,
    width: float = 3.6,
    height: float = 3.2,
    share_y: Literal["all", "row", "none"] = "none",
) -> tuple[Figure, list[Axes]]:
    """Returns a figure with `count` axes, row by row.

    The figure is unknown to pyplot: there is nothing to close, and no backend to choose. If
    `count` does not fill the last row, there are more axes than `count`.

    Args:
        width, height: of one of the axes, in inches; beside them there is room for a legend.
        share_y: which axes share their y axis.
    """
    columns = -(-count // rows)
    figure = Figure(figsize=(1.5 + width * columns, height * rows), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False, sharey=share_y).flat)


def headed(figure: Figure, title: str) -> None:
    """Writes a title over all panels, in lines that are no longer than the figure is wide.

    Dollar signs in the title stay what they are: names of runs and data sets may have some.
    """
    letters = int(LETTERS_PER_INCH * figure.get_figwidth())
    figure.suptitle(
        "\n".join(textwrap.fill(line, letters) for line in title.split("\n")), parse_math=False
    )


def lettered(axes: Iterable[Axes], titles: Iterable[str]) -> None:
    """Writes titles over the axes as papers have them: "(a) …", "(b) …".

    Axes without a title, and titles without axes, are left out.
    """
    for ax, letter, title in zip(axes, "abcdefghijkl", titles, strict=False):
        ax.set_title(f"({letter}) {title}", loc="left")


# -- legends -----------------------------------------------------------------------------------


def legend(ax: Axes) -> Axes:
    """Returns `ax` with its legend beside it: ribbons often leave no corner of the axes free."""
    ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), borderaxespad=0)
    return ax


def no_legend(ax: Axes) -> None:
    """Removes the legend of axes, if they have one: their lines are named elsewhere."""
    if (own := ax.get_legend()) is not None:
        own.remove()


def one_legend(figure: Figure, axes: Iterable[Axes], columns: int = 6) -> None:
    """Puts one legend below all panels, in place of theirs.

    A name that several panels have stands there once. Its counts become a range: "ELU (n = 3)" and
    "ELU (n = 6)" are "ELU (n = 3–6)". Activation functions come first, in the order of the paper.
    The legend has fewer columns if the figure is not wide enough for `columns`.
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
    labels = [f"{name} (n = {between(counts[name])})" if counts[name] else name for name in names]
    while columns > 1 and _width(labels, columns) > LETTERS_PER_INCH * figure.get_figwidth():
        columns -= 1
    figure.legend(
        [handles[name] for name in names], labels, loc="outside lower center", ncols=columns
    )


def _width(labels: list[str], columns: int) -> int:
    """The width of a legend, in letters; its columns are filled from above, as evenly as can be."""
    filled = [column for column in np.array_split(labels, columns) if len(column)]
    return sum(max(len(MATH.sub("", name)) for name in column) + LINE_LETTERS for column in filled)


def escaped(name: object) -> str:
    """Returns a name that comes from a run as a label that shows it, dollar signs and all.

    Without this, Matplotlib would read what stands between two dollar signs as a formula.
    """
    return str(name).replace("$", r"\$")


def between(counts: Iterable[int]) -> str:
    """Returns the range of some counts: "3" where all are the same, else "3–6".

    >>> between([6, 3, 4])
    '3–6'
    """
    counts = list(counts)
    return str(min(counts)) if min(counts) == max(counts) else f"{min(counts)}–{max(counts)}"


# -- axes --------------------------------------------------------------------------------------


def in_thousands(ax: Axes) -> None:
    """Counts steps on the x axis in thousands, as the paper does, unless there are too few.

    Call it when all lines are drawn: the range of the axis decides.
    """
    ax.locator_params(axis="x", nbins=5)
    many = ax.get_xlim()[1] > FEW_STEPS
    if many:
        ax.xaxis.set_major_formatter(lambda value, _: f"{value / 1000:g}")
    ax.set_xlabel("thousand updates" if many else "updates")


def on_log_scale(axis: Axis) -> None:
    """Puts ticks at 1, 2 and 5 in plain numbers; over many decades, at powers of ten only.

    The range of the data decides, so call it when all lines are drawn.
    """
    low, high = axis.get_data_interval()
    many = 0 < MANY_DECADES * low < high < float("inf")
    axis.set_major_locator(LogLocator(subs=(1,) if many else (1, 2, 5)))
    if not many:
        axis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_minor_formatter(NullFormatter())


def in_percent(axis: Axis) -> None:
    """Shows fractions as percentages. The label of the axis must say so: the ticks do not."""
    axis.set_major_formatter(lambda value, _: f"{100 * value:.10g}")
