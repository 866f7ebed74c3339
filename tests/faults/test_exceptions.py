"""Exceptions inside of measurements cost no step of the user, and leave nothing behind."""

import copy
import gc
import io
import pickle
import warnings
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import biasshift as bs
from biasshift.tracking.logs import TrainingLog
from tests.faults.alone import run_alone
from tests.faults.exceptions import X, Y, net


def test_steps_are_taken_once_whatever_a_measurement_around_them_raises(tmp_path):
    run_alone("exceptions", 12, tmp_path)


@pytest.mark.parametrize("where", ["_net_means", "_measured"])
def test_a_full_memory_is_warned_of_once_and_training_goes_on(monkeypatch, where):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    log = bs.instrument(model, optimizer, probe=(X, Y), every=1, quantities=("bias_shift", "gap"))

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    monkeypatch.setattr(log, where, full)
    F.cross_entropy(model(X), Y).backward()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.warns(UserWarning, match=r"Step 1 .*OutOfMemoryError.*Training goes on") as caught:
        optimizer.step()
    assert len(caught) == 1
    moved = [not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)]
    assert all(moved)
    optimizer.step()  # without another warning, which would be an error here
    monkeypatch.undo()
    optimizer.step()
    assert log.step == 3 and log.table().query("layer == '2'").step.max() == 3


def test_a_warning_that_is_an_error_comes_behind_the_step(monkeypatch):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    log = bs.instrument(model, optimizer, probe=(X, Y), every=1)
    monkeypatch.setattr(log, "_net_means", lambda: 1 / 0)
    F.cross_entropy(model(X), Y).backward()
    before = model[0].weight.detach().clone()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="Training goes on"):
            optimizer.step()
    assert not torch.equal(model[0].weight, before) and log.step == 1


def test_an_interruption_of_a_measurement_before_a_step_comes_through(monkeypatch):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    log = bs.instrument(model, optimizer, probe=(X, Y), every=1)

    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(log, "_net_means", interrupted)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    assert log.step == 0


# -- a log of training batches ---------------------------------------------------------------------


class Raising(nn.Module):
    """Raises between its two activations, when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.act, self.second, self.last = (
            nn.Linear(4, 5),
            nn.ELU(),
            nn.Linear(5, 3),
            nn.Tanh(),
        )
        self.error: BaseException | None = None

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.first(x))
        if self.error is not None:
            raise self.error
        return self.last(self.second(h))


@pytest.mark.parametrize("error", [RuntimeError("full"), KeyboardInterrupt()])
@pytest.mark.parametrize("first", [True, False])
def test_a_forward_pass_that_raised_has_no_part_in_the_moments(error, first):
    torch.manual_seed(0)
    model = Raising()
    log, expected = bs.instrument(model), bs.instrument(model)
    expected.remove()
    expected = bs.instrument(copy.deepcopy(model))
    batches = torch.randn(3, 6, 4)
    for i, batch in enumerate(batches):
        if i == (0 if first else 1):
            model.error = error
            with pytest.raises(type(error)):
                model(100 * batch)
            model.error = None
            model.act(torch.ones(2, 5))  # called by itself, which is no pass of training
        model(batch)
        expected.model(batch)
    assert log.step == 3 and log.table().equals(expected.table())
    assert log.layers.equals(expected.layers)
    log.flush()
    model(batches[0])
    expected.flush()
    expected.model(batches[0])
    assert log.table().equals(expected.table())


# -- copies, pickles, and logs that are dropped ----------------------------------------------------


@pytest.mark.parametrize("probed", [True, False])
def test_copies_and_pickles_of_a_watched_model_hold_nothing_of_the_log(probed):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    log = bs.instrument(model, optimizer, **({"probe": (X, Y)} if probed else {}))
    pickled = pickle.dumps(model)
    torch.save(model, io.BytesIO())
    copies = [copy.deepcopy(model), pickle.loads(pickled), copy.deepcopy(copy.deepcopy(model))]
    assert len(pickled) < 20_000 and b"tracking" not in pickled
    for copied in copies:
        for _ in range(3):
            copied(X)
    model(X)
    watched = weakref.ref(log)
    if not probed:
        assert isinstance(log, TrainingLog) and set(log.table()["mean"].dropna().index)
        assert next(iter(log._watcher.sums.values()))[1].count == len(X)
    del log
    gc.collect()
    assert watched() is None
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks


# -- an optimizer that takes no steps --------------------------------------------------------------


@pytest.mark.parametrize("labels", ["sampled", "empirical"])
@pytest.mark.parametrize("kind", ["eval", "no backward", "dropped", "raised", "accumulated"])
def test_an_idle_optimizer_keeps_no_activations(labels, kind):
    model, alive = Raising(), []
    bs.optim.UnitNaturalGradient(model, lr=0.01, labels=labels)  # dropped: its hooks are deaf
    optimizer = bs.optim.UnitNaturalGradient(model, lr=0.01, labels=labels)
    model.act.register_forward_hook(lambda m, a, h: alive.append(weakref.ref(h)))
    count = 100
    for _ in range(count):
        model.train(kind != "eval")
        model.error = RuntimeError("full") if kind == "raised" else None
        try:
            loss = F.cross_entropy(model(torch.randn(6, 4)), torch.arange(6) % 3)
        except RuntimeError:
            continue
        if kind in ("dropped", "accumulated"):
            loss.backward()
        if kind == "dropped":
            model.zero_grad()
        del loss
    model.error = None
    gc.collect()
    left = sum(reference() is not None for reference in alive)
    # Errors of the user's losses wait for the step, and with them what they belong to.
    if labels == "empirical" and kind == "dropped":
        assert left <= 33
    elif labels == "empirical" and kind == "accumulated":
        assert left <= count
    else:
        assert left <= 1
    recorder = optimizer._recorder
    assert len(recorder._passes) <= (count if labels == "empirical" else 0)
    model.zero_grad()
    optimizer.zero_grad()
    gc.collect()
    assert not any(reference() is not None for reference in alive)
    F.cross_entropy(model.train()(torch.randn(6, 4)), torch.arange(6) % 3).backward()
    optimizer.step()


def test_passes_that_are_added_up_give_the_step_of_one_batch():
    """Gradients of many passes before a step, each with a part of the examples."""
    steps = []
    for parts in (1, 50):
        torch.manual_seed(0)
        model = net().double()
        optimizer = bs.optim.UnitNaturalGradient(
            model, lr=0.1, labels="empirical", center="q", damping=1e-2
        )
        x, y = X.double().repeat(25, 1), Y.repeat(25)
        for inputs, labels in zip(x.chunk(parts), y.chunk(parts), strict=True):
            (F.cross_entropy(model(inputs), labels) / parts).backward()
        optimizer.step()
        steps.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(*steps, rtol=1e-9, atol=1e-12)
