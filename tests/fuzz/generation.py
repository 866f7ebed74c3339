"""A seed → a case: a model, a probe, labels and options; always the same for the same seed."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from . import parts, wrongs
from .grammar import Drawn, Grammar
from .parts import Step

RANDOM_IN_TRAINING = (
    nn.modules.dropout._DropoutNd, nn.modules.batchnorm._NormBase, nn.RReLU,
    nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.RNNBase,
)  # fmt: skip
CROSS = "cross gradient"  # couples the errors of examples, and not their outputs
MOST_BACKWARD_PASSES = 160  # of the oracle


@dataclass
class Built:
    """A model, and what must hold of it."""

    model: nn.Module
    drawn: Drawn


@dataclass
class Case:
    """One random test, as a function of its seed."""

    seed: int
    dtype: torch.dtype
    x: Tensor
    y: Tensor
    likelihood: str
    options: dict[str, Any] = field(default_factory=dict)  # of unit_fisher
    built: Built | None = None
    class_axis: int = -1
    face: str = "plain"  # how the model is called, and what it returns
    mask: Tensor | None = None  # of the labels that count
    extra: dict[str, Any] = field(default_factory=dict)  # how the package is told of these
    without_gradients: bool = False  # where the package is called

    @property
    def largest_batch(self) -> int:
        """Of the probe, where no size is asked for."""
        return (len(self.x) + 1) // 2 if self.face == "batches" else len(self.x)

    @property
    def probe(self) -> tuple[Any, Any]:
        """What the package gets for x and y."""
        if self.face == "two inputs":
            return [(self.x, gains(self.x), self.y)], None
        if self.face == "dict":
            return {"x": self.x, "gain": gains(self.x)}, self.y
        if self.face == "batches":
            half = self.largest_batch
            parts = [(self.x[:half], self.y[:half]), (self.x[half:], self.y[half:])]
            return [part for part in parts if len(part[0])], None
        return self.x, self.y

    def build(self) -> Built:
        """The same model anew, with nothing in common but the values."""
        return build(self.seed)[0]


def case(seed: int) -> Case:
    """Returns the case of a seed."""
    built, x, rng, likelihood = build(seed)
    with repeatable(seed + 1), torch.no_grad():
        out = output_of(built.model, x)
        axis = 1 if built.drawn.classes_on_axis_1 else -1
        y = labels(out.movedim(axis, -1), likelihood)
        chosen = options(rng, len(x))
        if axis == 1 or (likelihood == "categorical" and out.dim() > 2 and rng.random() < 0.7):
            chosen["class_axis"] = axis % out.dim()
        made = Case(seed, out.dtype, x, y, likelihood, chosen, built, axis, built.drawn.face)
        if made.face == "tuple":
            made.extra["output"] = 0
        if made.face == "two inputs":
            made.extra["inputs"] = 2
            made.options.pop("batch_size", None)  # the batches are given
        elif made.face == "batches":
            made.options.pop("batch_size", None)
        if likelihood == "categorical" and rng.random() < 0.1:
            masked(made, rng)
    made.without_gradients = rng.random() < 0.1
    if rng.random() < 0.3:
        for p in built.model.parameters():
            p.grad = torch.ones_like(p)
    if rng.random() < 0.1 and made.x.is_floating_point():
        made.x.requires_grad_(True)
    return made


def masked(case: Case, rng: random.Random) -> None:
    """Leaves labels out, by a mask or by the label −100."""
    mask = torch.rand(case.y.shape) > 0.3
    if not mask.any() or case.face != "plain":
        return
    case.mask = mask
    if rng.random() < 0.5:
        case.extra["mask"] = mask
    else:
        case.y = case.y.where(mask, -100)


def gains(x: Tensor) -> Tensor:
    """The second input of models that have one."""
    dtype = x.dtype if x.is_floating_point() else torch.float32
    return 0.7 + 0.2 * x.detach().flatten(1).sum(1).to(dtype).sin()


def build(seed: int) -> tuple[Built, Tensor, random.Random, str]:
    """Draws model and probe; again with the next numbers where the outputs would be too many."""
    rng = random.Random(seed)
    dtype = rng.choice([torch.float64, torch.float64, torch.float32])
    with repeatable(seed, dtype):
        while True:
            grammar = Grammar(rng, dtype, wrong=rng.random() < 0.2)
            likelihood = rng.choice(["categorical"] * 4 + ["gaussian", "bernoulli"])
            n = rng.choice([1, 2, 3, 3, 4, 5, 6, 8])
            model, x = network(grammar, likelihood, n)
            if model is not None and fits(grammar.prepared(model), x, likelihood):
                faces = ["plain"] * 14 + ["two inputs", "dict", "batches", "tuple", "mapping"]
                grammar.drawn.face = rng.choice(faces)
                if grammar.drawn.face not in ("plain", "batches"):
                    model = parts.Face(model, grammar.drawn.face)
                trains = rng.random() < 0.15 and not any(
                    isinstance(m, RANDOM_IN_TRAINING) or hasattr(m, "parametrizations")
                    for m in model.modules()
                )
                model.train(trains)
                if grammar.wrong and rng.random() < 0.15:
                    coupled_by_training(model, grammar)
                if rng.random() < 0.1:
                    model.requires_grad_(False)
                return Built(model, grammar.drawn), x, rng, likelihood


def coupled_by_training(model: nn.Module, g: Grammar) -> None:
    """Puts a norm or dropout into training mode, where there is one."""
    kinds = (nn.Dropout, nn.modules.batchnorm._BatchNorm)
    found = [m for m in model.modules() if isinstance(m, kinds)]
    if found and g.drawn.refused is None:
        g.rng.choice(found).train()
        g.drawn.refused = "training mode"


def fits(model: nn.Module, x: Tensor, likelihood: str) -> bool:
    """Whether the model runs on its probe, and the oracle would not take too long."""
    with torch.no_grad():
        try:
            out = output_of(model.eval(), x)
        except ValueError:  # batch statistics of a single example
            return False
    passes = out.numel() * (2 if likelihood == "bernoulli" else 1)
    return passes <= MOST_BACKWARD_PASSES and bool(out.isfinite().all()) and out.dim() >= 2


def network(g: Grammar, likelihood: str, n: int) -> tuple[nn.Module | None, Tensor]:
    """Draws a whole model and its probe."""
    rng, steps = g.rng, []
    start = rng.choice(["vector"] * 3 + ["sequence"] * 3 + ["map"] * 4 + ["tokens"] * 2)
    if start == "vector":
        x = 0.5 + torch.randn(n, g.width())
        form = "vector"
    elif start == "sequence":
        x, form = 0.5 + torch.randn(n, rng.randint(1, 5), g.width()), "sequence"
    elif start == "map":
        dims = rng.choice([1, 2, 2, 3])
        places = [rng.randint(2, {1: 8, 2: 6, 3: 3}[dims]) for _ in range(dims)]
        x, form = 0.5 + torch.randn(n, rng.randint(1, 4), *places), "map"
    else:
        x, form = torch.randint(0, 7, (n, rng.randint(1, 5))), "sequence"
        steps.append(nn.Embedding(7, g.width(), padding_idx=rng.choice([None, 0])))
    two = x if n > 1 else torch.cat([x, x])
    h: Tensor | None = two[:2] if x.dtype == torch.long else two[:2].to(g.dtype)
    for step in steps:
        h = g.tried(step, h)
    if h is None:
        return None, x
    for _ in range(rng.randint(0, 7)):
        step, after, out = g.step(form, h)
        if differentiable([*steps, step], two[:2], g.dtype):
            steps, form, h = [*steps, step], after, out
    classes = rng.randint(2, 4) if likelihood == "categorical" else rng.randint(1, 3)
    for step, after in head(g, form, h, classes, likelihood):
        steps.append(step)
        out = g.tried(step, h)
        if out is None:
            return None, x
        form, h = after, out
    if not any(isinstance(m, parts.nn.Linear | nn.modules.conv._ConvNd) for s in steps
               if isinstance(s, nn.Module) for m in s.modules()):  # fmt: skip
        return None, x
    if h.shape[1 if g.drawn.classes_on_axis_1 else -1] < 2 and likelihood == "categorical":
        return None, x
    if not differentiable(steps, two[:2], g.dtype):
        return None, x
    model = steps[0] if len(steps) == 1 and isinstance(steps[0], nn.Module) else g.contained(steps)
    return model, x


def differentiable(steps: list[Step], x: Tensor, dtype: torch.dtype) -> bool:
    """Whether autograd can go back through the steps: not where a kept tensor is changed in place.

    What layers read they read as copies, for those are what a measurement has to take care of.
    """
    model = parts.Steps(*steps)
    handles = [
        m.register_forward_pre_hook(copied, with_kwargs=True)
        for m in model.modules()
        if isinstance(m, nn.Linear | nn.modules.conv._ConvNd)
    ]
    frozen = [p for p in model.parameters() if not p.requires_grad]
    try:
        for p in frozen:
            p.requires_grad_(True)
        x = x.clone() if x.dtype == torch.long else x.to(dtype).requires_grad_(True) * 1
        with torch.random.fork_rng():
            out = model(x)
            if out.requires_grad:
                by = list(model.parameters()) or [x]
                torch.autograd.grad(out.sum(), by, allow_unused=True)
        return True
    except RuntimeError:
        return False
    finally:
        for handle in handles:
            handle.remove()
        for p in frozen:
            p.requires_grad_(False)


def copied(module: nn.Module, args: tuple, kwargs: dict[str, Tensor]) -> tuple[tuple, dict]:
    """What a layer is called with, as copies."""
    return tuple(a.clone() for a in args), {name: a.clone() for name, a in kwargs.items()}


def head(
    g: Grammar, form: str, h: Tensor, classes: int, likelihood: str
) -> Iterator[tuple[Any, str]]:
    """What turns the last activations into outputs, classes last."""
    kind = g.rng.random()
    if form == "map":
        conv = getattr(nn, f"Conv{h.dim() - 2}d")(h.shape[1], classes, 1)
        if kind < 0.3:
            yield conv, "map"
            if likelihood == "categorical" and g.chance(0.5):
                g.drawn.classes_on_axis_1 = True
            else:
                yield (lambda x: x.movedim(1, -1)), "sequence"
            return
        if kind < 0.5:
            yield conv, "map"
            yield (lambda x: x.flatten(2).mean(2)), "vector"
            return
        yield (lambda x: x.flatten(2).mean(2)), "vector"
    elif form == "sequence" and kind < 0.6:
        yield (lambda x: x.mean(1)), "vector"
    width, kind = h.shape[1 if form == "map" else -1], g.rng.random()
    if kind < 0.15 and width >= 2:
        return
    if kind < 0.3:
        yield _Heads(g.linear(width, classes), g.linear(width, classes)), "vector"
    elif kind < 0.4:
        yield parts.Mixture([g.linear(width, classes) for _ in range(2)], nn.Linear(width, 2)), ""
    else:
        yield g.linear(width, classes), "vector"
    if g.chance(0.15):
        yield g.pick(torch.tanh, lambda x: x / 0.7, lambda x: x.log_softmax(-1)), "vector"
    if g.wrong and g.chance(0.1):
        g.drawn.refused = CROSS
        yield wrongs.cross_gradient, "vector"


class _Heads(nn.Module):
    """Two heads whose outputs are added."""

    def __init__(self, a: nn.Module, b: nn.Module) -> None:
        super().__init__()
        self.heads = nn.ModuleDict({"a": a, "b": b})

    def forward(self, x: Tensor) -> Tensor:
        return self.heads["a"](x) + 0.5 * self.heads["b"](torch.tanh(x))


def options(rng: random.Random, n: int) -> dict[str, Any]:
    """Random options of `unit_fisher`."""
    chosen: dict[str, Any] = {"labels": rng.choice(["expected", "expected", "empirical"])}
    chosen["damping"] = rng.choice([1e-4, 1e-2])
    if rng.random() < 0.3 and n > 1:
        chosen["batch_size"] = rng.randint(1, n)
    if rng.random() < 0.2:
        chosen["storage"] = rng.choice(["dense", "implicit"])
    if rng.random() < 0.15:
        chosen["weight_sharing"] = "expand"
    if rng.random() < 0.1:
        chosen["memory_budget"] = 2000
    if rng.random() < 0.1:
        chosen["units"] = rng.choice([[0], [0, 1]])
    return chosen


def labels(out: Tensor, likelihood: str) -> Tensor:
    """Random labels that fit the outputs."""
    if likelihood == "categorical":
        return torch.randint(0, out.shape[-1], out.shape[:-1])
    return torch.randn_like(out) if likelihood == "gaussian" else (torch.rand_like(out) > 0.5) * 1.0


def output_of(model: nn.Module, x: Tensor) -> Tensor:
    """Runs a model on a copy of the examples, which it may write into."""
    with torch.random.fork_rng():
        return called(model, x)


def called(model: nn.Module, x: Tensor) -> Tensor:
    """Calls a model by its face, and returns its outputs."""
    if not isinstance(model, parts.Face):
        return model(x.clone())
    out = model(x.clone(), gains(x)) if model.takes_two else model(x.clone())
    return out[0] if model.face == "tuple" else out["logits"] if model.face == "mapping" else out


@contextmanager
def repeatable(seed: int, dtype: torch.dtype | None = None) -> Iterator[None]:
    """PyTorch's numbers come from the seed inside the block, in a default dtype."""
    before = torch.get_default_dtype()
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(seed)
        torch.set_default_dtype(before if dtype is None else dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(before)
