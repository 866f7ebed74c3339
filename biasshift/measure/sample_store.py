"""Layers whose samples are held instead of their blocks: what one batch leaves behind, and how much
of it there is room for.
"""

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from biasshift.fisher.convolution import Geometry, Maps
from biasshift.fisher.samples import Again, ImplicitSums, Part, Samples, Work
from biasshift.measure import layer_types
from biasshift.measure.accumulators import LayerBatch, LayerState
from biasshift.measure.layer_types import WeightLayer
from biasshift.measure.options import Options
from biasshift.measure.probe import Probe, batches, iterable
from biasshift.measure.sandbox import undisturbed

Source = Probe | Callable[[], Iterable]
# relative difference of Σ δ² between two readings: far above rounding, far below other labels or
# other data
SAME = 1e-4


@dataclass
class Room:
    """Bytes for the blocks, or the held samples, of one layer; and those for all layers together:
    half of what is free, if that is more.
    """

    budget: int
    left: int

    @classmethod
    def on(cls, device: torch.device, budget: int) -> "Room":
        return cls(budget, max(budget, _free(device) // 2))

    def take(self, needed: int, taken: int = 0) -> bool:
        """Whether a layer that has ``taken`` so much may have more; then it has."""
        if taken + needed > self.budget or needed > self.left:
            return False
        self.left -= needed
        return True


def _free(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):  # not known on every system
        return 0


class Collector:
    """The parts of one layer from one batch: activations about a reference, then the errors, some
    label seeds at a time.
    """

    def __init__(self, reference: Tensor | None = None):
        self.reference = reference  # of every channel; that of the first batch
        self.parts: list[Samples | Maps] = []

    def start_batch(self, layer: LayerBatch) -> None:
        maps = _maps(layer)
        axis = -1 if _are_samples(layer) else 1
        if self.reference is None:
            self.reference = maps[0].mean(
                [i for i in range(maps[0].dim()) if i != axis % maps[0].dim()]
            )
        reference = (
            self.reference if axis == -1 else self.reference.view(-1, *[1] * (maps[0].dim() - 2))
        )
        self.maps, self.delta, self.delta2 = (
            [a - reference for a in maps],
            list[Tensor](),
            torch.zeros((), device=layer.units.device),
        )
        self.places = (
            [] if axis == -1 else [math.prod(_geometry(layer.module).places(a)) for a in maps]
        )

    def add_errors(self, layer: LayerBatch, delta: Tensor) -> None:
        """Errors (passes, batch, positions, units)."""
        own = delta if len(layer.units) == delta.shape[-1] else delta[..., layer.units]
        own = own.to(layer_types.dtype_of_sums(own))
        if layer.shares_weights:
            self.delta.append(own.transpose(2, 3).contiguous())
        else:
            self.delta2 = self.delta2 + own.square().sum(0)

    def finish_batch(self, layer: LayerBatch) -> None:
        if layer.shares_weights:
            self.parts = [
                Maps(
                    _geometry(layer.module), tuple(self.maps), tuple(self.delta), False, layer.units
                )
            ]
        elif _are_samples(layer):
            delta2 = self.delta2.flatten(0, 1).T.clone(memory_format=torch.contiguous_format)
            self.parts = [Samples(self.maps[0], delta2)]
        else:
            self.parts = [
                Maps(_geometry(layer.module), (a,), (delta2.contiguous(),), True, layer.units)
                for a, delta2 in self._by_call(self.delta2)
            ]
        self.maps, self.delta, self.delta2 = [], [], torch.zeros(())

    def weighted(self, layer: LayerBatch, delta: Tensor) -> Tensor:
        """``Σ δ (a − reference)``, (units, inputs), for errors (batch, positions, units) of one
        label.
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
        """Every map, and what (batch, positions, units) says about it as (batch of the call, units,
        positions of the call).
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
    return isinstance(layer.module, nn.Linear) and not layer.shares_weights


def _maps(layer: LayerBatch) -> list[Tensor]:
    """Incoming activations, (samples, inputs), or (batch, channels, …) and padded. A sequence is a
    map of one row.
    """
    if isinstance(layer.module, nn.Linear):
        a = layer.patches()[:, :, 0]
        return [a.flatten(0, 1) if _are_samples(layer) else a.transpose(1, 2).contiguous()]
    return [
        layer_types.padded(layer.module, call.a, call.shape).to(layer_types.dtype_of_sums(call.a))
        for call in layer.calls
    ]


def _geometry(module: WeightLayer) -> Geometry:
    units = layer_types.unit_count(module)
    if isinstance(module, nn.Linear):
        return Geometry(units, 1, (1,), (1,), (1,), False)
    kernel, dilation = tuple(module.kernel_size), tuple(module.dilation)
    return Geometry(
        units,
        module.groups,
        kernel,
        layer_types.stride_of_patches(module),
        dilation,
        module.transposed,
    )


class ImplicitState(LayerState):
    """The sums of one layer whose samples are held, until there is no room for more: then none are,
    and the probe is read again.
    """

    def __init__(self, layer: LayerBatch, room: Room, one_shot: bool):
        super().__init__(layer)
        self.room, self.one_shot, self.budget, self.held = room, one_shot, room.budget, 0
        self.collector = Collector()
        self.implicit: ImplicitSums | None = None
        self.again: Again | None = None
        self.full, self.work = False, Work(0, 0, 0)

    def start_batch(self, layer: LayerBatch) -> None:
        self.collector.start_batch(layer)
        assert self.collector.reference is not None
        module, reference = self.module, self.collector.reference.double()
        expanded = self._per_unit(layer, layer_types.of_channels(module, reference))
        if self.implicit is None:
            self.implicit = ImplicitSums.empty(len(layer.units), expanded, self.budget)
        summed, positions = layer.summed()
        total = self._per_unit(layer, summed) - positions * expanded
        self.implicit = self.implicit.with_inputs(layer.examples, positions, total)

    def _per_unit(self, layer: LayerBatch, x: Tensor) -> Tensor:
        x = layer_types.per_unit(self.module, x)
        return x if x.dim() == 1 else x[layer.units]

    def add_errors(self, layer: LayerBatch, delta: Tensor) -> None:
        self.note_draws(layer, delta)
        self.collector.add_errors(layer, delta)

    def finish_batch(self, layer: LayerBatch) -> None:
        assert self.implicit is not None
        self.spread.finish_batch(layer.draws)
        self.collector.finish_batch(layer)
        for part in self.collector.parts:
            self.work = self.work + part.work
            self._hold(part)
            self.implicit = self.implicit.with_part(part.moments(), None if self.full else part)
        self.collector.parts = []

    def _hold(self, part: Samples | Maps) -> None:
        if self.full or self.room.take(part.bytes, self.held):
            self.held += part.bytes
            return
        if self.one_shot:
            raise ValueError(
                f"Layer '{self.name}': its samples pass memory_budget={self.budget} bytes, and the "
                "probe is an iterator "
                "that can be read only "
                "once. Give a list or a DataLoader, which are read again instead, raise "
                "memory_budget, or choose units=."
            )
        assert self.implicit is not None
        self.full = True
        self.room.left += self.held
        self.implicit = self.implicit.without_parts()

    def total(self) -> ImplicitSums:
        assert self.implicit is not None
        return self.implicit if self.again is None else self.implicit.without_parts(self.again)

    def add_gradient(self, layer: LayerBatch, delta: Tensor) -> None:
        assert self.implicit is not None
        g0 = delta[..., layer.units].sum((0, 1), dtype=torch.float64)
        g = self.collector.weighted(layer, delta).double() + g0[:, None] * self.implicit.reference
        self.g, self.g0 = (
            (-g, -g0) if self.g is None or self.g0 is None else (self.g - g, self.g0 - g0)
        )


# -- reading the probe again -------------------------------------------------------------------

AddBatch = Callable[
    [nn.Module, Mapping[str, WeightLayer], Tensor, Tensor | None, Options, Mapping[str, Collector]],
    None,
]


def fresh(x: Source) -> Probe:
    """The probe itself, or what the function that was given for it returns."""
    return x() if callable(x) and not isinstance(x, Iterable) else iterable(x)


class Reader:
    """What a measurement has to remember to be repeated for one layer at a time."""

    def __init__(
        self,
        add_batch: AddBatch,
        model: nn.Module,
        modules: Mapping[str, WeightLayer],
        x: Source,
        y: Tensor | None,
        options: Options,
    ):
        self.add_batch, self.model, self.modules, self.x, self.y, self.options = (
            add_batch,
            model,
            modules,
            x,
            y,
            options,
        )
        self.parameters = [(p, p._version, p.data_ptr()) for p in model.parameters()]
        self.modes = [(module, module.training) for module in model.modules()]
        self.random_state = options.generator.get_state() if options.generator is not None else None

    def again(self, name: str, state: ImplicitState) -> Again:
        """The parts of a layer, read anew at every use."""
        sums, reference = state.total(), state.collector.reference
        assert reference is not None
        channels = reference.shape[-1] // getattr(self.modules[name], "groups", 1)
        examples, weight = sums.examples, sums.weight.sum().item()
        return Again(lambda: self._read(name, reference, examples, weight), channels, state.work)

    def _read(self, name: str, reference: Tensor, examples: int, weight: float) -> Iterator[Part]:
        self._refuse_changes(name)
        module, read, found = {name: self.modules[name]}, 0, 0.0
        with undisturbed(self.model, gradients=True):
            for m, training in self.modes:
                m.training = training
            options = replace(self.options, generator=self._generator())
            for x, y in batches(self.model, fresh(self.x), self.y, options.batch_size):
                collector = Collector(reference)
                self.add_batch(self.model, module, x, y, options, {name: collector})
                read += len(x)
                for part in collector.parts:
                    found += part.weight()
                    with torch.no_grad():
                        yield part
        if read != examples or abs(found - weight) > SAME * abs(weight):
            raise RuntimeError(
                f"Layer '{name}' does not fit into memory_budget, so that the probe is read again, "
                "and it was not the "
                f"same: {read} examples "
                f"with a summed δ² of {found:g}, after {examples} with {weight:g}. Turn off random "
                "augmentation; with "
                "labels='sampled', shuffling too."
            )

    def _refuse_changes(self, name: str) -> None:
        if any(
            p._version != version or p.data_ptr() != place for p, version, place in self.parameters
        ):
            raise RuntimeError(
                f"Layer '{name}' does not fit into memory_budget, so that its numbers need the "
                "model as it was measured, "
                "but its parameters "
                "have changed. Read them before the next step, or raise memory_budget."
            )

    def _generator(self) -> torch.Generator | None:
        if self.random_state is None or self.options.generator is None:
            return None
        generator = torch.Generator(self.options.generator.device)
        generator.set_state(self.random_state)
        return generator
