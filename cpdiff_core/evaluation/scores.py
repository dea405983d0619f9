"""Scores of a set of vectors: per-example outputs, and every metric of the task for each vector.

One function scores every column of every table; only the split differs, and with it the type of the result, so that
what chooses can never see what is reported (`selection.py`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from cpdiff_core.artifacts import Artifact, read_json, read_tensors, write_json, write_tensors
from cpdiff_core.config import Config, RuntimeConfig
from cpdiff_core.domains.base_models import BaseModel
from cpdiff_core.domains.glue.data import ResolvedTask, SplitConfig, tokenize
from cpdiff_core.domains.glue.metrics import compute_metrics
from cpdiff_core.domains.glue.stacks import Head, Precision, build_stack, logits_of
from cpdiff_core.domains.glue.text_tasks import TextTask
from cpdiff_core.evaluation.selection import ReportScores, SelectionScores
from cpdiff_core.lora.layout import LoraSpec
from cpdiff_core.lora.zoo import VectorSet

OUTPUT_FILE = "outputs.safetensors"
SCORE_FILE = "scores.json"


class SelectionArtifact(Artifact):
    """Scores on the selection split."""

    stage: Literal["score_selection"] = "score_selection"


class ReportArtifact(Artifact):
    """Scores on validation."""

    stage: Literal["score_report", "score_report_full"] = "score_report"


class ScoringConfig(Config):
    """How vectors of one task are scored."""

    base: BaseModel
    task: ResolvedTask
    splits: SplitConfig
    lora: LoraSpec
    max_length: int
    precision: Precision


def predictions_of(task: TextTask, logits_VBC: torch.Tensor) -> NDArray[np.float64]:
    """Class numbers, or regression values, V x B. Outputs that are not finite give NaN."""
    if task.labels is None:
        return logits_VBC[..., 0].double().numpy()
    predicted = logits_VBC.argmax(-1).double()
    predicted[~logits_VBC.isfinite().all(-1)] = float("nan")
    return predicted.numpy()


def score_vectors(
    out: Path, config: ScoringConfig, vectors: VectorSet, head: Head, split: Literal["selection", "report"], root: Path,
    runtime: RuntimeConfig,
) -> None:  # fmt: skip
    """Write logits, labels and every metric of every vector of `vectors` on one split into `out`."""
    task = config.task.task
    texts, labels = tokenize(config.task, config.splits, split, config.base, config.max_length)
    stack = build_stack(config.base, config.lora, task.num_classes, config.precision, runtime)
    w_VK = vectors.load(root, stack.layout.num_parameters)
    label = f"score {task.name} {vectors.kind} on {split}"
    logits_VBC = logits_of(stack, w_VK, head, task.num_classes, texts, label, runtime)
    write_scores(out, task, split, logits_VBC, labels)


def write_scores(
    out: Path, task: TextTask, split: Literal["selection", "report"], logits_VBC: torch.Tensor, labels: NDArray[np.float64]
) -> None:
    """Write the outputs of V vectors on one split, and every metric of each."""
    metrics = compute_metrics(task.metrics, predictions_of(task, logits_VBC), labels)
    write_tensors(out / OUTPUT_FILE, {"logits_VBC": logits_VBC, "labels_B": torch.from_numpy(labels)})
    scores = {
        name: [float(v) if np.isfinite(v) else None for v in np.atleast_1d(values)] for name, values in metrics.items()
    }
    write_json(out / SCORE_FILE, {"task": task.name, "split": split, "scores": scores})


def load_predictions(folder: Path, task: TextTask) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(predictions V x B, labels B) of a score artifact."""
    tensors = read_tensors(folder, OUTPUT_FILE)
    return predictions_of(task, tensors["logits_VBC"]), tensors["labels_B"].numpy()


def load_selection_scores(
    artifact: SelectionArtifact, root: Path, task: TextTask, splits: SplitConfig
) -> SelectionScores:
    """What `select` takes. Raises TypeError for scores on validation."""
    if not isinstance(artifact, SelectionArtifact):
        raise TypeError(f"choosing takes scores on the selection split, not {type(artifact).__name__}")
    value = read_json(artifact.under(root), SCORE_FILE)
    return SelectionScores(
        task=task.name, metric=task.primary_metric, vectors=f"{artifact.stage}/{artifact.fingerprint}",
        scores=tuple(value["scores"][task.primary_metric]), split=splits.selection_split,
    )  # fmt: skip


def load_report_scores(artifact: ReportArtifact, root: Path, task: TextTask) -> ReportScores:
    """What tables and `oracle` take. Raises TypeError for scores on the selection split."""
    if not isinstance(artifact, ReportArtifact):
        raise TypeError(f"reporting takes scores on validation, not {type(artifact).__name__}")
    value = read_json(artifact.under(root), SCORE_FILE)
    return ReportScores(
        task=task.name, metric=task.primary_metric, vectors=f"{artifact.stage}/{artifact.fingerprint}",
        scores=tuple(value["scores"][task.primary_metric]),
    )  # fmt: skip
