"""What a training step costs with every update, against SGD and the K-FAC of two peers.

A step is forward, backward, update, with the mean cross-entropy; ``every 10`` updates and factors
the curvature on every tenth step only. The learning rate is 0 while the clock runs: all methods
work on the same network. Each run of a method has a run of SGD right before it, on one thread; the
cost is the median ratio of these pairs. What each one's first step would be is compared in float64
with `formulas`, at the labels that the method draws. The damping is each method's own: relative to
the mean diagonal here, shared out between the factors in the peers.

``python -m benchmarks.updates [words of a method …]`` measures those on the CPU and prints every
ratio with its goal; without words it measures all and writes ``results/updates.csv``.
"""

import copy
import csv
import os
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from biasshift.nets import mlp
from biasshift.optim import UnitNaturalGradient
from biasshift.training.process_pool import one_thread

from .cnn import network as cnn
from .formulas import LayerBatch, kfac_step, layer_batches, unit_step
from .harness import (
    RESULTS,
    SHARED,
    clock,
    commit,
    device_name,
    median_ratio,
    summary,
    synchronize,
    version,
)
from .updates_kfac import asdl_loop, curvlinops_loop

TITLE = (
    "A training step: MLP 196-128×8-10, batch 64; wide MLP 784-512×4-10, batch 256; CNN "
    "3-32-32-32, 3×3, 16×16 images, batch 32"
)
STEPS = 10  # of a timed run with `every 10`: one update of the curvature
SHORT = 2  # of any other: the shorter a run, the nearer are both of a pair
PATIENCE = 10.0  # seconds for all runs of one method on one network, of which there are 3 or more
DAMPING, DECAY = 1e-3, 0.95
HEADER: dict = {}

Step = Callable[[Tensor, Tensor], None]
Make = Callable[[nn.Module, int, float], Step]  # model, every, rate
Expected = Callable[[LayerBatch], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Update:
    """One method, and what its first step must be."""

    make: Make
    expected: Expected  # its first update of a layer
    labels: Callable[[Tensor, Tensor], Tensor]  # those that its errors are at


# -- labels: of the logits and the data's own ------------------------------------------------------


def drawn(logits: Tensor, y: Tensor) -> Tensor:
    """Draws labels as all methods here do, from a fresh generator."""
    generator = torch.Generator().manual_seed(0)
    return torch.multinomial(logits.softmax(-1), 1, True, generator=generator)[:, 0]


def drawn_in_single(logits: Tensor, y: Tensor) -> Tensor:
    """Draws labels from float32 probabilities."""
    return drawn(logits.float(), y)


def given(logits: Tensor, y: Tensor) -> Tensor:
    """Returns the data's own labels."""
    return y


# -- the methods -----------------------------------------------------------------------------------


def loop(model: nn.Module, optimizer: torch.optim.Optimizer) -> Step:
    """Returns a training step as anybody would write it."""

    def step(x: Tensor, y: Tensor) -> None:
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def sgd() -> Update:
    """Returns plain gradient descent."""

    def make(model: nn.Module, every: int, rate: float) -> Step:
        return loop(model, torch.optim.SGD(model.parameters(), lr=rate))

    return Update(make, lambda layer: (layer.g, layer.g0), given)


def ours(center: str, scale: str, labels: str = "sampled") -> Update:
    """Returns an update of the package."""

    def make(model: nn.Module, every: int, rate: float) -> Step:
        options = {"damping": DAMPING, "labels": labels, "update_every": every, "decay": DECAY}
        return loop(model, UnitNaturalGradient(model, rate, center, scale, **options))

    return Update(
        make,
        lambda layer: unit_step(layer, center, scale, DAMPING),
        drawn_in_single if labels == "sampled" else given,
    )


def asdl() -> Update:
    """Returns ASDL's K-FAC."""

    def make(model: nn.Module, every: int, rate: float) -> Step:
        return asdl_loop(model, every, rate, DAMPING, DECAY)

    return Update(make, lambda layer: kfac_step(layer, DAMPING, joint=False, kept=1 - DECAY), drawn)


def curvlinops() -> Update:
    """Returns curvlinops' K-FAC."""

    def make(model: nn.Module, every: int, rate: float) -> Step:
        return curvlinops_loop(model, every, rate, DAMPING)

    return Update(make, lambda layer: kfac_step(layer, DAMPING, joint=True), drawn)


UPDATES = {  # name → update, steps between two updates of the curvature
    "SGD": (sgd(), 1),
    "centering trick (p, none)": (ours("p", "none"), 1),
    "centered (q, none), empirical": (ours("q", "none", "empirical"), 1),
    "centered (q, none), sampled": (ours("q", "none"), 1),
    "centered (q, none), sampled, every 10": (ours("q", "none"), 10),
    "quasi-diagonal (q, diagonal)": (ours("q", "diagonal"), 1),
    "unit K-FAC (p, full)": (ours("p", "full"), 1),
    "unit K-FAC (p, full), every 10": (ours("p", "full"), 10),
    "full (q, full)": (ours("q", "full"), 1),
    "full (q, full), every 10": (ours("q", "full"), 10),
    "K-FAC of ASDL": (asdl(), 1),
    "K-FAC of ASDL, every 10": (asdl(), 10),
    "K-FAC of curvlinops": (curvlinops(), 1),
    "K-FAC of curvlinops, every 10": (curvlinops(), 10),
}
NETWORKS = ("MLP", "wide MLP", "CNN")
GOALS = {  # in steps of SGD on the CPU, network by network
    "centering trick (p, none)": (1.25, 1.15, 1.25),
    "centered (q, none), empirical": (1.6, 1.4, 1.6),
    "centered (q, none), sampled": (1.9, 1.75, 2.0),
    "quasi-diagonal (q, diagonal)": (2.3, 2.0, 2.3),
    "full (q, full)": (80.0, None, 6.0),
    "full (q, full), every 10": (12.0, None, 1.8),
}
# A unit of the wide network has up to 785² numbers: 3 GB for the three layers, 8 s to factor.
TOO_LARGE = {("wide MLP", name) for name in ("full (q, full)", "full (q, full), every 10")}


# -- the question ----------------------------------------------------------------------------------


def problem(network: str, small: bool) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    """Returns a network and the batches of one timed run."""
    torch.manual_seed(0)
    if network == "CNN":
        shape = (2, 3, 4, 4) if small else (32, 3, 16, 16)
        model = cnn(4 if small else 32)
    elif small:
        shape = (4, 8)
        model = mlp(8, 6, 2)
    else:
        shape = (64, 196) if network == "MLP" else (256, 784)
        model = mlp(shape[1], *((128, 8) if network == "MLP" else (512, 4)))
    return model, [(torch.rand(shape), torch.randint(10, shape[:1])) for _ in range(STEPS)]


def error(update: Update, every: int, model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Returns the relative error of the first step of all parameters together."""
    layers = layer_batches(model, x, y, update.labels(model(x).detach(), y))
    expected = nn.utils.parameters_to_vector(
        [part.flatten() for layer in layers for part in update.expected(layer)]
    )
    before = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    update.make(model, every, 1.0)(x, y)
    moved = before - nn.utils.parameters_to_vector(model.parameters()).detach()
    return ((moved - expected).norm() / expected.norm()).item()


def costs(
    network: str,
    device: str,
    repeats: int,
    small: bool = False,
    names: Sequence[str] = tuple(UPDATES),
) -> list[dict]:
    """Returns one row per method: its steps in multiples of those of SGD, timed in pairs.

    Args:
        repeats: pairs of runs; fewer where they would take longer than `PATIENCE`.
        names: those of the methods.
    """
    model, batches = problem(network, small)
    on_device = [(x.to(device), y.to(device)) for x, y in batches]
    # The definition writes out a vector per example and unit: too many in the wide network.
    checked, ((x, y), *_) = problem(network, small or network == "wide MLP")
    sgd_step = UPDATES["SGD"][0].make(copy.deepcopy(model).to(device), 1, 0.0)

    def timed(step: Step, count: int) -> float:
        synchronize(device)
        start = clock(device)
        for x, y in on_device[:count]:
            step(x, y)
        synchronize(device)
        return (clock(device) - start) / count

    rows = []
    for name in names:
        update, every = UPDATES[name]
        row: dict = {"method": f"{network}: {name}"}
        if not small and (network, name) in TOO_LARGE:
            rows.append({**row, "skipped": "its matrices take 3 GB"})
            continue
        try:
            wrong = error(update, every, copy.deepcopy(checked).double(), x.double(), y)
            step = update.make(copy.deepcopy(model).to(device), every, 0.0)
        except ImportError as reason:
            rows.append({**row, "skipped": str(reason)})
            continue
        count = STEPS if every > 1 else SHORT
        times, plain = _pairs(
            lambda step=step, count=count: timed(step, count),
            lambda count=count: timed(sgd_step, count),
            repeats,
        )
        ratio = 1.0 if name == "SGD" else median_ratio(times, plain)
        goal = _goal(network, name)
        rows.append({**row, **summary(times), "steps_of_sgd": ratio, "goal": goal, "error": wrong})
        wanted = "" if goal is None else f" (goal {goal:g}: {'met' if ratio <= goal else 'missed'})"
        print(
            f"  {row['method']}: {rows[-1]['seconds'] * 1e3:.2f} ms, {ratio:.2f} × SGD{wanted}, "
            f"error {wrong:.0e}, {len(times)} pairs",
            flush=True,
        )
    return rows


def _pairs(
    method: Callable[[], float], reference: Callable[[], float], repeats: int
) -> tuple[list[float], list[float]]:
    """The seconds of both, measured right after each other again and again."""
    times, plain = [], []
    method(), reference()  # warm up
    start = time.perf_counter()
    while len(times) < repeats:
        plain.append(reference())
        times.append(method())
        if len(times) >= 3 and time.perf_counter() - start > PATIENCE:
            break
    return times, plain


def _goal(network: str, name: str) -> float | None:
    return GOALS[name][NETWORKS.index(network)] if name in GOALS else None


def rows(device: str, repeats: int = 31, names: Sequence[str] = tuple(UPDATES)) -> list[dict]:
    """Returns the rows of all networks."""
    warnings.filterwarnings("ignore", module="torch")  # what the peers use of it is deprecated
    with one_thread():
        return [row for network in NETWORKS for row in costs(network, device, repeats, names=names)]


def main(words: list[str]) -> None:
    """Measures the methods whose names hold a word; all of them are written down."""
    names = [name for name in UPDATES if not words or any(word in name for word in words)]
    with one_thread():
        device = device_name("cpu")
    measured = rows("cpu", names=names)
    if words:
        return
    columns = ["method", "seconds", "fastest", "repeats", "steps_of_sgd", "goal", "error"]
    where = {
        "device": device,
        "torch": version("torch"),
        "commit": commit(),
        "command": f"{SHARED}=1 " * (SHARED in os.environ) + "python -m benchmarks.updates",
    }
    with (RESULTS / "updates.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, [*columns, "skipped", *where], lineterminator="\n")
        table.writeheader()
        table.writerows({**row, **where} for row in measured)


if __name__ == "__main__":
    main(sys.argv[1:])
