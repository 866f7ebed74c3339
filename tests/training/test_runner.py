"""Runs that are killed, interrupted, damaged or lost.

A run that is resumed ends as if nothing had happened, and nothing else is touched.
"""

import copy
import json
import multiprocessing
import os
import pickle
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import nn

from biasshift.data import TensorStream, digits
from biasshift.optim import UnitNaturalGradient
from biasshift.precision import Precision
from biasshift.runs.integrity import file_digest, sealed, unsealed
from biasshift.runs.reader import read_run, run_states
from biasshift.runs.writer import Run
from biasshift.training import Diverged, evaluate, trial_run
from biasshift.training.checkpoint import CHECKPOINT
from biasshift.training.process_pool import run_jobs
from biasshift.training.runner import run
from biasshift.training.trial import Exam, Execution, Exist, Phase, ProbeSchedule, Progress, Trial

TESTS = Path(__file__).parents[1]
PATIENCE = 60  # seconds, for a machine that is busy with something else
EXAMPLES, BATCH, EPOCH_STEPS = 230, 32, 8  # the last minibatch of an epoch has 6 examples
STEPS, SCORE_EVERY = 26, 3  # neither divides an epoch, nor each other
# a checkpoint whenever there may be one
KEEP = Execution(checkpoint_seconds=0.0, keep_weights=True)


@dataclass(frozen=True)
class Config:
    """What the run folder records."""

    kind: str
    seed: int = 0
    lr: float = 0.05


def network(seed: int = 0) -> nn.Sequential:
    """Chance in every forward pass, and buffers."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(64, 12), nn.ELU(), nn.BatchNorm1d(12), nn.Dropout(0.3), nn.Linear(12, 10)
        )


def sgd(model: nn.Module, parameters: Iterator[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=1.0, momentum=0.9, weight_decay=1e-3)


def natural(model: nn.Module, parameters: Iterator[nn.Parameter]) -> torch.optim.Optimizer:
    """Labels drawn by a generator of its own; curvature that is measured every five steps."""
    return UnitNaturalGradient(
        model,
        lr=1.0,
        momentum=0.5,
        damping=0.1,
        update_every=5,
        generator=torch.Generator().manual_seed(3),
    )


def enter(model: nn.Module, phase: Phase) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.3 * phase.factor


def rows(model: nn.Module, step: int, name: str) -> pd.DataFrame:
    total = sum(p.detach().double().abs().sum().item() for p in model.parameters())
    return pd.DataFrame([{"step": step, name: total}])


def make(kind: str = "dropout", config: Config | None = None) -> Trial:
    """A run with everything.

    It has momentum, dropout, phases, probes with labels drawn by a generator, an examination, and
    measurements at the end.
    """
    data = digits()
    x, y = data.x_train[:EXAMPLES], data.y_train[:EXAMPLES]
    config = config or Config(kind)
    generator = torch.Generator().manual_seed(5)
    sampled = {
        "labels": "sampled",
        "generator": generator,
        "units": list(range(4)),
        "layers": ["0", "4"],
    }
    return Trial(
        config,
        network(config.seed),
        natural if kind == "natural" else sgd,
        TensorStream(x, y, BATCH, config.seed),
        STEPS,
        (Phase(1, config.lr), Phase(14, config.lr / 5, factor=2.0)),
        score=lambda model: dict(
            zip(("train_loss", "train_error"), evaluate(model, x, y), strict=True)
        ),
        score_every=SCORE_EVERY,
        schedules=[
            ProbeSchedule((x[:40], y[:40]), 7, ("activations", "bias_shift")),
            ProbeSchedule((x[40:140], y[40:140]), 10, ("fisher", "gap"), sampled),
        ],
        exam=Exam(
            4,
            1.2,
            lambda model: evaluate(model, x, y)[0],
            lambda model, step: rows(model, step, "exam"),
        ),
        enter=enter,
        at_end=lambda model, step: rows(model, step, "closing"),
    )


def ignore(report: Progress) -> None: ...


def go(
    folder: Path,
    exist: Exist = "refuse",
    trial: Trial | None = None,
    execution: Execution = KEEP,
    report=ignore,
) -> None:
    run([trial or make()], [folder], exist, report, execution)


def canonical(folder: Path) -> pd.DataFrame:
    """All rows and columns but the seconds, in an order that does not depend on the segments."""
    table = read_run(folder).drop(columns=["seconds", "run"]).astype({"layer": str})
    table = table[sorted(table)]
    return table.sort_values(list(table)).reset_index(drop=True)


def checkpoint(folder: Path) -> dict[str, Any]:
    return torch.load(folder / CHECKPOINT, weights_only=True)


def same(one: Any, two: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    return (
        all(map(same, one, two)) and len(one) == len(two)
        if isinstance(one, list | tuple)
        else one == two
    )


def assert_same_run(folder: Path, expected: Path) -> None:
    """Every number of the table, the weights, and all else that a run is resumed from."""
    pd.testing.assert_frame_equal(canonical(folder), canonical(expected), check_exact=True)
    found, wanted = checkpoint(folder), checkpoint(expected)
    for name in ("step", "model", "optimizer", "random", "labels", "examined"):
        assert same(found[name], wanted[name]), name
    assert json.loads((folder / "state.json").read_text())["state"] == "finished"


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Callable[[str], Path]:
    """kind → the folder of a run that nothing has happened to. One checkpoint, at the end."""
    folders: dict[str, Path] = {}

    def made(kind: str) -> Path:
        if kind not in folders:
            folders[kind] = tmp_path_factory.mktemp("uninterrupted") / "run"
            go(folders[kind], trial=make(kind), execution=replace(KEEP, checkpoint_seconds=1000.0))
        return folders[kind]

    return made


def files(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()}


def test_the_uninterrupted_run_has_everything(uninterrupted):
    """Or the tests below would say little."""
    table = read_run(uninterrupted("dropout"))
    for column in (
        "total",
        "s",
        "cos_gradient",
        "exam",
        "closing",
        "train_loss",
        "batch_loss",
        "inputs",
    ):
        assert table[column].notna().any(), column
    exam = table[table["exam"].notna()]["step"].item()
    assert 10 < exam < STEPS and exam % 4 == 0
    scores = table[table["train_loss"].notna()]["step"].tolist()
    assert scores == [*range(0, STEPS, SCORE_EVERY), STEPS]
    assert sorted(set(table[table["s"].notna()]["step"])) == [0, 10, 20]
    assert sorted(set(table[table["total"].notna()]["step"])) == [7, 14, 21]
    weights = checkpoint(uninterrupted("dropout"))["model"]
    assert not torch.equal(weights["0.weight"], network().state_dict()["0.weight"])


# -- kills -----------------------------------------------------------------------------------------


def work(kind: str, folder: Path) -> None:
    """What the process does that is killed."""
    torch.set_num_threads(1)
    go(folder, "resume", make(kind))


@pytest.fixture(scope="module")
def context() -> Iterator[Any]:
    """Processes forked from a server that has imported this module: many can be killed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(TESTS.parent), str(TESTS)]))
        patch.setenv("OMP_NUM_THREADS", "1")
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(
            [
                "pyarrow.parquet",
                "sklearn.datasets",
                "torch._dynamo",
                "torch.distributed",
                "test_runner",
            ]
        )
        yield context


def wait_for_writes(process: Any, folder: Path, count: int) -> None:
    """Waits until a folder has changed so many times, or the process has ended."""

    end = time.monotonic() + PATIENCE
    for _ in range(count):
        before = listing(folder)
        while listing(folder) == before and process.is_alive():
            assert time.monotonic() < end, f"nothing is written into {folder}"
            time.sleep(0.001)


def listing(folder: Path) -> list[tuple[str, int]]:
    """Names and times of the files, which come and go while they are listed."""
    while folder.exists():
        try:
            with os.scandir(folder) as entries:
                return sorted((entry.name, entry.stat().st_mtime_ns) for entry in entries)
        except FileNotFoundError:
            continue
    return []


@pytest.mark.parametrize("kind", ["dropout", "natural"])
def test_a_run_that_is_killed_again_and_again_ends_as_if_nothing_had_happened(
    kind, tmp_path, context, uninterrupted
):
    """Kills come a random moment after something was written.

    They hit while steps are made, files written, or earlier ones deleted.
    """
    chance, folder, kills, steps = random.Random(kind), tmp_path / "run", 0, set()
    while True:
        process = context.Process(target=work, args=(kind, folder))
        process.start()
        if kills < 6:
            wait_for_writes(process, folder, chance.randint(1, 30))
            time.sleep(chance.uniform(0, 0.03))
            process.kill()
        process.join(PATIENCE)
        if process.exitcode == 0:
            break
        assert process.exitcode == -9, "the run must end by itself, or be killed"
        kills += 1
        if (folder / "config.json").exists():
            (state,) = run_states(folder)["state"]
            if state == "finished":  # killed when all was written, before the process ended
                break
            assert state == "running"
            steps.update(read_run(folder)["step"].tail(1))
    assert kills >= 3 and steps, f"killed {kills} times, at steps {steps}"
    assert_same_run(folder, uninterrupted(kind))


# -- interruptions ---------------------------------------------------------------------------------


class Tripwire:
    """Counts events by their kind, and interrupts at one occurrence of one kind."""

    def __init__(self, kind: str = "", occurrence: int = 0):
        self.at, self.counts = (kind, occurrence), Counter()

    def __call__(self, kind: str) -> None:
        self.counts[kind] += 1
        if (kind, self.counts[kind]) == self.at:
            raise KeyboardInterrupt

    def around(self, kind: str, function: Callable) -> Callable:
        def wrapped(*args, **kwargs):
            self(f"before {kind}")
            result = function(*args, **kwargs)
            self(f"after {kind}")
            return result

        return wrapped


def interrupted_run(folder: Path, tripwire: Tripwire, exist: Exist = "refuse") -> None:
    trial = make()
    exam = trial.exam
    assert exam is not None and trial.at_end is not None
    optimizer_of = trial.make_optimizer

    def make_optimizer(model, parameters):
        optimizer = optimizer_of(model, parameters)
        optimizer.step = tripwire.around("a step", optimizer.step)
        return optimizer

    trial = replace(
        trial,
        make_optimizer=make_optimizer,
        loss=tripwire.around("a loss", trial.loss),
        score=tripwire.around("a score", trial.score),
        enter=tripwire.around("a phase", trial.enter),
        exam=replace(
            exam,
            loss=tripwire.around("an exam loss", exam.loss),
            examine=tripwire.around("the examination", exam.examine),
        ),
        at_end=tripwire.around("the end", trial.at_end),
    )
    with pytest.MonkeyPatch.context() as patch:
        usual = tripwire.around("os.replace", os.replace)
        checkpoints = tripwire.around("the checkpoint's os.replace", usual)

        def replace_file(source, target):
            (checkpoints if Path(target).name == CHECKPOINT else usual)(source, target)

        patch.setattr(os, "replace", replace_file)
        patch.setattr(os, "fsync", tripwire.around("os.fsync", os.fsync))
        patch.setattr(Path, "unlink", tripwire.around("Path.unlink", Path.unlink))
        patch.setattr(torch, "save", tripwire.around("torch.save", torch.save))
        patch.setattr(Run, "flush", tripwire.around("a flush", Run.flush))
        patch.setattr(
            trial_run, "instrument", tripwire.around("the instruments", trial_run.instrument)
        )
        go(folder, exist, trial, report=lambda report: tripwire("a report"))


def around(occurrence: int, *kinds: str) -> list[tuple[str, int]]:
    """The moments before and after one occurrence of each kind."""
    return [(f"{when} {kind}", occurrence) for kind in kinds for when in ("before", "after")]


FILES = ("os.fsync", "os.replace")
SAVING = ("torch.save", "the checkpoint's os.replace")
# What happens, in the order of a run. Each time the run is resumed, and interrupted at the next one
# of these moments.
CHAINS = {
    "before anything is on disk": [*around(1, *FILES), *around(2, *FILES), *around(3, *FILES)],
    "at the beginning": [
        *around(1, "the instruments", "a phase", "a loss", "a step", "an exam loss"),
        ("before the instruments", 2),
        *around(1, "a score"),
        ("a report", 1),
        ("before a step", 2),
    ],
    "around a checkpoint": [*around(1, "a flush", *SAVING), *around(2, "a flush", *SAVING)],
    "while files are written": [*around(4, *FILES), *around(5, *FILES), *around(8, *FILES)],
    "at the examination and the end": [
        *around(1, "the examination", "the end"),
        *around(1, "a flush", *FILES),
    ],
    "behind the last checkpoint": [
        ("after the end", 1),
        *around(1, *SAVING, "a flush"),
        *around(2, "a flush"),
    ],
}


@pytest.mark.parametrize("chain", CHAINS)
def test_a_run_that_is_interrupted_again_and_again_ends_as_if_nothing_had_happened(
    tmp_path, chain, uninterrupted
):
    for kind, occurrence in CHAINS[chain]:
        random_state = torch.get_rng_state()
        with pytest.raises(KeyboardInterrupt):
            interrupted_run(tmp_path / "run", Tripwire(kind, occurrence), "resume")
            pytest.fail(f"the run came to its end without '{kind}', number {occurrence}")
        assert torch.equal(torch.get_rng_state(), random_state)
    go(tmp_path / "run", "resume")
    assert_same_run(tmp_path / "run", uninterrupted("dropout"))


@pytest.mark.parametrize("occurrence", [1, 2])
def test_a_replacement_that_is_interrupted_leaves_a_run_that_begins_anew(
    tmp_path, occurrence, uninterrupted
):
    """The checkpoint is deleted first: what is left of the earlier run must not be resumed.

    That run differs from this one in nothing but its rate.
    """
    folder = Path(shutil.copytree(uninterrupted("dropout"), tmp_path / "run"))
    (folder / "config.json").write_text(
        (folder / "config.json").read_text().replace("0.05", "0.02")
    )
    (folder / "state.json").write_text('{"state": "interrupted"}')
    with pytest.raises(KeyboardInterrupt):
        interrupted_run(folder, Tripwire("after Path.unlink", occurrence), "replace")
    with pytest.raises(ValueError, match=r"lr = 0\.02"):
        go(folder, "resume")
    reports: list[Progress] = []
    go(folder, "resume", make(config=Config("dropout", lr=0.02)), report=reports.append)
    assert reports[0].step <= SCORE_EVERY and read_run(folder)["step"].min() == 0


# -- runs that are not resumed ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("interrupted") / "run"
    with pytest.raises(KeyboardInterrupt):
        interrupted_run(folder, Tripwire("before a loss", 15))
    return folder


@pytest.fixture
def half(interrupted, tmp_path) -> Path:
    """A run that was interrupted in its 15th step, behind its fourth checkpoint."""
    return Path(shutil.copytree(interrupted, tmp_path / "run"))


def test_an_interrupted_run_says_so_and_keeps_its_rows(half):
    states = run_states(half)
    assert states["state"].tolist() == ["interrupted"] and states["last_step"].tolist() == [12]
    assert read_run(half)["step"].max() == 12 and checkpoint(half)["step"] == 12


def test_a_resumed_run_that_is_interrupted_at_once_still_knows_its_step(half):
    with pytest.raises(KeyboardInterrupt):
        interrupted_run(half, Tripwire("before a loss", 1), "resume")
    assert run_states(half)["last_step"].tolist() == [12]


def test_a_resumed_run_without_keep_weights_leaves_no_checkpoint(half):
    go(half, "resume", execution=replace(KEEP, keep_weights=False))
    assert not (half / CHECKPOINT).exists()
    assert run_states(half)["state"].tolist() == ["finished"]


def test_a_finished_run_is_not_touched(uninterrupted, tmp_path):
    folder, reports = uninterrupted("dropout"), []
    before = files(folder)
    go(folder, "resume", execution=replace(KEEP, keep_weights=False), report=reports.append)
    assert files(folder) == before
    # It counts in the progress.
    assert [(report.step, report.steps) for report in reports] == [(STEPS, STEPS)]


@pytest.mark.parametrize(
    ("finished", "name", "value"), [(False, "seed", 1), (True, "lr", 0.2), (False, "kind", "other")]
)
def test_a_run_of_another_configuration_is_refused_with_its_name(
    half, uninterrupted, finished, name, value
):
    folder = uninterrupted("dropout") if finished else half
    before = files(folder)
    with pytest.raises(
        ValueError, match=f"holds a run with {name} = .*and this one has {value!r}"
    ) as caught:
        go(folder, "resume", make(config=replace(Config("dropout"), **{name: value})))
    assert "--out" in str(caught.value) and "\n" not in str(caught.value)
    assert files(folder) == before


def test_a_run_that_is_there_is_refused_and_replaced(half, uninterrupted):
    before = files(half)
    with pytest.raises(FileExistsError, match="already holds a run"):
        go(half)
    assert files(half) == before
    go(half, "replace")
    assert_same_run(half, uninterrupted("dropout"))


def test_a_lost_segment_is_named(half):
    (half / "segment-00001.parquet").unlink()
    with pytest.raises(ValueError, match=r"has lost segment 1\. Give --replace"):
        go(half, "resume")


class Bomb:
    """A pickle that would leave a file behind when it is read."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


def damage(path: Path, how: str, mark: Path) -> None:
    content = path.read_bytes()
    good = torch.load(path, weights_only=True)
    if how == "empty":
        path.write_bytes(b"")
    elif how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif how == "without its end":
        path.write_bytes(content[:-100])
    elif how == "noise":
        path.write_bytes(random.Random(0).randbytes(2000))
    elif how == "a pickle that executes":
        path.write_bytes(pickle.dumps(Bomb(mark)))
    elif how == "a checkpoint that executes":
        torch.save({**good, "optimizer": Bomb(mark)}, path)
    elif how == "a tensor":
        torch.save(torch.zeros(3), path)
    elif how == "a whole network":
        torch.save(network(), path)
    elif how.startswith("without "):
        torch.save(
            {name: value for name, value in good.items() if name != how.removeprefix("without ")},
            path,
        )
    elif how.startswith("nonsense in "):
        torch.save({**good, how.removeprefix("nonsense in "): {"0": {"state": "nonsense"}}}, path)
    elif how == "another network":
        torch.save({**good, "model": nn.Linear(3, 2).state_dict()}, path)
    elif how == "another optimizer":
        torch.save(
            {**good, "optimizer": torch.optim.Adam(nn.Linear(3, 2).parameters()).state_dict()}, path
        )
    elif how == "two processes":
        torch.save({**good, "random": {"0": good["random"]["0"], "1": good["random"]["0"]}}, path)
    elif how == "a link":
        path.rename(mark.with_name("elsewhere.pt"))
        path.symlink_to(mark.with_name("elsewhere.pt"))
    else:
        path.unlink()
        os.mkfifo(path) if how == "a pipe" else path.mkdir()


UNREADABLE = [
    "empty",
    "truncated",
    "without its end",
    "noise",
    "a pickle that executes",
    "a checkpoint that executes",
    "a whole network",
]
WRONG = [
    "a tensor",
    "without step",
    "without model",
    "without labels",
    "nonsense in step",
    "nonsense in segments",
    "nonsense in examined",
]
UNFIT = [
    "nonsense in model",
    "nonsense in optimizer",
    "nonsense in random",
    "another network",
    "another optimizer",
]
MESSAGES = {
    **dict.fromkeys(
        UNREADABLE, "cannot be read as a checkpoint: start this run anew with --replace"
    ),
    **dict.fromkeys(
        WRONG, "is not a checkpoint of a training run: start this run anew with --replace"
    ),
    **dict.fromkeys(
        UNFIT,
        "belongs to another network or optimizer: choose another --out, or start this run anew",
    ),
    "two processes": "was started by 2 processes and cannot be resumed by 1: start 2",
    "a link": "is a link out of its run",
    "a pipe": "is missing or not an ordinary file",
    "a folder": "is missing or not an ordinary file",
}


def list_checkpoint(folder: Path) -> None:
    """Makes the file that lies there the one that the run has written."""
    value, _ = unsealed(json.loads((folder / "state.json").read_text()))
    with open(folder / CHECKPOINT, "rb") as file:
        value["checkpoints"] = [file_digest(file)]
    (folder / "state.json").write_text(json.dumps(sealed(value)))


@pytest.mark.parametrize("how", [*WRONG, *UNFIT, "two processes"])
def test_a_checkpoint_that_the_run_has_not_written_is_refused(half, tmp_path, how):
    damage(half / CHECKPOINT, how, tmp_path / "executed")
    with pytest.raises(ValueError, match=r"checkpoint\.pt' is damaged .*rows of the run are good"):
        go(half, "resume")


@pytest.mark.parametrize("how", MESSAGES)
def test_a_checkpoint_that_cannot_be_resumed_from_is_refused_on_one_line(half, tmp_path, how):
    mark = tmp_path / "executed"
    damage(half / CHECKPOINT, how, mark)
    if how in {*WRONG, *UNFIT, "two processes"}:
        list_checkpoint(half)
    table = read_run(half)
    with pytest.raises(ValueError, match=MESSAGES[how]) as caught:
        go(half, "resume")
    assert "\n" not in str(caught.value) and f"'{half}" in str(caught.value)
    assert not mark.exists(), "the checkpoint was executed"
    pd.testing.assert_frame_equal(read_run(half), table)


def test_a_damaged_checkpoint_can_be_replaced(half, uninterrupted):
    (half / CHECKPOINT).write_bytes(b"")
    go(half, "replace")
    assert_same_run(half, uninterrupted("dropout"))


# -- runs that are lost ----------------------------------------------------------------------------


def test_a_run_that_diverges_keeps_its_rows_and_fails_again_when_it_is_resumed(tmp_path):
    trial = make(config=Config("dropout", lr=1e30))
    trial = replace(trial, schedules=[], phases=(Phase(1, 0.01), Phase(12, 1e30)))
    state = torch.get_rng_state()
    for exist in ("refuse", "resume"):
        with pytest.raises(
            Diverged, match=r"at step 1[3-6]: training diverged; lower the learning rate"
        ):
            go(tmp_path / "run", exist, copy.deepcopy(trial))
        assert run_states(tmp_path)["state"].tolist() == ["failed"]
        assert read_run(tmp_path / "run")["train_loss"].dropna().iloc[:4].between(0, 4).all()
    assert torch.equal(torch.get_rng_state(), state)


def test_the_global_random_state_does_not_matter_and_is_left_as_found(tmp_path, uninterrupted):
    with torch.random.fork_rng([]):
        torch.manual_seed(99)
        state = torch.get_rng_state()
        go(tmp_path / "run")
        assert torch.equal(torch.get_rng_state(), state)
    assert_same_run(tmp_path / "run", uninterrupted("dropout"))


def test_reports_say_how_far_a_run_is(tmp_path):
    reports: list[Progress] = []
    go(tmp_path / "run", report=reports.append)
    steps = [report.step for report in reports]
    assert (
        set(range(SCORE_EVERY, STEPS, SCORE_EVERY)) < set(steps)
        and steps == sorted(steps)
        and steps[-1] == STEPS
    )
    assert {(report.run, report.steps) for report in reports} == {("run", STEPS)}
    assert all(0 < report.loss < 10 for report in reports)


def test_phases_change_the_learning_rate_and_enter_the_network_once(tmp_path):
    """Also of a resumed network: the phase that it was in is entered."""
    entered: list[tuple[int, float]] = []
    trial = make()
    rates: list[float] = []

    def make_optimizer(model, parameters):
        optimizer = sgd(model, parameters)
        optimizer.register_step_pre_hook(
            lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"])
        )
        return optimizer

    def noted(model: nn.Module, phase: Phase) -> None:
        entered.append((len(rates), phase.factor))
        enter(model, phase)

    go(tmp_path / "run", trial=replace(trial, make_optimizer=make_optimizer, enter=noted))
    assert rates == [0.05] * 13 + [0.01] * (STEPS - 13)
    assert entered == [(0, 1.0), (13, 2.0)]


# -- products of float32 ---------------------------------------------------------------------------


FLAGS = (
    "backends",
    "backends.cuda.matmul",
    "backends.cudnn.conv",
    "backends.cudnn.rnn",
    "backends.mkldnn.matmul",
)


def rounding() -> list[str]:
    """The process's flags, of every kind of product."""
    return [attrgetter(name)(torch).fp32_precision for name in FLAGS]


def set_one(name: str, value: str) -> None:
    if name == "older":
        torch.set_float32_matmul_precision(value)
    else:
        attrgetter(name)(torch).fp32_precision = value


def noting(precision: Precision, folder: Path, notes: list[Any]) -> None:
    """A run whose every step notes for which products TF32 is allowed, by both kinds of flags."""

    def loss(outputs, y):
        # The older flags raise where they differ from the newer ones.
        older = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
        newer = [value == "tf32" for value in rounding()[1:]]
        notes.append([torch.get_float32_matmul_precision(), *older, *newer])
        return nn.functional.cross_entropy(outputs, y)

    go(
        folder,
        trial=replace(make(), loss=loss, schedules=[], exam=None),
        execution=Execution(precision),
    )


def noting_job(precision: Precision, folder: Path, report: Callable[[Any], None]) -> None:
    notes: list[Any] = []
    noting(precision, folder, notes)
    report((precision, notes[-1]))


NOTED = {
    "tf32": ["high", True, True, True, True, True, False],  # False: products on the CPU
    "float32": ["highest", *6 * [False]],
}


@pytest.mark.parametrize(
    "state",
    [
        None,
        ("older", "medium"),
        ("older", "high"),
        ("backends", "tf32"),
        ("backends.cudnn.conv", "ieee"),
        ("backends.cuda.matmul", "tf32"),
    ],
)
@pytest.mark.parametrize("precision", NOTED)
def test_products_are_rounded_as_a_run_says_and_the_process_is_left_as_found(
    tmp_path, precision, state
):
    notes, original = [], rounding()
    try:
        if state is not None:
            set_one(*state)
        before = rounding()
        noting(precision, tmp_path / "run", notes)
        assert len(notes) == STEPS and all(note == NOTED[precision] for note in notes)
        assert rounding() == before
        with pytest.raises(KeyboardInterrupt):
            interrupted_run(tmp_path / "other", Tripwire("before a step", 2), "refuse")
        assert rounding() == before
    finally:
        torch.set_float32_matmul_precision("highest")
        for name, value in zip(FLAGS, original, strict=True):
            set_one(name, value)
    assert rounding() == original


def test_products_are_rounded_as_a_run_says_in_every_worker(tmp_path):
    noted: list[Any] = []
    run_jobs([(noting_job, (name, tmp_path / name)) for name in NOTED], 2, noted.append)
    assert dict(noted) == NOTED
