"""The running sums of every layer: one batch's calls side by side, and what a stack of errors adds to the matrices."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from biasshift import labels as label_rules
from biasshift import layers as kinds
from biasshift.fisher import UnitFisher
from biasshift.labels import Labels, Likelihood
from biasshift.layers import WeightLayer
from biasshift.moments import WeightedSums
from biasshift.probing import Selection
from biasshift.tracing import Call

Units = Sequence[int] | Mapping[str, Sequence[int]] | None
SHARING = ("per_example", "expand")


@dataclass(frozen=True)
class Options:
    """How δ̄² and the matrices are formed; one object for `unit_fisher`, `gradient_gap` and `instrument`."""

    labels: Labels = "expected"
    likelihood: Likelihood = "categorical"
    weight_sharing: str = "per_example"
    layers: Selection = None
    units: Units = None
    damping: float = 1e-4
    batch_size: int | None = None
    generator: torch.Generator | None = None
    max_passes: int = 4096
    memory_budget: int = 2**30

    def __post_init__(self) -> None:
        label_rules.check(self.likelihood, self.labels)
        if self.weight_sharing not in SHARING:
            raise ValueError(f"weight_sharing must be one of {', '.join(map(repr, SHARING))}, got {self.weight_sharing!r}.")


@dataclass(frozen=True)
class Measured:
    """One layer: its unit Fisher matrices, and the gradient of the mean negative log-likelihood where it was asked for."""

    fisher: UnitFisher
    g: Tensor | None = None  # (units, inputs)
    g0: Tensor | None = None  # (units,); None without a bias


class LayerBatch:
    """One layer in one batch: all its calls, their positions side by side."""

    def __init__(self, name: str, module: WeightLayer, calls: list[Call], examples: int, options: Options):
        self.name, self.module, self.calls, self.examples = name, module, calls, examples
        self.expand = options.weight_sharing == "expand"
        self.units = kept_units(name, self.module, options.units, calls[0].a.device)
        for call in calls:
            if not kinds.is_batched(self.module, call.a):
                raise ValueError(f"Layer '{name}' was called without an axis of examples, on {tuple(call.a.shape)}.")
            if not self.expand and len(call.a) != examples:
                raise ValueError(folded_message(name, len(call.a), examples))
        sizes = [call.shape.numel() // kinds.unit_count(self.module) for call in calls]
        self.shares_weights = not self.expand and sum(sizes) != examples

    def positions(self, parts: list[Tensor], axis: int) -> Tensor:
        """Calls side by side on the axis of positions, which under ``expand`` holds the examples too."""
        if self.expand:
            parts = [part.flatten(axis, axis + 1).unsqueeze(axis) for part in parts]
        return parts[0] if len(parts) == 1 else torch.cat(parts, axis + 1)

    def patches(self) -> Tensor:
        """(batch, positions, groups, inputs); a batch of one under ``expand``."""
        a = self.positions([kinds.patches(self.module, call.a) for call in self.calls], axis=0)
        return a.to(kinds.dtype_of_sums(a))


class LayerState:
    """The running sums of one layer, one per group of units that see the same inputs."""

    def __init__(self, layer: LayerBatch):
        self.name, self.module, self.dtype = layer.name, layer.module, layer.calls[0].a.dtype
        self.groups = [(g, units) for g, units in enumerate(kinds.grouped(layer.module, layer.units)) if len(units)]
        self.sums: list[WeightedSums] = []
        self.g: Tensor | None = None
        self.g0: Tensor | None = None

    def start_batch(self, layer: LayerBatch) -> None:
        a = layer.patches()
        if not self.sums:
            means = a.mean((0, 1))
            self.sums = [WeightedSums.empty(len(units), means[g]) for g, units in self.groups]
        for i, shifted, _ in self._shifted(a):
            self.sums[i] = self.sums[i].with_inputs(shifted.flatten(0, 1), layer.examples)
        self.delta2: Tensor | None = None  # Σ over passes, (samples, units)
        self.kept = None if layer.shares_weights else a

    def add_errors(self, layer: LayerBatch, delta: Tensor) -> None:
        """Errors (passes, batch, positions, units). Without sharing they are squared and summed first, and used once."""
        if layer.shares_weights:
            a = layer.patches()
            delta = delta.to(a.dtype)
            squares = delta.sum(2).square().sum(0)
            for i, shifted, units in self._shifted(a):
                own = delta[..., units]
                vectors = torch.einsum("pntu,nti->pnui", own, shifted).flatten(0, 1)
                self.sums[i] = self.sums[i].with_vectors(vectors, own.sum(2).flatten(0, 1))
        else:
            squares = delta.to(kinds.dtype_of_sums(delta)).square().sum(0).flatten(0, 1)
        self.delta2 = squares if self.delta2 is None else self.delta2 + squares

    def finish_batch(self, layer: LayerBatch) -> None:
        assert self.delta2 is not None
        if self.kept is None:
            for i, (_, units) in enumerate(self.groups):
                self.sums[i] = self.sums[i].with_weight_squares(self.delta2[:, units])
        else:
            for i, shifted, units in self._shifted(self.kept):
                self.sums[i] = self.sums[i].with_weights(shifted.flatten(0, 1), self.delta2[:, units])
        self.kept = self.delta2 = None

    def add_gradient(self, layer: LayerBatch, delta: Tensor) -> None:
        """Adds ``−Σ δ ã`` of the data's labels, in float64."""
        a, delta = layer.patches().double(), delta.double()
        g = torch.cat([torch.einsum("ntu,nti->ui", delta[..., units], a[:, :, g]) for g, units in self.groups])
        g0 = torch.cat([delta[..., units].sum((0, 1)) for _, units in self.groups])
        self.g, self.g0 = (-g, -g0) if self.g is None or self.g0 is None else (self.g - g, self.g0 - g0)

    def _shifted(self, a: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        for i, (g, units) in enumerate(self.groups):
            yield i, a[:, :, g] - self.sums[i].reference.to(a.dtype), units

    def result(self, options: Options) -> Measured:
        single = kinds.group_count(self.module) == 1
        sums = self.sums[0] if single else WeightedSums.stacked(self.sums)
        bias = self.module.bias is not None
        fisher = UnitFisher(sums, options.damping, bias, self.dtype, self.name, options.labels)
        if self.g is None or self.g0 is None:
            return Measured(fisher)
        return Measured(fisher, self.g / sums.examples, self.g0 / sums.examples if bias else None)


def kept_units(name: str, module: WeightLayer, units: Units, device: torch.device) -> Tensor:
    count = kinds.unit_count(module)
    chosen = units.get(name) if isinstance(units, Mapping) else units
    if chosen is None:
        return torch.arange(count, device=device)
    kept = list(chosen)
    if not kept or kept != sorted(set(kept)) or kept[0] < 0 or kept[-1] >= count:
        raise ValueError(
            f"units must be increasing indices in 0 … {count - 1} for layer '{name}', got {kept[:8]}; give a dict for one list per layer."
        )
    return torch.tensor(kept, device=device)


def folded_message(name: str, rows: int, examples: int) -> str:
    return (
        f"Layer '{name}' sees {rows} rows for {examples} example{'s' if examples > 1 else ''}: its first axis is not the axis of examples "
        '(window attention folds positions into it). Use weight_sharing="expand", or leave the layer out with layers=.'
    )


def passes_at_once(batch: list[LayerBatch], budget: int) -> int:
    """As many backward passes together as the budget holds: three times the errors, and the vectors of one layer."""
    errors_of_all = sum(call.shape.numel() * call.a.element_size() for layer in batch for call in layer.calls)
    vectors = [
        layer.examples * len(layer.units) * kinds.input_count(layer.module) * layer.calls[0].a.element_size()
        for layer in batch
        if layer.shares_weights
    ]
    return max(1, budget // (3 * errors_of_all + 2 * max(vectors, default=0)))
