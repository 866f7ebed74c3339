"""Label rules: the seed vectors whose backward passes give errors with squares that sum to ``δ̄²``.

For the log-likelihood of every example, ``E_y (∂ ln p/∂f)(∂ ln p/∂f)ᵀ = B Bᵀ`` over the model's own
labels. Each column of ``B`` is one *seed*. A backward pass from it gives errors at every net input,
and the squares of these errors sum to ``E_y δ²`` exactly.
"""

import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.graph import Node
from torch.nn import functional as F

Likelihood = Literal["categorical", "gaussian", "bernoulli"]
Labels = Literal["expected", "sampled", "empirical"]
Outputs = Float[Tensor, "batch *positions classes"]
Seeds = Float[Tensor, "passes batch *positions classes"]
Columns = Callable[[int], Tensor]  # column c of a square root, (batch, classes)

LIKELIHOODS = ("categorical", "gaussian", "bernoulli")
LABELS = ("expected", "sampled", "empirical")
IGNORED = -100  # the label of a position that does not count, as ``ignore_index`` of PyTorch
# What autograd calls operations whose results are logits, whatever they happen to be.
UNBOUNDED = frozenset(
    "Addmm Mm Bmm Baddbmm Convolution NativeBatchNorm CudnnBatchNorm NativeLayerNorm "
    "NativeGroupNorm Relu LeakyRelu Elu Gelu Silu Softplus Prelu torch::autograd::AccumulateGrad "
    "AccumulateGrad".split()
)
# Operations that may follow them: arithmetic, pooling, and changes of shape or type.
PASSED = frozenset(
    "Add Sub Mul Div Neg Rsub View UnsafeView ReshapeAlias Squeeze Unsqueeze Transpose T Permute "
    "ToCopy Clone Select Slice Cat Stack Index Expand Mean Sum Alias AvgPool2D AdaptiveAvgPool2D "
    "Split Unbind".split()
)


@dataclass(frozen=True)
class SeedRule:
    """The seeds of one batch, made in slices, since all of them may not fit into memory at once.

    ``count`` is the number of backward passes, and ``make(i, j)`` returns seeds i to j − 1.
    """

    count: int
    make: Callable[[int, int], Seeds]


def seeds(
    outputs: Outputs,
    likelihood: Likelihood,
    labels: Labels,
    y: Any,
    generator: torch.Generator | None,
    draws: int = 1,
    mask: Tensor | None = None,
) -> SeedRule:
    """Returns the seeds of one batch under a label rule.

    ``"expected"`` is exact. It takes classes − 1 passes per position for ``"categorical"``, since a
    square root of ``diag p − ppᵀ`` has one column less than classes. It takes one per output for
    ``"gaussian"`` (unit variance) and ``"bernoulli"`` (outputs are logits). ``"sampled"`` takes one
    pass for every draw of labels from the model, and is unbiased. ``"empirical"`` takes the data's
    labels, which gives another matrix.

    Args:
        outputs: of the model, classes last.
        y: the data's labels, which only ``"empirical"`` reads.
        mask: (batch, *positions), or of the outputs' shape, True where an output counts; all others
            get the seed 0. `counted` forms it.
        generator: draws the labels of ``"sampled"``.
        draws: labels per example under ``"sampled"``; each seed carries the factor 1/√draws.

    Raises:
        ValueError: for categorical outputs of one class, and for labels that are missing or do not
            fit the outputs.

    >>> rule = seeds(torch.zeros(5, 3), "categorical", "expected", None, None)
    >>> rule.count, rule.make(0, 2).shape
    (2, torch.Size([2, 5, 3]))

    Source: section 3 of the ELU paper; the label rules as in Kunstner et al. 2019.
    """
    if likelihood == "categorical" and outputs.shape[-1] < 2:
        raise ValueError(
            f"One class, in outputs {tuple(outputs.shape)}, is always right: use "
            'likelihood="bernoulli" or "gaussian".'
        )
    outputs = outputs.detach()
    kept = None if mask is None else _like_outputs(mask, outputs)
    if labels == "expected":
        return _expected(outputs, likelihood, kept)
    if labels == "empirical":
        if y is None:
            raise ValueError("Labels 'empirical' are those of the data: give y, or batches (x, y).")
        return SeedRule(1, lambda i, j: _masked(error(outputs, likelihood, y), kept)[None])
    drawn = [_draw(outputs, likelihood, generator) for _ in range(draws)]
    return SeedRule(
        draws,
        lambda i, j: (
            torch.stack([_masked(_difference(outputs, likelihood, y), kept) for y in drawn[i:j]])
            / draws**0.5
        ),
    )


def counted(outputs: Outputs, likelihood: Likelihood, y: Any, mask: Tensor | None) -> Tensor | None:
    """Returns which positions or outputs count, True or False; None where all do.

    Categorical labels of −100 do not count, as ``ignore_index`` of PyTorch's losses has it.

    Args:
        mask: the user's, (batch, *positions) or of the outputs' shape.

    Raises:
        ValueError: for a mask of another shape.

    >>> counted(torch.zeros(3, 2), "categorical", torch.tensor([1, -100, 0]), None)
    tensor([ True, False,  True])
    """
    if mask is not None and mask.shape not in (outputs.shape, outputs.shape[:-1]):
        raise ValueError(
            f"'mask' must be {tuple(outputs.shape[:-1])}, True where a position of the outputs "
            f"{tuple(outputs.shape)} counts, got {tuple(mask.shape)}."
        )
    if mask is not None and mask.dim() == outputs.dim() and likelihood == "categorical":
        raise ValueError(
            f"'mask' must leave out positions {tuple(outputs.shape[:-1])} of categorical outputs, "
            f"not single classes, got {tuple(mask.shape)}."
        )
    if likelihood == "categorical" and has_ignored(y) and y.shape == outputs.shape[:-1]:
        kept = y.to(outputs.device) != IGNORED
        return kept if mask is None else kept & mask
    return mask


def has_ignored(y: Any) -> bool:
    """Tells whether there are categorical labels of −100."""
    return isinstance(y, Tensor) and not y.is_floating_point() and bool((y == IGNORED).any())


def aligned_labels(outputs: Outputs, y: Any, loss: Any) -> Any:
    """Returns categorical labels with one for every position of the outputs, as the model has them.

    Models of transformers take labels and return a loss. Those that predict the next token compare
    position t with the label of t + 1. The loss tells which of both it is.

    Args:
        loss: the mean over the labels that count, as the model returned it; None where it has none.

    Raises:
        ValueError: where the loss is that of neither.
    """
    if loss is None or not isinstance(y, Tensor) or y.shape != outputs.shape[:-1]:
        return y
    shifted = torch.full_like(y, IGNORED)
    if y.dim() > 1:
        shifted[:, :-1] = y[:, 1:]
    for labels in (y, shifted) if y.dim() > 1 else (y,):
        labels = labels.to(outputs.device).long()
        own = F.cross_entropy(outputs.detach().double().flatten(0, -2), labels.flatten())
        if torch.isclose(own, loss.detach().double(), rtol=1e-2, atol=1e-6):
            return labels
    raise ValueError(
        "The labels of the dict must be those of the model's loss, which is not their mean "
        "cross-entropy. Give x and y apart, with one label for every position."
    )


def _like_outputs(mask: Tensor, outputs: Tensor) -> Tensor:
    kept = mask if mask.dim() == outputs.dim() else mask.unsqueeze(-1).expand_as(outputs)
    return kept.to(outputs.device)


def _masked(x: Tensor, kept: Tensor | None) -> Tensor:
    return x if kept is None else x.masked_fill(~kept, 0)


def error(outputs: Outputs, likelihood: Likelihood, y: Any) -> Outputs:
    """Returns ``∂ ln p(y | f) / ∂f`` at the outputs: target minus prediction, for all likelihoods.

    Args:
        y: integer labels, (batch, *positions), for ``"categorical"``; else targets of the outputs'
            shape.

    Raises:
        ValueError: for labels that are not a tensor, of another shape or dtype, or outside
            0 … classes − 1.

    >>> error(torch.zeros(1, 2), "categorical", torch.tensor([1]))
    tensor([[-0.5000,  0.5000]])
    """
    y = refuse_unreadable(y)
    if likelihood != "categorical":
        if y.shape != outputs.shape:
            raise ValueError(
                f"'y' must hold {likelihood} targets of the outputs' shape "
                f"{tuple(outputs.shape)}, got {tuple(y.shape)}."
            )
        return _difference(outputs, likelihood, y.to(outputs))
    classes = outputs.shape[-1]
    if y.shape != outputs.shape[:-1] or y.is_floating_point():
        raise ValueError(
            f"'y' must hold integer categorical labels of shape {tuple(outputs.shape[:-1])}, got "
            f"{tuple(y.shape)} {y.dtype}. The classes are the last axis of the outputs "
            f"{tuple(outputs.shape)}."
        )
    ignored = (y == IGNORED).to(outputs.device)
    some = y[y != IGNORED]
    if some.numel() and (some.min() < 0 or some.max() >= classes):
        raise ValueError(
            f"'y' must hold labels in 0 … {classes - 1}, or {IGNORED} for one that does not count, "
            f"got {int(some.min())} … {int(some.max())}."
        )
    y = y.to(outputs.device).long().masked_fill(ignored, 0)
    return _difference(outputs, likelihood, y).masked_fill_(ignored.unsqueeze(-1), 0)


def _difference(outputs: Outputs, likelihood: Likelihood, y: Tensor) -> Outputs:
    """Target minus prediction. Labels are not looked at: the host would wait for a GPU."""
    if likelihood == "categorical":
        target = torch.zeros_like(outputs).scatter_(-1, y.unsqueeze(-1), 1.0)
        return target - outputs.softmax(-1)
    return y - (outputs.sigmoid() if likelihood == "bernoulli" else outputs)


def refuse_unreadable(y: Any) -> Tensor:
    """Returns labels that are a tensor, which `biasshift.measure.probe` makes of lists and arrays.

    Raises:
        ValueError: for labels of which it could not make one with a label per example.
    """
    if not isinstance(y, Tensor):
        raise ValueError(
            f"'y' must be a tensor with one label per example, got {type(y).__name__}. Convert "
            "the labels first."
        )
    return y


def are_probabilities(outputs: Outputs, likelihood: Likelihood) -> bool:
    """Tells whether outputs that should be logits are probabilities, as of a softmax or a sigmoid.

    They lie in [0, 1], and sum to 1 for ``"categorical"``. Outputs of a linear layer that merely
    happen to do so are logits: the graph of autograd tells what has made them.
    """
    x = outputs.detach().double()
    if likelihood == "gaussian" or x.min() < 0 or x.max() > 1:
        return False
    rounding = 1e-2 if torch.finfo(outputs.dtype).eps > 1e-4 else 1e-5  # of 16 bits, or more
    if likelihood == "categorical" and (x.sum(-1) - 1).abs().max() > rounding:
        return False
    waiting, visited = [outputs.grad_fn], set[Node]()
    while waiting:
        node = waiting.pop()
        if node is None or node in visited:
            continue
        visited.add(node)
        operation = re.sub(r"Backward\d*$", "", node.name())
        if operation in UNBOUNDED:
            return False
        if operation in PASSED:
            waiting += [before for before, _ in node.next_functions]
    return True


def warn_of_probabilities(likelihood: Likelihood) -> None:
    """Warns that a model returns probabilities, which are taken for logits."""
    last = "softmax" if likelihood == "categorical" else "sigmoid"
    warnings.warn(
        f"The outputs look like probabilities, but likelihood='{likelihood}' takes them for "
        f"logits. Measure the model without its last {last}.",
        stacklevel=4,
    )


def _draw(outputs: Outputs, likelihood: Likelihood, generator: torch.Generator | None) -> Tensor:
    """Labels from the model, drawn where the generator is, which may be another device."""
    at = outputs.device if generator is None else generator.device
    if likelihood == "categorical":
        flat = outputs.float().softmax(-1).flatten(0, -2).to(at)
        drawn = torch.multinomial(flat, 1, generator=generator)
        return drawn.view(outputs.shape[:-1]).to(outputs.device)
    if likelihood == "bernoulli":
        drawn = torch.bernoulli(outputs.sigmoid().to(at), generator=generator)
        return drawn.to(outputs.device)
    noise = torch.randn(outputs.shape, generator=generator, device=at, dtype=outputs.dtype)
    return outputs + noise.to(outputs.device)


def _expected(outputs: Outputs, likelihood: Likelihood, kept: Tensor | None = None) -> SeedRule:
    """One pass per position and column.

    The label of T positions is a T-tuple, whose positions must not be added up. Positions that
    count in no example take no pass.
    """
    classes = outputs.shape[-1]
    per_position = classes - 1 if likelihood == "categorical" else classes
    flat = outputs.reshape(len(outputs), -1, classes)
    places = torch.arange(flat.shape[1])
    if kept is not None:
        kept = kept.reshape(flat.shape)
        places = kept.any(2).any(0).nonzero()[:, 0].cpu()
        places = places if len(places) else torch.zeros(1, dtype=torch.long)

    def make(i: int, j: int) -> Seeds:
        passes = flat.new_zeros(j - i, *flat.shape)
        roots: dict[int, Columns] = {}
        for k in range(i, j):
            place, column = divmod(k, per_position)
            position = int(places[place])
            if position not in roots:
                roots[position] = _root(flat[:, position], likelihood)
            passes[k - i, :, position] = roots[position](column)
        return _masked(passes, kept).view(j - i, *outputs.shape)

    return SeedRule(len(places) * per_position, make)


def _root(outputs: Float[Tensor, "batch classes"], likelihood: Likelihood) -> Columns:
    """The columns of a square root of ``E_y (∂ ln p/∂f)(∂ ln p/∂f)ᵀ`` at one position."""
    if likelihood == "categorical":
        return _root_of_categorical(outputs)
    scale = torch.ones_like(outputs)
    if likelihood == "bernoulli":
        scale = (outputs.sigmoid() * (-outputs).sigmoid()).sqrt()

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
    q_before = p.flip(-1).cumsum(-1).flip(-1)  # q_{c−1}
    q = torch.cat([q_before[:, 1:], torch.zeros_like(p[:, :1])], -1)  # q_c

    def column(c: int) -> Tensor:
        scale = (p[:, c] * q[:, c] / q_before[:, c]).nan_to_num(nan=0.0).sqrt()
        later = (p[:, c + 1 :] / q[:, c : c + 1]).nan_to_num(nan=0.0, posinf=0.0)
        root = torch.zeros_like(p)
        root[:, c] = scale
        root[:, c + 1 :] = -scale[:, None] * later
        return root.to(outputs.dtype)

    return column
