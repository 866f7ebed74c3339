"""The seconds of a run: what its steps cost, and nothing else."""

import time

import pytest
import torch

from biasshift.training.clock import Clock


class Gpu:
    """A GPU that is behind its host: what it is told to do takes it seconds, the host none."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.busy_until, self.waits = 0.0, 0
        gpu = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing
                self.reached = False

            def record(self, stream: object) -> None:
                self.at = gpu.busy_until

            def synchronize(self) -> None:
                gpu.waits += not self.reached
                self.reached = True

            def elapsed_time(self, later: "Event") -> float:
                assert later.reached
                return 1000 * (later.at - self.at)

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)

    def work(self, seconds: float) -> None:
        self.busy_until += seconds


def test_on_a_gpu_seconds_are_those_of_its_work_and_not_of_the_launches(monkeypatch):
    gpu, clock = Gpu(monkeypatch), Clock(torch.device("cuda", 0))
    for number in range(10):
        measured = number == 5
        with clock.step(measured):
            gpu.work(50.0 if measured else 2.0)
        gpu.work(3.0)  # a score, or the next minibatch
        assert not gpu.waits
    assert clock.take() == pytest.approx(20.0)  # the measured step counts as the others
    with clock.step(False):
        gpu.work(13.0)
    assert clock.take() == pytest.approx((9 * 2 + 13) / 10)


def test_on_a_cpu_seconds_are_those_that_the_process_has_computed():
    clock, began = Clock(torch.device("cpu")), time.process_time()
    with clock.step(measured=False):
        x = torch.randn(300, 300)
        while time.process_time() < began + 0.05:
            x @ x
        time.sleep(0.05)
    assert 0.03 < clock.take() < 0.5
    assert clock.take() == 0.0


def test_no_step_costs_nothing():
    assert Clock(torch.device("cpu")).take() == 0.0
