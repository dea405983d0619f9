"""The one HTML page of a style experiment: Table 2, contact sheets of every arm, the base beside its photographs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cpdiff_core.artifacts import Artifact, checked, read_json, read_table, read_tensors, write_json
from cpdiff_core.domains.style.base import EmbeddedBase, StyleBase, embedded_quality
from cpdiff_core.domains.style.distances import kernel_distance, resampled_distance
from cpdiff_core.domains.style.encoding import FEATURE_FILE
from cpdiff_core.domains.style.images import contact_sheet
from cpdiff_core.domains.style.styles import ResolvedStyle, StyleSplits, split_images
from cpdiff_core.evaluation.audit import novelty_unit
from cpdiff_core.evaluation.style_scores import SAMPLE_FILE, StyleReportArtifact, style_oracle
from cpdiff_core.evaluation.style_study import INTERPOLATION_FILE, TRAJECTORY_FILE
from cpdiff_core.reports.cost import CostReport, cost_report
from cpdiff_core.reports.explorer import Reading, explorer
from cpdiff_core.reports.html import Pictures, counted, render
from cpdiff_core.reports.inputs import artifacts_in
from cpdiff_core.reports.style_figures import SHEET_COLUMNS, SHEET_GAP, draw_style_figures
from cpdiff_core.reports.style_tables import (
    CHOSEN,
    GENERATED,
    NO_LORA,
    ORACLE,
    SELECTED,
    SOUP,
    StyleArms,
    StyleCell,
    StyleReportInputs,
    StyleResults,
    base_quality,
    collect_styles,
    load_classifier,
    styles_frame,
    styles_text,
)
from cpdiff_core.reports.style_vectors import collect_style_vectors, scored_vectors
from cpdiff_core.reports.vector_figures import draw_vectors
from cpdiff_core.reports.vectors import candidates_frame
from cpdiff_core.style_experiments import StyleExperimentConfig
from cpdiff_core.unseen_styles import GAINS, UNSEEN_FACTS, UNSEEN_TABLE, UNSEEN_TEXT, nearest_line


def write_style_report(out: Path, config: StyleExperimentConfig, inputs: StyleReportInputs, root: Path) -> None:
    """Write report.html, results.csv, candidates.csv, summary.txt, the sheets and the figures into `out`."""
    classifier = load_classifier(inputs.classifier, root)
    results = collect_styles(inputs.arms, classifier, root)
    frame = styles_frame(results, config.features.distance_name)
    frame.to_csv(out / "results.csv", index=False)
    notes = style_notes(config, inputs, base_quality(inputs, classifier, root))
    summary = [styles_text(frame), "", style_headline(results), "", *(f"- {note}" for note in notes)]
    if inputs.unseen is not None:
        summary += ["", checked(inputs.unseen.under(root), UNSEEN_TEXT).read_text(encoding="utf-8").rstrip()]
    (out / "summary.txt").write_text("\n".join(summary) + "\n", encoding="utf-8")
    vectors = collect_style_vectors(inputs.arms, config.features.distance_name, config.select_by, config.seed, root)
    candidates_frame(vectors).to_csv(out / "candidates.csv", index=False, float_format="%.6g")
    draw_style_figures(out, inputs.interpolation, inputs.trajectories, config.features.distance_name, root)
    pictures = Pictures(out)
    explored = explorer(vectors, style_reading(config))
    fallback = {} if explored is None else {name: pictures.source(f"{name}.png") for name in draw_vectors(out, explored)}
    sheets, unseen_sheets = (
        [Sheet(sheet.title, pictures.photos(sheet.source), sheet.labels) for sheet in written]
        for written in (write_sheets(out, inputs, root), write_unseen_sheets(out, inputs, root))
    )
    between, trajectories = interpolation_data(inputs, root), trajectory_planes(inputs, root)
    drawn = ("interpolation", "trajectory") if between else ("trajectory",)
    page = render(
        "style.html.j2", {"explore": explored and explored.data(), "interpolation": between, "trajectory": trajectories},
        config=config, headline=style_headline(results), notes=notes, unseen=left_out_table(inputs, root),
        unseen_sheets=unseen_sheets,
        styles=list(results),
        rows=frame.to_dict("records"),
        spans=style_spans(frame.to_dict("records"), ["difference"]), sheets=sheets, explorer=explored,
        fallback={"vectors": "", "map": ""} | fallback, between=between, trajectory=trajectories,
        between_sheets={
            kind: pictures.photos(f"interpolation_{kind}.png") for kind in (between["distance"] if between else ())
        },
        figures={name: pictures.source(f"{name}.png") for name in drawn},
        metric=config.features.distance_name, cost=style_cost(inputs, root),
        configuration=json.dumps(config.model_dump(mode="json"), indent=1),
    )  # fmt: skip
    (out / "report.html").write_text(page, encoding="utf-8")


@dataclass(frozen=True)
class Sheet:
    """Rows of images. source: the file, or what the page writes as its source."""

    title: str
    source: str
    labels: Sequence[str]


def write_sheets(out: Path, inputs: StyleReportInputs, root: Path) -> list[Sheet]:
    """Contact sheets, as PNG in `out`: of every style its arms and its candidates, and of the base itself.

    A style may be called `base` or `ink_candidates`: its name stands last in that of a file, after what tells the kind.
    """
    sheets = []
    for entry, style in zip(inputs.arms, inputs.styles, strict=True):
        rows, labels = style_sheet(entry, root)
        real = split_images(style, inputs.splits, "report", inputs.image_size).images_NCHW[:SHEET_COLUMNS]
        name = _sheet(out, f"sheet_{entry.style}", [*rows, real])
        sheets.append(Sheet(entry.style, name, [*labels, "real, of the report"]))
        candidates = read_tensors(entry.generated.under(root), SAMPLE_FILE)["images_VNCHW"][:, :SHEET_COLUMNS]
        name = _sheet(out, f"candidates_{entry.style}", list(candidates))
        sheets.append(Sheet(f"{entry.style}, every candidate", name, [f"candidate {row}" for row in range(len(candidates))]))
    base = base_sheet(inputs.photos, inputs.splits, inputs.image_size, inputs.photo_real, inputs.photo_samples, root)
    sheets.append(Sheet("the base itself", _sheet(out, "base_sheet", list(base)), ["sample", "nearest training photograph"]))
    return sheets


def write_unseen_sheets(out: Path, inputs: StyleReportInputs, root: Path) -> list[Sheet]:
    """Contact sheets of the styles that were left out of training, as PNG in `out`; none if none was."""
    if inputs.unseen is None:
        return []
    sheets, folder = [], inputs.unseen.under(root)
    for found in read_json(folder, UNSEEN_FACTS)["styles"]:
        name = f"left_out_{found['style']}.png"
        (out / name).write_bytes(checked(folder, found["sheet"]).read_bytes())
        sheets.append(Sheet(f"{found['style']}, left out", name, found["labels"]))
    return sheets


def style_reading(config: StyleExperimentConfig) -> Reading:
    """How the page calls the scores and distances of single vectors."""
    chosen = {"kid": "KID", "frechet": "Fr\u00e9chet distance"}[config.select_by]
    name = config.features.distance_name
    single = config.num_checkpoints * config.num_runs == 1
    unit = novelty_unit(single)
    return Reading(
        splits={"report": "images of the report", "selection": "images to choose by"},
        columns={"report": "distance of images", "selection": f"{chosen} that chooses"},
        decimals={"report": 1, "selection": 3},
        ylabels={
            "report": f"{name}, images of the report; lower is better",
            "selection": f"{chosen}, images to choose by; lower is better",
        },
        xlabel=f"distance to the nearest training vector, raw factors (1: {unit})",
        distance_name="of weights to the nearest, raw factors", good="low",
        note=f"Lower scores are better here. Novelty is the distance of the weights over {unit}; at 1 or below a candidate "
        "counts as a copy. Images have no labels to disagree on.",
    )  # fmt: skip


def interpolation_data(inputs: StyleReportInputs, root: Path) -> dict[str, Any] | None:
    """What the slider between the first and the last style shows; None if there is one style alone."""
    if inputs.interpolation is None:
        return None
    found = read_json(inputs.interpolation.under(root), INTERPOLATION_FILE)
    return {
        "lambdas": found["lambdas"], "distance": found["distance"], "gap": SHEET_GAP,
        "styles": [inputs.arms[0].style, inputs.arms[-1].style],  # the file has them in the order of the alphabet
    }  # fmt: skip


def trajectory_planes(inputs: StyleReportInputs, root: Path) -> dict[str, Any]:
    """style -> where the followed samples are at every step, and how far from the originals."""
    planes = {}
    for style, artifact in inputs.trajectories.items():
        found = read_tensors(artifact.under(root), TRAJECTORY_FILE)
        distance = {f"noise {i}": [float(f"{d:.6g}") for d in row] for i, row in enumerate(found["distance"].tolist())}
        planes[style] = {"steps": found["t"].tolist(), "reference": None, "lines": distance}
        for name in ("paths", "originals", "soup"):
            planes[style][name] = found[name].double().mul(1000).round().div(1000).tolist()
    return planes


def style_spans(rows: list[dict[Any, Any]], differences: Sequence[str]) -> dict[str, tuple[float, float]]:
    """style -> (least, largest) bound of these differences, 0 among them: the scale of its bars."""
    spans: dict[str, tuple[float, float]] = {}
    for row in rows:
        low, high = spans.get(row["style"], (0.0, 0.0))
        for name in differences:
            if row[name] is not None and row[name] == row[name]:
                low, high = min(low, row[f"{name}_low"]), max(high, row[f"{name}_high"])
        spans[row["style"]] = (low, high)
    return spans


def left_out_table(inputs: StyleReportInputs, root: Path) -> dict[str, Any] | None:
    """The comparison on left-out styles as the page shows it; None if none was left out."""
    if inputs.unseen is None:
        return None
    folder = inputs.unseen.under(root)
    rows, facts = read_table(folder, UNSEEN_TABLE).to_dict("records"), read_json(folder, UNSEEN_FACTS)
    return {
        "rows": rows, "gains": {key: title for key, (_, title) in GAINS.items()},
        "spans": style_spans(rows, [f"gain_over_{key}" for key in GAINS]),
        "num_training_styles": facts["styles"][0]["num_training_styles"],
        "lines": [*facts["verdicts"], nearest_line(facts["styles"])],
    }  # fmt: skip


def style_cost(inputs: StyleReportInputs, root: Path) -> CostReport:
    """Against fine-tuning one adapter for each style; the base's own pretraining is part of both."""
    runs = [scored_vectors(entry.original, root).sources[0] for entry in inputs.arms]
    generated = [artifact for entry in inputs.arms for artifact in (entry.candidates, *entry.selection[1:])]
    return cost_report(
        artifacts_in(inputs), runs, generated,
        ("simply fine-tuning: one adapter for each style", "generating: a chosen candidate for each style"), root,
    )  # fmt: skip


def style_headline(results: StyleResults) -> str:
    """The claim that matters first: on how many styles is generating better than the base alone, surely?"""
    gains = {style: (cells[NO_LORA].distance - cells[GENERATED].distance).spread for style, cells in results.items()}
    sure = [style for style, gain in gains.items() if gain.low > 0]
    shown = "; ".join(f"{style} {gain.estimate:.0f} [{gain.low:.0f}, {gain.high:.0f}]" for style, gain in gains.items())
    return (
        f"generated (mean of M) is nearer to the style than no-LoRA on {len(sure)} of {len(results)} styles, the 95 % "
        f"interval of the paired difference above 0: {shown}."
    )


def style_notes(config: StyleExperimentConfig, inputs: StyleReportInputs, quality: tuple[StyleCell, StyleCell]) -> list[str]:
    """What one must know to read the table."""
    base, floor = quality
    chosen = {"kid": "KID", "frechet": "Fréchet distance"}[config.select_by]
    ratio = base.distance.estimate / floor.distance.estimate
    made = ""
    if isinstance(config.base, EmbeddedBase):
        then = embedded_quality()
        made = f" (when it was made, at n = {then['num_images']}: {then['ratio']:.2f})"
    return [
        f"Lower is better. {config.features.distance_name}; ± is the standard deviation of its bootstrap. Values "
        "depend on the number of images: compare rows of one style only, and with their floor, real training images.",
        f"Chosen by {chosen} to images held out for choosing, on other noise than reported: original (selected) and "
        "generated (selected). original (oracle) is nearest to the report's images themselves: nobody can choose it.",
        "accepted: share of images that a linear probe on features, fitted on training images of the scored and the "
        "left-out styles and of photographs, takes for the style.",
        f"The base against photographs held out of its training: {base.distance.spread} at n = {base.num_images}, "
        f"floor {floor.distance.estimate:.1f} at n = {floor.num_images}, ratio {ratio:.2f}{made}. Far above 1, a style's "
        "no-LoRA row measures the base's failure too.",
        f"{counted(len(inputs.arms), 'style')} of the {len(config.styles)} trained on, LoRA rank {config.lora.rank}, "
        f"{counted(config.num_runs, 'run')}, N = {config.num_checkpoints}, M = {config.sampling.num_candidates}, "
        f"{config.images.num_images} images per vector, seed {config.seed}. One seed says nothing about the spread over seeds.",
        *(f"This preset's economy: {text}." for text in config.economies),
    ]


def style_sheet(entry: StyleArms, root: Path) -> tuple[list[torch.Tensor], list[str]]:
    """The first images of every arm: the same prompts and noise down each column."""
    rows = {
        NO_LORA: (entry.no_lora, 0), ORACLE: (entry.original, style_oracle(entry.original, root)),
        SELECTED: (entry.original, entry.chosen_original), SOUP: (entry.soup, 0),
        CHOSEN: (entry.generated, entry.chosen_candidate),
    }  # fmt: skip
    images = [
        read_tensors(artifact.under(root), SAMPLE_FILE)["images_VNCHW"][row, :SHEET_COLUMNS] for artifact, row in rows.values()
    ]
    return images, list(rows)


def base_sheet(
    photos: ResolvedStyle, splits: StyleSplits, size: int, real: Artifact, samples: StyleReportArtifact, root: Path
) -> tuple[torch.Tensor, torch.Tensor]:
    """Samples of the base and, below each, the training photograph with the nearest features."""
    tensors = read_tensors(samples.under(root), SAMPLE_FILE)
    train = read_tensors(real.under(root), FEATURE_FILE)["train"]
    images = tensors["images_VNCHW"][0, :SHEET_COLUMNS]
    nearest = torch.cdist(tensors["features_VND"][0, : len(images)], train).argmin(1)
    return images, split_images(photos, splits, "train", size).images_NCHW[nearest]


def write_base_quality(
    out: Path, base: StyleBase, photos: ResolvedStyle, splits: StyleSplits, size: int, real: Artifact,
    samples: StyleReportArtifact, guidance_scale: float, root: Path,
) -> None:  # fmt: skip
    """Write quality.json and sheet.png. copies: share of samples nearer to a training photograph, on features, than
    training photographs typically (median) are to each other."""
    features = read_tensors(real.under(root), FEATURE_FILE)
    x_ND = read_tensors(samples.under(root), SAMPLE_FILE)["features_VND"][0]
    train = features["train"]
    rows = torch.from_numpy(np.random.default_rng(0).permutation(len(train))[: len(x_ND)])
    found = resampled_distance(x_ND, features["report"], photos.name).spread
    floor = resampled_distance(train[rows], features["report"], photos.name).spread
    apart = torch.cdist(train, train).fill_diagonal_(torch.inf).min(1).values
    value = {
        "base": base.model_dump(mode="json")["artifact"], "guidance_scale": guidance_scale, "num_images": len(x_ND),
        "num_real": len(features["report"]), "frechet": found.model_dump(), "floor": floor.model_dump(),
        "ratio": found.estimate / floor.estimate, "kid": kernel_distance(x_ND, features["report"]),
        "floor_kid": kernel_distance(train[rows], features["report"]),
        "copies": float((torch.cdist(x_ND, train).min(1).values < apart.median()).float().mean()),
    }  # fmt: skip
    write_json(out / "quality.json", value)
    sheet = base_sheet(photos, splits, size, real, samples, root)
    (out / "sheet.png").write_bytes(contact_sheet(list(sheet), scale=max(1, 96 // size)))


def _sheet(out: Path, name: str, rows: list[torch.Tensor]) -> str:
    """Write a sheet; the name of its file."""
    (out / f"{name}.png").write_bytes(contact_sheet(rows, scale=max(1, 64 // rows[0].shape[-1]), gap=SHEET_GAP))
    return f"{name}.png"
