"""Steps on sequences, biases without influence, and what a mean of the loss is over."""

import copy
import re
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import biasshift as bs
from biasshift.optim import UnitNaturalGradient

from . import oracle
from .table import report

DAMPING = 0.03
RULES = [*product(("q", "p", "none"), ("full", "diagonal", "none"))]


def sequences() -> tuple[nn.Sequential, Tensor, Tensor]:
    """A network of linear layers with a bias on (batch, positions, inputs), labels at each."""
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4)).double()
    x = torch.randn(30, 3, 3).double() + 0.5
    return model, x, torch.randint(4, (30, 3))


def of_sequences(
    model: nn.Sequential, layer: str, x: Tensor, y: Tensor, sharing: str
) -> tuple[Tensor, Tensor]:
    """F with labels y, and the layer's inputs. The network is the same at every position."""
    module = model.get_submodule(layer)
    with torch.no_grad():
        a = model[: int(layer)](x).flatten(0, 1)
    if sharing == "per_example":
        return oracle.blocks(module, lambda n: model(x[n]), len(x), y), a
    flat, positions = x.flatten(0, 1), x.shape[1]
    found = oracle.blocks(module, lambda n: model(flat[n]), len(flat), y.flatten())
    return found * positions, a  # a sum over positions, a mean over examples


@report(
    "updates on sequences",
    *((*rule, "empirical", "per_example") for rule in RULES),
    *(("q", scale, "empirical", "expand") for scale in ("full", "diagonal", "none")),
    *(("q", scale, "sampled", "per_example") for scale in ("full", "diagonal", "none")),
    ("p", "full", "sampled", "expand"),
)
def linear_with_bias_on_3_D_inputs(variant: tuple[str, str, str, str]) -> tuple[dict, dict]:
    center, scale, labels, sharing = variant
    model, x, y = sequences()
    drawn = y
    if labels == "sampled":
        p = model(x).detach().float().softmax(-1)
        drawn = torch.multinomial(p.flatten(0, 1), 1, generator=torch.Generator().manual_seed(3))
        drawn = drawn.view_as(y)
    original = copy.deepcopy(model)
    optimizer = UnitNaturalGradient(
        model,
        1.0,
        center,
        scale,
        damping=DAMPING,
        labels=labels,
        weight_sharing=sharing,
        decay=0.0,
        generator=torch.Generator().manual_seed(3),
    )
    F.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
    optimizer.step()
    F.cross_entropy(original(x).flatten(0, 1), y.flatten()).backward()
    ours, right = {}, {}
    for name in ("0", "2"):
        layer = original.get_submodule(name)
        g = torch.cat([layer.weight.grad, layer.bias.grad[:, None]], 1)
        matrix, a = of_sequences(original, name, x, drawn, sharing)
        right[name] = oracle.update(matrix, g, center, scale, DAMPING, a)
        ours[name] = oracle.moved(model.get_submodule(name), oracle.present(layer))
    return ours, right


# -- biases without influence ----------------------------------------------------------------------

WIDTH = 4


class Attention(nn.Module):
    """The key projection adds the same to every score of a query."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = x + 1.0
        weights = (self.q(h) @ self.k(h).mT / WIDTH**0.5).softmax(-1)
        return self.head((weights @ self.v(h)).tanh().mean(1))


class Pooling(nn.Module):
    """Scores of positions, behind a softmax over the positions."""

    def __init__(self) -> None:
        super().__init__()
        self.k, self.head = nn.Linear(WIDTH, 2), nn.Linear(2 * WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.k(x + 1.0).softmax(1).mT @ x).flatten(1))


class Normed(nn.Module):
    """A layer and a norm behind it."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.k, self.norm, self.head = nn.Linear(WIDTH, WIDTH), norm, nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.k(x + 1.0)
        h = h if isinstance(self.norm, nn.LayerNorm) else h.mT
        h = self.norm(h).tanh()
        return self.head(h.mean(1 if isinstance(self.norm, nn.LayerNorm) else 2))


INERT = {
    "key projection": Attention,
    "softmax over positions": Pooling,
    "instance norm": lambda: Normed(nn.InstanceNorm1d(WIDTH)),
    "group norm of single channels": lambda: Normed(nn.GroupNorm(WIDTH, WIDTH)),
}
ALIVE = {
    "layer norm": lambda: Normed(nn.LayerNorm(WIDTH)),
    "batch norm in eval mode": lambda: Normed(nn.BatchNorm1d(WIDTH)).eval(),
}


def biased(name: str) -> tuple[nn.Module, Tensor, Tensor, Tensor, Tensor]:
    """Model, inputs, labels, and F and the gradient of layer "k"."""
    model, x = (INERT | ALIVE)[name]().double(), torch.randn(24, 5, WIDTH).double()
    y = torch.randint(3, (24,))
    g = oracle.gradients(F.cross_entropy(model(x), y), model.k.weight, model.k.bias)
    return model, x, y, oracle.all_blocks(model, ["k"], x)["k"], g


@report("bias without influence", *INERT)
def natural_gradient_is_that_of_the_weights_alone(name: str) -> tuple[Tensor, Tensor]:
    model, x, _, matrix, g = biased(name)
    fisher = bs.unit_fisher(model, x, damping=DAMPING)["k"]
    dw, dw0 = fisher.natural_gradient(g[:, :-1], g[:, -1])
    return torch.cat([dw, dw0[:, None]], 1), oracle.without_bias(matrix, g, DAMPING)


@report("bias without influence", *INERT, *ALIVE)
def flags_and_numbers_that_do_not_exist(name: str) -> tuple[dict, dict]:
    model, x, *_ = biased(name)
    fisher = bs.unit_fisher(model, x, damping=DAMPING)["k"]
    found = {"bias_inert": fisher.bias_inert.double()}
    for quantity in ("mean_q", "s", "k", "k0", "coupling", "corrected_mean"):
        found[f"{quantity} is NaN"] = getattr(fisher, quantity).isnan().double()
    with torch.no_grad():  # the model itself: are its outputs the same when the bias moves?
        outputs, influence = model(x), torch.zeros(len(fisher.c))
        for unit in range(len(influence)):
            other = copy.deepcopy(model)
            other.k.bias[unit] += 1.0
            influence[unit] = float((other(x) - outputs).abs().max() > 1e-9)
    return found, {
        key: (1 - influence).view(-1, *[1] * (v.dim() - 1)).expand_as(v) for key, v in found.items()
    }


@report("bias without influence", *ALIVE)
def other_biases_are_corrected(name: str) -> tuple[Tensor, Tensor]:
    model, x, _, matrix, g = biased(name)
    fisher = bs.unit_fisher(model, x, damping=DAMPING)["k"]
    dw, dw0 = fisher.natural_gradient(g[:, :-1], g[:, -1])
    return torch.cat([dw, dw0[:, None]], 1), oracle.update(matrix, g, "q", "full", DAMPING)


@report("bias without influence", *product(INERT, ("q", "none"), ("full",)))
def one_step(variant: tuple[str, str, str]) -> tuple[Tensor, Tensor]:
    name, center, scale = variant
    model, x, y, _, g = biased(name)
    matrix = oracle.all_blocks(model, ["k"], x, y)["k"]
    before = oracle.present(model.k)
    optimizer = UnitNaturalGradient(
        model, 1.0, center, scale, damping=DAMPING, labels="empirical", decay=0.0
    )
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    return oracle.moved(model.k, before), oracle.without_bias(matrix, g, DAMPING)


# -- the divisor of the loss -----------------------------------------------------------------------


@report("divisor of the loss", *product(("ignore_index", "mask"), (0, 6, 20)))
def labels_left_out_change_from_step_to_step(variant: tuple[str, int]) -> tuple[dict, dict]:
    kind, left_out = variant
    model = nn.Sequential(nn.Linear(3, 4), nn.ELU(), nn.Linear(4, 3)).double()
    x, y = torch.randn(30, 3).double(), torch.randint(3, (30,))
    optimizer = UnitNaturalGradient(model, 0.0, damping=DAMPING, labels="empirical", decay=0.0)
    F.cross_entropy(model(x), y).backward()  # a first step, with all labels
    optimizer.step()
    optimizer.zero_grad()
    optimizer.param_groups[0]["lr"] = 1.0
    kept = torch.arange(30) < 30 - left_out
    original = copy.deepcopy(model)

    def loss(network: nn.Module) -> Tensor:
        if kind == "ignore_index":
            return F.cross_entropy(network(x), y.masked_fill(~kept, -100))
        return (F.cross_entropy(network(x), y, reduction="none") * kept).sum() / kept.sum()

    loss(model).backward()
    optimizer.step()
    ours, right = {}, {}
    for name in ("0", "2"):
        layer = original.get_submodule(name)
        g = oracle.gradients(loss(original), layer.weight, layer.bias)
        matrix = oracle.all_blocks(original, [name], x[kept], y[kept])[name]
        right[name] = oracle.update(matrix, g, "q", "full", DAMPING)
        ours[name] = oracle.moved(model.get_submodule(name), oracle.present(layer))
    return ours, right


@report("divisor of the loss", 0, 1, 2)
def padded_positions_of_sequences(left_out: int) -> tuple[dict, dict]:
    model, x, y = sequences()
    optimizer = UnitNaturalGradient(model, 0.0, damping=DAMPING, labels="empirical", decay=0.0)
    F.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
    optimizer.step()
    optimizer.zero_grad()
    optimizer.param_groups[0]["lr"] = 1.0
    original, positions = copy.deepcopy(model), 3 - left_out
    padded = y.clone()
    padded[:, positions:] = -100
    F.cross_entropy(model(x).flatten(0, 1), padded.flatten()).backward()
    optimizer.step()
    F.cross_entropy(original(x).flatten(0, 1), padded.flatten()).backward()
    ours, right = {}, {}
    for name in ("0", "2"):
        layer = original.get_submodule(name)
        g = torch.cat([layer.weight.grad, layer.bias.grad[:, None]], 1)
        shorter = x[:, :positions], y[:, :positions]
        matrix, _ = of_sequences(original, name, *shorter, "per_example")
        right[name] = oracle.update(matrix, g, "q", "full", DAMPING)
        ours[name] = oracle.moved(model.get_submodule(name), oracle.present(layer))
    return ours, right


@report("divisor of the loss")
def another_loss_is_refused() -> tuple[str, re.Pattern]:
    from .table import refusal

    model = nn.Sequential(nn.Linear(3, 4), nn.ELU(), nn.Linear(4, 3)).double()
    x, y = torch.randn(30, 3).double(), torch.randint(3, (30,))
    optimizer = UnitNaturalGradient(model, 0.1, labels="empirical")
    (3 * F.cross_entropy(model(x), y)).backward()
    return refusal(optimizer.step), re.compile("The loss is not a mean of categorical")
