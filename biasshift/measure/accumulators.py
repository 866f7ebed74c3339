"""The running sums of every layer, and what one batch's calls and errors add to them."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from biasshift.fisher.held import HeldSums, are_few, are_few_vectors
from biasshift.fisher.moments import WeightedSums, rounding_share, sum_rounding
from biasshift.fisher.packed import block_bytes
from biasshift.fisher.ranges import with_range, with_square, with_squares
from biasshift.fisher.samples import ImplicitSums
from biasshift.fisher.unit_fisher import UnitFisher
from biasshift.measure import layer_types
from biasshift.measure.hooks import Call
from biasshift.measure.layer_types import WeightLayer
from biasshift.measure.layouts import Layout
from biasshift.measure.options import Options, Units


@dataclass(frozen=True)
class Measured:
    """The measurement of one layer: the unit Fisher matrices, and the gradient if asked for.

    ``g`` and ``g0`` are the gradient of the mean negative log-likelihood at the data's labels, in
    float64.
    """

    fisher: UnitFisher
    g: Tensor | None = None  # (units, inputs)
    g0: Tensor | None = None  # (units,); None without a bias


class LayerBatch:
    """One layer in one batch: all its calls, their positions side by side.

    ``shares_weights`` tells whether an example has several positions whose errors add up: a
    convolution or a layer on sequences, unless ``weight_sharing="expand"``.
    """

    def __init__(
        self,
        name: str,
        module: WeightLayer,
        calls: list[Call],
        examples: int,
        options: Options,
        layouts: list[Layout] | None = None,
    ):
        self.name, self.module, self.calls, self.examples = name, module, calls, examples
        self.expand = options.weight_sharing == "expand"
        self.layouts = layouts or [Layout.FIRST] * len(calls)
        self.draws = options.draws if options.labels == "sampled" else 1
        self.units = kept_units(name, module, options.units, calls[0].a.device)
        net_inputs = sum(call.shape.numel() for call in calls)
        self.rows = net_inputs // layer_types.unit_count(module)  # examples × positions
        self.shares_weights = not self.expand and self.rows != examples

    def side_by_side(self, parts: list[Tensor], axis: int) -> Tensor:
        """Joins the parts of all calls on the axis of positions, which is behind ``axis``.

        Several calls of one layer count as more positions of the same examples. Under ``"expand"``
        that axis holds the examples too, and the batch is one example.
        """
        if self.expand:
            parts = [part.flatten(axis, axis + 1).unsqueeze(axis) for part in parts]
        return parts[0] if len(parts) == 1 else torch.cat(parts, axis + 1)

    def patches(self, reference: Tensor | None = None) -> Tensor:
        """Returns the incoming activations, (batch, positions, groups, inputs).

        Under ``"expand"`` the batch is 1, and the positions of all examples follow each other.

        Args:
            reference: one number per channel, which is subtracted.
        """
        work = layer_types.dtype_of_sums(self.calls[0].a)
        parts = [
            layout.arrange(
                layer_types.patches(self.module, call.a.to(work), call.shape, reference),
                0,
                self.examples,
            )
            for call, layout in zip(self.calls, self.layouts, strict=True)
        ]
        return self.side_by_side(parts, axis=0)

    @property
    def itemsize(self) -> int:
        """The bytes of a number in its sums over one batch."""
        return layer_types.dtype_of_sums(self.calls[0].a).itemsize

    def summed_patches(self) -> Tensor:
        """Returns the sum of the incoming activations over all rows, (groups, inputs), float64."""
        parts = [layer_types.summed_patch(self.module, call.a, call.shape) for call in self.calls]
        return torch.stack(parts).sum(0)


class LabelVariance:
    """The variance of ``Σ δ²`` due to drawn labels, from the variance between the draws of a row.

    A row is an example. Under ``"expand"`` it is a whole batch, since positions of one example
    depend on each other.
    """

    def __init__(self) -> None:
        self.variance: Tensor | None = None  # (units,)
        # Sums over the draws so far, (rows, units): a draw's δ² carries the factor 1 / draws.
        self._sum: Tensor | None = None
        self._squares: Tensor | None = None

    def add(self, delta2: Tensor) -> None:
        """Adds δ² of some of the draws, (draws, rows, units)."""
        total, squares = delta2.sum(0), delta2.square().sum(0)
        if self._sum is None or self._squares is None:
            self._sum, self._squares = total, squares
        else:
            self._sum, self._squares = self._sum + total, self._squares + squares

    def finish_batch(self, draws: int) -> None:
        """Adds the batch's variance of the mean over draws, when all of them are in.

        It is the unbiased estimate, row by row, from the squares of the draws about their mean.
        """
        if self._sum is not None and self._squares is not None:
            of_mean = (draws * self._squares - self._sum.square()).clamp(min=0).sum(0) / (draws - 1)
            self.variance = of_mean if self.variance is None else self.variance + of_mean
        self._sum = self._squares = None


class LayerState:
    """The running sums of one layer, one per group of units that see the same inputs.

    A batch is `start_batch`, `add_errors` for every stack of seeds, and `finish_batch`. The blocks
    are formed as the errors come, so that no samples are kept.

    Args:
        hold: whether samples may be kept first, while they are fewer numbers than the blocks. That
            is done for layers of one group.
        memory_budget: bytes that the blocks may take.
    """

    def __init__(self, layer: LayerBatch, hold: bool = False, memory_budget: int = 0):
        self.hold, self.memory_budget = hold, memory_budget
        self.name, self.module, self.dtype = layer.name, layer.module, layer.calls[0].a.dtype
        grouped = enumerate(layer_types.grouped(layer.module, layer.units))
        self.groups = [(group, units) for group, units in grouped if len(units)]
        self.sums: list[WeightedSums | HeldSums] = []
        self.g: Tensor | None = None
        self.g0: Tensor | None = None
        self.label_variance = LabelVariance()
        self.weight_rounding = torch.zeros(
            len(layer.units), dtype=torch.float64, device=layer.units.device
        )

    def start_batch(self, layer: LayerBatch) -> None:
        """Adds the batch's incoming activations, in float64.

        Sums are about a reference, which keeps means that are large against the variance exact. It
        is the mean of the first batch, channel by channel.
        """
        summed, module = layer.summed_patches(), self.module
        if not self.sums:
            means = layer_types.channel_means(module, summed / layer.rows)
            self.reference = means.to(layer_types.dtype_of_sums(layer.calls[0].a))
            references = layer_types.repeat_channels(module, self.reference)
            holds = self.holds(layer)
            self.sums = [
                HeldSums.empty(len(units), references[g], self.memory_budget)
                if holds
                else WeightedSums.empty(len(units), references[g])
                for g, units in self.groups
            ]
        for i, (g, _) in enumerate(self.groups):
            total = summed[g] - layer.rows * self.sums[i].reference
            self.sums[i] = self.sums[i].with_inputs(layer.examples, layer.rows, total)
        self.delta2: Tensor | None = None  # Σ over passes, (samples, units)

    def holds(self, layer: LayerBatch) -> bool:
        """Tells whether samples are kept while they are fewer numbers than the blocks."""
        return self.hold and layer_types.group_count(self.module) == 1

    def add_errors(self, layer: LayerBatch, delta: Tensor) -> None:
        """Adds the errors of a stack of seeds, (passes, batch, positions, units).

        Without weight sharing the errors are squared and summed, and `finish_batch` uses the sum
        once. With it the gradient of every example, ``Σ δ a`` over its positions, is formed.
        """
        self.add_draws(layer, delta)
        self.add_rounding(layer, delta)
        if layer.shares_weights:
            a, delta = with_squares(layer.patches(self.reference), delta)
            # (batch, passes, units, positions): as it lies in memory, behind a convolution
            by_example = delta.to(a.dtype).permute(1, 0, 3, 2)
            summed = by_example.sum(3)
            squares = summed.square().sum(1)
            for i, (g, units) in enumerate(self.groups):
                own = slice(None) if len(units) == by_example.shape[2] else units
                products = by_example[:, :, own].flatten(1, 2) @ a[:, :, g]
                vectors = products.unflatten(1, (by_example.shape[1], -1))
                by_unit = vectors.permute(2, 0, 1, 3).flatten(1, 2)
                self.sums[i] = self.sums[i].with_vectors(by_unit, summed[:, :, own].flatten(0, 1))
        else:
            wide = with_square(delta.to(layer_types.dtype_of_sums(delta)))
            squares = wide.square().sum(0).flatten(0, 1)
        self.delta2 = squares if self.delta2 is None else self.delta2 + squares

    def add_draws(self, layer: LayerBatch, delta: Tensor) -> None:
        """Adds the errors of drawn labels to the variance, where several are drawn."""
        if layer.draws > 1:
            own = delta[..., layer.units].double()
            delta2 = own.sum(2).square() if layer.shares_weights else own.square().sum(2)
            self.label_variance.add(delta2)

    def add_rounding(self, layer: LayerBatch, delta: Tensor) -> None:
        """Adds what Σ δ² may be of rounding alone, where errors of several positions add up."""
        if layer.shares_weights:
            own = delta if len(layer.units) == delta.shape[-1] else delta[..., layer.units]
            rounding = sum_rounding(with_square(own), rounding_share(delta))
            self.weight_rounding = self.weight_rounding + rounding

    def finish_batch(self, layer: LayerBatch) -> None:
        """Adds what needs ``δ̄²``, when the errors of all seeds are in."""
        assert self.delta2 is not None
        self.label_variance.finish_batch(layer.draws)
        a = None if layer.shares_weights else layer.patches(self.reference)
        for i, (g, units) in enumerate(self.groups):
            weights = self.delta2[:, units]
            if a is None:
                self.sums[i] = self.sums[i].with_weight_squares(weights)
            else:
                own, weights = with_range(a[:, :, g].flatten(0, 1), weights)
                self.sums[i] = self.sums[i].with_weights(own, weights)
        self.delta2 = None

    def add_gradient(self, layer: LayerBatch, delta: Tensor) -> None:
        """Adds ``−Σ δ ã`` of the data's labels, in float64.

        The sign is that of the negative log-likelihood, since errors are derivatives of ``ln p``.

        Args:
            delta: the errors, (batch, positions, units).
        """
        g, g0 = self._summed_products(layer, delta)
        if self.g is None or self.g0 is None:
            self.g, self.g0 = -g, -g0
        else:
            self.g, self.g0 = self.g - g, self.g0 - g0

    def _summed_products(self, layer: LayerBatch, delta: Tensor) -> tuple[Tensor, Tensor]:
        """``Σ δ a`` and ``Σ δ``, in float64."""
        a, delta = layer.patches().double(), delta.double()
        products = [
            torch.einsum("ntu,nti->ui", delta[..., units], a[:, :, g]) for g, units in self.groups
        ]
        return torch.cat(products), torch.cat(
            [delta[..., units].sum((0, 1)) for _, units in self.groups]
        )

    def held_bytes(self, layer: LayerBatch, samples: int, batches: float, again: bool) -> int:
        """Predicts the bytes of the blocks or the samples that are held at the end.

        Args:
            layer: the first batch.
            samples: of all batches.
            batches: how many there are, of the size of the first.
            again: whether blocks are added to, which makes them float64.
        """
        units, inputs = len(layer.units), layer_types.input_count(layer.module)
        if self.holds(layer) and layer.shares_weights and are_few_vectors(samples, units, inputs):
            return layer.itemsize * samples * units * (inputs + 1)
        if self.holds(layer) and not layer.shares_weights and are_few(samples, units, inputs):
            return layer.itemsize * samples * (units + inputs)
        return block_bytes(units, inputs) * (8 if again else layer.itemsize) // 8

    def total(self) -> WeightedSums | ImplicitSums:
        """Returns the sums of all units."""
        ungrouped = layer_types.group_count(self.module) == 1
        if ungrouped:
            return self.sums[0]
        return WeightedSums.stacked([own for own in self.sums if isinstance(own, WeightedSums)])

    def result(self, options: Options) -> Measured:
        """Returns the measurement over all batches.

        The gradient is divided by the number of examples: that of the mean over them.
        """
        sums = replace(self.total(), weight_rounding=self.weight_rounding)
        bias = self.module.bias is not None
        fisher = UnitFisher(
            sums,
            damping=options.damping,
            bias=bias,
            dtype=self.dtype,
            name=self.name,
            labels=options.labels,
            label_noise=self.label_variance.variance,
            tolerance=options.tolerance,
            max_iterations=options.max_iterations,
        )
        if self.g is None or self.g0 is None:
            return Measured(fisher)
        return Measured(fisher, self.g / sums.examples, self.g0 / sums.examples if bias else None)


def kept_units(name: str, module: WeightLayer, units: Units, device: torch.device) -> Tensor:
    """Returns the indices of the units that are kept of one layer.

    Args:
        units: indices for all layers, or per layer ``{name: indices}``; None for all units.

    Raises:
        ValueError: for indices that do not increase or that the layer does not have.
    """
    count = layer_types.unit_count(module)
    chosen = units.get(name) if isinstance(units, Mapping) else units
    if chosen is None:
        return torch.arange(count, device=device)
    kept = list(chosen)
    if not kept or kept != sorted(set(kept)) or kept[0] < 0 or kept[-1] >= count:
        raise ValueError(
            f"'units' must be increasing indices in 0 … {count - 1} for layer '{name}', got "
            f"{kept[:8]}. A dict gives one list per layer."
        )
    return torch.tensor(kept, device=device)


def passes_at_once(
    batch: list[LayerBatch], dense: Collection[str], outputs: Tensor, budget: int
) -> int:
    """Returns how many backward passes the budget holds together, and 1 at least.

    A pass takes three times the errors of all layers and of the outputs, and the vectors of one
    dense layer.

    Args:
        dense: names of the layers whose blocks are formed.
        outputs: of the model, which many classes make larger than all layers.
        budget: bytes.
    """
    error_bytes = outputs.nbytes + sum(
        call.shape.numel() * call.a.element_size() for layer in batch for call in layer.calls
    )
    vector_bytes = [
        layer.examples
        * len(layer.units)
        * layer_types.input_count(layer.module)
        * layer.calls[0].a.element_size()
        for layer in batch
        if layer.shares_weights and layer.name in dense
    ]
    return max(1, budget // (3 * error_bytes + 2 * max(vector_bytes, default=0)))
