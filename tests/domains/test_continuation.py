"""Training on: it starts from the given vectors, with another data order, and ends at learning rate 0."""

import pytest
import torch
from test_fine_tuning import LORA, RUNTIME, SPLITS, TUNE

from cpdiff_core.config import UserError
from cpdiff_core.domains.glue.continuation import ContinueConfig, continue_from, continued
from cpdiff_core.domains.glue.fine_tuning import FineTuning, HarvestConfig, initial_weights, run_seed
from cpdiff_core.domains.glue.heads import HeadConfig, fit_head


@pytest.fixture(scope="module")
def run(bert, make_task):
    return HarvestConfig(base=bert, task=make_task("again"), splits=SPLITS, lora=LORA, fine_tune=TUNE)


@pytest.fixture(scope="module")
def head(run):
    return fit_head(HeadConfig(), run.base, run.task, SPLITS, TUNE.max_length, runtime=RUNTIME)


def test_continuing_from_the_initial_weights_is_a_run_from_the_start(run, head):
    again = continued(run, ContinueConfig(num_steps=6, warmup_steps=2))
    start = initial_weights(again)
    w_SK = continue_from([again, again], torch.stack([start, start + 0.01]), [head, head], RUNTIME)
    alone = FineTuning([again], [head], RUNTIME).run(RUNTIME)[0].w_NK
    torch.testing.assert_close(w_SK[:1], alone, atol=1e-6, rtol=1e-5)
    assert not torch.allclose(w_SK[1], w_SK[0], atol=1e-3), "the second started elsewhere"


def test_learning_rate_rises_from_the_run_s_own_and_ends_near_zero(run):
    fine_tune = continued(run, ContinueConfig(num_steps=50, warmup_steps=10)).fine_tune
    rates = fine_tune.learning_rates(50)
    assert rates.max() == pytest.approx(TUNE.learning_rate, rel=0.25)
    assert rates[-1] < 0.05 * TUNE.learning_rate
    assert (rates[10:] == sorted(rates[10:], reverse=True)).all()


def test_data_order_is_not_that_of_the_run(run):
    assert run_seed(continued(run, ContinueConfig())) != run_seed(run)


def test_soup_control_learns(run, head):
    """From the start weights 60 steps bring the training loss down as those of a run do."""
    again = continued(run, ContinueConfig(num_steps=40, batch_size=16, learning_rate=1e-2))
    tuning = FineTuning([again], [head], RUNTIME)
    losses = tuning.run(RUNTIME)[0].losses
    assert losses[-10:].mean() < 0.7 * losses[:10].mean()


def test_vectors_of_another_layout_are_refused(run, head):
    with pytest.raises(ValueError, match="use one layout"):
        continue_from([continued(run, ContinueConfig(num_steps=2))], torch.zeros(1, 7), [head], RUNTIME)


def test_learning_rate_that_is_too_high_is_named_as_the_experiment_names_it(run, head):
    again = continued(run, ContinueConfig(num_steps=3, learning_rate=1e20))
    with pytest.raises(UserError, match=r"lower soup_tuning\.learning_rate"):
        continue_from([again], initial_weights(again)[None], [head], RUNTIME, settings="soup_tuning")
