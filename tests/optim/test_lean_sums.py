"""Sums at the least cost: the same numbers as from patches and whole matrices, and nothing kept."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from biasshift.optim import UnitNaturalGradient, triangle

CONVOLUTIONS = {
    "same": lambda: nn.Conv2d(2, 4, 3, padding="same"),
    "circular": lambda: nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular"),
    "dilated": lambda: nn.Conv2d(2, 4, 2, stride=2, dilation=2, groups=2),
    "transposed": lambda: nn.ConvTranspose2d(2, 4, 3, stride=2, output_padding=1, groups=2),
}


def step(model: nn.Module, optimizer: UnitNaturalGradient, x: Tensor, y: Tensor) -> None:
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()


def net(kind: str) -> tuple[nn.Sequential, Tensor, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = CONVOLUTIONS[kind]()
        x = torch.randn(12, 2, 6, 6, dtype=torch.float64) + 1
        features = layer.double()(x).flatten(1).shape[1]
        model = nn.Sequential(layer, nn.ELU(), nn.Flatten(), nn.Linear(features, 3)).double()
    return model, x, torch.arange(12) % 3


@pytest.mark.parametrize("center", ["q", "p"])
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_sums_without_patches_are_those_of_patches(kind, center, monkeypatch):
    ends = []
    for without in (True, False):
        if not without:
            monkeypatch.setattr("biasshift.optim.layer_sums.needs_no_patches", lambda *_: False)
        model, x, y = net(kind)
        optimizer = UnitNaturalGradient(model, 0.1, center, "none", labels="empirical")
        for part in (slice(0, 5), slice(5, 12)):
            step(model, optimizer, x[part], y[part])
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(*ends, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("inputs", [1, 15, 16, 17, 50])
def test_factors_are_those_of_lapack_and_solve(inputs, randn):
    a = randn(4, 2 * inputs + 3, inputs)
    W = a.mT @ a
    W[1] = -W[1]
    factors, rhs = W.clone(), randn(4, 2, inputs)
    factors[:, *torch.tril_indices(inputs, inputs, -triangle.BLOCK)] = torch.nan  # never read
    failed = triangle.factorize(factors, 1e-3, torch.float64)
    assert failed.tolist() == [False, True, False, False]
    good = ~failed
    torch.testing.assert_close(factors[good].triu(), torch.linalg.cholesky(W[good], upper=True))
    found = triangle.solve(factors[good], rhs[good])
    torch.testing.assert_close(found @ W[good], rhs[good])


@pytest.mark.parametrize("units", [3, 40])
@pytest.mark.parametrize("samples", [0, 1, 90])
def test_products_are_added_in_place(units, samples, randn):
    a, weights, before = randn(samples, 20), randn(samples, units).square(), randn(2, 20)
    products = triangle.Weighted(a, weights)
    old = triangle.Weighted(before, torch.ones(2, units, dtype=torch.float64))
    rows = old.rows()
    for row in rows:
        row.fill_(torch.nan)  # as new memory may be
    old.add_to(rows, 0.0)
    products.add_to(rows, 0.5)
    expected = 0.5 * (before.T @ before) + torch.einsum("nu,ni,nj->uij", weights, a, a)
    triangle_of = triangle.dense(rows, slice(None)).triu()
    torch.testing.assert_close(triangle_of, expected.expand(units, -1, -1).triu())
    vectors = (weights.sqrt().T[:, :, None] * a).contiguous()
    again = triangle.Outer(vectors)
    rows = old.rows()
    again.add_to(rows, 0.0)
    expected = torch.einsum("nu,ni,nj->uij", weights, a, a)
    torch.testing.assert_close(triangle.dense(rows, slice(None)).triu(), expected.triu())


# -- what is kept ----------------------------------------------------------------------------------


class Watched(nn.Module):
    """Keeps weak references to everything its layers read and return."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.seen = inner, []
        for module in inner.modules():
            if not isinstance(module, nn.Sequential):
                module.register_forward_hook(self._see)

    def _see(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        self.seen += [weakref.ref(x.untyped_storage()) for x in (*args, output)]

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)

    def alive(self) -> int:
        gc.collect()
        return sum(ref() is not None for ref in self.seen)


@pytest.mark.parametrize("labels", ["sampled", "empirical"])
@pytest.mark.parametrize("rule", [("p", "none"), ("q", "none"), ("q", "diagonal"), ("q", "full")])
def test_an_idle_optimizer_keeps_nothing_of_a_batch(labels, rule):
    inner, x, y = net("same")
    model = Watched(inner)
    optimizer = UnitNaturalGradient(model, 0.1, *rule, labels=labels)

    def pools() -> dict[str, int]:
        passes = optimizer._recorder._all_passes()
        waiting = sum(
            len(sums.waiting) for of_pass in passes for sums in of_pass.sums.values()
        ) + sum(len(c.sums.waiting) for c in optimizer._curvatures.values())
        return {"passes": len(passes), "waiting": waiting}

    step(model, optimizer, x.clone(), y)
    optimizer.zero_grad()
    assert pools() == {"passes": 0, "waiting": 0} and model.alive() == 0
    outputs = model(x.clone())  # never goes backwards
    assert model.alive() > 0
    del outputs
    assert pools() == {"passes": 0, "waiting": 0} and model.alive() == 0
    F.cross_entropy(model(x.clone()), y).backward()
    optimizer.zero_grad()  # a step that was skipped
    assert pools() == {"passes": 0, "waiting": 0} and model.alive() == 0
