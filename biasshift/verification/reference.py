"""The reference: products of unit Fisher matrices with vectors, without the hooks and patches.

It goes example by example. ``"per_example"`` differentiates ``ln p`` by the weights themselves
(`torch.func.jacrev` of `functional_call`), ``"expand"`` by zeros added to the net inputs (offsets).
Where `torch.func` cannot run a model (a custom ``autograd.Function``, a checkpoint), a plain loop
of `torch.autograd.grad` over labels does the same.
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
from biasshift.measure.examples import Inputs, arguments
from biasshift.measure.layer_types import WeightLayer
from biasshift.measure.options import Options
from biasshift.measure.outputs import chosen_output
from biasshift.measure.parts import LinearPart
from biasshift.measure.probe import Batch
from biasshift.measure.sandbox import forward
from biasshift.progress import SILENT, Progress

Layers = Mapping[str, WeightLayer]
Units = Mapping[str, Tensor]
Vectors = Mapping[str, Float[Tensor, "units params vectors"]]  # params = inputs + 1, bias last
# what the model returned for one example → ln p(y), and the weight of y, for all labels
Terms = Callable[[Any], tuple[Tensor, Tensor]]


def products(
    model: nn.Module,
    units: Units,
    vectors: Vectors,
    batch: Batch,
    options: Options,
    progress: Progress = SILENT,
) -> dict[str, Float[Tensor, "units params vectors"]]:
    """Returns ``F v`` for the given units and vectors, averaged over the examples.

    The model is changed (parametrizations are removed, biases added): hand in a copy.

    Args:
        units: indices of the units, by layer.
        vectors: of every unit; params = inputs + 1, bias last.
        batch: the examples. Their labels count where ``options.labels`` is "empirical".
        options: the likelihood, the kind of weight sharing, the output and its axis of classes.
        progress: what completed examples are reported to.
    """
    named = layer_types.named_modules(model)
    layers = {name: _plain(named[name]) for name in units}
    model.requires_grad_(False)
    route = _by_offsets if options.weight_sharing == "expand" else _by_weights
    total = {name: torch.zeros_like(vectors[name]) for name in units}
    x, y, mask, _ = batch
    for n in range(len(x)):
        own = slice(n, n + 1)
        terms = partial(
            _label_terms,
            options=options,
            y=y[own] if y is not None and options.labels == "empirical" else None,
            counted=_counted(None if y is None else y[own], None if mask is None else mask[own]),
        )
        for name, value in route(model, layers, units, vectors, x[own], terms).items():
            total[name] += value / len(x)
        progress.advance()
    return total


def has_bias_row(layer: WeightLayer) -> bool:
    """Tells whether a layer has a bias, or could be given one for its row of the matrix.

    What a forward of somebody's own would do with an added bias is unknown.
    """
    if layer.bias is not None or isinstance(layer, LinearPart):
        return layer.bias is not None
    return not layer_types.has_own_forward(layer)


def _counted(y: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """Which positions of one example count; −100 stands for a label that does not."""
    if y is None or y.is_floating_point() or not bool((y == -100).any()):
        return mask
    return y != -100 if mask is None else mask & (y != -100)


def _label_terms(
    returned: Any, options: Options, y: Tensor | None, counted: Tensor | None
) -> tuple[Tensor, Tensor]:
    """``ln p(y)`` and the weight of ``y``, for every label of every position, or for the data's.

    Gaussian: the outputs themselves stand for their labels, as ``Jᵀ E[(y − f)(y − f)ᵀ] J`` is
    ``JᵀJ``. The classes are on the axis that the user states.
    """
    output, axis = chosen_output(returned, options.output), options.class_axis
    if options.likelihood == "categorical":
        logs = output.log_softmax(axis)
        kept = torch.ones_like(logs)
        if counted is not None:
            kept = counted.unsqueeze(axis).expand_as(logs).to(logs)
        if y is not None:
            own = logs.gather(axis, y.clamp(min=0).unsqueeze(axis))
            term = (own * kept.narrow(axis, 0, 1)).sum()
            return term[None], torch.ones_like(term)[None]
        return logs.flatten(), (logs.exp() * kept).flatten()
    kept = torch.ones_like(output)
    if counted is not None:
        kept = counted if counted.dim() == output.dim() else counted.unsqueeze(-1)
        kept = kept.expand_as(output).to(output)
    if y is not None:
        if options.likelihood == "bernoulli":
            terms = y * F.logsigmoid(output) + (1 - y) * F.logsigmoid(-output)
        else:
            terms = -0.5 * (y - output).square()
        term = (terms * kept).sum()
        return term[None], torch.ones_like(term)[None]
    if options.likelihood == "gaussian":
        return output.flatten(), kept.flatten()
    logs = torch.stack([F.logsigmoid(output), F.logsigmoid(-output)])
    return logs.flatten(), (logs.exp() * kept).flatten()


def _plain(layer: nn.Module) -> WeightLayer:
    """The layer with its weight as an ordinary parameter, and with a bias, which may be 0."""
    assert layer_types.is_covered(layer)
    if isinstance(layer, LinearPart):
        _make_parameters(layer.owner, layer.names)
        return layer
    _make_parameters(layer, ["weight"])
    if layer.bias is None and has_bias_row(layer):
        layer.bias = nn.Parameter(layer.weight.new_zeros(layer_types.unit_count(layer)))
    return layer


def _make_parameters(layer: nn.Module, names: list[str]) -> None:
    """Turns what is computed before every call into ordinary parameters."""
    _remove_parametrizations(layer)
    for name in names:
        if name not in layer._parameters:
            # by a hook of the older weight_norm, spectral_norm or pruning
            value = getattr(layer, name).detach().clone()
            for key, hook in list(layer._forward_pre_hooks.items()):
                if type(hook).__module__.startswith("torch.nn.utils"):
                    del layer._forward_pre_hooks[key]
            delattr(layer, name)
            setattr(layer, name, nn.Parameter(value))


def _remove_parametrizations(layer: nn.Module) -> None:
    if parametrize.is_parametrized(layer):
        # remove_parametrizations would delete the property from a class that copies share.
        names = list(layer.parametrizations)  # pyright: ignore[reportArgumentType]
        values = {name: getattr(layer, name).detach().clone() for name in names}
        layer.__class__ = parametrize.type_before_parametrizations(layer)
        del layer.parametrizations
        for name, value in values.items():
            layer.register_parameter(name, nn.Parameter(value, requires_grad=False))


def _replace(
    changed: dict[str, Tensor], name: str, layer: WeightLayer, key: str, value: Tensor
) -> None:
    """Adds a layer's weight or bias to what `functional_call` changes, under its parameter's name.

    A part of a composite changes its rows of that module's parameter.
    """
    if isinstance(layer, LinearPart):
        full, whole = layer.full_name(name, key), layer.parameter(key)
        assert whole is not None
        changed[full] = layer.with_rows(changed.get(full, whole), value)
    else:
        changed[f"{name}.{key}" if name else key] = value


# -- per_example: the weights themselves -----------------------------------------------------------


def _by_weights(
    model: nn.Module, layers: Layers, units: Units, vectors: Vectors, x: Inputs, terms: Terms
) -> dict[str, Tensor]:
    """``Σ_y p_y (∇ln p) (∇ln p)ᵀ v`` of one example."""
    with torch.no_grad():
        label_weights = terms(forward(model, x))[1]
    try:
        scores = _scores(model, layers, units, x, terms)
    except Exception:  # what torch.func does not support is raised as one thing or another
        scores = _scores_one_by_one(model, layers, units, x, terms)
    result = {}
    for name, score in scores.items():
        projected = torch.einsum("yup,upv->yuv", score, vectors[name])
        result[name] = torch.einsum("y,yup,yuv->upv", label_weights, score, projected)
    return result


def _scores(
    model: nn.Module, layers: Layers, units: Units, x: Inputs, terms: Terms
) -> dict[str, Tensor]:
    """``∇ ln p(y)`` for all labels, (labels, units, params).

    They are Jacobians by the rows of the weights that belong to the units.
    """

    def log_likelihoods(rows: dict[str, Tensor]) -> Tensor:
        changed: dict[str, Tensor] = {}
        for name, layer in layers.items():
            weights = layer_types.weights(layer).index_copy(0, units[name], rows[name][:, :-1])
            _replace(changed, name, layer, "weight", layer_types.as_weight(layer, weights))
            if layer.bias is not None:
                bias = layer.bias.index_copy(0, units[name], rows[name][:, -1])
                _replace(changed, name, layer, "bias", bias)
        # untied: a module under two names is changed once
        return terms(functional_call(model, changed, *arguments(x.clone()), tie_weights=False))[0]

    at = {
        name: _with_bias(layer_types.weights(layer), layer.bias)[units[name]]
        for name, layer in layers.items()
    }
    # Labels at once: the gradients of whole weights are made before a few units' rows are taken.
    chunk = max(1, 2**24 // sum(layer.weight.numel() for layer in layers.values()))
    return jacrev(log_likelihoods, chunk_size=chunk)(at)  # pyright: ignore[reportReturnType]


def _scores_one_by_one(
    model: nn.Module, layers: Layers, units: Units, x: Inputs, terms: Terms
) -> dict[str, Tensor]:
    keys = ("weight", "bias")
    own = [layer_types.parameter(layer, key) for layer in layers.values() for key in keys]
    parameters = list(dict.fromkeys(p for p in own if p is not None))
    for p in parameters:
        p.requires_grad_(True)
    rows: dict[str, list[Tensor]] = {name: [] for name in layers}
    for value in terms(forward(model, x))[0]:
        gradients = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
        by_parameter = {
            id(p): torch.zeros_like(p) if d is None else d
            for p, d in zip(parameters, gradients, strict=True)
        }
        for name, layer in layers.items():
            of_weight, of_bias = (
                None if p is None else layer_types.rows(layer, by_parameter[id(p)])
                for p in (layer_types.parameter(layer, key) for key in keys)
            )
            w, w0 = layer_types.weights(layer, of_weight), of_bias
            rows[name].append(_with_bias(w, w0)[units[name]])
    return {name: torch.stack(of_labels) for name, of_labels in rows.items()}


def _with_bias(w: Tensor, w0: Tensor | None) -> Tensor:
    """(units, params), with zeros for a bias that is not there."""
    w0 = torch.zeros_like(w[:, 0]) if w0 is None else w0
    return torch.cat([w, w0[:, None]], 1)


# -- expand: offsets, zeros added to the net inputs of every call of a layer -----------------------
# Differentiating ``ln p`` by such a zero gives the error ``δ_t`` of its position. The incoming
# activations stay inside the layer, which is linear in its weights: ``ã_tᵀ v`` is the layer with
# ``v`` for weights, and ``Σ_t δ_t² ã_t (ã_tᵀ v)`` the gradient of that.


def _by_offsets(
    model: nn.Module, layers: Layers, units: Units, vectors: Vectors, x: Inputs, terms: Terms
) -> dict[str, Tensor]:
    """``Σ_t (Σ_y p_y δ_t²) ã_t ã_tᵀ v`` of one example."""
    with _Offsets(layers) as offsets:
        with torch.no_grad():
            label_weights = terms(forward(model, x, offsets.calls.clear))[1]
        at = {
            f"{name} {i}": zero
            for name, calls in offsets.calls.items()
            for i, (_, _, zero) in enumerate(calls)
        }

        def log_likelihoods(zeros: dict[str, Tensor]) -> Tensor:
            offsets.start(zeros)
            return terms(forward(model, x))[0]

        deltas = _jacobian(log_likelihoods, at)
    result = {name: torch.zeros_like(vectors[name]) for name in layers}
    for key, delta in deltas.items():
        name, _, i = key.rpartition(" ")
        delta2 = torch.einsum("y,y...->...", label_weights, delta.square())
        args, kwargs, _ = offsets.calls[name][int(i)]
        columns = [
            _product(layers[name], args, kwargs, delta2, units[name], v)
            for v in vectors[name].unbind(-1)
        ]
        result[name] += torch.stack(columns, -1)
    return result


class _Offsets:
    """Zeros added to the net inputs of layers, call by call, within the block.

    The first pass, before `start`, adds nothing. It records the arguments of every call, and a zero
    of the size of its net inputs.
    """

    def __init__(self, layers: Layers):
        self.layers = layers
        self.originals = {name: layer.forward for name, layer in layers.items()}
        self.replaced = {name: "forward" in vars(layer) for name, layer in layers.items()}
        self.calls: dict[str, list[tuple[tuple, dict, Tensor]]] = {}
        self.zeros: dict[str, Tensor] | None = None  # by "name call"
        self.index: dict[str, int] = {}  # of the last call

    def __enter__(self) -> "_Offsets":
        for name, layer in self.layers.items():
            layer.forward = partial(self._forward, name)
        return self

    def __exit__(self, *exception: object) -> None:
        for name, layer in self.layers.items():
            del layer.forward
            if self.replaced[name]:
                layer.forward = self.originals[name]

    def start(self, zeros: dict[str, Tensor]) -> None:
        """Adds the zeros from here on, beginning with the first call."""
        self.zeros, self.index = zeros, {}

    def _forward(self, name: str, *args: Any, **kwargs: Any) -> Tensor:
        net = self.originals[name](*args, **kwargs)
        if self.zeros is None:
            call = (tuple(map(_kept, args)), {key: _kept(value) for key, value in kwargs.items()})
            self.calls.setdefault(name, []).append((*call, torch.zeros_like(net)))
            return net
        # a checkpoint runs its calls again
        self.index[name] = (self.index.get(name, -1) + 1) % len(self.calls[name])
        return net + self.zeros[f"{name} {self.index[name]}"]


def _kept(value: object) -> object:
    return value.detach().clone() if isinstance(value, Tensor) else value


def _product(
    layer: WeightLayer, args: tuple, kwargs: dict, delta2: Tensor, units: Tensor, v: Tensor
) -> Tensor:
    """``Σ_t δ_t² ã_t (ã_tᵀ v)``, by the layer itself."""
    zero = torch.zeros_like(layer_types.weights(layer))
    weight = layer_types.as_weight(layer, zero.index_copy(0, units, v[:, :-1]))
    parameters = {"layer.weight": weight.requires_grad_()}
    if layer.bias is not None:
        bias = zero[:, 0].index_copy(0, units, v[:, -1])
        parameters["layer.bias"] = bias.requires_grad_()
    zeros = {key: torch.zeros_like(value) for key, value in parameters.items()}
    alone = _Alone(layer)
    net = functional_call(alone, parameters, args, kwargs)
    net = net - functional_call(alone, zeros, args, kwargs)
    g, *g0 = torch.autograd.grad(net, list(parameters.values()), net.detach() * delta2)
    return _with_bias(layer_types.weights(layer, g), g0[0] if g0 else None)[units]


class _Alone(nn.Module):
    """A layer without the hooks around it."""

    def __init__(self, layer: WeightLayer):
        super().__init__()
        self.layer = layer if not isinstance(layer, LinearPart) else _linear(layer)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.layer.forward(*args, **kwargs)


def _linear(layer: LinearPart) -> nn.Linear:
    return nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")


def _jacobian(
    function: Callable[[dict[str, Tensor]], Tensor], at: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The derivatives of all values of a function, (values, …)."""
    try:
        return jacrev(function)(at)  # pyright: ignore[reportReturnType]
    except Exception:  # what torch.func does not support is raised as one thing or another
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
