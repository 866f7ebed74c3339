"""Biases without influence: found by moving them, and solved for without them.

Which biases are inert is told by the model alone: its outputs stay the same when the bias moves.
Unit Fisher matrices come from `torch.func`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import oracles
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import biasshift as bs

DOUBLE, SINGLE = torch.float64, torch.float32
DAMPING = 1e-2
EXAMPLES, POSITIONS, WIDTH = 40, 5, 4
UNDEFINED = ("s", "k", "k0", "coupling", "mean_q", "var_q", "corrected_mean")
storages = pytest.mark.parametrize("storage", ["dense", "implicit"])


class Attention(nn.Module):
    """One block of attention; ``fused`` has queries, keys and values in one layer."""

    def __init__(self, fused: bool = False, bias: bool = True, scale: float = 1, shift: float = 0):
        super().__init__()
        self.scale, self.shift = scale, shift
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=bias) if fused else None
        self.q, self.k, self.v = (
            (None, None, None)
            if fused
            else (nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias), nn.Linear(WIDTH, WIDTH))
        )
        self.head = nn.Linear(WIDTH, 3)
        with torch.no_grad():  # the function of the unscaled inputs
            for layer in (self.qkv, self.q, self.k, self.v):
                if layer is not None:
                    layer.weight.div_(scale)
                    if layer.bias is not None:
                        layer.bias.sub_(layer.weight.sum(1) * shift)

    def forward(self, x: Tensor) -> Tensor:
        h = self.scale * x + self.shift
        q, k, v = (
            self.qkv(h).chunk(3, -1) if self.qkv is not None else (self.q(h), self.k(h), self.v(h))
        )
        weights = (q @ k.mT / WIDTH**0.5).softmax(-1)
        return self.head((weights @ v).tanh().mean(1))


class Pooling(nn.Module):
    """Positions weighed by the softmax of one score each, after a sequence of hidden units."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.score = nn.Linear(WIDTH, 6), nn.Linear(6, 1)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.hidden(x).tanh()
        return self.head((self.score(h).softmax(1) * h).sum(1))


class Difference(nn.Module):
    """The scores of two positions, subtracted: errors cancel to exactly 0."""

    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.score(x[:, :2])
        return scores[:, 0] - scores[:, 1]


def normalized(norm: nn.Module, groups: int = 1) -> nn.Module:
    """A norm behind a convolution of ten channels."""
    return nn.Sequential(
        nn.Conv1d(POSITIONS, 10, 2, groups=groups),
        norm,
        nn.ELU(),
        nn.Flatten(),
        nn.Linear(10 * (WIDTH - 1), 3),
    )


@dataclass(frozen=True)
class Case:
    name: str
    build: Callable[[], nn.Module]
    layers: tuple[str, ...]  # with inert biases


CASES = (
    Case("keys", Attention, ("k",)),
    Case("fused", lambda: Attention(fused=True), ("qkv",)),
    Case("keys of large inputs", lambda: Attention(scale=1e6), ("k",)),
    Case("keys of inputs far from zero", lambda: Attention(shift=1e4), ("k",)),
    Case("pooling", Pooling, ("score",)),
    Case("difference", Difference, ("score",)),
    Case("norm", lambda: normalized(nn.InstanceNorm1d(10)), ("0",)),
    Case("norm behind groups", lambda: normalized(nn.GroupNorm(10, 10), groups=5), ("0",)),
    # The bias of a pair has no influence, that of each channel has.
    Case("norm of pairs", lambda: normalized(nn.GroupNorm(5, 10)), ()),
)
all_cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def built(case: Case, dtype: torch.dtype = DOUBLE) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(3)
    model = case.build().to(dtype).eval()
    return model, torch.randn(EXAMPLES, POSITIONS, WIDTH, dtype=DOUBLE).to(dtype)


def without_influence(model: nn.Module, x: Tensor, layer: str) -> Tensor:
    """The units whose bias can move by 1 and leave the outputs as they are."""
    bias = model.get_submodule(layer).bias
    assert isinstance(bias, Tensor)
    with torch.no_grad():
        before, unmoved = model(x), []
        for unit in range(len(bias)):
            old = bias[unit].clone()
            bias[unit] += 1.0
            unmoved.append(bool((model(x) - before).abs().max() < 1e-8 * before.abs().max()))
            bias[unit] = old
    return torch.tensor(unmoved)


def natural(block: oracles.Block, g: Tensor, damping: float) -> Tensor:
    """``A⁻¹ g``, damped like V, by dense inverses."""
    A = block.A
    extra = damping * A.diagonal(dim1=1, dim2=2).mean(1)
    A = A + extra[:, None, None] * torch.eye(A.shape[1], dtype=A.dtype)
    return oracles.matvec(oracles.spd_inverse(A), g)


def close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Unit by unit, against the size of the unit's own numbers."""
    error = (actual.double() - expected).flatten(1).norm(dim=1)
    assert bool((error <= tolerance * expected.flatten(1).norm(dim=1)).all()), error


def right_sides(fisher: Any) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    units, inputs = fisher.cov_p.shape
    g = torch.randn(units, inputs, generator=generator, dtype=DOUBLE)
    return g, torch.randn(units, generator=generator, dtype=DOUBLE)


@storages
@all_cases
def test_biases_that_can_move_freely_are_inert(case: Case, storage: str) -> None:
    model, x = built(case)
    fishers = bs.unit_fisher(model, x, damping=DAMPING, storage=storage)
    inert = {name: fisher.bias_inert for name, fisher in fishers.items()}
    assert {name for name, units in inert.items() if units.any()} == set(case.layers)
    for name, units in inert.items():
        assert units.tolist() == without_influence(model, x, name).tolist(), name
        assert not bool((fishers[name].dead | fishers[name].singular).any())


@storages
@pytest.mark.parametrize("case", CASES[:5] + CASES[6:7], ids=lambda case: case.name)
def test_single_precision_finds_the_same(case: Case, storage: str) -> None:
    model, x = built(case, SINGLE)
    expected = {
        name: units.bias_inert.tolist() for name, units in bs.unit_fisher(*built(case)).items()
    }
    fishers = bs.unit_fisher(model, x, damping=DAMPING, storage=storage)
    assert {name: fisher.bias_inert.tolist() for name, fisher in fishers.items()} == expected


@storages
@pytest.mark.parametrize("damping", [0.0, DAMPING])
@pytest.mark.parametrize("case", CASES[:8], ids=lambda case: case.name)
def test_weights_of_an_inert_bias_are_solved_for_alone(
    case: Case, damping: float, storage: str
) -> None:
    model, x = built(case)
    name = case.layers[0]
    block = oracles.unit_fishers(model, x)[name]
    fisher = bs.unit_fisher(model, x, damping=damping, storage=storage, tolerance=1e-13)[name]
    g, g0 = right_sides(fisher)
    inert = fisher.bias_inert
    # Undamped, the norm leaves a direction nearly without variance. About 0, as the oracle has it,
    # A loses the digits of the mean.
    tolerance = 1e-8 if damping > 0 else 1e-6
    tolerance = 1e-5 if case.name == "keys of inputs far from zero" else tolerance
    close(fisher.A, block.A, tolerance)
    dw, dw0 = fisher.natural_gradient(g, g0)
    close(dw[inert], natural(block, g, damping)[inert], tolerance)
    assert dw0 is not None and bool((dw0[inert] == 0).all())
    if (~inert).any():
        expected, expected0 = block.natural_gradient(g, g0, damping)
        close(dw[~inert], expected[~inert], tolerance)
        close(dw0[~inert, None], expected0[~inert, None], tolerance)


@storages
def test_what_has_no_meaning_is_nan_and_what_is_measured_stays(storage: str) -> None:
    model, x = built(CASES[1])
    block = oracles.unit_fishers(model, x)["qkv"]
    fisher = bs.unit_fisher(model, x, damping=DAMPING, storage=storage)["qkv"]
    inert = fisher.bias_inert
    assert inert.tolist() == [False] * WIDTH + [True] * WIDTH + [False] * WIDTH
    readings = block.readings(DAMPING) | {"mean_q": block.mean_q, "var_q": block.var_q}
    for name in UNDEFINED:
        value = getattr(fisher, name)
        assert bool(value[inert].isnan().all()), name
        close(value[~inert].unsqueeze(1), readings[name][~inert].unsqueeze(1), 1e-7)
    assert bool((fisher.c[inert] < 1e-25).all())
    close(fisher.matrix(), block.F, 1e-10)
    v, v0 = right_sides(fisher)
    both = torch.cat([v, v0[:, None]], 1)
    Fv, Fv0 = fisher.matvec(v, v0)
    assert Fv0 is not None
    close(torch.cat([Fv, Fv0[:, None]], 1), oracles.matvec(fisher.matrix(), both), 1e-12)
    close(Fv0[:, None], oracles.matvec(fisher.matrix(), both)[:, -1:], 1e-9)
    assert bool(fisher.converged.all())


@storages
def test_errors_that_cancel_exactly_leave_a_unit_alive(storage: str) -> None:
    model, x = built(CASES[5])
    fisher = bs.unit_fisher(model, x, damping=DAMPING, storage=storage)["score"]
    assert bool((fisher.c == 0).all()) and not bool(fisher.dead.any())
    assert bool(fisher.bias_inert.all()) and bool(fisher.c.isfinite().all())
    block = oracles.unit_fishers(model, x)["score"]
    close(fisher.A, block.A, 1e-12)
    g, g0 = right_sides(fisher)
    close(fisher.natural_gradient(g, g0)[0], natural(block, g, DAMPING), 1e-8)


@storages
def test_a_unit_without_any_error_is_still_dead(storage: str) -> None:
    model, x = built(CASES[4])
    with torch.no_grad():
        model.get_submodule("hidden").bias[0] = 1e3  # tanh is flat there
    fisher = bs.unit_fisher(model, x, storage=storage, damping=DAMPING)["hidden"]
    assert fisher.dead.tolist() == [True] + [False] * 5
    assert not bool(fisher.bias_inert.any()) and bool((fisher.A[0] == 0).all())


@storages
def test_keys_without_a_bias_have_the_natural_gradient_of_their_weights(storage: str) -> None:
    torch.manual_seed(3)
    model = Attention(bias=False).double()
    x = torch.randn(EXAMPLES, POSITIONS, WIDTH, dtype=DOUBLE)
    fisher = bs.unit_fisher(model, x, damping=DAMPING, storage=storage, tolerance=1e-13)["k"]
    assert bool(fisher.bias_inert.all()) and bool(fisher.coupling.isnan().all())
    g, _ = right_sides(fisher)
    dw, dw0 = fisher.natural_gradient(g)
    assert dw0 is None
    close(dw, natural(oracles.unit_fishers(model, x)["k"], g, DAMPING), 1e-8)


@storages
@pytest.mark.parametrize("name", ["k", "q"])
def test_merging_batching_damping_and_choosing_units_keep_it(name: str, storage: str) -> None:
    model, x = built(CASES[0])

    def measured(x: Tensor, **options: Any) -> bs.UnitFisher:
        return bs.unit_fisher(
            model, x, damping=DAMPING, storage=storage, tolerance=1e-13, **options
        )[name]

    whole = measured(x)
    g, g0 = right_sides(whole)
    expected = whole.natural_gradient(g, g0)[0]
    merged = measured(x[:15]) + measured(x[15:])
    others = [measured(x, batch_size=7), merged, merged.damped(1.0).damped(DAMPING)]
    if storage == "implicit":  # the model is run again for every product
        others.append(measured(x, memory_budget=1))
    for fisher in others:
        assert torch.equal(fisher.bias_inert, whole.bias_inert)
        assert bool(fisher.bias_inert.all()) == (name == "k")
        close(fisher.natural_gradient(g, g0)[0], expected, 1e-8)
    some = measured(x, units={name: [1, 3]})
    assert torch.equal(some.bias_inert, whole.bias_inert[[1, 3]])
    close(some.natural_gradient(g[[1, 3]], g0[[1, 3]])[0], expected[[1, 3]], 1e-8)


def test_positions_by_themselves_do_not_cancel() -> None:
    model, x = built(CASES[0])
    fishers = bs.unit_fisher(model, x, damping=DAMPING, weight_sharing="expand")
    assert not any(bool(fisher.bias_inert.any()) for fisher in fishers.values())


@pytest.mark.parametrize("dtype", [DOUBLE, SINGLE, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale, shift", [(1.0, 0.0), (1e6, 0.0), (1.0, 1e4), (1e-6, 0.0)])
@storages
def test_inputs_may_be_large_and_far_from_zero(
    storage: str, scale: float, shift: float, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    a, delta2 = torch.randn(200, 6).to(dtype) * scale + shift, torch.rand(200, 4).to(dtype)
    fisher = bs.UnitFisher.from_samples(a, delta2, damping=DAMPING, storage=storage)
    assert not bool(fisher.bias_inert.any())
    model = nn.Sequential(
        nn.Conv1d(3, 5, 3), nn.ELU(), nn.Conv1d(5, 4, 3), nn.Flatten(), nn.Linear(64, 3)
    )
    with torch.no_grad():
        model[0].weight.div_(scale)
        model[0].bias.sub_(model[0].weight.sum((1, 2)) * shift)
    x = torch.randn(60, 3, 20) * scale + shift
    fishers = bs.unit_fisher(model.to(dtype), x.to(dtype), damping=DAMPING, storage=storage)
    assert not any(bool(fisher.bias_inert.any()) for fisher in fishers.values())


def test_the_gap_leaves_inert_units_out() -> None:
    """Of the fused layer, the gap of queries and values is that of a layer without the keys."""
    model, x = built(CASES[1])
    y = torch.arange(EXAMPLES) % 3
    row = bs.gradient_gap(model, x, y, damping=DAMPING).set_index("layer").loc["qkv"]
    others = [*range(WIDTH), *range(2 * WIDTH, 3 * WIDTH)]
    expected = bs.gradient_gap(model, x, y, damping=DAMPING, layers=["qkv"], units=others).loc[0]
    assert (row["units"], row["excluded"]) == (2 * WIDTH, WIDTH)
    assert (expected["units"], expected["excluded"]) == (2 * WIDTH, 0)
    for name in ("cos_gradient", "cos_centered", "cos_diagonal", "norm_ratio", "effective_samples"):
        assert row[name] == pytest.approx(expected[name], rel=1e-9), name


def test_the_loss_does_not_move_with_an_inert_bias() -> None:
    """Gradients agree: that of an inert bias is 0, and its weights have one."""
    model, x = built(CASES[0])
    F.cross_entropy(model(x), torch.arange(EXAMPLES) % 3).backward()
    keys = model.get_submodule("k")
    assert bool(keys.bias.grad.abs().max() < 1e-15 < 1e-6 < keys.weight.grad.abs().max())


def test_a_unit_with_an_inert_bias_is_not_reliable() -> None:
    model, _ = built(CASES[1])
    x = torch.randn(4000, POSITIONS, WIDTH, dtype=DOUBLE)
    fisher = bs.unit_fisher(model, x, damping=DAMPING)["qkv"]
    assert bool((fisher.effective_samples >= 10 * WIDTH).all())
    assert torch.equal(fisher.reliable, ~fisher.bias_inert)
