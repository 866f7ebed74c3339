"""Trials → run folders: training, measuring, recording and checkpoints, and going on where a killed run stopped."""

import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from biasshift.boards import board
from biasshift.instrument import instrument
from biasshift.logs import ProbeLog
from biasshift.recording import Run
from biasshift.training import checkpoints
from biasshift.training.ensembles import Ensemble, refuse_unlike
from biasshift.training.graphs import Graphed
from biasshift.training.loop import train
from biasshift.training.processes import rank, summed, told, world
from biasshift.training.updating import Gradient, shared
from biasshift.trials import Execution, Exist, Phase, Progress, Report, Trial

if TYPE_CHECKING:
    import pandas as pd

REPORT_SECONDS = 0.5  # between two reports of progress, each of which waits for the device
KEPT = {  # in a checkpoint
    "step": int, "model": dict, "optimizer": dict, "update": dict, "random": dict, "labels": list, "segments": int, "examined": bool,
    "seconds": float,
}  # fmt: skip


def run(trials: Sequence[Trial], folders: Sequence[Path], exist: Exist, report: Report, execution: Execution = Execution()) -> None:  # noqa: B008
    """Trains one network, or several as an ensemble, measures them along the way, and leaves a run folder of each.

    A run that is resumed goes on from its last checkpoint to the numbers that it would have had without the interruption. The
    global random state is left as found.

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
    with _random_state(trials[0].config.seed, device), ExitStack() as stack:
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


class Member:
    """One trial and its folder."""

    def __init__(self, trial: Trial, folder: Path):
        self.trial, self.folder = trial, folder
        self.state: dict[str, Any] | None = None
        self.finished = self.examined = False
        self.start, self.seconds = 0, 0.0
        self.logs: list[ProbeLog] = []
        self.board: Any = None  # TensorBoard's writer, where it is asked for

    def open(self, exist: Exist, stack: ExitStack, device: torch.device) -> None:
        """Makes the run folder, or finds what is there to go on from."""
        self.finished = told(exist == "resume" and rank() == 0 and Run.is_finished(self.folder, self.trial.config))
        if self.finished:
            return
        self.state = checkpoints.load(self.folder, KEPT) if exist == "resume" else None
        if self.state is not None:
            with checkpoints.fitting(self.folder):
                self.trial.model.load_state_dict(self.state["model"])
            self.start, self.examined, self.seconds = self.state["step"], self.state["examined"], self.state["seconds"]
        if rank() > 0:
            self.record: Run | Silence = Silence()
        elif self.state is not None:
            self.record = stack.enter_context(
                Run.resume(self.folder, self.trial.config, self.state["segments"], last_step=self.state["step"])
            )
        else:
            how = "replace" if exist == "resume" else exist
            self.record = stack.enter_context(Run.create(self.folder, self.trial.config, how, device=device))

    def watch(self, optimizer: torch.optim.Optimizer, stack: ExitStack) -> None:
        """Starts the measurements; those on entry are the step before the first."""
        for watch in self.trial.watches:
            share = tuple(part[rank() :: world()] for part in watch.probe)  # of several processes, each measures its own
            log = instrument(
                self.trial.model, optimizer, share, watch.every, quantities=watch.quantities, distributed=True, **watch.options
            )
            assert isinstance(log, ProbeLog)
            stack.enter_context(log)
            if self.start:
                log.flush()
                log.step = self.start
            self.logs.append(log)
        if self.state is not None:
            with checkpoints.fitting(self.folder):
                for generator, state in zip(self._generators(), self.state["labels"], strict=True):
                    generator.set_state(state)
        if not self.start and self.logs:
            self.record.append(_layer_sizes(self.logs[0]))

    def _generators(self) -> list[torch.Generator]:
        """Those that the measurements draw labels from."""
        return [generator for watch in self.trial.watches if (generator := watch.options.get("generator")) is not None]

    def labels(self) -> list[Tensor]:
        """What a resumed run draws labels from."""
        return [generator.get_state() for generator in self._generators()]

    def score(self, step: int, epoch: float, batch_loss: float) -> None:
        """Records the numbers of the whole network; ``batch_loss`` is the mean over the minibatches since the last time."""
        import pandas as pd

        losses = {"train_loss": batch_loss, "batch_loss": batch_loss}  # where the trial looks at all examples, its own word counts
        numbers = {"step": step, "epoch": epoch, "seconds": self.seconds, **losses, **self.trial.score(self.trial.model)}
        self.record.append(pd.DataFrame([numbers]))
        for name, value in numbers.items():
            if self.board is not None and name != "step":
                self.board.add_scalar(name, value, step)

    def examine(self, step: int) -> None:
        """Records the examination, once, when the loss has come down to where it is due."""
        exam = self.trial.exam
        if exam is None or self.examined or step % exam.every:
            return
        loss = exam.loss(self.trial.model)
        if loss <= exam.equal_loss:
            self.record.append(exam.examine(self.trial.model, step).assign(exam_loss=loss))
            self.examined = True

    def flush(self) -> None:
        """Puts everything measured so far on disk."""
        for log in self.logs:
            self.record.append(log.flush())
        self.record.flush()


@dataclass
class Training:
    """The members of one ensemble, or one network alone, on their way."""

    members: list[Member]
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
                with checkpoints.fitting(member.folder):
                    _load_slice(self.optimizer, member.state["optimizer"], number if len(self.members) > 1 else None)
        if (state := self.members[0].state) is not None:
            checkpoints.restore_random_state(self.members[0].folder, state["random"], self.device)
            with checkpoints.fitting(self.members[0].folder):
                if not isinstance(self.update, Ensemble):
                    self.update.load_state_dict(state["update"])
        for member in self.members:
            member.watch(self.optimizer, self.stack)

    def _make_update(self, first: Trial) -> "Gradient | Graphed | Ensemble":
        if len(self.members) == 1:
            model = shared(first.model)
            optimizer = first.make_optimizer(model, first.model.parameters())
            update = Gradient(model, optimizer, first.loss, self.execution.precision, self.execution.compiled)
            return Graphed(update, self._due, self._passed) if self.execution.graphed else update
        models = [member.trial.model for member in self.members]
        return Ensemble(models, lambda parameters: first.make_optimizer(models[0], parameters), first.loss)

    def _due(self) -> bool:
        return any(log.due for member in self.members for log in member.logs)

    def _passed(self) -> None:
        for member in self.members:
            for log in member.logs:
                log.step += 1

    def run(self, report: Report) -> None:
        """To the last step."""
        start, stream = self.members[0].start, Together([member.trial.stream for member in self.members])
        if start == 0:
            self._score(0, 0.0, None, 0)
        losses, last, count = None, None, 0
        clock, reported = Clock(self.device), time.monotonic()
        for step in train(self._timed(clock), stream, steps=self.steps, start=start, before_step=self._begin):
            losses, last, count = step.loss.double() if losses is None else losses + step.loss, step.loss, count + 1
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
            for member, lost in zip(self.members, (~last.isfinite()).reshape(-1).tolist(), strict=True):
                member.record.failed = lost
        for member in self.members:
            if member.trial.closing is not None and not member.record.failed:
                member.record.append(member.trial.closing(member.trial.model, self.steps))
        if self.execution.keep_weights:
            self._save(self.steps)
        for member in self.members:
            member.flush()

    def _timed(self, clock: "Clock") -> Callable[[Tensor, Tensor], Tensor]:
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
        """``losses`` are sums over the last ``count`` minibatches, of this process; their mean is over all of them."""
        sums = torch.full((len(self.members),), torch.nan) if losses is None else losses.reshape(-1)
        means = summed(sums.double() / max(count, 1) / world(), len(self.members)).tolist()
        for member, mean in zip(self.members, means, strict=True):
            member.score(step, epoch, mean)

    def _keep(self, step: int) -> None:
        """A checkpoint, if the last one is old enough; all processes agree on that."""
        if step < self.steps and checkpoints.told(time.monotonic() - self.saved >= self.execution.checkpoint_seconds):
            self._save(step)
            self.saved = time.monotonic()

    def _save(self, step: int) -> None:
        """Flushes, then saves a checkpoint that says how much is on disk: what is written after it is written again by a resumed run."""
        random = checkpoints.random_state(self.device)
        for number, member in enumerate(self.members):
            member.flush()
            if rank() == 0:
                part = number if len(self.members) > 1 else None
                checkpoints.save(
                    member.folder,
                    {
                        "step": step, "model": member.trial.model.state_dict(), "optimizer": _slice(self.optimizer, part),
                        "update": {} if isinstance(self.update, Ensemble) else self.update.state_dict(), "random": random,
                        "labels": member.labels(), "segments": member.record.segments, "examined": member.examined,
                        "seconds": member.seconds,
                    },
                )  # fmt: skip


class Clock:
    """The cost of training steps without that of measurements: CPU seconds on the CPU, which others on the machine do not change."""

    def __init__(self, device: torch.device):
        self.now = time.perf_counter if device.type == "cuda" else time.process_time
        self.spent, self.undisturbed, self.steps = 0.0, 0, 0

    @contextmanager
    def running(self, measured: bool) -> Iterator[None]:
        """Around one step; ``measured`` steps hold measurements and are taken to cost what the others do."""
        began = self.now()
        yield
        self.steps += 1
        if not measured:
            self.spent += self.now() - began
            self.undisturbed += 1

    def take(self) -> float:
        """Seconds of all steps since the last call."""
        steps, self.steps = self.steps, 0
        return steps * self.spent / self.undisturbed if self.undisturbed else 0.0


class Together:
    """The minibatches of several streams, stacked; of one, as they are."""

    def __init__(self, streams: Sequence[Any]):
        self.streams = streams
        if len({len(stream) for stream in streams}) > 1:
            raise ValueError("the members of an ensemble need epochs of equally many minibatches.")

    def __len__(self) -> int:
        return len(self.streams[0])

    def epoch(self, number: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Epoch ``number``, from its minibatch ``start`` on."""
        if len(self.streams) == 1:
            yield from self.streams[0].epoch(number, start)
            return
        for batches in zip(*(stream.epoch(number, start) for stream in self.streams), strict=True):
            xs, ys = zip(*batches, strict=True)
            yield torch.stack(xs), torch.stack(ys)


class Silence:
    """Records nothing: what all processes but the first write."""

    segments, failed = 0, False

    def append(self, frame: "pd.DataFrame") -> None: ...

    def flush(self) -> None: ...


def _refuse_different(trials: Sequence[Trial]) -> None:
    first = trials[0]
    if any((trial.steps, trial.phases, trial.score_every) != (first.steps, first.phases, first.score_every) for trial in trials):
        raise ValueError("the members of an ensemble need the same steps, phases and times of scores: train them apart.")
    refuse_unlike([trial.model for trial in trials])
    Together([trial.stream for trial in trials])


def _slice(optimizer: torch.optim.Optimizer, number: int | None) -> dict[str, Any]:
    """The optimizer's state, or that of one member of an ensemble, in the form that the member alone would have."""
    state = optimizer.state_dict()
    if number is None:
        return state
    own = {key: {name: _of(value, number) for name, value in entry.items()} for key, entry in state["state"].items()}
    return {**state, "state": own}


def _of(value: Any, number: int) -> Any:
    return value[number].clone() if isinstance(value, Tensor) and value.dim() else value


def _load_slice(optimizer: torch.optim.Optimizer, state: dict[str, Any], number: int | None) -> None:
    if number is None:
        optimizer.load_state_dict(state)
        return
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for key, entry in state["state"].items():
        for name, value in entry.items():
            whole = optimizer.state[parameters[key]]
            if isinstance(value, Tensor) and value.dim():
                whole.setdefault(name, torch.zeros_like(parameters[key]))
                whole[name][number] = value.to(parameters[key].device)
            else:
                whole[name] = copy.copy(value)


def _layer_sizes(log: ProbeLog) -> "pd.DataFrame":
    layers = log.layers.query("inputs > 0")
    return layers[["layer", "inputs"]].assign(step=0, unit=-1)


@contextmanager
def _random_state(seed: int, device: torch.device) -> Iterator[None]:
    """What dropout draws is the run's own, and other on every process."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed + 1_000_003 * rank())
        yield
