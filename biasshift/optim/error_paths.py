"""Which layers' errors cannot come back to their net inputs, though the outputs depend on them."""

from collections.abc import Iterator, Mapping

from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from biasshift.measure.hooks import Call
from biasshift.measure.layer_types import WeightLayer
from biasshift.optim.passes import Pass, UnfitLayer

REPLACED = (
    "has a gradient, but no error came back to its net inputs: a hook has replaced them, or a "
    "function uses its weights. Let the model go on with what the layer returns."
)
WITHOUT_GRADIENTS = (
    "has a gradient, but ran without gradients in the forward pass, so that no error came back to "
    "it. Use checkpoint(…, use_reentrant=False), or no function that computes the layer again."
)


def check_outputs(output: Tensor) -> None:
    """Raises ValueError for outputs that no label can be drawn from."""
    if output.dim() < 2 or not output.is_floating_point():
        raise ValueError(
            "The model must return floating outputs (batch, …, classes) in training, got "
            f"{tuple(output.shape)} {output.dtype}."
        )


def bypassed(
    layers: Mapping[str, WeightLayer], output: Tensor, calls: Mapping[str, list[Call]]
) -> list[str]:
    """Returns layers whose weights the outputs depend on, by another way than their net inputs.

    Without such a way a layer has no influence on the outputs, and δ² is 0.
    """
    start = get_gradient_edge(output).node
    reached, ahead = {start}, [start]
    while ahead:
        for node, _ in ahead.pop().next_functions:
            if node is not None and node not in reached:
                reached.add(node)
                ahead.append(node)
    missed = [
        name
        for name, of_layer in calls.items()
        if not any(call.edge.node in reached for call in of_layer)
    ]
    if not missed:
        return []
    leaves = {id(getattr(node, "variable", None)) for node in reached}
    return [name for name in missed if id(layers[name].weight) in leaves]


def without_errors(
    layers: Mapping[str, WeightLayer], passes: list[Pass], called_apart: set[str]
) -> list[UnfitLayer]:
    """Returns layers that δ² = 0 would give the plain gradient, though they have errors.

    Args:
        called_apart: Layers that ran outside of a pass, with gradients.
    """
    unfit = {layer.name: layer for layer in _without_errors(layers, passes, called_apart)}
    return list(unfit.values())


def _without_errors(
    layers: Mapping[str, WeightLayer], passes: list[Pass], called_apart: set[str]
) -> Iterator[UnfitLayer]:
    def has_gradient(name: str) -> bool:
        gradient = layers[name].weight.grad if name in layers else None
        return gradient is not None and bool(gradient.any())

    recorded = {name for of_pass in passes for name in (*of_pass.calls, *of_pass.sums)}
    for forward_pass in passes:
        for name in filter(has_gradient, forward_pass.bypassed):
            yield UnfitLayer(name, REPLACED)
        apart = (forward_pass.without_gradients & called_apart) - recorded
        for name in filter(has_gradient, sorted(apart)):
            yield UnfitLayer(name, WITHOUT_GRADIENTS)
