"""The networks of the CIFAR experiments: what the paper prints, names, weights, dropout."""

import math
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from jaxtyping import config
from torch import nn
from torch.func import functional_call, stack_module_state, vmap

import biasshift as bs
from biasshift.activations import ACTIVATIONS
from biasshift.experiments.convnet_trial import LAST_INIT
from biasshift.nets import StackDropout, cifar11, cifar18, set_dropout, stacks

TINY = 0.02


@cache
def images(count=6, size=32):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(7))


@pytest.fixture
def as_users_call():
    """Types are checked under pytest alone: a wrong literal gets a user our own message."""
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)


def sizes(net, module_type, x):
    """The sizes of the maps that modules of one type put out, in order."""
    shapes = []
    handles = [
        module.register_forward_hook(lambda m, inputs, output: shapes.append(output.shape[2:]))
        for module in net.modules()
        if isinstance(module, module_type)
    ]
    with torch.no_grad():
        net(x)
    for handle in handles:
        handle.remove()
    assert all(height == width for height, width in shapes)
    return [height for height, _ in shapes]


def names(net):
    return [name for name, _ in net.named_children()]


# -- what the paper prints -------------------------------------------------------------------------


@pytest.mark.parametrize(("build", "count"), [(cifar11, 1_669_028), (cifar18, 39_330_404)])
def test_the_papers_parameter_counts(build, count):
    assert sum(p.numel() for p in build(geometry="caffe").parameters()) == count


def test_the_11_layers_layer_by_layer():
    layers = [m for m in cifar11().children() if isinstance(m, nn.Conv2d)]
    units = [192, 192, 240, 240, 260, 260, 280, 280, 300, 300, 100]
    assert [m.out_channels for m in layers] == units
    assert [m.in_channels for m in layers] == [3, *units[:-1]]
    assert [m.kernel_size[0] for m in layers] == [5, 1, 3, 1, 2, 1, 2, 1, 2, 1, 1]


@pytest.mark.parametrize(
    ("build", "geometry", "after"),
    [
        (cifar11, "same", [16, 8, 4, 2, 1, 1, 1]),
        (cifar11, "caffe", [16, 8, 5, 3, 2, 1, 1]),
        (cifar18, "same", [16, 8, 4, 2, 1, 1, 1, 1]),
        (cifar18, "caffe", [16, 10, 7, 5, 4, 3, 2, 1]),
    ],
)
def test_maps_after_each_stack(build, geometry, after):
    net = build(width=TINY, geometry=geometry).eval()
    assert sizes(net, nn.MaxPool2d, images(2)) == after
    assert net(images(2)).shape == (2, 100)


def test_same_keeps_the_size_of_every_map_and_caffe_grows_those_of_even_kernels():
    same, caffe = (
        sizes(cifar11(width=TINY, geometry=geometry).eval(), nn.Conv2d, images(1))
        for geometry in ("same", "caffe")
    )
    assert same == [32, 16, 16, 8, 8, 4, 4, 2, 2, 1, 1]
    assert caffe == [32, 16, 16, 8, 9, 5, 6, 3, 4, 2, 1]


def test_same_is_torchs_same():
    """With the zeros of an even kernel at the end; the other side must fail."""
    net = stacks([[(1, 4, 2)], [(1, 3, 1)]], width=1.0)
    x, conv = images(2, 6), net.conv1_1
    expected = F.conv2d(F.pad(x, (0, 1, 0, 1)), conv.weight, conv.bias)
    assert torch.equal(conv(net.pad1_1(x)), expected)
    assert not torch.allclose(F.conv2d(F.pad(x, (1, 0, 1, 0)), conv.weight, conv.bias), expected)


def test_pooling_leaves_maps_of_one_pixel_alone():
    net = cifar11(width=TINY).eval()
    until = names(net).index("conv7_1")
    logits = net[: until + 1](images())
    assert logits.shape[2:] == (1, 1)
    assert torch.equal(logits.flatten(1), net(images()))


def test_no_activation_normalization_or_dropout_on_the_logits():
    net = cifar11(width=TINY, batch_norm=True, dropout="all")
    assert names(net)[-4:] == ["pool6", "conv7_1", "pool7", "flatten"]
    # The width leaves the classes alone.
    assert cifar11(classes=10, width=TINY).conv7_1.out_channels == 10


# -- names and weights -----------------------------------------------------------------------------


def test_names():
    net = cifar11(width=TINY, batch_norm=True, geometry="caffe")
    assert " ".join(names(net)[:16]) == (
        "conv1_1 bn1_1 act1_1 pool1 conv2_1 bn2_1 act2_1 drop2_1 conv2_2 bn2_2 act2_2 drop2_2 "
        "pool2 conv3_1 bn3_1 act3_1"
    )
    after = cifar11(width=TINY, batch_norm=True, norm_at="after", geometry="caffe")
    assert " ".join(names(after)[:8]) == "conv1_1 act1_1 bn1_1 pool1 conv2_1 act2_1 bn2_1 drop2_1"
    without = [name for name in names(net) if not name.startswith(("drop", "bn"))]
    assert without == names(cifar11(width=TINY, geometry="caffe", dropout="none"))


def test_equal_seeds_give_equal_weights_whatever_surrounds_them():
    reference = cifar11("relu", 3, width=TINY, dropout="none").state_dict()
    variants = [cifar11(name, 3, width=TINY) for name in ACTIVATIONS]
    variants += [
        cifar11("elu", 3, width=TINY, geometry="caffe", batch_norm=True, norm_at=at)
        for at in ("before", "after")
    ]
    for net in variants:
        state = net.state_dict()
        assert all(torch.equal(state[name], reference[name]) for name in reference)
        assert all(name.startswith(("bn", "act")) for name in state.keys() - reference.keys())
    other = cifar11("relu", 4, width=TINY).state_dict()
    assert not torch.equal(other["conv1_1.weight"], reference["conv1_1.weight"])


FIRST_LOSS = math.log(100)


@pytest.mark.parametrize("network", [cifar11, cifar18])
@pytest.mark.parametrize("activation", ["elu", "relu", "lrelu", "srelu"])
def test_the_first_loss_is_that_of_equal_probabilities(network, activation):
    """As in the paper's figures; without `last_init` it is 26 to 40 at full width."""
    net = network(activation, 0, width=0.25, last_init=LAST_INIT)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20, 3, 32, 32, generator=generator)
    y = torch.randint(100, (20,), generator=generator)
    with torch.random.fork_rng([]), torch.no_grad():
        for mode in (net.train(), net.eval()):
            assert F.cross_entropy(mode(x), y).item() == pytest.approx(FIRST_LOSS, rel=0.05)


def test_the_first_loss_at_full_width_and_without_a_small_last_layer():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(10, 3, 32, 32, generator=generator)
    y = torch.randint(100, (10,), generator=generator)
    with torch.random.fork_rng([]), torch.no_grad():
        small, he = (
            F.cross_entropy(cifar11("srelu", 0, last_init=sd)(x), y).item()
            for sd in (LAST_INIT, None)
        )
    assert small == pytest.approx(FIRST_LOSS, rel=0.05)
    assert he > 2 * FIRST_LOSS


@pytest.mark.parametrize(
    ("init", "variance"),
    [
        ("lecun", lambda fan_in, fan_out: 1 / fan_in),
        ("glorot", lambda fan_in, fan_out: 2 / (fan_in + fan_out)),
    ],
)
def test_weights_have_the_variance_that_their_initialization_says(init, variance):
    net = cifar11(init=init, last_init=0.02)
    for name in ("conv1_1", "conv2_2", "conv4_1", "conv5_2"):
        weight = net.get_submodule(name).weight.detach()
        units, channels, field, _ = weight.shape
        expected = variance(channels * field**2, units * field**2) ** 0.5
        assert weight.std().item() == pytest.approx(expected, rel=0.03)
    assert net.conv7_1.weight.std().item() == pytest.approx(0.02, rel=0.03)


def test_a_standard_deviation_must_be_a_finite_number():
    for sd in (-1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="standard deviation of weights must be"):
            cifar11(width=TINY, last_init=sd)


@pytest.mark.parametrize("init", ["normal", "uniform"])
def test_weights_follow_he_and_the_global_random_state_is_untouched(init):
    before = torch.get_rng_state()
    net = cifar11(init=init, batch_norm=True, dropout="all")
    assert torch.equal(torch.get_rng_state(), before)
    for name in ("conv1_1", "conv2_2", "conv4_1", "conv5_2"):
        layer = net.get_submodule(name)
        fan_in, weight = layer.weight[0].numel(), layer.weight.detach()
        assert weight.std().item() == pytest.approx((2 / fan_in) ** 0.5, rel=0.03)
        assert (weight.abs().max().item() <= (6 / fan_in) ** 0.5) == (init == "uniform")
        assert not layer.bias.any()


# -- dropout and its phases ------------------------------------------------------------------------


def rates(net):
    return {
        name.removeprefix("drop"): round(m.p, 3)
        for name, m in net.named_children()
        if isinstance(m, StackDropout) and m.p > 0
    }


def test_dropout_behind_the_last_layer_of_each_stack():
    expected = [0.1, 0.2, 0.3, 0.4, 0.5]
    layers = ("2_2", "3_2", "4_2", "5_2", "6_1")
    assert rates(cifar11(width=TINY)) == dict(zip(layers, expected, strict=True))
    layers = ("2_4", "3_4", "4_3", "5_3", "6_2")
    assert rates(cifar18(width=TINY)) == dict(zip(layers, expected, strict=True))
    assert rates(cifar18(width=TINY, rates=(0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.5)))["7_1"] == 0.5
    assert rates(cifar11(width=TINY, dropout="none")) == {}


def test_the_phases_of_the_18_layer_net_share_their_weights():
    net = cifar18(width=TINY)
    kept, x = {name: value.clone() for name, value in net.state_dict().items()}, images(2)
    outputs = net.eval()(x)
    set_dropout(net, "all")
    assert rates(net) == rates(cifar18(width=TINY, dropout="all"))
    assert sorted(rates(net).items())[:4] == [(f"2_{place}", 0.1) for place in (1, 2, 3, 4)]
    set_dropout(net, "all", 1.5)
    set_dropout(net, "all", 1.5)  # factors do not accumulate
    assert set(rates(net).values()) == {0.15, 0.3, 0.45, 0.6, 0.75}
    assert torch.equal(net(x), outputs)
    plain = cifar18(width=TINY, seed=9, dropout="none")
    plain.load_state_dict(net.state_dict())
    assert torch.equal(plain.eval()(x), outputs)
    net.load_state_dict(kept)
    set_dropout(net)
    assert rates(net) == rates(cifar18(width=TINY))


def test_set_dropout_refuses_and_then_changes_nothing(as_users_call):
    net = cifar18(width=TINY)
    before = rates(net)
    with pytest.raises(ValueError, match=r"from 0 to below 1, got 2\.0, which makes 0\.5 1\.0"):
        set_dropout(net, "all", 2.0)
    with pytest.raises(ValueError, match=r"'factor' must .*, got nan"):
        set_dropout(net, "all", float("nan"))
    with pytest.raises(ValueError, match="'where' must be one of last, all, got 'first'"):
        set_dropout(net, "first")
    assert rates(net) == before
    with pytest.raises(ValueError, match="'model' must have dropout to set"):
        set_dropout(cifar18(width=TINY, dropout="none"))


def test_a_rate_of_zero_costs_nothing_and_others_drop():
    net = cifar11(width=TINY).train()
    x = torch.ones(50, 40)
    before = torch.get_rng_state()
    assert net.drop2_1.p == 0 and net.drop2_1(x).data_ptr() == x.data_ptr()
    assert torch.equal(torch.get_rng_state(), before)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        assert (net.drop6_1(x) == 0).float().mean().item() == pytest.approx(0.5, abs=0.05)


# -- measuring and training ------------------------------------------------------------------------


def warmed(net):
    """Batch norm with running statistics of its own, then eval mode; in float64."""
    net = net.double().train()
    with torch.no_grad():
        net(images(16).double())
    return net.eval()


@pytest.mark.parametrize("geometry", ["same", "caffe"])
@pytest.mark.parametrize("batch_norm", [False, True])
def test_every_layer_can_be_measured(geometry, batch_norm):
    net = cifar11(width=TINY, classes=4, geometry=geometry, batch_norm=batch_norm, dropout="none")
    net, x = warmed(net), images().double()
    table = bs.check(net, x[:3]).set_index("module")
    layers = table[table.units > 0]
    assert len(layers) == 11 and layers.covered.all() and layers.error.max() < 1e-9
    fishers = bs.unit_fisher(net, x)
    assert list(fishers) == list(layers.index)
    before = net[: names(net).index("conv3_2")](x)
    padding = 1 if geometry == "caffe" else 0
    mean = F.unfold(before, 2, padding=padding).mean((0, 2))
    torch.testing.assert_close(fishers["conv3_2"].mean_p, mean, rtol=1e-10, atol=1e-12)
    assert set(bs.activation_moments(net, x, layers=lambda name, _: name.startswith("act"))) == {
        name for name in names(net) if name.startswith("act")
    }


def test_dropout_in_training_mode_is_refused_with_its_name():
    with pytest.raises(ValueError, match="Layer 'drop2_2'"):
        bs.unit_fisher(cifar11(width=TINY), images(2))


@pytest.mark.parametrize(("norm_at", "step"), [("before", 1), ("after", -1)])
def test_where_batch_norm_sits(norm_at, step):
    net = cifar11("relu", width=TINY, batch_norm=True, norm_at=norm_at, dropout="none").train()
    place = names(net).index("bn2_1")
    assert names(net)[place + step] == "act2_1"
    assert net[: place + 1](images()).mean((0, 2, 3)).abs().max() < 1e-5


@pytest.mark.parametrize("geometry", ["same", "caffe"])
def test_two_stacked_members_run_as_one(geometry):
    members = [cifar11(seed=seed, width=TINY, geometry=geometry, dropout="none") for seed in (1, 2)]
    parameters, buffers = stack_module_state(members)
    x = torch.stack([images(3), images(6)[3:]])
    together = vmap(lambda p, b, x: functional_call(members[0], (p, b), (x,)))(
        parameters, buffers, x
    )
    for member, inputs, outputs in zip(members, x, together, strict=True):
        torch.testing.assert_close(outputs, member(inputs), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(members[0](x[1]), together[1], rtol=1e-2)


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"activation": "tahn"}, "'activation' must be one of .*, got 'tahn'"),
        ({"geometry": "valid"}, "'geometry' must be one of same, caffe, got 'valid'"),
        ({"dropout": "first"}, "'dropout' must be one of none, last, all, got 'first'"),
        ({"norm_at": "behind"}, "'norm_at' must be one of before, after, got 'behind'"),
        ({"init": "zeros"}, "'init' must be one of normal, uniform, lecun, glorot, got 'zeros'"),
        ({"width": 0.0}, r"'width' must be positive, got 0\.0"),
        ({"classes": 0}, "units and receptive fields must be positive"),
        ({"rates": (0.1,) * 8}, "at most one dropout rate per stack, got 8 for 7 stacks"),
        ({"rates": (0.1,) * 7}, r"must be 0 for the last stack.*Got 0\.1"),
        ({"rates": (1.0,)}, "'rates' must lie from 0 to below 1"),
    ],
)
def test_cifar_refuses(as_users_call, wrong, message):
    with pytest.raises(ValueError, match=message):
        cifar11(**{"width": TINY, **wrong})


def test_empty_stacks_are_refused():
    for empty in ([], [[]], [[(1, 8, 3)], []]):
        with pytest.raises(ValueError, match="at least one"):
            stacks(empty)


def test_images_too_large_for_the_stacks_are_refused():
    """Flattened, their pixels would pass for classes."""
    net = cifar11(width=TINY, geometry="caffe").eval()
    assert net(images(1, 28)).shape == (1, 100)
    with pytest.raises(ValueError, match="down to one pixel, got 2 × 2"):
        net(images(1, 160))
