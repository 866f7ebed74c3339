"""One trial and its run folder: what is opened, measured, scored, examined and saved."""

import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from biasshift.distributed import broadcast, rank
from biasshift.fisher.sample_size import FewSamplesWarning
from biasshift.runs.ownership import Ownership
from biasshift.runs.schema import is_run
from biasshift.runs.space import refuse_occupied
from biasshift.runs.state import State, read_state
from biasshift.runs.writer import Run
from biasshift.tracking.instrument import instrument
from biasshift.tracking.logs import ProbeLog
from biasshift.training import checkpoint
from biasshift.training.checkpoint import Checkpoint
from biasshift.training.commit import Found
from biasshift.training.evaluation import process_share
from biasshift.training.trial import NO_TENSORBOARD, Exist, Trial

KEPT = {  # in a checkpoint
    "step": int,
    "model": dict,
    "optimizer": dict,
    "update": dict,
    "random": dict,
    "labels": list,
    "segments": int,
    "examined": bool,
    "seconds": float,
}


class TrialRun:
    """One trial and its run folder.

    Args:
        trial: What is trained and measured.
        folder: Where its rows and checkpoints go.

    Attributes:
        found: What the folder held before.
        state: The checkpoint that the run is resumed from, if there is one.
        finished: Whether the folder holds this run, complete.
        start: Completed steps at the beginning.
        seconds: The cost of training so far, without measurements.
    """

    def __init__(self, trial: Trial, folder: Path):
        self.trial, self.folder = trial, folder
        self.found = Found(folder)
        self.state: dict[str, Any] | None = None
        self.finished = self.examined = False
        self.start, self.seconds = 0, 0.0
        self.logs: list[ProbeLog] = []
        self.tensorboard: Any = None  # its writer, where it is asked for

    def look(self, exist: Exist, stack: ExitStack) -> None:
        """Takes the right to write the folder, unless the run is finished, and reads what is there.

        Args:
            exist: What to do about a run that is there.
            stack: Gives the right back.

        Raises:
            FileExistsError: The folder holds a run, and ``exist`` is "refuse", or files of
                something else; or another process writes it.
            ValueError: The run cannot be resumed: another configuration, or a damaged file.
        """
        # Process 0 reads for all.
        self.found = broadcast(self._found(exist, stack) if rank() == 0 else None)
        self.finished = self.found.finished

    def _found(self, exist: Exist, stack: ExitStack) -> Found:
        resumed, config = exist == "resume", self.trial.config
        if resumed and Run.is_finished(self.folder, config):
            return Found(self.folder, State("finished"))
        refuse_occupied(self.folder, "replace" if resumed else exist)
        self.owner = stack.enter_context(Ownership(self.folder))
        if not (resumed and is_run(self.folder)):
            return Found(self.folder)
        if Run.is_finished(self.folder, config):  # meanwhile
            return Found(self.folder, State("finished"))
        state = read_state(self.folder)
        return Found(self.folder, state, checkpoint.found(self.folder, KEPT, state))

    def open(
        self, exist: Exist, start: Checkpoint | None, stack: ExitStack, device: torch.device
    ) -> None:
        """Creates the run folder, or opens what is there.

        Args:
            exist: What to do about a run that is there.
            start: The checkpoint that the run is resumed from; ``None``: it begins anew.
            stack: Closes the folder.
            device: Where training takes place, for the provenance.

        Raises:
            FileExistsError: The folder holds a run, and ``exist`` is "refuse".
            ValueError: The checkpoint or a segment of the run does not fit, or is damaged.
        """
        if start is not None:
            self.state = state = start.state
            with checkpoint.must_fit(self.folder):
                self.trial.model.load_state_dict(state["model"])
            self.start, self.examined = state["step"], state["examined"]
            self.seconds = state["seconds"]
        if rank() > 0:
            self.record: Run | NullRun = NullRun()
            return
        config = self.trial.config
        if start is not None:
            checkpoint.settle(self.folder, start)
            run = Run.resume(
                self.folder,
                config,
                start.state["segments"],
                last_step=self.start,
                owner=self.owner,
                checkpoint=start.sha256,
            )
        else:
            how = "replace" if exist == "resume" else exist
            run = Run.create(self.folder, config, how, device=device, owner=self.owner)
        self.record = stack.enter_context(run)

    def close(self, stack: ExitStack, drops_checkpoint: bool) -> None:
        """Ends a run that has nothing more to write: it was killed when its ensemble ended.

        Args:
            stack: Closes the folder.
            drops_checkpoint: Whether its checkpoint is removed then.
        """
        if rank() > 0 or self.found.lost:
            return
        state = self.found.state
        last = self.found.checkpoints[-1] if self.found.checkpoints else None
        if last is not None:
            checkpoint.settle(self.folder, last)
        run = Run.resume(
            self.folder,
            self.trial.config,
            len(state.segments),
            last_step=state.last_step,
            owner=self.owner,
            checkpoint=last.sha256 if last else None,
            together=state.together,
        )
        run.failed, run.drops_checkpoint = state.diverged, drops_checkpoint
        stack.enter_context(run)

    def instrument(self, optimizer: torch.optim.Optimizer, stack: ExitStack) -> None:
        """Starts the measurements; those on entry belong to the step before the first.

        A resumed run has these already: they are dropped, and label generators continue from where
        the checkpoint has them.

        Args:
            optimizer: Its steps are counted.
            stack: Ends the measurements.
        """
        for schedule in self.trial.schedules:
            x, y = schedule.probe  # of several processes, each measures its own part
            with warnings.catch_warnings():
                # Claims and figures leave out units with too few samples, and state their share.
                warnings.simplefilter("ignore", FewSamplesWarning)
                log = instrument(
                    self.trial.model,
                    optimizer,
                    (process_share(x), process_share(y)),
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
            with checkpoint.must_fit(self.folder):
                labels = self.state["labels"]
                for generator, state in zip(self.label_generators, labels, strict=True):
                    generator.set_state(state)
        if not self.start and self.logs:
            layers = self.logs[0].layers.query("inputs > 0")
            self.record.append(layers[["layer", "inputs"]].assign(step=0, unit=-1))

    @property
    def label_generators(self) -> list[torch.Generator]:
        """The generators that measurements draw labels from."""
        generators = (schedule.options.get("generator") for schedule in self.trial.schedules)
        return [generator for generator in generators if generator is not None]

    def score(self, step: int, epoch: float, batch_loss: float) -> None:
        """Records the numbers of the whole network, in the run folder and for TensorBoard.

        Args:
            step: Completed steps.
            epoch: The same in epochs.
            batch_loss: The mean over the minibatches since the last time.
        """
        numbers = {
            "step": step,
            "epoch": epoch,
            "seconds": self.seconds,
            # Where the trial evaluates all examples, its own value replaces this one.
            "train_loss": batch_loss,
            "batch_loss": batch_loss,
            **self.trial.score(self.trial.model),
        }
        self.record.append(pd.DataFrame([numbers]))
        for name, value in numbers.items():
            if self.tensorboard is not None and name != "step":
                self.tensorboard.add_scalar(name, value, step)

    def examine(self, step: int) -> None:
        """Records the examination, once, as soon as the loss has come down to its value.

        The loss is evaluated every `Exam.every` steps, and recorded beside the rows as
        ``exam_loss``.

        Args:
            step: Completed steps.
        """
        exam = self.trial.exam
        if exam is None or self.examined or step % exam.every:
            return
        loss = exam.loss(self.trial.model)
        if loss <= exam.equal_loss:
            self.record.append(exam.examine(self.trial.model, step).assign(exam_loss=loss))
            self.examined = True

    def flush(self) -> None:
        """Writes everything measured so far to the disk, as one segment of the run folder."""
        for log in self.logs:
            self.record.append(log.flush())
        self.record.flush()


class NullRun:
    """The run folder of all processes but the first: nothing is recorded."""

    segments, failed, drops_checkpoint = 0, False, False

    def append(self, frame: pd.DataFrame) -> None:
        """Drops the rows."""

    def announce_checkpoint(self, sha256: str) -> None:
        """Does nothing."""

    def end_together(self, members: Sequence[str]) -> None:
        """Does nothing."""

    def flush(self) -> None:
        """Does nothing."""


def tensorboard_writer(folder: Path, start: int) -> Any:
    """Returns a writer into the folder ``tensorboard`` of a run, for a ``with`` block.

    Args:
        folder: The run folder.
        start: What is there from this step on is hidden.

    Raises:
        ValueError: TensorBoard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError(NO_TENSORBOARD) from None
    return SummaryWriter(str(folder / "tensorboard"), purge_step=start or None)
