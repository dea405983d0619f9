"""Experiments as data: the paper's rows, what rows share, and combinations that are refused."""

import json
import re

import pytest
from pydantic import ValidationError

from cpdiff_core.evaluation.arms import ALL_ARMS, ARM_NAMES, MEANING, PAPER_ARMS
from cpdiff_core.experiments import BASES, EXPERIMENTS, QUICKSTART, RESULTS, TABLES, ExperimentConfig, glue6
from cpdiff_core.paper import PaperRow, paper_scores

# The paper's Table 1: generated / original / soup, average of six.
AVERAGES = {
    "BERT r=1": (76.5, 76.1, 75.8), "BERT r=2": (76.5, 76.2, 76.2), "BERT r=4": (77.3, 77.4, 77.1),
    "BERT r=16": (79.0, 78.9, 78.8), "RoBERTa r=1": (79.2, 79.4, 79.3), "RoBERTa r=2": (79.0, 79.6, 79.5),
    "RoBERTa r=4": (81.0, 81.0, 81.0), "DeBERTa r=1": (79.4, 79.5, 79.1), "DeBERTa r=2": (79.9, 79.4, 79.4),
    "DeBERTa r=4": (81.2, 81.1, 80.7),
}  # fmt: skip


@pytest.mark.parametrize("row", AVERAGES)
def test_table_1_has_the_paper_s_averages(row):
    average = paper_scores(PaperRow(table="table1", row=row))["average"]
    assert (average["generated"], average["original (oracle)"], average["model soup"]) == AVERAGES[row]


def test_every_row_names_a_row_that_the_paper_has_and_every_paper_row_of_language_is_covered():
    named = {item.paper for item in EXPERIMENTS.values() if item.paper is not None}
    for row in named:
        assert paper_scores(row)
    table1 = {row.row for row in named if row.table == "table1"}
    assert table1 == {*AVERAGES, "BERT full", "RoBERTa full"}
    counts = {name: len({row.row for row in named if row.table == name}) for name in ("table3", "table4a", "table4b", "table4c")}
    assert counts == {"table3": 4, "table4a": 3, "table4b": 4, "table4c": 4}


def test_every_experiment_survives_json_and_says_what_it_costs():
    for item in EXPERIMENTS.values():
        assert ExperimentConfig.model_validate(json.loads(item.model_dump_json())) == item
        assert re.search(r"minute|hour", item.description, re.I), item.name


def test_names_are_unique_in_every_table_and_each_base_has_all_tables():
    for base in BASES:
        names = [row.name for table in TABLES.values() for row in table(base)]
        assert len(set(names)) == len(names)
        assert set(names) <= set(EXPERIMENTS)


def test_rows_of_tables_share_their_runs():
    """One harvest, at Table 3's largest N, serves every row of r = 1."""
    for base in BASES:
        rows = [row for name in ("table3", "table4a", "table4b", "table4c", "extra") for row in TABLES[name](base)]
        shared = {(row.base_model, row.lora, row.fine_tune, row.head, row.splits) for row in [glue6(base, 1), *rows]}
        assert len(shared) == 1
        assert rows[0].fine_tune.num_harvest == 500
    at_r1 = {(row.lora, row.fine_tune, row.splits) for row in RESULTS if row.lora.rank == 1}
    assert len(at_r1) == 1


def test_a_row_differs_from_the_default_in_its_own_field_only():
    default = glue6("minilm-l6", 1).model_dump(exclude={"name", "description", "paper", "arms"})
    fields = {"table3": "num_checkpoints", "table4a": "normalization", "table4b": "condition", "table4c": "blocks"}
    for name, field in fields.items():
        for row in TABLES[name]("minilm-l6"):
            changed = row.model_dump(exclude={"name", "description", "paper", "arms"})
            assert {key for key in default if changed[key] != default[key]} <= {field}


def test_committed_set_has_three_seeds_both_ranks_a_zoo_and_the_audit():
    audited = {(item.lora.rank, item.num_runs) for item in RESULTS if item.audit is not None}
    assert audited == {(1, 1), (1, 5), (4, 1), (4, 5)}
    assert {item.num_seeds for item in RESULTS} == {3}
    assert all(set(item.arms) == set(ALL_ARMS) for item in RESULTS if item.audit is not None)


def test_seeds_move_runs_and_generator_and_leave_splits_and_head():
    item = RESULTS[0]
    second = item.for_seed(2)
    assert (second.seed, second.fine_tune.seed, second.num_seeds) == (item.seed + 2, item.fine_tune.seed + 2, 1)
    assert (second.splits, second.head, second.tasks) == (item.splits, item.head, item.tasks)


def test_quickstart_keeps_the_paper_s_columns():
    assert QUICKSTART.arms == PAPER_ARMS
    assert set(MEANING) == set(ARM_NAMES)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": ["generated (mean)"], "report_candidates": "chosen"}, "needs all candidates scored"),
        ({"audit": {}, "report_candidates": "chosen"}, "the audit needs all candidates"),
        ({"audit": {}, "arms": ["generated"]}, "needs the arms"),
        ({"arms": ["generated", "generated"]}, "occurs twice"),
        ({"arms": ["generatd"]}, "arms"),
        ({"blocks": {"first": 3, "last": 1}}, "last 1 is before first 3"),
        ({"blocks": {"last": 1}, "audit": {}, "arms": ["original (selected)", "generated (mean)"]}, "of whole vectors"),
        ({"num_seeds": 0}, "num_seeds"),
    ],
)
def test_combinations_without_a_meaning_are_refused(changes, message):
    values = QUICKSTART.model_dump(mode="json") | {"report_candidates": "all"} | changes
    with pytest.raises(ValidationError, match=message):
        ExperimentConfig.model_validate(values)
