"""The activation functions by name. `biasshift.activation_names` has what needs no PyTorch.

This file follows no import paths: `biasshift.nets` makes modules of those.
"""

from collections.abc import Callable

from torch import Tensor, nn

from biasshift.activation_names import (
    LABELS as LABELS,
    canonical as canonical,
    display_name as display_name,
    folder_part as folder_part,
    is_import_path as is_import_path,
    ordered as ordered,
    printable as printable,
    shown as shown,
    with_number,
)


class SReLU(nn.Module):
    """The shifted ReLU, ``max(−1, x)``.

    It has negative values like the ELU, but a kink at −1 in place of a smooth saturation.

    >>> import torch
    >>> SReLU()(torch.tensor([-2.0, -0.5, 3.0]))
    tensor([-1.0000, -0.5000,  3.0000])
    """

    def forward(self, x: Tensor) -> Tensor:
        return x.clamp(min=-1)


def elu(alpha: float = 1.0) -> nn.Module:
    """Returns an ELU: x where x > 0, ``α (exp(x) − 1)`` elsewhere.

    Its slope is 1 on both sides of 0 for α = 1 alone, which is that of section 3 of the paper. Its
    values saturate at −α.
    """
    return nn.ELU(alpha=alpha)


def lrelu(slope: float = 0.1) -> nn.Module:
    """Returns a leaky ReLU: x where x > 0, ``slope · x`` elsewhere, 0.1 in the paper."""
    return nn.LeakyReLU(slope)


# The paper compares the first four; the others are PyTorch's, with its defaults.
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "elu": elu,
    "relu": nn.ReLU,
    "lrelu": lrelu,
    "srelu": SReLU,
    "prelu": nn.PReLU,  # one learned slope a layer, 0.25 to begin with
    "selu": nn.SELU,
    "gelu": nn.GELU,  # x Φ(x), exact
    "silu": nn.SiLU,  # x σ(x), the swish
    "mish": nn.Mish,  # x tanh(softplus(x))
    "softplus": nn.Softplus,  # ln(1 + exp(x))
    "tanh": nn.Tanh,
}


def constructor(name: str) -> Callable[[], nn.Module]:
    """Returns what makes new modules of a name, of all but import paths.

    Raises:
        ValueError: as `canonical`, or an import path, which this file does not follow.

    >>> constructor("elu:0.5")()
    ELU(alpha=0.5)
    """
    name = canonical(name)
    if is_import_path(name):
        raise ValueError(
            f"'activation' must be a name that biasshift knows, got {shown(name)}. Give the "
            "function itself."
        )
    kind, value = with_number(name)
    if kind:
        return lambda: (elu if kind == "elu" else lrelu)(value)
    return ACTIVATIONS[name]
