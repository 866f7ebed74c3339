"""Small convolutional network: the Fisher matrices of shared weights, per example."""

import torch
from torch import nn

from . import blocks
from .harness import Task, compare
from .mlp import task

TITLE = (
    "CNN 3-32-32-32, 3×3, 16×16 images, 32 examples, every unit's finished Fisher matrix "
    "(per example)"
)
HEADER = {"targets": {"fastest peer": 1.5}}
METHODS = [*blocks.METHODS, *blocks.REASONS]


def network(channels: int) -> nn.Sequential:
    """Returns three convolutions of RGB images with ELUs, their mean, and a head of 10 classes."""
    convolutions = [
        part
        for before in (3, channels, channels)
        for part in (nn.Conv2d(before, channels, 3, padding=1), nn.ELU())
    ]
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10)
    return nn.Sequential(*convolutions, *head)


def prepare(method: str, device: str, small: bool) -> Task:
    """Returns the task of one method."""
    torch.manual_seed(0)
    channels, size, examples = (4, 4, 2) if small else (32, 16, 32)
    model = network(channels)
    return task(method, device, model, torch.rand(examples, 3, size, size), examples)


def rows(device: str, repeats: int = 15) -> list[dict]:
    """Returns one row per method."""
    return compare("cnn", METHODS, device, repeats)
