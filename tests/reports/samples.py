"""Too few samples, repeated ones, probabilities for logits, and what a precision cannot carry."""

import copy
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from unittest import mock

import numpy as np
import torch
from torch import Tensor, distributed, nn

import biasshift as bs

from .table import report, warned


def network(width: int = 6) -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, width), nn.ELU(), nn.Linear(width, 3)).double()


def effective_samples(model: nn.Module, name: str, x: Tensor) -> Tensor:
    """(Σ S)² / Σ S² of every unit, S the mean square of its bias's gradient over the labels."""
    bias, rows = model.get_submodule(name).bias, []
    for one in x:
        logs = model(one[None])[0].log_softmax(-1)
        squares = 0.0
        for log in logs:
            (g0,) = torch.autograd.grad(log, bias, retain_graph=True)
            squares = squares + log.detach().exp() * g0.square()
        rows.append(squares)
    S = torch.stack(rows)
    return S.sum(0).square() / S.square().sum(0)


@report("too few effective samples", 20, 300)
def their_number_and_who_is_reliable(examples: int) -> tuple[dict, dict]:
    model, x = network(), torch.randn(examples, 3).double()
    found, right = {}, {}
    for name, inputs in (("0", 3), ("2", 6)):
        fisher, n = bs.unit_fisher(model, x)[name], effective_samples(model, name, x)
        found[f"{name} N"], right[f"{name} N"] = fisher.effective_samples, n
        found[f"{name} reliable"] = fisher.reliable.double()
        right[f"{name} reliable"] = (n >= 10 * inputs).double()
    return found, right


@report("too few effective samples", "unit_fisher", "gradient_gap", "instrument")
def warnings_a_call(how: str) -> tuple[list, list]:
    model, x, y = network(), torch.randn(40, 3).double(), torch.randint(3, (40,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def train() -> None:
        with bs.instrument(model, optimizer, probe=(x, y), every=1):
            for _ in range(3):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x), y).backward()
                optimizer.step()

    said = warned(
        {
            "unit_fisher": lambda: bs.unit_fisher(model, x),
            "gradient_gap": lambda: bs.gradient_gap(model, x, y),
            "instrument": train,
        }[how]
    )
    return [said.count("FewSamplesWarning"), "Layer '2'" in said, "reliable" in said], [
        1,
        True,
        True,
    ]


@report("too few effective samples", 50, 500)
def duplicated_examples(different: int) -> tuple[str, re.Pattern]:
    model, x = network(), torch.randn(different, 3).double()
    copies = x.repeat(1000 // different, 1)[torch.randperm(1000)]
    said = warned(lambda: bs.unit_fisher(model, copies))
    return said, re.compile(rf"^FewSamplesWarning: [^|]*{1000 - different} are copies[^|]*$")


ENDS = {
    "softmax": (lambda: nn.Softmax(-1), "categorical"),
    "sigmoid": (nn.Sigmoid, "bernoulli"),
    "log-softmax": (lambda: nn.LogSoftmax(-1), "categorical"),
    "none": (nn.Identity, "bernoulli"),
}


@report("probabilities in place of logits", *ENDS)
def are_warned_of(name: str) -> tuple[str, re.Pattern]:
    end, likelihood = ENDS[name]
    model, x = nn.Sequential(*network(), end()), torch.randn(300, 3).double()
    said = warned(lambda: bs.unit_fisher(model, x, likelihood=likelihood))
    silent = name in ("log-softmax", "none")
    return said, re.compile(r"^$" if silent else rf"look like probabilities.*last {name}")


# -- what a precision cannot carry -----------------------------------------------------------------


@report("imprecise", *product((torch.float16, torch.float32, torch.bfloat16), (1.0, 1e-6)))
def units_whose_k_is_wrong_are_flagged(variant: tuple[torch.dtype, float]) -> tuple[list, list]:
    """How many units have a k that is 0.1 off and no flag; flagged or tiny, and called reliable."""
    dtype, scale = variant
    layers = [nn.Linear(5, 8), nn.ELU(), nn.Linear(8, 8), nn.ELU(), nn.Linear(8, 3)]
    model, x = nn.Sequential(*layers).to(dtype), (torch.randn(1500, 5) * scale).to(dtype)
    exact = k_in_double(copy.deepcopy(model).double(), x.double())
    unflagged = reliable = 0
    for name, fisher in bs.unit_fisher(model, x).items():
        flagged = fisher.imprecise | fisher.singular | fisher.dead
        wrong = ~((fisher.k.double() - exact[name]).abs() <= 0.1)
        unflagged += int((wrong & ~flagged).sum())
        # behind a bias, a millionth of the inputs is lost in the activations' rounding
        lost = torch.full_like(wrong, scale < 1 and name != "0")
        reliable += int(((flagged | lost) & fisher.reliable).sum())
    return [unflagged, reliable], [0, 0]


def k_in_double(model: nn.Sequential, x: Tensor, damping: float = 1e-4) -> dict[str, Tensor]:
    """``k = 1 + (m − μ)ᵀ V⁻¹ m``, from gradients of the net inputs in double precision."""
    nets: list[Tensor] = []
    inputs: dict[str, Tensor] = {}
    h = x
    for i, layer in enumerate(model):
        if isinstance(layer, nn.Linear):
            inputs[str(i)] = h
        h = layer(h)
        if isinstance(layer, nn.Linear):
            nets.append(h)
    logs, found = h.log_softmax(-1), {}
    S = [torch.zeros_like(net) for net in nets]
    for c in range(logs.shape[1]):
        deltas = torch.autograd.grad(logs[:, c].sum(), nets, retain_graph=True)
        for total, delta in zip(S, deltas, strict=True):
            total += logs[:, c : c + 1].detach().exp() * delta.square()
    for (name, a), weights in zip(inputs.items(), S, strict=True):
        a, q = a.detach(), (weights / weights.sum(0)).detach()
        k = []
        for unit in range(q.shape[1]):
            m = q[:, unit] @ a
            V = (a - m).T @ ((a - m) * q[:, unit : unit + 1])
            V = V + damping * V.diagonal().mean() * torch.eye(len(m)).double()
            k.append(1 + (m - a.mean(0)) @ torch.linalg.pinv(V, rtol=1e-15) @ m)
        found[name] = torch.stack(k)
    return found


@report(
    "small variance of large means",
    *product((1e3, 1e4), ("maps", "one batch of many")),
    tolerance=1e-6,
)
def feature_maps_with_a_spread_of_a_tenth(variant: tuple[float, str]) -> tuple[Tensor, Tensor]:
    mean, kind = variant
    x = (mean + 0.1 * torch.randn(12, 4, 9, 9, dtype=torch.float64)).float()
    model = nn.Sequential(nn.Identity())
    probe = x if kind == "maps" else list(x.split(5))
    found = bs.activation_moments(model, probe, unit_axis=1)["0"].var
    wide = x.numpy().astype(np.longdouble).swapaxes(0, 1).reshape(4, -1)
    return found, torch.tensor(wide.var(1).astype(float))


@contextmanager
def alone() -> Iterator[None]:
    """A process group of this process."""
    loopback = "lo" if sys.platform == "linux" else "lo0"
    with mock.patch.dict(os.environ, {"GLOO_SOCKET_IFNAME": loopback}):
        distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
        try:
            yield
        finally:
            distributed.destroy_process_group()


@report("counts over processes", 2**24 + 1, 61_380_001, 2**40 + 3)
def beyond_what_float32_counts(count: int) -> tuple[list, list]:
    a = torch.randn(20, 3)
    fisher = bs.UnitFisher.from_samples(a, a[:, :2].square(), damping=0.1)
    fisher = replace(fisher, sums=replace(fisher.sums, examples=count, positions=count))
    with alone():
        sums = fisher.all_reduce().sums
    return [int(sums.examples), int(sums.positions)], [count, count]
