"""The releases of PyTorch that are tested, as pyproject.toml, the README and `.ci` name them."""

import re
import subprocess
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
TESTED: dict[str, str] = PROJECT["tool"]["biasshift"]["tested"]
OLDEST, NEWEST = min(TESTED, key=Version), max(TESTED, key=Version)


def installed(name: str) -> Version:
    """The version of a distribution, without what it was built for."""
    return Version(Version(metadata.version(name)).public)


def test_the_installed_release_of_pytorch_is_one_that_the_project_supports():
    """A newer one than all that are tested may work; the summary says that it was seen."""
    torch, torchvision = installed("torch"), installed("torchvision")
    assert torch >= Version(OLDEST) and torchvision >= Version(TESTED[OLDEST])
    if str(torch) in TESTED:
        assert str(torchvision) == TESTED[str(torch)]
    if torch > Version(NEWEST):
        pytest.skip(f"torch {torch} is newer than {NEWEST}: add it to the tested ones")


def test_torchvision_is_the_one_of_the_installed_pytorch():
    needs = [Requirement(text) for text in metadata.requires("torchvision") or []]
    (torch,) = [each for each in needs if each.name == "torch"]
    assert installed("torch") in torch.specifier


def test_the_oldest_tested_releases_are_the_least_that_are_installed():
    needs = {Requirement(text).name: text for text in PROJECT["project"]["dependencies"]}
    for name, version in [("torch", OLDEST), ("torchvision", TESTED[OLDEST])]:
        (bound,) = Requirement(needs[name]).specifier
        assert bound.operator == ">=" and f"{version}.".startswith(f"{bound.version}.")


def test_the_readme_names_the_tested_releases():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (line,) = re.findall(r"^Tested with PyTorch .*$", readme, re.MULTILINE)
    versions = re.findall(r"\d+(?:\.\d+)+", line)
    assert versions == [*sorted(TESTED, key=Version), *sorted(TESTED.values(), key=Version)]


def test_continuous_integration_runs_the_tested_releases():
    listed = subprocess.run(
        ["bash", ROOT / ".ci" / "versions", "--list"], capture_output=True, text=True, check=True
    )
    assert dict(line.split() for line in listed.stdout.splitlines()) == TESTED
    assert "\n.ci/versions\n" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_what_runs_with_every_release_is_there_and_does_not_lack_this_file():
    script = (ROOT / ".ci" / "versions").read_text(encoding="utf-8")
    (paths,) = re.findall(r"^TESTS=\((.*)\)$", script, re.MULTILINE)
    assert all((ROOT / path).exists() for path in paths.split())
    assert {"tests/test_versions.py", "tests/measure", "tests/optim"} <= {*paths.split()}
