"""The scripts below paper_figs: short, and with the same pictures as the command."""

import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.ticker import FixedFormatter
from planted import Planted, cifar, moving, scored, swept, table

from biasshift import figures
from biasshift.runs.writer import Run

FOLDER = Path(__file__).parent.parent / "paper_figs"
SCRIPTS = {path.stem: path for path in sorted(FOLDER.glob("*.py"))}
NAMES = {script: script.removeprefix("fig") for script in SCRIPTS}
CONFIG = ["experiment", "dataset", "activation", "seed", "epochs", "steps", "lr"]
CONFIG += ["batch_norm", "update", "constant", "width"]
SEEDS = [{"activation": name, "seed": seed} for name in ("elu", "relu") for seed in (0, 1)]
RATES = [{**setting, "lr": lr} for setting in SEEDS for lr in (0.1, 0.01)]


def digits() -> pd.DataFrame:
    planted = table(Planted(**setting, along=lambda step, layer: {}) for setting in SEEDS)
    return planted.assign(k=np.where(planted["coupling"].notna(), 0.5, np.nan))


def falling(*columns, steps=200):
    """Scores that fall from 0.9 by 1 in so many steps, and are lower for the second seed."""
    return dict.fromkeys(columns, lambda step, s: 0.9 - step / steps - s["seed"] / 100)


def autoencoders() -> pd.DataFrame:
    return scored("autoencoder", RATES, falling("train_error", "test_error"))


def imagenet() -> pd.DataFrame:
    scores = falling("train_loss", "valid_error5", "valid_error")
    return scored("imagenet", SEEDS, scores, steps=100)


def cifar18() -> pd.DataFrame:
    settings = [{**setting, "dataset": "cifar10"} for setting in SEEDS]
    return scored("cifar18", settings, falling("train_loss", "test_error"))


RUNS = {
    "1": None,
    "2": digits,
    "3": autoencoders,
    "4": cifar,
    "5": lambda: cifar(normed=(False, True)),
    "6": imagenet,
    "7": lambda: pd.concat([moving(s["activation"], s["seed"], 0.1) for s in SEEDS]),
    "table1": cifar18,
    "theory1": digits,
    "theory2": digits,
    "theory3": digits,
    "theory4": swept,
    "bench": None,
}


# -- of the paper's length, with its numbers as marks ----------------------------------------------


def imagenet_in_full() -> pd.DataFrame:
    scores = falling("train_loss", "valid_error5", "valid_error", steps=1e6)
    full = {"dataset": "imagenet (1000 classes)", "steps": 250_000}
    return scored("imagenet", SEEDS, scores, (0, 100_000, 250_000), **full)


LONG = {"4": lambda: cifar((0, 50_000, 120_000, 165_000)), "6": imagenet_in_full}


def write_runs(runs: pd.DataFrame, folder: Path) -> None:
    for name, rows in runs.groupby("run"):
        first = rows[[key for key in CONFIG if key in rows]].iloc[0]
        config = {k: v.item() if isinstance(v, np.generic) else v for k, v in first.items()}
        with Run.create(folder / str(name), config) as run:
            run.append(rows.drop(columns=["run", *config]))


def lines(figure) -> list[np.ndarray]:
    """What every line and cloud of dots shows."""
    points = [line.get_xydata() for ax in figure.axes for line in ax.lines]
    points += [dots.get_offsets() for ax in figure.axes for dots in ax.collections]
    return [np.asarray(line, float) for line in points if len(line)]


def words(figure) -> list[str]:
    """All text of a figure, with the marks of what the legends name."""
    texts = [figure.get_suptitle()]
    for legend in [*figure.legends, *(ax.get_legend() for ax in figure.axes)]:
        texts += [text.get_text() for text in legend.get_texts()] if legend else []
    for ax in figure.axes:
        texts += [ax.get_title(), ax.get_title(loc="left"), ax.get_xlabel(), ax.get_ylabel()]
        texts += [ax.get_xscale(), ax.get_yscale()]
        for line in ax.lines:
            mark = (line.get_label(), line.get_color(), line.get_marker(), line.get_linestyle())
            texts.append(" ".join(map(str, mark)))
        for bars in ax.containers:
            if hasattr(bars, "patches"):
                texts.append(f"{bars.get_label()} {[bar.get_height() for bar in bars]}")
        for axis in (ax.xaxis, ax.yaxis):
            if isinstance(formatter := axis.get_major_formatter(), FixedFormatter):
                texts += formatter.seq  # of names; numbers are not compared
    return texts


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
    for file in (f"figure_{name}.png", f"figure_{name}.pdf"):
        assert (tmp_path / "figures" / file).stat().st_size > 1000 and file in shown
    small = figures.data(name, *paths)
    picture = figures.picture(name, small)
    expected = lines(picture)
    assert words(drawn["figure"]) == words(picture)
    assert length == "short" or any("paper" in text.split() for text in words(picture))
    assert expected and len(lines(drawn["figure"])) == len(expected)
    for line, twin in zip(lines(drawn["figure"]), expected, strict=True):
        np.testing.assert_array_equal(line, twin)
    assert small is None or figures.said(name, small) in shown
    if small is not None and name != "bench":
        assert figures.described(small) in drawn["figure"].get_suptitle()


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
    assert caught.value.code == 2 and errors.count("\n") == 1
    assert errors.endswith(".\n") and errors.startswith(f"{script}.py: ")
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
