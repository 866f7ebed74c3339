"""Shared weights without their blocks: a product with ``V`` is one convolution forwards and one
backwards, for all units.

``u = conv(a, v)`` is ``vᵀa`` at every position, since the kernel ``v`` of a unit concerns its own
channel only. The errors of one example and unit make a small matrix over its positions, ``Σ δ δᵀ``
over the label seeds, or a diagonal one under ``expand``; ``y`` is that matrix times ``u``, and the
gradient of the convolution at ``y`` with respect to its weight is ``Σ a y``. Terms across positions
are included, and strides, dilation and groups are the convolution's own. A linear layer on a
sequence is a convolution with a kernel of size 1.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from biasshift.fisher import packed
from biasshift.fisher.samples import Moments, Pieces, Work, chunks

Vectors = Float[Tensor, "units inputs"]
OverPositions = Float[Tensor, "batch units positions"]


@dataclass(frozen=True)
class Geometry:
    """A convolution of maps that are padded already."""

    units: int  # of all groups, measured or not
    groups: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    flipped: bool  # a transposed convolution is one with the kernel turned around

    def forward(self, a: Tensor, weight: Tensor) -> Tensor:
        zeros = [0] * len(self.kernel)
        return torch.convolution(
            a, weight, None, self.stride, zeros, self.dilation, False, zeros, self.groups
        )

    def backward(self, a: Tensor, y: Tensor, like: Tensor) -> Tensor:
        """The gradient with respect to the weight, which is no use of autograd."""
        zeros = [0] * len(self.kernel)
        arguments = (
            a,
            like,
            None,
            self.stride,
            zeros,
            self.dilation,
            False,
            zeros,
            self.groups,
            (False, True, False),
        )
        return torch.ops.aten.convolution_backward(y, *arguments)[1]

    def places(self, a: Tensor) -> list[int]:
        """The positions along every axis."""
        return [
            (n - d * (k - 1) - 1) // s + 1
            for n, k, s, d in zip(a.shape[2:], self.kernel, self.stride, self.dilation, strict=True)
        ]

    def patches(self, a: Tensor) -> Float[Tensor, "batch positions groups inputs"]:
        """What every position sees; for a few examples at a time."""
        dims = len(self.kernel)
        for axis, (size, step, dilation) in enumerate(
            zip(self.kernel, self.stride, self.dilation, strict=True), start=2
        ):
            a = a.unfold(axis, dilation * (size - 1) + 1, step)[..., ::dilation]
        a = a.flip(list(range(2 + dims, 2 + 2 * dims))) if self.flipped else a
        return a.movedim(1, 1 + dims).flatten(1, dims).unflatten(2, (self.groups, -1)).flatten(3)


@dataclass(frozen=True)
class Maps:
    """One batch of a layer with shared weights: its maps, call after call, and the errors at all
    positions of all calls.

    ``delta`` are stacks of label seeds (passes, batch, units, positions); with ``squared`` it is
    one tensor (batch, units, positions) of ``δ̄²``, every position a sample of its own.
    """

    geometry: Geometry
    maps: tuple[
        Tensor, ...
    ]  # (batch, channels, …): padded, and about the reference mean of every channel
    delta: tuple[Tensor, ...]
    squared: bool
    units: Int[Tensor, " units"]  # which of the layer's

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (*self.maps, *self.delta))

    @property
    def work(self) -> Work:
        batch, errors = (
            len(self.maps[0]),
            sum(d.numel() for d in self.delta) // max(1, len(self.units)),
        )
        return Work(
            errors if self.squared else errors // self._positions, batch * self._positions, errors
        )

    @property
    def channels(self) -> int:
        return self.maps[0].shape[1] // self.geometry.groups

    def weight(self) -> float:
        return self._example_weights().sum().item()

    def product(self, v: Vectors) -> Tensor:
        out = torch.zeros_like(v)
        for n in self._chunks(max(len(v) * self._positions, self.maps[0][0].numel())):
            out += self.backward(self.weigh(self.forward(v, n), n), n)
        return out

    def select(self, units: Tensor) -> "Maps":
        return replace(
            self,
            delta=tuple(d.index_select(-2, units) for d in self.delta),
            units=self.units[units],
        )

    def moved(self, d: Tensor) -> "Maps":
        """The reference is the same for all places of a kernel."""
        group = self.units // (self.geometry.units // self.geometry.groups)
        taps = math.prod(self.geometry.kernel)
        channels = self.maps[0].shape[1]
        step = d.new_zeros(self.geometry.groups, channels // self.geometry.groups)
        step[group if d.dim() == 2 else slice(None)] = d[..., ::taps]
        return replace(
            self,
            maps=tuple((a + step.view(-1, *[1] * (a.dim() - 2))).to(a.dtype) for a in self.maps),
        )

    # -- the two linear maps, and the weights in between -------------------------------------------

    def forward(self, v: Vectors, n: slice) -> OverPositions:
        """``vᵀa`` at every position of some examples."""
        weight = self._kernels(v)
        nets = torch.cat(
            [self.geometry.forward(a[n].to(v.dtype), weight).flatten(2) for a in self.maps], 2
        )
        return nets if len(weight) == len(v) else nets.index_select(1, self.units)

    def weigh(self, u: OverPositions, n: slice) -> OverPositions:
        """``Σ δ δᵀu`` over the seeds, the inner product over the positions."""
        if self.squared:
            return u * self.delta[0][n]
        y = torch.zeros_like(u)
        for own in self._seeds(n):
            own = own.to(u.dtype)
            y.addcmul_(own, torch.linalg.vecdot(own, u).unsqueeze(-1))
        return y

    def backward(self, y: OverPositions, n: slice, power: int = 1) -> Vectors:
        """``Σ a y`` over examples and positions, or with a power of ``a``."""
        like = self._kernels(y.new_empty(y.shape[1], 0))
        if len(like) != y.shape[1]:
            y = y.new_zeros(len(y), len(like), y.shape[2]).index_copy_(1, self.units, y)
        sizes = [math.prod(self.geometry.places(a)) for a in self.maps]
        total = torch.zeros_like(like)
        for a, own in zip(self.maps, y.split(sizes, 2), strict=True):
            own = own.unflatten(2, self.geometry.places(a))
            total += self.geometry.backward(a[n].to(y.dtype) ** power, own, like)
        total = total if len(total) == len(self.units) else total[self.units]
        return self._turned(total).flatten(1)

    def _kernels(self, v: Tensor) -> Tensor:
        """Vectors as the weight of the convolution; where there are groups, with zeros for the
        units that are left out.
        """
        weight = v.new_zeros(
            len(v), self.maps[0].shape[1] // self.geometry.groups, *self.geometry.kernel
        )
        weight = self._turned(v.view(weight.shape)) if v.numel() else weight
        if self.geometry.groups == 1:
            return weight
        return weight.new_zeros(self.geometry.units, *weight.shape[1:]).index_copy_(
            0, self.units, weight
        )

    def _turned(self, weight: Tensor) -> Tensor:
        return weight.flip(list(range(2, weight.dim()))) if self.geometry.flipped else weight

    def _seeds(self, n: slice) -> Iterator[OverPositions]:
        return (own for stack in self.delta for own in stack[:, n])

    # -- where patches are needed after all, for a few examples at a time --------------------------

    def moments(self) -> Moments:
        """Per unit ``Σ w``, ``Σ w²``, ``Σ δ² a`` and ``Σ δ² a²``; ``w`` of an example is ``Σ (Σ_t
        δ_t)²``, that of a position ``δ²``.
        """
        weight = fourth = first = squares = torch.zeros(
            (), dtype=torch.float64, device=self.units.device
        )
        for n in self._chunks(self._inputs * max(self._positions, len(self.units))):
            w = self.delta[0][n].double() if self.squared else self._example_weights(n).unsqueeze(2)
            weight, fourth = weight + w.sum((0, 2)), fourth + w.square().sum((0, 2))
            # In float64, so that V v = S v − o oᵀv holds to the last digit, also where V is nearly
            # singular.
            y = self.weigh(w.new_ones(len(w), len(self.units), self._positions), n)
            first = first + self.backward(y, n)
            if self.squared:
                squares = squares + self.backward(y, n, power=2)
            else:
                a = self._patches(n)
                squares = squares + sum(
                    self._vectors(own, a).square().sum(1, dtype=torch.float64)
                    for own in self._seeds(n)
                )
        return weight, fourth, first, squares

    def rows(self) -> tuple[Float[Tensor, "units rows inputs"], Float[Tensor, "units rows"]]:
        """``Σ_t δ_t a_t`` and ``Σ_t δ_t`` of every example and label seed; of errors that are not
        squared.
        """
        vectors, sums = [], []
        for n in self._chunks(self._inputs * self._positions):
            a = self._patches(n)
            vectors += [self._vectors(own, a) for own in self._seeds(n)]
            sums += [own.sum(2).T for own in self._seeds(n)]
        return torch.cat(vectors, 1), torch.cat(sums, 1)

    def blocks(self) -> packed.Rows:
        rows = [
            packed.zeros(int(mine.sum()), self._inputs, mine.device) for _, mine in self._by_group()
        ]
        for n in self._chunks(self._inputs * max(self._positions, len(self.units))):
            a = self._patches(n)
            for own, (g, mine) in zip(rows, self._by_group(), strict=True):
                if self.squared:
                    packed.add_weighted(
                        own,
                        a[:, :, g].flatten(0, 1),
                        self.delta[0][n][:, mine].transpose(1, 2).flatten(0, 1),
                    )
                else:
                    for delta in self._seeds(n):
                        packed.add_outer(
                            own, torch.einsum("nut,nti->uni", delta[:, mine], a[:, :, g])
                        )
        return packed.stack(rows)

    def spread(self, share: Float[Tensor, " units"]) -> Pieces:
        """Over channels: all places of an example's maps have the weight of the example. Groups are
        mixed.
        """
        w = self._example_weights() @ share
        weight, first, second = share.new_zeros(()), share.new_zeros(()), share.new_zeros(())
        for a in self.maps:
            a = (
                a.unflatten(1, (self.geometry.groups, -1)).transpose(1, 2).flatten(2)
            )  # (batch, channels, groups × places)
            root = (w / a.shape[2]).sqrt().to(a.dtype)[:, None, None]
            flat = (a * root).transpose(0, 1).flatten(1)
            weight, first = (
                weight + w.sum(),
                first + (flat @ root.expand(-1, 1, a.shape[2]).flatten()).double(),
            )
            second = second + (flat @ flat.T).double()
        return weight, first, second

    def _example_weights(self, n: slice = slice(None)) -> Float[Tensor, "batch units"]:
        if self.squared:
            return self.delta[0][n].sum(2, dtype=torch.float64)
        return torch.stack(
            [own.sum(2, dtype=torch.float64).square() for own in self._seeds(n)]
        ).sum(0)

    def _patches(self, n: slice) -> Float[Tensor, "batch positions groups inputs"]:
        return torch.cat([self.geometry.patches(a[n]) for a in self.maps], 1)

    def _vectors(self, delta: OverPositions, a: Tensor) -> Float[Tensor, "units batch inputs"]:
        """``Σ_t δ_t a_t`` of every example, for one label seed."""
        return torch.cat(
            [
                torch.einsum("nut,nti->uni", delta[:, mine], a[:, :, g])
                for g, mine in self._by_group()
            ]
        )

    def _by_group(self) -> list[tuple[int, Tensor]]:
        """Every group that has units, and which they are; units are in increasing order."""
        group = self.units // (self.geometry.units // self.geometry.groups)
        return [(g, group == g) for g in group.unique().tolist()]

    @property
    def _inputs(self) -> int:
        return self.channels * math.prod(self.geometry.kernel)

    @property
    def _positions(self) -> int:
        return self.delta[0].shape[-1]

    def _chunks(self, width: int) -> Iterator[slice]:
        """Examples whose largest temporary, ``width`` elements each, stays within bounds."""
        return chunks(len(self.maps[0]), width)
