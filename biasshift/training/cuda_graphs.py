"""Steps as CUDA graphs: a small network's step is hundreds of launches, which a graph makes one."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from biasshift.training.step import Gradient

WARM_UP = (
    3  # steps before the first capture: they allocate what the optimizer and the libraries keep
)
Captured = tuple[Callable[[], None], Tensor]


def cuda_capture(step: Callable[[], Tensor]) -> Captured:
    """Records a step without running it: what replays it, and where its loss will be."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    return graph.replay, loss


class Graphed:
    """`Gradient`, recorded once and replayed. Steps that are measured, shorter minibatches, and the
    first three run as they are.

    What a graph has written down is read anew when it changes: learning rates, dropout rates, and
    the minibatch's shape.

    Args:
        due: whether the next step is measured.
        passed: told of every replayed step, which no hook hears of.
        capture: records a step; of tests.

    Raises:
        ValueError: away from a GPU, or with a gradient scaler, which waits for the device at every
            step.
    """

    def __init__(
        self,
        gradient: Gradient,
        due: Callable[[], bool] = lambda: False,
        passed: Callable[[], None] = lambda: None,
        capture: Callable[[Callable[[], Tensor]], Captured] = cuda_capture,
    ):
        if capture is cuda_capture and gradient.device.type != "cuda":
            raise ValueError("CUDA graphs need a GPU: leave --graph out.")
        if gradient.scaler is not None:
            raise ValueError(
                "CUDA graphs and precision float16 exclude each other: choose bfloat16, which "
                "needs no scaler."
            )
        self.gradient, self.due, self.passed, self.capture = gradient, due, passed, capture
        self.module, self.optimizer = gradient.module, gradient.optimizer
        self.steps, self.usual = 0, torch.Size()
        self.key: Any = None

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        self.usual = self.usual if self.steps else x.shape
        self.steps += 1
        if self.steps <= WARM_UP or self.due() or x.shape != self.usual:
            return self._eager(x, y)
        if (key := self._written_down(x, y)) != self.key:
            self.key, self.x, self.y = key, x.clone(), y.clone()
            self.replay, self.loss = self.capture(
                lambda: self.gradient(self.x, self.y)
            )  # hooks count this step
        else:
            self.x.copy_(x)
            self.y.copy_(y)
            self.passed()
        self.replay()
        return self.loss.clone()

    def _eager(self, x: Tensor, y: Tensor) -> Tensor:
        if x.device.type != "cuda":
            return self.gradient(x, y)
        side = (
            torch.cuda.Stream()
        )  # autograd remembers streams; a capture must not meet the default one
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            loss = self.gradient(x, y)
        torch.cuda.current_stream().wait_stream(side)
        return loss

    def _written_down(self, x: Tensor, y: Tensor) -> tuple:
        rates = tuple(float(group["lr"]) for group in self.optimizer.param_groups)
        drops = tuple(
            module.p
            for module in self.module.modules()
            if isinstance(module, nn.modules.dropout._DropoutNd)
        )
        return x.shape, x.dtype, y.shape, y.dtype, rates, drops

    def state_dict(self) -> dict:
        """As of the steps themselves: a graph is recorded again."""
        return self.gradient.state_dict()

    def load_state_dict(self, state: dict) -> None:
        """Goes on where another one was."""
        self.gradient.load_state_dict(state)
