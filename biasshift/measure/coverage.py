"""What must hold before a number is believed, and why a layer cannot be measured.

Every example must have errors of its own, and every use of a weight must be a recorded call of its
layer: on the graph, with the examples in front, computing ``weight · input + bias``. What fails in
one layer is a reason, ``{name: reason}``, that follows "cannot be measured:". What concerns the
whole model is raised.
"""

import re
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from biasshift.measure import layer_types
from biasshift.measure.hooks import Call, Tape, output_hooks
from biasshift.measure.layer_types import WeightLayer
from biasshift.measure.options import Options
from biasshift.measure.sandbox import forward

Layers = Mapping[str, WeightLayer]
Reasons = dict[str, str]  # why a layer cannot be measured, by name


def refuse(modules: Mapping[str, nn.Module], reasons: Reasons) -> None:
    """Raises ValueError for the first layer that cannot be measured.

    The message has the layer's name, its type and the reason, and says that ``layers=`` can leave
    it out.
    """
    for name, why in reasons.items():
        raise ValueError(
            f"Layer '{name}' ({type(modules[name]).__name__}) cannot be measured: {why}. Leave it "
            "out with layers=."
        )


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
    reasons: Reasons = {}
    for sharers in owners.values():
        for layer, key in sharers.items():
            others = " and ".join(
                f"'{other}'"
                for other in sharers
                if other != layer and not layer.startswith(f"{other}." if other else "")
            )
            if others and layer in modules:
                reasons[layer] = (
                    f"its {key} is tied to that of {others}, and neither has a unit Fisher matrix "
                    "of its own"
                )
    return {name: reasons[name] for name in modules if name in reasons}


def _memory(parameter: Tensor) -> tuple[object, ...]:
    """Where a parameter lies: a transposed view of a weight is tied to it as well."""
    address = 0 if parameter.is_meta or not parameter.numel() else parameter.data_ptr()
    return (parameter.device, address) if address else (id(parameter),)


# -- the outputs -----------------------------------------------------------------------------------


class NonFiniteOutputs(ValueError):
    """The model's outputs on the probe are NaN or infinite.

    A diverged network has no errors to measure. Logs that measure during training catch this error
    and skip the step.
    """


def check_outputs(outputs: object, examples: int) -> Tensor:
    """Returns the model's outputs, where label rules can be applied to them.

    Args:
        outputs: what the model returned.
        examples: how many it was given.

    Raises:
        ValueError: for anything but one floating tensor, (batch, …, classes).
        NonFiniteOutputs: for NaN or infinity.
    """
    if not isinstance(outputs, Tensor) or not outputs.is_floating_point():
        raise ValueError(
            f"The model must return one floating tensor of outputs, got {type(outputs).__name__}: "
            "wrap it to return logits."
        )
    if outputs.dim() < 2 or len(outputs) != examples:
        raise ValueError(
            f"The model's outputs must be (batch, …, classes) for {examples} examples, got "
            f"{tuple(outputs.shape)}."
        )
    if not outputs.isfinite().all():
        raise NonFiniteOutputs(
            "The model's outputs hold NaN or infinity on the probe: its errors are undefined."
        )
    return outputs


def refuse_maps(calls: Mapping[str, list[Call]], modules: Layers, outputs: Tensor) -> None:
    """Raises ValueError where outputs are the maps of a convolution, with classes on axis 1.

    The head of a segmentation network returns such maps; their last axis, a position, would
    silently be taken for that of the classes.
    """
    for name, of_layer in calls.items():
        if not isinstance(modules[name], nn.Linear) and of_layer[-1].shape == outputs.shape:
            raise ValueError(
                f"The outputs {tuple(outputs.shape)} look like the maps of convolution '{name}', "
                "with the classes on axis 1; here they must come last. Wrap the model so that it "
                "returns outputs.movedim(1, -1)."
            )


# -- one forward pass ------------------------------------------------------------------------------


def unmeasurable(
    model: nn.Module,
    tape: Tape,
    modules: Layers,
    x: Tensor,
    outputs: Tensor,
    options: Options,
    first_batch: bool = True,
) -> Reasons:
    """Returns the layers that a recorded forward pass cannot measure, and why.

    Args:
        first_batch: also check what costs another forward pass.

    Raises:
        ValueError: for the model as a whole: outputs without gradients, or with the classes on
            axis 1, or outputs for an example that change with the other examples.
    """
    expand = options.weight_sharing == "expand"
    reasons = _unfit_calls(tape, modules, len(x), expand)
    if not outputs.requires_grad and not reasons:
        raise ValueError(
            "The model's outputs have no gradients: it computes or returns them detached, or "
            "inside torch.no_grad."
        )
    if options.likelihood == "categorical" and outputs.dim() > 2:
        refuse_maps(tape.calls, modules, outputs)
    if first_batch and outputs.requires_grad:
        for more in (
            _unrecorded_uses(tape, modules, outputs),
            _batch_dependent(model, tape, modules, x, outputs, expand),
        ):
            reasons |= more | reasons  # the first reason of a layer stands
    return reasons


def _unfit_calls(tape: Tape, modules: Layers, examples: int, expand: bool) -> Reasons:
    """Layers whose calls have no gradients, no axis of examples, or not one row per example."""
    reasons = dict(tape.refused)
    for name, calls in tape.calls.items():
        for call in calls:
            if not layer_types.is_batched(modules[name], call.a):
                why = f"it was called without an axis of examples, on {tuple(call.a.shape)}"
                reasons.setdefault(name, why)
            if not expand and len(call.a) != examples:
                reasons.setdefault(name, _why_folded(len(call.a), examples))
    return reasons


def _why_folded(rows: int, examples: int) -> str:
    return (
        f"it sees {rows} rows for {examples} example{'s' if examples > 1 else ''}, so its first "
        "axis is not the axis of examples (window attention folds positions into it, which "
        'weight_sharing="expand" can measure)'
    )


# -- the uses of the weights -----------------------------------------------------------------------


def _unrecorded_uses(tape: Tape, modules: Layers, outputs: Tensor) -> Reasons:
    """Layers whose weights take part in the outputs otherwise than by the recorded calls.

    The graph of autograd below the outputs tells how often each weight is used.
    """
    nodes, uses = _walk(outputs)
    reentrant = [node for node in nodes if node.name() == "CheckpointFunctionBackward"]
    behind = set[Node]().union(*(_walk(node)[0] for node in reentrant))
    reasons: Reasons = {}
    for name, module in modules.items():
        calls = tape.calls.get(name, [])
        reached = sum(call.edge.node in nodes for call in calls)
        # None behind a parametrization, which may use its own parameters more than once
        weight = module._parameters.get("weight")
        used = 0 if weight is None else uses[weight]
        if not calls and any(uses[p] for p in module.parameters()):
            reasons[name] = "it is not called as a module: its weight is used inside a function"
        elif weight is not None and used > reached:
            reasons[name] = (
                "its weight is also used inside a function, or in a gradient that the forward pass "
                f"takes: {used} uses, but {reached} calls of the module"
            )
        elif weight is not None and used < reached:
            reasons[name] = "it runs with weights that are not its own (a functional call)"
        elif any(call.edge.node in behind for call in calls):
            reasons[name] = (
                "it runs before a reentrant checkpoint, which autograd does not follow "
                "(use_reentrant=False would do)"
            )
    return reasons


def _walk(start: Tensor | Node) -> tuple[set[Node], Counter[Tensor]]:
    """All nodes below, and how often every parameter is used."""
    first = start.grad_fn if isinstance(start, Tensor) else start
    nodes, uses = {first} if first is not None else set[Node](), Counter[Tensor]()
    waiting = list(nodes)
    while waiting:
        for node, _ in waiting.pop().next_functions:
            if node is None:
                continue
            if type(node).__name__ == "AccumulateGrad":
                uses[node.variable] += 1  # pyright: ignore[reportAttributeAccessIssue]
            if node not in nodes:
                nodes.add(node)
                waiting.append(node)
    return nodes, uses


# -- the independence of the examples --------------------------------------------------------------


def _batch_dependent(
    model: nn.Module, tape: Tape, modules: Layers, x: Tensor, outputs: Tensor, expand: bool
) -> Reasons:
    """Layers that do not make one row of an example that runs alone, or not ``w a + w₀`` of it.

    An axis that grows with the examples is theirs. Where a model cannot run on one example, all but
    one must do.

    Raises:
        ValueError: for the model as a whole, when its outputs for an example change with the
            others, or are random.
    """
    random_states = _random_states(x)
    examples, alone, rows, reasons = _run_alone(model, modules, x)
    runs = [(torch.arange(examples), alone), *_run_among_others(model, x, examples)]
    if not all(map(torch.equal, random_states, _random_states(x))):
        where = _first_difference(model, x, runs[0][0])
        raise ValueError(
            f"The model draws random numbers{where}: no example has an error of its own. Call "
            "model.eval() first."
        )
    for chosen, returned in runs:
        if not _agree(outputs[chosen].detach(), returned):
            where = _first_difference(model, x, chosen)
            raise ValueError(
                f"An example's outputs change with the rest of its batch, or by the call{where}: "
                "it has no error of its own."
            )
    for name in tape.calls:
        row_counts = rows.get(name, set())
        if not expand and not row_counts:
            reasons[name] = "whether it is called depends on the other examples"
        elif not expand and row_counts != {examples}:
            reasons[name] = _why_folded(max(row_counts), examples)
    return reasons


def _run_alone(
    model: nn.Module, modules: Layers, x: Tensor
) -> tuple[int, Tensor, dict[str, set[int]], Reasons]:
    """How many examples ran, their outputs, the row counts of every layer, and unfit layers.

    Unfit are layers that do not compute ``weight · input + bias``.
    """
    rows: dict[str, set[int]] = {}
    reasons: Reasons = {}

    def record(name: str, module: nn.Module, a: Tensor, output: Tensor) -> None:
        if not layer_types.is_batched(modules[name], a):
            # after a squeeze: another size of batch may keep the axis
            raise ValueError(f"Layer '{name}' was called without an axis of examples.")
        rows.setdefault(name, set()).add(len(a))
        if why := why_not_affine(modules[name], a, output):
            reasons[name] = why

    for count in sorted({1, max(len(x) - 1, 1), len(x)}):
        rows.clear()
        try:
            with torch.no_grad(), output_hooks(modules, record, raw=True):
                alone = forward(model, x[:count])
                return count, alone, rows, reasons
        except Exception:  # a model for one size of batch: what it raises depends on the model
            if count == len(x):
                raise
    raise AssertionError("x is not empty")


def _run_among_others(model: nn.Module, x: Tensor, examples: int) -> list[tuple[Tensor, Tensor]]:
    """Which examples ran in other batches, as indices, and their outputs.

    The last ones alone show what depends on earlier examples, and a few in reverse order what
    depends on places in between. A model for one size of batch runs on all in reverse order, and on
    batches that hold nothing but the first example, or the last.
    """
    every, last = torch.arange(len(x)), len(x) - 1
    few = torch.tensor(sorted({0, last // 2, last}, reverse=True))
    filled = (torch.full_like(every, i) for i in (0, last))

    def run(batches: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
        outputs = []
        for chosen in batches:
            with suppress(Exception), torch.no_grad():  # a model for some sizes of batch
                outputs.append((chosen, forward(model, x[chosen])))
        return outputs

    runs = run([every[-examples:], few]) if examples <= last else []
    return runs if len(runs) == 2 or not last else runs + run([every.flip(0), *filled])


def _random_states(x: Tensor) -> list[Tensor]:
    return [torch.get_rng_state()] + ([torch.cuda.get_rng_state(x.device)] if x.is_cuda else [])


def _first_difference(model: nn.Module, x: Tensor, chosen: Tensor) -> str:
    """The first module whose output for the chosen examples differs between two runs, in words."""
    runs: list[list[tuple[str, Tensor | None]]] = []

    def record(name: str, module: nn.Module, a: Tensor, output: Tensor) -> None:
        has_rows = output.dim() > 0 and len(output) == len(part)
        runs[-1].append((name, output.clone() if has_rows else None))

    with torch.no_grad(), output_hooks(dict(model.named_modules()), record):
        for part in (x, x[chosen]):
            runs.append([])
            forward(model, part, runs[-1].clear)
    for (name, in_batch), (_, alone) in zip(*runs, strict=False):
        if name and in_batch is not None and alone is not None and in_batch.is_floating_point():
            if not _agree(in_batch[chosen], alone):
                return f", first seen at '{name}'"
    return ""


# -- weight · input + bias -------------------------------------------------------------------------


def why_not_affine(module: WeightLayer, a: Tensor, output: Tensor) -> str | None:
    """Returns what is wrong with a layer whose own forward computed something else in this call.

    None stands for a layer with PyTorch's forward, or one that returned ``weight · input + bias``
    for the first example.
    """
    if not layer_types.has_own_forward(module) or _is_affine(module, a[:1], output[:1]):
        return None
    return (
        "its own forward does not return weight · input + bias, as that of "
        f"{layer_types.torch_class(module).__name__} does"
    )


def _is_affine(module: WeightLayer, a: Tensor, output: Tensor) -> bool:
    if not layer_types.is_batched(module, a) or output.dim() != a.dim():
        return False
    try:
        inputs = layer_types.patches(module, a, output.shape)
        weights = layer_types.weights(module).unflatten(0, (inputs.shape[2], -1)).to(inputs)
        net = torch.einsum("npgi,gui->npgu", inputs, weights).flatten(2)
        returned = layer_types.errors(module, output[None])[0]
    except RuntimeError:  # a padding of its own: the sizes do not fit
        return False
    net = net if module.bias is None else net + module.bias
    return _agree(returned, net)


def _agree(x: Tensor, y: Tensor) -> bool:
    """Equal up to rounding, which deep models magnify: kernels depend on the size of the batch."""
    tolerance = torch.finfo(x.dtype).eps ** (1 / 3)
    return x.shape == y.shape and bool((x - y).abs().max() <= tolerance * x.abs().max())
