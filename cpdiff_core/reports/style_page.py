"""The one HTML page of a style experiment: Table 2, contact sheets of every arm, the base beside its photographs."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jinja2 import Environment, PackageLoader, StrictUndefined

from cpdiff_core.artifacts import Artifact, checked, provenance_of, read_tensors, write_json
from cpdiff_core.domains.style.base import StyleBase
from cpdiff_core.domains.style.distances import kernel_distance, resampled_distance
from cpdiff_core.domains.style.encoding import FEATURE_FILE
from cpdiff_core.domains.style.images import contact_sheet
from cpdiff_core.domains.style.styles import ResolvedStyle, StyleSplits, split_images
from cpdiff_core.evaluation.style_scores import SAMPLE_FILE, StyleReportArtifact, style_oracle
from cpdiff_core.reports.style_figures import SHEET_COLUMNS, draw_style_figures
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
from cpdiff_core.style_experiments import StyleExperimentConfig


def write_style_report(out: Path, config: StyleExperimentConfig, inputs: StyleReportInputs, root: Path) -> None:
    """Write report.html, results.csv, summary.txt and the sheets as PNG into `out`."""
    classifier = load_classifier(inputs.classifier, root)
    results = collect_styles(inputs.arms, classifier, root)
    frame = styles_frame(results, config.features.distance_name)
    frame.to_csv(out / "results.csv", index=False)
    quality = base_quality(inputs, classifier, root)
    notes = style_notes(config, inputs, quality)
    summary = [styles_text(frame), "", style_headline(results), "", *(f"- {note}" for note in notes)]
    if inputs.unseen is not None:
        summary += ["", checked(inputs.unseen.under(root), "unseen.txt").read_text(encoding="utf-8").rstrip()]
    (out / "summary.txt").write_text("\n".join(summary) + "\n", encoding="utf-8")
    sheets = []
    for entry, style in zip(inputs.arms, inputs.styles, strict=True):
        rows, labels = style_sheet(entry, root)
        real = split_images(style, inputs.splits, "report", inputs.image_size).images_NCHW[:SHEET_COLUMNS]
        sheets.append((entry.style, _png(out, f"sheet_{entry.style}", [*rows, real]), [*labels, "real, of the report"]))
    samples, nearest = base_sheet(inputs.photos, inputs.splits, inputs.image_size, inputs.photo_real, inputs.photo_samples, root)
    sheets.append(("the base itself", _png(out, "sheet_base", [samples, nearest]), ["sample", "nearest training photograph"]))
    figures = [
        (_data_url((out / f"{name}.png").read_bytes()), text)
        for name, text in draw_style_figures(
            out, inputs.interpolation, inputs.trajectories, config.features.distance_name, root
        )
    ]
    environment = Environment(
        loader=PackageLoader("cpdiff_core.reports"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    page = environment.get_template("style.html.j2").render(
        config=config, headline=style_headline(results), notes=notes, rows=frame.to_dict("records"), sheets=sheets,
        figures=figures,
        metric=config.features.distance_name, stages=_costs(inputs, root),
        configuration=json.dumps(config.model_dump(mode="json"), indent=1),
    )  # fmt: skip
    (out / "report.html").write_text(page, encoding="utf-8")


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
    return [
        f"Lower is better. {config.features.distance_name}; ± is the standard deviation of its bootstrap. Values "
        "depend on the number of images: compare rows of one style only, and with their floor, real training images.",
        f"Chosen by {chosen} to images held out for choosing, on other noise than reported: original (selected) and "
        "generated (selected). original (oracle) is nearest to the report's images themselves: nobody can choose it.",
        "accepted: share of images that a linear probe on features, fitted on training images of all styles and "
        "photographs, takes for the style.",
        f"The base against photographs held out of its training: {base.distance.spread} at n = {base.num_images}, "
        f"floor {floor.distance.estimate:.1f} at n = {floor.num_images}, ratio {ratio:.2f}. Far above 1, a style's "
        "no-LoRA row measures the base's failure too.",
        f"{len(inputs.arms)} styles, LoRA rank {config.lora.rank}, {config.num_runs} run(s), "
        f"N = {config.num_checkpoints}, M = {config.sampling.num_candidates}, {config.images.num_images} images per "
        f"vector, seed {config.seed}. One seed says nothing about the spread over seeds.",
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


def _png(out: Path, name: str, rows: list[torch.Tensor]) -> str:
    """Write a sheet and give it as a data URL."""
    data = contact_sheet(rows, scale=max(1, 64 // rows[0].shape[-1]))
    (out / f"{name}.png").write_bytes(data)
    return _data_url(data)


def _data_url(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _costs(inputs: StyleReportInputs, root: Path) -> list[dict[str, Any]]:
    """Where and in how many seconds each artifact of the report was computed, from its provenance."""
    artifacts: list[Artifact] = [*([inputs.base.artifact] if inputs.base.artifact else []), *inputs.harvests]
    artifacts += [inputs.autoencoder, inputs.diffusion, inputs.photo_samples]
    for entry in inputs.arms:
        artifacts += [entry.no_lora, entry.original, entry.soup, entry.generated]
    found = provenance_of(artifacts, root)
    return [{"stage": artifact.stage, "fingerprint": artifact.fingerprint} | made for artifact, made in found.items()]
