"""Numbers at any scale in single precision, and flags where the precision cannot carry them."""

import copy

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

import biasshift as bs
from biasshift import UnitFisher

DOUBLE, SINGLE, HALF = torch.float64, torch.float32, torch.float16
POWERS = st.integers(-60, 60)
storages = pytest.mark.parametrize("storage", ["dense", "implicit"])
EXPONENTS = {"s": 0, "k": 0, "k0": 0, "coupling": 0, "mean_q": 1, "mean_p": 1, "corrected_mean": 1}


def samples(dtype=SINGLE):
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(400, 4, generator=generator) @ torch.randn(4, 4, generator=generator) + 1
    delta2 = torch.rand(400, 3, generator=generator) ** 4 * 1e-3
    return a.to(dtype), delta2.to(dtype)


@storages
@settings(max_examples=40)
@given(power=POWERS)
def test_the_scale_of_the_inputs_changes_no_number_of_the_theory(storage, power):
    a, delta2 = samples()
    options = {"damping": 1e-3, "storage": storage, "tolerance": 1e-7}
    plain = UnitFisher.from_samples(a, delta2, **options)
    scaled = UnitFisher.from_samples(a * 2.0**power, delta2, **options)
    for name, exponent in EXPONENTS.items():
        expected = getattr(plain, name) * 2.0 ** (power * exponent)
        torch.testing.assert_close(getattr(scaled, name), expected, rtol=1e-4, atol=0)
    assert not (scaled.imprecise | scaled.singular | scaled.dead).any()
    g = torch.ones_like(plain.mean_q)
    step, step0 = scaled.natural_gradient(g * 2.0**power, g[:, 0])
    expected, expected0 = plain.natural_gradient(g, g[:, 0])
    torch.testing.assert_close(step * 2.0**power, expected, rtol=1e-4, atol=0)
    torch.testing.assert_close(step0, expected0, rtol=1e-4, atol=0)


@storages
@settings(max_examples=40)
@given(power=st.integers(-110, 60))
def test_the_scale_of_the_errors_scales_c_and_s_alone(storage, power):
    a, delta2 = samples()
    options = {"damping": 1e-3, "storage": storage, "tolerance": 1e-7}
    plain = UnitFisher.from_samples(a, delta2, **options)
    scaled = UnitFisher.from_samples(a, delta2 * 2.0**power, **options)
    for name in ("k", "coupling", "mean_q", "effective_samples"):
        torch.testing.assert_close(getattr(scaled, name), getattr(plain, name), rtol=1e-4, atol=0)
    torch.testing.assert_close(scaled.c, plain.c * 2.0**power, rtol=1e-4, atol=0)
    torch.testing.assert_close(scaled.s, plain.s * 2.0**-power, rtol=1e-4, atol=0)
    assert not scaled.imprecise.any()


def nets(dtype, kind):
    torch.manual_seed(0)
    layers = {
        "linear": [nn.Linear(4, 5, bias=False), nn.Flatten(), nn.Linear(5, 3)],
        "convolution": [nn.Conv1d(2, 5, 2, bias=False), nn.Flatten(), nn.Linear(15, 3)],
        "sequence": [nn.Linear(4, 5, bias=False), nn.Flatten(), nn.Linear(15, 3)],
    }[kind]
    shape = {"linear": (200, 4), "convolution": (200, 2, 4), "sequence": (200, 3, 4)}[kind]
    return nn.Sequential(*layers).to(dtype), torch.randn(shape).to(dtype)


@storages
@pytest.mark.parametrize("sharing", ["per_example", "expand"])
@pytest.mark.parametrize("kind", ["linear", "convolution", "sequence"])
@pytest.mark.parametrize("power", [-60, -35, 35, 60])
def test_a_layer_whose_weights_undo_the_scale_of_its_inputs_is_the_same_layer(
    power, kind, sharing, storage
):
    model, x = nets(SINGLE, kind)
    options = {"weight_sharing": sharing, "storage": storage, "damping": 1e-2, "tolerance": 1e-7}
    plain = bs.unit_fisher(model, x + 0.5, **options)
    moved = copy.deepcopy(model)
    with torch.no_grad():
        moved[0].weight *= 2.0**-power
    scaled = bs.unit_fisher(moved, (x + 0.5) * 2.0**power, **options)
    for name in ("coupling", "c", "effective_samples"):
        found, expected = getattr(scaled["0"], name), getattr(plain["0"], name)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)
    torch.testing.assert_close(scaled["2"].k, plain["2"].k, rtol=1e-4, atol=1e-5)


@storages
@pytest.mark.parametrize("sharing", ["per_example", "expand"])
@pytest.mark.parametrize("kind", ["linear", "convolution", "sequence"])
@pytest.mark.parametrize("power", [-60, -35])
def test_shrinking_the_weights_of_the_head_shrinks_errors_and_nothing_else(
    power, kind, sharing, storage
):
    model, x = nets(SINGLE, kind)
    options = {"weight_sharing": sharing, "storage": storage, "damping": 1e-2, "tolerance": 1e-7}
    small, smaller = copy.deepcopy(model), copy.deepcopy(model)
    with torch.no_grad():  # probabilities are equal either way, and errors in proportion to weights
        small[2].weight *= 2.0**-30
        smaller[2].weight *= 2.0 ** (power - 30)
        small[2].bias.zero_(), smaller[2].bias.zero_()
    plain = bs.unit_fisher(small, x + 0.5, **options)["0"]
    scaled = bs.unit_fisher(smaller, x + 0.5, **options)["0"]
    for name in ("coupling", "mean_q", "effective_samples"):
        found, expected = getattr(scaled, name), getattr(plain, name)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    found, expected = scaled.sums.mean_delta2, plain.sums.mean_delta2 * 4.0**power
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", [SINGLE, torch.bfloat16, HALF], ids=str)
@pytest.mark.parametrize("scale", [1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7])
def test_where_rounding_decides_k_the_unit_is_imprecise(scale, dtype):
    """Activations behind a bias vary in proportion to the inputs, and are rounded like the bias."""
    torch.manual_seed(0)
    layers = [nn.Linear(5, 8), nn.ELU(), nn.Linear(8, 8), nn.ELU(), nn.Linear(8, 3)]
    model, x = nn.Sequential(*layers).to(dtype), (torch.randn(3000, 5) * scale).to(dtype)
    exact = bs.unit_fisher(copy.deepcopy(model).double(), x.double())
    for name, fisher in bs.unit_fisher(model, x).items():
        wrong = (fisher._k - exact[name]._k).abs() > 0.1
        assert not (wrong & ~fisher.imprecise & ~fisher.singular & ~fisher.dead).any()
        assert not (fisher.imprecise & fisher.reliable).any()
        assert scale < 1e-5 or not exact[name].imprecise.any()
        if dtype == SINGLE:  # and no false alarm where there are digits left
            assert scale < 0.1 or not fisher.imprecise.any()
            assert name == "0" or scale > 1e-5 or (fisher.imprecise | fisher.singular).all()


def test_errors_that_vanish_in_half_precision_are_flagged():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ELU(), nn.Linear(6, 3)).to(HALF)
    x = torch.randn(500, 4).to(HALF)
    with torch.no_grad():
        model[2].weight *= 2.0**-20
    fisher = bs.unit_fisher(model, x)["0"]
    assert fisher.imprecise.all() and not fisher.reliable.any()
    with torch.no_grad():
        model[2].weight *= 2.0**-10
    fisher = bs.unit_fisher(model, x)["0"]
    assert fisher.dead.all() and fisher.imprecise.all()


def test_numbers_beyond_the_range_of_the_results_are_flagged():
    a, delta2 = samples()
    fisher = UnitFisher.from_samples(a, delta2 * 1e-36, damping=1e-3)
    assert fisher.imprecise.all()
    assert torch.isfinite(fisher.k).all()
    assert not UnitFisher.from_samples(a.double(), delta2.double() * 1e-36).imprecise.any()


def test_damping_makes_precise_and_dead_and_singular_units_are_not_called_imprecise():
    a, delta2 = samples(DOUBLE)
    a = (1e5 + a).float()
    assert UnitFisher.from_samples(a, delta2.float()).imprecise.all()
    assert not UnitFisher.from_samples(a, delta2.float(), damping=1e6).imprecise.any()
    delta2[:, 0] = 0
    fisher = UnitFisher.from_samples(samples()[0], delta2.float(), damping=1e-3)
    assert fisher.dead.tolist() == [True, False, False] and not fisher.imprecise.any()
    flat = UnitFisher.from_samples(torch.ones(9, 2), torch.rand(9, 1), damping=1e-3)
    assert flat.singular.all() and not flat.imprecise.any()
    none = UnitFisher.from_samples(torch.ones(9, 2).double(), torch.rand(9, 1).double())
    assert not none.imprecise.any() and not none.reliable.any()


@storages
def test_a_unit_with_vanishing_errors_leaves_the_kept_ones_alone(storage: str) -> None:
    """Its squares widen the errors of the layer, while the inputs stay in single precision."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)), torch.randn(20, 3)
    with torch.no_grad():
        model[2].weight[:, 1] *= 1e-20
    single = bs.unit_fisher(model, x, units={"0": [0]}, storage=storage)["0"]
    double = copy.deepcopy(model).double()
    exact = bs.unit_fisher(double, x.double(), units={"0": [0]}, storage=storage)["0"]
    torch.testing.assert_close(single.k.double(), exact.k, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("storage", ["auto", "dense"])
@pytest.mark.parametrize("bias", [True, False])
def test_weight_on_zeros_far_from_the_mean_is_flagged_where_moments_cancel(
    storage: str, bias: bool
) -> None:
    """As of a padding behind which a norm divides by its ε: errors a million times as large."""
    generator = torch.Generator().manual_seed(0)
    a = 3 + torch.randn(200, 4, generator=generator, dtype=torch.float64)
    a[:20] = 0
    delta2 = torch.rand(200, 2, generator=generator, dtype=torch.float64)
    delta2[:20, 0] *= 1e10
    options = {"storage": storage, "bias": bias, "damping": 1e-3}
    exact = bs.UnitFisher.from_samples(a, delta2, **options)
    single = bs.UnitFisher.from_samples(a.float(), delta2.float(), **options)
    assert single.imprecise.tolist() == [True, False] and not exact.imprecise.any()
    ã = torch.cat([a, torch.ones(200, 1)], 1) if bias else a
    F = torch.einsum("nu,ni,nj->uij", delta2, ã, ã) / 200
    torch.testing.assert_close(exact.matrix(), F, rtol=1e-4, atol=1e-12)
    weights = slice(0, 4)
    error = (single.matrix().double() - F)[:, weights, weights].abs().amax((1, 2))
    size = F[:, weights, weights].abs().amax((1, 2))
    assert error[0] > 1e-3 * size[0] and error[1] < 1e-5 * size[1]
