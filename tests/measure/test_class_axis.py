"""Classes on any axis of the outputs: stated, refused where they are not last, never assumed."""

import pytest
import torch
import torch.nn.functional as F
from measure.by_example import assert_same, unit_fishers
from torch import Tensor, nn

import biasshift as bs


class Tagger(nn.Module):
    """A linear head, permuted for nn.CrossEntropyLoss."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(7, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.elu(self.embed(x))).permute(0, 2, 1)


class Pyramid(nn.Module):
    """Two heads of different resolution, added up."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 4, 3, 1, 1)
        self.fine, self.coarse = nn.Conv2d(4, 3, 1), nn.Conv2d(4, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = F.elu(self.body(x))
        return self.fine(h) + F.interpolate(self.coarse(F.avg_pool2d(h, 2)), scale_factor=2)


def conv(*tail: nn.Module, classes: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3, 1, 1), nn.ELU(), nn.Conv2d(4, classes, 1), *tail)


def build(name: str) -> tuple[nn.Module, Tensor]:
    """A model with its classes on axis 1, and examples for it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        images = torch.randn(3, 3, 2, 2).double()
        models = {
            "convolution": lambda: (conv(), images),
            "upsampled": lambda: (conv(nn.Upsample(scale_factor=2)), images),
            "bilinear": lambda: (
                conv(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False)),
                images,
            ),
            "shuffled": lambda: (conv(nn.PixelShuffle(2), classes=12), images),
            "normed": lambda: (conv(nn.BatchNorm2d(3).eval()), images),
            "log-softmax": lambda: (conv(nn.LogSoftmax(1)), images),
            "two heads": lambda: (Pyramid(), images),
            "tagger": lambda: (Tagger(), torch.randint(7, (4, 5))),
            "one dimension": lambda: (
                nn.Sequential(nn.Conv1d(2, 3, 2), nn.Tanh(), nn.Conv1d(3, 4, 1)),
                torch.randn(3, 2, 4).double(),
            ),
        }
        model, x = models[name]()
        return model.double(), x


NAMES = [
    "convolution",
    "upsampled",
    "bilinear",
    "shuffled",
    "normed",
    "log-softmax",
    "two heads",
    "tagger",
    "one dimension",
]


@pytest.mark.parametrize("name", NAMES)
def test_classes_on_axis_1_are_refused_unless_stated(name: str) -> None:
    model, x = build(name)
    for measure in (
        lambda: bs.unit_fisher(model, x),
        lambda: bs.unit_fisher(model, x, labels="sampled"),
        lambda: bs.unit_fisher(model, x, storage="implicit"),
    ):
        with pytest.raises(ValueError, match=r"classes on axis 1.*class_axis=1"):
            measure()
    table = bs.check(model, x)
    assert not table.covered.any()
    assert table[table.units > 0].reason.str.contains("class_axis=1").all()


@pytest.mark.parametrize("name", NAMES)
def test_a_stated_axis_gives_the_right_matrices(name: str) -> None:
    model, x = build(name)
    fishers = bs.unit_fisher(model, x, class_axis=1)
    for layer, fisher in fishers.items():
        module = model.get_submodule(layer)
        expected = unit_fishers(module, lambda n: model(x[n : n + 1])[0].movedim(0, -1), len(x))
        assert_same(fisher.matrix(), expected)
    again = bs.unit_fisher(model, x, class_axis=1 - model(x).dim(), batch_size=2)
    for layer, fisher in fishers.items():
        assert_same(again[layer].matrix(), fisher.matrix())
    table = bs.check(model, x, class_axis=1)
    assert (table[table.units > 0].error < 1e-10).all()


@pytest.mark.parametrize("name", ["upsampled", "tagger", "one dimension"])
def test_labels_of_the_data_on_a_stated_axis(name: str) -> None:
    model, x = build(name)
    outputs = model(x)
    y = torch.randint(outputs.shape[1], (len(x), *outputs.shape[2:]))
    fishers = bs.unit_fisher(model, x, y, labels="empirical", class_axis=1)
    for layer, fisher in fishers.items():
        expected = unit_fishers(
            model.get_submodule(layer), lambda n: model(x[n : n + 1])[0].movedim(0, -1), len(x), y=y
        )
        assert_same(fisher.matrix(), expected)
    table = bs.check(model, x, y, class_axis=1)
    assert (table[table.units > 0].error < 1e-10).all()
    gap = bs.gradient_gap(model, x, y, class_axis=1)
    assert gap.cos_gradient.notna().all()


@pytest.mark.parametrize("labels", ["sampled", "empirical"])
@pytest.mark.parametrize("name", ["upsampled", "shuffled", "tagger", "log-softmax"])
def test_steps_refuse_or_take_the_axis(name: str, labels: str) -> None:
    model, x = build(name)
    outputs = model(x)
    y = torch.randint(outputs.shape[1], (len(x), *outputs.shape[2:]))
    optimizer = bs.optim.UnitNaturalGradient(model, lr=0.1, labels=labels, scale="diagonal")
    with pytest.raises(ValueError, match=r"classes on axis 1.*class_axis=1"):
        F.cross_entropy(model(x), y).backward()
    optimizer.remove()
    optimizer = bs.optim.UnitNaturalGradient(
        model, lr=1e-4, labels=labels, scale="diagonal", class_axis=1, decay=0.0
    )
    logits = model(x).detach()
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    last = [name for name, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)][-1]
    optimizer.step()
    sums = optimizer._curvatures[last].sums
    c = float(sums.parts["weight"][0].sum() / sums.examples)
    if labels == "empirical" and name == "tagger":  # the head's own outputs: δ = target − p
        error = F.one_hot(y, 3) - logits.softmax(1).movedim(1, -1)
        assert c == pytest.approx(float(error.sum(1).square().sum() / len(x)), rel=1e-9)
    assert 0 < c < y[0].numel() ** 2
    assert F.cross_entropy(model(x), y) < loss + 0.1


@pytest.mark.parametrize("positions", [1, 5])
def test_sequences_with_the_classes_last_need_no_axis(positions: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.ELU(), nn.Linear(4, 3)).double()
    x = torch.randn(4, positions, 3).double()
    fisher = bs.unit_fisher(model, x)["2"]
    assert_same(fisher.matrix(), unit_fishers(model[2], lambda n: model(x[n]), 4))


def test_where_both_axes_may_be_the_classes_it_must_be_said() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 15), nn.Unflatten(1, (5, 3))).double()
    x = torch.randn(4, 4).double()
    with pytest.raises(ValueError, match=r"axis 1 or 2\. Say which with class_axis="):
        bs.unit_fisher(model, x)
    for axis in (1, 2):
        fisher = bs.unit_fisher(model, x, class_axis=axis)["0"]
        last = model(x).movedim(axis, -1)
        expected = unit_fishers(model[0], last.__getitem__, 4)
        assert_same(fisher.matrix(), expected)


def test_an_axis_that_is_not_there_is_one_sentence() -> None:
    model, x = nn.Linear(2, 3), torch.randn(4, 2)
    for axis in (0, 2, -2):
        with pytest.raises(ValueError, match="'class_axis' must be an axis behind the examples"):
            bs.unit_fisher(model, x, class_axis=axis)
    with pytest.raises(ValueError, match="'class_axis' must be a whole number"):
        bs.unit_fisher(model, x, class_axis=True)


def test_other_likelihoods_have_no_axis_of_classes() -> None:
    model, x = build("convolution")
    for likelihood in ("gaussian", "bernoulli"):
        first = bs.unit_fisher(model, x, likelihood=likelihood)["2"].matrix()
        second = bs.unit_fisher(model, x, likelihood=likelihood, class_axis=1)["2"].matrix()
        assert_same(first, second)
