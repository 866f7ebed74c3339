"""An ensemble of two small networks, trained within a tenth of a second, with everything that a run
folder can hold; and what is read from it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn

from biasshift.data import TensorStream, digits
from biasshift.runs.reader import read_run, run_states
from biasshift.runs.state import read_state
from biasshift.training import evaluate
from biasshift.training.checkpoint import CHECKPOINT, found
from biasshift.training.runner import run
from biasshift.training.trial import Execution, Phase, ProbeSchedule, Progress, Trial
from biasshift.training.trial_run import KEPT

STEPS, SCORE_EVERY = 9, 3
KEEP = Execution(checkpoint_seconds=0.0, keep_weights=True)  # a checkpoint whenever one may be


@dataclass(frozen=True)
class Config:
    """What the run folder records."""

    seed: int = 0
    lr: float = 0.05


def trial(seed: int) -> Trial:
    data = digits()
    x, y = data.x_train[:90], data.y_train[:90]
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(64, 5), nn.ELU(), nn.Linear(5, 10))
    return Trial(
        Config(seed),
        model,
        lambda model, parameters: torch.optim.SGD(parameters, lr=1.0, momentum=0.9),
        TensorStream(x, y, 30, seed),
        STEPS,
        (Phase(1, 0.05), Phase(5, 0.02)),
        score=lambda model: {"train_loss": evaluate(model, x, y)[0]},
        score_every=SCORE_EVERY,
        schedules=[ProbeSchedule((x[:20], y[:20]), 4, ("activations", "bias_shift"))],
        at_end=lambda model, step: pd.DataFrame(
            {"step": [step], "closing": [sum(p.double().sum().item() for p in model.parameters())]}
        ),
    )


def members(out: Path, count: int = 2) -> list[Path]:
    return [out / f"seed-{seed}" for seed in range(count)]


def train(
    out: Path,
    exist: Any = "resume",
    report: Callable[[Progress], None] = lambda report: None,
    execution: Execution = KEEP,
    count: int = 2,
) -> None:
    run([trial(seed) for seed in range(count)], members(out, count), exist, report, execution)


def rows(folder: Path) -> pd.DataFrame:
    """All rows and columns but the seconds, in an order that does not depend on the segments."""
    table = read_run(folder).drop(columns=["seconds"], errors="ignore").astype({"layer": str})
    table = table[sorted(table)]
    return table.sort_values(list(table)).reset_index(drop=True)


def weights(folder: Path) -> dict[str, Any]:
    return torch.load(folder / CHECKPOINT, weights_only=True)["model"]


def same(one: Any, two: Any) -> bool:
    """Whether two results are the same to the bit."""
    if isinstance(one, torch.Tensor):
        return isinstance(two, torch.Tensor) and one.dtype == two.dtype and torch.equal(one, two)
    if isinstance(one, pd.DataFrame):
        return isinstance(two, pd.DataFrame) and one.equals(two) and list(one) == list(two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(map(same, one, two))
    return one == two


def result(out: Path, execution: Execution = KEEP) -> list[Any]:
    """What an ensemble that has come to its end has brought."""
    folders = members(out)
    ends = [rows(folder) for folder in folders], run_states(*folders)["state"].tolist()
    return [*ends, [weights(folder) for folder in folders] if execution.keep_weights else None]


def content(folder: Path) -> list[Any]:
    """Everything that may be read from a run folder: rows, state, and what it is resumed from."""
    kept = [checkpoint.state for checkpoint in found(folder, KEPT, read_state(folder))]
    return [read_run(folder), run_states(folder), kept]
