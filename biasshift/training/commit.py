"""What the members of an ensemble are resumed from after a kill: all from the same step.

A checkpoint of an ensemble is written twice. First each member gets the next one beside its present
one; when all have it, it takes the present one's place. A kill leaves either all members with the
present one, or all with the next.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from biasshift.runs.schema import CHECKPOINT, NEXT_CHECKPOINT
from biasshift.runs.state import State
from biasshift.training.checkpoint import Checkpoint


@dataclass(frozen=True)
class Found:
    """What a run folder holds before a run is resumed.

    Args:
        folder: The run's.
        state: What its state.json says.
        checkpoints: Those that it may be resumed from: the present one, and the next.
    """

    folder: Path
    state: State = field(default_factory=State)
    checkpoints: list[Checkpoint] = field(default_factory=list)

    @property
    def finished(self) -> bool:
        """Whether the run is complete and closed."""
        return self.state.state == "finished"

    @property
    def lost(self) -> bool:
        """Whether it diverged while other members went on, and is closed."""
        return self.ended and self.state.diverged and self.state.state == "failed"

    @property
    def ended(self) -> bool:
        """Whether all its rows are on disk."""
        return bool(self.state.together)

    def has(self, step: int) -> bool:
        """Returns whether it may be resumed from a step."""
        return any(checkpoint.step == step for checkpoint in self.checkpoints)


def closing(members: Sequence[Found]) -> list[bool]:
    """Returns which members are only to be closed: they and all others have come to their end.

    A member that is lost, and closed, counts with them as long as one of the others is open.
    """
    open_ends = [
        member.ended
        and not member.finished
        and not member.lost
        and all(peer.ended or peer.finished for peer in _peers(members, member.state.together))
        for member in members
    ]
    stay = {
        peer.folder
        for member, only in zip(members, open_ends, strict=True)
        if only
        for peer in _peers(members, member.state.together)
        if peer.lost
    }
    return [only or member.folder in stay for only, member in zip(open_ends, members, strict=True)]


def starts(members: Sequence[Found]) -> list[Checkpoint | None]:
    """Returns what each member is resumed from; None: it begins anew.

    The next checkpoint counts only where all members have it, as their next one or as their present
    one.
    """
    chosen = []
    for member in members:
        by_name = {checkpoint.name: checkpoint for checkpoint in member.checkpoints}
        following = by_name.get(NEXT_CHECKPOINT)
        if following and not all(
            peer.has(following.step) for peer in _peers(members, following.ensemble)
        ):
            following = None
        chosen.append(following or by_name.get(CHECKPOINT))
    return chosen


def _peers(members: Sequence[Found], names: Sequence[str]) -> list[Found]:
    """Returns the members whose folders have these names: tails of their paths."""
    tails = [tuple(name.split("/")) for name in names]
    return [
        member
        for member in members
        if any(member.folder.resolve().parts[-len(tail) :] == tail for tail in tails)
    ]
