"""The page: its numbers against numpy, its text against an HTML parser, its charts in a real
browser.
"""

import base64
import hashlib
import html
import json
import os
import re
import shutil
import time
from html.parser import HTMLParser
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from planted import Planted

from biasshift.analysis.formatting import sentences
from biasshift.analysis.verdicts import claims
from biasshift.plots.theme import LOOKS, ON_DARK
from biasshift.report import report
from biasshift.report.claims_section import claims_by_question
from biasshift.report.downsample import (
    ALL_LAYERS,
    DRAWN,
    LEVELS,
    MAX_CELLS,
    MAX_STEPS,
    Cell,
    Point,
    by_depth,
)
from biasshift.report.equal_loss import MAX_LAYERS
from biasshift.report.html import as_json, distinct, escaped, plain
from biasshift.report.words import WORDS
from biasshift.runs.integrity import digest, sealed, unsealed
from biasshift.runs.reader import read_runs
from biasshift.runs.writer import Run

MAX_BYTES = 5_000_000
MEAN = WORDS["mean"]
HOSTILE = (
    "</script><script>document.title='pwned'</script><img src=x onerror=\"document.title='pwned'\">"
)
FORMULA = "=HYPERLINK(\"http://example.invalid\")'; datum['x']; ${1}"


class Page(HTMLParser):
    """Every element of the page, the text of its scripts, and all text outside of them."""

    def __init__(self, path: Path):
        super().__init__(convert_charrefs=True)
        self.elements, self.scripts, self.text, self._open = [], [], [], []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.data = json.loads(self.scripts[0])
        self.title = next(text for text in self.text if text.strip())

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag == "script":
            self._open.append(tag)
            self.scripts.append("")

    def handle_endtag(self, tag):
        if tag == "script":
            self._open.pop()

    def handle_data(self, data):
        if self._open:
            self.scripts[-1] += data
        else:
            self.text.append(data)

    def options(self, select: str) -> dict[str, str]:
        inner = self.source.split(f'<select id="{select}">')[1].split("</select>")[0]
        return {
            part.split('"')[1]: part.split(">")[1].split("<")[0]
            for part in inner.split("<option ")[1:]
        }

    def table(self, summary: str) -> list[list[str]]:
        """The texts of the cells in the table that opens below a line."""
        inner = self.source.split(f"<summary>{html.escape(summary)}</summary>")[1].split(
            "</table>"
        )[0]
        return [
            [html.unescape(cell) for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row)]
            for row in inner.split("<tr>")[1:]
        ]

    def rows(self, name: str) -> pd.DataFrame:
        return pd.DataFrame(
            self.data["datasets"][name]["rows"], columns=self.data["datasets"][name]["names"]
        )


def write(folder: Path, config: dict, *frames: pd.DataFrame) -> Path:
    with Run.create(folder, config) as run:
        for frame in frames:
            run.append(frame)
    return folder


def page_of(runs: Path, out: Path | None = None) -> Page:
    """The page about all runs in a folder; by default it is written beside that folder."""
    return Page(report([runs], out or runs.parent / "a.html"))


def write_planted(folder: Path, activation: str, seed: int, options: dict | None = None, **planted):
    """A run of planted rows, whose options stand in its configuration, as those of a real run."""
    rows = Planted(activation, seed, **planted).rows()
    rows = rows.drop(columns=["run", "activation", "seed", "experiment", "epochs", "lr"])
    config = {"experiment": "planted", "epochs": 4, "lr": 0.1, **(options or {})}
    write(folder, {"activation": activation, "seed": seed, **config}, rows)


def units(rng, steps, layers, count, quantity="mean", offset=0.0) -> pd.DataFrame:
    """Skewed values, so that a mean in place of a median shows."""
    keys = [(step, layer, unit) for step in steps for layer in layers for unit in range(count)]
    frame = pd.DataFrame(keys, columns=["step", "layer", "unit"])
    return frame.assign(**{quantity: offset + rng.exponential(size=len(frame)) ** 2})


def curves(rng, steps) -> pd.DataFrame:
    steps = np.asarray(steps)
    losses = {
        name: np.exp(-steps / 50) + rng.random(len(steps))
        for name in ("train_loss", "valid_loss", "train_error", "valid_error")
    }
    return pd.DataFrame({"step": steps, "epoch": steps / 10, **losses})


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """Two activations × three seeds; three layers, of which "b" is measured in layer rows alone."""
    folder, rng = tmp_path_factory.mktemp("runs"), np.random.default_rng(0)
    for activation in ("elu", "relu"):
        for seed in range(3):
            whole = pd.DataFrame(
                {"step": [0, 10], "layer": "b", "unit": -1, "cos_gradient": rng.random(2)}
            )
            frames = (
                curves(rng, [0, 10, 20]),
                units(rng, [0, 10, 20], ["a", "c"], 5, offset=seed),
                whole,
            )
            write(
                folder / f"{activation}-{seed}", {"activation": activation, "seed": seed}, *frames
            )
    return folder


@pytest.fixture(scope="module")
def page(small) -> Page:
    return Page(report([small], small.parent / "small.html"))


def labels(found: Page) -> list[str]:
    return [label for _, label in found.data["datasets"]["labels"]["rows"]]


# -- numbers ---------------------------------------------------------------------------------------


def test_cells_are_medians_per_run_then_mean_and_sd_over_runs(small, page):
    cells, table = page.rows("cells"), read_runs(small)
    mean = int(next(code for code, name in page.options("quantity").items() if name == MEAN))
    code = {name: code for code, name in page.data["datasets"]["layers"]["rows"]}
    for group, activation in enumerate(("elu", "relu")):
        for layer, names in ((code["a"], ["a"]), (code["c"], ["c"]), (ALL_LAYERS, ["a", "c"])):
            wanted = table[
                (table["activation"] == activation)
                & (table["step"] == 10)
                & table["layer"].isin(names)
                & (table["unit"] >= 0)
            ]
            values = [
                wanted.loc[wanted["run"] == f"{activation}-{seed}", "mean"].to_numpy(float)
                for seed in range(3)
            ]
            (found,) = cells[
                (cells.q == mean) & (cells.g == group) & (cells.l == layer) & (cells.s == 10)
            ].itertuples()
            medians = [np.median(some) for some in values]
            assert (found.n, found.runs) == (5 * len(names) * 3, 3)
            assert found.mean == pytest.approx(np.mean(medians), rel=1e-3)
            assert found.sd == pytest.approx(np.std(medians, ddof=1), rel=1e-2)
            assert found.d == pytest.approx(np.percentile(np.concatenate(values), LEVELS), rel=1e-2)
            assert found.mean != pytest.approx(np.mean(values), rel=1e-2)


def test_a_quantity_of_whole_layers_is_spread_over_runs(small, page):
    cells, table = page.rows("cells"), read_runs(small, units=False)
    (code,) = (
        int(code)
        for code, name in page.options("quantity").items()
        if name == WORDS["cos_gradient"]
    )
    values = table.loc[
        (table["activation"] == "relu") & (table["step"] == 0), "cos_gradient"
    ].dropna()
    (found,) = cells[
        (cells.q == code) & (cells.g == 1) & (cells.s == 0) & (cells.l >= 0)
    ].itertuples()
    assert (found.n, found.runs) == (3, 3) and found.mean == pytest.approx(values.mean(), rel=1e-3)
    assert page.data["measured"][str(code)] == {"layers": [found.l], "steps": [0, 10]}


def test_curves_are_mean_and_sd_over_runs(small, page):
    points, table = page.rows("curves"), read_runs(small, units=False)
    assert set(points["metric"]) == {0, 1}
    assert tuple(points.columns) == Point._fields and tuple(page.rows("cells")) == Cell._fields
    for metric, name in enumerate(("loss", "error")):
        for split in ("train", "valid"):
            wanted = table.loc[
                (table["activation"] == "elu") & (table["step"] == 20), f"{split}_{name}"
            ].dropna()
            (found,) = points[
                (points.metric == metric)
                & (points.split == split)
                & (points.g == 0)
                & (points.step == 20)
            ].itertuples()
            assert (found.epoch, found.n) == (2, 3)
            assert found.mean == pytest.approx(
                wanted.mean(), rel=1e-3
            ) and found.sd == pytest.approx(wanted.std(), rel=1e-2)
            logs = np.log10(wanted)
            assert found.log == pytest.approx(
                logs.mean(), rel=1e-3, abs=1e-4
            ) and found.log_sd == pytest.approx(logs.std(), rel=1e-2)


def test_claims_are_those_of_the_runs(tmp_path):
    for activation, loss in (("elu", 0.5), ("relu", 0.9)):
        for seed in range(6):
            folder = tmp_path / "runs" / f"{activation}-{seed}"
            final = loss + 0.01 * seed * (activation == "elu")
            write_planted(folder, activation, seed, train_loss=final)
    found = page_of(tmp_path / "runs")
    verdicts = claims(tmp_path / "runs")
    words = {"supported": "supported", "not supported": "contradicted", "undecided": "undecided"}
    shown = [text for text in found.text if text in words.values()]
    assert shown == list(verdicts["verdict"].map(words))
    assert "supported" in set(verdicts["verdict"]) and set(sentences(verdicts)) <= set(found.text)


def test_settings_that_may_not_be_compared_are_judged_one_by_one(tmp_path):
    for size in (16, 32):
        for activation in ("elu", "relu"):
            for seed in range(2):
                folder = tmp_path / "runs" / f"{activation}-{seed}-{size}"
                loss = 0.5 + seed / 10
                write_planted(folder, activation, seed, {"batch_size": size}, train_loss=loss)
    found = page_of(tmp_path / "runs")
    assert labels(found) == [
        f"{name}, batch size = {size} (n = 2)" for name in ("ELU", "ReLU") for size in (16, 32)
    ]
    assert {"batch size = 16", "batch size = 32"} <= set(found.text)
    assert found.text.count("undecided") >= 10


def test_runs_that_differ_in_more_than_the_seed_are_never_averaged(tmp_path):
    rng = np.random.default_rng(0)
    for update in ("sgd", "ung"):
        # The slope follows from the activation: it is no setting of its own.
        for activation, slope in (("elu", 0.0), ("swish", 1.0)):
            for seed in range(2):
                config = {
                    "activation": activation,
                    "seed": seed,
                    "update": update,
                    "slope": slope,
                    "out": [update],
                }
                write(tmp_path / "runs" / f"{activation}-{update}-{seed}", config, curves(rng, [0]))
    found = page_of(tmp_path / "runs")
    assert labels(found) == [
        f"{name}, update = {update} (n = 2)"
        for name in ("ELU", "swish")
        for update in ("sgd", "ung")
    ]
    assert found.rows("curves")["n"].eq(2).all()
    light, dark = (found.data["themes"][theme]["range"]["category"] for theme in ("light", "dark"))
    assert len(set(light)) == len(set(dark)) == 4
    assert (light[0], dark[0]) == (LOOKS["elu"].color.lower(), ON_DARK[LOOKS["elu"].color].lower())


def test_of_many_learning_rates_the_best_is_drawn(tmp_path):
    """Each network at its own; a run that failed is no candidate, however low its last loss."""
    best = {
        ("elu", "plain"): 0.2,
        ("elu", "centered"): 0.4,
        ("relu", "plain"): 0.1,
        ("relu", "centered"): 0.3,
    }
    for (activation, update), rate in best.items():
        for lr in (0.1, 0.2, 0.3, 0.4, 0.5):
            folder = tmp_path / "runs" / f"{activation}-{update}-{lr}"
            frame = pd.DataFrame(
                {"step": [0, 10], "train_loss": [1.0 if lr == rate else 9.0, 0.5 + abs(lr - rate)]}
            )
            # Examining is no part of training: it makes no setting.
            config = {
                "activation": activation,
                "seed": 0,
                "update": update,
                "lr": lr,
                "examined": update == "plain",
            }
            if lr == 0.5:
                frame["train_loss"] = 1e-3
                with (
                    pytest.raises(RuntimeError, match="diverged"),
                    Run.create(folder, config) as run,
                ):
                    run.append(frame)
                    raise RuntimeError("diverged")
            else:
                write(folder, config, frame)
    found = page_of(tmp_path / "runs")
    names = {"elu": "ELU", "relu": "ReLU"}
    assert set(labels(found)) == {
        f"{names[name]}, update = {update}, learning rate = {lr:g} (n = 1)"
        for (name, update), lr in best.items()
    }
    text = " ".join(found.text)
    assert "4 of 20 groups of runs" in text and "ELU, update = plain, learning rate = 0.1" in text
    # The four that are drawn can be told apart: pale and full are as far from each other as they
    # would be without the others.
    colors = found.data["themes"]["light"]["range"]["category"]
    assert {LOOKS["elu"].color.lower(), LOOKS["relu"].color.lower()} < set(colors)
    assert len(set(colors)) == 4


def test_without_losses_as_many_groups_are_drawn_as_can_be_distinct(tmp_path):
    rng = np.random.default_rng(0)
    for number in range(14):
        config = {"activation": "elu", "seed": 0, "lr": number + 1.0}
        write(tmp_path / "runs" / f"run-{number:02}", config, units(rng, [0], ["a"], 2))
    found = page_of(tmp_path / "runs")
    assert labels(found) == [f"ELU, learning rate = {number + 1} (n = 1)" for number in range(12)]


@pytest.mark.parametrize(("last", "scale"), [(0.01, "log"), (0.5, "linear"), (0.0, "linear")])
def test_steep_losses_begin_on_a_logarithmic_scale(tmp_path, last, scale):
    frame = pd.DataFrame({"step": [0, 10], "train_loss": [2.0, last], "train_error": [0.9, 0.001]})
    found = page_of(write(tmp_path / "a", {"activation": "elu"}, frame))
    assert f'<option value="{scale}" selected>' in found.source


def write_provenance(folder, origin):
    """Makes another provenance the one that the run has written."""
    (folder / "provenance.json").write_text(json.dumps(origin), encoding="utf-8")
    state, _ = unsealed(json.loads((folder / "state.json").read_text(encoding="utf-8")))
    state = sealed(state | {"provenance": digest(origin)})
    (folder / "state.json").write_text(json.dumps(state), encoding="utf-8")


def test_a_command_of_all_runs_stands_once(small, tmp_path):
    shutil.copytree(small, tmp_path / "runs")
    origin = json.loads((small / "elu-0" / "provenance.json").read_text()) | {
        "command": ["made", "of-all"]
    }
    command = "made of-all"
    for folder in (tmp_path / "runs").iterdir():
        write_provenance(folder, origin)
    found = Page(report([tmp_path / "runs"], tmp_path / "same.html"))
    assert sum(command in text for text in found.text) == 1
    write_provenance(tmp_path / "runs" / "elu-0", {**origin, "command": ["another"]})
    found = Page(report([tmp_path / "runs"], tmp_path / "others.html"))
    assert sum(command in text for text in found.text) == 5 and found.text.count("another") == 1


def test_what_is_not_added_to_a_network_is_not_in_its_label(tmp_path):
    frame = pd.DataFrame({"step": [0], "train_loss": [1.0]})
    for number, (constant, norm) in enumerate([(0.0, False), (0.5, False), (0.0, True)]):
        config = {"activation": "elu", "seed": 0, "constant": constant, "batch_norm": norm}
        write(tmp_path / "runs" / f"run-{number}", config, frame)
    found = page_of(tmp_path / "runs")
    assert labels(found) == [
        "ELU (n = 1)",
        "ELU, constant = 0.5 (n = 1)",
        "ELU, batch normalization = True (n = 1)",
    ]


# -- odd runs --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config", [{}, {"activation": 3}, {"seed": "x"}, {"activation": "elu", "seed": 0}]
)
def test_a_run_without_rows_or_options_has_a_page(tmp_path, config):
    write(tmp_path / "runs" / "a", config)
    found = Page(report([tmp_path / "runs"], tmp_path / "deeper" / "a.html"))
    assert found.data["charts"] == {} and "finished" in found.text
    assert any(text.startswith("No verdicts. ") for text in found.text)


def test_options_of_odd_kinds_take_no_chart_away(tmp_path):
    for activation in ("elu", "relu"):
        write_planted(tmp_path / "runs" / activation, activation, 0, {"epochs": "four", "lr": [1]})
    found = page_of(tmp_path / "runs")
    assert "heat" in found.data["charts"]
    assert "No verdicts. The options of these runs" in " ".join(found.text)


def test_values_that_are_no_numbers_are_left_out_and_counted(tmp_path):
    frame = pd.DataFrame(
        {"step": 0, "layer": "a", "unit": range(6), "s": [1.0, 2.0, 3.0, np.inf, 1e300, np.nan]}
    )
    found = page_of(write(tmp_path / "a", {"activation": "elu"}, frame))
    assert found.rows("cells")["n"].tolist() == [3, 3] and found.rows("cells")["sd"].isna().all()
    assert any("'s': 2 of 5 values are infinite" in text for text in found.text)


def test_examinations_at_equal_loss_are_at_no_step(tmp_path):
    frame = pd.DataFrame({"step": 0, "layer": "a", "unit": [-1, 0], "mean": [9.0, 1.0]})
    frame = frame.assign(exam_damping=[0.1, np.nan], exam_k=[9.0, np.nan])
    found = page_of(write(tmp_path / "a", {"activation": "elu"}, frame))
    assert list(found.options("quantity").values()) == [WORDS["mean"]]
    assert set(found.rows("cells")["mean"]) == {1}


def examined(folder: Path, runs: int = 3) -> Path:
    """Runs examined at two probes and three dampings; "2" is recorded before "1", as weight layers
    are before activations.
    """
    for seed in range(runs):
        keys = product(("2", "10", "1"), (0, 1), (1e-4, 1e-2, 1.0))
        rows = pd.DataFrame(keys, columns=["layer", "exam_probe", "exam_damping"])
        rows = rows.assign(step=70 + seed, unit=-1, exam_loss=0.4 + seed / 10)
        rows["exam_gap_degrees"] = (
            rows["layer"].astype(float) * 4
            + rows["exam_probe"] * 2
            + seed
            + rows["exam_damping"] * 1000
        )
        rows["exam_k"] = np.where(rows["layer"] == "10", np.nan, 1e-9)
        units = pd.DataFrame({"step": 0, "layer": ["2", "10", "1"], "unit": 0, "mean": 1.0})
        write(folder / f"elu-{seed}", {"activation": "elu", "seed": seed}, units, rows)
    return folder


def test_examinations_at_equal_loss_are_in_tables(tmp_path):
    found = page_of(examined(tmp_path / "runs"))
    # 4 · layer, on average 1 more for the probe and for the seed, 10 for the damping 0.01; seeds 0,
    # 1, 2 have SD 1.
    wanted = [
        ["layer", "ELU (n = 3)"],
        ["1", "16.0 ± 1.0"],
        ["2", "20.0 ± 1.0"],
        ["10", "52.0 ± 1.0"],
    ]
    assert found.table("gradient gap (degrees)") == wanted
    # What is the same in all layers stands once; tiny numbers are no zeros, and what was not
    # measured is a dash.
    assert found.table("training loss")[1:] == [["all layers", "0.500 ± 0.100"]]
    assert found.table("steps to equal loss")[1:] == [["all layers", "71.0 ± 1.0"]]
    assert found.table("k")[1:] == [["1", "1e−09 ± 0"], ["2", "1e−09 ± 0"], ["10", "–"]]
    text = " ".join(found.text)
    assert "dampings 0.0001, 1: their table is of 0.01" in text and "The 2 probes" in text
    assert "Nothing: every" not in text


def test_a_page_that_leaves_nothing_out_says_so_and_others_do_not(small, tmp_path):
    assert "Nothing: every" in " ".join(page_of(small, tmp_path / "a.html").text)
    rows = pd.DataFrame({"step": 0, "layer": "a", "unit": [-1, 0, 1], "s": [9.0, 1.0, 1.0]})
    text = " ".join(page_of(write(tmp_path / "runs", {"activation": "elu"}, rows)).text)
    assert "Nothing: every" not in text
    assert (
        "Values of whole layers, where units were measured, too: s, factor of the bias step."
        in text
    )


@pytest.mark.parametrize("damping", [np.inf, 0.5])
def test_foreign_examinations_have_a_page(tmp_path, damping):
    rows = {
        "step": 0,
        "layer": [f"l{number}" for number in range(70)],
        "unit": -1,
        "exam_damping": damping,
        "exam_x": [*range(69), 1e300],
    }
    found = page_of(write(tmp_path / "runs", {"activation": "elu"}, pd.DataFrame(rows)))
    assert "32 of 70 layers" in " ".join(found.text)
    assert len(found.table("x")) == MAX_LAYERS + 1 and found.table("x")[-1] == ["l69", "–"]


def planted_claims() -> pd.DataFrame:
    """Three claims about two questions, as the others see them: raw, corrected and contrary p all
    differ.
    """
    columns = ["number", "claim", "statement", "verdict", "p", "p_holm", "p_contrary"]
    rows = [
        (1, "a", "first", "supported", 0.011, 0.022, 0.99),
        (1, "b", "second", "not supported", 0.97, 0.98, 0.033),
        (6, "c", "third", "undecided", 0.044, 0.055, 0.96),
    ]
    effects = {"effect": 0.5, "low": 0.25, "high": 0.75, "n": 6}
    texts = {"source": "section 3", "statistic": "x", "family": "f", "caveat": "mind this"}
    return pd.DataFrame(rows, columns=columns).assign(**effects, **texts)


def test_a_claim_shows_the_p_that_its_verdict_goes_by():
    rows = re.findall(r"<tr>(.*?)</tr>", claims_by_question(planted_claims(), []))
    cells = [
        [html.unescape(cell) for cell in re.findall(r"<td[^>]*>(.*?)</td>", row)] for row in rows
    ]
    shown = [(row[2], row[3], row[4]) for row in cells if row]
    numbers = ("0.5 [0.25, 0.75]", "n = 6")
    assert shown == [
        (*numbers, "p = 0.022"),
        (*numbers, "p = 0.033<br>the contrary holds"),
        (*numbers, "p = 0.055"),
    ]


def test_claims_are_folded_by_question():
    text = claims_by_question(planted_claims(), ["said"])
    questions = [
        re.findall(r">([^<>]+)<", line) for line in re.findall(r"<summary>(<b>.*?)</summary>", text)
    ]
    assert [[part for part in parts if part.strip()] for parts in questions] == [
        ["1 · Mean activations", "1 supported", "1 contradicted"],
        ["6 · Speed", "1 undecided"],
    ]
    assert "open" not in re.findall(r"<details([^>]*)>", text)
    assert text.count("<details") == 2 + 3 + 1
    visible = re.sub(
        r"</summary>.*?</details>", "</summary>", text.replace("<table", "</summary><table")
    )
    assert "mind this" not in visible and text.count("mind this") == 3


def test_layers_lie_by_depth():
    assert by_depth(["0", "2", "10", "1", "3", "11"]) == ["0", "1", "2", "3", "10", "11"]
    # Words keep the order of the modules; a cut or strange number does not stop it.
    names = [
        "stem.0",
        "block.2.conv",
        "block.10.conv",
        "head",
        "stem.1",
        "block.2.relu",
        "²",
        "9" * 5000,
    ]
    expected = ["stem.0", "stem.1", "block.2.conv", "block.2.relu", "block.10.conv", "head", "²"]
    assert [name for name in by_depth(names) if name != names[-1]] == expected


def test_a_long_tail_does_not_squeeze_the_rest(tmp_path):
    """One activation has a tail at 5 and 10 %; an axis over all drawn percentiles would begin at
    −5,000.
    """
    rng = np.random.default_rng(0)
    for activation in ("elu", "relu", "srelu"):
        values = rng.normal(size=400)
        values[: 60 * (activation == "relu")] = -5_000 + rng.random(60 * (activation == "relu"))
        values[:300] = 0 if activation == "srelu" else values[:300]  # dead units
        frame = pd.DataFrame({"step": 0, "layer": "a", "unit": range(400), "k": values})
        write(tmp_path / "runs" / activation, {"activation": activation, "seed": 0}, frame)
    table, cells = read_runs(tmp_path / "runs"), page_of(tmp_path / "runs").rows("cells")
    cells = cells[cells["l"] >= 0]
    (low,), (high,) = set(cells["low"]), set(cells["high"])  # one axis for all
    assert -5 < low < -1 and 1 < high < 5
    for cell, activation in zip(cells.itertuples(), ("elu", "relu", "srelu"), strict=True):
        values = table.loc[table["activation"] == activation, "k"].to_numpy(float)
        assert cell.beyond == ((values < low) | (values > high)).sum()
        drawn = [value for level, value in zip(LEVELS, cell.d, strict=True) if level in DRAWN]
        assert sum(low <= value <= high for value in drawn) >= 5
    assert {low, high} <= {value for cell in cells["d"] for value in cell}


def test_no_path_of_a_machine_is_on_the_page(small, tmp_path):
    shutil.copytree(small, tmp_path / "runs")
    secret = "/opt/secret"
    command = [f"{secret}/biasshift/__main__.py", "train", "--data", f"{secret}/sets"]
    command += [f"--out={secret}/runs", "--lr", "1/3"]
    for folder in (tmp_path / "runs").iterdir():
        origin = json.loads((folder / "provenance.json").read_text()) | {
            "command": command,
            "code": "/opt/secret/code",
        }
        write_provenance(folder, origin)
    found = page_of(tmp_path / "runs")
    assert "secret" not in found.source
    assert "biasshift train --data sets --out=runs --lr 1/3" in found.text


def test_escapes_and_directions_reach_neither_text_nor_charts(tmp_path):
    """A terminal's escapes, and signs that turn text around, in every name that a run can have."""
    bad = "\x1b[31m\u202egnp\u2066\x9b"
    rng = np.random.default_rng(0)
    frames = [
        units(rng, [0, 10], [f"{bad}layer"], 3, f"{bad}quantity"),
        pd.DataFrame({"step": [0, 10], f"train_{bad}": [1.0, 2.0]}),
    ]
    exam = {"exam_damping": 0.01, f"exam_{bad}": 1.0}
    frames.append(pd.DataFrame({"step": [5], "layer": bad, "unit": -1, **exam}))
    for seed in range(2):
        config = {"activation": f"{bad}activation", "seed": seed, f"{bad}key": f"{bad}{seed}"}
        write(tmp_path / "runs" / f"{bad}{seed}", config, *frames)
    found = page_of(tmp_path / "runs")
    decoded = json.dumps(found.data, ensure_ascii=False)
    elements = json.dumps(found.elements, ensure_ascii=False)
    for text in (decoded, *found.text, *found.scripts[:1], elements):
        assert not [char for char in text if char in "\x1b\u202e\u2066\x9b"]
    assert "\\u001b" not in found.scripts[0]
    assert "layer" in decoded and "activation" in decoded
    assert any("quantity" in text for text in found.text)


# -- text from runs --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hostile(tmp_path_factory) -> Path:
    """A run in which every text that can be chosen is chosen badly."""
    folder, rng = tmp_path_factory.mktemp("hostile"), np.random.default_rng(0)
    config = {
        "activation": HOSTILE,
        "seed": 0,
        HOSTILE: HOSTILE,
        "formula": FORMULA,
        "huge": "<" * 1_000_000,
        "bidi": "\u202egnp.exe\0",
    }
    frames = [curves(rng, [0, 10]), units(rng, [0, 10], [HOSTILE, FORMULA, "x" * 10_000], 3)]
    frames += [units(rng, [0, 10], ["a"], 3, name) for name in (HOSTILE + "1", FORMULA, "q" * 5000)]
    frames.append(pd.DataFrame({"step": [0, 10], HOSTILE + "2": 1.0}))
    run = write(folder / "runs" / "<img src=x onerror=alert(1)>", config, *frames)
    write(folder / "runs" / "other", {**config, HOSTILE: "other"}, *frames)
    origin = {
        "command": [HOSTILE, {"a": HOSTILE}],
        "commit": [HOSTILE],
        "device": {"<b>": HOSTILE},
        "seed": HOSTILE,
        "started": HOSTILE,
    }
    write_provenance(run, {**origin, HOSTILE: HOSTILE})
    return report([folder / "runs"], folder / "hostile.html")


def test_text_of_runs_makes_no_elements(hostile, page):
    found = Page(hostile)
    tags = {"details", "summary", "code", "pre"} | {tag for tag, _ in page.elements}
    assert {tag for tag, _ in found.elements} <= tags
    names = {name for _, attributes in page.elements for name in attributes}
    assert {name for _, attributes in found.elements for name in attributes} <= names
    text = "".join(found.text)
    assert len(found.scripts) == 3 and HOSTILE in text and "characters)" in text
    assert not {"\u202e", "\0"} & set(found.source) and hostile.stat().st_size < MAX_BYTES


def test_text_of_runs_enters_charts_as_data_only(hostile):
    charts = json.dumps(Page(hostile).data["charts"])
    charts = charts.replace(json.dumps(labels(Page(hostile))), "")
    assert "pwned" not in charts and "HYPERLINK" not in charts and "qqqq" not in charts


def test_text_helpers():
    assert as_json({"a": "<!--</script>"}) == '{"a":"\\u003c!--\\u003c/script>"}'
    assert json.loads(as_json("<")) == "<"
    assert escaped("<\"'&>") == "&lt;&quot;&#x27;&amp;&gt;"
    assert plain("a\ud800\x1bb\n") == "a\\ud800\\x1bb\n"
    assert distinct(["a", "a", "a #2", "a"]) == ["a", "a #2", "a #2 #2", "a #3"]


def test_the_page_loads_nothing_and_runs_its_own_scripts_only(page):
    attributes = [(tag, name) for tag, some in page.elements for name in some]
    assert not [
        (tag, name)
        for tag, name in attributes
        if name in ("src", "srcset", "action") or name.startswith("on")
    ]
    assert all(some["href"].startswith("#part-") for _, some in page.elements if "href" in some)
    (policy,) = (
        some["content"]
        for _, some in page.elements
        if some.get("http-equiv") == "Content-Security-Policy"
    )
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    hashes = [
        base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        for script in page.scripts[1:]
    ]
    assert rules["script-src"].split() == [f"'sha256-{value}'" for value in hashes]
    assert rules["default-src"] == "'none'"
    assert len(page.source.encode()) < 1_200_000


# -- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["report.pdf", "config.json", "report"])
def test_the_page_must_be_named_as_one(small, tmp_path, name):
    with pytest.raises(ValueError, match=r"ends in \.html"):
        report([small], tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_a_failure_leaves_the_earlier_page(small, tmp_path, monkeypatch):
    out = tmp_path / "a.html"
    out.write_text("earlier")
    (tmp_path / "runs").mkdir()
    with pytest.raises(ValueError, match="no runs in"):
        report([tmp_path / "runs"], out)
    run = write(tmp_path / "runs" / "a", {})
    (run / "segment-00000.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="not a readable segment"):
        report([tmp_path / "runs"], out)
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        report([small], out)
    assert out.read_text() == "earlier"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.html", "runs"]


# -- large input -----------------------------------------------------------------------------------


def test_200_runs_stay_small_and_quick(tmp_path):
    rng, steps = np.random.default_rng(0), range(0, 3000, 50)
    layers = [f"layer.{number}" for number in range(12)]
    names = ["mean", "var", "own", "incoming", "k", *(f"quantity_{number}" for number in range(15))]
    frame = units(rng, steps, layers, 2).assign(
        **{name: rng.normal(size=60 * 12 * 2) for name in names}
    )
    for number in range(200):
        config = {
            "activation": ("elu", "relu", "lrelu", "srelu")[number % 4],
            "seed": number // 20,
            "lr": 0.1 * (1 + number // 4 % 5),
        }
        write(
            tmp_path / "runs" / f"run-{number}",
            {**config, "note": "n" * 20_000},
            curves(rng, range(0, 3000, 10)),
            frame,
        )
    begun = time.process_time()  # not of the machine, which others may load
    out = report([tmp_path / "runs"], tmp_path / "a.html")
    taken, found = time.process_time() - begun, Page(out)
    assert out.stat().st_size < MAX_BYTES and taken < 90
    cells = found.rows("cells")
    assert len(cells) <= MAX_CELLS and cells.groupby(["q", "g"])["s"].nunique().max() <= MAX_STEPS
    # First and last stay, and the page says what went.
    assert set(cells.groupby(["q", "g"])["s"].min()) == {0} and set(
        cells.groupby(["q", "g"])["s"].max()
    ) == {2950}
    said = " ".join(found.text)
    assert (
        "4 of 20 groups of runs" in said
        and "of 60 measured steps, evenly chosen" in said
        and "of 300 measured steps" in said
    )


def test_the_worst_mixture_keeps_its_limits(tmp_path):
    rng = np.random.default_rng(0)
    layers, names = (
        [f"{'<' * 100}{number}" for number in range(70)],
        [f"{'<' * 80}{number}" for number in range(45)],
    )
    frame = units(rng, [0, 1, 2], layers, 1).assign(
        **{name: rng.normal(size=210) * 1e-100 for name in names}
    )
    network = pd.DataFrame(
        {"step": range(50), **{f"n{name}": rng.normal(size=50) for name in names}}
    )
    for number in range(30):
        write(
            tmp_path / "runs" / f"run-{number}",
            {"activation": "<" * 500 + str(number), "note": "<" * 5000},
            frame,
            network,
        )
    out = report([tmp_path / "runs"], tmp_path / "a.html")
    found = Page(out)
    assert out.stat().st_size < MAX_BYTES and len(found.rows("cells")) <= MAX_CELLS
    assert len(found.options("quantity")) == 40 and "32 of 70 layers" in " ".join(found.text)
    assert all(
        count == 1
        for count in pd.Series(
            label for _, label in found.data["datasets"]["labels"]["rows"]
        ).value_counts()
    )


# -- in a browser ----------------------------------------------------------------------------------

BROWSER = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
needs_browser = [
    pytest.mark.browser,
    pytest.mark.skipif(
        not (BROWSER and shutil.which("chromedriver")), reason="no Chromium and chromedriver here"
    ),
]


def scheme(driver, name: str) -> None:
    driver.execute_cdp_cmd(
        "Emulation.setEmulatedMedia",
        {"features": [{"name": "prefers-color-scheme", "value": name}]},
    )


def wait(driver, script: str):
    deadline = time.monotonic() + 30
    while not (found := driver.execute_script(f"return {script}")):
        assert time.monotonic() < deadline, f"never true: {script}; {driver.get_log('browser')}"
        time.sleep(0.05)
    return found


def opened(driver, path: Path, width: int = 1280) -> None:
    scheme(driver, "light")
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    driver.get_log("browser")
    driver.get(path.resolve().as_uri())
    wait(driver, "document.body.dataset.drawn .startsWith('light')")


def choose(driver, select: str, text: str) -> None:
    script = (
        "const s = document.getElementById(arguments[0]); "
        "s.value = [...s.options].find(o => o.text === arguments[1]).value; "
        "s.dispatchEvent(new Event('input'))"
    )
    driver.execute_script(script, select, text)


def paths(chart: str, kind: str) -> str:
    """JavaScript for the drawn paths of one kind of mark in a chart."""
    return f"[...document.querySelectorAll('#{chart} g.mark-{kind}.role-mark path')]"


def shapes(chart: str, kind: str) -> str:
    """JavaScript for the shapes of these paths, as one text."""
    return f"JSON.stringify({paths(chart, kind)}.map(path => path.getAttribute('d')))"


def marks(driver, chart: str, kind: str) -> list[str]:
    """The shapes of one kind of mark in a chart, as they are drawn."""
    return json.loads(driver.execute_script(f"return {shapes(chart, kind)}"))


@pytest.fixture
def shown(driver, page, small):
    opened(driver, small.parent / "small.html")
    return driver


def browser(test):
    for mark in needs_browser:
        test = mark(test)
    return test


@browser
def test_the_page_opens_and_draws_without_a_complaint(shown, page):
    assert set(page.data["charts"]) == {"curves-loss", "curves-error", "heat", "across", "within"}
    for chart in page.data["charts"]:
        count = f"return document.querySelectorAll('#{chart} svg path').length"
        assert shown.execute_script(count) > 10
    assert len(marks(shown, "heat", "rect")) == 2 * 3 and shown.get_log("browser") == []


@browser
def test_the_colors_are_those_of_the_figures_and_change_with_the_scheme(shown):
    colors = f"return {paths('across', 'line')}.map(path => path.getAttribute('stroke'))"
    light = [LOOKS[name].color for name in ("elu", "relu")]
    assert shown.execute_script(colors) == [color.lower() for color in light]
    scheme(shown, "dark")
    wait(shown, "document.body.dataset.drawn .startsWith('dark')")
    assert shown.execute_script(colors) == [ON_DARK[color].lower() for color in light]
    assert shown.get_log("browser") == []


@browser
def test_another_quantity_and_layer_are_drawn(shown, page):
    for chart in ("across", "within"):
        choose(shown, "layer", "all layers")
        before = shown.execute_script(f"return {shapes(chart, 'line')}")
        choose(shown, "layer", "c")
        wait(shown, f"{shapes(chart, 'line')} !== {json.dumps(before)}")
    choose(shown, "quantity", WORDS["cos_gradient"])
    wait(shown, "document.querySelectorAll('#heat g.mark-rect.role-mark path').length === 2")
    # The quantity was measured in one layer, "b", at two steps: nothing else may be chosen.
    free = "[...document.querySelectorAll('#{} option')].filter(o => !o.disabled).map(o => o.text)"
    assert shown.execute_script(f"return {free.format('layer')}") == ["all layers", "b"]
    assert shown.execute_script(f"return {free.format('step')}") == ["0", "10"]
    assert shown.execute_script(
        "return [document.getElementById('layer').value, document.getElementById('step').value]"
    ) == ["-1", "10"]
    assert shown.get_log("browser") == []


@browser
def test_a_logarithmic_scale_has_mean_and_sd_of_the_logarithm(shown, page):
    points = page.rows("curves")
    points = points[(points.metric == 0) & (points.split == "train") & (points.g == 0)]
    points = points.sort_values("step")
    for scale, values in (("linear", points["mean"]), ("logarithmic", points["log"])):
        choose(shown, "scale", scale)
        wait(shown, f"document.body.dataset.drawn.includes('{scale[:3]}')")
        lines = [
            [float(pair.split(",")[1]) for pair in path[1:].split("L")]
            for path in marks(shown, "curves-loss", "line")
        ]
        # On the right scale the heights are linear in the values; the first line is the first
        # series' training.
        assert any(abs(np.corrcoef(line, values)[0, 1]) > 0.99999 for line in lines)
    assert shown.get_log("browser") == []


@browser
def test_compressed_colors_keep_what_they_show(shown):
    fills = f"return {paths('heat', 'rect')}.map(path => path.getAttribute('fill'))"
    before = shown.execute_script(fills)
    choose(shown, "colors", "compressed (logarithmic)")
    wait(shown, "document.body.dataset.drawn.includes('compressed')")
    after = shown.execute_script(fills)
    # Another scale, the same order: the largest cell is the lightest on both.
    lightest = "rgb(253, 231, 37)"
    assert len(set(after)) == len(before) and before.index(lightest) == after.index(lightest)
    assert shown.get_log("browser") == []


@browser
def test_a_click_on_the_heat_map_chooses_layer_and_step(shown, page):
    chosen = (
        "[...document.querySelectorAll('#layer, #step')].map(s => s.selectedOptions[0].text).join()"
    )
    assert shown.execute_script(f"return {chosen}") == "all layers,20"
    before = marks(shown, "within", "line")
    from selenium.webdriver import ActionChains

    shown.execute_script("document.querySelector('#heat').scrollIntoView({block: 'center'})")
    cell = shown.find_elements("css selector", "#heat g.mark-rect.role-mark path")[0]
    ActionChains(shown).move_to_element(cell).pause(0.3).click().perform()
    wait(shown, f"{chosen} === 'a,0'")
    assert "mean over runs of the median over units" in shown.execute_script(
        "return document.getElementById('vg-tooltip-element').innerText"
    )
    assert marks(shown, "within", "line") != before
    assert shown.get_log("browser") == []


@browser
def test_a_narrow_screen_holds_the_page(driver, page, small):
    opened(driver, small.parent / "small.html", width=360)
    assert driver.execute_script(
        "const d = document.documentElement; return d.scrollWidth === d.clientWidth && "
        "d.clientWidth > 300"
    )
    width = "return document.querySelector('#heat svg').getBoundingClientRect().width"
    assert 200 < driver.execute_script(width) < 360


@browser
def test_text_of_runs_does_nothing_in_a_browser(driver, hostile):
    opened(driver, hostile)
    for quantity in list(Page(hostile).options("quantity").values()):
        choose(driver, "quantity", html.unescape(quantity))
    assert driver.title == Page(hostile).title
    assert driver.execute_script("return document.querySelectorAll('img').length") == 0
    assert driver.get_log("browser") == []


@browser
def test_a_script_that_slipped_in_would_not_run(driver, page, small, tmp_path):
    """The policy is a second wall: the page with a hole in the first."""
    holed = tmp_path / "holed.html"
    script = "<script>document.title = 'pwned'</script>"
    holed.write_text(page.source.replace("<h1>", f"{script}<h1>", 1), encoding="utf-8")
    opened(driver, holed)
    assert driver.title == page.title
    assert "Content Security Policy" in driver.get_log("browser")[0]["message"]


@browser
def test_claims_open_on_demand_and_curves_come_soon(driver, tmp_path):
    for activation, loss in (("elu", 0.5), ("relu", 0.9)):
        for seed in range(6):
            folder = tmp_path / "runs" / f"{activation}-{seed}"
            write_planted(folder, activation, seed, train_loss=loss)
    out = report([tmp_path / "runs"], tmp_path / "a.html")
    narrow = "const d = document.documentElement; return d.scrollWidth === d.clientWidth"
    for width in (1280, 390):
        opened(driver, out, width)
        top = "document.querySelector('#curves-loss').getBoundingClientRect().top + scrollY"
        assert driver.execute_script(f"return {top}") < (2 * 900 if width < 700 else 450)
        visible = "[...document.querySelectorAll('.claims')].filter(t => t.checkVisibility())"
        assert driver.execute_script(f"return {visible}.length") == 0
        driver.execute_script(
            "document.querySelectorAll('.searchable > details').forEach(d => d.open = true)"
        )
        rows = "[...document.querySelectorAll('.claims tbody tr')]"
        heights = driver.execute_script(
            f"return {rows}.map(row => row.getBoundingClientRect().height)"
        )
        assert len(heights) > 10 and 0 < max(heights) < (70, 170)[width < 700]
        assert driver.execute_script(narrow)
        driver.execute_script("document.querySelectorAll('details').forEach(d => d.open = true)")
        assert driver.execute_script(narrow) and driver.get_log("browser") == []


@browser
def test_only_measured_layers_are_on_the_menu_and_come_back(shown):
    menu = "[...document.querySelectorAll('#layer option')].map(o => o.text)"
    assert shown.execute_script(f"return {menu}") == ["all layers", "a", "c"]
    choose(shown, "layer", "c")
    choose(shown, "quantity", WORDS["cos_gradient"])
    assert shown.execute_script(f"return {menu}") == ["all layers", "b"]
    choose(shown, "quantity", WORDS["mean"])
    assert shown.execute_script(f"return {menu}") == ["all layers", "a", "c"]
    assert shown.get_log("browser") == []


@browser
def test_the_page_says_how_many_units_lie_beyond_the_axis(shown, page):
    cells = page.rows("cells")
    mean = int(next(code for code, name in page.options("quantity").items() if name == MEAN))
    some = cells[(cells.q == mean) & (cells.l == ALL_LAYERS) & (cells.s == 20)]
    wanted = f"{some['beyond'].sum()} of {some['n'].sum()} values beyond the axis"
    texts = "[...document.querySelectorAll('#within text')].map(t => t.textContent)"
    assert wanted in shown.execute_script(f"return {texts}") and some["beyond"].sum() > 0
