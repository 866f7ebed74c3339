"""What an optimizer overhears of somebody's training: sums over the examples of every forward pass whose loss went backwards.

A pass counts when the model ran in training mode with gradients enabled, and a backward pass reached its outputs. Its incoming
activations come from forward hooks, its errors from one backward pass of our own at labels drawn from the model, before the
user's frees the graph (``"sampled"``), or from the user's backward pass itself (``"empirical"``).
"""

import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from biasshift import labels as label_rules
from biasshift import layers as kinds
from biasshift import triangle
from biasshift.labels import Likelihood
from biasshift.layers import WeightLayer
from biasshift.tracing import Call, Tape, errors, watch

CHOICES = {
    "center": ("q", "p", "none"),
    "scale": ("full", "diagonal", "none"),
    "labels": ("sampled", "empirical"),
    "likelihood": label_rules.LIKELIHOODS,
    "reduction": ("mean", "sum"),
    "weight_sharing": ("per_example", "expand"),
}
VECTORS = 2**22  # elements of the errors times activations of shared weights that are formed at a time
SLACK = 0.05  # by which targets read off a gradient may leave [0, 1]: half precision gradients have two digits


@dataclass(frozen=True)
class Member:
    """One member of the family of updates, and how its curvature is estimated."""

    center: str
    scale: str
    labels: str
    likelihood: str
    reduction: str
    weight_sharing: str

    def __post_init__(self) -> None:
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, got {getattr(self, name)!r}.")

    @property
    def needs_errors(self) -> bool:
        """Whether δ² is read: for the mean under q, or for the scale c."""
        return self.center == "q" or self.scale != "none"

    @property
    def needs_sums(self) -> bool:
        return self.needs_errors or self.center == "p"


# -- sums over examples --------------------------------------------------------------------------------------------------


@dataclass
class Sums:
    """Uncentered sums of one layer about a reference, float64: what `Member` reads, and nothing else.

    ``total`` Σ (a − reference) (groups, inputs); ``weight`` Σ δ² (units,); ``first`` Σ δ² (a − reference) (units, inputs);
    ``second`` the same of the squares (units, inputs) or of the outer products, as the rows of `triangle`. Under the center p
    there is no ``first``, and ``second`` is Σ over positions, without weights, (groups, inputs) or (groups, inputs, inputs).
    """

    examples: float
    positions: float
    reference: Tensor  # (groups, inputs): products about the first batch's mean do not cancel
    parts: dict[str, list[Tensor]]

    def add(self, other: "Sums", decay: float = 1.0) -> None:
        """Decays these sums and adds others about the same reference, in place."""
        self.examples = decay * self.examples + other.examples
        self.positions = decay * self.positions + other.positions
        for name, mine in self.parts.items():
            for i, (x, y) in enumerate(zip(mine, other.parts[name], strict=True)):
                mine[i] = x.double().mul_(decay).add_(y)  # one batch of rows may be float32

    def all_reduce(self) -> None:
        """The sums over all processes, in place; their references must agree."""
        counts = torch.tensor([self.examples, self.positions], dtype=torch.float64, device=self.reference.device)
        for x in [counts, *(x for part in self.parts.values() for x in part)]:
            dist.all_reduce(x)
        self.examples, self.positions = counts.tolist()


def batch_sums(a: Tensor, delta: Tensor | None, reference: Tensor, member: Member, examples: int) -> Sums:
    """The sums of one batch: a (samples, positions, groups, inputs), delta (samples, positions, units).

    A sample is an example where its positions belong together, else a position: then there is one position a sample.
    """
    shifted = a - reference.to(a.dtype)
    parts = {"total": [shifted.sum((0, 1), dtype=torch.float64)]}
    if delta is not None:
        delta = delta.unflatten(2, (a.shape[2], -1))  # (samples, positions, groups, units of a group)
        whole = delta.sum(1)
        parts["weight"] = [whole.double().square().sum(0).flatten()]
        if member.center != "p":
            parts["first"] = [torch.einsum("ntgu,ntgi->gui", delta * whole[:, None], shifted).flatten(0, 1).double()]
    if member.scale != "none":
        parts["second"] = _shared_second(shifted, member) if member.center == "p" else _unit_second(shifted, delta, member)
    return Sums(float(examples), float(a.shape[0] * a.shape[1]), reference, parts)


def _shared_second(shifted: Tensor, member: Member) -> list[Tensor]:
    by_group = shifted.flatten(0, 1).transpose(0, 1)
    if member.scale == "diagonal":
        return [by_group.square().sum(1, dtype=torch.float64)]
    return [(by_group.mT @ by_group).double()]


def _unit_second(shifted: Tensor, delta: Tensor | None, member: Member) -> list[Tensor]:
    assert delta is not None
    samples, positions, groups, inputs = shifted.shape
    units, diagonal = groups * delta.shape[-1], member.scale == "diagonal"
    if positions == 1 and diagonal:
        return [torch.einsum("ngu,ngi->gui", delta[:, 0].square(), shifted[:, 0].square()).flatten(0, 1).double()]
    rows = [shifted.new_zeros(units, inputs, dtype=torch.float64)] if diagonal else triangle.zeros(units, inputs, shifted.device)
    if positions == groups == 1:
        triangle.add_weighted(rows, shifted[:, 0, 0], delta[:, 0, 0].square())
        return rows
    step = max(1, VECTORS // (units * inputs))
    for n in (slice(i, i + step) for i in range(0, samples, step)):
        vectors = torch.einsum("ntgu,ntgi->guni", delta[n], shifted[n]).flatten(0, 1)
        if diagonal:
            rows[0] += vectors.square().sum(1)
        else:
            triangle.add_outer(rows, vectors)
    return rows


# -- passes --------------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Heard:
    """One call of a layer, and the error that came back. It holds no part of the graph, whose nodes hold it."""

    a: Tensor
    version: int
    shape: torch.Size
    delta: Tensor | None = None

    def keep(self, output: int, gradients: tuple[Tensor | None, ...]) -> None:
        """A hook before a node of the graph; a second loss on the same outputs adds to the first."""
        gradient = gradients[output]
        if gradient is not None:
            self.delta = gradient.detach() if self.delta is None else self.delta + gradient.detach()


@dataclass(eq=False)
class Pass:
    """One forward pass: sums already formed, or what is needed to form them once the errors are there."""

    examples: int
    sums: dict[str, Sums] = field(default_factory=dict)
    heard: dict[str, list[Heard]] = field(default_factory=dict)
    outputs: Heard | None = None


class Listener:
    """The hooks of one optimizer on one model, and the passes since its last step."""

    def __init__(
        self, root: nn.Module, layers: Mapping[str, WeightLayer], member: Member, generator: torch.Generator, distributed: bool
    ) -> None:
        self.root, self.layers, self.member, self.generator, self.distributed = root, layers, member, generator, distributed
        self.due = True  # whether the curvature of the present step's passes is wanted
        self.references: dict[str, Tensor] = {}
        self._passes: list[Pass] = []
        self._tape: Tape | None = None
        self._divides_by: str | None = None  # of a mean loss, for empirical labels
        # the last to register runs first, so that a layer that is the whole model is recorded before its pass ends
        self._handles = [root.register_forward_pre_hook(_Ear(self, "_start")), watch("", root, _Ear(self, "_stop"), raw=True)]
        self._handles += [watch(name, module, _Ear(self, "_record"), raw=True) for name, module in layers.items()]

    def remove(self) -> None:
        while self._handles:
            self._handles.pop().remove()

    def forget(self) -> None:
        """Drops the passes whose gradients have been dropped."""
        self._passes.clear()

    def take(self) -> tuple[float, dict[str, Sums]]:
        """How many examples the gradients are of, and the sums of every layer over them; a fresh start."""
        passes, self._passes = self._passes, []
        if any(one.heard for one in passes):
            self._read_errors(passes)
        sums: dict[str, Sums] = {}
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
            for name in (name for name in self.layers if name in sums):  # in the same order everywhere
                sums[name].all_reduce()
            if self.member.reduction == "sum":  # gradients are means over the processes
                count = torch.tensor(examples, device=next(self.root.parameters()).device)
                dist.all_reduce(count)
                examples = count.item() / dist.get_world_size()
        return examples, sums if _are_finite(sums) else {}

    # -- hooks ---------------------------------------------------------------------------------------------------------

    def _start(self, module: nn.Module, args: object) -> None:
        if module is self.root:  # not a replica
            self._tape = Tape() if module.training and torch.is_grad_enabled() else None

    def _record(self, name: str, module: nn.Module, a: Tensor, output: Tensor) -> None:
        layer = self.layers[name]
        if self._tape is not None and self.due and module is layer and layer.weight.requires_grad and output.requires_grad:
            self._tape.record(name, module, a, output)

    def _stop(self, name: str, module: nn.Module, a: Tensor, output: Tensor) -> None:
        tape, self._tape = self._tape, None  # what a checkpoint computes again in the backward pass is not recorded
        if tape is None or module is not self.root or not output.requires_grad or not output.numel():
            return
        found = Pass(len(output) if output.dim() else 1)
        if tape.calls:
            with torch.autocast(output.device.type, enabled=False):
                self._hear(found, tape.calls, output)
        edge = get_gradient_edge(output)
        edge.node.register_prehook(partial(self._use, found, edge.output_nr))

    def _use(self, found: Pass, output: int, gradients: tuple[Tensor | None, ...]) -> None:
        """The user's backward pass has reached the outputs: only now the pass counts. Others go with their graph."""
        if found.outputs is not None:
            found.outputs.keep(output, gradients)
        if found not in self._passes:
            self._passes.append(found)

    def _hear(self, found: Pass, calls: Mapping[str, list[Call]], output: Tensor) -> None:
        found.heard = {name: [Heard(call.a, call.version, call.shape) for call in some] for name, some in calls.items()}
        flat = [(call.edge, heard) for name, some in calls.items() for call, heard in zip(some, found.heard[name], strict=True)]
        if self.member.needs_errors:
            self._check_outputs(output, calls)
        if self.member.needs_errors and self.member.labels == "empirical":
            found.outputs = Heard(output.detach(), output._version, output.shape)
            for edge, heard in flat:
                edge.node.register_prehook(partial(heard.keep, edge.output_nr))
            return
        if self.member.needs_errors:
            # no label can be drawn from NaN; a pass that overflowed has NaN errors all the same, and a gradient scaler skips it
            drawn_from = output.detach().nan_to_num()
            rule = label_rules.seeds(drawn_from, cast(Likelihood, self.member.likelihood), "sampled", None, self.generator)
            deltas = errors(output, [edge for edge, _ in flat], rule.make(0, 1), keep=True)
            for (_, heard), delta in zip(flat, deltas, strict=True):
                heard.delta = None if delta is None else delta[0]
        self._read(found, 1.0)

    # -- from what was heard to sums -------------------------------------------------------------------------------------

    @torch.no_grad()
    def _read(self, found: Pass, factor: float) -> None:
        for name, calls in found.heard.items():
            module = self.layers[name]
            self._check_calls(name, calls, found.examples)
            a = _side_by_side([kinds.patches(module, heard.a, heard.shape) for heard in calls])
            a = a.to(kinds.dtype_of_sums(a))
            delta = None
            if self.member.needs_errors:
                came = [a.new_zeros(heard.shape) if heard.delta is None else heard.delta for heard in calls]
                delta = factor * _side_by_side([kinds.errors(module, one[None])[0] for one in came]).to(a.dtype)
            if self.member.weight_sharing == "expand":
                a, delta = a.flatten(0, 1)[:, None], None if delta is None else delta.flatten(0, 1)[:, None]
            found.sums[name] = batch_sums(a, delta, self._reference(name, a), self.member, found.examples)
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
        factor = self._divisor(heard)
        for one in heard:
            with torch.autocast(next(self.root.parameters()).device.type, enabled=False):
                self._read(one, factor)
            one.outputs = None

    def _divisor(self, passes: list[Pass]) -> float:
        """The number that a mean loss divides by: the examples, or, as most losses of PyTorch do, all labels of all of them.

        Which of the two is read off the first step: the gradient of a negative log-likelihood by the outputs is prediction
        minus target, divided by that number, and a target lies between 0 and 1. Nothing can be proven for ``gaussian``.
        """
        if self.member.reduction == "sum":
            divisors = {"examples": 1.0}
        else:
            divisors = {"labels": sum(map(self._labels, passes)), "examples": float(sum(one.examples for one in passes))}
        if self._divides_by is None and self.member.likelihood == "gaussian":
            self._divides_by = "examples"
        if self._divides_by is None:
            self._divides_by = next((unit for unit, divisor in divisors.items() if self._is_possible(passes, divisor)), None)
        if self._divides_by is None:
            raise ValueError(
                f'The loss is not a {self.member.reduction} of {self.member.likelihood} negative log-likelihoods, as labels="empirical" '
                "needs: its gradient by the outputs leads to targets outside 0 … 1. Give reduction= as in the loss, divide the losses of "
                'accumulated batches by their number, do not scale it, or use labels="sampled".'
            )
        return divisors[self._divides_by]

    def _labels(self, one: Pass) -> float:
        assert one.outputs is not None
        outputs = one.outputs.a
        return float(outputs.numel() // outputs.shape[-1] if self.member.likelihood == "categorical" else outputs.numel())

    def _is_possible(self, passes: list[Pass], divisor: float) -> bool:
        for one in passes:
            assert one.outputs is not None
            outputs, gradient = one.outputs.a.double(), one.outputs.delta
            if gradient is None or one.outputs.a._version != one.outputs.version:
                continue
            p = outputs.softmax(-1) if self.member.likelihood == "categorical" else outputs.sigmoid()
            targets = p - divisor * gradient.double()
            total = targets.sum(-1) if self.member.likelihood == "categorical" else targets.new_ones(())
            if not ((targets > -SLACK).all() and (targets < 1 + SLACK).all() and ((total - 1).abs() < SLACK).all()):
                return False
        return True

    # -- refusals --------------------------------------------------------------------------------------------------------

    def _check_outputs(self, output: Tensor, calls: Mapping[str, list[Call]]) -> None:
        if output.dim() < 2 or not output.is_floating_point():
            raise ValueError(
                f"The model must return floating outputs (batch, …, classes) in training, got {tuple(output.shape)} {output.dtype}."
            )
        if self.member.likelihood == "categorical" and output.dim() > 2:
            for name, some in calls.items():
                if not isinstance(self.layers[name], nn.Linear) and some[-1].shape == output.shape:
                    raise ValueError(
                        f"The outputs {tuple(output.shape)} look like the maps of convolution '{name}', with the classes on axis 1; here "
                        "they must come last. Wrap the model so that it returns outputs.movedim(1, -1)."
                    )

    def _check_calls(self, name: str, calls: Iterable[Heard], examples: int) -> None:
        for heard in calls:
            if heard.a._version != heard.version:
                raise ValueError(f"Layer '{name}': what came in was changed in place after it was read. Write h = h + u for h += u.")
            if not kinds.is_batched(self.layers[name], heard.a):
                raise ValueError(f"Layer '{name}' was called without an axis of examples, on {tuple(heard.a.shape)}.")
            if self.member.weight_sharing == "per_example" and len(heard.a) != examples:
                raise ValueError(
                    f"Layer '{name}' sees {len(heard.a)} rows for {examples} examples: its first axis is not that of the examples. "
                    'weight_sharing="expand" takes every position by itself.'
                )


def _are_finite(sums: Mapping[str, Sums]) -> bool:
    """Whether no pass has overflowed: running sums would never recover."""
    checked = [x.isfinite().all() for one in sums.values() for name in ("total", "weight") for x in one.parts.get(name, ())]
    return not checked or bool(torch.stack(checked).all())


def _side_by_side(parts: list[Tensor]) -> Tensor:
    """Several calls of a layer, on the axis of positions."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


class _Ear:
    """A hook that keeps no optimizer alive, and hears nothing in a copied or unpickled model."""

    def __init__(self, listener: Listener, method: str) -> None:
        self._listener, self._method = weakref.ref(listener), method

    def __call__(self, *args: object) -> None:
        listener = self._listener()
        if listener is not None:
            getattr(listener, self._method)(*args)

    def __reduce__(self) -> tuple[Callable, tuple]:
        return _deaf_ear, ()


def _deaf_ear() -> Callable:
    return _hear_nothing


def _hear_nothing(*args: object) -> None:
    pass
