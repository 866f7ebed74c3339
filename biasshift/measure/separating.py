"""Whether examples are apart: no module couples those of a batch, and one example alone gives what it gives among others."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from biasshift.measure import layer_types as kinds
from biasshift.measure.hooks import Tape, watching
from biasshift.measure.layer_types import WeightLayer

Layers = Mapping[str, WeightLayer]
Reasons = dict[str, str]  # why a layer cannot be measured, by name


def refuse_coupled(model: nn.Module) -> None:
    """Raises ValueError where examples of a batch influence each other, or the function is random: no example has its own error."""
    for name, why in coupled(model).items():
        raise ValueError(f"Layer '{name}' ({type(model.get_submodule(name)).__name__}) {why}")


def coupled(model: nn.Module) -> Reasons:
    """Modules that couple the examples of a batch, or draw random numbers, in their present mode."""
    reasons: Reasons = {}
    for name, module in model.named_modules():
        why = None
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or module.running_mean is None):
            why = "normalizes with the statistics of its batch, which couples the examples"
        elif isinstance(module, nn.modules.dropout._DropoutNd | nn.MultiheadAttention | nn.RNNBase) and module.training:
            why = "drops units at random" if _drop_rate(module) > 0 else None
        elif isinstance(module, nn.RReLU) and module.training:
            why = "draws random slopes"
        if why:
            hint = "Call model.eval() first" if module.training else "Give it running statistics"
            reasons[name] = f"{why}: no example has an error of its own. {hint}."
    return reasons


def _drop_rate(module: nn.Module) -> float:
    return float(getattr(module, "p", None) or getattr(module, "dropout", 0.0))


def unproven(model: nn.Module, tape: Tape, modules: Layers, x: Tensor, outputs: Tensor, expand: bool) -> Reasons:
    """Runs one example alone: it must make one row at every layer, give the same output, and every net input must be ``w a + w₀``.

    An axis that grows with the examples is theirs. Where a model cannot run on one example, all but one must do.

    Raises:
        ValueError: for the model as a whole, when its outputs for an example change with the others, or are random.
    """
    before = _random_states(x)
    examples, alone, rows, reasons = _run_fewer(model, modules, x)
    if any(not torch.equal(one, other) for one, other in zip(before, _random_states(x), strict=True)):
        where = _first_difference(model, x, examples)
        raise ValueError(f"The model draws random numbers{where}: no example has an error of its own. Call model.eval() first.")
    if not _agree(outputs[:examples].detach(), alone):
        where = _first_difference(model, x, examples)
        raise ValueError(f"An example's outputs change with the rest of its batch, or by the call{where}: it has no error of its own.")
    for name in tape.calls:
        found = rows.get(name, set())
        if not expand and found != {examples}:
            reasons[name] = folded(max(found), examples) if found else "whether it is called depends on the other examples"
    return reasons


def folded(rows: int, examples: int) -> str:
    return (
        f"it sees {rows} rows for {examples} example{'s' if examples > 1 else ''}: its first axis is not the axis of examples "
        '(window attention folds positions into it, which weight_sharing="expand" can measure)'
    )


def _run_fewer(model: nn.Module, modules: Layers, x: Tensor) -> tuple[int, Tensor, dict[str, set[int]], Reasons]:
    """How many examples were run, their outputs, the rows of every layer, and the layers that compute something else."""
    rows: dict[str, set[int]] = {}
    reasons: Reasons = {}

    def watch(name: str, module: nn.Module, a: Tensor, output: Tensor) -> None:
        if not kinds.is_batched(modules[name], a):
            raise ValueError(f"Layer '{name}' was called without an axis of examples.")  # a squeeze: another size of batch may keep it
        rows.setdefault(name, set()).add(len(a))
        if why := own_function(modules[name], a, output):
            reasons[name] = why

    for count in sorted({1, max(len(x) - 1, 1), len(x)}):
        rows.clear()
        try:
            with torch.no_grad(), watching(modules, watch, raw=True):
                return count, model(x[:count]), rows, reasons
        except Exception:  # a model for one size of batch: what it raises depends on the model
            if count == len(x):
                raise
    raise AssertionError("x is not empty")


def own_function(module: WeightLayer, a: Tensor, output: Tensor) -> str | None:
    """What to say of a layer whose forward was replaced, and computed something else in this call."""
    if not kinds.has_own_forward(module) or _is_affine(module, a, output):
        return None
    return f"its own forward does not return weight · input + bias, as that of {kinds.kind(module).__name__} does"


def _is_affine(module: WeightLayer, a: Tensor, output: Tensor) -> bool:
    """Whether ``weight · patch + bias`` is what a layer returned."""
    a, output = a[:1], output[:1]
    if not kinds.is_batched(module, a) or output.dim() != a.dim():
        return False
    try:
        inputs = kinds.patches(module, a, output.shape)
        net = torch.einsum("npgi,gui->npgu", inputs, kinds.weights(module).unflatten(0, (inputs.shape[2], -1)).to(inputs)).flatten(2)
        found = kinds.errors(module, output[None])[0]
    except RuntimeError:  # a padding of its own: the sizes do not fit
        return False
    net = net if module.bias is None else net + module.bias
    return net.shape == found.shape and _agree(found, net)


def _agree(one: Tensor, other: Tensor) -> bool:
    """Equal up to rounding, which deep models magnify: kernels depend on the size of the batch."""
    tolerance = torch.finfo(one.dtype).eps ** (1 / 3)
    return one.shape == other.shape and bool((one - other).abs().max() <= tolerance * one.abs().max())


def _random_states(x: Tensor) -> list[Tensor]:
    return [torch.get_rng_state()] + ([torch.cuda.get_rng_state(x.device)] if x.is_cuda else [])


def _first_difference(model: nn.Module, x: Tensor, examples: int) -> str:
    """The first module whose output for the first examples differs between two runs, in words."""
    runs: list[list[tuple[str, Tensor]]] = []
    named = dict(model.named_modules())
    for part in (x, x[:examples]):
        seen: list[tuple[str, Tensor]] = []

        def watch(name: str, module: nn.Module, a: Tensor, output: Tensor, seen: list[tuple[str, Tensor]] = seen) -> None:
            if output.dim() > 0:
                seen.append((name, output[:examples].clone()))

        with torch.no_grad(), watching(named, watch):
            model(part)
        runs.append(seen)
    for (name, one), (_, other) in zip(*runs, strict=False):
        if name and one.is_floating_point() and not _agree(one, other):
            return f", first seen at '{name}'"
    return ""
