"""One step of every update, written out in float64: what an optimizer's first step must be."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class LayerBatch:
    """One layer in one batch."""

    a: Tensor  # (examples, positions, inputs), the incoming activations
    delta: Tensor  # (examples, positions, units), the errors at the drawn labels
    g: Tensor  # (units, inputs), the gradient of the mean loss
    g0: Tensor  # (units,)


def layer_batches(model: nn.Module, x: Tensor, y: Tensor, drawn: Tensor) -> list[LayerBatch]:
    """Returns every weight layer of the model, in its order.

    Args:
        model: With linear layers and 2-D convolutions, whose modules run in order.
        x: Examples.
        y: Their labels, for the gradients.
        drawn: The labels that the errors are at.
    """
    calls: list[tuple[nn.Linear | nn.Conv2d, Tensor, Tensor]] = []
    layers = [module for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d)]

    def record(layer: nn.Module, args: tuple, output: Tensor) -> None:
        calls.append((layer, args[0].detach(), output))

    hooks = [layer.register_forward_hook(record) for layer in layers]
    outputs = model(x)
    for hook in hooks:
        hook.remove()
    loss = F.cross_entropy(outputs, drawn, reduction="sum")
    deltas = torch.autograd.grad(loss, [net for _, _, net in calls], retain_graph=True)
    params = [p for layer in layers for p in (layer.weight, layer.bias) if p is not None]
    gradients = torch.autograd.grad(F.cross_entropy(outputs, y), params)
    batches = []
    for (layer, a, _), delta, g, g0 in zip(
        calls, deltas, gradients[::2], gradients[1::2], strict=True
    ):
        if isinstance(layer, nn.Conv2d):
            patches = F.unfold(a, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
            batches.append(LayerBatch(patches.mT, delta.flatten(2).mT, g.flatten(1), g0))
        else:
            batches.append(LayerBatch(a[:, None], delta[:, None], g, g0))
    return batches


def unit_step(layer: LayerBatch, center: str, scale: str, damping: float) -> tuple[Tensor, Tensor]:
    """Returns ``Δw = c⁻¹ W⁻¹ (g − g₀ r)`` and ``Δw₀ = g₀/c − rᵀΔw``.

    Every unit's matrix is written out; ``damping`` is relative to its mean diagonal.
    """
    samples, error = layer.a.flatten(0, 1), layer.delta.sum(1)
    c, mean_p = error.square().mean(0), samples.mean(0)
    by_unit = torch.einsum("ntu,nti->uni", layer.delta, layer.a)
    mean_q = torch.einsum("uni,nu->ui", by_unit, error) / len(error) / c[:, None]
    r = mean_q if center == "q" else mean_p.expand_as(layer.g)
    rhs = layer.g - layer.g0[:, None] * r
    if scale == "none":
        return rhs, layer.g0 - (r * rhs).sum(1)
    if center == "q":  # every unit has its own
        A = by_unit.mT @ by_unit / len(error)
        W = A / c[:, None, None] - mean_q[:, :, None] * mean_q[:, None, :]
    else:
        W = ((samples - mean_p).T @ (samples - mean_p) / len(samples))[None]
    diagonal = W.diagonal(dim1=1, dim2=2)
    W = torch.diag_embed(diagonal) if scale == "diagonal" else W
    W = W + damping * diagonal.mean(1)[:, None, None] * torch.eye(W.shape[1], dtype=W.dtype)
    dw = torch.linalg.solve(W, rhs[:, :, None])[:, :, 0] / c[:, None]
    return dw, layer.g0 / c - (r * dw).sum(1)


def kfac_step(
    layer: LayerBatch, damping: float, joint: bool, kept: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Returns ``(B + √λ/π)⁻¹ G (A + π√λ)⁻¹``.

    ``A = E aaᵀ`` over examples and positions, ``B = E Σ δδᵀ`` over examples.

    Args:
        layer: The layer's activations, errors and gradient.
        damping: λ, shared out between the factors by π, the root of the ratio of mean diagonals.
        joint: Whether the bias is one more input that is always 1; else it has ``B`` alone.
        kept: The share of a batch in A and B.

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
