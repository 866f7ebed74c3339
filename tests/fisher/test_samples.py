"""The implicit storage where it differs from blocks: few samples, single precision, convergence."""

import pytest
import torch
from torch import nn

import biasshift as bs
from biasshift.fisher.cg import ConjugateGradients, Preconditioner
from biasshift.fisher.solver import Solver
from biasshift.fisher.woodbury import Woodbury, block_cholesky, unit_woodbury

DAMPING = 1e-2


def samples(n: int, inputs: int, units: int, dtype=torch.float64, mean: float = 2.0):
    """Correlated activations away from zero, and errors that sit on few of the samples."""
    generator = torch.Generator().manual_seed(n + inputs)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    a = draw(n, 3) @ draw(3, inputs) + 0.3 * draw(n, inputs) + mean
    delta2 = draw(n, units).mul(1.5).exp()
    g = draw(units, inputs)
    return a.to(dtype), delta2.to(dtype), g.to(dtype), g[:, 0].clone().to(dtype)


def by_hand(a, delta2, g, g0, damping=DAMPING):
    """Theorem 1 unit by unit with explicit matrices, float64."""
    steps = []
    for u in range(g.shape[0]):
        q = delta2[:, u].double() / delta2[:, u].double().sum()
        m = q @ a.double()
        centered = a.double() - m
        V = (centered * q[:, None]).T @ centered
        ridge = damping * V.diagonal().mean() * torch.eye(a.shape[1], dtype=torch.float64)
        W = delta2[:, u].double().mean() * (V + ridge)
        steps.append(torch.linalg.solve(W, g[u].double() - g0[u].double() * m))
    return torch.stack(steps)


def off(actual, expected):
    return ((actual.double() - expected).norm(dim=1) / expected.norm(dim=1)).max().item()


def implicit(a, delta2, **options):
    return bs.UnitFisher.from_samples(a, delta2, damping=DAMPING, storage="implicit", **options)


@pytest.mark.parametrize(("n", "inputs"), [(12, 40), (60, 20), (400, 20)])
def test_natural_gradients_are_those_of_explicit_matrices(n, inputs):
    a, delta2, g, g0 = samples(n, inputs, units=7)
    dw, dw0 = implicit(a, delta2, tolerance=1e-12).natural_gradient(g, g0)
    assert off(dw, by_hand(a, delta2, g, g0)) < 1e-9
    q = delta2 / delta2.sum(0)
    torch.testing.assert_close((dw * (q.T @ a)).sum(1) + dw0, g0 / delta2.mean(0))


@pytest.mark.parametrize("tolerance", [1e-3, 1e-6])
@pytest.mark.parametrize("mean", [0.0, 30.0])
def test_single_precision_and_few_samples_lose_no_digits(tolerance, mean):
    """V of 12 samples and 40 inputs is singular but for the damping: errors are magnified."""
    a, delta2, g, g0 = samples(12, 40, units=5, dtype=torch.float32, mean=mean)
    dw, _ = implicit(a, delta2, tolerance=tolerance).natural_gradient(g, g0)
    assert off(dw, by_hand(a, delta2, g, g0)) < max(tolerance, 1e-4 if mean else 1e-5)


@pytest.mark.parametrize("tolerance", [1e-3, 1e-6])
def test_so_do_shared_weights(tolerance):
    """A convolution from a few examples, in float32, against the dense blocks in float64."""
    torch.manual_seed(0)
    pooled = (nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ELU(), *pooled, nn.Linear(8, 5))
    x = nn.functional.elu(torch.randn(4, 8, 7, 7)) + 1
    g, g0 = torch.randn(8, 72), torch.randn(8)
    options = {"layers": ["0"], "damping": DAMPING}
    fishers = bs.unit_fisher(model, x, storage="implicit", tolerance=tolerance, **options)
    single, _ = fishers["0"].natural_gradient(g, g0)
    fishers = bs.unit_fisher(model.double(), x.double(), storage="dense", **options)
    assert off(single, fishers["0"].natural_gradient(g.double(), g0.double())[0]) < 1e-5


# -- every way to solve ----------------------------------------------------------------------------


def conjugate_gradients(sums):
    preconditioner = Preconditioner(sums, sums.weight > 0, DAMPING, torch.float64)
    return ConjugateGradients(preconditioner, torch.float64)


@pytest.mark.parametrize(
    "method",
    [lambda sums: Woodbury(sums).solve, lambda sums: block_cholesky, conjugate_gradients],
    ids=["Woodbury", "blocks", "conjugate gradients"],
)
def test_every_method_for_samples_solves_the_same_equations(method, monkeypatch):
    a, delta2, g, _ = samples(15, 30, units=4)
    sums = implicit(a, delta2).sums
    solver = Solver(sums, DAMPING, torch.float64)
    monkeypatch.setitem(solver.__dict__, "_method", method(sums))
    x = solver.solve(g, 1e-11, 500)
    V = bs.UnitFisher.from_samples(a, delta2).var_q
    ridge = DAMPING * V.diagonal(dim1=1, dim2=2).mean(1)
    W = V + ridge[:, None, None] * torch.eye(30, dtype=torch.float64)
    assert off(x, torch.linalg.solve(W, g)) < 1e-8


@pytest.mark.parametrize(("examples", "method"), [(2, unit_woodbury), (40, block_cholesky)])
def test_convolutions_choose_rows_for_few_examples_and_blocks_for_small_kernels(examples, method):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(6, 6, 3), nn.ELU(), nn.Flatten(), nn.Linear(6 * 16, 3)).double()
    x = torch.randn(examples, 6, 6, 6, dtype=torch.float64)
    options = {"layers": ["0"], "damping": DAMPING}
    fisher = bs.unit_fisher(model, x, storage="implicit", tolerance=1e-12, **options)["0"]
    assert Solver(fisher.sums, DAMPING, torch.float64)._method is method
    dense = bs.unit_fisher(model, x, storage="dense", **options)["0"]
    g, g0 = torch.randn(6, 54, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    assert off(fisher.natural_gradient(g, g0)[0], dense.natural_gradient(g, g0)[0]) < 1e-9


# -- limits ----------------------------------------------------------------------------------------


def test_a_unit_that_does_not_converge_is_nan_with_a_warning_and_the_others_are_right():
    a, delta2, g, g0 = samples(300, 40, units=6)
    a[:, 0] *= 1e4  # badly scaled, so that one step is not enough
    g[2:] = 0  # nothing to solve for: converged at once
    g0[2:] = 0
    fisher = implicit(a, delta2, tolerance=1e-10, max_iterations=1)
    solver = Solver(fisher.sums, DAMPING, torch.float64)
    solver.__dict__["_method"] = conjugate_gradients(fisher.sums)
    x = solver.solve(g, 1e-10, 1)
    assert x[:2].isnan().all() and (x[2:] == 0).all()


def test_non_convergence_reaches_the_user_as_a_warning():
    a, delta2, g, g0 = samples(3000, 60, units=3)
    fisher = implicit(a, delta2, tolerance=1e-10, max_iterations=1)
    with pytest.warns(RuntimeWarning, match="max_iterations"):
        dw, dw0 = fisher.natural_gradient(g, g0)
    assert dw.isnan().all() and dw0.isnan().all()


def test_a_dead_unit_is_marked_and_harms_nobody():
    a, delta2, g, g0 = samples(50, 10, units=3)
    delta2[:, 1] = 0
    fisher = implicit(a, delta2, tolerance=1e-12)
    dw, _ = fisher.natural_gradient(g, g0)
    assert fisher.dead.tolist() == [False, True, False]
    alive = [0, 2]
    assert off(dw[alive], by_hand(a, delta2[:, alive], g[alive], g0[alive])) < 1e-9


def test_merging_concatenates_and_is_exact():
    a, delta2, g, g0 = samples(90, 12, units=4)
    parts = [implicit(a[i : i + 30], delta2[i : i + 30], tolerance=1e-13) for i in (0, 30, 60)]
    merged = parts[0] + parts[1] + parts[2]
    assert len(merged.sums.parts) == 3
    assert off(merged.natural_gradient(g, g0)[0], by_hand(a, delta2, g, g0)) < 1e-9


def test_blocks_are_refused_where_they_would_not_fit_and_given_for_few_units():
    a, delta2, _, _ = samples(40, 50, units=6)
    fisher = implicit(a, delta2, memory_budget=8 * 50 * 50 * 2)
    with pytest.raises((ValueError, RuntimeError), match="units"):
        fisher.matrix()
