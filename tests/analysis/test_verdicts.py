"""Verdicts on planted sweeps: updates, learning rates, constants, batch norm, and what is measured
along a run.
"""

import itertools
import math

import numpy as np
import pandas as pd
import pytest
from planted import Planted, table

from biasshift.analysis.formatting import reading_table, sweep_table
from biasshift.analysis.grid import Cell, best_rate, cells_of, paper_runs
from biasshift.analysis.layer_points import points_of, rank_correlations
from biasshift.analysis.learning_curves import common_levels, curves_of, loss_after, reached
from biasshift.analysis.quantities import drifts, per_run
from biasshift.analysis.verdicts import claims

SEEDS = range(6)
SEED_SPEED = [1.0, 1.1, 0.93, 1.04, 0.9, 1.02]  # what a seed does to the speed of all its networks
JITTER = [0.01, -0.02, 0.015, -0.005, 0.02, -0.01]  # what it does to one of them
MIXED = [0.3, -0.25, 0.2, -0.3, 0.28, -0.2]


def row(verdicts: pd.DataFrame, claim: str) -> pd.Series:
    (where,) = np.flatnonzero(verdicts["claim"] == claim)
    return verdicts.iloc[where]


def sweep(
    rates: dict[Cell, float],
    spread: dict[Cell, list[float]] | None = None,
    seconds: dict[Cell, float] | None = None,
):
    """Networks whose loss falls exponentially, at a rate per step for each cell: ln of the steps to
    any loss is −ln rate + const.
    """
    runs = []
    for number, (cell, rate) in enumerate(rates.items()):
        off = (spread or {}).get(cell, JITTER[number:] + JITTER[:number])
        settings = {"update": cell.update, "constant": cell.constant, "batch_norm": cell.batch_norm}
        for seed in SEEDS:
            speed = rate * SEED_SPEED[seed] * math.exp(off[seed])
            runs.append(
                Planted(
                    cell.activation,
                    seed,
                    rate=speed,
                    step_seconds=(seconds or {}).get(cell, 0.1),
                    settings=settings,
                )
            )
    return table(runs)


RELU, ELU = Cell("relu"), Cell("elu")
CENTERED, ELU_CENTERED = Cell("relu", "centered"), Cell("elu", "centered")
GAP = {RELU: 0.02, ELU: 0.04}


# -- the causal claim ------------------------------------------------------------------------------


@pytest.mark.parametrize("update", ["centered", "quasi-diagonal"])
@pytest.mark.parametrize(
    ("closed", "expected"), [(0.5, "supported"), (1.2, "supported"), (-0.4, "not supported")]
)
def test_the_share_of_the_gap_that_an_update_closes(update, closed, expected):
    updated = Cell("relu", update)
    rates = {**GAP, updated: 0.02 * 2**closed}
    verdicts = claims(sweep(rates, dict.fromkeys(rates, [0.0] * 6) | {updated: JITTER}))
    steps = row(verdicts, f"closes-{update}-steps")
    jitter = 100 * np.mean(JITTER) / math.log(2)
    assert steps["effect"] == pytest.approx(100 * closed + jitter) and steps["verdict"] == expected
    assert (
        steps["low"] < 100 * closed < steps["high"]
        and steps["n"] == 6
        and steps["test"].endswith("effect > 0")
    )
    end = row(verdicts, f"closes-{update}-steps-loss")
    assert (
        end["effect"] == pytest.approx(100 * (2**closed - 1), abs=3) and end["verdict"] == expected
    )


def test_an_update_that_helps_now_and_then_decides_nothing():
    verdicts = claims(sweep({**GAP, CENTERED: 0.02}, {CENTERED: MIXED}))
    assert (
        row(verdicts, "closes-centered-steps")["verdict"]
        == row(verdicts, "closes-centered-steps-loss")["verdict"]
        == "undecided"
    )


def test_without_a_gap_there_is_nothing_to_close():
    verdicts = claims(
        sweep({RELU: 0.02, ELU: 0.02, CENTERED: 0.03}, {ELU: MIXED, RELU: [-x for x in MIXED]})
    )
    judged = row(verdicts, "closes-centered-steps")
    assert judged["verdict"] == "undecided" and "no gap to close" in judged["caveat"]
    behind = claims(sweep({RELU: 0.04, ELU: 0.02, CENTERED: 0.05}))
    assert row(behind, "closes-centered-steps")[["verdict"]].tolist() == ["undecided"]
    assert "no gap to close" in row(behind, "closes-centered-steps")["caveat"]


def test_the_gap_is_looked_at_at_two_losses_and_at_the_end():
    verdicts = claims(sweep({**GAP, CENTERED: 0.02 * 2**0.5}))
    family = verdicts[verdicts["family"] == "closes-centered-steps"]
    levels = [float(name.rpartition(" ")[2]) for name in family["statistic"] if "steps to" in name]
    assert list(family["claim"]) == [
        f"closes-centered-steps-{levels[0]:g}",
        "closes-centered-steps",
        "closes-centered-steps-loss",
    ]
    assert (
        levels[0] > levels[1]
        and (family["p_holm"] == 3 / 64).all()
        and (family["verdict"] == "supported").all()
    )
    assert family["effect"].iloc[:2].tolist() == pytest.approx([50, 50], abs=4)


def test_at_equal_time_a_slow_step_costs_what_it_won():
    """Half of the gap in ln steps, 0.35, at steps that take three times as long: ln 3 − 0.35 is
    lost.
    """
    verdicts = claims(sweep({**GAP, CENTERED: 0.02 * 2**0.5}, seconds={CENTERED: 0.3}))
    assert row(verdicts, "closes-centered-steps")["verdict"] == "supported"
    time = row(verdicts, "closes-centered-time")
    assert (
        time["effect"] == pytest.approx(100 * (0.5 - math.log(3) / math.log(2)), abs=6)
        and time["verdict"] == "not supported"
    )
    assert row(verdicts, "closes-centered-time-loss")["verdict"] == "not supported"


def test_without_seconds_the_row_says_so():
    verdicts = claims(sweep({**GAP, CENTERED: 0.03}).drop(columns="seconds"))
    assert row(verdicts, "closes-centered-time")[["n", "verdict"]].tolist() == [0, "undecided"]
    assert "no seconds" in row(verdicts, "closes-centered-time")["caveat"]
    assert row(verdicts, "closes-centered-steps")["verdict"] == "supported"


@pytest.mark.parametrize(("gain", "expected"), [(1.05, "supported"), (3.0, "not supported")])
def test_the_update_helps_elu_less(gain, expected):
    verdicts = claims(sweep({RELU: 0.02, ELU: 0.03, CENTERED: 0.03, ELU_CENTERED: 0.03 * gain}))
    judged = row(verdicts, "helps-less-centered")
    assert (
        judged["effect"] == pytest.approx(math.log(gain) - math.log(1.5), abs=0.03)
        and judged["verdict"] == expected
    )


def test_an_update_that_helps_both_alike_decides_nothing():
    verdicts = claims(
        sweep({RELU: 0.02, ELU: 0.03, CENTERED: 0.03, ELU_CENTERED: 0.045}, {ELU_CENTERED: MIXED})
    )
    assert row(verdicts, "helps-less-centered")["verdict"] == "undecided"


@pytest.mark.parametrize(
    ("slow", "slow_centered", "expected"),
    [
        (0.5, 1.0, ("supported", "supported")),
        (1.5, 1.0, ("not supported", "not supported")),
        (0.5, 0.2, ("supported", "not supported")),
    ],
)
def test_a_constant_slows_sgd_and_not_the_centered_update(slow, slow_centered, expected):
    moved, moved_centered = Cell("elu", constant=0.5), Cell("elu", "centered", 0.5)
    verdicts = claims(
        sweep(
            {
                ELU: 0.03,
                moved: 0.03 * slow,
                ELU_CENTERED: 0.04,
                moved_centered: 0.04 * slow_centered,
            }
        )
    )
    plain, centered = row(verdicts, "constant-0.5"), row(verdicts, "constant-0.5-centered")
    assert (plain["verdict"], centered["verdict"]) == expected
    assert plain["effect"] == pytest.approx(-math.log(slow), abs=0.03)
    assert centered["effect"] == pytest.approx(math.log(slow) - math.log(slow_centered), abs=0.05)
    assert (
        f"slowed by {-math.log(slow_centered):+.1f}"[:14] in centered["caveat"]
        or slow_centered == 1.0
    )


def test_a_constant_that_does_nothing_decides_nothing():
    moved = Cell("elu", constant=0.5)
    assert (
        row(claims(sweep({ELU: 0.03, moved: 0.03}, {moved: MIXED})), "constant-0.5")["verdict"]
        == "undecided"
    )


# -- speed, batch norm -----------------------------------------------------------------------------


def test_steps_to_several_losses_against_each_other_activation():
    verdicts = claims(
        sweep(
            {ELU: 0.03, RELU: 0.02, Cell("srelu"): 0.05, Cell("lrelu"): 0.03},
            {Cell("lrelu"): MIXED},
        )
    )
    for level in ("1", "0.5"):
        assert row(verdicts, f"speed-{level}")["effect"] == pytest.approx(-math.log(1.5), abs=0.03)
        assert row(verdicts, f"speed-{level}")["verdict"] == "supported"
    assert row(verdicts, "speed-srelu-0.2")["verdict"] == "not supported"
    assert row(verdicts, "speed-lrelu-0.5")["verdict"] == "undecided"
    # With 0.5 and the equal loss.
    assert row(verdicts, "speed-1")[["p", "p_holm"]].tolist() == [1 / 64, 3 / 64]
    assert row(verdicts, "speed-1")["p_holm_all"] > 0.05


def test_batch_norm_is_judged_only_where_there_is_some():
    normed, elu_normed = Cell("relu", batch_norm=True), Cell("elu", batch_norm=True)
    verdicts = claims(
        sweep({ELU: 0.04, RELU: 0.02, CENTERED: 0.035, normed: 0.03, elu_normed: 0.041})
    )
    for name in ("batch-norm-elu", "batch-norm-centered", "batch-norm-helps"):
        assert row(verdicts, name)["verdict"] == "supported" and row(verdicts, name)["number"] == 8
    assert row(verdicts, "batch-norm-helps")["effect"] == pytest.approx(
        math.log(41 / 40) - math.log(1.5), abs=0.03
    )
    verdicts = claims(
        sweep({ELU: 0.02, RELU: 0.02, CENTERED: 0.02, normed: 0.03, elu_normed: 0.06})
    )
    for name in ("batch-norm-elu", "batch-norm-centered", "batch-norm-helps"):
        assert row(verdicts, name)["verdict"] == "not supported"
    assert 8 not in set(claims(sweep(GAP))["number"])


# -- learning rates --------------------------------------------------------------------------------


def rated(speeds: dict[tuple[str, str, float], float | None], **others) -> pd.DataFrame:
    """(activation, update, lr) → how fast; None for runs that diverge."""
    runs = []
    for (activation, update, lr), rate in speeds.items():
        for seed in SEEDS:
            speed = None if rate is None else rate * SEED_SPEED[seed]
            runs.append(
                Planted(
                    activation,
                    seed,
                    rate=speed,
                    finished=rate is not None,
                    settings={"update": update, "lr": lr},
                    **others,
                )
            )
    return table(runs)


GRID = {
    ("relu", "plain", 0.01): 0.01, ("relu", "plain", 0.1): 0.02, ("relu", "plain", 1.0): None,
    ("elu", "plain", 0.01): 0.02, ("elu", "plain", 0.1): 0.025, ("elu", "plain", 1.0): 0.04,
}  # fmt: skip


def test_every_cell_is_judged_at_its_best_rate_and_the_paper_at_one_for_all():
    verdicts = claims(rated(GRID))
    # 0.1 for ReLU against 1 for ELU
    assert row(verdicts, "speed-0.5")["effect"] == pytest.approx(-math.log(2))
    caveat = row(verdicts, "speed-0.5")["caveat"]
    assert (
        "(1 for ELU, 0.1 for ReLU)" in caveat
        and "edge of the rates tried: ELU (1)" in caveat
        and "fewest runs that stopped" in caveat
    )
    assert "At learning rate 0.1 for all" in row(verdicts, "means")["caveat"]


def test_a_rate_at_which_some_runs_diverge_is_not_chosen_for_the_survivors():
    quick = {"rate": 0.05, "settings": {"update": "plain", "lr": 1.0}}
    survivors = table(Planted("elu", s, finished=s < 5, **quick) for s in SEEDS)
    runs = pd.concat([rated({("elu", "plain", 0.1): 0.02}), survivors])
    assert best_rate(per_run(runs)) == 0.1


def test_rates_are_chosen_by_the_geometric_mean_of_the_last_losses():
    numbers = pd.DataFrame(
        {"seed": [0, 1, 0, 1], "lr": [0.1, 0.1, 0.2, 0.2], "train_loss": [1.0, 0.1, 0.4, 0.4]}
    )
    assert best_rate(numbers) == 0.1  # .32 against .4, where the plain means are .55 and .4


def test_a_rate_that_some_seeds_are_missing_at_is_not_chosen_for_those_that_are_there():
    """They may have been left out because they diverged."""
    numbers = pd.DataFrame(
        {
            "seed": [0, 1, 2, 0, 1],
            "lr": [0.1] * 3 + [1.0] * 2,
            "train_loss": [0.5, 0.5, 0.5, 0.1, 0.1],
        }
    )
    assert best_rate(numbers) == 0.1
    numbers.loc[0, "train_loss"] = math.nan  # one is missing at either: then the losses decide
    assert best_rate(numbers) == 1.0


def test_the_loss_at_the_end_is_no_single_score():
    """The last minibatch of an epoch may be short, and the score behind it far off."""
    run = Planted("elu", 0, rate=0.02).rows()
    more = pd.DataFrame(
        [
            {"step": step, "layer": "", "unit": -1, "epoch": step / 25, "train_loss": x}
            for step, x in ((91, 0.5), (95, 0.6))
        ]
    )
    rows = pd.concat(
        [
            run,
            more.assign(
                run=run["run"].iloc[0],
                activation="elu",
                seed=0,
                epochs=4,
                lr=0.1,
                experiment="planted",
            ),
        ]
    )
    last = (rows["step"] == 100) & rows["train_loss"].notna()
    for spike in (0.1, 3.0):
        rows.loc[last, "train_loss"] = spike
        assert per_run(rows)["train_loss"].item() == sorted([0.5, 0.6, spike])[1]


def test_unequal_grids_are_refused_by_name():
    more = {**GRID, ("relu", "centered", 0.1): 0.02}
    with pytest.raises(
        ValueError,
        match=r"'relu' was trained at|'relu, centered' (was trained )?at 0\.1\. A rate that was "
        r"searched",
    ):
        claims(rated(more))
    with pytest.raises(
        ValueError, match=r"'elu' was trained at 0\.01, 0\.1, 1, 'relu' at 0\.01, 0\.1"
    ):
        claims(rated({key: value for key, value in GRID.items() if key != ("relu", "plain", 1.0)}))


def test_without_a_plain_run_there_is_nothing_to_say_about_plain_runs():
    runs = rated({(name, "centered", lr): 0.02 for name in ("elu", "relu") for lr in (0.1, 1.0)})
    verdicts = claims(runs)
    assert set(verdicts["verdict"]) == {"undecided"} and set(verdicts["n"]) == {0}


def test_cells_with_a_constant_may_have_fewer_rates_and_are_compared_at_those():
    few = [
        Planted(
            "elu",
            s,
            rate=0.01 * SEED_SPEED[s],
            settings={"update": "plain", "lr": 0.1, "constant": 0.5},
        )
        for s in SEEDS
    ]
    verdicts = claims(pd.concat([rated(GRID), table(few)]))
    # Against 0.1, not against the best.
    assert row(verdicts, "constant-0.5")["effect"] == pytest.approx(math.log(2.5))


def test_two_runs_of_one_kind_are_refused_with_its_name():
    again = Planted("relu", 0, settings={"update": "centered"})
    with pytest.raises(ValueError, match="two runs of 'relu, centered' with seed 0"):
        cells_of(pd.concat([again.rows(), again.rows().assign(run="again")]))


def test_old_runs_are_plain():
    cells = cells_of(
        pd.concat(
            [
                Planted("elu", 0).rows(),
                Planted("elu", 0, settings={"update": "full", "constant": 1.0}).rows(),
            ]
        )
    )
    assert [Cell(*values) for values in cells[list(Cell._fields)].to_numpy()] == [
        Cell("elu"),
        Cell("elu", "full", 1.0),
    ]
    assert cells_of(Planted("elu", 0).rows().drop(columns="lr"))["lr"].tolist() == [0.0]


def test_the_tables_for_reading_show_the_sweep_and_the_plain_runs():
    numbers = per_run(rated(GRID))
    shown = sweep_table(numbers)
    assert (
        shown.loc["ELU", "1"].endswith("*")
        and shown.loc["ReLU", "0.1"].endswith("*")
        and shown.loc["ReLU", "1"] == "–"
    )
    assert shown["plain"].tolist() == ["0.1", "0.1"] and not shown.loc["ELU", "0.1"].endswith("*")
    assert set(paper_runs(numbers)["lr"]) == {0.1}
    assert list(reading_table(numbers).columns) == ["ReLU", "ELU"]


# -- along the runs --------------------------------------------------------------------------------

ACTIVATIONS = ("elu", "relu", "lrelu")


def along(point, activations=ACTIVATIONS, **others):
    """Runs whose layers hold, at every step and at equal loss, what ``point(activation index, seed,
    step, layer index)`` says.
    """
    runs = []
    for (i, activation), seed in itertools.product(enumerate(activations), SEEDS):

        def layer_at(step, layer, i=i, seed=seed):
            return point(i, seed, step, int(layer) // 2 - 1)

        def examined(layer, layer_at=layer_at):
            at = {"coupling": 0.5, "incoming": 0.3, "gap": 60.0, "smaller": 0.5} | layer_at(
                50, layer
            )
            named = {
                "inflation": 1 / (1 - at["coupling"]),
                "mean_in_abs": at["incoming"],
                "gap_degrees": at["gap"],
            }
            return named | {"smaller_share": at["smaller"]}

        runs.append(
            Planted(
                activation,
                seed,
                along=layer_at,
                every=25,
                **({"exam_at": examined, "fed": ("2", "4", "6")} | others),
            )
        )
    return table(runs)


def linked(sign: int, other: int = 1):
    def point(i, seed, step, layer):
        x = 0.1 + 0.1 * i + 0.02 * layer + 0.001 * step + 0.003 * seed
        return {"incoming": x, "coupling": 0.5 + sign * x / 2, "gap": 45 + 40 * sign * other * x}

    return point


@pytest.mark.parametrize(
    ("sign", "other", "expected"),
    [
        (1, 1, ("supported", "supported")),
        (-1, 1, ("not supported", "supported")),
        (1, -1, ("supported", "not supported")),
    ],
)
def test_coupling_follows_means_and_the_gap_follows_coupling(sign, other, expected):
    verdicts = claims(along(linked(sign, other)))
    for where in ("layers", "steps", "activations", "all"):
        # Rounding parts ties.
        assert row(verdicts, f"mean-coupling-{where}")["effect"] == pytest.approx(sign, abs=1e-3)
    for link, verdict in zip(("mean-coupling", "coupling-gap"), expected, strict=True):
        assert row(verdicts, f"{link}-layers")["verdict"] == verdict
        for where, why in (
            ("steps", "Not repeated"),
            ("activations", "whose order is one observation"),
            ("all", "described, not decided"),
        ):
            judged = row(verdicts, f"{link}-{where}")
            assert (
                judged["verdict"] == "undecided"
                and why in judged["caveat"]
                and min(judged["p"], judged["p_contrary"]) < 0.05
            )
    unexamined = claims(along(linked(sign, other), equal_step=None))
    assert row(unexamined, "mean-coupling-layers")["verdict"] == "undecided"


# Cause or effect, activation, seed, quarter of the run, layer.
NOISE = np.random.default_rng(5).normal(size=(2, 4, 6, 5, 4))


@pytest.mark.parametrize(
    ("link", "expected"), [(1.0, "supported"), (-1.0, "not supported"), (0.0, "undecided")]
)
def test_from_seed_to_seed_neither_depth_nor_time_makes_a_correlation(link, expected):
    """Both rise with depth and time, and differ between activations; only what is left may link
    them.
    """

    def point(i, seed, step, layer):
        cause, other = NOISE[:, i, seed, step // 25, layer]
        common = 0.02 * layer + 0.0005 * step + 0.05 * i
        effect = link * cause + (1 - abs(link)) * other
        return {
            "incoming": 0.3 + common + 0.01 * cause,
            "coupling": 0.3 + common + 0.01 * effect,
            "gap": 40 + 50 * common + effect,
        }

    verdicts = claims(along(point))
    assert row(verdicts, "mean-coupling-seeds")["verdict"] == expected
    if not link:
        assert (
            row(verdicts, "mean-coupling-all")["effect"] > 0.9
            and row(verdicts, "mean-coupling-layers")["effect"] > 0.8
        )
    else:
        assert row(verdicts, "coupling-gap-seeds")["verdict"] == "supported"


def test_activations_that_differ_by_chance_decide_nothing():
    """Cause and effect are drawn once for each activation function; more seeds only repeat the
    draw.
    """
    for draw in range(6):
        chance = np.random.default_rng(draw).normal(size=(2, 4))

        def point(i, seed, step, layer, chance=chance):
            return {
                "incoming": 0.5 + 0.1 * chance[0, i] + seed / 1e3,
                "coupling": 0.5 + 0.1 * chance[1, i] - seed / 1e3,
            }

        verdicts = claims(along(point, ("elu", "relu", "lrelu", "srelu")))
        assert {
            row(verdicts, f"mean-coupling-{where}")["verdict"] for where in ("activations", "all")
        } == {"undecided"}


def test_a_link_that_points_now_here_now_there_decides_nothing():
    verdicts = claims(
        along(lambda i, seed, step, layer: linked((-1) ** seed)(i, seed, step, layer))
    )
    assert row(verdicts, "mean-coupling-layers")[["n", "verdict"]].tolist() == [6, "undecided"]


def test_layers_with_too_few_samples_carry_no_claim():
    verdicts = claims(along(lambda *at: linked(1)(*at) | {"samples": 29.0}, equal_step=None))
    for name in (
        "mean-coupling-all",
        "coupling-gap-all",
        "coupling-steps",
        "gap-steps",
        "correction-steps",
    ):
        assert row(verdicts, name)[["n", "verdict"]].tolist() == [0, "undecided"]
        assert "enough effective samples" in row(verdicts, name)["caveat"]


def test_a_coupling_that_only_few_samples_make_decides_nothing():
    """h is larger in ELU's layers, but so is what 3 inputs and 31 samples would show of h = 0."""

    def point(i, seed, step, layer):
        few = (
            {"coupling": 0.107, "samples": 31.0} if i == 0 else {"coupling": 0.1, "samples": 3000.0}
        )
        return few | {"coupling": few["coupling"] + seed / 10000}

    judged = row(claims(along(point)), "coupling-steps")
    assert judged["low"] > 0 and judged["p_contrary"] < 0.05 and judged["verdict"] == "undecided"
    assert "sign changes when h is corrected for few samples" in judged["caveat"]


@pytest.mark.parametrize(("share", "expected"), [(1.0, "supported"), (0.0, "not supported")])
def test_the_correction_along_the_run(share, expected):
    def point(i, seed, step, layer):
        return {"smaller": share if seed < 5 or layer else 0.5}

    judged = row(claims(along(point)), "correction-steps")
    assert judged["verdict"] == expected and judged["effect"] == pytest.approx(
        (0.5 - share) * (5 + 2 / 3) / 6
    )


def test_at_equal_steps_and_where_the_examination_disagrees():
    def point(i, seed, step, layer):
        return {"gap": 50 + 10 * i + seed / 10, "coupling": 0.5 + i / 10}

    for sign, expected in ((1, "supported"), (-1, "not supported")):

        def signed(i, *at, sign=sign):
            return point(i if sign > 0 else 1 - i, *at)

        verdicts = claims(along(signed, ("elu", "relu")))
        assert row(verdicts, "gap-steps")["effect"] == pytest.approx(-10 * sign)
        assert {
            row(verdicts, name)["verdict"]
            for name in ("gap-steps", "coupling-steps", "gap", "coupling")
        } == {expected}
    elu = along(point, ("elu",), exam=lambda probe, damping: {"gap_degrees": 70.0})
    contrary = pd.concat([elu, along(point, ("elu", "relu")).query("activation == 'relu'")])
    assert row(claims(contrary), "gap-steps")["verdict"] == "undecided"


def test_a_point_is_a_layer_at_a_step():
    run = Planted(
        "elu",
        0,
        along=lambda step, layer: {"gap": 30.0, "coupling": 0.4, "smaller": 0.5, "incoming": 0.7},
    ).rows()
    points = points_of(run)
    assert len(points) == 3 * 2 and points["gap"].tolist() == pytest.approx([30.0] * 6)
    assert (
        set(points["coupling"]) == {0.4}
        and set(points["smaller"]) == {0.5}
        and set(points["incoming"]) == {0.7}
    )
    assert len(points_of(run.drop(columns="coupling"))) == 0


def test_the_gap_of_a_layer_counts_where_all_of_its_units_have_enough_samples():
    run = Planted("elu", 0, along=lambda step, layer: {"gap": 30.0}).rows()
    few = (run["unit"] == 1) & run["effective_samples"].notna() & (run["layer"] == "4")
    run.loc[few, "effective_samples"] = 29.0
    points = points_of(run).set_index("layer")
    assert (
        points.loc["4", "gap"].isna().all()
        and points.loc["4", "coupling"].notna().all()
        and points.loc["2", "gap"].notna().all()
    )


def test_units_without_a_bias_are_no_failures_of_the_correction():
    run = Planted("elu", 0, along=lambda step, layer: {"smaller": 0.5}).rows()
    run.loc[run["unit"] == 1, "norm_corrected_mean"] = math.nan
    assert set(points_of(run)["smaller"]) == {1.0}
    run["norm_corrected_mean"] = math.nan
    assert points_of(run)["smaller"].isna().all()


def test_rank_correlations_are_within_groups_and_averaged():
    x, y = [1.0, 2, 3, 11, 12, 13, 9], [30.0, 20, 10, 1, 3, 2, 5]
    points = pd.DataFrame({"seed": 0, "layer": [*"aaabbbc"], "x": x, "y": y})
    assert rank_correlations(points, "x", "y", ["layer"]).tolist() == pytest.approx(
        [(-1 + 0.5) / 2]
    )
    assert len(rank_correlations(points.query("layer == 'c'"), "x", "y", [])) == 0


def test_means_are_compared_at_equal_loss_too():
    """ELU is nearer zero at the end, and farther off where its loss was that of ReLU."""
    runs = [
        Planted(name, s, unit_mean=end + s / 100, means=lambda step, at=at, s=s: at + s / 100)
        for name, end, at in (("elu", 0.1, 0.9), ("relu", 0.4, 0.5))
        for s in SEEDS
    ]
    runs = [
        run
        if run.seed
        else Planted(run.activation, 0, unit_mean=run.unit_mean + 0.01, means=run.means)
        for run in runs
    ]
    verdicts = claims(table(runs))
    assert (
        row(verdicts, "means")["verdict"] == "supported"
        and row(verdicts, "means-loss")["verdict"] == "not supported"
    )
    assert row(verdicts, "means-loss")["effect"] == pytest.approx(0.4)


@pytest.mark.parametrize(("swing", "expected"), [(0.5, "supported"), (2.0, "not supported")])
def test_figure_7(swing, expected):
    def run(name, seed, size):
        size = size * (1 + seed / 50)
        means = {25: 0.3 - size, 50: 0.3 + size, 75: 0.3 - size}
        return Planted(
            name,
            seed,
            every=25,
            spread=0.0,
            unit_mean=0.3 + size,
            means=lambda step: means.get(step, 50.0),
        )

    runs = table(
        run(name, s, size * (1 + s / 100 * (name == "elu")))
        for name, size in (("elu", 0.1 * swing), ("relu", 0.1))
        for s in SEEDS
    )
    verdicts = claims(runs)
    for name in ("drift", "drift-median"):
        assert (
            row(verdicts, name)["effect"] == pytest.approx(2 * math.log(swing), abs=0.06)
            and row(verdicts, name)["verdict"] == expected
        )


def test_drifts_by_hand():
    steps, units = (0, 1, 2, 3), ([5.0, 0, 3, 6], [5.0, 1, 1, 1], [5.0, 2, 4, 6])
    means = pd.DataFrame(
        [
            {"run": "a", "step": s, "layer": "1", "unit": u, "mean": x[s]}
            for u, x in enumerate(units)
            for s in steps
        ]
    )
    variances = drifts(means)
    assert variances["drift_units"]["a"] == np.median([9.0, 0.0, 4.0])
    assert variances["drift_median"]["a"] == np.var([1.0, 3.0, 6.0], ddof=1)
    assert np.isnan(drifts(means.query("step < 3"))["drift_units"]["a"])


@pytest.mark.parametrize("slow_inheritor", [True, False])
def test_inheriting_more_forecasts_slower_learning_in_so_many_activations(slow_inheritor):
    speeds = (0.05, 0.04, 0.03, 0.02)
    shares = (0.2, 0.3, 0.4, 0.5) if slow_inheritor else (0.5, 0.4, 0.3, 0.2)
    runs = []
    for s in SEEDS:
        order = (1, 0, 2, 3) if s == 0 else (0, 1, 2, 3)  # one seed that is not perfect
        for name, speed, i in zip(("elu", "srelu", "lrelu", "relu"), speeds, order, strict=True):
            runs.append(
                Planted(name, s, every=25, rate=speed, shares=(1 - shares[i], shares[i], 0.0))
            )
    judged = row(claims(table(runs)), "inherited-forecast")
    assert (
        judged["effect"] == pytest.approx((1 if slow_inheritor else -1) * (5 + 0.8) / 6)
        and judged["p" if slow_inheritor else "p_contrary"] < 0.05
    )
    assert judged["verdict"] == "undecided" and "whose order is one observation" in judged["caveat"]


@pytest.mark.parametrize(
    ("sign", "expected"), [(1, "supported"), (-1, "not supported"), (0, "undecided")]
)
def test_inheriting_more_forecasts_slower_learning_from_seed_to_seed(sign, expected):
    """A seed's own share, around that of its activation function, makes it slower, quicker, or does
    nothing.
    """
    draws = np.random.default_rng(7).normal(size=(2, 6, 4))
    others, runs = np.random.default_rng(8).normal(size=(6, 4)), []
    for s, (i, name) in itertools.product(SEEDS, enumerate(("elu", "srelu", "lrelu", "relu"))):
        share = 0.3 + 0.05 * i + 0.01 * draws[0, s, i]
        slow = sign * draws[0, s, i] if sign else others[s, i]
        runs.append(
            Planted(
                name,
                s,
                every=25,
                rate=0.03 * math.exp(0.1 * i - 0.05 * slow),
                shares=(1 - share, share, 0.0),
            )
        )
    assert row(claims(table(runs)), "inherited-forecast-seeds")["verdict"] == expected


# -- learning curves -------------------------------------------------------------------------------


def test_an_exponential_reaches_its_losses_where_it_should():
    rows = Planted("elu", 0, rate=0.03, step_seconds=0.5).rows()
    curve = curves_of(rows.assign(run="a"))["a"]
    for level in (2.0, 0.77, 0.2):
        assert reached(curve, level) == pytest.approx(math.log(2.3 / level) / 0.03)
        assert reached(curve, level, "seconds") == pytest.approx(math.log(2.3 / level) / 0.06)
    assert reached(curve, 2.3) == 0 and np.isnan(reached(curve, 1e-3))
    assert loss_after(curve, 17.0) == pytest.approx(2.3 * math.exp(-0.03 * 34)) and np.isnan(
        loss_after(curve, 51.0)
    )


def test_a_loss_counts_when_it_is_first_reached():
    curve = pd.DataFrame(
        {"step": [0.0, 1, 2, 3], "train_loss": [2.0, 0.4, 3.0, 0.1], "seconds": np.nan}
    )
    assert 0 < reached(curve, 0.5) < 1


def test_common_losses_are_those_that_all_come_down_to():
    curves = [pd.DataFrame({"train_loss": losses}) for losses in ([2.3, 0.15], [2.2, 0.4, 0.31])]
    assert common_levels(curves, 2) == [1.0, 0.5] and common_levels(curves, 9) == [2.0, 1.0, 0.5]
    assert common_levels([*curves, pd.DataFrame({"train_loss": [3.0, 2.9]})], 2) == []
