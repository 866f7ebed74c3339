"""Layers whose samples are kept in place of their blocks, within a budget of memory.

`Collector` makes the parts that one batch leaves behind. `ImplicitState` keeps them as long as the
`MemoryBudget` allows. Beyond that `ProbeReader` reads the probe and runs the model again whenever
the parts are needed.
"""

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from biasshift.fisher.convolution import Geometry, Maps
from biasshift.fisher.ranges import with_range, with_square, with_squares
from biasshift.fisher.samples import ImplicitSums, Part, RereadParts, Samples, Work
from biasshift.measure import layer_types
from biasshift.measure.accumulators import LayerBatch, LayerState
from biasshift.measure.layer_types import WeightLayer
from biasshift.measure.options import Options
from biasshift.measure.probe import Batch, Probe, batches
from biasshift.measure.sandbox import undisturbed

ProbeSource = Probe | Callable[[], Iterable]
# Relative difference of Σ δ² between two readings: far above rounding, far below other labels or
# other data.
SAME = 1e-4


@dataclass
class MemoryBudget:
    """Bytes for the blocks or the samples of each layer, and those left for all layers together.

    Whoever needs memory takes it first; a layer that drops its samples gives it back.
    """

    per_layer: int
    left: int

    @classmethod
    def on(cls, device: torch.device, per_layer: int) -> "MemoryBudget":
        """Makes a budget whose layers together may take half of the free memory of a device.

        Where that is less than the bytes of one layer, all layers share those.
        """
        return cls(per_layer, max(per_layer, _free_bytes(device) // 2))

    def take(self, needed: int, taken: int = 0) -> bool:
        """Takes bytes for a layer that has ``taken`` some, and tells whether there were enough."""
        if taken + needed > self.per_layer or needed > self.left:
            return False
        self.left -= needed
        return True


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):  # not known on every system
        return 0


# -- the parts of one batch ------------------------------------------------------------------------


class Collector:
    """The parts of one layer from one batch: activations about a reference, then the errors.

    A batch is `start_batch`, `add_errors` for every stack of seeds, and `finish_batch`, which fills
    ``parts``. The reference has one number per channel; by default the first batch's mean.
    """

    def __init__(self, reference: Tensor | None = None):
        self.reference = reference
        self.parts: list[Samples | Maps] = []

    def start_batch(self, layer: LayerBatch) -> None:
        """Takes the batch's incoming activations about the reference."""
        maps, samples = _maps(layer), _are_samples(layer)
        dims = maps[0].dim()
        if self.reference is None:
            axis = dims - 1 if samples else 1
            self.reference = maps[0].mean([i for i in range(dims) if i != axis])
        reference = self.reference if samples else self.reference.view(-1, *[1] * (dims - 2))
        self.maps = [a - reference for a in maps]
        geometry = _geometry(layer.module)
        self.places = [] if samples else [math.prod(geometry.places(a)) for a in maps]
        self.delta: list[Tensor] = []
        self.delta2 = torch.zeros((), device=layer.units.device)

    def add_errors(self, layer: LayerBatch, delta: Tensor) -> None:
        """Adds the errors of a stack of seeds, (passes, batch, positions, units)."""
        own = delta if len(layer.units) == delta.shape[-1] else delta[..., layer.units]
        own = with_square(own.to(layer_types.dtype_of_sums(own)))
        if layer.shares_weights:
            self.delta.append(own.transpose(2, 3).contiguous())
        else:
            self.delta2 = self.delta2 + own.square().sum(0)

    def finish_batch(self, layer: LayerBatch) -> None:
        """Makes the parts, when the errors of all seeds are in."""
        geometry = _geometry(layer.module)
        if layer.shares_weights:
            part = Maps(geometry, tuple(self.maps), tuple(self.delta), False, layer.units)
            self.parts = [_in_range(part)]
        elif _are_samples(layer):
            delta2 = self.delta2.flatten(0, 1).T.clone(memory_format=torch.contiguous_format)
            a, weights = with_range(self.maps[0], delta2.T)
            self.parts = [Samples(a, weights.T.contiguous())]
        else:
            self.parts = [
                _in_range(Maps(geometry, (a,), (delta2.contiguous(),), True, layer.units))
                for a, delta2 in self._by_call(self.delta2)
            ]
        self.maps, self.delta, self.delta2 = [], [], torch.zeros(())

    def weighted(self, layer: LayerBatch, delta: Tensor) -> Tensor:
        """Returns ``Σ δ (a − reference)``, (units, inputs).

        Args:
            delta: the errors of one label, (batch, positions, units).
        """
        own = delta[..., layer.units].to(self.maps[0].dtype)
        if _are_samples(layer):
            return own.flatten(0, 1).T @ self.maps[0]
        geometry = _geometry(layer.module)
        products = [
            Maps(geometry, (a,), (y,), True, layer.units).backward(y, slice(None))
            for a, y in self._by_call(own)
        ]
        return torch.stack(products).sum(0)

    def _by_call(self, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Every call's map, and its share of ``x`` (batch, positions, units).

        The share is (batch of the call, units, positions of the call). Under ``"expand"`` the batch
        of ``x`` is 1, and its positions hold the examples too.
        """
        if len(self.maps) == 1:
            yield self.maps[0], x.reshape(len(self.maps[0]), -1, x.shape[-1]).transpose(1, 2)
            return
        shares = [
            len(a) * places // len(x) for a, places in zip(self.maps, self.places, strict=True)
        ]
        for a, own in zip(self.maps, x.split(shares, 1), strict=True):
            yield a, own.reshape(len(a), -1, x.shape[-1]).transpose(1, 2)


def _are_samples(layer: LayerBatch) -> bool:
    return isinstance(layer.module, layer_types.LINEAR) and not layer.shares_weights


def _maps(layer: LayerBatch) -> list[Tensor]:
    """Incoming activations, (samples, inputs), or (batch, channels, …) and padded.

    A sequence is a map of one row.
    """
    if isinstance(layer.module, layer_types.LINEAR):
        a = layer.patches()[:, :, 0]
        return [a.flatten(0, 1) if _are_samples(layer) else a.transpose(1, 2).contiguous()]
    return [
        a.to(layer_types.dtype_of_sums(a))
        for call, layout in zip(layer.calls, layer.layouts, strict=True)
        for a in layout.split(layer_types.padded(layer.module, call.a, call.shape), layer.examples)
    ]


def _in_range(part: Maps) -> Maps:
    """The part in double precision, where single precision cannot hold its products."""
    for a in part.maps:
        for delta in part.delta:
            errors = delta.sqrt() if part.squared else delta
            wide, _ = with_squares(a, errors, axes=(1, -2))
            if wide.dtype != a.dtype:
                return replace(
                    part,
                    maps=tuple(a.double() for a in part.maps),
                    delta=tuple(delta.double() for delta in part.delta),
                )
    return part


def _geometry(module: WeightLayer) -> Geometry:
    units = layer_types.unit_count(module)
    if isinstance(module, layer_types.LINEAR):
        return Geometry(units, 1, (1,), (1,), (1,), False)
    kernel, dilation = tuple(module.kernel_size), tuple(module.dilation)
    stride = layer_types.patch_stride(module)
    return Geometry(units, module.groups, kernel, stride, dilation, module.transposed)


# -- the parts of all batches ----------------------------------------------------------------------


class ImplicitState(LayerState):
    """The sums of one layer whose samples are kept, as long as the memory budget allows.

    When it is used up, the samples are dropped, and the probe is read again whenever they are
    needed (``reread``).

    Args:
        one_shot: whether the probe is an iterator, which cannot be read again.
    """

    def __init__(self, layer: LayerBatch, budget: MemoryBudget, one_shot: bool):
        super().__init__(layer)
        self.budget, self.one_shot, self.kept_bytes = budget, one_shot, 0
        self.collector = Collector()
        self.implicit: ImplicitSums | None = None
        self.reread: RereadParts | None = None
        self.full, self.work = False, Work(0, 0, 0)

    def start_batch(self, layer: LayerBatch) -> None:
        """Adds the batch's incoming activations, about the collector's reference, in float64."""
        self.collector.start_batch(layer)
        assert self.collector.reference is not None
        channels = layer_types.repeat_channels(self.module, self.collector.reference.double())
        reference = self._per_unit(layer, channels)
        if self.implicit is None:
            self.implicit = ImplicitSums.empty(len(layer.units), reference, self.budget.per_layer)
        total = self._per_unit(layer, layer.summed_patches()) - layer.rows * reference
        self.implicit = self.implicit.with_inputs(layer.examples, layer.rows, total)

    def _per_unit(self, layer: LayerBatch, x: Tensor) -> Tensor:
        x = layer_types.per_unit(self.module, x)
        return x if x.dim() == 1 else x[layer.units]

    def add_errors(self, layer: LayerBatch, delta: Tensor) -> None:
        """Adds the errors of a stack of seeds, (passes, batch, positions, units)."""
        self.add_draws(layer, delta)
        self.add_rounding(layer, delta)
        self.collector.add_errors(layer, delta)

    def finish_batch(self, layer: LayerBatch) -> None:
        """Adds the moments of the batch's parts, and keeps the parts where the budget allows.

        Raises:
            ValueError: where it does not, and the probe is an iterator that cannot be read again.
        """
        assert self.implicit is not None
        self.label_variance.finish_batch(layer.draws)
        self.collector.finish_batch(layer)
        for part in self.collector.parts:
            self.work = self.work + part.work
            self._make_room(part)
            self.implicit = self.implicit.with_part(part.moments(), None if self.full else part)
        self.collector.parts = []

    def _make_room(self, part: Samples | Maps) -> None:
        if self.full or self.budget.take(part.bytes, self.kept_bytes):
            self.kept_bytes += part.bytes
            return
        if self.one_shot:
            raise ValueError(
                f"Layer '{self.name}' has samples beyond memory_budget="
                f"{self.budget.per_layer} bytes, and an iterator cannot be read again. Give a list "
                "or a DataLoader, raise memory_budget, or choose units=."
            )
        assert self.implicit is not None
        self.full = True
        self.budget.left += self.kept_bytes
        self.implicit = self.implicit.without_parts()

    def held_bytes(self, layer: LayerBatch, samples: int, batches: float, again: bool) -> int:
        """Predicts the bytes of maps and errors; 0 where they do not fit, and are read again."""
        units, rows = len(layer.units), layer.rows
        passes = samples / (layer.examples * batches) if layer.shares_weights else 1
        numbers = units * rows * passes
        if isinstance(layer.module, layer_types.LINEAR):
            numbers += rows * layer_types.input_count(layer.module)
        else:  # without what pads them
            numbers += sum(call.a.numel() for call in layer.calls)
        needed = round(layer.itemsize * numbers * batches)
        return needed if needed <= self.budget.per_layer else 0

    def total(self) -> ImplicitSums:
        """Returns the sums of all units, with the parts kept or to be read again."""
        assert self.implicit is not None
        return self.implicit if self.reread is None else self.implicit.without_parts(self.reread)

    def _summed_products(self, layer: LayerBatch, delta: Tensor) -> tuple[Tensor, Tensor]:
        assert self.implicit is not None
        g0 = delta[..., layer.units].sum((0, 1), dtype=torch.float64)
        g = self.collector.weighted(layer, delta).double() + g0[:, None] * self.implicit.reference
        return g, g0


# -- reading the probe again -----------------------------------------------------------------------

AddBatch = Callable[
    [nn.Module, dict[str, WeightLayer], Batch, Options, Mapping[str, Collector]],
    None,
]


def opened(x: ProbeSource) -> Probe:
    """Returns the probe, or calls the function that was given for it."""
    return x() if callable(x) and not isinstance(x, Iterable) else x


class ProbeReader:
    """A measurement that can be repeated for one layer at a time, as long as nothing has changed.

    It notes the parameters' versions, the modes and the generator's state when it is made.

    Args:
        add_batch: runs the model on one batch, and adds its activations and errors to collectors.
    """

    def __init__(
        self,
        add_batch: AddBatch,
        model: nn.Module,
        modules: dict[str, WeightLayer],
        x: ProbeSource,
        y: Any,
        options: Options,
    ):
        self.add_batch, self.model, self.modules = add_batch, model, modules
        self.x, self.y, self.options = x, y, options
        self.parameters = [(p, p._version, p.data_ptr()) for p in model.parameters()]
        self.modes = [(module, module.training) for module in model.modules()]
        self.random_state = options.generator.get_state() if options.generator is not None else None

    def parts(self, name: str, state: ImplicitState) -> RereadParts:
        """Returns the parts of a layer, which are read anew at every use.

        Raises:
            RuntimeError: at a use, when the parameters have changed, or the probe gives other data
                or labels than at first.
        """
        sums, reference = state.total(), state.collector.reference
        assert reference is not None
        channels = reference.shape[-1] // layer_types.group_count(self.modules[name])
        examples, weight = sums.examples, sums.weight.sum().item()
        return RereadParts(
            lambda: self._read(name, reference, examples, weight), channels, state.work
        )

    def _read(self, name: str, reference: Tensor, examples: int, weight: float) -> Iterator[Part]:
        self._refuse_changes(name)
        layer, examples_read, weight_read = {name: self.modules[name]}, 0, 0.0
        with undisturbed(self.model, gradients=True):
            for module, training in self.modes:
                module.training = training
            options = self.options
            if options.generator is not None and self.random_state is not None:
                generator = torch.Generator(options.generator.device)
                options = replace(options, generator=generator.set_state(self.random_state))
            for batch in batches(
                self.model,
                opened(self.x),
                self.y,
                options.batch_size,
                inputs=options.inputs,
                mask=options.mask,
            ):
                collector = Collector(reference)
                self.add_batch(self.model, layer, batch, options, {name: collector})
                examples_read += len(batch.x)
                for part in collector.parts:
                    weight_read += part.weight()
                    with torch.no_grad():
                        yield part
        if examples_read != examples or abs(weight_read - weight) > SAME * abs(weight):
            raise RuntimeError(
                f"Layer '{name}' does not fit into memory_budget, so the probe was read again, and "
                f"it was not the same. It had {examples_read} examples with Σ δ² = "
                f"{weight_read:g}, after {examples} with {weight:g}. Turn off random augmentation; "
                "with labels='sampled', shuffling too."
            )

    def _refuse_changes(self, name: str) -> None:
        if any(p._version != version or p.data_ptr() != at for p, version, at in self.parameters):
            raise RuntimeError(
                f"Layer '{name}' does not fit into memory_budget and needs the model as it was "
                "measured, but its parameters have changed. Read its numbers before the next step, "
                "or raise memory_budget."
            )
