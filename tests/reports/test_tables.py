"""Tables: seeds pooled on the same resamples, one metric per row, what is stored comes back."""

import numpy as np
import pytest

from cpdiff_core.artifacts import seal
from cpdiff_core.evaluation.bootstrap import resample
from cpdiff_core.reports.comparison import shared_notes
from cpdiff_core.reports.tables import (
    AVERAGE,
    compared_pairs,
    differences_frame,
    load_results,
    results_frame,
    save_results,
    text_table,
    with_average,
)

LABELS = np.tile([0, 1], 50)


def score(arm, task, rates, name="accuracy", metrics=("accuracy",)):
    """An arm that is right on the given share of examples, one share per seed."""
    rng = np.random.default_rng(sum(map(ord, arm + task)))
    predictions = [np.where(rng.permutation(100) < 100 * rate, LABELS, 1 - LABELS) for rate in rates]
    return resample(arm, task, predictions, LABELS, name=name, task_metrics=metrics, num_resamples=200)


@pytest.fixture
def results():
    rates = {"no-LoRA": (0.5, 0.5), "model soup": (0.7, 0.72), "generated": (0.8, 0.9), "generated (mean)": (0.7, 0.7)}
    return with_average(
        {task: {arm: score(arm, task, found) for arm, found in rates.items()} for task in ("sst2", "rte")}
    )


def test_cell_is_the_mean_over_seeds_with_their_spread_apart(results):
    frame = results_frame(results).set_index(["task", "arm"])
    row = frame.loc[("sst2", "generated")]
    assert row.estimate == pytest.approx(85.0)
    assert row.seed_std == pytest.approx(np.std([80.0, 90.0], ddof=1))
    assert row.low < 85.0 < row.high
    assert frame.loc[(AVERAGE, "generated")].estimate == pytest.approx(85.0)
    assert list(dict.fromkeys(frame.index.get_level_values(0))) == ["sst2", "rte", AVERAGE]


def test_stored_scores_come_back_and_still_know_their_metric(results, tmp_path):
    save_results(tmp_path, results)
    seal(tmp_path)
    back = load_results(tmp_path)
    assert list(back) == list(results)
    assert list(back["rte"]) == list(results["rte"])
    difference = back[AVERAGE]["generated"] - results[AVERAGE]["generated"]
    assert np.abs(difference.resampled).max() == 0.0
    with pytest.raises(ValueError, match="use one metric"):
        back["sst2"]["generated"] - score("generated", "sst2", (0.8, 0.9), name="f1")


def test_a_table_says_what_its_rows_have_in_common_first_what_was_saved(tmp_path):
    common = ["Scores are points.", "Seed 42 alone.", "This preset's economy: an excerpt."]
    for name, own in (("a", "Condition one_hot."), ("b", "Condition learned.")):
        (tmp_path / name).mkdir()
        text = "\n".join(f"- {line}" for line in (common[0], own, *common[1:]))
        (tmp_path / name / "summary.txt").write_text(f"sst2 80.0\n----\n\n{text}\n")
        seal(tmp_path / name)
    assert shared_notes([tmp_path / "a", tmp_path / "b"]) == [common[2], common[1], common[0]]


def test_arms_are_compared_like_with_like():
    pairs = compared_pairs(
        ["no-LoRA", "original (selected)", "model soup", "checkpoints (ensemble)", "generated", "generated (mean)",
         "generated (ensemble)"]
    )  # fmt: skip
    assert ("generated", "original (selected)") in pairs
    assert ("generated (mean)", "original (selected)") not in pairs, "a mean has not been chosen"
    assert ("generated (ensemble)", "checkpoints (ensemble)") in pairs
    assert not [pair for pair in pairs if "ensemble" in pair[1] and "ensemble" not in pair[0]]


def test_difference_of_two_seeds_says_what_the_seeds_say_and_one_seed_claims_nothing(results):
    frame = differences_frame(results).set_index(["task", "difference"])
    row = frame.loc[("sst2", "generated - no-LoRA")]
    assert row.estimate == pytest.approx(35.0)
    assert row.low > 0
    # Differences of 30 and 40: Student's t with one degree of freedom, 12.7 x 7.07 / sqrt 2.
    assert (row.seed_low, row.seed_high) == pytest.approx((35 - 63.5, 35 + 63.5), abs=0.1)
    assert row.claim == "ties"
    single = with_average({"sst2": {arm: score(arm, "sst2", (rate,)) for arm, rate in (("no-LoRA", 0.5), ("generated", 0.9))}})
    assert set(differences_frame(single).claim) == {"one seed"}


def test_text_table_names_the_metric_and_turns_when_arms_are_many(results):
    few = text_table(results).splitlines()
    assert few[0].split()[:3] == ["task", "metric", "no-LoRA"]
    assert few[-1].startswith("average")
    many = {task: {f"arm {i}": row["generated"] for i in range(8)} for task, row in results.items()}
    lines = text_table(many).splitlines()
    assert lines[0].split() == ["task", "sst2", "rte", "average"]
    assert lines[1].split()[:3] == ["metric", "accuracy", "accuracy"]
    assert len(lines) == 2 + 1 + 8
