"""The activation functions of the paper as modules: ELU, ReLU, leaky ReLU and shifted ReLU."""

from collections.abc import Callable

from torch import Tensor, nn


class SReLU(nn.Module):
    """The shifted ReLU, ``max(−1, x)``.

    It has negative values like the ELU, but a kink at −1 in place of a smooth saturation.

    >>> import torch
    >>> SReLU()(torch.tensor([-2.0, -0.5, 3.0]))
    tensor([-1.0000, -0.5000,  3.0000])
    """

    def forward(self, x: Tensor) -> Tensor:
        return x.clamp(min=-1)


def elu() -> nn.Module:
    """Returns an ELU: x where x > 0, ``exp(x) − 1`` elsewhere (α = 1, section 3 of the paper)."""
    return nn.ELU(alpha=1.0)


def lrelu() -> nn.Module:
    """Returns a leaky ReLU: x where x > 0, ``0.1 x`` elsewhere (section 4 of the paper)."""
    return nn.LeakyReLU(0.1)


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "elu": elu,
    "relu": nn.ReLU,
    "lrelu": lrelu,
    "srelu": SReLU,
}
