"""Steps that are kept in hand: the trust region, and the damping of c."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from biasshift.optim import UnitNaturalGradient


def step(lr: float = 0.1, scale: str = "diagonal", **options):
    """One step from fixed weights on a fixed batch: the gradients, and by how much the parameters
    moved, over −lr.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.ELU(), nn.Linear(5, 4)).double()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = UnitNaturalGradient(model, lr, center="q", scale=scale, **options)
    loss = cross_entropy(model(torch.randn(30, 3).double()), torch.arange(30) % 4)
    loss.backward()
    optimizer.step()
    return [p.grad for p in model.parameters()], [
        (old - p.detach()) / lr for old, p in zip(before, model.parameters(), strict=True)
    ]


def moved(gradients, updates, lr):
    return (
        lr**2 * sum((g * update).sum() for g, update in zip(gradients, updates, strict=True)).item()
    )


@pytest.mark.parametrize("scale", ["diagonal", "full"])
def test_a_step_goes_as_far_as_the_trust_region_and_in_the_same_direction(scale):
    gradients, free = step(scale=scale)
    size = moved(gradients, free, 0.1)
    _, held = step(scale=scale, kl_clip=size / 9)
    for a, b in zip(held, free, strict=True):
        torch.testing.assert_close(a, b / 3)  # ΔᵀFΔ is quadratic


def test_a_step_inside_the_trust_region_is_left_alone():
    gradients, free = step()
    _, held = step(kl_clip=2 * moved(gradients, free, 0.1))
    assert all(torch.equal(a, b) for a, b in zip(held, free, strict=True))


def test_damping_c_is_a_learning_rate_for_each_unit():
    """Every unit's update is shortened by c / (c + λ mean c), weights and bias alike: their
    direction stays.
    """
    _, free = step()
    _, held = step(unit_damping=2.0)
    for w, b in ((0, 1), (2, 3)):
        ratio = held[b] / free[b]
        torch.testing.assert_close(held[w], free[w] * ratio[:, None])
        c = ratio / (1 - ratio)  # in units of 2 mean c
        assert (ratio > 0).all() and (ratio < 1).all() and c.mean().item() == pytest.approx(0.5)


@pytest.mark.parametrize(
    "option", [{"kl_clip": 0.0}, {"kl_clip": float("nan")}, {"unit_damping": -1.0}]
)
def test_what_makes_no_sense_is_refused_by_name(option):
    (name,) = option
    with pytest.raises(ValueError, match=name):
        UnitNaturalGradient(nn.Linear(2, 2), 0.1, **option)
