"""Runs by engines of other machines: the same tables, also where a worker is killed in the middle.

Each engine runs on this machine: processes of our own, submitit's local executor, dask's local
cluster, a local Ray.
"""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from threading import Lock
from typing import Any, ClassVar

import pandas as pd
import pytest
from tiny import EPOCH_STEPS, Tiny

from biasshift.cli import main, train
from biasshift.data import DataSet
from biasshift.experiments.mlp_trial import MlpConfig
from biasshift.experiments.sweep import Sweep
from biasshift.runs.ownership import Ownership
from biasshift.runs.reader import read_runs, run_states
from biasshift.runs.schema import read_json
from biasshift.runs.writer import Run
from biasshift.training import clusters, launchers
from biasshift.training.engine import Engine, WorkerDied, WorkerDiedWarning, portable
from biasshift.training.launchers import LAUNCHERS, checked, launch
from biasshift.training.process_pool import ProcessPool, run_jobs
from biasshift.training.trial import Progress, Trial

PATIENCE = 120  # seconds, for a machine that is busy with something else
MODULES = {"slurm": "submitit", "dask": "distributed", "ray": "ray"}
OPTIONS = {"slurm": ["cluster=local"]}


# -- jobs: functions of this module, because workers import them -----------------------------------


@dataclass(frozen=True, kw_only=True)
class Killed(Tiny):
    """Kills the process that trains one of its runs, at the second score behind its beginning."""

    killed: str = "elu"
    epochs: int = 2
    checkpoint_seconds: float = 0.0

    name: ClassVar[str] = "killed"

    def trial(self, config: MlpConfig, data: DataSet) -> Trial:
        made = super().trial(config, data)
        scores = self.out / f"{config.activation}.scores"

        def score(model: Any) -> dict[str, float]:
            with scores.open("a") as file:
                file.write("*")
            if config.activation == self.killed and len(scores.read_text()) == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            return made.score(model)

        return replace(made, score=score)


def fail(report: Callable[[Progress], None]) -> None:
    report(Progress("failing", 1, 2, 0.5))
    raise ValueError("this job was planted to fail")


class Unportable(Exception):
    def __init__(self):
        super().__init__("planted error")
        self.lock = Lock()


def fail_unportably(report: Callable[[Progress], None]) -> None:
    raise Unportable()


def linger(folder: Path, report: Callable[[Progress], None]) -> None:
    """A run that ends only when it is interrupted."""
    with Run.create(folder, {"seed": 0}):
        folder.with_suffix(".begun").touch()
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            time.sleep(0.01)


def touch(path: Path, report: Callable[[Progress], None]) -> None:
    path.touch()


# -- engines ---------------------------------------------------------------------------------------


SLOW = {"slurm", "dask", "ray"}  # to start


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in LAUNCHERS
    ],
)
def engine(request, tmp_path_factory) -> Iterator[Engine]:
    """Two workers; one engine for all its tests, because they take seconds to start."""
    name = request.param
    if name in MODULES and find_spec(MODULES[name]) is None:
        pytest.skip(f"{MODULES[name]} is not installed: pip install 'biasshift[{name}]'")
    folder = tmp_path_factory.mktemp(name)
    start = launch(name, OPTIONS.get(name, []), 2, folder) or partial(ProcessPool, 2)
    with start() as engine:
        yield engine


def jobs_of(experiment: Tiny) -> list[Any]:
    """As the command makes them."""
    return [
        (
            partial(train.run_job, before=train._origins(experiment, [config])),
            (experiment, [config]),
        )
        for config in experiment.configs()
    ]


def table(folder: Path) -> pd.DataFrame:
    return read_runs(folder).drop(columns=["seconds"])


def test_a_worker_that_is_killed_is_run_again_and_goes_on_to_the_same_numbers(engine, tmp_path):
    reports: list[Progress] = []
    killed, alone = Killed(out=tmp_path / "killed"), Killed(out=tmp_path / "alone", killed="none")
    killed.out.mkdir()
    alone.out.mkdir()
    with pytest.warns(WorkerDiedWarning, match=r"its worker died \(.+\). This is attempt 2 of 3"):
        run_jobs(jobs_of(killed), 2, reports.append, lambda: nullcontext(engine))  # type: ignore[arg-type]
    run_jobs(jobs_of(alone), 1, reports.append)
    pd.testing.assert_frame_equal(table(killed.out), table(alone.out), check_exact=True)
    assert set(run_states(killed.out)["state"]) == {"finished"}
    # Steps 0 and 23, killed at 46; resumed at 23, and 46 again.
    scores = {path.stem: len(path.read_text()) for path in killed.out.glob("*.scores")}
    assert scores == {"elu": 4, "relu": 3}
    ends = {report.run for report in reports if report.step == 2 * EPOCH_STEPS == report.steps}
    assert ends == {"elu-0", "relu-0"}


def test_what_a_job_raises_comes_back_with_its_reports_and_its_traceback(engine):
    with pytest.raises(ValueError, match="planted to fail") as caught:
        engine.submit(fail).result(PATIENCE)
    assert "in fail\n" in "".join(caught.value.__notes__)
    assert engine.reports.get(timeout=PATIENCE) == Progress("failing", 1, 2, 0.5)
    with pytest.raises(RuntimeError, match="Unportable: planted error"):
        engine.submit(fail_unportably).result(PATIENCE)


def test_an_interruption_closes_the_runs_and_nothing_else_begins(engine, tmp_path):
    """The last test of an engine."""
    begun = [engine.submit(linger, tmp_path / name) for name in "ab"]
    for number in range(4):
        engine.submit(touch, tmp_path / f"never-{number}")
    end = time.monotonic() + PATIENCE
    while not all((tmp_path / f"{name}.begun").exists() for name in "ab"):
        assert time.monotonic() < end and not any(map(Future.done, begun))
        time.sleep(0.02)
    engine.interrupt()
    assert run_states(tmp_path)["state"].tolist() == ["interrupted"] * 2
    engine.close()
    assert not [*tmp_path.glob("never-*")]


@pytest.mark.slow
def test_the_command_makes_the_same_sweep_by_slurm(tmp_path, monkeypatch, capsys):
    pytest.importorskip("submitit")
    monkeypatch.chdir(tmp_path)
    words = "sweep --smoke --device cpu --activation elu --update plain --lr 0.01 0.1".split()
    words += ["--constant", "0", "--no-batch-norm", "--workers"]
    main([*words, "1", "--out", "here"])
    words += ["2", "--out", "there", "--launcher", "slurm", "--launcher-options", "cluster=local"]
    main(words)
    shown = capsys.readouterr().out
    assert "2 runs on cpu in 1 process → here" in shown and "2 runs by slurm → there" in shown
    pd.testing.assert_frame_equal(
        table(tmp_path / "here"), table(tmp_path / "there"), check_exact=True
    )
    one, two = (
        read_json(tmp_path / out / "elu-plain-lr0.1-0", "provenance.json", {})["command"]
        for out in ("here", "there")
    )
    assert one == two == sys.argv  # of the command, not of what the engine has started


# -- deaths ----------------------------------------------------------------------------------------


class Doomed(Engine):
    """Every worker dies."""

    sent = 0
    interrupted = False

    def submit(self, work: Callable[..., None], *arguments: Any) -> "Future[None]":
        self.sent += 1
        future: Future[None] = Future()
        future.set_exception(WorkerDied("SIGKILL"))
        return future

    def interrupt(self) -> None:
        self.interrupted = True

    def close(self) -> None: ...


def test_a_job_whose_workers_die_three_times_ends_the_command():
    engine = Doomed()
    with (
        pytest.warns(WorkerDiedWarning),
        pytest.raises(RuntimeError, match="died 3 times, at last by SIGKILL"),
    ):
        run_jobs([(touch, (Path("never"),))], 2, print, lambda: engine)
    assert (engine.sent, engine.interrupted) == (3, True)


def test_runs_of_an_earlier_attempt_are_resumed_and_others_replaced(tmp_path):
    """With --replace: a job that runs again must neither keep the old run nor drop the new one."""
    tiny = Tiny(out=tmp_path, activations=("elu",), replace=True)
    (config,) = tiny.configs()
    folder = tiny.folder(config)
    assert not train._begun(train._origins(tiny, [config]), train._origins(tiny, [config]))
    with Run.create(folder, config):
        pass
    before = train._origins(tiny, [config])
    assert not train._begun(before, train._origins(tiny, [config]))  # the old one: to be replaced
    (folder / "provenance.json").write_text("another")
    assert train._begun(before, train._origins(tiny, [config]))
    assert train._begun([b""], train._origins(tiny, [config]))
    assert not train._begun([b"", b"old"], [b"new", b"old"])  # of an ensemble, one was not begun


def test_a_folder_that_is_locked_is_waited_for(tmp_path):
    """For as long as the lock of a machine that is gone may stay."""
    tiny = Tiny(out=tmp_path, activations=("elu",), epochs=1, resume=True)
    (config,) = tiny.configs()
    tiny.folder(config).mkdir(parents=True)
    owner = Ownership(tiny.folder(config))
    start = time.monotonic()
    with pytest.raises(FileExistsError, match="is being written by process"):
        train.run_job(tiny, [config], lambda report: None)
    with pytest.raises(FileExistsError, match="is being written by process"):
        train.run_job(tiny, [config], lambda report: None, patience=0.5)
    assert time.monotonic() - start > 0.5
    owner.release()
    train.run_job(tiny, [config], lambda report: None, patience=0.5)
    assert run_states(tmp_path)["state"].tolist() == ["finished"]


def test_an_exception_that_cannot_travel_is_told():
    assert str(portable(Unportable())) == "Unportable: planted error"
    assert isinstance(portable(KeyError("a")), KeyError)


# -- options ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("launcher", "options", "says"),
    [
        ("local", ["time=5"], "of launcher 'local' must be left out, got 'time=5'"),
        ("slurm", ["queue=gpu"], "partition, time, gpus, cpus or cluster as KEY, each once, got"),
        ("slurm", ["time"], "must be KEY=VALUE"),
        ("slurm", ["time="], "must be KEY=VALUE"),
        ("slurm", ["time=5", "time=6"], "each once, got 'time=6'"),
        ("slurm", ["time=0"], "time must be a whole number of minutes of at least 1, got '0'"),
        ("slurm", ["time=1:00"], "whole number of minutes"),
        ("slurm", ["gpus=-1"], "gpus must be a whole number of at least 0, got '-1'"),
        ("slurm", ["cpus=²"], "cpus must be a whole number of at least 1, got '²'"),
        ("slurm", ["cluster=here"], "cluster must be slurm or local, got 'here'"),
        ("dask", ["workers=2"], "must be KEY=VALUE with address as KEY"),
        ("ray", ["time=5"], "must be KEY=VALUE with address as KEY"),
    ],
)
def test_a_wrong_option_is_refused(launcher, options, says):
    with pytest.raises(ValueError, match=says.replace("(", r"\(")):
        checked(launcher, options)


@pytest.mark.parametrize(("launcher", "module"), MODULES.items())
def test_a_missing_engine_says_what_to_install(monkeypatch, launcher, module):
    monkeypatch.setattr(launchers, "find_spec", lambda name: None if name == module else "there")
    with pytest.raises(ValueError, match=rf"pip install 'biasshift\[{launcher}\]'"):
        Sweep(launcher=launcher).check()


def test_slurm_needs_sbatch(monkeypatch):
    monkeypatch.setattr(launchers, "find_spec", lambda name: "there")
    monkeypatch.setattr(launchers, "which", lambda name: None)
    with pytest.raises(ValueError, match=r"needs Slurm's sbatch, .* cluster=local"):
        checked("slurm", [])
    assert checked("slurm", ["cluster=local"]) == {"cluster": "local"}
    monkeypatch.setattr(launchers, "which", lambda name: "/usr/bin/sbatch")
    assert checked("slurm", ["partition=a=b", "gpus=0"]) == {"partition": "a=b", "gpus": 0}


@pytest.mark.parametrize("launcher", ["dask", "ray"])
def test_an_address_where_nobody_listens_is_one_sentence(monkeypatch, tmp_path, launcher):
    pytest.importorskip(MODULES[launcher])
    monkeypatch.setattr(clusters, "CONNECT_SECONDS", 1)
    address = "tcp://127.0.0.1:9" if launcher == "dask" else "127.0.0.1:9"  # reserved
    start = launch(launcher, [f"address={address}"], None, tmp_path)
    with pytest.raises(ValueError, match=rf"address={address} must be that of a .+ which runs: "):
        start()


def test_torchrun_excludes_launchers(monkeypatch):
    monkeypatch.setattr(launchers, "find_spec", lambda name: "there")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="--launcher must be left out under torchrun"):
        Sweep(launcher="dask").check()


def test_paths_that_are_sent_are_absolute(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BIASSHIFT_DATA", "there")
    sent = Sweep(launcher="dask", replace=True).sent()
    assert (sent.out, sent.data) == (tmp_path / "runs" / "sweep", tmp_path / "there")
    assert sent.exist() == "replace" and sent.configs() == Sweep().configs()
