"""From recorded runs to numbers, and from numbers to verdicts on the claims of the theory.

`biasshift.analysis.verdicts.claims` does all of it. A table of runs becomes one
number per run and quantity (`quantities`, `learning_curves`, `layer_points`). Each file of `claims`
makes paired effects of them, and `statistics` turns effects into verdicts.
"""

from biasshift.analysis.formatting import (
    claims_markdown,
    footnote,
    reading_table,
    sentences,
    sweep_table,
)
from biasshift.analysis.quantities import (
    SAMPLES_PER_INPUT,
    enough_samples,
    fed_layers,
    layer_inputs,
    per_run,
)

__all__ = [
    "SAMPLES_PER_INPUT",
    "claims_markdown",
    "enough_samples",
    "fed_layers",
    "footnote",
    "layer_inputs",
    "per_run",
    "reading_table",
    "sentences",
    "sweep_table",
]
