"""What people bring: batches and outputs of all kinds, attention, recurrence, other layers."""

import re
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import biasshift as bs

from . import oracle
from .activations import GPT, Conv1D
from .table import refusal, report, warned

# -- inputs and outputs ----------------------------------------------------------------------------


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.left, self.right = nn.Embedding(5, 3), nn.Linear(3, 4), nn.Linear(2, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, tokens: Tensor, x: Tensor) -> Tensor:
        return self.head(F.elu(self.left(self.embed(tokens)) + self.right(x)))


@report("inputs", "dict", "dict with labels", "tuple", "batches", "nested batches")
def several(kind: str) -> tuple[dict, dict]:
    model = TwoInputs().double()
    tokens, x, y = torch.randint(5, (6,)), torch.randn(6, 2).double(), torch.randint(3, (6,))
    probe, options = {
        "dict": ({"tokens": tokens, "x": x}, {}),
        "dict with labels": ({"tokens": tokens, "x": x, "labels": y}, {}),
        "tuple": ((tokens, x), {"inputs": 2}),
        "batches": ([(tokens[:2], x[:2], y[:2]), (tokens[2:], x[2:], y[2:])], {"inputs": 2}),
        "nested batches": ([((tokens, x), y)], {}),
    }[kind]
    found = {n: fisher.matrix() for n, fisher in bs.unit_fisher(model, probe, **options).items()}
    right = {
        name: oracle.blocks(
            model.get_submodule(name), lambda n: model(tokens[n : n + 1], x[n : n + 1])[0], 6
        )
        for name in ("left", "right", "head")
    }
    return found, right


class ModelOutput(dict):
    """As that of transformers: a dict whose values are attributes and items by number, too."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


OUTPUTS: dict[str, tuple[Callable[[Tensor, Tensor], Any], Any]] = {
    "dict with logits": (lambda x, out: {"features": x, "logits": out}, None),
    "dict with another key": (lambda x, out: {"boxes": x, "scores": out}, "scores"),
    "tuple": (lambda x, out: (x, out), 1),
    "tuple by a function": (lambda x, out: (x, out), lambda returned: returned[1]),
    "object with logits": (lambda x, out: SimpleNamespace(logits=out, hidden=x), None),
    "ModelOutput": (lambda x, out: ModelOutput(logits=out, hidden=x), None),
}


class Returns(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.net, self.kind = nn.Sequential(nn.Linear(2, 4), nn.ELU(), nn.Linear(4, 3)), kind

    def forward(self, x: Tensor) -> Any:
        return OUTPUTS[self.kind][0](x, self.net(x))


@report("outputs", *OUTPUTS)
def inside_of_something(kind: str) -> tuple[dict, dict]:
    model, x = Returns(kind).double(), torch.randn(6, 2).double()
    fishers = bs.unit_fisher(model, x, output=OUTPUTS[kind][1])
    found = {name: fisher.matrix() for name, fisher in fishers.items()}
    right = oracle.all_blocks(model.net, ["0", "2"], x)
    return found, {f"net.{name}": F_ for name, F_ in right.items()}


@report("outputs", "tuple", "dict with another key")
def that_must_be_chosen(kind: str) -> tuple[str, re.Pattern]:
    model, x = Returns(kind).double(), torch.randn(6, 2).double()
    said = refusal(lambda: bs.unit_fisher(model, x))
    return said, re.compile(r"ValueError.*got (tuple of 2|dict with the keys 'boxes', 'scores')")


# -- attention and recurrence ----------------------------------------------------------------------


class Attentive(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(3, 4), nn.Linear(4, 3)
        self.attn = nn.MultiheadAttention(4, 2, batch_first=True, **options)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        return self.head(self.attn(h, h, h)[0].tanh().mean(1))


class Encoded(nn.Module):
    """An encoder layer that runs as one fused kernel in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(4, 2, 6, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x).mean(1))


def projections(model: nn.Module, attn: nn.MultiheadAttention, x: Tensor) -> list[Tensor]:
    """F of the projections q, k, v, which are rows of one matrix; and of the one of outputs."""

    def logits(n: int) -> Tensor:
        return model(x[n : n + 1])[0]

    def of(weight: Tensor, bias: Tensor) -> Tensor:
        return oracle.blocks((weight, bias), logits, len(x))

    rows = of(attn.in_proj_weight, attn.in_proj_bias)
    return [*rows.chunk(3), of(attn.out_proj.weight, attn.out_proj.bias)]


@report("MultiheadAttention", "alone", "in a fused encoder", "in an encoder of two layers")
def projections_are_layers(where: str) -> tuple[dict, dict]:
    x = torch.randn(4, 5, 3 if where == "alone" else 4).double()
    if where == "alone":
        model, prefix = Attentive(), "attn"
        attn = model.attn
    else:
        model, prefix = Encoded(), "encoder.self_attn"
        if where == "in an encoder of two layers":
            model.encoder = nn.TransformerEncoder(model.encoder, 2, enable_nested_tensor=False)
            prefix = "encoder.layers.1.self_attn"
        attn = model.get_submodule(prefix)
    for p in model.parameters():  # biases are 0 as they come
        nn.init.normal_(p, std=0.5)
    model = model.double().eval()
    fishers = bs.unit_fisher(model, x)
    names = [f"{prefix}.{name}" for name in ("q_proj", "k_proj", "v_proj", "out_proj")]
    model.train()  # the fused kernel has no gradients of parameters
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
    right = dict(zip(names, projections(model, attn, x), strict=True))
    return {name: fishers[name].matrix() for name in names}, right


class Recurrent(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(2, 3), nn.Linear(4, 3)
        self.net = getattr(nn, kind)(3, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.net(self.embed(x))[0].tanh().mean(1))


@report("recurrent gates", "LSTM", "GRU", "RNN")
def are_units(kind: str) -> tuple[dict, dict]:
    model, x = Recurrent(kind).double(), torch.randn(4, 5, 2).double()
    fishers = bs.unit_fisher(model, x)
    net = model.net
    leaves = {
        "net.ih_l0": (net.weight_ih_l0, net.bias_ih_l0),
        "net.hh_l0": (net.weight_hh_l0, net.bias_hh_l0),
        "head": (model.head.weight, model.head.bias),
    }
    right = {n: oracle.blocks(p, lambda i: model(x[i : i + 1])[0], 4) for n, p in leaves.items()}
    return {name: fishers[name].matrix() for name in right}, right


# -- layers like nn.Linear -------------------------------------------------------------------------


@report("Conv1D of transformers")
def in_a_block_of_GPT_2() -> tuple[dict, dict]:
    model, x = GPT().double(), torch.randint(9, (3, 4))
    fishers = bs.unit_fisher(model, x)
    names = ["c_attn", "c_proj", "c_fc", "c_out", "head"]
    right = {}
    for name in names:
        layer = model.get_submodule(name)
        if not isinstance(layer, Conv1D):
            right[name] = oracle.all_blocks(model, [name], x)[name]
            continue
        weight = layer.weight.detach().T.clone().requires_grad_()  # (units, inputs)

        def logits(n: int, name: str = name, weight: Tensor = weight) -> Tensor:
            return torch.func.functional_call(model, {f"{name}.weight": weight.T}, x[n : n + 1])[0]

        right[name] = oracle.blocks((weight, layer.bias), logits, len(x))
    return {name: fisher.matrix() for name, fisher in fishers.items()}, right


class LowRank(nn.Module):
    """As peft's: a frozen layer, and two that are added."""

    def __init__(self) -> None:
        super().__init__()
        self.base_layer = nn.Linear(3, 4).requires_grad_(False)
        self.lora_A = nn.Linear(3, 2)
        self.lora_B = nn.Linear(2, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + 0.5 * self.lora_B(self.lora_A(x))


@report("LoRA")
def frozen_and_added_layers() -> tuple[dict, dict]:
    model = nn.Sequential(LowRank(), nn.ELU(), nn.Linear(4, 3)).double()
    x = torch.randn(6, 3).double()
    found = {name: fisher.matrix() for name, fisher in bs.unit_fisher(model, x).items()}
    assert not model[0].base_layer.weight.requires_grad
    model.requires_grad_(True)
    return found, oracle.all_blocks(model, ["0.base_layer", "0.lora_A", "0.lora_B", "2"], x)


@report("a dynamically quantized layer")
def is_left_out_by_name() -> tuple[str, re.Pattern]:
    model = nn.Sequential(nn.Linear(4, 5), nn.ELU(), nn.Linear(5, 5), nn.Linear(5, 3)).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torch.ao.quantization.quantize_dynamic(model, {"2"})
    said = warned(lambda: bs.unit_fisher(model, torch.randn(1, 4)))
    return said, re.compile(r"UncoveredWarning.*'2'.*quantized")


class Applied(nn.Module):
    """Applies the weights of its first layer by a function."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.layer, self.head = way, nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.layer.weight, self.layer.bias
        if self.way == "by name":
            h = F.linear(weight=weight, input=x, bias=bias)
        elif self.way == "twice":
            h = self.layer(x) + F.linear(x.flip(-1), weight, bias)
        elif self.way == "product":
            h = x @ weight.T + bias
        else:
            h = F.linear(x, weight, bias)
        return self.head(F.elu(h))


@report("F.linear", "by position", "by name", "twice")
def with_a_layers_weights(way: str) -> tuple[dict, dict]:
    model, x = Applied(way).double(), torch.randn(5, 3).double()
    found = {name: fisher.matrix() for name, fisher in bs.unit_fisher(model, x).items()}
    return found, oracle.all_blocks(model, ["layer", "head"], x)


@report("F.linear")
def any_other_use_is_left_out_by_name() -> tuple[str, re.Pattern]:
    model, x = Applied("product").double(), torch.randn(5, 3).double()
    return warned(lambda: bs.unit_fisher(model, x)), re.compile(r"UncoveredWarning.*'layer'")
