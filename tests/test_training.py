import copy
import math

import pytest
import torch
from torch import nn

from biasshift.data import DataSet, batches
from biasshift.training import Step, evaluate, train


@pytest.fixture
def little(randn) -> DataSet:
    """Two clouds of 25 + 10 + 10 points that a linear classifier can tell apart."""
    y = torch.arange(45) % 2
    x = (randn(45, 3) + 4 * y[:, None]).float()
    (x1, x2, x3), (y1, y2, y3) = x.split([25, 10, 10]), y.split([25, 10, 10])
    return DataSet("little", 2, x1, y1, x2, y2, x3, y3)


def linear() -> nn.Linear:
    model = nn.Linear(3, 2)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    return model


def run(model, data, lr=0.1, **options):
    settings = {"epochs": 2, "batch_size": 10, "generator": torch.Generator().manual_seed(0)} | options
    return train(model, torch.optim.SGD(model.parameters(), lr=lr), data, **settings)


def test_training_is_gradient_descent_by_hand(little):
    """Softmax regression from its formulas: the gradient of the mean loss is (p − e_y) xᵀ / n."""
    model = linear()
    losses = [float(step.loss) for step in run(model, little)]
    w, w0 = torch.zeros(2, 3), torch.zeros(2)
    shuffle, expected = torch.Generator().manual_seed(0), []
    for _ in range(2):
        for x, y in batches(little.x_train, little.y_train, 10, shuffle):
            p = (x @ w.T + w0).softmax(1)
            expected.append(-p[range(len(y)), y].log().mean().item())
            delta = (p - torch.eye(2)[y]) / len(y)
            w, w0 = w - 0.1 * delta.T @ x, w0 - 0.1 * delta.sum(0)
    assert losses == pytest.approx(expected, rel=1e-5)
    assert losses[0] == pytest.approx(math.log(2))
    assert torch.allclose(model.weight, w, atol=1e-6) and torch.allclose(model.bias, w0, atol=1e-6)


def test_steps_are_numbered_from_one_and_carry_detached_losses(little):
    steps = list(run(linear(), little, epochs=3))
    assert [(step.number, step.epoch) for step in steps] == [(n + 1, n // 3 + 1) for n in range(9)]
    assert all(isinstance(step, Step) and step.loss.shape == () and not step.loss.requires_grad for step in steps)


def test_training_learns(little):
    model = linear()
    before = evaluate(model, little.x_test, little.y_test)
    list(run(model, little, epochs=20))
    after = evaluate(model, little.x_test, little.y_test)
    assert before == (pytest.approx(math.log(2)), 0.5) and after[0] < 0.2 and after[1] == 0


def test_nothing_happens_until_someone_iterates_and_stopping_is_breaking_off(little):
    model = linear()
    steps = run(model, little)
    assert not model.weight.any()
    next(steps)
    seen = copy.deepcopy(model.state_dict())
    steps.close()
    assert all(torch.equal(value, seen[name]) for name, value in model.state_dict().items())


def test_an_evaluation_between_two_steps_changes_nothing(little):
    def net():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))

    quiet, watched = net(), net()
    list(run(quiet, little))
    for _ in run(watched, little):
        evaluate(watched, little.x_valid, little.y_valid)
    assert all(torch.equal(a, b) for a, b in zip(quiet.state_dict().values(), watched.state_dict().values(), strict=True))


def test_the_loss_is_an_argument(little):
    model = linear()
    step = next(run(model, little, loss=lambda outputs, labels: (outputs - labels[:, None]).square().mean()))
    assert 0 <= float(step.loss) <= 1 and model.weight.any()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("at", [1, 2, 3, 5, 6])
def test_a_loss_that_is_not_finite_is_refused_by_its_step(little, bad, at):
    calls = iter(range(1, 100))
    steps = run(linear(), little, lr=0.25, loss=lambda outputs, labels: outputs.mean() * 0 + (bad if next(calls) == at else 1.0))
    seen = []
    with pytest.raises(RuntimeError, match=rf"the loss became {bad} at step {at} with learning rate 0\.25") as caught:
        seen += [step.number for step in steps]
        pytest.fail("no error")
    assert "\n" not in str(caught.value)


def test_a_learning_rate_that_is_too_large_is_refused_within_the_epoch(little):
    steps, seen = run(linear(), little, lr=math.inf), []
    with pytest.raises(RuntimeError, match="learning rate inf"):
        for step in steps:
            seen.append(step.number)
    assert seen == [1, 2]  # the last step of the epoch is not handed out


def test_a_batch_size_of_zero_is_refused(little):
    with pytest.raises(ValueError, match="batch_size"):
        next(run(linear(), little, batch_size=0))


# -- evaluate ---------------------------------------------------------------------------------------------------------


def test_evaluate_counts_and_averages(randn):
    """Logits chosen by hand: with a margin of ln 3 the right class has probability 3/4, the wrong one 1/4."""
    x = torch.tensor([[1.0], [1.0], [-1.0], [1.0]]) * math.log(3)
    model = nn.Linear(1, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0], [0.0]]))
    loss, error = evaluate(model, x, torch.tensor([0, 0, 1, 1]))
    assert loss == pytest.approx(-(3 * math.log(3 / 4) + math.log(1 / 4)) / 4) and error == 0.25


@pytest.mark.parametrize("batch_size", [1, 7, 45, 1000])
def test_the_batch_size_of_an_evaluation_does_not_matter(randn, batch_size):
    x, y, model = randn(45, 3), torch.arange(45) % 2, nn.Linear(3, 2).double()
    assert evaluate(model, x, y, batch_size=batch_size) == pytest.approx(evaluate(model, x, y, batch_size=45), rel=1e-12)


def test_evaluate_leaves_modes_gradients_and_buffers_as_found(randn):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2)).double()
    model[1].eval()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    evaluate(model, randn(6, 3), torch.arange(6) % 2)
    with pytest.raises(RuntimeError):
        evaluate(model, randn(6, 5), torch.arange(6) % 2)
    assert [module.training for module in model.modules()] == [True, True, False, True, True]
    assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight)) and model[3].weight.grad is None
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)


def test_evaluate_is_in_evaluation_mode(randn):
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 2)).double()
    x, y = randn(30, 3), torch.arange(30) % 2
    assert evaluate(model, x, y) == evaluate(model, x, y) == evaluate(model[1], x, y)


def test_evaluate_refuses_no_examples():
    with pytest.raises(ValueError, match="no examples"):
        evaluate(linear(), torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64))
