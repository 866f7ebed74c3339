"""The file tree is the architecture: a module imports only from rungs below it."""

import ast
import pickle
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import biasshift
from biasshift import experiments, runs

PACKAGE = Path(__file__).parent.parent / "biasshift"
LADDER = [  # bottom to top; a name stands for a module or for a folder of modules
    {"restoration", "lazy_names", "activation_names"},
    {
        "_sigint",
        "theory",
        "activations",
        "precision",
        "progress",
        "distributed",
        "atomic",
        "display",
        "escapes",
    },
    {"fisher", "nets", "runs", "data"},
    {"measure", "analysis"},
    {"optim", "verification", "tracking", "plots"},
    {"training", "report", "integrations"},
    {"experiments"},
    {"figures"},
    {"cli"},
]
EXPERIMENTS = ("autoencoder", "cifar11", "cifar18", "demo", "imagenet", "mnist", "sweep")
GERUNDS = {"training", "tracking", "formatting", "whitening", "coupling"}  # terms of the field
LONGEST_CHAIN = 15  # files that import each other in a row
RUNG = {name: height for height, rung in enumerate(LADDER) for name in rung}
FACES = ("__init__.py", "__main__.py")
MODULES = [path for path in sorted(PACKAGE.rglob("*.py")) if path.name not in FACES]


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
        yield f"'{name}' has no rung: give it one in LADDER, between what it imports and its users"
        return
    for imported in imports(ast.parse(source), path):
        root, _, rest = imported.partition(".")
        other = rest.partition(".")[0]
        if root == "matplotlib" and name != "plots":
            yield f"'{name}' imports matplotlib; only plots may"
        if name == other == "experiments" and path.name not in FACES:
            if rest.split(".")[1] in EXPERIMENTS:
                yield f"'{name}' imports '{imported}': an experiment stands alone, on shared files"
        if root != "biasshift" or other == name:
            continue
        if other not in RUNG:
            yield f"'{name}' imports '{imported}': name the module it comes from, not the package"
        elif RUNG[other] >= RUNG[name]:
            yield f"'{name}' imports '{other}', which is not below it"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_imports_only_from_rungs_below(path):
    assert not list(faults(path.read_text(encoding="utf-8"), path))


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


# -- names -----------------------------------------------------------------------------------------


def submodules(package: Path) -> set[str]:
    folders = {path.name for path in package.iterdir() if (path / "__init__.py").exists()}
    return {path.stem for path in package.glob("*.py")} | folders


def exported(package: Path) -> set[str]:
    """The names in ``__all__`` of a package."""
    tree = ast.parse((package / "__init__.py").read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return set(ast.literal_eval(node.value))
    return set()


@pytest.mark.parametrize(
    "package", sorted(path.parent for path in PACKAGE.rglob("__init__.py")), ids=lambda p: p.name
)
def test_no_module_has_the_name_of_a_public_function_of_its_package(package):
    """Else ``import biasshift.claims as m`` would give the function."""
    functions = {name for name in exported(package) if package != PACKAGE or name != "optim"}
    assert not functions & submodules(package)


def test_names_of_modules_are_nouns():
    words = {path.stem.split("_")[-1] for path in PACKAGE.rglob("*.py")}
    words |= {path.parent.name.split("_")[-1] for path in MODULES}
    assert {word for word in words if word.endswith("ing")} <= GERUNDS


# -- chains ----------------------------------------------------------------------------------------


@cache
def exports(package: Path) -> dict[str, str]:
    """The module that each name of a package's face comes from."""
    source = (package / "__init__.py").read_text(encoding="utf-8")
    names = imports(ast.parse(source), package / "__init__.py")
    return {name.rpartition(".")[2]: name.rpartition(".")[0] for name in names}


def module_of(name: str) -> Path | None:
    """The file that an imported name comes from, through the faces of packages."""
    parts = name.split(".")
    if parts[0] != "biasshift":
        return None
    for length in range(len(parts), 0, -1):
        path = PACKAGE.joinpath(*parts[1:length])
        if path.with_suffix(".py").is_file() and length > 1:
            return path.with_suffix(".py")
        if (path / "__init__.py").is_file():
            home = exports(path).get(parts[length]) if length < len(parts) else None
            return None if home in (None, ".".join(parts[:length])) else module_of(home)
    return None


def graph() -> dict[Path, set[Path]]:
    """The files that every file imports."""
    sources = {path: ast.parse(path.read_text(encoding="utf-8")) for path in MODULES}
    return {
        path: {found for name in imports(tree, path) if (found := module_of(name))} - {path}
        for path, tree in sources.items()
    }


def longest_chain() -> list[Path]:
    """The longest row of files in which each imports the next."""
    edges, chains = graph(), {}
    for path in TopologicalSorter(
        edges
    ).static_order():  # raises CycleError where there is a circle
        below = max((chains[other] for other in edges[path]), key=len, default=[])
        chains[path] = [path, *below]
    return max(chains.values(), key=len)


def test_the_longest_chain_of_imports_is_short():
    chain = longest_chain()
    assert len(chain) <= LONGEST_CHAIN, [str(path.relative_to(PACKAGE)) for path in chain]


def test_chains_are_followed_through_faces():
    assert module_of("biasshift.nets.mlp") == PACKAGE / "nets" / "fully_connected.py"
    assert module_of("biasshift.runs.Run") == PACKAGE / "runs" / "writer.py"
    assert module_of("torch.nn") is None
    assert PACKAGE / "fisher" / "unit_fisher.py" in graph()[PACKAGE / "measure" / "fisher.py"]


# -- the package -----------------------------------------------------------------------------------


def test_importing_biasshift_is_light():
    heavy = ["torch", "pandas", "pyarrow", "torchvision", "matplotlib", "sklearn"]
    code = f"import biasshift, sys; print([name for name in {heavy} if name in sys.modules])"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "[]"


@pytest.mark.parametrize("name", ["unit_fisher", "optim", "nets", "data", "theory"])
def test_measuring_needs_no_tables(name):
    """Neither pandas nor what it brings is imported where no table is made."""
    heavy = ["pandas", "pyarrow", "torchvision", "matplotlib", "sklearn"]
    code = (
        f"import biasshift, sys; biasshift.{name}; print([n for n in {heavy} if n in sys.modules])"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "[]"


@pytest.mark.parametrize("package", [biasshift, experiments, runs], ids=lambda p: p.__name__)
def test_public_names_load_when_they_are_used(package):
    assert set(package.__all__) <= set(dir(package))
    for name in dir(package):
        assert getattr(package, name) is not None
    with pytest.raises(AttributeError, match=f"'{package.__name__}' has no attribute 'fischer'"):
        _ = package.fischer


def test_dir_shows_the_public_names_and_nothing_else():
    packages = {"analysis", "data", "experiments", "integrations", "nets", "plots", "runs"}
    packages |= {"theory", "training"}
    assert dir(biasshift) == sorted({*biasshift.__all__, *packages, "__version__"})


@pytest.mark.parametrize("package", [biasshift, experiments, runs], ids=lambda p: p.__name__)
def test_type_checkers_see_the_public_names_that_load_lazily(package):
    """Under ``if TYPE_CHECKING``, from the module that has them at run time, too."""
    seen = exports(Path(package.__file__).parent)
    for name in package.__all__:
        assert name in seen, name
        value = getattr(package, name)
        assert seen[name] in (package.__name__, getattr(value, "__module__", None))


def test_lazily_loaded_names_are_pickled():
    for value in (biasshift.unit_fisher, biasshift.UnitFisher, runs.Run, experiments.Demo()):
        assert pickle.loads(pickle.dumps(value)) == value


def test_names_of_test_files_are_unique():
    """pytest would run only one of two with the same name."""
    names = [path.name for path in Path(__file__).parent.rglob("test_*.py")]
    assert len(names) == len(set(names))
