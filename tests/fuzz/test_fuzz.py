"""A short campaign of the fuzzer, and faults that are planted to see whether it finds them."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import biasshift as bs
from biasshift.measure import fisher, layer_types
from biasshift.measure.sandbox import undisturbed

from . import campaign
from .examination import BAD, examine
from .generation import case
from .wrongs import cross_gradient

MODELS = 200
MOST_LEFT_OUT = 0.02  # of the layers that could be measured, without a reason


@pytest.mark.parametrize(
    "start", [pytest.param(n, marks=[pytest.mark.slow] * (n > 0)) for n in range(0, MODELS, 50)]
)
def test_random_models_are_measured_right_or_refused(start: int) -> None:
    """No wrong number, no crash, nothing changed; and hardly a refusal of what is sound."""
    outcomes = [examine(seed) for seed in range(start, start + 50)]
    bad = [(o.seed, *o.findings) for o in outcomes if o.verdict in BAD]
    assert not bad, f"python -m tests.fuzz --models 1 --seed {bad[0][0]}: {bad}"
    refused = [(o.seed, *o.findings) for o in outcomes if o.verdict == "UNJUSTIFIED"]
    assert len(refused) <= MOST_LEFT_OUT * len(outcomes), refused
    layers, measured = sum(o.layers for o in outcomes), sum(o.measured for o in outcomes)
    assert measured > 0.95 * layers > 50
    assert sum(o.verdict == "invalid" for o in outcomes) <= 3


def test_a_seed_is_a_case() -> None:
    """Twice the same model, probe and options."""
    for seed in range(10):
        first, second = case(seed), case(seed)
        assert repr(first.built) == repr(second.built) and first.options == second.options
        assert torch.equal(first.x, second.x) and torch.equal(first.y, second.y)
        assert first.built is not None and second.built is not None
        values = first.built.model.state_dict().values(), second.built.model.state_dict().values()
        assert all(map(torch.equal, *values))


# -- what is known not to hold ---------------------------------------------------------------------


def test_coupled_gradients_are_refused() -> None:
    class Cross(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return cross_gradient(x)

    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2), Cross())
    with pytest.raises(ValueError):
        bs.unit_fisher(model, torch.randn(5, 3))


def test_moments_behind_parametrized_layers() -> None:
    conv = parametrizations.weight_norm(nn.Conv2d(2, 3, 1))
    model = nn.Sequential(nn.Conv2d(2, 2, 1), nn.ReLU(), conv, nn.Tanh())
    x = torch.randn(4, 2, 4, 2)
    mean = bs.activation_moments(model, x)["3"].mean
    torch.testing.assert_close(mean, model(x).mean((0, 2, 3)))


# -- planted faults --------------------------------------------------------------------------------


def found(seeds: range, verdict: str = "WRONG") -> bool:
    return any(examine(seed).verdict == verdict for seed in seeds)


def without_padding(original: Callable) -> Callable:
    def padded(module: object, a: Tensor, shape: object = None) -> Tensor:
        full = original(module, a, shape)
        return full if full.shape == a.shape else full.new_zeros(full.shape)

    return padded


def of_the_first_call(original: Callable) -> Callable:
    """Every call gets the errors of its layer's first call."""

    def edge_gradients(outputs: Tensor, edges: list, seeds: Tensor, keep: bool) -> tuple:
        first = [edge for i, edge in enumerate(edges) if edge not in edges[:i]]
        return original(outputs, [first[0], *edges[1:-1], first[0]][: len(edges)], seeds, keep)

    return edge_gradients


def summed_seeds(original: Callable) -> Callable:
    """The errors of all seeds are added up before they are squared."""

    def edge_gradients(outputs: Tensor, edges: list, seeds: Tensor, keep: bool) -> tuple:
        deltas = original(outputs, edges, seeds, keep)
        return tuple(
            None if d is None else d.sum(0, keepdim=True).expand_as(d) / len(d) for d in deltas
        )

    return edge_gradients


def enlarged(original: Callable) -> Callable:
    def errors(module: object, delta: Tensor) -> Tensor:
        return original(module, delta) * (1 + 1e-5)

    return errors


FAULTS = {
    "padding is ignored": (layer_types, "padded", without_padding),
    "errors are a little too large": (layer_types, "errors", enlarged),
    "errors are those of another call": (fisher, "edge_gradients", of_the_first_call),
    "squares are taken of a sum": (fisher, "edge_gradients", summed_seeds),
}


@pytest.mark.parametrize("name", FAULTS)
def test_planted_faults_are_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, attribute, make = FAULTS[name]
    monkeypatch.setattr(module, attribute, make(getattr(module, attribute)))
    assert found(range(2000, 2060))


def test_hooks_that_stay_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    class Leaves:
        def __init__(self, model: nn.Module, **kwargs: object) -> None:
            self.model, self.inner = model, undisturbed(model, **kwargs)  # pyright: ignore

        def __enter__(self) -> None:
            self.inner.__enter__()

        def __exit__(self, *error: object) -> None:
            self.inner.__exit__(*error)
            self.model.register_forward_hook(lambda *_: None)

    monkeypatch.setattr(fisher, "undisturbed", Leaves)
    assert found(range(2000, 2005), "DISTURBED")


def test_a_lost_random_state_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    class Loud:
        def __init__(self, *args: object, **kwargs: object) -> None:
            self.inner = undisturbed(*args, **kwargs)  # pyright: ignore

        def __enter__(self) -> None:
            self.inner.__enter__()

        def __exit__(self, *error: object) -> None:
            self.inner.__exit__(*error)
            torch.rand(1)

    monkeypatch.setattr(fisher, "undisturbed", Loud)
    assert found(range(2000, 2005), "DISTURBED")


# -- the command -----------------------------------------------------------------------------------


def test_a_campaign_resumes(tmp_path: Path) -> None:
    """What the file holds is not examined again, also where its last line was cut."""
    file = tmp_path / "outcomes.jsonl"
    outcomes, finished = campaign.run(range(3), file, workers=1)
    assert finished and [o["seed"] for o in outcomes] == [0, 1, 2]
    lines = file.read_text().splitlines()
    marked = json.dumps({**json.loads(lines[0]), "checks": 12345})
    file.write_text(f"{marked}\n{lines[1]}\n{lines[2][:40]}")
    again, _ = campaign.run(range(3), file, workers=1)
    assert again[0]["checks"] == 12345
    assert again[2]["verdict"] == outcomes[2]["verdict"]
    assert sorted(campaign.read(file)) == [0, 1, 2]
    assert "3 models" in campaign.summary(again)


def test_ctrl_c_keeps_what_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "outcomes.jsonl"

    def interrupted(seed: int) -> dict:
        if seed == 2:
            raise KeyboardInterrupt
        return {"seed": seed, "verdict": "right", "findings": []}

    monkeypatch.setattr(campaign, "one", interrupted)
    outcomes, finished = campaign.run(range(5), file, workers=1)
    assert not finished and len(outcomes) == len(campaign.read(file)) == 2
