"""Tables as `read_runs` returns them, with the answers put in by hand."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import pandas as pd

DAMPINGS = (1e-4, 1e-2, 1.0)
EXAM = {
    "inflation": 2.0, "k": 0.5, "smaller_share": 0.5, "gap_degrees": 60.0, "enough": 0.75, "effective_samples": 3000.0, "mean_in_abs": 0.3,
}  # fmt: skip
ALONG = {"incoming": 0.3, "coupling": 0.5, "gap": 60.0, "smaller": 0.5, "samples": 300.0}
LAST, EPOCHS = 100, 4  # steps and epochs of a run


@dataclass
class Planted:
    """One run: layers "0", and those `fed` by an activation, "2", "4"; activations "1" and "3" of
    three units each, 100 steps.
    """

    activation: str
    seed: int
    unit_mean: float = 0.3
    spread: float = 1.0  # of the units around their median
    shares: tuple[float, float, float] = (
        0.6,
        0.3,
        0.1,
    )  # own, incoming, second order, behind the first layer
    train_loss: float = 0.5
    equal_step: int | None = 50  # None: never examined
    exam: Callable[[int, float], dict[str, float]] = field(
        default=lambda probe, damping: {}
    )  # overrides of EXAM
    exam_at: Callable[[str], dict[str, float]] = field(
        default=lambda layer: {}
    )  # the same, for a layer
    fed: tuple[str, ...] = ("2", "4")
    finished: bool = True
    every: int = 50  # steps between measurements
    means: Callable[[int], float] = lambda step: 9.0  # the median before the last step
    rate: float | None = (
        None  # the loss falls exponentially from 2.3, by so much a step, in ten scores
    )
    step_seconds: float | None = None
    along: Callable[[int, str], dict[str, float] | None] = lambda step, layer: (
        None
    )  # of ALONG, for a step and a layer behind the first
    settings: dict[str, object] = field(default_factory=dict)

    def rows(self) -> pd.DataFrame:
        last = LAST if self.finished else LAST // 2
        rows = [
            {"step": 0, "layer": layer, "unit": -1, "inputs": 3.0} for layer in ("0", *self.fed)
        ]
        for step in range(0, last + 1, self.every):
            loss = self.train_loss if step == last else 2.3
            if self.rate is None:
                rows.append(self._score(step, loss))
            for layer in ("1", "3"):
                means = [self.unit_mean + self.spread * offset for offset in (-1, 0, 1)]
                means = means if step == last else [self.means(step)] * 3
                rows += [
                    {"step": step, "layer": layer, "unit": unit, "mean": mean}
                    for unit, mean in enumerate(means)
                ]
            for layer in ("0", *self.fed):
                own, incoming, second = self.shares if layer != "0" else (5.0, 0.0, 0.0)
                for unit, sign in enumerate((1, -1)):
                    parts = {
                        "own": sign * own,
                        "incoming": -sign * incoming,
                        "second_order": sign * second,
                    }
                    rows.append({"step": step, "layer": layer, "unit": unit, **parts})
            for layer, mean in (("2", 0.2), ("4", 0.4)) if self.along(step, "2") is None else ():
                rows.append(
                    {
                        "step": step,
                        "layer": layer,
                        "unit": -1,
                        "mean_in_abs": mean,
                        "cos_gradient": 0.5,
                    }
                )
            rows += self._measured(step)
        if self.rate is not None:
            rows += [
                self._score(step, 2.3 * math.exp(-self.rate * step))
                for step in range(0, last + 1, 10)
            ]
        if self.equal_step is not None:
            for layer, off in zip(
                self.fed, (-1, 1, 0), strict=False
            ):  # the layers lie on either side of the planted number
                for probe in (0, 1):
                    for damping in DAMPINGS:
                        exam = EXAM | self.exam_at(layer) | self.exam(probe, damping)
                        exam["k"] += off
                        columns = {f"exam_{name}": value for name, value in exam.items()}
                        keys = {
                            "step": self.equal_step,
                            "layer": layer,
                            "unit": -1,
                            "exam_probe": probe,
                            "exam_damping": damping,
                        }
                        rows.append(keys | columns)
        settings = {"experiment": "planted", "epochs": EPOCHS, "lr": 0.1} | self.settings
        name = "-".join([self.activation, *map(str, self.settings.values()), str(self.seed)])
        return pd.DataFrame(rows).assign(
            run=name, activation=self.activation, seed=self.seed, **settings
        )

    def _score(self, step: int, loss: float) -> dict[str, object]:
        seconds = {} if self.step_seconds is None else {"seconds": step * self.step_seconds}
        whole = {"step": step, "layer": "", "unit": -1, "epoch": step * EPOCHS / LAST}
        return {**whole, "train_loss": loss, "valid_loss": 2 * loss, **seconds}

    def _measured(self, step: int) -> list[dict[str, object]]:
        """Two units a layer; of the share for which the corrected mean is smaller, one or both."""
        rows = []
        for layer in self.fed:
            if (planted := self.along(step, layer)) is None:
                continue
            at = ALONG | planted
            for unit in (0, 1):
                norm = 0.5 if unit < 2 * at["smaller"] else 2.0
                numbers = {
                    "coupling": at["coupling"],
                    "effective_samples": at["samples"],
                    "norm_mean_p": 1.0,
                    "norm_corrected_mean": norm,
                }
                rows.append({"step": step, "layer": layer, "unit": unit, **numbers})
            whole = {
                "mean_in_abs": at["incoming"],
                "cos_gradient": math.cos(math.radians(at["gap"])),
            }
            rows.append({"step": step, "layer": layer, "unit": -1, **whole})
        return rows


def table(runs: Iterable[Planted]) -> pd.DataFrame:
    """All runs under each other."""
    return pd.concat([run.rows() for run in runs], ignore_index=True)
