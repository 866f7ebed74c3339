"""Theorems 1 and 2 against dense inverses of the bordered matrix; wrong variants must fail."""

from dataclasses import dataclass

import pytest
import torch
from oracles import dot, matvec, outer, spd_inverse
from torch import Tensor

from biasshift import theory

INPUTS, UNITS = 6, 5


@dataclass(frozen=True)
class Problem:
    """Numbers of one layer: anything goes, as long as V is positive definite."""

    c: Tensor
    mean_p: Tensor
    m: Tensor
    V: Tensor
    g: Tensor
    g0: Tensor

    @property
    def b(self) -> Tensor:
        return self.c[:, None] * self.m

    @property
    def A(self) -> Tensor:
        return self.c[:, None, None] * (self.V + outer(self.m))

    @property
    def full(self) -> Tensor:
        """The bordered matrix, bias last."""
        top = torch.cat([self.A, self.b[:, :, None]], 2)
        return torch.cat([top, torch.cat([self.b, self.c[:, None]], 1)[:, None, :]], 1)

    @property
    def dense_step(self) -> tuple[Tensor, Tensor]:
        step = matvec(spd_inverse(self.full), torch.cat([self.g, self.g0[:, None]], 1))
        return step[:, :-1], step[:, -1]


def make(seed: int, spread: float = 1.0) -> Problem:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    root = draw(UNITS, INPUTS, INPUTS + 3)
    V = root @ root.mT / INPUTS + 0.1 * torch.eye(INPUTS, dtype=torch.float64)
    return Problem(
        draw(UNITS).exp(),
        spread * draw(INPUTS),
        spread * draw(UNITS, INPUTS),
        V,
        draw(UNITS, INPUTS),
        draw(UNITS),
    )


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def far(actual: Tensor, expected: Tensor, by: float = 1e-2) -> None:
    """A wrong variant must not pass for the right one."""
    assert float((actual - expected).norm()) > by * float(expected.norm())


problems = pytest.mark.parametrize(
    "p",
    [make(0), make(1), make(2, spread=0.1), make(3, spread=3.0)],
    ids=["a", "b", "small-means", "large-means"],
)


# -- Theorem 1 -------------------------------------------------------------------------------------


@problems
def test_block_inverse_is_the_dense_inverse(p: Problem) -> None:
    K, u, s = theory.block_inverse(p.A, p.b, p.c)
    inverse = spd_inverse(p.full)
    close(K, inverse[:, :-1, :-1])
    close(u, inverse[:, :-1, -1])
    close(s, inverse[:, -1, -1])


@problems
def test_s_is_the_corner_of_the_inverse_in_both_forms(p: Problem) -> None:
    corner = spd_inverse(p.full)[:, -1, -1]
    close(theory.s_from_blocks(p.A, p.b, p.c), corner)
    close(theory.s_from_center(p.c, p.m, p.V), corner)
    wrong_mean = p.mean_p.expand_as(p.m)  # under p in place of q
    far(theory.s_from_center(p.c, wrong_mean, p.V), corner)


@problems
def test_natural_gradient_block_form_centered_form_and_dense_inverse_agree(p: Problem) -> None:
    dw, dw0 = p.dense_step
    for step in (
        theory.natural_gradient_blocks(p.A, p.b, p.c, p.g, p.g0),
        theory.centered_update(p.c, p.m, p.V, p.g, p.g0),
    ):
        close(step[0], dw)
        close(step[1], dw0)
    wrong = theory.natural_gradient_blocks(p.A, -p.b, p.c, p.g, p.g0)  # the sign of the coupling
    far(wrong[0], dw)


@problems
def test_bias_first_is_not_bias_last(p: Problem) -> None:
    """The same matrix read with the bias in front gives another step."""
    dw, _ = p.dense_step
    wrong, _ = theory.natural_gradient_blocks(
        p.full[:, 1:, 1:], p.full[:, 1:, 0], p.full[:, 0, 0], p.g, p.g0
    )
    far(wrong, dw)


@problems
def test_natural_gradient_moves_the_mean_net_input_under_q_by_g0_over_c(p: Problem) -> None:
    dw, dw0 = theory.centered_update(p.c, p.m, p.V, p.g, p.g0)
    close(dot(p.m, dw) + dw0, p.g0 / p.c)
    far(dot(p.mean_p, dw) + dw0, p.g0 / p.c)


@problems
def test_every_member_of_the_family_keeps_its_identity_and_damping_does_too(p: Problem) -> None:
    diagonal = torch.diag_embed(p.V.diagonal(dim1=1, dim2=2))
    for r in (p.m, p.mean_p.expand_as(p.m), torch.zeros_like(p.m)):
        for W in (p.V, diagonal, theory.damp(p.V, 0.3), theory.damp(diagonal, 1.0)):
            dw, dw0 = theory.centered_update(p.c, r, W, p.g, p.g0)
            close(dw, matvec(spd_inverse(W), p.g - p.g0[:, None] * r) / p.c[:, None])
            close(dot(r, dw) + dw0, p.g0 / p.c)


@problems
def test_center_p_is_the_unit_block_of_kfac(p: Problem) -> None:
    """`δ²` taken for independent of the activations: `c·E_p(ããᵀ)`."""
    mean, cov = p.mean_p.expand_as(p.m), p.V
    kfac = Problem(p.c, p.mean_p, mean, cov, p.g, p.g0)
    dw, dw0 = theory.centered_update(p.c, mean, cov, p.g, p.g0)
    close(dw, kfac.dense_step[0])
    close(dw0, kfac.dense_step[1])


@problems
def test_center_none_is_block_diagonal(p: Problem) -> None:
    dw, dw0 = theory.centered_update(
        p.c, torch.zeros_like(p.m), p.A / p.c[:, None, None], p.g, p.g0
    )
    close(dw, matvec(spd_inverse(p.A), p.g))
    close(dw0, p.g0 / p.c)


# -- Theorem 2 -------------------------------------------------------------------------------------


@problems
def test_theorem_2_is_the_bias_shift_of_the_natural_gradient(p: Problem) -> None:
    dw, dw0 = p.dense_step
    shift = dot(p.mean_p, dw) + dw0
    close(theory.bias_shift(p.mean_p, dw, dw0), shift)
    close(theory.theorem2_shift(p.A, p.b, p.c, p.mean_p, p.g, p.g0), shift)
    close(p.g0 / p.c + dot(p.mean_p - p.m, dw), shift)


@problems
def test_theorem_2_written_out_with_k(p: Problem) -> None:
    """`(μ − k m)ᵀ A⁻¹ g + k₀ g₀` holds with the published k, and not with the poster's."""
    dw, dw0 = p.dense_step
    shift = dot(p.mean_p, dw) + dw0
    A_inverse_g = matvec(spd_inverse(p.A), p.g)
    k = theory.k_published(p.mean_p, p.m, p.V)
    close(dot(p.mean_p - k[:, None] * p.m, A_inverse_g) + theory.k0(k, p.c) * p.g0, shift)
    poster = theory.k_poster(p.A, p.b, p.c, p.mean_p)
    k = 1 + poster
    close(dot(p.mean_p - k[:, None] * p.m, A_inverse_g) + theory.k0(k, p.c) * p.g0, shift)
    wrong = dot(p.mean_p - poster[:, None] * p.m, A_inverse_g) + theory.k0(poster, p.c) * p.g0
    far(wrong, shift)


@problems
def test_k_in_every_printed_form(p: Problem) -> None:
    inverse = spd_inverse(p.full)
    s, A_inverse = inverse[:, -1, -1], spd_inverse(p.A)
    k = p.c * s * (1 - dot(p.mean_p, matvec(A_inverse, p.b)))
    cov = p.b - p.c[:, None] * p.mean_p
    poster = s * p.c * dot(cov, matvec(A_inverse, p.m))
    close(theory.k_published(p.mean_p, p.m, p.V), k)
    close(theory.k_poster(p.A, p.b, p.c, p.mean_p), poster)
    close(k, 1 + poster)
    close(theory.k0(k, p.c), k / p.c)
    close(theory.k0_from_blocks(p.A, p.b, p.c, p.mean_p), k / p.c)
    wrong = theory.k_poster(p.A, p.b, p.c, p.mean_p)
    assert bool(((wrong - k).abs() > 0.5).all())


@problems
def test_without_covariance_k_is_one_and_the_effective_mean_vanishes(p: Problem) -> None:
    mean = p.m[0]
    even = Problem(p.c, mean, mean.expand_as(p.m), p.V, p.g, p.g0)
    k = theory.k_published(mean, even.m, p.V)
    close(k, torch.ones(UNITS, dtype=torch.float64))
    close(mean - k[:, None] * even.m, torch.zeros_like(even.m))
    close(theory.k_poster(even.A, even.b, even.c, mean), torch.zeros(UNITS, dtype=torch.float64))
    shift = theory.theorem2_shift(even.A, even.b, even.c, mean, p.g, p.g0)
    close(shift, p.g0 / p.c)  # one remains
    assert bool(((theory.k_published(p.mean_p, p.m, p.V) - 1).abs() > 1e-3).all())


@problems
def test_variance_of_the_bias_shift_under_fisher_noise(p: Problem) -> None:
    """With g ~ N(0, F) it is `(1 + (m−μ)ᵀV⁻¹(m−μ))/c`.

    It is the sum of squares of the shift, applied to the columns of a root of F.
    """
    root = torch.stack([torch.linalg.cholesky(full) for full in p.full])
    columns = [
        theory.theorem2_shift(p.A, p.b, p.c, p.mean_p, root[:, :-1, j], root[:, -1, j])
        for j in range(INPUTS + 1)
    ]
    apart = p.m - p.mean_p
    variance = (1 + dot(apart, matvec(spd_inverse(p.V), apart))) / p.c
    close(torch.stack(columns).square().sum(0), variance)


# -- invariance ------------------------------------------------------------------------------------


def function_change(
    p: Problem, center: str, damping: float, shift: Tensor | None, points: Tensor
) -> Tensor:
    """Change of the net inputs at `points` by one step, in the coordinates `a + shift`."""
    if shift is not None:
        p = Problem(p.c, p.mean_p + shift, p.m + shift, p.V, p.g + p.g0[:, None] * shift, p.g0)
        points = points + shift
    cov_p = 1.5 * p.V
    r, W = {
        "q": (p.m, p.V),
        "p": (p.mean_p.expand_as(p.m), cov_p),
        "none": (torch.zeros_like(p.m), p.A / p.c[:, None, None]),
    }[center]
    dw, dw0 = theory.centered_update(p.c, r, theory.damp(W, damping), p.g, p.g0)
    return points @ dw.T + dw0


@problems
@pytest.mark.parametrize("damping", [0.0, 0.1])
def test_shifting_the_inputs_changes_nothing_for_centered_members_only(
    p: Problem, damping: float
) -> None:
    generator = torch.Generator().manual_seed(9)
    points = torch.randn(7, INPUTS, generator=generator, dtype=torch.float64)
    shift = 2 + torch.randn(INPUTS, generator=generator, dtype=torch.float64)
    for center, compare in (("q", close), ("p", close), ("none", far)):
        compare(
            function_change(p, center, damping, shift, points),
            function_change(p, center, damping, None, points),
        )


# -- the coupling index, damping, the correction for finite samples --------------------------------


@problems
def test_coupling_is_one_minus_the_inverse_of_its_inflation_factor(p: Problem) -> None:
    h = theory.coupling(p.m, p.V)
    close(h, dot(p.m, matvec(spd_inverse(p.V + outer(p.m)), p.m)))
    close(1 / (1 - h), theory.s_from_blocks(p.A, p.b, p.c) * p.c)
    assert bool(((h >= 0) & (h < 1)).all())
    close(theory.coupling(torch.zeros_like(p.m), p.V), torch.zeros(UNITS, dtype=torch.float64))


def test_coupling_is_the_share_of_the_constant_that_the_activations_explain() -> None:
    """R² of the weighted regression of 1 on the activations, without an intercept."""
    generator = torch.Generator().manual_seed(4)
    a = 0.5 + torch.randn(50, 4, generator=generator, dtype=torch.float64)
    q = torch.rand(50, generator=generator, dtype=torch.float64)
    q = q / q.sum()
    fitted = a @ torch.linalg.lstsq(q.sqrt()[:, None] * a, q.sqrt()[:, None]).solution
    explained = 1 - float(q @ (1 - fitted[:, 0]).square())
    m = q @ a
    V = (a - m).T @ (q[:, None] * (a - m))
    assert float(theory.coupling(m[None], V[None])) == pytest.approx(explained, abs=1e-12)


@problems
@pytest.mark.parametrize("damping", [0.0, 1e-3, 2.0])
def test_damp_adds_a_share_of_the_mean_variance_of_each_unit(p: Problem, damping: float) -> None:
    damped = theory.damp(p.V, damping)
    eye = torch.eye(INPUTS, dtype=torch.float64)
    for before, after in zip(p.V, damped, strict=True):
        close(after, before + damping * before.diagonal().mean() * eye)
    close(theory.damp(7 * p.V, damping), 7 * damped)  # scale free


@problems
def test_shift_parts_add_up_to_the_change_of_the_mean_net_input(p: Problem) -> None:
    w, dw, dw0, mean, dmean = p.m, 0.3 * p.g, 0.3 * p.g0, p.mean_p, 0.1 * p.g[0]
    own, incoming, second = theory.shift_parts(w, dw, dw0, mean, dmean)
    w0 = torch.ones(UNITS, dtype=torch.float64)
    close(own + incoming + second, ((w + dw) @ (mean + dmean) + w0 + dw0) - (w @ mean + w0))
    close(own, dw @ mean + dw0)  # the layers below stand still
    close(incoming, w @ dmean)  # this layer stands still


def test_hotelling_removes_the_bias_of_few_samples() -> None:
    """Mean of the corrected `mᵀV⁻¹m` over many draws is the truth; the raw one is far above it."""
    draws, samples, inputs = 4000, 60, 20
    generator = torch.Generator().manual_seed(0)
    truth = torch.full((inputs,), (1 / inputs) ** 0.5, dtype=torch.float64)  # mᵀV⁻¹m = 1
    a = truth + torch.randn(draws, samples, inputs, generator=generator, dtype=torch.float64)
    m = a.mean(1)
    V = (a - m[:, None]).mT @ (a - m[:, None]) / samples
    L = torch.stack([torch.linalg.cholesky(matrix) for matrix in V])
    raw = torch.linalg.solve_triangular(L, m[:, :, None], upper=False).square().sum((1, 2))
    counts = torch.full((draws,), float(samples), dtype=torch.float64)
    corrected = theory.hotelling(raw, counts, inputs)
    # noise, and the convention for V (1/n or 1/(n−1))
    tolerance = 5 * float(corrected.std()) / draws**0.5 + 2 / samples
    assert float(corrected.mean()) == pytest.approx(1.0, abs=tolerance)
    assert tolerance < 0.1
    assert float(raw.mean()) > 1.5


@problems
def test_single_precision_stays_single(p: Problem) -> None:
    c, m, V, g, g0 = (t.float() for t in (p.c, p.m, p.V, p.g, p.g0))
    dw, dw0 = theory.centered_update(c, m, V, g, g0)
    results = (dw, dw0, theory.coupling(m, V), theory.damp(V, 0.1))
    assert all(result.dtype == torch.float32 for result in results)
