"""The table of reports: faults that users of such toolkits met, each with the oracle's value."""

from importlib import import_module

from .table import ROWS, Row

SUBJECTS = "updates axes examples state activations optimizers samples files layers".split()


def every_row() -> list[Row]:
    """Rows of all subjects, in the order of their files."""
    for subject in SUBJECTS:
        import_module(f".{subject}", __package__)
    return ROWS
