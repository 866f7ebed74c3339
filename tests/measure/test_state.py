"""State in attributes that are neither parameters nor buffers is put back after a measurement.

Hidden states of recurrent nets, caches and counts of steps: the user's training must not change
by being watched.
"""

from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import oracles
import pytest
import torch
import torch.nn.functional as F
from cases import pristine
from torch import Tensor, nn

import biasshift as bs

DOUBLE = torch.float64


@dataclass
class State:
    h: Tensor | None = None
    steps: int = 0


class Stateful(nn.Module):
    """Its outputs depend on what earlier forward passes have left behind."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.back, self.act = nn.Linear(3, 4), nn.Linear(4, 4), nn.Tanh()
        self.head = nn.Linear(4, 3)
        self.start()

    def start(self) -> None:
        self.h: Any = None

    def read(self) -> Tensor | None:
        return self.h

    def write(self, h: Tensor) -> None:
        self.h = h

    def forward(self, x: Tensor) -> Tensor:
        before, net = self.read(), self.stem(x)
        h = self.act(net if before is None else net + self.back(before))
        self.write(h.detach())
        return self.head(h)


class InPlace(Stateful):
    def start(self) -> None:
        self.h = torch.zeros(6, 4, dtype=DOUBLE)

    def read(self) -> Tensor | None:
        return self.h.clone()

    def write(self, h: Tensor) -> None:
        self.h.copy_(h)


class UnseenInPlace(InPlace):
    def write(self, h: Tensor) -> None:
        self.h.data.copy_(h)


class EmptyBuffer(Stateful):
    def start(self) -> None:
        self.register_buffer("h", None)


class LateBuffer(Stateful):
    def start(self) -> None:
        pass

    def read(self) -> Tensor | None:
        return getattr(self, "h", None)

    def write(self, h: Tensor) -> None:
        if hasattr(self, "h"):
            self.h = h
        else:
            self.register_buffer("h", h)


class NewAttribute(LateBuffer):
    def write(self, h: Tensor) -> None:
        self.h = h


class Listed(Stateful):
    def start(self) -> None:
        self.states: Any = []

    def read(self) -> Tensor | None:
        return self.states[-1] if self.states else None

    def write(self, h: Tensor) -> None:
        self.states.append(h)


class Queued(Listed):
    def start(self) -> None:
        self.states = deque(maxlen=2)


class Keyed(Stateful):
    kind: Callable[[], dict] = dict

    def start(self) -> None:
        self.cache = {"layers": [self.kind()]}

    def read(self) -> Tensor | None:
        return self.cache["layers"][0].get("h")

    def write(self, h: Tensor) -> None:
        self.cache["layers"][0]["h"] = h


class Ordered(Keyed):
    kind = OrderedDict


class Defaulting(Keyed):
    @staticmethod
    def kind() -> dict:
        return defaultdict(int)

    def read(self) -> Tensor | None:
        return self.cache["layers"][0].get("h")


class Held(Stateful):
    def start(self) -> None:
        self.state: Any = State()

    def read(self) -> Tensor | None:
        return self.state.h

    def write(self, h: Tensor) -> None:
        self.state.h = h
        self.state.steps += 1


class HeldByName(Held):
    def start(self) -> None:
        self.state = SimpleNamespace(h=None, steps=0)


class Paired(Stateful):
    """A tuple does not change, but the tensors in it do."""

    def start(self) -> None:
        self.pair = (torch.zeros(6, 4, dtype=DOUBLE), torch.zeros((), dtype=DOUBLE))

    def read(self) -> Tensor | None:
        return self.pair[0].clone()

    def write(self, h: Tensor) -> None:
        self.pair[0].copy_(h)
        self.pair[1].add_(1)


class InAnArray(Stateful):
    def start(self) -> None:
        self.array = np.zeros((6, 4))

    def read(self) -> Tensor | None:
        return torch.tensor(self.array)

    def write(self, h: Tensor) -> None:
        self.array[...] = h.numpy()


class Counted(Stateful):
    """A schedule that forward passes advance."""

    def start(self) -> None:
        self.step, self.kinds, self.sizes = 0, Counter(), set()

    def read(self) -> Tensor | None:
        strength = 1 + self.step + self.kinds["forward"] + len(self.sizes)
        return torch.full((1, 4), 0.1 * strength, dtype=DOUBLE)

    def write(self, h: Tensor) -> None:
        self.step += 1
        self.kinds["forward"] += 1
        self.sizes.add(self.step)


class OwnGenerator(Stateful):
    def start(self) -> None:
        self.generator = torch.Generator().manual_seed(3)

    def read(self) -> Tensor | None:
        return torch.randn(1, 4, generator=self.generator, dtype=DOUBLE)

    def write(self, h: Tensor) -> None:
        pass


class OwnNumpyGenerator(OwnGenerator):
    def start(self) -> None:
        self.generator = np.random.default_rng(3)

    def read(self) -> Tensor | None:
        return torch.tensor(self.generator.normal(size=(1, 4)))


class InAPart(Stateful):
    """A part of the model, and not the model itself, has the state."""

    def start(self) -> None:
        self.memory = nn.Identity()
        self.memory.h = None

    def read(self) -> Tensor | None:
        return self.memory.h

    def write(self, h: Tensor) -> None:
        self.memory.h = h


class BuiltAtFirst(Stateful):
    """Makes a part when it is first called, which random numbers initialize."""

    def start(self) -> None:
        self.late: Any = None

    def read(self) -> Tensor | None:
        if self.late is None:
            self.late = nn.Linear(2, 4, dtype=DOUBLE)
        return self.late(torch.ones(1, 2, dtype=DOUBLE))

    def write(self, h: Tensor) -> None:
        pass


KINDS = [
    Stateful,
    InPlace,
    UnseenInPlace,
    EmptyBuffer,
    LateBuffer,
    NewAttribute,
    Listed,
    Queued,
    Keyed,
    Ordered,
    Defaulting,
    Held,
    HeldByName,
    Paired,
    InAnArray,
    Counted,
    OwnGenerator,
    OwnNumpyGenerator,
    InAPart,
    BuiltAtFirst,
]


def trained(kind: type[Stateful], measure: Callable[[nn.Module, Tensor], Any] | None) -> Tensor:
    """The weights after a few steps, each of which follows a measurement, and the last outputs."""
    torch.manual_seed(0)
    model = kind().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    x, y = torch.randn(4, 6, 3, dtype=DOUBLE), torch.randint(3, (4, 6))
    probe = torch.randn(6, 3, dtype=DOUBLE)
    for batch, labels in zip(x, y, strict=True):
        if measure is not None:
            measure(model, probe)
            pristine(model)
        optimizer.zero_grad()
        outputs = model(batch)
        F.cross_entropy(outputs, labels).backward()
        optimizer.step()
    return torch.cat([t.detach().flatten() for t in (*model.parameters(), outputs)])


def shift(model: nn.Module, probe: Tensor) -> None:
    with bs.bias_shift(model, probe) as shifts:
        pass
    assert all(not parts.total.any() for parts in shifts.values())


def fisher(model: nn.Module, probe: Tensor) -> None:
    """What depends on earlier calls is refused, and left as found."""
    with pytest.raises(ValueError, match=r"by the call|draws random numbers|sees 1 rows"):
        bs.unit_fisher(model, probe, uncovered="raise")


def moments(model: nn.Module, probe: Tensor) -> None:
    first, second = (bs.activation_moments(model, probe)["act"].mean for _ in range(2))
    assert torch.equal(first, second)


MEASURES = {
    "activation_moments": moments,
    "bias_shift": shift,
    "unit_fisher": fisher,
    "check": lambda model, probe: bs.check(model, probe, examples=6),
}


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("kind", KINDS)
def test_training_goes_on_as_if_nothing_had_been_measured(
    kind: type[Stateful], measure: str
) -> None:
    assert torch.equal(trained(kind, MEASURES[measure]), trained(kind, None))


@pytest.mark.parametrize("kind", KINDS)
def test_training_under_a_log_is_the_same_training(kind: type[Stateful]) -> None:
    def train(watch: bool) -> Tensor:
        torch.manual_seed(0)
        model = kind().double()
        x, y = torch.randn(5, 6, 3, dtype=DOUBLE), torch.randint(3, (5, 6))
        probe = torch.randn(6, 3, dtype=DOUBLE)
        model(x[0])  # parts that are built at first are the optimizer's too
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        quantities = ("activations", "bias_shift")
        log = (
            bs.instrument(model, optimizer, probe=probe, quantities=quantities, every=1)
            if watch
            else None
        )
        for batch, labels in zip(x, y, strict=True):
            optimizer.zero_grad()
            F.cross_entropy(model(batch), labels).backward()
            optimizer.step()
        if log is not None:
            assert log.table().step.nunique() == 6
            log.remove()
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    assert torch.equal(train(True), train(False))


def test_state_is_put_back_after_an_error() -> None:
    class Fails(Listed):
        def write(self, h: Tensor) -> None:
            super().write(h)
            raise KeyError("the model's own")

    model = Fails().double()
    states = model.states
    with pytest.raises(KeyError, match="the model's own"):
        bs.activation_moments(model, torch.randn(6, 3, dtype=DOUBLE))
    assert model.states is states and states == []


class Caching(nn.Module):
    """Keeps what it has seen, as models do for plots, and does not read it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(3, 4), nn.Linear(4, 3)
        self.last, self.seen, self.count = None, {"h": [torch.ones(2)]}, 0

    def forward(self, x: Tensor) -> Tensor:
        h = F.elu(self.stem(x))
        self.last, self.count = h, self.count + 1
        self.seen["h"].append(h.detach())
        self.seen["h"][0].mul_(2)
        return self.head(h)


@pytest.mark.parametrize("weight_sharing", ["per_example", "expand"])
def test_models_that_keep_what_they_have_seen_are_right_and_as_found(weight_sharing: str) -> None:
    torch.manual_seed(0)
    model, x = Caching().double(), torch.randn(6, 3, dtype=DOUBLE)
    kept = model(x)
    last, seen, listed = model.last, model.seen, model.seen["h"]
    parts = list(listed)
    values = [part.clone() for part in parts]
    plain = nn.Sequential(OrderedDict(stem=model.stem, elu=nn.ELU(), head=model.head))
    blocks = oracles.unit_fishers(plain, x, weight_sharing=weight_sharing)
    fishers = bs.unit_fisher(model, x, weight_sharing=weight_sharing)
    for name, block in blocks.items():
        torch.testing.assert_close(fishers[name].matrix(), block.F, rtol=0, atol=1e-12)
    bs.activation_moments(model, x)
    shift(model, x)
    bs.gradient_gap(model, x, torch.arange(6) % 3)
    assert model.last is last and model.seen is seen and model.seen["h"] is listed
    assert model.count == 1 and all(one is other for one, other in zip(listed, parts, strict=True))
    assert all(torch.equal(one, other) for one, other in zip(listed, values, strict=True))
    kept.sum().backward()  # the graph that the cached activations belong to is whole


def test_hidden_states_that_are_not_finite_stay_on_their_graph() -> None:
    model = Stateful().double()
    weights = torch.ones(6, 4, dtype=DOUBLE, requires_grad=True)
    model.h = (weights * torch.nan).exp()
    version = model.h._version
    outputs = model.h.square().sum()
    model.write = lambda h: None
    bs.activation_moments(model, torch.randn(6, 3, dtype=DOUBLE))
    assert model.h._version == version
    outputs.backward()


def test_lazy_modules_stay_what_a_forward_pass_has_made_of_them() -> None:
    model, x = nn.Sequential(nn.LazyLinear(4), nn.ELU(), nn.LazyLinear(3)), torch.randn(6, 5)
    bs.activation_moments(model, x)
    assert type(model[0]) is nn.Linear and model[0].in_features == 5
    assert type(model[2]) is nn.Linear and model[2].in_features == 4
    assert model(x).shape == (6, 3)
