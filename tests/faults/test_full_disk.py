"""A disk that is full: the file is named, what was written before is good, and nothing is half."""

import contextlib
import os
import resource
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from biasshift import cli
from biasshift.atomic import replacing
from biasshift.cli import figure, results  # noqa: F401  take long
from biasshift.report import report
from biasshift.runs.reader import read_runs, run_states
from biasshift.runs.writer import Run
from biasshift.training import checkpoint

CONFIG = {"activation": "elu", "seed": 0}


@contextlib.contextmanager
def room(size: int):
    """No file may become larger, as on a full disk; the error is "File too large"."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def curve(steps: int = 3) -> pd.DataFrame:
    return pd.DataFrame({"step": range(steps), "train_loss": np.linspace(2, 1, steps)})


def test_a_run_is_readable_up_to_its_last_flush(tmp_path):
    folder = tmp_path / "elu-0"
    units = pd.DataFrame({"step": 9, "layer": "2", "unit": range(100_000)})
    units["mean"] = np.random.default_rng(0).normal(size=len(units))
    named = pytest.raises(OSError, match=r"File too large: '.*segment-00001\.parquet'")
    with named, room(100_000), Run.create(folder, CONFIG) as run:
        run.append(curve())
        run.flush()
        run.append(units)
        run.flush()
    assert read_runs(folder)["step"].tolist() == [0, 1, 2]
    assert run_states(folder)["state"].tolist() == ["failed"]
    assert not [name for name in os.listdir(folder) if name.endswith(".tmp")]


def test_a_checkpoint_that_has_no_room_leaves_the_earlier_one(tmp_path):
    (tmp_path / "checkpoint.pt").write_text("earlier")
    state = {"step": 1, "model": {"weight": torch.randn(100_000)}}
    with room(100_000), pytest.raises(OSError, match=r"File too large: '.*checkpoint"):
        checkpoint.prepare(tmp_path, state)
    assert os.listdir(tmp_path) == ["checkpoint.pt"]


@pytest.mark.parametrize("command", ["report", "figure"])
def test_a_command_says_which_file_has_no_room_and_what_is_good(tmp_path, capsys, command):
    with Run.create(tmp_path / "runs" / "elu-0", CONFIG) as run:
        run.append(curve())
    out = tmp_path / "page.html" if command == "report" else tmp_path / "figures"
    words = [command, str(tmp_path / "runs")] if command == "report" else [command, "1"]
    if command == "report":
        report([tmp_path / "runs"], out)
        before = out.read_bytes()
    with room(1000), pytest.raises(SystemExit) as end:
        cli.main([*words, "--out", str(out)])
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.count("\n") == 1 and out.name in said
    remedy = "give the same command again" if command == "report" else "another folder"
    assert "File too large" in said and remedy in said
    assert "Traceback" not in said and not list(tmp_path.rglob("*.tmp"))
    assert command == "figure" or out.read_bytes() == before


@pytest.mark.parametrize("name", [None, "temporary", "other"])
def test_only_errors_of_this_file_get_its_name(tmp_path, name):
    path = tmp_path / "a.txt"
    with pytest.raises(OSError) as found, replacing(path) as temporary:
        files = {None: [], "temporary": [str(temporary)], "other": ["other"]}
        raise OSError(28, "No space left on device", *files[name])
    assert found.value.errno == 28
    assert found.value.filename == ("other" if name == "other" else str(path))


def test_an_error_of_another_kind_stays(tmp_path):
    error = FileNotFoundError(2, "No such file or directory")
    with pytest.raises(FileNotFoundError) as found, replacing(Path(tmp_path) / "a.txt"):
        raise error
    assert found.value is error
