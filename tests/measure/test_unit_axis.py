"""On which axis the units of an activation lie, whatever is between it and its layer."""

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.models.convnext import CNBlockConfig, LayerNorm2d

import biasshift as bs


class Applied(nn.Module):
    """A layer, a function of its output, and an activation "act"."""

    def __init__(self, layer: nn.Module, between, act: nn.Module | None = None) -> None:
        super().__init__()
        self.layer, self.between, self.act = layer, between, act or nn.ELU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.between(self.layer(x)))


class SamLayerNorm(nn.Module):
    """A norm over the channels of a map that no class of PyTorch is a base of."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True)


def right(model: nn.Module, x: Tensor, axis: int, name: str = "act") -> None:
    """The mean of a named module's output over all axes but one, with PyTorch alone."""
    outputs: list[Tensor] = []
    hook = model.get_submodule(name).register_forward_hook(lambda m, a, o: outputs.append(o))
    with torch.no_grad():
        model(x)
    hook.remove()
    (out,) = outputs
    mean = out.mean([i for i in range(out.dim()) if i != axis % out.dim()])
    measured = bs.activation_moments(model, x)[name].mean
    torch.testing.assert_close(measured, mean, rtol=1e-5, atol=1e-6)


def left_out(model: nn.Module, x: Tensor, name: str = "act") -> None:
    with pytest.warns(UserWarning, match=rf"'{name}'.*left out.*unit_axis") as caught:
        assert name not in bs.activation_moments(model, x)
    assert len(caught) == 1
    with pytest.raises(ValueError, match=rf"'{name}'.*unit_axis"):
        bs.activation_moments(model, x, layers=[name])


CONV = nn.Conv2d(3, 5, 3, padding=1)
SQUARE = nn.Conv2d(3, 6, 3, padding=1)  # 6 channels on maps of 6 × 6
LINE = nn.Conv1d(2, 6, 3, padding=1)  # 6 channels at 6 places
TOKENS = nn.Linear(4, 6)  # 6 features of 6 tokens


@pytest.mark.parametrize("size", [(6, 8), (5, 8), (8, 5), (5, 5)])
@pytest.mark.parametrize(
    "norm", [nn.LayerNorm, LayerNorm2d, SamLayerNorm, nn.GroupNorm, nn.BatchNorm2d, "last axis"]
)
def test_a_norm_of_maps_leaves_the_channels_on_axis_1(norm, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    made = {
        nn.LayerNorm: lambda: nn.LayerNorm([5, *size]),
        nn.GroupNorm: lambda: nn.GroupNorm(5, 5),
        "last axis": lambda: nn.LayerNorm(size[1]),
    }.get(norm, lambda: norm(5))()
    model = nn.Sequential(CONV, made, nn.ELU(), nn.Conv2d(5, 2, 1)).eval()
    x = torch.randn(4, 3, *size)
    right(model, x, 1, "2")


@pytest.mark.parametrize("norm", [nn.LayerNorm(6), nn.RMSNorm(6)])
@pytest.mark.parametrize("tokens", [6, 7])
def test_a_norm_of_features_has_them_last(norm: nn.Module, tokens: int) -> None:
    model = Applied(nn.Sequential(TOKENS, norm), lambda h: h + h.flip(0))
    right(model, torch.randn(3, tokens, 4), -1)
    right(Applied(norm, lambda h: h), torch.randn(3, tokens, 6), -1)


@pytest.mark.parametrize(
    ("layer", "between", "shape", "axis"),
    [
        (LINE, lambda h: h.transpose(1, 2), (4, 2, 6), 2),
        (LINE, lambda h: h.transpose(1, 2), (4, 2, 9), 2),
        (LINE, lambda h: h.transpose(1, 2).transpose(1, 2), (4, 2, 6), 1),
        (LINE, lambda h: h.transpose(1, 2).contiguous(), (4, 2, 9), 2),
        (LINE, lambda h: h.mT[:, 1:], (4, 2, 6), 2),
        (TOKENS, lambda h: h.mT, (3, 6, 4), 1),
        (SQUARE, lambda h: h.permute(0, 2, 3, 1), (3, 3, 6, 6), 3),
        (SQUARE, lambda h: h.permute(0, 2, 1, 3), (3, 3, 6, 6), 2),
        (SQUARE, lambda h: h.flatten(2), (3, 3, 6, 6), 1),
        (SQUARE, lambda h: h.flatten(2).mT, (3, 3, 6, 6), 2),
        (SQUARE, lambda h: h.flatten(1), (3, 3, 6, 6), 1),
        (SQUARE, lambda h: h.relu(), (3, 3, 6, 6), 1),
        (SQUARE, lambda h: h + 0.5 * h.tanh(), (3, 3, 6, 6), 1),
        (SQUARE, lambda h: h.to(memory_format=torch.channels_last), (3, 3, 6, 6), 1),
        (TOKENS, lambda h: h + h.sigmoid(), (3, 6, 4), 2),
        (CONV, lambda h: torch.cat([h[..., :1], h], -1), (3, 3, 6, 6), 1),
        # By the operations alone: sizes coincide, or there are more units.
        (LINE, lambda h: h.transpose(1, 2).contiguous(), (4, 2, 6), 2),
        (LINE, lambda h: h.mT + 1, (4, 2, 6), 2),
        (LINE, lambda h: torch.cat([h, h], 1).mT, (4, 2, 6), 2),
        (LINE, lambda h: torch.cat([h, -h], 1).mT.exp(), (4, 2, 12), 2),
        (LINE, lambda h: h.mT.tanh()[:, None].mean(1), (4, 2, 6), 2),
        (LINE, lambda h: torch.stack([h, h], 1).mT.sin().sum(1), (4, 2, 6), 2),
        (SQUARE, lambda h: torch.einsum("bchw->bhwc", h).clone(), (3, 3, 6, 6), 3),
        (SQUARE, lambda h: torch.cat([h, h], 1), (3, 3, 6, 6), 1),  # 6 is the size of the maps
        (SQUARE, lambda h: torch.cat([h, h], 1).mT.contiguous(), (3, 3, 6, 6), 1),
        (SQUARE, lambda h: F.max_pool2d(h, 2).permute(0, 3, 1, 2).abs(), (3, 3, 12, 6), 2),
        (SQUARE, lambda h: F.interpolate(h, scale_factor=2).flatten(2).mT + 0, (3, 3, 3, 3), 2),
        (SQUARE, lambda h: h.mean(2).mT * 2, (3, 3, 6, 6), 2),
        (SQUARE, lambda h: h.amax(-1, keepdim=True).squeeze(3).exp(), (3, 3, 6, 6), 1),
        (SQUARE, lambda h: h.split(3, 1)[1].tanh(), (3, 3, 6, 6), 1),
        (SQUARE, lambda h: h.select(3, 0).mT.neg(), (3, 3, 6, 6), 2),
        (TOKENS, lambda h: h.unbind(1)[0].unsqueeze(1).expand(-1, 6, -1).exp(), (3, 6, 4), 2),
    ],
)
def test_the_units_are_followed_through_functions(layer, between, shape, axis: int) -> None:
    """By the operations; of frozen layers in a second pass, in which they are not frozen."""
    torch.manual_seed(0)
    right(Applied(layer, between), torch.randn(shape), axis)
    frozen = Applied(layer, between).requires_grad_(False)
    right(frozen, torch.randn(shape), axis)
    frozen.requires_grad_(True)


@pytest.mark.parametrize(
    ("layer", "between", "shape"),
    [
        (LINE, lambda h: h.detach().mT.contiguous(), (4, 2, 6)),
        (LINE, lambda h: torch.cat([h, h], 1).detach().mT.contiguous(), (4, 2, 6)),
        (TOKENS, lambda h: h.mT @ h, (3, 6, 4)),
        (SQUARE, lambda h: h.clone() + h.mT.transpose(1, 2), (3, 3, 6, 6)),
        (TOKENS, lambda h: h.unflatten(2, (2, 3)), (3, 5, 4)),
    ],
)
def test_where_two_readings_remain_the_module_is_left_out(layer, between, shape) -> None:
    torch.manual_seed(0)
    left_out(Applied(layer, between), torch.randn(shape))


def test_batches_of_other_lengths_tell_the_axis() -> None:
    torch.manual_seed(0)
    model = Applied(LINE, lambda h: h.detach().transpose(1, 2).contiguous())
    x = [torch.randn(4, 2, 6), torch.randn(3, 2, 9)]
    with torch.no_grad():
        values = torch.cat([model(part).flatten(0, 1) for part in x])
    torch.testing.assert_close(bs.activation_moments(model, x)["act"].mean, values.mean(0))


def test_torchvisions_transformers_give_all_means() -> None:
    torch.manual_seed(0)
    models = {
        "encoder.layers.encoder_layer_0.mlp.1": torchvision.models.VisionTransformer(
            32, 8, num_layers=1, num_heads=2, hidden_dim=16, mlp_dim=20, num_classes=3
        ),
        "features.1.0.mlp.1": torchvision.models.SwinTransformer(
            [4, 4], 12, [1, 1], [2, 4], [4, 4], num_classes=3
        ),
        "features.1.0.block.4": torchvision.models.ConvNeXt(
            [CNBlockConfig(12, 24, 1), CNBlockConfig(24, None, 1)], num_classes=3
        ),
    }
    for name, model in models.items():
        x = torch.randn(2, 3, 32, 32)
        right(model.eval(), x, -1, name)
        bare = {
            n
            for n, m in model.named_modules()
            if not list(m.children()) and not list(m.parameters())
        }
        assert {call.split("#")[0] for call in bs.activation_moments(model, x)} == bare


# -- activations with parameters -------------------------------------------------------------------


class Swish(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.beta = nn.Parameter(torch.tensor(1.5))

    def forward(self, x: Tensor) -> Tensor:
        return x * (self.beta * x).sigmoid()


@pytest.mark.parametrize("act", [nn.PReLU(), nn.PReLU(4), Swish()])
@pytest.mark.parametrize("maps", [False, True])
def test_activations_with_parameters_have_means(act: nn.Module, maps: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 4, 3) if maps else nn.Linear(3, 4)
    x = torch.randn(5, 3, 6, 6) if maps else torch.randn(5, 3)
    model = Applied(layer, lambda h: h, act)
    right(model, x, 1)
    assert list(bs.activation_moments(model, x)) == ["act"]
    with bs.instrument(model) as log:
        model(x)
    assert set(log.table().layer) == {"act"}


def test_weights_and_norms_with_one_number_are_not_activations() -> None:
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.LayerNorm(1, bias=False), nn.ELU())
    assert list(bs.activation_moments(model, torch.randn(3, 1))) == ["2"]


# -- inside somebody's training --------------------------------------------------------------------


@pytest.mark.parametrize("layers", [None, ["act"]])
def test_nothing_is_raised_or_warned_inside_a_training_forward(layers: list[str] | None) -> None:
    torch.manual_seed(0)
    model = Applied(LINE, lambda h: h.mT @ h)
    log = bs.instrument(model, layers=layers)
    for _ in range(2):
        model(torch.randn(4, 2, 6))  # a warning would be an error here
    with pytest.warns(UserWarning, match="'act'.*left out") as caught:
        assert not len(log.table())
        log.flush()
    assert len(caught) == 1
    log.remove()


def test_training_follows_the_units_as_a_probe_does() -> None:
    torch.manual_seed(0)
    model, x = Applied(SQUARE, lambda h: h + 0.5 * h.tanh()), torch.randn(3, 3, 6, 6)
    with bs.instrument(model) as log:
        model(x)
    mean = model(x).mean((0, 2, 3)).detach()
    torch.testing.assert_close(torch.tensor(log.table()["mean"].to_numpy()).float(), mean)
    assert log._watcher.last.node is None  # the graph is let go of


def test_a_probe_warns_once_of_what_is_left_out_along_training() -> None:
    torch.manual_seed(0)
    moved = Applied(LINE, lambda h: h.mT @ h)
    model = nn.Sequential(moved, nn.Flatten(), nn.Linear(36, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = torch.randn(4, 2, 6), torch.tensor([0, 1, 1, 0])
    with pytest.warns(UserWarning, match=r"'0\.act'.*left out") as caught:
        log = bs.instrument(model, optimizer, probe=(x, y), every=1, quantities="activations")
        for _ in range(3):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    assert len(caught) == 1 and set(log.table().layer) == {"1"}
    log.remove()
    with pytest.raises(ValueError, match=r"'0\.act'.*unit_axis"):
        bs.instrument(
            model, optimizer, probe=(x, y), quantities="activations", layers=["0.act", "1"]
        )
