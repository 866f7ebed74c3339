"""What is there of a run that is resumed: checked, or given checksums where it has none."""

import warnings
from pathlib import Path

from biasshift.runs.integrity import UncheckedRunWarning, digest, file_digest
from biasshift.runs.schema import own_file, read_sealed, segment_files, segment_name
from biasshift.runs.state import State


def segment_digests(folder: Path, state: State, segments: int) -> tuple[str, ...]:
    """Returns the SHA-256 of the first segments, which are what the run has written.

    Args:
        folder: the run's.
        state: of the run, with the checksums that it has, if any.
        segments: how many.

    Raises:
        ValueError: if one is missing or damaged.
    """
    names = dict(segment_files(folder))
    if missing := set(range(segments)) - set(names):
        raise ValueError(
            f"'{folder}' has lost segment {min(missing)}. Give --replace to start it again."
        )
    if state.checked and segments > len(state.segments):
        raise ValueError(
            f"'{folder / 'state.json'}' lists {len(state.segments)} segments, and {segments} are "
            "needed. Give --replace to start the run again."
        )
    digests = []
    for number in range(segments):
        path = own_file(folder, segment_name(number))
        with open(path, "rb") as file:
            digests.append(file_digest(file))
        if state.checked and digests[-1] != state.segments[number]:
            raise ValueError(
                f"'{path}' is damaged. The other segments can be read with damaged='skip'; give "
                "--replace to start the run again."
            )
    return tuple(digests)


def with_checksums(folder: Path) -> State:
    """Returns the state of a run of version 0.1, with checksums of what is there, and warns."""
    warnings.warn(
        UncheckedRunWarning(
            f"'{folder}' may be damaged unseen: written without checksums, by version 0.1."
        ),
        stacklevel=4,
    )
    return State(
        checked=True,
        config=digest(read_sealed(folder, "config.json")[0]),
        provenance=digest(read_sealed(folder, "provenance.json", {})[0]),
    )
