"""Words → options. Of all commands, only the one that is meant is imported: help takes no PyTorch.

Options are typed dataclasses, from which tyro makes the parser and the help. Those of ``demo``,
``train`` and ``sweep`` are the experiments themselves; the others are in `biasshift.cli.commands`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from itertools import pairwise
from typing import Annotated, Any, NamedTuple, Union

import tyro


class Command(NamedTuple):
    """A command before it is imported.

    Args:
        options: Its dataclass, as ``module:Class`` below `biasshift`.
        help: What the help says of it: the docstring of that class.
    """

    options: str
    help: str

    def load(self) -> type:
        """Imports the dataclass of its options, and all that this takes."""
        module, _, name = self.options.partition(":")
        return getattr(import_module(f"biasshift.{module}"), name)


DEMO = Command(
    "experiments.demo:Demo",
    "Compare ELU, ReLU, LReLU and SReLU networks, or others, on handwritten digits. Needs no "
    "download.",
)
EXPERIMENTS = {
    "mnist": Command(
        "experiments.mnist:Mnist",
        "Train the paper's MNIST networks, instrumented, and show what the runs say.",
    ),
    "autoencoder": Command(
        "experiments.autoencoder:Autoencoder",
        "Train the paper's MNIST autoencoders, at four learning rates.",
    ),
    "cifar11": Command(
        "experiments.cifar11:Cifar11",
        "Train the paper's 11-layer networks on CIFAR-100, instrumented.",
    ),
    "cifar18": Command(
        "experiments.cifar18:Cifar18",
        "Train the paper's 18-layer network on CIFAR-10 or CIFAR-100, with its fine-tuning.",
    ),
    "imagenet": Command(
        "experiments.imagenet:Imagenet",
        "Train the paper's 15-layer network on ImageNet or any folder of images, instrumented.",
    ),
}
SWEEP = Command(
    "experiments.sweep:Sweep",
    "Train activations × updates × learning rates × seeds on MNIST, for the causal claims; "
    "resumable, and in parts.",
)
READERS = {
    "figure": Command(
        "cli.commands:Figure",
        "Draw a figure of the paper or of the theory, and print its numbers beside the paper's.",
    ),
    "claims": Command(
        "cli.commands:Claims",
        "Judge which claims of the paper the runs support, in a table with caveats.",
    ),
    "runs": Command(
        "cli.commands:Runs",
        "List run folders with their state, their last step and their last numbers.",
    ),
    "report": Command(
        "cli.commands:Report", "Make one self-contained page for looking at runs."
    ),
}  # fmt: skip
TRAIN_HELP = "Train the networks of one of the paper's experiments, instrumented."


@dataclass(frozen=True)
class _Unread:
    """Stands for the options of a command that is not meant."""


def parse(words: Sequence[str]) -> Any:
    """Returns the options of a command line: an experiment, or a dataclass of `cli.commands`.

    Raises:
        ValueError: Both --replace and --resume are given.
        SystemExit: A word is wrong, with status 2, or the help was asked for.

    >>> parse(["runs", "runs/mnist"])
    Runs(runs=(PosixPath('runs/mnist'),), json=False)
    """
    # Here: where one of them is the default, the parsed options no longer tell.
    if {"--replace", "--resume"} <= {*words}:
        from biasshift.experiments.experiment import REPLACE_OR_RESUME

        raise ValueError(REPLACE_OR_RESUME)
    names = [word for word in words if not word.startswith("-")]
    preset = _preset(words)
    arms = {
        **_arms({"demo": DEMO}, names, preset),
        "train": _arm("train", _one_of(_arms(EXPERIMENTS, names[1:], preset)), TRAIN_HELP),
        **_arms({"sweep": SWEEP, **READERS}, names, preset),
    }
    return tyro.cli(
        _one_of(arms),
        prog="biasshift",
        description="Measure, test and exploit bias shift and the unit natural gradient.",
        args=words,
    )


def _preset(words: Sequence[str]) -> str:
    """The value of --preset, which says what the other defaults are; tyro checks it later."""
    for word, value in pairwise([*words, ""]):
        if word == "--preset":
            return value
        if word.startswith("--preset="):
            return word.partition("=")[2]
    return ""


def _arms(commands: Mapping[str, Command], names: Sequence[str], preset: str) -> dict[str, Any]:
    arms = {}
    for name, command in commands.items():
        meant = names[:1] == [name]
        options = command.load() if meant else _Unread
        defaults = {}
        if meant and preset in getattr(options, "presets", ()):
            defaults["default"] = options.of_preset(preset)  # pyright: ignore[reportAttributeAccessIssue]
        arms[name] = _arm(name, options, command.help, **defaults)
    return arms


def _arm(name: str, options: Any, help: str, **defaults: Any) -> Any:
    return Annotated[options, tyro.conf.subcommand(name=name, description=help, **defaults)]


def _one_of(arms: Mapping[str, Any]) -> Any:
    return Union[tuple(arms.values())]  # noqa: UP007  made of a tuple
