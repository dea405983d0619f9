"""The page of an experiment in a real browser: sort, filter, select, toggle, step; wide and narrow, light and dark."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
import pytest
from browser import Browser

if TYPE_CHECKING:
    from conftest import TextRun

SIZES = pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
VISIBLE = "return [...document.querySelectorAll(arguments[0])].filter(e => !e.hidden && e.offsetParent).length"


def column(browser: Browser, table: str, index: int) -> list[float]:
    cells = browser(
        "return [...document.querySelector(arguments[0]).tBodies[0].rows].filter(r => !r.hidden)"
        ".map(r => r.cells[arguments[1]].dataset.value)", table, index,
    )  # fmt: skip
    return [float(cell) for cell in cells]


@SIZES
def test_page_fits_its_window_and_every_target_a_finger(browser: Browser, text_run: TextRun, width: int, scheme: str) -> None:
    browser.open(text_run.page, width, scheme)
    assert browser.too_wide() <= 0
    assert browser.small_targets() == []
    paper, ink = browser("const s = getComputedStyle(document.body); return [s.backgroundColor, s.color]")
    assert (sum(map(int, paper[4:-1].split(","))) < 200) == (scheme == "dark"), (paper, ink)
    overlapping = browser(
        "const boxes = [...document.querySelectorAll('#novelty text')].map(t => t.getBoundingClientRect());"
        "return boxes.some((a, i) => boxes.slice(i + 1).some(b => a.left < b.right && b.left < a.right && a.top < b.bottom"
        " && b.top < a.bottom))"
    )
    assert not overlapping, "numbers of the axes stand apart"


def test_table_says_what_results_csv_says_to_the_printed_digit(browser: Browser, text_run: TextRun) -> None:
    browser.open(text_run.page)
    shown = browser(
        "const t = document.getElementById('results'); const heads = [...t.tHead.rows[0].cells].map(c => c.dataset.task);"
        "return [...t.tBodies[0].rows].flatMap(r => [...r.cells].slice(1).map((c, i) => [heads[i + 1], r.cells[0].textContent,"
        " c.textContent.replace(/\\s+/g, ' ').trim()]))"
    )
    frame = pd.read_csv(text_run.folder / "results.csv")
    expected = {
        (row.task, row.arm): f"{row.estimate:.1f} [{row.low:.1f}, {row.high:.1f}]" for row in frame.itertuples()
    }
    assert {(task, arm): text for task, arm, text in shown} == expected


@SIZES
def test_header_sorts_by_mouse_and_by_key(browser: Browser, text_run: TextRun, width: int, scheme: str) -> None:
    from selenium.webdriver.common.keys import Keys

    browser.open(text_run.page, width, scheme)
    assert browser("return document.querySelectorAll('#results [aria-sort=none]').length") == 4
    browser.click("#results th[data-task=left] button")
    found = column(browser, "#results", 1)
    assert found == sorted(found, reverse=True)
    assert len(set(found)) > 1
    head = browser.one("#results th[data-task=left]")
    assert head.get_attribute("aria-sort") == "descending"
    head.find_element("tag name", "button").send_keys(Keys.ENTER)
    assert column(browser, "#results", 1) == sorted(found)
    assert head.get_attribute("aria-sort") == "ascending"
    browser.click("#results th:first-child button")
    assert head.get_attribute("aria-sort") == "none", "one column at a time"
    assert browser.one("#results tbody th").text.startswith("checkpoints")


@SIZES
def test_words_and_a_task_filter_the_rows(browser: Browser, text_run: TextRun, width: int, scheme: str) -> None:
    browser.open(text_run.page, width, scheme)
    box = browser.one(".tools[data-table=results] input")
    box.send_keys("SOUP")
    assert browser(VISIBLE, "#results tbody tr") == 2, "model soup, soup fine-tuned"
    assert browser.one(".tools[data-table=results] output").text == "2 of 11 rows"
    browser.choose(".tools[data-table=results] select", "right")
    assert browser(VISIBLE, "#results thead th") == 2
    browser.choose(".tools[data-table=differences] select", "left")
    rows = [row.text for row in browser.all("#differences tbody tr") if row.is_displayed()]
    assert rows
    assert all("left" in row for row in rows)
    browser.one(".tools[data-table=differences] input").send_keys("model soup generated ensemble")
    assert browser(VISIBLE, "#differences tbody tr") == 0


@SIZES
def test_candidate_is_chosen_in_the_table_and_in_the_plot(browser: Browser, text_run: TextRun, width: int, scheme: str) -> None:
    browser.open(text_run.page, width, scheme)
    rows = [row for row in browser.all("#candidates tbody tr") if row.is_displayed()]
    assert len(rows) == 5
    vector = rows[3].get_attribute("data-vector")
    browser.click(f"#candidates tr[data-vector='{vector}'] button")
    assert rows[3].find_element("tag name", "button").get_attribute("aria-pressed") == "true"
    assert [len(browser.all(f"#{plot} .picked-ring")) for plot in ("novelty", "map")] == [1, 1]
    assert browser.one(".picked").text.startswith("candidate 3")
    frame = pd.read_csv(text_run.folder / "candidates.csv").query("task == 'left' and candidate == 3")
    assert f"disagreement: {frame.disagreement_percent.item():.1f} %" in browser.one(".picked").text

    other = rows[1].get_attribute("data-vector")
    area = browser(
        "const m = document.querySelector(`#map path[data-vector='${arguments[0]}']`); m.scrollIntoView({block: 'center'});"
        "const r = m.getBoundingClientRect(); return [r.left + r.width / 2, r.top + r.height / 2]", other,
    )  # fmt: skip
    browser.click_at(*area)
    told = browser("return document.querySelector('#map .tip').textContent").splitlines()
    assert told[0] in browser.one(".picked").text, "what is told of is what was chosen"
    picked = browser("return [...document.querySelectorAll('#candidates tr.pick')].map(r => r.dataset.vector)")
    assert picked == ([other] if told[0].startswith("candidate") else []), "two marks may lie at one place"

    browser.choose("#explore select.task", "right")
    shown = [row.get_attribute("data-task") for row in browser.all("#candidates tbody tr") if row.is_displayed()]
    assert shown == ["right"] * 5
    assert browser.all(".picked-ring") == [], "another task's candidate is not in this plot"


def test_plot_is_walked_by_arrow_keys(browser: Browser, text_run: TextRun) -> None:
    from selenium.webdriver.common.keys import Keys

    browser.open(text_run.page)
    plot = browser.one("#novelty > svg")
    plot.send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ENTER)
    told = browser.one("#novelty [aria-live]").get_attribute("textContent")
    assert "distance" in told
    assert len(browser.all("#novelty .picked-ring")) == 1
    assert told.split(",")[0] in browser.one(".picked").text


@SIZES
def test_legend_turns_a_series_off_and_on(browser: Browser, text_run: TextRun, width: int, scheme: str) -> None:
    browser.open(text_run.page, width, scheme)
    names = [button.text for button in browser.all(".legend button")]
    assert names[:5] == ["candidate", "checkpoint", "last checkpoint", "model soup", "no-LoRA"]
    assert {"checkpoint + noise", "soup + noise", "per-coordinate Gaussian", "mean of 16", "soup fine-tuned"} <= set(names)
    before = len(browser.all("#novelty .mark"))
    trivial = names.index("soup + noise")
    browser("arguments[0].click()", browser.all(".legend button")[trivial])
    assert browser.all(".legend button")[trivial].get_attribute("aria-pressed") == "false"
    assert len(browser.all("#novelty .mark")) == before - 4, "num_trivial"
    browser("arguments[0].click()", browser.all(".legend button")[trivial])
    assert len(browser.all("#novelty .mark")) == before


@SIZES
def test_slider_steps_along_the_trajectory(browser: Browser, text_run: TextRun, width: int, scheme: str) -> None:
    from selenium.webdriver.common.keys import Keys

    browser.open(text_run.page, width, scheme)
    slider = browser.one("#trajectory input")
    assert browser.one("#trajectory output").text.startswith("step 4 of 4, t = 0")
    slider.send_keys(Keys.HOME)
    first = browser.one("#trajectory output").text
    assert first.startswith("step 0 of 4, t = ")
    slider.send_keys(Keys.ARROW_RIGHT)
    assert browser.one("#trajectory output").text.startswith("step 1 of 4")
    assert slider.get_attribute("aria-valuetext").startswith("step 1 of 4")


def test_request_elsewhere_would_be_noticed_and_the_page_forbids_it(browser: Browser, text_run: TextRun, tmp_path: Path) -> None:
    elsewhere = "http://127.0.0.1:9/x.png"
    (tmp_path / "bad.html").write_text(f"<html data-ready=true><img src={elsewhere}>")
    assert [url for url in browser.requests() if not url.startswith("file:///")] == []
    browser.open(tmp_path / "bad.html")
    assert elsewhere in browser.requests()
    browser.complaints()
    browser.open(text_run.page)
    browser("const i = new Image(); i.src = arguments[0]; document.body.append(i)", elsewhere)
    assert "Content Security Policy" in " ".join(browser.complaints())
    browser.requests()  # the log has what was refused too


def test_texts_of_a_configuration_are_shown_and_not_obeyed(browser: Browser, text_run: TextRun) -> None:
    browser.open(text_run.page)
    assert browser("return window.hacked") is None
    assert "</script><script>window.hacked = 1" in browser.one(".sub").text
    assert "{{ 7 * 7 }}" in browser.one(".sub").text
    assert browser("return document.scripts.length") == 2


def test_page_is_readable_without_javascript(browser: Browser, text_run: TextRun) -> None:
    browser.open(text_run.page, script=False)
    try:
        assert len([row for row in browser.all("#candidates tbody tr") if row.is_displayed()]) == 10, "both tasks"
        assert [box.is_displayed() for box in browser.all(".tools")] == [False] * len(browser.all(".tools"))
        figures = browser.all("#explore noscript img")
        assert [figure.is_displayed() for figure in figures] == [True, True]
    finally:
        browser.open(text_run.page)
