"""Oracles that know parameters and logits alone: plain autograd, example by example.

Nothing here knows of hooks, layers' inputs or batches, and nothing is taken from the package.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

Logits = Callable[[int], Tensor]  # example → its logits, (*positions, classes)


def gradients(value: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Those of every unit, (units, inputs + 1), bias last; without a bias (units, inputs)."""
    leaves = [weight] if bias is None else [weight, bias]
    found = torch.autograd.grad(value, leaves, retain_graph=True, allow_unused=True)
    g, *rest = [torch.zeros_like(p) if d is None else d for d, p in zip(found, leaves, strict=True)]
    return torch.cat([g.flatten(1), *(g0[:, None] for g0 in rest)], 1)


def outer(v: Tensor) -> Tensor:
    return v[:, :, None] * v[:, None, :]


def blocks(
    layer: nn.Module | tuple[Tensor, Tensor | None],
    logits: Logits,
    examples: int,
    y: Tensor | None = None,
    counted: Sequence[Tensor] | None = None,
) -> Tensor:
    """F of every unit: Σ_y p ∇ln p ∇ln pᵀ, summed over positions, a mean over examples.

    With labels ``y``, the square of the gradient of an example's log-likelihood.
    """
    weight, bias = layer if isinstance(layer, tuple) else (layer.weight, layer.bias)
    total = 0.0
    for n in range(examples):
        logs = logits(n).log_softmax(-1)
        logs = logs.reshape(-1, logs.shape[-1])
        kept = [t for t in range(len(logs)) if counted is None or counted[n].flatten()[t]]
        if y is not None:
            labels = y[n].flatten()
            if kept:
                value = torch.stack([logs[t, labels[t]] for t in kept]).sum()
                total = total + outer(gradients(value, weight, bias))
            continue
        for t in kept:
            for c in range(logs.shape[1]):
                p = float(logs[t, c].detach().exp())
                total = total + p * outer(gradients(logs[t, c], weight, bias))
    return torch.as_tensor(total) / examples


def all_blocks(
    model: nn.Module, names: Sequence[str], x: Tensor, y: Tensor | None = None
) -> dict[str, Tensor]:
    """F of the named layers of a model whose examples are in front and whose classes are last."""
    return {
        name: blocks(model.get_submodule(name), lambda n: model(x[n : n + 1])[0], len(x), y)
        for name in names
    }


def solve(matrices: Tensor, vectors: Tensor) -> Tensor:
    """Unit by unit; a batched LU may hang on some CPUs."""
    return torch.stack([torch.linalg.solve(m, v) for m, v in zip(matrices, vectors, strict=True)])


def update(
    F: Tensor,
    g: Tensor,
    center: str,
    scale: str,
    damping: float,
    a: Tensor | None = None,
) -> Tensor:
    """``Δw = c⁻¹ W⁻¹ (g − g₀ r)``, ``Δw₀ = g₀/c − rᵀΔw`` with W + λ mean(diag W) I; bias last.

    Args:
        g: gradients (units, inputs + 1).
        a: incoming activations (samples, inputs), for the center "p".
    """
    c, b, A = F[:, -1, -1], F[:, :-1, -1], F[:, :-1, :-1]
    g, g0 = g[:, :-1], g[:, -1]
    if center == "q":
        r = b / c[:, None]
        W = A / c[:, None, None] - outer(r)
    elif center == "p":
        assert a is not None
        r, W = a.mean(0).expand(len(F), -1), (a - a.mean(0)).T @ (a - a.mean(0)) / len(a)
        W = W.expand(len(F), -1, -1)
    else:
        r, W = torch.zeros_like(b), A / c[:, None, None]
    dw = g - g0[:, None] * r
    if scale == "none":
        return torch.cat([dw, (g0 - (r * dw).sum(1))[:, None]], 1)
    diagonal = W.diagonal(dim1=1, dim2=2)
    W = torch.diag_embed(diagonal) if scale == "diagonal" else W
    W = W + torch.diag_embed(damping * diagonal.mean(1, keepdim=True).expand_as(diagonal))
    dw = solve(W, dw) / c[:, None]
    return torch.cat([dw, (g0 / c - (r * dw).sum(1))[:, None]], 1)


def without_bias(F: Tensor, g: Tensor, damping: float) -> Tensor:
    """``Δw = A⁻¹ g``, A damped as ever, and ``Δw₀ = 0``."""
    A = F[:, :-1, :-1]
    diagonal = A.diagonal(dim1=1, dim2=2)
    A = A + torch.diag_embed(damping * diagonal.mean(1, keepdim=True).expand_as(diagonal))
    return torch.cat([solve(A, g[:, :-1]), torch.zeros(len(F), 1, dtype=F.dtype)], 1)


def moved(layer: nn.Module, before: tuple[Tensor, Tensor]) -> Tensor:
    """What a step of rate 1 has subtracted from a layer, bias last."""
    w, w0 = before[0] - layer.weight.detach(), before[1] - layer.bias.detach()
    return torch.cat([w.flatten(1), w0[:, None]], 1)


def present(layer: nn.Module) -> tuple[Tensor, Tensor]:
    return layer.weight.detach().clone(), layer.bias.detach().clone()


def hooked_mean(model: nn.Module, x: Tensor, name: str, axis: int) -> Tensor:
    """The mean of a module's output over all axes but one, by a hook of its own."""
    outputs: list[Tensor] = []
    hook = model.get_submodule(name).register_forward_hook(lambda m, a, o: outputs.append(o))
    with torch.no_grad():
        model(x)
    hook.remove()
    (out,) = outputs
    return out.mean([i for i in range(out.dim()) if i != axis % out.dim()])
