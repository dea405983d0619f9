"""The cached stages behind a style from one image: training through the base, and styles that were left out."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from cpdiff_core.artifacts import Artifact, ResumeState, read_json, read_tensors, write_tensors
from cpdiff_core.config import Config, RuntimeConfig
from cpdiff_core.domains.glue.stacks import Precision, device_of
from cpdiff_core.domains.style.base import StyleBase
from cpdiff_core.domains.style.denoising import DenoisingLoss
from cpdiff_core.domains.style.encoding import CONDITION_FILE, held_out_condition
from cpdiff_core.domains.style.features import FeatureConfig
from cpdiff_core.domains.style.styles import ResolvedStyle, StyleSplits
from cpdiff_core.domains.style.through_base import ThroughBaseObjective, stacked_statistics
from cpdiff_core.domains.style.through_base import fit_through_base as compute_through_base
from cpdiff_core.generator.autoencoder import ParameterAutoencoder
from cpdiff_core.generator.conditions import StyleImageCondition
from cpdiff_core.generator.diffusion import DiffusionConfig, SamplingConfig
from cpdiff_core.generator.training import captures
from cpdiff_core.lora.layout import LoraSpec
from cpdiff_core.lora.zoo import CANDIDATE_FILE
from cpdiff_core.reports.inputs import Generator
from cpdiff_core.unseen_styles import (
    UnseenInputs,
    join_unseen,
    shuffled_conditions,
    unseen_candidates,
    write_unseen,
)
from tasks.stage import GIVEN, folder, root, stage
from tasks.stages import generator_parts, load_normalizer


class TrainingImages(Config):
    """What the loss through the base is measured on: the base and the encoded images of the training styles."""

    base: StyleBase
    lora: LoraSpec
    precision: Precision
    styles: tuple[str, ...]
    encoded: tuple[Artifact, ...] = Field(description="Of each style, in the order of the conditions.")


@stage("fit_through_base", label=lambda images: f"{len(images.styles)} styles")
def fit_through_base(
    out: Path, objective: ThroughBaseObjective, config: DiffusionConfig, condition: StyleImageCondition,
    images: TrainingImages, normalizer: Artifact, autoencoder: Artifact, conditions: Artifact, seed: int, *,
    runtime: RuntimeConfig, resume: ResumeState = GIVEN,
) -> None:  # fmt: skip
    """Files as those of `fit_diffusion` and, since the decoder is trained too, of `fit_autoencoder`."""
    device = device_of(runtime)
    if tuple(read_json(folder(conditions), "prompts.json")["tasks"]) != images.styles:
        raise ValueError("the styles of the conditions and of the images must be the same, in the same order")
    data = DenoisingLoss(
        images.base, root(), images.lora, images.encoded, device, images.precision, captures(runtime, device)
    )
    model, decoder, losses = compute_through_base(
        objective, config, condition, ParameterAutoencoder.load(folder(autoencoder), device),
        stacked_statistics(load_normalizer(normalizer), images.styles), data,
        read_tensors(folder(conditions), "conditions.safetensors")["y_QPE"], seed=seed, device=device, runtime=runtime,
        resume=resume,
    )  # fmt: skip
    model.save(out)
    decoder.save(out)
    write_tensors(out / "losses.safetensors", {"losses": losses})


@stage("encode_style_image", label=lambda style: style.name)
def encode_style_image(
    out: Path, features: FeatureConfig, style: ResolvedStyle, splits: StyleSplits, size: int, seed: int, *,
    runtime: RuntimeConfig,
) -> None:  # fmt: skip
    """One held-out image of a style, and its features: all that a generator is shown of an unseen style."""
    y_1E, image_1CHW = held_out_condition(features, style, splits, size, seed, runtime)
    write_tensors(out / CONDITION_FILE, {"y_1E": y_1E, "image_1CHW": image_1CHW})


@stage("generate_unseen", label=lambda style, shuffled: f"{style}{' shuffled' if shuffled else ''}")
def generate_unseen(
    out: Path, config: SamplingConfig, generator: Generator, style: str, condition: Artifact, shuffled: bool, seed: int, *,
    runtime: RuntimeConfig,
) -> None:  # fmt: skip
    """w_MK for a style that the generator has not seen; with `shuffled`, from conditions of training styles."""
    parts = generator_parts(generator, runtime)
    y_ME = read_tensors(folder(condition), CONDITION_FILE)["y_1E"].expand(config.num_candidates, -1)
    if shuffled:
        y_QE = read_tensors(folder(generator.conditions), "conditions.safetensors")["y_QE"]
        y_ME = shuffled_conditions(y_QE, config.num_candidates, seed)
    write_tensors(out / CANDIDATE_FILE, {"w_MK": unseen_candidates(*parts, y_ME, config, seed)})


@stage("compare_unseen_style", label=lambda inputs: inputs.style.style.name)
def compare_unseen_style(out: Path, inputs: UnseenInputs) -> None:
    """Every arm of one left-out style: unseen.csv, unseen.json, unseen.txt and a contact sheet."""
    write_unseen(out, inputs, root())


@stage("compare_unseen_styles", 2)
def compare_unseen_styles(out: Path, styles: tuple[Artifact, ...]) -> None:
    """The comparisons of several left-out styles as one, in the same files."""
    join_unseen(out, [folder(style) for style in styles])
