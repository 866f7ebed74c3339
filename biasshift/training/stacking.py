"""Several networks as one: their minibatches stacked, and the optimizer's state of each taken out of that of all."""

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor


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


def state_slice(optimizer: torch.optim.Optimizer, number: int | None) -> dict[str, Any]:
    """The optimizer's state, or that of one member of an ensemble, in the form that the member alone would have."""
    state = optimizer.state_dict()
    if number is None:
        return state
    own = {key: {name: _of(value, number) for name, value in entry.items()} for key, entry in state["state"].items()}
    return {**state, "state": own}


def _of(value: Any, number: int) -> Any:
    return value[number].clone() if isinstance(value, Tensor) and value.dim() else value


def load_slice(optimizer: torch.optim.Optimizer, state: dict[str, Any], number: int | None) -> None:
    """The reverse: into an optimizer, or into a member's part of that of an ensemble."""
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
