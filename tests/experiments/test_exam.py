"""The statistics of the claims against the block form; identities that hold and can be broken."""

from contextlib import contextmanager

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from biasshift import theory
from biasshift.experiments import exam
from biasshift.experiments.exam import DAMPINGS, examine, layer_statistics, residuals
from biasshift.fisher.unit_fisher import UnitFisher
from biasshift.measure.accumulators import Measured
from biasshift.measure.bias_shift import BiasShift, bias_shift
from biasshift.measure.fisher import unit_fisher
from biasshift.nets import mlp

LAYERS = ["2", "4"]
UNITS = {"0": [0, 2, 4], "2": [0, 1, 3, 4]}


@pytest.fixture(params=["elu", "relu"])
def model(request):
    """Inputs 6, two hidden layers of 5, three classes."""
    return mlp(6, 5, 2, 3, request.param, seed=1)


@pytest.fixture
def probe(generator):
    return torch.rand(700, 6, generator=generator), torch.randint(3, (700,), generator=generator)


def blocks(fisher: UnitFisher, unit: int, damping: float) -> np.ndarray:
    """The damped matrix of a unit, bias last, from the undamped one that was measured."""
    F_ = fisher.matrix()[unit].double().numpy()
    V = F_[:-1, :-1] / F_[-1, -1] - np.outer(F_[:-1, -1], F_[:-1, -1]) / F_[-1, -1] ** 2
    F_[:-1, :-1] += F_[-1, -1] * damping * np.trace(V) / len(V) * np.eye(len(V))
    return F_


# -- the statistics --------------------------------------------------------------------------------


@pytest.mark.parametrize("damping", DAMPINGS)
def test_the_statistics_are_those_of_the_block_form(model, probe, damping):
    x, y = probe
    model.double()
    statistics = examine(
        model, ((x.double(), y), (x[:350].double(), y[:350])), LAYERS, UNITS, step=7
    )
    fishers = unit_fisher(model, x.double(), layers=LAYERS, units={"2": UNITS["2"]})
    F.cross_entropy(model(x.double()), y).backward()
    for layer, fisher in fishers.items():
        chosen = UNITS.get(layer, range(3))
        module = model.get_submodule(layer)
        gradients = torch.cat([module.weight.grad, module.bias.grad[:, None]], 1).numpy()[
            list(chosen)
        ]
        natural, inflation, k, smaller = [], [], [], []
        for unit, gradient in enumerate(gradients):
            M = blocks(fisher, unit, damping)
            c, m, mean = M[-1, -1], M[:-1, -1] / M[-1, -1], fisher.mean_p.numpy()
            natural.append(np.linalg.solve(M, gradient))
            inflation.append(c * np.linalg.inv(M)[-1, -1])
            V = M[:-1, :-1] / c - np.outer(m, m)
            k.append(1 + (m - mean) @ np.linalg.solve(V, m))
            smaller.append(np.linalg.norm(mean - k[-1] * m) < np.linalg.norm(mean))
        cosine = np.sum(gradients * natural) / np.linalg.norm(gradients) / np.linalg.norm(natural)
        row = statistics.query(
            "layer == @layer and exam_probe == 0 and exam_damping == @damping"
        ).iloc[0]
        assert row["step"] == 7 and row["unit"] == -1 and row["exam_enough"] == 1
        assert row["exam_inflation"] == pytest.approx(np.median(inflation), rel=1e-6)
        assert row["exam_k"] == pytest.approx(np.median(k), rel=1e-6)
        assert row["exam_smaller_share"] == np.mean(smaller)
        assert row["exam_gap_degrees"] == pytest.approx(np.degrees(np.arccos(cosine)), rel=1e-6)
        assert row["exam_effective_samples"] == pytest.approx(
            np.median(fisher.effective_samples.numpy())
        )


def test_one_row_per_layer_probe_and_damping(model, probe):
    x, y = probe
    statistics = examine(model, ((x[:350], y[:350]), (x[350:], y[350:])), LAYERS, UNITS, step=7)
    assert (
        len(statistics) == 2 * 2 * 3
        and not statistics.duplicated(["layer", "exam_probe", "exam_damping"]).any()
    )
    assert statistics.groupby("layer")["exam_gap_degrees"].nunique().tolist() == [6, 6]
    again = examine(model, ((x[350:], y[350:]), (x[:350], y[:350])), LAYERS, UNITS, step=7)
    for probe_number in (0, 1):
        mine = statistics[statistics["exam_probe"] == probe_number]
        theirs = again[again["exam_probe"] == 1 - probe_number]
        assert mine["exam_k"].tolist() == theirs["exam_k"].tolist()


def measured(randn, examples: list[int]) -> Measured:
    """A layer of two inputs; unit i has one error on the first `examples[i]` of 100 examples.

    On the others it has none.
    """
    delta2 = torch.stack([(torch.arange(100) < count).double() for count in examples], 1)
    fisher = UnitFisher.from_samples(randn(100, 2) + 1, delta2, damping=1e-2)
    return Measured(fisher, randn(len(examples), 2), randn(len(examples)))


def test_units_with_too_few_effective_samples_do_not_count(randn):
    layer = measured(randn, [100, 19, 20, 3])  # 10 per input: 20 is just enough
    assert layer.fisher.effective_samples.tolist() == pytest.approx([100, 19, 20, 3])
    statistics = layer_statistics(layer)
    fisher, kept = layer.fisher, [0, 2]
    assert statistics["enough"] == 0.5 and statistics["effective_samples"] == pytest.approx(19.5)
    assert statistics["inflation"] == pytest.approx((1 / (1 - fisher.coupling))[kept].mean().item())
    assert statistics["k"] == pytest.approx(fisher.k[kept].mean().item())
    dw, dw0 = fisher.natural_gradient(layer.g, layer.g0)
    natural, plain = (
        torch.cat([w, w0[:, None]], 1)[kept].flatten() for w, w0 in ((dw, dw0), (layer.g, layer.g0))
    )
    assert statistics["gap_degrees"] == pytest.approx(
        np.degrees(np.arccos(F.cosine_similarity(natural, plain, 0).item()))
    )


def test_without_any_such_unit_there_are_no_numbers(randn):
    statistics = layer_statistics(measured(randn, [3, 4]))
    assert statistics.pop("enough") == 0 and statistics.pop("effective_samples") == pytest.approx(
        3.5
    )
    assert np.isnan(list(statistics.values())).all()


def test_dead_and_singular_units_do_not_count(randn):
    layer = measured(randn, [100, 0])
    assert layer_statistics(layer)["enough"] == 0.5
    alone = layer_statistics(measured(randn, [100]))
    assert layer.fisher.dead.tolist() == [False, True] and set(alone) == set(
        layer_statistics(layer)
    )
    constant = Measured(
        UnitFisher.from_samples(torch.ones(100, 2), torch.ones(100, 1), damping=1e-2),
        randn(1, 2),
        randn(1),
    )
    assert np.isnan(layer_statistics(constant)["gap_degrees"])


def test_an_inflation_beyond_float32_is_finite():
    """Where 1 − h is lost in rounding, 1/(1 − h) is not."""
    a = 1e4 + torch.linspace(-1, 1, 100)[:, None]
    layer = Measured(
        UnitFisher.from_samples(a, torch.ones(100, 1)), torch.ones(1, 1), torch.ones(1)
    )
    assert 1 - layer.fisher.coupling.item() < 1e-6
    variance = a.double().var(correction=0).item()
    assert layer_statistics(layer)["inflation"] == pytest.approx(
        1 + a.double().mean().item() ** 2 / variance, rel=1e-4
    )


# -- the identities --------------------------------------------------------------------------------

NAMES = {"theorem1", "identity", "theorem2", "bookkeeping"}


def broken(model, probe) -> set[str]:
    """The identities that are further than 10⁻⁶ from exact."""
    (row,) = residuals(model, probe, UNITS, step=3).to_dict("records")
    assert {name.removeprefix("residual_") for name in row if name.startswith("residual_")} == NAMES
    assert (row["step"], row["layer"], row["unit"]) == (3, "", -1)
    return {name for name in NAMES if not row[f"residual_{name}"] < 1e-6}


def test_the_identities_are_exact_in_float64(model, probe):
    (row,) = residuals(model, probe, UNITS, step=3).to_dict("records")
    assert max(row[f"residual_{name}"] for name in NAMES) < 1e-10
    assert broken(model, probe) == set()


def test_the_model_is_left_as_it_was(model, probe):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    residuals(model, probe, UNITS, step=0)
    examine(model, (probe, probe), LAYERS, UNITS, step=0)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert model.training and all(
        p.dtype == torch.float32 and p.grad is None for p in model.parameters()
    )


@pytest.fixture
def natural_gradient(monkeypatch):
    """Plants another natural gradient, made from the right one."""
    right = UnitFisher.natural_gradient

    def plant(wrong):
        monkeypatch.setattr(
            UnitFisher,
            "natural_gradient",
            lambda self, g, g0=None: wrong(self, g, g0, *right(self, g, g0)),
        )

    return plant


WRONG = {
    "no correction of the bias": (
        lambda f, g, g0, dw, dw0: (dw, g0 / f.c),
        {"theorem1", "identity", "theorem2"},
    ),
    "centered with the mean under p": (
        lambda f, g, g0, dw, dw0: (dw, g0 / f.c - theory.dot(f.mean_p.expand_as(dw), dw)),
        {"theorem1", "identity", "theorem2"},
    ),
    "weights a percent too long": (
        lambda f, g, g0, dw, dw0: (1.01 * dw, g0 / f.c - 1.01 * theory.dot(f.mean_q, dw)),
        {"theorem1", "theorem2"},  # the mean net input under q still moves by g₀/c
    ),
    "the plain gradient": (lambda f, g, g0, dw, dw0: (g, g0), {"theorem1", "identity", "theorem2"}),
    "no number": (
        lambda f, g, g0, dw, dw0: (dw * torch.nan, dw0),
        {"theorem1", "identity", "theorem2"},
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_natural_gradient_is_detected(model, probe, natural_gradient, wrong):
    plant, expected = WRONG[wrong]
    natural_gradient(plant)
    assert broken(model, probe) == expected


def test_the_natural_gradient_of_another_damping_is_detected(model, probe, monkeypatch):
    right = UnitFisher.natural_gradient
    monkeypatch.setattr(
        UnitFisher, "natural_gradient", lambda self, g, g0=None: right(self.damped(1e-2), g, g0)
    )
    assert broken(model, probe) == {"theorem1", "theorem2"}


def test_a_wrong_factor_in_theorem_2_is_detected(model, probe, monkeypatch):
    monkeypatch.setattr(
        theory, "k0_from_blocks", lambda A, b, c, mean: theory.s_from_blocks(A, b, c)
    )
    assert broken(model, probe) == {"theorem2"}


@pytest.mark.parametrize("part", ["own", "incoming", "second_order"])
def test_bookkeeping_that_forgets_a_part_is_detected(model, probe, monkeypatch, part):
    @contextmanager
    def forgetful(model, x):
        shift = {}
        with bias_shift(model, x) as whole:
            yield shift
        for name, layer in whole.items():
            parts = {
                key: getattr(layer, key) for key in ("total", "own", "incoming", "second_order")
            }
            shift[name] = BiasShift(**parts | {part: torch.zeros_like(layer.total)})

    monkeypatch.setattr(exam, "bias_shift", forgetful)
    assert broken(model, probe) == {"bookkeeping"}
