"""Verdicts on planted runs: where a claim is true, false or undecidable by construction, claims
must say so.
"""

import itertools
import re
import time
from collections import Counter

import numpy as np
import pandas as pd
import pytest
from planted import Planted, table
from scipy import stats

from biasshift.analysis.formatting import claims_markdown, footnote, sentences
from biasshift.analysis.statistics import holm, paired, seeds_needed, share, verdict
from biasshift.analysis.verdicts import claims
from biasshift.runs.writer import Run

SEEDS = range(6)
# What a seed does to both networks: far more than the effect, so that only pairs see it.
BASES = [0.0, 0.9, -0.7, 0.4, -0.2, 0.6]
LESS = [-0.11, -0.07, -0.13, -0.08, -0.1, -0.09]

# claim → how to plant a number whose transform is the claim's statistic
PLANT = {
    "means": lambda x: {"unit_mean": -np.exp(x)},  # |−eˣ|: the sign of the mean must not matter
    "means-unitwise": lambda x: {"unit_mean": 0.0, "spread": np.exp(x)},
    "coupling": lambda x: {"exam": lambda probe, damping: {"inflation": np.exp(x)}},
    "gap": lambda x: {"exam": lambda probe, damping: {"gap_degrees": 60 + x}},
    "inherited": lambda x: {"shares": (1 - np.exp(x - 2), np.exp(x - 2), 0.0)},
    "speed": lambda x: {"equal_step": round(1e6 * np.exp(x))},
    "loss": lambda x: {"train_loss": np.exp(x)},
}
LINEAR = {"coupling", "gap", "speed", "loss"}  # the planted difference is the effect itself


def planted(claim: str, differences, seeds=SEEDS) -> pd.DataFrame:
    """ELU minus ReLU is `differences`, seed by seed."""
    pairs = zip(seeds, BASES, differences, strict=True)
    runs = [
        (Planted("elu", s, **PLANT[claim](x + d)), Planted("relu", s, **PLANT[claim](x)))
        for s, x, d in pairs
    ]
    return table(itertools.chain(*runs))


def row(verdicts: pd.DataFrame, claim: str) -> pd.Series:
    (where,) = np.flatnonzero(verdicts["claim"] == claim)
    return verdicts.iloc[where]


OF_ONE = {"correction", "correction-steps"} | {  # claims that need no pair of activation functions
    f"{link}-{where}"
    for link in ("mean-coupling", "coupling-gap")
    for where in ("seeds", "layers", "steps", "activations", "all")
}
BETWEEN = {
    "coupling", "coupling-steps", "gap", "gap-steps", "inherited", "inherited-loss", "speed",
    "speed-1", "speed-0.5", "loss", "drift", "drift-median",
}  # fmt: skip


# -- true, false, undecidable ----------------------------------------------------------------------


@pytest.mark.parametrize("claim", PLANT)
def test_a_claim_that_is_true_is_supported_and_its_contrary_is_not(claim):
    for sign, expected in ((1, "supported"), (-1, "not supported")):
        judged = row(claims(planted(claim, sign * np.array(LESS))), claim)
        assert judged["verdict"] == expected and judged["n"] == 6
        assert np.sign([judged["low"], judged["effect"], judged["high"]]).tolist() == [-sign] * 3
        if claim in LINEAR:
            assert judged["effect"] == pytest.approx(sign * np.mean(LESS), abs=1e-5)


@pytest.mark.parametrize("claim", PLANT)
def test_an_interval_across_0_decides_nothing(claim):
    judged = row(claims(planted(claim, [-0.3, 0.2, -0.1, 0.25, -0.2, 0.1])), claim)
    assert judged["verdict"] == "undecided" and judged["low"] < 0 < judged["high"]


def test_an_interval_below_0_decides_nothing_where_the_exact_test_disagrees():
    judged = row(claims(planted("gap", [-1, -1.1, -0.9, -1.05, 0.01, 0.02])), "gap")
    assert judged["high"] < 0 and judged["p"] == 5 / 64 and judged["verdict"] == "undecided"


def test_fewer_than_six_seeds_decide_nothing():
    judged = row(claims(planted("gap", LESS).query("seed < 5")), "gap")
    assert judged["high"] < 0 and judged["n"] == 5 and judged["verdict"] == "undecided"
    assert judged["caveat"].startswith("Fewer than 6 paired seeds")


def test_one_seed_has_a_number_but_no_interval():
    verdicts = claims(planted("gap", LESS).query("seed < 1"))
    assert (
        row(verdicts, "gap")[["low", "high", "p"]].isna().all() and row(verdicts, "gap")["n"] == 1
    )
    assert "-0.11, n = 1. Fewer than" in sentences(verdicts)[list(verdicts["claim"]).index("gap")]


@pytest.mark.parametrize(
    ("turned", "away"), [("damping", {1e-4}), ("damping", {1.0}), ("probe", {1}), ("probe", {0})]
)
@pytest.mark.parametrize(("claim", "column"), [("gap", "gap_degrees"), ("coupling", "inflation")])
def test_a_sign_that_changes_with_the_damping_or_the_probe_decides_nothing(
    claim, column, turned, away
):
    """Where it is turned, the effect is a third as large: on average it stays clearly below 0."""

    def exam(difference):
        def at(probe, damping):
            here = (probe if turned == "probe" else damping) in away
            return {column: 10 + (-difference / 3 if here else difference)}

        return at

    runs = [
        [Planted("elu", s, exam=exam(d)), Planted("relu", s, exam=lambda *_: {column: 10.0})]
        for s, d in zip(SEEDS, LESS, strict=True)
    ]
    judged = row(claims(table(itertools.chain(*runs))), claim)
    assert judged["high"] < 0 and judged["p"] < 0.05
    assert judged["verdict"] == "undecided" and "sign changes" in judged["caveat"]


@pytest.mark.parametrize(("share", "expected"), [(0.6, "supported"), (0.4, "not supported")])
def test_theorem_2s_correction(share, expected):
    def run(activation, seed, off):
        return Planted(
            activation, seed, exam=lambda *_: {"smaller_share": share + off + seed / 1000}
        )

    judged = row(
        claims(table(run(*pair) for s in SEEDS for pair in (("elu", s, 0.05), ("relu", s, -0.05)))),
        "correction",
    )
    assert judged["verdict"] == expected and judged["n"] == 6
    # All activations of a seed together.
    assert judged["effect"] == pytest.approx(0.5 - share - 0.0025)


def test_theorem_2s_correction_may_help_one_and_not_the_other():
    runs = [
        Planted(name, s, exam=lambda *_, x=x, s=s: {"smaller_share": x + s / 1000})
        for name, x in (("elu", 0.8), ("relu", 0.1))
        for s in SEEDS
    ]
    verdicts = claims(table(runs))
    words = [row(verdicts, f"correction{suffix}")["verdict"] for suffix in ("-elu", "-relu", "")]
    assert words == ["supported", "not supported", "not supported"]


def test_units_without_a_corrected_mean_say_nothing_about_the_correction():
    """As those without a bias."""
    nothing = {"smaller_share": np.nan}
    verdicts = claims(
        table(Planted(name, s, exam=lambda *_: nothing) for name in ("elu", "relu") for s in SEEDS)
    )
    assert row(verdicts, "correction")[["n", "verdict"]].tolist() == [0, "undecided"]


def test_theorem_2s_correction_too_is_repeated_over_dampings():
    def exam(probe, damping):
        return {"smaller_share": 0.4 if damping == 1.0 else 0.7}

    judged = row(
        claims(table(Planted(name, seed, exam=exam) for name in ("elu", "relu") for seed in SEEDS)),
        "correction",
    )
    assert judged["verdict"] == "undecided" and "sign changes" in judged["caveat"]


# -- what is missing -------------------------------------------------------------------------------


def test_runs_that_never_came_down_to_the_equal_loss_leave_their_pairs_out():
    runs = [
        Planted(name, seed, equal_step=None if (name, seed) == ("relu", 2) else 50)
        for name in ("elu", "relu")
        for seed in SEEDS
    ]
    verdicts = claims(table(runs))
    pairs = {"gap": 5, "coupling": 5, "speed": 6, "loss": 6, "means": 6}
    assert {name: row(verdicts, name)["n"] for name in pairs} == pairs
    assert row(verdicts, "gap")["caveat"].startswith(
        "Fewer than 6 paired seeds decide nothing. 1 of 6 pairs have no number, and count against "
        "the verdict. "
    )


def spoilt(count: int) -> pd.DataFrame:
    """Twelve seeds in which ELU's gap is clearly smaller; of so many ReLU networks nothing is known
    at equal loss.
    """
    pairs = zip(range(12), 2 * LESS, strict=True)
    runs = [
        (
            Planted("elu", s, **PLANT["gap"](d)),
            Planted("relu", s, equal_step=None if s < count else 50),
        )
        for s, d in pairs
    ]
    return table(itertools.chain(*runs))


def test_pairs_without_a_number_count_as_the_strongest_evidence_against():
    verdicts = [row(claims(spoilt(count)), "gap")["verdict"] for count in (0, 1, 2, 6)]
    assert verdicts == ["supported", "supported", "undecided", "undecided"]
    worst = np.array([*(2 * LESS)[:10], 0.5, 0.7])
    assert paired(pd.Series([*(2 * LESS)[:10], np.nan, np.inf])).p == pytest.approx(exact_p(worst))
    assert paired(
        pd.Series([*(-np.array(2 * LESS))[:10], np.nan, np.nan])
    ).p_contrary == pytest.approx(exact_p(worst))


def test_a_network_that_never_gets_there_is_slower_than_one_that_does():
    """Half of the ReLU networks are quick and half are stuck: to leave the stuck ones out would
    make ELU the slower one.
    """
    runs = [Planted("elu", s, equal_step=50 + s) for s in range(12)]
    runs += [Planted("relu", s, equal_step=None if s % 2 else 40 + s) for s in range(12)]
    judged = row(claims(table(runs)), "speed")
    assert (
        judged["n"] == 12
        and judged["verdict"] == "undecided"
        and "In 6 pairs one run never came down there" in judged["caveat"]
    )
    stuck = [run for run in runs if run.activation == "elu"] + [
        Planted("relu", s, equal_step=None) for s in range(12)
    ]
    judged = row(claims(table(stuck)), "speed")
    assert judged["verdict"] == "supported" and judged["effect"] == pytest.approx(
        np.mean([np.log((50 + s) / 100) for s in range(12)])
    )


def test_a_run_that_ended_before_its_partner_was_there_says_nothing_about_who_is_faster():
    runs = [
        Planted(name, s, equal_step=None if name == "elu" else 80, finished=name == "relu")
        for name in ("elu", "relu")
        for s in SEEDS
    ]
    assert row(claims(table(runs)), "speed")[["n", "verdict"]].tolist() == [0, "undecided"]


def test_a_network_whose_loss_is_no_number_at_its_end_has_not_reached_it():
    """It went on beside the others of an ensemble; its last finite loss must not speak for it."""
    rows = planted("loss", LESS)
    lost = (rows["activation"] == "elu") & (rows["seed"] < 3) & (rows["step"] == 100)
    rows.loc[lost & rows["train_loss"].notna(), "train_loss"] = np.nan
    judged = row(claims(rows), "loss")
    assert judged[["n", "verdict"]].tolist() == [3, "undecided"] and judged["caveat"].startswith(
        "Fewer than 6 paired seeds decide nothing. 3 of 6 pairs have no number"
    )


def test_layers_are_compared_with_their_like():
    """Layer by layer nothing differs; that ELU's last layer has too few samples must not make a
    difference of what is left.
    """
    levels = {
        "2": {"inflation": 2.0, "gap_degrees": 50.0},
        "4": {"inflation": 8.0, "gap_degrees": 70.0},
    }

    def run(name, seed):
        few = {"enough": 0.4} if name == "elu" else {}
        return Planted(
            name, seed, exam_at=lambda layer: levels[layer] | (few if layer == "4" else {})
        )

    verdicts = claims(table(run(name, seed) for name in ("elu", "relu") for seed in SEEDS))
    for claim in ("coupling", "gap"):
        assert row(verdicts, claim)[["effect", "n", "verdict"]].tolist() == [0.0, 6, "undecided"]
        assert (
            "6 of 24 layers have too few effective samples and are left out"
            in row(verdicts, claim)["caveat"]
        )


@pytest.mark.parametrize(
    "kept", ["exam_probe == 0", "exam_damping == 0.01", "exam_damping > 0.001"]
)
def test_what_was_not_repeated_decides_nothing(kept):
    rows = planted("gap", LESS)
    judged = row(claims(rows[rows["exam_damping"].isna() | rows.eval(kept)]), "gap")
    assert (
        judged["p"] < 0.05
        and judged["verdict"] == "undecided"
        and "Not repeated on two probes at three dampings" in judged["caveat"]
    )


def test_losses_that_are_not_equal_decide_nothing_at_equal_loss():
    rows = planted("gap", LESS)
    examined = rows["exam_damping"].notna()
    rows.loc[examined, "exam_loss"] = np.where(rows.loc[examined, "activation"] == "elu", 0.5, 0.52)
    assert row(claims(rows), "gap")["verdict"] == "supported"
    rows.loc[examined & (rows["activation"] == "elu"), "exam_loss"] = 0.4
    judged = row(claims(rows), "gap")
    assert (
        judged["verdict"] == "undecided"
        and "ELU was examined at a loss of 0.4, ReLU at 0.52" in judged["caveat"]
    )


def test_losses_below_0_are_refused_by_name():
    rows = planted("gap", LESS)
    rows.loc[rows["train_loss"].notna() & (rows["run"] == "relu-3"), "train_loss"] = -0.1
    with pytest.raises(
        ValueError, match=r"training loss of run 'relu-3' falls below 0.*cannot be negative"
    ):
        claims(rows)


@pytest.mark.parametrize(
    ("option", "values"),
    [("damping", (1e-4, 1.0)), ("weight_decay", (0.0, 0.1)), ("optimizer", ("adam", "sgd"))],
)
def test_runs_that_differ_in_what_moves_the_numbers_are_refused(option, values):
    rows = planted("gap", LESS)
    rows[option] = np.where(rows["activation"] == "elu", *values).astype(object)
    with pytest.raises(
        ValueError,
        match=f"These runs differ in '{option}' \\({values[0]}, {values[1]}\\). Give runs of one "
        "setting",
    ):
        claims(rows)


def test_without_any_examination_the_sentences_say_why_there_is_no_number():
    verdicts = claims(
        table(Planted(name, seed, equal_step=None) for name in ("elu", "relu") for seed in SEEDS)
    )
    for name in ("gap", "coupling", "speed", "correction"):
        assert row(verdicts, name)[["n", "verdict"]].tolist() == [0, "undecided"]
        assert row(verdicts, name)["caveat"].startswith(
            "No two runs with one seed came down to the equal loss"
        )
    assert not any("nan" in sentence for sentence in sentences(verdicts))


def test_without_enough_effective_samples_the_steps_are_still_compared():
    nothing = dict.fromkeys(("inflation", "k", "smaller_share", "gap_degrees"), np.nan) | {
        "enough": 0.0
    }
    verdicts = claims(
        table(
            Planted(name, seed, exam=lambda *_: nothing)
            for name in ("elu", "relu")
            for seed in SEEDS
        )
    )
    assert (
        row(verdicts, "gap")["n"] == 0
        and "with enough effective samples" in row(verdicts, "gap")["caveat"]
    )
    assert row(verdicts, "speed")["n"] == 6


def test_runs_that_were_stopped_decide_nothing_about_the_end():
    verdicts = claims(
        table(
            Planted(name, seed, finished=name == "elu")
            for name in ("elu", "relu")
            for seed in SEEDS
        )
    )
    for name in ("means", "means-unitwise", "inherited", "loss"):
        assert row(verdicts, name)[["n", "verdict"]].tolist() == [0, "undecided"]
        assert (
            row(verdicts, name)["caveat"] == "No two runs with one seed reached their last epoch."
        )
    assert row(verdicts, "gap")["n"] == 6


@pytest.mark.parametrize(
    ("activations", "expected"),
    [
        (("elu",), set()),
        (("relu", "lrelu"), {"means-lrelu-relu", "means-lrelu-relu-loss"}),
        (
            ("elu", "lrelu"),
            {
                "means-lrelu",
                "means-lrelu-loss",
                "speed-lrelu",
                "speed-lrelu-1",
                "speed-lrelu-0.5",
                "loss-lrelu",
            },
        ),
        (("elu", "relu"), {"means", "means-loss", "means-unitwise", *BETWEEN}),
    ],
)
def test_claims_about_activations_that_were_not_trained_are_left_out(activations, expected):
    corrections = {f"correction-{name}" for name in activations} & {
        "correction-elu",
        "correction-relu",
    }
    verdicts = claims(table(Planted(name, seed) for name in activations for seed in SEEDS))
    assert set(verdicts["claim"]) == expected | corrections | OF_ONE


# -- pairs -----------------------------------------------------------------------------------------


def test_seeds_without_a_partner_are_left_out():
    alone = [Planted("elu", 10, **PLANT["gap"](30.0)), Planted("relu", 11, **PLANT["gap"](-30.0))]
    pairs = planted("gap", LESS)
    pd.testing.assert_series_equal(
        row(claims(pd.concat([table(alone[:1]), pairs, table(alone[1:])])), "gap"),
        row(claims(pairs), "gap"),
        check_names=False,
    )


def test_the_order_of_the_runs_does_not_matter():
    runs = [rows for _, rows in planted("gap", LESS).groupby("run", sort=False)]
    shuffled = pd.concat([runs[i] for i in np.random.default_rng(0).permutation(len(runs))])
    pd.testing.assert_frame_equal(claims(shuffled), claims(planted("gap", LESS)))


def test_two_runs_of_one_seed_are_refused():
    twice = pd.concat([planted("gap", LESS), Planted("elu", 0).rows().assign(run="again")])
    with pytest.raises(ValueError, match="two runs of 'elu' with seed 0"):
        claims(twice)


# -- statistics ------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 6, 15])
def test_the_interval_is_that_of_the_paired_t_test(n):
    rng = np.random.default_rng(n)
    elu, relu = rng.normal(size=n), rng.normal(size=n) + 0.5
    estimate = paired(pd.Series(elu - relu))
    expected = stats.ttest_rel(elu, relu).confidence_interval(0.95)
    assert (estimate.low, estimate.high) == pytest.approx((expected.low, expected.high), rel=1e-12)
    assert estimate.effect == pytest.approx(np.mean(elu) - np.mean(relu)) and estimate.n == n


def exact_p(effects: np.ndarray) -> float:
    """Every effect may have had the other sign: how often is the sum of ranks above 0, zeros half,
    at most as large?
    """
    ranks = stats.rankdata(np.abs(effects))
    positive = np.array([(x > 0) + (x == 0) / 2 for x in effects])
    free = effects != 0
    fixed = (ranks * positive)[~free].sum()
    sums = [
        fixed + ranks[free][np.array(signs)].sum()
        for signs in itertools.product([False, True], repeat=int(free.sum()))
    ]
    return float(np.mean(np.array(sums) <= (ranks * positive).sum() + 1e-9))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("rounded", [False, True], ids=["distinct", "with ties and zeros"])
def test_p_is_exact_and_one_sided(seed, rounded):
    effects = np.random.default_rng(seed).normal(size=7) - 0.7
    effects = np.round(effects) if rounded else effects
    assert paired(pd.Series(effects)).p == pytest.approx(exact_p(effects))
    assert paired(pd.Series(effects)).p_contrary == pytest.approx(exact_p(-effects))
    assert paired(pd.Series(effects), predicted=1).p == pytest.approx(exact_p(-effects))


@pytest.mark.parametrize("rounded", [False, True], ids=["distinct", "with ties and zeros"])
def test_p_of_many_values_is_that_of_all_assignments_of_signs(rounded):
    """Of 2⁴⁰, which nobody goes through: each sum of ranks is counted as often as it occurs."""
    effects = np.random.default_rng(0).normal(size=40) - 0.3
    effects = np.round(effects, 1) if rounded else effects
    ranks, sums = stats.rankdata(np.abs(effects)), Counter({0.0: 1})
    for rank in ranks[effects != 0]:
        shifted = Counter({total + rank: often for total, often in sums.items()})
        sums = sums + shifted
    observed = ranks[effects > 0].sum()
    as_small = sum(often for total, often in sums.items() if total <= observed)
    assert paired(pd.Series(effects)).p == pytest.approx(as_small / sums.total(), rel=1e-12)


@pytest.mark.parametrize("rounded", [False, True], ids=["distinct", "with ties and zeros"])
def test_p_of_very_many_values_is_that_of_the_normal_approximation(rounded):
    effects = np.random.default_rng(0).normal(size=201) - 0.1
    effects = np.round(effects, 1) if rounded else effects
    expected = stats.wilcoxon(effects, zero_method="zsplit", alternative="less", method="approx")
    found = paired(pd.Series(effects))  # with the variance of the ranks that there are
    assert found.p == pytest.approx(expected.pvalue, rel=1e-2 if rounded else 1e-9)
    began = time.perf_counter()
    paired(pd.Series(np.tile(effects, 500)))
    assert time.perf_counter() - began < 10


def test_six_equal_signs_have_p_1_in_64():
    assert paired(pd.Series(LESS)).p == 1 / 64 == exact_p(np.array(LESS))
    assert paired(pd.Series(LESS)).p_contrary == 1


def test_effects_of_exactly_0_decide_nothing():
    estimate = paired(pd.Series([0.0] * 6))
    assert (estimate.p, estimate.p_contrary) == (1, 1)
    assert (
        verdict(estimate.low, estimate.high, estimate.n, estimate.p, estimate.p_contrary)
        == "undecided"
    )


def test_no_effects_at_all():
    estimate = paired(pd.Series([], dtype=float))
    assert (
        estimate.n == 0
        and np.isnan([estimate.effect, estimate.low, estimate.high, estimate.p]).all()
    )


@pytest.mark.parametrize(
    ("low", "high", "n", "p", "contrary", "expected"),
    [
        (-2.0, -1.0, 6, 0.03, 1.0, "supported"),
        (1.0, 2.0, 6, 1.0, 0.03, "not supported"),
        (-1.0, 1.0, 6, 0.03, 0.9, "undecided"),
        (-2.0, -1.0, 5, 0.03, 1.0, "undecided"),
        (-2.0, -1.0, 6, 0.06, 1.0, "undecided"),
        (1.0, 2.0, 6, 1.0, 0.06, "undecided"),
        (1.0, 2.0, 6, 0.03, 1.0, "undecided"),
        (-2.0, 0.0, 6, 0.03, 1.0, "undecided"),
        (-2.0, -1.0, 6, float("nan"), float("nan"), "undecided"),
        (float("nan"), float("nan"), 6, 0.02, 1.0, "undecided"),
    ],
)
def test_the_verdict(low, high, n, p, contrary, expected):
    assert verdict(low, high, n, p, contrary) == expected
    assert verdict(-high, -low, n, p, contrary, predicted=1) == expected


@pytest.mark.parametrize("seed", range(4))
def test_holms_correction_is_the_closed_test(seed):
    """Adjusted p of a hypothesis: the largest Bonferroni p of all sets of them that it is in."""
    p = np.random.default_rng(seed).uniform(size=5) ** 3
    subsets = [chosen for size in range(1, 6) for chosen in itertools.combinations(range(5), size)]
    for i, adjusted in enumerate(holm(list(p))):
        assert adjusted == pytest.approx(
            max(min(1, len(chosen) * p[list(chosen)].min()) for chosen in subsets if i in chosen)
        )


def test_tests_that_could_not_be_made_do_not_count():
    assert (
        holm([0.02, float("nan"), 0.03])[::2] == [0.04, 0.04]
        and np.isnan(holm([float("nan")])).all()
    )


@pytest.mark.parametrize(("variants", "seeds"), [(1, 6), (3, 6), (4, 7), (6, 7), (7, 8), (42, 10)])
def test_how_many_seeds_could_decide(variants, seeds):
    """All signs equal, everywhere: the smallest p there is, corrected."""
    assert seeds_needed(variants) == seeds
    assert holm([2.0**-seeds] * variants)[0] < 0.05
    assert seeds == 6 or holm([2.0 ** (1 - seeds)] * variants)[0] >= 0.05


@pytest.mark.parametrize("seed", range(3))
def test_the_interval_of_a_share_holds_the_shares_that_a_t_test_does_not_refuse(seed):
    rng = np.random.default_rng(seed)
    whole = pd.Series(1 + rng.normal(scale=0.3, size=8))
    part = 0.6 * whole + rng.normal(scale=0.2, size=8)
    estimate = share(part, whole)
    assert estimate.effect == pytest.approx(100 * part.mean() / whole.mean())
    for edge in (estimate.low, estimate.high):
        assert stats.ttest_1samp(part - edge / 100 * whole, 0).pvalue == pytest.approx(
            0.05, abs=1e-9
        )
    assert stats.ttest_1samp(part - (estimate.low + estimate.high) / 200 * whole, 0).pvalue > 0.05


def test_there_is_no_share_of_what_may_be_nothing():
    part = pd.Series([0.1, 0.2, 0.1, 0.3, 0.2, 0.1])
    assert np.isnan(share(part, pd.Series([1.0, -0.9, 0.8, -1.1, 0.5, 0.1])).low)
    assert np.isnan(share(part, pd.Series([-1.0, -0.9, -0.8, -1.1, -0.5, -0.1])).effect)


# -- saying it -------------------------------------------------------------------------------------


def test_one_sentence_per_claim_with_its_number():
    verdicts = claims(planted("gap", LESS))
    said = sentences(verdicts)
    assert len(said) == len(verdicts)
    low, high = (f"{row(verdicts, 'gap')[name]:+.3g}" for name in ("low", "high"))
    assert (
        "Supported: ELU's gradient is nearer the unit natural gradient than ReLU's (section 3). "
        "degrees between gradient and unit "
        f"natural gradient: -0.0967 [{low}, {high}], n = 6, p = 0.016. At equal training loss. The "
        "sign is the same on two disjoint "
        "probes and at dampings 0.0001, 0.01 and 1."
    ) in said
    for sentence, statement in zip(said, verdicts["statement"], strict=True):
        assert statement in sentence


def test_the_contrary_is_said_plainly():
    (said,) = [
        s
        for s in sentences(claims(planted("loss", [0.1 - d for d in LESS])))
        if "lower training loss" in s
    ]
    assert said.startswith(
        "Contradicted: ELU networks end at a lower training loss than ReLU networks"
    )
    assert "p = 0.016 of the contrary" in said


def test_columns_and_folders(tmp_path):
    runs = planted("gap", LESS)
    columns = [
        "claim", "statement", "source", "statistic", "effect", "low", "high", "n", "p", "verdict",
        "caveat",
    ]  # fmt: skip
    more = ["number", "family", "predicted", "test", "p_holm", "p_contrary", "p_holm_all"]
    assert list(claims(runs).columns) == columns + more
    for name, rows in runs.groupby("run", sort=False):
        config = {key: rows[key].iloc[0].item() for key in ("seed", "epochs", "lr")} | {
            "activation": rows["activation"].iloc[0]
        }
        with Run.create(tmp_path / str(name), {**config, "experiment": "planted"}) as record:
            record.append(rows.drop(columns=["run", "experiment", *config]))
    pd.testing.assert_frame_equal(claims(tmp_path), claims(runs), rtol=1e-6)


def test_the_markdown_table_has_a_row_per_claim_and_no_markup_from_outside():
    verdicts = claims(planted("gap", LESS))
    verdicts.loc[0, "caveat"] = "<script>|`x`\n| [y](z)"
    *lines, empty, below = claims_markdown(verdicts).splitlines()
    assert len(lines) == 2 + len(verdicts) and not empty and "tests in" in below
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1
    assert "\\<script\\>\\|\\`x\\` \\| \\[y\\](z)" in lines[2]
    (gap,) = [line for line in lines if line.startswith("| 2 gap |")]
    assert "supported" in gap and "-0.0967" in gap and "0.016" in gap


def test_the_footnote_counts_the_questions():
    verdicts = claims(planted("gap", LESS))
    tested = verdicts[verdicts["p"].notna()]
    said = footnote(verdicts)
    assert said.startswith(f"{len(tested)} tests in {tested['family'].nunique()} families")
    assert (
        f"with 6 seeds none could: {seeds_needed(len(tested))} are needed" in said
        and "0 supported claims remain" in said
    )
    many = [
        (Planted("elu", s, **PLANT["gap"](-0.1)), Planted("relu", s, **PLANT["gap"](0.0)))
        for s in range(16)
    ]
    verdicts = claims(table(itertools.chain(*many)))
    assert "could" not in footnote(
        verdicts
    ) and f"{(verdicts['p_holm_all'] < 0.05).sum()} supported claims remain" in footnote(verdicts)


def test_a_folder_without_runs_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no runs"):
        claims(tmp_path)
