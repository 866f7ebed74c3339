"""The formulas of the paper as functions of tensors, batched over the units of a layer.

Nothing here is estimated or guarded. These functions state what the theorems state, and the rest of
the package is tested against them.

Notation (Clevert, Unterthiner & Hochreiter 2016, section 3 and appendix): the unit Fisher matrix of
one unit, bias last, is ``F = [[A, b], [bᵀ, c]]`` with ``A = c (V + m mᵀ)`` and ``b = c m``. Here
``m = E_q(a)`` and ``V = Var_q(a)`` are the mean and the covariance of the incoming activations
under ``q ∝ δ² p``, and ``c = E_p(δ²)``. The mean under the data p is ``μ = E_p(a)``.
"""

import torch
from jaxtyping import Float
from torch import Tensor

Matrices = Float[Tensor, "units inputs inputs"]
Vectors = Float[Tensor, "units inputs"]
Scalars = Float[Tensor, " units"]
Mean = Float[Tensor, " inputs"] | Float[Tensor, "units inputs"]


def solve(W: Matrices, rhs: Vectors) -> Vectors:
    """Returns ``W⁻¹ rhs`` for every unit, by a Cholesky factorization.

    Every W must be positive definite. Batched LU is not used because it can hang on the CPU
    (PyTorch issues 141358 and 142815).
    """
    return torch.cholesky_solve(rhs.unsqueeze(-1), torch.linalg.cholesky(W)).squeeze(-1)


def dot(x: Tensor, y: Tensor) -> Tensor:
    """Returns the inner product of two tensors over their last axis; the others broadcast."""
    return (x * y).sum(-1)


def damp(W: Matrices, damping: float) -> Matrices:
    """Returns ``W + λ mean(diag W) I`` for every unit.

    The damping λ is relative to the unit's average variance. It has no unit, and scaling the
    activations leaves its effect as it is.

    >>> damp(torch.diag(torch.tensor([1.0, 3.0]))[None], 0.5)
    tensor([[[2., 0.],
             [0., 4.]]])
    """
    ridge = damping * W.diagonal(dim1=-2, dim2=-1).mean(-1)
    return W + ridge[:, None, None] * torch.eye(W.shape[-1], dtype=W.dtype, device=W.device)


# -- Lemma 1 and Theorem 1 -------------------------------------------------------------------------


def s_from_blocks(A: Matrices, b: Vectors, c: Scalars) -> Scalars:
    """Returns ``s = 1 / (c − bᵀ A⁻¹ b)``, the bias corner of the inverse Fisher matrix (Lemma 1).

    The difference cancels where the coupling of bias and weights is strong; `s_from_center` avoids
    it.
    """
    return 1 / (c - dot(b, solve(A, b)))


def s_from_center(c: Scalars, m: Vectors, V: Matrices) -> Scalars:
    """Returns ``s = c⁻¹ (1 + mᵀ V⁻¹ m)``, without the cancellation of `s_from_blocks` (Theorem 1).

    The bias update grows with the distance of the mean m from 0, measured in standard deviations of
    the incoming activations under q.

    >>> s_from_center(torch.tensor([2.0]), torch.tensor([[3.0]]), torch.tensor([[[1.0]]]))
    tensor([5.])
    """
    return (1 + dot(m, solve(V, m))) / c


def block_inverse(A: Matrices, b: Vectors, c: Scalars) -> tuple[Matrices, Vectors, Scalars]:
    """Returns the blocks K, u and s of ``F⁻¹ = [[K, u], [uᵀ, s]]`` (Lemma 1).

    They are ``s = 1 / (c − bᵀ A⁻¹ b)``, ``u = −s A⁻¹ b`` and ``K = A⁻¹ + u uᵀ / s``: the inverse
    without a bias, and one matrix of rank one for the coupling with it.
    """
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
    """Returns the unit natural gradient ``(Δw, Δw₀) = F⁻¹ (g, g₀)`` in block form (Theorem 1).

    ``Δw = A⁻¹ (g − Δw₀ b)`` and ``Δw₀ = s (g₀ − bᵀ A⁻¹ g)``: the bias takes the part of its
    gradient that the weights cannot explain, and the weights the rest.
    """
    dw0 = s_from_blocks(A, b, c) * (g0 - dot(b, solve(A, g)))
    return solve(A, g - dw0[:, None] * b), dw0


def centered_update(
    c: Scalars, r: Mean, W: Matrices, g: Vectors, g0: Scalars
) -> tuple[Vectors, Scalars]:
    """Returns ``Δw = c⁻¹ W⁻¹ (g − g₀ r)`` and ``Δw₀ = g₀/c − rᵀΔw``, the update centered at r.

    With ``r = m`` and ``W = V`` this is Theorem 1. Center the incoming activations at r, whiten
    them with W, then choose the bias so that the step of the weights moves nothing at r. Hence
    ``rᵀΔw + Δw₀ = g₀/c`` for every r and W.

    >>> V, m, one = torch.eye(2)[None], torch.tensor([[1.0, 0.0]]), torch.ones(1)
    >>> centered_update(one, m, V, torch.tensor([[3.0, 1.0]]), one)
    (tensor([[2., 1.]]), tensor([-1.]))
    """
    dw = solve(W, g - g0[:, None] * r) / c[:, None]
    return dw, g0 / c - dot(r, dw)


def coupling(m: Vectors, V: Matrices) -> Scalars:
    """Returns ``h = mᵀ (V + m mᵀ)⁻¹ m``, in [0, 1): the coupling of bias and weights.

    It is the R² of regressing the constant 1 on the incoming activations under q. At 0 bias and
    weights do not interact; towards 1 the incoming activations act as a second bias. It determines
    the inflation of the bias update, ``s c = 1 / (1 − h)``.

    >>> coupling(torch.tensor([[2.0]]), torch.tensor([[[1.0]]]))
    tensor([0.8000])
    """
    q = dot(m, solve(V, m))
    return q / (1 + q)


def hotelling(q: Tensor, effective_samples: Tensor, inputs: int) -> Tensor:
    """Returns ``q = mᵀ V⁻¹ m`` without its bias from finite samples.

    With N effective samples and d inputs it is ``q (N − d − 2)/(N − 1) − d/N``. For normal
    activations of equal weight, q is Hotelling's statistic over N, and ``E q̂`` is
    ``(q + d/N)(N − 1)/(N − d − 2)``. There the correction is exact in the mean.

    Args:
        q: the estimate, of any shape.
        effective_samples: N, of the same shape.
        inputs: d, the number of incoming activations.

    Returns:
        The corrected q; NaN where ``N ≤ d + 2`` leaves nothing to estimate.

    >>> hotelling(torch.tensor([0.5]), torch.tensor([103.0]), 1)
    tensor([0.4805])
    """
    n = effective_samples
    corrected = q * (n - inputs - 2) / (n - 1) - inputs / n
    return corrected.where(n > inputs + 2, torch.nan)


# -- Theorem 2 -------------------------------------------------------------------------------------


def bias_shift(mean_p: Mean, dw: Vectors, dw0: Scalars) -> Scalars:
    """Returns ``μᵀΔw + Δw₀``: by how much an update moves the unit's mean net input."""
    return dot(mean_p, dw) + dw0


def k_published(mean_p: Mean, m: Vectors, V: Matrices) -> Scalars:
    """Returns ``k = 1 + (m − μ)ᵀ V⁻¹ m``, the strength of Theorem 2's correction ``μ − k m``.

    It is 1 where the squared error does not covary with the incoming activations, for then
    ``m = μ``. Elsewhere it can have any sign.
    """
    return 1 + dot(m - mean_p, solve(V, m))


def k_poster(A: Matrices, b: Vectors, c: Scalars, mean_p: Mean) -> Scalars:
    """Returns ``s E_p(δ²) Covᵀ A⁻¹ m``, the k of the poster and of the first arXiv version.

    ``Cov = b − c μ`` is the covariance of the squared error with the incoming activations. The
    published k, `k_published`, is larger by one.
    """
    cov_p = b - c[:, None] * mean_p
    return s_from_blocks(A, b, c) * dot(cov_p, solve(A, b))


def k0(k: Scalars, c: Scalars) -> Scalars:
    """Returns ``k₀ = k / c``, the factor of the bias gradient in Theorem 2."""
    return k / c


def k0_from_blocks(A: Matrices, b: Vectors, c: Scalars, mean_p: Mean) -> Scalars:
    """Returns ``k₀ = s (1 − μᵀ A⁻¹ b)``, the factor of the bias gradient, from the blocks of F."""
    return s_from_blocks(A, b, c) * (1 - dot(mean_p, solve(A, b)))


def theorem2_shift(
    A: Matrices, b: Vectors, c: Scalars, mean_p: Mean, g: Vectors, g0: Scalars
) -> Scalars:
    """Returns ``(μ − k m)ᵀ A⁻¹ g + k₀ g₀``, the natural gradient's bias shift (Theorem 2).

    It equals `bias_shift` of the step of `natural_gradient_blocks`. The effective incoming mean
    ``μ − k m`` takes the place of μ: that is how the natural gradient reduces the bias shift.
    """
    bias_factor = k0_from_blocks(A, b, c, mean_p)
    effective_mean = mean_p - bias_factor[:, None] * b  # k m = (k₀ c)(b / c)
    return dot(effective_mean, solve(A, g)) + bias_factor * g0


def shift_parts(
    w: Vectors, dw: Vectors, dw0: Scalars, mean: Mean, dmean: Mean
) -> tuple[Scalars, Scalars, Scalars]:
    """Returns the parts of a unit's change of mean net input: own, incoming and second order.

    They are ``Δwᵀμ + Δw₀``, ``wᵀΔμ`` and ``ΔwᵀΔμ``, and add up to the change exactly. The incoming
    part is the bias shift that a unit inherits from the layers below.

    Args:
        w: the weights before the step.
        dw, dw0: the changes of weights and bias.
        mean: μ before the step.
        dmean: Δμ, the change of the mean incoming activation in the same step.
    """
    return bias_shift(mean, dw, dw0), dot(w, dmean.expand_as(w)), dot(dw, dmean.expand_as(dw))
