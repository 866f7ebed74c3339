"""Updates: plain, centered, quasi-diagonal and full unit natural gradient."""

from biasshift.optim.optimizer import UnitNaturalGradient

__all__ = ["UnitNaturalGradient"]
