"""A model's outputs in whatever it returns, and the axis of the classes in them."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node

from biasshift.measure import layer_types
from biasshift.measure.layer_types import WeightLayer

OutputChoice = str | int | Callable[[Any], Tensor] | None
KEYS = ("logits", "out")  # as transformers and torchvision's segmentation networks return them
NORMALIZED = 1e-3  # how far sums of probabilities may be from 1
INDICES = 3  # of an axis, whose outputs are sent backwards


class NonFiniteOutputs(ValueError):
    """The model's outputs on the probe are NaN or infinite.

    A diverged network has no errors to measure. Logs that measure during training catch this error
    and skip the step.
    """


def chosen_output(returned: Any, output: OutputChoice = None) -> Any:
    """Returns the outputs among what a model returned.

    By default these are the tensor itself, the ``logits`` or ``out`` of an object or a dict, or the
    only tensor of a tuple or a dict.

    Args:
        output: a key, the name of an attribute, an index, or a function of what was returned.

    Raises:
        ValueError: where there is no such output, or several and none is chosen.

    >>> chosen_output({"features": torch.ones(1), "logits": torch.zeros(1)})
    tensor([0.])
    """
    if callable(output):
        return output(returned)
    if output is not None:
        return _named(returned, output)
    if isinstance(returned, Tensor):
        return returned
    for key in KEYS:
        value = returned.get(key) if isinstance(returned, Mapping) else getattr(returned, key, None)
        if isinstance(value, Tensor):
            return value
    parts = returned if isinstance(returned, tuple | list) else None
    parts = list(returned.values()) if isinstance(returned, Mapping) else parts
    if parts is not None and len(parts) == 1 and isinstance(parts[0], Tensor):
        return parts[0]
    raise ValueError(
        f"The model must return one tensor of outputs, got {_described(returned)}. Choose one with "
        "output=: a key, an index, or a function of what is returned."
    )


def _named(returned: Any, output: str | int) -> Any:
    try:
        if isinstance(returned, Mapping):
            return returned[output]
        if isinstance(output, int) and isinstance(returned, tuple | list):
            return returned[output]
        if isinstance(output, str):
            return getattr(returned, output)
    except (KeyError, IndexError, AttributeError):
        pass
    raise ValueError(
        f"'output' must be a key, an attribute or an index of what the model returns, got "
        f"{output!r} for {_described(returned)}."
    )


def _described(returned: Any) -> str:
    kind = type(returned).__name__
    if isinstance(returned, Mapping):
        return f"{kind} with the keys {', '.join(map(repr, returned))}"
    return f"{kind} of {len(returned)}" if isinstance(returned, tuple | list) else kind


def check_outputs(outputs: object, examples: int, class_axis: int = -1) -> Tensor:
    """Returns the model's outputs with the classes last, where label rules can be applied to them.

    Args:
        outputs: what `chosen_output` returned.
        examples: how many the model was given.
        class_axis: that of the classes in ``outputs``.

    Raises:
        ValueError: for anything but one floating tensor with the examples in front, and for an axis
            that it does not have.
        NonFiniteOutputs: for NaN or infinity.
    """
    if not isinstance(outputs, Tensor) or not outputs.is_floating_point():
        raise ValueError(
            f"The model must return one floating tensor of outputs, got {type(outputs).__name__}: "
            "wrap it to return logits, or choose them with output=."
        )
    if outputs.dim() < 2 or len(outputs) != examples:
        raise ValueError(
            f"The model's outputs must be (batch, …, classes) for {examples} examples, got "
            f"{tuple(outputs.shape)}."
        )
    if not -outputs.dim() < class_axis < outputs.dim() or class_axis == 0:
        raise ValueError(
            f"'class_axis' must be an axis behind the examples of outputs {tuple(outputs.shape)}, "
            f"got {class_axis}."
        )
    if not outputs.isfinite().all():
        raise NonFiniteOutputs(
            "The model's outputs hold NaN or infinity on the probe: its errors are undefined."
        )
    return classes_last(outputs, class_axis)


def classes_last(outputs: Tensor, class_axis: int) -> Tensor:
    """Returns the outputs with the axis of the classes behind all others, as a view."""
    return outputs if class_axis in (-1, outputs.dim() - 1) else outputs.movedim(class_axis, -1)


# -- the axis of the classes -----------------------------------------------------------------------


def refuse_other_axes(
    outputs: Tensor, heads: Iterable[tuple[WeightLayer, GradientEdge]], likelihood: str
) -> None:
    """Raises ValueError where the classes are not on the last axis, or it cannot be told.

    Every class has units of its own in the layer that the outputs come from, and every position has
    them all. So errors sent back from one index of an axis reach other units than those from
    another index, if it is that of the classes. Outputs that are normalized tell by their sums.

    Args:
        outputs: on the graph, as the model returned them.
        heads: layers with units, and the gradient edges of their net inputs.
        likelihood: only ``"categorical"`` has classes.
    """
    last = outputs.dim() - 1
    if likelihood != "categorical" or last < 2 or not outputs.requires_grad:
        return
    axes = _normalized_axes(outputs) or _axes_of_units(outputs, list(heads))
    if axes == [last]:
        return
    shape = f"(batch, {', '.join(map(str, outputs.shape[1:]))})"
    if len(axes) == 1:
        raise ValueError(
            f"The outputs {shape} have their classes on axis {axes[0]}, not on the last. Give "
            f"class_axis={axes[0]}."
        )
    where = " or ".join(map(str, axes or range(1, last + 1)))
    raise ValueError(
        f"The outputs {shape} may have their classes on axis {where}. Say which with class_axis=, "
        f"for example class_axis={last} for the last."
    )


def _normalized_axes(outputs: Tensor) -> list[int]:
    """Axes along which outputs are probabilities that sum to 1, or their logarithms."""
    x = outputs.detach().double()
    as_logs = [k for k in range(1, x.dim()) if _near(x.logsumexp(k), 0.0) and x.shape[k] > 1]
    if as_logs or x.min() < 0:
        return as_logs
    return [k for k in range(1, x.dim()) if _near(x.sum(k), 1.0) and x.shape[k] > 1]


def _near(x: Tensor, value: float) -> bool:
    return bool((x - value).abs().max() < NORMALIZED)


def _axes_of_units(outputs: Tensor, layers: list[tuple[WeightLayer, GradientEdge]]) -> list[int]:
    """Axes whose indices depend on different units of the layers that the outputs come from."""
    first = _first_met(outputs, {edge.node for _, edge in layers})
    heads = [(module, edge) for module, edge in layers if edge.node in first]
    if not heads:
        return []
    return [
        axis
        for axis in range(1, outputs.dim())
        if outputs.shape[axis] > 1 and _has_units_of_its_own(outputs, axis, heads)
    ]


def _has_units_of_its_own(
    outputs: Tensor, axis: int, heads: list[tuple[WeightLayer, GradientEdge]]
) -> bool:
    size, reached = outputs.shape[axis], 0
    taken: list[Tensor | None] = [None] * len(heads)
    generator = torch.Generator().manual_seed(0)
    for index in sorted({0, size - 1, size // 2})[:INDICES]:
        seed = torch.zeros_like(outputs)
        values = torch.randn(seed.select(axis, index).shape, generator=generator)
        seed.select(axis, index).copy_(values)
        edges = [edge for _, edge in heads]
        deltas = torch.autograd.grad(outputs, edges, seed, retain_graph=True, allow_unused=True)
        for i, ((module, _), delta) in enumerate(zip(heads, deltas, strict=True)):
            if delta is None:
                continue
            units = layer_types.errors(module, delta[None]).flatten(0, -2).ne(0).any(0)
            before = taken[i]
            if before is not None and bool((units & before).any()):
                return False
            taken[i] = units if before is None else units | before
            reached += bool(units.any())
    return reached > 1


def _first_met(outputs: Tensor, nodes: set[Node]) -> set[Node]:
    """The nodes that the graph below the outputs meets first, none of them behind another."""
    start = outputs.grad_fn
    waiting, visited, met = [start], {start}, set[Node]()
    while waiting:
        node = waiting.pop()
        if node is None:
            continue
        if node in nodes:
            met.add(node)
            continue
        new = {n for n, _ in node.next_functions if n is not None} - visited
        visited |= new
        waiting += new
    return met


def all_heads(model: nn.Module) -> dict[str, WeightLayer]:
    """Returns all modules that may be the one that the outputs come from, by name."""
    return {name: m for name, m in model.named_modules() if layer_types.is_covered(m)}
