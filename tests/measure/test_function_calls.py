"""Layers whose weights a function applies, in place of a call of the module."""

import pytest
import torch
import torch.nn.functional as F
from measure.by_example import assert_same, unit_fishers
from torch import Tensor, nn

import biasshift as bs
from biasshift.measure.coverage import UncoveredWarning


class Applied(nn.Module):
    """Applies its first layer in one of several ways."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.layer, self.head = nn.Linear(3, 4, bias=way != "no bias"), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.layer.weight, self.layer.bias
        if self.way == "by position":
            h = F.linear(x, weight, bias)
        elif self.way in ("by name", "no bias"):
            h = F.linear(weight=weight, input=x, bias=bias)
        elif self.way == "twice":
            h = self.layer(x) + F.linear(x.flip(-1).tanh(), weight, bias)
        elif self.way == "in place":
            h = F.linear(x, weight, bias).add_(1.0)
        elif self.way == "no grad first":
            with torch.no_grad():
                F.linear(x, weight, bias)
            h = F.linear(x, weight, bias)
        elif self.way == "another bias":
            h = F.linear(x, weight, bias.clone())
        elif self.way == "product":
            h = x @ weight.T + bias
        elif self.way == "slice":
            h = F.pad(F.linear(x, weight[:2], bias[:2]), (0, 2))
        else:
            h = self.layer(x)
        return self.head(F.elu(h))


def build(way: str) -> tuple[nn.Module, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Applied(way).double(), torch.randn(5, 3).double()


WAYS = ["by position", "by name", "no bias", "twice", "in place", "module"]


@pytest.mark.parametrize("way", WAYS)
def test_the_matrices_are_those_of_the_parameters(way: str) -> None:
    model, x = build(way)
    fishers = bs.unit_fisher(model, x)
    expected = unit_fishers(model.head, lambda n: model(x[n : n + 1])[0], 5)
    assert_same(fishers["head"].matrix(), expected)
    plain = model
    if way == "no bias":
        assert fishers["layer"].matrix().shape == (4, 3, 3)
        plain = build("module")[0]
        plain.layer.weight.data, plain.layer.bias.data = model.layer.weight.data, torch.zeros(4)
        plain.head.load_state_dict(model.head.state_dict())
        plain = plain.double()
    expected = unit_fishers(plain.layer, lambda n: plain(x[n : n + 1])[0], 5)
    actual = fishers["layer"].matrix()
    assert_same(actual, expected[:, : actual.shape[1], : actual.shape[1]])
    table = bs.check(model, x)
    assert (table[table.units > 0].error < 1e-10).all()


@pytest.mark.parametrize("way", WAYS)
def test_shifts_and_logs_see_them(way: str) -> None:
    model, x = build(way)
    y = torch.tensor([0, 1, 2, 0, 1])
    calls = 2 if way == "twice" else 1
    with bs.bias_shift(model, x) as shifts, torch.no_grad():
        model.layer.weight += 0.1
    inputs = torch.cat([x, x.flip(-1).tanh()]) if calls == 2 else x
    own = 0.1 * inputs.sum(-1).mean()
    torch.testing.assert_close(shifts["layer"].total, own.expand(4), rtol=1e-9, atol=1e-12)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with bs.instrument(model, optimizer, (x, y), every=1) as log:
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    rows = log.table()
    rows = rows[(rows.layer == "layer") & (rows.unit >= 0) & (rows.step == 1)]
    assert len(rows) == 4
    assert rows.total.notna().all()


@pytest.mark.parametrize("way", ["another bias", "product", "slice", "no grad first"])
def test_other_uses_are_left_out_by_name(way: str) -> None:
    model, x = build(way)
    with pytest.warns(UncoveredWarning, match="'layer'"):
        fishers = bs.unit_fisher(model, x)
    assert list(fishers) == ["head"]
    expected = unit_fishers(model.head, lambda n: model(x[n : n + 1])[0], 5)
    assert_same(fishers["head"].matrix(), expected)
    with pytest.raises(ValueError, match=r"Layer 'layer'.*cannot be measured"):
        bs.unit_fisher(model, x, uncovered="raise")


def test_nothing_stays_on_the_modules() -> None:
    model, x = build("by position")
    before = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    bs.unit_fisher(model, x)
    with pytest.raises(ValueError, match="finite"):
        bs.unit_fisher(model, x.fill_(torch.nan))
    after = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    assert after == before
