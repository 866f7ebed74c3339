"""The four activation functions of the paper, as modules: ELU, ReLU, leaky ReLU and shifted ReLU."""

from collections.abc import Callable

from torch import Tensor, nn


class SReLU(nn.Module):
    """Shifted ReLU, ``max(−1, x)``: negative values like ELU, but with a kink instead of a smooth
    saturation.

    >>> import torch
    >>> SReLU()(torch.tensor([-2.0, -0.5, 3.0]))
    tensor([-1.0000, -0.5000,  3.0000])
    """

    def forward(self, x: Tensor) -> Tensor:
        return x.clamp(min=-1)


def elu() -> nn.Module:
    """``x`` where x > 0, ``exp(x) − 1`` elsewhere (α = 1, section 3 of the paper)."""
    return nn.ELU(alpha=1.0)


def lrelu() -> nn.Module:
    """``x`` where x > 0, ``0.1 x`` elsewhere: the slope of the paper's section 4."""
    return nn.LeakyReLU(0.1)


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "elu": elu,
    "relu": nn.ReLU,
    "lrelu": lrelu,
    "srelu": SReLU,
}
