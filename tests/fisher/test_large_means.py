"""Small spreads around large means keep their digits."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import biasshift as bs
from biasshift.measure.activation_moments import PIECE, ActivationMoments

SHAPES = {"maps": (6, 4, 5, 7), "long": (3, 2, 90), "sequence": (6, 35, 4), "alone": (64, 4)}


def values(kind: str, mean: float, spread: float, dtype: torch.dtype) -> tuple[Tensor, int]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(SHAPES[kind], generator=generator, dtype=torch.float64)
    return (mean + spread * x).to(dtype), -1 if kind == "sequence" else 1


def reference(x: Tensor, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of every unit by NumPy, in extended precision, of the very same numbers."""
    by_unit = np.moveaxis(x.double().numpy(), axis, 0).reshape(x.shape[axis], -1)
    wide = by_unit.astype(np.longdouble)
    mean = wide.mean(1, keepdims=True)
    return mean[:, 0].astype(float), ((wide - mean) ** 2).mean(1).astype(float)


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("mean, spread", [(0, 1), (1e3, 0.1), (1e4, 0.1), (-1e6, 1), (1e4, 1e-2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_variances_survive_large_means(
    dtype: torch.dtype, mean: float, spread: float, kind: str
) -> None:
    x, axis = values(kind, mean, spread, dtype)
    mean_of_units, variance = reference(x, axis)
    halves = [ActivationMoments.from_values(half, axis) for half in x.split(len(x) // 2)]
    merged = halves[0]
    for half in halves[1:]:
        merged = merged + half
    for moments in (ActivationMoments.from_values(x, axis), merged):
        wide = replace(moments, dtype=torch.float64)
        np.testing.assert_allclose(wide.var, variance, rtol=1e-5, atol=1e-9 * abs(mean))
        np.testing.assert_allclose(wide.mean, mean_of_units, rtol=1e-7, atol=1e-6 * spread)
        assert moments.var.dtype == dtype


def test_units_have_means_of_their_own_and_batches_too() -> None:
    """Units far apart, and batches whose means differ by more than their spread."""
    x = values("maps", 0, 0.1, torch.float32)[0]
    x = x + torch.tensor([0.0, 1e2, 1e3, -1e4])[:, None, None]
    x[3:] += 50.0
    moments = ActivationMoments.from_values(x[:3], 1) + ActivationMoments.from_values(x[3:], 1)
    for own in (moments, ActivationMoments.from_values(x, 1)):
        mean, variance = reference(x, 1)
        np.testing.assert_allclose(replace(own, dtype=torch.float64).var, variance, rtol=1e-5)
        np.testing.assert_allclose(replace(own, dtype=torch.float64).mean, mean, rtol=1e-6)


def test_pieces_and_empty_batches_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    x, axis = values("maps", 1e3, 0.1, torch.float32)
    whole = ActivationMoments.from_values(x, axis)
    monkeypatch.setitem(PIECE, "cpu", 2 * x[0].numel())
    assert torch.equal(ActivationMoments.from_values(x, axis).var, whole.var)
    empty = ActivationMoments.from_values(x[:0], axis)
    assert empty.count == 0
    for merged in (empty + whole, whole + empty):
        torch.testing.assert_close(merged.var, whole.var, rtol=1e-6, atol=0)
        assert merged.count == whole.count


def test_the_activation_of_a_convolution_far_from_zero() -> None:
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU())
    with torch.no_grad():
        model[0].weight.mul_(0.1)
        model[0].bias.fill_(1e4)
    x = torch.randn(8, 1, 9, 9, generator=torch.Generator().manual_seed(0))
    mean, variance = reference(model(x).detach(), 1)
    moments = bs.activation_moments(model, x, batch_size=3)["1"]
    np.testing.assert_allclose(moments.var, variance, rtol=1e-4)
    np.testing.assert_allclose(moments.mean, mean, rtol=1e-6)
