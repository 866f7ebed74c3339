"""Two processes against one: the merge over processes is exact, and the same on all of them.

This file is also the program that the processes run, with their rank and a folder as arguments.
"""

import os
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import distributed as dist, nn

import biasshift as bs
from biasshift.fisher.moments import WeightedSums

WORLD = 2
SHARES = (slice(0, 7), slice(7, 20))  # unequal, so that an average of averages would show


def samples() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(20, 19, generator=generator, dtype=torch.float64)
    a = noise * 0.3 + torch.arange(20)[:, None]  # the shares have different means
    return a, torch.rand(20, 4, generator=generator, dtype=torch.float64)


def network() -> tuple[nn.Module, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(4, 6, 3, groups=2, padding=1), nn.ELU(), nn.Flatten(), nn.Linear(6 * 9, 3)
    ).double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.3)
    return model, torch.randn(20, 4, 3, 3, generator=generator, dtype=torch.float64) + 2


def measured(share: slice) -> dict[str, bs.UnitFisher]:
    """The same layers from any share of the samples."""
    a, delta2 = (x[share] for x in samples())
    model, x = network()
    several = [bs.unit_fisher(model, part, damping=0.1) for part in x[share].split(3)]
    return {
        "samples": bs.UnitFisher.from_samples(a, delta2, damping=0.1),
        "implicit": bs.UnitFisher.from_samples(
            a, delta2, damping=0.1, storage="implicit", tolerance=1e-14
        ),
        "grouped": bs.unit_fisher(model, x[share], damping=0.1)["0"],
        "expand": bs.unit_fisher(model, x[share], damping=0.1, weight_sharing="expand")["0"],
        "batches": sum((fishers["3"] for fishers in several[1:]), several[0]["3"]),
    }


def numbers(fisher: bs.UnitFisher) -> dict[str, torch.Tensor]:
    names = ("mean_delta2", "mean_p", "mean_q", "cov_p", "var_q", "effective_samples", "s", "k")
    counts = torch.tensor([fisher.sums.examples, fisher.sums.positions])
    return {
        "counts": counts,
        "matrix": fisher.matrix(),
        **{name: getattr(fisher, name) for name in names},
    }


def keys(share: slice) -> bs.UnitFisher:
    """A score that a softmax over positions follows: its bias has no influence."""

    class Pooling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.score = nn.Linear(4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (self.score(x).softmax(1) * x).sum(1)

    torch.manual_seed(2)
    model, x = Pooling().double(), torch.randn(20, 5, 4, dtype=torch.float64)
    return bs.unit_fisher(model, x[share], damping=0.1)["score"]


def inert_numbers(fisher: bs.UnitFisher) -> dict[str, torch.Tensor]:
    g, g0 = torch.arange(4.0, dtype=torch.float64)[None], torch.ones(1, dtype=torch.float64)
    dw, dw0 = fisher.natural_gradient(g, g0)
    assert dw0 is not None
    return {"A": fisher.A, "dw": dw, "dw0": dw0, "bias_inert": fisher.bias_inert}


def work(rank: int, folder: Path) -> None:
    """What each process does: it merges, and writes the numbers into a file."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "lo0")
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD
    )
    mine = measured(SHARES[rank])
    merged: dict = {name: numbers(fisher.all_reduce()) for name, fisher in mine.items()}
    merged["untouched"] = numbers(mine["samples"])
    merged["inert"] = inert_numbers(keys(SHARES[rank]).all_reduce())
    nothing = replace(mine["samples"], sums=WeightedSums.empty(4, torch.full((19,), 5.0)))
    merged["nobody but 1"] = numbers((mine["samples"] if rank == 1 else nothing).all_reduce())
    try:
        mine["samples"].damped(0.1 * (1 + rank)).all_reduce()
    except ValueError as error:
        merged["refused"] = str(error)
    torch.save(merged, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def merged(tmp_path_factory) -> list[dict]:
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("this PyTorch has no gloo")
    folder = tmp_path_factory.mktemp("processes")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(folder)], stderr=subprocess.PIPE, text=True, env=environment
        )
        for rank in range(WORLD)
    ]
    try:
        errors = [process.communicate(timeout=90)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * WORLD, "\n".join(errors)
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


@pytest.mark.parametrize("name", ["samples", "implicit", "grouped", "expand", "batches"])
@pytest.mark.parametrize("rank", range(WORLD))
def test_two_processes_are_one(merged, name, rank):
    expected = numbers(measured(slice(0, 20))[name])
    for quantity, value in merged[rank][name].items():
        torch.testing.assert_close(
            value,
            expected[quantity],
            rtol=1e-12,
            atol=1e-12,
            msg=lambda message, quantity=quantity: f"{quantity}: {message}",
        )


def test_the_processes_sums_stay_their_own(merged):
    for rank in range(WORLD):
        expected = numbers(measured(SHARES[rank])["samples"])
        assert all(
            torch.equal(value, expected[quantity])
            for quantity, value in merged[rank]["untouched"].items()
        )


def test_a_process_may_have_no_samples(merged):
    expected = numbers(measured(SHARES[1])["samples"])
    for rank in range(WORLD):
        for quantity, value in merged[rank]["nobody but 1"].items():
            torch.testing.assert_close(value, expected[quantity], rtol=1e-12, atol=1e-12)


def test_a_bias_without_influence_has_none_in_the_merged_layer(merged):
    expected = inert_numbers(keys(slice(0, 20)))
    assert expected["bias_inert"].all() and expected["dw"].isfinite().all()
    for rank in range(WORLD):
        for quantity, value in merged[rank]["inert"].items():
            torch.testing.assert_close(value, expected[quantity], rtol=1e-12, atol=1e-12)


def test_different_layers_are_refused_everywhere(merged):
    for rank in range(WORLD):
        message = merged[rank]["refused"]
        assert "do not hold the same layer" in message and "damping" in message


def test_without_processes_it_is_an_error():
    fisher = measured(slice(0, 20))["samples"]
    with pytest.raises(RuntimeError, match="init_process_group"):
        fisher.all_reduce()


if __name__ == "__main__":
    warnings.simplefilter("error")
    warnings.simplefilter("ignore", bs.FewSamplesWarning)
    work(int(sys.argv[1]), Path(sys.argv[2]))
