"""The whole job: from model and probe to what is read, in float32, beside peers with code by hand.

A job is what a user asks for: finished blocks, ``s, k, coupling``, a natural gradient, or the gap.
Peers return blocks at best. What follows of them is written out in `by_hand`: the covariance under
q, its Cholesky factor, and a solve. It is done in float64, for V is a difference. An instrumented
step has no peer; it stands beside the bare one.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import biasshift as bs

from . import blocks, cnn, mlp
from .harness import Task, compare

TITLE = "The whole job: from model and probe to what is read, float32"
DAMPING = 1e-2  # with less, blocks in float32 give peers no digit of k
JUDGED = 3  # units of every layer that are compared with the definitions in float64
PEERS = ("ASDL", "BackPACK", "torch.func")
JOBS = ("blocks", "s, k, coupling", "natural gradient", "gap")
UNITS_AT_ONCE = 16  # in the Cholesky by hand, so that a peer's memory is that of its blocks
HEADER: dict = {
    "damping": DAMPING,
    "targets": {
        "MLP, 256 examples, blocks: ASDL": 14,
        "MLP, 256 examples, blocks: BackPACK": 6,
        "MLP, 256 examples, blocks: torch.func": 7,
        "CNN, 32 examples, blocks: fastest peer": 1.5,
    },
}


@dataclass(frozen=True)
class Case:
    """A network and the size of its probe."""

    network: Callable[[bool], nn.Module]  # small → model
    shape: tuple[int, ...]
    small_shape: tuple[int, ...]
    examples: int
    jobs: tuple[str, ...]
    pieces: dict[str, int]
    peers: tuple[str, ...] = PEERS


CASES = {
    "MLP, 256 examples": Case(mlp.network, (784,), (8,), 256, (*JOBS, "step"), mlp.PIECES),
    "MLP, 2048 examples": Case(mlp.network, (784,), (8,), 2048, JOBS[1:3], mlp.PIECES, ()),
    "CNN, 32 examples": Case(
        lambda small: cnn.network(4 if small else 32),
        (3, 16, 16),
        (3, 4, 4),
        32,
        (*JOBS, "step"),
        {},
    ),
}


def methods(name: str, job: str) -> list[str]:
    """Returns the names of the rows of a case and a job."""
    libraries = ("bare", "biasshift") if job == "step" else ("biasshift", *CASES[name].peers)
    return [f"{name}, {job}: {library}" for library in libraries]


METHODS = [method for name, case in CASES.items() for job in case.jobs
           for method in methods(name, job)]  # fmt: skip


@dataclass(frozen=True)
class Problem:
    """A model with its probe, and the gradients that natural gradients are made of."""

    model: nn.Module
    x: Tensor
    y: Tensor
    g: dict[str, tuple[Tensor, Tensor]]  # of the mean loss at the labels, by layer

    def wide(self) -> "Problem":
        """Returns the problem in float64, on the CPU, with a model of its own."""
        return Problem(
            copy.deepcopy(self.model).double().cpu(),
            self.x.double().cpu(),
            self.y.cpu(),
            {name: (g.double().cpu(), g0.double().cpu()) for name, (g, g0) in self.g.items()},
        )


def problem(case: Case, small: bool, device: str) -> Problem:
    """Returns a network with random weights and examples, and its gradients."""
    torch.manual_seed(0)
    model = case.network(small).to(device)
    examples = 12 if small else case.examples
    x = torch.rand(examples, *(case.small_shape if small else case.shape)).to(device)
    y = torch.randint(10, (examples,)).to(device)
    layers = blocks.weight_layers(model)
    parameters = [p for layer in layers.values() for p in (layer.weight, layer.bias)]
    flat = torch.autograd.grad(F.cross_entropy(model(x), y), parameters)  # pyright: ignore[reportArgumentType]
    pairs = zip(flat[::2], flat[1::2], strict=True)
    g = {name: (w.flatten(1), w0) for name, (w, w0) in zip(layers, pairs, strict=True)}
    return Problem(model, x, y, g)


# -- ours ------------------------------------------------------------------------------------------


def ours(job: str, p: Problem) -> dict[str, Tensor]:
    """Does a job with the package, with its defaults."""
    if job == "gap":
        table = bs.gradient_gap(p.model, p.x, p.y, damping=DAMPING)
        cosines = torch.tensor(table["cos_gradient"].to_numpy())
        return {name: cosines[i] for i, name in enumerate(table["layer"])}
    fishers = bs.unit_fisher(p.model, p.x, damping=DAMPING)
    if job == "blocks":
        return {name: fisher.matrix() for name, fisher in fishers.items()}
    if job == "s, k, coupling":
        return {
            name: torch.stack([fisher.s, fisher.k, fisher.coupling], 1)
            for name, fisher in fishers.items()
        }
    result = {}
    for name, fisher in fishers.items():
        dw, dw0 = fisher.natural_gradient(*p.g[name])
        assert dw0 is not None
        result[name] = torch.cat([dw, dw0[:, None]], 1)
    return result


# -- by hand, from blocks --------------------------------------------------------------------------


def by_hand(
    job: str, F_: Tensor, mu: Tensor, g: Tensor, g0: Tensor, damping: float = DAMPING
) -> Tensor:
    """Does a job with the blocks (units, params, params) of some units, in float64.

    Args:
        mu: (inputs,), the mean incoming activation under the data.
        g, g0: the gradients of these units.
    """
    wide, d = F_.double(), F_.shape[1] - 1
    c, b = wide[:, d, d], wide[:, :d, d]
    m = b / c[:, None]
    W = wide[:, :d, :d] / c[:, None, None] - m[:, :, None] * m[:, None, :]
    diagonal = W.diagonal(dim1=1, dim2=2)
    diagonal += damping * diagonal.mean(1, keepdim=True)
    factor = torch.linalg.cholesky(W)

    def solve(rhs: Tensor) -> Tensor:
        return torch.cholesky_solve(rhs[:, :, None], factor)[:, :, 0]

    if job == "s, k, coupling":
        x = solve(m)
        q = (m * x).sum(1)
        return torch.stack([(1 + q) / c, 1 + ((m - mu) * x).sum(1), q / (1 + q)], 1)
    wide_g, wide_g0 = g.double(), g0.double()
    dw = solve(wide_g - wide_g0[:, None] * m) / c[:, None]
    return torch.cat([dw, (wide_g0 / c - (m * dw).sum(1))[:, None]], 1)


def mean_inputs(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Returns the mean incoming activations of every layer, over examples and positions."""
    means, layers = {}, blocks.weight_layers(model)

    def record(name: str, layer: nn.Module, args: tuple, output: object) -> None:
        a = args[0].detach()
        if isinstance(layer, nn.Conv2d):
            a = F.unfold(a, layer.kernel_size, layer.dilation, layer.padding, layer.stride).mT  # pyright: ignore[reportArgumentType]
        means[name] = a.flatten(0, -2).mean(0).double()

    hooks = [layer.register_forward_hook(partial(record, name)) for name, layer in layers.items()]
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    return means


def theirs(library: str, job: str, p: Problem, ready: nn.Module, piece: int) -> dict[str, Tensor]:
    """Does a job with a peer's blocks."""
    summed = blocks.METHODS[library](ready, p.x, piece)
    assert isinstance(summed, dict)
    if job == "blocks":
        return {name: block.div_(len(p.x)) for name, block in summed.items()}
    means = mean_inputs(p.model, p.x)
    of_layers = {
        name: torch.cat(
            [
                by_hand(job, block[u] / len(p.x), means[name], p.g[name][0][u], p.g[name][1][u])
                for u in torch.arange(len(block)).split(UNITS_AT_ONCE)
            ]
        )
        for name, block in summed.items()
    }
    return cosines(of_layers, p) if job == "gap" else of_layers


def cosines(steps: dict[str, Tensor], p: Problem) -> dict[str, Tensor]:
    """Returns the cosine between gradient and natural gradient of every layer."""
    return {
        name: F.cosine_similarity(
            step.flatten().double(), blocks.joined(*p.g[name]).flatten().double(), dim=0
        )
        for name, step in steps.items()
    }


# -- the judge -------------------------------------------------------------------------------------


def exact(job: str, wide: Problem) -> dict[str, Tensor]:
    """Returns what the first units of every layer must have, by definition, in float64.

    The gap takes all units.

    Args:
        wide: the problem in float64.
    """
    means, layers = mean_inputs(wide.model, wide.x), blocks.weight_layers(wide.model)
    kept = None if job == "gap" else JUDGED
    summed = _matrices(wide.model, wide.x, kept)
    result = {}
    for name in layers:
        g, g0 = (x[:kept] for x in wide.g[name])
        result[name] = summed[name] if job == "blocks" else by_hand(
            "natural gradient" if job == "gap" else job, summed[name], means[name], g, g0
        )  # fmt: skip
    return cosines(result, wide) if job == "gap" else result


def _matrices(model: nn.Module, x: Tensor, kept: int | None) -> dict[str, Tensor]:
    """The matrices of the first units, one backward pass per example and class."""
    layers = blocks.weight_layers(model)
    parameters = [p for layer in layers.values() for p in (layer.weight, layer.bias)]
    rows: dict[str, list[Tensor]] = {name: [] for name in layers}
    summed: dict[str, Tensor] = {}
    for i, example in enumerate(x):
        log_p = model(example[None])[0].log_softmax(-1)
        for value in log_p:
            flat = torch.autograd.grad(value, parameters, retain_graph=True)  # pyright: ignore[reportArgumentType]
            for k, name in enumerate(layers):
                row = blocks.joined(flat[2 * k], flat[2 * k + 1])[:kept]
                rows[name].append(value.detach().mul(0.5).exp() * row)
        if i == len(x) - 1 or i % 16 == 15:
            for name, of_layer in rows.items():
                blocks.add_outer(summed, name, torch.stack(of_layer))
                of_layer.clear()
    return {name: block / len(x) for name, block in summed.items()}


def worst(result: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Returns the largest relative error of a unit, or of s, k or the coupling of a layer."""
    errors = []
    for name, right in expected.items():
        found = result[name].detach().cpu().double()
        if right.dim() == 0:  # a cosine
            found, right = found[None, None], right[None, None]
        found = found[: len(right)]
        if right.shape[1:] == (3,):
            found, right = found.T, right.T
        errors.append(((found - right).flatten(1).norm(dim=1) / right.flatten(1).norm(dim=1)).max())
    return max(error.item() for error in errors)


# -- tasks -----------------------------------------------------------------------------------------


def prepare(method: str, device: str, small: bool) -> Task:
    """Returns the task of one row."""
    name, library = method.rsplit(": ", 1)
    name, job = name.split(" examples, ")
    case = CASES[f"{name} examples"]
    p = problem(case, small, device)
    if job == "step":
        return _step(library, p)
    wide = p.wide()  # before a library changes the model

    def error(result: dict[str, Tensor]) -> float:
        return worst(result, exact(job, wide))

    if library == "biasshift":
        return Task(lambda: ours(job, p), error)
    ready = blocks.prepared(library, p.model)
    piece = case.pieces.get(library, len(p.x))
    return Task(lambda: theirs(library, job, p, ready, piece), error)


def _step(library: str, p: Problem) -> Task:
    """A step of gradient descent that is measured, with everything, before and after; or bare.

    The error is that of the exact bookkeeping: the mean net input moves by the sum of its parts.
    """
    optimizer = torch.optim.SGD(p.model.parameters(), lr=1e-3)

    def step() -> None:
        loss = F.cross_entropy(p.model(p.x), p.y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def run() -> object:
        if library == "bare":
            return step()
        with bs.instrument(
            p.model, optimizer=optimizer, probe=(p.x, p.y), every=1, damping=DAMPING
        ) as log:
            step()
        return log

    def error(log: object) -> float:
        if log is None:
            return 0.0
        rows = log.table().dropna(subset=["total"])  # pyright: ignore[reportAttributeAccessIssue]
        parts = rows["own"] + rows["incoming"] + rows["second_order"]
        return float((rows["total"] - parts).abs().max() / rows["total"].abs().max())

    return Task(run, error)


# -- floors ----------------------------------------------------------------------------------------


def floor(method: str) -> dict[str, float]:
    """Returns the operations, and the bytes of the result, that no way of doing a job avoids.

    Blocks are symmetric: ``N m d²`` for N samples of d inputs, m units. An inverse takes the
    cheaper of these with ``m d³/3`` for their factors, and of ``N² d + m N³/3`` by Gram matrices.
    """
    name, job = method.rsplit(": ", 1)[0].split(" examples, ")
    case = CASES[f"{name} examples"]
    operations = size = 0.0
    model = case.network(False)
    for layer in blocks.weight_layers(model).values():
        weight = layer.weight
        assert isinstance(weight, Tensor)
        m, d = len(weight), math.prod(weight.shape[1:])
        shared = isinstance(layer, nn.Conv2d)
        N = case.examples * (10 if shared else 1)  # of shared weights every class has a row
        forming, gram = N * m * d**2, N**2 * d * (m if shared else 1)
        if job == "blocks":
            operations, size = operations + forming, size + 4 * m * (d + 1) ** 2
        elif job != "step":
            operations += min(forming + m * d**3 / 3, gram + m * N**3 / 3)
    return {"operations": operations, "result_bytes": size}


def rows(device: str, repeats: int = 5) -> list[dict]:
    """Returns one row per case, job and library."""
    return [
        row | floor(row["method"])
        for name, case in CASES.items()
        for job in case.jobs
        for row in compare("whole", methods(name, job), device, repeats, tolerance=1e-2)
    ]
