"""Sums over samples, and the expectations of the theory that they determine.

Sums are shifted by a reference mean (that of the first batch), because ``E(a aᵀ) − m mᵀ`` cancels
when means are large against the spread. Two sums with different references merge exactly: the shift
moves through first and zeroth moments.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from biasshift.fisher import packed
from biasshift.theory import Scalars, Vectors

TOLD = 4096  # errors that are looked at, to tell their precision
AnySums = TypeVar("AnySums", bound="Sums")


def sum_rounding(
    delta: Float[Tensor, "passes batch positions units"], share: Tensor | None = None
) -> Tensor:
    """Returns what ``Σ (Σ_t δ_t)²`` may be of rounding alone, (units,), in float64.

    A bias has no influence where its unit's errors cancel over the positions t of every example.
    What is summed of them is then rounding, in proportion to the errors themselves: it is at most
    the share ``ρ²`` of ``Σ δ_t²``. Inputs do not enter, however large or far from 0 they are.

    Args:
        delta: the errors of some labels.
        share: ρ; by default the `rounding_share` of the errors.

    >>> sum_rounding(torch.full((1, 1, 4, 1), 0.1)) < 1e-9
    tensor([True])
    """
    share = rounding_share(delta) if share is None else share
    work = torch.promote_types(delta.dtype, torch.float32)
    norms = torch.linalg.vector_norm(delta, dim=2, dtype=work)  # needs no copy of the errors
    return share**2 * norms.double().square().sum((0, 1))


def rounding_share(delta: Tensor) -> Tensor:
    """Returns ρ, how far errors that should cancel may be from it, as a share of themselves.

    It is that of the dtype of the errors, or of a coarser one where that holds them exactly: a
    kernel in half precision, inside of a model in single precision, rounds as half precision does.
    A sample of the errors tells, since others would hardly be held by chance.

    >>> rounding_share(torch.tensor([0.1, 0.2])) < 2e-4, rounding_share(torch.tensor([0.5, 2.0]))
    (tensor(True), tensor(0.0100, dtype=torch.float64))
    """
    some, own = delta.flatten()[:: max(1, delta.numel() // TOLD)], _share(delta.dtype)
    share = torch.full((), own, dtype=torch.float64, device=delta.device)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        if _share(dtype) > own:  # the device is not waited for
            held = (some == some.to(dtype).to(some.dtype)).all() & some.any()
            share = torch.where(held, share.clamp(min=_share(dtype)), share)
    return share


def _share(dtype: torch.dtype) -> float:
    # The errors of a softmax or a norm are differences of numbers that may be some hundred times as
    # large, and adding them up rounds again: ρ is 1000 ε. Half precision allows no more than 1e-2,
    # since errors that do not cancel exactly may well add up to a tenth of themselves.
    return min(1000 * torch.finfo(dtype).eps, 1e-2)


@dataclass(frozen=True)
class Sums:
    """Moments of the incoming activations under p and under δ², up to first order.

    The subclasses add the second order: `WeightedSums` as blocks, `samples.ImplicitSums` by the
    samples themselves. ``reference`` and ``total`` are (inputs,) when all units see the same
    inputs, else (units, inputs). Everything is float64, expectations included.
    """

    examples: int  # the number that E_p divides by
    positions: int  # samples in ``total``: examples × positions where weights are shared
    reference: Tensor
    total: Tensor  # Σ (a − reference)
    weight: Float[Tensor, " units"]  # Σ δ²
    weight_squares: Float[Tensor, " units"]  # Σ δ⁴
    weight_rounding: Float[Tensor, " units"]  # what Σ δ² may be of rounding; see `sum_rounding`
    first: Float[Tensor, "units inputs"]  # Σ δ² (a − reference)

    def with_inputs(self: AnySums, examples: int, positions: int, total: Tensor) -> AnySums:
        """Returns these sums and a batch of incoming activations under p.

        Args:
            examples: how many examples the batch has.
            positions: how many activations; more than examples where weights are shared.
            total: Σ (a − reference) over all positions, shaped like the reference.
        """
        return replace(
            self,
            examples=self.examples + examples,
            positions=self.positions + positions,
            total=self.total + total,
        )

    def with_weight_squares(self: AnySums, delta2: Float[Tensor, "samples units"]) -> AnySums:
        """Returns these sums and the squared weights that `with_vectors` could not know.

        Args:
            delta2: ``Σ_y p_y (Σ_t δ_t)²`` of every example, over its labels y and positions t.
        """
        return replace(self, weight_squares=self.weight_squares + delta2.double().square().sum(0))

    def about(self: AnySums, reference: Tensor) -> AnySums:
        """Returns the moments of order zero and one about another reference.

        ``Σ δ² (a − r′) = Σ δ² (a − r) + (r − r′) Σ δ²``: nothing is lost, for the shift is known
        exactly. Second moments are the subclass's.
        """
        d = self.reference - reference
        first = self.first + self.weight[:, None] * d.expand_as(self.first)
        return replace(
            self, reference=reference, total=self.total + self.positions * d, first=first
        )

    def plus(self: AnySums, other: "Sums") -> AnySums:
        """Returns the moments of order zero and one over the samples of both sums.

        Both must be about the same reference, which is not checked: use ``+``, which moves the
        other sums to it first.
        """
        return replace(
            self,
            examples=self.examples + other.examples,
            positions=self.positions + other.positions,
            total=self.total + other.total,
            weight=self.weight + other.weight,
            weight_squares=self.weight_squares + other.weight_squares,
            weight_rounding=self.weight_rounding + other.weight_rounding,
            first=self.first + other.first,
        )

    def without_inert_biases(self: AnySums) -> AnySums:
        """Returns sums to solve with, in which units with an inert bias have their weights alone.

        The errors of such a unit add up to 0 in every example. Hence its second moments are the
        same about every reference, and its first moments are 0. About 0 it has ``c = 1``, ``m =
        0``, and A in place of V. Other units stay as they are, and so does everything where no bias
        is inert.
        """
        inert = self.bias_inert
        if not inert.any():
            return self
        return replace(
            self,
            reference=self.reference.expand_as(self.first).where(~inert[:, None], 0),
            total=self.total.expand_as(self.first),
            weight=self.weight.where(~inert, self.examples),
            weight_squares=self.weight_squares.where(~inert, self.examples),
            weight_rounding=self.weight_rounding.where(~inert, 0),
            first=self.first.where(~inert[:, None], 0),
        )

    # -- what units there are ----------------------------------------------------------------------

    @property
    def bias_inert(self) -> Tensor:
        """The units whose errors cancel over the positions of every example, (units,) bool."""
        return (self.weight_rounding > 0) & (self.weight <= self.weight_rounding)

    @property
    def dead(self) -> Tensor:
        """The units whose error is 0 everywhere, (units,) bool.

        Where errors cancel to exactly 0 there are errors, and the unit is not dead.
        """
        return (self.weight == 0) & (self.weight_rounding == 0)

    # -- expectations, float64 ---------------------------------------------------------------------

    @property
    def mean_delta2(self) -> Tensor:
        """``c = E_p(δ²)``, (units,)."""
        return self.weight / self.examples

    @property
    def mean_p(self) -> Tensor:
        """``μ = E_p(a)``, shaped like the reference."""
        return self.reference + self.total / self.positions

    @property
    def offset_q(self) -> Tensor:
        """``m − reference``, (units, inputs); NaN where Σ δ² is 0, or rounding."""
        return self.first / self.weight.where(~self.bias_inert, torch.nan)[:, None]

    @property
    def mean_q(self) -> Tensor:
        """``m = E_q(a)``, (units, inputs); NaN for a dead unit, or one with an inert bias."""
        return self.reference + self.offset_q

    @property
    def b(self) -> Tensor:
        """``b = E_p(δ² a) = c m``, (units, inputs); as summed where no m is defined."""
        summed = (self.first + self.weight[:, None] * self.reference) / self.examples
        return summed.where(self.offset_q.isnan(), self.mean_q * self.mean_delta2[:, None])

    @property
    def offset_pq(self) -> Tensor:
        """``m − μ``, (units, inputs), in which the reference has dropped out."""
        return self.offset_q - self.total / self.positions

    @property
    def cov_p(self) -> Tensor:
        """``Cov_p(δ², a) = c (m − μ)``, (units, inputs), which is 0 for a dead unit."""
        return (self.first - self.weight[:, None] * (self.total / self.positions)) / self.examples

    @property
    def effective_samples(self) -> Tensor:
        """``(Σ δ²)² / Σ δ⁴``, (units,), and 0 for a dead unit."""
        return torch.where(self.weight > 0, self.weight**2 / self.weight_squares, 0)

    @property
    def squares_q(self) -> Tensor:
        """``E_q (a − reference)²``, (units, inputs)."""
        raise NotImplementedError

    def times(self, v: Vectors) -> Tensor:
        """Returns ``V v`` for every unit, (units, inputs), with ``V = Var_q(a)`` undamped."""
        raise NotImplementedError

    # -- finished blocks ---------------------------------------------------------------------------

    def covariance(self, dtype: torch.dtype) -> Tensor:
        """Returns ``V = Var_q(a)``, (units, inputs, inputs), in the dtype of its reader.

        It is NaN for dead units. ``V = Σ δ² (a − r)(a − r)ᵀ / Σ δ² − o oᵀ`` with ``o = m − r``.
        """
        o = self.offset_q
        out = self.room(dtype, o.shape[1])
        self.finish(out, 1 / self.weight, -0.5 * o, o)
        out[o.isnan().any(1)] = torch.nan
        return out

    def matrix(self, dtype: torch.dtype, bias: bool) -> Tensor:
        """Returns F, bias last, or without a bias ``A = E_p(δ² a aᵀ)``, in the dtype of its reader.

        ``A`` follows from the moments about r by adding ``x rᵀ + r xᵀ`` with ``x = E_p(δ² (a − r))
        + c r / 2``. It is 0 for a dead unit.
        """
        inputs = self.first.shape[1]
        solvable = self.without_inert_biases()
        r = solvable.reference.expand_as(self.first)
        x = solvable.first / self.examples + solvable.mean_delta2[:, None] * r / 2
        out = self.room(dtype, inputs + bias)
        solvable.finish(out, torch.full_like(self.weight, 1 / self.examples), x, r)
        if bias:
            out[:, :inputs, inputs] = out[:, inputs, :inputs] = self.b.to(dtype)
            out[:, inputs, inputs] = self.mean_delta2.to(dtype)
        return out

    def finish(self, out: Tensor, scale: Scalars, x: Vectors, y: Vectors) -> None:
        """Writes ``scale Σ δ² (a − r)(a − r)ᵀ + x yᵀ + y xᵀ`` into blocks; see `packed.finish`."""
        raise NotImplementedError

    def room(self, dtype: torch.dtype, size: int) -> Tensor:
        """Returns memory for finished blocks, (units, size, size)."""
        return torch.empty(len(self.first), size, size, dtype=dtype, device=self.first.device)


def no_samples(units: int, reference: Tensor) -> dict[str, Any]:
    """Returns the fields of `Sums` over no samples, about a reference; see `WeightedSums.empty`."""
    wide = reference.double()
    return {
        "examples": 0,
        "positions": 0,
        "reference": wide,
        "total": torch.zeros_like(wide),
        "weight": wide.new_zeros(units),
        "weight_squares": wide.new_zeros(units),
        "weight_rounding": wide.new_zeros(units),
        "first": wide.new_zeros(units, wide.shape[-1]),
    }


@dataclass(frozen=True)
class WeightedSums(Sums):
    """All sums that the unit Fisher matrices of a layer are made of, blocks included.

    Methods return new objects, but the blocks are too large to copy at every batch: `with_weights`
    and `with_vectors` add to them in place. Afterwards use what they return, and not the old sums.
    """

    second: packed.Rows  # Σ δ² (a − reference)(a − reference)ᵀ

    @classmethod
    def empty(cls, units: int, reference: Float[Tensor, " inputs"]) -> "WeightedSums":
        """Returns sums over no samples, which take no memory for blocks yet.

        Args:
            units: how many units the layer has.
            reference: near the mean of the activations, and representable in their dtype: it is
                subtracted from them before the sums are formed.
        """
        second = packed.zeros(units, len(reference), reference.device)
        return cls(**no_samples(units, reference), second=second)

    def with_weights(
        self, shifted: Float[Tensor, "samples inputs"], delta2: Float[Tensor, "samples units"]
    ) -> "WeightedSums":
        """Returns these sums and a batch in which a sample has one weight per unit.

        Reuses (and spoils) the memory of ``self``. The means under p are not touched; they come by
        `with_inputs`.

        Args:
            shifted: ``a − reference``, in the dtype that products are formed in.
            delta2: the weights δ² ≥ 0 of every sample and unit.
        """
        packed.add_weighted(self.second, shifted, delta2)
        weight, squares = delta2.sum(0, dtype=torch.float64), delta2.double().square().sum(0)
        return self._weighted(weight, squares, delta2.T @ shifted)

    def with_vectors(
        self, vectors: Float[Tensor, "units samples inputs"], delta: Float[Tensor, "samples units"]
    ) -> "WeightedSums":
        """Returns these sums and a batch of a layer with shared weights, for some labels.

        Reuses (and spoils) the memory of ``self``. The squared weights are those of whole examples,
        all labels together, and come by `with_weight_squares`.

        Args:
            vectors: ``Σ_t δ_t (a_t − reference)`` over the positions t of a sample.
            delta: ``Σ_t δ_t``.
        """
        packed.add_outer(self.second, vectors)
        weight = delta.double().square().sum(0)
        return self._weighted(
            weight, torch.zeros_like(weight), torch.einsum("nu,uni->ui", delta, vectors)
        )

    def _weighted(self, weight: Tensor, squares: Tensor, first: Tensor) -> "WeightedSums":
        return replace(
            self,
            weight=self.weight + weight,
            weight_squares=self.weight_squares + squares,
            first=self.first + first.double(),
        )

    def moved(self, reference: Tensor) -> "WeightedSums":
        """Returns the same sums about another reference, in memory of their own.

        With ``d = r − r′`` the blocks gain ``d (f + w d/2)ᵀ`` and its transpose, where f and w are
        the moments of order one and zero about r.
        """
        d = self.reference - reference
        step = d.expand_as(self.first)
        second = packed.copied(self.second)
        packed.add_symmetric(second, step, self.first + 0.5 * self.weight[:, None] * step)
        return replace(self.about(reference), second=second)

    def __add__(self, other: "WeightedSums") -> "WeightedSums":
        """The sums over the samples of both, about the reference of the first."""
        other = other.moved(self.reference)
        for block, mine in zip(other.second, self.second, strict=True):
            block += mine
        return replace(self.plus(other), second=other.second)

    @staticmethod
    def stacked(parts: Sequence["WeightedSums"]) -> "WeightedSums":
        """Returns one layer of units that see different inputs, such as a grouped convolution.

        Args:
            parts: the sums of each group of units, over the same examples. Its units come one
                group after the other, and reference and total become (units, inputs).
        """
        return WeightedSums(
            examples=parts[0].examples,
            positions=parts[0].positions,
            reference=torch.cat([part.reference.expand_as(part.first) for part in parts]),
            total=torch.cat([part.total.expand_as(part.first) for part in parts]),
            weight=torch.cat([part.weight for part in parts]),
            weight_squares=torch.cat([part.weight_squares for part in parts]),
            weight_rounding=torch.cat([part.weight_rounding for part in parts]),
            first=torch.cat([part.first for part in parts]),
            second=packed.stack([part.second for part in parts]),
        )

    # -- expectations of second order, float64 -----------------------------------------------------

    @property
    def squares_q(self) -> Tensor:
        diagonals = [block.diagonal(dim1=1, dim2=2) for block in self.second]
        return torch.cat(diagonals, dim=1).double() / self.weight[:, None]

    def var_q(self, units: slice | Tensor = slice(None)) -> Tensor:
        """Returns ``V = Var_q(a)`` of some units, (units, inputs, inputs); NaN for dead units.

        Args:
            units: a slice or a tensor of indices; all units by default.
        """
        m = self.offset_q[units]
        second = packed.dense(self.second, units).div_(self.weight[units][:, None, None])
        return torch.baddbmm(second, m[:, :, None], m[:, None, :], alpha=-1)

    def finish(self, out: Tensor, scale: Scalars, x: Vectors, y: Vectors) -> None:
        packed.finish(out, self.second, scale, x, y)

    def times(self, v: Vectors) -> Tensor:
        return torch.bmm(self.var_q(), v.double()[:, :, None])[:, :, 0]
