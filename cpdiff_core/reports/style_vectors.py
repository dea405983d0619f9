"""Every scored vector of a style report by itself; `vectors.py` for images. Lower scores are better here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from cpdiff_core.artifacts import Artifact, read_json
from cpdiff_core.evaluation.style_scores import SCORE_FILE
from cpdiff_core.lora.vectors import evenly_spaced, leave_one_out_min_l2, min_l2
from cpdiff_core.lora.zoo import VectorSet
from cpdiff_core.reports.style_tables import StyleArms
from cpdiff_core.reports.vectors import CANDIDATE, CHECKPOINT, LAST, MAPPED, NO_LORA, SOUP, TaskVectors, Vector, embed_task


def collect_style_vectors(arms: Sequence[StyleArms], metric: str, select_by: str, seed: int, root: Path) -> list[TaskVectors]:
    """The vectors of every style. metric: the name of the distance that the report is on."""
    return [_of_style(entry, metric, select_by, seed, root) for entry in arms]


def scored_vectors(scores: Artifact, root: Path) -> VectorSet:
    """Which vectors a score artifact is of."""
    return VectorSet.model_validate(read_json(scores.under(root), "config.json")["inputs"]["vectors"])


def _of_style(entry: StyleArms, metric: str, select_by: str, seed: int, root: Path) -> TaskVectors:
    original, generated = scored_vectors(entry.original, root), scored_vectors(entry.generated, root)
    w_NK = original.model_copy(update={"rows": None}).load(root, 0)
    each = original.num_checkpoints
    rows = original.rows or tuple(range(len(w_NK)))
    sets = {
        CHECKPOINT: (entry.original, original, rows), CANDIDATE: (entry.generated, generated, None),
        SOUP: (entry.soup, scored_vectors(entry.soup, root), None),
        NO_LORA: (entry.no_lora, scored_vectors(entry.no_lora, root), None),
    }  # fmt: skip
    own = leave_one_out_min_l2(w_NK)
    unit = float(own.median()) if len(w_NK) > 1 else 0.01 * float(w_NK.double().norm())
    found = TaskVectors(entry.style, metric, units={seed: unit})
    for series, (scores, vectors, numbers) in sets.items():
        w_VK = vectors.load(root, w_NK.shape[1])
        apart = own[list(rows)] if series == CHECKPOINT else min_l2(w_VK, w_NK)
        values = read_json(scores.under(root), SCORE_FILE)["frechet"]
        for v, (value, distance) in enumerate(zip(values, apart.tolist(), strict=True)):
            row = numbers[v] if numbers is not None else v
            last = series == CHECKPOINT and row % each == each - 1
            known = distance != float("inf")  # a single training vector has no other
            found.vectors.append(
                Vector(
                    entry.style, seed, LAST if last else series, row, report=value, distance=distance if known else None,
                    relative=distance / unit if known and unit else None,
                    chosen=series == CANDIDATE and v == entry.chosen_candidate,
                )
            )
    _add_selection(found, entry, select_by, rows, root)
    _add_map(found, w_NK, generated.load(root, w_NK.shape[1]), seed)
    return found


def _add_selection(found: TaskVectors, entry: StyleArms, by: str, rows: Sequence[int], root: Path) -> None:
    for scores, kinds in zip(entry.selection, ((CHECKPOINT, LAST), (CANDIDATE,)), strict=False):
        values = read_json(scores.under(root), SCORE_FILE)[by]
        number = {row: v for v, row in enumerate(rows)} if CHECKPOINT in kinds else {v: v for v in range(len(values))}
        found.vectors = [
            replace(one, selection=values[number[one.row]]) if one.series in kinds else one for one in found.vectors
        ]


def _add_map(found: TaskVectors, w_NK: torch.Tensor, w_MK: torch.Tensor, seed: int) -> None:
    if len(w_NK) + len(w_MK) < 4:
        return
    rows = evenly_spaced(len(w_NK), min(len(w_NK), MAPPED))
    training, candidates, middle = embed_task(w_NK, rows, w_MK, seed)
    place = dict(zip(rows, training, strict=True))
    scored = {one.row for one in found.vectors if one.series in (CHECKPOINT, LAST)}
    found.map_of = [(CHECKPOINT, at) for row, at in place.items() if row not in scored]

    def placed(one: Vector) -> Vector:
        if one.series == CANDIDATE:
            return replace(one, place=candidates[one.row])
        if one.series == SOUP:
            return replace(one, place=middle)
        return replace(one, place=place.get(one.row)) if one.series != NO_LORA else one

    found.vectors = [placed(one) for one in found.vectors]
