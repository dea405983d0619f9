"""Is it generation or memorisation? The audit (after Zeng et al., arXiv 2506.07998; Sec. 4.4).

Everything is measured against the training vectors of the same task: shared mistakes (wrong-prediction IoU), distance
to the nearest training vector on raw factors and on dW = BA, diversity, and the score against trivial generators at
equal distance. `verdict` puts it into one line. What is ours: regression has no wrong set, so |prediction - gold| > 0.5
counts as wrong and |difference| > 0.5 as disagreement; the rules for `memorised` and `trivial` stand in `verdict`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from pydantic import Field

from cpdiff_core.config import Config
from cpdiff_core.domains.glue.metrics import Floats
from cpdiff_core.evaluation.bootstrap import Interval
from cpdiff_core.evaluation.selection import SelectionScores
from cpdiff_core.evaluation.trivial import TRIVIAL_FAMILIES, MatchedDistance
from cpdiff_core.lora.vectors import (
    FactorSpan,
    leave_one_out_min_l2,
    leave_one_out_min_l2_product,
    min_l2,
    min_l2_product,
    soup,
)

REGRESSION_THRESHOLD = 0.5
# Vectors drawn from a trivial family to compare a generated set with.
_NUM_REFERENCE = 100
# Significance of each of the five comparisons of `resembles`: one in a hundred in all.
_SIGNIFICANCE = 0.01 / 5
_CHUNK = 2**22


class IouSummary(Config):
    """Mean wrong-prediction IoU over pairs. None where there is no pair of different vectors."""

    training_training: float | None
    generated_generated: float | None
    generated_training: float
    generated_training_max: float = Field(description="Mean over generated vectors of the maximum over training ones.")
    training_training_max: float | None = Field(description="The same of each training vector over the others.")


class Distances(Config):
    """Distance to the nearest training vector."""

    generated: tuple[float, ...]
    training: tuple[float, ...] = Field(description="To the nearest other training vector; empty if there is one.")

    @property
    def generated_median(self) -> float:
        return float(np.median(self.generated))

    @property
    def training_median(self) -> float | None:
        return float(np.median(self.training)) if self.training else None


class Novelty(Config):
    """How far generated vectors lie from the training vectors."""

    factors: Distances
    product: Distances = Field(description="On dW = BA, which does not depend on how dW is factored.")
    copy_distance: float = Field(description="A vector nearer than this on dW counts as a copy.")

    @property
    def copies(self) -> int:
        return sum(distance <= self.copy_distance for distance in self.product.generated)


class Diversity(Config):
    """How much the generated vectors differ from each other in what they predict."""

    num_vectors: int
    num_distinct: int = Field(description="Different prediction vectors; regression is rounded to halves.")
    mean_disagreement: float | None = Field(description="Share of examples on which a pair differs; mean over pairs.")


class Verdict(Config):
    """The audit of one task in one word and one line."""

    task: str
    kind: Literal["memorised", "trivial", "beats", "ties", "loses", "unmatched"]
    difference: Interval | None = Field(description="Generated minus the best trivial generator at equal distance.")
    text: str


def wrong_predictions(predictions: ArrayLike, labels: ArrayLike, regression: bool) -> NDArray[np.bool_]:
    """[V, n]: where each of V vectors is wrong. Regression: more than 0.5 off (our extension)."""
    predicted, gold = np.atleast_2d(predictions), np.asarray(labels)
    # Written so that a prediction that is not a number is wrong.
    return ~(np.abs(predicted - gold) <= REGRESSION_THRESHOLD) if regression else predicted != gold


def wrong_iou(wrong_An: NDArray[np.bool_], wrong_Bn: NDArray[np.bool_]) -> Floats:
    """[A, B]: |wrong_a and wrong_b| / |wrong_a or wrong_b|; 1 where both are perfect."""
    a, b = wrong_An.astype(np.float64), wrong_Bn.astype(np.float64)
    both = a @ b.T
    either = a.sum(axis=1)[:, None] + b.sum(axis=1) - both
    return np.divide(both, either, out=np.ones_like(both), where=either > 0)


def iou_summary(wrong_generated: NDArray[np.bool_], wrong_training: NDArray[np.bool_]) -> IouSummary:
    """The aggregates of Zeng et al. from what [M, n] generated and [N, n] training vectors get wrong."""
    training = wrong_iou(wrong_training, wrong_training)
    across = wrong_iou(wrong_generated, wrong_training)
    others = training - 2.0 * np.eye(len(training))
    return IouSummary(
        training_training=_pair_mean(training),
        generated_generated=_pair_mean(wrong_iou(wrong_generated, wrong_generated)),
        generated_training=float(across.mean()),
        generated_training_max=float(across.max(axis=1).mean()),
        training_training_max=float(others.max(axis=1).mean()) if len(training) > 1 else None,
    )


def novelty(w_MK: torch.Tensor, w_NK: torch.Tensor, factors: Sequence[FactorSpan], scaling: float) -> Novelty:
    """Distances of generated w_MK to training w_NK, against the training vectors' own leave-one-out distances.

    A copy is a vector that lies no farther from a training vector, on dW, than training vectors typically (median)
    lie from each other; with a single training vector, than 1 % of its norm.
    """
    product = min_l2_product(w_MK, w_NK, factors, scaling)
    if len(w_NK) > 1:
        training = leave_one_out_min_l2_product(w_NK, factors, scaling)
        training_factors = tuple(leave_one_out_min_l2(w_NK).tolist())
        copy_distance = float(training.median())
    else:
        training, training_factors = product.new_empty(0), ()
        copy_distance = 0.01 * float(min_l2_product(torch.zeros_like(w_NK), w_NK, factors, scaling))
    return Novelty(
        factors=Distances(generated=tuple(min_l2(w_MK, w_NK).tolist()), training=training_factors),
        product=Distances(generated=tuple(product.tolist()), training=tuple(training.tolist())),
        copy_distance=copy_distance,
    )


def diversity(predictions: ArrayLike, regression: bool) -> Diversity:
    """From the predictions [M, n] of a generated set on one example set."""
    predicted = np.atleast_2d(predictions)
    differ = [
        np.mean(np.abs(a - b) > REGRESSION_THRESHOLD if regression else a != b)
        for i, a in enumerate(predicted)
        for b in predicted[:i]
    ]
    rounded = np.round(2.0 * predicted) if regression else predicted
    return Diversity(
        num_vectors=len(predicted),
        num_distinct=len(np.unique(rounded, axis=0)),
        mean_disagreement=float(np.mean(differ)) if differ else None,
    )


def signature(w_VK: torch.Tensor, w_NK: torch.Tensor) -> Floats:
    """[V, 5]: how w_VK lie about the soup of w_NK, whatever their distance. Tells trivial families apart.

    Of each deviation d from the soup: the share of |d|^2 in the span of the training vectors' own deviations; the
    cosine between d^2 and their variance, coordinate by coordinate; the kurtosis of d over coordinates; the distance
    to the nearest training vector over |d|; the cosine between what lies outside the span and the same of the next
    vector. Noise is isotropic, has kurtosis 3 and no direction in common; learned vectors have structure there.
    """
    centre_1K = soup(w_NK)
    zero = torch.zeros((), dtype=torch.float64, device=w_NK.device)
    gram_NN, inner_VN = zero.new_zeros(len(w_NK), len(w_NK)), zero.new_zeros(len(w_VK), len(w_NK))
    norm, profile, fourth, with_next = (zero.new_zeros(len(w_VK)) for _ in range(4))
    variance_norm = zero.clone()
    width = max(1, _CHUNK // (len(w_VK) + len(w_NK)))
    for start in range(0, w_NK.shape[1], width):
        part = slice(start, start + width)
        centre = centre_1K[:, part].double()
        d_V, x_N = w_VK[:, part].double() - centre, w_NK[:, part].double() - centre
        variance = x_N.square().mean(0)
        gram_NN += x_N @ x_N.T
        inner_VN += d_V @ x_N.T
        norm += d_V.square().sum(1)
        profile += d_V.square() @ variance
        fourth += d_V.pow(4).sum(1)
        with_next += (d_V * d_V.roll(-1, dims=0)).sum(1)
        variance_norm += variance.square().sum()
    values, u_NN = torch.linalg.eigh(gram_NN)
    kept = values > 1e-10 * values[-1]
    in_span_VJ = inner_VN @ u_NN[:, kept] / values[kept].sqrt()
    in_span = in_span_VJ.square().sum(1)
    outside = (norm - in_span).clamp_min(0.0)
    outside_with_next = with_next - (in_span_VJ * in_span_VJ.roll(-1, dims=0)).sum(1)
    has_outside = outside > 1e-6 * norm
    tiny = torch.finfo(torch.float64).tiny
    columns = (
        in_span / norm.clamp_min(tiny),
        profile / (fourth * variance_norm).sqrt().clamp_min(tiny),
        w_NK.shape[1] * fourth / norm.square().clamp_min(tiny),
        min_l2(w_VK, w_NK) / norm.sqrt().clamp_min(tiny),
        # Vectors inside the span have rounding errors outside it.
        torch.where(has_outside & has_outside.roll(-1), outside_with_next / (outside * outside.roll(-1)).sqrt(), 0.0),
    )
    # A vector within a thousandth of the training spread of the soup is the soup and deviates in no direction: row 0.
    deviates = norm > 1e-6 * gram_NN.diagonal().mean()
    return np.round(torch.where(deviates[:, None], torch.stack(columns, dim=1), 0.0).cpu().numpy(), 4)


def resembles(
    w_MK: torch.Tensor, w_NK: torch.Tensor, matched: Sequence[MatchedDistance], seed: int = 1
) -> tuple[str, ...]:
    """The trivial families whose vectors, at the closest distance they reach, cannot be told from w_MK by `signature`.

    Two-sample Kolmogorov-Smirnov test on each of the five figures, one in a hundred in all. Fewer than four vectors
    cannot be told from anything, so for them the answer is empty.
    """
    if len(w_MK) < 4:
        return ()
    generated = signature(w_MK, w_NK)
    alike = []
    for match in matched:
        reference = TRIVIAL_FAMILIES[match.family].generate(w_NK, _NUM_REFERENCE, seed, match.scale)
        if all(map(_same_distribution, generated.T, signature(reference, w_NK).T)):
            alike.append(match.family)
    return tuple(alike)


def best_family(scores: Mapping[str, SelectionScores], by: Literal["mean", "best"]) -> str:
    """The trivial family that is best on the selection split, by its mean or by its best vector.

    Raises TypeError for anything but SelectionScores: picking the opponent on validation would favour it.
    """
    if not all(isinstance(score, SelectionScores) for score in scores.values()):
        raise TypeError("best_family picks by SelectionScores only; score the trivial families on the selection split")
    aggregate = np.mean if by == "mean" else np.max
    means = {family: [s for s in score.scores if s is not None] for family, score in scores.items()}
    return max(scores, key=lambda family: float(aggregate(means[family])) if means[family] else -math.inf)


def verdict(task: str, found: Novelty, alike: Sequence[str], best_trivial: str, difference: Interval | None) -> Verdict:
    """One line on one task.

    memorised: most of the vectors are copies. beats, loses, ties: the interval of generated minus the best trivial
    generator at equal distance lies above, below, or on both sides of 0. trivial: does not beat it and cannot be told
    from a trivial family by its weights (`resembles`). unmatched: no trivial family reaches the distance.
    difference: paired, in points; None if nothing was matched.
    """
    num = len(found.product.generated)
    where = f"median distance to training {found.product.generated_median:.3g} on dW"
    against = f"{best_trivial} at equal distance: {difference} points"
    kind: Literal["memorised", "trivial", "beats", "ties", "loses", "unmatched"]
    if 2 * found.copies > num:
        kind, text = "memorised", f"memorised: {found.copies} of {num} vectors are copies of training vectors"
    elif difference is None:
        kind, text = "unmatched", "unmatched: no trivial generator reaches this distance"
    elif difference.low > 0:
        kind, text = "beats", f"beats {against}"
    elif alike:
        kind, text = "trivial", f"trivial: cannot be told from {' or '.join(alike)}, and does not beat {against}"
    elif difference.high < 0:
        kind, text = "loses", f"loses to {against}"
    else:
        kind, text = "ties", f"ties with {against}"
    return Verdict(task=task, kind=kind, difference=difference, text=f"{task}: {text}; {where}")


def novelty_unit(single: bool) -> str:
    """What a novelty of 1 is, in words. single: there is one training vector."""
    return "1 % of the training vector's norm" if single else "the training vectors' own median distance to each other"


def condition_effect(changed: str, difference: Interval) -> str:
    """One line on causality. difference: right minus changed condition (or statistics), paired, all else equal."""
    matters, harms, nothing = (
        ("the statistics matter", "the statistics do harm", "the statistics do nothing that shows")
        if changed.endswith("statistics")
        else ("the condition matters", "the condition does harm", "the condition does nothing that shows")
    )
    found = matters if difference.low > 0 else harms if difference.high < 0 else nothing
    return f"{found}: with {changed} the score drops by {difference} points"


def _pair_mean(symmetric: Floats) -> float | None:
    """Mean over pairs i != j."""
    number = len(symmetric)
    return float((symmetric.sum() - np.trace(symmetric)) / (number * (number - 1))) if number > 1 else None


def _same_distribution(a: Floats, b: Floats) -> bool:
    """Two-sample Kolmogorov-Smirnov test with the asymptotic critical value."""
    values = np.concatenate([a, b])
    shares = [np.searchsorted(np.sort(sample), values, side="right") / len(sample) for sample in (a, b)]
    critical = math.sqrt(-math.log(_SIGNIFICANCE / 2.0) / 2.0 * (len(a) + len(b)) / (len(a) * len(b)))
    return bool(np.abs(shares[0] - shares[1]).max() <= critical)
