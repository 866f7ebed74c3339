"""Layers like nn.Linear from other packages: measured right, or left out with a reason."""

import copy
import warnings
from typing import Any

import pytest
import torch
from composite_oracles import blocks_by_parameters
from torch import Tensor, nn
from torch.nn import functional as F

import biasshift as bs
from biasshift.measure import layer_types

pytestmark = pytest.mark.filterwarnings("ignore:Too few effective samples")


class Conv1D(nn.Module):
    """As in transformers: the weight is (inputs, units)."""

    def __init__(self, nf: int, nx: int):
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x: Tensor) -> Tensor:
        size_out = (*x.size()[:-1], self.nf)
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(size_out)


class Linear(nn.Module):
    """The same computation by nn.Linear."""

    def __init__(self, layer: Conv1D):
        super().__init__()
        self.layer = nn.Linear(layer.nx, layer.nf)
        self.layer.weight.data, self.layer.bias.data = layer.weight.data.T, layer.bias.data

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class Net(nn.Module):
    def __init__(self, layer: nn.Module, units: int = 5):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.layer, self.head = nn.Linear(4, 3), layer, nn.Linear(units, 3)
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.first(x).tanh()).tanh()).flatten(1, -2).mean(1)


def sequences() -> tuple[Tensor, Tensor]:
    return torch.randn(6, 2, 4).double(), torch.arange(6) % 3


@pytest.mark.parametrize("weight_sharing", ["per_example", "expand"])
def test_conv1d_of_transformers(weight_sharing: str) -> None:
    torch.manual_seed(0)
    layer = Conv1D(5, 3)
    model = Net(layer)
    other = Net(Linear(layer))
    other.load_state_dict(
        {**other.state_dict(), **{k: v for k, v in model.state_dict().items() if "layer" not in k}}
    )
    x, y = sequences()
    options = {"weight_sharing": weight_sharing}
    found, expected = (bs.unit_fisher(m, x, **options) for m in (model, other))
    torch.testing.assert_close(found["layer"].matrix(), expected["layer.layer"].matrix())
    columns = ["cos_gradient", "cos_centered", "norm_ratio"]
    gaps = [bs.gradient_gap(m, x, y, **options)[columns].to_numpy() for m in (model, other)]
    torch.testing.assert_close(*map(torch.tensor, gaps))
    table = bs.check(model, x, y, **options).set_index("module")
    assert table.covered["layer"] and table.error["layer"] < 1e-12
    assert (table.units["layer"], table.inputs["layer"]) == (5, 3)
    update = torch.randn(5, 3).double()
    assert torch.equal(layer_types.weights(layer, layer_types.as_weight(layer, update)), update)
    with torch.no_grad(), bs.bias_shift(model, x) as shift:
        layer.bias += 1
    torch.testing.assert_close(shift["layer"].own, torch.ones(5).double())


def test_the_optimizer_moves_conv1d_as_a_linear_layer() -> None:
    torch.manual_seed(0)
    layer = Conv1D(5, 3)
    model = Net(layer)
    other = copy.deepcopy(model)
    other.layer = Linear(other.layer)
    x, y = sequences()
    for net in (model, other):
        net.train()
        optimizer = bs.optim.UnitNaturalGradient(net, lr=0.1, labels="empirical")
        for _ in range(2):
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
    torch.testing.assert_close(model.layer.weight.T, other.layer.layer.weight)
    torch.testing.assert_close(model.layer.bias, other.layer.layer.bias)


def test_another_conv1d_is_not_taken_for_it() -> None:
    class Scaled(Conv1D):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    model, (x, _) = Net(Scaled(5, 3)), sequences()
    with pytest.raises(ValueError, match=r"'layer'.*weight · input \+ bias"):
        bs.unit_fisher(model, x, layers=["layer"])
    wrapper = type("Conv1D", (nn.Module,), {})()
    wrapper.conv = nn.Conv1d(1, 1, 1)
    assert not layer_types.is_covered(wrapper)
    assert layer_types.is_covered(type("Conv1D", (nn.Conv1d,), {})(1, 1, 1))


# -- subclasses with a forward of their own --------------------------------------------------------


class CastingLinear(nn.Linear):
    """As timm's Linear."""

    def forward(self, input: Tensor) -> Tensor:
        bias = self.bias.to(dtype=input.dtype) if self.bias is not None else None
        return F.linear(input, self.weight.to(dtype=input.dtype), bias=bias)


class StandardizedConv(nn.Conv2d):
    """As timm's StdConv2d: it computes with another weight."""

    def forward(self, input: Tensor) -> Tensor:
        weight = F.batch_norm(
            self.weight.reshape(1, self.out_channels, -1), None, None, training=True, momentum=0.0
        ).reshape_as(self.weight)
        return F.conv2d(input, weight, self.bias, self.stride, self.padding)


class Convolutional(nn.Module):
    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer, self.head = layer, nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x).tanh().mean((2, 3)))


def test_linear_subclasses() -> None:
    model, (x, _) = Net(CastingLinear(3, 5)), sequences()
    block = blocks_by_parameters(
        model, {"layer": ("layer.weight", "layer.bias", 0)}, {"layer": 5}, x
    )["layer"]
    found = bs.unit_fisher(model, x)["layer"].matrix()
    assert (found - block).abs().max() <= 1e-10 * block.abs().max()
    images = torch.randn(4, 1, 5, 5)
    with pytest.raises(ValueError, match=r"'layer'.*weight · input \+ bias"):
        bs.unit_fisher(Convolutional(StandardizedConv(1, 2, 3)), images, layers=["layer"])


class LowRank(nn.Module):
    """As peft's lora.Linear: a frozen layer, and two that are added."""

    def __init__(self, base: nn.Linear, merged: bool = False):
        super().__init__()
        self.base_layer, self.merged = base.requires_grad_(False), merged
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, base.out_features, bias=False)})

    def forward(self, x: Tensor) -> Tensor:
        out = self.base_layer(x)
        if self.merged:
            return out
        return out + self.lora_B["default"](self.lora_A["default"](x)) * 0.5


def test_low_rank_adapters() -> None:
    model, (x, _) = Net(LowRank(nn.Linear(3, 5))), sequences()
    at = {
        "layer.base_layer": ("layer.base_layer.weight", "layer.base_layer.bias", 0),
        "layer.lora_A.default": ("layer.lora_A.default.weight", None, 0),
        "layer.lora_B.default": ("layer.lora_B.default.weight", None, 0),
    }
    fishers = bs.unit_fisher(model, x)
    assert not model.layer.base_layer.weight.requires_grad
    model.layer.requires_grad_(True)
    units = {"layer.base_layer": 5, "layer.lora_A.default": 2, "layer.lora_B.default": 5}
    for layer, block in blocks_by_parameters(model, at, units, x).items():
        assert (fishers[layer].matrix() - block).abs().max() <= 1e-10 * block.abs().max(), layer
    merged = bs.unit_fisher(Net(LowRank(nn.Linear(3, 5), merged=True)), x)
    assert list(merged) == ["first", "layer.base_layer", "head"]


class OldLowRank(nn.Linear):
    """As lora.Linear of older versions: the frozen layer itself, with a forward of its own."""

    def __init__(self, inputs: int, units: int):
        super().__init__(inputs, units)
        self.lora_A, self.lora_B = nn.Linear(inputs, 2, bias=False), nn.Linear(2, units, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + self.lora_B(self.lora_A(input))


def test_an_adapter_inside_the_layer_itself() -> None:
    model, (x, _) = Net(OldLowRank(3, 5)), sequences()
    with pytest.raises(ValueError, match=r"'layer' .*weight · input \+ bias"):
        bs.unit_fisher(model, x, layers=["layer"])
    assert list(bs.unit_fisher(model, x, skip=["layer"])) == ["first", "head"]
    assert list(bs.unit_fisher(model, x, layers=["layer.lora_A", "layer.lora_B"]))


# -- quantized -------------------------------------------------------------------------------------


class Residual(nn.Module):
    """The first layer reaches the outputs by a quantized layer, and by a way around it."""

    def __init__(self, kind: type[nn.Module] = nn.Linear):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.layer, self.head = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        a = self.first(x).tanh()
        return self.head(a + self.layer(a).tanh())


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated", "ignore:must run obs")
def test_layers_before_a_quantized_one_have_no_gradient() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torch.ao.quantization.quantize_dynamic(Residual().eval(), {"layer"})
    assert "quantized" in type(model.layer).__module__
    with pytest.raises(ValueError, match="change with the rest of its batch"):  # as their scale
        bs.unit_fisher(model, torch.randn(6, 4), layers=["head"])
    x = torch.randn(1, 4)
    assert list(bs.unit_fisher(model, x, layers=["head"])) == ["head"]
    with pytest.raises(ValueError, match=r"'first'.*operation without a gradient"):
        bs.unit_fisher(model, x, layers=["first"])
    with pytest.raises(ValueError, match=r"'layer'.*quantized"):
        bs.unit_fisher(model, x, uncovered="raise")
    table = bs.check(model, x).set_index("module")
    assert "quantized" in table.reason["layer"] and "without a gradient" in table.reason["first"]
    assert table.covered["head"]


def test_layers_before_a_quantizer_have_no_gradient() -> None:
    class Static(Residual):
        def forward(self, x: Tensor) -> Tensor:
            a = self.first(x).tanh()
            return self.head(a + self.quantize(a).dequantize())

    model, x = Static(), torch.randn(6, 4)
    model.quantize = torch.ao.nn.quantized.Quantize(0.1, 0, torch.qint8)
    with pytest.raises(ValueError, match=r"'first'.*operation without a gradient"):
        bs.unit_fisher(model, x, layers=["first"])
    assert list(bs.unit_fisher(model, x, layers=["head"])) == ["head"]


class Eighths(Tensor):
    """A weight in another storage, that computes in its own way."""

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return Tensor._make_wrapper_subclass(cls, (5, 3), dtype=torch.float32)  # pyright: ignore[reportArgumentType]


def test_weights_of_other_kinds_have_a_reason() -> None:
    layer = nn.Linear(3, 5)
    layer.weight = nn.Parameter(
        Tensor._make_wrapper_subclass(Eighths, (5, 3), dtype=torch.float32),  # pyright: ignore[reportArgumentType]
        requires_grad=False,
    )
    assert layer_types.why_uncovered(layer) == "its weights are a Eighths, not a plain tensor"
    layer.weight = nn.Parameter(torch.zeros(5, 3, dtype=torch.int8), requires_grad=False)
    assert "torch.int8" in str(layer_types.why_uncovered(layer))
