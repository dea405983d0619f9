"""What a run shows of its results in the pages: tables that fit, what the report says first, and where it lies."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey

from cpdiff_core.artifacts import seal, write_json
from cpdiff_core.config import UserError
from tasks.environment import ROOT_VARIABLE
from tasks.prefect_artifacts import address, headline, place, publish, publish_adapters

TABLE = f"task  metric    no-LoRA            generated\n{'-' * 45}\nsst2  accuracy  60.5 [53.5, 67.5]  83.5 [76.5, 90.5]"
SUMMARY = f"a warning\n\n{TABLE}\n\ngenerated - no-LoRA: 23.0\n\nsst2: copies\ncola: not told apart\n\n- a note\n- another\n"


@pytest.fixture
def report(tmp_path: Path) -> Path:
    folder = tmp_path / "report" / "abc"
    folder.mkdir(parents=True)
    rows = [
        {"task": "sst2", "arm": arm, "metric": "accuracy", "estimate": estimate, "low": estimate - 7.0, "high": estimate + 7.0}
        for arm, estimate in (("no-LoRA", 60.5), ("generated", 83.456))
    ]
    pd.DataFrame(rows).to_csv(folder / "results.csv", index=False)
    (folder / "summary.txt").write_text(SUMMARY)
    (folder / "report.html").write_text("<html></html>")
    (folder / "map.png").write_bytes(b"picture")
    seal(folder)
    return folder


def artifacts(*keys: str) -> dict[str, str]:
    with get_client(sync_client=True) as client:
        found = client.read_artifacts(artifact_filter=ArtifactFilter(key=ArtifactFilterKey(any_=list(keys))))
    return {str(item.key): str(item.data) for item in found}


def test_report_is_published_as_table_markdown_with_its_figures_and_link(
    artifact_root: Path, report: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ROOT_VARIABLE, str(tmp_path))
    monkeypatch.setenv("CPDIFF_ROOT_URL", "http://127.0.0.1:4201/")

    @flow(persist_result=False)
    def publishes() -> None:
        publish("A/b", report)

    publishes()
    found = artifacts("a-b-results", "a-b-report", "a-b-page")
    assert '"estimate": 83.46' in found["a-b-results"] or "83.46" in found["a-b-results"]
    page = "http://127.0.0.1:4201/report/abc/report.html"
    assert page in found["a-b-page"]
    lines = found["a-b-report"].splitlines()
    assert "| sst2 | 60.5 [53.5, 67.5] | 83.5 [76.5, 90.5] |" in lines
    assert lines[lines.index("sst2: copies") + 1] == "", "else the pages join the lines"
    assert lines[lines.index("- a note") + 1] == "- another"
    assert f"Page: [report.html]({page})" in lines
    assert "![map](data:image/png;base64,cGljdHVyZQ==)" in lines
    assert headline(report) == "generated - no-LoRA: 23.0"
    (report / "summary.txt").write_text("| row |\n| --- |\n\n- an excerpt: says nothing\n- another\n")
    seal(report)
    assert headline(report) == "an excerpt: says nothing"


@pytest.mark.parametrize(("url", "root"), [("", "."), ("http://127.0.0.1:4201", "elsewhere"), ("http://127.0.0.1:4201", "")])
def test_file_has_no_address_where_the_root_is_not_served(
    report: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str, root: str
) -> None:
    monkeypatch.setenv("CPDIFF_ROOT_URL", url)
    monkeypatch.setenv(ROOT_VARIABLE, str(tmp_path / root) if root else "")
    assert address(report / "report.html") is None
    assert place(Path("/a/my_root/b-c.html")) == "/a/my\\_root/b-c.html"


@pytest.mark.parametrize(("change", "said"), [(Path.unlink, "missing"), (lambda page: page.write_text("<p>"), "altered")])
def test_page_that_was_moved_away_or_altered_is_a_line_with_the_remedy(
    artifact_root: Path, report: Path, change: Callable[[Path], object], said: str
) -> None:
    change(report / "report.html")
    with pytest.raises(UserError, match=rf"report.html': is .*{said}; delete the folder .*'report' will be recomputed"):
        publish("A/b", report)


def test_generated_adapters_stand_in_a_table_with_the_chosen_one_marked(artifact_root: Path, tmp_path: Path) -> None:
    score = {"arm": "this adapter", "metric": "accuracy", "estimate": 83.5, "low": 78.0, "high": 88.5}
    near = {"task": "sst2", "distance_product": 0.5, "distance_factors": 1.0, "norm_product": 2.0, "compared_with": 3}
    candidates = [
        {"folder": "candidate-0", "scores": [], "nearest": None},
        {"folder": "candidate-1", "scores": [score], "nearest": near},
    ]
    write_json(tmp_path / "generation.json", {"chosen": "candidate-1", "prompt": "a task", "candidates": candidates})

    @flow(persist_result=False)
    def publishes() -> None:
        publish_adapters("mine", ["2 PEFT folders"], tmp_path)

    publishes()
    lines = artifacts("adapters")["adapters"].splitlines()
    assert "| candidate-0 | not scored |  |" in lines
    assert "| **candidate-1, chosen** | accuracy 83.5 [78.0, 88.5] | sst2: 0.25 |" in lines
    assert "- 2 PEFT folders" in lines
