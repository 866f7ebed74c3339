"""The errors and products of `expand` from zeros that are added to the net inputs of every call of a layer.

Differentiating ``ln p`` by such a zero gives the error ``δ_t`` of its position. The incoming activations stay inside the layer,
which is linear in its weights: ``ã_tᵀ v`` is the layer with ``v`` for weights, and ``Σ_t δ_t² ã_t (ã_tᵀ v)`` the gradient of that.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call, jacrev

from biasshift.measure import layer_types as kinds
from biasshift.measure.layer_types import WeightLayer

Layers = Mapping[str, WeightLayer]
Units = Mapping[str, Tensor]
Vectors = Mapping[str, Float[Tensor, "units params vectors"]]  # params = inputs + 1, bias last
Terms = Callable[[Tensor], tuple[Tensor, Tensor]]  # one example's outputs → ln p(y), and the weight of y, for all labels


def by_offsets(model: nn.Module, layers: Layers, units: Units, vectors: Vectors, x: Tensor, terms: Terms) -> dict[str, Tensor]:
    """``Σ_t (Σ_y p_y δ_t²) ã_t ã_tᵀ v`` of one example."""
    with Offsets(layers) as offsets:
        with torch.no_grad():
            weight_of_label = terms(model(x))[1]
        at = {f"{name} {i}": call[2] for name, calls in offsets.seen.items() for i, call in enumerate(calls)}

        def function(zeros: dict[str, Tensor]) -> Tensor:
            offsets.start(zeros)
            return terms(model(x))[0]

        deltas = _jacobian(function, at)
    found = {name: torch.zeros_like(vectors[name]) for name in layers}
    for key, delta in deltas.items():
        name, _, i = key.rpartition(" ")
        delta2 = torch.einsum("y,y...->...", weight_of_label, delta.square())
        args, kwargs, _ = offsets.seen[name][int(i)]
        columns = [_product(layers[name], args, kwargs, delta2, units[name], v) for v in vectors[name].unbind(-1)]
        found[name] += torch.stack(columns, -1)
    return found


class Offsets:
    """Zeros added to the net inputs of layers, call by call, within the block; and what each call was given."""

    def __init__(self, layers: Layers):
        self.layers = layers
        self.originals = {name: layer.forward for name, layer in layers.items()}
        self.replaced = {name: "forward" in vars(layer) for name, layer in layers.items()}
        self.seen: dict[str, list[tuple[tuple, dict, Tensor]]] = {}  # arguments and a zero per call
        self.zeros: dict[str, Tensor] | None = None  # by "name call"
        self.calls: dict[str, int] = {}

    def __enter__(self) -> "Offsets":
        for name, layer in self.layers.items():
            layer.forward = partial(self._forward, name)
        return self

    def __exit__(self, *exception: object) -> None:
        for name, layer in self.layers.items():
            del layer.forward
            if self.replaced[name]:
                layer.forward = self.originals[name]

    def start(self, zeros: dict[str, Tensor]) -> None:
        """From here on the zeros are added, beginning with the first call."""
        self.zeros, self.calls = zeros, {}

    def _forward(self, name: str, *args: Any, **kwargs: Any) -> Tensor:
        net = self.originals[name](*args, **kwargs)
        if self.zeros is None:
            kept = tuple(v.detach().clone() if isinstance(v, Tensor) else v for v in args)
            named = {key: v.detach().clone() if isinstance(v, Tensor) else v for key, v in kwargs.items()}
            self.seen.setdefault(name, []).append((kept, named, torch.zeros_like(net)))
            return net
        self.calls[name] = (self.calls.get(name, -1) + 1) % len(self.seen[name])  # a checkpoint runs its calls again
        return net + self.zeros[f"{name} {self.calls[name]}"]


def _product(layer: WeightLayer, args: tuple, kwargs: dict, delta2: Tensor, units: Tensor, v: Tensor) -> Tensor:
    """``Σ_t δ_t² ã_t (ã_tᵀ v)``, by the layer itself."""
    zero = torch.zeros_like(kinds.weights(layer))
    given = {"layer.weight": kinds.as_weight(layer, zero.index_copy(0, units, v[:, :-1])).requires_grad_()}
    if layer.bias is not None:
        given["layer.bias"] = zero[:, 0].index_copy(0, units, v[:, -1]).requires_grad_()
    nothing = {key: torch.zeros_like(value) for key, value in given.items()}
    alone = _Alone(layer)
    net = functional_call(alone, given, args, kwargs) - functional_call(alone, nothing, args, kwargs)
    found = torch.autograd.grad(net, list(given.values()), net.detach() * delta2)
    rows = kinds.weights(layer, found[0])[units]
    rows0 = torch.zeros_like(rows[:, 0]) if layer.bias is None else found[1][units]
    return torch.cat([rows, rows0[:, None]], 1)


def _jacobian(function: Callable[[dict[str, Tensor]], Tensor], at: dict[str, Tensor]) -> dict[str, Tensor]:
    """The derivatives of all values of a function, (values, …)."""
    try:
        return jacrev(function)(at)  # pyright: ignore[reportReturnType]
    except Exception:  # as above
        leaves = {name: v.clone().requires_grad_() for name, v in at.items()}
        rows = [torch.autograd.grad(value, list(leaves.values()), retain_graph=True, allow_unused=True) for value in function(leaves)]
        columns = zip(at.items(), zip(*rows, strict=True), strict=True)
        return {name: torch.stack([torch.zeros_like(v) if d is None else d for d in column]) for (name, v), column in columns}


class _Alone(nn.Module):
    """A layer without the hooks around it."""

    def __init__(self, layer: WeightLayer):
        super().__init__()
        self.layer = layer

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.layer.forward(*args, **kwargs)
