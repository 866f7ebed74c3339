"""Scores for TensorBoard: the same numbers as in the run folder."""

import sys

import pytest
from tiny import Tiny, data

from biasshift.experiments.mlp_trial import trial
from biasshift.runs.reader import read_run
from biasshift.training.runner import run
from biasshift.training.trial import Execution


def go(folder) -> None:
    (config,) = Tiny(activations=("elu",)).configs()
    run(
        [trial(config, data())],
        [folder],
        "refuse",
        lambda report: None,
        Execution(tensorboard=True),
    )


def test_the_board_has_the_scores_of_the_run(tmp_path):
    pytest.importorskip("tensorboard", reason="needs TensorBoard: pip install tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    go(tmp_path / "elu-0")
    events = EventAccumulator(str(tmp_path / "elu-0" / "tensorboard"))
    events.Reload()
    scores = read_run(tmp_path / "elu-0").dropna(subset="train_loss")
    for name in ("train_loss", "valid_error", "epoch"):
        found = [(event.step, event.value) for event in events.Scalars(name)]
        assert found == [
            (step, pytest.approx(value, rel=1e-6))
            for step, value in zip(scores["step"], scores[name], strict=True)
        ]


def test_without_tensorboard_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match="pip install tensorboard"):
        go(tmp_path / "elu-0")
