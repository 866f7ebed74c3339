"""From the first step to the last, of one network or an ensemble, into run folders.

Along the way: phases, scores, examinations, and checkpoints that a run is resumed from.
"""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from biasshift.distributed import all_reduce_sum, broadcast, rank, world_size
from biasshift.precision import product_precision
from biasshift.runs.reader import run_names
from biasshift.training import checkpoint
from biasshift.training.clock import Clock
from biasshift.training.commit import closing, starts
from biasshift.training.cuda_graphs import GraphedStep
from biasshift.training.ensemble import (
    Ensemble,
    StackedStream,
    load_slice,
    refuse_unlike,
    state_slice,
)
from biasshift.training.loop import train
from biasshift.training.step import Gradient, shared
from biasshift.training.trial import Execution, Exist, Phase, Progress, Report, Trial
from biasshift.training.trial_run import TrialRun, tensorboard_writer

REPORT_SECONDS = 0.5  # between two reports of progress, each of which waits for the device


def run(
    trials: Sequence[Trial],
    folders: Sequence[Path],
    exist: Exist,
    report: Report,
    execution: Execution = Execution(),  # noqa: B008
) -> None:
    """Trains one network, or several as an ensemble, measures them, and writes their run folders.

    A run that is resumed continues from its last checkpoint to the numbers that it would have had
    without the interruption. The global random state and the flags of float32 products are left as
    found.

    Args:
        trials: Of one shape, steps and phases where there are several.
        folders: One run folder per trial.
        exist: What to do about a run that is there: "refuse", "replace", or "resume". The latter
            leaves a finished run as it is.
        report: Called with the `Progress` of every run, twice a second or so.
        execution: How the trials are computed.

    Raises:
        FileExistsError: A folder holds a run already, and ``exist`` is "refuse".
        ValueError: A run that is to be resumed has another configuration, or a damaged checkpoint;
            or the trials differ in shape.
        Diverged: Training diverged; that of an ensemble, of all its members. A member that diverges
            while others go on is "failed", without an error.
    """
    if len(trials) > 1:
        _refuse_different(trials)
    device = next(trials[0].model.parameters()).device
    with (
        torch.cuda.device(device) if device.type == "cuda" else nullcontext(),
        product_precision(execution.precision),
        _random_state(trials[0].config.seed, device),
        ExitStack() as stack,
    ):
        members = [TrialRun(trial, folder) for trial, folder in zip(trials, folders, strict=True)]
        members = _opened(members, exist, report, execution, stack)
        # Those that were alone, or in another ensemble, may stand at different steps.
        for start in sorted({member.start for member in members}):
            alike = [member for member in members if member.start == start]
            _Training(alike, execution, device, stack).run(report)


def _opened(
    members: list[TrialRun],
    exist: Exist,
    report: Report,
    execution: Execution,
    stack: ExitStack,
) -> list[TrialRun]:
    """Opens the folders of all members, and returns those that are not at their end already."""
    for member in members:
        member.look(exist, stack)
    found = [member.found for member in members]
    training = []
    for member, at_end, start in zip(members, closing(found), starts(found), strict=True):
        if member.finished or at_end:  # counts, too
            steps = member.trial.steps
            report(Progress(member.folder.name, steps, steps, math.nan))
        if at_end:
            member.close(stack, drops_checkpoint=not execution.keep_weights)
        elif not member.finished:
            member.open(exist, start, stack, next(member.trial.model.parameters()).device)
            member.record.drops_checkpoint = not execution.keep_weights
            if execution.tensorboard and rank() == 0:
                writer = tensorboard_writer(member.folder, member.start)
                member.tensorboard = stack.enter_context(writer)
            training.append(member)
    return training


def _refuse_different(trials: Sequence[Trial]) -> None:
    if len({(trial.steps, trial.phases, trial.score_every) for trial in trials}) > 1:
        raise ValueError(
            "All members of an ensemble must have the same steps, phases and times of scores: "
            "train them apart."
        )
    refuse_unlike([trial.model for trial in trials])
    StackedStream([trial.stream for trial in trials])


@contextmanager
def _random_state(seed: int, device: torch.device) -> Iterator[None]:
    """What dropout draws is the run's own, and other on every process."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed + 1_000_003 * rank())
        yield


class _Training:
    """The members of one ensemble, or one network alone, from their common start to the end."""

    def __init__(
        self,
        members: list[TrialRun],
        execution: Execution,
        device: torch.device,
        stack: ExitStack,
    ):
        self.members, self.execution, self.device = members, execution, device
        self.first = members[0].trial
        # What `state_slice` takes: the number of a member, or None for one network alone.
        self.parts = range(len(members)) if len(members) > 1 else [None]
        self.names = run_names([member.folder for member in members])
        self.clock, self.saved = Clock(device), time.monotonic()
        self.phase: Phase | None = None
        if execution.channels_last:
            for member in members:
                member.trial.model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self.update = self._make_update()
        self.optimizer = self.update.optimizer
        for part, member in zip(self.parts, members, strict=True):
            if member.state is not None:
                with checkpoint.must_fit(member.folder):
                    load_slice(self.optimizer, member.state["optimizer"], part)
        if (state := members[0].state) is not None:
            checkpoint.restore_random_state(members[0].folder, state["random"], device)
            with checkpoint.must_fit(members[0].folder):
                self.update.load_state_dict(state["update"])
        for member in members:
            member.instrument(self.optimizer, stack)

    def _make_update(self) -> Gradient | GraphedStep | Ensemble:
        first = self.first
        if len(self.members) > 1:
            models = [member.trial.model for member in self.members]
            update = Ensemble(models, partial(first.make_optimizer, models[0]), first.loss)
        else:
            model = shared(first.model)
            optimizer = first.make_optimizer(model, first.model.parameters())
            precision, compiled = self.execution.precision, self.execution.compiled
            update = Gradient(model, optimizer, first.loss, precision, compiled)
        if self.execution.graphed:
            return GraphedStep(update, self._due, self._count_replay)
        return update

    def _due(self) -> bool:
        return any(log.due for member in self.members for log in member.logs)

    def _count_replay(self) -> None:
        for member in self.members:
            for log in member.logs:
                log.step += 1

    def run(self, report: Report) -> None:
        start, steps = self.members[0].start, self.first.steps
        stream = StackedStream([member.trial.stream for member in self.members])
        if start == 0:
            self._score(0, 0.0, None, 0)
        losses, last, count = None, None, 0
        reported = time.monotonic()
        for step in train(
            self._step, stream, steps=steps, start=start, before_step=self._enter_phase
        ):
            losses = step.loss.double() if losses is None else losses + step.loss
            last, count = step.loss, count + 1
            for member in self.members:
                member.examine(step.number)
            scored = step.number % self.first.score_every == 0 or step.number == steps
            if scored or time.monotonic() - reported > REPORT_SECONDS:
                for member, loss in zip(self.members, step.loss.reshape(-1).tolist(), strict=True):
                    report(Progress(member.folder.name, step.number, steps, loss))
                reported = time.monotonic()
            if scored:
                spent = self.clock.take() / len(self.members)
                for member in self.members:
                    member.seconds += spent
                self._score(step.number, step.number / len(stream), losses, count)
                losses, count = None, 0
                self._save_if_due(step.number)
        # Else the run was killed behind its last checkpoint, and its end is on disk already.
        if last is not None:
            diverged = (~last.isfinite()).reshape(-1).tolist()
            for member, failed in zip(self.members, diverged, strict=True):
                member.record.failed = failed
                if member.trial.at_end is not None and not failed:
                    member.record.append(member.trial.at_end(member.trial.model, steps))
        saved = self._prepare(steps) if self.execution.keep_weights else []
        for member in self.members:
            member.flush()
        if len(self.members) > 1:  # killed from here on, they are only closed
            for member in self.members:
                member.record.end_together(self.names)
        self._promote(saved)

    def _step(self, x: Tensor, y: Tensor) -> Tensor:
        with self.clock.step(measured=self._due()):
            return self.update(x, y)

    def _enter_phase(self, number: int) -> None:
        phase = [phase for phase in self.first.phases if phase.start <= number][-1]
        if phase != self.phase:
            for group in self.optimizer.param_groups:
                group["lr"] = phase.lr
            self.first.enter(self.update.module, phase)
            self.phase = phase

    def _score(self, step: int, epoch: float, losses: Tensor | None, count: int) -> None:
        """``losses`` are sums over the last ``count`` minibatches of this process."""
        members = len(self.members)
        sums = torch.full((members,), torch.nan) if losses is None else losses.reshape(-1)
        # The mean is over the minibatches of all processes.
        means = all_reduce_sum(sums.double() / max(count, 1) / world_size(), members).tolist()
        for member, mean in zip(self.members, means, strict=True):
            member.score(step, epoch, mean)

    def _save_if_due(self, step: int) -> None:
        """A checkpoint, if the last one is old enough; all processes agree on that."""
        old = time.monotonic() - self.saved >= self.execution.checkpoint_seconds
        if step < self.first.steps and broadcast(old):
            self._save(step)
            self.saved = time.monotonic()

    def _save(self, step: int) -> None:
        """Saves a checkpoint of all members, or of none: see `commit`."""
        self._promote(self._prepare(step))

    def _prepare(self, step: int) -> list[TrialRun]:
        """Flushes, then writes the next checkpoints, which say how many segments are on disk.

        A resumed run writes again what comes after them. Returns the members that have one.
        """
        random, saved = checkpoint.random_state(self.device), []
        update = self.update.state_dict()
        for part, member in zip(self.parts, self.members, strict=True):
            member.flush()
            # A diverged network that is resumed would pass for a finished one.
            if rank() == 0 and not member.record.failed:
                state = {
                    "step": step,
                    "model": _own(member.trial.model.state_dict()),
                    "optimizer": state_slice(self.optimizer, part),
                    "update": update,
                    "random": random,
                    "labels": [generator.get_state() for generator in member.label_generators],
                    "segments": member.record.segments,
                    "examined": member.examined,
                    "seconds": member.seconds,
                    "ensemble": self.names,
                }
                sha256 = checkpoint.prepare(member.folder, state)
                member.record.announce_checkpoint(sha256)
                saved.append(member)
        return saved

    def _promote(self, members: list[TrialRun]) -> None:
        for member in members:
            checkpoint.promote(member.folder)


def _own(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the rest of the storage of views: a member's weights are a part of the ensemble's."""
    whole = {name: value.untyped_storage().nbytes() for name, value in state.items()}
    return {
        name: value.clone() if whole[name] > value.nbytes else value
        for name, value in state.items()
    }
