"""The memorisation audit: edge cases of IoU, and the verdicts that must come out on sets made to order."""

import numpy as np
import pytest
import torch
from sklearn.metrics import jaccard_score

from cpdiff_core.evaluation import audit, trivial
from cpdiff_core.evaluation.bootstrap import Interval
from cpdiff_core.evaluation.selection import ReportScores, SelectionScores
from cpdiff_core.lora.layout import Factor
from cpdiff_core.lora.vectors import min_l2_product

FACTORS = (Factor(module="a", block=0, a_start=0, rank=2, in_features=200, b_start=400, out_features=100),)
K, SCALING = 600, 4.0
TIE = Interval(estimate=0.2, low=-1.0, high=1.4)


def trajectory(num=60, seed=0):
    """A run that drifts: steps of one optimiser trajectory, spread around its mean."""
    rng = torch.Generator().manual_seed(seed)
    scale = torch.linspace(0.2, 1.0, K)
    return torch.randn(1, K, generator=rng) + 0.05 * (scale * torch.randn(num, K, generator=rng)).cumsum(0)


def verdict_of(w_MK, w_NK, difference=TIE):
    found = audit.novelty(w_MK, w_NK, FACTORS, SCALING)
    matched = [
        trivial.match_distance(
            family, w_NK, found.product.generated_median, lambda w: min_l2_product(w, w_NK, FACTORS, SCALING)
        )
        for family in trivial.TRIVIAL_FAMILIES.values()
    ]
    return audit.verdict("rte", found, audit.resembles(w_MK, w_NK, matched), "soup + noise", difference)


def test_exact_and_nearly_exact_copies_are_called_memorised_whatever_they_score():
    w_NK = trajectory()
    better = Interval(estimate=2.0, low=1.0, high=3.0)
    copies = w_NK[torch.arange(20) * 3]
    assert verdict_of(copies, w_NK, better).kind == "memorised"
    nearly = copies + 1e-3 * torch.randn(copies.shape, generator=torch.Generator().manual_seed(1))
    found = verdict_of(nearly, w_NK, better)
    assert found.kind == "memorised"
    assert "20 of 20" in found.text
    assert verdict_of(w_NK[:1].expand(20, K), w_NK[:1]).kind == "memorised"


def test_copies_in_another_factoring_are_called_memorised():
    w_NK = trajectory()
    copies = w_NK[:20].clone()
    copies[:, :400] *= 2.0
    copies[:, 400:] /= 2.0
    assert audit.novelty(copies, w_NK, FACTORS, SCALING).factors.generated_median > 1.0
    assert verdict_of(copies, w_NK).kind == "memorised"


@pytest.mark.parametrize("scale", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("seed", range(5))
def test_pure_soup_noise_is_called_trivial(scale, seed):
    w_NK = trajectory(seed=seed)
    found = verdict_of(trivial.soup_noise(w_NK, 20, 100 + seed, scale), w_NK)
    assert found.kind == "trivial"
    assert "soup + noise" in found.text
    worse = Interval(estimate=-2.0, low=-3.0, high=-1.0)
    assert verdict_of(trivial.soup_noise(w_NK, 20, 100 + seed, scale), w_NK, worse).kind == "trivial"


@pytest.mark.parametrize("name", ["per-coordinate Gaussian", "PCA-16 Gaussian"])
def test_other_trivial_families_are_recognised_by_name(name):
    w_NK = trajectory()
    found = verdict_of(trivial.TRIVIAL_FAMILIES[name].generate(w_NK, 20, 7, 2.0), w_NK)
    assert found.kind == "trivial"
    assert name in found.text


def test_the_soup_itself_twenty_times_is_called_trivial():
    w_NK = trajectory()
    assert verdict_of(w_NK.mean(0).expand(20, K).clone(), w_NK).kind == "trivial"


def test_vectors_of_other_runs_are_neither_and_get_the_verdict_of_their_score():
    """Three training runs; the candidates are runs four to six, from the same start."""
    start = torch.randn(1, K, generator=torch.Generator().manual_seed(9))
    runs = [start + trajectory(seed=seed) - trajectory(seed=seed)[:1] for seed in range(6)]
    w_NK, w_MK = torch.cat(runs[:3]), torch.cat([run[20::6] for run in runs[3:]])
    kinds = {verdict_of(w_MK, w_NK, Interval(estimate=e, low=e - 1.0, high=e + 1.0)).kind: e for e in (-2.0, 0.5, 2.0)}
    assert kinds == {"loses": -2.0, "ties": 0.5, "beats": 2.0}
    assert verdict_of(w_MK, w_NK, None).kind == "unmatched"


def test_signature_by_hand():
    """One coordinate deviates in training; the candidates deviate along it, across it, and not at all."""
    w_NK = torch.tensor([[1.0, 0.0, 0.0, 0.0], [-1.0, 0.0, 0.0, 0.0]])
    w_VK = torch.tensor([[3.0, 0.0, 0.0, 0.0], [0.0, 1.0, 1.0, 0.0], [0.0, 2.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    found = audit.signature(w_VK, w_NK)
    np.testing.assert_allclose(found[:, 0], [1, 0, 0, 0])
    np.testing.assert_allclose(found[:, 1], [1, 0, 0, 0])
    np.testing.assert_allclose(found[:, 2], [4, 2, 4, 0])
    np.testing.assert_allclose(found[:, 3], [2 / 3, np.sqrt(3 / 2), np.sqrt(5) / 2, 0], atol=1e-4)
    np.testing.assert_allclose(found[:, 4], [0, np.sqrt(0.5), 0, 0], atol=1e-4)


def test_novelty_counts_copies_among_new_vectors():
    w_NK = trajectory()
    mixed = torch.cat([w_NK[:3], trajectory(5, seed=4)])
    found = audit.novelty(mixed, w_NK, FACTORS, SCALING)
    assert found.copies == 3
    assert len(found.factors.training) == len(w_NK)
    assert audit.novelty(mixed, w_NK[:1], FACTORS, SCALING).product.training_median is None


def test_wrong_iou_equals_jaccard_and_is_one_for_two_perfect_models():
    rng = np.random.default_rng(0)
    a, b = rng.random((3, 50)) < 0.3, rng.random((4, 50)) < 0.2
    expected = [[jaccard_score(x, y) for y in b] for x in a]
    np.testing.assert_allclose(audit.wrong_iou(a, b), expected)
    perfect, other = np.zeros((1, 50), bool), np.ones((1, 50), bool)
    assert audit.wrong_iou(perfect, perfect) == 1.0
    assert audit.wrong_iou(perfect, other) == 0.0


def test_iou_aggregates_by_hand():
    training = np.array([[1, 1, 0, 0], [0, 1, 1, 0]], bool)
    generated = np.array([[1, 1, 0, 0], [0, 0, 0, 1]], bool)
    found = audit.iou_summary(generated, training)
    assert found.training_training == pytest.approx(1 / 3)
    assert found.generated_generated == 0.0
    assert found.generated_training == pytest.approx((1 + 1 / 3 + 0 + 0) / 4)
    assert found.generated_training_max == pytest.approx((1 + 0) / 2)
    assert found.training_training_max == pytest.approx(1 / 3)
    alone = audit.iou_summary(generated[:1], training[:1])
    assert (alone.training_training, alone.generated_generated, alone.training_training_max) == (None, None, None)


def test_regression_is_wrong_beyond_half_a_point_and_where_it_is_not_a_number():
    wrong = audit.wrong_predictions([1.5, 1.51, 0.4, np.nan], [1.0, 1.0, 1.0, 1.0], regression=True)
    assert wrong.tolist() == [[False, True, True, True]]
    assert audit.wrong_predictions([[0, 1], [1, 1]], [0, 1], regression=False).tolist() == [[0, 0], [1, 0]]


def test_diversity_counts_distinct_prediction_vectors_and_disagreement():
    found = audit.diversity([[0, 1, 1, 0], [0, 1, 1, 0], [1, 1, 1, 0]], regression=False)
    assert (found.num_vectors, found.num_distinct) == (3, 2)
    assert found.mean_disagreement == pytest.approx((0 + 0.25 + 0.25) / 3)
    close = audit.diversity([[1.0, 2.0], [1.1, 2.1], [1.0, 4.0]], regression=True)
    assert close.num_distinct == 2
    assert close.mean_disagreement == pytest.approx((0 + 0.5 + 0.5) / 3)
    assert audit.diversity([0, 1], regression=False).mean_disagreement is None


def test_the_best_trivial_family_is_picked_on_selection_scores_only():
    common = {"task": "rte", "metric": "accuracy", "vectors": "trivial/01"}
    scores = {
        "steady": SelectionScores(**common, split="held_out", scores=(60.0, 61.0)),
        "lucky": SelectionScores(**common, split="held_out", scores=(40.0, 70.0, float("nan"))),
        "broken": SelectionScores(**common, split="held_out", scores=(float("nan"),)),
    }
    assert audit.best_family(scores, "mean") == "steady"
    assert audit.best_family(scores, "best") == "lucky"
    with pytest.raises(TypeError, match="selection split"):
        audit.best_family({"steady": ReportScores(**common, scores=(60.0,))}, "mean")


def test_a_condition_without_effect_is_said_to_do_nothing():
    assert "does nothing" in audit.condition_effect("a shuffled condition", TIE)
    drop = Interval(estimate=3.0, low=1.0, high=5.0)
    assert audit.condition_effect("no condition", drop).startswith("the condition matters: ")
    assert audit.condition_effect("another task's statistics", drop).startswith("the statistics matter: ")
    assert audit.condition_effect("another task's statistics", TIE).startswith("the statistics do nothing that shows: ")
    rise = Interval(estimate=-3.0, low=-5.0, high=-1.0)
    assert audit.condition_effect("no condition", rise).startswith("the condition does harm: ")
    assert audit.condition_effect("another task's statistics", rise).startswith("the statistics do harm: ")
