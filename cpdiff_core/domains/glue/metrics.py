"""The GLUE metrics, for one prediction vector, for many, and for bootstrap resamples.

Every score of this project is in **points**: 100 times the usual value, so accuracy and F1 lie in [0, 100],
Matthews, Pearson and Spearman in [-100, 100]. Names are those of the GLUE metric in the `evaluate` hub.

A resample with replacement is a row of `counts`, how often it holds each example. All metrics take such weights, so
a thousand resamples are a few matrix-vector products over the same predictions and nothing is gathered or re-sorted.

Degenerate cases: Matthews is 0 when one class alone is predicted or present (as sklearn), F1 is 0 when class 1 is
neither predicted nor present (as sklearn), a correlation with a constant is 0 (scipy: NaN), since constant
predictions tell nothing. Predictions that are not finite have no score: NaN.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cpdiff_core.config import UserError

MetricName = Literal["accuracy", "f1", "matthews_correlation", "pearson", "spearmanr", "combined_score"]
METRIC_NAMES: tuple[MetricName, ...] = get_args(MetricName)
Floats = NDArray[np.float64]


def metric_label(name: MetricName, task_metrics: Sequence[MetricName] = ()) -> str:
    """The name to print: `combined_score` says what it is the mean of."""
    return f"combined_score (mean of {' and '.join(task_metrics)})" if name == "combined_score" else name


def metric(
    name: MetricName,
    predictions: ArrayLike,
    labels: ArrayLike,
    task_metrics: Sequence[MetricName] = (),
    counts: ArrayLike | None = None,
) -> Floats:
    """Score `predictions` against `labels`, in points.

    predictions: [..., n], labels: the same shape or [n]; class numbers or regression values. Returns the leading axes.
    counts: [R, n], how often each of R resamples holds each example; the result then gets a last axis R.
    task_metrics: the metrics that the task reports; `combined_score` is their mean, nothing else needs them.
    Raises ValueError if the numbers of examples differ or are 0, UserError if `name` cannot be computed.
    """
    predicted, gold = np.asarray(predictions), np.asarray(labels)
    weight_Rn = np.ones((1, gold.shape[-1])) if counts is None else np.asarray(counts, dtype=np.float64)
    if not 0 < predicted.shape[-1] == gold.shape[-1] == weight_Rn.shape[-1] or weight_Rn.ndim != 2:
        raise ValueError(
            f"predictions {predicted.shape}, labels {gold.shape} and counts {weight_Rn.shape} need one number "
            "of examples (last axis), at least one; score all arms on one fixed example set"
        )
    if name == "combined_score":
        if len(task_metrics) < 2 or name in task_metrics:
            raise UserError(f"metric 'combined_score': needs a task with two metrics, not {list(task_metrics)}")
        return np.mean([metric(part, predicted, gold, counts=counts) for part in task_metrics], axis=0)[()]
    if name not in _METRICS:
        raise UserError(f"metric {name!r}: unknown; choose one of {', '.join(METRIC_NAMES)}")
    with np.errstate(invalid="ignore"):
        score = 100.0 * _METRICS[name](predicted, gold, weight_Rn)
    score = np.where(np.isfinite(predicted).all(axis=-1)[..., None], score, np.nan)
    return score if counts is not None else score[..., 0][()]


def compute_metrics(
    task_metrics: Sequence[MetricName], predictions: ArrayLike, labels: ArrayLike
) -> dict[MetricName, Floats]:
    """Every metric of a task, and `combined_score` where it has two, in points, through the `evaluate` library.

    predictions: [n] or [V, n], labels: [n]. Each value is a float for [n] and an array [V] for [V, n]: one call for
    all vectors of an arm, since a call costs some milliseconds whatever it scores. Resampling uses `metric` itself.
    """
    # evaluate takes 2 s to import, and a run that finds all its scores cached never needs it.
    from cpdiff_core.domains.glue.metric_module import GlueMetrics

    predicted, gold = np.atleast_2d(predictions), np.asarray(labels)
    module = GlueMetrics.of(tuple(task_metrics))
    scores = module.compute(predictions=predicted, references=np.broadcast_to(gold, predicted.shape))
    return scores if np.ndim(predictions) > 1 else {name: score[0] for name, score in scores.items()}


def total(values: NDArray, counts_Rn: Floats) -> Floats:
    """[..., R]: the sum over examples of `values` [..., n], each as often as the resample holds it."""
    return np.asarray(values, dtype=np.float64) @ counts_Rn.T


def average_ranks(values: NDArray, counts_Rn: Floats) -> Floats:
    """[R, n]: rank (1 is lowest, ties share their average) of each of the n `values` in each resample.

    One sort serves every resample: a level holds `copies` examples of ranks up to `upto`, and their average is the
    rank. Examples that a resample does not hold get a number too; they carry no weight.
    """
    levels, level_of = np.unique(values, return_inverse=True)
    order = np.argsort(level_of, kind="stable")
    starts = np.searchsorted(level_of[order], np.arange(len(levels)))
    copies = np.add.reduceat(counts_Rn[:, order], starts, axis=1)
    upto = np.cumsum(copies, axis=1)
    return (upto - (copies - 1.0) / 2.0)[:, level_of]


def _accuracy(predicted: NDArray, gold: NDArray, counts_Rn: Floats) -> Floats:
    return total(predicted == gold, counts_Rn) / counts_Rn.sum(axis=1)


def _f1(predicted: NDArray, gold: NDArray, counts_Rn: Floats) -> Floats:
    """F1 of class 1, for tasks with the classes 0 and 1."""
    if gold.max() > 1:
        raise UserError(f"metric 'f1': labels go up to {gold.max()}, it is for two classes; choose accuracy instead")
    hits = total((predicted == 1) & (gold == 1), counts_Rn)
    named = total(predicted == 1, counts_Rn) + total(gold == 1, counts_Rn)
    return np.divide(2.0 * hits, named, out=np.zeros_like(hits), where=named > 0)


def _matthews(predicted: NDArray, gold: NDArray, counts_Rn: Floats) -> Floats:
    """Matthews correlation, for any number of classes (Gorodkin's R_K, which is Matthews' own for two)."""
    number = counts_Rn.sum(axis=1)
    covariance = total(predicted == gold, counts_Rn) * number
    spread_predicted, spread_gold = number**2, number**2
    for label in np.union1d(predicted, gold):
        named, present = total(predicted == label, counts_Rn), total(gold == label, counts_Rn)
        covariance = covariance - named * present
        spread_predicted, spread_gold = spread_predicted - named**2, spread_gold - present**2
    scale = np.sqrt(spread_predicted * spread_gold)
    return np.divide(covariance, scale, out=np.zeros_like(covariance), where=scale > 0)


def _pearson(predicted: NDArray, gold: NDArray, counts_Rn: Floats) -> Floats:
    # Shifting by the plain mean leaves the result alone and keeps the sums below free of cancellation.
    x = predicted - predicted.mean(axis=-1, keepdims=True, dtype=np.float64)
    y = gold - gold.mean(axis=-1, keepdims=True, dtype=np.float64)
    number, sum_x, sum_y = counts_Rn.sum(axis=1), total(x, counts_Rn), total(y, counts_Rn)
    square_x, square_y = total(x * x, counts_Rn), total(y * y, counts_Rn)
    variance_x, variance_y = square_x - sum_x**2 / number, square_y - sum_y**2 / number
    covariance = total(x * y, counts_Rn) - sum_x * sum_y / number
    # What is left of a constant after rounding is not variance. Written so that NaN does not count as constant.
    constant = (variance_x <= 1e-12 * square_x) | (variance_y <= 1e-12 * square_y)
    scale = np.sqrt(np.where(constant, 1.0, variance_x * variance_y))
    return np.where(constant, 0.0, np.clip(covariance / scale, -1.0, 1.0))


def _spearman(predicted: NDArray, gold: NDArray, counts_Rn: Floats) -> Floats:
    """Pearson correlation of the ranks, taken anew in every resample; n ranks always average (n + 1) / 2."""
    middle = (counts_Rn.sum(axis=1, keepdims=True) + 1.0) / 2.0
    num = predicted.shape[-1]
    golds = [average_ranks(row, counts_Rn) - middle for row in gold.reshape(-1, num)]
    rows = predicted.reshape(-1, num)
    scores = []
    for row, y_Rn in zip(rows, golds if len(golds) > 1 else golds * len(rows), strict=True):
        x_Rn = average_ranks(row, counts_Rn) - middle
        xy, xx, yy = (np.einsum("rn,rn,rn->r", counts_Rn, a, b) for a, b in ((x_Rn, y_Rn), (x_Rn, x_Rn), (y_Rn, y_Rn)))
        scores.append(np.divide(xy, np.sqrt(xx * yy), out=np.zeros_like(xy), where=xx * yy > 0))
    return np.stack(scores).reshape(*predicted.shape[:-1], -1)


_METRICS = {
    "accuracy": _accuracy,
    "f1": _f1,
    "matthews_correlation": _matthews,
    "pearson": _pearson,
    "spearmanr": _spearman,
}
