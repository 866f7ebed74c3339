"""What of a model is covered, why the rest is not, and whether the numbers are right: a second opinion from `torch.func`."""

from biasshift.checking.listing import check

__all__ = ["check"]
