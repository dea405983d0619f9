"""Bootstrap intervals: coverage on simulated data, pairing, averages, and the refusal to mix metrics."""

import numpy as np
import pytest
from scipy import stats

from cpdiff_core.config import UserError
from cpdiff_core.domains.glue.metrics import metric
from cpdiff_core.evaluation.bootstrap import Interval, average_over_tasks, claim, resample, resample_counts


def noisy(gold, accuracy, rng):
    return np.where(rng.random(len(gold)) < accuracy, gold, 1 - gold)


@pytest.fixture
def data():
    rng = np.random.default_rng(0)
    gold = rng.integers(0, 2, 300)
    return gold, noisy(gold, 0.8, rng), noisy(gold, 0.7, rng)


def test_interval_of_accuracy_matches_the_binomial(data):
    gold, good, _ = data
    score = resample("generated", "rte", [good], gold, name="accuracy", num_resamples=4000)
    share = np.mean(gold == good)
    low, high = stats.binom.ppf([0.025, 0.975], len(gold), share) / len(gold)
    assert score.interval.estimate == pytest.approx(100 * share)
    assert score.interval.low == pytest.approx(100 * low, abs=0.7)
    assert score.interval.high == pytest.approx(100 * high, abs=0.7)


def test_paired_difference_covers_the_truth_at_the_nominal_rate():
    """Two arms whose errors overlap; the true difference of accuracies is 5 points."""
    rng, trials, covered = np.random.default_rng(0), 1000, 0
    for trial in range(trials):
        gold = rng.integers(0, 2, 500)
        second = noisy(gold, 0.75, rng)
        first = np.where((second != gold) & (rng.random(len(gold)) < 0.2), gold, second)
        a = resample("a", f"task {trial}", [first], gold, name="accuracy", num_resamples=400)
        b = resample("b", f"task {trial}", [second], gold, name="accuracy", num_resamples=400)
        interval = (a - b).interval
        covered += interval.low <= 5.0 <= interval.high
    assert 0.93 <= covered / trials <= 0.97


def test_average_over_two_tasks_of_a_correlation_and_of_matthews_covers_the_truth():
    rng, trials, covered = np.random.default_rng(2), 500, 0
    covariance = [[1.0, 0.6], [0.6, 1.0]]
    for trial in range(trials):
        x, y = rng.multivariate_normal([0, 0], covariance, 300).T
        gold = np.arange(300) % 2
        second = noisy(gold, 0.8, rng)
        parts = [
            resample("a", f"stsb {trial}", [x], y, name="pearson", num_resamples=400),
            # Symmetric errors at rate 0.2 on balanced labels: Matthews is 0.6.
            resample("a", f"cola {trial}", [second], gold, name="matthews_correlation", num_resamples=400),
        ]
        interval = average_over_tasks(parts).interval
        covered += interval.low <= 60.0 <= interval.high
    assert 0.93 <= covered / trials <= 0.97


def test_metric_is_recomputed_on_each_resample_of_the_same_examples(data):
    gold, good, _ = data
    score = resample("a", "mrpc", [good], gold, name="f1", num_resamples=50)
    counts = resample_counts("mrpc", len(gold), 50)
    assert (counts.sum(axis=1) == len(gold)).all()
    for row, value in zip(counts, score.resampled, strict=True):
        index = np.repeat(np.arange(len(gold)), row)
        assert value == pytest.approx(metric("f1", good[index], gold[index]))


def test_chunked_resamples_of_a_large_set_equal_those_of_one_piece():
    rng = np.random.default_rng(3)
    gold = rng.integers(0, 2, 3000)
    predictions = noisy(gold, 0.8, rng)
    counts = resample_counts("qnli", len(gold), 300)
    score = resample("a", "qnli", [predictions], gold, name="accuracy", num_resamples=300)
    np.testing.assert_allclose(score.resampled, 100.0 * (counts @ (predictions == gold)) / len(gold))


def test_identical_arms_differ_by_exactly_nothing_and_paired_intervals_are_narrower(data):
    gold, good, bad = data
    a, b = (resample(arm, "rte", [p], gold, name="accuracy") for arm, p in (("a", good), ("b", bad)))
    same = (a - resample("c", "rte", [good], gold, name="accuracy")).interval
    assert (same.estimate, same.low, same.high) == (0.0, 0.0, 0.0)
    nearly = good.copy()
    nearly[:3] = 1 - nearly[:3]
    paired = (a - resample("d", "rte", [nearly], gold, name="accuracy")).interval
    assert paired.high - paired.low < 0.5 * (a.interval.high - a.interval.low)
    assert (a - b).arm == "a - b"


def test_seeds_are_averaged_on_the_same_resamples_and_their_spread_is_kept_apart(data):
    gold, good, bad = data
    two = resample("a", "rte", [good, bad], gold, name="accuracy")
    one, other = (resample("b", "rte", [p], gold, name="accuracy") for p in (good, bad))
    np.testing.assert_allclose(two.resampled, (one.resampled + other.resampled) / 2)
    assert two.seed_std == pytest.approx(np.std([one.estimate, other.estimate], ddof=1))
    assert one.seed_std is None
    difference = two - one
    assert difference.per_seed == pytest.approx([0.0, other.estimate - one.estimate])


def test_a_claim_needs_examples_and_seeds(data):
    gold = data[0]
    rng = np.random.default_rng(4)

    def arm(name, *accuracies):
        return resample(name, "rte", [noisy(gold, a, rng) for a in accuracies], gold, name="accuracy")

    base, good = arm("base", 0.6, 0.6, 0.6), arm("good", 0.9, 0.9, 0.9)
    assert claim(good - base) == "holds"
    assert claim(base - good) == "fails"
    assert claim(arm("good", 0.9) - arm("base", 0.6)) == "ties"
    lucky_once = arm("lucky once", 0.6, 0.6, 0.99) - base
    assert lucky_once.interval.low > 0.0
    assert claim(lucky_once) == "ties"
    expected = stats.ttest_1samp(lucky_once.per_seed, 0.0).confidence_interval(0.95)
    assert (lucky_once.seed_interval.low, lucky_once.seed_interval.high) == pytest.approx(tuple(expected))


def test_several_vectors_of_a_seed_count_as_their_mean_score(data):
    gold, good, bad = data
    mean = resample("mean of 2", "rte", [np.stack([good, bad])], gold, name="accuracy")
    assert mean.estimate == pytest.approx(50.0 * (np.mean(good == gold) + np.mean(bad == gold)))


def test_mixing_metrics_tasks_examples_or_seeds_raises(data):
    gold, good, bad = data
    f1 = resample("a", "mrpc", [good], gold, name="f1")
    both = {"name": "combined_score", "task_metrics": ("accuracy", "f1")}
    others = [
        resample("b", "mrpc", [good], gold, name="accuracy"),
        resample("b", "mrpc", [good], gold, **both),
        resample("b", "rte", [good], gold, name="f1"),
        resample("b", "mrpc", [good[::-1]], gold[::-1], name="f1"),
        resample("b", "mrpc", [good], gold, name="f1", num_resamples=10),
    ]
    for other in others:
        with pytest.raises(ValueError, match="cannot compare"):
            f1 - other
    three = resample("c", "mrpc", [good, bad, good], gold, name="f1")
    with pytest.raises(ValueError, match="seeds"):
        three - resample("d", "mrpc", [good, bad], gold, name="f1")
    rte = resample("a", "rte", [good], gold, name="f1")
    with pytest.raises(ValueError, match="cannot compare"):
        average_over_tasks([f1, rte]) - average_over_tasks([f1])
    with pytest.raises(ValueError, match="once"):
        average_over_tasks([f1, f1])


def test_predictions_that_are_not_finite_name_arm_task_and_vector():
    gold = np.linspace(0.0, 5.0, 20)
    rows = np.stack([gold, gold])
    rows[1, 3] = np.nan
    with pytest.raises(UserError, match=r"generated.*stsb.*vector 1"):
        resample("generated", "stsb", [rows], gold, name="pearson")


def test_interval_prints_in_points():
    assert str(Interval(estimate=1.26, low=-0.04, high=2.5)) == "1.3 [-0.0, 2.5]"
