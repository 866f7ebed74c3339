"""The two logs of `instrument`: measurements on a fixed probe, and moments of training batches.

`ProbeLog` measures a probe around the optimizer's steps. `TrainingLog` adds up what the model does
on its training batches. Both come off the model when the block ends, and keep their table.
"""

import copy
import html
import threading
import warnings
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from biasshift.distributed import is_distributed
from biasshift.fisher.sample_size import warn_of_few_samples
from biasshift.measure import all_reduce, layer_types
from biasshift.measure.accumulators import Measured, kept_units
from biasshift.measure.activation_moments import (
    ActivationMoments,
    ActivationRecorder,
    activation_modules,
    activation_moments,
)
from biasshift.measure.bias_shift import NetMeans, compare, net_means, unit_weights, used_gradients
from biasshift.measure.coverage import (
    are_named,
    names_of,
    selected_layers,
    skipped_names,
    warn_of_left_out,
)
from biasshift.measure.fisher import fishers_of, measure
from biasshift.measure.gradient_gap import PredictedShift, gap
from biasshift.measure.hooks import (
    LayerGraph,
    WeakHook,
    add_output_hooks,
    call_hooks,
    output_hooks,
    underlying,
)
from biasshift.measure.independence import Reasons
from biasshift.measure.layer_types import WeightLayer
from biasshift.measure.module_hooks import add_hook
from biasshift.measure.options import Options
from biasshift.measure.outputs import NonFiniteOutputs
from biasshift.measure.parts import LinearPart
from biasshift.measure.probe import Probe, batches
from biasshift.measure.sandbox import forward, undisturbed
from biasshift.restoration import Restoration
from biasshift.tracking.rows import (
    activation_columns,
    fisher_columns,
    layer_row,
    shift_columns,
    tidy,
    unit_rows,
)

LayerColumns = defaultdict[str, dict[str, Tensor]]  # layer → column → (units,)


class Log:
    """What both logs share: hooks that come off, and the description of the layers.

    ``weights`` and ``activations`` are the modules that are measured, by name. ``step`` is the
    number of completed optimizer steps; steps that a gradient scaler skips are not counted.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        options: Options,
        measure_weights: bool,
        step: int = 0,
    ):
        self.model, self.optimizer = underlying(model), optimizer
        self.weights, self.activations, left_out = _split(self.model, options, measure_weights)
        if measure_weights:
            warn_of_left_out(self.model, left_out, stacklevel=5)
        self.step = step
        self._saw_step = False  # counted or not
        self._trained_from = _signature(self.model)
        self._graph = LayerGraph()
        self._hooks = Restoration(lambda _: None, "ends")
        self._is_on = False  # whether its hooks are on the model and the optimizer

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *exception: object) -> None:
        try:
            if all(part is None for part in exception):
                self._warn_of_unseen_steps(stacklevel=3)
        finally:
            try:
                self._take_off()
            finally:  # where it was interrupted before it began
                self._take_off()

    def remove(self) -> None:
        """Takes all hooks off the model and the optimizer.

        The table stays readable. Leaving the ``with`` block does the same, and calling it again
        does nothing.

        Warns:
            RuntimeWarning: If the model was trained, and no step of the optimizer was seen.
        """
        try:
            self._warn_of_unseen_steps(stacklevel=3)
        finally:
            self._take_off()

    def _put_on(self, *hooks: Callable[[], object]) -> None:
        """Adds all hooks, or none where an interruption comes in between.

        They do not keep the log alive, and do nothing in copies of the model.
        """
        self._hooks = Restoration(lambda _: [add() for add in hooks], "ends")
        self._hooks.__enter__()
        self._is_on = True

    def _take_off(self) -> None:
        try:
            self._is_on = False
            self._hooks.__exit__(None, None, None)
        finally:  # where it was interrupted before it began
            self._hooks.__exit__(None, None, None)

    def _on_step(self, optimizer: torch.optim.Optimizer, before: str, after: str) -> None:
        """Has methods called before and after every step; "" stands for none."""
        for method, hooks, register in (
            (before, optimizer._optimizer_step_pre_hooks, optimizer.register_step_pre_hook),
            (after, optimizer._optimizer_step_post_hooks, optimizer.register_step_post_hook),
        ):
            if method:
                hook: Any = WeakHook(self, method)
                self._hooks.undo(_take_out, hooks, hook)
                register(hook)

    def _warn_of_unseen_steps(self, stacklevel: int) -> None:
        unseen = self.optimizer is not None and not self._saw_step and self._was_trained()
        if self._is_on and unseen:
            warnings.warn(
                f"The model was trained, and no step of {type(self.optimizer).__name__} was seen. "
                "Another optimizer took the steps, a gradient scaler skipped all, or they do not "
                "go through step(), as first_step and second_step of SAM. Give the optimizer whose "
                "step() runs.",
                RuntimeWarning,
                stacklevel=stacklevel,
            )

    def _was_trained(self) -> bool:
        """Whether gradients or parameters have changed since the log was made.

        They tell it without a hook on the model, which its copies and compilations would meet.
        """
        return _signature(self.model) != self._trained_from

    @property
    def layers(self) -> pd.DataFrame:
        """One row per layer: ``layer``, ``kind``, ``units``, ``fed_by``, ``inputs``.

        ``fed_by`` is the module whose output the layer reads, or "". ``inputs`` is 0 for an
        activation module.
        """
        graph = self._graph
        rows = [
            (name, kind, self._unit_count(name), graph.fed_by[name], self._input_count(name))
            for name, kind in graph.kinds.items()
            if name in self.weights or name in self.activations
        ]
        return pd.DataFrame(rows, columns=["layer", "kind", "units", "fed_by", "inputs"])

    def _described(self) -> str:
        kinds = {"weight layer": len(self.weights), "activation": len(self.activations)}
        parts = [f"{n} {kind}{'s' if n != 1 else ''}" for kind, n in kinds.items() if n]
        return f"{' and '.join(parts) or 'no layers'}, step {self.step}"

    def _compact(self, table: pd.DataFrame) -> pd.DataFrame:
        """Without empty columns, and with the class of every module."""
        names = table["layer"].str.split("#").str[0]  # of a module's calls
        table = table.dropna(axis=1, how="all")
        table.insert(2, "kind", names.map(dict(self._graph.kinds)).fillna(""))
        return table

    def _repr_html_(self) -> str:
        return f"<p><code>{html.escape(repr(self))}</code></p>{self.layers.to_html(index=False)}"

    def _input_count(self, name: str) -> int:
        return layer_types.input_count(self.weights[name]) if name in self.weights else 0

    def _unit_count(self, name: str) -> int:
        if name in self.weights:
            return layer_types.unit_count(self.weights[name])
        moments = (m for call, m in self._moments().items() if call.split("#")[0] == name)
        return next((len(m.mean) for m in moments), 0)

    def _moments(self) -> dict[str, ActivationMoments]:
        raise NotImplementedError


class ProbeLog(Log):
    """Measurements on a fixed probe around the optimizer's steps.

    Made by `biasshift.instrument`. The step to come is measured where ``every`` divides its number:
    mean net inputs and gradients before it, and everything else after it. The model is left as it
    was found, in its mode, parameters, gradients and random state.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        x: Probe,
        y: Any,
        every: int,
        quantities: tuple[str, ...],
        options: Options,
        distributed: bool = False,
        step: int = 0,
    ):
        measure_weights = quantities != ("activations",)
        super().__init__(model, optimizer, options, measure_weights, step)
        self._inputs = options.inputs
        self.x, self.y, self.every, self.quantities = x, y, every, quantities
        self._merging = distributed and is_distributed()
        self._frames: list[pd.DataFrame] = []
        self._before: dict[str, NetMeans] | None = None
        self._predicted: dict[str, PredictedShift] = {}
        self._last_moments: dict[str, ActivationMoments] = {}
        self._calls = set(self.activations)
        self._by_name = are_named(options.layers)
        self._run_one_example(options.batch_size)
        self.weights = {
            name: module for name, module in self.weights.items() if name in self._graph.kinds
        }
        self._unmeasured: set[str] = set()  # layers without Fisher matrices
        weights_by_name = self._by_name or options.uncovered == "raise"
        self.options = replace(
            options,
            layers=list(self.weights) if weights_by_name else WeakHook(self, "_has_fisher"),
            skip=None,
        )
        self._notes: list[str] = []  # of what could not be measured before the present step
        self._failed: Exception | None = None  # what is raised behind the present step
        self._reported: set[str] = set()  # kinds of errors
        self._receivers: list[Callable[[pd.DataFrame], object]] = []
        self._measure(defaultdict(dict))
        self._put_on(lambda: self._on_step(optimizer, "_before_step", "_after_step"))

    def table(self, compact: bool = False) -> pd.DataFrame:
        """Returns all rows since the last `flush`: (step, layer, unit) and every quantity.

        Values of a whole layer stand on ``unit = −1``. A quantity is NaN where a row has none, as
        the mean activation of a weight layer.

        Args:
            compact: leave out the columns without a value, and say the ``kind`` of every layer
                behind its name.
        """
        table = tidy(self._frames)
        return self._compact(table) if compact else table

    def __repr__(self) -> str:
        rows = sum(map(len, self._frames))
        return (
            f"ProbeLog({self._described()}, every {self.every} steps: "
            f"{', '.join(self.quantities)}; {rows} rows)"
        )

    def flush(self) -> pd.DataFrame:
        """Returns the table, and forgets its rows.

        For runs whose table would outgrow the memory: write what it returns to disk, and call it
        again after more steps.
        """
        table, self._frames = self.table(), []
        return table

    def follow(self, receive: Callable[[pd.DataFrame], object]) -> None:
        """Has the rows of every measured step sent on, now and as training goes on.

        Args:
            receive: Gets a table with all columns: first of all rows since the last `flush`, then
                of each step. Where it fails, training goes on, and a warning says so once.

        Raises:
            ValueError: It cannot be called.
        """
        if not callable(receive):
            raise ValueError(
                f"'receive' must be a function of a table, got {type(receive).__name__}."
            )
        if self._frames:
            receive(self.table())
        self._receivers.append(receive)

    @property
    def due(self) -> bool:
        """Whether the next step is measured."""
        return (self.step + 1) % self.every == 0

    def _run_one_example(self, batch_size: int | None) -> None:
        """Which layers feed which, and which take part at all."""
        with (
            undisturbed(self.model, evaluate=True),
            output_hooks(self.activations, self._graph.record),
            call_hooks(self.weights, self._graph.record),
        ):
            first = next(batches(self.model, self.x, None, batch_size, inputs=self._inputs))
            forward(self.model, first.x[:1])
        self._graph.finish()

    # -- around a step -----------------------------------------------------------------------------

    def _before_step(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        self._before, self._predicted = None, {}
        if self.weights and self.due:
            step = self.step + 1
            self._attempt(step, lambda: self._measure_before(optimizer, args, kwargs))

    def _measure_before(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        if _skipped(optimizer):
            return
        if "bias_shift" in self.quantities:
            self._before = self._net_means()
        if "gap" in self.quantities:
            self._predicted = self._predict(optimizer, args, kwargs)

    def _after_step(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        self._saw_step = True
        if not _skipped(optimizer):
            due, self.step = self.due, self.step + 1
            if due and self._failed is None:
                self._attempt(self.step, self._measure_after)
        notes, self._notes = self._notes, []
        failed, self._failed = self._failed, None
        for note in notes:
            warnings.warn(note, stacklevel=2)
        if failed is not None:
            raise failed

    def _measure_after(self) -> None:
        columns: LayerColumns = defaultdict(dict)
        shifts = {} if self._before is None else compare(self._before, self._net_means())
        for name, shift in shifts.items():
            columns[name].update(shift_columns(shift, self._units(name)))
        for name, predicted in self._predicted.items():
            columns[name].update(predicted.columns(self._weights_of_units(name)))
        self._before, self._predicted = None, {}
        self._measure(columns)

    def _attempt(self, step: int, measure: Callable[[], object]) -> None:
        """Measures around a step, which is taken whatever happens here.

        What goes wrong, as where the memory is full, is told behind the step, once for each kind of
        error. Other processes would wait for the numbers of this one: there it is raised.
        """
        try:
            measure()
        except Exception as error:
            if self._merging:
                self._failed = error.with_traceback(None)  # which would keep activations alive
                return
            kind, words = type(error).__name__, str(error).partition("\n")[0]
            if kind not in self._reported:
                self._reported.add(kind)
                self._notes.append(
                    f"Step {step} was not measured ({kind}: {words.rstrip('.')}). Training goes "
                    "on, and other steps that fail this way are left out without a warning."
                )

    def _predict(
        self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict
    ) -> dict[str, PredictedShift]:
        """What the gradient that the optimizer is about to use would shift, and Theorem 1's update
        of it: with F before the step.
        """
        gradients = used_gradients(optimizer, self.weights, args, kwargs)
        # Other processes may have some, and wait for this one.
        if not gradients and not self._merging:
            return {}
        generator = self.options.generator
        if generator is not None:  # one that draws the same: labels after the step stay as they are
            generator = torch.Generator(generator.device).set_state(generator.get_state())
        try:
            with undisturbed(self.model, evaluate=True):
                measured = self._measured(replace(self.options, generator=generator))
                return {
                    name: PredictedShift.of(
                        measured[name].fisher, self._kept(name, g), self._weights_of_units(name)
                    )
                    for name, g in gradients.items()
                    if name in measured
                }
        except ValueError as error:
            if not isinstance(error, NonFiniteOutputs):  # of which the measurement afterwards warns
                self._notes.append(
                    f"Step {self.step + 1} gets no shifts of its gradient. {error} "
                    "Training goes on."
                )
            return {}

    # -- measurements at the present step ----------------------------------------------------------

    def _measure(self, columns: LayerColumns) -> None:
        """Everything at the present step, as rows: ``columns`` holds the bias shifts."""
        frames = []
        with undisturbed(self.model, evaluate=True):
            if "activations" in self.quantities:
                moments = activation_moments(
                    self.model,
                    self.x,
                    layers=list(self.activations) if self._by_name else self._is_measured,
                    batch_size=self.options.batch_size,
                    inputs=self._inputs,
                )
                if self._merging:
                    moments = all_reduce.merged_moments(moments)
                if not self._last_moments and not self._by_name:
                    # The others are left out from now on, without another warning.
                    self._calls = {call.split("#")[0] for call in moments}
                self._last_moments = moments
                frames += [
                    unit_rows(self.step, name, activation_columns(m)) for name, m in moments.items()
                ]
            if self.weights and {"fisher", "gap"} & set(self.quantities):
                for name, layer in self._measured_or_none().items():
                    if "fisher" in self.quantities:
                        columns[name].update(fisher_columns(layer.fisher))
                    if "gap" in self.quantities:
                        frames.append(layer_row(self.step, name, gap(layer)))
        frames += [
            unit_rows(self.step, name, columns[name], self._units(name))
            for name in self.weights
            if name in columns
        ]
        self._frames += frames
        if self._receivers and frames:
            self._send(tidy(frames))

    def _send(self, rows: pd.DataFrame) -> None:
        """A receiver that fails ends neither training nor the measurement."""
        for receive in self._receivers:
            try:
                receive(rows)
            except Exception as error:
                kind, words = type(error).__name__, str(error).partition("\n")[0]
                if f"receiver: {kind}" not in self._reported:
                    self._reported.add(f"receiver: {kind}")
                    self._notes.append(
                        f"The rows of step {self.step} were not received ({kind}: "
                        f"{words.rstrip('.')}). Training goes on, and the log keeps them; other "
                        "steps that fail this way get no warning."
                    )

    def _measured_or_none(self) -> dict[str, Measured]:
        """A diverged network has no Fisher matrices; that is no reason to end the training."""
        try:
            return self._measured(self.options, gradient="gap" in self.quantities)
        except NonFiniteOutputs as error:
            warnings.warn(
                f"Step {self.step} gets no Fisher and gap rows. {error} Training goes on.",
                stacklevel=2,
            )
            return {}

    def _measured(self, options: Options, gradient: bool = False) -> dict[str, Measured]:
        first = not self._is_on  # the measurement on entry
        measured = measure(self.model, self.x, self.y, options, gradient, first, self._merging)
        if first and callable(options.layers):
            self._unmeasured = set(self.weights) - set(measured)
        if not self._merging:
            return measured
        merged = all_reduce.merged_measurements(measured)
        if first:
            warn_of_few_samples(fishers_of(merged), stacklevel=6)
        return merged

    def _net_means(self) -> dict[str, NetMeans]:
        options = self.options
        if callable(options.layers):  # tied ones have means, but no Fisher matrices
            options = replace(options, layers=lambda name, module: name in self.weights)
        means, left_out = net_means(self.model, self.x, options)
        new = {name: why for name, why in left_out.items() if name not in self._unmeasured}
        warn_of_left_out(self.model, new, stacklevel=6)
        self._unmeasured |= set(new)
        return all_reduce.merged_means(means) if self._merging else means

    def _has_fisher(self, name: str, module: nn.Module) -> bool:
        return name in self.weights and name not in self._unmeasured

    def _is_measured(self, name: str, module: nn.Module) -> bool:
        return name in self._calls

    def _moments(self) -> dict[str, ActivationMoments]:
        return self._last_moments

    # -- the units that are measured ---------------------------------------------------------------

    def _units(self, name: str) -> Tensor | None:
        """Their indices, or None for all units."""
        if self.options.units is None:
            return None
        return kept_units(name, self.weights[name], self.options.units, torch.device("cpu"))

    def _weights_of_units(self, name: str) -> tuple[Tensor, Tensor | None]:
        return self._kept(name, unit_weights(self.weights[name]))

    def _kept(self, name: str, rows: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor | None]:
        (w, w0), units = rows, self._units(name)
        if units is None:
            return rows
        units = units.to(w.device)
        return w[units], None if w0 is None else w0[units]


class TrainingLog(Log):
    """Activation moments of the training batches, added up without waiting for the device.

    Made by `biasshift.instrument` without a probe. Only forward passes of the whole model in
    training mode count. Without an optimizer every such pass is a step.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        options: Options,
        step: int = 0,
    ):
        super().__init__(model, optimizer, options, measure_weights=False, step=step)
        # PyTorch's own forward passes of training do not call the parts of composites.
        self.weights = {n: m for n, m in self.weights.items() if not isinstance(m, LinearPart)}
        self._has_recorded = False
        self._watcher = ActivationRecorder(self.model, list(self.activations))  # of whole passes
        self._passes = threading.local()  # the pass of every thread, unfinished
        self._finishing = threading.RLock()
        modules = {**self._watcher.modules, **self.weights}
        self._put_on(
            lambda: add_output_hooks(self._hooks, modules, WeakHook(self, "_record")),
            lambda: self._on_model("_start", before=True),
            lambda: self._on_model("_finish"),
            # Behind an exception only this one is called, and finds a pass that is not finished.
            lambda: self._on_model("_stop", always_call=True),
            *([lambda: self._on_step(optimizer, "", "_after_step")] if optimizer else []),
        )

    def _on_model(self, method: str, **options: bool) -> None:
        add_hook(self._hooks, self.model, WeakHook(self, method), **options)

    def table(self, compact: bool = False) -> pd.DataFrame:
        """Returns the moments of all training batches since the last `flush`, at the present step.

        The columns are those of every table; only ``mean`` and ``var`` have values.

        Args:
            compact: leave out the columns without a value, and say the ``kind`` of every layer
                behind its name.

        Raises:
            RuntimeError: If no training forward pass of the model was ever recorded.
        """
        table = self._table(flush=False)
        return self._compact(table) if compact else table

    def __repr__(self) -> str:
        count = len(self.activations)
        some = f"{count} activation{'s' if count != 1 else ''}"
        return f"TrainingLog({some}, step {self.step}, every training batch: activations)"

    def flush(self) -> pd.DataFrame:
        """Returns the table, and starts the sums anew.

        Without calls of it the table is of all training since the start, in which early batches
        weigh as much as late ones.
        """
        return self._table(flush=True)

    def _table(self, flush: bool) -> pd.DataFrame:
        if not self._has_recorded:
            raise RuntimeError(
                "No forward pass in training mode was recorded: the model was compiled first, is "
                "in eval mode, or is called in parts. Instrument a model before torch.compile, "
                "call it as a whole, or give a probe."
            )
        with self._finishing:  # and not while the table is made, which waits for other threads
            step, moments = self.step, self._moments()
            if flush:
                self._watcher.sums.clear()
        return tidy(unit_rows(step, name, activation_columns(m)) for name, m in moments.items())

    def _start(self, module: nn.Module, args: object) -> None:
        # A pass that was interrupted, and never ended, is dropped here.
        self._passes.present = None
        if module.training:
            watcher = copy.copy(self._watcher)
            watcher.sums = {}
            watcher.start_forward()
            self._passes.present = _TrainingPass(
                watcher, None if self._has_recorded else LayerGraph()
            )

    def _record(self, name: str, module: nn.Module, a: Tensor, output: Tensor) -> None:
        present: _TrainingPass | None = getattr(self._passes, "present", None)
        if present is None:
            return
        if present.graph is not None:
            present.graph.record(name, module, a, output)
        if name in self._watcher.modules:
            present.watcher.record(name, module, a, output)

    def _finish(self, module: nn.Module, args: object, output: object) -> None:
        """Adds a pass to the sums: one that has returned."""
        present: _TrainingPass | None = getattr(self._passes, "present", None)
        if present is None:
            return
        self._passes.present = (
            None  # a checkpoint's recomputation in the backward pass does not count
        )
        with self._finishing:
            for key, new in present.watcher.sums.items():
                old = self._watcher.sums.get(key, new)
                self._watcher.sums[key] = (
                    new if old is new else {i: old[i] + m for i, m in new.items() if i in old}
                )
            if present.graph is not None and not self._has_recorded:
                present.graph.finish()
                self._graph = present.graph
            self._has_recorded = True
            self.step += self.optimizer is None

    def _stop(self, module: nn.Module, args: object, output: object) -> None:
        """Lets go of the last activation and its graph, and of sums of a pass that raised."""
        self._passes.present = None

    def _after_step(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        self._saw_step = True
        self.step += not _skipped(optimizer)

    def _was_trained(self) -> bool:
        return self._has_recorded

    def _moments(self) -> dict[str, ActivationMoments]:
        with self._finishing:
            return self._watcher.moments()


@dataclass
class _TrainingPass:
    """A forward pass that has not returned yet."""

    watcher: ActivationRecorder
    graph: LayerGraph | None


def _split(
    model: nn.Module, options: Options, measure_weights: bool
) -> tuple[dict[str, WeightLayer], dict[str, nn.Module], Reasons]:
    """The chosen weight layers and activation modules, and reasons for layers that are left out.

    A name must be one of either. Layers that cannot be measured are an error only where weight
    layers will be.
    """
    select, skipped = options.layers, skipped_names(model, options.skip)
    if not are_named(select):
        accepts: Callable[[str, nn.Module], bool] = (
            select if callable(select) else lambda name, module: True
        )

        def chosen(name: str, module: nn.Module) -> bool:
            return name not in skipped and accepts(name, module)

        uncovered = options.uncovered if measure_weights else "skip"
        weights, left_out = selected_layers(
            model,
            replace(options, layers=chosen, uncovered=uncovered),
            may_be_tied=True,
            required=False,
        )
        return weights, activation_modules(model, chosen), left_out
    names = names_of(select)
    modules = activation_modules(model)
    activations = {name: modules[name] for name in names if name in modules}
    others = [name for name in names if name not in modules]
    weights = (
        selected_layers(model, replace(options, layers=others), may_be_tied=True)[0]
        if others
        else {}
    )
    return weights, activations, {}


def _signature(model: nn.Module) -> list[tuple[int, ...]]:
    """Changes with every in-place change of a parameter, and with every backward pass.

    Values are not compared: that would take a copy of the model.
    """
    return [
        (p._version, *(() if p.grad is None else (id(p.grad), p.grad._version)))
        for p in model.parameters()
    ]


def _skipped(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a gradient scaler made this step do nothing; fused optimizers are called all the
    same.
    """
    found_inf = getattr(optimizer, "found_inf", None)
    return found_inf is not None and bool(found_inf)


def _take_out(hooks: dict[int, Callable], hook: Callable) -> None:
    """Removes a hook from an optimizer."""
    for number in [number for number, value in hooks.items() if value is hook]:
        del hooks[number]
