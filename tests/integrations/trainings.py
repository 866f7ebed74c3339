"""Small trainings that the tests of integrations share."""

import torch
import torch.nn.functional as F
from torch import nn

SEED = 0


def data(n=64):
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(n, 6, generator=generator)
    return x, (x[:, :3] + 0.3 * torch.randn(n, 3, generator=generator)).argmax(1)


def network():
    """With dropout, so that a disturbed random state would change losses."""
    torch.manual_seed(SEED)
    return nn.Sequential(nn.Linear(6, 8), nn.ELU(), nn.Dropout(0.2), nn.Linear(8, 3))


def loss(model, x, y):
    return F.cross_entropy(model(x), y)
