"""What the runs say about the claims: once for all of them, or once for each setting."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import pandas as pd

from biasshift.analysis.formatting import reading_table
from biasshift.analysis.quantities import per_run
from biasshift.analysis.verdicts import claims
from biasshift.report.groups import RunGroup

MAX_SETTINGS = 6  # each of which gets its own claims


@dataclass(frozen=True)
class Judgement:
    """The claims of runs of one setting, or the reason why they cannot be judged.

    Args:
        setting: What the runs have in common and other runs do not; "" where all runs are judged.
        claims: The table of `biasshift.claims`; None where there is a reason against it.
        means: The table of `biasshift.analysis.formatting.reading_table`.
        reason: Why the runs cannot be judged.
    """

    setting: str
    claims: pd.DataFrame | None = None
    means: pd.DataFrame = field(default_factory=pd.DataFrame)
    reason: str = ""


def judgements(
    runs: pd.DataFrame, groups: Sequence[RunGroup], left_out: list[str]
) -> tuple[list[Judgement], str]:
    """Returns the claims of all runs, or of each setting, and why the runs are not judged together.

    Runs that support no verdict have one judgement, with its reason.

    Args:
        runs: The rows of `biasshift.runs.reader.read_runs`.
        groups: The groups of runs, which name the settings.
        left_out: Gets a sentence where there are more than `MAX_SETTINGS` settings.
    """
    together = _judged("", runs)
    if not together.reason:
        return [together], ""
    settings = list(dict.fromkeys(group.setting for group in groups))
    found = []
    for setting in settings[:MAX_SETTINGS] if len(settings) > 1 else []:
        names = [run for group in groups if group.setting == setting for run in group.runs]
        rows = runs.loc[runs["run"].isin(names)]
        found.append(_judged(setting or "all other runs", rows))
    if {judgement.reason for judgement in found} <= {together.reason}:
        return [together], ""
    if len(settings) > MAX_SETTINGS:
        left_out.append(
            f"Claims of {len(settings) - MAX_SETTINGS} of {len(settings)} settings: give fewer "
            "runs at a time."
        )
    return found, together.reason


def _judged(setting: str, runs: pd.DataFrame) -> Judgement:
    try:
        return Judgement(setting, claims(runs, progress=False), reading_table(per_run(runs)))
    except (TypeError, LookupError) as error:
        # Options of other types than any run of ours has must not take the charts away.
        reason = f"The options of these runs do not have the types that claims need ({error})."
    except ValueError as error:
        reason = str(error)
    return Judgement(setting, reason=reason)
