"""The scripts below paper_figs: short, and with the same pictures as the command."""

import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.ticker import FixedFormatter
from planted import Planted, table
from test_figures import cifar, moving, scored, swept

from biasshift import figures
from biasshift.runs.writer import Run

FOLDER = Path(__file__).parent.parent / "paper_figs"
SCRIPTS = {path.stem: path for path in sorted(FOLDER.glob("*.py"))}
NAMES = {script: script.removeprefix("fig") for script in SCRIPTS}
CONFIG = (
    "experiment",
    "dataset",
    "activation",
    "seed",
    "epochs",
    "steps",
    "lr",
    "batch_norm",
    "update",
    "constant",
    "width",
)
SEEDS = [{"activation": name, "seed": seed} for name in ("elu", "relu") for seed in (0, 1)]
RATES = [{**setting, "lr": lr} for setting in SEEDS for lr in (0.1, 0.01)]


def digits() -> pd.DataFrame:
    planted = table(
        Planted(name, seed, along=lambda step, layer: {})
        for name in ("elu", "relu")
        for seed in (0, 1)
    )
    return planted.assign(k=np.where(planted["coupling"].notna(), 0.5, np.nan))


def falling(step, setting):
    return 0.9 - step / 200 - setting["seed"] / 100


RUNS = {
    "1": None,
    "2": digits,
    "3": lambda: scored("autoencoder", RATES, dict.fromkeys(("train_error", "test_error"), falling)),
    "4": cifar,
    "5": lambda: cifar(normed=(False, True)),
    "6": lambda: scored("imagenet", SEEDS, dict.fromkeys(("train_loss", "valid_error5", "valid_error"), falling), steps=100),
    "7": lambda: pd.concat([moving(name, seed, 0.1) for name in ("elu", "relu") for seed in (0, 1)]),
    "table1": lambda: scored("cifar18", [{**s, "dataset": "cifar10"} for s in SEEDS], dict.fromkeys(("train_loss", "test_error"), falling)),
    "theory1": digits,
    "theory2": digits,
    "theory3": digits,
    "theory4": swept,
    "bench": None,
}  # fmt: skip


LONG = {  # of the paper's length, with its numbers as marks
    "4": lambda: cifar((0, 50_000, 120_000, 165_000)),
    "6": lambda: scored(
        "imagenet", SEEDS, dict.fromkeys(("train_loss", "valid_error5", "valid_error"), lambda step, s: 0.9 - step / 1e6 - s["seed"] / 100),
        (0, 100_000, 250_000), dataset="imagenet (1000 classes)", steps=250_000,
    ),
}  # fmt: skip


def write_runs(runs: pd.DataFrame, folder: Path) -> None:
    for name, rows in runs.groupby("run"):
        firsts = rows[[key for key in CONFIG if key in rows]].iloc[0]
        config = {
            key: value.item() if isinstance(value, np.generic) else value
            for key, value in firsts.items()
        }
        with Run.create(folder / str(name), config) as run:
            run.append(rows.drop(columns=["run", *config]))


def lines(figure) -> list[np.ndarray]:
    """What every line and cloud of dots shows."""
    found = [np.asarray(line.get_xydata(), float) for ax in figure.axes for line in ax.lines]
    found += [
        np.asarray(dots.get_offsets(), float) for ax in figure.axes for dots in ax.collections
    ]
    return [line for line in found if len(line)]


def words(figure) -> list[str]:
    """All that stands on a figure's face, with the marks of what the legends name."""
    found = [
        figure.get_suptitle(),
        *(text.get_text() for legend in figure.legends for text in legend.get_texts()),
    ]
    for ax in figure.axes:
        found += [
            ax.get_title(),
            ax.get_title(loc="left"),
            ax.get_xlabel(),
            ax.get_ylabel(),
            ax.get_xscale(),
            ax.get_yscale(),
        ]
        found += [
            text.get_text() for text in (ax.get_legend().get_texts() if ax.get_legend() else ())
        ]
        found += [
            f"{line.get_label()} {line.get_color()} {line.get_marker()} {line.get_linestyle()}"
            for line in ax.lines
        ]
        found += [
            f"{bars.get_label()} {[bar.get_height() for bar in bars]}"
            for bars in ax.containers
            if hasattr(bars, "patches")
        ]
        formatters = (axis.get_major_formatter() for axis in (ax.xaxis, ax.yaxis))
        found += [
            name
            for formatter in formatters
            if isinstance(formatter, FixedFormatter)
            for name in formatter.seq
        ]  # no numbers
    return found


def test_there_is_a_script_for_every_figure():
    assert set(NAMES.values()) == set(figures.FIGURES) == set(RUNS)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_is_short(script):
    assert len(SCRIPTS[script].read_text(encoding="utf-8").splitlines()) <= 40


@pytest.mark.parametrize(
    ("script", "length"),
    [*((script, "short") for script in SCRIPTS), *((f"fig{name}", "full") for name in LONG)],
)
def test_a_script_draws_what_the_command_draws(script, length, tmp_path, monkeypatch, capsys):
    name = NAMES[script]
    paths = []
    if (runs := (LONG if length == "full" else RUNS)[name]) is not None:
        write_runs(runs(), tmp_path / "runs")
        paths = [str(tmp_path / "runs")]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(SCRIPTS[script]), *paths])
    drawn = runpy.run_path(str(SCRIPTS[script]))
    shown = capsys.readouterr().out
    for kind in ("png", "pdf"):
        assert (
            tmp_path / "figures" / f"figure_{name}.{kind}"
        ).stat().st_size > 1000 and f"figure_{name}.{kind}" in shown
    small = figures.data(name, *paths)
    picture = figures.picture(name, small)
    expected = lines(picture)
    assert words(drawn["figure"]) == words(picture)
    assert length == "short" or any("paper" in text.split() for text in words(picture))
    assert expected and len(lines(drawn["figure"])) == len(expected)
    for one, other in zip(lines(drawn["figure"]), expected, strict=True):
        np.testing.assert_array_equal(one, other)
    assert small is None or figures.said(name, small) in shown
    assert (
        small is None
        or name == "bench"
        or figures.described(small) in drawn["figure"].get_suptitle()
    )


@pytest.mark.parametrize(
    ("script", "arguments", "says"),
    [
        (
            "fig6",
            [],
            r"Figure 6 shows runs, and none come with this version\. Make them with `biasshift "
            r"train imagenet`",
        ),
        ("fig6", ["--quick"], r"'--quick' is not a folder of runs"),
        ("fig2", ["nowhere"], r"'nowhere' is not a directory"),
        ("fig3", ["."], r"no runs in \."),
        ("theory1", ["nowhere"], r"'nowhere' is not a directory"),
        ("bench", ["nowhere"], r"'nowhere': No such file"),
        ("fig1", ["nowhere"], r"Figure 1 shows functions, not runs"),
    ],
)
def test_what_cannot_be_drawn_is_one_sentence(
    script, arguments, says, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(SCRIPTS[script]), *arguments])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(SCRIPTS[script]))
    errors = capsys.readouterr().err
    assert (
        caught.value.code == 2
        and errors.count("\n") == 1
        and errors.endswith(".\n")
        and errors.startswith(f"{script}.py: ")
    )
    assert re.search(says, errors) and not list(tmp_path.iterdir())


def test_a_figure_without_runs_has_a_caption(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(SCRIPTS["fig1"])])
    runpy.run_path(str(SCRIPTS["fig1"]))
    assert b"The activation functions." in (tmp_path / "figures" / "figure_1.png").read_bytes()


@pytest.mark.parametrize(
    "path", sorted((FOLDER / "results").glob("*.parquet")), ids=lambda path: path.stem
)
def test_a_committed_table_is_small_and_can_be_drawn(path):
    assert path.stem in figures.FIGURES and path.stat().st_size < 2_000_000
    small = figures.data(path.stem)
    assert lines(figures.picture(path.stem, small))
