"""Every example must have errors of its own: proof by running some of them without the others.

An axis that grows with the examples is theirs. What a layer reads for an example must be what it
reads for that example alone, wherever its layout puts it.
"""

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from biasshift.measure import layer_types
from biasshift.measure.examples import Inputs, tensors
from biasshift.measure.hooks import Tape, call_hooks, output_hooks
from biasshift.measure.layer_types import WeightLayer
from biasshift.measure.layouts import Layout
from biasshift.measure.random_state import draws
from biasshift.measure.sandbox import forward

Layers = Mapping[str, WeightLayer]
Layouts = dict[str, list[Layout]]  # by layer, one for every call
Reasons = dict[str, str]  # why a layer cannot be measured, by name
Read = Callable[[Any, int], Tensor]  # what the model returned for so many examples → its outputs


def batch_dependent(
    model: nn.Module, tape: Tape, modules: Layers, x: Inputs, outputs: Tensor, read: Read
) -> tuple[Reasons, list[str]]:
    """Returns layers without rows of every example, and those whose examples are not in front.

    The first are unfit: they do not compute ``weight · input + bias``, or are not called for an
    example alone. Where a model cannot run on one example, all but one must do.

    Args:
        outputs: of all examples.
        read: makes outputs of what the model returned for some of them.

    Raises:
        ValueError: for the model as a whole, when its outputs for an example change with the
            others, or are random.
    """
    random_states = _random_states(x)
    examples, alone, rows, reasons = _run_alone(model, modules, x)
    reasons |= _not_affine(model, modules, x)
    runs = [(torch.arange(examples), alone), *_run_among_others(model, x, examples)]
    if not all(map(torch.equal, random_states, _random_states(x))) and draws(model, x):
        where = _first_difference(model, x, runs[0][0])
        raise ValueError(
            f"The model draws random numbers{where}: no example has an error of its own. Call "
            "model.eval() first."
        )
    for chosen, returned in runs:
        if not agree(outputs[chosen].detach(), _outputs(read, returned, len(chosen))):
            where = _first_difference(model, x, chosen)
            raise ValueError(
                f"An example's outputs change with the rest of its batch, or by the call{where}: "
                "it has no error of its own."
            )
    elsewhere = []
    for name, calls in tape.calls.items():
        row_counts = rows.get(name, set())  # none where it is called for other examples only
        if row_counts != {examples} or any(len(call.a) != len(x) for call in calls):
            elsewhere.append(name)
    return reasons, elsewhere


def refuse_coupled_gradients(tape: Tape, modules: Layers, outputs: Tensor, where: Layouts) -> None:
    """Raises ValueError where the errors of one example reach the net inputs of others.

    Outputs may not change with the other examples and their gradients all the same, as in ``x + m −
    m.detach()`` with the mean m of a batch.

    Args:
        outputs: of all examples, on the graph.
        where: the layouts of layers whose examples are not in front.
    """
    calls = [
        (name, call, layout)
        for name, of_layer in tape.calls.items()
        for call, layout in zip(
            of_layer, where.get(name, [Layout.FIRST] * len(of_layer)), strict=True
        )
        if layout.fits(modules[name], call.a, len(outputs))
    ]
    for example in sorted({0, len(outputs) - 1}) if len(outputs) > 1 and calls else ():
        seed = torch.zeros_like(outputs)
        generator = torch.Generator().manual_seed(0)
        seed[example] = torch.randn(seed[example].shape, generator=generator).to(seed)
        edges = [call.edge for _, call, _ in calls]
        deltas = torch.autograd.grad(outputs, edges, seed, retain_graph=True, allow_unused=True)
        for (name, _, layout), delta in zip(calls, deltas, strict=True):
            if delta is None:
                continue
            errors = layer_types.errors(modules[name], delta[None])[0]
            sizes = layout.arrange(errors, 0, len(outputs)).abs().flatten(1).amax(1)
            others = torch.cat([sizes[:example], sizes[example + 1 :]])
            if others.max() > torch.finfo(sizes.dtype).eps ** 0.5 * sizes[example]:
                raise ValueError(
                    f"The errors of an example reach other examples at '{name}', though its "
                    "outputs do not change with them: it has no error of its own."
                )


def layouts(
    model: nn.Module, tape: Tape, modules: Layers, x: Inputs, names: list[str]
) -> tuple[Layouts, Reasons]:
    """Returns where layers have their examples, and the reasons for those where it is unknown.

    What the first and the last example read alone must stand in the batch where the layout says.
    """
    if len(x) == 1:  # all rows are those of the one example
        return {name: [Layout.ONLY] * len(tape.calls[name]) for name in names}, {}
    some = {name: modules[name] for name in names}
    alone = {i: _inputs_alone(model, some, x, i) for i in (0, len(x) - 1)}
    found: Layouts = {}
    reasons: Reasons = {}
    for name in names:
        calls, inputs = tape.calls[name], {i: read.get(name, []) for i, read in alone.items()}
        if any(len(of_example) != len(calls) for of_example in inputs.values()):
            reasons[name] = "how often it is called depends on the other examples"
            continue
        fitting = [
            [
                layout
                for layout in Layout
                if layout is not Layout.ONLY
                and layout.fits(modules[name], call.a, len(x))
                and all(_same(layout.of_example(call.a, i, len(x)), inputs[i][k]) for i in inputs)
            ]
            for k, call in enumerate(calls)
        ]
        # A hidden state of zeros fits every layout, and has that of the other steps.
        of_all = [layout for layout in fitting[0] if all(layout in of_call for of_call in fitting)]
        fitting = [of_all if len(of_call) > 1 else of_call for of_call in fitting]
        if all(len(of_call) == 1 for of_call in fitting):
            found[name] = [of_call[0] for of_call in fitting]
        else:
            rows = max(len(call.a) for call in calls)
            reasons[name] = why_not_in_front(rows, len(x))
    return found, reasons


def _outputs(read: Read, returned: Any, examples: int) -> Tensor:
    """The outputs of some examples; none where they are not such as all examples had."""
    try:
        return read(returned, examples)
    except ValueError:
        return torch.empty(0)


def why_not_in_front(rows: int, examples: int) -> str:
    """Returns the reason of a layer whose rows cannot be told apart by examples."""
    return (
        f"it sees {rows} rows for {examples} example{'s' if examples > 1 else ''}, so its first "
        'axis is not the axis of examples (weight_sharing="expand" can measure it)'
    )


def _inputs_alone(
    model: nn.Module, modules: Layers, x: Inputs, index: int
) -> dict[str, list[Tensor]]:
    """What layers read, call by call, when one example runs alone; nothing where it cannot."""
    read: dict[str, list[Tensor]] = {}

    def record(name: str, module: nn.Module, a: Tensor, output: Tensor) -> None:
        read.setdefault(name, []).append(a.detach().clone())

    with suppress(Exception), torch.no_grad(), call_hooks(modules, record):
        forward(model, x[index : index + 1], read.clear)
        return read
    return {}


def _same(x: Tensor, y: Tensor) -> bool:
    return x.shape == y.shape and agree(x, y)


def _run_alone(
    model: nn.Module, modules: Layers, x: Inputs
) -> tuple[int, Any, dict[str, set[int]], Reasons]:
    """How many examples ran, their outputs, the row counts of every layer, and unfit layers.

    Unfit are layers whose weights are not their own.
    """
    rows: dict[str, set[int]] = {}
    reasons: Reasons = {}

    def record(name: str, module: nn.Module, a: Tensor, output: Tensor) -> None:
        if not layer_types.is_batched(modules[name], a):
            # after a squeeze: another size of batch may keep the axis
            raise ValueError(f"Layer '{name}' was called without an axis of examples.")
        rows.setdefault(name, set()).add(len(a))
        if own[name] != _identities(modules[name]):
            reasons[name] = "it runs with weights that are not its own (a functional call)"

    own = {name: _identities(module) for name, module in modules.items()}
    for count in sorted({1, max(len(x) - 1, 1), len(x)}):
        rows.clear()
        try:
            with torch.no_grad(), call_hooks(modules, record):
                alone = forward(model, x[:count])
                return count, alone, rows, reasons
        except Exception:  # a model for one size of batch: what it raises depends on the model
            if count == len(x):
                raise
    raise AssertionError("x is not empty")


def _not_affine(model: nn.Module, modules: Layers, x: Inputs) -> Reasons:
    """The layers whose own forward computes something else for one of the examples.

    It takes all: for an input of zeros, such as that of a padding, many functions agree.
    """
    own = {name: m for name, m in modules.items() if layer_types.has_own_forward(m)}
    reasons: Reasons = {}

    def record(name: str, module: nn.Module, a: Tensor, output: Tensor) -> None:
        if why := why_not_affine(own[name], a, output):
            reasons[name] = why

    if own:
        with torch.no_grad(), call_hooks(own, record):
            forward(model, x)
    return reasons


def _identities(module: nn.Module) -> list[int]:
    return [id(layer_types.parameter(module, key)) for key in ("weight", "bias")]


def _run_among_others(model: nn.Module, x: Inputs, examples: int) -> list[tuple[Tensor, Any]]:
    """Which examples ran in other batches, as indices, and what the model returned.

    The last ones alone show what depends on earlier examples, and a few in reverse order what
    depends on places in between. A model for one size of batch runs on all in reverse order, and on
    batches that hold nothing but the first example, or the last.
    """
    every, last = torch.arange(len(x)), len(x) - 1
    few = torch.tensor(sorted({0, last // 2, last}, reverse=True))
    filled = (torch.full_like(every, i) for i in (0, last))

    def run(batches: list[Tensor]) -> list[tuple[Tensor, Any]]:
        outputs = []
        for chosen in batches:
            with suppress(Exception), torch.no_grad():  # a model for some sizes of batch
                outputs.append((chosen, forward(model, x[chosen])))
        return outputs

    runs = run([every[-examples:], few]) if examples <= last else []
    return runs if len(runs) == 2 or not last else runs + run([every.flip(0), *filled])


def _random_states(x: Inputs) -> list[Tensor]:
    on_cuda = {t.device for t in tensors(x) if t.is_cuda}
    return [torch.get_rng_state(), *map(torch.cuda.get_rng_state, on_cuda)]


def _first_difference(model: nn.Module, x: Inputs, chosen: Tensor) -> str:
    """The first module whose output for the chosen examples differs between two runs, in words."""
    runs: list[dict[str, list[Tensor | None]]] = []  # by module, call by call

    def record(name: str, module: nn.Module, a: Tensor, output: Tensor) -> None:
        has_rows = output.dim() > 0 and len(output) == len(part)
        runs[-1].setdefault(name, []).append(output.clone() if has_rows else None)

    with torch.no_grad(), output_hooks(dict(model.named_modules()), record):
        for part in (x, x[chosen]):
            runs.append({})
            forward(model, part, runs[-1].clear)
    together, apart = runs
    for name, calls in together.items():  # of a loop over examples, there may be fewer calls
        for in_batch, alone in zip(calls, apart.get(name, []), strict=False):
            if name and in_batch is not None and alone is not None and in_batch.is_floating_point():
                if not agree(in_batch[chosen], alone):
                    return f", first seen at '{name}'"
    return ""


# -- weight · input + bias -------------------------------------------------------------------------


def why_not_affine(module: WeightLayer, a: Tensor, output: Tensor) -> str | None:
    """Returns what is wrong with a layer whose own forward computed something else in this call.

    None stands for a layer with PyTorch's forward, or one that returned ``weight · input + bias``
    for the first row, the last, and that with the largest input.
    """
    if not layer_types.has_own_forward(module):
        return None
    if layer_types.is_batched(module, a) and len(a) == len(output) > 0:
        rows = sorted({0, len(a) - 1, int(a.flatten(1).abs().amax(1).argmax())})
        if _is_affine(module, a[rows], output[rows]):
            return None
    return (
        "its own forward does not return weight · input + bias, as that of "
        f"{layer_types.torch_class(module).__name__} does"
    )


def _is_affine(module: WeightLayer, a: Tensor, output: Tensor) -> bool:
    if output.dim() != a.dim():
        return False
    try:
        inputs = layer_types.patches(module, a, output.shape)
        weights = layer_types.weights(module).unflatten(0, (inputs.shape[2], -1)).to(inputs)
        net = torch.einsum("npgi,gui->npgu", inputs, weights).flatten(2)
        returned = layer_types.errors(module, output[None])[0]
    except RuntimeError:  # a padding of its own: the sizes do not fit
        return False
    net = net if module.bias is None else net + module.bias
    return agree(returned, net)


def agree(x: Tensor, y: Tensor) -> bool:
    """Tells whether numbers are equal up to rounding, which deep models magnify.

    Kernels depend on the size of the batch.
    """
    tolerance = torch.finfo(x.dtype).eps ** (1 / 3)
    if x.shape != y.shape or not x.numel():
        return x.shape == y.shape
    return bool((x - y).abs().max() <= tolerance * x.abs().max())
