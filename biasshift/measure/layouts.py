"""Where a layer's input has its examples: in front, folded with positions, or on axis 1."""

from enum import Enum

from torch import Tensor, nn


class Layout(Enum):
    """Where the examples are in what one call of a layer reads.

    ``FOLDED`` has the positions of an example behind each other on the first axis, as windows of
    attention and frames of a video. ``INTERLEAVED`` has all examples of a position behind each
    other there. ``SECOND`` has positions on the first axis and examples on the second, as recurrent
    networks of PyTorch have them by default.
    """

    FIRST = "first"
    FOLDED = "folded"
    INTERLEAVED = "interleaved"
    SECOND = "second"
    ONLY = "only"  # one example, to which all rows belong

    def fits(self, module: nn.Module, a: Tensor, examples: int) -> bool:
        """Tells whether an input can have this layout, by its shape."""
        if self is Layout.ONLY:
            return examples == 1
        if self is Layout.FIRST:
            return len(a) == examples
        if self is Layout.SECOND:  # a convolution has its channels there
            return not _has_channels(module) and a.dim() > 2 and a.shape[1] == examples
        return len(a) % examples == 0 and len(a) > 0

    def of_example(self, a: Tensor, index: int, examples: int) -> Tensor:
        """Returns the part of an input that is one example's, as if it had run alone."""
        if self is Layout.FIRST:
            return a[index : index + 1]
        if self is Layout.SECOND:
            return a[:, index : index + 1]
        if self in (Layout.FOLDED, Layout.ONLY):
            return a.unflatten(0, (examples, -1))[index]
        return a.unflatten(0, (-1, examples))[:, index]

    def split(self, maps: Tensor, examples: int) -> tuple[Tensor, ...]:
        """Returns maps of a convolution as one or several with a row for every example.

        Their positions behind each other are those that `arrange` returns.
        """
        if self is Layout.FIRST:
            return (maps,)
        if self is Layout.INTERLEAVED:
            return maps.unflatten(0, (-1, examples)).unbind(0)
        return maps.unflatten(0, (examples, -1)).unbind(1)

    def arrange(self, x: Tensor, axis: int, examples: int) -> Tensor:
        """Returns rows and positions with the examples in front of all positions.

        Args:
            x: rows on ``axis``, the positions of a row behind it.

        Returns:
            Examples on ``axis``, and all positions of an example behind it.
        """
        if self is Layout.FIRST:
            return x
        if self in (Layout.FOLDED, Layout.ONLY):
            return x.unflatten(axis, (examples, -1)).flatten(axis + 1, axis + 2)
        if self is Layout.INTERLEAVED:
            split = x.unflatten(axis, (-1, examples))
            return split.transpose(axis, axis + 1).flatten(axis + 1, axis + 2)
        split = x.unflatten(axis + 1, (examples, -1)).transpose(axis, axis + 1)
        return split.flatten(axis + 1, axis + 2)


def _has_channels(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.conv._ConvNd)
