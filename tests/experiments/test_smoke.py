"""Every experiment from its command to its run folders, tiny, on synthetic data."""

import pytest

from biasshift import cli
from biasshift.runs.reader import read_runs, run_states

MEASURED = "--instrument activations bias_shift fisher gap"
COMMANDS = {
    "autoencoder": "train autoencoder --lr 0.001 --activation elu relu",
    "cifar11": f"train cifar11 --activation elu --batch-norm {MEASURED}",
    "cifar18": "train cifar18 --geometry caffe --precision bfloat16 --channels-last",
    "imagenet": "train imagenet --activation elu --mean channel",
    "mnist": "train mnist --ensemble --activation elu",
    "sweep": "sweep --activation relu --update plain full --lr 0.03 --part 1 2",
}


@pytest.mark.parametrize("name", COMMANDS)
def test_an_experiment_in_small(name, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("BIASSHIFT_DATA", raising=False)
    cli.main([*COMMANDS[name].split(), "--smoke", "--workers", "1", "--out", "runs"])
    assert "run" in capsys.readouterr().out
    states, table = run_states("runs"), read_runs("runs")
    assert len(states) >= 1 and set(states["state"]) == {"finished"}
    assert table[["train_loss", "mean", "total"]].notna().any().all()
    scores = table[table["seconds"] > 0]
    assert len(scores) and (scores["step"] > 0).all()
