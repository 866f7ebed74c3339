"""A part of a composite module: one linear layer inside it, with the composite's parameters."""

import weakref

import torch
from torch import Tensor, nn


class LinearPart(nn.Linear):
    """One linear layer inside an attention or recurrent module, with that module's parameters.

    It holds no parameter and is no child of its owner: weights are rows of the owner's parameter,
    read anew at every use. A model's state, copies and pickles know nothing of it.
    """

    def __init__(
        self, owner: nn.Module, weight: str, bias: str | None, inputs: int, units: int, first: int
    ):
        nn.Module.__init__(self)  # nn.Linear would make parameters
        self.in_features, self.out_features = inputs, units
        self._owner = weakref.ref(owner)
        self._keys = {"weight": weight, "bias": bias}
        self.first = first  # of the rows of the owner's parameters

    @property
    def owner(self) -> nn.Module:
        """The module that this is a part of."""
        owner = self._owner()
        if owner is None:
            raise RuntimeError("The module that this layer is a part of is gone. Keep the model.")
        return owner

    @property
    def weight(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The rows of the owner's weight that belong to this part, (units, inputs)."""
        weight = self._rows("weight")
        assert weight is not None
        return weight

    @property
    def bias(self) -> Tensor | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The rows of the owner's bias that belong to this part; None without one."""
        return self._rows("bias")

    @property
    def names(self) -> list[str]:
        """The owner's names of the weight, and of the bias where there is one."""
        return [name for name in self._keys.values() if name is not None]

    def parameter(self, key: str) -> Tensor | None:
        """Returns the whole parameter of the owner that ``"weight"`` or ``"bias"`` is read from.

        None where there is none, or where it is computed (by a parametrization).
        """
        name = self._keys[key]
        return None if name is None else self.owner._parameters.get(name)

    def rows(self, whole: Tensor) -> Tensor:
        """Returns the part's rows of a tensor that is shaped like the owner's parameter."""
        last = self.first + self.out_features
        return whole if len(whole) == self.out_features else whole[self.first : last]

    def _rows(self, key: str) -> Tensor | None:
        name = self._keys[key]
        whole = None if name is None else getattr(self.owner, name)
        return None if whole is None else self.rows(whole)

    def with_rows(self, whole: Tensor, rows: Tensor) -> Tensor:
        """Returns a copy of a tensor like the owner's parameter, with other rows for this part."""
        if len(whole) == self.out_features:
            return rows
        last = self.first + self.out_features
        return torch.cat([whole[: self.first], rows, whole[last:]])

    def full_name(self, name: str, key: str) -> str:
        """Returns the parameter's name in the model.

        Args:
            name: of this part, in the model.
            key: "weight" or "bias".
        """
        return ".".join(filter(None, [name.rpartition(".")[0], self._keys[key]]))

    def reads(self, name: str) -> bool:
        """Tells whether weight or bias come from the owner's parameter of this name.

        A name that the owner does not have stands for any, behind a parametrization.
        """
        return name in self._keys.values() or name not in self.owner._parameters

    def reset_parameters(self) -> None:
        """Does nothing: the weights are the owner's."""


def identity(like: Tensor) -> Tensor:
    """Returns an identity matrix for the last axis. A product with it is exact."""
    return torch.eye(like.shape[-1], dtype=like.dtype, device=like.device)
