"""The file tree is the architecture: a module imports only from rungs below it."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "biasshift"
LADDER = [  # bottom to top; a name stands for a module or for a folder of modules
    {"_sigint", "theory", "activations", "precision", "distributed", "atomic"},
    {"fisher", "nets", "runs", "data"},
    {"measure", "analysis"},
    {"optim", "verification", "tracking", "plots"},
    {"training", "report"},
    {"experiments"},
    {"figures"},
    {"cli"},
]
EXPERIMENTS = ("autoencoder", "cifar11", "cifar18", "demo", "imagenet", "mnist", "sweep")
RUNG = {name: height for height, rung in enumerate(LADDER) for name in rung}
MODULES = [
    path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.name not in ("__init__.py", "__main__.py")
]


def imports(tree: ast.AST, path: Path) -> Iterator[str]:
    """Every imported name in full, also those imported inside functions."""
    folder = ["biasshift", *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = folder[: len(folder) - node.level + 1] if node.level else []
            module = ".".join([*base, *filter(None, [node.module])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def faults(source: str, path: Path) -> Iterator[str]:
    name = path.relative_to(PACKAGE).with_suffix("").parts[0]
    if name not in RUNG:
        yield f"'{name}' stands on no rung: give it one in LADDER, above what it imports and below what imports it"
        return
    for imported in imports(ast.parse(source), path):
        root, _, rest = imported.partition(".")
        other = rest.partition(".")[0]
        if root == "matplotlib" and name != "plots":
            yield f"'{name}' imports matplotlib; only plots may"
        if (
            name == other == "experiments"
            and path.stem != "__init__"
            and rest.split(".")[1] in EXPERIMENTS
        ):
            yield f"'{name}' imports '{imported}': an experiment stands alone, on what all of them share"
        if root != "biasshift" or other == name:
            continue
        if other not in RUNG:
            yield f"'{name}' imports '{imported}': name the module it comes from, not the package"
        elif RUNG[other] >= RUNG[name]:
            yield f"'{name}' imports '{other}', which is not below it"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_imports_only_from_rungs_below(path):
    found = list(faults(path.read_text(encoding="utf-8"), path))
    assert not found


@pytest.mark.parametrize(
    ("file", "source", "word"),
    [
        ("fisher/unit_fisher.py", "from biasshift.measure.hooks import Tape", "not below"),
        ("fisher/unit_fisher.py", "def f():\n    from .. import cli", "not below"),
        ("experiments/mnist.py", "from .cifar11 import STEPS", "stands alone"),
        ("data/dataset.py", "import biasshift.training", "not below"),
        ("measure/fisher.py", "import biasshift as bs", "name the module"),
        ("report/page.py", "import matplotlib.pyplot as plt", "only plots"),
        ("utils.py", "", "no rung"),
    ],
)
def test_the_ladder_refuses(file, source, word):
    assert [word in fault for fault in faults(source, PACKAGE / file)] == [True]


def test_the_ladder_lets_pass():
    source = "import torch\nfrom biasshift import theory\nfrom ..atomic import replacing"
    assert not list(faults(source, PACKAGE / "fisher" / "moments.py"))


def test_importing_biasshift_is_light():
    heavy = ["pandas", "pyarrow", "torchvision", "matplotlib", "sklearn"]
    code = f"import biasshift, sys; print([name for name in {heavy} if name in sys.modules])"
    shown = subprocess.run(
        [sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, check=True
    ).stdout
    assert shown.strip() == "[]"
