"""Measurements on the shares of one probe, merged over the processes of ``torch.distributed``.

The results are those of one process that measures all of the probe, and the same on every process.
All processes must call these functions with the same layers in the same order.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import reduce
from operator import add
from typing import Any

import torch
from torch import Tensor, distributed as dist

from biasshift.measure.accumulators import Measured
from biasshift.measure.activation_moments import ActivationMoments
from biasshift.measure.bias_shift import NetMeans


def merged_moments(own: Mapping[str, ActivationMoments]) -> dict[str, ActivationMoments]:
    """Returns the activation moments over all processes.

    Their sums merge exactly, in the order of the ranks: the result is the same on all processes,
    bit by bit.
    """
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, {name: _moved(moments, "cpu") for name, moments in own.items()})
    return {
        name: _moved(reduce(add, (part[name] for part in parts)), moments.total.device)
        for name, moments in own.items()
    }


def merged_means(own: Mapping[str, NetMeans]) -> dict[str, NetMeans]:
    """Returns mean incoming activations and net inputs over the positions of all processes.

    The weights are the same on all of them, and stay as they are.
    """
    merged = {}
    for name, means in own.items():
        count = torch.tensor(float(means.positions), dtype=torch.float64, device=means.net.device)
        mean, net = means.mean * count, means.net * count
        for x in (count, mean, net):
            dist.all_reduce(x)
        merged[name] = replace(means, mean=mean / count, net=net / count, positions=int(count))
    return merged


def merged_measurements(own: Mapping[str, Measured]) -> dict[str, Measured]:
    """Returns unit Fisher matrices and mean gradients over the examples of all processes.

    Every process counts with the number of its examples, which may differ.

    Raises:
        ValueError: for processes that do not hold the same layer, as `UnitFisher.all_reduce`.
    """
    merged = {}
    for name, measured in own.items():
        sums = measured.fisher.sums
        fisher = measured.fisher.all_reduce()
        count = torch.tensor(float(sums.examples), dtype=torch.float64, device=sums.first.device)
        total = count.clone()
        dist.all_reduce(total)
        merged[name] = Measured(
            fisher, _mean(measured.g, count, total), _mean(measured.g0, count, total)
        )
    return merged


def _mean(g: Tensor | None, count: Tensor, total: Tensor) -> Tensor | None:
    if g is None:
        return None
    summed = g * count
    dist.all_reduce(summed)
    return summed / total


def _moved(moments: ActivationMoments, device: Any) -> ActivationMoments:
    return replace(
        moments,
        reference=moments.reference.to(device),
        total=moments.total.to(device),
        squares=moments.squares.to(device),
    )
