"""Fisher matrices of attention and recurrent layers by plain autograd, example by example.

They differentiate by the module's own parameters, through the model as PyTorch runs it.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

# layer → the module's names of weight and bias, and the first of the layer's rows in them
Places = Mapping[str, tuple[str, str | None, int]]


def _label_terms(output: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
    """ln p of every label of every position, and its weight; of the data's labels all at once."""
    logs = output.log_softmax(-1)
    if y is not None:
        return logs.gather(-1, y[..., None]).sum()[None], torch.ones(1, dtype=logs.dtype)
    return logs.flatten(), logs.detach().exp().flatten()


def blocks_by_parameters(
    model: nn.Module,
    places: Places,
    units: Mapping[str, int],
    x: Tensor,
    y: Tensor | None = None,
    run: Callable[[Tensor], Tensor] | None = None,
) -> dict[str, Tensor]:
    """(units, params, params) of every layer, bias last, from ∇ ln p by whole parameters."""
    run = model if run is None else run
    parameters = dict(model.named_parameters())
    names = sorted({n for weight, bias, _ in places.values() for n in (weight, bias) if n})
    total: dict[str, Tensor | float] = dict.fromkeys(places, 0.0)
    for n in range(len(x)):
        terms, weights = _label_terms(run(x[n : n + 1]), None if y is None else y[n : n + 1])
        for term, weight in zip(terms, weights, strict=True):
            found = torch.autograd.grad(
                term, [parameters[name] for name in names], retain_graph=True, allow_unused=True
            )
            gradients = {
                name: torch.zeros_like(parameters[name]) if g is None else g
                for name, g in zip(names, found, strict=True)
            }
            for layer, (of_weight, of_bias, first) in places.items():
                rows = slice(first, first + units[layer])
                g = gradients[of_weight][rows]
                if of_bias is not None:
                    at = rows if len(gradients[of_bias]) > units[layer] else slice(None)
                    g = torch.cat([g, gradients[of_bias][at, None]], 1)
                total[layer] = total[layer] + weight * g[:, :, None] * g[:, None, :] / len(x)
    return total  # pyright: ignore[reportReturnType]


def blocks_by_positions(
    nets: Callable[[Tensor], tuple[Tensor, dict[str, list[tuple[Tensor, Tensor]]]]],
    x: Tensor,
) -> dict[str, Tensor]:
    """``Σ_t Σ_y p_y δ_t² ã_t ã_tᵀ``: positions as if they were independent.

    Args:
        nets: x → outputs, and of every layer pairs of what comes in and its net inputs,
            (1, …, inputs) and (1, …, units).
    """
    total: dict[str, Tensor | float] = {}
    for n in range(len(x)):
        output, layers = nets(x[n : n + 1])
        terms, weights = _label_terms(output, None)
        for term, weight in zip(terms, weights, strict=True):
            for layer, pairs in layers.items():
                for a, net in pairs:
                    (delta,) = torch.autograd.grad(term, net, retain_graph=True, allow_unused=True)
                    delta = torch.zeros_like(net) if delta is None else delta
                    a1 = torch.cat([a, torch.ones_like(a[..., :1])], -1).flatten(0, -2).detach()
                    d2 = delta.flatten(0, -2).square()
                    new = weight * torch.einsum("tu,ti,tj->uij", d2, a1, a1) / len(x)
                    total[layer] = total.get(layer, 0.0) + new
    return total  # pyright: ignore[reportReturnType]
