"""Updates: plain, centered, quasi-diagonal and full unit natural gradient."""

from biasshift.optim.unit_natural_gradient import UnitNaturalGradient

__all__ = ["UnitNaturalGradient"]
