"""What watching a training loop costs: activation moments on every step, and a probe log between
two of its measurements.

The network is the 11-layer one of the ELU paper for CIFAR-100: stacks of (layers × units × kernel),
an ELU after every convolution, max-pooling 2×2 with stride 2 after every stack while the map is
larger than one place.
"""

import logging
import tempfile
import warnings
from collections.abc import Callable
from statistics import median

import torch
from torch import nn
from torch.nn import functional as F

import biasshift as bs

from .harness import devices, seconds, write

TITLE = "Share of a training step of the 11-layer network (CIFAR-100, batch 100)"
STACKS = [
    [(192, 5)],
    [(192, 1), (240, 3)],
    [(240, 1), (260, 2)],
    [(260, 1), (280, 2)],
    [(280, 1), (300, 2)],
    [(300, 1)],
    [(100, 1)],
]
TARGETS = {"biasshift, every step": 0.05}  # of a step, at most


def network() -> nn.Sequential:
    modules: list[nn.Module] = []
    channels, size = 3, 32
    for stack in STACKS:
        for units, kernel in stack:
            modules += [nn.Conv2d(channels, units, kernel, padding="same"), nn.ELU()]
            channels = units
        if size > 1:
            modules.append(nn.MaxPool2d(2, 2))
            size //= 2
    return nn.Sequential(*modules, nn.Flatten())


def watched(
    method: str,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    x: torch.Tensor,
    y: torch.Tensor,
) -> Callable[[], object]:
    """Starts watching; returns what stops it."""
    if method == "biasshift, every step":
        return bs.instrument(model).remove
    if method == "biasshift, between probe steps":
        return bs.instrument(
            model, optimizer, (x[:4], y[:4]), every=10**9, quantities=("activations", "bias_shift")
        ).remove
    if method == "plain hooks, var_mean":
        sums: dict[nn.Module, torch.Tensor] = {}

        def add(module: nn.Module, _: object, output: torch.Tensor) -> None:
            both = torch.stack(torch.var_mean(output.detach(), dim=(0, 2, 3)))
            sums[module] = both if module not in sums else sums[module] + both

        handles = [
            module.register_forward_hook(add) for module in model if isinstance(module, nn.ELU)
        ]
        return lambda: [handle.remove() for handle in handles]
    return lambda: None


METHODS = [
    "bare",
    "bare again",
    "biasshift, every step",
    "biasshift, between probe steps",
    "plain hooks, var_mean",
    "delve, covariances",
]


class Loop:
    """A network, its optimizer and one batch: a training step."""

    def __init__(self, device: str, batch: int):
        torch.manual_seed(0)
        self.model = network().to(device)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-4, momentum=0.9)
        self.x, self.y = (
            torch.randn(batch, 3, 32, 32, device=device),
            torch.randint(100, (batch,), device=device),
        )

    def __call__(self) -> None:
        loss = F.cross_entropy(self.model(self.x), self.y)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


def shares(device: str, repeats: int, batch: int = 100) -> list[dict]:
    """Every method on one step in turn, and what each adds to the bare step beside it."""
    warnings.filterwarnings("ignore", message="Using padding='same' with even kernel lengths")
    loop = Loop(device, batch)
    loops, skipped = dict.fromkeys(METHODS, loop), {}
    try:
        loops["delve, covariances"] = _with_delve(device, batch)
    except ImportError as error:
        skipped["delve, covariances"] = str(error)

    def timed(method: str) -> float:
        loop = loops[method]
        stop = watched(method, loop.model, loop.optimizer, loop.x, loop.y)
        try:
            return seconds(loop, device)
        finally:
            stop()

    methods = [method for method in METHODS if method not in skipped]
    rounds = [{method: timed(method) for method in methods} for _ in range(repeats + 1)][1:]
    rows = []
    for method in methods:
        times = [times[method] for times in rounds]
        share = median(times[method] / times["bare"] - 1 for times in rounds)
        of_fastest = min(times) / min(times["bare"] for times in rounds) - 1
        print(
            f"  {method}: {median(times) * 1e3:.0f} ms, {share:+.1%} of a step ({of_fastest:+.1%} "
            "comparing the fastest)",
            flush=True,
        )
        row = {
            "method": method,
            "seconds": median(times),
            "fastest": min(times),
            "repeats": repeats,
        }
        rows.append({**row, "share": share, "share_of_fastest": of_fastest})
    return rows + [{"method": method, "skipped": why} for method, why in skipped.items()]


def _with_delve(device: str, batch: int) -> Loop:
    """delve keeps its hooks on the model for good: it gets one of its own."""
    from delve import SaturationTracker

    logging.getLogger("delve").setLevel(logging.WARNING)
    loop = Loop(device, batch)
    with tempfile.TemporaryDirectory() as folder:
        SaturationTracker(folder, "csv", modules=loop.model, stats=["trc"], device=device)
    return loop


def main(repeats: int = 15) -> None:
    for device in devices():
        write("overhead", device, TITLE, shares(device, repeats), targets=TARGETS)
