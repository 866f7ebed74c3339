"""Training step by step, and evaluation."""

import copy
import math

import pytest
import torch
from torch import nn

from biasshift.data import DataSet, TensorStream
from biasshift.training import Diverged, Gradient, Step, evaluate, train
from biasshift.training.evaluation import evaluate_batches
from biasshift.training.loop import CHECK_EVERY


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


def stream(data, batch_size=10, **options) -> TensorStream:
    """Three minibatches an epoch, the last one of five."""
    return TensorStream(data.x_train, data.y_train, batch_size, seed=0, **options)


def run(
    model, data, lr=0.1, steps=6, batch_size=10, start=0, before_step=lambda number: None, **options
):
    update = Gradient(model, torch.optim.SGD(model.parameters(), lr=lr), **options)
    return train(
        update, stream(data, batch_size), steps=steps, start=start, before_step=before_step
    )


def test_training_is_gradient_descent_by_hand(little):
    """Softmax regression from its formulas: the gradient of the mean loss is (p − e_y) xᵀ / n."""
    model = linear()
    losses = [float(step.loss) for step in run(model, little)]
    w, w0 = torch.zeros(2, 3), torch.zeros(2)
    expected = []
    for epoch in (1, 2):
        for x, y in stream(little).epoch(epoch):
            p = (x @ w.T + w0).softmax(1)
            expected.append(-p[range(len(y)), y].log().mean().item())
            delta = (p - torch.eye(2)[y]) / len(y)
            w, w0 = w - 0.1 * delta.T @ x, w0 - 0.1 * delta.sum(0)
    assert losses == pytest.approx(expected, rel=1e-5)
    assert losses[0] == pytest.approx(math.log(2))
    assert torch.allclose(model.weight, w, atol=1e-6) and torch.allclose(model.bias, w0, atol=1e-6)


def test_steps_are_numbered_from_one_and_carry_detached_losses(little):
    steps = list(run(linear(), little, steps=9))
    assert [(step.number, step.epoch) for step in steps] == [(n + 1, n // 3 + 1) for n in range(9)]
    assert all(
        isinstance(step, Step) and step.loss.shape == () and not step.loss.requires_grad
        for step in steps
    )


def test_training_learns(little):
    model = linear()
    before = evaluate(model, little.x_test, little.y_test)
    list(run(model, little, steps=60))
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

    unmeasured, measured = net(), net()
    list(run(unmeasured, little))
    for _ in run(measured, little):
        evaluate(measured, little.x_valid, little.y_valid)
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            unmeasured.state_dict().values(), measured.state_dict().values(), strict=True
        )
    )


def test_the_loss_is_an_argument(little):
    model = linear()
    step = next(
        run(model, little, loss=lambda outputs, labels: (outputs - labels[:, None]).square().mean())
    )
    assert 0 <= float(step.loss) <= 1 and model.weight.any()


@pytest.mark.parametrize(("start", "steps"), [(2, 7), (3, 7), (6, 7), (7, 7), (9, 7)])
def test_a_training_continues_where_another_one_stopped(little, start, steps):
    """In the middle of an epoch, between two, and at or behind the end: as without the stop."""
    whole, halves = linear(), linear()
    expected = [
        (step.number, step.epoch, float(step.loss)) for step in run(whole, little, steps=steps)
    ]
    list(run(halves, little, steps=min(start, steps)))
    found = [
        (step.number, step.epoch, float(step.loss))
        for step in run(halves, little, steps=steps, start=start)
    ]
    assert found == expected[start:]
    assert torch.equal(whole.weight, halves.weight) and torch.equal(whole.bias, halves.bias)


def test_the_last_step_may_be_in_the_middle_of_an_epoch(little):
    assert [step.number for step in run(linear(), little, steps=4)] == [1, 2, 3, 4]


def test_the_callback_gets_the_number_of_every_step_before_it_is_made(little):
    model, calls = linear(), []
    for step in run(
        model, little, before_step=lambda number: calls.append((number, bool(model.weight.any())))
    ):
        assert calls[-1][0] == step.number
    assert calls == [(1, False), *((n, True) for n in range(2, 7))]


def settled(outputs, labels):
    """A loss of 1 whose gradient is 0."""
    return outputs.mean() * 0 + 1.0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("at", [1, 2, 3, 5, 6])
def test_a_loss_that_is_not_finite_is_refused_by_its_step(little, bad, at):
    calls = iter(range(1, 100))
    steps = run(
        linear(),
        little,
        loss=lambda outputs, labels: settled(outputs, labels) * (bad if next(calls) == at else 1.0),
    )
    seen = []
    with pytest.raises(
        Diverged,
        match=rf"The loss became {bad} at step {at}: training diverged; lower the learning rate",
    ) as caught:
        seen += [step.number for step in steps]
        pytest.fail("no error")
    assert "\n" not in str(caught.value)


def test_a_learning_rate_that_is_too_large_is_refused_within_the_epoch(little):
    steps, seen = run(linear(), little, lr=math.inf), []
    with pytest.raises(RuntimeError, match="lower the learning rate"):
        for step in steps:
            seen.append(step.number)
    assert seen == [1, 2]  # the last step of the epoch is not handed out


def test_a_loss_that_is_not_finite_is_found_within_a_long_epoch(little):
    """There are no more than 500 steps between two checks, however long the epoch."""
    seen, calls = [], iter(range(1, 10_000))

    def update(x, y):
        return torch.tensor(math.nan if next(calls) >= 3 else 1.0)

    data = TensorStream(torch.zeros(4000, 1), torch.zeros(4000), 1, seed=0)
    with pytest.raises(Diverged, match="at step 3:"):
        for step in train(update, data, steps=4000):
            seen.append(step.number)
    assert len(seen) == CHECK_EVERY - 1 == 499


def test_an_ensemble_has_diverged_when_all_of_it_has(little):
    """Losses of two members, stacked: one that is lost is no reason to end the other."""
    losses = iter(
        [
            [1.0, 1.0],
            [math.nan, 1.0],
            [math.nan, 1.0],
            [math.nan, 1.0],
            [math.nan, math.inf],
            [math.nan, 1.0],
        ]
    )
    seen = []
    with pytest.raises(Diverged, match="at step 5:"):
        for step in train(lambda x, y: torch.tensor(next(losses)), stream(little), steps=6):
            seen.append(step.number)
    assert seen == [1, 2, 3, 4, 5]


def test_float16_away_from_a_gpu_is_refused():
    with pytest.raises(ValueError, match="bfloat16 or float32"):
        Gradient(linear(), torch.optim.SGD(linear().parameters(), lr=0.1), precision="float16")


def test_bfloat16_trains_weights_that_stay_in_float32(little):
    """Autocast rounds the products to 8 bits: the losses are near those of float32, and not the
    same.
    """
    exact, rounded = linear(), linear()
    expected = torch.stack([step.loss for step in run(exact, little)])
    found = torch.stack([step.loss.float() for step in run(rounded, little, precision="bfloat16")])
    assert rounded.weight.dtype == torch.float32 and not torch.equal(found, expected)
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)


# -- evaluate --------------------------------------------------------------------------------------


def test_evaluate_counts_and_averages(randn):
    """Logits chosen by hand: with a margin of ln 3 the right class has probability 3/4, the wrong
    one 1/4.
    """
    x = torch.tensor([[1.0], [1.0], [-1.0], [1.0]]) * math.log(3)
    model = nn.Linear(1, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0], [0.0]]))
    loss, error = evaluate(model, x, torch.tensor([0, 0, 1, 1]))
    assert loss == pytest.approx(-(3 * math.log(3 / 4) + math.log(1 / 4)) / 4) and error == 0.25


@pytest.mark.parametrize("batch_size", [1, 7, 45, 1000])
def test_the_batch_size_of_an_evaluation_does_not_matter(randn, batch_size):
    x, y, model = randn(45, 3), torch.arange(45) % 2, nn.Linear(3, 2).double()
    assert evaluate(model, x, y, batch_size=batch_size) == pytest.approx(
        evaluate(model, x, y, batch_size=45), rel=1e-12
    )


def test_evaluate_leaves_modes_gradients_and_buffers_as_found(randn):
    model = nn.Sequential(
        nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2)
    ).double()
    model[1].eval()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    evaluate(model, randn(6, 3), torch.arange(6) % 2)
    with pytest.raises(RuntimeError):
        evaluate(model, randn(6, 5), torch.arange(6) % 2)
    assert [module.training for module in model.modules()] == [True, True, False, True, True]
    assert (
        torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight))
        and model[3].weight.grad is None
    )
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)


def test_evaluate_is_in_evaluation_mode(randn):
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 2)).double()
    x, y = randn(30, 3), torch.arange(30) % 2
    assert evaluate(model, x, y) == evaluate(model, x, y) == evaluate(model[1], x, y)


def test_evaluate_refuses_no_examples():
    with pytest.raises(ValueError, match="needs at least one example, got none"):
        evaluate(linear(), torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64))


def test_evaluate_in_batches_knows_the_five_best_answers_and_other_losses(randn):
    """Against sorting, class by class."""
    x, y = randn(60, 8), torch.randint(8, (60,), generator=torch.Generator().manual_seed(0))
    model = nn.Linear(8, 8).double()
    ranked = model(x).argsort(dim=1, descending=True)
    ranks = (ranked == y[:, None]).int().argmax(dim=1)  # of the right answer
    pieces = lambda: zip(x.split(7), y.split(7), strict=True)  # noqa: E731
    found = evaluate_batches(model, pieces, top=(1, 5))
    assert found.keys() == {"loss", "error", "error5"}
    assert (
        found["error"] == (ranks > 0).double().mean().item()
        and found["error5"] == (ranks > 4).double().mean().item()
    )
    squares = evaluate_batches(
        model, pieces, top=(), loss=lambda outputs, labels: outputs.square().mean(1)
    )
    assert squares == {"loss": pytest.approx(model(x).square().mean().item(), rel=1e-12)}
