"""Scores for TensorBoard, beside those in the run folder."""

from pathlib import Path
from typing import Any


def board(folder: Path, start: int) -> Any:
    """A writer into the folder `tensorboard` of a run, to be used in a ``with`` block; what is there from step ``start`` on is hidden.

    Raises:
        ValueError: TensorBoard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError("--tensorboard needs TensorBoard: pip install tensorboard, or leave it out.") from None
    return SummaryWriter(str(folder / "tensorboard"), purge_step=start or None)
