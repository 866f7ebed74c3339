"""What a log measures, sent to TensorBoard, Weights & Biases or MLflow as training goes on.

Each function returns a receiver for `ProbeLog.follow` and for the callbacks. Of several processes
the first one sends.
"""

import os
import time
from collections.abc import Mapping
from typing import Any

from biasshift.integrations.installation import needed
from biasshift.integrations.scalars import Receiver, receiver

MLFLOW_BATCH = 1000  # metrics that its servers take at once


def to_tensorboard(writer: Any, prefix: str = "biasshift") -> Receiver:
    """Returns a receiver that writes scalars for TensorBoard.

    Args:
        writer: A ``SummaryWriter``, or the folder for a new one.
        prefix: What the tags begin with, as in ``biasshift/0/coupling``.

    Raises:
        ModuleNotFoundError: When tensorboard is not installed.
    """
    needed("to_tensorboard", "tensorboard")
    opened = [] if isinstance(writer, str | os.PathLike) else [writer]

    def send(step: int, values: Mapping[str, float]) -> None:
        if not opened:  # by the process that sends, and when there is something to send
            summaries = needed("to_tensorboard", "torch.utils.tensorboard")
            opened.append(summaries.SummaryWriter(os.fspath(writer)))
        for name, value in values.items():
            opened[0].add_scalar(name, value, step)
        opened[0].flush()

    return receiver(send, prefix)


def to_wandb(run: Any = None, prefix: str = "biasshift") -> Receiver:
    """Returns a receiver that logs metrics of a Weights & Biases run, online or offline.

    Their axis is the metric ``biasshift/step``, so that the steps of other metrics are not in the
    way.

    Args:
        run: What ``wandb.init`` has returned; by default the run that is active when the first
            numbers come.
        prefix: What the names begin with.

    Raises:
        ModuleNotFoundError: When wandb is not installed.
    """
    wandb = needed("to_wandb", "wandb")
    defined: list[Any] = []

    def send(step: int, values: Mapping[str, float]) -> None:
        active = run or wandb.run
        if active is None:
            raise ValueError("'run' must be active. Call wandb.init() before training.")
        if active not in defined:
            active.define_metric(f"{prefix}/step")
            active.define_metric(f"{prefix}/*", step_metric=f"{prefix}/step")
            defined.append(active)
        active.log({**values, f"{prefix}/step": step})

    return receiver(send, prefix)


def to_mlflow(run_id: str | None = None, client: Any = None, prefix: str = "biasshift") -> Receiver:
    """Returns a receiver that logs metrics of an MLflow run.

    Args:
        run_id: The run; by default the one that is active when the first numbers come.
        client: An ``MlflowClient``; by default one of the present tracking address.
        prefix: What the names begin with.

    Raises:
        ModuleNotFoundError: When mlflow is not installed.
    """
    mlflow = needed("to_mlflow", "mlflow")
    entities = needed("to_mlflow", "mlflow.entities")

    def send(step: int, values: Mapping[str, float]) -> None:
        active = mlflow.active_run()
        run = run_id or (active and active.info.run_id)
        if run is None:
            raise ValueError("'run_id' must be a run, got none. Call mlflow.start_run() before.")
        now = int(time.time() * 1000)
        metrics = [entities.Metric(name, value, now, step) for name, value in values.items()]
        sender = client or mlflow.MlflowClient()
        for start in range(0, len(metrics), MLFLOW_BATCH):
            sender.log_batch(run, metrics=metrics[start : start + MLFLOW_BATCH])

    return receiver(send, prefix)
