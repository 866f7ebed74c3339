"""Sums over one batch of one layer, formed of its activations and errors at the least cost."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from biasshift.fisher.moments import sum_rounding
from biasshift.measure import layer_types
from biasshift.measure.layer_types import WeightLayer
from biasshift.optim.running_sums import RunningSums
from biasshift.optim.triangle import Outer, Weighted
from biasshift.optim.update_rule import UpdateRule

# Elements of the errors times activations of shared weights that are formed at a time.
VECTORS = 2**22


@dataclass
class Batch:
    """What sums are formed of.

    A sample is an example where its positions belong together, else a position: then there is one
    position a sample.
    """

    a: Tensor  # (samples, positions, groups, inputs), the incoming activations
    delta: Tensor | None  # (samples, positions, units), the errors; None where none are read
    examples: float  # how many examples the samples are of
    # (samples, positions), bool, False where a position has no part in the loss: its errors are 0
    kept: Tensor | None = None
    # the `rounding_share` of the errors, where these are multiples of what was computed
    share: Tensor | None = None
    left_out: float = 0.0  # of the examples, those that have no label that counts


def batch_sums(batch: Batch, reference: Tensor, rule: UpdateRule) -> RunningSums:
    """Returns the sums of one batch.

    Args:
        reference: (groups, inputs), about which products are formed.
        rule: Which sums are wanted.
    """
    a, delta, kept = batch.a, batch.delta, batch.kept
    count = a.shape[0] * a.shape[1] if kept is None else int(kept.sum())
    sums = RunningSums(batch.examples, float(count), reference, {}, batch.left_out)
    if a.shape[1] == a.shape[2] == 1:
        shifted = a[:, 0, 0] - reference[0]
        if kept is not None:
            shifted *= kept
        _of_rows(sums, shifted, None if delta is None else delta[:, 0], kept, rule)
        return sums
    parts = sums.parts
    if delta is not None:
        if rule.weight_sharing == "per_example" and delta.shape[1] > 1:
            parts["rounding"] = [sum_rounding(delta[None], batch.share).to(a.dtype)]
        # (samples, positions, groups, units of a group)
        delta = delta.unflatten(2, (a.shape[2], -1))
        parts["weight"] = [delta.sum(1).square().sum(0).flatten()]
    if delta is not None and rule.center != "p" and rule.scale != "none" and delta.shape[1] > 1:
        _of_vectors(sums, a, delta, rule)
        return sums
    shifted = a - reference
    if kept is not None:
        shifted *= kept[..., None, None]
    if rule.center == "p":
        parts["total"] = [shifted.sum((0, 1))]
        if rule.scale != "none":
            parts["second"] = [_shared_second(shifted, rule)]
    elif delta is not None:
        _of_positions(sums, shifted, delta, rule)
    return sums


def _of_rows(
    sums: RunningSums, a: Tensor, delta: Tensor | None, kept: Tensor | None, rule: UpdateRule
) -> None:
    """Fills in the sums of samples of one position, of a layer without groups.

    Args:
        a: (samples, inputs), less the reference.
        delta: (samples, units).
    """
    parts, squares = sums.parts, None
    if delta is not None:
        squares = delta.square()
        parts["weight"] = [squares.sum(0)]
    if rule.center == "p":
        parts["total"] = [a.sum(0, keepdim=True)]
        if rule.scale == "diagonal":
            parts["second"] = [a.square().sum(0, keepdim=True)]
        elif rule.scale == "full":
            parts["second"] = [(a.T @ a)[None]]
        return
    if squares is None:
        return
    parts["first"] = [squares.T @ a]
    if rule.keeps_examples(a.shape[1]):
        rows = slice(None) if kept is None else kept[:, 0]
        parts["samples"] = [a[rows], squares[rows]]
    elif rule.scale == "diagonal":
        parts["second"] = [squares.T @ a.square()]
    elif rule.scale == "full":
        sums.waiting = [Weighted(a, squares)]


def _shared_second(shifted: Tensor, rule: UpdateRule) -> Tensor:
    by_group = shifted.flatten(0, 1).transpose(0, 1)
    return by_group.square().sum(1) if rule.scale == "diagonal" else by_group.mT @ by_group


def _of_positions(sums: RunningSums, shifted: Tensor, delta: Tensor, rule: UpdateRule) -> None:
    """Fills in the sums that need no vector of errors times activations for every sample.

    Args:
        delta: (samples, positions, groups, units of a group).
    """
    weights = delta * delta.sum(1, keepdim=True) if delta.shape[1] > 1 else delta.square()
    sums.parts["first"] = [_weighted(weights, shifted)]
    if rule.scale == "diagonal":
        sums.parts["second"] = [_weighted(weights, shifted.square())]
    elif rule.scale == "full":
        for piece in _pieces(len(delta), sums.parts["first"][0].numel()):
            vectors = delta[piece, 0, :, :, None] * shifted[piece, 0, :, None]
            _wait(sums, Outer(vectors.flatten(1, 2).transpose(0, 1)), len(delta))


def _of_vectors(sums: RunningSums, a: Tensor, delta: Tensor, rule: UpdateRule) -> None:
    """Fills in the sums of first and second order of samples whose positions belong together.

    Args:
        a: (samples, positions, groups, inputs), not less the reference: it is subtracted from the
            vectors, which are fewer.
        delta: (samples, positions, groups, units of a group).
    """
    samples, _, groups, inputs = a.shape
    units = groups * delta.shape[3]
    reference = sums.reference.repeat_interleave(units // groups, 0)[:, None]
    whole = delta.sum(1).flatten(1).T  # (units, samples)
    first = a.new_zeros(units, inputs)
    second = torch.zeros_like(first)
    for piece in _pieces(samples, first.numel()):
        # (samples, groups, units of a group, positions) and (samples, groups, positions, inputs)
        vectors = delta[piece].permute(0, 2, 3, 1) @ a[piece].transpose(1, 2)
        vectors = vectors.flatten(1, 2).transpose(0, 1)
        vectors.addcmul_(whole[:, piece, None], reference, value=-1)
        first += (whole[:, None, piece] @ vectors)[:, 0]
        if rule.scale == "diagonal":
            second += vectors.square().sum(1)
        else:
            _wait(sums, Outer(vectors), samples)
    sums.parts["first"] = [first]
    if rule.scale == "diagonal":
        sums.parts["second"] = [second]


def _pieces(samples: int, elements: int) -> list[slice]:
    """Slices of the samples, whose vectors take so many elements a sample."""
    step = max(1, VECTORS // elements)
    return [slice(i, i + step) for i in range(0, samples, step)]


def _wait(sums: RunningSums, products: Outer, samples: int) -> None:
    """Has the products wait if they are those of all samples; else forms them."""
    sums.waiting.append(products)
    if products.vectors.shape[1] < samples:
        sums.settle()


def _weighted(weights: Tensor, x: Tensor) -> Tensor:
    """Σ weights ⊗ x over samples and positions, (units, inputs)."""
    weights, x = (y.flatten(0, 1).transpose(0, 1) for y in (weights, x))  # group by group
    return (weights.mT @ x).flatten(0, 1)


# -- convolutions, without patches -----------------------------------------------------------------


def needs_no_patches(module: WeightLayer, rule: UpdateRule) -> bool:
    """Returns whether `convolution_sums` forms all sums of the rule."""
    return isinstance(module, _ConvNd) and rule.scale == "none" and rule.weight_sharing != "expand"


def convolution_sums(
    module: _ConvNd,
    a: Tensor,
    delta: Tensor | None,
    reference: Tensor,
    rule: UpdateRule,
    shape: torch.Size,
    examples: float,
    shares: tuple[float, Tensor | None, float],
) -> RunningSums:
    """Returns the sums of one call of a convolution, which are passes of the convolution itself.

    ``Σₙ Sₙ Σ_t δₙₜ aₙₜ`` with ``Sₙ = Σ_t δₙₜ`` is the gradient of the weights at the errors ``Sₙ
    δₙₜ``, and the patches of the summed examples are the sum of the patches.

    Args:
        a: The input of the layer.
        delta: (batch, units, *places), the errors.
        shape: That of the net inputs.
        examples: How many examples there are.
        shares: What errors are multiplied with, their `rounding_share`, and how many of the
            examples have no label that counts.
    """
    factor, share, left_out = shares
    parts: dict[str, list[Tensor]] = {}
    positions = 0.0
    if rule.center == "p":
        total, positions = summed_patches(module, a, shape)
        parts["total"] = [total - positions * reference]
    if delta is not None:
        flat = delta.flatten(2)
        whole = flat.sum(2) * factor  # (batch, units)
        parts["weight"] = [whole.square().sum(0)]
        if flat.shape[2] > 1:
            rounding = sum_rounding(flat.transpose(1, 2)[None], share)
            parts["rounding"] = [(rounding * factor**2).to(a.dtype)]
    if delta is not None and rule.center != "p":
        positions = float(delta.shape[0] * delta[0, 0].numel())
        scale = torch.mul(whole, factor).view(*whole.shape, *[1] * (delta.dim() - 2))
        errors = delta * scale
        moved = reference.repeat_interleave(delta.shape[1] // len(reference), 0)
        first = _gradient_of_weights(module, a, errors)
        parts["first"] = [torch.addcmul(first, parts["weight"][0][:, None], moved, value=-1)]
    return RunningSums(examples, positions, reference, parts, left_out)


def summed_patches(module: _ConvNd, a: Tensor, shape: torch.Size | None) -> tuple[Tensor, float]:
    """Returns the sum of the patches of all examples and places, (groups, inputs), and how many."""
    patches = layer_types.patches(module, a.sum(0, keepdim=True), shape)
    return patches.sum((0, 1)), float(len(a) * patches.shape[1])


def _gradient_of_weights(module: _ConvNd, a: Tensor, errors: Tensor) -> Tensor:
    """Σ errors ⊗ patches over examples and places, (units, inputs)."""
    transposed = isinstance(module, _ConvTransposeNd)
    padding = module.padding
    if isinstance(padding, str) or module.padding_mode != "zeros":
        a, padding = layer_types.padded(module, a), [0] * len(module.kernel_size)
    gradient = torch.ops.aten.convolution_backward(
        errors,
        a,
        module.weight.to(a.dtype),
        None,
        module.stride,
        padding,
        module.dilation,
        transposed,
        module.output_padding,
        module.groups,
        [False, True, False],
    )[1]
    return layer_types.weights(module, gradient)
