"""Model and probe → the unit Fisher matrices of every layer, in one traced pass per batch."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from biasshift.fisher.packed import block_bytes
from biasshift.fisher.sample_size import warn_of_few_samples
from biasshift.fisher.samples import MEMORY_BUDGET
from biasshift.fisher.solver import MAX_ITERATIONS
from biasshift.fisher.unit_fisher import UnitFisher
from biasshift.measure import layer_types, likelihoods
from biasshift.measure.accumulators import LayerBatch, LayerState, Measured, passes_at_once
from biasshift.measure.copies import Copies
from biasshift.measure.cost import Watch
from biasshift.measure.coverage import (
    are_named,
    refuse,
    refuse_coupled,
    refuse_unusable,
    selected_layers,
    unmeasurable,
    warn_of_left_out,
)
from biasshift.measure.hooks import edge_gradients, traced, underlying
from biasshift.measure.independence import Layouts, Reasons
from biasshift.measure.layer_types import Selection, WeightLayer
from biasshift.measure.likelihoods import Labels, Likelihood
from biasshift.measure.options import Mask, Options, Units
from biasshift.measure.outputs import OutputChoice
from biasshift.measure.probe import Batch, InputNames, batches, extent
from biasshift.measure.sample_store import (
    Collector,
    ImplicitState,
    MemoryBudget,
    ProbeReader,
    ProbeSource,
    opened,
)
from biasshift.measure.sandbox import undisturbed
from biasshift.progress import SILENT, Progress, Show, progress as shown


def unit_fisher(
    model: nn.Module,
    x: ProbeSource,
    y: Any = None,
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
    memory_budget: int = MEMORY_BUDGET,
    draws: int = 1,
    storage: str = "auto",
    tolerance: float | None = None,
    max_iterations: int = MAX_ITERATIONS,
    class_axis: int = -1,
    mask: Mask = None,
    inputs: InputNames = None,
    output: OutputChoice = None,
    uncovered: str = "skip",
    skip: Selection = None,
    progress: Show = None,
) -> dict[str, UnitFisher]:
    """Returns the unit Fisher matrices of every weight layer on probe data, by module name.

    ``F = E_p(δ̄² ã ãᵀ)`` for every unit, ``ã = (a, 1)``: how the model's own uncertainty weights
    the incoming activations. The model is measured in its present mode and left as found. Names are
    those of PyTorch's ``named_modules``.

    Args:
        x: a tensor of examples, a dict of the model's arguments, an iterable of batches x, (x, y)
            or dicts, or a function that returns one. A dict may hold the labels, as "labels".
        y: the examples' labels, for a tensor or a dict x; only ``labels="empirical"`` reads them.
            Positions with the categorical label −100 do not count, whatever ``labels`` is.
        labels: ``"expected"`` is exact over the model's labels, ``"sampled"`` draws one label per
            example from the model, ``"empirical"`` takes the data's labels and is another matrix.
        likelihood: of the labels given the outputs: ``"categorical"`` (logits, classes last),
            ``"gaussian"`` (unit variance) or ``"bernoulli"`` (logits).
        weight_sharing: for convolutions and sequences, ``"per_example"`` is the Fisher matrix of
            the shared weights, ``"expand"`` sums over positions as if they were independent (the
            K-FAC term).
        layers: names, or a predicate ``(name, module) → bool``.
        units: increasing indices of the units to keep, for all layers or per layer ``{name:
            indices}``.
        damping: λ of the inverse quantities.
        batch_size: examples per forward pass, for a probe that does not fit at once. Results do not
            depend on it.
        generator: draws the labels of ``"sampled"``; by default one with a fixed seed.
        max_passes: raise an error where ``"expected"`` takes more backward passes per batch.
        memory_budget: bytes that the backward passes of several classes at once may take, and those
            of a layer's blocks or samples.
        draws: labels drawn per example by ``"sampled"``, a backward pass each; from 2 on
            `UnitFisher.standard_error` is known.
        storage: ``"auto"`` is the fastest that fits: the samples of a layer while they are fewer
            numbers than its blocks, then the blocks, units × inputs² numbers. ``"dense"`` forms the
            blocks at once. ``"implicit"`` holds the samples, and what takes an inverse comes by
            iteration, batched over units; so it is by ``"auto"`` where the blocks of a layer would
            pass ``memory_budget``. Where its samples pass it too, the probe is read and the model
            run again for every iteration.
        tolerance: the relative residual of the iterations; 1e-8 in double precision and 1e-5 in
            single by default.
        max_iterations: of a solve; a unit that takes more has NaN, with a warning.
        class_axis: of categorical outputs. The default, the last axis, is refused where the
            classes are not there, or it cannot be told. A number from 1 on is taken at its word.
        mask: the positions of the outputs that count: a tensor (batch, …), or a function of a
            batch's inputs and labels that returns one. The mean stays that over all examples.
        inputs: how many parts of a batch ``(x1, x2, …, y)`` the model is called with, or the names
            of its arguments.
        output: which of several outputs is meant: a key, an index, or a function of what the model
            returns. By default its ``logits`` or ``out``, or the only tensor.
        uncovered: ``"skip"`` leaves out layers that cannot be measured, with one warning that names
            them, and ``"raise"`` makes them an error. Layers named in ``layers`` always are.
        skip: names of modules, or a predicate, to leave out with all inside of them.
        progress: whether to show on stderr, or in a notebook, how many backward passes are done and
            the seconds left. What they cost comes first: passes, samples and bytes. By default it
            shows in a terminal or a notebook after 3 seconds, and not in loops.

    Raises:
        ValueError: for a named layer that cannot be measured (the message has the reason), coupled
            examples (BatchNorm or dropout in training mode), an iterator that would have to be read
            again, or arguments that do not fit.

    Warns:
        UncoveredWarning: where layers are left out.
        FewSamplesWarning: where layers have too few effective samples for s, k and the coupling.

    >>> model = nn.Sequential(nn.Linear(3, 4), nn.ELU(), nn.Linear(4, 2)).requires_grad_(False)
    >>> fishers = unit_fisher(model, torch.eye(3))
    >>> {name: tuple(fisher.mean_q.shape) for name, fisher in fishers.items()}
    {'0': (4, 3), '2': (2, 4)}

    Source: section 3 of the ELU paper; label rules and weight sharing as in Kunstner et al. 2019
        and Eschenhagen et al. 2023.
    """
    options = Options(
        labels=labels,
        likelihood=likelihood,
        weight_sharing=weight_sharing,
        layers=layers,
        units=units,
        damping=damping,
        batch_size=batch_size,
        generator=generator,
        max_passes=max_passes,
        memory_budget=memory_budget,
        draws=draws,
        storage=storage,
        tolerance=tolerance,
        max_iterations=max_iterations,
        class_axis=class_axis,
        mask=mask,
        inputs=inputs,
        output=output,
        uncovered=uncovered,
        skip=skip,
    )
    with shown("unit_fisher", progress) as bar:
        return fishers_of(measure(model, x, y, options, progress=bar))


def measure(
    model: nn.Module,
    x: ProbeSource,
    y: Any,
    options: Options,
    gradient: bool = False,
    warn: bool = True,
    share: bool = False,
    progress: Progress = SILENT,
) -> dict[str, Measured]:
    """Measures every layer of a model on a probe, by module name.

    Args:
        x, y: the probe, as in `unit_fisher`.
        gradient: also measure the gradient of the mean negative log-likelihood at the data's
            labels, from the same traced pass.
        warn: whether to warn of layers that are left out, and where all outputs look like
            probabilities instead of logits, and of too few effective samples.
        share: whether the probe is one process's share of one, whose samples are not all.
        progress: what completed backward passes are reported to.

    Raises:
        ValueError: as `unit_fisher`, and for a gradient without the data's labels.
    """
    model = underlying(model)
    modules, left_out = selected_layers(model, options)
    refuse_coupled(model)
    refuse_unusable(model)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if options.labels == "sampled" and options.generator is None:
        # one for all batches, so that their labels differ
        options = replace(options, generator=torch.Generator(device).manual_seed(0))
    add_batch = partial(_add_batch, where={})
    reader = ProbeReader(add_batch, model, modules, x, y, options)
    budget = MemoryBudget.on(device, options.memory_budget)
    states = LayerStates(options, budget, one_shot=isinstance(x, Iterator))
    copies = Copies()
    watch = Watch(progress)
    with undisturbed(model, gradients=True):
        probe = opened(x)
        if progress:
            watch.batches, watch.examples = extent(probe, options.batch_size, options.inputs)
        for batch in batches(
            model, probe, y, options.batch_size, inputs=options.inputs, mask=options.mask
        ):
            if warn:
                copies.add(batch.x)
            add_batch(
                model, modules, batch, options, states, gradient, left_out=left_out, watch=watch
            )
    progress.pause()  # what warnings say is not written into the line
    if warn:
        warn_of_left_out(model, left_out)
        if states.probabilities:
            likelihoods.warn_of_probabilities(options.likelihood)
    _refuse_uncalled(modules, states, options.layers)
    for name, state in states.items():
        if isinstance(state, ImplicitState) and state.full:
            state.reread = reader.parts(name, state)
    measured = {name: states[name].result(options) for name in modules if name in states}
    if warn and not share:
        warn_of_few_samples(fishers_of(measured), copies.examples, copies.count, stacklevel=3)
    return measured


def fishers_of(measured: Mapping[str, Measured]) -> dict[str, UnitFisher]:
    """Returns the unit Fisher matrices of every layer that was measured."""
    return {name: layer.fisher for name, layer in measured.items()}


class LayerStates(dict[str, LayerState]):
    """The running sums of all layers, by name; a layer's storage is chosen at its first batch.

    Args:
        one_shot: whether the probe is an iterator, which cannot be read again.
    """

    def __init__(self, options: Options, budget: MemoryBudget, one_shot: bool):
        super().__init__()
        self.options, self.budget, self.one_shot = options, budget, one_shot
        self.probabilities: bool | None = None  # whether the outputs of all batches are

    def add_layers(self, batch: list[LayerBatch]) -> None:
        """Adds the layers that have no sums yet, small ones first.

        Under ``storage="auto"`` a layer whose blocks, units × inputs² numbers, fit into the budget
        forms them once its samples are more numbers than they. Otherwise it keeps samples, and is
        solved with by iteration.
        """
        sizes = {
            layer.name: block_bytes(len(layer.units), layer_types.input_count(layer.module))
            for layer in batch
        }
        storage = self.options.storage
        for layer in sorted(batch, key=lambda layer: sizes[layer.name]):
            if layer.name not in self:
                self[layer.name] = (
                    ImplicitState(layer, self.budget, self.one_shot)
                    if storage == "implicit"
                    or (storage == "auto" and not self.budget.take(sizes[layer.name]))
                    else LayerState(layer, storage == "auto", self.budget.per_layer)
                )


def _add_batch(
    model: nn.Module,
    modules: dict[str, WeightLayer],
    batch: Batch,
    options: Options,
    states: LayerStates | Mapping[str, Collector],
    gradient: bool = False,
    *,
    where: Layouts,
    left_out: Reasons | None = None,
    watch: Watch | None = None,
) -> None:
    """Adds one batch to the sums of all layers.

    Layers that the first batch shows to be unfit go from ``modules`` to ``left_out``.
    """
    x, examples = batch.x, len(batch.x)
    tape, returned = traced(model, modules, x)
    outputs = options.outputs(returned, examples)
    reasons = unmeasurable(model, tape, modules, x, outputs, options, where, first_batch=not states)
    named = are_named(options.layers) or options.uncovered == "raise"
    if states or named or left_out is None or not tape.calls.keys() - reasons.keys():
        refuse(modules, reasons)
    else:
        for name, why in reasons.items():
            left_out[name] = why
            del modules[name]
            tape.calls.pop(name, None)
    y = batch.y
    if batch.y_in_call and options.likelihood == "categorical":
        if gradient or options.labels == "empirical" or likelihoods.has_ignored(y):
            y = likelihoods.aligned_labels(outputs, y, getattr(returned, "loss", None))
    kept = likelihoods.counted(outputs, options.likelihood, y, batch.mask)
    if isinstance(states, LayerStates) and states.probabilities is not False:
        states.probabilities = likelihoods.are_probabilities(outputs, options.likelihood)
    rule = likelihoods.seeds(
        outputs, options.likelihood, options.labels, y, options.generator, options.draws, kept
    )
    if options.labels == "expected" and rule.count > options.max_passes:
        raise ValueError(
            f"Labels 'expected' take {rule.count} backward passes on outputs "
            f"{tuple(outputs.shape)}, more than max_passes={options.max_passes}. Use "
            'labels="sampled", or raise max_passes.'
        )
    layers = [
        LayerBatch(name, modules[name], calls, examples, options, where.get(name))
        for name, calls in tape.calls.items()
    ]
    if not layers:  # none is called
        return
    if isinstance(states, LayerStates):
        states.add_layers(layers)
    for layer in layers:
        states[layer.name].start_batch(layer)
    if gradient and isinstance(states, LayerStates):
        if y is None:
            raise ValueError("The gradient needs the data's labels: give y, or batches (x, y).")
        rule_of_data = likelihoods.seeds(
            outputs, options.likelihood, "empirical", y, None, mask=kept
        )
        for layer, delta in _errors(layers, outputs, rule_of_data.make(0, 1), keep=True):
            states[layer.name].add_gradient(layer, delta[0])
    dense = {name for name, state in states.items() if type(state) is LayerState}
    step = passes_at_once(layers, dense, outputs, options.memory_budget)
    watch = watch or Watch(SILENT)
    if isinstance(states, LayerStates):
        watch.begin(layers, states, options, rule.count, step)
    for i in range(0, rule.count, step):
        j = min(i + step, rule.count)
        seeds = rule.make(i, j)
        for k, (layer, delta) in enumerate(_errors(layers, outputs, seeds, j < rule.count), 1):
            states[layer.name].add_errors(layer, delta)
            watch.progress.reach((j - i) * k / len(layers))
        watch.progress.advance(j - i)
    for layer in layers:
        states[layer.name].finish_batch(layer)


def _errors(
    batch: list[LayerBatch], outputs: Tensor, seeds: Tensor, keep: bool
) -> Iterator[tuple[LayerBatch, Tensor]]:
    """The errors of every layer, (passes, batch, positions, units), from one stack of seeds."""
    edges = [call.edge for layer in batch for call in layer.calls]
    gradients = iter(edge_gradients(outputs, edges, seeds, keep))
    for layer in batch:
        parts = []
        for call, layout in zip(layer.calls, layer.layouts, strict=True):
            delta = next(gradients)
            delta = seeds.new_zeros(len(seeds), *call.shape) if delta is None else delta
            delta = layer_types.errors(layer.module, delta)
            parts.append(layout.arrange(delta, 1, layer.examples))
        yield layer, layer.side_by_side(parts, axis=1)


def _refuse_uncalled(
    modules: Mapping[str, nn.Module], states: Mapping[str, object], select: Selection
) -> None:
    uncalled = [name for name in modules if name not in states]
    if uncalled and (not states or (select is not None and not callable(select))):
        raise ValueError(
            f"The forward pass does not call {', '.join(map(repr, uncalled))}: nothing comes in. "
            "Leave out with skip= or layers= what is not called."
        )
