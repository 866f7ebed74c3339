"""The documentation builds without warnings, its Python runs, and no public name is missing."""

import re
import subprocess
import sys
from contextlib import chdir
from functools import cache
from pathlib import Path

import pytest

import biasshift as bs
from biasshift import data, nets, optim, training
from biasshift.cli.parser import parse
from biasshift.runs.reader import read_runs

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
EXTRA = "the documentation needs mkdocs: pip install -e '.[docs]'"


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def commands(page):
    """Every `biasshift …` of a page, without comments, as arguments."""
    lines = "\n".join(blocks(page, "sh")).splitlines()
    words = [line.partition("#")[0].split() for line in lines]
    return [arguments for command, *arguments in filter(None, words) if command == "biasshift"]


def with_pages(having):
    pages = [page for page in PAGES if having(page)]
    return pytest.mark.parametrize("page", pages, ids=lambda page: page.stem)


@pytest.fixture(scope="module")
def run_python(tmp_path_factory):
    """Runs the Python of a page, once, in a folder of its own; returns the folder and the names."""

    @cache
    def run(page):
        names, folder = {}, tmp_path_factory.mktemp(page.stem)
        with chdir(folder):
            for block in blocks(page, "python"):
                exec(compile(block, page.name, "exec"), names)
        return folder, names

    return run


@with_pages(lambda page: blocks(page, "python"))
def test_the_python_of_a_page_runs(page, run_python):
    run_python(page)


def test_runs_of_a_loop_of_ones_own_are_judged_as_the_page_says(run_python):
    folder, names = run_python(DOCS / "howto" / "claims.md")
    table = read_runs(folder / "runs" / "mine")
    pairs = names["found"].set_index("claim")["n"]
    at_equal_loss = ["means-loss", "coupling", "gap", "correction", "speed"]
    assert (pairs[["means", "inherited", "loss", "gap-steps", *at_equal_loss]] == 6).all()
    exam = [name for name in table if name.startswith("exam_")]
    without = table.query("exam_damping.isna()").drop(columns=exam)
    unexamined = bs.claims(without).set_index("claim")
    assert (unexamined.loc[at_equal_loss, "n"] == 0).all()
    assert (unexamined.loc[at_equal_loss, "verdict"] == "undecided").all()
    assert (unexamined.loc[["means", "inherited", "loss", "gap-steps"], "n"] == 6).all()


@with_pages(commands)
def test_the_commands_of_a_page_exist(page):
    for arguments in commands(page):
        parse(arguments)  # exits where an option or a command does not exist


def test_a_command_that_does_not_exist_would_be_found(capsys):
    with pytest.raises(SystemExit):
        parse(["sweep", "--parts", "1", "16"])


def test_every_page_is_in_the_navigation():
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert set(re.findall(r": (\S+\.md)$", nav, re.MULTILINE)) == {
        page.relative_to(DOCS).as_posix() for page in PAGES
    }


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("mkdocs", reason=EXTRA)
    pytest.importorskip("mkdocstrings", reason=EXTRA)
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir"]
    built = subprocess.run([*command, str(folder)], cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return folder


@pytest.mark.parametrize(
    ("page", "names"),
    [
        ("biasshift", [name for name in bs.__all__ if name != "optim"]),
        ("optim", optim.__all__),
        ("data", data.__all__),
        ("nets", nets.__all__),
        ("training", training.__all__),
    ],
)
def test_every_public_name_is_in_the_reference(site, page, names):
    html = (site / "api" / f"{page}.html").read_text(encoding="utf-8")
    described = re.findall(r'<h\d id="([\w.]+)" class="doc doc-heading"', html)
    assert set(names) <= {name.rsplit(".", 1)[-1] for name in described}


def test_docstrings_become_markdown(site):
    optimizer = (site / "api" / "optim.html").read_text(encoding="utf-8")
    # The table of updates is a table.
    assert "<td>quasi-diagonal gradient</td>" in optimizer
    for page in (site / "api").glob("*.html"):
        # No doctest is taken for a quotation.
        assert "<blockquote>" not in page.read_text(encoding="utf-8")


def test_formulas_in_tables_show_no_escapes(site):
    for page in site.rglob("*.html"):
        assert not re.findall(r"<code>[^<]*\\\|[^<]*</code>", page.read_text(encoding="utf-8"))


def test_nothing_is_loaded_from_elsewhere(site):
    for page in site.rglob("*.html"):
        html = page.read_text(encoding="utf-8")
        assert not re.findall(r'<(?:script|img|iframe)[^>]+src="(?:https?:)?//', html)
        links = r'<link[^>]+rel="(?:stylesheet|preconnect)"[^>]+href="(?:https?:)?//'
        assert not re.findall(links, html)


@pytest.mark.parametrize("name", ["theory", "glossary"])
def test_formulas_are_mathematics_that_needs_no_script(site, name):
    page = (site / f"{name}.html").read_text(encoding="utf-8")
    formulas = re.findall(r"<math.*?</math>", page, re.DOTALL)
    source = (DOCS / f"{name}.md").read_text(encoding="utf-8")
    assert len(formulas) == len(re.findall(r"\$\$.+?\$\$|\$[^$]+\$", source, re.DOTALL))
    assert "arithmatex" not in page and "$" not in re.sub(r"<(script|style).*?</\1>", "", page)
    # An unknown command would come out as its name.
    assert not re.search(r"\\[a-z]|&amp;", "".join(formulas))
