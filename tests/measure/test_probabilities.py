"""A model that returns probabilities where logits are due: one warning, and no false alarm."""

import warnings

import pytest
import torch
from torch import Tensor, nn

import biasshift as bs

X = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])


class Ending(nn.Module):
    """A network with a function of its outputs."""

    def __init__(self, function, scale: float = 1.0, bias: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 4), nn.ELU(), nn.Linear(4, 3))
        self.function = function
        with torch.no_grad():
            self.net[2].weight.mul_(scale)
            self.net[2].bias.fill_(bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.net(x))


SOFTMAX = {
    "module": nn.Softmax(-1),
    "function": lambda f: f.softmax(-1),
    "by hand": lambda f: f.exp() / f.exp().sum(-1, keepdim=True),
    "saturated": lambda f: (1e4 * f).softmax(-1),
}
SIGMOID = {
    "module": nn.Sigmoid(),
    "by hand": lambda f: 1 / (1 + (-f).exp()),
    "tanh": lambda f: (f.tanh() + 1) / 2,
    "clamped": lambda f: f.clamp(0, 1),
    "softmax": nn.Softmax(-1),
}
ENDS = [(f, "categorical", "softmax") for f in SOFTMAX.values()]
ENDS += [(f, "bernoulli", "sigmoid") for f in SIGMOID.values()]


def alarms(caught: pytest.WarningsRecorder) -> int:
    """How many warnings there were, but for those of few samples."""
    return sum(warning.category is not bs.FewSamplesWarning for warning in caught)


@pytest.mark.parametrize(("function", "likelihood", "last"), ENDS)
def test_probabilities_are_one_warning_wherever_logits_are_due(function, likelihood, last) -> None:
    model = Ending(function)
    for measure in (
        lambda: bs.unit_fisher(model, X, likelihood=likelihood),
        lambda: bs.unit_fisher(model, X, likelihood=likelihood, batch_size=3),
        lambda: bs.check(model, X, likelihood=likelihood),
    ):
        with pytest.warns(UserWarning, match=f"{likelihood}.*without its last {last}") as caught:
            measure()
        assert alarms(caught) == 1


def test_a_log_warns_once() -> None:
    model = Ending(nn.Softmax(-1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.warns(UserWarning, match="without its last softmax") as caught:
        with bs.instrument(model, optimizer, probe=(X, Y), every=1):
            for _ in range(3):
                optimizer.zero_grad()
                model(X).log()[range(8), Y].mean().neg().backward()
                optimizer.step()
    assert alarms(caught) == 1


@pytest.mark.parametrize(
    ("function", "likelihood", "scale", "bias"),
    [
        (nn.Identity(), "categorical", 1.0, 0.0),
        (nn.Identity(), "categorical", 0.0, 1 / 3),  # a head of zeros: equal logits that sum to 1
        (nn.LogSoftmax(-1), "categorical", 1.0, 0.0),
        (nn.Sigmoid(), "categorical", 1.0, 0.0),
        (nn.Identity(), "bernoulli", 0.01, 0.5),  # logits that happen to lie in [0, 1]
        (lambda f: f / 2 + 0.1, "bernoulli", 0.01, 0.5),
        (nn.ReLU(), "bernoulli", 0.01, 0.5),
        (lambda f: f.unsqueeze(1).mean(1), "bernoulli", 0.01, 0.5),
        (nn.Identity(), "bernoulli", 0.0, 0.0),
        (nn.Sigmoid(), "gaussian", 1.0, 0.0),
        (nn.Softmax(-1), "gaussian", 1.0, 0.0),
    ],
)
def test_outputs_that_are_logits_give_no_alarm(function, likelihood, scale, bias) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", bs.FewSamplesWarning)
        bs.unit_fisher(Ending(function, scale, bias), X, likelihood=likelihood)
