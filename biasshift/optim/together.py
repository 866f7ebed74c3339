"""Many layers at once: one call for all of them, where each layer's own would cost more than work.

Layers whose samples have one position form their sums together, all running sums grow together, and
updates without a scale are made together. The numbers are those that every layer gets by itself.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import (
    Tensor,
    _foreach_add,  # pyright: ignore[reportPrivateImportUsage]
    _foreach_add_,  # pyright: ignore[reportPrivateImportUsage]
    _foreach_addcmul,  # pyright: ignore[reportPrivateImportUsage]
    _foreach_addcmul_,  # pyright: ignore[reportPrivateImportUsage]
    _foreach_mul,  # pyright: ignore[reportPrivateImportUsage]
    _foreach_mul_,  # pyright: ignore[reportPrivateImportUsage]
    _foreach_norm,  # pyright: ignore[reportPrivateImportUsage]
    _foreach_sub,  # pyright: ignore[reportPrivateImportUsage]
)

from biasshift.measure import layer_types
from biasshift.measure.layer_types import WeightLayer
from biasshift.optim.divisor import Share
from biasshift.optim.passes import Pass, RecordedCall
from biasshift.optim.references import References
from biasshift.optim.running_sums import RunningSums
from biasshift.optim.update_rule import UpdateRule


@torch.no_grad()
def sums_of_rows(
    forward_pass: Pass,
    of_pass: Share,
    layers: Mapping[str, WeightLayer],
    rule: UpdateRule,
    references: References,
) -> dict[str, RunningSums]:
    """Returns the sums of the linear layers that were called once on (examples, inputs), by name.

    None of layers that keep matrices, or of a pass whose loss leaves labels out.
    """
    if rule.scale == "full" or of_pass.counted is not None:
        return {}
    known = {}
    for name, calls in forward_pass.calls.items():
        module = layers.get(name)
        if module is not None and len(calls) == 1 and isinstance(module, layer_types.LINEAR):
            if _has_rows(calls[0], forward_pass, references.dtype(name, module), rule):
                known[name] = calls[0]
    if not known:
        return {}
    a = [call.a for call in known.values()]
    about = [
        references.of(name, lambda x=x: x.mean(0, keepdim=True))
        for name, x in zip(known, a, strict=True)
    ]
    parts = _parts(list(known.values()), a, about, of_pass.divisor, rule)
    return {
        name: RunningSums(
            forward_pass.examples,
            float(len(x)),
            reference,
            {key: [part[i]] for key, part in parts.items()},
            forward_pass.left_out,
        )
        for i, (name, x, reference) in enumerate(zip(known, a, about, strict=True))
    }


def _has_rows(call: RecordedCall, forward_pass: Pass, dtype: torch.dtype, rule: UpdateRule) -> bool:
    a, delta = call.a, call.delta
    return (
        a.dim() == 2
        and a.dtype == dtype
        and not call.overwritten
        and (rule.weight_sharing == "expand" or len(a) == int(forward_pass.examples))
        and (not rule.needs_errors or (delta is not None and delta.dim() == 2))
        and (delta is None or delta.dtype == dtype)
    )


def _parts(
    calls: list[RecordedCall], a: list[Tensor], about: list[Tensor], factor: float, rule: UpdateRule
) -> dict[str, list[Tensor]]:
    parts: dict[str, list[Tensor]] = {}
    squares: list[Tensor] = []
    if rule.needs_errors:
        deltas = [call.delta for call in calls if call.delta is not None]
        deltas = deltas if factor == 1 else _foreach_mul(deltas, factor)
        squares = list(_foreach_mul(deltas, deltas))
        parts["weight"] = [x.sum(0) for x in squares]
    if rule.center == "p" and rule.scale == "none":
        totals = [x.sum(0, keepdim=True) for x in a]
        parts["total"] = [
            torch.add(x, r, alpha=-len(of_layer))
            for x, r, of_layer in zip(totals, about, a, strict=True)
        ]
        return parts
    shifted = _foreach_sub(a, about)
    if rule.center == "p":
        parts["total"] = [x.sum(0, keepdim=True) for x in shifted]
        parts["second"] = [x.sum(0, keepdim=True) for x in _foreach_mul(shifted, shifted)]
        return parts
    parts["first"] = [s.T @ x for s, x in zip(squares, shifted, strict=True)]
    if rule.scale == "diagonal":
        _foreach_mul_(shifted, shifted)
        parts["second"] = [s.T @ x for s, x in zip(squares, shifted, strict=True)]
    return parts


def add_all(pairs: Sequence[tuple[RunningSums, RunningSums]], decay: float) -> None:
    """Decays sums and adds others to them, in place, as `RunningSums.add` does one by one."""
    simple = [pair for pair in pairs if _adds_part_by_part(*pair)]
    mine, theirs = [], []
    for old, new in simple:
        old.count(new, decay)
        for name, part in old.parts.items():
            mine += part
            theirs += new.parts[name]
    if mine:
        _foreach_mul_(mine, decay)
        _foreach_add_(mine, theirs)
    for old, new in pairs:
        if not _adds_part_by_part(old, new):
            old.add(new, decay)


def _adds_part_by_part(old: RunningSums, new: RunningSums) -> bool:
    plain = old.parts.keys() == new.parts.keys() and "samples" not in old.parts
    return plain and not old.waiting and not new.waiting


def are_finite(sums: Mapping[str, RunningSums]) -> bool:
    """Returns whether no pass has overflowed: running sums would never recover."""
    names = ("total", "weight", "first", "second")
    checked = [
        part for layer in sums.values() for name in names for part in layer.parts.get(name, ())
    ]
    checked = [part for part in checked if part.numel()]
    # no sum of products is larger than the largest activation and all errors make it
    bounds = [products.bound() for layer in sums.values() for products in layer.waiting]
    largest = [*(_foreach_norm(checked, math.inf) if checked else ()), *bounds]
    return not largest or bool(torch.stack([x.double() for x in largest]).isfinite().all())


def center_all(
    sums: Sequence[RunningSums],
    gradients: Sequence[tuple[Tensor, Tensor]],
    rule: UpdateRule,
) -> list[tuple[Tensor, Tensor]]:
    """Returns ``Δw = g − g₀ r`` and ``Δw₀ = g₀ − rᵀΔw`` of every layer.

    Args:
        sums: Of layers without groups, all of whose units have a bias with influence.
        gradients: Of the weights, (units, inputs), and the biases, in the dtype of the sums.
    """
    g, g0 = (list(x) for x in zip(*gradients, strict=True))
    about = [layer.reference for layer in sums]
    columns = [x[:, None] for x in g0]
    if rule.center == "p":
        means = [
            torch.add(layer.reference, layer.parts["total"][0], alpha=1 / layer.positions)
            for layer in sums
        ]
        dw = _foreach_addcmul(g, columns, means, value=-1)
        rows = zip(g0, dw, means, strict=True)
        return [(x, torch.addmv(y, x, r[0], alpha=-1)) for y, x, r in rows]
    weight = torch.cat([layer.parts["weight"][0] for layer in sums])
    alive = weight > 0  # the mean of dead units is 0
    inverse = torch.where(alive, weight, 1).reciprocal_()[:, None]
    sizes = [len(x) for x in g0]
    means = list(_foreach_mul([layer.parts["first"][0] for layer in sums], inverse.split(sizes)))
    _foreach_addcmul_(means, list(alive.to(weight.dtype)[:, None].split(sizes)), about)
    dw = _foreach_addcmul(g, columns, means, value=-1)
    _foreach_mul_(means, dw)
    shifts = [x.sum(1) for x in means]
    return list(zip(dw, _foreach_add(g0, shifts, alpha=-1), strict=True))
