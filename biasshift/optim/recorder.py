"""What an optimizer records of a training loop: sums over the examples of every forward pass.

A pass counts when the model ran in training mode with gradients enabled, and a backward pass
reached its outputs. Its incoming activations come from forward hooks. Its errors come from one
backward pass of our own at labels drawn from the model, before the user's frees the graph
(``"sampled"``), or from the user's backward pass itself (``"empirical"``).
"""

import warnings
from collections.abc import Mapping
from functools import partial
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from biasshift.measure import likelihoods
from biasshift.measure.coverage import UncoveredWarning
from biasshift.measure.examples import Examples, arguments_as_given
from biasshift.measure.hooks import Call, Tape, WeakHook, add_output_hook
from biasshift.measure.layer_types import WeightLayer
from biasshift.measure.likelihoods import Likelihood
from biasshift.measure.outputs import all_heads, chosen_output, classes_last, refuse_other_axes
from biasshift.optim.divisor import Divisor, Share
from biasshift.optim.error_paths import bypassed, check_outputs, without_errors
from biasshift.optim.layer_sums import layer_sums
from biasshift.optim.passes import Pass, RecordedCall, UnfitLayer
from biasshift.optim.references import References
from biasshift.optim.running_sums import RunningSums
from biasshift.optim.together import are_finite, sums_of_rows
from biasshift.optim.update_rule import OutputRule, UpdateRule

# Passes after which one without gradients in any ``.grad`` says that they are nobody's: fewer may
# be added up elsewhere, and be put back before a step.
IDLE = 32
MOST_WAITING = 1024  # passes whose activations are kept until a step


class Recorder:
    """The hooks of one optimizer on one model, and the passes since its last step.

    While ``due`` is False, passes are counted and nothing else is recorded of them. ``references``
    are the points that the sums of every layer are about.

    Raises:
        ValueError: In the training loop, if a layer or the outputs do not fit the rule.
    """

    def __init__(
        self,
        root: nn.Module,
        layers: dict[str, WeightLayer],
        rule: UpdateRule,
        outputs: OutputRule,
        generator: torch.Generator,
        distributed: bool,
    ) -> None:
        self.root, self.layers, self.rule, self.outputs = root, layers, rule, outputs
        self.generator, self.distributed = generator, distributed
        self.due = True  # whether the curvature of the present step's passes is wanted
        self.references = References(distributed)
        self._passes: list[Pass] = []  # that wait for the step, since it tells the loss's divisor
        self._done: Pass | None = None  # what the others have recorded, together
        self._called_apart: set[str] = set()  # layers that ran outside of a pass, with gradients
        self._pass_count, self._period = 0, object()  # passes since the last step, and its mark
        self._tape: Tape | None = None
        self._divisor = Divisor(rule)
        # Layers that are not measured may be the ones that tell the axis of the classes.
        self._heads: list[tuple[WeightLayer, GradientEdge]] = []
        self._head_handles = (
            [
                add_output_hook(name, module, WeakHook(self, "_record_head"), raw=True)
                for name, module in all_heads(root).items()
                if name not in layers
            ]
            if rule.needs_errors and outputs.class_axis == -1
            else []
        )
        self._knows_axis = False
        # The last to register runs first, so that a layer that is the whole model is recorded
        # before its pass ends.
        self._handles = [
            root.register_forward_pre_hook(WeakHook(self, "_start")),
            root.register_forward_hook(WeakHook(self, "_stop"), with_kwargs=True, prepend=True),
            root.register_forward_hook(WeakHook(self, "_end"), always_call=True),
            *(
                add_output_hook(name, module, WeakHook(self, "_record"), raw=True)
                for name, module in layers.items()
            ),
        ]

    @property
    def is_recording(self) -> bool:
        """Whether the hooks are still on the model."""
        return bool(self._handles)

    @property
    def _reads_labels(self) -> bool:
        """Whether errors are those of the user's own backward pass."""
        return self.rule.needs_errors and self.rule.labels == "empirical"

    def remove(self) -> None:
        """Takes all hooks off the model. Calling it again does nothing."""
        for handles in (self._handles, self._head_handles):
            while handles:
                handles.pop().remove()

    def _record_head(self, name: str, module: nn.Module, a: Tensor, output: Tensor) -> None:
        if self._tape is not None and self.due and output.requires_grad and not output._is_view():
            self._heads.append((cast(WeightLayer, module), get_gradient_edge(output)))

    def forget(self) -> None:
        """Drops the passes of gradients that were dropped, as by ``zero_grad``."""
        self._begin_period()

    def take(self) -> tuple[float, dict[str, RunningSums]]:
        """Returns what the passes since the last call have recorded, and forgets it.

        Raises:
            ValueError: If a layer has a gradient that its errors cannot have made.

        Returns:
            How many examples the gradients are of, the mean over the processes where gradients are
            such means, and the sums of every layer over the examples of all processes. No sums
            where a pass has overflowed.
        """
        passes, called_apart = self._all_passes(), self._called_apart
        self._begin_period()
        self._check_errors(passes, called_apart)
        # These have waited for the errors of the user's losses.
        waiting = [forward_pass for forward_pass in passes if forward_pass.outputs is not None]
        if waiting:
            for forward_pass, share in zip(waiting, self._divisor.of(waiting), strict=True):
                if share.counted is not None:
                    forward_pass.left_out = forward_pass.examples - share.examples
                with torch.autocast(next(self.root.parameters()).device.type, enabled=False):
                    self._form_sums(forward_pass, share)
                forward_pass.outputs = None
        sums: dict[str, RunningSums] = {}
        owned: set[str] = set()
        for forward_pass in passes:
            for name, new in forward_pass.sums.items():
                # from before a state was loaded
                if name not in self.layers or new.reference is not self.references.known.get(name):
                    continue
                if name not in sums:
                    sums[name] = new
                    continue
                if name not in owned:  # a backward pass may come to the first pass once more
                    sums[name] = sums[name].own()
                    owned.add(name)
                sums[name].add(new)
        examples = float(sum(of_pass.examples - of_pass.left_out for of_pass in passes))
        if self.distributed:
            for name in self.layers:  # in the same order everywhere
                if name in sums:
                    sums[name].all_reduce()
            if self.rule.reduction == "sum":  # gradients are means over the processes
                count = torch.tensor(examples, device=next(self.root.parameters()).device)
                dist.all_reduce(count)
                examples = count.item() / dist.get_world_size()
        return examples, sums if are_finite(sums) else {}

    # -- hooks -------------------------------------------------------------------------------------

    def _start(self, module: nn.Module, args: object) -> None:
        if module is self.root:  # not a replica
            if self._pass_count >= IDLE and all(p.grad is None for p in self.root.parameters()):
                self._drop_unused()
            self._tape = Tape() if module.training and torch.is_grad_enabled() else None

    def _record(self, name: str, module: nn.Module, a: Tensor, output: Tensor) -> Tensor | None:
        """What the module returns in place of a view: the tape's copy, whose gradient edge an
        in-place change would not replace.
        """
        layer = self.layers.get(name)
        if layer is None or not self.due or module is not layer or not layer.weight.requires_grad:
            return None
        if self._tape is None:
            if output.requires_grad:
                self._called_apart.add(name)
            return None
        return self._tape.record(name, module, a, output)

    def _stop(self, module: nn.Module, args: tuple, kwargs: dict, returned: object) -> None:
        # What a checkpoint computes again in the backward pass is not recorded.
        tape, self._tape = self._tape, None
        heads, self._heads = self._heads, []
        if tape is None or module is not self.root:
            return
        if not self.layers and self.rule.reduction == "mean":  # else the examples are counted
            return
        output = chosen_output(returned, self.outputs.output)
        if not (output.requires_grad and output.numel()):
            return
        if tape.calls and self.rule.needs_errors:
            heads += [(self.layers[name], c.edge) for name in tape.calls for c in tape.calls[name]]
            self._check_axis(output, heads)
        forward_pass = Pass(float(len(output)) if output.dim() else 1.0)
        forward_pass.without_gradients = set(tape.refused)
        if tape.calls:
            with torch.autocast(output.device.type, enabled=False):
                self._take_calls(forward_pass, tape.calls, output, (args, kwargs))
        elif self._reads_labels and self.rule.reduction == "sum":  # how many examples it is of
            forward_pass.outputs = self._recorded(output)
        edge = get_gradient_edge(output)
        edge.node.register_prehook(partial(self._count, forward_pass, edge.output_nr))

    def _count(self, forward_pass: Pass, output: int, gradients: tuple[Tensor | None, ...]) -> None:
        """The user's backward pass has reached the outputs: only now the pass counts. Others go
        with their graph.
        """
        if forward_pass.outputs is not None:
            forward_pass.outputs.keep(output, gradients)
        if forward_pass.counted_in is self._period:
            return
        forward_pass.counted_in = self._period
        self._pass_count += 1
        if forward_pass.outputs is not None:
            self._passes.append(forward_pass)
        elif self._done is None:
            self._done = forward_pass.copied()
        else:
            self._done.add(forward_pass)
        if len(self._passes) > MOST_WAITING:
            del self._passes[0]

    def _drop_unused(self) -> None:
        """Drops passes whose gradients nobody keeps: the optimizer is idle, and others train.

        Their examples stay, which the gradient of a sum may be of all the same.
        """
        examples = sum(of_pass.examples - of_pass.left_out for of_pass in self._all_passes())
        self.forget()
        if self.rule.reduction == "sum":
            self._done = Pass(float(examples))

    def _all_passes(self) -> list[Pass]:
        return [*([] if self._done is None else [self._done]), *self._passes]

    def _begin_period(self) -> None:
        """Forgets what is recorded since the last step."""
        self._passes, self._done, self._called_apart = [], None, set()
        self._pass_count, self._period = 0, object()
        self._let_go()

    def _end(self, module: nn.Module, args: object, output: object) -> None:
        """Lets go of a pass that raised."""
        if module is self.root:
            self._let_go()

    def _let_go(self) -> None:
        self._tape = None
        self._heads.clear()

    def _take_calls(
        self,
        forward_pass: Pass,
        calls: Mapping[str, list[Call]],
        output: Tensor,
        given: tuple[tuple, dict],
    ) -> None:
        """Forms the sums of a pass, or has them wait for the user's errors."""
        edges, recorded = [], []
        for name, of_layer in calls.items():
            forward_pass.calls[name] = [
                RecordedCall(call.a, call.version, call.shape) for call in of_layer
            ]
            edges += [call.edge for call in of_layer]
            recorded += forward_pass.calls[name]
        if self.rule.needs_errors:
            check_outputs(output)
            if self._reads_labels:
                forward_pass.outputs = self._recorded(output)
                forward_pass.bypassed = bypassed(self.layers, output, calls)
                for edge, call in zip(edges, recorded, strict=True):
                    edge.node.register_prehook(partial(call.keep, edge.output_nr))
                return
            # No label can be drawn from NaN. A pass that overflowed has NaN errors all the same,
            # and a gradient scaler skips it.
            moved = classes_last(output, self.outputs.class_axis)
            drawn_from = moved.detach().nan_to_num()
            likelihood = cast(Likelihood, self.rule.likelihood)
            kept = self._counted(drawn_from, given)
            seeds = likelihoods.seeds(
                drawn_from, likelihood, "sampled", None, self.generator, mask=kept
            )
            deltas = torch.autograd.grad(
                moved, edges, seeds.make(0, 1)[0], retain_graph=True, allow_unused=True
            )
            for call, delta in zip(recorded, deltas, strict=True):
                call.delta = delta
            if any(delta is None for delta in deltas):
                forward_pass.bypassed = bypassed(self.layers, output, calls)
        self._form_sums(forward_pass, Share(1.0, None))

    def _recorded(self, output: Tensor) -> RecordedCall:
        """The outputs with the classes last, which a gradient is to come back to."""
        axis = self.outputs.class_axis
        moved = classes_last(output.detach(), axis)
        return RecordedCall(moved, output._version, moved.shape, class_axis=axis)

    def _counted(self, outputs: Tensor, given: tuple[tuple, dict]) -> Tensor | None:
        """The positions that count, by the user's function of what the model was called with."""
        if self.outputs.mask is None:
            return None
        args, kwargs = given
        x, labels = arguments_as_given(Examples(args, kwargs)), kwargs.get("labels")
        mask = torch.as_tensor(self.outputs.mask(x, labels), device=outputs.device).bool()
        likelihood = cast(Likelihood, self.rule.likelihood)
        return likelihoods.counted(outputs, likelihood, None, mask)

    def _check_axis(self, output: Tensor, heads: list[tuple[WeightLayer, GradientEdge]]) -> None:
        """Refuses classes that are elsewhere than on the last axis, at the first pass."""
        if not self._knows_axis and self.outputs.class_axis == -1:
            refuse_other_axes(output, heads, self.rule.likelihood)
        self._knows_axis = True
        while self._head_handles:
            self._head_handles.pop().remove()

    # -- from calls to sums ------------------------------------------------------------------------

    def _form_sums(self, forward_pass: Pass, of_pass: Share) -> None:
        """Errors that came back, times the divisor, are those of a sum over the examples."""
        forward_pass.sums |= sums_of_rows(
            forward_pass, of_pass, self.layers, self.rule, self.references
        )
        for name in forward_pass.calls:
            if name in forward_pass.sums or name not in self.layers:  # left out since
                continue
            try:
                forward_pass.sums[name] = layer_sums(
                    name, self.layers[name], forward_pass, of_pass, self.rule, self.references
                )
            except UnfitLayer as unfit:
                self._leave_out(unfit)
        forward_pass.calls = {}

    # -- refusals ----------------------------------------------------------------------------------

    def _leave_out(self, unfit: UnfitLayer) -> None:
        """Lets a layer take the plain gradient from now on, with a warning, or raises the error."""
        if self.outputs.uncovered == "raise":
            raise unfit
        warnings.warn(
            f"Layer '{unfit.name}' {unfit.why} It takes the plain gradient from now on.",
            UncoveredWarning,
            stacklevel=2,
        )
        del self.layers[unfit.name]

    def _check_errors(self, passes: list[Pass], called_apart: set[str]) -> None:
        """Refuses layers that δ² = 0 would give the plain gradient, though they have errors."""
        for layer in without_errors(self.layers, passes, called_apart):
            self._leave_out(layer)
