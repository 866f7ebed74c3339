"""On which axis the units of an activation lie: means against a hook on the right axis."""

import re

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import biasshift as bs

from . import oracle
from .table import report, warned


class Applied(nn.Module):
    """A layer, a function of its output, and an activation "act"."""

    def __init__(self, layer: nn.Module, between, act: nn.Module | None = None) -> None:
        super().__init__()
        self.layer, self.between, self.act = layer, between, act or nn.ELU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.between(self.layer(x)))


class LayerNorm2d(nn.LayerNorm):
    """As that of torchvision's ConvNeXt."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        x = F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


CONV, LINE = (lambda: nn.Conv2d(3, 5, 3, padding=1)), (lambda: nn.Conv1d(2, 6, 3, padding=1))
MAPS, TOKENS = (4, 3, 6, 8), (3, 7, 4)
BEHIND = {  # layer, what follows, shape of the inputs, axis of the units
    "LayerNorm([C, H, W])": (CONV, lambda: nn.LayerNorm([5, 6, 8]), MAPS, 1),
    "LayerNorm2d": (CONV, lambda: LayerNorm2d(5), MAPS, 1),
    "GroupNorm": (CONV, lambda: nn.GroupNorm(5, 5), MAPS, 1),
    "BatchNorm2d": (CONV, lambda: nn.BatchNorm2d(5), MAPS, 1),
    "RMSNorm": (lambda: nn.Linear(4, 6), lambda: nn.RMSNorm(6), TOKENS, 2),
    "LayerNorm": (lambda: nn.Linear(4, 6), lambda: nn.LayerNorm(6), TOKENS, 2),
    "LayerNorm, as many tokens as features": (
        lambda: nn.Linear(4, 6),
        lambda: nn.LayerNorm(6),
        (3, 6, 4),
        2,
    ),
    "transpose": (LINE, lambda: lambda h: h.transpose(1, 2), (4, 2, 9), 2),
    "transpose, length = channels": (LINE, lambda: lambda h: h.transpose(1, 2), (4, 2, 6), 2),
    "two transposes, length = channels": (LINE, lambda: lambda h: h.mT.mT, (4, 2, 6), 1),
    "permute of square maps": (
        lambda: nn.Conv2d(3, 6, 3, padding=1),
        lambda: lambda h: h.permute(0, 2, 3, 1),
        (3, 3, 6, 6),
        3,
    ),
    "flatten(2).mT": (CONV, lambda: lambda h: h.flatten(2).mT, MAPS, 2),
    "mT.contiguous(), length = channels": (LINE, lambda: lambda h: h.mT.contiguous(), (4, 2, 6), 2),
    "PReLU on features": (lambda: nn.Linear(4, 6), lambda: lambda h: h, (9, 4), 1),
    "PReLU on maps": (CONV, lambda: lambda h: h, MAPS, 1),
}


@report("unit axis of the means", *BEHIND)
def behind(name: str) -> tuple[Tensor, Tensor]:
    layer, follows, shape, axis = BEHIND[name]
    act = None
    if "PReLU" in name:
        act = nn.PReLU(6 if "features" in name else 5)
    model = Applied(layer(), follows(), act).double().eval()
    x = torch.randn(shape).double()
    return bs.activation_moments(model, x)["act"].mean, oracle.hooked_mean(model, x, "act", axis)


class MixerBlock(nn.Module):
    """Mixes tokens on transposed features, then features; as many of the ones as of the others."""

    def __init__(self, tokens: int = 6, width: int = 6) -> None:
        super().__init__()
        self.embed, self.norm = nn.Conv2d(3, width, 2, 2), nn.LayerNorm(width)
        self.tokens = nn.Sequential(nn.Linear(tokens, 8), nn.GELU(), nn.Linear(8, tokens))
        self.features = nn.Sequential(nn.Linear(width, 8), nn.GELU(), nn.Linear(8, width))
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x).flatten(2).mT
        h = h + self.tokens(self.norm(h).mT).mT
        h = h + self.features(self.norm(h))
        return self.head(h.mean(1))


class Conv1D(nn.Module):
    """As in transformers: the weight is (inputs, units)."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.randn(nx, nf) / 3)
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x: Tensor) -> Tensor:
        size_out = (*x.size()[:-1], self.nf)
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(size_out)


class GPT(nn.Module):
    """One block as that of GPT-2: causal attention and an MLP, of Conv1D layers."""

    def __init__(self, width: int = 6, heads: int = 2) -> None:
        super().__init__()
        self.heads, self.embed = heads, nn.Embedding(9, width)
        self.norm, self.later = nn.LayerNorm(width), nn.LayerNorm(width)
        self.c_attn, self.c_proj = Conv1D(3 * width, width), Conv1D(width, width)
        self.c_fc, self.act, self.c_out = Conv1D(8, width), nn.GELU(), Conv1D(width, 8)
        self.head = nn.Linear(width, 9)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        q, k, v = (
            part.unflatten(2, (self.heads, -1)).transpose(1, 2)
            for part in self.c_attn(self.norm(h)).chunk(3, -1)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        h = h + self.c_proj(mixed)
        return self.head(h + self.c_out(self.act(self.c_fc(self.later(h)))))


def networks() -> dict[str, tuple]:
    """Model, inputs, the module that is looked at, and its axis of units."""
    import torchvision
    from torchvision.models.convnext import CNBlockConfig

    models = torchvision.models
    images = (2, 3, 32, 32)
    return {
        "ViT": (
            lambda: models.VisionTransformer(32, 8, 1, 2, 16, 20, num_classes=3),
            images,
            "encoder.layers.encoder_layer_0.mlp.1",
            -1,
        ),
        "ConvNeXt": (
            lambda: models.ConvNeXt(
                [CNBlockConfig(12, 24, 1), CNBlockConfig(24, None, 1)], num_classes=3
            ),
            images,
            "features.1.0.block.4",
            -1,
        ),
        "Swin": (
            lambda: models.SwinTransformer([4, 4], 12, [1, 1], [2, 4], [4, 4], num_classes=3),
            images,
            "features.1.0.mlp.1",
            -1,
        ),
        "Mixer, tokens": (MixerBlock, (3, 3, 4, 6), "tokens.1", -1),
        "Mixer, features": (MixerBlock, (3, 3, 4, 6), "features.1", -1),
        "GPT-2": (GPT, None, "act", -1),
    }


NETWORKS = ["ViT", "ConvNeXt", "Swin", "Mixer, tokens", "Mixer, features", "GPT-2"]


@report("unit axis of the means", *NETWORKS)
def of_networks(name: str) -> tuple[Tensor, Tensor]:
    make, shape, module, axis = networks()[name]
    model = make().double().eval()
    x = torch.randint(9, (3, 5)) if shape is None else torch.randn(shape).double()
    found = bs.activation_moments(model, x)[module].mean
    return found, oracle.hooked_mean(model, x, module, axis)


@report("unit axis of the means")
def of_training_batches_of_a_ViT() -> tuple[Tensor, Tensor]:
    """Without a probe, inside the user's forward pass."""
    make, shape, module, axis = networks()["ViT"]
    model, x = make().double().train(), torch.randn(shape).double()
    with bs.instrument(model) as log:
        model(x)
    table = log.table()
    rows = table[table.layer == module].sort_values("unit")
    return torch.tensor(rows["mean"].to_numpy()), oracle.hooked_mean(model, x, module, axis)


@report("unit axis of the means")
def that_cannot_be_told_is_left_out() -> tuple[str, re.Pattern]:
    model = Applied(LINE(), lambda h: h.mT @ h)
    said = warned(lambda: bs.activation_moments(model, torch.randn(4, 2, 6)))
    return said, re.compile(r"UserWarning.*'act'.*left out.*unit_axis")
