import math

import pytest
import torch
from scipy import stats
from torch import nn

from biasshift.activations import ACTIVATIONS
from biasshift.nets import mlp


def test_the_network_of_figure_2():
    net = mlp(784)
    shapes = [(layer.in_features, layer.out_features) for layer in net if isinstance(layer, nn.Linear)]
    assert shapes == [(784, 128)] + [(128, 128)] * 7 + [(128, 10)]
    assert [isinstance(layer, nn.ELU) for layer in net] == [False, True] * 8 + [False]
    assert sum(p.numel() for p in net.parameters()) == 784 * 128 + 128 + 7 * (128 * 128 + 128) + 128 * 10 + 10
    assert all(p.dtype == torch.float32 and p.requires_grad for p in net.parameters())


def test_no_hidden_layer_is_a_linear_classifier():
    assert [tuple(p.shape) for p in mlp(5, depth=0, classes=3).parameters()] == [(3, 5), (3,)]


def test_equal_seeds_give_equal_weights_whatever_the_activation():
    states = [mlp(20, hidden=8, depth=3, activation=name, seed=4).state_dict() for name in ACTIVATIONS]
    for state in states[1:]:
        assert state.keys() == states[0].keys()
        assert all(torch.equal(state[name], states[0][name]) for name in state)
    other = mlp(20, hidden=8, depth=3, seed=5).state_dict()
    assert not torch.equal(other["0.weight"], states[0]["0.weight"])


@pytest.mark.parametrize("init", ["normal", "uniform"])
def test_the_global_random_state_is_untouched(init):
    before = torch.get_rng_state()
    mlp(20, hidden=8, init=init)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("init", "distribution"),
    [
        ("normal", lambda fan_in: stats.norm(0, math.sqrt(2 / fan_in))),
        ("uniform", lambda fan_in: stats.uniform(-math.sqrt(6 / fan_in), 2 * math.sqrt(6 / fan_in))),
    ],
)
def test_weights_follow_he(init, distribution):
    net = mlp(300, hidden=120, depth=2, init=init)
    for layer in (net[0], net[2], net[4]):
        weights = layer.weight.detach().flatten().double().numpy()
        assert stats.kstest(weights, distribution(layer.in_features).cdf).pvalue > 1e-3
        assert not layer.bias.any()
    weights = net[0].weight.detach().flatten().double().numpy()
    assert stats.kstest(weights * 1.05, distribution(300).cdf).pvalue < 1e-3  # the test can tell 5 %


def test_relu_networks_keep_the_size_of_their_signal(generator):
    """He's point: with variance 2/fan_in the mean square of the net inputs neither grows nor dies over 8 ReLU layers."""
    x = torch.randn(200, 400, generator=generator)
    ratios = []
    for seed in range(1, 6):  # not 0: weights and inputs from one seed are the same numbers, hence correlated
        net = mlp(400, hidden=400, depth=8, classes=400, activation="relu", seed=seed)
        ratios.append(net(x).square().mean().item() / (2 * x.square().mean().item()))
    assert 0.6 < sum(ratios) / 5 < 1.6, ratios


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"activation": "gelu"}, "unknown activation 'gelu'; known are elu, relu, lrelu, srelu"),
        ({"hidden": 0}, "hidden 0"),
        ({"depth": -1}, "depth -1"),
    ],
)
def test_mlp_refuses(wrong, message):
    with pytest.raises(ValueError, match=message):
        mlp(4, **wrong)
