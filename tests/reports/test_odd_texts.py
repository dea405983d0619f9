"""Experiments on texts that are odd and legal: one task, one checkpoint, one candidate and the like."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tiny import run_in_copy

from cpdiff_core.config import UserError

if TYPE_CHECKING:
    from conftest import TextRun

RunVariant = Callable[..., Path]


@pytest.fixture
def run_variant(text_run: TextRun, tmp_path: Path) -> RunVariant:
    """`run_variant(num_checkpoints=1)`: the tiny experiment with changes, in a copy of its root; the folder of the report."""
    from cpdiff_core.experiments import ExperimentConfig
    from flows.pipeline import run_experiment

    def run(**changes: Any) -> Path:
        experiment = ExperimentConfig.model_validate(text_run.values | changes)
        return run_in_copy(run_experiment, experiment, text_run.runtime, text_run.root, tmp_path / "root")

    return run


def part(folder: Path, start: str, end: str) -> str:
    """The page's words between two of its texts."""
    page = (folder / "report.html").read_text(encoding="utf-8")
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", page[page.index(start) : page.index(end)])).split())


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"blocks": {"last": 2}, "audit": None}, "blocks.last 2: the base model's blocks are 0 to 1"),
        ({"arms": ["generated", "full"], "audit": None}, "full.max_length 128: the base model takes 64 tokens"),
        ({"condition": {"kind": "few_shot", "num_examples": 60}}, "54 training examples are too few for prompts of 60"),
    ],
)
def test_what_needs_no_weights_is_refused_before_the_fine_tuning(
    text_run: TextRun, run_variant: RunVariant, tmp_path: Path, changes: dict[str, Any], told: str
) -> None:
    with pytest.raises(UserError, match=re.escape(told)):
        run_variant(fine_tune=text_run.values["fine_tune"] | {"seed": 5}, **changes)
    assert len(list((tmp_path / "root" / "harvest_checkpoints").glob("*/config.json"))) == 2, "those of the run that was copied"


def test_task_alone_is_not_compared_with_another(text_run: TextRun, run_variant: RunVariant) -> None:
    report = run_variant(tasks=text_run.values["tasks"][:1], sampling={"num_inference_steps": 4, "num_candidates": 1})
    effects = part(report, "Does the condition matter?", "Dispersion and separation")
    assert "an empty condition" in effects
    assert "another task" not in effects, "there is none"
    assert "a shuffled condition" not in effects, "a one-hot vector of one number"
    row = part(report, "between tasks, generated", "Figures").split()
    assert row[-2:] == ["-", "-"], "between tasks"
    stored = [json.loads(path.read_text()) for path in report.parents[1].glob("generate_changed/*/config.json")]
    assert [one["inputs"]["config"]["num_candidates"] for one in stored].count(1) == 1, "as many as of the right condition"


def test_single_checkpoint_is_like_no_other_and_lies_nowhere_typical(
    text_run: TextRun, run_variant: RunVariant, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.axes import Axes

    drawn: dict[str, Any] = {}
    scatter = Axes.scatter

    def look(axis: Axes, x: Any, y: Any, **more: Any) -> Any:
        drawn[str(more.get("label"))] = x
        return scatter(axis, x, y, **more)

    monkeypatch.setattr(Axes, "scatter", look)
    report = run_variant(num_checkpoints=1)
    assert "training checkpoints" not in drawn
    assert all((drawn[name] >= 0).all() for name in ("generated", "soup + noise")), "shares of mistakes"
    figures = part(report, 'class="figures"', "<h2>Autoencoder")
    assert "in units of 1 % of the training vector's norm" in figures
    assert "Dotted" not in figures
    assert "STS-B" not in figures
    assert "Each task has one vector: nothing varies within tasks." in part(report, "<h2>Autoencoder", 'id="cost"')


def test_notes_are_about_the_arms_that_there_are(run_variant: RunVariant) -> None:
    report = run_variant(arms=["generated", "full"], audit=None, full={"num_epochs": 0.1, "max_length": 16},
                         normalization={"scope": "none"})  # fmt: skip
    notes = part(report, 'id="notes"', 'id="differences-section"')
    assert "held out of fine-tuning: generated (best of 5), full." in notes
    assert "shared by all arms but full" in notes
    assert "normalisation none;" in notes
    for absent in ("original", "no-LoRA", "annealed", "by vector"):
        assert absent not in notes


@pytest.mark.parametrize(("explained", "warned"), [(0.9996, False), (0.998, True)])
def test_autoencoder_is_warned_of_only_where_the_printed_shares_differ(explained: float, warned: bool) -> None:
    from cpdiff_core.reports.page import autoencoder_warning

    quality = {"within_task_variance_explained": explained, "pca16_within_task_variance_explained": 1.0}
    assert (autoencoder_warning(quality) is not None) == warned


def test_trivial_generators_are_told_with_how_many_there_are(text_run: TextRun) -> None:
    table = part(text_run.folder, 'id="trivial"', "Does the condition matter?")
    assert "generated, 5" in table
    assert "soup + noise, 4" in table


def test_cost_of_candidates_of_which_none_is_chosen_is_told_as_such(run_variant: RunVariant, text_run: TextRun) -> None:
    assert "generating: a chosen candidate for each task" in part(text_run.folder, 'id="costs"', 'id="configuration"')
    report = run_variant(arms=["generated (mean)"], audit=None)
    assert "generating: candidates for each task" in part(report, 'id="costs"', 'id="configuration"')
