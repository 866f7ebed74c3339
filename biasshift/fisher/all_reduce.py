"""Sums over processes: every process has samples of its own, and afterwards all have the sums over
all of them.

The processes first agree on one reference, move their sums to it, and then add them up tensor by
tensor, in float64. Of the matrices only the upper triangle travels, for only that is kept. The
implicit storage sends the samples it holds.
"""

import io
import zlib
from dataclasses import replace
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor, distributed as dist

from biasshift.fisher.moments import Sums, WeightedSums
from biasshift.fisher.samples import Again, ImplicitSums

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Group: TypeAlias = "ProcessGroup | None"
Held: TypeAlias = WeightedSums | ImplicitSums


def all_reduced(
    sums: Held, noise: Tensor | None, what: str, group: Group
) -> tuple[Held, Tensor | None]:
    """The sums over all processes of a group, and those of ``noise``, (units,). ``what`` must be
    the same on all of them.

    Raises:
        RuntimeError: without a process group, or where a process has read its samples and not kept
            them.
        ValueError: when the processes do not hold the same layer, or not in the same way.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            "Merging over processes needs torch.distributed: call "
            "torch.distributed.init_process_group() first."
        )
    if isinstance(sums, ImplicitSums) and any(isinstance(part, Again) for part in sums.parts):
        what += " (not held)"
    _agree(
        sums,
        f"{what} {type(sums).__name__} {'with' if noise is not None else 'without'} label noise",
        group,
    )
    if what.endswith("(not held)"):
        raise RuntimeError(
            "Samples that did not fit into memory cannot be merged over processes: raise "
            "memory_budget, or choose units=."
        )
    positions, reference = _summed(
        [torch.tensor(float(sums.positions)), sums.reference * sums.positions],
        sums.first.device,
        group,
    )
    reference = reference / positions.clamp(min=1)
    moved = sums.moved(reference) if isinstance(sums, WeightedSums) else sums.about(reference)
    merged = _merged(moved, group)
    return merged, None if noise is None else _summed([noise], sums.first.device, group)[0]


def _merged(sums: Held, group: Group) -> Held:
    """Sums that are about the same reference everywhere. Spoils the memory of ``sums``."""
    counts = torch.tensor([float(sums.examples), float(sums.positions)])
    more = [sums.squares] if isinstance(sums, ImplicitSums) else []
    found = _summed(
        [counts, sums.total, sums.weight, sums.weight_squares, sums.first, *more],
        sums.first.device,
        group,
    )
    counts, total, weight, weight_squares, first = found[:5]
    examples, positions = (int(n) for n in counts)
    if isinstance(sums, ImplicitSums):
        new = replace(sums, squares=found[5], parts=_gathered(sums, group))
    else:
        for block in sums.second:
            dist.all_reduce(block, group=group)
        new = sums
    return replace(
        new,
        examples=examples,
        positions=positions,
        total=total,
        weight=weight,
        weight_squares=weight_squares,
        first=first,
    )


def _summed(tensors: list[Tensor], device: torch.device, group: Group) -> list[Tensor]:
    """The sums over all processes, sent as one."""
    flat = torch.cat([x.to(device, torch.float64).flatten() for x in tensors])
    dist.all_reduce(flat, group=group)
    return [
        part.view(x.shape)
        for part, x in zip(flat.split([x.numel() for x in tensors]), tensors, strict=True)
    ]


def _gathered(sums: ImplicitSums, group: Group) -> tuple:
    """The held samples of every process, on the device of this one."""
    device, buffer = sums.first.device, io.BytesIO()
    torch.save(sums.parts, buffer)
    sent: list = [None] * dist.get_world_size(group)
    dist.all_gather_object(sent, buffer.getvalue(), group=group)
    return tuple(
        part
        for data in sent
        for part in torch.load(io.BytesIO(data), map_location=device, weights_only=False)
    )


def _agree(sums: Sums, what: str, group: Group) -> None:
    """Raises on all processes when they differ: one that waits for others which gave up would wait
    forever.
    """
    units, inputs = sums.first.shape
    mine = torch.tensor(
        [units, inputs, sums.reference.dim(), zlib.crc32(what.encode())],
        dtype=torch.float64,
        device=sums.first.device,
    )
    both = torch.cat([mine, -mine])
    dist.all_reduce(both, op=dist.ReduceOp.MAX, group=group)
    if (both[:4] != -both[4:]).any():
        raise ValueError(
            f"The processes do not hold the same layer: here it has {units} units with {inputs} "
            f"inputs, {what}; "
            "elsewhere something differs "
            "(shape, name, damping, bias, labels, or storage)."
        )
