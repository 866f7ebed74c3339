"""Models that write into their input, keep state, are parametrized, or differentiate themselves."""

import copy
import pickle
import re
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import biasshift as bs
from biasshift.optim import UnitNaturalGradient

from . import oracle
from .table import refusal, report, warned

# -- models that write into their input ------------------------------------------------------------


class Centers(nn.Module):
    """Subtracts the mean of its inputs, in place."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.act, self.head = nn.Linear(3, 4), nn.ELU(), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x -= x.mean(-1, keepdim=True) - 1
        return self.head(self.act(self.stem(x)))


class Rectifies(Centers):
    """Its first module is a ReLU in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.stem(self.first(x))))


WRITERS = {"x -= x.mean()": Centers, "in-place ReLU first": Rectifies}


def written(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    return WRITERS[name]().double(), torch.randn(8, 3).double() + 1, torch.randint(3, (8,))


@report("models that write into their input", *WRITERS)
def unit_fisher_is_right(name: str) -> tuple[dict, dict]:
    model, x, _ = written(name)
    found = {n: fisher.matrix() for n, fisher in bs.unit_fisher(model, x).items()}
    right = {
        n: oracle.blocks(model.get_submodule(n), lambda i: model(x[i : i + 1].clone())[0], 8)
        for n in ("stem", "head")
    }
    return found, right


@report("models that write into their input", *WRITERS)
def the_probe_stays(name: str) -> tuple[Tensor, Tensor]:
    model, x, y = written(name)
    before = x.clone()
    bs.unit_fisher(model, x)
    bs.activation_moments(model, x)
    bs.gradient_gap(model, x, y)
    bs.check(model, x)
    with bs.bias_shift(model, x):
        pass
    return x, before


@report("models that write into their input", *WRITERS)
def means_of_the_second_call(name: str) -> tuple[Tensor, Tensor]:
    model, x, _ = written(name)
    bs.activation_moments(model, x)
    found = bs.activation_moments(model, x)["act"].mean
    return found, oracle.hooked_mean(model, x.clone(), "act", 1)


@report("models that write into their input", *WRITERS)
def bias_shift_of_an_update(name: str) -> tuple[Tensor, Tensor]:
    model, x, _ = written(name)
    before = oracle.hooked_mean(model, x.clone(), "head", 1)
    with bs.bias_shift(model, x) as shift, torch.no_grad():
        model.stem.weight += 0.1
    return shift["head"].total, oracle.hooked_mean(model, x.clone(), "head", 1) - before


@report("models that write into their input", *WRITERS)
def shift_of_no_update(name: str) -> tuple[Tensor, Tensor]:
    model, x, _ = written(name)
    with bs.bias_shift(model, x) as shift:
        pass
    return torch.cat([s.total for s in shift.values()]), torch.zeros(7)


# -- state in plain attributes ---------------------------------------------------------------------


class Stateful(nn.Module):
    """Its outputs depend on what earlier forward passes have left behind."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.stem, self.back = kind, nn.Linear(3, 4), nn.Linear(4, 4)
        self.act, self.head = nn.Tanh(), nn.Linear(4, 3)
        self.h: Any = None
        self.cache: list[Tensor] = []
        self.table: dict[str, Tensor] = {}
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        net = self.stem(x)
        if self.kind == "counter":
            self.calls += 1
            h = self.act(net * self.calls)
        elif self.kind == "list as a cache":
            h = self.act(
                net + self.back(torch.stack(self.cache).mean(0) if self.cache else 0 * net)
            )
            self.cache.append(h.detach())
        elif self.kind == "dict":
            h = self.act(net + self.table.get("h", 0))
            self.table["h"] = h.detach()
        else:
            h = self.act(net + (0 if self.h is None else self.back(self.h)))
            self.h = h.detach()
        return self.head(h)


STATES = ["hidden state", "list as a cache", "counter", "dict"]


def trained(kind: str, watch: str) -> tuple[Tensor, nn.Module]:
    torch.manual_seed(1)
    model = Stateful(kind).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    x, y = torch.randn(5, 6, 3).double(), torch.randint(3, (5, 6))
    probe = torch.randn(6, 3).double()
    log = None
    if watch == "instrument":
        log = bs.instrument(
            model, optimizer, probe=probe, every=1, quantities=("activations", "bias_shift")
        )
    for batch, labels in zip(x, y, strict=True):
        if watch == "direct calls":
            bs.activation_moments(model, probe)
            refusal(lambda: bs.unit_fisher(model, probe))
            warned(lambda: bs.check(model, probe, examples=6))
        optimizer.zero_grad()
        F.cross_entropy(model(batch), labels).backward()
        optimizer.step()
    if log is not None:
        log.remove()
    return torch.cat([p.detach().flatten() for p in model.parameters()]), model


@report("state in plain attributes", *product(STATES, ("instrument", "direct calls")), tolerance=0)
def training_is_the_same(variant: tuple[str, str]) -> tuple[Tensor, Tensor]:
    kind, watch = variant
    return trained(kind, watch)[0], trained(kind, "nothing")[0]


@report("state in plain attributes", *STATES)
def means_are_those_of_the_next_call(kind: str) -> tuple[Tensor, Tensor]:
    _, model = trained(kind, "nothing")
    x = torch.randn(6, 3).double()
    first = bs.activation_moments(model, x)["act"].mean
    second = bs.activation_moments(model, x)["act"].mean
    right = oracle.hooked_mean(model, x, "act", 1)
    return torch.stack([first, second]), right.expand(2, -1)


# -- parametrized models ---------------------------------------------------------------------------


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def own(layer: nn.Module) -> nn.Module:
    parametrize.register_parametrization(layer, "weight", Doubled())
    return layer


WRAPS = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "own": own,
}


def wrapped(name: str) -> tuple[nn.Module, Tensor]:
    model = nn.Sequential(WRAPS[name](nn.Linear(4, 4)), nn.ELU(), nn.Linear(4, 3)).double()
    return model.eval(), torch.randn(6, 4).double()


@report("parametrized models", *product(WRAPS, ("the model", "an earlier copy", "a later copy")))
def run_as_before_behind_check(variant: tuple[str, str]) -> tuple[Tensor, Tensor]:
    name, which = variant
    model, x = wrapped(name)
    earlier, right = copy.deepcopy(model), model(x)
    bs.check(model, x)
    kind = type(earlier[0])
    network = {
        "the model": model,
        "an earlier copy": earlier,
        "a later copy": copy.deepcopy(model),
    }[which]
    assert type(network[0]) is kind and parametrize.is_parametrized(network[0], "weight")
    return network(x), right


@report("parametrized models", *WRAPS)
def matrices_are_those_of_the_weights(name: str) -> tuple[Tensor, Tensor]:
    model, x = wrapped(name)
    found = bs.unit_fisher(model, x)["0"].matrix()
    weight = model[0].weight.detach().clone().requires_grad_()
    bias = model[0].bias.detach().clone().requires_grad_()

    def logits(n: int) -> Tensor:
        return model[1:](F.linear(x[n], weight, bias))

    return found, oracle.blocks((weight, bias), logits, 6)


# -- copies of the optimizer -----------------------------------------------------------------------


@report("copies of UnitNaturalGradient", "deepcopy", "pickle", tolerance=0)
def go_on_to_the_same_numbers(how: str) -> tuple[Tensor, Tensor]:
    model = nn.Sequential(nn.Linear(3, 4), nn.ELU(), nn.Linear(4, 3)).double()
    x, y = torch.randn(9, 3).double(), torch.randint(3, (9,))
    optimizer = UnitNaturalGradient(model, lr=0.1, momentum=0.5)

    def train(network: nn.Module, its: torch.optim.Optimizer) -> Tensor:
        for _ in range(2):
            its.zero_grad()
            F.cross_entropy(network(x), y).backward()
            its.step()
        return torch.cat([p.detach().flatten() for p in network.parameters()])

    train(model, optimizer)
    pair = (model, optimizer)
    copied = copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))
    return train(*copied), train(model, optimizer)


# -- models that differentiate in their forward pass -----------------------------------------------


class Forces(nn.Module):
    """Forces from an energy, and a layer behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.act, self.energy = nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)
        self.scale = nn.Linear(3, 3)

    def forces(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        energy = self.energy(self.act(self.stem(x))).sum()
        return -torch.autograd.grad(energy, x, create_graph=True)[0]

    def forward(self, x: Tensor) -> Tensor:
        return self.scale(self.forces(x))


@report("models that differentiate in their forward")
def have_means() -> tuple[Tensor, Tensor]:
    model, x = Forces().double(), torch.randn(7, 3).double()
    return bs.activation_moments(model, x)["act"].mean, model.act(model.stem(x)).mean(0)


@report("models that differentiate in their forward")
def have_shifts() -> tuple[Tensor, Tensor]:
    model, x = Forces().double(), torch.randn(7, 3).double()
    before = model.forces(x).detach().mean(0)
    weight, bias = model.scale.weight.detach().clone(), model.scale.bias.detach().clone()
    with bs.bias_shift(model, x) as shift, torch.no_grad():
        model.stem.weight *= 1.1
    incoming = weight @ (model.forces(x).detach().mean(0) - before)
    assert bias.equal(model.scale.bias)
    return shift["scale"].incoming, incoming


@report("models that differentiate in their forward")
def have_matrices_where_nothing_is_differentiated() -> tuple[Tensor, Tensor]:
    model, x = Forces().double(), torch.randn(7, 3).double()
    found = bs.unit_fisher(model, x, layers=["scale"])["scale"].matrix()
    return found, oracle.all_blocks(model, ["scale"], x)["scale"]


@report("models that differentiate in their forward")
def are_refused_by_name_elsewhere() -> tuple[str, re.Pattern]:
    model, x = Forces().double(), torch.randn(7, 3).double()
    said = refusal(lambda: bs.unit_fisher(model, x, layers=["stem"]))
    return said, re.compile(r"ValueError: Layer 'stem' \(Linear\) cannot be measured: .*forward")


# -- the rest of the model's life ------------------------------------------------------------------


class Switches(nn.Module):
    """Has a layer that can be turned off, as stochastic depth and progressive training do."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.extra, self.head = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.on = True

    def forward(self, x: Tensor) -> Tensor:
        h = F.elu(self.stem(x))
        return self.head(h + self.extra(h) if self.on else h)


@report("a layer that stops being called inside bias_shift")
def has_no_shift_and_the_others_are_right() -> tuple[dict, dict]:
    model, x = Switches().double(), torch.randn(7, 3).double()
    with torch.no_grad():
        before = {"stem": model.stem(x).mean(0), "head": model(x).mean(0)}
    with bs.bias_shift(model, x) as shift, torch.no_grad():
        model.on = False
        model.stem.bias += 0.5
    with torch.no_grad():
        after = {"stem": model.stem(x).mean(0), "head": model(x).mean(0)}
    found = {name: parts.total for name, parts in shift.items()}
    return found, {name: after[name] - before[name] for name in after}


@report("inside torch.backends.cudnn.flags", "around the call", "inside the forward")
def numbers_are_right_and_flags_as_found(where: str) -> tuple[dict, dict]:
    class Flagged(Switches):
        def forward(self, x: Tensor) -> Tensor:
            with torch.backends.cudnn.flags(enabled=False):
                return super().forward(x)

    model = (Flagged() if where == "inside the forward" else Switches()).double()
    x = torch.randn(7, 3).double()
    before = torch.backends.cudnn.enabled
    if where == "around the call":
        with torch.backends.cudnn.flags(enabled=False):
            fishers = bs.unit_fisher(model, x)
    else:
        fishers = bs.unit_fisher(model, x)
    assert torch.backends.cudnn.enabled == before
    found = {name: fisher.matrix() for name, fisher in fishers.items()}
    return found, oracle.all_blocks(model, ["stem", "extra", "head"], x)
