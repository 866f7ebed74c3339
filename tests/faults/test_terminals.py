"""Names and errors from outside do nothing to a terminal; output that fails stops no training."""

import errno
import io
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from rich.progress import Progress as Bar

from biasshift import cli
from biasshift.cli import results  # noqa: F401  takes long
from biasshift.cli.console import Terminal, progress
from biasshift.cli.streams import EnduringStream, enduring_streams
from biasshift.escapes import storable, visible
from biasshift.report import report
from biasshift.runs.reader import read_runs, run_states
from biasshift.runs.writer import Run
from biasshift.training.trial import Progress

ROOT = Path(__file__).parents[2]
ESCAPE, BELL, CSI = "\x1b", "\x07", "\x9b"
ACTS = {chr(code) for code in (*range(32), *range(0x7F, 0xA0), *range(0x202A, 0x202F))}
ACTS |= {chr(code) for code in (0x200E, 0x200F, *range(0x2066, 0x206A), 0xFEFF, 0x2028, 0x2029)}
NAMES = {
    "color": f"{ESCAPE}[31mred",
    "title": f"{ESCAPE}]0;mine{BELL}",
    "clipboard": f"{ESCAPE}]52;c;aGk={BELL}",
    "link": f"{ESCAPE}]8;;file:x{BELL}",
    "csi of one sign": f"{CSI}2J",
    "backspaces": "elu\b\b\bfake",
    "line": "a\nbiasshift: all is well",
    "return": "a\rb",
    "turned": "\u202efdp.exe",
    "isolated": "\u2066a\u2069b",
    "mark": "a\u200fb",
    "separator": "a\u2028b",
    "deleted": "a\x7fb",
    "markup": "[red]x[/red]",
    "closing markup": "[/x]",
    "emoji": ":boom:",
}
HARMLESS = {"markup", "closing markup", "emoji"}


def record(folder: Path, **config) -> Path:
    with Run.create(folder, {"activation": "elu", "seed": 0, **config}) as run:
        run.append(pd.DataFrame({"step": [0, 1], "train_loss": [2.0, 1.0]}))
    return folder


def call(capsys, *arguments: str) -> tuple[int, str, str]:
    status = 0
    try:
        cli.main(arguments)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    return status, *capsys.readouterr()


def refuse_acts(*texts: str) -> None:
    assert not (ACTS - {"\n"}) & set("".join(texts))


# -- one function ----------------------------------------------------------------------------------


@pytest.mark.parametrize("what", NAMES)
def test_what_acts_is_shown_and_the_rest_stays(what):
    shown = visible(NAMES[what])
    refuse_acts(shown)
    assert "\n" not in shown
    if what in HARMLESS:
        assert shown == NAMES[what]
    else:
        assert shown.encode().decode("unicode_escape") == NAMES[what]  # and nothing is lost


@pytest.mark.parametrize(
    "text", ["naïve Ünïcode", "漢字 ελληνικά", "a\u3000b\xa0c", "👍", "a\\x1bb", ""]
)
def test_letters_of_all_languages_stay(text):
    assert visible(text) == text


def test_every_sign_is_seen_or_escaped():
    for code in (*range(0x3000), *range(0xD7F0, 0xE010), *range(0xFE00, 0x10000), 0xE0041):
        shown = visible(chr(code))
        refuse_acts(shown)
        assert shown == chr(code) or shown.startswith("\\")


def test_bytes_that_are_not_text_can_be_stored():
    name = os.fsdecode(b"elu-\xff")
    storable(name).encode("utf-8")
    assert storable("ü") == "ü" and visible(name).isascii()


# -- the command line ------------------------------------------------------------------------------


@pytest.mark.parametrize("what", NAMES)
def test_names_of_runs_are_shown(tmp_path, capsys, monkeypatch, what):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    name = NAMES[what].replace("/", ":")
    record(Path("runs") / name, note=NAMES[what])
    status, shown, errors = call(capsys, "runs", "runs")
    assert (status, errors) == (0, "") and visible(name) in shown
    refuse_acts(shown)
    for arguments in (
        ["runs", NAMES[what]],
        ["claims", "runs", "--out", NAMES[what]],
        ["figure", "1", "--out", f"/dev/null/{NAMES[what]}"],
        ["report", "runs", "--out", f"{NAMES[what]}.txt"],
        ["demo", "--device", NAMES[what]],
        ["demo", "--workers", NAMES[what]],
        [f"--{NAMES[what]}"],
        [NAMES[what]],
    ):
        status, shown, errors = call(capsys, *arguments)
        assert status == 2 and errors
        refuse_acts(shown, errors)


@pytest.mark.parametrize("what", NAMES)
def test_a_bar_of_progress_shows_the_name_of_its_run(monkeypatch, what):
    monkeypatch.setenv("TERM", "xterm")
    plain = io.StringIO()
    console = Terminal(file=plain, force_terminal=True, width=200, markup=False, emoji=False)
    with progress(console, 10) as report_progress:
        report_progress(Progress(NAMES[what], 5, 10, 1.0))
    assert visible(NAMES[what]) in plain.getvalue()
    assert f"{ESCAPE}]" not in plain.getvalue() and CSI not in plain.getvalue()
    assert Bar  # the bar is Rich's


@pytest.mark.parametrize("what", NAMES)
def test_a_page_shows_names_and_options(tmp_path, what):
    record(
        tmp_path / "runs" / NAMES[what].replace("/", ""), note=NAMES[what], activation=NAMES[what]
    )
    page = report([tmp_path / "runs"], tmp_path / "page.html").read_text(encoding="utf-8")
    before = page.partition("<script>")[0]  # of the libraries
    assert not (ACTS - {"\n", "\t"}) & set(before) and "<b>" not in before


def test_names_that_are_not_utf_8_hide_nothing(tmp_path, capsys):
    runs = tmp_path / "runs"
    record(runs / "good")
    odd = Path(os.fsdecode(os.fsencode(runs) + b"/\xff\xfe"))
    record(odd, data=odd)
    assert len(read_runs(runs)) == 4
    assert sorted(run_states(runs)["run"]) == ["\\udcff\\udcfe", "good"]
    status, shown, _ = call(capsys, "runs", str(runs))
    assert status == 0 and "good" in shown and r"\udcff" in shown
    page = report([runs], odd / "page.html").read_text(encoding="utf-8")
    assert r"\udcff" in page
    assert Run.is_finished(odd, {"activation": "elu", "seed": 0, "data": odd})


# -- output that fails -----------------------------------------------------------------------------


class Failing(io.StringIO):
    """A stream that takes some texts and then fails."""

    def __init__(self, error: OSError, after: int):
        super().__init__()
        self.failure, self.after = error, after

    def write(self, text: str) -> int:
        self.after -= 1
        if self.after < 0:
            raise self.failure
        return super().write(text)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EPIPE, errno.EIO, errno.EBADF])
@pytest.mark.parametrize("after", [0, 1, 3])
def test_output_that_fails_stops_nothing(monkeypatch, number, after):
    broken, errors, done = Failing(OSError(number, os.strerror(number)), after), io.StringIO(), []

    def train(words, last):
        for step in range(10):
            print("step", step, flush=True)
            done.append(step)
        return 0

    monkeypatch.setattr(cli, "_run", train)
    monkeypatch.setattr(sys, "stdout", broken)
    monkeypatch.setattr(sys, "stderr", errors)
    with pytest.raises(SystemExit) as end:
        cli.main([])
    assert len(done) == 10 and end.value.code == 1 and sys.stdout is broken
    said = errors.getvalue()
    assert said == (
        ""
        if number == errno.EPIPE
        else f"biasshift: The output could not be written ({os.strerror(number)}).\n"
    )


def test_letters_that_an_encoding_lacks_are_replaced():
    for encoding, shown in (("ascii", "1 -> 2 +- 3 \\u0394\\u6f22"), ("utf-8", "1 → 2 ± 3 Δ漢")):
        content = io.BytesIO()
        stream = EnduringStream(io.TextIOWrapper(content, encoding=encoding))
        assert stream.write("1 → 2 ± 3 Δ漢") == 12
        stream.flush()
        assert content.getvalue().decode(encoding) in (shown, shown.replace("\\u0394", "D"))


def test_what_goes_to_a_file_has_no_colors_and_what_goes_to_a_terminal_no_more(monkeypatch):
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    text = f"{ESCAPE}[1;31mred{ESCAPE}[0m {ESCAPE}[2J {ESCAPE}]0;x{BELL} {ESCAPE}"
    for forced in (False, True):
        output, errors = io.StringIO(), io.StringIO()
        monkeypatch.setattr(sys, "stdout", output)
        monkeypatch.setattr(sys, "stderr", errors)
        if forced:
            monkeypatch.setenv("FORCE_COLOR", "1")
        with enduring_streams():
            print(text, file=sys.stderr)
            print(text)
        left = errors.getvalue().replace(f"{ESCAPE}[1;31m", "").replace(f"{ESCAPE}[0m", "")
        refuse_acts(left)
        assert (ESCAPE in errors.getvalue()) == forced
        assert forced or ESCAPE not in output.getvalue()


def shell(command: str, folder: Path, **environment: str) -> subprocess.CompletedProcess:
    program = f"{sys.executable} -m biasshift"
    return subprocess.run(
        ["bash", "-c", command.replace("biasshift", program, 1)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        timeout=120,
    )


@pytest.mark.parametrize(
    ("ending", "status"),
    [
        (">&-", 0),
        (">&- 2>&- <&-", 0),
        ("> /dev/full", 1),
        ("| head -c 1; exit ${PIPESTATUS[0]}", None),
    ],
)
def test_the_list_of_runs_into_the_void(tmp_path, ending, status):
    record(tmp_path / "runs" / "elu-0")
    done = shell(f"biasshift runs {ending}", tmp_path)
    assert b"Traceback" not in done.stderr and b"ignored" not in done.stderr
    assert done.returncode in ((0, 1) if status is None else (status,))
    assert (b"No space left on device" in done.stderr) == ("full" in ending)
    # Nothing that was printed has landed in a file.
    assert read_runs(tmp_path / "runs")["train_loss"].tolist() == [2.0, 1.0]


@pytest.mark.parametrize("arguments", ["runs", "demo --workers x"])
def test_a_plain_locale_is_enough(tmp_path, arguments):
    record(tmp_path / "runs" / "漢字\u202e→")
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}
    done = shell(f"biasshift {arguments}", tmp_path, **plain)
    assert done.returncode in (0, 2) and b"Traceback" not in done.stderr
    (done.stdout + done.stderr).decode("ascii")
