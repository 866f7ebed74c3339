"""Rows of a log as named numbers, and what TensorBoard, W&B and MLflow have of them."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from trainings import data, loss, network

import biasshift as bs
from biasshift.integrations import (
    layer_scalars,
    share,
    to_mlflow,
    to_tensorboard,
    to_wandb,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def measured(*receivers, **options):
    """A training of four steps; the log."""
    model, (x, y) = network(), data()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with bs.instrument(model, optimizer, (x, y), every=2, **options) as log:
        for receive in receivers:
            log.follow(receive)
        for _ in range(4):
            optimizer.zero_grad()
            loss(model, x, y).backward()
            optimizer.step()
    return log


def test_numbers_of_layers_are_medians_over_units_and_values_of_the_whole():
    table = measured().table()
    scalars = layer_scalars(table)
    assert list(scalars) == [0, 2, 4]
    first = table[(table.step == 4) & (table.layer == "0")]
    units, whole = first[first.unit >= 0], first[first.unit == -1]
    assert scalars[4]["biasshift/0/own"] == pytest.approx(units.own.median())
    assert scalars[4]["biasshift/0/cos_gradient"] == pytest.approx(whole.cos_gradient.item())
    assert scalars[4]["biasshift/0/reliable"] == pytest.approx(units.reliable.mean())
    assert not any(np.isnan(list(values.values())).any() for values in scalars.values())
    assert "biasshift/0/own" not in scalars[0] and "biasshift/0/mean" not in scalars[0]


def test_compact_tables_are_the_same_and_names_are_those_that_all_loggers_take():
    log = measured(quantities="activations")
    assert layer_scalars(log.table(compact=True)) == layer_scalars(log.table())
    row = {"step": [3], "layer": ["a#1:x"], "unit": [0], "mean": [float("inf")], "var": [2.0]}
    assert layer_scalars(pd.DataFrame(row), "mine") == {3: {"mine/a_1_x/var": 2.0}}
    with pytest.raises(ValueError, match="must have the columns step, layer and unit, got mean"):
        layer_scalars(pd.DataFrame({"mean": [1.0]}))


def test_tensorboard_has_the_numbers(tmp_path):
    pytest.importorskip("tensorboard", reason="needs tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    expected = layer_scalars(measured(to_tensorboard(tmp_path)).table())
    events = EventAccumulator(str(tmp_path), size_guidance={"scalars": 0}).Reload()
    found = {
        (event.step, tag): event.value
        for tag in events.Tags()["scalars"]
        for event in events.Scalars(tag)
    }
    numbers = {(step, name): x for step, own in expected.items() for name, x in own.items()}
    assert found.keys() == numbers.keys()
    for key, value in numbers.items():
        assert found[key] == pytest.approx(value, rel=1e-6)


def test_wandb_has_the_numbers_offline(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="needs wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logged = []
    with wandb.init(mode="offline", dir=tmp_path, project="biasshift") as run:
        log = run.log
        monkeypatch.setattr(run, "log", lambda values: (logged.append(values), log(values)))
        table = measured(to_wandb(run)).table()
        summary = {name: run.summary[name] for name in layer_scalars(table)[4]}
    assert summary == pytest.approx(layer_scalars(table)[4])
    assert [values.pop("biasshift/step") for values in logged] == [0, 2, 4]
    assert logged == list(layer_scalars(table).values())
    assert list(tmp_path.rglob("*.wandb"))


def test_mlflow_has_the_numbers(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="needs mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    client = mlflow.MlflowClient(tracking_uri=tmp_path.as_uri())
    experiment = client.create_experiment("biasshift")
    run = client.create_run(experiment).info.run_id
    expected = layer_scalars(measured(to_mlflow(run, client)).table())
    for name in {name for own in expected.values() for name in own}:
        history = {m.step: m.value for m in client.get_metric_history(run, name)}
        assert history == {step: own[name] for step, own in expected.items() if name in own}


def test_large_networks_are_sent_in_parts(monkeypatch):
    pytest.importorskip("mlflow", reason="needs mlflow")
    sizes = []
    client = SimpleNamespace(log_batch=lambda run, metrics: sizes.append(len(metrics)))
    rows = {"step": 0, "layer": [f"layer{i}" for i in range(1200)], "unit": 0, "mean": 1.0}
    to_mlflow("run", client)(pd.DataFrame(rows))
    assert sizes == [1000, 200]


def test_a_receiver_that_fails_is_told_once_and_training_goes_on():
    received = []

    def receive(rows):
        received.append(rows)
        if len(received) > 1:
            raise OSError("no network")

    with pytest.warns(UserWarning, match="step 2 were not received .OSError: no network") as told:
        log = measured(receive)
    assert len([w for w in told if "not received" in str(w.message)]) == 1
    assert sorted(set(log.table().step)) == [0, 2, 4] and len(received) == 3
    pd.testing.assert_frame_equal(pd.concat(received, ignore_index=True), log.table())


def test_what_is_missing_is_said_in_one_sentence(monkeypatch):
    import sys

    for module, make in (("wandb", to_wandb), ("mlflow", to_mlflow)):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(ModuleNotFoundError) as raised:
            make()
        assert str(raised.value) == (
            f"'to_{module}' needs {module}. Install it with: pip install 'biasshift[integrations]'."
        )
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ModuleNotFoundError, match="'to_tensorboard' needs tensorboard"):
        to_tensorboard("folder")


@pytest.mark.parametrize(
    ("name", "module", "modules"),
    [
        ("LightningCallback", "lightning_callback", ["lightning", "pytorch_lightning"]),
        ("HuggingFaceCallback", "hugging_face", ["transformers"]),
    ],
)
def test_callbacks_of_missing_libraries_too(monkeypatch, name, module, modules):
    import sys

    from biasshift import integrations

    for missing in [*modules, "lightning.pytorch"]:
        monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.delitem(sys.modules, f"biasshift.integrations.{module}", raising=False)
    monkeypatch.delitem(vars(integrations), name, raising=False)
    with pytest.raises(ModuleNotFoundError) as raised:
        getattr(integrations, name)
    assert str(raised.value) == (
        f"'{name}' needs {modules[0]}. Install it with: pip install 'biasshift[integrations]'."
    )
    assert name in dir(integrations)


@pytest.mark.parametrize("value", [3, {1}, {"x": [1]}])
def test_what_cannot_be_shared_is_refused(value):
    with pytest.raises(ValueError, match=f"got {type(value).__name__}"):
        share([1, 2], value)


def test_layer_scalars_need_a_table():
    with pytest.raises((ValueError, TypeError), match=r"'table'|DataFrame"):
        layer_scalars(3)
