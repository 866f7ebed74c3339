"""Figures: what they show, read back from their artists, the small tables, and the files."""

import json

import numpy as np
import pandas as pd
import pytest
from planted import Planted, cifar, moving, scored, swept, table

from biasshift import figures, plots
from biasshift.figures import FIGURES, caption, condensed, described, draw, numbers, picture
from biasshift.figures.convnets import TABLE1, TEST_ERRORS, TRAIN_LOSSES
from biasshift.figures.selection import chosen
from biasshift.figures.tables import load, load_origin
from biasshift.runs.writer import Run


@pytest.fixture
def runs() -> pd.DataFrame:
    """Two activations, three seeds; ELU's medians are 0.1, 0.2, 0.3, its losses e⁻¹, e⁻², e⁻³."""
    return table(
        Planted(name, seed, unit_mean=base + seed / 10, train_loss=np.exp(-seed - 1))
        for name, base in (("elu", 0.1), ("relu", 0.5))
        for seed in range(3)
    )


def labels(ax) -> list[str]:
    legend = ax.get_legend()
    return [text.get_text() for text in legend.get_texts()] if legend else []


def below(figure) -> list[str]:
    """The legend of the whole figure."""
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def line(ax, activation, style=None):
    color = plots.LOOKS[activation].color
    (match,) = [
        line
        for line in ax.lines
        if line.get_color() == color
        and len(line.get_xdata())
        and style in (None, line.get_linestyle())
    ]
    return match


def hollow(ax) -> list:
    """The marks of published numbers; not the one that is in the legend only."""
    return [
        mark for mark in ax.lines if mark.get_markerfacecolor() == "white" and len(mark.get_xdata())
    ]


def drawn(name, runs):
    small = condensed(name, runs)
    return picture(name, small), small


# -- the paper's figures ---------------------------------------------------------------------------


def test_figure_1_is_the_activation_functions():
    (ax,) = picture("1", None).axes
    assert labels(ax) == ["ELU", "SReLU", "LReLU", "ReLU"]


def test_figure_2_is_means_and_losses_against_the_epoch(runs):
    figure, small = drawn("2", runs)
    means, losses = figure.axes
    elu, relu = means.lines[:2]
    np.testing.assert_allclose(elu.get_data(), [[0, 2, 4], [9, 9, 0.2]])
    assert relu.get_ydata()[-1] == pytest.approx(0.6)
    train = next(line for line in losses.lines if str(line.get_label()).startswith("ELU"))
    np.testing.assert_allclose(train.get_data(), [[0, 2, 4], [2.3, 2.3, np.exp(-2)]])
    assert losses.get_yscale() == "log" and means.get_yscale() == "linear"
    assert figure.get_suptitle() == "planted: 4 epochs, 3 seeds"
    # Runs, measurements, and one row each for the network and for the median unit.
    assert len(small) == 6 * 3 * 2


def test_figure_2_from_its_small_table_is_figure_2_of_the_runs(runs):
    means = plots.unit_means(picture("1", None).axes[0], runs)  # the axes do not matter
    (ours, _) = drawn("2", runs)[0].axes
    for line, expected in zip(ours.lines[:2], means.lines[4:6], strict=True):
        np.testing.assert_allclose(line.get_data(), expected.get_data())


def test_one_legend_serves_both_panels_of_figure_2(runs):
    means, losses = drawn("2", runs)[0].axes
    assert labels(means) == []
    assert labels(losses) == ["ELU (n = 3)", "ReLU (n = 3)", "training", "validation"]
    named = {line.get_label(): line for line in losses.lines}
    for line in means.lines[:2]:
        twin = named[line.get_label()]
        for look in ("color", "marker", "linestyle"):
            assert getattr(line, f"get_{look}")() == getattr(twin, f"get_{look}")()


def test_figure_3_has_medians_over_runs_for_every_rate():
    settings = [
        {"activation": "elu", "seed": seed, "lr": lr} for seed in range(3) for lr in (1e-4, 1e-2)
    ]
    values = {0: 1.0, 1: 2.0, 2: 9.0}
    errors = {
        "train_error": lambda step, s: values[s["seed"]] * s["lr"],
        "test_error": lambda step, s: 2 * values[s["seed"]] * s["lr"],
    }
    figure, small = drawn("3", scored("autoencoder", settings, errors))
    for ax, expected in zip(figure.axes, (2e-2, 2e-4, 4e-2, 4e-4), strict=True):
        np.testing.assert_allclose(line(ax, "elu").get_data(), [[0, 2, 4], [expected] * 3])
        assert not ax.collections  # no ribbon around a median
    assert [ax.get_title() for ax in figure.axes] == [
        "learning rate 0.01",
        "learning rate 0.0001",
        "",
        "",
    ]
    assert below(figure) == ["ELU (n = 3)"]
    assert [number.here for number in numbers("3", small)] == [
        "0.080 ± 0.087 (n = 3)",
        "0.001 ± 0.001 (n = 3)",
    ]


def test_figure_4_has_the_whole_the_start_and_the_end():
    figure, small = drawn("4", cifar())
    expected = {"whole": [0, 60, 120], "start": [0, 60], "end": [120]}
    for ax, (part, steps) in zip(figure.axes[3:], expected.items(), strict=True):
        x, y = line(ax, "elu").get_data()
        assert x.tolist() == steps and part in ax.get_title(loc="left")
        np.testing.assert_allclose(y, [0.105 + 0.5 - 0.5 * step / 120 for step in steps])
    np.testing.assert_allclose(line(figure.axes[0], "relu").get_data(), [[60, 120], [6.55, 4.05]])
    # Short runs have no published mark.
    assert below(figure) == [f"{name} (n = 2)" for name in ("ELU", "SReLU", "LReLU", "ReLU")]
    here = {number.quantity: number.here for number in numbers("4", small)}
    assert here["test error at the end, ELU"] == "10.5 ± 0.7 % (n = 2)"
    assert {number.paper for number in numbers("4", small)} == {"–"}
    assert "do not stand beside" in caption("4", small)
    long = condensed("4", cifar((0, 90_000, 165_000)))
    assert numbers("4", long)[0].paper == "28.75 ± 0.24 % (n = 10)"
    assert "do not stand beside" not in caption("4", long)


@pytest.mark.parametrize(
    ("columns", "last", "marks"),
    [
        ({"dataset": "cifar100"}, 165_000, 4),
        ({"dataset": "cifar100", "width": 1.0}, 165_000, 4),
        ({"dataset": "cifar100"}, 164_000, 4),
        ({"dataset": "cifar100"}, 100_000, 0),
        ({"dataset": "cifar100"}, 200_000, 0),
        ({"dataset": "cifar10"}, 165_000, 0),
        ({"dataset": "cifar100", "made": "smoke"}, 165_000, 0),
        ({"dataset": "cifar100", "width": 0.25}, 165_000, 0),
    ],
)
def test_figure_4_has_the_papers_numbers_on_runs_of_its_length_and_size(columns, last, marks):
    figure, small = drawn("4", cifar((0, 90_000, last), **columns))
    assert len({number.paper for number in numbers("4", small)}) == (8 if marks else 1)
    heights = [[float(mark.get_ydata()[0]) for mark in hollow(ax)] for ax in figure.axes]
    assert [len(marked) for marked in heights] == [0, 0, marks, 0, 0, marks]
    assert set(heights[2]) == (set(TRAIN_LOSSES.values()) if marks else set())
    assert sorted(100 * height for height in heights[5]) == pytest.approx(
        sorted(error for error, _ in TEST_ERRORS.values())[:marks]
    )
    assert ("paper" in below(figure)) == bool(marks)
    assert figure.axes[0].get_xlabel() == "thousand updates"


def test_a_part_without_a_score_is_an_empty_panel():
    for name in ("4", "5"):
        figure, _ = drawn(name, cifar((0, 120), normed=(False,) if name == "4" else (False, True)))
        figure.draw_without_rendering()
    figure, _ = drawn("4", cifar((0, 120)))
    # There is no training loss in the first half.
    assert [len(ax.lines) for ax in figure.axes] == [4, 0, 4, 4, 4, 4]


def test_figure_4_leaves_out_networks_with_batch_norm():
    small = condensed("4", cifar(normed=(False, True)))
    assert not small["batch_norm"].any() and small["run"].nunique() == 8


def test_figure_5_pairs_elu_with_each_other():
    figure, small = drawn("5", cifar(normed=(False, True)))
    assert [ax.get_title(loc="left") for ax in figure.axes[:3]] == [
        f"({a}) ELU and {b}, whole" for a, b in zip("abc", ("ReLU", "SReLU", "LReLU"), strict=True)
    ]
    solid, dotted = (line(figure.axes[0], "relu", style).get_ydata() for style in ("-", ":"))
    np.testing.assert_allclose(solid, [0.905, 0.655, 0.405])
    np.testing.assert_allclose(dotted, [0.7025, 0.4525, 0.2025])
    assert line(figure.axes[3], "elu", "-").get_xdata().tolist() == [120]
    counted = [f"{name} (n = 2)" for name in ("ELU", "SReLU", "LReLU", "ReLU")]
    assert below(figure) == [*counted, "without batch norm", "with batch norm"]
    here = {number.quantity: number.here for number in numbers("5", small)}
    assert here["test error with batch norm, ReLU"] == "20.2 ± 0.4 % (n = 2)"


@pytest.mark.parametrize(("normed", "there"), [(False, "without"), (True, "with")])
def test_figure_5_needs_both(normed, there):
    with pytest.raises(ValueError, match=rf"all of these are {there}\. .*--batch-norm"):
        condensed("5", cifar(normed=(normed,)))


def test_figure_6_is_loss_top_5_and_top_1():
    settings = [{"activation": name, "seed": 0} for name in ("elu", "relu")]
    columns = {
        "train_loss": lambda step, s: 7 - step / 100,
        "valid_error5": lambda step, s: 0.9 - step / 1000,
        "valid_error": lambda step, s: 0.99 - step / 1000,
    }
    figure, small = drawn(
        "6", scored("imagenet", settings, columns, dataset="imagenet (1000 classes)", steps=100)
    )
    for ax, expected in zip(
        figure.axes, ([7, 6.5, 6], [0.9, 0.85, 0.8], [0.99, 0.94, 0.89]), strict=True
    ):
        np.testing.assert_allclose(line(ax, "relu").get_data(), [[0, 50, 100], expected])
    assert [number[1:] for number in numbers("6", small)] == [("80.0 % (n = 1)", "–")] * 2 + [
        ("89.0 % (n = 1)", "–")
    ] * 2


def test_figure_6_has_the_papers_numbers_on_imagenet_alone():
    columns = {name: lambda step, s: 0.5 for name in ("train_loss", "valid_error5", "valid_error")}
    both, thousand = [(160_000, 0.2), (200_000, 0.2)], "imagenet (1000 classes)"
    for dataset, last, marks in (
        (thousand, 250_000, both),
        (thousand, 180_000, both[:1]),
        ("flowers (5 classes)", 250_000, []),
    ):
        runs = scored(
            "imagenet", [{"activation": "elu", "seed": 0}], columns, (0, last), dataset=dataset
        )
        figure, small = drawn("6", runs)
        _, top5, _ = figure.axes
        assert [tuple(mark.get_xydata()[0]) for mark in hollow(top5)] == marks
        assert ("20 % after 160k" in numbers("6", small)[0].paper) == bool(marks)


def test_figure_7_is_the_variance_over_epochs_of_every_unit_and_layer():
    figure, small = drawn(
        "7", pd.concat([moving("elu", seed, 0.1) for seed in (0, 1)] + [moving("relu", 0, 0.2)])
    )
    units = small[(small["unit"] >= 0) & (small["run"] == "relu-0")].set_index(["number", "unit"])[
        "variance"
    ]
    for number, layer in ((1, 1), (2, 3)):
        for unit in range(3):
            # The variance of −x, 0, x.
            assert units[(number, unit)] == pytest.approx((layer * 0.2 * (unit + 1)) ** 2)
    bars = figure.axes[0].containers
    assert [bar.get_label() for bar in bars] == ["ELU (n = 2)", "ReLU (n = 1)"]
    np.testing.assert_allclose(bars[0][0].get_xydata()[:, 1], [0.2**2, 0.6**2])  # the middle unit
    np.testing.assert_allclose(line(figure.axes[1], "relu").get_data(), [[1, 2], [0.4**2, 1.2**2]])
    median = np.median([(layer * 0.2 * u) ** 2 for layer in (1, 3) for u in (1, 2, 3)])
    assert numbers("7", small)[1].here == f"{median:.2g} (n = 1)"


def test_a_variance_needs_three_measurements():
    with pytest.raises(ValueError, match="3 measurements after step 0, and a run has 2"):
        condensed("7", moving("elu", 0, 0.1).query("step < 3"))


def test_table_1_is_the_papers_ten_networks_and_the_last_errors_of_these():
    settings = [
        {"activation": name, "seed": seed, "dataset": "cifar100"}
        for name in ("elu", "relu")
        for seed in (0, 1)
    ]
    errors = {
        "train_loss": lambda step, s: 1.0,
        "test_error": lambda step, s: 0.9 if step < 100 else 0.25 + s["seed"] / 100,
    }
    figure, small = drawn("table1", scored("cifar18", settings, errors))
    assert len(small) == 4 and len(TABLE1) == 8
    (hundred,) = figure.axes  # and no panel without runs
    paper = {
        label.get_text(): x
        for label, x in zip(hundred.get_yticklabels(), hundred.lines[0].get_xdata(), strict=False)
    }
    assert hundred.get_title() == "CIFAR-100" and paper == {
        name: errors[1] for name, errors in TABLE1.items()
    }
    elu, relu = hundred.lines[1:]
    assert elu.get_xdata() == pytest.approx([25.5]) and relu.get_xdata() == pytest.approx([25.5])
    assert (
        (elu.get_marker(), elu.get_color())
        != (relu.get_marker(), relu.get_color())
        == ("s", plots.LOOKS["relu"].color)
    )
    assert [label.get_text() for label in hundred.get_yticklabels()][-2:] == [
        f"{name}, these runs (n = 2)" for name in ("ELU", "ReLU")
    ]
    assert numbers("table1", small)[-2:] == [
        (f"these runs, cifar100, {name}", "25.5 ± 0.7 % (n = 2)", "–") for name in ("ELU", "ReLU")
    ]


def test_table_1_of_synthetic_data_stands_alone_and_says_so():
    settings = [{"activation": "elu", "seed": 0, "dataset": "cifar100"}]
    errors = {"train_loss": lambda step, s: 1.0, "test_error": lambda step, s: 0.8}
    figure, small = drawn("table1", scored("cifar18", settings, errors, made="smoke"))
    (ax,) = figure.axes
    assert ax.get_title() == "synthetic data" and len(ax.lines) == 1 and not below(figure)
    for words in (figure.get_suptitle(), figures.said("table1", small)):
        assert "synthetic data" in words and "cifar100" not in words
    assert [number.paper for number in numbers("table1", small)] == ["–"]


def test_table_1_of_whole_runs_stands_beside_the_papers():
    settings = [
        {"activation": name, "seed": 0, "dataset": dataset}
        for name in ("elu", "relu")
        for dataset in ("cifar10", "cifar100")
    ]
    errors = {"train_loss": lambda step, s: 1.0, "test_error": lambda step, s: 0.25}
    figure, small = drawn("table1", scored("cifar18", settings, errors, (0, 160_000), width=1.0))
    assert [ax.get_title() for ax in figure.axes] == ["CIFAR-10", "CIFAR-100"]
    assert [number.paper for number in numbers("table1", small)[8:]] == [
        "6.55 %",
        "prints none",
        "24.28 %",
        "prints none",
    ]


# -- the theory's figures --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gap", "theory1"])
def test_the_gap_is_that_of_layers_fed_by_an_activation(runs, name):
    # The gap of the first layer is not shown.
    more = runs[runs["layer"] == "2"].assign(layer="0", cos_gradient=-1.0)
    figure, small = drawn(name, pd.concat([runs, more]))
    (ax,) = figure.axes
    dots, median = [at for cloud in ax.collections if len(at := cloud.get_offsets())][:2]
    assert len(dots) == 3 * 2 * 3  # runs, layers, measurements
    np.testing.assert_allclose(dots[:, 1], 60)
    assert set(np.round(dots[:, 0], 6)) == {0.2, 0.4}
    np.testing.assert_allclose(median, [[0.3, 60]])
    assert figure.get_suptitle() == "planted: 4 epochs, 3 seeds" and labels(ax) == [
        "ELU (n = 3)",
        "ReLU (n = 3)",
    ]
    assert numbers(name, small)[0].here == "60.0 degrees, 0.3"


def test_theory2_leaves_out_units_with_too_few_samples():
    planted = table(Planted("elu", seed, along=lambda step, layer: {}) for seed in range(2))
    units = (planted["unit"] >= 0) & planted["coupling"].notna()
    first = units & (planted["unit"] == 0)
    planted.loc[units, "k"] = 0.5
    planted.loc[first, ["k", "effective_samples"]] = 7.0, 29.0  # of 3 inputs: one too few
    figure, small = drawn("theory2", planted)
    k, means, enough = figure.axes
    np.testing.assert_allclose(line(k, "elu").get_data(), [[0, 2, 4], [0.5] * 3])
    np.testing.assert_allclose(line(means, "elu", "-").get_ydata(), [1] * 3)
    # That of unit 1, whose corrected mean is larger.
    np.testing.assert_allclose(line(means, "elu", ":").get_ydata(), [2] * 3)
    np.testing.assert_allclose(line(enough, "elu").get_ydata(), [0.5] * 3)
    assert numbers("theory2", small)[0].here == "0.500 ± 0.000 (n = 2)"


def test_theory2_counts_the_units_whose_mean_the_correction_makes_smaller():
    shares = {0: 1.0, 25: 0.5, 50: 0.0, 75: 0.0, 100: 0.5}  # epochs 0 to 4
    planted = table(
        Planted("elu", seed, every=25, along=lambda step, layer: {"smaller": shares[step]})
        for seed in range(2)
    )
    units = (planted["unit"] >= 0) & planted["coupling"].notna()
    planted.loc[units, "k"] = 0.5
    few = units & (planted["layer"] == "4") & (planted["step"] == 100)
    planted.loc[few, ["effective_samples", "norm_corrected_mean"]] = 1.0, 9.0  # not counted
    small = condensed("theory2", planted)
    name = "units with |μ − k m| < |μ|"
    assert {number.quantity: number.here for number in numbers("theory2", small)[3:]} == {
        f"{name} at initialization, ELU": "100 ± 0 % (n = 2)",
        f"{name} after the first epoch, ELU": "50.0 ± 0.0 % (n = 2)",
        f"{name} at the end, ELU": "50.0 ± 0.0 % (n = 2)",
    }
    assert len(numbers("theory2", small.drop(columns="smaller"))) == 3  # of a table from before


@pytest.mark.parametrize("last", [0, 25, 75])
@pytest.mark.parametrize("activations", [["elu"], ["elu", "relu"]])
def test_theory2_says_that_there_is_nothing_at_the_end_where_no_unit_qualifies(activations, last):
    """Units of "elu" have too few samples behind step `last`; those of "relu" always enough."""
    planted = table(
        Planted(activation, seed, every=25, along=lambda step, layer: {"smaller": 1.0})
        for activation in activations
        for seed in range(2)
    )
    units = (planted["unit"] >= 0) & planted["coupling"].notna()
    planted.loc[units, "k"] = 0.5
    few = units & (planted["activation"] == "elu") & (planted["step"] > last)
    planted.loc[few, "effective_samples"] = 1.0
    figure, small = drawn("theory2", planted)
    here = {number.quantity: number.here for number in numbers("theory2", small)}
    at_the_end = {quantity: text for quantity, text in here.items() if "at the end" in quantity}
    name = "units with |μ − k m| < |μ| at the end"
    assert at_the_end.pop(f"{name}, ELU") == "none: no unit has enough samples"
    assert list(at_the_end.values()) == ["100 ± 0 % (n = 2)"] * (len(activations) - 1)
    assert here["units with |μ − k m| < |μ| at initialization, ELU"] == "100 ± 0 % (n = 2)"
    assert here["k, as long as most units have enough samples, ELU"] == "0.500 ± 0.000 (n = 2)"
    share = line(figure.axes[2], "elu").get_data()
    np.testing.assert_allclose(share, [range(5), [float(25 * e <= last) for e in range(5)]])


def test_theory2_counts_at_the_end_the_runs_that_have_units():
    planted = table(Planted("elu", seed, every=25, along=lambda *_: {}) for seed in range(3))
    units = (planted["unit"] >= 0) & planted["coupling"].notna()
    planted.loc[units, "k"] = 0.5
    few = units & (planted["seed"] == 1) & (planted["step"] > 0)
    planted.loc[few, "effective_samples"] = 1.0
    here = {n.quantity: n.here for n in numbers("theory2", condensed("theory2", planted))}
    assert here["units with |μ − k m| < |μ| at the end, ELU"].endswith("(n = 2)")
    assert here["units with |μ − k m| < |μ| at initialization, ELU"].endswith("(n = 3)")


def test_theory3_adds_up_absolute_parts_behind_the_first_layer(runs):
    figure, small = drawn("theory3", runs)
    whole, along, layers = figure.axes
    heights = [[bar.get_height() for bar in bars] for bars in whole.containers]
    np.testing.assert_allclose(heights, [[0.6, 0.6], [0.3, 0.3], [0.1, 0.1]])
    np.testing.assert_allclose(line(along, "elu").get_data(), [[0, 2, 4], [0.3] * 3])
    np.testing.assert_allclose(line(layers, "relu").get_data(), [[2, 3], [0.3] * 2])
    assert [number.here for number in numbers("theory3", small)] == ["0.300 ± 0.000 (n = 3)"] * 2
    np.testing.assert_allclose(small["own"], 1.2)  # two units of 0.6, of either sign


def test_theory4_shows_each_cell_at_its_best_rate():
    figure, small = drawn("theory4", swept())
    plain, centered, sooner, later = figure.axes
    assert (plain.get_title(loc="left"), centered.get_title(loc="left")) == (
        "(a) plain",
        "(b) centered",
    )
    assert set(small.loc[small["best"], "lr"]) == {0.1}
    x, y = line(plain, "elu").get_data()
    np.testing.assert_allclose(y, 2.3 * np.exp(-0.1 * x))
    (raised,) = [line for line in plain.lines if str(line.get_label()).startswith("ELU + 0.5")]
    np.testing.assert_allclose(raised.get_ydata(), 2.3 * np.exp(-0.05 * x))
    levels = [float(steps.get_title(loc="left").rpartition(" ")[2]) for steps in (sooner, later)]
    assert levels[0] > levels[1]
    for steps, level in zip((sooner, later), levels, strict=True):
        bars = {
            bar.get_label().partition(" (")[0]: bar[0].get_xydata()[:, 1]
            for bar in steps.containers
        }
        np.testing.assert_allclose(bars["ELU"], [np.log(2.3 / level) / 0.1] * 2)
        np.testing.assert_allclose(
            bars["ELU + 0.5"], [np.log(2.3 / level) / 0.05, np.log(2.3 / level) / 0.1]
        )
    here = {number.quantity: number.here for number in numbers("theory4", small)}
    assert here["ELU, learning rate 0.1, an edge of the grid"] == ", ".join(
        f"{np.log(2.3 / x) / 0.1:.0f} steps to {x:g}" for x in levels
    )
    assert below(figure) == ["ELU (n = 2)", "ReLU (n = 2)", "ELU + 0.5 (n = 2)"]
    # So that they can be told from each other in grey print.
    assert (line(plain, "elu").get_linestyle(), raised.get_linestyle()) == ("-", "--")


def test_theory4_describes_what_it_draws_and_says_which_rates_are_at_an_edge():
    runs = swept((0.01, 0.1, 1.0)).assign(update_every=50)
    runs.loc[runs["lr"] == 1.0, "epoch"] /= 2  # these ended early, and are not drawn
    runs = pd.concat(
        [
            runs,
            runs[runs["update"] == "plain"].assign(
                update="full", run=lambda rows: rows["run"] + "-full"
            ),
        ]
    )
    low = runs["activation"].eq("relu") & runs["lr"].isin([0.1, 1.0]) & runs["update"].eq("plain")
    runs = runs[~low | (runs["step"] < 50)]
    figure, small = drawn("theory4", runs)
    words = " ".join(figure.get_suptitle().split())
    assert (
        "sweep, MNIST at half resolution: 4 epochs, 2 seeds" in words and "ended early" not in words
    )
    assert "The full update looks at its curvature every 50 steps" in words
    assert words.endswith("Best rate at an edge of those tried, 0.01 to 1: ReLU, plain (0.01)")
    assert "ended early" not in caption("theory4", small)
    assert [
        number.quantity for number in numbers("theory4", small) if "edge" in number.quantity
    ] == ["ReLU, learning rate 0.01, an edge of the grid"]


def test_networks_with_batch_norm_are_networks_of_their_own_and_look_the_same_in_every_panel():
    normed = [
        Planted(
            name,
            seed,
            rate=0.2,
            settings={
                "update": update,
                "constant": 0.0,
                "batch_norm": True,
                "lr": lr,
                "experiment": "sweep",
            },
        )
        for name, update in (("elu", "plain"), ("relu", "centered"))
        for lr in (0.01, 0.1)
        for seed in range(2)
    ]
    figure, small = drawn(
        "theory4", pd.concat([swept().assign(batch_norm=False), table(normed)], ignore_index=True)
    )
    assert {"elu with batch norm", "relu with batch norm", "relu"} <= set(small["network"])
    plain, centered, _, steps = figure.axes
    bars = {bar.get_label().partition(" (")[0]: bar[0] for bar in steps.containers}
    for ax, name in (
        (plain, "ELU with batch norm"),
        (centered, "ReLU with batch norm"),
        (centered, "ELU + 0.5"),
    ):
        (shown,) = [line for line in ax.lines if str(line.get_label()).startswith(name)]
        assert (shown.get_color(), shown.get_marker()) == (
            bars[name].get_color(),
            bars[name].get_marker(),
        )
    np.testing.assert_allclose(
        bars["ELU with batch norm"].get_xydata()[:, 1],
        np.log(2.3 / float(steps.get_title(loc="left").split()[-1])) / 0.2,
    )


def test_a_rate_whose_runs_stopped_is_not_the_best():
    runs = swept()
    fast = runs["lr"] == 0.1
    small = condensed("theory4", runs[~fast | (runs["step"] < 90)])
    assert set(small.loc[small["best"], "lr"]) == {0.01}


def test_theory4_refuses_an_unequal_grid():
    runs = swept()
    with pytest.raises(ValueError, match="complete the grid"):
        condensed(
            "theory4",
            runs[
                ~(
                    (runs["activation"] == "elu")
                    & (runs["update"] == "plain")
                    & (runs["constant"] == 0)
                    & (runs["lr"] == 0.1)
                )
            ],
        )


def test_bench_reads_the_benchmarks(tmp_path):
    rows = [
        {"method": "biasshift", "seconds": 0.5, "bytes": 2**20},
        {"method": "other", "seconds": 2, "bytes": 2**22},
        {"method": "none", "skipped": "x"},
    ]
    result = {
        "question": "mlp",
        "title": "MLP, 3 layers",
        "device": "cpu",
        "commit": "abc",
        "rows": rows,
    }
    (tmp_path / "mlp_cpu.json").write_text(json.dumps(result))
    # A question that is not a comparison.
    (tmp_path / "kernel_cpu.json").write_text(json.dumps({**result, "question": "kernel"}))
    small = figures.data("bench", tmp_path)
    time, memory = picture("bench", small).axes
    assert [list(ax.lines[0].get_xdata()) for ax in (time, memory)] == [[0.5, 2], [1, 4]]
    assert [label.get_text() for label in time.get_yticklabels()] == ["biasshift", "other"]
    assert [number.here for number in numbers("bench", small)] == [
        "0.5 s, 1 MiB",
        "2 s, 4.0 × ours, 4 MiB",
    ]


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"rows": 3}',
        '{"question": "mlp", "title": "", "device": "", "commit": "", "rows": [1]}',
    ],
)
def test_other_files_are_no_benchmarks(tmp_path, text):
    (tmp_path / "mlp_cpu.json").write_text(text)
    with pytest.raises(ValueError, match=r"mlp_cpu\.json' is not a file of"):
        figures.data("bench", tmp_path)


# -- which runs, and what it says about them -------------------------------------------------------


def test_a_figure_chooses_its_experiment_and_setting():
    runs = pd.DataFrame(
        {"experiment": ["digits", "mnist", "mnist", "sweep"], "depth": [8, 8, 5, 8]}
    )
    assert chosen(runs, ["mnist", "digits"], {"depth": 5}, "").index.tolist() == [2]
    # A preference is not a condition.
    assert chosen(runs, ["digits"], {"depth": 5}, "").index.tolist() == [0]
    with pytest.raises(ValueError, match=r"runs are of digits, mnist, sweep.*train cifar11"):
        chosen(runs, ["cifar11"], {}, "biasshift train cifar11")


def test_somebodys_own_runs_are_taken_as_they_are():
    runs = pd.DataFrame({"experiment": ["mine", "mnist"]})
    assert chosen(runs, ["cifar11"], {}, "").index.tolist() == [0]
    assert len(chosen(runs.drop(columns="experiment"), ["cifar11"], {}, "")) == 2


SHORTENED = " (schedule shortened from the paper's 165,000 updates)"
SMOKE = "Smoke run: a tiny version, which shows only that it works."


@pytest.mark.parametrize(
    ("columns", "text"),
    [
        ({"experiment": "digits", "epochs": 60, "seed": 0}, "digits: 60 epochs, 1 seed"),
        (
            {"experiment": "mnist", "epochs": [300, 25, 300], "seed": [2, 0, 1]},
            "mnist: 25–300 epochs, 3 seeds",
        ),
        (
            {"experiment": ["mnist", "digits", "mnist"], "epochs": 5, "seed": [1, 1, 0]},
            "digits, mnist: 5 epochs, 2 seeds",
        ),
        (
            {"experiment": ["mine", None, None], "epochs": [np.nan, 5, 5], "seed": 0},
            "mine: 5 epochs, 1 seed",
        ),
        ({"seed": [0, 1, 2]}, "3 seeds"),
        ({"experiment": "mine"}, "mine"),
        ({}, ""),
        (
            {
                "experiment": "mnist",
                "depth": 8,
                "width": 128,
                "epochs": 3,
                "reached": 3.0,
                "device": "cpu",
            },
            "mnist, 8 × 128: 3 epochs, cpu",
        ),
        (
            {"experiment": "mnist", "epochs": 300, "reached": [3.0, 300, 300]},
            "mnist: 3–300 of 300 epochs (some ended early)",
        ),
        (
            {"experiment": "cifar11", "dataset": "cifar100", "epochs": 330.0, "steps": 165_000},
            "cifar11, cifar100: 165,000 steps",
        ),
        ({"experiment": "cifar11", "steps": 164_000}, "cifar11: 164,000 steps"),
        ({"experiment": "cifar11", "width": 1.0, "steps": 9}, f"cifar11: 9 steps{SHORTENED}"),
        (
            {"experiment": "cifar11", "width": 0.25, "steps": 9},
            f"cifar11, units × 0.25: 9 steps{SHORTENED}",
        ),
        (
            {
                "experiment": "cifar11",
                "width": 0.25,
                "steps": 9,
                "dropout": 0.0,
                "schedule": "late",
            },
            "cifar11, units × 0.25, without dropout: 9 steps of early learning (the paper's are "
            "165,000), rate falls at 0.7 and 0.9 of them",
        ),
        (
            {"experiment": "cifar11", "width": [1.0, 0.5, 0.5], "batch_norm": True},
            "cifar11, units × 0.5 and 1, with batch norm",
        ),
        (
            {"experiment": "cifar11", "batch_norm": True, "steps": 9},
            f"cifar11, with batch norm: 9 steps{SHORTENED}",
        ),
        (
            {"experiment": "cifar11", "steps": 9, "test_images": 500},
            f"cifar11: 9 steps{SHORTENED}, 500 test images",
        ),
        (
            {"experiment": "cifar11", "steps": 165_000, "test_images": 10_000},
            "cifar11: 165,000 steps",
        ),
        (
            {"experiment": "imagenet", "steps": 9, "valid_images": 6},
            "imagenet: 9 steps, 6 validation images",
        ),
        (
            {"experiment": "mnist", "epochs": 1, "made": "smoke"},
            f"{SMOKE} mnist, synthetic data: 1 epoch",
        ),
        # The images of a smoke run on digits are real.
        ({"experiment": "digits", "epochs": 2, "made": "smoke"}, f"{SMOKE} digits: 2 epochs"),
        (
            {"experiment": "mnist", "batch_norm": [True, False, True], "update": "centered"},
            "mnist, centered update",
        ),
        (
            {"experiment": "sweep", "update": ["plain", "plain", "full"]},
            "sweep, MNIST at half resolution",
        ),
        (
            {"experiment": "mnist", "epochs": 2, "made": "quick"},
            "Quick version, which decides nothing. mnist: 2 epochs",
        ),
    ],
)
def test_described(columns, text):
    assert described(pd.DataFrame({"step": range(3), **columns})) == text


def test_described_of_categories_counts_what_is_there(runs):
    categorical = runs.astype({"experiment": "category", "run": "category"})
    assert described(categorical[categorical["seed"] == 1]) == "planted: 4 epochs, 1 seed"


def test_a_run_that_ended_early_is_not_called_whole(runs):
    shown = runs[(runs["run"] != "elu-0") | (runs["step"] < 100)]
    assert (
        described(condensed("2", shown)) == "planted: 2–4 of 4 epochs (some ended early), 3 seeds"
    )


def test_captions_name_the_runs_and_the_papers():
    words = caption("4", condensed("4", cifar()))
    assert (
        f"cifar11, cifar100: 120 steps{SHORTENED}, 2 seeds" in words
        and "Paper: CIFAR-100, 165,000 updates, 10 runs." in words
    )


@pytest.mark.parametrize("name", ["2", "3", "7"])
def test_where_the_paper_prints_no_number_that_is_said(name):
    settings = [{"activation": "elu", "seed": 0, "lr": 0.1}]
    errors = {"train_error": lambda step, s: 1.0, "test_error": lambda step, s: 1.0}
    planted = {
        "2": lambda: table([Planted("elu", 0)]),
        "3": lambda: scored("autoencoder", settings, errors),
    }
    small = condensed(name, planted.get(name, lambda: moving("elu", 0, 0.1))())
    assert {number.paper for number in numbers(name, small)} == {
        "prints none"
    } and "prints no numbers" in caption(name, small)


@pytest.mark.parametrize(
    ("seeds", "text"), [((0,), "One run each, no spread"), ((0, 1), "Mean ± SD over seeds")]
)
def test_a_spread_is_that_of_several_runs(seeds, text):
    runs = cifar(normed=(False, True))
    for name in ("4", "5"):
        assert drawn(name, runs[runs["seed"].isin(seeds)])[0].get_suptitle().startswith(f"{text}\n")
    means, losses = drawn("2", table(Planted("elu", seed) for seed in seeds))[0].axes
    assert text.lower() in means.get_title(loc="left").lower()
    assert ("SD" in losses.get_title(loc="left")) == (len(seeds) > 1)


# -- one setting -----------------------------------------------------------------------------------


def test_runs_of_two_settings_are_no_seeds(runs):
    other = runs.assign(seed=runs["seed"] + 3, run=runs["run"] + "-other")
    for option, value, values in (
        ("lr", 0.5, "0.1, 0.5"),
        ("batch_size", 256, "64, 256"),
        ("dataset", "b", "a, b"),
        ("update_every", 9, "5, 9"),
    ):
        mixed = pd.concat(
            [
                runs.assign(batch_size=64, dataset="a", update_every=5),
                other.assign(batch_size=64, dataset="a", update_every=5),
            ]
        )
        mixed.loc[mixed["run"].str.endswith("other"), option] = value
        for name in ("2", "theory1", "theory3"):
            with pytest.raises(
                ValueError,
                match=rf"^Figure {name} would take runs that differ in '{option}' \({values}\)"
                r".*one setting\.$",
            ):
                condensed(name, mixed)


def test_an_option_of_ones_own_is_an_option(folder):
    for seed, alpha in ((8, 1.0), (9, 2.5)):
        own = {
            "experiment": "planted",
            "activation": "elu",
            "seed": seed,
            "epochs": 4,
            "lr": 0.1,
            "alpha": alpha,
        }
        with Run.create(folder / f"own-{seed}", own) as run:
            run.append(
                pd.DataFrame(
                    {"step": [0], "layer": "", "unit": -1, "epoch": 0.0, "train_loss": 1.0}
                )
            )
    with pytest.raises(ValueError, match=r"differ in 'alpha' \(1, 2\.5\)"):
        figures.data("2", folder)


def test_what_may_differ_does(runs):
    mixed = runs.assign(
        device=runs["run"].map(lambda name: f"cpu {name}"),
        made="",
        examined=runs["seed"] > 0,
        damping=runs["seed"] / 9,
    )
    assert condensed("2", mixed)["run"].nunique() == 6
    with pytest.raises(ValueError, match="'damping'"):  # which is in every unit Fisher matrix
        condensed("theory1", mixed)


def test_one_seed_is_not_counted_twice(runs):
    again = runs[runs["run"] == "elu-0"].assign(run="elsewhere/elu-0")
    for name in ("2", "theory1", "theory3"):
        with pytest.raises(
            ValueError,
            match=rf"Figure {name} would take the runs elu-0, elsewhere/elu-0 of one seed for two"
            r"\. Give one",
        ):
            condensed(name, pd.concat([runs, again]))


def test_runs_that_are_left_out_are_named(runs):
    digits = runs.assign(experiment="digits", run=runs["run"] + "-digits")
    deep = runs[runs["seed"] == 0].assign(experiment="mnist", run=runs["run"] + "-deep", depth=5)
    words = caption(
        "2", condensed("2", pd.concat([runs.assign(experiment="mnist", depth=8), deep, digits]))
    )
    assert (
        "Left out: 6 runs of digits, 2 runs with another depth than 8." in words
        and "digits" not in words.replace("6 runs of digits", "")
    )
    assert "Left out" not in caption("2", condensed("2", runs))


def test_figure_1_and_options_are_refused_in_a_sentence(tmp_path):
    with pytest.raises(
        ValueError, match=r"Figure 1 shows functions, not runs\. Leave the folders out"
    ):
        figures.data("1", tmp_path)
    with pytest.raises(ValueError, match="'--quick' is not a folder of runs"):
        figures.data("6", "--quick")


@pytest.mark.parametrize("name", ["2", "theory1", "theory3", "4", "7"])
def test_names_with_dollars_are_no_formulas(name):
    odd = "a$b$ {x_"
    planted = {
        "4": lambda: cifar(names=("elu",), dataset="$c$").assign(activation=odd),
        "7": lambda: moving(odd, 0, 0.1),
    }
    runs = planted.get(name, lambda: table([Planted(odd, 0)]))()
    figure, small = drawn(name, runs.assign(device="$\\frac$ $"))
    figure.draw_without_rendering()
    shown = [
        text.replace(r"\$", "$")
        for ax in figure.axes
        for text in (*labels(ax), *(tick.get_text() for tick in ax.get_xticklabels()))
    ]
    assert any(
        odd in text for text in [*shown, *(text.replace(r"\$", "$") for text in below(figure))]
    )
    assert odd in numbers(name, small)[0].quantity


# -- files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["1", "2", "gap"])
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
        ("theory2", "inputs", "'k'"),
        ("theory3", "own", "'own'"),
        ("3", "train_loss", "'train_error'"),
        ("4", "train_loss", "'train_loss'"),
        ("6", "train_loss", "'train_loss'"),
        ("7", "mean", "'mean'"),
        ("theory4", "lr", "'update'"),
    ],
)
def test_runs_that_lack_what_a_figure_shows_are_refused_and_leave_no_folder(
    runs, tmp_path, name, column, says
):
    with pytest.raises(ValueError, match=says):
        draw(name, runs.drop(columns=column), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_unknown_figure_is_refused(runs, tmp_path):
    with pytest.raises(ValueError, match=r"Figure '8' does not exist\. Choose one of 1, 2, 3"):
        draw("8", runs, tmp_path / "out")


def test_what_is_no_figure_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="Figure '8' does not exist"):
        figures.write("8", figures.picture("1", None), tmp_path)
    with pytest.raises(ValueError, match=r"figures\.picture.* got str"):
        figures.write("1", "a picture", tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("blocked", ["figure_1.png", "figure_1.pdf"])
def test_both_files_are_written_or_none(tmp_path, blocked):
    (tmp_path / blocked / "file").mkdir(parents=True)
    with pytest.raises(OSError) as caught:
        figures.write("1", picture("1", None), tmp_path)
    assert {"another", "--out"} <= set(str(caught.value.strerror).split())
    assert str(tmp_path) in caught.value.filename
    assert [path.name for path in tmp_path.iterdir()] == [blocked]


def test_a_full_disk_leaves_the_pictures_of_before(tmp_path, monkeypatch):
    before = [
        path.read_bytes() for path in figures.write("1", picture("1", None), tmp_path, "before")
    ]

    def full(self, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    with pytest.raises(
        OSError,
        match=r"Figure 1 cannot be written .No space left on device.\. Make room there, or choose "
        r"another folder",
    ):
        figures.write("1", picture("1", None), tmp_path, "after")
    assert [path.read_bytes() for path in sorted(tmp_path.iterdir())[::-1]] == before


@pytest.mark.parametrize("name", [name for name in FIGURES if name != "1"])
def test_a_figure_of_no_runs_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match="shows a table of runs, got none"):
        draw(name, None, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# -- small tables ----------------------------------------------------------------------------------


@pytest.fixture
def folder(runs, tmp_path):
    """The planted runs as run folders."""
    for name, rows in runs.groupby("run"):
        firsts = rows[["experiment", "activation", "seed", "epochs", "lr"]].iloc[0]
        config = {
            key: value.item() if isinstance(value, np.generic) else value
            for key, value in firsts.items()
        }
        with Run.create(tmp_path / "runs" / str(name), config) as run:
            run.append(rows.drop(columns=["run", *config]))
    return tmp_path / "runs"


def test_a_small_table_comes_back_and_draws_the_same(folder, tmp_path):
    small = figures.data("2", folder)
    path = figures.save("2", small, [folder], tmp_path / "results")
    back = load(path)
    assert described(back) == described(small) and "cpu" in described(back)
    for ours, theirs in zip(picture("2", small).axes, picture("2", back).axes, strict=True):
        for a, b in zip(ours.lines, theirs.lines, strict=True):
            np.testing.assert_array_equal(a.get_data(), b.get_data())
            assert a.get_color() == b.get_color()
    assert not [path for path in path.parent.iterdir() if path.name.startswith(".")]


def test_a_small_table_says_where_it_comes_from(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["/somewhere/bin/biasshift", "figure", "2", str(folder)])
    path = figures.save("2", figures.data("2", folder), [folder], tmp_path)
    origin = load_origin(path)
    assert (origin["figure"], origin["seeds"], origin["runs"]) == ("2", [0, 1, 2], 6)
    assert origin["condensed_by"] == "biasshift figure 2 runs" and origin["devices"][0].startswith(
        "cpu"
    )
    assert len(origin["commits"]) == 1 and str(tmp_path) not in json.dumps(origin)


def test_a_table_that_is_too_large_is_refused_and_leaves_the_old_one(folder, tmp_path, monkeypatch):
    small = figures.data("2", folder)
    before = figures.save("2", small, [folder], tmp_path).read_bytes()
    monkeypatch.setattr("biasshift.figures.tables.MOST_BYTES", 100)
    with pytest.raises(ValueError, match="more than 100"):
        figures.save("2", small, [folder], tmp_path)
    assert [path.name for path in tmp_path.glob("*2.parquet*")] == ["2.parquet"] and (
        tmp_path / "2.parquet"
    ).read_bytes() == before


@pytest.mark.parametrize("content", [b"", b"PAR1 nothing", None])
def test_a_damaged_table_is_named(tmp_path, content):
    path = tmp_path / "2.parquet"
    path.write_bytes(content) if content is not None else pd.DataFrame({"step": [1]}).to_parquet(
        path
    )
    with pytest.raises(ValueError, match=r"2\.parquet' is not a table of a figure"):
        load(path)


def test_without_runs_the_committed_table_is_drawn(folder, tmp_path, monkeypatch):
    path = figures.save("2", figures.data("2", folder), [folder], tmp_path)
    monkeypatch.setattr(figures, "committed", lambda name: path if name == "2" else None)
    assert len(figures.data("2")) == len(figures.data("2", folder))
    with pytest.raises(
        ValueError,
        match=r"Figure 3 shows runs, and none come .*biasshift train autoencoder.*biasshift figure "
        r"3 FOLDER",
    ):
        figures.data("3")
    tables, reasons = figures.drawable([])
    assert set(tables) == {"1", "2"} and "theory4" in reasons


def test_all_figures_of_runs_and_why_not_the_others(folder):
    tables, reasons = figures.drawable([folder])
    assert set(tables) == {"1", "2", "theory1", "theory3"}
    assert set(tables) | set(reasons) == set(FIGURES)
    assert "'update'" in reasons["theory4"] and "benchmarks" in reasons["bench"]
    assert "3 measurements" in reasons["7"]


def test_quick_runs_are_called_so(runs, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["biasshift", "figure", "2", "--quick"])
    with Run.create(
        tmp_path / "elu-0", {"experiment": "mnist", "activation": "elu", "seed": 0, "epochs": 4}
    ) as run:
        rows = runs[runs["run"] == "elu-0"]
        run.append(rows.drop(columns=["run", "experiment", "activation", "seed", "epochs", "lr"]))
    assert (
        picture("2", figures.data("2", tmp_path))
        .get_suptitle()
        .startswith("Quick version, which decides nothing. mnist: 4 epochs, 1 seed, cpu")
    )


@pytest.mark.parametrize("name", [name for name, spec in FIGURES.items() if spec.quick])
def test_quick_commands_are_commands(name):
    from biasshift.cli.parser import parse

    for command in FIGURES[name].quick:
        assert parse([*command.split(), "--smoke", "--replace"]).smoke


@pytest.mark.parametrize("name", ["2", "gap", "theory4", "table1", "bench"])
def test_without_a_table_there_is_no_picture(name):
    for call in (condensed, picture):
        with pytest.raises(ValueError, match=f"Figure '{name}' shows a table of runs, got none"):
            call(name, None)


def test_a_table_that_is_none_of_runs_is_refused():
    with pytest.raises(ValueError, match="lacks the column 'step', needed for figure theory4"):
        condensed("theory4", pd.DataFrame({"run": ["a"], "experiment": ["own"]}))
