"""What a measurement costs, known when the first batch has gone forward: passes, samples, bytes."""

from collections.abc import Mapping
from dataclasses import dataclass

from biasshift.fisher.packed import MOST_SAMPLES
from biasshift.measure.accumulators import LayerBatch, LayerState
from biasshift.measure.options import Options
from biasshift.progress import Progress

MANY = 64  # backward passes of a batch, from which on drawn labels are suggested
DRAWS = 8  # that are suggested
EXACT, DRAWN = 'labels="expected"', f'labels="sampled", draws={DRAWS}'


@dataclass(frozen=True)
class Cost:
    """What a measurement takes. Of a probe whose length is unknown it is the cost of a batch.

    Args:
        batches: how many the probe has; None where only reading it tells.
        passes_per_batch: backward passes, those of the gradient not among them.
        at_once: how many of them go together.
        samples: by layer, the terms that a unit's matrix is the sum of: examples × positions, or
            where weights are shared examples × passes.
        bytes: by layer, what is held at the end, as blocks or as samples; 0 where the samples do
            not fit, and are read again.
        exact: whether the passes are those of exact labels, ``labels="expected"``.
    """

    batches: int | None
    passes_per_batch: int
    at_once: int
    samples: dict[str, int]
    bytes: dict[str, int]
    exact: bool = False

    @classmethod
    def of(
        cls,
        layers: list[LayerBatch],
        states: Mapping[str, LayerState],
        options: Options,
        batches: int | None,
        examples: int | None,
        passes: int,
        at_once: int,
    ) -> "Cost":
        """Returns the cost, from the first batch and how its layers are stored.

        Args:
            states: by layer, where its sums go.
            examples: of all batches; by default as many in each as in the first.
            passes: backward passes of a batch.
            at_once: how many of them go together.
        """
        share = float(batches or 1) if examples is None else examples / layers[0].examples
        samples, held = {}, {}
        for layer in layers:
            per_batch = layer.examples * passes if layer.shares_weights else layer.rows
            samples[layer.name] = round(per_batch * share)
            additions = (
                -(-passes // at_once) if layer.shares_weights else -(-layer.rows // MOST_SAMPLES)
            )
            held[layer.name] = states[layer.name].held_bytes(
                layer, samples[layer.name], share, additions * (batches or 2) > 1
            )
        exact = options.labels == "expected"
        return cls(batches, passes, min(at_once, passes), samples, held, exact)

    @property
    def passes(self) -> int | None:
        """The backward passes of all batches; None where the probe's length is unknown."""
        return None if self.batches is None else self.batches * self.passes_per_batch

    def __str__(self) -> str:
        """The cost in a sentence, and what would be cheaper."""
        if self.batches is None:
            count = f"{_counted(self.passes_per_batch, 'backward pass')} a batch"
        else:
            count = _counted(self.batches * self.passes_per_batch, "backward pass")
            count += f" of {_counted(self.batches, 'batch')}" if self.batches > 1 else ""
        together = f", {self.at_once} at once" if self.at_once > 1 else ""
        most = max(self.samples.values(), default=0)
        text = (
            f"{count}{together}; up to {_counted(most, 'sample')} in each of "
            f"{_counted(len(self.samples), 'layer')}, which take {_size(sum(self.bytes.values()))}."
        )
        if self.exact and self.passes_per_batch >= MANY:
            text += (
                f" {DRAWN} takes {DRAWS} passes a batch in place of {self.passes_per_batch:,}; "
                "UnitFisher.standard_error then tells the error of drawing."
            )
        return text


class Watch:
    """Reports the backward passes of a measurement, and before the first what all of it costs.

    Args:
        progress: what is reported to.

    Attributes:
        batches: how many the probe has; None where only reading it tells.
        examples: of all of them, as far as known.
    """

    def __init__(self, progress: Progress):
        self.progress = progress
        self.batches: int | None = None
        self.examples: int | None = None
        self._is_begun = False

    def begin(
        self,
        layers: list[LayerBatch],
        states: Mapping[str, LayerState],
        options: Options,
        passes: int,
        at_once: int,
    ) -> None:
        """Reports the cost, at the first batch; see `Cost.of`."""
        if not self._is_begun and self.progress:
            self._is_begun = True
            cost = Cost.of(layers, states, options, self.batches, self.examples, passes, at_once)
            self.progress.begin(cost.passes, "passes", str(cost))


def _counted(count: int, what: str) -> str:
    """A number and what it counts.

    >>> _counted(1, "batch"), _counted(2000, "backward pass")
    ('1 batch', '2,000 backward passes')
    """
    plural = f"{what}es" if what.endswith(("s", "h")) else f"{what}s"
    return f"{count:,} {what if count == 1 else plural}"


def _size(count: int) -> str:
    """Bytes to read.

    >>> _size(3 * 2**30), _size(5000)
    ('3.0 GiB', '4.9 KiB')
    """
    size, units = float(count), ["bytes", "KiB", "MiB", "GiB"]
    while size >= 1024 and len(units) > 1:
        size /= 1024
        units.pop(0)
    return f"{size:.0f} {units[0]}" if units[0] == "bytes" else f"{size:.1f} {units[0]}"
