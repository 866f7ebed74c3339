"""What measured layers say of themselves: in a line, in a notebook, as a table."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import biasshift as bs
from biasshift.display import page
from biasshift.measure.bias_shift import Shifts

X = torch.randn(60, 5, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.ELU(), nn.Linear(4, 3))


def test_moments(model):
    moments = bs.activation_moments(model, X)["1"]
    assert repr(moments).startswith("ActivationMoments(4 units, 60 values each, mean ")
    assert "\n" not in repr(moments) and len(repr(moments)) < 160
    table = moments.table()
    assert list(table) == ["unit", "mean", "var"] and len(table) == 4
    with torch.no_grad():
        np.testing.assert_allclose(table["mean"], model[:2](X).mean(0), rtol=1e-5)
    assert "<th>variance</th>" in moments._repr_html_()


def test_shifts(model):
    with bs.bias_shift(model, X) as shifts:
        assert repr(shifts) == "Shifts(measured when the block ends)"
        assert "block" in shifts._repr_html_()
        with pytest.raises(RuntimeError, match="after the block"):
            shifts.table()
        with torch.no_grad():
            model[0].bias += 0.5
    table = shifts.table()
    assert list(table) == ["layer", "unit", "total", "own", "incoming", "second_order"]
    assert table.groupby("layer").size().to_dict() == {"0": 4, "2": 3}
    np.testing.assert_allclose(table.query("layer == '0'").own, 0.5, rtol=1e-5)
    assert repr(shifts).startswith("Shifts(2 layers: '0': mean |total| 0.5, mean |own| 0.5")
    assert repr(shifts["0"]).startswith("BiasShift(4 units, ") and "inherited 0%" in repr(
        shifts["0"]
    )
    assert shifts["2"].table().drop(columns="unit").abs().to_numpy().max() > 0
    assert "inherited" in shifts._repr_html_() and "4 units" in shifts["0"]._repr_html_()


def test_no_layers_are_an_empty_table():
    empty = Shifts()
    empty._layers = {}
    assert repr(empty) == "Shifts(0 layers)" and len(empty.table()) == 0
    assert "unit" in empty.table()


def test_names_of_modules_are_no_markup():
    shown = page("<b>", {"<script>": {"&": "<i>"}})
    assert "<script>" not in shown and "<i>" not in shown and "<b>" not in shown
    assert "&lt;script&gt;" in shown


@pytest.mark.filterwarnings("ignore::biasshift.FewSamplesWarning")
def test_logs(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    y = torch.arange(60) % 3
    with bs.instrument(
        model, optimizer, probe=(X, y), every=1, quantities=("activations", "bias_shift")
    ) as log:
        F.cross_entropy(model(X), y).backward()
        optimizer.step()
    assert repr(log) == (
        "ProbeLog(2 weight layers and 1 activation, step 1, every 1 steps: activations, "
        f"bias_shift; {len(log.table())} rows)"
    )
    whole, compact = log.table(), log.table(compact=True)
    assert list(compact)[:4] == ["step", "layer", "kind", "unit"]
    assert not compact.isna().all().any() and len(compact) == len(whole)
    kinds = compact.groupby("layer", observed=True).kind.unique().map(list).to_dict()
    assert kinds == {"0": ["Linear"], "1": ["ELU"], "2": ["Linear"]}
    np.testing.assert_array_equal(compact["mean"], whole["mean"])
    assert "<table" in log._repr_html_() and "Linear" in log._repr_html_()


def test_a_log_of_training_batches(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with bs.instrument(model, optimizer) as log:
        F.cross_entropy(model(X), torch.arange(60) % 3).backward()
        optimizer.step()
    assert repr(log).startswith("TrainingLog(1 activation, step 1, every training batch")
    compact = log.table(compact=True)
    assert list(compact) == ["step", "layer", "kind", "unit", "mean", "var"]
    assert set(compact.kind) == {"ELU"}
