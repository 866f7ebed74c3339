"""The classifier of Figure 2, shifted activations, and the autoencoder of Figure 3."""

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from jaxtyping import config
from scipy import stats
from torch import nn

import biasshift as bs
from biasshift.activations import ACTIVATIONS
from biasshift.nets import Shifted, autoencoder, mlp


@pytest.fixture
def as_users_call():
    """Types are checked under pytest alone: a wrong literal gets a user our own message."""
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)


def test_the_network_of_figure_2():
    net = mlp(784)
    layers = [layer for layer in net if isinstance(layer, nn.Linear)]
    shapes = [(layer.in_features, layer.out_features) for layer in layers]
    assert shapes == [(784, 128)] + [(128, 128)] * 7 + [(128, 10)]
    assert [isinstance(layer, nn.ELU) for layer in net] == [False, True] * 8 + [False]
    count = 784 * 128 + 128 + 7 * (128 * 128 + 128) + 128 * 10 + 10
    assert sum(p.numel() for p in net.parameters()) == count
    assert all(p.dtype == torch.float32 and p.requires_grad for p in net.parameters())


def test_no_hidden_layer_is_a_linear_classifier():
    assert [tuple(p.shape) for p in mlp(5, depth=0, classes=3).parameters()] == [(3, 5), (3,)]


def test_equal_seeds_give_equal_weights_whatever_the_activation():
    states = [
        mlp(20, hidden=8, depth=3, activation=name, seed=4).state_dict() for name in ACTIVATIONS
    ]
    for state in states[1:]:
        assert all(torch.equal(state[name], states[0][name]) for name in states[0])
    other = mlp(20, hidden=8, depth=3, seed=5).state_dict()
    assert not torch.equal(other["0.weight"], states[0]["0.weight"])


@pytest.mark.parametrize("init", ["normal", "uniform"])
def test_the_global_random_state_is_untouched(init):
    before = torch.get_rng_state()
    mlp(20, hidden=8, init=init)
    assert torch.equal(torch.get_rng_state(), before)


def normal(fan_in):
    return stats.norm(0, math.sqrt(2 / fan_in))


def uniform(fan_in):
    bound = math.sqrt(6 / fan_in)
    return stats.uniform(-bound, 2 * bound)


def pvalue(weights, distribution):
    return stats.kstest(weights.detach().flatten().double().numpy(), distribution.cdf).pvalue


@pytest.mark.parametrize("distribution", [normal, uniform])
def test_weights_follow_he(distribution):
    net = mlp(300, hidden=120, depth=2, init=distribution.__name__)
    for layer in (net[0], net[2], net[4]):
        assert pvalue(layer.weight, distribution(layer.in_features)) > 1e-3
        assert not layer.bias.any()
    # The test notices 5 %.
    assert pvalue(net[0].weight.double() * 1.05, distribution(300)) < 1e-3


def test_relu_networks_keep_the_size_of_their_signal(generator):
    """With variance 2/fan_in their mean square neither grows nor vanishes over 8 ReLU layers."""
    x = torch.randn(200, 400, generator=generator)
    ratios = []
    # Not seed 0: weights and inputs from one seed are the same numbers, hence correlated.
    for seed in range(1, 6):
        net = mlp(400, hidden=400, depth=8, classes=400, activation="relu", seed=seed)
        ratios.append(net(x).square().mean().item() / (2 * x.square().mean().item()))
    assert 0.6 < sum(ratios) / 5 < 1.6, ratios


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            {"activation": "tahn"},
            "'activation' must be one of elu, relu, lrelu, srelu, .*, got 'tahn'",
        ),
        ({"hidden": 0}, "hidden 0"),
        ({"depth": -1}, "depth -1"),
    ],
)
def test_mlp_refuses(wrong, message):
    with pytest.raises(ValueError, match=message):
        mlp(4, **wrong)


# -- a constant added to every activation ----------------------------------------------------------


def test_without_a_constant_nothing_changes():
    assert repr(mlp(6, hidden=5, depth=2, constant=0.0)) == repr(mlp(6, hidden=5, depth=2))


@pytest.mark.parametrize("activation", [name for name in ACTIVATIONS if name != "prelu"])
def test_the_next_bias_can_absorb_the_constant(activation, randn):
    """The same function and gradients by the weights below, with other mean activations."""
    x = randn(30, 6)
    plain = mlp(6, hidden=5, depth=3, activation=activation, seed=2).double()
    moved = mlp(6, hidden=5, depth=3, activation=activation, seed=2, constant=0.7).double()
    assert list(dict(moved.named_children())) == list(dict(plain.named_children()))
    moved.load_state_dict(plain.state_dict())
    assert not torch.allclose(moved(x), plain(x))
    with torch.no_grad():
        for name in ("2", "4", "6"):
            layer = moved.get_submodule(name)
            layer.bias -= 0.7 * layer.weight.sum(1)
    torch.testing.assert_close(moved(x), plain(x))
    means, shifted = bs.activation_moments(plain, x), bs.activation_moments(moved, x)
    assert shifted.keys() == means.keys() == {"1", "3", "5"}
    for name in means:
        torch.testing.assert_close(shifted[name].mean, means[name].mean + 0.7)
        torch.testing.assert_close(shifted[name].var, means[name].var)
    before, after = (bs.unit_fisher(net, x)["2"] for net in (plain, moved))
    # A dead unit has no mean under q.
    torch.testing.assert_close(after.mean_q, before.mean_q + 0.7, equal_nan=True)
    torch.testing.assert_close(after.var_q, before.var_q, equal_nan=True)
    live = ~before.dead & ~before.singular
    assert live.any() and not torch.isclose(after.coupling[live], before.coupling[live]).any()


def test_shifted_refuses():
    with pytest.raises(ValueError, match=r"must not have parameters, .* got PReLU"):
        Shifted(nn.PReLU(), 1.0)
    with pytest.raises(ValueError, match="must be finite, got nan"):
        mlp(4, constant=math.nan)


def test_a_shifted_network_can_be_copied_and_pickled(randn):
    net, x = mlp(6, hidden=5, depth=2, constant=0.5).double(), randn(3, 6)
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(twin(x), net(x))


# -- the autoencoder -------------------------------------------------------------------------------


def test_the_autoencoder_of_figure_3():
    net = autoencoder("relu")
    layers = [m for m in net if isinstance(m, nn.Linear)]
    assert [m.in_features for m in layers] == [784, 1000, 500, 250, 30, 250, 500, 1000]
    assert layers[-1].out_features == 784
    names = " ".join(name for name, _ in net.named_children())
    assert names == "fc1 act1 fc2 act2 fc3 act3 fc4 fc5 act5 fc6 act6 fc7 act7 fc8"
    x = torch.rand(4, 784, generator=torch.Generator().manual_seed(1))
    assert net(x).shape == x.shape and net(x).min() < 0  # logits, not pixels


def test_code_and_output_unit_are_options_on_the_same_weights(randn):
    x = randn(5, 20).sigmoid()
    nets = [
        autoencoder("elu", 3, inputs=20, width=0.02, code=code, output=output).double()
        for code in ("linear", "activation")
        for output in ("logits", "logistic")
    ]
    states = [net.state_dict() for net in nets]
    assert all(torch.equal(state[name], states[0][name]) for state in states for name in states[0])
    torch.testing.assert_close(nets[1](x), nets[0](x).sigmoid())
    assert "act4" not in dict(nets[0].named_children()) and isinstance(nets[2].act4, nn.ELU)
    assert torch.equal(nets[2][:8](x), F.elu(nets[0][:7](x)))  # the code


def test_autoencoders_differ_in_the_activation_alone():
    before = torch.get_rng_state()
    states = [autoencoder(name, 4, "uniform", width=0.1).state_dict() for name in ACTIVATIONS]
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(state[name], states[0][name]) for state in states for name in states[0])
    assert pvalue(autoencoder().fc1.weight.flatten()[:50_000], normal(784)) > 1e-3


def test_an_autoencoder_can_be_measured(randn):
    net, x = autoencoder(inputs=12, width=0.02).double(), randn(6, 12).sigmoid()
    table = bs.check(net, x, likelihood="bernoulli").set_index("module")
    layers = table[table.units > 0]
    assert len(layers) == 8 and layers.error.max() < 1e-9
    assert bs.unit_fisher(net, x, likelihood="bernoulli")["fc5"].mean_q.shape == (5, 1)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"activation": "tahn"}, "'activation' must be one of .*, got 'tahn'"),
        ({"inputs": 0}, "'inputs' must be at least 1, got 0"),
        ({"width": -1.0}, r"'width' must be positive, got -1\.0"),
        ({"code": "logistic"}, "'code' must be one of linear, activation, got 'logistic'"),
        ({"output": "linear"}, "'output' must be one of logits, logistic, got 'linear'"),
    ],
)
def test_the_autoencoder_refuses(as_users_call, wrong, message):
    with pytest.raises(ValueError, match=message):
        autoencoder(**wrong)
