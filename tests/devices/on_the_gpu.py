"""What a GPU would refuse or wait for: measurements and steps on a simulated one.

    python -m pytest tests/devices/on_the_gpu.py

The simulated GPU raises as CUDA does where devices mix, and has the numbers of the CPU.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from gpu_tensors import GpuTensor, register
from simulated_gpu import simulated_gpu
from torch import Tensor, nn

import biasshift as bs
from biasshift.data import TensorStream
from biasshift.optim import UnitNaturalGradient
from biasshift.training import Ensemble, Gradient, evaluate, train

SEEDED = torch.Generator().manual_seed(5)
X, Y = torch.randn(40, 6, generator=SEEDED), torch.randint(4, (40,), generator=SEEDED)
MAPS = torch.randn(20, 2, 8, 8, generator=SEEDED)
Work = Callable[[str], list[Tensor]]  # a measurement on a device


@pytest.fixture(autouse=True, scope="session")
def device() -> None:
    register()  # before the first backward pass, which counts the devices


def build(*parts: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return nn.Sequential(*[make() for make in parts]).eval()


def linear(inputs: int, units: int) -> Callable[[], nn.Module]:
    return partial(nn.Linear, inputs, units)


def plain(seed: int = 0) -> nn.Module:
    return build(linear(6, 8), nn.ELU, linear(8, 8), nn.ReLU, linear(8, 4), seed=seed)


def mlp() -> nn.Module:
    norm = partial(nn.BatchNorm1d, 8)
    return build(linear(6, 8), norm, nn.ELU, linear(8, 8), nn.ReLU, linear(8, 4))


def maps() -> nn.Module:
    first = partial(nn.Conv2d, 2, 4, 3, padding=1)
    second = partial(nn.Conv2d, 4, 4, 3, stride=2, groups=2)
    return build(first, nn.ELU, second, nn.Flatten, linear(36, 4))


# -- measurements ----------------------------------------------------------------------------------


def numbers(fisher: Any) -> list[Tensor]:
    found = [fisher.s, fisher.k, fisher.coupling, fisher.mean_q]
    found += fisher.natural_gradient(torch.ones_like(fisher.mean_q), torch.ones_like(fisher.c))
    return [value.detach().cpu().double() for value in found]


def table(frame: Any) -> list[Tensor]:
    return [torch.tensor(frame.select_dtypes("number").to_numpy(float, copy=True))]


def fishers(make: Callable[[], nn.Module], x: Tensor, **options: Any) -> Work:
    def work(at: str) -> list[Tensor]:
        measured = bs.unit_fisher(make().to(at), x.to(at), **options).values()
        return [value for fisher in measured for value in numbers(fisher)]

    return work


def gap(at: str) -> list[Tensor]:
    return table(bs.gradient_gap(mlp().to(at), X.to(at), Y.to(at)))


def moments(at: str) -> list[Tensor]:
    measured = bs.activation_moments(maps().to(at), MAPS.to(at)).values()
    return [each.var.cpu().double() for each in measured]


def shift(at: str) -> list[Tensor]:
    model = plain().to(at)
    with bs.bias_shift(model, X.to(at)) as shift, torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    return [each.total.cpu().double() for each in shift.values()]


def check(at: str) -> list[Tensor]:
    report = bs.check(plain().to(at), X.to(at), Y.to(at))
    assert report.error.dropna().max() < 1e-9 and report.covered.sum() == 3
    return table(report.drop(columns="error"))


def instrument(at: str) -> list[Tensor]:
    model = plain().to(at)
    optimizer = sgd(model.parameters())
    update = Gradient(model, optimizer)
    with bs.instrument(model, optimizer, probe=(X.to(at), Y.to(at)), every=2) as log:
        for _ in range(2):
            update(X[:8].to(at), Y[:8].to(at))
    return table(log.table())


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, foreach=True)


MEASUREMENTS: dict[str, Work] = {
    "expected": fishers(mlp, X),
    "sampled": fishers(mlp, X, labels="sampled", draws=2),
    "gaussian": fishers(mlp, X, likelihood="gaussian"),
    "implicit": fishers(mlp, X, storage="implicit"),
    "read again": fishers(mlp, X, units=[1], storage="implicit", memory_budget=1000),
    "units": fishers(mlp, X, units=[1, 3]),
    "maps": fishers(maps, MAPS),
    "maps, expanded": fishers(maps, MAPS, weight_sharing="expand"),
    "maps, implicit": fishers(maps, MAPS, storage="implicit"),
    "gap": gap,
    "moments": moments,
    "shift": shift,
    "check": check,
    "instrument": instrument,
}


def same(found: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, equal_nan=True)


@pytest.mark.parametrize("name", MEASUREMENTS)
def test_measurements_on_a_gpu_are_those_of_the_cpu(name):
    expected = MEASUREMENTS[name]("cpu")
    with simulated_gpu():
        found = MEASUREMENTS[name]("cuda")
    same(found, expected)


def test_the_simulated_gpu_refuses_what_cuda_refuses():
    with simulated_gpu():
        x, generator = X.to("cuda"), torch.Generator("cuda")
        assert isinstance(x, GpuTensor) and x.device.type == generator.device.type == "cuda"
        with pytest.raises(RuntimeError, match="at least two devices"):
            x @ X.T
        with pytest.raises(RuntimeError, match="at least two devices"):
            plain()(x)
        with pytest.raises(RuntimeError, match="'cuda' device type for generator"):
            torch.bernoulli(x.sigmoid(), generator=torch.Generator())
        with pytest.raises(RuntimeError, match="'cpu' device type for generator"):
            torch.randn(3, generator=generator)
        with pytest.raises(TypeError, match="can't convert cuda"):
            x.numpy()


# -- generators and models of several devices ------------------------------------------------------


@pytest.mark.parametrize("likelihood", ["categorical", "bernoulli", "gaussian"])
@pytest.mark.parametrize(("model_at", "generator_at"), [("cuda", "cpu"), ("cpu", "cuda")])
def test_labels_are_drawn_where_the_generator_is(model_at, generator_at, likelihood):
    """The same labels as without a GPU, since the simulated generator draws the CPU's numbers."""

    def work(at: str, generator: torch.Generator) -> list[Tensor]:
        options: dict[str, Any] = {"labels": "sampled", "likelihood": likelihood, "draws": 3}
        return fishers(plain, X, generator=generator, batch_size=16, **options)(at)

    expected = work("cpu", torch.Generator().manual_seed(3))
    with simulated_gpu():
        generator = torch.Generator(generator_at).manual_seed(3)
        found = work(model_at, generator)
    same(found, expected)


@pytest.mark.parametrize("measure", ["gap", "instrument", "optimizer"])
def test_a_generator_elsewhere_serves_whatever_takes_one(measure):
    def work(at: str) -> list[Tensor]:
        model, generator = plain().to(at), torch.Generator().manual_seed(3)
        x, y = X.to(at), Y.to(at)
        options: dict[str, Any] = {"labels": "sampled", "generator": generator}
        if measure == "gap":
            return table(bs.gradient_gap(model, x, y, **options))
        if measure == "instrument":
            optimizer = sgd(model.parameters())
            with bs.instrument(model, optimizer, probe=(x, y), every=1, **options) as log:
                Gradient(model, optimizer)(x, y)
            return table(log.table())
        optimizer = UnitNaturalGradient(model, lr=0.01, damping=0.1, generator=generator)
        Gradient(model, optimizer)(x, y)
        return [parameter.detach().cpu() for parameter in model.parameters()]

    expected = work("cpu")
    with simulated_gpu():
        found = work("cuda")
    same(found, expected)


class Spread(nn.Module):
    """The first layer is on one device, the others on another."""

    def __init__(self, first: str, then: str) -> None:
        super().__init__()
        layers = plain()
        self.first, self.then = layers[0].to(first), layers[1:].to(then)
        self.device = then

    def forward(self, x: Tensor) -> Tensor:
        return self.then(self.first(x).to(self.device))


@pytest.mark.parametrize("labels", ["expected", "sampled", "empirical"])
@pytest.mark.parametrize(("first", "then"), [("cpu", "cuda"), ("cuda", "cpu")])
def test_a_model_of_two_devices_is_measured_layer_by_layer(first, then, labels):
    def work(model: nn.Module) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        measured = bs.unit_fisher(model, X, Y, labels=labels, generator=generator)
        found = [value for fisher in measured.values() for value in numbers(fisher)]
        moments = bs.activation_moments(model, X).values()
        found += [each.var.cpu().double() for each in moments]
        return found + table(bs.gradient_gap(model, X, Y))

    expected = work(Spread("cpu", "cpu"))
    with simulated_gpu():
        found = work(Spread(first, then))
    same(found, expected)


@pytest.mark.parametrize(("model_at", "probe_at"), [("cuda", "cpu"), ("cpu", "cuda")])
def test_the_probe_goes_to_the_model(model_at, probe_at):
    expected = gap("cpu")
    with simulated_gpu():
        found = table(bs.gradient_gap(mlp().to(model_at), X.to(probe_at), Y.to(probe_at)))
    same(found, expected)


# -- what the host waits for -----------------------------------------------------------------------


def gradient(at: str) -> Any:
    model = plain().to(at)
    return Gradient(model, sgd(model.parameters()))


def watched(at: str, **options: Any) -> Any:
    update = gradient(at)
    update.log = bs.instrument(update.module, update.optimizer, **options)
    return update


def natural(**options: Any) -> Callable[[str], Any]:
    def make(at: str) -> Any:
        model = plain().to(at)
        return Gradient(model, UnitNaturalGradient(model, lr=0.01, damping=0.1, **options))

    return make


STEPS: dict[str, tuple[Callable[[str], Any], int]] = {  # and how often the host may wait in one
    "sgd": (gradient, 0),
    "activations": (watched, 0),
    "between probes": (lambda at: watched(at, probe=(X.to(at), Y.to(at)), every=100), 0),
    "natural between looks": (natural(update_every=50), 0),
    "natural": (natural(), 3),
    "centered by p": (natural(center="p", scale="none"), 1),
}


@pytest.mark.parametrize("name", STEPS)
def test_a_step_waits_no_more_than_it_must(name):
    make, most = STEPS[name]
    with simulated_gpu() as waits:
        update, x, y = make("cuda"), X[:8].to("cuda"), Y[:8].to("cuda")
        update(x, y), update(x, y)
        waits.clear()
        update(x, y)
        assert waits.total() <= most, waits


def test_an_ensemble_never_waits():
    with simulated_gpu() as waits:
        update = Ensemble([plain(seed).to("cuda") for seed in range(3)], sgd)
        x, y = (torch.stack([part[:8]] * 3).to("cuda") for part in (X, Y))
        waits.clear()
        update(x, y)
        assert not waits, waits


def test_training_waits_once_an_epoch():
    with simulated_gpu() as waits:
        stream = TensorStream(X.to("cuda"), Y.to("cuda"), 5, 0)
        update = gradient("cuda")
        waits.clear()
        list(train(update, stream, steps=16))
        assert waits.total() <= 4, waits  # the order goes there and the losses are read, twice


def test_an_evaluation_waits_once():
    with simulated_gpu() as waits:
        model, x, y = plain().to("cuda"), X.to("cuda"), Y.to("cuda")
        waits.clear()
        evaluate(model, x, y, batch_size=10)
        assert waits.total() <= 1, waits
