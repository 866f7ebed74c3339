"""One look per activation function, everywhere: in the figures and on the report."""

from typing import NamedTuple


class Look(NamedTuple):
    label: str
    color: str
    marker: str
    line: str


# Paul Tol's "high contrast" colors: told apart by color-blind readers, and in grey print by their lightness
# (0, 29, 48 and 72 of 100).
LOOKS = {
    "elu": Look("ELU", "#004488", "o", "-"),
    "lrelu": Look("LReLU", "#DDAA33", "^", "-."),
    "relu": Look("ReLU", "#BB5566", "s", "--"),
    "srelu": Look("SReLU", "#000000", "D", ":"),
}
# For groups that are no activations (learning rates, optimizers), in order of appearance.
OTHER_LOOKS = (("#117733", "v", "-"), ("#AA4499", "P", "--"), ("#44AA99", "X", "-."), ("#999933", "*", ":"))

# On a dark ground: the light partners of the same hues in Tol's "medium contrast", and his light green, pink, cyan and olive.
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
