"""Scores of LoRA vectors of a style: images of every vector, and their distance to the style's real images.

As for text, one function scores every column and the split decides the type of the result, so that what chooses can
never see what is reported. The splits also draw from different noise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from pydantic import Field

from cpdiff_core.artifacts import Artifact, read_json, read_tensors, write_json, write_tensors
from cpdiff_core.config import Config, RuntimeConfig, UserError
from cpdiff_core.domains.glue.stacks import Precision, compiles_layers, device_of
from cpdiff_core.domains.style.base import ImageCodec, StyleBase, spec_of
from cpdiff_core.domains.style.denoising import ENCODED_FILE
from cpdiff_core.domains.style.distances import frechet_distance, kernel_distance
from cpdiff_core.domains.style.encoding import CLASS_FILE, FEATURE_FILE, prompt_captions
from cpdiff_core.domains.style.features import FeatureConfig, image_features
from cpdiff_core.domains.style.sampling import ImageSamplingConfig, sample_images
from cpdiff_core.domains.style.stack import build_stack
from cpdiff_core.domains.style.styles import SplitName
from cpdiff_core.evaluation.selection import SelectionScores
from cpdiff_core.lora.layout import LoraSpec
from cpdiff_core.lora.zoo import VectorSet

SAMPLE_FILE = "samples.safetensors"
SCORE_FILE = "scores.json"
SHOWN_IMAGES = 16
"""Images kept of every vector, for contact sheets."""
_GROUP = 32
"""Vectors whose images are in memory at once."""


class StyleSelectionArtifact(Artifact):
    """Distances to the images for choosing."""

    stage: Literal["score_style_selection"] = "score_style_selection"


class StyleReportArtifact(Artifact):
    """Distances to the images that tables measure against."""

    stage: Literal["score_style_report"] = "score_style_report"


class StyleScoringConfig(Config):
    """How vectors of one style are scored."""

    base: StyleBase
    style: str
    encoded: Artifact = Field(description="For the captions and their mix.")
    real: Artifact = Field(description="Features of the style's real images.")
    lora: LoraSpec
    images: ImageSamplingConfig
    features: FeatureConfig
    precision: Precision


def score_style(
    out: Path, config: StyleScoringConfig, vectors: VectorSet, split: Literal["selection", "report"], root: Path,
    runtime: RuntimeConfig,
) -> None:  # fmt: skip
    """Write features and first images of every vector of `vectors`, and both distances of each, into `out`."""
    device = device_of(runtime)
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    stack = build_stack(config.base, root, config.lora, device, dtype, compiles_layers(runtime, device))
    spec, codec = spec_of(config.base, root), ImageCodec(config.base, root, device)
    encoded = read_tensors(config.encoded.under(root), ENCODED_FILE)
    prompts, captions = prompt_captions(encoded, read_json(config.encoded.under(root), CLASS_FILE), config.images.num_images)
    w_VK = vectors.load(root, stack.layout.num_parameters)
    seed = 2 * config.images.seed + (split == "report")
    label = f"{config.style} {vectors.kind} on {split}"
    features, shown = [], []
    for first, part_VK in zip(range(0, len(w_VK), _GROUP), w_VK.split(_GROUP), strict=True):
        x_VNCHW = sample_images(stack, spec, part_VK, captions, config.images, seed, device, f"sample {label}", runtime)
        bad = torch.nonzero(~x_VNCHW.flatten(1).isfinite().all(1)).flatten().tolist()
        if bad:  # as bytes they would be black pictures, which have a distance like any others
            raise UserError(
                f"style {config.style!r}: the images of {vectors.kind}, row {first + bad[0]}, are not finite; "
                "lower the learning rate, the temperature or the guidance that made them"
            )
        images = codec.decode(x_VNCHW.flatten(0, 1))
        shown.append(images.unflatten(0, x_VNCHW.shape[:2])[:, :SHOWN_IMAGES])
        found = image_features(config.features, images, device, f"features {label}", runtime)
        features.append(found.unflatten(0, x_VNCHW.shape[:2]))
    x_VND, real = torch.cat(features), read_tensors(config.real.under(root), FEATURE_FILE)[split]
    write_tensors(out / SAMPLE_FILE, {"features_VND": x_VND, "images_VNCHW": torch.cat(shown)})
    write_json(
        out / SCORE_FILE,
        {
            "style": config.style, "split": split, "prompts": prompts,
            "num_images": len(prompts), "num_real": len(real),
            "frechet": [frechet_distance(x_ND, real) for x_ND in x_VND],
            "kid": [kernel_distance(x_ND, real) for x_ND in x_VND],
        },
    )  # fmt: skip


def check_real(real: Mapping[str, torch.Tensor], splits: Sequence[SplitName], style: str) -> None:
    """Raises UserError for a style that has too few real images in one of these splits for a distance to them."""
    for split in splits:
        if len(real[split]) < 2:
            raise UserError(
                f"style {style!r}: {len(real[split])} of its images is in the split {split!r}, and a distance takes at least "
                "two; give more images or change splits"
            )


def load_style_selection(
    artifact: StyleSelectionArtifact, root: Path, style: str, by: Literal["kid", "frechet"]
) -> SelectionScores:
    """What `select` takes: negative distances. Raises TypeError for distances to the images of the report."""
    if not isinstance(artifact, StyleSelectionArtifact):
        raise TypeError(f"choosing takes scores on the selection split, not {type(artifact).__name__}")
    values = read_json(artifact.under(root), SCORE_FILE)[by]
    return SelectionScores(
        task=style, metric="negative KID" if by == "kid" else "negative Fréchet distance", split="held_out",
        vectors=f"{artifact.stage}/{artifact.fingerprint}", scores=tuple(None if v is None else -v for v in values),
    )  # fmt: skip


def style_oracle(artifact: StyleReportArtifact, root: Path) -> int:
    """The vector nearest to the images of the report themselves: the paper's *original*; nobody can choose by it."""
    if not isinstance(artifact, StyleReportArtifact):
        raise TypeError(f"the oracle takes scores on the report split, not {type(artifact).__name__}")
    values = read_json(artifact.under(root), SCORE_FILE)["frechet"]
    return int(np.argmin([np.inf if value is None else value for value in values]))
