"""`nn.MultiheadAttention` is measured as four layers, whatever its options and masks."""

import math
from typing import Any

import pytest
import torch
from composite_oracles import blocks_by_parameters, blocks_by_positions
from torch import Tensor, nn

import biasshift as bs

pytestmark = pytest.mark.filterwarnings("ignore:Too few effective samples")

B, L, E, HEADS = 3, 4, 6, 2


class Attentive(nn.Module):
    """Self-attention, or attention to another embedding of the input, and a linear head."""

    def __init__(self, call: dict[str, Any] | None = None, cross: bool = False, **options: Any):
        super().__init__()
        torch.manual_seed(0)
        self.cross, self.call = cross, call or {}
        width, depth = options.get("kdim", E), options.get("vdim", E)
        self.embed = nn.Linear(5, E)
        self.keys, self.values = nn.Linear(5, width), nn.Linear(5, depth)
        self.attn = nn.MultiheadAttention(E, HEADS, **options)
        self.head = nn.Linear(E, 3)
        for p in self.parameters():  # biases are 0 as they come
            nn.init.normal_(p, std=0.7)
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        first = self.attn.batch_first
        q = self.embed(x)
        k, v = (self.keys(x), self.values(x)) if self.cross else (q, q)
        q, k, v = (t if first else t.transpose(0, 1) for t in (q, k, v))
        call = {name: make(len(x)) for name, make in self.call.items()}
        out, attention = self.attn(q, k, v, **call)
        out = out if first else out.transpose(0, 1)
        if attention is not None:
            out = out + attention.flatten(1).sum(1)[:, None, None].sin()
        return self.head(out.tanh()).mean(1)


def causal(n: int) -> Tensor:
    return torch.triu(torch.ones(L, L), 1).bool()


def padding(n: int) -> Tensor:
    return (torch.arange(L) >= L - 1).expand(n, L)


def float_mask(n: int) -> Tensor:
    return torch.linspace(-1, 1, L * L, dtype=torch.float64).view(L, L)


def per_head(n: int) -> Tensor:
    return (
        float_mask(n)
        .expand(HEADS, L, L)
        .mul(torch.tensor([1.0, -2.0])[:, None, None])
        .repeat(n, 1, 1)
    )


def constant(value: Any) -> Any:
    return lambda n: value


CASES = {
    "plain": Attentive(batch_first=True),
    "sequence-first": Attentive(),
    "without-bias": Attentive(bias=False, batch_first=True),
    "widths": Attentive(cross=True, kdim=4, vdim=7, batch_first=True),
    "widths-sequence-first": Attentive(cross=True, kdim=4, vdim=7),
    "cross": Attentive(cross=True, batch_first=True),
    "bias-kv": Attentive(add_bias_kv=True, add_zero_attn=True, batch_first=True),
    "no-weights": Attentive({"need_weights": constant(False)}, batch_first=True),
    "causal": Attentive(
        {"attn_mask": causal, "is_causal": constant(True), "need_weights": constant(False)},
        batch_first=True,
    ),
    "bool-mask": Attentive({"attn_mask": causal}),
    "float-mask": Attentive({"attn_mask": float_mask}, batch_first=True),
    "mask-per-head": Attentive(
        {"attn_mask": per_head, "average_attn_weights": constant(False)}, batch_first=True
    ),
    "padding": Attentive({"key_padding_mask": padding}, batch_first=True),
    "padding-and-mask": Attentive(
        {"key_padding_mask": padding, "attn_mask": causal, "need_weights": constant(False)}
    ),
}


def places(attn: nn.MultiheadAttention) -> dict[str, tuple[str, str | None, int]]:
    bias = attn.in_proj_bias is not None
    found = {
        f"attn.{p}_proj": (
            "attn.in_proj_weight" if attn.in_proj_weight is not None else f"attn.{p}_proj_weight",
            "attn.in_proj_bias" if bias else None,
            i * E if attn.in_proj_weight is not None else 0,
        )
        for i, p in enumerate("qkv")
    }
    out = ("attn.out_proj.weight", "attn.out_proj.bias" if bias else None, 0)
    return {**found, "attn.out_proj": out}


def expected(model: Attentive, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
    at = places(model.attn)
    found = blocks_by_parameters(model, at, dict.fromkeys(at, E), x, y)
    if model.attn.in_proj_weight is None and model.attn.in_proj_bias is not None:
        # three weights, one bias: its rows are the first, second and third
        for i, p in enumerate("qkv"):
            name = f"attn.{p}_proj"
            shifted = {name: (at[name][0], "bias", 0)}
            rows = _Rows(model, i)
            found[name] = blocks_by_parameters(rows, shifted, {name: E}, x, y)[name]
    return found


class _Rows(nn.Module):
    """A view of the model whose parameter "bias" is a third of ``in_proj_bias``."""

    def __init__(self, model: Attentive, third: int):
        super().__init__()
        self.model, self.third = [model], third
        self.bias = nn.Parameter(model.attn.in_proj_bias.detach()[third * E : (third + 1) * E])

    def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
        return [*self.model[0].named_parameters(), ("bias", self.bias)]

    def forward(self, x: Tensor) -> Tensor:
        whole = list(self.model[0].attn.in_proj_bias.detach().split(E))
        whole[self.third] = self.bias
        return torch.func.functional_call(self.model[0], {"attn.in_proj_bias": torch.cat(whole)}, x)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("labels", ["expected", "empirical"])
def test_blocks_are_those_of_the_parameters(name: str, labels: str) -> None:
    model, x, y = CASES[name], torch.randn(B, L, 5).double(), torch.tensor([0, 2, 1])
    fishers = bs.unit_fisher(model, x, y, labels=labels)
    own = {layer: f for layer, f in fishers.items() if layer.startswith("attn.")}
    assert list(own) == [f"attn.{part}_proj" for part in ("q", "k", "v", "out")]
    for layer, block in expected(model, x, y if labels == "empirical" else None).items():
        size = block.abs().max()
        assert size > 0 and (own[layer].matrix() - block).abs().max() <= 1e-10 * size, layer


def attention_nets(model: Attentive, x: Tensor) -> tuple[Tensor, dict]:
    """Attention written out, for weights of one width and without masks."""
    attn, a = model.attn, model.embed(x)
    nets = {}
    for i, p in enumerate("qkv"):
        w, w0 = attn.in_proj_weight[i * E : i * E + E], attn.in_proj_bias[i * E : i * E + E]
        nets[p] = a @ w.T + w0
    q, k, v = (nets[p].unflatten(-1, (HEADS, -1)).transpose(1, 2) for p in "qkv")
    attention = (q @ k.transpose(-1, -2) / math.sqrt(E // HEADS)).softmax(-1)
    mixed = (attention @ v).transpose(1, 2).flatten(2)
    net = mixed @ attn.out_proj.weight.T + attn.out_proj.bias
    out = net + attention.mean(1).flatten(1).sum(1)[:, None, None].sin()
    layers = {f"attn.{p}_proj": [(a, nets[p])] for p in "qkv"}
    return model.head(out.tanh()).mean(1), {**layers, "attn.out_proj": [(mixed, net)]}


@pytest.mark.parametrize("name", ["plain", "sequence-first"])
def test_positions_are_summed_up_under_expand(name: str) -> None:
    model, x = CASES[name], torch.randn(B, L, 5).double()
    torch.testing.assert_close(attention_nets(model, x)[0], model(x))
    fishers = bs.unit_fisher(model, x, weight_sharing="expand")
    for layer, block in blocks_by_positions(lambda z: attention_nets(model, z), x).items():
        error = (fishers[layer].matrix() - block).abs().max()
        assert error <= 1e-10 * block.abs().max(), layer


class Opened(nn.Module):
    """The same model with the projections as layers of its own."""

    def __init__(self, model: Attentive):
        super().__init__()
        self.embed, self.head = model.embed, model.head
        self.attn = nn.Module()
        for i, p in enumerate("qkv"):
            layer = nn.Linear(E, E).double()
            layer.weight.data = model.attn.in_proj_weight.data[i * E : i * E + E].clone()
            layer.bias.data = model.attn.in_proj_bias.data[i * E : i * E + E].clone()
            setattr(self.attn, f"{p}_proj", layer)
        self.attn.out_proj = nn.Linear(E, E).double()
        self.attn.out_proj.load_state_dict(model.attn.out_proj.state_dict())

    def forward(self, x: Tensor) -> Tensor:
        a = self.embed(x)
        q, k, v = (
            getattr(self.attn, f"{p}_proj")(a).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for p in "qkv"
        )
        attention = (q @ k.transpose(-1, -2) / math.sqrt(E // HEADS)).softmax(-1)
        out = self.attn.out_proj((attention @ v).transpose(1, 2).flatten(2))
        out = out + attention.mean(1).flatten(1).sum(1)[:, None, None].sin()
        return self.head(out.tanh()).mean(1)


@pytest.mark.parametrize("name", ["plain", "sequence-first"])
def test_every_measurement_agrees_with_layers_written_out(name: str) -> None:
    model, x, y = CASES[name], torch.randn(6, L, 5).double(), torch.tensor([0, 2, 1, 1, 0, 0])
    opened = Opened(model).eval()
    drawn = [bs.unit_fisher(m, x, labels="sampled", draws=3) for m in (model, opened)]
    assert set(drawn[1]) <= set(drawn[0])
    for layer, fisher in drawn[1].items():
        torch.testing.assert_close(drawn[0][layer].matrix(), fisher.matrix())
    gaps = [bs.gradient_gap(m, x, y).set_index("layer").sort_index() for m in (model, opened)]
    names = ["attn.k_proj", "attn.q_proj", "attn.v_proj"]
    for column in ("cos_gradient", "cos_centered", "norm_ratio", "mean_in_abs"):
        values = [gap.loc[names, column].to_numpy() for gap in gaps]
        torch.testing.assert_close(*map(torch.tensor, values), equal_nan=True)


def test_the_bias_shift_of_an_update_of_the_packed_weight() -> None:
    model, x = Attentive(batch_first=True), torch.randn(6, L, 5).double()
    with torch.no_grad():
        a = model.embed(x).flatten(0, 1)
        before = model.attn.in_proj_weight.clone(), model.attn.in_proj_bias.clone()
        with bs.bias_shift(model, x) as shift:
            model.attn.in_proj_weight.add_(torch.randn(3 * E, E).double())
            model.attn.in_proj_bias.add_(torch.randn(3 * E).double())
        dw, dw0 = model.attn.in_proj_weight - before[0], model.attn.in_proj_bias - before[1]
    for i, p in enumerate("qkv"):
        rows = slice(i * E, i * E + E)
        own = dw[rows] @ a.mean(0) + dw0[rows]
        torch.testing.assert_close(shift[f"attn.{p}_proj"].own, own)
        torch.testing.assert_close(shift[f"attn.{p}_proj"].total, own)
        assert not shift[f"attn.{p}_proj"].incoming.any()
    assert shift["attn.out_proj"].incoming.abs().min() > 0


def test_a_table_during_training_has_rows_of_the_projections() -> None:
    model, x, y = Attentive(batch_first=True), torch.randn(6, L, 5).double(), torch.arange(6) % 3
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with bs.instrument(model, optimizer, (x, y), every=1) as log:
        nn.functional.cross_entropy(model(x), y).backward()
        gradient = (
            model.attn.in_proj_weight.grad[E : 2 * E],
            model.attn.in_proj_bias.grad[E : 2 * E],
        )
        with torch.no_grad():
            mean = model.embed(x).flatten(0, 1).mean(0)
        optimizer.step()
    table = log.table()
    rows = table[(table.step == 1) & (table.layer == "attn.k_proj") & (table.unit >= 0)]
    shift = torch.tensor(rows.shift_gradient.to_numpy()).double()
    torch.testing.assert_close(shift, -(gradient[0] @ mean + gradient[1]), rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(
        torch.tensor(rows.own.to_numpy()).double(), 0.1 * shift, rtol=1e-4, atol=1e-8
    )
    cosine = table[(table.step == 1) & (table.layer == "attn.q_proj")].cos_gradient
    assert cosine.notna().any()
    assert set(log.layers.layer) >= {f"attn.{p}_proj" for p in ("q", "k", "v", "out")}


# -- whole transformers ----------------------------------------------------------------------------


class Encoded(nn.Module):
    def __init__(self, batch_first: bool = True, padded: bool = False, **options: Any):
        super().__init__()
        torch.manual_seed(1)
        layer = nn.TransformerEncoderLayer(
            E, HEADS, 8, batch_first=batch_first, activation=nn.functional.gelu, **options
        )
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=batch_first)
        self.head, self.padded, self.first = nn.Linear(E, 3), padded, batch_first
        self.eval()

    def mask(self, x: Tensor) -> Tensor:
        """What follows a large number is padding."""
        return ((x[..., 0] > 0.8).cumsum(1) > 0) & (torch.arange(x.shape[1]) > 0)

    def forward(self, x: Tensor) -> Tensor:
        mask = self.mask(x) if self.padded else None
        out = self.encoder(x if self.first else x.transpose(0, 1), src_key_padding_mask=mask)
        out = out if self.first else out.transpose(0, 1)
        if mask is not None:
            out = out * ~mask[..., None]
        return self.head(out.mean(1))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("weight_sharing", ["per_example", "expand"])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_fused_encoders_are_checked_and_run_fused_again(padded: bool, weight_sharing: str) -> None:
    model, x = Encoded(padded=padded), torch.randn(4, 5, E)
    with torch.no_grad():
        fused = model(x)
    table = bs.check(model, x, weight_sharing=weight_sharing).set_index("module")
    layers = table[table.units > 0]
    assert layers.covered.all() and (layers.error < 1e-9).all(), layers.to_string()
    assert torch.backends.mha.get_fastpath_enabled()
    with torch.no_grad():
        assert torch.equal(model(x), fused)


@pytest.mark.parametrize("options", [{}, {"norm_first": True}, {"bias": False}])
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
def test_a_whole_transformer_is_checked(options: dict[str, Any]) -> None:
    class Translated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(2)
            self.net = nn.Transformer(E, HEADS, 1, 1, 8, batch_first=True, **options)
            self.head = nn.Linear(E, 3)
            self.eval()

        def forward(self, x: Tensor) -> Tensor:
            mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype)
            return self.head(self.net(x, x.flip(1), tgt_mask=mask)).mean(1)

    table = bs.check(Translated(), torch.randn(3, 4, E)).set_index("module")
    layers = table[table.units > 0]
    assert len(layers) == 4 * 3 + 4 + 1
    assert layers.covered.all() and (layers.error < 1e-9).all(), layers.to_string()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_activation_moments_of_a_fused_encoder() -> None:
    model, x = Encoded(padded=True), torch.randn(4, 5, E)
    for layer in model.encoder.layers:
        layer.activation = nn.ReLU()
        layer.activation_relu_or_gelu = 1  # PyTorch goes on running it as one fused kernel
    moments = bs.activation_moments(model, x)["encoder.layers.0.activation"]
    layer, mask = model.encoder.layers[0].train(), model.mask(x)
    for module in layer.modules():
        module.p = 0.0  # the dropout of training mode, in which nothing is fused
        module.dropout = 0.0 if isinstance(module, nn.MultiheadAttention) else None
    a = layer.self_attn(x, x, x, key_padding_mask=mask, need_weights=False)[0]
    hidden = layer.linear1(layer.norm1(x + a)).relu()
    torch.testing.assert_close(moments.mean, hidden.flatten(0, 1).mean(0))
    assert moments.count == 4 * 5
