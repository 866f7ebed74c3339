"""What the package's training loop costs: an epoch, against a hand-written loop."""

import copy
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from biasshift.data import TensorStream
from biasshift.nets import mlp
from biasshift.training import Gradient, train

from .harness import interleaved, median_ratio, seconds, summary

TITLE = "An epoch of 20,000 examples of the 8 × 128 network (MNIST's shape, batch 64)"
HEADER = {"targets": {"biasshift": 1.05}}  # times the hand-written loop, at most
EXAMPLES, BATCH, RATE = 20_000, 64, 0.01


def hand_written(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> Callable[[], None]:
    """Returns an epoch as anybody would write it."""
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
    """Returns an epoch of the package's generator of steps."""
    update = Gradient(model, torch.optim.SGD(model.parameters(), lr=RATE))
    stream = TensorStream(x, y, BATCH, seed=0)

    def epoch() -> None:
        for _ in train(update, stream, steps=len(stream)):
            pass

    return epoch


METHODS = {"hand-written": hand_written, "hand-written again": hand_written, "biasshift": ours}


def rows(device: str, repeats: int = 11) -> list[dict]:
    """Returns one row per loop: an epoch of each in turn, and what it takes more than by hand."""
    model = mlp(784).to(device)
    x = torch.rand(EXAMPLES, 784, device=device)
    y = torch.randint(10, (EXAMPLES,), device=device)
    epochs = {name: make(copy.deepcopy(model), x, y) for name, make in METHODS.items()}
    times = interleaved(epochs, lambda name: seconds(epochs[name], device), repeats)
    measured = []
    for name in epochs:
        ratio = median_ratio(times[name], times["hand-written"])
        measured.append({"method": name, **summary(times[name]), "share": ratio - 1})
        print(
            f"  {name}: {measured[-1]['seconds']:.2f} s, {ratio:.3f} of the hand-written loop",
            flush=True,
        )
    return measured
