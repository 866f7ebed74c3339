"""Presets: other defaults by one option, and what the options of small convolutional runs allow."""

import math

import pytest

from biasshift.cli.parser import EXPERIMENTS, parse
from biasshift.experiments.cifar11 import Cifar11
from biasshift.experiments.cifar18 import Cifar18
from biasshift.experiments.experiment import Experiment
from biasshift.experiments.imagenet import Imagenet
from biasshift.experiments.mnist import Mnist
from biasshift.experiments.sweep import Sweep

WITH_PRESETS = [name for name in EXPERIMENTS if EXPERIMENTS[name].load().presets]


@pytest.mark.parametrize("name", WITH_PRESETS)
def test_a_preset_replaces_defaults_and_options_override_it(name):
    kind = EXPERIMENTS[name].load()
    preset = parse(["train", name, "--preset", "cpu"])
    assert preset == kind.of_preset("cpu") == parse(["train", name, "--preset=cpu"])
    for option, value in kind.presets["cpu"].items():
        assert vars(preset)[option] == value
    assert parse(["train", name, "--preset", "cpu", "--seeds", "1"]) == kind.of_preset(
        "cpu", seeds=1
    )
    assert parse(["train", name, "--preset", "paper"]) == parse(["train", name]) == kind()


def test_every_option_of_a_preset_may_be_overridden():
    mnist = Mnist.of_preset("cpu", epochs=1, seeds=1, activation=("elu",))
    assert len(mnist.configs()) == 1


def test_there_are_presets():
    assert {"cifar11", "cifar18", "imagenet", "mnist"} <= {*WITH_PRESETS}


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Cifar11(preset="cpu").configs(), r"call Cifar11\.of_preset\('cpu'\)"),
        (lambda: Sweep(preset="cpu").configs(), "--preset of sweep must be paper, got 'cpu'"),
        (lambda: Mnist.of_preset("gpu"), "--preset of mnist must be one of paper, cpu, got 'gpu'"),
    ],
)
def test_a_preset_that_changes_nothing_is_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize(
    ("experiment", "words"),
    [
        (Cifar11(dropout=-0.1), r"--dropout must be in \[0, 2\)"),
        (Cifar11(dropout=2.0), r"--dropout must be in \[0, 2\), so that rates stay below 1"),
        (Cifar18(dropout=1.4), r"--dropout must be in \[0, 1\.333\)"),
        (Cifar11(last_init=-1.0), "--last-init must be a number of at least 0, got -1"),
        (Cifar18(last_init=math.nan), "--last-init must be a number of at least 0, got nan"),
    ],
)
def test_options_that_networks_cannot_take_are_refused_before_a_run_begins(
    experiment: Experiment, words
):
    with pytest.raises(ValueError, match=words):
        experiment.configs()


@pytest.mark.parametrize(
    ("crop", "stride", "fits"), [(96, 2, False), (97, 2, True), (112, 4, False)]
)
def test_crops_leave_enough_for_the_pyramid(crop, stride, fits):
    imagenet = Imagenet(crop=crop, stride=stride)
    if fits:
        imagenet.check()
    else:
        with pytest.raises(ValueError, match=f"at --stride {stride}, got {crop}"):
            imagenet.check()


def test_the_last_layer_may_start_as_the_others():
    assert Cifar11(last_init=None, seeds=1).configs()[0].last_init is None
