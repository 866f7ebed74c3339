"""Steps of units whose bias has no influence, against gradients of every single example.

Which units they are is told by the model: its outputs stay as they are when the bias moves.
"""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import biasshift as bs
from biasshift.optim import UnitNaturalGradient

DAMPING, UNIT_DAMPING, EXAMPLES, POSITIONS, WIDTH = 0.03, 0.5, 40, 5, 4
DOUBLE, SINGLE = torch.float64, torch.float32
RULES = list(itertools.product(("q", "p", "none"), ("full", "diagonal", "none")))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.head = nn.Linear(WIDTH, 3)
        self.kernel_dtype: torch.dtype | None = None

    def forward(self, x: Tensor) -> Tensor:
        h = x + 3.0
        q, k, v = (f(h).to(self.kernel_dtype or x.dtype) for f in (self.q, self.k, self.v))
        weights = (q @ k.mT / WIDTH**0.5).softmax(-1)
        return self.head((weights @ v).to(x.dtype).tanh().mean(1))


class Normalized(nn.Module):
    """Maps of a convolution whose every channel is normalized over its places."""

    def __init__(self) -> None:
        super().__init__()
        self.k, self.norm = nn.Conv1d(WIDTH, WIDTH, 2), nn.InstanceNorm1d(WIDTH)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.k(x.mT)).tanh().mean(2))


class Difference(nn.Module):
    """The scores of two positions, subtracted: errors cancel to exactly 0."""

    def __init__(self) -> None:
        super().__init__()
        self.k, self.head = nn.Linear(WIDTH, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.k(x[:, :2])
        return self.head((scores[:, 0] - scores[:, 1]).tanh())


MODELS = {"attention": Attention, "norm": Normalized, "difference": Difference}


def made(name: str, dtype: torch.dtype = DOUBLE) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model, x = MODELS[name]().to(dtype), torch.randn(EXAMPLES, POSITIONS, WIDTH, dtype=dtype)
    y = torch.randint(3, (EXAMPLES,))
    with torch.no_grad():
        moved = copy.deepcopy(model)
        moved.k.bias += 1.0
        assert torch.allclose(moved(x), model(x), atol=1e-5)
    return model, x, y


def gradients(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Those of every example and unit of layer "k", bias last."""
    rows = []
    for i in range(len(x)):
        loss = F.cross_entropy(model(x[i : i + 1]), y[i : i + 1])
        w, w0 = torch.autograd.grad(loss, [model.k.weight, model.k.bias])
        rows.append(torch.cat([w.flatten(1), w0[:, None]], 1))
    return torch.stack(rows)


def stepped(model: nn.Module, x: Tensor, y: Tensor, **options) -> tuple[Tensor, Tensor]:
    """What one step subtracts from weights and biases of the layer "k", in double precision."""
    optimizer = UnitNaturalGradient(model, lr=1.0, damping=DAMPING, **options)
    before = [p.detach().double().clone() for p in (model.k.weight, model.k.bias)]
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    optimizer.remove()
    w, w0 = (b - p.detach() for b, p in zip(before, (model.k.weight, model.k.bias), strict=True))
    return w.flatten(1), w0


def defined(rows: Tensor, g: Tensor, center: str, scale: str) -> Tensor:
    """``(A + λ mean(diag A) I)⁻¹ g``; g where there is no scale, or the center knows no A."""
    A = torch.einsum("nui,nuj->uij", rows, rows) / len(rows)
    diagonal = A.diagonal(dim1=1, dim2=2)
    ridge = DAMPING * diagonal.mean(1)
    if scale == "none" or center == "p":
        return g
    if scale == "diagonal":
        return g / (diagonal + ridge[:, None])
    damped = A + ridge[:, None, None] * torch.eye(A.shape[1], dtype=A.dtype)
    return torch.linalg.solve(damped, g[:, :, None])[:, :, 0]


@pytest.mark.parametrize("labels", ["sampled", "empirical"])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("center", "scale"), RULES)
def test_a_step_is_the_definition_without_the_bias(name, center, scale, labels):
    model, x, y = made(name)
    drawn = y
    if labels == "sampled":
        probabilities = model(x).detach().float().softmax(-1)
        generator = torch.Generator().manual_seed(0)
        drawn = torch.multinomial(probabilities, 1, generator=generator)[:, 0]
    rows, g = gradients(model, x, drawn)[:, :, :-1], gradients(model, x, y).mean(0)[:, :-1]
    dw, dw0 = stepped(
        model, x, y, center=center, scale=scale, labels=labels, unit_damping=UNIT_DAMPING
    )
    torch.testing.assert_close(dw, defined(rows, g, center, scale), rtol=1e-8, atol=1e-9)
    if (center, scale) == ("p", "none"):  # no errors are read, and nothing is divided by c
        assert dw0.abs().max() < 10 * g.abs().max()
    else:
        assert dw0.abs().max() < 1e-15


@pytest.mark.parametrize("center", ["q", "none"])
@pytest.mark.parametrize("scale", ["full", "diagonal"])
@pytest.mark.parametrize("kernel", [None, torch.float16, torch.bfloat16], ids=str)
def test_single_precision_finds_them_too_whatever_the_kernel_of_attention_computes_in(
    kernel, center, scale
):
    model, x, y = made("attention", SINGLE)
    model.kernel_dtype = kernel
    wide, _, _ = made("attention")
    rows = gradients(wide, x.double(), y)[:, :, :-1]
    dw, dw0 = stepped(model, x, y, center=center, scale=scale, labels="empirical")
    expected = defined(rows, rows.mean(0), center, scale)
    assert (dw - expected).norm() < (1e-3 if kernel is None else 0.2) * expected.norm()
    assert not dw0.any()


def test_under_expand_their_errors_do_not_cancel_and_nothing_is_special():
    model, x, y = made("attention")
    dw, dw0 = stepped(model, x, y, weight_sharing="expand", labels="empirical")
    fisher = bs.unit_fisher(
        made("attention")[0],
        x,
        y,
        labels="empirical",
        weight_sharing="expand",
        damping=DAMPING,
        layers=["k"],
    )["k"]
    g = gradients(made("attention")[0], x, y).mean(0)
    expected = fisher.natural_gradient(g[:, :-1], g[:, -1])
    torch.testing.assert_close((dw, dw0), expected, rtol=1e-6, atol=1e-9)


def test_other_units_of_the_model_step_as_they_would_alone():
    """Those whose bias has an influence have the natural gradient of Theorem 1."""
    model, x, y = made("attention")
    before = model.v.weight.detach().clone()
    stepped(model, x, y, labels="empirical")
    fresh, _, _ = made("attention")
    fisher = bs.unit_fisher(fresh, x, y, labels="empirical", damping=DAMPING)["v"]
    F.cross_entropy(fresh(x), y).backward()
    expected, _ = fisher.natural_gradient(fresh.v.weight.grad, fresh.v.bias.grad)
    torch.testing.assert_close(before - model.v.weight.detach(), expected, rtol=1e-6, atol=1e-9)


def test_it_holds_for_running_averages_of_accumulated_batches_and_frozen_biases():
    model, x, y = made("attention")
    model.k.bias.requires_grad_(False)
    optimizer = UnitNaturalGradient(model, lr=0.0, damping=DAMPING, labels="empirical", decay=0.5)
    for half in (slice(0, 20), slice(20, 40)):
        optimizer.zero_grad()
        F.cross_entropy(model(x[half]), y[half]).backward()
        optimizer.step()
    model.k.bias.requires_grad_(True)
    rows = gradients(model, x, y)[:, :, :-1]
    weights = torch.tensor([0.5, 1.0], dtype=DOUBLE).repeat_interleave(20)
    weighted = rows * (weights * len(x) / weights.sum()).sqrt()[:, None, None]
    g = torch.ones_like(rows[0])
    dw, dw0 = optimizer._curvatures["k"].update(g, None, DAMPING, 0.0)
    torch.testing.assert_close(dw, defined(weighted, g, "q", "full"), rtol=1e-8, atol=1e-9)
    assert dw0 is None


def test_a_state_of_before_goes_on_and_learns_which_they_are():
    model, x, y = made("attention")
    optimizer = UnitNaturalGradient(model, lr=0.0, labels="empirical", decay=0.0)
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    state = optimizer.state_dict()
    for sums in state["biasshift"]["curvature"].values():
        sums["parts"].pop("rounding", None)  # of layers with several positions
    optimizer.remove()
    later = UnitNaturalGradient(model, lr=1.0, labels="empirical", decay=0.0, damping=DAMPING)
    later.load_state_dict(state)
    later.param_groups[0].update(lr=1.0, damping=DAMPING)
    before = model.k.bias.detach().clone()
    model.zero_grad()
    F.cross_entropy(model(x), y).backward()
    later.step()
    assert torch.equal(model.k.bias, before)


def test_errors_that_half_precision_holds_are_told_by_their_values():
    from biasshift.fisher.moments import sum_rounding

    torch.manual_seed(0)
    delta = torch.randn(1, 50, 7, 3)
    energy = delta.double().square().sum((0, 1, 2))
    assert ((sum_rounding(delta) / energy).sqrt() < 2e-4).all()
    for dtype in (torch.float16, torch.bfloat16):
        through = delta.to(dtype).float()
        share = (sum_rounding(through) / through.double().square().sum((0, 1, 2))).sqrt()
        torch.testing.assert_close(share, torch.full_like(share, 1e-2))
    assert not sum_rounding(torch.zeros(1, 2, 2, 1)).any()
