"""Classes that are not on the last axis, as nn.CrossEntropyLoss wants them."""

import copy
import re
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import biasshift as bs
from biasshift.optim import UnitNaturalGradient

from . import oracle
from .table import refusal, report

REFUSED = re.compile(r"ValueError.*classes on axis 1, not on the last\. Give class_axis=1")
DAMPING = 0.03


class Tagger(nn.Module):
    """A linear head, permuted."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(7, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.elu(self.embed(x))).permute(0, 2, 1)


def conv(*tail: nn.Module, classes: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(2, 4, 3, 1, 1), nn.ELU(), nn.Conv2d(4, classes, 1), *tail)


MODELS = {
    "upsampled": ("2", lambda: conv(nn.Upsample(scale_factor=2)), (6, 2, 2, 2)),
    "PixelShuffle": ("2", lambda: conv(nn.PixelShuffle(2), classes=12), (6, 2, 2, 2)),
    "permuted tagger": ("head", Tagger, None),
}


def build(name: str) -> tuple[nn.Module, str, Tensor, Tensor]:
    """A model, its last layer, inputs and labels."""
    head, make, shape = MODELS[name]
    model = make().double()
    x = torch.randint(7, (20, 5)) if shape is None else torch.randn(shape).double()
    outputs = model(x)
    return model, head, x, torch.randint(outputs.shape[1], (len(x), *outputs.shape[2:]))


def matrix(model: nn.Module, head: str, x: Tensor, y: Tensor | None = None) -> Tensor:
    def logits(n: int) -> Tensor:
        return model(x[n : n + 1])[0].movedim(0, -1)

    return oracle.blocks(model.get_submodule(head), logits, len(x), y)


@report("classes on axis 1", *product(MODELS, ("expected", "sampled", "empirical")))
def refused_by_unit_fisher(variant: tuple[str, str]) -> tuple[str, re.Pattern]:
    name, labels = variant
    model, _, x, y = build(name)
    return refusal(lambda: bs.unit_fisher(model, x, y, labels=labels)), REFUSED


@report("classes on axis 1", *MODELS)
def refused_by_gap(name: str) -> tuple[str, re.Pattern]:
    model, _, x, y = build(name)
    return refusal(lambda: bs.gradient_gap(model, x, y)), REFUSED


@report("classes on axis 1", *MODELS)
def refused_by_check(name: str) -> tuple[list, list]:
    model, _, x, _ = build(name)
    table = bs.check(model, x)
    reasons = table[table.units > 0].reason
    return [bool(table.covered.any()), bool(reasons.str.contains("class_axis=1").all())], [
        False,
        True,
    ]


@report("classes on axis 1", *product(MODELS, ("sampled", "empirical")))
def refused_by_the_optimizer(variant: tuple[str, str]) -> tuple[str, re.Pattern]:
    name, labels = variant
    model, _, x, y = build(name)
    optimizer = UnitNaturalGradient(model, lr=0.1, labels=labels)

    def step() -> None:
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    return refusal(step), REFUSED


@report("classes on axis 1", *product(MODELS, ("expected", "empirical")))
def right_with_class_axis(variant: tuple[str, str]) -> tuple[Tensor, Tensor]:
    name, labels = variant
    model, head, x, y = build(name)
    fishers = bs.unit_fisher(model, x, y, labels=labels, class_axis=1)
    expected = matrix(model, head, x, y if labels == "empirical" else None)
    return fishers[head].matrix(), expected


@report("classes on axis 1", *MODELS, tolerance=0.06)
def in_the_mean_of_3000_drawn_labels(name: str) -> tuple[Tensor, Tensor]:
    """Six percent of the largest entry is some five standard errors."""
    model, head, x, _ = build(name)
    fisher = bs.unit_fisher(model, x, labels="sampled", draws=3000, class_axis=1)[head]
    return fisher.matrix(), matrix(model, head, x)


@report("classes on axis 1", *MODELS)
def check_with_class_axis(name: str) -> tuple[list, list]:
    model, head, x, _ = build(name)
    row = bs.check(model, x, class_axis=1).set_index("module").loc[head]
    return [bool(row.covered), bool(row.error < 1e-10)], [True, True]


@report("classes on axis 1", *MODELS)
def a_step_with_class_axis(name: str) -> tuple[Tensor, Tensor]:
    model, head, x, y = build(name)
    original = copy.deepcopy(model)
    optimizer = UnitNaturalGradient(
        model, 1.0, damping=DAMPING, labels="empirical", decay=0.0, class_axis=1
    )
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    layer = original.get_submodule(head)
    g = oracle.gradients(F.cross_entropy(original(x), y), layer.weight, layer.bias)
    right = oracle.update(matrix(original, head, x, y), g, "q", "full", DAMPING)
    return oracle.moved(model.get_submodule(head), oracle.present(layer)), right
