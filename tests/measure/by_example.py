"""An oracle for tests of inputs and outputs: example by example, with plain autograd.

It knows parameters and logits, and nothing of hooks, layers' inputs or batches.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

Logits = Callable[[int], Tensor]  # example → its logits, (*positions, classes)


def unit_fishers(
    layer: nn.Module,
    logits: Logits,
    examples: int,
    counted: Sequence[Tensor] | None = None,
    y: Sequence[Tensor] | None = None,
) -> Tensor:
    """Σ over the positions that count of Σ_y p ∇ln p ∇ln pᵀ, a mean over examples; (units, d + 1,
    d + 1). With labels y, (∇ ln p)(∇ ln p)ᵀ of the sum over positions.
    """
    weight, bias = layer.weight, layer.bias
    units = len(bias)
    total = torch.zeros(units, weight[0].numel() + 1, weight[0].numel() + 1, dtype=weight.dtype)
    for n in range(examples):
        logs = logits(n).log_softmax(-1)
        flat = logs.reshape(-1, logs.shape[-1])
        kept = torch.ones(len(flat), dtype=torch.bool) if counted is None else counted[n].flatten()
        if y is not None:
            labels = y[n].flatten()
            terms = [(1.0, sum(flat[t, labels[t]] for t in kept.nonzero()[:, 0].tolist()))]
        else:
            terms = [
                (float(flat[t, c].detach().exp()), flat[t, c])
                for t in kept.nonzero()[:, 0].tolist()
                for c in range(flat.shape[1])
            ]
        for p, term in terms:
            if not isinstance(term, Tensor):  # no position counts
                continue
            g, g0 = torch.autograd.grad(term, [weight, bias], retain_graph=True)
            v = torch.cat([g.flatten(1), g0[:, None]], 1)
            total += p * v[:, :, None] * v[:, None, :] / examples
    return total


def assert_same(actual: Tensor, expected: Tensor) -> None:
    """Equal to rounding of float64, measured by the largest entry."""
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= 1e-10 * expected.abs().max() + 1e-14
