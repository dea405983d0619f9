"""Style experiments that are odd and legal: one style in the table and the like."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from style_pictures import write_pictures
from tiny import run_in_copy

if TYPE_CHECKING:
    from conftest import StyleRun

RunVariant = Callable[..., Path]


@pytest.fixture
def run_variant(style_run: StyleRun, tmp_path: Path) -> RunVariant:
    """`run_variant(scored=[...])`: the tiny experiment with changes, in a copy of its root; the folder of the report."""
    from cpdiff_core.style_experiments import StyleExperimentConfig
    from flows.style import run_style_experiment

    def run(**changes: Any) -> Path:
        experiment = StyleExperimentConfig.model_validate(style_run.experiment.model_dump(mode="json") | changes)
        return run_in_copy(run_style_experiment, experiment, style_run.runtime, style_run.root, tmp_path / "root")

    return run


def test_one_style_in_the_table_is_not_interpolated(run_variant: RunVariant) -> None:
    report = run_variant(scored=["oil"])
    page = (report / "report.html").read_text(encoding="utf-8")
    assert 'id="interpolation"' not in page
    assert 'href="#interpolation"' not in page
    assert '"interpolation":null' in page  # what the script reads
    assert not list(report.glob("*interpolation*"))
    assert 'id="trajectory"' in page
    assert (report / "trajectory.png").is_file()
    stages = report.parents[1] / "interpolate_styles"
    assert len(list(stages.glob("*/config.json"))) == 1, "that of the run that was copied"


def test_way_between_styles_is_told_from_the_first_to_the_last(style_run: StyleRun) -> None:
    """The table begins with oil, and chalk comes first in the alphabet, so in the file of the distances."""
    page = (style_run.report / "report.html").read_text(encoding="utf-8")
    assert "From oil (lambda 0) to chalk (lambda 1)" in page
    assert '"styles":["oil","chalk"]' in page  # what the script reads
    (inputs,) = style_run.inputs("interpolate_styles").values()
    assert [inputs[end]["style"] for end in ("first", "second")] == ["oil", "chalk"]


def test_page_says_what_its_table_is_of(style_run: StyleRun) -> None:
    """Two of four styles are in the table; the probe knows those, the one left out and the photographs."""
    page = (style_run.report / "report.html").read_text(encoding="utf-8")
    assert "2 styles of the 4 trained on" in page
    assert "the scored and the left-out styles and of photographs" in page
    (probe,) = {tuple(inputs["names"]) for inputs in style_run.inputs("fit_style_classifier").values()}
    assert set(probe) == {"oil", "chalk", "ink", "photo"}


def test_whole_cost_counts_every_stage_that_the_report_names(style_run: StyleRun) -> None:
    page = (style_run.report / "report.html").read_text(encoding="utf-8")
    for stage in ("style_trajectory", "interpolate_styles", "compare_unseen_styles"):
        for folder in style_run.inputs(stage):
            assert f"<th scope=\"row\">{stage}</th><td><code>{folder.name}</code>" in page, stage


@pytest.mark.parametrize(("changes", "unit"), [({"num_checkpoints": 1}, "1 % of the"), ({}, "the training vectors' own")])
def test_novelty_of_a_single_training_vector_is_told_as_it_is_measured(style_run: StyleRun, changes, unit: str) -> None:
    from cpdiff_core.reports.style_page import style_reading

    reading = style_reading(style_run.experiment.model_copy(update=changes))
    assert f"over {unit}" in reading.note
    assert f"(1: {unit}" in reading.xlabel


@pytest.mark.parametrize("name", ["base", "oil_candidates", "ink_left_out", "interpolation_weights", "interpolation"])
def test_no_style_can_have_a_name_whose_pictures_overwrite_others(style_run: StyleRun, name: str) -> None:
    made = {path.name for path in style_run.report.glob("*.png")}
    assert {"sheet_oil.png", "candidates_oil.png", "left_out_ink.png"} <= made
    assert not made & {f"{kind}_{name}.png" for kind in ("sheet", "candidates", "left_out")}


def test_objectives_of_one_kind_have_rows_of_their_own(style_run: StyleRun, run_variant: RunVariant) -> None:
    (one,) = (objective.model_dump(mode="json") for objective in style_run.experiment.compared_objectives)
    report = run_variant(compared_objectives=[one, one | {"train_decoder": False}], scored=["oil"])
    summary = (report / "summary.txt").read_text(encoding="utf-8")
    for name in ("weights", "through the base 1", "through the base 2"):
        assert re.search(rf"^ink +generated, {name}  ", summary, re.M), name
        assert re.search(rf"^ink +shuffled condition, {name}  ", summary, re.M), name
        assert f"\ngenerated, {name}, on 1 unseen style," in summary


@pytest.mark.parametrize("twice", [[{"kind": "weights"}], [{"kind": "through_base"}] * 2])
def test_objective_that_occurs_twice_is_refused(style_run: StyleRun, twice: list[dict[str, str]]) -> None:
    from cpdiff_core.style_experiments import StyleExperimentConfig

    with pytest.raises(ValueError, match="compared_objectives: an objective occurs twice"):
        StyleExperimentConfig.model_validate(style_run.experiment.model_dump(mode="json") | {"compared_objectives": twice})


def test_dropout_is_refused_when_the_experiment_is_read(style_run: StyleRun) -> None:
    from cpdiff_core.style_experiments import StyleExperimentConfig

    values = style_run.experiment.model_dump(mode="json")
    with pytest.raises(ValueError, match=r"lora\.lora_dropout 0\.1: styles train without dropout; set it to 0"):
        StyleExperimentConfig.model_validate(values | {"lora": values["lora"] | {"lora_dropout": 0.1}})


@pytest.mark.parametrize("base", [{}, {"base": {"kind": "embedded"}}])
@pytest.mark.parametrize(
    ("images", "message"),
    [
        ({"scheduler": "foo"}, "images: scheduler 'foo': unknown; use ddpm"),
        ({"num_inference_steps": 1001}, "images: num_inference_steps 1001: is more than num_train_timesteps 1000; use at most"),
        ({"num_inference_steps": 1000, "guidance_scale": 0.0}, None),
    ],
)
def test_images_that_cannot_be_sampled_are_refused_before_anything_is_trained(style_run: StyleRun, base, images, message):
    from cpdiff_core.config import UserError
    from cpdiff_core.style_experiments import StyleExperimentConfig, resolve_styles

    values = style_run.experiment.model_dump(mode="json")
    experiment = StyleExperimentConfig.model_validate(values | base | {"images": values["images"] | images})
    with pytest.raises(UserError, match=message) if message else nullcontext():
        resolve_styles(experiment, style_run.data)


def test_style_with_one_image_to_choose_by_is_refused_before_anything_is_trained(
    style_run: StyleRun, run_variant: RunVariant, tmp_path: Path
) -> None:
    from cpdiff_core.config import UserError

    write_pictures(style_run.data / "few", 12, 7)
    few = {"name": "few", "source": {"kind": "folder", "path": "few"}}
    styles = [*style_run.experiment.model_dump(mode="json")["styles"], few]
    with pytest.raises(UserError, match="style 'few': 1 of its images is in the split 'selection'"):
        run_variant(styles=styles, scored=["oil", "few"])
    assert len(list((tmp_path / "root" / "harvest_style").glob("*/config.json"))) == 4, "those of the run that was copied"


def test_adapter_whose_images_are_not_finite_is_refused_and_not_scored_as_black_pictures(
    style_run: StyleRun, run_variant: RunVariant
) -> None:
    from cpdiff_core.config import UserError

    sampling = style_run.experiment.sampling.model_dump(mode="json") | {"temperature": 1e30}
    with pytest.raises(UserError, match=r"style 'oil': the images of candidates, row 0, are not finite; lower"):
        run_variant(sampling=sampling, scored=["oil"], left_out=[], compared_objectives=[])
