"""What must hold before a number is believed, and why a layer cannot be measured.

Every example must have errors of its own, and every use of a weight must be a recorded call of its
layer: on the graph, with the examples in front, computing ``weight · input + bias``. What fails in
one layer is a reason, ``{name: reason}``, that follows "cannot be measured:". What concerns the
whole model is raised.
"""

import re
import sys
import warnings
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import Node

from biasshift.measure import layer_types
from biasshift.measure.examples import Inputs
from biasshift.measure.hooks import Call, Tape, output_hooks, traced
from biasshift.measure.independence import (
    Layers,
    Layouts,
    Reasons,
    batch_dependent,
    layouts,
    refuse_coupled_gradients,
    why_not_in_front,
)
from biasshift.measure.layer_types import Selection, WeightLayer, weight_layers
from biasshift.measure.layouts import Layout
from biasshift.measure.options import Options
from biasshift.measure.outputs import all_heads, chosen_output, refuse_other_axes
from biasshift.measure.parts import LinearPart
from biasshift.measure.sandbox import forward

Uses = defaultdict[Tensor, Counter[tuple[int, int]]]  # parameter → rows (from, to) → how often
BY_FUNCTION = "it is not called as a module: its weight is used inside a function"
NAMED = 4  # layers with their reasons in one warning
# What PyTorch makes of a weight before it reads it, as autograd names it.
_VIEWS = re.compile(
    "(T|Transpose|Permute|View|UnsafeView|ReshapeAlias|Alias|Slice|Unsqueeze|Squeeze|Expand|ToCopy)"
    r"Backward\d*$"
)


class UncoveredWarning(UserWarning):
    """Layers with units were left out of a measurement, because they cannot be measured."""


def refuse(modules: Mapping[str, nn.Module], reasons: Reasons) -> None:
    """Raises ValueError for the first layer that cannot be measured.

    The message has the layer's name, its type and the reason, and says how to leave it out.
    """
    for name, why in reasons.items():
        raise ValueError(
            f"Layer '{name}' ({type(modules[name]).__name__}) cannot be measured: {why}. Leave it "
            "out with skip= or layers=."
        )


def warn_of_left_out(model: nn.Module, reasons: Reasons, stacklevel: int = 4) -> None:
    """Warns once of all layers that a measurement leaves out, with their names and reasons.

    Warns:
        UncoveredWarning: where there are any.
    """
    if not reasons:
        return
    named = layer_types.named_modules(model)
    shown = [
        f"'{name}' ({type(named[name]).__name__}): {why}."
        for name, why in list(reasons.items())[:NAMED]
    ]
    more = f" And {len(reasons) - NAMED} more." if len(reasons) > NAMED else ""
    warnings.warn(
        f"Layers that cannot be measured are left out. {' '.join(shown)}{more} "
        'Name them in skip= to silence this, or make it an error by uncovered="raise".',
        UncoveredWarning,
        stacklevel=stacklevel,
    )


# -- which layers ----------------------------------------------------------------------------------


def are_named(select: Selection) -> bool:
    """Tells whether layers were asked for by their names, and so must be measured."""
    return select is not None and not callable(select)


def names_of(select: Selection) -> list[str]:
    """Returns the names among a selection by names."""
    if select is None or callable(select):
        return []
    return [select] if isinstance(select, str) else list(select)


def selected_layers(
    model: nn.Module, options: Options, may_be_tied: bool = False, required: bool = True
) -> tuple[dict[str, WeightLayer], Reasons]:
    """Returns the layers to measure, and the reasons for those that are left out.

    Args:
        may_be_tied: also return layers whose weights are another module's too.
        required: whether a model without a layer that can be measured is an error.

    Raises:
        ValueError: for a model without layers, an unknown name, and for a layer that cannot be
            measured where its name was given, or ``uncovered="raise"`` is set.
    """
    named = layer_types.named_modules(model)
    skipped = skipped_names(model, options.skip)
    reasons: Reasons = {}
    if are_named(options.layers):
        names = names_of(options.layers)
        modules = weight_layers(model, [name for name in names if name not in skipped])
    else:
        accepts = options.layers if callable(options.layers) else lambda name, module: True

        def chosen(name: str, module: nn.Module) -> bool:
            if name in skipped or not accepts(name, module):
                return False
            why = layer_types.why_uncovered(module)
            if why is not None and options.uncovered == "skip":
                reasons[name] = why
            return why is None or options.uncovered == "raise"

        modules = weight_layers(model, chosen, required=False)
    for name, why in ({} if may_be_tied else tied(model, modules)).items():
        if are_named(options.layers) or options.uncovered == "raise":
            refuse(modules, {name: why})
        reasons[name] = why
    left = {name: module for name, module in modules.items() if name not in reasons}
    if not left and required:
        refuse(named, reasons)
        weight_layers(model, lambda name, module: name in modules)  # says that there is none
    return left, reasons


def skipped_names(model: nn.Module, skip: Selection) -> set[str]:
    """Returns the names of the modules that ``skip`` selects, and of all modules inside of them.

    Raises:
        ValueError: for a name that the model does not have.
    """
    if skip is None:
        return set()
    named = layer_types.named_modules(model)
    chosen = layer_types.selected_modules(model, named, skip, "module", named)
    return {
        name
        for name in named
        if any(name == outer or name.startswith(f"{outer}.") or not outer for outer in chosen)
    }


# -- the model before it runs ----------------------------------------------------------------------


def refuse_unusable(model: nn.Module) -> None:
    """Raises ValueError for parameters and buffers that autograd cannot use.

    These are tensors made inside ``torch.inference_mode``, and those on the meta device.
    """
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_inference():
            raise ValueError(
                f"'{name}' was made inside torch.inference_mode, and autograd cannot use it: build "
                "or load the model outside."
            )
        if tensor.is_meta:
            raise ValueError(
                f"'{name}' is on the meta device and holds no numbers: load the model's weights "
                "first."
            )


def refuse_coupled(model: nn.Module) -> None:
    """Raises ValueError where the examples of a batch influence each other, or the model is random.

    `coupled` says which modules do so in their present mode. The message names the first of them
    and says how to change it.
    """
    for name, why in coupled(model).items():
        raise ValueError(f"Layer '{name}' ({type(model.get_submodule(name)).__name__}) {why}.")


def coupled(model: nn.Module) -> Reasons:
    """Returns the modules that couple the examples of a batch, or are random, in their modes.

    Batch statistics, dropout and random slopes give no example an error of its own.

    >>> list(coupled(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Dropout(0.1))))
    ['1', '2']
    """
    reasons: Reasons = {}
    dropping = nn.modules.dropout._DropoutNd | nn.MultiheadAttention | nn.RNNBase
    for name, module in model.named_modules():
        why = None
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            if module.training or module.running_mean is None:
                why = "normalizes with the statistics of its batch, which couples the examples"
        elif module.training and isinstance(module, dropping):
            rate = getattr(module, "p", None) or getattr(module, "dropout", 0.0)
            why = "drops units at random" if float(rate) > 0 else None
        elif module.training and isinstance(module, nn.RReLU):
            why = "draws random slopes"
        if why:
            hint = "Call model.eval() first" if module.training else "Give it running statistics"
            reasons[name] = f"{why}: no example has an error of its own. {hint}"
    return reasons


def tied(model: nn.Module, modules: Layers) -> Reasons:
    """Returns the layers whose parameters belong to another module too.

    The gradient of such a parameter is a sum over both modules, and neither has a unit Fisher
    matrix of its own.
    """
    owners: dict[tuple[object, ...], dict[str, str]] = {}
    for name, module in model.named_modules():
        # A parametrized weight is kept in a module below its layer.
        layer = re.split(r"(?:^|\.)parametrizations\.", name)[0]
        for key, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(_memory(parameter), {}).setdefault(layer, key)
    parts = [(n, part) for n, part in modules.items() if isinstance(part, LinearPart)]
    reasons: Reasons = {}
    for sharers in owners.values():
        for layer, key in sharers.items():
            others = " and ".join(
                f"'{other}'"
                for other in sharers
                if other != layer and not layer.startswith(f"{other}." if other else "")
            )
            of_owner = [n for n, part in parts if n.rpartition(".")[0] == layer and part.reads(key)]
            for name in [layer, *of_owner] if others else ():
                reasons[name] = (
                    f"its {key} is tied to that of {others}, and neither has a unit Fisher matrix "
                    "of its own"
                )
    return {name: reasons[name] for name in modules if name in reasons}


def _memory(parameter: Tensor) -> tuple[object, ...]:
    """Where a parameter lies: a transposed view of a weight is tied to it as well."""
    address = 0 if parameter.is_meta or not parameter.numel() else parameter.data_ptr()
    return (parameter.device, address) if address else (id(parameter),)


# -- one forward pass ------------------------------------------------------------------------------


def unmeasurable(
    model: nn.Module,
    tape: Tape,
    modules: Layers,
    x: Inputs,
    outputs: Tensor,
    options: Options,
    where: Layouts,
    first_batch: bool = True,
) -> Reasons:
    """Returns the layers that a recorded forward pass cannot measure, and why.

    Args:
        outputs: with the classes last.
        where: the layouts of layers whose examples are not in front. The first batch adds them.
        first_batch: also check what costs another forward pass.

    Raises:
        ValueError: for the model as a whole: outputs without gradients, or with the classes on
            another axis, or outputs for an example that change with the other examples.
    """
    expand = options.weight_sharing == "expand"
    reasons = _unfit_calls(tape, modules)
    if not outputs.requires_grad and not reasons:
        raise ValueError(
            "The model's outputs have no gradients: it computes or returns them detached, or "
            "inside torch.no_grad."
        )
    if not first_batch:
        return reasons if expand else reasons | _moved_calls(tape, modules, len(x), where)
    if outputs.requires_grad:
        read = partial(_detached, options)
        unfit, elsewhere = batch_dependent(model, tape, modules, x, outputs, read)
        if options.class_axis == -1 and outputs.dim() > 2:
            _refuse_other_axes(model, x, options)
        found, unlike = layouts(model, tape, modules, x, elsewhere) if elsewhere else ({}, {})
        apart = {*reasons, *unlike}  # whose examples are not known
        if expand:  # every position by itself
            unlike: Reasons = {}
        else:
            where |= found
        cut_off = _before_quantizers(model, modules, x)
        for more in (_unrecorded_uses(tape, modules, outputs), cut_off, unfit, unlike):
            reasons |= more | reasons  # the first reason of a layer stands
        fit = {n: calls for n, calls in tape.calls.items() if n not in apart and n not in reasons}
        refuse_coupled_gradients(Tape(fit), modules, outputs, found)
    return reasons


def _detached(options: Options, returned: object, examples: int) -> Tensor:
    return options.outputs(returned, examples).detach()


def _refuse_other_axes(model: nn.Module, x: Inputs, options: Options) -> None:
    """Runs two examples with every layer recorded, those that are not measured included."""
    heads = all_heads(model)
    tape, returned = traced(model, heads, x[:2])
    edges = [(heads[name], call.edge) for name, calls in tape.calls.items() for call in calls]
    refuse_other_axes(chosen_output(returned, options.output), edges, options.likelihood)


def _unfit_calls(tape: Tape, modules: Layers) -> Reasons:
    """Layers whose calls have no gradients, or no axis of examples."""
    reasons = dict(tape.refused)
    for name, calls in tape.calls.items():
        for call in calls:
            if not layer_types.is_batched(modules[name], call.a):
                why = f"it was called without an axis of examples, on {tuple(call.a.shape)}"
                reasons.setdefault(name, why)
            elif not len(call.a):
                reasons.setdefault(name, "it was called on no rows, as an expert without examples")
    return reasons


def _moved_calls(tape: Tape, modules: Layers, examples: int, where: Layouts) -> Reasons:
    """Layers that have their examples elsewhere than in the first batch."""
    reasons: Reasons = {}
    for name, calls in tape.calls.items():
        layouts_of = where.get(name, [Layout.FIRST] * len(calls))
        if len(layouts_of) != len(calls) or not all(
            layout.fits(modules[name], call.a, examples)
            for layout, call in zip(layouts_of, calls, strict=True)
        ):
            reasons[name] = why_not_in_front(max(len(call.a) for call in calls), examples)
    return reasons


# -- the uses of the weights -----------------------------------------------------------------------


def _unrecorded_uses(tape: Tape, modules: Layers, outputs: Tensor) -> Reasons:
    """Layers whose weights take part in the outputs otherwise than by the recorded calls.

    The graph of autograd below the outputs tells how often each weight is used.
    """
    nodes, uses = _walk(outputs)
    reentrant = [node for node in nodes if node.name() == "CheckpointFunctionBackward"]
    behind = set[Any]().union(*(_walk(node)[0] for node in reentrant))
    ends = [node for node in nodes if node.name().endswith("NotImplemented")]
    cut_off = set[Any]().union(*(_walk(node)[0] for node in ends))
    reasons: Reasons = {}
    for name, module in modules.items():
        calls = tape.calls.get(name, [])
        reached = sum(call.edge.node in nodes for call in calls)
        # None behind a parametrization, which may use its own parameters more than once
        weight = layer_types.parameter(module, "weight")
        used = 0 if weight is None else _count(uses, module, weight)
        own = (layer_types.parameter(module, "bias"), *module.parameters())
        if not calls and (used or any(_count(uses, module, p) for p in own if p is not None)):
            kind = " (a packed sequence, or a forward of its own)"
            kind = kind if isinstance(module, LinearPart) else ""
            reasons[name] = f"{BY_FUNCTION}{kind}"
        elif weight is not None and used > reached:
            reasons[name] = (
                "its weight is also used inside a function, or in a gradient that the forward pass "
                f"takes: {used} uses, but {reached} calls of the module"
            )
        elif weight is not None and used < reached:
            reasons[name] = "it runs with weights that are not its own (a functional call)"
        elif weight is None and _reads_weights_apart(module, calls, outputs):
            reasons[name] = (
                "its weight is also used inside a function, or in a gradient that the forward pass "
                "takes"
            )
        elif any(call.edge.node in behind for call in calls):
            reasons[name] = (
                "it runs before a reentrant checkpoint, which autograd does not follow "
                "(use_reentrant=False would do)"
            )
        elif any(call.edge.node in cut_off for call in calls):
            reasons[name] = "it runs before an operation without a gradient, as of quantized layers"
    return reasons


def _reads_weights_apart(module: nn.Module, calls: list[Call], outputs: Tensor) -> bool:
    """Whether the outputs depend on a parametrized weight by another way than its recorded calls.

    The weight is computed of other parameters, which may be read more than once for one call.
    """
    own = {p for p in module.parameters() if p is not layer_types.parameter(module, "bias")}
    _, uses = _walk(outputs, stop={call.edge.node for call in calls})
    return not own.isdisjoint(uses)


def _before_quantizers(model: nn.Module, modules: Layers, x: Inputs) -> Reasons:
    """Layers whose outputs PyTorch's quantizers read, which detach what they return."""
    quantizers = {name: m for name, m in model.named_modules() if layer_types.is_quantizer(m)}
    if not quantizers:
        return {}
    tape, cut_off = Tape(), set[Any]()

    def record(name: str, module: nn.Module, a: Tensor, output: Tensor) -> Tensor | None:
        if name not in quantizers:
            return tape.record(name, module, a, output)
        if a.grad_fn is not None:
            cut_off.update(_walk(a)[0])
        return None

    with output_hooks({**modules, **quantizers}, record, raw=True):
        forward(model, x, tape.calls.clear)
    return {
        name: "it runs before an operation without a gradient, as of quantized layers"
        for name, calls in tape.calls.items()
        if any(call.edge.node in cut_off for call in calls)
    }


def _count(uses: Uses, module: nn.Module, p: Tensor) -> int:
    """How often a layer's rows of a parameter are used, alone or with others."""
    first, last = layer_types.row_range(module, p)
    return sum(n for (start, end), n in uses.get(p, {}).items() if start < last and first < end)


def _rows(node: Node) -> tuple[int, int]:
    """The rows of a parameter that a node reads: those of a slice, or all."""
    if not node.name().startswith("SliceBackward"):
        return 0, sys.maxsize
    dim, start, end = (getattr(node, f"_saved_{key}") for key in ("dim", "start", "end"))
    return (start, end) if dim == 0 and start >= 0 and end >= 0 else (0, sys.maxsize)


def _walk(start: Any, stop: Collection[Any] = ()) -> tuple[set[Any], Uses]:
    """All nodes below a tensor or node, and how often every parameter is used, by the rows read.

    What lies below the nodes of ``stop`` alone is not seen.
    """
    first = start.grad_fn if isinstance(start, Tensor) else start
    nodes, readers = {first} if first is not None else set(), defaultdict[Any, list[Any]](list)
    waiting = list(nodes)
    while waiting:
        above = waiting.pop()
        for node, _ in above.next_functions if above not in stop else ():
            if node is None:
                continue
            readers[node].append(above)
            if node not in nodes:
                nodes.add(node)
                waiting.append(node)
    uses = Uses(Counter)
    for node in nodes:
        if type(node).__name__ == "AccumulateGrad":
            for reader in readers[node]:
                uses[node.variable][_rows(reader)] += _readings(reader, readers)  # pyright: ignore[reportAttributeAccessIssue]
    return nodes, uses


def _readings(node: Any, readers: Mapping[Any, list[Any]]) -> int:
    """How often a parameter is read through a node: a view of it may be read several times.

    The gradient that a forward pass takes reads the view of the weight that the layer has made.
    """
    if not _VIEWS.match(node.name()) or node not in readers:
        return 1
    return sum(_readings(reader, readers) for reader in readers[node])
