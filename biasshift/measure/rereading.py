"""Reading the probe again, for layers whose samples do not fit into memory: the same model, the same data, the same labels, or an error."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from biasshift.fisher.samples import Again, Part
from biasshift.measure.accumulators import Options
from biasshift.measure.layer_types import WeightLayer
from biasshift.measure.probe import Probe, batches, iterable, undisturbed
from biasshift.measure.sample_store import Collector, ImplicitState

Source = Probe | Callable[[], Iterable]
AddBatch = Callable[[nn.Module, Mapping[str, WeightLayer], Tensor, Tensor | None, Options, Mapping[str, Collector]], None]

SAME = 1e-4  # relative difference of Σ δ² between two readings: far above rounding, far below other labels or other data


def fresh(x: Source) -> Probe:
    """The probe itself, or what the function that was given for it returns."""
    return x() if callable(x) and not isinstance(x, Iterable) else iterable(x)


class Reader:
    """What a measurement has to remember to be repeated for one layer at a time."""

    def __init__(
        self, add_batch: AddBatch, model: nn.Module, modules: Mapping[str, WeightLayer], x: Source, y: Tensor | None, options: Options
    ):
        self.add_batch, self.model, self.modules, self.x, self.y, self.options = add_batch, model, modules, x, y, options
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
                f"Layer '{name}' does not fit into memory_budget, so that the probe is read again, and it was not the "
                f"same: {read} examples "
                f"with a summed δ² of {found:g}, after {examples} with {weight:g}. Turn off random augmentation; with "
                "labels='sampled', shuffling too."
            )

    def _refuse_changes(self, name: str) -> None:
        if any(p._version != version or p.data_ptr() != place for p, version, place in self.parameters):
            raise RuntimeError(
                f"Layer '{name}' does not fit into memory_budget, so that its numbers need the model as it was measured, "
                "but its parameters "
                "have changed. Read them before the next step, or raise memory_budget."
            )

    def _generator(self) -> torch.Generator | None:
        if self.random_state is None or self.options.generator is None:
            return None
        generator = torch.Generator(self.options.generator.device)
        generator.set_state(self.random_state)
        return generator
