"""The numbers of the artists, against numbers put into the table by hand; no image comparison."""

import itertools

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from biasshift import plots
from biasshift.activations import ACTIVATIONS
from biasshift.plots.theme import ON_DARK

SEEDS = (0, 1, 2)
EPOCHS = (0, 1, 2)
LEVEL = {"elu": 0.1, "relu": 0.5}


def planted(activations=("elu", "relu"), seeds=SEEDS) -> pd.DataFrame:
    """In every epoch of 10 steps: three units around level + seed/100, two layers, one loss.

    Steps 5 lie between epochs.
    """
    rows = []
    for name, seed in itertools.product(activations, seeds):
        run = {"activation": name, "seed": seed, "run": f"{name}-{seed}"}
        level = LEVEL.get(name, 0.3) + seed / 100
        for epoch in EPOCHS:
            at = {"step": 10 * epoch, **run}
            rows.append(
                {
                    **at,
                    "layer": "",
                    "unit": -1,
                    "epoch": epoch,
                    "train_loss": 2 - level - epoch / 2,
                    "valid_loss": 3 - level,
                }
            )
            rows += [
                {**at, "layer": "1", "unit": unit, "mean": level * (1 + unit) + epoch}
                for unit in range(3)
            ]
            rows += [
                {**at, "layer": "2", "unit": unit, "coupling": 1 - 10.0 ** -(unit + epoch + seed)}
                for unit in range(3)
            ]
            rows.append({**at, "layer": "0", "unit": -1, "mean_in_abs": 9.0, "cos_gradient": 0.1})
            rows.append(
                {
                    **at,
                    "layer": "2",
                    "unit": -1,
                    "mean_in_abs": level,
                    "cos_gradient": np.cos(np.radians(100 * level)),
                }
            )
        rows.append({**run, "step": 5, "layer": "1", "unit": 0, "mean": level})
    return pd.DataFrame(rows)


@pytest.fixture
def ax():
    return Figure().subplots()


def line(ax, label):
    (match,) = [line for line in ax.lines if str(line.get_label()).startswith(label)]
    return match


def ribbon(collection) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper edge of a ribbon without gaps."""
    corners = collection.get_paths()[0].vertices
    x = np.unique(corners[:, 0])
    return tuple(
        np.array([edge(corners[corners[:, 0] == at, 1]) for at in x]) for edge in (np.min, np.max)
    )


# -- colors ----------------------------------------------------------------------------------------


def lightness(color: str) -> float:
    """CIE L*, 0 to 100: what is left of a color in grey print."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(color)]
    luminance = float(np.dot([0.2126, 0.7152, 0.0722], linear))
    return 116 * luminance ** (1 / 3) - 16 if luminance > 0.008856 else 903.3 * luminance


PAPER = ("elu", "relu", "lrelu", "srelu")


def lab_of(color: str) -> np.ndarray:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(color)]
    xyz = np.array(
        [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    ) @ np.array(linear)
    f = xyz / np.array([0.9505, 1, 1.089])
    f = np.where(f > 0.008856, np.cbrt(f), 7.787 * f + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def test_the_colors_of_the_paper_s_four_are_told_apart_in_grey_print():
    grey = sorted([*(lightness(plots.LOOKS[name].color) for name in PAPER), lightness("white")])
    assert min(np.diff(grey)) > 15


def test_every_activation_has_its_own_look_and_display_name():
    assert plots.LOOKS.keys() == ACTIVATIONS.keys()
    labels, colors, markers, _ = zip(*plots.LOOKS.values(), strict=True)
    assert all(len(set(looks)) == len(ACTIVATIONS) for looks in (labels, colors, markers))
    for looks in zip(*(plots.LOOKS[name] for name in PAPER), strict=True):
        assert len(set(looks)) == 4
    assert [plots.LOOKS[name].label for name in PAPER] == ["ELU", "ReLU", "LReLU", "SReLU"]


def test_all_colors_differ_from_each_other_and_from_white():
    """By Lab distance, which is about 2.3 where one can just see a difference."""
    others = [color for color, _, _ in plots.OTHER_LOOKS]
    colors = [*(look.color for look in plots.LOOKS.values()), *others, "#FFFFFF"]
    lab = np.array([lab_of(color) for color in colors])
    distances = np.linalg.norm(lab[:, None] - lab[None], axis=-1)
    assert distances[~np.eye(len(colors), dtype=bool)].min() > 25
    assert {look.color for look in plots.LOOKS.values()} | {*others} <= ON_DARK.keys()
    assert len(set(ON_DARK.values())) == len(ON_DARK)


def test_other_activations_look_the_same_in_every_figure():
    names = ["mine:Own", "torch.nn:Hardswish", "elu:0.5", "lrelu:0.01", "a:A", "b:B", "c:C", "d:D"]
    for name in names:
        assert plots.looks([name])[name] == plots.looks([name, "gelu", "elu"])[name]
    together = plots.looks(names)
    assert together == {name: plots.looks(names[::-1])[name] for name in together}
    assert len({(look.color, look.line) for look in together.values()}) == len(names)
    hostile = ["elu", "ELU", "x" * 10_000, "y\n" * 50, "$x$", "\x1b[31m"]
    labels = [look.label for look in plots.looks(hostile).values()]
    assert len(set(labels)) == len(hostile) and all(len(label) <= 42 for label in labels)


def test_the_same_color_in_every_figure():
    table = planted()
    for draw in (plots.unit_means, plots.learning_curves, plots.coupling):
        ax = draw(Figure().subplots(), table)
        assert line(ax, "ELU (").get_color() == plots.LOOKS["elu"].color
        assert line(ax, "ReLU (").get_color() == plots.LOOKS["relu"].color
    assert (
        line(plots.activation_functions(Figure().subplots()), "ELU").get_color()
        == plots.LOOKS["elu"].color
    )


def test_the_style_ends_with_its_block():
    before = dict(matplotlib.rcParams)
    with plots.style():
        assert matplotlib.rcParams["axes.spines.top"] is False
    assert dict(matplotlib.rcParams) == before


# -- reductions ------------------------------------------------------------------------------------


def test_epochs_are_interpolated_within_each_run_and_go_on_at_its_pace():
    table = pd.DataFrame(
        {
            "run": ["a"] * 5 + ["b"] * 3,
            "step": [0, 5, 10, 20, 30, 0, 50, 100],
            "epoch": [np.nan, np.nan, 1.0, 2.0, np.nan, np.nan, np.nan, 1.0],
        }
    )
    assert plots.with_epochs(table)["epoch"].tolist() == [0, 0.5, 1, 2, 3, 0, 0.5, 1]
    assert plots.with_epochs(table.drop(columns="run").iloc[:5])["epoch"].tolist() == [
        0,
        0.5,
        1,
        2,
        3,
    ]


def test_a_run_without_epochs_is_refused():
    table = pd.DataFrame({"run": ["a", "b"], "step": [10, 10], "epoch": [1.0, np.nan]})
    with pytest.raises(ValueError, match="step"):
        plots.with_epochs(table)


def test_the_median_is_over_all_units_of_all_layers_of_one_run():
    table = pd.DataFrame(
        {
            "run": ["a"] * 5 + ["b"],
            "layer": list("112211"),
            "unit": [0, 1, 0, 1, -1, 0],
            "mean": [1.0, 2, 3, np.nan, 99, 7],
            "step": 0,
        }
    )
    medians = plots.median_over_units(table, "mean", ["step"])
    assert medians.set_index("run")["mean"].to_dict() == {"a": 2, "b": 7}


def test_mean_sd_and_n_over_seeds():
    table = pd.DataFrame({"step": [0, 0, 0, 1], "seed": [0, 1, 2, 0], "value": [1.0, 2, 6, 5]})
    means = plots.mean_and_sd_over_seeds(table, "value", ["step"])
    assert means["mean"].tolist() == [3, 5] and means["n"].tolist() == [3, 1]
    assert means["sd"][0] == pytest.approx(np.std([1, 2, 6], ddof=1)) and np.isnan(means["sd"][1])


def test_runs_of_two_settings_are_not_averaged():
    table = pd.concat(
        [planted().assign(lr=0.1), planted().assign(lr=0.01, run=lambda t: t["run"] + "-slow")]
    )
    with pytest.raises(ValueError, match=r"activation = elu, epoch = 0.*one setting"):
        plots.learning_curves(Figure().subplots(), table)


# -- figures ---------------------------------------------------------------------------------------


def test_activation_functions(ax):
    plots.activation_functions(ax)
    # In the order of the paper.
    assert [str(line.get_label()) for line in ax.lines] == ["ELU", "SReLU", "LReLU", "ReLU"]
    expected = {
        "ELU": lambda x: np.where(x > 0, x, np.expm1(x)),
        "LReLU": lambda x: np.where(x > 0, x, x / 10),
        "ReLU": lambda x: np.maximum(x, 0),
        "SReLU": lambda x: np.maximum(x, -1),
    }
    for drawn in ax.lines:
        x, y = drawn.get_data()
        assert (x[0], x[-1]) == (-10, 2)
        np.testing.assert_allclose(y, expected[str(drawn.get_label())](x), atol=1e-12)


def test_other_functions_get_other_looks(ax):
    plots.activation_functions(ax, {"cosine": lambda x: x.cos(), "elu": ACTIVATIONS["elu"]()})
    assert [str(line.get_label()) for line in ax.lines] == ["ELU", "cosine"]
    assert ax.lines[1].get_color() not in {look.color for look in plots.LOOKS.values()}


def test_unit_means(ax):
    assert plots.unit_means(ax, planted()) is ax
    x, y = line(ax, "ReLU (n = 3)").get_data()
    # The middle of three units is twice the level; the mean of the seeds is seed 1. At step 5 only
    # one unit was measured.
    np.testing.assert_allclose(x, [0, 0.5, 1, 2])
    np.testing.assert_allclose(y, [1.02, 0.51, 2.02, 3.02])
    low, high = ribbon(ax.collections[1])
    sd = np.array([0.02, 0.01, 0.02, 0.02])
    np.testing.assert_allclose([low, high], [y - sd, y + sd])
    assert ax.get_xlabel() == "epoch" and "mean activation" in ax.get_ylabel()
    assert [text.get_text() for text in ax.get_legend().get_texts()] == [
        "ELU (n = 3)",
        "ReLU (n = 3)",
    ]


def test_unit_means_against_steps_of_some_layers_and_groups(ax):
    table = planted(["elu"]).assign(momentum=0.9)
    more = table[table["layer"] == "1"].assign(layer="3", mean=50.0)
    plots.unit_means(ax, pd.concat([table, more]), group="momentum", against="step", layers=["1"])
    x, y = line(ax, "momentum = 0.9 (n = 3)").get_data()
    np.testing.assert_allclose(x, [0, 5, 10, 20])
    np.testing.assert_allclose(y, [0.22, 0.11, 1.22, 2.22])
    assert ax.get_xlabel() == "optimizer steps"


def test_one_seed_draws_no_ribbon_and_says_so(ax):
    plots.unit_means(ax, planted(seeds=[0]))
    assert not ax.collections and line(ax, "ELU").get_label() == "ELU (n = 1)"


def test_seeds_that_stopped_early_are_counted(ax):
    table = planted()
    plots.unit_means(ax, table[(table["run"] != "elu-2") | (table["step"] < 15)])
    assert line(ax, "ELU").get_label() == "ELU (n = 2–3)"


def test_a_table_without_runs_is_one_run(ax):
    table = planted(["elu"], seeds=[0]).drop(columns=["run", "seed"])
    plots.unit_means(ax, table)
    np.testing.assert_allclose(line(ax, "ELU (n = 1)").get_ydata(), [0.2, 0.1, 1.2, 2.2])


def test_categorical_columns_draw_the_same(ax):
    table = planted().astype({"activation": "category", "run": "category", "layer": "category"})
    plots.unit_means(ax, table[table["activation"] == "relu"])  # a category without rows is no line
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["ReLU (n = 3)"]


def test_learning_curves(ax):
    plots.learning_curves(ax, planted())
    train, valid, *_ = [line for line in ax.lines if line.get_color() == plots.LOOKS["elu"].color]
    assert (train.get_linestyle(), valid.get_linestyle()) == ("-", ":")
    np.testing.assert_allclose(train.get_data(), [[0, 1, 2], [1.89, 1.39, 0.89]])
    np.testing.assert_allclose(valid.get_data(), [[0, 1, 2], [2.89] * 3])
    low, high = ribbon(ax.collections[0])
    np.testing.assert_allclose([low, high], [train.get_ydata() - 0.01, train.get_ydata() + 0.01])
    texts = [text.get_text() for text in ax.get_legend().get_texts()]
    assert texts == ["ELU (n = 3)", "ReLU (n = 3)", "training", "validation"]
    assert (ax.get_ylabel(), ax.get_yscale()) == ("cross-entropy (nats)", "linear")


def test_on_a_log_scale_mean_and_sd_are_those_of_the_logarithm(ax):
    plots.learning_curves(ax, planted(), log=True)
    losses = np.array(
        [[2 - LEVEL["elu"] - seed / 100 - epoch / 2 for epoch in EPOCHS] for seed in SEEDS]
    )
    mean, sd = np.log(losses).mean(0), np.log(losses).std(0, ddof=1)
    np.testing.assert_allclose(line(ax, "ELU (").get_ydata(), np.exp(mean))
    np.testing.assert_allclose(ribbon(ax.collections[0]), np.exp([mean - sd, mean + sd]))
    assert ax.get_yscale() == "log"


def test_one_line_style_for_all_means_markers(ax):
    plots.unit_means(ax, planted(), line="-")
    drawn = [line(ax, name) for name in ("ELU", "ReLU")]
    assert {line.get_linestyle() for line in drawn} == {"-"}
    assert [line.get_marker() for line in drawn] == [
        plots.LOOKS[name].marker for name in ("elu", "relu")
    ]


def test_learning_curves_of_one_column(ax):
    table = planted().rename(columns={"valid_loss": "valid_error"})
    plots.learning_curves(
        ax, table, column_train=None, column_valid="valid_error", label="error (fraction)"
    )
    np.testing.assert_allclose(line(ax, "ELU (n = 3)").get_ydata(), [2.89] * 3)
    assert ax.get_ylabel() == "error (fraction)"


def test_gap_against_mean(ax):
    plots.gap_against_mean(ax, planted(), skip_input=True)
    elu_dots, elu_median, relu_dots, relu_median = [
        dots for cloud in ax.collections if len(dots := cloud.get_offsets())
    ]
    assert len(elu_dots) == len(relu_dots) == 9  # 3 runs, 1 layer, 3 steps
    np.testing.assert_allclose(elu_dots[:, 1], 100 * elu_dots[:, 0])
    np.testing.assert_allclose([elu_median[0], relu_median[0]], [[0.11, 11], [0.51, 51]])
    assert ax.collections[1].get_sizes()[0] > ax.collections[0].get_sizes()[0]
    assert ax.collections[0].get_alpha() < 1
    assert "degrees" in ax.get_ylabel() and "angle" in ax.get_ylabel()


def test_dots_of_few_samples_are_hollow_and_not_counted(ax):
    table = planted().assign(enough=lambda rows: (rows["step"] == 0) * 0.7)
    plots.gap_against_mean(ax, table.loc[table["activation"] == "elu"], skip_input=True)
    sure, unsure, median = [dots for dots in ax.collections if len(dots.get_offsets())]
    assert unsure.get_alpha() > sure.get_alpha()  # thin lines, to be seen at all
    # Of 3 runs and 3 steps, those of the first step are sure.
    assert len(sure.get_offsets()) == 3 and len(unsure.get_offsets()) == 6
    assert not len(unsure.get_facecolors()) and len(sure.get_facecolors())
    np.testing.assert_allclose(
        median.get_offsets(), np.median(np.asarray(sure.get_offsets()), axis=0)[None]
    )


def test_medians_at_one_place_are_both_seen(ax):
    plots.gap_against_mean(
        ax,
        pd.concat([planted(["relu"]), planted(["relu"]).assign(activation="lrelu")]),
        skip_input=True,
    )
    lrelu, relu = [cloud for cloud in ax.collections if len(cloud.get_offsets()) == 1]
    np.testing.assert_array_equal(lrelu.get_offsets(), relu.get_offsets())
    # The first one drawn is the larger one.
    assert lrelu.get_sizes()[0] > 3 * relu.get_sizes()[0]
    assert lrelu.get_zorder() == relu.get_zorder()


def test_gap_of_chosen_layers():
    table = planted()
    assert set(plots.gap_points(table)["layer"]) == {"0", "2"}
    assert set(plots.gap_points(table, layers=["2"])["layer"]) == {"2"}
    assert set(plots.gap_points(table, skip_input=True)["layer"]) == {"2"}
    np.testing.assert_allclose(
        plots.gap_points(table, layers=["0"])["degrees"], np.degrees(np.arccos(0.1))
    )


def test_a_cosine_rounded_past_one_is_an_angle_of_zero():
    table = pd.DataFrame(
        {
            "step": [0],
            "layer": ["0"],
            "unit": [-1],
            "mean_in_abs": [0.1],
            "cos_gradient": [1 + 1e-7],
        }
    )
    assert plots.gap_points(table)["degrees"].tolist() == [0]


def test_coupling(ax):
    plots.coupling(ax, planted())
    # The middle unit's 1/(1 − h) is 10^(1 + epoch + seed); mean and SD are those of the exponent.
    drawn = line(ax, "ELU (n = 3)")
    np.testing.assert_allclose(drawn.get_data(), [[0, 1, 2], [1e2, 1e3, 1e4]])
    low, high = ribbon(ax.collections[0])
    np.testing.assert_allclose([low, high], [[1e1, 1e2, 1e3], [1e3, 1e4, 1e5]])
    assert ax.get_yscale() == "log" and "1-h" in ax.get_ylabel()


def test_a_coupling_of_one_draws_without_a_warning(ax):
    table = planted()
    plots.coupling(ax, table.assign(coupling=table["coupling"].mask(table["coupling"] > 0.9, 1.0)))
    ax.figure.canvas.draw()


def test_curves_are_of_the_whole_network_and_medians_have_no_ribbon(ax):
    plots.curves(ax, planted(), "train_loss", middle="median")
    np.testing.assert_allclose(
        line(ax, "ELU (n = 3)").get_data(), [[0, 10, 20], [1.89, 1.39, 0.89]]
    )
    assert not ax.collections
    plots.curves(ax, planted(seeds=[0, 1, 5]), "train_loss")
    # The mean, which seed 5 pulls.
    np.testing.assert_allclose(ax.lines[2].get_ydata(), [1.88, 1.38, 0.88])


def test_medians_over_runs_count_them():
    table = pd.DataFrame({"step": [0, 0, 0, 1], "seed": [0, 1, 2, 0], "value": [1.0, 2, 6, 5]})
    medians = plots.median_over_runs(table, "value", ["step"])
    assert medians["mean"].tolist() == [2, 5] and medians["n"].tolist() == [3, 1]
    assert medians["sd"].isna().all()


def test_a_single_point_is_seen(ax):
    table = planted()
    plots.curves(ax, table[table["step"] == 10], "train_loss")
    assert line(ax, "ELU").get_marker() == plots.LOOKS["elu"].marker


def test_lines_by_layer(ax):
    table = pd.DataFrame(
        {
            "number": [1, 2] * 2,
            "activation": "elu",
            "seed": [0, 0, 1, 1],
            "variance": [1.0, 0.1, 100.0, 0.1],
        }
    )
    plots.layer_lines(ax, table, "variance", log=True)
    np.testing.assert_allclose(line(ax, "ELU (n = 2)").get_data(), [[1, 2], [10, 0.1]])
    assert ax.get_yscale() == "log"


def test_spans_stand_side_by_side(ax):
    rows = {
        "at": ["a", "a", "b"],
        "activation": ["elu", "relu", "elu"],
        "mean": [1.0, 2, 3],
        "low": [0.5, 1, 3],
        "high": [4.0, 2, 3],
        "n": [3, 4, 5],
    }
    plots.spans(ax, pd.DataFrame(rows), "at")
    elu, relu = ax.containers
    assert (elu.get_label(), relu.get_label()) == ("ELU (n = 3–5)", "ReLU (n = 4)")
    np.testing.assert_allclose(elu[0].get_xydata(), [[-0.15, 1], [0.85, 3]])
    np.testing.assert_allclose(relu[0].get_xydata(), [[0.15, 2]])
    bar = elu[2][0].get_segments()[0]
    np.testing.assert_allclose(bar[:, 1], [0.5, 4])
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["a", "b"]


def test_published_numbers_are_hollow_and_say_so(ax):
    plots.published(ax, [(1.0, 2.0, "relu")])
    mark, legend = ax.lines
    assert mark.get_markerfacecolor() == "white"
    assert mark.get_markeredgecolor() == plots.LOOKS["relu"].color
    assert (list(mark.get_xdata()), list(mark.get_ydata())) == ([1], [2])
    assert legend.get_label() == "paper"


def test_shares_add_up(ax):
    table = pd.DataFrame({"activation": ["relu", "elu"], "own": [0.2, 0.3], "rest": [0.8, 0.7]})
    plots.stacked(ax, table, {"own": "own weights", "rest": "inherited"})
    own, rest = ax.containers
    assert [bar.get_height() for bar in own] == [0.3, 0.2]
    assert [bar.get_y() for bar in rest] == [0.3, 0.2]
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["ELU", "ReLU"]


@pytest.mark.parametrize(
    ("share", "note"), [(0.2, ""), (0.004, " (< 1 %)"), (0.0004, " (< 0.1 %)"), (0.0, "")]
)
def test_a_share_that_nobody_sees_is_in_the_legend(ax, share, note):
    table = pd.DataFrame(
        {"activation": ["relu", "elu"], "own": [1 - share, 1.0], "rest": [share, 0.0]}
    )
    plots.stacked(ax, table, {"own": "own weights", "rest": "second order"})
    assert ax.containers[1].get_label() == f"second order{note}"


def test_rows_of_a_ranking_may_have_looks_of_their_own(ax):
    plots.ranking(ax, {"a": 1.0, "$b$ $": 2.0}, {"c": 3.0}, {"$b$ $": plots.LOOKS["relu"]})
    paper, alike, own = ax.lines
    points = [list(dots.get_xydata()[0]) for dots in (paper, alike, own)]
    assert points == [[3, 3], [1, 2], [2, 1]]
    assert (own.get_marker(), own.get_color()) == ("s", plots.LOOKS["relu"].color)
    assert paper.get_markerfacecolor() == "white"
    ax.figure.draw_without_rendering()


def test_a_line_style_for_each_group(ax):
    plots.curves(ax, planted(), "train_loss", line={"relu": "--"})
    assert [line(ax, name).get_linestyle() for name in ("ELU", "ReLU")] == ["-", "--"]
    assert [line(ax, name).get_marker() for name in ("ELU", "ReLU")] == ["o", "s"]


def test_activations_come_first_in_a_legend_in_the_order_of_the_paper():
    figure, (left, right) = plots.panels(2)
    left.plot([], [], label="other")
    plots.curves(left, planted(["relu"]), "train_loss")
    plots.curves(right, planted(["lrelu", "srelu", "elu"]), "train_loss")
    plots.one_legend(figure, [left, right])
    shown = [text.get_text().partition(" (")[0] for text in figure.legends[0].get_texts()]
    assert shown == ["ELU", "SReLU", "LReLU", "ReLU", "other"]


def test_one_legend_joins_the_counts_of_all_panels():
    figure, (left, right) = plots.panels(2)
    plots.curves(left, planted(), "train_loss")
    plots.learning_curves(right, planted(["elu"], seeds=[0]))
    plots.one_legend(figure, [left, right])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "ELU (n = 1–3)",
        "ReLU (n = 3)",
        "training",
        "validation",
    ]
    assert left.get_legend() is None and right.get_legend() is None


@pytest.mark.parametrize(
    ("last", "label", "tick"), [(150_000, "thousand updates", "100"), (1000, "updates", None)]
)
def test_steps_are_counted_in_thousands_if_there_are_many(ax, last, label, tick):
    ax.plot([0, last], [0, 1])
    plots.in_thousands(ax)
    assert ax.get_xlabel() == label
    assert tick is None or ax.xaxis.get_major_formatter()(100_000) == tick


def test_log_scales_have_plain_numbers(ax):
    ax.plot([0.1, 8], [1, 1])
    ax.set_xscale("log")
    plots.on_log_scale(ax.xaxis)
    assert {0.1, 0.2, 0.5, 1, 2, 5} <= set(np.round(ax.get_xticks(), 6))
    assert ax.xaxis.get_major_formatter()(0.2) == "0.2"


# -- tables that cannot be drawn -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("draw", "column"),
    [
        (plots.unit_means, "mean"),
        (plots.unit_means, "epoch"),
        (plots.unit_means, "activation"),
        (plots.learning_curves, "valid_loss"),
        (plots.learning_curves, "activation"),
        (plots.gap_against_mean, "mean_in_abs"),
        (plots.gap_against_mean, "activation"),
        (plots.coupling, "coupling"),
    ],
)
def test_a_missing_column_is_named(ax, draw, column):
    with pytest.raises(ValueError, match=f"'{column}'"):
        draw(ax, planted().drop(columns=column))


@pytest.mark.parametrize(
    "draw", [plots.unit_means, plots.learning_curves, plots.gap_against_mean, plots.coupling]
)
def test_an_empty_table_is_refused(ax, draw):
    with pytest.raises(ValueError, match="no rows"):
        draw(ax, planted().iloc[:0])


def test_a_table_without_units_is_refused(ax):
    table = planted()
    with pytest.raises(ValueError, match="over units"):
        plots.unit_means(ax, table[table["unit"] == -1])


def test_a_title_is_no_wider_than_the_figure():
    with plots.style():
        figure, _ = plots.panels(1)
        plots.headed(
            figure,
            "Squared error per pixel, of networks with eight hidden layers, medians over "
            "runs\nmnist: 2 epochs",
        )
        figure.draw_without_rendering()
    title = figure._suptitle
    assert title is not None and title.get_text().count("\n") == 2
    assert title.get_text().endswith("\nmnist: 2 epochs")
    assert title.get_window_extent().width <= figure.bbox.width


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_legend_is_no_wider_than_the_figure(count):
    with plots.style():
        figure, axes = plots.panels(count)
        for number in range(6):
            axes[0].plot([0, 1], [0, number], label=f"a network of kind {number}")
        plots.one_legend(figure, axes)
        figure.draw_without_rendering()
    (legend,) = figure.legends
    assert legend.get_window_extent().width <= figure.bbox.width and len(legend.get_texts()) == 6
