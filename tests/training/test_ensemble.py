"""Networks trained together against networks trained alone.

They have the same trajectories, the same run folders, and the same checkpoints.
"""

import math
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from tiny import EPOCH_STEPS, Tiny, data
from torch import nn

from biasshift.data import Augment, TensorStream
from biasshift.experiments.mlp_trial import trial
from biasshift.optim import UnitNaturalGradient
from biasshift.runs.reader import read_run, run_states
from biasshift.training import Diverged, Ensemble, Gradient, train
from biasshift.training.checkpoint import CHECKPOINT
from biasshift.training.ensemble import StackedStream
from biasshift.training.runner import run
from biasshift.training.trial import Execution, Phase, Progress, Trial

SEEDS, STEPS = (0, 1, 2), 40
EXAMPLES, BATCH = 50, 16  # the last minibatch of an epoch has two examples


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 9), nn.ELU(), nn.Linear(9, 9), nn.Tanh(), nn.Linear(9, 3))


def convolutional() -> nn.Module:
    """Weights that are shared over positions, in groups, and a tied layer."""
    same = nn.Linear(4, 4)
    net = [
        nn.Conv1d(1, 4, 3, padding=1),
        nn.ELU(),
        nn.Conv1d(4, 4, 3, groups=2),
        nn.LeakyReLU(),
        nn.AvgPool1d(4),
        nn.Flatten(),
    ]
    return nn.Sequential(*net, same, nn.ELU(), same, nn.Linear(4, 3))


def normalized() -> nn.Module:
    """No biases before a normalization: their gradient is 0 up to rounding, which Adam would blow
    up.
    """
    first, second = nn.Linear(6, 8, bias=False), nn.Linear(8, 8, bias=False)
    return nn.Sequential(
        first, nn.BatchNorm1d(8), nn.ELU(), second, nn.BatchNorm1d(8, momentum=0.3), nn.Linear(8, 3)
    )


def network(make, seed: int) -> nn.Module:
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return make().double()


def stream(make, seed: int) -> TensorStream:
    generator = torch.Generator().manual_seed(100)
    x = torch.randn(EXAMPLES, 6, generator=generator, dtype=torch.float64)
    y = (x @ torch.randn(6, 3, generator=generator, dtype=torch.float64)).argmax(1)
    return TensorStream(x[:, None] if make is convolutional else x, y, BATCH, seed)


def sgd(parameters: Iterator[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=1e-2, nesterov=True)


def alone(make, seed: int, optimizer=sgd) -> tuple[nn.Module, list[float]]:
    model = network(make, seed)
    update = Gradient(model, optimizer(model.parameters()))
    return model, [float(step.loss) for step in train(update, stream(make, seed), steps=STEPS)]


def assert_close(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            actual[name],
            value,
            rtol=1e-10,
            atol=1e-12,
            msg=lambda message, name=name: f"{name}: {message}",
        )


@pytest.mark.parametrize("make", [perceptron, convolutional, normalized])
@pytest.mark.parametrize(
    "optimizer",
    [sgd, lambda parameters: torch.optim.Adam(parameters, lr=0.01)],
    ids=["sgd", "adam"],
)
def test_members_follow_the_trajectories_that_they_would_have_alone(make, optimizer):
    """Parameters and buffers, over tens of steps of momentum and weight decay."""
    members = [network(make, seed) for seed in SEEDS]
    together = StackedStream([stream(make, seed) for seed in SEEDS])
    losses = torch.stack(
        [step.loss for step in train(Ensemble(members, optimizer), together, steps=STEPS)]
    )
    for number, seed in enumerate(SEEDS):
        model, expected = alone(make, seed, optimizer)
        np.testing.assert_allclose(losses[:, number].numpy(), expected, rtol=1e-9)
        assert_close(dict(members[number].state_dict()), dict(model.state_dict()))
    assert losses[-1].unique().numel() == len(SEEDS)


@pytest.mark.parametrize("make", [perceptron, normalized])
def test_an_ensemble_of_one_is_a_network(make):
    (member,) = members = [network(make, 7)]
    list(train(Ensemble(members, sgd), OneOf(stream(make, 7)), steps=10))
    model = network(make, 7)
    list(train(Gradient(model, sgd(model.parameters())), stream(make, 7), steps=10))
    assert_close(dict(member.state_dict()), dict(model.state_dict()))


class OneOf:
    """The minibatches of one stream, as those of an ensemble of one."""

    def __init__(self, stream: TensorStream):
        self.stream = stream

    def __len__(self) -> int:
        return len(self.stream)

    def epoch(self, number: int, start: int = 0) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for x, y in self.stream.epoch(number, start):
            yield x[None], y[None]


def test_members_are_what_the_ensemble_trains_at_any_time():
    """Measured, saved or even changed between two steps, a member is its slice of the stacked
    parameters.
    """
    members = [network(normalized, seed) for seed in SEEDS]
    ensemble = Ensemble(members, sgd)
    for step in train(
        ensemble, StackedStream([stream(normalized, seed) for seed in SEEDS]), steps=12
    ):
        for number, member in enumerate(members):
            for name, value in {
                **dict(member.named_parameters()),
                **dict(member.named_buffers()),
            }.items():
                whole = {**ensemble.parameters, **ensemble.buffers}[name]
                assert (
                    torch.equal(value, whole[number])
                    and value.data_ptr() == whole[number].data_ptr()
                )
        if step.number == 5:
            with torch.no_grad():
                members[1].get_parameter("0.weight").zero_()
            assert (
                not ensemble.parameters["0.weight"][1].any()
                and ensemble.parameters["0.weight"][0].any()
            )


@pytest.mark.parametrize("views", [1, 2])
def test_minibatches_of_one_data_set_are_those_of_the_members(views):
    """Taken by one selection for all members; streams of different tensors are stacked."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(EXAMPLES * views, 6, generator=generator), torch.arange(EXAMPLES * views) % 3
    together = StackedStream([TensorStream(x, y, BATCH, seed, views=views) for seed in SEEDS])
    apart = StackedStream(
        [TensorStream(x.clone(), y.clone(), BATCH, seed, views=views) for seed in SEEDS]
    )
    for epoch, start in ((1, 0), (2, 0), (2, 3)):
        found, expected = list(together.epoch(epoch, start)), list(apart.epoch(epoch, start))
        assert len(found) == len(expected) == len(together) - start
        for pair, other in zip(found, expected, strict=True):
            assert all(map(torch.equal, pair, other))


def test_augmented_minibatches_are_stacked():
    x, y = torch.rand(20, 3, 8, 8), torch.arange(20) % 3
    streams = [TensorStream(x, y, 5, seed, augment=Augment(pad=1)) for seed in SEEDS]
    for together, *apart in zip(
        StackedStream(streams).epoch(1), *[stream.epoch(1) for stream in streams], strict=True
    ):
        assert torch.equal(together[0], torch.stack([x for x, _ in apart]))


def test_the_members_modes_are_left_as_found_and_they_train_in_training_mode():
    members = [network(normalized, seed).eval() for seed in SEEDS]
    before = [member[1].running_mean.clone() for member in members]
    list(
        train(
            Ensemble(members, sgd),
            StackedStream([stream(normalized, seed) for seed in SEEDS]),
            steps=1,
        )
    )
    assert not any(member.training for member in members)
    assert not any(
        torch.equal(member[1].running_mean, mean)
        for member, mean in zip(members, before, strict=True)
    )


def test_dropout_draws_for_every_member_its_own():
    x, y = torch.ones(2, 4, 5), torch.zeros(2, 4, dtype=torch.int64)
    same = nn.Sequential(nn.Dropout(0.5), nn.Linear(5, 3))
    members = [same, nn.Sequential(nn.Dropout(0.5), nn.Linear(5, 3))]
    members[1].load_state_dict(same.state_dict())
    losses = Ensemble(members, lambda parameters: torch.optim.SGD(parameters, lr=0.0))(x, y)
    assert losses[0] != losses[1]


def test_a_member_that_is_lost_does_not_harm_the_others():
    members = [network(perceptron, seed) for seed in SEEDS]
    with torch.no_grad():
        members[1].get_parameter("0.weight").fill_(math.nan)
    stacked = StackedStream([stream(perceptron, seed) for seed in SEEDS])
    list(train(Ensemble(members, sgd), stacked, steps=STEPS))
    for number in (0, 2):
        assert_close(
            dict(members[number].state_dict()),
            dict(alone(perceptron, SEEDS[number])[0].state_dict()),
        )


# -- networks that cannot be trained together ------------------------------------------------------


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([], "at least one member"),
        (
            [nn.Linear(3, 2), nn.Linear(2, 3)],
            "Member 1 of the ensemble has other parameters than member 0",
        ),
        (
            [nn.Linear(3, 2), nn.Linear(3, 2), nn.Linear(3, 2, bias=False)],
            "Member 2 of the ensemble has other parameters",
        ),
        (
            [nn.Linear(3, 2), nn.Linear(3, 2).double()],
            "Member 1 of the ensemble has other parameters",
        ),
        (
            [nn.Sequential(nn.Linear(3, 2), nn.ELU()), nn.Sequential(nn.Linear(3, 2), nn.ReLU())],
            "Member 1 .* other modules",
        ),
        (
            [nn.Sequential(nn.Linear(3, 2), nn.Dropout(p)) for p in (0.1, 0.2)],
            "Member 1 .* other modules",
        ),
    ],
)
def test_unlike_members_are_refused(members, message):
    weights = [p.detach().clone() for member in members for p in member.parameters()]
    with pytest.raises(ValueError, match=message):
        Ensemble(members, sgd)
    assert all(
        torch.equal(p, was)
        for p, was in zip((p for m in members for p in m.parameters()), weights, strict=True)
    )


def test_an_optimizer_that_watches_a_network_is_refused():
    members = [network(perceptron, seed) for seed in SEEDS]
    with pytest.raises(
        ValueError, match="'UnitNaturalGradient' cannot train the members of an ensemble together"
    ):
        Ensemble(members, lambda parameters: UnitNaturalGradient(members[0], lr=0.1))


def test_trials_of_different_shapes_are_refused_before_anything_is_written(tmp_path):
    one, two = trials(2)
    others = {
        "same steps": replace(two, steps=9),
        "same steps, phases and times of scores": replace(two, score_every=1),
        "same steps, phases": replace(two, phases=(Phase(1, 1.0),)),
        "Member 1 .* other modules": trials(activations=("relu",))[1],
        "equally many minibatches": replace(two, stream=replace(two.stream, batch_size=100)),
    }
    for message, other in others.items():
        with pytest.raises(ValueError, match=message):
            run([one, other], [tmp_path / "one", tmp_path / "two"], "refuse", ignore)
    assert list(tmp_path.iterdir()) == []


# -- run folders -----------------------------------------------------------------------------------


def ignore(report: Progress) -> None: ...


def trials(seeds: int = 3, activations: tuple[str, ...] = ("elu",)) -> list[Trial]:
    """In float64, where the two ways agree to many digits over all steps."""
    doubles = []
    for config in Tiny(activations=activations, seeds=seeds, momentum=0.5).configs():
        single = trial(config, data())
        doubles.append(
            replace(
                single,
                model=single.model.double(),
                stream=replace(single.stream, x=single.stream.x.double()),
                schedules=[
                    replace(schedule, probe=(schedule.probe[0].double(), schedule.probe[1]))
                    for schedule in single.schedules
                ],
                exam=None,
                at_end=None,
                score=weights,
            )
        )
    return doubles


def weights(model: nn.Module) -> dict[str, float]:
    """Numbers that depend on all parameters."""
    values = torch.cat([p.detach().flatten() for p in model.parameters()])
    return {"norm": values.norm().item(), "sum": (values * torch.arange(len(values))).sum().item()}


KEEP = Execution(checkpoint_seconds=0.0, keep_weights=True)


def folders(out: Path) -> list[Path]:
    return [out / f"elu-{seed}" for seed in SEEDS]


@pytest.fixture(scope="module")
def single(tmp_path_factory) -> list[Path]:
    """The folders of runs that were made one by one."""
    made = folders(tmp_path_factory.mktemp("single"))
    for one, folder in zip(trials(), made, strict=True):
        run([one], [folder], "refuse", ignore, KEEP)
    return made


def assert_same_runs(actual: list[Path], expected: list[Path]) -> None:
    for pair in zip(actual, expected, strict=True):
        tables = [read_run(folder).drop(columns="seconds") for folder in pair]
        tables = [
            table.sort_values(["step", "layer", "unit"], kind="stable").reset_index(drop=True)
            for table in tables
        ]
        pd.testing.assert_frame_equal(*tables, rtol=2e-6, atol=1e-7, check_like=True)
        mine, theirs = (torch.load(folder / CHECKPOINT, weights_only=True) for folder in pair)
        assert_close(mine["model"], theirs["model"])
        assert mine["step"] == theirs["step"]
        for key, state in theirs["optimizer"]["state"].items():
            assert_close(mine["optimizer"]["state"][key], state)
    assert set(run_states(*actual)["state"]) == {"finished"}


def test_the_runs_of_an_ensemble_are_those_of_its_members_alone(tmp_path, single):
    reports: list[Progress] = []
    run(trials(), folders(tmp_path), "refuse", reports.append, KEEP)
    assert_same_runs(folders(tmp_path), single)
    assert (
        read_run(single[0])[["mean", "total", "s", "cos_gradient", "batch_loss", "inputs"]]
        .notna()
        .any()
        .all()
    )
    ends = [report for report in reports if report.step == report.steps]
    assert [report.run for report in ends] == ["elu-0", "elu-1", "elu-2"] and len(
        {report.loss for report in ends}
    ) == 3


def stopped_at(step: int, trials: list[Trial]) -> list[Trial]:
    """An interruption when the last network of an ensemble is scored, behind the others."""
    last = trials[-1]
    scored = 0

    def score(model: nn.Module) -> dict[str, float]:
        nonlocal scored
        scored += 1
        if scored == step + 1:
            raise KeyboardInterrupt
        return last.score(model)

    return [*trials[:-1], replace(last, score=score)]


def test_an_interrupted_ensemble_is_resumed(tmp_path, single):
    # scores at 0 (once), 23 and 46: interrupted in the first checkpoint, then behind it
    for step in (1, 1):
        with pytest.raises(KeyboardInterrupt):
            run(stopped_at(step, trials()), folders(tmp_path), "resume", ignore, KEEP)
    run(trials(), folders(tmp_path), "resume", ignore, KEEP)
    assert_same_runs(folders(tmp_path), single)


@pytest.fixture
def half(tmp_path) -> list[Path]:
    """Three interrupted runs of one ensemble, each with a checkpoint after the first epoch."""
    with pytest.raises(KeyboardInterrupt):
        run(stopped_at(2, trials()), folders(tmp_path), "refuse", ignore, KEEP)
    assert {
        torch.load(folder / CHECKPOINT, weights_only=True)["step"] for folder in folders(tmp_path)
    } == {EPOCH_STEPS}
    return folders(tmp_path)


def test_a_members_checkpoint_has_its_own_weights_alone(half):
    """They are views into those of all members, whose storage would be saved three times."""
    state = torch.load(half[0] / CHECKPOINT, weights_only=True)
    for value in state["model"].values():
        assert value.untyped_storage().nbytes() == value.nbytes


def test_members_of_an_ensemble_are_resumed_alone(half, single):
    for one, folder in zip(trials(), half, strict=True):
        run([one], [folder], "resume", ignore, KEEP)
    assert_same_runs(half, single)


def test_runs_that_were_alone_are_resumed_together(tmp_path, single):
    for one, folder in zip(trials(), folders(tmp_path), strict=True):
        with pytest.raises(KeyboardInterrupt):
            run(stopped_at(2, [one]), [folder], "refuse", ignore, KEEP)
    run(trials(), folders(tmp_path), "resume", ignore, KEEP)
    assert_same_runs(folders(tmp_path), single)


def test_members_at_different_steps_are_resumed_apart_and_a_finished_one_stays(half, single):
    """As after a kill between the checkpoints of two members, or between their ends."""
    shutil.rmtree(half[0])
    shutil.rmtree(half[2])
    shutil.copytree(single[2], half[2])
    before = {path: path.stat().st_mtime_ns for path in half[2].iterdir()}
    run(trials(), half, "resume", ignore, KEEP)
    assert_same_runs(half, single)
    assert {path: path.stat().st_mtime_ns for path in half[2].iterdir()} == before


# -- members that diverge --------------------------------------------------------------------------


def lost(trial: Trial) -> Trial:
    with torch.no_grad():
        next(trial.model.parameters()).fill_(math.inf)
    return trial


@pytest.mark.filterwarnings("ignore:Step .* no Fisher and gap rows:UserWarning")
def test_a_member_that_diverges_is_failed_and_the_others_finish(tmp_path, single):
    one, two, three = trials()
    closed: list[nn.Module] = []

    def closing(model: nn.Module, step: int) -> pd.DataFrame:
        closed.append(model)
        return pd.DataFrame({"step": [step], "closing": [1.0]})

    members = [replace(member, at_end=closing) for member in (one, lost(two), three)]
    run(members, folders(tmp_path), "refuse", ignore, KEEP)
    assert run_states(tmp_path)["state"].tolist() == ["finished", "failed", "finished"]
    assert closed == [one.model, three.model]
    for number in (0, 2):
        pair = folders(tmp_path)[number], single[number]
        mine, theirs = (torch.load(folder / CHECKPOINT, weights_only=True) for folder in pair)
        assert_close(mine["model"], theirs["model"])
    with pytest.raises(Diverged):
        run(trials(), folders(tmp_path), "resume", ignore, KEEP)
    assert run_states(tmp_path)["state"].tolist() == ["finished", "failed", "finished"]


@pytest.mark.filterwarnings("ignore:Step .* no Fisher and gap rows:UserWarning")
def test_an_ensemble_that_diverges_as_a_whole_raises(tmp_path):
    with pytest.raises(Diverged, match="at step 1:"):
        run([lost(one) for one in trials()], folders(tmp_path), "refuse", ignore, KEEP)
    assert run_states(tmp_path)["state"].tolist() == ["failed"] * 3
