"""Positions that do not count: a mask, or labels of −100, under every label rule."""

import pytest
import torch
import torch.nn.functional as F
from measure.by_example import assert_same, unit_fishers
from torch import Tensor, nn

import biasshift as bs


def tagger() -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """A model on sequences whose positions mix, examples, labels, and which positions count."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Conv1d(5, 5, 3, padding=1), nn.ELU())
        model.append(nn.Linear(4, 3)).double()
        x, y = torch.randn(6, 5, 3).double(), torch.randint(3, (6, 5))
        mask = torch.arange(5) < torch.tensor([[5], [3], [1], [4], [2], [5]])
        return model, x, y, mask


def expected(model: nn.Module, x: Tensor, layer: str, mask: Tensor, y: Tensor | None = None):
    return unit_fishers(model.get_submodule(layer), lambda n: model(x[n : n + 1])[0], 6, mask, y)


@pytest.mark.parametrize("storage", ["dense", "implicit"])
@pytest.mark.parametrize("batch_size", [None, 4])
def test_masked_positions_have_no_part(storage: str, batch_size: int | None) -> None:
    model, x, y, mask = tagger()
    options = {"storage": storage, "batch_size": batch_size}
    padded = y.masked_fill(~mask, -100)
    for probe, given in (
        ((x,), {"mask": mask}),
        ((x,), {"mask": mask.long()}),
        ((x,), {"mask": lambda x, y: mask[: len(x)] if len(x) == 6 else None}),
        ((x, padded), {}),
        ((x, y), {"mask": mask}),
    ):
        if callable(given.get("mask")) and batch_size:
            continue
        fishers = bs.unit_fisher(model, *probe, **given, **options)
        for layer in ("0", "3"):
            assert_same(fishers[layer].matrix(), expected(model, x, layer, mask))


def test_empirical_labels_leave_them_out_too() -> None:
    model, x, y, mask = tagger()
    padded = y.masked_fill(~mask, -100)
    for probe, given in (((x, padded), {}), ((x, y), {"mask": mask})):
        fishers = bs.unit_fisher(model, *probe, labels="empirical", **given)
        for layer in ("0", "3"):
            assert_same(fishers[layer].matrix(), expected(model, x, layer, mask, y))
        table = bs.check(model, *probe, examples=6, **given)
        assert (table[table.units > 0].error < 1e-10).all()


def test_sampled_labels_converge_to_the_masked_matrix() -> None:
    model, x, _, mask = tagger()
    sampled = bs.unit_fisher(model, x, mask=mask, labels="sampled", draws=3000)["3"]
    exact = bs.unit_fisher(model, x, mask=mask)["3"]
    torch.testing.assert_close(sampled.c, exact.c, rtol=0.1, atol=1e-3)
    assert not torch.allclose(sampled.c, bs.unit_fisher(model, x)["3"].c, rtol=0.2)


def test_batches_of_several_lengths() -> None:
    model, x, y, mask = tagger()
    model = nn.Sequential(model[0], model[2], model[3])  # any length
    padded = y.masked_fill(~mask, -100)
    batches = [(x[:2], padded[:2]), (x[2:], padded[2:])]
    fishers = bs.unit_fisher(model, batches)
    assert_same(fishers["2"].matrix(), unit_fishers(model[2], lambda n: model(x[n]), 6, mask))
    by_function = bs.unit_fisher(model, [(a, b) for a, b in batches], mask=lambda x, y: y != -100)
    assert_same(by_function["2"].matrix(), fishers["2"].matrix())


def test_nothing_left_gives_dead_units_not_an_error() -> None:
    model, x, _, mask = tagger()
    fisher = bs.unit_fisher(model, x, mask=torch.zeros_like(mask))["3"]
    assert fisher.dead.all()


def test_the_gradient_leaves_them_out() -> None:
    model, x, y, mask = tagger()
    padded = y.masked_fill(~mask, -100)
    first = bs.gradient_gap(model, x, padded)
    second = bs.gradient_gap(model, x, y, mask=mask)
    columns = ["cos_gradient", "cos_centered", "norm_ratio"]
    assert (first[columns] - second[columns]).abs().to_numpy().max() < 1e-12
    model.zero_grad()
    F.cross_entropy(model(x).flatten(0, 1), padded.flatten(), reduction="sum").div(6).backward()
    fisher = bs.unit_fisher(model, x, padded)["3"]
    g, g0 = model[3].weight.grad, model[3].bias.grad
    natural, natural0 = fisher.natural_gradient(g, g0)
    plain, other = (
        torch.cat([a, b[:, None]], 1).flatten() for a, b in ((g, g0), (natural, natural0))
    )
    used = ~(fisher.dead | fisher.singular | fisher.bias_inert)
    assert used.all()
    cos = float(plain @ other / plain.norm() / other.norm())
    assert first.set_index("layer").cos_gradient["3"] == pytest.approx(cos, rel=1e-9)


@pytest.mark.parametrize("labels", ["sampled", "empirical"])
def test_steps_leave_them_out(labels: str) -> None:
    model, x, y, mask = tagger()
    logits = model(x).detach()
    optimizer = bs.optim.UnitNaturalGradient(
        model,
        lr=1e-6,
        labels=labels,
        scale="diagonal",
        decay=0.0,
        mask=(lambda inputs, labels: mask) if labels == "sampled" else None,
    )
    padded = y.masked_fill(~mask, -100)
    F.cross_entropy(model(x).flatten(0, 1), padded.flatten()).backward()
    optimizer.step()
    sums = optimizer._curvatures["3"].sums
    c = sums.parts["weight"][0] / sums.examples
    if labels == "empirical":
        error = (F.one_hot(y, 3) - logits.softmax(-1)) * mask[..., None]
        torch.testing.assert_close(c, error.sum(1).square().sum(0) / 6, rtol=1e-9, atol=0)
    else:  # one draw: its mean is the sum of p (1 − p) over the positions that count
        p = logits.softmax(-1)
        mean = float(((p * (1 - p)) * mask[..., None]).sum() / 6)
        everything = float((p * (1 - p)).sum() / 6)
        assert abs(float(c.sum()) - mean) < 0.6 * mean < everything


def test_masks_that_do_not_fit_are_one_sentence() -> None:
    model, x, y, mask = tagger()
    for wrong in (mask[:3], torch.ones(()), lambda x, y: None):
        with pytest.raises(ValueError, match="must"):
            bs.unit_fisher(model, x, mask=wrong)
    with pytest.raises(ValueError, match=r"'mask' must be \(6, 5\)"):
        bs.unit_fisher(model, x, mask=mask[:, :3])
    with pytest.raises(ValueError, match="not single classes"):
        bs.unit_fisher(model, x, mask=mask[..., None].expand(6, 5, 3))
    with pytest.raises(ValueError, match="A tensor 'mask' goes with a tensor x"):
        bs.unit_fisher(model, [(x, y)], mask=mask)


def test_single_outputs_of_other_likelihoods_can_be_left_out() -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(3, 4).double(), torch.randn(5, 3).double()
    mask = torch.rand(5, 4) > 0.4
    for likelihood in ("gaussian", "bernoulli"):
        fisher = bs.unit_fisher(model, x, likelihood=likelihood, mask=mask)[""]
        scale = model(x).sigmoid() if likelihood == "bernoulli" else torch.ones(5, 4)
        scale = scale * (1 - scale) if likelihood == "bernoulli" else scale
        c = (scale.detach().double() * mask).sum(0) / 5
        torch.testing.assert_close(fisher.c, c, rtol=1e-9, atol=0)
