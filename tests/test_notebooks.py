"""The notebooks run on the installed package alone, and what they claim can fail.

Their committed outputs are those of the code, without errors, warnings or paths of a machine.
"""

import ast
import re
from pathlib import Path

import pytest

pytest.importorskip("nbclient", reason="the notebooks need Jupyter: pip install -e '.[notebooks]'")
import nbformat
from nbclient.exceptions import CellExecutionError

from biasshift.experiments.demo import Demo
from biasshift.training.runner import run
from notebooks.execute import VIEW, executed, renumbered

FOLDER = Path(__file__).parent.parent / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
ONE, TWO, THREE, FOUR = NOTEBOOKS
MACHINE = re.compile(r"/(home|root|work|tmp|Users|mnt|var|private|opt)/|[A-Z]:\\\\")
LARGEST = 300_000  # bytes
OWN = "own = None"  # in notebook 4, where a reader puts a folder

every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
pytestmark = [
    pytest.mark.filterwarnings("default"),  # of Jupyter, which is not ours
    pytest.mark.timeout(600),  # a kernel that has lost a message is given up after two minutes
]


def read(path):
    return nbformat.read(path, as_version=4)


def of_code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook):
    return [output for cell in of_code(notebook) for output in cell.outputs]


def texts(output):
    """What a reader sees of an output, pictures aside."""
    data = output.get("data", {}).items()
    return [output.get("text", ""), *(str(v) for kind, v in data if not kind.startswith("image/"))]


def faults(notebook):
    """What must not be in outputs: errors, warnings, paths of a machine."""
    for output in outputs(notebook):
        if output.output_type == "error":
            yield f"an error: {output.ename}"
        if output.output_type == "stream" and output.name == "stderr":
            yield f"a warning: {output.text[:200]}"
        paths = filter(None, map(MACHINE.search, texts(output)))
        yield from (f"a path: {path.group()}" for path in paths)


def sections(notebook):
    """Source of the code below every heading, by heading."""
    sources, heading = {}, "the beginning"
    for cell in notebook.cells:
        if cell.cell_type == "code":
            sources[heading] = sources.get(heading, "") + cell.source + "\n"
        elif headings := re.findall(r"^## (.+)$", cell.source, re.MULTILINE):
            heading = headings[-1]
    return sources


def asserts(source):
    return [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Assert)]


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    """Executes a notebook, each once: what it is then, and the folder of its temporary files."""
    done = {}

    def execute(path):
        if path not in done:
            folder = tmp_path_factory.mktemp(path.stem)
            with pytest.MonkeyPatch.context() as patch:
                # The tests draw nothing to the screen; a notebook shows its pictures.
                patch.delenv("MPLBACKEND", raising=False)
                patch.setenv("TMPDIR", str(folder))
                notebook = read(path)
                for cell in of_code(notebook):
                    cell.outputs, cell.execution_count = [], None
                done[path] = executed(notebook, folder), folder
        return done[path]

    return execute


# -- as committed ----------------------------------------------------------------------------------


def test_there_are_four():
    assert [path.stem for path in NOTEBOOKS] == [
        "1_theorem1",
        "2_theorem2",
        "3_instrument_your_model",
        "4_theory_vs_dynamics",
    ]


@every_notebook
def test_what_is_committed_can_be_read(path):
    notebook = read(path)
    nbformat.validate(notebook)
    counts = [cell.execution_count for cell in of_code(notebook)]
    assert counts == list(range(1, len(counts) + 1))  # run once, top to bottom
    assert any("image/png" in output.get("data", {}) for output in outputs(notebook))
    assert not list(faults(notebook))
    assert path.stat().st_size < LARGEST


@every_notebook
def test_what_is_committed_was_executed_by_make_notebooks(path):
    notebook = read(path)
    assert "version" not in notebook.metadata.language_info  # of Python
    assert not any("execution" in cell.metadata for cell in notebook.cells)  # timings
    assert nbformat.writes(renumbered(notebook)) == nbformat.writes(notebook)


@every_notebook
def test_every_section_has_an_assert_that_looks_at_something(path):
    for heading, source in sections(read(path)).items():
        assert asserts(source) or heading == "the beginning", heading
        for node in asserts(source):
            names = [part for part in ast.walk(node.test) if isinstance(part, ast.Name)]
            assert names, ast.unparse(node)


@every_notebook
def test_links_lead_to_notebooks(path):
    for cell in read(path).cells:
        if cell.cell_type == "markdown":
            names = re.findall(r"\]\(([^)#:]+\.ipynb)\)", cell.source)
            assert all((FOLDER / name).exists() for name in names)


def test_the_same_small_networks_are_those_of_notebook_1():
    assert training(ONE) == training(TWO)


def training(path):
    """The function `trained` and everything that is checked of its networks, as text."""
    (source,) = (cell.source for cell in of_code(read(path)) if "def trained" in cell.source)
    return source[source.index("def trained") : source.index("models =")]


# -- executed --------------------------------------------------------------------------------------


@pytest.mark.slow  # Jupyter executes it
@every_notebook
def test_it_runs_top_to_bottom(path, fresh):
    notebook, _ = fresh(path)
    assert not list(faults(notebook))
    assert any("image/png" in output.get("data", {}) for output in outputs(notebook))


def steady(notebook, words_only):
    """What another machine must print, too: no rounding errors.

    Of whole runs, in which rounding errors grow, neither numbers nor verdicts.
    """
    for cell in notebook.cells:
        if words_only and cell.source.startswith("## Claims"):
            return
        for output in cell.get("outputs", []):
            if output["output_type"] == "display_data" and set(output["data"]) == {"text/plain"}:
                continue  # the progress of what takes more than 3 seconds
            text = output.get("text", "") + output.get("data", {}).get("text/plain", "")
            if words_only:
                yield re.sub(r"[-\s\d.]+", " ", text)
            else:
                yield re.sub(r"\d(\.\d+)?e[-+]\d+", "~", text)


@pytest.mark.slow  # Jupyter executes it
@every_notebook
def test_what_is_committed_is_what_it_prints(path, fresh):
    committed, executed = (
        list(steady(notebook, path == FOUR)) for notebook in (read(path), fresh(path)[0])
    )
    assert committed == executed


@pytest.mark.slow  # Jupyter executes it
def test_executed_twice_it_is_the_same(tmp_path):
    cells = [
        "from ipywidgets import FloatSlider, IntSlider, interact\nimport matplotlib.pyplot as plt",
        "def draw(t):\n    plt.plot([0, t])\n    plt.show()\n\n\n"
        "interact(draw, t=FloatSlider(1.0));",
        "interact(lambda t: print(t), t=IntSlider(3));",
    ]
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(source, id=f"cell{i}") for i, source in enumerate(cells)]
    )
    once = nbformat.writes(executed(notebook, tmp_path))
    assert nbformat.writes(executed(nbformat.reads(once, as_version=4), tmp_path)) == once
    assert once.count(VIEW) == 2 and '"value": 3' in once


def test_widgets_are_numbered_in_order_of_appearance():
    def planted(first, second, inner, lost):
        views = [
            nbformat.v4.new_output("display_data", {VIEW: {"model_id": name}})
            for name in (first, second)
        ]
        states = {
            first: {"layout": f"IPY_MODEL_{inner}"},
            second: {"layout": f"IPY_MODEL_{inner}"},
            inner: {"width": 3},
            lost: {},
        }
        cell = nbformat.v4.new_code_cell("", id="one", outputs=views)
        notebook = nbformat.v4.new_notebook(cells=[cell])
        notebook.metadata.widgets = {"application/vnd.jupyter.widget-state+json": {"state": states}}
        return nbformat.from_dict(notebook)

    first, second = (
        renumbered(planted(*(letter * 32 for letter in letters))) for letters in ("abcd", "dcba")
    )
    assert nbformat.writes(first) == nbformat.writes(second)
    states = first.metadata.widgets["application/vnd.jupyter.widget-state+json"]["state"]
    assert {int(name, 16): state for name, state in states.items()} == {
        0: {"layout": f"IPY_MODEL_{2:032x}"},
        1: {"layout": f"IPY_MODEL_{2:032x}"},
        2: {"width": 3},
    }


# -- what they claim can fail ----------------------------------------------------------------------

WRONG = {
    "labels drawn in place of all": (
        ONE,
        "_right = bs.unit_fisher\n"
        "bs.unit_fisher = lambda *args, **named: _right(*args, labels='sampled', **named)",
        "by_func",
    ),
    "other initial weights": (
        ONE,
        "_right = mlp\n"
        "mlp = lambda *args, seed, **named: "
        "_right(*args, seed=int(named['activation'] == 'elu'), **named)",
        "the same initial weights",
    ),
    "the poster's k": (
        TWO,
        "_right = bs.UnitFisher.k.fget\n"
        "bs.UnitFisher.k = property(lambda fisher: _right(fisher) - 1)",
        "third way",
    ),
    "hooks that stay": (
        THREE,
        "from biasshift.tracking import logs; logs.Log._take_off = lambda log: None",
        "leave behind",
    ),
    "random numbers that are used up": (
        THREE,
        "_right = bs.instrument\n"
        "bs.instrument = lambda *args, **named: (torch.rand(1), _right(*args, **named))[1]",
        "as before the watching",
    ),
    "inputs that are not known": (
        FOUR,
        "_right = layer_inputs; layer_inputs = lambda runs: _right(runs) * float('nan')",
        "enough_samples",
    ),
    "verdicts turned around": (
        FOUR,
        "_right = bs.claims\n"
        "turned = {'supported': 'not supported', 'not supported': 'supported'}\n"
        "bs.claims = lambda runs: _right(runs).replace({'verdict': turned})",
        "side[decided.index]",
    ),
    "verdicts without a test": (
        FOUR,
        "_right = bs.claims; bs.claims = lambda runs: _right(runs).assign(verdict='supported')",
        "side[decided.index]",
    ),
}


@pytest.mark.slow  # Jupyter executes it
@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_found_by_its_assert(what, fresh, tmp_path):
    path, mutation, where = WRONG[what]
    notebook = read(path)
    if path == FOUR:
        notebook = on_runs(next(fresh(FOUR)[1].glob("tmp*/elu-0")).parent)
    notebook.cells.insert(2, nbformat.v4.new_code_cell(mutation))  # behind the imports
    with pytest.raises(CellExecutionError, match="AssertionError"):
        executed(notebook, tmp_path)
    (failed,) = (
        cell
        for cell in of_code(notebook)
        if any(output.output_type == "error" for output in cell.outputs)
    )
    assert where in failed.source


def on_runs(folder):
    """Notebook 4 on a reader's own runs."""
    notebook = read(FOUR)
    (cell,) = (cell for cell in of_code(notebook) if OWN in cell.source)
    cell.source = cell.source.replace(OWN, f"own = {str(folder)!r}")
    return notebook


@pytest.mark.slow  # Jupyter executes it
def test_notebook_4_reads_other_runs(tmp_path):
    demo = Demo(smoke=True, out=tmp_path)
    images = demo.load()
    for config in demo.configs():  # four activation functions, one seed, another depth and width
        folder = tmp_path / "runs" / config.activation
        run([demo.trial(config, images)], [folder], "refuse", lambda progress: None)
    notebook = executed(on_runs(tmp_path / "runs"), tmp_path)
    assert [fault for fault in faults(notebook) if "path" not in fault] == []
    assert "lrelu" in "".join(text for output in outputs(notebook) for text in texts(output))


def test_a_false_assert_would_be_found(tmp_path):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("assert 1 + 1 == 3")])
    with pytest.raises(CellExecutionError, match="AssertionError"):
        executed(notebook, tmp_path)
    assert list(faults(notebook)) == ["an error: AssertionError"]


def test_a_path_of_a_machine_would_be_found():
    output = nbformat.v4.new_output("stream", name="stdout", text="written to /home/somebody/runs")
    cell = nbformat.v4.new_code_cell("", outputs=[output])
    assert list(faults(nbformat.v4.new_notebook(cells=[cell]))) == ["a path: /home/"]
