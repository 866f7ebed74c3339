"""The label rules: which vectors, sent backwards from a model's outputs, have errors whose squares
sum to ``δ̄²``.

For the log-likelihood of every example, ``E_y (∂ ln p/∂f)(∂ ln p/∂f)ᵀ = B Bᵀ`` over the model's own
labels. Each column of ``B`` is one *seed*: a backward pass from it gives errors at every net input,
and their squares sum to ``E_y δ²`` exactly.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

Likelihood = Literal["categorical", "gaussian", "bernoulli"]
Labels = Literal["expected", "sampled", "empirical"]
Outputs = Float[Tensor, "batch *positions classes"]
Seeds = Float[Tensor, "passes batch *positions classes"]
Columns = Callable[[int], Tensor]  # column c of a square root, (batch, classes)

LIKELIHOODS = ("categorical", "gaussian", "bernoulli")
LABELS = ("expected", "sampled", "empirical")


@dataclass(frozen=True)
class SeedRule:
    """``count`` backward passes; ``make(i, j)`` gives seeds i to j − 1, which need not all exist at
    once.
    """

    count: int
    make: Callable[[int, int], Seeds]


def check(likelihood: str, labels: str) -> None:
    """Raises ValueError for a rule that does not exist."""
    for name, value, known in (("likelihood", likelihood, LIKELIHOODS), ("labels", labels, LABELS)):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, got {value!r}.")


def seeds(
    outputs: Outputs,
    likelihood: Likelihood,
    labels: Labels,
    y: Tensor | None,
    generator: torch.Generator | None,
    draws: int = 1,
) -> SeedRule:
    """The seeds of one batch under a label rule.

    ``expected`` is exact: classes − 1 passes per position for ``categorical`` (a square root of
    ``diag p − ppᵀ`` has one column less than classes), one per output for ``gaussian`` (unit
    variance) and ``bernoulli`` (outputs are logits). ``sampled`` is one pass for every draw of
    labels from the model, unbiased. ``empirical`` takes the data's labels: another matrix.
    """
    if likelihood == "categorical" and outputs.shape[-1] < 2:
        raise ValueError(
            f"One class, in outputs {tuple(outputs.shape)}, is always right: use "
            'likelihood="bernoulli" or "gaussian".'
        )
    if labels == "expected":
        return _expected(outputs.detach(), likelihood)
    if labels == "empirical":
        if y is None:
            raise ValueError('labels="empirical" needs the data\'s labels: give batches (x, y).')
        return SeedRule(1, lambda i, j: error(outputs.detach(), likelihood, y)[None])
    drawn = [_draw(outputs.detach(), likelihood, generator) for _ in range(draws)]
    return SeedRule(
        draws,
        lambda i, j: (
            torch.stack([error(outputs.detach(), likelihood, y) for y in drawn[i:j]]) / draws**0.5
        ),
    )


def error(outputs: Outputs, likelihood: Likelihood, y: Tensor) -> Outputs:
    """``∂ ln p(y | z) / ∂ outputs``: target minus prediction, for all three likelihoods."""
    if likelihood != "categorical":
        if y.shape != outputs.shape:
            raise ValueError(
                f"{likelihood} targets must have the outputs' shape {tuple(outputs.shape)}, got "
                f"{tuple(y.shape)}."
            )
        return y.to(outputs) - (outputs.sigmoid() if likelihood == "bernoulli" else outputs)
    classes = outputs.shape[-1]
    if y.shape != outputs.shape[:-1] or y.is_floating_point():
        expected = f"integer labels of shape {tuple(outputs.shape[:-1])} for outputs {tuple(outputs.shape)} (classes last)"
        raise ValueError(f"categorical needs {expected}, got {tuple(y.shape)} {y.dtype}.")
    if y.numel() and (y.min() < 0 or y.max() >= classes):
        raise ValueError(
            f"labels must lie in 0 … {classes - 1}, got {int(y.min())} … {int(y.max())}."
        )
    target = torch.zeros_like(outputs).scatter_(-1, y.to(outputs.device).long().unsqueeze(-1), 1.0)
    return target - outputs.softmax(-1)


def _draw(outputs: Outputs, likelihood: Likelihood, generator: torch.Generator | None) -> Tensor:
    if likelihood == "categorical":
        flat = outputs.float().softmax(-1).flatten(0, -2)
        return torch.multinomial(flat, 1, generator=generator).view(outputs.shape[:-1])
    if likelihood == "bernoulli":
        return torch.bernoulli(outputs.sigmoid(), generator=generator)
    noise = torch.randn(
        outputs.shape, generator=generator, device=outputs.device, dtype=outputs.dtype
    )
    return outputs + noise


def _expected(outputs: Outputs, likelihood: Likelihood) -> SeedRule:
    """One pass per position and column: the label of T positions is a T-tuple, whose positions must
    not be added up.
    """
    classes = outputs.shape[-1]
    per_position = classes - 1 if likelihood == "categorical" else classes
    flat = outputs.reshape(len(outputs), -1, classes)

    def make(i: int, j: int) -> Seeds:
        passes = flat.new_zeros(j - i, *flat.shape)
        roots: dict[int, Columns] = {}
        for k in range(i, j):
            position, column = divmod(k, per_position)
            if position not in roots:
                roots[position] = _root(flat[:, position], likelihood)
            passes[k - i, :, position] = roots[position](column)
        return passes.view(j - i, *outputs.shape)

    return SeedRule(flat.shape[1] * per_position, make)


def _root(outputs: Float[Tensor, "batch classes"], likelihood: Likelihood) -> Columns:
    """The columns of a square root of ``E_y (∂ ln p/∂f)(∂ ln p/∂f)ᵀ`` at one position."""
    if likelihood == "categorical":
        return _root_of_categorical(outputs)
    scale = (
        (outputs.sigmoid() * (-outputs).sigmoid()).sqrt()
        if likelihood == "bernoulli"
        else torch.ones_like(outputs)
    )

    def column(c: int) -> Tensor:
        root = torch.zeros_like(scale)
        root[:, c] = scale[:, c]
        return root

    return column


def _root_of_categorical(outputs: Float[Tensor, "batch classes"]) -> Columns:
    """Column c of the Cholesky factor of ``diag p − ppᵀ``, in closed form.

    With ``q_c = Σ_{i>c} p_i`` it is ``√(p_c q_c / q_{c−1})`` times (1 at c, minus the distribution
    of the later classes). Sums of positive numbers only: nothing cancels, however sure the model
    is.
    """
    p = outputs.double().softmax(-1)
    from_here = p.flip(-1).cumsum(-1).flip(-1)  # q_{c−1}
    after = torch.cat([from_here[:, 1:], torch.zeros_like(p[:, :1])], -1)  # q_c

    def column(c: int) -> Tensor:
        scale = (p[:, c] * after[:, c] / from_here[:, c]).nan_to_num(nan=0.0).sqrt()
        root = torch.zeros_like(p)
        root[:, c] = scale
        root[:, c + 1 :] = -scale[:, None] * (p[:, c + 1 :] / after[:, c : c + 1]).nan_to_num(
            nan=0.0, posinf=0.0
        )
        return root.to(outputs.dtype)

    return column
