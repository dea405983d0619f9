"""Claims: what holds, ties and fails, on differences made to order."""

import math

import numpy as np
import pytest
from scipy import stats

from cpdiff_core.evaluation.bootstrap import ResampledScore, TaskKey
from cpdiff_core.experiments import RESULTS
from cpdiff_core.reports.claims import ablation_claims, all_hold, mean_interval, not_worse, score_claims
from cpdiff_core.reports.comparison import Row, comparison_table

KEY = (TaskKey("t", "accuracy", "10:0"),)


def made(arm, seeds, spread=0.3, key=KEY):
    noise = np.random.default_rng(sum(map(ord, arm))).normal(0, spread, 1000)
    return ResampledScore(arm=arm, keys=key, per_seed=np.array(seeds, float), resampled=np.mean(seeds) + noise)


@pytest.mark.parametrize(
    ("seeds", "spread", "expected"),
    [
        ((0.4, 0.5, 0.6), 0.2, "holds"),
        ((-0.2, -0.3, -0.1), 0.2, "holds"),  # a little worse is comparable
        ((-0.2, -0.3, -0.1), 2.0, "ties"),  # the examples leave it open
        ((-4.0, 3.0, 1.0), 0.2, "ties"),  # the seeds leave it open
        ((-3.0, -3.1, -2.9), 0.2, "fails"),
        ((0.5,), 0.2, "ties"),  # one seed proves nothing
    ],
)
def test_comparable_needs_both_intervals_above_the_margin(seeds, spread, expected):
    assert not_worse(made("d", seeds, spread)) == expected


def test_conjunction_holds_if_all_hold_and_fails_if_one_fails():
    assert all_hold(["holds", "holds"]) == "holds"
    assert all_hold(["holds", "ties"]) == "ties"
    assert all_hold(["holds", "ties", "fails"]) == "fails"


def test_interval_of_a_mean_is_student_s_and_infinite_for_one_value():
    values = [1.0, 2.0, 4.0]
    expected = stats.t.interval(0.95, 2, np.mean(values), stats.sem(values))
    assert mean_interval(values)[1:] == pytest.approx(expected)
    assert mean_interval([3.0]) == (3.0, -math.inf, math.inf)


def row(config, **arms):
    names = {"oracle": "original (oracle)", "selected": "original (selected)", "soup": "model soup",
             "generated": "generated", "mean": "generated (mean)"}  # fmt: skip
    results = {
        task: {names[arm]: made(names[arm], [value, value + 0.01, value - 0.01], 0.1, (TaskKey(task, "accuracy", "1:0"),))
               for arm, value in arms.items()}
        for task in ("mrpc", "average")
    }  # fmt: skip
    return Row(config, results)


def test_score_claims_follow_the_numbers():
    config = RESULTS[0]
    found = {one.text: one.verdict for one in score_claims(
        "r1", row(config, oracle=70.0, selected=68.0, soup=71.0, generated=69.5, mean=69.0))}  # fmt: skip
    assert found["generated is comparable to or better than original"] == "holds"
    assert found["generated is better than original (selected)"] == "holds"
    assert found["the soup is sometimes better than original"] == "holds"
    assert found["(ours) a generated vector is better than the soup"] == "fails"


def test_ablation_claims_take_their_rows_by_name():
    """All rows of the committed set, with scores that make the paper right on N and blocks and wrong on conditions."""
    value = {"table3/minilm-n1": 60.0, "table3/minilm-n500": 66.0, "table4c/minilm-0-0": 61.0, "table4b/minilm-one-hot": 70.0}
    rows = {
        item.name.removeprefix("results/"): row(item, mean=value.get(item.name.removeprefix("results/"), 65.0), generated=65.0)
        for item in RESULTS
    }
    found = {one.text: one.verdict for one in ablation_claims(rows, "r1-single")}
    assert found["larger N is better"] == "holds"
    assert found["larger N is better on MRPC (paper: +4.5)"] == "holds"
    assert found["more blocks are better"] == "holds"
    assert found["description + examples beats the other conditions"] == "fails"
    assert found["task normalisation beats batch beats none"] == "ties"


def test_comparison_prints_the_paper_s_row_under_ours():
    config = next(item for item in RESULTS if item.name == "results/table3/minilm-n500")
    text = comparison_table([row(config, mean=65.0, generated=64.0)], ("generated", "generated (mean)"))
    assert "| minilm-n500 | generated | 64.0 [" in text
    assert "*87.25*" in text, "Table 3, N = 500, MRPC"
