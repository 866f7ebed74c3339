"""Real runs, of seconds: what a run leaves behind, what runs share, and the protocols' constants."""

import math
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from tiny import EPOCH_STEPS, LAYERS, UNITS, WIDTH, Tiny, data

from biasshift import classifying, training
from biasshift.claims import claims
from biasshift.classifying import evenly_spaced, probes, run
from biasshift.cli import _run
from biasshift.experiments.digits import Demo
from biasshift.experiments.mnist import Mnist
from biasshift.pool import run_jobs
from biasshift.reading import read_run, read_runs, run_states
from biasshift.summary import per_run, reading_table
from biasshift.training import evaluate

QUANTITIES = ["mean", "incoming", "s", "cos_gradient", "train_loss", "exam_k", "residual_theorem1"]


def ran(folder: Path, **options) -> list[int]:
    """One run; returns the calls of on_epoch."""
    epochs: list[int] = []
    (setting,) = Tiny(out=folder, activations=("elu",), **options).settings()
    run(setting, data(), folder, "refuse", lambda: epochs.append(1))
    return epochs


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> pd.DataFrame:
    """One run of ELU, read back."""
    folder = tmp_path_factory.mktemp("runs") / "elu-0"
    assert len(ran(folder)) == 2  # once per epoch
    return read_run(folder)


# -- one run -----------------------------------------------------------------------------------------------------


def test_a_run_knows_its_setting(table):
    setting = Tiny(activations=("elu",)).settings()[0]
    for name, value in vars(setting).items():
        assert (table[name] == value).all(), name
    assert set(table["run"]) == {"elu-0"}


def test_losses_are_measured_after_every_epoch(table):
    scores = table[table["train_loss"].notna()]
    assert scores[["step", "epoch"]].values.tolist() == [[0, 0], [EPOCH_STEPS, 1], [2 * EPOCH_STEPS, 2]]
    assert (scores["layer"] == "").all() and (scores["unit"] == -1).all()
    assert scores["train_loss"].is_monotonic_decreasing
    assert scores[["train_error", "valid_loss", "valid_error"]].notna().all(axis=None)


def test_units_of_every_layer_are_measured(table):
    steps = [0, EPOCH_STEPS, 2 * EPOCH_STEPS]
    means = table[table["mean"].notna()]
    assert means.groupby(["step", "layer"], observed=True).size().to_dict() == {(s, a): WIDTH for s in steps for a in ("1", "3", "5")}
    shifts = table[table["total"].notna()]
    assert set(shifts["step"]) == set(steps[1:]) and set(shifts["layer"]) == set(LAYERS)
    np.testing.assert_allclose(shifts["total"], shifts[["own", "incoming", "second_order"]].sum(axis=1), atol=1e-4)


def test_unit_fisher_matrices_are_those_of_the_chosen_units(table):
    fishers = table[table["s"].notna()]
    assert set(fishers["step"]) == {0, 2 * EPOCH_STEPS}
    for layer in LAYERS:
        assert sorted(set(fishers[fishers["layer"] == layer]["unit"])) == (list(range(10)) if layer == LAYERS[-1] else UNITS)
    gaps = table[table["cos_gradient"].notna()]
    assert sorted(gaps["layer"]) == sorted(2 * LAYERS) and (gaps["unit"] == -1).all()


def test_layer_sizes_are_recorded_once(table):
    sizes = table[table["inputs"].notna()]
    assert sizes[["layer", "inputs"]].values.tolist() == [["0", 64], ["2", WIDTH], ["4", WIDTH], ["6", WIDTH]]


def test_the_examination_is_at_the_first_look_below_the_equal_loss(table):
    """On the digits a look is an epoch."""
    scores, exams = table[table["train_loss"].notna()], table[table["exam_damping"].notna()]
    first = scores[scores["train_loss"] <= 2.2].iloc[0]
    assert set(exams["step"]) == {first["step"]} and set(exams["exam_loss"]) == {first["train_loss"]}
    assert len(exams) == 3 * 2 * 3 and set(exams["layer"]) == set(LAYERS[1:])  # layers behind the first, probes, dampings
    assert exams["exam_enough"].max() > 0


def test_the_identities_hold_in_the_trained_network(table):
    (row,) = table[table["residual_theorem1"].notna()].to_dict("records")
    assert row["step"] == 2 * EPOCH_STEPS
    for name in ("theorem1", "identity", "theorem2", "bookkeeping"):
        assert row[f"residual_{name}"] < 1e-6


def test_the_input_layer_can_be_left_out_of_the_fisher_matrices(tmp_path):
    ran(tmp_path / "elu-0", skip_input_layer=True, epochs=1, equal_loss=9.0)
    found = read_run(tmp_path / "elu-0")
    for column, layers in (("s", LAYERS[1:]), ("cos_gradient", LAYERS[1:]), ("exam_k", LAYERS[1:]), ("total", LAYERS)):
        assert set(found[found[column].notna()]["layer"]) == set(layers), column
    assert found["inputs"].notna().sum() == 4


def test_a_run_that_never_comes_down_to_the_equal_loss_is_readable(tmp_path):
    ran(tmp_path / "elu-0", equal_loss=1e-9, epochs=1)
    found = read_runs(tmp_path)
    assert "exam_damping" not in found
    assert reading_table(per_run(found)).loc["k", "ELU"] == "–"
    assert claims(found)["n"].tolist() == [0]


def test_a_run_is_not_overwritten_unless_told_so(tmp_path):
    (setting,) = Tiny(activations=("elu",), epochs=1).settings()
    run(setting, data(), tmp_path / "a", "refuse", lambda: None)
    with pytest.raises(FileExistsError, match="already holds a run"):
        run(setting, data(), tmp_path / "a", "refuse", lambda: None)
    run(replace(setting, seed=5), data(), tmp_path / "a", "replace", lambda: None)
    assert set(read_run(tmp_path / "a")["seed"]) == {5}


def test_a_run_that_diverges_says_so_and_is_marked_failed(tmp_path):
    with pytest.raises(RuntimeError, match="diverged; lower the rate"):
        ran(tmp_path / "elu-0", lr=1e9)
    assert run_states(tmp_path)["state"].tolist() == ["failed"]
    assert read_run(tmp_path / "elu-0")["epoch"].max() == 0


# -- what runs share ---------------------------------------------------------------------------------------------


@pytest.fixture
def seen(monkeypatch):
    """(activation, seed) → the weights at the start, and the labels of every batch, of the runs made from here on."""
    found, current = defaultdict(list), []

    def spy_train(model, *args, **kwargs):
        activation = type(model[1]).__name__
        current[:] = [activation]
        found[activation].append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        return training.train(model, *args, **kwargs)

    original = training.batches

    def spy_batches(x, y, *args):
        for chosen in original(x, y, *args):
            found[current[0]].append(torch.cat([chosen[0].flatten(), chosen[1]]))
            yield chosen

    monkeypatch.setattr(classifying, "train", spy_train)
    monkeypatch.setattr(training, "batches", spy_batches)
    return found


def test_runs_of_one_seed_start_from_the_same_weights_and_see_the_same_batches(seen, tmp_path):
    for setting in Tiny(activations=("elu", "relu", "lrelu", "srelu"), epochs=1).settings():
        run(setting, data(), tmp_path / setting.activation, "refuse", lambda: None)
    first, *others = seen.values()
    assert len(first) == 1 + EPOCH_STEPS and len(others) == 3
    for other in others:
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(first, other, strict=True))


def test_runs_of_two_seeds_share_neither(seen, tmp_path):
    one, two = Tiny(activations=("elu",), seeds=2, epochs=1).settings()
    run(one, data(), tmp_path / "0", "refuse", lambda: None)
    first = seen.pop("ELU")
    run(two, data(), tmp_path / "1", "refuse", lambda: None)
    assert not any(torch.equal(mine, theirs) for mine, theirs in zip(first, seen["ELU"], strict=True))


def test_results_do_not_depend_on_the_number_of_workers(tmp_path):
    tables = []
    for workers in (1, 2):
        tiny = Tiny(out=tmp_path / str(workers), epochs=1, equal_loss=9.0)
        jobs = [(_run, (tiny, setting, tiny.out / setting.activation)) for setting in tiny.settings()]
        calls: list[int] = []
        run_jobs(jobs, workers, lambda calls=calls: calls.append(1))
        assert len(calls) == 2
        tables.append(read_runs(tiny.out))
    pd.testing.assert_frame_equal(*tables, check_exact=True)
    assert tables[0][QUANTITIES].notna().any().all()


def test_measuring_does_not_change_the_training(tmp_path):
    """The same losses, to the last digit, from a loop without any measurement."""
    ran(tmp_path / "elu-0")
    (setting,) = Tiny(activations=("elu",)).settings()
    model = classifying.mlp(64, WIDTH, 3, 10, "elu", seed=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=setting.lr)
    generator = torch.Generator().manual_seed(classifying.DATA_ORDER_SEED)
    for _ in training.train(model, optimizer, data(), epochs=2, batch_size=64, generator=generator):
        pass
    losses = read_run(tmp_path / "elu-0")["train_loss"].dropna()
    assert evaluate(model, data().x_train[:1437], data().y_train[:1437])[0] == losses.iloc[-1]


def test_probes_are_disjoint_and_the_same_for_every_run():
    numbers = torch.arange(12_933)
    numbered = replace(data(), x_train=numbers[:, None].expand(-1, 64).float(), y_train=numbers % 10)
    along, (first, second) = probes(numbered, 2000, 5000)
    again, (first_again, second_again) = probes(numbered, 2000, 5000)
    assert [len(x) for x, _ in (along, first, second)] == [2000, 5000, 5000]
    a, b, c = (set(x[:, 0].tolist()) for x, _ in (along, first, second))
    assert (len(a), len(b), len(c)) == (2000, 5000, 5000) and not b & c
    for (x, y), (x2, y2) in zip((along, first, second), (again, first_again, second_again), strict=True):
        assert torch.equal(x, x2) and torch.equal(x[:, 0].long() % 10, y) and torch.equal(y, y2)


def test_probes_that_would_overlap_are_made_smaller():
    along, exam = probes(data(), 50_000, 10_000)
    assert [len(x) for x, _ in (along, *exam)] == [12_933, 6466, 6466]


@pytest.mark.parametrize(("width", "count", "expected"), [(10, 4, [0, 2, 5, 7]), (128, 2, [0, 64]), (3, 16, range(3)), (5, 5, range(5))])
def test_evenly_spaced(width, count, expected):
    assert evenly_spaced(width, count) == list(expected)


# -- the protocols -----------------------------------------------------------------------------------------------


def test_mnist_is_the_papers_protocol():
    """Section 4.1: 8 × 128, He initialization, SGD with learning rate 0.01 and batches of 64, 300 epochs, mean of 5 runs."""
    settings = Mnist().settings()
    assert [(s.activation, s.seed) for s in settings] == [(a, seed) for seed in range(5) for a in ("elu", "relu", "lrelu")]
    for s in settings:
        assert (s.experiment, s.depth, s.width, s.lr, s.batch_size, s.epochs) == ("mnist", 8, 128, 0.01, 64, 300)
        assert (s.momentum, s.init, s.means_every, s.skip_input_layer) == (0.0, "normal", 1, True)


def test_the_demo_is_enough_for_a_paired_test_and_the_quick_one_is_short():
    settings = Demo().settings()
    assert {s.activation for s in settings} == {"elu", "relu", "lrelu", "srelu"}
    assert {s.seed for s in settings} == set(range(6)) and len(settings) == 24
    assert {(s.depth, s.width, s.lr, s.batch_size) for s in settings} == {(8, 128, 0.01, 64)}
    quick = Demo(quick=True).settings()
    assert sum(s.epochs for s in quick) <= sum(s.epochs for s in settings) / 10
    assert {replace(s, epochs=60) for s in quick} < set(settings)
    assert settings[0].exam_size >= 10 * 128  # else no unit could have enough effective samples


@pytest.mark.parametrize(
    ("options", "says"),
    [
        *(({name: 0}, f"--{name.replace('_', '-')} must be at least 1, got 0") for name in ("epochs", "seeds", "batch_size", "depth")),
        *(({name: -3}, f"--{name.replace('_', '-')} must be at least 1, got -3") for name in ("width", "probe", "units", "means_every")),
        ({"lr": 0.0}, "--lr must be a number above 0, got 0.0"),
        ({"lr": -1.0}, "--lr must be a number above 0, got -1.0"),
        ({"lr": math.nan}, "--lr must be a number above 0, got nan"),
        ({"lr": math.inf}, "--lr must be a number above 0, got inf"),
        ({"equal_loss": 0.0}, "--equal-loss must be a number above 0"),
        ({"momentum": 1.0}, r"--momentum must be in \[0, 1\), got 1.0"),
        ({"damping": -1e-3}, "--damping must be a number of at least 0"),
        ({"activation": ()}, "--activation needs at least one name"),
        ({"activation": ("elu", "elu")}, "each of them once"),
    ],
)
def test_an_option_out_of_its_range_is_named(options, says):
    with pytest.raises(ValueError, match=says):
        Mnist(**options).settings()


@pytest.mark.data
def test_two_epochs_of_the_real_mnist(data_root, tmp_path):
    options = {"probe": 200, "exam_probe": 1500, "units": 2, "fisher_every": 2}
    mnist = Mnist(activation=("elu",), seeds=1, epochs=2, data=data_root, **options)
    (setting,) = mnist.settings()
    run(setting, mnist.load(), tmp_path / "elu-0", "refuse", lambda: None)
    found = read_run(tmp_path / "elu-0")
    scores = found[found["train_loss"].notna()]
    assert scores["step"].tolist() == [0, 782, 1564]  # 50,000 images in batches of 64
    assert scores["train_loss"].iloc[0] > 2.3 and scores["valid_error"].iloc[-1] < 0.1
    assert set(found[found["s"].notna()]["layer"]) == {str(2 * i) for i in range(1, 9)}
    assert found["residual_theorem2"].max() < 1e-5
    assert per_run(found)["exam_step"].item() % 23 == 0 and per_run(found)["exam_step"].item() < 782
    assert 0.4 < found["exam_loss"].max() <= 0.5  # within the first epoch, where the loss falls fast
