"""From gradients to updates: every parameter's own, before momentum and learning rate."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from biasshift.measure import layer_types
from biasshift.measure.layer_types import WeightLayer
from biasshift.optim.curvature import Curvature
from biasshift.optim.together import center_all
from biasshift.optim.update_rule import UpdateRule


def all_updates(
    group: Mapping[str, Any],
    layers: Mapping[str, WeightLayer],
    curvatures: Mapping[str, Curvature],
    rule: UpdateRule,
    factor: float,
) -> dict[Tensor, Tensor]:
    """Returns the update of every parameter that has a gradient.

    Args:
        group: The optimizer's parameters and options.
        layers: Those that have a curvature, and others, by name.
        factor: What gradients are multiplied with, to be those of the mean loss.

    Raises:
        ValueError: If a W has no inverse and the damping is 0.
    """
    updates = {
        p: p.grad if factor == 1 else p.grad * factor for p in group["params"] if p.grad is not None
    }
    together: dict[str, tuple[Tensor, Tensor]] = {}
    for name, curvature in curvatures.items():
        layer = layers[name]
        weight, bias = layer.weight, layer.bias
        if weight not in updates:
            continue
        g = layer_types.weights(layer, updates[weight])
        g0 = updates[bias] if bias is not None and bias in updates else None
        if g0 is not None and curvature.is_center_alone(g, g0):
            together[name] = g, g0
            continue
        _put(updates, layer, *curvature.update(g, g0, group["damping"], group["unit_damping"]))
    if together:
        sums = [curvatures[name].sums for name in together]
        centered = center_all(sums, list(together.values()), rule)
        for name, update in zip(together, centered, strict=True):
            _put(updates, layers[name], *update)
    return updates


def _put(updates: dict[Tensor, Tensor], layer: WeightLayer, dw: Tensor, dw0: Tensor | None) -> None:
    weight, bias = layer.weight, layer.bias
    updates[weight] = layer_types.as_weight(layer, dw).to(weight.dtype)
    if bias is not None and dw0 is not None:
        updates[bias] = dw0.to(bias.dtype)
