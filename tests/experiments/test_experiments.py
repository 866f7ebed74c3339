"""Real runs, of seconds: what a run leaves behind, what runs share, and the paper's constants."""

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from tiny import DEPTH, EPOCH_STEPS, LAYERS, UNITS, WIDTH, Tiny, data

from biasshift import experiments, training
from biasshift.analysis.formatting import reading_table
from biasshift.analysis.quantities import per_run
from biasshift.analysis.verdicts import claims
from biasshift.cli.train import run_job
from biasshift.data import TensorStream, synthetic_cifar
from biasshift.experiments.cifar11 import Cifar11
from biasshift.experiments.cifar18 import Cifar18
from biasshift.experiments.demo import Demo
from biasshift.experiments.experiment import Experiment
from biasshift.experiments.mlp_trial import MlpConfig, probes, trial
from biasshift.experiments.mnist import Mnist
from biasshift.experiments.sweep import Sweep
from biasshift.nets import mlp
from biasshift.runs.reader import read_run, read_runs, run_states
from biasshift.training import evaluate
from biasshift.training.process_pool import run_jobs
from biasshift.training.runner import run
from biasshift.training.trial import Exist, Progress, evenly_spaced

ROOT = Path(__file__).parents[2]
QUANTITIES = ["mean", "incoming", "s", "cos_gradient", "train_loss", "exam_k", "residual_theorem1"]


def ignore(report: Progress) -> None: ...


def run_config(config: MlpConfig, folder: Path, exist: Exist = "refuse", report=ignore) -> None:
    run([trial(config, data())], [folder], exist, report)


def ran(folder: Path, **options) -> list[Progress]:
    """One run; returns its reports."""
    reports: list[Progress] = []
    (config,) = Tiny(activations=("elu",), **options).configs()
    run_config(config, folder, report=reports.append)
    return reports


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> pd.DataFrame:
    """One run of ELU, read back."""
    folder = tmp_path_factory.mktemp("runs") / "elu-0"
    reports = ran(folder)
    # On a slow machine there are others between.
    epochs = [report for report in reports if report.step % EPOCH_STEPS == 0]
    assert [(report.run, report.step, report.steps) for report in epochs] == [
        ("elu-0", EPOCH_STEPS, 46),
        ("elu-0", 46, 46),
    ]
    assert all(0 < report.loss < 4 for report in reports)
    return read_run(folder)


# -- one run ---------------------------------------------------------------------------------------


def test_a_run_records_its_config(table):
    config = Tiny(activations=("elu",)).configs()[0]
    for name, value in vars(config).items():
        assert (table[name] == value).all(), name
    assert set(table["run"]) == {"elu-0"}


def test_losses_are_measured_after_every_epoch(table):
    scores = table[table["train_loss"].notna()]
    expected = [[epoch * EPOCH_STEPS, epoch] for epoch in (0, 1, 2)]
    assert scores[["step", "epoch"]].values.tolist() == expected
    assert (scores["layer"] == "").all() and (scores["unit"] == -1).all()
    assert scores["train_loss"].is_monotonic_decreasing
    assert scores[["train_error", "valid_loss", "valid_error"]].notna().all(axis=None)


def test_units_of_every_layer_are_measured(table):
    steps = [0, EPOCH_STEPS, 2 * EPOCH_STEPS]
    means = table[table["mean"].notna()]
    assert means.groupby(["step", "layer"], observed=True).size().to_dict() == {
        (s, a): WIDTH for s in steps for a in ("1", "3", "5")
    }
    shifts = table[table["total"].notna()]
    assert set(shifts["step"]) == set(steps[1:]) and set(shifts["layer"]) == set(LAYERS)
    np.testing.assert_allclose(
        shifts["total"], shifts[["own", "incoming", "second_order"]].sum(axis=1), atol=1e-4
    )


def test_unit_fisher_matrices_are_those_of_the_chosen_units(table):
    fishers = table[table["s"].notna()]
    assert set(fishers["step"]) == {0, 2 * EPOCH_STEPS}
    for layer in LAYERS:
        units = sorted(set(fishers[fishers["layer"] == layer]["unit"]))
        assert units == (list(range(10)) if layer == LAYERS[-1] else UNITS)
    gaps = table[table["cos_gradient"].notna()]
    assert sorted(gaps["layer"]) == sorted(2 * LAYERS) and (gaps["unit"] == -1).all()


def test_layer_sizes_are_recorded_once(table):
    sizes = table[table["inputs"].notna()]
    expected = [["0", 64], ["2", WIDTH], ["4", WIDTH], ["6", WIDTH]]
    assert sizes[["layer", "inputs"]].values.tolist() == expected


def test_the_batches_own_loss_is_their_mean_since_the_last_scores(table):
    """From a loop without any measurement; there are no batches before the beginning."""
    _, steps = loop(Tiny(activations=("elu",)).configs()[0])
    losses = torch.stack([step.loss for step in steps]).double()
    first, *means = table[table["epoch"].notna()].sort_values("step")["batch_loss"]
    expected = [losses[:EPOCH_STEPS].mean().item(), losses[EPOCH_STEPS:].mean().item()]
    assert math.isnan(first) and means == pytest.approx(expected)


def test_the_examination_is_at_the_first_loss_below_the_equal_loss(table):
    """On the digits the loss is evaluated once an epoch."""
    scores, exams = table[table["train_loss"].notna()], table[table["exam_damping"].notna()]
    first = scores[scores["train_loss"] <= 2.2].iloc[0]
    assert set(exams["step"]) == {first["step"]} and set(exams["exam_loss"]) == {
        first["train_loss"]
    }
    # layers behind the first, probes, dampings
    assert len(exams) == 3 * 2 * 3 and set(exams["layer"]) == set(LAYERS[1:])
    assert exams["exam_enough"].max() > 0


def test_the_identities_hold_in_the_trained_network(table):
    (row,) = table[table["residual_theorem1"].notna()].to_dict("records")
    assert row["step"] == 2 * EPOCH_STEPS
    for name in ("theorem1", "identity", "theorem2", "bookkeeping"):
        assert row[f"residual_{name}"] < 1e-6


def test_the_input_layer_can_be_left_out_of_the_fisher_matrices(tmp_path):
    ran(tmp_path / "elu-0", skip_input_layer=True, epochs=1, equal_loss=9.0)
    table, rest = read_run(tmp_path / "elu-0"), LAYERS[1:]
    expected = {"s": rest, "cos_gradient": rest, "exam_k": rest, "total": LAYERS}
    for column, layers in expected.items():
        assert set(table[table[column].notna()]["layer"]) == set(layers), column
    assert table["inputs"].notna().sum() == 4


def test_a_run_that_never_comes_down_to_the_equal_loss_is_readable(tmp_path):
    ran(tmp_path / "elu-0", equal_loss=1e-9, epochs=1)
    table = read_runs(tmp_path)
    assert "exam_damping" not in table
    assert reading_table(per_run(table)).loc["k", "ELU"] == "–"
    assert claims(table).set_index("claim").loc["correction", "n"] == 0


def test_a_run_is_not_overwritten_without_replace(tmp_path):
    (config,) = Tiny(activations=("elu",), epochs=1).configs()
    run_config(config, tmp_path / "a")
    with pytest.raises(FileExistsError, match="already holds a run"):
        run_config(config, tmp_path / "a")
    run_config(replace(config, seed=5), tmp_path / "a", "replace")
    assert set(read_run(tmp_path / "a")["seed"]) == {5}


def test_a_run_that_diverges_raises_and_is_marked_failed(tmp_path):
    with pytest.raises(RuntimeError, match="diverged; lower the learning rate"):
        ran(tmp_path / "elu-0", lr=1e9)
    assert run_states(tmp_path)["state"].tolist() == ["failed"]
    assert read_run(tmp_path / "elu-0")["epoch"].max() == 0


# -- what runs share -------------------------------------------------------------------------------


def start_and_batches(activation: str, seed: int) -> list[torch.Tensor]:
    """The weights at the start, and what every minibatch of two epochs holds."""
    made = trial(Tiny(activations=(activation,), seeds=seed + 1).configs()[seed], data())
    weights = torch.cat([p.detach().flatten() for p in made.model.parameters()])
    return [
        weights,
        *(torch.cat([x.flatten(), y]) for epoch in (1, 2) for x, y in made.stream.epoch(epoch)),
    ]


def test_runs_of_one_seed_start_from_the_same_weights_and_see_the_same_batches():
    names = ("elu", "relu", "lrelu", "srelu")
    first, *others = (start_and_batches(activation, 0) for activation in names)
    assert len(first) == 1 + 2 * EPOCH_STEPS
    for other in others:
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(first, other, strict=True))


def test_runs_of_two_seeds_share_neither():
    pairs = zip(*(start_and_batches("elu", seed) for seed in (0, 1)), strict=True)
    assert not any(torch.equal(mine, theirs) for mine, theirs in pairs)


def test_results_do_not_depend_on_the_number_of_workers(tmp_path):
    """But for the seconds that they took."""
    tables = []
    for workers in (1, 2):
        tiny = Tiny(out=tmp_path / str(workers), epochs=1, equal_loss=9.0)
        reports: list[Progress] = []
        run_jobs(
            [(run_job, (tiny, [config])) for config in tiny.configs()], workers, reports.append
        )
        assert {(report.run, report.step) for report in reports if report.step == 23} == {
            ("elu-0", 23),
            ("relu-0", 23),
        }
        tables.append(read_runs(tiny.out).drop(columns="seconds"))
    pd.testing.assert_frame_equal(*tables, check_exact=True)
    assert tables[0][QUANTITIES].notna().any().all()


def loop(config: MlpConfig) -> tuple[torch.nn.Module, list[training.Step]]:
    """The same training, without any measurement."""
    model = mlp(64, WIDTH, DEPTH, 10, config.activation, seed=config.seed)
    update = training.Gradient(model, torch.optim.SGD(model.parameters(), lr=config.lr))
    stream = TensorStream(data().x_train, data().y_train, 64, config.seed, views=9)
    return model, list(training.train(update, stream, steps=2 * EPOCH_STEPS))


def test_measuring_does_not_change_the_training(tmp_path):
    """The same losses, to the last digit, from a loop without any measurement."""
    ran(tmp_path / "elu-0")
    model, _ = loop(Tiny(activations=("elu",)).configs()[0])
    losses = read_run(tmp_path / "elu-0")["train_loss"].dropna()
    assert evaluate(model, data().x_train[:1437], data().y_train[:1437])[0] == losses.iloc[-1]


def test_probes_are_disjoint_and_the_same_for_every_run():
    numbers = torch.arange(12_933)
    numbered = replace(
        data(), x_train=numbers[:, None].expand(-1, 64).float(), y_train=numbers % 10
    )
    along, (first, second) = probes(numbered, 2000, 5000)
    again, (first_again, second_again) = probes(numbered, 2000, 5000)
    assert [len(x) for x, _ in (along, first, second)] == [2000, 5000, 5000]
    a, b, c = (set(x[:, 0].tolist()) for x, _ in (along, first, second))
    assert (len(a), len(b), len(c)) == (2000, 5000, 5000) and not b & c
    for (x, y), (x2, y2) in zip(
        (along, first, second), (again, first_again, second_again), strict=True
    ):
        assert torch.equal(x, x2) and torch.equal(x[:, 0].long() % 10, y) and torch.equal(y, y2)


def test_probes_that_would_overlap_are_made_smaller():
    along, exam = probes(data(), 50_000, 10_000)
    assert [len(x) for x, _ in (along, *exam)] == [12_933, 6466, 6466]


@pytest.mark.parametrize(
    ("width", "count", "expected"),
    [(10, 4, [0, 2, 5, 7]), (128, 2, [0, 64]), (3, 16, range(3)), (5, 5, range(5))],
)
def test_evenly_spaced(width, count, expected):
    assert evenly_spaced(width, count) == list(expected)


# -- the experiments -------------------------------------------------------------------------------


def test_mnist_has_the_papers_constants():
    """Section 4.1: 8 × 128, He initialization, SGD at 0.01, batches of 64, 300 epochs, 5 runs."""
    configs = Mnist().configs()
    assert [(s.activation, s.seed) for s in configs] == [
        (a, seed) for seed in range(5) for a in ("elu", "relu", "lrelu")
    ]
    for s in configs:
        assert s.experiment == "mnist" and (s.depth, s.width) == (8, 128)
        assert (s.lr, s.batch_size, s.epochs) == (0.01, 64, 300)
        assert (s.momentum, s.init, s.means_every, s.skip_input_layer) == (0.0, "normal", 1, True)


def test_the_two_cifar_experiments_have_the_papers_constants():
    """Sections 4.2 and 4.3. What the 18 layers do between their 35,000 and fine-tuning is open."""
    expected = ((Cifar11, 165_000, 4, 40), (Cifar18, 160_000, 1, 1))
    for experiment, steps, activations, runs in expected:
        configs = experiment().configs()
        assert len(configs) == runs and len({s.activation for s in configs}) == activations
        for s in configs:
            assert (s.experiment, s.dataset) == (experiment.name, "cifar100")
            assert (s.steps, s.batch_size, s.epochs) == (steps, 100, steps / 500)
            assert (s.lr, s.momentum, s.weight_decay) == (0.01, 0.9, 5e-4)
            assert (s.preprocessing, s.augmented) == ("gcn-zca", True)
    small, large = Cifar11(steps=16_500), Cifar18(steps=16_000)
    phases = [(phase.start, phase.lr) for phase in small.phases(small.configs()[0])]
    assert phases == [(1, 0.01), (3501, 0.005), (8501, 0.0005), (13501, pytest.approx(0.00005))]
    phases = [
        (phase.start, phase.lr, phase.where, phase.factor)
        for phase in large.phases(large.configs()[0])
    ]
    assert phases == [
        (1, 0.01, "last", 1),
        (3501, 0.001, "last", 1),
        (7001, 0.001, "all", 1),
        (12001, 0.001, "all", 1.5),
    ]


@pytest.mark.parametrize("experiment", [Cifar11, Cifar18])
def test_width_multiplies_the_hidden_units_of_a_convolutional_network(experiment):
    full, quarter = (
        experiment(width=width, seeds=1, activation=("elu",), preprocessing="mean")
        for width in (1.0, 0.25)
    )
    data = synthetic_cifar()
    shapes = [
        [p.shape[0] for p in e.trial(e.configs()[0], data).model.parameters() if p.ndim > 1]
        for e in (full, quarter)
    ]
    assert (
        shapes[1][:-1] == [max(1, round(units / 4)) for units in shapes[0][:-1]]
        and shapes[1][-1] == shapes[0][-1]
    )
    with pytest.raises(ValueError, match="--width must be a number above 0, got 0"):
        experiment(width=0.0).configs()


def test_the_folder_of_a_cifar_run_is_named_by_its_options():
    names = [
        [str(e.folder(s)) for s in e.configs()]
        for e in (Cifar11(seeds=1, batch_norm=True), Cifar18(dataset="cifar10"))
    ]
    assert names == [
        [f"runs/cifar11/{name}-bn-0" for name in ("elu", "srelu", "lrelu", "relu")],
        ["runs/cifar18/elu-cifar10-0"],
    ]


def test_the_demo_is_enough_for_a_paired_test_and_the_quick_one_is_short():
    configs = Demo().configs()
    assert {s.activation for s in configs} == {"elu", "relu", "lrelu", "srelu"}
    assert {s.seed for s in configs} == set(range(6)) and len(configs) == 24
    assert {(s.depth, s.width, s.lr, s.batch_size) for s in configs} == {(8, 128, 0.01, 64)}
    quick = Demo(quick=True).configs()
    assert sum(s.epochs for s in quick) <= sum(s.epochs for s in configs) / 10
    assert {replace(s, epochs=60) for s in quick} < set(configs)
    assert configs[0].exam_size >= 10 * 128  # else no unit could have enough effective samples


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *(
            ({name: 0}, f"--{name.replace('_', '-')} must be at least 1, got 0")
            for name in ("epochs", "seeds", "batch_size", "depth")
        ),
        *(
            ({name: -3}, f"--{name.replace('_', '-')} must be at least 1, got -3")
            for name in ("width", "probe", "units", "means_every")
        ),
        ({"seeds": 10**9}, "--seeds must be at most 10,000, got 1,000,000,000"),
        ({"depth": 10**9}, "--depth must be at most 10,000"),
        ({"width": 10**12}, "--width must be at most 1,000,000"),
        ({"workers": 10**6}, "--workers must be at most 1,000"),
        ({"lr": 0.0}, "--lr must be a number above 0, got 0.0"),
        ({"lr": -1.0}, "--lr must be a number above 0, got -1.0"),
        ({"lr": math.nan}, "--lr must be a number above 0, got nan"),
        ({"lr": math.inf}, "--lr must be a number above 0, got inf"),
        ({"equal_loss": 0.0}, "--equal-loss must be a number above 0"),
        ({"momentum": 1.0}, r"--momentum must be in \[0, 1\), got 1.0"),
        ({"damping": -1e-3}, "--damping must be a number of at least 0"),
        ({"activation": ()}, "--activation needs at least one value"),
        ({"activation": ("elu", "elu")}, "each of them once"),
    ],
)
def test_an_option_out_of_its_range_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        Mnist(**options).configs()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "nonsense"}, "--device must be auto, cpu or cuda, got 'nonsense'"),
        (
            {"device": "cuda:99"},
            r"--device cuda:99 must be a GPU, and PyTorch finds \d of them .* Leave the option out",
        ),
        ({"workers": 0}, "--workers must be at least 1, got 0"),
        ({"ensemble": True, "precision": "bfloat16"}, "--ensemble trains in float32"),
        ({"ensemble": True, "compile": True}, "--ensemble trains in float32 and uncompiled"),
    ],
)
@pytest.mark.parametrize("experiment", [Mnist, Tiny])
def test_an_option_that_does_not_fit_is_named(experiment: type[Experiment], options, message):
    with pytest.raises(ValueError, match=message) as caught:
        experiment(**options).configs()
    assert "\n" not in str(caught.value)


def test_replace_and_resume_exclude_each_other():
    """Where one of them is the default, as of the demo and the sweep, the other turns it off."""
    with pytest.raises(ValueError, match="--replace and --resume exclude each other"):
        Mnist(replace=True, resume=True).configs()
    assert not Demo(resume=True).replace and not Sweep(replace=True).resume


@pytest.mark.parametrize("options", [{"ensemble": True}, {"workers": 2}])
def test_several_processes_of_torchrun_train_one_network(options, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="Under torchrun all processes train one network"):
        Tiny(**options).configs()


def test_what_is_there_is_refused_replaced_or_resumed():
    mnist = Mnist(), Mnist(replace=True), Mnist(resume=True)
    assert [each.exist() for each in mnist] == ["refuse", "replace", "resume"]
    demo = Demo(), Demo(resume=True), Demo(replace=False)
    assert [each.exist() for each in demo] == ["replace", "resume", "refuse"]
    sweep = Sweep(), Sweep(replace=True), Sweep(resume=False)
    assert [each.exist() for each in sweep] == ["resume", "replace", "refuse"]


@pytest.mark.parametrize(
    ("experiment", "message"),
    [
        (Sweep(graph=True), "plain gradient descent alone"),
        (Mnist(graph=True, precision="float16"), "no --graph"),
    ],
)
def test_what_graphs_cannot_record_is_refused_on_a_gpu(
    experiment: Experiment, message, monkeypatch
):
    monkeypatch.setattr(Experiment, "where", lambda self: torch.device("cuda"))
    with pytest.raises(ValueError, match=message):
        experiment.configs()


def test_the_quick_demo_has_a_folder_of_its_own_unless_it_is_given_one():
    assert Demo(quick=True).out == Path("runs/demo-quick") and Demo(
        quick=True, out=Path("here")
    ).out == Path("here")
    assert Demo(smoke=True).out == Path("runs/demo-smoke")
    assert Demo(quick=True).folder(Demo(quick=True).configs()[0]) == Path("runs/demo-quick/elu-0")


@pytest.mark.parametrize("experiment", [Demo, Mnist])
def test_a_smoke_test_is_one_seed_of_a_tiny_network(experiment):
    configs = experiment(smoke=True).configs()
    assert {config.seed for config in configs} == {0} and len(
        {config.activation for config in configs}
    ) == len(configs)
    assert all(
        config.depth <= 2 and config.width <= 20 and config.epochs <= 2 for config in configs
    )


def test_an_ensemble_differs_in_nothing_but_the_seed():
    demo = Demo()
    groups = {demo.alike(config) for config in demo.configs()}
    assert len(groups) == 4  # activations
    config = demo.configs()[0]
    assert demo.alike(replace(config, seed=9)) == demo.alike(config)
    assert demo.alike(replace(config, lr=0.02)) != demo.alike(config)


# -- imports ---------------------------------------------------------------------------------------


def test_options_need_neither_tables_nor_measurements():
    """So that the help of a command appears at once."""
    heavy = ["pandas", "pyarrow", "torchvision", "sklearn", "biasshift.tracking"]
    files = "autoencoder, cifar11, cifar18, demo, imagenet, mnist, sweep"
    code = (
        f"import sys; from biasshift.experiments import {files}; "
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_public_names_load_when_they_are_used():
    assert set(experiments.__all__) <= set(dir(experiments))
    assert experiments.Demo is Demo and experiments.run is run
    with pytest.raises(AttributeError, match=r"'biasshift\.experiments' has no attribute 'demos'"):
        _ = experiments.demos


# -- real data -------------------------------------------------------------------------------------


@pytest.mark.data
def test_two_epochs_of_the_real_mnist(data_root, tmp_path):
    options = {"probe": 200, "exam_probe": 1500, "units": 2, "fisher_every": 2}
    mnist = Mnist(activation=("elu",), seeds=1, epochs=2, data=data_root, **options)
    (config,) = mnist.configs()
    run([mnist.trial(config, mnist.load())], [tmp_path / "elu-0"], "refuse", ignore)
    table = read_run(tmp_path / "elu-0")
    scores = table[table["train_loss"].notna()]
    assert scores["step"].tolist() == [0, 782, 1564]  # 50,000 images in batches of 64
    assert scores["train_loss"].iloc[0] > 2.3 and scores["valid_error"].iloc[-1] < 0.1
    assert set(table[table["s"].notna()]["layer"]) == {str(2 * i) for i in range(1, 9)}
    assert table["residual_theorem2"].max() < 1e-5
    exam_step = per_run(table)["exam_step"].item()
    assert exam_step % 23 == 0 and exam_step < 782
    # within the first epoch, where the loss falls fast
    assert 0.4 < table["exam_loss"].max() <= 0.5
