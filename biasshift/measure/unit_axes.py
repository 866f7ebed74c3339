"""The axes of a tensor that may hold the units, followed from module to module.

Where autograd has recorded the operations in between, they tell exactly where an axis went. Without
a graph the strides of views tell, and then the sizes.
"""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import Node

from biasshift.measure.layer_types import Conv1D

Axes = tuple[int, ...]  # those that may hold the units; none where nothing is known
Sizes = Sequence[int]
# Units on axis 1, behind the examples; and on the last axis.
UNITS_FIRST = (nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.GroupNorm)
UNITS_LAST = (nn.Linear, nn.Embedding, Conv1D)
# Normalize the last axes, which are those of the units where it is one axis, as in transformers.
NORMS_OF_LAST_AXES = (nn.LayerNorm, nn.RMSNorm)


def axes_behind(module: nn.Module, a: Tensor, output: Tensor, last: "Followed") -> Axes:
    """Returns the axes of a module's output that may hold the units.

    Args:
        module: without children.
        a: its input.
        output: what it returned for it.
        last: the output of a module before, whose axes of units are known.
    """
    end = output.dim() - 1
    if end == 1 or isinstance(module, UNITS_FIRST):
        return (1,)
    if isinstance(module, UNITS_LAST):
        return (end,)
    axes = last.axes_of(a)
    if isinstance(module, NORMS_OF_LAST_AXES):
        own = type(module).forward in (nn.LayerNorm.forward, nn.RMSNorm.forward)
        if own and len(module.normalized_shape) == 1 and (not axes or end in axes):
            return (end,)
    # An activation, pooling or dropout of PyTorch, none of which moves axes.
    if type(module).__module__.startswith("torch.nn.") and output.dim() == a.dim():
        return tuple(i for i in axes if output.shape[i] == a.shape[i] or isinstance(module, nn.GLU))
    return Followed.of(a, axes).axes_of(output)


@dataclass(frozen=True)
class Followed:
    """The last tensor whose axes of units are known, and the node of autograd that made it."""

    tensor: Tensor
    axes: Axes
    node: Node | None

    @classmethod
    def of(cls, tensor: Tensor, axes: Axes) -> "Followed":
        """Returns a tensor whose units are on one of the axes."""
        return cls(tensor.detach(), axes, tensor.grad_fn)

    def axes_of(self, t: Tensor) -> Axes:
        """Returns the axes of a tensor that may hold the same units: one where only one can."""
        if not self.axes:
            return ()
        if self.node is not None and t.grad_fn is not None:
            if followed := _along_the_graph(self.node, self.tensor.shape, self.axes, t):
                return followed
        if _storage(t) == _storage(self.tensor):
            places = {(self.tensor.shape[i], self.tensor.stride(i)) for i in self.axes}
            return tuple(i for i in range(1, t.dim()) if (t.shape[i], t.stride(i)) in places)
        return self._by_sizes(t)

    def _by_sizes(self, t: Tensor) -> Axes:
        """Of a tensor that was computed, as long as it may be a permutation, or has lost axes.

        Otherwise units may have been concatenated, and positions may have their number now.
        """
        units = {self.tensor.shape[i] for i in self.axes}
        fitting = tuple(i for i in range(1, t.dim()) if t.shape[i] in units)
        lost = fitting and t.dim() < self.tensor.dim()
        if lost or sorted(t.shape) == sorted(self.tensor.shape):
            return fitting
        return tuple(range(1, t.dim()))


def _storage(t: Tensor) -> object:
    try:
        return t.untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError):  # sparse, or inside a transform of torch.func
        return t


# -- along the graph of autograd -------------------------------------------------------------------


def _along_the_graph(source: Node, sizes: Sizes, axes: Axes, t: Tensor) -> Axes:
    """The axes of t to which operations have moved axes of the source; none where it is unknown.

    Args:
        source: the node that made a tensor.
        sizes: of that tensor.
        axes: of that tensor.
        t: computed from it.
    """
    first = source._sequence_nr()  # the graph behind it may be long
    found: dict[Node, set[int]] = {source: set(axes)}
    waiting = [t.grad_fn]
    while waiting:
        node = waiting[-1]
        if node is None or node in found:
            waiting.pop()
            continue
        inputs = [(n, k) for n, k in node.next_functions if n is not None and _is_after(n, first)]
        if unknown := [n for n, _ in inputs if n not in found]:
            waiting += unknown
            continue
        found[node] = {
            moved
            for before, k in inputs
            for axis in found[before]
            for moved in _moved(node, axis, sizes if before == source else _sizes(before, k))
        }
        waiting.pop()
    return tuple(sorted(axis for axis in found[t.grad_fn] if axis)) if t.grad_fn in found else ()


def _is_after(node: Node, first: int) -> bool:
    return node._sequence_nr() >= first and "AccumulateGrad" not in node.name()


def _sizes(node: Node, output: int = 0) -> Sizes | None:
    """Of what a node computed in the forward pass; None where it does not tell."""
    outputs = getattr(node, "_input_metadata", ())
    return outputs[output].shape if output < len(outputs) else None


def _moved(node: Node, axis: int, before: Sizes | None) -> Iterator[int]:
    """Yields the axis of a node's output that is an axis of its input, if there is one."""
    after = _sizes(node)
    if before is None or after is None or axis >= len(before):
        return
    move = MOVES.get(re.sub(r"Backward\d*$", "", node.name()))
    moved = None if move is None else move(node, axis, before, after)
    if moved is not None and 0 <= moved < len(after):
        yield moved


def _stays(node: Any, axis: int, before: Sizes, after: Sizes) -> int | None:
    """Of operations by element, which broadcast to the right, and along other axes."""
    return axis + len(after) - len(before)


def _permuted(node: Any, axis: int, before: Sizes, after: Sizes) -> int | None:
    return _dims(node._saved_dims, len(before)).index(axis)


def _transposed(node: Any, axis: int, before: Sizes, after: Sizes) -> int | None:
    two = _dims((node._saved_dim0, node._saved_dim1), len(before))
    return two[1 - two.index(axis)] if axis in two else axis


def _reshaped(node: Any, axis: int, before: Sizes, after: Sizes) -> int | None:
    """The one axis with its size behind as many elements."""
    if before[axis] == 1:
        return None
    fitting = (
        i
        for i, size in enumerate(after)
        if size == before[axis] and math.prod(after[:i]) == math.prod(before[:axis])
    )
    return next(fitting, None)


def _reduced(node: Any, axis: int, before: Sizes, after: Sizes) -> int | None:
    dim = getattr(node, "_saved_dim", None)
    dims = _dims(dim if isinstance(dim, tuple) else (dim,), len(before)) if dim is not None else []
    if not dims or axis in dims:
        return None
    return axis if len(after) == len(before) else axis - sum(d < axis for d in dims)


def _inserted(node: Any, axis: int, before: Sizes, after: Sizes) -> int | None:
    return axis + (_dims((node._saved_dim,), len(after))[0] <= axis)


def _dims(dims: Sequence[int], axes: int) -> list[int]:
    """Axes from 0; autograd keeps negative ones as unsigned numbers."""
    return [(d - 2**64 if d >= 2**63 else d) % axes for d in dims]


Move = Callable[[Any, int, Sizes, Sizes], int | None]
# By what autograd calls the operations.
MOVES: dict[str, Move] = {
    **dict.fromkeys(
        "Abs AdaptiveAvgPool2D AdaptiveAvgPool3D AdaptiveMaxPool2D AdaptiveMaxPool3D Add "
        "Addcmul Alias AvgPool2D AvgPool3D Cat Celu Clamp ClampMax ClampMin Clone "
        "ConstantPadNd Cos CudnnBatchNorm Div Elu Erf Exp Expand Flip Gelu Glu Hardsigmoid "
        "Hardswish Hardtanh LeakyRelu Lerp Log LogSigmoid LogSoftmax MaskedFill "
        "MaxPool2DWithIndices MaxPool3DWithIndices Maximum Minimum Mish Mul NativeBatchNorm "
        "NativeDropout NativeGroupNorm NativeLayerNorm Neg Pow Prelu Reciprocal "
        "ReflectionPad1D ReflectionPad2D Relu ReplicationPad1D ReplicationPad2D Roll "
        "RreluWithNoise Rsqrt Rsub Sigmoid Silu Sin Slice Softmax Softplus Split "
        "SplitWithSizes Sqrt Sub Tanh Threshold ToCopy UpsampleBicubic2D UpsampleBilinear2D "
        "UpsampleLinear1D UpsampleNearest1D UpsampleNearest2D UpsampleNearest3D "
        "UpsampleTrilinear3D Where".split(),
        _stays,
    ),
    "Permute": _permuted,
    "Transpose": _transposed,
    "T": lambda node, axis, before, after: len(before) - 1 - axis,
    **dict.fromkeys("View UnsafeView ReshapeAlias Squeeze".split(), _reshaped),
    **dict.fromkeys("Mean Sum Amax Amin Max Min Var Std Select Unbind".split(), _reduced),
    **dict.fromkeys("Unsqueeze Stack".split(), _inserted),
}
