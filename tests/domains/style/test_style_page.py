"""The page of a style experiment in a real browser: images, the slider between styles, the way to the weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd
import pytest
from browser import Browser

from cpdiff_core.reports.html import IMAGE_BYTES

if TYPE_CHECKING:
    from conftest import StyleRun


@pytest.mark.parametrize(("width", "scheme"), [(1280, "dark"), (390, "light")])
def test_style_page_is_looked_through(browser: Browser, style_run: StyleRun, width: int, scheme: str) -> None:
    from selenium.webdriver.common.keys import Keys

    page = style_run.report / "report.html"
    browser.open(page, width, scheme)
    assert browser.too_wide() <= 0
    assert browser.small_targets() == []
    broken = browser("return [...document.images].filter(i => !i.naturalWidth && i.src).map(i => i.alt)")
    assert broken == []
    linked = browser("return [...document.images].map(i => i.getAttribute('src')).filter(s => s && !s.startsWith('data:'))")
    assert linked == [], "the page is whole by itself"
    patterns = ("*sheet*.png", "candidates_*.png", "left_out_*.png", "interpolation_*.png")
    sheets = [path for pattern in patterns for path in style_run.report.glob(pattern)]
    assert page.read_text(encoding="utf-8").count("data:image/webp") == len(sheets) >= 8
    left_out = browser.all("#left-out img")
    assert [image.get_attribute("alt").split(":")[0] for image in left_out] == ["ink, left out"]
    for image, rows in zip(left_out, browser.all("#left-out ol"), strict=True):
        high, gap, count = browser("return arguments[0].naturalHeight", image), 2, len(rows.find_elements("tag name", "li"))
        assert (high + gap) % count == 0, "a label for every row of the sheet"
    rows = {row.find_element("tag name", "th").text: row.text for row in browser.all("#left-out-results tbody tr")}
    folder = next(iter(style_run.inputs("compare_unseen_styles")))
    table = pd.read_csv(folder / "unseen.csv").set_index("arm")
    assert list(rows) == list(table.index)
    for arm, row in table.iterrows():
        gained = [key for key in ("no_lora", "nearest", "shuffled") if pd.notna(row[f"gain_over_{key}"])]
        for key in gained:
            gain, low, high = (row[f"gain_over_{key}{end}"] for end in ("", "_low", "_high"))
            assert f"{gain:+.0f} [{low:+.0f}, {high:+.0f}]" in " ".join(rows[arm].split())
        assert rows[arm].count("[") == len(gained)

    slider = browser.one("#interpolation input")
    shifts = []
    for key in (Keys.HOME, Keys.ARROW_RIGHT, Keys.END):
        slider.send_keys(key)
        image = "[...document.querySelectorAll('#interpolation figure')].find(f => !f.hidden).querySelector('img')"
        shifts.append(browser(f"return parseFloat({image}.style.translate.split(' ')[1] ?? 0)"))
    assert shifts[0] == pytest.approx(0)
    assert shifts[2] == pytest.approx(4 * shifts[1], rel=1e-4), "rows of the sheet, one for each lambda"
    assert browser.one("#interpolation output").text.startswith("lambda 1: ")
    kinds = [option.get_attribute("value") for option in browser.all("#interpolation option")]
    assert sorted(kinds) == ["condition", "weights"]
    browser.choose("#interpolation select", kinds[1])
    shown = [figure.get_attribute("data-kind") for figure in browser.all("#interpolation figure") if figure.is_displayed()]
    assert shown == [kinds[1]]

    browser.one("#trajectory input").send_keys(Keys.HOME)
    assert browser.one("#trajectory output").text.startswith("step 0 of 3")
    ends = "return [...document.querySelectorAll('#trajectory .plane .line:not(.faint)')].map(l => l.getAttribute('d'))"
    assert all("L" not in path for path in browser(ends)), "no step has been taken"
    browser.one("#trajectory input").send_keys(Keys.END)
    assert all(path.count("L") == 3 for path in browser(ends))

    frame = pd.read_csv(style_run.report / "candidates.csv")
    browser.choose("#explore select.task", "chalk")
    row = next(row for row in browser.all("#candidates tbody tr") if row.is_displayed())
    expected = frame.query("task == 'chalk' and candidate == 0").iloc[0]
    cells = [cell.text for cell in row.find_elements("tag name", "td")]
    assert cells[:3] == ["chalk", f"{expected.report:.1f}", f"{expected.selection:.3f}"]
    assert expected.report == pytest.approx(pd.Series(_stored_scores(style_run, "chalk"))[0], rel=1e-5)


def _stored_scores(run: StyleRun, style: str) -> list[float]:
    """The candidates' distances as the scoring stage wrote them."""
    import json

    for folder, inputs in run.inputs("score_style_report").items():
        vectors = inputs["vectors"]
        if inputs["config"]["style"] == style and vectors["kind"] == "candidates" and len(vectors["sources"]) == 1:
            scores = json.loads((folder / "scores.json").read_text())
            source = vectors["sources"][0]
            made = run.root / source["stage"] / source["fingerprint"] / "config.json"
            if source["stage"] == "generate_candidates" and json.loads(made.read_text())["inputs"]["task"] == style:
                found: list[float] = scores["frechet"]
                return found
    raise AssertionError(f"no candidates of {style}")


def test_images_beyond_the_room_of_a_page_are_linked(style_run: StyleRun) -> None:
    from cpdiff_core.reports.html import Pictures

    sheet = next(path for path in style_run.report.glob("sheet_*.png"))
    size = len(Pictures(style_run.report).source(sheet.name))
    assert size < IMAGE_BYTES
    pictures = Pictures(style_run.report, room=size)
    assert pictures.source(sheet.name).startswith("data:image/png;base64,")
    assert pictures.source(sheet.name) == sheet.name, "the second time there is no room"


def test_sheets_inside_a_page_look_like_those_beside_it(style_run: StyleRun) -> None:
    import base64
    import io

    import numpy as np
    from PIL import Image

    from cpdiff_core.reports.html import Pictures

    for sheet in style_run.report.glob("sheet_*.png"):
        kind, _, data = Pictures(style_run.report).photos(sheet.name).partition(",")
        assert kind == "data:image/webp;base64"
        inside, beside = Image.open(io.BytesIO(base64.b64decode(data))), Image.open(sheet)
        assert inside.size == beside.size
        gap = np.abs(np.asarray(inside.convert("RGB"), float) - np.asarray(beside.convert("RGB"), float))
        assert gap.mean() < 6, "of 255"
