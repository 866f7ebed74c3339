"""What is seen first: the sentence, the intervals and the links; and how tables are searched and
saved, in a real browser.
"""

import csv
import io
import os
import re
from html import escape
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pandas as pd
import pytest
from test_report import (
    FORMULA,
    Page,
    browser,
    opened,
    page_of,
    units,
    wait,
    write,
    write_planted,
)

from biasshift.analysis.formatting import MAIN
from biasshift.analysis.verdicts import claims
from biasshift.report import report
from biasshift.report.answer import conclusion, effect_and_interval, forest, places
from biasshift.report.figure_links import figure_links
from biasshift.report.words import WORDS
from biasshift.tracking.rows import COLUMNS, KEYS


def made(**columns) -> pd.DataFrame:
    """Claims of which only what is seen first is filled in."""
    count = max(len(values) for values in columns.values() if isinstance(values, list))
    same = {
        "effect": -0.5,
        "low": -0.75,
        "high": -0.25,
        "n": 6,
        "predicted": "< 0",
        "statistic": "x",
    }
    frame = pd.DataFrame({"claim": [f"claim-{i}" for i in range(count)], "statement": "a is less"})
    return frame.assign(**{**same, "verdict": "undecided", "statistic": "x", **columns})


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> Path:
    """A page about six seeds of two activations, beside its runs and two figures."""
    folder = tmp_path_factory.mktemp("answer")
    for activation, loss in (("elu", 0.5), ("relu", 0.9)):
        for seed in range(6):
            run = folder / "runs" / f"{activation}-{seed}"
            write_planted(run, activation, seed, train_loss=loss + 0.01 * seed)
    for name in ("figure_gap.png", "figure_gap.pdf", "figure_2 a&b.svg", "notes.png"):
        (folder / "runs" / name).write_text("x")
    return report([folder / "runs"], folder / "a.html")


# -- the sentence ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("table", "sentence"),
    [
        (
            made(verdict=["supported", "supported", "not supported", "undecided"]),
            "Of 4 main claims of the paper, 6 paired seeds support 2, contradict 1 and leave 1 "
            "undecided.",
        ),
        (
            made(verdict=["supported"]),
            "Of 1 main claim of the paper, 6 paired seeds support 1, contradict none and leave "
            "none undecided.",
        ),
        (made(n=[2, 0]), "These runs decide nothing: 2 paired seeds cannot, 6 can."),
        (made(n=[1]), "These runs decide nothing: 1 paired seed cannot, 6 can."),
        (made(n=[0, 0]), "These runs measured none of the paper's claims."),
    ],
)
def test_the_answer_is_one_sentence(table, sentence):
    assert conclusion(table) == sentence


def test_the_main_claims_come_first_and_others_take_the_place_of_missing_ones():
    names = ["other-1", *MAIN, "other-2"]
    table = made(claim=names, verdict=["not supported"] + 6 * ["supported"] + ["undecided"])
    assert "support 6, contradict none" in conclusion(table)
    table.loc[table["claim"] == "gap", "n"] = 0
    assert "support 5, contradict 1 and leave none" in conclusion(table)


# -- intervals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("predicted", ["< 0", "> 0"])
@pytest.mark.parametrize("limits", [(-3.0, -2.0, -1.0), (-1.0, 0.5, 2.0), (1e-9, 2e-9, 4e-9)])
def test_the_predicted_side_is_the_right_one_and_zero_is_common(predicted, limits):
    low, effect, high = limits
    (claim,) = made(effect=[effect], low=low, high=high, predicted=predicted).itertuples()
    at, left, right = places(claim)
    assert left <= at <= right and max(abs(left), abs(right)) == pytest.approx(96)
    as_predicted = effect < 0 if predicted == "< 0" else effect > 0
    assert (at > 0) == as_predicted
    # The interval is on one side of zero in the drawing where it is in numbers.
    assert (left > 0 or right < 0) == (low > 0 or high < 0)
    # Lengths keep their proportions within a row.
    assert (at - left) / (right - left) == pytest.approx(
        ((high - effect) if predicted == "< 0" else (effect - low)) / (high - low)
    )


@pytest.mark.parametrize(
    ("effect", "low", "high", "lines", "dots"),
    [
        (np.nan, np.nan, np.nan, 0, 0),
        (-1.0, np.nan, np.nan, 0, 1),
        (0.0, 0.0, 0.0, 1, 1),
        (1.0, -np.inf, np.inf, 1, 1),
    ],
)
def test_what_is_unknown_is_not_drawn(effect, low, high, lines, dots):
    text = forest(made(effect=[effect], low=low, high=high))
    assert (text.count('class="line"'), text.count("<circle")) == (lines, dots)
    drawn = re.findall(r'(?:cx="|d="M|H)([^" H]+)', text.replace("M0 0V20", ""))
    assert all(abs(float(place)) <= 100 for place in drawn)
    assert not re.search(r"nan|inf", "".join(re.findall(r"<(?:path|circle)[^>]*>", text)))


def test_the_page_draws_the_claims_of_its_runs(planted):
    found, judged = Page(planted), claims(planted.parent / "runs", progress=False)
    measured = judged[judged["n"] > 0]
    tables = found.source.split('<table class="forest">')[1:]
    assert len(tables) == 2 and f'<p class="conclusion">{conclusion(judged)}</p>' in found.source
    rows = [row for text in tables for row in text.split("</table>")[0].split("<tr>")[2:]]
    assert len(rows) == len(measured)
    main = measured[measured["claim"].isin(MAIN)]
    for row, claim in zip(rows, main.itertuples(), strict=False):
        assert escape(claim.statement[1:], quote=True) in row
        assert effect_and_interval(claim) in row
        dot = float(re.findall(r'cx="([^"]+)"', row)[0])
        assert (dot > 0) == (claim.effect < 0 if claim.predicted == "< 0" else claim.effect > 0)


def test_the_csv_of_the_claims_is_not_rounded(planted):
    export = Page(planted).data["exports"]["claims-0"]
    found = pd.DataFrame(export["rows"], columns=export["names"])
    judged = claims(planted.parent / "runs", progress=False)
    pairs = {"effect": "effect", "95 % interval, low": "low", "p, corrected (Holm)": "p_holm"}
    for heading, column in pairs.items():
        np.testing.assert_array_equal(found[heading].astype(float), judged[column].astype(float))
    assert list(found["claim"]) == list(judged["claim"])
    assert set(found["verdict"]) <= {"supported", "contradicted", "undecided"}


# -- words -----------------------------------------------------------------------------------------


def test_every_measured_column_has_words_of_its_own():
    assert set(COLUMNS) - set(KEYS) <= set(WORDS)
    labels = list(WORDS.values())
    assert len(set(labels)) == len(labels) and max(map(len, labels)) <= 60
    assert not [text for text in labels if "_" in text]


# -- figures ---------------------------------------------------------------------------------------


def test_links_lead_to_the_figures(planted):
    links = [
        attributes["href"]
        for tag, attributes in Page(planted).elements
        if tag == "a" and not attributes["href"].startswith("#part-")
    ]
    files = [planted.parent / unquote(link) for link in links]
    assert [path.name for path in files] == ["figure_2 a&b.svg", "figure_gap.pdf", "figure_gap.png"]
    assert all(path.is_file() for path in files)


def test_figures_outside_of_the_page_are_named_without_their_place(tmp_path):
    runs, page = tmp_path / "secret" / "runs", tmp_path / "pages" / "a.html"
    runs.mkdir(parents=True)
    (runs / "figure_gap.png").write_text("x")
    os.symlink("/etc/hostname", runs / "figure_link.png")
    text = figure_links([runs], page)
    assert "figure gap (PNG)" in text and "href" not in text
    assert "secret" not in text and "link" not in text
    assert figure_links([tmp_path / "pages"], page) == ""


def test_names_of_figures_are_text(tmp_path):
    (tmp_path / "figure_<b>javascript:'x\u202e.png").write_text("x")
    text = figure_links([tmp_path], tmp_path / "a.html")
    assert "<b>" not in text and "\u202e" not in text
    assert re.findall('href="([^"]*)"', text)[0].startswith("./figure_%3Cb%3Ejavascript%3A")


# -- in a browser ----------------------------------------------------------------------------------


def box(driver, selector: str, number: int = 0) -> dict:
    script = "return document.querySelectorAll(arguments[0])[arguments[1]].getBoundingClientRect()"
    return driver.execute_script(script, selector, number)


def saved(driver, button: str) -> list[list[str]]:
    """The rows of the file that a click on a button, found by JavaScript, saves."""
    script = (
        "window.texts = []; const make = URL.createObjectURL; "
        "URL.createObjectURL = blob => { blob.text().then(t => texts.push(t)); "
        "return make(blob); };"
        f"{button}.click(); URL.createObjectURL = make"
    )
    driver.execute_script(script)
    (text,) = wait(driver, "texts.length && texts")
    return list(csv.reader(io.StringIO(text.removeprefix("\ufeff"), newline="")))


@browser
def test_the_answer_is_above_the_fold(driver, planted):
    opened(driver, planted)
    forest, curves = box(driver, ".forest"), box(driver, "#curves-loss")
    assert max(forest["bottom"], curves["bottom"]) < 900
    assert curves["left"] > forest["right"]
    opened(driver, planted, width=390)
    assert box(driver, "#curves-loss")["top"] > box(driver, ".forest")["bottom"]
    count = driver.execute_script("return document.querySelectorAll('.forest tbody tr').length")
    assert count > 6
    for row in range(6):
        number = box(driver, ".forest td.number", row)
        assert number["top"] >= box(driver, ".forest svg", row)["bottom"] - 1
        assert number["right"] <= 390


@browser
def test_claims_are_found_in_closed_questions(driver, planted):
    opened(driver, planted)
    visible = (
        "[...document.querySelectorAll('.claims tbody tr')].filter(row => row.checkVisibility())"
        ".map(row => row.textContent.toLowerCase())"
    )
    typed = (
        "const b = document.querySelector('.searchable input'); b.value = arguments[0]; "
        "b.dispatchEvent(new Event('input'))"
    )
    assert driver.execute_script(f"return {visible}") == []
    driver.execute_script(typed, "ELU nearer")
    found = driver.execute_script(f"return {visible}")
    assert found and all("elu" in text and "nearer" in text for text in found)
    driver.execute_script(typed, "no such words")
    assert driver.execute_script(f"return {visible}") == []
    driver.execute_script(typed, "")
    assert driver.execute_script(f"return {visible}") == []
    hidden = "document.querySelectorAll('.searchable [hidden]').length"
    assert driver.execute_script(f"return {hidden}") == 0 and driver.get_log("browser") == []


@browser
def test_claims_are_saved_as_they_were_computed(driver, planted):
    opened(driver, planted)
    head, *rows = saved(driver, "document.querySelector('button[data-export]')")
    judged = claims(planted.parent / "runs", progress=False)
    found = pd.DataFrame(rows, columns=head)
    assert list(found["claim"]) == list(judged["claim"])
    effects = pd.to_numeric(found["effect"].replace("", np.nan))
    np.testing.assert_allclose(effects, judged["effect"].astype(float), rtol=1e-14)
    assert list(found["caveat"].str.lstrip("'")) == list(judged["caveat"])
    assert driver.get_log("browser") == []


@browser
def test_a_table_saves_the_rows_that_are_shown_and_no_formula(driver, tmp_path):
    rng = np.random.default_rng(0)
    for seed in range(7):
        config = {"activation": "elu", "seed": seed}
        frame = units(rng, [0], ["a"], 2)
        write(tmp_path / "runs" / f'={seed}+1, "x"', config, frame)
    write(tmp_path / "runs" / "other", {"activation": FORMULA, "seed": -7}, frame)
    page_of(tmp_path / "runs")
    opened(driver, tmp_path / "a.html")
    button = (
        "[...document.querySelectorAll('.tools button')]"
        ".find(b => b.parentElement.nextElementSibling.textContent.includes('commit or version'))"
    )
    head, *rows = saved(driver, button)
    assert head[:2] == ["run", "state"] and len(rows) == 8
    cells = [cell for row in rows for cell in row]
    assert not [cell for cell in cells if cell[:1] in "=@+" and cell]
    assert rows[0][0] == '\'=0+1, "x"'
    assert [row[head.index("seed")] for row in rows] == [*map(str, range(7)), "-7"]
    typed = (
        f"const b = {button}.parentElement.querySelector('input'); b.value = 'other'; "
        "b.dispatchEvent(new Event('input'))"
    )
    driver.execute_script(typed)
    _, *rows = saved(driver, button)
    assert [row[0] for row in rows] == ["other"] and driver.get_log("browser") == []
