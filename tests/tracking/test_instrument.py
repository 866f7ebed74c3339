"""`bs.instrument`: one tidy table of direct measurements, from a loop that stays as it is."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from cases import BY_NAME, pristine
from torch import Tensor, nn

import biasshift as bs

DOUBLE = torch.float64
KEYS = ["step", "layer", "unit"]
ACTIVATION = ["mean", "var"]
SHIFT = ["total", "own", "incoming", "second_order"]
MORE = ["coupling_corrected", "norm_cov_p", "cov_distance"]
UPDATES = ["shift_gradient", "shift_centered", "shift_natural"]
OWN_OF = ["own_gradient", "own_centered", "own_natural"]
MORE_GAP = ["norm_ratio_centered", "norm_ratio_diagonal", "gap_explained"]
VALUES = ["mean_delta2", "s", "k", "k0", "coupling", "effective_samples"]
FISHER = [*VALUES, "norm_mean_p", "norm_mean_q", "norm_corrected_mean"]
GAP = ["cos_gradient", "cos_centered", "cos_diagonal", "norm_ratio", "mean_in_abs"]
DAMPING = 1e-3


def mlp() -> tuple[nn.Module, Tensor, Tensor]:
    """Weight layers 0, 2, 4 of 6, 5, 3 units; activations 1, 3."""
    return BY_NAME["mlp-elu"].build()


def batches(
    steps: int, dtype: torch.dtype = DOUBLE, inputs: tuple[int, ...] = (5,)
) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(17)
    for _ in range(steps):
        x = torch.randn(8, *inputs, generator=generator, dtype=dtype) + 0.5
        yield x, torch.randint(3, (8,), generator=generator)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, **options: Any) -> None:
    """Somebody's training loop."""
    for x, y in batches(steps, **options):
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def logged(steps: int = 4, every: int = 2, **options: Any) -> tuple[Any, nn.Module]:
    model, x, y = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with bs.instrument(
        model, optimizer=optimizer, probe=(x, y), every=every, damping=DAMPING, **options
    ) as log:
        train(model, optimizer, steps)
    return log, model


def row(table: pd.DataFrame, step: int, layer: str) -> pd.DataFrame:
    """Unit rows of one layer at one step, in the order of units."""
    kept = table[(table["step"] == step) & (table["layer"] == layer) & (table["unit"] >= 0)]
    return kept.sort_values("unit")


def equal(column: pd.Series, value: Tensor, tolerance: float = 1e-12) -> None:
    scale = max(float(value.nan_to_num().abs().max()), 1e-300)
    torch.testing.assert_close(
        torch.tensor(column.to_numpy(), dtype=DOUBLE),
        value.double(),
        rtol=0,
        atol=tolerance * scale,
        equal_nan=True,
    )


# -- the table -------------------------------------------------------------------------------------


def test_columns_and_their_types() -> None:
    table = logged()[0].table()
    columns = KEYS + ACTIVATION + SHIFT + FISHER + GAP + MORE + UPDATES + MORE_GAP + OWN_OF
    columns += ["reliable"]
    assert list(table.columns) == columns
    assert all(pd.api.types.is_integer_dtype(table[name]) for name in ("step", "unit"))
    assert all(isinstance(name, str) for name in table["layer"])
    assert all(pd.api.types.is_float_dtype(table[name]) for name in table.columns[3:])
    assert table.index.tolist() == list(range(len(table)))


def test_one_row_for_every_step_layer_and_unit() -> None:
    table = logged()[0].table()
    assert not table.duplicated(KEYS).any()
    units = {"0": 6, "1": 6, "2": 5, "3": 5, "4": 3}
    for step in (0, 2, 4):
        at = table[table["step"] == step]
        for layer, count in units.items():
            expected = list(range(count)) if layer in ("1", "3") else [-1, *range(count)]
            assert sorted(at.loc[at["layer"] == layer, "unit"]) == expected


def test_values_stand_in_the_rows_they_belong_to() -> None:
    table = logged()[0].table()
    later, weights = table["step"] > 0, table["layer"].isin(["0", "2", "4"])
    units, step = table["unit"] >= 0, SHIFT + UPDATES + OWN_OF
    for columns, rows in (
        (ACTIVATION, ~weights),
        (FISHER, weights & units),
        (GAP, weights & ~units),
        (step, weights & units & later),
    ):
        for column in columns:
            assert table.loc[rows, column].notna().all(), column
            assert table.loc[~rows, column].isna().all(), column


@pytest.mark.parametrize(
    ("steps", "every", "expected"),
    [(5, 1, [0, 1, 2, 3, 4, 5]), (7, 3, [0, 3, 6]), (2, 5, [0]), (0, 1, [0])],
)
def test_steps_are_completed_optimizer_steps(steps: int, every: int, expected: list[int]) -> None:
    table = logged(steps, every)[0].table()
    assert table["step"].drop_duplicates().tolist() == expected


def test_the_table_can_be_read_while_training() -> None:
    model, x, y = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with bs.instrument(model, optimizer=optimizer, probe=(x, y), every=1) as log:
        assert log.table()["step"].unique().tolist() == [0]
        train(model, optimizer, 2)
        early = log.table()
        train(model, optimizer, 1)
    assert early["step"].unique().tolist() == [0, 1, 2]
    late = log.table()
    assert late["step"].unique().tolist() == [0, 1, 2, 3]
    pd.testing.assert_frame_equal(late.iloc[: len(early)], early)


# -- the values ------------------------------------------------------------------------------------


def direct(steps: int, every: int) -> dict[int, dict[str, Any]]:
    """The same training, measured by hand after the steps; the shift across them."""
    model, x, y = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def measure(shift: Any) -> dict[str, Any]:
        return {
            "shift": shift,
            "fishers": bs.unit_fisher(model, x, damping=DAMPING),
            "moments": bs.activation_moments(model, x),
            "gap": bs.gradient_gap(model, x, y, damping=DAMPING).set_index("layer"),
        }

    measured = {0: measure(None)}
    for step, (bx, by) in enumerate(batches(steps), start=1):
        optimizer.zero_grad()
        F.cross_entropy(model(bx), by).backward()
        if step % every:
            optimizer.step()
            continue
        with bs.bias_shift(model, x) as shift:
            optimizer.step()
        measured[step] = measure(shift)
    return measured


def test_values_are_those_of_direct_calls() -> None:
    table = logged(4, 2)[0].table()
    for step, measured in direct(4, 2).items():
        for layer, moments in measured["moments"].items():
            equal(row(table, step, layer)["mean"], moments.mean)
            equal(row(table, step, layer)["var"], moments.var)
        for layer, fisher in measured["fishers"].items():
            rows = row(table, step, layer)
            for column in VALUES:
                equal(rows[column], getattr(fisher, column), 1e-9)
            equal(rows["norm_mean_q"], fisher.mean_q.norm(dim=1))
            equal(rows["norm_mean_p"], fisher.mean_p.norm().expand(len(rows)))
            equal(rows["norm_corrected_mean"], fisher.corrected_mean.norm(dim=1), 1e-9)
            if step:
                for column in SHIFT:
                    equal(rows[column], getattr(measured["shift"][layer], column), 1e-9)
        layer_rows = table[(table["step"] == step) & (table["unit"] == -1)].set_index("layer")
        for layer in ("0", "2", "4"):
            for column in GAP:
                expected = pytest.approx(measured["gap"].loc[layer, column], rel=1e-9)
                assert layer_rows.loc[layer, column] == expected, (step, layer, column)


def test_values_move_with_training() -> None:
    """What a table of stale measurements would not show."""
    table = logged(4, 2)[0].table()
    for layer, column in (("0", "s"), ("2", "k"), ("1", "mean")):
        first, last = (row(table, step, layer)[column].to_numpy() for step in (0, 4))
        assert (abs(first - last) > 1e-6 * abs(first)).all()


def test_the_parts_of_the_shift_add_up() -> None:
    table = logged(6, 1)[0].table()
    rows = table[table["total"].notna()]
    assert len(rows) == 6 * 14
    residual = rows["total"] - (rows["own"] + rows["incoming"] + rows["second_order"])
    assert residual.abs().max() < 1e-14
    assert rows["total"].abs().max() > 1e-3
    assert (rows.loc[rows["layer"] == "0", "incoming"].abs() == 0).all()  # nothing below it moves


def test_the_shifts_of_single_steps_add_up_to_the_whole() -> None:
    model, x, _ = mlp()
    with torch.no_grad():
        before = model[:3](x).mean(0)
    log, trained = logged(5, 1)
    with torch.no_grad():
        after = trained[:3](x).mean(0)
    table = log.table()
    totals = table[(table["layer"] == "2") & (table["unit"] >= 0)].groupby("unit")["total"].sum()
    equal(totals.sort_index(), after - before, 1e-10)


@pytest.mark.parametrize(
    ("quantities", "columns"),
    [
        (("activations",), ACTIVATION),
        (("bias_shift",), SHIFT),
        (("fisher",), FISHER + MORE + ["reliable"]),
        (("gap",), GAP + UPDATES + MORE_GAP + OWN_OF),
        (("fisher", "gap"), FISHER + MORE + GAP + UPDATES + MORE_GAP + OWN_OF + ["reliable"]),
    ],
)
def test_only_the_quantities_asked_for(quantities: tuple[str, ...], columns: list[str]) -> None:
    table = logged(2, 2, quantities=quantities)[0].table()
    full = logged(2, 2)[0].table()
    assert list(table.columns) == list(full.columns)
    assert {name for name in table.columns[3:] if table[name].notna().any()} == set(columns)
    keep = full[columns].notna().any(axis=1)
    values, expected = table.dropna(subset=columns, how="all"), full[keep]
    assert values[KEYS].reset_index(drop=True).equals(expected[KEYS].reset_index(drop=True))
    for column in columns:
        equal(values[column], torch.tensor(expected[column].to_numpy()))


def test_layers_and_units_filter_and_keep_their_indices() -> None:
    table = logged(1, 1, layers=["2"], units=[1, 4])[0].table()
    weights = table[table["mean"].isna()]
    assert set(weights["layer"]) == {"2"}
    full = logged(1, 1)[0].table()
    rows = weights[weights["unit"] >= 0]
    assert rows["unit"].unique().tolist() == [1, 4]
    expected = row(full, 1, "2").set_index("unit").loc[[1, 4], "k"]
    equal(row(table, 1, "2")["k"], torch.tensor(expected.to_numpy()), 1e-9)


def test_other_likelihoods_and_label_rules() -> None:
    model, x, y = BY_NAME["mlp-bernoulli"].build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options = {"likelihood": "bernoulli", "labels": "empirical", "damping": DAMPING}
    with bs.instrument(model, optimizer=optimizer, probe=(x, y), **options) as log:
        pass
    fisher = bs.unit_fisher(model, [(x, y)], **options)["2"]
    equal(row(log.table(), 0, "2")["mean_delta2"], fisher.c)
    expected = bs.unit_fisher(model, x, likelihood="bernoulli", damping=DAMPING)["2"]
    assert float((fisher.c - expected.c).abs().max()) > 1e-3 * float(expected.c.max())


def test_sampled_labels_follow_the_generator() -> None:
    tables = [
        logged(2, 1, labels="sampled", generator=torch.Generator().manual_seed(seed))[0].table()
        for seed in (0, 0, 1)
    ]
    pd.testing.assert_frame_equal(tables[0], tables[1])
    assert not tables[0]["k"].equals(tables[2]["k"])


def test_the_layers_frame() -> None:
    layers = logged(0)[0].layers
    assert list(layers.columns)[:4] == ["layer", "kind", "units", "fed_by"]
    by_name = layers.set_index("layer")
    assert by_name.index.tolist() == ["0", "1", "2", "3", "4"]
    assert by_name["units"].tolist() == [6, 6, 5, 5, 3]
    assert by_name.loc[["0", "2", "4"], "kind"].nunique() == 1
    assert by_name.loc["0", "kind"] != by_name.loc["1", "kind"]
    assert by_name.loc[["2", "4"], "fed_by"].tolist() == ["1", "3"]
    assert by_name.loc["0", "fed_by"] not in list(by_name.index)  # the data


def test_a_convolution_and_batchnorm_in_training_mode() -> None:
    """Measured in eval mode, on the probe."""
    model, x, y = BY_NAME["batchnorm-eval"].build()
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with bs.instrument(model, optimizer=optimizer, probe=(x, y), every=1, damping=DAMPING) as log:
        train(model, optimizer, 2, inputs=(2, 5, 5))
    assert all(module.training for module in model.modules())
    table = log.table()
    fishers = bs.unit_fisher(model.eval(), x, damping=DAMPING)
    for layer in ("4", "6"):
        equal(row(table, 2, layer)["k"], fishers[layer].k, 1e-8)
    assert row(table, 2, "0")[["s", "k", "k0"]].isna().all().all()  # no bias to correct with
    equal(row(table, 2, "0")["coupling"], fishers["0"].coupling, 1e-8)


def test_a_layer_that_does_not_run_has_no_rows() -> None:
    """As `unit_fisher` leaves it out."""
    model, x, y = mlp()
    model[1].register_module("spare", nn.Linear(2, 2).double())
    assert list(bs.unit_fisher(model, x)) == ["0", "2", "4"]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with bs.instrument(model, optimizer=optimizer, probe=(x, y), every=1, damping=DAMPING) as log:
        train(model, optimizer, 1)
    table = log.table()
    assert set(table.loc[table["k"].notna(), "layer"]) == {"0", "2", "4"}


def test_activations_of_a_model_with_a_layer_that_cannot_be_measured() -> None:
    """Maps with their classes on axis 1 have moments without a word about the axis.

    A bilinear layer is left out, and its activation is not.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.ConvTranspose2d(2, 3, 3), nn.ReLU())
    x = torch.randn(6, 1, 5, 5)
    moments = bs.activation_moments(model, x)
    with bs.instrument(model) as log:
        model(x)
    rows = log.table()
    equal(rows[rows["layer"] == "3"].sort_values("unit")["mean"], moments["3"].mean, 1e-6)
    with pytest.raises(ValueError, match=r"axis 1, not on the last\. Give class_axis=1"):
        bs.unit_fisher(model, x)
    assert list(bs.unit_fisher(model, x, class_axis=1)) == ["0", "2"]

    class Pairs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.pairs, self.act = nn.Linear(5, 4), nn.Bilinear(4, 4, 3), nn.ELU()
            self.head = nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.stem(x).tanh()
            return self.head(self.act(self.pairs(h, h)))

    model, x, y = Pairs(), torch.randn(40, 5), torch.arange(40) % 3
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"Layer 'pairs' \(Bilinear\) cannot be measured"):
        bs.instrument(model, optimizer, probe=(x, y), uncovered="raise")
    with pytest.warns(bs.UncoveredWarning, match=r"'pairs' \(Bilinear\): ") as caught:
        log = bs.instrument(model, optimizer, probe=(x, y), every=1)
    assert sum(warning.category is bs.UncoveredWarning for warning in caught) == 1
    quiet = bs.instrument(model, optimizer, probe=(x, y), every=1, skip=["pairs"])
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    log.remove()
    quiet.remove()
    assert set(log.table().layer) == {"stem", "act", "head"}
    assert log.table().equals(quiet.table())
    last = log.table()[lambda rows: (rows.step == 2) & (rows.layer == "head") & (rows.unit >= 0)]
    equal(last["mean_delta2"], bs.unit_fisher(model, x, layers=["head"])["head"].c.float(), 1e-6)


# -- the loop is untouched -------------------------------------------------------------------------


def random_net() -> nn.Module:
    """BatchNorm and dropout: anything that is disturbed shows."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Linear(5, 6),
            nn.BatchNorm1d(6),
            nn.ELU(inplace=True),
            nn.Dropout(0.3),
            nn.Linear(6, 3),
        ).double()


def run(
    build: Callable[[nn.Module, torch.optim.Optimizer], Any] | None,
) -> tuple[nn.Module, torch.optim.Optimizer, Tensor]:
    model = random_net()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        if build is None:
            train(model, optimizer, 5)
        else:
            with build(model, optimizer):
                train(model, optimizer, 5)
        return model, optimizer, torch.get_rng_state()


INSTRUMENTS: dict[str, Callable[[nn.Module, torch.optim.Optimizer], Any]] = {
    "probe": lambda model, optimizer: bs.instrument(
        model, optimizer=optimizer, probe=probe(), every=2
    ),
    "sampled": lambda model, optimizer: bs.instrument(
        model,
        optimizer=optimizer,
        probe=probe(),
        every=1,
        labels="sampled",
        generator=torch.Generator().manual_seed(0),
    ),
    "no-probe": lambda model, optimizer: bs.instrument(model),
}


def probe() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(20, 5, generator=generator, dtype=DOUBLE)
    return x, torch.randint(3, (20,), generator=generator)


@pytest.mark.parametrize("kind", INSTRUMENTS)
def test_training_is_bit_identical(kind: str) -> None:
    plain, optimizer, rng = run(None)
    measured, measured_optimizer, measured_rng = run(INSTRUMENTS[kind])
    for name, value in plain.state_dict().items():
        assert torch.equal(measured.state_dict()[name], value), name
    assert str(optimizer.state_dict()) == str(measured_optimizer.state_dict())
    assert torch.equal(rng, measured_rng)
    assert all(
        torch.equal(p.grad, q.grad)
        for p, q in zip(plain.parameters(), measured.parameters(), strict=True)
    )
    assert not torch.equal(random_net()[0].weight, measured[0].weight)  # it has learned


def nothing_left(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
    pristine(model)
    if optimizer is not None:
        assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks
        assert "step" not in optimizer.__dict__  # nor replaced


def attributes(model: nn.Module) -> list[tuple[str, ...]]:
    return [tuple(sorted(module.__dict__)) for module in model.modules()]


@pytest.mark.parametrize("kind", INSTRUMENTS)
def test_the_with_block_leaves_nothing_behind(kind: str) -> None:
    model = random_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = attributes(model)
    with INSTRUMENTS[kind](model, optimizer):
        train(model, optimizer, 2)
    nothing_left(model, optimizer)
    assert attributes(model) == before
    assert [module.training for module in model.modules()] == [True] * len(before)


@pytest.mark.parametrize("kind", INSTRUMENTS)
def test_an_exception_in_the_loop_leaves_nothing_behind_and_the_rows_stay(kind: str) -> None:
    model = random_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(KeyError, match="mine"), INSTRUMENTS[kind](model, optimizer) as log:
        train(model, optimizer, 2)
        raise KeyError("mine")
    nothing_left(model, optimizer)
    assert len(log.table()) > 0


@pytest.mark.parametrize("kind", INSTRUMENTS)
def test_remove_leaves_nothing_behind_and_may_be_called_twice(kind: str) -> None:
    model = random_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    log = INSTRUMENTS[kind](model, optimizer)
    train(model, optimizer, 2)
    before = log.table()
    log.remove()
    log.remove()
    nothing_left(model, optimizer)
    train(model, optimizer, 2)
    pd.testing.assert_frame_equal(log.table(), before)


def test_a_probe_that_cannot_be_measured_leaves_nothing_behind() -> None:
    model, x, y = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises((ValueError, RuntimeError)):
        bs.instrument(model, optimizer=optimizer, probe=(x[:, :3], y)).__enter__()
    nothing_left(model, optimizer)


def test_the_user_s_hooks_on_the_optimizer_stay() -> None:
    model, x, y = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    calls: list[int] = []
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    with bs.instrument(model, optimizer=optimizer, probe=(x, y)):
        train(model, optimizer, 3)
    assert calls == [1, 1, 1] and len(optimizer._optimizer_step_post_hooks) == 1


def test_a_mode_of_its_own_stays() -> None:
    model = random_net()
    model[1].eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    modes = [module.training for module in model.modules()]
    with bs.instrument(model, optimizer=optimizer, probe=probe(), every=1):
        train(model, optimizer, 1)
        assert [module.training for module in model.modules()] == modes
    assert [module.training for module in model.modules()] == modes


# -- steps that a gradient scaler skips ------------------------------------------------------------


@pytest.mark.parametrize("fused", [False, True])
def test_a_skipped_step_writes_no_row(fused: bool) -> None:
    """Four backward passes, the second of them infinite. A fused optimizer is called all the same
    and skips inside its kernel.
    """
    model, x, y = mlp()
    model, x = model.float(), x.float()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    weights = [model[0].weight.detach().clone()]
    with bs.instrument(model, optimizer=optimizer, probe=(x, y), every=1) as log:
        for index, (bx, by) in enumerate(batches(4, torch.float32)):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(bx), by)
            scaler.scale(loss * (float("inf") if index == 1 else 1.0)).backward()
            scaler.step(optimizer)
            scaler.update()
            weights.append(model[0].weight.detach().clone())
    assert torch.equal(weights[1], weights[2])  # it was skipped
    assert not torch.equal(weights[2], weights[3])
    table = log.table()
    assert table["step"].drop_duplicates().tolist() == [0, 1, 2, 3]
    assert all(row(table, step, "0")["total"].abs().max() > 0 for step in (1, 2, 3))


# -- without a probe -------------------------------------------------------------------------------


def test_without_a_probe_training_batches_are_accumulated() -> None:
    model, _, _ = mlp()
    data = [x for x, _ in batches(3)]
    log = bs.instrument(model)
    for x in data:
        model(x)
    model.eval()
    model(100 * data[0])  # does not count
    model.train()
    table = log.table()
    log.remove()
    expected = bs.activation_moments(model, torch.cat(data))
    assert set(table["layer"]) >= {"1", "3"}
    for layer in ("1", "3"):
        rows = table[table["layer"] == layer].sort_values("unit")
        assert rows["unit"].tolist() == list(range(len(expected[layer].mean)))
        equal(rows["mean"], expected[layer].mean)
        equal(rows["var"], expected[layer].var)


def test_without_a_probe_flush_starts_anew() -> None:
    model, _, _ = mlp()
    (first, _), (second, _) = batches(2)
    with bs.instrument(model) as log:
        model(first)
        whole = log.table()
        model(second)
        both = log.table()
        log.flush()
        model(second)
        last = log.table()
    for table, data in ((whole, first), (both, torch.cat([first, second])), (last, second)):
        equal(
            table[table["layer"] == "1"].sort_values("unit")["mean"],
            bs.activation_moments(model, data)["1"].mean,
        )


def test_without_a_probe_forwards_of_a_real_loop_count_once_each() -> None:
    """In single precision; a step moves the weights between batches, so the totals are those of the
    models as they were.
    """
    model, _, _ = mlp()
    model = model.float()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    twin, activations = copy.deepcopy(model), []
    twin_optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    for x, y in batches(3, torch.float32):
        h = F.elu(twin[0](x))
        activations.append(h.detach())
        loss = F.cross_entropy(twin[2:](h), y)
        twin_optimizer.zero_grad()
        loss.backward()
        twin_optimizer.step()
    with bs.instrument(model) as log:
        train(model, optimizer, 3, dtype=torch.float32)
    rows = log.table()
    rows = rows[rows["layer"] == "1"].sort_values("unit")
    expected = torch.cat(activations).double()
    equal(rows["mean"], expected.mean(0), 1e-6)
    equal(rows["var"], expected.var(0, correction=0), 1e-5)


def test_without_a_probe_large_means_do_not_cancel() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Identity())
    nn.init.eye_(model[0].weight)
    nn.init.constant_(model[0].bias, 1000.0)
    data = torch.randn(4, 200, 3, generator=torch.Generator().manual_seed(0))
    with bs.instrument(model) as log:
        for x in data:
            model(x)
    rows = log.table()
    rows = rows[rows["layer"] == "1"].sort_values("unit")
    out = model(data.flatten(0, 1)).detach().double()
    equal(rows["var"], out.var(0, correction=0), 1e-3)


def test_a_log_whose_hooks_never_fired_raises() -> None:
    model, x, _ = mlp()
    with bs.instrument(model) as log, pytest.raises(RuntimeError, match=r"forward|never|training"):
        log.table()
    with bs.instrument(model.eval()) as log:
        model(x)
        with pytest.raises(RuntimeError, match=r"training"):
            log.table()


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"optimizer": None}, "optimizer"),
        ({"every": 0}, "every"),
        ({"quantities": ("activations", "loss")}, "quantities|loss"),
        ({"likelihood": "poisson"}, "likelihood|poisson"),
        ({"labels": "true"}, "labels|true"),
        ({"layers": ["0", "9"]}, "9"),
        ({"damping": -1.0}, "damping"),
    ],
    ids=["optimizer", "every", "quantities", "likelihood", "labels", "layers", "damping"],
)
def test_bad_arguments_are_refused_on_entry(options: dict[str, Any], words: str) -> None:
    model, x, y = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises((ValueError, TypeError), match=words):
        bs.instrument(model, **{"optimizer": optimizer, "probe": (x, y), **options}).__enter__()
    nothing_left(model, optimizer)


# -- optimizers inside of others, and steps that are not seen --------------------------------------


class Delegating:
    """A wrapper that is no optimizer of PyTorch, as those of warm-up schedules are."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()

    def step(self) -> None:
        self.optimizer.step()


class Uninitialized(torch.optim.Optimizer):
    """A subclass that skips ``Optimizer.__init__``, as Lookahead and accelerate's do."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer, self.param_groups = optimizer, getattr(optimizer, "param_groups", [])

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)

    def step(self, closure: Any = None) -> Any:
        return self.optimizer.step(closure)


class Lookahead(torch.optim.Optimizer):
    """A wrapper with hooks of its own, whose step does more than the optimizer inside does."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(optimizer.param_groups, {})
        self.optimizer = optimizer

    def step(self, closure: Any = None) -> None:
        self.optimizer.step(closure)
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    p.mul_(0.9)


WRAPPERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "no optimizer": Delegating,
    "without __init__": Uninitialized,
    "twice": lambda optimizer: Delegating(Uninitialized(optimizer)),
    "with hooks": Lookahead,
}


@pytest.mark.parametrize("probed", [True, False])
@pytest.mark.parametrize("kind", WRAPPERS)
def test_steps_of_wrapped_optimizers_are_measured(kind: str, probed: bool) -> None:
    """The own shift, against mean net inputs before and after the step."""
    model, x, y = mlp()
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = WRAPPERS[kind](inner)
    with torch.no_grad():
        before = model[0](x).mean(0)
    options = {"probe": (x, y), "every": 1} if probed else {}
    with bs.instrument(model, optimizer, **options) as log:
        train(model, optimizer, 1)
        assert log.step == 1
        if probed:
            with torch.no_grad():
                equal(row(log.table(), 1, "0")["total"], model[0](x).mean(0) - before)
        train(model, optimizer, 2)
    assert log.step == 3
    nothing_left(model, inner)


def loop(wrapper: type) -> Any:
    """A wrapper of itself."""
    optimizer = wrapper(None)
    optimizer.optimizer = optimizer
    return optimizer


@pytest.mark.parametrize("probed", [True, False])
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda model: model, r"must be a torch\.optim\.Optimizer.*got Sequential"),
        (lambda model: torch.optim.SGD, r"must be a torch\.optim\.Optimizer.*got type"),
        (lambda model: list(model.parameters()), "got list"),
        (lambda model: "sgd", "got str"),
        (lambda model: Delegating(None), "got Delegating.*Of a wrapper, give the optimizer inside"),
        (lambda model: Uninitialized("sgd"), "got Uninitialized.*give the optimizer inside"),
        (lambda model: loop(Delegating), "got Delegating"),
        (lambda model: loop(Uninitialized), "got Uninitialized"),
        (
            lambda model: torch.optim.SGD(copy.deepcopy(model).parameters(), 0.1),
            "SGD holds none of its parameters",
        ),
        (
            lambda model: Delegating(torch.optim.Adam(copy.deepcopy(model).parameters())),
            "Delegating holds none of its parameters",
        ),
    ],
)
def test_what_cannot_be_counted_is_refused(
    make: Callable[[nn.Module], Any], words: str, probed: bool
) -> None:
    model, x, y = mlp()
    with pytest.raises(ValueError, match=words):
        bs.instrument(model, make(model), probe=(x, y) if probed else None)
    nothing_left(model)


@pytest.mark.parametrize("part", ["head", "views", "wrapped"])
def test_an_optimizer_of_a_part_of_the_model_counts(part: str) -> None:
    """One layer of it, or tensors that its parameters are views into, as an ensemble's are."""
    model, x, y = mlp()
    if part == "views":
        flat = nn.Parameter(torch.cat([p.detach().flatten() for p in model.parameters()]))
        sizes = [p.numel() for p in model.parameters()]
        for p, view in zip(model.parameters(), flat.data.split(sizes), strict=True):
            p.data = view.view_as(p)
        optimizer = torch.optim.SGD([flat], lr=0.1)
    else:
        optimizer = torch.optim.SGD(model[4].parameters(), lr=0.1)
    measured = nn.DataParallel(model) if part == "wrapped" else model
    with bs.instrument(measured, optimizer, probe=(x, y), every=1) as log:
        optimizer.step()
    assert log.step == 1


class Sharpness(torch.optim.Optimizer):
    """SAM, as it is widely written: two half steps, and an optimizer inside under another name."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model.parameters(), {"lr": 0.1})
        self.base = torch.optim.SGD(self.param_groups)

    def first_step(self) -> None:
        with torch.no_grad():
            for p in self.param_groups[0]["params"]:
                p.add_(0.01 * p.grad)

    def second_step(self) -> None:
        self.base.step()


def unseen(kind: str, model: nn.Module, optimizer: Any) -> None:
    """One step of training that the hooks of the optimizer do not see."""
    (x, y), *_ = batches(1)
    F.cross_entropy(model(x), y).backward()
    if kind == "sam":
        optimizer.first_step()
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.second_step()
        optimizer.zero_grad()
    elif kind == "another":
        torch.optim.SGD(model.parameters(), lr=0.1).step()
    elif kind == "by hand":
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.1 * p.grad
        model.zero_grad()


@pytest.mark.parametrize("probed", [True, False])
@pytest.mark.parametrize("leaves", ["block", "remove"])
@pytest.mark.parametrize("kind", ["sam", "another", "by hand", "never"])
def test_training_without_a_step_seen_is_warned_of_once(
    kind: str, leaves: str, probed: bool
) -> None:
    model, x, y = mlp()
    optimizer = Sharpness(model) if kind == "sam" else torch.optim.SGD(model.parameters(), lr=0.1)
    log = bs.instrument(model, optimizer, probe=(x, y) if probed else None, every=1)
    unseen(kind, model, optimizer)
    with pytest.warns(RuntimeWarning, match=r"no step of S\w+ was seen.*SAM.*Give the") as caught:
        if leaves == "remove":
            log.remove()
        else:
            with log:
                pass
        log.remove()
    assert len(caught) == 1
    nothing_left(model, optimizer)


def test_no_warning_without_training_without_an_optimizer_and_after_an_exception() -> None:
    model, x, y = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with bs.instrument(model, optimizer, probe=(x, y)):
        bs.unit_fisher(model, x)
        bs.gradient_gap(model, x, y)
        model.eval()(x)
        model.train()
    with bs.instrument(model):
        unseen("by hand", model, None)
    with pytest.raises(KeyError), bs.instrument(model, optimizer, probe=(x, y)):
        unseen("by hand", model, None)
        raise KeyError("mine")
    model, x = model.float(), x.float()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    with bs.instrument(model, optimizer, probe=(x, y), every=1) as log:
        scaler.scale(F.cross_entropy(model(x), y) * float("inf")).backward()
        scaler.step(optimizer)  # seen, and skipped inside
    assert log.step == 0


# -- resumed training, and rows that are sent on ---------------------------------------------------


def test_steps_are_counted_from_where_training_is_resumed():
    model, x, y = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with bs.instrument(model, optimizer, (x, y), every=4, quantities="activations", step=6) as log:
        train(model, optimizer, 4)
    assert sorted(set(log.table().step)) == [6, 8] and log.step == 10
    with bs.instrument(model, optimizer, step=6) as batch_log:
        train(model, optimizer, 4)
    assert set(batch_log.table().step) == {10}
    for wrong in (-1, True):
        with pytest.raises(ValueError, match="'step' must be a number of completed steps"):
            bs.instrument(model, optimizer, (x, y), step=wrong)


def test_a_follower_gets_all_rows_once():
    model, x, y = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    received = []
    with bs.instrument(model, optimizer, (x, y), every=2, quantities="activations") as log:
        train(model, optimizer, 2)
        log.follow(received.append)
        train(model, optimizer, 4)
        log.flush()
    assert [sorted(set(rows.step)) for rows in received] == [[0, 2], [4], [6]]
    assert list(received[0]) == list(received[1]) == list(log.table())
    late = []
    log.follow(late.append)  # of rows that are flushed
    assert not late


@pytest.mark.parametrize("receive", [3, None, "print"])
def test_a_receiver_must_be_a_function(receive):
    model = nn.Sequential(nn.Linear(3, 2), nn.ELU())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    with (
        bs.instrument(model, optimizer, probe=x, quantities=("activations",)) as log,
        # A TypeError where the types of all calls are checked.
        pytest.raises((ValueError, TypeError), match=r"'receive'|callable|Callable"),
    ):
        log.follow(receive)
