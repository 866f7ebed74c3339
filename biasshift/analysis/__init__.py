"""From recorded runs to numbers, and from numbers to verdicts on the claims of the theory."""

from biasshift.analysis.formatting import claims_markdown, footnote, sentences
from biasshift.analysis.per_run import SAMPLES_PER_INPUT, enough_samples, fed_layers, layer_inputs, per_run, reading_table, sweep_table

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
