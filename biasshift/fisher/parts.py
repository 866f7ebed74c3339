"""What is kept of a batch in place of its blocks: linear maps, which can be multiplied with.

`Samples` are those of layers whose samples have one weight per unit, `convolution.Maps` those of
shared weights, and `RereadParts` those that did not fit into memory.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import reduce
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from biasshift.fisher import packed
from biasshift.theory import Scalars, Vectors

TEMPORARY = 2**24  # elements of the largest temporary of a product: 64 MiB in float32
Moments = tuple[Tensor, Tensor, Tensor, Tensor]  # per unit Σ δ², Σ δ⁴, Σ δ² a and Σ δ² a², float64
SharedMoments = tuple[Tensor, Tensor, Tensor]  # for all units Σ w, Σ w a and Σ w a aᵀ
Terms = Literal["samples", "examples", "positions", "unread"]


@dataclass(frozen=True)
class Work:
    """The sizes that decide how to solve, for one unit; those of several batches add up.

    Products with V cost ``4 positions × inputs`` operations, and a few for every error. A
    factorization costs the cube of the smaller of rows and inputs.
    """

    rows: int = 0  # terms of rank one in the block
    positions: int = 0  # places that a product goes through
    errors: int = 0

    def __add__(self, other: "Work") -> "Work":
        return Work(
            self.rows + other.rows, self.positions + other.positions, self.errors + other.errors
        )


@runtime_checkable
class Part(Protocol):
    """One batch of one layer, as a linear map: it can be multiplied without forming a block.

    Its activations ``a`` are about the reference of the sums. Shapes are those of the layer's
    units, or of the units that were selected.
    """

    @property
    def work(self) -> Work:
        """The sizes that decide how to solve with it."""
        ...

    @property
    def channels(self) -> int:
        """The size of `spread`: a divisor of the number of inputs."""
        ...

    @property
    def terms(self) -> Terms:
        """Of what a block is the sum, which decides how it can be factored.

        "samples": of ``δ² a aᵀ`` with activations that all units share. "positions": the same at
        the positions of a convolution. "examples": of outer products of a vector per unit and
        example, see `PartWithRows`. "unread": of parts that are not in memory, so that every use
        reads the probe again.
        """
        ...

    def product(self, v: Vectors) -> Tensor:
        """Returns ``Σ δ² a aᵀ v`` for every unit, in the dtype of v."""
        ...

    def select(self, units: Tensor) -> "Part":
        """Returns the part of some of the units, by index."""
        ...

    def moved(self, d: Tensor) -> "Part":
        """Returns the part with ``d``, (inputs,) or (units, inputs), added to its activations."""
        ...

    def blocks(self) -> packed.Rows:
        """Returns ``Σ δ² a aᵀ``, which only few units can afford."""
        ...

    def spread(self, share: Scalars) -> SharedMoments:
        """Returns ``Σ w``, ``Σ w a`` and ``Σ w a aᵀ`` with one weight for all units.

        The weight of a sample is ``w = Σᵤ shareᵤ δᵤ²``. Where weights are shared, the inputs are
        the channels alone: all places of an example's maps have the weight of the example.
        """
        ...


@runtime_checkable
class PartWithRows(Part, Protocol):
    """A part whose terms are "examples": every unit has rows of its own."""

    def rows(self) -> tuple[Float[Tensor, "units rows inputs"], Float[Tensor, "units rows"]]:
        """Returns ``Σ_t δ_t a_t`` and ``Σ_t δ_t`` over the positions t of every example.

        There is one row for every example and label seed, and a block is the sum of their outer
        products.
        """
        ...


@dataclass(frozen=True)
class Samples:
    """The part of a layer in which a sample has one weight per unit.

    That is a linear layer, or one whose positions count as samples.
    """

    a: Float[Tensor, "samples inputs"]
    # The weights of one unit lie together: units leave without touching the others.
    delta2: Float[Tensor, "units samples"]

    @property
    def terms(self) -> Terms:
        return "samples"

    @property
    def bytes(self) -> int:
        """The bytes that the part takes in memory."""
        return self.a.nbytes + self.delta2.nbytes

    @property
    def numbers(self) -> int:
        """How many numbers are held."""
        return self.a.numel() + self.delta2.numel()

    @property
    def work(self) -> Work:
        return Work(len(self.a), len(self.a), len(self.a))

    @property
    def channels(self) -> int:
        return self.a.shape[1]

    def weight(self) -> float:
        """Returns ``Σ δ²`` over samples and units: two readings of the same probe agree in it."""
        return self.delta2.sum(dtype=torch.float64).item()

    def product(self, v: Vectors) -> Tensor:
        out = torch.zeros_like(v)
        for n in chunks(len(self.a), max(v.shape)):
            a = self.a[n].to(v.dtype)
            out.addmm_((v @ a.T).mul_(self.delta2[:, n]), a)
        return out

    def select(self, units: Tensor) -> "Samples":
        return replace(self, delta2=self.delta2[units])

    def moved(self, d: Tensor) -> "Samples":
        return replace(self, a=(self.a + d).to(self.a.dtype))

    def wide(self) -> "Samples":
        """Returns the part in float64."""
        return Samples(self.a.double(), self.delta2.double())

    def blocks(self) -> packed.Rows:
        rows = packed.zeros(len(self.delta2), self.a.shape[1], self.a.device)
        packed.add_weighted(rows, self.a, self.delta2.T)
        return rows

    def spread(self, share: Scalars) -> SharedMoments:
        w = share.to(self.a.dtype) @ self.delta2
        return (
            w.sum(dtype=torch.float64),
            (w @ self.a).double(),
            ((w[:, None] * self.a).T @ self.a).double(),
        )

    def moments(self) -> Moments:
        """Returns ``Σ δ²``, ``Σ δ⁴``, ``Σ δ² a`` and ``Σ δ² a²`` over the samples, in float64.

        The first two are (units,), the others (units, inputs). `ImplicitSums.with_part` takes them.
        """
        fourth = first = squares = torch.zeros((), dtype=torch.float64, device=self.a.device)
        for n in chunks(len(self.a), max(self.a.shape[1], len(self.delta2))):
            wide = self.delta2[:, n].double()
            fourth = fourth + wide.square().sum(1)
            # In float64 from what is held: V v = S v − o oᵀv, and where V is nearly singular the
            # two parts must agree to the last digit.
            first = first + wide @ self.a[n].double()
            squares = squares + (self.delta2[:, n] @ self.a[n].square()).double()
        return self.delta2.sum(1, dtype=torch.float64), fourth, first, squares


@dataclass(frozen=True)
class RereadParts:
    """Parts that did not fit into memory, as one part that holds nothing.

    The model reads the probe again whenever the parts are needed. Every product with V costs
    forward and backward passes over the whole probe.
    """

    read: Callable[[], Iterator[Part]]
    channels: int
    work: Work
    units: Tensor | None = None  # of those that are read; None for all
    d: Tensor | None = None  # to be added to their activations

    @property
    def terms(self) -> Terms:
        return "unread"

    def parts(self) -> Iterator[Part]:
        """Yields every part of the probe, of the selected units and about the moved reference."""
        for part in self.read():
            part = part if self.units is None else part.select(self.units)
            yield part if self.d is None else part.moved(self.d)

    def product(self, v: Vectors) -> Tensor:
        out = torch.zeros_like(v)
        for part in self.parts():
            out += part.product(v)
        return out

    def select(self, units: Tensor) -> "RereadParts":
        d = self.d if self.d is None or self.d.dim() == 1 else self.d[units]
        return replace(self, units=units if self.units is None else self.units[units], d=d)

    def moved(self, d: Tensor) -> "RereadParts":
        return replace(self, d=d if self.d is None else self.d + d)

    def blocks(self) -> packed.Rows:
        return packed.total([part.blocks() for part in self.parts()])

    def spread(self, share: Scalars) -> SharedMoments:
        return added(part.spread(share) for part in self.parts())


@runtime_checkable
class SampledSums(Protocol):
    """What solvers know of `samples.ImplicitSums`."""

    @property
    def parts(self) -> tuple[Part, ...]: ...
    @property
    def first(self) -> Tensor: ...
    @property
    def weight(self) -> Tensor: ...
    @property
    def offset_q(self) -> Tensor: ...
    @property
    def effective_samples(self) -> Tensor: ...
    def select(self, units: Tensor) -> "SampledSums": ...
    def product(self, v: Vectors) -> Tensor: ...
    def covariances(self, units: Tensor) -> Tensor: ...
    def spread(self, share: Scalars) -> Tensor: ...


def chunks(samples: int, width: int) -> Iterator[slice]:
    """Returns slices of the samples that bound the memory of a temporary.

    Args:
        samples: how many there are.
        width: elements that the temporary has for each of them; a slice has `TEMPORARY` elements
            at most, or is one sample.
    """
    step = max(1, TEMPORARY // max(width, 1))
    return (slice(i, i + step) for i in range(0, samples, step))


def added(moments: Iterator[SharedMoments]) -> SharedMoments:
    return reduce(lambda x, y: (x[0] + y[0], x[1] + y[1], x[2] + y[2]), moments)
