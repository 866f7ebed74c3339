"""The scripts below paper_figs: short, and with the same pictures as the command."""

import runpy
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from planted import Planted, table
from test_figures import cifar, moving, scored, swept

from biasshift import figures
from biasshift.recording import Run

FOLDER = Path(__file__).parent.parent / "paper_figs"
SCRIPTS = {path.stem: path for path in sorted(FOLDER.glob("*.py"))}
NAMES = {script: script.removeprefix("fig") for script in SCRIPTS}
CONFIG = ("experiment", "dataset", "activation", "seed", "epochs", "steps", "lr", "batch_norm", "update", "constant")
SEEDS = [{"activation": name, "seed": seed} for name in ("elu", "relu") for seed in (0, 1)]
RATES = [{**setting, "lr": lr} for setting in SEEDS for lr in (0.1, 0.01)]


def digits() -> pd.DataFrame:
    planted = table(Planted(name, seed, along=lambda step, layer: {}) for name in ("elu", "relu") for seed in (0, 1))
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


def write_runs(runs: pd.DataFrame, folder: Path) -> None:
    for name, rows in runs.groupby("run"):
        firsts = rows[[key for key in CONFIG if key in rows]].iloc[0]
        config = {key: value.item() if isinstance(value, np.generic) else value for key, value in firsts.items()}
        with Run.create(folder / str(name), config) as run:
            run.append(rows.drop(columns=["run", *config]))


def lines(figure) -> list[np.ndarray]:
    """What every line and cloud of dots shows."""
    found = [np.asarray(line.get_xydata(), float) for ax in figure.axes for line in ax.lines]
    found += [np.asarray(dots.get_offsets(), float) for ax in figure.axes for dots in ax.collections]
    return [line for line in found if len(line)]


def test_there_is_a_script_for_every_figure():
    assert set(NAMES.values()) == set(figures.FIGURES) == set(RUNS)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_is_short(script):
    assert len(SCRIPTS[script].read_text(encoding="utf-8").splitlines()) <= 40


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_draws_what_the_command_draws(script, tmp_path, monkeypatch, capsys):
    name = NAMES[script]
    paths = []
    if RUNS[name] is not None:
        write_runs(RUNS[name](), tmp_path / "runs")
        paths = [str(tmp_path / "runs")]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(SCRIPTS[script]), *paths])
    drawn = runpy.run_path(str(SCRIPTS[script]))
    shown = capsys.readouterr().out
    for kind in ("png", "pdf"):
        assert (tmp_path / "figures" / f"figure_{name}.{kind}").stat().st_size > 1000 and f"figure_{name}.{kind}" in shown
    small = figures.data(name, *paths)
    expected = lines(figures.picture(name, small))
    assert expected and len(lines(drawn["figure"])) == len(expected)
    for one, other in zip(lines(drawn["figure"]), expected, strict=True):
        np.testing.assert_array_equal(one, other)
    assert small is None or figures.said(name, small) in shown
    assert small is None or name == "bench" or figures.described(small) in drawn["figure"].get_suptitle()


@pytest.mark.parametrize("path", sorted((FOLDER / "results").glob("*.parquet")), ids=lambda path: path.stem)
def test_a_committed_table_is_small_and_can_be_drawn(path):
    assert path.stem in figures.FIGURES and path.stat().st_size < 2_000_000
    small = figures.data(path.stem)
    assert lines(figures.picture(path.stem, small))
