"""Model and probe → the unit Fisher matrices of every layer, exact over the labels, in one traced pass per batch."""

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from biasshift import labels as label_rules
from biasshift import layers as kinds
from biasshift.accumulating import LayerBatch, LayerState, Measured, Options, Units, folded_message, passes_at_once
from biasshift.fisher import UnitFisher
from biasshift.labels import Labels, Likelihood
from biasshift.layers import WeightLayer
from biasshift.probing import Probe, Selection, batches, refuse_coupled, underlying, undisturbed, weight_layers
from biasshift.tracing import Tape, errors, traced, watching


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
    states: dict[str, LayerState] = {}
    if options.labels == "sampled" and options.generator is None:  # one for all batches, so that their labels differ
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        options = replace(options, generator=torch.Generator(device).manual_seed(0))
    with undisturbed(model, gradients=True):
        for a, b in batches(model, x, y, options.batch_size):
            _add_batch(model, modules, a, b, options, gradient, states)
    _refuse_uncalled(modules, states, options.layers)
    return {name: states[name].result(options) for name in modules if name in states}


def _add_batch(
    model: nn.Module,
    modules: Mapping[str, WeightLayer],
    x: Tensor,
    y: Tensor | None,
    options: Options,
    gradient: bool,
    states: dict[str, "LayerState"],
) -> None:
    tape, returned = traced(model, modules, x)
    outputs = _check_outputs(returned, len(x))
    if options.likelihood == "categorical" and outputs.dim() > 2:
        _refuse_maps(tape, modules, outputs)
    rule = label_rules.seeds(outputs, options.likelihood, options.labels, y, options.generator)
    if rule.count > options.max_passes:
        raise ValueError(
            f'labels="expected" takes {rule.count} backward passes on outputs {tuple(outputs.shape)}, more than max_passes='
            f'{options.max_passes}. Use labels="sampled", or raise max_passes.'
        )
    first_batch = not states
    batch = [LayerBatch(name, modules[name], calls, len(x), options) for name, calls in tape.calls.items()]
    if first_batch and any(layer.shares_weights for layer in batch):
        _prove_example_axis(model, modules, x, options)
    for layer in batch:
        states.setdefault(layer.name, LayerState(layer)).start_batch(layer)
    if gradient:
        if y is None:
            raise ValueError("The gradient needs the data's labels: give y, or batches (x, y).")
        seeds = label_rules.error(outputs.detach(), options.likelihood, y)[None]
        for layer, delta in _backward(batch, outputs, seeds, keep=True):
            states[layer.name].add_gradient(layer, delta[0])
    step = passes_at_once(batch, options.memory_budget)
    for i in range(0, rule.count, step):
        j = min(i + step, rule.count)
        for layer, delta in _backward(batch, outputs, rule.make(i, j), keep=j < rule.count):
            states[layer.name].add_errors(layer, delta)
    for layer in batch:
        states[layer.name].finish_batch(layer)


def _backward(batch: list["LayerBatch"], outputs: Tensor, seeds: Tensor, keep: bool) -> Iterator[tuple["LayerBatch", Tensor]]:
    """The errors of every layer, (passes, batch, positions, units), from one stack of seeds."""
    found = iter(errors(outputs, [call.edge for layer in batch for call in layer.calls], seeds, keep))
    for layer in batch:
        deltas = [(call, next(found)) for call in layer.calls]
        zero = [d if d is not None else seeds.new_zeros(len(seeds), *call.shape) for call, d in deltas]
        yield layer, layer.positions([kinds.errors(layer.module, d) for d in zero], axis=1)


# -- checks --------------------------------------------------------------------------------------------------------------


class NonFiniteOutputs(ValueError):
    """The model's outputs on the probe are NaN or infinite: a diverged network has no errors to measure."""


def _check_outputs(outputs: object, examples: int) -> Tensor:
    if not isinstance(outputs, Tensor) or not outputs.is_floating_point():
        raise ValueError(f"The model must return one floating tensor of outputs, got {type(outputs).__name__}: wrap it to return logits.")
    if outputs.dim() < 2 or len(outputs) != examples:
        raise ValueError(f"The model's outputs must be (batch, …, classes) for {examples} examples, got {tuple(outputs.shape)}.")
    if not outputs.isfinite().all():
        raise NonFiniteOutputs("The model's outputs hold NaN or infinity on the probe: its errors are undefined.")
    return outputs


def _refuse_maps(tape: Tape, modules: Mapping[str, WeightLayer], outputs: Tensor) -> None:
    """The head of a segmentation network has its classes on axis 1, and would silently be taken for something else."""
    for name, calls in tape.calls.items():
        if not isinstance(modules[name], nn.Linear) and calls[-1].shape == outputs.shape:
            raise ValueError(
                f"The outputs {tuple(outputs.shape)} look like the maps of convolution '{name}', with the classes on axis 1; here they "
                "must come last. Wrap the model so that it returns outputs.movedim(1, -1)."
            )


def _prove_example_axis(model: nn.Module, modules: Mapping[str, nn.Module], x: Tensor, options: Options) -> None:
    """One example must make one row at every layer that shares weights: an axis that grows with the examples is theirs."""
    if options.weight_sharing == "expand" or len(x) == 1:
        return
    rows: dict[str, int] = {}
    with torch.no_grad(), watching(modules, lambda name, module, a, output: rows.__setitem__(name, len(a))):
        model(x[:1])
    for name, found in rows.items():
        if found != 1:
            raise ValueError(folded_message(name, found, 1))


def _refuse_uncalled(modules: Mapping[str, nn.Module], states: Mapping[str, object], select: Selection) -> None:
    uncalled = [name for name in modules if name not in states]
    if uncalled and (not states or (select is not None and not callable(select))):
        raise ValueError(
            f"Layer {', '.join(map(repr, uncalled))} was not called as a module in the forward pass (its weight may be used by a function)."
        )
