"""Steps as CUDA graphs: what is replayed, what is not, and that the numbers are the same."""

import copy

import pytest
import torch
from torch import nn

import biasshift as bs
from biasshift.training import Ensemble, Gradient
from biasshift.training.cuda_graphs import WARM_UP, GraphedStep


def network() -> nn.Sequential:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 6), nn.ELU(), nn.Dropout(0.0), nn.Linear(6, 3)).double()


def minibatches(count: int, device="cpu", dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    sizes = [3 if i % 5 == 4 else 8 for i in range(count)]  # every fifth is short
    return [
        (
            torch.randn(n, 4, generator=generator).to(device, dtype),
            torch.randint(3, (n,), generator=generator).to(device),
        )
        for n in sizes
    ]


class Tape:
    """Records as CUDA does: nothing runs while it records but the optimizer's hooks, and a replay
    makes the step.
    """

    def __init__(self, members=None):
        self.captures = self.replays = 0
        self.shape = () if members is None else (members,)

    def __call__(self, step):
        self.captures += 1
        loss = torch.zeros(self.shape, dtype=torch.float64)

        def replay():
            self.replays += 1
            loss.copy_(step())

        return replay, loss


def trained(model, update, batches, change=lambda i: None):
    losses = []
    for i, (x, y) in enumerate(batches):
        change(i)
        losses.append(float(update(x, y)))
    return losses, copy.deepcopy(model.state_dict())


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def test_recorded_steps_are_the_same_steps():
    one, two, tape = network(), network(), Tape()
    expected = trained(one, Gradient(one, sgd(one)), minibatches(20))
    graphed = GraphedStep(Gradient(two, sgd(two)), capture=tape)
    losses, state = trained(two, graphed, minibatches(20))
    assert losses == expected[0] and all(
        torch.equal(state[name], value) for name, value in expected[1].items()
    )
    assert tape.captures == 1 and tape.replays == 20 - WARM_UP - 4  # four of twenty are short


@pytest.mark.parametrize(
    "name, value", [("lr", 0.01), ("momentum", 0.5), ("weight_decay", 0.1), ("nesterov", True)]
)
def test_a_change_of_the_optimizer_or_of_dropout_is_recorded_anew(name, value):
    model, tape = network(), Tape()
    optimizer = sgd(model)

    def change(i):
        if i == 7:
            optimizer.param_groups[0][name] = value
        if i == 11:
            model[2].p = 0.5

    trained(model, GraphedStep(Gradient(model, optimizer), capture=tape), minibatches(14), change)
    assert tape.captures == 3


def ensemble(device="cpu", dtype=torch.float64):
    members = [network().to(device, dtype) for _ in range(3)]
    for number, member in enumerate(members):
        with torch.no_grad():
            member[0].weight.mul_(1 + number)
    return Ensemble(members, lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9))


def stacked(batches):
    return [(torch.stack([x, -x, 2 * x]), torch.stack([y] * 3)) for x, y in batches]


def steps_of_ensemble(update, batches):
    losses = torch.stack([update(x, y).clone() for x, y in stacked(batches)])
    (group,) = update.optimizer.param_groups
    return losses, [p.detach().clone() for p in group["params"]]


def test_an_ensemble_is_one_graph_of_the_same_steps():
    tape = Tape(members=3)
    expected = flat(steps_of_ensemble(ensemble(), minibatches(20)))
    graphed = GraphedStep(ensemble(), capture=tape)
    found = flat(steps_of_ensemble(graphed, minibatches(20)))
    assert all(map(torch.equal, found, expected))
    assert tape.captures == 1 and tape.replays == 20 - WARM_UP - 4


def flat(found):
    return found[0], *found[1]


def test_measured_steps_run_as_they_are_and_the_log_counts_all():
    one, two = network(), network()
    tables = []
    for model, graphed in ((one, False), (two, True)):
        optimizer = sgd(model)
        x = torch.randn(9, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        probe = x, torch.arange(9) % 3
        with bs.instrument(model, optimizer=optimizer, probe=probe, every=4) as log:
            update = Gradient(model, optimizer)
            if graphed:

                def due(log=log):
                    return log.due

                def count(log=log):
                    log.step += 1

                update = GraphedStep(update, due, count, capture=SilentTape(optimizer))
            trained(model, update, minibatches(12))
        tables.append(log.table())
    assert sorted(set(tables[0]["step"])) == [0, 4, 8, 12]
    assert tables[0].equals(tables[1])


class SilentTape(Tape):
    """Hooks fire once, when the step is recorded, as with CUDA: replays are silent."""

    def __init__(self, optimizer):
        super().__init__()
        self.optimizer = optimizer

    def __call__(self, step):
        replay, loss = super().__call__(step)
        for hook in self.optimizer._optimizer_step_post_hooks.values():
            hook(self.optimizer, (), {})

        def silently():
            names = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
            hooks = {name: getattr(self.optimizer, name) for name in names}
            vars(self.optimizer).update({name: type(own)() for name, own in hooks.items()})
            try:
                replay()
            finally:
                vars(self.optimizer).update(hooks)

        return silently, loss


def test_away_from_a_gpu_it_is_refused():
    model = network()
    with pytest.raises(ValueError, match="need a GPU"):
        GraphedStep(Gradient(model, sgd(model)))


@pytest.mark.gpu
def test_on_a_gpu_the_recorded_steps_are_the_same_steps():
    one, two = network().cuda().float(), network().cuda().float()
    batches = minibatches(40, "cuda", torch.float32)
    expected = trained(one, Gradient(one, sgd(one)), batches)
    losses, state = trained(two, GraphedStep(Gradient(two, sgd(two))), batches)
    assert losses == pytest.approx(expected[0], rel=1e-5)
    for name, value in expected[1].items():
        torch.testing.assert_close(state[name], value)


@pytest.mark.gpu
def test_on_a_gpu_an_ensemble_is_one_graph_of_the_same_steps():
    batches = minibatches(40, "cuda", torch.float32)
    expected = flat(steps_of_ensemble(ensemble("cuda", torch.float32), batches))
    found = flat(steps_of_ensemble(GraphedStep(ensemble("cuda", torch.float32)), batches))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
