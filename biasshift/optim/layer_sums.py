"""From the recorded calls of a layer to its sums, or the reason why it has none."""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn.modules.conv import _ConvNd

from biasshift.fisher.moments import rounding_share
from biasshift.measure import layer_types
from biasshift.measure.layer_types import WeightLayer
from biasshift.optim.batch_sums import Batch, batch_sums, convolution_sums, needs_no_patches
from biasshift.optim.divisor import Share
from biasshift.optim.passes import Pass, RecordedCall, UnfitLayer
from biasshift.optim.references import References
from biasshift.optim.running_sums import RunningSums
from biasshift.optim.update_rule import UpdateRule


@torch.no_grad()
def layer_sums(
    name: str,
    module: WeightLayer,
    forward_pass: Pass,
    of_pass: Share,
    rule: UpdateRule,
    references: References,
) -> RunningSums:
    """Returns the sums of one layer over one pass, whose errors have come back.

    Args:
        of_pass: What the errors are multiplied with, to be those of a sum over the examples, and
            which labels the loss has left out.

    Raises:
        UnfitLayer: If the calls do not fit the rule.
    """
    calls, examples = forward_pass.calls[name], forward_pass.examples
    _check_calls(name, module, calls, int(examples), rule)
    factor, counted = of_pass.divisor, of_pass.counted
    if len(calls) == 1 and counted is None and needs_no_patches(module, rule):
        return _of_convolution(name, module, forward_pass, factor, rule, references)
    a = _side_by_side([layer_types.patches(module, call.a, call.shape) for call in calls])
    _check_positions(name, a, rule)
    a = a.to(references.dtype(name, module))
    delta, share = None, None
    if rule.needs_errors:
        deltas = [a.new_zeros(call.shape) if call.delta is None else call.delta for call in calls]
        delta = _side_by_side([layer_types.errors(module, d[None])[0] for d in deltas])
        if rule.weight_sharing == "per_example" and delta.shape[1] > 1:
            share = rounding_share(delta)
        delta = delta.to(a.dtype) if factor == 1 else factor * delta.to(a.dtype)
    kept = None if delta is None or counted is None else _kept(counted, delta, len(calls))
    if rule.weight_sharing == "expand":
        a = a.flatten(0, 1)[:, None]
        delta = None if delta is None else delta.flatten(0, 1)[:, None]
        kept = None if kept is None else kept.flatten()[:, None]
    reference = references.of(name, lambda: a.mean((0, 1)))
    batch = Batch(a, delta, examples, kept, share, forward_pass.left_out)
    return batch_sums(batch, reference, rule)


def _of_convolution(
    name: str,
    module: WeightLayer,
    forward_pass: Pass,
    factor: float,
    rule: UpdateRule,
    references: References,
) -> RunningSums:
    assert isinstance(module, _ConvNd)
    (call,) = forward_pass.calls[name]
    dtype = references.dtype(name, module)
    a, delta, share = call.a.to(dtype), None, None
    if rule.needs_errors:
        delta = a.new_zeros(call.shape) if call.delta is None else call.delta
        share = rounding_share(delta)
        delta = delta.to(dtype)
    shares = factor, share, forward_pass.left_out
    return convolution_sums(
        module,
        a,
        delta,
        references.of_convolution(name, module, a, call.shape),
        rule,
        call.shape,
        forward_pass.examples,
        shares,
    )


# -- refusals --------------------------------------------------------------------------------------


def _check_positions(name: str, a: Tensor, rule: UpdateRule) -> None:
    _, positions, _, inputs = a.shape
    together = rule.weight_sharing == "per_example" and positions > 1
    if together and rule.keeps_examples(inputs):
        raise UnfitLayer(
            name,
            f"has {inputs} inputs a unit and {positions} positions an example, whose errors "
            'add up: it needs its full matrices. Use weight_sharing="expand", '
            'scale="diagonal", or a larger max_dense_inputs.',
        )


def _check_calls(
    name: str,
    module: WeightLayer,
    calls: Iterable[RecordedCall],
    examples: int,
    rule: UpdateRule,
) -> None:
    for call in calls:
        if call.overwritten:
            raise UnfitLayer(
                name,
                "has an input that was changed in place after the layer had read it. Write h = "
                "h + u for h += u.",
            )
        if not layer_types.is_batched(module, call.a):
            raise UnfitLayer(
                name,
                f"was called without an axis of examples, on {tuple(call.a.shape)}. Give it a "
                "batch.",
            )
        if rule.weight_sharing == "per_example" and len(call.a) != examples:
            raise UnfitLayer(
                name,
                f"sees {len(call.a)} rows for {examples} examples: its first axis is not that "
                'of the examples. Use weight_sharing="expand", which takes every position by '
                "itself.",
            )


# -- positions -------------------------------------------------------------------------------------


def _of_examples(counted: Tensor) -> Tensor:
    """Which examples have a label that counts."""
    return counted if counted.dim() == 1 else counted.flatten(1).any(1)


def _kept(counted: Tensor, delta: Tensor, calls: int) -> Tensor | None:
    """The positions that have a part in a loss that leaves labels out, (samples, positions) bool.

    Those of the labels left out have none, unless the error says that others depend on them.

    Args:
        counted: (batch, *positions), the labels that are not left out.
        delta: (samples, positions, units), the positions of several calls behind each other.
        calls: How many they are.
    """
    samples, positions = delta.shape[:2]
    if samples * positions == counted.numel() * calls:
        of_labels = counted.reshape(samples, -1).repeat(1, calls)
    elif samples == len(counted):
        of_labels = _of_examples(counted)[:, None].expand(-1, positions)
    else:
        return None
    return of_labels | delta.any(-1)


def _side_by_side(parts: list[Tensor]) -> Tensor:
    """Several calls of a layer, on the axis of positions."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)
