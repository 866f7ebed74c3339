"""Layers whose examples are not in front: right by proof on examples that run alone."""

import pytest
import torch
from measure.by_example import assert_same, unit_fishers
from torch import Tensor, nn

import biasshift as bs


class Moved(nn.Module):
    """Hands its inner network another order of examples and positions, and puts them back."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.inner = nn.Sequential(nn.Linear(3, 4), nn.ELU(), nn.Linear(4, 4))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:  # (batch, 4 positions, 3)
        n, t, _ = x.shape
        if self.kind == "folded":
            h = self.inner(x.flatten(0, 1)).unflatten(0, (n, t))
        elif self.kind == "windows":
            h = self.inner(x.unflatten(1, (2, -1)).flatten(0, 1)).unflatten(0, (n, 2)).flatten(1, 2)
        elif self.kind == "interleaved":
            h = self.inner(x.transpose(0, 1).flatten(0, 1)).unflatten(0, (t, n)).transpose(0, 1)
        elif self.kind == "sequence first":
            h = self.inner(x.transpose(0, 1)).transpose(0, 1)
        elif self.kind == "flipped":  # no layout: the examples come in another order
            h = self.inner(x.flatten(0, 1).flip(0)).flip(0).unflatten(0, (n, t))
        else:
            h = self.inner(x)
        return self.head(h.tanh().sum(1))


class Unrolled(nn.Module):
    """A cell over the second half of the axes, on positions that are folded into the examples."""

    def __init__(self, turned: bool) -> None:
        super().__init__()
        self.turned = turned
        self.step, self.back, self.head = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:  # (batch, 4 positions, 3)
        n, t, _ = x.shape
        rows = (x.transpose(0, 1) if self.turned else x).flatten(0, 1)
        h = rows.new_zeros(len(rows), 4)
        for _ in range(3):
            h = (self.step(rows) + self.back(h)).tanh()
        h = h.unflatten(0, (t, n)).sum(0) if self.turned else h.unflatten(0, (n, t)).sum(1)
        return self.head(h)


class Frames(nn.Module):
    """A convolution on the frames of a video, folded into the examples."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 2, 2), nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:  # (batch, frames, 1, 3, 3)
        h = self.conv(x.flatten(0, 1)).tanh().mean((2, 3)).unflatten(0, x.shape[:2])
        return self.head(h.sum(1))


def build(kind: str, examples: int = 4) -> tuple[nn.Module, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Frames() if kind == "frames" else Moved(kind)
        shape = (4, 1, 3, 3) if kind == "frames" else (4, 3)
        return model.double(), torch.randn(examples, *shape).double()


KINDS = ["folded", "windows", "interleaved", "sequence first", "frames"]


@pytest.mark.parametrize("examples", [1, 3, 4, 5])  # four positions: as many as examples, once
@pytest.mark.parametrize("kind", KINDS)
def test_the_matrices_are_those_of_the_shared_weights(kind: str, examples: int) -> None:
    model, x = build(kind, examples)
    for options in ({}, {"storage": "implicit"}, {"batch_size": 2} if examples > 2 else {}):
        fishers = bs.unit_fisher(model, x, **options)
        assert len(fishers) == (2 if kind == "frames" else 3)
        for layer, fisher in fishers.items():
            expected = unit_fishers(
                model.get_submodule(layer), lambda n: model(x[n : n + 1])[0], examples
            )
            assert_same(fisher.matrix(), expected)
    table = bs.check(model, x)
    assert (table[table.units > 0].error < 1e-10).all()


@pytest.mark.parametrize("kind", KINDS)
def test_moments_of_the_inputs_are_over_all_positions(kind: str) -> None:
    model, x = build(kind)
    if kind == "frames":
        return
    fisher = bs.unit_fisher(model, x)["inner.0"]
    torch.testing.assert_close(fisher.mean_p, x.mean((0, 1)), rtol=1e-12, atol=1e-14)
    y = torch.randint(3, (4,))
    moved, plain = build(kind), build("plain")
    plain[0].load_state_dict(moved[0].state_dict())
    for column in ("cos_gradient", "cos_centered", "cos_diagonal", "norm_ratio"):
        first, second = (bs.gradient_gap(m, x, y)[column] for m, _ in (moved, plain))
        assert (first - second).abs().max() < 1e-9


def test_examples_in_no_order_that_is_known_are_left_out_by_name() -> None:
    model, x = build("flipped")
    with pytest.warns(bs.UncoveredWarning, match=r"'inner\.0'.*'inner\.2'"):
        fishers = bs.unit_fisher(model, x)
    assert list(fishers) == ["head"]
    expected = unit_fishers(model.head, lambda n: model(x[n : n + 1])[0], 4)
    assert_same(fishers["head"].matrix(), expected)
    with pytest.raises(ValueError, match=r"'inner\.0'.*first axis is not the axis of examples"):
        bs.unit_fisher(model, x, uncovered="raise")
    with pytest.raises(ValueError, match=r"'inner\.2'"):
        bs.unit_fisher(model, x, layers=["inner.2"])


def test_a_first_batch_of_one_example_cannot_tell_for_the_next() -> None:
    model, x = build("interleaved")
    with pytest.raises(ValueError, match=r"'inner\.0'"):
        bs.unit_fisher(model, [x[:1], x[1:]])


@pytest.mark.parametrize("turned", [False, True])
def test_a_state_of_zeros_has_the_layout_of_the_other_steps(turned: bool) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, x = Unrolled(turned).double(), torch.randn(3, 4, 3).double()
    fishers = bs.unit_fisher(model, x)
    for layer in ("step", "back", "head"):
        expected = unit_fishers(model.get_submodule(layer), lambda n: model(x[n : n + 1])[0], 3)
        assert_same(fishers[layer].matrix(), expected)
