"""The program as a stranger uses it: what it prints, what it leaves behind, and how it fails."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import pytest
import torchvision
from planted import Planted
from rich.console import Console
from tiny import Tiny

from biasshift import cli
from biasshift.analysis.formatting import MAIN, VERDICTS, effect, footnote
from biasshift.analysis.verdicts import claims
from biasshift.cli import claims as claims_command, parser, results, train
from biasshift.cli.console import print_paths, progress
from biasshift.experiments import demo
from biasshift.experiments.demo import Demo
from biasshift.runs.integrity import digest, sealed, unsealed
from biasshift.runs.reader import read_runs, run_states
from biasshift.runs.writer import Run
from biasshift.training.trial import Progress

ROOT = Path(__file__).parents[2]
PATIENCE = 90  # seconds, for a machine that is busy with something else


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """An empty working directory, no network, no color, a terminal of 80 columns."""

    def refuse(*args, **kwargs):
        raise OSError("no network in tests")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torchvision.datasets.mnist, "download_and_extract_archive", refuse)
    for name in ("BIASSHIFT_DATA", "FORCE_COLOR", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "80")
    return tmp_path


def write_run(folder: Path, rows: pd.DataFrame) -> None:
    names = ["activation", "seed", "experiment", "epochs", "lr"]
    config = {name: rows[name].tolist()[0] for name in names}
    with Run.create(folder, config) as record:
        record.append(rows.drop(columns=["run", *config]))


@pytest.fixture
def runs(here) -> Path:
    """Six seeds of ELU and ReLU below `runs/planted`."""
    elu, relu = ("elu", 60.0, 0.1, (0.5, 0.4, 0.1)), ("relu", 70.0, 0.4, (0.6, 0.3, 0.1))
    for name, angle, mean, shares in (elu, relu):
        for seed in range(6):
            exam = {"gap_degrees": angle + seed / 7}
            run = Planted(
                name, seed, unit_mean=mean, shares=shares, exam=lambda *_, exam=exam: exam
            )
            write_run(here / "runs" / "planted" / f"{name}-{seed}", run.rows())
    return here / "runs" / "planted"


def call(capsys, *arguments: str) -> tuple[int, str, str]:
    """Exit status, stdout and stderr."""
    status = 0
    try:
        cli.main(arguments)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    return status, *capsys.readouterr()


def spawn(*arguments: str, **options) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *arguments], env=environment, stderr=subprocess.PIPE, text=True, **options
    )


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


# -- help ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["demo", "train", "figure", "claims", "runs"]),
        (["demo"], ["--quick", "--out", "--workers", "--resume", "--smoke", "Needs no download"]),
        (["train"], ["mnist"]),
        (
            ["train", "mnist"],
            ["--activation", "--seeds", "--epochs", "(default: 300)", "--data", "$BIASSHIFT_DATA"],
        ),
        (
            ["figure"],
            ["1 (activation functions)", "--out", "table1", "theory4", "--quick", "--save"],
        ),
        (["claims"], ["Run folders"]),
        (["runs"], ["Run folders", "(default:"]),
    ],
)
def test_help(here, capsys, arguments, words):
    status, shown, errors = call(capsys, *arguments, "--help")
    assert (status, errors) == (0, "")
    assert all(word in shown for word in words)
    assert max(map(len, shown.splitlines())) < 130 and "__" not in shown


@pytest.mark.parametrize(
    "command",
    ["demo", *(f"train {name}" for name in parser.EXPERIMENTS), "sweep", *parser.READERS],
)
def test_every_option_has_a_help_text(here, capsys, monkeypatch, command):
    """Between the option and its default."""
    monkeypatch.setenv("COLUMNS", "600")
    shown = call(capsys, *command.split(), "--help")[1]
    assert "(default" in shown
    assert not re.findall(r"^│ +(?:--\S+(?: \S+)*  +)?\(default.*", shown, re.MULTILINE)


@pytest.mark.parametrize(
    ("words", "exits", "also"),
    [
        (["--help"], 0, ["rich"]),
        (["--version"], 0, ["rich", "tyro"]),
        (["nonsense"], 2, ["rich"]),
        (["train", "--help"], 0, ["rich"]),
        (["train", "nonsense"], 2, ["rich"]),
        (["runs", "--wrong"], 2, ["rich"]),
        (["figure", "nonsense"], 2, ["rich"]),
        (["claims", "--help"], 0, ["rich"]),
        (["report", "-o"], 2, ["rich"]),
        (["claims"], 2, []),
        (["runs", "nowhere"], 2, []),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_what_needs_no_library_imports_none(tmp_path, words, exits, also):
    """Least of all PyTorch. tyro imports `typeguard` to check some kinds of defaults."""
    heavy = ["torch", "matplotlib", "altair", "torchvision", "sklearn", "typeguard", *also]
    heavy += ["pandas", "pyarrow", "asyncio"] if also else []
    code = (
        "import sys\nfrom biasshift.cli import main\ntry:\n    main(sys.argv[1:])\n"
        "finally:\n    print([name for name in "
        f"{heavy} if name in sys.modules])"
    )
    process = spawn("-c", code, *words, stdout=subprocess.PIPE, cwd=tmp_path)
    shown = process.communicate(timeout=PATIENCE)[0]
    assert (process.returncode, shown.splitlines()[-1]) == (exits, "[]")


def test_runs_are_listed_without_pytorch(runs):
    code = (
        "import sys\nfrom biasshift.cli import main\nmain(sys.argv[1:])\n"
        "assert 'torch' not in sys.modules and 'scipy' not in sys.modules"
    )
    process = spawn("-c", code, "runs", str(runs), stdout=subprocess.PIPE)
    shown, errors = process.communicate(timeout=PATIENCE)
    assert (process.returncode, errors) == (0, "") and "elu-5" in shown


@pytest.mark.parametrize(
    "command",
    [parser.DEMO, *parser.EXPERIMENTS.values(), parser.SWEEP, *parser.READERS.values()],
    ids=lambda command: command.options,
)
def test_the_help_of_a_command_is_its_docstring(command):
    """It is written twice, because the help does not import the class that has the docstring."""
    assert command.help == " ".join((command.load().__doc__ or "").split())


def test_python_minus_m():
    process = spawn("-m", "biasshift", "figure", "--help", stdout=subprocess.PIPE)
    shown, errors = process.communicate(timeout=PATIENCE)
    assert (process.returncode, errors) == (0, "") and shown.startswith("usage: biasshift figure")


def test_names_of_runs_do_nothing_to_the_terminal(tmp_path, capsys, monkeypatch):
    """A folder may have any name: to move the cursor, set the title, or turn the line around."""
    monkeypatch.chdir(tmp_path)
    with Run.create(
        tmp_path / "runs" / "r\x1b[31m\x1b]0;mine\x07\u202e", {"seed": 0, "activation": "elu"}
    ):
        pass
    status, shown, errors = call(capsys, "runs")
    assert (status, errors) == (0, "") and "finished" in shown
    assert not {"\x1b", "\x07", "\u202e"} & set(shown)


# -- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["figure", "2", "runs", "--quick"], "leave the folders out"),
        (["figure", "all", "--quick"], "trains for one figure"),
        (["figure", "2", "--smoke"], "--smoke and --data change what --quick trains"),
        (["figure", "6", "--data", "images"], "--smoke and --data change what --quick trains"),
        (
            ["figure", "theory1", "--quick", "--smoke", "--data", "images"],
            "--data must be left out: the data of figure theory1 comes with the package",
        ),
        (["figure", "6", "--quick", "--data", "images"], "images"),
        (["figure", "1", "--save", "tables"], "--save must be left out: figure 1 shows functions"),
        (["figure", "gap", "nowhere"], "'nowhere' is not a directory"),
        (["figure", "2", "."], "no runs in ."),
        (["claims"], "biasshift claims FOLDER"),
        (["claims", "nowhere"], "'nowhere' is not a directory"),
        (["claims", "."], "no runs in ."),
        (["runs"], "'runs' is not a directory"),
        (["runs", "."], "no runs in ."),
        (
            ["demo", "--device", "nonsense"],
            "--device must be auto, cpu or cuda, got 'nonsense'",
        ),
        (["train", "mnist", "--device", "cuda:99"], "--device cuda:99 must be a GPU"),
        (["train", "mnist", "--replace", "--resume"], "--replace and --resume exclude each other"),
        (["demo", "--replace", "--resume"], "--replace and --resume exclude each other"),
        (
            ["sweep", "--resume", "--smoke", "--replace"],
            "--replace and --resume exclude each other",
        ),
        (
            ["demo", "--device", "cpu", "--precision", "float16"],
            "--precision float16 needs a GPU, and no --graph: choose bfloat16",
        ),
        (
            ["sweep", "--ensemble"],
            "--ensemble and --graph train by plain gradient descent alone: give --update plain",
        ),
        (
            ["sweep", "--launcher-options", "time=5"],
            "--launcher-options of launcher 'local' must be left out, got 'time=5'",
        ),
        (
            ["sweep", "--launcher", "slurm", "--launcher-options", "partition=gpu", "time=soon"],
            "time must be a whole number of minutes of at least 1, got 'soon'",
        ),
        (["demo", "--ensemble", "--precision", "bfloat16"], "--ensemble trains in float32"),
        (["demo", "--workers", "0"], "--workers must be at least 1, got 0"),
        (["demo", "--workers", "-2"], "--workers must be at least 1, got -2"),
        (["train", "mnist", "--workers", "0"], "--workers must be at least 1, got 0"),
        (
            ["train", "cifar11", "--workers", "2"],
            "--workers must be left out: a run of cifar11 takes all cores",
        ),
        (["train", "mnist", "--epochs", "0"], "--epochs must be at least 1, got 0"),
        (["train", "mnist", "--seeds", "0"], "--seeds must be at least 1, got 0"),
        (["train", "mnist", "--lr", "-1"], "--lr must be a number above 0, got -1.0"),
        (["train", "mnist", "--lr", "nan"], "--lr must be a number above 0, got nan"),
        (["train", "mnist", "--activation"], "--activation needs at least one value"),
        (["train", "mnist", "--activation", "elu", "elu"], "each of them once"),
        (["train", "mnist", "--activation", "tahn"], "Did you mean tanh?"),
        (["train", "mnist"], "'data/MNIST/raw' lacks train-images-idx3-ubyte, "),
        (["train", "mnist", "--data", "nowhere"], "--data or $BIASSHIFT_DATA"),
    ],
    ids=" ".join,
)
def test_bad_input_is_one_sentence_and_leaves_nothing(here, capsys, arguments, says):
    status, shown, errors = call(capsys, *arguments)
    assert (status, shown) == (2, "")
    assert errors.startswith("biasshift: ") and errors.count("\n") == 1 and says in errors
    assert list(here.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "Expected one of {demo, train, "),
        (["tarin"], "tarin"),
        (["train"], "mnist"),
        (["train", "cifar"], "cifar"),
        (["demo", "--qick"], "--qick"),
        (["demo", "--workers", "two"], "two"),
        (["sweep", "--launcher", "pbs"], "invalid choice 'pbs'"),
        (["figure"], "required"),
        (["figure", "9", "runs"], "'1', '2', '3'"),
        (["train", "mnist", "--epochs", "1.5"], "1.5"),
    ],
    ids=" ".join,
)
def test_a_wrong_option_is_named(here, capsys, arguments, says):
    status, shown, errors = call(capsys, *arguments)
    assert (status, shown) == (2, "")
    assert says in errors and "help" in errors and "Traceback" not in errors and "__" not in errors
    assert list(here.iterdir()) == []


def test_corrupt_data_is_one_sentence(here, capsys):
    raw = here / "data" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name in (
        "train-images-idx3-ubyte",
        "train-labels-idx1-ubyte",
        "t10k-images-idx3-ubyte",
        "t10k-labels-idx1-ubyte",
    ):
        (raw / name).write_bytes(b"<!DOCTYPE html>")
    status, shown, errors = call(capsys, "train", "mnist")
    assert (status, shown) == (2, "") and errors.count("\n") == 1
    assert "train-images-idx3-ubyte' is not a complete idx file" in errors
    assert not (here / "runs").exists()


def test_a_folder_that_cannot_be_written_is_one_sentence(here, capsys):
    (here / "file").write_text("not a folder")
    status, _, errors = call(capsys, "figure", "1", "--out", "file/figures")
    assert status == 2 and errors == "biasshift: 'file/figures': Not a directory.\n"
    status, _, errors = call(capsys, "demo", "--out", "file")
    assert (
        status == 2
        and errors.startswith("biasshift: ")
        and errors.count("\n") == 1
        and "'file" in errors
    )


def test_runs_of_two_settings_are_not_judged_together(runs, capsys):
    write_run(runs.parent / "more" / "elu-9", Planted("elu", 9, settings={"lr": 0.5}).rows())
    status, shown, errors = call(capsys, "claims", "runs")
    assert (
        (status, shown) == (2, "")
        and errors.count("\n") == 1
        and "'elu' was trained at 0.1, 0.5" in errors
    )


# -- runs that are there already -------------------------------------------------------------------


def test_runs_are_not_replaced_unless_told_so(here, capsys):
    write_run(
        here / "runs" / "demo" / "relu-1",
        Planted("relu", 1, settings={"experiment": "digits"}).rows(),
    )
    before = {path: path.read_bytes() for path in here.rglob("*") if path.is_file()}
    status, shown, errors = call(capsys, "demo", "--no-replace")
    assert (
        (status, shown) == (2, "")
        and "'runs/demo/relu-1' already holds a run" in errors
        and "--replace" in errors
    )
    assert {path: path.read_bytes() for path in here.rglob("*") if path.is_file()} == before


def test_the_demo_never_replaces_another_experiments_runs(runs, capsys):
    before = files(runs)
    status, shown, errors = call(capsys, "demo", "--out", str(runs))
    assert (status, shown) == (2, "") and "another experiment ('planted')" in errors
    assert files(runs) == before


# -- figures and claims ----------------------------------------------------------------------------


def test_figure_1_needs_no_runs(here, capsys):
    assert call(capsys, "figure", "1") == (0, "Figure: figures/figure_1.png (and PDF)\n", "")
    assert files(here) == {"figures/figure_1.png", "figures/figure_1.pdf"}


def test_all_figures(runs, here, capsys):
    status, shown, errors = call(capsys, "figure", "all", "runs", "--out", "f")
    assert (status, errors) == (0, "")
    drawn = ["1", "2", "theory1", "theory3"]  # what these runs have: no k, no autoencoders, …
    lines = [line for line in shown.splitlines() if line.startswith("Figure:")]
    assert lines == [f"Figure: f/figure_{name}.png (and PDF)" for name in drawn]
    pairs = {f"figure_{name}.{kind}" for name in drawn for kind in ("png", "pdf")}
    assert files(here / "f") == pairs
    left_out = re.findall(r"^Left out: figure (\w+)\.", shown, re.MULTILINE)
    assert left_out == ["3", "4", "5", "6", "7", "table1", "theory2", "theory4", "bench"]
    assert "training loss at the end, ELU" in shown
    assert "planted: 4 epochs, 6 seeds" in " ".join(shown.split())


def test_a_figures_small_table_is_kept_and_a_quick_one_is_called_so(here, capsys):
    status, shown, errors = call(
        capsys, "figure", "table1", "--quick", "--smoke", "--save", "tables"
    )
    assert (status, errors) == (0, "")
    assert "Table: tables/table1.parquet" in shown and "Smoke run" in shown
    assert (here / "tables" / "table1.parquet").exists()
    assert (here / "figures" / "figure_table1.pdf").exists()
    assert (here / "figures" / "quick-table1").is_dir()


def claimed(runs: Path) -> list[Any]:
    return list(claims(runs).itertuples())


def rows_of(shown: str) -> list[list[str]]:
    """The cells of a table that is wide enough for all of them: two spaces or more between two."""
    return [
        re.split(r"\s{2,}", line.strip())
        for line in shown.splitlines()
        if re.match(r" [1-8] \w", line)
    ]


@pytest.mark.parametrize("columns", [40, 80, 119, 120, 200])
def test_the_table_of_claims_fits_the_terminal_and_loses_nothing(
    runs, capsys, monkeypatch, columns
):
    monkeypatch.setenv("COLUMNS", str(columns))
    status, shown, errors = call(capsys, "claims", "runs")
    assert (status, errors) == (0, "")
    assert max(map(len, shown.splitlines())) <= columns and "\x1b" not in shown and "…" not in shown
    words, judged = set(shown.split()), claims(runs)
    rows = [row for row in claimed(runs) if row.n]
    for row in rows if columns >= 80 else ():  # below, numbers break
        assert set(effect(row).split()) <= words
    missing = ", ".join(row.claim for row in claimed(runs) if not row.n)
    notes = "".join(
        f"{number} {caveat} "
        for number, caveat in enumerate(dict.fromkeys(row.caveat for row in rows), 1)
    )
    end = f"{notes}Not measured by these runs: {missing}. {footnote(judged)} Claims: "
    said, end = (
        " ".join(text.split()).replace("- ", "-") for text in (shown, f"{end}claims/claims.md")
    )
    assert said.endswith(f"{end} (and Parquet)")  # equal ones are said once


def test_every_claim_has_its_verdict_its_numbers_and_its_note(runs, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    shown = call(capsys, "claims", "runs")[1]
    found, rows = [row for row in claimed(runs) if row.n], rows_of(shown)
    notes = {
        int(number): caveat
        for number, caveat in re.findall(r"^ +(\d+)  (\S.*)$", shown, re.MULTILINE)
    }
    assert len(rows) == len(found) > 10 and {row.verdict for row in found} == {
        "supported",
        "not supported",
        "undecided",
    }
    for cells, row in zip(rows, found, strict=True):
        assert cells[:3] == [
            f"{row.number} {row.claim}",
            VERDICTS[row.verdict].lower(),
            f"{row.statement} ({row.source})",
        ]
        assert notes[int(cells[-1])] == row.caveat
        contrary = row.verdict == "not supported"
        p = (
            []
            if np.isnan(row.p_holm)
            else [f"{row.p_contrary:.2g}*" if contrary else f"{row.p_holm:.2g}"]
        )
        assert cells[3:-1] == [effect(row), str(row.n), *p]
    assert "* p of the contrary" in shown


def test_verdicts_are_colored_on_a_terminal_and_said_everywhere(runs, monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    shown = io.StringIO()
    claims_command.print_claims(
        Console(file=shown, width=300, force_terminal=True, color_system="standard"), claims(runs)
    )
    for verdict, color in (("supported", 32), ("contradicted", 31), ("undecided", 33)):
        assert re.search(rf"\x1b\[{color}m{verdict}\b", shown.getvalue())


def test_nothing_in_a_claim_acts_on_the_terminal(runs):
    """Names of activation functions come with the runs."""
    text = "[red]a[/red] \x1b[31mb\x07 :boom:\nc\u202e"
    found = claims(runs).assign(statement=text, statistic=text, claim=text, caveat=text)
    shown = io.StringIO()
    claims_command.print_claims(Console(file=shown, width=3000), found)
    escaped = r"[red]a[/red] \x1b[31mb\x07 :boom:\nc\u202e"
    measured = int((found["n"] > 0).sum())
    # Three times in a row of the table, once as a caveat, and among those that were not measured.
    assert shown.getvalue().count(escaped) == 3 * measured + 1 + (len(found) - measured)
    assert not {"\x1b", "\x07", "\u202e"} & set(shown.getvalue())


def test_no_claim_is_a_sentence(runs):
    shown = io.StringIO()
    claims_command.print_claims(Console(file=shown, width=80), claims(runs).iloc[:0])
    assert "no claim is about runs of these kinds" in shown.getvalue()


def test_the_table_of_claims_is_written_by_default(runs, here, capsys):
    status, shown, errors = call(capsys, "claims", "runs")
    assert (status, errors) == (0, "") and shown.endswith(
        "Claims: claims/claims.md (and Parquet)\n"
    )
    assert files(here / "claims") == {"claims.md", "claims.parquet"}


def test_a_table_of_claims_that_cannot_be_written_is_shown_first(runs, here, capsys, monkeypatch):
    (here / "claims").write_text("a file")
    status, shown, errors = call(capsys, "claims", "runs")
    assert status == 2 and "1 means" in shown and "Claims:" not in shown
    assert (
        errors
        == "biasshift: The table of claims cannot be written into 'claims' (File exists). Choose "
        "another --out.\n"
    )

    def full(*_, **__):
        raise OSError(28, "No space left on device", ".claims.parquet.tmp")

    monkeypatch.setattr(pd.DataFrame, "to_parquet", full)
    status, shown, errors = call(capsys, "claims", "runs", "--out", "judged")
    assert (
        status == 2
        and "1 means" in shown
        and "into 'judged' (No space left on device)" in errors
        and not files(here / "judged")
    )


def test_the_table_of_claims_says_where_it_comes_from(runs, here, capsys):
    provenance = {
        "command": ["/somewhere/biasshift/__main__.py", "train", "mnist"],
        "commit": "abc",
        "dirty": False,
        "device": "cpu",
    }
    for folder in runs.iterdir():
        (folder / "provenance.json").write_text(json.dumps(provenance), encoding="utf-8")
        state, _ = unsealed(json.loads((folder / "state.json").read_text(encoding="utf-8")))
        state = sealed(state | {"provenance": digest(provenance)})
        (folder / "state.json").write_text(json.dumps(state), encoding="utf-8")
    status, shown, errors = call(capsys, "claims", "runs", "--out", "judged")
    assert (status, errors) == (0, "") and "judged/claims.md" in shown
    text = (here / "judged" / "claims.md").read_text(encoding="utf-8")
    assert text.startswith("| claim |")
    assert text.endswith(
        "\nOf 12 runs with the seeds 0, 1, 2, 3, 4, 5, made by `biasshift train mnist`, at commit "
        "abc, on cpu.\n"
    )
    judged = pd.read_parquet(here / "judged" / "claims.parquet")
    assert judged.attrs["commands"] == ["biasshift train mnist"] and judged.attrs["runs"] == 12
    assert len(judged) == text.count("\n| ") - 1


def test_a_single_run_folder_is_enough(runs, capsys):
    status, shown, errors = call(capsys, "claims", "runs/planted/elu-0", "runs/planted/relu-0")
    assert (status, errors) == (0, "") and "nan" not in shown
    assert "Fewer than 6 paired seeds" in " ".join(shown.split())


def test_whoever_stops_reading_is_not_shouted_at(runs, here):
    """The reading end of the pipe is closed before anything is written, as `| head -0` would."""
    for arguments in (["claims", "runs"], ["--help"]):
        read, write = os.pipe()
        os.close(read)
        process = spawn("-m", "biasshift", *arguments, stdout=write, cwd=here)
        os.close(write)
        assert process.communicate(timeout=PATIENCE)[1] == "" and process.returncode == 1


@pytest.mark.parametrize(
    ("effect", "low", "said"),
    [(1.5, 1.0, "+1.5 [+1, +2]"), (1.5, np.nan, "+1.5"), (np.nan, np.nan, "undefined")],
)
def test_an_effect_is_said_as_far_as_it_is_known(monkeypatch, effect, low, said):
    row = {
        "claim": "means",
        "verdict": "undecided",
        "statement": "It",
        "statistic": "share",
        "effect": effect,
        "low": low,
        "high": 2.0,
        "predicted": "< 0",
        "n": 6,
    }
    monkeypatch.setattr(results, "claims", lambda table, **_: pd.DataFrame([row]))
    shown = io.StringIO()
    results.print_verdicts(Console(file=shown, width=80), pd.DataFrame())
    assert f" ? It\n     share: {said} (< 0)\n" in shown.getvalue()


def test_the_end_fits_a_screen(runs):
    """What a demo prints below its progress: 80 columns, 40 rows with the prompt."""
    table = read_runs(runs)
    columns = dict.fromkeys(results.IDENTITIES, 1e-12)
    shown = io.StringIO()
    console = Console(file=shown, width=80)
    results.print_comparison(console, table)
    results.print_verdicts(console, table)
    results.print_identities(console, table.assign(**columns))
    for name in ("2", "gap"):
        print_paths(console, [Path(f"runs/demo/figure_{name}.png"), Path("figure.pdf")])
    results.print_next(console, Path("runs/demo"))
    lines = shown.getvalue().splitlines()
    assert len(lines) <= 39 and max(map(len, lines)) <= 80
    marks = [line[1] for line in lines if line[:1] == " " and line[1:2] in "✓✗?"]
    judged = claims(table).set_index("claim")
    main = [name for name in MAIN if judged.loc[name, "n"]]
    assert len(marks) == 6 and len(main) >= 4
    assert f"{len(judged[judged['n'] > 0])} of {len(judged)} statements" in shown.getvalue()


def test_claims_as_json(runs, here, capsys):
    status, shown, errors = call(capsys, "claims", "runs", "--json")
    assert (status, errors) == (0, "") and shown.isascii() and not (here / "claims").exists()
    found, expected = json.loads(shown), claims(runs)
    assert [row["claim"] for row in found] == expected["claim"].tolist()
    assert [set(row) for row in found] == [{*expected}] * len(expected)
    for row, size in zip(found, expected["effect"], strict=True):
        assert row["effect"] is None if np.isnan(size) else row["effect"] == pytest.approx(size)


# -- runs ------------------------------------------------------------------------------------------


def test_runs_as_json(runs, capsys):
    status, shown, errors = call(capsys, "runs", "--json")
    assert (status, errors) == (0, "") and shown.isascii()
    found = {row["run"]: row for row in json.loads(shown)}
    states, table = run_states(runs), read_runs(runs)
    assert set(found) == set(states["run"])
    for row in states.itertuples():
        assert found[row.run]["state"] == row.state and found[row.run]["last_step"] == row.last_step
        losses = table[table["run"] == row.run].sort_values("step")["train_loss"].dropna()
        assert found[row.run]["train_loss"] == pytest.approx(losses.iloc[-1])


def test_runs_are_listed_with_their_state_and_their_last_numbers(runs, capsys):
    with pytest.raises(KeyboardInterrupt), Run.create(runs / "srelu-0", {"seed": 0}) as run:
        raise KeyboardInterrupt
    assert run.last_step is None
    status, shown, errors = call(capsys, "runs")
    assert (status, errors) == (0, "") and max(map(len, shown.splitlines())) <= 80
    assert "nan" not in shown and "NA" not in shown
    lines = {
        line.split()[0]: line.split()
        for line in shown.splitlines()
        if line.split()[1:2] in (["finished"], ["interrupted"])
    }
    assert len(lines) == 13
    assert lines["elu-3"][:5] == ["elu-3", "finished", "100", "0.5", "1"] and lines["srelu-0"][
        :3
    ] == ["srelu-0", "interrupted", "–"]


# -- training --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, str]:
    """The whole of a small experiment, in this process: its folder [with brackets], and what it
    printed.
    """
    folder = tmp_path_factory.mktemp("trained") / "a [bold] folder"
    shown = io.StringIO()
    console = Console(file=shown, width=60, highlight=False, markup=False, emoji=False)
    train.run_experiment(console, Tiny(out=folder))
    return folder, shown.getvalue()


def test_training_shows_progress_table_identities_figures_and_claims(trained):
    folder, shown = trained
    first, *lines = shown.splitlines()
    assert first == f"2 runs on cpu in 1 process → {folder}"
    found = [
        re.fullmatch(
            r"(\d+) of 92 steps, \d+ steps/s, loss \d\.\d+ \((elu|relu)-0, step (\d+)\)", line
        )
        for line in lines
    ]
    steps = [int(match[1]) for match in found if match]
    # On a slow machine there are more.
    assert {46, 92} <= set(steps) <= set(range(93)) and steps == sorted(steps)
    words = " ".join(shown.split())
    for text in (
        "Mean ± SD over seeds",
        "Exact identities",
        "These runs claim nothing: 1 seed cannot decide, 6 can.",
    ):
        assert text in words
    assert f"Figure: {folder}/figure_2.png (and PDF)" in shown and "nan" not in shown


def test_a_narrow_terminal_loses_nothing(trained):
    _, shown = trained
    # Paths are not broken.
    lines = [line for line in shown.splitlines() if "a [bold] folder" not in line]
    assert max(map(len, lines)) <= 60 and "…" not in shown
    table = shown[shown.index("Mean ± SD") : shown.index("* at equal training loss")]
    assert all(name in table for name in ("ELU", "ReLU", "gradient gap", "steps to same"))


def test_the_residuals_shown_are_the_worst_of_all_runs(trained):
    folder, shown = trained
    worst = read_runs(folder)[[*results.IDENTITIES]].max()
    name = results.IDENTITIES[worst.idxmax()]
    assert f"hold to {worst.max():.1e} (worst: {name})." in " ".join(shown.split())
    assert worst.max() < 1e-6


def test_training_leaves_run_folders_and_figures(trained):
    folder, _ = trained
    assert {path.name for path in folder.iterdir()} == {
        "elu-0", "relu-0", "figure_2.png", "figure_2.pdf", "figure_gap.png", "figure_gap.pdf",
    }  # fmt: skip
    assert set(run_states(folder)["state"]) == {"finished"}


def test_a_run_that_diverges_is_named_and_the_others_finish(tmp_path):
    shown = io.StringIO()
    train.run_experiment(
        Console(file=shown, width=80),
        Tiny(out=tmp_path, diverging=("elu",), activations=("elu", "relu", "lrelu")),
    )
    states = run_states(tmp_path).set_index("run")["state"].to_dict()
    assert states == {"elu-0": "failed", "lrelu-0": "finished", "relu-0": "finished"}
    assert [line for line in shown.getvalue().splitlines() if "diverged" in line] == [
        "elu-0: training diverged; the run ends there."
    ]
    assert set(read_runs(tmp_path / "elu-0")["step"]) == {0}
    assert "Exact identities" in shown.getvalue()


def test_when_all_runs_diverge_there_is_still_an_end(tmp_path):
    shown = io.StringIO()
    train.run_experiment(
        Console(file=shown, width=80), Tiny(out=tmp_path, diverging=("elu", "relu"))
    )
    assert shown.getvalue().count("training diverged") == 2
    assert set(run_states(tmp_path)["state"]) == {"failed"}
    assert shown.getvalue().endswith("There is nothing to draw or to compare: all runs diverged.\n")


@dataclass(frozen=True, kw_only=True)
class Undrawn(Tiny):
    """Draws a figure of other experiments' numbers, and one of its own."""

    figures: ClassVar[tuple[str, ...]] = ("table1", "2")


@dataclass(frozen=True, kw_only=True)
class Part(Tiny):
    """The runs of one job out of several."""

    @property
    def whole(self) -> bool:
        return False


def test_a_figure_that_cannot_be_drawn_is_said_and_the_rest_follows(tmp_path):
    shown = io.StringIO()
    train.run_experiment(
        Console(file=shown, width=80), Undrawn(out=tmp_path, activations=("elu",), epochs=1)
    )
    lines = shown.getvalue().splitlines()
    (without,) = [
        number for number, line in enumerate(lines) if line.startswith("No figure table1: ")
    ]
    assert (
        "test_error" in lines[without]
        and lines[without + 1] == f"Figure: {tmp_path / 'figure_2.png'} (and PDF)"
    )
    assert (
        any("These runs claim nothing" in line for line in lines[:without])
        and not (tmp_path / "figure_table1.png").exists()
    )


SWEEP = [
    "sweep",
    "--smoke",
    "--workers",
    "1",
    "--activation",
    "elu",
    "relu",
    "--update",
    "plain",
    "centered",
    "--no-batch-norm",
]
ONE_RATE = [*SWEEP, "--constant", "0", "--lr", "0.1"]
TWO_RATES = [*SWEEP, "--lr", "0.01", "0.1"]


def test_a_sweep_ends_with_its_figure_and_its_verdicts(here, capsys):
    status, shown, errors = call(capsys, *ONE_RATE)
    assert (status, errors) == (0, "")
    assert "Training loss at every" in shown and "These runs claim nothing: 1 seed" in shown
    assert "Figure: runs/sweep/figure_theory4.png (and PDF)" in shown
    assert {path.name for path in (here / "runs" / "sweep").glob("figure*")} == {
        "figure_theory4.png",
        "figure_theory4.pdf",
    }


def test_a_part_of_a_sweep_says_what_it_made_and_judges_nothing(here, capsys, monkeypatch):
    """Its grid is never complete: to judge it would be refused, and the job of an array would count
    as failed.
    """
    monkeypatch.setenv("COLUMNS", "120")
    made = set()
    for number in "123":
        status, shown, errors = call(capsys, *TWO_RATES, "--part", number, "3")
        assert (status, errors) == (0, "")
        words = " ".join(shown.split())
        assert (
            "when all parts are done, `biasshift claims runs/sweep` judges them, and `biasshift "
            "figure theory4 runs/sweep` draws" in words
        )
        assert "What these runs say" not in shown and "Training loss at every" not in shown
        now = {path.parent.name for path in here.glob("runs/sweep/*/config.json")}
        said = {line.split()[0] for line in shown.splitlines() if line.split()[1:2] == ["finished"]}
        assert said == now - made and len(said) >= 3
        made = now
    assert len(made) == 12 and not list(
        (here / "runs" / "sweep").glob("figure*")
    )  # 2 × 2 × 2, and ELU plus a constant, 2 × 2
    assert call(capsys, "claims", "runs/sweep")[0] == 0  # now they are all there


def test_a_part_without_runs_is_no_failure(here, capsys):
    status, shown, errors = call(capsys, *ONE_RATE, "--part", "9", "9")
    assert (status, errors) == (0, "") and not list(here.iterdir())
    assert shown == "This part has no runs: there are more parts than runs.\n"


def test_a_lost_part_says_which_runs_diverged(tmp_path):
    shown = io.StringIO()
    train.run_experiment(
        Console(file=shown, width=80), Part(out=tmp_path, diverging=("elu", "relu"))
    )
    assert shown.getvalue().count("training diverged") == 2
    assert "when all parts are done" in shown.getvalue()


def test_runs_of_another_grid_are_refused_before_anything_is_trained(here, capsys):
    assert call(capsys, *ONE_RATE, "--activation", "relu")[0] == 0
    before = files(here)
    # ELU's runs, which are not there yet, come first.
    status, shown, errors = call(capsys, *ONE_RATE, "--damping", "0.5")
    assert (status, shown) == (
        2,
        "",
    ) and "holds a run with update_damping = 0.1, and this one has 0.5" in errors
    assert files(here) == before


@pytest.mark.parametrize(
    "error",
    [
        ValueError("they cannot be compared."),
        OSError(28, "No space left on device", "tiny/figure_2.png"),
    ],
)
@pytest.mark.parametrize("what", ["print_comparison", "print_identities", "draw", "print_verdicts"])
def test_what_is_said_of_finished_runs_does_not_make_them_fail(tmp_path, monkeypatch, what, error):
    def refuse(*_):
        raise error

    monkeypatch.setattr(train, what, refuse)
    shown = io.StringIO()
    train.run_experiment(Console(file=shown, width=200), Tiny(out=tmp_path, epochs=1))
    why = (
        "they cannot be compared."
        if isinstance(error, ValueError)
        else "'tiny/figure_2.png': No space left on device."
    )
    lines = [line for line in shown.getvalue().splitlines() if line.startswith("No ")]
    assert all(why in line for line in lines) and len(lines) == (2 if what == "draw" else 1)
    room = " ".join(shown.getvalue().split()).count("All files that were there are still good.")
    assert room == (len(lines) if isinstance(error, OSError) else 0)
    # The rest follows.
    assert ("These runs claim nothing" in shown.getvalue()) == (what != "print_verdicts")


@pytest.mark.parametrize("error", [KeyError("a defect of ours"), BrokenPipeError()])
def test_a_defect_is_not_hidden(tmp_path, monkeypatch, error):
    def refuse(*_):
        raise error

    monkeypatch.setattr(train, "print_verdicts", refuse)
    with pytest.raises(type(error)):
        train.run_experiment(Console(file=io.StringIO(), width=200), Tiny(out=tmp_path, epochs=1))


def test_an_ensemble_trains_what_its_members_train(tmp_path, trained):
    """All seeds of an activation at once; seed 0 is the run that was made alone."""
    tiny = Tiny(out=tmp_path, ensemble=True, seeds=2)
    shown = io.StringIO()
    train.run_experiment(Console(file=shown, width=80), tiny)
    states = run_states(tmp_path)
    assert set(states["run"]) == {"elu-0", "elu-1", "relu-0", "relu-1"}
    assert set(states["state"]) == {"finished"}
    for name in ("elu-0", "relu-0"):
        found, expected = (
            read_runs(folder / name)["train_loss"].dropna() for folder in (tmp_path, trained[0])
        )
        np.testing.assert_allclose(found, expected, rtol=1e-4)


@pytest.mark.parametrize("no_color", [False, True])
def test_a_terminal_gets_a_bar_and_no_color_where_none_is_wanted(monkeypatch, no_color):
    monkeypatch.delenv("NO_COLOR", raising=False)
    if no_color:
        monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    with progress(console, 300) as report:
        for step in (100, 200, 300):
            report(Progress("elu-0", step, 300, 0.25))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "100%" in shown and "loss 0.25 (elu-0, step 300)" in shown
    assert bool(re.search(r"\x1b\[[\d;]*(3[0-7]|38;[\d;]+)m", shown)) != no_color


def test_elsewhere_progress_is_ten_plain_lines():
    """Of two runs together, one of which goes on where an earlier command stopped."""
    console = Console(file=io.StringIO(), width=200)
    with progress(console, 2000) as report:
        for step in range(1, 1001):
            report(Progress("elu-0", step, 1000, 1.0))
        for step in range(501, 1001):
            report(Progress("relu-0", step, 1000, 0.125))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    done = [int(line.split(" of 2,000 steps, ")[0].replace(",", "")) for line in lines]
    assert done == [200, 400, 600, 800, 1000, 1501, 1600, 1800, 2000]
    assert lines[0].endswith("loss 1 (elu-0, step 200)") and lines[-1].endswith(
        "loss 0.125 (relu-0, step 1,000)"
    )


def test_a_system_error_names_its_file(here, capsys, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied", "runs/demo")

    monkeypatch.setattr(train, "run_experiment", refuse)
    assert call(capsys, "demo") == (2, "", "biasshift: 'runs/demo': Permission denied.\n")


# -- Ctrl-C ----------------------------------------------------------------------------------------


def members(group: int) -> list[str]:
    """The processes of a group, zombies left out."""
    stats = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            stats.append(path.read_text())
        except OSError:  # it ended meanwhile
            continue
    fields = [stat.rpartition(")")[2].split() for stat in stats]  # state, parent, group, …
    return [
        stat
        for stat, (state, _, pgrp, *_) in zip(stats, fields, strict=True)
        if int(pgrp) == group and state != "Z"
    ]


def test_ctrl_c_is_130_and_one_sentence(here, capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "run_jobs", interrupted)
    status, _, errors = call(capsys, "demo", "--quick")
    assert (
        status == 130 and errors.startswith("biasshift: interrupted.") and errors.count("\n") == 1
    )


# what installers write
SCRIPT = (
    "import sys\nfrom biasshift.cli import main\nif __name__ == '__main__':\n    sys.exit(main())\n"
)


@pytest.mark.parametrize(
    ("how", "moment"),
    [
        ("module", "torch._C"),
        ("module", "tyro"),
        ("module", "pandas"),
        ("script", "numpy"),
        ("script", "rich.console"),
    ],
)
def test_ctrl_c_while_the_program_starts_is_130_and_silent(tmp_path, how, moment):
    """The moment is when a module has just been imported; by the clock it would be another one on
    every machine.
    """
    script = tmp_path / "biasshift"
    script.write_text(SCRIPT)
    process = spawn(
        "-X",
        "importtime",
        *(["-m", "biasshift"] if how == "module" else [str(script)]),
        *(["claims", "nowhere"] if moment.startswith("torch") else ["runs"]),
        cwd=tmp_path,
    )
    assert process.stderr is not None
    said, sent = [], False
    with process.stderr:
        for line in process.stderr:
            if not line.startswith("import time:"):
                said.append(line)
            elif line.rpartition("|")[2].strip() == moment:
                process.send_signal(signal.SIGINT)
                sent = True
    assert (process.wait(PATIENCE), said, sent) == (130, [], True)


@pytest.mark.parametrize("before", ["", "sys.argv = sys.argv[:1]", "sys.argv = []"])
def test_who_imports_the_package_keeps_the_keyboard(here, before):
    (here / "tool.py").write_text(
        f"import signal, sys\n{before}\nimport "
        "biasshift\nprint(signal.getsignal(signal.SIGINT).__name__)\n"
    )
    process = spawn("tool.py", "src/biasshift", stdout=subprocess.PIPE, cwd=here)
    assert (
        process.communicate(timeout=PATIENCE) == ("default_int_handler\n", "")
        and process.returncode == 0
    )


SMALL = {
    "DEPTH": 2,
    "WIDTH": 8,
    "PROBE": 50,
    "EXAM_PROBE": 200,
    "QUICK_EPOCHS": 50,
    "QUICK_SEEDS": 1,
    "ACTIVATIONS": ("elu", "relu"),
}


def test_the_demo_is_interrupted_and_goes_on(here, capsys, monkeypatch):
    """The demo with small networks: Ctrl-C in the middle of two runs; then the same command with
    --resume.
    """
    code = (
        f"from biasshift.experiments import demo; vars(demo).update({SMALL}); "
        "from biasshift.cli import main; main()"
    )
    options = ["demo", "--quick", "--device", "cpu", "--checkpoint-seconds", "0.2"]
    process = spawn(
        "-c",
        code,
        *options,
        "--workers",
        "2",
        stdout=subprocess.PIPE,
        cwd=here,
        start_new_session=True,
    )
    end = time.monotonic() + PATIENCE
    begun: set[str] = set()
    while len(begun) < 2:  # both runs have begun, and on a busy machine one may be at its end
        assert time.monotonic() < end and process.poll() is None, process.communicate()
        begun |= {path.parent.name for path in here.glob("runs/demo-quick/*/checkpoint.pt")}
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all processes at once
    shown, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130 and shown.startswith(
        "2 runs on cpu in 2 processes → runs/demo-quick"
    )
    assert (
        errors.startswith("biasshift: interrupted. Finished runs are complete")
        and errors.count("\n") == 1
    )
    assert errors.endswith("The same command with --resume continues them.\n")
    while members(process.pid):  # one that was killed may still be ending
        assert time.monotonic() < end
        time.sleep(0.02)
    states = run_states(here / "runs").set_index("run")["state"].to_dict()
    assert (
        set(states) == {"elu-0", "relu-0"}
        and "interrupted" in states.values()
        and set(states.values()) <= {"interrupted", "finished"}
    )

    for name, value in SMALL.items():
        monkeypatch.setattr(demo, name, value)
    assert call(capsys, *options, "--no-replace")[0] == 2  # a run is there
    status, shown, errors = call(capsys, *options, "--resume", "--workers", "1")
    assert (status, errors) == (0, "") and not list(here.rglob("checkpoint.pt"))
    first = re.search(r"([\d,]+) of 2,300 steps", shown)
    assert first and int(first[1].replace(",", "")) > 23  # not from the beginning
    assert set(run_states(here / "runs")["state"]) == {"finished"} and "Exact identities" in shown
    table = read_runs(here / "runs")
    for _, run in table[table["train_loss"].notna()].groupby("run", observed=True):
        assert run["epoch"].tolist() == list(range(51))  # every epoch once


def test_options_of_the_demo_have_the_documented_defaults():
    options = Demo()
    assert (options.out, options.quick, options.workers) == (Path("runs/demo"), False, None)
    assert (options.replace, options.resume, options.keep_weights) == (True, False, False)
    assert (options.device, options.precision) == ("auto", "float32")
    assert options.checkpoint_seconds == 30.0
