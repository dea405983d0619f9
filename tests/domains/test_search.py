"""The search of Sec. 4.1: the best average, not the best task; diverged runs; the split."""

import pytest
from pydantic import ValidationError

from cpdiff_core.config import UserError
from cpdiff_core.domains.glue.data import SplitConfig
from cpdiff_core.domains.glue.search import SearchConfig, best_setting, settings

CONFIG = SearchConfig(learning_rates=(1e-3, 1e-2), weight_decays=(0.0,), warmup_steps=(10,), num_steps=40, num_lengths=2)


def test_grid_covers_every_combination_and_its_snapshots_are_the_lengths():
    config = SearchConfig()
    assert len(config.grid()) == 3 * 2 * 2
    assert {(run.num_harvest, run.harvest_every, run.num_steps) for run in config.grid()} == {(4, 600, 2400)}
    found = settings(CONFIG, [{"a": (1.0, 2.0)}, {"a": (3.0, 4.0)}])
    assert [(one.learning_rate, one.num_steps) for one in found] == [(1e-3, 20), (1e-3, 40), (1e-2, 20), (1e-2, 40)]


def test_best_average_over_tasks_is_kept_even_if_another_is_best_on_one_task():
    """The long run memorises `rte`; what counts is the mean."""
    found = settings(CONFIG, [{"sst2": (80.0, 84.0), "rte": (60.0, 51.0)}, {"sst2": (79.0, 70.0), "rte": (58.0, 50.0)}])
    best = best_setting(found)
    assert (best.learning_rate, best.num_steps, best.average) == (1e-3, 20, 70.0)


def test_of_equals_the_shortest_run_and_a_diverged_one_never():
    assert best_setting(settings(CONFIG, [{"a": (70.0, 70.0)}, {"a": (None, None)}])).num_steps == 20
    with pytest.raises(UserError, match="no setting has a finite score"):
        best_setting(settings(CONFIG, [{"a": (None, None)}, {"a": (None, None)}]))


def test_search_on_the_training_examples_is_refused():
    with pytest.raises(ValidationError, match="rewards memorising"):
        SearchConfig(splits=SplitConfig(selection_split="train"))
