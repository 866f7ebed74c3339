"""Sums that keep the samples instead of the blocks: ``V v`` for all units of a layer at once,
without any ``V``.

``V v = E_q[(a − r)(a − r)ᵀ v] − o oᵀ v`` with ``o = m − r``: the first term is two matrix products
over the samples, which are kept about the reference mean ``r``, and the mean part is folded in
exactly. Memory grows with samples × (inputs + units), where blocks take units × inputs².
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from biasshift.fisher import packed
from biasshift.fisher.moments import Sums
from biasshift.theory import dot

TEMPORARY = 2**24  # elements of the largest temporary of a product: 64 MiB in float32
Moments = tuple[Tensor, Tensor, Tensor, Tensor]  # per unit Σ δ², Σ δ⁴, Σ δ² a and Σ δ² a², float64
Pieces = tuple[Tensor, Tensor, Tensor]


class Work(NamedTuple):
    """What decides how to solve, per unit: terms of rank one in the block, places that a product
    goes through, errors.
    """

    rows: int
    positions: int
    errors: int

    def __add__(self, other: "Work") -> "Work":  # pyright: ignore[reportIncompatibleMethodOverride]
        return Work(
            self.rows + other.rows, self.positions + other.positions, self.errors + other.errors
        )


@runtime_checkable
class Part(Protocol):
    """One batch of one layer, as something that can be multiplied. Its activations ``a`` are about
    the reference of the sums.
    """

    @property
    def bytes(self) -> int:
        """What it holds in memory; 0 where nothing is held, and every look at it costs passes
        through the model.
        """
        ...

    @property
    def work(self) -> Work: ...

    @property
    def channels(self) -> int:
        """The size of `spread`: a divisor of the number of inputs."""
        ...

    def weight(self) -> float:
        """``Σ δ²`` over samples and units: two readings of the same probe agree in it."""
        ...

    def product(self, v: Float[Tensor, "units inputs"]) -> Tensor:
        """``Σ δ² a aᵀ v`` for every unit, in the dtype of v."""
        ...

    def select(self, units: Tensor) -> "Part":
        """Some of the units, by index."""
        ...

    def moved(self, d: Tensor) -> "Part":
        """With ``d``, (inputs,) or (units, inputs), added to every activation."""
        ...

    def blocks(self) -> packed.Rows:
        """``Σ δ² a aᵀ``, which only few units can afford."""
        ...

    def spread(self, share: Float[Tensor, " units"]) -> Pieces:
        """``Σ w``, ``Σ w a``, ``Σ w a aᵀ`` with the one weight ``w = Σᵤ shareᵤ δᵤ²`` for all units;
        over channels, for maps.
        """
        ...


@dataclass(frozen=True)
class Samples:
    """Samples with one weight per unit: a linear layer, or positions that count as samples."""

    a: Float[Tensor, "samples inputs"]
    delta2: Float[
        Tensor, "units samples"
    ]  # the weights of one unit lie together: units leave without a look at the others

    @property
    def bytes(self) -> int:
        return _bytes(self.a, self.delta2)

    @property
    def work(self) -> Work:
        return Work(len(self.a), len(self.a), len(self.a))

    @property
    def channels(self) -> int:
        return self.a.shape[1]

    def weight(self) -> float:
        return self.delta2.sum(dtype=torch.float64).item()

    def product(self, v: Float[Tensor, "units inputs"]) -> Tensor:
        out = torch.zeros_like(v)
        for n in chunks(len(self.a), max(v.shape)):
            a = self.a[n].to(v.dtype)
            out.addmm_((v @ a.T).mul_(self.delta2[:, n]), a)
        return out

    def select(self, units: Tensor) -> "Samples":
        return replace(self, delta2=self.delta2[units])

    def moved(self, d: Tensor) -> "Samples":
        return replace(self, a=(self.a + d).to(self.a.dtype))

    def blocks(self) -> packed.Rows:
        rows = packed.zeros(len(self.delta2), self.a.shape[1], self.a.device)
        packed.add_weighted(rows, self.a, self.delta2.T)
        return rows

    def spread(self, share: Float[Tensor, " units"]) -> Pieces:
        w = share.to(self.a.dtype) @ self.delta2
        return (
            w.sum(dtype=torch.float64),
            (w @ self.a).double(),
            ((w[:, None] * self.a).T @ self.a).double(),
        )

    def moments(self) -> Moments:
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
class Again:
    """Parts that did not fit into memory: the probe and the model are run again whenever they are
    needed.
    """

    read: Callable[[], Iterator[Part]]
    channels: int
    work: Work
    units: Tensor | None = None  # of those that are read; None for all
    d: Tensor | None = None  # to be added to their activations

    bytes = 0

    def parts(self) -> Iterator[Part]:
        for part in self.read():
            part = part if self.units is None else part.select(self.units)
            yield part if self.d is None else part.moved(self.d)

    def weight(self) -> float:
        return sum(part.weight() for part in self.parts())

    def product(self, v: Float[Tensor, "units inputs"]) -> Tensor:
        out = torch.zeros_like(v)
        for part in self.parts():
            out += part.product(v)
        return out

    def select(self, units: Tensor) -> "Again":
        d = self.d if self.d is None or self.d.dim() == 1 else self.d[units]
        return replace(self, units=units if self.units is None else self.units[units], d=d)

    def moved(self, d: Tensor) -> "Again":
        return replace(self, d=d if self.d is None else self.d + d)

    def blocks(self) -> packed.Rows:
        return _added([part.blocks() for part in self.parts()])

    def spread(self, share: Float[Tensor, " units"]) -> Pieces:
        return _total(part.spread(share) for part in self.parts())


class TooLarge(Exception):
    """The blocks of so many units do not fit into the memory budget."""

    def __init__(self, units: int, bytes: int):
        super().__init__(units, bytes)
        self.units, self.bytes = units, bytes


@dataclass(frozen=True)
class ImplicitSums(Sums):
    """What the unit Fisher matrices of a layer are made of, with the samples in place of the
    blocks.
    """

    squares: Float[Tensor, "units inputs"]  # Σ δ² (a − reference)²
    parts: tuple[Part, ...]
    memory_budget: int  # bytes that blocks may take where they are asked for, unit by unit

    @classmethod
    def empty(cls, units: int, reference: Tensor, memory_budget: int) -> "ImplicitSums":
        """Sums over no samples, about a reference near the mean."""
        wide = reference.double()
        first = wide.new_zeros(units, wide.shape[-1])
        return cls(
            0,
            0,
            wide,
            torch.zeros_like(wide),
            first[:, 0].clone(),
            first[:, 0].clone(),
            first,
            first.clone(),
            (),
            memory_budget,
        )

    def with_part(self, moments: Moments, part: Part | None) -> "ImplicitSums":
        """These sums and a batch's weighted activations, which are kept or not."""
        weight, weight_squares, first, squares = moments
        return replace(
            self,
            weight=self.weight + weight,
            weight_squares=self.weight_squares + weight_squares,
            first=self.first + first,
            squares=self.squares + squares,
            parts=self.parts if part is None else (*self.parts, part),
        )

    def without_parts(self, *parts: Part) -> "ImplicitSums":
        """The moments alone, or with other parts, that say the same."""
        return replace(self, parts=parts)

    def about(self, reference: Tensor) -> "ImplicitSums":
        d = self.reference - reference
        step = d.expand_as(self.first)
        squares = self.squares + step * (2 * self.first + self.weight[:, None] * step)
        return replace(
            super().about(reference),
            squares=squares,
            parts=tuple(part.moved(d) for part in self.parts),
        )

    def __add__(self, other: "ImplicitSums") -> "ImplicitSums":
        other = other.about(self.reference)
        return replace(
            self.plus(other), squares=self.squares + other.squares, parts=self.parts + other.parts
        )

    def select(self, units: Tensor) -> "ImplicitSums":
        """Some of the units, by index."""
        names = ["weight", "weight_squares", "first", "squares"]
        names += ["reference", "total"] if self.reference.dim() == 2 else []
        return replace(
            self,
            parts=tuple(p.select(units) for p in self.parts),
            **{name: getattr(self, name)[units] for name in names},
        )

    # -- expectations of second order --------------------------------------------------------------

    @property
    def squares_q(self) -> Tensor:
        return self.squares / self.weight[:, None]

    def product(self, v: Float[Tensor, "units inputs"]) -> Tensor:
        """``Σ δ² (a − reference)(a − reference)ᵀ v``, in the dtype of v."""
        out = self.parts[0].product(v)
        for part in self.parts[1:]:
            out += part.product(v)
        return out

    def times(self, v: Float[Tensor, "units inputs"]) -> Tensor:
        m = self.offset_q
        return self.product(v).double() / self.weight[:, None] - m * dot(m, v.double())[:, None]

    def var_q(self, units: slice | Tensor = slice(None)) -> Tensor:
        """``V`` of some units, formed for this one call.

        Raises:
            TooLarge: when that takes more than the memory budget.
        """
        index = torch.arange(len(self.weight), device=self.weight.device)[units]
        needed = 8 * len(index) * self.first.shape[1] ** 2
        if needed > self.memory_budget:
            raise TooLarge(len(index), needed)
        return self.covariances(index)

    def covariances(self, units: Tensor) -> Float[Tensor, "units inputs inputs"]:
        """`var_q` without a look at the budget."""
        few = self.select(units)
        second = packed.dense(_added([part.blocks() for part in few.parts])).div_(
            few.weight[:, None, None]
        )
        return torch.baddbmm(second, few.offset_q[:, :, None], few.offset_q[:, None, :], alpha=-1)

    def spread(self, share: Float[Tensor, " units"]) -> Float[Tensor, "channels channels"]:
        """The covariance of the activations under ``Σᵤ shareᵤ qᵤ``, one for all units: what
        preconditions them.
        """
        share = torch.where(share > 0, share / self.weight, 0)
        weight, first, second = _total(part.spread(share) for part in self.parts)
        mean = first / weight
        return second / weight - mean[:, None] * mean


def chunks(samples: int, width: int) -> Iterator[slice]:
    """Slices of the samples, such that a temporary of ``width`` elements per sample stays within
    bounds.
    """
    step = max(1, TEMPORARY // max(width, 1))
    return (slice(i, i + step) for i in range(0, samples, step))


def block_bytes(units: int, inputs: int) -> int:
    """What the block rows of a layer take in float64."""
    return 8 * units * sum((j - i) * (inputs - i) for i, j in packed.starts(inputs))


def _bytes(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _added(parts: list[packed.Rows]) -> packed.Rows:
    rows = parts[0]
    for other in parts[1:]:
        for k, block in enumerate(other):
            packed.add_block(rows, k, block)
    return rows


def _total(pieces: Iterator[Pieces]) -> Pieces:
    weight, first, second = next(pieces)
    for w, f, s in pieces:
        weight, first, second = weight + w, first + f, second + s
    return weight, first, second
