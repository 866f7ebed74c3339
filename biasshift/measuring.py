"""Model and probe → the unit Fisher matrices of every layer, exact over the labels, in one traced pass per batch."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from biasshift import labels as label_rules
from biasshift import layers as kinds
from biasshift.fisher import UnitFisher
from biasshift.labels import Labels, Likelihood
from biasshift.moments import WeightedSums
from biasshift.probing import Probe, Selection, batches, refuse_coupled, underlying, undisturbed, weight_layers
from biasshift.tracing import Call, Tape, errors, traced, watching

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


def unit_fisher(
    model: nn.Module,
    x: Probe,
    y: Tensor | None = None,
    *,
    labels: Labels = "expected",
    likelihood: Likelihood = "categorical",
    weight_sharing: str = "per_example",
    layers: Selection = None,
    units: Units = None,
    damping: float = 1e-4,
    batch_size: int | None = None,
    generator: torch.Generator | None = None,
    max_passes: int = 4096,
    memory_budget: int = 2**30,
) -> dict[str, UnitFisher]:
    """The unit Fisher matrices of every weight layer of a model on probe data, by PyTorch's module names.

    ``F = E_p(δ̄² ã ãᵀ)`` for every unit, ``ã = (a, 1)``: how the model's own uncertainty weights the incoming activations.
    The model is measured in its present mode and left as found.

    Args:
        x: a tensor of examples, or an iterable of batches x or (x, y).
        y: the examples' labels, for a tensor x; only ``labels="empirical"`` reads them.
        labels: ``"expected"`` is exact over the model's labels, ``"sampled"`` draws one label per example from the model,
            ``"empirical"`` takes the data's labels and is another matrix.
        likelihood: of the labels given the outputs: ``"categorical"`` (logits, classes last), ``"gaussian"`` (unit variance)
            or ``"bernoulli"`` (logits).
        weight_sharing: for convolutions and sequences, ``"per_example"`` is the Fisher matrix of the shared weights,
            ``"expand"`` sums over positions as if they were independent (the K-FAC term).
        layers: names, or a predicate ``(name, module) → bool``.
        units: increasing indices of the units to keep, for all layers or per layer ``{name: indices}``.
        damping: λ of the inverse quantities.
        batch_size: examples per forward pass, for a probe that does not fit at once. Results do not depend on it.
        generator: draws the labels of ``"sampled"``; by default one with a fixed seed.
        max_passes: refuse ``"expected"`` beyond this number of backward passes per batch.
        memory_budget: bytes that the backward passes of several classes at once may take.

    Raises:
        ValueError: for a layer that cannot be measured (the sentence names it and says why), coupled examples (BatchNorm or
            dropout in training mode), or arguments that do not fit.

    >>> model = nn.Sequential(nn.Linear(3, 4), nn.ELU(), nn.Linear(4, 2)).requires_grad_(False)
    >>> fishers = unit_fisher(model, torch.eye(3))
    >>> {name: tuple(fisher.mean_q.shape) for name, fisher in fishers.items()}
    {'0': (4, 3), '2': (2, 4)}

    Source: section 3 of the ELU paper; label rules and weight sharing as in Kunstner et al. 2019 and Eschenhagen et al. 2023.
    """
    options = Options(
        labels, likelihood, weight_sharing, layers, units, damping, batch_size, generator, max_passes, memory_budget
    )  # fmt: skip
    return {name: measured.fisher for name, measured in measure(model, x, y, options).items()}


def measure(model: nn.Module, x: Probe, y: Tensor | None, options: Options, gradient: bool = False) -> dict[str, Measured]:
    """`unit_fisher`, with the gradient of the mean negative log-likelihood at the data's labels from the same traced pass."""
    model = underlying(model)
    modules = weight_layers(model, options.layers)
    refuse_coupled(model)
    states: dict[str, _LayerState] = {}
    with undisturbed(model, gradients=True):
        for a, b in batches(model, x, y, options.batch_size):
            _add_batch(model, modules, a, b, options, gradient, states)
    _refuse_uncalled(modules, states, options.layers)
    return {name: states[name].result(options) for name in modules if name in states}


def _add_batch(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    x: Tensor,
    y: Tensor | None,
    options: Options,
    gradient: bool,
    states: dict[str, "_LayerState"],
) -> None:
    tape, outputs = traced(model, modules, x)
    _check_outputs(outputs, len(x))
    rule = label_rules.seeds(outputs, options.likelihood, options.labels, y, options.generator)
    if rule.count > options.max_passes:
        raise ValueError(
            f'labels="expected" takes {rule.count} backward passes on outputs {tuple(outputs.shape)}, more than max_passes='
            f'{options.max_passes}. Use labels="sampled", or raise max_passes.'
        )
    first_batch = not states
    batch = [_LayerBatch(name, calls, len(x), options) for name, calls in tape.calls.items()]
    if first_batch and any(layer.shares_weights for layer in batch):
        _prove_example_axis(model, modules, x, options)
    for layer in batch:
        states.setdefault(layer.name, _LayerState(layer)).start_batch(layer)
    if gradient:
        if y is None:
            raise ValueError("The gradient needs the data's labels: give y, or batches (x, y).")
        seeds = label_rules.error(outputs.detach(), options.likelihood, y)[None]
        for layer, delta in _backward(batch, outputs, seeds, keep=True):
            states[layer.name].add_gradient(layer, delta[0])
    step = _passes_at_once(batch, options.memory_budget)
    for i in range(0, rule.count, step):
        j = min(i + step, rule.count)
        for layer, delta in _backward(batch, outputs, rule.make(i, j), keep=j < rule.count):
            states[layer.name].add_errors(layer, delta)
    for layer in batch:
        states[layer.name].finish_batch(layer)


def _backward(batch: list["_LayerBatch"], outputs: Tensor, seeds: Tensor, keep: bool) -> Iterator[tuple["_LayerBatch", Tensor]]:
    """The errors of every layer, (passes, batch, positions, units), from one stack of seeds."""
    found = iter(errors(outputs, [call.edge for layer in batch for call in layer.calls], seeds, keep))
    for layer in batch:
        deltas = [(call, next(found)) for call in layer.calls]
        zero = [d if d is not None else seeds.new_zeros(len(seeds), *call.shape) for call, d in deltas]
        yield layer, layer.positions([kinds.errors(layer.module, d) for d in zero], axis=1)


class _LayerBatch:
    """One layer in one batch: all its calls, their positions side by side."""

    def __init__(self, name: str, calls: list[Call], examples: int, options: Options):
        self.name, self.calls, self.examples, self.module = name, calls, examples, calls[0].module
        self.expand = options.weight_sharing == "expand"
        self.units = kept_units(name, self.module, options.units, calls[0].a.device)
        for call in calls:
            if not kinds.is_batched(self.module, call.a):
                raise ValueError(f"Layer '{name}' was called without an axis of examples, on {tuple(call.a.shape)}.")
            if not self.expand and len(call.a) != examples:
                raise ValueError(_folded(name, len(call.a), examples))
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


class _LayerState:
    """The running sums of one layer, one per group of units that see the same inputs."""

    def __init__(self, layer: _LayerBatch):
        self.name, self.module, self.dtype = layer.name, layer.module, layer.calls[0].a.dtype
        self.groups = [(g, units) for g, units in enumerate(kinds.grouped(layer.module, layer.units)) if len(units)]
        self.sums: list[WeightedSums] = []
        self.g: Tensor | None = None
        self.g0: Tensor | None = None

    def start_batch(self, layer: _LayerBatch) -> None:
        a = layer.patches()
        if not self.sums:
            means = a.mean((0, 1))
            self.sums = [WeightedSums.empty(len(units), means[g]) for g, units in self.groups]
        for i, shifted, _ in self._shifted(a):
            self.sums[i] = self.sums[i].with_inputs(shifted.flatten(0, 1), layer.examples)
        self.delta2: Tensor | None = None  # Σ over passes, (samples, units)
        self.kept = None if layer.shares_weights else a

    def add_errors(self, layer: _LayerBatch, delta: Tensor) -> None:
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

    def finish_batch(self, layer: _LayerBatch) -> None:
        assert self.delta2 is not None
        if self.kept is None:
            for i, (_, units) in enumerate(self.groups):
                self.sums[i] = self.sums[i].with_weight_squares(self.delta2[:, units])
        else:
            for i, shifted, units in self._shifted(self.kept):
                self.sums[i] = self.sums[i].with_weights(shifted.flatten(0, 1), self.delta2[:, units])
        self.kept = self.delta2 = None

    def add_gradient(self, layer: _LayerBatch, delta: Tensor) -> None:
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


# -- checks --------------------------------------------------------------------------------------------------------------


def _check_outputs(outputs: object, examples: int) -> None:
    if not isinstance(outputs, Tensor) or not outputs.is_floating_point():
        raise ValueError(f"The model must return one floating tensor of outputs, got {type(outputs).__name__}: wrap it to return logits.")
    if outputs.dim() < 2 or len(outputs) != examples:
        raise ValueError(f"The model's outputs must be (batch, …, classes) for {examples} examples, got {tuple(outputs.shape)}.")
    if not outputs.isfinite().all():
        raise ValueError("The model's outputs hold NaN or infinity on the probe: its errors are undefined.")


def _prove_example_axis(model: nn.Module, modules: Mapping[str, nn.Module], x: Tensor, options: Options) -> None:
    """One example must make one row at every layer that shares weights: an axis that grows with the examples is theirs."""
    if options.weight_sharing == "expand" or len(x) == 1:
        return
    rows: dict[str, int] = {}
    with torch.no_grad(), watching(modules, lambda name, module, a, output: rows.__setitem__(name, len(a))):
        model(x[:1])
    for name, found in rows.items():
        if found != 1:
            raise ValueError(_folded(name, found, 1))


def _folded(name: str, rows: int, examples: int) -> str:
    return (
        f"Layer '{name}' sees {rows} rows for {examples} example{'s' if examples > 1 else ''}: its first axis is not the axis of examples "
        '(window attention folds positions into it). Use weight_sharing="expand", or leave the layer out with layers=.'
    )


def _refuse_uncalled(modules: Mapping[str, nn.Module], states: Mapping[str, object], select: Selection) -> None:
    uncalled = [name for name in modules if name not in states]
    if uncalled and (not states or (select is not None and not callable(select))):
        raise ValueError(
            f"Layer {', '.join(map(repr, uncalled))} was not called as a module in the forward pass (its weight may be used by a function)."
        )


def kept_units(name: str, module: nn.Module, units: Units, device: torch.device) -> Tensor:
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


def _passes_at_once(batch: list[_LayerBatch], budget: int) -> int:
    """As many backward passes together as the budget holds: three times the errors, and the vectors of one layer."""
    errors_of_all = sum(call.shape.numel() * call.a.element_size() for layer in batch for call in layer.calls)
    vectors = [
        layer.examples * len(layer.units) * kinds.input_count(layer.module) * layer.calls[0].a.element_size()
        for layer in batch
        if layer.shares_weights
    ]
    return max(1, budget // (3 * errors_of_all + 2 * max(vectors, default=0)))


__all__ = ["Measured", "Options", "Tape", "Units", "measure", "unit_fisher"]
