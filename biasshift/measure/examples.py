"""What a model is called with for some examples: one tensor, several, or a dict of them."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class Examples:
    """The arguments of a model for a number of examples, where they are more than one tensor.

    Tensors with as many rows as there are examples are theirs. Everything else, as a flag or a mask
    of the positions, is the same for all of them.

    >>> x = Examples((torch.ones(3, 2),), {"scale": torch.tensor(2.0)})
    >>> len(x), len(x[:1]), x[:1].kwargs["scale"].item()
    (3, 1, 2.0)
    """

    args: tuple = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return next((len(t) for t in self.tensors() if t.dim()), 0)

    def __getitem__(self, index: slice | Tensor) -> "Examples":
        examples = len(self)
        return self.map(lambda t: t[index] if t.dim() and len(t) == examples else t)

    def tensors(self) -> Iterator[Tensor]:
        """Yields all tensors, in the order of the arguments."""
        yield from _tensors((self.args, self.kwargs))

    def map(self, change: Callable[[Tensor], Tensor]) -> "Examples":
        """Returns the same arguments with every tensor changed."""
        args, kwargs = _mapped((self.args, self.kwargs), change)
        return Examples(args, kwargs)

    def clone(self) -> "Examples":
        """Returns copies of all tensors."""
        return self.map(Tensor.clone)

    @property
    def device(self) -> torch.device:
        """The device of the first tensor."""
        return next((t.device for t in self.tensors()), torch.device("cpu"))


Inputs = Tensor | Examples


def tensors(x: Inputs) -> list[Tensor]:
    """Returns all tensors that a model is called with."""
    return [x] if isinstance(x, Tensor) else list(x.tensors())


def mapped(x: Inputs, change: Callable[[Tensor], Tensor]) -> Inputs:
    """Returns the inputs with every tensor changed."""
    return change(x) if isinstance(x, Tensor) else x.map(change)


def arguments(x: Inputs) -> tuple[tuple, dict[str, Any]]:
    """Returns the positional and the keyword arguments of the model's call."""
    return ((x,), {}) if isinstance(x, Tensor) else (x.args, x.kwargs)


def arguments_as_given(x: Inputs) -> Any:
    """Returns what a user would call the inputs: the tensor, the tuple or the dict of arguments."""
    if isinstance(x, Tensor):
        return x
    if not x.args:
        return x.kwargs
    args = x.args[0] if len(x.args) == 1 else x.args
    return (args, x.kwargs) if x.kwargs else args


def call(model: nn.Module, x: Inputs) -> Any:
    """Returns what the model returns for the examples."""
    args, kwargs = arguments(x)
    return model(*args, **kwargs)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _tensors(part)


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if type(value) is dict:
        return {key: _mapped(part, change) for key, part in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_mapped(part, change) for part in value)
    return value
