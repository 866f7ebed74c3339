"""Where means are larger, is the coupling, and where the coupling is larger, is the gap (claim 2,
as rank correlations)?
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from biasshift.analysis.claim import Claim
from biasshift.analysis.claims.coupling import NO_POINTS, ONE_PROBE, POINTS
from biasshift.analysis.evidence import NOT_REPEATED, Evidence, repeated
from biasshift.analysis.layer_points import rank_correlations, residuals
from biasshift.analysis.statistics import paired

if TYPE_CHECKING:
    import pandas as pd

LINKS = (  # family, cause, effect, statement, statistic
    ("mean-coupling", "incoming", "coupling", "where incoming means are larger, bias and weights "
                                              "are coupled more", "mean |E_p(a)| and h"),
    ("coupling-gap", "coupling", "gap",
     "where bias and weights are coupled more, the gradient is farther from the unit natural "
     "gradient", "h and the angle between them"),
)  # fmt: skip


class Scope(NamedTuple):
    """Which points are ranked against each other."""

    name: str
    words: str
    along: list[str]  # what they have in common along the run
    examined: list[str] | None  # at equal loss; None: an examination has no such points
    caveat: str
    decides: bool = True
    of_residuals: bool = False  # with the mean over seeds of points that agree in these taken off


NO_CAUSE = "A correlation is no cause"
ONE_ORDER = f"{NO_CAUSE}, and all seeds repeat the same few activation functions, whose order is one observation: described, not decided."
SCOPES = (
    Scope("seeds", "from seed to seed, of the same activation, layer and "
                   "step", ["activation", "step", "layer"], ["activation", "layer"],
          f"{NO_CAUSE}; the mean over seeds is taken off, so that depth, time and activation "
          "function cannot make it.", of_residuals=True),
    Scope("layers", "across layers alone", ["activation", "step"], ["activation"], f"{NO_CAUSE}: depth may move both."),
    Scope("steps", "across steps alone", ["activation", "layer"], None, f"{NO_CAUSE}: time may "
                                                                        "move both."),
    Scope("activations", "across activations "
                         "alone", ["step", "layer"], ["layer"], ONE_ORDER, decides=False),
    Scope("all", "over all layers, steps and activations", [], [], ONE_ORDER, decides=False),
)  # fmt: skip


def follow_means(evidence: Evidence) -> Iterator[Claim]:
    """Claim 2, within and across seeds, layers, steps and activations; one number per seed."""
    for family, cause, effect, statement, of in LINKS:
        for scope in SCOPES:
            found = paired(
                _correlations(evidence.points, cause, effect, scope, scope.along).reindex(
                    evidence.seeds()
                ),
                1,
            )
            said, sure = _repeated(evidence, cause, effect, scope, found.effect)
            variants = "within" if scope.decides else scope.name
            yield Claim(
                2, f"{family}-{scope.name}", f"{family}-{variants}", f"{statement}, {scope.words}", "section 3",
                f"rank correlation of {of}", found, f"{scope.caveat} {POINTS} "
                                                    f"{said}", NO_POINTS, 1, unsure=not (sure and scope.decides),
            )  # fmt: skip


def _correlations(
    points: "pd.DataFrame", cause: str, effect: str, scope: Scope, common: list[str]
) -> "pd.Series":
    if scope.of_residuals and len(points):
        points, common = residuals(points, (cause, effect), common), []
    return rank_correlations(points, cause, effect, common)


def _repeated(
    evidence: Evidence, cause: str, effect: str, scope: Scope, found: float
) -> tuple[str, bool]:
    """With h corrected for few samples along the run; at equal loss, on two probes at three
    dampings.
    """
    swapped = {"coupling": "corrected"}
    again = _correlations(
        evidence.points, swapped.get(cause, cause), swapped.get(effect, effect), scope, scope.along
    )
    if again.mean() * found < 0:
        return "The sign changes when h is corrected for few samples.", False
    if scope.examined is None:
        return f"On one probe at one damping. {NOT_REPEATED}", False
    common = scope.examined
    repetition = repeated(
        evidence.exam_points,
        lambda points: _correlations(points, cause, effect, scope, common),
        found,
    )
    return ONE_PROBE.format(repetition.said), repetition.sure
