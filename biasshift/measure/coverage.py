"""What must hold before a number is believed: every use of a weight is seen, on the graph and with
its examples in front.

What fails is said layer by layer, as ``{name: reason}``; what concerns the whole model is raised.
"""

import re
from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from biasshift.measure import layer_types
from biasshift.measure.hooks import Call, Tape, output_hooks
from biasshift.measure.layer_types import WeightLayer

Layers = Mapping[str, WeightLayer]
Reasons = dict[str, str]  # why a layer cannot be measured, by name


# -- whether examples are apart ----------------------------------------------------------------


def refuse_coupled(model: nn.Module) -> None:
    """Raises ValueError where examples of a batch influence each other, or the function is random:
    no example has its own error.
    """
    for name, why in coupled(model).items():
        raise ValueError(f"Layer '{name}' ({type(model.get_submodule(name)).__name__}) {why}")


def coupled(model: nn.Module) -> Reasons:
    """Modules that couple the examples of a batch, or draw random numbers, in their present mode."""
    reasons: Reasons = {}
    for name, module in model.named_modules():
        why = None
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (
            module.training or module.running_mean is None
        ):
            why = "normalizes with the statistics of its batch, which couples the examples"
        elif (
            isinstance(module, nn.modules.dropout._DropoutNd | nn.MultiheadAttention | nn.RNNBase)
            and module.training
        ):
            why = "drops units at random" if _drop_rate(module) > 0 else None
        elif isinstance(module, nn.RReLU) and module.training:
            why = "draws random slopes"
        if why:
            hint = "Call model.eval() first" if module.training else "Give it running statistics"
            reasons[name] = f"{why}: no example has an error of its own. {hint}."
    return reasons


def _drop_rate(module: nn.Module) -> float:
    return float(getattr(module, "p", None) or getattr(module, "dropout", 0.0))


def unproven(
    model: nn.Module, tape: Tape, modules: Layers, x: Tensor, outputs: Tensor, expand: bool
) -> Reasons:
    """Runs one example alone: it must make one row at every layer, give the same output, and every
    net input must be ``w a + w₀``.

    An axis that grows with the examples is theirs. Where a model cannot run on one example, all but
    one must do.

    Raises:
        ValueError: for the model as a whole, when its outputs for an example change with the
            others, or are random.
    """
    before = _random_states(x)
    examples, alone, rows, reasons = _run_fewer(model, modules, x)
    if any(
        not torch.equal(one, other) for one, other in zip(before, _random_states(x), strict=True)
    ):
        where = _first_difference(model, x, examples)
        raise ValueError(
            f"The model draws random numbers{where}: no example has an error of its own. Call "
            "model.eval() first."
        )
    if not _agree(outputs[:examples].detach(), alone):
        where = _first_difference(model, x, examples)
        raise ValueError(
            f"An example's outputs change with the rest of its batch, or by the call{where}: it "
            "has no error of its own."
        )
    for name in tape.calls:
        found = rows.get(name, set())
        if not expand and found != {examples}:
            reasons[name] = (
                folded(max(found), examples)
                if found
                else "whether it is called depends on the other examples"
            )
    return reasons


def folded(rows: int, examples: int) -> str:
    return (
        f"it sees {rows} rows for {examples} example{'s' if examples > 1 else ''}: its first axis "
        "is not the axis of examples "
        '(window attention folds positions into it, which weight_sharing="expand" can measure)'
    )


def _run_fewer(
    model: nn.Module, modules: Layers, x: Tensor
) -> tuple[int, Tensor, dict[str, set[int]], Reasons]:
    """How many examples were run, their outputs, the rows of every layer, and the layers that
    compute something else.
    """
    rows: dict[str, set[int]] = {}
    reasons: Reasons = {}

    def record(name: str, module: nn.Module, a: Tensor, output: Tensor) -> None:
        if not layer_types.is_batched(modules[name], a):
            raise ValueError(
                f"Layer '{name}' was called without an axis of examples."
            )  # a squeeze: another size of batch may keep it
        rows.setdefault(name, set()).add(len(a))
        if why := own_function(modules[name], a, output):
            reasons[name] = why

    for count in sorted({1, max(len(x) - 1, 1), len(x)}):
        rows.clear()
        try:
            with torch.no_grad(), output_hooks(modules, record, raw=True):
                return count, model(x[:count]), rows, reasons
        except Exception:  # a model for one size of batch: what it raises depends on the model
            if count == len(x):
                raise
    raise AssertionError("x is not empty")


def own_function(module: WeightLayer, a: Tensor, output: Tensor) -> str | None:
    """What to say of a layer whose forward was replaced, and computed something else in this call."""
    if not layer_types.has_own_forward(module) or _is_affine(module, a, output):
        return None
    return f"its own forward does not return weight · input + bias, as that of {layer_types.kind(module).__name__} does"


def _is_affine(module: WeightLayer, a: Tensor, output: Tensor) -> bool:
    """Whether ``weight · patch + bias`` is what a layer returned."""
    a, output = a[:1], output[:1]
    if not layer_types.is_batched(module, a) or output.dim() != a.dim():
        return False
    try:
        inputs = layer_types.patches(module, a, output.shape)
        net = torch.einsum(
            "npgi,gui->npgu",
            inputs,
            layer_types.weights(module).unflatten(0, (inputs.shape[2], -1)).to(inputs),
        ).flatten(2)
        found = layer_types.errors(module, output[None])[0]
    except RuntimeError:  # a padding of its own: the sizes do not fit
        return False
    net = net if module.bias is None else net + module.bias
    return net.shape == found.shape and _agree(found, net)


def _agree(one: Tensor, other: Tensor) -> bool:
    """Equal up to rounding, which deep models magnify: kernels depend on the size of the batch."""
    tolerance = torch.finfo(one.dtype).eps ** (1 / 3)
    return one.shape == other.shape and bool(
        (one - other).abs().max() <= tolerance * one.abs().max()
    )


def _random_states(x: Tensor) -> list[Tensor]:
    return [torch.get_rng_state()] + ([torch.cuda.get_rng_state(x.device)] if x.is_cuda else [])


def _first_difference(model: nn.Module, x: Tensor, examples: int) -> str:
    """The first module whose output for the first examples differs between two runs, in words."""
    runs: list[list[tuple[str, Tensor]]] = []
    named = dict(model.named_modules())
    for part in (x, x[:examples]):
        seen: list[tuple[str, Tensor]] = []

        def record(
            name: str,
            module: nn.Module,
            a: Tensor,
            output: Tensor,
            seen: list[tuple[str, Tensor]] = seen,
        ) -> None:
            if output.dim() > 0:
                seen.append((name, output[:examples].clone()))

        with torch.no_grad(), output_hooks(named, record):
            model(part)
        runs.append(seen)
    for (name, one), (_, other) in zip(*runs, strict=False):
        if name and one.is_floating_point() and not _agree(one, other):
            return f", first seen at '{name}'"
    return ""


def refuse(modules: Mapping[str, nn.Module], reasons: Reasons) -> None:
    """Raises ValueError for the first layer that cannot be measured."""
    for name, why in reasons.items():
        raise ValueError(
            f"Layer '{name}' ({type(modules[name]).__name__}) cannot be measured: {why}. Leave it "
            "out with layers=."
        )


# -- the model alone -------------------------------------------------------------------------------


def refuse_unusable(model: nn.Module) -> None:
    """Raises ValueError for parameters and buffers that autograd cannot use."""
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


def tied(model: nn.Module, modules: Layers) -> Reasons:
    """Layers whose parameters belong to another module too: the gradient of such a parameter is a
    sum over both.
    """
    owners: dict[tuple[object, ...], dict[str, str]] = {}
    for name, module in model.named_modules():
        layer = re.split(r"(?:^|\.)parametrizations\.", name)[
            0
        ]  # a parametrized weight is kept in a module below its layer
        for kind, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(_memory(parameter), {}).setdefault(layer, kind)
    reasons: Reasons = {}
    for shared in owners.values():
        for layer, kind in shared.items():
            others = " and ".join(
                f"'{other}'"
                for other in shared
                if other != layer and not layer.startswith(f"{other}." if other else "")
            )
            if others and layer in modules:
                reasons[layer] = (
                    f"its {kind} is tied to that of {others}, and neither has a unit Fisher matrix "
                    "of its own"
                )
    return {name: reasons[name] for name in modules if name in reasons}


def _memory(parameter: Tensor) -> tuple[object, ...]:
    """Where a parameter lies: a transposed view of a weight is tied to it as well."""
    address = 0 if parameter.is_meta or not parameter.numel() else parameter.data_ptr()
    return (parameter.device, address) if address else (id(parameter),)


# -- one forward pass ------------------------------------------------------------------------------


class NonFiniteOutputs(ValueError):
    """The model's outputs on the probe are NaN or infinite: a diverged network has no errors to
    measure.
    """


def check_outputs(outputs: object, examples: int) -> Tensor:
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


def unsound(
    model: nn.Module,
    tape: Tape,
    modules: Layers,
    x: Tensor,
    outputs: Tensor,
    expand: bool,
    categorical: bool,
    first_batch: bool = True,
) -> Reasons:
    """The layers that cannot be measured by this forward pass, and why. What costs another forward
    pass is done for the first batch.

    Raises:
        ValueError: for the model as a whole.
    """
    reasons = unfit_calls(tape, modules, len(x), expand)
    if not outputs.requires_grad and not reasons:
        raise ValueError(
            "The model's outputs have no gradients: it computes or returns them detached, or "
            "inside torch.no_grad."
        )
    if categorical and outputs.dim() > 2:
        refuse_maps(tape.calls, modules, outputs)
    if first_batch and outputs.requires_grad:
        for more in (
            unseen_uses(tape, modules, outputs),
            unproven(model, tape, modules, x, outputs, expand),
        ):
            reasons |= {name: why for name, why in more.items() if name not in reasons}
    return reasons


def refuse_maps(calls: Mapping[str, list[Call]], modules: Layers, outputs: Tensor) -> None:
    """Raises ValueError where outputs are the maps of a convolution, with classes on axis 1.

    The head of a segmentation network returns such maps; their last axis, a position, would
    silently be taken for that of the classes.
    """
    for name, of_layer in calls.items():
        if not isinstance(modules[name], nn.Linear) and of_layer[-1].shape == outputs.shape:
            raise ValueError(
                f"The outputs {tuple(outputs.shape)} look like the maps of convolution '{name}', "
                "with the classes on axis 1; here they "
                "must come last. Wrap the model so that it returns outputs.movedim(1, -1)."
            )


def unfit_calls(tape: Tape, modules: Layers, examples: int, expand: bool) -> Reasons:
    """Layers whose calls have no gradients, no axis of examples, or another number of rows than
    examples.
    """
    reasons = dict(tape.refused)
    for name, calls in tape.calls.items():
        for call in calls:
            if not layer_types.is_batched(modules[name], call.a):
                reasons.setdefault(
                    name, f"it was called without an axis of examples, on {tuple(call.a.shape)}"
                )
            if not expand and len(call.a) != examples:
                reasons.setdefault(name, folded(len(call.a), examples))
    return reasons


def unseen_uses(tape: Tape, modules: Layers, outputs: Tensor) -> Reasons:
    """Layers whose weights take part in the outputs otherwise than by the recorded calls, found by
    walking the graph of autograd.
    """
    nodes, uses = _walk(outputs)
    checkpoints = [
        node for node in nodes if node.name() == "CheckpointFunctionBackward"
    ]  # of the reentrant kind
    behind = set[Node]().union(*(_walk(node)[0] for node in checkpoints))
    reasons: Reasons = {}
    for name, module in modules.items():
        calls = tape.calls.get(name, [])
        reached = sum(call.edge.node in nodes for call in calls)
        weight = module._parameters.get(
            "weight"
        )  # None behind a parametrization, which may use its own parameters more than once
        used = 0 if weight is None else uses[weight]
        if not calls and any(uses[p] for p in module.parameters()):
            reasons[name] = "it is not called as a module: its weight is used inside a function"
        elif weight is not None and used > reached:
            reasons[name] = (
                f"its weight is also used inside a function: {used} uses, but {reached} calls of "
                "the module"
            )
        elif weight is not None and used < reached:
            reasons[name] = (
                "it runs with weights that are not its own parameters (a functional call)"
            )
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
