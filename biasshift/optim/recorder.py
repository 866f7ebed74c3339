"""What an optimizer overhears of somebody's training: sums over the examples of every forward pass
whose loss went backwards.

A pass counts when the model ran in training mode with gradients enabled, and a backward pass
reached its outputs. Its incoming activations come from forward hooks, its errors from one backward
pass of our own at labels drawn from the model, before the user's frees the graph (``"sampled"``),
or from the user's backward pass itself (``"empirical"``).
"""

from collections.abc import Iterable, Mapping
from functools import partial
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from biasshift.measure import layer_types, likelihoods
from biasshift.measure.hooks import Call, Tape, add_output_hook
from biasshift.measure.layer_types import WeightLayer
from biasshift.measure.likelihoods import Likelihood
from biasshift.optim.passes import Divisor, Pass, RecordedCall, WeakHook
from biasshift.optim.running_sums import RunningSums, batch_sums
from biasshift.optim.update_rule import UpdateRule


class Recorder:
    """The hooks of one optimizer on one model, and the passes since its last step."""

    def __init__(
        self,
        root: nn.Module,
        layers: Mapping[str, WeightLayer],
        rule: UpdateRule,
        generator: torch.Generator,
        distributed: bool,
    ) -> None:
        self.root, self.layers, self.rule, self.generator, self.distributed = (
            root,
            layers,
            rule,
            generator,
            distributed,
        )
        self.due = True  # whether the curvature of the present step's passes is wanted
        self.references: dict[str, Tensor] = {}
        self._passes: list[Pass] = []
        self._tape: Tape | None = None
        self._divisor = Divisor(rule)
        # the last to register runs first, so that a layer that is the whole model is recorded
        # before its pass ends
        self._handles = [
            root.register_forward_pre_hook(WeakHook(self, "_start")),
            add_output_hook("", root, WeakHook(self, "_stop"), raw=True),
        ]
        self._handles += [
            add_output_hook(name, module, WeakHook(self, "_record"), raw=True)
            for name, module in layers.items()
        ]

    def remove(self) -> None:
        while self._handles:
            self._handles.pop().remove()

    def forget(self) -> None:
        """Drops the passes whose gradients have been dropped."""
        self._passes.clear()

    def take(self) -> tuple[float, dict[str, RunningSums]]:
        """How many examples the gradients are of, and the sums of every layer over them; a fresh
        start.
        """
        passes, self._passes = self._passes, []
        if any(one.heard for one in passes):
            self._read_errors(passes)
        sums: dict[str, RunningSums] = {}
        for one in passes:
            for name, new in one.sums.items():
                if new.reference is not self.references.get(name):  # from before a state was loaded
                    continue
                if name in sums:
                    sums[name].add(new)
                else:
                    sums[name] = new
        examples = float(sum(one.examples for one in passes))
        if self.distributed:
            for name in (
                name for name in self.layers if name in sums
            ):  # in the same order everywhere
                sums[name].all_reduce()
            if self.rule.reduction == "sum":  # gradients are means over the processes
                count = torch.tensor(examples, device=next(self.root.parameters()).device)
                dist.all_reduce(count)
                examples = count.item() / dist.get_world_size()
        return examples, sums if _are_finite(sums) else {}

    # -- hooks -------------------------------------------------------------------------------------

    def _start(self, module: nn.Module, args: object) -> None:
        if module is self.root:  # not a replica
            self._tape = Tape() if module.training and torch.is_grad_enabled() else None

    def _record(self, name: str, module: nn.Module, a: Tensor, output: Tensor) -> Tensor | None:
        """What the module returns in place of a view: the tape's copy, whose gradient edge an
        in-place change would not replace.
        """
        layer = self.layers[name]
        if (
            self._tape is not None
            and self.due
            and module is layer
            and layer.weight.requires_grad
            and output.requires_grad
        ):
            return self._tape.record(name, module, a, output)
        return None

    def _stop(self, name: str, module: nn.Module, a: Tensor, output: Tensor) -> None:
        tape, self._tape = (
            self._tape,
            None,
        )  # what a checkpoint computes again in the backward pass is not recorded
        if (
            tape is None
            or module is not self.root
            or not output.requires_grad
            or not output.numel()
        ):
            return
        found = Pass(len(output) if output.dim() else 1)
        if tape.calls:
            with torch.autocast(output.device.type, enabled=False):
                self._hear(found, tape.calls, output)
        edge = get_gradient_edge(output)
        edge.node.register_prehook(partial(self._use, found, edge.output_nr))

    def _use(self, found: Pass, output: int, gradients: tuple[Tensor | None, ...]) -> None:
        """The user's backward pass has reached the outputs: only now the pass counts. Others go
        with their graph.
        """
        if found.outputs is not None:
            found.outputs.keep(output, gradients)
        if found not in self._passes:
            self._passes.append(found)

    def _hear(self, found: Pass, calls: Mapping[str, list[Call]], output: Tensor) -> None:
        found.heard = {
            name: [RecordedCall(call.a, call.version, call.shape) for call in some]
            for name, some in calls.items()
        }
        flat = [
            (call.edge, heard)
            for name, some in calls.items()
            for call, heard in zip(some, found.heard[name], strict=True)
        ]
        if self.rule.needs_errors:
            self._check_outputs(output, calls)
        if self.rule.needs_errors and self.rule.labels == "empirical":
            found.outputs = RecordedCall(output.detach(), output._version, output.shape)
            for edge, heard in flat:
                edge.node.register_prehook(partial(heard.keep, edge.output_nr))
            return
        if self.rule.needs_errors:
            # no label can be drawn from NaN; a pass that overflowed has NaN errors all the same,
            # and a gradient scaler skips it
            drawn_from = output.detach().nan_to_num()
            rule = likelihoods.seeds(
                drawn_from,
                cast(Likelihood, self.rule.likelihood),
                "sampled",
                None,
                self.generator,
            )
            edges = [edge for edge, _ in flat]
            deltas = torch.autograd.grad(
                output, edges, rule.make(0, 1)[0], retain_graph=True, allow_unused=True
            )
            for (_, heard), delta in zip(flat, deltas, strict=True):
                heard.delta = delta
        self._read(found, 1.0)

    # -- from what was heard to sums ---------------------------------------------------------------

    @torch.no_grad()
    def _read(self, found: Pass, factor: float) -> None:
        for name, calls in found.heard.items():
            module = self.layers[name]
            self._check_calls(name, calls, found.examples)
            a = _side_by_side(
                [layer_types.patches(module, heard.a, heard.shape) for heard in calls]
            )
            a = a.to(layer_types.dtype_of_sums(a))
            self._check_positions(name, a)
            delta = None
            if self.rule.needs_errors:
                came = [
                    a.new_zeros(heard.shape) if heard.delta is None else heard.delta
                    for heard in calls
                ]
                delta = _side_by_side(
                    [layer_types.errors(module, one[None])[0] for one in came]
                ).to(a.dtype)
                delta = delta if factor == 1 else factor * delta
            if self.rule.weight_sharing == "expand":
                a, delta = (
                    a.flatten(0, 1)[:, None],
                    None if delta is None else delta.flatten(0, 1)[:, None],
                )
            found.sums[name] = batch_sums(
                a, delta, self._reference(name, a), self.rule, found.examples
            )
        found.heard = {}

    def _reference(self, name: str, a: Tensor) -> Tensor:
        if name not in self.references:
            reference = a.mean((0, 1))
            if self.distributed:
                dist.broadcast(reference, 0)
            self.references[name] = reference.double()
        return self.references[name]

    def _read_errors(self, passes: list[Pass]) -> None:
        """The errors of the user's losses, times what their mean has divided them by."""
        heard = [one for one in passes if one.heard]
        factor = self._divisor.of(heard)
        for one in heard:
            with torch.autocast(next(self.root.parameters()).device.type, enabled=False):
                self._read(one, factor)
            one.outputs = None

    # -- refusals ----------------------------------------------------------------------------------

    def _check_outputs(self, output: Tensor, calls: Mapping[str, list[Call]]) -> None:
        if output.dim() < 2 or not output.is_floating_point():
            raise ValueError(
                "The model must return floating outputs (batch, …, classes) in training, got "
                f"{tuple(output.shape)} {output.dtype}."
            )
        if self.rule.likelihood == "categorical" and output.dim() > 2:
            for name, some in calls.items():
                if not isinstance(self.layers[name], nn.Linear) and some[-1].shape == output.shape:
                    raise ValueError(
                        f"The outputs {tuple(output.shape)} look like the maps of convolution "
                        f"'{name}', with the classes on axis 1; here "
                        "they must come last. Wrap the model so that it returns outputs.movedim(1, "
                        "-1)."
                    )

    def _check_positions(self, name: str, a: Tensor) -> None:
        if (
            self.rule.keeps_examples(a.shape[3])
            and a.shape[1] > 1
            and self.rule.weight_sharing == "per_example"
        ):
            raise ValueError(
                f"Layer '{name}' has {a.shape[3]} inputs a unit and sees {a.shape[1]} positions an "
                "example, whose errors add up: its "
                'matrices would be needed. Use weight_sharing="expand", scale="diagonal", or raise '
                "max_dense_inputs."
            )

    def _check_calls(self, name: str, calls: Iterable[RecordedCall], examples: int) -> None:
        for heard in calls:
            if heard.a._version != heard.version:
                raise ValueError(
                    f"Layer '{name}': what came in was changed in place after it was read. Write h "
                    "= h + u for h += u."
                )
            if not layer_types.is_batched(self.layers[name], heard.a):
                raise ValueError(
                    f"Layer '{name}' was called without an axis of examples, on "
                    f"{tuple(heard.a.shape)}."
                )
            if self.rule.weight_sharing == "per_example" and len(heard.a) != examples:
                raise ValueError(
                    f"Layer '{name}' sees {len(heard.a)} rows for {examples} examples: its first "
                    "axis is not that of the examples. "
                    'weight_sharing="expand" takes every position by itself.'
                )


def _are_finite(sums: Mapping[str, RunningSums]) -> bool:
    """Whether no pass has overflowed: running sums would never recover."""
    parts = [
        part
        for one in sums.values()
        for name in ("total", "weight", "first", "second")
        for part in one.parts.get(name, ())
    ]
    checked = [part.sum(dtype=torch.float64) for part in parts]
    return not checked or bool(torch.stack(checked).isfinite().all())


def _side_by_side(parts: list[Tensor]) -> Tensor:
    """Several calls of a layer, on the axis of positions."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)
