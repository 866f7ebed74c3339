"""The later columns of the table: shifts of a step's gradient, Cov_p(δ², a), h of few samples."""

import copy
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from cases import BY_NAME
from test_instrument import DAMPING, logged, row
from torch import nn

import biasshift as bs
from biasshift import theory
from biasshift.measure.accumulators import Measured
from biasshift.measure.fisher import measure
from biasshift.measure.gradient_gap import gap
from biasshift.measure.options import Options
from biasshift.optim import UnitNaturalGradient
from biasshift.tracking.rows import OWN_COLUMNS, UPDATE_COLUMNS
from biasshift.training import Ensemble

DOUBLE = torch.float64


def column(table, step, layer, name) -> torch.Tensor:
    return torch.tensor(row(table, step, layer)[name].to_numpy(), dtype=DOUBLE)


# -- what the gradient of a step would shift -------------------------------------------------------

LR = 1e-2


def minibatch(seed: int = 3, shape: tuple[int, ...] = (5,)) -> tuple[torch.Tensor, torch.Tensor]:
    """Examples that are not those of the probe."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(16, *shape, generator=generator, dtype=DOUBLE) - 0.4
    return x, torch.randint(3, (16,), generator=generator)


def backward(
    model: nn.Module, scale: float = 1.0, seed: int = 3, shape: tuple[int, ...] = (5,)
) -> None:
    x, y = minibatch(seed, shape)
    (scale * F.cross_entropy(model(x.to(next(model.parameters()).dtype)), y)).backward()


def stepped(
    model, optimizer, probe, step=None, fill: Callable[[nn.Module], None] = backward, **options
):
    """The table of one step of somebody's loop."""
    with bs.instrument(model, optimizer, probe, every=1, damping=DAMPING, **options) as log:
        fill(model)
        (step or optimizer.step)()
    return log.table()


def sgd(model: nn.Module, **options) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), **{"lr": LR, **options})


def close(actual: torch.Tensor, expected: torch.Tensor, rtol: float = 1e-8) -> None:
    atol = 1e-12 * float(expected.abs().nan_to_num().max())
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol, equal_nan=True)


@pytest.mark.parametrize(
    ("name", "center", "scale"),
    [("gradient", "none", "none"), ("centered", "q", "none"), ("natural", "q", "full")],
)
def test_the_shift_of_an_update_is_the_own_part_that_a_step_of_it_measures(name, center, scale):
    """The optimizer sees the probe's own examples; its empirical curvature is exact, too."""
    model, x, y = BY_NAME["mlp-elu"].build()
    options = {"likelihood": "categorical", "labels": "empirical"}
    optimizer = UnitNaturalGradient(model, LR, center, scale, damping=DAMPING, **options)
    table = stepped(
        model,
        optimizer,
        (x, y),
        fill=lambda model: F.cross_entropy(model(x), y).backward(),
        **options,
    )
    for layer in ("0", "2", "4"):
        own = column(table, 1, layer, "own")
        close(own, LR * column(table, 1, layer, f"shift_{name}"), 1e-7)
        close(own, column(table, 1, layer, f"own_{name}"), 1e-7)


def test_the_columns_are_those_of_the_theorems_in_block_form():
    """By the minibatch's gradient, and with everything else from before the step."""
    model, x, y = BY_NAME["mlp-elu"].build()
    fishers = bs.unit_fisher(model, x)
    table = stepped(model, sgd(model), (x, y))
    for name, fisher in fishers.items():
        layer = model.get_submodule(name)
        g, g0, mu, c, m = layer.weight.grad, layer.bias.grad, fisher.mean_p, fisher.c, fisher.mean_q
        A = c[:, None, None] * (theory.damp(fisher.var_q, DAMPING) + m[:, :, None] * m[:, None, :])
        dw, dw0 = theory.natural_gradient_blocks(A, c[:, None] * m, c, g, g0)
        plain = theory.bias_shift(mu, g, g0)
        natural = theory.theorem2_shift(A, c[:, None] * m, c, mu, g, g0)
        close(natural, theory.bias_shift(mu, dw, dw0))
        close(column(table, 1, name, "own"), -LR * plain)
        close(column(table, 1, name, "shift_gradient"), -plain)
        close(column(table, 1, name, "shift_natural"), -natural)
        length = (g.square().sum(1) + g0.square()).sqrt()
        close(column(table, 1, name, "own_gradient"), -LR * plain)
        own = -LR * natural * length / (dw.square().sum(1) + dw0.square()).sqrt()
        close(column(table, 1, name, "own_natural"), own)
        dw = g - g0[:, None] * m
        dw0 = g0 - (m * dw).sum(1)
        shift = theory.bias_shift(mu, dw, dw0)
        close(column(table, 1, name, "shift_centered"), -shift)
        own = -LR * shift * length / (dw.square().sum(1) + dw0.square()).sqrt()
        close(column(table, 1, name, "own_centered"), own)


@pytest.mark.parametrize(
    "name",
    [
        "residual",
        "shared",
        "tokens-pooled",
        "conv-uneven",
        "conv-groups",
        "conv-no-bias",
        "conv1d",
        "batchnorm-eval",
    ],
)
def test_gradient_descent_shifts_what_its_gradient_says_in_every_kind_of_layer(name):
    case = BY_NAME[name]
    model, x, y = case.build()
    table = stepped(
        model, sgd(model), (x, y), fill=lambda model: backward(model, shape=case.x_shape[1:])
    )
    rows = table[table["own"].notna()]
    assert len(rows) and rows["layer"].nunique() >= 2
    own, shift, same = (
        torch.tensor(rows[name].to_numpy()) for name in ("own", "shift_gradient", "own_gradient")
    )
    close(own, LR * shift)
    close(own, same)


def test_units_are_chosen_from_the_gradient_as_from_everything_else():
    tables = []
    for units in (None, [1, 4]):
        model, x, y = BY_NAME["mlp-elu"].build()
        tables.append(stepped(model, sgd(model), (x, y), layers=["2"], units=units))
    for name in ("shift_gradient", "shift_natural", "own_natural"):
        close(column(tables[1], 1, "2", name), column(tables[0], 1, "2", name)[[1, 4]])


def test_the_gradient_is_the_one_in_grad_when_the_step_begins():
    """Several backward passes, clipped and changed by hand; the actual update has a momentum of
    another gradient, and decay.
    """
    model, x, y = BY_NAME["mlp-elu"].build()
    optimizer = sgd(model, momentum=0.9, weight_decay=0.1)
    backward(model, seed=9)
    optimizer.step()
    optimizer.zero_grad()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    mu = bs.unit_fisher(model, x)["2"].mean_p

    def fill(model):
        backward(model, seed=1)
        backward(model, seed=2)
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        model[2].weight.grad[1] *= -3

    table = stepped(model, optimizer, (x, y), fill=fill)
    shift = column(table, 1, "2", "shift_gradient")
    close(shift, -theory.bias_shift(mu, model[2].weight.grad, model[2].bias.grad))
    w, w0 = model[2].weight, model[2].bias
    moved = torch.cat([w - before["2.weight"], (w0 - before["2.bias"])[:, None]], 1).detach()
    length = torch.cat([w.grad, w0.grad[:, None]], 1).norm(dim=1)
    close(column(table, 1, "2", "own_gradient"), moved.norm(dim=1) * shift / length)
    difference = column(table, 1, "2", "own") - column(table, 1, "2", "own_gradient")
    assert (difference.abs() > 0.01 * shift.abs() * LR).all()


def test_parameter_groups_of_their_own_rate_and_an_ascent():
    model, x, y = BY_NAME["mlp-elu"].build()
    groups = [
        {"params": model[0].parameters(), "lr": 1e-3},
        {"params": [*model[2].parameters()], "maximize": True},
        {"params": model[4].parameters(), "lr": 0.0},
    ]
    table = stepped(model, torch.optim.SGD(groups, lr=LR), (x, y))
    for layer, rate in (("0", 1e-3), ("2", LR), ("4", 0.0)):
        own = column(table, 1, layer, "own")
        close(own, rate * column(table, 1, layer, "shift_gradient"))
        close(own, column(table, 1, layer, "own_gradient"))
    assert (column(table, 1, "4", "own_natural") == 0).all()
    assert (column(table, 1, "4", "shift_natural") != 0).all()
    assert (column(table, 1, "2", "own") != 0).all()


# -- gradients that are scaled, stacked, or not there ----------------------------------------------


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("unscaled", [False, True])
def test_the_scale_of_a_gradient_scaler_is_divided_out(fused, unscaled):
    model, x, y = BY_NAME["mlp-elu"].build()
    model, x = model.float(), x.float()
    twin = copy.deepcopy(model)
    expected = stepped(twin, sgd(twin), (x, y))
    optimizer, scaler = sgd(model, fused=fused), torch.amp.GradScaler("cpu", init_scale=2.0**10)

    def step():
        scaler.unscale_(optimizer) if unscaled else None
        scaler.step(optimizer)

    def fill(model):
        scaler.scale(torch.ones(()))  # makes the scale
        backward(model, 2.0**10)

    table = stepped(model, optimizer, (x, y), step, fill)
    for name in ("own", "shift_gradient", "shift_centered", "shift_natural", "own_natural"):
        close(column(table, 1, "2", name), column(expected, 1, "2", name), 1e-3)


@pytest.mark.parametrize(
    "make", [lambda: BY_NAME["mlp-elu"].build(), lambda: BY_NAME["conv-groups"].build()]
)
def test_a_member_of_an_ensemble_has_its_slice_of_the_gradient(make):
    model, x, y = make()
    members = [model, copy.deepcopy(model)]
    with torch.no_grad():
        for p in members[1].parameters():
            p.mul_(1.5)
    alone = [copy.deepcopy(member) for member in members]
    batches = [minibatch(seed, tuple(x.shape[1:])) for seed in (1, 2)]
    ensemble = Ensemble(members, lambda parameters: torch.optim.SGD(parameters, lr=LR))
    with ExitStack() as stack:
        logs = [
            stack.enter_context(
                bs.instrument(net, ensemble.optimizer, (x, y), every=1, damping=DAMPING)
            )
            for net in members
        ]
        ensemble(*(torch.stack(parts) for parts in zip(*batches, strict=True)))
    for log, net, (bx, by) in zip(logs, alone, batches, strict=True):
        expected = stepped(
            net,
            sgd(net),
            (x, y),
            fill=lambda net, bx=bx, by=by: F.cross_entropy(net(bx), by).backward(),
        )
        for name in ("own", "shift_gradient", "own_natural"):
            close(column(log.table(), 1, "0", name), column(expected, 1, "0", name), 1e-6)


def test_a_bias_that_stays_has_nothing_to_center_with():
    model, x, y = BY_NAME["mlp-elu"].build()
    model[2].bias.requires_grad_(False)
    fisher = bs.unit_fisher(model, x)["2"]
    table = stepped(model, sgd(model), (x, y))
    assert column(table, 1, "2", "shift_centered").isnan().all()
    assert column(table, 1, "2", "own_centered").isnan().all()
    close(column(table, 1, "2", "own"), LR * column(table, 1, "2", "shift_gradient"))
    close(
        column(table, 1, "2", "shift_natural"),
        -torch.einsum("i,uij,uj->u", fisher.mean_p, inverse(fisher), model[2].weight.grad),
    )


def inverse(fisher: bs.UnitFisher) -> torch.Tensor:
    """``A⁻¹``, damped as everything here."""
    m = fisher.mean_q
    A_over_c = theory.damp(fisher.var_q, DAMPING) + m[:, :, None] * m[:, None, :]
    return torch.linalg.inv(fisher.c[:, None, None] * A_over_c)


def test_without_a_bias_there_is_nothing_to_center_with():
    model, x, y = BY_NAME["mlp-no-bias"].build()
    fisher = bs.unit_fisher(model, x)["0"]
    table = stepped(model, sgd(model), (x, y))
    assert column(table, 1, "0", "shift_centered").isnan().all()
    close(column(table, 1, "0", "shift_gradient"), -(model[0].weight.grad @ fisher.mean_p))
    close(
        column(table, 1, "0", "shift_natural"),
        -torch.einsum("i,uij,uj->u", fisher.mean_p, inverse(fisher), model[0].weight.grad),
    )
    layers = table[(table["unit"] < 0) & (table["layer"] == "0")]
    assert layers["gap_explained"].isna().all() and layers["norm_ratio_diagonal"].notna().all()


def frozen(model: nn.Module) -> dict:
    model[2].requires_grad_(False)
    return {"optimizer": sgd(model)}


def not_the_optimizers(model: nn.Module) -> dict:
    return {"optimizer": torch.optim.SGD([*model[0].parameters(), *model[4].parameters()], lr=LR)}


def parametrized(model: nn.Module) -> dict:
    nn.utils.parametrizations.weight_norm(model[2])
    return {"optimizer": sgd(model)}


def by_a_closure(model: nn.Module) -> dict:
    optimizer = torch.optim.LBFGS(model.parameters(), lr=LR, max_iter=2)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        backward(model)
        return torch.zeros(())

    return {"optimizer": optimizer, "step": lambda: optimizer.step(closure)}


@pytest.mark.parametrize("make", [frozen, not_the_optimizers, parametrized, by_a_closure])
def test_a_gradient_that_is_not_there_leaves_its_columns_empty(make):
    model, x, y = BY_NAME["mlp-elu"].build()
    rows = row(stepped(model, probe=(x, y), **make(model)), 1, "2")
    assert rows[[*UPDATE_COLUMNS, *OWN_COLUMNS]].isna().all().all()
    assert rows[["own", "k"]].notna().all().all()


def test_a_unit_whose_gradient_is_not_finite_has_none_of_it():
    model, x, y = BY_NAME["mlp-elu"].build()

    def fill(model):
        backward(model)
        model[2].weight.grad[1, 0], model[2].bias.grad[3] = torch.nan, torch.inf

    with pytest.warns(UserWarning, match="no Fisher and gap rows"):  # the step ends the network
        rows = row(stepped(model, sgd(model), (x, y), fill=fill), 1, "2")
    for name in UPDATE_COLUMNS:
        assert rows[name].isna().tolist() == [False, True, False, True, False]


def test_a_sparse_gradient_is_read_as_any_other():
    model, x, y = BY_NAME["mlp-elu"].build()
    expected = stepped(twin := copy.deepcopy(model), sgd(twin), (x, y))

    def fill(model):
        backward(model)
        model[2].weight.grad = model[2].weight.grad.to_sparse()

    table = stepped(model, sgd(model), (x, y), fill=fill)
    for name in ("own", "shift_gradient", "own_natural"):
        close(column(table, 1, "2", name), column(expected, 1, "2", name))


def test_a_singular_matrix_before_the_step_does_not_end_the_loop():
    """The first layer's units are switched off, all but one, and on again behind the step."""
    model, x, y = BY_NAME["mlp-elu"].build()
    optimizer = sgd(model)
    kept = model[0].bias.detach().clone()
    with bs.instrument(model, optimizer, (x, y), every=1, layers=["2"]) as log:
        log.options = replace(log.options, damping=0.0)
        with torch.no_grad():
            model[0].bias[1:] = -100.0
        backward(model)
        optimizer.register_step_post_hook(lambda *_: model[0].bias.data.copy_(kept))
        optimizer._optimizer_step_post_hooks.move_to_end(
            next(reversed(optimizer._optimizer_step_post_hooks)), last=False
        )
        with pytest.warns(UserWarning, match=r"no shifts of its gradient\. Layer '2'.*singular"):
            optimizer.step()
    rows = row(log.table(), 1, "2")
    assert rows["shift_gradient"].isna().all() and rows["own"].notna().all()


def test_no_gradient_outlives_its_step():
    model, x, y = BY_NAME["mlp-elu"].build()
    optimizer = sgd(model)
    with bs.instrument(model, optimizer, (x, y), every=1) as log:
        backward(model)
        held = [weakref.ref(p.grad) for p in model.parameters()]
        optimizer.step()
        optimizer.zero_grad()
        assert [ref() for ref in held] == [None] * 6 and not log._predicted


def test_measuring_before_the_step_leaves_the_labels_drawn_after_it_as_they_would_be():
    tables = []
    for quantities in (("fisher",), ("fisher", "gap")):
        options = {"labels": "sampled", "generator": torch.Generator().manual_seed(0)}
        tables.append(logged(4, 2, quantities=quantities, **options)[0].table())
    for step in (0, 2, 4):
        assert torch.equal(column(tables[0], step, "2", "k"), column(tables[1], step, "2", "k"))
    assert column(tables[1], 4, "2", "shift_natural").isfinite().all()


# -- the gap ---------------------------------------------------------------------------------------


def test_norm_ratios_and_the_share_that_bias_shift_explains():
    model, x, y = BY_NAME["mlp-elu"].build()
    frame = bs.gradient_gap(model, x, y, damping=DAMPING).set_index("layer")
    for name, layer in measure(model, x, y, Options(damping=DAMPING), gradient=True).items():
        fisher, g, g0 = layer.fisher, layer.g, layer.g0
        m = fisher.mean_q
        dw = g - g0[:, None] * m
        centered = torch.cat([dw, (g0 - (m * dw).sum(1))[:, None]], 1)
        natural = torch.cat(
            [part.reshape(len(g), -1) for part in fisher.natural_gradient(g, g0)], 1
        )
        plain = torch.cat([g, g0[:, None]], 1)
        cosines = [
            torch.cosine_similarity(part.flatten(), natural.flatten(), 0).item()
            for part in (plain, centered)
        ]
        ratio = (centered.norm() / natural.norm()).item()
        explained = (cosines[1] - cosines[0]) / (1 - cosines[0])
        assert frame.loc[name, "norm_ratio_centered"] == pytest.approx(ratio)
        assert frame.loc[name, "gap_explained"] == pytest.approx(explained)


def test_where_bias_shift_is_all_of_the_gap_centering_explains_all_of_it():
    """Large means, and white activations about them: the centered gradient is the natural one but
    for its length.
    """
    a = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]], dtype=DOUBLE) + 50
    fisher = bs.UnitFisher.from_samples(a, torch.full((4, 1), 1.0, dtype=DOUBLE))
    g0 = torch.tensor([0.3], dtype=DOUBLE)
    values = gap(Measured(fisher, torch.tensor([[0.2, -0.1]], dtype=DOUBLE) + g0 * 50, g0))
    assert values["cos_gradient"] < 0.1
    for name in ("gap_explained", "norm_ratio_centered", "norm_ratio_diagonal"):
        assert values[name] == pytest.approx(1)


# -- Cov_p(δ², a) ----------------------------------------------------------------------------------


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
    a = randn(3000, 40) * 3 + 2
    weights = torch.rand(3000, 200, generator=generator, dtype=DOUBLE) ** 4
    fisher = bs.UnitFisher.from_samples(a, weights, damping=1e-6)
    spread = fisher.var_q.diagonal(dim1=1, dim2=2).sum(1)
    squares = ((fisher.mean_q - fisher.mean_p).square().sum(1) / spread).mean().item()
    expected = (1 / fisher.effective_samples - 1 / 3000).mean().item()
    assert squares == pytest.approx(expected, rel=0.1)


# -- few samples -----------------------------------------------------------------------------------


def test_the_column_is_the_corrected_coupling_of_the_effective_samples():
    table = logged(0)[0].table()
    rows = row(table, 0, "2")
    h, n = rows["coupling"].to_numpy(), rows["effective_samples"].to_numpy()
    t = h / (1 - h) * (n - 6 - 2) / (n - 1) - 6 / n
    torch.testing.assert_close(
        column(table, 0, "2", "coupling_corrected"), torch.tensor(t / (1 + t)), rtol=1e-9, atol=1e-9
    )
