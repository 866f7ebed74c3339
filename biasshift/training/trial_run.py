"""One trial and its run folder: what is opened, measured, scored, examined and put on disk of it."""

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from biasshift.distributed import broadcast, rank, world_size
from biasshift.runs.writer import Run
from biasshift.tracking.instrument import instrument
from biasshift.tracking.logs import ProbeLog
from biasshift.training import checkpoint
from biasshift.training.trial import Exist, Trial

if TYPE_CHECKING:
    import pandas as pd

KEPT = {  # in a checkpoint
    "step": int, "model": dict, "optimizer": dict, "update": dict, "random": dict, "labels": list, "segments": int, "examined": bool,
    "seconds": float,
}  # fmt: skip


# -- scores for TensorBoard --------------------------------------------------------------------


def board(folder: Path, start: int) -> Any:
    """A writer into the folder `tensorboard` of a run, to be used in a ``with`` block; what is
    there from step ``start`` on is hidden.

    Raises:
        ValueError: TensorBoard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError(
            "--tensorboard needs TensorBoard: pip install tensorboard, or leave it out."
        ) from None
    return SummaryWriter(str(folder / "tensorboard"), purge_step=start or None)


# -- what training costs -----------------------------------------------------------------------


class Clock:
    """The cost of training steps without that of measurements: CPU seconds on the CPU, which others
    on the machine do not change.
    """

    def __init__(self, device: torch.device):
        self.now = time.perf_counter if device.type == "cuda" else time.process_time
        self.spent, self.undisturbed, self.steps = 0.0, 0, 0

    @contextmanager
    def running(self, measured: bool) -> Iterator[None]:
        """Around one step; ``measured`` steps hold measurements and are taken to cost what the
        others do.
        """
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


class TrialRun:
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
        self.finished = broadcast(
            exist == "resume" and rank() == 0 and Run.is_finished(self.folder, self.trial.config)
        )
        if self.finished:
            return
        self.state = checkpoint.load(self.folder, KEPT) if exist == "resume" else None
        if self.state is not None:
            with checkpoint.fitting(self.folder):
                self.trial.model.load_state_dict(self.state["model"])
            self.start, self.examined, self.seconds = (
                self.state["step"],
                self.state["examined"],
                self.state["seconds"],
            )
        if rank() > 0:
            self.record: Run | Silence = Silence()
        elif self.state is not None:
            self.record = stack.enter_context(
                Run.resume(
                    self.folder,
                    self.trial.config,
                    self.state["segments"],
                    last_step=self.state["step"],
                )
            )
        else:
            how = "replace" if exist == "resume" else exist
            self.record = stack.enter_context(
                Run.create(self.folder, self.trial.config, how, device=device)
            )

    def instrument(self, optimizer: torch.optim.Optimizer, stack: ExitStack) -> None:
        """Starts the measurements; those on entry are the step before the first."""
        for schedule in self.trial.schedules:
            share = tuple(
                part[rank() :: world_size()] for part in schedule.probe
            )  # of several processes, each measures its own
            log = instrument(
                self.trial.model,
                optimizer,
                share,
                schedule.every,
                quantities=schedule.quantities,
                distributed=True,
                **schedule.options,
            )
            assert isinstance(log, ProbeLog)
            stack.enter_context(log)
            if self.start:
                log.flush()
                log.step = self.start
            self.logs.append(log)
        if self.state is not None:
            with checkpoint.fitting(self.folder):
                for generator, state in zip(self._generators(), self.state["labels"], strict=True):
                    generator.set_state(state)
        if not self.start and self.logs:
            self.record.append(_layer_sizes(self.logs[0]))

    def _generators(self) -> list[torch.Generator]:
        """Those that the measurements draw labels from."""
        return [
            generator
            for schedule in self.trial.schedules
            if (generator := schedule.options.get("generator")) is not None
        ]

    def labels(self) -> list[Tensor]:
        """What a resumed run draws labels from."""
        return [generator.get_state() for generator in self._generators()]

    def score(self, step: int, epoch: float, batch_loss: float) -> None:
        """Records the numbers of the whole network; ``batch_loss`` is the mean over the minibatches
        since the last time.
        """
        import pandas as pd

        losses = {
            "train_loss": batch_loss,
            "batch_loss": batch_loss,
        }  # where the trial looks at all examples, its own word counts
        numbers = {
            "step": step,
            "epoch": epoch,
            "seconds": self.seconds,
            **losses,
            **self.trial.score(self.trial.model),
        }
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


class Silence:
    """Records nothing: what all processes but the first write."""

    segments, failed = 0, False

    def append(self, frame: "pd.DataFrame") -> None: ...

    def flush(self) -> None: ...


def _layer_sizes(log: ProbeLog) -> "pd.DataFrame":
    layers = log.layers.query("inputs > 0")
    return layers[["layer", "inputs"]].assign(step=0, unit=-1)
