"""Long calls say how far they are, where somebody looks, and disturb nothing."""

import io
import os
import re
import signal
import subprocess
import sys
import threading
from types import SimpleNamespace

import jaxtyping
import pytest
import torch
from torch import nn

import biasshift as bs
from biasshift import progress as module
from biasshift.fisher.moments import WeightedSums
from biasshift.measure import fisher as measurement
from biasshift.measure.cost import Cost, Watch
from biasshift.progress import Progress, Shown, progress


class Terminal(io.StringIO):
    """A terminal of one color, which notes all that it gets."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True

    def lines(self) -> list[str]:
        """What is seen at the end, line by line."""
        seen = [""]
        for piece in re.split(r"(\n|\r|\x1b\[2K)", re.sub(r"\x1b\[[\d;]*m", "", self.getvalue())):
            if piece == "\n":
                seen.append("")
            elif piece == "\x1b[2K":
                seen[-1] = ""
            elif piece not in ("", "\r"):
                seen[-1] = piece + seen[-1][len(piece) :]
        return seen


class Clock:
    """Time that passes when it is told to, and by a step at every look."""

    def __init__(self, step: float = 0.0):
        self.now, self.step = 100.0, step

    def monotonic(self) -> float:
        self.now += self.step
        return self.now


@pytest.fixture
def terminal(monkeypatch) -> Terminal:
    made = Terminal()
    # where the progress looks for it: pytest has the one of the process for itself
    own = SimpleNamespace(stderr=made, modules=sys.modules, _getframe=sys._getframe)
    monkeypatch.setattr(module, "sys", own)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(module, "_ended", {})
    return made


@pytest.fixture
def clock(monkeypatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(module, "time", made)
    return made


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.ELU(), nn.Flatten(), nn.Linear(4 * 16, 6), nn.ELU(), nn.Linear(6, 5)
    )


X = torch.randn(7, 2, 6, 6, generator=torch.Generator().manual_seed(1))
Y = torch.arange(7) % 5
CALLS = {
    "unit_fisher": lambda **options: bs.unit_fisher(net(), X, **options),
    "gradient_gap": lambda **options: bs.gradient_gap(net(), X, Y, **options),
    "check": lambda **options: bs.check(net(), X, Y, **options),
}
calls = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


# -- where it shows --------------------------------------------------------------------------------


@calls
def test_nothing_shows_where_nobody_looks(call, capfd):
    call()
    assert capfd.readouterr() == ("", "")


@calls
def test_a_short_call_shows_nothing_in_a_terminal(call, terminal, clock):
    call()
    assert terminal.getvalue() == ""


@calls
def test_a_long_call_shows_in_a_terminal_and_takes_its_line_away(call, terminal, monkeypatch):
    monkeypatch.setattr(module, "time", Clock(step=1.0))
    call()
    assert "━" in terminal.getvalue() and " left" in terminal.getvalue()
    assert terminal.lines()[-1] == "" and "\x1b[?25" not in terminal.getvalue()


@calls
def test_it_can_be_turned_off_in_a_terminal(call, terminal, monkeypatch):
    monkeypatch.setattr(module, "time", Clock(step=1.0))
    call(progress=False)
    assert terminal.getvalue() == ""


@calls
def test_it_can_be_turned_on_in_a_pipe(call, capfd):
    call(progress=True)
    out, err = capfd.readouterr()
    assert out == "" and "\x1b" not in err and "\r" not in err
    assert re.search(r"^\w+: (\d+) of \1 \w+, ", err, re.M) and " 0 s left" in err


@calls
def test_another_value_is_refused(call, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match="'progress' must be True, False or None, got 'yes'"):
        call(progress="yes")


@calls
def test_the_result_is_the_same(call, terminal):
    def numbers(result):
        if isinstance(result, dict):
            return [(name, fisher.table().to_string()) for name, fisher in result.items()]
        return result.to_string()

    assert numbers(call(progress=True)) == numbers(call(progress=False))


def test_it_shows_when_three_seconds_are_over(terminal, clock):
    with progress("work", None) as bar:
        bar.begin(10, "pieces", "It has ten pieces.")
        for _ in range(4):
            clock.now += 0.74
            bar.advance()
        assert terminal.getvalue() == ""
        clock.now += 0.74
        bar.advance()
        kept, line = terminal.lines()
        assert kept == "work: It has ten pieces."
        assert line.startswith("work ━") and line.endswith("5 of 10 pieces, 4 s, 4 s left")
    assert terminal.lines() == ["work: It has ten pieces.", ""]


@pytest.mark.parametrize(
    ("name", "value"), [("TERM", "dumb"), ("RANK", "1")], ids=["dumb terminal", "rank 1"]
)
def test_other_processes_and_dumb_terminals_stay_silent(terminal, monkeypatch, name, value):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert isinstance(progress("work", None), Shown)
    monkeypatch.setenv(name, value)
    assert not isinstance(progress("work", None), Shown)


def test_other_threads_stay_silent(terminal):
    found = []
    thread = threading.Thread(target=lambda: found.append(progress("work", None)))
    thread.start()
    thread.join()
    assert not isinstance(found[0], Shown)


def test_it_is_silent_in_a_loop(terminal, monkeypatch):
    monkeypatch.setattr(module, "time", clock := Clock(step=0.3))

    def measured() -> bool:
        before = len(terminal.getvalue())
        bs.unit_fisher(net(), X, batch_size=1)
        return len(terminal.getvalue()) > before

    assert [measured() for _ in range(3)] == [True, False, False]
    clock.now += 10  # something else took its time, or the user typed
    assert measured()


PLACES = """
from biasshift import progress
progress._is_watched = lambda file: True
found = []
for _ in range(3):
    with progress.progress("work", None) as bar:
        found.append(bool(bar))
with progress.progress("work", None) as bar:
    found.append(bool(bar))
print(found)
"""


def test_a_loop_is_one_place_in_the_code():
    """In a process of its own: within the tests, what checks types stands between."""
    run = subprocess.run([sys.executable, "-c", PLACES], capture_output=True, text=True, check=True)
    assert run.stdout == "[True, False, False, True]\n"


def test_instrument_is_silent(terminal, monkeypatch):
    monkeypatch.setattr(module, "time", Clock(step=1.0))
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with bs.instrument(model, optimizer, probe=(X, Y), every=1):
        optimizer.step()
    assert terminal.getvalue() == ""


def test_no_thread_ticks_and_no_stream_is_replaced(terminal):
    before = threading.active_count(), sys.stdout, sys.stderr
    with progress("work", True) as bar:
        bar.begin(2, "pieces")
        bar.advance()
        assert (threading.active_count(), sys.stdout, sys.stderr) == before


def test_a_closed_terminal_ends_what_is_shown_and_not_the_work(terminal):
    with progress("work", True) as bar:
        bar.begin(2, "pieces", "A line.")
        terminal.close()
        bar.advance(2)
    assert bar.done == 2


def test_warnings_begin_on_a_line_of_their_own(terminal, monkeypatch):
    monkeypatch.setattr(module, "time", Clock(step=1.0))
    with pytest.warns(UserWarning, match="Too few"):
        bs.unit_fisher(net(), X, labels="sampled")
    # the line was gone when the warning came
    assert terminal.getvalue().endswith("\r\x1b[2K")


def test_a_notebook_gets_one_output_that_changes(monkeypatch):
    shown = []

    class Handle:
        def update(self, data, raw):
            shown.append(data["text/plain"])

    def display(data, raw, display_id):
        shown.append(data["text/plain"])
        return Handle()

    shell = type("ZMQInteractiveShell", (), {})()
    display_module = SimpleNamespace(display=display)
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    monkeypatch.setitem(sys.modules, "IPython.display", display_module)
    monkeypatch.setattr(module, "time", Clock(step=1.0))
    bs.unit_fisher(net(), X, batch_size=3)
    cost, line = shown[-2].split("\n")
    assert cost.startswith("unit_fisher: 12 backward passes of 3 batches")
    assert line.startswith("unit_fisher: 12 of 12 passes, ")
    assert shown[-1] == cost


# -- what it says ----------------------------------------------------------------------------------


class Noted(Progress):
    """Notes the reports, and shows nothing."""

    def __init__(self):
        self.totals, self.lines, self.counts = [], [], []

    def __bool__(self) -> bool:
        return True

    def begin(self, total, unit, line=""):
        self.totals.append((total, unit))
        self.lines.append(line)
        self.counts.append(0)

    def advance(self, count=1):
        self.counts[-1] += count


@pytest.mark.parametrize("batch_size", [None, 3])
@pytest.mark.parametrize("memory", [2**30, 2**14])
@pytest.mark.parametrize(
    "options", [{}, {"labels": "sampled", "draws": 6}, {"likelihood": "gaussian"}], ids=str
)
def test_the_count_is_that_of_backward_passes(options, batch_size, memory, monkeypatch):
    seen = 0
    errors = measurement._errors

    def counted(batch, outputs, seeds, keep):
        nonlocal seen
        seen += len(seeds)
        return errors(batch, outputs, seeds, keep)

    monkeypatch.setattr(measurement, "_errors", counted)
    noted = Noted()
    monkeypatch.setattr(measurement, "shown", lambda title, show: noted)
    bs.unit_fisher(net(), X, batch_size=batch_size, memory_budget=memory, **options)
    assert noted.totals == [(seen, "passes")] and noted.counts == [seen]


def test_a_probe_of_unknown_length_has_a_count_and_no_end(terminal, monkeypatch):
    monkeypatch.setattr(module, "time", Clock(step=1.0))
    bs.unit_fisher(net(), iter(X.split(3)), progress=True)
    assert "4 backward passes a batch" in terminal.lines()[0]
    assert "12 passes, " in terminal.getvalue() and "left" not in terminal.getvalue()


def test_seconds_left_are_those_at_the_pace_so_far(clock):
    shown = Shown("work", file=io.StringIO())
    clock.now += 50  # before it began
    shown.begin(8, "passes")
    assert shown.seconds_left() is None
    clock.now += 6
    shown.advance(2)
    assert shown.seconds_left() == 18
    clock.now += 3
    shown.reach(1.0)
    assert shown.seconds_left() == 15
    assert shown.text() == "2 of 8 passes, 59 s, 15 s left"


def cost(model: nn.Module, *args, **options) -> tuple[Cost, dict[str, bs.UnitFisher]]:
    """What a measurement says before its first backward pass, and its result."""
    found, of = [], Cost.of
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Cost, "of", lambda *a: found.append(of(*a)) or found[-1])
        patched.setattr(measurement, "Watch", lambda bar: Watch(Noted()))
        patched.setattr(measurement, "SILENT", Noted())
        patched.setattr(measurement, "shown", lambda title, show: Noted())
        fishers = bs.unit_fisher(model, *args, **options)
    assert len(found) == 1
    return found[0], fishers


def held_bytes(fisher: bs.UnitFisher) -> int:
    """The bytes of blocks or samples, as they lie in memory."""
    if isinstance(fisher.sums, WeightedSums):
        return sum(block.nbytes for block in fisher.sums.second)
    return sum(part.bytes for part in fisher.sums.parts)


STORED = {
    "few samples": {},
    "batches": {"batch_size": 2},
    "dense": {"storage": "dense"},
    "dense in batches": {"storage": "dense", "batch_size": 3},
    "implicit": {"storage": "implicit"},
    "drawn": {"labels": "sampled", "draws": 3},
    "expand": {"weight_sharing": "expand"},
    "some units": {"units": [1, 3]},
    "double": {"dtype": torch.float64},
}


@pytest.mark.parametrize("options", STORED.values(), ids=STORED)
def test_the_bytes_are_those_that_are_held_afterwards(options):
    dtype = options.get("dtype", torch.float32)
    options = {name: value for name, value in options.items() if name != "dtype"}
    before, fishers = cost(net().to(dtype), X.to(dtype), **options)
    assert before.bytes == {name: held_bytes(fisher) for name, fisher in fishers.items()}


def test_samples_are_the_terms_of_a_matrix():
    before, _ = cost(net(), X, batch_size=3)
    assert before.samples == {"0": 7 * 4, "3": 7, "5": 7}
    assert (before.batches, before.passes, before.exact) == (3, 12, True)
    positions, _ = cost(net(), X, weight_sharing="expand")
    assert positions.samples == {"0": 7 * 16, "3": 7, "5": 7}


def test_samples_outnumbering_blocks_are_counted_as_blocks():
    x = torch.randn(500, 2, 6, 6)
    before, fishers = cost(net(), x)
    assert before.bytes == {name: held_bytes(fisher) for name, fisher in fishers.items()}
    few, _ = cost(net(), X)
    assert isinstance(fishers["5"].sums, WeightedSums)
    assert few.bytes["5"] < before.bytes["5"]


def test_many_classes_suggest_drawn_labels_by_name():
    def line(classes: int, **options) -> str:
        return str(cost(nn.Linear(3, classes), torch.randn(4, 3), **options)[0])

    assert 'labels="sampled", draws=8 takes 8 passes a batch in place of 199' in line(200)
    assert "UnitFisher.standard_error" in line(200)
    assert "sampled" not in line(10) and "sampled" not in line(200, labels="sampled", draws=8)


def test_the_name_that_is_suggested_is_there():
    fisher = bs.unit_fisher(nn.Linear(3, 9), torch.randn(4, 3), labels="sampled", draws=8)[""]
    assert (fisher.standard_error > 0).all()


# -- interruptions ---------------------------------------------------------------------------------


def test_an_exception_takes_the_line_away(terminal, monkeypatch):
    monkeypatch.setattr(module, "time", Clock(step=1.0))

    class Failing(nn.Linear):
        def forward(self, x):
            if len(x) > 4:  # at the second batch
                raise KeyboardInterrupt
            return super().forward(x)

    with pytest.raises(KeyboardInterrupt):
        bs.unit_fisher(Failing(3, 4), list(torch.randn(9, 3).split([4, 5])))
    assert "━" in terminal.getvalue()
    assert terminal.lines()[-1] == "" and "\x1b[?25l" not in terminal.getvalue()


SCRIPT = """
import sys, termios, torch
from torch import nn
import biasshift as bs
from biasshift import progress
progress.AFTER = 0.0
before = termios.tcgetattr(2)
model = nn.Sequential(nn.Linear(3, 4), nn.ELU(), nn.Linear(4, 3))
def endless():
    while True:
        yield torch.randn(50, 3)
try:
    bs.unit_fisher(model, endless(), storage="dense")
except KeyboardInterrupt:
    print("interrupted", termios.tcgetattr(2) == before, model.training, flush=True)
"""


def test_ctrl_c_in_a_terminal_ends_it_at_once_and_leaves_the_terminal_as_found():
    pty = pytest.importorskip("pty")
    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": "xterm"}
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", SCRIPT],
        stdout=subprocess.PIPE,
        stderr=theirs,
        env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    os.close(theirs)
    seen = b""
    try:
        while b" passes, " not in seen:
            seen += os.read(ours, 4096)
        process.send_signal(signal.SIGINT)
        while True:
            try:
                more = os.read(ours, 4096)
            except OSError:  # the other end is closed
                break
            if not more:
                break
            seen += more
        out, _ = process.communicate(timeout=60)
    finally:
        process.kill()
        os.close(ours)
    assert out == b"interrupted True True\n"
    assert b"\x1b[?25l" not in seen and seen.endswith(b"\r\x1b[2K")
