"""Trials → run folders: training, measuring, recording and checkpoints, and going on where a killed run stopped."""

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from biasshift.distributed import rank
from biasshift.training import checkpoint as checkpoints
from biasshift.training.boards import board
from biasshift.training.ensemble import refuse_unlike
from biasshift.training.products import products
from biasshift.training.runner import Training
from biasshift.training.stacking import Together
from biasshift.training.trial import Execution, Exist, Progress, Report, Trial
from biasshift.training.trial_run import Member

__all__ = ["Together", "run"]


def run(trials: Sequence[Trial], folders: Sequence[Path], exist: Exist, report: Report, execution: Execution = Execution()) -> None:  # noqa: B008
    """Trains one network, or several as an ensemble, measures them along the way, and leaves a run folder of each.

    A run that is resumed goes on from its last checkpoint to the numbers that it would have had without the interruption. The
    global random state and the flags of float32 products are left as found.

    Args:
        trials: of one shape, steps and phases where there are several.
        exist: what to do about a run that is there: "refuse", "replace", or "resume". A finished run is not touched by the latter.

    Raises:
        FileExistsError: a folder holds a run already, and ``exist`` is "refuse".
        ValueError: a run that is to be resumed has another configuration, or a damaged checkpoint; or trials that differ in shape.
        Diverged: training diverged; that of an ensemble, of all its members. One that is lost while others go on is "failed", no more.
    """
    if len(trials) > 1:
        _refuse_different(trials)
    device = next(trials[0].model.parameters()).device
    with products(execution.precision), _random_state(trials[0].config.seed, device), ExitStack() as stack:
        members = [Member(trial, folder) for trial, folder in zip(trials, folders, strict=True)]
        for member in members:
            member.open(exist, stack, device)
            if execution.tensorboard and rank() == 0 and not member.finished:
                member.board = stack.enter_context(board(folder=member.folder, start=member.start))
            if member.finished:  # counts, too
                report(Progress(member.folder.name, member.trial.steps, member.trial.steps, math.nan))
        if not (members := [member for member in members if not member.finished]):
            return
        for start in sorted({member.start for member in members}):  # of a killed ensemble, some may be one checkpoint ahead
            Training([member for member in members if member.start == start], execution, device, stack).run(report)
    if rank() == 0 and not execution.keep_weights:
        for member in members:
            (member.folder / checkpoints.CHECKPOINT).unlink(missing_ok=True)


def _refuse_different(trials: Sequence[Trial]) -> None:
    first = trials[0]
    if any((trial.steps, trial.phases, trial.score_every) != (first.steps, first.phases, first.score_every) for trial in trials):
        raise ValueError("the members of an ensemble need the same steps, phases and times of scores: train them apart.")
    refuse_unlike([trial.model for trial in trials])
    Together([trial.stream for trial in trials])


@contextmanager
def _random_state(seed: int, device: torch.device) -> Iterator[None]:
    """What dropout draws is the run's own, and other on every process."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed + 1_000_003 * rank())
        yield
