"""Two processes on one network against one process: the same weights, run folder and end.

This file is also the program that the processes run: ``python tests/training/test_processes.py
folder``, as torchrun starts it.
"""

import math
import os
import socket
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from tiny import Tiny, data
from torch import distributed as dist, nn

from biasshift.data import TensorStream
from biasshift.distributed import process_group, rank, world_size
from biasshift.experiments.mlp_trial import trial
from biasshift.optim import UnitNaturalGradient
from biasshift.runs.reader import read_run, run_states
from biasshift.training import Diverged, Gradient, train
from biasshift.training.checkpoint import CHECKPOINT
from biasshift.training.evaluation import evaluate_batches
from biasshift.training.runner import run
from biasshift.training.trial import Execution, Progress, Trial

ROOT = Path(__file__).parents[2]
WORLD, PATIENCE = 2, 90
# Shares of 6 and 5, and of 2 and 1 in the last minibatch of an epoch.
EXAMPLES, BATCH, STEPS = 47, 11, 23
KEEP = Execution(checkpoint_seconds=0.0, keep_weights=True)

# -- what the processes do, and what one process does alone ----------------------------------------


def examples(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(EXAMPLES, 6, generator=generator, dtype=torch.float64) + 1
    return x.to(dtype), (x @ torch.randn(6, 3, generator=generator, dtype=torch.float64)).argmax(1)


def network(dtype: torch.dtype) -> nn.Module:
    with torch.random.fork_rng([]):
        torch.manual_seed(1)
        return nn.Sequential(
            nn.Linear(6, 7), nn.ELU(), nn.Linear(7, 7), nn.ELU(), nn.Linear(7, 3)
        ).to(dtype)


def stream(dtype: torch.dtype) -> TensorStream:
    return TensorStream(*examples(dtype), BATCH, seed=0, rank=rank(), world=world_size())


def trained(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    model = network(dtype)
    update = Gradient(
        model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    )
    list(train(update, stream(dtype), steps=STEPS))
    return model.state_dict()


def natural(model: nn.Module, parameters: Iterator[nn.Parameter]) -> torch.optim.Optimizer:
    """Its curvature comes from the passes of all processes; labels that are drawn would differ."""
    return UnitNaturalGradient(
        model, lr=1.0, damping=0.1, momentum=0.5, labels="empirical", update_every=2
    )


def ignore(report: Progress) -> None: ...


def tiny(**options: Any) -> Trial:
    """A small run of the demo in float64: the shares add up in another order to nearly the same."""
    (config,) = Tiny(activations=("elu",), momentum=0.5, **options).configs()
    made = trial(config, data())
    probes = [
        replace(schedule, probe=(schedule.probe[0].double(), schedule.probe[1]))
        for schedule in made.schedules
    ]
    stream = replace(made.stream, x=made.stream.x.double())
    score = lambda model: {"norm": sum(p.square().sum().item() for p in model.parameters())}  # noqa: E731
    return replace(
        made,
        model=made.model.double(),
        stream=stream,
        schedules=probes,
        score=score,
        exam=None,
        at_end=None,
    )


def dropping() -> Trial:
    """Every process drops other units."""
    made = tiny()
    made.model.insert(2, nn.Dropout(0.3).train())  # type: ignore[operator]
    schedules = [
        replace(schedule, options={}, quantities=("activations", "bias_shift"))
        for schedule in made.schedules
    ]
    return replace(made, score_every=10, schedules=schedules)


def interrupted_at(number: int, made: Trial) -> Trial:
    scores = iter(range(1, 1000))

    def score(model: nn.Module) -> dict[str, float]:
        if next(scores) == number:
            raise KeyboardInterrupt
        return made.score(model)

    return replace(made, score=score)


def ends(work: Callable[[], object]) -> str:
    try:
        work()
    except (KeyboardInterrupt, Exception) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def lost_at(step: int, at_rank: int) -> Callable[[], object]:
    """A loss that is not finite in one process only."""
    calls = iter(range(1, 1000))

    def loss(outputs: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        bad = next(calls) == step and rank() == at_rank
        return outputs.mean() * 0 + (math.nan if bad else 1.0)

    model = network(torch.float32)
    return lambda: list(
        train(
            Gradient(model, torch.optim.SGD(model.parameters(), lr=0.1), loss),
            stream(torch.float32),
            steps=5,
        )
    )


def scenarios(folder: Path) -> dict[str, Any]:
    """The results of one process, by name."""
    x, y = examples(torch.float64)
    share = slice(rank(), None, world_size())
    model = network(torch.float64)
    found: dict[str, Any] = {
        "float64": trained(torch.float64),
        "float32": trained(torch.float32),
        "evaluated": evaluate_batches(
            model, lambda: zip(x[share].split(4), y[share].split(4), strict=True), top=(1, 5)
        ),
        "evaluated by one": evaluate_batches(
            model,
            lambda: (
                zip(x.split(4), y.split(4), strict=True) if rank() == world_size() - 1 else iter(())
            ),
        ),
        "no examples": ends(lambda: evaluate_batches(model, lambda: iter(()))),
        "lost in the first process": ends(lost_at(5, 0)),
        "lost in the last process": ends(lost_at(5, world_size() - 1)),
    }
    one = tiny()
    run([one], [folder / "tiny"], "refuse", ignore, KEEP)
    found["tiny"] = one.model.state_dict()
    other = tiny()
    other = replace(
        other,
        # Empirical errors must be those of the mean loss: in shares of one length they are.
        stream=replace(other.stream, drop_last=True),
        steps=40,
        make_optimizer=natural,
        schedules=[],
    )
    run([other], [folder / "natural"], "refuse", ignore)
    found["natural"] = other.model.state_dict()
    run([dropping()], [folder / "dropping"], "refuse", ignore, KEEP)
    for number in (1, 3, 2):
        made = interrupted_at(number, dropping())
        found[f"interrupted {number}"] = ends(
            lambda made=made: run([made], [folder / "resumed"], "resume", ignore, KEEP)
        )
    last = dropping()
    run([last], [folder / "resumed"], "resume", ignore, KEEP)
    found["resumed"] = last.model.state_dict()
    before = times(folder / "resumed") if rank() == 0 else {}
    run([dropping()], [folder / "resumed"], "resume", ignore, KEEP)
    found["untouched"] = rank() > 0 or before == times(folder / "resumed")
    found["stopped"] = ends(
        lambda: run([interrupted_at(3, dropping())], [folder / "stopped"], "refuse", ignore, KEEP)
    )
    return found


def times(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def work(folder: Path) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "lo0")
    with process_group(torch.device("cpu")):
        torch.save(scenarios(folder / "runs"), folder / f"{rank()}.pt")


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


@pytest.fixture(scope="module")
def together(tmp_path_factory) -> tuple[list[dict[str, Any]], Path]:
    """What both processes found, and their folder of runs."""
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("this PyTorch has no gloo")
    folder = tmp_path_factory.mktemp("processes")
    shared = {
        "WORLD_SIZE": str(WORLD),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(folder)], stderr=subprocess.PIPE, text=True,
            env={**os.environ, **shared, "RANK": str(number), "LOCAL_RANK": str(number),
                 "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])},
        )
        for number in range(WORLD)
    ]  # fmt: skip
    try:
        errors = [process.communicate(timeout=PATIENCE)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * WORLD, "\n".join(errors)
    return [
        torch.load(folder / f"{number}.pt", weights_only=True) for number in range(WORLD)
    ], folder / "runs"


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> tuple[dict[str, Any], Path]:
    """The same from one process."""
    folder = tmp_path_factory.mktemp("alone")
    return scenarios(folder), folder


# -- the same as one -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "tolerance"),
    [("float64", 1e-12), ("float32", 1e-6), ("tiny", 1e-12), ("natural", 1e-9)],
)
@pytest.mark.parametrize("number", range(WORLD))
def test_two_processes_train_the_network_of_one(together, alone, name, tolerance, number):
    """Minibatches and shares of uneven lengths; momentum, weight decay, and curvature from all
    passes.
    """
    found, expected = together[0][number][name], alone[0][name]
    assert found.keys() == expected.keys()
    for parameter, value in expected.items():
        torch.testing.assert_close(found[parameter], value, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ["float64", "float32", "tiny", "natural", "resumed"])
def test_the_processes_have_the_same_weights_to_the_last_digit(together, name):
    one, two = (found[name] for found in together[0])
    assert all(torch.equal(value, two[parameter]) for parameter, value in one.items())


def rows(folder: Path) -> pd.DataFrame:
    table = read_run(folder).drop(columns=["seconds", "run"]).astype({"layer": str})
    return table.sort_values(["step", "layer", "unit"], kind="stable").reset_index(drop=True)


def test_the_run_folder_is_that_of_one_process(together, alone):
    """Written once, by the first process: measurements of the probe, scores, and the mean loss of
    all shares.
    """
    found, expected = rows(together[1] / "tiny"), rows(alone[1] / "tiny")
    pd.testing.assert_frame_equal(found, expected, rtol=2e-6, atol=1e-7, check_like=True)
    assert (
        found[["mean", "total", "s", "cos_gradient", "norm", "batch_loss", "inputs"]]
        .notna()
        .any()
        .all()
    )
    np.testing.assert_allclose(
        found["batch_loss"].dropna(), expected["batch_loss"].dropna(), rtol=1e-12
    )


def test_there_is_one_set_of_folders_and_they_are_closed(together):
    folder = together[1]
    assert sorted(path.name for path in folder.iterdir()) == [
        "dropping",
        "natural",
        "resumed",
        "stopped",
        "tiny",
    ]
    states = run_states(folder).set_index("run")["state"].to_dict()
    assert states == {
        "dropping": "finished",
        "natural": "finished",
        "resumed": "finished",
        "stopped": "interrupted",
        "tiny": "finished",
    }
    assert (folder / "tiny" / CHECKPOINT).exists() and not (
        folder / "natural" / CHECKPOINT
    ).exists()


def test_scores_are_means_over_the_examples_of_all_processes(together, alone):
    for number in range(WORLD):
        for name in ("evaluated", "evaluated by one"):
            assert together[0][number][name] == pytest.approx(alone[0][name], rel=1e-12)
        assert (
            together[0][number]["no examples"]
            == alone[0]["no examples"]
            == "ValueError: An evaluation needs at least one example, got none."
        )


def test_a_loss_that_one_process_loses_ends_all_of_them(together, alone):
    """In the last step of an epoch, when nobody else would find it before the next."""
    for number in range(WORLD):
        for name in ("lost in the first process", "lost in the last process"):
            assert together[0][number][name] == alone[0][name] != "nothing"
    assert (
        f"{Diverged.__name__}: The loss became nan at step 5:"
        in alone[0]["lost in the last process"]
    )


# -- resuming --------------------------------------------------------------------------------------


def test_an_interrupted_run_of_two_processes_is_resumed_to_the_same_numbers(together, alone):
    """Every process has its own dropout: the random state of each is saved."""
    for found, folder in ((together[0][0], together[1]), (together[0][1], together[1]), alone):
        for number in (1, 2, 3):
            assert found[f"interrupted {number}"].startswith("KeyboardInterrupt")
        pd.testing.assert_frame_equal(
            rows(folder / "resumed"), rows(folder / "dropping"), check_exact=True
        )
        one, two = (
            torch.load(folder / name / CHECKPOINT, weights_only=True)
            for name in ("resumed", "dropping")
        )
        assert one["step"] == two["step"] and len(one["random"]) == (
            1 if folder == alone[1] else WORLD
        )
        for name, value in two["model"].items():
            assert torch.equal(one["model"][name], value) and torch.equal(
                found["resumed"][name], value
            )
        for number, state in two["random"].items():
            assert torch.equal(one["random"][number]["cpu"], state["cpu"])


def test_the_processes_draw_other_units(together, alone):
    found, expected = (
        rows(folder / "dropping")["batch_loss"].dropna() for folder in (together[1], alone[1])
    )
    assert len(found) == len(expected) and not np.allclose(found, expected, rtol=1e-4)


def test_finished_runs_are_not_touched(together):
    assert all(found["untouched"] for found in together[0])


def test_a_run_is_resumed_by_as_many_processes(together):
    with pytest.raises(
        ValueError, match="was started by 2 processes and cannot be resumed by 1: start 2"
    ):
        run([dropping()], [together[1] / "stopped"], "resume", ignore, KEEP)


# -- torchrun --------------------------------------------------------------------------------------


def test_torchrun_runs_the_demo_once(tmp_path):
    """Status 0, one set of folders, one voice."""
    out = tmp_path / "out"
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        str(WORLD),
        "--master-port",
        str(free_port()),
    ]
    command += ["-m", "biasshift", "demo", "--smoke", "--device", "cpu", "--out", str(out)]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in out.iterdir() if path.is_dir()) == [
        "elu-0",
        "lrelu-0",
        "relu-0",
        "srelu-0",
    ]
    assert set(run_states(out)["state"]) == {"finished"}
    assert done.stdout.count("Exact identities") == 1 and done.stdout.count("4 runs on cpu") == 1


if __name__ == "__main__":
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    work(Path(sys.argv[1]))
