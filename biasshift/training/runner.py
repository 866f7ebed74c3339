"""The way from the first step to the last, of one network or an ensemble: phases, scores,
examinations and checkpoint.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from biasshift.distributed import all_reduce_sum, broadcast, rank, world_size
from biasshift.precision import products
from biasshift.training import checkpoint
from biasshift.training.cuda_graphs import Graphed
from biasshift.training.ensemble import Ensemble, Together, load_slice, refuse_unlike, state_slice
from biasshift.training.loop import train
from biasshift.training.step import Gradient, shared
from biasshift.training.trial import Execution, Exist, Phase, Progress, Report, Trial
from biasshift.training.trial_run import Clock, TrialRun, board

REPORT_SECONDS = 0.5  # between two reports of progress, each of which waits for the device
__all__ = ["Together", "run"]


@dataclass
class Training:
    """The members of one ensemble, or one network alone, on their way."""

    members: list[TrialRun]
    execution: Execution
    device: torch.device
    stack: ExitStack
    phase: Phase | None = None
    saved: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        first = self.members[0].trial
        self.steps, self.phases, self.score_every = first.steps, first.phases, first.score_every
        if self.execution.channels_last:
            for member in self.members:
                member.trial.model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self.update = self._make_update(first)
        self.optimizer = self.update.optimizer
        for number, member in enumerate(self.members):
            if member.state is not None:
                with checkpoint.fitting(member.folder):
                    load_slice(
                        self.optimizer,
                        member.state["optimizer"],
                        number if len(self.members) > 1 else None,
                    )
        if (state := self.members[0].state) is not None:
            checkpoint.restore_random_state(self.members[0].folder, state["random"], self.device)
            with checkpoint.fitting(self.members[0].folder):
                if not isinstance(self.update, Ensemble):
                    self.update.load_state_dict(state["update"])
        for member in self.members:
            member.instrument(self.optimizer, self.stack)

    def _make_update(self, first: Trial) -> "Gradient | Graphed | Ensemble":
        if len(self.members) == 1:
            model = shared(first.model)
            optimizer = first.make_optimizer(model, first.model.parameters())
            update = Gradient(
                model, optimizer, first.loss, self.execution.precision, self.execution.compiled
            )
            return Graphed(update, self._due, self._passed) if self.execution.graphed else update
        models = [member.trial.model for member in self.members]
        return Ensemble(
            models, lambda parameters: first.make_optimizer(models[0], parameters), first.loss
        )

    def _due(self) -> bool:
        return any(log.due for member in self.members for log in member.logs)

    def _passed(self) -> None:
        for member in self.members:
            for log in member.logs:
                log.step += 1

    def run(self, report: Report) -> None:
        """To the last step."""
        start, stream = (
            self.members[0].start,
            Together([member.trial.stream for member in self.members]),
        )
        if start == 0:
            self._score(0, 0.0, None, 0)
        losses, last, count = None, None, 0
        clock, reported = Clock(self.device), time.monotonic()
        for step in train(
            self._timed(clock), stream, steps=self.steps, start=start, before_step=self._begin
        ):
            losses, last, count = (
                step.loss.double() if losses is None else losses + step.loss,
                step.loss,
                count + 1,
            )
            for member in self.members:
                member.examine(step.number)
            scored = step.number % self.score_every == 0 or step.number == self.steps
            if scored or time.monotonic() - reported > REPORT_SECONDS:
                for member, loss in zip(self.members, step.loss.reshape(-1).tolist(), strict=True):
                    report(Progress(member.folder.name, step.number, self.steps, loss))
                reported = time.monotonic()
            if scored:
                spent = clock.take() / len(self.members)
                for member in self.members:
                    member.seconds += spent
                self._score(step.number, step.number / len(stream), losses, count)
                losses, count = None, 0
                self._keep(step.number)
        if last is not None:
            for member, lost in zip(
                self.members, (~last.isfinite()).reshape(-1).tolist(), strict=True
            ):
                member.record.failed = lost
        for member in self.members:
            # A run that was killed behind its last checkpoint has its end on disk already.
            if (
                member.trial.closing is not None
                and member.start < self.steps
                and not member.record.failed
            ):
                member.record.append(member.trial.closing(member.trial.model, self.steps))
        if self.execution.keep_weights:
            self._save(self.steps)
        for member in self.members:
            member.flush()

    def _timed(self, clock: Clock) -> Callable[[Tensor, Tensor], Tensor]:
        def update(x: Tensor, y: Tensor) -> Tensor:
            with clock.running(measured=self._due()):
                return self.update(x, y)

        return update

    def _begin(self, number: int) -> None:
        phase = [phase for phase in self.phases if phase.start <= number][-1]
        if phase != self.phase:
            for group in self.optimizer.param_groups:
                group["lr"] = phase.lr
            self.members[0].trial.enter(self.update.module, phase)
            self.phase = phase

    def _score(self, step: int, epoch: float, losses: Tensor | None, count: int) -> None:
        """``losses`` are sums over the last ``count`` minibatches, of this process; their mean is
        over all of them.
        """
        sums = torch.full((len(self.members),), torch.nan) if losses is None else losses.reshape(-1)
        means = all_reduce_sum(
            sums.double() / max(count, 1) / world_size(), len(self.members)
        ).tolist()
        for member, mean in zip(self.members, means, strict=True):
            member.score(step, epoch, mean)

    def _keep(self, step: int) -> None:
        """A checkpoint, if the last one is old enough; all processes agree on that."""
        if step < self.steps and broadcast(
            time.monotonic() - self.saved >= self.execution.checkpoint_seconds
        ):
            self._save(step)
            self.saved = time.monotonic()

    def _save(self, step: int) -> None:
        """Flushes, then saves a checkpoint that says how much is on disk: what is written after it
        is written again by a resumed run.
        """
        random = checkpoint.random_state(self.device)
        for number, member in enumerate(self.members):
            member.flush()
            if (
                rank() == 0 and not member.record.failed
            ):  # gone on with, a lost network would pass for a finished one
                part = number if len(self.members) > 1 else None
                checkpoint.save(
                    member.folder,
                    {
                        "step": step, "model": member.trial.model.state_dict(), "optimizer": state_slice(self.optimizer, part),
                        "update": {} if isinstance(self.update, Ensemble) else self.update.state_dict(), "random": random,
                        "labels": member.labels(), "segments": member.record.segments, "examined": member.examined,
                        "seconds": member.seconds,
                    },
                )  # fmt: skip


# -- trials → run folders ----------------------------------------------------------------------


def run(
    trials: Sequence[Trial],
    folders: Sequence[Path],
    exist: Exist,
    report: Report,
    execution: Execution = Execution(),  # noqa: B008
) -> None:
    """Trains one network, or several as an ensemble, measures them along the way, and leaves a run
    folder of each.

    A run that is resumed goes on from its last checkpoint to the numbers that it would have had
    without the interruption. The global random state and the flags of float32 products are left as
    found.

    Args:
        trials: of one shape, steps and phases where there are several.
        exist: what to do about a run that is there: "refuse", "replace", or "resume". A finished
            run is not touched by the latter.

    Raises:
        FileExistsError: a folder holds a run already, and ``exist`` is "refuse".
        ValueError: a run that is to be resumed has another configuration, or a damaged checkpoint;
            or trials that differ in shape.
        Diverged: training diverged; that of an ensemble, of all its members. One that is lost while
            others go on is "failed", no more.
    """
    if len(trials) > 1:
        _refuse_different(trials)
    device = next(trials[0].model.parameters()).device
    with (
        products(execution.precision),
        _random_state(trials[0].config.seed, device),
        ExitStack() as stack,
    ):
        members = [TrialRun(trial, folder) for trial, folder in zip(trials, folders, strict=True)]
        for member in members:
            member.open(exist, stack, device)
            if execution.tensorboard and rank() == 0 and not member.finished:
                member.board = stack.enter_context(board(folder=member.folder, start=member.start))
            if member.finished:  # counts, too
                report(
                    Progress(member.folder.name, member.trial.steps, member.trial.steps, math.nan)
                )
        if not (members := [member for member in members if not member.finished]):
            return
        for start in sorted(
            {member.start for member in members}
        ):  # of a killed ensemble, some may be one checkpoint ahead
            Training(
                [member for member in members if member.start == start], execution, device, stack
            ).run(report)
    if rank() == 0 and not execution.keep_weights:
        for member in members:
            (member.folder / checkpoint.CHECKPOINT).unlink(missing_ok=True)


def _refuse_different(trials: Sequence[Trial]) -> None:
    first = trials[0]
    if any(
        (trial.steps, trial.phases, trial.score_every)
        != (first.steps, first.phases, first.score_every)
        for trial in trials
    ):
        raise ValueError(
            "the members of an ensemble need the same steps, phases and times of scores: train "
            "them apart."
        )
    refuse_unlike([trial.model for trial in trials])
    Together([trial.stream for trial in trials])


@contextmanager
def _random_state(seed: int, device: torch.device) -> Iterator[None]:
    """What dropout draws is the run's own, and other on every process."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed + 1_000_003 * rank())
        yield
