"""What several processes have measured on their shares of one probe, as if one of them had measured
all of it.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import reduce
from operator import add
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed as dist

from biasshift.measure.activation_moments import ActivationMoments
from biasshift.measure.bias_shift import NetMeans
from biasshift.measure.options import Measured

T = TypeVar("T")


def merged_moments(found: Mapping[str, ActivationMoments]) -> dict[str, ActivationMoments]:
    """The sums over all processes, exactly."""
    parts = _gathered({name: _moved(moments, "cpu") for name, moments in found.items()})
    return {
        name: _moved(reduce(add, (part[name] for part in parts)), found[name].total.device)
        for name in found
    }


def merged_means(found: Mapping[str, NetMeans]) -> dict[str, NetMeans]:
    """Means over the positions of all processes; the weights are the same on all of them."""
    merged = {}
    for name, own in found.items():
        count = torch.tensor(float(own.positions), dtype=torch.float64, device=own.net.device)
        mean, net = own.mean * count, own.net * count
        for x in (count, mean, net):
            dist.all_reduce(x)
        merged[name] = replace(own, mean=mean / count, net=net / count, positions=int(count))
    return merged


def merged_measurements(found: Mapping[str, Measured]) -> dict[str, Measured]:
    """The unit Fisher matrices and the mean gradients over the examples of all processes."""
    return {name: _merged(own) for name, own in found.items()}


def _merged(own: Measured) -> Measured:
    fisher = own.fisher.all_reduce()
    count = torch.tensor(
        float(own.fisher.sums.examples), dtype=torch.float64, device=own.fisher.sums.first.device
    )
    total = count.clone()
    dist.all_reduce(total)
    return Measured(fisher, *(_mean(g, count, total) for g in (own.g, own.g0)))


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


def _gathered(own: T) -> list[T]:
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, own)
    return parts
