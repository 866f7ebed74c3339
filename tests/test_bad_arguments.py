"""What is no model, no probe, no optimizer, no runs: every public call says so in a sentence.

The calls are made by a process of their own: within the tests, types are checked before the package
sees an argument.
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
    "damping": {"damping": None}, "lr": {"lr": "fast"}, "weight_decay": {"weight_decay": float("nan")}, "kl_clip": {"kl_clip": "a"},
    "momentum": {"momentum": "a"}, "unit_damping": {"unit_damping": torch.ones(2)},
}  # fmt: skip
PROBE = "probe must be|probe is empty|A batch must be"


def refused(call, *arguments, **options) -> str:
    """What a call says, with the kind of its error."""
    try:
        call(*arguments, **options)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def cases() -> dict[str, tuple[str, str]]:
    """Name → what is said, and what it must match."""
    found = {}
    for name, call in MEASURE.items():
        for kind, model in MODELS.items():
            found[f"{name}, model: {kind}"] = (
                refused(call, model, X),
                "'model' must be an nn.Module, got (NoneType|str|generator)",
            )
        for kind, x in PROBES.items():
            found[f"{name}, probe: {kind}"] = refused(call, net(), x), PROBE
    for kind, model in MODELS.items():
        found[f"gradient_gap, model: {kind}"] = (
            refused(bs.gradient_gap, model, X, Y),
            "'model' must be an nn.Module",
        )
        found[f"instrument, model: {kind}"] = (
            refused(bs.instrument, model),
            "'model' must be an nn.Module",
        )
        found[f"UnitNaturalGradient, model: {kind}"] = (
            refused(bs.optim.UnitNaturalGradient, model, 0.1),
            "'model' must be an nn.Module, whose forward passes",
        )
    found["gradient_gap, probe: number"] = refused(bs.gradient_gap, net(), 5), PROBE
    optimizer = refused(bs.instrument, net(), optimizer="sgd", probe=(X, Y))
    found["instrument, optimizer: text"] = (
        optimizer,
        "'optimizer' must be a torch.optim.Optimizer, .* got str",
    )
    for kind, runs in RUNS.items():
        found[f"claims: {kind}"] = (
            refused(bs.claims, runs),
            "runs must be a run folder, a folder of runs, or a table of runs",
        )
    for name, options in RATES.items():
        said = refused(bs.optim.UnitNaturalGradient, net(), **{"lr": 0.1, **options})
        found[f"UnitNaturalGradient, {name}"] = said, f"{name} must (be a|lie in)"
    return found


def test_every_public_call_says_what_it_cannot_use():
    said = subprocess.run([sys.executable, __file__], capture_output=True, text=True, timeout=120)
    assert said.returncode == 0, said.stderr
    found = json.loads(said.stdout)
    assert len(found) > 40
    other = {
        name: sentence
        for name, (sentence, pattern) in found.items()
        if not re.match(f"ValueError: .*({pattern})", sentence)
    }
    assert not other


if __name__ == "__main__":
    print(json.dumps(cases()))
