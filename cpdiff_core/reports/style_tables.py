"""Table 2: arms in rows, styles apart; distance, KID, accepted share, counts and the floor in every row.

What the paper leaves open (number of images, M, choice) is read as: generated is the mean over M candidates; one
random draw and the selected candidate stand apart; *original* is the best checkpoint on the report's own images, an
oracle, beside the one that was chosen fairly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from pydantic import Field

from cpdiff_core.artifacts import Artifact, read_json, read_tensors
from cpdiff_core.config import Config
from cpdiff_core.domains.style.base import StyleBase
from cpdiff_core.domains.style.distances import (
    ResampledDistance,
    StyleClassifier,
    kernel_distance,
    resampled_distance,
)
from cpdiff_core.domains.style.encoding import FEATURE_FILE
from cpdiff_core.domains.style.styles import ResolvedStyle, StyleSplits
from cpdiff_core.evaluation.style_scores import (
    SAMPLE_FILE,
    StyleReportArtifact,
    StyleSelectionArtifact,
    style_oracle,
)

NO_LORA, ORACLE, SELECTED, SOUP = "no-LoRA", "original (oracle)", "original (selected)", "model soup"
GENERATED, RANDOM, CHOSEN = "generated (mean of M)", "generated (random)", "generated (selected)"
FLOOR = "floor: real against real"
ARMS = (NO_LORA, ORACLE, SELECTED, SOUP, GENERATED, RANDOM, CHOSEN)


class StyleArms(Config):
    """One style of one experiment: every arm's images scored, and the rows chosen on the selection split."""

    style: str
    real: Artifact
    candidates: Artifact
    chosen_original: int
    chosen_candidate: int
    no_lora: StyleReportArtifact
    original: StyleReportArtifact
    soup: StyleReportArtifact
    generated: StyleReportArtifact
    selection: tuple[StyleSelectionArtifact, ...] = Field((), description="What chose: of original, of generated.")


class StyleReportInputs(Config):
    """What a style report is made from."""

    base: StyleBase
    image_size: int
    photos: ResolvedStyle
    styles: tuple[ResolvedStyle, ...]
    splits: StyleSplits
    photo_real: Artifact
    photo_samples: StyleReportArtifact
    classifier: Artifact
    interpolation: Artifact | None = Field(description="Between the first and the last style; None if there is one alone.")
    trajectories: dict[str, Artifact]
    harvests: tuple[Artifact, ...]
    autoencoder: Artifact
    diffusion: Artifact
    arms: tuple[StyleArms, ...]
    unseen: Artifact | None = Field(None, description="The comparison on styles left out of training, if there is one.")


@dataclass(frozen=True)
class StyleCell:
    """One arm of one style. kid and accepted (in percent) are means over its vectors."""

    distance: ResampledDistance
    kid: float
    accepted: float
    num_images: int
    num_real: int


StyleResults = dict[str, dict[str, StyleCell]]
"""style -> arm -> cell; arms, then the floor."""


def floor_cell(real: dict[str, torch.Tensor], num: int, classifier: StyleClassifier, style: str) -> StyleCell:
    """Real training images against the report's real images, as many as an arm has images if there are so many."""
    rows = np.random.default_rng(0).permutation(len(real["train"]))[:num]
    return style_cell(real["train"][torch.from_numpy(rows)][None], real["report"], classifier, style)


def style_cell(x_VND: torch.Tensor, real: torch.Tensor, classifier: StyleClassifier, style: str) -> StyleCell:
    """One arm: features of the images of its V vectors against those of the report's real images."""
    return StyleCell(
        distance=ResampledDistance.mean([resampled_distance(x_ND, real, style) for x_ND in x_VND]),
        kid=float(np.mean([kernel_distance(x_ND, real) for x_ND in x_VND])),
        accepted=100 * float(np.mean([classifier.accepts(x_ND, style).mean() for x_ND in x_VND])),
        num_images=x_VND.shape[1], num_real=len(real),
    )  # fmt: skip


def collect_styles(arms: Sequence[StyleArms], classifier: StyleClassifier, root: Path) -> StyleResults:
    """Every cell of the table."""
    results: StyleResults = {}
    for entry in arms:
        real = read_tensors(entry.real.under(root), FEATURE_FILE)
        rows: dict[str, tuple[StyleReportArtifact, list[int] | None]] = {
            NO_LORA: (entry.no_lora, [0]),
            ORACLE: (entry.original, [style_oracle(entry.original, root)]),
            SELECTED: (entry.original, [entry.chosen_original]),
            SOUP: (entry.soup, [0]),
            GENERATED: (entry.generated, None),
            RANDOM: (entry.generated, [0]),
            CHOSEN: (entry.generated, [entry.chosen_candidate]),
        }
        cells = {}
        for arm, (artifact, chosen) in rows.items():
            x_VND = read_tensors(artifact.under(root), SAMPLE_FILE)["features_VND"]
            cells[arm] = style_cell(x_VND if chosen is None else x_VND[chosen], real["report"], classifier, entry.style)
        cells[FLOOR] = floor_cell(real, cells[NO_LORA].num_images, classifier, entry.style)
        results[entry.style] = cells
    return results


def styles_frame(results: StyleResults, distance_name: str) -> pd.DataFrame:
    """The table in long form; `difference` is no-LoRA minus the arm, paired on prompts and noise: above 0 is better."""
    rows = []
    for style, cells in results.items():
        for arm, cell in cells.items():
            spread, paired = cell.distance.spread, arm in ARMS[1:]
            gain = (cells[NO_LORA].distance - cell.distance).spread if paired else None
            rows.append(
                {
                    "style": style, "arm": arm, "metric": distance_name, "estimate": spread.estimate, "std": spread.std,
                    "floor": cells[FLOOR].distance.estimate, "difference": gain.estimate if gain else None,
                    "difference_low": gain.low if gain else None, "difference_high": gain.high if gain else None,
                    "kid": cell.kid, "accepted_percent": cell.accepted, "images": cell.num_images,
                    "real": cell.num_real,
                }
            )  # fmt: skip
    return pd.DataFrame(rows)


def styles_text(frame: pd.DataFrame) -> str:
    """The table for a terminal."""
    head = [
        "style",
        "arm",
        str(frame["metric"][0]),
        "floor",
        "no-LoRA minus arm [95 %]",
        "KID",
        "accepted",
        "images/real",
    ]
    lines = [head]
    for row in frame.to_dict("records"):
        gain = ""
        if pd.notna(row["difference"]):
            gain = f"{row['difference']:.0f} [{row['difference_low']:.0f}, {row['difference_high']:.0f}]"
        lines.append([
            row["style"], row["arm"], f"{row['estimate']:.1f} ± {row['std']:.1f}", f"{row['floor']:.1f}", gain,
            f"{row['kid']:.3f}", f"{row['accepted_percent']:.0f} %", f"{row['images']}/{row['real']}",
        ])  # fmt: skip
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([text[0], "-" * len(text[0]), *text[1:]])


def base_quality(inputs: StyleReportInputs, classifier: StyleClassifier, root: Path) -> tuple[StyleCell, StyleCell]:
    """(the base against photographs held out of its training, the floor of that), at the same n."""
    real = read_tensors(inputs.photo_real.under(root), FEATURE_FILE)
    x_VND = read_tensors(inputs.photo_samples.under(root), SAMPLE_FILE)["features_VND"]
    style = inputs.photos.name
    return style_cell(x_VND, real["report"], classifier, style), floor_cell(real, x_VND.shape[1], classifier, style)


def load_classifier(artifact: Artifact, root: Path) -> StyleClassifier:
    return StyleClassifier.model_validate(read_json(artifact.under(root), "classifier.json"))
