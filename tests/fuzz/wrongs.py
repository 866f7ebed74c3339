"""What must not be measured: coupled or random examples, weights used otherwise than as layers.

A model with one of the first kind has to be refused as a whole; layers of the second kind have to
be left out, or refused by name.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def centered(x: Tensor) -> Tensor:
    """Subtracts the mean of the batch."""
    return x - x.mean(0, keepdim=True)


def running_sum(x: Tensor) -> Tensor:
    """Adds up the examples before."""
    return x.cumsum(0)


def competing(x: Tensor) -> Tensor:
    """A softmax over the examples."""
    return x * x.softmax(0)


def neighbor(x: Tensor) -> Tensor:
    """Mixes every example with the one before it."""
    return x + 0.5 * x.roll(1, 0)


def reversed_batch(x: Tensor) -> Tensor:
    """Takes the examples in reverse order."""
    return x.flip(0)


def sorted_batch(x: Tensor) -> Tensor:
    """Sorts the examples, unit by unit."""
    return x.sort(0).values


def normalized_batch(x: Tensor) -> Tensor:
    """Divides by the length of the whole batch."""
    return x / (1e-3 + x.norm())


def leading(x: Tensor) -> Tensor:
    """Compares every example with the first."""
    return x - 0.5 * x[:1]


def noisy(x: Tensor) -> Tensor:
    """Adds random numbers."""
    return x + 0.5 * torch.randn_like(x)


def axes_mixed_up(x: Tensor) -> Tensor:
    """Reshapes as if the examples were on the last axis."""
    return x.flatten(1).reshape(-1, len(x)).T.reshape(x.shape)


def cross_gradient(x: Tensor) -> Tensor:
    """Has the values of x, and gradients that reach all examples."""
    mean = x.mean(0, keepdim=True)
    return x + (mean - mean.detach())


COUPLED = (
    centered, running_sum, competing, neighbor, reversed_batch, sorted_batch, normalized_batch,
    leading, axes_mixed_up,
)  # fmt: skip


class Tied(nn.Module):
    """Two layers with one weight, or a layer whose weight is used again in a function."""

    def __init__(self, width: int, way: str) -> None:
        super().__init__()
        self.way, self.first = way, nn.Linear(width, width)
        if way in ("two", "transposed"):
            self.second = nn.Linear(width, width)
            self.second.weight = self.first.weight
            if way == "transposed":
                self.second.weight = nn.Parameter(self.first.weight.data.T)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        if self.way in ("two", "transposed"):
            return self.second(h)
        return F.linear(h, self.first.weight.T)


class Unowned(nn.Module):
    """A layer that is not called: a function uses its weight."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.layer = nn.Linear(width, out)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.layer.weight, self.layer.bias)


class Folded(nn.Module):
    """Positions in the axis of examples, as window attention has them."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.layer = nn.Linear(width, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.reshape(-1, x.shape[-1])).unflatten(0, x.shape[:2])


class SequenceFirst(nn.Module):
    """Positions in front of the examples."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.layer = nn.Linear(width, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.transpose(0, 1)).transpose(0, 1)


class Routed(nn.Module):
    """An expert that sees some of the examples."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.expert = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        chosen = x.flatten(1).sum(1) > 0
        out = x.clone()
        out[chosen] = self.expert(x[chosen])
        return out


class OtherForward(nn.Linear):
    """Is a linear layer by class, and computes something else."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight.abs(), self.bias)
