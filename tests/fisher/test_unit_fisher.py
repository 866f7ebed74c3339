"""`UnitFisher`: chosen moments recovered from samples, laws, singular cases, closed forms."""

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from oracles import Block, dot, matvec, outer, spd_inverse
from torch import Tensor

import biasshift as bs

DOUBLE = torch.float64
VECTORS = ("mean_delta2", "mean_p", "mean_q", "var_q", "cov_p", "A", "b", "c")
INVERSE = ("s", "k", "k0", "coupling", "corrected_mean")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    """Compares within the size of the whole tensor, so that small entries do not decide."""
    expected = expected.to(actual)
    assert actual.shape == expected.shape
    assert torch.equal(actual.isnan(), expected.isnan())
    scale = float(expected.nan_to_num().abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(
        actual, expected, rtol=0, atol=tolerance * max(scale, 1e-300), equal_nan=True
    )


def same(
    actual: Any,
    expected: Any,
    tolerance: float = 1e-12,
    names: tuple[str, ...] = (*VECTORS, *INVERSE),
) -> None:
    for name in names:
        close(getattr(actual, name), getattr(expected, name), tolerance)


def samples(
    n: int = 60, inputs: int = 4, units: int = 3, seed: int = 0, mean: float = 0.7
) -> tuple[Tensor, Tensor]:
    a = normal(n, inputs, seed=seed) + mean
    delta2 = normal(n, units, seed=seed + 1).square() * (1 + 0.5 * a[:, :1]).square()
    return a, delta2


def block(a: Tensor, delta2: Tensor) -> Block:
    """The definition, written out unit by unit."""
    full = []
    for i in range(delta2.shape[1]):
        augmented = torch.cat([a, torch.ones(len(a), 1, dtype=DOUBLE)], 1)
        full.append(augmented.T @ (delta2[:, i : i + 1] * augmented) / len(a))
    return Block(torch.stack(full), a.mean(0), delta2.sum(0).square() / delta2.square().sum(0))


# -- choose the answer, build the question, recover it ---------------------------------------------


def whitened(n: int, inputs: int, seed: int) -> Tensor:
    """Samples of mean 0 and covariance I, exactly."""
    z = normal(n, inputs, seed=seed)
    z = z - z.mean(0)
    values, vectors = torch.linalg.eigh(z.T @ z / n)
    return z @ vectors / values.sqrt()


def chosen(
    inputs: int = 4, units: int = 3, each: int = 12
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Samples with free moments under every unit's q, and what they are.

    Every unit weighs a group of samples of its own. A last group, weighed by none, moves the mean
    under p to μ.
    """
    c, mean_p = normal(units, seed=1).exp(), normal(inputs, seed=2)
    m = normal(units, inputs, seed=3)
    root = normal(units, inputs, inputs, seed=4) + 2 * torch.eye(inputs, dtype=DOUBLE)
    groups = [m[i] + whitened(each, inputs, 10 + i) @ root[i].T for i in range(units)]
    rest = ((units + 1) * mean_p - m.sum(0)).expand(each, -1)
    a = torch.cat([*groups, rest])
    delta2 = torch.zeros(len(a), units, dtype=DOUBLE)
    for i in range(units):
        delta2[i * each : (i + 1) * each, i] = c[i] * (units + 1)
    V = root @ root.mT
    b, A = c[:, None] * m, c[:, None, None] * (V + outer(m))
    moments = {"mean_delta2": c, "c": c, "mean_p": mean_p, "mean_q": m, "var_q": V, "b": b, "A": A}
    return a, delta2, moments


def test_chosen_moments_are_recovered() -> None:
    a, delta2, answer = chosen()
    fisher = bs.UnitFisher.from_samples(a, delta2)
    for name, expected in answer.items():
        close(getattr(fisher, name), expected, 1e-12)
    m, V, c, mean_p = answer["mean_q"], answer["var_q"], answer["c"], answer["mean_p"]
    close(fisher.cov_p, c[:, None] * (m - mean_p))
    q = dot(m, matvec(spd_inverse(V), m))
    close(fisher.s, (1 + q) / c)
    close(fisher.coupling, q / (1 + q))
    k = 1 + dot(m - mean_p, matvec(spd_inverse(V), m))
    close(fisher.k, k)
    close(fisher.k0, k / c)
    close(fisher.corrected_mean, mean_p - k[:, None] * m)
    assert not bool(fisher.dead.any() | fisher.singular.any())


@pytest.mark.parametrize("damping", [0.0, 1e-4, 0.3])
def test_everything_agrees_with_the_dense_matrix(damping: float) -> None:
    a, delta2 = samples()
    fisher, dense = bs.UnitFisher.from_samples(a, delta2, damping=damping), block(a, delta2)
    assert fisher.damping == damping
    close(fisher.matrix(), dense.F, 1e-13)
    for name in ("c", "b", "A", "mean_p", "mean_q", "var_q", "cov_p", "effective_samples"):
        close(getattr(fisher, name), getattr(dense, name), 1e-12)
    for name, expected in dense.readings(damping).items():
        close(getattr(fisher, name), expected, 1e-9)
    g, g0 = normal(3, 4, seed=5), normal(3, seed=6)
    dw, dw0 = fisher.natural_gradient(g, g0)
    expected_dw, expected_dw0 = dense.natural_gradient(g, g0, damping)
    close(dw, expected_dw)
    close(dw0, expected_dw0)
    close(dot(fisher.mean_q, dw) + dw0, g0 / fisher.c)  # Theorem 1's identity, damped or not


def test_wrong_variants_are_not_close() -> None:
    a, delta2 = samples()
    fisher, dense = bs.UnitFisher.from_samples(a, delta2), block(a, delta2)
    poster = fisher.k - 1
    assert bool((poster - fisher.k).abs().min() > 0.5) and bool(poster.abs().min() > 1e-3)
    bias_first = dense.F.roll(1, 1).roll(1, 2)
    assert float((fisher.matrix() - bias_first).norm() / dense.F.norm()) > 0.05
    assert float((fisher.mean_q - fisher.mean_p).abs().max()) > 0.05  # p for q
    squared_mean = delta2.sqrt().mean(0).square()  # c is a mean of squares
    assert float((fisher.c - squared_mean).abs().max()) > 0.05
    g, g0 = normal(3, 4, seed=5), normal(3, seed=6)
    tikhonov = dense.F + 0.3 * torch.eye(5, dtype=DOUBLE)
    wrong = matvec(spd_inverse(tikhonov), torch.cat([g, g0[:, None]], 1))
    dw, _ = fisher.damped(0.3).natural_gradient(g, g0)
    assert float((dw - wrong[:, :-1]).norm() / dw.norm()) > 0.05


def test_matvec_is_the_matrix() -> None:
    a, delta2 = samples()
    fisher = bs.UnitFisher.from_samples(a, delta2, damping=0.5)
    v, v0 = normal(3, 4, seed=7), normal(3, seed=8)
    top, bottom = fisher.matvec(v, v0)
    # As measured: damping does not enter.
    expected = matvec(block(a, delta2).F, torch.cat([v, v0[:, None]], 1))
    close(top, expected[:, :-1])
    close(bottom, expected[:, -1])


# -- merging ---------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(1, 59), max_size=5, unique=True),
    st.randoms(use_true_random=False),
    st.sampled_from([0.0, 3.0, 40.0]),
)
def test_merging_in_any_order_is_measuring_at_once(
    cuts: list[int], random: Any, mean: float
) -> None:
    a, delta2 = samples(mean=mean)
    whole = bs.UnitFisher.from_samples(a, delta2, damping=1e-2)
    bounds = [0, *sorted(cuts), len(a)]
    parts = [
        bs.UnitFisher.from_samples(a[i:j], delta2[i:j], damping=1e-2)
        for i, j in itertools.pairwise(bounds)
    ]
    random.shuffle(parts)
    while len(parts) > 1:  # in any order, and any tree
        first, second = (parts.pop(random.randrange(len(parts))) for _ in range(2))
        parts.append(first + second)
    same(parts[0], whole, 1e-9)
    close(parts[0].effective_samples, whole.effective_samples, 1e-12)


def test_merging_weighs_by_samples() -> None:
    """The mean of two unequal batches' numbers is not the merge."""
    a, delta2 = samples()
    most = bs.UnitFisher.from_samples(a[:50], delta2[:50])
    rest = bs.UnitFisher.from_samples(a[50:], delta2[50:])
    merged = most + rest
    close(merged.c, delta2.mean(0))
    assert float((merged.c - (most.c + rest.c) / 2).abs().max()) > 1e-3
    close(most.c, delta2[:50].mean(0))  # the parts are as they were


def test_merging_with_a_dead_part_and_with_a_single_sample() -> None:
    a, delta2 = samples()
    delta2[:20, 1] = 0.0
    parts = [slice(0, 20), slice(20, 21), slice(21, 60)]
    first, single, rest = (bs.UnitFisher.from_samples(a[p], delta2[p], damping=1e-2) for p in parts)
    assert bool(first.dead[1])
    merged = first + single + rest
    assert not bool(merged.dead.any())
    same(merged, bs.UnitFisher.from_samples(a, delta2, damping=1e-2), 1e-10)


def test_the_order_of_samples_inputs_and_units_does_not_matter() -> None:
    a, delta2 = samples()
    fisher = bs.UnitFisher.from_samples(a, delta2, damping=1e-2)
    order = torch.randperm(len(a), generator=torch.Generator().manual_seed(0))
    same(bs.UnitFisher.from_samples(a[order], delta2[order], damping=1e-2), fisher)
    inputs, units = torch.tensor([2, 0, 3, 1]), torch.tensor([1, 2, 0])
    moved = bs.UnitFisher.from_samples(a[:, inputs], delta2[:, units], damping=1e-2)
    for name in ("c", "s", "k", "k0", "coupling", "effective_samples"):
        close(getattr(moved, name), getattr(fisher, name)[units], 1e-10)
    close(moved.mean_p, fisher.mean_p[inputs])
    close(moved.mean_q, fisher.mean_q[units][:, inputs])
    close(moved.var_q, fisher.var_q[units][:, inputs][:, :, inputs])
    close(moved.corrected_mean, fisher.corrected_mean[units][:, inputs])


def test_a_sample_twice_is_a_sample_of_twice_the_weight() -> None:
    a, delta2 = samples()
    fisher = bs.UnitFisher.from_samples(a, delta2)
    twice = fisher + fisher
    same(twice, fisher)
    close(twice.effective_samples, 2 * fisher.effective_samples)


@pytest.mark.parametrize("factor", [1e-12, 0.1, 1e9])
def test_scaling_the_errors(factor: float) -> None:
    """`q` does not notice; c and everything measured in units of c does."""
    a, delta2 = samples()
    one, scaled = (bs.UnitFisher.from_samples(a, f * delta2, damping=1e-3) for f in (1.0, factor))
    for name in ("mean_p", "mean_q", "var_q", "k", "coupling", "corrected_mean"):
        close(getattr(scaled, name), getattr(one, name))
    close(scaled.effective_samples, one.effective_samples)
    for name in ("c", "A", "b", "cov_p"):
        close(getattr(scaled, name), factor * getattr(one, name))
    for name in ("s", "k0"):
        close(getattr(scaled, name), getattr(one, name) / factor)
    assert not bool(scaled.dead.any() | scaled.singular.any())


@pytest.mark.parametrize("factor", [1e-5, 10.0, 1e5])
def test_scaling_the_inputs(factor: float) -> None:
    a, delta2 = samples()
    one, scaled = (bs.UnitFisher.from_samples(f * a, delta2, damping=1e-3) for f in (1.0, factor))
    for name in ("c", "s", "k", "k0", "coupling"):
        close(getattr(scaled, name), getattr(one, name))
    close(scaled.var_q, factor**2 * one.var_q)
    close(scaled.corrected_mean, factor * one.corrected_mean)
    g, g0 = normal(3, 4, seed=5), normal(3, seed=6)
    dw, dw0 = one.natural_gradient(g, g0)
    scaled_dw, scaled_dw0 = scaled.natural_gradient(factor * g, g0)
    close(scaled_dw, dw / factor)
    close(scaled_dw0, dw0)
    assert not bool(scaled.singular.any())


def test_shifting_the_inputs_leaves_the_function_of_a_step_alone() -> None:
    a, delta2 = samples()
    shift, g, g0 = normal(4, seed=11) * 5, normal(3, 4, seed=5), normal(3, seed=6)
    one = bs.UnitFisher.from_samples(a, delta2, damping=0.1)
    other = bs.UnitFisher.from_samples(a + shift, delta2, damping=0.1)
    dw, dw0 = one.natural_gradient(g, g0)
    shifted_dw, shifted_dw0 = other.natural_gradient(g + g0[:, None] * shift, g0)
    close((a + shift) @ shifted_dw.T + shifted_dw0, a @ dw.T + dw0)


# -- precision -------------------------------------------------------------------------------------


def rounded(mean: float) -> tuple[Tensor, Tensor]:
    """Samples that single precision holds exactly; the mean is `mean` times the spread."""
    a, delta2 = samples(400, 20, 5, mean=0.0)
    return (a + mean).float(), delta2.float()


def test_single_precision_with_means_of_30_spreads() -> None:
    a, delta2 = rounded(30.0)
    single = bs.UnitFisher.from_samples(a, delta2, damping=1e-6)
    double = bs.UnitFisher.from_samples(a.double(), delta2.double(), damping=1e-6)
    for name in ("k", "s", "k0", "coupling", "c", "mean_q", "var_q"):
        assert getattr(single, name).dtype == torch.float32
        close(getattr(single, name).double(), getattr(double, name), 1e-3)
    assert float(((single.k.double() - double.k) / double.k).abs().max()) < 1e-3
    error = (delta2.double() * normal(400, 5, seed=3).sign()).sqrt().nan_to_num()
    g, g0 = (error.T @ a.double() / 400).float(), error.mean(0).float()
    for actual, expected in zip(
        single.natural_gradient(g, g0),
        double.natural_gradient(g.double(), g0.double()),
        strict=True,
    ):
        close(actual.double(), expected, 1e-3)


def test_single_precision_read_the_naive_way_would_fail() -> None:
    """`E(aaᵀ) − mmᵀ` in single precision: why the sums are shifted."""
    a, delta2 = rounded(1000.0)
    q = delta2[:, 0] / delta2[:, 0].sum()
    m = q @ a
    naive = (a.T @ (q[:, None] * a) - m[:, None] * m).double()
    V = bs.UnitFisher.from_samples(a.double(), delta2.double()).var_q[0]
    ours = bs.UnitFisher.from_samples(a, delta2).var_q[0].double()
    assert float((naive - V).norm() / V.norm()) > 0.1
    assert float((ours - V).norm() / V.norm()) < 1e-3


def test_merging_in_single_precision_keeps_large_means() -> None:
    a, delta2 = rounded(30.0)
    parts = [
        bs.UnitFisher.from_samples(a[i : i + 50], delta2[i : i + 50], damping=1e-4)
        for i in range(0, 400, 50)
    ]
    merged = parts[0]
    for part in parts[1:]:
        merged = merged + part
    double = bs.UnitFisher.from_samples(a.double(), delta2.double(), damping=1e-4)
    for name in ("k", "s", "coupling", "var_q"):
        close(getattr(merged, name).double(), getattr(double, name), 1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_results_come_in_the_dtype_of_the_input(dtype: torch.dtype) -> None:
    a, delta2 = (t.to(dtype) for t in samples())
    fisher = bs.UnitFisher.from_samples(a, delta2, damping=1e-2)
    for name in (*VECTORS, *INVERSE):
        value = getattr(fisher, name)
        assert value.dtype == dtype and value.device == a.device, name
    assert fisher.matrix().dtype == dtype
    g, g0 = torch.ones(3, 4, dtype=dtype), torch.ones(3, dtype=dtype)
    assert {t.dtype for t in (*fisher.natural_gradient(g, g0), *fisher.matvec(g, g0))} == {dtype}
    assert fisher.dead.dtype == fisher.singular.dtype == torch.bool
    assert fisher.effective_samples.dtype.is_floating_point and isinstance(fisher.damping, float)
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_on_the_gpu_as_on_the_cpu() -> None:
    a, delta2 = samples()
    cpu = bs.UnitFisher.from_samples(a, delta2, damping=1e-2)
    gpu = bs.UnitFisher.from_samples(a.cuda(), delta2.cuda(), damping=1e-2)
    for name in (*VECTORS, *INVERSE):
        assert getattr(gpu, name).is_cuda
        close(getattr(gpu, name).cpu(), getattr(cpu, name), 1e-9)


def test_samples_are_read_not_kept_nor_changed() -> None:
    a, delta2 = samples()
    kept = a.clone(), delta2.clone()
    fisher = bs.UnitFisher.from_samples(a, delta2, damping=1e-2)
    c, k = fisher.c.clone(), fisher.k.clone()
    assert torch.equal(a, kept[0]) and torch.equal(delta2, kept[1])
    a.zero_(), delta2.fill_(7.0)
    close(fisher.c, c)
    close(fisher.k, k)


def test_no_graph_is_kept() -> None:
    a, delta2 = samples()
    fisher = bs.UnitFisher.from_samples(a.requires_grad_(), delta2.requires_grad_(), damping=1e-2)
    assert not any(getattr(fisher, name).requires_grad for name in (*VECTORS, *INVERSE))


# -- damping ---------------------------------------------------------------------------------------


def test_damping_replaces_and_touches_inverse_quantities_only() -> None:
    a, delta2 = samples()
    plain = bs.UnitFisher.from_samples(a, delta2)
    damped = plain.damped(0.2)
    same(damped, plain, 0.0, VECTORS)
    close(damped.matrix(), plain.matrix(), 0.0)
    same(plain.damped(0.5).damped(0.2), damped, 0.0)  # replaces
    assert damped.damping == 0.2 and plain.damping == 0.0
    for name, expected in block(a, delta2).readings(0.2).items():
        close(getattr(damped, name), expected)
        assert float((getattr(damped, name) - getattr(plain, name)).abs().max()) > 1e-3


def test_damping_is_relative_to_each_unit() -> None:
    """V + λ·mean(diag V)·I, and not one λ for all units."""
    a, delta2, answer = chosen()
    V = answer["var_q"]
    size = V.diagonal(dim1=1, dim2=2).mean(1)
    assert float(size.max() / size.min()) > 1.1
    m, ridge = answer["mean_q"], 0.3 * size[:, None, None] * torch.eye(4, dtype=DOUBLE)
    q = torch.stack([m[i] @ spd_inverse((V + ridge)[i][None])[0] @ m[i] for i in range(3)])
    close(bs.UnitFisher.from_samples(a, delta2, damping=0.3).coupling, q / (1 + q))


def test_strong_damping_is_the_centered_gradient() -> None:
    """λ → ∞: no coupling is left, and the direction is `g − g₀ m`."""
    a, delta2 = samples()
    fisher = bs.UnitFisher.from_samples(a, delta2, damping=1e8)
    assert float(fisher.coupling.max()) < 1e-7
    close(fisher.k, torch.ones(3, dtype=DOUBLE), 1e-6)
    g, g0 = normal(3, 4, seed=5), normal(3, seed=6)
    dw, _ = fisher.natural_gradient(g, g0)
    close(F.normalize(dw, dim=1), F.normalize(g - g0[:, None] * fisher.mean_q, dim=1), 1e-6)


# -- the singular cases ----------------------------------------------------------------------------


@pytest.mark.parametrize("damping", [0.0, 1e-3])
def test_a_dead_unit_is_flagged_and_the_others_are_right(damping: float) -> None:
    a, delta2 = samples()
    delta2[:, 1] = 0.0
    fisher = bs.UnitFisher.from_samples(a, delta2, damping=damping)
    assert fisher.dead.tolist() == [False, True, False]
    alive = bs.UnitFisher.from_samples(a, delta2[:, [0, 2]], damping=damping)
    for name in INVERSE:
        value = getattr(fisher, name)
        assert bool(value[1].isnan().all()), name
        close(value[[0, 2]], getattr(alive, name))
    assert bool(fisher.mean_q[1].isnan().all()) and bool(fisher.var_q[1].isnan().all())
    assert float(fisher.c[1]) == 0.0
    dw, dw0 = fisher.natural_gradient(normal(3, 4, seed=5), normal(3, seed=6))
    assert bool(dw[1].isnan().all()) and bool(dw0[1].isnan())
    assert bool(torch.isfinite(dw[[0, 2]]).all())


@pytest.mark.parametrize("damping", [0.0, 1e-3])
def test_a_unit_without_variance_is_flagged_and_the_others_are_right(damping: float) -> None:
    """One sample carries all the weight: V = 0, and relative damping adds nothing."""
    a, delta2 = samples()
    delta2[:, 2] = 0.0
    delta2[7, 2] = 3.0
    fisher = bs.UnitFisher.from_samples(a, delta2, damping=damping)
    assert fisher.singular.tolist() == [False, False, True] and not bool(fisher.dead.any())
    close(fisher.mean_q[2], a[7], 1e-12)
    assert float(fisher.var_q[2].abs().max()) < 1e-12
    assert float(fisher.c[2]) == pytest.approx(3.0 / 60)
    assert float(fisher.effective_samples[2]) == pytest.approx(1.0)
    well = bs.UnitFisher.from_samples(a, delta2[:, :2], damping=damping)
    for name in INVERSE:
        value = getattr(fisher, name)
        assert bool(value[2].isnan().all()), name
        close(value[:2], getattr(well, name))
    dw, dw0 = fisher.natural_gradient(normal(3, 4, seed=5), normal(3, seed=6))
    assert bool(dw[2].isnan().all()) and bool(dw0[2].isnan()) and bool(torch.isfinite(dw[:2]).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_missing_variance_is_noticed_behind_a_large_mean_and_after_a_merge(
    dtype: torch.dtype,
) -> None:
    """The rounding of a large mean is not a variance."""
    a, delta2 = samples(mean=1000.0)
    delta2[:, 2] = 0.0
    delta2[7, 2] = 3.0
    a, delta2 = a.to(dtype), delta2.to(dtype)
    whole = bs.UnitFisher.from_samples(a, delta2, damping=1e-3)
    parts = [
        bs.UnitFisher.from_samples(a[i : i + 20], delta2[i : i + 20], damping=1e-3)
        for i in (0, 20, 40)
    ]
    for fisher in (whole, parts[2] + (parts[0] + parts[1])):
        assert fisher.singular.tolist() == [False, False, True]
        assert bool(fisher.k[2].isnan()) and bool(torch.isfinite(fisher.k[:2]).all())


def constant_input() -> tuple[Tensor, Tensor]:
    a, delta2 = samples()
    a[:, 3] = 0.25
    return a, delta2


def few_samples() -> tuple[Tensor, Tensor]:
    return samples(n=3)


singular = pytest.mark.parametrize(
    "build", [constant_input, few_samples], ids=["constant-input", "fewer-samples-than-inputs"]
)


@singular
def test_a_singular_covariance_with_damping_is_finite_and_right(
    build: Callable[[], tuple[Tensor, Tensor]],
) -> None:
    a, delta2 = build()
    fisher = bs.UnitFisher.from_samples(a, delta2, damping=1e-2)
    assert not bool(fisher.singular.any() | fisher.dead.any())
    for name, expected in block(a, delta2).readings(1e-2).items():
        close(getattr(fisher, name), expected, 1e-9)
    assert bool((fisher.effective_samples <= len(a)).all())


@singular
def test_a_singular_covariance_without_damping_teaches_when_an_inverse_is_read(
    build: Callable[[], tuple[Tensor, Tensor]],
) -> None:
    a, delta2 = build()
    fisher = bs.UnitFisher.from_samples(a, delta2, name="enc.0")
    for name in (*VECTORS, "effective_samples", "dead", "singular"):  # as measured: fine
        assert not bool(getattr(fisher, name).isnan().any())
    readers: list[Callable[[], Any]] = [lambda name=name: getattr(fisher, name) for name in INVERSE]
    g, g0 = torch.ones(3, 4, dtype=DOUBLE), torch.ones(3, dtype=DOUBLE)
    for read in [*readers, lambda: fisher.natural_gradient(g, g0)]:
        with pytest.raises(ValueError, match=r"enc\.0") as error:
            read()
        assert "damping" in str(error.value)
    if build is constant_input:
        assert "3" in str(error.value)  # which input


@singular
def test_a_singular_covariance_is_no_error_to_build_merge_or_damp(
    build: Callable[[], tuple[Tensor, Tensor]],
) -> None:
    a, delta2 = build()
    fisher = bs.UnitFisher.from_samples(a, delta2)
    merged = fisher + fisher
    close(merged.damped(1e-2).k, bs.UnitFisher.from_samples(a, delta2, damping=1e-2).k)
    repaired = merged + bs.UnitFisher.from_samples(*samples(seed=5))
    assert bool(torch.isfinite(repaired.k).all())
    assert bool(torch.isfinite(fisher.matrix()).all())


def test_a_name_survives_merging_and_damping() -> None:
    fisher = bs.UnitFisher.from_samples(*constant_input(), name="enc.0")
    for derived in (fisher + fisher, fisher.damped(0.5).damped(0.0)):
        with pytest.raises(ValueError, match=r"enc\.0"):
            _ = derived.s


def test_without_a_bias() -> None:
    a, delta2 = samples()
    with_bias = bs.UnitFisher.from_samples(a, delta2, damping=1e-2)
    fisher = bs.UnitFisher.from_samples(a, delta2, damping=1e-2, bias=False)
    same(fisher, with_bias, 1e-14, (*VECTORS, "coupling"))
    for name in ("s", "k", "k0", "corrected_mean"):
        assert bool(getattr(fisher, name).isnan().all()), name
    assert not bool(fisher.dead.any() | fisher.singular.any())
    dense = block(a, delta2)
    close(fisher.matrix(), dense.A)
    g = normal(3, 4, seed=5)
    dw, dw0 = fisher.natural_gradient(g)
    assert dw0 is None
    close(dw, matvec(spd_inverse(dense.damped(1e-2)[:, :-1, :-1]), g))
    dw_with_bias, _ = with_bias.natural_gradient(g, torch.zeros(3, dtype=DOUBLE))
    assert float((dw - dw_with_bias).norm()) > 1e-2


def test_effective_samples_count_what_the_weights_leave() -> None:
    a, _ = samples()
    delta2 = torch.ones(60, 3, dtype=DOUBLE)
    delta2[10:, 1] = 0.0
    delta2[0, 2] = 1e6
    n = bs.UnitFisher.from_samples(a, delta2, damping=1e-2).effective_samples
    assert n.tolist() == pytest.approx([60.0, 10.0, (1e6 + 59) ** 2 / (1e12 + 59)])


# -- a frozen object, and arguments that cannot be right -------------------------------------------


def test_it_is_frozen() -> None:
    fisher = bs.UnitFisher.from_samples(*samples(), damping=1e-2)
    assert dataclasses.is_dataclass(fisher)
    with pytest.raises(dataclasses.FrozenInstanceError):
        fisher.damping = 0.5
    assert fisher.damping == 1e-2


def with_value(tensor: Tensor, value: float) -> Tensor:
    tensor = tensor.clone()
    tensor[1, 2] = value
    return tensor


A, D = samples()
BAD = {
    "lengths": lambda: bs.UnitFisher.from_samples(A, D[:-1]),
    "one-dimensional a": lambda: bs.UnitFisher.from_samples(A[:, 0], D),
    "three-dimensional delta2": lambda: bs.UnitFisher.from_samples(A, D[None]),
    "negative delta2": lambda: bs.UnitFisher.from_samples(A, with_value(D, -1e-3)),
    "nan in delta2": lambda: bs.UnitFisher.from_samples(A, with_value(D, math.nan)),
    "nan in a": lambda: bs.UnitFisher.from_samples(with_value(A, math.nan), D),
    "infinity in a": lambda: bs.UnitFisher.from_samples(with_value(A, math.inf), D),
    "integer a": lambda: bs.UnitFisher.from_samples(A.long(), D),
    "integer delta2": lambda: bs.UnitFisher.from_samples(A, D.long()),
    "negative damping": lambda: bs.UnitFisher.from_samples(A, D, damping=-0.1),
    "nan damping": lambda: bs.UnitFisher.from_samples(A, D, damping=math.nan),
    "negative damping later": lambda: bs.UnitFisher.from_samples(A, D).damped(-0.1),
    "merge of dampings": lambda: (
        bs.UnitFisher.from_samples(A, D, damping=0.1)
        + bs.UnitFisher.from_samples(A, D, damping=0.2)
    ),
    "merge of inputs": lambda: (
        bs.UnitFisher.from_samples(A, D) + bs.UnitFisher.from_samples(A[:, :3], D)
    ),
    "merge of units": lambda: (
        bs.UnitFisher.from_samples(A, D) + bs.UnitFisher.from_samples(A, D[:, :2])
    ),
    "merge of bias": lambda: (
        bs.UnitFisher.from_samples(A, D) + bs.UnitFisher.from_samples(A, D, bias=False)
    ),
    "gradient of another size": lambda: bs.UnitFisher.from_samples(A, D).natural_gradient(
        torch.ones(3, 5, dtype=DOUBLE), torch.ones(3, dtype=DOUBLE)
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_one_sentence(case: str) -> None:
    with pytest.raises(ValueError) as error:
        BAD[case]()
    message = str(error.value)
    assert 10 < len(message) < 400 and "\n" not in message


# -- closed forms ----------------------------------------------------------------------------------

# theory: mean and variance on N(0, 1) net inputs, and s·c for 128 independent such inputs
CLOSED: dict[str, tuple[Callable[[Tensor], Tensor], float, float, float]] = {
    "relu": (F.relu, 0.3989, 0.3408, 60.8),
    "lrelu": (lambda x: F.leaky_relu(x, 0.1), 0.3590, 0.3761, 44.9),
    "srelu": (lambda x: x.clamp_min(-1), 0.0833, 0.7511, 2.2),
    "elu": (F.elu, 0.1605, 0.6192, 6.3),
    "selu": (F.selu, 0.0, 1.0, 1.0),
    "tanh": (torch.tanh, 0.0, 0.394, 1.0),
}


@pytest.mark.parametrize("name", CLOSED)
def test_closed_form_of_s_for_independent_inputs(name: str) -> None:
    """`s·c = 1 + 128·mean²/var`; the tolerance is the bias d/n and five standard errors."""
    act, mean, var, inflation = CLOSED[name]
    inputs, n = 128, 20000
    a = act(torch.randn(n, inputs, generator=torch.Generator().manual_seed(0)))
    fisher = bs.UnitFisher.from_samples(a, torch.ones(n, 1))
    noise = 5 / (n * inputs) ** 0.5
    assert float(a.mean()) == pytest.approx(mean, abs=noise * var**0.5 + 5e-5)
    assert float(fisher.var_q[0].diagonal().mean()) == pytest.approx(var, abs=5 * noise)
    error = 2 * inputs / n + 5 * (4 * inputs * mean**2 / var * (1 + mean**2 / var) / n) ** 0.5
    assert float(fisher.s * fisher.c) == pytest.approx(
        inflation, abs=0.05 + error * max(1.0, inflation / 10)
    )
    assert float(fisher.k) == pytest.approx(1.0, abs=1e-3)  # even errors: Cov = 0


@pytest.mark.parametrize("name", CLOSED)
def test_closed_form_without_sampling(name: str) -> None:
    """The same from whitened samples: exact up to the printed digits of mean and variance."""
    _, mean, var, inflation = CLOSED[name]
    a = mean + var**0.5 * whitened(300, 128, 0)
    fisher = bs.UnitFisher.from_samples(a, torch.full((300, 1), 2.5, dtype=DOUBLE))
    assert float(fisher.s * fisher.c) == pytest.approx(inflation, abs=0.051)
    assert float(fisher.coupling) == pytest.approx(1 - 1 / float(fisher.s * fisher.c), abs=1e-9)


def test_few_samples_inflate_the_coupling() -> None:
    """Independent inputs of mean zero, h = 0: 512 samples of 128 inputs read about .26."""
    a = torch.randn(512, 128, generator=torch.Generator().manual_seed(1), dtype=DOUBLE)
    h = bs.UnitFisher.from_samples(a, torch.ones(512, 1, dtype=DOUBLE)).coupling
    assert float(h) == pytest.approx(0.26, abs=0.05)


# -- what can carry a claim ------------------------------------------------------------------------


@pytest.mark.parametrize("storage", ["dense", "implicit"])
def test_a_reliable_unit_has_ten_effective_samples_per_input(storage: str) -> None:
    """Units that weigh chosen numbers of samples equally, and so have as many effective ones."""
    inputs, counts = 3, (29, 30, 31, 100, 0, 100)
    a = normal(100, inputs)
    delta2 = torch.zeros(100, len(counts), dtype=DOUBLE)
    for unit, count in enumerate(counts):
        delta2[:count, unit] = 2.0  # whose squares and sums are exact
    a[:50, :] += 0.5
    fisher = bs.UnitFisher.from_samples(a, delta2, damping=1e-3, storage=storage)
    assert fisher.effective_samples.tolist() == [float(count) for count in counts]
    assert fisher.reliable.tolist() == [False, True, True, True, False, True]
    assert torch.equal(fisher.damped(10.0).reliable, fisher.reliable)
    assert (fisher + fisher).reliable.tolist() == [True, True, True, True, False, True]


@pytest.mark.parametrize("storage", ["dense", "implicit"])
def test_units_without_variance_are_not_reliable_however_many_samples_they_have(
    storage: str,
) -> None:
    a, delta2 = samples(n=200)
    a[:100] = a[0]  # where the first unit has all of its error
    delta2[:100, 0], delta2[100:, 0] = 1.0, 0.0
    delta2[:, 1] = 1.0
    fisher = bs.UnitFisher.from_samples(a, delta2, damping=1e-3, storage=storage)
    assert fisher.singular.tolist() == [True, False, False]
    assert float(fisher.effective_samples[0]) > 10 * a.shape[1]
    assert fisher.reliable.tolist()[:2] == [False, True]


def test_the_factor_of_reliable_units_is_that_of_the_claims() -> None:
    from biasshift.analysis import SAMPLES_PER_INPUT
    from biasshift.fisher import unit_fisher

    assert SAMPLES_PER_INPUT == unit_fisher.SAMPLES_PER_INPUT == 10
