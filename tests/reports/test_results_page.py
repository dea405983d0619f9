"""docs/RESULTS.md: written from a tiny experiment, and the committed one against the files beside it."""

import csv
import json
import re
from pathlib import Path

import pytest

from cpdiff_core.artifacts import read_json
from cpdiff_core.config import RuntimeConfig
from cpdiff_core.evaluation.arms import MEANING
from cpdiff_core.experiment_config import ExperimentConfig
from cpdiff_core.reports.claims import audit_claims
from cpdiff_core.reports.facts import Facts
from cpdiff_core.reports.results_page import (
    audit_table,
    claim_table,
    cost_table,
    glance,
    weights_table,
)
from flows.results import write_results

DOCS = Path(__file__).parents[2] / "docs"
AUDITED = ("r1-single", "r1-zoo5", "r4-single", "r4-zoo5")


def facts_of(folder: Path, name: str) -> Facts:
    return Facts.model_validate(json.loads((folder / f"{name}-facts.json").read_text(encoding="utf-8")))


def printed_cells(page: str) -> dict[tuple[str, str, str], str]:
    """(row, arm, task) -> the cell, of every table of experiments; not the paper's lines."""
    found, header = {}, []
    for line in page.splitlines():
        values = [value.strip() for value in line.strip("|").split("|")]
        if line.startswith("| row |"):
            header = [value.split(" (")[0] for value in values]
        elif line.startswith("| ") and len(values) == len(header) and values[0] and not values[0].startswith("---"):
            found |= {(values[0], values[1], task): cell for task, cell in zip(header[2:], values[2:], strict=True)}
        elif not line.startswith("|"):
            header = []
    return found


def check_cells(page: str, table: Path) -> int:
    """Every printed cell against the long table, to the digits printed. Returns how many there were."""
    with table.open(encoding="utf-8") as file:
        rows = {(row["row"].split("/")[-1], row["arm"], row["task"]): row for row in csv.DictReader(file)}
    cells = printed_cells(page)
    for key, cell in cells.items():
        numbers = [float(number) for number in re.findall(r"-?\d+\.\d+", cell)]
        stored = [float(rows[key][name]) for name in ("estimate", "low", "high", "seed_std") if rows[key][name]]
        assert numbers == pytest.approx(stored, abs=0.0506), (key, cell)
    return len(cells)


def check_links(page: str, docs: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)\)", page)
    assert targets
    assert not [target for target in targets if not (docs / target).is_file()]


@pytest.fixture(scope="module")
def written(text_run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as `docs`, from one audited experiment of one seed."""
    out = tmp_path_factory.mktemp("docs")
    value = read_json(text_run.folder, "config.json")["inputs"]["config"]
    config = ExperimentConfig.model_validate(value | {"economies": ["two tiny tasks"]})
    write_results([config], {config.name: text_run.folder}, out, RuntimeConfig(data_dir="data"), 12.0)
    (out / "STYLE.md").touch()
    return out


def test_page_has_every_arm_explained_and_every_file_it_links_to(written: Path) -> None:
    page = (written / "RESULTS.md").read_text(encoding="utf-8")
    check_links(page, written)
    assert check_cells(page, written / "results" / "results.csv") == 11 * 3, "11 arms on 2 tasks and the average"
    arms = {arm for _, arm, _ in printed_cells(page)}
    for arm in arms:
        assert f"| {arm} | {MEANING[arm]} |" in page
    assert "cpdiff results --data-dir DIR" in page
    assert "Economies: two tiny tasks." in page
    assert "## Mixed metrics" not in page, "no task of this one has a combined score"


def test_one_seed_proves_no_claim_about_scores(written: Path) -> None:
    page = (written / "RESULTS.md").read_text(encoding="utf-8")
    lines = [line for line in page.splitlines() if line.startswith("| ") and "; one seed" in line]
    assert len(lines) == 9
    assert all(line.endswith("| **ties** |") for line in lines)
    assert "| claims of Tables 3, 4a, 4b, 4c | r1-single | - | not all rows have been run | **not tested** |" in page


def test_verdicts_follow_from_the_facts() -> None:
    """A set made to order from a committed one: each changed figure turns its own claim."""
    facts = facts_of(DOCS / "results", "r4-single")

    def verdicts(**changes: object) -> dict[str, str]:
        tasks = {task: found.model_copy(update=changes) for task, found in facts.tasks.items()}
        return {one.text: one.verdict for one in audit_claims("x", facts.model_copy(update={"tasks": tasks}))}

    mistakes = "(ours) generated adapters make other mistakes than training checkpoints"
    assert verdicts(generated_training_iou=(0.50, 0.51, 0.49), training_training_iou=(0.90, 0.91, 0.90))[mistakes] == "holds"
    assert verdicts(generated_training_iou=(0.95, 0.96, 0.95), training_training_iou=(0.90, 0.91, 0.90))[mistakes] == "fails"
    assert verdicts(generated_training_iou=(0.80, 0.99, 0.91), training_training_iou=(0.90, 0.91, 0.90))[mistakes] == "ties"
    assert verdicts(training_training_iou=(None, None, None))[mistakes] == "not tested"
    assert verdicts(copies=(11, 0, 0))["generated weights are not copies"] == "fails"
    assert verdicts(dispersion=(1.5, 1.6, 1.5))["generated weights are more widely dispersed than the originals"] == "holds"
    alike = "the generated distributions of different tasks are alike"
    for separation, expected in (((0.3, 0.31, 0.3), "holds"), ((0.5, 1.5, 1.1), "ties"), ((3.0, 3.1, 3.2), "fails")):
        changed = facts.model_copy(update={"separation_generated": separation})
        assert {one.text: one.verdict for one in audit_claims("x", changed)}[alike] == expected


def test_committed_page_says_what_the_files_beside_it_say() -> None:
    page = (DOCS / "RESULTS.md").read_text(encoding="utf-8")
    check_links(page, DOCS)
    assert check_cells(page, DOCS / "results" / "results.csv") > 600
    verdicts = re.findall(r"^\| (.+?) \| (r\d-\w+) \| .* \| \*\*(.+)\*\* \|$", page, re.M)
    assert len(verdicts) == 4 * 16 + 6
    for name in AUDITED:
        facts = facts_of(DOCS / "results", name)
        claims = audit_claims(name, facts)
        for line in claim_table(claims).splitlines()[2:]:
            assert line in page
        assert audit_table(facts) in page
        for found in facts.tasks.values():
            assert f"- {found.verdict}; with seeds: {found.seed_claim}\n" in page
    for text, setting, verdict in verdicts:
        line = next(line for line in page.splitlines() if line.startswith(f"| {text} | ") and "**" not in line)
        assert line.strip("| ").split(" | ")[1 + AUDITED.index(setting)] == verdict, "the verdicts at a glance"


DIFFERENCES = {
    "(ours) generated is better than no adapter": "generated - no-LoRA",
    "generated is comparable to or better than original": "generated - original (oracle)",
    "the same against an original that one can choose": "generated - original (selected)",
    "generated is better than original (selected)": "generated - original (selected)",
    "(ours) generated is better than the annealed run": "generated - annealed",
    "(ours) a generated vector is better than the soup": "generated (mean) - model soup",
    "(ours) generating beats spending a few steps on the soup": "generated - soup fine-tuned",
    "(ours) an ensemble of the generated beats one of as many checkpoints": "generated (ensemble) - checkpoints (ensemble)",
}


@pytest.mark.parametrize("name", AUDITED)
def test_committed_differences_are_those_of_the_pages(name: str) -> None:
    page = (DOCS / "RESULTS.md").read_text(encoding="utf-8")
    text = (DOCS / "results" / f"{name}.html").read_text(encoding="utf-8")
    rows = re.findall(r'<tr data-task="average"><th scope="row">(.*?)</th><td>average</td>(.*?)</tr>', text, re.DOTALL)
    shown = {difference: re.sub(r"<[^>]+>", " ", cells) for difference, cells in rows}
    for claimed, difference in DIFFERENCES.items():
        line = rf"^\| {re.escape(claimed)} \| {name} \| .* \| (.*) \| \*\*(\w+)\*\* \|$"
        ((figures, verdict),) = re.findall(line, page, re.M)
        assert re.findall(r"-?\d+\.\d", figures) == re.findall(r"-?\d+\.\d", shown[difference]), claimed
        assert verdict == shown[difference].split()[-1] or "comparable" in claimed or "the same" in claimed


def test_committed_costs_are_those_of_the_facts() -> None:
    page = (DOCS / "RESULTS.md").read_text(encoding="utf-8")
    names = re.findall(r"^\| ([\w/-]+) \| .* \| \d+ \|$", page.split("## Cost")[1], re.M)
    facts = {name: facts_of(DOCS / "results", name.replace("/", "-")) for name in names}
    assert len(facts) == 24
    assert page.endswith(cost_table(facts) + "\n")
    assert weights_table(facts) in page


def test_glance_leaves_empty_what_was_not_tested() -> None:
    facts = facts_of(DOCS / "results", "r1-single")
    some = audit_claims("a", facts)
    text = glance([*some, *audit_claims("b", facts)[:1]])
    assert f"| {some[0].text} | {some[0].verdict} | {some[0].verdict} |" in text
    assert f"| {some[1].text} | {some[1].verdict} |  |" in text


def test_findings_written_by_hand_are_kept(text_run, tmp_path: Path) -> None:
    config = ExperimentConfig.model_validate(read_json(text_run.folder, "config.json")["inputs"]["config"])
    page, heading = tmp_path / "RESULTS.md", "## What is compared"
    for _ in range(2):
        write_results([config], {config.name: text_run.folder}, tmp_path, RuntimeConfig(), 12.0)
        text = page.read_text(encoding="utf-8")
        if "## Findings" not in text:
            page.write_text(text.replace(heading, f"## Findings\n\nBy hand.\n\n{heading}"), encoding="utf-8")
    assert text.count(f"\n\n## Findings\n\nBy hand.\n\n{heading}\n") == 1
