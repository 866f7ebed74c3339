"""Second opinions: unit Fisher matrices from `torch.func`, in float64, without hooks.

Two independent routes to the same numbers:

* *parameters*: per-example Jacobians of the log-likelihood with respect to the weights,
  `vmap(jacrev(functional_call))`. `F = E[Σ_y p_y ∇ln p ∇ln pᵀ]`: the Fisher matrix of the (shared)
  weights, hence `per_example`.
* *probes*: a copy of the model whose weight layers add a zero offset to their net inputs. The
  Jacobian with respect to the offset is the error `δ` of every position; the patches come from a
  loop over kernel offsets. Hence `expand`, and the means of incoming activations and net inputs.

A layer without a bias gets a zero one in the copy, so the row of the bias is defined everywhere.
"""

import copy
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, vmap

WEIGHT_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def weight_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Weight layers by PyTorch's module names."""
    return {
        name: module for name, module in model.named_modules() if isinstance(module, WEIGHT_LAYERS)
    }


def double_copy(model: nn.Module) -> nn.Module:
    """A float64 copy in which every weight layer has a bias, and every parameter is free."""
    model = copy.deepcopy(model).double()
    for module in weight_layers(model).values():
        if module.bias is None:
            module.bias = nn.Parameter(module.weight.new_zeros(module.weight.shape[0]))
    for parameter in model.parameters():
        parameter.grad = None
        parameter.requires_grad_(True)
    return model


# -- likelihoods: log-probabilities of single labels and their probabilities, one term a label -----


def label_terms(output: Tensor, likelihood: str) -> Tensor:
    """`ln p(y)` for every label of every independent part of one output; flat.

    Gaussian: the outputs themselves, for `Jᵀ E[(y−f)(y−f)ᵀ] J` is `JᵀJ`.
    """
    if likelihood == "categorical":
        return output.log_softmax(-1).flatten()
    if likelihood == "bernoulli":
        return torch.cat([F.logsigmoid(output).flatten(), F.logsigmoid(-output).flatten()])
    assert likelihood == "gaussian"
    return output.flatten()


def label_weights(output: Tensor, likelihood: str) -> Tensor:
    """The probability of each of these labels."""
    terms = label_terms(output, likelihood)
    return torch.ones_like(terms) if likelihood == "gaussian" else terms.exp()


def log_likelihood(output: Tensor, y: Tensor, likelihood: str) -> Tensor:
    """`ln p(y | z)` of one example, up to a constant."""
    if likelihood == "categorical":
        return output.log_softmax(-1).gather(-1, y.unsqueeze(-1)).sum()
    if likelihood == "bernoulli":
        return (y * F.logsigmoid(output) + (1 - y) * F.logsigmoid(-output)).sum()
    assert likelihood == "gaussian"
    return -0.5 * (y - output).square().sum()


def draw_labels(output: Tensor, likelihood: str, generator: torch.Generator) -> Tensor:
    """Labels drawn from the model, every position independently."""
    if likelihood == "categorical":
        p = output.softmax(-1)
        return torch.multinomial(p.flatten(0, -2), 1, generator=generator).view(p.shape[:-1])
    if likelihood == "bernoulli":
        return torch.bernoulli(output.sigmoid(), generator=generator)
    return output + torch.randn(output.shape, generator=generator, dtype=output.dtype)


# -- route 1: parameters ---------------------------------------------------------------------------


def scores(
    model: nn.Module, x: Tensor, likelihood: str, y: Tensor | None = None
) -> tuple[dict[str, Tensor], Tensor]:
    """Per-example gradients of `ln p` by the weights into every unit, and the labels' weights.

    `{layer: (batch, labels, units, inputs + 1)}` and (batch, labels). With `y` there is one label,
    the given one.
    """
    model, x = double_copy(model), x.double()
    params = {name: p.detach() for name, p in model.named_parameters()}
    buffers = dict(model.named_buffers())

    def terms(p: dict[str, Tensor], x_n: Tensor, y_n: Tensor) -> Tensor:
        output = functional_call(model, (p, buffers), (x_n[None],))[0]
        return (
            label_terms(output, likelihood)
            if y is None
            else log_likelihood(output, y_n, likelihood)[None]
        )

    def weights(x_n: Tensor) -> Tensor:
        output = functional_call(model, (params, buffers), (x_n[None],))[0]
        return label_weights(output, likelihood) if y is None else output.new_ones(1)

    labels = torch.zeros(len(x)) if y is None else y
    jacobian = vmap(jacrev(terms), in_dims=(None, 0, 0))(params, x, labels)
    stacked = {}
    for name in weight_layers(model):
        dw, dw0 = jacobian[f"{name}.weight"], jacobian[f"{name}.bias"]
        stacked[name] = torch.cat([dw.flatten(3), dw0.unsqueeze(-1)], -1)
    return stacked, vmap(weights)(x).detach()


def gradients(
    model: nn.Module, x: Tensor, y: Tensor, likelihood: str
) -> dict[str, tuple[Tensor, Tensor]]:
    """Gradient of the mean negative log-likelihood: `{layer: (g (units, inputs), g0 (units,))}`."""
    model, x = double_copy(model), x.double()
    buffers = dict(model.named_buffers())

    def risk(p: dict[str, Tensor]) -> Tensor:
        output = functional_call(model, (p, buffers), (x,))
        return -vmap(lambda o, t: log_likelihood(o, t, likelihood))(output, y).mean()

    g = grad(risk)({name: p.detach() for name, p in model.named_parameters()})
    return {
        name: (g[f"{name}.weight"].flatten(1), g[f"{name}.bias"]) for name in weight_layers(model)
    }


# -- route 2: probes -------------------------------------------------------------------------------


class Probed(nn.Module):
    """A weight layer that keeps inputs and net inputs, and adds an offset to every net input."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.calls, self.offsets, self.call = layer, [], None, 0

    def forward(self, input: Tensor) -> Tensor:
        kept = input.clone()
        net = self.layer(input)
        if self.offsets is None:
            self.calls.append((kept.detach(), net.detach().clone()))
            return net
        self.call += 1
        return net + self.offsets[self.call - 1]


def probed_copy(model: nn.Module) -> tuple[nn.Module, dict[str, Probed]]:
    """A copy of the model with every weight layer in a `Probed`, shared ones under both names."""
    model = double_copy(model)
    probes = {name: Probed(layer) for name, layer in weight_layers(model).items()}
    by_id = {id(probe.layer): probe for probe in probes.values()}
    for parent in list(model.modules()):
        if not isinstance(parent, Probed):
            for child_name, child in list(parent._modules.items()):
                if id(child) in by_id:
                    parent._modules[child_name] = by_id[id(child)]
    return model, probes


def patches(layer: nn.Module, a: Tensor) -> Tensor:
    """What each position of each unit reads: (batch, positions, units or 1, inputs).

    The patches are put together in a loop over the kernel's offsets.
    """
    if isinstance(layer, nn.Linear):
        return a.reshape(len(a), -1, 1, a.shape[-1])
    dims = len(layer.kernel_size)
    if layer.padding == "same":
        totals = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        sides = [(t // 2, t - t // 2) for t in totals]
    elif layer.padding == "valid":
        sides = [(0, 0)] * dims
    else:
        sides = [(p, p) for p in layer.padding]
    flat = [p for side in reversed(sides) for p in side]
    a = F.pad(a, flat, mode="constant" if layer.padding_mode == "zeros" else layer.padding_mode)
    axes = list(zip(a.shape[2:], layer.dilation, layer.kernel_size, layer.stride, strict=True))
    sizes = [(n - d * (k - 1) - 1) // s + 1 for n, d, k, s in axes]
    taps = []
    for offset in itertools.product(*(range(k) for k in layer.kernel_size)):
        window = a
        for axis, (o, d, s, n) in enumerate(
            zip(offset, layer.dilation, layer.stride, sizes, strict=True)
        ):
            window = window.index_select(axis + 2, torch.arange(n) * s + o * d)
        taps.append(window.flatten(2))  # (batch, channels, positions)
    stacked = torch.stack(taps, 2)  # (batch, channels, taps, positions)
    # (batch, positions, groups, inputs)
    group = stacked.unflatten(1, (layer.groups, -1)).flatten(2, 3).permute(0, 3, 1, 2)
    units = layer.out_channels // layer.groups if layer.groups > 1 else 1
    return group.repeat_interleave(units, 2)


def units_last(layer: nn.Module, net: Tensor) -> Tensor:
    """Net inputs as (batch, positions, units)."""
    if isinstance(layer, nn.Linear):
        return net.reshape(len(net), -1, net.shape[-1])
    return net.flatten(2).transpose(1, 2)


@dataclass(frozen=True)
class Probe:
    """One layer from the side of its net inputs; several calls are side by side as positions."""

    incoming: Tensor  # (batch, positions, units or 1, inputs)
    net: Tensor  # (batch, positions, units)
    delta: Tensor  # (batch, labels, positions, units)
    weights: Tensor  # (batch, labels)

    @property
    def mean_p(self) -> Tensor:
        """`E_p(a)`, (units or 1, inputs)."""
        return self.incoming.mean((0, 1))

    @property
    def mean_net(self) -> Tensor:
        return self.net.mean((0, 1))


def probe_layers(
    model: nn.Module, x: Tensor, likelihood: str, y: Tensor | None = None
) -> dict[str, Probe]:
    """Incoming activations, net inputs and errors of every position, from the offset copy."""
    probed, layers = probed_copy(model)
    x = x.double()
    with torch.no_grad():
        probed(x)
    kept = {name: list(layer.calls) for name, layer in layers.items()}
    zeros = {name: [torch.zeros_like(net[:1]) for _, net in calls] for name, calls in kept.items()}

    def run(offsets: dict[str, list[Tensor]], x_n: Tensor) -> Tensor:
        for name, layer in layers.items():
            layer.offsets, layer.call = offsets[name], 0
        return probed(x_n[None])[0]

    def terms(offsets: dict[str, list[Tensor]], x_n: Tensor, y_n: Tensor) -> Tensor:
        output = run(offsets, x_n)
        return (
            label_terms(output, likelihood)
            if y is None
            else log_likelihood(output, y_n, likelihood)[None]
        )

    def weights(x_n: Tensor) -> Tensor:
        output = run(zeros, x_n)
        return label_weights(output, likelihood) if y is None else output.new_ones(1)

    labels = torch.zeros(len(x)) if y is None else y
    errors = vmap(jacrev(terms), in_dims=(None, 0, 0))(zeros, x, labels)
    p = vmap(weights)(x).detach()
    result = {}
    for name, calls in kept.items():
        if not calls:
            continue
        layer = layers[name].layer
        delta = [
            torch.stack([units_last(layer, d[:, k, 0]) for k in range(d.shape[1])], 1)
            for d in errors[name]
        ]
        result[name] = Probe(
            incoming=torch.cat([patches(layer, a) for a, _ in calls], 1),
            net=torch.cat([units_last(layer, net) for _, net in calls], 1),
            delta=torch.cat(delta, 2).detach(),
            weights=p,
        )
    return result


# -- unit Fisher matrices --------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """Dense unit Fisher matrices of one layer, (units, inputs + 1, inputs + 1), and what follows.

    The incoming mean under p is (units or 1, inputs).
    """

    F: Tensor
    mean_p: Tensor
    effective_samples: Tensor
    bias: bool = True

    @property
    def c(self) -> Tensor:
        return self.F[:, -1, -1]

    @property
    def b(self) -> Tensor:
        return self.F[:, :-1, -1]

    @property
    def A(self) -> Tensor:
        return self.F[:, :-1, :-1]

    @property
    def mean_q(self) -> Tensor:
        return self.b / self.c[:, None]

    @property
    def var_q(self) -> Tensor:
        return self.A / self.c[:, None, None] - outer(self.mean_q)

    @property
    def cov_p(self) -> Tensor:
        return self.b - self.c[:, None] * self.mean_p

    def damped(self, damping: float) -> Tensor:
        """`F` with `V + λ·mean(diag V)·I` in place of `V`."""
        V = self.var_q
        extra = damping * self.c * V.diagonal(dim1=1, dim2=2).mean(1)
        eye = torch.eye(V.shape[1], dtype=V.dtype)
        full = self.F.clone()
        full[:, :-1, :-1] += extra[:, None, None] * eye
        return full

    def healthy(self, floor: float = 1e-9) -> Tensor:
        """Units with a live error and incoming activations that vary under q."""
        V = self.var_q.diagonal(dim1=1, dim2=2).mean(1)
        scale = self.A.diagonal(dim1=1, dim2=2).mean(1) / self.c
        return (self.c > 0) & (V > floor * scale)

    def undefined_to_nan(self, value: Tensor) -> Tensor:
        """Units that are dead or do not vary have no inverse."""
        healthy = self.healthy()
        return value.where(healthy if value.dim() == 1 else healthy[:, None], torch.nan)

    def readings(self, damping: float) -> dict[str, Tensor]:
        """s, k, k0, coupling and the corrected mean from dense inverses of the bordered matrix.

        The package uses the centered form instead.
        """
        full = self.damped(damping)
        inverse = spd_inverse(full)
        A_inverse = spd_inverse(full[:, :-1, :-1])
        mean_p = self.mean_p.expand_as(self.b)
        s = inverse[:, -1, -1]
        k0 = s * (1 - dot(mean_p, matvec(A_inverse, self.b)))
        k = k0 * self.c
        coupling = dot(self.b, matvec(A_inverse, self.b)) / self.c
        readings = {
            "s": s,
            "k": k,
            "k0": k0,
            "coupling": coupling,
            "corrected_mean": mean_p - k[:, None] * self.mean_q,
        }
        return {name: self.undefined_to_nan(value) for name, value in readings.items()}

    def natural_gradient(self, g: Tensor, g0: Tensor, damping: float) -> tuple[Tensor, Tensor]:
        """The whole bordered matrix, inverted; without a bias only its upper left block."""
        full = self.damped(damping)
        if not self.bias:
            dw = self.undefined_to_nan(matvec(spd_inverse(full[:, :-1, :-1]), g))
            return dw, torch.full_like(g0, torch.nan)
        step = self.undefined_to_nan(matvec(spd_inverse(full), torch.cat([g, g0[:, None]], 1)))
        return step[:, :-1], step[:, -1]


def outer(v: Tensor) -> Tensor:
    return v[:, :, None] * v[:, None, :]


def dot(u: Tensor, v: Tensor) -> Tensor:
    return (u * v).sum(-1)


def matvec(M: Tensor, v: Tensor) -> Tensor:
    return (M * v[:, None, :]).sum(-1)


def spd_inverse(M: Tensor) -> Tensor:
    """Dense inverses of symmetric positive definite matrices, one at a time.

    Each is scaled to a unit diagonal before its eigendecomposition.
    """
    return torch.stack([_spd_inverse(matrix) for matrix in M])


def _spd_inverse(M: Tensor) -> Tensor:
    if not bool(torch.isfinite(M).all()) or float(M.diagonal().min()) <= 0:
        return torch.full_like(M, torch.nan)
    scale = M.diagonal().rsqrt()
    values, vectors = torch.linalg.eigh(M * scale[:, None] * scale[None, :])
    return (vectors / values) @ vectors.T * scale[:, None] * scale[None, :]


def unit_fishers(
    model: nn.Module,
    x: Tensor,
    likelihood: str = "categorical",
    weight_sharing: str = "per_example",
    y: Tensor | None = None,
) -> dict[str, Block]:
    """The unit Fisher matrices of every weight layer.

    They are expected over the model's labels, or those of given labels `y`.
    """
    layers = weight_layers(model)
    probes = probe_layers(model, x, likelihood, y)
    if weight_sharing == "per_example":
        gradient, p = scores(model, x, likelihood, y)
    blocks = {}
    for name, probe in probes.items():
        if weight_sharing == "per_example":
            G = gradient[name]
            full = torch.einsum("nk,nkui,nkuj->uij", p, G, G) / len(x)
            weight = torch.einsum("nk,nku->nu", p, G[..., -1].square())
        else:
            delta2 = torch.einsum("nk,nktu->ntu", probe.weights, probe.delta.square())
            a = probe.incoming.expand(-1, -1, delta2.shape[-1], -1)
            a = torch.cat([a, torch.ones_like(a[..., :1])], -1)
            full = torch.einsum("ntu,ntui,ntuj->uij", delta2, a, a) / len(x)
            weight = delta2.flatten(0, 1)
        effective = weight.sum(0).square() / weight.square().sum(0)
        blocks[name] = Block(full, probe.mean_p, effective, bias=layers[name].bias is not None)
    return blocks


# -- readings of the theory ------------------------------------------------------------------------


def cosine(u: Tensor, v: Tensor) -> float:
    return float(u.flatten() @ v.flatten() / (u.norm() * v.norm()))


def gap(block: Block, g: Tensor, g0: Tensor, damping: float) -> dict[str, float]:
    """The gradient against the unit natural gradient of one layer.

    Over (w, w0) of units that are neither dead nor singular.
    """
    keep = block.healthy()
    dw, dw0 = block.natural_gradient(g, g0, damping)
    m = block.mean_q
    V = block.var_q.diagonal(dim1=1, dim2=2)
    V = V + damping * V.mean(1, keepdim=True)
    if block.bias:
        centered = g - g0[:, None] * m
        diagonal = centered / V / block.c[:, None]
        vectors = {
            "natural": torch.cat([dw, dw0[:, None]], 1),
            "gradient": torch.cat([g, g0[:, None]], 1),
            "centered": torch.cat([centered, (g0 - dot(m, centered))[:, None]], 1),
            "diagonal": torch.cat([diagonal, (g0 / block.c - dot(m, diagonal))[:, None]], 1),
        }
    else:
        vectors = {
            "natural": dw,
            "gradient": g,
            "centered": g,
            "diagonal": g / (block.damped(damping)[:, :-1, :-1].diagonal(dim1=1, dim2=2)),
        }
    vectors = {name: vector[keep] for name, vector in vectors.items()}
    natural = vectors["natural"]
    return {
        "cos_gradient": cosine(vectors["gradient"], natural),
        "cos_centered": cosine(vectors["centered"], natural),
        "cos_diagonal": cosine(vectors["diagonal"], natural),
        "norm_ratio": float(vectors["gradient"].norm() / natural.norm()),
        "mean_in_abs": float(block.mean_p.abs().mean()),
    }


def bias_shifts(
    model: nn.Module, x: Tensor, update: Callable[[nn.Module], None]
) -> dict[str, dict[str, Tensor]]:
    """The exact bookkeeping of one update, from two recordings.

    `update` changes the given model in place; hand in a copy.
    """
    before, after = {}, {}
    for store in (before, after):
        probed, layers = probed_copy(model)
        with torch.no_grad():
            probed(x.double())
        for name, layer in layers.items():
            a = torch.cat([patches(layer.layer, a) for a, _ in layer.calls], 1).mean((0, 1))
            net = torch.cat([units_last(layer.layer, net) for _, net in layer.calls], 1).mean(
                (0, 1)
            )
            w, w0 = layer.layer.weight.detach().flatten(1), layer.layer.bias.detach()
            store[name] = (a.expand_as(w), net, w, w0)
        if store is before:
            update(model)
    shifts = {}
    for name in before:
        (a, net, w, w0), (a_, net_, w_, w0_) = before[name], after[name]
        shifts[name] = {
            "total": net_ - net,
            "own": dot(w_ - w, a) + w0_ - w0,
            "incoming": dot(w, a_ - a),
            "second_order": dot(w_ - w, a_ - a),
        }
    return shifts


def activation_statistics(values: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Mean and population variance over everything but the axis of units."""
    flat = values.double().movedim(axis, -1).flatten(0, -2)
    mean = flat.mean(0)
    return mean, (flat - mean).square().mean(0)
