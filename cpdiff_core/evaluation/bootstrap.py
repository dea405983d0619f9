"""Intervals: percentile bootstrap over examples, paired between arms, averaged over tasks and seeds.

The examples of a task are drawn with replacement by a seed made of the task's name, so every arm and every seed of a
run meets the same resamples, and the metric is computed anew on each. A `ResampledScore` holds the score on all
examples beside the score on each resample; differences and averages of such values are taken resample by resample,
and every interval is read off the end. The spread over seeds (other training runs) is another source of noise: it is
kept apart, as `per_seed`.

Mixing is impossible by construction: a `ResampledScore` knows its tasks, metrics and examples, and subtraction
compares them. Scores are in points.
"""

from __future__ import annotations

import hashlib
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cpdiff_core.config import Config, UserError
from cpdiff_core.domains.glue.metrics import Floats, MetricName, metric, metric_label

NUM_RESAMPLES = 1000
# Elements of one chunk of resample counts in float64: 2 MiB, which stay in the cache of a core.
_CHUNK = 2**18


class Interval(Config):
    """A score or a difference of scores, in points, with its 95 % interval over resampled examples."""

    estimate: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.estimate:.1f} [{self.low:.1f}, {self.high:.1f}]"


@dataclass(frozen=True)
class TaskKey:
    """What two scores must share to be compared."""

    task: str
    metric: str
    examples: str

    def __str__(self) -> str:
        return f"{self.metric} on {self.task} (examples {self.examples})"


@dataclass(frozen=True, eq=False)
class ResampledScore:
    """Score of one arm, or a difference or an average of such, with its value on every resample.

    per_seed: [S] on all examples, one value per training seed. resampled: [R], the mean over seeds on each resample.
    """

    arm: str
    keys: tuple[TaskKey, ...]
    per_seed: Floats
    resampled: Floats

    @property
    def estimate(self) -> float:
        return float(self.per_seed.mean())

    @property
    def seed_std(self) -> float | None:
        """Standard deviation over seeds; None if there is one seed, which tells nothing about the method."""
        return float(self.per_seed.std(ddof=1)) if len(self.per_seed) > 1 else None

    @property
    def seed_interval(self) -> Interval | None:
        """95 % interval of the mean over seeds (Student's t): what another set of training runs would give."""
        if self.seed_std is None:
            return None
        from scipy import stats  # a second to import, and needed for several seeds only

        number = len(self.per_seed)
        half = float(stats.t.ppf(0.975, number - 1)) * self.seed_std / math.sqrt(number)
        return Interval(estimate=self.estimate, low=self.estimate - half, high=self.estimate + half)

    @property
    def interval(self) -> Interval:
        """95 % percentile interval over resampled examples, for these training runs."""
        low, high = np.quantile(self.resampled, (0.025, 0.975))
        return Interval(estimate=self.estimate, low=float(low), high=float(high))

    def __sub__(self, other: ResampledScore) -> ResampledScore:
        """The paired difference. Seeds pair up in order; an arm with one seed is compared with each seed of the other.

        Raises ValueError if tasks, metrics, examples, resamples or seeds do not match.
        """
        for mine, theirs in zip(self.keys, other.keys, strict=False):
            if mine != theirs:
                raise ValueError(f"cannot compare {self.arm!r}, {mine}, with {other.arm!r}, {theirs}; use one metric")
        if len(self.keys) != len(other.keys):
            raise ValueError(f"cannot compare {self.arm!r} and {other.arm!r}: averages over different sets of tasks")
        if len(self.resampled) != len(other.resampled):
            raise ValueError(f"cannot compare {self.arm!r} and {other.arm!r}: different numbers of resamples")
        seeds = {len(self.per_seed), len(other.per_seed)} - {1}
        if len(seeds) > 1:
            raise ValueError(f"cannot compare {self.arm!r} and {other.arm!r}: {sorted(seeds)} seeds do not pair up")
        return ResampledScore(
            arm=f"{self.arm} - {other.arm}",
            keys=self.keys,
            per_seed=self.per_seed - other.per_seed,
            resampled=self.resampled - other.resampled,
        )


def resample(
    arm: str,
    task: str,
    predictions: Sequence[ArrayLike],
    labels: ArrayLike,
    *,
    name: MetricName,
    task_metrics: Sequence[MetricName] = (),
    num_resamples: int = NUM_RESAMPLES,
) -> ResampledScore:
    """Score `arm` on all examples of `task` and on every resample of them.

    predictions: one item per training seed, each [n] for one vector or [V, n] for several, whose scores are then
    averaged (the mean of 20 candidates, not their ensemble). labels: [n].
    Raises UserError if a vector's predictions are not finite.
    """
    gold = np.asarray(labels)
    counts = resample_counts(task, len(gold), num_resamples)
    cuts = range(_CHUNK // len(gold) + 1, num_resamples, _CHUNK // len(gold) + 1)
    per_seed, resampled = [], []
    for seed_predictions in predictions:
        vectors = np.atleast_2d(seed_predictions)
        scores = metric(name, vectors, gold, task_metrics)
        if not np.isfinite(scores).all():
            raise UserError(
                f"arm {arm!r} on task {task!r}: vector {int(np.argmin(np.isfinite(scores)))} predicts values that are "
                "not finite and has no score; leave it out or lower what made it"
            )
        per_seed.append(scores.mean())
        # Float64 counts exist for one chunk of resamples at a time.
        chunks = [metric(name, vectors, gold, task_metrics, part).mean(axis=0) for part in np.split(counts, cuts)]
        resampled.append(np.concatenate(chunks))
    examples = hashlib.sha256(np.ascontiguousarray(gold).tobytes()).hexdigest()[:8]
    return ResampledScore(
        arm=arm,
        keys=(TaskKey(task=task, metric=metric_label(name, task_metrics), examples=f"{len(gold)}:{examples}"),),
        per_seed=np.array(per_seed),
        resampled=np.mean(resampled, axis=0),
    )


def average_over_tasks(scores: Sequence[ResampledScore]) -> ResampledScore:
    """The plain mean over tasks, each resampled independently of the others.

    Raises ValueError if a task occurs twice or the numbers of seeds or resamples differ.
    """
    tasks = [key.task for score in scores for key in score.keys]
    if len(set(tasks)) != len(tasks):
        raise ValueError(f"an average over tasks needs each task once, not {tasks}")
    if len({len(score.resampled) for score in scores}) != 1 or len({len(score.per_seed) for score in scores}) != 1:
        raise ValueError("an average over tasks needs the same number of seeds and of resamples for each task")
    return ResampledScore(
        arm=scores[0].arm,
        keys=tuple(key for score in scores for key in score.keys),
        per_seed=np.mean([score.per_seed for score in scores], axis=0),
        resampled=np.mean([score.resampled for score in scores], axis=0),
    )


def claim(difference: ResampledScore) -> Literal["holds", "ties", "fails"]:
    """Whether "the first arm is better than the second" holds for the method, not only for the runs at hand.

    It holds if the interval over examples and the interval over seeds both lie above 0, it fails if both lie below;
    everything else ties, one seed included.
    """
    intervals = [difference.interval, difference.seed_interval]
    if all(interval is not None and interval.low > 0 for interval in intervals):
        return "holds"
    if all(interval is not None and interval.high < 0 for interval in intervals):
        return "fails"
    return "ties"


@lru_cache(maxsize=16)
def resample_counts(task: str, num_examples: int, num_resamples: int) -> NDArray[np.uint16]:
    """[R, n]: how often each example occurs in each resample. A function of its arguments alone; read-only."""
    rng = np.random.default_rng([zlib.crc32(task.encode()), num_examples])
    counts = np.empty((num_resamples, num_examples), dtype=np.uint16)
    for row in counts:
        row[:] = np.bincount(rng.integers(num_examples, size=num_examples), minlength=num_examples)
    counts.setflags(write=False)
    return counts
