"""Activation functions, as functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from biasshift.plots.theme import escaped, looks

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from torch import Tensor


def activation_functions(
    ax: Axes, names: Sequence[str] | Mapping[str, Callable[[Tensor], Tensor]] = ("elu", "lrelu", "relu", "srelu")
) -> Axes:
    """Returns `ax` with activation functions over x from −10 to 2 (figure 1).

    Args:
        names: names of `activations.ACTIVATIONS`, or other functions by name.
    """
    import torch

    from biasshift.activations import ACTIVATIONS

    functions = names if isinstance(names, Mapping) else {name: ACTIVATIONS[name]() for name in names}
    x = torch.linspace(-10, 2, 601, dtype=torch.float64)
    for name, look in looks(functions).items():
        ax.plot(x.numpy(), functions[name](x).detach().numpy(), look.line, color=look.color, label=escaped(look.label))
    ax.set(xlabel="net input $x$", ylabel="activation $f(x)$", xlim=(-10, 2), ylim=(-1.1, 2))
    ax.legend()
    return ax
