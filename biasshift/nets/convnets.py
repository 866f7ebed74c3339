"""The two networks of the CIFAR experiments: 11 layers for comparing activations, 18 for the lowest error."""

from collections.abc import Sequence

from torch import nn

from biasshift.nets.convolution_stacks import Dropout, Geometry, NormAt, Stack, stacks
from biasshift.nets.initialization import Init

# Stacks of (layers, units, receptive field), section 4.2: [1×192×5], [1×192×1, 1×240×3], …
CIFAR11: tuple[Stack, ...] = (
    ((1, 192, 5),),
    ((1, 192, 1), (1, 240, 3)),
    ((1, 240, 1), (1, 260, 2)),
    ((1, 260, 1), (1, 280, 2)),
    ((1, 280, 1), (1, 300, 2)),
    ((1, 300, 1),),
    ((1, 100, 1),),
)
# Section 4.3 calls it 18 layers; its list has 19.
CIFAR18: tuple[Stack, ...] = (
    ((1, 384, 3),),
    ((1, 384, 1), (1, 384, 2), (2, 640, 2)),
    ((1, 640, 1), (3, 768, 2)),
    ((1, 768, 1), (2, 896, 2)),
    ((1, 896, 3), (2, 1024, 2)),
    ((1, 1024, 1), (1, 1152, 2)),
    ((1, 1152, 1),),
    ((1, 100, 1),),
)
# The same seven rates for both networks, whose eighth stack, if there is one, has none: it gives the logits. The seventh of
# the 18-layer net then has the rate 0 printed last; that a rate between .5 and 0 was left out is as likely (give `rates`).
RATES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.0)


def cifar11(
    activation: str = "elu",
    seed: int = 0,
    classes: int = 100,
    geometry: Geometry = "same",
    batch_norm: bool = False,
    dropout: Dropout = "last",
    init: Init = "normal",
    *,
    norm_at: NormAt = "before",
    rates: Sequence[float] = RATES,
    width: float = 1.0,
) -> nn.Sequential:
    """The 11-layer network of Figures 4 and 5: (batch, 3, 32, 32) → (batch, classes) logits; 1,669,028 parameters.

    Arguments and module names are those of `stacks`. The geometry is not in the paper. "same" gives maps of 32-16-8-4-2-1-1-1,
    and the last two poolings do nothing; "caffe", probably the original, 32-16-8-5-3-2-1-1.

    >>> sum(p.numel() for p in cifar11().parameters())
    1669028
    """
    return stacks(
        _for_classes(CIFAR11, classes), activation, seed,
        rates=rates, geometry=geometry, batch_norm=batch_norm, norm_at=norm_at, dropout=dropout, init=init, width=width,
    )  # fmt: skip


def cifar18(
    activation: str = "elu",
    seed: int = 0,
    classes: int = 100,
    geometry: Geometry = "same",
    batch_norm: bool = False,
    dropout: Dropout = "last",
    init: Init = "normal",
    *,
    norm_at: NormAt = "before",
    rates: Sequence[float] = RATES,
    width: float = 1.0,
) -> nn.Sequential:
    """The 18-layer network of Table 1: (batch, 3, 32, 32) → (batch, classes) logits; 39,330,404 parameters.

    Arguments and module names are those of `stacks`. Maps are 32-16-8-4-2-1-1-1-1 ("same") or 32-16-10-7-5-4-3-2-1 ("caffe",
    where even the logits are pooled, from 2×2). For fine-tuning, `set_dropout` puts dropout behind all layers.

    >>> [name for name, _ in cifar18(width=0.01).named_children()][-4:]
    ['pool7', 'conv8_1', 'pool8', 'flatten']
    """
    return stacks(
        _for_classes(CIFAR18, classes), activation, seed,
        rates=rates, geometry=geometry, batch_norm=batch_norm, norm_at=norm_at, dropout=dropout, init=init, width=width,
    )  # fmt: skip


def _for_classes(specification: tuple[Stack, ...], classes: int) -> tuple[Stack, ...]:
    return (*specification[:-1], ((1, classes, 1),))
