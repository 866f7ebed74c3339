"""Files of version 0.1 are read, resumed and judged as that version would have done."""

import json
import pickle
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from tiny import Tiny, data

import biasshift as bs
from biasshift.analysis import claims_markdown, sentences
from biasshift.cli.parser import EXPERIMENTS
from biasshift.experiments import run
from biasshift.experiments.mlp_trial import MlpConfig, trial
from biasshift.runs import read_run, run_states
from biasshift.runs.options import require_same_config
from biasshift.runs.schema import LAYOUT
from biasshift.training.trial import Execution

FOLDER = Path(__file__).parent / "version_0_1"
UPDATES = {"plain": {"activation": "elu", "momentum": 0.9}, "full": {"activation": "relu"}}
KEYS = ["step", "layer", "unit"]
STOPPED = 28  # the step of the checkpoints


def config(update: str) -> MlpConfig:
    first = Tiny(seeds=3, lr=0.1, equal_loss=2.25).configs()[0]
    changed = {"update": update, "epochs": 2, "update_every": 5, "scores_per_epoch": 3}
    return replace(first, units_measured=2, probe_size=100, **changed, **UPDATES[update])


@pytest.mark.parametrize("update", UPDATES)
def test_an_interrupted_run_resumes_to_its_end(update: str, tmp_path: Path) -> None:
    folder = tmp_path / f"interrupted-{update}"
    shutil.copytree(FOLDER / folder.name, folder)
    run([trial(config(update), data())], [folder], "resume", lambda progress: None, Execution())
    assert run_states(folder)["state"].tolist() == ["finished"]
    resumed, whole = (
        read_run(path).drop(columns=["run", "seconds"]).sort_values(KEYS, kind="stable")
        for path in (folder, FOLDER / f"finished-{update}")
    )
    assert set(resumed.columns) - set(whole.columns) <= {"reliable"}  # which newer versions add
    resumed = resumed[whole.columns]
    pd.testing.assert_frame_equal(resumed[KEYS], whole[KEYS], check_categorical=False)
    before = resumed["step"] <= STOPPED
    assert 0 < before.sum() < len(resumed)
    pd.testing.assert_frame_equal(resumed[before], whole[before], check_categorical=False)
    for name in ("train_loss", "valid_loss", "mean", "total"):  # PyTorch's versions round apart
        np.testing.assert_allclose(resumed[name], whole[name], rtol=1e-3, atol=1e-4)


def test_claims_are_those_of_before_to_the_letter() -> None:
    claims = bs.claims(FOLDER / "runs")
    recorded = pd.read_csv(FOLDER / "claims.csv", keep_default_na=False, na_values=[""])
    # Sums over units were float32 then.
    pd.testing.assert_frame_equal(
        claims, recorded, check_dtype=False, check_index_type=False, rtol=1e-6, atol=0
    )
    assert claims_markdown(claims) == (FOLDER / "claims.md").read_text(encoding="utf-8")
    said = "\n".join(sentences(claims)) + "\n"
    assert said == (FOLDER / "sentences.txt").read_text(encoding="utf-8")


CONFIGS = json.loads((FOLDER / "configs.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("command", CONFIGS)
def test_commands_resume_what_they_recorded(command: str, tmp_path: Path) -> None:
    """So that ``--resume`` finds the runs of before, in their folders."""
    name, *smoke = command.split()
    # Since then the last layer of the convolutional networks starts smaller by default.
    convolutional = {"last_init": None} if name in ("cifar11", "cifar18", "imagenet") else {}
    experiment = EXPERIMENTS[name].load()(smoke=bool(smoke), **convolutional)
    configs = experiment.configs()
    *recorded, folders = CONFIGS[command]
    for old, new in zip(recorded, (configs[0], configs[-1]), strict=True):
        assert list(asdict(new))[: len(old)] == list(old)
        run = tmp_path / f"{new.activation}-{new.seed}"
        run.mkdir(exist_ok=True)
        stored = {"biasshift_run": LAYOUT, "config": old}
        (run / "config.json").write_text(json.dumps(stored), encoding="utf-8")
        require_same_config(run, new)  # what --resume compares
    assert [experiment.folder(c).as_posix() for c in (configs[0], configs[-1])] == folders[
        "folders"
    ]


def test_a_pickled_model_with_hooks_of_before_runs() -> None:
    model = pickle.loads((FOLDER / "hooked_model.pickle").read_bytes())
    assert model(torch.ones(2, 3)).shape == (2, 2)
