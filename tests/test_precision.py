"""The flags of matrix products have two generations, which PyTorch refuses to mix.

Measurements work whichever a user or a model uses, and leave both exactly as found. What "exactly"
means is told by what PyTorch answers now, and by what it answers after more flags are set: a flag
that is left to another one may look like one that was set.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, backends, nn

import biasshift as bs
from biasshift.precision import full_precision, product_precision

NEWER = {
    "cuda": (backends.cudnn, "fp32_precision"),
    "matmul": (backends.cuda.matmul, "fp32_precision"),
    "conv": (backends.cudnn.conv, "fp32_precision"),
    "rnn": (backends.cudnn.rnn, "fp32_precision"),
    "cpu matmul": (backends.mkldnn.matmul, "fp32_precision"),
    "cpu conv": (backends.mkldnn.conv, "fp32_precision"),
    "cpu rnn": (backends.mkldnn.rnn, "fp32_precision"),
}
OLDER = {
    "allow matmul": (backends.cuda.matmul, "allow_tf32"),
    "allow cudnn": (backends.cudnn, "allow_tf32"),
}
PLACES: dict[str, tuple[Any, str]] = {"all": (backends, "fp32_precision"), **NEWER, **OLDER}

# What a user has set, in this order.
SETTINGS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "medium": {"precision": "medium"},
    "high, then highest": {"precision": "high", "allow matmul": False},
    "older, allowed": {"allow matmul": True, "allow cudnn": True},
    "older, refused": {"allow matmul": False, "allow cudnn": False},
    "all": {"all": "tf32"},
    "all and cuda": {"all": "ieee", "cuda": "tf32"},
    "operations": {"conv": "ieee", "rnn": "tf32", "matmul": "tf32"},
    "all on the CPU": {"cpu": "bf16"},
    "on the CPU": {"cpu matmul": "bf16", "cpu conv": "tf32", "cpu rnn": "bf16"},
    "both, at odds": {"precision": "high", "matmul": "ieee", "allow cudnn": True, "conv": "ieee"},
    "both, at odds again": {"allow cudnn": False, "conv": "tf32", "cpu matmul": "tf32"},
}


def set_flag(name: str, value: Any) -> None:
    if name == "precision":
        torch.set_float32_matmul_precision(value)
    elif name == "cpu":  # what mkldnn.fp32_precision sets is the flag of all backends
        backends.mkldnn.set_flags(_fp32_precision=value)
    else:
        setattr(*PLACES[name], value)


def answers() -> list[Any]:
    """What PyTorch says about every flag, "at odds" where it refuses to."""
    found: list[Any] = []
    places = [*PLACES.values(), (backends.mkldnn, "fp32_precision")]
    readers = [partial(getattr, *place) for place in places]
    for read in [torch.get_float32_matmul_precision, *readers]:
        try:
            found.append(read())
        except RuntimeError:
            found.append("at odds")
    return found


def history() -> list[Any]:
    """The answers now, and after flags that others may be left to are set to this and that."""
    found = [answers()]
    for name, value in [("all", "tf32"), ("cuda", "ieee"), ("cpu", "ieee"), ("all", "none")]:
        set_flag(name, value)
        found.append(answers())
    for name in ["cuda", "cpu", "matmul", "cpu matmul", "conv", "rnn"]:  # until the older ones show
        for value in ["tf32", "none"]:
            set_flag(name, value)
            found.append(answers())
    return found


def torch_begins() -> None:
    """Sets all flags as they are in a new process."""
    set_flag("precision", "highest")
    for name in ["all", "cpu", *NEWER]:
        set_flag(name, "none")
    set_flag("allow cudnn", True)


@pytest.fixture(autouse=True)
def flags_as_found() -> Iterator[None]:
    before = answers()
    torch_begins()
    assert answers() == before
    yield
    torch_begins()


# -- models that use flags -------------------------------------------------------------------------


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.act, self.last = nn.Linear(5, 4), nn.ELU(), nn.Linear(4, 3)

    def hidden(self, x: Tensor) -> Tensor:
        return self.act(self.first(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.hidden(x))


class CudnnFlags(Plain):
    def hidden(self, x: Tensor) -> Tensor:
        with backends.cudnn.flags(enabled=False):
            return super().hidden(x)


class CudnnFlagsWithoutTF32(Plain):
    def hidden(self, x: Tensor) -> Tensor:
        with backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
            return super().hidden(x)


class AllFlags(Plain):
    def hidden(self, x: Tensor) -> Tensor:
        with backends.flags(fp32_precision="tf32"):
            return super().hidden(x)


class Reads(Plain):
    def hidden(self, x: Tensor) -> Tensor:
        assert torch.get_float32_matmul_precision() == "highest"
        assert not (backends.cuda.matmul.allow_tf32 or backends.cudnn.allow_tf32)
        assert {getattr(*place) for place in NEWER.values()} == {"ieee"}
        return super().hidden(x)


class SetsOlder(Plain):
    """It leaves them set, as a model does that was written as a script."""

    def hidden(self, x: Tensor) -> Tensor:
        torch.set_float32_matmul_precision("medium")
        backends.cuda.matmul.allow_tf32 = True
        backends.cudnn.allow_tf32 = not backends.cudnn.allow_tf32
        return super().hidden(x)


class SetsNewer(Plain):
    def hidden(self, x: Tensor) -> Tensor:
        backends.fp32_precision = "tf32"
        backends.cuda.matmul.fp32_precision = backends.cudnn.conv.fp32_precision = "tf32"
        backends.mkldnn.matmul.fp32_precision = "bf16"
        return super().hidden(x)


class Measures(Plain):
    def hidden(self, x: Tensor) -> Tensor:
        bs.activation_moments(CudnnFlags().to(x), x.detach())
        assert torch.get_float32_matmul_precision() == "highest"
        return super().hidden(x)


class Fails(SetsOlder):
    def forward(self, x: Tensor) -> Tensor:
        super().forward(x)
        raise KeyError("no such thing")


MODELS = [CudnnFlags, CudnnFlagsWithoutTF32, AllFlags, Reads, SetsOlder, SetsNewer, Measures]


# -- what is done with them ------------------------------------------------------------------------


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(12, 5, generator=generator)
    return x, torch.randint(3, (12,), generator=generator)


def unit_fisher(model: nn.Module) -> list[Tensor]:
    return [fisher.matrix() for fisher in bs.unit_fisher(model, data()[0]).values()]


def implicit(model: nn.Module) -> list[Tensor]:
    fishers = bs.unit_fisher(model, data()[0], storage="implicit", batch_size=5).values()
    return [value for fisher in fishers for value in (fisher.s, fisher.k)]


def gradient_gap(model: nn.Module) -> list[Tensor]:
    return numbers(bs.gradient_gap(model, *data()))


def activation_moments(model: nn.Module) -> list[Tensor]:
    return [moments.var for moments in bs.activation_moments(model, data()[0]).values()]


def bias_shift(model: nn.Module) -> list[Tensor]:
    with bs.bias_shift(model, data()[0]) as shift, torch.no_grad():
        unit_fisher(model)
        model.first.weight.mul_(2)
    return [part.total for part in shift.values()]


def check(model: nn.Module) -> list[Tensor]:
    report = bs.check(model, *data())
    assert report.covered.sum() == 2 and report.error.dropna().max() < 1e-6
    return []


def instrument(model: nn.Module) -> list[Tensor]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with bs.instrument(model, optimizer, probe=data(), every=1) as log:
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    return numbers(log.table())


def numbers(table: Any) -> list[Tensor]:
    return [torch.tensor(table.select_dtypes("number").to_numpy(float, copy=True))]


MEASUREMENTS = [
    unit_fisher,
    implicit,
    gradient_gap,
    activation_moments,
    bias_shift,
    check,
    instrument,
]


def histories(settings: dict[str, Any], work: Callable[[], Any]) -> tuple[list[Any], list[Any]]:
    """What PyTorch answers after the settings: without the work, and after it."""
    found: list[list[Any]] = []
    for between in (lambda: None, work):
        torch_begins()
        for name, value in settings.items():
            set_flag(name, value)
        between()
        found.append(history())
    return found[0], found[1]


@pytest.mark.parametrize("name", SETTINGS)
def test_flags_are_left_as_found_whatever_a_user_has_set(name):
    expected, found = histories(SETTINGS[name], lambda: unit_fisher(Plain()))
    assert found == expected


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("model", MODELS)
def test_models_that_use_either_generation_are_measured(model, name):
    plain, measured = unit_fisher(Plain()), []
    expected, found = histories(SETTINGS[name], lambda: measured.extend(unit_fisher(model())))
    assert found == expected
    # Some processors round as the model has said, in what comes after it in its forward pass.
    rounded = model in (SetsOlder, SetsNewer, AllFlags)
    for one, other in zip(measured, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=3e-2 if rounded else 0)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("measure", MEASUREMENTS)
def test_every_measurement_takes_such_models(measure, model):
    plain, measured = measure(Plain()), []
    expected, found = histories({}, lambda: measured.extend(measure(model())))
    assert found == expected
    rounded = model in (SetsOlder, SetsNewer, AllFlags)
    for one, other in zip(measured, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=3e-2 if rounded else 0, equal_nan=True)


@pytest.mark.parametrize("name", SETTINGS)
def test_flags_are_left_as_found_when_a_forward_pass_fails(name):
    def work():
        with pytest.raises(KeyError, match="no such thing"):
            unit_fisher(Fails())

    expected, found = histories(SETTINGS[name], work)
    assert found == expected


def test_flags_of_a_forward_pass_do_not_outlast_it():
    """The backward passes are no part of the model: their products are not rounded."""
    seen = []

    class Notes(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> Any:
            seen.append(answers())
            return gradients[0]

    class Model(SetsNewer):
        def hidden(self, x: Tensor) -> Tensor:
            return Notes.apply(super().hidden(x))

    bs.unit_fisher(Model(), data()[0])
    with full_precision(["cpu"]):
        expected = answers()
    assert seen and all(each == expected for each in seen)


@pytest.mark.parametrize("name", SETTINGS)
def test_blocks_inside_each_other(name):
    def work():
        with product_precision("tf32"):
            outside = answers()
            with full_precision(["cpu"]):
                full = answers()
                with product_precision("float32"), pytest.raises(KeyError), full_precision([]):
                    raise KeyError
                assert answers() == full
            assert answers() == outside

    expected, found = histories(SETTINGS[name], work)
    assert found == expected


@pytest.mark.parametrize("context", [backends.cudnn.flags, backends.flags])
def test_measurements_inside_the_contexts_of_pytorch(context):
    plain = unit_fisher(Plain())
    before = answers()
    with context():
        inside = answers()
        assert all(map(torch.equal, unit_fisher(Plain()), plain))
        assert answers() == inside
    assert answers() == before
