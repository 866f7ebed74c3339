"""Every row of the table of reports; ``pytest -rA`` and ``python -m tests.reports`` print it."""

import re

import pytest
import torch

from . import every_row
from .table import Row, difference, lines, report, shown

ROWS = every_row()


@pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])
def test_ours_is_the_oracles(row: Row) -> None:
    ours, oracle = row.run()
    apart = difference(ours, oracle)
    print(f"{row.name}: {shown(ours)} against {shown(oracle)}, {apart:.1e} apart")
    assert apart <= row.tolerance, f"ours {ours}\noracle {oracle}"


def test_rows_have_names_of_their_own() -> None:
    assert len({row.name for row in ROWS}) == len(ROWS)


@pytest.mark.parametrize(
    ("ours", "oracle"),
    [
        (torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0 + 1e-6])),
        (torch.tensor([1.0]), torch.tensor([1.0, 1.0])),
        (torch.tensor([1.0, torch.nan]), torch.tensor([1.0, 2.0])),
        (torch.tensor([1.0, 2.0]), torch.tensor([1.0, torch.nan])),
        (torch.tensor([torch.inf]), torch.tensor([1.0])),
        ({"a": torch.ones(1)}, {"b": torch.ones(1)}),
        ({}, {"b": torch.ones(1)}),
        ({"b": torch.ones(1), "c": torch.ones(1)}, {"b": torch.ones(1)}),
        ("nothing was raised", re.compile("ValueError")),
        (torch.ones(1), re.compile("1")),
        ([1, True], [2, True]),
        (0.0, 1e-6),
    ],
)
def test_what_differs_is_wrong(ours: object, oracle: object) -> None:
    assert difference(ours, oracle) > 1e-9


def test_the_table_says_what_is_wrong() -> None:
    before = len(ROWS)

    @report("a planted fault", 1.0, 2.0)
    def of_a_half(value: float) -> tuple[float, float]:
        return value, 1.0

    planted, ROWS[before:] = ROWS[before:], []
    _, right, wrong, total = lines(planted)
    assert right.endswith(" 0.0e+00") and wrong.endswith("1.0e+00  WRONG")
    assert total == "2 rows, 1 wrong"
