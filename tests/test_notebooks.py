"""The notebooks run from nothing but the installed package, and are committed with outputs that others may read."""

import re
from pathlib import Path

import pytest

pytest.importorskip("nbclient", reason="the notebooks need Jupyter: pip install -e '.[notebooks]'")
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

FOLDER = Path(__file__).parent.parent / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
MACHINE = re.compile(r"/(home|root|work|tmp|Users|mnt|var|private|opt)/|[A-Z]:\\\\")
LARGEST = 300_000  # bytes
SECONDS = 120  # for a whole notebook, on two cores

every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path):
    return nbformat.read(path, as_version=4)


def executed(notebook, folder):
    """Run in a kernel of its own, in an empty folder."""
    resources = {"metadata": {"path": str(folder)}}
    return NotebookClient(notebook, timeout=SECONDS, kernel_name="python3", resources=resources).execute()


def outputs(notebook):
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def texts(output):
    """What a reader sees of an output, pictures aside."""
    shown = output.get("data", {})
    return [output.get("text", ""), *(str(value) for kind, value in shown.items() if not kind.startswith("image/"))]


def faults(notebook):
    """What must not be in outputs: errors, warnings, paths of a machine."""
    for output in outputs(notebook):
        if output.output_type == "error":
            yield f"an error: {output.ename}"
        if output.output_type == "stream" and output.name == "stderr":
            yield f"a warning: {output.text[:200]}"
        yield from (f"a path: {found.group()}" for text in texts(output) if (found := MACHINE.search(text)))


def test_there_are_four():
    assert [path.stem for path in NOTEBOOKS] == ["1_theorem1", "2_theorem2", "3_instrument_your_model", "4_theory_vs_dynamics"]


@every_notebook
def test_what_is_committed_can_be_read(path):
    notebook = read(path)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))  # run once, top to bottom
    assert any("image/png" in output.get("data", {}) for output in outputs(notebook))
    assert not list(faults(notebook))
    assert path.stat().st_size < LARGEST


@every_notebook
def test_the_prose_is_backed_by_asserts(path):
    cells = read(path).cells
    sections = sum(cell.cell_type == "markdown" and cell.source.startswith("## ") for cell in cells)
    asserts = sum(len(re.findall(r"^\s*assert ", cell.source, re.MULTILINE)) for cell in cells if cell.cell_type == "code")
    assert asserts >= sections


@every_notebook
def test_links_lead_to_notebooks(path):
    for cell in read(path).cells:
        if cell.cell_type == "markdown":
            assert all((FOLDER / name).exists() for name in re.findall(r"\]\(([^)#:]+\.ipynb)\)", cell.source))


@every_notebook
@pytest.mark.filterwarnings("default")  # of Jupyter, which is not ours
def test_it_runs_top_to_bottom(path, tmp_path, monkeypatch):
    monkeypatch.delenv("MPLBACKEND", raising=False)  # the tests draw nothing to the screen; a notebook shows its pictures
    notebook = read(path)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    executed(notebook, tmp_path)
    assert not list(faults(notebook))
    assert any("image/png" in output.get("data", {}) for output in outputs(notebook))


@pytest.mark.filterwarnings("default")
def test_a_false_assert_would_be_found(tmp_path):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("assert 1 + 1 == 3")])
    with pytest.raises(CellExecutionError, match="AssertionError"):
        executed(notebook, tmp_path)
    assert list(faults(notebook)) == ["an error: AssertionError"]


def test_a_path_of_a_machine_would_be_found():
    output = nbformat.v4.new_output("stream", name="stdout", text="written to /home/somebody/runs")
    assert list(faults(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("", outputs=[output])]))) == ["a path: /home/"]
