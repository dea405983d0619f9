"""From an image to style adapters on disk: generate, draw, score if there are images, write PEFT folders with cards.

An image alone says nothing about how good an adapter is, so nothing is chosen without --select; what every request
gets is a contact sheet, where the candidates stand beside the base without an adapter and the adapter of the training
style that looks most alike.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from cpdiff_core.artifacts import check_out, write_json
from cpdiff_core.config import MAX_CANDIDATES, Config, RuntimeConfig, UserError
from cpdiff_core.delivery import SUMMARY
from cpdiff_core.domains.glue.stacks import device_of
from cpdiff_core.domains.style.base import ImageCodec, StyleBase, spec_of
from cpdiff_core.domains.style.distances import kernel_distance
from cpdiff_core.domains.style.features import image_features
from cpdiff_core.domains.style.images import contact_sheet, read_image
from cpdiff_core.domains.style.sampling import sample_images
from cpdiff_core.domains.style.stack import build_stack
from cpdiff_core.domains.style.styles import FolderImages, Style, load_images, resolve_style
from cpdiff_core.style_bundle import StyleCandidates, StyleGenerator
from cpdiff_core.style_cards import StyleScore
from cpdiff_core.style_export import (
    StyleAdapterFacts,
    nearest_style_adapters,
    write_merged_transformer,
    write_plain_base,
    write_style_adapter,
)

SHEET = "contact_sheet.png"
SHEET_COLUMNS = 10
_ROOT = Path()  # a generator's base lies in a folder of its own, never below the root of artifacts


class StyleRequest(Config):
    """What style adapters are asked for. Field names are those of the command line."""

    style_image: str | None = Field(None, description="An image file of a style.")
    task: str | None = Field(None, description="A training style by name, instead.")
    num: int = Field(20, ge=1, le=MAX_CANDIDATES, description="Candidates M (paper: unstated for styles; 20 as for texts).")
    seed: int | None = Field(None, ge=0, description="Of the noise; the seed of the generator's own run if None.")
    select: str | None = Field(None, description="Folder of images of the style, on which the best candidate is chosen.")
    merge: bool = Field(False, description="Also write the transformer with the chosen adapter merged into it.")
    base: str | None = Field(None, description="Folder or hub id of the base model, if not where the generator says.")


def deliver_style(generator: StyleGenerator, request: StyleRequest, out: Path, runtime: RuntimeConfig) -> list[str]:
    """Write candidate folders, the contact sheet, `generation.json` and, if asked for, the merged model below `out`.

    Returns lines to print. Raises UserError for what cannot be done, before anything is written.
    """
    check_out(out)
    if request.merge and request.num > 1 and not request.select:
        raise UserError("--merge: which of the candidates? choose one with --select FOLDER, or generate --num 1")
    card = generator.card
    condition = generator.condition(request.style_image, request.task, runtime)
    real = _real_images(request.select, card.image_size) if request.select else None
    base: StyleBase | None = None
    missing = ""
    try:
        base = generator.base(request.base)
    except UserError as error:  # adapters can be written without it; nothing can be drawn
        if request.base or request.merge or real is not None or card.base.kind == "tiny":
            raise
        missing = str(error)
    candidates = generator.generate(condition, request.num, request.seed)
    nearest, similarity = generator.nearest_style(condition)
    scores: list[StyleScore] = []
    if base is not None:
        arms = {"no-LoRA": torch.zeros_like(candidates.w_MK[:1]), f"LoRA of {nearest}": generator.references[nearest][-1:]}
        w_VK = torch.cat([*arms.values(), candidates.w_MK])
        images_VNCHW = _draw(generator, base, w_VK, card.images.num_images if real is not None else SHEET_COLUMNS, runtime)
        labels = [*arms, *(f"candidate {m}" for m in range(request.num))]
        if real is not None:
            scores = _scores(generator, images_VNCHW, real, labels, runtime)
    chosen = min(range(request.num), key=lambda m: scores[m + 2].estimate) if scores else None
    folders = _write(generator, request, candidates, (nearest, similarity), scores, chosen, out)
    if base is not None:
        rows = list(images_VNCHW[:, :SHEET_COLUMNS])
        if request.style_image:
            rows.insert(0, read_image(Path(request.style_image).expanduser(), images_VNCHW.shape[-1])[None])
        (out / SHEET).write_bytes(contact_sheet(rows, scale=max(1, 64 // images_VNCHW.shape[-1])))
        if base.kind == "tiny":
            write_plain_base(out / "base", base, _ROOT)
        if request.merge:
            write_merged_transformer(out / "merged", folders[chosen or 0], base, _ROOT)
    return _lines(candidates, nearest, similarity, scores, chosen, folders, missing, request, out)


def _real_images(folder: str, size: int) -> torch.Tensor:
    """The images below a folder, uint8. Raises UserError for none, for one, and for a damaged one."""
    source = FolderImages(path=str(Path(folder).expanduser().resolve()))
    images = load_images(resolve_style(Style(name="select", source=source), None), size).images_NCHW
    if len(images) < 2:
        raise UserError(f"--select {folder!r}: holds one image; a distance needs at least two, and says little below 50")
    return images


@torch.no_grad()
def _draw(
    generator: StyleGenerator, base: StyleBase, w_VK: torch.Tensor, num: int, runtime: RuntimeConfig
) -> torch.Tensor:
    """Images of every vector for the same prompts and noise, uint8 [V, n, 3, H, W]."""
    card, device = generator.card, device_of(runtime)
    dtype = torch.bfloat16 if card.precision == "bf16" else torch.float32
    stack, codec = build_stack(base, _ROOT, card.lora, device, dtype), ImageCodec(base, _ROOT, device)
    if stack.layout != card.layout:
        raise UserError(f"generator {card.name!r}: its layout is not that of the base model; export it anew")
    _, captions = generator.prompts(num)
    x_VNCHW = sample_images(
        stack, spec_of(base, _ROOT), w_VK, captions, card.images, 2 * card.images.seed, device, "draw", runtime
    )
    return codec.decode(x_VNCHW.flatten(0, 1)).unflatten(0, x_VNCHW.shape[:2])


def _scores(
    generator: StyleGenerator, images_VNCHW: torch.Tensor, real: torch.Tensor, labels: list[str], runtime: RuntimeConfig
) -> list[StyleScore]:
    """KID of every vector's images to the real ones: unbiased, so few images do not shift it."""
    card, device = generator.card, device_of(runtime)
    x_VND = image_features(card.features, images_VNCHW.flatten(0, 1), device, "features", runtime)
    real_ND = image_features(card.features, real, device, "features of --select", runtime)
    name = card.features.distance_name
    metric = f"KID ({name[name.index('(') + 1 : -1]})"
    return [
        StyleScore(
            arm=f"{label}, on the images of --select", metric=metric, estimate=kernel_distance(x_ND, real_ND),
            num_images=len(x_ND), num_real=len(real),
        )
        for label, x_ND in zip(labels, x_VND.unflatten(0, images_VNCHW.shape[:2]), strict=True)
    ]  # fmt: skip


def _write(
    generator: StyleGenerator, request: StyleRequest, candidates: StyleCandidates, nearest: tuple[str, float],
    scores: list[StyleScore], chosen: int | None, out: Path,
) -> list[Path]:  # fmt: skip
    card, condition, num = generator.card, candidates.condition, len(candidates.w_MK)
    known = card.style(condition.style) if condition.style else None
    chosen_by = None
    if scores:
        chosen_by = f"smallest {scores[0].metric} of {num} on the images of --select, for which its distance is optimistic"
    shared: dict[str, Any] = {
        "generator": card.name, "objective": card.objective, "base": card.base, "lora": card.lora,
        "target_modules": card.target_modules, "style": condition.style, "image": condition.image,
        "image_sha256": condition.sha256, "nearest_style": nearest[0], "similarity": nearest[1],
        "statistics": candidates.statistics, "num": num, "seed": candidates.seed,
        "run_scores": known.scores if known else (), "data_terms": _terms(generator),
    }  # fmt: skip
    folders = [out / f"candidate-{m:0{len(str(num - 1))}d}" for m in range(num)]
    near = nearest_style_adapters(generator, candidates.w_MK) if generator.references else [None] * num
    for m, folder in enumerate(folders):
        facts = StyleAdapterFacts(
            **shared, index=m, chosen_by=chosen_by if m == chosen else None, nearest=near[m],
            scores=(scores[m + 2], *scores[:2]) if scores else (),
        )  # fmt: skip
        write_style_adapter(folder, candidates.w_MK[m], card.layout, facts)
    write_json(
        out / SUMMARY,
        {
            "request": request.model_dump(mode="json"), "generator": card.name, "unseen_condition": known is None,
            "style": condition.style, "image_sha256": condition.sha256, "nearest_style": nearest[0],
            "similarity": nearest[1], "statistics": candidates.statistics, "seed": candidates.seed,
            "chosen": None if chosen is None else folders[chosen].name, "chosen_by": chosen_by,
            "arms": [score.model_dump(mode="json") for score in scores[:2]],
            "candidates": [
                {
                    "folder": folder.name,
                    "scores": [scores[m + 2].model_dump(mode="json")] if scores else [],
                    "nearest": one.model_dump(mode="json") if (one := near[m]) else None,
                }
                for m, folder in enumerate(folders)
            ],
        },
    )  # fmt: skip
    return folders


def _terms(generator: StyleGenerator) -> str:
    """Where the images behind the adapters came from, each place once."""
    places = dict.fromkeys(style.data.partition(" (effects")[0] for style in generator.card.styles)
    return f"{'; '.join(places)}, under their own terms"


def _lines(
    candidates: StyleCandidates, nearest: str, similarity: float, scores: list[StyleScore], chosen: int | None,
    folders: list[Path], missing: str, request: StyleRequest, out: Path,
) -> list[str]:  # fmt: skip
    lines = []
    if candidates.condition.style is None:
        lines.append(
            "UNSEEN CONDITION: the generator was not trained on this style; expect little, look at the contact sheet. "
            f"The training style that looks most alike is {nearest} (cosine {similarity:.2f})."
        )
    if chosen is not None:
        lines += [f"{score.arm}: {score.metric} {score.estimate:.4f}" for score in scores[:2]]
        best = scores[chosen + 2]
        lines.append(f"chosen: {folders[chosen].name}, {best.metric} {best.estimate:.4f} on the images it was chosen by")
    else:
        lines.append("not scored and not chosen: give --select FOLDER with images of the style")
    lines.append(f"no contact sheet: {missing}" if missing else f"contact sheet: {out / SHEET}")
    lines.append(f"{len(folders)} PEFT folders in {out}" + (f", merged model in {out / 'merged'}" if request.merge else ""))
    return lines
