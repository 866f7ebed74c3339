"""One step of every update, written out in float64 from plain autograd: what the first step of an
optimizer must be.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Seen:
    """One layer in one batch: activations (examples, positions, inputs), errors at the drawn
    labels, the gradient of the mean loss.
    """

    a: Tensor
    delta: Tensor
    g: Tensor
    g0: Tensor


def seen(model: nn.Module, x: Tensor, y: Tensor, drawn: Tensor) -> list[Seen]:
    """Every weight layer of the model, in its order."""
    calls: list[tuple[nn.Linear | nn.Conv2d, Tensor, Tensor]] = []
    layers = [module for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    hooks = [
        layer.register_forward_hook(
            lambda layer, args, output: calls.append((layer, args[0].detach(), output))
        )
        for layer in layers
    ]
    outputs = model(x)
    for hook in hooks:
        hook.remove()
    deltas = torch.autograd.grad(
        F.cross_entropy(outputs, drawn, reduction="sum"),
        [call[2] for call in calls],
        retain_graph=True,
    )
    params = [p for layer in layers for p in (layer.weight, layer.bias) if p is not None]
    gradients = torch.autograd.grad(F.cross_entropy(outputs, y), params)
    found = []
    for (layer, a, _), delta, g, g0 in zip(
        calls, deltas, gradients[::2], gradients[1::2], strict=True
    ):
        if isinstance(layer, nn.Conv2d):
            patches = F.unfold(a, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
            found.append(Seen(patches.mT, delta.flatten(2).mT, g.flatten(1), g0))
        else:
            found.append(Seen(a[:, None], delta[:, None], g, g0))
    return found


def unit_step(layer: Seen, center: str, scale: str, damping: float) -> tuple[Tensor, Tensor]:
    """``Δw = c⁻¹ W⁻¹ (g − g₀ r)``, ``Δw₀ = g₀/c − rᵀΔw``, every unit's matrix written out."""
    samples, error = layer.a.flatten(0, 1), layer.delta.sum(1)
    c, mean_p = error.square().mean(0), samples.mean(0)
    by_unit = torch.einsum("ntu,nti->uni", layer.delta, layer.a)
    mean_q = torch.einsum("uni,nu->ui", by_unit, error) / len(error) / c[:, None]
    r = mean_q if center == "q" else mean_p.expand_as(layer.g)
    rhs = layer.g - layer.g0[:, None] * r
    if scale == "none":
        return rhs, layer.g0 - (r * rhs).sum(1)
    if center == "q":  # every unit has its own
        W = (
            by_unit.mT @ by_unit / len(error) / c[:, None, None]
            - mean_q[:, :, None] * mean_q[:, None, :]
        )
    else:
        W = ((samples - mean_p).T @ (samples - mean_p) / len(samples))[None]
    diagonal = W.diagonal(dim1=1, dim2=2)
    W = torch.diag_embed(diagonal) if scale == "diagonal" else W
    W = W + damping * diagonal.mean(1)[:, None, None] * torch.eye(W.shape[1], dtype=W.dtype)
    dw = torch.linalg.solve(W, rhs[:, :, None])[:, :, 0] / c[:, None]
    return dw, layer.g0 / c - (r * dw).sum(1)


def kfac_step(layer: Seen, damping: float, joint: bool, kept: float = 1.0) -> tuple[Tensor, Tensor]:
    """``(B + √λ/π)⁻¹ G (A + π√λ)⁻¹`` with ``A = E aaᵀ`` over examples and positions, ``B = E Σ
    δδᵀ`` over examples.

    ``joint``: the bias is one more input that is always 1; else it has ``B`` alone. ``kept``: the
    share of a batch in A and B.

    Source: Martens & Grosse 2015, sections 3 and 6.3; Grosse & Martens 2016 for convolutions.
    """
    samples, errors, G = layer.a.flatten(0, 1), layer.delta.flatten(0, 1), layer.g
    if joint:
        samples, G = F.pad(samples, (0, 1), value=1.0), torch.cat([G, layer.g0[:, None]], 1)
    A, B = kept * samples.T @ samples / len(samples), kept * errors.T @ errors / len(layer.delta)
    pi = (A.diagonal().mean() / B.diagonal().mean()).sqrt()
    A = A + damping**0.5 * pi * torch.eye(len(A), dtype=A.dtype)
    B = B + damping**0.5 / pi * torch.eye(len(B), dtype=B.dtype)
    step = torch.linalg.solve(B, torch.linalg.solve(A, G.T).T)
    return (step[:, :-1], step[:, -1]) if joint else (step, torch.linalg.solve(B, layer.g0))
