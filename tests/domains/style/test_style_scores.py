"""The barrier between choosing and reporting for styles; Table 2's arms; conditions from held-out images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cpdiff_core.artifacts import seal, write_json, write_tensors
from cpdiff_core.config import RuntimeConfig, UserError
from cpdiff_core.domains.style.distances import fit_style_classifier, frechet_distance, kernel_distance
from cpdiff_core.domains.style.encoding import FEATURE_FILE, style_condition
from cpdiff_core.domains.style.features import EfficientNetLite0Features, image_features
from cpdiff_core.domains.style.images import contact_sheet, read_image
from cpdiff_core.domains.style.styles import StyleSplits, split_images
from cpdiff_core.evaluation.selection import select
from cpdiff_core.evaluation.style_scores import (
    SAMPLE_FILE,
    SCORE_FILE,
    StyleReportArtifact,
    StyleSelectionArtifact,
    load_style_selection,
    style_oracle,
)
from cpdiff_core.generator.conditions import StyleImageCondition
from cpdiff_core.lora.vectors import interpolate
from cpdiff_core.reports.style_page import style_headline
from cpdiff_core.reports.style_tables import (
    ARMS,
    CHOSEN,
    FLOOR,
    GENERATED,
    NO_LORA,
    ORACLE,
    SELECTED,
    SOUP,
    StyleArms,
    collect_styles,
    styles_frame,
)
from cpdiff_core.style_experiments import QUICKSTART_STYLE, STYLE_EXPERIMENTS, StyleExperimentConfig

QUIET = RuntimeConfig(device="cpu", progress=False)


def scored(root: Path, kind: Any, name: str, features: torch.Tensor, real: torch.Tensor) -> Any:
    """An artifact as `score_style` writes it, from given features."""
    artifact = kind(fingerprint=name)
    images = torch.zeros(len(features), 2, 3, 4, 4, dtype=torch.uint8)
    write_tensors(artifact.under(root) / SAMPLE_FILE, {"features_VND": features, "images_VNCHW": images})
    finite = [bool(x.isfinite().all()) for x in features]
    write_json(
        artifact.under(root) / SCORE_FILE,
        {
            "frechet": [frechet_distance(x, real) if ok else None for x, ok in zip(features, finite, strict=True)],
            "kid": [kernel_distance(x, real) if ok else None for x, ok in zip(features, finite, strict=True)],
        },
    )
    seal(artifact.under(root))
    return artifact


def near(real: torch.Tensor, shift: float, num: int = 30, seed: int = 1) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(num, real.shape[1], generator=rng) + shift


@pytest.fixture
def real() -> torch.Tensor:
    return torch.randn(40, 6, generator=torch.Generator().manual_seed(0))


def test_nearest_vector_is_chosen_and_one_that_is_not_finite_never(real: torch.Tensor, tmp_path: Path) -> None:
    features = torch.stack([near(real, 2.0), near(real, 0.1), near(real, float("nan")), near(real, 1.0)])
    for by in ("kid", "frechet"):
        artifact = scored(tmp_path, StyleSelectionArtifact, f"s-{by}", features, real)
        assert select(load_style_selection(artifact, tmp_path, "ink", by)) == 1  # type: ignore[arg-type]


def test_choosing_refuses_the_scores_of_the_report(real: torch.Tensor, tmp_path: Path) -> None:
    features = near(real, 0.0)[None]
    with pytest.raises(TypeError, match="selection split, not StyleReportArtifact"):
        load_style_selection(
            scored(tmp_path, StyleReportArtifact, "r", features, real), tmp_path, "ink", "kid"
        )
    with pytest.raises(TypeError, match="report split, not StyleSelectionArtifact"):
        style_oracle(scored(tmp_path, StyleSelectionArtifact, "s", features, real), tmp_path)


def test_table_has_every_arm_with_the_right_rows(real: torch.Tensor, tmp_path: Path) -> None:
    report = StyleReportArtifact
    original = torch.stack([near(real, 0.5), near(real, 0.2), near(real, 0.9)])
    generated = torch.stack([near(real, 0.8), near(real, 0.3)])
    write_tensors(tmp_path / "style_features" / "f" / FEATURE_FILE, {"train": near(real, 0.0, 50, 9), "report": real})
    from cpdiff_core.artifacts import Artifact

    features = Artifact(stage="style_features", fingerprint="f")
    seal(features.under(tmp_path))
    arms = StyleArms(
        style="ink", real=features, candidates=features, chosen_original=2, chosen_candidate=1,
        no_lora=scored(tmp_path, report, "z", near(real, 3.0)[None], real),
        original=scored(tmp_path, report, "o", original, real),
        soup=scored(tmp_path, report, "m", near(real, 0.4)[None], real),
        generated=scored(tmp_path, report, "g", generated, real),
    )  # fmt: skip
    classifier = fit_style_classifier({"photo": near(real, 3.0, 60, 3), "ink": near(real, 0.0, 60, 4)})
    results = collect_styles([arms], classifier, tmp_path)
    cells = results["ink"]
    assert tuple(cells) == (*ARMS, FLOOR)
    expected = {
        NO_LORA: near(real, 3.0), ORACLE: original[1], SELECTED: original[2], SOUP: near(real, 0.4), CHOSEN: generated[1]
    }
    for arm, x in expected.items():
        assert cells[arm].distance.estimate == pytest.approx(frechet_distance(x, real))
    mean = np.mean([frechet_distance(x, real) for x in generated])
    assert cells[GENERATED].distance.estimate == pytest.approx(mean)
    assert cells[NO_LORA].accepted < 20 < 80 < cells[SOUP].accepted
    assert cells[FLOOR].num_images == cells[NO_LORA].num_images == 30
    frame = styles_frame(results, "Fréchet distance (x)")
    row = frame[frame["arm"] == GENERATED].iloc[0]
    assert row["difference"] == pytest.approx(cells[NO_LORA].distance.estimate - mean)
    assert row["difference_low"] > 0
    assert "on 1 of 1 styles" in style_headline(results)


def test_generation_is_conditioned_on_an_image_that_training_never_saw(make_style) -> None:
    style, features = make_style("ink", 30), EfficientNetLite0Features(input_size=32)
    splits = StyleSplits()
    y_PE, y_E, row = style_condition(StyleImageCondition(num_images=20), features, style, splits, 24, 0, QUIET)
    assert y_PE.shape == (20, 1280)  # 15 training images, some twice
    train = image_features(features, split_images(style, splits, "train", 24).images_NCHW, torch.device("cpu"), "", QUIET)
    held = image_features(features, split_images(style, splits, "selection", 24).images_NCHW, torch.device("cpu"), "", QUIET)
    assert torch.cdist(y_PE, train).min(1).values.max() < 1e-3
    assert torch.cdist(train, y_PE).min(1).values.max() < 1e-3  # each of them
    assert torch.cdist(y_E[None], train).min() > 1e-2
    torch.testing.assert_close(y_E, held[row], atol=1e-4, rtol=1e-4)


def test_interpolation_ends_exactly_at_both_styles() -> None:
    a, b = torch.randn(50), torch.randn(50)
    assert torch.equal(interpolate(a, b, 0.0), a)
    assert torch.equal(interpolate(a, b, 1.0), b)


def test_contact_sheet_puts_images_in_their_places() -> None:
    first, second = torch.zeros(3, 4, 4, dtype=torch.uint8), torch.full((3, 4, 4), 200, dtype=torch.uint8)
    sheet = read_image(contact_sheet([torch.stack([first, second]), first[None]], gap=0), 8)
    assert sheet[:, :4, :4].max() == 0
    assert sheet[:, :4, 4:].unique().tolist() == [200]
    assert sheet[:, 4:, 4:].unique().tolist() == [255]


def test_experiments_are_values_that_survive_json() -> None:
    for item in STYLE_EXPERIMENTS.values():
        assert StyleExperimentConfig.model_validate_json(item.model_dump_json()) == item


def test_style_named_twice_is_refused() -> None:
    value = QUICKSTART_STYLE.model_dump()
    value["styles"] = [*value["styles"], value["styles"][0]]
    with pytest.raises(ValueError, match="the name 'art_painting' occurs twice"):
        StyleExperimentConfig.model_validate(value)


def test_style_condition_is_refused_for_text() -> None:
    from cpdiff_core.domains.glue.data import SplitConfig
    from cpdiff_core.domains.glue.prompts import task_conditions

    with pytest.raises(UserError, match="'style_image': is for styles"):
        task_conditions(StyleImageCondition(), (), (), SplitConfig(), 0, "cpu")
