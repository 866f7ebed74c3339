"""Threads that measure at the same time take turns, and other threads see nothing of it.

What one thread measures is what it would measure alone. What belongs to the process is as found
when all have ended, and is never another's on the way.
"""

import os
import threading
import time
import warnings

import pytest
import torch
from torch import Tensor, nn

import biasshift as bs
from biasshift.precision import full_precision, product_precision
from biasshift.restoration import Restoration, restoring
from tests.faults.alone import run_alone
from tests.faults.threads import PATIENCE, Mixed, examples, process, run_together


@pytest.fixture(autouse=True)
def _precision():
    """Flags that differ from those of measurements; other tests find all of them as they were."""
    with product_precision("float32"):
        torch.set_float32_matmul_precision("high")
        yield


def test_threads_measure_what_each_would_alone(tmp_path):
    run_alone("threads", 2, tmp_path)


@pytest.mark.filterwarnings("ignore")
def test_a_thread_that_draws_gets_its_stream_of_random_numbers():
    """Also with a model whose attention could drop, and is asked whether it does."""
    torch.manual_seed(7)
    expected = torch.stack([torch.rand(4) for _ in range(30000)])
    model, (x, _), measured = Mixed(0), examples(0), [0]
    over = threading.Event()

    def measure() -> None:
        while not over.is_set() or measured[0] < 2:
            bs.unit_fisher(model, x)
            bs.activation_moments(model, x)
            measured[0] += 1

    def draw() -> None:
        drawn = []
        for i in range(30000):
            drawn.append(torch.rand(4))
            if i % 1000 == 0:
                time.sleep(0.01)
        over.set()
        assert torch.equal(torch.stack(drawn), expected)

    torch.manual_seed(7)
    run_together(measure, draw)


def test_a_model_that_draws_leaves_the_random_state_as_found_beside_idle_threads():
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.act = nn.Linear(5, 4), nn.ELU()

        def forward(self, x: Tensor) -> Tensor:
            return self.act(self.stem(x)) + torch.rand(4)

    model, (x, _), over = Noisy(), examples(0), threading.Event()
    idle = threading.Thread(target=over.wait, daemon=True)
    idle.start()
    before = torch.get_rng_state()
    bs.activation_moments(model, x)
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(ValueError, match="draws random numbers"):
        bs.unit_fisher(model, x)
    assert torch.equal(torch.get_rng_state(), before)
    over.set()


@pytest.mark.filterwarnings("ignore")
def test_other_threads_measure_while_a_block_of_bias_shift_runs():
    """Its block is the user's, and may take as long as it likes."""
    model, (x, _) = Mixed(0), examples(0)
    with bs.bias_shift(model, x):
        run_together(lambda: bs.unit_fisher(Mixed(1), x))


@pytest.mark.filterwarnings("ignore")
def test_other_threads_warnings_are_caught_by_them_alone():
    """A block of `catch_warnings` may begin before a measurement and end within it."""
    model, (x, _), before = Mixed(0), examples(0), process()
    over = threading.Event()

    def catch() -> None:
        while not over.is_set():
            with warnings.catch_warnings():
                warnings.simplefilter("always")
                time.sleep(0.001)

    def measure() -> None:
        for _ in range(20):
            bs.activation_moments(model, x)
        over.set()

    run_together(catch, measure)
    assert process() == before


# -- the turn --------------------------------------------------------------------------------------


def test_blocks_of_threads_do_not_overlap_and_may_be_nested():
    inside, seen = [0], []

    @restoring()
    def alone(restoration: Restoration) -> None:
        restoration.undo(inside.__setitem__, 0, inside[0])
        inside[0] += 1

    def run() -> None:
        for _ in range(50):
            with alone():
                seen.append(inside[0])
                time.sleep(0)
                with alone():
                    seen.append(inside[0])
                seen.append(inside[0])

    run_together(run, run, run)
    assert seen == [1, 2, 1] * 150 and inside == [0]


def test_what_cannot_be_undone_does_not_keep_the_rest_from_it():
    undone = []

    @restoring()
    def change(restoration: Restoration) -> None:
        restoration.undo(undone.append, "first")
        restoration.undo(lambda: 1 / 0)
        restoration.undo(undone.append, "last")

    with pytest.raises(ZeroDivisionError), change():
        pass
    assert undone == ["last", "first"]
    run_together(change().__enter__)  # the turn is free again


def test_a_block_that_was_forgotten_blocks_nobody():
    undone = []

    @restoring()
    def change(restoration: Restoration) -> None:
        restoration.undo(undone.append, 1)

    block = change()
    block.__enter__()
    del block
    assert undone == [1]
    run_together(lambda: change().__enter__())


def test_precision_flags_of_threads_are_as_found():
    before = process()

    def measure() -> None:
        for _ in range(30):
            with full_precision(["cpu"]):
                assert torch.get_float32_matmul_precision() == "highest"
                time.sleep(0.001)

    def train() -> None:
        for _ in range(30):
            with product_precision("tf32"):
                time.sleep(0.001)

    run_together(measure, measure, train)
    assert process() == before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="fork of Unix")
@pytest.mark.filterwarnings("ignore")
def test_a_forked_process_measures_though_another_thread_had_the_turn():
    begun, over = threading.Event(), threading.Event()

    def hold() -> None:
        with full_precision([]):
            begun.set()
            over.wait(PATIENCE)

    thread = threading.Thread(target=hold, daemon=True)
    thread.start()
    begun.wait(PATIENCE)
    child = os.fork()
    if child == 0:
        with full_precision([]):
            os._exit(0)
    until = time.monotonic() + 30
    while (ended := os.waitpid(child, os.WNOHANG))[0] == 0 and time.monotonic() < until:
        time.sleep(0.01)
    over.set()
    thread.join()
    assert ended == (child, 0)
