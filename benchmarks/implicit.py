"""Layers too large for blocks: natural gradients from the samples alone, against the blocks."""

import copy

import torch
from torch import Tensor, nn

import biasshift as bs

from .harness import Task, compare

TITLE = "Natural gradients of all units: from the samples (implicit) and from the blocks (dense)"
DAMPING, RESIDUAL = 1e-2, 1e-3
COMPARED = {  # name → (inputs, units, samples, storage)
    "1024→1024, 4096 samples, dense": (1024, 1024, 4096, "dense"),
    "1024→1024, 4096 samples, implicit": (1024, 1024, 4096, "implicit"),
}
LARGE = {  # once: (units) blocks of (inputs)² would take 275 and 147 GB in float32
    "4096→4096, 4096 samples, implicit": (4096, 4096, 4096, "implicit"),
    "3×3 768→768 on 14×14, 8 examples, implicit": (768, 768, 8, "conv"),
}
METHODS = COMPARED | LARGE
HEADER = {
    "targets": {"1024→1024, dense over implicit": 3, "4096→4096, implicit, bytes": 2**31},
    "damping": DAMPING,
    "residual": RESIDUAL,
}


def prepare(method: str, device: str, small: bool) -> Task:
    """Returns the task of one storage at one size."""
    inputs, units, samples, storage = METHODS[method]
    if small:
        inputs, units, samples = 8, 8, 4 if storage == "conv" else 32
    torch.manual_seed(0)
    if storage == "conv":
        return _convolution(inputs, samples, device)
    return _linear(inputs, units, samples, storage, device)


def _linear(inputs: int, units: int, samples: int, storage: str, device: str) -> Task:
    """Correlated activations behind an ELU, and errors that sit on few of the samples, as they do
    in a trained network.
    """
    rank = inputs // 4
    factors = torch.randn(samples, rank) @ torch.randn(rank, inputs) / rank**0.5
    a = nn.functional.elu(factors + 0.5 * torch.randn(samples, inputs)).to(device)
    delta2 = torch.randn(samples, units).mul_(1.5).exp_().to(device)
    g, g0 = torch.randn(units, inputs, device=device), torch.randn(units, device=device)

    def run() -> tuple:
        fisher = bs.UnitFisher.from_samples(
            a, delta2, damping=DAMPING, storage=storage, tolerance=RESIDUAL, memory_budget=2**40
        )
        return fisher.natural_gradient(g, g0)

    def error(result: tuple) -> float:
        of_units = (
            (a, delta2[:, unit], g[unit], g0[unit], result[0][unit]) for unit in (0, units - 1)
        )
        return max(_residual(*(x.double() for x in of_unit)) for of_unit in of_units)

    return Task(run, error)


def _residual(a: Tensor, weights: Tensor, g: Tensor, g0: Tensor, dw: Tensor) -> float:
    """``|c W Δw − (g − g₀ m)| / |g − g₀ m|`` of one unit, its covariance written out."""
    c, q = weights.mean(), weights / weights.sum()
    m = q @ a
    centered = (a - m) * q.sqrt()[:, None]
    right = g - g0 * m
    left = c * (centered.T @ (centered @ dw) + DAMPING * centered.square().sum() / a.shape[1] * dw)
    return ((left - right).norm() / right.norm()).item()


def _convolution(channels: int, examples: int, device: str) -> Task:
    """Shared weights, per example; 10 classes, exact over the labels. The answer is judged by the
    blocks of two units.
    """
    layer = nn.Conv2d(channels, channels, 3, padding=1)
    model = nn.Sequential(
        layer, nn.ELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10)
    ).to(device)
    x = nn.functional.elu(torch.randn(examples, channels, 14, 14, device=device))
    g, g0 = torch.randn(channels, 9 * channels, device=device), torch.randn(channels, device=device)
    judged = [0, channels - 1]

    def run() -> tuple:
        fishers = bs.unit_fisher(
            model, x, layers=["0"], damping=DAMPING, storage="implicit", tolerance=RESIDUAL
        )
        return fishers["0"].natural_gradient(g, g0)

    def error(result: tuple) -> float:
        """Against a direct solution in float64. A residual would say little: of so few examples V
        is nearly singular, and float32 errors of the network's own passes, which the solution
        hardly feels, are magnified in it.
        """
        wide = copy.deepcopy(model).double()
        fishers = bs.unit_fisher(
            wide, x.double(), layers=["0"], units=judged, damping=DAMPING, storage="dense"
        )
        exact, _ = fishers["0"].natural_gradient(g[judged].double(), g0[judged].double())
        return ((result[0][judged].double() - exact).norm(dim=1) / exact.norm(dim=1)).max().item()

    return Task(run, error)


def rows(device: str, repeats: int = 3) -> list[dict]:
    """Returns one row per storage and size; what is `LARGE` runs once."""
    compared = compare("implicit", list(COMPARED), device, repeats, tolerance=2 * RESIDUAL)
    return compared + compare("implicit", list(LARGE), device, 0, tolerance=2 * RESIDUAL)
