"""Modules that random models are made of, beside those of PyTorch.

Each is something that people write: a residual branch, attention by hand, a gate, a cache. None
knows that it will be measured.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Step = nn.Module | Callable[[Tensor], Tensor]


class Steps(nn.Module):
    """Modules and plain functions, one after the other."""

    def __init__(self, *steps: Step) -> None:
        super().__init__()
        self.layers = nn.ModuleList(s for s in steps if isinstance(s, nn.Module))
        self.order = [None if isinstance(s, nn.Module) else s for s in steps]

    def forward(self, x: Tensor) -> Tensor:
        layers = iter(self.layers)
        for function in self.order:
            x = next(layers)(x) if function is None else function(x)
        return x


class Named(nn.Module):
    """Modules in a dict, called by their names."""

    def __init__(self, *modules: nn.Module) -> None:
        super().__init__()
        self.stages = nn.ModuleDict({f"stage{i}": module for i, module in enumerate(modules)})

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages.values():
            x = stage(x)
        return x


class Face(nn.Module):
    """A model with another way to be called, or to return what it returns."""

    def __init__(self, net: nn.Module, face: str) -> None:
        super().__init__()
        self.net, self.face = net, face
        self.takes_two = face in ("two inputs", "dict")

    def forward(self, x: Tensor, gain: Tensor | None = None):
        out = self.net(x)
        if gain is not None:
            out = out * gain.to(out).view(-1, *[1] * (out.dim() - 1))
        if self.face == "tuple":
            return out, x
        return {"logits": out, "features": x} if self.face == "mapping" else out


class Keyword(nn.Module):
    """Calls a layer with its input as a keyword."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(input=x)


class Residual(nn.Module):
    """``x + f(x)``, written in one of the usual ways."""

    def __init__(self, branch: nn.Module, way: str) -> None:
        super().__init__()
        self.branch, self.way = branch, way

    def forward(self, x: Tensor) -> Tensor:
        if self.way == "inplace":
            h = self.branch(x)
            h += x
            return h
        if self.way == "overwrite":  # x is changed after the branch has read it
            h = 2 * x
            u = self.branch(h)
            h += u
            return h
        if self.way == "alpha":
            return torch.add(x, self.branch(x), alpha=0.5)
        if self.way == "lerp":
            return torch.lerp(x, self.branch(x), 0.3)
        return x + self.branch(x)


class Concat(nn.Module):
    """The outputs of branches side by side, the input among them where it is kept."""

    def __init__(self, branches: list[nn.Module], axis: int, keep: bool) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)
        self.axis, self.keep = axis, keep

    def forward(self, x: Tensor) -> Tensor:
        parts = [branch(x) for branch in self.branches]
        return torch.cat([x, *parts] if self.keep else parts, self.axis)


class Gate(nn.Module):
    """``f(x) · σ(g(x))``."""

    def __init__(self, value: nn.Module, gate: nn.Module) -> None:
        super().__init__()
        self.value, self.gate = value, gate

    def forward(self, x: Tensor) -> Tensor:
        return self.value(x) * self.gate(x).sigmoid()


class Mixture(nn.Module):
    """Experts, weighted by a softmax of the input."""

    def __init__(self, experts: list[nn.Module], router: nn.Module) -> None:
        super().__init__()
        self.experts, self.router = nn.ModuleList(experts), router

    def forward(self, x: Tensor) -> Tensor:
        weights = self.router(x).softmax(-1)
        values = torch.stack([expert(x) for expert in self.experts], -1)
        return torch.einsum("...de,...e->...d", values, weights)


class Repeat(nn.Module):
    """One layer that runs several times."""

    def __init__(self, layer: nn.Module, times: int, between: Step) -> None:
        super().__init__()
        self.layer, self.times, self.between = layer, times, between

    def forward(self, x: Tensor) -> Tensor:
        for i in range(self.times):
            x = self.between(self.layer(x)) if i else self.layer(x)
        return x


class Twice(nn.Module):
    """One layer under two names."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.first, self.again = layer, layer

    def forward(self, x: Tensor) -> Tensor:
        return self.again(torch.tanh(self.first(x)))


class Checkpoint(nn.Module):
    """A block that is computed again in the backward pass.

    It gets a copy: where a block changes its input, PyTorch computes it again from the changed one,
    and its own gradients are wrong.
    """

    def __init__(self, block: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.block, self.reentrant, self.off = block, reentrant, False

    def forward(self, x: Tensor) -> Tensor:
        if self.off or not torch.is_grad_enabled():
            return self.block(x.clone())
        return checkpoint(lambda x: self.block(x.clone()), x, use_reentrant=self.reentrant)


class NoGrad(nn.Module):
    """A block that runs without gradients."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            h = self.block(x)
        return x.sum(-1, keepdim=True) + h


class Attention(nn.Module):
    """Scaled dot products of linear layers, with heads."""

    def __init__(self, width: int, heads: int, way: str) -> None:
        super().__init__()
        self.heads, self.way = heads, way
        if way == "joint":
            self.qkv = nn.Linear(width, 3 * width)
        else:
            self.q, self.k = nn.Linear(width, width), nn.Linear(width, width, bias=way != "sdpa")
            self.v = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, t, d = x.shape
        q, k, v = (
            self.qkv(x).chunk(3, -1) if self.way == "joint" else (self.q(x), self.k(x), self.v(x))
        )
        q, k, v = (a.view(n, t, self.heads, -1).transpose(1, 2) for a in (q, k, v))
        if self.way == "sdpa":
            h = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            scores = torch.einsum("nhtd,nhsd->nhts", q, k) / (d // self.heads) ** 0.5
            h = scores.softmax(-1) @ v
        return self.out(h.transpose(1, 2).reshape(n, t, d))


class TokenMix(nn.Module):
    """A linear layer over the positions."""

    def __init__(self, positions: int, out: int) -> None:
        super().__init__()
        self.mix = nn.Linear(positions, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(x.transpose(1, 2)).transpose(1, 2)


class ConvOverPositions(nn.Module):
    """A convolution over the positions of (batch, positions, inputs)."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.mT).mT


class ClassToken(nn.Module):
    """A learned position in front of the others, and learned numbers for each."""

    def __init__(self, positions: int, width: int) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.place = nn.Parameter(torch.randn(positions + 1, width))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.place


class SqueezeExcite(nn.Module):
    """Channels scaled by what a small network makes of their means."""

    def __init__(self, channels: int, linear: bool, conv: type[nn.Module]) -> None:
        super().__init__()
        make = nn.Linear if linear else (lambda a, b: conv(a, b, 1))
        self.linear = linear
        self.down, self.up = make(channels, 2), make(2, channels)
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        places = list(range(2, x.dim()))
        mean = x.mean(places, keepdim=not self.linear)
        scale = self.up(self.act(self.down(mean))).sigmoid()
        return x * (scale[(...,) + (None,) * len(places)] if self.linear else scale)


class Recurrent(nn.Module):
    """A recurrent layer of which the outputs are kept."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


class SelfAttention(nn.Module):
    """PyTorch's attention of a sequence with itself."""

    def __init__(self, layer: nn.Module, weights: bool) -> None:
        super().__init__()
        self.layer, self.weights = layer, weights

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, x, x, need_weights=self.weights)[0]


class Counting(nn.Module):
    """Keeps a count, a list, a cache and a buffer, none of which has a part in the outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.history, self.cache = 0, [], None
        self.register_buffer("seen", torch.zeros(()))
        self.notes = {"shapes": []}

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.history.append(float(x.detach().mean()))
        self.cache = x.detach()
        self.seen += len(x)
        self.notes["shapes"].append(tuple(x.shape))
        return x


class Scale(nn.Module):
    """Learned factors of the units on the last axis."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.factor = nn.Parameter(1 + 0.3 * torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


class Unreached(nn.Module):
    """Has a layer that is never called, and one whose output is dropped."""

    def __init__(self, block: nn.Module, width: int) -> None:
        super().__init__()
        self.block, self.spare, self.dropped = block, nn.Linear(3, 2), nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        self.dropped(x)
        return self.block(x)


class Cube(torch.autograd.Function):
    """``x³`` with a backward pass by hand, which cannot run for several seeds at once."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        assert g.shape == x.shape and float(g.abs().sum()) >= 0
        return 3 * x**2 * g


class Straight(torch.autograd.Function):
    """The sign, whose backward pass is that of a clipped identity."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sign()

    @staticmethod
    def backward(ctx, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return g * (x.abs() < 1)


class Symmetric(nn.Module):
    """A parametrization: the symmetric part of a square weight."""

    def forward(self, weight: Tensor) -> Tensor:
        return (weight + weight.mT) / 2


class Halved(nn.Module):
    """A parametrization: half the weight."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


class OwnLinear(nn.Linear):
    """A linear layer with a forward of its own, that computes the same."""

    def forward(self, input: Tensor) -> Tensor:
        return torch.einsum("...i,ui->...u", input, self.weight) + (
            0.0 if self.bias is None else self.bias
        )
