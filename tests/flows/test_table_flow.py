"""The paper's tables on the excerpt: what distinguishes the rows stays."""

from __future__ import annotations

import pytest

from cpdiff_core.experiments import TABLES, ExperimentConfig
from flows.tables import on_excerpt

NAMES = ("name", "description", "economies", "paper")


def what_is_computed(row: ExperimentConfig) -> str:
    return row.model_dump_json(exclude=set(NAMES))


@pytest.mark.parametrize("table", TABLES)
def test_rows_on_the_excerpt_differ_where_the_table_s_rows_do(table: str) -> None:
    rows = TABLES[table]("minilm-l6")  # type: ignore[index]
    small = [on_excerpt(row) for row in rows]
    assert len({what_is_computed(row) for row in small}) == len({what_is_computed(row) for row in rows})
    assert {task.data.kind for row in small for task in row.tasks} == {"excerpt"}
    for row, less in zip(rows, small, strict=True):
        kept = ("base_model", "lora", "normalization", "condition", "blocks")
        assert all(getattr(row, name) == getattr(less, name) for name in kept)
        assert less.autoencoder.kind == row.autoencoder.kind
        assert less.sampling.scheduler == row.sampling.scheduler
        assert less.paper is None
        assert less.economies
