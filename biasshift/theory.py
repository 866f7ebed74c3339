"""The paper's formulas, literally: tensors in, tensors out, batched over the units of a layer.

Nothing here is estimated or guarded: these functions say what the theorems say, and the rest of the
package is tested against them. Notation (Clevert, Unterthiner & Hochreiter 2016, section 3 and
appendix): the unit Fisher matrix of one unit, bias last, is ``F = [[A, b], [bᵀ, c]]`` with ``A = c
(V + m mᵀ)`` and ``b = c m``, where ``m = E_q(a)`` and ``V = Var_q(a)`` are the mean and covariance
of the incoming activations under ``q ∝ δ² p``, and ``c = E_p(δ²)``.
"""

import torch
from jaxtyping import Float
from torch import Tensor

Matrices = Float[Tensor, "units inputs inputs"]
Vectors = Float[Tensor, "units inputs"]
Scalars = Float[Tensor, " units"]
Mean = Float[Tensor, " inputs"] | Float[Tensor, "units inputs"]


def solve(W: Matrices, rhs: Vectors) -> Vectors:
    """``W⁻¹ rhs`` for every unit, by Cholesky: batched LU can hang on the CPU (PyTorch issues
    141358 and 142815).
    """
    return torch.cholesky_solve(rhs.unsqueeze(-1), torch.linalg.cholesky(W)).squeeze(-1)


def dot(x: Tensor, y: Tensor) -> Tensor:
    """The inner product over the last axis."""
    return (x * y).sum(-1)


def damp(W: Matrices, damping: float) -> Matrices:
    """``W + λ mean(diag W) I``, unit by unit: λ is relative to the average variance, so it has no
    unit.
    """
    ridge = damping * W.diagonal(dim1=-2, dim2=-1).mean(-1)
    return W + ridge[:, None, None] * torch.eye(W.shape[-1], dtype=W.dtype, device=W.device)


# -- Lemma 1 and Theorem 1 -------------------------------------------------------------------------


def s_from_blocks(A: Matrices, b: Vectors, c: Scalars) -> Scalars:
    """``s = 1 / (c − bᵀ A⁻¹ b)``: the bias corner of the inverse Fisher matrix (Lemma 1)."""
    return 1 / (c - dot(b, solve(A, b)))


def s_from_center(c: Scalars, m: Vectors, V: Matrices) -> Scalars:
    """``s = c⁻¹ (1 + mᵀ V⁻¹ m)``: the same ``s``, without the cancellation (Theorem 1).

    >>> s_from_center(torch.tensor([2.0]), torch.tensor([[3.0]]), torch.tensor([[[1.0]]]))
    tensor([5.])
    """
    return (1 + dot(m, solve(V, m))) / c


def block_inverse(A: Matrices, b: Vectors, c: Scalars) -> tuple[Matrices, Vectors, Scalars]:
    """``F⁻¹ = [[K, u], [uᵀ, s]]`` with ``u = −s A⁻¹ b`` and ``K = A⁻¹ + u uᵀ / s`` (Lemma 1)."""
    s = s_from_blocks(A, b, c)
    u = -s[:, None] * solve(A, b)
    K = (
        torch.cholesky_inverse(torch.linalg.cholesky(A))
        + u[:, :, None] * u[:, None, :] / s[:, None, None]
    )
    return K, u, s


def natural_gradient_blocks(
    A: Matrices, b: Vectors, c: Scalars, g: Vectors, g0: Scalars
) -> tuple[Vectors, Scalars]:
    """The unit natural gradient ``(Δw, Δw₀) = F⁻¹ (g, g₀)`` in the paper's block form (Theorem 1).

    ``Δw = A⁻¹ (g − Δw₀ b)`` and ``Δw₀ = s (g₀ − bᵀ A⁻¹ g)``: the bias first absorbs what the
    weights cannot explain.
    """
    dw0 = s_from_blocks(A, b, c) * (g0 - dot(b, solve(A, g)))
    return solve(A, g - dw0[:, None] * b), dw0


def centered_update(
    c: Scalars, r: Mean, W: Matrices, g: Vectors, g0: Scalars
) -> tuple[Vectors, Scalars]:
    """``Δw = c⁻¹ W⁻¹ (g − g₀ r)``, ``Δw₀ = g₀/c − rᵀΔw``: with ``r = m``, ``W = V`` this is Theorem
    1, centered.

    Read it: center the incoming activations at ``r``, whiten them with ``W``, then choose the bias
    so that the step of the weights moves nothing at ``r``. Hence ``rᵀΔw + Δw₀ = g₀/c`` for every
    ``r`` and ``W``.

    >>> V, m, one = torch.eye(2)[None], torch.tensor([[1.0, 0.0]]), torch.ones(1)
    >>> centered_update(one, m, V, torch.tensor([[3.0, 1.0]]), one)
    (tensor([[2., 1.]]), tensor([-1.]))
    """
    dw = solve(W, g - g0[:, None] * r) / c[:, None]
    return dw, g0 / c - dot(r, dw)


def coupling(m: Vectors, V: Matrices) -> Scalars:
    """``h = mᵀ (V + m mᵀ)⁻¹ m``, in [0, 1): the R² of regressing the constant 1 on the incoming
    activations under q.

    At 0 bias and weights do not interact; towards 1 the incoming activations act as a second bias.
    ``s c = 1 / (1 − h)``.

    >>> coupling(torch.tensor([[2.0]]), torch.tensor([[[1.0]]]))
    tensor([0.8000])
    """
    q = dot(m, solve(V, m))
    return q / (1 + q)


def hotelling(q: Tensor, effective_samples: Tensor, inputs: int) -> Tensor:
    """``q = mᵀ V⁻¹ m`` with its finite-sample bias removed: ``q (N − d − 2)/(N − 1) − d/N``, N the
    effective samples.

    Exact in the mean for normal activations with equal weights (q is Hotelling's statistic over N),
    where ``E q̂`` is ``(q + d/N)(N − 1)/(N − d − 2)``. NaN where ``N ≤ d + 2`` leaves nothing to
    estimate.

    >>> hotelling(torch.tensor([0.5]), torch.tensor([103.0]), 1)
    tensor([0.4805])
    """
    n = effective_samples
    corrected = q * (n - inputs - 2) / (n - 1) - inputs / n
    return corrected.where(n > inputs + 2, torch.nan)


# -- Theorem 2 -------------------------------------------------------------------------------------


def bias_shift(mean_p: Mean, dw: Vectors, dw0: Scalars) -> Scalars:
    """``μᵀΔw + Δw₀``: by how much an update moves the unit's mean net input."""
    return dot(mean_p, dw) + dw0


def k_published(mean_p: Mean, m: Vectors, V: Matrices) -> Scalars:
    """``k = 1 + (m − μ)ᵀ V⁻¹ m``: how strongly Theorem 2 corrects the incoming mean, ``μ − k m``.
    Any sign is possible.
    """
    return 1 + dot(m - mean_p, solve(V, m))


def k_poster(A: Matrices, b: Vectors, c: Scalars, mean_p: Mean) -> Scalars:
    """``s E_p(δ²) Covᵀ A⁻¹ m``: the k of the poster and of the first arXiv version. The published k
    is one larger.
    """
    cov_p = b - c[:, None] * mean_p
    return s_from_blocks(A, b, c) * dot(cov_p, solve(A, b))


def k0(k: Scalars, c: Scalars) -> Scalars:
    """``k₀ = k / c``: the factor of the bias gradient in Theorem 2."""
    return k / c


def k0_from_blocks(A: Matrices, b: Vectors, c: Scalars, mean_p: Mean) -> Scalars:
    """``k₀ = s (1 − μᵀ A⁻¹ b)``: the same factor from the blocks."""
    return s_from_blocks(A, b, c) * (1 - dot(mean_p, solve(A, b)))


def theorem2_shift(
    A: Matrices, b: Vectors, c: Scalars, mean_p: Mean, g: Vectors, g0: Scalars
) -> Scalars:
    """``(μ − k m)ᵀ A⁻¹ g + k₀ g₀``: the bias shift of the unit natural gradient (Theorem 2)."""
    k0_ = k0_from_blocks(A, b, c, mean_p)
    effective_mean = mean_p - k0_[:, None] * b  # k m = (k₀ c)(b / c)
    return dot(effective_mean, solve(A, g)) + k0_ * g0


def shift_parts(
    w: Vectors, dw: Vectors, dw0: Scalars, mean: Mean, dmean: Mean
) -> tuple[Scalars, Scalars, Scalars]:
    """The change of a mean net input, exactly: ``(Δwᵀμ + Δw₀, wᵀΔμ, ΔwᵀΔμ)`` = own, incoming,
    second order.

    ``w`` and ``mean`` are from before the step. The incoming part is the bias shift that a unit
    inherits from below.
    """
    return bias_shift(mean, dw, dw0), dot(w, dmean.expand_as(w)), dot(dw, dmean.expand_as(dw))
