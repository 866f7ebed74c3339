"""The two kinds of log: measurements on a fixed probe around optimizer steps, and moments of the
training batches.
"""

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from biasshift.distributed import is_distributed
from biasshift.measure import all_reduce, layer_types
from biasshift.measure.accumulators import kept_units
from biasshift.measure.activation_moments import (
    ActivationMoments,
    ActivationWatcher,
    activation_modules,
    activation_moments,
)
from biasshift.measure.bias_shift import NetMeans, compare, net_means, unit_weights, used_gradients
from biasshift.measure.coverage import NonFiniteOutputs
from biasshift.measure.fisher import measure
from biasshift.measure.gradient_gap import Foreseen, gap
from biasshift.measure.hooks import Feeding, add_output_hook, output_hooks, underlying
from biasshift.measure.layer_types import WeightLayer
from biasshift.measure.options import Measured, Options
from biasshift.measure.probe import Probe, Selection, batches, weight_layers
from biasshift.measure.sandbox import undisturbed
from biasshift.tracking.rows import (
    activation_columns,
    fisher_columns,
    layer_row,
    shift_columns,
    tidy,
    unit_rows,
)

if TYPE_CHECKING:
    import pandas as pd


class Log:
    """What both kinds of log share: hooks that come off, and the description of the layers."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        layers: Selection,
        measure_weights: bool,
    ):
        self.model, self.optimizer = underlying(model), optimizer
        self.weights, self.activations = _split(self.model, layers, measure_weights)
        self.step = 0
        self._feeding = Feeding()
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Takes all hooks away; the table stays readable. Calling it again does nothing."""
        while self._handles:
            self._handles.pop().remove()

    @property
    def layers(self) -> "pd.DataFrame":
        """One row per layer: ``layer``, ``kind``, ``units``, ``fed_by`` (the module whose output it
        reads, or ""), ``inputs``.
        """
        import pandas as pd

        feeding = self._feeding
        names = [
            name for name in feeding.kinds_of if name in self.weights or name in self.activations
        ]
        return pd.DataFrame(
            {
                "layer": names,
                "kind": [feeding.kinds_of[name] for name in names],
                "units": [self._units(name) for name in names],
                "fed_by": [feeding.fed_by[name] for name in names],
                "inputs": [feeding.inputs.get(name, 0) for name in names],
            }
        )

    def _units(self, name: str) -> int:
        return self._feeding.units.get(name) or next(
            (len(m.mean) for n, m in self._moments().items() if n.split("#")[0] == name), 0
        )

    def _moments(self) -> dict[str, ActivationMoments]:
        raise NotImplementedError

    def _watched(self) -> dict[str, nn.Module]:
        return {**self.weights, **self.activations}


class ProbeLog(Log):
    """Measurements on a fixed probe around the optimizer's steps."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        x: Probe,
        y: Tensor | None,
        every: int,
        quantities: tuple[str, ...],
        options: Options,
        distributed: bool = False,
    ):
        super().__init__(
            model, optimizer, options.layers, measure_weights=quantities != ("activations",)
        )
        self.x, self.y, self.every, self.quantities = x, y, every, quantities
        self._merging = distributed and is_distributed()
        self._frames: list[pd.DataFrame] = []
        self._before: dict[str, NetMeans] | None = None
        self._foreseen: dict[str, Foreseen] = {}
        self._last_moments: dict[str, ActivationMoments] = {}
        self._see_layers(options.batch_size)
        self.weights = {
            name: module for name, module in self.weights.items() if name in self._feeding.kinds_of
        }
        self.options = replace(options, layers=list(self.weights))
        self._measure({})
        self._handles += [
            optimizer.register_step_pre_hook(self._on_step),
            optimizer.register_step_post_hook(self._after_step),
        ]

    def table(self) -> "pd.DataFrame":
        """All rows since the last flush: (step, layer, unit) and every quantity, NaN where a row
        has none.
        """
        return tidy(self._frames)

    def flush(self) -> "pd.DataFrame":
        """The table, whose rows are then forgotten: for runs whose table would outgrow the memory."""
        table, self._frames = self.table(), []
        return table

    def _see_layers(self, batch_size: int | None) -> None:
        """One example through the model: who feeds whom, and which layers take part at all."""
        with (
            undisturbed(self.model, evaluate=True),
            output_hooks(self._watched(), self._feeding.record),
        ):
            first, _ = next(batches(self.model, self.x, None, batch_size))
            self.model(first[:1])
        self._feeding.finish()

    @property
    def due(self) -> bool:
        """Whether the next step is measured."""
        return (self.step + 1) % self.every == 0

    def _on_step(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        self._before, self._foreseen = None, {}
        if not self.weights or not self.due or _skipped(optimizer):
            return
        if "bias_shift" in self.quantities:
            self._before = self._net_means()
        if "gap" in self.quantities:
            self._foreseen = self._foresee(optimizer, args, kwargs)

    def _after_step(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        if _skipped(optimizer):
            return
        due = self.due
        self.step += 1
        if due:
            columns: dict[str, dict[str, Tensor]] = {}
            if self._before is not None:
                shifts = compare(self._before, self._net_means())
                columns = {
                    name: dict(shift_columns(shift, self._units_of(name)))
                    for name, shift in shifts.items()
                }
            for name, foreseen in self._foreseen.items():
                columns[name] = {
                    **columns.get(name, {}),
                    **foreseen.columns(self._kept(name, unit_weights(self.weights[name]))),
                }
            self._before, self._foreseen = None, {}
            self._measure(columns)

    def _foresee(
        self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict
    ) -> dict[str, Foreseen]:
        """What the gradient that the optimizer is about to use would shift, and Theorem 1's update
        of it: with F before the step.
        """
        gradients = used_gradients(optimizer, self.weights, args, kwargs)
        if (
            not gradients and not self._merging
        ):  # other processes may have some, and wait for this one
            return {}
        try:
            with undisturbed(self.model, evaluate=True):
                measured = self._fishers(
                    replace(self.options, generator=_copied(self.options.generator))
                )
                return {
                    name: Foreseen.of(
                        measured[name].fisher,
                        self._kept(name, g),
                        self._kept(name, unit_weights(self.weights[name])),
                    )
                    for name, g in gradients.items()
                }
        except NonFiniteOutputs:  # which the measurement after the step says
            return {}
        except ValueError as error:
            warnings.warn(
                f"Step {self.step + 1}: {error} What its gradient would shift is left out.",
                stacklevel=2,
            )
            return {}

    def _measure(self, columns: dict) -> None:
        """Everything at the present step, as rows: ``columns`` holds the bias shifts, layer by
        layer.
        """
        frames = []
        with undisturbed(self.model, evaluate=True):
            if "activations" in self.quantities:
                moments = activation_moments(
                    self.model,
                    self.x,
                    layers=list(self.activations),
                    batch_size=self.options.batch_size,
                )
                self._last_moments = (
                    all_reduce.merged_moments(moments) if self._merging else moments
                )
                frames += [
                    unit_rows(self.step, name, activation_columns(moments))
                    for name, moments in self._last_moments.items()
                ]
            if self.weights and ("fisher" in self.quantities or "gap" in self.quantities):
                measured = self._measure_fishers()
                if "fisher" in self.quantities:
                    for name, layer in measured.items():
                        columns[name] = {**columns.get(name, {}), **fisher_columns(layer.fisher)}
                if "gap" in self.quantities:
                    for name, layer in measured.items():
                        frames.append(layer_row(self.step, name, gap(layer)))
        frames += [
            unit_rows(self.step, name, columns[name], self._units_of(name))
            for name in self.weights
            if columns.get(name)
        ]
        self._frames += frames

    def _net_means(self) -> dict[str, NetMeans]:
        means = net_means(self.model, self.x, self.options.layers, self.options.batch_size)
        return all_reduce.merged_means(means) if self._merging else means

    def _measure_fishers(self) -> dict[str, Measured]:
        """A diverged network has no Fisher matrices; that is no reason to end somebody's training."""
        try:
            return self._fishers(self.options, gradient="gap" in self.quantities)
        except NonFiniteOutputs as error:
            warnings.warn(
                f"Step {self.step}: {error} No Fisher and gap rows are written.", stacklevel=2
            )
            return {}

    def _fishers(self, options: Options, gradient: bool = False) -> dict[str, Measured]:
        measured = measure(self.model, self.x, self.y, options, gradient)
        return all_reduce.merged_measurements(measured) if self._merging else measured

    def _kept(
        self, name: str, of_units: tuple[Tensor, Tensor | None]
    ) -> tuple[Tensor, Tensor | None]:
        """The rows of the units that are measured."""
        (w, w0), units = of_units, self._units_of(name)
        if units is None:
            return of_units
        units = units.to(w.device)
        return w[units], None if w0 is None else w0[units]

    def _units_of(self, name: str) -> Tensor | None:
        return (
            None
            if self.options.units is None
            else kept_units(name, self.weights[name], self.options.units, torch.device("cpu"))
        )

    def _moments(self) -> dict[str, ActivationMoments]:
        return self._last_moments


class TrainingLog(Log):
    """Activation moments of the training batches themselves, added up on the model's device without
    waiting for it.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer | None, layers: Selection
    ):
        super().__init__(model, optimizer, layers, measure_weights=False)
        self._open = False  # inside a training forward pass of the whole model
        self._ever = False
        self._watcher = ActivationWatcher(self.model, list(self.activations))
        self._handles += [
            add_output_hook(name, module, self._watch)
            for name, module in {**self._watcher.modules, **self.weights}.items()
        ]
        self._handles += [
            self.model.register_forward_pre_hook(self._start),
            self.model.register_forward_hook(self._stop, always_call=True),
        ]
        if optimizer is not None:
            self._handles.append(optimizer.register_step_post_hook(self._count))

    def table(self) -> "pd.DataFrame":
        """The moments of all training batches since the last flush, at the present step.

        Raises:
            RuntimeError: when no training forward pass of the model has ever been seen.
        """
        if not self._ever:
            raise RuntimeError(
                "No forward pass in training mode was seen: the model was compiled before it was "
                "instrumented (hooks added to a "
                "compiled model never fire: instrument first, or use a probe), is in eval mode, or "
                "is called in parts."
            )
        return tidy(
            unit_rows(self.step, name, activation_columns(m)) for name, m in self._moments().items()
        )

    def flush(self) -> "pd.DataFrame":
        """The table, and a fresh start of the sums."""
        table = self.table()
        self._watcher.sums.clear()
        return table

    def _start(self, module: nn.Module, args: object) -> None:
        self._open = module.training
        if self._open:
            self._watcher.start_forward()

    def _stop(self, module: nn.Module, args: object, output: object) -> None:
        if self._open and not self._ever:
            self._feeding.finish()
        if self._open and self.optimizer is None:
            self.step += 1
        self._ever = self._ever or self._open
        self._open = False  # a checkpoint's recomputation in the backward pass does not count

    def _watch(self, name: str, module: nn.Module, a: Tensor, output: Tensor) -> None:
        if self._open:
            if not self._ever:
                self._feeding.record(name, module, a, output)
            if name in self._watcher.modules:
                with torch.no_grad():
                    self._watcher.record(name, module, a, output)

    def _count(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        self.step += 0 if _skipped(optimizer) else 1

    def _moments(self) -> dict[str, ActivationMoments]:
        return self._watcher.moments()


def _split(
    model: nn.Module, select: Selection, measure_weights: bool
) -> tuple[dict[str, WeightLayer], dict[str, nn.Module]]:
    """The chosen weight layers and activation modules; a name must be one of either.

    Layers that cannot be measured are refused only where weight layers will be.
    """
    everything = activation_modules(model)
    if not measure_weights and (select is None or callable(select)):
        inner = select
        select = lambda name, module: (  # noqa: E731
            (inner is None or inner(name, module)) and layer_types.why_uncovered(module) is None
        )
    if select is None or callable(select):
        chosen: Callable[[str, nn.Module], bool] = select or (lambda name, module: True)
        activations = {name: module for name, module in everything.items() if chosen(name, module)}
        return weight_layers(model, chosen, required=False), activations
    names = [select] if isinstance(select, str) else list(select)
    activations = {name: everything[name] for name in names if name in everything}
    rest = [name for name in names if name not in everything]
    return (weight_layers(model, rest) if rest else {}), activations


def _copied(generator: torch.Generator | None) -> torch.Generator | None:
    """One that draws the same: measuring before a step leaves the labels that are drawn after it as
    they would have been.
    """
    return (
        None
        if generator is None
        else torch.Generator(generator.device).set_state(generator.get_state())
    )


def _skipped(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a gradient scaler made this step do nothing; fused optimizers are called all the
    same.
    """
    found_inf = getattr(optimizer, "found_inf", None)
    return found_inf is not None and bool(found_inf)
