"""What instrumenting a training loop costs, on every step and between measurements on a probe.

The network is the 11-layer one of the ELU paper for CIFAR-100: stacks of (layers × units × kernel),
an ELU after every convolution, max-pooling 2×2 with stride 2 after every stack while the map is
larger than one place.
"""

import logging
import tempfile
import warnings
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

import biasshift as bs

from .harness import interleaved, median_ratio, seconds, summary

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
HEADER = {"targets": {"biasshift, every step": 0.05}}  # of a step, at most


def network() -> nn.Sequential:
    """Returns the network of `STACKS`, with pooling between the stacks."""
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


class Loop:
    """A network, its optimizer and one batch: a training step."""

    def __init__(self, device: str, batch: int):
        torch.manual_seed(0)
        self.model = network().to(device)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-4, momentum=0.9)
        self.x = torch.randn(batch, 3, 32, 32, device=device)
        self.y = torch.randint(100, (batch,), device=device)

    def __call__(self) -> None:
        loss = F.cross_entropy(self.model(self.x), self.y)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


def instrumented(method: str, loop: Loop) -> Callable[[], object]:
    """Adds the hooks of a method to the loop's model, and returns what takes them off."""
    if method == "biasshift, every step":
        return bs.instrument(loop.model).remove
    if method == "biasshift, between probe steps":
        probe, quantities = (loop.x[:4], loop.y[:4]), ("activations", "bias_shift")
        return bs.instrument(
            loop.model, loop.optimizer, probe, every=10**9, quantities=quantities
        ).remove
    if method == "plain hooks, var_mean":
        sums: dict[nn.Module, torch.Tensor] = {}

        def add(module: nn.Module, _: object, output: torch.Tensor) -> None:
            both = torch.stack(torch.var_mean(output.detach(), dim=(0, 2, 3)))
            sums[module] = both if module not in sums else sums[module] + both

        elus = [module for module in loop.model if isinstance(module, nn.ELU)]
        handles = [module.register_forward_hook(add) for module in elus]
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


def rows(device: str, repeats: int = 15, batch: int = 100) -> list[dict]:
    """Returns one row per method: a step of each in turn, and what it adds to the bare step."""
    warnings.filterwarnings("ignore", message="Using padding='same' with even kernel lengths")
    loop = Loop(device, batch)
    loops, skipped = dict.fromkeys(METHODS, loop), {}
    try:
        loops["delve, covariances"] = _with_delve(device, batch)
    except ImportError as error:
        skipped["delve, covariances"] = str(error)

    def timed(method: str) -> float:
        loop = loops[method]
        remove = instrumented(method, loop)
        try:
            return seconds(loop, device)
        finally:
            remove()

    times = interleaved([method for method in METHODS if method not in skipped], timed, repeats)
    measured = []
    for method, of_method in times.items():
        share = median_ratio(of_method, times["bare"]) - 1
        of_fastest = min(of_method) / min(times["bare"]) - 1
        row = {"method": method, **summary(of_method)}
        measured.append({**row, "share": share, "share_of_fastest": of_fastest})
        print(
            f"  {method}: {row['seconds'] * 1e3:.0f} ms, {share:+.1%} of a step "
            f"({of_fastest:+.1%} comparing the fastest)",
            flush=True,
        )
    return measured + [{"method": method, "skipped": why} for method, why in skipped.items()]


def _with_delve(device: str, batch: int) -> Loop:
    """delve keeps its hooks on the model for good: it gets one of its own."""
    from delve import SaturationTracker

    logging.getLogger("delve").setLevel(logging.WARNING)
    loop = Loop(device, batch)
    with tempfile.TemporaryDirectory() as folder:
        SaturationTracker(folder, "csv", modules=loop.model, stats=["trc"], device=device)
    return loop
