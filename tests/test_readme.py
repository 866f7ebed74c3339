"""The README's Python runs as printed, and its commands exist."""

import re
from pathlib import Path

import torch
from torch import nn

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_python_of_the_readme_runs():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.ELU(), nn.Linear(5, 3))
    x, y = torch.randn(100, 6), torch.randint(0, 3, (100,))
    names = {
        "model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1), "x": x, "y": y, "loader": [(x, y)] * 5,
        "g": torch.randn(3, 5), "g0": torch.randn(3),
    }  # fmt: skip
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 2
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert names["shift"]["2"].incoming.shape == (3,)


def test_the_pictures_of_the_readme_exist_and_are_drawn_from_committed_tables():
    pictures = re.findall(r'(?:\]\(|src=")([^)"]+\.png)', README)
    assert len(pictures) >= 10 and all((ROOT / path).is_file() for path in pictures)
    tables = set(re.findall(r"<code>biasshift figure (\w+)</code>", README)) - {"1"}
    assert tables and all(
        (ROOT / "paper_figs" / "results" / f"{name}.parquet").is_file() for name in tables
    )


def test_the_make_targets_of_the_readme_exist():
    targets = set(
        re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    )
    assert set(re.findall(r"^make (\w+)", README, re.MULTILINE)) <= targets
