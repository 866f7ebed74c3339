"""Layers with shared weights keep vectors first; every number is that of its definition."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import biasshift as bs
from biasshift.fisher.example_vectors import ExampleVectors
from biasshift.fisher.held import HeldSums
from biasshift.fisher.moments import WeightedSums
from biasshift.fisher.samples import Samples

ROWS, UNITS, INPUTS, DAMPING = 24, 5, 60, 1e-3
NAMES = ("matrix", "var_q", "s", "k", "coupling", "dw", "dw0")


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sums(dtype: torch.dtype, parts: int = 1, rows: int = ROWS, dead: bool = False):
    """Held sums of rows, in several batches, and what they are made of."""
    reference = normal(0, INPUTS)
    delta, a = normal(1, rows, UNITS), 0.5 + normal(2, UNITS, rows, INPUTS)
    if dead:
        delta[:, 2] = 0
    vectors, reference = (delta.T[:, :, None] * a).to(dtype), reference.to(dtype)
    made = HeldSums.empty(UNITS, reference, 2**30)
    for v, d in zip(vectors.chunk(parts, 1), delta.to(dtype).chunk(parts), strict=True):
        made = made.with_vectors(v.clone(), d.clone()).with_weight_squares(d.double().square())
        made = made.with_inputs(len(d), 3 * len(d), normal(3, INPUTS))
    return made, (vectors.double(), delta.to(dtype).double(), reference.double())


def definition(vectors, delta, reference, total, rows, g, g0):
    """What a block of outer products gives, written out in float64."""
    augmented = torch.cat([vectors + delta.T[:, :, None] * reference, delta.T[:, :, None]], 2)
    F = torch.einsum("uni,unj->uij", augmented, augmented) / rows
    c, b, A = F[:, -1, -1], F[:, :-1, -1], F[:, :-1, :-1]
    m = b / c[:, None]
    V = A / c[:, None, None] - m[:, :, None] * m[:, None, :]
    mu = reference + total / (3 * rows)
    ridge = DAMPING * V.diagonal(dim1=1, dim2=2).mean(1)
    W = V + ridge[:, None, None] * torch.eye(INPUTS).double()
    x = torch.linalg.solve(W, m[:, :, None])[:, :, 0]
    q = (m * x).sum(1)
    dw = torch.linalg.solve(W, (g - g0[:, None] * m)[:, :, None])[:, :, 0] / c[:, None]
    values = (
        F,
        V,
        (1 + q) / c,
        1 + ((m - mu) * x).sum(1),
        q / (1 + q),
        dw,
        g0 / c - (m * dw).sum(1),
    )
    return dict(zip(NAMES, values, strict=True))


def read(fisher: bs.UnitFisher, g, g0):
    dw, dw0 = fisher.natural_gradient(g, g0)
    values = (fisher.matrix(), fisher.var_q, fisher.s, fisher.k, fisher.coupling, dw, dw0)
    return dict(zip(NAMES, values, strict=True))


def difference(found, expected) -> float:
    return ((found.double() - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 5e-3)], ids=["double", "float"]
)
@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("dead", [False, True])
def test_every_number_is_that_of_its_definition(dtype, tolerance, parts, dead):
    made, raw = sums(dtype, parts, dead=dead)
    assert isinstance(made, HeldSums) and len(made.parts) == parts
    g, g0 = normal(5, UNITS, INPUTS), normal(6, UNITS)
    alive = torch.tensor([u for u in range(UNITS) if not (dead and u == 2)])
    expected = definition(
        raw[0][alive], raw[1][:, alive], raw[2], made.total, ROWS, g[alive], g0[alive]
    )
    fisher = bs.UnitFisher(made, DAMPING, True, dtype, "conv")
    found = read(fisher, g, g0)
    errors = {name: difference(found[name][alive], expected[name]) for name in NAMES}
    assert max(errors.values()) < tolerance, errors
    assert dead == bool(fisher.dead[2]) and (found["s"].isnan().sum() == dead)


def test_vectors_are_not_written_into():
    delta, vectors = normal(1, ROWS, UNITS), normal(2, UNITS, ROWS, INPUTS)
    before = delta.clone(), vectors.clone()
    made = HeldSums.empty(UNITS, normal(0, INPUTS), 2**30).with_vectors(vectors, delta)
    made = made.with_weight_squares(delta**2).with_inputs(ROWS, ROWS, normal(3, INPUTS))
    fisher = bs.UnitFisher(made, 0.1, True, torch.float64)
    assert fisher.matrix().isfinite().all() and fisher.s.isfinite().all()
    assert torch.equal(delta, before[0]) and torch.equal(vectors, before[1])


@pytest.mark.parametrize("operation", ["product", "select", "moved", "blocks", "spread"])
def test_a_part_is_a_linear_map(operation):
    delta, vectors = normal(1, UNITS, ROWS), normal(2, UNITS, ROWS, INPUTS)
    part, v = ExampleVectors(vectors, delta), normal(3, UNITS, INPUTS)
    blocks = torch.einsum("uni,unj->uij", vectors, vectors)
    if operation == "product":
        assert difference(part.product(v), (blocks @ v[:, :, None])[:, :, 0]) < 1e-13
    elif operation == "select":
        few = torch.tensor([3, 1])
        assert torch.equal(part.select(few).vectors, vectors[few])
    elif operation == "moved":
        d = normal(4, UNITS, INPUTS)
        assert difference(part.moved(d).vectors, vectors + delta[:, :, None] * d[:, None]) < 1e-15
        assert difference(part.moved(d[0]).vectors, vectors + delta[:, :, None] * d[0]) < 1e-15
    elif operation == "blocks":
        made = WeightedSums.empty(UNITS, torch.zeros(INPUTS)).with_vectors(vectors, delta.T)
        for one, other in zip(part.blocks(), made.second, strict=True):
            assert torch.equal(one, other)
    else:
        share = torch.rand(UNITS, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
        weight, first, second = part.spread(share)
        assert difference(second, torch.einsum("u,uij->ij", share, blocks)) < 1e-13
        expected = torch.einsum("u,un,uni->i", share, delta, vectors)
        assert difference(first, expected) < 1e-13
        assert weight.item() == pytest.approx((share @ delta.square()).sum().item())


def test_many_vectors_become_blocks_and_stay():
    few, raw = sums(torch.float64, parts=2)
    delta, vectors = normal(8, ROWS, UNITS), normal(9, UNITS, ROWS, INPUTS)
    many = few.with_vectors(vectors, delta)
    assert isinstance(few, HeldSums) and isinstance(many, WeightedSums)
    expected = torch.einsum("uni,unj->uij", *2 * [torch.cat([raw[0], vectors], 1)])
    made = many.var_q() + many.offset_q[:, :, None] * many.offset_q[:, None, :]
    assert difference(made * many.weight[:, None, None], expected) < 1e-12


def test_samples_beside_vectors_become_blocks():
    """A sequence of one position has no shared weights, and may be the first batch of a probe."""
    reference = torch.zeros(INPUTS, dtype=torch.float64)
    a, delta2 = normal(1, 4, INPUTS), normal(2, 4, UNITS) ** 2
    delta, vectors = normal(3, 4, UNITS), normal(4, UNITS, 4, INPUTS)
    empty = HeldSums.empty(UNITS, reference, 2**30)
    one = empty.with_weights(a, delta2).with_vectors(vectors.clone(), delta)
    other = empty.with_vectors(vectors.clone(), delta).with_weights(a, delta2)
    joined = empty.with_weights(a, delta2).plus_all(empty.with_vectors(vectors.clone(), delta))
    expected = torch.einsum("nu,ni,nj->uij", delta2, a, a)
    expected = expected + torch.einsum("uni,unj->uij", vectors, vectors)
    for made in (one, other, joined):
        assert isinstance(made, WeightedSums)
        o = made.offset_q
        second = (made.var_q() + o[:, :, None] * o[:, None, :]) * made.weight[:, None, None]
        assert difference(second, expected) < 1e-12


def test_sums_of_two_probes_are_those_of_both():
    one, _ = sums(torch.float32, rows=10)
    other = replace(one, reference=one.reference.clone()).about(one.reference + 1)
    assert isinstance(other, HeldSums) and not isinstance(other.parts[0], Samples)
    both = bs.UnitFisher(one, DAMPING, True, torch.float32, "conv") + bs.UnitFisher(
        other, DAMPING, True, torch.float32, "conv"
    )
    alone = bs.UnitFisher(one, DAMPING, True, torch.float32, "conv")
    assert both.storage == "auto"
    assert difference(both.matrix(), alone.matrix().double()) < 1e-5
    assert difference(both.coupling, alone.coupling.double()) < 1e-3


def test_saved_vectors_come_back_to_the_last_bit(tmp_path):
    made, _ = sums(torch.float32, parts=2)
    fisher = bs.UnitFisher(made, DAMPING, True, torch.float32, "conv")
    fisher.save(tmp_path / "layer")
    loaded = bs.UnitFisher.load(tmp_path / "layer")
    assert isinstance(loaded.sums, HeldSums)
    assert torch.equal(loaded.matrix(), fisher.matrix()) and torch.equal(loaded.s, fisher.s)


class Tokens(nn.Module):
    """A layer on positions, and one with an inert bias: it stands before a norm over positions."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(30, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.last(self.first(x).softmax(1).mul(torch.arange(6.0).to(x)[:, None]).sum(1))


@pytest.mark.parametrize("kind", ["convolution", "inert bias"])
@pytest.mark.parametrize("options", [{}, {"labels": "sampled", "draws": 4}], ids=str)
def test_a_model_gives_the_numbers_of_its_blocks(kind, options):
    torch.manual_seed(0)
    x = torch.randn(3, 6, 6, 6) if kind == "convolution" else torch.randn(3, 6, 30)
    stack = nn.Sequential(nn.Conv2d(6, 5, 3), nn.ELU(), nn.Flatten(), nn.Linear(80, 3))
    model, name = (stack, "0") if kind == "convolution" else (Tokens(), "first")
    model, x = model.double(), x.double()
    held = bs.unit_fisher(model, x, **options)[name]
    blocks = bs.unit_fisher(model, x, storage="dense", **options)[name]
    assert isinstance(held.sums, HeldSums) and isinstance(blocks.sums, WeightedSums)
    assert held.bias_inert.all() == blocks.bias_inert.all() == (kind == "inert bias")
    g, g0 = normal(1, *held.mean_q.shape), normal(2, len(held.c))
    updates = zip(held.natural_gradient(g, g0), blocks.natural_gradient(g, g0), strict=True)
    for one, other in updates:
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)
    assert difference(held.matrix(), blocks.matrix()) < 1e-12
    assert torch.equal(held.standard_error, blocks.standard_error)
    for one, other in zip(held.table().items(), blocks.table().items(), strict=True):
        values = [torch.tensor(column[1].to_numpy(float)) for column in (one, other)]
        torch.testing.assert_close(*values, rtol=1e-5, atol=0.0, equal_nan=True)
