"""What people bring: dict batches, several inputs, outputs in dicts, tuples and objects."""

from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from measure.by_example import assert_same, unit_fishers
from torch import Tensor, nn

import biasshift as bs


class TwoInputs(nn.Module):
    """Sees two tensors of different kinds, by position or by name."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.left, self.right = nn.Embedding(5, 3), nn.Linear(3, 4), nn.Linear(2, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, tokens: Tensor, x: Tensor, scale: float = 1.0) -> Tensor:
        return self.head(F.elu(self.left(self.embed(tokens)) + scale * self.right(x)))


class Returns(nn.Module):
    """Returns the outputs of a network inside of something else."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.net, self.kind = nn.Sequential(nn.Linear(2, 4), nn.ELU(), nn.Linear(4, 3)), kind

    def forward(self, x: Tensor) -> object:
        out = self.net(x)
        return {
            "tensor": out,
            "logits": {"features": x, "logits": out},
            "out": {"out": out, "aux": 2 * out},
            "only": (out,),
            "object": SimpleNamespace(logits=out, hidden=x),
            "pair": (x, out),
            "scores": {"scores": out, "boxes": x},
            "named": Pair(x, out),
        }[self.kind]


class Pair(NamedTuple):
    """A tuple with names, as models return it."""

    hidden: Tensor
    prediction: Tensor


def double(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for p in model.parameters():
        nn.init.normal_(p)
    return model.double()


TOKENS, X = torch.tensor([0, 1, 4, 2, 1]), torch.arange(10.0).view(5, 2).double() / 5 - 1
Y = torch.tensor([0, 2, 1, 0, 2])
PROBES = {
    "dict": ({"tokens": TOKENS, "x": X}, {}),
    "dict with labels": ({"tokens": TOKENS, "x": X, "labels": Y}, {}),
    "dict with a number": ({"tokens": TOKENS, "x": X, "scale": 1.0}, {}),
    "chosen keys": ({"tokens": TOKENS, "x": X, "id": TOKENS}, {"inputs": ("tokens", "x")}),
    "tuple": ((TOKENS, X), {"inputs": 2}),
    "tuple with labels": ((TOKENS, X, Y), {"inputs": 2}),
    "names": ((TOKENS, X), {"inputs": ("tokens", "x")}),
    "batches": ([(TOKENS[:2], X[:2], Y[:2]), (TOKENS[2:], X[2:], Y[2:])], {"inputs": 2}),
    "nested": ([((TOKENS[:2], X[:2]), Y[:2]), ((TOKENS[2:], X[2:]), Y[2:])], {}),
    "dicts": ([{"tokens": TOKENS[i : i + 2], "x": X[i : i + 2]} for i in (0, 2, 4)], {}),
    "dicts and labels": ([({"tokens": TOKENS, "x": X}, Y)], {}),
}


@pytest.mark.parametrize("batch_size", [None, 2])
@pytest.mark.parametrize("name", PROBES)
def test_several_inputs_are_measured(name: str, batch_size: int | None) -> None:
    model, (probe, options) = double(TwoInputs()), PROBES[name]
    options = {**options, "batch_size": batch_size}
    fishers = bs.unit_fisher(model, probe, **options)
    assert set(fishers) == {"left", "right", "head"}
    for layer, fisher in fishers.items():
        expected = unit_fishers(
            model.get_submodule(layer), lambda n: model(TOKENS[n : n + 1], X[n : n + 1])[0], 5
        )
        assert_same(fisher.matrix(), expected)
    with bs.bias_shift(model, probe, **options) as shifts, torch.no_grad():
        model.right.bias += 0.5
    torch.testing.assert_close(shifts["right"].total, torch.full((4,), 0.5).double())
    assert shifts["head"].incoming.abs().max() > 0
    table = bs.check(model, probe, inputs=options.get("inputs"))
    assert (table[table.units > 0].error < 1e-10).all()


@pytest.mark.parametrize("name", [name for name in PROBES if "number" not in name])
def test_logs_and_gaps_of_several_inputs(name: str) -> None:
    model, (probe, options) = double(TwoInputs()), PROBES[name]
    has_labels = "labels" in name or name in ("batches", "nested")
    if has_labels:
        gap = bs.gradient_gap(model, probe, **options)
        plain = bs.gradient_gap(model, {"tokens": TOKENS, "x": X}, Y)
        assert (gap.cos_gradient - plain.cos_gradient).abs().max() < 1e-12
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    quantities = None if has_labels else ("activations", "bias_shift", "fisher")
    with bs.instrument(model, optimizer, probe, every=1, quantities=quantities, **options) as log:
        for _ in range(2):
            optimizer.zero_grad()
            F.cross_entropy(model(TOKENS, X), Y).backward()
            optimizer.step()
    table = log.table()
    assert set(table.step) == {0, 1, 2}
    assert set(table.layer) == {"left", "right", "head"}
    assert table[(table.step > 0) & (table.unit >= 0)].total.notna().all()


@pytest.mark.parametrize(
    ("kind", "output"),
    [
        ("tensor", None),
        ("logits", None),
        ("logits", "logits"),
        ("out", None),
        ("out", "out"),
        ("only", None),
        ("only", 0),
        ("object", None),
        ("object", "logits"),
        ("pair", 1),
        ("pair", -1),
        ("pair", lambda returned: returned[1]),
        ("scores", "scores"),
        ("named", 1),
        ("named", "prediction"),
    ],
)
def test_outputs_inside_of_something_else(kind: str, output: object) -> None:
    model = double(Returns(kind))
    fishers = bs.unit_fisher(model, X, output=output)
    for layer in ("net.0", "net.2"):
        expected = unit_fishers(model.get_submodule(layer), lambda n: model.net(X[n : n + 1])[0], 5)
        assert_same(fishers[layer].matrix(), expected)
    table = bs.check(model, X, Y, output=output)
    assert (table[table.units > 0].error < 1e-10).all()
    plain = bs.gradient_gap(model.net, X, Y)
    gap = bs.gradient_gap(model, X, Y, output=output)
    assert (gap.cos_gradient - plain.cos_gradient).abs().max() < 1e-12


@pytest.mark.parametrize("labels", ["sampled", "empirical"])
@pytest.mark.parametrize(
    ("kind", "output"), [("logits", None), ("object", None), ("pair", 1), ("scores", "scores")]
)
def test_steps_of_models_that_return_more(kind: str, output: object, labels: str) -> None:
    twins = []
    for model in (double(Returns(kind)), double(Returns("tensor"))):
        wraps = model.kind != "tensor"
        optimizer = bs.optim.UnitNaturalGradient(
            model, lr=0.1, labels=labels, output=output if wraps else None, damping=0.01
        )
        for _ in range(3):
            optimizer.zero_grad()
            returned = model(X)
            if wraps and kind in ("logits", "scores"):
                returned = returned[kind]
            elif wraps:
                returned = returned.logits if kind == "object" else returned[1]
            F.cross_entropy(returned, Y).backward()
            optimizer.step()
        twins.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(*twins, rtol=0, atol=0)


def test_outputs_that_cannot_be_chosen_are_one_sentence() -> None:
    for kind, output, words in (
        ("pair", None, "got tuple of 2. Choose one with output="),
        ("scores", None, "got dict with the keys 'scores', 'boxes'"),
        ("scores", "score", "'output' must be a key.*got 'score' for dict with the keys"),
        ("pair", 2, "'output' must be.*got 2"),
        ("tensor", "logits", "'output' must be.*got 'logits' for Tensor"),
        ("pair", 0, "no gradients|cannot"),
    ):
        model = double(Returns(kind))
        with pytest.raises(ValueError, match=words):
            bs.unit_fisher(model, X, output=output)
    optimizer = bs.optim.UnitNaturalGradient(model := double(Returns("pair")), lr=0.1)
    with pytest.raises(ValueError, match="Choose one with output="):
        model(X)
    optimizer.remove()


def test_batches_that_do_not_fit_are_one_sentence() -> None:
    model = double(TwoInputs())
    for probe, options, words in (
        ({"tokens": TOKENS}, {"inputs": ("tokens", "x")}, "must hold 'x' of inputs="),
        ([(TOKENS,)], {"inputs": 2}, "the 2 parts of inputs="),
        ({"scale": 1.0}, {}, "must hold tensors with examples"),
        ((TOKENS, X), {}, "Inputs of a model with several take inputs=2"),
        ({"tokens": TOKENS, "x": X.new_full(X.shape, torch.nan)}, {}, "NaN"),
    ):
        with pytest.raises(ValueError, match=words):
            bs.unit_fisher(model, probe, **options)
    with pytest.raises(ValueError, match="same examples"):
        bs.unit_fisher(model, {"tokens": TOKENS, "x": X}, Y[:3])


def test_arguments_that_a_model_writes_into_stay_as_they_are() -> None:
    class Writes(TwoInputs):
        def forward(self, tokens: Tensor, x: Tensor, scale: float = 1.0) -> Tensor:
            x -= 1
            return super().forward(tokens, x, scale)

    model, x = double(Writes()), X.clone()
    bs.unit_fisher(model, {"tokens": TOKENS, "x": x})
    bs.activation_moments(model, {"tokens": TOKENS, "x": x})
    assert torch.equal(x, X)
