"""What the table holds behind its first columns: shifts of other updates, Cov_p(δ², a), h corrected for few samples."""

import pytest
import torch
from cases import BY_NAME
from test_instrument import DAMPING, logged, row

import biasshift as bs
from biasshift import theory
from biasshift.accumulating import Measured, Options
from biasshift.gaps import gap
from biasshift.measuring import measure
from biasshift.optim import UnitNaturalGradient

DOUBLE = torch.float64


def column(table, step, layer, name) -> torch.Tensor:
    return torch.tensor(row(table, step, layer)[name].to_numpy(), dtype=DOUBLE)


# -- shifts of updates -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "center", "scale"), [("shift_gradient", "none", "none"), ("shift_centered", "q", "none"), ("shift_natural", "q", "full")]
)
def test_the_shift_of_an_update_is_the_own_part_that_a_step_of_it_measures(name, center, scale):
    """Somebody's loop takes the step, on the probe itself; the curvature is exact, too, by its empirical labels."""
    model, x, y = BY_NAME["mlp-elu"].build()
    options = {"likelihood": "categorical", "labels": "empirical", "damping": DAMPING}
    optimizer = UnitNaturalGradient(model, 1e-2, center, scale, **options)
    with bs.instrument(model, optimizer=optimizer, probe=(x, y), every=1, **options) as log:
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    for layer in ("0", "2", "4"):
        foreseen = column(log.table(), 0, layer, name)
        torch.testing.assert_close(column(log.table(), 1, layer, "own"), 1e-2 * foreseen, rtol=1e-7, atol=1e-12)


def test_the_shift_of_the_natural_gradient_is_theorem_2s():
    model, x, y = BY_NAME["mlp-elu"].build()
    table = logged(0)[0].table()
    for name, layer in measure(model, x, y, Options(damping=DAMPING), gradient=True).items():
        fisher, g, g0 = layer.fisher, layer.g, layer.g0
        V = theory.damp(fisher.var_q, DAMPING)
        A = fisher.c[:, None, None] * (V + fisher.mean_q[:, :, None] * fisher.mean_q[:, None, :])
        effective = fisher.corrected_mean
        expected = torch.einsum("ui,uij,uj->u", effective, torch.linalg.inv(A), g) + fisher.k0 * g0
        torch.testing.assert_close(column(table, 0, name, "shift_natural"), -expected, rtol=1e-8, atol=1e-12)


def test_without_a_bias_there_is_nothing_to_center_with():
    model, x, y = BY_NAME["mlp-no-bias"].build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with bs.instrument(model, optimizer=optimizer, probe=(x, y), damping=DAMPING) as log:
        pass
    name = next(n for n, module in model.named_modules() if getattr(module, "bias", 0) is None)
    found, fisher = log.table(), bs.unit_fisher(model, x, damping=DAMPING)[name]
    assert column(found, 0, name, "shift_centered").isnan().all()
    gradient = torch.autograd.grad(torch.nn.functional.cross_entropy(model(x), y), model.get_parameter(f"{name}.weight"))[0]
    torch.testing.assert_close(column(found, 0, name, "shift_gradient"), -(gradient @ fisher.mean_p))
    layers = found[(found["unit"] < 0) & (found["layer"] == name)]
    assert layers["gap_explained"].isna().all() and layers["norm_ratio_diagonal"].notna().all()


# -- the gap ----------------------------------------------------------------------------------------------------------------------


def test_norm_ratios_and_the_share_that_bias_shift_explains():
    model, x, y = BY_NAME["mlp-elu"].build()
    frame = bs.gradient_gap(model, x, y, damping=DAMPING).set_index("layer")
    for name, layer in measure(model, x, y, Options(damping=DAMPING), gradient=True).items():
        fisher, g, g0 = layer.fisher, layer.g, layer.g0
        m = fisher.mean_q
        dw = g - g0[:, None] * m
        centered = torch.cat([dw, (g0 - (m * dw).sum(1))[:, None]], 1)
        natural = torch.cat([part.reshape(len(g), -1) for part in fisher.natural_gradient(g, g0)], 1)
        plain = torch.cat([g, g0[:, None]], 1)
        cosines = [torch.cosine_similarity(part.flatten(), natural.flatten(), 0).item() for part in (plain, centered)]
        found = frame.loc[name]
        assert found["norm_ratio_centered"] == pytest.approx((centered.norm() / natural.norm()).item())
        assert found["gap_explained"] == pytest.approx((cosines[1] - cosines[0]) / (1 - cosines[0]))


def test_where_bias_shift_is_all_of_the_gap_centering_explains_all_of_it():
    """Large means, and white activations about them: the centered gradient is the natural one but for its length."""
    a = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]], dtype=DOUBLE) + 50
    fisher = bs.UnitFisher.from_samples(a, torch.full((4, 1), 1.0, dtype=DOUBLE))
    g0 = torch.tensor([0.3], dtype=DOUBLE)
    found = gap(Measured(fisher, torch.tensor([[0.2, -0.1]], dtype=DOUBLE) + g0 * 50, g0))
    assert found["gap_explained"] == pytest.approx(1) and found["cos_gradient"] < 0.1
    assert found["norm_ratio_centered"] == pytest.approx(1) and found["norm_ratio_diagonal"] == pytest.approx(1)


# -- Cov_p(δ², a) -----------------------------------------------------------------------------------------------------------------


def test_cov_p_and_its_distance_from_zero():
    model, x, _ = BY_NAME["mlp-elu"].build()
    table = logged(0)[0].table()
    for name, fisher in bs.unit_fisher(model, x, damping=DAMPING).items():
        torch.testing.assert_close(column(table, 0, name, "norm_cov_p"), fisher.cov_p.norm(dim=1))
        spread = fisher.var_q.diagonal(dim1=1, dim2=2).sum(1)
        expected = ((fisher.mean_q - fisher.mean_p).square().sum(1) / spread).sqrt()
        torch.testing.assert_close(column(table, 0, name, "cov_distance"), expected)


def test_the_distance_is_free_of_scales_and_1_over_the_root_of_the_samples_by_chance(randn):
    generator = torch.Generator().manual_seed(0)
    a, weights = randn(3000, 40) * 3 + 2, torch.rand(3000, 200, generator=generator, dtype=DOUBLE) ** 4
    fisher = bs.UnitFisher.from_samples(a, weights, damping=1e-6)
    squares = ((fisher.mean_q - fisher.mean_p).square().sum(1) / fisher.var_q.diagonal(dim1=1, dim2=2).sum(1)).mean().item()
    expected = (1 / fisher.effective_samples - 1 / 3000).mean().item()
    assert squares == pytest.approx(expected, rel=0.1)


# -- few samples ------------------------------------------------------------------------------------------------------------------


def test_the_column_is_the_corrected_coupling_of_the_effective_samples():
    table = logged(0)[0].table()
    rows = row(table, 0, "2")
    h, n = rows["coupling"].to_numpy(), rows["effective_samples"].to_numpy()
    t = h / (1 - h) * (n - 6 - 2) / (n - 1) - 6 / n
    torch.testing.assert_close(column(table, 0, "2", "coupling_corrected"), torch.tensor(t / (1 + t)), rtol=1e-9, atol=1e-9)
