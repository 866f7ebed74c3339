"""What the figures show, read back from their artists; and what is on disk afterwards."""

import numpy as np
import pandas as pd
import pytest
from planted import Planted, table

from biasshift.figures import FIGURES, described, draw, figure1, figure2, gap


@pytest.fixture
def runs() -> pd.DataFrame:
    """Two activations, three seeds; ELU's medians are 0.1, 0.2, 0.3, and its losses e⁻¹, e⁻², e⁻³."""
    return table(
        Planted(name, seed, unit_mean=base + seed / 10, train_loss=np.exp(-seed - 1))
        for name, base in (("elu", 0.1), ("relu", 0.5))
        for seed in range(3)
    )


def labels(ax) -> list[str]:
    legend = ax.get_legend()
    return [text.get_text() for text in legend.get_texts()] if legend else []


# -- the figures -------------------------------------------------------------------------------------------------


def test_figure_1_is_the_activation_functions():
    (ax,) = figure1().axes
    assert labels(ax) == ["ELU", "LReLU", "ReLU", "SReLU"]


def test_figure_2_is_means_and_losses_against_the_epoch(runs):
    figure = figure2(runs)
    means, losses = figure.axes
    elu, relu = means.lines[:2]
    np.testing.assert_allclose(elu.get_data(), [[0, 2, 4], [9, 9, 0.2]])
    assert relu.get_ydata()[-1] == pytest.approx(0.6)
    train = next(line for line in losses.lines if str(line.get_label()).startswith("ELU"))
    np.testing.assert_allclose(train.get_data(), [[0, 2, 4], [2.3, 2.3, np.exp(-2)]])
    assert losses.get_yscale() == "log" and means.get_yscale() == "linear"
    assert figure.get_suptitle() == "planted: 4 epochs, 3 seeds"


def test_one_legend_serves_both_panels(runs):
    means, losses = figure2(runs).axes
    assert labels(means) == [] and labels(losses) == ["ELU (n = 3)", "ReLU (n = 3)", "training", "validation"]
    named = {line.get_label(): line for line in losses.lines}
    for line in means.lines[:2]:
        twin = named[line.get_label()]
        assert (line.get_color(), line.get_marker(), line.get_linestyle()) == (twin.get_color(), twin.get_marker(), twin.get_linestyle())


def test_the_gap_is_that_of_layers_fed_by_an_activation(runs):
    more = runs[runs["layer"] == "2"].assign(layer="0", cos_gradient=-1.0)  # the first layer's gap is not shown
    figure = gap(pd.concat([runs, more]))
    (ax,) = figure.axes
    dots, median = (collection.get_offsets() for collection in ax.collections[:2])
    assert len(dots) == 3 * 2 * 3  # runs, layers, measurements
    np.testing.assert_allclose(dots[:, 1], 60)
    assert set(np.round(dots[:, 0], 6)) == {0.2, 0.4}
    np.testing.assert_allclose(median, [[0.3, 60]])
    assert figure.get_suptitle() == "planted: 4 epochs, 3 seeds" and labels(ax) == ["ELU (n = 3)", "ReLU (n = 3)"]


# -- what it says about the runs ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("columns", "text"),
    [
        ({"experiment": "digits", "epochs": 60, "seed": 0}, "digits: 60 epochs, 1 seed"),
        ({"experiment": "mnist", "epochs": [300, 25, 300], "seed": [2, 0, 1]}, "mnist: 25–300 epochs, 3 seeds"),
        ({"experiment": ["mnist", "digits", "mnist"], "epochs": 5, "seed": [1, 1, 0]}, "digits, mnist: 5 epochs, 2 seeds"),
        ({"experiment": ["mine", None, None], "epochs": [np.nan, 5, 5], "seed": 0}, "mine: 5 epochs, 1 seed"),
        ({"seed": [0, 1, 2]}, "3 seeds"),
        ({"experiment": "mine"}, "mine"),
        ({}, ""),
    ],
)
def test_described(columns, text):
    assert described(pd.DataFrame({"step": range(3), **columns})) == text


def test_described_of_categories_counts_what_is_there(runs):
    categorical = runs.astype({"experiment": "category", "run": "category"})
    assert described(categorical[categorical["seed"] == 1]) == "planted: 4 epochs, 1 seed"


# -- files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FIGURES)
def test_png_and_pdf_are_written(runs, tmp_path, name):
    paths = draw(name, None if name == "1" else runs, tmp_path / "new" / "folder")
    assert [path.name for path in paths] == [f"figure_{name}.png", f"figure_{name}.pdf"]
    assert [path.read_bytes()[:4] for path in paths] == [b"\x89PNG", b"%PDF"]


@pytest.mark.parametrize(
    ("name", "column", "says"),
    [
        ("2", "mean", "'mean'"),
        ("2", "valid_loss", "'valid_loss'"),
        ("2", "activation", "'activation'"),
        ("gap", "cos_gradient", "'cos_gradient'"),
        ("gap", "inputs", "'inputs'.*biasshift train"),
    ],
)
def test_runs_that_lack_what_a_figure_shows_are_refused_and_leave_no_folder(runs, tmp_path, name, column, says):
    with pytest.raises(ValueError, match=says):
        draw(name, runs.drop(columns=column), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_unknown_figure_is_refused(runs, tmp_path):
    with pytest.raises(ValueError, match="no figure '3': choose one of 1, 2, gap"):
        draw("3", runs, tmp_path / "out")


@pytest.mark.parametrize("name", ["2", "gap"])
def test_a_figure_of_no_runs_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match="there are none"):
        draw(name, None, tmp_path / "out")
    assert not (tmp_path / "out").exists()
