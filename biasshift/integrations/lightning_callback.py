"""Measurements during the training of Lightning's Trainer."""

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from biasshift.integrations.installation import needed
from biasshift.integrations.monitor import Monitor
from biasshift.integrations.scalars import Receiver, receiver

_lightning: Any = needed("LightningCallback", "lightning.pytorch", "pytorch_lightning")


class LightningCallback(Monitor, _lightning.Callback):
    """Measures a LightningModule while Lightning's Trainer trains it.

    Steps are those of one optimizer, and go on from a checkpoint. Lightning makes
    gradients inside of the optimizer's step, by a closure. So the columns of the gradient that a
    step used are empty: ``shift_gradient``, ``own_gradient`` and those beside them.

    Args:
        probe: As in `biasshift.instrument`, or a function that returns it when training begins.
            With None, the activation moments of the training batches are added up.
        every: Optimizer steps between two measurements.
        model: The name of the submodule that is measured and takes the probe; by default the
            LightningModule, whose ``forward`` must return the outputs.
        optimizer: Which of several optimizers is meant, by its place.
        to: Receivers of the rows, such as `to_wandb` returns.
        loggers: Also send layer rows to the trainer's loggers.
        options: Of `biasshift.instrument`.
    """

    def __init__(
        self,
        probe: Any,
        every: int = 100,
        *,
        model: str = "",
        optimizer: int = 0,
        to: Iterable[Receiver] = (),
        loggers: bool = False,
        **options: Any,
    ):
        super().__init__(probe, every, model=model, to=to, **options)
        if probe is None and loggers:
            raise ValueError("'loggers' must be False without a probe, got True. Give probe=.")
        self.place, self.loggers = optimizer, loggers
        self._resumed_at: int | None = None

    @property
    def state_key(self) -> str:
        return self._generate_state_key(model=self.module, optimizer=self.place, every=self.every)

    def state_dict(self) -> dict[str, Any]:
        return {} if self.probe_log is None else {"step": self.probe_log.step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._resumed_at = state_dict["step"]

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        optimizers = trainer.optimizers
        if not 0 <= self.place < len(optimizers):
            raise ValueError(
                f"'optimizer' must be less than {len(optimizers)}, the number of optimizers, got "
                f"{self.place}."
            )
        self.begin(pl_module, optimizers[self.place], self._completed(trainer))
        self._resumed_at = None
        if self.loggers:

            def send(step: int, values: Mapping[str, float]) -> None:
                for logger in trainer.loggers:
                    logger.log_metrics(values, step=step)

            self.probe_log.follow(receiver(send))

    def _completed(self, trainer: Any) -> int:
        """Steps of the optimizer before; of several optimizers the trainer knows only the sum."""
        if self._resumed_at is not None:
            return self._resumed_at
        if len(trainer.optimizers) == 1:
            return trainer.global_step
        if trainer.global_step and self.probe_log is None:
            warnings.warn(
                "The checkpoint knows nothing of LightningCallback, whose steps begin at 0. Give "
                "the callback to the trainer that writes checkpoints, too.",
                RuntimeWarning,
                stacklevel=2,
            )
        return 0 if self.probe_log is None else self.probe_log.step

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.end()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self.end(failed=True)
