"""A style from one image: what generated adapters are worth for a style that no part of the generator has seen.

Each left-out style is compared on its own real images with no adapter, the adapter of the training style whose images
look most alike, the generator under other styles' conditions (if that is as good, the condition does nothing), and an
adapter really fine-tuned on the style. Nothing is chosen: with one image there is nothing to choose on.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from pydantic import Field

from cpdiff_core.artifacts import Artifact, checked, read_json, read_table, read_tensors, write_json
from cpdiff_core.bundle import pooled
from cpdiff_core.config import Config
from cpdiff_core.domains.style.encoding import CONDITION_FILE, FEATURE_FILE
from cpdiff_core.domains.style.images import contact_sheet
from cpdiff_core.domains.style.styles import ResolvedStyle, StyleSplits, split_images
from cpdiff_core.evaluation.style_scores import SAMPLE_FILE, StyleReportArtifact
from cpdiff_core.generator.autoencoder import ParameterAutoencoder
from cpdiff_core.generator.diffusion import LatentDiffusion, SamplingConfig
from cpdiff_core.generator.normalization import Normalizer
from cpdiff_core.reports.html import counted
from cpdiff_core.reports.style_tables import FLOOR, NO_LORA, StyleCell, floor_cell, load_classifier, style_cell

UNSEEN_TABLE, UNSEEN_FACTS, UNSEEN_TEXT = "unseen.csv", "unseen.json", "unseen.txt"
NEAREST, FINE_TUNED = "nearest training style's LoRA", "really fine-tuned"
GAINS = {
    "no_lora": ("no-LoRA", "over no-LoRA"),
    "nearest": ("the nearest LoRA", "over nearest"),
    "shuffled": ("a shuffled condition", "over shuffled"),
}
"""What each arm's distance is subtracted from, by the name of its columns, gain_over_X: in a sentence and above a column."""
_COLUMNS = 10


class UnseenGenerated(Config):
    """What one generator makes of the image, and of other styles' images."""

    objective: str
    generated: StyleReportArtifact
    shuffled: StyleReportArtifact


class UnseenStyle(Config):
    """A style that was left out, with every arm's images scored."""

    style: ResolvedStyle
    real: Artifact
    condition: Artifact = Field(description="Features of the one image that the generators were shown.")
    nearest: str
    similarity: float = Field(description="Cosine of the image's features to the nearest style's mean, both centred.")
    no_lora: StyleReportArtifact
    nearest_lora: StyleReportArtifact
    fine_tuned: StyleReportArtifact
    generators: tuple[UnseenGenerated, ...]


class UnseenInputs(Config):
    """What the comparison on one style is made from."""

    style: UnseenStyle
    classifier: Artifact
    splits: StyleSplits
    image_size: int
    distance_name: str
    num_training_styles: int


def nearest_style(y_E: torch.Tensor, y_QPE: torch.Tensor) -> tuple[int, float]:
    """(the training style whose mean condition points most nearly as y_E does, centred on all styles; the cosine).

    A style alone is its own centre, from which it points nowhere: it keeps its direction.
    """
    mean_QE = y_QPE.double().mean(1)
    centre_E = mean_QE.mean(0) if len(mean_QE) > 1 else torch.zeros_like(mean_QE[0])
    cosine_Q = torch.cosine_similarity((y_E.double() - centre_E)[None], mean_QE - centre_E)
    return int(cosine_Q.argmax()), float(cosine_Q.max())


def shuffled_conditions(y_QE: torch.Tensor, num: int, seed: int) -> torch.Tensor:
    """`num` conditions of training styles in a drawn order, each style once before any comes twice, y_ME."""
    rng = np.random.default_rng([seed, 0x736875])
    rounds = [rng.permutation(len(y_QE)) for _ in range(-(-num // len(y_QE)))]
    return y_QE[torch.from_numpy(np.concatenate(rounds)[:num])]


@torch.no_grad()
def unseen_candidates(
    diffusion: LatentDiffusion, autoencoder: ParameterAutoencoder, normalizer: Normalizer, y_ME: torch.Tensor,
    sampling: SamplingConfig, seed: int,
) -> torch.Tensor:  # fmt: skip
    """Candidate m from condition y_ME[m] and noise m, with pooled statistics, w_MK: equal noise for equal m."""
    latents = [diffusion.sample(y_ME[m : m + 1], m + 1, seed, sampling)[0, m] for m in range(len(y_ME))]
    return pooled(normalizer).invert("", autoencoder.decode(torch.stack(latents)).cpu())


def write_unseen(out: Path, inputs: UnseenInputs, root: Path) -> None:
    """Write one style's table as CSV, facts as JSON, a summary as text, and its contact sheet into `out`."""
    classifier, entry = load_classifier(inputs.classifier, root), inputs.style
    name, real = entry.style.name, read_tensors(entry.real.under(root), FEATURE_FILE)
    cells = {
        arm: style_cell(read_tensors(scored.under(root), SAMPLE_FILE)["features_VND"], real["report"], classifier, name)
        for arm, scored in _arms(entry).items()
    }
    floor = floor_cell(real, cells[NO_LORA].num_images, classifier, name)
    rows = [_row(name, arm, cell, cells, floor) for arm, cell in cells.items()]
    frame = pd.DataFrame([*rows, _row(name, FLOOR, floor, {}, floor)])
    frame.insert(2, "metric", inputs.distance_name)
    sheet = f"sheet_{name}.png"
    facts = {
        "style": name, "nearest": entry.nearest, "similarity": entry.similarity, "sheet": sheet,
        "labels": _write_sheet(out / sheet, entry, inputs, root), "num_training_styles": inputs.num_training_styles,
        "objectives": [generator.objective for generator in entry.generators],
    }  # fmt: skip
    _write(out, frame, [facts])


def join_unseen(out: Path, comparisons: Sequence[Path]) -> None:
    """Several styles' tables, facts and sheets as one, with what they say together."""
    frames = [read_table(folder, UNSEEN_TABLE) for folder in comparisons]
    facts = [found for folder in comparisons for found in read_json(folder, UNSEEN_FACTS)["styles"]]
    for folder, found in zip(comparisons, facts, strict=True):
        shutil.copyfile(checked(folder, found["sheet"]), out / found["sheet"])
    _write(out, pd.concat(frames, ignore_index=True), facts)


def _write(out: Path, frame: pd.DataFrame, facts: list[dict[str, Any]]) -> None:
    frame.to_csv(out / UNSEEN_TABLE, index=False)
    verdicts = _verdicts(frame)
    write_json(out / UNSEEN_FACTS, {"metric": frame["metric"][0], "styles": facts, "verdicts": verdicts})
    (out / UNSEEN_TEXT).write_text("\n".join([*_text(frame, facts), "", *verdicts]) + "\n", encoding="utf-8")


def _arms(entry: UnseenStyle) -> dict[str, StyleReportArtifact]:
    made = {}
    for generator in entry.generators:
        made[f"generated, {generator.objective}"] = generator.generated
        made[f"shuffled condition, {generator.objective}"] = generator.shuffled
    return {NO_LORA: entry.no_lora, NEAREST: entry.nearest_lora, **made, FINE_TUNED: entry.fine_tuned}


def _row(style: str, arm: str, cell: StyleCell, cells: dict[str, StyleCell], floor: StyleCell) -> dict[str, Any]:
    """One line of the table. gain_over_X: X's distance minus this arm's, paired; above 0 is better."""
    spread = cell.distance.spread
    row: dict[str, Any] = {
        "style": style, "arm": arm, "estimate": spread.estimate, "std": spread.std, "floor": floor.distance.estimate,
        "kid": cell.kid, "accepted_percent": cell.accepted, "images": cell.num_images, "real": cell.num_real,
    }  # fmt: skip
    others = {"no_lora": NO_LORA, "nearest": NEAREST, "shuffled": f"shuffled condition, {arm.partition(', ')[2]}"}
    for key, other in others.items():
        gain = (cells[other].distance - cell.distance).spread if other in cells and other != arm else None
        row |= {f"gain_over_{key}": gain.estimate if gain else None, f"gain_over_{key}_low": gain.low if gain else None,
                f"gain_over_{key}_high": gain.high if gain else None}  # fmt: skip
    return row


def _verdicts(frame: pd.DataFrame) -> list[str]:
    """For each objective, on how many styles it surely beats and surely loses to each of the others."""
    lines = []
    for arm in dict.fromkeys(frame["arm"][frame["arm"].str.startswith("generated, ")]):
        own = frame[frame["arm"] == arm]
        parts = []
        for key, (shown, _) in GAINS.items():
            better = int((own[f"gain_over_{key}_low"] > 0).sum())
            worse = int((own[f"gain_over_{key}_high"] < 0).sum())
            parts.append(f"{shown}: better on {better}, worse on {worse}")
        lines.append(
            f"{arm}, on {counted(len(own), 'unseen style')}, counting 95 % intervals that exclude 0: {'; '.join(parts)}."
        )
    return lines


def _text(frame: pd.DataFrame, facts: list[dict[str, Any]]) -> list[str]:
    gained = [title for _, title in GAINS.values()]
    lines = [["style", "arm", frame["metric"][0], f"gain {gained[0]}", *gained[1:], "KID", "accepted", "n"]]
    for row in frame.to_dict("records"):
        gains = [
            "" if pd.isna(row[f"gain_over_{key}"])
            else f"{row[f'gain_over_{key}']:.0f} [{row[f'gain_over_{key}_low']:.0f}, {row[f'gain_over_{key}_high']:.0f}]"
            for key in GAINS
        ]  # fmt: skip
        lines.append([
            row["style"], row["arm"], f"{row['estimate']:.1f} ± {row['std']:.1f}", *gains, f"{row['kid']:.3f}",
            f"{row['accepted_percent']:.0f} %", f"{row['images']}/{row['real']}",
        ])  # fmt: skip
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return [
        f"A style from one image: each style below was left out of a generator trained on the other "
        f"{facts[0]['num_training_styles']}. Lower is better.",
        *text, "", nearest_line(facts),
    ]  # fmt: skip


def nearest_line(facts: list[dict[str, Any]]) -> str:
    """Which training style each left-out one's image was nearest to."""
    nearest = "; ".join(f"{found['style']}: {found['nearest']} (cosine {found['similarity']:.2f})" for found in facts)
    return f"Nearest training styles: {nearest}."


def _write_sheet(path: Path, entry: UnseenStyle, inputs: UnseenInputs, root: Path) -> list[str]:
    """One row per arm, the same prompts and noise down each column; the style image first, real images last."""
    image_1CHW = read_tensors(entry.condition.under(root), CONDITION_FILE)["image_1CHW"]
    side = inputs.image_size
    image_1CHW = torch.nn.functional.interpolate(image_1CHW.float(), (side, side)).round().to(torch.uint8)
    real = split_images(entry.style, inputs.splits, "report", side).images_NCHW[:_COLUMNS]
    arms = _arms(entry)
    samples = [read_tensors(scored.under(root), SAMPLE_FILE)["images_VNCHW"][0, :_COLUMNS] for scored in arms.values()]
    path.write_bytes(contact_sheet([image_1CHW, *samples, real], scale=max(1, 64 // side)))
    return ["the style image", *arms, "real, of the report"]
