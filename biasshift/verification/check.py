"""What of a model is covered, why the rest is not, and whether the covered layers are right: one
row per module.
"""

import copy
from collections import Counter
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from biasshift.measure import layer_types
from biasshift.measure.coverage import (
    Reasons,
    check_outputs,
    coupled,
    refuse_unusable,
    tied,
    unsound,
)
from biasshift.measure.hooks import counting, traced
from biasshift.measure.likelihoods import Likelihood
from biasshift.measure.options import Options
from biasshift.measure.probe import Probe, batches, underlying
from biasshift.measure.sandbox import undisturbed
from biasshift.verification.agreement import Comparison, compared

if TYPE_CHECKING:
    import pandas as pd

KNOWN = (
    nn.Embedding,
    nn.EmbeddingBag,
    nn.LayerNorm,
    nn.RMSNorm,
)  # with parameters of several axes, but no units


def check(
    model: nn.Module,
    x: Probe,
    y: Tensor | None = None,
    *,
    likelihood: Likelihood = "categorical",
    weight_sharing: str = "per_example",
    examples: int = 4,
) -> "pd.DataFrame":
    """One row per module: whether `unit_fisher` covers it, why not, and how far its numbers are
    from those of `torch.func`.

    A few examples are measured in float64 on a copy, and again by an independent route: the
    Jacobian of ``ln p`` by the weights, example by example. A model with more than 16 outputs is
    followed by 4 random combinations of them, in both routes: another model with the same layers,
    exact at 4 passes. Of large layers two units are compared, and large blocks by their products
    with random vectors, which no wrong entry escapes.

    Args:
        x: a tensor of examples, or an iterable of batches x or (x, y), of which the first is read.
        y: the examples' labels. With them the empirical matrices are compared too (up to 16
            outputs).
        likelihood: as in `unit_fisher`, like ``weight_sharing``.
        examples: how many of the first examples are run.

    Returns:
        Columns ``module``, ``kind``, ``covered``, ``reason`` (why it is not covered, or not
        compared), ``calls`` in one forward pass, ``units`` and ``inputs`` (0 where it has none),
        and ``error``: the largest difference over the largest entry of a layer, NaN where nothing
        was compared.

    >>> model = nn.Sequential(nn.Linear(3, 4), nn.ELU(), nn.Linear(4, 2))
    >>> table = check(model, torch.eye(3))
    >>> table[table.units > 0][["module", "covered", "calls", "units", "inputs"]].to_numpy().tolist()
    [['0', True, 1, 4, 3], ['2', True, 1, 2, 4]]
    >>> int((table.error < 1e-12).sum())
    2
    """
    import pandas as pd

    options = Options(likelihood=likelihood, weight_sharing=weight_sharing)
    model = underlying(model)
    with torch.inference_mode(False):
        x, y = _first(model, x, y, examples)
        copied, x, why = _double(model, x)
        calls = _calls(copied, x)
        reasons = _reasons(model, copied, x, options)
        layers = {
            name: module
            for name, module in copied.named_modules()
            if layer_types.is_covered(module) and name not in reasons
        }
        sizes = {name: _sizes(module) for name, module in model.named_modules()}
        comparison = (
            Comparison(uncompared=dict.fromkeys(layers, why))
            if why
            else compared(copied, layers, x, y, options)
        )
    reasons |= comparison.failed | comparison.uncompared
    rows = []
    for name, module in model.named_modules():
        covered, (units, inputs) = name in layers and name not in comparison.failed, sizes[name]
        row = {
            "module": name,
            "kind": type(module).__name__,
            "covered": covered,
            "reason": reasons.get(name, ""),
            "calls": calls[name],
        }
        rows.append(
            {
                **row,
                "units": units,
                "inputs": inputs,
                "error": comparison.errors.get(name, float("nan")),
            }
        )
    return pd.DataFrame(rows)


# -- what is covered -------------------------------------------------------------------------------


def _first(
    model: nn.Module, x: Probe, y: Tensor | None, examples: int
) -> tuple[Tensor, Tensor | None]:
    if examples < 1:
        raise ValueError(f"examples must be at least 1, got {examples}.")
    a, b = next(batches(model, x, y))
    return a[:examples], None if b is None else b[:examples]


def _double(model: nn.Module, x: Tensor) -> tuple[nn.Module, Tensor, str]:
    """A float64 copy, and x with it; a copy as it is, where the model fixes a precision of its own.

    A model that cannot be copied is returned itself, and the reason.
    """
    made = (
        t
        for module in model.modules()
        for t in vars(module).values()
        if isinstance(t, Tensor) and not t.is_leaf
    )
    memo = {
        id(t): t.detach().clone() for t in made
    }  # such as the weights of old-style weight_norm, which refuse to be copied
    try:
        copied = copy.deepcopy(model, memo)
        wide = copy.deepcopy(copied).double()
    except Exception as error:  # a lock, an open file: what it raises is the model's
        return model, x, f"not compared: the model cannot be copied ({error})"
    for p in (*copied.parameters(), *wide.parameters()):
        p.grad = None
    x_wide = x.double() if x.is_floating_point() else x
    try:
        with undisturbed(wide):
            wide(x_wide)
    except Exception:  # if it is no matter of precision, the copy as it is raises it again
        return copied, x, ""
    return wide, x_wide, ""


def _sizes(module: nn.Module) -> tuple[int, int]:
    """Units and inputs; 0 where a module has none, or not yet."""
    return (
        (layer_types.unit_count(module), layer_types.input_count(module))
        if layer_types.is_covered(module) and not layer_types.is_lazy(module)
        else (0, 0)
    )


def _reasons(model: nn.Module, copied: nn.Module, x: Tensor, options: Options) -> Reasons:
    """Why modules are not covered, for all that are not."""
    reasons = {
        name: why
        for name, module in model.named_modules()
        if (why := layer_types.why_uncovered(module))
    }
    named = dict(copied.named_modules())
    layers = {
        name: module
        for name, module in named.items()
        if layer_types.is_covered(module) and name not in reasons
    }
    reasons |= tied(copied, layers)
    layers = {name: module for name, module in layers.items() if name not in reasons}
    own = coupled(copied)
    try:
        for name, why in own.items():
            raise ValueError(f"'{name}' ({type(named[name]).__name__}) {why}")
        refuse_unusable(model)
        with undisturbed(copied, gradients=True):
            tape, returned = traced(copied, layers, x)
            outputs = check_outputs(returned, len(x))
            expand, categorical = (
                options.weight_sharing == "expand",
                options.likelihood == "categorical",
            )
            reasons |= unsound(copied, tape, layers, x, outputs, expand, categorical)
        reasons |= {
            name: "it was not called in the forward pass"
            for name in layers
            if name not in tape.calls and name not in reasons
        }
    except ValueError as error:  # about the model as a whole: nothing of it can be measured
        reasons |= {name: str(error) for name in layers}
    others = {
        name: _other(module) for name, module in named.items() if not layer_types.is_covered(module)
    }
    return others | own | reasons


def _other(module: nn.Module) -> str:
    unknown = [
        name
        for name, p in module.named_parameters(recurse=False)
        if p.dim() >= 2 and not isinstance(module, KNOWN)
    ]
    return (
        f"a kind that is not known: {' and '.join(unknown)} may be the weights of units"
        if unknown
        else "no layer with units"
    )


def _calls(model: nn.Module, x: Tensor) -> Counter[str]:
    with undisturbed(model), counting(model) as calls:
        model(x)
    return calls
