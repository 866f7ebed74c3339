"""`biasshift.plot`: whatever was measured has a picture, whose dots are the numbers measured."""

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import biasshift as bs
from biasshift.nets import mlp

X = torch.randn(60, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.arange(60) % 3


@pytest.fixture
def model():
    return mlp(5, hidden=4, depth=2, classes=3, seed=0).double()


def dots(ax):
    """All numbers that stand as dots, in order of their place."""
    points = [point for line in ax.lines for point in zip(*line.get_data(), strict=True)]
    return np.array([y for _, y in sorted(points)])


def trained(model, optimizer):
    for _ in range(4):
        optimizer.zero_grad()
        F.cross_entropy(model(X), Y).backward()
        optimizer.step()


@pytest.mark.filterwarnings("ignore::biasshift.FewSamplesWarning")
def test_a_log_and_its_table_have_a_line_per_layer(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with bs.instrument(model, optimizer, probe=(X, Y), every=2) as log:
        trained(model, optimizer)
    table = log.table()
    for x in (log, table, log.table(compact=True)):
        figure = bs.plot(x)
        shown = {ax.get_ylabel(): ax for ax in figure.axes if ax.lines}
        assert len(shown) == 6
        (layer,) = [line for line in shown["$k$"].lines if line.get_label() == "layer 2"]
        rows = table[(table.layer == "2") & table.k.notna()]
        medians = rows.groupby("step").k.median()
        assert np.array_equal(layer.get_xdata(), medians.index)
        assert np.allclose(layer.get_ydata(), medians)


def test_units_are_dots_and_unreliable_ones_hollow(model):
    many = torch.randn(900, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    fishers = bs.unit_fisher(model, many)
    figure = bs.plot(fishers)
    values = torch.cat([fisher.k for fisher in fishers.values()]).numpy()
    assert np.allclose(dots(figure.axes[1]), values)
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["0", "2", "4"]
    few = fishers["0"]
    filled, hollow = bs.plot(few).axes[0].lines
    assert len(filled.get_xdata()) == int(few.reliable.sum())
    assert len(hollow.get_xdata()) == int((~few.reliable).sum())
    assert matplotlib.colors.to_hex(hollow.get_markerfacecolor()) == "#ffffff"


def test_moments_and_shifts(model):
    moments = bs.activation_moments(model, X)
    assert np.allclose(dots(bs.plot(moments["1"]).axes[0]), moments["1"].mean)
    assert len(bs.plot(moments).axes[0].get_xticklabels()) == 2
    with bs.bias_shift(model, X) as shifts:
        trained(model, torch.optim.SGD(model.parameters(), lr=0.1))
    expected = torch.cat([shift.incoming for shift in shifts.values()])
    for x in (shifts, shifts.table(), dict(shifts)):
        assert np.allclose(dots(bs.plot(x).axes[2]), expected)
    assert np.allclose(dots(bs.plot(shifts["2"]).axes[0]), shifts["2"].total)


def test_many_layers_share_a_panel():
    steps, layers = range(3), [f"layer{i}" for i in range(40)]
    rows = [(step, layer, 0, float(step)) for step in steps for layer in layers]
    table = pd.DataFrame(rows, columns=["step", "layer", "unit", "mean"])
    (ax,) = bs.plot(table).axes
    names = [line.get_label() for line in ax.lines]
    assert len(names) == 12 and {"layer layer0", "layer layer39"} <= {*names}


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (3, "'x' must be a log, a table.*got int"),
        ({}, "measured at least one layer, got none"),
        ({"a": 3}, "got int"),
        (pd.DataFrame({"step": [1], "layer": [""], "unit": [-1]}), "got none"),
        (nn.Linear(2, 2), "got Linear"),
        (pd.DataFrame({"step": [1], "mean": [2.0]}), "got a table without layer, unit"),
        (pd.DataFrame({"step": [1], "layer": "a", "unit": 0, "mean": "x"}), "got none"),
        (
            {
                "a": pd.DataFrame({"mean": [1.0], "var": 1.0}),
                "b": pd.DataFrame({"k": [1.0]}),
            },
            "got a table without",
        ),
    ],
)
def test_other_things_are_refused(x, words):
    with pytest.raises(ValueError, match=words):
        bs.plot(x)


def test_other_tables_are_refused_with_the_columns_that_are_drawn(model):
    with pytest.raises(ValueError, match=r"must have the columns coupling, .* got a table without"):
        bs.plot(bs.check(model, X, Y))


@pytest.mark.filterwarnings("ignore::biasshift.FewSamplesWarning")
def test_a_gradient_gap_has_a_dot_per_layer(model):
    gap = bs.gradient_gap(model, X, Y)
    figure = bs.plot(gap)
    for ax, column in zip(
        figure.axes, ("cos_gradient", "cos_centered", "cos_diagonal"), strict=True
    ):
        np.testing.assert_allclose(dots(ax), gap[column])
