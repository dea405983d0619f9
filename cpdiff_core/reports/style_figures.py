"""The figures of Sec. 4.4 for styles: interpolation between two, and trajectories towards one; PNG and SVG."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from cpdiff_core.artifacts import Artifact, read_json, read_tensors
from cpdiff_core.domains.style.images import contact_sheet
from cpdiff_core.evaluation.style_study import INTERPOLATION_FILE, TRAJECTORY_FILE
from cpdiff_core.reports.drawing import COLOURS, MARKERS, drawing, save_figure

SHEET_COLUMNS = 10
SHEET_GAP = 2
"""Pixels between the images of a sheet."""


def draw_style_figures(
    out: Path, interpolation: Artifact | None, trajectories: dict[str, Artifact], distance_name: str, root: Path
) -> None:
    """Write `trajectory` and, if there is one, `interpolation` with the sheets `interpolation_<kind>` into `out`."""
    paths = {style: read_tensors(artifact.under(root), TRAJECTORY_FILE) for style, artifact in trajectories.items()}
    with drawing():
        save_figure(_trajectories(paths), out, "trajectory")
    if interpolation is None:
        return
    found = read_json(interpolation.under(root), INTERPOLATION_FILE)
    with drawing():
        save_figure(_interpolation(found, distance_name), out, "interpolation")
    for kind, images_LNCHW in read_tensors(interpolation.under(root), "images.safetensors").items():
        rows = [row[:SHEET_COLUMNS] for row in images_LNCHW]
        sheet = contact_sheet(rows, scale=max(1, 64 // images_LNCHW.shape[-1]), gap=SHEET_GAP)
        (out / f"interpolation_{kind}.png").write_bytes(sheet)


def _interpolation(found: dict[str, Any], distance_name: str) -> Any:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(found["distance"]), figsize=(8, 3), sharey=True, squeeze=False)
    for axis, (kind, distances) in zip(axes.flat, found["distance"].items(), strict=True):
        for i, (style, values) in enumerate(distances.items()):
            axis.plot(found["lambdas"], values, color=COLOURS[i], marker=MARKERS[i], label=f"to {style}")
        axis.set_title(kind, fontsize=10, loc="left")
        axis.set_xlabel("lambda")
    axes.flat[0].set_ylabel(distance_name, fontsize=8)
    axes.flat[-1].legend(fontsize=8)
    return figure


def _trajectories(found: dict[str, dict[str, torch.Tensor]]) -> Any:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, len(found), figsize=(3.2 * len(found), 6), squeeze=False)
    for column, (style, tensors) in enumerate(found.items()):
        above, below = axes[0, column], axes[1, column]
        above.set_title(style, fontsize=10, loc="left")
        above.scatter(*tensors["originals"].T.numpy(), s=12, color="0.7")
        above.scatter(*tensors["soup"].T.numpy(), s=60, marker="X", color=COLOURS[6])
        for i, (path, distance) in enumerate(zip(tensors["paths"], tensors["distance"], strict=True)):
            above.plot(*path.T.numpy(), color=COLOURS[i % 7], linewidth=0.8)
            above.plot(*path[-1:].T.numpy(), color=COLOURS[i % 7], marker=MARKERS[i % 7])
            below.plot(tensors["t"].numpy(), distance.numpy(), color=COLOURS[i % 7], linewidth=1)
        below.set_yscale("log")
        below.invert_xaxis()
        below.set_xlabel("t")
    axes[1, 0].set_ylabel("distance to the nearest original")
    return figure
