"""The family of updates against its definition, and the optimizer in somebody's training loop."""

import copy
import itertools
import pickle
import warnings
from io import BytesIO

import oracles
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from cases import BY_NAME, Pool, Tied, pristine
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import biasshift as bs
from biasshift.measure import layer_types
from biasshift.measure.hooks import Call
from biasshift.optim import UnitNaturalGradient

DAMPING = 0.03
RULES = list(itertools.product(("q", "p", "none"), ("full", "diagonal", "none")))
SOLVED = [(center, scale) for center, scale in RULES if scale != "none"]
SHARING = ("per_example", "expand")
CENTERED = [(center, scale) for center, scale in RULES if center != "none"]


def negative_log_likelihood(
    outputs: Tensor, y: Tensor, likelihood: str = "categorical", reduction: str = "mean"
) -> Tensor:
    total = -torch.stack(
        [oracles.log_likelihood(o, t, likelihood) for o, t in zip(outputs, y, strict=True)]
    ).sum()
    return total / len(outputs) if reduction == "mean" else total


def take_step(model, optimizer, x, y, likelihood="categorical", reduction="mean"):
    optimizer.zero_grad()
    negative_log_likelihood(model(x), y, likelihood, reduction).backward()
    optimizer.step()


def flat(model) -> Tensor:
    """All parameters as one vector."""
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def parameters(model) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def updates(model, before, lr=1.0) -> dict[str, tuple[Tensor, Tensor | None]]:
    """What was subtracted from every layer, by layer: (units, inputs) and (units,)."""

    def moved(name):
        return (before[name] - model.get_parameter(name).detach()) / lr

    return {
        name: (
            moved(f"{name}.weight").flatten(1),
            None if layer.bias is None else moved(f"{name}.bias"),
        )
        for name, layer in oracles.weight_layers(model).items()
    }


# -- the definition: section 2 of the theory, from dense matrices of an independent route ----------


def under_p(probe: oracles.Probe, units: int) -> tuple[Tensor, Tensor]:
    """Mean and covariance over examples and positions, per unit."""
    a = probe.incoming.flatten(0, 1).expand(-1, units, -1)
    mean = a.mean(0)
    return mean, torch.einsum("nui,nuj->uij", a - mean, a - mean) / len(a)


def defined(
    F_: Tensor,
    under: tuple[Tensor, Tensor],
    g: Tensor,
    g0: Tensor,
    rule: tuple[str, str],
    bias: bool,
    damping: float = DAMPING,
):
    center, scale = rule
    c, b, A = F_[:, -1, -1], F_[:, :-1, -1], F_[:, :-1, :-1]
    m = b / c[:, None]
    r, W = {
        "q": (m, A / c[:, None, None] - oracles.outer(m)),
        "p": under,
        "none": (torch.zeros_like(m), A / c[:, None, None]),
    }[center]
    if not bias:
        g0 = torch.zeros_like(g0)
    dw, shift = g - g0[:, None] * r, g0
    if scale != "none":
        variance = W.diagonal(dim1=1, dim2=2).mean(1)
        # A unit alive on one example has nothing to whiten with.
        whitened = variance > 1e-9 * (A.diagonal(dim1=1, dim2=2).mean(1) / c)
        W = torch.diag_embed(W.diagonal(dim1=1, dim2=2)) if scale == "diagonal" else W
        W = W + damping * variance[:, None, None] * torch.eye(W.shape[1], dtype=W.dtype)
        if not bias:
            W = W + (torch.diag_embed(r.square()) if scale == "diagonal" else oracles.outer(r))
        dw = torch.where(
            whitened[:, None], oracles.matvec(oracles.spd_inverse(W), dw) / c[:, None], dw
        )
        shift = torch.where(whitened, g0 / c, g0)
    return dw, shift - oracles.dot(r, dw) if bias else None


def definitions(
    model, x, y, rule, likelihood="categorical", weight_sharing="per_example", labels=None
):
    """The updates of all layers; ``labels`` are those of the curvature, by default y."""
    curvature = y if labels is None else labels
    blocks = oracles.unit_fishers(model, x, likelihood, weight_sharing, curvature)
    probes = oracles.probe_layers(model, x, likelihood, curvature)
    gradients = oracles.gradients(model, x, y, likelihood)
    return {
        name: defined(
            block.F, under_p(probes[name], len(block.F)), *gradients[name], rule, block.bias
        )
        for name, block in blocks.items()
    }


def assert_same(actual, expected, rtol=1e-9):
    assert actual.keys() == expected.keys()
    for name in expected:
        for x, y in zip(actual[name], expected[name], strict=True):
            assert (x is None) == (y is None), name
            if y is not None:
                atol = rtol * float(y.abs().max())
                torch.testing.assert_close(
                    x, y, rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
                )


UNDER_ALL_RULES = [
    ("mlp-elu", "per_example"),
    ("conv-strided", "per_example"),
    ("conv-groups", "expand"),
]
UNDER_TWO_RULES = [
    (name, sharing)
    for name in (
        "mlp-no-bias",
        "conv-no-bias",
        "conv-groups",
        "shared",
        "tokens-pooled",
        "conv1d",
        "conv-inplace",
        "residual-inplace",
    )
    for sharing in ("per_example", "expand")
]
GRID = [(*case, *rule) for case in UNDER_ALL_RULES for rule in RULES] + [
    (*case, *rule) for case in UNDER_TWO_RULES for rule in (("q", "full"), ("p", "diagonal"))
]
# convolutions whose sums are formed without patches
GRID += [
    (name, "per_example", center, "none")
    for name in ("conv-groups", "conv-no-bias", "conv1d", "conv-inplace")
    for center in ("q", "p")
]


@pytest.mark.parametrize(("name", "sharing", "center", "scale"), GRID)
def test_a_step_is_the_definition(name, sharing, center, scale):
    case = BY_NAME[name]
    model, x, y = case.build()
    expected = definitions(model, x, y, (center, scale), case.likelihood, sharing)
    optimizer = UnitNaturalGradient(
        model,
        1.0,
        center,
        scale,
        damping=DAMPING,
        labels="empirical",
        likelihood=case.likelihood,
        decay=0.0,
        weight_sharing=sharing,
    )
    before = parameters(model)
    take_step(model, optimizer, x, y, case.likelihood)
    assert_same(updates(model, before), expected)


SEQUENCES = list(
    itertools.product(
        ("tokens-pooled", "tokens-inplace", "tokens-labeled"),
        ("empirical", "sampled"),
        SHARING,
        RULES,
    )
)


@pytest.mark.parametrize(("name", "labels", "sharing", "rule"), SEQUENCES)
def test_a_step_on_sequences_is_the_definition(name, labels, sharing, rule):
    """On 3-D inputs a linear layer returns a view on some versions of PyTorch, and a matrix product
    of its own on others.
    """
    case = BY_NAME[name]
    model, x, y = case.build()
    at = y
    if labels == "sampled":
        p = model(x).detach().float().softmax(-1)
        drawn = torch.multinomial(p.flatten(0, -2), 1, generator=torch.Generator().manual_seed(5))
        at = drawn.view(y.shape)
    expected = definitions(model, x, y, rule, weight_sharing=sharing, labels=at)
    optimizer = UnitNaturalGradient(
        model,
        1.0,
        *rule,
        damping=DAMPING,
        labels=labels,
        decay=0.0,
        weight_sharing=sharing,
        generator=torch.Generator().manual_seed(5),
    )
    before = parameters(model)
    take_step(model, optimizer, x, y)
    assert_same(updates(model, before), expected)


@pytest.mark.parametrize(
    ("damping", "stored"), [(1e-4, torch.float64), (1e-3, torch.float32), (0.1, torch.float32)]
)
def test_a_float32_step_is_the_definition_whatever_its_factors_are_stored_in(
    randn, damping, stored
):
    """Few examples of inputs far from the origin: without the damping W has no inverse."""
    x, y = 3 + randn(20, 48), torch.arange(20) % 3
    model = nn.Sequential(nn.Linear(48, 3)).double()
    with torch.no_grad():
        model[0].weight.copy_(randn(3, 48) / 10)
    block = oracles.unit_fishers(model, x, "categorical", "per_example", y)["0"]
    under = under_p(oracles.probe_layers(model, x, "categorical", y)["0"], 3)
    g, g0 = oracles.gradients(model, x, y, "categorical")["0"]
    expected, _ = defined(block.F, under, g, g0, ("q", "full"), block.bias, damping)
    model.float()
    optimizer = UnitNaturalGradient(model, 1.0, damping=damping, labels="empirical", decay=0.0)
    before = parameters(model)
    take_step(model, optimizer, x.float(), y)
    inverse = optimizer._curvatures["0"]._inverse
    assert inverse is not None and inverse[1].factors.dtype == stored
    dw = updates(model, before)["0"][0].double()
    rounding = torch.finfo(torch.float32).eps * 48 / damping
    assert (dw - expected).norm() < 2 * rounding * expected.norm()  # twice: so is the gradient's


@pytest.mark.parametrize("name", ["mlp-gaussian", "mlp-bernoulli", "tokens-labeled"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_empirical_curvature_of_every_likelihood(name, reduction):
    case = BY_NAME[name]
    model, x, y = case.build()
    expected = definitions(model, x, y, ("q", "full"), case.likelihood)
    optimizer = UnitNaturalGradient(
        model,
        1.0,
        damping=DAMPING,
        labels="empirical",
        likelihood=case.likelihood,
        decay=0.0,
        reduction=reduction,
    )
    before = parameters(model)
    take_step(model, optimizer, x, y, case.likelihood, reduction)
    assert_same(updates(model, before), expected)


def test_means_over_all_labels_are_recognized():
    """PyTorch's own means divide by every output; the curvature is that of the sum over outputs all
    the same.
    """
    case = BY_NAME["mlp-bernoulli"]
    model, x, y = case.build()
    expected = definitions(model, x, y, ("q", "full"), "bernoulli")
    optimizer = UnitNaturalGradient(
        model,
        float(y.shape[1]),
        damping=DAMPING,
        labels="empirical",
        likelihood="bernoulli",
        decay=0.0,
    )
    before = parameters(model)
    F.binary_cross_entropy_with_logits(model(x), y).backward()
    optimizer.step()
    assert_same(updates(model, before), expected)


@pytest.mark.parametrize(
    ("center", "scale"), [("q", "full"), ("q", "none"), ("none", "diagonal"), ("p", "full")]
)
def test_sampled_labels_are_those_of_the_generator(center, scale):
    model, x, y = BY_NAME["mlp-elu"].build()
    p = model(x).detach().float().softmax(-1)
    drawn = torch.multinomial(p, 1, generator=torch.Generator().manual_seed(5))[:, 0]
    expected = definitions(model, x, y, (center, scale), labels=drawn)
    optimizer = UnitNaturalGradient(
        model, 1.0, center, scale, damping=DAMPING, generator=torch.Generator().manual_seed(5)
    )
    before, state = parameters(model), torch.get_rng_state()
    take_step(model, optimizer, x, y)
    assert_same(updates(model, before), expected)
    assert torch.equal(state, torch.get_rng_state())


def test_no_labels_are_drawn_where_errors_are_not_read():
    model, x, y = BY_NAME["mlp-elu"].build()
    for center in ("p", "none"):
        optimizer = UnitNaturalGradient(model, 0.1, center, "none")
        state = optimizer.generator.get_state()
        take_step(model, optimizer, x, y)
        assert torch.equal(state, optimizer.generator.get_state())
        optimizer.remove()


def test_the_plain_rule_is_gradient_descent_with_momentum():
    model, x, y = BY_NAME["conv-strided"].build()
    twin = copy.deepcopy(model)
    mine = UnitNaturalGradient(model, 0.1, "none", "none", momentum=0.9)
    theirs = torch.optim.SGD(twin.parameters(), 0.1, momentum=0.9)
    for _ in range(3):
        take_step(model, mine, x, y)
        take_step(twin, theirs, x, y)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-13, atol=1e-15)


def test_it_agrees_with_the_measurement():
    for name in ("mlp-elu", "conv-no-bias"):
        model, x, y = BY_NAME[name].build()
        fishers = bs.unit_fisher(model, [(x, y)], labels="empirical", damping=DAMPING)
        gradients = oracles.gradients(model, x, y, "categorical")
        expected = {
            n: f.natural_gradient(*(gradients[n] if f.bias else gradients[n][:1]))
            for n, f in fishers.items()
        }
        optimizer = UnitNaturalGradient(model, 1.0, damping=DAMPING, labels="empirical")
        before = parameters(model)
        take_step(model, optimizer, x, y)
        assert_same(updates(model, before), expected)


def test_transposed_convolutions_agree_with_the_measurement(randn):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.ConvTranspose2d(2, 4, 3, stride=2, groups=2),
            nn.ELU(),
            nn.Flatten(),
            nn.Linear(100, 3),
        ).double()
    x, y = randn(20, 2, 2, 2) + 1, torch.arange(20) % 3
    fisher = bs.unit_fisher(model, [(x, y)], labels="empirical", damping=DAMPING, layers=["0"])["0"]
    optimizer = UnitNaturalGradient(model, 1.0, damping=DAMPING, labels="empirical")
    layer, before = model[0], parameters(model)
    take_step(model, optimizer, x, y)
    dw, dw0 = fisher.natural_gradient(
        layer_types.weights(layer, layer.weight.grad), layer.bias.grad
    )
    torch.testing.assert_close(
        before["0.weight"] - layer.weight.detach(),
        layer_types.as_weight(layer, dw),
        rtol=1e-9,
        atol=1e-10,
    )
    torch.testing.assert_close(before["0.bias"] - layer.bias.detach(), dw0, rtol=1e-9, atol=1e-10)


# -- what the theory says about all rules --------------------------------------------------------


@pytest.mark.parametrize(("center", "scale"), RULES)
def test_the_mean_net_input_at_the_center_moves_by_the_bias_gradient_alone(center, scale):
    model, x, y = BY_NAME["mlp-elu"].build()
    blocks = oracles.unit_fishers(model, x, y=y)
    gradients = oracles.gradients(model, x, y, "categorical")
    optimizer = UnitNaturalGradient(model, 1.0, center, scale, damping=0.3, labels="empirical")
    before = parameters(model)
    take_step(model, optimizer, x, y)
    for name, (dw, dw0) in updates(model, before).items():
        block, g0 = blocks[name], gradients[name][1]
        r = {"q": block.mean_q, "p": block.mean_p.expand_as(dw), "none": torch.zeros_like(dw)}[
            center
        ]
        expected = g0 if scale == "none" else g0 / block.c
        torch.testing.assert_close(oracles.dot(r, dw) + dw0, expected, rtol=1e-9, atol=1e-10)


class Shifted(nn.Module):
    """ELU nets whose inputs and hidden activations are all moved by a constant; the biases take it
    back.
    """

    def __init__(self, model: nn.Sequential, shift: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            copy.deepcopy(layer) for layer in model if isinstance(layer, nn.Linear)
        )
        self.shift = shift
        with torch.no_grad():
            for layer in self.layers:
                layer.bias -= shift * layer.weight.sum(1)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = F.elu(layer(x + self.shift))
        return self.layers[-1](x + self.shift)


@pytest.mark.parametrize(("center", "scale"), RULES)
def test_centered_steps_do_not_see_a_shift_of_the_activations(center, scale):
    model, x, y = BY_NAME["mlp-elu"].build()
    outputs = []
    for net in (Shifted(model, 0.0), Shifted(model, 2.0)):
        optimizer = UnitNaturalGradient(
            net, 0.05, center, scale, momentum=0.5, damping=DAMPING, decay=0.5
        )
        for _ in range(2):
            take_step(net, optimizer, x, y)
        outputs.append(net(x).detach())
    difference = float((outputs[0] - outputs[1]).abs().max() / outputs[0].abs().max())
    assert difference < 1e-12 if center != "none" else difference > 1e-4


@pytest.mark.parametrize(("center", "scale"), RULES)
def test_mean_and_sum_are_the_same_step(center, scale):
    ends = []
    for reduction in ("mean", "sum"):
        model, x, y = BY_NAME["mlp-layernorm"].build()
        optimizer = UnitNaturalGradient(
            model, 0.1, center, scale, labels="empirical", reduction=reduction
        )
        for _ in range(2):
            take_step(model, optimizer, x, y, reduction=reduction)
        ends.append(flat(model))
    torch.testing.assert_close(*ends, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("center", "labels"), [("q", "sampled"), ("q", "empirical"), ("p", "sampled")]
)
def test_the_centered_gradient_learns_at_a_rate_at_which_the_plain_one_diverges(
    center, labels, randn
):
    x = randn(50, 3) + 10
    y = x.sum(1, keepdim=True)
    losses = {}
    options = {"scale": "none", "labels": labels, "likelihood": "gaussian"}
    for about in (center, "none"):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = nn.Linear(3, 1).double()
        optimizer = UnitNaturalGradient(model, 0.1, about, **options)
        for _ in range(50):
            take_step(model, optimizer, x, y, "gaussian")
        losses[about] = float(negative_log_likelihood(model(x), y, "gaussian").detach())
    assert losses[center] < 1 < 1e6 < losses["none"]  # 450 at first


# -- running estimates -----------------------------------------------------------------------------


def three_batches():
    model, x, y = BY_NAME["mlp-elu"].build()
    return model, [(x[i : i + 20] * (1 + i / 10), y[i : i + 20]) for i in (0, 10, 20)]


@pytest.mark.parametrize(("center", "scale"), SOLVED)
def test_the_average_is_bias_corrected(center, scale):
    """Uncentered averages with weights 0.7², 0.7, 1 over their sum, and centered afterwards."""
    model, batches = three_batches()
    average: dict[str, list[Tensor]] = {}
    norm = 1 + 0.7 + 0.49
    for (x, y), weight in zip(batches, (0.49, 0.7, 1.0), strict=True):
        probes = oracles.probe_layers(model, x, "categorical", y)
        for name, block in oracles.unit_fishers(model, x, y=y).items():
            a = probes[name].incoming[:, 0]
            new = [block.F, a.mean(0), torch.einsum("nui,nuj->uij", a, a) / len(a)]
            kept = average.setdefault(name, [torch.zeros_like(t) for t in new])
            average[name] = [k + weight / norm * n for k, n in zip(kept, new, strict=True)]
    gradients = oracles.gradients(model, *batches[-1], "categorical")
    expected = {}
    for name, (F_, mean, second) in average.items():
        units = len(F_)
        under = mean.expand(units, -1), (second - oracles.outer(mean)).expand(units, -1, -1)
        expected[name] = defined(F_, under, *gradients[name], (center, scale), True)
    optimizer = UnitNaturalGradient(
        model, 0.0, center, scale, damping=DAMPING, labels="empirical", decay=0.7
    )
    for x, y in batches:
        optimizer.param_groups[0]["lr"] = float(x is batches[-1][0])
        before = parameters(model)
        take_step(model, optimizer, x, y)
    assert_same(updates(model, before), expected)


def test_the_curvature_is_updated_every_few_steps():
    model, batches = three_batches()
    optimizer = UnitNaturalGradient(model, 0.0, damping=DAMPING, update_every=3, decay=0.5)
    states = [optimizer.generator.get_state()]
    for x, y in batches * 2:
        take_step(model, optimizer, x, y)
        states.append(optimizer.generator.get_state())
    drew = [not torch.equal(before, after) for before, after in itertools.pairwise(states)]
    assert drew == [True, False, False] * 2


def test_between_two_updates_the_old_curvature_is_used():
    model, batches = three_batches()
    optimizer = UnitNaturalGradient(model, 0.0, damping=DAMPING, update_every=2, labels="empirical")
    blocks = oracles.unit_fishers(model, batches[0][0], y=batches[0][1])
    take_step(model, optimizer, *batches[0])
    optimizer.param_groups[0]["lr"] = 1.0
    before, gradients = parameters(model), oracles.gradients(model, *batches[1], "categorical")
    take_step(model, optimizer, *batches[1])
    assert_same(
        updates(model, before),
        {name: block.natural_gradient(*gradients[name], DAMPING) for name, block in blocks.items()},
    )


@pytest.mark.parametrize(
    "rule",
    [
        {"labels": "empirical"},
        {"labels": "empirical", "scale": "diagonal"},
        {"center": "p", "scale": "none"},
    ],
)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_accumulated_batches_add_up(rule, reduction):
    ends = []
    for parts in (1, 4):
        model, x, y = BY_NAME["mlp-elu"].build()
        optimizer = UnitNaturalGradient(model, 0.1, reduction=reduction, **rule)
        for _ in range(2):
            optimizer.zero_grad()
            for a, b in zip(x.chunk(parts), y.chunk(parts), strict=True):
                loss = F.cross_entropy(model(a), b, reduction=reduction)
                (loss / parts if reduction == "mean" else loss).backward()
            optimizer.step()
        ends.append(flat(model))
    torch.testing.assert_close(*ends, rtol=1e-10, atol=1e-12)


def train(model, optimizer, x, y, steps):
    for i in range(steps):
        take_step(model, optimizer, x[i % 3 :: 3], y[i % 3 :: 3])


@pytest.mark.parametrize(("center", "scale"), RULES)
def test_a_saved_state_goes_on_to_the_same_numbers(center, scale):
    options = {"center": center, "scale": scale, "momentum": 0.9, "damping": 0.3, "update_every": 2}
    model, x, y = BY_NAME["mlp-elu"].build()
    model, x = model.float(), x.float()
    optimizer = UnitNaturalGradient(model, 0.02, **options)
    train(model, optimizer, x, y, 3)
    file = BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    twin = copy.deepcopy(model)
    train(twin, UnitNaturalGradient(twin, 0.02, **options), x, y, 1)  # in another state
    twin.load_state_dict(saved["model"])
    resumed = UnitNaturalGradient(twin, 0.5, **options)
    resumed.load_state_dict(saved["optimizer"])
    train(model, optimizer, x, y, 4)
    train(twin, resumed, x, y, 4)
    assert all(
        torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True)
    )


def saved_and_loaded(pair):
    file = BytesIO()
    torch.save(pair, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def alone(optimizer):
    return optimizer._recorder.root, optimizer


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda pair: pickle.loads(pickle.dumps(pair)),
    "torch.save": saved_and_loaded,
    "twice": lambda pair: copy.deepcopy(copy.deepcopy(pair)),
    "optimizer first": lambda pair: copy.deepcopy(pair[::-1])[::-1],
    "optimizer alone": lambda pair: alone(copy.deepcopy(pair[1])),
}


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize(
    "options",
    [
        {"momentum": 0.9, "update_every": 2, "damping": 0.3},
        {"center": "p", "scale": "none", "weight_decay": 0.1},
        {"center": "none", "scale": "none"},
        {"labels": "empirical", "max_dense_inputs": 4, "kl_clip": 1e-3, "unit_damping": 0.1},
    ],
)
def test_a_copy_goes_on_to_the_same_numbers_and_leaves_the_original_alone(options, way, steps):
    model, x, y = BY_NAME["mlp-elu"].build()
    optimizer = UnitNaturalGradient(model, 0.02, **options)
    train(model, optimizer, x, y, steps)
    optimizer.param_groups[0]["lr"] = 0.03  # as a schedule would
    twin, copied = COPIES[way]((model, optimizer))
    assert copied.param_groups[0]["params"][0] is next(twin.parameters())
    before = flat(model)
    train(twin, copied, x, y, 4)
    assert torch.equal(flat(model), before)
    train(model, optimizer, x, y, 4)
    assert torch.equal(flat(model), flat(twin)) and not torch.equal(flat(model), before)
    copied.remove()
    take_step(model, optimizer, x, y)  # whose hooks are its own


def test_a_copy_of_an_optimizer_whose_hooks_were_removed_has_none():
    model, x, y = BY_NAME["mlp-elu"].build()
    optimizer = UnitNaturalGradient(model, 0.1)
    take_step(model, optimizer, x, y)
    optimizer.remove()
    twin, copied = copy.deepcopy((model, optimizer))
    pristine(twin)
    for net, of_net in ((model, optimizer), (twin, copied)):
        take_step(net, of_net, x, y)
    assert torch.equal(flat(model), flat(twin))


def test_a_copied_generator_draws_the_same_labels_and_is_another_one():
    model, x, y = BY_NAME["mlp-elu"].build()
    optimizer = UnitNaturalGradient(model, 0.1, generator=torch.Generator().manual_seed(5))
    take_step(model, optimizer, x, y)
    twin, copied = copy.deepcopy((model, optimizer))
    drawn = optimizer.generator.get_state()
    assert torch.equal(copied.generator.get_state(), drawn)
    take_step(twin, copied, x, y)
    assert torch.equal(optimizer.generator.get_state(), drawn)


def test_the_state_of_another_rule_is_refused():
    model, x, y = BY_NAME["mlp-elu"].build()
    optimizer = UnitNaturalGradient(model, 0.1)
    take_step(model, optimizer, x, y)
    with pytest.raises(ValueError, match="center='q', scale='full'"):
        UnitNaturalGradient(model, 0.1, "p").load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match="another optimizer"):
        optimizer.load_state_dict(torch.optim.SGD(model.parameters(), 0.1).state_dict())
    other = nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 3))
    with pytest.raises(ValueError, match="'2'"):
        UnitNaturalGradient(other, 0.1).load_state_dict(optimizer.state_dict())


# -- somebody's training loop ----------------------------------------------------------------------


def examples(optimizer) -> float:
    """How many examples the sums of the first layer are of."""
    return optimizer.state_dict()["biasshift"]["curvature"]["0"]["examples"]


def test_only_training_passes_that_went_backwards_count():
    ends = []
    for disturbed in (False, True):
        model, x, y = BY_NAME["mlp-elu"].build()
        optimizer = UnitNaturalGradient(model, 0.1, labels="empirical")
        for _ in range(2):
            optimizer.zero_grad()
            outputs = model(x)
            if disturbed:
                model(3 * x)  # never goes backwards
                with torch.no_grad():
                    model(3 * x)
                model.eval()
                model(3 * x)
                model.train()
                bs.unit_fisher(copy.deepcopy(model), x)  # the hooks of a copy do nothing
            F.cross_entropy(outputs, y).backward()
            optimizer.step()
            if disturbed:
                bs.unit_fisher(model, 3 * x)
                bs.unit_fisher(pickle.loads(pickle.dumps(model)), 3 * x)
        ends.append(flat(model))
    torch.testing.assert_close(*ends, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("labels", ["sampled", "empirical"])
def test_two_losses_of_one_pass_are_one_pass(labels):
    ends = []
    for parts in (1, 2):
        model, x, y = BY_NAME["mlp-elu"].build()
        optimizer = UnitNaturalGradient(model, 0.1, labels=labels)
        loss = F.cross_entropy(model(x), y)
        for part in range(parts):
            (loss / parts).backward(retain_graph=part + 1 < parts)
        optimizer.step()
        assert examples(optimizer) == 40
        ends.append(flat(model))
    torch.testing.assert_close(*ends, rtol=1e-10, atol=1e-12)


def test_a_pass_from_before_a_state_was_loaded_is_ignored():
    model, x, y = BY_NAME["mlp-elu"].build()
    optimizer = UnitNaturalGradient(model, 0.1)
    take_step(model, optimizer, x, y)
    saved = copy.deepcopy(optimizer.state_dict())
    loss = F.cross_entropy(model(x + 9), y)
    optimizer.load_state_dict(saved)
    loss.backward()
    optimizer.step()
    assert examples(optimizer) == 40


def test_a_measurement_with_a_probe_does_not_disturb_the_training():
    ends = []
    for measured in (False, True):
        model, x, y = BY_NAME["mlp-elu"].build()
        optimizer = UnitNaturalGradient(model, 0.1)
        log = bs.instrument(model, optimizer=optimizer, probe=(x, y), every=1) if measured else None
        train(model, optimizer, x, y, 3)
        if log is not None:
            log.remove()
        ends.append(flat(model))
    assert torch.equal(*ends)


def test_a_step_without_a_pass_keeps_the_curvature_and_the_first_one_is_refused():
    model, x, y = BY_NAME["mlp-elu"].build()
    optimizer = UnitNaturalGradient(model, 0.1, labels="empirical", damping=DAMPING)
    model.eval()
    with pytest.raises(RuntimeError, match=r"No forward pass .* training mode"):
        take_step(model, optimizer, x, y)
    model.train()
    optimizer.param_groups[0]["lr"] = 0.0
    take_step(model, optimizer, x, y)
    expected = definitions(model, x, y, ("q", "full"))
    optimizer.param_groups[0]["lr"] = 1.0
    model.eval()
    before = parameters(model)
    take_step(model, optimizer, x, y)
    assert_same(updates(model, before), expected)


def test_a_skipped_step_changes_nothing():
    model, x, y = BY_NAME["mlp-elu"].build()
    optimizer = UnitNaturalGradient(model, 0.1, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for i in range(3):
        before = parameters(model)
        curvature = copy.deepcopy(optimizer.state_dict()["biasshift"]["curvature"])
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y) * (float("inf") if i == 1 else 1.0)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        if i == 1:
            assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    optimizer.zero_grad()
    twin, x, y = BY_NAME["mlp-elu"].build()
    steady = UnitNaturalGradient(twin, 0.1, momentum=0.9)
    take_step(twin, steady, x, y)
    assert examples(steady) == curvature["0"]["examples"]
    assert examples(optimizer) == pytest.approx(40 * 1.95)


def test_an_overflow_leaves_no_trace_in_the_curvature():
    model, x, y = BY_NAME["mlp-elu"].build()
    optimizer = UnitNaturalGradient(model, 0.0)
    take_step(model, optimizer, x, y)
    model(x * float("inf")).sum().backward()
    optimizer.step()
    assert examples(optimizer) == 40


def test_schedules_closures_and_decoupled_decay():
    model, x, y = BY_NAME["mlp-layernorm"].build()
    optimizer = UnitNaturalGradient(model, 0.2, "p", "none", weight_decay=0.5)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.1)
    gradients = oracles.gradients(model, x, y, "categorical")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    mean = oracles.probe_layers(model, x, "categorical", y)["0"].mean_p
    before = parameters(model)
    assert optimizer.step(closure) > 0
    schedule.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.02)
    g, g0 = gradients["0"]
    dw = g - g0[:, None] * mean
    torch.testing.assert_close(model[0].weight.detach(), 0.9 * before["0.weight"] - 0.2 * dw)
    torch.testing.assert_close(model[0].bias.detach(), before["0.bias"] - 0.2 * (g0 - dw @ mean[0]))
    norm = model[1].bias
    torch.testing.assert_close(norm.detach(), before["1.bias"] - 0.2 * norm.grad)


def test_momentum_is_of_the_transformed_updates():
    model, batches = three_batches()
    optimizer = UnitNaturalGradient(
        model, 0.1, momentum=0.5, damping=DAMPING, labels="empirical", decay=0.0
    )
    velocity = None
    for x, y in batches:
        new = definitions(model, x, y, ("q", "full"))["2"]
        if velocity is not None:
            new = tuple(0.5 * v + n for v, n in zip(velocity, new, strict=True))
        velocity = new
        before = parameters(model)
        take_step(model, optimizer, x, y)
        assert_same({"2": updates(model, before, 0.1)["2"]}, {"2": velocity}, rtol=1e-8)


def test_frozen_parameters_stay_and_the_others_step_as_defined():
    model, x, y = BY_NAME["mlp-frozen"].build()
    expected = definitions(model, x, y, ("q", "full"))
    optimizer = UnitNaturalGradient(model, 1.0, damping=DAMPING, labels="empirical")
    before = parameters(model)
    take_step(model, optimizer, x, y)
    steps = updates(model, before)
    assert all((part == 0).all() for name in ("0", "2") for part in steps[name])
    assert_same({"4": steps["4"]}, {"4": expected["4"]})


def test_a_frozen_bias_has_nothing_to_center_with():
    model, x, y = BY_NAME["mlp-elu"].build()
    model[2].bias.requires_grad_(False)
    block = oracles.unit_fishers(model, x, y=y)["2"]
    block = oracles.Block(block.F, block.mean_p, block.effective_samples, bias=False)
    g, g0 = oracles.gradients(model, x, y, "categorical")["2"]
    optimizer = UnitNaturalGradient(model, 1.0, damping=DAMPING, labels="empirical")
    before = parameters(model)
    take_step(model, optimizer, x, y)
    dw, dw0 = updates(model, before)["2"]
    torch.testing.assert_close(dw, block.natural_gradient(g, g0, DAMPING)[0])
    assert (dw0 == 0).all()


def test_parameters_of_no_unit_take_the_plain_gradient():
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.tied = nn.Embedding(7, 5), Tied()
            self.used, self.head = nn.Linear(3, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(F.linear(self.tied(self.table(x)), self.used.weight))

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, x, y = Odd().double(), torch.randint(7, (30,)), torch.randint(3, (30,))
    model.tied.again = nn.Linear(5, 5).double()
    model.tied.again.weight = model.tied.first.weight
    words = "'tied.first' .*tied to that of 'tied.again'.*'tied.again' .*to that of 'tied.first'"
    with pytest.raises(ValueError, match=r"Layer 'tied\.first' .*tied to that of 'tied\.again'"):
        UnitNaturalGradient(model, 1.0, uncovered="raise")
    UnitNaturalGradient(model, 1.0, skip=["tied"]).remove()
    with pytest.warns(bs.UncoveredWarning, match=words) as caught:
        optimizer = UnitNaturalGradient(model, 1.0)
    assert len(caught) == 1
    before = parameters(model)
    take_step(model, optimizer, x, y)
    for name in ("table.weight", "tied.first.weight", "used.weight"):
        parameter = model.get_parameter(name)
        torch.testing.assert_close(before[name] - parameter.detach(), parameter.grad)
    head = model.head.weight
    assert not torch.allclose(before["head.weight"] - head.detach(), head.grad)


@pytest.mark.parametrize("labels", ["sampled", "empirical"])
def test_a_checkpointed_block_is_recorded_once(labels):
    model, x, y = BY_NAME["mlp-elu"].build()

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = copy.deepcopy(model)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner[4](checkpoint(self.inner[:4], x, use_reentrant=False))

    ends = []
    for net in (copy.deepcopy(model), Checkpointed()):
        optimizer = UnitNaturalGradient(net, 0.1, labels=labels)
        train(net, optimizer, x, y, 3)
        ends.append(flat(net))
    torch.testing.assert_close(*ends, rtol=1e-12, atol=1e-14)


# -- errors that cannot come back ------------------------------------------------------------------


class Recomputed(torch.autograd.Function):
    """A block whose activations are computed again in the backward pass, as reversible nets do."""

    @staticmethod
    def forward(ctx, block, x, *parameters):
        ctx.block, ctx.parameters = block, parameters
        ctx.save_for_backward(x)
        return block(x)

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            out = ctx.block(x)
        return None, *torch.autograd.grad(out, (x, *ctx.parameters), gradient)


class Bypassed(nn.Module):
    """Three layers, the second of which is ``inner``, called in one of several ways."""

    def __init__(self, way: str, dims: int) -> None:
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.way, self.dims = way, dims
        if way == "replaced by a hook":
            self.inner.register_forward_hook(lambda m, args, out: self.functional(args[0]))

    def functional(self, h: Tensor) -> Tensor:
        return F.linear(h, self.inner.weight, self.inner.bias)

    def middle(self, h: Tensor) -> Tensor:
        if self.way == "functional too":
            self.inner(h)  # for a statistic, say
            return self.functional(h)
        if self.way == "reentrant":
            return checkpoint(self.inner, h, use_reentrant=True)
        if self.way == "recomputed":
            return Recomputed.apply(self.inner, h, *self.inner.parameters())
        return self.inner(h)

    def forward(self, x: Tensor) -> Tensor:
        h = F.elu(self.middle(F.elu(self.first(x))))
        return self.last(h.mean(1) if self.dims == 3 else h)


def bypassed(way: str, dims: int) -> tuple[nn.Module, Tensor, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Bypassed(way, dims).double()
        x = torch.randn(*((20, 4, 5) if dims == 3 else (20, 5)), dtype=torch.float64)
    return model, x, torch.arange(20) % 3


BYPASSES = ("replaced by a hook", "functional too", "reentrant", "recomputed")
READ_ERRORS = [("q", "full"), ("q", "none"), ("p", "full"), ("none", "diagonal")]


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("rule", READ_ERRORS)
@pytest.mark.parametrize("labels", ["sampled", "empirical"])
@pytest.mark.parametrize("way", BYPASSES)
def test_a_layer_whose_errors_cannot_come_back_is_refused(way, labels, rule, dims):
    """And takes the step that it is due when called as the others are."""
    model, x, y = bypassed(way, dims)
    before = parameters(model)
    optimizer = UnitNaturalGradient(model, 0.1, *rule, labels=labels, uncovered="raise")
    error, words = ValueError, r"Layer 'inner' has a gradient, .* no error came"
    if (way, labels) == ("reentrant", "sampled"):  # PyTorch lets nobody else differentiate it
        error, words = RuntimeError, "use_reentrant=False"
    for _ in range(2):
        with pytest.raises(error, match=words):
            take_step(model, optimizer, x, y)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    model, x, y = bypassed("called", dims)
    expected = definitions(model, x, y, rule)
    optimizer = UnitNaturalGradient(model, 1.0, *rule, damping=DAMPING, labels="empirical")
    take_step(model, optimizer, x, y)
    assert_same(updates(model, before), expected)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("rule", READ_ERRORS)
@pytest.mark.parametrize("labels", ["sampled", "empirical"])
@pytest.mark.parametrize("way", BYPASSES)
def test_a_layer_whose_errors_cannot_come_back_takes_the_plain_gradient(way, labels, rule, dims):
    """With one warning; all others take the steps that they take beside a layer that is called."""
    if (way, labels) == ("reentrant", "sampled"):
        pytest.skip("PyTorch lets nobody else differentiate it")
    options = {"damping": DAMPING, "labels": labels}
    steps = []
    for net, x, y in (bypassed("called", dims), bypassed(way, dims)):
        before, optimizer = parameters(net), UnitNaturalGradient(net, 1.0, *rule, **options)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            take_step(net, optimizer, x, y)
        steps.append((updates(net, before), caught, net, optimizer))
    (called, none, *_), (found, caught, net, optimizer) = steps
    said = [str(warning.message) for warning in caught]
    assert not none and len(said) == 1 and caught[0].category is bs.UncoveredWarning
    assert "Layer 'inner' has a gradient" in said[0] and "plain gradient from now on" in said[0]
    torch.testing.assert_close(found["inner"], (net.inner.weight.grad, net.inner.bias.grad))
    assert_same({n: found[n] for n in ("first", "last")}, {n: called[n] for n in ("first", "last")})
    take_step(net, optimizer, x, y)  # says it once
    assert set(optimizer.state_dict()["biasshift"]["curvature"]) == {"first", "last"}


@pytest.mark.parametrize("labels", ["sampled", "empirical"])
def test_net_inputs_of_another_node_are_refused(monkeypatch, labels):
    """A change in place gives a view another node, where the hook does not return a copy."""

    def record(tape, name, module, a, output):
        edge = torch.autograd.graph.get_gradient_edge(output)
        call = Call(a.detach(), a._version, edge, output.shape)
        tape.calls.setdefault(name, []).append(call)

    monkeypatch.setattr("biasshift.optim.recorder.Tape.record", record)
    model = nn.Sequential(
        nn.Linear(5, 12), nn.Unflatten(1, (3, 4)), nn.ELU(inplace=True), nn.Flatten()
    ).double()
    viewed = nn.Sequential(nn.Linear(5, 4), nn.ELU(inplace=True), nn.Linear(4, 3)).double()
    viewed[0].forward = lambda x: F.linear(x, viewed[0].weight, viewed[0].bias).view(len(x), 4)
    for net, refused in ((model, False), (viewed, True)):
        optimizer = UnitNaturalGradient(net, 0.1, labels=labels, uncovered="raise")
        x, y = torch.ones(6, 5, dtype=torch.float64), torch.arange(6) % 3
        if refused:
            with pytest.raises(ValueError, match="Layer '0' has a gradient"):
                take_step(net, optimizer, x, y)
        else:
            take_step(net, optimizer, x, y)


class Branching(nn.Module):
    """A trunk, and a head beside it that the outputs do not depend on."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.head, self.beside = nn.Linear(5, 6), nn.Linear(6, 3), nn.Linear(6, 3)
        self.fixed = nn.Linear(5, 6)

    def forward(self, x: Tensor) -> Tensor:
        h = F.elu(self.trunk(x))
        self.aside = self.beside(h)
        with torch.no_grad():
            h = h + self.fixed(x)
        return self.head(h)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("labels", ["sampled", "empirical"])
@pytest.mark.parametrize("loss", ["outputs", "penalty", "auxiliary", "zeros"])
def test_layers_without_influence_on_the_outputs_are_left_alone(loss, labels, rule):
    """Whether the loss does not read them, decays their weights, or reads a head beside."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, x = Branching().double(), torch.randn(20, 5, dtype=torch.float64)
    y, before = torch.arange(20) % 3, parameters(model)
    optimizer = UnitNaturalGradient(model, 0.1, *rule, labels=labels, update_every=2)
    for _ in range(3):
        optimizer.zero_grad(set_to_none=loss != "zeros")
        total = F.cross_entropy(model(x), y)
        if loss == "penalty":
            total = total + 0.1 * sum(p.square().sum() for p in model.parameters())
        if loss == "auxiliary":
            total = total + F.cross_entropy(model.aside, y)
        total.backward()
        optimizer.step()
    assert not torch.equal(model.head.weight, before["head.weight"])
    moved = not torch.equal(model.beside.weight, before["beside.weight"])
    assert moved == (loss in ("penalty", "auxiliary"))


def test_a_block_that_is_recomputed_may_run_where_nothing_is_recorded():
    """Between two updates of the curvature, where no curvature is read, and where it is frozen."""
    for way in ("reentrant", "recomputed"):
        for options in ({"update_every": 2}, {"center": "none", "scale": "none"}, {}):
            model, x, y = bypassed("called", 2)
            model.inner.requires_grad_(options != {})
            optimizer = UnitNaturalGradient(model, 0.1, **options)
            if options:
                take_step(model, optimizer, x, y)
                model.way = way
            take_step(model, optimizer, x, y)


@pytest.mark.parametrize("labels", ["sampled", "empirical"])
def test_nets_with_batchnorm_and_dropout_train(labels, randn):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 4, 3, bias=False),
            nn.BatchNorm2d(4),
            nn.ReLU(inplace=True),
            nn.Dropout(0.1),
            nn.Flatten(),
            nn.Linear(64, 3),
        )
        x = randn(60, 1, 6, 6).float() + 1
        y = (x[:, 0, 0, 0] > 1).long() + (x[:, 0, 3, 3] > 1).long()
        optimizer = UnitNaturalGradient(model, 0.05, damping=0.1, momentum=0.5, labels=labels)
        losses = []
        for _ in range(15):
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_half_precision_is_widened(randn):
    model, x, y = BY_NAME["conv-strided"].build()
    model, x = model.float(), x.float()
    optimizer = UnitNaturalGradient(model, 0.1)
    with torch.autocast("cpu", torch.bfloat16):
        loss = F.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    curvature = optimizer.state_dict()["biasshift"]["curvature"]["0"]
    assert curvature["parts"]["first"][0].dtype == torch.float32
    assert all(p.isfinite().all() for p in model.parameters())


def test_remove_leaves_no_hook_and_a_forgotten_optimizer_is_no_burden():
    model, x, y = BY_NAME["mlp-elu"].build()
    optimizer = UnitNaturalGradient(model, 0.1)
    take_step(model, optimizer, x, y)
    optimizer.remove()
    optimizer.remove()
    pristine(model)
    take_step(model, optimizer, x, y)  # with the last curvature
    generator = torch.Generator().manual_seed(0)
    state = generator.get_state()
    optimizer = UnitNaturalGradient(model, 0.1, generator=generator)
    del optimizer
    model(x)
    assert torch.equal(state, generator.get_state())


# -- layers too large for matrices -----------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlp-elu", "mlp-no-bias", "mlp-gaussian"])
@pytest.mark.parametrize("labels", ["empirical", "sampled"])
def test_the_latest_examples_take_the_place_of_large_matrices(name, labels):
    """With nothing carried over from earlier steps the two ways are one definition."""
    case = BY_NAME[name]
    ends = []
    for most in (1024, 4):
        model, x, y = case.build()
        optimizer = UnitNaturalGradient(
            model,
            0.1,
            damping=DAMPING,
            labels=labels,
            likelihood=case.likelihood,
            decay=0.0,
            max_dense_inputs=most,
        )
        for _ in range(3):
            take_step(model, optimizer, x, y, case.likelihood)
        ends.append(flat(model))
    torch.testing.assert_close(*ends, rtol=1e-6, atol=1e-8)
    parts = [c["parts"] for c in optimizer.state_dict()["biasshift"]["curvature"].values()]
    assert any("samples" in part and "second" not in part for part in parts)


def test_examples_of_accumulated_batches_add_up():
    ends = []
    for parts in (1, 2):
        model, x, y = BY_NAME["mlp-elu"].build()
        optimizer = UnitNaturalGradient(
            model, 0.1, damping=DAMPING, labels="empirical", decay=0.9, max_dense_inputs=4
        )
        for a, b in zip(x.chunk(parts), y.chunk(parts), strict=True):
            (negative_log_likelihood(model(a), b) * len(a) / len(x)).backward()
        optimizer.step()
        ends.append(flat(model))
    torch.testing.assert_close(*ends, rtol=1e-7, atol=1e-9)


def test_large_layers_go_on_from_a_state(tmp_path):
    ends = []
    for through_file in (False, True):
        model, x, y = BY_NAME["mlp-elu"].build()
        options = {"damping": DAMPING, "update_every": 3, "max_dense_inputs": 4}
        optimizer = UnitNaturalGradient(model, 0.1, **options)
        train(model, optimizer, x, y, 2)
        if through_file:
            torch.save(optimizer.state_dict(), tmp_path / "state")
            optimizer.remove()
            optimizer = UnitNaturalGradient(model, 0.1, **options)
            optimizer.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
        train(model, optimizer, x, y, 3)
        ends.append(flat(model))
    assert torch.equal(*ends)


def test_large_layers_with_dead_units_and_positions():
    model, x, y = BY_NAME["mlp-relu"].build()
    with torch.no_grad():
        model[0].bias[1] = -1e3
    before = parameters(model)
    train(model, UnitNaturalGradient(model, 0.01, damping=DAMPING, max_dense_inputs=4), x, y, 3)
    assert all(p.isfinite().all() for p in model.parameters())
    assert torch.equal(model[0].weight[1], before["0.weight"][1])
    case = BY_NAME["tokens-pooled"]
    model, x, y = case.build()
    options = {"likelihood": case.likelihood, "max_dense_inputs": 2, "damping": DAMPING}
    optimizer = UnitNaturalGradient(model, 0.1, **options, uncovered="raise")
    with pytest.raises(ValueError, match=r"Layer '0' .* positions an example.*expand"):
        take_step(model, optimizer, x, y, case.likelihood)
    optimizer = UnitNaturalGradient(model, 1.0, **options, labels="empirical")
    before, expected = parameters(model), definitions(model, x, y, ("q", "full"))
    with pytest.warns(bs.UncoveredWarning, match="Layer '0' has 3 inputs a unit and 4 positions"):
        take_step(model, optimizer, x, y, case.likelihood)
    found = updates(model, before)
    torch.testing.assert_close(found["0"], (model[0].weight.grad, model[0].bias.grad))
    assert_same({"3": found["3"]}, {"3": expected["3"]}, rtol=1e-6)


# -- singular cases --------------------------------------------------------------------------------


@pytest.mark.parametrize(("center", "scale"), RULES)
def test_dead_units_stay_where_they_are(center, scale):
    model, x, y = BY_NAME["mlp-relu"].build()
    with torch.no_grad():
        model[0].bias[1] = -1e3
    before = parameters(model)
    train(model, UnitNaturalGradient(model, 0.01, center, scale), x, y, 3)
    assert all(p.isfinite().all() for p in model.parameters())
    assert torch.equal(model[0].weight[1], before["0.weight"][1])
    assert torch.equal(model[0].bias[1], before["0.bias"][1])


@pytest.mark.parametrize("scale", ["full", "diagonal"])
@pytest.mark.parametrize("center", ["q", "p"])
def test_without_variance_the_center_remains(center, scale):
    """All examples are the same one: nothing to whiten with."""
    model, x, y = BY_NAME["mlp-elu"].build()
    x = x[:1].expand(10, -1)
    steps = []
    for kept in (scale, "none"):
        twin = copy.deepcopy(model)
        take_step(twin, UnitNaturalGradient(twin, 0.1, center, kept, labels="empirical"), x, y[:10])
        steps.append(flat(twin))
    torch.testing.assert_close(*steps, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("scale", ["full", "diagonal"])
@pytest.mark.parametrize("center", ["q", "p", "none"])
def test_an_input_that_never_varies_needs_damping(center, scale):
    model, x, y = BY_NAME["mlp-elu"].build()
    x = x.clone()
    x[:, 2] = 0.0
    before = parameters(model)
    optimizer = UnitNaturalGradient(model, 0.1, center, scale, damping=0.0)
    with pytest.raises(ValueError, match=r"Layer '0'.*never vary.*damping > 0"):
        take_step(model, optimizer, x, y)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    optimizer.param_groups[0]["damping"] = 1e-3
    take_step(model, optimizer, x, y)
    assert all(p.isfinite().all() for p in model.parameters())


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"center": "r"}, "'center' must be one of 'q', 'p', 'none'"),
        ({"scale": "block"}, "'scale' must be one of"),
        ({"labels": "expected"}, "'labels' must be one of 'sampled', 'empirical'"),
        ({"likelihood": "poisson"}, "'likelihood' must be one of"),
        ({"reduction": "none"}, "'reduction' must be one of"),
        ({"weight_sharing": "reduce"}, "'weight_sharing' must be one of"),
        ({"lr": -0.1}, "'lr' must be"),
        ({"lr": float("nan")}, "'lr' must be"),
        ({"momentum": 1.0}, "'momentum' must lie"),
        ({"decay": 1.0}, "'decay' must lie"),
        ({"damping": -1e-3}, "'damping' must be"),
        ({"weight_decay": -1.0}, "'weight_decay' must be"),
        ({"update_every": 0}, "'update_every' must be a whole number"),
        (
            {"max_dense_inputs": 4, "center": "p"},
            "Layer '0' has 5 inputs.*diagonal.*max_dense_inputs",
        ),
        (
            {"max_dense_inputs": 4, "center": "none"},
            "Layer '0' has 5 inputs.*diagonal.*max_dense_inputs",
        ),
    ],
)
def test_arguments_that_do_not_fit_are_refused_in_one_sentence(options, words):
    model, _, _ = BY_NAME["mlp-elu"].build()
    with pytest.raises(ValueError, match=words):
        UnitNaturalGradient(model, **{"lr": 0.1, **options})
    pristine(model)


def test_a_generator_that_is_none_is_refused():
    model, _, _ = BY_NAME["mlp-elu"].build()
    # A TypeError where the types of all calls are checked.
    with pytest.raises((ValueError, TypeError), match="'generator'"):
        UnitNaturalGradient(model, 0.1, generator=7)
    pristine(model)


def test_models_that_do_not_fit_are_refused():
    model, _, _ = BY_NAME["mlp-elu"].build()
    with pytest.raises((ValueError, TypeError), match=r"nn\.Module|model"):
        UnitNaturalGradient(model.parameters(), 0.1)
    with pytest.raises(ValueError, match=r"'weight'.*Run the model once"):
        UnitNaturalGradient(nn.LazyLinear(3), 0.1)
    with pytest.raises(ValueError, match="one group"):
        UnitNaturalGradient(model, 0.1).add_param_group(
            {"params": [torch.zeros(1, requires_grad=True)]}
        )
    UnitNaturalGradient(model, 0.1, scale="diagonal", max_dense_inputs=4)


def loss_of(name):
    model, x, y = BY_NAME["mlp-elu"].build()
    optimizer = UnitNaturalGradient(model, 0.1, labels="empirical")
    outputs = model(x)
    {
        "sum": lambda: F.cross_entropy(outputs, y, reduction="sum"),
        "scaled": lambda: 1024 * F.cross_entropy(outputs, y),
        "squares": lambda: F.mse_loss(outputs, F.one_hot(y).double()),
    }[name]().backward()
    optimizer.step()


@pytest.mark.parametrize("name", ["sum", "scaled", "squares"])
def test_a_loss_that_is_provably_another_one_is_refused(name):
    with pytest.raises(ValueError, match="The loss is not a mean of categorical"):
        loss_of(name)


def test_layers_whose_examples_are_not_in_front_are_refused():
    class Folded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = nn.Linear(3, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.inner(x.flatten(0, 1)).unflatten(0, (len(x), -1)).mean(1))

    torch.manual_seed(0)
    model, x, y = Folded().double(), torch.randn(6, 2, 3).double(), torch.arange(6) % 3
    words = "Layer 'inner' sees 12 rows for 6 examples"
    with pytest.raises(ValueError, match=words):
        take_step(model, UnitNaturalGradient(model, 0.1, uncovered="raise"), x, y)
    before = parameters(model)
    plain = nn.Sequential(model.inner, Pool(), model.head)  # the same function
    expected = definitions(plain, x, y, ("q", "full"))["2"]
    optimizer = UnitNaturalGradient(model, 1.0, damping=DAMPING, labels="empirical")
    with pytest.warns(bs.UncoveredWarning, match=f"{words}.*plain gradient from now on") as caught:
        take_step(model, optimizer, x, y)
    found = updates(model, before)
    assert len(caught) == 1
    torch.testing.assert_close(found["inner"], (model.inner.weight.grad, model.inner.bias.grad))
    assert_same({"head": found["head"]}, {"head": expected})
    take_step(model, UnitNaturalGradient(model, 0.1, weight_sharing="expand"), x, y)


def test_maps_with_their_classes_on_axis_one_are_refused_or_given_it():
    class Last(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).movedim(1, -1)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 1)).double()
    x, y = torch.randn(5, 1, 4, 4).double(), torch.randint(3, (5, 4, 4))
    optimizer = UnitNaturalGradient(model, 0.1)
    with pytest.raises(ValueError, match=r"axis 1.*class_axis=1"):
        take_step(model, optimizer, x, None)
    optimizer.remove()
    ends = []
    for labels in ("sampled", "empirical"):
        for net, options in ((model, {"class_axis": 1}), (Last(*model), {})):
            net = copy.deepcopy(net)
            optimizer = UnitNaturalGradient(net, 0.1, damping=DAMPING, labels=labels, **options)
            outputs = net(x)
            optimizer.zero_grad()
            F.cross_entropy(outputs if options else outputs.movedim(-1, 1), y).backward()
            optimizer.step()
            ends.append(flat(net))
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(ends[2], ends[3], rtol=1e-12, atol=1e-14)
    assert not torch.allclose(ends[0], ends[2]) and not torch.allclose(ends[0], flat(model))


# -- several processes -----------------------------------------------------------------------------


def _part(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    model, x, y = BY_NAME["mlp-elu"].build()
    wrapped = nn.parallel.DistributedDataParallel(model)
    optimizer = UnitNaturalGradient(wrapped, 0.05, labels="empirical")
    with pytest.raises(RuntimeError, match=r"cannot be copied.*copied model.*state_dict"):
        copy.deepcopy(optimizer)
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(wrapped(x[20 * rank :][:20]), y[20 * rank :][:20]).backward()
        optimizer.step()
    torch.save(model.state_dict(), f"{folder}/{rank}")
    dist.destroy_process_group()


def test_processes_share_their_sums(tmp_path):
    torch.multiprocessing.spawn(_part, (str(tmp_path),), nprocs=2)
    model, x, y = BY_NAME["mlp-elu"].build()
    optimizer = UnitNaturalGradient(model, 0.05, labels="empirical")
    for _ in range(2):
        take_step(model, optimizer, x, y)
    for rank in range(2):
        for name, p in torch.load(tmp_path / str(rank), weights_only=True).items():
            torch.testing.assert_close(p, model.state_dict()[name], rtol=1e-10, atol=1e-12)
