"""How many samples are enough, and the warning where they are not."""

import warnings
from collections.abc import Mapping
from typing import Any

import torch

# Effective samples per incoming activation, below which a unit's coupling and gap say little.
SAMPLES_PER_INPUT = 10
SHOWN = 3  # layers that a warning names
# The share of copies in a probe below which they change no number that matters.
MOST_COPIES = 0.01


class FewSamplesWarning(UserWarning):
    """The warning that the samples are too few for inverse quantities to carry a claim.

    Where that is known and stated, ``warnings.simplefilter("ignore", bs.FewSamplesWarning)``
    silences it.
    """


def warn_of_few_samples(
    fishers: Mapping[str, Any], examples: int = 0, copies: int = 0, stacklevel: int = 2
) -> None:
    """Warns once of all layers whose typical unit has too few effective samples.

    These are layers whose median unit, of those that are alive and have a bias with influence, has
    less than ten effective samples per input. Single units below that show in
    `UnitFisher.reliable` alone.

    Args:
        fishers: the measured layers, by name.
        examples: in the probe; 0 where copies were not counted.
        copies: how many of them are the same as an earlier one, bit by bit.
        stacklevel: as in ``warnings.warn``, counted from the caller.
    """
    different = 1 - copies / examples if examples else 1.0
    few = {name: why for name, f in fishers.items() if (why := _shortage(f, different)) is not None}
    said = []
    if few:
        said.append("Too few effective samples for s, k and coupling.")
        said += [f"Layer '{name}' has {why}." for name, why in list(few.items())[:SHOWN]]
    if len(few) > SHOWN:
        said.append(f"And {len(few) - SHOWN} more layers have too few.")
    if 1 - different > MOST_COPIES:
        said.append("" if few else "Too few different examples.")
        said.append(f"Of {examples} examples {copies} are copies, which effective_samples counts.")
    if said:
        said.append("Use more examples, or only the units in fisher.reliable.")
        warnings.warn(" ".join(filter(None, said)), FewSamplesWarning, stacklevel=stacklevel + 1)


def _shortage(fisher: Any, different: float) -> str | None:
    """The numbers of a layer with too few effective samples; None for any other layer.

    Args:
        different: the share of the examples that are no copies of others.
    """
    sums = fisher.sums
    counted = different * sums.effective_samples[~(sums.dead | sums.bias_inert)]
    if not len(counted):
        return None
    units, inputs = sums.first.shape
    median = counted.median()
    below = units - (counted >= SAMPLES_PER_INPUT * inputs).sum()
    median, below = torch.stack([median, below.to(median)]).tolist()  # waits for the device once
    if median >= SAMPLES_PER_INPUT * inputs:
        return None
    return (
        f"{median:.0f} (median of its units) for {inputs} inputs, and {below:.0f} of {units} "
        "units are unreliable"
    )
