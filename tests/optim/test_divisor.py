"""Means that leave labels out: the curvature is that of a batch without them, at every step."""

import copy

import pytest
import torch
import torch.nn.functional as F
from cases import BY_NAME
from torch import Tensor, nn

from biasshift.optim import UnitNaturalGradient

RULES = [("q", "full"), ("q", "none"), ("p", "full"), ("p", "diagonal"), ("none", "diagonal")]
OPTIONS = {"labels": "empirical", "damping": 0.03, "decay": 0.0}


def mlp() -> tuple[nn.Module, Tensor, Tensor]:
    return BY_NAME["mlp-elu"].build()


def position_wise() -> tuple[nn.Module, Tensor, Tensor]:
    """Labels at every position, each of which depends on its own inputs alone."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 5), nn.ELU(), nn.Linear(5, 4)).double()
        return model, torch.randn(12, 4, 3).double() + 0.5, torch.randint(4, (12, 4))


def cross_entropy(outputs: Tensor, y: Tensor, **options) -> Tensor:
    return F.cross_entropy(outputs.flatten(0, -2), y.flatten(), **options)


def stepped(model, optimizer, batches, loss=cross_entropy) -> Tensor:
    """One step on several batches, whose losses are divided by their number; all parameters."""
    optimizer.zero_grad()
    for x, y in batches:
        (loss(model(x), y) / len(batches)).backward()
    optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def twins(build, **options):
    """Two of the same network, the first of which has taken a step on a batch that leaves out
    nothing.
    """
    model, x, y = build()
    twin = copy.deepcopy(model)
    first = UnitNaturalGradient(model, 0.1, **{**OPTIONS, **options})
    start = copy.deepcopy(model.state_dict())
    loss = options.get("reduction", "mean")
    stepped(model, first, [(x, y)], lambda outputs, y: cross_entropy(outputs, y, reduction=loss))
    model.load_state_dict(start)
    second = UnitNaturalGradient(twin, 0.1, **{**OPTIONS, **options})
    return (model, first), (twin, second), x, y


def sums(optimizer) -> list[Tensor]:
    """c of every layer's units."""
    layers = optimizer._curvatures.values()
    return [layer.sums.parts["weight"][0] / layer.sums.counted for layer in layers]


@pytest.mark.parametrize("left_out", [1, 20, 38])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_ignored_examples_have_no_part(rule, left_out, reduction):
    padded, without, x, y = twins(mlp, center=rule[0], scale=rule[1], reduction=reduction)
    ignored = torch.randperm(len(y), generator=torch.Generator().manual_seed(1))[:left_out]
    kept = torch.ones(len(y), dtype=torch.bool).index_fill(0, ignored, False)
    y = y.index_fill(0, ignored, -100)

    def loss(outputs, y):
        return cross_entropy(outputs, y, reduction=reduction)

    actual = stepped(*padded, [(x, y)], loss)
    expected = stepped(*without, [(x[kept], y[kept])], loss)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("axis", ["examples", "positions", "both"])
@pytest.mark.parametrize("sharing", ["per_example", "expand"])
@pytest.mark.parametrize("rule", RULES)
def test_ignored_positions_have_no_part(rule, sharing, axis):
    padded, without, x, y = twins(
        position_wise, center=rule[0], scale=rule[1], weight_sharing=sharing
    )
    n, t = {"examples": (7, 4), "positions": (12, 2), "both": (7, 3)}[axis]
    kept = torch.full_like(y, -100)
    kept[:n, :t] = y[:n, :t]
    actual = stepped(*padded, [(x, kept)])
    expected = stepped(*without, [(x[:n, :t], y[:n, :t])])
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("rule", [("q", "full"), ("p", "full")])
def test_a_sum_on_the_steps_between_counts_as_many_examples(rule):
    """Where the curvature is not updated, the mean gradient is still that of the labels kept."""
    padded, without, x, y = twins(
        mlp, center=rule[0], scale=rule[1], reduction="sum", update_every=2
    )
    ends = []

    def loss(outputs, y):
        return cross_entropy(outputs, y, reduction="sum")

    stepped(*without, [(x, y)], loss)
    without[0].load_state_dict(padded[0].state_dict())
    for (model, optimizer), kept in ((padded, 40), (without, 15)):
        t = y.clone()
        t[15:] = -100
        ends.append(stepped(model, optimizer, [(x[:kept], t[:kept])], loss))
    torch.testing.assert_close(*ends, rtol=1e-9, atol=1e-11)


def test_layers_that_keep_examples_keep_none_of_those_left_out():
    padded, without, x, y = twins(mlp, max_dense_inputs=4)
    t = y.clone()
    t[::2] = -100
    actual = stepped(*padded, [(x, t)])
    expected = stepped(*without, [(x[1::2], y[1::2])])
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("parts", [2, 3])
def test_accumulated_means_over_the_labels_left_of_each_batch(parts):
    """The gradient is that of the means' mean; the curvature is of all labels alike."""
    padded, without, x, y = twins(mlp, scale="diagonal")
    t = y.clone()
    t[: len(y) // (parts + 1)] = -100
    t[-1] = -100
    stepped(*padded, list(zip(x.chunk(parts), t.chunk(parts), strict=True)))
    stepped(*without, [(x[t >= 0], y[t >= 0])])
    for actual, expected in zip(sums(padded[1]), sums(without[1]), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=0)


class Rounded(nn.Module):
    """A network whose outputs come in another precision, as under autocast."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.dtype = model, dtype

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).to(self.dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("mean", ["all", "kept"])
def test_what_the_mean_is_over_is_proven(mean, smoothing, dtype):
    """A mask under a mean over all labels leaves the examples in; so does no other divisor."""
    model, x, y = mlp()
    model = Rounded(model, dtype)
    t = y.clone()
    t[10:] = -100
    optimizer = UnitNaturalGradient(model, 0.1, scale="diagonal", **OPTIONS)

    def loss(outputs, t):
        outputs = outputs.float() if dtype == torch.bfloat16 else outputs
        losses = F.cross_entropy(outputs, t, reduction="none", label_smoothing=smoothing)
        return losses.sum() / (len(t) if mean == "all" else (t >= 0).sum())

    stepped(model, optimizer, [(x, t)], loss)
    model, x, y = mlp()
    outputs = model(x[:10])
    targets = F.one_hot(y[:10], 3).double() * (1 - smoothing) + smoothing / 3
    squares = (targets - outputs.softmax(-1)).square().sum(0) / (40 if mean == "all" else 10)
    c = sums(optimizer)[-1]
    precision = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 0.05}[dtype]
    torch.testing.assert_close(c, squares.detach(), rtol=precision, atol=0)


@pytest.mark.parametrize("kept", [4, 20])
def test_masked_bernoulli_labels(kept):
    case = BY_NAME["mlp-bernoulli"]
    ends = []
    for masked in (True, False):
        model, x, y = case.build()
        y = y.round()
        optimizer = UnitNaturalGradient(model, 0.1, likelihood="bernoulli", **OPTIONS)
        mask = torch.zeros_like(y)
        mask[:kept] = 1.0
        batch = (x, y, mask) if masked else (x[:kept], y[:kept], mask[:kept])
        losses = F.binary_cross_entropy_with_logits(model(batch[0]), batch[1], reduction="none")
        ((losses * batch[2]).sum() / batch[2].sum()).backward()
        optimizer.step()
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(*ends, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("likelihood", ["categorical", "bernoulli"])
def test_labels_that_the_model_is_sure_of_count(likelihood):
    """Their gradients are 0 in float32, and they are examples all the same."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, x = nn.Sequential(nn.Linear(3, 3)), torch.randn(12, 3)
    x[:5] = torch.eye(3)[[0, 1, 2, 0, 1]] * 1e4
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(3))
    y = model(x).argmax(1)
    y[5:] = torch.arange(7) % 3
    optimizer = UnitNaturalGradient(model, 0.1, likelihood=likelihood, **OPTIONS)
    if likelihood == "categorical":
        loss = F.cross_entropy(model(x), y)
        error = F.one_hot(y, 3) - model(x).softmax(-1)
    else:
        x[:5] = x[:5] * 2 - 1e4
        targets = (model(x) > 0).float()
        targets[5:] = F.one_hot(y[5:], 3).float()
        loss = F.binary_cross_entropy_with_logits(model(x), targets)
        error = targets - model(x).sigmoid()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    expected = error.detach().square().mean(0)
    torch.testing.assert_close(sums(optimizer)[0], expected, rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize("scale", [1.0, 300.0])
@pytest.mark.parametrize("autocast", [False, True])
def test_labels_that_are_ignored_where_the_model_is_sure(autocast, scale):
    """Their gradients are 0 for either reason; the others prove how many are left."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, x = nn.Sequential(nn.Linear(3, 3)), torch.randn(64, 3)
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(3))
    x[:32] *= scale
    y = model(x).argmax(1)
    y[::2] = (y[::2] + 1) % 3 if scale == 1 else y[::2]
    y[32:] = torch.arange(32) % 3
    t = y.clone()
    t[::3] = -100
    optimizer = UnitNaturalGradient(model, 0.1, scale="diagonal", **OPTIONS)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        outputs = model(x)
    F.cross_entropy(outputs.float(), t).backward()
    optimizer.step()
    kept = outputs.detach().double()[t >= 0]
    squares = (F.one_hot(y[t >= 0], 3) - kept.softmax(-1)).square().mean(0)
    precision = 0.05 if autocast else 1e-4
    torch.testing.assert_close(sums(optimizer)[0].double(), squares, rtol=precision, atol=1e-12)


WEIGHTS = torch.tensor([0.2, 1.0, 3.0]).double()
OTHERS = {
    "sum": lambda outputs, y: F.cross_entropy(outputs, y, reduction="sum"),
    "scaled up": lambda outputs, y: 3 * F.cross_entropy(outputs, y),
    "scaled down": lambda outputs, y: F.cross_entropy(outputs, y) / 3,
    "weighted": lambda outputs, y: F.cross_entropy(outputs, y, weight=WEIGHTS),
    "squares": lambda outputs, y: F.mse_loss(outputs, 9 * F.one_hot(y.clamp(min=0)).double()),
}


@pytest.mark.parametrize("left_out", [0, 12])
@pytest.mark.parametrize("name", OTHERS)
def test_another_loss_is_refused_at_every_step(name, left_out):
    (model, optimizer), _, x, y = twins(mlp)
    y = y.clone()
    y[len(y) - left_out :] = -100
    for _ in range(2):
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError, match="The loss is not a mean of categorical"):
            stepped(model, optimizer, [(x, y)], OTHERS[name])
        assert all(torch.equal(before[key], p) for key, p in model.state_dict().items())
    stepped(model, optimizer, [(x, y)])  # and goes on with the loss that it takes


def test_soft_targets_under_a_mask_are_refused_and_without_one_taken():
    """Whether a mean counts the labels left out shows in hard and smoothed labels alone."""
    model, x, _ = mlp()
    optimizer = UnitNaturalGradient(model, 1e-9, **OPTIONS)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        targets = (model(x) + 0.1 * torch.randn(40, 3)).softmax(-1).detach()

    def loss(outputs, targets):
        return F.cross_entropy(outputs, targets)

    stepped(model, optimizer, [(x, targets)], loss)
    with pytest.raises(ValueError, match="do not tell whether its mean counts"):
        stepped(
            model,
            optimizer,
            [(x, targets)],
            lambda outputs, t: F.cross_entropy(outputs[:30], t[:30]),
        )


def test_an_overflow_is_no_other_loss():
    (model, optimizer), _, x, _ = twins(mlp)
    model(x).mul(float("inf")).sum().backward()
    optimizer.step()
