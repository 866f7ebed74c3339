"""One row per module of a model: is it covered, why not, and are the covered layers right?"""

import copy
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from biasshift.measure import layer_types
from biasshift.measure.composites import parts
from biasshift.measure.coverage import (
    coupled,
    refuse_coupled,
    refuse_unusable,
    tied,
    unmeasurable,
)
from biasshift.measure.examples import Inputs, mapped
from biasshift.measure.hooks import call_counts, traced, underlying
from biasshift.measure.independence import Reasons
from biasshift.measure.layer_types import named_modules
from biasshift.measure.likelihoods import (
    Likelihood,
    are_probabilities,
    refuse_unreadable,
    warn_of_probabilities,
)
from biasshift.measure.options import Mask, Options
from biasshift.measure.outputs import OutputChoice
from biasshift.measure.probe import Batch, InputNames, Probe, batches
from biasshift.measure.sandbox import forward, undisturbed
from biasshift.progress import Show, progress as shown
from biasshift.verification.agreement import Comparison, compare_layers

# Modules with parameters of several axes, but without units.
WITHOUT_UNITS = (nn.Embedding, nn.EmbeddingBag, nn.LayerNorm, nn.RMSNorm)


def check(
    model: nn.Module,
    x: Probe,
    y: Any = None,
    *,
    likelihood: Likelihood = "categorical",
    weight_sharing: str = "per_example",
    examples: int = 4,
    class_axis: int = -1,
    mask: Mask = None,
    inputs: InputNames = None,
    output: OutputChoice = None,
    progress: Show = None,
) -> pd.DataFrame:
    """Compares the unit Fisher matrices of every layer with those of `torch.func`.

    A few examples are measured in float64 on a copy, and again by an independent route: the
    Jacobian of ``ln p`` by the weights, example by example. A model with more than 16 outputs is
    followed by 4 random combinations of them, in both routes. That is another model with the same
    layers, exact at 4 passes. Of large layers two units are compared, and large blocks by their
    products with random vectors, which no wrong entry escapes.

    Args:
        x: a tensor of examples, a dict of the model's arguments, or an iterable of batches x,
            (x, y) or dicts, of which the first is read.
        y: the examples' labels. With them the empirical matrices are compared too (up to 16
            outputs).
        likelihood: as in `unit_fisher`, like ``weight_sharing``.
        examples: how many of the first examples are run.
        class_axis, mask, inputs, output: as in `unit_fisher`.
        progress: whether to show how many of the examples both routes are done with, and the
            seconds left; by default as in `unit_fisher`.

    Returns:
        One row per module. The columns are ``module``, ``kind``, ``covered``, ``reason`` (why it is
        not covered, or not compared), ``calls`` in one forward pass, ``units`` and ``inputs`` (0
        where it has none), and ``error``. The error is the largest difference over the largest
        entry of a layer, NaN where nothing was compared.

    Raises:
        ValueError: for an empty probe, or options that do not exist. A model that cannot be
            measured is a reason in the table.

    >>> model = nn.Sequential(nn.Linear(3, 4), nn.ELU(), nn.Linear(4, 2))
    >>> table = check(model, torch.eye(3))
    >>> table[table.units > 0][["module", "covered", "units", "inputs"]].to_numpy().tolist()
    [['0', True, 4, 3], ['2', True, 2, 4]]
    >>> int((table.error < 1e-12).sum())
    2
    """
    options = Options(
        likelihood=likelihood,
        weight_sharing=weight_sharing,
        class_axis=class_axis,
        mask=mask,
        inputs=inputs,
        output=output,
    )
    if examples < 1:
        raise ValueError(f"'examples' must be at least 1, got {examples}.")
    model = underlying(model)
    with torch.inference_mode(False):
        first = next(batches(model, x, y, inputs=inputs, mask=mask))
        copied, few, why = _double(model, first.x[:examples])
        with undisturbed(copied), call_counts(named_modules(copied)) as calls:
            forward(copied, few, calls.clear)
        reasons = _reasons(model, copied, few, options)
        y = None if first.y is None else refuse_unreadable(first.y)[:examples]
        kept = None if first.mask is None else first.mask[:examples]
        layers = {
            name: module
            for name, module in named_modules(copied).items()
            if layer_types.is_covered(module) and name not in reasons
        }
        named = named_modules(model)
        sizes = {name: _sizes(module) for name, module in named.items()}
        batch = Batch(few, y, kept, first.y_in_call)
        with shown("check", progress) as bar:
            comparison = (
                Comparison(uncompared=dict.fromkeys(layers, why))
                if why
                else compare_layers(copied, layers, batch, options, bar)
            )
    reasons |= comparison.failed | comparison.uncompared
    return pd.DataFrame(
        [
            {
                "module": name,
                "kind": type(module).__name__,
                "covered": name in layers and name not in comparison.failed,
                "reason": reasons.get(name, ""),
                "calls": calls[name],
                "units": sizes[name][0],
                "inputs": sizes[name][1],
                "error": comparison.errors.get(name, float("nan")),
            }
            for name, module in named.items()
        ]
    )


def _double(model: nn.Module, x: Inputs) -> tuple[nn.Module, Inputs, str]:
    """A float64 copy, and x with it; a copy as it is, where the model fixes a precision of its own.

    A model that cannot be copied is returned itself, and the reason.
    """
    computed = (
        t
        for module in model.modules()
        for t in vars(module).values()
        if isinstance(t, Tensor) and not t.is_leaf
    )
    # such as the weights of old-style weight_norm, which cannot be copied
    memo = {id(t): t.detach().clone() for t in computed}
    try:
        with torch.no_grad():  # parametrized recurrent modules copy weights that they compute
            copied = copy.deepcopy(model, memo)
            wide = copy.deepcopy(copied).double()
    except Exception as error:  # a lock, an open file: what it raises is the model's
        return model, x, f"not compared: the model cannot be copied ({error})"
    for p in (*copied.parameters(), *wide.parameters()):
        p.grad = None
    wide_x = mapped(x, lambda t: t.double() if t.is_floating_point() else t)
    try:
        with undisturbed(wide):
            forward(wide, wide_x)
    except Exception:  # where precision is not the cause, the copy as it is raises it again
        return copied, x, ""
    return wide, wide_x, ""


def _sizes(module: nn.Module) -> tuple[int, int]:
    """Units and inputs; 0 where a module has none, or not yet."""
    if not layer_types.is_covered(module) or layer_types.is_lazy(module):
        return 0, 0
    return layer_types.unit_count(module), layer_types.input_count(module)


def _reasons(model: nn.Module, copied: nn.Module, x: Inputs, options: Options) -> Reasons:
    """Why modules are not covered, for all that are not."""
    reasons = {
        name: why
        for name, module in named_modules(model).items()
        if (why := layer_types.why_uncovered(module))
    }
    named = named_modules(copied)
    covered = {name: module for name, module in named.items() if layer_types.is_covered(module)}
    layers = {name: module for name, module in covered.items() if name not in reasons}
    reasons |= tied(copied, layers)
    layers = {name: module for name, module in layers.items() if name not in reasons}
    try:
        refuse_coupled(copied)
        refuse_unusable(model)
        with undisturbed(copied, gradients=True):
            tape, returned = traced(copied, layers, x)
            outputs = options.outputs(returned, len(x))
            if are_probabilities(outputs, options.likelihood):
                warn_of_probabilities(options.likelihood)
            reasons |= unmeasurable(copied, tape, layers, x, outputs, options, {})
        uncalled = [name for name in layers if name not in tape.calls and name not in reasons]
        reasons |= dict.fromkeys(uncalled, "it was not called in the forward pass")
    except ValueError as error:  # about the model as a whole: no layer can be measured
        reasons |= dict.fromkeys(layers, str(error))
    others = {name: _why_other(module) for name, module in named.items() if name not in covered}
    return others | coupled(copied) | reasons


def _why_other(module: nn.Module) -> str:
    if parts(module):
        return "taken apart: the layers inside of it have rows of their own"
    named = module.named_parameters(recurse=False)
    weights = [name for name, p in named if p.dim() >= 2 and not isinstance(module, WITHOUT_UNITS)]
    if not weights:
        return "no layer with units"
    return f"a kind that is not known: {' and '.join(weights)} may be the weights of units"
