"""Steps as CUDA graphs: a small network's step is hundreds of launches, which a graph makes one."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from biasshift.training.ensemble import Ensemble
from biasshift.training.step import Gradient

# steps before the first capture: they allocate what the optimizer and the libraries keep
WARM_UP = 3
Capture = tuple[Callable[[], None], Tensor]  # what replays a step, and where its loss will be


def cuda_capture(step: Callable[[], Tensor]) -> Capture:
    """Records a step without running it, and returns its replay and the tensor of its loss."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    return graph.replay, loss


class GraphedStep:
    """The step of a `Gradient` or of an `Ensemble`, recorded once and replayed.

    Steps that are measured, shorter minibatches, and the first three run as they are. A graph
    holds constants: the numbers of the optimizer's groups, such as learning rate and momentum, the
    dropout rates, and the minibatch's shape. It is recorded again when one of them changes.

    Args:
        update: The step, on a GPU. An ensemble's has all its members.
        due: Whether the next step is measured.
        on_replay: Called at every replayed step: hooks do not fire then.
        capture: Records a step; an argument for tests.

    Raises:
        ValueError: The model is not on a GPU, or there is a gradient scaler, which waits for the
            device at every step.
    """

    def __init__(
        self,
        update: Gradient | Ensemble,
        due: Callable[[], bool] = lambda: False,
        on_replay: Callable[[], None] = lambda: None,
        capture: Callable[[Callable[[], Tensor]], Capture] = cuda_capture,
    ):
        if capture is cuda_capture and update.device.type != "cuda":
            raise ValueError("CUDA graphs need a GPU: leave --graph out.")
        if isinstance(update, Gradient) and update.scaler is not None:
            raise ValueError(
                "CUDA graphs and precision float16 exclude each other: choose bfloat16, which "
                "needs no scaler."
            )
        self.update, self.due, self.on_replay, self.capture = update, due, on_replay, capture
        self.module, self.optimizer = update.module, update.optimizer
        self.steps, self.usual_shape = 0, torch.Size()
        self.constants: Any = None
        self._side: Any = None  # the stream of the steps that run as they are

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        self.usual_shape = self.usual_shape if self.steps else x.shape
        self.steps += 1
        if self.steps <= WARM_UP or self.due() or x.shape != self.usual_shape:
            return self._eager(x, y)
        if (constants := self._constants(x, y)) != self.constants:
            self.constants, self.x, self.y = constants, x.clone(), y.clone()
            # Hooks fire while a step is recorded: they count this step.
            self.replay, self.loss = self.capture(lambda: self.update(self.x, self.y))
        else:
            self.x.copy_(x)
            self.y.copy_(y)
            self.on_replay()
        self.replay()
        return self.loss.clone()

    def _eager(self, x: Tensor, y: Tensor) -> Tensor:
        if x.device.type != "cuda":
            return self.update(x, y)
        # Autograd remembers streams; a capture must not meet the default one.
        usual = torch.cuda.current_stream(x.device)
        self._side = self._side or torch.cuda.Stream(x.device)
        self._side.wait_stream(usual)
        with torch.cuda.stream(self._side):
            loss = self.update(x, y)
        usual.wait_stream(self._side)
        return loss

    def _constants(self, x: Tensor, y: Tensor) -> tuple:
        """What a graph that is recorded now holds for good."""
        numbers = tuple(
            tuple((name, value) for name, value in group.items() if name != "params")
            for group in self.optimizer.param_groups
        )
        drops = tuple(
            module.p
            for module in self.module.modules()
            if isinstance(module, nn.modules.dropout._DropoutNd)
        )
        return x.shape, x.dtype, y.shape, y.dtype, numbers, drops

    def state_dict(self) -> dict:
        """Returns the state of the step itself: a graph is recorded again."""
        return self.update.state_dict()

    def load_state_dict(self, state: dict) -> None:
        """Restores what `state_dict` returned."""
        self.update.load_state_dict(state)
