"""The sums of all processes together, on every process, from the samples that each has alone.

The processes first agree on one reference, move their sums to it, and then add them up tensor by
tensor, in float64. Of the matrices only the upper triangle travels, for only that is kept. The
implicit storage sends the samples it holds.
"""

import io
import zlib
from dataclasses import replace

import torch
from torch import Tensor, distributed as dist

from biasshift.fisher.held import HeldSums
from biasshift.fisher.moments import Sums, WeightedSums
from biasshift.fisher.samples import ImplicitSums


def all_reduced(
    sums: WeightedSums | ImplicitSums,
    noise: Tensor | None,
    what: str,
    group: "dist.ProcessGroup | None",
) -> tuple[WeightedSums | ImplicitSums, Tensor | None]:
    """Returns the sums over all processes of a group, which all of them must call.

    Args:
        sums: those of this process, in the same storage everywhere; they stay as they are.
        noise: (units,), the variance of Σ δ² from drawing labels, or None on every process.
        what: a description of the layer, which must be the same on every process.
        group: the processes; None for all of them.

    Returns:
        The sums, and the summed noise or None; the same on every process.

    Raises:
        RuntimeError: without a process group, or where a process has read its samples and not kept
            them.
        ValueError: when the processes do not hold the same layer, or not in the same way.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            "Merging over processes needs torch.distributed. Call "
            "torch.distributed.init_process_group() first."
        )
    # samples may outnumber the blocks of one process, and not those of another
    sums = sums.in_blocks() if isinstance(sums, HeldSums) else sums
    device = sums.first.device
    unread = isinstance(sums, ImplicitSums) and any(part.terms == "unread" for part in sums.parts)
    what += ", not held" if unread else ", held"
    what += f" in {type(sums).__name__} {'without' if noise is None else 'with'} label noise"
    _agree(sums, what, group)
    if unread:
        raise RuntimeError(
            "Samples that did not fit into memory cannot be merged over processes. Raise "
            "memory_budget, or choose units=."
        )
    positions, reference = _summed(
        [_exact(sums.positions), sums.reference * sums.positions], device, group
    )
    reference = reference / positions.clamp(min=1)
    moved = sums.moved(reference) if isinstance(sums, WeightedSums) else sums.about(reference)
    return _merged(moved, group), None if noise is None else _summed([noise], device, group)[0]


def _merged(
    sums: WeightedSums | ImplicitSums, group: "dist.ProcessGroup | None"
) -> WeightedSums | ImplicitSums:
    """Sums that are about the same reference everywhere. Spoils the memory of ``sums``."""
    names = ["total", "weight", "weight_squares", "weight_rounding", "first"]
    if isinstance(sums, ImplicitSums):
        names.append("squares")
        sums = replace(sums, parts=_gathered(sums, group))
    else:
        for block in sums.second:
            dist.all_reduce(block, group=group)
    tensors = [_exact(sums.examples, sums.positions), *(getattr(sums, name) for name in names)]
    counts, *moments = _summed(tensors, sums.first.device, group)
    examples, positions = (int(n) for n in counts)
    return replace(
        sums, examples=examples, positions=positions, **dict(zip(names, moments, strict=True))
    )


def _exact(*counts: int) -> Tensor:
    """Counts in float64, which holds them up to 2⁵³; the default dtype only to 2²⁴."""
    return torch.tensor(counts, dtype=torch.float64)


def _summed(
    tensors: list[Tensor], device: torch.device, group: "dist.ProcessGroup | None"
) -> list[Tensor]:
    """The sums over all processes, sent as one."""
    flat = torch.cat([x.to(device, torch.float64).flatten() for x in tensors])
    dist.all_reduce(flat, group=group)
    parts = flat.split([x.numel() for x in tensors])
    return [part.view(x.shape) for part, x in zip(parts, tensors, strict=True)]


def _gathered(sums: ImplicitSums, group: "dist.ProcessGroup | None") -> tuple:
    """The held samples of every process, on the device of this one."""
    buffer = io.BytesIO()
    torch.save(sums.parts, buffer)
    sent: list = [None] * dist.get_world_size(group)
    dist.all_gather_object(sent, buffer.getvalue(), group=group)
    return tuple(
        part
        for data in sent
        for part in torch.load(io.BytesIO(data), map_location=sums.first.device, weights_only=False)
    )


def _agree(sums: Sums, what: str, group: "dist.ProcessGroup | None") -> None:
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
            f"inputs, {what}. Give all of them equal shapes, names, damping, bias, labels and "
            "storage."
        )
