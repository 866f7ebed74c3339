"""The README's Python runs as printed, and its commands exist."""

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_python_of_the_readme_runs_and_prints_its_table(capsys):
    names: dict[str, Any] = {}
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 2
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    (printed,) = re.findall(r"```text\n(.*?)```", README, re.DOTALL)
    assert capsys.readouterr().out.split() == printed.split()
    assert names["fisher"].k.shape == (16,) and names["report"]["covered"].any()


def test_the_readme_is_short():
    prose = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
    assert len(prose.split()) <= 700


def test_pictures_exist_and_figures_are_drawn_from_committed_tables():
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    for page in pages:
        pictures = re.findall(r"\]\(([^)]+\.png)", page.read_text(encoding="utf-8"))
        assert all((page.parent / path).is_file() for path in pictures)
    gallery = (ROOT / "docs" / "gallery.md").read_text(encoding="utf-8")
    names = set(re.findall(r"`biasshift figure (\w+)`", gallery)) - {"1", "NAME"}
    tables = ROOT / "paper_figs" / "results"
    assert len(names) >= 11 and all((tables / f"{name}.parquet").is_file() for name in names)


def test_the_make_targets_of_the_readme_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^(\w+):", makefile, re.MULTILINE))
    named = set(re.findall(r"`make (\w+)`", README))
    assert named and named <= targets
