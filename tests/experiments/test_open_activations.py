"""Any activation function in experiments; and none that a run folder names is ever imported."""

import os
import subprocess
import sys
from typing import get_args

import pandas as pd
import pytest

import biasshift as bs
from biasshift import cli
from biasshift.activations import ACTIVATIONS
from biasshift.analysis.grid import paper_runs
from biasshift.experiments.autoencoder import Autoencoder
from biasshift.experiments.cifar11 import Cifar11
from biasshift.experiments.demo import Demo
from biasshift.experiments.experiment import Activation
from biasshift.experiments.imagenet import Imagenet
from biasshift.experiments.mnist import Mnist
from biasshift.experiments.sweep import Sweep
from biasshift.runs.reader import read_run, read_runs, run_states
from biasshift.runs.writer import Run

TRACE = """
from pathlib import Path
from torch import nn
Path(__file__).with_name("imported").touch()

class Own(nn.Module):
    def forward(self, x):
        return x / (1 + x.abs())
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty current folder; beside it, a module that leaves a file when it is imported."""
    modules = tmp_path / "modules"
    modules.mkdir()
    (modules / "planted_trace.py").write_text(TRACE)
    monkeypatch.syspath_prepend(str(modules))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.delenv("BIASSHIFT_DATA", raising=False)
    yield tmp_path / "here"
    sys.modules.pop("planted_trace", None)


def imported(here) -> bool:
    return (here.parent / "modules" / "imported").exists() or "planted_trace" in sys.modules


def call(capsys, *words) -> tuple[int, str, str]:
    try:
        cli.main(list(map(str, words)))
        code = 0
    except SystemExit as ended:
        code = int(ended.code or 0)
    return code, *capsys.readouterr()


# -- options ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Demo, Mnist, Autoencoder, Cifar11, Imagenet, Sweep])
def test_names_have_one_spelling_in_configs_and_folders(kind, here):
    names = ("elu:0.50", "elu:1", "gelu", "lrelu:0.1", "torch.nn:Hardswish")
    experiment = kind(activation=names, smoke=True, device="cpu")
    recorded = [config.activation for config in experiment.configs()]
    assert set(recorded) == {"elu:0.5", "elu", "gelu", "lrelu", "torch.nn:Hardswish"}
    folders = [experiment.folder(config).name for config in experiment.configs()]
    assert len(set(folders)) == len(folders) and not any(":" in name for name in folders)


@pytest.mark.parametrize("kind", [Demo, Mnist, Autoencoder, Cifar11, Imagenet, Sweep])
def test_wrong_names_are_refused_by_every_experiment(kind, here):
    for name, words in {
        "tahn": "Did you mean tanh",
        "os:system": "a class of",
        "no_such_module:X": "importable",
    }.items():
        with pytest.raises(ValueError, match=f"^--activation .*{words}"):
            kind(activation=(name,), smoke=True, device="cpu").configs()
    with pytest.raises(ValueError, match="each of them once"):
        kind(activation=("elu", "elu:1"), smoke=True, device="cpu").configs()


def test_the_help_shows_the_names(capsys):
    for command in (["demo"], ["sweep"], ["train", "mnist"], ["train", "cifar18"]):
        code, shown, _ = call(capsys, *command, "--help")
        assert code == 0
        flat = "".join(shown.replace("│", "").split())
        assert "{elu,relu,lrelu,srelu,prelu,selu,gelu,silu,mish,softplus,tanh}" in flat
        assert "package.module:Class" in flat


# -- runs ------------------------------------------------------------------------------------------


@pytest.mark.timeout(600)
def test_runs_of_other_activations_are_drawn_and_judged(here, capsys):
    """A run each, by the command: trained, then drawn, listed, judged and reported."""
    words = ["train", "mnist", "--smoke", "--workers", "1", "--out", "runs", "--device", "cpu"]
    names = ["relu", "elu:0.5", "planted_trace:Own"]
    code, shown, errors = call(capsys, *words, "--activation", *names)
    assert (code, errors) == (0, "") and "ELU (α = 0.5)" in shown
    assert imported(here)
    states = run_states("runs")
    assert list(states["state"]) == ["finished"] * 3 and set(states["activation"]) == {*names}
    folders = {path.name for path in here.glob("runs/*-0")}
    assert folders == {"relu-0", "elu0.5-0", "planted_trace.Own-0"}
    # Read in another process, which could import it, and does not.
    (here.parent / "modules" / "imported").unlink()
    code = (
        "import sys; from biasshift import cli\n"
        "for words in ('runs runs', 'claims runs', 'report runs', 'figure 2 runs'):\n"
        "    cli.main(words.split())\n"
        "assert 'planted_trace' not in sys.modules\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, capture_output=True)
    assert not (here.parent / "modules" / "imported").exists()
    page = (here / "report.html").read_text()
    assert all(name in page for name in ("ReLU", "ELU (α = 0.5)", "planted_trace:Own"))


def test_prelu_learns_its_slopes_alone_and_in_an_ensemble(here, capsys):
    words = ["train", "mnist", "--smoke", "--workers", "1", "--activation", "prelu"]
    assert call(capsys, *words, "--out", "alone")[0] == 0
    assert call(capsys, *words, "--out", "together", "--ensemble")[0] == 0
    alone, together = (read_runs(out) for out in ("alone", "together"))
    columns = ["train_loss", "valid_loss"]
    pd.testing.assert_frame_equal(alone[columns], together[columns], rtol=1e-4, atol=1e-5)


HOSTILE = [
    "planted_trace:Own",
    "planted_trace:__doc__",
    "os:system",
    "builtins:eval",
    "../modules/planted_trace:Own",
    "planted_trace",
    "\u202eelu\u0000\x1b]0;mine\x07",
    "$\\frac{",
    "<script>alert(1)</script>",
    "ELU",
    "x" * 50_000,
    "",
    5,
    True,
    1.5,
    None,
    ["elu"],
    {"import": "planted_trace:Own"},
]


@pytest.mark.timeout(600)
def test_nothing_that_a_folder_names_is_imported(here, capsys):
    words = ["train", "mnist", "--smoke", "--workers", "1", "--out", "made", "--activation", "elu"]
    assert call(capsys, *words)[0] == 0
    measured = read_run("made/elu-0")
    config = Mnist(smoke=True, activation=("elu",)).configs()[0]
    # Rows of single units are many.
    rows = measured[measured["unit"] < 2].drop(
        columns=[name for name in {"run", *vars(config)} if name in measured]
    )
    for number, name in enumerate(HOSTILE):
        stored = vars(config) | {"activation": name, "seed": number % 8}
        with Run.create(f"planted/{number}", stored) as run:
            run.append(rows.astype({"layer": object}))
    for number, name in enumerate(HOSTILE):
        more = ("claims", "figure 2") if number == 0 or name in (5, None, "x" * 50_000) else ()
        for command in ("runs", *more):
            code, _, errors = call(capsys, *command.split(), f"planted/{number}", "made")
            assert code in (0, 2), (name, command, errors)
            assert len(errors) < 1000 and "Traceback" not in errors
            assert not imported(here)
    table = read_runs("planted", "made")
    assert table["activation"].dtype == "category"
    assert len(bs.claims(table)) and not imported(here)
    code, _, errors = call(capsys, "report", "planted", "made")
    assert code == 0, errors
    page = (here / "report.html").read_text()
    assert "<script>alert(1)" not in page and not imported(here)


CREATE = """
import os
from biasshift.experiments.mnist import Mnist
from biasshift.runs.writer import Run
experiment = Mnist(smoke=True, out="runs", activation=("planted_trace:Own",), device="cpu")
(config,) = experiment.grid()[:1]
import dataclasses
config = dataclasses.replace(config, **experiment.smoke_config)
Run.create("runs/planted_trace.Own-0", config)
os._exit(0)
"""


def test_a_run_is_resumed_only_where_its_activation_is_named_again(here, capsys):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    subprocess.run([sys.executable, "-c", CREATE], check=True, env=environment)
    assert not imported(here)  # to make a config, nothing is imported
    words = ["train", "mnist", "--smoke", "--resume", "--workers", "1", "--out", "runs"]
    code, _, errors = call(capsys, *words, "--activation", "relu")
    assert code == 2 and "imported only when you name it. Give --activation planted_trace" in errors
    assert errors.count("\n") == 1 and not imported(here)
    code, _, errors = call(capsys, *words, "--activation", "planted_trace:Own")
    assert (code, errors) == (0, "") and imported(here)
    assert list(run_states("runs")["state"]) == ["finished"]
    # A finished run needs nothing more.
    assert call(capsys, *words, "--activation", "relu")[0] == 0


# -- claims ----------------------------------------------------------------------------------------


LOSSES = {"elu": (0.3, 0.1), "relu": (0.4, 0.2), "gelu": (0.1, float("nan"))}


def test_other_activations_do_not_choose_the_rate_of_the_paper_s():
    """GELU runs that diverge at the rate which is best for ELU and ReLU change nothing."""
    rows = [
        {"run": f"{name}-{lr}", "activation": name, "seed": 0, "lr": lr, "update": "plain",
         "constant": 0.0, "batch_norm": False, "train_loss": loss}
        for name, losses in LOSSES.items()
        for lr, loss in zip((0.01, 0.1), losses, strict=True)
    ]  # fmt: skip
    numbers = pd.DataFrame(rows)
    known = numbers[numbers["activation"] != "gelu"]
    assert set(paper_runs(numbers)["lr"]) == set(paper_runs(known)["lr"]) == {0.1}
    assert set(paper_runs(numbers)["activation"]) == {"elu", "relu", "gelu"}
    only = numbers[numbers["activation"] == "gelu"]
    assert set(paper_runs(only)["lr"]) == {0.01}


def test_the_type_of_the_option_has_all_names():
    known, _ = get_args(Activation)
    assert get_args(known) == tuple(ACTIVATIONS)
