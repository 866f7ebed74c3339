"""What a training step costs with every update of the package, against SGD and against the K-FAC of
two peers.

A step is forward, backward, update, with the mean cross-entropy; ``every 10`` looks at the
curvature, and factors it, on every tenth step only. The learning rate is 0 while the clock runs:
all methods work on the same network. What each one's first step would be is compared in float64
with `formulas`, at the labels that the method draws. The damping is each method's own: relative to
the mean diagonal here, shared out between the factors in the peers.
"""

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from biasshift.nets import mlp
from biasshift.optim import UnitNaturalGradient

from .formulas import Seen, kfac_step, seen, unit_step
from .harness import devices, seconds, write

TITLE = "A training step: MLP 196-128×8-10, batch 64; CNN 3-32-32-32, 3×3, 16×16 images, batch 32"
STEPS = 10  # of one timed run: one look of `every 10`
DAMPING, DECAY = 1e-3, 0.95

Step = Callable[[Tensor, Tensor], None]
Make = Callable[[nn.Module, int, float], Step]  # model, every, rate
Expected = Callable[[Seen], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Update:
    """``make`` gives what trains; ``expected`` is its first update of a layer; ``labels`` are those
    of its errors.
    """

    make: Make
    expected: Expected
    labels: Callable[[Tensor, Tensor], Tensor]


# -- labels: of the logits and the data's own ------------------------------------------------------


def drawn(logits: Tensor, y: Tensor) -> Tensor:
    """As everybody here draws them from a fresh generator."""
    return torch.multinomial(
        logits.softmax(-1), 1, True, generator=torch.Generator().manual_seed(0)
    )[:, 0]


def drawn_in_single(logits: Tensor, y: Tensor) -> Tensor:
    return drawn(logits.float(), y)


def given(logits: Tensor, y: Tensor) -> Tensor:
    return y


# -- the methods -----------------------------------------------------------------------------------


def loop(model: nn.Module, optimizer: torch.optim.Optimizer) -> Step:
    """What anybody would write."""

    def step(x: Tensor, y: Tensor) -> None:
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def sgd() -> Update:
    def make(model: nn.Module, every: int, rate: float) -> Step:
        return loop(model, torch.optim.SGD(model.parameters(), lr=rate))

    return Update(make, lambda layer: (layer.g, layer.g0), given)


def ours(center: str, scale: str, labels: str = "sampled") -> Update:
    def make(model: nn.Module, every: int, rate: float) -> Step:
        return loop(
            model,
            UnitNaturalGradient(
                model,
                rate,
                center,
                scale,
                damping=DAMPING,
                labels=labels,
                update_every=every,
                decay=DECAY,
            ),
        )

    return Update(
        make,
        lambda layer: unit_step(layer, center, scale, DAMPING),
        drawn_in_single if labels == "sampled" else given,
    )


def asdl() -> Update:
    """Weights and biases apart, factors as running averages that start from 0."""

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
    """No optimizer but a linear operator, of the latest look's batch alone, for which it goes
    through the model once more.
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
                    model, nn.CrossEntropyLoss(), params, [(x, y)], check_deterministic=False, seed=steps,
                    num_per_example_loss_terms=1, separate_weight_and_bias=False, num_data=len(x),
                )  # fmt: skip
                inverse = KFACInverseLinearOperator(
                    kfac, damping=DAMPING, use_heuristic_damping=True
                )
            for p, update in zip(params, inverse @ [p.grad for p in params], strict=True):
                p.grad = update
            optimizer.step()
            steps += 1

        return step

    return Update(make, lambda layer: kfac_step(layer, DAMPING, joint=True), drawn)


UPDATES = {  # name → update, steps between two looks
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
    torch.manual_seed(0)
    if network == "MLP":
        shape = (4, 8) if small else (64, 196)
        model = mlp(shape[1], *((6, 2) if small else (128, 8)))
    else:
        shape, channels = ((2, 3, 4, 4), 4) if small else ((32, 3, 16, 16), 32)
        convolutions = [
            part
            for before in (3, channels, channels)
            for part in (nn.Conv2d(before, channels, 3, padding=1), nn.ELU())
        ]
        model = nn.Sequential(
            *convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10)
        )
    return model, [(torch.rand(shape), torch.randint(10, shape[:1])) for _ in range(STEPS)]


def error(update: Update, every: int, model: nn.Module, x: Tensor, y: Tensor) -> float:
    """The relative error of the first step of all parameters together."""
    layers = seen(model, x, y, update.labels(model(x).detach(), y))
    expected = nn.utils.parameters_to_vector(
        [part.flatten() for layer in layers for part in update.expected(layer)]
    )
    before = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    update.make(model, every, 1.0)(x, y)
    moved = before - nn.utils.parameters_to_vector(model.parameters()).detach()
    return ((moved - expected).norm() / expected.norm()).item()


def costs(network: str, device: str, repeats: int, small: bool = False) -> list[dict]:
    """Every method on a few steps in turn, in multiples of the SGD beside it. The first round warms
    up.
    """
    model, batches = problem(network, small)
    there, (x, y) = [(x.to(device), y.to(device)) for x, y in batches], batches[0]
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
        for x, y in there:
            steps[name](x, y)

    rounds = [
        {name: seconds(lambda name=name: run(name), device) / STEPS for name in steps}
        for _ in range(repeats + 1)
    ][1:]
    for name in steps:
        times, ratio = (
            [times[name] for times in rounds],
            median(times[name] / times["SGD"] for times in rounds),
        )
        print(
            f"  {network}: {name}: {median(times) * 1e3:.2f} ms, {ratio:.2f} × SGD, error "
            f"{errors[name]:.0e}",
            flush=True,
        )
        row = {
            "method": f"{network}: {name}",
            "seconds": median(times),
            "fastest": min(times),
            "repeats": repeats,
        }
        rows.append({**row, "steps_of_sgd": ratio, "error": errors[name]})
    return rows


def main(repeats: int = 11) -> None:
    warnings.filterwarnings("ignore", module="torch")  # what the peers use of it is deprecated
    for device in devices():
        write(
            "updates",
            device,
            TITLE,
            [row for network in NETWORKS for row in costs(network, device, repeats)],
        )
