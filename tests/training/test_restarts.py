"""A process of torchrun is killed in the middle: the command goes on to the same numbers.

This file is also the program that the processes run, as torchrun starts it.
"""

import os
import signal
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pandas as pd
import pytest
import torch
from tiny import Tiny
from torch import distributed as dist, nn

from biasshift.cli.train import run_job
from biasshift.data import DataSet
from biasshift.distributed import process_group, rank, restarts
from biasshift.experiments.mlp_trial import MlpConfig
from biasshift.runs.reader import read_runs, run_states
from biasshift.training.checkpoint import CHECKPOINT
from biasshift.training.trial import Trial

ROOT = Path(__file__).parents[2]
PATIENCE = 170


@dataclass(frozen=True, kw_only=True)
class Killed(Tiny):
    """Kills one process at step 46 of 69, behind the checkpoint at step 23.

    The process is that of ``killed``, and it dies once.
    """

    killed: int = -1
    activations: tuple[str, ...] = ("elu",)
    epochs: int = 3
    checkpoint_seconds: float = 0.0
    keep_weights: bool = True

    name: ClassVar[str] = "killed"

    def trial(self, config: MlpConfig, data: DataSet) -> Trial:
        made = super().trial(config, data)
        scores = self.out / f"scores of {rank()}"

        def score(model: nn.Module) -> dict[str, float]:
            with scores.open("a") as file:
                file.write(str(restarts()))
            if rank() == self.killed and len(scores.read_text()) == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            return made.score(model)

        return replace(made, score=score)


def work(folder: Path) -> None:
    """As `run_experiment` does, without its tables and figures."""
    with process_group(torch.device("cpu")):
        for killed in (-1, 1, 0):
            experiment = Killed(out=folder / str(killed), killed=killed)
            experiment.out.mkdir(parents=True, exist_ok=True)
            for config in experiment.configs():
                run_job(experiment, [config], lambda report: None)


@pytest.mark.slow
@pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="this PyTorch has no gloo"
)
def test_a_killed_process_costs_only_the_time_since_the_last_checkpoint(tmp_path):
    """First the second of two processes dies, and after the restart the first, which writes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--max-restarts", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    shared = {
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo" if sys.platform == "linux" else "lo0",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
    }
    done = subprocess.run(
        [*command, __file__, str(tmp_path)],
        env={**os.environ, **shared},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    assert set(run_states(tmp_path)["state"]) == {"finished"}
    tables = [read_runs(tmp_path / name).drop(columns="seconds") for name in ("-1", "1", "0")]
    weights = [
        torch.load(tmp_path / name / "elu-0" / CHECKPOINT, weights_only=True)["model"]
        for name in ("-1", "1", "0")
    ]
    for table, model in zip(tables[1:], weights[1:], strict=True):
        pd.testing.assert_frame_equal(table, tables[0], check_exact=True)
        assert all(torch.equal(value, weights[0][name]) for name, value in model.items())
    scores = {
        path.relative_to(tmp_path).as_posix(): path.read_text()
        for path in tmp_path.glob("*/scores*")
    }
    # Steps 0, 23, 46 and 69, by how often the processes had been started again.
    assert scores["-1/scores of 0"] == scores["-1/scores of 1"] == "0000"
    assert scores["1/scores of 1"] == "00011" and scores["0/scores of 0"] == "11122"


if __name__ == "__main__":
    torch.set_num_threads(1)
    work(Path(sys.argv[1]))
