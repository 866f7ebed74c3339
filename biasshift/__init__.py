"""Measure, test and exploit the theory of bias shift and the unit natural gradient."""

from biasshift import _sigint  # noqa: F401  before all that takes long

# isort: split
from biasshift import optim
from biasshift.analysis.verdicts import claims
from biasshift.fisher.unit_fisher import UnitFisher
from biasshift.measure.activation_moments import ActivationMoments, activation_moments
from biasshift.measure.bias_shift import bias_shift
from biasshift.measure.fisher import unit_fisher
from biasshift.measure.gradient_gap import gradient_gap
from biasshift.tracking.instrument import instrument
from biasshift.verification.check import check

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
