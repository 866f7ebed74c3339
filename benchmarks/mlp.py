"""Whole network: the unit Fisher matrices of all units of an MLP, exact over the labels."""

import copy

import torch
from torch import nn

from . import blocks
from .harness import Task, compare

TITLE = "MLP 784-128×3-10, 256 examples, every unit's finished Fisher matrix"
HEADER = {"targets": {"ASDL": 14, "BackPACK": 6, "torch.func": 7}}  # times our time, at least
PIECES = {"ASDL": 256, "BackPACK": 256, "Opacus": 256, "torch.func": 64}  # examples at once
METHODS = [*blocks.METHODS, *blocks.REASONS]


def prepare(method: str, device: str, small: bool) -> Task:
    """Returns the task of one method."""
    torch.manual_seed(0)
    model, examples = network(small), 4 if small else 256
    x = torch.rand(examples, 8 if small else 784)
    return task(method, device, model, x, PIECES.get(method, examples))


def network(small: bool) -> nn.Sequential:
    """Returns three hidden layers with ELUs, and a head of 10 classes."""
    inputs, hidden = (8, 6) if small else (784, 128)
    layers = [
        part
        for before in (inputs, hidden, hidden)
        for part in (nn.Linear(before, hidden), nn.ELU())
    ]
    return nn.Sequential(*layers, nn.Linear(hidden, 10))


def task(method: str, device: str, model: nn.Module, x: torch.Tensor, piece: int) -> Task:
    """Returns the task of any method of `blocks` on any network, ``piece`` examples at once."""
    wide, there = copy.deepcopy(model), x.to(device)
    ready = blocks.prepared(method, model.to(device))

    def error(result: blocks.Blocks) -> float:
        r = blocks.random_vectors(wide)
        return blocks.worst(blocks.products(result, len(x), r), blocks.oracle(wide, x, r))

    return Task(lambda: blocks.METHODS[method](ready, there, piece), error)


def rows(device: str, repeats: int = 7) -> list[dict]:
    """Returns one row per method."""
    return compare("mlp", METHODS, device, repeats)
