"""A seed → a random model: layers, activations, branches and reshapes, drawn until a head fits.

A tensor on the way has one of three forms: ``"vector"`` (batch, units), ``"sequence"`` (batch,
positions, units) or ``"map"`` (batch, channels, *places). Every part is tried on random numbers as
soon as it is drawn; one that does not run, or has outputs that are not finite, is drawn again.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from . import parts, wrongs
from .parts import Step, Steps

ACTIVATIONS: list[Callable[[], nn.Module]] = [
    nn.ReLU, nn.ELU, nn.Tanh, nn.Sigmoid, nn.GELU, nn.SiLU, nn.LeakyReLU, nn.Softplus, nn.SELU,
    nn.Mish, nn.Hardtanh, nn.PReLU, nn.CELU, nn.Softsign, nn.Identity, nn.RReLU,
    partial(nn.ReLU, inplace=True), partial(nn.ELU, inplace=True), partial(nn.SiLU, inplace=True),
    partial(nn.LeakyReLU, 0.2, inplace=True), partial(nn.Hardswish, inplace=True),
]  # fmt: skip
FUNCTIONS: list[Callable[[Tensor], Tensor]] = [
    torch.tanh, F.elu, F.relu, F.gelu, torch.sin, torch.relu_, F.softplus, torch.sigmoid,
    partial(F.elu, inplace=True), partial(F.leaky_relu, negative_slope=0.1, inplace=True),
    lambda x: x.square() * 0.3, lambda x: x.mul_(0.5).add_(0.2), lambda x: x.clamp(-1, 1),
    lambda x: x * torch.tanh(x),
    parts.Cube.apply, parts.Straight.apply, lambda x: 0.5 * x + x.detach(),
]  # fmt: skip
MOST_FEATURES = 48


@dataclass
class Drawn:
    """What is known of a model beside the model: which layers must not be measured, and why."""

    refused: str | None = None  # why the model as a whole must be refused
    unfit: dict[nn.Module, str] = field(default_factory=dict)  # layers that must be left out
    optional: set[nn.Module] = field(default_factory=set)  # that may be measured or left out
    axes: dict[nn.Module, int] = field(default_factory=dict)  # of the units of activation modules
    used: list[str] = field(default_factory=list)  # names of the rules
    classes_on_axis_1: bool = False
    face: str = "plain"


class Grammar:
    """Draws the parts of one model."""

    def __init__(self, rng: random.Random, dtype: torch.dtype, wrong: bool) -> None:
        self.rng, self.dtype, self.wrong, self.drawn = rng, dtype, wrong, Drawn()
        self.depth = 0

    # -- tools -------------------------------------------------------------------------------------

    def chance(self, p: float) -> bool:
        return self.rng.random() < p

    def pick(self, *choices):
        return self.rng.choice(choices)

    def width(self) -> int:
        return self.rng.randint(2, 6)

    def bias(self) -> bool:
        return self.chance(0.75)

    def prepared(self, module: nn.Module) -> nn.Module:
        """Biases, norms and running statistics of a trained model are not 0 and 1."""
        for m in module.modules():
            if isinstance(m, nn.modules.batchnorm._NormBase):
                if m.running_mean is not None:
                    m.running_mean.normal_(0, 0.5)
                    m.running_var.uniform_(0.5, 2)
            if isinstance(m, (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)):
                if m.weight is not None:
                    nn.init.normal_(m.weight, 1, 0.3)
                if m.bias is not None:
                    nn.init.normal_(m.bias, 0, 0.3)
        return module.to(self.dtype)

    def tried(self, step: Step, x: Tensor) -> Tensor | None:
        """The step's output for two examples, or None where it does not run."""
        try:
            with torch.no_grad(), torch.random.fork_rng():
                if isinstance(step, nn.Module):
                    self.prepared(step).eval()
                out = step(x.clone())
                if "GroupNorm" in repr(step):  # PyTorch refuses groups of one number
                    step(x[:1].clone())
        except (RuntimeError, ValueError, AssertionError, IndexError):
            return None
        good = isinstance(out, Tensor) and out.dim() >= 2 and len(out) == len(x)
        good = good and out[0].numel() > 0 and bool(out.isfinite().all())
        return out if good and out[0].numel() <= 400 and out.abs().max() > 1e-6 else None

    def step(self, form: str, x: Tensor, same: bool = False) -> tuple[Step, str, Tensor]:
        """A random step from one form to another.

        Args:
            same: whether the shape must stay as it is.
        """
        for _ in range(60):
            rules = RULES[form]
            name = self.rng.choices(list(rules), [weight for weight, _ in rules.values()])[0]
            before = (dict(self.drawn.unfit), set(self.drawn.optional), self.drawn.refused)
            self.depth += 1
            drawn = rules[name][1](self, x) if self.depth < 4 or name in FLAT else None
            self.depth -= 1
            if drawn is not None:
                step, after = drawn
                out = self.tried(step, x)
                if out is not None and (not same or (after == form and out.shape == x.shape)):
                    if out.abs().max() > 10:
                        factor = 3 / float(out.abs().max())
                        step, out = Steps(step, lambda h, f=factor: h * f), out * factor
                    self.note(step, after, out)
                    self.drawn.used.append(f"{form}.{name}")
                    return step, after, out
            self.drawn.unfit, self.drawn.optional, self.drawn.refused = before
        return nn.Identity(), form, x

    def note(self, step: Step, form: str, out: Tensor) -> None:
        """The axis of the units in what a single module returns."""
        if isinstance(step, nn.Module) and next(step.children(), None) is None:
            self.drawn.axes[step] = 1 if form == "map" else out.dim() - 1

    def block(self, form: str, x: Tensor, steps: int = 2, same: bool = True) -> nn.Module | None:
        """A few steps in a container; None where none fits."""
        chosen: list[Step] = []
        for _ in range(self.rng.randint(1, steps)):
            step, form, x = self.step(form, x, same=same)
            chosen.append(step)
        return self.contained(chosen)

    def contained(self, steps: list[Step]) -> nn.Module:
        module = self.container(steps)
        kind = self.rng.random()
        if kind < 0.03:
            module.register_forward_hook(lambda m, a, out: out * 1.1)
        elif kind < 0.05:
            module.register_forward_pre_hook(
                lambda m, a: (a[0] * 0.9,) if a[0].is_floating_point() else None
            )
        return module

    def container(self, steps: list[Step]) -> nn.Module:
        if all(isinstance(s, nn.Module) for s in steps):
            modules = [s for s in steps if isinstance(s, nn.Module)]
            if len(modules) == 1 and self.chance(0.5):
                return modules[0]
            return self.pick(nn.Sequential, parts.Named, Steps)(*modules)
        return Steps(*steps)

    # -- layers ------------------------------------------------------------------------------------

    def linear(self, d: int, out: int | None = None) -> nn.Module:
        out = self.width() if out is None else out
        bias, kind = self.bias(), self.rng.random()
        if kind < 0.08:
            return parts.OwnLinear(d, out, bias)
        if kind < 0.1 and self.wrong:
            layer = wrongs.OtherForward(d, out, bias)
            self.drawn.unfit[layer] = "another forward"
            return layer
        return self.dressed(nn.Linear(d, out, bias))

    def dressed(self, layer: nn.Module) -> nn.Module:
        """Perhaps with a parametrization, a hook, a frozen weight, or called by keyword."""
        kind = self.rng.random()
        if kind < 0.04:
            return parametrizations.weight_norm(layer)
        if kind < 0.07:
            return parametrizations.spectral_norm(layer)
        if kind < 0.09 and isinstance(layer, nn.Linear) and len({*layer.weight.shape}) == 1:
            parametrize.register_parametrization(layer, "weight", parts.Symmetric())
        elif kind < 0.1:
            parametrize.register_parametrization(layer, "weight", parts.Halved())
        elif kind < 0.13:
            layer.register_forward_hook(lambda m, a, out: out * 1.5)
        elif kind < 0.16:
            layer.register_forward_pre_hook(lambda m, a: (a[0] + 0.3,))
        elif kind < 0.18:
            layer.register_forward_hook(lambda m, a, out: None)
        elif kind < 0.24:
            layer.weight.requires_grad_(False)
            if layer.bias is not None and self.chance(0.6):
                layer.bias.requires_grad_(False)
        elif kind < 0.26 and layer.bias is not None:
            layer.bias.requires_grad_(False)
        elif kind < 0.29:
            return parts.Keyword(layer)
        elif kind < 0.31:
            layer.register_full_backward_hook(lambda m, gi, go: None)
        return layer

    def convolution(self, channels: int, dims: int, out: int | None = None) -> nn.Module:
        kind = getattr(nn, f"Conv{dims}d")
        groups = self.pick(1, 1, 1, channels, *[g for g in (2, 3) if channels % g == 0])
        out = groups * self.rng.randint(1, max(1, 6 // groups)) if out is None else out
        groups = groups if out % groups == 0 else 1
        most = 3 if dims < 3 else 2

        def sizes(low: int, high: int) -> int | tuple[int, ...]:
            if self.chance(0.6):
                return self.rng.randint(low, high)
            return tuple(self.rng.randint(low, high) for _ in range(dims))

        kernel, stride = sizes(1, most), self.pick(1, 1, sizes(1, 2))
        padding = self.pick(0, sizes(0, 2), "same" if stride == 1 else "valid", "valid")
        dilation = self.pick(1, 1, sizes(1, 2))
        mode = self.pick("zeros", "zeros", "reflect", "replicate", "circular")
        return self.dressed(
            kind(channels, out, kernel, stride, padding, dilation, groups, self.bias(), mode)
        )

    def transposed(self, channels: int, dims: int) -> nn.Module:
        kind = getattr(nn, f"ConvTranspose{dims}d")
        groups = self.pick(1, 1, *[g for g in (2, 3, channels) if channels % g == 0])
        out = groups * self.rng.randint(1, max(1, 5 // groups))
        kernel, stride = self.rng.randint(1, 3 if dims < 3 else 2), self.rng.randint(1, 2)
        extra = self.rng.randint(0, 1) if stride > 1 else 0
        dilation = self.pick(1, 1, 2)
        padding = self.rng.randint(0, 1)
        return self.dressed(
            kind(channels, out, kernel, stride, padding, extra, groups, self.bias(), dilation)
        )

    def activation(self) -> Step:
        return self.pick(*ACTIVATIONS)() if self.chance(0.6) else self.pick(*FUNCTIONS)


# -- rules: (grammar, x) → (step, form of the output), or None where the rule does not fit ---------

Rule = Callable[[Grammar, Tensor], tuple[Step, str] | None]


def _activation(form: str) -> Rule:
    return lambda g, x: (g.activation(), form)


def _wrapped(form: str) -> dict[str, tuple[float, Rule]]:
    """Rules that hold for every form."""

    def residual(g: Grammar, x: Tensor):
        block = g.block(form, x)
        ways = ("plain", "plain", "inplace", "overwrite", "alpha", "lerp")
        return (parts.Residual(block, g.pick(*ways)), form)

    def concat(g: Grammar, x: Tensor):
        axis = 1 if form == "map" else -1
        branches = [g.block(form, x) for _ in range(g.rng.randint(1, 2))]
        keep = len(branches) == 1 or g.chance(0.5)
        return (parts.Concat(branches, axis, keep), form)

    def gate(g: Grammar, x: Tensor):
        return (parts.Gate(g.block(form, x), g.block(form, x)), form)

    def checkpointed(g: Grammar, x: Tensor):
        block = g.block(form, x)
        reentrant = g.wrong and g.chance(0.3)
        if reentrant:
            g.drawn.unfit |= dict.fromkeys(block.modules(), "reentrant checkpoint")
        return (parts.Checkpoint(block, reentrant), form)

    def no_grad(g: Grammar, x: Tensor):
        block = g.block(form, x)
        g.drawn.optional |= set(block.modules())
        return (parts.NoGrad(block), form)

    def unreached(g: Grammar, x: Tensor):
        return (parts.Unreached(g.block(form, x), x.shape[-1]), form)

    def coupled(g: Grammar, x: Tensor):
        if not g.wrong:
            return None
        function = g.pick(*wrongs.COUPLED, wrongs.noisy)
        g.drawn.refused = function.__name__
        return (function, form)

    def routed(g: Grammar, x: Tensor):
        if not g.wrong or form == "map":
            return None
        step = wrongs.Routed(x.shape[-1])
        g.drawn.unfit[step.expert] = "routed"
        return (step, form)

    def twice(g: Grammar, x: Tensor):
        if form == "map":
            return None
        return (parts.Twice(nn.Linear(x.shape[-1], x.shape[-1], g.bias())), form)

    return {
        "residual": (3, residual),
        "concat": (1.5, concat),
        "gate": (1, gate),
        "checkpoint": (0.8, checkpointed),
        "no_grad": (0.15, no_grad),
        "unreached": (0.4, unreached),
        "counting": (0.5, lambda g, x: (parts.Counting(), form)),
        "dropout": (0.5, lambda g, x: (nn.Dropout(0.4, inplace=g.chance(0.3)), form)),
        "coupled": (2, coupled),
        "routed": (0.8, routed),
        "twice": (0.5, twice),
        "detached": (0.1, lambda g, x: (lambda h: h.detach() + 0.1 * h, form)),
    }


def _norm_of_vectors(g: Grammar, x: Tensor):
    d = x.shape[-1]
    return g.pick(
        partial(nn.LayerNorm, d, elementwise_affine=g.chance(0.7)), partial(nn.RMSNorm, d, eps=1e-6)
    )()


def _batch_norm(g: Grammar, channels: int, dims: int):
    affine, tracked = g.chance(0.8), not (g.wrong and g.chance(0.3))
    if not tracked:
        g.drawn.refused = "batch statistics"
    kind = getattr(nn, f"BatchNorm{max(1, dims)}d")
    return kind(channels, affine=affine, track_running_stats=tracked)


def _vector_norm(g: Grammar, x: Tensor):
    if g.chance(0.4):
        return _batch_norm(g, x.shape[1], 0), "vector"
    if x.shape[1] % 2 == 0 and g.chance(0.3):
        return nn.GroupNorm(2, x.shape[1]), "vector"
    return _norm_of_vectors(g, x), "vector"


def _repeat_linear(form: str) -> Rule:
    def rule(g: Grammar, x: Tensor):
        between = g.pick(torch.tanh, F.elu, nn.ReLU(), nn.ELU(inplace=True))
        return parts.Repeat(g.linear(x.shape[-1], x.shape[-1]), g.rng.randint(2, 3), between), form

    return rule


def _mixture(form: str) -> Rule:
    def rule(g: Grammar, x: Tensor):
        count, out = g.rng.randint(2, 3), g.width()
        experts = [g.linear(x.shape[-1], out) for _ in range(count)]
        return parts.Mixture(experts, g.linear(x.shape[-1], count)), form

    return rule


def _tied(form: str) -> Rule:
    def rule(g: Grammar, x: Tensor):
        if not g.wrong:
            return None
        d = x.shape[-1]
        step = g.pick(*(partial(wrongs.Tied, d, way) for way in ("two", "transposed", "function")))
        step = g.pick(step, partial(wrongs.Unowned, d, g.width()))()
        g.drawn.unfit |= dict.fromkeys(step.children(), "tied or unowned")
        return step, form

    return rule


def _to_sequence(g: Grammar, x: Tensor):
    d = x.shape[1]
    if d % 2 == 0 and g.chance(0.6):
        t = g.pick(2, d // 2)
        return g.pick(nn.Unflatten(1, (t, d // t)), lambda h: h.view(len(h), t, -1)), "sequence"
    return lambda h: torch.stack([h, 0.5 * h + 0.1, h.cos()], 1), "sequence"


def _to_map(g: Grammar, x: Tensor):
    d = x.shape[1]
    if d % 2 == 0 and d > 2:
        return (lambda h: h.reshape(len(h), 2, -1)), "map"
    return (lambda h: h[:, None, :, None] * torch.ones_like(h)[:, None, None, :]), "map"


def _fold(g: Grammar, x: Tensor):
    if not g.wrong:
        return None
    step = g.pick(wrongs.Folded, wrongs.SequenceFirst)(x.shape[-1], g.width())
    g.drawn.unfit[step.layer] = "another first axis"
    return step, "sequence"


def _positions(g: Grammar, x: Tensor):
    kind = g.rng.random()
    if kind < 0.3:
        return parts.ClassToken(x.shape[1], x.shape[2]), "sequence"
    if kind < 0.6:
        return parts.TokenMix(x.shape[1], g.rng.randint(1, 4)), "sequence"
    if kind < 0.8:
        return parts.ConvOverPositions(g.convolution(x.shape[2], 1)), "sequence"
    return (lambda h: torch.cat([h, h.mean(1, keepdim=True)], 1)), "sequence"


def _attention(g: Grammar, x: Tensor):
    d = x.shape[2]
    heads = g.pick(*[h for h in (1, 2, 3) if d % h == 0])
    return parts.Attention(d, heads, g.pick("plain", "joint", "sdpa")), "sequence"


def _fused(g: Grammar, x: Tensor):
    d = x.shape[2]
    heads = g.pick(*[h for h in (1, 2, 3) if d % h == 0])
    kind, step = g.rng.random(), None
    if kind < 0.35:
        layer = nn.MultiheadAttention(d, heads, batch_first=True, bias=g.bias())
        step = parts.SelfAttention(layer, g.chance(0.5))
    elif kind < 0.7:
        cell = g.pick(nn.LSTM, nn.GRU, nn.RNN)
        layers, both = g.rng.randint(1, 2), g.chance(0.3)
        layer = cell(d, 3, layers, bias=g.bias(), batch_first=True, bidirectional=both)
        step = parts.Recurrent(layer)
    else:
        first = g.chance(0.5)
        step = nn.TransformerEncoderLayer(
            d, heads, 2 * d, 0.0, g.pick("relu", "gelu"), batch_first=True, norm_first=first
        )
    g.drawn.optional |= set(step.modules())
    return step, "sequence"


def _bilinear(g: Grammar, x: Tensor):
    layer = nn.Bilinear(x.shape[-1], x.shape[-1], g.width())
    g.drawn.optional.add(layer)
    return Steps(_Both(layer)), "vector"


class _Both(nn.Module):
    """A bilinear layer on one input."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, torch.tanh(x))


def _pooled_sequence(g: Grammar, x: Tensor):
    pool = g.pick(
        lambda h: h.mean(1), lambda h: h[:, -1], lambda h: h[:, 0].clone(), lambda h: h.amax(1),
        lambda h: torch.logsumexp(h, 1), lambda h: torch.einsum("ntd,ntd->nd", h, h) * 0.3,
    )  # fmt: skip
    small = x.shape[1] * x.shape[2] <= MOST_FEATURES
    return (
        (g.pick(nn.Flatten(), lambda h: h.reshape(len(h), -1)), "vector")
        if (small and g.chance(0.3))
        else (pool, "vector")
    )


def _sequence_view(g: Grammar, x: Tensor):
    return g.pick(
        (lambda h: h.transpose(1, 2), "map"),
        (lambda h: h.permute(0, 2, 1).contiguous(), "map"),
        (lambda h: h[:, :, None].transpose(1, 3), "map"),
        (lambda h: h[:, ::2], "sequence"),
        (lambda h: h.flip(1), "sequence"),
        (lambda h: h.roll(1, 1), "sequence"),
        (lambda h: h.cumsum(1) * 0.5, "sequence"),
    )


def _map_norm(g: Grammar, x: Tensor):
    channels, dims = x.shape[1], x.dim() - 2
    if g.chance(0.5):
        return _batch_norm(g, channels, dims), "map"
    if g.chance(0.3):
        return getattr(nn, f"InstanceNorm{dims}d")(channels, affine=g.chance(0.5)), "map"
    if g.chance(0.3):
        return nn.LayerNorm(list(x.shape[1:])), "map"
    return nn.GroupNorm(g.pick(1, channels, *[2] * (channels % 2 == 0)), channels), "map"


def _map_pool(g: Grammar, x: Tensor):
    dims = x.dim() - 2
    kind = g.pick("MaxPool", "AvgPool", "AdaptiveAvgPool", "AdaptiveMaxPool", "LPPool")
    pool = getattr(nn, f"{kind}{dims}d")
    if kind.startswith("Adaptive"):
        return pool(g.rng.randint(1, 2)), "map"
    if kind == "LPPool":
        return Steps(lambda h: h.abs() + 0.1, pool(2, 2)), "map"
    return pool(2, g.pick(1, 2), g.rng.randint(0, 1)), "map"


def _map_view(g: Grammar, x: Tensor):
    dims = x.dim() - 2
    choices: list[Step] = [
        lambda h: h.flip(-1),
        lambda h: h[..., ::2],
        lambda h: h.roll(1, -1),
        lambda h: F.pad(h, (1, 0), value=0.3),
        lambda h: h.transpose(-1, -2).contiguous().transpose(-1, -2),
        lambda h: h.flip(1),
    ]
    if x.shape[1] % 2 == 0:
        choices.append(lambda h: h.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2))
    if dims == 2:
        choices += [
            nn.Upsample(scale_factor=2),
            nn.ZeroPad2d((1, 0, 0, 1)),
            nn.UpsamplingNearest2d(3),
        ]
        choices += [lambda h: h.transpose(-1, -2), lambda h: F.interpolate(h, size=(2, 3))]
        choices += [nn.ReflectionPad2d((1, 0, 0, 0))]
        if x.shape[1] % 4 == 0:
            choices.append(nn.PixelShuffle(2))
        if x.shape[2] % 2 == 0 and x.shape[3] % 2 == 0:
            choices.append(nn.PixelUnshuffle(2))
    return g.pick(*choices), "map"


def _map_out(g: Grammar, x: Tensor):
    places, kind = list(range(2, x.dim())), g.rng.random()
    if kind < 0.35:
        return (lambda h: h.mean(places)), "vector"
    if kind < 0.5:
        return (lambda h: h.amax(places)), "vector"
    if kind < 0.75 and x[0].numel() <= MOST_FEATURES:
        return g.pick(nn.Flatten(), lambda h: h.flatten(1)), "vector"
    return (lambda h: h.flatten(2).transpose(1, 2)), "sequence"


def _squeeze(g: Grammar, x: Tensor):
    conv = getattr(nn, f"Conv{x.dim() - 2}d")
    return parts.SqueezeExcite(x.shape[1], g.chance(0.5), conv), "map"


def _repeat_conv(g: Grammar, x: Tensor):
    layer = g.convolution(x.shape[1], x.dim() - 2, x.shape[1])
    return parts.Repeat(layer, 2, g.pick(torch.tanh, nn.ELU())), "map"


def _written(form: str) -> Rule:
    """Writes into a part of its input."""

    def write(h: Tensor) -> Tensor:
        h = h + 0.1
        h[:, :1] = h[:, :1] * 0.5
        h[:, -1] += 0.2
        return h

    return lambda g, x: (write, form)


RULES: dict[str, dict[str, tuple[float, Rule]]] = {
    "vector": {
        "linear": (8, lambda g, x: (g.linear(x.shape[-1]), "vector")),
        "activation": (6, _activation("vector")),
        "norm": (1.5, _vector_norm),
        "repeat": (1, _repeat_linear("vector")),
        "mixture": (0.6, _mixture("vector")),
        "scale": (0.3, lambda g, x: (parts.Scale(x.shape[-1]), "vector")),
        "tied": (1.5, _tied("vector")),
        "to_sequence": (1, _to_sequence),
        "to_map": (0.8, _to_map),
        "bilinear": (0.15, _bilinear),
        "written": (0.5, _written("vector")),
        "slice": (0.4, lambda g, x: (lambda h: h[:, 1:], "vector")),
        "outer": (0.3, lambda g, x: (lambda h: torch.einsum("ni,nj->nij", h, h) * 0.5, "sequence")),
        **_wrapped("vector"),
    },
    "sequence": {
        "linear": (6, lambda g, x: (g.linear(x.shape[-1]), "sequence")),
        "activation": (4, _activation("sequence")),
        "norm": (1.5, lambda g, x: (_norm_of_vectors(g, x), "sequence")),
        "attention": (2, _attention),
        "positions": (2.5, _positions),
        "repeat": (0.6, _repeat_linear("sequence")),
        "mixture": (0.5, _mixture("sequence")),
        "tied": (1, _tied("sequence")),
        "fold": (1.2, _fold),
        "fused": (0.5, _fused),
        "pooled": (3, _pooled_sequence),
        "view": (1.5, _sequence_view),
        "scale": (0.3, lambda g, x: (parts.Scale(x.shape[-1]), "sequence")),
        "written": (0.4, _written("sequence")),
        **_wrapped("sequence"),
    },
    "map": {
        "convolution": (8, lambda g, x: (g.convolution(x.shape[1], x.dim() - 2), "map")),
        "transposed": (1.5, lambda g, x: (g.transposed(x.shape[1], x.dim() - 2), "map")),
        "activation": (4, _activation("map")),
        "norm": (2, _map_norm),
        "pool": (2, _map_pool),
        "view": (1.5, _map_view),
        "squeeze": (0.7, _squeeze),
        "repeat": (0.5, _repeat_conv),
        "linear": (0.4, lambda g, x: (g.linear(x.shape[-1]), "map")),
        "written": (0.4, _written("map")),
        "out": (4, _map_out),
        **_wrapped("map"),
    },
}
# Rules without blocks inside, which are drawn at any depth.
FLAT = {"linear", "activation", "norm", "convolution", "scale", "counting", "dropout", "view"}
