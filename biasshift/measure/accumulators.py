"""The running sums of every layer: one batch's calls side by side, and what a stack of errors adds
to the matrices.
"""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from biasshift.fisher.moments import WeightedSums
from biasshift.fisher.samples import ImplicitSums
from biasshift.fisher.unit_fisher import UnitFisher
from biasshift.measure import layer_types
from biasshift.measure.hooks import Call
from biasshift.measure.layer_types import WeightLayer
from biasshift.measure.options import Measured, Options, Units


class LayerBatch:
    """One layer in one batch: all its calls, their positions side by side."""

    def __init__(
        self, name: str, module: WeightLayer, calls: list[Call], examples: int, options: Options
    ):
        self.name, self.module, self.calls, self.examples = name, module, calls, examples
        self.expand = options.weight_sharing == "expand"
        self.draws = options.draws if options.labels == "sampled" else 1
        self.units = kept_units(name, self.module, options.units, calls[0].a.device)
        sizes = [call.shape.numel() // layer_types.unit_count(self.module) for call in calls]
        self.shares_weights = not self.expand and sum(sizes) != examples

    def positions(self, parts: list[Tensor], axis: int) -> Tensor:
        """Calls side by side on the axis of positions, which under ``expand`` holds the examples
        too.
        """
        if self.expand:
            parts = [part.flatten(axis, axis + 1).unsqueeze(axis) for part in parts]
        return parts[0] if len(parts) == 1 else torch.cat(parts, axis + 1)

    def patches(self, reference: Tensor | None = None) -> Tensor:
        """(batch, positions, groups, inputs), about a reference of every channel; a batch of one
        under ``expand``.
        """
        work = layer_types.dtype_of_sums(self.calls[0].a)
        return self.positions(
            [
                layer_types.patches(self.module, call.a.to(work), call.shape, reference)
                for call in self.calls
            ],
            axis=0,
        )

    def summed(self) -> tuple[Tensor, int]:
        """The sum of all patches, (groups, inputs) in float64, and their number."""
        parts = [layer_types.summed_patch(self.module, call.a, call.shape) for call in self.calls]
        return torch.stack(parts).sum(0), sum(
            call.shape.numel() for call in self.calls
        ) // layer_types.unit_count(self.module)


class Spread:
    """The variance of ``Σ δ²`` that comes from drawing labels, from the spread between the draws of
    each row. A row is an example.

    Under ``expand`` it is a whole batch, since positions of one example depend on each other.
    """

    def __init__(self) -> None:
        self.variance: Tensor | None = None  # (units,)
        self._sum: Tensor | None = (
            None  # of δ² over draws, (rows, units); a draw's δ² carries the factor 1 / draws
        )
        self._squares: Tensor | None = None

    def add(self, delta2: Tensor) -> None:
        """Some draws, (draws, rows, units)."""
        total, squares = delta2.sum(0), delta2.square().sum(0)
        self._sum, self._squares = (
            (total, squares)
            if self._sum is None or self._squares is None
            else (self._sum + total, self._squares + squares)
        )

    def finish_batch(self, draws: int) -> None:
        if self._sum is not None and self._squares is not None:
            of_mean = (draws * self._squares - self._sum.square()).clamp(min=0).sum(0) / (draws - 1)
            self.variance = of_mean if self.variance is None else self.variance + of_mean
        self._sum = self._squares = None


class LayerState:
    """The running sums of one layer, one per group of units that see the same inputs."""

    def __init__(self, layer: LayerBatch):
        self.name, self.module, self.dtype = layer.name, layer.module, layer.calls[0].a.dtype
        self.groups = [
            (g, units)
            for g, units in enumerate(layer_types.grouped(layer.module, layer.units))
            if len(units)
        ]
        self.sums: list[WeightedSums] = []
        self.g: Tensor | None = None
        self.g0: Tensor | None = None
        self.spread = Spread()

    def start_batch(self, layer: LayerBatch) -> None:
        summed, positions = layer.summed()
        if not self.sums:
            self.reference = layer_types.channel_means(self.module, summed / positions).to(
                layer_types.dtype_of_sums(layer.calls[0].a)
            )
            references = layer_types.of_channels(self.module, self.reference)
            self.sums = [WeightedSums.empty(len(units), references[g]) for g, units in self.groups]
        for i, (g, _) in enumerate(self.groups):
            total = summed[g] - positions * self.sums[i].reference
            self.sums[i] = self.sums[i].with_inputs(layer.examples, positions, total)
        self.delta2: Tensor | None = None  # Σ over passes, (samples, units)

    def add_errors(self, layer: LayerBatch, delta: Tensor) -> None:
        """Errors (passes, batch, positions, units). Without sharing they are squared and summed
        first, and used once.
        """
        self.note_draws(layer, delta)
        if layer.shares_weights:
            a = layer.patches(self.reference)
            left = delta.to(a.dtype).permute(
                1, 0, 3, 2
            )  # (batch, passes, units, positions): as it lies in memory, behind a convolution
            summed = left.sum(3)
            squares = summed.square().sum(1)
            for i, (g, units) in enumerate(self.groups):
                some = slice(None) if len(units) == left.shape[2] else units
                vectors = (left[:, :, some].flatten(1, 2) @ a[:, :, g]).unflatten(
                    1, (left.shape[1], -1)
                )
                by_unit = vectors.permute(2, 0, 1, 3).flatten(1, 2)
                self.sums[i] = self.sums[i].with_vectors(by_unit, summed[:, :, some].flatten(0, 1))
        else:
            squares = delta.to(layer_types.dtype_of_sums(delta)).square().sum(0).flatten(0, 1)
        self.delta2 = squares if self.delta2 is None else self.delta2 + squares

    def note_draws(self, layer: LayerBatch, delta: Tensor) -> None:
        if layer.draws > 1:
            own = delta[..., layer.units].double()
            self.spread.add(own.sum(2).square() if layer.shares_weights else own.square().sum(2))

    def finish_batch(self, layer: LayerBatch) -> None:
        assert self.delta2 is not None
        self.spread.finish_batch(layer.draws)
        a = None if layer.shares_weights else layer.patches(self.reference)
        for i, (g, units) in enumerate(self.groups):
            weights = self.delta2[:, units]
            if a is None:
                self.sums[i] = self.sums[i].with_weight_squares(weights)
            else:
                self.sums[i] = self.sums[i].with_weights(a[:, :, g].flatten(0, 1), weights)
        self.delta2 = None

    def add_gradient(self, layer: LayerBatch, delta: Tensor) -> None:
        """Adds ``−Σ δ ã`` of the data's labels, in float64."""
        a, delta = layer.patches().double(), delta.double()
        g = torch.cat(
            [torch.einsum("ntu,nti->ui", delta[..., units], a[:, :, g]) for g, units in self.groups]
        )
        g0 = torch.cat([delta[..., units].sum((0, 1)) for _, units in self.groups])
        self.g, self.g0 = (
            (-g, -g0) if self.g is None or self.g0 is None else (self.g - g, self.g0 - g0)
        )

    def total(self) -> WeightedSums | ImplicitSums:
        """The sums of all units."""
        return (
            self.sums[0]
            if layer_types.group_count(self.module) == 1
            else WeightedSums.stacked(self.sums)
        )

    def result(self, options: Options) -> Measured:
        sums, bias = self.total(), self.module.bias is not None
        fisher = UnitFisher(
            sums, options.damping, bias, self.dtype, self.name, options.labels, self.spread.variance,
            options.tolerance, options.max_iterations,
        )  # fmt: skip
        if self.g is None or self.g0 is None:
            return Measured(fisher)
        return Measured(fisher, self.g / sums.examples, self.g0 / sums.examples if bias else None)


def kept_units(name: str, module: WeightLayer, units: Units, device: torch.device) -> Tensor:
    count = layer_types.unit_count(module)
    chosen = units.get(name) if isinstance(units, Mapping) else units
    if chosen is None:
        return torch.arange(count, device=device)
    kept = list(chosen)
    if not kept or kept != sorted(set(kept)) or kept[0] < 0 or kept[-1] >= count:
        raise ValueError(
            f"units must be increasing indices in 0 … {count - 1} for layer '{name}', got "
            f"{kept[:8]}; give a dict for one list per layer."
        )
    return torch.tensor(kept, device=device)


def passes_at_once(batch: list[LayerBatch], dense: Collection[str], budget: int) -> int:
    """As many backward passes together as the budget holds: three times the errors, and the vectors
    of one dense layer.
    """
    errors_of_all = sum(
        call.shape.numel() * call.a.element_size() for layer in batch for call in layer.calls
    )
    vectors = [
        layer.examples
        * len(layer.units)
        * layer_types.input_count(layer.module)
        * layer.calls[0].a.element_size()
        for layer in batch
        if layer.shares_weights and layer.name in dense
    ]
    return max(1, budget // (3 * errors_of_all + 2 * max(vectors, default=0)))
