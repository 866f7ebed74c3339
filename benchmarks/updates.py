"""What a training step costs with every update, against SGD and the K-FAC of two peers.

A step is forward, backward, update, with the mean cross-entropy; ``every 10`` updates and factors
the curvature on every tenth step only. The learning rate is 0 while the clock runs: all methods
work on the same network. What each one's first step would be is compared in float64 with
`formulas`, at the labels that the method draws. The damping is each method's own: relative to the
mean diagonal here, shared out between the factors in the peers.
"""

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from biasshift.nets import mlp
from biasshift.optim import UnitNaturalGradient

from .cnn import network as cnn
from .formulas import LayerBatch, kfac_step, layer_batches, unit_step
from .harness import interleaved, median_ratio, seconds, summary

TITLE = "A training step: MLP 196-128×8-10, batch 64; CNN 3-32-32-32, 3×3, 16×16 images, batch 32"
STEPS = 10  # of one timed run: one update of the curvature with `every 10`
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
    """Returns ASDL's K-FAC.

    Weights and biases are apart, and factors are running averages that start from 0.
    """

    def make(model: nn.Module, every: int, rate: float) -> Step:
        from asdl import KfacGradientMaker, PreconditioningConfig

        config = PreconditioningConfig(
            preconditioner_upd_interval=every,
            curvature_upd_interval=every,
            data_size=1,
            damping=DAMPING,
            ema_decay=1 - DECAY,
        )
        maker = KfacGradientMaker(model, config, seed=0)
        optimizer = torch.optim.SGD(model.parameters(), lr=rate)

        def step(x: Tensor, y: Tensor) -> None:
            config.data_size = len(x)
            optimizer.zero_grad()
            maker.setup_loss_call(F.cross_entropy, maker.setup_model_call(model, x), y)
            maker.forward_and_backward()
            optimizer.step()

        return step

    return Update(make, lambda layer: kfac_step(layer, DAMPING, joint=False, kept=1 - DECAY), drawn)


def curvlinops() -> Update:
    """Returns curvlinops' K-FAC: a linear operator, with a step of plain SGD around it.

    It is of the latest batch alone, for which it goes through the model once more.
    """

    def make(model: nn.Module, every: int, rate: float) -> Step:
        from curvlinops import KFACInverseLinearOperator, KFACLinearOperator

        params = list(model.parameters())
        optimizer = torch.optim.SGD(params, lr=rate)
        inverse, steps = None, 0

        def step(x: Tensor, y: Tensor) -> None:
            nonlocal inverse, steps
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            if steps % every == 0:
                kfac = KFACLinearOperator(
                    model,
                    nn.CrossEntropyLoss(),
                    params,
                    [(x, y)],
                    check_deterministic=False,
                    seed=steps,
                    num_per_example_loss_terms=1,
                    separate_weight_and_bias=False,
                    num_data=len(x),
                )
                inverse = KFACInverseLinearOperator(
                    kfac, damping=DAMPING, use_heuristic_damping=True
                )
            for p, update in zip(params, inverse @ [p.grad for p in params], strict=True):
                p.grad = update
            optimizer.step()
            steps += 1

        return step

    return Update(make, lambda layer: kfac_step(layer, DAMPING, joint=True), drawn)


UPDATES = {  # name → update, steps between two updates of the curvature
    "SGD": (sgd(), 1),
    "centering trick (p, none)": (ours("p", "none"), 1),
    "centered (q, none)": (ours("q", "none"), 1),
    "centered (q, none), empirical": (ours("q", "none", "empirical"), 1),
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
NETWORKS = ("MLP", "CNN")


# -- the question ----------------------------------------------------------------------------------


def problem(network: str, small: bool) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    """Returns a network and the batches of one timed run."""
    torch.manual_seed(0)
    if network == "MLP":
        shape = (4, 8) if small else (64, 196)
        model = mlp(shape[1], *((6, 2) if small else (128, 8)))
    else:
        shape = (2, 3, 4, 4) if small else (32, 3, 16, 16)
        model = cnn(4 if small else 32)
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


def costs(network: str, device: str, repeats: int, small: bool = False) -> list[dict]:
    """Returns one row per method: a few steps in turn, in multiples of the SGD beside it."""
    model, batches = problem(network, small)
    on_device, (x, y) = [(x.to(device), y.to(device)) for x, y in batches], batches[0]
    errors: dict[str, float] = {}
    steps: dict[str, Step] = {}
    rows = []
    for name, (update, every) in UPDATES.items():
        try:
            errors[name] = error(update, every, copy.deepcopy(model).double(), x.double(), y)
            steps[name] = update.make(copy.deepcopy(model).to(device), every, 0.0)
        except ImportError as reason:
            rows.append({"method": f"{network}: {name}", "skipped": str(reason)})

    def run(name: str) -> None:
        for x, y in on_device:
            steps[name](x, y)

    def seconds_of_step(name: str) -> float:
        return seconds(lambda: run(name), device) / STEPS

    times = interleaved(steps, seconds_of_step, repeats)
    for name, of_method in times.items():
        row = {"method": f"{network}: {name}", **summary(of_method)}
        ratio = median_ratio(of_method, times["SGD"])
        rows.append({**row, "steps_of_sgd": ratio, "error": errors[name]})
        print(
            f"  {row['method']}: {row['seconds'] * 1e3:.2f} ms, {ratio:.2f} × SGD, error "
            f"{errors[name]:.0e}",
            flush=True,
        )
    return rows


def rows(device: str, repeats: int = 11) -> list[dict]:
    """Returns the rows of both networks."""
    warnings.filterwarnings("ignore", module="torch")  # what the peers use of it is deprecated
    return [row for network in NETWORKS for row in costs(network, device, repeats)]
