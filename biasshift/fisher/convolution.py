"""Shared weights without their blocks: a product with ``V`` is two convolutions, for all units.

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
from biasshift.fisher.samples import Moments, SharedMoments, Terms, Work, chunks
from biasshift.theory import Scalars, Vectors

OverPositions = Float[Tensor, "batch units positions"]


@dataclass(frozen=True)
class Geometry:
    """A convolution, in any number of dimensions, of maps that are padded already."""

    units: int  # of all groups, measured or not
    groups: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    flipped: bool  # a transposed convolution is one with the kernel turned around

    def forward(self, a: Tensor, weight: Tensor) -> Tensor:
        """Returns the net inputs ``conv(a, weight)``, (batch, units, …).

        Args:
            a: padded maps, (batch, channels, …).
            weight: (units, channels of a group, …kernel), not flipped.
        """
        return torch.convolution(a, weight, None, *self._options)

    def backward(self, a: Tensor, y: Tensor, like: Tensor) -> Tensor:
        """Returns the gradient of `forward` with respect to the weight, without autograd.

        Args:
            a: padded maps, (batch, channels, …).
            y: the gradient with respect to the net inputs, (batch, units, …).
            like: a tensor with the shape and dtype of the weight.
        """
        return torch.ops.aten.convolution_backward(
            y, a, like, None, *self._options, (False, True, False)
        )[1]

    @property
    def _options(self) -> tuple:
        zeros = [0] * len(self.kernel)
        return self.stride, zeros, self.dilation, False, zeros, self.groups

    def places(self, a: Tensor) -> list[int]:
        """Returns the number of positions along every axis of padded maps (batch, channels, …).

        It is ``(n − dilation (kernel − 1) − 1) // stride + 1`` for an axis of n places.
        """
        return [
            (n - d * (k - 1) - 1) // s + 1
            for n, k, s, d in zip(a.shape[2:], self.kernel, self.stride, self.dilation, strict=True)
        ]

    def patches(self, a: Tensor) -> Float[Tensor, "batch positions groups inputs"]:
        """Returns the incoming activations of every position, for a few examples at a time.

        They are views into the maps until the last step, which copies: a kernel of 3 × 3 makes nine
        times the memory. Inputs are ordered as in the weight, channels first.
        """
        dims = len(self.kernel)
        for axis, (size, step, dilation) in enumerate(
            zip(self.kernel, self.stride, self.dilation, strict=True), start=2
        ):
            a = a.unfold(axis, dilation * (size - 1) + 1, step)[..., ::dilation]
        a = a.flip(list(range(2 + dims, 2 + 2 * dims))) if self.flipped else a
        return a.movedim(1, 1 + dims).flatten(1, dims).unflatten(2, (self.groups, -1)).flatten(3)


@dataclass(frozen=True)
class Maps:
    """One batch of a layer with shared weights: its maps, call after call, and all errors.

    ``delta`` are stacks of label seeds (passes, batch, units, positions), over the positions of all
    calls. With ``squared`` it is one tensor (batch, units, positions) of ``δ̄²``, and every position
    is a sample of its own. It is a `samples.Part`.
    """

    geometry: Geometry
    # (batch, channels, …): padded, and about the reference mean of every channel
    maps: tuple[Tensor, ...]
    delta: tuple[Tensor, ...]
    squared: bool
    units: Int[Tensor, " units"]  # which of the layer's, in increasing order

    @property
    def bytes(self) -> int:
        """The bytes that the part takes in memory."""
        return sum(tensor.nbytes for tensor in (*self.maps, *self.delta))

    @property
    def work(self) -> Work:
        errors = sum(delta.numel() for delta in self.delta) // max(1, len(self.units))
        return Work(
            rows=errors if self.squared else errors // self._positions,
            positions=len(self.maps[0]) * self._positions,
            errors=errors,
        )

    @property
    def channels(self) -> int:
        return self.maps[0].shape[1] // self.geometry.groups

    @property
    def terms(self) -> Terms:
        return "positions" if self.squared else "examples"

    def weight(self) -> float:
        """Returns ``Σ w`` over examples and units: two readings of the same probe agree in it."""
        return self._example_weights().sum().item()

    def product(self, v: Vectors) -> Tensor:
        out = torch.zeros_like(v)
        for n in chunks(len(self.maps[0]), max(len(v) * self._positions, self.maps[0][0].numel())):
            out += self.backward(self._weighted(self._net_inputs(v, n), n), n)
        return out

    def select(self, units: Tensor) -> "Maps":
        return replace(
            self,
            delta=tuple(delta.index_select(-2, units) for delta in self.delta),
            units=self.units[units],
        )

    def moved(self, d: Tensor) -> "Maps":
        """Returns the part about another reference, which is the same for all places of a kernel.

        Args:
            d: what the activations gain, (inputs,) or (units, inputs); the first place of every
                channel is read.
        """
        taps, channels = math.prod(self.geometry.kernel), self.maps[0].shape[1]
        step = d.new_zeros(self.geometry.groups, channels // self.geometry.groups)
        step[self._group if d.dim() == 2 else slice(None)] = d[..., ::taps]
        maps = tuple((a + step.view(-1, *[1] * (a.dim() - 2))).to(a.dtype) for a in self.maps)
        return replace(self, maps=maps)

    # -- the two linear maps, and the weights in between -------------------------------------------

    def _net_inputs(self, v: Vectors, n: slice) -> OverPositions:
        """``vᵀa`` at every position of some examples."""
        weight = self._kernels(v)
        u = torch.cat(
            [self.geometry.forward(a[n].to(v.dtype), weight).flatten(2) for a in self.maps], 2
        )
        return u if len(weight) == len(v) else u.index_select(1, self.units)

    def _weighted(self, u: OverPositions, n: slice) -> OverPositions:
        """``Σ δ δᵀu`` over the seeds, the inner product over the positions."""
        if self.squared:
            return u * self.delta[0][n]
        y = torch.zeros_like(u)
        for delta in self._seeds(n):
            delta = delta.to(u.dtype)
            y.addcmul_(delta, torch.linalg.vecdot(delta, u).unsqueeze(-1))
        return y

    def backward(self, y: OverPositions, n: slice, power: int = 1) -> Vectors:
        """Returns ``Σ a y`` over examples and positions, (units, inputs).

        Args:
            y: what weighs every position of some examples, for the units of this part.
            n: which examples.
            power: of the activations; with 2 it is ``Σ a² y``.
        """
        like = self._kernels(y.new_zeros(y.shape[1], self._inputs))
        if len(like) != y.shape[1]:
            y = y.new_zeros(len(y), len(like), y.shape[2]).index_copy_(1, self.units, y)
        places = [self.geometry.places(a) for a in self.maps]
        by_map = y.split([math.prod(sizes) for sizes in places], 2)
        total = torch.zeros_like(like)
        for a, sizes, own in zip(self.maps, places, by_map, strict=True):
            a = a[n].to(y.dtype) ** power
            total += self.geometry.backward(a, own.unflatten(2, sizes), like)
        total = total if len(total) == len(self.units) else total[self.units]
        return self._flipped(total).flatten(1)

    def _kernels(self, v: Tensor) -> Tensor:
        """Vectors as the weight of the convolution; where there are groups, with zeros for the
        units that are left out.
        """
        weight = self._flipped(v.unflatten(1, (self.channels, *self.geometry.kernel)))
        if self.geometry.groups == 1:
            return weight
        every = weight.new_zeros(self.geometry.units, *weight.shape[1:])
        return every.index_copy_(0, self.units, weight)

    def _flipped(self, weight: Tensor) -> Tensor:
        return weight.flip(list(range(2, weight.dim()))) if self.geometry.flipped else weight

    def _seeds(self, n: slice) -> Iterator[OverPositions]:
        return (delta for stack in self.delta for delta in stack[:, n])

    # -- where patches are needed after all, for a few examples at a time --------------------------

    def moments(self) -> Moments:
        """Returns ``Σ w``, ``Σ w²``, ``Σ δ² a`` and ``Σ δ² a²`` of every unit, in float64.

        The weight w of an example is ``Σ (Σ_t δ_t)²`` over the label seeds, that of a position
        under ``expand`` is ``δ²``. The first two results are (units,), the others (units, inputs).
        """
        weight = fourth = first = squares = torch.zeros(
            (), dtype=torch.float64, device=self.units.device
        )
        for n in chunks(len(self.maps[0]), self._inputs * max(self._positions, len(self.units))):
            w = self.delta[0][n].double() if self.squared else self._example_weights(n).unsqueeze(2)
            weight, fourth = weight + w.sum((0, 2)), fourth + w.square().sum((0, 2))
            # In float64, so that V v = S v − o oᵀv holds to the last digit, also where V is nearly
            # singular.
            y = self._weighted(w.new_ones(len(w), len(self.units), self._positions), n)
            first = first + self.backward(y, n)
            if self.squared:
                squares = squares + self.backward(y, n, power=2)
            else:
                a = self._patches(n)
                squares = squares + sum(
                    self._vectors(delta, a).square_().sum(1).double() for delta in self._seeds(n)
                )
        return weight, fourth, first, squares

    def rows(self) -> tuple[Float[Tensor, "units rows inputs"], Float[Tensor, "units rows"]]:
        """Returns ``Σ_t δ_t a_t`` and ``Σ_t δ_t`` of every example and label seed.

        Only for errors that are not squared, whose `terms` are "examples".
        """
        vectors, sums = [], []
        for n in chunks(len(self.maps[0]), self._inputs * self._positions):
            a = self._patches(n)
            vectors += [self._vectors(delta, a) for delta in self._seeds(n)]
            sums += [delta.sum(2).T for delta in self._seeds(n)]
        return torch.cat(vectors, 1), torch.cat(sums, 1)

    def blocks(self) -> packed.Rows:
        groups = self._by_group()
        rows = [packed.zeros(int(own.sum()), self._inputs, own.device) for _, own in groups]
        for n in chunks(len(self.maps[0]), self._inputs * max(self._positions, len(self.units))):
            a = self._patches(n)
            for sums, (g, own) in zip(rows, groups, strict=True):
                if self.squared:
                    delta2 = self.delta[0][n][:, own].transpose(1, 2).flatten(0, 1)
                    packed.add_weighted(sums, a[:, :, g].flatten(0, 1), delta2)
                else:
                    for delta in self._seeds(n):
                        vectors = torch.einsum("nut,nti->uni", delta[:, own], a[:, :, g])
                        packed.add_outer(sums, vectors)
        return packed.stack(rows)

    def spread(self, share: Scalars) -> SharedMoments:
        """Returns ``Σ w``, ``Σ w a`` and ``Σ w a aᵀ`` over channels, with one weight for all units.

        All places of an example's maps have the weight of the example. The channels of all groups
        are mixed.
        """
        w = self._example_weights() @ share
        weight, first, second = share.new_zeros(()), share.new_zeros(()), share.new_zeros(())
        for a in self.maps:
            # (batch, channels, groups × places)
            a = a.unflatten(1, (self.geometry.groups, -1)).transpose(1, 2).flatten(2)
            root = (w / a.shape[2]).sqrt().to(a.dtype)[:, None, None]
            flat = (a * root).transpose(0, 1).flatten(1)
            places = root.expand(-1, 1, a.shape[2]).flatten()
            weight, first = weight + w.sum(), first + (flat @ places).double()
            second = second + (flat @ flat.T).double()
        return weight, first, second

    def _example_weights(self, n: slice = slice(None)) -> Float[Tensor, "batch units"]:
        if self.squared:
            return self.delta[0][n].sum(2, dtype=torch.float64)
        return torch.stack(
            [delta.sum(2, dtype=torch.float64).square() for delta in self._seeds(n)]
        ).sum(0)

    def _patches(self, n: slice) -> Float[Tensor, "batch positions groups inputs"]:
        return torch.cat([self.geometry.patches(a[n]) for a in self.maps], 1)

    def _vectors(self, delta: OverPositions, a: Tensor) -> Float[Tensor, "units batch inputs"]:
        """``Σ_t δ_t a_t`` of every example, for one label seed."""
        return torch.cat(
            [torch.einsum("nut,nti->uni", delta[:, own], a[:, :, g]) for g, own in self._by_group()]
        )

    def _by_group(self) -> list[tuple[int, Tensor]]:
        """Every group that has units, and which they are; units are in increasing order."""
        return [(g, self._group == g) for g in self._group.unique().tolist()]

    @property
    def _group(self) -> Tensor:
        """The group of every unit."""
        return self.units // (self.geometry.units // self.geometry.groups)

    @property
    def _inputs(self) -> int:
        return self.channels * math.prod(self.geometry.kernel)

    @property
    def _positions(self) -> int:
        return self.delta[0].shape[-1]
