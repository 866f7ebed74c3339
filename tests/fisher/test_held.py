"""Samples first: whatever way a number takes, it is that of the definition in float64."""

from dataclasses import replace

import pytest
import torch

import biasshift as bs
from biasshift.fisher.held import HeldSums
from biasshift.fisher.moments import WeightedSums

WAYS = {  # (samples, inputs, units, damping) → what is the cheapest in float32
    "gram": (60, 90, 40, 1e-3),
    "blocks": (150, 60, 40, 1e-3),
    "iteration": (280, 260, 30, 1e-1),
}


def layer(way: str, dtype: torch.dtype = torch.float32, mean: float = 1.0):
    samples, inputs, units, damping = WAYS[way]
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    a = normal(samples, inputs) * (0.5 + normal(inputs).abs()) + mean
    delta2, g, g0 = normal(samples, units) ** 2, normal(units, inputs), normal(units)
    delta2[:, 1] = 0  # dead
    delta2[1:, 2] = 0  # all weight on one sample
    return [x.to(dtype) for x in (a, delta2, g, g0)], damping


def definition(a, delta2, g, g0, damping):
    """F, V, s, k, h and the natural gradient of the units from 3 on, written out in float64."""
    a, w, g, g0 = (x.double() for x in (a, delta2[:, 3:], g[3:], g0[3:]))
    ones = torch.cat([a, torch.ones(len(a), 1, dtype=a.dtype)], 1)
    F = torch.einsum("nu,ni,nj->uij", w, ones, ones) / len(a)
    c, q = w.mean(0), w / w.sum(0)
    m = q.T @ a
    centered = a - m[:, None]
    V = torch.einsum("nu,uni,unj->uij", q, centered, centered)
    ridge = damping * V.diagonal(dim1=1, dim2=2).mean(1)
    factor = torch.linalg.cholesky(V + ridge[:, None, None] * torch.eye(a.shape[1]).double())

    def solve(b):
        return torch.cholesky_solve(b[:, :, None], factor)[:, :, 0]

    x = solve(m)
    mx = (m * x).sum(1)
    dw = solve(g - g0[:, None] * m) / c[:, None]
    return {
        "matrix": F,
        "var_q": V,
        "s": (1 + mx) / c,
        "k": 1 + ((m - a.mean(0)) * x).sum(1),
        "coupling": mx / (1 + mx),
        "dw": dw,
        "dw0": g0 / c - (m * dw).sum(1),
    }


def read(fisher: bs.UnitFisher, g, g0):
    dw, dw0 = fisher.natural_gradient(g, g0)
    names = ("var_q", "s", "k", "coupling")
    return {
        "matrix": fisher.matrix(),
        **{name: getattr(fisher, name) for name in names},
        "dw": dw,
        "dw0": dw0,
    }


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 2e-3)], ids=["double", "float"]
)
@pytest.mark.parametrize("way", WAYS)
def test_every_number_is_that_of_its_definition(way, dtype, tolerance):
    (a, delta2, g, g0), damping = layer(way, dtype)
    fisher = bs.UnitFisher.from_samples(a, delta2, damping)
    assert fisher.storage == "auto" and isinstance(fisher.sums, HeldSums)
    if dtype == torch.float32:
        assert fisher._factors._way == way
    found, expected = read(fisher, g, g0), definition(a, delta2, g, g0, damping)
    for name, right in expected.items():
        # blocks are products in the dtype of the samples; inverses magnify the rounding of these
        bound = (1e-15 if dtype == torch.float64 else 1e-6) if name in ("matrix", "var_q") else None
        error = (found[name][3:].double() - right).norm() / right.norm()
        assert error < (10 * bound if bound else tolerance), (name, error)
        assert found[name].dtype == dtype


@pytest.mark.parametrize("way", WAYS)
def test_dead_and_singular_units_are_as_with_blocks(way):
    (a, delta2, g, g0), damping = layer(way)
    held, dense = (
        bs.UnitFisher.from_samples(a, delta2, damping, storage=storage)
        for storage in ("auto", "dense")
    )
    for name in ("dead", "singular", "bias_inert", "converged", "imprecise", "reliable"):
        assert torch.equal(getattr(held, name), getattr(dense, name)), name
    mine, other = read(held, g, g0), read(dense, g, g0)
    for name, x in mine.items():
        assert torch.equal(x.isnan(), other[name].isnan()), name
    assert (held.matrix()[1] == 0).all() and held.singular[2]


@pytest.mark.parametrize("bias", [True, False])
def test_without_damping_it_is_an_error_that_names_the_inputs(bias):
    (a, delta2, g, _), _ = layer("gram")
    a[:, 7] = 1.0
    for storage in ("auto", "dense"):
        fisher = bs.UnitFisher.from_samples(a, delta2[:, 3:], bias=bias, storage=storage)
        with pytest.raises(ValueError, match=r"singular for 37 of 37 units.*1 of 90 .*inputs 7\)"):
            _ = fisher.natural_gradient(g[3:], g[3:, 0]) if bias else fisher.natural_gradient(g[3:])


@pytest.mark.parametrize("way", WAYS)
def test_a_layer_without_a_bias_is_solved_with_the_uncentered_matrix(way):
    (a, delta2, g, _), damping = layer(way, torch.float64)
    dense = bs.UnitFisher.from_samples(a, delta2, damping, bias=False, storage="dense")
    held = bs.UnitFisher.from_samples(a, delta2, damping, bias=False)
    torch.testing.assert_close(
        held.natural_gradient(g)[0], dense.natural_gradient(g)[0], rtol=1e-9, atol=0, equal_nan=True
    )


def test_a_number_does_not_depend_on_what_was_read_before():
    (a, delta2, g, g0), damping = layer("blocks")
    one, two = (bs.UnitFisher.from_samples(a, delta2, damping) for _ in range(2))
    _ = one.s, two.matrix()
    first, second = read(one, g, g0), read(two, g, g0)
    assert all(torch.equal(x.nan_to_num(), second[name].nan_to_num()) for name, x in first.items())


@pytest.mark.parametrize("kinds", [("auto", "auto"), ("auto", "dense"), ("dense", "auto")])
def test_samples_and_blocks_are_added(kinds):
    (a, delta2, _, _), damping = layer("gram", torch.float32, mean=1000.0)
    a[30:] += 500
    parts = [
        bs.UnitFisher.from_samples(a[n], delta2[n], damping, storage=kind)
        for n, kind in zip((slice(0, 30), slice(30, None)), kinds, strict=True)
    ]
    merged = parts[0] + parts[1]
    right = bs.UnitFisher.from_samples(a.double(), delta2.double(), damping, storage="dense")
    error = (merged.var_q[3:].double() - right.var_q[3:]).norm() / right.var_q[3:].norm()
    assert error < 1e-5


def test_samples_become_blocks_once_they_outnumber_them():
    model = torch.nn.Sequential(torch.nn.Linear(30, 20)).double()
    x = torch.randn(600, 30, dtype=torch.float64)
    few, many = (bs.unit_fisher(model, x[:n], batch_size=50)["0"] for n in (100, 600))
    assert isinstance(few.sums, HeldSums) and isinstance(many.sums, WeightedSums)
    for n, fisher in ((100, few), (600, many)):
        dense = bs.unit_fisher(model, x[:n], storage="dense")["0"]
        for name in ("matrix", "s", "k", "coupling"):
            found, right = (getattr(f, name) for f in (fisher, dense))
            found, right = (v() if callable(v) else v for v in (found, right))
            torch.testing.assert_close(found, right, rtol=1e-9, atol=1e-12)


def test_an_iteration_that_does_not_end_is_left_to_factors(monkeypatch):
    (a, delta2, g, g0), damping = layer("iteration")
    monkeypatch.setattr("biasshift.fisher.solver.MOST_ITERATIONS", 1)
    fisher = bs.UnitFisher.from_samples(a, delta2, damping)
    found, expected = read(fisher, g, g0), definition(a, delta2, g, g0, damping)
    assert fisher._factors._by_blocks and not found["s"][3:].isnan().any()
    assert (found["dw"][3:] - expected["dw"]).norm() < 2e-3 * expected["dw"].norm()


def test_samples_are_kept_in_files(tmp_path):
    (a, delta2, g, g0), damping = layer("gram")
    fisher = bs.UnitFisher.from_samples(a, delta2, damping)
    fisher.save(tmp_path / "layer")
    loaded = bs.UnitFisher.load(tmp_path / "layer")
    assert isinstance(loaded.sums, HeldSums)
    mine, theirs = read(fisher, g, g0), read(loaded, g, g0)
    assert all(torch.equal(x.nan_to_num(), theirs[name].nan_to_num()) for name, x in mine.items())


def test_a_numerator_of_another_number_of_examples_has_another_matrix():
    (a, delta2, _, _), damping = layer("gram")
    fisher = bs.UnitFisher.from_samples(a, delta2, damping)
    twice = replace(fisher, sums=replace(fisher.sums, examples=2 * fisher.sums.examples))
    torch.testing.assert_close(twice.matrix(), fisher.matrix() / 2)
