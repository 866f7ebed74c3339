"""Ctrl-C once, twice and more, SIGTERM, SIGHUP: runs are closed, files whole, no traceback."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from biasshift import _sigint, cli
from biasshift.cli import results  # noqa: F401  takes long
from biasshift.experiments import demo as demonstration
from biasshift.report import report
from biasshift.runs.reader import run_states
from biasshift.runs.writer import Run
from tests.faults.alone import server

ROOT = Path(__file__).parents[2]
PATIENCE = 120  # seconds, for a machine that is busy with something else
SMALL = {
    "DEPTH": 2,
    "WIDTH": 8,
    "PROBE": 50,
    "EXAM_PROBE": 200,
    "QUICK_EPOCHS": 10**6,
    "QUICK_SEEDS": 1,
    "ACTIVATIONS": ("elu", "relu"),
}


def demo(folder: Path, words: list[str]) -> None:
    """The small demo, as a terminal starts it, also where the tests run below nohup."""
    os.setsid()
    os.chdir(folder)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    vars(demonstration).update(SMALL)
    for number, name in ((1, os.devnull), (2, folder / "errors.txt")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT), number)
    cli.main(["demo", "--quick", "--device", "cpu", *words, "--checkpoint-seconds", "0.1"])


@pytest.mark.parametrize(
    ("workers", "signals", "status"),
    [
        (1, [signal.SIGTERM, signal.SIGTERM], 143),
        (1, [signal.SIGHUP], 129),
        pytest.param(
            2, [signal.SIGINT, signal.SIGTERM, *[signal.SIGINT] * 20], 130, marks=pytest.mark.slow
        ),
    ],
)
@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="signals of Unix")
def test_a_training_that_is_interrupted_again_and_again_is_closed(
    tmp_path, workers, signals, status
):
    process = server().Process(target=demo, args=(tmp_path, ["--workers", str(workers)]))
    process.start()
    end = time.monotonic() + PATIENCE
    while len({*tmp_path.glob("runs/demo-quick/*/checkpoint.pt")}) < workers:
        assert time.monotonic() < end and process.is_alive(), said(tmp_path)
        time.sleep(0.02)
    for number in signals:  # as a terminal does: to all processes at once
        os.killpg(process.pid, number)
        time.sleep(0.01)
    process.join(PATIENCE)
    errors = said(tmp_path)
    assert (process.exitcode, errors.count("\n")) == (status, 1), errors
    assert errors.startswith("biasshift: interrupted. Finished runs are complete")
    states = run_states(tmp_path / "runs")["state"].tolist()
    assert states == ["interrupted"] * workers
    assert not [path for path in tmp_path.rglob("*") if path.name.endswith(".tmp")]


def said(folder: Path) -> str:
    path = folder / "errors.txt"
    return path.read_text(encoding="utf-8") if path.exists() else ""


@pytest.mark.skipif(os.name == "nt", reason="signals of Unix")
def test_the_command_itself_ends_without_a_traceback(tmp_path):
    """From its first line to its last: also while it imports PyTorch."""
    command = [sys.executable, "-m", "biasshift", "demo", "--quick", "--device", "cpu"]
    process = subprocess.Popen(
        command,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    end = time.monotonic() + PATIENCE
    while not [*tmp_path.glob("runs/demo-quick/*/config.json")]:
        assert time.monotonic() < end and process.poll() is None, process.communicate()
        time.sleep(0.02)
    for _ in range(3):
        os.killpg(process.pid, signal.SIGINT)
        time.sleep(0.01)
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130 and errors.count("\n") == 1, errors


# -- the handler -----------------------------------------------------------------------------------


@pytest.fixture
def interruption():
    with _sigint.interruptible() as found:
        yield found


def test_the_second_is_ignored_while_the_first_is_handled(interruption):
    closed = []
    with pytest.raises(KeyboardInterrupt):
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            signal.raise_signal(signal.SIGINT)
            try:
                raise ValueError("an error while the run is closed")
            except ValueError:
                signal.raise_signal(signal.SIGINT)
            closed.append(True)
    assert closed and interruption.status == 143


def test_one_that_was_lost_does_not_make_the_next_ineffective(interruption):
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    assert interruption.status == 130


def test_who_has_waited_long_enough_ends_it(interruption, monkeypatch):
    ended = []
    monkeypatch.setattr(_sigint.os, "_exit", ended.append)
    monkeypatch.setattr(_sigint, "IMPATIENT_SECONDS", -1.0)
    try:
        signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt:
        signal.raise_signal(signal.SIGTERM)
    assert ended == [143]


def test_handlers_are_put_back_and_those_of_others_stay():
    names = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in names]
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    try:
        with _sigint.interruptible():
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            assert isinstance(signal.getsignal(signal.SIGTERM), _sigint.Interruption)
    finally:
        signal.signal(signal.SIGHUP, before[2])
    assert [signal.getsignal(number) for number in names] == before


# -- commands that write files ---------------------------------------------------------------------


def record(folder: Path) -> Path:
    with Run.create(folder, {"activation": "elu", "seed": 0}) as run:
        run.append(pd.DataFrame({"step": [0, 1], "train_loss": [2.0, 1.0]}))
    return folder


@pytest.mark.parametrize("moment", ["fsync", "replace"])
@pytest.mark.parametrize("command", ["report", "figure"])
def test_a_command_that_is_interrupted_leaves_the_file_that_was_there(
    tmp_path, capsys, monkeypatch, command, moment
):
    record(tmp_path / "runs" / "elu-0")
    if command == "report":
        words, path = ["report", str(tmp_path / "runs"), "--out"], tmp_path / "page.html"
        words.append(str(path))
    else:
        words, path = ["figure", "1", "--out", str(tmp_path)], tmp_path / "figure_1.png"
    path.write_text("earlier")
    there = sorted(tmp_path.iterdir())

    def interrupt(*_: object) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(os, moment, interrupt)
    with pytest.raises(SystemExit) as end:
        cli.main(words)
    monkeypatch.undo()
    said = capsys.readouterr().err
    assert (
        end.value.code == 130 and said.count("\n") == 1 and "interrupted. Files are whole" in said
    )
    assert path.read_text() == "earlier" and sorted(tmp_path.iterdir()) == there


def test_a_page_is_whole_behind_an_interruption(tmp_path):
    record(tmp_path / "runs" / "elu-0")
    page = report([tmp_path / "runs"], tmp_path / "page.html")
    assert page.read_text(encoding="utf-8").endswith("</html>\n")
