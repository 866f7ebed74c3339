"""Small convolutional network: the Fisher matrices of the shared weights (per example), where
everybody is close.
"""

import torch
from torch import nn

from . import blocks
from .harness import Task, compare, devices, write
from .mlp import task

TITLE = "CNN 3-32-32-32, 3×3, 16×16 images, 32 examples, every unit's Fisher matrix (per example)"
TARGETS = {"fastest peer": 1.2}
METHODS = [*blocks.METHODS, *blocks.REASONS]


def prepare(method: str, device: str, small: bool) -> Task:
    torch.manual_seed(0)
    channels, size, examples = (4, 4, 2) if small else (32, 16, 32)
    convolutions = [
        part for before in (3, channels, channels) for part in (nn.Conv2d(before, channels, 3, padding=1), nn.ELU())
    ]  # fmt: skip
    model = nn.Sequential(
        *convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10)
    )
    return task(method, device, model, torch.rand(examples, 3, size, size), examples)


def main(repeats: int = 15) -> None:
    for device in devices():
        write("cnn", device, TITLE, compare("cnn", METHODS, device, repeats), targets=TARGETS)
