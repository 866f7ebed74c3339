"""One step of an optimizer as a call: (x, y) → the loss before it."""

from collections.abc import Callable
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from biasshift.distributed import all_reduce_sum, is_distributed, world_size
from biasshift.precision import Precision

Loss = Callable[[Tensor, Tensor], Tensor]


def shared(model: nn.Module) -> nn.Module:
    """Wraps a model in ``DistributedDataParallel``, once; of one process it is returned as it is.

    An optimizer with hooks on the model must be given what this returns: the forward passes go
    through it.
    """
    if not is_distributed() or isinstance(model, nn.parallel.DistributedDataParallel):
        return model
    return nn.parallel.DistributedDataParallel(model)


class Gradient:
    """Forward, backward, step: a hand-written loop's body.

    With several processes the model is wrapped by `shared`, and the gradient is that of the mean
    over the examples of all of them: that of one process that sees the whole minibatch. The loss
    that each returns is weighted by its examples, so that their mean is the loss of the whole, too.

    Args:
        model: Trained in training mode, whatever mode it is in before.
        optimizer: Of the model's parameters.
        loss: (outputs, y) → the mean loss of the minibatch.
        precision: "bfloat16" and "float16" run forward passes under autocast, the latter with a
            gradient scaler; "tf32" is float32 whose products keep 10 bits, on GPUs that can.
        compiled: Passes go through ``torch.compile``.

    Raises:
        ValueError: The precision is float16 and the model is not on a GPU.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss: Loss = F.cross_entropy,
        precision: Precision = "float32",
        compiled: bool = False,
    ):
        device = next(model.parameters()).device
        if precision == "float16" and device.type != "cuda":
            raise ValueError("'precision' float16 needs a GPU: choose bfloat16 or float32.")
        self.module = (
            model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
        )
        self.optimizer, self.loss, self.device = optimizer, loss, device
        self.autocast = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(precision)
        self.scaler = torch.amp.GradScaler(device.type) if precision == "float16" else None
        forward = shared(model)
        self.forward: Callable[[Tensor], Tensor] = torch.compile(forward) if compiled else forward

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        # To ask costs less than to set the mode of every module, which a small network feels.
        if not self.module.training:
            self.module.train()
        self.optimizer.zero_grad()
        with torch.autocast(self.device.type, self.autocast) if self.autocast else nullcontext():
            loss = self.loss(self.forward(x), y)
        loss = loss * self._weight(len(y)).to(loss) if is_distributed() else loss
        if self.scaler is None:
            loss.backward()
            self.optimizer.step()
        else:
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
        return loss.detach()

    def _weight(self, examples: int) -> Tensor:
        """Of this process's mean in the mean over all: 1 where all have as many examples.

        It stays on the device: the host does not wait for it.
        """
        everyone = torch.full((1,), float(examples), dtype=torch.float64, device=self.device)
        weight = examples * world_size() / all_reduce_sum(everyone, 1)
        return weight.to(self.device).squeeze()

    def state_dict(self) -> dict:
        """Returns the state of the gradient scaler; an empty dict where there is none.

        The model and the optimizer have state dicts of their own.
        """
        return {} if self.scaler is None else self.scaler.state_dict()

    def load_state_dict(self, state: dict) -> None:
        """Restores what `state_dict` returned, if both have a gradient scaler."""
        if self.scaler is not None and state:
            self.scaler.load_state_dict(state)
