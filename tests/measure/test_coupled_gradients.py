"""Outputs of an example that do not change with the others, while its gradients do."""

import pytest
import torch
from measure.by_example import assert_same, unit_fishers
from torch import Tensor, nn

import biasshift as bs


class StraightThrough(nn.Module):
    """Has the values of its input, and gradients of a statistic of the batch."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "mean":
            m = x.mean(0, keepdim=True)
        elif self.kind == "first":
            m = x[:1]
        elif self.kind == "previous":
            m = torch.roll(x, 1, 0)
        else:  # of the example itself
            m = x.tanh()
        return x + (m - m.detach())


def build(kind: str) -> tuple[nn.Module, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Linear(3, 4), nn.Tanh(), StraightThrough(kind), nn.Linear(4, 2)
        ).double()
        return model, torch.randn(5, 3).double()


@pytest.mark.parametrize("sharing", ["per_example", "expand"])
@pytest.mark.parametrize("kind", ["mean", "first", "previous"])
def test_coupled_gradients_are_refused(kind: str, sharing: str) -> None:
    model, x = build(kind)
    with pytest.raises(ValueError, match="errors of an example reach other examples at '0'"):
        bs.unit_fisher(model, x, weight_sharing=sharing)
    table = bs.check(model, x)
    assert not table.covered.any()


def test_the_same_within_an_example_is_measured() -> None:
    model, x = build("own")
    fisher = bs.unit_fisher(model, x)["0"]
    assert_same(fisher.matrix(), unit_fishers(model[0], lambda n: model(x[n : n + 1])[0], 5))


@pytest.mark.parametrize("sharing", ["per_example", "expand"])
@pytest.mark.parametrize("shape", [(1, 3), (5, 3)])
def test_an_expert_without_examples_is_left_out(shape: tuple[int, ...], sharing: str) -> None:
    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.expert = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            chosen, out = x.sum(1) > 1e6, x.clone()
            out[chosen] = self.expert(x[chosen])
            return out

    model = nn.Sequential(nn.Linear(3, 4), Routed(), nn.Linear(4, 2))
    with pytest.warns(bs.UncoveredWarning, match=r"'1\.expert'"):
        fishers = bs.unit_fisher(model, torch.randn(shape), weight_sharing=sharing)
    assert list(fishers) == ["0", "2"]
