"""The network of the ImageNet experiment, and spatial pyramid pooling against loops."""

import math
from functools import cache
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import biasshift as bs
from biasshift.activations import ACTIVATIONS
from biasshift.experiments.convnet_trial import LAST_INIT
from biasshift.nets import SpatialPyramidPooling, StackDropout, imagenet15, set_dropout
from biasshift.nets.convnets import IMAGENET15
from biasshift.nets.convolution_stacks import Style, convolutions

TINY = 0.01


@cache
def images(size, count=4):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(7))


def names(net):
    return [name for name, _ in net.named_children()]


# -- spatial pyramid pooling -----------------------------------------------------------------------


def pyramid_by_hand(x, bins, end=lambda i, n, size: -(-(i + 1) * size // n)):
    """Loops over levels, channels and bins; ``end`` is where a bin ends."""
    height, width = x.shape[-2:]
    vectors = []
    for image in x:
        vector = []
        for n in bins:
            for channel in image:
                for i, j in product(range(n), repeat=2):
                    rows = channel[i * height // n : end(i, n, height)]
                    part = rows[:, j * width // n : end(j, n, width)]
                    vector.append(max(part.flatten().tolist()))
        vectors.append(vector)
    return torch.tensor(vectors, dtype=x.dtype)


@pytest.mark.parametrize(("height", "width"), [(4, 4), (7, 7), (5, 9), (13, 4)])
@pytest.mark.parametrize("bins", [(1, 2, 4), (3,), (4, 1)])
def test_the_pyramid_against_loops(randn, height, width, bins):
    x, pyramid = randn(2, 3, height, width), SpatialPyramidPooling(bins)
    assert torch.equal(pyramid(x), pyramid_by_hand(x, bins))
    assert pyramid(x).shape == (2, pyramid.outputs(3))


def test_the_pyramid_sees_every_pixel(randn):
    """Bins that ended at ⌊(i+1)·h/n⌋ would differ, and ones of ⌊h/n⌋ rows leave pixels out."""
    x = randn(8, 2, 7, 7)
    short = pyramid_by_hand(x, (1, 2, 4), end=lambda i, n, size: (i + 1) * size // n)
    assert not torch.equal(SpatialPyramidPooling()(x), short)
    pyramid = SpatialPyramidPooling((2, 4))
    for i in range(7):
        spike = torch.zeros(1, 1, 7, 7)
        spike[..., i, 6 - i] = 1
        assert all(level.sum() >= 1 for level in pyramid(spike).split([4, 16], 1))


def test_the_pyramid_refuses():
    with pytest.raises(ValueError, match="Maps of 3 × 9 pixels cannot be cut into 4 × 4 bins"):
        SpatialPyramidPooling()(torch.zeros(1, 2, 3, 9))
    for bins in ((), (0, 1)):
        with pytest.raises(ValueError, match="at least 1 × 1 bins"):
            SpatialPyramidPooling(bins)


# -- the network -----------------------------------------------------------------------------------


def test_the_convolutions_have_55_9_million_parameters():
    modules = dict(convolutions(IMAGENET15, Style(), torch.Generator()))
    assert sum(p.numel() for m in modules.values() for p in m.parameters()) == 55_904_736
    layers = [m for m in modules.values() if isinstance(m, nn.Conv2d)]
    assert [m.out_channels for m in layers] == [96] + [512] * 3 + [768] * 5 + [1024] * 3
    assert [m.kernel_size[0] for m in layers] == [6] + [3] * 11


def test_15_layers_with_their_names():
    net = imagenet15(width=1 / 32)
    layers = [name for name in names(net) if name.startswith(("conv", "fc", "pyr", "pool"))]
    assert " ".join(layers) == (
        "conv1_1 pool1 conv2_1 conv2_2 conv2_3 pool2 conv3_1 conv3_2 conv3_3 conv3_4 conv3_5 pool3 "
        "conv4_1 conv4_2 conv4_3 pool4 pyramid fc5_1 fc5_2 fc6_1"
    )
    assert names(net)[-7:] == ["fc5_1", "act5_1", "drop5_1", "fc5_2", "act5_2", "drop5_2", "fc6_1"]
    assert net.fc5_1.in_features == (1 + 4 + 16) * 1024 // 32
    assert net.fc5_1.out_features == net.fc6_1.in_features == 4096 // 32
    assert net.fc6_1.out_features == 1000
    assert [m.p for m in net if isinstance(m, StackDropout)] == [0.5, 0.5]


@pytest.mark.parametrize(
    ("stride", "maps"),
    [(1, [224, 112, 56, 28, 14]), (2, [112, 56, 28, 14, 7]), (4, [56, 28, 14, 7, 4])],
)
def test_map_sizes(stride, maps):
    net, widths = imagenet15(width=TINY, stride=stride).eval(), []
    for name in ("conv1_1", "pool1", "pool2", "pool3", "pool4"):
        net.get_submodule(name).register_forward_hook(
            lambda m, inputs, output: widths.append(output.shape[-1])
        )
    with torch.no_grad():
        assert net(images(224, 1)).shape == (1, 1000)
    assert widths == maps


def test_images_of_another_size_work_until_the_maps_are_too_small():
    net = imagenet15(width=TINY, classes=5).eval()
    assert net(images(130, 1)).shape == net(images(112, 1)).shape == (1, 5)
    with pytest.raises(ValueError, match="Maps of 3 × 3 pixels cannot be cut into 4 × 4 bins"):
        net(images(96, 1))
    assert imagenet15(width=TINY, classes=5, bins=(1, 2, 3)).eval()(images(96, 1)).shape == (1, 5)


def test_equal_seeds_give_equal_weights_whatever_surrounds_them():
    before = torch.get_rng_state()
    reference = imagenet15("relu", 3, width=TINY, dropout=0.0).state_dict()
    nets = [imagenet15(name, 3, width=TINY) for name in ACTIVATIONS]
    nets.append(imagenet15("elu", 3, width=TINY, batch_norm=True, stride=4))
    assert torch.equal(torch.get_rng_state(), before)
    for net in nets:
        state = net.state_dict()
        assert all(torch.equal(state[name], reference[name]) for name in reference)
    other = imagenet15("relu", 4, width=TINY).state_dict()
    assert not torch.equal(other["fc5_1.weight"], reference["fc5_1.weight"])


@pytest.mark.parametrize("init", ["normal", "uniform"])
def test_weights_follow_he(init):
    net = imagenet15(width=1 / 16, init=init)
    fans_in = {"conv2_2": 9 * 32, "conv4_3": 9 * 64, "fc5_1": 21 * 64, "fc6_1": 256}
    for name, fan_in in fans_in.items():
        layer = net.get_submodule(name)
        assert layer.weight.std().item() == pytest.approx(math.sqrt(2 / fan_in), rel=0.03)
        assert (layer.weight.abs().max().item() <= math.sqrt(6 / fan_in)) == (init == "uniform")
        assert not layer.bias.any()


def test_dropout_changes_in_place_and_state_dicts_load():
    net = imagenet15(width=TINY, classes=5)
    plain = imagenet15(width=TINY, classes=5, seed=8, dropout=0.0)
    set_dropout(net, factor=0.5)
    assert (net.drop5_1.p, net.drop5_2.p) == (0.25, 0.25)
    plain.load_state_dict(net.state_dict())
    assert torch.equal(plain.eval()(images(112)), net.eval()(images(112)))


@pytest.mark.parametrize("batch_norm", [False, True])
def test_every_layer_can_be_measured(batch_norm):
    net = imagenet15(width=TINY, classes=3, batch_norm=batch_norm).double()
    x = images(112).double()
    with torch.no_grad():
        net(x)  # running statistics, where there are any
    net.eval()
    table = bs.check(net, x[:2]).set_index("module")
    layers, fishers = table[table.units > 0], bs.unit_fisher(net, x)
    expected = [name for name in names(net) if name.startswith(("conv", "fc"))]
    assert list(layers.index) == list(fishers) == expected
    assert len(layers) == 15 and layers.covered.all() and layers.error.max() < 1e-9
    pooled = net[: names(net).index("fc5_1")](x)
    torch.testing.assert_close(fishers["fc5_1"].mean_p, pooled.mean(0))
    assert bs.activation_moments(net, x)["pyramid"].mean.shape == (21 * 10,)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"activation": "tahn"}, "'activation' must be one of .*, got 'tahn'"),
        ({"classes": 0}, "got classes 0"),
        ({"dropout": 1.0}, "dropout 1.0"),
        ({"stride": 0}, "stride 0"),
        ({"bins": ()}, "at least 1 × 1 bins"),
        ({"width": math.inf}, "'width' must be positive, got inf"),
    ],
)
def test_imagenet_refuses(wrong, message):
    with pytest.raises(ValueError, match=message):
        imagenet15(**{"width": TINY, **wrong})


@pytest.mark.parametrize("activation", ["elu", "relu", "lrelu", "srelu"])
def test_the_first_loss_is_that_of_equal_probabilities(activation):
    net = imagenet15(activation, 0, width=0.125, last_init=LAST_INIT)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, 3, 112, 112, generator=generator) / 4  # as of pixels in [0, 1]
    y = torch.randint(1000, (8,), generator=generator)
    with torch.random.fork_rng([]), torch.no_grad():
        for mode in (net.train(), net.eval()):
            loss = F.cross_entropy(mode(x), y).item()
            assert loss == pytest.approx(math.log(1000), rel=0.05)
