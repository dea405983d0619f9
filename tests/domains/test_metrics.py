"""Metrics against scikit-learn and scipy, alone, in rows, on resamples, and through the evaluate library."""

import os
import subprocess
import sys
import tempfile

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as sk

from cpdiff_core.config import UserError
from cpdiff_core.domains.glue.metrics import compute_metrics, metric, metric_label

CLASSES = {"accuracy": sk.accuracy_score, "f1": sk.f1_score, "matthews_correlation": sk.matthews_corrcoef}
VALUES = {
    "pearson": lambda gold, predicted: stats.pearsonr(gold, predicted)[0],
    "spearmanr": lambda gold, predicted: stats.spearmanr(gold, predicted)[0],
}


def class_data(num_vectors=3, num=80, classes=2, seed=0):
    rng = np.random.default_rng(seed)
    gold = rng.integers(0, classes, num)
    wrong = rng.integers(0, classes, (num_vectors, num))
    return np.where(rng.random((num_vectors, num)) < 0.6, gold, wrong), gold


def value_data(num_vectors=3, num=80, seed=0):
    """One decimal, so that ranks have ties."""
    rng = np.random.default_rng(seed)
    gold = np.round(5.0 * rng.random(num), 1)
    return np.round(gold + rng.normal(size=(num_vectors, num)), 1), gold


@pytest.mark.parametrize("name", [*CLASSES, *VALUES])
def test_metric_equals_sklearn_and_scipy_for_rows_and_for_resamples(name):
    predictions, gold = class_data() if name in CLASSES else value_data()
    reference = {**CLASSES, **VALUES}[name]
    expected = [100.0 * reference(gold, row) for row in predictions]
    np.testing.assert_allclose(metric(name, predictions, gold), expected, atol=1e-9)
    assert isinstance(metric(name, predictions[0], gold), float)

    index = np.random.default_rng(1).integers(0, len(gold), (25, len(gold)))
    counts = np.stack([np.bincount(row, minlength=len(gold)) for row in index])
    resampled = np.array([[100.0 * reference(gold[row], vector[row]) for row in index] for vector in predictions])
    np.testing.assert_allclose(metric(name, predictions, gold, counts=counts), resampled, atol=1e-9)
    np.testing.assert_allclose(metric(name, predictions[0][index], gold[index]), resampled[0], atol=1e-9)


def test_matthews_of_five_classes_equals_sklearn():
    predictions, gold = class_data(classes=5)
    expected = [100.0 * sk.matthews_corrcoef(gold, row) for row in predictions]
    np.testing.assert_allclose(metric("matthews_correlation", predictions, gold), expected, atol=1e-9)


def test_combined_score_is_the_mean_of_what_the_task_reports_and_says_so():
    predictions, gold = class_data()
    expected = 50.0 * (sk.accuracy_score(gold, predictions[0]) + sk.f1_score(gold, predictions[0]))
    assert metric("combined_score", predictions[0], gold, ("accuracy", "f1")) == pytest.approx(expected)
    assert metric_label("combined_score", ("accuracy", "f1")) == "combined_score (mean of accuracy and f1)"
    assert metric_label("f1", ("accuracy", "f1")) == "f1"
    with pytest.raises(UserError, match="combined_score"):
        metric("combined_score", predictions[0], gold, ("accuracy",))


def test_degenerate_predictions_have_defined_scores():
    gold = np.array([0, 1, 1, 0, 1])
    assert metric("matthews_correlation", np.ones(5, int), gold) == 0.0 == sk.matthews_corrcoef(gold, np.ones(5))
    assert metric("f1", np.zeros(5, int), np.zeros(5, int)) == 0.0
    assert metric("f1", np.zeros(5, int), gold) == 0.0 == sk.f1_score(gold, np.zeros(5))
    values = np.array([0.1, 4.0, 3.3, 0.0, 2.0])
    for name in ("pearson", "spearmanr"):
        assert metric(name, np.full(5, 2.71), values) == 0.0
        assert metric(name, values, np.full(5, 0.1)) == 0.0
        assert np.isnan(metric(name, np.array([1.0, np.nan, 2.0, 3.0, 4.0]), values))
        assert np.isnan(metric(name, np.array([1.0, np.inf, 2.0, 3.0, 4.0]), values))
        assert metric(name, 1e6 + 1e-3 * values, values) == pytest.approx(100.0, abs=1e-4)


def test_a_resample_that_holds_one_value_only_correlates_with_nothing():
    predictions, gold = value_data(1, 6)
    counts = np.array([[6, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1]])
    for name in ("pearson", "spearmanr"):
        scores = metric(name, predictions[0], gold, counts=counts)
        assert scores[0] == 0.0
        assert scores[1] == pytest.approx(metric(name, predictions[0], gold))


def test_wrong_shapes_and_names_are_refused():
    predictions, gold = class_data()
    with pytest.raises(ValueError, match="examples"):
        metric("accuracy", predictions, gold[:-1])
    with pytest.raises(ValueError, match="at least one"):
        metric("accuracy", np.zeros(0, int), np.zeros(0, int))
    with pytest.raises(UserError, match=r"recall.*accuracy"):
        metric("recall", predictions, gold)
    with pytest.raises(UserError, match="two classes"):
        metric("f1", *class_data(classes=3))


def test_compute_metrics_gives_every_metric_of_one_vector_and_of_many():
    predictions, gold = class_data()
    many = compute_metrics(("accuracy", "f1"), predictions, gold)
    assert list(many) == ["accuracy", "f1", "combined_score"]
    np.testing.assert_allclose(many["f1"], [100.0 * sk.f1_score(gold, row) for row in predictions])
    one = compute_metrics(("accuracy", "f1"), predictions[1], gold)
    assert one == {name: pytest.approx(score[1]) for name, score in many.items()}
    values, gold_values = value_data()
    scores = compute_metrics(("pearson", "spearmanr"), values[0].astype(np.float32), gold_values)
    assert scores["spearmanr"] == pytest.approx(100.0 * stats.spearmanr(gold_values, values[0].astype(np.float32))[0])
    assert list(compute_metrics(("matthews_correlation",), predictions[0], gold)) == ["matthews_correlation"]


def test_compute_metrics_gives_no_score_to_classes_from_logits_that_are_not_finite():
    predictions, gold = class_data()
    broken = predictions.astype(np.float64)
    broken[1, 5] = np.nan
    found = compute_metrics(("accuracy", "f1"), broken, gold)
    assert np.isnan(found["accuracy"][1])
    assert np.isnan(found["combined_score"][1])
    assert found["f1"][[0, 2]] == pytest.approx(metric("f1", predictions[[0, 2]], gold))


def test_evaluate_leaves_no_file_behind_and_opens_no_connection(tmp_path):
    code = """
import socket, sys
def refuse(*args, **kwargs): raise RuntimeError("a connection was opened")
socket.socket.connect = refuse
from cpdiff_core.domains.glue.metrics import compute_metrics
assert "evaluate" not in sys.modules
print(compute_metrics(("accuracy",), [0, 1, 1, 1], [0, 1, 1, 0]))
"""
    home, scratch = tmp_path / "home", tmp_path / "scratch"
    home.mkdir()
    scratch.mkdir()
    environment = {**os.environ, "HOME": str(home), "TMPDIR": str(scratch), "PYTHONPATH": os.pathsep.join(sys.path)}
    for name in ("HF_HOME", "XDG_CACHE_HOME"):
        environment.pop(name, None)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "75.0" in done.stdout
    assert [path for path in home.rglob("*") if path.is_file()] == []
    assert not any(scratch.iterdir())
    assert tempfile.gettempdir() != str(scratch)
