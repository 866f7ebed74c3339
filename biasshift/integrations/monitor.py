"""What callbacks share: a log that begins and ends with somebody's training."""

from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd
from torch import nn

from biasshift.distributed import rank, world_size
from biasshift.integrations.scalars import Receiver
from biasshift.tracking.instrument import instrument


def share(*values: Any) -> Any:
    """Returns this process's share of tensors or lists: every n-th example, of n processes.

    Of several values it is a tuple, of one the value. Give it to a callback as
    ``probe=lambda: share(x, y)`` with ``distributed=True``: the processes exist when training
    begins.

    Raises:
        ValueError: A value cannot be sliced.
    """
    for value in values:
        if not hasattr(value, "__getitem__") or isinstance(value, Mapping):
            raise ValueError(
                f"Values must be tensors or lists of examples, got {type(value).__name__}. Share "
                "each tensor of a dict."
            )
    shares = tuple(value[rank() :: world_size()] for value in values)
    return shares if len(shares) != 1 else shares[0]


class Monitor:
    """The log of a training that a trainer runs; `probe_log` is None before it begins."""

    def __init__(
        self,
        probe: Any,
        every: int = 100,
        *,
        model: str = "",
        to: Iterable[Receiver] = (),
        **options: Any,
    ):
        to = tuple(to)
        if probe is None and to:
            raise ValueError(
                "'probe' must be there where rows are sent on, got None. Give probe=, or leave out "
                "what they are sent to."
            )
        self.probe, self.every, self.options = probe, every, options
        self.module, self.receivers = model, to
        self.probe_log: Any = None

    def begin(self, model: nn.Module, optimizer: Any, step: int) -> None:
        """Instruments a model from a number of completed steps on."""
        self.remove()
        probe: Any = self.probe() if callable(self.probe) else self.probe
        measured, options = model.get_submodule(self.module), {"step": step, **self.options}
        self.probe_log = instrument(measured, optimizer, probe, self.every, **options)
        for receive in self.receivers:
            self.probe_log.follow(receive)

    def end(self, failed: bool = False) -> None:
        """Takes the log off; after training that failed nothing is said of steps not seen."""
        if self.probe_log is not None:
            self.probe_log.__exit__(*((Exception,) if failed else (None,)))

    def remove(self) -> None:
        """Takes the log's hooks off the model and the optimizer; its table stays readable.

        The end of training does the same. Where a trainer tells nothing of an exception, this is
        the way.
        """
        self.end(failed=True)

    def table(self, compact: bool = False) -> pd.DataFrame:
        """Returns the table of the log, as that of `biasshift.instrument`.

        Raises:
            RuntimeError: Before training has begun.
        """
        if self.probe_log is None:
            raise RuntimeError("The log begins with training: read the table after trainer.fit.")
        return self.probe_log.table(compact)
