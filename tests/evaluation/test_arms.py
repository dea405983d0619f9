"""Arms as they are read off stored outputs, against what one would write by hand."""

import numpy as np
import pytest
import torch

from cpdiff_core.artifacts import seal
from cpdiff_core.domains.glue.text_tasks import GLUE_TASKS
from cpdiff_core.evaluation.arms import ScoredArm, arm_predictions, ensemble_predictions
from cpdiff_core.evaluation.scores import ReportArtifact, write_scores

SST2, STSB = GLUE_TASKS["sst2"], GLUE_TASKS["stsb"]


@pytest.fixture
def stored(tmp_path):
    """Three vectors on four examples, classes 0 and 1: right on 2, 4 and 1 of them."""
    gold = np.array([0.0, 1.0, 1.0, 0.0])
    margins = torch.tensor([[-1.0, 1.0, -0.2, 0.3], [-2.0, 0.1, 0.1, -0.1], [3.0, -3.0, 0.2, 0.1]])
    artifact = ReportArtifact(fingerprint="0" * 20)
    out = artifact.under(tmp_path)
    out.mkdir(parents=True)
    write_scores(out, SST2, "report", torch.stack([torch.zeros_like(margins), margins], -1), gold)
    seal(out)
    return artifact, tmp_path


def test_mean_takes_its_rows_and_the_oracle_the_row_that_is_best_on_validation(stored):
    artifact, root = stored
    rows, labels = arm_predictions(ScoredArm(name="a", scores=artifact, rows=(0, 2)), root, SST2)
    assert rows.tolist() == [[0, 1, 0, 1], [1, 0, 1, 1]]
    best, _ = arm_predictions(ScoredArm(name="b", scores=artifact, use="oracle"), root, SST2)
    assert best.tolist() == [[0, 1, 1, 0]] == [labels.tolist()]


def test_ensemble_of_classes_averages_probabilities_not_votes_and_not_logits():
    """Two votes for class 1 of 0.55 each, one for class 0 of 0.95: the mean probability is for class 0. Logits of
    +1, +1 and -2.5 average below 0 too, but +1, +1, -1.9 with probabilities .73, .73, .13 average to .53."""
    margins = torch.tensor([[0.2, 1.0], [0.2, 1.0], [-2.9, -1.9]])
    logits = torch.stack([torch.zeros_like(margins), margins], -1)
    by_hand = 1 / (1 + np.exp(-margins.numpy()))
    expected = (by_hand.mean(0) > 0.5).astype(float)
    assert expected.tolist() == [0.0, 1.0]
    assert ensemble_predictions(SST2, logits).tolist() == expected.tolist()
    mean_logit = margins.mean(0) > 0
    assert mean_logit.tolist() == [False, True]


def test_ensemble_of_a_regression_is_the_mean_value():
    assert ensemble_predictions(STSB, torch.tensor([[[1.0], [4.0]], [[2.0], [0.0]]])).tolist() == [1.5, 2.0]
