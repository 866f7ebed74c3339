"""What is taken for a probe: batches of inputs, batches (x, y), and labels of any kind."""

from collections import namedtuple
from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import biasshift as bs
from biasshift.measure.bias_shift import BiasShift

Pair = namedtuple("Pair", "x y")
HOW = r"x and y as two arguments.*\[\(x, y\)\].*several"


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.ELU(), nn.Linear(4, 3)).double()


def examples(n: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 3, dtype=torch.float64, generator=generator)
    return x, torch.randint(3, (n,), generator=generator)


def first_batch(*tensors: Tensor) -> list[Tensor]:
    return next(iter(DataLoader(TensorDataset(*tensors), batch_size=8)))


def shifted(model: nn.Module, probe: object) -> BiasShift:
    """The bias shift of a step that adds 0.5 to the weights of the first layer."""
    with bs.bias_shift(model, probe) as shift:
        model[0].weight.data.add_(0.5)
    model[0].weight.data.sub_(0.5)
    return shift["2"]


READERS: dict[str, Callable[[nn.Module, object], object]] = {
    "unit_fisher": bs.unit_fisher,
    "unit_fisher of a function": lambda model, probe: bs.unit_fisher(model, lambda: probe),
    "unit_fisher in batches": lambda model, probe: bs.unit_fisher(model, probe, batch_size=3),
    "gradient_gap": bs.gradient_gap,
    "activation_moments": bs.activation_moments,
    "check": bs.check,
    "bias_shift": shifted,
    "instrument": lambda model, probe: bs.instrument(
        model, torch.optim.SGD(model.parameters(), lr=0.1), probe=probe, quantities="bias_shift"
    ),
}
x, y = examples()
AMBIGUOUS = {
    "a loader's list": first_batch(x, y),
    "an autoencoder's": first_batch(x, 3 * x),
    "two batches of equal length": list(x.split(4)),
    "with weights of the examples": first_batch(x, y, torch.ones(8)),
    "labels as a list": [x, y.tolist()],
    "labels as an array": [x, y.numpy()],
    "labels as tensors": [x[:2], [y[:3], y[:5]]],
}


@pytest.mark.parametrize("probe", AMBIGUOUS.values(), ids=AMBIGUOUS)
@pytest.mark.parametrize("reader", READERS)
def test_a_list_that_may_be_one_batch_is_refused(reader: str, probe: list) -> None:
    with pytest.raises(ValueError, match=HOW):
        READERS[reader](network(), probe)


@pytest.mark.parametrize("probe", [(x, y), Pair(x, y), (x, y, y), ((x, y), (x, y))])
@pytest.mark.parametrize("reader", [name for name in READERS if name != "instrument"])
def test_a_tuple_is_refused(reader: str, probe: tuple) -> None:
    with pytest.raises(ValueError, match=HOW):
        READERS[reader](network(), probe)


def test_instrument_takes_a_pair_and_refuses_other_tuples() -> None:
    assert READERS["instrument"](network(), (x, y)) is not None
    for probe in ((x, y, y), ((x, y), (x, y))):
        with pytest.raises(ValueError, match=HOW):
            READERS["instrument"](network(), probe)


@pytest.mark.parametrize(
    "probe",
    [
        [x[:5], x[5:]],
        [(x[:4],), (x[4:],)],
        [[x[:4], y[:4]], [x[4:], y[4:]]],
        [x[:3], x[3:6], x[6:]],
        [x[:2], x[2:4], x[4:6], x[6:]],
        [(x, y)],
        [[x, y]],
        [x],
        DataLoader(x, batch_size=4),
        DataLoader(TensorDataset(x, y), batch_size=4),
    ],
)
def test_batches_of_any_kind_are_the_probe(probe: object) -> None:
    """Also two of equal length from an iterable that is not a list, as a loader."""
    model = network()
    whole, parts = bs.unit_fisher(model, x), bs.unit_fisher(model, probe)
    torch.testing.assert_close(parts["0"].matrix(), whole["0"].matrix(), rtol=1e-12, atol=1e-14)
    mean = bs.activation_moments(model, probe)["1"].mean
    torch.testing.assert_close(mean, model[:2](x).mean(0).detach(), rtol=1e-12, atol=1e-14)
    incoming = shifted(model, probe).incoming
    torch.testing.assert_close(incoming, shifted(model, x).incoming, rtol=1e-12, atol=1e-14)


def test_a_one_shot_iterator_of_two_equal_batches_is_a_probe() -> None:
    incoming = shifted(network(), iter(x.split(4))).incoming
    torch.testing.assert_close(incoming, shifted(network(), x).incoming, rtol=1e-12, atol=1e-14)


# -- labels ----------------------------------------------------------------------------------------

READABLE = {
    "list": y.tolist(),
    "tuple": tuple(y.tolist()),
    "array": y.numpy(),
    "scalars": list(y),
    "series": pd.Series(y.tolist(), index=range(8)[::-1]),  # in its order, not by its index
}
UNREADABLE = {
    "boxes": [{"boxes": 1}] * 8,
    "two tensors": [y, y],
    "number": 3,
    "text": "three",
    "dict": {"labels": y},
    "too few": y.tolist()[:3],
    "names": ["cat"] * 8,
}


@pytest.mark.parametrize("batch_size", [None, 3])
@pytest.mark.parametrize("labels", READABLE.values(), ids=READABLE)
def test_labels_become_a_tensor_where_they_are_read(labels: object, batch_size: int | None) -> None:
    model = network()
    expected = bs.unit_fisher(model, x, y, labels="empirical")["0"].matrix()
    gap = bs.gradient_gap(model, x, y)
    for probe in ((x, labels), ([(x, labels)], None)):
        fisher = bs.unit_fisher(model, *probe, labels="empirical", batch_size=batch_size)["0"]
        torch.testing.assert_close(fisher.matrix(), expected, rtol=1e-12, atol=1e-14)
        cosines = bs.gradient_gap(model, *probe, batch_size=batch_size).cos_gradient
        np.testing.assert_allclose(cosines, gap.cos_gradient, rtol=1e-10)
        assert bs.check(model, *probe).error.max() < 1e-10


@pytest.mark.parametrize("batch_size", [None, 3])
@pytest.mark.parametrize("labels", UNREADABLE.values(), ids=UNREADABLE)
def test_labels_of_other_kinds_are_left_alone_until_they_are_read(
    labels: object, batch_size: int | None
) -> None:
    model = network()
    expected = bs.unit_fisher(model, x)["0"].matrix()
    for probe in ((x, labels), ([(x, labels)], None)):
        fisher = bs.unit_fisher(model, *probe, batch_size=batch_size)["0"].matrix()
        torch.testing.assert_close(fisher, expected, rtol=1e-12, atol=1e-14)
        for read in (
            lambda probe=probe: bs.unit_fisher(
                model, *probe, labels="empirical", batch_size=batch_size
            ),
            lambda probe=probe: bs.gradient_gap(model, *probe, batch_size=batch_size),
            lambda probe=probe: bs.check(model, *probe),
        ):
            with pytest.raises(ValueError, match=f"'y' must be.*got {type(labels).__name__}"):
                read()
    mean = bs.activation_moments(model, [(x, labels)], batch_size=batch_size)["1"].mean
    torch.testing.assert_close(mean, model[:2](x).mean(0).detach(), rtol=1e-12, atol=1e-14)
    assert float(shifted(model, [(x, labels)]).total.abs().max()) > 0


def test_a_batch_whose_examples_are_not_a_tensor_is_refused_in_batches_too() -> None:
    for batch_size in (None, 2):
        with pytest.raises(ValueError, match=r"pair \(x, y\) or a dict, got list"):
            bs.activation_moments(network(), [([x, x], y)], batch_size=batch_size)
