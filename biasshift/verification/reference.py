"""The second opinion: products of the unit Fisher matrices with vectors, example by example,
without a hook or a patch.

`per_example` differentiates ``ln p`` by the weights themselves (`torch.func.jacrev` of
`functional_call`), `expand` by zeros added to the net inputs (`offsets`). Where `torch.func` cannot
run a model (a custom ``autograd.Function``, a checkpoint), a plain loop of `torch.autograd.grad`
over labels does the same.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from torch.nn import functional as F
from torch.nn.utils import parametrize

from biasshift.measure import layer_types
from biasshift.measure.layer_types import WeightLayer

Layers = Mapping[str, WeightLayer]
Units = Mapping[str, Tensor]
Vectors = Mapping[str, Float[Tensor, "units params vectors"]]  # params = inputs + 1, bias last
Terms = Callable[
    [Tensor], tuple[Tensor, Tensor]
]  # one example's outputs → ln p(y), and the weight of y, for all labels


def products(
    model: nn.Module,
    units: Units,
    vectors: Vectors,
    x: Tensor,
    likelihood: str,
    weight_sharing: str,
    y: Tensor | None = None,
) -> dict[str, Float[Tensor, "units params vectors"]]:
    """``F v`` for the given units and vectors, with the data's labels for the model's own where
    ``y`` is given. Spoils the model.
    """
    named = dict(model.named_modules())
    layers = {name: _plain(named[name]) for name in units}
    model.requires_grad_(False)
    total = {name: torch.zeros_like(vectors[name]) for name in units}
    for n in range(len(x)):
        terms = partial(label_terms, likelihood=likelihood, y=None if y is None else y[n : n + 1])
        route = by_offsets if weight_sharing == "expand" else _by_weights
        for name, value in route(model, layers, units, vectors, x[n : n + 1], terms).items():
            total[name] += value / len(x)
    return total


def label_terms(output: Tensor, likelihood: str, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``ln p(y)`` and the weight of ``y``, for every label of every position; for one label, the
    data's, where it is given.

    Gaussian: the outputs themselves stand for their labels, as ``Jᵀ E[(y − f)(y − f)ᵀ] J`` is
        ``JᵀJ``.
    """
    if y is not None:
        if likelihood == "categorical":
            term = output.log_softmax(-1).gather(-1, y.unsqueeze(-1)).sum()
        elif likelihood == "bernoulli":
            term = (y * F.logsigmoid(output) + (1 - y) * F.logsigmoid(-output)).sum()
        else:
            term = -0.5 * (y - output).square().sum()
        return term[None], torch.ones_like(term)[None]
    if likelihood == "gaussian":
        return output.flatten(), torch.ones_like(output).flatten()
    logs = (
        output.log_softmax(-1)
        if likelihood == "categorical"
        else torch.stack([F.logsigmoid(output), F.logsigmoid(-output)])
    )
    return logs.flatten(), logs.exp().flatten()


def _plain(layer: nn.Module) -> WeightLayer:
    """The layer with its weight as an ordinary parameter, at its present value, and a bias, which
    may be 0.
    """
    assert layer_types.is_covered(layer)
    if parametrize.is_parametrized(layer):
        for name in list(layer.parametrizations):  # pyright: ignore[reportArgumentType]
            parametrize.remove_parametrizations(layer, name)
    if (
        "weight" not in layer._parameters
    ):  # made before every call, by a hook of the older weight_norm, spectral_norm or pruning
        value = layer.weight.detach().clone()
        for key, hook in list(layer._forward_pre_hooks.items()):
            if type(hook).__module__.startswith("torch.nn.utils"):
                del layer._forward_pre_hooks[key]
        del layer.weight
        layer.weight = nn.Parameter(value)
    if layer.bias is None and has_bias_row(layer):
        layer.bias = nn.Parameter(layer.weight.new_zeros(layer_types.unit_count(layer)))
    return layer


def has_bias_row(layer: WeightLayer) -> bool:
    """Whether a bias that is not there could be added: what a forward of somebody's own does with
    it is unknown.
    """
    return layer.bias is not None or not layer_types.has_own_forward(layer)


# -- per_example: the weights themselves -----------------------------------------------------------


def _by_weights(
    model: nn.Module, layers: Layers, units: Units, vectors: Vectors, x: Tensor, terms: Terms
) -> dict[str, Tensor]:
    """``Σ_y p_y (∇ln p) (∇ln p)ᵀ v`` of one example."""
    with torch.no_grad():
        weight_of_label = terms(model(x))[1]
    try:
        scores = _scores(model, layers, units, x, terms)
    except Exception:  # what torch.func does not support is raised as one thing or another
        scores = _scores_one_by_one(model, layers, units, x, terms)
    projected = {
        name: torch.einsum("yup,upv->yuv", score, vectors[name]) for name, score in scores.items()
    }
    return {
        name: torch.einsum("y,yup,yuv->upv", weight_of_label, scores[name], projected[name])
        for name in scores
    }


def _scores(
    model: nn.Module, layers: Layers, units: Units, x: Tensor, terms: Terms
) -> dict[str, Tensor]:
    """``∇ ln p(y)`` for all labels, (labels, units, params): Jacobians by the rows of the weights
    that belong to the units.
    """
    at = {}
    for name, layer in layers.items():
        bias = (
            torch.zeros_like(layer_types.weights(layer)[:, 0]) if layer.bias is None else layer.bias
        )
        at[name] = torch.cat([layer_types.weights(layer), bias[:, None]], 1)[units[name]]

    def function(rows: dict[str, Tensor]) -> Tensor:
        changed = {}
        for name, layer in layers.items():
            weights = layer_types.weights(layer).index_copy(0, units[name], rows[name][:, :-1])
            changed[_join(name, "weight")] = layer_types.as_weight(layer, weights)
            if layer.bias is not None:
                changed[_join(name, "bias")] = layer.bias.index_copy(
                    0, units[name], rows[name][:, -1]
                )
        return terms(functional_call(model, changed, (x,), tie_weights=False))[
            0
        ]  # a module under two names is changed once

    return jacrev(function, chunk_size=_chunk(layers))(at)  # pyright: ignore[reportReturnType]


def _scores_one_by_one(
    model: nn.Module, layers: Layers, units: Units, x: Tensor, terms: Terms
) -> dict[str, Tensor]:
    parameters = [
        p for layer in layers.values() for p in (layer.weight, layer.bias) if p is not None
    ]
    for p in parameters:
        p.requires_grad_(True)
    rows: dict[str, list[Tensor]] = {name: [] for name in layers}
    for value in terms(model(x))[0]:
        gradients = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
        found = {
            id(p): torch.zeros_like(p) if d is None else d
            for p, d in zip(parameters, gradients, strict=True)
        }
        for name, layer in layers.items():
            w = layer_types.weights(layer, found[id(layer.weight)])
            w0 = torch.zeros_like(w[:, 0]) if layer.bias is None else found[id(layer.bias)]
            rows[name].append(torch.cat([w, w0[:, None]], 1)[units[name]])
    return {name: torch.stack(found) for name, found in rows.items()}


def _chunk(layers: Layers) -> int:
    """Labels at once: the gradients of whole weights are made before the rows of a few units are
    taken.
    """
    return max(1, 2**24 // sum(layer.weight.numel() for layer in layers.values()))


def _join(name: str, parameter: str) -> str:
    return f"{name}.{parameter}" if name else parameter


# -- the errors and products of `expand` from zeros that are added to the net inputs of every call of a layer ---
# Differentiating ``ln p`` by such a zero gives the error ``δ_t`` of its position. The incoming
# activations stay inside the layer,
# which is linear in its weights: ``ã_tᵀ v`` is the layer with ``v`` for weights, and ``Σ_t δ_t² ã_t
# (ã_tᵀ v)`` the gradient of that.


def by_offsets(
    model: nn.Module, layers: Layers, units: Units, vectors: Vectors, x: Tensor, terms: Terms
) -> dict[str, Tensor]:
    """``Σ_t (Σ_y p_y δ_t²) ã_t ã_tᵀ v`` of one example."""
    with Offsets(layers) as offsets:
        with torch.no_grad():
            weight_of_label = terms(model(x))[1]
        at = {
            f"{name} {i}": call[2]
            for name, calls in offsets.seen.items()
            for i, call in enumerate(calls)
        }

        def function(zeros: dict[str, Tensor]) -> Tensor:
            offsets.start(zeros)
            return terms(model(x))[0]

        deltas = _jacobian(function, at)
    found = {name: torch.zeros_like(vectors[name]) for name in layers}
    for key, delta in deltas.items():
        name, _, i = key.rpartition(" ")
        delta2 = torch.einsum("y,y...->...", weight_of_label, delta.square())
        args, kwargs, _ = offsets.seen[name][int(i)]
        columns = [
            _product(layers[name], args, kwargs, delta2, units[name], v)
            for v in vectors[name].unbind(-1)
        ]
        found[name] += torch.stack(columns, -1)
    return found


class Offsets:
    """Zeros added to the net inputs of layers, call by call, within the block; and what each call
    was given.
    """

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
            named = {
                key: v.detach().clone() if isinstance(v, Tensor) else v for key, v in kwargs.items()
            }
            self.seen.setdefault(name, []).append((kept, named, torch.zeros_like(net)))
            return net
        self.calls[name] = (self.calls.get(name, -1) + 1) % len(
            self.seen[name]
        )  # a checkpoint runs its calls again
        return net + self.zeros[f"{name} {self.calls[name]}"]


def _product(
    layer: WeightLayer, args: tuple, kwargs: dict, delta2: Tensor, units: Tensor, v: Tensor
) -> Tensor:
    """``Σ_t δ_t² ã_t (ã_tᵀ v)``, by the layer itself."""
    zero = torch.zeros_like(layer_types.weights(layer))
    given = {
        "layer.weight": layer_types.as_weight(
            layer, zero.index_copy(0, units, v[:, :-1])
        ).requires_grad_()
    }
    if layer.bias is not None:
        given["layer.bias"] = zero[:, 0].index_copy(0, units, v[:, -1]).requires_grad_()
    nothing = {key: torch.zeros_like(value) for key, value in given.items()}
    alone = _Alone(layer)
    net = functional_call(alone, given, args, kwargs) - functional_call(
        alone, nothing, args, kwargs
    )
    found = torch.autograd.grad(net, list(given.values()), net.detach() * delta2)
    rows = layer_types.weights(layer, found[0])[units]
    rows0 = torch.zeros_like(rows[:, 0]) if layer.bias is None else found[1][units]
    return torch.cat([rows, rows0[:, None]], 1)


def _jacobian(
    function: Callable[[dict[str, Tensor]], Tensor], at: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The derivatives of all values of a function, (values, …)."""
    try:
        return jacrev(function)(at)  # pyright: ignore[reportReturnType]
    except Exception:  # as above
        leaves = {name: v.clone().requires_grad_() for name, v in at.items()}
        rows = [
            torch.autograd.grad(value, list(leaves.values()), retain_graph=True, allow_unused=True)
            for value in function(leaves)
        ]
        columns = zip(at.items(), zip(*rows, strict=True), strict=True)
        return {
            name: torch.stack([torch.zeros_like(v) if d is None else d for d in column])
            for (name, v), column in columns
        }


class _Alone(nn.Module):
    """A layer without the hooks around it."""

    def __init__(self, layer: WeightLayer):
        super().__init__()
        self.layer = layer

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.layer.forward(*args, **kwargs)
