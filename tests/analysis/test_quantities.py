"""One number per run, against numbers worked out by hand."""

import numpy as np
import pandas as pd
import pytest
from planted import Planted, table

from biasshift.analysis.formatting import QUANTITIES, mean_and_sd, reading_table
from biasshift.analysis.quantities import examinations, fed_layers, inherited_shares, per_run


def one(run: Planted) -> pd.Series:
    (row,) = per_run(table([run])).to_dict("records")
    return pd.Series(row)


# -- per run ---------------------------------------------------------------------------------------


def test_the_numbers_at_the_end_of_a_run():
    numbers = one(Planted("elu", 3, unit_mean=0.25, spread=1.0, train_loss=0.125))
    assert (numbers["run"], numbers["activation"], numbers["seed"]) == ("elu-3", "elu", 3)
    # Of −0.75, 0.25, 1.25 in both layers; what was before the last step does not count.
    assert numbers["unit_mean"] == 0.25
    assert numbers["unit_mean_abs"] == pytest.approx((0.75 + 0.25 + 1.25) / 3)
    assert numbers["train_loss"] == 0.125


def test_the_inherited_share_is_over_all_steps_and_layers_behind_the_first():
    # Layer "0" would make it smaller.
    assert one(Planted("elu", 0, shares=(2.0, 1.0, 1.0)))["inherited"] == pytest.approx(1 / 4)


def test_the_inherited_share_of_nothing_is_no_number():
    rows = pd.DataFrame({"run": ["a"], "own": [0.0], "incoming": [0.0], "second_order": [0.0]})
    assert np.isnan(inherited_shares(rows)["a"])
    assert inherited_shares(rows.assign(incoming=[-2.0], own=[6.0]))["a"] == 1 / 4


def test_layers_fed_by_an_activation_are_those_behind_the_first():
    assert fed_layers(table([Planted("elu", 0)])) == ["2", "4"]


def test_the_examination_is_that_at_the_shown_damping_averaged_over_probes_and_layers():
    def exam(probe, damping):
        return (
            {"gap_degrees": 40.0 + 10 * probe, "enough": 0.9}
            if damping == 1e-2
            else {"gap_degrees": 1e9, "enough": 0.0}
        )

    numbers = one(Planted("relu", 0, equal_step=50, exam=exam))
    assert numbers["exam_gap_degrees"] == 45 and numbers["exam_step"] == 50
    assert numbers["exam_excluded"] == pytest.approx(0.1)
    assert numbers["exam_k"] == 0.5  # −0.5 and 1.5 in the two layers


def test_one_row_per_run_probe_and_damping():
    rows = examinations(table([Planted("elu", 0), Planted("relu", 0)]))
    assert len(rows) == 2 * 2 * 3
    assert set(rows) == {"run", "activation", "seed", "exam_probe", "exam_damping"} | {
        q for q in QUANTITIES if q.startswith("exam_")
    }


@pytest.mark.parametrize("others", [[], [Planted("relu", 0)]], ids=["no run", "one of two runs"])
def test_a_run_that_never_came_down_to_the_equal_loss_has_no_examination(others):
    numbers = per_run(table([Planted("elu", 0, equal_step=None), *others])).set_index("activation")
    assert (
        numbers.loc["elu", [name for name in QUANTITIES if name.startswith("exam_")]].isna().all()
    )
    assert numbers.loc["elu", ["unit_mean", "inherited", "train_loss"]].notna().all()


def test_a_run_that_was_stopped_has_no_end():
    numbers = one(Planted("elu", 0, finished=False))
    assert numbers[["unit_mean", "unit_mean_abs", "inherited", "train_loss"]].isna().all()
    assert numbers["exam_gap_degrees"] == 60  # it had come down to the equal loss before


# -- tables that are not what they should be -------------------------------------------------------


@pytest.mark.parametrize(
    "column", ["run", "activation", "seed", "epochs", "epoch", "inputs", "mean", "train_loss"]
)
def test_a_missing_column_is_named(column):
    with pytest.raises(ValueError, match=f"'{column}'.*biasshift train"):
        per_run(table([Planted("elu", 0)]).drop(columns=column))


def test_runs_of_two_settings_are_not_compared():
    with pytest.raises(ValueError, match=r"differ in 'momentum' \(0.0, 0.9\)"):
        per_run(
            table(
                [
                    Planted("elu", 0, settings={"momentum": 0.0}),
                    Planted("relu", 0, settings={"momentum": 0.9}),
                ]
            )
        )


def test_updates_of_two_settings_are_not_compared():
    with pytest.raises(ValueError, match=r"differ in 'update_damping' \(0.01, 0.1\)"):
        per_run(
            table(
                [
                    Planted("elu", 0, settings={"update_damping": 0.01}),
                    Planted("relu", 0, settings={"update_damping": 0.1}),
                ]
            )
        )


def test_a_seed_that_comes_twice_is_refused():
    again = Planted("elu", 1).rows().assign(run="elsewhere/elu-1")
    with pytest.raises(ValueError, match="two runs of 'elu' with seed 1"):
        per_run(pd.concat([table([Planted("elu", 0), Planted("elu", 1)]), again]))


# -- the table for reading -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([0.1, 0.3], "0.200 ± 0.141"),
        ([-0.1, -0.3], "-0.200 ± 0.141"),
        ([1.0, 2.0, 3.0], "2.00 ± 1.00"),
        ([10.0, 30.0], "20.0 ± 14.1"),
        ([100.0, 300.0], "200 ± 141"),
        ([0.5], "0.500"),
        ([0.1, np.nan, 0.3], "0.200 ± 0.141 (n = 2)"),
        ([0.5, np.nan], "0.500 (n = 1)"),
        ([np.nan, np.nan], "–"),
    ],
)
def test_mean_and_sd_as_text(values, text):
    assert mean_and_sd(pd.Series(values)) == text


def test_the_table_for_reading_has_a_row_per_quantity_and_a_column_per_activation():
    runs = [Planted("relu", seed, unit_mean=0.4 + seed / 10, equal_step=None) for seed in (0, 1)]
    shown = reading_table(per_run(table([Planted("elu", 0, unit_mean=0.25), *runs])))
    assert list(shown.columns) == ["ELU", "ReLU"] and list(shown.index) == [
        *QUANTITIES.values(),
        "seeds",
    ]
    assert shown.loc["mean unit activation, median"].tolist() == ["0.250", "0.450 ± 0.071"]
    assert shown.loc["k"].tolist() == ["0.500", "–"] and shown.loc["seeds"].tolist() == ["1", "2"]
