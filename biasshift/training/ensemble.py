"""Several networks of one shape trained at once, as one vmapped program: on a GPU, five small
networks cost little more than one.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap

from biasshift.training.step import Loss


class Ensemble:
    """One optimizer step of every member: ``(x, y)`` of all, stacked, → their losses, (members,).

    The members' parameters become views into stacked ones: a member, measured or saved on its own
    at any time, is what the ensemble trains. Each follows the trajectory it would have had alone,
    up to rounding; with dropout or another source of chance in the forward pass, up to other draws
    of it.

    Args:
        members: networks of one architecture.
        make_optimizer: the stacked parameters → an optimizer that treats all their elements alike,
            such as SGD.
        loss: (outputs, y) → the mean loss of one member's minibatch.

    Raises:
        ValueError: members that differ in more than the values of their parameters, or fewer than
            one; or an optimizer of something else than the stacked parameters, such as one that
            watches a network.
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
        self.module = copy.deepcopy(members[0]).to("meta")  # the architecture alone
        self.optimizer = make_optimizer(iter(self.parameters.values()))
        if {id(p) for group in self.optimizer.param_groups for p in group["params"]} != {
            id(p) for p in self.parameters.values()
        }:
            raise ValueError(
                f"{type(self.optimizer).__name__} does not train the members of an ensemble "
                "together: train them apart."
            )

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        self.module.train()
        self.optimizer.zero_grad()
        losses = vmap(self._loss, randomness="different")(self.parameters, self.buffers, x, y)
        losses.sum().backward()
        self.optimizer.step()
        return losses.detach()

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
    """Raises a ValueError that names the first member that is another network than member 0."""
    if not members:
        raise ValueError("an ensemble needs at least one member.")
    shapes = [
        {name: (p.shape, p.dtype, p.device) for name, p in _tensors(member)} for member in members
    ]
    for number, member in enumerate(members):
        if shapes[number] != shapes[0]:
            raise ValueError(
                f"member {number} of the ensemble has other parameters than member 0: train them "
                "apart."
            )
        if repr(member) != repr(members[0]):  # it would be trained with the activations of member 0
            raise ValueError(
                f"member {number} of the ensemble has other modules than member 0: train them "
                "apart."
            )


# -- several networks as one -------------------------------------------------------------------


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
    """The optimizer's state, or that of one member of an ensemble, in the form that the member
    alone would have.
    """
    state = optimizer.state_dict()
    if number is None:
        return state
    own = {
        key: {name: _of(value, number) for name, value in entry.items()}
        for key, entry in state["state"].items()
    }
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
