"""Dropout that knows its stack's rate, so that a later phase of training can set it anew on the same network."""

from typing import Literal

from torch import nn

Where = Literal["last", "all"]


class StackDropout(nn.Dropout):
    """`torch.nn.Dropout` behind one layer of a stack.

    At ``p = 0`` it hands its input on: no copy, no random number, no mask held for the backward pass. It costs one Python call
    in a forward pass, and one more entry in `biasshift.activation_moments`, with the numbers of the activation before it.

    Args:
        rate: the stack's dropout rate, from which `set_dropout` finds ``p`` in every phase.
        last: whether the layer is the last of its stack.
        active: whether ``p`` is the rate, and not 0, to begin with.
    """

    def __init__(self, rate: float, last: bool, active: bool):
        super().__init__(rate if active else 0.0)
        self.rate = rate
        self.last = last


def set_dropout(model: nn.Module, where: Where = "last", factor: float = 1.0) -> None:
    """Sets ``p`` of every dropout module of a network of this package to ``factor`` times its stack's rate, in place.

    The 18-layer network is trained with "last", fine-tuned with "all", and then with "all" and a factor of 1.5. Rates are
    always those of the stacks: factors do not pile up. A state dict holds no rates; say it again after loading one.

    Args:
        where: "last" drops behind the last layer of each stack, "all" behind all layers.

    Raises:
        ValueError: a rate would leave [0, 1), ``where`` is unknown, or the network has no dropout. Nothing has changed then.

    >>> net = nn.Sequential(StackDropout(0.2, last=False, active=False), StackDropout(0.2, last=True, active=True))
    >>> set_dropout(net, "all", 1.5)
    >>> [round(module.p, 3) for module in net]
    [0.3, 0.3]
    """
    dropouts = [module for module in model.modules() if isinstance(module, StackDropout)]
    if where not in ("last", "all"):
        raise ValueError(f"dropout goes behind the 'last' or 'all' layers of a stack, got '{where}'.")
    if not dropouts:
        raise ValueError("the network has no dropout to set: build it with dropout='last' or 'all'.")
    highest = max(module.rate for module in dropouts)
    if not 0 <= factor * highest < 1:
        raise ValueError(f"factor {factor} makes the dropout rate {highest} {factor * highest}: rates lie from 0 to below 1.")
    for module in dropouts:
        module.p = factor * module.rate if module.last or where == "all" else 0.0
