"""Several networks of one shape trained at once, as one vmapped program.

On a GPU, five small networks cost little more than one. Here are the update of all members, the
stream of their minibatches, and each member's part of the optimizer's state.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap

from biasshift.data.stream import Stream, TensorStream, epoch_of_all
from biasshift.training.step import Loss

# -- the networks ------------------------------------------------------------------------------


class Ensemble:
    """One optimizer step of every member: ``(x, y)`` of all, stacked, → their losses, (members,).

    The members' parameters become views into stacked ones: a member, measured or saved on its own
    at any time, is what the ensemble trains. Each follows the trajectory it would have had alone,
    up to rounding; with dropout or another source of chance in the forward pass, up to other draws
    of it.

    Args:
        members: Networks of one architecture.
        make_optimizer: The stacked parameters → an optimizer that treats all their elements alike,
            such as SGD.
        loss: (outputs, y) → the mean loss of one member's minibatch.

    Raises:
        ValueError: The members differ in more than the values of their parameters, or there are
            none; or the optimizer is one of something else than the stacked parameters, such as of
            a network.
    """

    def __init__(
        self,
        members: Sequence[nn.Module],
        make_optimizer: Callable[[Iterator[nn.Parameter]], torch.optim.Optimizer],
        loss: Loss = F.cross_entropy,
    ):
        refuse_unlike(members)
        self.members, self.loss = list(members), loss
        self.parameters = {
            name: nn.Parameter(_stacked(members, name)) for name, _ in members[0].named_parameters()
        }
        self.buffers = {name: _stacked(members, name) for name, _ in members[0].named_buffers()}
        for number, member in enumerate(members):
            for name, parameter in member.named_parameters():
                parameter.data = self.parameters[name].data[number]
            for name, _ in member.named_buffers():
                owner, _, own = name.rpartition(".")
                member.get_submodule(owner)._buffers[own] = self.buffers[name][number]
        self.device = next(iter(self.parameters.values())).device
        self.module = copy.deepcopy(members[0]).to("meta")  # the architecture alone
        self.optimizer = make_optimizer(iter(self.parameters.values()))
        trained = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        if trained != {id(p) for p in self.parameters.values()}:
            raise ValueError(
                f"'{type(self.optimizer).__name__}' cannot train the members of an ensemble "
                "together: train them apart."
            )

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        self.module.train()
        self.optimizer.zero_grad()
        losses = vmap(self._loss, randomness="different")(self.parameters, self.buffers, x, y)
        losses.sum().backward()
        self.optimizer.step()
        return losses.detach()

    def state_dict(self) -> dict:
        """Returns an empty dict: the members and the optimizer have state dicts of their own."""
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Does nothing, see `state_dict`."""

    def _loss(
        self, parameters: dict[str, Any], buffers: dict[str, Any], x: Tensor, y: Tensor
    ) -> Tensor:
        return self.loss(functional_call(self.module, (parameters, buffers), (x,)), y)


def _stacked(members: Sequence[nn.Module], name: str) -> Tensor:
    return torch.stack([dict(_tensors(member))[name].detach() for member in members])


def _tensors(member: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from member.named_parameters()
    yield from member.named_buffers()


def refuse_unlike(members: Sequence[nn.Module]) -> None:
    """Refuses members that differ in more than the values of their parameters and buffers.

    Raises:
        ValueError: There are none, or one differs from member 0; the message names the first.
    """
    if not members:
        raise ValueError("An ensemble needs at least one member.")
    shapes = [
        {name: (p.shape, p.dtype, p.device) for name, p in _tensors(member)} for member in members
    ]
    for number, member in enumerate(members):
        if shapes[number] != shapes[0]:
            raise ValueError(
                f"Member {number} of the ensemble has other parameters than member 0: train them "
                "apart."
            )
        if repr(member) != repr(members[0]):  # it would be trained with the activations of member 0
            raise ValueError(
                f"Member {number} of the ensemble has other modules than member 0: train them "
                "apart."
            )


# -- their minibatches -------------------------------------------------------------------------


class StackedStream:
    """The minibatches of several streams, stacked along a new first axis; of one, as they are.

    Raises:
        ValueError: The epochs of the streams have different numbers of minibatches.
    """

    def __init__(self, streams: Sequence[Stream]):
        self.streams = streams
        if len({len(stream) for stream in streams}) > 1:
            raise ValueError(
                "All members of an ensemble must have epochs of equally many minibatches."
            )

    def __len__(self) -> int:
        """The minibatches of an epoch."""
        return len(self.streams[0])

    def epoch(self, number: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields the minibatches of epoch ``number``, from 1, but for the first ``start``.

        They are x (members, batch, …) and y (members, batch); of one stream, without ``members``.
        """
        if len(self.streams) == 1:
            yield from self.streams[0].epoch(number, start)
        elif (tensors := _of_one_data_set(self.streams)) is not None:
            yield from epoch_of_all(tensors, number, start)
        else:
            yield from self._one_by_one(number, start)

    def _one_by_one(self, number: int, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        epochs = [stream.epoch(number, start) for stream in self.streams]
        for batches in zip(*epochs, strict=True):
            xs, ys = zip(*batches, strict=True)
            yield torch.stack(xs), torch.stack(ys)


def _of_one_data_set(streams: Sequence[Stream]) -> list[TensorStream] | None:
    """The streams, where they differ in their seeds alone and take examples as they are."""
    tensors = [stream for stream in streams if isinstance(stream, TensorStream)]
    alike = {
        (id(s.x), id(s.y), s.batch_size, s.views, s.rank, s.world, s.drop_last) for s in tensors
    }
    plain = all(stream.augment is None and stream.prepare is None for stream in tensors)
    return tensors if len(tensors) == len(streams) and len(alike) == 1 and plain else None


# -- a member's part of the optimizer's state --------------------------------------------------


def state_slice(optimizer: torch.optim.Optimizer, number: int | None) -> dict[str, Any]:
    """Returns the optimizer's state, or that of one member of an ensemble.

    A member's state is in the form that its optimizer would have if it was trained alone: either
    may be resumed as the other.

    Args:
        optimizer: That of an `Ensemble`, or of one network.
        number: The member, from 0; ``None`` for the optimizer of one network.
    """
    state = optimizer.state_dict()
    if number is None:
        return state
    own = {
        key: {
            name: value[number].clone() if isinstance(value, Tensor) and value.dim() else value
            for name, value in entry.items()
        }
        for key, entry in state["state"].items()
    }
    return {**state, "state": own}


def load_slice(optimizer: torch.optim.Optimizer, state: dict[str, Any], number: int | None) -> None:
    """Loads what `state_slice` returned into an optimizer, or into a member's part of it.

    Args:
        optimizer: That of an `Ensemble`, or of one network.
        state: In the form of one network's optimizer.
        number: The member, from 0; ``None`` for the optimizer of one network.
    """
    if number is None:
        optimizer.load_state_dict(state)
        return
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for key, entry in state["state"].items():
        for name, value in entry.items():
            parameter = parameters[key]
            whole = optimizer.state[parameter]
            if isinstance(value, Tensor) and value.dim():
                whole.setdefault(name, torch.zeros_like(parameter))
                whole[name][number] = value.to(parameter.device)
            else:
                whole[name] = copy.copy(value)
