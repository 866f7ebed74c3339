"""What the package's training loop costs: an epoch of the MNIST network against a hand-written loop
of the same model.
"""

import copy
from collections.abc import Callable
from statistics import median

import torch
from torch import nn
from torch.nn import functional as F

from biasshift.data import TensorStream
from biasshift.nets import mlp
from biasshift.training import Gradient, train

from .harness import devices, seconds, write

TITLE = "An epoch of 20,000 examples of the 8 × 128 network (MNIST's shape, batch 64)"
TARGETS = {"biasshift": 1.05}  # times the hand-written loop, at most
EXAMPLES, BATCH, RATE = 20_000, 64, 0.01


def hand_written(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> Callable[[], None]:
    """What anybody would write."""
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)

    def epoch() -> None:
        model.train()
        for chosen in torch.randperm(len(x)).to(x.device).split(BATCH):
            loss = F.cross_entropy(model(x[chosen]), y[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return epoch


def ours(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> Callable[[], None]:
    """The package's generator of steps."""
    update = Gradient(model, torch.optim.SGD(model.parameters(), lr=RATE))
    stream = TensorStream(x, y, BATCH, seed=0)

    def epoch() -> None:
        for _ in train(update, stream, steps=len(stream)):
            pass

    return epoch


METHODS = {"hand-written": hand_written, "hand-written again": hand_written, "biasshift": ours}


def main(repeats: int = 11) -> None:
    for device in devices():
        model = mlp(784).to(device)
        x, y = (
            torch.rand(EXAMPLES, 784, device=device),
            torch.randint(10, (EXAMPLES,), device=device),
        )
        epochs = {name: make(copy.deepcopy(model), x, y) for name, make in METHODS.items()}
        rounds = [
            {name: seconds(epoch, device) for name, epoch in epochs.items()}
            for _ in range(repeats + 1)
        ][1:]
        rows = []
        for name in epochs:
            ratio = median(times[name] / times["hand-written"] for times in rounds)
            print(
                f"  {name}: {median(times[name] for times in rounds):.2f} s, {ratio:.3f} of the "
                "hand-written loop",
                flush=True,
            )
            times = [times[name] for times in rounds]
            rows.append(
                {
                    "method": name,
                    "seconds": median(times),
                    "fastest": min(times),
                    "repeats": repeats,
                    "share": ratio - 1,
                }
            )
        write("loop", device, TITLE, rows, targets=TARGETS)
