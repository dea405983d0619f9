"""The figures of Sec. 4.4 and score against novelty, as PNG and SVG."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cpdiff_core.artifacts import read_json, read_tensors
from cpdiff_core.domains.glue.metrics import metric
from cpdiff_core.evaluation.arms import arm_predictions
from cpdiff_core.evaluation.audit import novelty_unit, wrong_iou, wrong_predictions
from cpdiff_core.evaluation.trivial import TRIVIAL_FAMILIES
from cpdiff_core.generator.probing import Trajectory
from cpdiff_core.reports.audit_section import TaskAudit
from cpdiff_core.reports.drawing import COLOURS, LINES, MARKERS, drawing, save_figure
from cpdiff_core.reports.inputs import ReportInputs
from cpdiff_core.reports.tables import Results, metric_of


def draw_figures(
    out: Path, inputs: ReportInputs, results: Results, audits: dict[str, TaskAudit], root: Path
) -> list[tuple[str, str]]:
    """Write every figure that the experiment has data for. Returns (file name without ending, caption) of each."""
    if not audits:
        return []
    with drawing():
        drawn = drawn_figures(inputs, results, audits, root)
        for name, figure, _ in drawn:
            save_figure(figure, out, name)
    return [(name, caption) for name, _, caption in drawn]


def drawn_figures(
    inputs: ReportInputs, results: Results, audits: dict[str, TaskAudit], root: Path
) -> list[tuple[str, Any, str]]:
    """(file name without ending, figure, caption) of each."""
    single = next(iter(audits.values())).audits[0].novelty.factors.training_median is None
    unit = novelty_unit(single)
    regression = any(audit.audits[0].regression for audit in audits.values())
    drawn = [
        ("novelty", _novelty(audits, results), "Score against novelty: mean score of a set of vectors with its 95 % interval, "
         f"over their median distance to the nearest training vector on dW, in units of {unit}. Left of 1 are copies. "
         "Hollow: a trivial generator that does not reach the generated distance."),
        ("similarity", _similarity(inputs, root), "Similarity against performance (Sec. 4.4), first seed: each vector's "
         "largest wrong-prediction IoU with a scored training checkpoint other than itself, and its score."
         + (" Regression: |error| > 0.5 counts as wrong." if regression else "")),
    ]  # fmt: skip
    first = inputs.seeds[0]
    if first.geometry is not None:
        drawn.append(
            ("tsne", _tsne(read_tensors(first.geometry.under(root), "tsne.safetensors")), "t-SNE of training (small, hollow) "
             "and generated (filled, dark edge) vectors of the first seed. Distances in such a plot mean little; the table of "
             "dispersion and separation has them.")
        )  # fmt: skip
    if first.trajectory is not None:
        found = Trajectory.model_validate(read_json(first.trajectory.under(root), "trajectory.json"))
        nearest = {task: audit.audits[0].novelty.factors.training_median for task, audit in audits.items()}
        drawn.append(
            ("trajectory", _trajectory(found, nearest), "Sampling trajectories of the first seed: median distance (raw "
             "factors) of the decoded x_t to the nearest training vector, from noise to t = 0."
             + ("" if single else " Dotted: the training vectors' own median distance to each other."))
        )  # fmt: skip
    return drawn


def _panels(names: list[str], width: float = 3.3, height: float = 2.7) -> tuple[Any, list[Any]]:
    """A figure with one small panel per name, three in a row."""
    import matplotlib.pyplot as plt

    columns = min(3, len(names))
    rows = math.ceil(len(names) / columns)
    figure, grid = plt.subplots(rows, columns, figsize=(width * columns, height * rows), squeeze=False)
    axes = list(grid.flat)
    for axis in axes[len(names) :]:
        axis.set_visible(False)
    for axis, name in zip(axes, names, strict=False):
        axis.set_title(name, fontsize=10, loc="left")
    figure.set_layout_engine("tight")
    return figure, axes


def _shared_legend(figure: Any, axis: Any) -> None:
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", ncol=min(4, len(labels)), bbox_to_anchor=(0.5, 0.0), fontsize=8)


def _novelty(audits: dict[str, TaskAudit], results: Results) -> Any:
    figure, axes = _panels(list(audits))
    for axis, (task, audit) in zip(axes, audits.items(), strict=False):
        unit = [one.novelty.copy_distance or 1.0 for one in audit.audits]

        def place(distances: list[float], unit: list[float] = unit) -> float:
            return float(np.mean([distance / scale for distance, scale in zip(distances, unit, strict=True)]))

        places = []
        for family, found in audit.matched.items():
            score = audit.trivial[f"{family} (mean)"].interval
            places.append(place([match.median_distance for match in found]))
            _point(axis, places[-1], score, family, filled=family in audit.reached)
        places.append(place([one.novelty.product.generated_median for one in audit.audits]))
        _point(axis, places[-1], results[task]["generated (mean)"].interval, "generated", size=11)
        axis.axvline(1.0, color="0.6", linewidth=0.8, linestyle=":")
        axis.set_xscale("symlog", linthresh=1.0)  # a soup can lie at 0, a generated set far beyond 1
        axis.set_xlim(-0.1, 2.0 * max(1.0, *places))
        axis.set_xlabel("distance / typical of training")
        axis.set_ylabel(_short(metric_of(results[task]["generated (mean)"])))
    _shared_legend(figure, axes[0])
    return figure


def _style(name: str) -> tuple[str, str]:
    """(colour, marker) of a set of vectors, the same in every figure."""
    if name == "generated":
        return COLOURS[0], "*"
    if name not in TRIVIAL_FAMILIES:
        return "0.35", MARKERS[0]
    i = 1 + list(TRIVIAL_FAMILIES).index(name)
    return COLOURS[i], MARKERS[i]


def _point(axis: Any, x: float, score: Any, label: str, size: float = 6, filled: bool = True) -> None:
    colour, marker = _style(label)
    face = colour if filled else "none"
    axis.errorbar(
        [x], [score.estimate], yerr=[[score.estimate - score.low], [score.high - score.estimate]], fmt=marker, color=colour,
        markerfacecolor=face, markersize=size, linewidth=1, label=label,
    )  # fmt: skip


def _similarity(inputs: ReportInputs, root: Path) -> Any:
    entries = inputs.seeds[0].arms
    figure, axes = _panels([entry.task.name for entry in entries])
    for axis, entry in zip(axes, entries, strict=False):
        task = entry.task.task
        every = entry.arm("original (selected)").model_copy(update={"rows": (), "use": "mean"})
        trained, labels = _all_predictions(every, root, task)
        wrong_training = wrong_predictions(trained, labels, task.labels is None)
        groups: dict[str, tuple[NDArray[Any], NDArray[Any]]] = {}
        if len(wrong_training) > 1:  # one checkpoint has no other one to be like
            own = wrong_iou(wrong_training, wrong_training) - 2.0 * np.eye(len(wrong_training))
            groups["training checkpoints"] = (own.max(1), trained)
        assert entry.audit is not None
        generated, _ = arm_predictions(entry.arm("generated (mean)"), root, task)
        groups["generated"] = (_max_iou(generated, labels, wrong_training, task.labels is None), generated)
        for arm in entry.audit.trivial_arms[::2]:
            predicted, _ = arm_predictions(arm, root, task)
            groups[arm.name.removesuffix(" (mean)")] = (
                _max_iou(predicted, labels, wrong_training, task.labels is None), predicted,
            )  # fmt: skip
        for name in sorted(groups, key=lambda name: name == "generated"):  # the generated ones on top
            similarity, predicted = groups[name]
            colour, marker = _style(name)
            scores = metric(task.primary_metric, predicted, labels, task.metrics)
            hollow = name == "training checkpoints"
            axis.scatter(
                similarity, scores, s=60 if name == "generated" else 22, marker=marker, label=name, linewidths=0.9,
                alpha=0.75, facecolors="none" if hollow else colour, edgecolors=colour,
            )  # fmt: skip
        axis.set_xlabel("largest wrong-prediction IoU")
        axis.set_ylabel(_short(task.primary_metric))
    _shared_legend(figure, axes[0])
    return figure


def _all_predictions(arm: Any, root: Path, task: Any) -> tuple[NDArray[Any], NDArray[Any]]:
    from cpdiff_core.evaluation.scores import load_predictions

    return load_predictions(arm.scores.under(root), task)


def _max_iou(predicted: NDArray[Any], labels: NDArray[Any], wrong_training: NDArray[Any], regression: bool) -> NDArray[Any]:
    return np.asarray(wrong_iou(wrong_predictions(predicted, labels, regression), wrong_training).max(1))


def _tsne(plane: dict[str, Any]) -> Any:
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6.5, 5))
    tasks = list(dict.fromkeys(name.split("/")[0] for name in plane))
    for i, task in enumerate(tasks):
        colour, marker = COLOURS[i % 7], MARKERS[i % 7]
        x = plane[f"{task}/training"].numpy()
        axis.scatter(x[:, 0], x[:, 1], s=14, marker=marker, facecolors="none", edgecolors=colour, linewidths=0.6, alpha=0.6)
        x = plane[f"{task}/generated"].numpy()  # on top, with a dark edge: the sets lie on each other
        axis.scatter(x[:, 0], x[:, 1], s=34, marker=marker, facecolors=colour, edgecolors="black", linewidths=0.7, label=task)
    axis.set_xticks([])
    axis.set_yticks([])
    axis.set_xlabel("t-SNE, no units")
    axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def _trajectory(found: Trajectory, nearest: dict[str, float | None]) -> Any:
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6.5, 4))
    for i, (task, distances) in enumerate(found.distance.items()):
        colour = COLOURS[i % 7]
        axis.plot(found.steps, distances, color=colour, linestyle=LINES[i % 6], label=task)
        if (own := nearest.get(task)) is not None:
            axis.axhline(own, color=colour, linewidth=0.7, linestyle=":")
    axis.set_yscale("log")
    axis.invert_xaxis()
    axis.set_xlabel("t (noise at the left, samples at the right)")
    axis.set_ylabel("distance to the nearest training vector")
    axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def _short(name: str) -> str:
    return name.split(" (")[0].replace("_", " ")
