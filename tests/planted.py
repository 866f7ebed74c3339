"""Tables of runs as `read_runs` returns them, with numbers put in by hand."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import product

import pandas as pd

DAMPINGS = (1e-4, 1e-2, 1.0)
EXAM = {
    "inflation": 2.0,
    "k": 0.5,
    "smaller_share": 0.5,
    "gap_degrees": 60.0,
    "enough": 0.75,
    "effective_samples": 3000.0,
    "mean_in_abs": 0.3,
}
ALONG = {"incoming": 0.3, "coupling": 0.5, "gap": 60.0, "smaller": 0.5, "samples": 300.0}
LAST, EPOCHS = 100, 4  # steps and epochs of a run


@dataclass
class Planted:
    """One run of 100 steps.

    It has the layers "0" and, `fed` by an activation, "2" and "4". The activations "1" and "3" have
    three units each.
    """

    activation: str
    seed: int
    unit_mean: float = 0.3
    spread: float = 1.0  # of the units around their median
    # own, incoming and second order, behind the first layer
    shares: tuple[float, float, float] = (0.6, 0.3, 0.1)
    train_loss: float = 0.5
    equal_step: int | None = 50  # None: never examined
    # overrides of EXAM for a probe and a damping, and for a layer
    exam: Callable[[int, float], dict[str, float]] = lambda probe, damping: {}
    exam_at: Callable[[str], dict[str, float]] = lambda layer: {}
    fed: tuple[str, ...] = ("2", "4")
    finished: bool = True
    every: int = 50  # steps between measurements
    means: Callable[[int], float] = lambda step: 9.0  # the median before the last step
    # the loss falls exponentially from 2.3, by so much a step, in ten scores
    rate: float | None = None
    step_seconds: float | None = None
    # overrides of ALONG for a step and a layer behind the first
    along: Callable[[int, str], dict[str, float] | None] = lambda step, layer: None
    settings: dict[str, object] = field(default_factory=dict)

    def rows(self) -> pd.DataFrame:
        last = LAST if self.finished else LAST // 2
        layers = ("0", *self.fed)
        rows = [{"step": 0, "layer": layer, "unit": -1, "inputs": 3.0} for layer in layers]
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
            for layer in layers:
                own, incoming, second = self.shares if layer != "0" else (5.0, 0.0, 0.0)
                for unit, sign in enumerate((1, -1)):
                    parts = {"own": sign * own, "incoming": -sign * incoming}
                    parts["second_order"] = sign * second
                    rows.append({"step": step, "layer": layer, "unit": unit, **parts})
            for layer, mean in (("2", 0.2), ("4", 0.4)) if self.along(step, "2") is None else ():
                gap = {"mean_in_abs": mean, "cos_gradient": 0.5}
                rows.append({"step": step, "layer": layer, "unit": -1, **gap})
            rows += self._measured(step)
        if self.rate is not None:
            for step in range(0, last + 1, 10):
                rows.append(self._score(step, 2.3 * math.exp(-self.rate * step)))
        if self.equal_step is not None:
            rows += self._examined(self.equal_step)
        settings = {"experiment": "planted", "epochs": EPOCHS, "lr": 0.1} | self.settings
        name = "-".join([self.activation, *map(str, self.settings.values()), str(self.seed)])
        return pd.DataFrame(rows).assign(
            run=name, activation=self.activation, seed=self.seed, **settings
        )

    def _examined(self, step: int) -> list[dict[str, object]]:
        """A row for every layer, probe and damping; of k the layers have EXAM's and 1 around it."""
        rows = []
        for layer, offset in zip(self.fed, (-1, 1, 0), strict=False):
            for probe, damping in product((0, 1), DAMPINGS):
                exam = EXAM | self.exam_at(layer) | self.exam(probe, damping)
                exam["k"] += offset
                columns = {f"exam_{name}": value for name, value in exam.items()}
                keys = {"exam_probe": probe, "exam_damping": damping}
                rows.append({"step": step, "layer": layer, "unit": -1, **keys, **columns})
        return rows

    def _score(self, step: int, loss: float) -> dict[str, object]:
        seconds = {} if self.step_seconds is None else {"seconds": step * self.step_seconds}
        whole = {"step": step, "layer": "", "unit": -1, "epoch": step * EPOCHS / LAST}
        return {**whole, "train_loss": loss, "valid_loss": 2 * loss, **seconds}

    def _measured(self, step: int) -> list[dict[str, object]]:
        """Two units a layer; the corrected mean is smaller for one, both or none, by its share."""
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
            cosine = math.cos(math.radians(at["gap"]))
            whole = {"mean_in_abs": at["incoming"], "cos_gradient": cosine}
            rows.append({"step": step, "layer": layer, "unit": -1, **whole})
        return rows


def table(runs: Iterable[Planted]) -> pd.DataFrame:
    """All runs under each other."""
    return pd.concat([run.rows() for run in runs], ignore_index=True)


def scored(experiment, settings, columns, at=(0, 50, 100), **more) -> pd.DataFrame:
    """Whole-network rows of runs; each column is a function of (step, setting)."""
    rows = []
    for setting in settings:
        run = {"run": "-".join(map(str, setting.values())), "experiment": experiment, "epochs": 4}
        run |= {"layer": "", "unit": -1, **more, **setting}
        for step in at:
            scores = {column: score(step, setting) for column, score in columns.items()}
            rows.append({**run, "step": step, "epoch": step / 25, **scores})
    return pd.DataFrame(rows)


LEVEL = {"elu": 0.1, "srelu": 0.2, "lrelu": 0.3, "relu": 0.4}


def cifar(steps=(0, 60, 120), normed=(False,), names=tuple(LEVEL), **more) -> pd.DataFrame:
    """Test errors that fall to the activation's level + seed/100, and losses ten times that.

    With batch norm the errors fall to half of it.
    """
    keys = ("activation", "seed", "batch_norm")
    settings = [dict(zip(keys, values, strict=True)) for values in product(names, (0, 1), normed)]

    def error(step, s):
        level = (LEVEL[s["activation"]] + s["seed"] / 100) * (0.5 if s["batch_norm"] else 1.0)
        return level + 0.5 - 0.5 * step / steps[-1]

    def loss(step, s):
        return 10 * error(step, s) if step else math.nan

    columns = {"test_error": error, "train_loss": loss}
    more = {"dataset": "cifar100", "steps": steps[-1]} | more
    return scored("cifar11", settings, columns, steps, **more)


def moving(name, seed, spread) -> pd.DataFrame:
    """Two hidden layers of three units, far away at step 0.

    Over steps 1, 2, 3, unit u of layer l moves by l·spread·(u+1) up and down.
    """
    rows = [{"layer": "", "unit": -1, "step": step, "epoch": float(step)} for step in range(4)]
    for layer, unit, step in product((1, 3), range(3), range(4)):
        mean = 100.0 if step == 0 else (step - 2) * layer * spread * (unit + 1)
        rows.append({"layer": str(layer), "unit": unit, "step": step, "mean": mean})
    return pd.DataFrame(rows).assign(
        run=f"{name}-{seed}", activation=name, seed=seed, experiment="mnist", epochs=3
    )


def swept(rates=(0.01, 0.1)) -> pd.DataFrame:
    """Losses that fall exponentially, at the learning rate.

    The constant makes plain training half as fast, but not centered training.
    """
    runs = []
    updates, networks = ("plain", "centered"), (("elu", 0.0), ("relu", 0.0), ("elu", 0.5))
    for update, (name, constant), lr, seed in product(updates, networks, rates, range(2)):
        settings = {"update": update, "constant": constant, "lr": lr, "experiment": "sweep"}
        rate = lr * (0.5 if constant and update == "plain" else 1)
        runs.append(Planted(name, seed, rate=rate, settings=settings))
    return table(runs)
