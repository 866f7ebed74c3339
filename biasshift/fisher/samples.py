"""Sums that keep the samples instead of the blocks: ``V v`` for all units, without any ``V``.

``V v = E_q[(a − r)(a − r)ᵀ v] − o oᵀ v`` with ``o = m − r``. The first term is two matrix products
over the samples, which are kept about the reference mean ``r``; the second is exact. Memory grows
with samples × (inputs + units), where blocks take units × inputs².
"""

from dataclasses import dataclass, replace
from functools import reduce
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from biasshift.fisher import packed
from biasshift.fisher.moments import Sums, no_samples
from biasshift.fisher.parts import (
    Moments as Moments,
    Part as Part,
    PartWithRows as PartWithRows,
    RereadParts as RereadParts,
    Samples as Samples,
    SharedMoments as SharedMoments,
    Terms as Terms,
    Work as Work,
    added,
    chunks as chunks,
)
from biasshift.theory import Scalars, Vectors, dot

STORAGES = ("dense", "implicit", "auto")
MEMORY_BUDGET = 2**30  # bytes that the blocks, or the samples, of a layer may take
AnySampled = TypeVar("AnySampled", bound="ImplicitSums")


@dataclass(eq=False)
class TooLarge(Exception):
    """The blocks of so many units do not fit into the memory budget."""

    units: int
    bytes: int


@dataclass(frozen=True)
class ImplicitSums(Sums):
    """All sums that the unit Fisher matrices of a layer are made of, with samples for blocks.

    They have the moments of order zero and one, and the diagonal of the second, as tensors. Whole
    second moments come from the parts, one product or a few blocks at a time.
    """

    squares: Vectors  # Σ δ² (a − reference)²
    parts: tuple[Part, ...]
    memory_budget: int  # bytes that blocks may take where they are asked for, unit by unit

    @classmethod
    def empty(
        cls: type[AnySampled], units: int, reference: Tensor, memory_budget: int
    ) -> AnySampled:
        """Returns sums over no samples.

        Args:
            units: how many units the layer has.
            reference: near the mean of the activations, (inputs,) or (units, inputs).
            memory_budget: bytes that `var_q` may take.
        """
        fields = no_samples(units, reference)
        return cls(
            **fields,
            squares=torch.zeros_like(fields["first"]),
            parts=(),
            memory_budget=memory_budget,
        )

    def with_part(self: AnySampled, moments: Moments, part: Part | None) -> AnySampled:
        """Returns these sums and the weighted activations of a batch.

        Args:
            moments: those of the part, from its ``moments()``.
            part: the batch itself, about the same reference; None where it is not kept, and has to
                be read again.
        """
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
        """Returns the moments with other parts in place of these, or with none.

        The parts must stand for the same samples: `RereadParts` for those that did not fit.
        """
        return replace(self, parts=parts)

    def about(self, reference: Tensor) -> "ImplicitSums":
        d = self.reference - reference
        step = d.expand_as(self.first)
        return replace(
            super().about(reference),
            squares=self.squares + step * (2 * self.first + self.weight[:, None] * step),
            parts=tuple(part.moved(d) for part in self.parts),
        )

    def __add__(self, other: "ImplicitSums") -> "ImplicitSums":
        """The sums over the samples of both, about the reference of the first."""
        other = other.about(self.reference)
        return replace(
            self.plus(other), squares=self.squares + other.squares, parts=self.parts + other.parts
        )

    def select(self, units: Tensor) -> "ImplicitSums":
        """Returns the sums of some of the units.

        Args:
            units: their indices, in any order; results then come in this order.
        """
        names = ["weight", "weight_squares", "weight_rounding", "first", "squares"]
        names += ["reference", "total"] if self.reference.dim() == 2 else []
        return replace(
            self,
            parts=tuple(part.select(units) for part in self.parts),
            **{name: getattr(self, name)[units] for name in names},
        )

    # -- expectations of second order --------------------------------------------------------------

    @property
    def squares_q(self) -> Tensor:
        return self.squares / self.weight[:, None]

    def product(self, v: Vectors) -> Tensor:
        """Returns ``Σ δ² (a − reference)(a − reference)ᵀ v`` for every unit, in the dtype of v.

        This is the one large cost of an iteration: it goes over all samples of all parts.
        """
        return reduce(Tensor.add_, (part.product(v) for part in self.parts))

    def times(self, v: Vectors) -> Tensor:
        m = self.offset_q
        return self.product(v).double() / self.weight[:, None] - m * dot(m, v.double())[:, None]

    def var_q(self, units: slice | Tensor = slice(None)) -> Tensor:
        """Returns ``V = Var_q(a)`` of some units, formed for this one call.

        Args:
            units: a slice or a tensor of indices; all units by default.

        Raises:
            TooLarge: when that takes more than the memory budget.
        """
        index = torch.arange(len(self.weight), device=self.weight.device)[units]
        needed = 8 * len(index) * self.first.shape[1] ** 2
        if needed > self.memory_budget:
            raise TooLarge(len(index), needed)
        return self.covariances(index)

    def covariances(self, units: Tensor) -> Float[Tensor, "units inputs inputs"]:
        """Returns ``V = Var_q(a)`` of some units, however much memory that takes.

        The caller bounds their number; `var_q` is the same within the memory budget.
        """
        few = self.select(units)
        second = packed.dense(packed.total([part.blocks() for part in few.parts]))
        second, m = second.div_(few.weight[:, None, None]), few.offset_q
        return torch.baddbmm(second, m[:, :, None], m[:, None, :], alpha=-1)

    def finish(self, out: Tensor, scale: Scalars, x: Vectors, y: Vectors) -> None:
        rows = packed.total([part.blocks() for part in self.parts])
        packed.finish(out, rows, scale, x, y)

    def room(self, dtype: torch.dtype, size: int) -> Tensor:
        """Returns memory for finished blocks, (units, size, size).

        Raises:
            TooLarge: when they, in float64, take more than the memory budget.
        """
        units, inputs = self.first.shape
        if 8 * units * inputs**2 > self.memory_budget:
            raise TooLarge(units, 8 * units * inputs**2)
        return super().room(dtype, size)

    def spread(self, share: Scalars) -> Float[Tensor, "channels channels"]:
        """Returns the covariance of the activations under ``Σᵤ shareᵤ qᵤ``, float64.

        It is one matrix for all units, which preconditions them. Where weights are shared it is
        over channels, and the same at all places of a kernel.

        Args:
            share: ≥ 0, with sum 1; units of share 0 may be dead.
        """
        share = torch.where(share > 0, share / self.weight, 0)
        weight, first, second = added(part.spread(share) for part in self.parts)
        mean = first / weight
        return second / weight - mean[:, None] * mean
