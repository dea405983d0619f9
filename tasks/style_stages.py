"""The cached stages that only styles have; the generator's own stages are those of text (`tasks/stages.py`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from cpdiff_core.artifacts import Artifact, ResumeState, read_json, read_tensors, write_json, write_tensors
from cpdiff_core.config import RuntimeConfig
from cpdiff_core.domains.glue.stacks import device_of
from cpdiff_core.domains.style.base import TEMPLATES, PretrainedBase, StyleBase, caption, encode_captions
from cpdiff_core.domains.style.distances import fit_style_classifier as compute_classifier
from cpdiff_core.domains.style.encoding import CONDITION_FILE, FEATURE_FILE, encode_features, style_condition
from cpdiff_core.domains.style.encoding import encode_style as compute_encoding
from cpdiff_core.domains.style.features import FeatureConfig
from cpdiff_core.domains.style.fine_tuning import StyleFineTuning, StyleHarvestConfig, group_key
from cpdiff_core.domains.style.pretraining import caption_rows, pretrain, save_base
from cpdiff_core.domains.style.styles import ResolvedStyle, StyleSplits, split_images
from cpdiff_core.evaluation.style_scores import (
    StyleReportArtifact,
    StyleScoringConfig,
    StyleSelectionArtifact,
    score_style,
)
from cpdiff_core.evaluation.style_study import (
    TRAJECTORY_FILE,
    interpolated_conditions,
    interpolated_weights,
    score_interpolation,
    trajectory_plane,
)
from cpdiff_core.generator.conditions import StyleImageCondition
from cpdiff_core.generator.diffusion import SamplingConfig
from cpdiff_core.lora.zoo import CANDIDATE_FILE, HARVEST_FILE, VectorSet, Zoo
from cpdiff_core.reports.inputs import Generator
from cpdiff_core.reports.style_page import write_base_quality, write_style_report
from cpdiff_core.reports.style_tables import StyleReportInputs
from cpdiff_core.style_experiments import StyleExperimentConfig
from tasks.groups import GroupedStage, Member, finished_tensors, train_together
from tasks.stage import GIVEN, folder, root, stage
from tasks.stages import generator_parts

CLASSIFIER_FILE = "classifier.json"


@stage("pretrain_style_base", version=2, label=lambda config: f"{config.size.sample_size} px")
def pretrain_style_base(
    out: Path, config: PretrainedBase, photos: ResolvedStyle, splits: StyleSplits, seed: int, *, runtime: RuntimeConfig,
    resume: ResumeState = GIVEN,
) -> None:  # fmt: skip
    """A tiny PixArt from scratch on the training photographs."""
    device = device_of(runtime)
    images = split_images(photos, splits, "train", config.size.sample_size)
    texts = [caption(name, template) for name in caption_rows(images)[0] for template in TEMPLATES]
    captions = encode_captions(StyleBase(kind="tiny"), Path(), texts, device)
    options = {"seed": seed, "device": device, "runtime": runtime, "resume": resume}
    model, losses = pretrain(config, images, captions, **options)  # type: ignore[arg-type]
    save_base(model, out)
    write_tensors(out / "losses.safetensors", {"losses": losses})


@stage("encode_style", label=lambda style: style.name)
def encode_style(out: Path, base: StyleBase, style: ResolvedStyle, splits: StyleSplits, *, runtime: RuntimeConfig) -> None:
    compute_encoding(out, base, style, splits, root(), runtime)


@stage("style_features", label=lambda style: style.name)
def style_features(
    out: Path, features: FeatureConfig, style: ResolvedStyle, splits: StyleSplits, size: int, *, runtime: RuntimeConfig
) -> None:
    encode_features(out, features, style, splits, size, runtime)


@stage("fit_style_classifier")
def fit_style_classifier(out: Path, names: tuple[str, ...], real: tuple[Artifact, ...]) -> None:
    """A linear probe that tells the styles and the photographs apart, on training images."""
    features = {n: read_tensors(folder(a), FEATURE_FILE)["train"] for n, a in zip(names, real, strict=True)}
    write_json(out / CLASSIFIER_FILE, compute_classifier(features).model_dump(mode="json"))


@stage("harvest_style", label=lambda config: config.label)
def harvest_style(
    out: Path, config: StyleHarvestConfig, *, runtime: RuntimeConfig, resume: ResumeState = GIVEN,
    account: dict[str, Any] = GIVEN,
) -> None:  # fmt: skip
    """Commit what a group pass has left, with its share of the cost, or else train this run alone."""
    tensors = finished_tensors(resume, account) or _train([config], runtime, resume)[0]
    write_tensors(out / HARVEST_FILE, tensors)


def harvest_styles_together(configs: Sequence[StyleHarvestConfig], runtime: RuntimeConfig) -> None:
    """Train every missing run in as few passes as possible; each is committed by its own stage."""
    members = [
        Member(harvest_style.artifact(config, runtime=runtime), config.label, config, group_key(config)) for config in configs
    ]
    train_together(GroupedStage(_train, _commit, ("diffusers", "transformers", "peft")), members, runtime)


def _train(
    works: Sequence[StyleHarvestConfig], runtime: RuntimeConfig, resume: ResumeState
) -> list[dict[str, torch.Tensor]]:
    return [harvest.tensors() for harvest in StyleFineTuning(list(works), root(), runtime).run(runtime, resume)]


def _commit(work: StyleHarvestConfig, runtime: RuntimeConfig) -> object:
    return harvest_style(work, runtime=runtime)


@stage("encode_style_condition", label=lambda style: style.name)
def encode_style_condition(
    out: Path, condition: StyleImageCondition, features: FeatureConfig, style: ResolvedStyle, splits: StyleSplits,
    size: int, seed: int, *, runtime: RuntimeConfig,
) -> None:  # fmt: skip
    """Features of a style's training images, and of the held-out one that generation is shown."""
    y_PE, y_E, row = style_condition(condition, features, style, splits, size, seed, runtime)
    write_tensors(out / CONDITION_FILE, {"y_PE": y_PE, "y_E": y_E})
    write_json(out / "condition.json", {"generation_row": row})


@stage("encode_style_conditions")
def encode_style_conditions(out: Path, styles: tuple[str, ...], each: tuple[Artifact, ...]) -> None:
    """Several styles' conditions in files like those of `stages.encode_conditions`, which the generator's stages take."""
    tensors = [read_tensors(folder(artifact), CONDITION_FILE) for artifact in each]
    y_QPE, y_QE = (torch.stack([one[name] for one in tensors]) for name in ("y_PE", "y_E"))
    rows = [read_json(folder(artifact), "condition.json")["generation_row"] for artifact in each]
    write_tensors(out / "conditions.safetensors", {"y_QPE": y_QPE, "y_QE": y_QE})
    write_json(out / "prompts.json", {"tasks": list(styles), "generation_rows": rows})


@stage(
    "score_style_selection",
    returns=StyleSelectionArtifact,
    label=lambda config, vectors: f"{config.style} {vectors.kind}",
)
def score_style_selection(out: Path, config: StyleScoringConfig, vectors: VectorSet, *, runtime: RuntimeConfig) -> None:
    score_style(out, config, vectors, "selection", root(), runtime)


@stage("score_style_report", returns=StyleReportArtifact, label=lambda config, vectors: f"{config.style} {vectors.kind}")
def score_style_report(out: Path, config: StyleScoringConfig, vectors: VectorSet, *, runtime: RuntimeConfig) -> None:
    score_style(out, config, vectors, "report", root(), runtime)


@stage("interpolate_styles", label=lambda first, second: f"{first.style} to {second.style}")
def interpolate_styles(
    out: Path, first: StyleScoringConfig, second: StyleScoringConfig, candidates: tuple[Artifact, Artifact],
    generator: Generator, sampling: SamplingConfig, seed: int, *, runtime: RuntimeConfig,
) -> None:  # fmt: skip
    """Between the first candidates of two styles: of the weights, and of the condition at fixed noise."""
    w_1K, w_2K = (read_tensors(folder(source), CANDIDATE_FILE)["w_MK"][0] for source in candidates)
    names = read_json(folder(generator.conditions), "prompts.json")["tasks"]
    y_QE = read_tensors(folder(generator.conditions), "conditions.safetensors")["y_QE"]
    styles = (first.style, second.style)
    y_2E = torch.stack([y_QE[names.index(style)] for style in styles])
    parts = generator_parts(generator, runtime)
    vectors = {
        "weights": interpolated_weights(w_1K, w_2K),
        "condition": interpolated_conditions(*parts, styles, y_2E, sampling, seed),
    }
    score_interpolation(out, first, second, vectors, root(), runtime)


@stage("style_trajectory", label=lambda style: style)
def style_trajectory(
    out: Path, style: str, zoo: Zoo, generator: Generator, sampling: SamplingConfig, num: int, seed: int, *,
    runtime: RuntimeConfig,
) -> None:  # fmt: skip
    """Where `num` samples of a style are at each reverse step."""
    names = read_json(folder(generator.conditions), "prompts.json")["tasks"]
    y_E = read_tensors(folder(generator.conditions), "conditions.safetensors")["y_QE"][names.index(style)]
    parts = generator_parts(generator, runtime)
    write_tensors(
        out / TRAJECTORY_FILE,
        trajectory_plane(*parts, style, zoo.load(root())[style], y_E, sampling, num, seed),
    )


@stage("style_base_quality")
def style_base_quality(
    out: Path, base: StyleBase, photos: ResolvedStyle, splits: StyleSplits, size: int, real: Artifact,
    samples: StyleReportArtifact, guidance_scale: float,
) -> None:  # fmt: skip
    """The base against photographs held out of its training, with the floor, and samples beside their nearest."""
    write_base_quality(out, base, photos, splits, size, real, samples, guidance_scale, root())


@stage("style_report", 5, label=lambda config: config.name)
def style_report(out: Path, config: StyleExperimentConfig, inputs: StyleReportInputs) -> None:
    write_style_report(out, config, inputs, root())
