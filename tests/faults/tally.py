"""What came of many faults of one kind."""

from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass
class Tally:
    """How many faults were tried, and what followed.

    Args:
        kind: Of the faults.
        refused: In a sentence that names the file.
        unharmed: All that was read, or came of it, was what it would have been.
        lost: What happened instead, of each that is neither.
    """

    kind: str
    refused: int = 0
    unharmed: int = 0
    lost: list[str] = field(default_factory=list)

    @property
    def tried(self) -> int:
        return self.refused + self.unharmed + len(self.lost)

    def row(self) -> str:
        return (
            f"| {self.kind} | {self.tried} | {self.refused} | {self.unharmed} | {len(self.lost)} |"
        )


HEADER = (
    "| fault | tried | refused with an error that names the file | unharmed | lost |\n"
    "| --- | ---: | ---: | ---: | ---: |"
)


def merged(tallies: Iterable[Tally]) -> list[Tally]:
    """Those of the same kind as one, in their order."""
    by_kind: dict[str, Tally] = {}
    for tally in tallies:
        whole = by_kind.setdefault(tally.kind, Tally(tally.kind))
        whole.refused += tally.refused
        whole.unharmed += tally.unharmed
        whole.lost += tally.lost
    return list(by_kind.values())
