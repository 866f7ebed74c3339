"""Measure, test and exploit the theory of bias shift and the unit natural gradient."""

from biasshift import starting  # noqa: F401  before all that takes long

# isort: split
from biasshift import optim
from biasshift.averages import activation_moments
from biasshift.checking import check
from biasshift.claims import claims
from biasshift.fisher import UnitFisher
from biasshift.gaps import gradient_gap
from biasshift.instrument import instrument
from biasshift.measuring import unit_fisher
from biasshift.moments import ActivationMoments
from biasshift.shifts import bias_shift

__all__ = [
    "ActivationMoments",
    "UnitFisher",
    "activation_moments",
    "bias_shift",
    "check",
    "claims",
    "gradient_gap",
    "instrument",
    "optim",
    "unit_fisher",
]
__version__ = "0.1.0"
