"""Measure, test and exploit the theory of bias shift and the unit natural gradient.

Public names load when they are first used (PEP 562), so that ``import biasshift`` itself is light.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from biasshift import _sigint  # noqa: F401  before all that takes long
from biasshift.lazy_names import lazy_names

if TYPE_CHECKING:
    from biasshift import (
        analysis as analysis,
        data as data,
        experiments as experiments,
        integrations as integrations,
        nets as nets,
        optim as optim,
        plots as plots,
        runs as runs,
        theory as theory,
        training as training,
    )
    from biasshift.analysis.verdicts import claims as claims
    from biasshift.fisher.sample_size import FewSamplesWarning as FewSamplesWarning
    from biasshift.fisher.unit_fisher import UnitFisher as UnitFisher
    from biasshift.measure.activation_moments import (
        ActivationMoments as ActivationMoments,
        activation_moments as activation_moments,
    )
    from biasshift.measure.bias_shift import bias_shift as bias_shift
    from biasshift.measure.coverage import UncoveredWarning as UncoveredWarning
    from biasshift.measure.fisher import unit_fisher as unit_fisher
    from biasshift.measure.gradient_gap import gradient_gap as gradient_gap
    from biasshift.plots.objects import plot as plot
    from biasshift.tracking.instrument import instrument as instrument
    from biasshift.verification.check import check as check

__all__ = [
    "ActivationMoments",
    "FewSamplesWarning",
    "UncoveredWarning",
    "UnitFisher",
    "activation_moments",
    "bias_shift",
    "check",
    "claims",
    "gradient_gap",
    "instrument",
    "optim",
    "plot",
    "unit_fisher",
]
__version__ = "0.1.0"

_MODULES = {
    "ActivationMoments": "measure.activation_moments",
    "FewSamplesWarning": "fisher.sample_size",
    "UncoveredWarning": "measure.coverage",
    "UnitFisher": "fisher.unit_fisher",
    "activation_moments": "measure.activation_moments",
    "bias_shift": "measure.bias_shift",
    "check": "verification.check",
    "claims": "analysis.verdicts",
    "gradient_gap": "measure.gradient_gap",
    "instrument": "tracking.instrument",
    "plot": "plots.objects",
    "unit_fisher": "measure.fisher",
}
_PACKAGES = (
    "analysis", "data", "experiments", "integrations", "nets", "optim", "plots", "runs", "theory",
    "training",
)  # fmt: skip


__getattr__, _public_names = lazy_names("biasshift", _MODULES, _PACKAGES)


def __dir__() -> list[str]:
    return sorted({*_public_names(), "__version__"})


def _hook_of_before(name: str) -> Any:
    if name == "_call_watcher":
        return import_module("biasshift.measure.hooks")._call_hook
    raise AttributeError(f"Module 'biasshift.tracing' has no attribute '{name}'.")


# Models that were pickled with an optimizer of version 0.1 look for its hook in this module.
_tracing = sys.modules["biasshift.tracing"] = ModuleType("biasshift.tracing")
_tracing.__getattr__ = _hook_of_before  # pyright: ignore[reportAttributeAccessIssue]
