"""Counts of examples and positions over processes, exact also where float32 is not."""

import os
import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import distributed as dist

import biasshift as bs


@pytest.fixture
def process_group(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A group of this process alone."""
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("this PyTorch has no gloo")
    if "GLOO_SOCKET_IFNAME" not in os.environ:
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "lo0")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("storage", ["dense", "implicit"])
@pytest.mark.parametrize("examples, positions", [(61_380_001, 61_380_001), (3, 2**53 - 1)])
def test_counts_of_processes_are_exact(
    process_group: None, examples: int, positions: int, storage: str
) -> None:
    a = torch.randn(20, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    fisher = bs.UnitFisher.from_samples(a, a[:, :2].square(), damping=0.1, storage=storage)
    fisher = replace(fisher, sums=replace(fisher.sums, examples=examples, positions=positions))
    merged = fisher.all_reduce()
    assert (merged.sums.examples, merged.sums.positions) == (examples, positions)
    torch.testing.assert_close(merged.c, fisher.c, rtol=1e-15, atol=0)
    torch.testing.assert_close(merged.mean_p, fisher.mean_p, rtol=1e-13, atol=1e-15)
