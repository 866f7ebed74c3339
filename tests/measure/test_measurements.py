"""Unit Fisher matrices, activation moments, gradient gap and bias shift, against `torch.func`.

The model is left as it was found.
"""

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import oracles
import pytest
import torch
import torch.nn.functional as F
from cases import (
    BY_NAME,
    CASES,
    Case,
    ChangedLater,
    Checkpointed,
    Pool,
    SequenceFirst,
    Windows,
    pristine,
)
from torch import Tensor, nn

import biasshift as bs

DOUBLE = torch.float64
DAMPING = 1e-2
all_cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
sharing = pytest.mark.parametrize("weight_sharing", ["per_example", "expand"])


@functools.cache
def oracle(
    name: str, weight_sharing: str = "per_example", empirical: bool = False
) -> dict[str, oracles.Block]:
    case = BY_NAME[name]
    model, x, y = case.build()
    return oracles.unit_fishers(model, x, case.likelihood, weight_sharing, y if empirical else None)


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    """Against the size of the whole tensor."""
    assert actual.shape == expected.shape
    assert torch.equal(actual.isnan(), expected.isnan())
    torch.testing.assert_close(
        actual,
        expected,
        rtol=0,
        atol=tolerance * max(float(expected.nan_to_num().abs().max()), 1e-300),
        equal_nan=True,
    )


def matches(
    fisher: Any, block: oracles.Block, damping: float = DAMPING, inverse: float = 1e-12
) -> None:
    """All of a `UnitFisher`, against the dense matrix and its dense inverse.

    The inverse loses digits by the inflation factor s·c.
    """
    tolerance = 1e-10
    close(fisher.c, block.c, tolerance)
    close(fisher.b, block.b, tolerance)
    close(fisher.A, block.A, tolerance)
    close(fisher.matrix(), block.F if block.bias else block.A, tolerance)
    close(fisher.mean_p.expand_as(block.mean_q), block.mean_p.expand_as(block.mean_q), tolerance)
    close(fisher.mean_q, block.mean_q, tolerance)
    close(fisher.var_q, block.var_q, tolerance)
    torch.testing.assert_close(
        fisher.cov_p, block.cov_p, rtol=0, atol=tolerance * float(block.b.abs().max())
    )
    close(fisher.effective_samples.double(), block.effective_samples, tolerance)
    readings = block.readings(damping)
    inverse *= max(100.0, float((readings["s"] * block.c).nan_to_num().max()))
    close(fisher.coupling, readings["coupling"], inverse)
    if block.bias:
        for name in ("s", "k", "k0"):
            close(getattr(fisher, name), readings[name], inverse)
        scale = float(block.mean_p.abs().max())  # the corrected mean itself may be 0
        torch.testing.assert_close(
            fisher.corrected_mean,
            readings["corrected_mean"],
            rtol=0,
            atol=10 * inverse * scale,
            equal_nan=True,
        )
    else:
        assert all(
            bool(getattr(fisher, name).isnan().all()) for name in ("s", "k", "k0", "corrected_mean")
        )
    generator = torch.Generator().manual_seed(0)
    g = torch.randn(block.b.shape, generator=generator, dtype=DOUBLE)
    g0 = torch.randn(block.c.shape, generator=generator, dtype=DOUBLE)
    dw, dw0 = block.natural_gradient(g, g0, damping)
    step = fisher.natural_gradient(g, g0) if block.bias else fisher.natural_gradient(g)
    close(step[0], dw, inverse)
    if block.bias:
        close(step[1], dw0, inverse)
    else:
        assert step[1] is None


def right_or_refused(layers: tuple[str, ...], measure: Callable[[], Any]) -> Any:
    """The measurement, or None where it is an error that has the name of a layer."""
    if not layers:
        return measure()
    try:
        return measure()
    except (ValueError, RuntimeError, NotImplementedError) as error:
        assert any(f'"{name}"' in str(error) or f"'{name}'" in str(error) for name in layers), error
        return None


def left_out(model: nn.Module, x: Tensor, *names: str) -> dict[str, Any]:
    """What is measured by default, where one warning names the layers that are not."""
    with pytest.warns(bs.UncoveredWarning) as caught:
        fishers = bs.unit_fisher(model, x, damping=DAMPING)
    [said] = [str(w.message) for w in caught if w.category is bs.UncoveredWarning]
    assert all(f"'{name}' (Linear): " in said for name in names)
    assert not set(names) & set(fishers)
    return fishers


# -- the oracle, first against itself --------------------------------------------------------------


@all_cases
def test_the_two_routes_of_the_oracle_agree(case: Case) -> None:
    """Parameter gradients are the errors at the offsets times the patches, summed over positions.

    Errors have mean 0 over labels.
    """
    model, x, _ = case.build()
    gradient, p = oracles.scores(model, x, case.likelihood)
    for name, probe in oracles.probe_layers(model, x, case.likelihood).items():
        a = probe.incoming.expand(-1, -1, probe.net.shape[-1], -1)
        a = torch.cat([a, torch.ones_like(a[..., :1])], -1)
        close(torch.einsum("nktu,ntui->nkui", probe.delta, a), gradient[name], 1e-12)
        if case.likelihood != "gaussian":
            assert float(torch.einsum("nk,nktu->ntu", p, probe.delta).abs().max()) < 1e-15
        assert float(probe.delta.abs().max()) > 1e-3


@pytest.mark.parametrize(
    "name",
    [
        "mlp-elu",
        "mlp-gaussian",
        "mlp-bernoulli",
        "tokens-labeled",
        "shared",
        "conv-circular",
        "conv-groups",
        "batchnorm-eval",
    ],
)
def test_the_oracle_agrees_with_finite_differences(name: str) -> None:
    case = BY_NAME[name]
    model, x, y = case.build()
    model, x, y = oracles.double_copy(model), x[:3], y[:3]
    gradient, _ = oracles.scores(model, x, case.likelihood, y)
    mean, step = oracles.gradients(model, x, y, case.likelihood), 1e-6

    def likelihoods() -> Tensor:
        with torch.no_grad():
            return torch.stack(
                [
                    oracles.log_likelihood(model(x[n : n + 1])[0], y[n], case.likelihood)
                    for n in range(3)
                ]
            )

    for layer, module in oracles.weight_layers(model).items():
        for unit, entry in ((0, 0), (1, -1)):
            flat = module.weight.data.flatten(1)[unit]
            kept = float(flat[entry])
            flat[entry] = kept + step
            above = likelihoods()
            flat[entry] = kept - step
            below = likelihoods()
            flat[entry] = kept
            numeric = (above - below) / (2 * step)
            expected = gradient[layer][:, 0, unit, :-1][:, entry]
            assert torch.allclose(numeric, expected, rtol=1e-5, atol=1e-7)
            of_mean = float(mean[layer][0][unit, entry])
            assert float(-numeric.mean()) == pytest.approx(of_mean, rel=1e-5, abs=1e-7)


# -- unit_fisher -----------------------------------------------------------------------------------


def measured(case: Case, **options: Any) -> tuple[dict[str, Any], list[str]]:
    """The Fisher matrices of the layers that are not refused."""
    model, x, _ = case.build()
    options = {"likelihood": case.likelihood, "damping": DAMPING, **options}
    layers = list(oracle(case.name))
    fishers = right_or_refused(case.shared, lambda: bs.unit_fisher(model, x, **options))
    if fishers is None:
        layers = [name for name in layers if name not in case.shared]
        fishers = bs.unit_fisher(model, x, layers=layers, **options)
    return fishers, layers


@all_cases
@sharing
def test_unit_fisher_is_the_oracle(case: Case, weight_sharing: str) -> None:
    fishers, layers = measured(case, weight_sharing=weight_sharing)
    assert list(fishers) == layers
    for name in layers:
        matches(fishers[name], oracle(case.name, weight_sharing)[name])


@all_cases
@sharing
def test_implicit_storage_reads_the_same(case: Case, weight_sharing: str) -> None:
    fishers, layers = measured(case, weight_sharing=weight_sharing, storage="implicit")
    assert list(fishers) == layers
    for name in layers:
        readings_match(fishers[name], oracle(case.name, weight_sharing)[name])


def readings_match(fisher: Any, block: oracles.Block, tolerance: float = 1e-6) -> None:
    """The implicit storage solves by iteration, and need not offer the blocks."""
    close(fisher.c, block.c, 1e-10)
    close(fisher.mean_q, block.mean_q, 1e-10)
    readings = block.readings(DAMPING)
    for name in ("coupling", "s", "k", "k0") if block.bias else ("coupling",):
        close(getattr(fisher, name), readings[name], tolerance)


@pytest.mark.parametrize(
    "name",
    [
        "mlp-elu",
        "mlp-bernoulli",
        "mlp-gaussian",
        "conv-strided",
        "conv-groups",
        "tokens-pooled",
        "tokens-labeled",
    ],
)
@sharing
def test_empirical_labels_are_the_data_s(name: str, weight_sharing: str) -> None:
    case = BY_NAME[name]
    model, x, y = case.build()
    fishers = bs.unit_fisher(
        model,
        [(x, y)],
        labels="empirical",
        likelihood=case.likelihood,
        weight_sharing=weight_sharing,
        damping=DAMPING,
    )
    for layer, block in oracle(name, weight_sharing, empirical=True).items():
        matches(fishers[layer], block)
        expected = oracle(name, weight_sharing)[layer]
        difference = float((fishers[layer].A - expected.A).norm() / expected.A.norm())
        assert difference > 0.02  # a different matrix


def test_weight_sharing_names_two_different_matrices() -> None:
    for name, layer in (("conv-plain", "0"), ("tokens-pooled", "0"), ("conv1d", "2")):
        shared, expanded = oracle(name)[layer].F, oracle(name, "expand")[layer].F
        assert float((shared - expanded).norm() / shared.norm()) > 0.1


def test_defaults_are_the_contract_s() -> None:
    model, x, _ = BY_NAME["conv-strided"].build()
    fishers, block = bs.unit_fisher(model, x), oracle("conv-strided")
    assert {fisher.damping for fisher in fishers.values()} == {1e-4}
    for name in block:
        matches(fishers[name], block[name], damping=1e-4, inverse=1e-10)


def batches(x: Tensor, sizes: tuple[int, ...] = (1, 7, 16, 16)) -> list[Tensor]:
    return list(x.split(list(sizes)))


def assert_same(fishers: dict[str, Any], expected: dict[str, Any]) -> None:
    assert list(fishers) == list(expected)
    for name in fishers:
        for quantity in ("c", "mean_p", "mean_q", "var_q", "effective_samples"):
            close(getattr(fishers[name], quantity), getattr(expected[name], quantity), 1e-12)


@pytest.mark.parametrize("name", ["mlp-elu", "conv-strided", "conv-groups", "tokens-pooled"])
@sharing
def test_batches_are_one_probe(name: str, weight_sharing: str) -> None:
    model, x, y = BY_NAME[name].build()
    x, y = x[:24], y[:24]
    sizes = (1, 7, 16)

    def measure(data: Any, **options: Any) -> dict[str, Any]:
        return bs.unit_fisher(
            model, data, weight_sharing=weight_sharing, damping=DAMPING, **options
        )

    whole = measure(x)
    assert_same(measure(batches(x, sizes)), whole)
    assert_same(measure(x, batch_size=5), whole)
    assert_same(measure(iter(batches(x, sizes))), whole)
    assert_same(measure(list(zip(batches(x, sizes), batches(y, sizes), strict=True))), whole)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=9)
    assert_same(measure(loader), whole)
    assert_same(measure(loader, labels="empirical"), measure([(x, y)], labels="empirical"))


def test_batches_of_one_element_are_inputs() -> None:
    """`DataLoader(TensorDataset(x))` gives `[x]`."""
    model, x, _ = BY_NAME["mlp-elu"].build()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), batch_size=9)
    assert_same(bs.unit_fisher(model, loader), bs.unit_fisher(model, x))


def test_layers_and_units_filter() -> None:
    model, x, _ = BY_NAME["mlp-elu"].build()
    expected = oracle("mlp-elu")
    assert list(bs.unit_fisher(model, x, layers=["4", "0"])) in (["0", "4"], ["4", "0"])
    by_rule = bs.unit_fisher(
        model,
        x,
        layers=lambda name, module: getattr(module, "out_features", 0) == 6,
        damping=DAMPING,
    )
    assert list(by_rule) == ["0"]
    matches(by_rule["0"], expected["0"])
    units, block = [1, 4], expected["2"]
    fisher = bs.unit_fisher(model, x, layers=["2"], units=units, damping=DAMPING)["2"]
    matches(fisher, oracles.Block(block.F[units], block.mean_p, block.effective_samples[units]))


def test_units_of_a_convolution_and_of_groups() -> None:
    for name in ("conv-strided", "conv-groups"):
        model, x, _ = BY_NAME[name].build()
        block, units = oracle(name)["0"], [0, 3]
        mean_p = block.mean_p[units] if len(block.mean_p) > 1 else block.mean_p
        fisher = bs.unit_fisher(model, x, layers=["0"], units=units, damping=DAMPING)["0"]
        matches(fisher, oracles.Block(block.F[units], mean_p, block.effective_samples[units]))


def test_groups_see_means_of_their_own() -> None:
    model, x, _ = BY_NAME["conv-groups"].build()
    mean_p = bs.unit_fisher(model, x, layers=["0"])["0"].mean_p
    close(mean_p, oracle("conv-groups")["0"].mean_p)
    assert mean_p.shape == (4, 9) and float((mean_p[0] - mean_p[3]).abs().max()) > 1e-3
    plain = bs.unit_fisher(*BY_NAME["conv-plain"].build()[:2], layers=["0"])["0"].mean_p
    assert plain.shape == (18,)


@pytest.mark.parametrize(
    "name", ["mlp-elu", "mlp-bernoulli", "mlp-gaussian", "tokens-labeled", "conv-strided"]
)
def test_sampled_labels_converge_in_mean(name: str) -> None:
    """Unbiased: the mean over draws is the expected matrix, within five standard errors."""
    case = BY_NAME[name]
    model, x, _ = case.build()
    layer, expected = next(iter(oracle(name).items()))
    draws = 60
    options = {"labels": "sampled", "likelihood": case.likelihood, "layers": [layer]}
    drawn = []
    for seed in range(draws):
        generator = torch.Generator().manual_seed(seed)
        fisher = bs.unit_fisher(model, x, generator=generator, **options)[layer]
        drawn.append(fisher.matrix())
    values = torch.stack(drawn)
    error = (values.mean(0) - expected.F).abs()
    tolerance = 5 * values.std(0) / draws**0.5 + 1e-12
    assert bool((error < tolerance).all())
    assert float(values[:, 0, -1, -1].std()) > 0.01 * float(expected.c[0])  # drawn indeed
    data = oracle(name, empirical=True)[layer].F
    # the data's labels would not pass
    assert bool(((values.mean(0) - data).abs() > tolerance).any())


def test_sampled_labels_follow_the_generator_and_leave_the_global_state() -> None:
    model, x, _ = BY_NAME["mlp-elu"].build()

    def draw(seed: int | None) -> Tensor:
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        return bs.unit_fisher(model, x, labels="sampled", generator=generator)["2"].c

    state = torch.get_rng_state()
    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("seed", [None, 0])
def test_sampled_labels_of_several_batches_are_independent(seed: int | None) -> None:
    """The same batch twice draws twice: its labels must not repeat."""
    model, x, _ = BY_NAME["mlp-elu"].build()

    def measure(data: Any) -> Tensor:
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        return bs.unit_fisher(model, data, labels="sampled", generator=generator)["2"].c

    assert float((measure([(x,), (x,)]) - measure(x)).abs().max()) > 1e-6


def test_a_double_model_under_a_single_default_and_a_single_model() -> None:
    model, x, _ = BY_NAME["mlp-elu"].build()
    assert torch.get_default_dtype() == torch.float32
    fishers = bs.unit_fisher(model, x)
    assert {fisher.k.dtype for fisher in fishers.values()} == {DOUBLE}
    single = bs.unit_fisher(model.float(), x.float(), damping=DAMPING)
    for name, block in oracle("mlp-elu").items():
        assert single[name].k.dtype == torch.float32
        close(single[name].k.double(), block.readings(DAMPING)["k"], 1e-4)


def test_a_dead_unit_and_a_live_unit_without_variance() -> None:
    model, x, _ = BY_NAME["mlp-relu"].build()
    with torch.no_grad():
        model[0].bias[2] = -100.0  # dead
        model[0].weight[4] = 0.0  # alive for one example alone
        model[0].weight[4, 0] = 1.0
        model[0].bias[4] = -float(x[:, 0].sort().values[-2:].mean())
    fishers = bs.unit_fisher(model, x, damping=DAMPING)
    assert fishers["0"].dead.nonzero().flatten().tolist() == [2]
    assert fishers["0"].singular.nonzero().flatten().tolist() == [4]
    assert fishers["0"].k.isnan().nonzero().flatten().tolist() == [2, 4]
    block = oracles.unit_fishers(model, x)["0"]
    good = [0, 1, 3, 5]
    close(fishers["0"].k[good], block.readings(DAMPING)["k"][good])
    assert bool(torch.isfinite(fishers["2"].k).all())  # an input of layer 2 never varies


def test_a_constant_input_without_damping_names_the_layer() -> None:
    model, x, _ = BY_NAME["mlp-elu"].build()
    x[:, 1] = 0.5
    fishers = bs.unit_fisher(model, x, damping=0.0)
    assert bool(torch.isfinite(fishers["2"].k).all())
    with pytest.raises(ValueError, match=r"[\"']0[\"'].*damping"):
        _ = fishers["0"].k


def test_an_activation_changed_after_it_was_read_is_right_or_refused() -> None:
    torch.manual_seed(0)
    model = ChangedLater().double()
    x = torch.randn(30, 5, dtype=DOUBLE) + 0.5
    model(x).sum().backward()
    assert model.stem.weight.grad is not None  # a model that trains
    fishers = right_or_refused(("inner",), lambda: bs.unit_fisher(model, x, damping=DAMPING))
    model.inplace = False
    for name, fisher in (fishers or {}).items():
        matches(fisher, oracles.unit_fishers(model, x)[name])


def test_layers_that_do_not_run_are_absent_or_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ELU(), nn.Linear(4, 2)).double()
    model[1].register_module("unused", nn.Linear(2, 2).double())
    fishers = right_or_refused(
        ("1.unused",), lambda: bs.unit_fisher(model, torch.randn(9, 3, dtype=DOUBLE))
    )
    assert fishers is None or list(fishers) == ["0", "2"]


def test_a_layer_without_influence_has_dead_units() -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.aside, self.head = nn.Linear(5, 6), nn.Linear(6, 2), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = F.elu(self.inner(x))
            self.aside(h)
            return self.head(h)

    torch.manual_seed(0)
    model, x = Unused().double(), torch.randn(30, 5, dtype=DOUBLE)
    fishers, blocks = bs.unit_fisher(model, x, damping=DAMPING), oracles.unit_fishers(model, x)
    assert bool(fishers["aside"].dead.all()) and bool(fishers["aside"].k.isnan().all())
    close(fishers["aside"].mean_p, blocks["aside"].mean_p[0])
    matches(fishers["inner"], blocks["inner"])
    matches(fishers["head"], blocks["head"])


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_is_right_or_refused_by_name(reentrant: bool) -> None:
    torch.manual_seed(0)
    model, x = Checkpointed(reentrant).double(), torch.randn(30, 5, dtype=DOUBLE)
    fishers = right_or_refused(
        ("block.0", "block.2"),
        lambda: bs.unit_fisher(model, x, damping=DAMPING, uncovered="raise"),
    )
    assert (fishers is None) == reentrant
    if fishers is None:
        fishers = left_out(model, x, "stem", "block.0", "block.2")
        assert list(fishers) == ["head"]
    model.reentrant = None
    for name, fisher in fishers.items():
        matches(fisher, oracles.unit_fishers(model, x)[name])
    pristine(model)


def test_a_layer_that_runs_without_gradients_is_refused_by_name() -> None:
    """Its errors exist, but autograd does not know them; zeros would be silently wrong."""

    class Backbone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = nn.Linear(5, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                h = F.elu(self.inner(x))
            return self.head(h)

    torch.manual_seed(0)
    model, x = Backbone().double(), torch.randn(30, 5, dtype=DOUBLE)
    with pytest.raises((ValueError, RuntimeError), match=r"[\"']inner[\"']"):
        bs.unit_fisher(model, x, uncovered="raise")
    pristine(model)
    block = oracles.unit_fishers(model, x)["head"]
    matches(bs.unit_fisher(model, x, layers=["head"], damping=DAMPING)["head"], block)
    fishers = left_out(model, x, "inner")
    assert list(fishers) == ["head"]
    matches(fishers["head"], block)


def test_autocast_around_a_measurement_changes_nothing() -> None:
    model, x, _ = BY_NAME["conv-strided"].build()
    model, x = model.float(), x.float()
    plain, moments = bs.unit_fisher(model, x, damping=DAMPING), bs.activation_moments(model, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = bs.unit_fisher(model, x, damping=DAMPING)
        inside_moments = bs.activation_moments(model, x)
        assert torch.is_autocast_enabled("cpu")
    assert all(torch.equal(inside[name].k, plain[name].k) for name in plain)
    assert all(torch.equal(inside_moments[name].mean, moments[name].mean) for name in moments)


def test_a_user_s_hook_that_changes_the_net_input_is_a_part_of_the_model() -> None:
    """The error of a unit is that at its own net input.

    The matrix is that of the weights, as per-example gradients see it.
    """
    model, x, _ = BY_NAME["mlp-elu"].build()
    model[2].register_forward_hook(lambda module, args, output: 3 * output)
    gradient, p = oracles.scores(model, x, "categorical")
    for name, fisher in bs.unit_fisher(model, x).items():
        close(
            fisher.matrix(),
            torch.einsum("nk,nkui,nkuj->uij", p, gradient[name], gradient[name]) / len(x),
            1e-10,
        )


def test_parametrized_weights_are_not_tied_weights() -> None:
    """`module.weight` is a new tensor at every access, maybe at the address of the last one."""
    model, x, _ = BY_NAME["mlp-elu"].build()
    plain = bs.unit_fisher(model, x)
    for index in (0, 2, 4):
        nn.utils.parametrizations.weight_norm(model[index])
    fishers = bs.unit_fisher(model, x)
    for name in plain:
        close(fishers[name].matrix(), plain[name].matrix(), 1e-10)


# -- what is refused, by name ----------------------------------------------------------------------


def test_batchnorm_in_training_mode_is_refused() -> None:
    model, x, _ = BY_NAME["batchnorm-eval"].build()
    model.train()
    kept = model[1].running_mean.clone(), model[1].num_batches_tracked.clone()
    with pytest.raises(ValueError, match=r"[\"']1[\"'].*eval"):
        bs.unit_fisher(model, x)
    assert torch.equal(model[1].running_mean, kept[0]) and torch.equal(
        model[1].num_batches_tracked, kept[1]
    )
    assert bs.activation_moments(model, x)  # means still work
    assert torch.equal(model[1].running_mean, kept[0]) and torch.equal(
        model[1].num_batches_tracked, kept[1]
    )


def test_dropout_in_training_mode_is_refused_and_in_eval_mode_or_with_p_zero_is_not() -> None:
    x = torch.randn(20, 5, dtype=DOUBLE)
    for p, training, refused in ((0.5, True, True), (0.5, False, False), (0.0, True, False)):
        model = nn.Sequential(nn.Linear(5, 4), nn.Dropout(p), nn.ELU(), nn.Linear(4, 3)).double()
        model.train(training)
        if refused:
            with pytest.raises(ValueError, match=r"[\"']1[\"'].*eval"):
                bs.unit_fisher(model, x)
        else:
            assert list(bs.unit_fisher(model, x)) == ["0", "3"]
        assert model.training == training


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"layers": ["0", "7"]}, "7"),
        ({"layers": ["1"]}, "1"),
        ({"labels": "empirical"}, "y|labels"),
        ({"labels": "true"}, "labels|true"),
        ({"likelihood": "poisson"}, "likelihood|poisson"),
        ({"weight_sharing": "reduce"}, "weight_sharing|reduce"),
        ({"storage": "sparse"}, "storage|sparse"),
        ({"damping": -1.0}, "damping"),
        ({"batch_size": 0}, "batch_size"),
        ({"units": [0, 6]}, "6|units"),
        ({"generator": 7, "labels": "sampled"}, "generator|Generator"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_bad_arguments_are_refused_with_their_name(options: dict[str, Any], words: str) -> None:
    model, x, _ = BY_NAME["mlp-elu"].build()
    with pytest.raises((ValueError, TypeError), match=words):
        bs.unit_fisher(model, x, **options)
    pristine(model)


def test_too_many_passes_are_refused_and_sampling_suggested() -> None:
    """100 positions of 100 classes: exact means 10,000 passes, each position separately."""
    model, x = nn.Sequential(nn.Linear(3, 100)), torch.randn(2, 100, 3)
    with pytest.raises(ValueError, match="sampled"):
        bs.unit_fisher(model, x)
    assert list(bs.unit_fisher(model, x, labels="sampled")) == ["0"]


def test_outputs_that_are_no_tensor_are_chosen_or_refused() -> None:
    class Dictionary(nn.Module):
        def __init__(self, *keys: str) -> None:
            super().__init__()
            self.inner, self.keys = nn.Linear(5, 3), keys

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            outputs = self.inner(x)
            return {key: -i * outputs if i else outputs for i, key in enumerate(self.keys)}

    torch.manual_seed(0)
    x = torch.randn(30, 5, dtype=DOUBLE)
    for keys, choice in (
        (("logits", "features"), None),
        (("out", "aux"), None),
        (("scores",), None),
        (("scores", "features"), "scores"),
        (("scores", "features"), lambda returned: returned["scores"]),
    ):
        model = Dictionary(*keys).double()
        fisher = bs.unit_fisher(model, x, output=choice, damping=DAMPING)["inner"]
        matches(fisher, oracles.unit_fishers(nn.Sequential(model.inner), x)["0"])
        pristine(model)
    model = Dictionary("scores", "features").double()
    with pytest.raises(ValueError, match=r"dict with the keys 'scores', 'features'.*output="):
        bs.unit_fisher(model, x)
    with pytest.raises(ValueError, match=r"'output' must be a key.*'classes'"):
        bs.unit_fisher(model, x, output="classes")
    pristine(model)


def test_inputs_that_are_not_finite_are_refused() -> None:
    model, x, _ = BY_NAME["mlp-elu"].build()
    for value in (float("nan"), float("inf")):
        bad = x.clone()
        bad[3, 1] = value
        with pytest.raises(ValueError, match=r"finite|NaN|nan|inf"):
            bs.unit_fisher(model, bad)


def test_no_data_is_refused() -> None:
    model, x, _ = BY_NAME["mlp-elu"].build()
    for empty in (x[:0], [], iter(())):
        with pytest.raises(ValueError):
            bs.unit_fisher(model, empty)


@sharing
@pytest.mark.parametrize("batch_size", [None, 5])
def test_positions_folded_into_the_examples_are_right(
    weight_sharing: str, batch_size: int | None
) -> None:
    torch.manual_seed(0)
    model, x = Windows().double(), torch.randn(12, 4, 3, dtype=DOUBLE)
    options: dict[str, Any] = {"weight_sharing": weight_sharing, "damping": DAMPING}
    # the same function, with the positions of an example behind it
    plain = nn.Sequential(model.inner, nn.ELU(), Pool(), model.head)
    blocks = oracles.unit_fishers(plain, x, weight_sharing=weight_sharing)
    fishers = bs.unit_fisher(model, x, batch_size=batch_size, **options)
    assert list(fishers) == ["inner", "head"]
    matches(fishers["inner"], blocks["0"])
    matches(fishers["head"], blocks["3"])
    fishers = bs.unit_fisher(model, x, layers=["head"], **options)
    matches(fishers["head"], blocks["3"])


def test_rows_whose_examples_depend_on_the_batch_are_refused_by_name() -> None:
    class Doubled(Windows):
        """Every example runs twice: all examples, and then all again."""

        def forward(self, x: Tensor) -> Tensor:
            h = F.elu(self.inner(torch.cat([x, x])))
            return self.head(h[: len(x)] + h[len(x) :])

    torch.manual_seed(0)
    model, x = Doubled().double(), torch.randn(12, 3, dtype=DOUBLE)
    fishers = bs.unit_fisher(model, x, damping=DAMPING, uncovered="raise")
    plain = nn.Sequential(model.inner, nn.ELU(), Twice(), model.head)
    for name, block in (("inner", "0"), ("head", "3")):
        matches(fishers[name], oracles.unit_fishers(plain, x)[block])

    class Sorted(Windows):
        """Both copies of an example stand where its first feature puts it."""

        def forward(self, x: Tensor) -> Tensor:
            rows = torch.cat([x, x])
            order = rows[:, 0].argsort()
            h = F.elu(self.inner(rows[order]))[order.argsort()]
            return self.head(h[: len(x)] + h[len(x) :])

    model = Sorted().double()
    with pytest.raises(ValueError, match=r"'inner' .*sees 24 rows for 12 examples"):
        bs.unit_fisher(model, x, uncovered="raise")
    fishers = left_out(model, x, "inner")
    assert list(fishers) == ["head"]
    plain = nn.Sequential(model.inner, nn.ELU(), Twice(), model.head)
    matches(fishers["head"], oracles.unit_fishers(plain, x)["3"])


class Twice(nn.Module):
    """Every number times two."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def test_positions_in_front_are_right_also_when_the_sizes_agree() -> None:
    """6 positions of 6 examples: to take the leading axis for theirs would be silently wrong."""
    torch.manual_seed(0)
    model = SequenceFirst().double()
    for n in (6, 9):
        x = torch.randn(n, 6, 3, dtype=DOUBLE)
        fishers, blocks = bs.unit_fisher(model, x, damping=DAMPING), by_parameters(model, x)
        assert list(fishers) == ["inner", "head"]
        for name, block in blocks.items():
            close(fishers[name].matrix(), block, 1e-10)


def by_parameters(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Unit Fisher matrices of the gradients of every example alone, wherever its positions are."""
    blocks = {}
    for name, score in oracles.scores(model, x, "categorical")[0].items():
        p = model(x).softmax(-1).detach()
        blocks[name] = torch.einsum("nk,nkui,nkuj->uij", p, score, score) / len(x)
    return blocks


# -- activation moments ----------------------------------------------------------------------------


def test_activation_moments_of_every_childless_module_without_parameters() -> None:
    model, x, _ = BY_NAME["mlp-elu"].build()
    moments = bs.activation_moments(model, x)
    assert list(moments) == ["1", "3"]
    with torch.no_grad():
        h = x
        for i, module in enumerate(model):
            h = module(h)
            if str(i) in moments:
                mean, var = oracles.activation_statistics(h, -1)
                close(moments[str(i)].mean, mean, 1e-12)
                close(moments[str(i)].var, var, 1e-12)  # the population variance
                assert float((moments[str(i)].var - h.var(0)).abs().max()) > 1e-4
                assert int(moments[str(i)].count) == len(x)


@pytest.mark.parametrize(
    ("name", "axes"),
    [
        ("mlp-elu-inplace", {"1": -1, "3": -1}),
        ("tokens-pooled", {"1": -1, "2": -1}),
        ("conv-strided", {"1": 1}),
        ("conv-inplace", {"1": 1, "2": 1}),
        ("conv1d", {"1": 1}),
        ("batchnorm-eval", {"2": 1}),
        ("mlp-layernorm", {"2": -1}),
    ],
)
def test_the_unit_axis_is_that_of_the_last_weight_or_norm_module(
    name: str, axes: dict[str, int]
) -> None:
    model, x, _ = BY_NAME[name].build()
    moments = bs.activation_moments(model, x)
    outputs: dict[str, Tensor] = {}
    h = x
    with torch.no_grad():
        for i, module in enumerate(model):
            h = module(h).clone()
            outputs[str(i)] = h.clone()
    for layer, axis in axes.items():
        mean, var = oracles.activation_statistics(outputs[layer], axis)
        close(moments[layer].mean, mean, 1e-12)
        close(moments[layer].var, var, 1e-12)


def test_activation_moments_merge_batches_and_survive_large_means() -> None:
    model, x, _ = BY_NAME["conv-strided"].build()
    whole = bs.activation_moments(model, x)
    for other in (
        bs.activation_moments(model, batches(x, (1, 7, 16))),
        bs.activation_moments(model, x, batch_size=5),
    ):
        for name in whole:
            close(other[name].mean, whole[name].mean, 1e-12)
            close(other[name].var, whole[name].var, 1e-12)
            assert other[name].count == whole[name].count
    shift = nn.Sequential(nn.Linear(3, 3), nn.Identity()).float()
    nn.init.eye_(shift[0].weight)
    nn.init.constant_(shift[0].bias, 1000.0)
    a = torch.randn(500, 3)
    out = shift(a).detach()
    moments = bs.activation_moments(shift, a)["1"]
    torch.testing.assert_close(
        moments.var.double(), out.double().var(0, correction=0), rtol=1e-3, atol=0
    )


def test_a_module_called_twice_has_two_names() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.relu = nn.Linear(4, 5), nn.Linear(5, 3), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.relu(self.second(self.relu(self.first(x))))

    torch.manual_seed(0)
    model, x = Twice().double(), torch.randn(20, 4, dtype=DOUBLE)
    moments = bs.activation_moments(model, x)
    assert list(moments) == ["relu#0", "relu#1"]
    h = F.relu(model.first(x)).detach()
    close(moments["relu#0"].mean, h.mean(0), 1e-12)
    close(moments["relu#1"].mean, F.relu(model.second(h)).mean(0).detach(), 1e-12)


def test_an_ambiguous_unit_axis_is_left_out_or_refused_by_name_and_unit_axis_decides() -> None:
    """An activation before any weight or norm module: three axes, none known."""
    model = nn.Sequential(nn.Tanh(), nn.Flatten(), nn.Linear(12, 2)).double()
    x = torch.randn(10, 3, 4, dtype=DOUBLE)
    with pytest.raises(ValueError, match=r"[\"']0[\"'].*unit_axis"):
        bs.activation_moments(model, x, layers=["0"])
    with pytest.warns(UserWarning, match=r"[\"']0[\"'].*left out.*unit_axis"):
        assert list(bs.activation_moments(model, x)) == ["1"]
    moments = bs.activation_moments(model, x, unit_axis=1)
    close(moments["0"].mean, x.tanh().mean((0, 2)), 1e-12)
    assert moments["0"].mean.shape == (3,)


def test_activation_moments_without_gradients_and_in_the_current_mode() -> None:
    model = nn.Sequential(nn.Linear(4, 50), nn.Dropout(0.5), nn.ReLU()).double()
    x = torch.randn(30, 4, dtype=DOUBLE)
    with torch.no_grad(), as_found(model):  # the random state too, of which dropout has drawn
        training = bs.activation_moments(model, x)["2"]
    with torch.no_grad():
        kept = bs.activation_moments(model.eval(), x)["2"]
    close(kept.mean, F.relu(F.linear(x, model[0].weight, model[0].bias)).mean(0).detach(), 1e-12)
    assert float((training.mean - kept.mean).abs().max()) > 1e-3


# -- the gradient gap ------------------------------------------------------------------------------

GAP = ["cos_gradient", "cos_centered", "cos_diagonal", "norm_ratio", "mean_in_abs"]


@pytest.mark.parametrize(
    "case", [case for case in CASES if not case.tokens], ids=lambda case: case.name
)
def test_gradient_gap_is_the_oracle_s(case: Case) -> None:
    model, x, y = case.build()
    frame = right_or_refused(
        case.shared,
        lambda: bs.gradient_gap(model, x, y, likelihood=case.likelihood, damping=DAMPING),
    )
    if frame is None:
        return
    assert list(frame.columns)[:6] == ["layer", *GAP]
    gradients, blocks = oracles.gradients(model, x, y, case.likelihood), oracle(case.name)
    assert frame["layer"].tolist() == list(blocks)
    for row in frame.to_dict("records"):
        expected = oracles.gap(blocks[row["layer"]], *gradients[row["layer"]], DAMPING)
        for column in GAP:
            if column == "cos_centered" and not blocks[row["layer"]].bias:
                continue  # no bias to center with
            value = pytest.approx(expected[column], rel=1e-9, abs=1e-10)
            assert row[column] == value, (row["layer"], column)


def test_gradient_gap_leaves_out_dead_units_and_ranks_the_members() -> None:
    model, x, y = BY_NAME["mlp-relu"].build()
    with torch.no_grad():
        model[0].bias[2] = -100.0
    frame = bs.gradient_gap(model, x, y, damping=DAMPING).set_index("layer")
    gradients = oracles.gradients(model, x, y, "categorical")
    blocks = oracles.unit_fishers(model, x)
    for layer in ("0", "2", "4"):
        for column, value in oracles.gap(blocks[layer], *gradients[layer], DAMPING).items():
            assert frame.loc[layer, column] == pytest.approx(value, rel=1e-9)
    assert (frame["cos_gradient"].abs() <= 1).all() and (frame["norm_ratio"] > 0).all()


def test_gradient_gap_of_the_quasi_diagonal_member_closes_under_strong_damping() -> None:
    """λ → ∞: the damped covariance is a multiple of I, and both natural gradients are one."""
    model, x, y = BY_NAME["mlp-elu"].build()
    strong, weak = (bs.gradient_gap(model, x, y, damping=damping) for damping in (1e6, DAMPING))
    assert (strong["cos_diagonal"] > 1 - 1e-9).all()
    assert (weak["cos_diagonal"] < 1 - 1e-4).all()
    assert (strong["cos_gradient"] < 1 - 1e-4).all()  # the bias still has its q-mean corrected


# -- the bias shift --------------------------------------------------------------------------------


def update(model: nn.Module) -> None:
    """Any update at all: here every parameter moves, frozen ones too."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(
                parameter.shape, generator=generator, dtype=parameter.dtype
            )


def update_named(model: nn.Module) -> None:
    """The same change for a model and its oracle copy, in which every layer has a bias.

    Biases that were not there stay 0.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            clean = name.replace(".layer.", ".")
            generator = torch.Generator().manual_seed(sum(map(ord, clean)))
            parameter += 0.05 * torch.randn(
                parameter.shape, generator=generator, dtype=parameter.dtype
            )


@all_cases
def test_bias_shift_is_the_exact_bookkeeping(case: Case) -> None:
    model, x, _ = case.build()
    expected = oracles.bias_shifts(copy.deepcopy(model), x, update_named)

    def measure() -> Any:
        fresh = copy.deepcopy(model)
        with bs.bias_shift(fresh, x) as shift:
            update_named(fresh)
        return shift

    shift = right_or_refused(case.shared, measure)
    if shift is None:
        return
    assert set(shift) == set(expected)
    for name, parts in expected.items():
        scale = float(parts["total"].abs().max())
        assert scale > 1e-4
        for part, value in parts.items():
            torch.testing.assert_close(
                getattr(shift[name], part), value, rtol=0, atol=1e-10 * scale
            )
        own, incoming, second = shift[name].own, shift[name].incoming, shift[name].second_order
        residual = shift[name].total - (own + incoming + second)
        assert float(residual.abs().max()) < 1e-14  # rounding of net inputs of size 1


def test_bias_shift_parts_mean_what_they_say() -> None:
    model, x, _ = BY_NAME["mlp-elu"].build()
    with bs.bias_shift(model, x) as shift, torch.no_grad():
        model[2].weight += 0.1
    assert not shift["0"].total.any() and not shift["2"].incoming.any() and not shift["4"].own.any()
    assert float(shift["2"].own.abs().min()) > 1e-4
    assert float(shift["4"].incoming.abs().min()) > 1e-4


def test_bias_shift_takes_batches_and_layers() -> None:
    model, x, _ = BY_NAME["conv-strided"].build()
    totals = []
    for data in (x, batches(x, (1, 7, 16))):
        fresh = copy.deepcopy(model)
        with bs.bias_shift(fresh, data) as shift:
            update(fresh)
        totals.append(shift["3"].total)
    close(totals[1], totals[0], 1e-12)
    with bs.bias_shift(model, x, layers=["3"]) as shift:
        pass
    assert set(shift) == {"3"}


def test_bias_shift_measures_in_eval_mode_and_an_optimizer_steps_in_training_mode() -> None:
    model, x, y = BY_NAME["batchnorm-eval"].build()
    expected_model = copy.deepcopy(model)
    model.train()
    model[6].eval()  # a mode of its own
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    F.cross_entropy(model(x), y).backward()
    grads = [p.grad.clone() for p in model.parameters()]
    expected_model.load_state_dict(model.state_dict())
    modes = [m.training for m in model.modules()]
    with bs.bias_shift(model, x) as shift:
        assert [m.training for m in model.modules()] == modes
        optimizer.step()
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))

    def step(copied: nn.Module) -> None:
        with torch.no_grad():
            for target, source in zip(copied.parameters(), model.parameters(), strict=True):
                target.copy_(source)

    expected = oracles.bias_shifts(expected_model.eval(), x, step)
    for name, parts in expected.items():
        close(shift[name].total, parts["total"], 1e-9)


# -- the model as it was found ---------------------------------------------------------------------


@contextmanager
def as_found(model: nn.Module) -> Iterator[None]:
    """Everything of the model and of the process that a measurement could touch."""

    def state() -> tuple[Any, ...]:
        parameters = [(n, id(p), p._version, p.requires_grad) for n, p in model.named_parameters()]
        modes = [(n, m.training, tuple(sorted(m.__dict__))) for n, m in model.named_modules()]
        process = (
            torch.get_default_dtype(),
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch.get_num_threads(),
        )
        return parameters, modes, process

    def tensors() -> list[Tensor]:
        grads = [torch.full((1,), -1.0) if p.grad is None else p.grad for p in model.parameters()]
        return [
            t.detach().clone()
            for t in (*model.parameters(), *model.buffers(), *grads, torch.get_rng_state())
        ]

    before, values = state(), tensors()
    yield
    assert state() == before
    assert all(torch.equal(one, other) for one, other in zip(tensors(), values, strict=True))
    pristine(model)


def prepared(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    """Gradients are there on some parameters, others have none."""
    model, x, y = BY_NAME[name].build()
    for index, parameter in enumerate(model.parameters()):
        if index % 2:
            parameter.grad = torch.full_like(parameter, 0.25)
    return model, x, y


MEASURES: dict[str, Callable[..., Any]] = {
    "unit_fisher": lambda model, x, y: bs.unit_fisher(model, x),
    "unit_fisher-expand": lambda model, x, y: bs.unit_fisher(model, x, weight_sharing="expand"),
    "unit_fisher-implicit": lambda model, x, y: bs.unit_fisher(model, x, storage="implicit")["0"].k,
    "unit_fisher-sampled": lambda model, x, y: bs.unit_fisher(
        model, x, labels="sampled", generator=torch.Generator().manual_seed(1)
    ),
    "unit_fisher-sampled-global": lambda model, x, y: bs.unit_fisher(model, x, labels="sampled"),
    "unit_fisher-empirical": lambda model, x, y: bs.unit_fisher(
        model, [(x, y)], labels="empirical"
    ),
    "activation_moments": lambda model, x, y: bs.activation_moments(model, x),
    "gradient_gap": lambda model, x, y: bs.gradient_gap(model, x, y),
    "bias_shift": lambda model, x, y: bs.bias_shift(model, x).__enter__(),
}
every_measure = pytest.mark.parametrize("measure", MEASURES)


@every_measure
@pytest.mark.parametrize(
    "name", ["mlp-frozen", "mlp-elu-inplace", "conv-no-bias", "batchnorm-eval"]
)
def test_the_model_is_left_as_found(name: str, measure: str) -> None:
    model, x, y = prepared(name)
    kept = x.clone()
    with as_found(model):
        MEASURES[measure](model, x, y)
    assert torch.equal(x, kept) and not x.requires_grad


@every_measure
def test_the_model_is_left_as_found_when_its_forward_raises(measure: str) -> None:
    class Raises(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise KeyError("the model's own")

    model, x, y = prepared("mlp-frozen")
    model.append(Raises())
    with as_found(model), pytest.raises(KeyError, match="the model's own"):
        MEASURES[measure](model, x, y)


def test_the_model_is_left_as_found_when_the_block_of_bias_shift_raises() -> None:
    model, x, _ = prepared("batchnorm-eval")
    model.train()
    with as_found(model), pytest.raises(KeyError, match="mine"), bs.bias_shift(model, x):
        raise KeyError("mine")


@every_measure
def test_measuring_works_under_no_grad_and_leaves_it_on(measure: str) -> None:
    model, x, y = prepared("mlp-elu")
    with torch.no_grad(), as_found(model):
        MEASURES[measure](model, x, y)


def test_measuring_twice_is_measuring_once() -> None:
    model, x, _ = BY_NAME["conv-strided"].build()
    first, second = bs.unit_fisher(model, x), bs.unit_fisher(model, x)
    assert all(torch.equal(first[name].k, second[name].k) for name in first)


def test_the_user_s_own_hooks_stay_and_fire_once_a_forward() -> None:
    model, x, _ = BY_NAME["mlp-elu"].build()
    fired: list[int] = []
    handle = model[2].register_forward_hook(lambda *_: fired.append(1))
    bs.activation_moments(model, x)
    assert len(fired) == 1 and len(model[2]._forward_hooks) == 1
    handle.remove()
    pristine(model)


# -- agreement with a gradient the user can compute ------------------------------------------------


def test_the_diagonal_is_the_mean_squared_gradient_of_single_examples() -> None:
    """The plainest route of all: one backward pass for every example and label."""
    model, x, _ = BY_NAME["conv-strided"].build()
    x = x[:6]
    total = torch.zeros_like(model[0].weight)
    for n in range(6):
        logits = model(x[n : n + 1]).log_softmax(-1)[0]
        for label in range(3):
            (g,) = torch.autograd.grad(logits[label], model[0].weight, retain_graph=True)
            total += logits[label].exp().detach() * g.square() / 6
    diagonal = bs.unit_fisher(model, x, layers=["0"])["0"].matrix().diagonal(dim1=1, dim2=2)[:, :-1]
    close(diagonal, total.flatten(1).detach(), 1e-12)
