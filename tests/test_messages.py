"""What people read in errors, warnings and docstrings: one form, plain English."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "biasshift"
FILES = sorted(PACKAGE.rglob("*.py"))
MOST_WORDS = 25
DIALECT = re.compile(
    r"\b(is|are) no [a-z]|gone? on with|refused by name|without a word|a look at|measured rightly"
    r"|\bsays? (of )?no\b|the contrary holds|on (its|their) faces?\b|are told apart|is said\b"
)
VALUE = "…"  # what stands for a value in a message
INTERNAL = ("AssertionError", "Refused", "Singular", "TooLarge", "StopIteration")  # never shown


def text(node: ast.AST) -> str | None:
    """A literal message with `VALUE` for its values; None where it is made elsewhere."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(text(part) or f"{VALUE}" for part in node.values)
    if isinstance(node, ast.FormattedValue):
        return f"'{VALUE}'" if node.conversion == ord("r") else VALUE
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = text(node.left), text(node.right)
        return None if left is None and right is None else (left or VALUE) + (right or VALUE)
    return None


def messages(source: str) -> Iterator[tuple[int, str]]:
    """Line and text of every message that is raised or warned."""
    for node in ast.walk(ast.parse(source)):
        call = node.exc if isinstance(node, ast.Raise) else node
        if not isinstance(call, ast.Call) or not call.args:
            continue
        name = ast.unparse(call.func)
        if isinstance(node, ast.Raise) and name in INTERNAL:
            continue
        if isinstance(node, ast.Raise) or name.endswith("warn"):
            said = text(call.args[0])
            if said is not None:
                yield call.lineno, said


def faults(message: str) -> Iterator[str]:
    """What is wrong with the form of a message."""
    if not re.match(r"[A-Z']|--[a-z]", message):
        yield "must begin with a capital, a quoted name or an option"
    if not message.endswith("."):
        yield "must end with a full stop"
    if found := DIALECT.search(message):
        yield f"must be plain English, not '{found[0]}'"
    for sentence in re.split(r"(?<=[.?!]) ", message):
        if len(sentence.split()) > MOST_WORDS:
            yield f"must have at most {MOST_WORDS} words a sentence"
        if len(re.findall(r":(?=\s|$)", sentence)) > 1:
            yield "must have at most one colon a sentence"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_messages_have_one_form(path: Path) -> None:
    """ "X must be Y, got Z. Remedy.", in the field's words."""
    bad = [
        f"{path.name}:{line} {fault}: {message}"
        for line, message in messages(path.read_text(encoding="utf-8"))
        for fault in faults(message)
    ]
    assert not bad, "\n".join(bad)


@pytest.mark.parametrize(
    ("source", "word"),
    [
        ("raise ValueError('lr must be positive.')", "capital"),
        ("raise ValueError(f'{name} must be positive.')", "capital"),
        ("raise ValueError(f'\\'lr\\' must be positive, got {lr}')", "full stop"),
        ("raise ValueError(f'\\'{folder}\\' is no folder.')", "plain English"),
        ("warnings.warn('Runs are not gone on with.')", "plain English"),
        (f"raise ValueError('A{' b' * 25}.')", "words"),
        ("raise ValueError('A: b: c.')", "colon"),
    ],
)
def test_another_form_is_found(source: str, word: str) -> None:
    assert any(word in fault for _, message in messages(source) for fault in faults(message))


def functions(tree: ast.Module) -> Iterator[ast.FunctionDef]:
    """Public functions, and public methods of public classes; not properties."""
    for node in tree.body:
        for inner in node.body if isinstance(node, ast.ClassDef) else [node]:
            if isinstance(inner, ast.FunctionDef) and not inner.name.startswith("_"):
                decorators = " ".join(map(ast.unparse, inner.decorator_list))
                if not (isinstance(node, ast.ClassDef) and node.name.startswith("_")):
                    if "property" not in decorators:
                        yield inner


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_docstrings_begin_with_a_verb(path: Path) -> None:
    """A public function says in its first word what it does: "Returns …", "Writes …"."""
    bad = []
    for function in functions(ast.parse(path.read_text(encoding="utf-8"))):
        docstring = ast.get_docstring(function)
        if docstring and not re.match(r"[A-Z][a-z]+s\b", docstring):
            bad.append(
                f"{path.name}:{function.lineno} {function.name}: {docstring.splitlines()[0]}"
            )
    assert not bad, "\n".join(bad)


PAGES = [
    *PACKAGE.parent.glob("*.md"),
    *(PACKAGE.parent / "docs").rglob("*.md"),
    *(PACKAGE.parent / "paper_figs").rglob("README.md"),
]
# An older wording that the list of changes quotes.
QUOTED = '"Contradicted" stands for "not supported: the contrary\n  holds"'


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_pages_are_plain_english(path: Path) -> None:
    page = " ".join(path.read_text(encoding="utf-8").replace(QUOTED, "").split())
    found = [page[max(0, m.start() - 40) : m.end() + 20] for m in DIALECT.finditer(page)]
    assert not found, f"{path.name}: {found}"
