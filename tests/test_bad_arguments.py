"""Every public call refuses what is not a model, a probe, an optimizer or runs, in one message.

A process of its own makes the calls: within the tests, types are checked before the package gets an
argument.
"""

import json
import re
import subprocess
import sys

import torch
from torch import nn

import biasshift as bs

X, Y = torch.eye(3), torch.tensor([0, 1, 2])


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.ELU(), nn.Linear(4, 3))


def shift(model, x):
    with bs.bias_shift(model, x):
        pass


MEASURE = {
    "unit_fisher": bs.unit_fisher,
    "activation_moments": bs.activation_moments,
    "bias_shift": shift,
    "check": bs.check,
}
MODELS = {"none": None, "text": "resnet18", "parameters": nn.Linear(3, 2).parameters()}
PROBES = {"none": None, "number": 5, "empty": [], "text": "abc", "nan": X * torch.nan}
RUNS = {"none": None, "list": [], "number": 3}
RATES = {
    "damping": None,
    "lr": "fast",
    "weight_decay": float("nan"),
    "kl_clip": "a",
    "momentum": "a",
    "unit_damping": torch.ones(2),
}
PROBE = "probe must be|probe is empty|A batch must be"


def refused(call, *arguments, **options) -> str:
    """The message of a call, with the type of its error."""
    try:
        call(*arguments, **options)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def cases() -> dict[str, tuple[str, str]]:
    """Message and the pattern that it must match, by name."""
    optimizer, module = bs.optim.UnitNaturalGradient, "'model' must be an nn.Module"
    refusals = {
        "gradient_gap, probe: number": (refused(bs.gradient_gap, net(), 5), PROBE),
        "instrument, optimizer: text": (
            refused(bs.instrument, net(), optimizer="sgd", probe=(X, Y)),
            "'optimizer' must be a torch.optim.Optimizer, .* got str",
        ),
    }
    for kind, model in MODELS.items():
        for name, call in MEASURE.items():
            message = refused(call, model, X)
            refusals[f"{name}, model: {kind}"] = message, f"{module}, got (NoneType|str|generator)"
        message = refused(bs.gradient_gap, model, X, Y)
        refusals[f"gradient_gap, model: {kind}"] = message, module
        refusals[f"instrument, model: {kind}"] = refused(bs.instrument, model), module
        message = refused(optimizer, model, 0.1)
        refusals[f"UnitNaturalGradient, model: {kind}"] = message, f"{module}, whose forward passes"
    for kind, x in PROBES.items():
        for name, call in MEASURE.items():
            refusals[f"{name}, probe: {kind}"] = refused(call, net(), x), PROBE
    for kind, runs in RUNS.items():
        pattern = "'runs' must be a run folder, a folder of runs, or a table of runs"
        refusals[f"claims: {kind}"] = refused(bs.claims, runs), pattern
    for name, rate in RATES.items():
        message = refused(optimizer, net(), **{"lr": 0.1, name: rate})
        refusals[f"UnitNaturalGradient, {name}"] = message, f"'{name}' must (be a|lie in)"
    return refusals


def test_every_public_call_says_what_it_cannot_use():
    script = subprocess.run([sys.executable, __file__], capture_output=True, text=True, timeout=120)
    assert script.returncode == 0, script.stderr
    refusals = json.loads(script.stdout)
    assert len(refusals) > 40
    unlike = {
        name: message
        for name, (message, pattern) in refusals.items()
        if not re.match(f"ValueError: .*({pattern})", message)
    }
    assert not unlike


if __name__ == "__main__":
    print(json.dumps(cases()))
